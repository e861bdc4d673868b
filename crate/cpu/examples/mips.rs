//! Speed of one tight loop in 64-bit mode: twelve instructions, three of them with memory operands.
//!
//! `cargo run --release -p hypernest-cpu --example mips [MILLIONS]`

use hypernest_cpu::{Bus, InterruptMessage, Processor, ProcessorConfig, Ram, Tick, VcpuState};
use iced_x86::code_asm::{
    CodeAssembler, dword_ptr, eax, ebx, ecx, esi, qword_ptr, rbp, rdi, rdx, rsi,
};

/// A board with nothing on it.
struct Nothing;

impl Bus for Nothing {
    fn port_read(&mut self, _: &mut Ram, _: Tick, _: u16, _: u8) -> u32 {
        !0
    }
    fn port_write(&mut self, _: &mut Ram, _: Tick, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: &mut Ram, _: Tick, _: u64, _: u8) -> u64 {
        !0
    }
    fn mmio_write(&mut self, _: &mut Ram, _: Tick, _: u64, _: u8, _: u64) {}
    fn take_message(&mut self) -> Option<InterruptMessage> {
        None
    }
    fn end_of_interrupt(&mut self, _: Tick, _: u8) {}
    fn intr(&self) -> bool {
        false
    }
    fn acknowledge(&mut self, _: Tick) -> u8 {
        0
    }
    fn deadline(&self) -> Option<Tick> {
        None
    }
    fn advance(&mut self, _: &mut Ram, _: Tick) {}
    fn stop_requested(&self) -> bool {
        false
    }
}

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
    let mut ram = Ram::new(16 << 20).expect("16 MiB");
    // Identity map of the first GiB by one large page.
    ram.write(0x1000, &0x2003u64.to_le_bytes()).expect("RAM");
    ram.write(0x2000, &0x83u64.to_le_bytes()).expect("RAM");
    ram.write(0x10_0000, &code(0x10_0000)).expect("RAM");
    let config = ProcessorConfig::default();
    let mut processor = Processor::new(&config).expect("one vCPU");
    let mut state: VcpuState = processor.read_state(0);
    state.cr3 = 0x1000;
    state.cr0 = 0x8000_0033;
    state.cr4 = 0x620;
    state.msrs.efer = 0xd00;
    let flat = |rights| hypernest_cpu::SegmentState {
        selector: 8,
        base: 0,
        limit: !0,
        rights,
    };
    state.segments.cs = flat(0xa09b);
    state.segments.ss = flat(0xc093);
    state.rip = 0x10_0000;
    state.gpr[7] = 0x20_0000;
    state.gpr[5] = 0x30_0000;
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
    println!(
        "rip {:#x} rcx {:#x}",
        processor.read_state(0).rip,
        processor.read_state(0).gpr[1]
    );
}
