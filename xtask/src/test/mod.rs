//! `cargo xtask test`: every suite, each with its time, and a table at the end.

mod suites;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::run;
use suites::SUITES;

/// How a suite ended, when it did not fail.
pub enum Outcome {
    Passed,
    /// This host cannot run it; why.
    Skipped(String),
}

/// One suite.
pub struct Suite {
    pub name: &'static str,
    /// What it shows, in a few words.
    pub about: &'static str,
    pub run: fn() -> Result<Outcome>,
}

struct Row {
    name: &'static str,
    result: Result<Outcome>,
    time: Duration,
}

impl Row {
    fn word(&self) -> &'static str {
        match self.result {
            Ok(Outcome::Passed) => "passed",
            Ok(Outcome::Skipped(_)) => "skipped",
            Err(_) => "FAILED",
        }
    }

    fn why(&self) -> String {
        match &self.result {
            Ok(Outcome::Passed) => String::new(),
            Ok(Outcome::Skipped(why)) => why.clone(),
            Err(error) => format!("{error:#}"),
        }
    }
}

pub fn main(args: &[&str]) -> Result<bool> {
    if args.contains(&"--list") {
        for suite in SUITES {
            println!("{:12} {}", suite.name, suite.about);
        }
        return Ok(true);
    }
    if let Some(unknown) = args
        .iter()
        .find(|arg| SUITES.iter().all(|suite| suite.name != **arg))
    {
        bail!("there is no suite {unknown}; `cargo xtask test --list` names them");
    }
    let chosen = SUITES
        .iter()
        .filter(|suite| args.is_empty() || args.contains(&suite.name));
    let rows: Vec<Row> = chosen.map(run_suite).collect();

    for failure in run::failures() {
        println!("\n{failure}");
    }
    println!("\n{:12} {:8} {:>8}", "suite", "result", "time");
    for row in &rows {
        println!(
            "{:12} {:8} {:>7.1}s  {}",
            row.name,
            row.word(),
            row.time.as_secs_f64(),
            row.why()
        );
    }
    let total: Duration = rows.iter().map(|row| row.time).sum();
    println!("{:12} {:8} {:>7.1}s", "all", "", total.as_secs_f64());
    let count = |word: &str| rows.iter().filter(|row| row.word() == word).count();
    let (passed, failed, skipped) = (count("passed"), count("FAILED"), count("skipped"));
    println!("\n{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0 && passed > 0)
}

fn run_suite(suite: &'static Suite) -> Row {
    println!("\n==== {}: {}", suite.name, suite.about);
    let start = Instant::now();
    let result = (suite.run)();
    let row = Row {
        name: suite.name,
        result,
        time: start.elapsed(),
    };
    let why = row.why();
    let colon = if why.is_empty() { "" } else { ": " };
    println!(
        "==== {} {} in {:.1} s{colon}{why}",
        row.name,
        row.word(),
        row.time.as_secs_f64()
    );
    row
}
