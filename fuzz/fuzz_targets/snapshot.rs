//! No bytes make the reader of snapshots panic or take memory without end, and no machine that it makes does when it runs.

#![no_main]

use hypernest_machine::Until;
use hypernest_migrate::Snapshot;
use hypernest_migrate::section::{Kind, SectionReader, SectionWriter};
use libfuzzer_sys::fuzz_target;

/// A snapshot of a hypervisor while its guest executes.
const GOOD: &[u8] = include_bytes!("../../crate/migrate/tests/golden/hypervisor-1.snapshot");
const MOST: u64 = 16 << 20;

// Bytes of a file; or, after the number of a section, its content in a file that is good otherwise, checksums included.
fuzz_target!(|data: &[u8]| {
    take(data);
    if let Some((&number, content)) = data.split_first() {
        take(&with(usize::from(number), content));
    }
});

fn take(bytes: &[u8]) {
    let Ok(snapshot) = Snapshot::open(bytes) else {
        return;
    };
    if let Ok(mut machine) = snapshot.build(MOST, Vec::new(), |builder| builder) {
        let end = machine.now().saturating_add(20_000);
        let _ = machine.run(&Until::tick(end));
    }
}

fn with(number: usize, content: &[u8]) -> Vec<u8> {
    let mut reader = SectionReader::new(GOOD, Kind::Snapshot).expect("it is good");
    let mut writer = SectionWriter::new(Vec::new(), Kind::Snapshot).expect("memory takes it");
    let mut own = Vec::new();
    let mut n = 0;
    while let Some(head) = reader.next(&mut own).expect("it is good") {
        let content = if n == number { content } else { &own };
        let written = match head.required {
            true => writer.required(&head.name, head.version, content),
            false => writer.optional(&head.name, head.version, content),
        };
        written.expect("it is short");
        n += 1;
    }
    writer.finish().expect("memory takes it")
}
