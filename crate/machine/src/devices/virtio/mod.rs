//! Virtio devices over memory-mapped registers (virtio 1.2, "Virtio Over MMIO").

pub mod block;
pub mod console;
mod queue;

use hypernest_cpu::Ram;
use serde::{Deserialize, Serialize};

pub use block::{Block, BlockState, DiskImage};
pub use console::{Console, ConsoleState};
pub use queue::{Broken, Chain, QueueState};

/// Names from virtio 1.2, "MMIO Device Register Layout", "Device Status Field".
mod spec {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const SHARED_MEMORY: std::ops::Range<u64> = 0x0b0..0x0c0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
    /// "virt".
    pub const MAGIC_VALUE: u32 = 0x7472_6976;
    /// Any value: drivers do not look.
    pub const VENDOR_VALUE: u32 = 0x5452_4e48;
    /// Feature 32: this is not the legacy interface.
    pub const VERSION_1: u64 = 1 << 32;
    pub const FEATURES_OK: u8 = 1 << 3;
    pub const DRIVER_OK: u8 = 1 << 2;
    pub const NEEDS_RESET: u8 = 1 << 6;
    /// Interrupt causes.
    pub const USED_BUFFER: u32 = 1 << 0;
    pub const CONFIGURATION: u32 = 1 << 1;
}

/// Longest queue.
pub const QUEUE_SIZE: u16 = 256;

/// What stands behind the registers.
#[derive(Debug)]
pub enum Backend {
    /// A disk.
    Block(Block),
    /// A terminal.
    Console(Console),
}

/// Volatile state of a backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendState {
    /// Of a disk.
    Block(BlockState),
    /// Of a terminal.
    Console(ConsoleState),
}

impl Backend {
    fn device_id(&self) -> u32 {
        match self {
            Backend::Block(_) => 2,
            Backend::Console(_) => 3,
        }
    }

    fn features(&self) -> u64 {
        spec::VERSION_1
            | match self {
                Backend::Block(block) => block.features(),
                Backend::Console(_) => 0,
            }
    }

    fn queues(&self) -> usize {
        match self {
            Backend::Block(_) => 1,
            Backend::Console(_) => 2,
        }
    }

    fn config(&self, offset: u64) -> u8 {
        match self {
            Backend::Block(block) => block.config(offset),
            Backend::Console(_) => 0,
        }
    }
}

/// The registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device status.
    pub status: u8,
    /// Which half of the device features is read.
    pub device_features_select: u32,
    /// Which half of the driver features is written.
    pub driver_features_select: u32,
    /// Features the driver takes.
    pub driver_features: u64,
    /// Selected queue.
    pub queue_select: u32,
    /// Interrupt causes.
    pub interrupt_status: u32,
    /// Queues.
    pub queues: Vec<QueueState>,
}

/// A slot's whole state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// Registers and queues.
    pub transport: TransportState,
    /// What stands behind them.
    pub backend: BackendState,
}

/// A virtio device in one memory-mapped slot.
#[derive(Debug)]
pub struct VirtioMmio {
    pub(crate) backend: Backend,
    transport: TransportState,
}

impl VirtioMmio {
    /// A device after reset.
    pub fn new(backend: Backend) -> VirtioMmio {
        let mut device = VirtioMmio {
            backend,
            transport: TransportState::default(),
        };
        device.reset();
        device
    }

    fn reset(&mut self) {
        self.transport = TransportState {
            queues: vec![QueueState::default(); self.backend.queues()],
            ..TransportState::default()
        };
    }

    pub(crate) fn state(&self) -> VirtioState {
        VirtioState {
            transport: self.transport.clone(),
            backend: match &self.backend {
                Backend::Block(block) => BackendState::Block(block.state.clone()),
                Backend::Console(console) => BackendState::Console(console.state.clone()),
            },
        }
    }

    /// Takes up a saved state; false when it is that of another kind of device.
    pub(crate) fn restore(&mut self, state: &VirtioState) -> bool {
        if state.transport.queues.len() != self.backend.queues() {
            return false;
        }
        match (&mut self.backend, &state.backend) {
            (Backend::Block(block), BackendState::Block(saved)) => block.state = saved.clone(),
            (Backend::Console(console), BackendState::Console(saved)) => {
                console.state = saved.clone();
            }
            _ => return false,
        }
        self.transport = state.transport.clone();
        true
    }

    /// Level of the interrupt output.
    pub fn line(&self) -> bool {
        self.transport.interrupt_status != 0
    }

    fn queue(&mut self) -> Option<&mut QueueState> {
        self.transport
            .queues
            .get_mut(self.transport.queue_select as usize)
    }

    /// Reads `width` bytes at `offset` of the slot.
    pub fn read(&mut self, offset: u64, width: u8) -> u64 {
        if let Some(config) = offset.checked_sub(spec::CONFIG) {
            let byte = |i: u8| u64::from(self.backend.config(config + u64::from(i))) << (8 * i);
            return (0..width.min(8)).map(byte).sum();
        }
        if width != 4 {
            return 0; // registers are 32 bits wide
        }
        u64::from(self.register(offset))
    }

    fn register(&mut self, offset: u64) -> u32 {
        match offset {
            spec::MAGIC => spec::MAGIC_VALUE,
            spec::VERSION => 2,
            spec::DEVICE_ID => self.backend.device_id(),
            spec::VENDOR_ID => spec::VENDOR_VALUE,
            spec::DEVICE_FEATURES => match self.transport.device_features_select {
                0 => self.backend.features() as u32,
                1 => (self.backend.features() >> 32) as u32,
                _ => 0,
            },
            spec::QUEUE_SIZE_MAX if self.queue().is_some() => u32::from(QUEUE_SIZE),
            spec::QUEUE_READY => self.queue().map_or(0, |queue| u32::from(queue.ready)),
            spec::INTERRUPT_STATUS => self.transport.interrupt_status,
            spec::STATUS => u32::from(self.transport.status),
            offset if spec::SHARED_MEMORY.contains(&offset) => u32::MAX, // there is none
            spec::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// Writes `width` bytes at `offset` of the slot. `output` takes what a terminal prints.
    pub fn write(
        &mut self,
        ram: &mut Ram,
        offset: u64,
        width: u8,
        value: u64,
        output: &mut Vec<u8>,
    ) {
        if width != 4 || offset >= spec::CONFIG {
            return; // registers are 32 bits wide; no configuration can be written
        }
        let value = value as u32;
        match offset {
            spec::DEVICE_FEATURES_SELECT => self.transport.device_features_select = value,
            spec::DRIVER_FEATURES_SELECT => self.transport.driver_features_select = value,
            spec::DRIVER_FEATURES => {
                let shift = match self.transport.driver_features_select {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let features = &mut self.transport.driver_features;
                *features = *features & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            spec::QUEUE_SELECT => self.transport.queue_select = value,
            spec::QUEUE_NOTIFY => self.notify(ram, value, output),
            spec::INTERRUPT_ACK => self.transport.interrupt_status &= !value,
            spec::STATUS => self.set_status(value as u8),
            _ => {
                if let Some(queue) = self.queue() {
                    set_queue_register(queue, offset, value);
                }
            }
        }
    }

    fn set_status(&mut self, status: u8) {
        if status == 0 {
            return self.reset();
        }
        let mut status = status | self.transport.status & spec::NEEDS_RESET;
        let wanted = self.transport.driver_features;
        let acceptable = wanted & !self.backend.features() == 0 && wanted & spec::VERSION_1 != 0;
        if !acceptable {
            status &= !spec::FEATURES_OK;
        }
        self.transport.status = status;
    }

    /// Works on the queue the driver has filled.
    fn notify(&mut self, ram: &mut Ram, index: u32, output: &mut Vec<u8>) {
        let running = spec::DRIVER_OK | spec::FEATURES_OK;
        if self.transport.status & (running | spec::NEEDS_RESET) != running {
            return;
        }
        let Some(queue) = self.transport.queues.get_mut(index as usize) else {
            return;
        };
        let done = match (&mut self.backend, index) {
            (Backend::Block(block), _) => block.process(ram, queue),
            (Backend::Console(console), 0) => console.receive(ram, queue),
            (Backend::Console(console), _) => console.transmit(ram, queue, output),
        };
        match done {
            Ok(true) => self.transport.interrupt_status |= spec::USED_BUFFER,
            Ok(false) => {}
            Err(Broken) => {
                self.transport.status |= spec::NEEDS_RESET;
                self.transport.interrupt_status |= spec::CONFIGURATION;
            }
        }
    }

    /// Bytes for the guest, where this is a terminal.
    pub(crate) fn feed(&mut self, ram: &mut Ram, bytes: &[u8]) {
        if let Backend::Console(console) = &mut self.backend {
            console.feed(bytes);
            self.notify(ram, 0, &mut Vec::new());
        }
    }
}

fn set_queue_register(queue: &mut QueueState, offset: u64, value: u32) {
    let half = |address: &mut u64, high: bool| {
        let shift = if high { 32 } else { 0 };
        *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
    };
    match offset {
        spec::QUEUE_READY => {
            queue.ready = value & 1 != 0;
            if !queue.ready {
                *queue = QueueState::default();
            }
        }
        // The layout of a live queue does not change.
        _ if queue.ready => {}
        spec::QUEUE_SIZE if value.is_power_of_two() && value <= u32::from(QUEUE_SIZE) => {
            queue.size = value as u16;
        }
        spec::QUEUE_DESCRIPTORS | 0x084 => half(&mut queue.descriptors, offset & 4 != 0),
        spec::QUEUE_DRIVER | 0x094 => half(&mut queue.driver, offset & 4 != 0),
        spec::QUEUE_DEVICE | 0x0a4 => half(&mut queue.device, offset & 4 != 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
