//! VM entries by the enlightened VMCS.

mod support;

use hypernest_cpu::{
    ActiveEnlightened, Fault, Model, Processor, ProcessorConfig, Ram, Stop, VmxChoice,
};
use hypernest_vmcs::enlightened::{ALL_CLEAN, DIRECT_FLUSH, Enlightenments, clean_fields};
use hypernest_vmcs::nested_state::{NO_ADDRESS, state_flag};
use hypernest_vmcs::{ExitReason, Field, proc2};
use iced_x86::code_asm::{ecx, edx, qword_ptr, r8, rax, rcx, rdx, rsp};
use support::enlightened::{
    CURRENT, ENLIGHTEN, EVMCS, NESTED_FEATURES, OTHER_EVMCS, PARTITION_ASSIST, entries, new, next,
    next_after, page, peek, poke, poke_at, set_clean, set_enlightenments, start,
};
use support::hypervisor::{EPT, Emit, GUEST, HANDLER, L1, POINTERS, RWX, Setup, VMCS, ept_entry};
use support::{DATA, HANDLERS, Nothing};

/// Room for what a guest or L1 leaves.
const RESULT: u64 = DATA;

/// CPUID again and again, with RSP told before.
const GUEST_CODE: Emit = &|a| {
    for _ in 0..4 {
        a.mov(qword_ptr(RESULT), rsp)?;
        a.cpuid()?;
    }
    a.hlt()
};

fn setup(guest: Emit<'static>) -> Setup<'static> {
    Setup {
        choice: VmxChoice::Max,
        proc2: 0,
        fields: &[],
        guest,
    }
}

fn cpuid_exits() -> L1 {
    start(&setup(GUEST_CODE))
}

#[test]
fn a_guest_is_entered_from_the_page_and_its_exit_is_written_there() {
    let mut l1 = cpuid_exits();
    assert_eq!(l1.stop, None, "{:#x?}", l1.state());
    assert_eq!(
        peek(&l1, Field::VM_EXIT_REASON),
        u64::from(ExitReason::CPUID.0)
    );
    assert_eq!(peek(&l1, Field::VM_EXIT_INSTRUCTION_LEN), 2);
    assert!(peek(&l1, Field::GUEST_RIP) > GUEST);
    assert_eq!(clean_fields(&page(&l1)), ALL_CLEAN);
    let state = l1.state();
    assert_eq!(state.vmx.enlightened, Some(ActiveEnlightened::At(EVMCS)));
    assert_eq!(
        (state.vmx.current, state.vmx.pointer()),
        (None, Some(EVMCS))
    );
    next(&mut l1);
    assert_eq!(entries(&mut l1), [(EVMCS, 0), (EVMCS, ALL_CLEAN)]);
}

#[test]
fn a_clean_group_is_not_read_and_a_dirty_one_is() {
    const GUEST_BASIC: u32 = 1 << 10;
    let mut l1 = cpuid_exits();
    let before = l1.word(RESULT);
    poke(&mut l1, Field::GUEST_RSP, 0x1110);
    next(&mut l1);
    assert_eq!(l1.word(RESULT), before, "the group was clean");
    assert_eq!(peek(&l1, Field::GUEST_RSP), before);
    poke(&mut l1, Field::GUEST_RSP, 0x1110);
    set_clean(&mut l1, ALL_CLEAN & !GUEST_BASIC);
    next(&mut l1);
    assert_eq!(l1.word(RESULT), 0x1110);
    let clean: Vec<_> = entries(&mut l1).iter().map(|entry| entry.1).collect();
    assert_eq!(clean, [0, ALL_CLEAN, ALL_CLEAN & !GUEST_BASIC]);
}

#[test]
fn a_clean_group_of_controls_is_not_read() {
    const CONTROL_PROC: u32 = 1 << 4;
    let mut l1 = cpuid_exits();
    // A control that no processor allows: read, it fails the entry.
    let bad = peek(&l1, Field::CPU_BASED_VM_EXEC_CONTROL) | 1;
    poke(&mut l1, Field::CPU_BASED_VM_EXEC_CONTROL, bad);
    next(&mut l1);
    assert_eq!(l1.reason(), ExitReason::CPUID);
    set_clean(&mut l1, ALL_CLEAN & !CONTROL_PROC);
    next(&mut l1);
    assert!(l1.stop.is_some(), "VMRESUME fails and L1 halts");
    assert_eq!(peek(&l1, Field::VM_INSTRUCTION_ERROR), 7);
}

#[test]
fn a_changed_pointer_makes_nothing_clean() {
    let mut l1 = cpuid_exits();
    entries(&mut l1);
    // The other page says that it is clean, which was never so.
    poke_at(&mut l1, OTHER_EVMCS, Field::GUEST_RSP, 0x2220);
    l1.put(OTHER_EVMCS + 824, u64::from(ALL_CLEAN));
    l1.put(CURRENT, OTHER_EVMCS);
    l1.resume();
    assert_eq!(l1.word(RESULT), 0x2220);
    assert_eq!(entries(&mut l1), [(OTHER_EVMCS, 0)]);
    // And back.
    poke(&mut l1, Field::GUEST_RSP, 0x3330);
    l1.put(CURRENT, EVMCS);
    next(&mut l1);
    assert_eq!(l1.word(RESULT), 0x3330);
    assert_eq!(entries(&mut l1), [(EVMCS, 0)]);
}

#[test]
fn vmlaunch_reads_everything() {
    let mut l1 = new(&setup(GUEST_CODE));
    set_clean(&mut l1, ALL_CLEAN);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::CPUID);
    poke(&mut l1, Field::GUEST_RSP, 0x4440);
    // There is no launch state that would forbid it.
    next_after(&mut l1, &|a| {
        a.pop(rax)?;
        a.pop(rax)?;
        a.pop(rax)?;
        a.vmlaunch()
    });
    assert_eq!(l1.word(RESULT), 0x4440);
}

#[test]
fn vmclear_ends_it_and_the_next_entry_reads_everything() {
    let mut l1 = cpuid_exits();
    entries(&mut l1);
    l1.put(POINTERS + 8, EVMCS);
    let before = page(&l1);
    poke(&mut l1, Field::GUEST_RSP, 0x5550);
    next_after(&mut l1, &|a| a.vmclear(qword_ptr(POINTERS + 8)));
    assert_eq!(l1.word(RESULT), 0x5550);
    assert_eq!(entries(&mut l1), [(EVMCS, 0)]);
    // An ordinary layout would have its launch state there.
    assert_eq!(page(&l1)[8..12], before[8..12]);
}

#[test]
fn vmclear_of_another_page_writes_nothing_while_entries_are_enlightened() {
    let mut l1 = cpuid_exits();
    let revision = l1.word(VMCS);
    let region: Vec<u8> = (0..4088).map(|n| n as u8).collect();
    l1.ram.write(VMCS + 8, &region).unwrap();
    next_after(&mut l1, &|a| a.vmclear(qword_ptr(POINTERS + 8)));
    let mut after = vec![0; 4088];
    l1.ram.read(VMCS + 8, &mut after).unwrap();
    assert_eq!((l1.word(VMCS), after), (revision, region));
}

#[test]
fn another_version_is_vmfail_invalid_and_a_page_that_is_not_there_is_ud() {
    for (version, works) in [(1, true), (2, false), (0, false)] {
        let mut l1 = new(&setup(GUEST_CODE));
        let first = l1.word(EVMCS) & !0xffff_ffff;
        l1.put(EVMCS, first | version);
        l1.run();
        assert_eq!(l1.stop.is_none(), works, "version {version}");
        if !works {
            assert_eq!(l1.state().rflags & 0x8d5, 1, "VMfailInvalid");
            assert_eq!(l1.state().vmx.enlightened, None);
        }
    }
    // KVM's guests may stamp the revision that IA32_VMX_BASIC tells.
    let mut l1 = new(&setup(GUEST_CODE));
    let revision = l1.word(VMCS) & 0x7fff_ffff;
    l1.put(EVMCS, revision);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::CPUID);
    for pointer in [1 << 30, EVMCS + 8] {
        let mut l1 = new(&setup(GUEST_CODE));
        l1.put(CURRENT, pointer);
        l1.run();
        let handler = HANDLERS + 16 * u64::from(Fault::InvalidOpcode.vector());
        assert_eq!(l1.state().rip, handler + 1);
    }
}

#[test]
fn pointers_that_name_none_and_a_cleared_flag_leave_no_vmcs() {
    for (flag, pointer) in [(1, !0), (1, !1), (0, EVMCS)] {
        let mut l1 = new(&setup(GUEST_CODE));
        l1.put(ENLIGHTEN, flag);
        l1.put(CURRENT, pointer);
        l1.run();
        assert!(matches!(l1.stop, Some(Stop::Deadline | Stop::Idle)));
        assert_eq!(l1.state().rflags & 0x8d5, 1, "VMfailInvalid");
    }
}

#[test]
fn the_other_instructions_while_one_is_active() {
    let mut l1 = cpuid_exits();
    poke(&mut l1, Field::GUEST_CS_LIMIT, 0xfff_ffff);
    next_after(&mut l1, &|a| {
        // VMREAD is of the page, read or not.
        a.mov(rax, u64::from(Field::GUEST_CS_LIMIT.encoding()))?;
        a.vmread(qword_ptr(RESULT + 8), rax)?;
        // A field that exists and has no place: error 12.
        a.mov(rax, u64::from(Field::VMREAD_BITMAP.encoding()))?;
        a.vmread(rcx, rax)?;
        a.pushfq()?;
        a.pop(qword_ptr(RESULT + 16))?;
        a.mov(rax, u64::from(Field::VM_INSTRUCTION_ERROR.encoding()))?;
        a.vmread(qword_ptr(RESULT + 24), rax)?;
        // VMWRITE finds no current VMCS.
        a.mov(rax, u64::from(Field::GUEST_CS_LIMIT.encoding()))?;
        a.vmwrite(rax, rcx)?;
        a.pushfq()?;
        a.pop(qword_ptr(RESULT + 32))?;
        // VMPTRLD changes nothing, VMPTRST tells of no current VMCS.
        a.vmptrld(qword_ptr(POINTERS + 8))?;
        a.vmptrst(qword_ptr(RESULT + 40))
    });
    assert_eq!(l1.word(RESULT + 8), 0xfff_ffff);
    assert_eq!(l1.word(RESULT + 16) & 0x8d5, 1 << 6, "VMfailValid");
    assert_eq!(l1.word(RESULT + 24), 12);
    assert_eq!(l1.word(RESULT + 32) & 0x8d5, 1, "VMfailInvalid");
    assert_eq!(l1.word(RESULT + 40), !0);
    assert_eq!(l1.reason(), ExitReason::CPUID);
    assert_eq!(l1.state().vmx.current, None);
}

#[test]
fn an_ordinary_vmcs_is_written_back_when_an_enlightened_one_takes_its_place() {
    let mut l1 = new(&setup(GUEST_CODE));
    // Before the first entry, L1 has an ordinary one with a value in it.
    let code = support::hypervisor::assemble(HANDLER + 0x800, &|a| {
        a.vmclear(qword_ptr(POINTERS + 8))?;
        a.vmptrld(qword_ptr(POINTERS + 8))?;
        a.mov(rax, u64::from(Field::GUEST_RSP.encoding()))?;
        a.mov(rcx, 0x7777_u64)?;
        a.vmwrite(rax, rcx)?;
        a.vmlaunch()
    });
    l1.ram.write(HANDLER + 0x800, &code).unwrap();
    let jump = support::hypervisor::assemble(0, &|a| {
        a.mov(rax, HANDLER + 0x800)?;
        a.jmp(rax)
    });
    // In place of the launcher's VMLAUNCH.
    let mut launcher = [0; 128];
    l1.ram.read(support::CODE, &mut launcher).unwrap();
    let at = launcher.windows(3).position(|w| w == [0x0f, 0x01, 0xc2]);
    let at = support::CODE + at.unwrap() as u64;
    l1.ram.write(at, &jump).unwrap();
    l1.put(ENLIGHTEN, 1);
    l1.run();
    // The instruction before was VMPTRLD of none: entries from the page go on.
    assert_eq!(l1.reason(), ExitReason::CPUID);
    assert_eq!(l1.state().vmx.current, None);
    let layout = hypernest_vmcs::Layout::hypernest();
    let mut region = [0; 4096];
    l1.ram.read(VMCS, &mut region).unwrap();
    let vmcs = layout.read(&region).unwrap();
    assert_eq!(vmcs.get(Field::GUEST_RSP), 0x7777);
}

#[test]
fn entries_that_fail_tell_it_in_the_page() {
    let mut l1 = new(&setup(GUEST_CODE));
    poke(&mut l1, Field::GUEST_RFLAGS, 0);
    l1.run();
    let reason = u64::from(ExitReason::ENTRY_FAILURE_GUEST_STATE.0) | 1 << 31;
    assert_eq!(peek(&l1, Field::VM_EXIT_REASON), reason);
    assert_eq!(peek(&l1, Field::GUEST_RIP), GUEST);
    assert_eq!(clean_fields(&page(&l1)), 0, "it was not entered");
    let mut l1 = new(&setup(GUEST_CODE));
    poke(&mut l1, Field::HOST_CR4, 0);
    l1.run();
    assert_eq!(l1.state().rflags & 0x8d5, 1 << 6, "VMfailValid");
    assert_eq!(peek(&l1, Field::VM_INSTRUCTION_ERROR), 8);
}

#[test]
fn controls_without_a_place_are_not_offered() {
    let profile = VmxChoice::Max
        .profile(<&Model>::default())
        .unwrap()
        .unwrap();
    assert!(
        profile
            .caps
            .allows_proc2(proc2::ENABLE_PML | proc2::VMCS_SHADOWING)
    );
    let mut l1 = cpuid_exits();
    next_after(&mut l1, &|a| {
        a.push(rdx)?;
        for (n, number) in [0x481, 0x48b, 0x491].into_iter().enumerate() {
            if number == 0x491 {
                break;
            }
            a.mov(ecx, number)?;
            a.rdmsr()?;
            a.mov(qword_ptr(RESULT + 64 + 8 * n as u64), rdx)?;
        }
        a.pop(rdx)
    });
    let caps = profile.enlightened().caps;
    assert_eq!(l1.word(RESULT + 64), caps.pin >> 32);
    assert_eq!(l1.word(RESULT + 72), caps.proc2 >> 32);
    assert_eq!(l1.word(RESULT + 72) as u32 & proc2::ENABLE_PML, 0);
    assert_ne!(l1.word(RESULT + 72) as u32 & proc2::ENABLE_EPT, 0);
}

// ---- hypercalls ----

/// HvFlushVirtualAddressSpace of all processors, by registers; the result is kept. Then CPUID.
const FLUSHING_GUEST: Emit = &|a| {
    a.mov(rcx, 0x0001_0002_u64)?;
    a.xor(edx, edx)?;
    a.mov(r8, 1_u64)?;
    a.mov(rax, !0_u64)?;
    a.vmcall()?;
    a.mov(qword_ptr(RESULT), rax)?;
    a.cpuid()?;
    a.hlt()
};

fn direct_flush(l1: &mut L1, control: u32, features: u64) {
    l1.put(NESTED_FEATURES, features);
    let value = Enlightenments {
        control,
        vp_id: 3,
        vm_id: 9,
        partition_assist: PARTITION_ASSIST,
    };
    set_enlightenments(l1, &value);
}

#[test]
fn a_flush_of_the_guest_needs_no_exit_where_its_hypervisor_says_so() {
    for (control, features, exits) in [
        (DIRECT_FLUSH, 1, false),
        (0, 1, true),
        (DIRECT_FLUSH, 0, true),
    ] {
        let mut l1 = new(&setup(FLUSHING_GUEST));
        direct_flush(&mut l1, control, features);
        l1.run();
        let reason = if exits {
            ExitReason::VMCALL
        } else {
            ExitReason::CPUID
        };
        assert_eq!(l1.reason(), reason, "{control} {features}");
        if !exits {
            assert_eq!(l1.word(RESULT), 0, "success");
        }
    }
}

#[test]
fn a_lock_count_makes_a_flush_exit_after_it_was_done() {
    let mut l1 = new(&setup(FLUSHING_GUEST));
    direct_flush(&mut l1, DIRECT_FLUSH, 1);
    l1.put(PARTITION_ASSIST, 1);
    l1.run();
    assert_eq!(peek(&l1, Field::VM_EXIT_REASON), 0x1000_0031);
    assert_eq!(l1.state().gpr[0], 0, "the hypercall is done");
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::CPUID);
}

#[test]
fn other_hypercalls_of_the_guest_exit() {
    const OTHER: Emit = &|a| {
        a.mov(rcx, 0x0001_00af_u64)?;
        a.vmcall()?;
        a.hlt()
    };
    let mut l1 = new(&setup(OTHER));
    direct_flush(&mut l1, DIRECT_FLUSH, 1);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
}

#[test]
fn a_hypercall_flushes_what_was_cached_under_an_ept_pointer() {
    const PAGE: u64 = 0x3_0000;
    const TO: u64 = 0x3_1000;
    const READER: Emit = &|a| {
        for _ in 0..3 {
            a.mov(rax, qword_ptr(PAGE))?;
            a.mov(qword_ptr(RESULT), rax)?;
            a.cpuid()?;
        }
        a.hlt()
    };
    let mut l1 = new(&Setup {
        proc2: proc2::ENABLE_EPT | proc2::ENABLE_VPID,
        ..setup(READER)
    });
    l1.put(PAGE, 1);
    l1.put(TO, 2);
    l1.run();
    assert_eq!((l1.reason(), l1.word(RESULT)), (ExitReason::CPUID, 1));
    l1.put(ept_entry(EPT, PAGE), TO | RWX);
    next(&mut l1);
    assert_eq!(l1.word(RESULT), 1, "it is cached");
    // The input of HvFlushGuestPhysicalAddressSpace: the pointer, no flags.
    let input = RESULT + 256;
    l1.put(input, support::hypervisor::eptp(EPT));
    l1.put(input + 8, 0);
    next_after(&mut l1, &|a| {
        a.push(rdx)?;
        a.mov(rcx, 0xaf_u64)?;
        a.mov(rdx, input)?;
        a.vmcall()?;
        a.mov(qword_ptr(RESULT + 8), rax)?;
        a.pop(rdx)
    });
    assert_eq!(l1.word(RESULT + 8), 0, "success");
    assert_eq!(l1.word(RESULT), 2);
}

// ---- saved states ----

/// The machine in another processor, from its saved state.
fn moved(l1: &L1) -> (Processor, Ram) {
    let model = <&Model>::default();
    let config = ProcessorConfig {
        vmx: VmxChoice::Max.profile(model).unwrap(),
        hyperv: true,
        ..ProcessorConfig::default()
    };
    let mut other = Processor::new(&config).unwrap();
    let mut ram = Ram::new(2 << 20).unwrap();
    ram.write(0, l1.ram.bytes()).unwrap();
    other.set_time(l1.processor.now(), l1.processor.turn());
    other.write_state(0, &l1.state()).unwrap();
    (other, ram)
}

#[test]
fn every_instant_of_an_enlightened_guest_can_be_saved_and_restored() {
    let (mut not_yet, mut mapped, mut inside) = (0, 0, 0);
    let mut l1 = new(&Setup {
        proc2: proc2::ENABLE_EPT | proc2::ENABLE_VPID,
        ..setup(GUEST_CODE)
    });
    let plan: Emit = &|a| a.nop();
    let mut exits = 0;
    for _ in 0..200 {
        let until = l1.processor.now() + 1;
        l1.processor.run(&mut l1.ram, &mut Nothing, until);
        let state = l1.state();
        match state.vmx.enlightened {
            None if state.hyperv.assist_page != 0 => not_yet += 1,
            Some(_) if state.vmx.non_root => inside += 1,
            Some(_) => mapped += 1,
            None => {}
        }
        let (mut other, mut ram) = moved(&l1);
        assert_eq!(other.read_state(0), state);
        let later = until + 20;
        let mut here = moved(&l1);
        // The one that goes on is its own judge: a fresh copy and a copy of the copy.
        other.run(&mut ram, &mut Nothing, later);
        here.0.run(&mut here.1, &mut Nothing, later);
        assert_eq!(other.read_state(0), here.0.read_state(0));
        assert!(ram.bytes() == here.1.bytes());
        if state.rip == HANDLER && exits < 2 {
            exits += 1;
            next_after(&mut l1, plan);
        }
    }
    assert!(
        not_yet > 0 && mapped > 0 && inside > 0,
        "{not_yet} {mapped} {inside}"
    );
}

#[test]
fn a_restored_machine_goes_on_as_the_one_it_came_from() {
    for ticks in 0..60 {
        let mut l1 = new(&setup(GUEST_CODE));
        l1.processor.run(&mut l1.ram, &mut Nothing, ticks);
        let (mut other, mut ram) = moved(&l1);
        l1.processor.run(&mut l1.ram, &mut Nothing, 200);
        other.run(&mut ram, &mut Nothing, 200);
        assert_eq!(other.read_state(0), l1.state(), "saved at {ticks}");
        assert!(ram.bytes() == l1.ram.bytes(), "saved at {ticks}");
        assert_eq!(l1.reason(), ExitReason::CPUID);
    }
}

#[test]
fn a_nested_state_has_the_flag_no_address_and_all_of_the_page() {
    let mut l1 = cpuid_exits();
    // L1 has changed it and not told yet.
    poke(&mut l1, Field::GUEST_RSP, 0x6660);
    let state = l1.processor.nested_state(0, &l1.ram);
    assert_eq!((state.flags, state.vmcs), (state_flag::EVMCS, NO_ADDRESS));
    let layout = hypernest_vmcs::Layout::hypernest();
    let vmcs = layout.read(state.image().unwrap()).unwrap();
    assert_eq!(vmcs.get(Field::GUEST_RSP), 0x6660);
    assert_eq!(vmcs.get(Field::VM_EXIT_REASON), 10);
    // A machine without the interface does not take it.
    let config = ProcessorConfig {
        vmx: VmxChoice::Max.profile(<&Model>::default()).unwrap(),
        ..ProcessorConfig::default()
    };
    let mut other = Processor::new(&config).unwrap();
    let refused = other.set_nested_state(0, &mut l1.ram, &state.to_bytes());
    assert!(refused.is_err());
}

#[test]
fn a_nested_state_may_come_before_or_after_the_registers() {
    let (mut not_yet, mut inside, mut mapped) = (0, 0, 0);
    for ticks in 8..60 {
        for nested_first in [false, true] {
            let mut l1 = new(&setup(GUEST_CODE));
            l1.processor.run(&mut l1.ram, &mut Nothing, ticks);
            let state = l1.state();
            match state.vmx.enlightened {
                None if state.vmx.region.is_some() => not_yet += 1,
                None => {}
                Some(_) if state.vmx.non_root => inside += 1,
                Some(_) => mapped += 1,
            }
            let blob = l1.processor.nested_state(0, &l1.ram).to_bytes();
            let config = ProcessorConfig {
                vmx: VmxChoice::Max.profile(<&Model>::default()).unwrap(),
                hyperv: true,
                ..ProcessorConfig::default()
            };
            let mut other = Processor::new(&config).unwrap();
            let mut ram = Ram::new(2 << 20).unwrap();
            ram.write(0, l1.ram.bytes()).unwrap();
            other.set_time(l1.processor.now(), l1.processor.turn());
            if nested_first {
                other.set_nested_state(0, &mut ram, &blob).unwrap();
            }
            other.write_registers(0, &state).unwrap();
            if !nested_first {
                other.set_nested_state(0, &mut ram, &blob).unwrap();
            }
            let expected = state
                .vmx
                .enlightened
                .map(|_| ActiveEnlightened::ByAssistPage);
            assert_eq!(other.read_state(0).vmx.enlightened, expected);
            // To the exit, where L1 waits; then one more entry.
            let mut there = new(&setup(GUEST_CODE));
            (there.processor, there.ram) = (other, ram);
            for step in 0..2 {
                for l1 in [&mut l1, &mut there] {
                    if step > 0 {
                        next(l1);
                    } else if ticks < 40 {
                        l1.run();
                    }
                }
                let at = format!("saved at {ticks}, step {step}, {nested_first}");
                assert_eq!(there.state().vmx.fields, l1.state().vmx.fields, "{at}");
                assert_eq!(page(&there), page(&l1), "{at}");
                assert_eq!(there.reason(), ExitReason::CPUID, "{at}");
            }
            let active = there.state().vmx.enlightened;
            assert_eq!(active, Some(ActiveEnlightened::At(EVMCS)));
        }
    }
    assert!(not_yet > 0 && inside > 0 && mapped > 0);
}

#[test]
fn without_the_interface_there_is_no_enlightened_vmcs() {
    let config = ProcessorConfig {
        vmx: VmxChoice::Max.profile(<&Model>::default()).unwrap(),
        ..ProcessorConfig::default()
    };
    let mut processor = Processor::new(&config).unwrap();
    let mut state = processor.read_state(0);
    state.vmx.enlightened = Some(ActiveEnlightened::At(EVMCS));
    assert_eq!(
        processor.write_state(0, &state).unwrap_err().register,
        "hyperv"
    );
}
