//! Against the host's own arithmetic, which IEEE 754 fixes for rounding to nearest.

use super::*;
use crate::fpu::exception as e;

fn env() -> Env {
    Env {
        rounding: Rounding::Nearest,
        masked: e::ALL,
        daz: false,
        ftz: false,
        nan_rule: NanRule::First,
        raised: 0,
        rounded_up: false,
    }
}

/// Numbers of every kind: random bits with the exponent drawn towards interesting ones.
fn numbers(seed: &mut u64) -> u64 {
    *seed = seed
        .wrapping_mul(6364136223846793005)
        .wrapping_add(1442695040888963407);
    let random = *seed ^ *seed >> 29;
    match random % 8 {
        4 => 0,
        0 => random & 0x800f_ffff_ffff_ffff,
        1 => random & 0xfff0_0000_0000_0000,
        2 => random & 0x800f_ffff_ffff_ffff | 0x3ff0_0000_0000_0000,
        3 => random & 0x801f_ffff_0000_0000 | 0x7fe0_0000_0000_0000,
        _ => random,
    }
}

#[test]
fn doubles_agree_with_the_host() {
    let mut seed = 1;
    for _ in 0..200_000 {
        let (a, b) = (numbers(&mut seed), numbers(&mut seed));
        let (x, y) = (f64::from_bits(a), f64::from_bits(b));
        for (operation, expected) in [
            (Operation::Add, x + y),
            (Operation::Subtract, x - y),
            (Operation::Multiply, x * y),
            (Operation::Divide, x / y),
        ] {
            let format = Format::DOUBLE;
            let exact = operation.exact(&mut env(), format, format.decode(a), format.decode(b));
            if expected.is_nan() {
                assert!(exact.is_nan());
            } else {
                assert_eq!(
                    format.encode(exact),
                    expected.to_bits(),
                    "{operation:?} {x:e} {y:e}"
                );
            }
            if let Some(fast) = operation.double(a, b) {
                assert_eq!(fast, expected.to_bits());
                let mut env = env();
                operation.exact(&mut env, format, format.decode(a), format.decode(b));
                assert_eq!(env.raised & !e::PRECISION, 0, "{operation:?} {x:e} {y:e}");
            }
        }
    }
}

#[test]
fn singles_agree_with_the_host() {
    let mut seed = 2;
    for _ in 0..200_000 {
        let (a, b) = (numbers(&mut seed), numbers(&mut seed));
        let (a, b) = ((a >> 32) as u32, (b >> 32) as u32);
        let (x, y) = (f32::from_bits(a), f32::from_bits(b));
        let format = Format::SINGLE;
        for (operation, expected) in [
            (Operation::Add, x + y),
            (Operation::Multiply, x * y),
            (Operation::Divide, x / y),
        ] {
            let (p, q) = (format.decode(a.into()), format.decode(b.into()));
            let exact = operation.exact(&mut env(), format, p, q);
            if !expected.is_nan() {
                assert_eq!(format.encode(exact), u64::from(expected.to_bits()));
            }
        }
        let wide = numbers(&mut seed) >> 2 | 1 << 61;
        let narrowed = convert(&mut env(), format, Format::DOUBLE.decode(wide));
        let expected = f64::from_bits(wide) as f32;
        assert_eq!(format.encode(narrowed), u64::from(expected.to_bits()));
    }
}

#[test]
fn flags_tell_overflow_underflow_and_inexact() {
    let format = Format::SINGLE;
    let number = |v: f32| format.decode(v.to_bits().into());
    let flags = |operation: Operation, a, b, masked| {
        let mut env = Env { masked, ..env() };
        operation.exact(&mut env, format, number(a), number(b));
        env.raised
    };
    use Operation::*;
    assert_eq!(flags(Add, 1.0, 2.0, e::ALL), 0);
    assert_eq!(flags(Divide, 1.0, 3.0, e::ALL), e::PRECISION);
    assert_eq!(flags(Divide, 1.0, 0.0, e::ALL), e::DIVIDE);
    assert_eq!(flags(Divide, 0.0, 0.0, e::ALL), e::INVALID);
    assert_eq!(
        flags(Multiply, f32::MAX, 2.0, e::ALL),
        e::OVERFLOW | e::PRECISION
    );
    assert_eq!(flags(Multiply, f32::MIN_POSITIVE, 0.5, e::ALL), 0);
    assert_eq!(flags(Multiply, f32::MIN_POSITIVE, 0.5, 0), e::UNDERFLOW);
    let least = f32::from_bits(1);
    assert_eq!(
        flags(Multiply, least, 0.5, e::ALL),
        e::DENORMAL | e::UNDERFLOW | e::PRECISION
    );
    assert_eq!(
        flags(Subtract, f32::INFINITY, f32::INFINITY, e::ALL),
        e::INVALID
    );
}

#[test]
fn directed_rounding_brackets_the_value() {
    let format = Format::DOUBLE;
    let third = |rounding| {
        let mut env = Env { rounding, ..env() };
        let result = divide(
            &mut env,
            format,
            format.decode(1f64.to_bits()),
            format.decode((-3f64).to_bits()),
        );
        format.encode(result)
    };
    let nearest = (1.0f64 / -3.0).to_bits();
    assert_eq!(third(Rounding::Nearest), nearest);
    assert_eq!(third(Rounding::Zero), nearest);
    assert_eq!(third(Rounding::Up), nearest);
    assert_eq!(third(Rounding::Down), nearest + 1);
}

#[test]
fn roots_are_rounded_correctly() {
    let format = Format::DOUBLE;
    let root = |v: f64| {
        let mut env = env();
        let root = square_root(&mut env, format, format.decode(v.to_bits()));
        (f64::from_bits(format.encode(root)), env.raised)
    };
    assert_eq!(root(4.0), (2.0, 0));
    assert_eq!(root(2.0), (core::f64::consts::SQRT_2, e::PRECISION));
    assert_eq!(root(0.25), (0.5, 0));
    assert_eq!(root(-0.0), (-0.0, 0));
    assert_eq!(root(-1.0).1, e::INVALID);
}

#[test]
fn integers_out_of_range_are_indefinite() {
    let format = Format::DOUBLE;
    let convert = |v: f64, bits| {
        let mut env = env();
        (
            to_integer(&mut env, format.decode(v.to_bits()), bits),
            env.raised,
        )
    };
    assert_eq!(convert(2.5, 32), (2, e::PRECISION));
    assert_eq!(convert(-3.5, 32), (-4, e::PRECISION));
    assert_eq!(convert(2147483648.0, 32), (i64::from(i32::MIN), e::INVALID));
    assert_eq!(convert(-2147483648.0, 32), (i64::from(i32::MIN), 0));
    assert_eq!(convert(f64::NAN, 16), (-32768, e::INVALID));
    assert_eq!(convert(1e-300, 64), (0, e::PRECISION));
}
