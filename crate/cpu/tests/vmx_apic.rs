//! Accesses of a guest to its APIC (Vol. 3C, "APIC Virtualization and Virtual Interrupts"): what is
//! virtualized, what exits and with what.

mod support;

use hypernest_cpu::{Model, VmxChoice};
use hypernest_vmcs::{ExitReason, Field, exit, pin, proc1, proc2, proc3};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, ax, byte_ptr, cr8, dword_ptr, eax, ebx, ecx, edi, edx, qword_ptr, r8, rax,
    rbx, rsp, word_ptr,
};
use support::HANDLERS;
use support::apic::{
    ACCESS, Controls, DELIVERY, EOI, ICR, ICR_HIGH, IRR, ISR, MSR_FIELDS, PAGE, POSTED, POSTING,
    REGISTERS, RFLAGS_IF, SEEN, SHADOW, TPR, VIRTUAL, X2APIC, access, caps, handled, has_vector,
    l1, reason, register, set_register, set_vector, start, status, write_msr,
};
use support::hypervisor::{EPT, Emit, GUEST, PAGES, RWX, ept_entry};

// ---- CR8 and the TPR threshold ----

#[test]
fn cr8_is_bits_7_to_4_of_the_virtual_task_priority() {
    let mut l1 = l1(SHADOW, &[], &|a| {
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.mov(rbx, cr8)?;
        a.mov(qword_ptr(SEEN), rbx)?;
        a.vmcall()
    });
    set_register(&mut l1, TPR, 0xffff_ffff);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(register(&l1, TPR), 0x50);
    assert_eq!(l1.word(SEEN), 5);
    assert_eq!(l1.state().apic.tpr, 0, "not that of L1's APIC");
}

#[test]
fn cr8_has_no_more_than_four_bits_and_without_the_shadow_is_that_of_the_apic() {
    let guest: Emit = &|a| {
        a.mov(eax, 0x10)?;
        a.mov(cr8, rax)?;
        a.vmcall()
    };
    let l1 = start(SHADOW, &[(Field::EXCEPTION_BITMAP, 1 << 13)], guest);
    assert_eq!(l1.reason(), ExitReason::EXCEPTION_OR_NMI);
    assert_eq!(register(&l1, TPR), 0);

    let l1 = start(Controls::default(), &[], &|a| {
        a.mov(eax, 6)?;
        a.mov(cr8, rax)?;
        a.vmcall()
    });
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(l1.state().apic.tpr, 0x60);
    assert_eq!(register(&l1, TPR), 0);
}

#[test]
fn a_task_priority_below_the_threshold_exits_after_the_instruction() {
    let mut l1 = l1(SHADOW, &[(Field::TPR_THRESHOLD, 5)], &|a| {
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.dec(eax)?;
        a.mov(cr8, rax)?;
        a.vmcall()
    });
    set_register(&mut l1, TPR, 0x70);
    l1.run();
    assert_eq!(l1.exit(), (reason(ExitReason::TPR_BELOW_THRESHOLD), 0));
    assert_eq!(register(&l1, TPR), 0x40);
    // MOV, MOV CR8 (4), DEC, MOV CR8.
    assert_eq!(l1.field(Field::GUEST_RIP), GUEST + 5 + 4 + 2 + 4);
    l1.set(Field::TPR_THRESHOLD, 4);
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
}

#[test]
fn an_entry_below_the_threshold_exits_after_its_event_and_out_of_hlt() {
    let guest: Emit = &|a| a.vmcall();
    let fields = [(Field::TPR_THRESHOLD, 1), (Field::GUEST_RFLAGS, RFLAGS_IF)];
    let mut l1 = start(PAGE, &fields, guest);
    assert_eq!(l1.reason(), ExitReason::TPR_BELOW_THRESHOLD);
    assert_eq!(l1.field(Field::GUEST_RIP), GUEST, "before any instruction");
    l1.set(Field::VM_ENTRY_INTR_INFO_FIELD, 1 << 31 | 0x30);
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::TPR_BELOW_THRESHOLD);
    assert_eq!(l1.field(Field::GUEST_RIP), HANDLERS + 16 * 0x30);
    l1.set(Field::GUEST_ACTIVITY_STATE, 1);
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::TPR_BELOW_THRESHOLD);
    assert_eq!(l1.field(Field::GUEST_ACTIVITY_STATE), 1);
    set_register(&mut l1, TPR, 0x10);
    l1.set(Field::GUEST_ACTIVITY_STATE, 0);
    l1.resume();
    assert_eq!(handled(&l1), 0x30);

    // Where the page is not virtualized, such an entry fails.
    let l1 = start(SHADOW, &[(Field::TPR_THRESHOLD, 1)], guest);
    assert_eq!(l1.field(Field::VM_INSTRUCTION_ERROR), 7);
}

// ---- the APIC-access page ----

#[test]
fn accesses_to_the_page_exit_with_kind_and_offset() {
    let none = Controls {
        proc2: proc2::VIRTUALIZE_APIC_ACCESSES,
        ..Controls::default()
    };
    let mut l1 = start(none, &[], &|a| {
        a.mov(ecx, dword_ptr(ACCESS + TPR))?;
        a.mov(dword_ptr(ACCESS + TPR), ecx)?;
        a.inc(byte_ptr(ACCESS + 0x301))?;
        a.clflush(byte_ptr(ACCESS + 0x123))?;
        a.mov(rax, ACCESS + 0x40)?;
        a.jmp(rax)
    });
    assert_eq!(l1.exit(), access(0, TPR));
    assert_eq!(l1.field(Field::VM_EXIT_INSTRUCTION_LEN), 7);
    assert_eq!(l1.field(Field::GUEST_RIP), GUEST);
    assert_eq!(l1.next(), access(1, TPR));
    assert_eq!(l1.next(), access(1, 0x301));
    assert_eq!(l1.next(), access(0, 0x123));
    assert_eq!(l1.next(), access(2, 0x40));
    assert_eq!(l1.field(Field::GUEST_RIP), ACCESS + 0x40);
    assert_eq!(register(&l1, TPR), 0);
}

#[test]
fn wide_misaligned_and_crossing_accesses_are_not_virtualized() {
    let mut l1 = start(REGISTERS, &[], &|a| {
        a.mov(rax, qword_ptr(ACCESS + TPR))?;
        a.mov(ax, word_ptr(ACCESS + TPR + 3))?;
        a.mov(al, byte_ptr(ACCESS + TPR + 4))?;
        a.mov(dword_ptr(ACCESS - 2), eax)?;
        a.mov(dword_ptr(ACCESS + 0xffe), eax)?;
        a.mov(ax, word_ptr(ACCESS + TPR + 2))?;
        a.vmcall()
    });
    assert_eq!(l1.exit(), access(0, TPR));
    assert_eq!(l1.next(), access(0, TPR + 3));
    assert_eq!(l1.next(), access(0, TPR + 4));
    assert_eq!(l1.next(), access(1, 0));
    assert_eq!(l1.next(), access(1, 0xffe));
    assert_eq!(l1.next().0, reason(ExitReason::VMCALL));
}

/// Which registers are virtualized, by offset: for reading, for writing.
fn is_virtualized(controls: Controls, offset: u64) -> (bool, bool) {
    if controls.proc2 & proc2::APIC_REGISTER_VIRTUALIZATION == 0 {
        let delivery = controls.proc2 & proc2::VIRTUAL_INTERRUPT_DELIVERY != 0;
        let there = offset == TPR || delivery && (offset == EOI || offset == ICR);
        return (there, there);
    }
    let both = [
        0x20, 0x80, 0xb0, 0xd0, 0xe0, 0xf0, 0x280, 0x300, 0x310, 0x320, 0x330, 0x340, 0x350, 0x360,
        0x370, 0x380, 0x3e0,
    ];
    let write = both.contains(&offset);
    let read = write || offset == 0x30 || (0x100..0x280).contains(&offset);
    (read, write)
}

#[test]
fn what_is_virtualized_depends_on_the_controls_and_the_register() {
    let delivery_alone = Controls {
        proc2: PAGE.proc2 | proc2::VIRTUAL_INTERRUPT_DELIVERY,
        ..PAGE
    };
    for controls in [PAGE, delivery_alone, REGISTERS, DELIVERY] {
        // R8: the register; a read, then a write, each closed by VMCALL.
        let mut l1 = start(controls, &[], &|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.vmcall()?;
            a.mov(ecx, dword_ptr(r8))?;
            a.vmcall()?;
            a.mov(dword_ptr(r8), edx)?;
            a.jmp(again)
        });
        for offset in (0..0x1000).step_by(16) {
            assert_eq!(l1.reason(), ExitReason::VMCALL, "{offset:#x}");
            let (read, write) = is_virtualized(controls, offset);
            set_register(&mut l1, offset, 0x1234_5678);
            l1.skip();
            l1.resume_after(&|a| {
                a.mov(r8, ACCESS + offset)?;
                a.xor(edx, edx)
            });
            if !read {
                assert_eq!(l1.exit(), access(0, offset));
                l1.skip();
                l1.resume();
            } else {
                let low = l1.state().gpr[1];
                assert_eq!(low, 0x1234_5678, "{offset:#x}");
            }
            assert_eq!(l1.reason(), ExitReason::VMCALL, "{offset:#x}");
            l1.skip();
            l1.resume();
            if !write {
                assert_eq!(l1.exit(), access(1, offset));
                l1.skip();
                l1.resume();
                continue;
            }
            assert_eq!(register(&l1, offset), 0, "{offset:#x}");
            let emulated = offset == TPR
                || offset == ICR_HIGH
                || offset == EOI && controls.proc2 & proc2::VIRTUAL_INTERRUPT_DELIVERY != 0;
            if !emulated {
                assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), offset));
                l1.resume();
            }
        }
    }
}

#[test]
fn a_write_exit_comes_after_the_instruction_and_the_write() {
    let mut l1 = start(REGISTERS, &[], &|a| {
        a.mov(dword_ptr(ACCESS + 0xf0), 0x1ff)?;
        a.mov(byte_ptr(ACCESS + 0x81), 0x22)?;
        a.mov(dword_ptr(ACCESS + ICR_HIGH), 0x1234_5678)?;
        a.mov(dword_ptr(ACCESS + TPR), 0xabcd_ef12u32 as i32)?;
        a.or(dword_ptr(ACCESS + TPR), 0x40)?;
        a.mov(dword_ptr(ACCESS + EOI), 0)?;
        a.vmcall()
    });
    assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), 0xf0));
    assert_eq!(register(&l1, 0xf0), 0x1ff);
    assert_eq!(l1.field(Field::GUEST_RIP), GUEST + 11);
    l1.resume();
    assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), 0x81));
    l1.resume();
    // Of the ICR's high half one byte stays, of the task priority another.
    assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), EOI));
    assert_eq!(register(&l1, ICR_HIGH), 0x1200_0000);
    assert_eq!(register(&l1, TPR), 0x52);
    assert_eq!(l1.word(ACCESS + TPR), 0);
}

#[test]
fn after_a_write_another_one_of_the_same_operation_exits() {
    // ENTER pushes two words, the second below the first.
    let l1 = start(REGISTERS, &[], &|a| {
        a.mov(rsp, ACCESS + TPR + 4)?;
        a.db(&[0x66, 0xc8, 0, 0, 1])?;
        a.vmcall()
    });
    assert_eq!(l1.exit(), access(1, TPR));
    assert_eq!(l1.field(Field::GUEST_RSP), ACCESS + TPR + 4);
}

#[test]
fn string_writes_are_emulated_one_by_one() {
    let mut l1 = l1(REGISTERS, &[(Field::TPR_THRESHOLD, 4)], &|a| {
        a.mov(eax, 0x50)?;
        a.mov(edi, ACCESS as u32 + TPR as u32)?;
        a.mov(ecx, 2)?;
        a.std()?;
        a.rep().stosd()?;
        a.vmcall()
    });
    set_register(&mut l1, TPR, 0x40);
    l1.run();
    // The second word is not the start of a register.
    assert_eq!(l1.exit(), access(1, TPR - 4));
    assert_eq!(l1.state().gpr[1], 1);
    assert_eq!(register(&l1, TPR), 0x50);
}

#[test]
fn event_delivery_through_the_page_exits_as_such() {
    let mut l1 = start(PAGE, &[], &|a| {
        a.mov(rsp, ACCESS + 0x200)?;
        a.int(0x44)?;
        a.vmcall()
    });
    assert_eq!(l1.exit(), access(3, 0x1f8));
    assert_eq!(
        l1.field(Field::IDT_VECTORING_INFO_FIELD),
        1 << 31 | 4 << 8 | 0x44
    );
    assert_eq!(l1.field(Field::VM_EXIT_INSTRUCTION_LEN), 2);
    l1.set(Field::GUEST_RSP, SEEN + 0x800);
    l1.resume();
    assert_eq!(handled(&l1), 0x44);
}

#[test]
fn guest_page_tables_on_the_page_exit_as_guest_physical_accesses() {
    const TABLE: u64 = 0x4000;
    let ept = Controls {
        proc2: REGISTERS.proc2 | proc2::ENABLE_EPT,
        ..REGISTERS
    };
    let table = [
        (Field::APIC_ACCESS_ADDR, TABLE),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
    ];
    let guest: Emit = &|a| a.vmcall();
    let mut l1 = start(ept, &table, guest);
    assert_eq!(l1.exit(), access(15, 0));
    assert_eq!(l1.field(Field::IDT_VECTORING_INFO_FIELD), 0);
    l1.set(Field::VM_ENTRY_INTR_INFO_FIELD, 1 << 31 | 0x44);
    l1.resume();
    assert_eq!(l1.exit(), access(10, 0));
    // Without EPT such accesses are physical ones.
    let l1 = start(REGISTERS, &table, guest);
    assert_eq!(l1.reason(), ExitReason::VMCALL);
}

#[test]
fn faults_come_before_apic_access_exits() {
    let ept = Controls {
        proc2: PAGE.proc2 | proc2::ENABLE_EPT,
        ..PAGE
    };
    let mut l1 = l1(ept, &[], &|a| {
        a.mov(eax, dword_ptr(ACCESS + 0x20))?;
        a.vmcall()
    });
    l1.put(ept_entry(EPT, ACCESS), 0);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::EPT_VIOLATION);
    l1.put(ept_entry(EPT, ACCESS), ACCESS | RWX);
    l1.resume();
    assert_eq!(l1.exit(), access(0, 0x20));
}

#[test]
fn no_cached_translation_hides_the_page() {
    let secondary = proc2::ENABLE_EPT | proc2::ENABLE_VPID;
    let plain = Controls {
        proc2: secondary,
        ..SHADOW
    };
    let mut l1 = l1(plain, &[], &|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(edx, dword_ptr(ACCESS + 0x20))?;
        a.mov(ebx, dword_ptr(SEEN + 0x20))?;
        a.vmcall()?;
        a.jmp(again)
    });
    l1.put(ACCESS + 0x20, 0x77);
    l1.put(SEEN + 0x20, 0x88);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(l1.state().gpr[2], 0x77);
    // Nothing is invalidated between these entries.
    let both = u64::from(secondary | proc2::VIRTUALIZE_APIC_ACCESSES);
    l1.set(Field::SECONDARY_VM_EXEC_CONTROL, both);
    assert_eq!(l1.next(), access(0, 0x20));
    l1.set(Field::APIC_ACCESS_ADDR, SEEN);
    l1.resume();
    assert_eq!(l1.exit(), access(0, 0x20));
    assert_eq!(l1.field(Field::GUEST_RIP), GUEST + 7);
    l1.set(Field::SECONDARY_VM_EXEC_CONTROL, u64::from(secondary));
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(l1.state().gpr[3], 0x88);
}

// ---- MSRs ----

fn with_msrs(controls: Controls, more: u32) -> Controls {
    Controls {
        proc1: controls.proc1 | proc1::USE_MSR_BITMAPS,
        proc2: controls.proc2 | more,
        ..controls
    }
}

fn read_msr(a: &mut CodeAssembler, number: u32) -> Result<(), IcedError> {
    a.mov(ecx, number)?;
    a.rdmsr()
}

#[test]
fn msrs_read_the_virtual_page_whatever_mode_the_apic_is_in() {
    let guest: Emit = &|a| {
        read_msr(a, 0x808)?;
        a.mov(dword_ptr(SEEN), eax)?;
        a.mov(dword_ptr(SEEN + 4), edx)?;
        read_msr(a, 0x8ff)?;
        a.vmcall()
    };
    let mut l1 = l1(with_msrs(X2APIC, 0), &MSR_FIELDS, guest);
    l1.put(VIRTUAL + TPR, 0x1111_2222_3333_4444);
    l1.run();
    // The other one is L1's, whose APIC is not in x2APIC mode.
    assert_eq!(l1.reason(), ExitReason::EXCEPTION_OR_NMI);
    assert_eq!(l1.word(SEEN), 0x1111_2222_3333_4444);

    let all = with_msrs(X2APIC, proc2::APIC_REGISTER_VIRTUALIZATION);
    let mut l1 = support::apic::l1(all, &MSR_FIELDS, guest);
    l1.put(VIRTUAL + 0xff0, 0x5555_6666_7777_8888);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    let state = l1.state();
    assert_eq!((state.gpr[2], state.gpr[0]), (0x5555_6666, 0x7777_8888));
    // The MSR bitmap comes first.
    let mut l1 = support::apic::l1(all, &MSR_FIELDS, guest);
    l1.put(PAGES + 0x4000 + 0x808 / 8, 1);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::RDMSR);
}

#[test]
fn msr_writes_of_the_task_priority_compare_it() {
    let fields = [MSR_FIELDS[0], MSR_FIELDS[1], (Field::TPR_THRESHOLD, 3)];
    let mut l1 = l1(with_msrs(X2APIC, 0), &fields, &|a| {
        write_msr(a, 0x808, 0x35, 0)?;
        write_msr(a, 0x808, 0x25, 0)?;
        write_msr(a, 0x808, 0x125, 0)
    });
    l1.put(VIRTUAL + TPR, !0);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::TPR_BELOW_THRESHOLD);
    assert_eq!(l1.word(VIRTUAL + TPR), 0x25);
    l1.set(Field::TPR_THRESHOLD, 0);
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::EXCEPTION_OR_NMI);
    assert_eq!(l1.word(VIRTUAL + TPR), 0x25);
}

#[test]
fn msr_writes_end_and_send_virtual_interrupts() {
    let delivery = with_msrs(X2APIC, proc2::VIRTUAL_INTERRUPT_DELIVERY);
    let fields = [
        MSR_FIELDS[0],
        MSR_FIELDS[1],
        (Field::GUEST_INTR_STATUS, 0x4100),
    ];
    let mut l1 = l1(delivery, &fields, &|a| {
        write_msr(a, 0x80b, 0, 0)?;
        write_msr(a, 0x83f, 0x51, 0)?;
        write_msr(a, 0x83f, 0x0f, 0)?;
        write_msr(a, 0x83f, 0x51, 1)
    });
    set_vector(&mut l1, ISR, 0x41);
    l1.put(VIRTUAL + EOI, !0);
    l1.run();
    // A vector that no interrupt has is the hypervisor's business.
    assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), 0x3f0));
    assert_eq!(l1.word(VIRTUAL + EOI), 0);
    assert!(!has_vector(&l1, ISR, 0x41) && has_vector(&l1, IRR, 0x51));
    assert_eq!(status(&l1), (0x51, 0));
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::EXCEPTION_OR_NMI);

    let l1 = start(delivery, &MSR_FIELDS, &|a| write_msr(a, 0x80b, 1, 0));
    assert_eq!(l1.reason(), ExitReason::EXCEPTION_OR_NMI);
    // Without delivery these are the MSRs of L1's APIC, which does not have them in this mode.
    for number in [0x80b, 0x83f] {
        let l1 = start(with_msrs(X2APIC, 0), &MSR_FIELDS, &|a| {
            write_msr(a, number, 0, 0)
        });
        assert_eq!(l1.reason(), ExitReason::EXCEPTION_OR_NMI);
    }
}

// ---- controls ----

#[test]
fn controls_that_do_not_fit_each_other_fail_the_entry() {
    let changed = |base: Controls, proc1: u32, proc2: u32, pin: u32, exit: u32| Controls {
        proc1: base.proc1 & !proc1,
        proc2: base.proc2 ^ proc2,
        pin: base.pin ^ pin,
        exit: base.exit ^ exit,
        ..base
    };
    let shadow = proc1::USE_TPR_SHADOW;
    let accesses = proc2::VIRTUALIZE_APIC_ACCESSES;
    let delivery = proc2::VIRTUAL_INTERRUPT_DELIVERY;
    let acknowledge = exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT;
    let none: &[(Field, u64)] = &[];
    let ipis = Controls {
        proc3: proc3::IPI_VIRTUALIZATION,
        ..SHADOW
    };
    let no_exits = [(
        Field::PIN_BASED_VM_EXEC_CONTROL,
        u64::from(caps().pin_allowed0()),
    )];
    for (controls, fields) in [
        (SHADOW, &[(Field::VIRTUAL_APIC_PAGE_ADDR, VIRTUAL + 8)][..]),
        (SHADOW, &[(Field::VIRTUAL_APIC_PAGE_ADDR, 1 << 52)]),
        (SHADOW, &[(Field::TPR_THRESHOLD, 0x10)]),
        (SHADOW, &[(Field::TPR_THRESHOLD, 1)]),
        (changed(X2APIC, shadow, 0, 0, 0), none),
        (changed(REGISTERS, shadow, 0, 0, 0), none),
        (changed(DELIVERY, shadow, 0, 0, 0), none),
        (PAGE, &[(Field::APIC_ACCESS_ADDR, ACCESS + 8)]),
        (PAGE, &[(Field::APIC_ACCESS_ADDR, 1 << 52)]),
        (changed(X2APIC, 0, accesses, 0, 0), none),
        (DELIVERY, &no_exits),
        (changed(ipis, shadow, 0, 0, 0), none),
        (ipis, &[(Field::PID_POINTER_TABLE, VIRTUAL + 4)]),
        (ipis, &[(Field::PID_POINTER_TABLE, 1 << 52)]),
        (changed(POSTING, 0, delivery, 0, 0), none),
        (changed(POSTING, 0, 0, 0, acknowledge), none),
        (POSTING, &[(Field::POSTED_INTR_NV, 0x100)]),
        (POSTING, &[(Field::POSTED_INTR_DESC_ADDR, POSTED + 32)]),
        (POSTING, &[(Field::POSTED_INTR_DESC_ADDR, 1 << 52)]),
    ] {
        let l1 = start(controls, fields, &|a| a.vmcall());
        assert!(l1.stop.is_some(), "{fields:x?}");
        assert_eq!(l1.field(Field::VM_INSTRUCTION_ERROR), 7, "{fields:x?}");
    }
    // Each of them alone was wrong.
    for controls in [SHADOW, PAGE, REGISTERS, DELIVERY, POSTING, X2APIC, ipis] {
        let l1 = start(controls, none, &|a| a.vmcall());
        assert_eq!(l1.reason(), ExitReason::VMCALL);
    }
}

#[test]
fn both_profiles_offer_it() {
    for choice in [VmxChoice::Max, VmxChoice::Kvm] {
        let caps = choice
            .profile(<&Model>::default())
            .unwrap()
            .unwrap()
            .caps
            .clone();
        let secondary = DELIVERY.proc2 | X2APIC.proc2;
        assert_eq!(caps.proc2_allowed1() & secondary, secondary);
        assert_ne!(caps.proc1_allowed1() & proc1::USE_TPR_SHADOW, 0);
        assert_ne!(caps.pin_allowed1() & pin::PROCESS_POSTED_INTERRUPTS, 0);
        // KVM's VMCS has no room for the tertiary controls.
        let ipis = caps.proc3_allowed1() & proc3::IPI_VIRTUALIZATION != 0;
        assert_eq!(ipis, choice == VmxChoice::Max);
    }
}
