//! Profiles: what a machine advertises.

use alloc::vec::Vec;
use core::fmt;

use super::{Capability, Caps};
use crate::control::ControlId;
use crate::layout::Layout;

/// What a processor implements: the bits that may be 1, without those that merely must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Implemented {
    /// Pin-based controls, bits of [`pin`](crate::pin).
    pub pin: u32,
    /// Primary processor-based controls, bits of [`proc1`](crate::proc1).
    pub proc1: u32,
    /// Secondary processor-based controls, bits of [`proc2`](crate::proc2).
    pub proc2: u32,
    /// Tertiary processor-based controls, bits of [`proc3`](crate::proc3).
    pub proc3: u64,
    /// Primary VM-exit controls, bits of [`exit`](mod@crate::exit).
    pub exit: u32,
    /// Secondary VM-exit controls, bits of [`exit2`](crate::exit2).
    pub exit2: u64,
    /// VM-entry controls, bits of [`entry`](crate::entry).
    pub entry: u32,
    /// VM functions, bits of [`vmfunc`](crate::vmfunc).
    pub vmfunc: u64,
    /// IA32_VMX_BASIC 63:48: what it says beside revision, size and bit 55, which follow from the
    /// layout and from there being TRUE MSRs.
    pub basic: u64,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// IA32_VMX_EPT_VPID_CAP.
    pub ept_vpid: u64,
    /// CR0 bits that may be 1.
    pub cr0_fixed1: u64,
    /// CR4 bits that may be 1.
    pub cr4_fixed1: u64,
}

/// What a guest is promised and the processor does not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A control that may be 1.
    Control(ControlId),
    /// A control that may be 0.
    Clear(ControlId),
    /// A bit of another capability MSR.
    Capability(Capability),
}

impl Caps {
    /// Everything that is implemented, with regions in `layout`. TODO
    #[must_use]
    pub fn max(implemented: &Implemented, layout: &Layout) -> Self {
        let _ = (implemented, layout);
        Self::default()
    }

    /// What KVM offers its guests, as far as it is in `max`. TODO
    #[must_use]
    pub fn kvm(max: &Self) -> Self {
        max.restricted_to(Layout::kvm())
    }

    /// Without the controls whose fields `layout` cannot hold. TODO
    #[must_use]
    pub fn restricted_to(&self, layout: &Layout) -> Self {
        let _ = layout;
        self.clone()
    }

    /// What these capabilities promise and `max` does not. TODO
    #[must_use]
    pub fn missing(&self, max: &Self) -> Vec<Missing> {
        let _ = max;
        Vec::new()
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control(id) => write!(f, "{id}"),
            Self::Clear(id) => write!(f, "{id} = 0"),
            Self::Capability(bits) => {
                write!(f, "{} {}: {}", bits.msr_name, bits.high, bits.meaning)
            }
        }
    }
}
