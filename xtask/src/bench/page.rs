//! The rate of the page's machine, in Chromium.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::build;
use crate::run::{capture, find, line};

/// Boots the page's guest in Chromium and prints its rate, against the native one where that was measured.
pub fn measure(native_mips: Option<f64>) -> Result<()> {
    println!("\n== The page's machine, in Chromium");
    if find("chromium").is_none() || !build::page_dir().join("index.html").exists() {
        println!(
            "not measured: it needs chromium, and the page that `cargo xtask demo --check` builds"
        );
        return Ok(());
    }
    let mut node = line("node tests/browser/bench.mjs");
    let result = capture(Duration::from_secs(600), &mut node)?;
    let report = result.stdout.lines().last().unwrap_or_default();
    let report: Value = serde_json::from_str(report).with_context(|| {
        format!(
            "tests/browser/bench.mjs: {}{}",
            result.stdout, result.stderr
        )
    })?;
    let (rate, seconds) = (report["mips"].as_f64(), report["seconds"].as_f64());
    let (rate, seconds) = rate
        .zip(seconds)
        .with_context(|| format!("no mips and seconds in {report}"))?;
    println!(
        "{}: prompt after {seconds:.2} s, {rate:.0} MIPS over all of it",
        report["browser"]
    );
    if let Some(native) = native_mips {
        println!("that is {:.2} of the native rate", rate / native);
    }
    Ok(())
}
