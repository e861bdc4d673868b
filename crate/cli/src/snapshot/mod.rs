//! Snapshots: written during runs, gone on from, looked at and compared.

mod diff;
mod info;
mod origin;
mod saves;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use hypernest_migrate::Snapshot;

pub use origin::Origin;
pub use saves::{Saves, Written};

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Print what a snapshot holds
    Info {
        /// The snapshot
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Compare two snapshots: each part of the state by name, and memory by pages
    Diff {
        /// One
        a: PathBuf,
        /// The other
        b: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Print at most this many changes of the state, and as many ranges of memory; 0 is all
        #[arg(long, value_name = "N", default_value_t = 100)]
        most: usize,
    },
}

/// The exit status.
///
/// # Errors
/// A file is none.
pub fn run(command: &SnapshotCommand) -> Result<i32> {
    match command {
        SnapshotCommand::Info { file, json } => info::run(file, *json),
        SnapshotCommand::Diff { a, b, json, most } => diff::run([a, b], *json, *most),
    }
}

/// Opens a file that is to be a snapshot.
fn open(path: &Path) -> Result<File> {
    let shown = path.display();
    let mut file = File::open(path).with_context(|| format!("cannot read the snapshot {shown}"))?;
    let data = file
        .metadata()
        .with_context(|| format!("cannot read the snapshot {shown}"))?;
    if data.is_dir() {
        bail!("cannot read the snapshot {shown}: it is a directory; give a file");
    }
    crate::migrate::pass_over(&mut file)
        .with_context(|| format!("cannot read the snapshot {shown}"))?;
    Ok(file)
}

/// Reads everything up to the memory.
fn begin<R: Read>(path: &Path, from: R) -> Result<Snapshot<BufReader<R>>> {
    let reader = BufReader::with_capacity(1 << 20, from);
    Snapshot::open(reader).with_context(|| format!("cannot read the snapshot {}", path.display()))
}
