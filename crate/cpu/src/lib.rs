//! The x86-64 processor: decode, execute, paging, exceptions, floating point, local APIC.
//!
//! It knows guest memory as [`Ram`] and everything outside as [`Bus`]. It reads no clock and no
//! random source: what it does is a function of its state and of what the bus answers.
#![no_std]

extern crate alloc;

mod apic;
mod block;
mod bus;
pub mod clock;
mod coverage;
mod debug;
mod descriptor;
mod exec;
mod flags;
mod float;
mod fpu;
mod hot;
mod hyperv;
mod interrupt;
mod lower;
mod mem;
mod model;
mod operand;
mod paging;
mod processor;
mod quiet;
mod ram;
mod save;
mod seg;
mod state;
#[cfg(test)]
mod testing;
mod tlb;
mod trap;
mod undo;
mod v86;
mod vcpu;
mod vmx;
mod watch;

pub use bus::{Bus, DeliveryMode, InterruptMessage, Tick};
pub use coverage::{BlockPlace, Coverage, CoverageError};
pub use exec::msr::{MsrSeen, msr_name, msrs};
pub use hypernest_vmcs::{ExitReason, Layout};
pub use hyperv::{HypervState, NestedGuestState, SyntheticTimerState, hyperv_leaves};
pub use model::{CpuidBit, Feature, Model};
pub use processor::{MAX_CPUS, Processor, ProcessorConfig, ProcessorError, Stop, Traced, Tracer};
pub use ram::{OutOfRam, PAGE_SIZE, Ram, RamError};
pub use save::StateError;
pub use state::{
    Activity, ApicState, FpuState, MsrState, PauseLoop, SegmentState, SegmentStates, TableState,
    VcpuState, VmxState,
};
pub use trap::Fault;
pub use vmx::{
    ActiveEnlightened, EnlightenedEntry, LayoutRefused, NestedRefused, NestedReport, VmxChoice,
    VmxError, VmxLayouts, VmxProfile, VmxRefused, vmx_abort_cause,
};
pub use watch::{
    Answer, EntryFailure, EptViolation, Event, EventKinds, EventRequest, ExitRow, ExitStatistics,
    ExitStops, FailedEntry, Handling, Happening, Injection, Level, VmEntry, VmExit, VmInstruction,
    WhenFull,
};
