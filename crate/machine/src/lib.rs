//! The machine: a board with its memory and devices, and an engine that executes its processors.
//!
//! It knows nothing of host clocks, files or threads: time is the tick (one nanosecond of guest
//! time), and what goes in and out passes through [`Machine`]. The same input gives the same run,
//! on every host.
//!
//! ```
//! use hypernest_machine::{Machine, Stop, Until};
//!
//! // mov al, 'A'; mov dx, 3f8h; out dx, al; mov al, 21; out f4h, al
//! let code: &[u8] = &[0xb0, b'A', 0xba, 0xf8, 0x03, 0xee, 0xb0, 21, 0xe6, 0xf4];
//! let mut machine = Machine::builder().memory(1 << 20).image(code).raw().build()?;
//! assert_eq!(machine.run(&Until::end())?, Stop::Exit { value: 21 });
//! assert_eq!(machine.take_serial_output(), b"A");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `examples/` has a program for each part of the interface.

pub mod acpi;
mod board;
pub mod boot;
mod builder;
mod device;
pub mod devices;
mod diff;
mod dirty;
mod disks;
mod engine;
pub mod hash;
mod interrupts;
mod inventory;
pub mod layout;
mod machine;
mod mark;
mod observer;
mod regions;
mod state;
mod walk;

pub use board::{Board, BoardRestoreError, BoardState, StopRequest};
pub use builder::{BuildError, EngineMaker, MAX_MEMORY, MachineBuilder, SerialSink};
pub use device::{Claim, Device, DeviceAccess, DeviceContext, DeviceError};
pub use devices::virtio::DiskImage;
pub use diff::{Change, diff, fields};
pub use disks::DiskInfo;
pub use engine::{
    Capabilities, Clock, Engine, EngineConfig, EngineError, EngineStop, Owner, SoftwareEngine,
};
pub use hypernest_cpu as cpu;
pub use hypernest_cpu::{
    Answer, BlockPlace, Coverage, CoverageError, EntryFailure, Event, EventKinds, EventRequest,
    ExitReason, ExitRow, ExitStatistics, ExitStops, FailedEntry, Handling, Happening, Layout,
    LayoutRefused, Level, MAX_CPUS, Model, NestedRefused, NestedReport, Ram, Tick, Traced, Tracer,
    VcpuState, VmxChoice, VmxError, VmxLayouts, VmxProfile, VmxRefused, WhenFull,
};
pub use interrupts::{Interrupts, InterruptsState, Source};
pub use inventory::DeviceInfo;
pub use machine::{Machine, NotMapped, Stop, Until};
pub use mark::{Mark, MarkError};
pub use observer::{Access, AccessKind, AtBreakpoint, Flow, Observer};
pub use regions::RegionCount;
pub use state::{Config, MachineState, RestoreError, STATE_VERSION};
pub use walk::{Walk, WalkStep, walk, walk_at};
