//! The host's arithmetic, where it cannot differ.
//!
//! With rounding to nearest, IEEE 754 gives one result for normal operands and a normal result.
//! Whether it was exact is not known, so callers come here only when that no longer shows:
//! the precision exception is masked and already recorded.

use super::{Env, Float, Format, add, divide, multiply};

/// An operation of two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
}

impl Operation {
    /// The exact way, for all formats.
    pub fn exact(self, env: &mut Env, format: Format, a: Float, b: Float) -> Float {
        match self {
            Operation::Add => add(env, format, a, b),
            // A NaN keeps its sign.
            Operation::Subtract if b.is_nan() => add(env, format, a, b),
            Operation::Subtract => add(env, format, a, b.negate()),
            Operation::Multiply => multiply(env, format, a, b),
            Operation::Divide => divide(env, format, a, b),
        }
    }
}

macro_rules! host {
    ($name:ident, $bits:ty, $float:ty) => {
        impl Operation {
            /// The result, unless an operand or the result is denormal, infinite, a NaN, or so
            /// near the least normal number that it may have been rounded up to it.
            #[inline]
            pub fn $name(self, a: $bits, b: $bits) -> Option<$bits> {
                const FRACTION: u32 = <$float>::MANTISSA_DIGITS - 1;
                const EXPONENTS: $bits = (1 << (<$bits>::BITS - 1 - FRACTION)) - 1;
                let zero = |bits: $bits| bits << 1 == 0;
                let normal = |bits: $bits| (2..EXPONENTS).contains(&(bits >> FRACTION & EXPONENTS));
                if !(normal(a) || zero(a)) || !(normal(b) || zero(b)) {
                    return None;
                }
                let (x, y) = (<$float>::from_bits(a), <$float>::from_bits(b));
                // Whether a zero may come out that is exact.
                let (result, zeros) = match self {
                    Operation::Add => (x + y, true),
                    Operation::Subtract => (x - y, true),
                    Operation::Multiply => (x * y, zero(a) || zero(b)),
                    Operation::Divide => (x / y, zero(a)),
                };
                let result = result.to_bits();
                (normal(result) || zeros && zero(result)).then_some(result)
            }
        }
    };
}
host!(single, u32, f32);
host!(double, u64, f64);
