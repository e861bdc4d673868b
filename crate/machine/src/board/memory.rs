//! Memory that is not RAM: which device answers.

use hypernest_cpu::{Ram, Tick};

use super::Board;
use crate::layout;

/// The built-in device behind a memory address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Virtio { slot: usize, offset: u64 },
    IoApic { offset: u64 },
    Test { offset: u64 },
}

impl Board {
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

    pub(super) fn read_memory(&mut self, ram: &mut Ram, now: Tick, address: u64, width: u8) -> u64 {
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

    pub(super) fn write_memory(
        &mut self,
        ram: &mut Ram,
        now: Tick,
        address: u64,
        width: u8,
        value: u64,
    ) {
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
