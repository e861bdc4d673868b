//! Integer operations on vectors, MMX and XMM alike: `(first, second, bytes of the vector)`.

use super::lanes::{Lane, Vector, low, map, zip};

/// Operations that are the same in every lane.
macro_rules! lanewise {
    ($($name:ident: $lane:ty, |$a:ident, $b:ident| $f:expr;)*) => {$(
        pub(super) fn $name(a: Vector, b: Vector, _: usize) -> Vector {
            zip::<$lane>(a, b, |$a, $b| $f)
        }
    )*};
}

lanewise! {
    paddw: u16, |a, b| a.wrapping_add(b);
    paddd: u32, |a, b| a.wrapping_add(b);
    paddq: u64, |a, b| a.wrapping_add(b);
    psubw: u16, |a, b| a.wrapping_sub(b);
    psubd: u32, |a, b| a.wrapping_sub(b);
    psubq: u64, |a, b| a.wrapping_sub(b);
    paddsb: i8, |a, b| a.saturating_add(b);
    paddsw: i16, |a, b| a.saturating_add(b);
    paddusb: u8, |a, b| a.saturating_add(b);
    paddusw: u16, |a, b| a.saturating_add(b);
    psubsb: i8, |a, b| a.saturating_sub(b);
    psubsw: i16, |a, b| a.saturating_sub(b);
    psubusb: u8, |a, b| a.saturating_sub(b);
    psubusw: u16, |a, b| a.saturating_sub(b);
    pmullw: u16, |a, b| a.wrapping_mul(b);
    pmulhw: i16, |a, b| ((i32::from(a) * i32::from(b)) >> 16) as i16;
    pmulhuw: u16, |a, b| ((u32::from(a) * u32::from(b)) >> 16) as u16;
    pmulhrsw: i16, |a, b| ((((i32::from(a) * i32::from(b)) >> 14) + 1) >> 1) as i16;
    pmuludq: u64, |a, b| (a & 0xffff_ffff) * (b & 0xffff_ffff);
    pavgb: u8, |a, b| ((u16::from(a) + u16::from(b) + 1) >> 1) as u8;
    pavgw: u16, |a, b| ((u32::from(a) + u32::from(b) + 1) >> 1) as u16;
    pminsw: i16, |a, b| a.min(b);
    pmaxsw: i16, |a, b| a.max(b);
    pcmpeqw: i16, |a, b| -i16::from(a == b);
    pcmpeqd: i32, |a, b| -i32::from(a == b);
    pcmpgtb: i8, |a, b| -i8::from(a > b);
    pcmpgtw: i16, |a, b| -i16::from(a > b);
    pcmpgtd: i32, |a, b| -i32::from(a > b);
    pand: u64, |a, b| a & b;
    pandn: u64, |a, b| !a & b;
    por: u64, |a, b| a | b;
    pxor: u64, |a, b| a ^ b;
    psignb: i8, |a, b| match b { 0 => 0, 1.. => a, _ => a.wrapping_neg() };
    psignw: i16, |a, b| match b { 0 => 0, 1.. => a, _ => a.wrapping_neg() };
    psignd: i32, |a, b| match b { 0 => 0, 1.. => a, _ => a.wrapping_neg() };
}

pub(super) fn pabsb(_: Vector, b: Vector, _: usize) -> Vector {
    map::<i8>(b, i8::wrapping_abs)
}
pub(super) fn pabsw(_: Vector, b: Vector, _: usize) -> Vector {
    map::<i16>(b, i16::wrapping_abs)
}
pub(super) fn pabsd(_: Vector, b: Vector, _: usize) -> Vector {
    map::<i32>(b, i32::wrapping_abs)
}

// ---- bytes, eight at a time ----
//
// Compilers make little of sixteen lanes in two registers, and string functions use these a lot.

const HIGH: u64 = 0x8080_8080_8080_8080;

/// All ones in the bytes whose top bit is set.
#[inline(always)]
fn spread(tops: u64) -> u64 {
    (tops << 1).wrapping_sub(tops >> 7)
}

#[inline(always)]
fn byte_difference(a: u64, b: u64) -> u64 {
    (a | HIGH).wrapping_sub(b & !HIGH) ^ (a ^ !b) & HIGH
}

/// All ones in the bytes of `a` that are less than those of `b`.
#[inline(always)]
fn bytes_below(a: u64, b: u64) -> u64 {
    spread((!a & b | !(a ^ b) & byte_difference(a, b)) & HIGH)
}

pub(super) fn paddb(a: Vector, b: Vector, _: usize) -> Vector {
    zip::<u64>(a, b, |a, b| ((a & !HIGH) + (b & !HIGH)) ^ (a ^ b) & HIGH)
}
pub(super) fn psubb(a: Vector, b: Vector, _: usize) -> Vector {
    zip::<u64>(a, b, byte_difference)
}
pub(super) fn pcmpeqb(a: Vector, b: Vector, _: usize) -> Vector {
    zip::<u64>(a, b, |a, b| {
        let x = a ^ b;
        spread(!(((x & !HIGH) + !HIGH) | x) & HIGH)
    })
}
pub(super) fn pminub(a: Vector, b: Vector, _: usize) -> Vector {
    zip::<u64>(a, b, |a, b| {
        let below = bytes_below(a, b);
        a & below | b & !below
    })
}
pub(super) fn pmaxub(a: Vector, b: Vector, _: usize) -> Vector {
    zip::<u64>(a, b, |a, b| {
        let below = bytes_below(a, b);
        b & below | a & !below
    })
}

// ---- sums of products and differences ----

pub(super) fn pmaddwd(a: Vector, b: Vector, _: usize) -> Vector {
    let (a, b) = (i16::split(a), i16::split(b));
    let product = |n: usize| i32::from(a[n]) * i32::from(b[n]);
    i32::join(core::array::from_fn(|n| {
        product(2 * n).wrapping_add(product(2 * n + 1))
    }))
}

pub(super) fn pmaddubsw(a: Vector, b: Vector, _: usize) -> Vector {
    let (a, b) = (u8::split(a), i8::split(b));
    let product = |n: usize| i32::from(a[n]) * i32::from(b[n]);
    i16::join(core::array::from_fn(|n| {
        saturate_i16(product(2 * n) + product(2 * n + 1))
    }))
}

pub(super) fn psadbw(a: Vector, b: Vector, _: usize) -> Vector {
    let (a, b) = (u8::split(a), u8::split(b));
    u64::join(core::array::from_fn(|half| {
        (8 * half..8 * half + 8)
            .map(|n| u64::from(a[n].abs_diff(b[n])))
            .sum()
    }))
}

// ---- shifts ----

/// Shifts every lane by the low quadword of the second operand.
macro_rules! shifts {
    ($($name:ident: $lane:ty, |$a:ident, $count:ident| $f:expr;)*) => {$(
        pub(super) fn $name(a: Vector, count: Vector, _: usize) -> Vector {
            let count = count as u64;
            let inside = count < u64::from(<$lane>::BITS);
            let $count = if inside { count as u32 } else { <$lane>::BITS };
            map::<$lane>(a, |$a| $f)
        }
    )*};
}

shifts! {
    psllw: u16, |a, n| a.checked_shl(n).unwrap_or(0);
    pslld: u32, |a, n| a.checked_shl(n).unwrap_or(0);
    psllq: u64, |a, n| a.checked_shl(n).unwrap_or(0);
    psrlw: u16, |a, n| a.checked_shr(n).unwrap_or(0);
    psrld: u32, |a, n| a.checked_shr(n).unwrap_or(0);
    psrlq: u64, |a, n| a.checked_shr(n).unwrap_or(0);
    psraw: i16, |a, n| a >> n.min(15);
    psrad: i32, |a, n| a >> n.min(31);
}

pub(super) fn pslldq(a: Vector, count: Vector, _: usize) -> Vector {
    if count > 15 { 0 } else { a << (8 * count) }
}
pub(super) fn psrldq(a: Vector, count: Vector, _: usize) -> Vector {
    if count > 15 { 0 } else { a >> (8 * count) }
}

// ---- pack and unpack ----

fn saturate_i16(value: i32) -> i16 {
    value.clamp(i16::MIN.into(), i16::MAX.into()) as i16
}

/// Narrowed lanes of `a`, then of `b`: `count` of each.
fn pack<W: Lane, N: Lane>(a: Vector, b: Vector, bytes: usize, f: impl Fn(W) -> N) -> Vector {
    let (a, b) = (W::split(a), W::split(b));
    let count = bytes / size_of::<W>();
    let mut packed = N::split(0);
    let sources = a.as_ref()[..count].iter().chain(&b.as_ref()[..count]);
    for (to, from) in packed.as_mut().iter_mut().zip(sources) {
        *to = f(*from);
    }
    N::join(packed)
}

pub(super) fn packsswb(a: Vector, b: Vector, bytes: usize) -> Vector {
    pack(a, b, bytes, |v: i16| v.clamp(-128, 127) as i8)
}
pub(super) fn packuswb(a: Vector, b: Vector, bytes: usize) -> Vector {
    pack(a, b, bytes, |v: i16| v.clamp(0, 255) as u8)
}
pub(super) fn packssdw(a: Vector, b: Vector, bytes: usize) -> Vector {
    pack(a, b, bytes, saturate_i16)
}

/// The lanes of the low halves in turn.
fn interleave<T: Lane>(a: Vector, b: Vector) -> Vector {
    let (a, b) = (T::split(a), T::split(b));
    let mut woven = T::split(0);
    for (n, to) in woven.as_mut().iter_mut().enumerate() {
        *to = if n % 2 == 0 {
            a.as_ref()[n / 2]
        } else {
            b.as_ref()[n / 2]
        };
    }
    T::join(woven)
}

fn unpack_low<T: Lane>(a: Vector, b: Vector, bytes: usize) -> Vector {
    low(interleave::<T>(a, b), bytes)
}

fn unpack_high<T: Lane>(a: Vector, b: Vector, bytes: usize) -> Vector {
    let half = 4 * bytes as u32;
    interleave::<T>(a >> half, b >> half)
}

macro_rules! unpacks {
    ($($name:ident: $how:ident, $lane:ty;)*) => {$(
        pub(super) fn $name(a: Vector, b: Vector, bytes: usize) -> Vector {
            $how::<$lane>(a, b, bytes)
        }
    )*};
}
unpacks! {
    punpcklbw: unpack_low, u8;
    punpcklwd: unpack_low, u16;
    punpckldq: unpack_low, u32;
    punpcklqdq: unpack_low, u64;
    punpckhbw: unpack_high, u8;
    punpckhwd: unpack_high, u16;
    punpckhdq: unpack_high, u32;
    punpckhqdq: unpack_high, u64;
}

// ---- horizontal ----

/// `f` of neighbours: those of `a`, then those of `b`.
fn horizontal<T: Lane>(a: Vector, b: Vector, bytes: usize, f: impl Fn(T, T) -> T) -> Vector {
    let (a, b) = (T::split(a), T::split(b));
    let count = bytes / size_of::<T>();
    let mut result = T::split(0);
    let sources = a.as_ref()[..count]
        .chunks(2)
        .chain(b.as_ref()[..count].chunks(2));
    for (to, pair) in result.as_mut().iter_mut().zip(sources) {
        *to = f(pair[0], pair[1]);
    }
    T::join(result)
}

macro_rules! horizontals {
    ($($name:ident: $lane:ty, $f:path;)*) => {$(
        pub(super) fn $name(a: Vector, b: Vector, bytes: usize) -> Vector {
            horizontal::<$lane>(a, b, bytes, $f)
        }
    )*};
}
horizontals! {
    phaddw: i16, i16::wrapping_add;
    phaddd: i32, i32::wrapping_add;
    phaddsw: i16, i16::saturating_add;
    phsubw: i16, i16::wrapping_sub;
    phsubd: i32, i32::wrapping_sub;
    phsubsw: i16, i16::saturating_sub;
}

// ---- shuffles ----

pub(super) fn pshufb(a: Vector, b: Vector, bytes: usize) -> Vector {
    let source = u8::split(a);
    map::<u8>(b, |n| {
        if n & 0x80 != 0 {
            0
        } else {
            source[n as usize & (bytes - 1)]
        }
    })
}

/// The four lanes that the four two-bit fields of `order` name.
fn select<T: Copy>(source: &[T], order: u8) -> [T; 4] {
    core::array::from_fn(|n| source[(order >> (2 * n) & 3) as usize])
}

pub(super) fn pshufd(_: Vector, b: Vector, order: u8) -> Vector {
    u32::join(select(&u32::split(b), order))
}
pub(super) fn pshuflw(_: Vector, b: Vector, order: u8) -> Vector {
    let mut lanes = u16::split(b);
    let chosen = select(&lanes[..4], order);
    lanes[..4].copy_from_slice(&chosen);
    u16::join(lanes)
}
pub(super) fn pshufhw(_: Vector, b: Vector, order: u8) -> Vector {
    let mut lanes = u16::split(b);
    let chosen = select(&lanes[4..], order);
    lanes[4..].copy_from_slice(&chosen);
    u16::join(lanes)
}
pub(super) fn shufps(a: Vector, b: Vector, order: u8) -> Vector {
    let from_a = select(&u32::split(a), order);
    let from_b = select(&u32::split(b), order);
    u32::join([from_a[0], from_a[1], from_b[2], from_b[3]])
}
pub(super) fn shufpd(a: Vector, b: Vector, order: u8) -> Vector {
    let (a, b) = (u64::split(a), u64::split(b));
    u64::join([a[(order & 1) as usize], b[(order >> 1 & 1) as usize]])
}

/// The bytes of `a:b` from byte `count` on.
pub(super) fn palignr(a: Vector, b: Vector, bytes: usize, count: u8) -> Vector {
    let (count, bytes) = (u32::from(count), bytes as u32);
    let shifted = if count < bytes {
        let above = if count == 0 {
            0
        } else {
            a << (8 * (bytes - count))
        };
        b >> (8 * count) | above
    } else if count < 2 * bytes {
        a >> (8 * (count - bytes))
    } else {
        0
    };
    low(shifted, bytes as usize)
}

/// The top bits of the lanes, one bit each.
#[inline]
pub(super) fn sign_mask(v: Vector, lane_bits: u32) -> u64 {
    if lane_bits == 8 {
        // The multiplication moves bit 8n + 7 to bit 56 + n; nothing else gets there.
        let gather = |half: u64| {
            (half >> 7 & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56
        };
        return gather(v as u64) | gather((v >> 64) as u64) << 8;
    }
    (0..128 / lane_bits).fold(0, |mask, n| {
        mask | ((v >> (lane_bits * (n + 1) - 1)) as u64 & 1) << n
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Vector = 0x8000_7fff_0001_ffff_8001_0203_fedc_ba98;
    const B: Vector = 0x8000_8000_0002_0001_7fff_8284_0123_4567;

    #[test]
    fn saturating_sums_stop_at_the_ends() {
        let v = paddsw(A, B, 16);
        assert_eq!(v, 0x8000_ffff_0003_0000_0000_8487_ffff_ffff);
        assert_eq!(paddusb(0xff80_7f01, 0x0180_0101, 16), 0xffff_8002);
        assert_eq!(psubusw(0x0001_0005, 0x0002_0003, 16), 0x0000_0002);
    }

    #[test]
    fn packs_take_both_operands_by_their_width() {
        let words = 0x7fff_8000_0080_ff80_u128;
        assert_eq!(packsswb(words, 0x0001, 8), 0x0000_0001_7f80_7f80);
        assert_eq!(packuswb(words, 0x0001, 8), 0x0000_0001_ff00_8000);
        assert_eq!(packsswb(words, 1, 16) >> 64, 1);
    }

    #[test]
    fn unpack_high_takes_the_upper_half_of_either_width() {
        assert_eq!(
            punpckhbw(0x4433_2211 << 32, 0x8877_6655 << 32, 8),
            0x8844_7733_6622_5511
        );
        assert_eq!(punpckhqdq(A, B, 16), A >> 64 | (B >> 64) << 64);
    }

    #[test]
    fn palignr_shifts_out_everything_at_twice_the_width() {
        assert_eq!(palignr(A, B, 16, 0), B);
        assert_eq!(palignr(A, B, 16, 16), A);
        assert_eq!(palignr(A, B, 16, 8), B >> 64 | A << 64);
        assert_eq!(palignr(A, B, 16, 32), 0);
        assert_eq!(
            palignr(0x1122_3344_5566_7788, 0x99, 8, 1),
            0x8800_0000_0000_0000
        );
    }

    #[test]
    fn counts_beyond_the_lane_clear_or_fill_with_signs() {
        assert_eq!(psllw(A, 16, 16), 0);
        assert_eq!(psllq(A, 1 << 63, 16), 0);
        assert_eq!(psraw(0x8000_7fff, 1 << 40, 16), 0xffff_0000);
    }

    #[test]
    fn sign_masks_have_the_top_bit_of_every_lane() {
        for n in 0..16 {
            assert_eq!(sign_mask(0x80 << (8 * n), 8), 1 << n);
            assert_eq!(sign_mask(!(0x80 << (8 * n)), 8), 0xffff & !(1 << n));
        }
        assert_eq!(sign_mask(1 << 127 | 1 << 63, 64), 3);
        assert_eq!(sign_mask(1 << 95 | 1 << 31, 32), 5);
    }

    #[test]
    fn bytes_at_once_are_as_bytes_one_by_one() {
        type All = fn(Vector, Vector, usize) -> Vector;
        type One = fn(u8, u8) -> u8;
        let operations: [(All, One); 5] = [
            (paddb, u8::wrapping_add),
            (psubb, u8::wrapping_sub),
            (pcmpeqb, |a, b| if a == b { 0xff } else { 0 }),
            (pminub, u8::min),
            (pmaxub, u8::max),
        ];
        for (all, one) in operations {
            for a in 0..=255u8 {
                for b in (0..=240u8).step_by(16) {
                    let a = core::array::from_fn(|n| a.wrapping_add((n * 91) as u8));
                    let b = core::array::from_fn(|n| b + n as u8);
                    let expected = core::array::from_fn(|n| one(a[n], b[n]));
                    let result = all(u8::join(a), u8::join(b), 16);
                    assert_eq!(u8::split(result), expected);
                }
            }
        }
    }

    #[test]
    fn products_and_differences_add_up() {
        assert_eq!(pmaddwd(0x8000_8000, 0x8000_8000, 16), 0x8000_0000);
        assert_eq!(pmaddubsw(0xffff, 0x7f7f, 16), 0x7fff);
        assert_eq!(pmulhrsw(0x8000, 0x8000, 16), 0x8000);
        assert_eq!(psadbw(0xff00, 0x01ff, 16), 0xfe + 0xff);
        assert_eq!(pavgb(0xff, 0xfe, 16), 0xff);
    }
}
