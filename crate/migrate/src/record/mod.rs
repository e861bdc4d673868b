//! Recordings: a machine at its start, and everything that came to it, so that its run can be made again.
//!
//! A run of the software engine is a function of where it started and of its input. A [`Recorder`] writes both: a snapshot,
//! then each input with the moment at which it came. Every so often it saves the machine and writes down its hash: a
//! *keyframe*. Guests can notice a save, so it is an event of the run as an input is. A [`Replay`] makes the run again,
//! compares hashes at keyframes, and goes to any moment of it, forwards and backwards.
//!
//! ```text
//! file  a file of sections of kind "recording", with the section "recording" alone
//!       a snapshot, whole
//!       sections "input", "keyframe" as they come, at the end "stop" and "end"
//! ```
//!
//! A recording that was cut is good up to its last whole section.

mod frames;
mod log;
mod recorder;
mod replay;

use hypernest_machine::{EngineError, Machine, Tick, Until, VcpuState};
use serde::{Deserialize, Serialize};

pub use frames::FrameCounts;
pub use log::{Entry, Event, Log, LogError, MOST_LOG};
pub use recorder::{RecordError, Recorder, begin};
pub use replay::{Replay, ReplayError};

/// Instructions between two keyframes, unless told otherwise: what a step back takes at most to run again.
pub const KEYFRAME_EVERY: u64 = 32_000_000;

/// A moment of a run.
///
/// Between two ticks there may be several: events are taken without a tick of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Machine time.
    pub tick: Tick,
    /// VM exits since the start of the recording.
    pub exits: u64,
    /// Where the machine stood at a breakpoint: the linear address of the next instruction, before which events
    /// have been taken.
    pub breakpoint: Option<u64>,
}

/// What comes to a machine from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// Bytes typed at the serial port.
    Serial(Vec<u8>),
    /// Bytes typed at the virtio consoles.
    Console(Vec<u8>),
    /// The power button.
    PowerButton,
    /// A debugger writes guest-physical memory.
    Memory {
        /// Where.
        address: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// A debugger writes the registers of a vCPU.
    Registers {
        /// Which vCPU.
        vcpu: u32,
        /// All of them.
        state: Box<VcpuState>,
    },
}

/// An input that the machine refuses. It is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InputError {
    /// Memory that is none.
    #[error(transparent)]
    Memory(#[from] hypernest_cpu::OutOfRam),
    /// Registers that no vCPU can have.
    #[error(transparent)]
    Registers(#[from] EngineError),
}

impl Input {
    /// Gives it to a machine.
    ///
    /// # Errors
    /// When it is none for this machine, which is then as it was.
    pub fn apply(&self, machine: &mut Machine) -> Result<(), InputError> {
        match self {
            Input::Serial(bytes) => machine.serial_input(bytes),
            Input::Console(bytes) => machine.console_input(bytes),
            Input::PowerButton => machine.press_power_button(),
            Input::Memory { address, bytes } => machine.poke_physical(*address, bytes)?,
            Input::Registers { vcpu, state } => machine.write_vcpu(*vcpu as usize, state)?,
        }
        Ok(())
    }
}

/// Lets everything happen that is due now, so that what comes now comes after it.
fn settle(machine: &mut Machine) -> Result<(), EngineError> {
    machine.run(&Until::tick(machine.now()))?;
    Ok(())
}

/// Counters of a machine, which go on counting when it goes back, as those of the run.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    /// Of the machine.
    machine: u64,
    /// Of the run, at the same moment.
    run: u64,
}

impl Counted {
    /// Of the run, where that of the machine is `machine`.
    fn now(self, machine: u64) -> u64 {
        self.run
            .saturating_add(machine.saturating_sub(self.machine))
    }

    /// Of the machine, where that of the run is `run`.
    fn of_machine(self, run: u64) -> u64 {
        self.machine.saturating_add(run.saturating_sub(self.run))
    }
}

fn exits(machine: &Machine) -> u64 {
    machine.exit_statistics().map_or(0, |counts| counts.exits())
}

fn instructions(machine: &Machine) -> u64 {
    machine.instructions().unwrap_or(0)
}
