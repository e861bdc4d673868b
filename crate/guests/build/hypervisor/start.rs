//! From 32-bit protected mode without paging to 64-bit mode.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::{CODE, DATA, DIRECTORY, LONG, PDPT, PML4, STACK, TABLES, TABLES_END};
use crate::elf;

/// Null, 64-bit code, data, and a TSS that nobody looks at.
const DESCRIPTORS: [u64; 5] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];
/// Entry jumps over the table.
const TABLE: u32 = elf::CONTENT + 8;
/// Where L1's descriptor table is, and its limit.
pub const GDT: (u32, u32) = (TABLE, 8 * DESCRIPTORS.len() as u32 - 1);
const POINTER: u32 = TABLE + GDT.1 + 1;
const ENTRY: u32 = POINTER + 8;

const PAE: u32 = 1 << 5;
const EFER: u32 = 0xc000_0080;
const LME: u32 = 1 << 8;
/// PG, WP, NE.
const CR0: u32 = 1 << 31 | 1 << 16 | 1 << 5;

pub fn code() -> Result<Vec<u8>, IcedError> {
    // JMP rel32, over the table.
    let mut image = vec![0xe9];
    image.extend((ENTRY - elf::CONTENT - 5).to_le_bytes());
    image.resize(8, 0);
    image.extend(DESCRIPTORS.map(u64::to_le_bytes).concat());
    image.extend((GDT.1 as u16).to_le_bytes());
    image.extend(GDT.0.to_le_bytes());
    image.resize((ENTRY - elf::CONTENT) as usize, 0);

    let mut a = CodeAssembler::new(32)?;
    a.cli()?;
    a.cld()?;
    a.mov(esp, STACK)?;
    a.lgdt(ptr(POINTER))?;
    a.mov(eax, DATA)?;
    for segment in [ds, es, fs, gs, ss] {
        a.mov(segment, ax)?;
    }
    a.xor(eax, eax)?;
    a.mov(edi, TABLES)?;
    a.mov(ecx, (TABLES_END - TABLES) / 4)?;
    a.rep().stosd()?;
    a.mov(dword_ptr(PML4), PDPT | 3)?;
    a.mov(dword_ptr(PDPT), DIRECTORY | 3)?;
    for page in 0..8 {
        a.mov(dword_ptr(DIRECTORY + 8 * page), page << 21 | 0x83)?;
    }
    a.mov(eax, PAE)?;
    a.mov(cr4, eax)?;
    a.mov(eax, PML4)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.or(eax, LME as i32)?;
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.or(eax, CR0 as i32)?;
    a.mov(cr0, eax)?;
    // JMP ptr16:32.
    a.db(&[0xea])?;
    a.db(&LONG.to_le_bytes())?;
    a.db(&(CODE as u16).to_le_bytes())?;
    image.extend(a.assemble(ENTRY.into())?);
    Ok(image)
}
