//! Debug registers and single step (Vol. 3B, "Debug, Branch Profile, TSC, and Intel RDT Features").

use crate::flags::bit;
use crate::trap::Fault;
use crate::vcpu::Vcpu;

/// DR6.BD: a debug register was accessed while DR7.GD was set.
pub(crate) const GENERAL_DETECT: u64 = 1 << 13;
/// DR6.BS.
pub(crate) const SINGLE_STEP: u64 = 1 << 14;

/// Whether breakpoint `n` is enabled, locally or globally.
fn enabled(cpu: &Vcpu, n: usize) -> bool {
    cpu.dr7 >> (2 * n) & 3 != 0
}

/// The fault of an armed instruction breakpoint at `linear`, unless RF holds it off.
pub(crate) fn instruction_breakpoint(cpu: &Vcpu, linear: u64) -> Option<Fault> {
    if cpu.dr7 & 0xff == 0 || cpu.flags.rest & bit::RF != 0 {
        return None;
    }
    let here = |n: &usize| cpu.dr7 >> (16 + 4 * n) & 3 == 0 && cpu.dr[*n] == linear;
    let met = (0..4).filter(here).fold(0, |bits, n| bits | 1 << n);
    let any = (0..4).any(|n| met >> n & 1 != 0 && enabled(cpu, n));
    any.then_some(Fault::Debug(met))
}

/// The trap of the instruction before, if it met a debug condition: what was pending is taken.
/// It waits while the shadow of a load of SS lasts.
pub(crate) fn pending_trap(cpu: &mut Vcpu) -> Option<Fault> {
    if cpu.pending_debug == 0 || cpu.mov_ss_shadow {
        return None;
    }
    Some(Fault::Debug(core::mem::take(&mut cpu.pending_debug)))
}
