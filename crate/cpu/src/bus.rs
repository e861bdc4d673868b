//! What the processor sees of the world outside it: ports, memory-mapped devices, interrupt wires.

use crate::Ram;

/// Machine time: retired instructions of all vCPUs plus skipped idle time. One tick is one
/// nanosecond of guest time and one TSC count at the base rate.
pub type Tick = u64;

/// How an interrupt message is to be taken (Vol. 3A, "Local Vector Table", delivery mode).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector in the message.
    Fixed,
    /// The vector in the message, to the one processor with the lowest priority.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up: the vector is the page number of the entry point.
    StartUp,
    /// The vector comes from the 8259 by an acknowledge cycle.
    ExtInt,
}

/// A message to local APICs, from an I/O APIC, a message-signalled interrupt or another local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMessage {
    /// APIC id (physical) or logical destination; 0xff (xAPIC) or 0xffff_ffff (x2APIC) is everyone.
    pub destination: u32,
    /// `destination` is a logical one.
    pub logical: bool,
    /// How the target takes it.
    pub delivery: DeliveryMode,
    /// Interrupt vector; ignored by NMI, SMI, INIT and ExtINT.
    pub vector: u8,
    /// Level-triggered: an EOI is broadcast when it has been handled.
    pub level_triggered: bool,
}

/// The board as the processor reaches it. Accesses that nobody answers read all ones and swallow
/// writes. Every call carries `now`, so that devices need no clock of their own.
pub trait Bus {
    /// IN of `width` bytes (1, 2 or 4). Bits above `width` are ignored.
    fn port_read(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8) -> u32;
    /// OUT of `width` bytes (1, 2 or 4). Bits of `value` above `width` are zero.
    fn port_write(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8, value: u32);
    /// A load of `width` bytes (1, 2, 4 or 8) from guest-physical memory that is not RAM.
    fn mmio_read(&mut self, ram: &mut Ram, now: Tick, address: u64, width: u8) -> u64;
    /// A store of `width` bytes (1, 2, 4 or 8) to guest-physical memory that is not RAM.
    fn mmio_write(&mut self, ram: &mut Ram, now: Tick, address: u64, width: u8, value: u64);

    /// The next interrupt message the board wants delivered, oldest first.
    fn take_message(&mut self) -> Option<InterruptMessage>;
    /// A local APIC broadcast the end of a level-triggered interrupt.
    fn end_of_interrupt(&mut self, now: Tick, vector: u8);
    /// Level of the 8259's INTR output (wired to LINT0 of the boot processor).
    fn intr(&self) -> bool;
    /// Interrupt acknowledge cycle: the 8259 gives its vector.
    fn acknowledge(&mut self, now: Tick) -> u8;

    /// The next tick at which a device has something to do by itself.
    fn deadline(&self) -> Option<Tick>;
    /// Let devices do what is due at or before `now`.
    fn advance(&mut self, ram: &mut Ram, now: Tick);
    /// The board wants the engine to return: power off, reset, debug exit, a match on serial.
    fn stop_requested(&self) -> bool;
}
