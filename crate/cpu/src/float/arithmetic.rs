//! The five operations and comparison.

use core::cmp::Ordering;

use super::{Env, Float, Format, Kind, Rounding, note_denormal, propagate, round};
use crate::fpu::exception;

/// `a + b`.
pub(crate) fn add(env: &mut Env, format: Format, a: Float, b: Float) -> Float {
    if let Some(nan) = propagate(env, a, b) {
        return nan;
    }
    if a.is_infinite() && b.is_infinite() && a.sign != b.sign {
        return env.invalid();
    }
    note_denormal(env, &[a, b]);
    match (a.kind, b.kind) {
        (Kind::Infinity, _) => a,
        (_, Kind::Infinity) => b,
        (Kind::Zero, Kind::Zero) if a.sign == b.sign => a,
        (Kind::Zero, Kind::Zero) => exact_zero(env),
        (Kind::Zero, _) => round_single(env, format, b),
        (_, Kind::Zero) => round_single(env, format, a),
        _ => add_finite(env, format, a, b),
    }
}

/// The zero of a difference of equals.
fn exact_zero(env: &Env) -> Float {
    Float::zero(env.rounding == Rounding::Down)
}

fn round_single(env: &mut Env, format: Format, a: Float) -> Float {
    let significand = u128::from(a.significand) << 64;
    round(env, format, a.sign, a.exponent, significand, false)
}

fn add_finite(env: &mut Env, format: Format, a: Float, b: Float) -> Float {
    let (large, small) = if (a.exponent, a.significand) >= (b.exponent, b.significand) {
        (a, b)
    } else {
        (b, a)
    };
    // One bit of room above, 63 below: two numbers further apart than that only leave a trace.
    let distance = (large.exponent - small.exponent) as u32;
    let wide = |value: Float| u128::from(value.significand) << 63;
    let (aligned, sticky) = if distance < 127 {
        let aligned = wide(small) >> distance;
        (aligned, aligned << distance != wide(small))
    } else {
        (0, true)
    };
    let sum = if large.sign == small.sign {
        wide(large) + aligned
    } else {
        wide(large) - aligned - u128::from(sticky)
    };
    if sum == 0 {
        return exact_zero(env);
    }
    let shift = sum.leading_zeros();
    let exponent = large.exponent + 1 - shift as i32;
    round(env, format, large.sign, exponent, sum << shift, sticky)
}

/// `a * b`.
pub(crate) fn multiply(env: &mut Env, format: Format, a: Float, b: Float) -> Float {
    if let Some(nan) = propagate(env, a, b) {
        return nan;
    }
    if a.is_infinite() && b.is_zero() || a.is_zero() && b.is_infinite() {
        return env.invalid();
    }
    note_denormal(env, &[a, b]);
    let sign = a.sign != b.sign;
    if a.is_infinite() || b.is_infinite() {
        return Float::infinity(sign);
    }
    if a.is_zero() || b.is_zero() {
        return Float::zero(sign);
    }
    let product = u128::from(a.significand) * u128::from(b.significand);
    let shift = product.leading_zeros();
    let exponent = a.exponent + b.exponent + 1 - shift as i32;
    round(env, format, sign, exponent, product << shift, false)
}

/// `a / b`.
pub(crate) fn divide(env: &mut Env, format: Format, a: Float, b: Float) -> Float {
    if let Some(nan) = propagate(env, a, b) {
        return nan;
    }
    if a.is_infinite() && b.is_infinite() || a.is_zero() && b.is_zero() {
        return env.invalid();
    }
    let sign = a.sign != b.sign;
    if b.is_zero() && !a.is_infinite() {
        env.raise(exception::DIVIDE);
        return Float::infinity(sign);
    }
    note_denormal(env, &[a, b]);
    if a.is_infinite() {
        return Float::infinity(sign);
    }
    if a.is_zero() || b.is_infinite() {
        return Float::zero(sign);
    }
    let divisor = u128::from(b.significand);
    let dividend = u128::from(a.significand) << 64;
    // 64 or 65 bits of quotient, then two more.
    let quotient = dividend / divisor;
    let rest = (dividend % divisor) << 2;
    let quotient = (quotient << 2) | (rest / divisor);
    let shift = quotient.leading_zeros();
    let exponent = a.exponent - b.exponent + (127 - 66) - shift as i32;
    let sticky = rest % divisor != 0;
    round(env, format, sign, exponent, quotient << shift, sticky)
}

/// The square root of `a`.
pub(crate) fn square_root(env: &mut Env, format: Format, a: Float) -> Float {
    if let Some(nan) = propagate(env, a, a) {
        return nan;
    }
    if a.is_zero() {
        return a;
    }
    if a.sign {
        return env.invalid();
    }
    note_denormal(env, &[a]);
    if a.is_infinite() {
        return a;
    }
    let radicand = u128::from(a.significand) << (63 + (a.exponent & 1));
    let root = radicand.isqrt();
    let rest = radicand - root * root;
    // The bit after the root's 64: (root + 1/2)^2 = root^2 + root + 1/4.
    let half = u128::from(rest > root);
    round(
        env,
        format,
        false,
        a.exponent >> 1,
        root << 64 | half << 63,
        rest != 0,
    )
}

/// How `a` and `b` compare; `None` for NaNs. An ordering comparison of a quiet NaN is invalid, a
/// `quiet` one is not.
pub(crate) fn compare(env: &mut Env, a: Float, b: Float, quiet: bool) -> Option<Ordering> {
    if propagate(env, a, b).is_some() {
        if !quiet {
            env.raise(exception::INVALID);
        }
        return None;
    }
    note_denormal(env, &[a, b]);
    let order = |v: Float| {
        let magnitude = match v.kind {
            Kind::Zero => return (0, 0, 0),
            Kind::Infinity => (i32::MAX, 0),
            _ => (v.exponent, v.significand),
        };
        (1, magnitude.0, magnitude.1)
    };
    let side = |v: Float| {
        if v.is_zero() {
            0
        } else if v.sign {
            -1
        } else {
            1
        }
    };
    Some(side(a).cmp(&side(b)).then_with(|| {
        if a.sign {
            order(b).cmp(&order(a))
        } else {
            order(a).cmp(&order(b))
        }
    }))
}
