//! Runs wild guests for as long as one likes: `cargo run -p hypernest-oracle --release --example wild -- N [SEED]`;
//! with `nest` before N, wild hypervisors. A guest that panics the processor, or sees its blocks, ends the run; its
//! seed is printed first.

use std::sync::atomic::{AtomicU64, Ordering};

use hypernest_oracle::{Rng, nest, wild};

static SEED: AtomicU64 = AtomicU64::new(0);

fn main() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let seed = SEED.load(Ordering::Relaxed);
        println!("guest {seed}: panicked, or its blocks showed");
        hook(info);
        std::process::exit(1);
    }));
    let mut arguments = std::env::args().skip(1).peekable();
    let nested = arguments.next_if_eq("nest").is_some();
    let run = |data: &[u8]| match nested {
        true => nest::run(data).is_some(),
        false => wild::run(data).is_some(),
    };
    let numbers: Vec<u64> = arguments
        .map_while(|argument| argument.parse().ok())
        .collect();
    // Short enough to be a demonstration without arguments.
    let count = numbers.first().copied().unwrap_or(1000);
    let first = numbers.get(1).copied().unwrap_or(0);
    for seed in first..first.saturating_add(count) {
        let mut rng = Rng::new(seed);
        let mut data: [u8; 1024] = rng.bytes();
        let palette: [u8; 16] = rng.bytes();
        // Few distinct bytes repeat themselves into loops and self-modification.
        let plain = rng.below(600) as usize;
        let loops = if nested { 500 } else { 100 } + plain;
        for byte in data.iter_mut().skip(loops) {
            *byte = rng.pick(&palette);
        }
        SEED.store(seed, Ordering::Relaxed);
        run(&data);
    }
    println!("{count} guests from seed {first}: no panic, the same with all block lengths");
}
