//! Guests that need nothing fetched: multiboot kernels of a few kilobytes, assembled when this crate
//! is built. They know a PC, and nothing of the machine that runs them.
//!
//! The sources are in `build/`: `hypervisor.rs` and what it is made of, `greeting.rs`.
#![no_std]
#![forbid(unsafe_code)]

/// A hypervisor in 64-bit mode with extended page tables, and its guest, which leaves it in fifteen
/// ways. It prints on the serial port what it reads from its VMCS at each VM exit, and what it does,
/// and powers the machine off. It needs VMX.
pub const HYPERVISOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hypervisor.elf"));

/// Memory for [`HYPERVISOR`], in bytes.
pub const HYPERVISOR_MEMORY: u64 = 16 << 20;

/// A guest that greets, counts primes, and echoes what is typed in capitals. It sleeps when nobody
/// types; Ctrl-D resets it.
pub const GREETING: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/greeting.elf"));
