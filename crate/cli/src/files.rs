//! Reading what the user named: one clear line when it cannot be.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

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
