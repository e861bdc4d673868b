//! VMCS regions in guest memory: the border between bytes and fields.

use hypernest_vmcs::{Vmcs, proc2};

use super::abort;
use crate::mem::Ctx;

/// Bit 31 of a region's first word: a shadow VMCS.
const SHADOW: u32 = 1 << 31;

/// The revision identifier in a region, with the shadow indicator.
pub(super) fn revision(x: &mut Ctx, address: u64) -> u32 {
    let mut bytes = [0; 4];
    x.load_physical(address, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Makes the VMCS at `address` current, after the one that was is written back. `false`, with nothing
/// changed, where its revision is not accepted.
pub(super) fn load(x: &mut Ctx, address: u64) -> bool {
    let Some(profile) = x.cpu.vmx.profile.clone() else {
        return false;
    };
    let word = revision(x, address);
    let shadows = profile.caps.allows_proc2(proc2::VMCS_SHADOWING);
    if word & !SHADOW != profile.layout.revision() || word & SHADOW != 0 && !shadows {
        return false;
    }
    let mut bytes = [0; 4096];
    x.load_physical(address, &mut bytes);
    let size = profile.layout.size().min(4096);
    let Ok(vmcs) = profile.layout.read(&bytes[..size]) else {
        return false;
    };
    flush(x);
    *x.cpu.vmx.vmcs = vmcs;
    x.cpu.vmx.vmcs.dirty = !0;
    x.cpu.vmx.current = Some(address);
    true
}

/// Writes the current VMCS back to its region.
pub(super) fn flush(x: &mut Ctx) {
    let (Some(address), Some(profile)) = (x.cpu.vmx.current, x.cpu.vmx.profile.clone()) else {
        return;
    };
    let size = profile.layout.size().min(4096);
    let mut bytes = [0; 4096];
    x.load_physical(address, &mut bytes[..size]);
    // The indicator is the hypervisor's, but for a VMX abort.
    if let Some(indicator) = bytes[abort::INDICATOR..].first_chunk() {
        x.cpu.vmx.vmcs.abort = u32::from_le_bytes(*indicator);
    }
    if profile
        .layout
        .write(&x.cpu.vmx.vmcs, &mut bytes[..size])
        .is_ok()
    {
        x.store_physical(address, &bytes[..size]);
    }
    *x.cpu.vmx.vmcs = Vmcs::new();
}

/// VMCLEAR of a VMCS that is not current: only its launch state changes.
pub(super) fn clear(x: &mut Ctx, address: u64) {
    let Some(profile) = x.cpu.vmx.profile.clone() else {
        return;
    };
    if revision(x, address) & !SHADOW == profile.layout.revision()
        && let Some(launch) = profile.layout.launch_state()
    {
        let at = address.wrapping_add(u64::from(launch.offset));
        let clear = launch.clear.to_le_bytes();
        x.store_physical(at, &clear[..usize::from(launch.width)]);
    }
}
