//! Which blocks are executed, for fuzzers and the like.

use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::vec;
use alloc::vec::Vec;

use crate::vcpu::Vcpu;

/// Bits of CR3 that name the top table.
const ROOT: u64 = 0x000f_ffff_ffff_f000;
/// Multiplier that spreads bits upwards.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Where a block begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockPlace {
    /// Guest-physical address of the top page table; what was there before paging began.
    pub root: u64,
    /// In VMX non-root operation.
    pub guest: bool,
    /// Linear address of its first instruction.
    pub rip: u64,
}

/// A map of a size that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a coverage map has 2^8 to 2^28 counters, not 2^{0}")]
pub struct CoverageError(pub u32);

/// What was executed: counters of ways from one block to the next, as fuzzers have them, and the blocks
/// themselves where asked for.
///
/// A block begins where execution comes from somewhere else: after a branch, an interrupt, a fault, at a page,
/// or where [`run`](crate::Processor::run) was entered. What is executed instruction by instruction (across pages,
/// while single-stepped or traced) is a block each time. The same run gives the same counters.
pub struct Coverage {
    counters: Box<[u8]>,
    blocks: Option<BTreeSet<BlockPlace>>,
    /// Of each vCPU: the block before, spread.
    before: Vec<u64>,
}

impl Coverage {
    /// A map of 2^`bits` counters, all zero. 16 is what fuzzers use.
    ///
    /// # Errors
    /// When there cannot be so many.
    pub fn new(bits: u32) -> Result<Coverage, CoverageError> {
        if !(8..=28).contains(&bits) {
            return Err(CoverageError(bits));
        }
        Ok(Coverage {
            counters: vec![0; 1 << bits].into_boxed_slice(),
            blocks: None,
            before: Vec::new(),
        })
    }

    /// Notes the blocks too. Their number is bounded by what the guest executes alone.
    pub fn with_blocks(mut self) -> Coverage {
        self.blocks = Some(BTreeSet::new());
        self
    }

    /// The counters: each counts, up to 255, the ways between blocks that fall on it.
    pub fn counters(&self) -> &[u8] {
        &self.counters
    }

    /// The blocks, in order; none unless they were asked for.
    pub fn blocks(&self) -> impl Iterator<Item = BlockPlace> + '_ {
        self.blocks.iter().flatten().copied()
    }

    /// Forgets everything, for another run.
    pub fn clear(&mut self) {
        self.counters.fill(0);
        self.before.clear();
        if let Some(blocks) = &mut self.blocks {
            blocks.clear();
        }
    }

    /// A vCPU is about to execute the block at linear address `rip`.
    pub(crate) fn enter(&mut self, cpu: &Vcpu, vcpu: usize, rip: u64) {
        let place = BlockPlace {
            root: cpu.cr3 & ROOT,
            guest: cpu.vmx.non_root,
            rip,
        };
        let here = (rip ^ (place.root >> 12).rotate_left(40) ^ u64::from(place.guest) << 63)
            .wrapping_mul(SPREAD);
        if self.before.len() <= vcpu {
            self.before.resize(vcpu + 1, 0);
        }
        let way = here ^ self.before[vcpu];
        // One to the right: a block after itself is not the same way as any other such.
        self.before[vcpu] = here >> 1;
        let shift = u64::BITS - self.counters.len().trailing_zeros();
        let counter = &mut self.counters[(way >> shift) as usize];
        *counter = counter.saturating_add(1);
        if let Some(blocks) = &mut self.blocks {
            blocks.insert(place);
        }
    }
}
