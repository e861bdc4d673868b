//! What came to a machine, as it is read from a recording.

use std::io::Read;

use serde::{Deserialize, Serialize};

use super::recorder::RECORDING;
use super::{Input, Moment};
use crate::section::{Kind, SectionError, SectionReader, damaged};

pub(super) const VERSION: u16 = 1;
pub(super) const INPUT: &str = "input";
pub(super) const KEYFRAME: &str = "keyframe";
pub(super) const STOP: &str = "stop";

/// Most bytes of a log that are read: a year of typing.
pub const MOST_LOG: usize = 1 << 30;

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When.
    pub at: Moment,
    /// What.
    pub event: Event,
}

/// What happens to a machine from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Something came.
    Input(Input),
    /// It was saved.
    Keyframe {
        /// Its hash.
        hash: u64,
    },
    /// The recording ended.
    Stop {
        /// Its hash.
        hash: u64,
    },
}

impl Entry {
    pub(super) fn to_bytes(&self, name: &str) -> Result<Vec<u8>, SectionError> {
        postcard::to_allocvec(self).map_err(|error| damaged(name, error))
    }
}

/// A recording cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// It is none, or damaged.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// Something came before what came before it.
    #[error("it is damaged: entry {number} is of tick {tick}, before the one before it")]
    Order {
        /// Which entry, from 1.
        number: usize,
        /// Its tick.
        tick: u64,
    },
    /// Too much of it.
    #[error("it has more than {MOST_LOG} bytes of input")]
    TooLong,
}

/// Everything that came to a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// In order.
    pub entries: Vec<Entry>,
    /// It ends where the recording was ended, and not where it was cut.
    pub whole: bool,
}

impl Log {
    /// Reads the beginning of a recording. A snapshot follows in `from`, then what [`Log::read`] reads.
    ///
    /// # Errors
    /// When it is no recording that this build reads.
    pub fn open(from: impl Read) -> Result<(), LogError> {
        let mut reader = SectionReader::new(from, Kind::Recording)?;
        let mut content = Vec::new();
        while let Some(head) = reader.next(&mut content)? {
            match head.name.as_str() {
                RECORDING => head.check_version(VERSION)?,
                _ => head.pass_over()?,
            }
        }
        Ok(())
    }

    /// Reads the log. What was cut off its end is not missed.
    ///
    /// # Errors
    /// When it is damaged, or longer than [`MOST_LOG`].
    pub fn read(from: impl Read) -> Result<Log, LogError> {
        let mut reader = SectionReader::bare(from);
        let mut log = Log::default();
        let mut content = Vec::new();
        let mut bytes = 0usize;
        loop {
            let head = match reader.next(&mut content) {
                Ok(Some(head)) => head,
                Ok(None) => {
                    log.whole = true;
                    return Ok(log);
                }
                Err(SectionError::Cut(_)) => return Ok(log),
                Err(error) => return Err(error.into()),
            };
            if !matches!(head.name.as_str(), INPUT | KEYFRAME | STOP) {
                head.pass_over()?;
                continue;
            }
            head.check_version(VERSION)?;
            bytes += content.len();
            if bytes > MOST_LOG {
                return Err(LogError::TooLong);
            }
            let entry: Entry =
                postcard::from_bytes(&content).map_err(|error| damaged(&head.name, error))?;
            let fits = matches!(
                (&entry.event, head.name.as_str()),
                (Event::Input(_), INPUT)
                    | (Event::Keyframe { .. }, KEYFRAME)
                    | (Event::Stop { .. }, STOP)
            );
            if !fits {
                return Err(damaged(&head.name, "it holds something else").into());
            }
            log.push(entry)?;
        }
    }

    /// Adds what happened last.
    ///
    /// # Errors
    /// When it happened before something else, or after the end.
    pub fn push(&mut self, entry: Entry) -> Result<(), LogError> {
        let number = self.entries.len() + 1;
        let tick = entry.at.tick;
        if let Some(last) = self.entries.last() {
            let ended = matches!(last.event, Event::Stop { .. });
            if ended || (entry.at.tick, entry.at.exits) < (last.at.tick, last.at.exits) {
                return Err(LogError::Order { number, tick });
            }
        }
        self.entries.push(entry);
        Ok(())
    }

    /// The last moment that is known of.
    pub fn end(&self) -> Option<Moment> {
        self.entries.last().map(|entry| entry.at)
    }

    /// How many keyframes there are.
    pub fn keyframes(&self) -> usize {
        let keyframe = |entry: &&Entry| matches!(entry.event, Event::Keyframe { .. });
        self.entries.iter().filter(keyframe).count()
    }
}
