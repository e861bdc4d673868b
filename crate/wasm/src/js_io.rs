//! Bytes in JavaScript's memory, read and written piece by piece: a file is never a second time in the memory that the machine
//! shares.

use std::io::{self, Read, Write};

use js_sys::Uint8Array;

/// Bytes written together.
const PIECE: usize = 1 << 20;

/// Reads an array.
pub struct Scatter {
    bytes: Uint8Array,
    at: u32,
}

impl Scatter {
    /// From its first byte on.
    pub fn new(bytes: Uint8Array) -> Scatter {
        Scatter { bytes, at: 0 }
    }
}

impl Read for Scatter {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = (self.bytes.length() - self.at) as usize;
        let count = left.min(into.len());
        let end = self.at + count as u32;
        self.bytes
            .subarray(self.at, end)
            .copy_to(&mut into[..count]);
        self.at = end;
        Ok(count)
    }
}

/// Takes what is written, to make an array of it.
#[derive(Default)]
pub struct Gather {
    full: Vec<Uint8Array>,
    piece: Vec<u8>,
}

impl Gather {
    /// All of it.
    pub fn into_array(mut self) -> Uint8Array {
        self.give();
        let length = self.full.iter().map(Uint8Array::length).sum();
        let all = Uint8Array::new_with_length(length);
        let mut at = 0;
        for piece in &self.full {
            all.set(piece, at);
            at += piece.length();
        }
        all
    }

    fn give(&mut self) {
        if !self.piece.is_empty() {
            self.full.push(Uint8Array::from(self.piece.as_slice()));
            self.piece.clear();
        }
    }
}

impl Write for Gather {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() + bytes.len() > PIECE {
            self.give();
        }
        self.piece.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.give();
        Ok(())
    }
}
