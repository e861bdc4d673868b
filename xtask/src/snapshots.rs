//! Snapshots from process to process: a kernel whose KVM runs guests is saved, goes on in WebAssembly, is saved there, and goes
//! on natively. Wherever it goes on, it ends in the same state.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::guests::KERNELS;
use crate::integration::{End, LinuxRun, end, no_images};
use crate::run::{cache, capture, command, find, line, shown};
use crate::test::Outcome;

/// Where it is saved first and natively; later, and in WebAssembly; and where the states are compared. KVM's guests run
/// from before the first on.
const SAVED: u64 = 1_000_000_000;
const SAVED_AGAIN: u64 = 1_100_000_000;
const COMPARED: u64 = 1_200_000_000;
/// A run that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(400);

pub fn hops() -> Result<Outcome> {
    let kernel = &KERNELS[0];
    if !kernel.image().exists() {
        return Ok(no_images());
    }
    let cli = build::cli()?;
    build::wasm()?;
    find("node").context("node is missing (package nodejs)")?;
    let [first, second, of_node, report] =
        ["first", "second", "node", "json"].map(|end| cache().join("hops").with_extension(end));
    let ticks = |tick: u64| tick.to_string();

    let mut run = LinuxRun::new(kernel, "anchor.n=2000 anchor.mem=8").command(&cli);
    run.args(["--vmx", "max", "--stop-at", &ticks(COMPARED)]);
    run.args(["--snapshot-on", &ticks(SAVED), "-o"]).arg(&first);
    run.args(["--snapshot-on", &ticks(SAVED_AGAIN), "-o"])
        .arg(&second);
    let reference = native(&mut run, &report)?;
    println!(
        "one process: tick {} hash {}",
        reference.ticks, reference.hash
    );

    let mut different = Vec::new();
    let mut compare = |name: &str, end: End| {
        println!("{name}: tick {} hash {}", end.ticks, end.hash);
        if end != reference {
            different.push(name.to_owned());
        }
    };
    let mut node = line("node tests/integration/resume-to-tick.mjs");
    node.arg(&first)
        .arg(ticks(SAVED_AGAIN))
        .arg(&of_node)
        .arg(ticks(COMPARED));
    println!("$ {}", shown(&node));
    let result = capture(LIMIT, &mut node)?;
    if !result.status.is_some_and(|status| status.success()) {
        bail!("node ended with {:?}: {}", result.status, result.stderr);
    }
    let last = result.stdout.lines().last().unwrap_or_default();
    println!("{last}");
    compare("saved natively, resumed in WebAssembly", end(last)?);
    for (name, file) in [
        ("saved and resumed natively", &second),
        ("saved in WebAssembly, resumed natively", &of_node),
    ] {
        compare(name, resumed(&cli, file, &report)?);
    }
    for file in [first, second, of_node, report] {
        let _ = fs::remove_file(file);
    }
    if !different.is_empty() {
        bail!("ended in another state: {}", different.join("; "));
    }
    Ok(Outcome::Passed)
}

/// A run under load that is saved about every second, a minute long. Each snapshot is resumed up to the next, and what is
/// saved there must be that.
pub fn every_second() -> Result<Outcome> {
    chain(60, 100_000_000)
}

/// Saves `count` times, every `step` ticks.
fn chain(count: usize, step: u64) -> Result<Outcome> {
    let kernel = &KERNELS[0];
    if !kernel.image().exists() {
        return Ok(no_images());
    }
    let cli = build::cli()?;
    let folder = cache().join("chain");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    let file = |n: usize| folder.join(n.to_string());
    let tick = |n: usize| (SAVED + n as u64 * step).to_string();

    let mut run = LinuxRun::new(kernel, "anchor.n=200000 anchor.mem=8").command(&cli);
    run.args(["--vmx", "max", "--stop-at", &tick(count - 1)]);
    for n in 0..count {
        run.args(["--snapshot-on", &tick(n), "-o"]).arg(file(n));
    }
    println!("$ {}", shown(&run));
    quiet(&mut run)?;
    let next = folder.join("next");
    for n in 0..count - 1 {
        let mut resume = command(&cli.to_string_lossy());
        let until = tick(n + 1);
        resume
            .arg("resume")
            .arg(file(n))
            .args(["--serial", "none", "--stop-at", &until]);
        resume.args(["--snapshot-on", &until, "-o"]).arg(&next);
        quiet(&mut resume).with_context(|| format!("snapshot {n}"))?;
        let mut diff = command(&cli.to_string_lossy());
        diff.args(["snapshot", "diff"]).arg(&next).arg(file(n + 1));
        quiet(&mut diff).with_context(|| format!("snapshot {n} went on otherwise"))?;
        fs::remove_file(file(n))?;
    }
    println!("{count} snapshots, every {step} ticks; each went on to the next");
    fs::remove_dir_all(&folder)?;
    Ok(Outcome::Passed)
}

/// Runs a command that must end well; what it prints is shown where it does not.
fn quiet(command: &mut std::process::Command) -> Result<()> {
    let result = capture(LIMIT, command)?;
    if !result.status.is_some_and(|status| status.success()) {
        bail!(
            "it ended with {:?}: {}{}",
            result.status,
            result.stdout,
            result.stderr
        );
    }
    Ok(())
}

fn resumed(cli: &Path, file: &Path, report: &Path) -> Result<End> {
    let mut resume = command(&cli.to_string_lossy());
    resume.arg("resume").arg(file);
    resume.args(["--stop-at", &COMPARED.to_string()]);
    native(&mut resume, report)
}

fn native(run: &mut std::process::Command, report: &Path) -> Result<End> {
    run.arg("--report-json").arg(report);
    println!("$ {}", shown(run));
    let result = capture(LIMIT, run)?;
    if !result.status.is_some_and(|status| status.success()) {
        bail!("the run ended with {:?}: {}", result.status, result.stderr);
    }
    end(&fs::read_to_string(report)?)
}
