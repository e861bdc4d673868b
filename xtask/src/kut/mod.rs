//! `cargo xtask kut DIR [FILTER..]`: runs a built kvm-unit-tests tree on the `hypernest` command.

pub mod config;
mod each;
mod judge;

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::run::{Captured, capture, command};
use config::Test;
use judge::{Report, Verdict};

/// The limit of a test that names none, as in the suite's own runner.
const DEFAULT_SECONDS: u64 = 90;

/// The suite's limits are meant for silicon.
const SLOWER: u64 = 4;

const USAGE: &str = "kut DIR [FILTER..] [--each] [--slower N] [--jobs N] [--logs DIR]";

struct Options {
    dir: PathBuf,
    filters: Vec<String>,
    /// Every sub-test of a file alone.
    each: bool,
    /// Multiplies every limit in time.
    slower: u64,
    jobs: usize,
    /// Where each test's output goes.
    logs: PathBuf,
}

fn parse(args: &[&str]) -> Result<Options> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let logs = crate::run::cache().join("kut");
    let mut options = Options {
        dir: PathBuf::new(),
        filters: Vec::new(),
        each: false,
        slower: SLOWER,
        jobs,
        logs,
    };
    let mut args = args.iter();
    while let Some(&arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg {
            "--each" => options.each = true,
            "--slower" => options.slower = value()?.parse()?,
            "--jobs" => options.jobs = value()?.parse()?,
            "--logs" => options.logs = value()?.into(),
            _ if arg.starts_with('-') => bail!("unknown option {arg}: {USAGE}"),
            _ if options.dir.as_os_str().is_empty() => options.dir = arg.into(),
            _ => options.filters.extend(arg.split(',').map(str::to_owned)),
        }
    }
    if options.dir.as_os_str().is_empty() {
        bail!("which directory? {USAGE}");
    }
    Ok(options)
}

pub fn main(args: &[&str]) -> Result<bool> {
    let options = parse(args)?;
    let tests_dir = options.dir.join("x86");
    let config = tests_dir.join("unittests.cfg");
    let text = fs::read_to_string(&config).with_context(|| {
        format!(
            "{} cannot be read: give the top of a built kvm-unit-tests tree",
            config.display()
        )
    })?;
    let mut tests: Vec<Test> = config::parse(&text)
        .into_iter()
        .filter(|test| {
            options.filters.is_empty() || options.filters.iter().any(|f| test.matches(f))
        })
        .collect();
    if tests.is_empty() {
        bail!(
            "no test in {} matches {}",
            config.display(),
            options.filters.join(" ")
        );
    }
    let cli = build::cli()?;
    fs::create_dir_all(&options.logs)?;
    if options.each {
        tests = each::split(&tests, |test| {
            Ok(start(&cli, &tests_dir, test, &options)?.stdout)
        })?;
    }
    println!(
        "{} tests, {} at a time; their output goes to {}",
        tests.len(),
        options.jobs,
        options.logs.display()
    );
    Ok(run_all(&cli, &tests_dir, tests, &options))
}

/// Runs every test and prints the table. True when none failed and at least one ran.
fn run_all(cli: &Path, tests_dir: &Path, tests: Vec<Test>, options: &Options) -> bool {
    let width = tests.iter().map(|test| test.name.len()).max().unwrap_or(0);
    println!(
        "{:width$}  {:8} {:>6} {:>6} {:>6} {:>8}",
        "test", "result", "pass", "fail", "skip", "seconds"
    );
    let waiting = Mutex::new(VecDeque::from(tests));
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().expect("no runner panics").pop_front();
                    let Some(test) = next else { break };
                    let mut test = test;
                    let mut report = run_one(cli, tests_dir, &test, options);
                    if options.each
                        && matches!(report.verdict, Verdict::Skip(_))
                        && let Some(again) = each::with_second_cpu(&test, &options.logs)
                    {
                        report = run_one(cli, tests_dir, &again, options);
                        test = again;
                    }
                    let mut done = done.lock().expect("no runner panics");
                    print_row(width, &test, &report);
                    done.push((test, report));
                }
            });
        }
    });
    let done = done.into_inner().expect("no runner panics");
    for (test, report) in &done {
        if report.verdict.is_bad() && !report.notes.is_empty() {
            println!("\n{}:", test.name);
            for note in report.notes.iter().take(40) {
                println!("  {note}");
            }
            if report.notes.len() > 40 {
                println!("  ... {} lines more", report.notes.len() - 40);
            }
        }
    }
    let count =
        |verdict: fn(&Verdict) -> bool| done.iter().filter(|(_, r)| verdict(&r.verdict)).count();
    let (passed, failed) = (count(|v| *v == Verdict::Pass), count(Verdict::is_bad));
    println!(
        "\n{passed} passed, {failed} failed, {} skipped",
        count(|v| matches!(v, Verdict::Skip(_)))
    );
    if passed + failed == 0 {
        println!("No test ran.");
    }
    failed == 0 && passed > 0
}

fn print_row(width: usize, test: &Test, report: &Report) {
    let counts = report.counts;
    let mut remark = report.verdict.reason().to_owned();
    if counts.better > 0 {
        remark = format!(
            "{} pass that the suite expects KVM to fail {remark}",
            counts.better
        );
    }
    let removed = test.removed_features();
    if !removed.is_empty() && !matches!(report.verdict, Verdict::Skip(_)) {
        remark = format!(
            "{remark} (with {}, which the test would rather not have)",
            removed.join(", ")
        )
        .trim()
        .into();
    }
    println!(
        "{:width$}  {:8} {:>6} {:>6} {:>6} {:>8.1}  {remark}",
        test.name,
        report.verdict.word(),
        counts.pass,
        counts.fail,
        counts.skip,
        report.time.as_secs_f64(),
    );
}

fn run_one(cli: &Path, tests_dir: &Path, test: &Test, options: &Options) -> Report {
    if let Some(reason) = test.reason_to_skip(tests_dir) {
        return Report::without_run(Verdict::Skip(reason));
    }
    execute(cli, tests_dir, test, options)
        .unwrap_or_else(|error| Report::without_run(Verdict::Crash(format!("{error:#}"))))
}

fn execute(cli: &Path, tests_dir: &Path, test: &Test, options: &Options) -> Result<Report> {
    Ok(judge::judge(&start(cli, tests_dir, test, options)?))
}

/// Runs a test and keeps what it prints.
fn start(cli: &Path, tests_dir: &Path, test: &Test, options: &Options) -> Result<Captured> {
    // What the suite's own runner hands over as an initrd: it stands in for fw_cfg.
    let log_path = options.logs.join(test.log_name());
    let environment = log_path.with_extension("env");
    let memory = test.memory_mib();
    let test_device = u8::from(!test.calls_kvm);
    fs::write(
        &environment,
        format!(
            "NR_CPUS={}\nMEMSIZE={memory}\nTEST_DEVICE={test_device}\n",
            test.smp
        ),
    )?;

    let seconds = test.timeout.unwrap_or(DEFAULT_SECONDS) * options.slower;
    let mut run = command(&cli.to_string_lossy());
    run.arg("run")
        .arg(tests_dir.join(&test.file))
        .args(["--cpus", &test.smp.to_string()])
        .args(["--memory", &format!("{memory}M")])
        .args(["--timeout", &seconds.to_string()])
        .args(["--serial", "stdio"])
        .args(["--cpu", test.model()])
        .arg("--module")
        .arg(&environment);
    if test.wants_vmx() {
        run.args(["--vmx", "max"]);
    }
    if !test.args.is_empty() {
        run.args(["--append", &test.args]);
    }
    // The command's own limit comes first and explains itself; this one catches a command that hangs.
    let result = capture(Duration::from_secs(seconds + 20), &mut run)?;
    let log = format!(
        "$ {}\n{}{}",
        crate::run::shown(&run),
        result.stdout,
        result.stderr
    );
    fs::write(log_path, log)?;
    Ok(result)
}
