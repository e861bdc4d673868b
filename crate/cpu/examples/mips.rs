//! Speed of one tight loop in 64-bit mode: twelve instructions, three of them with memory operands.
//!
//! `cargo run --release -p hypernest-cpu --example mips [MILLIONS]`

#[path = "../tests/support/mod.rs"]
mod support;

use iced_x86::code_asm::{
    CodeAssembler, dword_ptr, eax, ebx, ecx, esi, qword_ptr, rbp, rdi, rdx, rsi,
};
use support::{CODE, DATA, Nothing, machine};

/// The loop, never left.
fn code(at: u64) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64-bit code");
    let mut top = a.create_label();
    a.set_label(&mut top).expect("one label");
    let emit = |a: &mut CodeAssembler| -> Result<(), iced_x86::IcedError> {
        a.mov(eax, dword_ptr(rdi + rsi * 4))?;
        a.add(eax, ebx)?;
        a.xor(ebx, eax)?;
        a.mov(dword_ptr(rdi + rsi * 4), eax)?;
        a.inc(rsi)?;
        a.and(esi, 0xff)?;
        a.lea(rdx, qword_ptr(rdx + rsi * 8 + 3))?;
        a.shr(ebx, 1)?;
        a.add(qword_ptr(rbp), rdx)?;
        a.sub(ecx, 1)?;
        a.test(ecx, ecx)?;
        a.jne(top)?;
        a.jmp(top)
    };
    emit(&mut a).expect("the loop assembles");
    a.assemble(at).expect("the loop assembles")
}

fn main() {
    let (mut processor, mut ram) = machine(64, &code(CODE));
    let mut state = processor.read_state(0);
    state.gpr[7] = DATA;
    state.gpr[5] = DATA + 0x1000;
    processor.write_state(0, &state).expect("a valid state");
    let millions: u64 = std::env::args()
        .nth(1)
        .map_or(20, |n| n.parse().expect("a number"));
    for _ in 0..5 {
        let start = std::time::Instant::now();
        let until = processor.now() + millions * 1_000_000;
        let stop = processor.run(&mut ram, &mut Nothing, until);
        let seconds = start.elapsed().as_secs_f64();
        println!("{stop:?}: {:.0} MIPS", millions as f64 / seconds);
    }
}
