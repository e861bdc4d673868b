//! VM exits per second through Linux's KVM, an L2 Linux, and kvm-unit-tests' `vmx`, against the known figures of
//! Bochs on a machine of this class.
//!
//! Rates are per second of processor time, which other processes on the host disturb least; what the wall saw stands
//! beside it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::LIMIT;
use super::measure::{Mark, median, run_until, watch};
use crate::build;
use crate::guests::Kernel;
use crate::integration::LinuxRun;
use crate::kut::config;
use crate::nested::{INSIDE_MARKER, INSIDE_START, nested_linux, nested_words};
use crate::run::{cache, command};

/// One kind of exit, as l2test provokes it.
struct Kind {
    about: &'static str,
    letter: char,
    /// l2test's name of it.
    test: &'static str,
    /// Exits; enough for a few seconds.
    count: u64,
    /// Exits per second of Bochs.
    bochs: f64,
}

const KINDS: &[Kind] = &[
    Kind {
        about: "CPUID, handled in L1's KVM",
        letter: 'b',
        test: "cpuid",
        count: 600_000,
        bochs: 64_000.0,
    },
    Kind {
        about: "port I/O, to L1's user space",
        letter: 'o',
        test: "long_out",
        count: 200_000,
        bochs: 19_700.0,
    },
    Kind {
        about: "MMIO, to L1's user space",
        letter: 'm',
        test: "mmio",
        count: 100_000,
        bochs: 11_900.0,
    },
    Kind {
        about: "pages touched for the first time",
        letter: 'c',
        test: "touch_cold",
        count: COLD_MIB * 256,
        bochs: 11_100.0,
    },
];

/// Memory of the guest that touches cold pages.
const COLD_MIB: u64 = 512;

/// Seconds of Bochs from `L2LINUX START` to the marker.
const BOCHS_INSIDE: f64 = 7.5;
/// Seconds of Bochs in `vmx` by its default filter.
const BOCHS_VMX: f64 = 3.5;

pub fn measure(cli: &Path, kernel: &Kernel) -> Result<()> {
    println!("\n== VM exits through KVM of Linux {}", kernel.series);
    for kind in KINDS {
        let (cpu, wall) = exits_of(kind, cli, kernel)?;
        let rate = kind.count as f64 / cpu;
        println!(
            "{}: {:.0} k/s ({:.0} k/s on the wall); {:.1} times Bochs' {:.0} k/s",
            kind.about,
            rate / 1e3,
            kind.count as f64 / wall / 1e3,
            rate / kind.bochs,
            kind.bochs / 1e3
        );
    }

    let words = format!("mitigations=off {}", nested_words(&["cryptomgr.notests"]));
    let texts = [INSIDE_START.into(), INSIDE_MARKER.into()];
    let marks = marks(&mut nested_linux(kernel, &words).command(cli), &texts)?;
    let (cpu, wall) = seconds(&marks);
    println!(
        "Linux inside, to its init: {cpu:.2} CPU-s ({wall:.2} s on the wall); {:.2} of Bochs' {BOCHS_INSIDE} s",
        cpu / BOCHS_INSIDE
    );
    unit_tests(cli)
}

/// Seconds of processors and on the wall for all exits of a kind.
fn exits_of(kind: &Kind, cli: &Path, kernel: &Kernel) -> Result<(f64, f64)> {
    let words = format!(
        "mitigations=off anchor.n={} anchor.mem={COLD_MIB} anchor.tests={}",
        kind.count, kind.letter
    );
    let run = LinuxRun {
        memory: "1G",
        options: vec!["--vmx".into(), "max".into()],
        ..LinuxRun::new(kernel, &words)
    };
    let texts = [
        format!("L2 BEGIN {}", kind.test),
        format!("L2 {} ok=1 n={} ", kind.test, kind.count),
    ];
    Ok(seconds(&marks(&mut run.command(cli), &texts)?))
}

/// What events and counters of VMX cost while nobody asks for events: this build and one in which their calls are
/// compiled out, in turns.
pub fn events(cli: &Path, kernel: &Kernel, pairs: usize) -> Result<()> {
    let kind = &KINDS[0];
    println!(
        "\n== VMX events, not asked for, against a build without them: {}, {pairs} pairs of runs",
        kind.about
    );
    let without = build::cli_without_events()?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        ours.push(exits_of(kind, cli, kernel)?.0);
        bare.push(exits_of(kind, &without, kernel)?.0);
    }
    let ratios = ours.iter().zip(&bare).map(|(a, b)| a / b);
    println!(
        "with {:.2} CPU-s, without {:.2} CPU-s; with takes {:.3} of the time",
        median(ours.iter().copied()),
        median(bare.iter().copied()),
        median(ratios)
    );
    Ok(())
}

fn marks(command: &mut std::process::Command, texts: &[String; 2]) -> Result<[Mark; 2]> {
    let texts = [texts[0].as_str(), texts[1].as_str()];
    let (_, marks) = watch(command, &texts, LIMIT)?;
    marks.try_into().ok().context("a mark for each text")
}

/// From the first mark to the second: of processors, and on the wall.
fn seconds([start, end]: &[Mark; 2]) -> (f64, f64) {
    (end.cpu - start.cpu, end.wall - start.wall)
}

/// `vmx` of a built kvm-unit-tests tree, by the filter that its configuration gives it.
fn unit_tests(cli: &Path) -> Result<()> {
    let Some(dir) = std::env::var_os("KVM_UNIT_TESTS") else {
        println!("`vmx` of kvm-unit-tests is not measured: KVM_UNIT_TESTS names no built tree");
        return Ok(());
    };
    let dir = Path::new(&dir).join("x86");
    let text = fs::read_to_string(dir.join("unittests.cfg"))
        .with_context(|| format!("{} holds no unittests.cfg", dir.display()))?;
    let test = config::parse(&text)
        .into_iter()
        .find(|test| test.name == "vmx")
        .context("unittests.cfg has no section vmx")?;
    let memory = test.memory_mib();
    let environment = cache().join("vmx.env");
    fs::write(
        &environment,
        format!("NR_CPUS=1\nMEMSIZE={memory}\nTEST_DEVICE=1\n"),
    )?;
    let mut run = command(&cli.to_string_lossy());
    run.arg("run")
        .arg(dir.join(&test.file))
        .args(["--append", &test.args, "--vmx", "max", "--serial", "stdio"])
        .args(["--memory", &format!("{memory}M")])
        .arg("--module")
        .arg(&environment);
    match run_until(&mut run, "SUMMARY", LIMIT).map(|run| run.cpu_seconds()) {
        Ok(seconds) => println!(
            "`vmx` of kvm-unit-tests, default filter: {seconds:.2} CPU-s; {:.2} of Bochs' {BOCHS_VMX}",
            seconds / BOCHS_VMX
        ),
        Err(error) => println!("`vmx` of kvm-unit-tests is not measured: {error:#}"),
    }
    Ok(())
}
