//! RFLAGS, with the six arithmetic flags kept as the last result and its carries.
//!
//! SF and PF come from `result`, the last result sign-extended to 64 bits; ZF from `zero`, the same
//! value but for flag images that no result could give (POPF). `carry` holds the carries out of each
//! bit, moved so that the carry out of the top bit is bit 63 and the one into it is bit 62; AF is
//! bit 3, and the other bits mean nothing.

/// RFLAGS bits.
pub(crate) mod bit {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
    /// Every bit that exists.
    pub const ALL: u64 = 0x3f_7fd5;
}

const AUX: u64 = 8;
const TOP: u64 = 1 << 63;

/// RFLAGS.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Flags {
    result: u64,
    zero: u64,
    carry: u64,
    /// All bits that are not arithmetic.
    pub rest: u64,
}

/// Width of an operation as a type, for carries and sign extension.
pub(crate) trait Width: Copy {
    const BITS: u32;
    fn sign_extend(value: u64) -> u64;
}
macro_rules! width {
    ($($unsigned:ty, $signed:ty;)*) => {$(
        impl Width for $unsigned {
            const BITS: u32 = <$unsigned>::BITS;
            #[inline(always)]
            fn sign_extend(value: u64) -> u64 { value as $signed as i64 as u64 }
        }
    )*};
}
width! { u8, i8; u16, i16; u32, i32; u64, i64; }

impl Flags {
    pub fn new(rflags: u64) -> Flags {
        let mut flags = Flags {
            result: 0,
            zero: 0,
            carry: 0,
            rest: 0,
        };
        flags.set(rflags);
        flags
    }

    #[inline(always)]
    pub fn cf(&self) -> bool {
        (self.carry as i64) < 0
    }
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.zero == 0
    }
    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.result as i64) < 0
    }
    #[inline(always)]
    pub fn of(&self) -> bool {
        ((self.carry ^ (self.carry << 1)) as i64) < 0
    }
    #[inline(always)]
    pub fn pf(&self) -> bool {
        (self.result as u8).count_ones() & 1 == 0
    }
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.carry & AUX != 0
    }
    #[inline(always)]
    pub fn df(&self) -> bool {
        self.rest & bit::DF != 0
    }

    /// The arithmetic flags as RFLAGS bits.
    pub fn arithmetic(&self) -> u64 {
        (self.cf() as u64)
            | (self.pf() as u64) << 2
            | (self.af() as u64) << 4
            | (self.zf() as u64) << 6
            | (self.sf() as u64) << 7
            | (self.of() as u64) << 11
    }

    /// The whole of RFLAGS.
    pub fn get(&self) -> u64 {
        self.rest | self.arithmetic() | bit::FIXED
    }

    /// Replaces the whole of RFLAGS. Bits that do not exist are dropped. Callers that may change
    /// AC, TF or IF use `Vcpu::set_rflags`.
    pub fn set(&mut self, rflags: u64) {
        self.rest = rflags & bit::ALL & !bit::ARITHMETIC;
        self.set_arithmetic(rflags);
    }

    /// Replaces the six arithmetic flags from RFLAGS bits.
    pub fn set_arithmetic(&mut self, rflags: u64) {
        let has = |bit: u64| rflags & bit != 0;
        self.zero = u64::from(!has(bit::ZF));
        // A low byte of one has odd parity.
        self.result = u64::from(has(bit::SF)) << 63 | u64::from(!has(bit::PF));
        let (cf, of) = (has(bit::CF), has(bit::OF));
        self.carry =
            (cf as u64) << 63 | ((cf ^ of) as u64) << 62 | if has(bit::AF) { AUX } else { 0 };
    }

    /// Changes the flags in `mask` to those in `value` (RFLAGS bits, arithmetic ones only).
    pub fn update(&mut self, mask: u64, value: u64) {
        self.set_arithmetic(self.arithmetic() & !mask | value & mask);
    }

    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        // OF is the difference of bits 63 and 62, so both move.
        let of = (self.carry ^ (self.carry << 1)) & TOP;
        let cf = (cf as u64) << 63;
        self.carry = self.carry & !(3 << 62) | cf | (cf ^ of) >> 1;
    }

    /// Replaces CF and OF, as rotates do.
    #[inline(always)]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.carry = self.carry & !(3 << 62) | (cf as u64) << 63 | ((cf ^ of) as u64) << 62;
    }

    #[inline(always)]
    fn carries<T: Width>(carries: u64) -> u64 {
        if T::BITS == 64 {
            carries
        } else {
            carries << (64 - T::BITS) | carries & AUX
        }
    }

    #[inline(always)]
    fn set_result<T: Width>(&mut self, result: u64) {
        self.result = T::sign_extend(result);
        self.zero = self.result;
    }

    /// After `a + b (+ carry) = result`, all of width `T` (upper bits ignored).
    #[inline(always)]
    pub fn add<T: Width>(&mut self, a: u64, b: u64, result: u64) {
        self.set_result::<T>(result);
        self.carry = Self::carries::<T>((a & b) | ((a | b) & !result));
    }

    /// After `a - b (- borrow) = result`.
    #[inline(always)]
    pub fn sub<T: Width>(&mut self, a: u64, b: u64, result: u64) {
        self.set_result::<T>(result);
        self.carry = Self::carries::<T>((!a & b) | ((!a | b) & result));
    }

    /// After a logical operation: CF, OF and AF clear.
    #[inline(always)]
    pub fn logic<T: Width>(&mut self, result: u64) {
        self.set_result::<T>(result);
        self.carry = 0;
    }

    /// After INC: as addition of 1, CF kept.
    #[inline(always)]
    pub fn inc<T: Width>(&mut self, before: u64, result: u64) {
        let old = self.carry;
        self.add::<T>(before, 1, result);
        self.keep_cf(old);
    }

    /// After DEC: as subtraction of 1, CF kept.
    #[inline(always)]
    pub fn dec<T: Width>(&mut self, before: u64, result: u64) {
        let old = self.carry;
        self.sub::<T>(before, 1, result);
        self.keep_cf(old);
    }

    /// Puts back CF as in `old`. OF is the difference of bits 63 and 62, so both flip.
    #[inline(always)]
    fn keep_cf(&mut self, old: u64) {
        let flip = (self.carry ^ old) & TOP;
        self.carry ^= flip | flip >> 1;
    }

    /// After a shift: SF, ZF, PF from the result, AF clear, CF and OF given.
    #[inline(always)]
    pub fn shift<T: Width>(&mut self, result: u64, cf: bool, of: bool) {
        self.set_result::<T>(result);
        self.carry = (cf as u64) << 63 | ((cf ^ of) as u64) << 62;
    }

    /// Condition 0-15 as encoded in Jcc (Vol. 2, "Encoding of Conditional Test (tttn) Field").
    #[inline(always)]
    pub fn condition(&self, code: u8) -> bool {
        let met = match code >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() | self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() ^ self.of(),
            _ => self.zf() | (self.sf() ^ self.of()),
        };
        met ^ (code & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_arithmetic_image_survives() {
        for n in 0..64u64 {
            let image = [bit::CF, bit::PF, bit::AF, bit::ZF, bit::SF, bit::OF]
                .iter()
                .enumerate()
                .fold(
                    bit::FIXED,
                    |all, (i, b)| if n >> i & 1 != 0 { all | b } else { all },
                );
            let mut flags = Flags::new(image);
            assert_eq!(flags.get(), image);
            for cf in [false, true] {
                flags.set_cf(cf);
                assert_eq!(flags.get(), image & !1 | cf as u64);
            }
        }
    }

    #[test]
    fn byte_addition_sets_the_flags_of_the_manual() {
        let mut flags = Flags::new(2);
        flags.add::<u8>(0x7f, 1, 0x80);
        assert_eq!(flags.arithmetic(), bit::OF | bit::SF | bit::AF);
        flags.add::<u8>(0xff, 1, 0x100);
        assert_eq!(flags.arithmetic(), bit::CF | bit::ZF | bit::AF | bit::PF);
        flags.sub::<u64>(0, 1, u64::MAX);
        assert_eq!(flags.arithmetic(), bit::CF | bit::SF | bit::AF | bit::PF);
    }
}
