//! L2: a program in 64-bit mode that does what makes it exit, and looks at what came of it.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::{CALL_PRINT, CALL_TIMER};

/// Guest-physical addresses; the page tables map each to itself.
pub const CODE: u32 = 0x1000;
pub const PML4: u32 = 0x2000;
pub const PDPT: u32 = 0x3000;
pub const DIRECTORY: u32 = 0x4000;
const IDT: u32 = 0x5000;
pub const STACK: u32 = 0x8000;
/// A page that L2 has only once L1 gives it one.
const NEW_PAGE: u32 = 0x20_3000;

/// Null, 64-bit code, data.
const DESCRIPTORS: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const IA32_PAT: u32 = 0x277;
const IA32_SYSENTER_EIP: u32 = 0x176;
const PORT: i32 = 0x80;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const HAS_XSAVE: i32 = 1 << 26;

pub fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut gdt = a.create_label();
    let mut gdt_pointer = a.create_label();
    let mut idt_pointer = a.create_label();
    let mut no_idt = a.create_label();
    let mut invalid_opcode = a.create_label();
    let mut name = a.create_label();
    let mut vendor = a.create_label();
    let mut well = a.create_label();
    let mut ill = a.create_label();
    let mut wrong = a.create_label();
    let mut say = a.create_label();

    // Descriptor tables of its own, with a handler for #UD.
    a.lea(rax, ptr(gdt))?;
    a.lea(rdi, ptr(gdt_pointer))?;
    a.mov(qword_ptr(rdi + 2), rax)?;
    a.lgdt(ptr(gdt_pointer))?;
    a.lea(rax, ptr(invalid_opcode))?;
    a.mov(rdi, u64::from(IDT + 16 * 6))?;
    a.mov(word_ptr(rdi), ax)?;
    a.mov(word_ptr(rdi + 2), super::CODE)?;
    a.mov(word_ptr(rdi + 4), 0x8e00)?;
    a.lidt(ptr(idt_pointer))?;

    // Who is there? The name goes into a sentence.
    a.mov(eax, HYPERVISOR_LEAF)?;
    a.cpuid()?;
    a.lea(rdi, ptr(vendor))?;
    a.mov(dword_ptr(rdi), ebx)?;
    a.mov(dword_ptr(rdi + 4), ecx)?;
    a.mov(dword_ptr(rdi + 8), edx)?;
    a.lea(rsi, ptr(name))?;
    a.call(say)?;
    a.mov(eax, 1)?;
    a.cpuid()?;
    a.mov(r8d, ecx)?;

    // Registers.
    a.mov(ecx, IA32_PAT)?;
    a.rdmsr()?;
    a.mov(ecx, IA32_SYSENTER_EIP)?;
    a.mov(eax, CODE)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.rdtsc()?;
    a.mov(rax, cr3)?;
    a.mov(cr3, rax)?;
    a.mov(eax, 0x1234)?;
    a.mov(dr0, rax)?;
    let mut no_xsave = a.create_label();
    a.test(r8d, HAS_XSAVE)?;
    a.jz(no_xsave)?;
    a.xor(ecx, ecx)?;
    a.xor(edx, edx)?;
    a.mov(eax, 3)?; // x87 and SSE
    a.xsetbv()?;
    a.set_label(&mut no_xsave)?;

    // A port gives back what was written.
    a.mov(eax, 0x5a)?;
    a.out(PORT, al)?;
    a.xor(eax, eax)?;
    a.in_(al, PORT)?;
    a.cmp(al, 0x5a)?;
    a.jne(wrong)?;

    // So does memory that appears when it is touched.
    a.mov(rdi, u64::from(NEW_PAGE))?;
    a.mov(dword_ptr(rdi), 0x600d_f00d)?;
    a.invlpg(ptr(rdi))?;
    a.cmp(dword_ptr(rdi), 0x600d_f00d)?;
    a.jne(wrong)?;

    // The handler of #UD counts in R9, and goes on behind the instruction.
    a.xor(r9d, r9d)?;
    a.ud2()?;
    a.cmp(r9d, 1)?;
    a.jne(wrong)?;

    // Nothing here ends the loop.
    let mut spin = a.create_label();
    a.mov(eax, CALL_TIMER)?;
    a.vmcall()?;
    a.xor(ebx, ebx)?;
    a.set_label(&mut spin)?;
    a.test(ebx, ebx)?;
    a.jz(spin)?;

    a.hlt()?;
    let mut report = a.create_label();
    a.lea(rsi, ptr(well))?;
    a.jmp(report)?;
    a.set_label(&mut wrong)?;
    a.lea(rsi, ptr(ill))?;
    a.set_label(&mut report)?;
    a.call(say)?;
    // No handler for this, for what comes of that, nor for what comes of that.
    a.lidt(ptr(no_idt))?;
    a.int3()?;

    a.set_label(&mut say)?;
    a.mov(eax, CALL_PRINT)?;
    a.vmcall()?;
    a.ret()?;

    a.set_label(&mut invalid_opcode)?;
    a.inc(r9d)?;
    a.add(qword_ptr(rsp), 2)?;
    a.iretq()?;

    a.set_label(&mut gdt)?;
    a.db(&DESCRIPTORS.map(u64::to_le_bytes).concat())?;
    a.set_label(&mut gdt_pointer)?;
    a.dw(&[8 * DESCRIPTORS.len() as u16 - 1])?;
    a.dq(&[0])?;
    a.set_label(&mut idt_pointer)?;
    a.dw(&[16 * 7 - 1])?;
    a.dq(&[IDT.into()])?;
    a.set_label(&mut no_idt)?;
    a.dw(&[0])?;
    a.dq(&[0])?;
    a.set_label(&mut name)?;
    a.db(b"I run under ")?;
    a.set_label(&mut vendor)?;
    a.db(b"............\0")?;
    a.set_label(&mut well)?;
    a.db(b"all came back right\0")?;
    a.set_label(&mut ill)?;
    a.db(b"something is wrong\0")?;
    a.assemble(CODE.into())
}
