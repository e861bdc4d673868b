//! The machine: a board with its memory and devices, and an engine that executes its processors.
//!
//! It knows nothing of host clocks, files or threads: time is the tick, and what goes in and out
//! passes through [`Board`].

pub mod acpi;
mod board;
pub mod boot;
mod device;
pub mod devices;
mod interrupts;
pub mod layout;
mod observer;

pub use board::{Board, BoardRestoreError, BoardState, StopRequest};
pub use device::{Claim, Device, DeviceAccess, DeviceContext, DeviceError};
pub use hypernest_cpu as cpu;
pub use interrupts::{Interrupts, InterruptsState, Source};
pub use observer::{Access, AccessKind, AtBreakpoint, Flow, Observer};
