//! Between floating point and integers.

use super::{Env, Float, Format, Kind, Rounding, cut, round};
use crate::fpu::exception;

/// An integer, rounded to a format.
pub(crate) fn from_integer(env: &mut Env, format: Format, value: i64) -> Float {
    if value == 0 {
        return Float::zero(false);
    }
    let exact = Float::finite(value < 0, 63, value.unsigned_abs());
    let significand = u128::from(exact.significand) << 64;
    round(env, format, exact.sign, exact.exponent, significand, false)
}

/// The magnitude rounded to an integer of at most 64 bits, and whether that was inexact.
fn magnitude(env: &mut Env, value: Float) -> Option<(u64, bool)> {
    if value.exponent > 63 {
        return None;
    }
    let significand = u128::from(value.significand) << 64;
    let (kept, inexact, up) = cut(env, value.sign, significand, false, value.exponent + 1);
    env.rounded_up = up;
    Some((u64::try_from(kept).ok()?, inexact))
}

/// An integer of `bits` bits; the integer indefinite (the least number) where there is none.
pub(crate) fn to_integer(env: &mut Env, value: Float, bits: u32) -> i64 {
    let least = i64::MIN >> (64 - bits);
    let rounded = match value.kind {
        Kind::Zero => return 0,
        Kind::Finite => magnitude(env, value),
        _ => None,
    };
    let limit = least.unsigned_abs();
    match rounded {
        Some((magnitude, inexact)) if magnitude < limit || value.sign && magnitude == limit => {
            if inexact {
                env.raise(exception::PRECISION);
            }
            let magnitude = magnitude as i64;
            if value.sign {
                magnitude.wrapping_neg()
            } else {
                magnitude
            }
        }
        _ => {
            env.rounded_up = false;
            env.raise(exception::INVALID);
            least
        }
    }
}

/// A finite number rounded to an integral one.
pub(crate) fn round_to_integral(env: &mut Env, value: Float) -> Float {
    if value.kind != Kind::Finite || value.exponent >= 63 {
        return value;
    }
    let significand = u128::from(value.significand) << 64;
    let (kept, inexact, up) = cut(env, value.sign, significand, false, value.exponent + 1);
    env.rounded_up = up;
    if inexact {
        env.raise(exception::PRECISION);
    }
    super::assemble(value.sign, 0, kept)
}

/// As `f`, rounding toward zero.
pub(crate) fn truncating<T>(env: &mut Env, f: impl FnOnce(&mut Env) -> T) -> T {
    let rounding = env.rounding;
    env.rounding = Rounding::Zero;
    let result = f(env);
    env.rounding = rounding;
    result
}
