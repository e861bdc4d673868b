//! The split virtqueue (virtio 1.2, "Split Virtqueues"). Nothing in guest memory is believed:
//! addresses are checked, and every loop is bounded by the size of the queue.

use hypernest_cpu::Ram;
use serde::{Deserialize, Serialize};

use super::QUEUE_SIZE;

/// Names from virtio 1.2, "The Virtqueue Descriptor Table".
mod spec {
    pub const NEXT: u16 = 1 << 0;
    pub const WRITE: u16 = 1 << 1;
    /// Available ring: the driver wants no interrupts.
    pub const NO_INTERRUPT: u16 = 1 << 0;
}

/// Most bytes one request may span.
const CHAIN_LIMIT: u64 = 16 << 20;

/// The driver has set up a queue that makes no sense. The device asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Number of descriptors.
    pub size: u16,
    /// The driver has set it up.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub driver: u64,
    /// Guest-physical address of the used ring.
    pub device: u64,
    /// Next entry of the available ring to look at.
    pub next_available: u16,
    /// Next entry of the used ring to write.
    pub next_used: u16,
}

impl Default for QueueState {
    fn default() -> QueueState {
        QueueState {
            size: QUEUE_SIZE,
            ready: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_available: 0,
            next_used: 0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Buffer {
    address: u64,
    len: u32,
}

/// A request: buffers the device reads, then buffers it writes.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

fn load_u16(ram: &Ram, address: u64) -> Result<u16, Broken> {
    ram.load(address)
        .map(u16::from_le_bytes)
        .map_err(|_| Broken)
}

impl QueueState {
    /// The next request, or `None` when the driver has offered no more.
    pub fn pop(&mut self, ram: &Ram) -> Result<Option<Chain>, Broken> {
        if !self.ready {
            return Ok(None);
        }
        let available = load_u16(ram, self.driver.wrapping_add(2))?;
        let waiting = available.wrapping_sub(self.next_available);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.size {
            return Err(Broken);
        }
        let slot = u64::from(self.next_available % self.size);
        let head = load_u16(ram, self.driver.wrapping_add(4 + 2 * slot))?;
        let chain = self.chain(ram, head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    fn chain(&self, ram: &Ram, head: u16) -> Result<Chain, Broken> {
        let mut chain = Chain {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut index = head;
        let mut total = 0;
        for _ in 0..self.size {
            if index >= self.size {
                return Err(Broken);
            }
            let at = self.descriptors.wrapping_add(16 * u64::from(index));
            let descriptor: [u8; 16] = ram.load(at).map_err(|_| Broken)?;
            let field = u128::from_le_bytes(descriptor);
            let buffer = Buffer {
                address: field as u64,
                len: (field >> 64) as u32,
            };
            let flags = (field >> 96) as u16;
            total += u64::from(buffer.len);
            if total > CHAIN_LIMIT {
                return Err(Broken);
            }
            if flags & spec::WRITE != 0 {
                chain.writable.push(buffer);
            } else if chain.writable.is_empty() {
                chain.readable.push(buffer);
            } else {
                return Err(Broken); // what the device reads comes first
            }
            if flags & spec::NEXT == 0 {
                return Ok(chain);
            }
            index = (field >> 112) as u16;
        }
        Err(Broken) // a loop
    }

    /// Gives a request back after `written` bytes were written to it.
    pub fn push(&mut self, ram: &mut Ram, chain: &Chain, written: u32) -> Result<(), Broken> {
        let slot = u64::from(self.next_used % self.size);
        let entry = u64::from(written) << 32 | u64::from(chain.head);
        let at = self.device.wrapping_add(4 + 8 * slot);
        ram.write(at, &entry.to_le_bytes()).map_err(|_| Broken)?;
        self.next_used = self.next_used.wrapping_add(1);
        ram.write(self.device.wrapping_add(2), &self.next_used.to_le_bytes())
            .map_err(|_| Broken)
    }

    /// Whether the driver wants to hear of used buffers.
    pub fn wants_interrupt(&self, ram: &Ram) -> Result<bool, Broken> {
        Ok(load_u16(ram, self.driver)? & spec::NO_INTERRUPT == 0)
    }

    /// Lets `serve` work on the requests that wait, at most one queue full. It returns the bytes
    /// it wrote. True when the driver is to be interrupted.
    pub fn serve(
        &mut self,
        ram: &mut Ram,
        mut serve: impl FnMut(&mut Ram, &Chain) -> Result<u32, Broken>,
    ) -> Result<bool, Broken> {
        let mut any = false;
        for _ in 0..self.size {
            let Some(chain) = self.pop(ram)? else { break };
            let written = serve(ram, &chain)?;
            self.push(ram, &chain, written)?;
            any = true;
        }
        Ok(any && self.wants_interrupt(ram)?)
    }
}

impl Chain {
    /// Everything the driver wants read.
    pub fn read(&self, ram: &Ram) -> Result<Vec<u8>, Broken> {
        let mut bytes = Vec::new();
        for buffer in &self.readable {
            let start = bytes.len();
            bytes.resize(start + buffer.len as usize, 0);
            if buffer.len != 0 {
                ram.read(buffer.address, &mut bytes[start..])
                    .map_err(|_| Broken)?;
            }
        }
        Ok(bytes)
    }

    /// Bytes of room to write to.
    pub fn room(&self) -> usize {
        self.writable.iter().map(|buffer| buffer.len as usize).sum()
    }

    /// Writes `bytes` from byte `skip` of the room on. What does not fit is left out.
    pub fn write(&self, ram: &mut Ram, mut skip: usize, mut bytes: &[u8]) -> Result<(), Broken> {
        for buffer in &self.writable {
            let len = buffer.len as usize;
            if skip >= len {
                skip -= len;
                continue;
            }
            let now = bytes.len().min(len - skip);
            let (part, rest) = bytes.split_at(now);
            let at = buffer.address.checked_add(skip as u64).ok_or(Broken)?;
            ram.write(at, part).map_err(|_| Broken)?;
            bytes = rest;
            skip = 0;
        }
        Ok(())
    }
}
