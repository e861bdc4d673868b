//! A machine that was moved is the machine that was not.

use hypernest_machine::{Machine, Until, VmxLayouts};
use hypernest_migrate::live::{DestinationNext, Failure, Settings, SourceNext};

use crate::link::{Link, empty_like, finish, handed_over, machine, migrate};

/// Ticks of the whole run of the built-in hypervisor.
fn length() -> u64 {
    let mut machine = machine(VmxLayouts::default());
    finish(&mut machine);
    machine.now()
}

/// One that was only saved at tick `tick`.
fn saved_at(tick: u64) -> Machine {
    let mut machine = machine(VmxLayouts::default());
    machine.run(&Until::tick(tick)).unwrap();
    assert_eq!(machine.now(), tick);
    machine.save().unwrap();
    machine
}

#[test]
fn a_machine_moves_at_any_tick_and_is_the_one_that_was_saved_there() {
    let length = length();
    for n in 1..24 {
        let mut source = machine(VmxLayouts::default());
        source.run(&Until::tick(length * n / 25)).unwrap();
        let (mut moved, side) = handed_over(&mut source, None);
        assert!(!side.progress().rounds.is_empty());
        let at = moved.now();
        let mut saved = saved_at(at);
        assert_eq!(moved.state().unwrap(), saved.state().unwrap(), "tick {at}");
        assert_eq!(moved.ram().bytes(), saved.ram().bytes());
        let mut printed = source.take_serial_output();
        printed.extend(finish(&mut moved));
        // The source took what was not printed along; here it is the whole.
        assert!(finish(&mut saved).ends_with(&printed));
        assert_eq!(moved.state_hash(), saved.state_hash());
    }
}

#[test]
fn serial_output_joins_though_nobody_printed_it_before() {
    let mut whole = machine(VmxLayouts::default());
    let whole = finish(&mut whole);
    let length = length();
    for n in [3, 9, 15, 21] {
        let mut source = machine(VmxLayouts::default());
        source.run(&Until::tick(length * n / 25)).unwrap();
        // Half of it was printed.
        let mut printed = source.take_serial_output();
        let before = source.now();
        source.run(&Until::tick(before + length / 10)).unwrap();
        let settings = (Settings::default(), Settings::default());
        let mut ended = migrate(&mut source, Link::default(), settings, |machine| {
            Ok(empty_like(machine, None))
        });
        assert_eq!(ended.destination, DestinationNext::Own);
        printed.extend(ended.destination_side.take_unprinted().serial);
        printed.extend(finish(&mut ended.destination_side.take_machine().unwrap()));
        assert_eq!(printed, whole);
    }
}

#[test]
fn a_refused_machine_never_stops() {
    let mut source = machine(VmxLayouts::default());
    source.run(&Until::tick(30_000)).unwrap();
    let settings = (Settings::default(), Settings::default());
    let reasons = vec!["no VMX".to_owned(), "too much memory".to_owned()];
    let ended = migrate(&mut source, Link::default(), settings, |_| {
        Err(reasons.clone())
    });
    assert_eq!(
        ended.source,
        SourceNext::GoOn(Failure::Refused(reasons.clone()))
    );
    assert_eq!(
        ended.destination,
        DestinationNext::Failed(Failure::Unfit(reasons))
    );
    assert!(!ended.source_side.has_stopped());
    let mut other = machine(VmxLayouts::default());
    assert_eq!(finish(&mut source), finish(&mut other));
    assert_eq!(source.state_hash(), other.state_hash());
}

#[test]
fn a_token_is_demanded() {
    let token = |text: &str| Settings {
        token: text.into(),
        ..Settings::default()
    };
    for (theirs, ours, good) in [
        ("secret", "secret", true),
        ("anything", "", true),
        ("", "secret", false),
        ("secre", "secret", false),
        ("secrets", "secret", false),
    ] {
        let mut source = machine(VmxLayouts::default());
        let settings = (token(theirs), token(ours));
        let ended = migrate(&mut source, Link::default(), settings, |machine| {
            Ok(empty_like(machine, None))
        });
        assert_eq!(ended.source == SourceNext::HandedOver, good, "{theirs}");
        if !good {
            assert_eq!(ended.destination, DestinationNext::Failed(Failure::Token));
        }
    }
}

#[test]
fn a_stream_that_goes_one_way_can_be_kept_and_read_later() {
    let one_way = Settings {
        one_way: true,
        ..Settings::default()
    };
    let mut source = machine(VmxLayouts::default());
    source.run(&Until::tick(50_000)).unwrap();
    let settings = (one_way, Settings::default());
    let mut ended = migrate(&mut source, Link::default(), settings, |machine| {
        Ok(empty_like(machine, None))
    });
    assert_eq!(ended.source, SourceNext::HandedOver);
    assert_eq!(ended.destination, DestinationNext::Own);
    assert_eq!(ended.arrived.1, 0, "answers");
    assert!(ended.stored.0);
    let mut moved = ended.destination_side.take_machine().unwrap();
    let mut saved = saved_at(50_000);
    assert_eq!(moved.state(), saved.state());
    finish(&mut moved);
    finish(&mut saved);
    assert_eq!(moved.state_hash(), saved.state_hash());
}

#[test]
fn both_sides_store_before_the_machine_changes_hands() {
    let store = Settings {
        store: true,
        ..Settings::default()
    };
    let mut source = machine(VmxLayouts::default());
    source.run(&Until::tick(50_000)).unwrap();
    let ended = migrate(
        &mut source,
        Link::default(),
        (store.clone(), store),
        |machine| Ok(empty_like(machine, None)),
    );
    assert_eq!(ended.source, SourceNext::HandedOver);
    assert_eq!(ended.stored, (true, true));
}

#[test]
fn a_full_disk_on_either_side_leaves_the_machine_where_it_was() {
    let store = Settings {
        store: true,
        ..Settings::default()
    };
    let full = || "the disk is full".to_owned();
    let peer = || Failure::Peer(Failure::Store(full()).to_string());
    for (source_full, ours, theirs) in [
        (true, Failure::Store(full()), peer()),
        (false, peer(), Failure::Store(full())),
    ] {
        let mut source = machine(VmxLayouts::default());
        source.run(&Until::tick(50_000)).unwrap();
        let link = Link {
            full: (source_full, !source_full),
            ..Link::default()
        };
        let settings = (store.clone(), store.clone());
        let ended = migrate(&mut source, link, settings, |machine| {
            Ok(empty_like(machine, None))
        });
        assert_eq!(ended.source, SourceNext::GoOn(ours));
        assert_eq!(ended.destination, DestinationNext::Failed(theirs));
        finish(&mut source);
        let mut other = machine(VmxLayouts::default());
        finish(&mut other);
        assert_eq!(source.state_hash(), other.state_hash());
    }
}
