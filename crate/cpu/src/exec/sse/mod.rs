//! MMX, SSE, SSE2, SSE3 and SSSE3. Each operation is one function over lanes, used for MMX and XMM
//! registers alike; this file finds the operands.

mod convert;
pub(crate) mod float;
mod integer;
mod lanes;
mod moves;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::exec::x87;
use crate::float::Operation;
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::{Exec, GP0};
use core::cmp::Ordering::{Greater, Less};
use lanes::Vector;

/// Executes `i` if it is one of these.
pub(crate) fn execute(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic::*;
    use Operation::{Add, Divide, Multiply, Subtract};
    use float::Lanes::{All, Lowest};
    use integer as n;
    match i.mnemonic() {
        // ---- moves ----
        Movaps | Movapd | Movdqa | Movntps | Movntpd | Movntdq => moves::whole(x, i, true),
        Movups | Movupd | Movdqu | Lddqu => moves::whole(x, i, false),
        Movss | Movsd => moves::scalar(x, i),
        Movlps | Movlpd | Movhlps => moves::low_half(x, i),
        Movhps | Movhpd | Movlhps => moves::high_half(x, i),
        Movd | Movq | Movntq => moves::low_bits(x, i),
        Movq2dq | Movdq2q => moves::between(x, i),
        Movddup => moves::duplicate(x, i, |v| v & u128::from(u64::MAX) | v << 64),
        Movsldup => moves::duplicate(x, i, |v| n::pshufd(0, v, 0b10_10_00_00)),
        Movshdup => moves::duplicate(x, i, |v| n::pshufd(0, v, 0b11_11_01_01)),
        Maskmovq | Maskmovdqu => moves::masked(x, i),
        Movmskps => moves::mask(x, i, 32),
        Movmskpd => moves::mask(x, i, 64),
        Pmovmskb => moves::mask(x, i, 8),
        Pextrw => moves::extract_word(x, i),
        Pinsrw => moves::insert_word(x, i),

        // ---- logic ----
        Pand | Andps | Andpd => packed(x, i, n::pand),
        Pandn | Andnps | Andnpd => packed(x, i, n::pandn),
        Por | Orps | Orpd => packed(x, i, n::por),
        Pxor | Xorps | Xorpd => packed(x, i, n::pxor),

        // ---- arithmetic ----
        Paddb => packed(x, i, n::paddb),
        Paddw => packed(x, i, n::paddw),
        Paddd => packed(x, i, n::paddd),
        Paddq => packed(x, i, n::paddq),
        Psubb => packed(x, i, n::psubb),
        Psubw => packed(x, i, n::psubw),
        Psubd => packed(x, i, n::psubd),
        Psubq => packed(x, i, n::psubq),
        Paddsb => packed(x, i, n::paddsb),
        Paddsw => packed(x, i, n::paddsw),
        Paddusb => packed(x, i, n::paddusb),
        Paddusw => packed(x, i, n::paddusw),
        Psubsb => packed(x, i, n::psubsb),
        Psubsw => packed(x, i, n::psubsw),
        Psubusb => packed(x, i, n::psubusb),
        Psubusw => packed(x, i, n::psubusw),
        Pmullw => packed(x, i, n::pmullw),
        Pmulhw => packed(x, i, n::pmulhw),
        Pmulhuw => packed(x, i, n::pmulhuw),
        Pmulhrsw => packed(x, i, n::pmulhrsw),
        Pmuludq => packed(x, i, n::pmuludq),
        Pmaddwd => packed(x, i, n::pmaddwd),
        Pmaddubsw => packed(x, i, n::pmaddubsw),
        Psadbw => packed(x, i, n::psadbw),
        Pavgb => packed(x, i, n::pavgb),
        Pavgw => packed(x, i, n::pavgw),
        Pminsw => packed(x, i, n::pminsw),
        Pminub => packed(x, i, n::pminub),
        Pmaxsw => packed(x, i, n::pmaxsw),
        Pmaxub => packed(x, i, n::pmaxub),
        Pabsb => packed(x, i, n::pabsb),
        Pabsw => packed(x, i, n::pabsw),
        Pabsd => packed(x, i, n::pabsd),
        Psignb => packed(x, i, n::psignb),
        Psignw => packed(x, i, n::psignw),
        Psignd => packed(x, i, n::psignd),
        Phaddw => packed(x, i, n::phaddw),
        Phaddd => packed(x, i, n::phaddd),
        Phaddsw => packed(x, i, n::phaddsw),
        Phsubw => packed(x, i, n::phsubw),
        Phsubd => packed(x, i, n::phsubd),
        Phsubsw => packed(x, i, n::phsubsw),

        // ---- comparisons ----
        Pcmpeqb => packed(x, i, n::pcmpeqb),
        Pcmpeqw => packed(x, i, n::pcmpeqw),
        Pcmpeqd => packed(x, i, n::pcmpeqd),
        Pcmpgtb => packed(x, i, n::pcmpgtb),
        Pcmpgtw => packed(x, i, n::pcmpgtw),
        Pcmpgtd => packed(x, i, n::pcmpgtd),

        // ---- shifts ----
        Psllw => packed(x, i, n::psllw),
        Pslld => packed(x, i, n::pslld),
        Psllq => packed(x, i, n::psllq),
        Psrlw => packed(x, i, n::psrlw),
        Psrld => packed(x, i, n::psrld),
        Psrlq => packed(x, i, n::psrlq),
        Psraw => packed(x, i, n::psraw),
        Psrad => packed(x, i, n::psrad),
        Pslldq => packed(x, i, n::pslldq),
        Psrldq => packed(x, i, n::psrldq),

        // ---- shuffles ----
        Packsswb => packed(x, i, n::packsswb),
        Packuswb => packed(x, i, n::packuswb),
        Packssdw => packed(x, i, n::packssdw),
        Punpcklbw => packed(x, i, n::punpcklbw),
        Punpcklwd => packed(x, i, n::punpcklwd),
        Punpckldq | Unpcklps => packed(x, i, n::punpckldq),
        Punpcklqdq | Unpcklpd => packed(x, i, n::punpcklqdq),
        Punpckhbw => packed(x, i, n::punpckhbw),
        Punpckhwd => packed(x, i, n::punpckhwd),
        Punpckhdq | Unpckhps => packed(x, i, n::punpckhdq),
        Punpckhqdq | Unpckhpd => packed(x, i, n::punpckhqdq),
        Pshufb => packed(x, i, n::pshufb),
        Pshufd => shuffled(x, i, n::pshufd),
        Pshuflw | Pshufw => shuffled(x, i, n::pshuflw),
        Pshufhw => shuffled(x, i, n::pshufhw),
        Shufps => shuffled(x, i, n::shufps),
        Shufpd => shuffled(x, i, n::shufpd),
        Palignr => {
            let count = i.immediate8();
            binary(x, i, |a, b, bytes| n::palignr(a, b, bytes, count))
        }

        // ---- floating point ----
        Addps => float::arithmetic::<u32>(x, i, All, Add),
        Addpd => float::arithmetic::<u64>(x, i, All, Add),
        Addss => float::arithmetic::<u32>(x, i, Lowest, Add),
        Addsd => float::arithmetic::<u64>(x, i, Lowest, Add),
        Subps => float::arithmetic::<u32>(x, i, All, Subtract),
        Subpd => float::arithmetic::<u64>(x, i, All, Subtract),
        Subss => float::arithmetic::<u32>(x, i, Lowest, Subtract),
        Subsd => float::arithmetic::<u64>(x, i, Lowest, Subtract),
        Mulps => float::arithmetic::<u32>(x, i, All, Multiply),
        Mulpd => float::arithmetic::<u64>(x, i, All, Multiply),
        Mulss => float::arithmetic::<u32>(x, i, Lowest, Multiply),
        Mulsd => float::arithmetic::<u64>(x, i, Lowest, Multiply),
        Divps => float::arithmetic::<u32>(x, i, All, Divide),
        Divpd => float::arithmetic::<u64>(x, i, All, Divide),
        Divss => float::arithmetic::<u32>(x, i, Lowest, Divide),
        Divsd => float::arithmetic::<u64>(x, i, Lowest, Divide),
        Sqrtps => float::square_root::<u32>(x, i, All),
        Sqrtpd => float::square_root::<u64>(x, i, All),
        Sqrtss => float::square_root::<u32>(x, i, Lowest),
        Sqrtsd => float::square_root::<u64>(x, i, Lowest),
        Minps => float::extreme::<u32>(x, i, All, Less),
        Minpd => float::extreme::<u64>(x, i, All, Less),
        Minss => float::extreme::<u32>(x, i, Lowest, Less),
        Minsd => float::extreme::<u64>(x, i, Lowest, Less),
        Maxps => float::extreme::<u32>(x, i, All, Greater),
        Maxpd => float::extreme::<u64>(x, i, All, Greater),
        Maxss => float::extreme::<u32>(x, i, Lowest, Greater),
        Maxsd => float::extreme::<u64>(x, i, Lowest, Greater),
        Cmpps => float::predicate::<u32>(x, i, All),
        Cmppd => float::predicate::<u64>(x, i, All),
        Cmpss => float::predicate::<u32>(x, i, Lowest),
        Cmpsd => float::predicate::<u64>(x, i, Lowest),
        Comiss => float::compare::<u32>(x, i, false),
        Comisd => float::compare::<u64>(x, i, false),
        Ucomiss => float::compare::<u32>(x, i, true),
        Ucomisd => float::compare::<u64>(x, i, true),
        Addsubps => float::add_subtract::<u32>(x, i),
        Addsubpd => float::add_subtract::<u64>(x, i),
        Haddps => float::horizontal::<u32>(x, i, Add),
        Haddpd => float::horizontal::<u64>(x, i, Add),
        Hsubps => float::horizontal::<u32>(x, i, Subtract),
        Hsubpd => float::horizontal::<u64>(x, i, Subtract),
        Rcpps => float::reciprocal(x, i, All),
        Rcpss => float::reciprocal(x, i, Lowest),
        Rsqrtps => float::reciprocal_root(x, i, All),
        Rsqrtss => float::reciprocal_root(x, i, Lowest),

        // ---- conversions ----
        Cvtss2sd => convert::scalar::<u32, u64>(x, i),
        Cvtsd2ss => convert::scalar::<u64, u32>(x, i),
        Cvtps2pd => convert::packed::<u32, u64>(x, i),
        Cvtpd2ps => convert::packed::<u64, u32>(x, i),
        Cvtss2si => convert::to_general::<u32>(x, i, false),
        Cvtsd2si => convert::to_general::<u64>(x, i, false),
        Cvttss2si => convert::to_general::<u32>(x, i, true),
        Cvttsd2si => convert::to_general::<u64>(x, i, true),
        Cvtsi2ss => convert::from_general::<u32>(x, i),
        Cvtsi2sd => convert::from_general::<u64>(x, i),
        Cvtps2dq => convert::to_doublewords::<u32>(x, i, false),
        Cvtpd2dq => convert::to_doublewords::<u64>(x, i, false),
        Cvttps2dq => convert::to_doublewords::<u32>(x, i, true),
        Cvttpd2dq => convert::to_doublewords::<u64>(x, i, true),
        Cvtdq2ps => convert::from_doublewords::<u32>(x, i),
        Cvtdq2pd => convert::from_doublewords::<u64>(x, i),
        Cvtpi2ps => convert::from_mmx::<u32>(x, i),
        Cvtpi2pd => convert::from_mmx::<u64>(x, i),
        Cvtps2pi => convert::to_mmx::<u32>(x, i, false),
        Cvtpd2pi => convert::to_mmx::<u64>(x, i, false),
        Cvttps2pi => convert::to_mmx::<u32>(x, i, true),
        Cvttpd2pi => convert::to_mmx::<u64>(x, i, true),

        _ => x87::execute(x, i),
    }
}

/// Number of an XMM register.
fn xmm(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::XMM0 as usize) & 15
}

/// Number of an MMX register.
fn mm(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::MM0 as usize) & 7
}

/// Loads `bytes` (1 to 8, or 16) as the low part of a vector.
fn load(x: &mut Ctx, i: &Instruction, bytes: usize, aligned: bool) -> Exec<Vector> {
    let linear = x.memory(i, bytes as u64, Access::Read)?;
    if bytes < 16 {
        return Ok(x.load_sized(linear, bytes)?.into());
    }
    if aligned && linear & 15 != 0 {
        return Err(GP0);
    }
    Ok(Vector::from_le_bytes(x.load(linear)?))
}

/// Stores the low `bytes` (1 to 8, or 16) of a vector.
fn store(x: &mut Ctx, i: &Instruction, bytes: usize, aligned: bool, value: Vector) -> Exec {
    let linear = x.memory(i, bytes as u64, Access::Write)?;
    if bytes < 16 {
        return x.store_sized(linear, bytes, value as u64);
    }
    if aligned && linear & 15 != 0 {
        return Err(GP0);
    }
    x.store(linear, value.to_le_bytes())
}

/// Operand `n`: a vector register, memory (16 bytes of it aligned), or an immediate count.
fn source(x: &mut Ctx, i: &Instruction, n: u32) -> Exec<Vector> {
    match i.op_kind(n) {
        OpKind::Register => {
            let register = i.op_register(n);
            Ok(if register.is_mm() {
                x.cpu.fpu.mm(mm(register)).into()
            } else {
                x.cpu.fpu.xmm[xmm(register)]
            })
        }
        OpKind::Memory => load(x, i, i.memory_size().size(), true),
        _ => Ok(i.immediate8().into()),
    }
}

/// The first operand, a vector register, becomes `f` of the two operands and of its size in bytes.
/// A shift count may be an immediate.
#[inline]
fn binary(x: &mut Ctx, i: &Instruction, f: impl FnOnce(Vector, Vector, usize) -> Vector) -> Exec {
    let to = i.op0_register();
    if to.is_mm() {
        x.need_mmx()?;
        let b = source(x, i, 1)?;
        let a = x.cpu.fpu.mm(mm(to)).into();
        x.cpu.fpu.enter_mmx();
        x.cpu.fpu.set_mm(mm(to), f(a, b, 8) as u64);
    } else {
        x.need_sse()?;
        let b = source(x, i, 1)?;
        let a = &mut x.cpu.fpu.xmm[xmm(to)];
        *a = f(*a, b, 16);
    }
    Ok(())
}

fn packed(x: &mut Ctx, i: &Instruction, f: fn(Vector, Vector, usize) -> Vector) -> Exec {
    binary(x, i, f)
}

/// As [`packed`], with an immediate that orders lanes.
fn shuffled(x: &mut Ctx, i: &Instruction, f: fn(Vector, Vector, u8) -> Vector) -> Exec {
    let order = i.immediate8();
    binary(x, i, |a, b, _| f(a, b, order))
}
