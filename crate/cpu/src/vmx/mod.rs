//! Virtual-machine extensions (Vol. 3C): VMX operation, the current VMCS, VM entries and VM exits.
//!
//! The current VMCS is held as values by field; bytes in guest memory are read by VMPTRLD and
//! written when it stops being current. Its controls are taken apart once per VM entry.

mod abort;
pub(crate) mod apic;
mod checks;
pub(crate) mod enlightened;
pub(crate) mod entry;
pub(crate) mod ept;
pub(crate) mod exit;
pub(crate) mod function;
mod implemented;
pub(crate) mod intercept;
mod memory;
mod nested;
pub(crate) mod operation;
mod pause;
pub(crate) mod pml;
mod preemption;
mod regions;
mod shadow;
pub(crate) mod ve;
pub(crate) mod virtual_interrupt;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use hypernest_vmcs::checks::EntryCheck;
use hypernest_vmcs::{
    Caps, DumpError, Field, FieldSet, Layout, Vmcs, exit as exit_controls, pin, proc1, proc2, proc3,
};

use iced_x86::{Instruction, Mnemonic};
use serde::{Deserialize, Serialize};

pub use abort::vmx_abort_cause;
pub use enlightened::{ActiveEnlightened, EnlightenedEntry};
pub use implemented::VmxRefused;
pub use nested::{NestedRefused, NestedReport};
pub use regions::{LayoutRefused, VmxLayouts};

use regions::Regions;

use crate::mem::Ctx;
use crate::model::Model;
use crate::state::{PauseLoop, VmxState};
use crate::trap::{Exec, UD};
use crate::watch;

/// Executes a VMX instruction.
pub(crate) fn instruction(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic::*;
    watch::instruction(x, i.ip());
    let name = match i.mnemonic() {
        Vmlaunch => return entry::vm_entry(x, false),
        Vmresume => return entry::vm_entry(x, true),
        Vmxon => operation::vmxon(x, i).map(|()| "VMXON"),
        Vmxoff => operation::vmxoff(x).map(|()| "VMXOFF"),
        Vmclear => operation::vmclear(x, i).map(|()| "VMCLEAR"),
        Vmptrld => operation::vmptrld(x, i).map(|()| "VMPTRLD"),
        Vmptrst => operation::vmptrst(x, i).map(|()| "VMPTRST"),
        Vmread => operation::vmread(x, i).map(|()| "VMREAD"),
        Vmwrite => operation::vmwrite(x, i).map(|()| "VMWRITE"),
        Vmcall => operation::vmcall(x).map(|()| "VMCALL"),
        Vmfunc => function::vmfunc(x, i.len() as u32).map(|()| "VMFUNC"),
        Invept => operation::invalidate(x, i, true).map(|()| "INVEPT"),
        Invvpid => operation::invalidate(x, i, false).map(|()| "INVVPID"),
        _ => return Err(UD),
    }?;
    watch::instruction_done(x, name);
    Ok(())
}

/// What a machine's VMX offers: capability MSRs, and the layouts of a VMCS in guest memory.
#[derive(Clone, Debug, PartialEq)]
pub struct VmxProfile {
    /// Values of IA32_VMX_BASIC and those that follow.
    pub caps: Caps,
    /// Layout whose revision identifier IA32_VMX_BASIC advertises.
    pub layout: Layout,
    /// The layouts that regions may have.
    regions: Regions,
    /// Fields that exist: those that the controls use and every layout holds.
    fields: FieldSet,
}

/// Which VMX a machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmxChoice {
    /// None: CPUID does not list it.
    #[default]
    None,
    /// What KVM offers its guests: [`VmxProfile::kvm`].
    Kvm,
    /// All that there is: [`VmxProfile::max`].
    Max,
    /// What these capability MSRs say, by number: [`VmxProfile::of`].
    Msrs(Vec<(u32, u64)>),
}

impl VmxChoice {
    /// What the text of a dump of capability MSRs says; [`Caps::from_dump`] has its form.
    ///
    /// # Errors
    /// Where the text is no such dump. What it asks for is not looked at.
    pub fn from_dump(text: &str) -> Result<VmxChoice, DumpError> {
        let caps = Caps::from_dump(text)?;
        Ok(VmxChoice::Msrs(caps.msrs().collect()))
    }

    /// The profile on a CPU model.
    ///
    /// # Errors
    /// Where the processor does not do all that the MSRs promise.
    pub fn profile(&self, model: &Model) -> Result<Option<Arc<VmxProfile>>, VmxRefused> {
        let profile = match self {
            VmxChoice::None => return Ok(None),
            VmxChoice::Kvm => VmxProfile::kvm(model),
            VmxChoice::Max => VmxProfile::max(model),
            VmxChoice::Msrs(msrs) => VmxProfile::of(&Caps::from_msrs(msrs), model)?,
        };
        Ok(Some(Arc::new(profile)))
    }

    /// The profile on a CPU model, with these layouts of VMCS regions.
    ///
    /// # Errors
    /// As [`VmxChoice::profile`]; and where the layouts cannot be together, or there is no VMX for them.
    pub fn profile_with(
        &self,
        model: &Model,
        layouts: &VmxLayouts,
    ) -> Result<Option<Arc<VmxProfile>>, VmxError> {
        let profile = self.profile(model)?;
        if *layouts == VmxLayouts::default() {
            return Ok(profile);
        }
        let profile = profile.ok_or(LayoutRefused::NoVmx)?;
        Ok(Some(Arc::new(profile.with_layouts(layouts)?)))
    }
}

/// A machine cannot have the VMX that is asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmxError {
    /// The profile asks for more than there is.
    #[error(transparent)]
    Profile(#[from] VmxRefused),
    /// Its layouts cannot be.
    #[error(transparent)]
    Layouts(#[from] LayoutRefused),
}

/// VMX as a vCPU has it while it runs.
pub(crate) struct Vmx {
    /// `None` where the machine has no VMX.
    pub profile: Option<Arc<VmxProfile>>,
    /// Address given to VMXON: in VMX operation.
    pub region: Option<u64>,
    /// In VMX non-root operation: a guest executes.
    pub non_root: bool,
    /// Current-VMCS pointer.
    pub current: Option<u64>,
    /// The current VMCS; of no meaning without one.
    pub vmcs: Box<Vmcs>,
    /// The enlightened VMCS that is active in place of a current one.
    pub enlightened: Option<ActiveEnlightened>,
    /// What the last VM entry took from one.
    pub enlightened_entry: Option<EnlightenedEntry>,
    /// L1 asked for a VM exit after the direct flush that L2 has just done.
    pub trap_after_flush: bool,
    /// The check that the last VM entry failed.
    pub failed_check: Option<&'static EntryCheck>,
    /// Controls of the guest that executes.
    pub controls: Controls,
    /// The VM exit that a [`crate::trap::Trap::VmExit`] stands for.
    pub exit: exit::Exit,
    /// The event whose delivery is under way, in the form of the IDT-vectoring information field,
    /// and its error code.
    pub vectoring: Option<(u32, u32)>,
    /// Length of the instruction that the event under way came from.
    pub vectoring_length: u32,
    /// The VM entry just made has an event to inject before the first guest instruction.
    pub inject: bool,
    /// The VM entry just made delivers a pending MTF exit without executing an instruction.
    pub mtf_pending: bool,
    /// The exit under way is that of an NMI: after it, further ones are blocked.
    pub nmi_exit: bool,
    /// NMIs are virtually blocked (virtual NMIs).
    pub virtual_nmi_blocking: bool,
    /// Where the VMX-preemption timer reaches zero: a count of a TSC that was never written.
    pub preemption_deadline: Option<u64>,
    /// The operation at hand, or the one just completed, wrote to the virtual-APIC page.
    pub apic_write: Option<apic::Written>,
    /// The VM entry just made compares the virtual task priority with its threshold.
    pub threshold_due: bool,
    /// A pending virtual interrupt is recognized.
    pub virtual_interrupt: bool,
    /// A notification of posted interrupts was taken or sent: others may have something to take before
    /// the next instruction.
    pub notified: bool,
    /// The loop that the guest's last PAUSE was in.
    pub pause_loop: Option<PauseLoop>,
    /// The IRET at hand has unblocked NMIs, as its VM exit must tell.
    pub iret_unblocked_nmis: bool,
}

/// Bits of a page's physical address: those that any processor has.
const PAGE: u64 = 0x000f_ffff_ffff_f000;

/// The controls of a running guest, read often.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Controls {
    pub pin: u32,
    pub proc1: u32,
    /// Zero unless activated.
    pub proc2: u32,
    /// Zero unless activated.
    pub proc3: u64,
    pub exit: u32,
    pub exceptions: u32,
    /// What to add to the TSC.
    pub tsc_offset: u64,
    /// What to multiply the TSC with before, 48 bits of it behind the point.
    pub tsc_multiplier: Option<u64>,
    /// EPT pointer, where EPT is enabled.
    pub eptp: Option<u64>,
    /// VPID; zero where not enabled.
    pub vpid: u16,
    /// Page that stands for the guest's APIC, where the TPR shadow is in use.
    pub virtual_apic: Option<u64>,
    /// Page whose accesses are virtualized, where they are.
    pub apic_access: Option<u64>,
}

impl Controls {
    pub fn new(vmcs: &Vmcs) -> Controls {
        let word = |field| vmcs.get(field) as u32;
        let proc1_controls = word(Field::CPU_BASED_VM_EXEC_CONTROL);
        let proc2_controls = if proc1_controls & proc1::ACTIVATE_SECONDARY_CONTROLS != 0 {
            word(Field::SECONDARY_VM_EXEC_CONTROL)
        } else {
            0
        };
        let has = |bit| proc2_controls & bit != 0;
        let offsets = proc1_controls & proc1::USE_TSC_OFFSETTING != 0;
        Controls {
            pin: word(Field::PIN_BASED_VM_EXEC_CONTROL),
            proc1: proc1_controls,
            proc2: proc2_controls,
            proc3: if proc1_controls & proc1::ACTIVATE_TERTIARY_CONTROLS != 0 {
                vmcs.get(Field::TERTIARY_VM_EXEC_CONTROL)
            } else {
                0
            },
            exit: word(Field::VM_EXIT_CONTROLS),
            exceptions: word(Field::EXCEPTION_BITMAP),
            tsc_offset: if offsets {
                vmcs.get(Field::TSC_OFFSET)
            } else {
                0
            },
            tsc_multiplier: (offsets && has(proc2::USE_TSC_SCALING))
                .then(|| vmcs.get(Field::TSC_MULTIPLIER)),
            eptp: has(proc2::ENABLE_EPT).then(|| vmcs.get(Field::EPT_POINTER)),
            vpid: if has(proc2::ENABLE_VPID) {
                vmcs.get(Field::VIRTUAL_PROCESSOR_ID) as u16
            } else {
                0
            },
            virtual_apic: (proc1_controls & proc1::USE_TPR_SHADOW != 0)
                .then(|| vmcs.get(Field::VIRTUAL_APIC_PAGE_ADDR) & PAGE),
            apic_access: has(proc2::VIRTUALIZE_APIC_ACCESSES)
                .then(|| vmcs.get(Field::APIC_ACCESS_ADDR) & PAGE),
        }
    }

    /// The TSC as a guest with these controls sees it (Vol. 3C, "Time-Stamp Counter Offsetting and
    /// Scaling").
    pub fn guest_tsc(&self, tsc: u64) -> u64 {
        let scaled = match self.tsc_multiplier {
            Some(multiplier) => ((u128::from(tsc) * u128::from(multiplier)) >> 48) as u64,
            None => tsc,
        };
        scaled.wrapping_add(self.tsc_offset)
    }

    pub fn pin(&self, bit: u32) -> bool {
        self.pin & bit != 0
    }
    pub fn proc1(&self, bit: u32) -> bool {
        self.proc1 & bit != 0
    }
    pub fn proc2(&self, bit: u32) -> bool {
        self.proc2 & bit != 0
    }
    pub fn exit(&self, bit: u32) -> bool {
        self.exit & bit != 0
    }
    pub fn unrestricted(&self) -> bool {
        self.proc2(proc2::UNRESTRICTED_GUEST)
    }
    pub fn virtual_nmis(&self) -> bool {
        self.pin(pin::VIRTUAL_NMIS)
    }
    pub fn virtualizes_ipis(&self) -> bool {
        self.proc3 & proc3::IPI_VIRTUALIZATION != 0
    }
    pub fn delivers_virtual_interrupts(&self) -> bool {
        self.proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)
    }
    pub fn acknowledges(&self) -> bool {
        self.exit(exit_controls::ACKNOWLEDGE_INTERRUPT_ON_EXIT)
    }
}

impl Vmx {
    pub fn new(profile: Option<Arc<VmxProfile>>) -> Vmx {
        Vmx {
            profile,
            region: None,
            non_root: false,
            current: None,
            vmcs: Box::new(Vmcs::new()),
            enlightened: None,
            enlightened_entry: None,
            trap_after_flush: false,
            failed_check: None,
            controls: Controls::default(),
            exit: exit::Exit::default(),
            vectoring: None,
            vectoring_length: 0,
            inject: false,
            mtf_pending: false,
            nmi_exit: false,
            virtual_nmi_blocking: false,
            preemption_deadline: None,
            apic_write: None,
            threshold_due: false,
            virtual_interrupt: false,
            notified: false,
            pause_loop: None,
            iret_unblocked_nmis: false,
        }
    }

    /// What is saved.
    pub fn save(&self) -> VmxState {
        let current = self.has_vmcs();
        let fields = Field::ALL.into_iter().filter(|_| current);
        VmxState {
            region: self.region,
            non_root: self.non_root,
            current: self.current,
            fields: fields
                .map(|field| (field.encoding(), self.vmcs.get(field)))
                .filter(|(_, value)| *value != 0)
                .collect(),
            launched: current && self.vmcs.launched,
            shadow: current && self.vmcs.shadow,
            inject: self.inject,
            mtf_pending: self.mtf_pending,
            virtual_nmi_blocking: self.virtual_nmi_blocking,
            preemption_deadline: self.preemption_deadline,
            apic_write: self.apic_write.map(|written| written.offset),
            threshold_due: self.threshold_due,
            virtual_interrupt: self.virtual_interrupt,
            pause_loop: self.pause_loop,
            enlightened: self.enlightened,
            trap_after_flush: self.trap_after_flush,
        }
    }

    /// Becomes `state`.
    pub fn load(&mut self, state: &VmxState) {
        let profile = self.profile.take();
        *self = Vmx::new(profile);
        self.region = state.region;
        self.non_root = state.non_root;
        self.current = state.current;
        for (encoding, value) in &state.fields {
            if let Some((field, false)) = Field::from_encoding(*encoding) {
                self.vmcs.set(field, *value);
            }
        }
        self.vmcs.launched = state.launched;
        self.vmcs.shadow = state.shadow;
        self.inject = state.inject;
        self.mtf_pending = state.mtf_pending;
        self.virtual_nmi_blocking = state.virtual_nmi_blocking;
        self.preemption_deadline = state.preemption_deadline;
        // The operation is complete: its size no longer matters.
        self.apic_write = state
            .apic_write
            .map(|offset| apic::Written { offset, size: 4 });
        self.threshold_due = state.threshold_due;
        self.virtual_interrupt = state.virtual_interrupt;
        self.pause_loop = state.pause_loop;
        self.enlightened = state.enlightened;
        self.trap_after_flush = state.trap_after_flush;
        if self.non_root {
            self.controls = Controls::new(&self.vmcs);
        }
    }

    /// There is a VMCS for VM entries: a current one, or an enlightened one in its place.
    pub fn has_vmcs(&self) -> bool {
        self.current.is_some() || self.enlightened.is_some()
    }

    /// The monitor trap flag is on.
    pub fn traps_each_instruction(&self) -> bool {
        self.non_root && self.controls.proc1(proc1::MONITOR_TRAP_FLAG)
    }

    /// Whether a field exists: the layout has room for it.
    pub fn has_field(&self, field: Field) -> bool {
        self.profile
            .as_ref()
            .is_some_and(|profile| profile.fields.contains(field))
    }

    /// Capability MSRs. `None` where there is no VMX.
    pub fn caps(&self) -> Option<&Caps> {
        self.profile.as_ref().map(|profile| &profile.caps)
    }
}
