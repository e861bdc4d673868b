//! Runs that are recorded, and made again.

mod replay;

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hypernest_machine::{Machine, Stop, Tick};
use hypernest_migrate::record::{self, Input, RecordError, Recorder};
use hypernest_migrate::snapshot::{About, Options};

use crate::files;

pub use replay::replay;

/// `--record`: what comes to a machine goes to a file, too.
#[derive(Default)]
pub struct Recording {
    /// `None` where nothing is recorded, or the file could not be written.
    recorder: Option<Recorder<BufWriter<File>>>,
    path: PathBuf,
    failed: bool,
    saved: Vec<Tick>,
}

impl Recording {
    /// Writes the machine as it is now.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin(machine: &mut Machine, path: &Path, about: About) -> Result<Recording> {
        let file = BufWriter::with_capacity(1 << 20, files::create("recording", path)?);
        let options = Options {
            about,
            ..Options::default()
        };
        let recorder = record::begin(machine, file, &options)
            .with_context(|| format!("cannot write the recording {}", path.display()))?;
        Ok(Recording {
            recorder: Some(recorder),
            path: path.to_owned(),
            failed: false,
            saved: vec![machine.now()],
        })
    }

    /// Types at the serial port.
    pub fn typed(&mut self, machine: &mut Machine, bytes: &[u8]) {
        match &mut self.recorder {
            Some(recorder) => {
                let outcome = recorder.input(machine, Input::Serial(bytes.to_vec()));
                self.check(machine, outcome);
            }
            None => machine.serial_input(bytes),
        }
    }

    /// The machine is about to run.
    pub fn runs(&mut self, machine: &mut Machine) {
        self.with(machine, Recorder::runs);
    }

    /// The machine has run.
    pub fn ran(&mut self, machine: &mut Machine, stop: &Stop) {
        self.with(machine, |recorder, machine| recorder.ran(machine, stop));
    }

    fn with(
        &mut self,
        machine: &mut Machine,
        act: impl FnOnce(&mut Recorder<BufWriter<File>>, &mut Machine) -> Result<(), RecordError>,
    ) {
        let Some(recorder) = &mut self.recorder else {
            return;
        };
        let before = machine.flushes();
        let outcome = act(recorder, machine);
        if machine.flushes() != before {
            self.saved.push(machine.now());
        }
        self.check(machine, outcome);
    }

    /// A recording that cannot be written ends; the run goes on.
    fn check(&mut self, machine: &Machine, outcome: Result<(), RecordError>) {
        if let Err(error) = outcome {
            self.recorder = None;
            self.failed = true;
            let (path, now) = (self.path.display(), machine.now());
            eprintln!(
                "hypernest: cannot write the recording {path}: {error}; it ends before tick {now}, and the run goes on"
            );
        }
    }

    /// Ends it. False when it could not be written.
    pub fn finish(&mut self, machine: &mut Machine) -> bool {
        if let Some(recorder) = self.recorder.take() {
            let outcome = recorder.finish(machine).map(drop);
            self.check(machine, outcome);
        }
        !self.failed
    }

    /// At which ticks the machine was saved for it.
    pub fn saved(&self) -> &[Tick] {
        &self.saved
    }
}
