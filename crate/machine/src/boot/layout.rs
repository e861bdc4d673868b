//! Every guest-physical address that booting fixes. Nothing else in the crate names one.
//!
//! | Range | Use |
//! |---|---|
//! | `0x0000-0x0fff` | real-mode vectors and BIOS data: left zero |
//! | `0x1000-0x1fff` | [`BOOT_PARAMS`] |
//! | `0x2000-0x2fff` | [`START_INFO`] |
//! | `0x3000-0x3fff` | [`GDT`] |
//! | `0x4000-0x6fff` | multiboot information |
//! | `0x7c00` | [`RAW_IMAGE`] |
//! | `0x10000-0x1ffff` | [`COMMAND_LINE`] |
//! | `0x20000-0x8ffff` | [`PAGE_TABLES`] |
//! | `0x9fc00-0x9ffff` | [`EBDA`]: reserved |
//! | `0xa0000-0xdffff` | video memory and option ROMs on a PC: not listed as RAM |
//! | `0xe0000-0xfffff` | [`ACPI_TABLES`], the root pointer first: reserved |
//! | `0x100000-` | images |
//!
//! A multiboot image may itself lie in low memory, so its information structure goes to the first
//! of [`MULTIBOOT_AREAS`] that the image leaves free.

use core::ops::Range;

use hypernest_cpu::Ram;

/// Linux `boot_params` (the "zero page").
pub const BOOT_PARAMS: u64 = 0x1000;
/// PVH `hvm_start_info`, followed by its memory map and module list.
pub const START_INFO: u64 = 0x2000;
/// End of the area of [`START_INFO`].
pub const START_INFO_END: u64 = 0x3000;
/// Global descriptor table of the entry state.
pub const GDT: u64 = 0x3000;
/// End of the area of [`GDT`].
pub const GDT_END: u64 = 0x4000;
/// Where a raw image is loaded and entered, as a PC's firmware does with a boot sector.
pub const RAW_IMAGE: u64 = 0x7c00;
/// Command line and module strings, each ended by a zero byte.
pub const COMMAND_LINE: u64 = 0x1_0000;
/// End of the area of [`COMMAND_LINE`].
pub const COMMAND_LINE_END: u64 = 0x2_0000;
/// Identity-mapping page tables: the PML4, one PDPT, then page directories of 2 MiB pages.
pub const PAGE_TABLES: u64 = 0x2_0000;
/// End of the area of [`PAGE_TABLES`].
pub const PAGE_TABLES_END: u64 = 0x9_0000;
/// Where the multiboot information structure may go, in order of preference.
pub const MULTIBOOT_AREAS: [Range<u64>; 3] =
    [0x4000..0x7000, 0x1_0000..0x9_0000, 0x6_0000..0x9_0000];
/// Extended BIOS data area; conventional memory ends here.
pub const EBDA: u64 = 0x9_fc00;
/// End of conventional memory.
pub const CONVENTIONAL_END: u64 = 0xa_0000;
/// ACPI tables. The root pointer (RSDP) stands at the first byte, so that guests that search the
/// BIOS area find it too.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the area of [`ACPI_TABLES`].
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// First byte above the PC's first mebibyte.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// A kernel finds its initial RAM disk below this address, whatever its header says.
pub const INITRD_END: u64 = 0x8000_0000;
/// Highest address, exclusive, that the page tables can map.
pub const IDENTITY_LIMIT: u64 = ((PAGE_TABLES_END - PAGE_TABLES) / 4096 - 2) << 30;

/// What a range of the memory map is: the numbers of the e820 interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RegionKind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range of the memory map that the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Meaning.
    pub kind: RegionKind,
}

/// The memory map of a machine with this RAM, in ascending order, without overlaps.
pub fn memory_map(ram: &Ram) -> Vec<Region> {
    let mut map = Vec::with_capacity(5);
    let mut add = |range: Range<u64>, kind, limit: u64| {
        let end = range.end.min(limit);
        if range.start < end {
            map.push(Region {
                start: range.start,
                len: end - range.start,
                kind,
            });
        }
    };
    let low = ram.low_size();
    add(0..EBDA, RegionKind::Ram, low);
    add(EBDA..CONVENTIONAL_END, RegionKind::Reserved, low);
    add(
        ACPI_TABLES..ACPI_TABLES_END,
        RegionKind::Reserved,
        ACPI_TABLES_END,
    );
    add(HIGH_MEMORY..Ram::HOLE_START, RegionKind::Ram, low);
    add(
        Ram::HOLE_END..Ram::HOLE_END + ram.high_size(),
        RegionKind::Ram,
        u64::MAX,
    );
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_lists_ram_around_the_bios_area_and_the_pci_hole() {
        let ram = Ram::new(Ram::HOLE_START + 0x4000).unwrap();
        let map = memory_map(&ram);
        let starts: Vec<u64> = map.iter().map(|r| r.start).collect();
        assert_eq!(starts, [0, EBDA, ACPI_TABLES, HIGH_MEMORY, Ram::HOLE_END]);
        assert_eq!(map[4].len, 0x4000);
        assert!(
            map.windows(2)
                .all(|pair| pair[0].start + pair[0].len <= pair[1].start)
        );
        assert_eq!(memory_map(&Ram::new(0x1000).unwrap())[0].len, 0x1000);
    }

    #[test]
    fn areas_do_not_overlap() {
        let bounds = [
            BOOT_PARAMS,
            START_INFO,
            START_INFO_END,
            GDT,
            GDT_END,
            MULTIBOOT_AREAS[0].start,
            MULTIBOOT_AREAS[0].end,
            RAW_IMAGE,
            COMMAND_LINE,
            COMMAND_LINE_END,
            PAGE_TABLES,
            PAGE_TABLES_END,
            EBDA,
            CONVENTIONAL_END,
            ACPI_TABLES,
            ACPI_TABLES_END,
        ];
        assert!(bounds.is_sorted());
    }
}
