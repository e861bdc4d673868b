//! `--snapshot-on`: snapshots of a run that goes on.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hypernest_machine::{Machine, Tick};
use hypernest_migrate::pages::PageCounts;
use hypernest_migrate::snapshot::{self, About, Options};

use crate::args::{Moment, SessionArgs};
use crate::files::{self, Whole};

/// What is asked for and has not come yet.
#[derive(Default)]
pub struct Saves {
    pending: Vec<(Moment, PathBuf)>,
    about: About,
    failed: bool,
    ticks: Vec<Tick>,
    written: Vec<Written>,
}

/// A snapshot that was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its file.
    pub path: PathBuf,
    /// Machine time in it.
    pub tick: Tick,
    /// Bytes of the file.
    pub bytes: u64,
    /// What it took.
    pub time: Duration,
    /// Pages of memory in it.
    pub pages: PageCounts,
}

impl Saves {
    /// Snapshots as `args` ask for them, which say `about` of themselves.
    ///
    /// # Errors
    /// One of the files cannot be written, or there are more or fewer than moments.
    pub fn open(args: &SessionArgs, about: About) -> Result<Saves> {
        let (moments, paths) = (&args.snapshot_on, &args.output);
        if moments.len() != paths.len() {
            let (moments, paths) = (moments.len(), paths.len());
            bail!(
                "--snapshot-on is given {moments} times and -o {paths} times; give a file for each"
            );
        }
        for path in paths {
            files::check_writable("snapshot", path)?;
        }
        Ok(Saves {
            pending: moments.iter().cloned().zip(paths.iter().cloned()).collect(),
            about,
            ..Saves::default()
        })
    }

    /// The next tick that is asked for.
    pub fn next_tick(&self) -> Tick {
        let ticks = self.pending.iter().filter_map(|(moment, _)| match moment {
            Moment::Tick(tick) => Some(*tick),
            Moment::Text(_) => None,
        });
        ticks.min().unwrap_or(Tick::MAX)
    }

    /// The texts that are asked for.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.pending.iter().filter_map(|(moment, _)| match moment {
            Moment::Text(text) => Some(text.as_str()),
            Moment::Tick(_) => None,
        })
    }

    /// Writes what is due now, when serial output has ended in `seen`. A snapshot that cannot be written is told of,
    /// and the run goes on.
    pub fn take(&mut self, machine: &mut Machine, seen: Option<&str>) {
        let now = machine.now();
        let due = |moment: &Moment| match moment {
            Moment::Tick(tick) => *tick <= now,
            Moment::Text(text) => seen.is_some_and(|seen| seen.ends_with(text)),
        };
        let all = std::mem::take(&mut self.pending);
        let (due, pending): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| due(&one.0));
        self.pending = pending;
        for (_, path) in due {
            // Even one that fails is an event of the run.
            self.ticks.push(now);
            match self.write(machine, &path) {
                Ok(written) => self.written.push(written),
                Err(error) => {
                    self.failed = true;
                    eprintln!("hypernest: {error:#}; the run goes on");
                }
            }
        }
    }

    fn write(&self, machine: &mut Machine, path: &Path) -> Result<Written> {
        let begun = Instant::now();
        let what = || format!("cannot write the snapshot {}", path.display());
        let mut file = Whole::create(path).with_context(what)?;
        let options = Options {
            about: self.about.clone(),
            ..Options::default()
        };
        let pages = snapshot::write(machine, &mut file, &options).with_context(what)?;
        let bytes = file.finish().with_context(what)?;
        Ok(Written {
            path: path.to_owned(),
            tick: machine.now(),
            bytes,
            time: begun.elapsed(),
            pages,
        })
    }

    /// Says which snapshots there are not. False when there is one.
    pub fn finish(&self) -> bool {
        for (moment, path) in &self.pending {
            eprintln!(
                "hypernest: the snapshot {} was not written: {moment}",
                path.display()
            );
        }
        self.pending.is_empty() && !self.failed
    }

    /// At which ticks the machine was saved.
    pub fn ticks(&self) -> &[Tick] {
        &self.ticks
    }

    /// What was written.
    pub fn written(&self) -> &[Written] {
        &self.written
    }
}
