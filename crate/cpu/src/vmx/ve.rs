//! Virtualization exceptions (Vol. 3C, "Virtualization Exceptions"): EPT violations that the guest
//! handles itself.

use hypernest_vmcs::{Field, proc2};

use super::exit::{Exit, NMI_UNBLOCKED};
use crate::mem::Ctx;
use crate::trap::{Fault, Trap};
use crate::watch;

/// What says that an earlier exception is still being handled.
const BUSY: u32 = !0;

/// The #VE that an EPT violation is to the guest, its information area written. `None` where it is
/// a VM exit.
pub(crate) fn convert(x: &mut Ctx, exit: &Exit) -> Option<Trap> {
    let vmx = &x.cpu.vmx;
    let asked = exit.convertible && vmx.non_root && vmx.controls.proc2(proc2::EPT_VIOLATION_VE);
    if !asked || !x.cpu.protected() || vmx.vectoring.is_some() {
        return None;
    }
    let area = vmx.vmcs.get(Field::VE_INFORMATION_ADDRESS);
    let index = vmx.vmcs.get(Field::EPTP_INDEX) as u16;
    let mut state = [0; 4];
    x.load_physical(area.wrapping_add(4), &mut state);
    if state != [0; 4] {
        return None;
    }
    let mut qualification = exit.qualification;
    if x.cpu.vmx.iret_unblocked_nmis {
        qualification |= u64::from(NMI_UNBLOCKED);
    }
    x.store_physical(area, &u32::from(exit.reason).to_le_bytes());
    x.store_physical(area.wrapping_add(4), &BUSY.to_le_bytes());
    x.store_physical(area.wrapping_add(8), &qualification.to_le_bytes());
    x.store_physical(
        area.wrapping_add(16),
        &exit.linear.unwrap_or(0).to_le_bytes(),
    );
    x.store_physical(
        area.wrapping_add(24),
        &exit.guest_physical.unwrap_or(0).to_le_bytes(),
    );
    x.store_physical(area.wrapping_add(32), &index.to_le_bytes());
    watch::converted(x, exit);
    Some(Trap::Fault(Fault::Virtualization))
}
