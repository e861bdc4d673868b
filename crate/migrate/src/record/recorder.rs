//! Writing a recording while the machine runs.

use std::io::Write;

use hypernest_machine::{EngineError, Machine, Stop};

use super::log::{Event, INPUT, KEYFRAME, STOP, VERSION};
use super::{
    Counted, Entry, Input, InputError, KEYFRAME_EVERY, Moment, exits, instructions, settle,
};
use crate::section::{Kind, SectionError, SectionWriter};
use crate::snapshot::{self, Options, SnapshotError};

/// Names what follows: a snapshot, then the log.
pub(super) const RECORDING: &str = "recording";

/// A recording cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The start cannot be written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// What came cannot be written.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The machine's engine cannot make a run again, or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The machine refuses the input; nothing was written.
    #[error(transparent)]
    Input(#[from] InputError),
    /// Its engine does not do the same every time.
    #[error("the {0} engine does not do the same every time; record with the software engine")]
    Inexact(&'static str),
}

/// Writes what comes to a machine. Whoever runs the machine tells it of every input and of every stop.
pub struct Recorder<W: Write> {
    log: SectionWriter<W>,
    exits: Counted,
    /// Instructions of the machine at which a keyframe is due.
    due: u64,
    every: u64,
    breakpoint: Option<u64>,
    /// Of the machine, with all that are written down.
    flushes: u64,
}

/// Writes the beginning of a recording: `to` holds the machine as it is now, and goes on with the log.
///
/// # Errors
/// When the machine's engine does not do the same every time, or `to` fails.
pub fn begin<W: Write>(
    machine: &mut Machine,
    mut to: W,
    options: &Options,
) -> Result<Recorder<W>, RecordError> {
    if !machine.capabilities().exact_ticks {
        return Err(RecordError::Inexact(machine.engine_name()));
    }
    settle(machine)?;
    let mut head = SectionWriter::new(&mut to, Kind::Recording)?;
    head.required(RECORDING, VERSION, &[])?;
    head.finish()?;
    snapshot::write(machine, &mut to, options)?;
    to.flush().map_err(SectionError::from)?;
    machine.keep_hashes(true)?;
    Ok(Recorder {
        log: SectionWriter::bare(to),
        exits: Counted {
            machine: exits(machine),
            run: 0,
        },
        due: instructions(machine) + KEYFRAME_EVERY,
        every: KEYFRAME_EVERY,
        breakpoint: None,
        flushes: machine.flushes(),
    })
}

impl<W: Write> Recorder<W> {
    /// Makes a keyframe every so many instructions, at the next stop after them.
    pub fn keyframe_every(mut self, instructions: u64) -> Self {
        let every = instructions.max(1);
        self.due = self.due - self.every + every;
        self.every = every;
        self
    }

    /// To be called before each run of the machine: where it was saved since the last call, by whomever, that is
    /// written down as a keyframe.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn runs(&mut self, machine: &mut Machine) -> Result<(), RecordError> {
        if machine.flushes() != self.flushes {
            self.keyframe(machine)?;
        }
        Ok(())
    }

    /// To be called after each run of the machine. Makes a keyframe where one is due.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn ran(&mut self, machine: &mut Machine, stop: &Stop) -> Result<(), RecordError> {
        self.breakpoint = match stop {
            Stop::Breakpoint { rip, .. } => Some(*rip),
            _ => None,
        };
        if instructions(machine) >= self.due && !stop.is_end() {
            self.keyframe(machine)?;
        }
        Ok(())
    }

    /// Gives an input to the machine, and writes it down.
    ///
    /// # Errors
    /// When the machine refuses it, or it cannot be written.
    pub fn input(&mut self, machine: &mut Machine, input: Input) -> Result<(), RecordError> {
        self.runs(machine)?;
        let at = self.moment(machine)?;
        input.apply(machine)?;
        self.write(INPUT, at, Event::Input(input))
    }

    /// Saves the machine, and writes down its hash.
    ///
    /// # Errors
    /// When it cannot be written, or the engine fails.
    pub fn keyframe(&mut self, machine: &mut Machine) -> Result<(), RecordError> {
        let at = self.moment(machine)?;
        machine.flush();
        self.flushes = machine.flushes();
        let hash = machine.kept_hash()?;
        self.due = instructions(machine) + self.every;
        self.write(KEYFRAME, at, Event::Keyframe { hash })
    }

    /// Ends the recording, and gives back where it went.
    ///
    /// # Errors
    /// When it cannot be written, or the engine fails.
    pub fn finish(mut self, machine: &mut Machine) -> Result<W, RecordError> {
        self.runs(machine)?;
        let at = self.moment(machine)?;
        let hash = machine.kept_hash()?;
        machine.keep_hashes(false)?;
        self.write(STOP, at, Event::Stop { hash })?;
        Ok(self.log.finish()?)
    }

    fn moment(&mut self, machine: &mut Machine) -> Result<Moment, RecordError> {
        settle(machine)?;
        Ok(Moment {
            tick: machine.now(),
            exits: self.exits.now(exits(machine)),
            breakpoint: self.breakpoint,
        })
    }

    fn write(&mut self, name: &'static str, at: Moment, event: Event) -> Result<(), RecordError> {
        let content = Entry { at, event }.to_bytes(name)?;
        self.log.required(name, VERSION, &content)?;
        // What was not written when the program is killed is lost.
        Ok(self.log.flush()?)
    }
}
