//! `hypernest receive`: a machine that arrives and goes on here.

use std::fs::File;
use std::io::{self, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use hypernest_machine::{DeviceInfo, Machine, VmxLayouts};
use hypernest_migrate::hello::{Choices, Host, Offer, refusals};
use hypernest_migrate::live::record::{Owns, Record, Side};
use hypernest_migrate::live::{Destination, DestinationNext, Failure, Unprinted};
use hypernest_migrate::snapshot::About;

use super::link::Link;
use super::web_socket::{Client, Listener};
use super::{Peer, random, settings, store, token};
use crate::args::ReceiveArgs;
use crate::files;
use crate::run::BadInput;
use crate::setup::{Disk, find_layout, own_layouts};

/// The longest wait between two looks.
const STEP: Duration = Duration::from_millis(10);

/// Pieces that are taken in between two looks at most.
const PIECES: usize = 8;

/// A machine that has arrived.
pub struct Arrived {
    /// It.
    pub machine: Machine,
    /// What its guest had sent before and nobody printed.
    pub unprinted: Unprinted,
    /// Where it came from.
    pub from: String,
    /// What its snapshots say of themselves.
    pub about: About,
}

/// What became of one attempt.
enum Attempt {
    Arrived(Box<Arrived>),
    /// Somebody who never named a machine: nothing to do with us.
    Stranger(Failure),
    Failed(Failure),
    Undecided(String),
}

/// Waits for a machine. An error where none came: nothing is here then, but for a record that the error names.
///
/// # Errors
/// What `args` ask for cannot be (nothing was listened to then), or no machine came.
pub fn receive(args: &ReceiveArgs) -> Result<Arrived> {
    let place = Place::read(args).map_err(|error| error.context(BadInput))?;
    match &args.from {
        Peer::Address(address) => {
            let listener = TcpListener::bind(address)
                .with_context(|| format!("cannot listen on {address}"))
                .map_err(|error| error.context(BadInput))?;
            let address = listener.local_addr()?;
            eprintln!("hypernest: waiting for a machine on {address}");
            loop {
                let (socket, peer) = listener.accept()?;
                let link = Link::over(socket)?;
                match place.take(link, &peer.to_string())? {
                    Attempt::Stranger(failure) => {
                        eprintln!("hypernest: no machine from {peer}: {failure}");
                    }
                    other => return other.outcome(&peer.to_string()),
                }
            }
        }
        Peer::Page(address) => {
            let mut listener =
                Listener::bind(*address, Client::Gives, &args.session.moves.origins)?;
            let shown = format!("ws://{}", listener.address());
            eprintln!("hypernest: waiting for a page's machine on {shown}");
            loop {
                let Some(stream) = listener.poll() else {
                    std::thread::sleep(STEP);
                    continue;
                };
                match place.take(Link::web_socket(stream)?, &shown)? {
                    Attempt::Stranger(failure) => {
                        eprintln!("hypernest: no machine from a page: {failure}");
                    }
                    other => return other.outcome(&shown),
                }
            }
        }
        Peer::Standard => {
            let link = Link::new(Some(Box::new(io::stdin())), None)?;
            place.take(link, "stdin")?.outcome("stdin")
        }
        Peer::File(path) => {
            let shown = path.display();
            let what = || format!("cannot read the machine {shown}");
            let bad = |error: anyhow::Error| error.context(what()).context(BadInput);
            let file = File::open(path).map_err(|error| bad(error.into()))?;
            if file.metadata()?.is_dir() {
                return Err(bad(anyhow!("it is a directory; give a file")));
            }
            let link = Link::new(Some(Box::new(file) as Box<dyn Read + Send>), None)?;
            let from = path.display().to_string();
            place.take(link, &from)?.outcome(&from)
        }
    }
}

impl Attempt {
    fn outcome(self, from: &str) -> Result<Arrived> {
        match self {
            Attempt::Arrived(arrived) => Ok(*arrived),
            Attempt::Stranger(failure) | Attempt::Failed(failure) => {
                Err(anyhow!("no machine came from {from}: {failure}"))
            }
            Attempt::Undecided(what) => Err(anyhow!(what).context(Undecided)),
        }
    }
}

/// Marks an error that leaves a record of an undecided pair.
#[derive(Debug)]
pub struct Undecided;

impl std::fmt::Display for Undecided {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("undecided")
    }
}

/// What there is for a machine here.
struct Place<'a> {
    args: &'a ReceiveArgs,
    token: Vec<u8>,
    layouts: VmxLayouts,
}

impl Place<'_> {
    fn read(args: &ReceiveArgs) -> Result<Place<'_>> {
        let own = own_layouts(&args.regions.layouts)?;
        let find = |option: &str, name: &String| find_layout(option, name, &own);
        let written = args.regions.write_vmcs.as_ref();
        let layouts = VmxLayouts {
            advertised: None,
            written: written.map(|name| find("--write-vmcs", name)).transpose()?,
            accepted: args
                .regions
                .accept_vmcs
                .iter()
                .map(|name| find("--accept-vmcs", name))
                .collect::<Result<_>>()?,
        };
        for path in &args.disks {
            Disk::open(path)?;
        }
        if let Some(path) = &args.session.moves.durable {
            files::check_writable("record", path)?;
        }
        Ok(Place {
            token: token(args.session.moves.token_file.as_deref())?,
            args,
            layouts,
        })
    }

    /// Takes a machine over a link.
    fn take(&self, mut link: Link, from: &str) -> Result<Attempt> {
        let store = self.args.session.moves.durable.is_some();
        let mut destination = Destination::new(settings(self.token.clone(), store), random());
        let began = Instant::now();
        let mut wait = Duration::ZERO;
        let mut about = About::default();
        loop {
            let mut time = wait.min(STEP);
            // Not all that comes: what is here is dealt with first.
            for _ in 0..PIECES {
                let Some(bytes) = link.arrived(time) else {
                    break;
                };
                destination.receive(&bytes);
                time = Duration::ZERO;
            }
            if link.has_ended() {
                destination.closed();
            }
            let next = destination.poll(began.elapsed().as_micros() as u64);
            pass_on(&mut destination, &mut link);
            wait = Duration::ZERO;
            match next {
                DestinationNext::Wait { micros } => wait = Duration::from_micros(micros),
                DestinationNext::Judge => match self.judge(destination.offer().unwrap_or_default())
                {
                    Ok((machine, tells)) => {
                        about = tells;
                        destination.accept(machine);
                    }
                    Err(reasons) => destination.refuse(reasons),
                },
                DestinationNext::Store => {
                    let outcome = self.store(&mut destination, &about, Owns::Undecided);
                    destination.stored(outcome.map_err(|error| format!("{error:#}")));
                }
                DestinationNext::Own => {
                    if let (Some(path), Some(record)) = (
                        &self.args.session.moves.durable,
                        record(&mut destination, Owns::Yes),
                    ) && let Err(error) = store::mark(path, &record)
                    {
                        // It is this side's nevertheless.
                        eprintln!(
                            "hypernest: the machine goes on here, and if this ends it is lost: {error:#}"
                        );
                    }
                    destination.confirm();
                    pass_on(&mut destination, &mut link);
                    // What the source is told has left before the machine runs.
                    let _ = link.settle();
                    let unprinted = destination.take_unprinted();
                    let machine = destination.take_machine().context("there is no machine")?;
                    return Ok(Attempt::Arrived(Box::new(Arrived {
                        machine,
                        unprinted,
                        from: from.to_owned(),
                        about,
                    })));
                }
                DestinationNext::Failed(failure) => {
                    pass_on(&mut destination, &mut link);
                    self.clear(&destination);
                    let named = destination.offer().is_some() && failure != Failure::Token;
                    return Ok(match named {
                        true => Attempt::Failed(failure),
                        false => Attempt::Stranger(failure),
                    });
                }
                DestinationNext::Undecided(failure) => {
                    return self.undecided(&mut destination, &about, &failure);
                }
            }
        }
    }

    /// A machine for an offer, or why there can be none.
    fn judge(&self, offer: &[u8]) -> Result<(Machine, About), Vec<String>> {
        let one = |error: &dyn std::fmt::Display| vec![error.to_string()];
        let offer = Offer::from_bytes(offer).map_err(|error| one(&error))?;
        let disks = self.args.disks.iter().map(|path| Disk::open(path));
        let disks = disks
            .collect::<Result<Vec<_>>>()
            .map_err(|error| one(&error))?;
        let host = Host::of(&Choices {
            memory: self.args.memory_limit,
            hyperv: self.args.hyperv,
            layouts: self.layouts.clone(),
            devices: devices(&offer, &disks),
            ..Choices::default()
        });
        let mut reasons = refusals(&offer, &host.map_err(|error| one(&error))?);
        reasons.extend(offer.differences());
        if !reasons.is_empty() {
            return Err(reasons.iter().map(ToString::to_string).collect());
        }
        let machine = self
            .build(&offer, disks)
            .map_err(|error| vec![format!("{error:#}")])?;
        let about = About {
            boot: "received".into(),
            disks: self
                .args
                .disks
                .iter()
                .map(|path| files::name(path))
                .collect(),
            ..About::default()
        };
        Ok((machine, about))
    }

    /// A machine like the one that is offered, with these disks.
    fn build(&self, offer: &Offer, disks: Vec<Disk>) -> Result<Machine> {
        let config = offer.config(&self.layouts)?;
        let mut builder = Machine::builder()
            .memory(config.memory)
            .cpus(config.cpus)
            .model(&config.model)
            .epoch(config.epoch)
            .vmx(config.vmx)
            .hyperv(config.hyperv)
            .vmcs_layouts(config.layouts);
        if let Some(length) = self.args.session.block_length {
            builder = builder.block_length(length);
        }
        let mut disks = disks.into_iter();
        for device in &offer.devices {
            builder = match device {
                DeviceInfo::Console => builder.console(),
                DeviceInfo::Disk { read_only, .. } => match disks.next() {
                    Some(disk) if *read_only => builder.read_only_disk(disk),
                    Some(disk) => builder.disk(disk),
                    None => builder,
                },
                DeviceInfo::Custom(_) => builder,
            };
        }
        Ok(builder.build()?)
    }

    fn store(&self, destination: &mut Destination, about: &About, owns: Owns) -> Result<()> {
        let path = self
            .args
            .session
            .moves
            .durable
            .as_deref()
            .context("nowhere to store it")?;
        write(path, destination, about, owns)
    }

    /// Removes what was stored for nothing.
    fn clear(&self, destination: &Destination) {
        if let (Some(path), Some(identity)) =
            (&self.args.session.moves.durable, destination.identity())
        {
            let ours = store::read(path).is_ok_and(|record| record.identity == identity);
            if ours {
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// Keeps the machine until it is settled whose it is.
    fn undecided(
        &self,
        destination: &mut Destination,
        about: &About,
        failure: &Failure,
    ) -> Result<Attempt> {
        let id = destination.identity().map_or(0, |identity| identity.id);
        let path = match &self.args.session.moves.durable {
            Some(path) => path.clone(),
            None => {
                let path = PathBuf::from(format!("hypernest-{id:016x}.destination"));
                write(&path, destination, about, Owns::Undecided)?;
                path
            }
        };
        Ok(Attempt::Undecided(format!(
            "migration {id:016x} is undecided ({failure}): the machine is kept in {}; see at the source whether it goes \
             on there, and settle it with hypernest migrate decide",
            path.display()
        )))
    }
}

/// What stands behind virtio slots as they are offered, with these disks in their order.
fn devices(offer: &Offer, disks: &[Disk]) -> Vec<DeviceInfo> {
    let mut left = disks.iter();
    let mut devices: Vec<DeviceInfo> = offer
        .devices
        .iter()
        .filter_map(|device| match device {
            DeviceInfo::Console => Some(DeviceInfo::Console),
            DeviceInfo::Disk { read_only, .. } => {
                left.next().map(|disk| DeviceInfo::disk(disk, *read_only))
            }
            DeviceInfo::Custom(_) => None,
        })
        .collect();
    devices.extend(left.map(|disk| DeviceInfo::disk(disk, false)));
    devices
}

fn pass_on(destination: &mut Destination, link: &mut Link) {
    loop {
        let taken = link.send(destination.output());
        if taken == 0 {
            return;
        }
        destination.sent(taken);
    }
}

fn record(destination: &mut Destination, owns: Owns) -> Option<Record> {
    Some(Record {
        side: Side::Destination,
        owns,
        identity: destination.identity()?,
        lock: destination.peer_lock()?,
        tick: destination.machine()?.now(),
    })
}

fn write(path: &Path, destination: &mut Destination, about: &About, owns: Owns) -> Result<()> {
    let record = record(destination, owns).context("there is no machine")?;
    let machine = destination.machine().context("there is no machine")?;
    store::write(path, &record, machine, about)
}
