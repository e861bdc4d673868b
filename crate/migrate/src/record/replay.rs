//! Making a recorded run again, and going to any moment of it.

use hypernest_machine::{
    EngineError, Machine, Mark, MarkError, Ram, RestoreError, Stop, Tick, Until,
};

use super::frames::{FrameCounts, Frames};
use super::log::{Event, Log};
use super::{Counted, InputError, Moment, exits, instructions, settle};
use crate::pages::PAGE;

/// A run cannot be made again as it was, or not as far as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The machine is not what it was.
    #[error(
        "keyframe {number} at tick {tick} differs: the recording has hash {recorded:016x}, this run {here:016x}. \
         It was recorded by another version, or this machine is not the one recorded"
    )]
    Differs {
        /// Which keyframe, from 1; the end is one more.
        number: usize,
        /// Its tick.
        tick: Tick,
        /// The hash there.
        recorded: u64,
        /// The hash here.
        here: u64,
    },
    /// The machine does not come to where an entry of the recording was.
    #[error(
        "the run does not come to entry {number} of the recording, at tick {tick}: it is at tick {now}"
    )]
    Lost {
        /// Which entry, from 1.
        number: usize,
        /// Its tick.
        tick: Tick,
        /// Where the run is.
        now: Tick,
    },
    /// An input of the recording that the machine refuses.
    #[error("entry {number} of the recording does not fit its machine: {error}")]
    Input {
        /// Which entry, from 1.
        number: usize,
        /// Why.
        error: InputError,
    },
    /// Past the end.
    #[error("the recording ends at tick {end}, before {wanted}")]
    Beyond {
        /// Where it ends.
        end: Tick,
        /// What was asked for.
        wanted: String,
    },
    /// Before the start.
    #[error("the recording starts at tick {start}: there is nothing before it")]
    Before {
        /// Where it starts.
        start: Tick,
    },
    /// The machine cannot be brought back.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// The machine cannot be brought back.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The engine fails.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// How far to go.
#[derive(Clone, Copy)]
enum Goal {
    /// To this tick, before what came at it.
    Tick(Tick),
    /// To just after this exit.
    Exit(u64),
    /// Through all of the recording.
    End,
}

/// A recorded run that is made again.
pub struct Replay {
    machine: Machine,
    log: Log,
    /// The entry that comes next.
    next: usize,
    exits: Counted,
    instructions: Counted,
    start: Moment,
    mark: Mark,
    frames: Frames,
    /// Keyframes whose hashes were compared.
    compared: usize,
    /// Just after the exit of this number.
    at_exit: Option<u64>,
    /// The moment of an entry, where nothing has run since.
    standing: Option<Moment>,
}

impl Replay {
    /// Begins at the start: `machine` is the one of the recording's snapshot, just made. At most `budget` bytes are used
    /// for keyframes; beside them the machine keeps a copy of each page before its first change.
    ///
    /// # Errors
    /// When the machine's engine cannot go back.
    pub fn new(mut machine: Machine, log: Log, budget: usize) -> Result<Replay, ReplayError> {
        let mark = machine.mark()?;
        machine.track_dirty(true)?;
        machine.keep_hashes(true)?;
        let counted = |machine| Counted { machine, run: 0 };
        let start = Moment {
            tick: machine.now(),
            exits: 0,
            breakpoint: None,
        };
        Ok(Replay {
            exits: counted(exits(&machine)),
            instructions: counted(instructions(&machine)),
            frames: Frames::new(start, machine.state()?, budget),
            machine,
            log,
            next: 0,
            start,
            mark,
            compared: 0,
            at_exit: None,
            standing: None,
        })
    }

    /// The machine, where the run is now. Whoever runs it or changes it by other means loses the run.
    pub fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// The recording.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Machine time now.
    pub fn now(&self) -> Tick {
        self.machine.now()
    }

    /// VM exits of the run so far.
    pub fn exits(&self) -> u64 {
        self.exits.now(exits(&self.machine))
    }

    /// Instructions of the run so far.
    pub fn instructions(&self) -> u64 {
        self.instructions.now(instructions(&self.machine))
    }

    /// Keyframes in memory.
    pub fn frames(&self) -> FrameCounts {
        self.frames.counts()
    }

    /// Keyframes whose hashes were found equal, each time the run came to them.
    pub fn compared(&self) -> usize {
        self.compared
    }

    // ---- going somewhere ----

    /// Goes to a tick, before what came at it.
    ///
    /// # Errors
    /// When it is outside of the recording, or the run differs.
    pub fn to_tick(&mut self, tick: Tick) -> Result<(), ReplayError> {
        let start = self.start.tick;
        if tick < start {
            return Err(ReplayError::Before { start });
        }
        let frame = self.frames.last(|frame| frame.at.tick <= tick);
        let here = self.now() <= tick && self.next >= self.frames.get(frame).next;
        if !here {
            self.go_to_frame(frame)?;
        }
        self.go_on(Goal::Tick(tick))
    }

    /// Goes to just after a VM exit, counted from 1 since the start of the recording.
    ///
    /// # Errors
    /// When the recording has no such exit, or the run differs.
    pub fn to_exit(&mut self, number: u64) -> Result<(), ReplayError> {
        if number == 0 {
            let start = self.start.tick;
            return Err(ReplayError::Before { start });
        }
        let frame = self.frames.last(|frame| frame.at.exits < number);
        let here = self.exits() < number && self.next >= self.frames.get(frame).next;
        if !here {
            self.go_to_frame(frame)?;
        }
        self.go_on(Goal::Exit(number))
    }

    /// Goes to the end, and compares all hashes on the way.
    ///
    /// # Errors
    /// When the run differs.
    pub fn to_end(&mut self) -> Result<(), ReplayError> {
        self.go_on(Goal::End)
    }

    /// Goes to where something came next, and lets it come. False at the end.
    ///
    /// # Errors
    /// When the run differs.
    pub fn to_next_entry(&mut self) -> Result<bool, ReplayError> {
        let Some(entry) = self.log.entries.get(self.next) else {
            return Ok(false);
        };
        let at = entry.at;
        self.reach(at)?;
        self.take()?;
        Ok(true)
    }

    /// Goes on by so many instructions.
    ///
    /// # Errors
    /// When the recording ends before, or the run differs.
    pub fn step(&mut self, instructions: u64) -> Result<(), ReplayError> {
        let wanted = self.instructions().saturating_add(instructions);
        self.execute_until(wanted, Tick::MAX)
    }

    /// Goes back by so many instructions: to before the last one that was executed, and so on.
    ///
    /// # Errors
    /// When the recording starts after that, or the run differs.
    pub fn step_back(&mut self, instructions: u64) -> Result<(), ReplayError> {
        let Some(wanted) = self.instructions().checked_sub(instructions) else {
            let start = self.start.tick;
            return Err(ReplayError::Before { start });
        };
        if instructions == 0 {
            return Ok(());
        }
        let now = self.now();
        let frame = self
            .frames
            .last(|frame| frame.instructions <= wanted && frame.at.tick < now);
        self.go_to_frame(frame)?;
        self.execute_until(wanted, now)?;
        // Idle time is passed over, up to the instruction that follows.
        while let Some(tick) = self.wakes().filter(|_| self.now() < now - 1) {
            self.go_on(Goal::Tick(tick.min(now - 1)))?;
        }
        Ok(())
    }

    /// Goes on until so many instructions are executed, where that is before a tick.
    fn execute_until(&mut self, wanted: u64, before: Tick) -> Result<(), ReplayError> {
        while self.instructions() < wanted && self.now() < before {
            // An instruction takes a tick, and only idle time takes more.
            let next = match self.wakes() {
                Some(tick) => tick.max(self.now() + 1),
                None => self.now().saturating_add(wanted - self.instructions()),
            };
            self.go_on(Goal::Tick(next.min(before)))?;
        }
        Ok(())
    }

    /// Goes back to just after the VM exit before; where the run stands just after one, to the one before that.
    ///
    /// # Errors
    /// When there is none, or the run differs.
    pub fn step_back_exit(&mut self) -> Result<(), ReplayError> {
        let exits = self.exits();
        let standing = self.at_exit == Some(exits);
        self.to_exit(exits - u64::from(standing && exits > 0))
    }

    /// While nothing is executed: the tick at which something may be again.
    fn wakes(&self) -> Option<Tick> {
        let wakes = self.machine.waits_until()?;
        // Input is the only thing that wakes it, or comes first.
        let input = self.log.entries.get(self.next).map(|entry| entry.at.tick);
        Some(input.map_or(wakes, |input| input.min(wakes).max(self.now() + 1)))
    }

    // ---- how ----

    fn go_to_frame(&mut self, number: usize) -> Result<(), ReplayError> {
        self.machine.go_back(&self.mark)?;
        let frame = self.frames.get(number);
        let ram = self.machine.ram_mut();
        self.frames.pages(number, |page, bytes| {
            // A page of this machine, which was read from it.
            let _ = ram.write(address(page), bytes);
        });
        self.machine.restore(&frame.state)?;
        self.machine.take_dirty();
        self.next = frame.next;
        self.exits = Counted {
            machine: exits(&self.machine),
            run: frame.at.exits,
        };
        self.instructions = Counted {
            machine: instructions(&self.machine),
            run: frame.instructions,
        };
        self.at_exit = None;
        self.standing = Some(frame.at);
        Ok(())
    }

    fn go_on(&mut self, goal: Goal) -> Result<(), ReplayError> {
        loop {
            if let Goal::Exit(number) = goal
                && self.exits() >= number
            {
                return Ok(());
            }
            let entry = self.log.entries.get(self.next).map(|entry| entry.at);
            let before = |at: &Moment| match goal {
                Goal::Tick(tick) => at.tick < tick,
                Goal::Exit(number) => at.exits < number,
                Goal::End => true,
            };
            if entry.is_some_and(|at| before(&at)) {
                self.to_next_entry()?;
                continue;
            }
            return match goal {
                Goal::Tick(tick)
                    if entry.is_none() && self.log.end().is_none_or(|at| at.tick < tick) =>
                {
                    Err(self.beyond(format!("tick {tick}")))
                }
                Goal::Tick(tick) => self.run_to_tick(tick),
                Goal::Exit(number) => self.run_to_exit(number, entry.map(|at| at.tick)),
                Goal::End => Ok(()),
            };
        }
    }

    fn beyond(&self, wanted: String) -> ReplayError {
        let end = self.log.end().map_or(self.start.tick, |at| at.tick);
        ReplayError::Beyond { end, wanted }
    }

    fn run(&mut self, until: &Until) -> Result<Stop, ReplayError> {
        self.at_exit = None;
        self.standing = None;
        Ok(self.machine.run(until)?)
    }

    fn run_to_tick(&mut self, tick: Tick) -> Result<(), ReplayError> {
        if self.now() >= tick {
            return Ok(());
        }
        loop {
            let stop = self.run(&Until::tick(tick))?;
            if self.now() >= tick {
                return Ok(());
            }
            if stop.is_end() || stop == Stop::Idle {
                return Err(ReplayError::Beyond {
                    end: self.now(),
                    wanted: format!("tick {tick}"),
                });
            }
        }
    }

    /// `latest`: the exit is at or before this tick.
    fn run_to_exit(&mut self, number: u64, latest: Option<Tick>) -> Result<(), ReplayError> {
        let latest = match latest.or(self.log.end().map(|at| at.tick)) {
            // Exits at the tick itself have no tick of their own.
            Some(tick) => tick.saturating_add(1),
            None => return Err(self.beyond(format!("VM exit {number}"))),
        };
        let until = Until::tick(latest).vm_exit_number(self.exits.of_machine(number));
        while self.exits() < number {
            let stop = self.run(&until)?;
            let over = self.now() >= latest || stop.is_end() || stop == Stop::Idle;
            if over && self.exits() < number {
                return Err(self.beyond(format!("VM exit {number}")));
            }
        }
        self.at_exit = Some(number);
        Ok(())
    }

    /// Goes to where an entry of the log was.
    fn reach(&mut self, at: Moment) -> Result<(), ReplayError> {
        if self.standing == Some(at) {
            return Ok(());
        }
        if !self.try_reach(at)? {
            return Err(ReplayError::Lost {
                number: self.next + 1,
                tick: at.tick,
                now: self.now(),
            });
        }
        settle(&mut self.machine)?;
        self.standing = Some(at);
        Ok(())
    }

    fn try_reach(&mut self, at: Moment) -> Result<bool, ReplayError> {
        while self.now() < at.tick {
            let stop = self.run(&Until::tick(at.tick))?;
            if (stop.is_end() || stop == Stop::Idle) && self.now() < at.tick {
                return Ok(false);
            }
        }
        if self.exits() < at.exits {
            let until = Until::tick(at.tick.saturating_add(1))
                .vm_exit_number(self.exits.of_machine(at.exits));
            self.run(&until)?;
        }
        if let Some(rip) = at.breakpoint {
            self.run(&Until::tick(at.tick.saturating_add(1)).breakpoint(rip))?;
        }
        Ok(self.now() == at.tick && self.exits() == at.exits)
    }

    /// Lets happen what comes next, here.
    fn take(&mut self) -> Result<(), ReplayError> {
        let number = self.next + 1;
        let entry = &self.log.entries[self.next];
        match &entry.event {
            Event::Input(input) => input
                .apply(&mut self.machine)
                .map_err(|error| ReplayError::Input { number, error })?,
            Event::Keyframe { hash } => {
                self.machine.flush();
                let (recorded, here) = (*hash, self.machine.kept_hash()?);
                self.compare(recorded, here)?;
                self.keep()?;
            }
            Event::Stop { hash } => {
                let (recorded, here) = (*hash, self.machine.kept_hash()?);
                self.compare(recorded, here)?;
            }
        }
        self.next += 1;
        Ok(())
    }

    fn compare(&mut self, recorded: u64, here: u64) -> Result<(), ReplayError> {
        if recorded == here {
            self.compared += 1;
            return Ok(());
        }
        let before = self.log.entries[..self.next].iter();
        let keyframes = before.filter(|entry| matches!(entry.event, Event::Keyframe { .. }));
        Err(ReplayError::Differs {
            number: keyframes.count() + 1,
            tick: self.now(),
            recorded,
            here,
        })
    }

    /// Keeps this moment as a frame.
    fn keep(&mut self) -> Result<(), ReplayError> {
        let written = self.machine.take_dirty();
        let next = self.next + 1;
        if self.frames.has(next) {
            return Ok(());
        }
        let at = self.log.entries[self.next].at;
        let (state, instructions) = (self.machine.state()?, self.instructions());
        let ram = self.machine.ram();
        self.frames
            .add((at, instructions, next), state, &written, ram);
        Ok(())
    }
}

/// Guest-physical address of a page of RAM.
fn address(page: u32) -> u64 {
    let offset = u64::from(page) * PAGE as u64;
    if offset < Ram::HOLE_START {
        offset
    } else {
        offset - Ram::HOLE_START + Ram::HOLE_END
    }
}
