//! A board with nothing on it and a vCPU in 64-bit mode, for tests of the processor alone.
#![allow(dead_code, reason = "each test uses its part")]

pub mod apic;
pub mod enlightened;
pub mod hypervisor;

use hypernest_cpu::{
    Bus, InterruptMessage, Processor, ProcessorConfig, Ram, SegmentState, Tick, VcpuState,
};

/// No devices: reads give all ones.
pub struct Nothing;

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

/// Where [`long_mode`] maps code from; all of the first 2 MiB is mapped one to one in 4 KiB pages.
pub const CODE: u64 = 0x1_0000;
/// Plain data pages.
pub const DATA: u64 = 0x2_0000;
/// An IDT whose every gate leads to a HLT.
const IDT: u64 = 0x8000;
const GDT: u64 = 0x9000;
/// The handlers: vector n is at this address + 16 n.
pub const HANDLERS: u64 = 0xa000;

/// RAM with page tables, IDT and GDT, and the state of a vCPU at CPL 0 in 64-bit mode at [`CODE`].
pub fn long_mode(processor: &Processor) -> (Ram, VcpuState) {
    let mut ram = Ram::new(2 << 20).unwrap();
    let mut put = |at: u64, value: u64| ram.write(at, &value.to_le_bytes()).unwrap();
    put(0x1000, 0x2007);
    put(0x2000, 0x3007);
    put(0x3000, 0x4007);
    for page in 0..512 {
        put(0x4000 + 8 * page, page << 12 | 7);
    }
    put(GDT + 8, 0x00af_9b00_0000_ffff);
    put(GDT + 16, 0x00cf_9300_0000_ffff);
    for vector in 0..256 {
        let handler = HANDLERS + 16 * vector;
        put(
            IDT + 16 * vector,
            (handler & 0xffff) | 8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48,
        );
        put(handler, 0xf4);
    }
    let mut state = processor.read_state(0);
    let flat = |selector, rights| SegmentState {
        selector,
        base: 0,
        limit: !0,
        rights,
    };
    state.segments.cs = flat(8, 0xa09b);
    for data in [
        &mut state.segments.ss,
        &mut state.segments.ds,
        &mut state.segments.es,
        &mut state.segments.fs,
        &mut state.segments.gs,
    ] {
        *data = flat(16, 0xc093);
    }
    state.gdtr.base = GDT;
    state.gdtr.limit = 23;
    state.idtr.base = IDT;
    state.idtr.limit = 0xfff;
    state.cr3 = 0x1000;
    state.cr0 = 0x8001_0033;
    state.cr4 = 0x620;
    state.msrs.efer = 0xd01;
    state.rip = CODE;
    state.gpr[4] = 0x7000;
    (ram, state)
}

/// One vCPU with blocks of `block_length`, in the state and RAM of [`long_mode`], with `code`.
pub fn machine(block_length: u32, code: &[u8]) -> (Processor, Ram) {
    let config = ProcessorConfig {
        block_length,
        ..ProcessorConfig::default()
    };
    let mut processor = Processor::new(&config).unwrap();
    let (mut ram, state) = long_mode(&processor);
    ram.write(CODE, code).unwrap();
    processor.write_state(0, &state).unwrap();
    (processor, ram)
}
