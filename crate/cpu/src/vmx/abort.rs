//! VMX aborts (Vol. 3C, "VMX Aborts"): VM exits that cannot be completed.

use crate::mem::Ctx;
use crate::state::Activity;
use crate::trap::Trap;

/// VMX-abort indicators.
pub(super) const STORING_MSRS: u32 = 1;
pub(super) const HOST_PDPTES: u32 = 2;
pub(super) const LOADING_MSRS: u32 = 4;
pub(super) const IA_32E_MODE: u32 = 6;

/// What a VMX-abort indicator says, in words.
pub fn vmx_abort_cause(indicator: u32) -> &'static str {
    match indicator {
        STORING_MSRS => "the MSR-store list of the VM exit could not be stored",
        HOST_PDPTES => "the host's page-directory pointers are not valid",
        LOADING_MSRS => "the MSR-load list of the VM exit could not be loaded",
        IA_32E_MODE => "a guest in IA-32e mode left to a host without it",
        _ => "of no known cause",
    }
}

/// Offset of the indicator in a VMCS region.
pub(super) const INDICATOR: usize = 4;

/// Leaves the indicator in the region of the current VMCS, and the vCPU in a shutdown state from which
/// only a reset wakes it. The VMCS itself stays as it is.
pub(super) fn abort(x: &mut Ctx, indicator: u32) -> Trap {
    if let Some(region) = x.cpu.vmx.current {
        x.store_physical(
            region.wrapping_add(INDICATOR as u64),
            &indicator.to_le_bytes(),
        );
    }
    x.cpu.vmx.non_root = false;
    x.cpu.vmx.preemption_deadline = None;
    x.cpu.activity = Activity::VmxAbort;
    Trap::VmxAbort(indicator)
}
