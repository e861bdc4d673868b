//! What the Hyper-V interface keeps, as it is saved.

use serde::{Deserialize, Serialize};

/// A synthetic timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyntheticTimerState {
    /// HV_X64_MSR_STIMERn_CONFIG.
    pub config: u64,
    /// HV_X64_MSR_STIMERn_COUNT: an expiration time, or the period, in 100 ns.
    pub count: u64,
    /// Reference time of the next expiration; `None` while it does not run.
    pub expiration: Option<u64>,
    /// It has expired, and its message waits for room.
    pub message_waits: bool,
}

/// The guest that a vCPU last entered by an enlightened VMCS, as hypercalls of such guests name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NestedGuestState {
    /// Its virtual machine.
    pub vm_id: u64,
    /// Its virtual processor.
    pub vp_id: u32,
    /// Address of its partition assist page.
    pub partition_assist: u64,
    /// Its hypervisor lets the flushes that it asks for be done without an exit.
    pub direct_flush: bool,
}

/// The Hyper-V interface of a vCPU. All zero where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervState {
    /// HV_X64_MSR_GUEST_OS_ID: of the machine, the same in every vCPU.
    pub guest_os_id: u64,
    /// HV_X64_MSR_HYPERCALL: of the machine.
    pub hypercall: u64,
    /// HV_X64_MSR_REFERENCE_TSC: of the machine.
    pub reference_tsc: u64,
    /// HV_X64_MSR_TSC_INVARIANT_CONTROL: of the machine.
    pub tsc_invariant: u64,
    /// HV_X64_MSR_VP_ASSIST_PAGE.
    pub assist_page: u64,
    /// HV_X64_MSR_SCONTROL.
    pub scontrol: u64,
    /// HV_X64_MSR_SIEFP.
    pub siefp: u64,
    /// HV_X64_MSR_SIMP.
    pub simp: u64,
    /// HV_X64_MSR_SINT0 to 15.
    pub sint: [u64; 16],
    /// The synthetic timers.
    pub timers: [SyntheticTimerState; 4],
    /// Who was entered last by an enlightened VMCS.
    pub nested: NestedGuestState,
}

impl HypervState {
    /// After power-up: all sources of synthetic interrupts are masked.
    pub(crate) fn reset() -> HypervState {
        HypervState {
            sint: [super::synic::SINT_MASKED; 16],
            ..HypervState::default()
        }
    }
}
