//! The smallest program the tracer can start: one page with one SYSCALL instruction. Everything
//! else about the process is arranged from outside, so no run-time library has state in it.

/// Where the program's page lies until it is unmapped.
pub const BASE: u64 = 0x40_0000;
/// Address of its SYSCALL instruction.
pub const SYSCALL: u64 = BASE + 0x78;

/// The program as an ELF64 image (System V ABI, "ELF Header" and "Program Header").
pub fn image() -> Vec<u8> {
    let mut elf = Vec::with_capacity(0x80);
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01");
    elf.resize(16, 0);
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend_from_slice(&value.to_le_bytes());
    half(&mut elf, 2); // ET_EXEC
    half(&mut elf, 62); // EM_X86_64
    elf.extend_from_slice(&1u32.to_le_bytes());
    for value in [SYSCALL, 0x40, 0] {
        elf.extend_from_slice(&value.to_le_bytes()); // e_entry, e_phoff, e_shoff
    }
    elf.extend_from_slice(&0u32.to_le_bytes());
    for value in [0x40, 0x38, 1, 0, 0, 0] {
        half(&mut elf, value);
    }
    elf.extend_from_slice(&1u32.to_le_bytes()); // PT_LOAD
    elf.extend_from_slice(&5u32.to_le_bytes()); // R, X
    for value in [0, BASE, BASE, 0x7a, 0x7a, 0x1000] {
        elf.extend_from_slice(&u64::to_le_bytes(value)); // offset, vaddr, paddr, sizes, align
    }
    elf.extend_from_slice(&[0x0f, 0x05]); // SYSCALL
    elf
}
