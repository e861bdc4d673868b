//! A hypervisor (L1) and its guest (L2).
//!
//! L1 is entered as a multiboot kernel, goes to 64-bit mode, and runs L2 with extended page tables.
//! L2 leaves it in fifteen ways. At each VM exit L1 prints what it reads from the VMCS, handles the
//! exit as hypervisors do, and says what it did. When L2 has ended, L1 counts and powers off.

mod exits;
mod l2;
mod launch;
mod start;
mod text;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::elf;
use text::Texts;

/// Where the parts of the image lie: 32-bit code, descriptor table, 64-bit code, L2.
const LONG: u32 = elf::BASE + 0x1000;
const L2_IMAGE: u32 = elf::BASE + 0x4000;
const L2_SIZE: u32 = 0x1000;

/// L1's stack; VM exits begin with it empty.
const STACK: u32 = 0x18_0000;

/// From here on L1 clears memory before it uses it.
const TABLES: u32 = 0x20_0000;
const PML4: u32 = TABLES;
const PDPT: u32 = TABLES + 0x1000;
const DIRECTORY: u32 = TABLES + 0x2000;
const EPT_PML4: u32 = TABLES + 0x3000;
const EPT_PDPT: u32 = TABLES + 0x4000;
const EPT_DIRECTORY: u32 = TABLES + 0x5000;
/// 4 KiB pages of L2 from 0, and from 2 MiB.
const EPT_LOW: u32 = TABLES + 0x6000;
const EPT_HIGH: u32 = TABLES + 0x7000;
const VMXON: u32 = TABLES + 0x8000;
const VMCS: u32 = TABLES + 0x9000;
/// Exits by reason, eight bytes each; after them what else L1 keeps.
const COUNTS: u32 = TABLES + 0xa000;
const TOTAL: u32 = COUNTS + 0x800;
/// The byte that L2 last wrote to a port.
const LATCH: u32 = TOTAL + 8;
/// The time-stamp counter at the launch.
const LAUNCHED_AT: u32 = TOTAL + 16;
/// Where the next page for L2 comes from.
const FREE_PAGE: u32 = TOTAL + 24;
const TABLES_END: u32 = TABLES + 0xb000;

/// L2's first memory, 2 MiB.
const L2_MEMORY: u32 = 0x40_0000;
const L2_MEMORY_SIZE: u32 = 0x20_0000;
/// Pages that L1 gives L2 when it touches them.
const PAGES: u32 = 0x60_0000;

/// Selectors.
const CODE: u32 = 0x08;
const DATA: u32 = 0x10;
const TASK: u32 = 0x18;

/// What L1 asks of VMCALL, in RAX.
const CALL_PRINT: i32 = 1;
const CALL_TIMER: i32 = 2;

/// The image.
pub fn guest() -> Result<Vec<u8>, IcedError> {
    let mut image = start::code()?;
    for (at, part) in [(LONG, monitor()?), (L2_IMAGE, l2::code()?)] {
        let at = (at - elf::CONTENT) as usize;
        assert!(image.len() <= at, "the parts overlap");
        image.resize(at, 0);
        image.extend(part);
    }
    let end = (L2_IMAGE + L2_SIZE - elf::CONTENT) as usize;
    assert!(image.len() <= end, "L2 is too long");
    image.resize(end, 0);
    Ok(elf::file(&image, 0))
}

/// The 64-bit code: an assembler and what its pieces call.
struct Monitor {
    a: CodeAssembler,
    texts: Texts,
    /// Prints the text at RSI.
    print: CodeLabel,
    /// Prints RAX in hexadecimal.
    hex: CodeLabel,
    /// Prints RAX in decimal.
    decimal: CodeLabel,
    /// Prints spaces up to column ECX, one at least.
    column: CodeLabel,
    /// A VM exit comes here.
    exit: CodeLabel,
    /// A VMX instruction has failed.
    failed: CodeLabel,
    /// Counts, and powers off.
    finish: CodeLabel,
    /// Powers off.
    off: CodeLabel,
}

fn monitor() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut m = Monitor {
        texts: Texts::default(),
        print: a.create_label(),
        hex: a.create_label(),
        decimal: a.create_label(),
        column: a.create_label(),
        exit: a.create_label(),
        failed: a.create_label(),
        finish: a.create_label(),
        off: a.create_label(),
        a,
    };
    launch::launch(&mut m)?;
    exits::exits(&mut m)?;
    exits::ends(&mut m)?;
    text::routines(&mut m)?;
    m.a.assemble(LONG.into())
}
