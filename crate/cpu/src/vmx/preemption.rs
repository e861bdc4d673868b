//! The VMX-preemption timer (Vol. 3C, "VMX-Preemption Timer"): it counts down whenever the bit of the TSC
//! changes that IA32_VMX_MISC 4:0 names. The TSC is L1's, whatever its guest sees of it.

use crate::bus::Tick;
use crate::vcpu::Vcpu;

/// The bit of the TSC.
fn rate(cpu: &Vcpu) -> u64 {
    cpu.vmx.caps().map_or(0, |caps| caps.misc & 0x1f)
}

/// The tick at which a timer that starts with `value` at `now` reaches zero.
pub(super) fn deadline(cpu: &Vcpu, now: Tick, value: u64) -> Tick {
    if value == 0 {
        return now;
    }
    let (tsc, rate) = (cpu.host_tsc(now), rate(cpu));
    let end = ((tsc >> rate).wrapping_add(value) << rate).wrapping_sub(tsc);
    now.saturating_add(end)
}

/// What is left of a timer at `now`.
pub(super) fn left(cpu: &Vcpu, now: Tick, deadline: Tick) -> u64 {
    if deadline <= now {
        return 0;
    }
    let rate = rate(cpu);
    let count = |tick| cpu.host_tsc(tick) >> rate;
    count(deadline).wrapping_sub(count(now)) & 0xffff_ffff
}

/// The count of the TSC's bit at which the timer reaches zero, as KVM saves it.
pub(super) fn to_count(cpu: &Vcpu, deadline: Tick) -> u64 {
    cpu.host_tsc(deadline) >> rate(cpu)
}

/// The tick of such a count; 0 for one before the first tick.
pub(super) fn from_count(cpu: &Vcpu, count: u64) -> Tick {
    let tick = (count << rate(cpu)).wrapping_sub(cpu.msrs.tsc_offset);
    if tick >> 63 == 0 { tick } else { 0 }
}
