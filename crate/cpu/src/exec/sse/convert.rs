//! Conversions among singles, doubles and integers.

use iced_x86::{Instruction, OpKind};

use super::float::{Element, environment, finish};
use super::lanes::{Lane, Vector};
use super::{load, mm, source, xmm};
use crate::float::{self, Env, truncating};
use crate::mem::Ctx;
use crate::trap::Exec;

/// The second operand, of which the low `bytes` count: 16 from memory are aligned, 8 need not be.
fn second(x: &mut Ctx, i: &Instruction, bytes: usize) -> Exec<Vector> {
    match i.op1_kind() {
        OpKind::Memory => load(x, i, bytes, true),
        _ => source(x, i, 1),
    }
}

fn convert_float<A: Element, B: Element>(env: &mut Env, from: A) -> B {
    let value = from.decode(env);
    if !value.is_nan() {
        float::note_denormal(env, &[value]);
    }
    B::encode(float::convert(env, B::FORMAT, value))
}

/// CVTSS2SD, CVTSD2SS: the lowest lane; the others stay.
pub(super) fn scalar<A: Element, B: Element>(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    let from = A::split(second(x, i, A::BYTES)?).as_ref()[0];
    let to = xmm(i.op0_register());
    let mut env = environment(x);
    let value = convert_float::<A, B>(&mut env, from);
    finish(x, &env)?;
    let mut lanes = B::split(x.cpu.fpu.xmm[to]);
    lanes.as_mut()[0] = value;
    x.cpu.fpu.xmm[to] = B::join(lanes);
    Ok(())
}

/// CVTPS2PD, CVTPD2PS: two lanes; what is left of the register becomes zero.
pub(super) fn packed<A: Element, B: Element>(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    let from = A::split(second(x, i, 2 * A::BYTES)?);
    let mut lanes = B::split(0);
    let mut env = environment(x);
    for (to, from) in lanes.as_mut().iter_mut().zip(&from.as_ref()[..2]) {
        *to = convert_float::<A, B>(&mut env, *from);
    }
    finish(x, &env)?;
    x.cpu.fpu.xmm[xmm(i.op0_register())] = B::join(lanes);
    Ok(())
}

fn integer<E: Element>(env: &mut Env, from: E, bits: u32, truncate: bool) -> i64 {
    let value = from.decode(env);
    if truncate {
        truncating(env, |env| float::to_integer(env, value, bits))
    } else {
        float::to_integer(env, value, bits)
    }
}

/// CVTSS2SI and its kin: to a general register of 32 or 64 bits.
pub(super) fn to_general<E: Element>(x: &mut Ctx, i: &Instruction, truncate: bool) -> Exec {
    x.need_sse()?;
    let from = E::split(second(x, i, E::BYTES)?).as_ref()[0];
    let to = i.op0_register();
    let mut env = environment(x);
    let value = integer(&mut env, from, 8 * to.size() as u32, truncate);
    finish(x, &env)?;
    x.cpu.set_reg(to, value as u64);
    Ok(())
}

/// CVTSI2SS, CVTSI2SD.
pub(super) fn from_general<E: Element>(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    let value = match x.operand_size(i, 1) {
        4 => i64::from(x.operand(i, 1)? as i32),
        _ => x.operand(i, 1)? as i64,
    };
    let to = xmm(i.op0_register());
    let mut env = environment(x);
    let value = E::encode(float::from_integer(&mut env, E::FORMAT, value));
    finish(x, &env)?;
    let mut lanes = E::split(x.cpu.fpu.xmm[to]);
    lanes.as_mut()[0] = value;
    x.cpu.fpu.xmm[to] = E::join(lanes);
    Ok(())
}

/// CVTPS2DQ, CVTPD2DQ and the truncating ones: to doublewords, as many as there are lanes; the
/// rest of the register becomes zero.
pub(super) fn to_doublewords<E: Element>(x: &mut Ctx, i: &Instruction, truncate: bool) -> Exec {
    x.need_sse()?;
    let from = E::split(second(x, i, 16)?);
    let mut lanes = [0i32; 4];
    let mut env = environment(x);
    for (to, from) in lanes.iter_mut().zip(from.as_ref()) {
        *to = integer(&mut env, *from, 32, truncate) as i32;
    }
    finish(x, &env)?;
    x.cpu.fpu.xmm[xmm(i.op0_register())] = i32::join(lanes);
    Ok(())
}

/// CVTDQ2PS, CVTDQ2PD: from doublewords, as many as there are lanes.
pub(super) fn from_doublewords<E: Element>(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    let count = 16 / E::BYTES;
    let from = i32::split(second(x, i, 4 * count)?);
    let mut lanes = E::split(0);
    let mut env = environment(x);
    for (to, from) in lanes.as_mut().iter_mut().zip(from) {
        *to = E::encode(float::from_integer(&mut env, E::FORMAT, from.into()));
    }
    finish(x, &env)?;
    x.cpu.fpu.xmm[xmm(i.op0_register())] = E::join(lanes);
    Ok(())
}

/// CVTPI2PS, CVTPI2PD: two doublewords of an MMX register or memory; lanes beyond stay. Of memory
/// CVTPI2PD is no MMX instruction.
pub(super) fn from_mmx<E: Element>(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    let in_memory = i.op1_kind() == OpKind::Memory;
    let mmx = !(in_memory && E::BYTES == 8);
    if mmx {
        x.need_mmx()?;
    }
    let from = i32::split(source(x, i, 1)?);
    let to = xmm(i.op0_register());
    let mut lanes = E::split(x.cpu.fpu.xmm[to]);
    let mut env = environment(x);
    for (to, from) in lanes.as_mut().iter_mut().zip(&from[..2]) {
        *to = E::encode(float::from_integer(&mut env, E::FORMAT, (*from).into()));
    }
    if mmx {
        x.cpu.fpu.enter_mmx();
    }
    finish(x, &env)?;
    x.cpu.fpu.xmm[to] = E::join(lanes);
    Ok(())
}

/// CVTPS2PI, CVTPD2PI and the truncating ones: two lanes to doublewords of an MMX register.
pub(super) fn to_mmx<E: Element>(x: &mut Ctx, i: &Instruction, truncate: bool) -> Exec {
    x.need_sse()?;
    x.need_mmx()?;
    let from = E::split(second(x, i, 2 * E::BYTES)?);
    let mut lanes = [0i32; 4];
    let mut env = environment(x);
    for (to, from) in lanes.iter_mut().zip(&from.as_ref()[..2]) {
        *to = integer(&mut env, *from, 32, truncate) as i32;
    }
    x.cpu.fpu.enter_mmx();
    finish(x, &env)?;
    x.cpu
        .fpu
        .set_mm(mm(i.op0_register()), i32::join(lanes) as u64);
    Ok(())
}
