//! Engines: what executes the vCPUs of a machine.

use std::sync::Arc;

use hypernest_cpu::{
    Bus, Coverage, Event, EventRequest, ExitStatistics, ExitStops, FailedEntry, Model,
    NestedRefused, NestedReport, Processor, ProcessorConfig, ProcessorError, Ram, StateError,
    Stop as CpuStop, Tick, Tracer, VcpuState, VmxChoice, VmxError, VmxLayouts, VmxProfile,
};
use serde::{Deserialize, Serialize};

/// Who does a part of the machine that the processor and the board could both do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The engine, inside [`Engine::run`]; its state is in [`VcpuState`].
    Engine,
    /// The host behind the engine, with a will of its own (its clock runs on between runs).
    Host,
}

/// What an engine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Guests can use VMX.
    pub nested_vmx: bool,
    /// [`Engine::run`] stops at exactly the tick asked for, and a run can be repeated.
    pub exact_ticks: bool,
    /// Who emulates the local APICs.
    pub local_apic: Owner,
    /// Whose time the TSC and the APIC timers follow.
    pub clock: Owner,
    /// It can tell which pages the guest wrote ([`Ram::track_dirty`] while it runs).
    pub dirty_tracking: bool,
}

/// Machine time and what is left of the current vCPU's turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// Machine time.
    pub now: Tick,
    /// vCPU whose turn it is.
    pub vcpu: u32,
    /// Ticks left of its turn.
    pub left: Tick,
}

/// Why an engine returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EngineStop {
    /// The tick asked for is reached.
    Deadline,
    /// The board asked for it ([`Bus::stop_requested`]).
    Board,
    /// A triple fault.
    TripleFault {
        /// Which vCPU.
        vcpu: usize,
    },
    /// A VMX abort: a vCPU is shut down until a reset; the others can go on.
    VmxAbort {
        /// Which vCPU.
        vcpu: usize,
        /// Why: [`hypernest_cpu::vmx_abort_cause`] has it in words.
        indicator: u32,
    },
    /// The guest needs something this engine does not have.
    Unimplemented {
        /// Which vCPU.
        vcpu: usize,
        /// What it is.
        what: &'static str,
        /// RIP of the instruction.
        rip: u64,
    },
    /// The next instruction has a breakpoint.
    Breakpoint {
        /// Which vCPU.
        vcpu: usize,
        /// Linear address of the instruction.
        rip: u64,
    },
    /// Every vCPU waits, and nothing inside the machine will ever wake one.
    Idle,
    /// A VM exit that [`Engine::set_exit_stops`] named.
    VmExit {
        /// Which vCPU.
        vcpu: usize,
        /// Basic exit reason.
        reason: u16,
        /// Which exit of the machine's, from 1.
        number: u64,
    },
    /// A VM entry that failed, where [`Engine::set_exit_stops`] named that.
    EntryFailed {
        /// Which vCPU.
        vcpu: usize,
    },
    /// There is no room for further events.
    EventsFull,
}

/// An engine fails, or refuses what it was given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// More or fewer vCPUs than possible.
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    /// There is no such VMX.
    #[error(transparent)]
    Vmx(#[from] VmxError),
    /// A nested state that a vCPU does not take.
    #[error("vCPU {vcpu} cannot take the nested state: {error}")]
    Nested {
        /// Which vCPU.
        vcpu: usize,
        /// What is wrong with it.
        error: NestedRefused,
    },
    /// A vCPU state no processor can be in.
    #[error("vCPU {vcpu} cannot take the state: {error}")]
    State {
        /// Which vCPU.
        vcpu: usize,
        /// What is wrong with it.
        error: StateError,
    },
    /// No such vCPU.
    #[error("there is no vCPU {0}; they count from 0")]
    Vcpu(usize),
    /// The host behind the engine failed.
    #[error("{engine}: {what} failed: {why}")]
    Host {
        /// Name of the engine.
        engine: &'static str,
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        why: String,
    },
    /// It is asked for something that its [`Capabilities`] exclude.
    #[error("the {engine} engine has no {what}; use the software engine")]
    Missing {
        /// Name of the engine.
        engine: &'static str,
        /// What is missing.
        what: &'static str,
    },
}

/// What an engine is made from.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Number of vCPUs.
    pub cpus: u32,
    /// What CPUID lists.
    pub model: &'static Model,
    /// Most instructions that are decoded together, 1 to 64; 0 is the engine's choice. Changes
    /// speed and nothing else.
    pub block_length: u32,
    /// Which VMX there is.
    pub vmx: VmxChoice,
    /// Whether there is the Hyper-V interface.
    pub hyperv: bool,
    /// Which layouts its VMCS regions have.
    pub layouts: VmxLayouts,
}

/// Executes the vCPUs of a machine.
///
/// An engine owns the vCPUs, the local APICs and time. Everything else it reaches through the
/// [`Bus`] it is given, and it completes every access before [`Engine::run`] returns: between two
/// runs no instruction is half done, and [`VcpuState`] is the whole truth about a vCPU.
pub trait Engine: Send {
    /// Its name, one word.
    fn name(&self) -> &'static str;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Number of vCPUs.
    fn vcpus(&self) -> usize;

    /// Runs until tick `until` or until something stops it first. Idle time is skipped, not
    /// waited for, where the engine owns the clock.
    fn run(
        &mut self,
        ram: &mut Ram,
        bus: &mut dyn Bus,
        until: Tick,
    ) -> Result<EngineStop, EngineError>;

    /// Machine time and turn.
    fn clock(&self) -> Clock;

    /// Continues from a saved time and turn.
    fn set_clock(&mut self, clock: Clock);

    /// Instructions executed so far, where the engine counts them.
    fn instructions(&self) -> Option<u64>;

    /// Those of one vCPU, where the engine counts them.
    fn vcpu_instructions(&self, vcpu: usize) -> Option<u64> {
        let _ = vcpu;
        None
    }

    /// While every vCPU waits: the tick of the next event that may end it, [`Tick::MAX`] where only
    /// input can. `None` while a vCPU can run, and where the engine does not know.
    fn waits_until(&self, bus: &dyn Bus) -> Option<Tick> {
        let _ = bus;
        None
    }

    /// State of a vCPU.
    fn read_state(&self, vcpu: usize) -> Result<VcpuState, EngineError>;

    /// Replaces the state of a vCPU; changes nothing on an error.
    fn write_state(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError>;

    /// Replaces the registers of a vCPU and leaves its VMX operation as it is; changes nothing on an error.
    fn write_registers(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError> {
        self.write_state(vcpu, state)
    }

    /// What its VMX offers, and the layouts of VMCS regions. `None` where guests have no VMX.
    fn vmx_profile(&self) -> Option<&VmxProfile> {
        None
    }

    /// VMX operation of a vCPU, in the bytes of `struct kvm_nested_state`.
    fn nested_state(&mut self, vcpu: usize, ram: &Ram) -> Result<Vec<u8>, EngineError> {
        let _ = (vcpu, ram);
        Err(EngineError::Missing {
            engine: self.name(),
            what: "nested state",
        })
    }

    /// Replaces it; changes nothing on an error.
    fn set_nested_state(
        &mut self,
        vcpu: usize,
        ram: &mut Ram,
        bytes: &[u8],
    ) -> Result<NestedReport, EngineError> {
        let _ = (vcpu, ram, bytes);
        Err(EngineError::Missing {
            engine: self.name(),
            what: "nested state",
        })
    }

    /// Replaces the linear addresses whose execution stops [`Engine::run`].
    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError>;

    /// Calls `tracer` before every instruction; `None` ends it.
    fn set_tracer(&mut self, tracer: Option<Tracer>) -> Result<(), EngineError> {
        let _ = tracer;
        Err(EngineError::Missing {
            engine: self.name(),
            what: "instruction trace",
        })
    }

    /// Asks for events of VMX.
    fn request_events(&mut self, request: &EventRequest) -> Result<(), EngineError> {
        let _ = request;
        Err(EngineError::Missing {
            engine: self.name(),
            what: "VMX events",
        })
    }

    /// The events since this was last asked, oldest first.
    fn take_events(&mut self) -> Vec<Event> {
        Vec::new()
    }

    /// Events that found no room.
    fn lost_events(&self) -> u64 {
        0
    }

    /// Replaces the VM exits that stop [`Engine::run`].
    fn set_exit_stops(&mut self, stops: &ExitStops) -> Result<(), EngineError> {
        let _ = stops;
        Err(EngineError::Missing {
            engine: self.name(),
            what: "stops at VM exits",
        })
    }

    /// Counters of VM exits, where the engine counts them.
    fn exit_statistics(&self) -> Option<&ExitStatistics> {
        None
    }

    /// The latest VM entries that failed, oldest first, where the engine notes them.
    fn failed_entries(&self) -> &[FailedEntry] {
        &[]
    }

    /// Forgets cached translations and decoded code: RAM was changed by other means than
    /// [`Ram::write`], or a state was saved that others continue from.
    fn flush(&mut self, ram: &mut Ram);

    /// As [`Engine::flush`], where RAM was changed in no other ways than those of [`Ram`]: what does not depend
    /// on the run before may stay.
    fn rewind(&mut self, ram: &mut Ram) {
        self.flush(ram);
    }

    /// Notes the blocks that are executed from now on, or ends that. What was noted before is given back.
    fn set_coverage(
        &mut self,
        ram: &mut Ram,
        coverage: Option<Coverage>,
    ) -> Result<Option<Coverage>, EngineError> {
        let _ = (ram, coverage);
        Err(missing(self.name(), "record of executed blocks"))
    }

    /// What is noted of the blocks that are executed.
    fn coverage(&mut self) -> Option<&mut Coverage> {
        None
    }
}

/// What an engine answers that lacks something.
pub(crate) fn missing(engine: &'static str, what: &'static str) -> EngineError {
    EngineError::Missing { engine, what }
}

/// The processor of `hypernest-cpu` as an engine: exact, repeatable, everywhere.
pub struct SoftwareEngine {
    processor: Processor,
    vmx: Option<Arc<VmxProfile>>,
}

impl SoftwareEngine {
    /// All vCPUs in reset state.
    pub fn new(config: &EngineConfig) -> Result<SoftwareEngine, EngineError> {
        let vmx = config.vmx.profile_with(config.model, &config.layouts)?;
        let vmx = vmx.map(|profile| match config.hyperv {
            true => Arc::new(profile.enlightened()),
            false => profile,
        });
        let mut settings = ProcessorConfig {
            cpus: config.cpus,
            model: config.model,
            vmx: vmx.clone(),
            hyperv: config.hyperv,
            ..ProcessorConfig::default()
        };
        if config.block_length != 0 {
            settings.block_length = config.block_length;
        }
        Ok(SoftwareEngine {
            processor: Processor::new(&settings)?,
            vmx,
        })
    }

    fn check(&self, vcpu: usize) -> Result<(), EngineError> {
        if vcpu < self.processor.vcpus() {
            Ok(())
        } else {
            Err(EngineError::Vcpu(vcpu))
        }
    }
}

impl Engine for SoftwareEngine {
    fn name(&self) -> &'static str {
        "software"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            nested_vmx: false,
            exact_ticks: true,
            local_apic: Owner::Engine,
            clock: Owner::Engine,
            dirty_tracking: true,
        }
    }

    fn vcpus(&self) -> usize {
        self.processor.vcpus()
    }

    fn run(
        &mut self,
        ram: &mut Ram,
        bus: &mut dyn Bus,
        until: Tick,
    ) -> Result<EngineStop, EngineError> {
        Ok(match self.processor.run(ram, bus, until) {
            CpuStop::Deadline => EngineStop::Deadline,
            CpuStop::Board => EngineStop::Board,
            CpuStop::Shutdown { vcpu } => EngineStop::TripleFault { vcpu },
            CpuStop::VmxAbort { vcpu, indicator } => EngineStop::VmxAbort { vcpu, indicator },
            CpuStop::Unimplemented { vcpu, what, rip } => {
                EngineStop::Unimplemented { vcpu, what, rip }
            }
            CpuStop::Breakpoint { vcpu, rip } => EngineStop::Breakpoint { vcpu, rip },
            CpuStop::Idle => EngineStop::Idle,
            CpuStop::VmExit {
                vcpu,
                reason,
                number,
            } => EngineStop::VmExit {
                vcpu,
                reason: reason.0,
                number,
            },
            CpuStop::EntryFailed { vcpu } => EngineStop::EntryFailed { vcpu },
            CpuStop::EventsFull => EngineStop::EventsFull,
            other => {
                return Err(EngineError::Host {
                    engine: self.name(),
                    what: "run",
                    why: format!("it stopped for a reason this machine does not know: {other:?}"),
                });
            }
        })
    }

    fn clock(&self) -> Clock {
        let (vcpu, left) = self.processor.turn();
        Clock {
            now: self.processor.now(),
            vcpu: vcpu as u32,
            left,
        }
    }

    fn set_clock(&mut self, clock: Clock) {
        self.processor
            .set_time(clock.now, (clock.vcpu as usize, clock.left));
    }

    fn instructions(&self) -> Option<u64> {
        Some(self.processor.instructions())
    }

    fn vcpu_instructions(&self, vcpu: usize) -> Option<u64> {
        Some(self.processor.vcpu_instructions(vcpu))
    }

    fn waits_until(&self, bus: &dyn Bus) -> Option<Tick> {
        self.processor.waits_until(bus)
    }

    fn read_state(&self, vcpu: usize) -> Result<VcpuState, EngineError> {
        self.check(vcpu)?;
        Ok(self.processor.read_state(vcpu))
    }

    fn write_state(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError> {
        self.check(vcpu)?;
        self.processor
            .write_state(vcpu, state)
            .map_err(|error| EngineError::State { vcpu, error })
    }

    fn write_registers(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError> {
        self.check(vcpu)?;
        self.processor
            .write_registers(vcpu, state)
            .map_err(|error| EngineError::State { vcpu, error })
    }

    fn vmx_profile(&self) -> Option<&VmxProfile> {
        self.vmx.as_deref()
    }

    fn nested_state(&mut self, vcpu: usize, ram: &Ram) -> Result<Vec<u8>, EngineError> {
        self.check(vcpu)?;
        Ok(self.processor.nested_state(vcpu, ram).to_bytes())
    }

    fn set_nested_state(
        &mut self,
        vcpu: usize,
        ram: &mut Ram,
        bytes: &[u8],
    ) -> Result<NestedReport, EngineError> {
        self.check(vcpu)?;
        self.processor
            .set_nested_state(vcpu, ram, bytes)
            .map_err(|error| EngineError::Nested { vcpu, error })
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        self.processor.set_breakpoints(addresses);
        Ok(())
    }

    fn set_tracer(&mut self, tracer: Option<Tracer>) -> Result<(), EngineError> {
        self.processor.set_tracer(tracer);
        Ok(())
    }

    fn request_events(&mut self, request: &EventRequest) -> Result<(), EngineError> {
        Ok(self.processor.request_events(request)?)
    }

    fn take_events(&mut self) -> Vec<Event> {
        self.processor.take_events()
    }

    fn lost_events(&self) -> u64 {
        self.processor.lost_events()
    }

    fn set_exit_stops(&mut self, stops: &ExitStops) -> Result<(), EngineError> {
        self.processor.set_exit_stops(stops);
        Ok(())
    }

    fn exit_statistics(&self) -> Option<&ExitStatistics> {
        self.processor.exit_statistics()
    }

    fn failed_entries(&self) -> &[FailedEntry] {
        self.processor.failed_entries()
    }

    fn flush(&mut self, ram: &mut Ram) {
        self.processor.flush(ram);
    }

    fn rewind(&mut self, ram: &mut Ram) {
        self.processor.rewind(ram);
    }

    fn set_coverage(
        &mut self,
        ram: &mut Ram,
        coverage: Option<Coverage>,
    ) -> Result<Option<Coverage>, EngineError> {
        Ok(self.processor.set_coverage(ram, coverage))
    }

    fn coverage(&mut self) -> Option<&mut Coverage> {
        self.processor.coverage()
    }
}
