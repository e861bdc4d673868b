//! The VMX capability MSRs: what a guest may set.

mod dump;
mod missing;
mod profile;

pub use dump::{DumpError, DumpProblem};
pub use missing::Missing;
pub use profile::Implemented;

use crate::control::{Control, ControlId};
use crate::field::{Exists, Field, FieldSet};
use crate::{exit, proc1, proc2};

include!(concat!(env!("OUT_DIR"), "/capabilities.rs"));

/// The first capability MSR, IA32_VMX_BASIC.
pub const FIRST_MSR: u32 = 0x480;

/// The last capability MSR, IA32_VMX_EXIT_CTLS2.
pub const LAST_MSR: u32 = 0x493;

/// The values of the VMX capability MSRs. Vol. 3D, "VMX Capability Reporting Facility".
///
/// A field here has a value even where the MSR does not exist; [`Caps::get`] knows which do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caps {
    /// IA32_VMX_BASIC, 480H: revision identifier, region size, memory type and more.
    pub basic: u64,
    /// IA32_VMX_PINBASED_CTLS, 481H: allowed-0 settings (31:0), allowed-1 settings (63:32).
    pub pin: u64,
    /// IA32_VMX_PROCBASED_CTLS, 482H.
    pub proc1: u64,
    /// IA32_VMX_EXIT_CTLS, 483H.
    pub exit: u64,
    /// IA32_VMX_ENTRY_CTLS, 484H.
    pub entry: u64,
    /// IA32_VMX_MISC, 485H.
    pub misc: u64,
    /// IA32_VMX_CR0_FIXED0, 486H: bits of CR0 that must be 1.
    pub cr0_fixed0: u64,
    /// IA32_VMX_CR0_FIXED1, 487H: bits of CR0 that may be 1.
    pub cr0_fixed1: u64,
    /// IA32_VMX_CR4_FIXED0, 488H: bits of CR4 that must be 1.
    pub cr4_fixed0: u64,
    /// IA32_VMX_CR4_FIXED1, 489H: bits of CR4 that may be 1.
    pub cr4_fixed1: u64,
    /// IA32_VMX_VMCS_ENUM, 48AH: the highest index of a field (9:1).
    pub vmcs_enum: u64,
    /// IA32_VMX_PROCBASED_CTLS2, 48BH.
    pub proc2: u64,
    /// IA32_VMX_EPT_VPID_CAP, 48CH.
    pub ept_vpid: u64,
    /// IA32_VMX_TRUE_PINBASED_CTLS, 48DH.
    pub true_pin: u64,
    /// IA32_VMX_TRUE_PROCBASED_CTLS, 48EH.
    pub true_proc1: u64,
    /// IA32_VMX_TRUE_EXIT_CTLS, 48FH.
    pub true_exit: u64,
    /// IA32_VMX_TRUE_ENTRY_CTLS, 490H.
    pub true_entry: u64,
    /// IA32_VMX_VMFUNC, 491H: VM functions that may be enabled.
    pub vmfunc: u64,
    /// IA32_VMX_PROCBASED_CTLS3, 492H: allowed-1 settings only.
    pub proc3: u64,
    /// IA32_VMX_EXIT_CTLS2, 493H: allowed-1 settings only.
    pub exit2: u64,
}

/// A range of bits of a capability MSR: a row of `vmx_capability_msrs.csv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// The MSR.
    pub msr: u32,
    /// Its name.
    pub msr_name: &'static str,
    /// The highest bit.
    pub high: u8,
    /// The lowest bit.
    pub low: u8,
    /// What the bits mean.
    pub meaning: &'static str,
}

/// Every range of bits that has a meaning.
#[must_use]
pub fn capabilities() -> &'static [Capability] {
    CAPABILITIES
}

/// IA32_VMX_BASIC 55: the TRUE MSRs exist.
const BASIC_TRUE_CONTROLS: u64 = 1 << 55;

impl Caps {
    /// The value of an MSR; nothing for one that does not exist.
    #[must_use]
    pub fn get(&self, msr: u32) -> Option<u64> {
        let exists = match msr {
            0x48B => self.allows_proc1(proc1::ACTIVATE_SECONDARY_CONTROLS),
            0x48C => self.allows_proc2(proc2::ENABLE_EPT) || self.allows_proc2(proc2::ENABLE_VPID),
            0x48D..=0x490 => self.has_true_controls(),
            0x491 => self.allows_proc2(proc2::ENABLE_VM_FUNCTIONS),
            0x492 => self.allows_proc1(proc1::ACTIVATE_TERTIARY_CONTROLS),
            0x493 => self.allows_exit(exit::ACTIVATE_SECONDARY_CONTROLS),
            _ => true,
        };
        self.slot(msr).copied().filter(|_| exists)
    }

    /// Every MSR that exists, by number, with its value.
    pub fn msrs(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        (FIRST_MSR..=LAST_MSR).filter_map(|msr| Some((msr, self.get(msr)?)))
    }

    /// Capabilities with these values: what [`Caps::msrs`] told. Numbers of other MSRs are skipped.
    #[must_use]
    pub fn from_msrs(msrs: &[(u32, u64)]) -> Self {
        let mut caps = Self::default();
        for &(msr, value) in msrs {
            if let Some(slot) = caps.slot_mut(msr) {
                *slot = value;
            }
        }
        caps
    }

    /// The stored value of an MSR, whether it exists or not.
    fn slot(&self, msr: u32) -> Option<&u64> {
        Some(match msr {
            0x480 => &self.basic,
            0x481 => &self.pin,
            0x482 => &self.proc1,
            0x483 => &self.exit,
            0x484 => &self.entry,
            0x485 => &self.misc,
            0x486 => &self.cr0_fixed0,
            0x487 => &self.cr0_fixed1,
            0x488 => &self.cr4_fixed0,
            0x489 => &self.cr4_fixed1,
            0x48A => &self.vmcs_enum,
            0x48B => &self.proc2,
            0x48C => &self.ept_vpid,
            0x48D => &self.true_pin,
            0x48E => &self.true_proc1,
            0x48F => &self.true_exit,
            0x490 => &self.true_entry,
            0x491 => &self.vmfunc,
            0x492 => &self.proc3,
            0x493 => &self.exit2,
            _ => return None,
        })
    }

    fn slot_mut(&mut self, msr: u32) -> Option<&mut u64> {
        Some(match msr {
            0x480 => &mut self.basic,
            0x481 => &mut self.pin,
            0x482 => &mut self.proc1,
            0x483 => &mut self.exit,
            0x484 => &mut self.entry,
            0x485 => &mut self.misc,
            0x486 => &mut self.cr0_fixed0,
            0x487 => &mut self.cr0_fixed1,
            0x488 => &mut self.cr4_fixed0,
            0x489 => &mut self.cr4_fixed1,
            0x48A => &mut self.vmcs_enum,
            0x48B => &mut self.proc2,
            0x48C => &mut self.ept_vpid,
            0x48D => &mut self.true_pin,
            0x48E => &mut self.true_proc1,
            0x48F => &mut self.true_exit,
            0x490 => &mut self.true_entry,
            0x491 => &mut self.vmfunc,
            0x492 => &mut self.proc3,
            0x493 => &mut self.exit2,
            _ => return None,
        })
    }

    /// Whether the TRUE MSRs exist, which may let bits of the default1 class be 0.
    #[must_use]
    pub fn has_true_controls(&self) -> bool {
        self.basic & BASIC_TRUE_CONTROLS != 0
    }

    /// The revision identifier that the processor advertises. Vol. 3D, "Basic VMX Information".
    #[must_use]
    pub fn revision(&self) -> u32 {
        self.basic as u32 & 0x7FFF_FFFF
    }

    /// Bytes of a VMXON or VMCS region. Vol. 3D, "Basic VMX Information".
    #[must_use]
    pub fn region_size(&self) -> usize {
        (self.basic >> 32 & 0x1FFF) as usize
    }

    /// How many CR3-target values there are. Vol. 3D, "Miscellaneous Data".
    #[must_use]
    pub fn cr3_targets(&self) -> u32 {
        (self.misc >> 16 & 0x1FF) as u32
    }

    /// The bits of `control` that must be 1, by the TRUE MSR where there is one; 0 where the control
    /// does not exist.
    #[must_use]
    pub fn allowed0(&self, control: Control) -> u64 {
        match control {
            Control::Pin => self.pin_allowed0().into(),
            Control::Proc1 => self.proc1_allowed0().into(),
            Control::Proc2 => self.proc2_allowed0().into(),
            Control::Exit => self.exit_allowed0().into(),
            Control::Entry => self.entry_allowed0().into(),
            Control::Proc3 | Control::Exit2 | Control::VmFunc => 0,
        }
    }

    /// The bits of `control` that may be 1, by the TRUE MSR where there is one; 0 where the control
    /// does not exist.
    #[must_use]
    pub fn allowed1(&self, control: Control) -> u64 {
        match control {
            Control::Pin => self.pin_allowed1().into(),
            Control::Proc1 => self.proc1_allowed1().into(),
            Control::Proc2 => self.proc2_allowed1().into(),
            Control::Proc3 => self.proc3_allowed1(),
            Control::Exit => self.exit_allowed1().into(),
            Control::Exit2 => self.exit2_allowed1(),
            Control::Entry => self.entry_allowed1().into(),
            Control::VmFunc => self.vmfunc_allowed1(),
        }
    }

    /// Whether a control may be 1.
    #[must_use]
    pub fn allows(&self, id: ControlId) -> bool {
        self.allowed1(id.control) >> (id.bit & 63) & 1 != 0
    }

    /// Whether the processor has `field`: VMREAD and VMWRITE of another fail with error 12.
    #[must_use]
    pub fn has_field(&self, field: Field) -> bool {
        match field.exists() {
            Exists::Always => true,
            Exists::WithAny(ids) => ids.iter().any(|&id| self.allows(id)),
            Exists::Cr3Targets(more_than) => self.cr3_targets() > more_than.into(),
            Exists::Unknown => false,
        }
    }

    /// The fields that the processor has, whatever layouts can hold.
    #[must_use]
    pub fn fields(&self) -> FieldSet {
        let has = |&field: &Field| self.has_field(field);
        Field::ALL.into_iter().filter(has).collect()
    }
}

macro_rules! accessors {
    ($($what:literal $plain:ident $true:ident: $allowed0:ident $allowed1:ident $allows:ident;)*) => {
        impl Caps {
            $(
                #[doc = concat!("The ", $what, " that must be 1.")]
                #[must_use]
                pub fn $allowed0(&self) -> u32 {
                    (if self.has_true_controls() { self.$true } else { self.$plain }) as u32
                }

                #[doc = concat!("The ", $what, " that may be 1.")]
                #[must_use]
                pub fn $allowed1(&self) -> u32 {
                    ((if self.has_true_controls() { self.$true } else { self.$plain }) >> 32) as u32
                }

                #[doc = concat!("Whether all of these ", $what, " may be 1.")]
                #[must_use]
                pub fn $allows(&self, bits: u32) -> bool {
                    self.$allowed1() & bits == bits
                }
            )*
        }
    };
}

accessors! {
    "pin-based controls" pin true_pin: pin_allowed0 pin_allowed1 allows_pin;
    "primary processor-based controls" proc1 true_proc1: proc1_allowed0 proc1_allowed1 allows_proc1;
    "primary VM-exit controls" exit true_exit: exit_allowed0 exit_allowed1 allows_exit;
    "VM-entry controls" entry true_entry: entry_allowed0 entry_allowed1 allows_entry;
}

impl Caps {
    /// The secondary processor-based controls that must be 1: by the manual none.
    #[must_use]
    pub fn proc2_allowed0(&self) -> u32 {
        match self.allows_proc1(proc1::ACTIVATE_SECONDARY_CONTROLS) {
            true => self.proc2 as u32,
            false => 0,
        }
    }

    /// The secondary processor-based controls that may be 1.
    #[must_use]
    pub fn proc2_allowed1(&self) -> u32 {
        match self.allows_proc1(proc1::ACTIVATE_SECONDARY_CONTROLS) {
            true => (self.proc2 >> 32) as u32,
            false => 0,
        }
    }

    /// The tertiary processor-based controls that may be 1.
    #[must_use]
    pub fn proc3_allowed1(&self) -> u64 {
        match self.allows_proc1(proc1::ACTIVATE_TERTIARY_CONTROLS) {
            true => self.proc3,
            false => 0,
        }
    }

    /// The secondary VM-exit controls that may be 1.
    #[must_use]
    pub fn exit2_allowed1(&self) -> u64 {
        match self.allows_exit(exit::ACTIVATE_SECONDARY_CONTROLS) {
            true => self.exit2,
            false => 0,
        }
    }

    /// The VM functions that may be enabled.
    #[must_use]
    pub fn vmfunc_allowed1(&self) -> u64 {
        match self.allows_proc2(proc2::ENABLE_VM_FUNCTIONS) {
            true => self.vmfunc,
            false => 0,
        }
    }

    /// Whether all of these secondary processor-based controls may be 1.
    #[must_use]
    pub fn allows_proc2(&self, bits: u32) -> bool {
        self.proc2_allowed1() & bits == bits
    }

    /// Whether all of these tertiary processor-based controls may be 1.
    #[must_use]
    pub fn allows_proc3(&self, bits: u64) -> bool {
        self.proc3_allowed1() & bits == bits
    }

    /// Whether all of these secondary VM-exit controls may be 1.
    #[must_use]
    pub fn allows_exit2(&self, bits: u64) -> bool {
        self.exit2_allowed1() & bits == bits
    }

    /// Whether all of these VM functions may be enabled.
    #[must_use]
    pub fn allows_vmfunc(&self, bits: u64) -> bool {
        self.vmfunc_allowed1() & bits == bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::{pin, vmfunc};

    fn caps(proc1: u32, proc2: u32) -> Caps {
        let implemented = Implemented {
            pin: pin::NMI_EXITING,
            proc1,
            proc2,
            vmfunc: vmfunc::EPTP_SWITCHING,
            ..Implemented::default()
        };
        Caps::max(&implemented, Layout::hypernest())
    }

    #[test]
    fn the_first_eleven_always_exist() {
        let caps = Caps::default();
        assert!((0x480..=0x48A).all(|msr| caps.get(msr).is_some()));
        assert!((0x48B..=0x493).all(|msr| caps.get(msr).is_none()));
        assert_eq!((caps.get(0x47F), caps.get(0x494)), (None, None));
    }

    #[test]
    fn existence_follows_the_controls() {
        let exists = |caps: &Caps, msr| caps.get(msr).is_some();
        let secondary = proc1::ACTIVATE_SECONDARY_CONTROLS;
        let none = caps(0, proc2::ENABLE_EPT);
        assert!(!exists(&none, 0x48B) && !exists(&none, 0x48C) && exists(&none, 0x48D));
        let rdtscp = caps(secondary, proc2::ENABLE_RDTSCP);
        assert!(exists(&rdtscp, 0x48B) && !exists(&rdtscp, 0x48C) && !exists(&rdtscp, 0x491));
        let vpid = caps(secondary, proc2::ENABLE_VPID);
        assert!(exists(&vpid, 0x48C));
        let functions = caps(secondary, proc2::ENABLE_EPT | proc2::ENABLE_VM_FUNCTIONS);
        assert!(exists(&functions, 0x48C) && exists(&functions, 0x491));
        assert!(!exists(&functions, 0x492) && !exists(&functions, 0x493));
    }

    #[test]
    fn true_msrs_count_where_they_exist() {
        let mut caps = caps(0, 0);
        assert!(caps.allows_pin(pin::NMI_EXITING));
        assert!(!caps.allows_pin(pin::NMI_EXITING | pin::VIRTUAL_NMIS));
        assert_eq!(caps.proc1_allowed0() & proc1::CR3_LOAD_EXITING, 0);
        caps.basic &= !BASIC_TRUE_CONTROLS;
        assert_eq!(caps.proc1_allowed0(), proc1::DEFAULT1);
        assert_eq!(caps.get(0x48E), None);
    }

    #[test]
    fn capabilities_are_their_msrs() {
        let caps = caps(proc1::ACTIVATE_SECONDARY_CONTROLS, proc2::ENABLE_VPID);
        let msrs: alloc::vec::Vec<_> = caps.msrs().collect();
        assert_eq!(msrs.len(), 17);
        let same = Caps::from_msrs(&msrs);
        assert!(same.msrs().eq(msrs.iter().copied()));
        assert_eq!(Caps::from_msrs(&[(0x479, 1), (0x494, 1)]), Caps::default());
    }

    #[test]
    fn both_kinds_of_accessors_agree() {
        let caps = caps(proc1::ACTIVATE_SECONDARY_CONTROLS, proc2::ENABLE_EPT);
        for control in Control::ALL {
            for bit in 0..64 {
                let id = ControlId::new(control, bit);
                assert_eq!(caps.allows(id), caps.allowed1(control) >> bit & 1 != 0);
            }
        }
        assert_eq!(caps.allowed1(Control::Proc2), proc2::ENABLE_EPT.into());
    }

    #[test]
    fn fields_exist_with_their_controls() {
        let without = caps(proc1::ACTIVATE_SECONDARY_CONTROLS, 0);
        let with = caps(proc1::ACTIVATE_SECONDARY_CONTROLS, proc2::ENABLE_EPT);
        assert!(without.has_field(Field::GUEST_RIP) && !without.has_field(Field::EPT_POINTER));
        assert!(with.fields().contains(Field::EPT_POINTER));
        assert!(!with.has_field(Field::CR3_TARGET_VALUE0));
        assert!(!with.has_field(Field::EXTENDED_INSTRUCTION_INFO));
    }
}
