//! Where a case's memory lies: the same few pages at the same addresses in every engine.

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// A run of pages with one protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First linear address.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
    /// User code may write it.
    pub write: bool,
    /// User code may execute it.
    pub execute: bool,
}

impl Region {
    /// Bytes in the region.
    pub const fn len(self) -> u64 {
        self.pages * PAGE
    }

    /// First address after the region.
    pub const fn end(self) -> u64 {
        self.start + self.len()
    }

    /// No pages at all.
    pub const fn is_empty(self) -> bool {
        self.pages == 0
    }
}

/// The instruction. Nothing is mapped after it.
pub const CODE: Region = region(0x10_0000, 2, false, true);
/// Operands. [`READ_ONLY`] follows directly.
pub const DATA: Region = region(0x20_0000, 4, true, false);
/// Operands that cannot be written. Nothing is mapped after it.
pub const READ_ONLY: Region = region(0x20_4000, 1, false, false);
/// The stack. Nothing is mapped on either side.
pub const STACK: Region = region(0x30_0000, 2, true, false);
/// A page that 32-bit addresses do not reach; nothing is mapped where they end up instead.
pub const HIGH: Region = region(0x6a_0040_0000, 1, true, false);

/// All regions, in the order of the memory image.
pub const REGIONS: [Region; 5] = [CODE, DATA, READ_ONLY, STACK, HIGH];

/// Bytes of the memory image: all regions one after another.
pub const IMAGE: usize = {
    let mut sum = 0;
    let mut i = 0;
    while i < REGIONS.len() {
        sum += REGIONS[i].len() as usize;
        i += 1;
    }
    sum
};

/// Where the regions after [`CODE`] begin in the memory image.
pub const IMAGE_DATA: usize = CODE.len() as usize;

/// Where an instruction starts unless a case says otherwise.
pub const ENTRY: u64 = CODE.start + 0x800;

const fn region(start: u64, pages: u64, write: bool, execute: bool) -> Region {
    Region {
        start,
        pages,
        write,
        execute,
    }
}

/// The place of a linear address in the memory image, if it is mapped.
pub fn image_offset(address: u64) -> Option<usize> {
    let mut offset = 0;
    for region in REGIONS {
        if address >= region.start && address < region.end() {
            return Some(offset + (address - region.start) as usize);
        }
        offset += region.len() as usize;
    }
    None
}

/// The linear address of a place in the memory image.
pub fn image_address(mut offset: usize) -> u64 {
    for region in REGIONS {
        if offset < region.len() as usize {
            return region.start + offset as u64;
        }
        offset -= region.len() as usize;
    }
    u64::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_offsets_and_addresses_are_inverse() {
        for offset in (0..IMAGE).step_by(509) {
            assert_eq!(image_offset(image_address(offset)), Some(offset));
        }
        assert_eq!(image_offset(CODE.start - 1), None);
        assert_eq!(image_offset(READ_ONLY.end()), None);
        assert_eq!(image_offset(HIGH.start & 0xffff_ffff), None);
    }
}
