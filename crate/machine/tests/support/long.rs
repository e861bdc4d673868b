//! A machine in 64-bit mode with tables of small pages.
#![allow(dead_code, reason = "each test program uses a part")]

use hypernest_machine::Machine;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where code begins.
pub const CODE: u64 = 0x1_0000;
/// The page table: page numbers are linear ones too.
pub const TABLE: u64 = 0x4000;
/// Data pages of the guest.
pub const DATA: u64 = 0x2_0000;
/// Present and writable.
pub const PRESENT: u64 = 3;
/// Flag of an entry.
pub const ACCESSED: u64 = 1 << 5;
/// Flag of an entry.
pub const DIRTY: u64 = 1 << 6;

/// A machine in 64-bit mode at `code`, on 4 KiB pages that map the first 2 MiB onto themselves.
pub fn long(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut asm = CodeAssembler::new(64).unwrap();
    code(&mut asm).unwrap();
    let mut machine = Machine::builder().memory(2 << 20).build().unwrap();
    let code = asm.assemble(CODE).unwrap();
    machine.poke_physical(CODE, &code).unwrap();
    set_up(&mut machine);
    machine
}

/// Tables that map the first 2 MiB onto themselves, then 30 more in large pages, and registers to begin at
/// [`CODE`].
pub fn set_up(machine: &mut Machine) {
    let upper = [(0x1000, 0x2000u64), (0x2000, 0x3000), (0x3000, TABLE)];
    let lower = (0..512).map(|n| (TABLE + 8 * n, n << 12));
    let large = (1..16).map(|n| (0x3000 + 8 * n, n << 21 | 1 << 7));
    for (at, to) in upper.into_iter().chain(lower).chain(large) {
        let entry = (to | PRESENT).to_le_bytes();
        machine.poke_physical(at, &entry).unwrap();
    }
    let mut state = machine.read_vcpu(0).unwrap();
    state.segments.cs.base = 0;
    state.segments.cs.limit = 0xffff_ffff;
    state.segments.cs.rights = 0xa09b;
    state.segments.ss.rights = 0xc093;
    state.cr0 = 0x8001_0033;
    state.cr4 = 0x20;
    state.cr3 = 0x1000;
    state.msrs.efer = 0x500;
    state.rip = CODE;
    state.gpr[4] = 0x9000;
    machine.write_vcpu(0, &state).unwrap();
}
