//! The side that gives a machine away.

use std::collections::VecDeque;

use hypernest_machine::{Machine, hash};

use super::batch::{Batch, PAGE, Table};
use super::frame::Reader;
use super::message::{Done, FromDestination, FromSource, Hello, STATE_PIECE};
use super::pace::{Limit, Rate, Share};
use super::pending::Pending;
use super::{Failure, Identity, MOST_WAIT, Progress, Settings, Unprinted, lock, state_bytes};

/// Bytes on their way at most: sent, and not yet dealt with by the destination.
const WINDOW: u64 = 4 << 20;
/// Pages with content, and pages looked at, in one call of [`Source::poll`] at most.
const QUANTUM: usize = 256;
const LOOKED_AT: usize = 8192;
/// So few pages are no reason for a further round.
const FEW: u32 = 16;
/// Rounds at most.
const ROUNDS: usize = 200;
/// Rounds with the guest's least share before it is stopped anyhow.
const STUBBORN: u32 = 3;
/// Microseconds to wait where nothing else says how long.
const SHORT: u64 = 1000;
/// Slots for contents that were sent, to find equal ones.
const SLOTS: usize = 1 << 16;

/// What the caller of [`Source::poll`] does next, after it has moved what [`Source::output`] has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceNext {
    /// Let the machine run for some milliseconds, then poll.
    Run,
    /// Poll when bytes were moved, or after so many microseconds. The machine does not run.
    Wait {
        /// At most.
        micros: u64,
    },
    /// The commit comes next. Make lasting what is to last (what was written of a one-way stream; the machine,
    /// where it is stored), then call [`Source::stored`].
    Store,
    /// The destination owns the machine. It must not run here any more.
    HandedOver,
    /// It is over: the machine is this side's and goes on.
    GoOn(Failure),
    /// It is not known who owns the machine: it does not run here until that is settled.
    Undecided(Failure),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// Waiting for an answer to the hello.
    Hello,
    /// Pages go while the machine runs.
    PreCopy,
    /// The machine has stopped; the last pages go.
    LastPages,
    /// The state goes; so many bytes of it are gone.
    State(usize),
    /// Waiting for the destination to be ready.
    Ready,
    /// Waiting for the caller to store.
    Store,
    /// The commit is in the output, from this byte of the stream on.
    Committed(u64),
    Over(SourceNext),
}

/// The side that gives a machine away, fed with bytes and the time: it reads from no clock and no link.
///
/// The caller moves bytes between it and the link ([`Source::receive`], [`Source::output`], [`Source::sent`],
/// [`Source::closed`]) and asks [`Source::poll`] what to do next. Times are microseconds from any moment on.
#[derive(Debug)]
pub struct Source {
    settings: Settings,
    identity: Identity,
    phase: Phase,
    reader: Reader,
    link_ended: bool,
    // What is sent.
    out: VecDeque<u8>,
    /// Bytes that were ever put into `out`, that the link took, that the destination has dealt with.
    queued: u64,
    gone: u64,
    acked: u64,
    // Pages.
    table: Table,
    slots: Vec<u32>,
    pending: Pending,
    batch: Batch,
    state: Vec<u8>,
    state_hash: u64,
    unprinted: Unprinted,
    // Times.
    limit: Limit,
    rate: Rate,
    share: Share,
    /// When the peer is taken for dead.
    deadline: u64,
    spoke: u64,
    round_began: u64,
    stubborn: u32,
    /// When the machine stopped for the last part.
    stopped: Option<u64>,
    peer_lock: Option<u64>,
    progress: Progress,
}

impl Source {
    /// Begins to give `machine` away, at time `now`. `offer` is what the destination judges by.
    ///
    /// # Errors
    /// When the host has no memory for it.
    pub fn new(
        machine: &mut Machine,
        settings: Settings,
        identity: Identity,
        offer: Vec<u8>,
        now: u64,
    ) -> Result<Source, Failure> {
        let memory = machine.ram().size();
        let pages = (memory / PAGE as u64) as u32;
        let table = Table::new(pages, identity.id).ok_or(Failure::Memory)?;
        let pending = Pending::all(pages).ok_or(Failure::Memory)?;
        let hello = Hello {
            id: identity.id,
            lock: lock(&identity),
            one_way: settings.one_way,
            token: settings.token.clone(),
            memory,
            offer,
        };
        let mut source = Source {
            limit: Limit::new(settings.bandwidth, now),
            deadline: now.saturating_add(settings.silence),
            settings,
            identity,
            phase: Phase::Hello,
            reader: Reader::default(),
            link_ended: false,
            out: VecDeque::new(),
            queued: 0,
            gone: 0,
            acked: 0,
            table,
            slots: vec![u32::MAX; SLOTS],
            pending,
            batch: Batch::default(),
            state: Vec::new(),
            state_hash: 0,
            unprinted: Unprinted::default(),
            rate: Rate::new(now),
            share: Share::new(now),
            spoke: now,
            round_began: now,
            stubborn: 0,
            stopped: None,
            peer_lock: None,
            progress: Progress::new(now),
        };
        source.say(&FromSource::Hello(hello));
        if !source.settings.one_way {
            machine
                .track_dirty(true)
                .map_err(|error| Failure::Engine(error.to_string()))?;
        }
        Ok(source)
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

    /// The link has taken the first bytes of [`Source::output`], or may have: what it may have taken counts as sent.
    pub fn sent(&mut self, bytes: usize) {
        self.out.drain(..bytes.min(self.out.len()));
        self.gone = self.queued - self.out.len() as u64;
    }

    // ---- what comes of it ----

    /// What was reached so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The machine has stopped for the last part.
    pub fn has_stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// What the destination's release code is checked with, once it has answered.
    pub fn peer_lock(&self) -> Option<u64> {
        self.peer_lock
    }

    /// Its name and release code.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// After [`SourceNext::GoOn`]: what the guest had sent and the caller not yet taken when the machine stopped.
    pub fn take_unprinted(&mut self) -> Unprinted {
        std::mem::take(&mut self.unprinted)
    }

    /// The caller has stored what it wanted to, or could not.
    pub fn stored(&mut self, outcome: Result<(), String>) {
        if self.phase == Phase::Store {
            match outcome {
                Ok(()) => self.commit(),
                Err(why) => self.fail(Failure::Store(why)),
            }
        }
    }

    /// Gives up, where the machine is still this side's: true then.
    pub fn cancel(&mut self, why: &str) -> bool {
        match self.phase {
            Phase::Over(_) => {}
            Phase::Committed(_) => return false,
            _ => self.fail(Failure::Cancelled(why.into())),
        }
        matches!(self.phase, Phase::Over(SourceNext::GoOn(_)))
    }

    /// What to do next, at time `now`. Output that the guest has sent is best printed before: what is not travels.
    pub fn poll(&mut self, machine: &mut Machine, now: u64) -> SourceNext {
        if !matches!(self.phase, Phase::Over(_)) {
            self.share.pass(now, self.is_busy());
            if let Err(failure) = self.hear(now) {
                self.fail(failure);
            }
            self.rate.at(self.dealt_with(), now);
        }
        let next = self.act(machine, now);
        if let SourceNext::GoOn(_) | SourceNext::HandedOver | SourceNext::Undecided(_) = next {
            // Who can begin can end.
            let _ = machine.track_dirty(false);
        }
        self.share.give(next == SourceNext::Run);
        self.progress.bytes = self.queued;
        self.progress.share = self.share.percent();
        self.progress.rate = self.rate.per_second();
        next
    }

    fn say(&mut self, message: &FromSource<'_>) {
        let mut bytes = Vec::new();
        message.append(&mut bytes);
        self.limit.took(bytes.len());
        self.queued += bytes.len() as u64;
        self.out.extend(bytes);
    }

    /// Bytes that are no longer on their way.
    fn dealt_with(&self) -> u64 {
        if self.settings.one_way {
            self.gone
        } else {
            self.acked
        }
    }

    fn on_their_way(&self) -> u64 {
        self.queued - self.dealt_with()
    }

    fn is_busy(&self) -> bool {
        self.phase == Phase::PreCopy && self.on_their_way() < WINDOW && !self.pending.is_done()
    }

    /// It is over, and who owns the machine follows from whether the commit is out.
    fn fail(&mut self, failure: Failure) {
        match self.phase {
            Phase::Over(_) => {}
            Phase::Committed(at) if self.gone > at => {
                self.phase = Phase::Over(SourceNext::Undecided(failure));
            }
            _ => {
                if let Phase::Committed(at) = self.phase {
                    // Nothing of it has left.
                    self.out.truncate((at - self.gone) as usize);
                    self.queued = at;
                }
                let silent = matches!(failure, Failure::Refused(_) | Failure::Peer(_));
                if !silent && !self.settings.one_way {
                    self.say(&FromSource::Cancel(failure.to_string()));
                }
                self.phase = Phase::Over(SourceNext::GoOn(failure));
            }
        }
    }

    fn commit(&mut self) {
        let at = self.queued;
        self.say(&FromSource::Commit);
        self.phase = Phase::Committed(at);
    }

    // ---- what the destination says ----

    fn hear(&mut self, now: u64) -> Result<(), Failure> {
        while let Some((kind, payload)) = self.reader.next()? {
            let message = FromDestination::read(kind, payload)?;
            self.deadline = now.saturating_add(self.settings.silence);
            self.take(message, now)?;
            if matches!(self.phase, Phase::Over(_)) {
                return Ok(());
            }
        }
        if self.settings.one_way {
            return if self.link_ended {
                Err(Failure::Closed)
            } else {
                Ok(())
            };
        }
        if self.link_ended {
            return Err(Failure::Closed);
        }
        if now >= self.deadline {
            return Err(Failure::Silent(self.settings.silence));
        }
        if now.saturating_sub(self.spoke) >= self.settings.silence / 4 {
            self.spoke = now;
            self.say(&FromSource::Ping);
        }
        Ok(())
    }

    fn take(&mut self, message: FromDestination, now: u64) -> Result<(), Failure> {
        let name = message.name();
        match (message, &self.phase) {
            (FromDestination::Accept { lock }, Phase::Hello) => {
                self.peer_lock = Some(lock);
                self.phase = Phase::PreCopy;
                self.round_began = now;
                self.rate.pause(self.dealt_with(), now);
            }
            (FromDestination::Refuse(reasons), Phase::Hello) => {
                return Err(Failure::Refused(reasons));
            }
            (FromDestination::Ack(bytes), _) => {
                if bytes < self.acked || bytes > self.gone {
                    return Err(Failure::Acknowledged);
                }
                self.acked = bytes;
            }
            (FromDestination::Ready, Phase::Ready) => {
                if self.settings.store {
                    self.say(&FromSource::Wait(MOST_WAIT));
                    self.phase = Phase::Store;
                } else {
                    self.commit();
                }
            }
            // Only who was sent the whole commit can own the machine.
            (FromDestination::Owned, Phase::Committed(_)) if self.out.is_empty() => {
                self.progress.end(self.stopped.unwrap_or(now), now);
                self.phase = Phase::Over(SourceNext::HandedOver);
            }
            (FromDestination::Wait(time), _) => {
                self.deadline = self.deadline.saturating_add(time.min(MOST_WAIT));
            }
            // Once it was ready it does not fail: this peer says two things.
            (FromDestination::Fail(why), Phase::Committed(_)) => {
                self.phase = Phase::Over(SourceNext::Undecided(Failure::Peer(why)));
            }
            (FromDestination::Fail(why), _) => return Err(Failure::Peer(why)),
            _ => return Err(Failure::Order(name)),
        }
        Ok(())
    }

    // ---- what this side does ----

    fn act(&mut self, machine: &mut Machine, now: u64) -> SourceNext {
        match &self.phase {
            Phase::Over(next) => next.clone(),
            // Nobody answers, and what is sent twice is only longer: one round, of a machine that has stopped.
            Phase::Hello if self.settings.one_way => {
                self.stop(machine, now);
                SourceNext::Wait { micros: 0 }
            }
            Phase::Hello => SourceNext::Run,
            Phase::PreCopy => self.pre_copy(machine, now),
            Phase::LastPages | Phase::State(_) => self.rest(machine, now),
            Phase::Store => SourceNext::Store,
            Phase::Committed(_) if self.settings.one_way && self.out.is_empty() => {
                self.progress.end(self.stopped.unwrap_or(now), now);
                self.phase = Phase::Over(SourceNext::HandedOver);
                SourceNext::HandedOver
            }
            Phase::Ready | Phase::Committed(_) => SourceNext::Wait { micros: SHORT },
        }
    }

    fn pre_copy(&mut self, machine: &mut Machine, now: u64) -> SourceNext {
        if self.pending.is_done()
            && self.on_their_way() < WINDOW / 2
            && self.end_round(machine, now)
        {
            self.stop(machine, now);
            return SourceNext::Wait { micros: 0 };
        }
        let turn = self.share.was_guest() || self.share.is_used();
        match self.may_send(now) {
            Ok(()) if turn && !self.pending.is_done() => {
                self.send_pages(machine, now);
                SourceNext::Wait { micros: 0 }
            }
            // The link is not ready, or the round's end is still on its way: the guest gets its share and no more.
            waits if self.share.is_used() => SourceNext::Wait {
                micros: waits.err().unwrap_or(SHORT),
            },
            _ => SourceNext::Run,
        }
    }

    /// Whether the link takes more now; else how long to wait.
    fn may_send(&mut self, now: u64) -> Result<(), u64> {
        if self.on_their_way() >= WINDOW {
            return Err(SHORT);
        }
        self.limit.ask(now).map_err(|time| time.min(SHORT))
    }

    /// Sends some of the pages that wait.
    fn send_pages(&mut self, machine: &Machine, now: u64) {
        let ram = machine.ram().bytes();
        let content = |page: u32| &ram[page as usize * PAGE..][..PAGE];
        let (mut sent, mut looked_at) = (0, 0);
        let before = self.queued;
        while sent < QUANTUM && looked_at < LOOKED_AT {
            let Some(page) = self.pending.next() else {
                break;
            };
            looked_at += 1;
            let is = content(page);
            let hash = self.table.hash(is);
            if hash == self.table.get(page) {
                continue;
            }
            let slot = hash as usize % SLOTS;
            let of = self.slots[slot];
            if hash == 0 {
                self.batch.zero(page);
            } else if of < self.table.pages() && self.table.get(of) == hash && content(of) == is {
                self.batch.same(page, of);
            } else {
                self.batch.content(page, is);
                self.slots[slot] = page;
                sent += 1;
            }
            self.table.set(page, hash);
            self.progress.round.pages += 1;
            if !self.batch.has_room() {
                self.send_batch();
            }
        }
        if self.pending.is_done() {
            self.send_batch();
        }
        if self.queued == before {
            self.rate.pause(self.dealt_with(), now);
        }
    }

    fn send_batch(&mut self) {
        if self.batch.pages() == 0 {
            return;
        }
        self.progress.round.contents += self.batch.data() as u64;
        let mut bytes = Vec::new();
        self.batch.append(&mut bytes);
        self.progress.round.bytes += bytes.len() as u64;
        self.say(&FromSource::Pages(&bytes));
    }

    /// All pages of a round were sent: begins another. True when it is time to stop the machine instead.
    fn end_round(&mut self, machine: &mut Machine, now: u64) -> bool {
        let sent = self.progress.round.pages;
        self.note_round(now);
        let number = self.progress.rounds.len() as u32 - 1;
        self.say(&FromSource::Round(number));
        self.pending.add(&machine.take_dirty());
        let left = self.pending.left();
        let bytes = u64::from(left) * self.progress.bytes_per_page() + self.on_their_way();
        let expected = self.rate.time(bytes);
        self.progress.expected = expected;
        if left <= FEW || expected <= self.settings.downtime || self.progress.rounds.len() >= ROUNDS
        {
            return true;
        }
        // The guest writes pages nearly as fast as they are sent.
        let outruns = u64::from(left) * 2 > sent;
        if number > 0 && outruns && !self.share.halve() {
            self.stubborn += 1;
        }
        self.stubborn >= STUBBORN
    }

    fn note_round(&mut self, now: u64) {
        self.progress.round.micros = now.saturating_sub(self.round_began);
        self.round_began = now;
        let round = std::mem::take(&mut self.progress.round);
        self.progress.rounds.push(round);
    }

    /// The machine stops: what it is now is what travels. Its caches stay, so that it can go on as if nothing had been.
    fn stop(&mut self, machine: &mut Machine, now: u64) {
        self.stopped = Some(now);
        if !self.settings.one_way {
            self.pending.add(&machine.take_dirty());
        }
        self.unprinted = Unprinted::take(machine);
        match state_bytes(machine, &self.unprinted) {
            Ok(bytes) => {
                self.state_hash = hash::bytes(self.identity.id, &bytes);
                self.state = bytes;
                self.phase = Phase::LastPages;
            }
            Err(why) => self.fail(Failure::Engine(why)),
        }
    }

    /// Sends the last pages and the state.
    fn rest(&mut self, machine: &Machine, now: u64) -> SourceNext {
        if let Err(micros) = self.may_send(now) {
            return SourceNext::Wait { micros };
        }
        match self.phase {
            Phase::LastPages if !self.pending.is_done() => self.send_pages(machine, now),
            Phase::LastPages => {
                self.note_round(now);
                self.phase = Phase::State(0);
            }
            Phase::State(from) if from < self.state.len() => {
                let state = std::mem::take(&mut self.state);
                let to = state.len().min(from + STATE_PIECE);
                self.say(&FromSource::State(&state[from..to]));
                self.state = state;
                self.phase = Phase::State(to);
            }
            _ => {
                self.say(&FromSource::Done(Done {
                    ram: self.table.sum(),
                    state: self.state_hash,
                    length: self.state.len() as u64,
                }));
                self.state = Vec::new();
                self.phase = if self.settings.one_way {
                    Phase::Store
                } else {
                    Phase::Ready
                };
            }
        }
        SourceNext::Wait { micros: 0 }
    }
}
