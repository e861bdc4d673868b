//! What of VMX this processor does: the source of every capability that a machine advertises.

use alloc::vec::Vec;
use core::fmt;

use hypernest_vmcs::{
    Caps, FieldSet, Implemented, Layout, Missing, entry, exit, pin, proc1, proc2, proc3, vmfunc,
};

use super::VmxProfile;
use super::regions::{LayoutRefused, Regions, VmxLayouts};
use crate::model::Model;
use crate::vcpu::cr;

/// Memory types UC (0) and WB (6) as bits 8 and 14, four levels, 2 MiB and 1 GiB pages, execute-only,
/// accessed and dirty flags, advanced information about EPT violations, INVEPT and INVVPID of all types.
const EPT_VPID: u64 = 1
    | 1 << 6
    | 1 << 8
    | 1 << 14
    | 1 << 16
    | 1 << 17
    | 1 << 20
    | 1 << 21
    | 1 << 22
    | 1 << 25
    | 1 << 26
    | 1 << 32
    | 0xf << 40;

/// Preemption timer at the rate of the TSC (4:0), LMA saved (5), activity states HLT, shutdown and
/// wait-for-SIPI (6-8), four CR3 targets, VMWRITE to any field (29), software events of length 0 (30).
const MISC: u64 = 1 << 5 | 7 << 6 | 4 << 16 | 1 << 29 | 1 << 30;

/// IA32_VMX_BASIC: instruction information for INS and OUTS.
const BASIC: u64 = 1 << 54;

fn implemented(model: &Model) -> Implemented {
    Implemented {
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
            | proc1::ACTIVATE_TERTIARY_CONTROLS
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
            | proc2::PAUSE_LOOP_EXITING
            | proc2::ENABLE_VM_FUNCTIONS
            | proc2::VMCS_SHADOWING
            | proc2::RDSEED_EXITING
            | proc2::ENABLE_PML
            | proc2::EPT_VIOLATION_VE
            | proc2::USE_TSC_SCALING
            | proc2::ENABLE_XSAVES_XRSTORS
            | proc2::MODE_BASED_EXECUTE_CONTROL_FOR_EPT,
        proc3: proc3::IPI_VIRTUALIZATION,
        exit: exit::SAVE_DEBUG_CONTROLS
            | exit::HOST_ADDRESS_SPACE_SIZE
            | exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT
            | exit::SAVE_IA32_PAT
            | exit::LOAD_IA32_PAT
            | exit::SAVE_IA32_EFER
            | exit::LOAD_IA32_EFER
            | exit::SAVE_VMX_PREEMPTION_TIMER_VALUE,
        entry: entry::LOAD_DEBUG_CONTROLS
            | entry::IA_32E_MODE_GUEST
            | entry::LOAD_IA32_PAT
            | entry::LOAD_IA32_EFER,
        vmfunc: vmfunc::EPTP_SWITCHING,
        basic: BASIC,
        misc: MISC,
        ept_vpid: EPT_VPID,
        cr0_fixed1: 0xffff_ffff,
        cr4_fixed1: model.cr4_bits() | cr::CR4_VMXE,
        ..Implemented::default()
    }
}

/// Capabilities are asked for that the processor does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct VmxRefused(
    /// Each of them, sorted; at least one.
    pub Vec<Missing>,
);

/// One line with all of them.
impl fmt::Display for VmxRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the VMX profile asks for what is not implemented: ")?;
        for (index, missing) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{missing}")?;
        }
        Ok(())
    }
}

impl VmxProfile {
    /// A profile; the layout's revision is the one that `caps` advertise.
    pub fn new(caps: Caps, layout: Layout) -> VmxProfile {
        let regions = Regions::only(&layout);
        VmxProfile::assemble(caps, regions)
    }

    /// A profile with these layouts, offering of `caps` what all of them hold.
    fn assemble(caps: Caps, mut regions: Regions) -> VmxProfile {
        let held = regions.held();
        let caps = caps.restricted_to_fields(&held);
        let caps = caps.advertising(regions.advertised());
        let fields = caps.fields().and(&held);
        regions.keep_fields(&fields);
        VmxProfile {
            caps,
            layout: regions.advertised().clone(),
            regions,
            fields,
        }
    }

    /// The profile that a hypervisor with the enlightened VMCS is offered: without the controls that have no
    /// place in it, as KVM does for its guests.
    #[must_use]
    pub fn enlightened(&self) -> VmxProfile {
        self.limited(Caps::enlightened)
    }

    /// The same with other layouts: the controls are those of this profile that use fields which every
    /// layout holds, and IA32_VMX_BASIC has the revision and region size of the advertised one.
    ///
    /// # Errors
    /// Where a layout is not for machines, two have one revision, or one is larger than the regions.
    pub fn with_layouts(&self, layouts: &VmxLayouts) -> Result<VmxProfile, LayoutRefused> {
        let regions = Regions::new(&self.layout, layouts)?;
        Ok(VmxProfile::assemble(self.caps.clone(), regions))
    }

    /// The same with another written layout, for a machine that runs: what it offers stays as it is.
    ///
    /// # Errors
    /// As [`VmxProfile::with_layouts`]; and where the layout lacks a field that the machine has, which is
    /// named.
    pub fn writing(&self, layout: &Layout) -> Result<VmxProfile, LayoutRefused> {
        let layouts = VmxLayouts {
            advertised: Some(self.layout.clone()),
            written: Some(layout.clone()),
            accepted: self.regions.accepted().cloned().collect(),
        };
        let fields = self.fields.without(layout.field_mask());
        if !fields.is_empty() {
            let name = layout.name().into();
            return Err(LayoutRefused::Narrows { name, fields });
        }
        self.with_layouts(&layouts)
    }

    /// The same, offering no more than `limit` leaves of the capabilities.
    pub fn limited(&self, limit: impl FnOnce(&Caps) -> Caps) -> VmxProfile {
        VmxProfile::assemble(limit(&self.caps), self.regions.clone())
    }

    /// The layouts that regions may have.
    pub(crate) fn regions(&self) -> &Regions {
        &self.regions
    }

    /// The layout that the processor writes.
    pub fn written(&self) -> &Layout {
        self.regions.written()
    }

    /// Every layout that VMPTRLD takes, the advertised one first.
    pub fn accepted(&self) -> impl Iterator<Item = &Layout> {
        self.regions.accepted()
    }

    /// The fields that VMREAD and VMWRITE know.
    pub fn fields(&self) -> &FieldSet {
        &self.fields
    }

    /// All that the processor does with VMX on a CPU model, in our own VMCS layout.
    pub fn max(model: &Model) -> VmxProfile {
        let layout = Layout::hypernest();
        VmxProfile::new(Caps::max(&implemented(model), layout), layout.clone())
    }

    /// What KVM offers its guests, as far as the processor does it, in KVM's VMCS layout.
    pub fn kvm(model: &Model) -> VmxProfile {
        VmxProfile::new(Caps::kvm(&implemented(model)), Layout::kvm().clone())
    }

    /// These capabilities and no more: in KVM's VMCS layout if they name its revision, else in our own. Of
    /// IA32_VMX_BASIC, revision and region size become those of the layout; IA32_VMX_VMCS_ENUM is made to fit.
    ///
    /// # Errors
    /// Where they promise something that the processor does not do.
    pub fn of(caps: &Caps, model: &Model) -> Result<VmxProfile, VmxRefused> {
        let layout = match caps.revision() == Layout::kvm().revision() {
            true => Layout::kvm(),
            false => Layout::hypernest(),
        };
        let missing = caps.missing(&Caps::max(&implemented(model), layout));
        if !missing.is_empty() {
            return Err(VmxRefused(missing));
        }
        let caps = caps.advertising(layout).restricted_to(layout);
        Ok(VmxProfile::new(caps, layout.clone()))
    }
}
