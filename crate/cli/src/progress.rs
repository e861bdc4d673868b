//! Progress of long work, shown when stderr is a terminal that nothing else writes to.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use hypernest_machine::Tick;
use indicatif::{ProgressBar, ProgressStyle};

/// A line on stderr, or nothing.
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// Nothing is shown.
    pub fn hidden() -> Progress {
        Progress(None)
    }

    /// A turning sign with a text, for work of unknown length.
    pub fn spinner(text: &'static str) -> Progress {
        if !stderr().is_terminal() {
            return Progress::hidden();
        }
        let bar = ProgressBar::new_spinner().with_message(text);
        bar.enable_steady_tick(Duration::from_millis(100));
        Progress(Some(bar))
    }

    /// The run of a machine, to tick `end` if that is known.
    pub fn run(end: Option<Tick>) -> Progress {
        if !stderr().is_terminal() {
            return Progress::hidden();
        }
        let (bar, template) = match end {
            Some(end) => (
                ProgressBar::new(end),
                "{wide_bar:.cyan} {percent}% {msg} {elapsed}",
            ),
            None => (ProgressBar::new_spinner(), "{spinner} {msg} {elapsed}"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Progress(Some(bar))
    }

    /// Where the run is.
    pub fn set(&self, now: Tick, instructions: u64, rate: f64) {
        if let Some(bar) = &self.0 {
            bar.set_position(now);
            let millions = instructions / 1_000_000;
            bar.set_message(format!("{millions} M instructions, {:.0} M/s", rate / 1e6));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
