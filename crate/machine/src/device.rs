//! Devices that the library's user adds to the board.

use std::ops::Range;

use hypernest_cpu::{Ram, Tick};

use crate::interrupts::{Interrupts, Source};

/// Where a device answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// I/O ports, the first and the one after the last (so a `u32` can name the end).
    Ports(Range<u32>),
    /// Guest-physical addresses that are not RAM.
    Memory(Range<u64>),
}

/// One access to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceAccess {
    /// Index into what [`Device::claims`] gave.
    pub claim: usize,
    /// Bytes from the start of that range.
    pub offset: u64,
    /// 1, 2 or 4 bytes; memory also 8.
    pub width: u8,
}

/// A device of the library's user.
///
/// It must be a function of what reaches it through these calls: no clock, no random numbers.
/// Then runs stay repeatable. Machine time comes with every call.
pub trait Device: Send {
    /// A name, for messages and for its part of a saved state. Unique on a board.
    fn name(&self) -> &str;

    /// The ranges it answers to. Asked once, when it is added.
    fn claims(&self) -> Vec<Claim>;

    /// A load or IN. Bits above the width are ignored.
    fn read(&mut self, context: &mut DeviceContext<'_>, access: DeviceAccess) -> u64;

    /// A store or OUT. Bits of `value` above the width are zero.
    fn write(&mut self, context: &mut DeviceContext<'_>, access: DeviceAccess, value: u64);

    /// The next tick at which it wants [`Device::advance`] to be called.
    fn deadline(&self) -> Option<Tick> {
        None
    }

    /// Time has come to (or gone past) the deadline. Afterwards the deadline must lie in the
    /// future or be `None`.
    fn advance(&mut self, context: &mut DeviceContext<'_>) {
        let _ = context;
    }

    /// All of its state that changes.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes up what [`Device::save`] gave; false when it makes no sense to it.
    fn restore(&mut self, state: &[u8]) -> bool {
        state.is_empty()
    }
}

/// What a device may reach while it works.
pub struct DeviceContext<'a> {
    /// Guest RAM: direct memory access.
    pub ram: &'a mut Ram,
    /// Machine time.
    pub now: Tick,
    pub(crate) interrupts: &'a mut Interrupts,
    pub(crate) source: Source,
}

impl DeviceContext<'_> {
    /// Asserts a global system interrupt (0-23) or lets it go. Several devices may drive one:
    /// it is asserted while any of them asserts it.
    pub fn set_interrupt(&mut self, gsi: u8, level: bool) {
        self.interrupts.set(self.source, gsi, level);
    }

    /// One edge on a global system interrupt.
    pub fn pulse_interrupt(&mut self, gsi: u8) {
        self.set_interrupt(gsi, false);
        self.set_interrupt(gsi, true);
        self.set_interrupt(gsi, false);
    }
}

/// A device cannot be added to the board.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Its range is empty or leaves the address space.
    #[error(
        "device {device:?} claims {claim:x?}, which is no range of addresses; correct its claims"
    )]
    Range {
        /// The device.
        device: String,
        /// The claim.
        claim: Claim,
    },
    /// Another device is there.
    #[error("device {device:?} claims {claim:x?}, where {taken_by} already answers; move it")]
    Overlap {
        /// The device.
        device: String,
        /// The claim.
        claim: Claim,
        /// Who is there.
        taken_by: String,
    },
    /// Two devices of one name.
    #[error("there is already a device named {0:?}; give this one another name")]
    Name(String),
    /// No room for more.
    #[error("a board takes {limit} {what}; leave some out")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many are possible.
        limit: usize,
    },
}
