//! Floating point in integers: the exact value, then one rounding, with the exceptions of SSE and
//! x87 (Vol. 1, "Overview of Floating-Point Exceptions"). Nothing here uses the host's arithmetic
//! but `fast`, where its results are proved equal.

mod arithmetic;
mod fast;
mod integer;

pub(crate) use arithmetic::{add, compare, divide, multiply, square_root};
pub(crate) use fast::Operation;
pub(crate) use integer::{from_integer, round_to_integral, to_integer, truncating};

use crate::fpu::exception;

/// Rounding control, in its encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    Nearest,
    Down,
    Up,
    Zero,
}

impl Rounding {
    /// From the low two bits.
    pub fn new(bits: u32) -> Rounding {
        match bits & 3 {
            0 => Rounding::Nearest,
            1 => Rounding::Down,
            2 => Rounding::Up,
            _ => Rounding::Zero,
        }
    }
}

/// Which of two NaNs becomes the result (Vol. 1, "Rules for Handling NaNs").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NanRule {
    /// SSE: the first operand's.
    First,
    /// x87: the quiet one, or that with the larger significand.
    Larger,
}

/// How to compute, and what came of it besides the result.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Env {
    pub rounding: Rounding,
    /// Masked exceptions.
    pub masked: u8,
    /// Denormal operands count as zero.
    pub daz: bool,
    /// Tiny results become zero where underflow is masked.
    pub ftz: bool,
    pub nan_rule: NanRule,
    /// Exceptions found.
    pub raised: u8,
    /// The last rounding went away from zero.
    pub rounded_up: bool,
}

impl Env {
    pub fn raise(&mut self, exceptions: u8) {
        self.raised |= exceptions;
    }

    fn is_masked(&self, exception: u8) -> bool {
        self.masked & exception != 0
    }

    /// An unmasked exception was found before anything was computed.
    pub fn no_result(&self) -> bool {
        self.raised & !self.masked & exception::BEFORE != 0
    }

    /// Invalid operation without a NaN to pass on.
    pub fn invalid(&mut self) -> Float {
        self.raise(exception::INVALID);
        Float::DEFAULT_NAN
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Zero,
    Finite,
    Infinity,
    Nan,
    /// An x87 encoding that is no number (Vol. 1, "Unsupported Double Extended-Precision
    /// Floating-Point Encodings").
    Unsupported,
}

/// A number of any format, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Float {
    pub sign: bool,
    pub kind: Kind,
    /// It came from a denormal encoding.
    pub denormal: bool,
    /// A finite number is `significand * 2^(exponent - 63)`.
    pub exponent: i32,
    /// Bit 63 is set in finite numbers and NaNs; in NaNs bit 62 says quiet.
    pub significand: u64,
}

const INTEGER_BIT: u64 = 1 << 63;
const QUIET_BIT: u64 = 1 << 62;

impl Float {
    /// The real indefinite QNaN.
    pub const DEFAULT_NAN: Float = Float {
        sign: true,
        kind: Kind::Nan,
        denormal: false,
        exponent: 0,
        significand: INTEGER_BIT | QUIET_BIT,
    };

    pub fn zero(sign: bool) -> Float {
        Float {
            sign,
            kind: Kind::Zero,
            denormal: false,
            exponent: 0,
            significand: 0,
        }
    }

    pub fn infinity(sign: bool) -> Float {
        Float {
            kind: Kind::Infinity,
            ..Float::zero(sign)
        }
    }

    /// `significand * 2^(exponent - 63)` for any significand.
    pub fn finite(sign: bool, exponent: i32, significand: u64) -> Float {
        if significand == 0 {
            return Float::zero(sign);
        }
        let shift = significand.leading_zeros();
        Float {
            kind: Kind::Finite,
            exponent: exponent - shift as i32,
            significand: significand << shift,
            ..Float::zero(sign)
        }
    }

    pub fn is_nan(&self) -> bool {
        self.kind == Kind::Nan
    }

    pub fn is_zero(&self) -> bool {
        self.kind == Kind::Zero
    }

    pub fn is_infinite(&self) -> bool {
        self.kind == Kind::Infinity
    }

    pub fn is_signaling(&self) -> bool {
        self.is_nan() && self.significand & QUIET_BIT == 0
    }

    pub fn quiet(self) -> Float {
        Float {
            significand: self.significand | QUIET_BIT,
            ..self
        }
    }

    pub fn negate(self) -> Float {
        Float {
            sign: !self.sign,
            ..self
        }
    }
}

/// A binary format, or a rounding precision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    /// Bits of significand, the leading one included.
    pub precision: i32,
    /// Exponents of normal numbers.
    pub min: i32,
    pub max: i32,
}

impl Format {
    pub const SINGLE: Format = Format {
        precision: 24,
        min: -126,
        max: 127,
    };
    pub const DOUBLE: Format = Format {
        precision: 53,
        min: -1022,
        max: 1023,
    };
    pub const EXTENDED: Format = Format {
        precision: 64,
        min: -16382,
        max: 16383,
    };

    fn fraction_bits(self) -> u32 {
        self.precision as u32 - 1
    }

    /// Takes a single or double apart.
    pub fn decode(self, bits: u64) -> Float {
        let fraction_bits = self.fraction_bits();
        let exponent_mask = (self.max as u64) << 1 | 1;
        let fraction = bits & ((1 << fraction_bits) - 1);
        let exponent = bits >> fraction_bits & exponent_mask;
        let sign = bits >> fraction_bits > exponent_mask;
        let significand = fraction << (63 - fraction_bits);
        if exponent == 0 {
            return Float {
                denormal: fraction != 0,
                ..Float::finite(sign, self.min, significand)
            };
        }
        let kind = match (exponent == exponent_mask, fraction == 0) {
            (false, _) => Kind::Finite,
            (true, true) => return Float::infinity(sign),
            (true, false) => Kind::Nan,
        };
        Float {
            sign,
            kind,
            denormal: false,
            exponent: exponent as i32 - self.max,
            significand: significand | INTEGER_BIT,
        }
    }

    /// Encodes as single or double what [`round`] gave for this format. NaNs lose low bits.
    pub fn encode(self, value: Float) -> u64 {
        let fraction_bits = self.fraction_bits();
        let exponent_mask = (self.max as u64) << 1 | 1;
        let fraction = (value.significand & !INTEGER_BIT) >> (63 - fraction_bits);
        let magnitude = match value.kind {
            Kind::Zero => 0,
            Kind::Infinity => exponent_mask << fraction_bits,
            Kind::Nan | Kind::Unsupported => exponent_mask << fraction_bits | fraction,
            Kind::Finite if value.exponent < self.min => {
                let shift = 63 - fraction_bits + (self.min - value.exponent) as u32;
                value.significand.checked_shr(shift).unwrap_or(0)
            }
            Kind::Finite => ((value.exponent + self.max) as u64) << fraction_bits | fraction,
        };
        let sign_shift = fraction_bits + (exponent_mask.count_ones());
        u64::from(value.sign) << sign_shift | magnitude
    }
}

/// Takes an x87 register apart.
pub(crate) fn decode_extended((significand, sign_exponent): (u64, u16)) -> Float {
    let sign = sign_exponent >> 15 != 0;
    let exponent = i32::from(sign_exponent & 0x7fff);
    let kind = match (exponent, significand & INTEGER_BIT != 0) {
        (0, _) => {
            return Float {
                denormal: significand != 0,
                ..Float::finite(sign, Format::EXTENDED.min, significand)
            };
        }
        (_, false) => Kind::Unsupported,
        (0x7fff, true) if significand == INTEGER_BIT => return Float::infinity(sign),
        (0x7fff, true) => Kind::Nan,
        (_, true) => Kind::Finite,
    };
    Float {
        sign,
        kind,
        denormal: false,
        exponent: exponent - Format::EXTENDED.max,
        significand,
    }
}

/// Puts an x87 register together.
pub(crate) fn encode_extended(value: Float) -> (u64, u16) {
    let (significand, exponent) = match value.kind {
        Kind::Zero => (0, 0),
        Kind::Infinity => (INTEGER_BIT, 0x7fff),
        Kind::Nan | Kind::Unsupported => (value.significand, 0x7fff),
        Kind::Finite if value.exponent < Format::EXTENDED.min => {
            let shift = (Format::EXTENDED.min - value.exponent) as u32;
            (value.significand.checked_shr(shift).unwrap_or(0), 0)
        }
        Kind::Finite => (
            value.significand,
            (value.exponent + Format::EXTENDED.max) as u16,
        ),
    };
    (significand, exponent | u16::from(value.sign) << 15)
}

/// What adding to an unmasked overflow's or underflow's exponent makes of it on x87 (Vol. 1,
/// "Numeric Overflow Exception").
const BIAS_ADJUSTMENT: i32 = 24576;

/// The significand cut to `keep` bits (it has 128, the top one set; `sticky` stands for nonzero
/// bits below), whether that was inexact, and whether it went away from zero.
fn cut(env: &Env, sign: bool, significand: u128, sticky: bool, keep: i32) -> (u128, bool, bool) {
    let (kept, rest, sticky) = if keep > 0 {
        (significand >> (128 - keep), significand << keep, sticky)
    } else if keep == 0 {
        (0, significand, sticky)
    } else {
        (0, 1, true)
    };
    let inexact = rest != 0 || sticky;
    const HALF: u128 = 1 << 127;
    let up = match env.rounding {
        Rounding::Nearest => rest > HALF || rest == HALF && (sticky || kept & 1 != 0),
        Rounding::Down => inexact && sign,
        Rounding::Up => inexact && !sign,
        Rounding::Zero => false,
    };
    (kept + u128::from(up), inexact, up)
}

/// `kept * 2^unit`; `kept` has at most 65 bits and its 64 most significant ones say it all.
fn assemble(sign: bool, unit: i32, kept: u128) -> Float {
    if kept >> 64 != 0 {
        return Float::finite(sign, unit + 64, (kept >> 1) as u64);
    }
    Float::finite(sign, unit + 63, kept as u64)
}

/// Rounds `significand * 2^(exponent - 127)`, plus something below its last bit if `sticky`, to a
/// format. Bit 127 of the significand is set.
pub(crate) fn round(
    env: &mut Env,
    format: Format,
    sign: bool,
    exponent: i32,
    significand: u128,
    sticky: bool,
) -> Float {
    let precision = format.precision;
    let (kept, inexact, up) = cut(env, sign, significand, sticky, precision);
    let rounded = assemble(sign, exponent - (precision - 1), kept);
    env.rounded_up = up;

    // Tiny is judged after rounding, as if the exponent had no bounds.
    if rounded.exponent < format.min {
        if !env.is_masked(exception::UNDERFLOW) {
            env.raise(exception::UNDERFLOW);
            if inexact {
                env.raise(exception::PRECISION);
            }
            let exponent = rounded.exponent + BIAS_ADJUSTMENT;
            if exponent < format.min {
                // Only scaling (FSCALE) goes so far.
                env.raise(exception::PRECISION);
                env.rounded_up = false;
                return Float::zero(sign);
            }
            return Float {
                exponent,
                ..rounded
            };
        }
        if env.ftz {
            env.raise(exception::UNDERFLOW | exception::PRECISION);
            return Float::zero(sign);
        }
        let keep = precision - (format.min - exponent);
        let (kept, inexact, up) = cut(env, sign, significand, sticky, keep);
        env.rounded_up = up;
        if inexact {
            env.raise(exception::UNDERFLOW | exception::PRECISION);
        }
        return assemble(sign, format.min - (precision - 1), kept);
    }
    if rounded.exponent > format.max {
        env.raise(exception::OVERFLOW);
        if !env.is_masked(exception::OVERFLOW) {
            if inexact {
                env.raise(exception::PRECISION);
            }
            let exponent = rounded.exponent - BIAS_ADJUSTMENT;
            if exponent > format.max {
                env.raise(exception::PRECISION);
                env.rounded_up = true;
                return Float::infinity(sign);
            }
            return Float {
                exponent,
                ..rounded
            };
        }
        env.raise(exception::PRECISION);
        let to_infinity = match env.rounding {
            Rounding::Nearest => true,
            Rounding::Down => sign,
            Rounding::Up => !sign,
            Rounding::Zero => false,
        };
        env.rounded_up = to_infinity;
        return if to_infinity {
            Float::infinity(sign)
        } else {
            Float::finite(sign, format.max, !0 << (64 - precision))
        };
    }
    if inexact {
        env.raise(exception::PRECISION);
    }
    rounded
}

/// The NaN that an operation on these passes on, with its exception; `None` where there is none.
pub(crate) fn propagate(env: &mut Env, a: Float, b: Float) -> Option<Float> {
    if a.kind == Kind::Unsupported || b.kind == Kind::Unsupported {
        return Some(env.invalid());
    }
    if !a.is_nan() && !b.is_nan() {
        return None;
    }
    if a.is_signaling() || b.is_signaling() {
        env.raise(exception::INVALID);
    }
    let chosen = match (a.is_nan(), b.is_nan(), env.nan_rule) {
        (true, false, _) | (true, true, NanRule::First) => a,
        (false, _, _) => b,
        (true, true, NanRule::Larger) => {
            if a.is_signaling() != b.is_signaling() {
                if a.is_signaling() { b } else { a }
            } else if a.significand != b.significand {
                if a.significand > b.significand { a } else { b }
            } else if a.sign {
                b
            } else {
                a
            }
        }
    };
    Some(chosen.quiet())
}

/// `value` in another format: NaNs become quiet, finite numbers are rounded.
pub(crate) fn convert(env: &mut Env, format: Format, value: Float) -> Float {
    if let Some(nan) = propagate(env, value, value) {
        return nan;
    }
    match value.kind {
        Kind::Finite => round(
            env,
            format,
            value.sign,
            value.exponent,
            u128::from(value.significand) << 64,
            false,
        ),
        _ => value,
    }
}

/// Notes that a denormal takes part in an operation.
pub(crate) fn note_denormal(env: &mut Env, values: &[Float]) {
    if values.iter().any(|value| value.denormal) {
        env.raise(exception::DENORMAL);
    }
}

#[cfg(test)]
mod tests;
