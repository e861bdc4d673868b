//! The board: everything a processor reaches through ports and memory that is not RAM.

mod custom;
mod memory;
mod ports;

use hypernest_cpu::{Bus, InterruptMessage, Ram, Tick};
use serde::{Deserialize, Serialize};

use self::custom::Custom;
use crate::builder::SerialSink;
use crate::device::DeviceError;
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
    /// A value that no device comes to.
    #[error("the saved state has a {0} that no machine comes to: it is damaged")]
    Impossible(&'static str),
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

    /// The last bytes, which a text that is watched for may continue.
    pub(crate) fn tail(&self) -> &[u8] {
        &self.tail
    }

    /// Goes on as after these.
    pub(crate) fn set_tail(&mut self, tail: &[u8]) {
        self.tail.clear();
        self.tail.extend_from_slice(tail);
    }

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
        for (possible, what) in [
            (state.rtc.is_possible(), "real-time clock"),
            (state.pit.is_possible(), "interval timer"),
            (state.interrupts.pic.is_possible(), "8259 pair"),
        ] {
            if !possible {
                return Err(BoardRestoreError::Impossible(what));
            }
        }
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
