//! A cpio archive in the "newc" form, which Linux unpacks as its first file system.
//!
//! Written here so that no rights and no clock are involved: device nodes need no root, every owner is 0,
//! and every time is 0, so equal contents make equal archives.

use std::collections::BTreeMap;

enum Node {
    Dir,
    File { mode: u32, data: Vec<u8> },
    CharDevice { major: u32, minor: u32 },
}

/// An archive in the making; entries come out sorted by path.
#[derive(Default)]
pub struct Archive {
    entries: BTreeMap<String, Node>,
}

impl Archive {
    /// Adds a directory and the directories above it.
    pub fn dir(&mut self, path: &str) -> &mut Self {
        for (at, _) in path.match_indices('/') {
            self.entries.insert(path[..at].into(), Node::Dir);
        }
        self.entries.insert(path.into(), Node::Dir);
        self
    }

    /// Adds a regular file, and the directories above it.
    pub fn file(&mut self, path: &str, mode: u32, data: impl Into<Vec<u8>>) -> &mut Self {
        self.parent_of(path);
        self.entries.insert(
            path.into(),
            Node::File {
                mode,
                data: data.into(),
            },
        );
        self
    }

    /// Adds a character device that its owner may read and write.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) -> &mut Self {
        self.parent_of(path);
        self.entries
            .insert(path.into(), Node::CharDevice { major, minor });
        self
    }

    fn parent_of(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
    }

    /// The archive's bytes, padded to a whole number of 512-byte blocks.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (index, (path, node)) in (1..).zip(&self.entries) {
            match node {
                Node::Dir => entry(&mut out, index, path, 0o040_755, (0, 0), &[]),
                Node::File { mode, data } => {
                    entry(&mut out, index, path, 0o100_000 | mode, (0, 0), data)
                }
                Node::CharDevice { major, minor } => {
                    entry(&mut out, index, path, 0o020_600, (*major, *minor), &[])
                }
            }
        }
        entry(&mut out, 0, "TRAILER!!!", 0, (0, 0), &[]);
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }
}

fn entry(out: &mut Vec<u8>, index: u32, path: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let size = u32::try_from(data.len()).expect("a guest image's file is below 4 GiB");
    let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
    let name_size = path.len() as u32 + 1;
    out.extend_from_slice(b"070701");
    for field in [
        index, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
    ] {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_lists_parents_first_and_ends_with_the_trailer() {
        let mut archive = Archive::default();
        archive
            .file("bin/sh", 0o755, *b"#!x")
            .char_device("dev/null", 1, 3);
        let bytes = archive.bytes();
        let text = String::from_utf8_lossy(&bytes);
        let at = |needle: &str| {
            text.find(needle)
                .unwrap_or_else(|| panic!("{needle} is missing"))
        };
        assert!(at("bin\0") < at("bin/sh\0") && at("bin/sh\0") < at("dev\0"));
        assert!(at("dev/null\0") < at("TRAILER!!!\0"));
        assert_eq!(bytes.len() % 512, 0);
    }

    #[test]
    fn header_is_110_bytes_and_data_is_aligned() {
        let mut archive = Archive::default();
        archive.file("a", 0o644, *b"hello");
        let bytes = archive.bytes();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[54..62], b"00000005", "file size");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..117], b"hello");
        assert_eq!(
            &bytes[120..126],
            b"070701",
            "the next entry is aligned to 4"
        );
    }
}
