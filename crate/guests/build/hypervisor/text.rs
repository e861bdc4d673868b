//! Printing on the serial port. R15 is the column.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::Monitor;

const COM1: u32 = 0x3f8;
const LINE_STATUS: u32 = COM1 + 5;
const TRANSMITTER_EMPTY: i32 = 0x20;

/// The texts of the program, which stand after its code.
#[derive(Default)]
pub struct Texts(Vec<(CodeLabel, Vec<u8>)>);

impl Monitor {
    /// Puts `bytes` and a zero into the program, at the label.
    pub fn text(&mut self, bytes: &[u8]) -> CodeLabel {
        let label = self.a.create_label();
        self.texts.0.push((label, [bytes, b"\0"].concat()));
        label
    }

    /// Prints `words`. Changes RAX and RSI.
    pub fn say(&mut self, words: &str) -> Result<(), IcedError> {
        let text = self.text(words.as_bytes());
        self.a.lea(rsi, ptr(text))?;
        self.a.call(self.print)
    }

    /// Prints `value` in hexadecimal. Changes RAX and RDX.
    pub fn say_hex(&mut self, value: AsmRegister64) -> Result<(), IcedError> {
        self.a.mov(rax, value)?;
        self.a.call(self.hex)
    }

    /// Prints `value` in decimal. Changes RAX, RCX and RDX.
    pub fn say_decimal(&mut self, value: AsmRegister64) -> Result<(), IcedError> {
        self.a.mov(rax, value)?;
        self.a.call(self.decimal)
    }

    /// Prints spaces up to a column. Changes RAX and RCX.
    pub fn tab(&mut self, column: u32) -> Result<(), IcedError> {
        self.a.mov(ecx, column)?;
        self.a.call(self.column)
    }
}

/// The routines, and the texts.
pub fn routines(m: &mut Monitor) -> Result<(), IcedError> {
    let Monitor { a, texts, .. } = m;
    let mut put = a.create_label();

    // put: the character in AL.
    let mut wait = a.create_label();
    a.set_label(&mut put)?;
    a.push(rdx)?;
    a.push(rax)?;
    a.mov(edx, LINE_STATUS)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, TRANSMITTER_EMPTY)?;
    a.jz(wait)?;
    a.mov(edx, COM1)?;
    a.pop(rax)?;
    a.out(dx, al)?;
    a.inc(r15)?;
    a.pop(rdx)?;
    a.ret()?;

    // print
    let mut printed = a.create_label();
    a.set_label(&mut m.print)?;
    a.lodsb()?;
    a.test(al, al)?;
    a.jz(printed)?;
    a.call(put)?;
    a.jmp(m.print)?;
    a.set_label(&mut printed)?;
    a.ret()?;

    // hex: the higher digits first, by calling itself.
    let mut digit = a.create_label();
    let mut decimal_digit = a.create_label();
    a.set_label(&mut m.hex)?;
    a.mov(edx, eax)?;
    a.and(edx, 15)?;
    a.shr(rax, 4)?;
    a.jz(digit)?;
    a.push(rdx)?;
    a.call(m.hex)?;
    a.pop(rdx)?;
    a.set_label(&mut digit)?;
    a.lea(eax, dword_ptr(rdx + i32::from(b'0')))?;
    a.cmp(al, i32::from(b'9'))?;
    a.jbe(decimal_digit)?;
    a.add(al, i32::from(b'a' - b'9' - 1))?;
    a.set_label(&mut decimal_digit)?;
    a.call(put)?;
    a.ret()?;

    // decimal: likewise.
    let mut last = a.create_label();
    a.set_label(&mut m.decimal)?;
    a.xor(edx, edx)?;
    a.mov(ecx, 10)?;
    a.div(rcx)?;
    a.test(rax, rax)?;
    a.jz(last)?;
    a.push(rdx)?;
    a.call(m.decimal)?;
    a.pop(rdx)?;
    a.set_label(&mut last)?;
    a.lea(eax, dword_ptr(rdx + i32::from(b'0')))?;
    a.call(put)?;
    a.ret()?;

    // column
    a.set_label(&mut m.column)?;
    a.mov(al, i32::from(b' '))?;
    a.call(put)?;
    a.cmp(r15, rcx)?;
    a.jb(m.column)?;
    a.ret()?;

    for (label, bytes) in &mut texts.0 {
        a.set_label(label)?;
        a.db(bytes)?;
    }
    Ok(())
}
