//! Reference time: 100 ns since tick 0 (TLFS, "Partition Reference Time"), which is what the TSC page gives of a
//! TSC that was never written.

use super::{page, share, state};
use crate::bus::Tick;
use crate::clock;
use crate::mem::Ctx;

/// Units of reference time per second.
const RATE: u64 = 10_000_000;
/// What the reference TSC page multiplies the TSC with, 64 bits of it behind the point.
const SCALE: u64 = (((RATE as u128) << 64) / clock::TSC_HZ as u128) as u64;
/// Ticks per unit.
const TICKS: u64 = clock::TICK_HZ / RATE;

/// Reference time at a tick.
pub(super) fn reference(now: Tick) -> u64 {
    scaled(clock::tsc_at(now))
}

fn scaled(count: u64) -> u64 {
    ((u128::from(count) * u128::from(SCALE)) >> 64) as u64
}

/// The first tick at which the reference time is `time`, [`Tick::MAX`] where that is beyond all ticks.
pub(super) fn tick_of(time: u64) -> Tick {
    let tick = time.checked_mul(TICKS);
    // The counter has 64 bits.
    let Some(mut tick) = tick.filter(|tick| *tick < Tick::MAX / clock::TSC_PER_TICK) else {
        return Tick::MAX;
    };
    // The scale is rounded down.
    while reference(tick) < time {
        tick += 1;
    }
    tick
}

/// Fills the reference TSC page, where it is enabled: valid sequence, scale, offset.
///
/// Deviation: the page lies in RAM, not over it, and fits the TSC of the vCPU that enabled it or last moved
/// its TSC.
pub(super) fn fill_page(x: &mut Ctx) {
    let Some(at) = state(x).and_then(|state| page(state.reference_tsc)) else {
        return;
    };
    let offset = reference(x.now).wrapping_sub(scaled(x.cpu.host_tsc(x.now)));
    let mut sequence = [0; 4];
    x.load_physical(at, &mut sequence);
    // Zero would say that the page is not to be used.
    let next = u32::from_le_bytes(sequence).wrapping_add(1).max(1);
    let mut bytes = [0; 24];
    bytes[..4].copy_from_slice(&next.to_le_bytes());
    bytes[8..16].copy_from_slice(&SCALE.to_le_bytes());
    bytes[16..].copy_from_slice(&offset.to_le_bytes());
    x.store_physical(at, &bytes);
}

/// The TSC was written: the page follows.
pub(crate) fn tsc_moved(x: &mut Ctx) {
    fill_page(x);
}

/// A write to HV_X64_MSR_REFERENCE_TSC.
pub(super) fn set_reference_tsc(x: &mut Ctx, value: u64) {
    if let Some(state) = state(x) {
        state.reference_tsc = value;
    }
    fill_page(x);
    share(x);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_is_a_hundredth_of_the_unit() {
        assert_eq!(reference(0), 0);
        assert_eq!(reference(1_000_000_107), 10_000_001);
        for time in [0, 1, 2, 99, 12_345_678, 1 << 50] {
            let tick = tick_of(time);
            assert_eq!(reference(tick), time);
            assert!(tick == 0 || reference(tick - 1) < time, "{time}");
        }
        assert_eq!(tick_of(u64::MAX), Tick::MAX);
    }
}
