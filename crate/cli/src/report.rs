//! How a run ended, what it took, and the exit status that says so.

use std::fmt;
use std::time::Duration;

use hypernest_machine::{ExitReason, RegionCount, Tick, cpu};
use serde_json::json;

use crate::exit_table::Exits;
use crate::snapshot::Written;

/// Why the run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// The guest reset the machine by a triple fault on purpose.
    TripleFaultReset,
    /// The guest wrote this to the debug-exit port.
    DebugExit(u32),
    /// `--stop-on` was seen.
    Text,
    /// `--stop-at` was reached.
    Tick,
    /// `--timeout` ran out.
    Timeout,
    /// Ctrl-A x.
    Quit,
    /// A program asked for it on the monitor.
    Monitor,
    /// A signal that ends programs.
    Signal,
    /// A triple fault.
    TripleFault {
        /// On which vCPU.
        vcpu: usize,
    },
    /// A VMX abort.
    VmxAbort {
        /// On which vCPU.
        vcpu: usize,
        /// Why.
        indicator: u32,
    },
    /// Something that is not built.
    Unimplemented {
        /// On which vCPU.
        vcpu: usize,
        /// What it is.
        what: String,
        /// Where.
        rip: u64,
    },
    /// All processors wait, and nothing will wake one.
    Idle,
    /// A VM exit of `--break-on`.
    VmExit {
        /// On which vCPU.
        vcpu: usize,
        /// Basic exit reason.
        reason: ExitReason,
        /// Which exit of the run's, from 1.
        number: u64,
    },
    /// The machine has moved away: what is told of it.
    HandedOver(String),
    /// The machine stands still until it is settled whose it is: what is told of it.
    Undecided(String),
    /// A VM entry failed, with `--break-on entry-fail`.
    EntryFailed {
        /// On which vCPU.
        vcpu: usize,
    },
}

impl End {
    /// The exit status.
    pub fn status(&self) -> i32 {
        match self {
            End::PowerOff
            | End::Reset
            | End::TripleFaultReset
            | End::Text
            | End::Tick
            | End::HandedOver(_)
            | End::Quit
            | End::Monitor => 0,
            // The system keeps the low byte, as for any program.
            End::DebugExit(value) => (value.wrapping_mul(2).wrapping_add(1) & 0xff) as i32,
            End::TripleFault { .. }
            | End::VmxAbort { .. }
            | End::Unimplemented { .. }
            | End::Idle
            | End::VmExit { .. }
            | End::EntryFailed { .. } => 4,
            // 128 and the number of SIGTERM, as shells do.
            End::Signal => 143,
            End::Timeout => 124,
            End::Undecided(_) => crate::UNDECIDED,
        }
    }

    /// One word for the JSON report.
    fn word(&self) -> &'static str {
        match self {
            End::PowerOff => "power-off",
            End::Reset => "reset",
            End::TripleFaultReset => "triple-fault-reset",
            End::DebugExit(_) => "debug-exit",
            End::Text => "text",
            End::Tick => "tick",
            End::Timeout => "timeout",
            End::Quit => "quit",
            End::Monitor => "monitor",
            End::Signal => "signal",
            End::TripleFault { .. } => "triple-fault",
            End::VmxAbort { .. } => "vmx-abort",
            End::Unimplemented { .. } => "unimplemented",
            End::Idle => "idle",
            End::VmExit { .. } => "vm-exit",
            End::EntryFailed { .. } => "entry-failed",
            End::HandedOver(_) => "handed-over",
            End::Undecided(_) => "undecided",
        }
    }

    /// The vCPU whose state explains it, where something went wrong or was asked for.
    pub fn scene(&self) -> Option<usize> {
        match self {
            End::TripleFault { vcpu }
            | End::VmxAbort { vcpu, .. }
            | End::Unimplemented { vcpu, .. }
            | End::VmExit { vcpu, .. }
            | End::EntryFailed { vcpu } => Some(*vcpu),
            _ => None,
        }
    }

    /// Whether the user should be told even without `--report`.
    pub fn is_noteworthy(&self) -> bool {
        matches!(
            self,
            End::TripleFault { .. }
                | End::VmxAbort { .. }
                | End::Unimplemented { .. }
                | End::Idle
                | End::Timeout
                | End::VmExit { .. }
                | End::EntryFailed { .. }
                | End::HandedOver(_)
                | End::Undecided(_)
        )
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::PowerOff => f.write_str("the guest powered off"),
            End::Reset => f.write_str("the guest reset the machine"),
            End::TripleFaultReset => f.write_str("the guest reset the machine (triple fault)"),
            End::DebugExit(value) => write!(f, "the guest wrote {value} to the debug-exit port"),
            End::Text => f.write_str("the text of --stop-on appeared"),
            End::Tick => f.write_str("the tick of --stop-at is reached"),
            End::Timeout => f.write_str("the time of --timeout is up"),
            End::Quit => f.write_str("stopped by Ctrl-A x"),
            End::Monitor => f.write_str("stopped on the monitor"),
            End::Signal => f.write_str("stopped by a signal"),
            End::TripleFault { vcpu } => write!(f, "triple fault on processor {vcpu}"),
            End::VmxAbort { vcpu, indicator } => write!(
                f,
                "VMX abort {indicator} on processor {vcpu}: {}",
                cpu::vmx_abort_cause(*indicator)
            ),
            End::Unimplemented { vcpu, what, rip } => write!(
                f,
                "the guest needs {what}, which is not implemented, at {rip:#x} on processor {vcpu}"
            ),
            End::Idle => f.write_str("all processors wait and nothing will wake one"),
            End::VmExit {
                vcpu,
                reason,
                number,
            } => write!(
                f,
                "VM exit {number}, {}, on processor {vcpu}",
                reason.ident()
            ),
            End::EntryFailed { vcpu } => write!(f, "a VM entry failed on processor {vcpu}"),
            End::HandedOver(what) | End::Undecided(what) => f.write_str(what),
        }
    }
}

/// What a run took.
#[derive(Clone, Debug)]
pub struct Report {
    /// Why it ended.
    pub end: End,
    /// What the image is and how it was entered.
    pub image: String,
    /// Machine time at the end.
    pub ticks: Tick,
    /// Instructions of all processors.
    pub instructions: u64,
    /// Real time until there was a machine: to read an image and load it, or a snapshot.
    pub loading: Duration,
    /// Snapshots that were written.
    pub snapshots: Vec<Written>,
    /// Real time in the machine.
    pub running: Duration,
    /// Real time waiting for the user or for guest time to pass.
    pub waiting: Duration,
    /// Times the machine returned.
    pub stops: u64,
    /// Hash of the final state.
    pub state_hash: String,
    /// What there was of VMX.
    pub exits: Option<Exits>,
    /// VMCS regions in memory by layout.
    pub regions: Vec<RegionCount>,
}

impl Report {
    /// Instructions per second of running.
    fn rate(&self) -> f64 {
        self.instructions as f64 / self.running.as_secs_f64().max(1e-9)
    }

    /// For `--report-json`.
    pub fn json(&self) -> String {
        let mut report = json!({
            "end": self.end.word(),
            "message": self.end.to_string(),
            "status": self.end.status(),
            "image": self.image,
            "ticks": self.ticks,
            "instructions": self.instructions,
            "loading_seconds": self.loading.as_secs_f64(),
            "seconds": self.running.as_secs_f64(),
            "waiting_seconds": self.waiting.as_secs_f64(),
            "instructions_per_second": self.rate(),
            "stops": self.stops,
            "state_hash": self.state_hash,
        });
        if !self.snapshots.is_empty() {
            let snapshot = |written: &Written| {
                let pages = &written.pages;
                json!({
                    "file": written.path.to_string_lossy(),
                    "tick": written.tick,
                    "bytes": written.bytes,
                    "seconds": written.time.as_secs_f64(),
                    "pages": {"zero": pages.zero, "shared": pages.shared, "stored": pages.stored},
                })
            };
            report["snapshots"] = self.snapshots.iter().map(snapshot).collect();
        }
        if let End::DebugExit(value) = self.end {
            report["debug_exit_value"] = value.into();
        }
        if let Some(exits) = &self.exits {
            report["vmx"] = exits.json();
        }
        if !self.regions.is_empty() {
            let region = |count: &RegionCount| {
                json!({
                    "layout": count.layout,
                    "revision": format!("{:#010x}", count.revision),
                    "pages": count.pages,
                    "written": count.written,
                })
            };
            report["vmcs_regions"] = self.regions.iter().map(region).collect();
        }
        format!("{report:#}\n")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "end           {}", self.end)?;
        writeln!(f, "image         {}", self.image)?;
        writeln!(
            f,
            "ticks         {} ({:.3} s of guest time)",
            grouped(self.ticks),
            self.ticks as f64 / 1e9
        )?;
        writeln!(f, "instructions  {}", grouped(self.instructions))?;
        writeln!(
            f,
            "speed         {:.1} million instructions/s ({:.3} s running, {:.3} s waiting)",
            self.rate() / 1e6,
            self.running.as_secs_f64(),
            self.waiting.as_secs_f64()
        )?;
        writeln!(f, "stops         {}", grouped(self.stops))?;
        for written in &self.snapshots {
            writeln!(
                f,
                "snapshot      {} at tick {}, {} bytes in {:.3} s",
                written.path.display(),
                grouped(written.tick),
                grouped(written.bytes),
                written.time.as_secs_f64()
            )?;
        }
        write!(f, "state hash    {}", self.state_hash)?;
        // With one layout there is nothing to tell apart.
        for count in self.regions.iter().filter(|_| self.regions.len() > 1) {
            let written = if count.written { ", written" } else { "" };
            let RegionCount {
                pages,
                layout,
                revision,
                ..
            } = count;
            write!(
                f,
                "\nVMCS regions  {pages} of layout {layout} ({revision:08X}H{written})"
            )?;
        }
        match &self.exits {
            Some(exits) => write!(f, "\n{}", exits.text(self.instructions).trim_end()),
            None => Ok(()),
        }
    }
}

/// Digits in groups of three.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_exit_gives_twice_the_value_and_one() {
        assert_eq!(End::DebugExit(0).status(), 1);
        assert_eq!(End::DebugExit(16).status(), 33);
        assert_eq!(End::DebugExit(u32::MAX).status(), 255);
    }

    #[test]
    fn a_vmx_abort_is_a_crash_and_says_why() {
        let (vcpu, indicator) = (1, 4);
        let end = End::VmxAbort { vcpu, indicator };
        assert_eq!((end.status(), end.word()), (4, "vmx-abort"));
        assert!(end.is_noteworthy());
        let text =
            "VMX abort 4 on processor 1: the MSR-load list of the VM exit could not be loaded";
        assert_eq!(end.to_string(), text);
    }

    #[test]
    fn numbers_are_grouped_by_three() {
        assert_eq!(grouped(1), "1");
        assert_eq!(grouped(461_000_123), "461 000 123");
    }

    #[test]
    fn the_json_report_has_what_scripts_read() {
        let report = Report {
            end: End::DebugExit(3),
            image: "raw".into(),
            ticks: 5,
            instructions: 4,
            loading: Duration::from_millis(1),
            snapshots: Vec::new(),
            running: Duration::from_secs(2),
            waiting: Duration::ZERO,
            stops: 1,
            state_hash: "00ff".into(),
            exits: None,
            regions: Vec::new(),
        };
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["ticks"], 5);
        assert_eq!(json["instructions"], 4);
        assert_eq!(json["instructions_per_second"], 2.0);
        assert_eq!(json["state_hash"], "00ff");
        assert_eq!(
            (&json["status"], &json["debug_exit_value"]),
            (&7.into(), &3.into())
        );
    }
}
