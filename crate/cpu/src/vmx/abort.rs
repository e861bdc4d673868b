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
    if let Some(region) = x.cpu.vmx.current.or_else(|| super::enlightened::active(x)) {
        x.store_physical(
            region.wrapping_add(INDICATOR as u64),
            &indicator.to_le_bytes(),
        );
    }
    x.cpu.vmx.vmcs.abort = indicator;
    x.cpu.vmx.non_root = false;
    x.cpu.vmx.preemption_deadline = None;
    x.cpu.activity = Activity::VmxAbort;
    Trap::VmxAbort(indicator)
}

#[cfg(test)]
mod tests {
    use hypernest_vmcs::{Field, exit};

    use super::*;
    use crate::testing::Fixture;
    use crate::vcpu::cr;
    use crate::vmx::exit::perform;

    const REGION: u64 = 0x9000;
    const LIST: u64 = 0xa000;

    /// A guest in 64-bit mode whose hypervisor is of `host` bits.
    fn guest(host: u32) -> Fixture {
        let mut f = Fixture::long();
        f.cpu.vmx.current = Some(REGION);
        f.cpu.vmx.non_root = true;
        let controls = match host {
            64 => exit::HOST_ADDRESS_SPACE_SIZE,
            _ => 0,
        };
        let vmcs = &mut f.cpu.vmx.vmcs;
        vmcs.set(Field::VM_EXIT_CONTROLS, controls.into());
        vmcs.set(Field::HOST_CR0, f.cpu.cr0);
        vmcs.set(Field::HOST_CR3, f.cpu.cr3);
        vmcs.set(Field::HOST_CR4, f.cpu.cr4);
        f
    }

    /// The indicator that an exit leaves in memory; 0 where it succeeds.
    fn indicator(mut f: Fixture) -> u32 {
        let result = f.with(perform);
        let word = u32::from_le_bytes(f.ram.load(REGION + INDICATOR as u64).unwrap());
        assert_eq!(f.cpu.vmx.vmcs.abort, word);
        assert!(!f.cpu.vmx.non_root);
        if word == 0 {
            assert_eq!(result, Ok(()));
        } else {
            assert_eq!(result, Err(Trap::VmxAbort(word)));
        }
        word
    }

    #[test]
    fn an_exit_without_trouble_leaves_no_indicator() {
        assert_eq!(indicator(guest(64)), 0);
    }

    #[test]
    fn m007_an_msr_that_cannot_be_stored_aborts_with_1() {
        for header in [0x808, 0x174 | 1 << 32, 0x9e, 0x4000_0000] {
            let mut f = guest(64);
            f.poke(LIST, header);
            f.cpu.vmx.vmcs.set(Field::VM_EXIT_MSR_STORE_ADDR, LIST);
            f.cpu.vmx.vmcs.set(Field::VM_EXIT_MSR_STORE_COUNT, 1);
            assert_eq!(indicator(f), STORING_MSRS, "{header:#x}");
        }
    }

    #[test]
    fn m008_an_msr_that_cannot_be_loaded_aborts_with_4() {
        for header in [
            0x808,
            0x174 | 1 << 32,
            0xc000_0100,
            0xc000_0101,
            0x79,
            0x8b,
            0x9b,
            0x4000_0000,
        ] {
            let mut f = guest(64);
            f.poke(LIST, header);
            f.cpu.vmx.vmcs.set(Field::VM_EXIT_MSR_LOAD_ADDR, LIST);
            f.cpu.vmx.vmcs.set(Field::VM_EXIT_MSR_LOAD_COUNT, 1);
            assert_eq!(indicator(f), LOADING_MSRS, "{header:#x}");
        }
    }

    #[test]
    fn m009_page_directory_pointers_that_are_not_valid_abort_with_2() {
        for (pointer, expected) in [
            (0x6001, 0),
            (0x6003, HOST_PDPTES),
            (0x6001 | 1 << 51, HOST_PDPTES),
        ] {
            let mut f = guest(32);
            f.cpu.msrs.efer &= !(cr::EFER_LMA | cr::EFER_LME);
            for n in 0..4 {
                f.poke(LIST + 8 * n, 0);
            }
            f.poke(LIST + 8, pointer);
            f.cpu.vmx.vmcs.set(Field::HOST_CR3, LIST);
            assert_eq!(indicator(f), expected, "{pointer:#x}");
        }
    }

    #[test]
    fn m012_a_32_bit_host_of_a_guest_in_ia_32e_mode_aborts_with_6() {
        assert_eq!(indicator(guest(32)), IA_32E_MODE);
    }
}
