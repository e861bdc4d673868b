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

/// When something was printed: time on the wall and time of processors since the start.
#[derive(Clone, Copy)]
pub struct Mark {
    pub wall: f64,
    pub cpu: f64,
}

/// Runs a command until it prints `text`, then ends it; with no `text`, until its end.
pub fn run_until(command: &mut Command, text: &str, limit: Duration) -> Result<Run> {
    let texts = if text.is_empty() { &[][..] } else { &[text] };
    watch(command, texts, limit).map(|(run, _)| run)
}

/// Runs a command until it has printed all of `texts`, in their order; when it printed each. It is ended
/// then, or after its own end where nothing is waited for.
pub fn watch(command: &mut Command, texts: &[&str], limit: Duration) -> Result<(Run, Vec<Mark>)> {
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
    let mut marks = Vec::new();
    let mut last = Usage::default();
    loop {
        let received = receiver.recv_timeout(Duration::from_millis(5));
        // A process that is gone, or about to, has no usage to read any more: keep the last.
        last = Usage::of(group.0.id()).unwrap_or(last);
        let ended = match received {
            Ok(bytes) => {
                seen.extend(bytes);
                false
            }
            Err(error) => error == mpsc::RecvTimeoutError::Disconnected,
        };
        while let Some((text, at)) = texts
            .get(marks.len())
            .and_then(|text| Some((text, find(&seen, text.as_bytes())?)))
        {
            seen.drain(..at + text.len());
            marks.push(Mark {
                wall: start.elapsed().as_secs_f64(),
                cpu: last.cpu.as_secs_f64(),
            });
        }
        match texts.get(marks.len()) {
            None if ended || !texts.is_empty() => break,
            Some(text) if ended => bail!("{} ended without printing `{text}`", shown(command)),
            _ => {}
        }
        if start.elapsed() > limit {
            bail!("{} took longer than {} s", shown(command), limit.as_secs());
        }
    }
    // What it writes at its end (a report) must be whole.
    let wall = start.elapsed();
    if !texts.is_empty() {
        let _ = group.wait(Duration::from_secs(2))?;
    }
    Ok((Run::new(wall, last), marks))
}

/// Where `part` begins in `text`.
fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

pub fn contains(text: &[u8], part: &[u8]) -> bool {
    find(text, part).is_some()
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
        let (_, marks) = watch(
            Command::new("sh").args(["-c", "echo a; sleep 0.2; echo b; sleep 5"]),
            &["a", "b"],
            Duration::from_secs(20),
        )
        .unwrap();
        assert!(marks.len() == 2 && marks[1].wall - marks[0].wall > 0.1);
        let run = run_until(
            Command::new("sh").args(["-c", "echo other"]),
            "marker",
            Duration::from_secs(20),
        );
        assert!(run.is_err());
    }
}
