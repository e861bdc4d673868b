//! Records in files: the machine of a migration, and who may go on with it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use hypernest_machine::Machine;
use hypernest_migrate::live::record::{HEADER, Owns, Record, RecordError};
use hypernest_migrate::snapshot::{self, About, Options};

use crate::files::Whole;

/// Writes a record of `machine`, whole or not at all, and lasting.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, record: &Record, machine: &mut Machine, about: &About) -> Result<()> {
    let shown = path.display();
    let what = || format!("cannot write the record {shown}");
    let mut whole = Whole::create(path).with_context(what)?;
    whole.write_all(&record.to_bytes()).with_context(what)?;
    let options = Options {
        about: about.clone(),
        ..Options::default()
    };
    snapshot::write(machine, &mut whole, &options).with_context(what)?;
    whole.finish_lasting().with_context(what)?;
    Ok(())
}

/// Changes who owns the machine of a record, in place.
///
/// # Errors
/// The file cannot be written.
pub fn mark(path: &Path, record: &Record) -> Result<()> {
    let what = || format!("cannot write the record {}", path.display());
    let mut file = OpenOptions::new()
        .write(true)
        .open(path)
        .with_context(what)?;
    file.write_all(&record.to_bytes()).with_context(what)?;
    if record.owns == Owns::No {
        // The machine in it is nobody's any more.
        file.set_len(HEADER as u64).with_context(what)?;
    }
    file.sync_all().with_context(what)
}

/// Reads the header of a record.
///
/// # Errors
/// The file is none.
pub fn read(path: &Path) -> Result<Record> {
    let what = || format!("cannot read the record {}", path.display());
    let mut header = Vec::with_capacity(HEADER);
    let file = File::open(path).with_context(what)?;
    file.take(HEADER as u64)
        .read_to_end(&mut header)
        .with_context(what)?;
    Record::read(&header).with_context(what)
}

/// Passes over the header of a record, where a file that is to be a snapshot is one: to look at it.
///
/// # Errors
/// It cannot be read.
pub fn pass_over(file: &mut File) -> std::io::Result<()> {
    let mut begin = [0; 8];
    let read = file.read(&mut begin)?;
    let skip = if Record::is_one(&begin[..read]) {
        HEADER as u64
    } else {
        0
    };
    file.seek(SeekFrom::Start(skip)).map(drop)
}

/// Where the snapshot begins in a file that may be a record; it is there then.
///
/// # Errors
/// Its machine is not, or not surely, its side's.
pub fn of_record(file: &mut File, path: &Path) -> Result<u64> {
    let shown = path.display();
    let mut header = Vec::with_capacity(HEADER);
    file.rewind()?;
    Read::by_ref(file)
        .take(HEADER as u64)
        .read_to_end(&mut header)?;
    let skip = match Record::read(&header) {
        Err(RecordError::Magic) => 0,
        Err(error) => return Err(anyhow!(error).context(format!("cannot read {shown}"))),
        Ok(record) => {
            let id = record.identity.id;
            match record.owns {
                Owns::Yes => HEADER as u64,
                Owns::Undecided => bail!(
                    "{shown} is the {}'s machine of migration {id:016x}, which is undecided: settle it with \
                     hypernest migrate decide",
                    record.side.name()
                ),
                Owns::No => bail!(
                    "{shown} gave up its machine: migration {id:016x} was settled for the other side"
                ),
            }
        }
    };
    Ok(file.seek(SeekFrom::Start(skip))?)
}
