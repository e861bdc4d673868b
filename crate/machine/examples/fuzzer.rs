//! A fuzzer in a hundred lines: mark the machine before it reads its input, go back for each try, and keep
//! the inputs that reach new code.
//!
//! `cargo run --release -p hypernest-machine --example fuzzer`

use std::error::Error;

use hypernest_machine::{Coverage, Machine, Stop, Until};
use iced_x86::code_asm::*;

/// Where the guest reads its input, whose length is in CX.
const INPUT: u64 = 0x8000;
/// Longest input.
const LONGEST: usize = 6;
/// What the guest writes to the exit port when it fails.
const FAILED: u32 = 0x66;

/// A parser with a fault deep inside: it takes "fz", a length, and that many digits; three of them that
/// add up to 27 are too much for it.
fn guest() -> Result<Vec<u8>, Box<dyn Error>> {
    let mut a = CodeAssembler::new(16)?;
    let (mut end, mut digits) = (a.create_label(), a.create_label());
    a.mov(si, INPUT as u32)?;
    for byte in *b"fz" {
        a.lodsb()?;
        a.cmp(al, u32::from(byte))?;
        a.jne(end)?;
    }
    a.lodsb()?;
    a.movzx(cx, al)?;
    a.cmp(cx, 3)?;
    a.ja(end)?;
    a.jcxz(end)?;
    a.xor(bx, bx)?;
    a.set_label(&mut digits)?;
    a.lodsb()?;
    a.sub(al, u32::from(b'0'))?;
    a.jb(end)?;
    a.cmp(al, 9)?;
    a.ja(end)?;
    a.movzx(ax, al)?;
    a.add(bx, ax)?;
    a.loop_(digits)?;
    for sum in [9, 15, 18, 21, 23, 25, 26, 27] {
        a.cmp(bx, sum)?;
        a.jb(end)?;
    }
    a.mov(al, FAILED)?;
    a.out(0xf4, al)?;
    a.set_label(&mut end)?;
    a.mov(al, 0)?;
    a.out(0xf4, al)?;
    Ok(a.assemble(0x7c00)?)
}

/// Numbers that look random, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % limit
    }
}

fn mutate(random: &mut Random, input: &mut Vec<u8>) {
    for _ in 0..=random.below(3) {
        let at = random.below(LONGEST);
        input.resize(input.len().max(at + 1), 0);
        input[at] = match random.below(3) {
            0 => random.below(256) as u8,
            1 => b'0' + random.below(10) as u8,
            _ => input[at] ^ 1 << random.below(8),
        };
    }
}

/// Whether a run reached what no run before did. Counters are taken by their size, as fuzzers do.
fn is_new(seen: &mut [u8], counters: &[u8]) -> bool {
    let mut new = false;
    for (seen, &count) in seen.iter_mut().zip(counters) {
        let class = (8 - count.leading_zeros()) as u8;
        if class > *seen {
            (*seen, new) = (class, true);
        }
    }
    new
}

/// Runs the example.
pub fn main() -> Result<(), Box<dyn Error>> {
    let builder = Machine::builder().memory(1 << 20).image(guest()?).raw();
    let mut machine = builder.build()?;
    // Small, so that looking at it costs less than a run.
    machine.set_coverage(Some(Coverage::new(10)?))?;
    let mark = machine.mark()?;

    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut seen = vec![0; 1 << 10];
    let mut corpus = vec![vec![0; 4]];
    for tries in 1..=200_000 {
        // The later ones came further.
        let one = random.below(corpus.len()).max(random.below(corpus.len()));
        let mut input = corpus[one].clone();
        mutate(&mut random, &mut input);

        machine.go_back(&mark)?;
        machine.poke_physical(INPUT, &input)?;
        let coverage = machine.coverage().ok_or("coverage is on")?;
        coverage.clear();
        // A guest that hangs is one more finding.
        let stop = machine.run(&Until::tick(mark.now() + 100_000))?;
        if stop == (Stop::Exit { value: FAILED }) {
            println!(
                "try {tries} of {} kept inputs: the guest fails on {:?}",
                corpus.len(),
                String::from_utf8_lossy(&input)
            );
            assert!(input.starts_with(b"fz\x03999"));
            return Ok(());
        }
        let coverage = machine.coverage().ok_or("coverage is on")?;
        if is_new(&mut seen, coverage.counters()) {
            corpus.push(input);
        }
    }
    Err("no input makes the guest fail".into())
}
