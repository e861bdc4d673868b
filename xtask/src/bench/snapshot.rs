//! Snapshots of a machine in which Linux runs Linux: to save it, and to go on from it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::LIMIT;
use super::measure::{median, run_until};
use crate::guests::Kernel;
use crate::nested::{INSIDE_MARKER, nested_linux, nested_words};
use crate::run::{cache, command};

/// How often each is measured.
const TIMES: usize = 5;

/// What it took once, in seconds.
#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    cpu: f64,
}

pub fn measure(cli: &Path, kernel: &Kernel) -> Result<()> {
    println!("\n== Snapshots: Linux {} that runs Linux", kernel.series);
    let [file, copy, report] =
        ["first", "copy", "json"].map(|end| cache().join("bench-snapshot").with_extension(end));
    let words = format!("mitigations=off {}", nested_words(&["cryptomgr.notests"]));
    let mut linux = nested_linux(kernel, &words).command(cli);
    linux.args(["--snapshot-on", INSIDE_MARKER, "--stop-on", INSIDE_MARKER]);
    linux.arg("-o").arg(&file);
    run_until(&mut linux, "", LIMIT)?;

    let mut loads = Vec::new();
    let mut saves = Vec::new();
    let mut last = Value::Null;
    for _ in 0..TIMES {
        let load = resume(cli, &file, None, &report)?;
        loads.push(load.0);
        let both = resume(cli, &file, Some(&copy), &report)?;
        last = both.1["snapshots"][0].clone();
        saves.push(Cost {
            wall: seconds(&last["seconds"])?,
            cpu: both.0.cpu - load.0.cpu,
        });
    }
    let memory = memory(&last)?;
    let middle = |costs: &[Cost]| Cost {
        wall: median(costs.iter().map(|cost| cost.wall)),
        cpu: median(costs.iter().map(|cost| cost.cpu)),
    };
    for (what, cost) in [("save", middle(&saves)), ("resume", middle(&loads))] {
        println!(
            "{what}: {:.0} ms ({:.0} CPU-ms), {:.2} GB/s of guest memory ({:.2} by processor time)",
            cost.wall * 1e3,
            cost.cpu * 1e3,
            memory / cost.wall / 1e9,
            memory / cost.cpu / 1e9
        );
    }
    let pages = |name: &str| last["pages"][name].as_u64().unwrap_or(0);
    println!(
        "{} MiB of memory: {} pages zero, {} equal to others, {} stored; {:.1} MiB of file",
        memory as u64 >> 20,
        pages("zero"),
        pages("shared"),
        pages("stored"),
        last["bytes"].as_f64().unwrap_or(0.0) / f64::from(1 << 20)
    );
    for file in [file, copy, report] {
        let _ = fs::remove_file(file);
    }
    Ok(())
}

/// Resumes and stops at once, with or without saving before: what loading took on the wall, and all of it of
/// processors; and the report.
fn resume(cli: &Path, file: &Path, save: Option<&Path>, report: &Path) -> Result<(Cost, Value)> {
    let mut resume = command(&cli.to_string_lossy());
    resume.arg("resume").arg(file);
    resume.args(["--stop-at", "1", "--serial", "none"]);
    if let Some(copy) = save {
        resume.args(["--snapshot-on", "0", "-o"]).arg(copy);
    }
    // A report hashes all memory, which takes its time: that of processors is measured without.
    let cpu = run_until(&mut resume, "", LIMIT)?.cpu_seconds();
    resume.arg("--report-json").arg(report);
    run_until(&mut resume, "", LIMIT)?;
    let report: Value = serde_json::from_str(&fs::read_to_string(report)?)?;
    let wall = seconds(&report["loading_seconds"])?;
    Ok((Cost { wall, cpu }, report))
}

fn seconds(value: &Value) -> Result<f64> {
    value.as_f64().context("the report has no such time")
}

fn memory(snapshot: &Value) -> Result<f64> {
    let pages = snapshot["pages"].as_object().context("no pages")?;
    let pages: u64 = pages.values().filter_map(Value::as_u64).sum();
    Ok((pages * 4096) as f64)
}
