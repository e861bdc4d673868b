//! Frequencies of what counts ticks, in Hz. One tick is one nanosecond of guest time.

/// Ticks per second.
pub const TICK_HZ: u64 = 1_000_000_000;

/// Rate of the time-stamp counter: one count per tick. CPUID.15H tells it.
pub const TSC_HZ: u64 = TICK_HZ;

/// Rate of the APIC timer before its divider, the "core crystal clock" of CPUID.15H.
pub const APIC_HZ: u64 = TICK_HZ;

/// Ticks per count of the undivided APIC timer.
pub(crate) const TICKS_PER_APIC_COUNT: u64 = TICK_HZ / APIC_HZ;
