//! The built-in guest: assembled here, started in real mode as a boot sector would be.
//!
//! It greets from 16-bit, 32-bit and 64-bit code, maps memory on a page fault, counts primes under
//! a timer interrupt, and switches itself off.

use anyhow::Result;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where the raw image is loaded; real-mode code starts here.
const REAL: u64 = 0x7c00;
/// Descriptor table and texts of the 16-bit and 32-bit code.
const TEXTS: u64 = 0x7e00;
const PROTECTED: u64 = 0x8000;
const LONG: u64 = 0x8400;
const STACK: u32 = 0x7c00;
const TABLES: u32 = 0x10_0000;
const PML4: u32 = TABLES;
const PDPT: u32 = TABLES + 0x1000;
const LOW_DIRECTORY: u32 = TABLES + 0x2000;
const HIGH_DIRECTORY: u32 = TABLES + 0x3000;
const FAULT_DIRECTORY: u32 = TABLES + 0x4000;
const IDT: u32 = TABLES + 0x5000;
const SIEVE: u64 = 0x20_0000;

/// Linear address that is mapped when it is first touched.
const FAULT_ADDRESS: u64 = 0x4000_0000;
/// Primes below this are counted.
pub const LIMIT: u32 = 2_000_000;
/// How often they are counted.
pub const ROUNDS: u32 = 8;

const COM1: u32 = 0x3f8;
const LINE_STATUS: u32 = COM1 + 5;
const TRANSMITTER_EMPTY: u32 = 0x20;
const PM1A_CONTROL: u32 = 0x604;
/// Sleep enable, sleep type 5.
const POWER_OFF: u32 = 1 << 13 | 5 << 10;

const LOCAL_APIC: u64 = 0xfee0_0000;
const TIMER_VECTOR: u32 = 0x20;
const TIMER_PERIOD: u32 = 10_000_000;

const CODE_32: u16 = 0x08;
const DATA: u16 = 0x10;
const CODE_64: u16 = 0x18;

/// Guest memory for it, in bytes.
pub const MEMORY: u64 = 16 << 20;

/// The image.
pub fn image() -> Result<Vec<u8>> {
    assemble().map_err(|error| anyhow::anyhow!("the built-in guest: {error}"))
}

fn assemble() -> Result<Vec<u8>, IcedError> {
    let texts = Texts::new();
    let mut image = real(&texts)?;
    let (protected, long) = (protected(&texts)?, long()?);
    for (at, part) in [(TEXTS, texts.bytes), (PROTECTED, protected), (LONG, long)] {
        let at = (at - REAL) as usize;
        debug_assert!(image.len() <= at, "the parts overlap");
        image.resize(at, 0);
        image.extend(part);
    }
    Ok(image)
}

/// What stands at [`TEXTS`], and where in it: 16-bit and 32-bit code has no labels for data.
struct Texts {
    bytes: Vec<u8>,
    pointer: u32,
    hello_16: u32,
    hello_32: u32,
}

impl Texts {
    fn new() -> Texts {
        let mut bytes = Vec::new();
        let mut put = |part: &[u8]| {
            let address = TEXTS as u32 + bytes.len() as u32;
            bytes.extend(part);
            address
        };
        let null = put(&0u64.to_le_bytes());
        put(&0x00cf_9b00_0000_ffff_u64.to_le_bytes());
        put(&0x00cf_9300_0000_ffff_u64.to_le_bytes());
        put(&0x00af_9b00_0000_ffff_u64.to_le_bytes());
        let pointer = put(&(4 * 8 - 1u16).to_le_bytes());
        put(&null.to_le_bytes());
        let hello_16 = put(b"16-bit real mode: hello from the first instruction on\r\n\0");
        let hello_32 = put(b"32-bit protected mode: building page tables for 64-bit mode\r\n\0");
        Texts {
            bytes,
            pointer,
            hello_16,
            hello_32,
        }
    }
}

fn real(texts: &Texts) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let mut next = a.create_label();
    let mut wait = a.create_label();
    let mut done = a.create_label();

    a.cli()?;
    a.cld()?;
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(ss, ax)?;
    a.mov(sp, STACK)?;
    a.mov(si, texts.hello_16)?;
    a.set_label(&mut next)?;
    a.lodsb()?;
    a.test(al, al)?;
    a.jz(done)?;
    a.mov(bl, al)?;
    a.mov(dx, LINE_STATUS)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, TRANSMITTER_EMPTY)?;
    a.jz(wait)?;
    a.mov(dx, COM1)?;
    a.mov(al, bl)?;
    a.out(dx, al)?;
    a.jmp(next)?;
    a.set_label(&mut done)?;
    a.lgdt(ptr(texts.pointer))?;
    a.mov(eax, cr0)?;
    a.or(al, 1)?;
    a.mov(cr0, eax)?;
    // A far jump with a 32-bit offset: JMP ptr16:32.
    a.db(&[0x66, 0xea])?;
    a.db(&far(PROTECTED, CODE_32))?;
    a.assemble(REAL)
}

fn far(offset: u64, selector: u16) -> [u8; 6] {
    let [a, b, c, d] = (offset as u32).to_le_bytes();
    let [low, high] = selector.to_le_bytes();
    [a, b, c, d, low, high]
}

/// The subroutine `print` of 32-bit and 64-bit code: sends the text at ESI or RSI to the serial
/// line. Changes EAX, EDX and `hold`.
fn print_text(
    a: &mut CodeAssembler,
    print: &mut CodeLabel,
    hold: AsmRegister32,
) -> Result<(), IcedError> {
    a.set_label(print)?;
    let mut wait = a.create_label();
    let mut done = a.create_label();
    a.lodsb()?;
    a.test(al, al)?;
    a.jz(done)?;
    a.mov(hold, eax)?;
    a.mov(edx, LINE_STATUS)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, TRANSMITTER_EMPTY)?;
    a.jz(wait)?;
    a.mov(edx, COM1)?;
    a.mov(eax, hold)?;
    a.out(dx, al)?;
    a.jmp(*print)?;
    a.set_label(&mut done)?;
    a.ret()
}

fn protected(texts: &Texts) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let mut print = a.create_label();

    a.mov(eax, u32::from(DATA))?;
    for segment in [ds, es, fs, gs, ss] {
        a.mov(segment, ax)?;
    }
    a.mov(esp, STACK)?;
    a.mov(esi, texts.hello_32)?;
    a.call(print)?;

    a.xor(eax, eax)?;
    a.mov(edi, TABLES)?;
    a.mov(ecx, 0x6000 / 4)?;
    a.rep().stosd()?;
    a.mov(dword_ptr(PML4), PDPT | 3)?;
    a.mov(dword_ptr(PDPT), LOW_DIRECTORY | 3)?;
    a.mov(dword_ptr(PDPT + 8), FAULT_DIRECTORY | 3)?;
    a.mov(dword_ptr(PDPT + 3 * 8), HIGH_DIRECTORY | 3)?;
    // 16 MiB of RAM, and the local APIC uncached: pages of 2 MiB.
    for page in 0..8 {
        a.mov(dword_ptr(LOW_DIRECTORY + 8 * page), page << 21 | 0x83)?;
    }
    let apic = LOCAL_APIC as u32;
    a.mov(
        dword_ptr(HIGH_DIRECTORY + 8 * (apic >> 21 & 0x1ff)),
        apic | 0x93,
    )?;

    a.mov(eax, cr4)?;
    a.or(eax, 1 << 5)?; // PAE
    a.mov(cr4, eax)?;
    a.mov(eax, PML4)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, 0xc000_0080u32)?; // IA32_EFER
    a.rdmsr()?;
    a.or(eax, 1 << 8)?; // LME
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.or(eax, 0x8001_0000u32)?; // PG, WP
    a.mov(cr0, eax)?;
    a.db(&[0xea])?;
    a.db(&far(LONG, CODE_64))?;

    print_text(&mut a, &mut print, ebx)?;
    a.assemble(PROTECTED)
}

fn long() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut print = a.create_label();
    let mut print_number = a.create_label();
    let mut on_timer = a.create_label();
    let mut on_page_fault = a.create_label();
    let mut texts = Vec::new();
    let mut text = |a: &mut CodeAssembler, words: &'static str| {
        let label = a.create_label();
        texts.push((label, words));
        label
    };

    let hello = text(&mut a, "64-bit mode: paging is on\r\n");
    a.lea(rsi, ptr(hello))?;
    a.call(print)?;

    // Gates for the page fault and the timer.
    for (vector, handler) in [(14, on_page_fault), (TIMER_VECTOR, on_timer)] {
        let gate = u64::from(IDT + 16 * vector);
        a.lea(rax, ptr(handler))?;
        a.mov(rdi, gate)?;
        a.mov(word_ptr(rdi), ax)?;
        a.mov(word_ptr(rdi + 2), u32::from(CODE_64))?;
        a.mov(word_ptr(rdi + 4), 0x8e00)?;
        a.shr(rax, 16)?;
        a.mov(word_ptr(rdi + 6), ax)?;
    }
    a.sub(rsp, 16)?;
    a.mov(word_ptr(rsp), 0xfff)?;
    a.mov(rax, u64::from(IDT))?;
    a.mov(qword_ptr(rsp + 2), rax)?;
    a.lidt(ptr(rsp))?;
    a.add(rsp, 16)?;

    // Touch what is not mapped.
    a.xor(r12, r12)?;
    a.mov(rdi, FAULT_ADDRESS)?;
    a.mov(eax, 0x600d_f00du32)?;
    a.mov(dword_ptr(rdi), eax)?;
    let (faults, retried) = (
        text(&mut a, "page faults taken, mapped and retried: "),
        text(&mut a, "primes below "),
    );
    a.lea(rsi, ptr(faults))?;
    a.call(print)?;
    a.mov(rax, r12)?;
    a.call(print_number)?;

    // The timer: periodic, not divided.
    a.xor(r13, r13)?;
    a.mov(rbx, LOCAL_APIC)?;
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
    a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
    a.mov(dword_ptr(rbx + 0x320), 1 << 17 | TIMER_VECTOR)?;
    a.mov(dword_ptr(rbx + 0x380), TIMER_PERIOD)?;
    a.sti()?;

    // Work: the sieve of Eratosthenes, several times over.
    let mut round = a.create_label();
    a.mov(r15d, ROUNDS)?;
    a.set_label(&mut round)?;
    sieve(&mut a)?;
    a.dec(r15d)?;
    a.jnz(round)?;

    // At least one interrupt wakes a sleeping processor.
    a.hlt()?;
    a.cli()?;
    a.mov(dword_ptr(rbx + 0x380), 0)?;

    let (is, ticks) = (
        text(&mut a, "timer interrupts meanwhile: "),
        text(&mut a, "switching off\r\n"),
    );
    let equals = text(&mut a, "  counted: ");
    a.lea(rsi, ptr(retried))?;
    a.call(print)?;
    a.mov(rax, u64::from(LIMIT))?;
    a.call(print_number)?;
    a.lea(rsi, ptr(equals))?;
    a.call(print)?;
    a.mov(rax, r14)?;
    a.call(print_number)?;
    a.lea(rsi, ptr(is))?;
    a.call(print)?;
    a.mov(rax, r13)?;
    a.call(print_number)?;
    a.lea(rsi, ptr(ticks))?;
    a.call(print)?;
    a.mov(edx, PM1A_CONTROL)?;
    a.mov(eax, POWER_OFF)?;
    a.out(dx, ax)?;
    let mut stay = a.create_label();
    a.set_label(&mut stay)?;
    a.hlt()?;
    a.jmp(stay)?;

    // Print RAX in decimal, and end the line.
    a.set_label(&mut print_number)?;
    let mut digit = a.create_label();
    a.sub(rsp, 32)?;
    a.lea(rsi, ptr(rsp + 28))?;
    a.mov(dword_ptr(rsi), 0x0a0d)?;
    a.mov(ecx, 10)?;
    a.set_label(&mut digit)?;
    a.xor(edx, edx)?;
    a.div(rcx)?;
    a.add(dl, i32::from(b'0'))?;
    a.dec(rsi)?;
    a.mov(byte_ptr(rsi), dl)?;
    a.test(rax, rax)?;
    a.jnz(digit)?;
    a.call(print)?;
    a.add(rsp, 32)?;
    a.ret()?;

    print_text(&mut a, &mut print, ecx)?;

    a.set_label(&mut on_timer)?;
    a.inc(r13)?;
    a.mov(dword_ptr(rbx + 0xb0), 0)?; // end of interrupt
    a.iretq()?;

    // Maps the page and lets the access happen again.
    a.set_label(&mut on_page_fault)?;
    a.push(rax)?;
    a.inc(r12)?;
    a.mov(eax, FAULT_DIRECTORY)?;
    a.mov(dword_ptr(rax), 0x60_0083)?;
    a.pop(rax)?;
    a.add(rsp, 8)?; // the error code
    a.iretq()?;

    for (mut label, words) in texts {
        a.set_label(&mut label)?;
        a.db(words.as_bytes())?;
        a.db(&[0])?;
    }
    a.assemble(LONG)
}

/// Counts the primes below [`LIMIT`] into R14. Leaves RBX, R12, R13 and R15 alone.
fn sieve(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut candidate = a.create_label();
    let mut strike = a.create_label();
    let mut struck = a.create_label();
    a.mov(edi, SIEVE as u32)?;
    a.mov(ecx, LIMIT / 8)?;
    a.xor(eax, eax)?;
    a.rep().stosq()?;
    a.mov(rsi, SIEVE)?;
    a.xor(r14d, r14d)?;
    a.mov(ecx, 2)?;
    a.set_label(&mut candidate)?;
    a.cmp(byte_ptr(rsi + rcx), 0)?;
    a.jne(struck)?;
    a.inc(r14)?;
    a.mov(rdx, rcx)?;
    a.imul_2(rdx, rcx)?;
    a.set_label(&mut strike)?;
    a.cmp(rdx, LIMIT as i32)?;
    a.jae(struck)?;
    a.mov(byte_ptr(rsi + rdx), 1)?;
    a.add(rdx, rcx)?;
    a.jmp(strike)?;
    a.set_label(&mut struck)?;
    a.inc(rcx)?;
    a.cmp(rcx, LIMIT as i32)?;
    a.jb(candidate)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_assembles_and_its_parts_keep_to_their_places() {
        let image = image().unwrap();
        assert_eq!(image[0], 0xfa);
        assert!(image.len() as u64 > LONG - REAL);
        assert!(REAL + (image.len() as u64) < 0x9_0000);
        assert!(real(&Texts::new()).unwrap().len() as u64 <= TEXTS - REAL);
        assert!(Texts::new().bytes.len() as u64 <= PROTECTED - TEXTS);
        assert!(protected(&Texts::new()).unwrap().len() as u64 <= LONG - PROTECTED);
    }
}
