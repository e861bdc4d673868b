//! Snapshots of a page's machine: the files that the command writes and reads too.

use std::io::{BufReader, Read, Write};

use hypernest_migrate::Snapshot;
use hypernest_migrate::snapshot::{self, About, Options};

use crate::guest::{Guest, MAX_MEMORY};

/// Bytes read or written together.
const PIECE: usize = 1 << 20;

/// Writes a snapshot of the guest's machine, which goes on as one does that is made from it.
///
/// # Errors
/// `to` fails.
pub fn write(guest: &mut Guest, to: impl Write) -> Result<(), String> {
    let boot = guest.boot.clone();
    let options = Options {
        about: About {
            boot,
            ..About::default()
        },
        ..Options::default()
    };
    snapshot::write(&mut guest.machine, to, &options)
        .map(drop)
        .map_err(|error| format!("cannot write the snapshot: {error}"))
}

/// Makes the machine of a snapshot.
///
/// # Errors
/// It is none, or its machine cannot be here; one line for the user.
pub fn read(from: impl Read) -> Result<Guest, String> {
    let wrong = |error: &dyn std::fmt::Display| format!("cannot read the snapshot: {error}");
    let from = BufReader::with_capacity(PIECE, from);
    let opened = Snapshot::open(from).map_err(|error| wrong(&error))?;
    let memory = opened.state().config.memory;
    if memory > MAX_MEMORY {
        return Err(format!(
            "cannot take the snapshot: its machine has {:.1} GiB of memory, and a guest in a browser can have at most 3 GiB",
            memory as f64 / f64::from(1 << 30)
        ));
    }
    if !opened.disks().is_empty() {
        return Err("cannot take the snapshot: its machine has disks, and there are none here; use hypernest resume".into());
    }
    let boot = opened.about().boot.clone();
    let machine = opened
        .build(MAX_MEMORY, Vec::new(), |builder| builder)
        .map_err(|error| wrong(&error))?;
    Ok(Guest::of(machine, boot))
}
