//! The VMX-preemption timer (Vol. 3C, "VMX-Preemption Timer"): it counts down whenever the bit of the TSC
//! changes that IA32_VMX_MISC 4:0 names. The TSC is L1's, whatever its guest sees of it.

use crate::bus::Tick;
use crate::clock::tsc_at;
use crate::vcpu::Vcpu;

/// The bit of the TSC.
fn rate(cpu: &Vcpu) -> u64 {
    cpu.vmx.caps().map_or(0, |caps| caps.misc & 0x1f)
}

/// Where a timer that starts with `value` at `now` reaches zero, as a count of a TSC that was never
/// written.
pub(super) fn deadline(cpu: &Vcpu, now: Tick, value: u64) -> u64 {
    if value == 0 {
        return tsc_at(now);
    }
    let (tsc, rate) = (cpu.host_tsc(now), rate(cpu));
    let end = ((tsc >> rate).wrapping_add(value) << rate).wrapping_sub(tsc);
    tsc_at(now).saturating_add(end)
}

impl Vcpu {
    /// Whether the timer of the guest has reached zero.
    pub(crate) fn preemption_timer_expired(&self, now: Tick) -> bool {
        let deadline = self.vmx.preemption_deadline;
        deadline.is_some_and(|due| due <= tsc_at(now))
    }
}

/// What is left of a timer at `now`.
pub(super) fn left(cpu: &Vcpu, now: Tick, deadline: u64) -> u64 {
    let now = tsc_at(now);
    if deadline <= now {
        return 0;
    }
    let rate = rate(cpu);
    let count = |tsc: u64| tsc.wrapping_add(cpu.msrs.tsc_offset) >> rate;
    count(deadline).wrapping_sub(count(now)) & 0xffff_ffff
}

/// The count of the TSC's bit at which the timer reaches zero, as KVM saves it.
pub(super) fn to_count(cpu: &Vcpu, deadline: u64) -> u64 {
    deadline.wrapping_add(cpu.msrs.tsc_offset) >> rate(cpu)
}

/// The deadline of such a count; 0 for one before the first tick.
pub(super) fn from_count(cpu: &Vcpu, count: u64) -> u64 {
    let tsc = (count << rate(cpu)).wrapping_sub(cpu.msrs.tsc_offset);
    if tsc >> 63 == 0 { tsc } else { 0 }
}
