//! VM entries and exits by the enlightened VMCS (Hypervisor Top-Level Functional Specification, "Enlightened
//! VMCS"), which the VP assist page names.
//!
//! While one is active there is no current VMCS: its values are in `Vmx::vmcs`, as those of a current one
//! are. Every VM exit writes what it changed into the page, so that nothing is ever waiting to be written.

use hypernest_vmcs::enlightened::{self, Enlightenments, Page, SIZE, Written};
use hypernest_vmcs::{ExitReason, Field, Vmcs};
use serde::{Deserialize, Serialize};

use super::Vmx;
use super::exit::{Exit, leave};
use super::memory::{self, Border};
use crate::hyperv::{self, NestedGuestState};
use crate::mem::Ctx;
use crate::ram::Ram;
use crate::trap::{Exec, Trap, UD};
use crate::vcpu::Vcpu;

/// The VP assist page: whether VM entries use an enlightened VMCS, and which.
const ENLIGHTEN_ENTRY: u64 = 40;
const CURRENT: u64 = 48;
/// Pointers that name none.
const NONE: [u64; 2] = [!0, !1];

/// Which enlightened VMCS is active.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActiveEnlightened {
    /// The one at this address.
    At(u64),
    /// The one that the VP assist page names, which is looked up when it is needed: a nested state can be
    /// set before the register that says where that page is.
    ByAssistPage,
}

/// What a VM entry has taken from an enlightened VMCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnlightenedEntry {
    /// Address of the page.
    pub address: u64,
    /// The groups that were not read: the clean fields, or none where they did not count.
    pub clean: u32,
}

/// What a VM entry finds.
pub(super) enum Picked {
    /// No enlightened VMCS is asked for.
    None,
    /// It is loaded.
    Loaded,
    /// It cannot be used: VMfailInvalid.
    Refused,
}

/// The enlightened VMCS that the assist page asks for.
fn asked_for(x: &mut Ctx) -> Option<u64> {
    x.cpu.vmx.profile.as_ref()?;
    let page = hyperv::assist_page(x.cpu)?;
    let mut on = [0];
    x.load_physical(page + ENLIGHTEN_ENTRY, &mut on);
    if on[0] == 0 {
        return None;
    }
    let mut pointer = [0; 8];
    x.load_physical(page + CURRENT, &mut pointer);
    let pointer = u64::from_le_bytes(pointer);
    (!NONE.contains(&pointer)).then_some(pointer)
}

/// The address of the active one.
pub(super) fn active(x: &mut Ctx) -> Option<u64> {
    match x.cpu.vmx.enlightened? {
        ActiveEnlightened::At(address) => Some(address),
        ActiveEnlightened::ByAssistPage => {
            let address = asked_for(x)?;
            x.cpu.vmx.enlightened = Some(ActiveEnlightened::At(address));
            Some(address)
        }
    }
}

/// No enlightened VMCS is active any more. There is nothing to write.
pub(super) fn release(x: &mut Ctx) {
    if x.cpu.vmx.enlightened.take().is_some() {
        *x.cpu.vmx.vmcs = Vmcs::new();
    }
}

/// Before a VM entry: reads what it needs of the enlightened VMCS that the assist page asks for. On VMLAUNCH
/// and after a change of the pointer the clean fields do not count.
pub(super) fn pick(x: &mut Ctx, resume: bool) -> Exec<Picked> {
    x.cpu.vmx.enlightened_entry = None;
    let Some(address) = asked_for(x) else {
        release(x);
        return Ok(Picked::None);
    };
    let mut page: Page = [0; SIZE];
    let aligned = address & 0xfff == 0;
    if !aligned || x.ram.read(address, &mut page).is_err() {
        return Err(UD);
    }
    let changed = active(x) != Some(address);
    if changed {
        memory::cross(x, Border::Enlightened);
        release(x);
        let version = enlightened::version(&page);
        let advertised = x.cpu.vmx.profile.as_ref().map(|p| p.layout.revision());
        if version != enlightened::VERSION && Some(version) != advertised {
            return Ok(Picked::Refused);
        }
        *x.cpu.vmx.vmcs = Vmcs::new();
        x.cpu.vmx.enlightened = Some(ActiveEnlightened::At(address));
    }
    let clean = if changed || !resume {
        0
    } else {
        enlightened::clean_fields(&page)
    };
    enlightened::read(&page, clean, &mut x.cpu.vmx.vmcs);
    // There is no launch state: whichever instruction comes is right.
    x.cpu.vmx.vmcs.launched = resume;
    x.cpu.vmx.enlightened_entry = Some(EnlightenedEntry { address, clean });
    if clean & enlightened::CLEAN_ENLIGHTENMENTS == 0
        && let Some(state) = hyperv::state(x)
    {
        state.nested = nested_guest(&enlightened::enlightenments(&page));
    }
    Ok(Picked::Loaded)
}

fn nested_guest(value: &Enlightenments) -> NestedGuestState {
    NestedGuestState {
        vm_id: value.vm_id,
        vp_id: value.vp_id,
        partition_assist: value.partition_assist,
        direct_flush: value.control & enlightened::DIRECT_FLUSH != 0,
    }
}

/// The VM entry succeeded: everything is clean until L1 says otherwise.
pub(super) fn entered(x: &mut Ctx) {
    if let Some(address) = active(x) {
        let clean = enlightened::ALL_CLEAN.to_le_bytes();
        x.store_physical(address + enlightened::clean_fields_offset(), &clean);
    }
}

/// Writes what a VM exit, or an entry or instruction that failed, has to tell.
pub(super) fn store(x: &mut Ctx, what: Written) {
    let Some(address) = active(x) else { return };
    let mut page: Page = [0; SIZE];
    x.load_physical(address, &mut page);
    enlightened::write(&x.cpu.vmx.vmcs, &mut page, what);
    x.store_physical(address, &page);
}

/// VMCLEAR while VM entries are enlightened: the region is taken for an enlightened VMCS, active or not, and
/// not written. Whether that was the case.
pub(super) fn vmclear(x: &mut Ctx, address: u64) -> bool {
    if active(x) == Some(address) {
        release(x);
        return true;
    }
    asked_for(x).is_some() && x.cpu.vmx.current != Some(address)
}

/// Whether VMPTRLD is without effect: one is active. It ends being so when the assist page no longer asks for
/// one.
pub(super) fn holds_vmptrld(x: &mut Ctx) -> bool {
    if x.cpu.vmx.enlightened.is_none() {
        return false;
    }
    if asked_for(x).is_some() {
        return true;
    }
    release(x);
    false
}

/// VMREAD of a field of the active one, from its page. `None` where it has no place there.
pub(super) fn vmread(x: &mut Ctx, field: Field) -> Option<u64> {
    let address = active(x)?;
    let slot = enlightened::slot(field)?;
    let mut bytes = [0; 8];
    let at = address + u64::from(slot.offset);
    x.load_physical(at, &mut bytes[..usize::from(slot.width)]);
    Some(u64::from_le_bytes(bytes))
}

/// The VM exit after a direct flush of L2, where the partition assist page asks for it.
pub(crate) fn flushed(cpu: &mut Vcpu) -> Trap {
    // Deviation: that of an EPT misconfiguration with bit 28, as hypervisors know it.
    let exit = Exit {
        synthetic: true,
        ..Exit::after(ExitReason::EPT_MISCONFIGURATION)
    };
    leave(cpu, exit)
}

/// While L1 executes: all of the active one, whose clean fields are right at VM entries alone. Where its
/// address is not known yet `vmcs` stays.
pub(super) fn read_all(vmx: &Vmx, ram: &Ram, vmcs: &mut Vmcs) {
    if let Some(ActiveEnlightened::At(address)) = vmx.enlightened {
        let mut page: Page = [0; SIZE];
        if ram.read(address, &mut page).is_ok() {
            enlightened::read(&page, 0, vmcs);
        }
    }
}
