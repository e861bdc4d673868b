//! The machine: RAM, board and engine together, and everything one can do with them.

use std::sync::Arc;

use hypernest_cpu::{
    Coverage, Event, EventRequest, ExitReason, ExitStatistics, ExitStops, FailedEntry, Level,
    OutOfRam, Ram, Tick, Tracer, VcpuState,
};
use serde::{Deserialize, Serialize};

use crate::board::{Board, Pause, StopRequest};
use crate::builder::MachineBuilder;
use crate::dirty::Dirty;
use crate::engine::{Capabilities, Engine, EngineError, EngineStop};
use crate::observer::{AtBreakpoint, Flow, Observer};
use crate::state::Config;
use crate::walk::{Walk, walk, walk_at};

/// When [`Machine::run`] is to return, if nothing else stops the machine first. Conditions add up:
/// the first that is met counts.
///
/// ```
/// use hypernest_machine::Until;
/// let until = Until::tick(5_000_000_000).text("login: ").breakpoint(0xffff_ffff_8100_0000);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Until {
    pub(crate) tick: Option<Tick>,
    pub(crate) texts: Vec<Vec<u8>>,
    pub(crate) breakpoints: Vec<u64>,
    pub(crate) exits: ExitStops,
}

impl Until {
    /// No condition: until the guest ends its run.
    pub fn end() -> Until {
        Until::default()
    }

    /// Until machine time reaches `tick`.
    pub fn tick(tick: Tick) -> Until {
        Until {
            tick: Some(tick),
            ..Until::default()
        }
    }

    /// Also when serial output ends in `text`. Its bytes may come in several runs. An empty text
    /// is never seen.
    pub fn text(mut self, text: &str) -> Until {
        self.texts.push(text.as_bytes().to_vec());
        self
    }

    /// Also before the instruction at linear address `rip` is executed.
    pub fn breakpoint(mut self, rip: u64) -> Until {
        self.breakpoints.push(rip);
        self
    }

    /// Also after a VM exit for this reason. The vCPU stands before L1's first instruction after it.
    pub fn vm_exit(mut self, reason: ExitReason) -> Until {
        self.exits.reasons.push(reason);
        self
    }

    /// Also after the machine's VM exit of this number, counted from 1.
    pub fn vm_exit_number(mut self, number: u64) -> Until {
        self.exits.number = Some(number);
        self
    }

    /// Also after a VM entry that failed; [`Machine::failed_entries`] says why.
    pub fn failed_entry(mut self) -> Until {
        self.exits.failed_entry = true;
        self
    }
}

/// Why [`Machine::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Stop {
    /// The tick asked for is reached.
    Tick,
    /// Serial output ended in one of the texts asked for.
    Text {
        /// Which of them, in the order they were given.
        index: usize,
    },
    /// The next instruction has a breakpoint.
    Breakpoint {
        /// Which vCPU.
        vcpu: usize,
        /// Linear address of the instruction.
        rip: u64,
    },
    /// An observer asked for it.
    Observer,
    /// The guest switched the machine off.
    PoweredOff,
    /// The guest reset the machine.
    Reset,
    /// The guest wrote to the exit port (F4H).
    Exit {
        /// What it wrote. Test programs are told apart by `value * 2 + 1`.
        value: u32,
    },
    /// A triple fault: on a PC, a reset.
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
    /// The guest needs something that is not built.
    Unimplemented {
        /// Which vCPU.
        vcpu: usize,
        /// What it is.
        what: String,
        /// RIP of the instruction.
        rip: u64,
    },
    /// Every vCPU waits, and nothing inside the machine will ever wake one. Input may.
    Idle,
    /// A VM exit that was asked for. L1 is about to execute its first instruction after it.
    VmExit {
        /// Which vCPU.
        vcpu: usize,
        /// Basic exit reason.
        reason: u16,
        /// Which exit of the machine's, from 1.
        number: u64,
    },
    /// A VM entry failed.
    EntryFailed {
        /// Which vCPU.
        vcpu: usize,
    },
    /// There is no room for further events: [`Machine::take_events`] makes some.
    EventsFull,
}

impl Stop {
    /// Whether the guest has ended its run: to go on would give the same stop again.
    pub fn is_end(&self) -> bool {
        matches!(
            self,
            Stop::PoweredOff
                | Stop::Reset
                | Stop::Exit { .. }
                | Stop::TripleFault { .. }
                | Stop::Unimplemented { .. }
        )
    }

    /// One stable word, for programs.
    pub fn word(&self) -> &'static str {
        match self {
            Stop::Tick => "tick",
            Stop::Text { .. } => "text",
            Stop::Breakpoint { .. } => "breakpoint",
            Stop::Observer => "observer",
            Stop::PoweredOff => "power-off",
            Stop::Reset => "reset",
            Stop::Exit { .. } => "exit",
            Stop::TripleFault { .. } => "triple-fault",
            Stop::VmxAbort { .. } => "vmx-abort",
            Stop::Unimplemented { .. } => "unimplemented",
            Stop::Idle => "idle",
            Stop::VmExit { .. } => "vm-exit",
            Stop::EntryFailed { .. } => "entry-failed",
            Stop::EventsFull => "events-full",
        }
    }
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stop::Tick => f.write_str("the tick asked for is reached"),
            Stop::Text { .. } => f.write_str("the text asked for was seen"),
            Stop::Breakpoint { vcpu, rip } => write!(f, "breakpoint at {rip:#x} on vCPU {vcpu}"),
            Stop::Observer => f.write_str("an observer stopped the machine"),
            Stop::PoweredOff => f.write_str("the guest powered off"),
            Stop::Reset => f.write_str("the guest reset the machine"),
            Stop::Exit { value } => write!(f, "the guest wrote {value:#x} to the exit port"),
            Stop::TripleFault { vcpu } => write!(f, "triple fault on vCPU {vcpu}"),
            Stop::VmxAbort { vcpu, indicator } => {
                let cause = hypernest_cpu::vmx_abort_cause(*indicator);
                write!(f, "VMX abort {indicator} on vCPU {vcpu}: {cause}")
            }
            Stop::Unimplemented { vcpu, what, rip } => {
                write!(f, "not implemented: {what}, at {rip:#x} on vCPU {vcpu}")
            }
            Stop::Idle => f.write_str("every vCPU waits and nothing will wake one"),
            Stop::VmExit {
                vcpu,
                reason,
                number,
            } => {
                let name = ExitReason(*reason).ident();
                write!(f, "VM exit {number}, {name}, on vCPU {vcpu}")
            }
            Stop::EntryFailed { vcpu } => write!(f, "a VM entry failed on vCPU {vcpu}"),
            Stop::EventsFull => f.write_str("there is no room for further events"),
        }
    }
}

/// A guest-virtual range is not all mapped to RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest-virtual address {address:#x} is not mapped to RAM on vCPU {vcpu}")]
pub struct NotMapped {
    /// First address that is not.
    pub address: u64,
    /// Whose address space.
    pub vcpu: usize,
}

/// A machine. [`Machine::builder`] makes one.
pub struct Machine {
    pub(crate) config: Config,
    pub(crate) ram: Ram,
    pub(crate) board: Board,
    pub(crate) engine: Box<dyn Engine>,
    /// Breakpoints that stay.
    pub(crate) breakpoints: Vec<u64>,
    /// What the engine was last told.
    pub(crate) armed: Vec<u64>,
    pub(crate) armed_exits: ExitStops,
    pub(crate) boot: Option<String>,
    pub(crate) dirty: Dirty,
    pub(crate) flushes: u64,
    /// The mark to go back to: the same as in the [`crate::Mark`].
    pub(crate) mark: Option<Arc<()>>,
}

impl Machine {
    /// Begins a machine.
    pub fn builder<'a>() -> MachineBuilder<'a> {
        MachineBuilder::default()
    }

    // ---- running ----

    /// Runs until one of the conditions is met or something stops the machine.
    ///
    /// # Errors
    /// Only when the host behind the engine fails; the software engine never does.
    pub fn run(&mut self, until: &Until) -> Result<Stop, EngineError> {
        self.board.watch(&until.texts);
        self.arm(&until.breakpoints)?;
        if until.exits != self.armed_exits {
            self.engine.set_exit_stops(&until.exits)?;
            self.armed_exits = until.exits.clone();
        }
        let end = until.tick.unwrap_or(Tick::MAX);
        loop {
            if let Some(request) = self.board.ended {
                return Ok(match request {
                    StopRequest::PowerOff => Stop::PoweredOff,
                    StopRequest::Reset => Stop::Reset,
                    StopRequest::Exit(value) => Stop::Exit { value },
                    StopRequest::TripleFault(vcpu) => Stop::TripleFault {
                        vcpu: vcpu as usize,
                    },
                });
            }
            let stop = self.engine.run(&mut self.ram, &mut self.board, end)?;
            match self.board.pause.take() {
                Some(Pause::Text(index)) => return Ok(Stop::Text { index }),
                Some(Pause::Observer) => return Ok(Stop::Observer),
                None => {}
            }
            return Ok(match stop {
                EngineStop::Board => continue,
                EngineStop::Deadline => Stop::Tick,
                EngineStop::TripleFault { vcpu } => {
                    self.board.ended = Some(StopRequest::TripleFault(vcpu as u32));
                    continue;
                }
                EngineStop::VmxAbort { vcpu, indicator } => Stop::VmxAbort { vcpu, indicator },
                EngineStop::Unimplemented { vcpu, what, rip } => Stop::Unimplemented {
                    vcpu,
                    what: what.to_owned(),
                    rip,
                },
                EngineStop::Breakpoint { vcpu, rip } => {
                    let flow = self.ask_observers(vcpu)?;
                    if flow == Flow::Continue && !until.breakpoints.contains(&rip) {
                        continue;
                    }
                    Stop::Breakpoint { vcpu, rip }
                }
                EngineStop::Idle => Stop::Idle,
                EngineStop::VmExit {
                    vcpu,
                    reason,
                    number,
                } => Stop::VmExit {
                    vcpu,
                    reason,
                    number,
                },
                EngineStop::EntryFailed { vcpu } => Stop::EntryFailed { vcpu },
                EngineStop::EventsFull => Stop::EventsFull,
            });
        }
    }

    /// Tells the engine all breakpoints, where they have changed.
    fn arm(&mut self, more: &[u64]) -> Result<(), EngineError> {
        let mut all = self.breakpoints.clone();
        all.extend(more);
        all.sort_unstable();
        all.dedup();
        if all != self.armed {
            self.engine.set_breakpoints(&all)?;
            self.armed = all;
        }
        Ok(())
    }

    /// Shows a vCPU at a breakpoint to every observer.
    fn ask_observers(&mut self, vcpu: usize) -> Result<Flow, EngineError> {
        if self.board.observers.is_empty() {
            return Ok(Flow::Stop);
        }
        let before = self.engine.read_state(vcpu)?;
        let mut state = before.clone();
        let now = self.now();
        let ram = &mut self.ram;
        let answers: Vec<Flow> = self
            .board
            .observers
            .iter_mut()
            .filter_map(|observer| {
                observer.breakpoint(&mut AtBreakpoint {
                    now,
                    vcpu,
                    state: &mut state,
                    ram,
                })
            })
            .collect();
        if state != before {
            self.engine.write_state(vcpu, &state)?;
        }
        let goes_on = !answers.is_empty() && !answers.contains(&Flow::Stop);
        Ok(if goes_on { Flow::Continue } else { Flow::Stop })
    }

    /// Machine time.
    pub fn now(&self) -> Tick {
        self.engine.clock().now
    }

    /// Instructions executed since the machine was built, where the engine counts them.
    pub fn instructions(&self) -> Option<u64> {
        self.engine.instructions()
    }

    /// Instructions that one vCPU has executed since the machine was built, where the engine counts
    /// them.
    pub fn vcpu_instructions(&self, vcpu: usize) -> Option<u64> {
        self.engine.vcpu_instructions(vcpu)
    }

    /// While every vCPU waits: the tick of the next event that may end it, [`Tick::MAX`] where only
    /// input can. `None` while a vCPU can run, and where the engine does not know. For callers that
    /// pace guest time, after [`Machine::run`] returned [`Stop::Tick`].
    pub fn waits_until(&self) -> Option<Tick> {
        self.engine.waits_until(&self.board)
    }

    /// Sets a breakpoint at a linear address, for all vCPUs, until it is cleared.
    pub fn set_breakpoint(&mut self, rip: u64) {
        self.breakpoints.push(rip);
    }

    /// Clears a breakpoint. True when there was one.
    pub fn clear_breakpoint(&mut self, rip: u64) -> bool {
        let count = self.breakpoints.len();
        self.breakpoints.retain(|&address| address != rip);
        self.breakpoints.len() < count
    }

    /// Adds an observer.
    pub fn add_observer(&mut self, observer: Box<dyn Observer>) {
        self.board.observers.push(observer);
    }

    /// Removes all observers and gives them back.
    pub fn take_observers(&mut self) -> Vec<Box<dyn Observer>> {
        std::mem::take(&mut self.board.observers)
    }

    /// Calls `tracer` before every instruction; `None` ends it.
    ///
    /// # Errors
    /// When the engine cannot trace.
    pub fn set_tracer(&mut self, tracer: Option<Tracer>) -> Result<(), EngineError> {
        self.engine.set_tracer(tracer)
    }

    /// Notes the blocks that are executed from now on, or ends that; what was noted before is given back.
    /// The run does not change by it, but its speed: every block is looked up.
    ///
    /// # Errors
    /// When the engine cannot.
    pub fn set_coverage(
        &mut self,
        coverage: Option<Coverage>,
    ) -> Result<Option<Coverage>, EngineError> {
        self.engine.set_coverage(&mut self.ram, coverage)
    }

    /// What is noted of the blocks that are executed, to look at or to clear.
    pub fn coverage(&mut self) -> Option<&mut Coverage> {
        self.engine.coverage()
    }

    // ---- VMX ----

    /// Asks for events of VMX; what was kept of an earlier request is dropped. Events change no
    /// result, and are no part of the machine's state.
    ///
    /// # Errors
    /// When the engine has none, or the host has no memory for so many; nothing has changed then.
    pub fn request_events(&mut self, request: &EventRequest) -> Result<(), EngineError> {
        self.engine.request_events(request)
    }

    /// The events since this was last asked, oldest first.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.engine.take_events()
    }

    /// How many events found no room and were overwritten.
    pub fn lost_events(&self) -> u64 {
        self.engine.lost_events()
    }

    /// Counters of VM exits since the machine was built, where the engine counts them.
    pub fn exit_statistics(&self) -> Option<&ExitStatistics> {
        self.engine.exit_statistics()
    }

    /// The latest VM entries that failed, oldest first; at most eight.
    pub fn failed_entries(&self) -> &[FailedEntry] {
        self.engine.failed_entries()
    }

    // ---- what it is ----

    /// What it was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How its image was entered, for people. `None` when it was built without one.
    pub fn boot_description(&self) -> Option<&str> {
        self.boot.as_deref()
    }

    /// Name of its engine.
    pub fn engine_name(&self) -> &'static str {
        self.engine.name()
    }

    /// What its engine can do.
    pub fn capabilities(&self) -> Capabilities {
        self.engine.capabilities()
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.engine.vcpus()
    }

    // ---- registers ----

    /// All registers of a vCPU.
    ///
    /// # Errors
    /// When there is no such vCPU.
    pub fn read_vcpu(&self, vcpu: usize) -> Result<VcpuState, EngineError> {
        self.engine.read_state(vcpu)
    }

    /// Replaces all registers of a vCPU.
    ///
    /// # Errors
    /// When there is no such vCPU, or when no processor of this model can be in that state. The
    /// vCPU is then as before.
    pub fn write_vcpu(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError> {
        self.engine.write_state(vcpu, state)
    }

    // ---- memory ----

    /// Guest RAM.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Guest RAM, for [`Ram::write`]. Whoever changes it through [`Ram::bytes_mut`] calls
    /// [`Machine::flush`] afterwards.
    pub fn ram_mut(&mut self) -> &mut Ram {
        &mut self.ram
    }

    /// Forgets what engines cache of RAM.
    pub fn flush(&mut self) {
        self.flushes += 1;
        self.engine.flush(&mut self.ram);
    }

    /// How often it forgot that. Guests can notice it: who records a run looks whether somebody has saved the
    /// machine.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// Copies guest-physical memory. Nothing in the guest notices.
    ///
    /// # Errors
    /// When part of it is not RAM.
    pub fn peek_physical(&self, address: u64, into: &mut [u8]) -> Result<(), OutOfRam> {
        self.ram.read(address, into)
    }

    /// Changes guest-physical memory.
    ///
    /// # Errors
    /// When part of it is not RAM; nothing is written then.
    pub fn poke_physical(&mut self, address: u64, bytes: &[u8]) -> Result<(), OutOfRam> {
        self.ram.write(address, bytes)
    }

    /// Walks the page tables of a vCPU. No rights are checked and no accessed bit is set.
    ///
    /// # Errors
    /// When there is no such vCPU.
    pub fn walk(&self, vcpu: usize, linear: u64) -> Result<Walk, EngineError> {
        Ok(walk(&self.ram, &self.engine.read_state(vcpu)?, linear))
    }

    /// Walks the page tables of a level of a vCPU, through L1's EPT for L2: those in use where the
    /// vCPU executes this level, else those that its current VMCS names. No rights are checked and no
    /// accessed bit is set. `None` where there is no current VMCS to name any.
    ///
    /// # Errors
    /// When there is no such vCPU.
    pub fn walk_at(
        &self,
        vcpu: usize,
        level: Level,
        linear: u64,
    ) -> Result<Option<Walk>, EngineError> {
        let state = self.engine.read_state(vcpu)?;
        Ok(walk_at(&self.ram, &state, level, linear))
    }

    /// Copies guest-virtual memory as a vCPU sees it now.
    ///
    /// # Errors
    /// When part of it is not mapped to RAM (or there is no such vCPU).
    pub fn peek_virtual(
        &self,
        vcpu: usize,
        address: u64,
        into: &mut [u8],
    ) -> Result<(), NotMapped> {
        for (physical, range) in self.pieces(vcpu, address, into.len())? {
            let piece = &mut into[range.clone()];
            self.ram.read(physical, piece).map_err(|_| NotMapped {
                address: address.wrapping_add(range.start as u64),
                vcpu,
            })?;
        }
        Ok(())
    }

    /// Changes guest-virtual memory as a vCPU sees it now. Write protection does not count.
    ///
    /// # Errors
    /// When part of it is not mapped to RAM (or there is no such vCPU); nothing is written then.
    pub fn poke_virtual(
        &mut self,
        vcpu: usize,
        address: u64,
        bytes: &[u8],
    ) -> Result<(), NotMapped> {
        let pieces = self.pieces(vcpu, address, bytes.len())?;
        for (physical, range) in pieces {
            let piece = &bytes[range.clone()];
            self.ram.write(physical, piece).map_err(|_| NotMapped {
                address: address.wrapping_add(range.start as u64),
                vcpu,
            })?;
        }
        Ok(())
    }

    /// Splits a guest-virtual range into its pages: physical address, and range of the buffer.
    fn pieces(
        &self,
        vcpu: usize,
        address: u64,
        len: usize,
    ) -> Result<Vec<(u64, std::ops::Range<usize>)>, NotMapped> {
        let error = |address| NotMapped { address, vcpu };
        let state = self.engine.read_state(vcpu).map_err(|_| error(address))?;
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < len {
            let at = address.wrapping_add(done as u64);
            let in_page = (0x1000 - (at & 0xfff) as usize).min(len - done);
            let physical = walk(&self.ram, &state, at)
                .physical
                .filter(|&physical| self.ram.offset(physical).is_some())
                .ok_or(error(at))?;
            pieces.push((physical, done..done + in_page));
            done += in_page;
        }
        Ok(pieces)
    }

    // ---- in and out ----

    /// Types at the serial port. The bytes arrive now, at [`Machine::now`], and wait there until
    /// the guest reads them.
    pub fn serial_input(&mut self, bytes: &[u8]) {
        self.board.serial_input(bytes);
    }

    /// What the guest has sent to the serial port since this was last asked. Always empty with a
    /// sink ([`MachineBuilder::serial_sink`]).
    pub fn take_serial_output(&mut self) -> Vec<u8> {
        self.board.take_serial_output()
    }

    /// Types at the virtio consoles.
    pub fn console_input(&mut self, bytes: &[u8]) {
        self.board.console_input(&mut self.ram, bytes);
    }

    /// What the guest has printed on virtio consoles since this was last asked.
    pub fn take_console_output(&mut self) -> Vec<u8> {
        self.board.take_console_output()
    }

    /// What the guest has written to debug port E9H since this was last asked.
    pub fn take_debug_output(&mut self) -> Vec<u8> {
        self.board.take_debug_output()
    }

    /// Presses the power button: an ACPI event the guest may obey.
    pub fn press_power_button(&mut self) {
        self.board.press_power_button();
    }
}
