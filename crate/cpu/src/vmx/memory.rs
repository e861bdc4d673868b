//! VMCS regions in guest memory: the border between bytes and fields.
//!
//! A region's revision identifier names its layout. What comes in may be of any layout that the machine
//! accepts; what goes out is of the written one, so that a region of another changes over when its VMCS
//! next stops being current.

use hypernest_vmcs::{RegionPage, Vmcs, proc2, revision as revision_of};

use super::abort;
use crate::mem::Ctx;

/// Bit 31 of a region's first word: a shadow VMCS.
pub(super) const SHADOW: u32 = 1 << 31;

/// Where a VMCS may pass between the processor, guest memory and saved states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Border {
    /// VMPTRLD of the VMCS that is current.
    LoadCurrent,
    /// VMPTRLD of a region whose revision is not accepted.
    LoadUnaccepted,
    /// VMPTRLD of another VMCS.
    LoadOther,
    /// VMCLEAR of the current VMCS.
    ClearCurrent,
    /// VMCLEAR of another.
    ClearOther,
    /// VMXOFF.
    Vmxoff,
    /// A VM entry by an enlightened VMCS, which takes its place.
    Enlightened,
    /// VMREAD and VMWRITE of a guest, in the VMCS that the link pointer names.
    Shadow,
    /// Getting the nested state.
    GetNestedState,
    /// Setting the nested state, where it is not refused.
    SetNestedState,
    /// INIT: it waits in VMX root operation, is an exit in a guest, and finds no current VMCS outside.
    Init,
    /// A reset.
    Reset,
    /// Saving the state of the vCPU, for a snapshot or for another engine, and taking it up.
    SavedState,
}

/// What becomes of the VMCS that was current.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Current {
    /// It stays current, and its region as it is.
    Stays,
    /// It is written to its region in the written layout, and is current no longer.
    Written,
    /// It is current no longer; its region has what was last written there.
    Forgotten,
}

/// Every border, with what becomes of the current VMCS there.
pub(crate) const BORDERS: [(Border, Current); 13] = [
    (Border::LoadCurrent, Current::Stays),
    (Border::LoadUnaccepted, Current::Stays),
    (Border::LoadOther, Current::Written),
    (Border::ClearCurrent, Current::Written),
    (Border::ClearOther, Current::Stays),
    (Border::Vmxoff, Current::Written),
    (Border::Enlightened, Current::Written),
    (Border::Shadow, Current::Stays),
    (Border::GetNestedState, Current::Stays),
    (Border::SetNestedState, Current::Forgotten),
    (Border::Init, Current::Stays),
    (Border::Reset, Current::Forgotten),
    (Border::SavedState, Current::Stays),
];

impl Border {
    /// What becomes of the current VMCS here.
    pub const fn current(self) -> Current {
        BORDERS[self as usize].1
    }
}

/// The current VMCS comes to a border.
pub(super) fn cross(x: &mut Ctx, border: Border) {
    match border.current() {
        Current::Stays => return,
        Current::Written => write_back(x),
        Current::Forgotten => {}
    }
    x.cpu.vmx.current = None;
    *x.cpu.vmx.vmcs = Vmcs::new();
}

/// The revision identifier in a region, with the shadow indicator.
pub(super) fn revision(x: &mut Ctx, address: u64) -> u32 {
    let mut bytes = [0; 4];
    x.load_physical(address, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// VMPTRLD: makes the VMCS at `address` current. `false`, with nothing changed, where its revision is not
/// accepted.
pub(super) fn load(x: &mut Ctx, address: u64) -> bool {
    if x.cpu.vmx.current == Some(address) {
        cross(x, Border::LoadCurrent);
        return true;
    }
    let Some(profile) = x.cpu.vmx.profile.clone() else {
        return false;
    };
    let word = revision(x, address);
    let shadows = profile.caps.allows_proc2(proc2::VMCS_SHADOWING);
    let map = profile.regions().map(word & !SHADOW);
    let Some(map) = map.filter(|_| word & SHADOW == 0 || shadows) else {
        cross(x, Border::LoadUnaccepted);
        return false;
    };
    let mut region: RegionPage = [0; 4096];
    x.load_physical(address, &mut region[..map.used()]);
    cross(x, Border::LoadOther);
    map.read(&region, &mut x.cpu.vmx.vmcs);
    x.cpu.vmx.current = Some(address);
    true
}

/// Writes the current VMCS to its region, in the written layout.
fn write_back(x: &mut Ctx) {
    let (Some(address), Some(profile)) = (x.cpu.vmx.current, x.cpu.vmx.profile.clone()) else {
        return;
    };
    let map = profile.regions().writer();
    let mut region: RegionPage = [0; 4096];
    let mut size = map.used();
    x.load_physical(address, &mut region[..size]);
    if revision_of(&region).is_none_or(|(id, _)| id != map.revision()) {
        // All of what was there in another layout goes.
        size = profile.regions().advertised().size();
    }
    // The indicator is the hypervisor's, but for a VMX abort.
    if let Some(indicator) = region[abort::INDICATOR..].first_chunk() {
        x.cpu.vmx.vmcs.abort = u32::from_le_bytes(*indicator);
    }
    map.write(&x.cpu.vmx.vmcs, &mut region);
    x.store_physical(address, &region[..size]);
}

/// VMCLEAR. Of a VMCS that is not current only the launch state changes; a region that nothing is known of
/// stays as it is.
pub(super) fn clear(x: &mut Ctx, address: u64) {
    if x.cpu.vmx.current == Some(address) {
        x.cpu.vmx.vmcs.launched = false;
        cross(x, Border::ClearCurrent);
        return;
    }
    cross(x, Border::ClearOther);
    let Some(profile) = x.cpu.vmx.profile.clone() else {
        return;
    };
    let id = revision(x, address) & !SHADOW;
    if let Some(launch) = profile.regions().map(id).and_then(|map| map.launch_state()) {
        let at = address.wrapping_add(u64::from(launch.offset));
        let clear = launch.clear.to_le_bytes();
        x.store_physical(at, &clear[..usize::from(launch.width)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_each_border_in_its_place() {
        for (place, (border, _)) in BORDERS.iter().enumerate() {
            assert_eq!(*border as usize, place);
        }
        assert_eq!(Border::SavedState as usize, BORDERS.len() - 1);
    }
}
