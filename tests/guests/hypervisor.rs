//! A hypervisor of some fifty instructions with its guest, as an ELF64 image, for tests that run
//! whole machines. Test programs include this file.
//!
//! L1 is entered in 64-bit mode on tables that map memory onto itself. It starts L2 in 64-bit mode,
//! on L2's own page tables and EPT, and skips what exits, until VMCALL, which switches the machine
//! off. A page that EPT lacks is mapped when it is missed. An entry that fails writes 3 to the
//! debug-exit port.
#![allow(dead_code, reason = "each test program uses a part")]

use hypernest_cpu::{Model, VmxChoice};
use hypernest_vmcs::{ExitReason, Field, GuestSegment, entry, exit, proc1, proc2};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where L1 is entered.
pub const START: u64 = 0x10_0000;
/// L1 is entered here by VM exits.
pub const HANDLER: u64 = 0x10_1000;
const TABLE: u64 = 0x10_2000;
const VMXON: u64 = 0x18_0000;
/// The VMCS.
pub const VMCS: u64 = 0x18_1000;
/// Pointers to the VMXON region and to the VMCS; what follows them is free.
pub const POINTERS: u64 = 0x18_2000;
/// Where L1 goes at VMCALL, where [`Options`] say what it does then.
pub const AT_VMCALL: u64 = 0x10_1800;
/// EPT: four tables.
pub const EPT: u64 = 0x19_0000;
const HOST_STACK: u64 = 0x1a_8000;
/// Where L2's guest-physical address 0 lies.
pub const L2_MEMORY: u64 = 0x20_0000;
const END: u64 = 0x22_0000;

/// L2's linear addresses start here: they are guest-physical ones from 0.
pub const L2_BASE: u64 = 0x4000_0000;
/// Guest-physical address of L2's top page table; the others follow.
pub const L2_TABLES: u64 = 0x1000;
const L2_GDT: u64 = 0x5000;
const L2_IDT: u64 = 0x6000;
/// L2's code; its linear address is this and [`L2_BASE`].
pub const L2_CODE: u64 = 0x8000;
const L2_HANDLER: u64 = 0x9000;
const L2_STACK: u64 = 0xc000;
/// Guest-physical address of the page that EPT lacks at first.
pub const L2_MISSING: u64 = 0x10000;
/// Vector that is injected.
pub const VECTOR: u8 = 0x40;

/// What differs from the ordinary.
#[derive(Default)]
pub struct Options {
    /// Fields of the VMCS with other values.
    pub spoil: Vec<(Field, u64)>,
    /// The first VM entry injects interrupt [`VECTOR`], which L2 takes.
    pub inject: bool,
    /// L2's code instead of [`l2`]'s.
    pub l2: Option<Vec<u8>>,
    /// What L1 does at VMCALL instead of switching off: code for [`AT_VMCALL`].
    pub at_vmcall: Option<Vec<u8>>,
}

pub fn assemble(
    at: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    write(&mut a).unwrap();
    a.assemble(at).unwrap()
}

fn start() -> Vec<u8> {
    assemble(START, |a| {
        let mut next = a.create_label();
        let mut launch = a.create_label();
        a.mov(esp, HOST_STACK as u32)?;
        a.mov(rax, cr0)?;
        a.or(eax, 1 << 5)?;
        a.mov(cr0, rax)?;
        a.mov(rax, cr4)?;
        a.or(eax, 1 << 13)?;
        a.mov(cr4, rax)?;
        a.mov(ecx, 0x3a)?;
        a.mov(eax, 5)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ecx, 0x480)?;
        a.rdmsr()?;
        a.mov(dword_ptr(VMXON), eax)?;
        a.mov(dword_ptr(VMCS), eax)?;
        a.vmxon(qword_ptr(POINTERS))?;
        a.vmclear(qword_ptr(POINTERS + 8))?;
        a.vmptrld(qword_ptr(POINTERS + 8))?;
        a.mov(esi, TABLE as u32)?;
        a.set_label(&mut next)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.cmp(rax, -1)?;
        a.je(launch)?;
        a.vmwrite(rax, qword_ptr(rsi + 8))?;
        a.add(rsi, 16)?;
        a.jmp(next)?;
        a.set_label(&mut launch)?;
        a.vmlaunch()?;
        a.mov(al, 3)?;
        a.out(0xf4, al)?;
        a.hlt()
    })
}

fn handler(goes_on: bool) -> Vec<u8> {
    let field = |field: Field| u64::from(field.encoding());
    assemble(HANDLER, |a| {
        let mut off = a.create_label();
        let mut miss = a.create_label();
        let mut failed = a.create_label();
        let mut resume = a.create_label();
        a.mov(r8, field(Field::VM_EXIT_REASON))?;
        a.vmread(r8, r8)?;
        a.test(r8d, r8d)?;
        a.js(failed)?;
        a.cmp(r8, u32::from(ExitReason::VMCALL.0) as i32)?;
        if goes_on {
            a.je(AT_VMCALL)?;
        } else {
            a.je(off)?;
        }
        a.cmp(r8, u32::from(ExitReason::EPT_VIOLATION.0) as i32)?;
        a.je(miss)?;
        a.mov(r8, field(Field::GUEST_RIP))?;
        a.vmread(r9, r8)?;
        a.mov(r10, field(Field::VM_EXIT_INSTRUCTION_LEN))?;
        a.vmread(r10, r10)?;
        a.add(r9, r10)?;
        a.vmwrite(r8, r9)?;
        a.jmp(resume)?;
        a.set_label(&mut miss)?;
        a.or(byte_ptr(EPT + 0x3000 + 8 * (L2_MISSING >> 12)), 7)?;
        a.set_label(&mut resume)?;
        a.vmresume()?;
        a.set_label(&mut failed)?;
        a.mov(al, 3)?;
        a.out(0xf4, al)?;
        a.set_label(&mut off)?;
        a.mov(dx, 0x604)?;
        a.mov(ax, 0x3400)?;
        a.out(dx, ax)?;
        a.hlt()
    })
}

/// CPUID three times, RDMSR, IN, HLT, a store to the page that EPT lacks, VMCALL.
pub fn l2() -> Vec<u8> {
    assemble(L2_BASE + L2_CODE, |a| {
        let mut again = a.create_label();
        a.mov(ebx, 3)?;
        a.set_label(&mut again)?;
        a.cpuid()?;
        a.dec(ebx)?;
        a.jnz(again)?;
        a.mov(ecx, 0x277)?;
        a.rdmsr()?;
        a.in_(al, 0x60)?;
        a.hlt()?;
        a.mov(rcx, L2_BASE + L2_MISSING + 8)?;
        a.mov(byte_ptr(rcx), al)?;
        a.vmcall()
    })
}

/// The reasons of [`l2`]'s exits.
pub const EXITS: [ExitReason; 8] = [
    ExitReason::CPUID,
    ExitReason::CPUID,
    ExitReason::CPUID,
    ExitReason::RDMSR,
    ExitReason::IO_INSTRUCTION,
    ExitReason::HLT,
    ExitReason::EPT_VIOLATION,
    ExitReason::VMCALL,
];

fn fields() -> Vec<(Field, u64)> {
    use Field as F;
    let profile = VmxChoice::Max.profile(<&Model>::default());
    let profile = profile.unwrap().unwrap();
    let caps = &profile.caps;
    let primary =
        proc1::HLT_EXITING | proc1::UNCONDITIONAL_I_O_EXITING | proc1::ACTIVATE_SECONDARY_CONTROLS;
    let secondary = proc2::ENABLE_EPT | proc2::ENABLE_VPID;
    const CR0: u64 = 0x8000_0031;
    const CR4: u64 = 0x2020;
    let mut list = vec![
        (F::PIN_BASED_VM_EXEC_CONTROL, u64::from(caps.pin_allowed0())),
        (
            F::CPU_BASED_VM_EXEC_CONTROL,
            u64::from(caps.proc1_allowed0() | primary),
        ),
        (
            F::SECONDARY_VM_EXEC_CONTROL,
            u64::from(caps.proc2_allowed0() | secondary),
        ),
        (
            F::VM_EXIT_CONTROLS,
            u64::from(caps.exit_allowed0() | exit::HOST_ADDRESS_SPACE_SIZE),
        ),
        (
            F::VM_ENTRY_CONTROLS,
            u64::from(caps.entry_allowed0() | entry::IA_32E_MODE_GUEST),
        ),
        (F::VMCS_LINK_POINTER, !0),
        (F::EPT_POINTER, EPT | 3 << 3 | 6),
        (F::VIRTUAL_PROCESSOR_ID, 7),
        (F::HOST_CS_SELECTOR, 0x10),
        (F::HOST_SS_SELECTOR, 0x18),
        (F::HOST_DS_SELECTOR, 0x18),
        (F::HOST_ES_SELECTOR, 0x18),
        (F::HOST_FS_SELECTOR, 0x18),
        (F::HOST_GS_SELECTOR, 0x18),
        (F::HOST_TR_SELECTOR, 0x20),
        (F::HOST_CR0, CR0),
        (F::HOST_CR3, L1_TABLES),
        (F::HOST_CR4, CR4),
        (F::HOST_RIP, HANDLER),
        (F::HOST_RSP, HOST_STACK),
        (F::GUEST_CR0, CR0),
        (F::GUEST_CR3, L2_TABLES),
        (F::GUEST_CR4, CR4),
        (F::GUEST_GDTR_BASE, L2_BASE + L2_GDT),
        (F::GUEST_GDTR_LIMIT, 23),
        (F::GUEST_IDTR_BASE, L2_BASE + L2_IDT),
        (F::GUEST_IDTR_LIMIT, 0xfff),
        (F::GUEST_CS_SELECTOR, 8),
        (F::GUEST_CS_AR_BYTES, 0xa09b),
        (F::GUEST_CS_LIMIT, 0xffff_ffff),
        (F::GUEST_TR_AR_BYTES, 0x8b),
        (F::GUEST_TR_LIMIT, 0x67),
        (F::GUEST_LDTR_AR_BYTES, 1 << 16),
        (F::GUEST_DR7, 0x400),
        (F::GUEST_RFLAGS, 2),
        (F::GUEST_RIP, L2_BASE + L2_CODE),
        (F::GUEST_RSP, L2_BASE + L2_STACK),
    ];
    for segment in GuestSegment::DATA {
        list.extend([
            (segment.selector, 16),
            (segment.rights, 0xc093),
            (segment.limit, 0xffff_ffff),
        ]);
    }
    list
}

/// Where the loader puts the page tables of a plain ELF64 image.
pub const L1_TABLES: u64 = hypernest_machine::boot::layout::PAGE_TABLES;

/// The image, an ELF64 file with L1's symbols: `start` and `handler`.
pub fn image(options: &Options) -> Vec<u8> {
    let mut memory = vec![0; (END - START) as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = (at - START) as usize;
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(START, &start());
    put(HANDLER, &handler(options.at_vmcall.is_some()));
    if let Some(code) = &options.at_vmcall {
        put(AT_VMCALL, code);
    }
    let mut list = fields();
    if options.inject {
        let info = 1 << 31 | u64::from(VECTOR);
        list.push((Field::VM_ENTRY_INTR_INFO_FIELD, info));
        list.push((Field::GUEST_RFLAGS, 0x202));
    }
    list.extend(&options.spoil);
    let mut table: Vec<u8> = Vec::new();
    for (field, value) in list {
        table.extend(u64::from(field.encoding()).to_le_bytes());
        table.extend(value.to_le_bytes());
    }
    table.extend(u64::MAX.to_le_bytes());
    put(TABLE, &table);
    put(POINTERS, &VMXON.to_le_bytes());
    put(POINTERS + 8, &VMCS.to_le_bytes());
    for level in 0..3 {
        put(
            EPT + 0x1000 * level,
            &((EPT + 0x1000 * (level + 1)) | 7).to_le_bytes(),
        );
    }
    for page in 0..32u64 {
        let rights = if page == L2_MISSING >> 12 { 0 } else { 7 };
        let entry = (L2_MEMORY + (page << 12)) | 6 << 3 | rights;
        put(EPT + 0x3000 + 8 * page, &entry.to_le_bytes());
    }
    let mut l2_put = |at: u64, bytes: &[u8]| put(L2_MEMORY + at, bytes);
    l2_put(L2_TABLES, &(L2_TABLES + 0x1000 + 3).to_le_bytes());
    l2_put(L2_TABLES + 0x1008, &(L2_TABLES + 0x2000 + 3).to_le_bytes());
    l2_put(L2_TABLES + 0x2000, &(L2_TABLES + 0x3000 + 3).to_le_bytes());
    for page in 0..64u64 {
        l2_put(
            L2_TABLES + 0x3000 + 8 * page,
            &(page << 12 | 3).to_le_bytes(),
        );
    }
    l2_put(L2_GDT + 8, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    l2_put(L2_GDT + 16, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    let gate = L2_BASE + L2_HANDLER;
    let low = gate & 0xffff | 8 << 16 | 0x8e00 << 32 | (gate >> 16 & 0xffff) << 48;
    l2_put(L2_IDT + 16 * u64::from(VECTOR), &low.to_le_bytes());
    l2_put(L2_HANDLER, &[0x48, 0xcf]);
    l2_put(L2_CODE, &options.l2.clone().unwrap_or_else(l2));
    elf64(&memory, START, &[("start", START), ("handler", HANDLER)])
}

/// An ELF64 file with nothing but L2's symbols: `guest` and `interrupt`.
pub fn l2_symbols() -> Vec<u8> {
    elf64(
        &[],
        0,
        &[
            ("guest", L2_BASE + L2_CODE),
            ("interrupt", L2_BASE + L2_HANDLER),
        ],
    )
}

/// An ELF64 file: one segment at `base`, entered at its start, and functions by name.
fn elf64(memory: &[u8], base: u64, symbols: &[(&str, u64)]) -> Vec<u8> {
    const HEADER: usize = 64;
    const PROGRAM: usize = 56;
    let mut names = vec![0];
    let mut table = vec![0; 24];
    for (name, address) in symbols {
        table.extend((names.len() as u32).to_le_bytes());
        table.extend([0x12, 0, 1, 0]);
        table.extend(address.to_le_bytes());
        table.extend([0; 8]);
        names.extend(name.bytes());
        names.push(0);
    }
    let content = HEADER + PROGRAM;
    let table_at = content + memory.len();
    let names_at = table_at + table.len();
    let sections_at = names_at + names.len();
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(HEADER, 0);
    out[16..20].copy_from_slice(&[2, 0, 62, 0]);
    out[20] = 1;
    out[24..32].copy_from_slice(&base.to_le_bytes());
    out[32] = HEADER as u8;
    out[40..48].copy_from_slice(&(sections_at as u64).to_le_bytes());
    out[52..64].copy_from_slice(&[64, 0, 56, 0, 1, 0, 64, 0, 3, 0, 2, 0]);
    let len = memory.len() as u64;
    out.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [content as u64, base, base, len, len, 1] {
        out.extend(word.to_le_bytes());
    }
    out.extend(memory);
    out.extend(&table);
    out.extend(&names);
    let mut section = |kind: u32, at: usize, len: usize, link: u32, entry: u64| {
        out.extend(0u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend([0; 16]);
        out.extend((at as u64).to_le_bytes());
        out.extend((len as u64).to_le_bytes());
        out.extend(link.to_le_bytes());
        out.extend([0; 12]);
        out.extend(entry.to_le_bytes());
    };
    section(0, 0, 0, 0, 0);
    section(2, table_at, table.len(), 2, 24);
    section(3, names_at, names.len(), 0, 0);
    out
}
