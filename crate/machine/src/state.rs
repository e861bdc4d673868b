//! Saved machines: a type of its own, lossless, compared field by field. RAM is apart.

use hypernest_cpu::{Model, VcpuState, VmxChoice, VmxLayouts};
use serde::{Deserialize, Serialize};

use crate::board::{BoardRestoreError, BoardState};
use crate::engine::{Clock, EngineError};
use crate::hash;
use crate::machine::Machine;
use crate::regions;

/// Version of [`MachineState`]. Others are refused.
pub const STATE_VERSION: u32 = 2;

/// What a machine is built from, as far as it decides what the guest sees and how its state is
/// to be read. Images and devices are not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Name of the CPU model.
    pub model: String,
    /// What the real-time clock showed at tick 0, in seconds since 1970.
    pub epoch: u64,
    /// Which VMX there is.
    pub vmx: VmxChoice,
    /// Whether there is the Hyper-V interface.
    pub hyperv: bool,
    /// Which layouts its VMCS regions have.
    pub layouts: VmxLayouts,
}

impl Default for Config {
    /// 512 MiB, one vCPU of the first model, 2026-01-01 00:00 UTC.
    fn default() -> Config {
        Config {
            memory: 512 << 20,
            cpus: 1,
            model: Model::all()[0].name.to_owned(),
            epoch: 1_767_225_600,
            vmx: VmxChoice::None,
            hyperv: false,
            layouts: VmxLayouts::default(),
        }
    }
}

/// Everything a machine is between two instructions, but for its RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// What it was built from.
    pub config: Config,
    /// Machine time and turn.
    pub clock: Clock,
    /// Its vCPUs.
    pub vcpu: Vec<VcpuState>,
    /// Its devices.
    pub board: BoardState,
}

/// A saved state cannot be taken up. The machine is as before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// Made by another version.
    #[error("the saved state has version {found}; this build reads {STATE_VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// The machine is built otherwise.
    #[error(
        "the saved state is of a machine with another {what} ({saved}, here {here}); build one like it"
    )]
    Config {
        /// Which part differs.
        what: &'static str,
        /// In the saved state.
        saved: String,
        /// In this machine.
        here: String,
    },
    /// The board does not fit.
    #[error(transparent)]
    Board(#[from] BoardRestoreError),
    /// A vCPU does not fit.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Machine {
    /// The state now, to look at or to compare. To continue from it elsewhere, take that of
    /// [`Machine::save`].
    ///
    /// # Errors
    /// Only when the host behind the engine fails.
    pub fn state(&self) -> Result<MachineState, EngineError> {
        let vcpu = (0..self.engine.vcpus())
            .map(|vcpu| self.engine.read_state(vcpu))
            .collect::<Result<_, _>>()?;
        Ok(MachineState {
            version: STATE_VERSION,
            config: self.config.clone(),
            clock: self.engine.clock(),
            vcpu,
            board: self.board.state(),
        })
    }

    /// The state now, for a machine that continues from it: both this one and that one then do
    /// exactly the same.
    ///
    /// For that this machine forgets its cached translations, which guests can notice. So a save
    /// is an event of the run, and runs are equal when they are saved at the same ticks.
    ///
    /// # Errors
    /// Only when the host behind the engine fails.
    pub fn save(&mut self) -> Result<MachineState, EngineError> {
        self.flush();
        self.state()
    }

    /// Continues from a saved state. RAM must have been given its content before, through
    /// [`Machine::ram_mut`].
    ///
    /// # Errors
    /// When the state does not fit this machine, which is then as it was.
    pub fn restore(&mut self, saved: &MachineState) -> Result<(), RestoreError> {
        if saved.version != STATE_VERSION {
            let found = saved.version;
            return Err(RestoreError::Version { found });
        }
        let (theirs, ours) = (&saved.config, &self.config);
        let differing = [
            (
                "memory size",
                theirs.memory.to_string(),
                ours.memory.to_string(),
            ),
            (
                "number of vCPUs",
                theirs.cpus.to_string(),
                ours.cpus.to_string(),
            ),
            ("CPU model", theirs.model.clone(), ours.model.clone()),
            (
                "VMX",
                format!("{:?}", theirs.vmx),
                format!("{:?}", ours.vmx),
            ),
            (
                "Hyper-V interface",
                theirs.hyperv.to_string(),
                ours.hyperv.to_string(),
            ),
            (
                "number of vCPUs",
                saved.vcpu.len().to_string(),
                self.engine.vcpus().to_string(),
            ),
        ];
        if let Some((what, saved, here)) = differing.into_iter().find(|(_, a, b)| a != b) {
            return Err(RestoreError::Config { what, saved, here });
        }
        if theirs.layouts != ours.layouts {
            regions::fit(theirs, self.engine.vmx_profile())?;
        }
        let before = self.state()?;
        let outcome = self.take_up(saved);
        if outcome.is_err() {
            // What was read from this machine fits it.
            let back = self.take_up(&before);
            debug_assert!(back.is_ok(), "{back:?}");
        }
        self.flush();
        outcome
    }

    fn take_up(&mut self, state: &MachineState) -> Result<(), RestoreError> {
        for (vcpu, saved) in state.vcpu.iter().enumerate() {
            self.engine.write_state(vcpu, saved)?;
        }
        self.board.restore(&state.board)?;
        self.engine.set_clock(state.clock);
        self.config.epoch = state.config.epoch;
        Ok(())
    }

    /// A hash over the whole machine: state and RAM. Equal machines have equal hashes on every
    /// host; the cost is that of reading the RAM that is not empty.
    ///
    /// # Errors
    /// Only when the host behind the engine fails.
    pub fn state_hash(&self) -> Result<u64, EngineError> {
        Ok(self.state()?.hash(self.ram.bytes()))
    }
}

impl MachineState {
    /// Hash of this state with RAM of the given content.
    pub fn hash(&self, ram: &[u8]) -> u64 {
        hash::memory(self.hash_alone(), ram)
    }

    /// Hash of this state without RAM.
    pub(crate) fn hash_alone(&self) -> u64 {
        // Writing to memory fails for no saved type.
        let bytes = postcard::to_allocvec(self).unwrap_or_default();
        hash::bytes(0, &bytes)
    }
}
