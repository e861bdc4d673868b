//! Random numbers for tests, the same in every run.

use crate::field::Field;
use crate::vmcs::Vmcs;

/// A generator (xorshift64*).
pub struct Random(u64);

impl Random {
    /// From a seed that is not 0.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit.max(1)
    }

    /// A VMCS with a value in every field.
    pub fn vmcs(&mut self) -> Vmcs {
        let mut vmcs = Vmcs::new();
        for field in Field::ALL {
            vmcs.set(field, self.next());
        }
        vmcs.launched = self.below(2) != 0;
        vmcs.shadow = self.below(2) != 0;
        vmcs.abort = self.next() as u32;
        vmcs
    }
}
