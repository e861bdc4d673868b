//! No bytes of a peer make the giving side of a migration panic or hang, or give its machine away before the commit.
//!
//! The input is messages as those of `live_destination`, each taken in before a step of the source's.

#![no_main]

use hypernest_machine::{Machine, hash};
use hypernest_migrate::live::{Identity, Settings, Source, SourceNext};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(mut machine) = Machine::builder().memory(1 << 20).build() else {
        return;
    };
    let identity = Identity { id: 1, release: 2 };
    let settings = Settings::default();
    let Ok(mut source) = Source::new(&mut machine, settings, identity, Vec::new(), 0) else {
        return;
    };
    let mut sent: Vec<u8> = Vec::new();
    let mut step = |source: &mut Source, now: u64| {
        let next = source.poll(&mut machine, now);
        sent.extend(source.output());
        source.sent(source.output().len());
        match next {
            SourceNext::Run | SourceNext::Wait { .. } | SourceNext::Store => false,
            SourceNext::HandedOver | SourceNext::Undecided(_) => {
                // The commit was sent: no payload, kind 6.
                let commit = [0, 0, 0, 0, 6];
                assert!(sent.windows(5).any(|bytes| bytes == commit));
                true
            }
            SourceNext::GoOn(failure) => {
                assert!(!failure.to_string().contains('\n'));
                true
            }
        }
    };
    let mut rest = data;
    while let [kind, low, high, after @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
        let (payload, after) = after.split_at(length);
        let mut frame = (length as u32).to_le_bytes().to_vec();
        frame.push(*kind);
        frame.extend(hash::bytes(u64::from(*kind), payload).to_le_bytes());
        frame.extend(payload);
        source.receive(&frame);
        if (0..8).any(|_| step(&mut source, 0)) {
            return;
        }
        rest = after;
    }
    source.closed();
    assert!(step(&mut source, 1));
});
