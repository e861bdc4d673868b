//! Whole machines: stock kernels boot, equal runs end in equal states, wild guests do no harm.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::guests::{KERNELS, Kernel, LINUX_ARGS, MARKER};
use crate::run::{Captured, cache, capture, command, find, line, root, run, shown};
use crate::test::Outcome;
use crate::{build, guests};

/// A run that takes longer than this has failed.
const LIMIT_SECONDS: u64 = 400;

/// A run of the command: a kernel, its initramfs, and what differs.
pub struct LinuxRun<'a> {
    pub kernel: &'a Kernel,
    pub cpus: u32,
    pub memory: &'a str,
    pub initramfs: PathBuf,
    /// Words for its init.
    pub words: &'a str,
    /// Further options of `hypernest run`.
    pub options: Vec<String>,
}

impl<'a> LinuxRun<'a> {
    /// One processor, 256 MiB, the plain initramfs.
    pub fn new(kernel: &'a Kernel, words: &'a str) -> Self {
        Self {
            kernel,
            cpus: 1,
            memory: "256M",
            initramfs: kernel.initramfs(),
            words,
            options: Vec::new(),
        }
    }

    /// The command line.
    pub fn command(&self, cli: &Path) -> std::process::Command {
        let mut run = command(&cli.to_string_lossy());
        run.arg("run")
            .arg(self.kernel.image())
            .arg("--initrd")
            .arg(&self.initramfs)
            .args(["--append", &format!("{LINUX_ARGS} {}", self.words)])
            .args(["--memory", self.memory, "--serial", "stdio"])
            .args(["--cpus", &self.cpus.to_string()])
            .args(["--timeout", &LIMIT_SECONDS.to_string()])
            .args(&self.options);
        run
    }

    /// Runs it to its end.
    pub fn capture(&self, cli: &Path) -> Result<Captured> {
        let mut run = self.command(cli);
        println!("$ {}", shown(&run));
        capture(Duration::from_secs(LIMIT_SECONDS + 30), &mut run)
    }
}

/// The kernels whose images have been made; `None` where there are none.
pub fn kernels() -> Option<Vec<&'static Kernel>> {
    let there: Vec<_> = KERNELS
        .iter()
        .filter(|kernel| kernel.image().exists())
        .collect();
    (!there.is_empty()).then_some(there)
}

pub fn no_images() -> Outcome {
    Outcome::Skipped("there is no guest image: see suite guests".into())
}

/// Ends the run when init has been reached.
pub const STOP_AT_INIT: &str = "anchor.stop=boot";

/// Both kernels with one and two processors.
pub fn boots() -> Result<Outcome> {
    let Some(there) = kernels() else {
        return Ok(no_images());
    };
    let cli = build::cli()?;
    let mut failures = Vec::new();
    for kernel in &there {
        for cpus in [1, 2] {
            let name = format!("Linux {} with {cpus} processor(s)", kernel.series);
            let options = vec!["--stop-on".into(), MARKER.into()];
            let result = LinuxRun {
                cpus,
                options,
                ..LinuxRun::new(kernel, STOP_AT_INIT)
            }
            .capture(&cli)?;
            let failure = boot_failure(&result, cpus);
            failures.extend(told(&name, "at its init", &result, failure));
        }
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("; "));
    }
    Ok(Outcome::Passed)
}

fn boot_failure(result: &Captured, cpus: u32) -> Option<String> {
    match result.status.map(|status| status.code()) {
        None | Some(Some(124)) => return Some("did not reach its init in time".into()),
        Some(Some(0)) => {}
        Some(code) => return Some(format!("ended with exit code {code:?}")),
    }
    if !result.stdout.contains(MARKER) {
        return Some("ended well but without the marker".into());
    }
    // "node" or "nodes", and "CPU" or "CPUs", by number.
    let brought_up = format!("{cpus} CPU");
    let smp = result
        .stdout
        .lines()
        .any(|line| line.contains("Brought up") && line.contains(&brought_up));
    (!smp).then(|| format!("did not bring up {cpus} processor(s)"))
}

/// Prints how a run went: `good` with its time, or why it failed and the end of what it printed.
pub fn told(name: &str, good: &str, result: &Captured, failure: Option<String>) -> Option<String> {
    let Some(why) = failure else {
        println!("{name}: {good} after {:.1} s", result.time.as_secs_f64());
        return None;
    };
    println!("{name}: {why}");
    show_end(result);
    Some(format!("{name}: {why}"))
}

fn show_end(result: &Captured) {
    for (name, text) in [("serial", &result.stdout), ("stderr", &result.stderr)] {
        let lines: Vec<_> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(30)..] {
            println!("{name}| {line}");
        }
    }
}

/// Where a run stood when it was stopped.
#[derive(Debug, PartialEq, Eq)]
pub struct End {
    pub ticks: u64,
    pub hash: String,
}

/// A run that must end in the same state however it is executed.
struct Compared {
    about: &'static str,
    cpus: u32,
    /// Words for its init.
    words: &'static str,
    /// VMX profile.
    vmx: &'static str,
    /// Where the states are compared.
    tick: u64,
    /// What it must have printed by then.
    printed: &'static str,
    /// Lengths of blocks, besides the greatest.
    blocks: &'static [u32],
}

/// The kernel's start, up to the middle, when its clocks, its memory and (with two processors) its processors
/// are up; and guests of its KVM, up to those that make exits of all kinds.
const COMPARED: [Compared; 3] = [
    Compared {
        about: "1 processor",
        cpus: 1,
        words: STOP_AT_INIT,
        vmx: "none",
        tick: 300_000_000,
        printed: "Linux version",
        blocks: &[1, 7],
    },
    Compared {
        about: "2 processors",
        cpus: 2,
        words: STOP_AT_INIT,
        vmx: "none",
        tick: 300_000_000,
        printed: "Linux version",
        blocks: &[1, 7],
    },
    Compared {
        about: "KVM",
        cpus: 1,
        words: "anchor.n=2000 anchor.mem=8",
        vmx: "max",
        tick: 1_250_000_000,
        printed: "L2 long_out ok=1",
        blocks: &[7],
    },
];

/// The same guest twice, in blocks of 1, 7 and as many instructions as a block holds, and in WebAssembly.
pub fn determinism() -> Result<Outcome> {
    let kernel = &KERNELS[0];
    if !kernel.image().exists() {
        return Ok(no_images());
    }
    let cli = build::cli()?;
    build::wasm()?;
    let mut different = Vec::new();
    for compared in &COMPARED {
        let about = compared.about;
        let reference = native_end(&cli, kernel, compared, None)?;
        println!("{about}: tick {} hash {}", reference.ticks, reference.hash);
        if reference.ticks != compared.tick {
            bail!(
                "the run stopped at tick {}, not at {}",
                reference.ticks,
                compared.tick
            );
        }
        let mut compare = |name: &str, end: Result<End>| -> Result<()> {
            let end = end.with_context(|| format!("{name}, {about}"))?;
            println!("{about}, {name}: tick {} hash {}", end.ticks, end.hash);
            if end != reference {
                different.push(format!("{name} with {about}"));
            }
            Ok(())
        };
        compare("again", native_end(&cli, kernel, compared, None))?;
        for &length in compared.blocks {
            let name = format!("blocks of {length}");
            compare(&name, native_end(&cli, kernel, compared, Some(length)))?;
        }
        compare("WebAssembly", wasm_end(kernel, compared))?;
    }
    if !different.is_empty() {
        bail!("ended in another state: {}", different.join(", "));
    }
    Ok(Outcome::Passed)
}

fn native_end(cli: &Path, kernel: &Kernel, compared: &Compared, block: Option<u32>) -> Result<End> {
    let report = cache().join("determinism.json");
    let _ = fs::remove_file(&report);
    let mut options = vec![
        "--stop-at".into(),
        compared.tick.to_string(),
        "--vmx".into(),
        compared.vmx.into(),
        "--report-json".into(),
        report.to_string_lossy().into_owned(),
    ];
    if let Some(length) = block {
        options.extend(["--block-length".into(), length.to_string()]);
    }
    let result = LinuxRun {
        cpus: compared.cpus,
        options,
        ..LinuxRun::new(kernel, compared.words)
    }
    .capture(cli)?;
    let text = fs::read_to_string(&report);
    if text.is_err() || !result.status.is_some_and(|status| status.success()) {
        show_end(&result);
        bail!("the run ended with {:?}", result.status);
    }
    if !result.stdout.contains(compared.printed) {
        show_end(&result);
        bail!("the run did not print `{}` in time", compared.printed);
    }
    end(&text?)
}

/// Out of a report, or of what the programs for Node print.
pub fn end(json: &str) -> Result<End> {
    let report: Value =
        serde_json::from_str(json).with_context(|| format!("not a report: {json}"))?;
    let ticks = report["ticks"]
        .as_u64()
        .context("the report has no ticks")?;
    let hash = report["state_hash"]
        .as_str()
        .context("the report has no state_hash")?
        .into();
    Ok(End { ticks, hash })
}

/// The same in Node, through the package that the page uses.
fn wasm_end(kernel: &Kernel, compared: &Compared) -> Result<End> {
    find("node").context("node is missing (package nodejs)")?;
    let mut node = line("node tests/integration/run-to-tick.mjs");
    node.arg(kernel.image()).arg(kernel.initramfs()).args([
        format!("{LINUX_ARGS} {}", compared.words),
        (256 << 20).to_string(),
        compared.cpus.to_string(),
        compared.vmx.into(),
        compared.tick.to_string(),
    ]);
    println!("$ {}", shown(&node));
    let result = capture(Duration::from_secs(LIMIT_SECONDS), &mut node)?;
    if !result.status.is_some_and(|status| status.success()) {
        show_end(&result);
        bail!("node ended with {:?}", result.status);
    }
    end(result.stdout.lines().last().unwrap_or_default())
}

/// Runs each target of `fuzz/` for `time`.
pub fn fuzz(time: Duration) -> Result<Outcome> {
    let targets = fuzz_targets()?;
    if targets.is_empty() {
        return Ok(Outcome::Skipped("fuzz/ has no targets".into()));
    }
    if find("cargo-fuzz").is_none() {
        return Ok(Outcome::Skipped(
            "cargo-fuzz is not installed: `cargo install cargo-fuzz --locked`".into(),
        ));
    }
    for target in targets {
        // What it finds goes to the first folder; it also starts from the second.
        let corpus = root().join("fuzz/corpus").join(&target);
        fs::create_dir_all(&corpus)?;
        let mut fuzz = line(&format!("cargo fuzz run --sanitizer none {target}"));
        fuzz.arg(corpus);
        let seeds = root().join("fuzz/seeds").join(&target);
        if seeds.is_dir() {
            fuzz.arg(seeds);
        }
        fuzz.arg("--");
        // The pinned compiler has what the fuzzer's instrumentation needs, behind this door.
        fuzz.env("RUSTC_BOOTSTRAP", "1")
            .arg(format!("-max_total_time={}", time.as_secs()))
            .args(["-verbosity=0", "-print_final_stats=1"]);
        run(&mut fuzz)?;
    }
    Ok(Outcome::Passed)
}

fn fuzz_targets() -> Result<Vec<String>> {
    let dir: PathBuf = root().join("fuzz/fuzz_targets");
    let mut targets = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "rs") {
            targets.push(
                path.file_stem()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
    }
    targets.sort();
    Ok(targets)
}

/// Whether any kernel's images are there, for chores that need one.
pub fn first_kernel() -> Result<&'static Kernel> {
    guests::make_what_is_possible()?;
    KERNELS
        .iter()
        .find(|kernel| kernel.image().exists())
        .context("no guest kernel could be made")
}
