//! Timing other processes.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::run::{Group, shown};

/// What one run cost, until it was told to stop.
pub struct Run {
    /// Time on the wall.
    pub wall: Duration,
    /// Time of processors, in all its threads.
    cpu: Duration,
    /// Most memory it ever held, in KiB.
    pub peak_kib: u64,
}

impl Run {
    pub fn new(wall: Duration, usage: Usage) -> Self {
        Self {
            wall,
            cpu: usage.cpu,
            peak_kib: usage.peak_kib,
        }
    }

    /// Time of processors: what other processes do on the host disturbs it least.
    pub fn cpu_seconds(&self) -> f64 {
        self.cpu.as_secs_f64()
    }
}

/// Runs a command until it prints `text`, then ends it; with no `text`, until its end.
pub fn run_until(command: &mut Command, text: &str, limit: Duration) -> Result<Run> {
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut group = Group::spawn(command)?;
    let mut stdout = group.0.stdout.take().context("its output is piped")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = stdout.read(&mut buffer) {
            if sender.send(buffer[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut seen = Vec::new();
    let mut last = Usage::default();
    loop {
        // A process that is gone, or about to, has no usage to read any more: keep the last.
        if let Some(usage) = Usage::of(group.0.id()) {
            last = usage;
        }
        match receiver.recv_timeout(Duration::from_millis(5)) {
            Ok(bytes) => seen.extend(bytes),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) if text.is_empty() => break,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                bail!("{} ended without printing `{text}`", shown(command))
            }
        }
        if !text.is_empty() && contains(&seen, text.as_bytes()) {
            last = Usage::of(group.0.id()).unwrap_or(last);
            break;
        }
        if start.elapsed() > limit {
            bail!("{} took longer than {} s", shown(command), limit.as_secs());
        }
    }
    // What it writes at its end (a report) must be whole.
    let wall = start.elapsed();
    if !text.is_empty() {
        let _ = group.wait(Duration::from_secs(2))?;
    }
    Ok(Run::new(wall, last))
}

pub fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[derive(Default)]
pub struct Usage {
    pub cpu: Duration,
    pub peak_kib: u64,
}

impl Usage {
    /// What Linux counts for a process; `None` once it has ended.
    pub fn of(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))?;
        // Nanoseconds on a processor, of each thread.
        let mut nanoseconds = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
            let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
            nanoseconds += text.split_whitespace().next()?.parse::<u64>().ok()?;
        }
        Some(Self {
            cpu: Duration::from_nanos(nanoseconds),
            peak_kib: peak.trim().trim_end_matches(" kB").parse().ok()?,
        })
    }
}

/// The middle value.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_an_even_count_is_the_middle_of_the_middle_two() {
        assert_eq!(median([4.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert!(median(std::iter::empty()).is_nan());
    }

    #[test]
    fn run_stops_at_the_text_and_fails_without_it() {
        let run = run_until(
            Command::new("sh").args(["-c", "echo marker; sleep 5"]),
            "marker",
            Duration::from_secs(20),
        );
        assert!(run.unwrap().wall < Duration::from_secs(4));
        let run = run_until(
            Command::new("sh").args(["-c", "echo other"]),
            "marker",
            Duration::from_secs(20),
        );
        assert!(run.is_err());
    }
}
