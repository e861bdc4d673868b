//! The same machine on /dev/kvm: a vCPU of the host's kernel behind the same board.
//!
//! Linux on x86-64 only; empty elsewhere. It knows the board as [`hypernest_cpu::Bus`] and hands
//! state over as [`hypernest_cpu::VcpuState`], so a machine can move between engines.
//!
//! What it is for so far: to hold the [`hypernest_machine::Engine`] trait to something that is not the
//! software processor. One vCPU, no local APIC, so no interrupts; guests poll.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod convert;
mod engine;

pub use engine::KvmEngine;
