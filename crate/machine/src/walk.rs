//! Guest paging for somebody who looks: no rights are checked, no bit is set
//! (Vol. 3A, "Paging").

use hypernest_cpu::{Ram, VcpuState};

/// One entry on the way from a linear to a physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkStep {
    /// Name of the structure: `PML5E`, `PML4E`, `PDPTE`, `PDE`, `PTE`.
    pub level: &'static str,
    /// Guest-physical address of the entry.
    pub address: u64,
    /// The entry. All ones where it does not lie in RAM.
    pub entry: u64,
}

/// A walk of the page tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Entries in the order they were read.
    pub steps: Vec<WalkStep>,
    /// Guest-physical address, where the linear one is mapped.
    pub physical: Option<u64>,
}

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Address bits of an entry (51:12).
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// Levels of paging with 8-byte entries, from the last one up: name, lowest linear-address bit.
const LEVELS: [(&str, u32); 5] = [
    ("PTE", 12),
    ("PDE", 21),
    ("PDPTE", 30),
    ("PML4E", 39),
    ("PML5E", 48),
];

/// Walks the page tables of a vCPU in `state` for a linear address.
pub fn walk(ram: &Ram, state: &VcpuState, linear: u64) -> Walk {
    if state.cr0 & CR0_PG == 0 {
        return Walk {
            steps: Vec::new(),
            physical: Some(linear & 0xffff_ffff),
        };
    }
    if state.cr4 & CR4_PAE == 0 {
        return walk_32(ram, state, linear);
    }
    let levels = match (state.msrs.efer & EFER_LMA != 0, state.cr4 & CR4_LA57 != 0) {
        (false, _) => 3,
        (true, false) => 4,
        (true, true) => 5,
    };
    let mut walk = Walk::default();
    let mut table = if levels == 3 {
        state.cr3 & 0xffff_ffe0
    } else {
        state.cr3 & ADDRESS
    };
    for &(level, shift) in LEVELS[..levels].iter().rev() {
        let index_mask = if levels == 3 && shift == 30 { 3 } else { 0x1ff };
        let index = linear >> shift & index_mask;
        let address = table + 8 * index;
        let entry = if levels == 3 && shift == 30 {
            state.pdpte[index as usize] // loaded by the last MOV to CR3
        } else {
            ram.load(address).map_or(u64::MAX, u64::from_le_bytes)
        };
        walk.steps.push(WalkStep {
            level,
            address,
            entry,
        });
        if entry & PRESENT == 0 || entry == u64::MAX {
            return walk;
        }
        let may_be_large = shift == 21 || shift == 30 && levels > 3;
        let is_leaf = shift == 12 || may_be_large && entry & LARGE != 0;
        if is_leaf {
            let offset = (1 << shift) - 1;
            walk.physical = Some(entry & ADDRESS & !offset | linear & offset);
            return walk;
        }
        table = entry & ADDRESS;
    }
    walk
}

/// 32-bit paging: two levels of 4-byte entries.
fn walk_32(ram: &Ram, state: &VcpuState, linear: u64) -> Walk {
    let mut walk = Walk::default();
    let mut table = state.cr3 & 0xffff_f000;
    for (level, shift) in [("PDE", 22), ("PTE", 12)] {
        let address = table + 4 * (linear >> shift & 0x3ff);
        let entry = ram.load(address).map_or(u32::MAX, u32::from_le_bytes);
        let entry = u64::from(entry);
        walk.steps.push(WalkStep {
            level,
            address,
            entry,
        });
        if entry & PRESENT == 0 {
            return walk;
        }
        if shift == 22 && entry & LARGE != 0 && state.cr4 & CR4_PSE != 0 {
            let high = (entry >> 13 & 0xff) << 32;
            walk.physical = Some(high | entry & 0xffc0_0000 | linear & 0x3f_ffff);
            return walk;
        }
        if shift == 12 {
            walk.physical = Some(entry & 0xffff_f000 | linear & 0xfff);
        }
        table = entry & 0xffff_f000;
    }
    walk
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypernest_cpu::Model;

    fn put(ram: &mut Ram, address: u64, entry: u64) {
        ram.write(address, &entry.to_le_bytes()).unwrap();
    }

    fn reset() -> VcpuState {
        VcpuState::reset(0, &Model::all()[0])
    }

    fn long_mode() -> (Ram, VcpuState) {
        let mut ram = Ram::new(1 << 20).unwrap();
        let mut state = reset();
        state.cr0 |= CR0_PG | 1;
        state.cr4 |= CR4_PAE;
        state.msrs.efer = EFER_LMA | 1 << 8;
        state.cr3 = 0x1000 | 0x18;
        put(&mut ram, 0x1000 + 8 * 0x1ff, 0x2003);
        put(&mut ram, 0x2000, 0x3003);
        put(&mut ram, 0x2008, 0x4000_0083 | 1 << 63);
        put(&mut ram, 0x3000, 0x4003);
        put(&mut ram, 0x3008, 0x0060_0083);
        put(&mut ram, 0x4010, 0x7003);
        (ram, state)
    }

    #[test]
    fn four_level_paging_with_all_page_sizes() {
        let (ram, state) = long_mode();
        let base = 0xffff_ff80_0000_0000;
        let to = |linear| walk(&ram, &state, linear).physical;
        assert_eq!(to(base + 0x2345), Some(0x7345));
        assert_eq!(to(base + 0x3_2345), None);
        assert_eq!(to(base + 0x21_2345), Some(0x61_2345));
        assert_eq!(to(base + 0x4123_4567), Some(0x4123_4567));
        assert_eq!(to(0), None);
    }

    #[test]
    fn steps_tell_where_a_walk_ends() {
        let (ram, state) = long_mode();
        let walk = walk(&ram, &state, 0xffff_ff80_0000_0000);
        let levels: Vec<_> = walk.steps.iter().map(|step| step.level).collect();
        assert_eq!(levels, ["PML4E", "PDPTE", "PDE", "PTE"]);
        assert_eq!(walk.steps[3].address, 0x4000);
        assert_eq!(walk.steps[3].entry, 0);
    }

    #[test]
    fn thirty_two_bit_paging_and_none() {
        let mut ram = Ram::new(1 << 20).unwrap();
        let mut state = reset();
        assert_eq!(walk(&ram, &state, 0x1234).physical, Some(0x1234));
        state.cr0 |= CR0_PG | 1;
        state.cr4 = CR4_PSE;
        state.cr3 = 0x1000;
        ram.write(0x1000, &0x2003u32.to_le_bytes()).unwrap();
        ram.write(0x1004, &0x0080_0083u32.to_le_bytes()).unwrap();
        ram.write(0x2004, &0x9003u32.to_le_bytes()).unwrap();
        assert_eq!(walk(&ram, &state, 0x1abc).physical, Some(0x9abc));
        assert_eq!(walk(&ram, &state, 0x40_0abc).physical, Some(0x80_0abc));
        assert_eq!(walk(&ram, &state, 0x2000).physical, None);
    }

    #[test]
    fn tables_outside_ram_end_the_walk() {
        let (ram, mut state) = long_mode();
        state.cr3 = 0xf000_0000;
        let walk = walk(&ram, &state, 0);
        assert_eq!((walk.steps[0].entry, walk.physical), (u64::MAX, None));
    }
}
