//! Live migration over loopback: rounds, pages, bytes, time and downtime, as the source tells them.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use super::LIMIT;
use super::measure::median;
use crate::guests::{self, Kernel};
use crate::integration::LinuxRun;
use crate::nested::{INSIDE_START, nested_linux, nested_words};
use crate::run::{Group, capture, command};

/// What a move took.
struct Moved {
    rounds: f64,
    pages: f64,
    megabytes: f64,
    seconds: f64,
    downtime: f64,
}

/// Moves each guest `repeats` times.
pub fn measure(cli: &Path, kernel: &Kernel, repeats: usize) -> Result<()> {
    println!("\n== Live migration over loopback, machines of 512 MiB, median of {repeats}");
    println!("                                    rounds   pages      MB   seconds   downtime");
    let words = nested_words(&[]);
    let prompt = LinuxRun {
        memory: "512M",
        initramfs: guests::dir().join("prompt.cpio"),
        options: vec!["--vmx".into(), "max".into()],
        ..LinuxRun::new(kernel, "")
    };
    for (about, run, moment) in [
        ("idle: a shell waits", prompt, "/ # "),
        (
            "busy: L2 boots on L1's KVM",
            nested_linux(kernel, &words),
            INSIDE_START,
        ),
    ] {
        let moves = (0..repeats).map(|_| once(cli, &run, moment));
        let moves = moves.collect::<Result<Vec<_>>>()?;
        let of = |what: fn(&Moved) -> f64| median(moves.iter().map(what));
        println!(
            "{about:34} {:7.0} {:7.0} {:7.1} {:9.2} {:7.1} ms",
            of(|moved| moved.rounds),
            of(|moved| moved.pages),
            of(|moved| moved.megabytes),
            of(|moved| moved.seconds),
            of(|moved| moved.downtime),
        );
    }
    Ok(())
}

fn once(cli: &Path, run: &LinuxRun<'_>, moment: &str) -> Result<Moved> {
    let mut receive = command(&cli.to_string_lossy());
    receive
        .args([
            "receive",
            "127.0.0.1:0",
            "--serial",
            "none",
            "--timeout",
            "60",
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let mut receiver = Group::spawn(&mut receive)?;
    let errors = receiver
        .0
        .stderr
        .take()
        .context("the receiver has no stderr")?;
    let mut line = String::new();
    BufReader::new(errors).read_line(&mut line)?;
    let address = line
        .trim()
        .rsplit(' ')
        .next()
        .context("the receiver tells no address")?;
    let mut source = run.command(cli);
    source
        .args(["--migrate-on", moment, "--to", address])
        .stdin(Stdio::null());
    let told = capture(LIMIT, &mut source)?.stderr;
    parse(&told).with_context(|| format!("it was not moved: {told}"))
}

/// The numbers in what the source tells: `.. at tick T: R rounds, P pages, B MB in S s, downtime D ms`.
fn parse(told: &str) -> Result<Moved> {
    let line = told
        .lines()
        .find(|line| line.contains("handed over"))
        .context("it tells nothing")?;
    let (_, numbers) = line.rsplit_once(": ").context("it has no numbers")?;
    let numbers: Vec<f64> = numbers
        .split([' ', ','])
        .filter_map(|word| word.parse().ok())
        .collect();
    let [rounds, pages, megabytes, seconds, downtime] = numbers[..] else {
        bail!("it has other numbers: {line}");
    };
    Ok(Moved {
        rounds,
        pages,
        megabytes,
        seconds,
        downtime,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sources_line_is_read() {
        let told = "x\nhypernest: the machine was handed over to 127.0.0.1:1 at tick 99: 5 rounds, 38223 pages, \
                    53.1 MB in 1.109 s, downtime 19.8 ms\n";
        let moved = parse(told).unwrap();
        assert_eq!((moved.rounds, moved.pages), (5.0, 38223.0));
        assert_eq!(
            (moved.megabytes, moved.seconds, moved.downtime),
            (53.1, 1.109, 19.8)
        );
        assert!(parse("hypernest: was not moved: no").is_err());
    }
}
