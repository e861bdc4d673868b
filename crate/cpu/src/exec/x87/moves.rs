//! Loads, stores and moves within the stack.

use iced_x86::{Code, Instruction, Mnemonic};

use super::{Memory, begin, environment, memory, st};
use crate::float::{self, Float, Format, Rounding, decode_extended, encode_extended, truncating};
use crate::fpu::{exception, register_bytes, register_from_bytes};
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::Exec;

/// FLD.
pub(super) fn load(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let Some(at) = memory(x, i, Access::Read)? else {
        return load_register(x, i);
    };
    let mut env = environment(&x.cpu.fpu);
    let bits = if at.size == 10 {
        register_from_bytes(x.load(at.linear)?)
    } else {
        let format = if at.size == 4 {
            Format::SINGLE
        } else {
            Format::DOUBLE
        };
        let value = format.decode(x.load_sized(at.linear, at.size)?);
        float::note_denormal(&mut env, &[value]);
        encode_extended(float::convert(&mut env, Format::EXTENDED, value))
    };
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, Some(at.offset));
    if fpu.is_empty(7) && env.raised == exception::DENORMAL {
        // Loaded even where the exception is unmasked.
        fpu.settle(&env);
        fpu.push_bits(bits);
    } else {
        fpu.push(&env, bits);
    }
    Ok(())
}

fn load_register(x: &mut Ctx, i: &Instruction) -> Exec {
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    let from = st(i.op0_register());
    let env = environment(fpu);
    if fpu.is_empty(7) && fpu.is_empty(from) {
        if fpu.stack_fault(false) {
            fpu.push_bits(encode_extended(Float::DEFAULT_NAN));
        }
    } else {
        fpu.push(&env, fpu.st(from));
    }
    Ok(())
}

/// FILD.
pub(super) fn load_integer(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let Some(at) = memory(x, i, Access::Read)? else {
        return Ok(());
    };
    let value = signed(x.load_sized(at.linear, at.size)?, at.size);
    let fpu = &mut x.cpu.fpu;
    let mut env = environment(fpu);
    let value = float::from_integer(&mut env, Format::EXTENDED, value);
    fpu.note(i, Some(at.offset));
    fpu.push(&env, encode_extended(value));
    Ok(())
}

/// Sign-extends a value of `size` bytes.
pub(super) fn signed(value: u64, size: usize) -> i64 {
    let shift = 64 - 8 * size as u32;
    (value << shift) as i64 >> shift
}

/// FBLD: 18 decimal digits and a sign.
pub(super) fn load_decimal(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let Some(at) = memory(x, i, Access::Read)? else {
        return Ok(());
    };
    let bytes: [u8; 10] = x.load(at.linear)?;
    let value = bytes[..9].iter().rev().fold(0u64, |value, byte| {
        value * 100 + u64::from(byte >> 4) * 10 + u64::from(byte & 15)
    });
    let fpu = &mut x.cpu.fpu;
    let env = environment(fpu);
    let value = Float::finite(bytes[9] & 0x80 != 0, 63, value);
    fpu.note(i, Some(at.offset));
    fpu.push(&env, encode_extended(value));
    Ok(())
}

/// A constant with how to get its correctly rounded value in every direction.
pub(super) struct Constant {
    nearest: (u64, u16),
    /// What the nearest value is too much by when rounding down, and too little by when up.
    down: u64,
    up: u64,
}

const fn constant_of(significand: u64, exponent: u16, down: u64, up: u64) -> Constant {
    Constant {
        nearest: (significand, exponent),
        down,
        up,
    }
}

pub(super) const ONE: Constant = constant_of(1 << 63, 0x3fff, 0, 0);
pub(super) const ZERO: Constant = constant_of(0, 0, 0, 0);
pub(super) const PI: Constant = constant_of(0xc90f_daa2_2168_c235, 0x4000, 1, 0);
pub(super) const LOG2_10: Constant = constant_of(0xd49a_784b_cd1b_8afe, 0x4000, 0, 1);
pub(super) const LOG2_E: Constant = constant_of(0xb8aa_3b29_5c17_f0bc, 0x3fff, 1, 0);
pub(super) const LOG10_2: Constant = constant_of(0x9a20_9a84_fbcf_f799, 0x3ffd, 1, 0);
pub(super) const LN_2: Constant = constant_of(0xb172_17f7_d1cf_79ac, 0x3ffe, 1, 0);

/// FLD1, FLDZ, FLDPI, FLDL2T, FLDL2E, FLDLG2, FLDLN2. Being inexact is not reported.
pub(super) fn constant(x: &mut Ctx, i: &Instruction, constant: &Constant) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    let env = environment(fpu);
    let (mut significand, exponent) = constant.nearest;
    match env.rounding {
        Rounding::Nearest => {}
        Rounding::Up => significand += constant.up,
        Rounding::Down | Rounding::Zero => significand -= constant.down,
    }
    fpu.note(i, None);
    fpu.push(&env, (significand, exponent));
    Ok(())
}

fn pops(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        i.mnemonic(),
        Fstp | Fstpnce | Fistp | Fisttp | Fbstp | Ffreep
    )
}

/// FST, FSTP.
pub(super) fn store(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let Some(at) = memory(x, i, Access::Write)? else {
        return store_register(x, i);
    };
    let fpu = &x.cpu.fpu;
    let mut env = environment(fpu);
    let source = if fpu.is_empty(0) {
        None
    } else {
        Some(fpu.st(0))
    };
    if at.size == 10 {
        let bits = source.unwrap_or(encode_extended(Float::DEFAULT_NAN));
        return store_memory(x, i, at, env, source.is_none(), register_bytes(bits));
    }
    let format = if at.size == 4 {
        Format::SINGLE
    } else {
        Format::DOUBLE
    };
    let value = match source {
        Some(bits) => float::convert(&mut env, format, decode_extended(bits)),
        None => Float::DEFAULT_NAN,
    };
    let bytes = format.encode(value).to_le_bytes();
    if at.size == 4 {
        store_memory(
            x,
            i,
            at,
            env,
            source.is_none(),
            [bytes[0], bytes[1], bytes[2], bytes[3]],
        )
    } else {
        store_memory(x, i, at, env, source.is_none(), bytes)
    }
}

/// Ends every instruction that stores: `empty` is a stack fault, for which `bytes` are the masked
/// response. No unmasked exception but inexact leaves a result in memory.
fn store_memory<const N: usize>(
    x: &mut Ctx,
    i: &Instruction,
    at: Memory,
    mut env: float::Env,
    empty: bool,
    bytes: [u8; N],
) -> Exec {
    let stored = if empty {
        env.masked & exception::INVALID != 0
    } else {
        env.raised & !env.masked & !exception::PRECISION == 0
    };
    if !stored {
        env.raised &= !exception::PRECISION; // nothing was rounded
    }
    if stored {
        x.store(at.linear, bytes)?;
    }
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, Some(at.offset));
    if empty {
        fpu.stack_fault(false);
    } else {
        fpu.settle(&env);
    }
    if stored && pops(i) {
        fpu.pop();
    }
    Ok(())
}

fn store_register(x: &mut Ctx, i: &Instruction) -> Exec {
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    let to = st(i.op0_register());
    if fpu.is_empty(0) {
        if !fpu.stack_fault(false) {
            return Ok(());
        }
        fpu.set_number(to, Float::DEFAULT_NAN);
    } else {
        fpu.clear_c1();
        fpu.set_bits(to, fpu.st(0));
    }
    if pops(i) {
        fpu.pop();
    }
    Ok(())
}

/// FIST, FISTP; FISTTP truncates.
pub(super) fn store_integer(x: &mut Ctx, i: &Instruction, truncate: bool) -> Exec {
    begin(x)?;
    let Some(at) = memory(x, i, Access::Write)? else {
        return Ok(());
    };
    let fpu = &x.cpu.fpu;
    let mut env = environment(fpu);
    let empty = fpu.is_empty(0);
    // The masked response to an empty register is the integer indefinite, as to a NaN.
    let value = if empty {
        Float::DEFAULT_NAN
    } else {
        fpu.number(0)
    };
    let bits = 8 * at.size as u32;
    let value = if truncate {
        truncating(&mut env, |env| float::to_integer(env, value, bits))
    } else {
        float::to_integer(&mut env, value, bits)
    };
    let bytes = value.to_le_bytes();
    match at.size {
        2 => store_memory(x, i, at, env, empty, [bytes[0], bytes[1]]),
        4 => store_memory(
            x,
            i,
            at,
            env,
            empty,
            [bytes[0], bytes[1], bytes[2], bytes[3]],
        ),
        _ => store_memory(x, i, at, env, empty, bytes),
    }
}

/// The packed decimal indefinite.
const DECIMAL_INDEFINITE: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff];

/// FBSTP.
pub(super) fn store_decimal(x: &mut Ctx, i: &Instruction) -> Exec {
    const LIMIT: u64 = 1_000_000_000_000_000_000;
    begin(x)?;
    let Some(at) = memory(x, i, Access::Write)? else {
        return Ok(());
    };
    let fpu = &x.cpu.fpu;
    let mut env = environment(fpu);
    let empty = fpu.is_empty(0);
    let value = if empty {
        Float::DEFAULT_NAN
    } else {
        fpu.number(0)
    };
    let mut magnitude = float::to_integer(&mut env, value, 64).unsigned_abs();
    let mut bytes = DECIMAL_INDEFINITE;
    if magnitude >= LIMIT {
        env.raised = exception::INVALID;
    } else if env.raised & exception::INVALID == 0 {
        bytes[9] = u8::from(value.sign) << 7;
        for byte in &mut bytes[..9] {
            *byte = (magnitude % 10 + ((magnitude / 10 % 10) << 4)) as u8;
            magnitude /= 100;
        }
    }
    store_memory(x, i, at, env, empty, bytes)
}

/// FXCH.
pub(super) fn exchange(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    let other = st(i.op1_register());
    if fpu.is_empty(0) || fpu.is_empty(other) {
        if !fpu.stack_fault(false) {
            return Ok(());
        }
        for n in [0, other] {
            if fpu.is_empty(n) {
                fpu.set_number(n, Float::DEFAULT_NAN);
            }
        }
    } else {
        fpu.clear_c1();
    }
    let (a, b) = (fpu.st(0), fpu.st(other));
    fpu.set_st(0, b);
    fpu.set_st(other, a);
    Ok(())
}

/// FCMOVcc.
pub(super) fn conditional(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let flags = &x.cpu.flags;
    let condition = match i.code() {
        Code::Fcmovb_st0_sti => flags.cf(),
        Code::Fcmovnb_st0_sti => !flags.cf(),
        Code::Fcmove_st0_sti => flags.zf(),
        Code::Fcmovne_st0_sti => !flags.zf(),
        Code::Fcmovbe_st0_sti => flags.cf() || flags.zf(),
        Code::Fcmovnbe_st0_sti => !(flags.cf() || flags.zf()),
        Code::Fcmovu_st0_sti => flags.pf(),
        _ => !flags.pf(),
    };
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    let from = st(i.op1_register());
    if fpu.is_empty(0) || fpu.is_empty(from) {
        if fpu.stack_fault(false) {
            fpu.set_number(0, Float::DEFAULT_NAN);
        }
        return Ok(());
    }
    if condition {
        fpu.set_st(0, fpu.st(from));
    }
    Ok(())
}

/// FFREE, FFREEP.
pub(super) fn free(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    fpu.clear_c1();
    fpu.set_empty(st(i.op0_register()), true);
    if pops(i) {
        fpu.pop();
    }
    Ok(())
}

/// FINCSTP, FDECSTP.
pub(super) fn rotate(x: &mut Ctx, i: &Instruction, by: usize) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    fpu.clear_c1();
    fpu.set_top(fpu.top() + by);
    Ok(())
}
