//! Files of sections: each has a name, a version, a length and checksums, and says whether a reader may pass it over.
//!
//! ```text
//! file     magic (8 bytes)  format (u32)  kind (4 bytes)  section ..  section "end"
//! section  name (16 bytes, zeros after it)  version (u16)  flags (u16: bit 0 required)  length (u32)
//!          checksum of these 24 bytes (u32)  content  checksum of the content (u32)
//! ```
//!
//! Numbers are little-endian; checksums are CRC-32 (IEEE 802.3). The section `end` holds the number of sections before it
//! (u32): a file that was cut is told from one that is whole.

use std::io::{self, Read, Write};

/// Begins every file. Its bytes do not survive a transfer as text.
pub const MAGIC: [u8; 8] = *b"\x89HNEST\r\n";
/// Version of what this module reads and writes.
pub const FORMAT: u32 = 1;
/// Most bytes of a section. Writers split what is longer.
pub const SECTION_MOST: usize = 64 << 20;

const NAME: usize = 16;
const REQUIRED: u16 = 1;
const END: &str = "end";

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A machine.
    Snapshot,
    /// A machine and what came to it.
    Recording,
}

impl Kind {
    fn word(self) -> [u8; 4] {
        match self {
            Kind::Snapshot => *b"SNAP",
            Kind::Recording => *b"RECD",
        }
    }

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Snapshot => "snapshot",
            Kind::Recording => "recording",
        }
    }
}

/// Sections cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SectionError {
    /// Another kind of file altogether.
    #[error("it is no file of Hypernest's: its first bytes are not those of one")]
    Magic,
    /// A file of ours that is something else.
    #[error("it is a {found} and no {wanted}")]
    Kind {
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// Made by another version.
    #[error(
        "it has format {found}, and this build reads format {FORMAT}: use the version that wrote it"
    )]
    Format {
        /// Its format.
        found: u32,
    },
    /// It ends too early.
    #[error("it was cut: {0}")]
    Cut(String),
    /// A checksum is not right, or a value is impossible.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// A section this build needs and does not know.
    #[error(
        "it needs section {0:?}, which this build does not know: use the version that wrote it, or a newer one"
    )]
    Unknown(String),
    /// A section of another version.
    #[error(
        "section {name:?} has version {found}, and this build reads up to {known}: use a newer build"
    )]
    Version {
        /// Its name.
        name: String,
        /// Its version.
        found: u16,
        /// The newest this build knows.
        known: u16,
    },
    /// There is more than a section takes.
    #[error("section {name:?} would have {length} bytes; the most is {SECTION_MOST}")]
    TooLong {
        /// Its name.
        name: String,
        /// Its bytes.
        length: usize,
    },
    /// The host cannot read or write.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A section's content is not what it should be.
pub(crate) fn damaged(name: &str, what: impl std::fmt::Display) -> SectionError {
    SectionError::Damaged(format!("section {name:?}: {what}"))
}

/// Writes a file, section by section.
pub struct SectionWriter<W: Write> {
    to: W,
    sections: u32,
}

impl<W: Write> SectionWriter<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// When `to` fails.
    pub fn new(mut to: W, kind: Kind) -> Result<Self, SectionError> {
        to.write_all(&MAGIC)?;
        to.write_all(&FORMAT.to_le_bytes())?;
        to.write_all(&kind.word())?;
        Ok(SectionWriter { to, sections: 0 })
    }

    /// Sections without a beginning of a file: a part of something larger. [`SectionReader::bare`] reads them.
    pub fn bare(to: W) -> Self {
        SectionWriter { to, sections: 0 }
    }

    /// Writes a section that every reader must know.
    ///
    /// # Errors
    /// When `to` fails, or the section is too long.
    pub fn required(
        &mut self,
        name: &str,
        version: u16,
        content: &[u8],
    ) -> Result<(), SectionError> {
        self.section(name, version, REQUIRED, content)
    }

    /// Writes a section that a reader may pass over.
    ///
    /// # Errors
    /// When `to` fails, or the section is too long.
    pub fn optional(
        &mut self,
        name: &str,
        version: u16,
        content: &[u8],
    ) -> Result<(), SectionError> {
        self.section(name, version, 0, content)
    }

    fn section(
        &mut self,
        name: &str,
        version: u16,
        flags: u16,
        content: &[u8],
    ) -> Result<(), SectionError> {
        debug_assert!(!name.is_empty() && name.len() <= NAME);
        let length = content.len();
        if length > SECTION_MOST {
            let name = name.to_owned();
            return Err(SectionError::TooLong { name, length });
        }
        let mut head = [0; Head::SIZE];
        head[..name.len()].copy_from_slice(name.as_bytes());
        head[16..18].copy_from_slice(&version.to_le_bytes());
        head[18..20].copy_from_slice(&flags.to_le_bytes());
        head[20..24].copy_from_slice(&(length as u32).to_le_bytes());
        let checksum = crc32fast::hash(&head[..24]);
        head[24..].copy_from_slice(&checksum.to_le_bytes());
        self.to.write_all(&head)?;
        self.to.write_all(content)?;
        self.to.write_all(&crc32fast::hash(content).to_le_bytes())?;
        self.sections += 1;
        Ok(())
    }

    /// Has everything so far written through.
    ///
    /// # Errors
    /// When the writer fails.
    pub fn flush(&mut self) -> Result<(), SectionError> {
        Ok(self.to.flush()?)
    }

    /// Ends the file, and gives back where it went.
    ///
    /// # Errors
    /// When the writer fails.
    pub fn finish(mut self) -> Result<W, SectionError> {
        let sections = self.sections.to_le_bytes();
        self.required(END, 1, &sections)?;
        self.to.flush()?;
        Ok(self.to)
    }
}

/// What a section says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: u16,
    /// A reader that does not know it must refuse the file.
    pub required: bool,
    /// Bytes of its content.
    pub length: usize,
}

impl Head {
    const SIZE: usize = 28;

    /// A section of one of the versions 1 to `known`.
    ///
    /// # Errors
    /// When it has another.
    pub fn check_version(&self, known: u16) -> Result<(), SectionError> {
        if (1..=known).contains(&self.version) {
            return Ok(());
        }
        Err(SectionError::Version {
            name: self.name.clone(),
            found: self.version,
            known,
        })
    }

    /// What to do with a section that the reader does not know: nothing where that is allowed.
    ///
    /// # Errors
    /// When it is not.
    pub fn pass_over(&self) -> Result<(), SectionError> {
        if self.required {
            return Err(SectionError::Unknown(self.name.clone()));
        }
        Ok(())
    }
}

/// Reads a file, section by section. It takes no byte after the section `end`.
pub struct SectionReader<R: Read> {
    from: R,
    sections: u32,
    ended: bool,
    last: String,
}

impl<R: Read> SectionReader<R> {
    /// Reads the beginning of a file, which must be of a kind.
    ///
    /// # Errors
    /// When it is not, or `from` fails.
    pub fn new(mut from: R, wanted: Kind) -> Result<Self, SectionError> {
        let mut start = [0; 16];
        let there = fill(&mut from, &mut start)?;
        let magic = there.min(MAGIC.len());
        if there == 0 || start[..magic] != MAGIC[..magic] {
            return Err(SectionError::Magic);
        }
        if there < start.len() {
            return Err(SectionError::Cut(format!("it has {there} bytes")));
        }
        let format = u32::from_le_bytes([start[8], start[9], start[10], start[11]]);
        if format != FORMAT {
            return Err(SectionError::Format { found: format });
        }
        let word = &start[12..];
        let found = [Kind::Snapshot, Kind::Recording]
            .into_iter()
            .find(|kind| kind.word() == word)
            .ok_or_else(|| SectionError::Damaged("it does not say what it holds".into()))?;
        if found != wanted {
            return Err(SectionError::Kind {
                found: found.name(),
                wanted: wanted.name(),
            });
        }
        Ok(Self::bare(from))
    }

    /// Sections without a beginning of a file.
    pub fn bare(from: R) -> Self {
        SectionReader {
            from,
            sections: 0,
            ended: false,
            last: String::new(),
        }
    }

    /// Reads the next section; its content replaces that of `content`. `None` after the last.
    ///
    /// # Errors
    /// When it is cut or damaged, or the host fails. Memory is taken as bytes come, never by what a length says.
    pub fn next(&mut self, content: &mut Vec<u8>) -> Result<Option<Head>, SectionError> {
        content.clear();
        if self.ended {
            return Ok(None);
        }
        let mut head = [0; Head::SIZE];
        let there = fill(&mut self.from, &mut head)?;
        if there < head.len() {
            let after = match self.last.as_str() {
                "" => "before its first section".into(),
                last => format!("after section {last:?}"),
            };
            return Err(SectionError::Cut(format!("it ends {after}")));
        }
        let (fields, checksum) = head.split_at(24);
        if crc32fast::hash(fields).to_le_bytes() != checksum {
            let what = "the head of a section has a wrong checksum";
            return Err(SectionError::Damaged(match self.last.as_str() {
                "" => format!("{what}, the first"),
                last => format!("{what}, after section {last:?}"),
            }));
        }
        let name = fields[..NAME].split(|byte| *byte == 0).next();
        let name = name.and_then(|name| std::str::from_utf8(name).ok());
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            return Err(SectionError::Damaged("a section has no name".into()));
        };
        let number = |at: usize| u16::from_le_bytes([fields[at], fields[at + 1]]);
        let head = Head {
            name: name.to_owned(),
            version: number(16),
            required: number(18) & REQUIRED != 0,
            length: usize::from(number(20)) | usize::from(number(22)) << 16,
        };
        if head.length > SECTION_MOST {
            let what = format!(
                "it claims {} bytes; the most is {SECTION_MOST}",
                head.length
            );
            return Err(damaged(name, what));
        }
        // Grows as bytes come: a length alone takes no memory.
        let there = (&mut self.from)
            .take(head.length as u64)
            .read_to_end(content)?;
        let mut checksum = [0; 4];
        if there < head.length || fill(&mut self.from, &mut checksum)? < checksum.len() {
            return Err(SectionError::Cut(format!("section {name:?} is not whole")));
        }
        if crc32fast::hash(content).to_le_bytes() != checksum {
            return Err(damaged(name, "its checksum is wrong"));
        }
        if head.name == END {
            head.check_version(1)?;
            if content[..] != self.sections.to_le_bytes() {
                let what = format!(
                    "it counts other sections than the {} there are",
                    self.sections
                );
                return Err(damaged(END, what));
            }
            self.ended = true;
            content.clear();
            return Ok(None);
        }
        self.sections = self.sections.saturating_add(1);
        self.last.clone_from(&head.name);
        Ok(Some(head))
    }

    /// What it reads from.
    pub fn into_inner(self) -> R {
        self.from
    }
}

/// Reads until `into` is full or there is no more; the bytes read.
fn fill(from: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    let mut there = 0;
    while there < into.len() {
        match from.read(&mut into[there..]) {
            Ok(0) => break,
            Ok(count) => there += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(there)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Vec<u8> {
        let mut writer = SectionWriter::new(Vec::new(), Kind::Snapshot).unwrap();
        writer.required("first", 2, b"content").unwrap();
        writer.optional("second", 1, &[]).unwrap();
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Vec<(Head, Vec<u8>)>, SectionError> {
        let mut reader = SectionReader::new(bytes, Kind::Snapshot)?;
        let (mut all, mut content) = (Vec::new(), Vec::new());
        while let Some(head) = reader.next(&mut content)? {
            all.push((head, content.clone()));
        }
        assert_eq!(reader.next(&mut content).unwrap(), None);
        Ok(all)
    }

    #[test]
    fn sections_come_back_in_order() {
        let all = read(&file()).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].0.name.as_str(), all[0].0.version), ("first", 2));
        assert!(all[0].0.required && !all[1].0.required);
        assert_eq!(all[0].1, b"content");
        assert_eq!(all[1].1, b"");
    }

    #[test]
    fn bytes_after_the_end_are_left_to_others() {
        let mut bytes = file();
        bytes.extend(b"more");
        let mut reader = SectionReader::new(&bytes[..], Kind::Snapshot).unwrap();
        while reader.next(&mut Vec::new()).unwrap().is_some() {}
        assert_eq!(reader.into_inner(), b"more");
    }

    #[test]
    fn every_cut_is_told() {
        let whole = file();
        for length in 1..whole.len() {
            let error = read(&whole[..length]).unwrap_err();
            assert!(matches!(error, SectionError::Cut(_)), "{length}: {error}");
        }
        assert!(matches!(read(&[]), Err(SectionError::Magic)));
    }

    #[test]
    fn every_changed_bit_is_told() {
        let whole = file();
        for bit in 0..8 * whole.len() {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn another_kind_and_another_format_are_refused_by_name() {
        let mut writer = SectionWriter::new(Vec::new(), Kind::Recording).unwrap();
        writer.required("log", 1, &[]).unwrap();
        let mut bytes = writer.finish().unwrap();
        let error = read(&bytes).unwrap_err().to_string();
        assert_eq!(error, "it is a recording and no snapshot");
        bytes[8] = 9;
        let error = read(&bytes).unwrap_err().to_string();
        assert!(
            error.contains("format 9") && error.contains("format 1"),
            "{error}"
        );
    }

    #[test]
    fn a_length_alone_takes_no_memory() {
        let mut bytes = file()[..16].to_vec();
        let mut head = [0; 24];
        head[..4].copy_from_slice(b"much");
        head[20..24].copy_from_slice(&(SECTION_MOST as u32).to_le_bytes());
        bytes.extend(head);
        bytes.extend(crc32fast::hash(&head).to_le_bytes());
        let mut content = Vec::new();
        let mut reader = SectionReader::new(&bytes[..], Kind::Snapshot).unwrap();
        assert!(matches!(
            reader.next(&mut content),
            Err(SectionError::Cut(_))
        ));
        assert!(content.capacity() < 1 << 16);

        head[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
        bytes.truncate(16);
        bytes.extend(head);
        bytes.extend(crc32fast::hash(&head).to_le_bytes());
        let error = read(&bytes).unwrap_err().to_string();
        assert!(error.contains("claims 4294967295 bytes"), "{error}");
    }

    #[test]
    fn versions_and_unknown_sections_are_judged_by_name() {
        let (head, _) = &read(&file()).unwrap()[0];
        assert!(head.check_version(2).is_ok());
        let error = head.check_version(1).unwrap_err().to_string();
        assert!(error.contains("\"first\" has version 2"), "{error}");
        let error = head.pass_over().unwrap_err().to_string();
        assert!(error.contains("needs section \"first\""), "{error}");
        assert!(read(&file()).unwrap()[1].0.pass_over().is_ok());
    }
}
