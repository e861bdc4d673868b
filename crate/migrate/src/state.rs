//! A machine's state as sections: one for each part, so that each can change by itself.
//!
//! | Section | Content (postcard) |
//! |---|---|
//! | `config` | [`Config`] |
//! | `clock` | [`Clock`] |
//! | `vcpu`, one each | [`VcpuState`] |
//! | `interrupts`, `pit`, `rtc`, `power`, `serial`, `fw_cfg`, `test`, `i8042`, `pci` | the state of that device |
//! | `virtio`, one each | [`VirtioState`], without what was written to a disk |
//! | `custom`, one each | name and state of a device of the library's user |
//! | `ended` | whether the guest has ended its run, and how |
//! | `overlay` | slot (u32), and a batch of pages written to the disk in it |

use std::collections::BTreeMap;
use std::io::Write;

use hypernest_machine::devices::fw_cfg::FwCfgState;
use hypernest_machine::devices::i8042::I8042State;
use hypernest_machine::devices::pci::PciState;
use hypernest_machine::devices::pit::PitState;
use hypernest_machine::devices::power::PowerState;
use hypernest_machine::devices::rtc::RtcState;
use hypernest_machine::devices::serial::SerialState;
use hypernest_machine::devices::testdev::TestDeviceState;
use hypernest_machine::devices::virtio::{BackendState, VirtioState};
use hypernest_machine::{
    BoardState, Clock, Config, DiskInfo, InterruptsState, MachineState, STATE_VERSION, StopRequest,
    VcpuState,
};
use serde::{Deserialize, Serialize};

use crate::pages::{
    Codec, PAGE, Page, PageDecoder, PageEncoder, PageSource, PageTarget, Sharing, Zeros,
};
use crate::section::{Head, SectionError, SectionReader, SectionWriter, damaged};

/// Version of each section here.
const VERSION: u16 = 1;
pub(crate) const OVERLAY: &str = "overlay";

/// The state in bytes, disk overlays included.
///
/// # Errors
/// When a part of it is too long for a section.
pub fn state_to_bytes(state: &MachineState) -> Result<Vec<u8>, SectionError> {
    let mut writer = SectionWriter::bare(Vec::new());
    write_state(&mut writer, state)?;
    write_overlays(&mut writer, state, Codec::Lz4)?;
    writer.finish()
}

/// The state that [`state_to_bytes`] gave, for a machine with these disks.
///
/// # Errors
/// When the bytes are none, or have more than the disks.
pub fn state_from_bytes(bytes: &[u8], disks: &[DiskInfo]) -> Result<MachineState, SectionError> {
    let mut reader = SectionReader::bare(bytes);
    let mut parts = Parts::default();
    let mut overlays = Overlays::new(disks);
    let mut content = Vec::new();
    while let Some(head) = reader.next(&mut content)? {
        if head.name == OVERLAY {
            overlays.take(&head, &content)?;
        } else if !parts.take(&head, &content)? {
            head.pass_over()?;
        }
    }
    let rest = reader.into_inner().len();
    if rest != 0 {
        return Err(SectionError::Damaged(format!(
            "{rest} bytes follow its end"
        )));
    }
    let mut state = parts.finish()?;
    overlays.put(&mut state)?;
    Ok(state)
}

/// Writes everything but disk overlays.
pub(crate) fn write_state<W: Write>(
    writer: &mut SectionWriter<W>,
    state: &MachineState,
) -> Result<(), SectionError> {
    let MachineState {
        version: _,
        config,
        clock,
        vcpu,
        board,
    } = state;
    put(writer, "config", config)?;
    put(writer, "clock", clock)?;
    for vcpu in vcpu {
        put(writer, "vcpu", vcpu)?;
    }
    let BoardState {
        interrupts,
        pit,
        rtc,
        power,
        serial,
        fw_cfg,
        test,
        i8042,
        pci,
        virtio,
        custom,
        ended,
    } = board;
    put(writer, "interrupts", interrupts)?;
    put(writer, "pit", pit)?;
    put(writer, "rtc", rtc)?;
    put(writer, "power", power)?;
    put(writer, "serial", serial)?;
    put(writer, "fw_cfg", fw_cfg)?;
    put(writer, "test", test)?;
    put(writer, "i8042", i8042)?;
    put(writer, "pci", pci)?;
    for device in virtio {
        let bare = VirtioState {
            transport: device.transport.clone(),
            backend: match &device.backend {
                BackendState::Block(_) => BackendState::Block(Default::default()),
                console @ BackendState::Console(_) => console.clone(),
            },
        };
        put(writer, "virtio", &bare)?;
    }
    for device in custom {
        put(writer, "custom", device)?;
    }
    put(writer, "ended", ended)
}

fn put<W: Write, T: Serialize>(
    writer: &mut SectionWriter<W>,
    name: &'static str,
    value: &T,
) -> Result<(), SectionError> {
    let content = postcard::to_allocvec(value).map_err(|error| damaged(name, error))?;
    writer.required(name, VERSION, &content)
}

/// Writes what guests wrote to disks.
pub(crate) fn write_overlays<W: Write>(
    writer: &mut SectionWriter<W>,
    state: &MachineState,
    codec: Codec,
) -> Result<(), SectionError> {
    for (slot, device) in state.board.virtio.iter().enumerate() {
        let BackendState::Block(block) = &device.backend else {
            continue;
        };
        let pieces = Pieces(&block.overlay);
        let mut encoder = PageEncoder::new(codec, Sharing::All, Zeros::Named);
        let mut put = |batch: &[u8]| {
            let mut content = (slot as u32).to_le_bytes().to_vec();
            content.extend_from_slice(batch);
            writer.required(OVERLAY, VERSION, &content)
        };
        for (&number, piece) in &block.overlay {
            let Some(number) = u32::try_from(number).ok().filter(|_| piece.len() == PAGE) else {
                let what = format!("piece {number:#x} of disk {slot} cannot be written");
                return Err(damaged(OVERLAY, what));
            };
            if let Some(batch) = encoder.push(&pieces, number) {
                put(batch)?;
            }
        }
        if let Some(batch) = encoder.take() {
            put(batch)?;
        }
    }
    Ok(())
}

/// The state as far as it has come.
#[derive(Default)]
pub(crate) struct Parts {
    config: Option<Config>,
    clock: Option<Clock>,
    vcpu: Vec<VcpuState>,
    interrupts: Option<InterruptsState>,
    pit: Option<PitState>,
    rtc: Option<RtcState>,
    power: Option<PowerState>,
    serial: Option<SerialState>,
    fw_cfg: Option<FwCfgState>,
    test: Option<TestDeviceState>,
    i8042: Option<I8042State>,
    pci: Option<PciState>,
    virtio: Vec<VirtioState>,
    custom: Vec<(String, Vec<u8>)>,
    ended: Option<Option<StopRequest>>,
}

impl Parts {
    /// Takes a section; false when it is none of these.
    pub(crate) fn take(&mut self, head: &Head, content: &[u8]) -> Result<bool, SectionError> {
        match head.name.as_str() {
            "config" => once(&mut self.config, head, content),
            "clock" => once(&mut self.clock, head, content),
            "vcpu" => push(&mut self.vcpu, head, content),
            "interrupts" => once(&mut self.interrupts, head, content),
            "pit" => once(&mut self.pit, head, content),
            "rtc" => once(&mut self.rtc, head, content),
            "power" => once(&mut self.power, head, content),
            "serial" => once(&mut self.serial, head, content),
            "fw_cfg" => once(&mut self.fw_cfg, head, content),
            "test" => once(&mut self.test, head, content),
            "i8042" => once(&mut self.i8042, head, content),
            "pci" => once(&mut self.pci, head, content),
            "virtio" => push(&mut self.virtio, head, content),
            "custom" => push(&mut self.custom, head, content),
            "ended" => once(&mut self.ended, head, content),
            _ => return Ok(false),
        }?;
        Ok(true)
    }

    /// The state, with empty overlays.
    pub(crate) fn finish(self) -> Result<MachineState, SectionError> {
        let state = MachineState {
            version: STATE_VERSION,
            config: there("config", self.config)?,
            clock: there("clock", self.clock)?,
            vcpu: self.vcpu,
            board: BoardState {
                interrupts: there("interrupts", self.interrupts)?,
                pit: there("pit", self.pit)?,
                rtc: there("rtc", self.rtc)?,
                power: there("power", self.power)?,
                serial: there("serial", self.serial)?,
                fw_cfg: there("fw_cfg", self.fw_cfg)?,
                test: there("test", self.test)?,
                i8042: there("i8042", self.i8042)?,
                pci: there("pci", self.pci)?,
                virtio: self.virtio,
                custom: self.custom,
                ended: there("ended", self.ended)?,
            },
        };
        let (wanted, vcpus) = (state.config.cpus, state.vcpu.len());
        if vcpus as u64 != u64::from(wanted) {
            let what = format!("{wanted} vCPUs are configured and {vcpus} are there");
            return Err(damaged("vcpu", what));
        }
        Ok(state)
    }
}

fn there<T>(name: &str, part: Option<T>) -> Result<T, SectionError> {
    part.ok_or_else(|| SectionError::Damaged(format!("section {name:?} is missing")))
}

fn once<T: for<'a> Deserialize<'a>>(
    part: &mut Option<T>,
    head: &Head,
    content: &[u8],
) -> Result<(), SectionError> {
    if part.is_some() {
        return Err(damaged(&head.name, "it is there twice"));
    }
    *part = Some(get(head, content)?);
    Ok(())
}

fn push<T: for<'a> Deserialize<'a>>(
    parts: &mut Vec<T>,
    head: &Head,
    content: &[u8],
) -> Result<(), SectionError> {
    parts.push(get(head, content)?);
    Ok(())
}

/// A value in postcard, and nothing after it.
pub(crate) fn get<T: for<'a> Deserialize<'a>>(
    head: &Head,
    content: &[u8],
) -> Result<T, SectionError> {
    head.check_version(VERSION)?;
    let (value, rest) =
        postcard::take_from_bytes(content).map_err(|error| damaged(&head.name, error))?;
    if !rest.is_empty() {
        return Err(damaged(&head.name, "bytes follow its value"));
    }
    Ok(value)
}

/// What was written to disks, as it comes.
pub(crate) struct Overlays {
    disks: Vec<Overlay>,
}

struct Overlay {
    slot: usize,
    decoder: PageDecoder,
    pieces: Pieces<BTreeMap<u64, Vec<u8>>>,
    /// Pieces of the disk.
    most: u64,
}

impl Overlays {
    pub(crate) fn new(disks: &[DiskInfo]) -> Overlays {
        let disks = disks.iter().map(|disk| Overlay {
            slot: disk.slot,
            decoder: PageDecoder::new(),
            pieces: Pieces(BTreeMap::new()),
            most: disk.size.div_ceil(PAGE as u64),
        });
        Overlays {
            disks: disks.collect(),
        }
    }

    pub(crate) fn take(&mut self, head: &Head, content: &[u8]) -> Result<(), SectionError> {
        head.check_version(VERSION)?;
        let (slot, batch) = content
            .split_first_chunk()
            .ok_or_else(|| damaged(OVERLAY, "it is too short"))?;
        let slot = u32::from_le_bytes(*slot) as usize;
        let disk = self.disks.iter_mut().find(|disk| disk.slot == slot);
        let disk = disk.ok_or_else(|| damaged(OVERLAY, format!("there is no disk {slot}")))?;
        let mut target = Bounded {
            pieces: &mut disk.pieces,
            most: disk.most,
        };
        disk.decoder
            .decode(batch, &mut target)
            .map_err(|error| damaged(OVERLAY, error))
    }

    /// Puts them into the state of the disks.
    pub(crate) fn put(self, state: &mut MachineState) -> Result<(), SectionError> {
        for disk in self.disks {
            let device = state.board.virtio.get_mut(disk.slot);
            match device.map(|device| &mut device.backend) {
                Some(BackendState::Block(block)) => block.overlay = disk.pieces.0,
                _ if disk.pieces.0.is_empty() => {}
                _ => return Err(damaged(OVERLAY, format!("there is no disk {}", disk.slot))),
            }
        }
        Ok(())
    }
}

/// Pieces of a disk, as pages.
struct Pieces<M>(M);

fn piece(pieces: &BTreeMap<u64, Vec<u8>>, number: u32) -> Option<&Page> {
    pieces.get(&u64::from(number))?.first_chunk()
}

impl PageSource for Pieces<&BTreeMap<u64, Vec<u8>>> {
    fn page(&self, number: u32) -> Option<&Page> {
        piece(self.0, number)
    }
}

struct Bounded<'a> {
    pieces: &'a mut Pieces<BTreeMap<u64, Vec<u8>>>,
    most: u64,
}

impl PageSource for Bounded<'_> {
    fn page(&self, number: u32) -> Option<&Page> {
        piece(&self.pieces.0, number)
    }
}

impl PageTarget for Bounded<'_> {
    fn page_mut(&mut self, number: u32) -> Option<&mut Page> {
        let number = u64::from(number);
        if number >= self.most {
            return None;
        }
        let piece = self.pieces.0.entry(number);
        piece.or_insert_with(|| vec![0; PAGE]).first_chunk_mut()
    }
}
