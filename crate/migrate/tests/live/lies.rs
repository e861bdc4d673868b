//! Peers that lie: about lengths, hashes, page numbers, the order of messages. A clear error, and nothing is taken.

use hypernest_machine::{Machine, Until, VmxLayouts, hash};
use hypernest_migrate::live::{
    Destination, DestinationNext, Failure, Settings, Source, SourceNext,
};

use crate::link::{IDENTITY, RELEASE, empty_like, machine};

const HELLO: u8 = 1;
const PAGES: u8 = 2;
const STATE: u8 = 4;
const DONE: u8 = 5;
const COMMIT: u8 = 6;
const PING: u8 = 8;
const ACCEPT: u8 = 33;
const ACK: u8 = 35;
const READY: u8 = 36;
const OWNED: u8 = 37;

type Frame = (u8, Vec<u8>);

/// A frame as bytes, with its checksum right.
fn framed((kind, payload): &Frame) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_le_bytes().to_vec();
    out.push(*kind);
    out.extend(hash::bytes(u64::from(*kind), payload).to_le_bytes());
    out.extend(payload);
    out
}

fn frames(mut stream: &[u8]) -> Vec<Frame> {
    let mut found = Vec::new();
    while let Some((header, rest)) = stream.split_first_chunk::<13>() {
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        found.push((header[4], rest[..length].to_vec()));
        stream = &rest[length..];
    }
    found
}

fn start() -> Machine {
    let mut source = machine(VmxLayouts::default());
    source.run(&Until::tick(60_000)).unwrap();
    source
}

/// What an honest source sends that needs no answers to say it.
fn honest() -> Vec<Frame> {
    let mut machine = start();
    let settings = Settings {
        one_way: true,
        ..Settings::default()
    };
    let mut source = Source::new(&mut machine, settings, IDENTITY, b"offer".to_vec(), 0).unwrap();
    let mut stream = Vec::new();
    loop {
        stream.extend(source.output());
        source.sent(source.output().len());
        match source.poll(&mut machine, 0) {
            SourceNext::Store => source.stored(Ok(())),
            SourceNext::HandedOver => return frames(&stream),
            SourceNext::Wait { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// What a destination makes of these frames; and whether it had a machine left.
fn taken(frames: &[Frame], like: &Machine) -> (DestinationNext, bool) {
    let mut destination = Destination::new(Settings::default(), RELEASE);
    for frame in frames {
        destination.receive(&framed(frame));
    }
    destination.closed();
    for _ in 0..100_000 {
        match destination.poll(0) {
            DestinationNext::Wait { .. } => {}
            DestinationNext::Judge => destination.accept(empty_like(like, None)),
            DestinationNext::Store => destination.stored(Ok(())),
            over => return (over, destination.machine().is_some()),
        }
    }
    panic!("it does not end");
}

fn failure(frames: &[Frame], like: &Machine) -> Failure {
    match taken(frames, like) {
        (DestinationNext::Failed(failure), false) => failure,
        other => panic!("{other:?}"),
    }
}

fn at(frames: &[Frame], kind: u8) -> usize {
    frames.iter().position(|frame| frame.0 == kind).unwrap()
}

#[test]
fn an_honest_stream_is_taken_and_one_without_its_end_is_not() {
    let (frames, like) = (honest(), start());
    assert_eq!(taken(&frames, &like), (DestinationNext::Own, true));
    for count in 0..frames.len() {
        assert_eq!(failure(&frames[..count], &like), Failure::Closed, "{count}");
    }
}

#[test]
fn messages_out_of_turn_are_an_error() {
    let (frames, like) = (honest(), start());
    let message = |kind: u8| frames[at(&frames, kind)].clone();
    for kind in [PAGES, STATE, DONE, COMMIT, PING] {
        let failure = failure(&[message_or(&frames, kind)], &like);
        assert!(matches!(failure, Failure::Order(_)), "{kind}: {failure}");
    }
    // A second hello, pages after the state, a commit before all is there.
    let hello = message(HELLO);
    for (after, extra) in [
        (HELLO, hello),
        (STATE, message(PAGES)),
        (STATE, message(COMMIT)),
    ] {
        let mut wrong = frames.clone();
        wrong.insert(at(&frames, after) + 1, extra);
        let failure = failure(&wrong, &like);
        assert!(matches!(failure, Failure::Order(_)), "{after}: {failure}");
    }
}

/// A message of that kind, where the stream has none an empty one.
fn message_or(frames: &[Frame], kind: u8) -> Frame {
    let found = frames.iter().find(|frame| frame.0 == kind);
    found.cloned().unwrap_or((kind, Vec::new()))
}

#[test]
fn what_is_missing_or_changed_is_found_at_the_end() {
    let (frames, like) = (honest(), start());
    let mut missing = frames.clone();
    missing.remove(at(&frames, PAGES));
    assert_eq!(failure(&missing, &like), Failure::Differs("memory"));
    let mut missing = frames.clone();
    missing.remove(at(&frames, STATE));
    assert_eq!(failure(&missing, &like), Failure::Differs("state"));
    let mut changed = frames.clone();
    changed[at(&frames, STATE)].1[100] ^= 1;
    assert_eq!(failure(&changed, &like), Failure::Differs("state"));
    let mut swapped = frames.clone();
    let pages = &mut swapped[at(&frames, PAGES)].1;
    // The numbers of two pages with content.
    let counts: Vec<usize> = pages[..6]
        .chunks(2)
        .map(|two| usize::from(u16::from_le_bytes([two[0], two[1]])))
        .collect();
    let first = 8 + 4 * (counts[0] + 2 * counts[1]);
    assert!(counts[2] > 1);
    for byte in 0..4 {
        pages.swap(first + byte, first + 4 + byte);
    }
    assert_eq!(failure(&swapped, &like), Failure::Differs("memory"));
}

#[test]
fn no_changed_byte_gets_through() {
    let (frames, like) = (honest(), start());
    for n in 0u64..400 {
        let random = hash::finish(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 3);
        let mut wrong = frames.clone();
        let frame = match n % 4 {
            0 => at(&frames, HELLO),
            1 => at(&frames, DONE),
            _ => (random >> 40) as usize % frames.len(),
        };
        let payload = &mut wrong[frame].1;
        if payload.is_empty() {
            continue;
        }
        let byte = random as usize % payload.len();
        payload[byte] ^= 1 << (random >> 16 & 7);
        // What the hello says of its sender alone may be anything, and an LZ4 block can say the same otherwise.
        if let (over, machine) = taken(&wrong, &like)
            && !matches!(over, DestinationNext::Failed(_))
        {
            assert!(
                machine && (frame == 0 || frames[frame].0 == PAGES),
                "{n}: {over:?}"
            );
        }
    }
}

#[test]
fn too_much_state_is_refused_before_it_is_kept() {
    let frames = honest();
    let settings = Settings {
        most_state: 1000,
        ..Settings::default()
    };
    let mut destination = Destination::new(settings, RELEASE);
    let like = start();
    for frame in &frames {
        destination.receive(&framed(frame));
    }
    loop {
        match destination.poll(0) {
            DestinationNext::Wait { .. } => {}
            DestinationNext::Judge => destination.accept(empty_like(&like, None)),
            over => {
                assert_eq!(over, DestinationNext::Failed(Failure::TooLong(1000)));
                return;
            }
        }
    }
}

#[test]
fn a_source_believes_no_destination_that_is_ahead_of_it() {
    let mut machine = start();
    let mut payload = b"hypernst".to_vec();
    payload.extend(1u32.to_le_bytes());
    payload.push(9);
    let accept = (ACCEPT, payload);
    let lies: [(&[Frame], bool); 7] = [
        (&[(READY, vec![])], false),
        (&[(OWNED, vec![])], false),
        (&[accept.clone(), accept.clone()], false),
        (&[accept.clone(), (READY, vec![])], false),
        (&[accept.clone(), (OWNED, vec![])], false),
        // It was sent the hello, and not a million bytes.
        (&[accept.clone(), (ACK, vec![0xc0, 0x84, 0x3d])], true),
        (&[(200, vec![])], true),
    ];
    for (frames, other) in lies {
        let settings = Settings::default();
        let mut source = Source::new(&mut machine, settings, IDENTITY, Vec::new(), 0).unwrap();
        source.sent(source.output().len());
        for frame in frames {
            source.receive(&framed(frame));
        }
        let next = source.poll(&mut machine, 0);
        let SourceNext::GoOn(failure) = &next else {
            panic!("{frames:?}: {next:?}");
        };
        assert_eq!(matches!(failure, Failure::Order(_)), !other, "{failure}");
        assert!(!source.has_stopped());
    }
}
