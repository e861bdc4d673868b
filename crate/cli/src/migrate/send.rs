//! `--migrate-on`: a run that moves away while it goes on.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hypernest_machine::{Machine, Tick};
use hypernest_migrate::hello::Offer;
use hypernest_migrate::live::record::{Owns, Record, Side};
use hypernest_migrate::live::{
    Failure, Identity, Progress, Settings, Source, SourceNext, Unprinted,
};
use hypernest_migrate::snapshot::About;

use super::link::Link;
use super::{Peer, random, settings, store, token};
use crate::args::{Moment, MoveArgs, SerialTo};
use crate::files;
use crate::report::End;

/// The longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// The longest wait in one step.
const STEP: Duration = Duration::from_millis(1);

/// Pieces that are taken in between two steps at most.
const PIECES: usize = 8;

/// Where to, when and how.
struct Plan {
    moment: Option<Moment>,
    to: Peer,
    settings: Settings,
    durable: Option<PathBuf>,
    about: About,
}

/// What the run does next.
pub enum Step {
    /// It goes on for a slice.
    Run,
    /// It stands still, and asks again.
    Rest,
    /// It goes on and stays; this is still to be printed.
    Back(Unprinted),
    /// It has ended here.
    End(End),
}

/// A run's move to another place, planned or under way.
#[derive(Default)]
pub struct Moves {
    state: State,
    /// What snapshots of the machine say of themselves.
    about: About,
}

#[derive(Default)]
enum State {
    #[default]
    None,
    Planned(Box<Plan>),
    Connecting(Box<Plan>, Receiver<io::Result<Link>>),
    Going(Box<Going>),
}

/// A move under way.
struct Going {
    plan: Plan,
    link: Link,
    source: Source,
    began: Instant,
    /// How long the source had nothing to do when it was last asked.
    wait: Duration,
    /// The file being written, where it is one.
    file: Option<(File, PathBuf)>,
    /// A record is in the durable file.
    stored: bool,
}

impl Moves {
    /// As `args` ask for it. Snapshots say `about` of themselves.
    ///
    /// # Errors
    /// What is asked for cannot be; nothing is written.
    pub fn open(args: &MoveArgs, serial: &SerialTo, about: About) -> Result<Moves> {
        let (Some(moment), Some(to)) = (args.migrate_on.clone(), args.to.clone()) else {
            return Ok(Moves {
                about,
                ..Moves::default()
            });
        };
        match &to {
            Peer::Standard if matches!(serial, SerialTo::Stdio | SerialTo::Output) => {
                bail!(
                    "--to -: the machine goes to stdout, so give --serial file:F or --serial none"
                )
            }
            Peer::File(path) => files::check_writable("machine", path)?,
            Peer::Standard | Peer::Address(_) => {}
        }
        if let Some(path) = &args.durable {
            files::check_writable("record", path)?;
        }
        let token = token(args.token_file.as_deref())?;
        let settings = Settings {
            bandwidth: args.bandwidth,
            downtime: args.downtime.saturating_mul(1000),
            one_way: !matches!(to, Peer::Address(_)),
            ..settings(token, args.durable.is_some())
        };
        let plan = Plan {
            moment: Some(moment),
            to,
            settings,
            durable: args.durable.clone(),
            about: about.clone(),
        };
        Ok(Moves {
            state: State::Planned(Box::new(plan)),
            about,
        })
    }

    /// Begins a move now, which nobody planned. One that was planned is forgotten.
    ///
    /// # Errors
    /// One is under way.
    pub fn begin_to(
        &mut self,
        to: Peer,
        bandwidth: Option<u64>,
        downtime: Option<u64>,
    ) -> Result<()> {
        if self.is_under_way() {
            bail!("the machine is on its way already");
        }
        let standard = Settings::default();
        let settings = Settings {
            bandwidth,
            downtime: downtime.map_or(standard.downtime, |ms| ms.saturating_mul(1000)),
            one_way: !matches!(to, Peer::Address(_)),
            ..standard
        };
        self.state = State::Planned(Box::new(Plan {
            moment: None,
            to,
            settings,
            durable: None,
            about: self.about.clone(),
        }));
        self.begin();
        Ok(())
    }

    /// The moment for which it waits.
    pub fn moment(&self) -> Option<&Moment> {
        match &self.state {
            State::Planned(plan) => plan.moment.as_ref(),
            _ => None,
        }
    }

    /// The tick for which it waits.
    pub fn tick(&self) -> Tick {
        match self.moment() {
            Some(Moment::Tick(tick)) => *tick,
            _ => Tick::MAX,
        }
    }

    /// The text for which it waits.
    pub fn text(&self) -> Option<&str> {
        match self.moment() {
            Some(Moment::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Begins where its moment has come: at this tick, or with this text.
    pub fn look(&mut self, now: Tick, seen: Option<&str>) {
        let has_come = match self.moment() {
            Some(Moment::Tick(tick)) => now >= *tick,
            Some(Moment::Text(text)) => seen.is_some_and(|seen| seen.ends_with(text.as_str())),
            None => false,
        };
        if has_come {
            self.begin();
        }
    }

    /// Whether the run has to be asked about after every slice.
    pub fn is_under_way(&self) -> bool {
        matches!(self.state, State::Connecting(..) | State::Going(_))
    }

    /// How far it is.
    pub fn progress(&self) -> Option<&Progress> {
        match &self.state {
            State::Going(going) => Some(going.source.progress()),
            _ => None,
        }
    }

    fn begin(&mut self) {
        let State::Planned(plan) = std::mem::take(&mut self.state) else {
            return;
        };
        let (sender, receiver) = sync_channel(1);
        if let Peer::Address(address) = plan.to {
            // The machine does not wait for a connection.
            thread::spawn(move || sender.send(connect(address)));
        }
        self.state = State::Connecting(plan, receiver);
    }

    /// What the run does next. It is best asked with everything printed; `idle` is how long the run has nothing to do
    /// of its own.
    ///
    /// # Errors
    /// A record cannot be written where there must be one.
    pub fn step(&mut self, machine: &mut Machine, idle: Duration) -> Result<Step> {
        match &mut self.state {
            State::None | State::Planned(_) => Ok(Step::Run),
            State::Connecting(plan, receiver) => {
                let link = match plan.to {
                    Peer::Address(_) => match receiver.try_recv() {
                        Ok(link) => Some(link),
                        Err(TryRecvError::Empty) => None,
                        Err(TryRecvError::Disconnected) => {
                            Some(Err(io::Error::other("there was no thread for it")))
                        }
                    },
                    _ => Some(Ok(Link::nowhere())),
                };
                let Some(link) = link else {
                    thread::sleep(idle);
                    return Ok(Step::Run);
                };
                let State::Connecting(plan, _) = std::mem::take(&mut self.state) else {
                    return Ok(Step::Run);
                };
                let to = plan.to.to_string();
                match link
                    .map_err(Into::into)
                    .and_then(|link| Going::start(*plan, link, machine))
                {
                    Ok(going) => self.state = State::Going(Box::new(going)),
                    Err(error) => say_it_stays(&to, &format!("{error:#}")),
                }
                Ok(Step::Run)
            }
            State::Going(going) => {
                let step = going.step(machine, idle)?;
                if !matches!(step, Step::Run | Step::Rest) {
                    self.state = State::None;
                }
                Ok(step)
            }
        }
    }

    /// The run has ended: for another reason the other side is told. False where a move that was planned did not begin.
    pub fn finish(&mut self, why: &str) -> bool {
        match std::mem::take(&mut self.state) {
            State::Going(mut going) => {
                going.source.cancel(why);
                going.pass_on();
                going.clear();
                say_it_stays(&going.plan.to.to_string(), why);
            }
            State::Connecting(plan, _) => say_it_stays(&plan.to.to_string(), why),
            State::Planned(plan) => {
                if let Some(moment) = &plan.moment {
                    eprintln!(
                        "hypernest: the machine was not moved to {}: {moment}",
                        plan.to
                    );
                }
                return false;
            }
            State::None => {}
        }
        true
    }
}

fn connect(address: SocketAddr) -> io::Result<Link> {
    let socket = TcpStream::connect_timeout(&address, CONNECT)?;
    Link::over(socket)
}

fn say_it_stays(to: &str, why: &str) {
    let why = why.replace('\n', " ");
    eprintln!("hypernest: the machine was not moved to {to} and goes on here: {why}");
}

impl Going {
    fn start(plan: Plan, link: Link, machine: &mut Machine) -> Result<Going> {
        let mut link = link;
        let mut file = None;
        match &plan.to {
            Peer::Address(_) => {}
            Peer::Standard => link = Link::new(None, Some(Box::new(io::stdout())))?,
            Peer::File(path) => {
                let mut part = path.as_os_str().to_owned();
                part.push(".part");
                let part = PathBuf::from(part);
                let opened = File::create(&part)
                    .with_context(|| format!("cannot write {}", part.display()))?;
                link = Link::new(None, Some(Box::new(opened.try_clone()?)))?;
                file = Some((opened, part));
            }
        }
        let identity = Identity {
            id: random(),
            release: random(),
        };
        let offer = Offer::of(machine)?.to_bytes();
        let source = Source::new(machine, plan.settings.clone(), identity, offer, 0)?;
        Ok(Going {
            plan,
            link,
            source,
            began: Instant::now(),
            wait: Duration::ZERO,
            file,
            stored: false,
        })
    }

    fn step(&mut self, machine: &mut Machine, idle: Duration) -> Result<Step> {
        let mut idle = idle;
        loop {
            self.take_in(self.wait.max(idle).min(STEP));
            let now = self.began.elapsed().as_micros() as u64;
            let next = self.source.poll(machine, now);
            self.pass_on();
            self.wait = Duration::ZERO;
            idle = Duration::ZERO;
            match next {
                SourceNext::Run => return Ok(Step::Run),
                SourceNext::Wait { micros } => {
                    self.wait = Duration::from_micros(micros);
                    // From the stop on it is a matter of milliseconds; nothing comes between.
                    if !self.source.has_stopped() {
                        return Ok(Step::Rest);
                    }
                }
                SourceNext::Store => {
                    let outcome = self.store(machine).map_err(|error| format!("{error:#}"));
                    self.source.stored(outcome);
                }
                SourceNext::HandedOver => return self.handed_over(machine),
                SourceNext::GoOn(failure) => {
                    let why = self.why(&failure);
                    self.pass_on();
                    self.clear();
                    say_it_stays(&self.plan.to.to_string(), &why);
                    return Ok(Step::Back(self.source.take_unprinted()));
                }
                SourceNext::Undecided(failure) => return self.undecided(machine, &failure),
            }
        }
    }

    /// Bytes that arrived, or arrive within `time`.
    fn take_in(&mut self, time: Duration) {
        let mut time = time;
        for _ in 0..PIECES {
            let Some(bytes) = self.link.arrived(time) else {
                break;
            };
            self.source.receive(&bytes);
            time = Duration::ZERO;
        }
        if self.link.has_ended() {
            self.source.closed();
        }
    }

    /// Bytes that are to leave.
    fn pass_on(&mut self) {
        loop {
            let taken = self.link.send(self.source.output());
            if taken == 0 {
                return;
            }
            self.source.sent(taken);
        }
    }

    /// Before the commit: what was written of a stream is made lasting, and the machine is stored where that is wanted.
    fn store(&mut self, machine: &mut Machine) -> Result<()> {
        if self.plan.settings.one_way {
            self.link.settle()?;
        }
        if let Some((file, _)) = &self.file {
            file.sync_all()?;
        }
        if let Some(path) = &self.plan.durable {
            let record = self.record(machine, Owns::Undecided);
            store::write(path, &record, machine, &self.plan.about)?;
            self.stored = true;
        }
        Ok(())
    }

    fn record(&self, machine: &Machine, owns: Owns) -> Record {
        Record {
            side: Side::Source,
            owns,
            identity: self.source.identity(),
            lock: self.source.peer_lock().unwrap_or(0),
            tick: machine.now(),
        }
    }

    /// The failure, and what the host says of it.
    fn why(&mut self, failure: &Failure) -> String {
        match self.link.take_error() {
            Some(error) if *failure == Failure::Closed => format!("{failure}: {error}"),
            _ => failure.to_string(),
        }
    }

    /// Removes what was written for nothing.
    fn clear(&mut self) {
        if let Some((_, part)) = self.file.take() {
            let _ = fs::remove_file(part);
        }
        if let (true, Some(path)) = (self.stored, &self.plan.durable) {
            let _ = fs::remove_file(path);
        }
    }

    fn handed_over(&mut self, machine: &Machine) -> Result<Step> {
        if self.plan.settings.one_way {
            let mut written = self.link.settle();
            if let (Ok(()), Some((file, part)), Peer::File(path)) =
                (&written, &self.file, &self.plan.to)
            {
                written = file.sync_all().and_then(|()| fs::rename(part, path));
            }
            if let Err(error) = written {
                // Nobody else has the whole of it.
                self.clear();
                say_it_stays(&self.plan.to.to_string(), &error.to_string());
                return Ok(Step::Back(self.source.take_unprinted()));
            }
            self.file = None;
        }
        self.clear();
        let _ = io::stdout().flush();
        let progress = self.source.progress();
        Ok(Step::End(End::HandedOver(handed_over(
            &self.plan.to,
            progress,
            machine.now(),
        ))))
    }

    /// Keeps the machine until it is settled whose it is.
    fn undecided(&mut self, machine: &mut Machine, failure: &Failure) -> Result<Step> {
        let id = self.source.identity().id;
        let named = || PathBuf::from(format!("hypernest-{id:016x}.source"));
        let path = self.plan.durable.clone().unwrap_or_else(named);
        if !self.stored {
            let record = self.record(machine, Owns::Undecided);
            store::write(&path, &record, machine, &self.plan.about)?;
        }
        let why = self.why(failure);
        let to = &self.plan.to;
        Ok(Step::End(End::Undecided(format!(
            "migration {id:016x} to {to} is undecided ({why}): the machine is kept in {}; see there whether it goes on, \
             and settle it with hypernest migrate decide",
            path.display()
        ))))
    }
}

/// What is told of a move.
fn handed_over(to: &Peer, progress: &Progress, tick: Tick) -> String {
    let pages: u64 = progress.rounds.iter().map(|round| round.pages).sum();
    format!(
        "the machine was handed over to {to} at tick {tick}: {} rounds, {pages} pages, {:.1} MB in {:.3} s, downtime {:.1} ms",
        progress.rounds.len(),
        progress.bytes as f64 / 1e6,
        progress.micros as f64 / 1e6,
        progress.downtime as f64 / 1e3,
    )
}
