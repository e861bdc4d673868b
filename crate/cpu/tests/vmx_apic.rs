//! A guest's APIC (Vol. 3C, "APIC Virtualization and Virtual Interrupts"): what is virtualized, what
//! exits and with what, and how virtual interrupts reach the guest.

mod support;

use hypernest_cpu::{Activity, Model, VmxChoice, VmxProfile};
use hypernest_vmcs::{Caps, ExitReason, Field, exit, pin, proc1, proc2};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, ax, byte_ptr, cr8, dword_ptr, eax, ebx, ecx, edi, edx, qword_ptr, r8, rax,
    rbx, rsp, word_ptr,
};
use support::hypervisor::{EPT, Emit, GUEST, L1, PAGES, RWX, Setup, ept_entry};
use support::{HANDLERS, Nothing};

/// The virtual-APIC page, the APIC-access page, a posted-interrupt descriptor.
const VIRTUAL: u64 = PAGES;
const ACCESS: u64 = PAGES + 0x1000;
const POSTED: u64 = PAGES + 0x2040;
/// What the guest saw.
const SEEN: u64 = PAGES + 0x3000;

const TPR: u64 = 0x80;
const PPR: u64 = 0xa0;
const EOI: u64 = 0xb0;
const ISR: u64 = 0x100;
const IRR: u64 = 0x200;
const ICR: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;

const RFLAGS_IF: u64 = 1 << 9 | 2;
const NOTIFICATION: u64 = 0xf2;

fn caps() -> Caps {
    VmxProfile::max(<&Model>::default()).caps
}

/// What of the APIC is virtualized.
#[derive(Clone, Copy, Default)]
struct Controls {
    pin: u32,
    proc1: u32,
    proc2: u32,
    exit: u32,
}

/// MOV CR8 alone.
const SHADOW: Controls = Controls {
    pin: 0,
    proc1: proc1::USE_TPR_SHADOW,
    proc2: 0,
    exit: 0,
};
/// And of the memory-mapped registers the task priority.
const PAGE: Controls = Controls {
    proc2: proc2::VIRTUALIZE_APIC_ACCESSES,
    ..SHADOW
};
/// And the others.
const REGISTERS: Controls = Controls {
    proc2: PAGE.proc2 | proc2::APIC_REGISTER_VIRTUALIZATION,
    ..PAGE
};
/// And interrupts.
const DELIVERY: Controls = Controls {
    proc2: REGISTERS.proc2 | proc2::VIRTUAL_INTERRUPT_DELIVERY,
    ..REGISTERS
};
/// And interrupts that others post.
const POSTING: Controls = Controls {
    pin: pin::PROCESS_POSTED_INTERRUPTS,
    exit: exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT,
    ..DELIVERY
};
/// The MSRs of x2APIC mode.
const X2APIC: Controls = Controls {
    proc2: proc2::VIRTUALIZE_X2APIC_MODE,
    ..SHADOW
};

/// And interrupts, in that mode.
const MSRS: Controls = Controls {
    proc1: SHADOW.proc1 | proc1::USE_MSR_BITMAPS,
    proc2: proc2::VIRTUALIZE_X2APIC_MODE | proc2::VIRTUAL_INTERRUPT_DELIVERY,
    ..SHADOW
};

/// A hypervisor that has not started `guest` yet.
fn l1(controls: Controls, fields: &[(Field, u64)], guest: Emit) -> L1 {
    let caps = caps();
    let pins = caps.pin_allowed0() | pin::EXTERNAL_INTERRUPT_EXITING | controls.pin;
    let first = caps.proc1_allowed0()
        | proc1::HLT_EXITING
        | proc1::ACTIVATE_SECONDARY_CONTROLS
        | controls.proc1;
    let exits = caps.exit_allowed0() | exit::HOST_ADDRESS_SPACE_SIZE | controls.exit;
    let mut all = vec![
        (Field::PIN_BASED_VM_EXEC_CONTROL, u64::from(pins)),
        (Field::CPU_BASED_VM_EXEC_CONTROL, u64::from(first)),
        (Field::VM_EXIT_CONTROLS, u64::from(exits)),
        (Field::VIRTUAL_APIC_PAGE_ADDR, VIRTUAL),
        (Field::APIC_ACCESS_ADDR, ACCESS),
        (Field::POSTED_INTR_NV, NOTIFICATION),
        (Field::POSTED_INTR_DESC_ADDR, POSTED),
    ];
    all.extend_from_slice(fields);
    L1::new(&Setup {
        choice: VmxChoice::Max,
        proc2: controls.proc2,
        fields: &all,
        guest,
    })
}

/// Runs `guest` to its first exit.
fn start(controls: Controls, fields: &[(Field, u64)], guest: Emit) -> L1 {
    let mut l1 = l1(controls, fields, guest);
    l1.run();
    l1
}

fn reason(reason: ExitReason) -> u64 {
    u64::from(reason.0)
}

/// A register of the virtual-APIC page.
fn register(l1: &L1, offset: u64) -> u32 {
    u32::from_le_bytes(l1.ram.load(VIRTUAL + offset).unwrap())
}

fn set_register(l1: &mut L1, offset: u64, value: u32) {
    l1.ram
        .write(VIRTUAL + offset, &value.to_le_bytes())
        .unwrap();
}

/// Sets a vector in one of the sets of 256 bits.
fn set_vector(l1: &mut L1, set: u64, vector: u8) {
    let at = set + u64::from(vector >> 5) * 16;
    let word = register(l1, at) | 1 << (vector & 31);
    set_register(l1, at, word);
}

fn has_vector(l1: &L1, set: u64, vector: u8) -> bool {
    register(l1, set + u64::from(vector >> 5) * 16) >> (vector & 31) & 1 != 0
}

/// RVI and SVI.
fn status(l1: &L1) -> (u64, u64) {
    let value = l1.field(Field::GUEST_INTR_STATUS);
    (value & 0xff, value >> 8)
}

/// The vector of the handler that the guest left by its HLT.
fn handled(l1: &L1) -> u64 {
    assert_eq!(l1.reason(), ExitReason::HLT);
    (l1.field(Field::GUEST_RIP) - HANDLERS) / 16
}

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

/// Exit qualification of APIC-access exits.
fn access(kind: u64, offset: u64) -> (u64, u64) {
    (reason(ExitReason::APIC_ACCESS), kind << 12 | offset)
}

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

/// An MSR bitmap of zeros, and #GP exits.
const MSR_FIELDS: [(Field, u64); 2] = [
    (Field::MSR_BITMAP, PAGES + 0x4000),
    (Field::EXCEPTION_BITMAP, 1 << 13),
];

fn read_msr(a: &mut CodeAssembler, number: u32) -> Result<(), IcedError> {
    a.mov(ecx, number)?;
    a.rdmsr()
}

fn write_msr(a: &mut CodeAssembler, number: u32, low: u32, high: u32) -> Result<(), IcedError> {
    a.mov(ecx, number)?;
    a.mov(eax, low)?;
    a.mov(edx, high)?;
    a.wrmsr()
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
    let mut l1 = crate::l1(all, &MSR_FIELDS, guest);
    l1.put(VIRTUAL + 0xff0, 0x5555_6666_7777_8888);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    let state = l1.state();
    assert_eq!((state.gpr[2], state.gpr[0]), (0x5555_6666, 0x7777_8888));
    // The MSR bitmap comes first.
    let mut l1 = crate::l1(all, &MSR_FIELDS, guest);
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

// ---- virtual interrupts ----

#[test]
fn a_requested_interrupt_is_delivered_when_the_guest_takes_it() {
    let mut l1 = l1(DELIVERY, &[(Field::GUEST_INTR_STATUS, 0x62)], &|a| {
        a.nop()?;
        a.sti()?;
        a.nop()?;
        a.vmcall()
    });
    set_vector(&mut l1, IRR, 0x62);
    set_vector(&mut l1, IRR, 0x35);
    set_register(&mut l1, TPR, 0x10);
    l1.run();
    assert_eq!(handled(&l1), 0x62);
    // The shadow of STI is over.
    assert_eq!(l1.word(l1.field(Field::GUEST_RSP)), GUEST + 3);
    assert_eq!(status(&l1), (0x35, 0x62));
    assert_eq!(register(&l1, PPR), 0x60);
    assert!(has_vector(&l1, ISR, 0x62) && !has_vector(&l1, IRR, 0x62));
    assert!(has_vector(&l1, IRR, 0x35));
}

#[test]
fn what_has_no_priority_waits_until_it_has() {
    let fields = [
        (Field::GUEST_INTR_STATUS, 0x62),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
    ];
    let mut l1 = l1(DELIVERY, &fields, &|a| {
        a.vmcall()?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.vmcall()
    });
    set_vector(&mut l1, IRR, 0x62);
    set_register(&mut l1, TPR, 0x62);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(register(&l1, PPR), 0x62);
    l1.skip();
    l1.resume();
    assert_eq!(handled(&l1), 0x62);
    assert_eq!(l1.word(l1.field(Field::GUEST_RSP)), GUEST + 3 + 5 + 4);
}

#[test]
fn nothing_is_delivered_while_the_hypervisor_waits_for_the_window() {
    let window = Controls {
        proc1: DELIVERY.proc1 | proc1::INTERRUPT_WINDOW_EXITING,
        ..DELIVERY
    };
    let fields = [(Field::GUEST_INTR_STATUS, 0x62)];
    let mut l1 = l1(window, &fields, &|a| {
        a.sti()?;
        a.nop()?;
        a.vmcall()
    });
    set_vector(&mut l1, IRR, 0x62);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::INTERRUPT_WINDOW);
    assert_eq!(status(&l1), (0x62, 0));
}

#[test]
fn a_virtual_interrupt_ends_hlt_but_not_shutdown() {
    let fields = |activity| {
        [
            (Field::GUEST_INTR_STATUS, 0x62),
            (Field::GUEST_RFLAGS, RFLAGS_IF),
            (Field::GUEST_ACTIVITY_STATE, activity),
        ]
    };
    for (activity, wakes) in [(1, true), (2, false)] {
        let mut l1 = l1(DELIVERY, &fields(activity), &|a| a.vmcall());
        set_vector(&mut l1, IRR, 0x62);
        l1.run();
        if wakes {
            assert_eq!(handled(&l1), 0x62);
        } else {
            assert_eq!(l1.state().activity, Activity::Shutdown);
            assert!(l1.state().vmx.non_root);
        }
    }
}

#[test]
fn the_end_of_an_interrupt_lets_the_next_one_in_or_exits() {
    let fields = [
        (Field::GUEST_INTR_STATUS, 0x62 << 8 | 0x35),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
        (Field::EOI_EXIT_BITMAP1, 1 << (0x62 - 64)),
    ];
    let mut l1 = l1(DELIVERY, &fields, &|a| {
        a.mov(dword_ptr(ACCESS + EOI), 0x99)?;
        a.vmcall()
    });
    for vector in [0x62, 0x28] {
        set_vector(&mut l1, ISR, vector);
    }
    set_vector(&mut l1, IRR, 0x35);
    l1.run();
    assert_eq!(l1.exit(), (reason(ExitReason::VIRTUALIZED_EOI), 0x62));
    assert_eq!(l1.field(Field::GUEST_RIP), GUEST + 11);
    assert_eq!((register(&l1, EOI), register(&l1, PPR)), (0, 0x20));
    assert_eq!(status(&l1), (0x35, 0x28));
    assert!(!has_vector(&l1, ISR, 0x62) && has_vector(&l1, ISR, 0x28));
    // Once more, with nothing to tell: the next interrupt comes at once.
    l1.set(Field::EOI_EXIT_BITMAP1, 0);
    l1.set(Field::GUEST_INTR_STATUS, 0x62 << 8 | 0x35);
    l1.set(Field::GUEST_RIP, GUEST);
    set_vector(&mut l1, ISR, 0x62);
    l1.resume();
    assert_eq!(handled(&l1), 0x35);
    assert_eq!(l1.word(l1.field(Field::GUEST_RSP)), GUEST + 11);
    assert_eq!(status(&l1), (0, 0x35));
}

#[test]
fn an_interrupt_to_itself_needs_no_exit() {
    for (command, exits) in [
        (1u32 << 18 | 0x51, false),
        (0x51, true),
        (1 << 18 | 0x0f, true),
        (1 << 18 | 1 << 15 | 0x51, true),
        (1 << 18 | 1 << 12 | 0x51, true),
        (1 << 18 | 1 << 8 | 0x51, true),
        (1 << 18 | 1 << 20 | 0x51, true),
    ] {
        let l1 = start(DELIVERY, &[(Field::GUEST_RFLAGS, RFLAGS_IF)], &|a| {
            a.mov(dword_ptr(ACCESS + ICR), command as i32)?;
            a.vmcall()
        });
        assert_eq!(register(&l1, ICR), command);
        if exits {
            assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), ICR));
        } else {
            assert_eq!(handled(&l1), 0x51);
            assert_eq!(status(&l1), (0, 0x51));
        }
    }
}

#[test]
fn the_monitor_trap_comes_between_a_virtual_interrupt_and_its_handler() {
    let trap = Controls {
        proc1: DELIVERY.proc1 | proc1::MONITOR_TRAP_FLAG,
        ..DELIVERY
    };
    let fields = [
        (Field::GUEST_INTR_STATUS, 0x62),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
    ];
    let mut l1 = l1(trap, &fields, &|a| a.vmcall());
    set_vector(&mut l1, IRR, 0x62);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::MONITOR_TRAP_FLAG);
    assert_eq!(l1.field(Field::GUEST_RIP), HANDLERS + 16 * 0x62);
}

#[test]
fn a_delivery_that_faults_has_begun() {
    let fields = [
        (Field::GUEST_INTR_STATUS, 0x62),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
        (Field::GUEST_RSP, ACCESS + 0x100),
    ];
    let mut l1 = l1(DELIVERY, &fields, &|a| a.vmcall());
    set_vector(&mut l1, IRR, 0x62);
    l1.run();
    assert_eq!(l1.exit(), access(3, 0xf8));
    assert_eq!(l1.field(Field::IDT_VECTORING_INFO_FIELD), 1 << 31 | 0x62);
    assert_eq!(status(&l1), (0, 0x62));
    assert!(has_vector(&l1, ISR, 0x62));
}

// ---- posted interrupts ----

/// Makes an external interrupt wait in L1's APIC.
fn request(l1: &mut L1, vector: u64) {
    let mut state = l1.state();
    state.apic.svr |= 1 << 8;
    state.apic.irr[vector as usize / 32] |= 1 << (vector % 32);
    l1.processor.write_state(0, &state).unwrap();
}

#[test]
fn posted_interrupts_reach_the_guest_without_an_exit() {
    let mut l1 = start(POSTING, &[(Field::GUEST_RFLAGS, RFLAGS_IF)], &|a| {
        a.vmcall()?;
        a.nop()?;
        a.vmcall()
    });
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    l1.put(POSTED, 1 << 0x35);
    l1.put(POSTED + 8, 1 << (0x62 - 64));
    l1.put(POSTED + 32, 0xabcd_0001);
    set_vector(&mut l1, IRR, 0x29);
    request(&mut l1, NOTIFICATION);
    l1.skip();
    l1.resume();
    assert_eq!(handled(&l1), 0x62);
    assert_eq!(l1.word(l1.field(Field::GUEST_RSP)), GUEST + 3);
    assert_eq!((l1.word(POSTED), l1.word(POSTED + 8)), (0, 0));
    assert_eq!(l1.word(POSTED + 32), 0xabcd_0000);
    assert_eq!(status(&l1), (0x35, 0x62));
    assert!(has_vector(&l1, IRR, 0x35) && has_vector(&l1, IRR, 0x29));
    let apic = l1.state().apic;
    assert_eq!((apic.irr, apic.isr), ([0; 8], [0; 8]), "dismissed");
    // Another interrupt exits as ever.
    request(&mut l1, 0x71);
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::EXTERNAL_INTERRUPT);
    assert_eq!(l1.field(Field::VM_EXIT_INTR_INFO), 1 << 31 | 0x71);
}

#[test]
fn a_notification_wakes_a_guest_only_for_an_interrupt() {
    let fields = [
        (Field::GUEST_RFLAGS, RFLAGS_IF),
        (Field::GUEST_ACTIVITY_STATE, 1),
    ];
    let mut l1 = l1(POSTING, &fields, &|a| a.vmcall());
    l1.put(POSTED, 1 << 0x35);
    l1.put(POSTED + 32, 1);
    set_register(&mut l1, TPR, 0x30);
    l1.run();
    assert!(l1.state().vmx.non_root);
    request(&mut l1, NOTIFICATION);
    l1.stop = None;
    l1.run();
    // Taken, but below the guest's priority.
    assert!(l1.state().vmx.non_root);
    assert_eq!(l1.state().activity, Activity::Halted);
    assert_eq!(l1.state().apic.irr, [0; 8]);
    assert!(has_vector(&l1, IRR, 0x35));
    l1.put(POSTED + 8, 1 << (0x62 - 64));
    request(&mut l1, NOTIFICATION);
    l1.stop = None;
    l1.run();
    assert_eq!(handled(&l1), 0x62);
}

// ---- all of it ----

/// What a guest may do to its APIC, chosen by `random`.
fn act(a: &mut CodeAssembler, random: &mut impl FnMut(u64) -> u64) -> Result<(), IcedError> {
    const REGISTERS: [u64; 8] = [TPR, TPR, EOI, EOI, ICR, ICR_HIGH, PPR, 0x20];
    let at = ACCESS + REGISTERS[random(8) as usize];
    let vector = 0x20 + random(0x60) as u32;
    match random(12) {
        0 => a.mov(ecx, dword_ptr(at)),
        1 => a.mov(dword_ptr(at), vector as i32),
        2 => a.mov(dword_ptr(ACCESS + EOI), 0),
        3 => a.mov(dword_ptr(ACCESS + TPR), random(0x60) as i32),
        4 => a.mov(dword_ptr(ACCESS + ICR), (1 << 18 | vector) as i32),
        5 => {
            a.mov(eax, random(8) as u32)?;
            a.mov(cr8, rax)
        }
        6 => write_msr(a, 0x808, random(0x60) as u32, 0),
        7 => write_msr(a, 0x80b, 0, 0),
        8 => write_msr(a, 0x83f, vector, 0),
        9 => a.cli(),
        10 => a.sti(),
        _ if random(4) == 0 => a.hlt(),
        _ => a.nop(),
    }
}

/// The effects of writes, and interrupts that wait for the guest, are not lost.
#[test]
fn saving_between_any_two_ticks_changes_nothing() {
    let mut ends = Vec::new();
    for seed in 0..60u64 {
        let mut state = seed;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(99);
            (state >> 33) % below
        };
        let mut code = CodeAssembler::new(64).unwrap();
        for _ in 0..30 {
            act(&mut code, &mut random).unwrap();
        }
        code.vmcall().unwrap();
        let code = code.assemble(GUEST).unwrap();
        let controls = [PAGE, DELIVERY, POSTING, MSRS][random(4) as usize];
        let (irr, isr, posted) = (0x20 + random(0x60), random(2) * 0x41, 0x20 + random(0x60));
        let fields = [
            MSR_FIELDS[0],
            (Field::GUEST_INTR_STATUS, isr << 8 | irr),
            (Field::EOI_EXIT_BITMAP1, random(4)),
            (Field::TPR_THRESHOLD, random(2)),
        ];
        let run = |save: bool| {
            let mut l1 = l1(controls, &fields, &|a| a.db(&code));
            // An interrupt of the guest returns to it, with interrupts enabled.
            for vector in 0..256 {
                let handler = HANDLERS + 16 * vector;
                l1.ram.write(handler, &[0x48, 0xcf]).unwrap();
            }
            set_vector(&mut l1, IRR, irr as u8);
            set_vector(&mut l1, ISR, isr as u8);
            l1.put(POSTED + posted / 64 * 8, 1 << (posted % 64));
            let mut until_notified = 10;
            for _ in 0..700 {
                if controls.pin != 0 && l1.state().vmx.non_root {
                    until_notified -= 1;
                    if until_notified == 0 {
                        request(&mut l1, NOTIFICATION);
                    }
                }
                let until = l1.processor.now() + 1;
                l1.processor.run(&mut l1.ram, &mut Nothing, until);
                if save {
                    let state = l1.state();
                    l1.processor.write_state(0, &state).unwrap();
                }
            }
            let page: Vec<u32> = (0..1024).map(|n| register(&l1, 4 * n)).collect();
            let taken = l1.word(POSTED + posted / 64 * 8) == 0;
            (l1.field(Field::VM_EXIT_REASON), taken, l1.state(), page)
        };
        let plain = run(false);
        assert!(plain == run(true), "seed {seed}");
        ends.push((plain.0, plain.1));
    }
    // They went far enough to differ.
    for end in [
        ExitReason::VMCALL,
        ExitReason::TPR_BELOW_THRESHOLD,
        ExitReason::VIRTUALIZED_EOI,
        ExitReason::APIC_WRITE,
    ] {
        let there = |(seen, _): &(u64, bool)| *seen == reason(end);
        assert!(ends.iter().any(there), "{end:?} of {ends:?}");
    }
    assert!(ends.iter().any(|(_, taken)| *taken));
}

#[test]
fn controls_that_do_not_fit_each_other_fail_the_entry() {
    let changed = |base: Controls, proc1: u32, proc2: u32, pin: u32, exit: u32| Controls {
        proc1: base.proc1 & !proc1,
        proc2: base.proc2 ^ proc2,
        pin: base.pin ^ pin,
        exit: base.exit ^ exit,
    };
    let shadow = proc1::USE_TPR_SHADOW;
    let accesses = proc2::VIRTUALIZE_APIC_ACCESSES;
    let delivery = proc2::VIRTUAL_INTERRUPT_DELIVERY;
    let acknowledge = exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT;
    let none: &[(Field, u64)] = &[];
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
    for controls in [SHADOW, PAGE, REGISTERS, DELIVERY, POSTING, X2APIC] {
        let l1 = start(controls, none, &|a| a.vmcall());
        assert_eq!(l1.reason(), ExitReason::VMCALL);
    }
}

#[test]
fn both_profiles_offer_it() {
    for choice in [VmxChoice::Max, VmxChoice::Kvm] {
        let caps = choice.profile(<&Model>::default()).unwrap().caps.clone();
        let secondary = DELIVERY.proc2 | X2APIC.proc2;
        assert_eq!(caps.proc2_allowed1() & secondary, secondary);
        assert_ne!(caps.proc1_allowed1() & proc1::USE_TPR_SHADOW, 0);
        assert_ne!(caps.pin_allowed1() & pin::PROCESS_POSTED_INTERRUPTS, 0);
    }
}
