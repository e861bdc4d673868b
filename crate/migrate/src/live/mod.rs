//! Live migration: a running machine goes from one process to another.
//!
//! [`Source`] and [`Destination`] are state machines. They are fed the bytes that arrived and the time, and give
//! bytes to send and what to do with the machine; whoever calls them has the link, be it a socket, a file, a pipe or
//! a browser's messages. Each side is one loop:
//!
//! ```text
//! loop {
//!     side.receive(what arrived);            or side.closed()
//!     next = side.poll(.., now);             do what it says
//!     link.write(side.output()); side.sent(what the link took);
//! }
//! ```
//!
//! Until the source has sent its commit it owns the machine and goes on with it whatever happens; once the commit has
//! arrived the destination owns it. A link that breaks between the two leaves an undecided pair, which
//! [`record`] keeps and settles. `docs/migration.md` has the protocol as a table.

mod batch;
mod destination;
mod frame;
mod message;
mod pace;
mod pending;
pub mod record;
mod source;

use hypernest_machine::{Machine, MachineState, hash};
use serde::{Deserialize, Serialize};

use crate::{state_from_bytes, state_to_bytes};

pub use batch::BatchError;
pub use destination::{Destination, DestinationNext};
pub use frame::FrameError;
pub use message::{MessageError, VERSION};
pub use source::{Source, SourceNext};

/// A peer may announce at most so many microseconds of silence.
const MOST_WAIT: u64 = 120_000_000;

/// How a migration is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes per second at most.
    pub bandwidth: Option<u64>,
    /// Microseconds for which the machine may stand still; what the source aims at.
    pub downtime: u64,
    /// Microseconds without a sign of life after which the peer is taken for dead.
    pub silence: u64,
    /// Nothing comes back: a file, a pipe. The destination of such a stream notices by itself.
    pub one_way: bool,
    /// What the source shows and the destination demands, where it is not empty.
    pub token: Vec<u8>,
    /// Store the machine before it changes hands: the source before its commit, the destination before it is ready.
    pub store: bool,
    /// Bytes of a machine's state, its disks' overlays included, that a destination takes at most.
    pub most_state: u64,
}

impl Default for Settings {
    /// No limit, 20 ms, 10 s, with answers, no token, nothing stored, 4 GiB.
    fn default() -> Settings {
        Settings {
            bandwidth: None,
            downtime: 20_000,
            silence: 10_000_000,
            one_way: false,
            token: Vec::new(),
            store: false,
            most_state: 4 << 30,
        }
    }
}

/// What a side of a migration is known by. Both numbers come from the caller's random source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Names the migration; the source's counts.
    pub id: u64,
    /// What a side tells once it has given up the machine, and never before. With it the other may keep its own.
    pub release: u64,
}

/// What a release code is checked with: it can be told before.
pub fn lock(identity: &Identity) -> u64 {
    hash::bytes(identity.id, &identity.release.to_le_bytes())
}

/// Why a migration did not happen. Each is one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The link is gone.
    #[error("the link to the other side broke")]
    Closed,
    /// The other side says nothing any more.
    #[error("the other side has been silent for {} s", .0 / 1_000_000)]
    Silent(u64),
    /// The other side cannot take this machine.
    #[error("the other side cannot take this machine: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    Peer(String),
    /// What the other side sends is not right.
    #[error("the other side cannot be understood: {0}")]
    Message(#[from] MessageError),
    /// A message that does not belong there.
    #[error("the other side sent its message {0} out of turn")]
    Order(&'static str),
    /// Pages that cannot be.
    #[error("the other side sent what cannot be: {0}")]
    Batch(#[from] BatchError),
    /// It has dealt with what it was never sent.
    #[error("the other side acknowledges what it was not sent")]
    Acknowledged,
    /// More state than this side takes.
    #[error("the other side sent more than {0} bytes of state")]
    TooLong(u64),
    /// RAM or state arrived as something else.
    #[error("the machine that arrived is not the one that was sent: its {0} differs")]
    Differs(&'static str),
    /// The state does not fit the machine that was built for it.
    #[error("the state that arrived cannot be taken up: {0}")]
    State(String),
    /// The shared secret is not the one that is demanded.
    #[error("the token is not the one that is demanded here")]
    Token,
    /// This side cannot take the machine.
    #[error("refused here: {}", .0.join("; "))]
    Unfit(Vec<String>),
    /// The machine could not be stored.
    #[error("the machine cannot be stored: {0}")]
    Store(String),
    /// The engine does not do what is needed.
    #[error("the machine cannot be moved: {0}")]
    Engine(String),
    /// Someone here gave it up.
    #[error("given up: {0}")]
    Cancelled(String),
    /// The host has no memory.
    #[error("the host has no memory for it")]
    Memory,
}

impl From<FrameError> for Failure {
    fn from(error: FrameError) -> Failure {
        Failure::Message(error.into())
    }
}

/// What the guest had sent before the machine stopped, and nobody had taken yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unprinted {
    /// Serial port.
    pub serial: Vec<u8>,
    /// Virtio consoles.
    pub console: Vec<u8>,
    /// Debug port.
    pub debug: Vec<u8>,
}

impl Unprinted {
    fn take(machine: &mut Machine) -> Unprinted {
        Unprinted {
            serial: machine.take_serial_output(),
            console: machine.take_console_output(),
            debug: machine.take_debug_output(),
        }
    }
}

/// A round of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Pages that were sent in some form.
    pub pages: u64,
    /// Of these, with their content.
    pub contents: u64,
    /// Bytes they took.
    pub bytes: u64,
    /// Time they took.
    pub micros: u64,
}

/// How far a source is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rounds that are over; the last one is that after the stop.
    pub rounds: Vec<Round>,
    /// The one under way.
    pub round: Round,
    /// Bytes that were sent in all.
    pub bytes: u64,
    /// Bytes per second of the link, where that is known.
    pub rate: Option<u64>,
    /// The guest's share of the time at most, in percent.
    pub share: u32,
    /// What the downtime was expected to be after the last round, in microseconds.
    pub expected: u64,
    /// For how long no machine ran, until the destination said that it owns it, in microseconds.
    pub downtime: u64,
    /// All of it.
    pub micros: u64,
    began: u64,
}

impl Progress {
    fn new(now: u64) -> Progress {
        Progress {
            began: now,
            share: 100,
            ..Progress::default()
        }
    }

    fn end(&mut self, stopped: u64, now: u64) {
        self.downtime = now.saturating_sub(stopped);
        self.micros = now.saturating_sub(self.began);
    }

    /// Bytes that a page has taken so far, on average.
    fn bytes_per_page(&self) -> u64 {
        let bytes: u64 = self.rounds.iter().map(|round| round.bytes).sum();
        let pages: u64 = self.rounds.iter().map(|round| round.pages).sum();
        bytes.checked_div(pages).unwrap_or(0).max(64)
    }
}

/// What state messages hold together.
#[derive(Serialize, Deserialize)]
struct Packed {
    /// In the form of [`state_to_bytes`].
    state: Vec<u8>,
    unprinted: Unprinted,
}

/// The state of a machine and what was not printed yet, as bytes.
fn state_bytes(machine: &Machine, unprinted: &Unprinted) -> Result<Vec<u8>, String> {
    let state = machine.state().map_err(|error| error.to_string())?;
    let state = state_to_bytes(&state).map_err(|error| error.to_string())?;
    let packed = Packed {
        state,
        unprinted: unprinted.clone(),
    };
    postcard::to_allocvec(&packed).map_err(|error| error.to_string())
}

fn read_state(bytes: &[u8], machine: &Machine) -> Result<(MachineState, Unprinted), Failure> {
    let Ok((packed, [])) = postcard::take_from_bytes::<Packed>(bytes) else {
        return Err(Failure::State("it cannot be read".into()));
    };
    match state_from_bytes(&packed.state, &machine.disks()) {
        Ok(state) => Ok((state, packed.unprinted)),
        Err(error) => Err(Failure::State(error.to_string())),
    }
}
