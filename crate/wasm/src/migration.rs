//! Live migration as a page drives it: both sides fed with bytes and the time, judged and built here.
//!
//! The page's links are a WebSocket, a `MessagePort` and a `BroadcastChannel`; they are the Worker's.

use hypernest_machine::{Machine, VmxLayouts};
use hypernest_migrate::hello::{Choices, Host, Offer, Reason, refusals};
use hypernest_migrate::live::{
    self, Destination, DestinationNext, Failure, Identity, Progress, Settings, SourceNext,
};
use serde::{Deserialize, Serialize};

use crate::guest::{Guest, MAX_MEMORY};

/// How a migration is to go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// What a source shows and a destination demands; nothing where it is left out.
    #[serde(default)]
    pub token: String,
    /// Bytes per second at most.
    #[serde(default)]
    pub bandwidth: Option<u64>,
}

impl Options {
    fn settings(&self) -> Settings {
        Settings {
            bandwidth: self.bandwidth,
            token: self.token.clone().into_bytes(),
            // A tab has nowhere to store a machine.
            store: false,
            most_state: MAX_MEMORY,
            ..Settings::default()
        }
    }
}

/// What the page does next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Next {
    /// Let the machine run for some milliseconds, then ask again.
    Run,
    /// Ask again when bytes have arrived, or after so many microseconds. The machine does not run.
    Wait {
        /// At most.
        micros: u64,
    },
    /// The machine is the other side's: it does not run here any more.
    HandedOver,
    /// The machine is this side's: it runs here from now on.
    Own,
    /// It did not happen. A source goes on with its machine; a destination has none.
    Failed {
        /// Each in one line.
        reasons: Vec<String>,
    },
    /// Nobody here knows who owns the machine: it does not run until that is settled.
    Undecided {
        /// Each in one line.
        reasons: Vec<String>,
    },
}

/// How far a source is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Rounds that are over.
    pub rounds: usize,
    /// Pages that were sent.
    pub pages: u64,
    /// Bytes that were sent.
    pub bytes: u64,
    /// Bytes per second of the link, once it is known.
    pub rate: Option<u64>,
    /// The guest's share of the time, in percent.
    pub share: u32,
    /// For how long no machine ran, in microseconds.
    pub downtime: u64,
    /// All of it, in microseconds.
    pub micros: u64,
}

impl From<&Progress> for Report {
    fn from(progress: &Progress) -> Report {
        let over = progress.rounds.iter().map(|round| round.pages);
        Report {
            rounds: progress.rounds.len(),
            pages: over.sum::<u64>() + progress.round.pages,
            bytes: progress.bytes,
            rate: progress.rate,
            share: progress.share,
            downtime: progress.downtime,
            micros: progress.micros,
        }
    }
}

/// The lines of a failure: each reason of a refusal is one.
fn lines(failure: Failure) -> Vec<String> {
    match failure {
        Failure::Refused(reasons) | Failure::Unfit(reasons) => reasons,
        other => vec![other.to_string()],
    }
}

/// A release code as people pass it on: 16 hexadecimal digits.
pub fn code(release: u64) -> String {
    format!("{release:016x}")
}

/// Whether `text` is the release code of the other side.
fn is_code_of(text: &str, id: u64, lock: Option<u64>) -> bool {
    let digits: String = text.trim().chars().filter(|c| *c != ' ').collect();
    let release = u64::from_str_radix(&digits, 16);
    let Ok(release) = release else {
        return false;
    };
    digits.len() == 16 && lock == Some(live::lock(&Identity { id, release }))
}

/// The side that gives a machine away.
pub struct Source(live::Source);

impl Source {
    /// Begins to give `guest` away, at `now`. Both numbers come from a random source.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(
        guest: &mut Guest,
        options: &Options,
        id: u64,
        release: u64,
        now: u64,
    ) -> Result<Source, String> {
        let machine = &mut guest.machine;
        let offer = Offer::of(machine).map_err(|error| error.to_string())?;
        let identity = Identity { id, release };
        live::Source::new(machine, options.settings(), identity, offer.to_bytes(), now)
            .map(Source)
            .map_err(|failure| failure.to_string())
    }

    /// Takes bytes that arrived.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.0.receive(bytes);
    }

    /// Nothing arrives any more.
    pub fn closed(&mut self) {
        self.0.closed();
    }

    /// Bytes to send, at most `most`: they count as sent.
    pub fn take_output(&mut self, most: usize) -> Vec<u8> {
        let output = self.0.output();
        let bytes = output[..output.len().min(most)].to_vec();
        self.0.sent(bytes.len());
        bytes
    }

    /// What to do next, at `now`.
    pub fn poll(&mut self, guest: &mut Guest, now: u64) -> Next {
        match self.0.poll(&mut guest.machine, now) {
            SourceNext::Run => Next::Run,
            SourceNext::Wait { micros } => Next::Wait { micros },
            SourceNext::Store => {
                self.0.stored(Ok(()));
                Next::Wait { micros: 0 }
            }
            SourceNext::HandedOver => Next::HandedOver,
            SourceNext::GoOn(failure) => Next::Failed {
                reasons: lines(failure),
            },
            SourceNext::Undecided(failure) => Next::Undecided {
                reasons: lines(failure),
            },
        }
    }

    /// What was reached so far.
    pub fn report(&self) -> Report {
        self.0.progress().into()
    }

    /// Gives up, where the machine is still this side's: true then.
    pub fn cancel(&mut self) -> bool {
        self.0.cancel("the user of the page gave it up")
    }

    /// Serial output that is to be shown first when the machine goes on here.
    pub fn take_serial(&mut self) -> Vec<u8> {
        self.0.take_unprinted().serial
    }

    /// The release code: told only when the machine is given up here.
    pub fn code(&self) -> String {
        code(self.0.identity().release)
    }

    /// Whether this is the other side's release code.
    pub fn is_other_code(&self, text: &str) -> bool {
        is_code_of(text, self.0.identity().id, self.0.peer_lock())
    }
}

/// The side that takes a machine.
pub struct Arrival(Destination);

impl Arrival {
    /// Waits for a machine. `release` comes from a random source.
    pub fn new(options: &Options, release: u64) -> Arrival {
        Arrival(Destination::new(options.settings(), release))
    }

    /// Takes bytes that arrived.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.0.receive(bytes);
    }

    /// Nothing arrives any more.
    pub fn closed(&mut self) {
        self.0.closed();
    }

    /// Bytes to send, at most `most`: they count as sent.
    pub fn take_output(&mut self, most: usize) -> Vec<u8> {
        let output = self.0.output();
        let bytes = output[..output.len().min(most)].to_vec();
        self.0.sent(bytes.len());
        bytes
    }

    /// What to do next, at `now`. The machine is judged and built here.
    pub fn poll(&mut self, now: u64) -> Next {
        match self.0.poll(now) {
            DestinationNext::Wait { micros } => Next::Wait { micros },
            DestinationNext::Judge => {
                match self.0.offer().map(judge) {
                    Some(Ok(machine)) => self.0.accept(machine),
                    Some(Err(reasons)) => self.0.refuse(reasons),
                    None => {}
                }
                Next::Wait { micros: 0 }
            }
            DestinationNext::Store => {
                self.0.stored(Ok(()));
                Next::Wait { micros: 0 }
            }
            DestinationNext::Own => Next::Own,
            DestinationNext::Failed(failure) => Next::Failed {
                reasons: lines(failure),
            },
            DestinationNext::Undecided(failure) => Next::Undecided {
                reasons: lines(failure),
            },
        }
    }

    /// The machine, after [`Next::Own`], which the source is told of; after [`Next::Undecided`] once that is settled.
    pub fn take(&mut self) -> Option<Guest> {
        let machine = self.0.take_machine()?;
        self.0.confirm();
        let boot = String::from("came from elsewhere");
        Some(Guest::of(machine, boot))
    }

    /// Serial output of the guest that is to be shown first.
    pub fn take_serial(&mut self) -> Vec<u8> {
        self.0.take_unprinted().serial
    }

    /// Gives up, where nothing can have been committed: true then.
    pub fn cancel(&mut self) -> bool {
        self.0.cancel("the user of the page gave it up")
    }

    /// The release code: told only when the machine is given up here.
    pub fn code(&self) -> String {
        code(self.0.identity().map_or(0, |identity| identity.release))
    }

    /// Whether this is the other side's release code.
    pub fn is_other_code(&self, text: &str) -> bool {
        let id = self.0.identity().map_or(0, |identity| identity.id);
        is_code_of(text, id, self.0.peer_lock())
    }
}

/// A machine for what is offered, without its memory and state; or every reason why not.
fn judge(offer: &[u8]) -> Result<Machine, Vec<String>> {
    let one = |error: String| vec![error];
    let offer = Offer::from_bytes(offer).map_err(|error| one(error.to_string()))?;
    let choices = Choices {
        memory: MAX_MEMORY,
        hyperv: true,
        ..Choices::default()
    };
    let host = Host::of(&choices).map_err(|error| one(error.to_string()))?;
    let mut reasons = refusals(&offer, &host);
    reasons.extend(offer.differences());
    if !reasons.is_empty() {
        return Err(reasons.iter().map(Reason::to_string).collect());
    }
    let config = offer.config(&VmxLayouts::default());
    let config = config.map_err(|error| one(error.to_string()))?;
    Machine::builder()
        .memory(config.memory)
        .cpus(config.cpus)
        .model(&config.model)
        .epoch(config.epoch)
        .vmx(config.vmx)
        .hyperv(config.hyperv)
        .vmcs_layouts(config.layouts)
        .build()
        .map_err(|error| one(error.to_string()))
}
