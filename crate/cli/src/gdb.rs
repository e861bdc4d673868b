//! A server for gdb, on the loopback interface: registers and memory of the level that a vCPU
//! executes, breakpoints, single steps. It changes nothing in the guest: breakpoints are not written
//! into its code, and writes to registers and memory are refused.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use gdbstub::common::{Signal, Tid};
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use hypernest_cpu::VcpuState;
use hypernest_machine::{Stop, Tick};

use crate::drive::Run;
use crate::report::End;
use crate::{current_vmcs, dump};

/// Ticks between two looks at the connection.
const SLICE: Tick = 2_000_000;
/// How long to wait for bytes before keys and time are looked at.
const WAIT: Duration = Duration::from_millis(20);
/// Ticks of a single step between two looks, while its vCPU does not execute.
const STEP_LOOK: u32 = 10_000;

/// Waits for gdb.
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Listens on an address, or on a free port where it is 0.
    ///
    /// # Errors
    /// The address is in use.
    pub fn bind(address: SocketAddr) -> Result<Listener> {
        let listener = TcpListener::bind(address);
        let listener = listener.with_context(|| format!("cannot listen for gdb on {address}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Listener { listener, address })
    }

    /// Waits for one connection and serves it. The end of the run; `None` where gdb went away and
    /// the guest is to run on.
    ///
    /// # Errors
    /// The host fails.
    pub fn serve(&self, run: &mut Run<'_>) -> Result<Option<End>> {
        eprintln!("hypernest: waiting for gdb on {}", self.address);
        let stream = loop {
            match self.listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(error).context("cannot accept gdb's connection"),
            }
            if let Some(end) = run.keys(WAIT)? {
                return Ok(Some(end));
            }
        };
        let line = Line::new(stream).context("cannot use gdb's connection")?;
        Debugger::new(run).serve(line)
    }
}

/// Nothing has come yet.
fn is_pause(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// The connection.
struct Line {
    stream: TcpStream,
    read: VecDeque<u8>,
    written: Vec<u8>,
}

/// What came on the line.
enum Came {
    Byte(u8),
    Nothing,
    /// The other side is gone.
    End,
}

impl Line {
    fn new(stream: TcpStream) -> std::io::Result<Line> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        Ok(Line {
            stream,
            read: VecDeque::new(),
            written: Vec::new(),
        })
    }

    /// The next byte, waiting for it at most `wait`; a wait of zero does not wait.
    fn next(&mut self, wait: Duration) -> std::io::Result<Came> {
        if let Some(byte) = self.read.pop_front() {
            return Ok(Came::Byte(byte));
        }
        self.stream.set_nonblocking(wait.is_zero())?;
        if !wait.is_zero() {
            self.stream.set_read_timeout(Some(wait))?;
        }
        let mut bytes = [0; 4096];
        let count = match self.stream.read(&mut bytes) {
            Ok(count) => count,
            Err(error) if is_pause(&error) => return Ok(Came::Nothing),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error),
        };
        self.read.extend(&bytes[..count]);
        Ok(self.read.pop_front().map_or(Came::End, Came::Byte))
    }
}

impl Connection for Line {
    type Error = std::io::Error;

    fn write(&mut self, byte: u8) -> std::io::Result<()> {
        self.written.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.set_nonblocking(false)?;
        Write::write_all(&mut self.stream, &self.written)?;
        self.written.clear();
        Ok(())
    }
}

/// The machine as gdb sees it: a thread for each vCPU.
struct Debugger<'a, 'r> {
    run: &'a mut Run<'r>,
    breakpoints: Vec<u64>,
    /// The vCPU to step, where the machine is not to run on.
    step: Option<usize>,
    /// The stop that gdb was told of last.
    told: Option<Stop>,
}

/// How long execution goes on.
enum Went {
    Stopped(MultiThreadStopReason<u64>),
    Ended(End),
    On,
}

fn tid(vcpu: usize) -> Tid {
    NonZeroUsize::MIN.saturating_add(vcpu)
}

fn vcpu(tid: Tid) -> usize {
    tid.get() - 1
}

fn signal(vcpu: usize, signal: Signal) -> Went {
    let tid = tid(vcpu);
    Went::Stopped(MultiThreadStopReason::SignalWithThread { tid, signal })
}

impl<'a, 'r> Debugger<'a, 'r> {
    fn new(run: &'a mut Run<'r>) -> Self {
        Debugger {
            run,
            breakpoints: Vec::new(),
            step: None,
            told: None,
        }
    }

    fn serve(mut self, line: Line) -> Result<Option<End>> {
        let failed = |error| anyhow!("serving gdb: {error}");
        let stub = GdbStub::new(line);
        let mut stub = stub.run_state_machine(&mut self).map_err(failed)?;
        let mut ended = None;
        let end = loop {
            stub = match stub {
                GdbStubStateMachine::Idle(mut idle) => match idle.borrow_conn().next(WAIT)? {
                    Came::Byte(byte) => idle.incoming_data(&mut self, byte).map_err(failed)?,
                    Came::End => break None,
                    Came::Nothing => match self.run.keys(Duration::ZERO)? {
                        Some(end) => break Some(end),
                        None => idle.into(),
                    },
                },
                GdbStubStateMachine::Running(mut running) => {
                    match running.borrow_conn().next(Duration::ZERO)? {
                        Came::Byte(byte) => {
                            stub = running.incoming_data(&mut self, byte).map_err(failed)?;
                            continue;
                        }
                        Came::End => break None,
                        Came::Nothing => {}
                    }
                    match self.go()? {
                        Went::On => running.into(),
                        Went::Stopped(reason) => {
                            running.report_stop(&mut self, reason).map_err(failed)?
                        }
                        Went::Ended(end) => {
                            let status = end.status() as u8;
                            ended = Some(end);
                            let reason = MultiThreadStopReason::Exited(status);
                            running.report_stop(&mut self, reason).map_err(failed)?
                        }
                    }
                }
                GdbStubStateMachine::CtrlCInterrupt(interrupt) => {
                    let reason = MultiThreadStopReason::Signal(Signal::SIGINT);
                    let handled = interrupt.interrupt_handled(&mut self, Some(reason));
                    handled.map_err(failed)?
                }
                GdbStubStateMachine::Disconnected(gone) => match gone.get_reason() {
                    DisconnectReason::Kill => break Some(ended.unwrap_or(End::Quit)),
                    _ => break ended,
                },
            };
        };
        for address in std::mem::take(&mut self.breakpoints) {
            self.run.machine.clear_breakpoint(address);
        }
        Ok(end)
    }

    /// Executes a little.
    fn go(&mut self) -> Result<Went> {
        if let Some(end) = self.run.keys(Duration::ZERO)? {
            return Ok(Went::Ended(end));
        }
        match self.step {
            Some(vcpu) => self.step(vcpu),
            None => {
                let before = (self.run.machine.now(), self.told.clone());
                let stop = self.run.slice(SLICE)?;
                let again = matches!(stop, Stop::Breakpoint { .. })
                    && before == (self.run.machine.now(), Some(stop.clone()));
                // The breakpoint that the machine goes on from.
                if again {
                    Ok(Went::On)
                } else {
                    self.stopped(stop)
                }
            }
        }
    }

    /// One instruction of a vCPU; the others go on meanwhile.
    fn step(&mut self, vcpu: usize) -> Result<Went> {
        let machine = &*self.run.machine;
        let before = machine.vcpu_instructions(vcpu);
        for _ in 0..STEP_LOOK {
            let machine = &*self.run.machine;
            // While all wait, to what ends it.
            let wait = machine.waits_until().filter(|tick| *tick != Tick::MAX);
            let ticks = wait.map_or(1, |tick| tick.saturating_sub(machine.now()).max(1));
            let stop = self.run.slice(ticks)?;
            if self.run.machine.vcpu_instructions(vcpu) != before {
                return Ok(match self.stopped(stop)? {
                    Went::On => signal(vcpu, Signal::SIGTRAP),
                    other => other,
                });
            }
            // Its own breakpoint at the instruction to step does not count.
            let own = matches!(stop, Stop::Breakpoint { vcpu: at, .. } if at == vcpu);
            if own {
                continue;
            }
            match self.stopped(stop)? {
                Went::On => {}
                other => return Ok(other),
            }
        }
        Ok(Went::On)
    }

    /// What a stop of the machine means to gdb.
    fn stopped(&mut self, stop: Stop) -> Result<Went> {
        if let Stop::Breakpoint { vcpu, .. } = stop {
            self.told = Some(stop);
            return Ok(Went::Stopped(MultiThreadStopReason::SwBreak(tid(vcpu))));
        }
        let Some(end) = self.run.end_of(&stop)? else {
            return Ok(Went::On);
        };
        // A guest that has crashed can be looked at; one that is made to go on ends.
        let Some(vcpu) = end.scene().filter(|_| self.told.as_ref() != Some(&stop)) else {
            return Ok(Went::Ended(end));
        };
        eprintln!("hypernest: {end}");
        self.told = Some(stop);
        Ok(match end {
            End::VmExit { .. } | End::EntryFailed { .. } => signal(vcpu, Signal::SIGTRAP),
            End::TripleFault { .. } => signal(vcpu, Signal::SIGSEGV),
            _ => signal(vcpu, Signal::SIGILL),
        })
    }

    fn state(&self, tid: Tid) -> TargetResult<VcpuState, Self> {
        let state = self.run.machine.read_vcpu(vcpu(tid));
        state.map_err(|_| TargetError::NonFatal)
    }
}

impl Target for Debugger<'_, '_> {
    type Arch = X86_64_SSE;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64_SSE, Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debugger<'_, '_> {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        *regs = registers(&self.state(tid)?);
        Ok(())
    }

    fn write_registers(&mut self, _: &X86_64CoreRegs, _: Tid) -> TargetResult<(), Self> {
        Err(TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let machine = &self.run.machine;
        match machine.peek_virtual(vcpu(tid), start, data) {
            Ok(()) => Ok(data.len()),
            // As much of it as is there.
            Err(missing) => {
                let have = missing.address.wrapping_sub(start) as usize;
                let data = data.get_mut(..have).filter(|data| !data.is_empty());
                let data = data.ok_or(TargetError::NonFatal)?;
                let read = machine.peek_virtual(vcpu(tid), start, data);
                read.map_err(|_| TargetError::NonFatal)?;
                Ok(data.len())
            }
        }
    }

    fn write_addrs(&mut self, _: u64, _: &[u8], _: Tid) -> TargetResult<(), Self> {
        Err(TargetError::NonFatal)
    }

    fn list_active_threads(&mut self, found: &mut dyn FnMut(Tid)) -> Result<(), Error> {
        (0..self.run.machine.vcpus()).map(tid).for_each(found);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Debugger<'_, '_> {
    fn resume(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Error> {
        self.step = None;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, _: Tid, _: Option<Signal>) -> Result<(), Error> {
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSchedulerLocking for Debugger<'_, '_> {
    /// gdb would have the other vCPUs stand still. They take their turns all the same: a machine in
    /// which they do not is another machine.
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

impl MultiThreadSingleStep for Debugger<'_, '_> {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.step = Some(vcpu(tid));
        Ok(())
    }
}

impl ThreadExtraInfo for Debugger<'_, '_> {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Error> {
        let state = self.run.machine.read_vcpu(vcpu(tid))?;
        let text = format!("processor {}, {}", vcpu(tid), state.level().name());
        let len = text.len().min(buffer.len());
        buffer[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl Breakpoints for Debugger<'_, '_> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debugger<'_, '_> {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        if !self.breakpoints.contains(&address) {
            self.breakpoints.push(address);
            self.run.machine.set_breakpoint(address);
        }
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.breakpoints.retain(|one| *one != address);
        Ok(self.run.machine.clear_breakpoint(address))
    }
}

impl HwBreakpoint for Debugger<'_, '_> {
    fn add_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.add_sw_breakpoint(address, kind)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.remove_sw_breakpoint(address, kind)
    }
}

impl MonitorCmd for Debugger<'_, '_> {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<()> {
        let text = match command {
            b"vmcs" => {
                let mut text = String::new();
                for vcpu in 0..self.run.machine.vcpus() {
                    let state = self.run.machine.read_vcpu(vcpu)?;
                    text += &format!(
                        "processor {vcpu}, which executes {}\n",
                        state.level().name()
                    );
                    text += &current_vmcs::text(&state, self.run.names());
                }
                text
            }
            b"registers" => {
                let mut text = String::new();
                for vcpu in 0..self.run.machine.vcpus() {
                    let state = self.run.machine.read_vcpu(vcpu)?;
                    text += &format!("processor {vcpu}\n{}", dump::registers(&state));
                }
                text
            }
            _ => "there are: monitor registers, monitor vmcs\n".into(),
        };
        out.write_raw(text.as_bytes());
        Ok(())
    }
}

/// Registers as gdb wants them. RIP is the linear address of the next instruction, which in 64-bit
/// mode is the same.
fn registers(state: &VcpuState) -> X86_64CoreRegs {
    let g = &state.gpr;
    let s = &state.segments;
    let fpu = &state.fpu;
    let selector = |selector: u16| u32::from(selector);
    let mut regs = X86_64CoreRegs {
        // gdb has RBX, RCX, RDX, RSI, RDI, RBP, RSP in another order.
        regs: [
            g[0], g[3], g[1], g[2], g[6], g[7], g[5], g[4], g[8], g[9], g[10], g[11], g[12], g[13],
            g[14], g[15],
        ],
        eflags: state.rflags as u32,
        rip: dump::code_address(state),
        st: fpu.st,
        xmm: fpu.xmm,
        mxcsr: fpu.mxcsr,
        ..X86_64CoreRegs::default()
    };
    regs.segments.cs = selector(s.cs.selector);
    regs.segments.ss = selector(s.ss.selector);
    regs.segments.ds = selector(s.ds.selector);
    regs.segments.es = selector(s.es.selector);
    regs.segments.fs = selector(s.fs.selector);
    regs.segments.gs = selector(s.gs.selector);
    regs.fpu.fctrl = u32::from(fpu.control);
    regs.fpu.fstat = u32::from(fpu.status);
    // The full form: two bits for each register, 3 is empty.
    regs.fpu.ftag = (0..8).fold(0, |word, n| {
        let empty = fpu.tag >> n & 1 == 0;
        word | if empty { 3 << (2 * n) } else { 0 }
    });
    regs.fpu.fop = u32::from(fpu.opcode);
    regs
}
