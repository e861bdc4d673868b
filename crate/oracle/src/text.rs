//! Cases as one line of text, for case files and for reports:
//!
//! ```text
//! [04 01] add al,1 : al=ff => al=00 cf=1 zf=1 af=1 pf=1
//! ```
//!
//! The bytes, the disassembly (for the reader alone), the inputs, the outputs. Inputs not given are
//! those of [`UserState::new`] and zero memory; outputs not given are *unchanged*, but for RIP, which
//! is after the instruction or, at a fault, on it. Numbers are hexadecimal. Names: every general
//! register of any width, `rip`, flags (`cf` `pf` `af` `zf` `sf` `df` `of` `nt` `ac`), `es`..`gs`, `fs_base`, `gs_base`, `fcw`,
//! `fsw`, `ftw` (one bit per register), `fop`, `fip`, `fdp`, `st0`..`st7` (20 digits), `mxcsr`,
//! `xmm0`..`xmm15`, `[address]=bytes` in memory order, `mode=32`. Output `af=?` is undefined.
//! A fault is written `#GP`, `#PF(address)`.

use hypernest_cpu::FpuState;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use crate::case::{Case, Event, FLAGS, Mode, Outcome, Patch, UserState, initial_memory};
use crate::layout::{IMAGE, IMAGE_DATA, image_address, image_offset};

const GPR64: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const GPR32: [&str; 8] = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"];
const GPR16: [&str; 8] = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"];
const GPR8: [&str; 8] = ["al", "cl", "dl", "bl", "ah", "ch", "dh", "bh"];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
const FAULTS: [(&str, u8); 13] = [
    ("#DE", 0),
    ("#DB", 1),
    ("#BP", 3),
    ("#OF", 4),
    ("#BR", 5),
    ("#UD", 6),
    ("#NM", 7),
    ("#NP", 11),
    ("#SS", 12),
    ("#GP", 13),
    ("#MF", 16),
    ("#AC", 17),
    ("#XM", 19),
];

/// A case with the outcome it must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// What to execute.
    pub case: Case,
    /// What must come of it.
    pub outcome: Outcome,
    /// Data part of the memory image afterwards.
    pub memory: Vec<u8>,
    /// Flags the SDM leaves undefined here.
    pub undefined_flags: u64,
}

/// A line that is no case.
#[derive(Debug, thiserror::Error)]
#[error("`{token}`: {what}")]
pub struct ParseError {
    token: String,
    what: &'static str,
}

fn error(token: &str, what: &'static str) -> ParseError {
    ParseError {
        token: token.to_owned(),
        what,
    }
}

/// A register of the state, or some bits of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    /// Number, lowest bit, width.
    Gpr(usize, u32, u32),
    Rip,
    Flag(u32),
    Selector(usize),
    FsBase,
    GsBase,
    Control,
    Status,
    Tag,
    Opcode,
    Instruction,
    Operand,
    St(usize),
    Mxcsr,
    Xmm(usize),
}

impl Field {
    fn parse(name: &str) -> Option<Field> {
        let at = |list: &[&str]| list.iter().position(|n| *n == name);
        let number = |prefix: &str| -> Option<usize> { name.strip_prefix(prefix)?.parse().ok() };
        if let Some(n) = at(&GPR64) {
            return Some(Field::Gpr(n, 0, 64));
        }
        if let Some(n) = at(&GPR32) {
            return Some(Field::Gpr(n, 0, 32));
        }
        if let Some(n) = at(&GPR16) {
            return Some(Field::Gpr(n, 0, 16));
        }
        if let Some(n) = at(&GPR8) {
            return Some(Field::Gpr(n & 3, (n as u32 >> 2) * 8, 8));
        }
        if let Some((_, bit)) = FLAGS.iter().find(|(flag, _)| *flag == name) {
            return Some(Field::Flag(*bit));
        }
        if let Some(n) = at(&SEGMENTS) {
            return Some(Field::Selector(n));
        }
        Some(match name {
            "rip" => Field::Rip,
            "fs_base" => Field::FsBase,
            "gs_base" => Field::GsBase,
            "fcw" => Field::Control,
            "fsw" => Field::Status,
            "ftw" => Field::Tag,
            "fop" => Field::Opcode,
            "fip" => Field::Instruction,
            "fdp" => Field::Operand,
            "mxcsr" => Field::Mxcsr,
            _ => {
                if let Some(n @ 0..8) = number("st") {
                    Field::St(n)
                } else {
                    let n @ 0..16 = number("xmm")? else {
                        return None;
                    };
                    Field::Xmm(n)
                }
            }
        })
    }

    fn name(self) -> String {
        match self {
            Field::Gpr(n, ..) => GPR64[n].into(),
            Field::Rip => "rip".into(),
            Field::Flag(bit) => {
                let named = FLAGS.iter().find(|(_, b)| *b == bit);
                named.map_or_else(|| format!("flag{bit}"), |(name, _)| (*name).into())
            }
            Field::Selector(n) => SEGMENTS[n].into(),
            Field::FsBase => "fs_base".into(),
            Field::GsBase => "gs_base".into(),
            Field::Control => "fcw".into(),
            Field::Status => "fsw".into(),
            Field::Tag => "ftw".into(),
            Field::Opcode => "fop".into(),
            Field::Instruction => "fip".into(),
            Field::Operand => "fdp".into(),
            Field::St(n) => format!("st{n}"),
            Field::Mxcsr => "mxcsr".into(),
            Field::Xmm(n) => format!("xmm{n}"),
        }
    }

    fn get(self, state: &UserState) -> u128 {
        let fpu = &state.fpu;
        match self {
            Field::Gpr(n, low, width) => {
                ((state.gpr[n] >> low) & (u64::MAX >> (64 - width))).into()
            }
            Field::Rip => state.rip.into(),
            Field::Flag(bit) => (state.rflags >> bit & 1).into(),
            Field::Selector(n) => state.selectors[n].into(),
            Field::FsBase => state.fs_base.into(),
            Field::GsBase => state.gs_base.into(),
            Field::Control => fpu.control.into(),
            Field::Status => fpu.status.into(),
            Field::Tag => fpu.tag.into(),
            Field::Opcode => fpu.opcode.into(),
            Field::Instruction => fpu.instruction.into(),
            Field::Operand => fpu.operand.into(),
            Field::St(n) => {
                let mut wide = [0; 16];
                wide[..10].copy_from_slice(&fpu.st[n]);
                u128::from_le_bytes(wide)
            }
            Field::Mxcsr => fpu.mxcsr.into(),
            Field::Xmm(n) => fpu.xmm[n],
        }
    }

    fn set(self, state: &mut UserState, value: u128) {
        let fpu: &mut FpuState = &mut state.fpu;
        match self {
            Field::Gpr(n, low, width) => {
                let mask = (u64::MAX >> (64 - width)) << low;
                state.gpr[n] = state.gpr[n] & !mask | ((value as u64) << low) & mask;
            }
            Field::Rip => state.rip = value as u64,
            Field::Flag(bit) => {
                state.rflags = state.rflags & !(1 << bit) | (value as u64 & 1) << bit;
            }
            Field::Selector(n) => state.selectors[n] = value as u16,
            Field::FsBase => state.fs_base = value as u64,
            Field::GsBase => state.gs_base = value as u64,
            Field::Control => fpu.control = value as u16,
            Field::Status => fpu.status = value as u16,
            Field::Tag => fpu.tag = value as u8,
            Field::Opcode => fpu.opcode = value as u16,
            Field::Instruction => fpu.instruction = value as u64,
            Field::Operand => fpu.operand = value as u64,
            Field::St(n) => fpu.st[n].copy_from_slice(&value.to_le_bytes()[..10]),
            Field::Mxcsr => fpu.mxcsr = value as u32,
            Field::Xmm(n) => fpu.xmm[n] = value,
        }
    }

    /// All fields whole, in printing order.
    fn all() -> impl Iterator<Item = Field> {
        (0..16)
            .map(|n| Field::Gpr(n, 0, 64))
            .chain([Field::Rip])
            .chain((0..64).map(Field::Flag))
            .chain((0..6).map(Field::Selector))
            .chain([
                Field::FsBase,
                Field::GsBase,
                Field::Control,
                Field::Status,
                Field::Tag,
                Field::Opcode,
                Field::Instruction,
                Field::Operand,
            ])
            .chain((0..8).map(Field::St))
            .chain([Field::Mxcsr])
            .chain((0..16).map(Field::Xmm))
    }
}

/// Parses one line.
pub fn parse(line: &str) -> Result<Expected, ParseError> {
    let rest = line
        .trim()
        .strip_prefix('[')
        .ok_or_else(|| error(line, "a case starts with [bytes]"))?;
    let (bytes, rest) = rest
        .split_once(']')
        .ok_or_else(|| error(line, "no ] after the bytes"))?;
    let code = bytes
        .split_whitespace()
        .map(|b| u8::from_str_radix(b, 16).map_err(|_| error(b, "not a hexadecimal byte")))
        .collect::<Result<Vec<u8>, _>>()?;
    // The disassembly may hold a colon ("fs:[rax]") but not one between spaces.
    let (_, values) = format!("{rest} ")
        .split_once(" : ")
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .ok_or_else(|| error(line, "no ` : ` before the inputs"))?;
    let (inputs, outputs) = match format!(" {values}").split_once(" => ") {
        Some((a, b)) => (a.to_owned(), b.to_owned()),
        None => return Err(error(line, "no ` => ` before the outputs")),
    };

    let mode = if inputs.split_whitespace().any(|token| token == "mode=32") {
        Mode::Compat
    } else {
        Mode::Long
    };
    let mut case = Case {
        mode,
        code,
        state: UserState::new(mode),
        memory: Vec::new(),
    };
    for token in inputs.split_whitespace() {
        if token.starts_with("mode=") {
            continue;
        }
        let (name, value) = split(token)?;
        if let Some(address) = name.strip_prefix('[') {
            case.memory.push(parse_patch(token, address, value)?);
        } else {
            set(&mut case.state, token, name, value)?;
        }
    }

    let mut memory = vec![0; IMAGE - IMAGE_DATA];
    initial_memory(&case, &mut memory);
    let mut outcome = Outcome {
        event: Event::Done,
        state: case.state.clone(),
    };
    let mut undefined_flags = 0;
    let next = case.state.rip.wrapping_add(case.code.len() as u64);
    outcome.state.rip = next;
    for token in outputs.split_whitespace() {
        if token.starts_with('#') {
            outcome.event = parse_fault(token)?;
            if !matches!(outcome.event, Event::Fault { vector: 3 | 4, .. }) {
                outcome.state.rip = case.state.rip;
            }
            continue;
        }
        let (name, value) = split(token)?;
        if let Some(address) = name.strip_prefix('[') {
            let patch = parse_patch(token, address, value)?;
            for (i, byte) in patch.bytes.iter().enumerate() {
                let offset = image_offset(patch.address + i as u64)
                    .and_then(|o| o.checked_sub(IMAGE_DATA))
                    .ok_or_else(|| error(token, "no data memory there"))?;
                memory[offset] = *byte;
            }
        } else if value == "?" {
            let Some(Field::Flag(bit)) = Field::parse(name) else {
                return Err(error(token, "only flags can be undefined"));
            };
            undefined_flags |= 1 << bit;
        } else {
            set(&mut outcome.state, token, name, value)?;
        }
    }
    Ok(Expected {
        case,
        outcome,
        memory,
        undefined_flags,
    })
}

fn split(token: &str) -> Result<(&str, &str), ParseError> {
    token
        .split_once('=')
        .ok_or_else(|| error(token, "not name=value"))
}

fn set(state: &mut UserState, token: &str, name: &str, value: &str) -> Result<(), ParseError> {
    let field = Field::parse(name).ok_or_else(|| error(token, "unknown name"))?;
    let value =
        u128::from_str_radix(value, 16).map_err(|_| error(token, "not a hexadecimal number"))?;
    field.set(state, value);
    Ok(())
}

fn parse_patch(token: &str, address: &str, value: &str) -> Result<Patch, ParseError> {
    let address = address
        .strip_suffix(']')
        .and_then(|a| u64::from_str_radix(a, 16).ok())
        .ok_or_else(|| error(token, "not [address]=bytes"))?;
    if !value.len().is_multiple_of(2) || !value.is_ascii() {
        return Err(error(token, "an odd number of digits"));
    }
    let bytes = (0..value.len() / 2)
        .map(|i| u8::from_str_radix(&value[2 * i..2 * i + 2], 16))
        .collect::<Result<Vec<u8>, _>>()
        .map_err(|_| error(token, "not hexadecimal bytes"))?;
    Ok(Patch { address, bytes })
}

fn parse_fault(token: &str) -> Result<Event, ParseError> {
    if let Some(address) = token.strip_prefix("#PF(") {
        let address = address
            .strip_suffix(')')
            .and_then(|a| u64::from_str_radix(a, 16).ok())
            .ok_or_else(|| error(token, "not #PF(address)"))?;
        return Ok(Event::Fault {
            vector: 14,
            address: Some(address),
        });
    }
    let (_, vector) = FAULTS
        .iter()
        .find(|(name, _)| *name == token)
        .ok_or_else(|| error(token, "unknown exception"))?;
    Ok(Event::Fault {
        vector: *vector,
        address: None,
    })
}

/// The disassembly of a case's instruction.
pub fn disassembly(case: &Case) -> String {
    let mut text = String::new();
    let options = DecoderOptions::NONE;
    let ip = case.state.rip;
    let instruction = Decoder::with_ip(case.mode.bits(), &case.code, ip, options).decode();
    IntelFormatter::new().format(&instruction, &mut text);
    text
}

/// Prints a case on one line. With an outcome and the memory image's data part after it, also what
/// changed.
pub fn print(case: &Case, outcome: Option<&Outcome>, memory: &[u8]) -> String {
    let bytes: Vec<String> = case.code.iter().map(|b| format!("{b:02x}")).collect();
    let mut line = format!("[{}] {} :", bytes.join(" "), disassembly(case));
    if case.mode == Mode::Compat {
        line += " mode=32";
    }
    line += &changes(&UserState::new(case.mode), &case.state);
    for patch in &case.memory {
        line += &format!(" [{:x}]={}", patch.address, hex(&patch.bytes));
    }
    if let Some(outcome) = outcome {
        line += " =>";
        line += &print_outcome(case, outcome, memory);
    }
    line
}

/// Prints what an outcome changes, as after `=>`.
pub fn print_outcome(case: &Case, outcome: &Outcome, memory: &[u8]) -> String {
    let mut line = String::new();
    let mut before = case.state.clone();
    match outcome.event {
        Event::Done => before.rip = before.rip.wrapping_add(case.code.len() as u64),
        Event::Unimplemented(what) => line += &format!(" Unimplemented({what})"),
        Event::Fault {
            address: Some(address),
            ..
        } => line += &format!(" #PF({address:x})"),
        Event::Fault { vector, .. } => {
            if matches!(vector, 3 | 4) {
                before.rip = before.rip.wrapping_add(case.code.len() as u64);
            }
            let name = FAULTS.iter().find(|(_, v)| *v == vector);
            let name = name.map_or_else(|| format!("#{vector}"), |(n, _)| (*n).into());
            line += &format!(" {name}");
        }
    }
    line += &changes(&before, &outcome.state);
    let mut image = vec![0; IMAGE - IMAGE_DATA];
    initial_memory(case, &mut image);
    let mut i = 0;
    while i < memory.len().min(image.len()) {
        if memory[i] == image[i] {
            i += 1;
            continue;
        }
        let run = (i..memory.len().min(image.len()))
            .take_while(|&j| {
                memory[j] != image[j]
                    && image_address(IMAGE_DATA + j) - image_address(IMAGE_DATA + i)
                        == (j - i) as u64
            })
            .count();
        let address = image_address(IMAGE_DATA + i);
        line += &format!(" [{address:x}]={}", hex(&memory[i..i + run]));
        i += run;
    }
    line
}

fn changes(before: &UserState, after: &UserState) -> String {
    let mut text = String::new();
    for field in Field::all() {
        let (old, new) = (field.get(before), field.get(after));
        if old != new {
            let name = field.name();
            text += &match field {
                Field::St(_) => format!(" {name}={new:020x}"),
                Field::Xmm(_) => format!(" {name}={new:032x}"),
                _ => format!(" {name}={new:x}"),
            };
        }
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_parses_and_prints_back() {
        let line =
            "[00 03] add [rbx],al : rax=ff rbx=200010 cf=1 [200010]=0201 => pf=1 af=1 [200010]=01";
        let expected = parse(line).unwrap();
        assert_eq!(expected.case.state.gpr[3], 0x20_0010);
        assert_eq!(expected.outcome.state.rip, expected.case.state.rip + 2);
        let printed = print(&expected.case, Some(&expected.outcome), &expected.memory);
        assert_eq!(printed, line);
        assert_eq!(parse(&printed).unwrap(), expected);
    }

    #[test]
    fn parts_of_registers_faults_and_undefined_flags_parse() {
        let e =
            parse("[f6 f3] div bl : mode=32 ah=1 st7=3fff8000000000000000 => #DE af=?").unwrap();
        assert_eq!(e.case.mode, Mode::Compat);
        assert_eq!(e.case.state.gpr[0], 0x100);
        assert_eq!(e.case.state.fpu.st[7][9], 0x3f);
        assert_eq!(e.outcome.state.rip, e.case.state.rip);
        assert_eq!(e.undefined_flags, 0x10);
        let e = parse("[a1 0 0 0 0] mov eax,[0] : mode=32 => #PF(0)").unwrap();
        let address = Some(0);
        assert_eq!(
            e.outcome.event,
            Event::Fault {
                vector: 14,
                address
            }
        );
    }

    #[test]
    fn wrong_lines_are_refused() {
        for line in [
            "",
            "[zz] x : =>",
            "[90] nop",
            "[90] nop : foo=1 =>",
            "[90] nop : => #XX",
            "[90] nop : [200000]=1 =>",
            "[90] nop : => [100000]=11",
            "[90] nop : => rax=?",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
