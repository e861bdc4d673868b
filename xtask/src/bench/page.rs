//! The rate of the page's machine, in Chromium.

use std::time::Duration;

use anyhow::Result;

use crate::build;
use crate::run::{capture, find, line, root};

/// Boots the page's guest in Chromium and prints its rate, against the native one where that was measured.
pub fn measure(native_mips: Option<f64>) -> Result<()> {
    println!("\n== The page's machine, in Chromium");
    if find("chromium").is_none() || !build::page_dir().join("index.html").exists() {
        println!(
            "not measured: it needs chromium, and the page that `cargo xtask demo --check` builds"
        );
        return Ok(());
    }
    if !root().join("tests/browser/rate.mjs").exists() {
        println!("not measured: there is no tests/browser/rate.mjs");
        return Ok(());
    }
    let mut node = line("node tests/browser/rate.mjs --dist web/dist --guests .cache/guests");
    let result = capture(Duration::from_secs(300), &mut node)?;
    print!("{}{}", result.stdout, result.stderr);
    let rate = result
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("mips ")?.trim().parse::<f64>().ok());
    if let (Some(rate), Some(native)) = (rate, native_mips) {
        println!(
            "Chromium: {rate:.0} MIPS, {:.2} of the native rate",
            rate / native
        );
    }
    Ok(())
}
