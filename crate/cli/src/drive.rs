//! Runs a machine in slices, and between them moves serial bytes, keeps guest time near real time
//! where somebody may type, and looks at the clock.

use std::fs::File;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hypernest_machine::{ExitReason, Machine, Stop, Tick, Until};
use hypernest_migrate::live::Progress as MoveProgress;

use crate::args::{BreakOn, SerialTo};
use crate::exits::Events;
use crate::gdb::Listener;
use crate::migrate::{Moves, Peer, Step};
use crate::monitor::{self, Attended, Monitor};
use crate::postmortem::is_deliberate;
use crate::progress::Progress;
use crate::record::Recording;
use crate::report::End;
use crate::snapshot::Saves;
use crate::terminal::{HELP, Input, Key, Keys, Raw, Stdin, is_interactive};
use crate::trace::Names;
use crate::vmcs_dump::Dumps;
use crate::{dump, files};

/// Ticks per slice while nobody can type.
const SLICE: Tick = 20_000_000;
/// Ticks per slice while somebody may: short, so that a key is never late.
const TYPING_SLICE: Tick = 2_000_000;
/// Ticks per slice while the machine moves: pages are sent between two of them.
const MOVING_SLICE: Tick = 500_000;
/// Guest time this much ahead of real time is waited for.
const AHEAD: Duration = Duration::from_millis(2);
/// Between two looks at keys and requests while the machine is paused.
const PAUSED: Duration = Duration::from_millis(10);
/// Guest time this much behind real time is never caught up.
const BEHIND: Duration = Duration::from_millis(50);

/// When a run ends, other than by the guest's will.
pub struct Limits {
    /// At this tick.
    pub stop_at: Option<Tick>,
    /// When this appears.
    pub stop_on: Option<String>,
    /// After this much real time.
    pub timeout: Option<Duration>,
    /// What stops it with a post-mortem.
    pub break_on: Vec<BreakOn>,
}

impl Limits {
    fn breaks_on_triple_fault(&self) -> bool {
        self.break_on.contains(&BreakOn::TripleFault)
    }

    /// Whether an exit ends the run.
    fn breaks_at(&self, stop: &Stop) -> bool {
        self.break_on.iter().any(|event| match (event, stop) {
            (BreakOn::ExitReason(wanted), Stop::VmExit { reason, .. }) => wanted.0 == *reason,
            (BreakOn::ExitNumber(wanted), Stop::VmExit { number, .. }) => wanted == number,
            _ => false,
        })
    }

    /// The conditions that the machine watches for, at tick `end` at the latest.
    fn until(&self, end: Tick, texts: &[String], dumps: &Dumps) -> Until {
        let mut until = Until::tick(end);
        let mut first = None;
        for text in texts {
            until = until.text(text);
        }
        for event in &self.break_on {
            until = match event {
                BreakOn::EntryFail => until.failed_entry(),
                BreakOn::ExitReason(reason) => until.vm_exit(*reason),
                BreakOn::ExitNumber(number) => {
                    first = Some(first.map_or(*number, |first: u64| first.min(*number)));
                    until
                }
                BreakOn::TripleFault | BreakOn::Unimplemented => until,
            };
        }
        dumps.until(until, first)
    }
}

/// What is told of a run while it goes on.
#[derive(Default)]
pub struct Live {
    /// Events of VMX.
    pub events: Events,
    /// The VMCS at exits.
    pub dumps: Dumps,
    /// Snapshots.
    pub saves: Saves,
    /// Where programs ask about it and steer it.
    pub monitor: Option<Monitor>,
    /// The machine's move to another place.
    pub moves: Moves,
    /// What comes to it is written there.
    pub record: Recording,
}

/// The texts to look for, longest first: where one is seen, those it ends in are seen too.
fn texts(limits: &Limits, saves: &Saves, moves: &Moves) -> Vec<String> {
    let mut texts: Vec<String> = saves.texts().map(str::to_owned).collect();
    texts.extend(moves.text().map(str::to_owned));
    texts.extend(limits.stop_on.clone());
    texts.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
    texts.dedup();
    texts
}

/// What came of a run.
pub struct Outcome {
    /// Why it ended.
    pub end: End,
    /// Real time in the machine.
    pub running: Duration,
    /// Real time waiting.
    pub waiting: Duration,
    /// Times the machine returned.
    pub stops: u64,
    /// What was typed, and when.
    pub typed: Vec<(Tick, Vec<u8>)>,
}

/// Where serial output goes.
enum Output {
    Stdout,
    File(File, String),
    Nowhere,
}

impl Output {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Output::Stdout => {
                let mut out = stdout().lock();
                out.write_all(bytes)
                    .and_then(|()| out.flush())
                    .context("cannot write serial output to stdout")
            }
            Output::File(file, name) => file
                .write_all(bytes)
                .with_context(|| format!("cannot write serial output to {name}")),
            Output::Nowhere => Ok(()),
        }
    }
}

/// The serial port's other end.
pub struct Serial {
    output: Output,
    stdin: Option<Stdin>,
    keys: Option<Keys>,
    raw: Option<Raw>,
    /// The terminal's cursor is not at the start of a line.
    mid_line: bool,
}

impl Drop for Serial {
    fn drop(&mut self) {
        if self.raw.is_some() && self.mid_line {
            println!();
        }
    }
}

impl Serial {
    /// Opens what the port is connected to. A terminal goes into raw mode until this is dropped.
    pub fn open(to: &SerialTo) -> Result<Serial> {
        let mut serial = Serial {
            output: Output::Nowhere,
            stdin: None,
            keys: None,
            raw: None,
            mid_line: false,
        };
        match to {
            SerialTo::None => {}
            SerialTo::Output => serial.output = Output::Stdout,
            SerialTo::File(path) => {
                let file = files::create("serial output", path)?;
                serial.output = Output::File(file, path.display().to_string());
            }
            SerialTo::Stdio => {
                serial.output = Output::Stdout;
                if is_interactive() {
                    serial.raw = Some(Raw::enter().context("cannot set the terminal to raw mode")?);
                    serial.keys = Some(Keys::default());
                }
                serial.stdin = Some(Stdin::start().context("cannot read stdin")?);
            }
        }
        Ok(serial)
    }

    /// Passes on what the guest has sent.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(last) = bytes.last() {
            self.mid_line = *last != b'\n';
            self.output.write(bytes)?;
        }
        Ok(())
    }

    /// Whether something may still be typed.
    fn is_open(&self) -> bool {
        self.stdin.as_ref().is_some_and(Stdin::is_open)
    }

    /// Whether a progress line would not be in the way.
    fn leaves_room_for_progress(&self) -> bool {
        !matches!(self.output, Output::Stdout) || !stdout().is_terminal() && self.raw.is_none()
    }

    /// Waits at most `time` for input. What it means is in the order of the keys.
    fn input(&mut self, time: Duration) -> Vec<Key> {
        let Some(stdin) = &mut self.stdin else {
            std::thread::sleep(time);
            return Vec::new();
        };
        let input = if time.is_zero() {
            stdin.poll()
        } else {
            stdin.wait(time)
        };
        match (input, &mut self.keys) {
            (Input::Bytes(bytes), Some(keys)) => keys.feed(&bytes),
            (Input::Bytes(bytes), None) => vec![Key::Bytes(bytes)],
            (Input::Nothing | Input::End, _) => Vec::new(),
        }
    }
}

/// Relates guest time to real time.
struct Pace {
    tick: Tick,
    at: Instant,
}

impl Pace {
    fn start(now: Tick) -> Pace {
        Pace {
            tick: now,
            at: Instant::now(),
        }
    }

    /// How far guest time is ahead of real time. A guest that is slower than real time runs slow;
    /// it does not catch up later.
    fn ahead(&mut self, now: Tick) -> Duration {
        let guest = Duration::from_nanos(now - self.tick);
        let real = self.at.elapsed();
        if real > guest + BEHIND {
            *self = Pace::start(now);
        }
        guest.saturating_sub(real)
    }
}

/// A run under way.
pub struct Run<'a> {
    pub machine: &'a mut Machine,
    pub limits: &'a Limits,
    pub outcome: Outcome,
    /// Where programs look at the run and steer it.
    pub monitor: Option<Monitor>,
    /// A program wants the machine to stand still.
    pub paused: bool,
    serial: &'a mut Serial,
    live: &'a mut Live,
    started: Instant,
    progress: Progress,
}

impl<'a> Run<'a> {
    pub fn new(
        machine: &'a mut Machine,
        serial: &'a mut Serial,
        limits: &'a Limits,
        live: &'a mut Live,
    ) -> Run<'a> {
        let progress = if serial.leaves_room_for_progress() {
            Progress::run(limits.stop_at)
        } else {
            Progress::hidden()
        };
        Run {
            machine,
            limits,
            outcome: Outcome {
                end: End::Quit,
                running: Duration::ZERO,
                waiting: Duration::ZERO,
                stops: 0,
                typed: Vec::new(),
            },
            monitor: live.monitor.take(),
            paused: false,
            serial,
            live,
            started: Instant::now(),
            progress,
        }
    }

    /// What names addresses.
    pub fn names(&self) -> &Names {
        self.live.events.names()
    }

    /// Begins to move the machine to another place.
    ///
    /// # Errors
    /// It is on its way already.
    pub fn move_to(
        &mut self,
        to: Peer,
        bandwidth: Option<u64>,
        downtime: Option<u64>,
    ) -> Result<()> {
        self.live.moves.begin_to(to, bandwidth, downtime)
    }

    /// How far a move is that is under way.
    pub fn moving(&self) -> Option<&MoveProgress> {
        self.live.moves.progress()
    }

    /// Real time since it began, in seconds.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Waits at most `wait` for keys and passes them on, and answers the monitor's requests, waiting for more while
    /// the machine is paused. The end, where the user, a program or time asks for it.
    ///
    /// # Errors
    /// The host fails: output cannot be written.
    pub fn keys(&mut self, mut wait: Duration) -> Result<Option<End>> {
        loop {
            if let Some(end) = self.typed(wait)? {
                return Ok(Some(end));
            }
            match monitor::attend(self) {
                Attended::GoOn => return Ok(None),
                Attended::End(end) => return Ok(Some(end)),
                Attended::Wait => wait = PAUSED,
            }
        }
    }

    fn typed(&mut self, wait: Duration) -> Result<Option<End>> {
        let waiting = Instant::now();
        let keys = self.serial.input(wait);
        self.outcome.waiting += waiting.elapsed();
        let (record, typed) = (&mut self.live.record, &mut self.outcome.typed);
        if let Some(end) = type_keys(self.machine, keys, record, typed)? {
            return Ok(Some(end));
        }
        if self.serial.raw.as_ref().is_some_and(Raw::ended) {
            return Ok(Some(End::Signal));
        }
        let limit = self.limits.timeout;
        let over = limit.is_some_and(|limit| self.started.elapsed() >= limit);
        Ok(over.then_some(End::Timeout))
    }

    /// Runs for at most `ticks`, and passes on what the guest sent.
    ///
    /// # Errors
    /// The host fails: output cannot be written.
    pub fn slice(&mut self, ticks: Tick) -> Result<Stop> {
        let target = self.machine.now().saturating_add(ticks);
        let target = target.min(self.limits.stop_at.unwrap_or(Tick::MAX));
        // A tick that has gone by.
        self.live.saves.take(self.machine, None);
        let target = target.min(self.live.saves.next_tick());
        let target = target.min(self.live.moves.tick());
        let texts = texts(self.limits, &self.live.saves, &self.live.moves);
        let until = self.limits.until(target, &texts, &self.live.dumps);
        self.live.record.runs(self.machine);
        let running = Instant::now();
        let mut stop = self.machine.run(&until)?;
        self.outcome.running += running.elapsed();
        self.live.record.ran(self.machine, &stop);
        self.outcome.stops += 1;
        self.live.events.take(self.machine)?;
        self.live.dumps.take(self.machine, &stop)?;
        if matches!(stop, Stop::VmExit { .. }) && !self.limits.breaks_at(&stop) {
            stop = Stop::Tick;
        }
        let seen = match stop {
            Stop::Text { index } => texts.get(index),
            _ => None,
        };
        let seen_text = seen.map(String::as_str);
        self.live.saves.take(self.machine, seen_text);
        self.live.moves.look(self.machine.now(), seen_text);
        if let (Some(seen), wanted) = (seen, &self.limits.stop_on)
            && !wanted.as_ref().is_some_and(|text| seen.ends_with(text))
        {
            stop = Stop::Tick;
        }
        self.serial.put(&self.machine.take_serial_output())?;
        debug_output(&self.machine.take_debug_output());
        let instructions = self.machine.instructions().unwrap_or(0);
        let rate = instructions as f64 / self.outcome.running.as_secs_f64().max(1e-9);
        self.progress.set(self.machine.now(), instructions, rate);
        Ok(stop)
    }

    /// What a stop means for the run; `None` where it goes on.
    ///
    /// # Errors
    /// The host behind the engine fails.
    pub fn end_of(&self, stop: &Stop) -> Result<Option<End>> {
        end_of(self.machine, stop, self.limits)
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// The host fails: output cannot be written.
    pub fn go_on(&mut self) -> Result<End> {
        let mut pace = Pace::start(self.machine.now());
        let mut slice = SLICE;
        let mut wait = Duration::ZERO;
        loop {
            let moving = self.live.moves.is_under_way();
            if let Some(end) = self.keys(if moving { Duration::ZERO } else { wait })? {
                return Ok(end);
            }
            if moving {
                match self.live.moves.step(self.machine, wait)? {
                    Step::Run => {}
                    Step::Rest => continue,
                    Step::Back(unprinted) => {
                        self.serial.put(&unprinted.serial)?;
                        debug_output(&unprinted.debug);
                    }
                    Step::End(end) => return Ok(end),
                }
                wait = pause(&mut pace, self.machine.now(), self.limits, self.started);
                if !wait.is_zero() && self.serial.is_open() {
                    // The guest is ahead of real time; the move has this time.
                    continue;
                }
            }
            let paced = self.serial.is_open();
            let before = self.machine.instructions();
            let ticks = match (moving, paced) {
                (true, _) => MOVING_SLICE,
                (false, true) => TYPING_SLICE,
                (false, false) => slice,
            };
            let stop = self.slice(ticks)?;
            if let Some(end) = self.end_of(&stop)? {
                return Ok(end);
            }
            // A machine that only sleeps is taken along in ever larger steps, to its end of time.
            let asleep = before == self.machine.instructions() && !paced;
            slice = if asleep {
                slice.saturating_mul(2)
            } else {
                SLICE
            };
            wait = if paced {
                pause(&mut pace, self.machine.now(), self.limits, self.started)
            } else {
                Duration::ZERO
            };
        }
    }
}

/// Runs `machine` to its end.
///
/// # Errors
/// The host fails: output cannot be written.
pub fn drive(
    machine: &mut Machine,
    serial: &mut Serial,
    limits: &Limits,
    live: &mut Live,
    gdb: Option<&Listener>,
) -> Result<Outcome> {
    let mut run = Run::new(machine, serial, limits, live);
    let end = match gdb {
        Some(listener) => listener.serve(&mut run)?,
        None => None,
    };
    run.outcome.end = match end {
        Some(end) => end,
        None => run.go_on()?,
    };
    Ok(run.outcome)
}

/// How long to wait before the guest goes on.
fn pause(pace: &mut Pace, now: Tick, limits: &Limits, started: Instant) -> Duration {
    let ahead = pace.ahead(now);
    if ahead < AHEAD {
        return Duration::ZERO;
    }
    match limits.timeout {
        Some(limit) => ahead.min(limit.saturating_sub(started.elapsed())),
        None => ahead,
    }
}

fn type_keys(
    machine: &mut Machine,
    keys: Vec<Key>,
    record: &mut Recording,
    typed: &mut Vec<(Tick, Vec<u8>)>,
) -> Result<Option<End>> {
    for key in keys {
        match key {
            Key::Quit => return Ok(Some(End::Quit)),
            Key::Help => {
                let mut out = stdout().lock();
                out.write_all(HELP.as_bytes()).and_then(|()| out.flush())?;
            }
            Key::Bytes(bytes) => {
                record.typed(machine, &bytes);
                typed.push((machine.now(), bytes));
            }
        }
    }
    Ok(None)
}

/// What the guest writes to port E9H. Nobody can be told when stderr is gone.
pub fn debug_output(bytes: &[u8]) {
    if !bytes.is_empty() {
        let _ = stderr().write_all(bytes);
    }
}

fn end_of(machine: &Machine, stop: &Stop, limits: &Limits) -> Result<Option<End>> {
    Ok(Some(match stop {
        Stop::Tick if limits.stop_at.is_some_and(|at| machine.now() >= at) => End::Tick,
        Stop::Tick => return Ok(None),
        Stop::Text { .. } => End::Text,
        Stop::PoweredOff => End::PowerOff,
        Stop::Reset => End::Reset,
        Stop::Exit { value } => End::DebugExit(*value),
        Stop::TripleFault { vcpu } => {
            let state = machine.read_vcpu(*vcpu)?;
            let mut code = [0; 2];
            let _ = machine.peek_virtual(*vcpu, dump::code_address(&state), &mut code);
            if is_deliberate(&state, &code) && !limits.breaks_on_triple_fault() {
                End::TripleFaultReset
            } else {
                End::TripleFault { vcpu: *vcpu }
            }
        }
        Stop::VmxAbort { vcpu, indicator } => End::VmxAbort {
            vcpu: *vcpu,
            indicator: *indicator,
        },
        Stop::Unimplemented { vcpu, what, rip } => End::Unimplemented {
            vcpu: *vcpu,
            what: what.clone(),
            rip: *rip,
        },
        Stop::Idle => End::Idle,
        Stop::VmExit {
            vcpu,
            reason,
            number,
        } => End::VmExit {
            vcpu: *vcpu,
            reason: ExitReason(*reason),
            number: *number,
        },
        Stop::EntryFailed { vcpu } => End::EntryFailed { vcpu: *vcpu },
        _ => return Ok(None),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_guest_is_not_caught_up_later() {
        let mut pace = Pace {
            tick: 0,
            at: Instant::now() - Duration::from_secs(10),
        };
        assert_eq!(pace.ahead(1_000_000_000), Duration::ZERO);
        // From here on time counts anew: one second later in the guest is one second ahead.
        let ahead = pace.ahead(2_000_000_000);
        assert!(ahead > Duration::from_millis(900), "{ahead:?}");
    }
}
