//! Frequencies of what counts ticks, in Hz. One tick is one nanosecond of guest time.

/// Ticks per second.
pub const TICK_HZ: u64 = 1_000_000_000;

/// Counts of the time-stamp counter per tick: an instruction takes as many, as on a processor that
/// needs a few cycles for one.
pub const TSC_PER_TICK: u64 = 3;

/// Rate of the time-stamp counter. CPUID.15H tells it.
pub const TSC_HZ: u64 = TICK_HZ * TSC_PER_TICK;

/// The count at `tick` of a time-stamp counter that was never written.
pub(crate) fn tsc_at(tick: u64) -> u64 {
    tick.wrapping_mul(TSC_PER_TICK)
}

/// The first tick at which such a counter has reached `count`.
pub(crate) fn tick_of_tsc(count: u64) -> u64 {
    count.div_ceil(TSC_PER_TICK)
}

/// Rate of the APIC timer before its divider, the "core crystal clock" of CPUID.15H.
pub const APIC_HZ: u64 = TICK_HZ;

/// Ticks per count of the undivided APIC timer.
pub(crate) const TICKS_PER_APIC_COUNT: u64 = TICK_HZ / APIC_HZ;
