//! Features of VMX that stand by themselves, each with a hypervisor that does what its test says.

mod abort;
mod absent;
mod borders;
mod function;
mod hostile;
mod log;
mod nested;
mod shadow;
#[path = "../support/mod.rs"]
mod support;
mod task;
mod time;
mod ve;
mod violation;

use std::sync::Arc;

use hypernest_cpu::{Model, VmxChoice, VmxLayouts, VmxProfile};
use hypernest_vmcs::{ExitReason, Field, Layout};
use support::HANDLERS;
use support::hypervisor::{Emit, L1, Setup};

/// A guest with these secondary controls and fields.
fn setup<'a>(proc2: u32, fields: &'a [(Field, u64)], guest: Emit<'a>) -> Setup<'a> {
    Setup {
        choice: VmxChoice::Max,
        proc2,
        fields,
        guest,
    }
}

/// Vector of the exception whose handler the guest halted in.
fn vector(l1: &L1) -> u64 {
    assert_eq!(l1.reason(), ExitReason::HLT);
    let rip = l1.field(Field::GUEST_RIP);
    let handlers = HANDLERS..HANDLERS + 0x1000;
    assert!(handlers.contains(&rip), "no exception: {rip:#x}");
    (rip - HANDLERS) / 16
}

/// Fields of a guest at CPL 3; an exception of it exits, as it has no stack to take one on.
const USER: [(Field, u64); 5] = [
    (Field::GUEST_CS_SELECTOR, 0x2b),
    (Field::GUEST_CS_AR_BYTES, 0xa0fb),
    (Field::GUEST_SS_SELECTOR, 0x33),
    (Field::GUEST_SS_AR_BYTES, 0xc0f3),
    (Field::EXCEPTION_BITMAP, 0xffff_ffff),
];

/// Vector of the exception that the guest left with, and its error code.
fn exception(l1: &L1) -> (u64, u64) {
    assert_eq!(l1.reason(), ExitReason::EXCEPTION_OR_NMI);
    let code = l1.field(Field::VM_EXIT_INTR_ERROR_CODE);
    (l1.field(Field::VM_EXIT_INTR_INFO) & 0xff, code)
}

/// A profile in which these layouts are advertised, written and further accepted.
fn layouts(
    choice: &VmxChoice,
    advertised: &str,
    written: &str,
    accepted: &[&str],
) -> Arc<VmxProfile> {
    let named = |name: &str| Layout::named(name).unwrap().clone();
    let layouts = VmxLayouts {
        advertised: Some(named(advertised)),
        written: Some(named(written)),
        accepted: accepted.iter().map(|name| named(name)).collect(),
    };
    let profile = choice.profile_with(<&Model>::default(), &layouts);
    profile.unwrap().unwrap()
}
