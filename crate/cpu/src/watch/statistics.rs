//! Counters of VM exits, always on: how many for each reason, and what L1 did for each.

use alloc::vec;
use alloc::vec::Vec;

use hypernest_vmcs::ExitReason;

use crate::vmx::EnlightenedEntry;

use super::event::Level;

/// Reasons that are told apart; the manual's highest is 85.
const REASONS: usize = 128;

/// Powers of two have this many buckets each.
const STEPS: usize = 16;
/// Below this every number has its own bucket.
const EXACT: u64 = 2 * STEPS as u64;
/// Numbers from 2 to this power on share the last bucket.
const HIGHEST: u32 = 36;
const BUCKETS: usize = (HIGHEST - EXACT.ilog2()) as usize * STEPS + EXACT as usize;

/// The bucket of a number.
fn bucket(value: u64) -> usize {
    if value < EXACT {
        return value as usize;
    }
    let power = value.ilog2();
    let step = (value >> (power - STEPS.ilog2())) as usize & (STEPS - 1);
    let index = EXACT as usize + (power - EXACT.ilog2()) as usize * STEPS + step;
    index.min(BUCKETS - 1)
}

/// The number in the middle of a bucket.
fn middle(bucket: usize) -> u64 {
    let Some(above) = bucket.checked_sub(EXACT as usize) else {
        return bucket as u64;
    };
    let (power, step) = (above / STEPS, above % STEPS);
    let width = 2u64 << power;
    (STEPS + step) as u64 * width + width / 2
}

/// Counters of VM exits, and of VM entries that failed.
///
/// They tell of a run and are not part of a machine's state: no saved state and no hash has them.
#[derive(Clone, Debug)]
pub struct ExitStatistics {
    /// By reason, of [`Level::L2`].
    exits: [u64; REASONS],
    /// By reason, of [`Level::L1`]: entries that failed by an exit.
    failures: [u64; REASONS],
    /// How often L1 handled an exit, by reason: it entered a guest again.
    handled: [u64; REASONS],
    /// Instructions that took it, in all, the least and the most.
    total: [u64; REASONS],
    least: [u64; REASONS],
    most: [u64; REASONS],
    /// By reason and bucket. Empty where there is no VMX.
    histograms: Vec<u32>,
    /// Of all reasons, of L2.
    all: u64,
    entries: u64,
    failed_entries: u64,
    guest_instructions: u64,
    enlightened_entries: u64,
    clean_entries: u64,
    vmreads: u64,
    vmwrites: u64,
}

/// What is known about the exits of one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitRow {
    /// Who executed: L2, or L1 where a VM entry failed by an exit.
    pub level: Level,
    /// Basic exit reason.
    pub reason: ExitReason,
    /// How many.
    pub count: u64,
    /// What L1 executed from the exit to its next VM entry on the vCPU; `None` where it made none.
    pub handling: Option<Handling>,
}

/// Instructions of L1 per exit. The least is exact; median and percentile are within a 32nd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handling {
    /// Exits that were followed by a VM entry.
    pub exits: u64,
    /// Instructions for all of them.
    pub total: u64,
    /// The least.
    pub min: u64,
    /// The median.
    pub median: u64,
    /// 99 of 100 took no more.
    pub p99: u64,
    /// The most.
    pub max: u64,
}

impl ExitStatistics {
    /// Nothing counted yet. `vmx`: there can be something to count.
    pub(super) fn new(vmx: bool) -> ExitStatistics {
        let none = [0; REASONS];
        ExitStatistics {
            exits: none,
            failures: none,
            handled: none,
            total: none,
            least: [u64::MAX; REASONS],
            most: none,
            histograms: vec![0; if vmx { REASONS * BUCKETS } else { 0 }],
            all: 0,
            entries: 0,
            failed_entries: 0,
            guest_instructions: 0,
            enlightened_entries: 0,
            clean_entries: 0,
            vmreads: 0,
            vmwrites: 0,
        }
    }

    /// VM exits of guests; those that stand for a failed entry are not among them.
    pub fn exits(&self) -> u64 {
        self.all
    }

    /// VM entries that led into a guest.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// VM entries that failed, in whichever way.
    pub fn failed_entries(&self) -> u64 {
        self.failed_entries
    }

    /// Of the VM entries that led into a guest, those by an enlightened VMCS.
    pub fn enlightened_entries(&self) -> u64 {
        self.enlightened_entries
    }

    /// Of those, the ones that found some of it clean, and did not read it.
    pub fn clean_entries(&self) -> u64 {
        self.clean_entries
    }

    /// VMREADs that completed, whichever way.
    pub fn vmreads(&self) -> u64 {
        self.vmreads
    }

    /// VMWRITEs that completed, whichever way.
    pub fn vmwrites(&self) -> u64 {
        self.vmwrites
    }

    /// Instructions that guests executed, up to the last exit.
    pub fn guest_instructions(&self) -> u64 {
        self.guest_instructions
    }

    /// Exits at `level` for `reason`.
    pub fn count(&self, level: Level, reason: ExitReason) -> u64 {
        let counts = match level {
            Level::L1 => &self.failures,
            Level::L2 => &self.exits,
        };
        counts.get(usize::from(reason.0)).copied().unwrap_or(0)
    }

    /// A row for each level and reason that was seen: L2 first, reasons ascending.
    pub fn rows(&self) -> Vec<ExitRow> {
        let row = |level, reason: usize| {
            let id = ExitReason(reason as u16);
            let count = self.count(level, id);
            (count > 0).then(|| ExitRow {
                level,
                reason: id,
                count,
                handling: self.handling(reason),
            })
        };
        let of = |level| (0..REASONS).filter_map(move |reason| row(level, reason));
        of(Level::L2).chain(of(Level::L1)).collect()
    }

    fn handling(&self, reason: usize) -> Option<Handling> {
        let exits = self.handled[reason];
        if exits == 0 {
            return None;
        }
        let (min, max) = (self.least[reason], self.most[reason]);
        let range = reason * BUCKETS..(reason + 1) * BUCKETS;
        let histogram = self.histograms.get(range).unwrap_or_default();
        let at = |rank: u64| {
            let mut seen = 0;
            let place = histogram.iter().position(|count| {
                seen += u64::from(*count);
                seen >= rank
            });
            place.map_or(max, |bucket| middle(bucket).clamp(min, max))
        };
        Some(Handling {
            exits,
            total: self.total[reason],
            min,
            median: at(exits.div_ceil(2)),
            p99: at((exits * 99).div_ceil(100)),
            max,
        })
    }

    pub(super) fn exited(&mut self, level: Level, reason: u16, guest_instructions: u64) {
        let counts = match level {
            Level::L1 => &mut self.failures,
            Level::L2 => {
                self.all += 1;
                &mut self.exits
            }
        };
        counts[usize::from(reason) % REASONS] += 1;
        self.guest_instructions += guest_instructions;
    }

    pub(super) fn entered(&mut self, enlightened: Option<EnlightenedEntry>) {
        self.entries += 1;
        if let Some(entry) = enlightened {
            self.enlightened_entries += 1;
            self.clean_entries += u64::from(entry.clean != 0);
        }
    }

    /// A VMX instruction completed.
    pub(super) fn instruction(&mut self, name: &str) {
        match name {
            "VMREAD" => self.vmreads += 1,
            "VMWRITE" => self.vmwrites += 1,
            _ => {}
        }
    }

    pub(super) fn entry_failed(&mut self) {
        self.failed_entries += 1;
    }

    /// L1 took this many instructions from an exit to its next entry.
    pub(super) fn handled(&mut self, reason: u16, instructions: u64) {
        let reason = usize::from(reason) % REASONS;
        self.handled[reason] += 1;
        self.total[reason] = self.total[reason].saturating_add(instructions);
        self.least[reason] = self.least[reason].min(instructions);
        self.most[reason] = self.most[reason].max(instructions);
        if let Some(count) = self
            .histograms
            .get_mut(reason * BUCKETS + bucket(instructions))
        {
            *count = count.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_ascend_without_gaps_and_hold_their_middle() {
        let mut last = 0;
        for value in (0..5000).chain((5000..1 << 40).step_by(1 << 28)) {
            let this = bucket(value);
            assert!(this == last || this == last + 1 || value >= 5000, "{value}");
            assert!(this >= last && this < BUCKETS);
            last = this;
        }
        for index in 0..BUCKETS {
            assert_eq!(bucket(middle(index)), index);
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_middle_is_within_a_32nd() {
        for value in (1..200_000u64).chain([1 << 30, (1 << 31) - 1]) {
            let off = middle(bucket(value)).abs_diff(value);
            assert!(off * 32 <= value, "{value}: {off}");
        }
    }

    #[test]
    fn median_and_percentile_are_of_the_exits_that_were_handled() {
        let mut statistics = ExitStatistics::new(true);
        for n in 1..=1000 {
            statistics.exited(Level::L2, 10, 5);
            statistics.handled(10, n);
        }
        statistics.exited(Level::L2, 10, 5);
        statistics.exited(Level::L1, 33, 0);
        let rows = statistics.rows();
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].level, rows[0].count), (Level::L2, 1001));
        let handling = rows[0].handling.unwrap();
        assert_eq!(
            (handling.exits, handling.min, handling.max),
            (1000, 1, 1000)
        );
        assert_eq!(handling.total, 500_500);
        assert!(handling.median.abs_diff(500) <= 15, "{handling:?}");
        assert!(handling.p99.abs_diff(990) <= 30, "{handling:?}");
        assert_eq!((rows[1].level, rows[1].handling), (Level::L1, None));
        assert_eq!(statistics.guest_instructions(), 5005);
    }

    #[test]
    fn one_exit_is_its_own_median_exactly() {
        let mut statistics = ExitStatistics::new(true);
        statistics.exited(Level::L2, 12, 0);
        statistics.handled(12, 1007);
        let handling = statistics.rows()[0].handling.unwrap();
        assert_eq!((handling.median, handling.p99), (1007, 1007));
    }

    #[test]
    fn a_reason_beyond_the_table_is_counted_and_does_no_harm() {
        let mut statistics = ExitStatistics::new(false);
        statistics.exited(Level::L2, 0xffff, 0);
        statistics.handled(0xffff, 7);
        assert_eq!(statistics.exits(), 1);
        assert_eq!(statistics.count(Level::L2, ExitReason(0xffff)), 0);
        assert_eq!(statistics.rows()[0].handling.unwrap().median, 7);
    }
}
