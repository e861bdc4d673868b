//! The board: everything a processor reaches through ports and memory that is not RAM.

use hypernest_cpu::{Bus, InterruptMessage, Ram, Tick};
use serde::{Deserialize, Serialize};

use crate::builder::SerialSink;
use crate::device::{Claim, Device, DeviceAccess, DeviceContext, DeviceError};
use crate::devices::fw_cfg::{FwCfg, FwCfgState};
use crate::devices::i8042::{I8042, I8042State};
use crate::devices::pci::{Pci, PciState};
use crate::devices::pit::{Pit, PitState};
use crate::devices::power::{Power, PowerState};
use crate::devices::rtc::{Rtc, RtcState};
use crate::devices::serial::{Serial, SerialState};
use crate::devices::testdev::{TestDevice, TestDeviceState};
use crate::devices::virtio::{Backend, VirtioMmio, VirtioState};
use crate::interrupts::{Interrupts, InterruptsState, Source};
use crate::layout;
use crate::observer::{Access, AccessKind, Flow, Observer};

/// The guest ends its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopRequest {
    /// Power off.
    PowerOff,
    /// Reset.
    Reset,
    /// The exit port was written with this value.
    Exit(u32),
    /// This vCPU met a triple fault: on a PC, a reset.
    TripleFault(u32),
}

/// Why the board wants the engine to return, though the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    /// Serial output ended in the text of this index.
    Text(usize),
    /// An observer said so.
    Observer,
}

/// What the board consists of that changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {
    /// Wires, 8259 pair, I/O APIC.
    pub interrupts: InterruptsState,
    /// Interval timer.
    pub pit: PitState,
    /// Real-time clock.
    pub rtc: RtcState,
    /// ACPI fixed hardware.
    pub power: PowerState,
    /// Serial port.
    pub serial: SerialState,
    /// Firmware configuration.
    pub fw_cfg: FwCfgState,
    /// kvm-unit-tests device.
    pub test: TestDeviceState,
    /// Keyboard controller.
    pub i8042: I8042State,
    /// PCI configuration space.
    pub pci: PciState,
    /// Virtio devices.
    pub virtio: Vec<VirtioState>,
    /// Devices of the library's user: name and state.
    pub custom: Vec<(String, Vec<u8>)>,
    /// The guest has ended its run.
    pub ended: Option<StopRequest>,
}

/// A saved state does not fit this board.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BoardRestoreError {
    /// Other virtio devices.
    #[error(
        "the saved state has other virtio devices; build the machine with the same disks and consoles"
    )]
    Virtio,
    /// Other custom devices, or one that refuses its state.
    #[error(
        "the saved state does not fit custom device {0:?}; build the machine with the same devices, in the same order"
    )]
    Custom(String),
}

/// What comes out of a port, until somebody takes it.
#[derive(Default)]
pub(crate) struct Outlet {
    /// Takes every byte at once, where there is one.
    pub(crate) sink: Option<SerialSink>,
    pending: Vec<u8>,
    /// The last bytes, for matching.
    tail: Vec<u8>,
    watched: Vec<Vec<u8>>,
}

impl Outlet {
    const TAIL: usize = 4096;

    /// Takes a byte; the index of the watched text it completes.
    fn put(&mut self, byte: u8) -> Option<usize> {
        match &mut self.sink {
            Some(sink) => sink(&[byte]),
            None => self.pending.push(byte),
        }
        self.tail.push(byte);
        if self.tail.len() >= 2 * Self::TAIL {
            self.tail.drain(..Self::TAIL);
        }
        let found = self
            .watched
            .iter()
            .position(|text| !text.is_empty() && self.tail.ends_with(text))?;
        self.tail.clear();
        Some(found)
    }
}

struct Custom {
    device: Box<dyn Device>,
    claims: Vec<Claim>,
}

/// The board. Its devices are fields; those of the library's user come after them.
pub struct Board {
    pub(crate) interrupts: Interrupts,
    pub(crate) pit: Pit,
    pub(crate) rtc: Rtc,
    pub(crate) power: Power,
    pub(crate) serial: Serial,
    pub(crate) fw_cfg: FwCfg,
    pub(crate) test: TestDevice,
    pub(crate) i8042: I8042,
    pub(crate) pci: Pci,
    pub(crate) virtio: Vec<VirtioMmio>,
    custom: Vec<Custom>,
    pub(crate) ended: Option<StopRequest>,
    // What the host sees of it: no part of the state.
    pub(crate) observers: Vec<Box<dyn Observer>>,
    pub(crate) pause: Option<Pause>,
    pub(crate) serial_output: Outlet,
    debug_output: Vec<u8>,
    console_output: Vec<u8>,
    deadline: Option<Tick>,
}

/// The built-in device behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Port {
    Pic,
    Pit,
    SystemControl,
    Keyboard,
    Rtc,
    FastReset,
    TestLatch,
    TestFlush,
    Debug,
    Exit,
    Serial,
    FwCfgSelect,
    FwCfgData,
    Power,
    PowerTimer,
    PciAddress,
    ResetControl,
    PciData,
    TestInterrupt,
    Shutdown,
}

impl Port {
    fn at(port: u16) -> Option<Port> {
        Some(match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => Port::Pic,
            0x40..=0x43 => Port::Pit,
            0x61 => Port::SystemControl,
            0x60 | 0x64 => Port::Keyboard,
            0x70 | 0x71 => Port::Rtc,
            0x92 => Port::FastReset,
            0xe0..=0xe3 => Port::TestLatch,
            0xe4..=0xe7 => Port::TestFlush,
            0xe9 => Port::Debug,
            0xf4..=0xf7 => Port::Exit,
            layout::COM1..=0x3ff => Port::Serial,
            0x510 => Port::FwCfgSelect,
            0x511 => Port::FwCfgData,
            layout::PM1A_EVENT..=0x605 => Port::Power,
            layout::PM_TIMER..=0x60b => Port::PowerTimer,
            layout::RESET_CONTROL => Port::ResetControl,
            0xcf8..=0xcfb => Port::PciAddress,
            0xcfc..=0xcff => Port::PciData,
            0x2000..=0x2017 => Port::TestInterrupt,
            0x8900 => Port::Shutdown,
            _ => return None,
        })
    }
}

/// The built-in device behind a memory address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Virtio { slot: usize, offset: u64 },
    IoApic { offset: u64 },
    Test { offset: u64 },
}

fn all_ones(width: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(width.clamp(1, 8)))
}

impl Board {
    /// A board after reset, for a machine with `ram` bytes, `cpus` processors (at least one) and
    /// a clock that shows `epoch` seconds since 1970 at tick 0.
    pub fn new(ram: u64, cpus: u32, epoch: u64) -> Board {
        let mut board = Board {
            interrupts: Interrupts::default(),
            pit: Pit::default(),
            rtc: Rtc::new(epoch, ram, cpus),
            power: Power::default(),
            serial: Serial::default(),
            fw_cfg: FwCfg::new(ram, cpus),
            test: TestDevice::default(),
            i8042: I8042::default(),
            pci: Pci::default(),
            virtio: Vec::new(),
            custom: Vec::new(),
            ended: None,
            observers: Vec::new(),
            pause: None,
            serial_output: Outlet::default(),
            debug_output: Vec::new(),
            console_output: Vec::new(),
            deadline: None,
        };
        board.update(0);
        // The timer's output is high from the start: that is no edge.
        board.interrupts.forget_requests();
        board
    }

    /// Adds a virtio device in the next free slot.
    pub fn add_virtio(&mut self, backend: Backend) -> Result<(), DeviceError> {
        if self.virtio.len() == layout::VIRTIO_SLOTS {
            return Err(DeviceError::TooMany {
                what: "virtio devices",
                limit: layout::VIRTIO_SLOTS,
            });
        }
        self.virtio.push(VirtioMmio::new(backend));
        Ok(())
    }

    /// Adds a device of the library's user.
    pub fn add_device(&mut self, device: Box<dyn Device>) -> Result<(), DeviceError> {
        let name = device.name().to_owned();
        let claims = device.claims();
        if self.custom.len() == Source::CUSTOM {
            return Err(DeviceError::TooMany {
                what: "custom devices",
                limit: Source::CUSTOM,
            });
        }
        if self.custom.iter().any(|other| other.device.name() == name) {
            return Err(DeviceError::Name(name));
        }
        for (index, claim) in claims.iter().enumerate() {
            let sound = match claim {
                Claim::Ports(ports) => ports.start < ports.end && ports.end <= 0x1_0000,
                Claim::Memory(range) => range.start < range.end,
            };
            if !sound {
                return Err(DeviceError::Range {
                    device: name,
                    claim: claim.clone(),
                });
            }
            let others = self.custom.iter().flat_map(|other| &other.claims);
            let overlaps = |other: &Claim| match (claim, other) {
                (Claim::Ports(a), Claim::Ports(b)) => a.start < b.end && b.start < a.end,
                (Claim::Memory(a), Claim::Memory(b)) => a.start < b.end && b.start < a.end,
                _ => false,
            };
            let taken_by = if Self::meets_built_in(claim) {
                Some("a device of the board")
            } else if others.chain(&claims[..index]).any(overlaps) {
                Some("another custom device")
            } else {
                None
            };
            if let Some(taken_by) = taken_by {
                return Err(DeviceError::Overlap {
                    device: name,
                    claim: claim.clone(),
                    taken_by: taken_by.to_owned(),
                });
            }
        }
        self.custom.push(Custom { device, claims });
        self.update_deadline();
        Ok(())
    }

    fn meets_built_in(claim: &Claim) -> bool {
        match claim {
            Claim::Ports(ports) => ports.clone().any(|port| Port::at(port as u16).is_some()),
            Claim::Memory(range) => [
                (
                    layout::VIRTIO_BASE,
                    layout::VIRTIO_STRIDE * layout::VIRTIO_SLOTS as u64,
                ),
                (layout::IO_APIC, layout::IO_APIC_SIZE),
                (layout::LOCAL_APIC, 0x1000),
                (layout::TEST_RAM, layout::TEST_RAM_SIZE),
            ]
            .iter()
            .any(|&(start, len)| range.start < start + len && start < range.end),
        }
    }

    /// Everything that changes.
    pub fn state(&self) -> BoardState {
        BoardState {
            interrupts: self.interrupts.state(),
            pit: self.pit.state.clone(),
            rtc: self.rtc.state.clone(),
            power: self.power.state.clone(),
            serial: self.serial.state.clone(),
            fw_cfg: self.fw_cfg.state.clone(),
            test: self.test.state.clone(),
            i8042: self.i8042.state.clone(),
            pci: self.pci.state.clone(),
            virtio: self.virtio.iter().map(VirtioMmio::state).collect(),
            custom: self
                .custom
                .iter()
                .map(|custom| (custom.device.name().to_owned(), custom.device.save()))
                .collect(),
            ended: self.ended,
        }
    }

    /// Takes up a saved state. The board must have the same devices.
    pub fn restore(&mut self, state: &BoardState) -> Result<(), BoardRestoreError> {
        if self.virtio.len() != state.virtio.len() {
            return Err(BoardRestoreError::Virtio);
        }
        if self.custom.len() != state.custom.len() {
            let name = state.custom.get(self.custom.len()).map(|(name, _)| name);
            return Err(BoardRestoreError::Custom(name.cloned().unwrap_or_default()));
        }
        for (custom, (name, saved)) in self.custom.iter_mut().zip(&state.custom) {
            if custom.device.name() != name || !custom.device.restore(saved) {
                return Err(BoardRestoreError::Custom(name.clone()));
            }
        }
        for (device, saved) in self.virtio.iter_mut().zip(&state.virtio) {
            if !device.restore(saved) {
                return Err(BoardRestoreError::Virtio);
            }
        }
        self.interrupts.restore(&state.interrupts);
        self.pit.state = state.pit.clone();
        self.rtc.state = state.rtc.clone();
        self.power.state = state.power.clone();
        self.serial.state = state.serial.clone();
        self.fw_cfg.state = state.fw_cfg.clone();
        self.test.state = state.test.clone();
        self.i8042.state = state.i8042.clone();
        self.pci.state = state.pci.clone();
        self.ended = state.ended;
        self.pause = None;
        self.update_deadline();
        Ok(())
    }

    /// Bytes for the serial port to receive.
    pub fn serial_input(&mut self, bytes: &[u8]) {
        self.serial.feed(bytes);
        self.interrupts
            .set(Source::SERIAL, layout::COM1_GSI, self.serial.line());
    }

    /// Bytes for the virtio consoles to receive.
    pub fn console_input(&mut self, ram: &mut Ram, bytes: &[u8]) {
        for slot in 0..self.virtio.len() {
            self.virtio[slot].feed(ram, bytes);
            self.update_virtio(slot);
        }
    }

    /// What the serial port has sent since this was last asked.
    pub fn take_serial_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.serial_output.pending)
    }

    /// What was written to debug port E9h since this was last asked.
    pub fn take_debug_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.debug_output)
    }

    /// What virtio consoles have printed since this was last asked.
    pub fn take_console_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.console_output)
    }

    /// Stop the engine when serial output ends in one of these. Replaces earlier ones.
    pub(crate) fn watch(&mut self, texts: &[Vec<u8>]) {
        if self.serial_output.watched != texts {
            self.serial_output.watched = texts.to_vec();
        }
    }

    /// The user presses the power button.
    pub fn press_power_button(&mut self) {
        self.power.press_button();
        self.interrupts
            .set(Source::POWER, layout::SCI_GSI, self.power.line());
    }

    /// Carries all device outputs to their wires and recomputes the deadline.
    fn update(&mut self, now: Tick) {
        self.interrupts
            .set(Source::PIT, layout::PIT_GSI, self.pit.output(now));
        self.update_lines();
        for slot in 0..self.virtio.len() {
            self.update_virtio(slot);
        }
    }

    fn update_virtio(&mut self, slot: usize) {
        let line = self.virtio[slot].line();
        let gsi = layout::VIRTIO_GSI + slot as u8;
        self.interrupts.set(Source::virtio(slot), gsi, line);
    }

    fn update_lines(&mut self) {
        let Board {
            interrupts,
            rtc,
            power,
            serial,
            ..
        } = self;
        interrupts.set(Source::RTC, layout::RTC_GSI, rtc.line());
        interrupts.set(Source::POWER, layout::SCI_GSI, power.line());
        interrupts.set(Source::SERIAL, layout::COM1_GSI, serial.line());
        self.update_deadline();
    }

    fn update_deadline(&mut self) {
        let custom = self
            .custom
            .iter()
            .filter_map(|custom| custom.device.deadline());
        self.deadline = [
            self.pit.deadline(),
            self.rtc.deadline(),
            self.power.deadline(),
        ]
        .into_iter()
        .flatten()
        .chain(custom)
        .min();
    }

    fn end(&mut self, request: Option<StopRequest>) {
        // The first one counts: a machine that is off does not reset.
        self.ended = self.ended.or(request);
    }

    /// Lets every observer look at an access.
    fn observe(
        &mut self,
        ram: &mut Ram,
        now: Tick,
        kind: AccessKind,
        address: u64,
        width: u8,
        value: u64,
    ) -> u64 {
        let mut access = Access {
            now,
            kind,
            address,
            width,
            value,
        };
        for observer in &mut self.observers {
            if observer.access(&mut access, ram) == Flow::Stop {
                self.pause = Some(Pause::Observer);
            }
        }
        access.value & all_ones(width)
    }

    // ---- ports ----

    fn read_port(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8) -> u32 {
        let Some(device) = Port::at(port) else {
            return self.read_custom_port(ram, now, port, width);
        };
        match device {
            Port::PowerTimer if width == 4 => return Power::timer(now),
            Port::PciAddress if width == 4 && port == 0xcf8 => return self.pci.address(),
            Port::Exit => return 0,
            _ if width > 1 => return self.read_lanes(ram, now, port, width),
            _ => {}
        }
        let value = match device {
            Port::Pic => self.interrupts.pic.read(port),
            Port::Pit => self.pit.read(now, port & 3),
            Port::SystemControl => self.pit.read_port_61(now),
            Port::Keyboard => self.i8042.read(port),
            Port::Rtc => self.rtc.read(now, port),
            Port::FastReset => self.power.read_port_92(),
            Port::TestLatch => self.test.read_latch(port),
            Port::Debug => 0xe9, // tells that the port is there
            Port::Serial => self.serial.read(port - layout::COM1),
            Port::FwCfgData => self.fw_cfg.read(),
            Port::Power => self.power.read(now, port - layout::PM1A_EVENT),
            Port::PowerTimer => Power::timer(now).to_le_bytes()[usize::from(port & 3)],
            Port::PciAddress => self.pci.address().to_le_bytes()[usize::from(port & 3)],
            Port::ResetControl => self.power.read_reset(),
            Port::PciData => self.pci.read(port & 3),
            Port::Exit
            | Port::TestFlush
            | Port::FwCfgSelect
            | Port::TestInterrupt
            | Port::Shutdown => 0xff,
        };
        self.update_lines();
        u32::from(value)
    }

    /// A wide access to byte-wide devices: byte by byte on neighbouring ports, as on the ISA bus.
    fn read_lanes(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8) -> u32 {
        (0..width).fold(0, |value, lane| {
            let port = port.wrapping_add(u16::from(lane));
            value | self.read_port(ram, now, port, 1) << (8 * lane)
        })
    }

    fn write_port(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8, value: u32) {
        let Some(device) = Port::at(port) else {
            return self.write_custom_port(ram, now, port, width, value);
        };
        match device {
            Port::Exit => return self.end(Some(StopRequest::Exit(value))),
            Port::TestInterrupt => {
                let gsi = (port & 0x1f) as u8;
                return self.interrupts.set(Source::TEST, gsi, value != 0);
            }
            Port::TestFlush => return,
            Port::FwCfgSelect if width == 2 => return self.fw_cfg.select(value as u16),
            Port::PciAddress if width == 4 && port == 0xcf8 => return self.pci.set_address(value),
            Port::Power if width == 2 && port & 1 == 0 => {
                let offset = port - layout::PM1A_EVENT;
                let request = self.power.write(now, offset, 2, value as u16);
                self.end(request);
                return self.update_lines();
            }
            _ if width > 1 => {
                for lane in 0..width {
                    let port = port.wrapping_add(u16::from(lane));
                    self.write_port(ram, now, port, 1, value >> (8 * lane) & 0xff);
                }
                return;
            }
            _ => {}
        }
        let byte = value as u8;
        let request = match device {
            Port::Pic => {
                self.interrupts.pic.write(port, byte);
                None
            }
            Port::Pit => {
                self.pit.write(now, port & 3, byte);
                let output = self.pit.output(now);
                self.interrupts.set(Source::PIT, layout::PIT_GSI, output);
                None
            }
            Port::SystemControl => {
                self.pit.write_port_61(now, byte);
                None
            }
            Port::Keyboard => self.i8042.write(port, byte),
            Port::Rtc => {
                self.rtc.write(now, port, byte);
                None
            }
            Port::FastReset => self.power.write_port_92(byte),
            Port::TestLatch => {
                self.test.write_latch(port, byte);
                None
            }
            Port::Debug => {
                self.debug_output.push(byte);
                None
            }
            Port::Serial => {
                if let Some(byte) = self.serial.write(port - layout::COM1, byte)
                    && let Some(text) = self.serial_output.put(byte)
                {
                    self.pause = Some(Pause::Text(text));
                }
                None
            }
            Port::FwCfgSelect => {
                self.fw_cfg.select(u16::from(byte));
                None
            }
            Port::Power => self
                .power
                .write(now, port - layout::PM1A_EVENT, 1, u16::from(byte)),
            Port::ResetControl => self.power.write_reset(byte),
            Port::PciData => {
                self.pci.write(port & 3, byte);
                None
            }
            Port::Shutdown => self.test.write_shutdown(byte),
            Port::FwCfgData
            | Port::PowerTimer
            | Port::PciAddress
            | Port::Exit
            | Port::TestFlush
            | Port::TestInterrupt => None,
        };
        self.end(request);
        self.update_lines();
    }

    // ---- custom devices ----

    /// The custom device and the access that an address within one of its claims means.
    fn custom_at(
        &self,
        width: u8,
        offset_in: impl Fn(&Claim) -> Option<u64>,
    ) -> Option<(usize, DeviceAccess)> {
        self.custom.iter().enumerate().find_map(|(index, custom)| {
            custom.claims.iter().enumerate().find_map(|(claim, range)| {
                let offset = offset_in(range)?;
                let access = DeviceAccess {
                    claim,
                    offset,
                    width,
                };
                Some((index, access))
            })
        })
    }

    fn with_custom<T>(
        &mut self,
        ram: &mut Ram,
        now: Tick,
        index: usize,
        work: impl FnOnce(&mut dyn Device, &mut DeviceContext<'_>) -> T,
    ) -> T {
        let mut context = DeviceContext {
            ram,
            now,
            interrupts: &mut self.interrupts,
            source: Source::custom(index),
        };
        let result = work(&mut *self.custom[index].device, &mut context);
        self.update_deadline();
        result
    }

    fn custom_port(&self, port: u16, width: u8) -> Option<(usize, DeviceAccess)> {
        let port = u32::from(port);
        self.custom_at(width, |claim| match claim {
            Claim::Ports(ports) if ports.contains(&port) => Some(u64::from(port - ports.start)),
            _ => None,
        })
    }

    fn read_custom_port(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8) -> u32 {
        let Some((index, access)) = self.custom_port(port, width) else {
            return u32::MAX;
        };
        self.with_custom(ram, now, index, |device, context| {
            device.read(context, access)
        }) as u32
    }

    fn write_custom_port(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8, value: u32) {
        if let Some((index, access)) = self.custom_port(port, width) {
            self.with_custom(ram, now, index, |device, context| {
                device.write(context, access, u64::from(value));
            });
        }
    }

    fn custom_memory(&self, address: u64, width: u8) -> Option<(usize, DeviceAccess)> {
        self.custom_at(width, |claim| match claim {
            Claim::Memory(range) if range.contains(&address) => Some(address - range.start),
            _ => None,
        })
    }

    // ---- memory ----

    fn memory_at(&self, address: u64, width: u8) -> Option<Memory> {
        let offset_in = |start: u64, len: u64| {
            let offset = address.checked_sub(start)?;
            (offset.checked_add(u64::from(width))? <= len).then_some(offset)
        };
        let slots = layout::VIRTIO_STRIDE * self.virtio.len() as u64;
        if let Some(offset) = offset_in(layout::VIRTIO_BASE, slots) {
            return Some(Memory::Virtio {
                slot: (offset / layout::VIRTIO_STRIDE) as usize,
                offset: offset % layout::VIRTIO_STRIDE,
            });
        }
        if let Some(offset) = offset_in(layout::IO_APIC, layout::IO_APIC_SIZE) {
            return Some(Memory::IoApic { offset });
        }
        let offset = offset_in(layout::TEST_RAM, layout::TEST_RAM_SIZE)?;
        Some(Memory::Test { offset })
    }

    fn read_memory(&mut self, ram: &mut Ram, now: Tick, address: u64, width: u8) -> u64 {
        match self.memory_at(address, width) {
            Some(Memory::Virtio { slot, offset }) => self.virtio[slot].read(offset, width),
            Some(Memory::IoApic { offset }) => {
                u64::from(self.interrupts.io_apic.read(offset)) >> (8 * (offset & 3))
            }
            Some(Memory::Test { offset }) => self.test.read_memory(offset, width),
            None => match self.custom_memory(address, width) {
                Some((index, access)) => self.with_custom(ram, now, index, |device, context| {
                    device.read(context, access)
                }),
                None => u64::MAX,
            },
        }
    }

    fn write_memory(&mut self, ram: &mut Ram, now: Tick, address: u64, width: u8, value: u64) {
        match self.memory_at(address, width) {
            Some(Memory::Virtio { slot, offset }) => {
                self.virtio[slot].write(ram, offset, width, value, &mut self.console_output);
                self.update_virtio(slot);
            }
            Some(Memory::IoApic { offset }) => {
                if offset & 3 == 0 {
                    self.interrupts.io_apic.write(offset, value as u32);
                }
            }
            Some(Memory::Test { offset }) => self.test.write_memory(offset, width, value),
            None => {
                if let Some((index, access)) = self.custom_memory(address, width) {
                    self.with_custom(ram, now, index, |device, context| {
                        device.write(context, access, value);
                    });
                }
            }
        }
    }
}

impl Bus for Board {
    fn port_read(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8) -> u32 {
        let value = self.read_port(ram, now, port, width) & all_ones(width) as u32;
        if self.observers.is_empty() {
            return value;
        }
        let kind = AccessKind::PortRead;
        self.observe(ram, now, kind, u64::from(port), width, u64::from(value)) as u32
    }

    fn port_write(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8, mut value: u32) {
        if !self.observers.is_empty() {
            let kind = AccessKind::PortWrite;
            value = self.observe(ram, now, kind, u64::from(port), width, u64::from(value)) as u32;
        }
        self.write_port(ram, now, port, width, value & all_ones(width) as u32);
    }

    fn mmio_read(&mut self, ram: &mut Ram, now: Tick, address: u64, width: u8) -> u64 {
        let value = self.read_memory(ram, now, address, width) & all_ones(width);
        if self.observers.is_empty() {
            return value;
        }
        self.observe(ram, now, AccessKind::MemoryRead, address, width, value)
    }

    fn mmio_write(&mut self, ram: &mut Ram, now: Tick, address: u64, width: u8, mut value: u64) {
        if !self.observers.is_empty() {
            value = self.observe(ram, now, AccessKind::MemoryWrite, address, width, value);
        }
        self.write_memory(ram, now, address, width, value & all_ones(width));
    }

    #[inline]
    fn take_message(&mut self) -> Option<InterruptMessage> {
        let message = self.interrupts.take_message()?;
        for observer in &mut self.observers {
            observer.interrupt(&message);
        }
        Some(message)
    }

    fn end_of_interrupt(&mut self, _now: Tick, vector: u8) {
        self.interrupts.io_apic.end_of_interrupt(vector);
    }

    #[inline]
    fn intr(&self) -> bool {
        self.interrupts.pic.intr()
    }

    fn acknowledge(&mut self, _now: Tick) -> u8 {
        self.interrupts.pic.acknowledge()
    }

    #[inline]
    fn deadline(&self) -> Option<Tick> {
        self.deadline
    }

    fn advance(&mut self, ram: &mut Ram, now: Tick) {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        if let Some(output) = self.pit.advance(now) {
            if output.pulse {
                self.interrupts.set(Source::PIT, layout::PIT_GSI, false);
            }
            self.interrupts
                .set(Source::PIT, layout::PIT_GSI, output.level);
        }
        self.rtc.advance(now);
        self.power.advance(now);
        for index in 0..self.custom.len() {
            if self.custom[index]
                .device
                .deadline()
                .is_some_and(|deadline| deadline <= now)
            {
                self.with_custom(ram, now, index, |device, context| device.advance(context));
            }
        }
        self.update_lines();
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            // A custom device that keeps an old deadline does not make time stand still.
            self.deadline = now.checked_add(1);
        }
    }

    #[inline]
    fn stop_requested(&self) -> bool {
        self.ended.is_some() || self.pause.is_some()
    }
}

#[cfg(test)]
mod tests;
