//! VMX operation, L2's memory and its VMCS, up to VMLAUNCH.

use hypernest_vmcs::{Field as F, entry, exit, pin, proc1, proc2};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::*;

const FEATURE_CONTROL: u32 = 0x3a;
const VMX_BASIC: u32 = 0x480;
const VMXE: u32 = 1 << 13;
const OSXSAVE: u32 = 1 << 18;
/// CPUID.1:ECX.
const HAS_VMX: u32 = 1 << 5;
const HAS_XSAVE: u32 = 1 << 26;
/// Read, write and execute; write-back.
const EPT_PAGE: u32 = 7 | 6 << 3;
const VPID: u32 = 1;

/// What L1 asks for, by capability MSR: it takes what else must be 1 from there.
const CONTROLS: [(u32, F, u32); 5] = [
    (0x481, F::PIN_BASED_VM_EXEC_CONTROL, pin::NMI_EXITING),
    (
        0x482,
        F::CPU_BASED_VM_EXEC_CONTROL,
        proc1::HLT_EXITING
            | proc1::INVLPG_EXITING
            | proc1::RDTSC_EXITING
            | proc1::CR3_LOAD_EXITING
            | proc1::MOV_DR_EXITING
            | proc1::UNCONDITIONAL_I_O_EXITING
            | proc1::ACTIVATE_SECONDARY_CONTROLS,
    ),
    (
        0x48b,
        F::SECONDARY_VM_EXEC_CONTROL,
        proc2::ENABLE_EPT | proc2::ENABLE_VPID,
    ),
    (0x483, F::VM_EXIT_CONTROLS, exit::HOST_ADDRESS_SPACE_SIZE),
    (0x484, F::VM_ENTRY_CONTROLS, entry::IA_32E_MODE_GUEST),
];

impl Monitor {
    /// Reads a field into a register.
    pub fn read(&mut self, field: F, into: AsmRegister64) -> Result<(), IcedError> {
        self.a.mov(into, u64::from(field.encoding()))?;
        self.a.vmread(into, into)
    }

    /// Writes a register to a field. Changes R11.
    pub fn write(&mut self, field: F, from: AsmRegister64) -> Result<(), IcedError> {
        self.a.mov(r11, u64::from(field.encoding()))?;
        self.a.vmwrite(r11, from)
    }

    /// Writes a number to a field. Changes RAX and R11.
    fn set(&mut self, field: F, value: u64) -> Result<(), IcedError> {
        self.a.mov(rax, value)?;
        self.write(field, rax)
    }
}

pub fn launch(m: &mut Monitor) -> Result<(), IcedError> {
    m.a.xor(r15d, r15d)?;
    m.say(
        "A hypervisor (L1) starts its guest (L2): every exit from L2, and what L1 does.\r\n\r\n",
    )?;
    vmx_operation(m)?;
    memory(m)?;
    controls(m)?;
    host_state(m)?;
    guest_state(m)?;
    m.say(&exits::heading())?;
    let a = &mut m.a;
    a.rdtsc()?;
    a.mov(dword_ptr(LAUNCHED_AT), eax)?;
    a.mov(dword_ptr(LAUNCHED_AT + 4), edx)?;
    a.vmlaunch()?;
    a.jmp(m.failed)
}

/// Up to VMPTRLD.
fn vmx_operation(m: &mut Monitor) -> Result<(), IcedError> {
    let mut present = m.a.create_label();
    m.a.mov(eax, 1)?;
    m.a.cpuid()?;
    m.a.mov(edi, ecx)?;
    m.a.test(ecx, HAS_VMX as i32)?;
    m.a.jnz(present)?;
    m.say("This processor has no VMX: a hypervisor cannot run on it.\r\n")?;
    m.a.jmp(m.off)?;
    m.a.set_label(&mut present)?;

    let a = &mut m.a;
    let mut locked = a.create_label();
    a.mov(ecx, FEATURE_CONTROL)?;
    a.rdmsr()?;
    a.test(al, 1)?;
    a.jnz(locked)?;
    a.or(eax, 5)?; // locked, VMX outside SMX
    a.wrmsr()?;
    a.set_label(&mut locked)?;

    // CR4, the same for L1 and L2; state components only where there is XSAVE.
    a.mov(rax, cr4)?;
    a.or(eax, VMXE as i32)?;
    a.mov(rbx, rax)?;
    a.or(ebx, OSXSAVE as i32)?;
    a.test(edi, HAS_XSAVE as i32)?;
    a.cmovnz(rax, rbx)?;
    a.mov(cr4, rax)?;

    a.mov(ecx, VMX_BASIC)?;
    a.rdmsr()?;
    a.btr(eax, 31)?;
    for region in [VMXON, VMCS] {
        a.mov(dword_ptr(region), eax)?;
        a.push(region as i32)?;
    }
    a.vmxon(qword_ptr(rsp + 8))?;
    a.jbe(m.failed)?;
    a.vmclear(qword_ptr(rsp))?;
    a.jbe(m.failed)?;
    a.vmptrld(qword_ptr(rsp))?;
    a.jbe(m.failed)?;
    a.add(rsp, 16)
}

/// L2's memory, its page tables in it, and the extended page tables that show it to L2 from 0 on.
fn memory(m: &mut Monitor) -> Result<(), IcedError> {
    let a = &mut m.a;
    a.mov(rdi, u64::from(L2_MEMORY))?;
    a.mov(ecx, L2_MEMORY_SIZE / 8)?;
    a.xor(eax, eax)?;
    a.rep().stosq()?;
    a.mov(rsi, u64::from(L2_IMAGE))?;
    a.mov(rdi, u64::from(L2_MEMORY + l2::CODE))?;
    a.mov(ecx, L2_SIZE / 8)?;
    a.rep().movsq()?;
    a.mov(dword_ptr(L2_MEMORY + l2::PML4), l2::PDPT | 3)?;
    a.mov(dword_ptr(L2_MEMORY + l2::PDPT), l2::DIRECTORY | 3)?;
    for page in 0..2 {
        let at = L2_MEMORY + l2::DIRECTORY + 8 * page;
        a.mov(dword_ptr(at), page << 21 | 0x83)?;
    }

    a.mov(dword_ptr(EPT_PML4), EPT_PDPT | 7)?;
    a.mov(dword_ptr(EPT_PDPT), EPT_DIRECTORY | 7)?;
    a.mov(dword_ptr(EPT_DIRECTORY), EPT_LOW | 7)?;
    a.mov(dword_ptr(EPT_DIRECTORY + 8), EPT_HIGH | 7)?;
    a.mov(rdi, u64::from(EPT_LOW))?;
    a.mov(eax, L2_MEMORY | EPT_PAGE)?;
    a.mov(ecx, 512)?;
    let mut page = a.create_label();
    a.set_label(&mut page)?;
    a.stosq()?;
    a.add(rax, 0x1000)?;
    a.dec(ecx)?;
    a.jnz(page)?;
    a.mov(dword_ptr(FREE_PAGE), PAGES)
}

/// What L1 wants and what the processor demands; it goes no further where one is missing.
fn controls(m: &mut Monitor) -> Result<(), IcedError> {
    let mut missing = m.a.create_label();
    let mut complete = m.a.create_label();
    for (msr, field, wanted) in CONTROLS {
        m.a.mov(ecx, msr)?;
        m.a.rdmsr()?; // must be 1; may be 1
        m.a.or(eax, wanted as i32)?;
        m.a.and(edx, wanted as i32)?;
        m.a.cmp(edx, wanted as i32)?;
        m.a.jne(missing)?;
        m.write(field, rax)?;
    }
    m.a.jmp(complete)?;
    m.a.set_label(&mut missing)?;
    m.say("This processor lacks a control that L1 needs; the capability MSR is ")?;
    m.say_hex(rcx)?;
    m.say("\r\n")?;
    m.a.jmp(m.off)?;
    m.a.set_label(&mut complete)?;
    m.set(F::EXCEPTION_BITMAP, 1 << 6)?; // #UD
    m.set(F::EPT_POINTER, u64::from(EPT_PML4) | 3 << 3 | 6)?;
    m.set(F::VIRTUAL_PROCESSOR_ID, VPID.into())?;
    m.set(F::VMCS_LINK_POINTER, !0)?;
    // L2 does not see that VMX is on.
    m.set(F::CR4_GUEST_HOST_MASK, VMXE.into())
}

fn host_state(m: &mut Monitor) -> Result<(), IcedError> {
    for (field, value) in [
        (F::HOST_CS_SELECTOR, CODE),
        (F::HOST_SS_SELECTOR, DATA),
        (F::HOST_DS_SELECTOR, DATA),
        (F::HOST_ES_SELECTOR, DATA),
        (F::HOST_FS_SELECTOR, DATA),
        (F::HOST_GS_SELECTOR, DATA),
        (F::HOST_TR_SELECTOR, TASK),
        (F::HOST_GDTR_BASE, start::GDT.0),
        (F::HOST_RSP, STACK),
    ] {
        m.set(field, value.into())?;
    }
    m.a.lea(rax, ptr(m.exit))?;
    m.write(F::HOST_RIP, rax)?;
    m.a.mov(rax, cr0)?;
    m.write(F::HOST_CR0, rax)?;
    m.write(F::GUEST_CR0, rax)?;
    m.a.mov(rax, cr3)?;
    m.write(F::HOST_CR3, rax)?;
    m.a.mov(rax, cr4)?;
    m.write(F::HOST_CR4, rax)?;
    m.write(F::GUEST_CR4, rax)
}

/// L2 begins in 64-bit mode, with segments that it can leave alone.
fn guest_state(m: &mut Monitor) -> Result<(), IcedError> {
    const FLAT: u64 = 0xc093;
    for (field, value) in [
        (F::GUEST_CR3, l2::PML4.into()),
        (F::GUEST_RIP, l2::CODE.into()),
        (F::GUEST_RSP, l2::STACK.into()),
        (F::GUEST_RFLAGS, 2),
        (F::GUEST_DR7, 0x400),
        (F::GUEST_CS_SELECTOR, CODE.into()),
        (F::GUEST_CS_AR_BYTES, 0xa09b),
        (F::GUEST_CS_LIMIT, 0xffff_ffff),
        (F::GUEST_SS_SELECTOR, DATA.into()),
        (F::GUEST_SS_AR_BYTES, FLAT),
        (F::GUEST_SS_LIMIT, 0xffff_ffff),
        (F::GUEST_DS_SELECTOR, DATA.into()),
        (F::GUEST_DS_AR_BYTES, FLAT),
        (F::GUEST_DS_LIMIT, 0xffff_ffff),
        (F::GUEST_ES_SELECTOR, DATA.into()),
        (F::GUEST_ES_AR_BYTES, FLAT),
        (F::GUEST_ES_LIMIT, 0xffff_ffff),
        (F::GUEST_FS_SELECTOR, DATA.into()),
        (F::GUEST_FS_AR_BYTES, FLAT),
        (F::GUEST_FS_LIMIT, 0xffff_ffff),
        (F::GUEST_GS_SELECTOR, DATA.into()),
        (F::GUEST_GS_AR_BYTES, FLAT),
        (F::GUEST_GS_LIMIT, 0xffff_ffff),
        (F::GUEST_TR_SELECTOR, TASK.into()),
        (F::GUEST_TR_AR_BYTES, 0x8b),
        (F::GUEST_TR_LIMIT, 0x67),
        (F::GUEST_LDTR_AR_BYTES, 1 << 16), // unusable
    ] {
        m.set(field, value)?;
    }
    Ok(())
}
