//! What capabilities promise that a processor does not keep.

use alloc::vec::Vec;
use core::fmt;

use super::{Capability, Caps, capabilities};
use crate::control::{Control, ControlId};

/// One thing that is promised and not implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Missing {
    /// This control may be 1.
    Set(ControlId),
    /// This control may be 0.
    Clear(ControlId),
    /// A bit of a capability MSR that is about no control; the lowest bit of a number.
    Bit {
        /// The MSR.
        msr: u32,
        /// The bit, 0 to 63.
        bit: u8,
    },
}

const BASIC: u32 = 0x480;
const MISC: u32 = 0x485;
const CR0_FIXED0: u32 = 0x486;
const CR0_FIXED1: u32 = 0x487;
const CR4_FIXED0: u32 = 0x488;
const CR4_FIXED1: u32 = 0x489;
const EPT_VPID: u32 = 0x48C;

/// Bits whose being 1 is a promise. Not among them: what a layout decides (revision, size), the rate
/// of the preemption timer, the memory type, and bit 48 of IA32_VMX_BASIC, which takes something away.
const PROMISES: [(u32, u64); 5] = [
    (BASIC, 0xFF42_0000_0000_0000),
    (MISC, 0xFE00_FFE0 & !NUMBERS[1].1),
    (CR0_FIXED1, !0),
    (CR4_FIXED1, !0),
    (EPT_VPID, !NUMBERS[2].1),
];

/// Numbers, of which more is promised than less: CR3-target values, length of MSR lists, size of an
/// HLAT prefix.
const NUMBERS: [(u32, u64); 3] = [(MISC, 0x1FF << 16), (MISC, 7 << 25), (EPT_VPID, 0x3F << 48)];

/// Bits whose being 0 is a promise.
const DUTIES: [u32; 2] = [CR0_FIXED0, CR4_FIXED0];

impl Caps {
    /// What these capabilities promise and those of a processor, `max`, do not: sorted, and empty if
    /// the processor can keep every promise.
    ///
    /// Revision, region size and the rate of the preemption timer are not compared.
    #[must_use]
    pub fn missing(&self, max: &Self) -> Vec<Missing> {
        let mut missing = Vec::new();
        for control in Control::ALL {
            let set = self.allowed1(control) & !max.allowed1(control);
            // A control that does not exist is 0; nobody may clear anything in it.
            let clear = max.allowed0(control) & !self.allowed0(control) & self.allowed1(control);
            missing.extend(bits(set).map(|bit| Missing::Set(ControlId::new(control, bit))));
            missing.extend(bits(clear).map(|bit| Missing::Clear(ControlId::new(control, bit))));
        }
        let of = |caps: &Self, msr| caps.get(msr).unwrap_or(0);
        for (msr, mask) in PROMISES {
            let set = of(self, msr) & !of(max, msr) & mask;
            missing.extend(bits(set).map(|bit| Missing::Bit { msr, bit }));
        }
        for (msr, mask) in NUMBERS {
            if of(self, msr) & mask > of(max, msr) & mask {
                let bit = mask.trailing_zeros() as u8;
                missing.push(Missing::Bit { msr, bit });
            }
        }
        for msr in DUTIES {
            let clear = of(max, msr) & !of(self, msr);
            missing.extend(bits(clear).map(|bit| Missing::Bit { msr, bit }));
        }
        missing.sort_unstable();
        missing
    }
}

fn bits(mask: u64) -> impl Iterator<Item = u8> {
    (0..64).filter(move |&bit| mask >> bit & 1 != 0)
}

/// As the tables write it, and in words: `proc2.1 Enable EPT`, `IA32_VMX_MISC bit 8: activity state
/// wait-for-SIPI supported`.
impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Set(id) => write!(f, "{id}"),
            Self::Clear(id) => write!(f, "{id}: may be 0"),
            Self::Bit { msr, bit } => {
                let covers =
                    |row: &&Capability| row.msr == msr && (row.low..=row.high).contains(&bit);
                let name = capabilities().iter().find(|row| row.msr == msr);
                let name = name.map_or("an MSR without a name", |row| row.msr_name);
                let row = capabilities().iter().find(covers);
                let meaning = row.map_or("reserved", |row| row.meaning);
                write!(f, "{name} bit {bit}: {meaning}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::Implemented;
    use crate::layout::Layout;
    use crate::{pin, proc1, proc2};
    use alloc::string::ToString;

    fn max() -> Caps {
        let implemented = Implemented {
            proc1: proc1::ACTIVATE_SECONDARY_CONTROLS,
            proc2: proc2::ENABLE_EPT,
            ..Implemented::default()
        };
        Caps::max(&implemented, Layout::hypernest())
    }

    #[test]
    fn nothing_is_missing_from_oneself() {
        assert_eq!(max().missing(&max()), []);
        assert_eq!(Caps::kvm(&Implemented::default()).missing(&max()), []);
    }

    #[test]
    fn controls_are_named() {
        let mut asked = max();
        asked.proc2 |= u64::from(proc2::USE_TSC_SCALING) << 32;
        asked.true_pin |= u64::from(pin::NMI_EXITING) << 32 | 1 << 63;
        asked.true_proc1 &= !(1 << 1);
        let missing = asked.missing(&max());
        let texts: Vec<_> = missing.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "pin.3 NMI exiting",
                "pin.31 reserved",
                "proc2.25 Use TSC scaling",
                "proc1.1 reserved: may be 0",
            ]
        );
    }

    #[test]
    fn other_capabilities_are_named() {
        let mut asked = max();
        asked.misc |= 1 << 8 | 2 << 16;
        asked.ept_vpid |= 1 | 1 << 30;
        asked.cr4_fixed1 |= 1 << 20;
        asked.cr0_fixed0 = 0;
        let missing = asked.missing(&max());
        let bits: Vec<_> = missing
            .iter()
            .map(|missing| match *missing {
                Missing::Bit { msr, bit } => (msr, bit),
                other => panic!("{other}"),
            })
            .collect();
        assert_eq!(
            bits,
            [
                (0x485, 8),
                (0x485, 16),
                (0x486, 0),
                (0x486, 5),
                (0x486, 31),
                (0x489, 20),
                (0x48C, 0),
                (0x48C, 30),
            ]
        );
        assert_eq!(
            missing[0].to_string(),
            "IA32_VMX_MISC bit 8: activity state wait-for-SIPI supported"
        );
        assert_eq!(
            missing[7].to_string(),
            "IA32_VMX_EPT_VPID_CAP bit 30: reserved"
        );
    }

    #[test]
    fn a_control_that_is_not_activated_promises_nothing() {
        let mut asked = max();
        asked.proc3 = !0;
        asked.exit2 = !0;
        assert_eq!(asked.missing(&max()), []);
    }
}
