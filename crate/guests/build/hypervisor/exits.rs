//! What L1 does at each VM exit.

use hypernest_vmcs::{ExitReason as R, Field as F, pin};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::*;

/// What L2 finds in CPUID leaf 4000_0000H.
const HYPERVISOR_NAME: &[u8; 12] = b"NestEgg (L1)";
/// Units of 32 cycles here, of a power of two elsewhere.
const TIMER: u32 = 1000;
const IA32_SYSENTER_EIP: i32 = 0x176;
const PM1A_CONTROL: u32 = 0x604;
/// Sleep enable, sleep type 5.
const POWER_OFF: u32 = 1 << 13 | 5 << 10;

/// L2's registers on L1's stack, as they are numbered in instructions. RSP is in the VMCS.
const REGISTERS: [AsmRegister64; 16] = [
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
];
const RAX: i32 = 0;
const RCX: i32 = 8;
const RDX: i32 = 16;
const RBX: i32 = 24;
const RSI: i32 = 48;

/// One kind of exit: its reason, what L1 calls it, and the code for it.
type Kind = (R, &'static str, fn(&mut Monitor) -> Result<Then, IcedError>);

/// Columns of the table.
const REASON: u32 = 4;
const NAME: u32 = 8;
const QUALIFICATION: u32 = 23;
const RIP: u32 = 37;
const DONE: u32 = 46;

/// The line above the table.
pub fn heading() -> String {
    let mut line = String::new();
    for (column, word) in [
        (0, "exit"),
        (NAME, "reason"),
        (QUALIFICATION, "qualification"),
        (RIP, "L2's RIP"),
        (DONE, "L1"),
    ] {
        line = format!("{line:0$}{word}", column as usize);
    }
    line + "\r\n"
}

/// How L2 goes on.
enum Then {
    /// Behind the instruction that left it.
    Next,
    /// Where it was.
    Again,
    /// Not at all.
    Ended,
}

const KINDS: [Kind; 15] = [
    (R::CPUID, "CPUID", cpuid),
    (R::RDMSR, "RDMSR", rdmsr),
    (R::WRMSR, "WRMSR", wrmsr),
    (R::RDTSC, "RDTSC", rdtsc),
    (R::CONTROL_REGISTER_ACCESS, "MOV CR", control_register),
    (R::MOV_DR, "MOV DR", debug_register),
    (R::XSETBV, "XSETBV", xsetbv),
    (R::IO_INSTRUCTION, "IN or OUT", port),
    (R::EPT_VIOLATION, "EPT violation", ept_violation),
    (R::INVLPG, "INVLPG", invlpg),
    (R::EXCEPTION_OR_NMI, "exception", exception),
    (R::VMCALL, "VMCALL", vmcall),
    (R::PREEMPTION_TIMER, "timer expired", timer),
    (R::HLT, "HLT", hlt),
    (R::TRIPLE_FAULT, "triple fault", triple_fault),
];

fn saved(register: i32) -> AsmMemoryOperand {
    qword_ptr(rbp + register)
}

/// R12 is the reason, R13 the qualification, R14 L2's RIP, RBP points to L2's registers.
pub fn exits(m: &mut Monitor) -> Result<(), IcedError> {
    let mut next = m.a.create_label();
    let mut again = m.a.create_label();
    let mut details = m.a.create_label();

    m.a.set_label(&mut m.exit)?;
    for register in REGISTERS.iter().rev() {
        m.a.push(*register)?;
    }
    m.a.mov(rbp, rsp)?;
    m.a.xor(r15d, r15d)?;
    m.read(F::VM_EXIT_REASON, r12)?;
    m.read(F::EXIT_QUALIFICATION, r13)?;
    m.read(F::GUEST_RIP, r14)?;
    m.a.inc(qword_ptr(TOTAL))?;
    m.a.mov(rax, qword_ptr(TOTAL))?;
    m.a.call(m.decimal)?;
    m.tab(REASON)?;
    m.a.movzx(eax, r12w)?;
    m.a.call(m.decimal)?;
    m.tab(NAME)?;

    for (reason, name, handle) in KINDS {
        let mut other = m.a.create_label();
        // All of the field: bit 31 says that an entry failed.
        m.a.cmp(r12d, i32::from(reason.0))?;
        m.a.jne(other)?;
        m.a.inc(qword_ptr(COUNTS + 8 * u32::from(reason.0)))?;
        m.say(name)?;
        m.a.call(details)?;
        match handle(m)? {
            Then::Next => m.a.jmp(next)?,
            Then::Again => m.a.jmp(again)?,
            Then::Ended => m.a.jmp(m.finish)?,
        }
        m.a.set_label(&mut other)?;
    }
    // What is left.
    m.a.call(details)?;
    m.say("does not know this one and ends L2\r\n")?;
    m.a.jmp(m.finish)?;

    m.a.set_label(&mut details)?;
    m.tab(QUALIFICATION)?;
    m.say_hex(r13)?;
    m.tab(RIP)?;
    m.say_hex(r14)?;
    m.tab(DONE)?;
    m.a.ret()?;

    m.a.set_label(&mut next)?;
    m.read(F::VM_EXIT_INSTRUCTION_LEN, rax)?;
    m.a.add(r14, rax)?;
    m.write(F::GUEST_RIP, r14)?;
    m.a.set_label(&mut again)?;
    m.say("\r\n")?;
    m.a.mov(rsp, rbp)?;
    for register in REGISTERS {
        if register == rsp {
            m.a.add(rsp, 8)?;
        } else {
            m.a.pop(register)?;
        }
    }
    m.a.vmresume()?;
    m.a.jmp(m.failed)
}

fn cpuid(m: &mut Monitor) -> Result<Then, IcedError> {
    let mut ours = m.a.create_label();
    let mut done = m.a.create_label();
    m.a.cmp(dword_ptr(rbp + RAX), 0x4000_0000)?;
    m.a.je(ours)?;
    m.say("asks the processor: leaf ")?;
    m.a.mov(eax, dword_ptr(rbp + RAX))?;
    m.a.call(m.hex)?;
    m.a.mov(eax, dword_ptr(rbp + RAX))?;
    m.a.mov(ecx, dword_ptr(rbp + RCX))?;
    m.a.cpuid()?;
    m.a.mov(saved(RAX), rax)?;
    m.a.mov(saved(RBX), rbx)?;
    m.a.mov(saved(RCX), rcx)?;
    m.a.mov(saved(RDX), rdx)?;
    m.a.jmp(done)?;
    m.a.set_label(&mut ours)?;
    for (register, part) in [RBX, RCX, RDX].into_iter().zip(HYPERVISOR_NAME.chunks(4)) {
        let mut word = [0; 4];
        word.copy_from_slice(part);
        m.a.mov(eax, u32::from_le_bytes(word))?;
        m.a.mov(saved(register), rax)?;
    }
    m.say("gives its own name")?;
    m.a.set_label(&mut done)?;
    Ok(Then::Next)
}

fn rdmsr(m: &mut Monitor) -> Result<Then, IcedError> {
    m.a.mov(ecx, dword_ptr(rbp + RCX))?;
    m.a.rdmsr()?;
    m.a.mov(saved(RAX), rax)?;
    m.a.mov(saved(RDX), rdx)?;
    m.say("reads the register for it: ")?;
    m.a.mov(eax, dword_ptr(rbp + RCX))?;
    m.a.call(m.hex)?;
    Ok(Then::Next)
}

fn wrmsr(m: &mut Monitor) -> Result<Then, IcedError> {
    let mut ignored = m.a.create_label();
    let mut done = m.a.create_label();
    m.a.cmp(dword_ptr(rbp + RCX), IA32_SYSENTER_EIP)?;
    m.a.jne(ignored)?;
    m.a.mov(rax, saved(RDX))?;
    m.a.shl(rax, 32)?;
    m.a.mov(ecx, dword_ptr(rbp + RAX))?;
    m.a.or(rax, rcx)?;
    m.write(F::GUEST_SYSENTER_EIP, rax)?;
    m.say("puts it in the VMCS: register ")?;
    m.a.jmp(done)?;
    m.a.set_label(&mut ignored)?;
    m.say("ignores it: register ")?;
    m.a.set_label(&mut done)?;
    m.a.mov(eax, dword_ptr(rbp + RCX))?;
    m.a.call(m.hex)?;
    Ok(Then::Next)
}

/// L2's clock began with it.
fn rdtsc(m: &mut Monitor) -> Result<Then, IcedError> {
    m.a.rdtsc()?;
    m.a.shl(rdx, 32)?;
    m.a.or(rax, rdx)?;
    m.a.sub(rax, qword_ptr(LAUNCHED_AT))?;
    m.a.mov(dword_ptr(rbp + RAX), eax)?;
    m.a.mov(dword_ptr(rbp + RAX + 4), 0)?;
    m.a.mov(rdx, rax)?;
    m.a.shr(rdx, 32)?;
    m.a.mov(saved(RDX), rdx)?;
    m.a.mov(rbx, rax)?;
    m.say("counts from L2's start: ")?;
    m.say_decimal(rbx)?;
    Ok(Then::Next)
}

/// RAX = the register of L2 that bits 11:8 of the qualification name. Changes ECX.
fn operand(m: &mut Monitor) -> Result<(), IcedError> {
    m.a.mov(ecx, r13d)?;
    m.a.shr(ecx, 8)?;
    m.a.and(ecx, 15)?;
    m.a.mov(rax, qword_ptr(rbp + rcx * 8))
}

/// MOV to CR3, and from it: the first processors with VMX always leave the guest for both.
fn control_register(m: &mut Monitor) -> Result<Then, IcedError> {
    let mut store = m.a.create_label();
    let mut done = m.a.create_label();
    m.a.test(r13d, 1 << 4)?; // from the control register
    m.a.jnz(store)?;
    operand(m)?;
    m.a.mov(rbx, rax)?;
    m.write(F::GUEST_CR3, rbx)?;
    m.say("loads L2's CR3: ")?;
    m.a.jmp(done)?;
    m.a.set_label(&mut store)?;
    operand(m)?;
    m.read(F::GUEST_CR3, rbx)?;
    m.a.mov(qword_ptr(rbp + rcx * 8), rbx)?;
    m.say("gives L2's CR3: ")?;
    m.a.set_label(&mut done)?;
    m.say_hex(rbx)?;
    Ok(Then::Next)
}

/// L2 has DR0 for itself.
fn debug_register(m: &mut Monitor) -> Result<Then, IcedError> {
    operand(m)?;
    m.a.mov(dr0, rax)?;
    m.a.mov(rbx, rax)?;
    m.say("loads DR0: ")?;
    m.say_hex(rbx)?;
    Ok(Then::Next)
}

fn xsetbv(m: &mut Monitor) -> Result<Then, IcedError> {
    m.a.mov(ecx, dword_ptr(rbp + RCX))?;
    m.a.mov(eax, dword_ptr(rbp + RAX))?;
    m.a.mov(edx, dword_ptr(rbp + RDX))?;
    m.a.xsetbv()?;
    m.say("sets state components: ")?;
    m.a.mov(eax, dword_ptr(rbp + RAX))?;
    m.a.call(m.hex)?;
    Ok(Then::Next)
}

/// A device of one byte, at every port.
fn port(m: &mut Monitor) -> Result<Then, IcedError> {
    let mut write = m.a.create_label();
    let mut done = m.a.create_label();
    m.a.test(r13d, 1 << 3)?; // IN
    m.a.jz(write)?;
    m.a.mov(al, byte_ptr(LATCH))?;
    m.a.mov(byte_ptr(rbp + RAX), al)?;
    m.say("gives the byte back: port ")?;
    m.a.jmp(done)?;
    m.a.set_label(&mut write)?;
    m.a.mov(al, byte_ptr(rbp + RAX))?;
    m.a.mov(byte_ptr(LATCH), al)?;
    m.say("keeps the byte as device: port ")?;
    m.a.set_label(&mut done)?;
    m.a.mov(rax, r13)?;
    m.a.shr(rax, 16)?;
    m.a.call(m.hex)?;
    Ok(Then::Next)
}

/// Gives L2 a page between 2 and 4 MiB.
fn ept_violation(m: &mut Monitor) -> Result<Then, IcedError> {
    m.read(F::GUEST_PHYSICAL_ADDRESS, rbx)?;
    m.a.mov(rdi, qword_ptr(FREE_PAGE))?;
    m.a.add(qword_ptr(FREE_PAGE), 0x1000)?;
    m.a.mov(rdx, rdi)?;
    m.a.xor(eax, eax)?;
    m.a.mov(ecx, 512)?;
    m.a.rep().stosq()?;
    m.a.or(rdx, 7 | 6 << 3)?; // all accesses, write-back
    m.a.mov(eax, ebx)?;
    m.a.shr(eax, 12)?;
    m.a.and(eax, 511)?;
    m.a.mov(qword_ptr(rax * 8 + EPT_HIGH), rdx)?;
    m.say("maps a page at ")?;
    m.say_hex(rbx)?;
    Ok(Then::Again)
}

fn invlpg(m: &mut Monitor) -> Result<Then, IcedError> {
    m.a.push(r13)?;
    m.a.push(1)?; // the VPID
    m.a.xor(eax, eax)?; // one address
    m.a.invvpid(rax, xmmword_ptr(rsp))?;
    m.a.add(rsp, 16)?;
    m.say("drops the translation (INVVPID)")?;
    Ok(Then::Next)
}

/// #UD, which has no error code.
fn exception(m: &mut Monitor) -> Result<Then, IcedError> {
    m.read(F::VM_EXIT_INTR_INFO, rbx)?;
    m.write(F::VM_ENTRY_INTR_INFO_FIELD, rbx)?;
    m.a.movzx(ebx, bl)?;
    m.say("injects it into L2: vector ")?;
    m.say_decimal(rbx)?;
    Ok(Then::Again)
}

fn vmcall(m: &mut Monitor) -> Result<Then, IcedError> {
    let mut print = m.a.create_label();
    let mut silent = m.a.create_label();
    let mut done = m.a.create_label();
    m.a.cmp(qword_ptr(rbp + RAX), CALL_PRINT)?;
    m.a.je(print)?;
    m.a.cmp(qword_ptr(rbp + RAX), CALL_TIMER)?;
    m.a.jne(silent)?;
    m.read(F::PIN_BASED_VM_EXEC_CONTROL, rbx)?;
    m.a.or(rbx, pin::ACTIVATE_VMX_PREEMPTION_TIMER as i32)?;
    m.write(F::PIN_BASED_VM_EXEC_CONTROL, rbx)?;
    m.a.mov(eax, TIMER)?;
    m.write(F::VMX_PREEMPTION_TIMER_VALUE, rax)?;
    m.say("starts the preemption timer")?;
    m.a.jmp(done)?;
    m.a.set_label(&mut print)?;
    m.say("L2 says: ")?;
    m.a.mov(rsi, saved(RSI))?;
    m.a.cmp(rsi, (L2_MEMORY_SIZE - 1) as i32)?;
    m.a.ja(silent)?;
    m.a.add(rsi, L2_MEMORY as i32)?;
    m.a.call(m.print)?;
    m.a.jmp(done)?;
    m.a.set_label(&mut silent)?;
    m.say("does not understand")?;
    m.a.set_label(&mut done)?;
    Ok(Then::Next)
}

/// L2 waits for RBX.
fn timer(m: &mut Monitor) -> Result<Then, IcedError> {
    m.read(F::PIN_BASED_VM_EXEC_CONTROL, rbx)?;
    m.a.and(rbx, !(pin::ACTIVATE_VMX_PREEMPTION_TIMER as i32))?;
    m.write(F::PIN_BASED_VM_EXEC_CONTROL, rbx)?;
    m.a.mov(saved(RBX), 1)?;
    m.say("ends L2's loop by changing RBX")?;
    Ok(Then::Again)
}

fn hlt(m: &mut Monitor) -> Result<Then, IcedError> {
    m.say("wakes it")?;
    Ok(Then::Next)
}

fn triple_fault(m: &mut Monitor) -> Result<Then, IcedError> {
    m.say("lets L2 go\r\n")?;
    Ok(Then::Ended)
}

/// How L1 ends.
pub fn ends(m: &mut Monitor) -> Result<(), IcedError> {
    let mut invalid = m.a.create_label();
    m.a.set_label(&mut m.failed)?;
    m.a.jc(invalid)?;
    m.say("A VMX instruction failed with error ")?;
    m.read(F::VM_INSTRUCTION_ERROR, rax)?;
    m.a.call(m.decimal)?;
    m.say("\r\n")?;
    m.a.jmp(m.off)?;
    m.a.set_label(&mut invalid)?;
    m.say("A VMX instruction failed without a current VMCS.\r\n")?;
    m.a.jmp(m.off)?;

    m.a.set_label(&mut m.finish)?;
    m.say("\r\n")?;
    m.a.xor(r12d, r12d)?; // kinds printed
    m.a.xor(r15d, r15d)?;
    m.say_decimal_at(TOTAL)?;
    m.say(" exits:")?;
    for (reason, name, _) in KINDS {
        let count = COUNTS + 8 * u32::from(reason.0);
        let mut none = m.a.create_label();
        let mut first = m.a.create_label();
        let mut fits = m.a.create_label();
        m.a.cmp(qword_ptr(count), 0)?;
        m.a.je(none)?;
        m.a.test(r12d, r12d)?;
        m.a.jz(first)?;
        m.say(",")?;
        m.a.set_label(&mut first)?;
        m.a.inc(r12d)?;
        m.a.cmp(r15, 62)?;
        m.a.jb(fits)?;
        m.say("\r\n  ")?;
        m.a.xor(r15d, r15d)?;
        m.a.set_label(&mut fits)?;
        m.say(" ")?;
        m.say_decimal_at(count)?;
        m.say(&format!(" {name}"))?;
        m.a.set_label(&mut none)?;
    }
    m.say(".\r\n")?;

    m.a.set_label(&mut m.off)?;
    m.a.mov(edx, PM1A_CONTROL)?;
    m.a.mov(eax, POWER_OFF)?;
    m.a.out(dx, ax)?;
    let mut stay = m.a.create_label();
    m.a.set_label(&mut stay)?;
    m.a.hlt()?;
    m.a.jmp(stay)
}

impl Monitor {
    /// Prints the number at an address in decimal.
    fn say_decimal_at(&mut self, address: u32) -> Result<(), IcedError> {
        self.a.mov(rax, qword_ptr(address))?;
        self.a.call(self.decimal)
    }
}
