//! VM functions (Vol. 3C, "VM Functions"): what a guest does without leaving.

use hypernest_vmcs::{ExitReason, Field, proc2, vmfunc};

use super::ept;
use super::exit::{Exit, leave};
use crate::mem::Ctx;
use crate::trap::{Exec, UD};
use crate::vcpu::reg;

/// Entries of an EPTP list.
const LIST: u64 = 512;

/// VMFUNC: in a guest, at any privilege and in any mode.
pub(crate) fn vmfunc(x: &mut Ctx, length: u32) -> Exec {
    let function = x.cpu.gpr[reg::RAX] as u32;
    let exists = x.cpu.vmx.non_root && x.cpu.vmx.controls.proc2(proc2::ENABLE_VM_FUNCTIONS);
    if !exists || function > 63 {
        return Err(UD);
    }
    let enabled = x.cpu.vmx.vmcs.get(Field::VM_FUNCTION_CONTROL) >> function & 1 != 0;
    let done = enabled && 1 << function == vmfunc::EPTP_SWITCHING && switch_eptp(x);
    if done {
        return Ok(());
    }
    let exit = Exit {
        instruction_length: length,
        ..Exit::new(ExitReason::VMFUNC)
    };
    Err(leave(x.cpu, exit))
}

/// EPTP switching. `false` where the list has no such entry, or one that VM entry would refuse.
fn switch_eptp(x: &mut Ctx) -> bool {
    let index = x.cpu.gpr[reg::RCX] as u32;
    if u64::from(index) >= LIST {
        return false;
    }
    let list = x.cpu.vmx.vmcs.get(Field::EPTP_LIST_ADDRESS);
    let mut entry = [0; 8];
    x.load_physical(list.wrapping_add(8 * u64::from(index)), &mut entry);
    let eptp = u64::from_le_bytes(entry);
    if !ept::pointer_is_valid(x.cpu, eptp) {
        return false;
    }
    x.cpu.vmx.vmcs.set(Field::EPT_POINTER, eptp);
    x.cpu.vmx.controls.eptp = Some(eptp);
    // Whether or not the guest has virtualization exceptions, where the processor does.
    let caps = x.cpu.vmx.caps();
    if caps.is_some_and(|caps| caps.allows_proc2(proc2::EPT_VIOLATION_VE)) {
        x.cpu.vmx.vmcs.set(Field::EPTP_INDEX, u64::from(index));
    }
    // What was cached under either pointer stays; that of the other is of no use now.
    let pcid = x.cpu.current_pcid();
    x.cpu.tlb.switch_ept(eptp, pcid);
    x.cpu.refresh();
    true
}
