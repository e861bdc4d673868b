//! Floating-point operations on lanes, with MXCSR.

use core::cmp::Ordering;

use iced_x86::{Instruction, OpKind};

use super::lanes::{Lane, Vector};
use super::{load, source, xmm};
use crate::flags::bit;
use crate::float::{self, Env, Float, Format, Kind, NanRule, Operation, Rounding};
use crate::fpu::{exception, mxcsr};
use crate::mem::Ctx;
use crate::trap::{Exec, Fault, UD};
use crate::vcpu::cr;

/// A lane that holds a single or a double.
pub(super) trait Element: Lane + Into<u64> + PartialEq {
    const FORMAT: Format;
    const BYTES: usize;
    fn from_bits(bits: u64) -> Self;
    fn fast(operation: Operation, a: Self, b: Self) -> Option<Self>;

    /// Taken apart, as MXCSR.DAZ says.
    fn decode(self, env: &Env) -> Float {
        let value = Self::FORMAT.decode(self.into());
        if env.daz && value.denormal {
            Float::zero(value.sign)
        } else {
            value
        }
    }

    fn encode(value: Float) -> Self {
        Self::from_bits(Self::FORMAT.encode(value))
    }
}

impl Element for u32 {
    const FORMAT: Format = Format::SINGLE;
    const BYTES: usize = 4;
    fn from_bits(bits: u64) -> u32 {
        bits as u32
    }
    fn fast(operation: Operation, a: u32, b: u32) -> Option<u32> {
        operation.single(a, b)
    }
}

impl Element for u64 {
    const FORMAT: Format = Format::DOUBLE;
    const BYTES: usize = 8;
    fn from_bits(bits: u64) -> u64 {
        bits
    }
    fn fast(operation: Operation, a: u64, b: u64) -> Option<u64> {
        operation.double(a, b)
    }
}

/// What MXCSR says of how to compute.
pub(super) fn environment(x: &Ctx) -> Env {
    let value = x.cpu.fpu.mxcsr;
    Env {
        rounding: Rounding::new(value >> mxcsr::ROUNDING_SHIFT),
        masked: (value >> mxcsr::MASK_SHIFT) as u8 & exception::ALL,
        daz: value & mxcsr::DAZ != 0,
        ftz: value & mxcsr::FTZ != 0,
        nan_rule: NanRule::First,
        raised: 0,
        rounded_up: false,
    }
}

/// Whether another inexact result rounded to nearest would leave no trace.
fn is_fast(x: &Ctx) -> bool {
    const ROUNDING: u32 = 3 << mxcsr::ROUNDING_SHIFT;
    const MASK: u32 = (exception::PRECISION as u32) << mxcsr::MASK_SHIFT;
    const CARED_FOR: u32 = ROUNDING | MASK | exception::PRECISION as u32;
    x.cpu.fpu.mxcsr & CARED_FOR == MASK | exception::PRECISION as u32
}

/// Records the exceptions of all lanes; #XM for unmasked ones (Vol. 1, "SIMD Floating-Point
/// Exception Conditions"). Results may be written only afterwards.
pub(super) fn finish(x: &mut Ctx, env: &Env) -> Exec {
    let mut raised = env.raised;
    let unmasked = raised & !env.masked;
    if unmasked & exception::BEFORE != 0 {
        raised &= exception::BEFORE;
    }
    x.cpu.fpu.mxcsr |= u32::from(raised);
    if unmasked == 0 {
        return Ok(());
    }
    if x.cpu.cr4 & cr::CR4_OSXMMEXCPT == 0 {
        return Err(UD);
    }
    Err(Fault::Simd.into())
}

/// Which lanes of the vectors take part.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Lanes {
    Lowest,
    All,
}

/// The second operand: a register or memory of the size that the lanes need.
fn second<E: Element>(x: &mut Ctx, i: &Instruction, lanes: Lanes) -> Exec<Vector> {
    match (i.op1_kind(), lanes) {
        (OpKind::Memory, Lanes::Lowest) => load(x, i, E::BYTES, false),
        _ => source(x, i, 1),
    }
}

/// The first operand becomes `f` of both, lane by lane.
#[inline]
fn each<E: Element>(
    x: &mut Ctx,
    i: &Instruction,
    lanes: Lanes,
    f: impl Fn(&mut Env, E, E) -> E,
) -> Exec {
    x.need_sse()?;
    let b = E::split(second::<E>(x, i, lanes)?);
    let to = xmm(i.op0_register());
    let mut a = E::split(x.cpu.fpu.xmm[to]);
    let count = match lanes {
        Lanes::Lowest => 1,
        Lanes::All => 16 / E::BYTES,
    };
    let mut env = environment(x);
    for (a, b) in a.as_mut()[..count].iter_mut().zip(b.as_ref()) {
        *a = f(&mut env, *a, *b);
    }
    finish(x, &env)?;
    x.cpu.fpu.xmm[to] = E::join(a);
    Ok(())
}

fn exact<E: Element>(env: &mut Env, operation: Operation, a: E, b: E) -> E {
    let (p, q) = (a.decode(env), b.decode(env));
    E::encode(operation.exact(env, E::FORMAT, p, q))
}

/// ADDPS and its kin.
pub(super) fn arithmetic<E: Element>(
    x: &mut Ctx,
    i: &Instruction,
    lanes: Lanes,
    operation: Operation,
) -> Exec {
    if is_fast(x) {
        return each::<E>(x, i, lanes, |env, a, b| {
            E::fast(operation, a, b).unwrap_or_else(|| exact(env, operation, a, b))
        });
    }
    each::<E>(x, i, lanes, |env, a, b| exact(env, operation, a, b))
}

/// SQRTPS and its kin.
pub(super) fn square_root<E: Element>(x: &mut Ctx, i: &Instruction, lanes: Lanes) -> Exec {
    each::<E>(x, i, lanes, |env, _, b| {
        let value = b.decode(env);
        E::encode(float::square_root(env, E::FORMAT, value))
    })
}

/// MINPS, MAXPS and their kin: the second operand wherever neither is `wanted` of the other.
pub(super) fn extreme<E: Element>(
    x: &mut Ctx,
    i: &Instruction,
    lanes: Lanes,
    wanted: Ordering,
) -> Exec {
    each::<E>(x, i, lanes, |env, a, b| {
        let (p, q) = (a.decode(env), b.decode(env));
        let chosen = if float::compare(env, p, q, false) == Some(wanted) {
            (a, p)
        } else {
            (b, q)
        };
        if chosen.1.is_zero() {
            E::encode(chosen.1)
        } else {
            chosen.0
        }
    })
}

/// CMPPS and its kin: all ones where the predicate holds.
pub(super) fn predicate<E: Element>(x: &mut Ctx, i: &Instruction, lanes: Lanes) -> Exec {
    let predicate = i.immediate8() & 7;
    each::<E>(x, i, lanes, |env, a, b| {
        let (p, q) = (a.decode(env), b.decode(env));
        // Less and less-or-equal, and their opposites, are invalid of quiet NaNs too.
        let order = float::compare(env, p, q, !matches!(predicate & 3, 1 | 2));
        let holds = match predicate & 3 {
            0 => order == Some(Ordering::Equal),
            1 => order == Some(Ordering::Less),
            2 => matches!(order, Some(Ordering::Less | Ordering::Equal)),
            _ => order.is_none(),
        };
        E::from_bits(if holds != (predicate & 4 != 0) { !0 } else { 0 })
    })
}

/// COMISS, COMISD; UCOMISS and UCOMISD are `quiet`.
pub(super) fn compare<E: Element>(x: &mut Ctx, i: &Instruction, quiet: bool) -> Exec {
    x.need_sse()?;
    let b = E::split(second::<E>(x, i, Lanes::Lowest)?).as_ref()[0];
    let a = E::split(x.cpu.fpu.xmm[xmm(i.op0_register())]).as_ref()[0];
    let mut env = environment(x);
    let (p, q) = (a.decode(&env), b.decode(&env));
    let order = float::compare(&mut env, p, q, quiet);
    finish(x, &env)?;
    x.cpu.flags.set_arithmetic(comparison_flags(order));
    Ok(())
}

/// ZF, PF and CF of a comparison.
pub(crate) fn comparison_flags(order: Option<Ordering>) -> u64 {
    match order {
        None => bit::ZF | bit::PF | bit::CF,
        Some(Ordering::Less) => bit::CF,
        Some(Ordering::Equal) => bit::ZF,
        Some(Ordering::Greater) => 0,
    }
}

/// ADDSUBPS, ADDSUBPD: differences in even lanes, sums in odd ones.
pub(super) fn add_subtract<E: Element>(x: &mut Ctx, i: &Instruction) -> Exec {
    across::<E>(x, i, |a, b, n| {
        let operation = if n % 2 == 0 {
            Operation::Subtract
        } else {
            Operation::Add
        };
        (operation, a[n], b[n])
    })
}

/// HADDPS, HSUBPS and the like: neighbours of the first operand, then of the second.
pub(super) fn horizontal<E: Element>(x: &mut Ctx, i: &Instruction, operation: Operation) -> Exec {
    across::<E>(x, i, |a, b, n| {
        let from = if 2 * n < a.len() { a } else { b };
        let n = 2 * n % a.len();
        (operation, from[n], from[n + 1])
    })
}

/// Each lane of the result by an operation on lanes from anywhere.
fn across<E: Element>(
    x: &mut Ctx,
    i: &Instruction,
    choose: impl Fn(&[E], &[E], usize) -> (Operation, E, E),
) -> Exec {
    x.need_sse()?;
    let b = E::split(source(x, i, 1)?);
    let to = xmm(i.op0_register());
    let a = E::split(x.cpu.fpu.xmm[to]);
    let mut result = E::split(0);
    let mut env = environment(x);
    for (n, lane) in result.as_mut().iter_mut().enumerate() {
        let (operation, p, q) = choose(a.as_ref(), b.as_ref(), n);
        *lane = exact(&mut env, operation, p, q);
    }
    finish(x, &env)?;
    x.cpu.fpu.xmm[to] = E::join(result);
    Ok(())
}

/// RCPPS, RCPSS.
pub(super) fn reciprocal(x: &mut Ctx, i: &Instruction, lanes: Lanes) -> Exec {
    each::<u32>(x, i, lanes, |_, _, b| approximate_reciprocal(b))
}

/// RSQRTPS, RSQRTSS.
pub(super) fn reciprocal_root(x: &mut Ctx, i: &Instruction, lanes: Lanes) -> Exec {
    each::<u32>(x, i, lanes, |_, _, b| approximate_reciprocal_root(b))
}

/// Operands of the approximations: denormals count as zero whatever DAZ says.
fn decode_flushed(bits: u32) -> Float {
    let value = Format::SINGLE.decode(bits.into());
    if value.denormal {
        Float::zero(value.sign)
    } else {
        value
    }
}

/// No exceptions, no traces, results to nearest.
const SILENT: Env = Env {
    rounding: Rounding::Nearest,
    masked: exception::ALL,
    daz: true,
    ftz: true,
    nan_rule: NanRule::First,
    raised: 0,
    rounded_up: false,
};

/// Twelve bits of significand: an error of at most 2^-12, where 1.5 * 2^-12 is allowed (Vol. 2,
/// RCPPS). Which approximation it is differs among processors.
const APPROXIMATE: Format = Format {
    precision: 12,
    ..Format::SINGLE
};

fn approximate_reciprocal(bits: u32) -> u32 {
    let value = decode_flushed(bits);
    let one = Float::finite(false, 0, 1 << 63);
    let result = match value.kind {
        Kind::Nan => value.quiet(),
        // Tiny results become zero, judged by the exact value.
        Kind::Finite if (value.exponent, value.significand) > (126, 1 << 63) => {
            Float::zero(value.sign)
        }
        _ => float::divide(&mut SILENT.clone(), APPROXIMATE, one, value),
    };
    Format::SINGLE.encode(result) as u32
}

fn approximate_reciprocal_root(bits: u32) -> u32 {
    let value = decode_flushed(bits);
    let one = Float::finite(false, 0, 1 << 63);
    let result = match value.kind {
        Kind::Nan => value.quiet(),
        Kind::Zero => Float::infinity(value.sign),
        _ if value.sign => Float::DEFAULT_NAN,
        Kind::Infinity => Float::zero(false),
        _ => {
            let root = float::square_root(&mut SILENT.clone(), Format::EXTENDED, value);
            float::divide(&mut SILENT.clone(), APPROXIMATE, one, root)
        }
    };
    Format::SINGLE.encode(result) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn approximations_are_within_their_bound() {
        for n in 0..60_000u32 {
            let bits = 0x0100_0000 + n * 35_000;
            let value = f64::from(f32::from_bits(bits));
            if !(1e-36..1e36).contains(&value) {
                continue;
            }
            let bound = 1.5 / 4096.0;
            let r = f64::from(f32::from_bits(approximate_reciprocal(bits)));
            assert!((r * value - 1.0).abs() <= bound, "{value:e}");
            let r = f64::from(f32::from_bits(approximate_reciprocal_root(bits)));
            assert!((r * r * value - 1.0).abs() <= 2.0 * bound, "{value:e}");
        }
        assert_eq!(approximate_reciprocal(0x8000_0001), 0xff80_0000);
        assert_eq!(approximate_reciprocal(0xff80_0000), 0x8000_0000);
        assert_eq!(approximate_reciprocal(0x7f00_0000), 0);
        assert_eq!(approximate_reciprocal_root(0xbf80_0000), 0xffc0_0000);
        assert_eq!(approximate_reciprocal_root(0x7f80_0001), 0x7fc0_0001);
    }
}
