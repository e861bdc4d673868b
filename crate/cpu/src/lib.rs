//! The x86-64 processor: decode, execute, paging, exceptions, floating point, local APIC.
//!
//! It knows guest memory as [`Ram`] and everything outside as [`Bus`]. It reads no clock and no
//! random source: what it does is a function of its state and of what the bus answers.
#![no_std]

extern crate alloc;

mod bus;
mod ram;
mod state;

pub use bus::{Bus, DeliveryMode, InterruptMessage, Tick};
pub use ram::{OutOfRam, PAGE_SIZE, Ram, RamError};
pub use state::{
    Activity, ApicState, FpuState, MsrState, SegmentState, SegmentStates, TableState, VcpuState,
};
