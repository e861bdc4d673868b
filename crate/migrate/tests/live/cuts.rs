//! A link that breaks anywhere, and sides that end at any moment: one owner, or a pair that can be settled.

use hypernest_machine::{Machine, Until, VmxLayouts, hash};
use hypernest_migrate::live::record::{Owns, Record, Side, decide};
use hypernest_migrate::live::{DestinationNext, Failure, Settings, SourceNext};

use crate::link::{Ended, Link, empty_like, finish, is_cut, machine, migrate};

/// The tick at which the migrations here begin.
const START: u64 = 60_000;

/// Few ticks and many steps: messages arrive one by one.
fn link(cut: (usize, usize)) -> Link {
    Link {
        cut,
        ..Link::default()
    }
}

fn start() -> Machine {
    let mut source = machine(VmxLayouts::default());
    source.run(&Until::tick(START)).unwrap();
    source
}

fn go(source: &mut Machine, link: Link) -> Ended {
    let settings = (Settings::default(), Settings::default());
    migrate(source, link, settings, |machine| {
        Ok(empty_like(machine, None))
    })
}

/// The run that nothing was done to: its output and final hash. And with one save at `tick`.
fn undisturbed() -> (Vec<u8>, u64) {
    let mut machine = machine(VmxLayouts::default());
    let printed = finish(&mut machine);
    (printed, machine.state_hash().unwrap())
}

fn saved_at(tick: u64) -> u64 {
    let mut machine = machine(VmxLayouts::default());
    machine.run(&Until::tick(tick)).unwrap();
    machine.save().unwrap();
    finish(&mut machine);
    machine.state_hash().unwrap()
}

/// What each side writes of an undecided pair.
fn records(ended: &Ended) -> (Option<Record>, Option<Record>) {
    let source = matches!(ended.source, SourceNext::Undecided(_)).then(|| Record {
        side: Side::Source,
        owns: Owns::Undecided,
        identity: ended.source_side.identity(),
        lock: ended.source_side.peer_lock().unwrap(),
        tick: 0,
    });
    let destination = match ended.destination {
        DestinationNext::Undecided(_) => Some(Owns::Undecided),
        DestinationNext::Own => Some(Owns::Yes),
        _ => None,
    };
    let destination = destination.map(|owns| Record {
        side: Side::Destination,
        owns,
        identity: ended.destination_side.identity().unwrap(),
        lock: ended.destination_side.peer_lock().unwrap(),
        tick: 0,
    });
    (source, destination)
}

/// Holds what is promised of every end.
fn check(mut source: Machine, mut ended: Ended, whole: &(Vec<u8>, u64)) -> &'static str {
    let (ours, theirs) = records(&ended);
    let kept = ended.destination_side.take_machine();
    match (&ended.source, &ended.destination) {
        // The source owns it, and goes on as if nothing had been.
        (SourceNext::GoOn(why), end) => {
            assert!(is_cut(why), "{why}");
            let mut printed = ended.source_side.take_unprinted().serial;
            printed.extend(finish(&mut source));
            assert!(whole.0.ends_with(&printed) && !printed.is_empty());
            assert_eq!(source.state_hash().unwrap(), whole.1);
            match end {
                DestinationNext::Failed(_) => {
                    assert!(kept.is_none());
                    "source"
                }
                DestinationNext::Undecided(_) => {
                    // Its machine can be kept only with a code that the source does not give.
                    let mut theirs = theirs.unwrap();
                    assert!(theirs.keep_released(theirs.identity.release).is_err());
                    assert!(theirs.drop_it().is_ok());
                    "source, destination undecided"
                }
                other => panic!("two owners: {other:?}"),
            }
        }
        (SourceNext::HandedOver, DestinationNext::Own) => {
            let mut moved = kept.unwrap();
            let at = moved.now();
            finish(&mut moved);
            assert_eq!(moved.state_hash().unwrap(), saved_at(at));
            "destination"
        }
        (SourceNext::Undecided(_), DestinationNext::Own) => {
            let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap());
            assert!(decide(&mut ours, &mut theirs).is_err());
            assert_eq!(decide(&mut theirs, &mut ours), Ok(()));
            "destination, source undecided"
        }
        (SourceNext::Undecided(_), DestinationNext::Undecided(_)) => {
            // Both hold the same machine, and either can be kept.
            let moved = kept.unwrap();
            assert_eq!(moved.state_hash(), source.state_hash());
            for keep_source in [true, false] {
                let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap());
                if keep_source {
                    decide(&mut ours, &mut theirs).unwrap();
                } else {
                    decide(&mut theirs, &mut ours).unwrap();
                }
                let owners = [ours, theirs].map(|record| record.owns == Owns::Yes);
                assert_eq!(owners, [keep_source, !keep_source]);
            }
            "both undecided"
        }
        (source, destination) => panic!("{source:?}, {destination:?}"),
    }
}

#[test]
fn a_cut_at_every_byte_near_the_end_leaves_one_owner_or_a_pair() {
    let whole = undisturbed();
    let mut source = start();
    let full = go(&mut source, Link::default()).arrived;
    let mut seen = std::collections::BTreeMap::new();
    // The last messages: done and commit there, ready and owned back.
    let there = (full.0 - 120..=full.0).map(|cut| (cut, usize::MAX));
    let back = (0..=full.1).map(|cut| (usize::MAX, cut));
    for cut in there.chain(back) {
        let mut source = start();
        let ended = go(&mut source, link(cut));
        *seen.entry(check(source, ended, &whole)).or_insert(0) += 1;
    }
    let kinds: Vec<_> = seen.keys().copied().collect();
    let all = [
        "both undecided",
        "destination",
        "destination, source undecided",
        "source",
        "source, destination undecided",
    ];
    assert!(kinds.iter().all(|kind| all.contains(kind)), "{seen:?}");
    for kind in ["both undecided", "destination, source undecided", "source"] {
        assert!(kinds.contains(&kind), "{seen:?}");
    }
}

/// Number of cuts at random bytes: `HYPERNEST_CUTS` where it is set.
fn cuts() -> u64 {
    let wanted = std::env::var("HYPERNEST_CUTS").ok();
    wanted.and_then(|text| text.parse().ok()).unwrap_or(50)
}

#[test]
fn cuts_at_random_bytes_leave_one_owner_or_a_pair() {
    let whole = undisturbed();
    let full = go(&mut start(), Link::default()).arrived;
    for n in 0..cuts() {
        let random = hash::finish(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
        let cut = match random % 4 {
            0 => (usize::MAX, (random >> 8) as usize % full.1),
            _ => ((random >> 8) as usize % full.0, usize::MAX),
        };
        let mut source = start();
        let step = 1 << (8 + n % 13);
        let ended = go(&mut source, Link { step, ..link(cut) });
        check(source, ended, &whole);
    }
}

#[test]
fn a_silent_peer_is_given_up() {
    // Nothing comes back at all, and nobody says that the link is gone: only time passes.
    let mut source = start();
    let mut side = hypernest_migrate::live::Source::new(
        &mut source,
        Settings::default(),
        crate::link::IDENTITY,
        Vec::new(),
        0,
    )
    .unwrap();
    assert_eq!(side.poll(&mut source, 9_999_999), SourceNext::Run);
    let silent = Failure::Silent(10_000_000);
    let next = side.poll(&mut source, 10_000_001);
    assert_eq!(next, SourceNext::GoOn(silent.clone()));
    let mut side = hypernest_migrate::live::Destination::new(Settings::default(), 1);
    assert!(matches!(side.poll(5), DestinationNext::Wait { .. }));
    assert_eq!(side.poll(10_000_005), DestinationNext::Failed(silent));
}
