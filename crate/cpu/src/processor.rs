//! All vCPUs of a machine and what makes them go: turns, time, events, the block loop.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use hypernest_vmcs::{ExitReason, NestedState};
use iced_x86::{Decoder, DecoderError, Instruction};

use crate::block::{BlockId, CodeCache, Key, MAX_BLOCK};
use crate::bus::{Bus, DeliveryMode, InterruptMessage, Tick};
use crate::clock;
use crate::coverage::Coverage;
use crate::exec;
use crate::flags::bit;
use crate::hot::{self, Next};
use crate::hyperv::{self, HyperV};
use crate::mem::{Ctx, canonical};
use crate::model::Model;
use crate::paging::{self, Access, Miss, Privilege};
use crate::ram::Ram;
use crate::save::StateError;
use crate::state::{Activity, VcpuState};
use crate::trap::{Exec, GP0, Trap, UD};
use crate::vcpu::{Seg, Vcpu};
use crate::vmx::exit::{self, Exit};
use crate::vmx::pml::Marks;
use crate::vmx::{self, NestedRefused, NestedReport, VmxProfile};
use crate::watch::{Caught, Event, EventRequest, ExitStatistics, ExitStops, FailedEntry, Watch};
use crate::{debug, interrupt};

/// Ticks a vCPU runs before the next one gets its turn.
const TURN: Tick = 20_000;
/// Most vCPUs of a machine (xAPIC ids are a byte, and 255 is everyone).
pub const MAX_CPUS: u32 = 64;

/// What a processor is made of.
#[derive(Clone, Debug)]
pub struct ProcessorConfig {
    /// vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// What CPUID lists.
    pub model: &'static Model,
    /// Most instructions decoded as one block, 1 to 64. Changes speed and nothing else.
    pub block_length: u32,
    /// VMX, where there is any.
    pub vmx: Option<Arc<VmxProfile>>,
    /// The Hyper-V interface; VMX is then without what the enlightened VMCS has no place for.
    pub hyperv: bool,
}

impl Default for ProcessorConfig {
    fn default() -> Self {
        ProcessorConfig {
            cpus: 1,
            model: Default::default(),
            block_length: MAX_BLOCK as u32,
            vmx: None,
            hyperv: false,
        }
    }
}

/// A processor cannot be made, or cannot do what it is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessorError {
    /// Not a count of vCPUs we support.
    #[error("{0} vCPUs asked for; 1 to {MAX_CPUS} are possible")]
    Cpus(u32),
    /// More events asked for than the host has memory for.
    #[error("there is no memory for {0} events; ask for fewer")]
    Events(usize),
}

/// Why [`Processor::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// The tick asked for is reached.
    Deadline,
    /// The board asked to stop.
    Board,
    /// A triple fault.
    Shutdown {
        /// Which vCPU.
        vcpu: usize,
    },
    /// A VM exit could not be completed: this vCPU is shut down until a reset. The others can go on.
    VmxAbort {
        /// Which vCPU.
        vcpu: usize,
        /// Why, as the VMCS region says too (Vol. 3C, "VMX Aborts").
        indicator: u32,
    },
    /// The guest needs something that is not built.
    Unimplemented {
        /// Which vCPU.
        vcpu: usize,
        /// What it is.
        what: &'static str,
        /// Its instruction.
        rip: u64,
    },
    /// The next instruction has a breakpoint.
    Breakpoint {
        /// Which vCPU.
        vcpu: usize,
        /// Linear address of the instruction.
        rip: u64,
    },
    /// Every vCPU waits and nothing will ever wake one.
    Idle,
    /// A VM exit that [`Processor::set_exit_stops`] named; L1 is about to execute its first
    /// instruction after it.
    VmExit {
        /// Which vCPU.
        vcpu: usize,
        /// Basic exit reason.
        reason: ExitReason,
        /// Which exit of the machine's, from 1.
        number: u64,
    },
    /// A VM entry failed, and [`Processor::set_exit_stops`] named that.
    EntryFailed {
        /// Which vCPU.
        vcpu: usize,
    },
    /// There is no room for further events ([`WhenFull::Stop`](crate::WhenFull::Stop)).
    EventsFull,
}

/// One instruction about to execute, for an [`Processor::set_tracer`] observer.
pub struct Traced<'a> {
    /// Which vCPU.
    pub vcpu: usize,
    /// Ticks before it.
    pub now: Tick,
    /// The instruction; its `ip()` is RIP.
    pub instruction: &'a Instruction,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// State before it.
    pub state: VcpuState,
}

/// What is called before each instruction while tracing.
pub type Tracer = Box<dyn FnMut(&Traced) + Send>;

/// The software processor of a machine.
pub struct Processor {
    vcpus: Vec<Vcpu>,
    code: CodeCache,
    now: Tick,
    /// Whose turn it is, and how much of it is left.
    current: usize,
    turn_left: Tick,
    /// Linear addresses, sorted.
    breakpoints: Vec<u64>,
    /// The breakpoint just reported does not stop the same instruction again.
    passed: Option<(usize, u64)>,
    tracer: Option<Tracer>,
    coverage: Option<Coverage>,
    /// Retired instructions, or those that faulted; idle time not included.
    instructions: u64,
    /// With the vCPU whose turn it is, while it executes.
    watch: Option<Box<Watch>>,
}

/// How the run of one vCPU ended, other than by using its budget.
enum Pause {
    /// The world must be looked at before more is executed.
    Look,
    Stop(Stop),
}

impl Processor {
    /// All vCPUs in reset state.
    pub fn new(config: &ProcessorConfig) -> Result<Processor, ProcessorError> {
        if config.cpus == 0 || config.cpus > MAX_CPUS {
            return Err(ProcessorError::Cpus(config.cpus));
        }
        let vmx = config.vmx.as_ref().map(|profile| match config.hyperv {
            true => Arc::new(profile.enlightened()),
            false => profile.clone(),
        });
        let vcpu = |n| {
            let mut cpu = Vcpu::new(config.model, n, config.cpus, vmx.clone());
            cpu.hyperv = config.hyperv.then(|| Box::new(HyperV::new()));
            cpu
        };
        Ok(Processor {
            vcpus: (0..config.cpus).map(vcpu).collect(),
            code: CodeCache::new(config.block_length as usize),
            now: 0,
            current: 0,
            turn_left: TURN,
            breakpoints: Vec::new(),
            passed: None,
            tracer: None,
            coverage: None,
            instructions: 0,
            watch: Some(Box::new(Watch::new(
                config.cpus as usize,
                config.vmx.is_some(),
            ))),
        })
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Machine time.
    pub fn now(&self) -> Tick {
        self.now
    }

    /// Instructions started so far by all vCPUs.
    pub fn instructions(&self) -> u64 {
        self.instructions
    }

    /// Sets machine time and the turn, for a machine that continues from saved state.
    pub fn set_time(&mut self, now: Tick, turn: (usize, Tick)) {
        self.now = now;
        self.passed = None;
        self.current = turn.0.min(self.vcpus.len() - 1);
        self.turn_left = turn.1.clamp(1, TURN);
    }

    /// Whose turn it is and how many ticks of it are left.
    pub fn turn(&self) -> (usize, Tick) {
        (self.current, self.turn_left)
    }

    /// State of a vCPU. Panics when there is no such vCPU.
    pub fn read_state(&self, vcpu: usize) -> VcpuState {
        self.vcpus[vcpu].save()
    }

    /// Replaces the state of a vCPU; nothing changes on an error. Panics when there is no such vCPU.
    pub fn write_state(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), StateError> {
        self.vcpus[vcpu].load(state)
    }

    /// Replaces the registers of a vCPU, MSRs and local APIC among them, and leaves VMX operation as it is:
    /// `state.vmx` is not looked at, but for what is under way at this instruction boundary. With
    /// [`Processor::set_nested_state`], in either order, the whole vCPU is replaced; nothing changes on an
    /// error. Panics when there is no such vCPU.
    pub fn write_registers(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), StateError> {
        self.vcpus[vcpu].load_registers(state)
    }

    /// VMX operation of a vCPU as KVM_GET_NESTED_STATE gives it, its VMCS in the written layout. Nothing
    /// changes. Panics when there is no such vCPU.
    pub fn nested_state(&mut self, vcpu: usize, ram: &Ram) -> NestedState {
        self.vcpus[vcpu].nested_state(ram, self.now)
    }

    /// Replaces VMX operation of a vCPU, as KVM_SET_NESTED_STATE does. Guest memory must be there before.
    /// The state of a guest that executes is loaded too, as far as its VMCS has it. Panics when there is no
    /// such vCPU.
    ///
    /// # Errors
    /// Where the bytes are no nested state, or none for this vCPU. Nothing has changed then.
    pub fn set_nested_state(
        &mut self,
        vcpu: usize,
        ram: &mut Ram,
        bytes: &[u8],
    ) -> Result<NestedReport, NestedRefused> {
        self.vcpus[vcpu].set_nested_state(ram, self.now, bytes)
    }

    /// Replaces the linear addresses whose execution stops [`Processor::run`].
    pub fn set_breakpoints(&mut self, addresses: &[u64]) {
        self.breakpoints = addresses.to_vec();
        self.breakpoints.sort_unstable();
    }

    /// Calls `tracer` before each instruction; `None` ends it. Tracing changes no result, only speed.
    pub fn set_tracer(&mut self, tracer: Option<Tracer>) {
        self.tracer = tracer;
    }

    /// Asks for events of VMX, which [`Processor::take_events`] gives; what was kept of an earlier
    /// request is dropped. Events change no result.
    ///
    /// # Errors
    /// The host has no memory for so many; nothing has changed.
    pub fn request_events(&mut self, request: &EventRequest) -> Result<(), ProcessorError> {
        let watch = self.watch.as_mut();
        let done = watch.and_then(|watch| watch.request(request));
        done.ok_or(ProcessorError::Events(request.capacity))
    }

    /// The events since this was last asked, oldest first.
    pub fn take_events(&mut self) -> Vec<Event> {
        let watch = self.watch.as_mut();
        watch.map_or_else(Vec::new, |watch| watch.take_events())
    }

    /// Events that found no room ([`WhenFull::Overwrite`](crate::WhenFull::Overwrite)).
    pub fn lost_events(&self) -> u64 {
        self.watch.as_ref().map_or(0, |watch| watch.lost_events())
    }

    /// Replaces the VM exits that stop [`Processor::run`].
    pub fn set_exit_stops(&mut self, stops: &ExitStops) {
        if let Some(watch) = &mut self.watch {
            watch.set_stops(stops);
        }
    }

    /// Instructions that a vCPU has started since the processor was made.
    pub fn vcpu_instructions(&self, vcpu: usize) -> u64 {
        let watch = self.watch.as_ref();
        watch.map_or(0, |watch| watch.instructions(vcpu))
    }

    /// Counters of VM exits since the processor was made.
    pub fn exit_statistics(&self) -> Option<&ExitStatistics> {
        self.watch.as_ref().map(|watch| &watch.statistics)
    }

    /// The latest VM entries that failed, oldest first; at most eight.
    pub fn failed_entries(&self) -> &[FailedEntry] {
        self.watch.as_ref().map_or(&[], |watch| watch.failures())
    }

    /// Forgets all decoded code and cached translations, for a caller that changed RAM behind
    /// [`Ram::write`].
    pub fn flush(&mut self, ram: &mut Ram) {
        self.code.clear(ram);
        for cpu in &mut self.vcpus {
            cpu.flush_tlb();
        }
    }

    /// Forgets cached translations, and of decoded code only what depends on how it came to be executed: to go
    /// on after this is to go on as after [`Processor::flush`], at less cost. RAM must have been changed
    /// in no other ways than those of [`Ram`].
    pub fn rewind(&mut self, ram: &mut Ram) {
        if ram.code_was_written() {
            self.code.invalidate(&ram.take_code_writes());
        }
        self.code.unlink();
        for cpu in &mut self.vcpus {
            cpu.flush_tlb();
        }
    }

    /// Notes the blocks that are executed from now on, or ends that. What was noted before is given back.
    /// Nothing in the guest can notice.
    pub fn set_coverage(&mut self, ram: &mut Ram, coverage: Option<Coverage>) -> Option<Coverage> {
        self.code.clear(ram);
        self.code.basic = coverage.is_some();
        core::mem::replace(&mut self.coverage, coverage)
    }

    /// What is noted of the blocks that are executed.
    pub fn coverage(&mut self) -> Option<&mut Coverage> {
        self.coverage.as_mut()
    }

    /// Guest-physical address of a linear one in a vCPU's current address space, with supervisor
    /// rights and without touching accessed or dirty bits. `None` where it is not mapped.
    pub fn translate(&self, vcpu: usize, ram: &mut Ram, linear: u64) -> Option<u64> {
        let cpu = &self.vcpus[vcpu];
        let mut marks = Marks::none();
        let mut who = Privilege::Supervisor;
        if let Err(Miss::Fault(crate::Fault::Page { code, .. })) =
            paging::walk(cpu, ram, linear, Access::Read, who, &mut marks)
            && code & 1 != 0
        {
            // Present: only SMAP stands between; a debugger looks as the user does.
            who = Privilege::User;
        }
        let mapping = paging::walk(cpu, ram, linear, Access::Read, who, &mut marks).ok()?;
        Some(mapping.physical | linear & 0xfff)
    }

    /// Runs until `until`, or until something stops it first. Idle time is skipped.
    pub fn run(&mut self, ram: &mut Ram, bus: &mut dyn Bus, until: Tick) -> Stop {
        loop {
            if bus.stop_requested() {
                return Stop::Board;
            }
            if bus.deadline().is_some_and(|due| due <= self.now) {
                bus.advance(ram, self.now);
                if bus.stop_requested() {
                    return Stop::Board;
                }
            }
            for cpu in &mut self.vcpus {
                cpu.apic.advance(self.now, &mut cpu.msrs);
                hyperv::advance(cpu, ram, self.now);
            }
            self.route(bus);
            if self.now >= until {
                return Stop::Deadline;
            }
            let due = self.next_deadline(bus);
            let Some(runnable) = self.next_runnable(bus) else {
                // Nobody runs before the next deadline: skip to it.
                match due {
                    Some(due) => self.now = due.clamp(self.now + 1, until),
                    None if until == Tick::MAX => return Stop::Idle,
                    None => self.now = until,
                }
                continue;
            };
            if runnable != self.current {
                self.current = runnable;
                self.turn_left = TURN;
            }
            let end = due.unwrap_or(Tick::MAX).max(self.now + 1).min(until);
            let budget = self.turn_left.min(end - self.now);
            let mut left = budget;
            // Messages, timers or its own turn may have brought it something to take.
            self.vcpus[runnable].leave_block = true;
            let waiting = |(n, cpu): (usize, &Vcpu)| {
                n != runnable && cpu.can_run(n == 0 && bus.intr(), self.now)
            };
            let others_run = self.vcpus.iter().enumerate().any(waiting);
            self.vcpus[runnable].others_run = others_run;
            if let Some(watch) = &mut self.watch {
                watch.begin(runnable, self.now);
            }
            self.vcpus[runnable].watch = self.watch.take();
            let pause = self.run_vcpu(ram, bus, &mut left);
            self.watch = self.vcpus[runnable].watch.take();
            hyperv::settle(&mut self.vcpus, runnable);
            let used = budget - left;
            let caught = self.watch.as_mut().and_then(|watch| watch.end(used));
            self.now += used;
            self.instructions += used;
            self.turn_left -= used;
            let over = core::mem::take(&mut self.vcpus[runnable].turn_over);
            if self.turn_left == 0 || over {
                self.current = (self.current + 1) % self.vcpus.len();
                self.turn_left = TURN;
            }
            if let Some(Pause::Stop(stop)) = pause {
                return stop;
            }
            if let Some(caught) = caught {
                let vcpu = runnable;
                return match caught {
                    Caught::Exit { reason, number } => Stop::VmExit {
                        vcpu,
                        reason,
                        number,
                    },
                    Caught::FailedEntry => Stop::EntryFailed { vcpu },
                    Caught::Full => Stop::EventsFull,
                };
            }
        }
    }

    /// Delivers what the board and the local APICs sent.
    fn route(&mut self, bus: &mut dyn Bus) {
        while let Some(message) = bus.take_message() {
            self.deliver(&message, None);
        }
        for n in 0..self.vcpus.len() {
            while let Some((message, targets)) = self.vcpus[n].apic.take_ipi() {
                self.deliver(&message, Some((n, targets)));
            }
        }
    }

    /// Gives a message to the APICs it is for.
    fn deliver(&mut self, message: &InterruptMessage, from: Option<(usize, crate::apic::Targets)>) {
        use crate::apic::Targets;
        let is_target = |n: usize, cpu: &Vcpu| match from {
            Some((sender, Targets::Itself)) => n == sender,
            Some((_, Targets::All)) => true,
            Some((sender, Targets::Others)) => n != sender,
            Some((_, Targets::Destination)) | None => cpu.apic.matches(message),
        };
        if message.delivery == DeliveryMode::LowestPriority {
            let lowest = self
                .vcpus
                .iter()
                .enumerate()
                .filter(|(n, cpu)| is_target(*n, cpu))
                .min_by_key(|(_, cpu)| cpu.apic.priority())
                .map(|(n, _)| n);
            if let Some(n) = lowest {
                self.vcpus[n].apic.accept(message);
            }
            return;
        }
        for n in 0..self.vcpus.len() {
            if is_target(n, &self.vcpus[n]) {
                self.vcpus[n].apic.accept(message);
            }
        }
    }

    /// While every vCPU waits: the tick of the next event that may end it, [`Tick::MAX`] where only
    /// the outside can. `None` while a vCPU can run. Holds after [`Processor::run`] has returned
    /// [`Stop::Deadline`].
    pub fn waits_until(&self, bus: &dyn Bus) -> Option<Tick> {
        if self.next_runnable(bus).is_some() {
            return None;
        }
        Some(self.next_deadline(bus).unwrap_or(Tick::MAX))
    }

    /// The next tick at which a local APIC's timer or the board has something to do.
    fn next_deadline(&self, bus: &dyn Bus) -> Option<Tick> {
        let timers = self.vcpus.iter().filter_map(|cpu| cpu.apic.deadline());
        let guests = self.vcpus.iter();
        let guests = guests.filter_map(|cpu| cpu.vmx.preemption_deadline);
        let synthetic = self.vcpus.iter().filter_map(hyperv::synic::deadline);
        let timers = timers.chain(synthetic);
        let guests = guests.map(clock::tick_of_tsc);
        timers.chain(guests).chain(bus.deadline()).min()
    }

    /// The vCPU that runs now: the current one while it can, else the next that can.
    fn next_runnable(&self, bus: &dyn Bus) -> Option<usize> {
        let count = self.vcpus.len();
        (0..count)
            .map(|n| (self.current + n) % count)
            .find(|n| self.vcpus[*n].can_run(*n == 0 && bus.intr(), self.now))
    }

    /// Runs the current vCPU until `left` is used or something else must be looked at.
    fn run_vcpu(&mut self, ram: &mut Ram, bus: &mut dyn Bus, left: &mut u64) -> Option<Pause> {
        let vcpu = self.current;
        let end = self.now + *left;
        let stop_at = |trap: Trap, rip: u64| match trap {
            Trap::Unimplemented(what) => Pause::Stop(Stop::Unimplemented { vcpu, what, rip }),
            Trap::VmxAbort(indicator) => Pause::Stop(Stop::VmxAbort { vcpu, indicator }),
            _ => Pause::Stop(Stop::Shutdown { vcpu }),
        };
        let mut link: Option<(BlockId, u16)> = None;
        while *left > 0 {
            if ram.code_was_written() {
                self.code.invalidate(&ram.take_code_writes());
                link = None;
            }
            let cpu = &mut self.vcpus[vcpu];
            cpu.tlb.withhold(ram);
            let x = &mut Ctx {
                cpu,
                ram,
                bus,
                now: end - *left,
            };
            if x.cpu.leave_block {
                x.cpu.leave_block = false;
                link = None;
                let served = service_events(x, vcpu == 0);
                let notified = core::mem::take(&mut x.cpu.vmx.notified);
                if notified {
                    // Takes a tick: one that comes again at once must not hang the host.
                    *left -= 1;
                }
                match served {
                    Ok(true) if !notified => {}
                    Ok(_) => return Some(Pause::Look),
                    Err(trap) => {
                        if let Err(trap) = take(x, trap) {
                            return Some(stop_at(trap, x.cpu.rip));
                        }
                        if notified || x.cpu.watch.as_ref().is_some_and(|w| w.has_caught()) {
                            return Some(Pause::Look);
                        }
                        continue;
                    }
                }
            }
            let one_by_one = x.cpu.careful
                || x.cpu.sti_shadow
                || x.cpu.mov_ss_shadow
                || !self.breakpoints.is_empty()
                || self.tracer.is_some();
            if let Some(coverage) = &mut self.coverage {
                coverage.enter(x.cpu, vcpu, x.linear_rip());
                // The next block is to be found here too.
                link = None;
            }
            let outcome = if one_by_one {
                let rip = x.linear_rip();
                if self.breakpoints.binary_search(&rip).is_ok()
                    && self.passed != Some((vcpu, x.now))
                {
                    self.passed = Some((vcpu, x.now));
                    return Some(Pause::Stop(Stop::Breakpoint { vcpu, rip }));
                }
                step(x, left, self.tracer.as_mut().map(|t| (t, vcpu))).map(|()| Next::Lookup)
            } else {
                let generation = self.code.generation;
                match find(&mut self.code, x, self.coverage.is_none()) {
                    Ok(Some(id)) => {
                        if let Some((from, at)) = link.take()
                            && generation == self.code.generation
                        {
                            self.code.connect(from, at, id);
                        }
                        // The block may be the first code on its page.
                        x.cpu.tlb.withhold(x.ram);
                        hot::run(&self.code, id, x, left)
                    }
                    Ok(None) => step(x, left, None).map(|()| Next::Lookup),
                    Err(trap) => {
                        *left -= 1;
                        Err(trap)
                    }
                }
            };
            link = None;
            match outcome {
                Ok(Next::Lookup) => {}
                Ok(Next::Link(id, at)) => link = Some((id, at)),
                Ok(Next::Budget) => {
                    // Too few ticks for the whole block: singly to the deadline.
                    while *left > 0 && !x.cpu.leave_block {
                        x.now = end - *left;
                        if let Err(trap) = step(x, left, None) {
                            if let Err(trap) = take(x, trap) {
                                return Some(stop_at(trap, x.cpu.rip));
                            }
                            break;
                        }
                    }
                }
                Err(trap) => {
                    x.now = end - *left;
                    if let Err(trap) = take(x, trap) {
                        return Some(stop_at(trap, x.cpu.rip));
                    }
                }
            }
            if core::mem::take(&mut self.vcpus[vcpu].look_outside) {
                return Some(Pause::Look);
            }
        }
        None
    }
}

/// Delivers the exception of an instruction.
fn take(x: &mut Ctx, trap: Trap) -> Exec {
    x.cpu.leave_block = true;
    let trap = match trap {
        Trap::Fault(fault) => match interrupt::raise(x, fault) {
            Ok(()) => {
                x.cpu.vmx.iret_unblocked_nmis = false;
                x.cpu.vmx.mtf_pending |= x.cpu.vmx.traps_each_instruction();
                return Ok(());
            }
            Err(trap) => trap,
        },
        other => other,
    };
    match trap {
        Trap::VmExit => exit::perform(x),
        Trap::TripleFault if x.cpu.vmx.non_root => {
            x.cpu.vmx.exit = Exit::new(ExitReason::TRIPLE_FAULT);
            exit::perform(x)
        }
        other => Err(other),
    }
}

/// The block at RIP. `None` where the instruction there cannot be cached: it crosses a page or is
/// not in RAM. Where `note`, the hot loop may find it itself the next time.
fn find(code: &mut CodeCache, x: &mut Ctx, note: bool) -> Exec<Option<BlockId>> {
    let linear = x.check_fetch(1)?;
    let (Some(offset), _) = x.code_at(linear)? else {
        return Ok(None);
    };
    let key = Key {
        offset,
        rip: x.cpu.rip,
        size: x.cpu.code_size,
    };
    if let Some((id, _)) = code.recent(&key) {
        return Ok(x.inside_limit(code, id).then_some(id));
    }
    let id = match code.find(&key) {
        Some(id) => id,
        None => match code.build(key, x.ram, x.cpu.model) {
            Some(id) => id,
            None => return Ok(None),
        },
    };
    if note {
        code.note_recent(id);
    }
    Ok(x.inside_limit(code, id).then_some(id))
}

impl Ctx<'_> {
    /// Linear address of the next instruction.
    pub(crate) fn linear_rip(&self) -> u64 {
        if self.cpu.is_64() {
            self.cpu.rip
        } else {
            self.cpu.seg(Seg::Cs).base.wrapping_add(self.cpu.rip) & 0xffff_ffff
        }
    }

    /// Linear address of RIP after the checks of a fetch of `bytes`.
    fn check_fetch(&self, bytes: u64) -> Exec<u64> {
        let ok = if self.cpu.is_64() {
            canonical(self.cpu.rip) && canonical(self.cpu.rip.wrapping_add(bytes - 1))
        } else {
            self.cpu.rip + (bytes - 1) <= u64::from(self.cpu.seg(Seg::Cs).limit)
        };
        if ok { Ok(self.linear_rip()) } else { Err(GP0) }
    }

    /// Whether all of a block lies below the limit of CS.
    fn inside_limit(&self, code: &CodeCache, id: BlockId) -> bool {
        let block = &code.blocks[id as usize];
        self.cpu.is_64()
            || block.key.rip + u64::from(block.bytes) - 1 <= u64::from(self.cpu.seg(Seg::Cs).limit)
    }

    /// Decodes the instruction at RIP from memory, across pages and from devices. Its bytes come
    /// along.
    fn decode(&mut self) -> Exec<(Instruction, [u8; 15])> {
        let mut bytes = [0u8; 15];
        let mut have = 0;
        let rip = self.cpu.rip;
        let linear = self.check_fetch(1)?;
        loop {
            // One page at a time, and the second only when the first does not hold it all.
            let at = linear.wrapping_add(have as u64);
            let more = (0x1000 - (at & 0xfff) as usize).min(15 - have);
            let (offset, physical) = self.code_at(at)?;
            let into = &mut bytes[have..have + more];
            match offset {
                Some(offset) => into.copy_from_slice(&self.ram.bytes()[offset..offset + more]),
                None => {
                    let mut piece = [0; 15];
                    self.load_physical(physical, &mut piece[..more]);
                    bytes[have..have + more].copy_from_slice(&piece[..more]);
                }
            }
            have += more;
            let options = self.cpu.model.decoder_options();
            let bits = self.cpu.code_size.bits();
            let mut decoder = Decoder::with_ip(bits, &bytes[..have], rip, options);
            let instruction = decoder.decode();
            if decoder.last_error() != DecoderError::NoMoreBytes {
                self.check_fetch(instruction.len() as u64)?;
                return Ok((instruction, bytes));
            }
            if have == 15 {
                // Longer than any instruction may be.
                return Err(GP0);
            }
        }
    }
}

/// Executes one instruction through the checked path. Takes one tick, or what a repeated string
/// instruction takes.
fn step(x: &mut Ctx, left: &mut u64, tracer: Option<(&mut Tracer, usize)>) -> Exec {
    let before = *left;
    let rip = x.cpu.rip;
    let shadows = (x.cpu.sti_shadow, x.cpu.mov_ss_shadow);
    let outcome = step_inner(x, left, tracer);
    // Blocks, which may follow, do not know of it.
    x.cpu.after_mov_ss = false;
    if outcome.is_err() {
        x.cpu.rip = rip;
        if outcome == Err(Trap::VmExit) {
            // The guest comes back to this instruction.
            (x.cpu.sti_shadow, x.cpu.mov_ss_shadow) = shadows;
        }
        if *left == before {
            *left -= 1;
        }
    }
    outcome
}

fn step_inner(x: &mut Ctx, left: &mut u64, tracer: Option<(&mut Tracer, usize)>) -> Exec {
    // The shadows last for one instruction, whose own may follow.
    let after_mov_ss = x.cpu.mov_ss_shadow;
    x.cpu.after_mov_ss = after_mov_ss;
    let traps = x.cpu.vmx.traps_each_instruction();
    if x.cpu.sti_shadow || after_mov_ss {
        (x.cpu.sti_shadow, x.cpu.mov_ss_shadow) = (false, false);
        x.cpu.leave_block = true;
    }
    let linear = x.linear_rip();
    if !after_mov_ss && let Some(fault) = debug::instruction_breakpoint(x.cpu, linear) {
        return Err(fault.into());
    }
    let (i, bytes) = x.decode()?;
    if let Some((tracer, vcpu)) = tracer {
        let state = x.cpu.save();
        tracer(&Traced {
            vcpu,
            now: x.now,
            instruction: &i,
            bytes: &bytes[..i.len()],
            state,
        });
    }
    let steps_on_branches = x.cpu.msrs.debugctl & exec::msr::DEBUGCTL_BTF != 0;
    if x.cpu.flags.rest & bit::TF != 0 && (!steps_on_branches || exec::branch::is_taken(x, &i)) {
        // TF as it was before the instruction counts. A fault or software interrupt drops it.
        x.cpu.pending_debug |= debug::SINGLE_STEP;
    }
    let resume = x.cpu.flags.rest & bit::RF != 0;
    x.cpu.rip = i.next_ip();
    if !x.cpu.model.allows(&i) {
        return Err(UD);
    }
    if exec::is_repeated(&i) {
        // Singly while each iteration may trap.
        let mut budget = if x.cpu.careful { 1 } else { *left };
        let all = budget;
        exec::repeat(x, &i, &mut budget)?;
        *left -= all - budget;
    } else {
        exec::execute(x, &i)?;
        *left -= 1;
    }
    if resume && !exec::sets_resume_flag(&i) {
        x.cpu.flags.rest &= !bit::RF;
        x.cpu.refresh();
    }
    if traps && x.cpu.vmx.non_root {
        x.cpu.vmx.mtf_pending = true;
        x.cpu.leave_block = true;
    }
    if x.cpu.pending_debug != 0 {
        x.cpu.leave_block = true;
    }
    Ok(())
}

impl Vcpu {
    /// Whether it has an instruction to execute or an event to take. `intr`: the 8259 asks.
    fn can_run(&self, intr: bool, now: Tick) -> bool {
        if self.vmx.non_root && self.guest_event_waits(intr, now) {
            return true;
        }
        match self.activity {
            Activity::Active => true,
            Activity::Halted => {
                self.apic.init_waiting()
                    || self.pending_debug != 0
                    || self.apic.nmi_waiting() && !self.nmi_blocked
                    || self.flags.rest & bit::IF != 0 && self.interrupt_waiting(intr)
            }
            Activity::WaitForSipi => self.apic.init_waiting() || self.apic.sipi_waiting(),
            Activity::Shutdown => self.apic.init_waiting() || self.apic.nmi_waiting(),
            Activity::VmxAbort => false,
        }
    }

    /// Whether something makes a guest that waits leave its state of waiting.
    fn guest_event_waits(&self, intr: bool, now: Tick) -> bool {
        let due = self.preemption_timer_expired(now);
        let waits = self.activity == Activity::Halted;
        self.vmx.inject
            || self.vmx.mtf_pending
            || self.vmx.apic_write.is_some()
            || self.vmx.threshold_due
            || vmx::virtual_interrupt::is_deliverable(self)
            || due && self.activity != Activity::WaitForSipi
            || waits && exit::takes_interrupts(self) && self.interrupt_waiting(intr)
            || waits && (exit::interrupt_window(self) || exit::nmi_window(self))
    }

    fn interrupt_waiting(&self, intr: bool) -> bool {
        self.apic.pending_vector().is_some()
            || self.apic.extint_waiting()
            || intr && self.apic.extint_enabled()
    }
}

/// Takes what is due before the next instruction, in the order of Vol. 3A, "Priority Among
/// Concurrent Events". False when the vCPU has nothing to execute.
fn service_events(x: &mut Ctx, boot_cpu: bool) -> Exec<bool> {
    let guest = x.cpu.vmx.non_root;
    // What belongs to the operation before.
    if x.cpu.vmx.inject {
        vmx::entry::inject(x)?;
        x.cpu.vmx.mtf_pending |= x.cpu.vmx.traps_each_instruction();
    }
    vmx::apic::after_operation(x)?;
    // In VMX root operation INIT waits.
    if (guest || x.cpu.vmx.region.is_none()) && x.cpu.apic.take_init() {
        if guest {
            return Err(exit::leave(x.cpu, Exit::new(ExitReason::INIT)));
        }
        x.cpu.init();
    }
    if x.cpu.activity == Activity::WaitForSipi {
        let Some(vector) = x.cpu.apic.take_sipi() else {
            return Ok(false);
        };
        if guest {
            let exit = Exit {
                qualification: u64::from(vector),
                ..Exit::new(ExitReason::SIPI)
            };
            return Err(exit::leave(x.cpu, exit));
        }
        x.cpu.start_up(vector);
    }
    if let Some(trap) = hyperv::trap_after_flush(x.cpu) {
        return Err(trap);
    }
    if core::mem::take(&mut x.cpu.vmx.mtf_pending) {
        return Err(exit::leave(
            x.cpu,
            Exit::after(ExitReason::MONITOR_TRAP_FLAG),
        ));
    }
    if let Some(fault) = debug::pending_trap(x.cpu) {
        x.cpu.activity = Activity::Active;
        interrupt::raise(x, fault)?;
    }
    if x.cpu.preemption_timer_expired(x.now) {
        let exit = Exit::after(ExitReason::PREEMPTION_TIMER);
        return Err(exit::leave(x.cpu, exit));
    }
    if exit::nmi_window(x.cpu) {
        return Err(exit::leave(x.cpu, Exit::after(ExitReason::NMI_WINDOW)));
    }
    // The shadow of STI holds NMIs back too, as the manual allows (Vol. 2B, STI).
    let in_shadow = x.cpu.mov_ss_shadow || x.cpu.sti_shadow;
    if x.cpu.apic.nmi_waiting() && !x.cpu.nmi_blocked && !in_shadow {
        x.cpu.apic.take_nmi();
        if exit::takes_nmis(x.cpu) {
            return Err(interrupt::nmi_exit(x));
        }
        x.cpu.activity = Activity::Active;
        interrupt::nmi(x)?;
    }
    if exit::interrupt_window(x.cpu) {
        return Err(exit::leave(
            x.cpu,
            Exit::after(ExitReason::INTERRUPT_WINDOW),
        ));
    }
    if vmx::virtual_interrupt::is_deliverable(x.cpu) {
        vmx::virtual_interrupt::deliver(x)?;
        // No other one is recognized now, but external interrupts may wait.
        return service_events(x, boot_cpu);
    }
    let intr = boot_cpu && x.bus.intr();
    let exits = exit::takes_interrupts(x.cpu);
    if (exits || x.cpu.flags.rest & bit::IF != 0)
        && !x.cpu.sti_shadow
        && !x.cpu.mov_ss_shadow
        && x.cpu.interrupt_waiting(intr)
    {
        if exits && !x.cpu.vmx.controls.acknowledges() {
            let exit = Exit::new(ExitReason::EXTERNAL_INTERRUPT);
            return Err(exit::leave(x.cpu, exit));
        }
        let vector = if x.cpu.apic.pending_vector().is_some() {
            x.cpu.apic.acknowledge()
        } else {
            x.cpu.apic.take_extint();
            x.bus.acknowledge(x.now)
        };
        if exits {
            if vmx::virtual_interrupt::take_posted(x, vector) {
                // The local APIC has one less, and there may be a virtual one to deliver.
                return service_events(x, boot_cpu);
            }
            return Err(interrupt::external_exit(x, vector));
        }
        x.cpu.activity = Activity::Active;
        interrupt::external(x, vector)?;
        // Only one; the handler starts with IF clear, or takes the next before its first instruction.
        x.cpu.leave_block = true;
    }
    Ok(x.cpu.activity == Activity::Active)
}
