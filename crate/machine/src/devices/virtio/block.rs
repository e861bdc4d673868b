//! A disk (virtio 1.2, "Block Device"): a raw image nobody changes, and, unless it is read-only,
//! an overlay in memory that keeps what the guest writes.

use std::collections::BTreeMap;
use std::fmt;

use hypernest_cpu::Ram;
use serde::{Deserialize, Serialize};

use super::queue::{Broken, Chain, QueueState};

/// Names from virtio 1.2, "Block Device", "Feature bits" and "Device Operation".
mod spec {
    pub const SEGMENTS_MAX: u64 = 1 << 2;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const FLUSH: u64 = 1 << 9;
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH_REQUEST: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const OK: u8 = 0;
    pub const IO_ERROR: u8 = 1;
    pub const UNSUPPORTED: u8 = 2;
    pub const HEADER: usize = 16;
    pub const ID: &[u8; 20] = b"hypernest\0\0\0\0\0\0\0\0\0\0\0";
}

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Bytes of a piece of the overlay.
const PIECE: u64 = 4096;

/// A disk's content before the guest changes anything.
pub trait DiskImage: Send {
    /// Bytes. A last sector that is not full reads zeros at its end.
    fn size(&self) -> u64;
    /// Copies from `offset` on; `into` lies within the size. False when the medium fails.
    fn read(&self, offset: u64, into: &mut [u8]) -> bool;
}

impl DiskImage for Box<dyn DiskImage> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> bool {
        (**self).read(offset, into)
    }
}

impl DiskImage for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> bool {
        let start = offset as usize;
        match self.get(start..start + into.len()) {
            Some(bytes) => {
                into.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }
}

/// What changes on a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Written pieces of 4096 bytes, by number.
    pub overlay: BTreeMap<u64, Vec<u8>>,
}

/// The disk.
pub struct Block {
    // Fixed configuration.
    image: Box<dyn DiskImage>,
    read_only: bool,
    // Volatile state.
    pub(crate) state: BlockState,
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("size", &self.image.size())
            .field("read_only", &self.read_only)
            .field("pieces_written", &self.state.overlay.len())
            .finish()
    }
}

impl Block {
    /// A disk with the content of `image`.
    pub fn new(image: Box<dyn DiskImage>, read_only: bool) -> Block {
        Block {
            image,
            read_only,
            state: BlockState::default(),
        }
    }

    /// The image behind it.
    pub(crate) fn image(&self) -> &dyn DiskImage {
        &*self.image
    }

    /// Whether the guest cannot write it.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn sectors(&self) -> u64 {
        self.image.size().div_ceil(SECTOR)
    }

    pub(super) fn features(&self) -> u64 {
        let read_only = if self.read_only { spec::READ_ONLY } else { 0 };
        spec::SEGMENTS_MAX | spec::FLUSH | read_only
    }

    /// A byte of the configuration: capacity at 0, most segments at 12.
    pub(super) fn config(&self, offset: u64) -> u8 {
        let mut config = [0; 24];
        config[..8].copy_from_slice(&self.sectors().to_le_bytes());
        config[12..16].copy_from_slice(&126u32.to_le_bytes());
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        config.get(at).copied().unwrap_or(0)
    }

    /// Offset of `len` bytes at `sector`, where the disk has them.
    fn offset(&self, sector: u64, len: usize) -> Option<u64> {
        let len = len as u64;
        let end = sector.checked_add(len / SECTOR)?;
        (len.is_multiple_of(SECTOR) && end <= self.sectors()).then_some(sector * SECTOR)
    }

    /// Copies from the image, with zeros after its end.
    fn read_image(&self, offset: u64, into: &mut [u8]) -> bool {
        let size = self.image.size();
        let there = size.saturating_sub(offset).min(into.len() as u64) as usize;
        let (bytes, rest) = into.split_at_mut(there);
        rest.fill(0);
        bytes.is_empty() || self.image.read(offset, bytes)
    }

    fn read(&self, mut offset: u64, mut into: &mut [u8]) -> bool {
        while !into.is_empty() {
            let start = (offset % PIECE) as usize;
            let now = into.len().min(PIECE as usize - start);
            let (part, rest) = into.split_at_mut(now);
            match self.state.overlay.get(&(offset / PIECE)) {
                Some(piece) if piece.len() as u64 == PIECE => {
                    part.copy_from_slice(&piece[start..start + now]);
                }
                _ => {
                    if !self.read_image(offset, part) {
                        return false;
                    }
                }
            }
            offset += now as u64;
            into = rest;
        }
        true
    }

    fn write(&mut self, mut offset: u64, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let start = (offset % PIECE) as usize;
            let now = bytes.len().min(PIECE as usize - start);
            let (part, rest) = bytes.split_at(now);
            let number = offset / PIECE;
            let mut piece = vec![0; PIECE as usize];
            if now < PIECE as usize && !self.read(number * PIECE, &mut piece) {
                return false;
            }
            piece[start..start + now].copy_from_slice(part);
            self.state.overlay.insert(number, piece);
            offset += now as u64;
            bytes = rest;
        }
        true
    }

    pub(super) fn process(
        &mut self,
        ram: &mut Ram,
        queue: &mut QueueState,
    ) -> Result<bool, Broken> {
        queue.serve(ram, |ram, chain| self.request(ram, chain))
    }

    /// One request: a header, data, a status byte. Returns the bytes written.
    fn request(&mut self, ram: &mut Ram, chain: &Chain) -> Result<u32, Broken> {
        let sent = chain.read(ram)?;
        let (Some(header), Some(room)) = (
            sent.first_chunk::<{ spec::HEADER }>(),
            chain.room().checked_sub(1),
        ) else {
            return Err(Broken);
        };
        let field = u128::from_le_bytes(*header);
        let sector = (field >> 64) as u64;
        let data = &sent[spec::HEADER..];
        let mut answer = Vec::new();
        let status = match field as u32 {
            spec::IN => match self.offset(sector, room) {
                Some(offset) => {
                    answer.resize(room, 0);
                    if self.read(offset, &mut answer) {
                        spec::OK
                    } else {
                        spec::IO_ERROR
                    }
                }
                None => spec::IO_ERROR,
            },
            spec::OUT => match self.offset(sector, data.len()) {
                Some(offset) if !self.read_only && self.write(offset, data) => spec::OK,
                _ => spec::IO_ERROR,
            },
            spec::FLUSH_REQUEST => spec::OK, // the overlay is as durable as the machine
            spec::GET_ID => {
                answer.extend(&spec::ID[..room.min(spec::ID.len())]);
                spec::OK
            }
            _ => spec::UNSUPPORTED,
        };
        chain.write(ram, 0, &answer)?;
        chain.write(ram, room, &[status])?;
        Ok(answer.len() as u32 + 1)
    }
}
