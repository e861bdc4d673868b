//! VM functions (Vol. 3C, "VM Functions"): EPTP switching.

use hypernest_cpu::VmxChoice;
use hypernest_vmcs::{ExitReason, Field, proc2, vmfunc};
use iced_x86::code_asm::{eax, ecx, qword_ptr, rbx, rdi, rdx, rsi};

use super::{USER, setup, vector};
use crate::support::DATA;
use crate::support::hypervisor::{EPT, EPT2, Emit, L1, PAGES, RWX, Setup, ept_entry, eptp};

const LIST: u64 = PAGES;
const CONTROLS: u32 = proc2::ENABLE_EPT | proc2::ENABLE_VM_FUNCTIONS;
const FIELDS: [(Field, u64); 2] = [
    (Field::VM_FUNCTION_CONTROL, vmfunc::EPTP_SWITCHING),
    (Field::EPTP_LIST_ADDRESS, LIST),
];

/// The list: the two sets of tables, then a pointer of no memory type.
fn new(controls: u32, more: &[(Field, u64)], guest: Emit) -> L1 {
    let fields: Vec<_> = FIELDS.iter().chain(more).copied().collect();
    let mut l1 = L1::new(&setup(controls, &fields, guest));
    l1.put(LIST, eptp(EPT));
    l1.put(LIST + 8, eptp(EPT2));
    l1.put(LIST + 16, EPT2 | 3 << 3 | 5);
    l1.put(ept_entry(EPT2, DATA), (DATA + 0x1000) | RWX);
    l1.put(DATA, 1);
    l1.put(DATA + 0x1000, 2);
    l1
}

fn switch(a: &mut iced_x86::code_asm::CodeAssembler, to: u32) -> Result<(), iced_x86::IcedError> {
    a.xor(eax, eax)?;
    a.mov(ecx, to)?;
    a.vmfunc()
}

/// Loads with the first tables, the second and the first again.
const THERE_AND_BACK: Emit = &|a| {
    a.mov(rdi, DATA)?;
    a.mov(rbx, qword_ptr(rdi))?;
    switch(a, 1)?;
    a.mov(rdx, qword_ptr(rdi))?;
    switch(a, 0)?;
    a.mov(rsi, qword_ptr(rdi))?;
    a.vmcall()
};

#[test]
fn a_guest_switches_its_memory_without_leaving() {
    for (vpid, more) in [(0, &[][..]), (proc2::ENABLE_VPID, &[]), (0, &USER)] {
        let mut l1 = new(CONTROLS | vpid, more, THERE_AND_BACK);
        l1.run();
        assert_eq!(l1.reason(), ExitReason::VMCALL);
        let gpr = l1.state().gpr;
        assert_eq!((gpr[3], gpr[2], gpr[6]), (1, 2, 1));
    }
}

#[test]
fn the_vmcs_has_the_pointer_in_use_and_its_index() {
    // Whose guests have no #VE have no index either.
    for (choice, index) in [(VmxChoice::Max, 1), (VmxChoice::Kvm, 0)] {
        let guest: Emit = &|a| {
            switch(a, 1)?;
            a.vmcall()
        };
        let mut l1 = L1::new(&Setup {
            choice,
            ..setup(CONTROLS, &FIELDS, guest)
        });
        l1.put(LIST + 8, eptp(EPT2));
        l1.run();
        assert_eq!(l1.reason(), ExitReason::VMCALL);
        assert_eq!(l1.field(Field::EPT_POINTER), eptp(EPT2));
        assert_eq!(l1.field(Field::EPTP_INDEX), index);
    }
}

#[test]
fn what_cannot_be_switched_to_exits() {
    // A pointer that VM entry would refuse, one that is not in the list, a function not enabled.
    let tries: [Emit; 3] = [&|a| switch(a, 2), &|a| switch(a, 512), &|a| {
        a.mov(eax, 1)?;
        a.xor(ecx, ecx)?;
        a.vmfunc()
    }];
    for guest in tries {
        let mut l1 = new(CONTROLS, &[], guest);
        l1.run();
        assert_eq!(l1.exit(), (u64::from(ExitReason::VMFUNC.0), 0));
        assert_eq!(l1.field(Field::VM_EXIT_INSTRUCTION_LEN), 3);
        assert_eq!(l1.field(Field::EPT_POINTER), eptp(EPT));
    }
}

#[test]
fn without_the_control_or_beyond_63_there_is_no_function() {
    let mut l1 = new(CONTROLS, &[], &|a| {
        a.mov(eax, 64)?;
        a.vmfunc()
    });
    l1.run();
    assert_eq!(vector(&l1), 6);
    let mut l1 = L1::new(&setup(proc2::ENABLE_EPT, &[], &|a| switch(a, 1)));
    l1.run();
    assert_eq!(vector(&l1), 6);
    // In root operation it never exists: the hypervisor ends in its own #UD handler.
    let mut l1 = new(CONTROLS, &[], &|a| a.vmcall());
    l1.run();
    l1.resume_after(&|a| switch(a, 1));
    assert_eq!((l1.state().rip - crate::support::HANDLERS) / 16, 6);
}
