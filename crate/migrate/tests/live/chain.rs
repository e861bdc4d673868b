//! Twenty hops in a row, with one layout of VMCS regions and with layouts that change at each.

use hypernest_machine::{Layout, Machine, Until, VmxChoice, VmxLayouts, hash};
use hypernest_migrate::live::{DestinationNext, Failure, Settings, SourceNext};

use crate::link::{
    Link, empty_like, finish, handed_over, machine, migrate, offered, without_layouts,
};
use crate::rounds::rounds;

const HOPS: u64 = 20;

fn random(n: u64) -> u64 {
    hash::finish(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 5)
}

/// Runs into the next part of a run of `length` ticks.
fn run_on(machine: &mut Machine, hop: u64, length: u64) {
    let part = length / (HOPS + 2);
    let tick = part * hop + random(hop) % part;
    let tick = tick.max(machine.now());
    machine.run(&Until::tick(tick)).unwrap();
}

#[test]
fn twenty_hops_with_one_layout_end_as_the_run_with_saves_at_the_same_ticks() {
    let new = || machine(VmxLayouts::default());
    let mut whole = new();
    let printed_whole = finish(&mut whole);
    let length = whole.now();

    let (mut moving, mut printed, mut ticks) = (new(), Vec::new(), Vec::new());
    for hop in 1..=HOPS {
        run_on(&mut moving, hop, length);
        printed.extend(moving.take_serial_output());
        let settings = (Settings::default(), Settings::default());
        let link = Link {
            ticks: 100,
            ..Link::default()
        };
        let mut ended = migrate(&mut moving, link, settings, |machine| {
            Ok(empty_like(machine, None))
        });
        assert_eq!(ended.destination, DestinationNext::Own);
        printed.extend(ended.destination_side.take_unprinted().serial);
        moving = ended.destination_side.take_machine().unwrap();
        ticks.push(moving.now());
    }
    printed.extend(finish(&mut moving));
    assert_eq!(printed, printed_whole);

    let mut saved = new();
    for tick in ticks {
        saved.run(&Until::tick(tick)).unwrap();
        saved.save().unwrap();
    }
    finish(&mut saved);
    assert_eq!(moving.state_hash(), saved.state_hash());
}

fn named(name: &str) -> Layout {
    Layout::named(name).unwrap().clone()
}

/// A hypervisor that makes and changes VMCSs.
fn maker(advertised: &str, accepted: &[&str]) -> Machine {
    let layouts = VmxLayouts {
        advertised: Some(named(advertised)),
        written: Some(named(advertised)),
        accepted: accepted.iter().map(|name| named(name)).collect(),
    };
    Machine::builder()
        .memory(8 << 20)
        .vmx(VmxChoice::Max)
        .vmcs_layouts(layouts)
        .image(rounds())
        .build()
        .unwrap()
}

/// The layout whose region a page is, where it is one.
fn region_of<'a>(machine: &'a Machine, page: &[u8]) -> Option<&'a Layout> {
    let profile = machine.vmx_profile().unwrap();
    let (revision, _) = hypernest_vmcs::revision(page)?;
    let mut accepted = profile.accepted();
    accepted.find(|layout| layout.revision() == revision)
}

/// Holds that two memories are equal but for the layouts of VMCS regions, whose fields are equal. How many regions
/// there are whose layouts differ.
fn equal_but_for_layouts(one: &Machine, other: &Machine) -> usize {
    let root = one.read_vcpu(0).unwrap().vmx.region;
    let root = root.and_then(|address| one.ram().offset(address));
    let mut differing = 0;
    let pages = one.ram().bytes().chunks_exact(4096);
    for (number, (a, b)) in pages
        .zip(other.ram().bytes().chunks_exact(4096))
        .enumerate()
    {
        if a == b {
            continue;
        }
        assert_ne!(Some(number * 4096), root, "the region of VMXON");
        let (of_a, of_b) = (region_of(one, a), region_of(other, b));
        let (Some(of_a), Some(of_b)) = (of_a, of_b) else {
            panic!("page {number:#x} differs and is no region");
        };
        assert_eq!(
            of_a.read(a).unwrap(),
            of_b.read(b).unwrap(),
            "page {number:#x}"
        );
        differing += 1;
    }
    differing
}

#[test]
fn twenty_hops_with_changing_layouts_change_regions_and_nothing_else() {
    const OTHERS: [&str; 2] = ["hypernest-evmcs", "virtualbox"];
    let length = {
        let mut whole = maker("kvm", &OTHERS);
        finish(&mut whole);
        whole.now()
    };
    let mut moving = maker("kvm", &OTHERS);
    let mut staying = maker("kvm", &OTHERS);
    let mut regions = 0;
    for hop in 1..=HOPS {
        run_on(&mut moving, hop, length);
        let written = ["hypernest-evmcs", "kvm", "virtualbox", "kvm"][hop as usize % 4];
        let (next, _) = handed_over(&mut moving, Some(written));
        moving = next;
        let profile = moving.vmx_profile().unwrap();
        assert_eq!(profile.written().name(), written);
        staying.run(&Until::tick(moving.now())).unwrap();
        staying.save().unwrap();
        assert_eq!(without_layouts(&moving), without_layouts(&staying));
        regions += equal_but_for_layouts(&moving, &staying);
    }
    assert_eq!(finish(&mut moving), finish(&mut staying));
    assert_eq!(without_layouts(&moving), without_layouts(&staying));
    equal_but_for_layouts(&moving, &staying);
    assert!(regions > 50, "{regions}");
}

#[test]
fn what_a_layout_cannot_hold_is_refused_with_the_fields_named_and_the_source_goes_on() {
    let mut source = maker("kvm", &[]);
    source.run(&Until::tick(5000)).unwrap();
    let settings = || (Settings::default(), Settings::default());
    let build = |machine: &Machine| {
        // An id that two layouts share is found when the machine is built.
        let config = offered(machine, Some("kvm-3.10")).unwrap();
        let built = Machine::builder()
            .memory(config.memory)
            .vmx(config.vmx)
            .vmcs_layouts(config.layouts)
            .build();
        built.map_err(|error| vec![error.to_string()])
    };
    let ended = migrate(&mut source, Link::default(), settings(), build);
    let SourceNext::GoOn(Failure::Refused(reasons)) = ended.source else {
        panic!("{:?}", ended.source);
    };
    assert!(
        reasons[0].contains("same revision 0x11e57ed0"),
        "{reasons:?}"
    );
    assert!(!ended.source_side.has_stopped());

    // Nobody looked before, and a layout that holds less is found when the state is taken up.
    let mut source = maker("hypernest-evmcs", &[]);
    source.run(&Until::tick(5000)).unwrap();
    let ended = migrate(&mut source, Link::default(), settings(), |machine| {
        Ok(empty_like(machine, Some("kvm-3.10")))
    });
    let SourceNext::GoOn(Failure::Peer(why)) = &ended.source else {
        panic!("{:?}", ended.source);
    };
    assert!(why.contains("set of VMCS fields"), "{why}");
    finish(&mut source);
    let mut other = maker("hypernest-evmcs", &[]);
    finish(&mut other);
    assert_eq!(source.state_hash(), other.state_hash());
}
