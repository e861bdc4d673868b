//! No recording makes its reader or a replay panic, hang or take memory without bound.
//!
//! The input is read as a log as it is; then its pieces become the sections of one, with right checksums. A piece is its
//! kind, its length and its content. What of it happens soon is replayed.

#![no_main]

use hypernest_machine::Machine;
use hypernest_migrate::record::{Log, Replay};
use hypernest_migrate::section::SectionWriter;
use libfuzzer_sys::fuzz_target;

/// Ticks that a replay may take.
const SOON: u64 = 100_000;

fuzz_target!(|data: &[u8]| {
    let _ = Log::open(data);
    if let Ok(log) = Log::read(data) {
        replay(log);
    }
    let mut writer = SectionWriter::bare(Vec::new());
    let mut rest = data;
    while let [kind, length, after @ ..] = rest {
        let (content, after) = after.split_at(after.len().min(usize::from(*length) * 8));
        rest = after;
        let name = ["input", "keyframe", "stop", "other"][usize::from(kind & 3)];
        let outcome = match kind & 4 {
            0 => writer.required(name, 1, content),
            _ => writer.optional(name, u16::from(kind >> 3), content),
        };
        assert!(outcome.is_ok());
    }
    let Ok(bytes) = writer.finish() else {
        return;
    };
    if let Ok(log) = Log::read(&bytes[..]) {
        assert!(log.whole);
        replay(log);
    }
});

fn replay(mut log: Log) {
    log.entries.retain(|entry| entry.at.tick < SOON);
    // INC EAX; JMP to it.
    let builder = Machine::builder().memory(1 << 20).cpus(2);
    let Ok(machine) = builder.image(&[0x66, 0x40, 0xeb, 0xfc][..]).raw().build() else {
        return;
    };
    let Ok(mut replay) = Replay::new(machine, log, 1 << 20) else {
        return;
    };
    if let Err(error) = replay.to_end() {
        assert!(!error.to_string().contains('\n'));
    }
    let _ = replay.to_tick(SOON / 2);
    let _ = replay.step_back(3);
    let _ = replay.step_back_exit();
}
