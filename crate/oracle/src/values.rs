//! Values worth trying: boundaries of every width, every class of floating-point number, and
//! plain random bits.

use iced_x86::MemorySize;

use crate::layout::{DATA, HIGH, STACK};
use crate::rng::Rng;

/// What the lanes of an operand hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Integers of this many bytes.
    Integer(usize),
    /// IEEE single.
    Single,
    /// IEEE double.
    Double,
    /// x87 double extended.
    Extended,
    /// Packed decimal, 18 digits.
    Decimal,
}

impl Lane {
    /// The lanes of a memory operand's type; bytes where the type says nothing.
    pub fn of(size: MemorySize) -> Lane {
        match size.element_type() {
            MemorySize::Float32 => Lane::Single,
            MemorySize::Float64 => Lane::Double,
            MemorySize::Float80 => Lane::Extended,
            MemorySize::Bcd => Lane::Decimal,
            _ => match size.element_size() {
                n @ (1 | 2 | 4 | 8) => Lane::Integer(n),
                _ => Lane::Integer(8),
            },
        }
    }

    fn bytes(self) -> usize {
        match self {
            Lane::Integer(n) => n,
            Lane::Single => 4,
            Lane::Double => 8,
            Lane::Extended | Lane::Decimal => 10,
        }
    }

    /// Fills `bytes` lane by lane.
    pub fn fill(self, rng: &mut Rng, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(self.bytes()) {
            let value = match self {
                Lane::Integer(8) => u128::from(quad(rng)),
                Lane::Integer(n) => u128::from(narrow(rng, n as u32 * 8)),
                Lane::Single => u128::from(single(rng)),
                Lane::Double => u128::from(double(rng)),
                Lane::Extended => u128::from_le_bytes({
                    let mut wide = [0; 16];
                    wide[..10].copy_from_slice(&extended(rng));
                    wide
                }),
                Lane::Decimal => decimal(rng),
            };
            chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// A 64-bit value: often a boundary of some width, sometimes a pointer.
pub fn quad(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => rng.bits(),
        1 => {
            let bits = rng.pick(&[8, 16, 32, 64]);
            let value = narrow(rng, bits);
            if rng.one_in(2) || bits == 64 {
                value
            } else {
                ((value << (64 - bits)) as i64 >> (64 - bits)) as u64
            }
        }
        2 => rng.below(256),
        3 => {
            let shift = rng.below(64);
            (1u64 << shift).wrapping_add(rng.below(3)).wrapping_sub(1)
        }
        4 => pointer(rng),
        5 => rng.bits() >> rng.below(64),
        6 => {
            let high = narrow(rng, 32) << 32;
            high | narrow(rng, 32)
        }
        _ => narrow(rng, 64),
    }
}

/// A value of `bits` bits: a boundary or random.
pub fn narrow(rng: &mut Rng, bits: u32) -> u64 {
    let mask = u64::MAX >> (64 - bits);
    let sign = 1u64 << (bits - 1);
    mask & match rng.below(12) {
        0 => 0,
        1 => 1,
        2 => mask,
        3 => sign,
        4 => sign - 1,
        5 => sign + 1,
        6 => mask - 1,
        7 => 1u64 << rng.below(u64::from(bits)),
        _ => rng.bits(),
    }
}

fn pointer(rng: &mut Rng) -> u64 {
    rng.pick(&[DATA.start, STACK.start, HIGH.start, DATA.end()]) + rng.below(0x1000)
}

/// A number of a binary format with `fraction` fraction bits, hidden bit, and `exponent` exponent bits.
fn float(rng: &mut Rng, exponent: u32, fraction: u32) -> u64 {
    let sign = rng.bits() & 1;
    let top = (1u64 << exponent) - 1;
    let bias = top >> 1;
    let ones = (1u64 << fraction) - 1;
    let random = rng.bits() & ones;
    let any_fraction = match rng.below(6) {
        0 => 0,
        1 => ones,
        2 => 1,
        3 => 1 << (fraction - 1),
        // Few significant bits: exact results, ties.
        4 => random & !(ones >> rng.below(u64::from(fraction))),
        _ => random,
    };
    let (e, f) = match rng.below(16) {
        0 => (0, 0),
        1 => (top, 0),
        2 => (top, (1 << (fraction - 1)) | any_fraction),
        3 => (top, (any_fraction & (ones >> 1)).max(1)),
        4 => (0, any_fraction.max(1)),
        5 => (1, any_fraction),
        6 => (top - 1, any_fraction),
        7 => (bias, any_fraction),
        // Around the limits of the integer formats.
        8 => (
            bias + rng.pick(&[7, 14, 15, 30, 31, 32, 62, 63, 64]),
            any_fraction,
        ),
        // Halves, for rounding to integers.
        9 => (bias.wrapping_sub(1), any_fraction),
        10 => (rng.bits() & top, any_fraction),
        11 => {
            // Close to the smallest and largest products.
            let half = rng.pick(&[bias / 2, bias + bias / 2]);
            ((half + rng.below(16)).min(top - 1), any_fraction)
        }
        _ => (
            (bias + rng.below(2 * u64::from(fraction))).wrapping_sub(u64::from(fraction)) & top,
            any_fraction,
        ),
    };
    sign << (exponent + fraction) | e.min(top) << fraction | f
}

/// IEEE single bits.
pub fn single(rng: &mut Rng) -> u32 {
    if rng.one_in(20) {
        return rng.bits() as u32;
    }
    float(rng, 8, 23) as u32
}

/// IEEE double bits.
pub fn double(rng: &mut Rng) -> u64 {
    if rng.one_in(20) {
        return rng.bits();
    }
    float(rng, 11, 52)
}

/// x87 double extended: mostly proper numbers, sometimes encodings that no arithmetic produces.
pub fn extended(rng: &mut Rng) -> [u8; 10] {
    let mut bytes = [0; 10];
    let (sign_exponent, significand) = if rng.one_in(12) {
        // Any bits: unnormals, pseudo-denormals, pseudo-infinities and pseudo-NaNs among them.
        let exponent = rng.pick(&[0, 1, 0x3fff, 0x7fff, 0x7ffe, 0xffff, 0x8000]);
        (exponent, narrow(rng, 64))
    } else {
        let value = float(rng, 15, 48);
        let sign_exponent = (value >> 48) as u16;
        let fraction = value & ((1 << 48) - 1);
        // The 48 bits are the top of the fraction; sometimes the rest is filled as well.
        let low = rng.pick(&[0, 0, 1, 0x7fff, 0x4000, 0x400, 0x3ff, rng_low(fraction)]);
        let integer = u64::from(sign_exponent & 0x7fff != 0) << 63;
        (sign_exponent, integer | fraction << 15 | low)
    };
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&sign_exponent.to_le_bytes());
    bytes
}

fn rng_low(fraction: u64) -> u64 {
    fraction.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 49
}

fn decimal(rng: &mut Rng) -> u128 {
    if rng.one_in(10) {
        return u128::from(rng.bits()) | u128::from(rng.bits()) << 64;
    }
    let digits = rng.below(19);
    let mut value = 0u128;
    for _ in 0..digits {
        value = value << 4 | u128::from(rng.below(10));
    }
    value | u128::from(rng.bits() & 1) << 79
}
