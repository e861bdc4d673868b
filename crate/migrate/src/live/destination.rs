//! The side that takes a machine.

use std::collections::VecDeque;

use hypernest_machine::{Machine, hash};

use super::batch::{self, PAGE, Table};
use super::frame::Reader;
use super::message::{Done, FromDestination, FromSource, Hello, STATE_PIECE};
use super::{Failure, Identity, MOST_WAIT, Settings, Unprinted, lock, read_state};

/// What arrived is acknowledged after so many bytes.
const ACKNOWLEDGE: u64 = 256 << 10;
/// Microseconds to wait where nothing else says how long.
const SHORT: u64 = 10_000;

/// What the caller of [`Destination::poll`] does next, after it has moved what [`Destination::output`] has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationNext {
    /// Poll when bytes arrived, or after so many microseconds.
    Wait {
        /// At most.
        micros: u64,
    },
    /// Judge [`Destination::offer`], then call [`Destination::accept`] or [`Destination::refuse`].
    Judge,
    /// Store [`Destination::machine`], then call [`Destination::stored`].
    Store,
    /// The machine is this side's. Call [`Destination::confirm`], after a stored one was marked as owned;
    /// [`Destination::take_machine`] has the machine, which goes on.
    Own,
    /// It is over and nothing is here.
    Failed(Failure),
    /// It is not known who owns [`Destination::machine`]: it does not run here until that is settled.
    Undecided(Failure),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// Waiting for the hello.
    Hello,
    /// Waiting for the caller's judgement.
    Judge,
    /// Pages, then the state.
    Receiving,
    /// Waiting for the caller to store.
    Store,
    /// Everything is here; waiting for the commit.
    Ready,
    Over(DestinationNext),
}

/// The side that takes a machine, fed with bytes and the time: it reads from no clock and no link. See
/// [`Source`](super::Source) for how it is called.
#[derive(Debug)]
pub struct Destination {
    settings: Settings,
    release: u64,
    phase: Phase,
    reader: Reader,
    link_ended: bool,
    out: VecDeque<u8>,
    hello: Option<Hello>,
    machine: Held,
    table: Option<Table>,
    unpacked: Vec<u8>,
    state: Vec<u8>,
    unprinted: Unprinted,
    /// Bytes of the frames that were dealt with, and of these acknowledged.
    dealt_with: u64,
    acked: u64,
    /// When the peer is taken for dead; from the first poll on.
    deadline: Option<u64>,
}

/// A machine, which has no text of its own.
#[derive(Default)]
struct Held(Option<Machine>);

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() {
            "a machine"
        } else {
            "none"
        })
    }
}

impl Destination {
    /// Waits for a machine. `release` is this side's release code ([`Identity::release`]).
    pub fn new(settings: Settings, release: u64) -> Destination {
        Destination {
            settings,
            release,
            phase: Phase::Hello,
            reader: Reader::default(),
            link_ended: false,
            out: VecDeque::new(),
            hello: None,
            machine: Held(None),
            table: None,
            unpacked: Vec::new(),
            state: Vec::new(),
            unprinted: Unprinted::default(),
            dealt_with: 0,
            acked: 0,
            deadline: None,
        }
    }

    // ---- the link ----

    /// Takes bytes that arrived.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.reader.feed(bytes);
    }

    /// The link has ended: nothing arrives any more.
    pub fn closed(&mut self) {
        self.link_ended = true;
    }

    /// Bytes to send.
    pub fn output(&self) -> &[u8] {
        self.out.as_slices().0
    }

    /// The link has taken the first bytes of [`Destination::output`].
    pub fn sent(&mut self, bytes: usize) {
        self.out.drain(..bytes.min(self.out.len()));
    }

    // ---- what comes of it ----

    /// What the source tells of its machine, once it has.
    pub fn offer(&self) -> Option<&[u8]> {
        self.hello.as_ref().map(|hello| &*hello.offer)
    }

    /// Bytes of RAM of the machine that is offered.
    pub fn memory(&self) -> Option<u64> {
        self.hello.as_ref().map(|hello| hello.memory)
    }

    /// Whether the source reads no answers.
    pub fn is_one_way(&self) -> bool {
        self.hello.as_ref().is_some_and(|hello| hello.one_way)
    }

    /// The migration's name and this side's release code.
    pub fn identity(&self) -> Option<Identity> {
        self.hello.as_ref().map(|hello| Identity {
            id: hello.id,
            release: self.release,
        })
    }

    /// What the source's release code is checked with.
    pub fn peer_lock(&self) -> Option<u64> {
        self.hello.as_ref().map(|hello| hello.lock)
    }

    /// The machine, to store it. Whole from [`DestinationNext::Store`] on.
    pub fn machine(&mut self) -> Option<&mut Machine> {
        self.machine.0.as_mut()
    }

    /// The machine, after [`DestinationNext::Own`]: it is the caller's to run. After
    /// [`DestinationNext::Undecided`] it is the caller's to keep and not to run.
    pub fn take_machine(&mut self) -> Option<Machine> {
        match self.phase {
            Phase::Over(DestinationNext::Own | DestinationNext::Undecided(_)) => {
                self.machine.0.take()
            }
            _ => None,
        }
    }

    /// What the guest had sent before, and is still to be printed: first of all.
    pub fn take_unprinted(&mut self) -> Unprinted {
        std::mem::take(&mut self.unprinted)
    }

    /// The offer is good: `machine` is built like the one offered, has not run, and its RAM is empty.
    pub fn accept(&mut self, machine: Machine) {
        if self.phase != Phase::Judge {
            return;
        }
        let id = self.hello.as_ref().map_or(0, |hello| hello.id);
        let size = machine.ram().size();
        if self.memory() != Some(size) {
            let why = format!("a machine of {size} bytes of memory was built for it");
            return self.fail(Failure::State(why));
        }
        let Some(table) = Table::new((size / PAGE as u64) as u32, id) else {
            return self.fail(Failure::Memory);
        };
        // Building it took the caller's time, not the peer's.
        self.deadline = None;
        self.table = Some(table);
        self.machine = Held(Some(machine));
        let lock = lock(&Identity {
            id,
            release: self.release,
        });
        self.say(&FromDestination::Accept { lock });
        self.phase = Phase::Receiving;
    }

    /// The offer is not good, for these reasons.
    pub fn refuse(&mut self, reasons: Vec<String>) {
        if self.phase == Phase::Judge {
            self.say(&FromDestination::Refuse(reasons.clone()));
            self.over(DestinationNext::Failed(Failure::Unfit(reasons)));
        }
    }

    /// The caller has stored the machine, or could not.
    pub fn stored(&mut self, outcome: Result<(), String>) {
        if self.phase == Phase::Store {
            self.deadline = None;
            match outcome {
                Ok(()) => self.ready(),
                Err(why) => self.fail(Failure::Store(why)),
            }
        }
    }

    /// Gives up, where nothing can have been committed: true then.
    pub fn cancel(&mut self, why: &str) -> bool {
        if !matches!(self.phase, Phase::Ready | Phase::Over(_)) {
            self.fail(Failure::Cancelled(why.into()));
        }
        matches!(self.phase, Phase::Over(DestinationNext::Failed(_)))
    }

    /// Tells the source that the machine is owned here: once, after [`DestinationNext::Own`].
    pub fn confirm(&mut self) {
        if self.phase == Phase::Over(DestinationNext::Own) {
            self.say(&FromDestination::Owned);
        }
    }

    /// What to do next, at time `now`.
    pub fn poll(&mut self, now: u64) -> DestinationNext {
        if let Err(failure) = self.hear(now) {
            self.fail(failure);
        }
        match &self.phase {
            Phase::Over(next) => next.clone(),
            Phase::Judge => DestinationNext::Judge,
            Phase::Store => DestinationNext::Store,
            Phase::Hello | Phase::Receiving | Phase::Ready => {
                DestinationNext::Wait { micros: SHORT }
            }
        }
    }

    fn say(&mut self, message: &FromDestination) {
        if !self.is_one_way() {
            let mut bytes = Vec::new();
            message.append(&mut bytes);
            self.out.extend(bytes);
        }
    }

    fn over(&mut self, next: DestinationNext) {
        if let DestinationNext::Failed(_) = next {
            self.machine = Held(None);
            self.table = None;
            self.state = Vec::new();
        }
        self.phase = Phase::Over(next);
    }

    /// It is over. Before it was ready nothing can have been committed; afterwards only the source knows.
    fn fail(&mut self, failure: Failure) {
        match self.phase {
            Phase::Over(_) => {}
            // What comes on one way is whole, commit included, or nothing.
            Phase::Ready if !self.is_one_way() => {
                if matches!(failure, Failure::Peer(_)) {
                    self.over(DestinationNext::Failed(failure));
                } else {
                    self.over(DestinationNext::Undecided(failure));
                }
            }
            _ => {
                if !matches!(failure, Failure::Peer(_)) {
                    self.say(&FromDestination::Fail(failure.to_string()));
                }
                self.over(DestinationNext::Failed(failure));
            }
        }
    }

    fn ready(&mut self) {
        self.phase = Phase::Ready;
        self.say(&FromDestination::Ready);
    }

    // ---- what the source says ----

    /// Deals with what has arrived, as far as it goes without the caller.
    fn hear(&mut self, now: u64) -> Result<(), Failure> {
        let silence = self.settings.silence;
        let deadline = *self.deadline.get_or_insert(now.saturating_add(silence));
        let mut reader = std::mem::take(&mut self.reader);
        let mut heard = Ok(true);
        while self.listens() && matches!(heard, Ok(true)) {
            heard = self.hear_one(&mut reader, now);
        }
        self.reader = reader;
        heard?;
        // The link's end comes after what arrived before it.
        if !self.listens() {
            return Ok(());
        }
        if self.link_ended {
            return Err(Failure::Closed);
        }
        if now >= deadline.max(self.deadline.unwrap_or(0)) {
            return Err(Failure::Silent(silence));
        }
        Ok(())
    }

    fn listens(&self) -> bool {
        matches!(self.phase, Phase::Hello | Phase::Receiving | Phase::Ready)
    }

    /// Deals with one frame; false where none is here.
    fn hear_one(&mut self, reader: &mut Reader, now: u64) -> Result<bool, Failure> {
        let Some((kind, payload)) = reader.next()? else {
            return Ok(false);
        };
        self.dealt_with += (super::frame::HEADER + payload.len()) as u64;
        self.deadline = Some(now.saturating_add(self.settings.silence));
        let message = FromSource::read(kind, payload)?;
        let pages = matches!(message, FromSource::Pages(_) | FromSource::State(_));
        self.take(message)?;
        let waiting = matches!(self.phase, Phase::Receiving | Phase::Ready);
        if waiting && (!pages || self.dealt_with - self.acked >= ACKNOWLEDGE) {
            self.acked = self.dealt_with;
            self.say(&FromDestination::Ack(self.acked));
        }
        Ok(true)
    }

    fn take(&mut self, message: FromSource<'_>) -> Result<(), Failure> {
        let name = message.name();
        match (message, &self.phase) {
            (FromSource::Hello(hello), Phase::Hello) => return self.greeted(hello),
            (FromSource::Pages(pages), Phase::Receiving) if self.state.is_empty() => {
                if let (Some(machine), Some(table)) = (&mut self.machine.0, &mut self.table) {
                    let ram = machine.ram_mut().bytes_mut();
                    batch::apply(pages, ram, table, &mut self.unpacked)?;
                }
            }
            (FromSource::Round(_), Phase::Receiving) => {}
            (FromSource::State(piece), Phase::Receiving) if piece.len() <= STATE_PIECE => {
                let most = self.settings.most_state;
                if (self.state.len() + piece.len()) as u64 > most {
                    return Err(Failure::TooLong(most));
                }
                self.state
                    .try_reserve(piece.len())
                    .map_err(|_| Failure::Memory)?;
                self.state.extend_from_slice(piece);
            }
            (FromSource::Done(done), Phase::Receiving) => return self.verify(done),
            (FromSource::Commit, Phase::Ready) => self.over(DestinationNext::Own),
            (FromSource::Cancel(why), _) => return Err(Failure::Peer(why)),
            (FromSource::Ping, Phase::Receiving | Phase::Ready) => {}
            (FromSource::Wait(time), Phase::Receiving | Phase::Ready) => {
                let time = time.min(MOST_WAIT);
                self.deadline = self.deadline.map(|deadline| deadline.saturating_add(time));
            }
            _ => return Err(Failure::Order(name)),
        }
        Ok(())
    }

    fn greeted(&mut self, hello: Hello) -> Result<(), Failure> {
        let (theirs, ours) = (&hello.token, &self.settings.token);
        // In a time that says nothing of where they differ.
        let differing = theirs.iter().zip(ours).fold(0, |all, (a, b)| all | (a ^ b));
        let good = ours.is_empty() || theirs.len() == ours.len() && differing == 0;
        self.hello = Some(hello);
        if !good {
            // It may know no more than that.
            self.say(&FromDestination::Refuse(vec![Failure::Token.to_string()]));
            self.over(DestinationNext::Failed(Failure::Token));
            return Ok(());
        }
        self.phase = Phase::Judge;
        Ok(())
    }

    /// Everything was sent: is it what was sent, and can it go on?
    fn verify(&mut self, done: Done) -> Result<(), Failure> {
        let (Some(machine), Some(table)) = (&mut self.machine.0, &self.table) else {
            return Err(Failure::Order("done"));
        };
        if table.sum() != done.ram {
            return Err(Failure::Differs("memory"));
        }
        let id = self.hello.as_ref().map_or(0, |hello| hello.id);
        let state = std::mem::take(&mut self.state);
        if state.len() as u64 != done.length || hash::bytes(id, &state) != done.state {
            return Err(Failure::Differs("state"));
        }
        let (state, unprinted) = read_state(&state, machine)?;
        machine
            .restore(&state)
            .map_err(|error| Failure::State(error.to_string()))?;
        self.unprinted = unprinted;
        self.table = None;
        if self.settings.store {
            self.phase = Phase::Store;
            self.say(&FromDestination::Wait(MOST_WAIT));
        } else {
            self.ready();
        }
        Ok(())
    }
}
