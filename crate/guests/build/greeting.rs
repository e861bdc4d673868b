//! A guest that greets, counts primes and echoes what is typed, and sleeps when nobody types.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::elf::{self, CONTENT as DATA};

/// Interrupt descriptor table; only the serial port's vector is filled in.
const IDT: u32 = 0x11_0000;
const STACK: u32 = 0x18_0000;
/// Vector of IRQ 0 after the 8259 is programmed.
const IRQ_BASE: u32 = 0x20;
/// The serial port's IRQ.
const IRQ: u32 = 4;
const SERIAL: u32 = 0x3f8;
/// Primes are counted below this.
const LIMIT: u32 = 20_000;

/// The constants of the guest, each at a known address.
#[derive(Default)]
struct Data(Vec<u8>);

impl Data {
    fn put(&mut self, bytes: &[u8]) -> u32 {
        let address = DATA + self.0.len() as u32;
        self.0.extend(bytes);
        address
    }
}

pub fn guest() -> Result<Vec<u8>, IcedError> {
    let mut data = Data::default();
    let descriptors = [0u64, 0x00cf_9a00_0000_ffff, 0x00cf_9200_0000_ffff];
    let gdt = data.put(&descriptors.map(u64::to_le_bytes).concat());
    let gdt_pointer = data.put(&23u16.to_le_bytes());
    data.put(&gdt.to_le_bytes());
    let idt_pointer = data.put(&0x17fu16.to_le_bytes());
    data.put(&IDT.to_le_bytes());
    let hello =
        data.put(b"\r\nHello from a guest of a few hundred bytes.\r\nThe processor says it is \0");
    let vendor = data.put(&[0; 13]);
    let primes = data.put(b".\r\nIt has counted \0");
    let below = data.put(format!(" primes below {LIMIT}.\r\n\0").as_bytes());
    let invitation = data.put(b"\r\nType something: it comes back in capitals. Ctrl-D resets.\0");
    let prompt = data.put(b"\r\n> \0");
    let rub_out = data.put(b"\x08 \x08\0");

    let mut a = CodeAssembler::new(32)?;
    let mut print = a.create_label();
    let mut put = a.create_label();
    let mut print_number = a.create_label();

    // Own descriptor table: the loader's need not outlive the start.
    a.mov(esp, STACK)?;
    a.lgdt(ptr(gdt_pointer))?;
    a.mov(eax, 0x10)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    let mut reload = a.create_label();
    let mut start = a.create_label();
    a.call(reload)?;
    a.jmp(start)?;
    a.set_label(&mut reload)?;
    a.pop(eax)?;
    a.push(8)?;
    a.push(eax)?;
    a.retf()?; // CS too; to the jump
    a.set_label(&mut start)?;

    // The processor's name, and a little work.
    a.mov(esi, hello)?;
    a.call(print)?;
    a.xor(eax, eax)?;
    a.cpuid()?;
    a.mov(esi, vendor)?;
    a.mov(dword_ptr(esi), ebx)?;
    a.mov(dword_ptr(esi + 4), edx)?;
    a.mov(dword_ptr(esi + 8), ecx)?;
    a.call(print)?;
    a.mov(esi, primes)?;
    a.call(print)?;
    count_primes(&mut a)?;
    a.mov(eax, ebx)?;
    a.call(print_number)?;
    a.mov(esi, below)?;
    a.call(print)?;
    a.mov(esi, invitation)?;
    a.call(print)?;
    a.mov(esi, prompt)?;
    a.call(print)?;

    // Interrupts from the serial port alone. The call leaves the handler's address on the stack.
    let mut over = a.create_label();
    a.call(over)?;
    handler(&mut a, put, print, prompt, rub_out)?;
    a.set_label(&mut over)?;
    a.pop(eax)?;
    let gate = IDT + (IRQ_BASE + IRQ) * 8;
    a.mov(word_ptr(gate), ax)?;
    a.mov(word_ptr(gate + 2), 8)?;
    a.mov(word_ptr(gate + 4), 0x8e00)?;
    a.shr(eax, 16)?;
    a.mov(word_ptr(gate + 6), ax)?;
    a.lidt(ptr(idt_pointer))?;
    for (port, value) in [
        (0x20, 0x11), // initialise, cascaded
        (0x21, IRQ_BASE),
        (0x21, 1 << 2), // the second controller is on IRQ 2
        (0x21, 1),      // 8086 mode
        (0x21, !(1 << IRQ) & 0xff),
    ] {
        a.mov(eax, value)?;
        a.out(port, al)?;
    }
    for (register, value) in [(2, 1), (4, 8), (1, 1)] {
        // FIFOs on; OUT2 lets the interrupt through; received data interrupts
        a.mov(edx, SERIAL + register)?;
        a.mov(eax, value)?;
        a.out(dx, al)?;
    }
    a.sti()?;
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.hlt()?;
    a.jmp(wait)?;

    // print: the zero-terminated text at ESI
    let mut done = a.create_label();
    a.set_label(&mut print)?;
    a.lodsb()?;
    a.test(al, al)?;
    a.je(done)?;
    a.call(put)?;
    a.jmp(print)?;
    a.set_label(&mut done)?;
    a.ret()?;

    // put: the character in AL; keeps all but EDX
    a.set_label(&mut put)?;
    a.mov(edx, SERIAL)?;
    a.out(dx, al)?;
    a.ret()?;

    // print_number: EAX in decimal
    let mut last = a.create_label();
    a.set_label(&mut print_number)?;
    a.xor(edx, edx)?;
    a.mov(ecx, 10)?;
    a.div(ecx)?;
    a.push(edx)?;
    a.test(eax, eax)?;
    a.je(last)?;
    a.call(print_number)?;
    a.set_label(&mut last)?;
    a.pop(eax)?;
    a.add(eax, i32::from(b'0'))?;
    a.call(put)?;
    a.ret()?;

    let code = a.assemble(u64::from(DATA) + data.0.len() as u64)?;
    let entry = data.0.len() as u32;
    data.0.extend(code);
    Ok(elf::file(&data.0, entry))
}

/// EBX = the number of primes below [`LIMIT`], by trial division.
fn count_primes(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut candidate = a.create_label();
    let mut divisor = a.create_label();
    let mut prime = a.create_label();
    let mut next = a.create_label();
    a.mov(ebx, 1)?; // 2
    a.mov(edi, 3)?;
    a.set_label(&mut candidate)?;
    a.mov(ecx, 3)?;
    a.set_label(&mut divisor)?;
    a.mov(eax, ecx)?;
    a.mul(ecx)?;
    a.cmp(eax, edi)?;
    a.ja(prime)?;
    a.mov(eax, edi)?;
    a.xor(edx, edx)?;
    a.div(ecx)?;
    a.add(ecx, 2)?;
    a.test(edx, edx)?;
    a.jne(divisor)?;
    a.jmp(next)?;
    a.set_label(&mut prime)?;
    a.inc(ebx)?;
    a.set_label(&mut next)?;
    a.add(edi, 2)?;
    a.cmp(edi, LIMIT as i32)?;
    a.jb(candidate)?;
    Ok(())
}

/// The interrupt handler: takes what was received and answers it.
fn handler(
    a: &mut CodeAssembler,
    put: CodeLabel,
    print: CodeLabel,
    prompt: u32,
    rub_out: u32,
) -> Result<(), IcedError> {
    let mut take = a.create_label();
    let mut answer = a.create_label();
    let mut rub = a.create_label();
    let mut line = a.create_label();
    let mut not_end = a.create_label();
    let mut done = a.create_label();
    a.pushad()?;
    a.set_label(&mut take)?;
    a.mov(edx, SERIAL + 5)?;
    a.in_(al, dx)?;
    a.test(al, 1)?; // data ready
    a.je(done)?;
    a.mov(edx, SERIAL)?;
    a.in_(al, dx)?;
    a.cmp(al, 4)?; // Ctrl-D
    a.jne(not_end)?;
    a.mov(al, 0xfe)?; // pulse the keyboard controller's reset line
    a.out(0x64, al)?;
    a.set_label(&mut not_end)?;
    a.cmp(al, i32::from(b'\r'))?;
    a.je(line)?;
    a.cmp(al, 0x7f)?; // delete
    a.je(rub)?;
    a.cmp(al, i32::from(b'a'))?;
    a.jb(answer)?;
    a.cmp(al, i32::from(b'z'))?;
    a.ja(answer)?;
    a.sub(al, 0x20)?;
    a.set_label(&mut answer)?;
    a.call(put)?;
    a.jmp(take)?;
    a.set_label(&mut line)?;
    a.mov(esi, prompt)?;
    a.call(print)?;
    a.jmp(take)?;
    a.set_label(&mut rub)?;
    a.mov(esi, rub_out)?;
    a.call(print)?;
    a.jmp(take)?;
    a.set_label(&mut done)?;
    a.mov(al, 0x20)?; // end of interrupt
    a.out(0x20, al)?;
    a.popad()?;
    a.iretd()?;
    Ok(())
}
