//! The disks of a machine, as far as they stay with the host: a saved state has only what the guest wrote.

use crate::devices::virtio::{Backend, Block};
use crate::machine::Machine;

/// A disk that was given to the builder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Its place among the virtio devices, from 0.
    pub slot: usize,
    /// Bytes of its image.
    pub size: u64,
    /// The guest cannot write it.
    pub read_only: bool,
}

impl Machine {
    /// Its disks, in the order of their slots.
    pub fn disks(&self) -> Vec<DiskInfo> {
        let slots = (0..self.board.virtio.len()).filter_map(|slot| Some((slot, self.block(slot)?)));
        slots
            .map(|(slot, block)| DiskInfo {
                slot,
                size: block.image().size(),
                read_only: block.is_read_only(),
            })
            .collect()
    }

    /// Copies from a disk's image as the builder got it, without what the guest wrote. False where there is no
    /// disk in the slot, the range is not in it, or the medium fails.
    pub fn read_disk_image(&self, slot: usize, offset: u64, into: &mut [u8]) -> bool {
        self.block(slot).is_some_and(|block| {
            let end = offset.checked_add(into.len() as u64);
            end.is_some_and(|end| end <= block.image().size()) && block.image().read(offset, into)
        })
    }

    fn block(&self, slot: usize) -> Option<&Block> {
        match &self.board.virtio.get(slot)?.backend {
            Backend::Block(block) => Some(block),
            Backend::Console(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_seen_as_they_were_given() {
        let builder = Machine::builder().memory(1 << 20).console();
        let machine = builder.read_only_disk(vec![5; 1000]).build().unwrap();
        let disk = DiskInfo {
            slot: 1,
            size: 1000,
            read_only: true,
        };
        assert_eq!(machine.disks(), [disk]);
        let mut bytes = [0; 10];
        assert!(machine.read_disk_image(1, 990, &mut bytes));
        assert_eq!(bytes, [5; 10]);
        assert!(!machine.read_disk_image(1, 991, &mut bytes));
        assert!(!machine.read_disk_image(1, u64::MAX, &mut bytes));
        assert!(!machine.read_disk_image(0, 0, &mut bytes));
        assert!(!machine.read_disk_image(2, 0, &mut bytes));
    }
}
