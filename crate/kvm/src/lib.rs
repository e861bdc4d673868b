//! The same machine on /dev/kvm: a vCPU of the host's kernel behind the same board.
//!
//! Linux on x86-64 only; empty elsewhere. It knows the board as [`hypernest_cpu::Bus`] and hands
//! state over as [`hypernest_cpu::VcpuState`], so a machine can move between engines.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod convert;
mod vcpu;

pub use vcpu::{KvmError, KvmStop, KvmVcpu};
