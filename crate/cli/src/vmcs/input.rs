//! Files that the commands are about, and layouts by name.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use hypernest_vmcs::{File, Found, Layout};

use crate::{files, setup};

/// A file with a VMCS in it.
pub struct Input {
    /// Where it is, for messages.
    shown: String,
    /// What it is.
    pub file: File,
}

/// Reads a file, `-` for standard input, of at most so many bytes; `what` says what it was to be.
pub fn bytes(what: &str, path: &Path, most: u64) -> Result<Vec<u8>> {
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin()
            .lock()
            .take(most + 1)
            .read_to_end(&mut bytes)
            .context("cannot read the standard input")?;
        bytes
    } else {
        files::read(what, path)?
    };
    if bytes.len() as u64 > most {
        bail!("{} has more than {most} bytes", path.display());
    }
    Ok(bytes)
}

/// Reads a file and finds out what it is.
pub fn open(path: &Path) -> Result<Input> {
    let bytes = bytes("VMCS file", path, MOST)?;
    let shown = path.display().to_string();
    let file = File::read(bytes).with_context(|| shown.clone())?;
    Ok(Input { shown, file })
}

/// Logs of a kernel are long; nothing else is.
const MOST: u64 = 64 << 20;

impl Input {
    /// The layout: the one asked for, or the likeliest; `None` for a log.
    pub fn layout(&self, asked: Option<&str>) -> Result<Option<Layout>> {
        if let (Some(asked), Some(_)) = (asked, self.file.region()) {
            return layout(asked).map(Some);
        }
        let likely = self.file.layout().with_context(|| self.shown.clone())?;
        Ok(likely.cloned())
    }

    /// The VMCS.
    pub fn read(&self, asked: Option<&str>) -> Result<Found> {
        let asked = asked.map(layout).transpose()?;
        let found = self.file.vmcs(asked.as_ref());
        found.with_context(|| self.shown.clone())
    }
}

/// A built-in layout by name, or a table of the user's own by path.
pub fn layout(asked: &str) -> Result<Layout> {
    if let Some(layout) = Layout::named(asked) {
        return Ok(layout.clone());
    }
    let path = Path::new(asked);
    if !path.exists() {
        let names: Vec<&str> = Layout::built_in().iter().map(|l| l.name()).collect();
        bail!(
            "no layout {asked}: there are {}; or give a file with a table",
            names.join(", ")
        );
    }
    setup::layout_of_file(path)
}
