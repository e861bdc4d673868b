//! Reading what the user named: one clear line when it cannot be.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// No image, initrd, module or symbol file is larger.
const MOST: u64 = 4 << 30;

/// The whole content of a file; `what` says what it was to be.
pub fn read(what: &str, path: &Path) -> Result<Vec<u8>> {
    let shown = path.display();
    let data = fs::metadata(path).with_context(|| format!("cannot read the {what} {shown}"))?;
    if data.is_dir() {
        bail!("cannot read the {what} {shown}: it is a directory; give a file");
    }
    if data.len() > MOST {
        bail!(
            "cannot read the {what} {shown}: it has {} bytes; give at most {MOST}",
            data.len()
        );
    }
    let file = File::open(path).with_context(|| format!("cannot read the {what} {shown}"))?;
    let mut bytes = Vec::with_capacity(data.len() as usize);
    file.take(MOST + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read the {what} {shown}"))?;
    if bytes.len() as u64 > MOST {
        bail!("cannot read the {what} {shown}: it does not end; give a file");
    }
    Ok(bytes)
}

/// Creates or empties a file; `what` says what will be in it.
pub fn create(what: &str, path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("cannot write the {what} {}", path.display()))
}

/// The last part of a path, as a guest is told it.
pub fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Whether a file could be written, as far as that can be told before: its folder is there, and it is no folder itself.
///
/// # Errors
/// It cannot.
pub fn check_writable(what: &str, path: &Path) -> Result<()> {
    let shown = path.display();
    if path.is_dir() || path.file_name().is_none() {
        bail!("cannot write the {what} {shown}: it is a directory; give a file");
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let data = fs::metadata(folder).with_context(|| format!("cannot write the {what} {shown}"))?;
    if !data.is_dir() {
        let folder = folder.display();
        bail!("cannot write the {what} {shown}: {folder} is no directory");
    }
    Ok(())
}

/// A file that appears under its name when it is whole, and not at all if it is not.
pub struct Whole {
    /// `None` once it is in place.
    file: Option<BufWriter<File>>,
    beside: PathBuf,
    path: PathBuf,
}

impl Whole {
    /// Begins it, beside its place.
    ///
    /// # Errors
    /// It cannot be created.
    pub fn create(path: &Path) -> io::Result<Whole> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".part");
        let beside = PathBuf::from(beside);
        let file = BufWriter::with_capacity(1 << 20, File::create(&beside)?);
        Ok(Whole {
            file: Some(file),
            beside,
            path: path.to_owned(),
        })
    }

    /// Puts it in its place, to stay there even if the host fails.
    ///
    /// # Errors
    /// What is left of it cannot be written.
    pub fn finish_lasting(mut self) -> io::Result<u64> {
        self.flush()?;
        if let Some(file) = &self.file {
            file.get_ref().sync_all()?;
        }
        self.finish()
    }

    /// Puts it in its place; its bytes.
    ///
    /// # Errors
    /// What is left of it cannot be written.
    pub fn finish(mut self) -> io::Result<u64> {
        self.flush()?;
        fs::rename(&self.beside, &self.path)?;
        self.file = None;
        Ok(fs::metadata(&self.path)?.len())
    }
}

impl Write for Whole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Some(file) => file.write(bytes),
            None => Ok(0),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), BufWriter::flush)
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // There is nothing else to do about it.
            let _ = fs::remove_file(&self.beside);
        }
    }
}
