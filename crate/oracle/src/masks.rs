//! What may differ between two right processors: one row per result that the SDM leaves undefined,
//! or that the host defines otherwise than Intel does. Nothing else is masked.

use iced_x86::{Instruction, MemorySize, Mnemonic, OpKind};

use crate::case::{AF, CF, Case, Event, Mode, OF, Outcome, PF, Patch, SF, STATUS, ZF};
use crate::layout::CODE;

/// Why a result is not compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The SDM leaves it undefined or to the implementation.
    Undefined,
    /// The host's vendor (AMD) defines it otherwise than Intel does.
    Host,
}

/// What is not compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Masked {
    /// Flags.
    pub flags: u64,
    /// General registers, one bit each.
    pub gpr: u16,
    /// Bits of the x87 status word.
    pub status: u16,
    /// The x87 pointers and opcode.
    pub pointers: bool,
    /// All of the x87 state.
    pub x87: bool,
    /// XMM registers, one bit each.
    pub xmm: u16,
    /// Bytes of memory: first address and length.
    pub memory: Vec<(u64, u64)>,
    /// Which page of a crossing access faulted.
    pub address: bool,
    /// Everything: the case is not judged.
    pub whole: bool,
}

/// A case with what the rows need to know of it.
pub struct Context<'a> {
    /// The case.
    pub case: &'a Case,
    /// Its instruction.
    pub instruction: &'a Instruction,
    /// What the judge says.
    pub host: &'a Outcome,
    /// What we say.
    pub ours: &'a Outcome,
}

/// One row of the table.
pub struct Row {
    /// Stable name, for the report.
    pub id: &'static str,
    /// Where it is said.
    pub cite: &'static str,
    /// Whose doing it is.
    pub reason: Reason,
    /// Adds to what is not compared; leaves it alone where the row does not apply.
    pub mask: fn(&Context, &mut Masked),
}

impl Context<'_> {
    fn is(&self, list: &[Mnemonic]) -> bool {
        list.contains(&self.instruction.mnemonic())
    }

    fn done(&self) -> bool {
        self.host.event == Event::Done
    }

    /// Width of the first operand in bits.
    fn width(&self) -> u32 {
        match self.instruction.op0_kind() {
            OpKind::Register => self.instruction.op0_register().size() as u32 * 8,
            _ => self.instruction.memory_size().size() as u32 * 8,
        }
    }

    /// The count of a shift or rotate after masking to 5 or 6 bits.
    fn count(&self) -> u32 {
        let i = self.instruction;
        let last = i.op_count() - 1;
        let count = match i.op_kind(last) {
            OpKind::Immediate8 => u32::from(i.immediate8()),
            _ => self.case.state.gpr[1] as u32,
        };
        count & if self.width() == 64 { 63 } else { 31 }
    }
}

/// C1 of the x87 status word.
const C1: u16 = 1 << 9;
/// C0 to C3.
const CONDITION: u16 = 0x4700;

/// The table.
pub const ROWS: &[Row] = {
    use Mnemonic::*;
    &[
        Row {
            id: "logic.af",
            cite: "Vol. 2, AND, OR, XOR, TEST, \"Flags Affected\": the state of the AF flag is undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[And, Or, Xor, Test]) {
                    m.flags |= AF;
                }
            },
        },
        Row {
            id: "shift.flags",
            cite: "Vol. 2, SAL/SAR/SHL/SHR, \"Flags Affected\": CF undefined for SHL and SHR when the count is at least the width, OF unless it is 1, AF unless it is 0",
            reason: Reason::Undefined,
            mask: |c, m| {
                if !c.is(&[Shl, Sal, Shr, Sar]) || c.count() == 0 {
                    return;
                }
                m.flags |= AF;
                if c.count() != 1 {
                    m.flags |= OF;
                }
                if c.count() >= c.width() && !c.is(&[Sar]) {
                    m.flags |= CF;
                }
            },
        },
        Row {
            id: "rotate.of",
            cite: "Vol. 2, RCL/RCR/ROL/ROR, \"Flags Affected\": OF is undefined for multi-bit rotates",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Rcl, Rcr, Rol, Ror]) && c.count() > 1 {
                    m.flags |= OF;
                }
            },
        },
        Row {
            id: "double_shift.flags",
            cite: "Vol. 2, SHLD, SHRD, \"Flags Affected\": OF undefined unless the count is 1, AF unless it is 0",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Shld, Shrd]) && c.count() > 0 {
                    m.flags |= AF;
                    if c.count() > 1 {
                        m.flags |= OF;
                    }
                }
            },
        },
        Row {
            id: "double_shift.wide",
            cite: "Vol. 2, SHLD, SHRD, \"Description\": a count greater than the operand size leaves the destination and all flags undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Shld, Shrd]) && c.count() > c.width() {
                    m.flags |= STATUS;
                    mask_destination(c, m);
                }
            },
        },
        Row {
            id: "mul.flags",
            cite: "Vol. 2, MUL, IMUL, \"Flags Affected\": SF, ZF, AF and PF are undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Mul, Imul]) {
                    m.flags |= SF | ZF | AF | PF;
                }
            },
        },
        Row {
            id: "div.flags",
            cite: "Vol. 2, DIV, IDIV, \"Flags Affected\": all six are undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Div, Idiv]) {
                    m.flags |= STATUS;
                }
            },
        },
        Row {
            id: "bit_scan.flags",
            cite: "Vol. 2, BSF, BSR, \"Flags Affected\": CF, OF, SF, AF and PF are undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Bsf, Bsr]) {
                    m.flags |= CF | OF | SF | AF | PF;
                }
            },
        },
        Row {
            id: "bit_test.flags",
            cite: "Vol. 2, BT, BTC, BTR, BTS, \"Flags Affected\": OF, SF, AF and PF are undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Bt, Btc, Btr, Bts]) {
                    m.flags |= OF | SF | AF | PF;
                }
            },
        },
        Row {
            id: "count_zeros.flags",
            cite: "Vol. 2, LZCNT, TZCNT, \"Flags Affected\": OF, SF, PF and AF are undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Lzcnt, Tzcnt]) {
                    m.flags |= OF | SF | PF | AF;
                }
            },
        },
        Row {
            id: "bmi.flags",
            cite: "Vol. 2, ANDN, BLSI, BLSMSK, BLSR, BZHI, \"Flags Affected\": AF and PF are undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Andn, Blsi, Blsmsk, Blsr, Bzhi]) {
                    m.flags |= AF | PF;
                }
            },
        },
        Row {
            id: "bextr.flags",
            cite: "Vol. 2, BEXTR, \"Flags Affected\": AF, SF and PF are undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Bextr]) {
                    m.flags |= AF | SF | PF;
                }
            },
        },
        Row {
            id: "ascii.flags",
            cite: "Vol. 2, AAA, AAS, \"Flags Affected\": OF, SF, ZF and PF are undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Aaa, Aas]) {
                    m.flags |= OF | SF | ZF | PF;
                }
            },
        },
        Row {
            id: "ascii_multiply.flags",
            cite: "Vol. 2, AAD, AAM, \"Flags Affected\": OF, AF and CF are undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Aad, Aam]) {
                    m.flags |= OF | AF | CF;
                }
            },
        },
        Row {
            id: "decimal.of",
            cite: "Vol. 2, DAA, DAS, \"Flags Affected\": OF is undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Daa, Das]) {
                    m.flags |= OF;
                }
            },
        },
        Row {
            id: "pause.rex_b",
            cite: "Vol. 2, \"PAUSE\", \"XCHG\": F3 90 with REX.B is neither's encoding; AMD exchanges, Intel pauses",
            reason: Reason::Undefined,
            mask: |c, m| m.whole |= c.is(&[Pause]) && c.case.code.iter().any(|b| b & 0xf1 == 0x41),
        },
        Row {
            id: "loop.repeat_prefix",
            cite: "Vol. 2A, \"Instruction Prefixes\": F2 and F3 before other instructions are reserved; AMD lets them choose LOOPE or LOOPNE",
            reason: Reason::Undefined,
            mask: |c, m| {
                let repeat = c.case.code.iter().take(4).any(|b| matches!(b, 0xf2 | 0xf3));
                m.whole |= c.is(&[Loope, Loopne]) && repeat;
            },
        },
        Row {
            id: "prefetch.register",
            cite: "AMD APM Vol. 3, \"PREFETCH, PREFETCHW\": #UD with a register operand; Intel has a reserved NOP there (Vol. 2, \"Two-Byte Opcode Map\")",
            reason: Reason::Host,
            mask: |c, m| {
                let two_byte = c.case.code.windows(2).any(|b| b == [0x0f, 0x0d]);
                m.whole |= c.is(&[Reservednop, Nop]) && two_byte;
            },
        },
        Row {
            id: "masked_store.unselected",
            cite: "Vol. 2, MASKMOVQ, MASKMOVDQU, \"Description\": faults on bytes that the mask leaves out are implementation dependent",
            reason: Reason::Undefined,
            mask: |c, m| {
                m.whole |=
                    c.is(&[Maskmovq, Maskmovdqu]) && !c.done() && c.ours.event == Event::Done;
            },
        },
        Row {
            id: "movsxd.word",
            cite: "Vol. 2, \"MOVSXD\": a 16-bit operand size takes r/m16; AMD reads 32 bits (APM Vol. 3, \"MOVSXD\")",
            reason: Reason::Host,
            mask: |c, m| {
                let word = c.instruction.code() == iced_x86::Code::Movsxd_r16_rm16;
                m.whole |= word && !c.done();
            },
        },
        Row {
            id: "fault.order",
            cite: "Vol. 3A, \"Priority Among Concurrent Events\": among the faults of executing an instruction the order is implementation-specific",
            reason: Reason::Undefined,
            mask: |c, m| {
                let (Some(host), Some(ours)) = (vector(c.host), vector(c.ours)) else {
                    return;
                };
                let class = [5, 12, 13, 14, 17];
                let both = class.contains(&host) && class.contains(&ours) && host != ours;
                // Two apply where an access is misaligned under AC, where it wraps round 4 GiB, where
                // a call has a bad target and a bad stack, and where a vector or a save area that must
                // be aligned is neither aligned nor canonical.
                let two =
                    [host, ours].contains(&17) || wraps(c) || c.is(&[Call, Maskmovq, Maskmovdqu]);
                let misaligned =
                    |mask| operand_address(c.case, c.instruction).is_some_and(|a| a & mask != 0);
                let aligned_vector = [12, 13].contains(&host)
                    && [12, 13].contains(&ours)
                    && match c.instruction.memory_size() {
                        MemorySize::Xsave | MemorySize::Xsave64 => misaligned(63),
                        size => size.size() == 16 && misaligned(15),
                    };
                m.whole |= both && (two || aligned_vector);
            },
        },
        Row {
            id: "canonical.offset",
            cite: "Vol. 1, \"Canonical Addressing\": the linear address is checked; AMD also faults on an offset that is not canonical when FS or GS makes it so",
            reason: Reason::Host,
            mask: |c, m| {
                let base = match c.instruction.memory_segment() {
                    iced_x86::Register::FS => c.case.state.fs_base,
                    iced_x86::Register::GS => c.case.state.gs_base,
                    _ => return,
                };
                let Some(linear) = operand_address(c.case, c.instruction) else {
                    return;
                };
                let offset = linear.wrapping_sub(base);
                let canonical = (offset << 16) as i64 >> 16 == offset as i64;
                // A bit offset in a register moves the address further.
                let bits = c.is(&[Bt, Btc, Btr, Bts]);
                let long = c.case.mode == Mode::Long;
                m.whole |= long && (bits || !canonical) && vector(c.host) == Some(13);
            },
        },
        Row {
            id: "fault.address",
            cite: "Vol. 3A, \"Page-Fault Exception (#PF)\": CR2 is the address that faulted; which of an instruction's accesses comes first is not said",
            reason: Reason::Undefined,
            mask: |c, m| {
                m.address |= c.is(&[
                    Fxsave, Fxsave64, Fxrstor, Fxrstor64, Fnstenv, Fldenv, Fnsave, Frstor, Xsave,
                    Xsave64, Xsavec, Xsavec64, Xrstor, Xrstor64, Cmpsb, Cmpsw, Cmpsd, Cmpsq, Pusha,
                    Pushad, Popa, Popad, Maskmovq, Maskmovdqu, Bound, Movsb, Movsw, Movsd, Movsq,
                ]);
            },
        },
        Row {
            id: "fault.partial",
            cite: "Vol. 2, \"PUSHA/PUSHAD\", \"POPA/POPAD\": nothing is said of what a fault half way leaves behind; AMD stores and loads what comes before it",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.done() {
                    return;
                }
                if c.is(&[Popa, Popad]) {
                    m.gpr |= 0xff & !0x10;
                } else if c.is(&[Pusha, Pushad]) {
                    m.memory.push((c.case.state.gpr[4].wrapping_sub(32), 32));
                }
            },
        },
        Row {
            id: "push.selector",
            cite: "Vol. 2, \"PUSH\", \"IA-32 Architecture Compatibility\": some processors write only the low half of a selector's slot; AMD also faults on the other half",
            reason: Reason::Undefined,
            mask: |c, m| {
                let selector = c.is(&[Push]) && c.instruction.op0_register().is_segment_register();
                m.whole |= selector && !c.done() && c.ours.event == Event::Done;
            },
        },
        Row {
            id: "enter.probe",
            cite: "Vol. 2, \"ENTER\", \"Protected Mode Exceptions\": a write at the final stack pointer is only said to be tried for a page fault; AMD also checks its alignment",
            reason: Reason::Host,
            mask: |c, m| {
                let probe = vector(c.host) == Some(17) && c.ours.event == Event::Done;
                m.whole |= c.is(&[Enter]) && probe;
            },
        },
        Row {
            id: "masked_store.x87",
            cite: "Vol. 2, \"MASKMOVQ\": causes a transition to MMX state; AMD has made it when the store faults",
            reason: Reason::Host,
            mask: |c, m| {
                let both = vector(c.host).is_some() && vector(c.host) == vector(c.ours);
                m.whole |= c.is(&[Maskmovq]) && both;
            },
        },
        Row {
            id: "cvtpi2ps.memory",
            cite: "Vol. 2, \"CVTPI2PS\": causes a transition to MMX state; AMD makes none for a memory operand (APM Vol. 4, \"CVTPI2PS\")",
            reason: Reason::Host,
            mask: |c, m| {
                if c.is(&[Cvtpi2ps]) && c.instruction.op1_kind() == OpKind::Memory {
                    m.x87 = true;
                    m.whole |= vector(c.ours) == Some(16);
                }
            },
        },
        Row {
            id: "approximation",
            cite: "Vol. 2, \"RCPPS\", \"RCPSS\", \"RSQRTPS\", \"RSQRTSS\": the relative error is at most 1.5 * 2^-12; the table behind it is the implementation's",
            reason: Reason::Undefined,
            mask: |c, m| {
                const SIGN: u32 = 1 << 31;
                if c.is(&[Rcpps, Rcpss, Rsqrtps, Rsqrtss]) {
                    let n = c.instruction.op0_register().number();
                    let (host, ours) = (c.host.state.fpu.xmm[n], c.ours.state.fpu.xmm[n]);
                    let near = (0..4).all(|lane| {
                        let [a, b] = [host, ours].map(|xmm| (xmm >> (32 * lane)) as u32);
                        // Two errors of 1.5 * 2^-12 in units of 2^-24. Whether operands just
                        // beyond 2^126 have tiny results, which become zero, is left open too.
                        let least = |v: u32| (0x80_0000..0x80_1000).contains(&(v & !SIGN));
                        a.abs_diff(b) <= 0x3000 || least(a ^ b) && (a == a & SIGN || b == b & SIGN)
                    });
                    m.xmm |= u16::from(near) << n;
                }
            },
        },
        Row {
            id: "save.alignment",
            cite: "Vol. 2, \"FXSAVE\", \"FXRSTOR\": with alignment checking on, #AC is implementation dependent in place of #GP",
            reason: Reason::Undefined,
            mask: |c, m| {
                let save = c.is(&[
                    Fxsave, Fxsave64, Fxrstor, Fxrstor64, Xsave, Xsave64, Xsavec, Xsavec64, Xrstor,
                    Xrstor64,
                ]);
                m.whole |= save && vector(c.host) == Some(17) && vector(c.ours) == Some(13);
            },
        },
        Row {
            id: "xrstor.components",
            cite: "Vol. 2, \"XRSTOR\": #GP where XSTATE_BV or XCOMP_BV names a component that XCR0 does not; the host's XCR0 has more of them",
            reason: Reason::Host,
            mask: |c, m| {
                let named = operand_address(c.case, c.instruction)
                    .map(|area| [512, 520].map(|at| byte(c.case, area.wrapping_add(at))));
                m.whole |= c.is(&[Xrstor, Xrstor64])
                    && vector(c.ours) == Some(13)
                    && named.is_some_and(|[present, layout]| (present | layout) & !3 != 0);
            },
        },
        Row {
            id: "save.mxcsr_mask",
            cite: "AMD APM Vol. 5, \"FXSAVE\": MXCSR_MASK has bit 17 (misaligned exception mask), which Intel has not",
            reason: Reason::Host,
            mask: |c, m| {
                let save = c.is(&[Fxsave, Fxsave64, Xsave, Xsave64, Xsavec, Xsavec64]);
                if save && let Some(address) = operand_address(c.case, c.instruction) {
                    m.memory.push((address.wrapping_add(30), 1));
                }
            },
        },
        Row {
            id: "unaligned_vector.ac",
            cite: "Vol. 3A, \"Alignment Check Exception (#AC)\": for MOVUPS, MOVUPD, MOVDQU and LDDQU #AC may or may not be generated",
            reason: Reason::Undefined,
            mask: |c, m| {
                let unaligned = c.is(&[Movups, Movupd, Movdqu, Lddqu]);
                m.whole |= unaligned && vector(c.host) == Some(17);
            },
        },
        Row {
            id: "ud.operand",
            cite: "Vol. 2, \"UD\": some processors do not take the ModRM byte and what follows as part of the instruction",
            reason: Reason::Undefined,
            mask: |c, m| {
                let fetch = Event::Fault {
                    vector: 14,
                    address: Some(CODE.end()),
                };
                m.whole |= c.is(&[Ud0, Ud1]) && c.ours.event == fetch;
            },
        },
        Row {
            id: "repeat_io.none",
            cite: "Vol. 2, \"REP/REPE/REPZ/REPNE/REPNZ\", \"Operation\": nothing is done for a count of 0; AMD checks the port all the same",
            reason: Reason::Host,
            mask: |c, m| {
                let io = c.is(&[Insb, Insw, Insd, Outsb, Outsw, Outsd]);
                m.whole |= io && vector(c.host) == Some(13) && c.ours.event == Event::Done;
            },
        },
        Row {
            id: "x87.c1",
            cite: "Vol. 2, \"FCMOVcc\", \"FCOMI/FCOMIP/FUCOMI/FUCOMIP\", \"FPU Flags Affected\": C1 is 0; AMD leaves it unless the stack underflows",
            reason: Reason::Host,
            mask: |c, m| {
                if c.is(&[
                    Fcmovb, Fcmove, Fcmovbe, Fcmovu, Fcmovnb, Fcmovne, Fcmovnbe, Fcmovnu, Fcomi,
                    Fcomip, Fucomi, Fucomip,
                ]) {
                    m.status |= C1;
                }
            },
        },
        Row {
            id: "x87.ffree",
            cite: "Vol. 2, \"FFREE\", \"FPU Flags Affected\": C0, C1, C2, C3 undefined",
            reason: Reason::Undefined,
            mask: |c, m| {
                if c.is(&[Ffree, Ffreep]) {
                    m.status |= CONDITION;
                }
            },
        },
        Row {
            id: "x87.push_empty",
            cite: "Vol. 2, \"FLD\", \"FPU Flags Affected\": C1 tells overflow from underflow; which counts when an empty register is pushed onto a full stack is not said",
            reason: Reason::Undefined,
            mask: |c, m| {
                let both = c.host.state.fpu.status & c.ours.state.fpu.status & 0x40 != 0;
                if c.instruction.code() == iced_x86::Code::Fld_sti && both {
                    m.status |= C1;
                }
            },
        },
        Row {
            id: "x87.remainder",
            cite: "Vol. 2, \"FPREM\", \"FPREM1\", \"FPU Flags Affected\": the quotient bits are given for a result; there is none with a NaN or after an invalid operation",
            reason: Reason::Undefined,
            mask: |c, m| {
                let exponent =
                    |o: &Outcome| u16::from_le_bytes([o.state.fpu.st[0][8], o.state.fpu.st[0][9]]);
                let invalid = c.host.state.fpu.status & c.ours.state.fpu.status & 1 != 0;
                let nan = exponent(c.host) & exponent(c.ours) & 0x7fff == 0x7fff;
                if c.is(&[Fprem, Fprem1]) && (invalid || nan) {
                    m.status |= CONDITION;
                }
            },
        },
        Row {
            id: "x87.compare_unmasked",
            cite: "Vol. 2, \"FCOM/FCOMP/FCOMPP\", \"FCOMI/FCOMIP/FUCOMI/FUCOMIP\": condition codes and flags are not set by an unmasked invalid operation; AMD sets them, also before an unmasked denormal operand",
            reason: Reason::Host,
            mask: |c, m| {
                let compare = c.is(&[
                    Fcom, Fcomp, Fcompp, Fucom, Fucomp, Fucompp, Ficom, Ficomp, Ftst,
                ]);
                let into_flags = c.is(&[Fcomi, Fcomip, Fucomi, Fucomip]);
                if c.host.state.fpu.status & 0x80 == 0 {
                    return;
                }
                if compare {
                    m.status |= CONDITION;
                } else if into_flags {
                    m.flags |= STATUS;
                }
            },
        },
        Row {
            id: "x87.pointers",
            cite: "AMD APM Vol. 5, \"FXSAVE\", \"XSAVE\": FIP, FDP and FOP are saved and loaded only while an exception is pending (FSW.ES)",
            reason: Reason::Host,
            mask: |c, m| m.pointers |= c.host.state.fpu.status & 0x80 == 0,
        },
    ]
};

fn vector(outcome: &Outcome) -> Option<u8> {
    match outcome.event {
        Event::Fault { vector, .. } => Some(vector),
        _ => None,
    }
}

/// Whether the memory operand goes past the end of a 32-bit segment.
fn wraps(c: &Context) -> bool {
    let size = match c.instruction.memory_size() {
        // The legacy area and the header.
        MemorySize::Xsave | MemorySize::Xsave64 => 576,
        size => size.size().max(1) as u64,
    };
    c.case.mode == Mode::Compat
        && operand_address(c.case, c.instruction).is_some_and(|a| a + size > 1 << 32)
}

/// A byte of a case's memory.
fn byte(case: &Case, address: u64) -> u8 {
    let inside = |p: &&Patch| address.wrapping_sub(p.address) < p.bytes.len() as u64;
    let patch = case.memory.iter().rev().find(inside);
    patch.map_or(0, |p| p.bytes[(address - p.address) as usize])
}

fn mask_destination(c: &Context, m: &mut Masked) {
    if c.instruction.op0_kind() == OpKind::Register {
        m.gpr |= 1 << c.instruction.op0_register().full_register().number();
    } else if c.done()
        && let Some(address) = operand_address(c.case, c.instruction)
    {
        m.memory.push((address, u64::from(c.width() / 8)));
    }
}

/// Linear address of the ModRM memory operand.
pub fn operand_address(case: &Case, instruction: &Instruction) -> Option<u64> {
    let operand =
        (0..instruction.op_count()).find(|n| instruction.op_kind(*n) == OpKind::Memory)?;
    let state = &case.state;
    let address = instruction.virtual_address(operand, 0, |register, _, _| {
        use iced_x86::Register;
        if register.is_segment_register() {
            return Some(match (case.mode, register) {
                (Mode::Long, Register::FS) => state.fs_base,
                (Mode::Long, Register::GS) => state.gs_base,
                _ => 0,
            });
        }
        let value = state.gpr[register.full_register().number()];
        Some(match register.size() {
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        })
    })?;
    Some(match case.mode {
        Mode::Long => address,
        Mode::Compat => address & 0xffff_ffff,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::UserState;
    use crate::forms::forms;
    use crate::{Rng, generate};
    use iced_x86::{Decoder, RflagsBits};

    /// A second opinion: iced-x86 lists the flags each form may leave undefined.
    #[test]
    fn no_flag_is_masked_that_iced_calls_defined() {
        let mut rng = Rng::new(3);
        for mode in [Mode::Long, Mode::Compat] {
            for code in forms(mode) {
                for _ in 0..8 {
                    let Some(case) = generate::case(&mut rng, code, mode) else {
                        continue;
                    };
                    let i = Decoder::new(mode.bits(), &case.code, 0).decode();
                    let outcome = Outcome {
                        event: Event::Done,
                        state: UserState::new(mode),
                    };
                    let context = Context {
                        case: &case,
                        instruction: &i,
                        host: &outcome,
                        ours: &outcome,
                    };
                    let mut masked = Masked::default();
                    for row in ROWS {
                        (row.mask)(&context, &mut masked);
                    }
                    let undefined = [
                        (RflagsBits::CF, CF),
                        (RflagsBits::PF, PF),
                        (RflagsBits::AF, AF),
                        (RflagsBits::ZF, ZF),
                        (RflagsBits::SF, SF),
                        (RflagsBits::OF, OF),
                    ]
                    .iter()
                    .filter(|(iced, _)| i.rflags_undefined() & iced != 0)
                    .fold(0, |all, (_, ours)| all | ours);
                    // iced-x86 does not look at counts beyond the operand's width, and takes a
                    // rotation all the way round for none.
                    let wide = match i.mnemonic() {
                        Mnemonic::Shld | Mnemonic::Shrd => STATUS,
                        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr => CF,
                        Mnemonic::Rcl | Mnemonic::Rcr => OF,
                        _ => 0,
                    };
                    assert!(
                        masked.flags & !undefined & !wide == 0,
                        "{code:?}: {:x} of {undefined:x}",
                        masked.flags
                    );
                }
            }
        }
    }

    #[test]
    fn rows_have_distinct_names() {
        for (n, row) in ROWS.iter().enumerate() {
            assert!(
                ROWS[..n].iter().all(|other| other.id != row.id),
                "{}",
                row.id
            );
            assert!(row.cite.contains('"'), "{} names no section", row.id);
        }
    }
}
