//! The entry checks of `hypernest_vmcs`, asked about this processor.

use hypernest_vmcs::Vmcs;
use hypernest_vmcs::checks::{CpuFacts, EntryCheck, EntryCtx, PeekMemory, check_dirty};

use super::regions::Regions;
use crate::mem::Ctx;
use crate::ram::Ram;
use crate::vcpu::{Vcpu, cr};

struct Memory<'a> {
    ram: &'a Ram,
    regions: &'a Regions,
}

impl PeekMemory for Memory<'_> {
    fn read_u32(&self, address: u64) -> Option<u32> {
        self.ram.load::<4>(address).ok().map(u32::from_le_bytes)
    }

    fn read_u64(&self, address: u64) -> Option<u64> {
        self.ram.load::<8>(address).ok().map(u64::from_le_bytes)
    }

    fn accepts_revision(&self, revision: u32) -> bool {
        self.regions.map(revision).is_some()
    }
}

/// What the rules need to know of a vCPU.
pub(super) fn facts(cpu: &Vcpu) -> CpuFacts {
    CpuFacts {
        physical_bits: cpu.model.physical_bits as u8,
        linear_bits: 48,
        efer: cpu.model.efer_bits(),
        debugctl: crate::exec::msr::DEBUGCTL_BITS,
        perf_global_ctrl: 0,
        rtit_ctl: 0,
        lbr_ctl: 0,
        spec_ctrl: 0,
        lam: false,
        sgx: false,
        rtm: false,
        bus_lock_debug: false,
        fred: false,
        long_mode: cpu.msrs.efer & cr::EFER_LMA != 0,
        smm: false,
        seam: false,
        tracing: false,
        current_vmcs: cpu.vmx.current.unwrap_or(!0),
        vmxon: cpu.vmx.region.unwrap_or(!0),
    }
}

/// The first check of controls, host state and guest state that fails, in the manual's order.
pub(super) fn failing(x: &Ctx) -> Option<&'static EntryCheck> {
    failing_in(x.cpu, x.ram, &x.cpu.vmx.vmcs, facts(x.cpu)).err()
}

/// The same of any VMCS, for a vCPU about which these are the facts.
pub(super) fn failing_in(
    cpu: &Vcpu,
    ram: &Ram,
    vmcs: &Vmcs,
    facts: CpuFacts,
) -> Result<(), &'static EntryCheck> {
    let Some(profile) = cpu.vmx.profile.as_deref() else {
        return Ok(());
    };
    let memory = Memory {
        ram,
        regions: profile.regions(),
    };
    check_dirty(&EntryCtx {
        vmcs,
        caps: &profile.caps,
        cpu: facts,
        memory: &memory,
    })
}
