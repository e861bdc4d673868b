//! What each side of a live migration takes for itself: hashing, packing and sending 512 MiB of which a quarter is in
//! use, and putting it in place.

use std::time::{Duration, Instant};

use hypernest_machine::{Machine, hash};
use hypernest_migrate::live::{
    Destination, DestinationNext, Identity, Settings, Source, SourceNext,
};

const MEMORY: u64 = 512 << 20;
const PAGE: usize = 4096;

/// Half of the pages in use are like program text, half like tables that are mostly empty.
fn fill(ram: &mut [u8]) {
    let mut word = 1u64;
    for (number, page) in ram.chunks_exact_mut(PAGE).enumerate() {
        let dense = match number % 8 {
            0 => 512,
            1 => 40,
            _ => continue,
        };
        for bytes in page.chunks_exact_mut(8).take(dense) {
            word = hash::finish(word.wrapping_add(0x9e37_79b9_7f4a_7c15));
            let small = word & 0x0000_00ff_000f_ffff;
            bytes.copy_from_slice(&small.to_le_bytes());
        }
    }
}

fn rate(bytes: u64, time: Duration) -> String {
    format!("{:.2} GB/s", bytes as f64 / 1e9 / time.as_secs_f64())
}

fn main() {
    let new = || Machine::builder().memory(MEMORY).build().unwrap();
    let mut machine = new();
    fill(machine.ram_mut().bytes_mut());
    let used = MEMORY / 4;

    let start = Instant::now();
    let pages = machine.ram().bytes().chunks_exact(PAGE);
    let sum = pages.fold(0, |sum: u64, page| sum.wrapping_add(hash::bytes(1, page)));
    let time = start.elapsed();
    println!("hash of every page: {} ({sum:x})", rate(MEMORY, time));

    let identity = Identity { id: 1, release: 2 };
    let began = Instant::now();
    let now = || began.elapsed().as_micros() as u64;
    let settings = Settings::default();
    let mut source = Source::new(&mut machine, settings.clone(), identity, Vec::new(), 0).unwrap();
    let mut destination = Destination::new(settings, 3);
    let (mut sending, mut taking) = (Duration::ZERO, Duration::ZERO);
    loop {
        let start = Instant::now();
        let next = source.poll(&mut machine, now());
        sending += start.elapsed();
        if next == SourceNext::HandedOver {
            break;
        }
        let start = Instant::now();
        let bytes = source.output().len();
        destination.receive(source.output());
        source.sent(bytes);
        match destination.poll(now()) {
            DestinationNext::Judge => destination.accept(new()),
            DestinationNext::Own => destination.confirm(),
            _ => {}
        }
        let bytes = destination.output().len();
        source.receive(destination.output());
        destination.sent(bytes);
        taking += start.elapsed();
    }
    let progress = source.progress();
    println!("source: {} of what is in use", rate(used, sending));
    println!("destination: {} of what is in use", rate(used, taking));
    println!(
        "{} rounds, {:.1} MB sent",
        progress.rounds.len(),
        progress.bytes as f64 / 1e6
    );
}
