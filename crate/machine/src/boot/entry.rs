//! Entry states: what the boot processor's registers hold at the image's first instruction.

use hypernest_cpu::{OutOfRam, Ram, SegmentState, TableState, VcpuState};

use super::layout;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Access rights in VMCS form: execute/read code, accessed, present, 4 KiB granularity.
const CODE_32: u32 = 0xc09b;
const CODE_64: u32 = 0xa09b;
const DATA: u32 = 0xc093;
const TASK: u32 = 0x008b;
const UNUSABLE: u32 = 1 << 16;

const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
const RAX: usize = 0;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Only the bit that is always one.
const RFLAGS: u64 = 2;

/// Flat 32-bit protected mode without paging: the state that PVH, multiboot 1 and Linux's 32-bit
/// protocol ask for. `registers` are (EAX, EBX, ESI).
pub fn protected_32(
    ram: &mut Ram,
    state: &mut VcpuState,
    entry: u32,
    registers: (u32, u32, u32),
) -> Result<(), OutOfRam> {
    flat(ram, state, CODE_32)?;
    state.cr0 = CR0_PE | CR0_ET;
    state.cr4 = 0;
    state.msrs.efer = 0;
    state.rip = u64::from(entry);
    state.gpr[RAX] = u64::from(registers.0);
    state.gpr[RBX] = u64::from(registers.1);
    state.gpr[RSI] = u64::from(registers.2);
    Ok(())
}

/// 64-bit mode on identity-mapping page tables that cover all RAM and the first 4 GiB: Linux's
/// 64-bit protocol, and ours for plain ELF. `registers` are (RBX, RSI).
pub fn long_64(
    ram: &mut Ram,
    state: &mut VcpuState,
    entry: u64,
    registers: (u64, u64),
) -> Result<(), OutOfRam> {
    flat(ram, state, CODE_64)?;
    state.cr0 = CR0_PE | CR0_ET | CR0_PG;
    state.cr3 = identity_map(ram)?;
    state.cr4 = CR4_PAE;
    state.msrs.efer = EFER_LME | EFER_LMA;
    state.rip = entry;
    state.gpr[RBX] = registers.0;
    state.gpr[RSI] = registers.1;
    Ok(())
}

/// 16-bit real mode at 0000:`entry`, as after reset but for the place.
pub fn real_16(state: &mut VcpuState, entry: u16) {
    let cs = &mut state.segments.cs;
    cs.selector = 0;
    cs.base = 0;
    state.rip = u64::from(entry);
    state.gpr[RSP] = layout::RAW_IMAGE;
}

/// Virtual wire mode, in which firmware leaves the boot processor's local APIC (MultiProcessor
/// Specification, "Virtual Wire Mode"): enabled, the 8259 pair on LINT0, NMI on LINT1. So the
/// interrupts of guests without an I/O APIC driver arrive.
pub fn virtual_wire(state: &mut VcpuState) {
    const ENABLED: u32 = 1 << 8;
    const LINT0: usize = 4;
    const LINT1: usize = 5;
    const NMI: u32 = 4 << 8;
    const EXT_INT: u32 = 7 << 8;
    state.apic.svr |= ENABLED;
    state.apic.lvt[LINT0] = EXT_INT;
    state.apic.lvt[LINT1] = NMI;
}

fn flat(ram: &mut Ram, state: &mut VcpuState, code: u32) -> Result<(), OutOfRam> {
    let segment = |selector, limit, rights| SegmentState {
        selector,
        base: 0,
        limit,
        rights,
    };
    let data = segment(DATA_SELECTOR, u32::MAX, DATA);
    let segments = &mut state.segments;
    segments.cs = segment(CODE_SELECTOR, u32::MAX, code);
    segments.ds = data;
    segments.es = data;
    segments.fs = data;
    segments.gs = data;
    segments.ss = data;
    segments.tr = segment(TASK_SELECTOR, 0x67, TASK);
    segments.ldtr = segment(0, 0, UNUSABLE);
    let descriptor = |rights: u32| -> u64 {
        let rights = u64::from(rights);
        0xffff | (rights & 0xff) << 40 | 0xf << 48 | (rights >> 12 & 0xf) << 52
    };
    // The busy bit is clear in memory, so that a guest may load the task register again.
    let task = 0x67 | 0x89 << 40;
    let table = [0, 0, descriptor(code), descriptor(DATA), task, 0];
    for (address, entry) in (layout::GDT..).step_by(8).zip(table) {
        ram.write(address, &entry.to_le_bytes())?;
    }
    state.gdtr = TableState {
        base: layout::GDT,
        limit: 8 * table.len() as u16 - 1,
    };
    state.idtr = TableState { base: 0, limit: 0 };
    state.rflags = RFLAGS;
    state.gpr = [0; 16];
    Ok(())
}

/// Writes page tables of 2 MiB pages; returns the value of CR3.
fn identity_map(ram: &mut Ram) -> Result<u64, OutOfRam> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let end = (Ram::HOLE_END + ram.high_size()).min(layout::IDENTITY_LIMIT);
    let directories = end.div_ceil(1 << 30);
    let pml4 = layout::PAGE_TABLES;
    let pdpt = pml4 + 0x1000;
    ram.write(pml4, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..directories {
        let directory = pdpt + 0x1000 * (gib + 1);
        ram.write(
            pdpt + 8 * gib,
            &(directory | PRESENT_WRITABLE).to_le_bytes(),
        )?;
        let mut page = [0; 4096];
        for (index, entry) in (0u64..).zip(page.chunks_exact_mut(8)) {
            let value = gib << 30 | index << 21 | LARGE | PRESENT_WRITABLE;
            entry.copy_from_slice(&value.to_le_bytes());
        }
        ram.write(directory, &page)?;
    }
    Ok(pml4)
}

#[cfg(test)]
mod tests {
    use super::super::tests::reset_state;
    use super::*;

    #[test]
    fn long_mode_maps_four_gib_onto_itself() {
        let mut ram = Ram::new(1 << 20).unwrap();
        let mut state = reset_state();
        long_64(&mut ram, &mut state, 0x10_0000, (1, 2)).unwrap();
        let entry = |table: u64, index: u64| {
            u64::from_le_bytes(ram.load::<8>((table & !0xfff) + 8 * index).unwrap())
        };
        for address in [0u64, 0x12_3456, 0xfee0_0000, 0xffff_ffff] {
            let pdpt = entry(state.cr3, address >> 39);
            let directory = entry(pdpt, address >> 30 & 511);
            let page = entry(directory, address >> 21 & 511);
            assert_eq!(page & 0xff, 0x83);
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
        }
        assert_eq!(state.segments.cs.rights, 0xa09b);
        assert_eq!((state.cr0, state.cr4), (0x8000_0011, 0x20));
    }

    #[test]
    fn the_gdt_in_memory_says_what_the_hidden_parts_say() {
        let mut ram = Ram::new(1 << 20).unwrap();
        let mut state = reset_state();
        protected_32(&mut ram, &mut state, 0x10_0000, (1, 2, 3)).unwrap();
        let code = u64::from_le_bytes(ram.load::<8>(state.gdtr.base + 0x10).unwrap());
        let data = u64::from_le_bytes(ram.load::<8>(state.gdtr.base + 0x18).unwrap());
        assert_eq!((code, data), (0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff));
        assert_eq!((state.gpr[0], state.gpr[3], state.gpr[6]), (1, 2, 3));
        assert_eq!(state.rflags, 2);
    }
}
