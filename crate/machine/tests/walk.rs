//! Walks of page tables at both levels, through EPT, from either side of a VM exit.

#[path = "../../../tests/guests/hypervisor.rs"]
mod hypervisor;

use hypernest_machine::{ExitReason, Level, Machine, Until, VmxChoice, Walk};
use hypervisor::{EPT, L1_TABLES, L2_BASE, L2_CODE, L2_MEMORY, L2_MISSING, L2_TABLES, Options};

fn machine() -> Machine {
    Machine::builder()
        .memory(8 << 20)
        .vmx(VmxChoice::Max)
        .image(hypervisor::image(&Options::default()))
        .build()
        .unwrap()
}

/// The steps as words: `EPT PTE at address`.
fn words(walk: &Walk) -> Vec<String> {
    let word = |step: &hypernest_machine::WalkStep| {
        let ept = if step.ept { "EPT " } else { "" };
        format!("{ept}{} at {:#x}", step.level, step.address)
    };
    walk.steps.iter().map(word).collect()
}

#[test]
fn l2_is_walked_through_its_own_tables_and_ept_entry_by_entry() {
    let mut machine = machine();
    machine.run(&Until::end().vm_exit(ExitReason::HLT)).unwrap();
    let address = L2_BASE + L2_CODE + 0x12;
    let walk = machine.walk_at(0, Level::L2, address).unwrap().unwrap();
    assert_eq!(walk.guest_physical, Some(L2_CODE + 0x12));
    assert_eq!(walk.physical, Some(L2_MEMORY + L2_CODE + 0x12));
    let words = words(&walk);
    // Four EPT entries to each of four tables and to the result.
    assert_eq!(words.len(), 24);
    let ept = |table: u64, index: u64| EPT + 0x1000 * table + 8 * index;
    assert_eq!(
        words[..5],
        [
            format!("EPT PML4E at {:#x}", ept(0, 0)),
            format!("EPT PDPTE at {:#x}", ept(1, 0)),
            format!("EPT PDE at {:#x}", ept(2, 0)),
            format!("EPT PTE at {:#x}", ept(3, L2_TABLES >> 12)),
            format!("PML4E at {L2_TABLES:#x}"),
        ]
    );
    assert_eq!(words[9], format!("PDPTE at {:#x}", L2_TABLES + 0x1008));
    assert_eq!(
        words[23],
        format!("EPT PTE at {:#x}", ept(3, L2_CODE >> 12))
    );
}

#[test]
fn a_page_that_ept_lacks_has_a_guest_physical_address_and_no_other() {
    let mut machine = machine();
    let until = Until::end().vm_exit(ExitReason::EPT_VIOLATION);
    machine.run(&until).unwrap();
    let of = |machine: &Machine| {
        let address = L2_BASE + L2_MISSING + 8;
        machine.walk_at(0, Level::L2, address).unwrap().unwrap()
    };
    let walk = of(&machine);
    assert_eq!(walk.guest_physical, Some(L2_MISSING + 8));
    assert_eq!(walk.physical, None);
    let last = walk.steps.last().unwrap();
    assert!(last.ept && last.entry & 7 == 0);
    machine
        .run(&Until::end().vm_exit(ExitReason::VMCALL))
        .unwrap();
    assert_eq!(of(&machine).physical, Some(L2_MEMORY + L2_MISSING + 8));
    // L2's own tables end here.
    let none = machine.walk_at(0, Level::L2, 0).unwrap().unwrap();
    assert_eq!((none.guest_physical, none.physical), (None, None));
}

#[test]
fn both_levels_are_walked_the_same_from_either_side() {
    let mut machine = machine();
    assert_eq!(machine.walk_at(0, Level::L2, 0).unwrap(), None);
    machine.run(&Until::end().vm_exit_number(1)).unwrap();
    let address = L2_BASE + L2_CODE;
    let both = |machine: &Machine| {
        let l1 = machine.walk_at(0, Level::L1, 0x12_3456).unwrap().unwrap();
        let l2 = machine.walk_at(0, Level::L2, address).unwrap().unwrap();
        (l1, l2)
    };
    let from_l1 = both(&machine);
    assert_eq!(from_l1.0.physical, Some(0x12_3456));
    assert_eq!(from_l1.0.steps[0].address, L1_TABLES);
    // Into the guest again: the handler has sixteen instructions.
    machine.run(&Until::tick(machine.now() + 16)).unwrap();
    assert_eq!(machine.read_vcpu(0).unwrap().level(), Level::L2);
    assert_eq!(both(&machine), from_l1);
    // What executes decides what plain walks and looks at memory mean.
    assert_eq!(machine.walk(0, address).unwrap(), from_l1.1);
    let mut code = [0; 2];
    machine.peek_virtual(0, address + 5, &mut code).unwrap();
    assert_eq!(code, [0x0f, 0xa2], "CPUID");
}
