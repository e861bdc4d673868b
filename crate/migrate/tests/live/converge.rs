//! Guests that write while they move, links that are slow, limits: simulated, with time as the test says.

use hypernest_machine::{Machine, hash};
use hypernest_migrate::live::{
    Destination, DestinationNext, Progress, Settings, Source, SourceNext,
};

use crate::link::{IDENTITY, RELEASE};

const MEMORY: u64 = 32 << 20;
const PAGE: u64 = 4096;
/// Pages that the guest writes again and again.
const WRITTEN: u64 = 4096;

/// Bytes that cannot be packed.
fn noise(seed: &mut u64) -> Vec<u8> {
    let mut next = || {
        *seed = hash::finish(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
        seed.to_le_bytes()
    };
    (0..PAGE / 8).flat_map(|_| next()).collect()
}

/// Moves a machine whose guest writes `dirty` pages in each millisecond that it has, over a link of `rate` bytes per
/// millisecond. What came of it, and the least share that the guest had.
fn simulate(dirty: u64, rate: usize, settings: Settings) -> (Progress, u32) {
    let new = || Machine::builder().memory(MEMORY).build().unwrap();
    let mut machine = new();
    let mut seed = 1;
    for page in 0..WRITTEN {
        machine
            .poke_physical(page * PAGE, &noise(&mut seed))
            .unwrap();
    }
    let mut source = Source::new(&mut machine, settings, IDENTITY, Vec::new(), 0).unwrap();
    let mut destination = Destination::new(Settings::default(), RELEASE);
    let (mut now, mut credit, mut share) = (0, 0, 100);
    loop {
        let next = source.poll(&mut machine, now);
        share = share.min(source.progress().share);
        let time = match next {
            SourceNext::HandedOver => break,
            SourceNext::Run => {
                for _ in 0..dirty {
                    let content = noise(&mut seed);
                    machine
                        .poke_physical(seed % WRITTEN * PAGE, &content)
                        .unwrap();
                }
                1000
            }
            SourceNext::Wait { micros } => micros.clamp(50, 1000),
            other => panic!("{other:?}"),
        };
        now += time;
        assert!(now < 600_000_000, "{:?}", source.progress());
        credit = (credit + rate * time as usize / 1000).min(4 * rate);
        let bytes = source.output().len().min(credit);
        credit -= bytes;
        destination.receive(&source.output()[..bytes]);
        source.sent(bytes);
        match destination.poll(now) {
            DestinationNext::Judge => destination.accept(new()),
            DestinationNext::Own => destination.confirm(),
            _ => {}
        }
        source.receive(destination.output());
        destination.sent(destination.output().len());
    }
    let moved = destination.take_machine().unwrap();
    assert!(moved.ram().bytes() == machine.ram().bytes());
    (source.progress().clone(), share)
}

#[test]
fn a_guest_that_writes_less_than_the_link_takes_moves_within_its_downtime() {
    // 20 MB/s over 200 MB/s.
    let (progress, share) = simulate(5, 200_000, Settings::default());
    assert!(progress.downtime < 25_000, "{progress:?}");
    assert!(progress.rounds.len() > 1, "{progress:?}");
    assert_eq!(share, 100);
}

#[test]
fn a_guest_that_outruns_the_link_gets_less_and_less_time_until_it_can_move() {
    // 400 MB/s over 50 MB/s.
    let (progress, share) = simulate(100, 50_000, Settings::default());
    assert!(share <= 25, "{share}");
    assert!(progress.downtime < 60_000, "{progress:?}");
    assert_eq!(progress.share, share);
}

#[test]
fn a_longer_downtime_takes_fewer_rounds() {
    let rounds = |downtime| {
        let settings = Settings {
            downtime,
            ..Settings::default()
        };
        simulate(20, 100_000, settings).0.rounds.len()
    };
    assert!(rounds(500_000) < rounds(5_000));
}

#[test]
fn a_limit_on_bytes_holds() {
    let settings = Settings {
        bandwidth: Some(10_000_000),
        downtime: 100_000,
        ..Settings::default()
    };
    let (progress, _) = simulate(0, 200_000, settings);
    let least = 16_000_000 * 1_000_000 / 10_000_000;
    assert!(
        progress.micros * 11 / 10 > least && progress.micros < 2 * least,
        "{progress:?}"
    );
}
