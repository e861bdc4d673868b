//! FSCALE, FXTRACT, FPREM, FPREM1.

use iced_x86::Instruction;

use super::{begin, environment};
use crate::float::{self, Env, Float, Format, Kind, encode_extended, truncating};
use crate::fpu::{exception, status};
use crate::mem::Ctx;
use crate::trap::Exec;

/// FSCALE: ST(0) by two to the power of ST(1)'s integral part.
pub(super) fn scale(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    if fpu.is_empty(0) || fpu.is_empty(1) {
        if fpu.stack_fault(false) {
            fpu.set_number(0, Float::DEFAULT_NAN);
        }
        return Ok(());
    }
    let mut env = environment(fpu);
    let result = scaled(&mut env, fpu.number(0), fpu.number(1));
    if fpu.settle(&env) {
        fpu.set_number(0, result);
    }
    Ok(())
}

fn scaled(env: &mut Env, value: Float, by: Float) -> Float {
    if let Some(nan) = float::propagate(env, value, by) {
        return nan;
    }
    if by.is_infinite() {
        if by.sign && value.is_infinite() || !by.sign && value.is_zero() {
            return env.invalid();
        }
        float::note_denormal(env, &[value]);
        return if by.sign {
            Float::zero(value.sign)
        } else {
            Float::infinity(value.sign)
        };
    }
    float::note_denormal(env, &[value, by]);
    if value.kind != Kind::Finite {
        return value;
    }
    // Further than this everything overflows or vanishes.
    const FAR: i64 = 0x1_0000;
    let mut silent = Env {
        masked: exception::ALL,
        ..*env
    };
    let by_sign = by.sign;
    let by = match truncating(&mut silent, |env| float::to_integer(env, by, 64)) {
        i64::MIN if by_sign => -FAR,
        i64::MIN => FAR,
        by => by.clamp(-FAR, FAR),
    };
    let scaled = Float {
        exponent: value.exponent + by as i32,
        ..value
    };
    float::convert(env, Format::EXTENDED, scaled)
}

/// FXTRACT: the exponent into ST(0), then the significand pushed.
pub(super) fn extract(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    let overflow = !fpu.is_empty(7);
    if fpu.is_empty(0) || overflow {
        if fpu.stack_fault(overflow && !fpu.is_empty(0)) {
            fpu.set_number(0, Float::DEFAULT_NAN);
            fpu.push_bits(encode_extended(Float::DEFAULT_NAN));
        }
        return Ok(());
    }
    let mut env = environment(fpu);
    let value = fpu.number(0);
    let (exponent, significand) = match float::propagate(&mut env, value, value) {
        Some(nan) => (nan, nan),
        None => parts(&mut env, value),
    };
    if fpu.settle(&env) {
        fpu.set_number(0, exponent);
        fpu.push_bits(encode_extended(significand));
    }
    Ok(())
}

fn parts(env: &mut Env, value: Float) -> (Float, Float) {
    match value.kind {
        Kind::Zero => {
            env.raise(exception::DIVIDE);
            (Float::infinity(true), value)
        }
        Kind::Infinity => (Float::infinity(false), value),
        _ => {
            float::note_denormal(env, &[value]);
            let exponent = float::from_integer(env, Format::EXTENDED, value.exponent.into());
            let significand = Float {
                exponent: 0,
                denormal: false,
                ..value
            };
            (exponent, significand)
        }
    }
}

/// FPREM truncates the quotient, FPREM1 rounds it to nearest.
pub(super) fn remainder(x: &mut Ctx, i: &Instruction, nearest: bool) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    fpu.status &= !status::C2;
    if fpu.is_empty(0) || fpu.is_empty(1) {
        if fpu.stack_fault(false) {
            fpu.set_number(0, Float::DEFAULT_NAN);
        }
        return Ok(());
    }
    let mut env = environment(fpu);
    let (result, quotient) = partial_remainder(&mut env, fpu.number(0), fpu.number(1), nearest);
    if !fpu.settle(&env) {
        return Ok(());
    }
    fpu.set_number(0, result);
    const CODES: u16 = status::C0 | status::C1 | status::C2 | status::C3;
    let codes = match quotient {
        None => status::C2,
        Some(quotient) => [(4, status::C0), (2, status::C3), (1, status::C1)]
            .iter()
            .filter(|(bit, _)| quotient & bit != 0)
            .fold(0, |codes, (_, code)| codes | code),
    };
    fpu.status = fpu.status & !CODES | codes;
    Ok(())
}

/// The remainder with the quotient's low bits, or without them where it is only a partial one.
fn partial_remainder(env: &mut Env, a: Float, b: Float, nearest: bool) -> (Float, Option<u64>) {
    if let Some(nan) = float::propagate(env, a, b) {
        return (nan, Some(0));
    }
    if a.is_infinite() || b.is_zero() {
        return (env.invalid(), Some(0));
    }
    float::note_denormal(env, &[a, b]);
    if a.is_zero() {
        return (a, Some(0));
    }
    if b.is_infinite() {
        return (float::convert(env, Format::EXTENDED, a), Some(0));
    }
    let distance = a.exponent - b.exponent;
    // One step removes between 32 and 63 bits of quotient.
    let step = if distance < 64 {
        distance
    } else {
        distance & 31 | 32
    };
    if distance < -1 {
        return (float::convert(env, Format::EXTENDED, a), Some(0));
    }
    // In units of half the last place of `b`, so that a distance of -1 fits too.
    let divisor = u128::from(b.significand) << 1;
    let mut rest = if step < 0 {
        u128::from(a.significand)
    } else {
        u128::from(a.significand) << 1
    };
    let mut quotient = 0u64;
    for n in 0..=step.max(0) {
        if n > 0 {
            rest <<= 1;
        }
        quotient <<= 1;
        if rest >= divisor {
            rest -= divisor;
            quotient |= 1;
        }
    }
    let complete = distance < 64;
    let mut sign = a.sign;
    if complete && nearest {
        let twice = rest << 1;
        if twice > divisor || twice == divisor && quotient & 1 != 0 {
            rest = divisor - rest;
            sign = !sign;
            quotient = quotient.wrapping_add(1);
        }
    }
    let unit = if complete {
        b.exponent
    } else {
        a.exponent - step
    };
    let result = if rest == 0 {
        Float::zero(a.sign)
    } else {
        // `rest` has at most 65 bits, and is a multiple of 2 if it has 65.
        let shift = rest.leading_zeros();
        let exponent = unit + 63 - shift as i32;
        float::round(env, Format::EXTENDED, sign, exponent, rest << shift, false)
    };
    (result, complete.then_some(quotient))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(value: f64) -> Float {
        Format::DOUBLE.decode(value.to_bits())
    }

    fn value(number: Float) -> f64 {
        f64::from_bits(Format::DOUBLE.encode(number))
    }

    fn env() -> Env {
        Env {
            rounding: float::Rounding::Nearest,
            masked: exception::ALL,
            daz: false,
            ftz: false,
            nan_rule: float::NanRule::Larger,
            raised: 0,
            rounded_up: false,
        }
    }

    #[test]
    fn remainders_are_exact_and_give_the_quotient() {
        for (a, b, truncated, nearest) in [
            (7.0, 2.0, (1.0, 3), (-1.0, 4)),
            (-7.0, 2.0, (-1.0, 3), (1.0, 4)),
            (5.0, 2.0, (1.0, 2), (1.0, 2)),
            (1.0, 1.5, (1.0, 0), (-0.5, 1)),
            (0.25, 1.0, (0.25, 0), (0.25, 0)),
            (6.0, 3.0, (0.0, 2), (0.0, 2)),
            (1e10, 3.0, (1.0, 3333333333), (1.0, 3333333333)),
        ] {
            for (nearest, (rest, quotient)) in [(false, truncated), (true, nearest)] {
                let mut env = env();
                let (r, q) = partial_remainder(&mut env, number(a), number(b), nearest);
                assert_eq!(
                    (value(r), q, env.raised),
                    (rest, Some(quotient), 0),
                    "{a} {b}"
                );
            }
        }
    }

    #[test]
    fn a_large_quotient_is_reduced_in_steps() {
        let (mut a, b) = (number(1e300), number(7.0));
        let mut steps = 0;
        loop {
            let (rest, quotient) = partial_remainder(&mut env(), a, b, false);
            a = rest;
            steps += 1;
            if quotient.is_some() {
                break;
            }
        }
        assert_eq!(value(a), 1e300 % 7.0);
        assert!(steps > 10);
    }

    #[test]
    fn scaling_truncates_and_overflows() {
        let by = |a, b| value(scaled(&mut env(), number(a), number(b)));
        assert_eq!(by(3.0, 2.9), 12.0);
        assert_eq!(by(3.0, -1.9), 1.5);
        assert!(scaled(&mut env(), number(1.0), number(1e30)).is_infinite());
        assert!(scaled(&mut env(), number(1.0), number(-1e30)).is_zero());
    }
}
