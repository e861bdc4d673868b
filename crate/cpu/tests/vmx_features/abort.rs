//! VMX aborts (Vol. 3C, "VMX Aborts").

use hypernest_cpu::{Activity, Stop};
use hypernest_vmcs::{Field, exit, proc2};
use iced_x86::code_asm::qword_ptr;

use super::setup;
use crate::support::hypervisor::{GUEST, L1, PAGES, POINTERS, VMCS};
use crate::support::{HANDLERS, Nothing};

const INDICATOR: u64 = VMCS + 4;

fn indicator(l1: &L1) -> u32 {
    l1.word(INDICATOR) as u32
}

/// The machine stops once, and what it leaves is a vCPU that nothing wakes.
fn check(l1: &mut L1, expected: u32) {
    let stop = Stop::VmxAbort {
        vcpu: 0,
        indicator: expected,
    };
    assert_eq!(l1.stop, Some(stop));
    assert_eq!(indicator(l1), expected);
    let state = l1.state();
    assert_eq!(state.activity, Activity::VmxAbort);
    let again = l1.processor.run(&mut l1.ram, &mut Nothing, u64::MAX);
    assert_eq!(again, Stop::Idle);
    let saved = l1.state();
    l1.processor.write_state(0, &saved).unwrap();
    assert_eq!(l1.state(), saved);
}

#[test]
fn a_list_that_cannot_be_stored_or_loaded_aborts() {
    let lists = [
        (
            Field::VM_EXIT_MSR_STORE_ADDR,
            Field::VM_EXIT_MSR_STORE_COUNT,
            1,
        ),
        (
            Field::VM_EXIT_MSR_LOAD_ADDR,
            Field::VM_EXIT_MSR_LOAD_COUNT,
            4,
        ),
    ];
    for (address, count, expected) in lists {
        let mut l1 = L1::new(&setup(0, &[(address, PAGES), (count, 1)], &|a| a.vmcall()));
        l1.put(PAGES, 0xdead_beef);
        l1.run();
        check(&mut l1, expected);
    }
}

/// A guest that executes HLT when it is told, and what its VMCS says of the exit.
fn spinning(controls: u32) -> L1 {
    let mut l1 = L1::new(&setup(controls, &[], &|a| {
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.jmp(spin)?;
        a.hlt()
    }));
    while l1.state().rip != GUEST {
        let until = l1.processor.now() + 100;
        l1.processor.run(&mut l1.ram, &mut Nothing, until);
    }
    l1
}

fn change(l1: &mut L1, fields: &[(Field, u64)], edit: impl FnOnce(&mut hypernest_cpu::VcpuState)) {
    let mut state = l1.state();
    for (field, value) in fields {
        state.vmx.fields.retain(|(n, _)| *n != field.encoding());
        state.vmx.fields.push((field.encoding(), *value));
    }
    state.rip = GUEST + 2;
    edit(&mut state);
    l1.processor.write_state(0, &state).unwrap();
    l1.run();
}

#[test]
fn a_64_bit_guest_cannot_leave_to_a_32_bit_host() {
    let mut l1 = spinning(0);
    let exits = u64::from(exit::DEFAULT1);
    change(&mut l1, &[(Field::VM_EXIT_CONTROLS, exits)], |_| ());
    check(&mut l1, 6);
}

#[test]
fn a_host_with_bad_page_directory_pointers_aborts() {
    let mut l1 = spinning(proc2::ENABLE_EPT | proc2::UNRESTRICTED_GUEST);
    // Present, with a reserved bit.
    l1.put(PAGES, 3);
    let host = [
        (Field::VM_EXIT_CONTROLS, u64::from(exit::DEFAULT1)),
        (Field::HOST_CR3, PAGES),
        (Field::HOST_CR4, 0x2020),
    ];
    change(&mut l1, &host, |state| {
        state.msrs.efer = 0;
        state.cr0 = 0x31;
        state.cr4 = 0x2000;
        state.segments.cs.rights = 0xc09b;
    });
    check(&mut l1, 2);
}

#[test]
fn the_indicator_is_the_hypervisors_otherwise() {
    let mut l1 = L1::new(&setup(0, &[], &|a| a.vmcall()));
    l1.run();
    l1.ram.write(INDICATOR, &0x55u32.to_le_bytes()).unwrap();
    l1.resume_after(&|a| {
        a.vmclear(qword_ptr(POINTERS + 8))?;
        a.ud2()
    });
    assert_eq!((l1.state().rip - HANDLERS) / 16, 6);
    assert_eq!(indicator(&l1), 0x55);
}
