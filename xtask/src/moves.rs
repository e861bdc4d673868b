//! Live migration from process to process. A machine that was moved is the one that was not: serial output that joins without
//! a gap, and in the end the state of a run that was saved at the same ticks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guests::KERNELS;
use crate::integration::{End, LinuxRun, end, no_images};
use crate::nested::{INSIDE_MARKER, INSIDE_START, nested_linux, nested_words};
use crate::run::{Group, cache, capture, command, shown};
use crate::test::Outcome;
use crate::{build, conformance};

/// A run that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(400);
/// How far before the kernel inside reaches its init the machine is moved, in ticks.
const BEFORE_INIT: [u64; 4] = [700_000_000, 500_000_000, 300_000_000, 100_000_000];
/// How often the conformance guest is moved.
const HOPS: u64 = 20;

/// A kernel that boots in KVM, and the conformance guest.
pub fn suite() -> Result<Outcome> {
    let cli = build::cli()?;
    conformance_guest(&cli)?;
    let kernel = &KERNELS[0];
    if !kernel.image().exists() {
        return Ok(no_images());
    }
    let words = nested_words(&[]);
    let mut run = nested_linux(kernel, &words);
    linux(&cli, &run, &[], "an ordinary VMCS")?;
    run.options.push("--hyperv".into());
    linux(&cli, &run, &["--hyperv"], "an enlightened VMCS")?;
    Ok(Outcome::Passed)
}

/// The kernel inside is booting when its machine is moved, four times.
fn linux(cli: &Path, run: &LinuxRun<'_>, offers: &[&str], about: &str) -> Result<()> {
    let stop = ["--stop-on", INSIDE_MARKER];
    let plain = whole(run.command(cli).args(stop))?;
    let ticks = BEFORE_INIT.map(|before| plain.end.ticks.saturating_sub(before));
    let moved = chain(cli, run.command(cli), &ticks, offers, &stop)?;
    if !moved.parts[0].contains(INSIDE_START) {
        bail!("the kernel inside had not started when its machine was first moved");
    }
    let mut saved = run.command(cli);
    saved.args(stop);
    let scrap = dir()?.join("saved");
    for tick in &moved.ticks {
        saved
            .args(["--snapshot-on", &tick.to_string(), "-o"])
            .arg(&scrap);
    }
    let saved = whole(&mut saved)?;
    let _ = fs::remove_file(scrap);
    same(about, &saved.serial, &moved.parts.concat())?;
    if saved.end != moved.end {
        bail!(
            "{about}: moved, it ends with {:?}; only saved, with {:?}",
            moved.end,
            saved.end
        );
    }
    println!(
        "{about}: moved at {:?}, it ends at tick {} with hash {}, as the run that was saved there does",
        moved.ticks, moved.end.ticks, moved.end.hash
    );
    Ok(())
}

/// A hypervisor that provokes every exit and entry check, moved at ticks all over its run.
fn conformance_guest(cli: &Path) -> Result<()> {
    let mut run = command(&cli.to_string_lossy());
    run.arg("run").arg(conformance::compile()?);
    run.args(["--vmx", "max", "--memory", "128M"]);
    let again = |run: &Command| {
        let mut same = command(&cli.to_string_lossy());
        same.args(run.get_args());
        same
    };
    let plain = whole(&mut again(&run))?;
    let part = plain.end.ticks / (HOPS + 1);
    // Not at the same place of each part.
    let ticks: Vec<u64> = (1..=HOPS)
        .map(|hop| part * hop + hop * 7919 % part)
        .collect();
    let moved = chain(cli, run, &ticks, &[], &[])?;
    same(
        "the conformance guest",
        &plain.serial,
        &moved.parts.concat(),
    )?;
    println!(
        "the conformance guest: moved {} times, it observes the same",
        moved.ticks.len()
    );
    Ok(())
}

fn same(about: &str, expected: &str, found: &str) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let (mut a, mut b) = (expected.lines(), found.lines());
    loop {
        match (a.next(), b.next()) {
            (None, None) => bail!("{about}: the output differs in how lines end"),
            (a, b) if a != b => bail!("{about}: moved, it prints {b:?} instead of {a:?}"),
            _ => {}
        }
    }
}

/// A run in one process.
struct Whole {
    serial: String,
    end: End,
}

fn whole(run: &mut Command) -> Result<Whole> {
    let report = dir()?.join("whole.json");
    run.arg("--report-json").arg(&report).stdin(Stdio::null());
    println!("$ {}", shown(run));
    let result = capture(LIMIT, run)?;
    if result.status.and_then(|status| status.code()).is_none() {
        bail!("the run did not end in time");
    }
    let text = fs::read_to_string(&report)
        .with_context(|| format!("the run wrote no report: {}", result.stderr))?;
    let _ = fs::remove_file(report);
    Ok(Whole {
        serial: result.stdout,
        end: end(&text)?,
    })
}

/// A run that went through several processes.
struct Moved {
    /// What each printed.
    parts: Vec<String>,
    /// Where it was moved.
    ticks: Vec<u64>,
    end: End,
}

/// Starts one process per part, the last first, each of which hands the machine to the one before. `offers` are options of
/// all receivers, `last` those of the last one.
fn chain(
    cli: &Path,
    first: Command,
    ticks: &[u64],
    offers: &[&str],
    last: &[&str],
) -> Result<Moved> {
    let dir = dir()?;
    let report = dir.join("moved.json");
    let mut processes = Vec::new();
    let mut next: Option<String> = None;
    for part in (0..=ticks.len()).rev() {
        let mut process = if part == 0 {
            let mut run = command(&cli.to_string_lossy());
            run.args(first.get_args());
            run
        } else {
            let mut receive = command(&cli.to_string_lossy());
            receive.args(["receive", "127.0.0.1:0", "--timeout", "300"]);
            receive.args(offers);
            receive
        };
        match (&next, ticks.get(part)) {
            (Some(to), Some(tick)) => {
                process.args(["--migrate-on", &tick.to_string(), "--to", to]);
            }
            _ => {
                process.args(last).arg("--report-json").arg(&report);
            }
        }
        let errors = dir.join(format!("errors-{part}"));
        process
            .stdin(Stdio::null())
            .stdout(File::create(dir.join(format!("part-{part}")))?)
            .stderr(File::create(&errors)?);
        println!("$ {}", shown(&process));
        let process = Group::spawn(&mut process)?;
        if part > 0 {
            next = Some(address(&errors)?);
        }
        processes.push(process);
    }
    let (mut parts, mut at) = (Vec::new(), Vec::new());
    for (part, process) in processes.into_iter().rev().enumerate() {
        let status = process.wait(LIMIT)?;
        let errors = fs::read_to_string(dir.join(format!("errors-{part}")))?;
        parts.push(fs::read_to_string(dir.join(format!("part-{part}")))?);
        if part < ticks.len() {
            let told = errors
                .lines()
                .find(|line| line.contains("was handed over"))
                .with_context(|| {
                    format!("part {part} was not moved ({status:?}): {}", errors.trim())
                })?;
            println!("{told}");
            at.push(tick(told).with_context(|| format!("no tick in: {told}"))?);
        }
    }
    let text = fs::read_to_string(&report).context("the last part wrote no report")?;
    fs::remove_dir_all(&dir)?;
    Ok(Moved {
        parts,
        ticks: at,
        end: end(&text)?,
    })
}

/// Where a receiver listens: the last word of its first line.
fn address(errors: &Path) -> Result<String> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(30) {
        let text = fs::read_to_string(errors)?;
        if let Some((line, _)) = text.split_once('\n') {
            let word = line.split_whitespace().next_back();
            return Ok(word.context("an empty line")?.to_owned());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    bail!("the receiver does not say where it listens")
}

/// The number after `at tick`.
fn tick(told: &str) -> Option<u64> {
    let (_, after) = told.split_once("at tick ")?;
    after.split(':').next()?.parse().ok()
}

fn dir() -> Result<PathBuf> {
    let dir = cache().join("moves");
    fs::create_dir_all(&dir)?;
    Ok(dir)
}
