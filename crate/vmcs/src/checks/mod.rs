//! The checks of VM entry on controls, host state and guest state.
//!
//! One [`EntryCheck`] for each row of stage controls, host and guest in `data/vmx_checks.csv`, in
//! the order of that file, which is the order of SDM Vol. 3C, chapter "VM Entries". A row computes
//! its rule from the VMCS, the capability MSRs, [`CpuFacts`] and memory; it changes nothing.
//!
//! A loop of VMRESUME should not pay for 245 rows. Rows stand in seven [`SECTIONS`]; for each field
//! [`Field::groups`] says which of them have a row that reads it, and [`Vmcs::dirty`] collects that.
//! So there are three ways to check:
//!
//! * [`check_controls`], [`check_host`] and [`check_guest`] walk a whole stage.
//! * [`check_dirty`] walks the dirty sections, and of the others the rows marked
//!   [`EntryCheck::always`].
//! * [`recheck_always`] walks only the rows so marked.
//!
//! What rows read outside the VMCS and can change between two entries, hence [`EntryCheck::always`]:
//!
//! | rows | read |
//! |---|---|
//! | C011 | VTPR, byte 80H of the virtual-APIC page |
//! | C042 | IA32_RTIT_CTL.TraceEn |
//! | C077 | SEAM operation |
//! | C051, C069, G113, G123, G124, G131 and C072..C076 | whether the processor is in SMM |
//! | C072..C076, G131 | the VMXON pointer, the executive VMCS |
//! | H029, H030 | IA32_EFER.LMA |
//! | G121, G122 | the first four bytes of the VMCS that the link pointer names |
//! | G123 | the current-VMCS pointer |
//! | G125..G128 | without EPT, the PDPTEs in memory |
//!
//! Everything else outside the VMCS is what the processor *is* ([`Caps`] and the first part of
//! [`CpuFacts`]). A caller that changes it between entries (another CPUID model, restricted
//! capability MSRs) walks all stages again.

mod controls_entry;
mod controls_exec;
mod controls_exit;
mod explain;
mod guest_control;
mod guest_misc;
mod guest_segments;
mod host;
mod rows;
#[cfg(test)]
pub(crate) mod tests;
mod words;

use crate::{Caps, Control, Field, Vmcs, entry, exit, exit2, pin, proc1, proc2, proc3};
use words::*;

pub use explain::{explain, explain_values};
pub use rows::{CHECK_ROWS, CheckRow, Stage};

/// What a VM entry looks at.
#[derive(Clone, Copy)]
pub struct EntryCtx<'a> {
    /// The current VMCS.
    pub vmcs: &'a Vmcs,
    /// The VMX capability MSRs.
    pub caps: &'a Caps,
    /// What rules need of the logical processor.
    pub cpu: CpuFacts,
    /// Guest-physical memory, and what the machine knows of the VMCS regions in it.
    pub memory: &'a dyn PeekMemory,
}

/// What the rules need to know of the logical processor that executes VMLAUNCH or VMRESUME.
///
/// The first part is what the processor is and holds for its life. The second is its state at the
/// entry; rows that read it are marked [`EntryCheck::always`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFacts {
    /// Physical-address width, CPUID 80000008H EAX 7:0, less the key-id bits of TME.
    pub physical_bits: u8,
    /// Linear-address width: 48, or 57 with 5-level paging.
    pub linear_bits: u8,
    /// Bits of IA32_EFER that are not reserved, LMA included.
    pub efer: u64,
    /// Bits of IA32_DEBUGCTL that are not reserved.
    pub debugctl: u64,
    /// Bits of IA32_PERF_GLOBAL_CTRL that are not reserved.
    pub perf_global_ctrl: u64,
    /// Bits of IA32_RTIT_CTL that are not reserved.
    pub rtit_ctl: u64,
    /// Bits of IA32_LBR_CTL that are not reserved.
    pub lbr_ctl: u64,
    /// Bits of IA32_SPEC_CTRL that are not reserved.
    pub spec_ctrl: u64,
    /// Linear-address masking: CR3 bits 62:61 are not reserved.
    pub lam: bool,
    /// SGX: interruptibility bit 4 exists.
    pub sgx: bool,
    /// RTM: pending-debug bit 16 exists.
    pub rtm: bool,
    /// OS bus-lock detection: pending-debug bit 11 exists.
    pub bus_lock_debug: bool,
    /// FRED: an event of type 7 with vector 1 or 2 can be injected.
    pub fred: bool,

    /// IA32_EFER.LMA: the processor is in IA-32e mode.
    pub long_mode: bool,
    /// In system-management mode.
    pub smm: bool,
    /// In SEAM VMX root operation.
    pub seam: bool,
    /// IA32_RTIT_CTL.TraceEn.
    pub tracing: bool,
    /// The current-VMCS pointer.
    pub current_vmcs: u64,
    /// The VMXON pointer.
    pub vmxon: u64,
}

/// Guest-physical memory as VM entry sees it: reads without side effects.
///
/// `None` stands for an address that no memory answers. The bus then returns all ones, and that is
/// what the rules go on with.
pub trait PeekMemory {
    /// Four bytes at `gpa`, which is aligned.
    fn read_u32(&self, gpa: u64) -> Option<u32>;

    /// Eight bytes at `gpa`, which is aligned.
    fn read_u64(&self, gpa: u64) -> Option<u64>;

    /// Whether a VMCS region whose bits 30:0 are `revision` is one this processor takes.
    ///
    /// One identifier on silicon; here each one that is mapped to a layout.
    fn accepts_revision(&self, revision: u32) -> bool;

    /// PDPTE `index` (0..4) of the table that `cr3` names, for a guest without EPT.
    ///
    /// Override it to pass entries that were loaded elsewhere, so that the entry loads what was
    /// checked.
    fn pdpte(&self, cr3: u64, index: u8) -> Option<u64> {
        self.read_u64((cr3 & 0xffff_ffe0) + 8 * u64::from(index))
    }

    /// The VMCS at `gpa`, if the machine holds one: the executive VMCS of a return from SMM.
    fn vmcs_at(&self, _gpa: u64) -> Option<&Vmcs> {
        None
    }
}

/// What a row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The rule holds.
    Holds,
    /// The rule is broken.
    Fails,
    /// The condition that makes the rule apply does not hold.
    NotReached,
}

impl From<bool> for Verdict {
    fn from(holds: bool) -> Self {
        if holds { Self::Holds } else { Self::Fails }
    }
}

/// What happens when a row fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// VMfailInvalid.
    VmfailInvalid,
    /// VMfailValid with this VM-instruction error.
    VmfailValid(u8),
    /// VM-entry failure due to invalid guest state.
    Exit33 {
        /// Exit qualification.
        qualification: u8,
    },
    /// VM-entry failure due to MSR loading. The qualification is the number of the list entry.
    Exit34,
    /// Nothing: a rule for software that the processor does not check.
    Unchecked,
}

/// The section of the SDM that a row is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// VM-execution control fields.
    ExecControls,
    /// VM-exit control fields.
    ExitControls,
    /// VM-entry control fields.
    EntryControls,
    /// What only an entry that returns from SMM checks.
    ReturnFromSmm,
    /// Host control registers, MSRs and SSP.
    HostControl,
    /// Host segment and descriptor-table registers.
    HostSegments,
    /// Host fields that depend on the address-space size.
    AddressSpace,
    /// Guest control registers, debug registers and MSRs.
    GuestControl,
    /// Guest segment registers.
    GuestSegments,
    /// Guest GDTR and IDTR.
    GuestTables,
    /// Guest RIP, RFLAGS and SSP.
    GuestRip,
    /// Activity, interruptibility, pending debug exceptions, link pointer.
    GuestNonRegister,
    /// Guest page-directory-pointer-table entries.
    GuestPdptes,
}

impl Group {
    /// Where the SDM has these rules: volume and section title.
    pub const fn cite(self) -> &'static str {
        match self {
            Self::ExecControls => "SDM Vol. 3C, \"VM-Execution Control Fields\" (checks)",
            Self::ExitControls => "SDM Vol. 3C, \"VM-Exit Control Fields\" (checks)",
            Self::EntryControls => "SDM Vol. 3C, \"VM-Entry Control Fields\" (checks)",
            Self::ReturnFromSmm => "SDM Vol. 3C, \"VM Entries That Return from SMM\"",
            Self::HostControl => "SDM Vol. 3C, \"Checks on Host Control Registers, MSRs, and SSP\"",
            Self::HostSegments => {
                "SDM Vol. 3C, \"Checks on Host Segment and Descriptor-Table Registers\""
            }
            Self::AddressSpace => "SDM Vol. 3C, \"Checks Related to Address-Space Size\"",
            Self::GuestControl => {
                "SDM Vol. 3C, \"Checks on Guest Control Registers, Debug Registers, and MSRs\""
            }
            Self::GuestSegments => "SDM Vol. 3C, \"Checks on Guest Segment Registers\"",
            Self::GuestTables => "SDM Vol. 3C, \"Checks on Guest Descriptor-Table Registers\"",
            Self::GuestRip => "SDM Vol. 3C, \"Checks on Guest RIP, RFLAGS, and SSP\"",
            Self::GuestNonRegister => "SDM Vol. 3C, \"Checks on Guest Non-Register State\"",
            Self::GuestPdptes => {
                "SDM Vol. 3C, \"Checks on Guest Page-Directory-Pointer-Table Entries\""
            }
        }
    }
}

/// One check of VM entry. `id` is stable: traces, the page and tests name it.
#[derive(Debug)]
pub struct EntryCheck {
    /// The row of `vmx_checks.csv`.
    pub id: &'static str,
    /// Where the SDM states the rule.
    pub cite: &'static str,
    /// The section the rule is from.
    pub group: Group,
    /// What its failure leads to.
    pub failure: Failure,
    /// It reads memory, or state of the processor, that can change while the VMCS does not.
    pub always: bool,
    /// Every field of the VMCS that the row reads, those that decide whether it applies included.
    pub fields: &'static [Field],
    /// The rule itself.
    pub check: fn(&EntryCtx) -> Verdict,
}

impl EntryCheck {
    /// A row of the group, with the group's usual failure.
    const fn new(
        group: Group,
        id: &'static str,
        fields: &'static [Field],
        check: fn(&EntryCtx) -> Verdict,
    ) -> Self {
        let failure = match group {
            Group::ExecControls
            | Group::ExitControls
            | Group::EntryControls
            | Group::ReturnFromSmm => Failure::VmfailValid(7),
            Group::HostControl | Group::HostSegments | Group::AddressSpace => {
                Failure::VmfailValid(8)
            }
            Group::GuestPdptes => Failure::Exit33 { qualification: 2 },
            _ => Failure::Exit33 { qualification: 0 },
        };
        Self {
            id,
            cite: group.cite(),
            group,
            failure,
            always: false,
            fields,
            check,
        }
    }

    /// The row, with another failure.
    const fn or(mut self, failure: Failure) -> Self {
        self.failure = failure;
        self
    }

    /// The row, marked [`always`](Self::always).
    const fn each_time(mut self) -> Self {
        self.always = true;
        self
    }

    /// The verdict in this entry: an entry that returns from SMM does not check the VM-execution
    /// controls of the current VMCS.
    pub fn verdict(&self, entry: &EntryCtx) -> Verdict {
        if matches!(self.group, Group::ExecControls) && entry.returns_from_smm() {
            return Verdict::NotReached;
        }
        (self.check)(entry)
    }

    /// Whether it makes this entry fail.
    fn stops(&self, entry: &EntryCtx) -> bool {
        self.failure != Failure::Unchecked && self.verdict(entry) == Verdict::Fails
    }
}

/// Neighbouring rows of one stage: what [`check_dirty`] walks or skips.
#[derive(Debug)]
pub struct Section {
    /// The stage of VM entry.
    pub stage: Stage,
    /// The rows, in SDM order.
    pub rows: &'static [EntryCheck],
    /// A bit for each row that is marked [`EntryCheck::always`].
    always: u128,
}

impl Section {
    const fn new(stage: Stage, rows: &'static [EntryCheck]) -> Self {
        let mut always = 0;
        let mut row = 0;
        while row < rows.len() {
            always |= (rows[row].always as u128) << row;
            row += 1;
        }
        Self {
            stage,
            rows,
            always,
        }
    }

    fn first_failure(&self, entry: &EntryCtx) -> Result<(), &'static EntryCheck> {
        let failure = self.rows.iter().find(|row| row.stops(entry));
        failure.map_or(Ok(()), Err)
    }

    /// As [`first_failure`](Self::first_failure), of the rows marked [`EntryCheck::always`].
    fn first_failure_of_always(&self, entry: &EntryCtx) -> Result<(), &'static EntryCheck> {
        let mut always = self.always;
        while always != 0 {
            let row = &self.rows[always.trailing_zeros() as usize];
            if row.stops(entry) {
                return Err(row);
            }
            always &= always - 1;
        }
        Ok(())
    }
}

/// All rows, in the order in which VM entry walks them. A bit of [`Vmcs::dirty`] is a place here.
pub static SECTIONS: [Section; 7] = [
    Section::new(Stage::Controls, controls_exec::ROWS),
    Section::new(Stage::Controls, controls_exit::ROWS),
    Section::new(Stage::Controls, controls_entry::ROWS),
    Section::new(Stage::Host, host::ROWS),
    Section::new(Stage::Guest, guest_control::ROWS),
    Section::new(Stage::Guest, guest_segments::ROWS),
    Section::new(Stage::Guest, guest_misc::ROWS),
];

/// For each field, by its index, the sections that have a row which reads it: a bit for each place
/// in [`SECTIONS`].
pub(crate) const fn sections_by_field<const N: usize>() -> [u8; N] {
    let mut sections = [0; N];
    let mut place = 0;
    while place < SECTIONS.len() {
        let rows = SECTIONS[place].rows;
        let mut row = 0;
        while row < rows.len() {
            let fields = rows[row].fields;
            let mut field = 0;
            while field < fields.len() {
                sections[fields[field].index()] |= 1 << place;
                field += 1;
            }
            row += 1;
        }
        place += 1;
    }
    sections
}

/// All rows, in the order in which VM entry walks them.
pub fn all() -> impl Iterator<Item = &'static EntryCheck> {
    SECTIONS.iter().flat_map(|section| section.rows)
}

/// The row with this id.
pub fn by_id(id: &str) -> Option<&'static EntryCheck> {
    all().find(|row| row.id == id)
}

fn check_stage(stage: Stage, entry: &EntryCtx) -> Result<(), &'static EntryCheck> {
    SECTIONS
        .iter()
        .filter(|section| section.stage == stage)
        .try_for_each(|section| section.first_failure(entry))
}

/// The checks on VM-execution, VM-exit and VM-entry controls.
///
/// # Errors
/// The first row that fails, in SDM order.
pub fn check_controls(entry: &EntryCtx) -> Result<(), &'static EntryCheck> {
    check_stage(Stage::Controls, entry)
}

/// The checks on the host-state area.
///
/// # Errors
/// The first row that fails, in SDM order.
pub fn check_host(entry: &EntryCtx) -> Result<(), &'static EntryCheck> {
    check_stage(Stage::Host, entry)
}

/// The checks on the guest-state area.
///
/// # Errors
/// The first row that fails, in SDM order.
pub fn check_guest(entry: &EntryCtx) -> Result<(), &'static EntryCheck> {
    check_stage(Stage::Guest, entry)
}

/// All checks of the three stages that can have another verdict than when all of them last passed
/// and [`Vmcs::dirty`] was cleared.
///
/// Clear it only when this passes, and not when the entry returns from SMM: such an entry leaves
/// the VM-execution controls unchecked.
///
/// # Errors
/// The first row that fails, in SDM order.
pub fn check_dirty(entry: &EntryCtx) -> Result<(), &'static EntryCheck> {
    for (place, section) in SECTIONS.iter().enumerate() {
        if entry.vmcs.dirty >> place & 1 != 0 {
            section.first_failure(entry)?;
        } else {
            section.first_failure_of_always(entry)?;
        }
    }
    Ok(())
}

/// The checks that can fail although no field has changed since all passed.
///
/// # Errors
/// The first row that fails, in SDM order.
pub fn recheck_always(entry: &EntryCtx) -> Result<(), &'static EntryCheck> {
    SECTIONS
        .iter()
        .try_for_each(|section| section.first_failure_of_always(entry))
}
