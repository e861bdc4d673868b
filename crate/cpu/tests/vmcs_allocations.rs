//! VMPTRLD and VMCLEAR allocate nothing, whatever the layouts.

#[path = "../../vmcs/tests/counting/mod.rs"]
mod counting;
mod support;

use counting::allocations;
use hypernest_cpu::{Model, Tick, VmxChoice, VmxLayouts};
use hypernest_vmcs::Layout;
use iced_x86::code_asm::{dword_ptr, qword_ptr};

use support::Nothing;
use support::hypervisor::{GUEST, L1, OTHER_VMCS, POINTERS, Setup, VMCS};

#[test]
fn changing_the_current_vmcs_allocates_nothing() {
    let named = |name| Layout::named(name).unwrap().clone();
    let layouts = VmxLayouts {
        advertised: Some(named("kvm-3.10")),
        written: Some(named("hypernest-evmcs")),
        accepted: Vec::new(),
    };
    let model = <&Model>::default();
    let profile = VmxChoice::Max.profile_with(model, &layouts).unwrap();
    let setup = Setup {
        choice: VmxChoice::Max,
        proc2: 0,
        fields: &[],
        guest: &|a| a.vmcall(),
    };
    let mut l1 = L1::with(&setup, profile.unwrap());
    l1.run();
    // L1 changes between two regions for ever; one of them comes in the old layout again and again.
    let revision = named("kvm-3.10").revision();
    let code = support::hypervisor::assemble(GUEST, &|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.vmclear(qword_ptr(POINTERS + 16))?;
        a.mov(dword_ptr(OTHER_VMCS), revision)?;
        a.vmptrld(qword_ptr(POINTERS + 16))?;
        a.vmptrld(qword_ptr(POINTERS + 8))?;
        a.jmp(again)
    });
    l1.ram.write(GUEST, &code).unwrap();
    l1.change(|state| state.rip = GUEST);
    let mut run = |ticks: Tick| {
        let until = l1.processor.now() + ticks;
        l1.processor.run(&mut l1.ram, &mut Nothing, until);
    };
    run(100);
    assert_eq!(allocations(|| run(10_000)), 0);
    let written = named("hypernest-evmcs").revision();
    assert_eq!(l1.word(VMCS) as u32, written, "L1 does what it is to do");
}
