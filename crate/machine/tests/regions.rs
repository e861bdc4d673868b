//! A machine that changes the layout of its VMCSs while its hypervisor and the guest in it go on: the
//! hypervisor knows one revision identifier for its whole life, and regions of two layouts lie side by side.

#[path = "../../../tests/guests/hypervisor.rs"]
mod hypervisor;
#[path = "../../../tests/guests/rounds.rs"]
mod rounds;

use hypernest_machine::{
    EngineError, Layout, Machine, RestoreError, Stop, Until, VmxChoice, VmxLayouts,
};
use hypernest_vmcs::{Field, Vmcs, revision};
use hypervisor::{L2_MEMORY, POINTERS, START, VMCS};
use rounds::{ALL_ROUNDS, COUNT, EXITS, FRESH, ROUNDS, rounds};

fn named(name: &str) -> Layout {
    Layout::named(name).unwrap().clone()
}

fn layouts(advertised: &str, written: &str, accepted: &[&str]) -> VmxLayouts {
    VmxLayouts {
        advertised: Some(named(advertised)),
        written: Some(named(written)),
        accepted: accepted.iter().map(|name| named(name)).collect(),
    }
}

fn machine(layouts: VmxLayouts) -> Machine {
    Machine::builder()
        .memory(8 << 20)
        .vmx(VmxChoice::Max)
        .vmcs_layouts(layouts)
        .image(rounds())
        .build()
        .unwrap()
}

fn word(machine: &Machine, at: u64) -> u64 {
    let mut bytes = [0; 8];
    machine.peek_physical(at, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Runs until L1 has done this many rounds and L2 is in its work again.
fn run_into(machine: &mut Machine, rounds: u64) {
    loop {
        let tick = machine.now() + 7;
        assert_eq!(machine.run(&Until::tick(tick)).unwrap(), Stop::Tick);
        let state = machine.read_vcpu(0).unwrap();
        if word(machine, ROUNDS) == rounds && state.vmx.non_root && state.gpr[13] < 30 {
            return;
        }
    }
}

/// Another machine goes on with memory, nested state and registers.
fn carry(from: &mut Machine, layouts: VmxLayouts, nested_first: bool) -> Machine {
    let blob = from.nested_state(0).unwrap();
    let registers = from.read_vcpu(0).unwrap();
    let mut to = machine(layouts);
    to.ram_mut().bytes_mut().copy_from_slice(from.ram().bytes());
    to.flush();
    if !nested_first {
        to.write_registers(0, &registers).unwrap();
    }
    let report = to.set_nested_state(0, &blob).unwrap();
    if nested_first {
        to.write_registers(0, &registers).unwrap();
    }
    assert_eq!(report.dropped, []);
    let written = from.vmx_profile().unwrap().written().name().to_owned();
    assert_eq!(report.layout, Some(written));
    assert!(report.translated);
    to
}

/// The VMCS in a region, which must be of this layout.
fn region(machine: &Machine, at: u64, layout: &str) -> Vmcs {
    let mut bytes = vec![0; 4096];
    machine.peek_physical(at, &mut bytes).unwrap();
    named(layout).read(&bytes).unwrap()
}

/// Pages by layout.
fn pages(machine: &Machine) -> Vec<(String, usize)> {
    let counts = machine.vmcs_regions().unwrap();
    counts
        .into_iter()
        .map(|count| (count.layout, count.pages))
        .collect()
}

/// What there is in the end: L2's count, and which rounds L1 made.
fn result(machine: &mut Machine) -> (u64, u64) {
    assert_eq!(machine.run(&Until::end()).unwrap(), Stop::PoweredOff);
    (word(machine, L2_MEMORY + COUNT), word(machine, ROUNDS))
}

const OLD: &str = "kvm-3.10";
const NEW: &str = "hypernest-evmcs";

#[test]
fn regions_change_to_a_new_layout_and_back_under_a_running_guest() {
    let whole = result(&mut machine(layouts(OLD, OLD, &[NEW])));
    let all = u64::from(ALL_ROUNDS);
    assert_eq!(whole, (3 * u64::from(EXITS) * all, all));
    for nested_first in [true, false] {
        let mut old = machine(layouts(OLD, OLD, &[NEW]));
        run_into(&mut old, 3);
        assert_eq!(pages(&old), [(OLD.into(), 7), (NEW.into(), 0)]);

        let mut new = carry(&mut old, layouts(OLD, NEW, &[]), nested_first);
        // Nothing in memory has changed, and L2 goes on.
        assert_eq!(pages(&new), [(OLD.into(), 7), (NEW.into(), 0)]);
        region(&new, VMCS, OLD);
        run_into(&mut new, 4);
        // The VMCLEAR and the changes of the current VMCS have written the new layout. What L1 stamped and only
        // cleared has the old one: regions of both are mixed.
        assert!(region(&new, VMCS, NEW).get(Field::GUEST_RIP) != 0);
        assert_eq!(pages(&new), [(OLD.into(), 4), (NEW.into(), 5)]);
        for n in 0..4 {
            let at = FRESH + 0x2000 * n;
            assert_eq!(region(&new, at, NEW).get(Field::GUEST_RIP), at);
            region(&new, at + 0x1000, OLD);
        }
        let mut bytes = [0; 4];
        new.peek_physical(word(&new, POINTERS), &mut bytes).unwrap();
        assert_eq!(revision(&bytes), Some((named(OLD).revision(), false)));
        run_into(&mut new, 6);
        assert_eq!(pages(&new), [(OLD.into(), 6), (NEW.into(), 7)]);

        let mut back = carry(&mut new, layouts(OLD, OLD, &[NEW]), nested_first);
        run_into(&mut back, 7);
        assert!(region(&back, VMCS, OLD).get(Field::GUEST_RIP) != 0);
        assert_eq!(pages(&back), [(OLD.into(), 15), (NEW.into(), 0)]);
        assert_eq!(result(&mut back), whole);
    }
}

#[test]
fn a_saved_machine_goes_on_where_the_regions_are_known_and_as_much_is_offered() {
    let mut old = machine(layouts(OLD, OLD, &[]));
    run_into(&mut old, 3);
    let saved = old.save().unwrap();
    let restore = |layouts| {
        let mut there = machine(layouts);
        there
            .ram_mut()
            .bytes_mut()
            .copy_from_slice(old.ram().bytes());
        let outcome = there.restore(&saved);
        outcome.map(|()| there)
    };
    let mut new = restore(layouts(OLD, NEW, &["virtualbox"])).unwrap();
    run_into(&mut new, 4);
    region(&new, VMCS, NEW);
    let all = u64::from(ALL_ROUNDS);
    assert_eq!(result(&mut new), (3 * u64::from(EXITS) * all, all));

    let refusal = |layouts| match restore(layouts).err() {
        Some(RestoreError::Config { what, saved, here }) => (what, saved, here),
        other => panic!("{other:?}"),
    };
    let (what, saved, here) = refusal(layouts(NEW, NEW, &[OLD]));
    assert_eq!(
        (what, saved.as_str(), here.as_str()),
        ("advertised VMCS layout", OLD, NEW)
    );
}

#[test]
fn a_machine_that_offers_less_or_knows_fewer_layouts_is_refused_by_name() {
    let mut mixed = machine(layouts(NEW, NEW, &["hypernest"]));
    let saved = mixed.save().unwrap();
    let refusal = |layouts| match machine(layouts).restore(&saved).err() {
        Some(RestoreError::Config { what, saved, here }) => (what, saved, here),
        other => panic!("{other:?}"),
    };
    let (what, saved, here) = refusal(layouts(NEW, NEW, &[]));
    assert_eq!(what, "set of VMCS layouts");
    assert_eq!(
        (saved, here),
        ("hypernest-evmcs, hypernest".into(), NEW.into())
    );
    let (what, saved, _) = refusal(layouts(NEW, OLD, &["hypernest"]));
    assert_eq!(what, "set of VMCS fields");
    assert!(
        saved.contains("pml_address") && !saved.contains("guest_rip"),
        "{saved}"
    );
}

#[test]
fn layouts_that_cannot_be_together_are_refused() {
    let build = |vmx, layouts| Machine::builder().vmx(vmx).vmcs_layouts(layouts).build();
    for (vmx, layouts, words) in [
        (
            VmxChoice::Max,
            layouts(OLD, "kvm", &[]),
            "same revision 0x11e57ed0",
        ),
        (
            VmxChoice::Max,
            layouts("xen", "xen", &[]),
            "layout xen is for files",
        ),
        (VmxChoice::None, layouts(OLD, NEW, &[]), "without VMX"),
    ] {
        let error = build(vmx, layouts).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_nested_state_of_a_vcpu_that_is_not_there_is_an_error() {
    let mut machine = machine(VmxLayouts::default());
    assert_eq!(machine.nested_state(1), Err(EngineError::Vcpu(1)));
    assert_eq!(machine.set_nested_state(1, &[]), Err(EngineError::Vcpu(1)));
    assert!(matches!(
        machine.set_nested_state(0, &[]),
        Err(EngineError::Nested { vcpu: 0, .. })
    ));
    assert_eq!(machine.read_vcpu(0).unwrap().rip, START);
}
