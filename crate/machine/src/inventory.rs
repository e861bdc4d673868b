//! The devices that a machine was built with beside those that each has: what another must be given to continue
//! from its state.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::{Backend, DiskImage};
use crate::hash;
use crate::machine::Machine;

/// Bytes at a disk's start that tell images apart.
const HEAD: u64 = 64 << 10;

/// One such device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceInfo {
    /// A disk on virtio.
    Disk {
        /// Bytes of its image.
        size: u64,
        /// The guest cannot write it.
        read_only: bool,
        /// Hash of the first 64 KiB of the image, of as much as can be read.
        head: u64,
    },
    /// A console on virtio.
    Console,
    /// A device of the library's user, by name.
    Custom(String),
}

impl DeviceInfo {
    /// A disk with this image.
    pub fn disk(image: &dyn DiskImage, read_only: bool) -> DeviceInfo {
        let size = image.size();
        let mut head = vec![0; size.min(HEAD) as usize];
        if !image.read(0, &mut head) {
            head.clear();
        }
        DeviceInfo::Disk {
            size,
            read_only,
            head: hash::bytes(0, &head),
        }
    }
}

impl Machine {
    /// The devices that were added when it was built: those on virtio in their order, then the others.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let virtio = self.board.virtio.iter().map(|slot| match &slot.backend {
            Backend::Block(block) => DeviceInfo::disk(block.image(), block.is_read_only()),
            Backend::Console(_) => DeviceInfo::Console,
        });
        let custom = self.board.custom_names().map(DeviceInfo::Custom);
        virtio.chain(custom).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_listed_in_their_order() {
        let disk = |byte| vec![byte; 1024];
        let machine = Machine::builder()
            .memory(1 << 20)
            .disk(disk(1))
            .console()
            .read_only_disk(disk(2))
            .build()
            .unwrap();
        let (first, second) = (
            DeviceInfo::disk(&disk(1), false),
            DeviceInfo::disk(&disk(2), true),
        );
        assert_ne!(first, DeviceInfo::disk(&disk(2), false));
        assert_eq!(machine.devices(), [first, DeviceInfo::Console, second]);
    }
}
