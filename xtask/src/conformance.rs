//! The conformance guest (`tests/guests/conformance`): natively, in WebAssembly, and on Bochs.
//!
//! Each of its lines is an id, what was done, and what was observed. `expected.txt` has them all; a
//! line that says `absent` is for a processor without what it needs. Lines with the id of a row of
//! `vmx_checks.csv` are held to that table as well.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hypernest_vmcs::checks::{CHECK_ROWS, Stage};
use hypernest_vmcs::{ExitReason, Field};

use crate::bochs::{self, Judged};
use crate::build;
use crate::run::{cache, capture, find, line, root, run};
use crate::test::Outcome;

const SOURCES: &str = "tests/guests/conformance";
const MEMORY: u64 = 128 << 20;
const LIMIT: Duration = Duration::from_secs(120);

/// What `--vmx max` may lack. Everything else has to be observed.
const NOT_OFFERED: &[&str] = &[
    "proc2.23",
    "proc3.8",
    "exit.29",
    "exit.31",
    "exit2.2",
    "entry.16",
    "entry.22",
    "entry.24",
    "a field that VMWRITE cannot write",
    "a processor without proc2.14",
];

/// Rows that a guest can make fail, which this guest does not.
const ROWS_LEFT: &[(&str, &str)] = &[
    ("M007", "a VMX abort: see ABORTS"),
    ("M008", "a VMX abort: see ABORTS"),
    ("M009", "a VMX abort of a 32-bit host: a unit test"),
    ("M012", "a VMX abort of a 32-bit host: a unit test"),
];

/// Exit reasons without a line of their own.
const EXITS_LEFT: &[(&[u16], &str)] = &[
    (&[4], "needs a second processor"),
    (&[33, 34], "rows G and M"),
    (&[5, 6, 17], "no SMM"),
    (&[41], "no machine checks"),
    (&[11], "no SMX"),
    (&[63, 64], "IA32_XSS has no component that could exit"),
    (
        &[60, 65, 69, 70, 72, 73, 75],
        "controls that are not offered",
    ),
    (
        &[66, 67, 68, 74, 76, 77, 78, 79, 80, 81, 84, 85],
        "features that there are not",
    ),
];

/// Words of the command line under which Bochs comes to the end: what it panics at, and an INIT
/// that it does not hand to the hypervisor.
const BOCHS_SKIPS: &str = "skip=E01 skip=C060 skip=3";

/// Where Bochs 2.7 differs: the beginning of a line, what it prints, why that is wrong.
const BOCHS_FAULTS: &[(&str, &str, &str)] = &[
    (
        "P005",
        "VMfail 7",
        "the shadow indicator of the current VMCS is not looked at",
    ),
    (
        "E28 INVEPT with a reserved bit",
        "succeeds",
        "bits 127:64 of the descriptor are not checked",
    ),
    ("G008", "enters", "DEBUGCTL is not checked"),
    (
        "G096",
        "exit 2 qualification 0",
        "RIP is not checked above the linear width",
    ),
    (
        "G103",
        "exit 2 qualification 0",
        "injection into HLT is not checked",
    ),
    (
        "G112",
        "exit 33 qualification 0",
        "the qualification of this row is 3",
    ),
    (
        "G115",
        "exit 2 qualification 0",
        "virtual-NMI blocking is not checked",
    ),
    (
        "G117 pending debug exceptions bit 63",
        "enters",
        "bits 63:32 are not checked",
    ),
    ("G118 no pending", "enters", "BS is not checked"),
    (
        "G118 a pending",
        "exit 2 qualification 0",
        "BS is not checked",
    ),
    (
        "M003 the microcode",
        "enters",
        "79H and 8BH are not refused",
    ),
    ("M003 SMM_MONITOR_CTL", "enters", "9BH is not refused"),
    ("M006", "enters", "undefined: there is no limit"),
    (
        "1 ",
        "exit 18 qualification 0 event 0",
        "interrupts stay masked in a guest with IF 0",
    ),
    (
        "8 NMI window",
        "exit 18 qualification 0 rip 3",
        "the window is not looked for at the entry",
    ),
    (
        "48 page walk through no page, with",
        "exit 48 qualification 0x82 physical 0x40000000",
        "a walk with A/D flags reads as well",
    ),
    (
        "49 a page of 2 MiB",
        "exit 18 qualification 0 physical 0",
        "bits 20:12 of a page of 2 MiB are not checked",
    ),
];

/// Rows before which another one fails in every case of theirs.
const ROWS_BEHIND: &[(&str, &str)] = &[("H031", "H029")];

/// Rows whose failure ends the machine, each in a run of its own, and the indicator.
const ABORTS: &[(&str, u32)] = &[("M007", 1), ("M008", 4)];

/// The suite.
pub fn suite() -> Result<Outcome> {
    let expected = parse(&fs::read_to_string(
        root().join(SOURCES).join("expected.txt"),
    )?)?;
    tables(&expected)?;
    let program = compile()?;
    judge("natively", &expected, &natively(&program)?)?;
    for (id, indicator) in ABORTS {
        aborts(&program, id, *indicator)?;
    }
    if find("node").is_some() && find("wasm-pack").is_some() {
        judge("in WebAssembly", &expected, &in_wasm(&program)?)?;
    } else {
        println!("not run in WebAssembly: node or wasm-pack is missing");
    }
    on_bochs(&expected, &program)?;
    Ok(Outcome::Passed)
}

/// What was done, by its id and words, and what was observed, in order.
type Lines = Vec<(String, String)>;

fn parse(text: &str) -> Result<Lines> {
    let lines = text.lines().filter(|line| *line != "end");
    lines
        .map(|line| {
            let (done, seen) = line
                .rsplit_once(": ")
                .with_context(|| format!("the guest printed {line:?}"))?;
            Ok((done.to_owned(), seen.to_owned()))
        })
        .collect()
}

fn id(done: &str) -> &str {
    done.split(' ').next().unwrap_or_default()
}

/// Holds what is expected to the tables: each row and each exit reason is there, and fails as its row says.
fn tables(expected: &Lines) -> Result<()> {
    let mut wrong = Vec::new();
    for row in CHECK_ROWS.iter().filter(|row| row.reach == "max") {
        let lines: Vec<_> = expected
            .iter()
            .filter(|line| id(&line.0) == row.id)
            .collect();
        let left = ROWS_LEFT.iter().any(|(id, _)| *id == row.id);
        if left == lines.iter().any(|line| line.1 != "enters") {
            wrong.push(format!(
                "{}: in the guest and in the list of rows left, or in neither",
                row.id
            ));
        }
        for (done, seen) in lines {
            if seen != "enters" && !fails_as(row.failure, seen) {
                wrong.push(format!(
                    "{done}: {seen:?} is expected; the table says {:?}",
                    row.failure
                ));
            }
        }
    }
    for info in ExitReason::all() {
        let number = info.reason.0;
        let left = EXITS_LEFT
            .iter()
            .any(|(numbers, _)| numbers.contains(&number));
        let wanted = format!("exit {number} ");
        let seen = |line: &&(String, String)| {
            id(&line.0) == number.to_string() && line.1.starts_with(&wanted)
        };
        if left == expected.iter().any(|line| seen(&line)) {
            wrong.push(format!(
                "exit reason {number}: in the guest and in the list of exits left, or in neither"
            ));
        }
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    Ok(())
}

/// Whether an observation is what a row of the table calls its failure.
fn fails_as(failure: &str, seen: &str) -> bool {
    match failure {
        "VM exit 20 or 24" => ["exit 20 ", "exit 24 "]
            .iter()
            .any(|exit| seen.starts_with(exit)),
        "exit 34 qualification = 1-based entry index" => seen.starts_with("exit 34 qualification "),
        _ => failure.replace("VMfailValid", "VMfail") == seen,
    }
}

/// Makes the guest.
pub fn compile() -> Result<PathBuf> {
    let dir = cache().join("conformance");
    fs::create_dir_all(&dir)?;
    let mut fields = String::from("/* Made from crate/vmcs/data/fields.csv. */\n");
    for field in (0..).map_while(Field::from_index) {
        let name = field.short_name().to_uppercase();
        writeln!(fields, "#define {name} {:#x}", field.encoding())?;
    }
    fs::write(dir.join("fields.h"), fields)?;
    let program = dir.join("conformance.elf");
    let mut sources: Vec<PathBuf> = fs::read_dir(root().join(SOURCES))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "c" || e == "S"))
        .collect();
    sources.sort();
    let mut gcc = line(
        "gcc -O1 -Wall -Wextra -Wno-missing-field-initializers -Wno-override-init -std=gnu11 -m64 -ffreestanding \
         -nostdlib -static -no-pie -fno-pic -mno-red-zone -mgeneral-regs-only -fno-asynchronous-unwind-tables \
         -fcf-protection=none -fno-stack-protector \
         -Wl,--build-id=none,--no-warn-rwx-segments,-N,--section-start=.head=0x100000,-Ttext=0x101000",
    );
    gcc.arg("-I")
        .arg(&dir)
        .args(sources)
        .arg("-o")
        .arg(&program);
    run(&mut gcc).context("package gcc is needed")?;
    // What multiboot 1 loads is a 32-bit ELF file.
    run(line("objcopy -O elf32-i386").arg(&program))?;
    Ok(program)
}

fn natively(program: &Path) -> Result<Lines> {
    let cli = build::cli()?;
    let exits = cache().join("conformance/exits.jsonl");
    let mut command = line(&cli.to_string_lossy());
    command
        .arg("run")
        .arg(program)
        .args(["--vmx", "max", "--memory", "128M", "--timeout", "60"])
        .arg("--exits")
        .arg(&exits);
    let result = capture(LIMIT, &mut command)?;
    let seen =
        finished(&result.stdout).with_context(|| format!("natively: {}", result.stderr.trim()))?;
    own_rows(&seen, &fs::read_to_string(exits)?)?;
    Ok(seen)
}

/// Holds a VMX abort to its row: the guest gets no further, and the post-mortem names the indicator.
fn aborts(program: &Path, id: &str, indicator: u32) -> Result<()> {
    let row = CHECK_ROWS.iter().find(|row| row.id == id);
    if row.map(|row| row.failure) != Some(&format!("VMX abort {indicator}")) {
        bail!("{id} is no row with VMX abort {indicator}");
    }
    let cli = build::cli()?;
    let mut command = line(&cli.to_string_lossy());
    command
        .arg("run")
        .arg(program)
        .args(["--vmx", "max", "--memory", "128M", "--timeout", "60"])
        .args(["--append", &format!("abort={id}")]);
    let result = capture(LIMIT, &mut command)?;
    let last = result.stdout.lines().last().unwrap_or_default();
    let named = result
        .stderr
        .contains(&format!("VMX abort {indicator} on processor"));
    if !last.starts_with(id) || !last.ends_with(": ") || !named {
        bail!(
            "{id} did not end in VMX abort {indicator}: {last:?}, {}",
            result.stderr
        );
    }
    println!("{id}: VMX abort {indicator}");
    Ok(())
}

/// Holds each entry that failed a check to its line: the row that the machine names is the line's own.
fn own_rows(seen: &Lines, exits: &str) -> Result<()> {
    let mut named = Vec::new();
    for line in exits.lines() {
        let event: serde_json::Value = serde_json::from_str(line)?;
        if let Some(row) = event["check"].as_str() {
            named.push(row.to_owned());
        }
    }
    let failed = |(done, seen): &&(String, String)| {
        let row = CHECK_ROWS.iter().find(|row| row.id == id(done));
        let checked =
            row.is_some_and(|row| row.stage > Stage::Precheck && row.stage < Stage::MsrLoad);
        checked && (seen.starts_with("VMfail") || seen.starts_with("exit 33 "))
    };
    let lines: Vec<_> = seen.iter().filter(failed).collect();
    let wrong: Vec<_> = lines
        .iter()
        .zip(&named)
        .filter(|((done, _), row)| {
            id(done) != *row && !ROWS_BEHIND.contains(&(id(done), row.as_str()))
        })
        .map(|((done, _), row)| format!("{done}: fails by {row}"))
        .collect();
    if lines.len() != named.len() || !wrong.is_empty() {
        bail!(
            "{} lines and {} entries fail a check; {}",
            lines.len(),
            named.len(),
            wrong.join("; ")
        );
    }
    println!("{} entries fail by the row of their line", lines.len());
    Ok(())
}

fn in_wasm(program: &Path) -> Result<Lines> {
    build::wasm()?;
    let mut command = line("node tests/integration/run-to-end.mjs");
    command.arg(program).args(["", &MEMORY.to_string(), "max"]);
    let result = capture(LIMIT, &mut command)?;
    finished(&result.stdout).with_context(|| format!("in WebAssembly: {}", result.stderr.trim()))
}

fn finished(text: &str) -> Result<Lines> {
    if !text.ends_with("end\n") {
        bail!(
            "the guest did not come to its end; its last line is {:?}",
            text.lines().last()
        );
    }
    parse(text)
}

/// Holds what was observed to what is expected.
fn judge(place: &str, expected: &Lines, seen: &Lines) -> Result<()> {
    let mut wrong = differences(expected, seen, |_, seen| {
        let control = seen.strip_prefix("absent ").unwrap_or(seen);
        NOT_OFFERED.contains(&control)
    })?;
    let mut absent = BTreeMap::new();
    for control in seen
        .iter()
        .filter_map(|line| line.1.strip_prefix("absent "))
    {
        *absent.entry(control).or_insert(0) += 1;
    }
    let offered = NOT_OFFERED
        .iter()
        .filter(|control| !absent.contains_key(*control));
    for control in offered {
        wrong.push(format!(
            "{control} is offered: take it out of the list of what may be absent"
        ));
    }
    let count: usize = absent.values().sum();
    println!(
        "{place}: {} lines, {count} of them for what is not offered",
        seen.len()
    );
    if !wrong.is_empty() {
        bail!("{place}:\n{}", wrong.join("\n"));
    }
    Ok(())
}

/// Lines that differ, but for those that `allowed` lets pass.
fn differences(
    expected: &Lines,
    seen: &Lines,
    allowed: impl Fn(&str, &str) -> bool,
) -> Result<Vec<String>> {
    if !expected
        .iter()
        .map(|line| &line.0)
        .eq(seen.iter().map(|line| &line.0))
    {
        bail!("the guest's lines are not those of {SOURCES}/expected.txt");
    }
    let pairs = expected.iter().zip(seen);
    Ok(pairs
        .filter(|(expected, seen)| expected.1 != seen.1 && !allowed(&seen.0, &seen.1))
        .map(|(expected, seen)| format!("{}: {}, not {}", seen.0, seen.1, expected.1))
        .collect())
}

fn on_bochs(expected: &Lines, program: &Path) -> Result<()> {
    let model = "corei7_haswell_4770";
    let text = match bochs::serial(program, BOCHS_SKIPS, model, "\nend", LIMIT)? {
        Judged::Serial(text) => text,
        Judged::Missing(what) => {
            println!("not compared with Bochs: there is no {what}");
            return Ok(());
        }
    };
    let seen = parse(&text)?;
    let wrong = differences(expected, &seen, |done, seen| {
        seen == "skipped"
            || seen.starts_with("absent ")
            || BOCHS_FAULTS
                .iter()
                .any(|(line, fault, _)| done.starts_with(line) && seen == *fault)
    })?;
    let same = expected
        .iter()
        .zip(&seen)
        .filter(|(a, b)| a.1 == b.1)
        .count();
    println!(
        "on Bochs: {same} of {} lines equal, the others absent or named faults",
        seen.len()
    );
    if !wrong.is_empty() {
        bail!("Bochs differs:\n{}", wrong.join("\n"));
    }
    Ok(())
}
