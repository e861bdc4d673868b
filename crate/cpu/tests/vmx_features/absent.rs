//! IA32_PERF_GLOBAL_CTRL, which the processor lacks: so do its controls, fields and lists.

use hypernest_cpu::VmxChoice;
use hypernest_vmcs::{Control, ExitReason, Field, entry, exit};
use iced_x86::code_asm::{qword_ptr, rax, rcx};

use super::setup;
use crate::support::hypervisor::{L1, PAGES};

const IA32_PERF_GLOBAL_CTRL: u64 = 0x38f;
const ZF: u64 = 1 << 6;

#[test]
fn no_control_may_be_set() {
    let exits = exit::LOAD_IA32_PERF_GLOBAL_CTRL | exit::SAVE_IA32_PERF_GLOBAL_CTRL;
    for choice in [VmxChoice::Max, VmxChoice::Kvm] {
        let caps = choice
            .profile(Default::default())
            .unwrap()
            .unwrap()
            .caps
            .clone();
        assert_eq!(caps.allowed1(Control::Exit) & u64::from(exits), 0);
        let entries = u64::from(entry::LOAD_IA32_PERF_GLOBAL_CTRL);
        assert_eq!(caps.allowed1(Control::Entry) & entries, 0);
        for field in [
            Field::GUEST_IA32_PERF_GLOBAL_CTRL,
            Field::HOST_IA32_PERF_GLOBAL_CTRL,
        ] {
            assert!(!caps.has_field(field));
        }
    }
}

#[test]
fn an_entry_that_asks_for_it_fails_as_one_with_a_reserved_bit() {
    let controls = entry::DEFAULT1 | entry::IA_32E_MODE_GUEST | entry::LOAD_IA32_PERF_GLOBAL_CTRL;
    let mut l1 = L1::new(&setup(
        0,
        &[(Field::VM_ENTRY_CONTROLS, u64::from(controls))],
        &|a| a.vmcall(),
    ));
    l1.run();
    assert!(l1.stop.is_some());
    assert_eq!(l1.field(Field::VM_INSTRUCTION_ERROR), 7);
}

#[test]
fn its_fields_are_no_fields() {
    for field in [
        Field::GUEST_IA32_PERF_GLOBAL_CTRL,
        Field::HOST_IA32_PERF_GLOBAL_CTRL,
    ] {
        let mut l1 = L1::start(&setup(0, &[], &|a| a.vmcall()));
        l1.resume_after(&|a| {
            a.mov(rcx, u64::from(field.encoding()))?;
            a.vmread(rax, rcx)?;
            a.pushfq()?;
            a.pop(qword_ptr(PAGES))?;
            a.mov(rcx, u64::from(Field::VM_INSTRUCTION_ERROR.encoding()))?;
            a.vmread(qword_ptr(PAGES + 8), rcx)
        });
        assert_eq!((l1.word(PAGES) & ZF, l1.word(PAGES + 8)), (ZF, 12));
    }
}

#[test]
fn a_list_cannot_load_it() {
    let list = [
        (Field::VM_ENTRY_MSR_LOAD_ADDR, PAGES),
        (Field::VM_ENTRY_MSR_LOAD_COUNT, 1),
    ];
    let mut l1 = L1::new(&setup(0, &list, &|a| a.vmcall()));
    l1.put(PAGES, IA32_PERF_GLOBAL_CTRL);
    l1.run();
    let reason = u64::from(ExitReason::ENTRY_FAILURE_MSR_LOADING.0) | 1 << 31;
    assert_eq!(l1.exit(), (reason, 1));
}
