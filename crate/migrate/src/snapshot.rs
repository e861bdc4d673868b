//! Snapshots: a machine in a file, from which it goes on exactly.
//!
//! A snapshot is a file of sections ([`crate::section`]): `about`, what the guest could see of its processor (`seen`), the
//! sections of the state ([`crate::state`]), one `disk` for each disk, and then what was written to disks (`overlay`) and memory (`ram`), each in batches of pages ([`crate::pages`]).
//! The image that the machine was booted from is not needed again; the images of its disks are.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use hypernest_machine::devices::virtio::BackendState;
use hypernest_machine::{
    BuildError, DiskImage, DiskInfo, EngineError, Machine, MachineBuilder, MachineState, Ram,
    RestoreError,
};
use serde::{Deserialize, Serialize};

use crate::hello::{Choices, Host, Offer, Reason, refusals};
use crate::pages::{Codec, PAGE, PageCounts, PageDecoder, PageEncoder, Sharing, Zeros};
use crate::section::{Head, Kind, SectionError, SectionReader, SectionWriter, damaged};
use crate::state::{self, OVERLAY, Overlays, Parts};

const RAM: &str = "ram";
const ABOUT: &str = "about";
const DISK: &str = "disk";
const SEEN: &str = "seen";

/// What people want to know of a snapshot; nothing depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Version of Hypernest that wrote it.
    pub writer: String,
    /// How the machine was booted.
    pub boot: String,
    /// Names of its disks, in order of their slots.
    pub disks: Vec<String>,
}

/// A disk of the machine, whose image is not in the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPart {
    /// Its place among the virtio devices.
    pub slot: u32,
    /// Bytes of its image.
    pub size: u64,
    /// The guest cannot write it.
    pub read_only: bool,
    /// [`fingerprint`] of its image.
    pub fingerprint: u32,
}

/// A snapshot cannot be written, or no machine can be made of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The file is none, or cannot be written.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The host behind the engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No machine with its configuration can be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The machine does not take the state.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// More memory than the caller wants to give.
    #[error("its machine has {memory} bytes of memory, and {most} are the most here")]
    Memory {
        /// Its bytes.
        memory: u64,
        /// The limit.
        most: u64,
    },
    /// The guest saw what is not here.
    #[error("its guest saw of the machine what is otherwise here: {}", one_line(.0))]
    Seen(Vec<Reason>),
    /// Disks are missing, or there are too many.
    #[error(
        "its machine has {wanted} disks, and {given} were given: give the image of each, in their order"
    )]
    Disks {
        /// Its disks.
        wanted: usize,
        /// Those given.
        given: usize,
    },
    /// A disk with another content.
    #[error(
        "disk {number} is not the one the machine had{what}: give the image as it was at its start"
    )]
    Disk {
        /// Which disk, from 1.
        number: usize,
        /// What differs.
        what: String,
    },
    /// A disk's image cannot be read.
    #[error("the image of disk {0} cannot be read")]
    Medium(usize),
}

fn one_line(reasons: &[Reason]) -> String {
    let reasons: Vec<String> = reasons.iter().map(Reason::to_string).collect();
    reasons.join("; ")
}

/// How a snapshot is to be written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// How pages are compressed.
    pub codec: Codec,
    /// What is said of it. The writer's version is added.
    pub about: About,
}

/// Writes a snapshot of `machine`, which can go on afterwards: it and every machine made from the snapshot do the
/// same. This is an event of the run, as [`Machine::save`] is.
///
/// # Errors
/// When the host behind the engine or `to` fails; the machine can go on.
pub fn write<W: Write>(
    machine: &mut Machine,
    to: W,
    options: &Options,
) -> Result<PageCounts, SnapshotError> {
    let state = machine.save()?;
    let mut writer = SectionWriter::new(to, Kind::Snapshot)?;
    let about = About {
        writer: env!("CARGO_PKG_VERSION").into(),
        ..options.about.clone()
    };
    let content = postcard::to_allocvec(&about).map_err(|error| damaged(ABOUT, error))?;
    writer.optional(ABOUT, 1, &content)?;
    writer.optional(SEEN, 1, &seen(machine)?.to_bytes())?;
    state::write_state(&mut writer, &state)?;
    for (n, disk) in machine.disks().into_iter().enumerate() {
        let part = DiskPart {
            slot: disk.slot as u32,
            size: disk.size,
            read_only: disk.read_only,
            fingerprint: fingerprint(machine, &disk).ok_or(SnapshotError::Medium(n + 1))?,
        };
        let content = postcard::to_allocvec(&part).map_err(|error| damaged(DISK, error))?;
        writer.required(DISK, 1, &content)?;
    }
    state::write_overlays(&mut writer, &state, options.codec)?;
    drop(state);
    let mut encoder = PageEncoder::new(options.codec, Sharing::All, Zeros::LeftOut);
    let ram = machine.ram().bytes();
    for number in 0..(ram.len() / PAGE) as u32 {
        if let Some(batch) = encoder.push(ram, number) {
            writer.required(RAM, 1, batch)?;
        }
    }
    if let Some(batch) = encoder.take() {
        writer.required(RAM, 1, batch)?;
    }
    writer.finish()?;
    Ok(encoder.counts())
}

/// What the guest could see, and a build of another day may have otherwise under the same names. Formats and devices have
/// sections of their own.
fn seen(machine: &Machine) -> Result<Offer, EngineError> {
    Ok(Offer {
        formats: Vec::new(),
        devices: Vec::new(),
        ..Offer::of(machine)?
    })
}

/// What of it is not as it was.
fn missing(seen: &Offer) -> Vec<Reason> {
    let choices = Choices {
        hyperv: true,
        ..Choices::default()
    };
    let mut reasons = match Host::of(&choices) {
        Ok(host) => refusals(seen, &host),
        // What cannot be built is found when it is.
        Err(_) => Vec::new(),
    };
    reasons.extend(seen.differences());
    reasons
}

/// A number over a disk's image: of its size, and of up to 1024 pieces of 4096 bytes at equal distances. `None` where the
/// medium fails.
pub fn fingerprint(machine: &Machine, disk: &DiskInfo) -> Option<u32> {
    const SAMPLES: u64 = 1024;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&disk.size.to_le_bytes());
    let pieces = disk.size.div_ceil(PAGE as u64);
    let mut piece = [0; PAGE];
    for sample in 0..pieces.min(SAMPLES) {
        // The first and the last are among them.
        let number = match pieces {
            0..=SAMPLES => sample,
            _ => (u128::from(sample) * u128::from(pieces - 1) / u128::from(SAMPLES - 1)) as u64,
        };
        let offset = number * PAGE as u64;
        let length = (disk.size - offset).min(PAGE as u64) as usize;
        if !machine.read_disk_image(disk.slot, offset, &mut piece[..length]) {
            return None;
        }
        hasher.update(&piece[..length]);
    }
    Some(hasher.finalize())
}

/// A snapshot whose memory is still to be read.
pub struct Snapshot<R: Read> {
    reader: SectionReader<R>,
    about: About,
    seen: Option<Offer>,
    state: MachineState,
    disks: Vec<DiskPart>,
    /// The first section after the state, where there is one.
    head: Option<Head>,
    content: Vec<u8>,
    sections: Sections,
}

/// How many sections of each name there are, and what they take.
pub type Sections = BTreeMap<String, SectionSize>;

/// Sections of one name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SectionSize {
    /// How many there are.
    pub count: u64,
    /// Bytes of their contents.
    pub bytes: u64,
}

/// The whole content of a snapshot, to be looked at.
pub struct Contents {
    /// The state, with what was written to disks.
    pub state: MachineState,
    /// Memory.
    pub ram: Ram,
    /// How pages of memory were stored; those that were left out are not counted.
    pub pages: PageCounts,
    /// What the file consists of.
    pub sections: Sections,
}

fn note(sections: &mut Sections, head: Option<&Head>) {
    if let Some(head) = head {
        let size = sections.entry(head.name.clone()).or_default();
        size.count += 1;
        size.bytes += head.length as u64;
    }
}

impl<R: Read> Snapshot<R> {
    /// Reads everything up to the memory.
    ///
    /// # Errors
    /// When it is no snapshot this build reads, or `from` fails.
    pub fn open(from: R) -> Result<Self, SnapshotError> {
        let mut reader = SectionReader::new(from, Kind::Snapshot)?;
        let mut parts = Parts::default();
        let mut about = About::default();
        let mut seen = None;
        let mut disks = Vec::new();
        let mut content = Vec::new();
        let mut sections = Sections::new();
        let head = loop {
            let Some(head) = reader.next(&mut content)? else {
                break None;
            };
            note(&mut sections, Some(&head));
            match head.name.as_str() {
                OVERLAY | RAM => break Some(head),
                // What cannot be read of it is of no consequence.
                ABOUT => about = state::get(&head, &content).unwrap_or_default(),
                // Of another version it is as good as not there.
                SEEN => seen = Offer::from_bytes(&content).ok(),
                DISK => disks.push(state::get(&head, &content)?),
                _ if parts.take(&head, &content)? => {}
                _ => head.pass_over()?,
            }
        };
        let state = parts.finish()?;
        let slots = |state: &MachineState| -> Vec<u32> {
            let devices = (0..).zip(&state.board.virtio);
            let disks =
                devices.filter(|(_, device)| matches!(device.backend, BackendState::Block(_)));
            disks.map(|(slot, _)| slot).collect()
        };
        let of_disks = disks.iter().map(|disk: &DiskPart| disk.slot);
        if !of_disks.eq(slots(&state)) {
            return Err(damaged(DISK, "they do not fit the virtio devices").into());
        }
        Ok(Snapshot {
            reader,
            about,
            seen,
            state,
            disks,
            head,
            content,
            sections,
        })
    }

    /// What is said of it.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The state, without what was written to disks.
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// The disks whose images it needs.
    pub fn disks(&self) -> &[DiskPart] {
        &self.disks
    }

    /// Makes the machine. `disks` are the images of its disks, in their order; `adjust` may add what is the host's: the
    /// serial sink, observers, devices of the library's user in the order they had, another engine.
    ///
    /// # Errors
    /// When the machine cannot be built with at most `memory` bytes of RAM, does not take the state, or the rest cannot
    /// be read.
    pub fn build<'a>(
        mut self,
        memory: u64,
        disks: Vec<Box<dyn DiskImage>>,
        adjust: impl FnOnce(MachineBuilder<'a>) -> MachineBuilder<'a>,
    ) -> Result<Machine, SnapshotError> {
        let config = &self.state.config;
        if config.memory > memory {
            let (memory, most) = (config.memory, memory);
            return Err(SnapshotError::Memory { memory, most });
        }
        let reasons = self.seen.as_ref().map(missing).unwrap_or_default();
        if !reasons.is_empty() {
            return Err(SnapshotError::Seen(reasons));
        }
        let (wanted, given) = (self.disks.len(), disks.len());
        if wanted != given {
            return Err(SnapshotError::Disks { wanted, given });
        }
        let mut builder = Machine::builder()
            .memory(config.memory)
            .cpus(config.cpus)
            .model(&config.model)
            .epoch(config.epoch)
            .vmx(config.vmx.clone())
            .hyperv(config.hyperv)
            .vmcs_layouts(config.layouts.clone());
        let mut disks = disks.into_iter().zip(&self.disks);
        for device in &self.state.board.virtio {
            builder = match device.backend {
                BackendState::Console(_) => builder.console(),
                BackendState::Block(_) => match disks.next() {
                    Some((image, part)) if part.read_only => builder.read_only_disk(image),
                    Some((image, _)) => builder.disk(image),
                    None => builder,
                },
            };
        }
        let mut machine = adjust(builder).build()?;
        for (n, (disk, part)) in machine.disks().iter().zip(&self.disks).enumerate() {
            let number = n + 1;
            if disk.size != part.size {
                let what = format!(": it has {} bytes and not {}", disk.size, part.size);
                return Err(SnapshotError::Disk { number, what });
            }
            let fingerprint = fingerprint(&machine, disk).ok_or(SnapshotError::Medium(number))?;
            if fingerprint != part.fingerprint {
                let what = String::new();
                return Err(SnapshotError::Disk { number, what });
            }
        }
        let disks = machine.disks();
        self.read_rest(&disks, machine.ram_mut().bytes_mut())?;
        machine.restore(&self.state)?;
        Ok(machine)
    }

    /// The whole content, to be looked at: the state with what was written to disks, and memory.
    ///
    /// # Errors
    /// When it has more than `memory` bytes of RAM, the host has no memory for it, or the rest cannot be read.
    pub fn contents(mut self, memory: u64) -> Result<Contents, SnapshotError> {
        let size = self.state.config.memory;
        if size > memory {
            let (memory, most) = (size, memory);
            return Err(SnapshotError::Memory { memory, most });
        }
        let mut ram = Ram::new(size).map_err(|error| damaged("config", error))?;
        let disks: Vec<DiskInfo> = self.disks.iter().map(DiskPart::info).collect();
        let pages = self.read_rest(&disks, ram.bytes_mut())?;
        Ok(Contents {
            state: self.state,
            ram,
            pages,
            sections: self.sections,
        })
    }

    /// Reads disks' overlays and memory, which is zeros before.
    fn read_rest(
        &mut self,
        disks: &[DiskInfo],
        ram: &mut [u8],
    ) -> Result<PageCounts, SnapshotError> {
        let mut overlays = Overlays::new(disks);
        let mut decoder = PageDecoder::once((ram.len() / PAGE) as u64);
        let mut next = self.head.take();
        while let Some(head) = next {
            match head.name.as_str() {
                OVERLAY => overlays.take(&head, &self.content)?,
                RAM => {
                    head.check_version(1)?;
                    let outcome = decoder.decode(&self.content, ram);
                    outcome.map_err(|error| damaged(RAM, error))?;
                }
                _ => head.pass_over()?,
            }
            next = self.reader.next(&mut self.content)?;
            note(&mut self.sections, next.as_ref());
        }
        overlays.put(&mut self.state)?;
        Ok(decoder.counts())
    }
}

impl DiskPart {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            slot: self.slot as usize,
            size: self.size,
            read_only: self.read_only,
        }
    }
}
