//! `cargo xtask soak`: the long forms of the tests.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::run::{cache, line, run_within};
use crate::test::Outcome;
use crate::{integration, kut, nested, snapshots};

/// One long run.
struct Part {
    name: &'static str,
    run: fn() -> Result<Outcome>,
}

const PARTS: &[Part] = &[
    Part {
        name: "oracle",
        run: oracle,
    },
    Part {
        name: "wild",
        run: wild,
    },
    Part {
        name: "boots",
        run: integration::boots,
    },
    Part {
        name: "nested",
        run: nested::all,
    },
    Part {
        name: "determinism",
        run: integration::determinism,
    },
    Part {
        name: "snapshots",
        run: snapshots::every_second,
    },
    Part {
        name: "kut",
        run: unit_tests,
    },
    Part {
        name: "moves",
        run: moves,
    },
    Part {
        name: "fuzz",
        run: || integration::fuzz(Duration::from_secs(15 * 60)),
    },
];

/// Cases of the comparison with the host's processor.
const ORACLE_CASES: u64 = 20_000_000;

pub fn main(args: &[&str]) -> Result<bool> {
    if let Some(unknown) = args
        .iter()
        .find(|arg| PARTS.iter().all(|part| part.name != **arg))
    {
        let names: Vec<_> = PARTS.iter().map(|part| part.name).collect();
        bail!("there is no part {unknown}; there are {}", names.join(", "));
    }
    let mut text = String::new();
    let mut good = true;
    for part in PARTS
        .iter()
        .filter(|part| args.is_empty() || args.contains(&part.name))
    {
        println!("\n==== {}", part.name);
        let start = Instant::now();
        let result = (part.run)();
        let seconds = start.elapsed().as_secs();
        let (word, why) = match &result {
            Ok(Outcome::Passed) => ("passed", String::new()),
            Ok(Outcome::Skipped(why)) => ("skipped", why.clone()),
            Err(error) => ("FAILED", format!("{error:#}")),
        };
        good &= result.is_ok();
        writeln!(text, "{:12} {word:8} {seconds:>6} s  {why}", part.name)?;
        // After each part: what was reached stays known when a later part is cut off.
        fs::create_dir_all(cache())?;
        fs::write(cache().join("soak.txt"), &text)?;
    }
    print!("\n{text}");
    Ok(good)
}

fn oracle() -> Result<Outcome> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let words = format!(
        "cargo run --release -p hypernest-oracle --example soak -- {ORACLE_CASES} --threads {threads}"
    );
    run_within(Duration::from_secs(12 * 3600), &mut line(&words))?;
    Ok(Outcome::Passed)
}

/// Wild guests, and wild hypervisors.
const WILD_GUESTS: u64 = 300_000;

fn wild() -> Result<Outcome> {
    for kind in ["", "nest"] {
        let words = format!(
            "cargo run --release -p hypernest-oracle --example wild -- {kind} {WILD_GUESTS}"
        );
        run_within(Duration::from_secs(3 * 3600), &mut line(&words))?;
    }
    Ok(Outcome::Passed)
}

/// Cuts of a migration's link at random bytes, and kills of either side.
fn moves() -> Result<Outcome> {
    for (variable, count, words) in [
        (
            "HYPERNEST_CUTS",
            "1000",
            "-p hypernest-migrate --test live cuts_at_random",
        ),
        (
            "HYPERNEST_KILLS",
            "100",
            "-p hypernest-cli --test migrate is_killed_at_any_time",
        ),
    ] {
        let mut test = line(&format!("cargo test --release {words}"));
        run_within(Duration::from_secs(3600), test.env(variable, count))?;
    }
    Ok(Outcome::Passed)
}

fn unit_tests() -> Result<Outcome> {
    let Some(dir) = std::env::var_os("KVM_UNIT_TESTS") else {
        return Ok(Outcome::Skipped(
            "KVM_UNIT_TESTS names no built kvm-unit-tests tree".into(),
        ));
    };
    if !kut::main(&[&dir.to_string_lossy()])? {
        bail!("not all tests passed");
    }
    Ok(Outcome::Passed)
}
