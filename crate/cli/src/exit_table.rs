//! VM exits by reason, for the report.

use std::fmt::Write;

use hypernest_machine::{ExitRow, ExitStatistics, FailedEntry};
use serde_json::{Value, json};

use crate::report::grouped;

/// What a run had of VMX.
#[derive(Clone, Debug)]
pub struct Exits {
    rows: Vec<ExitRow>,
    exits: u64,
    entries: u64,
    failed_entries: u64,
    guest_instructions: u64,
    /// By an enlightened VMCS: VM entries, and those that found some of it clean.
    enlightened: (u64, u64),
    vmreads: u64,
    vmwrites: u64,
    /// The latest entries that failed, in words.
    failures: Vec<String>,
}

impl Exits {
    /// `None` where nothing was ever entered.
    pub fn new(statistics: &ExitStatistics, failures: &[FailedEntry]) -> Option<Exits> {
        if statistics.entries() + statistics.failed_entries() == 0 {
            return None;
        }
        let words = |failed: &FailedEntry| {
            let FailedEntry {
                tick, vcpu, rip, ..
            } = failed;
            let words = failed.explain();
            format!("at tick {tick} on processor {vcpu}, RIP {rip:#x}: {words}")
        };
        Some(Exits {
            rows: statistics.rows(),
            exits: statistics.exits(),
            entries: statistics.entries(),
            failed_entries: statistics.failed_entries(),
            guest_instructions: statistics.guest_instructions(),
            enlightened: (statistics.enlightened_entries(), statistics.clean_entries()),
            vmreads: statistics.vmreads(),
            vmwrites: statistics.vmwrites(),
            failures: failures.iter().map(words).collect(),
        })
    }

    /// The table, and the entries that failed. `instructions` are all of the run's.
    pub fn text(&self, instructions: u64) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "VM entries    {}, and {} that failed",
            grouped(self.entries),
            grouped(self.failed_entries)
        );
        let _ = writeln!(
            text,
            "L2            {} instructions, {:.1} % of all",
            grouped(self.guest_instructions),
            percent(self.guest_instructions, instructions)
        );
        let _ = writeln!(text, "VM exits      {}", grouped(self.exits));
        let _ = writeln!(
            text,
            "{:52}L1 instructions per exit\n  {:27} {:>12} {:>7}  {:>9} {:>9} {:>9}",
            "", "reason", "count", "share", "min", "median", "p99"
        );
        for row in &self.rows {
            let _ = write!(
                text,
                "  {} {:24} {:>12} {:>5.1} %",
                row.level.name(),
                row.reason.ident(),
                grouped(row.count),
                percent(row.count, self.of(row)),
            );
            let _ = match &row.handling {
                Some(h) => writeln!(
                    text,
                    "  {:>9} {:>9} {:>9}",
                    grouped(h.min),
                    grouped(h.median),
                    grouped(h.p99)
                ),
                None => writeln!(text, "  {:>9} {:>9} {:>9}", "-", "-", "-"),
            };
        }
        for failure in &self.failures {
            let _ = writeln!(text, "failed entry  {failure}");
        }
        text
    }

    /// Of how many a row is a share.
    fn of(&self, row: &ExitRow) -> u64 {
        match row.level {
            hypernest_machine::Level::L1 => self.failed_entries,
            hypernest_machine::Level::L2 => self.exits,
        }
    }

    /// For the report in JSON.
    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let handling = row.handling.map(|h| {
                json!({
                    "exits": h.exits,
                    "total": h.total,
                    "min": h.min,
                    "median": h.median,
                    "p99": h.p99,
                    "max": h.max,
                })
            });
            json!({
                "level": row.level.name(),
                "reason": row.reason.0,
                "name": row.reason.ident(),
                "count": row.count,
                "share": percent(row.count, self.of(row)) / 100.0,
                "l1_instructions": handling,
            })
        });
        json!({
            "entries": self.entries,
            "failed_entries": self.failed_entries,
            "exits": self.exits,
            "l2_instructions": self.guest_instructions,
            "enlightened_entries": self.enlightened.0,
            "clean_entries": self.enlightened.1,
            "vmreads": self.vmreads,
            "vmwrites": self.vmwrites,
            "by_reason": rows.collect::<Vec<_>>(),
            "failures": self.failures,
        })
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}
