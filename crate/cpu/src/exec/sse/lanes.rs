//! Vectors as arrays of lanes. MMX values are the low half of a vector whose high half is zero;
//! an operation that is the same in every lane need not know which of the two it works on.

/// A vector: 16 bytes, or 8 in its low half.
pub(crate) type Vector = u128;

/// An element of a vector.
pub(crate) trait Lane: Copy {
    /// All lanes of a vector, lowest first.
    type All: AsRef<[Self]> + AsMut<[Self]>;
    fn split(v: Vector) -> Self::All;
    fn join(all: Self::All) -> Vector;
}

macro_rules! lane {
    ($($lane:ty, $count:literal;)*) => {$(
        impl Lane for $lane {
            type All = [$lane; $count];
            #[inline(always)]
            fn split(v: Vector) -> Self::All {
                const BYTES: usize = size_of::<$lane>();
                let bytes = v.to_le_bytes();
                core::array::from_fn(|n| {
                    let mut one = [0; BYTES];
                    one.copy_from_slice(&bytes[n * BYTES..][..BYTES]);
                    <$lane>::from_le_bytes(one)
                })
            }
            #[inline(always)]
            fn join(all: Self::All) -> Vector {
                const BYTES: usize = size_of::<$lane>();
                let mut bytes = [0; 16];
                for n in 0..$count {
                    bytes[n * BYTES..][..BYTES].copy_from_slice(&all[n].to_le_bytes());
                }
                Vector::from_le_bytes(bytes)
            }
        }
    )*};
}
lane! { u16, 8; i16, 8; u32, 4; i32, 4; u64, 2; }

/// Bytes need no putting together.
macro_rules! byte_lane {
    ($($lane:ty)*) => {$(
        impl Lane for $lane {
            type All = [$lane; 16];
            #[inline(always)]
            fn split(v: Vector) -> Self::All {
                v.to_le_bytes().map(|byte| byte as $lane)
            }
            #[inline(always)]
            fn join(all: Self::All) -> Vector {
                Vector::from_le_bytes(all.map(|byte| byte as u8))
            }
        }
    )*};
}
byte_lane! { u8 i8 }

/// `f` of every lane.
#[inline(always)]
pub(crate) fn map<T: Lane>(a: Vector, f: impl Fn(T) -> T) -> Vector {
    let mut a = T::split(a);
    for lane in a.as_mut() {
        *lane = f(*lane);
    }
    T::join(a)
}

/// `f` of every pair of lanes.
#[inline(always)]
pub(crate) fn zip<T: Lane>(a: Vector, b: Vector, f: impl Fn(T, T) -> T) -> Vector {
    let (mut a, b) = (T::split(a), T::split(b));
    for (a, b) in a.as_mut().iter_mut().zip(b.as_ref()) {
        *a = f(*a, *b);
    }
    T::join(a)
}

/// The low `bytes` of a vector.
#[inline(always)]
pub(crate) fn low(v: Vector, bytes: usize) -> Vector {
    v & (!0 >> (128 - 8 * bytes as u32))
}
