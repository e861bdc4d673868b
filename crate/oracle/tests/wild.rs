//! Wild guests never panic the processor and never see its blocks. The fuzz target `guest` looks
//! for more of them.

use hypernest_oracle::{Rng, wild};

/// Guests in a normal run.
const GUESTS: u64 = 3_000;

#[test]
fn random_guests_in_all_modes_run_to_their_deadline() {
    let (mut ran, mut far) = (0, 0);
    for seed in 0..GUESTS {
        let mut rng = Rng::new(seed);
        let mut data: [u8; 768] = rng.bytes();
        // Half of them with code that makes sense more often: few distinct bytes.
        if seed % 2 == 0 {
            for byte in &mut data[400..] {
                if rng.one_in(2) {
                    *byte = rng.pick(&[0x0f, 0x48, 0x66, 0x8b, 0x89, 0x01, 0xc3, 0x90, 0x00, 0x40]);
                }
            }
        }
        let result = std::panic::catch_unwind(|| wild::run(&data));
        match result {
            Ok(None) => (),
            Ok(Some(ending)) => {
                ran += 1;
                far += u64::from(ending.now > 100);
            }
            Err(_) => panic!("guest of seed {seed}"),
        }
    }
    println!("{ran} of {GUESTS} guests could run, {far} beyond 100 ticks");
    assert!(ran > GUESTS / 2 && far > GUESTS / 4);
}
