//! Debug registers and single step (Vol. 3B, "Debug, Branch Profile, TSC").

use crate::trap::Fault;
use crate::vcpu::Vcpu;

/// DR6.BS.
pub(crate) const SINGLE_STEP: u64 = 1 << 14;

/// The fault of an armed instruction breakpoint at `linear`, unless RF holds it off.
pub(crate) fn instruction_breakpoint(_cpu: &Vcpu, _linear: u64) -> Option<Fault> {
    None
}

/// The trap of the instruction before, if it met a debug condition. Clears what was pending.
pub(crate) fn pending_trap(_cpu: &mut Vcpu) -> Option<Fault> {
    None
}
