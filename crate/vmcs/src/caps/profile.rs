//! Profiles: what a machine advertises, out of what its processor implements.

use super::Caps;
use crate::control::{Control, ControlBit, ControlId};
use crate::field::{Exists, Field, FieldSet};
use crate::layout::Layout;
use crate::{entry, exit, pin, proc1, proc2, vmfunc};

/// What a processor implements, and what a profile offers: the bits that may be 1. Bits of the
/// default1 class need not be named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Implemented {
    /// Pin-based controls, bits of [`pin`].
    pub pin: u32,
    /// Primary processor-based controls, bits of [`proc1`].
    pub proc1: u32,
    /// Secondary processor-based controls, bits of [`proc2`].
    pub proc2: u32,
    /// Tertiary processor-based controls, bits of [`proc3`](crate::proc3).
    pub proc3: u64,
    /// Primary VM-exit controls, bits of [`exit`](mod@exit).
    pub exit: u32,
    /// Secondary VM-exit controls, bits of [`exit2`](crate::exit2).
    pub exit2: u64,
    /// VM-entry controls, bits of [`entry`].
    pub entry: u32,
    /// VM functions, bits of [`vmfunc`].
    pub vmfunc: u64,
    /// IA32_VMX_BASIC 63:48: what it says beside revision and size, which follow from the layout, and
    /// bit 55, which is always set.
    pub basic: u64,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// IA32_VMX_EPT_VPID_CAP.
    pub ept_vpid: u64,
    /// Bits of CR0 that may be 1.
    pub cr0_fixed1: u64,
    /// Bits of CR4 that may be 1.
    pub cr4_fixed1: u64,
}

/// Bits of CR0 that must be 1 in VMX operation: PE, NE, PG. Vol. 3C, "Restrictions on VMX Operation".
const CR0_FIXED0: u64 = 1 << 31 | 1 << 5 | 1;

/// Bits of CR4 that must be 1 in VMX operation: VMXE. Vol. 3C, "Restrictions on VMX Operation".
const CR4_FIXED0: u64 = 1 << 13;

/// Fields of IA32_VMX_BASIC. Vol. 3D, "Basic VMX Information".
mod basic {
    pub const REVISION: u64 = 0x7FFF_FFFF;
    pub const SIZE: u64 = 0x1FFF << 32;
    pub const DUAL_MONITOR: u64 = 1 << 49;
    pub const WRITE_BACK: u64 = 6 << 50;
    pub const INS_OUTS: u64 = 1 << 54;
    pub const TRUE_CONTROLS: u64 = 1 << 55;
    pub const MEMORY_TYPE: u64 = 0xF << 50;
    pub const FEATURES: u64 = !(REVISION | SIZE | MEMORY_TYPE) & !0 << 48;
}

/// Fields of IA32_VMX_MISC. Vol. 3D, "Miscellaneous Data".
mod misc {
    pub const TIMER_RATE: u64 = 0x1F;
    pub const SAVE_LMA: u64 = 1 << 5;
    pub const HLT: u64 = 1 << 6;
    pub const WAIT_FOR_SIPI: u64 = 1 << 8;
    pub const CR3_TARGETS: u64 = 0x1FF << 16;
    pub const MSR_LIST: u64 = 7 << 25;
    pub const SMM_MONITOR: u64 = 1 << 28;
    pub const WRITE_EXIT_INFO: u64 = 1 << 29;
    pub const MSEG: u64 = !0 << 32;
    pub const FEATURES: u64 = !(TIMER_RATE | CR3_TARGETS | MSR_LIST | MSEG);
}

/// Fields of IA32_VMX_EPT_VPID_CAP. Vol. 3D, "VPID and EPT Capabilities".
mod ept_vpid {
    pub const EXECUTE_ONLY: u64 = 1;
    pub const WALK_4: u64 = 1 << 6;
    pub const WALK_5: u64 = 1 << 7;
    pub const WRITE_BACK: u64 = 1 << 14;
    pub const PAGES_2M: u64 = 1 << 16;
    pub const PAGES_1G: u64 = 1 << 17;
    pub const INVEPT: u64 = 1 << 20;
    pub const ACCESSED_DIRTY: u64 = 1 << 21;
    pub const INVEPT_SINGLE: u64 = 1 << 25;
    pub const INVEPT_ALL: u64 = 1 << 26;
    pub const INVVPID: u64 = 1 << 32;
    pub const INVVPID_TYPES: u64 = 0xF << 40;
    pub const OF_EPT: u64 = 0xFFFF_FFFF;
    pub const OF_VPID: u64 = INVVPID | INVVPID_TYPES;
    pub const HLAT_PREFIX: u64 = 0x3F << 48;
}

/// What KVM offers its guests on a processor that has everything.
///
/// From `nested_vmx_setup_ctls_msrs` as kernels of about 6.1 have it. What KVM emulates on any
/// processor is in it like the rest: a profile never promises more than the processor has. KVM takes
/// the IA32_PERF_GLOBAL_CTRL controls away from guests without that MSR, as does a processor that does
/// not implement them.
const KVM: Implemented = Implemented {
    pin: pin::EXTERNAL_INTERRUPT_EXITING
        | pin::NMI_EXITING
        | pin::VIRTUAL_NMIS
        | pin::ACTIVATE_VMX_PREEMPTION_TIMER
        | pin::PROCESS_POSTED_INTERRUPTS,
    proc1: proc1::INTERRUPT_WINDOW_EXITING
        | proc1::USE_TSC_OFFSETTING
        | proc1::HLT_EXITING
        | proc1::INVLPG_EXITING
        | proc1::MWAIT_EXITING
        | proc1::RDPMC_EXITING
        | proc1::RDTSC_EXITING
        | proc1::CR3_LOAD_EXITING
        | proc1::CR3_STORE_EXITING
        | proc1::CR8_LOAD_EXITING
        | proc1::CR8_STORE_EXITING
        | proc1::USE_TPR_SHADOW
        | proc1::NMI_WINDOW_EXITING
        | proc1::MOV_DR_EXITING
        | proc1::UNCONDITIONAL_I_O_EXITING
        | proc1::USE_I_O_BITMAPS
        | proc1::MONITOR_TRAP_FLAG
        | proc1::USE_MSR_BITMAPS
        | proc1::MONITOR_EXITING
        | proc1::PAUSE_EXITING
        | proc1::ACTIVATE_SECONDARY_CONTROLS,
    proc2: proc2::VIRTUALIZE_APIC_ACCESSES
        | proc2::ENABLE_EPT
        | proc2::DESCRIPTOR_TABLE_EXITING
        | proc2::ENABLE_RDTSCP
        | proc2::VIRTUALIZE_X2APIC_MODE
        | proc2::ENABLE_VPID
        | proc2::WBINVD_EXITING
        | proc2::UNRESTRICTED_GUEST
        | proc2::APIC_REGISTER_VIRTUALIZATION
        | proc2::VIRTUAL_INTERRUPT_DELIVERY
        | proc2::RDRAND_EXITING
        | proc2::ENABLE_INVPCID
        | proc2::ENABLE_VM_FUNCTIONS
        | proc2::VMCS_SHADOWING
        | proc2::ENABLE_ENCLS_EXITING
        | proc2::RDSEED_EXITING
        | proc2::ENABLE_PML
        | proc2::ENABLE_XSAVES_XRSTORS
        | proc2::USE_TSC_SCALING
        | proc2::ENABLE_USER_WAIT_AND_PAUSE,
    proc3: 0,
    exit: exit::SAVE_DEBUG_CONTROLS
        | exit::HOST_ADDRESS_SPACE_SIZE
        | exit::LOAD_IA32_PERF_GLOBAL_CTRL
        | exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT
        | exit::SAVE_IA32_PAT
        | exit::LOAD_IA32_PAT
        | exit::SAVE_IA32_EFER
        | exit::LOAD_IA32_EFER
        | exit::SAVE_VMX_PREEMPTION_TIMER_VALUE
        | exit::CLEAR_IA32_BNDCFGS,
    exit2: 0,
    entry: entry::LOAD_DEBUG_CONTROLS
        | entry::IA_32E_MODE_GUEST
        | entry::LOAD_IA32_PERF_GLOBAL_CTRL
        | entry::LOAD_IA32_PAT
        | entry::LOAD_IA32_EFER
        | entry::LOAD_IA32_BNDCFGS,
    vmfunc: vmfunc::EPTP_SWITCHING,
    basic: basic::INS_OUTS,
    misc: KVM_TIMER_RATE | misc::SAVE_LMA | misc::HLT | misc::WAIT_FOR_SIPI | misc::WRITE_EXIT_INFO,
    ept_vpid: ept_vpid::EXECUTE_ONLY
        | ept_vpid::WALK_4
        | ept_vpid::WALK_5
        | ept_vpid::WRITE_BACK
        | ept_vpid::PAGES_2M
        | ept_vpid::PAGES_1G
        | ept_vpid::INVEPT
        | ept_vpid::ACCESSED_DIRTY
        | ept_vpid::INVEPT_SINGLE
        | ept_vpid::INVEPT_ALL
        | ept_vpid::OF_VPID,
    cr0_fixed1: !0,
    cr4_fixed1: !0,
};

/// KVM's preemption timer counts down once in 32 ticks of the TSC.
const KVM_TIMER_RATE: u64 = 5;

impl Implemented {
    /// What both have. Where bits are a number, the smaller; the rate of the preemption timer is that
    /// of `self`, and memory type and MSEG revision are those of `other`.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            pin: self.pin & other.pin,
            proc1: self.proc1 & other.proc1,
            proc2: self.proc2 & other.proc2,
            proc3: self.proc3 & other.proc3,
            exit: self.exit & other.exit,
            exit2: self.exit2 & other.exit2,
            entry: self.entry & other.entry,
            vmfunc: self.vmfunc & other.vmfunc,
            basic: self.basic & other.basic & basic::FEATURES | other.basic & basic::MEMORY_TYPE,
            misc: self.misc & other.misc & misc::FEATURES
                | self.misc & misc::TIMER_RATE
                | least(self.misc, other.misc, misc::CR3_TARGETS)
                | least(self.misc, other.misc, misc::MSR_LIST)
                | other.misc & misc::MSEG,
            ept_vpid: self.ept_vpid & other.ept_vpid & !ept_vpid::HLAT_PREFIX
                | least(self.ept_vpid, other.ept_vpid, ept_vpid::HLAT_PREFIX),
            cr0_fixed1: self.cr0_fixed1 & other.cr0_fixed1,
            cr4_fixed1: self.cr4_fixed1 & other.cr4_fixed1,
        }
    }
}

fn least(a: u64, b: u64, mask: u64) -> u64 {
    (a & mask).min(b & mask)
}

impl Caps {
    /// The profile `max`: everything that is implemented and that `layout` can hold. It advertises
    /// the revision and size of `layout`.
    #[must_use]
    pub fn max(implemented: &Implemented, layout: &Layout) -> Self {
        let with = |allowed1: u32, control: Control| {
            let default1 = control.default1();
            (u64::from(allowed1) | default1) << 32 | default1
        };
        let pin = with(implemented.pin, Control::Pin);
        let proc1 = with(implemented.proc1, Control::Proc1);
        let exit = with(implemented.exit, Control::Exit);
        let entry = with(implemented.entry, Control::Entry);
        let features = implemented.basic & (basic::FEATURES | basic::MEMORY_TYPE);
        let memory_type = match features & basic::MEMORY_TYPE {
            0 => basic::WRITE_BACK,
            _ => 0,
        };
        Self {
            basic: features | memory_type | basic::TRUE_CONTROLS,
            pin,
            proc1,
            exit,
            entry,
            misc: implemented.misc,
            cr0_fixed0: CR0_FIXED0,
            cr0_fixed1: implemented.cr0_fixed1 | CR0_FIXED0,
            cr4_fixed0: CR4_FIXED0,
            cr4_fixed1: implemented.cr4_fixed1 | CR4_FIXED0,
            vmcs_enum: 0,
            proc2: u64::from(implemented.proc2) << 32,
            ept_vpid: implemented.ept_vpid,
            true_pin: pin & !clearable(Control::Pin),
            true_proc1: proc1 & !clearable(Control::Proc1),
            true_exit: exit & !clearable(Control::Exit),
            true_entry: entry & !clearable(Control::Entry),
            vmfunc: implemented.vmfunc,
            proc3: implemented.proc3,
            exit2: implemented.exit2,
        }
        .restricted_to(layout)
        .advertising(layout)
    }

    /// The profile `kvm`: what KVM offers its guests, as far as it is implemented, in KVM's layout.
    ///
    /// Deviation: KVM lets its guests reach every field of its layout, whether or not a control that
    /// is offered uses it; with [`Caps::fields`] they reach what the controls need, and
    /// IA32_VMX_VMCS_ENUM says so.
    #[must_use]
    pub fn kvm(implemented: &Implemented) -> Self {
        Self::max(&KVM.and(implemented), Layout::kvm())
    }

    /// The same with the revision identifier and region size of `layout`: what L1 stamps into its
    /// regions. Vol. 3D, "Basic VMX Information".
    #[must_use]
    pub fn advertising(&self, layout: &Layout) -> Self {
        let region = u64::from(layout.revision()) | (layout.size() as u64) << 32 & basic::SIZE;
        Self {
            basic: self.basic & !(basic::REVISION | basic::SIZE) | region,
            ..self.clone()
        }
    }

    /// Without the controls that use a field for which `layout` has no slot, and without those that
    /// require one of these. Revision and size stay as they are.
    ///
    /// A control that must be 1 stays, whatever it uses.
    #[must_use]
    pub fn restricted_to(&self, layout: &Layout) -> Self {
        self.restricted_to_fields(layout.field_mask())
    }

    /// The same for what several layouts have in common: without the controls that use a field which
    /// is not in `held`.
    #[must_use]
    pub fn restricted_to_fields(&self, held: &FieldSet) -> Self {
        let holds = |field: Field| held.contains(field);
        let mut caps = self.clone();
        let works = |caps: &Self, bit: &ControlBit| {
            let active = bit.id.control.activated_by();
            let mut needed = bit.requires.iter().copied().chain(active);
            needed.all(|id| caps.allows(id)) && fields_of(bit.id).all(holds)
        };
        // What is dropped takes others with it, in any order of the table.
        loop {
            let dropped = ControlBit::ALL.iter().find(|bit| {
                let must = caps.allowed0(bit.id.control) >> bit.id.bit & 1 != 0;
                caps.stores(bit.id) && !must && !works(&caps, bit)
            });
            match dropped {
                Some(bit) => caps.drop_control(bit.id),
                None => break,
            }
        }
        let targets = [
            Field::CR3_TARGET_VALUE0,
            Field::CR3_TARGET_VALUE1,
            Field::CR3_TARGET_VALUE2,
            Field::CR3_TARGET_VALUE3,
        ];
        let count = targets.iter().take_while(|&&f| holds(f)).count() as u64;
        caps.misc =
            caps.misc & !misc::CR3_TARGETS | least(caps.misc, count << 16, misc::CR3_TARGETS);
        if !holds(Field::EXEC_VMCS_POINTER) || !holds(Field::GUEST_SMBASE) {
            caps.basic &= !basic::DUAL_MONITOR;
            caps.misc &= !(misc::SMM_MONITOR | misc::MSEG);
        }
        if !caps.allows_proc2(proc2::ENABLE_EPT) {
            caps.ept_vpid &= !(ept_vpid::OF_EPT | ept_vpid::HLAT_PREFIX);
        }
        if !caps.allows_proc2(proc2::ENABLE_VPID) {
            caps.ept_vpid &= !ept_vpid::OF_VPID;
        }
        caps.vmcs_enum = highest_index(&caps.fields().and(held)) << 1;
        caps
    }

    /// Whether a bit is set in the allowed-1 settings, even of a control that does not exist.
    /// What a hypervisor that uses the enlightened VMCS, version 1, can be offered: controls that it has no
    /// place for are gone from the capabilities, as KVM filters them for its guests.
    #[must_use]
    pub fn enlightened(&self) -> Self {
        let mut caps = self.clone();
        for bit in ControlBit::ALL.iter().filter(|bit| !bit.enlightened) {
            if caps.allowed0(bit.id.control) >> bit.id.bit & 1 == 0 {
                caps.drop_control(bit.id);
            }
        }
        match Layout::named("evmcs-v1") {
            Some(layout) => caps.restricted_to(layout),
            None => caps,
        }
    }

    fn stores(&self, id: ControlId) -> bool {
        allowed1_places(id).any(|(msr, bit)| self.slot(msr).is_some_and(|v| v & bit != 0))
    }

    fn drop_control(&mut self, id: ControlId) {
        for (msr, bit) in allowed1_places(id) {
            if let Some(value) = self.slot_mut(msr) {
                *value &= !bit;
            }
        }
    }
}

/// The bits of MSRs that allow a control to be 1.
fn allowed1_places(id: ControlId) -> impl Iterator<Item = (u32, u64)> {
    let (plain, true_msr, shift) = match id.control {
        Control::Pin => (0x481, Some(0x48D), 32),
        Control::Proc1 => (0x482, Some(0x48E), 32),
        Control::Exit => (0x483, Some(0x48F), 32),
        Control::Entry => (0x484, Some(0x490), 32),
        Control::Proc2 => (0x48B, None, 32),
        Control::VmFunc => (0x491, None, 0),
        Control::Proc3 => (0x492, None, 0),
        Control::Exit2 => (0x493, None, 0),
    };
    let bit = 1u64.checked_shl(shift + u32::from(id.bit)).unwrap_or(0);
    [Some(plain), true_msr]
        .into_iter()
        .flatten()
        .map(move |msr| (msr, bit))
}

/// Bits of the default1 class that the processor lets be 0: those with a meaning.
fn clearable(control: Control) -> u64 {
    ControlBit::ALL
        .iter()
        .filter(|bit| bit.id.control == control && bit.default1 && !bit.reserved)
        .fold(0, |mask, bit| mask | 1 << bit.id.bit)
}

/// The fields that a control uses: those that exist because of it.
fn fields_of(id: ControlId) -> impl Iterator<Item = Field> {
    Field::ALL
        .into_iter()
        .filter(move |field| match field.exists() {
            Exists::WithAny(ids) => ids.contains(&id),
            Exists::Always | Exists::Cr3Targets(_) | Exists::Unknown => false,
        })
}

fn highest_index(fields: &FieldSet) -> u64 {
    let index = |field: Field| u64::from(field.encoding() >> 1 & 0x1FF);
    fields.iter().map(index).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// Everything there is a name for.
    pub(crate) fn everything() -> Implemented {
        let all = |control| {
            let bits = ControlBit::ALL
                .iter()
                .filter(|bit| bit.id.control == control && !bit.reserved);
            bits.fold(0u64, |mask, bit| mask | 1 << bit.id.bit)
        };
        Implemented {
            pin: all(Control::Pin) as u32,
            proc1: all(Control::Proc1) as u32,
            proc2: all(Control::Proc2) as u32,
            proc3: all(Control::Proc3),
            exit: all(Control::Exit) as u32,
            exit2: all(Control::Exit2),
            entry: all(Control::Entry) as u32,
            vmfunc: all(Control::VmFunc),
            basic: basic::INS_OUTS | basic::DUAL_MONITOR,
            misc: 4 << 16 | 0x3000_01E3,
            ept_vpid: ept_vpid::OF_VPID | ept_vpid::OF_EPT,
            cr0_fixed1: 0xFFFF_FFFF,
            cr4_fixed1: 0x0037_27FF,
        }
    }

    #[test]
    fn max_with_room_for_all_offers_all() {
        let caps = Caps::max(&everything(), Layout::hypernest());
        for bit in ControlBit::ALL {
            assert!(caps.allows(bit.id), "{}", bit.id);
        }
        let apx = FieldSet::from_iter([Field::EXTENDED_INSTRUCTION_INFO]);
        assert_eq!(caps.fields(), FieldSet::ALL.without(&apx));
        assert_eq!(caps.cr3_targets(), 4);
        assert_eq!(caps.vmcs_enum, 41 << 1);
        assert_eq!(caps.revision(), Layout::hypernest().revision());
        assert_eq!(caps.region_size(), 4096);
    }

    #[test]
    fn default1_bits_with_a_meaning_may_be_0_by_the_true_msrs_only() {
        let caps = Caps::max(&Implemented::default(), Layout::hypernest());
        assert_eq!(caps.pin, 0x16_0000_0016);
        assert_eq!(caps.true_pin, 0x16_0000_0016);
        assert_eq!(caps.proc1 as u32, 0x0401_E172);
        assert_eq!(caps.true_proc1 as u32, 0x0400_6172);
        assert_eq!(caps.exit as u32, 0x0003_6DFF);
        assert_eq!(caps.true_exit as u32, 0x0003_6DFB);
        assert_eq!(caps.entry as u32, 0x0000_11FF);
        assert_eq!(caps.true_entry as u32, 0x0000_11FB);
    }

    #[test]
    fn kvm_on_a_processor_with_everything_is_what_kvm_reports() {
        let caps = Caps::kvm(&everything());
        assert_eq!(caps.basic, 0x00D8_1000_11E5_7ED0);
        assert_eq!(caps.true_pin, 0x0000_00FF_0000_0016);
        assert_eq!(caps.true_proc1, 0xFFF9_FFFE_0400_6172);
        assert_eq!(caps.true_exit, 0x00FF_FFFF_0003_6DFB);
        assert_eq!(caps.true_entry, 0x0001_F3FF_0000_11FB);
        assert_eq!(caps.misc, 0x2000_0165);
        assert_eq!(caps.cr0_fixed0, 0x8000_0021);
        assert_eq!(caps.cr4_fixed0, 0x2000);
        assert_eq!(caps.vmcs_enum, 25 << 1);
        assert_eq!(caps.proc2 >> 32, 0x0613_7BFF | 1 << 15);
        assert_eq!(caps.vmfunc, 1);
    }

    #[test]
    fn kvm_loses_nothing_to_its_own_layout() {
        let everything = everything();
        let (kvm, offered) = (Caps::kvm(&everything), KVM.and(&everything));
        assert_eq!(kvm.proc2_allowed1(), offered.proc2);
        assert_eq!(kvm.exit_allowed1(), offered.exit | exit::DEFAULT1);
        assert!(
            kvm.fields()
                .without(Layout::kvm().field_mask())
                .iter()
                .all(|f| { f.exists() == Exists::Always })
        );
    }

    #[test]
    fn what_is_not_implemented_is_not_offered() {
        let mut implemented = everything();
        implemented.proc2 &= !proc2::ENABLE_EPT;
        let caps = Caps::kvm(&implemented);
        assert!(!caps.allows_proc2(proc2::ENABLE_EPT));
        // They require it.
        assert!(!caps.allows_proc2(proc2::UNRESTRICTED_GUEST));
        assert!(!caps.allows_proc2(proc2::ENABLE_PML));
        assert!(!caps.allows_vmfunc(vmfunc::EPTP_SWITCHING));
        assert_eq!(caps.ept_vpid, ept_vpid::OF_VPID);
        assert!(!caps.has_field(Field::EPT_POINTER));
    }

    #[test]
    fn kvms_layout_has_no_room_for_some() {
        let max = Caps::max(&everything(), Layout::hypernest());
        let caps = max.restricted_to(Layout::kvm());
        assert!(!caps.allows_proc1(proc1::ACTIVATE_TERTIARY_CONTROLS));
        assert_eq!((caps.get(0x492), caps.proc3), (None, 0));
        assert!(!caps.allows_exit(exit::ACTIVATE_SECONDARY_CONTROLS));
        assert!(!caps.allows_entry(entry::LOAD_CET_STATE));
        assert!(!caps.allows_proc2(proc2::EPT_VIOLATION_VE));
        assert!(!caps.allows_proc2(proc2::PAUSE_LOOP_EXITING));
        assert!(caps.allows_proc2(proc2::ENABLE_EPT | proc2::VMCS_SHADOWING));
        assert!(caps.allows_proc2(proc2::VMM_BUS_LOCK_DETECTION));
        assert_eq!(caps.cr3_targets(), 0);
        assert_eq!(caps.basic & basic::DUAL_MONITOR, 0);
        assert_eq!(caps.revision(), Layout::hypernest().revision());
        assert_eq!(caps.restricted_to(Layout::kvm()), caps);
    }

    #[test]
    fn restriction_never_leaves_a_control_without_its_fields() {
        let max = Caps::max(&everything(), Layout::hypernest());
        for gone in Field::ALL {
            let slots: Vec<_> = Layout::hypernest().slots().to_vec();
            let slots = slots
                .into_iter()
                .filter(|slot| slot.field != gone)
                .collect();
            let launch = Some(crate::LaunchState::at(8));
            let layout = Layout::new("less", &[1], 4096, launch, slots).unwrap();
            let caps = max.restricted_to(&layout);
            let conditional = gone.exists() != Exists::Always;
            assert!(!conditional || !caps.has_field(gone), "{gone:?}");
        }
    }

    #[test]
    fn what_must_be_1_stays() {
        let mut max = Caps::max(&everything(), Layout::hypernest());
        max.true_entry |= u64::from(entry::LOAD_CET_STATE);
        let caps = max.restricted_to(Layout::kvm());
        assert!(caps.allows_entry(entry::LOAD_CET_STATE));
    }
}
