//! No bytes of a peer make the taking side of a migration panic, hang or own a machine that it was not given whole.
//!
//! The input is messages: a kind, a length of two bytes, a payload; their checksums are made right. A kind of 255 passes the rest
//! on as it is.

#![no_main]

use hypernest_machine::{Machine, hash};
use hypernest_migrate::live::{Destination, DestinationNext, Settings};
use libfuzzer_sys::fuzz_target;

const MEMORY: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let mut destination = Destination::new(Settings::default(), 1);
    let mut rest = data;
    while let [kind, low, high, after @ ..] = rest {
        if *kind == 255 {
            destination.receive(after);
            break;
        }
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
        let (payload, after) = after.split_at(length);
        let mut frame = (length as u32).to_le_bytes().to_vec();
        frame.push(*kind);
        frame.extend(hash::bytes(u64::from(*kind), payload).to_le_bytes());
        frame.extend(payload);
        destination.receive(&frame);
        rest = after;
    }
    destination.closed();
    for _ in 0..=data.len() {
        match destination.poll(0) {
            DestinationNext::Wait { .. } => {}
            DestinationNext::Judge => match Machine::builder().memory(MEMORY).build() {
                Ok(machine) => destination.accept(machine),
                Err(error) => destination.refuse(vec![error.to_string()]),
            },
            DestinationNext::Store => destination.stored(Ok(())),
            DestinationNext::Own => {
                assert!(destination.take_machine().is_some());
                return;
            }
            DestinationNext::Failed(failure) | DestinationNext::Undecided(failure) => {
                assert!(!failure.to_string().contains('\n'));
                return;
            }
        }
    }
    panic!("it does not end");
});
