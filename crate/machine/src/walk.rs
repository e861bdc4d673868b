//! Address translation for somebody who looks, entry by entry, at either level: no rights are
//! checked, no bit is set (Vol. 3A, "Paging"; Vol. 3C, "Extended Page-Table Mechanism").

use hypernest_cpu::{Level, Ram, VcpuState};
use hypernest_vmcs::{Field, entry, exit, proc1, proc2};

/// One entry on the way from a linear to a physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkStep {
    /// An entry of EPT rather than of the paging structures of the level that was asked about.
    pub ept: bool,
    /// Name of the structure: `PML5E`, `PML4E`, `PDPTE`, `PDE`, `PTE`.
    pub level: &'static str,
    /// Address of the entry: as the paging structures have it (guest-physical for L2); of EPT's
    /// entries, physical.
    pub address: u64,
    /// The entry. All ones where it does not lie in RAM.
    pub entry: u64,
}

/// A walk of the page tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Entries in the order they were read. Under EPT each entry of L2's own tables comes after the
    /// EPT entries that lead to it, and the EPT entries for the result come last.
    pub steps: Vec<WalkStep>,
    /// The address that the level's own tables give: L2's guest-physical address under EPT, else the
    /// physical one.
    pub guest_physical: Option<u64>,
    /// Physical address, where the linear one is mapped.
    pub physical: Option<u64>,
}

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Address bits of an entry (51:12).
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Any of these makes an EPT entry present: read, write, execute.
const EPT_PRESENT: u64 = 7;

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

/// What decides a level's translation.
struct Mode {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    long: bool,
    /// `None` where they have to be read from memory.
    pdpte: Option<[u64; 4]>,
    /// EPT pointer, where there is EPT.
    eptp: Option<u64>,
}

impl Mode {
    /// `None` where nothing is known of the level: there is no current VMCS.
    fn of(state: &VcpuState, level: Level) -> Option<Mode> {
        let field = |field: Field| {
            let mut fields = state.vmx.fields.iter();
            let found = fields.find(|(encoding, _)| *encoding == field.encoding());
            found.map_or(0, |(_, value)| *value)
        };
        let has = |controls: Field, bit: u32| field(controls) as u32 & bit != 0;
        let ept = has(
            Field::CPU_BASED_VM_EXEC_CONTROL,
            proc1::ACTIVATE_SECONDARY_CONTROLS,
        ) && has(Field::SECONDARY_VM_EXEC_CONTROL, proc2::ENABLE_EPT);
        let eptp = (level == Level::L2 && ept).then(|| field(Field::EPT_POINTER));
        if state.level() == level {
            return Some(Mode {
                cr0: state.cr0,
                cr3: state.cr3,
                cr4: state.cr4,
                long: state.msrs.efer & EFER_LMA != 0,
                pdpte: Some(state.pdpte),
                eptp,
            });
        }
        state.vmx.pointer()?;
        Some(match level {
            Level::L1 => Mode {
                cr0: field(Field::HOST_CR0),
                cr3: field(Field::HOST_CR3),
                cr4: field(Field::HOST_CR4),
                long: has(Field::VM_EXIT_CONTROLS, exit::HOST_ADDRESS_SPACE_SIZE),
                pdpte: None,
                eptp,
            },
            Level::L2 => Mode {
                cr0: field(Field::GUEST_CR0),
                cr3: field(Field::GUEST_CR3),
                cr4: field(Field::GUEST_CR4),
                long: has(Field::VM_ENTRY_CONTROLS, entry::IA_32E_MODE_GUEST),
                pdpte: ept.then(|| {
                    [
                        Field::GUEST_PDPTR0,
                        Field::GUEST_PDPTR1,
                        Field::GUEST_PDPTR2,
                        Field::GUEST_PDPTR3,
                    ]
                    .map(field)
                }),
                eptp,
            },
        })
    }
}

/// Walks the page tables of a vCPU in `state` for a linear address of the level that executes.
pub fn walk(ram: &Ram, state: &VcpuState, linear: u64) -> Walk {
    walk_at(ram, state, state.level(), linear).unwrap_or_default()
}

/// Walks the page tables of `level` for one of its linear addresses: those in use where the vCPU
/// executes this level, else those that its VMCS names (of the host for L1, of the guest for L2).
/// `None` where there is no VMCS to name any.
pub fn walk_at(ram: &Ram, state: &VcpuState, level: Level, linear: u64) -> Option<Walk> {
    let mode = Mode::of(state, level)?;
    let mut walker = Walker {
        ram,
        eptp: mode.eptp,
        walk: Walk::default(),
    };
    let result = if mode.cr0 & CR0_PG == 0 {
        Some(linear & 0xffff_ffff)
    } else if mode.cr4 & CR4_PAE == 0 {
        walker.two_levels(&mode, linear)
    } else {
        walker.wide(&mode, linear)
    };
    walker.walk.guest_physical = result;
    walker.walk.physical = result.and_then(|address| walker.physical(address));
    Some(walker.walk)
}

struct Walker<'a> {
    ram: &'a Ram,
    eptp: Option<u64>,
    walk: Walk,
}

impl Walker<'_> {
    fn note(&mut self, ept: bool, level: &'static str, address: u64, entry: u64) {
        self.walk.steps.push(WalkStep {
            ept,
            level,
            address,
            entry,
        });
    }

    /// Where an address of the level's tables lies: through EPT, where there is EPT.
    fn physical(&mut self, address: u64) -> Option<u64> {
        let Some(eptp) = self.eptp else {
            return Some(address);
        };
        let mut table = eptp & ADDRESS;
        for &(level, shift) in LEVELS[..4].iter().rev() {
            let at = table + 8 * (address >> shift & 0x1ff);
            let entry = self.ram.load(at).map_or(u64::MAX, u64::from_le_bytes);
            self.note(true, level, at, entry);
            if entry & EPT_PRESENT == 0 || entry == u64::MAX {
                return None;
            }
            if shift == 12 || shift < 39 && entry & LARGE != 0 {
                let offset = (1 << shift) - 1;
                return Some(entry & ADDRESS & !offset | address & offset);
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// An entry of the level's tables; `None` where the walk ends there.
    fn entry(&mut self, level: &'static str, address: u64, wide: bool) -> Option<u64> {
        let at = self.physical(address)?;
        let entry = if wide {
            self.ram.load(at).map_or(u64::MAX, u64::from_le_bytes)
        } else {
            let narrow = self.ram.load(at).map_or(u32::MAX, u32::from_le_bytes);
            u64::from(narrow)
        };
        self.note(false, level, address, entry);
        let ones = if wide { u64::MAX } else { u64::from(u32::MAX) };
        (entry & PRESENT != 0 && entry != ones).then_some(entry)
    }

    /// Three, four or five levels of 8-byte entries.
    fn wide(&mut self, mode: &Mode, linear: u64) -> Option<u64> {
        let levels = match (mode.long, mode.cr4 & CR4_LA57 != 0) {
            (false, _) => 3,
            (true, false) => 4,
            (true, true) => 5,
        };
        let mut table = if levels == 3 {
            mode.cr3 & 0xffff_ffe0
        } else {
            mode.cr3 & ADDRESS
        };
        for &(level, shift) in LEVELS[..levels].iter().rev() {
            let loaded = levels == 3 && shift == 30;
            let index = linear >> shift & if loaded { 3 } else { 0x1ff };
            let address = table + 8 * index;
            let entry = match mode.pdpte {
                // Loaded by the last MOV to CR3 or VM entry, wherever it came from.
                Some(pdpte) if loaded => {
                    let entry = pdpte[index as usize];
                    self.note(false, level, address, entry);
                    (entry & PRESENT != 0).then_some(entry)?
                }
                _ => self.entry(level, address, true)?,
            };
            let may_be_large = shift == 21 || shift == 30 && levels > 3;
            if shift == 12 || may_be_large && entry & LARGE != 0 {
                let offset = (1 << shift) - 1;
                return Some(entry & ADDRESS & !offset | linear & offset);
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// 32-bit paging: two levels of 4-byte entries.
    fn two_levels(&mut self, mode: &Mode, linear: u64) -> Option<u64> {
        let directory = mode.cr3 & 0xffff_f000;
        let entry = self.entry("PDE", directory + 4 * (linear >> 22 & 0x3ff), false)?;
        if entry & LARGE != 0 && mode.cr4 & CR4_PSE != 0 {
            let high = (entry >> 13 & 0xff) << 32;
            return Some(high | entry & 0xffc0_0000 | linear & 0x3f_ffff);
        }
        let table = entry & 0xffff_f000;
        let entry = self.entry("PTE", table + 4 * (linear >> 12 & 0x3ff), false)?;
        Some(entry & 0xffff_f000 | linear & 0xfff)
    }
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
