//! KVM in a machine with the Hyper-V interface: that it uses the enlightened VMCS, and what that saves.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::guests::Kernel;
use crate::integration::LinuxRun;
use crate::run::{Captured, cache};

/// What KVM says in the kernel's log; the versions differ before and in the first letter.
pub const SAYS: &str = "sing Hyper-V Enlightened VMCS";

/// Exits of each kind that the compared runs make.
const EXITS: u64 = 2000;

/// A run of l2test's CPUID exits, with what the processor counted.
pub struct Counted {
    pub result: Captured,
    report: Value,
}

impl Counted {
    fn of(&self, name: &str) -> Result<u64> {
        let value = self.report["vmx"][name].as_u64();
        value.with_context(|| format!("the report has no vmx.{name}"))
    }

    /// Median of L1's instructions from a CPUID exit to the next entry.
    pub fn instructions_per_cpuid(&self) -> Result<u64> {
        let rows = self.report["vmx"]["by_reason"].as_array();
        let row = rows.and_then(|rows| rows.iter().find(|row| row["name"] == "CPUID"));
        let median = row.and_then(|row| row["l1_instructions"]["median"].as_u64());
        median.context("the report has no CPUID exits")
    }
}

/// The machine has the interface in all of these; with `enlightened`, KVM uses the enlightened VMCS.
pub fn counted(cli: &Path, kernel: &Kernel, enlightened: bool) -> Result<Counted> {
    let report: PathBuf = cache().join(format!("enlightened-{}.json", std::process::id()));
    let module = u8::from(enlightened);
    let words = format!(
        "mitigations=off anchor.n={EXITS} anchor.tests=b anchor.kvm_intel=enlightened_vmcs={module}"
    );
    let shown = report.display().to_string();
    let options = ["--vmx", "max", "--hyperv", "--report-json", &shown];
    let run = LinuxRun {
        options: options.map(String::from).to_vec(),
        ..LinuxRun::new(kernel, &words)
    };
    let result = run.capture(cli);
    let text = fs::read_to_string(&report);
    // There may be none, where the run failed.
    let _ = fs::remove_file(&report);
    let text = text.context("the run wrote no report")?;
    Ok(Counted {
        result: result?,
        report: serde_json::from_str(&text)?,
    })
}

/// Why the enlightened VMCS does not do what it is for.
pub fn failure(with: &Counted, without: &Counted) -> Result<Option<String>> {
    let entries = with.of("entries")?;
    let fields = |run: &Counted| Ok::<_, anyhow::Error>(run.of("vmreads")? + run.of("vmwrites")?);
    let (few, many) = (fields(with)?, fields(without)?);
    println!(
        "{} of {entries} VM entries by an enlightened VMCS, {} of them with some of it clean; VMREADs and VMWRITEs {few}, \
         without it {many}",
        with.of("enlightened_entries")?,
        with.of("clean_entries")?,
    );
    Ok(if with.of("enlightened_entries")? != entries {
        Some("some VM entries are by an ordinary VMCS".into())
    } else if with.of("clean_entries")? * 10 < entries * 9 {
        Some("VM entries find nothing clean".into())
    } else if few * 100 > many {
        Some(format!("{few} VMREADs and VMWRITEs, without it {many}"))
    } else if without.of("enlightened_entries")? != 0 {
        Some("an enlightened VMCS is used where the module was told not to".into())
    } else {
        None
    })
}

/// What a CPUID exit costs with and without it.
pub fn bench(cli: &Path, kernel: &Kernel) -> Result<()> {
    println!(
        "\n== the enlightened VMCS, in KVM of Linux {}",
        kernel.series
    );
    let with = counted(cli, kernel, true)?.instructions_per_cpuid()?;
    let without = counted(cli, kernel, false)?.instructions_per_cpuid()?;
    println!(
        "L1 instructions per CPUID exit: {with}; {without} without it, where a VMREAD is one instruction; {:.3}",
        with as f64 / without as f64
    );
    Ok(())
}
