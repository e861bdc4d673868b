//! A hypervisor that changes VMCSs: between rounds of its guest it makes fresh regions, and loads every region of the
//! rounds before.

use hypernest_vmcs::Field;
use iced_x86::code_asm::*;

use crate::hypervisor::{AT_VMCALL, L2_BASE, L2_CODE, Options, POINTERS, assemble, image};

/// How often L1 has changed VMCSs, and the pointer it uses.
pub const ROUNDS: u64 = POINTERS + 0x100;
pub const POINTER: u64 = POINTERS + 0x108;
/// Two regions for each round: one that becomes current, one that is only cleared.
pub const FRESH: u64 = 0x30_0000;
/// Where L2 counts.
pub const COUNT: u64 = 0xb000;
/// Rounds, and what L2 does between two of them.
pub const ALL_ROUNDS: u32 = 9;
pub const EXITS: u32 = 40;

/// Exits and work, then VMCALL with 1; after all rounds with 0.
pub fn l2() -> Vec<u8> {
    assemble(L2_BASE + L2_CODE, |a| {
        let mut round = a.create_label();
        let mut again = a.create_label();
        a.mov(r15d, ALL_ROUNDS)?;
        a.mov(r14, L2_BASE + COUNT)?;
        a.set_label(&mut round)?;
        a.mov(r13d, EXITS)?;
        a.set_label(&mut again)?;
        a.cpuid()?;
        a.add(qword_ptr(r14), 3)?;
        a.dec(r13d)?;
        a.jnz(again)?;
        a.mov(eax, 1)?;
        a.vmcall()?;
        a.dec(r15d)?;
        a.jnz(round)?;
        a.xor(eax, eax)?;
        a.vmcall()
    })
}

/// L1 stamps the revision that it read at boot into two fresh regions and clears them; the first becomes current
/// and gets a mark. Every region of the rounds before is loaded and must have its mark. Then the guest's VMCS is
/// cleared, loaded and launched again.
pub fn round() -> Vec<u8> {
    let field = u64::from(Field::GUEST_RIP.encoding());
    assemble(AT_VMCALL, |a| {
        let mut off = a.create_label();
        let mut failed = a.create_label();
        let mut next = a.create_label();
        let mut back = a.create_label();
        a.test(eax, eax)?;
        a.jz(off)?;
        a.mov(r12, field)?;
        a.mov(rbx, qword_ptr(ROUNDS))?;
        a.shl(rbx, 13)?;
        a.add(rbx, FRESH as i32)?;
        a.mov(rcx, qword_ptr(POINTERS))?;
        a.mov(ecx, dword_ptr(rcx))?;
        for at in [0x1000, 0] {
            a.mov(dword_ptr(rbx + at), ecx)?;
            a.lea(rdx, qword_ptr(rbx + at))?;
            a.mov(qword_ptr(POINTER), rdx)?;
            a.vmclear(qword_ptr(POINTER))?;
            a.jbe(failed)?;
        }
        a.vmptrld(qword_ptr(POINTER))?;
        a.jbe(failed)?;
        a.vmwrite(r12, rbx)?;
        a.jbe(failed)?;
        a.set_label(&mut next)?;
        a.cmp(rbx, FRESH as i32)?;
        a.je(back)?;
        a.sub(rbx, 0x2000)?;
        a.mov(qword_ptr(POINTER), rbx)?;
        a.vmptrld(qword_ptr(POINTER))?;
        a.jbe(failed)?;
        a.vmread(rdx, r12)?;
        a.jbe(failed)?;
        a.cmp(rdx, rbx)?;
        a.jne(failed)?;
        a.jmp(next)?;
        a.set_label(&mut back)?;
        a.inc(qword_ptr(ROUNDS))?;
        a.vmclear(qword_ptr(POINTERS + 8))?;
        a.jbe(failed)?;
        a.vmptrld(qword_ptr(POINTERS + 8))?;
        a.jbe(failed)?;
        a.vmread(rdx, r12)?;
        a.add(rdx, 3)?;
        a.vmwrite(r12, rdx)?;
        a.vmlaunch()?;
        a.set_label(&mut failed)?;
        a.mov(al, 3)?;
        a.out(0xf4, al)?;
        a.hlt()?;
        a.set_label(&mut off)?;
        a.mov(dx, 0x604)?;
        a.mov(ax, 0x3400)?;
        a.out(dx, ax)?;
        a.hlt()
    })
}

/// The whole of it, to boot with 8 MiB.
pub fn rounds() -> Vec<u8> {
    image(&Options {
        l2: Some(l2()),
        at_vmcall: Some(round()),
        ..Options::default()
    })
}
