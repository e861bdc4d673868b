//! `cargo xtask bench`: what the machine does in one run against what else is installed. Ratios hold from host to
//! host and from hour to hour; seconds do not. Nothing here is a test.

mod bochs;
mod exits;
mod measure;
mod migrate;
mod page;
mod snapshot;
mod vmcs;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::enlightened;
use crate::guests::{self, Kernel, LINUX_ARGS, LOOP_INSTRUCTIONS, MARKER};
use crate::integration::{LinuxRun, first_kernel};
use crate::run::{command, find};
use measure::{Run, median, run_until};

/// QEMU's time, as Bochs HEAD was measured against it on one machine.
const BOCHS_TO_QEMU: f64 = 2.2;
const LIMIT: Duration = Duration::from_secs(300);

const PARTS: &[&str] = &[
    "boot", "loop", "start", "exits", "hyperv", "events", "vmcs", "migrate", "snapshot", "page",
];

pub fn main(args: &[&str]) -> Result<bool> {
    let mut pairs = 5;
    let mut parts = Vec::new();
    let mut args = args.iter();
    while let Some(&arg) = args.next() {
        match arg {
            "--pairs" => {
                pairs = args
                    .next()
                    .context("--pairs needs a number")?
                    .parse::<usize>()?
                    .max(1)
            }
            _ if PARTS.contains(&arg) => parts.push(arg),
            _ => bail!(
                "unknown part {arg}; there are {} and --pairs N",
                PARTS.join(", ")
            ),
        }
    }
    if parts.is_empty() {
        parts = PARTS.to_vec();
    }
    let kernel = first_kernel()?;
    let cli = build::cli()?;
    let mut native_rate = None;
    for part in parts {
        match part {
            "boot" => native_rate = Some(boot(&cli, kernel, pairs)?),
            "loop" => hot_loop(&cli, pairs)?,
            "start" => start(&cli)?,
            "exits" => exits::measure(&cli, kernel)?,
            "hyperv" => enlightened::bench(&cli, kernel)?,
            "events" => exits::events(&cli, kernel, pairs)?,
            "vmcs" => vmcs::measure()?,
            "migrate" => migrate::measure(&cli, kernel, pairs)?,
            "snapshot" => snapshot::measure(&cli, kernel)?,
            _ => page::measure(native_rate)?,
        }
    }
    Ok(true)
}

/// QEMU's emulator, on the board with the least firmware.
fn qemu(image: &Path) -> Option<std::process::Command> {
    let program = find("qemu-system-x86_64")?;
    let mut qemu = command(&program.to_string_lossy());
    qemu.args([
        "-accel",
        "tcg",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
        "-nodefaults",
    ])
    .args(["-m", "256", "-kernel"])
    .arg(image);
    Some(qemu)
}

/// QEMU's run to the marker; `None` where there is no QEMU.
///
/// On a busy host Linux finds the timer chips of QEMU's smallest board at odds with each other and waits for ever:
/// it is told the frequency of the time-stamp counter, which in QEMU is the host's.
fn qemu_boot(kernel: &Kernel, append: &str) -> Result<Option<Run>> {
    let Some(mut qemu) = qemu(&kernel.image()) else {
        return Ok(None);
    };
    let append = match host_khz() {
        Some(khz) => format!("{append} tsc_early_khz={khz}"),
        None => append.into(),
    };
    qemu.args(["-M", "microvm", "-append", &append])
        .arg("-initrd")
        .arg(kernel.initramfs());
    run_until(&mut qemu, MARKER, LIMIT).map(Some)
}

fn host_khz() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz"))?;
    let megahertz: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    Some((megahertz * 1e3) as u64)
}

/// Boots the kernel to its init in turns; the instructions per second of ours.
fn boot(cli: &Path, kernel: &Kernel, pairs: usize) -> Result<f64> {
    println!(
        "\n== Linux {} to `{MARKER}`, {pairs} pairs of runs",
        kernel.series
    );
    let append = format!("{LINUX_ARGS} anchor.stop=boot");
    let report = crate::run::cache().join("bench.json");
    let bochs = bochs::Bochs::prepare(kernel, &append)?;
    let (mut ours, mut tcg, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..pairs {
        let options = vec![
            "--stop-on".into(),
            MARKER.into(),
            "--report-json".into(),
            report.to_string_lossy().into_owned(),
        ];
        let run = LinuxRun {
            options,
            ..LinuxRun::new(kernel, crate::integration::STOP_AT_INIT)
        };
        ours.push(run_until(&mut run.command(cli), MARKER, LIMIT)?);
        tcg.push(qemu_boot(kernel, &append)?);
        if let Some(bochs) = &bochs {
            match bochs.run(LIMIT) {
                Ok(run) => others.push(Some(run)),
                Err(error) => println!("Bochs is left out: {error:#}"),
            }
        }
    }
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&report)?)?;
    let instructions = report["instructions"]
        .as_u64()
        .context("the report has no instructions")? as f64;
    let seconds = median(ours.iter().map(Run::cpu_seconds));
    let rate = instructions / seconds / 1e6;
    println!(
        "hypernest: {seconds:.2} CPU-s, {:.0} M instructions, {rate:.0} MIPS",
        instructions / 1e6
    );
    compare("QEMU TCG (microvm)", &ours, &tcg);
    if tcg.iter().all(Option::is_none) {
        println!("no run of QEMU (package qemu-system-x86)");
    } else if others.is_empty() {
        let against = ratio(&ours, &tcg) / BOCHS_TO_QEMU;
        println!(
            "no run of Bochs; by its known {BOCHS_TO_QEMU} x QEMU's time, ours takes {against:.2} of Bochs' time"
        );
    }
    compare("Bochs, firmware and boot loader included", &ours, &others);
    let peak = ours.iter().map(|run| run.peak_kib).max().unwrap_or(0) / 1024;
    println!(
        "peak memory: {peak} MiB resident, guest RAM included (256 MiB, of which it holds what the guest touched)"
    );
    Ok(rate)
}

/// The median over pairs of our time by theirs.
fn ratio(ours: &[Run], theirs: &[Option<Run>]) -> f64 {
    median(
        ours.iter()
            .zip(theirs)
            .filter_map(|(a, b)| Some(a.cpu_seconds() / b.as_ref()?.cpu_seconds())),
    )
}

fn compare(name: &str, ours: &[Run], theirs: &[Option<Run>]) {
    if theirs.iter().any(Option::is_some) {
        let seconds = median(theirs.iter().flatten().map(Run::cpu_seconds));
        println!(
            "{name}: {seconds:.2} CPU-s; ours takes {:.2} of that time",
            ratio(ours, theirs)
        );
    }
}

fn hot_loop(cli: &Path, pairs: usize) -> Result<()> {
    let millions = LOOP_INSTRUCTIONS as f64 / 1e6;
    println!(
        "\n== A hot loop of 12 instructions, 3 of them memory accesses ({millions:.0} M instructions)"
    );
    let image = loop_image()?;
    let (mut ours, mut tcg) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let mut run = command(&cli.to_string_lossy());
        run.arg("run")
            .arg(&image)
            .args(["--memory", "16M", "--serial", "stdio"]);
        ours.push(run_until(&mut run, "", LIMIT)?);
        if let Some(mut qemu) = qemu(&image) {
            qemu.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
            tcg.push(run_until(&mut qemu, "", LIMIT)?);
        }
    }
    for (name, runs) in [("hypernest", &ours), ("QEMU TCG", &tcg)] {
        if !runs.is_empty() {
            println!(
                "{name}: {:.0} MIPS",
                millions / median(runs.iter().map(Run::cpu_seconds))
            );
        }
    }
    Ok(())
}

fn start(cli: &Path) -> Result<()> {
    println!("\n== From starting the command to the guest's first output");
    let image = loop_image()?;
    let mut latencies = Vec::new();
    for _ in 0..15 {
        let mut run = command(&cli.to_string_lossy());
        run.arg("run")
            .arg(&image)
            .args(["--memory", "256M", "--serial", "stdio"]);
        let run = run_until(&mut run, "S", LIMIT)?;
        latencies.push(run.wall.as_secs_f64() * 1e3);
    }
    println!(
        "median of {}: {:.1} ms",
        latencies.len(),
        median(latencies.iter().copied())
    );
    Ok(())
}

fn loop_image() -> Result<PathBuf> {
    let image = guests::dir().join("loop.elf");
    if !image.is_file() {
        bail!(
            "{} is missing: `cargo xtask guests` makes it",
            image.display()
        );
    }
    Ok(image)
}
