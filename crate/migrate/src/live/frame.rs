//! Frames: pieces of a stream with a length, a kind and a checksum.
//!
//! ```text
//! 0        4      5               13            13 + length
//! +--------+------+---------------+-------------+
//! | length | kind | checksum      | payload     |      little-endian
//! +--------+------+---------------+-------------+
//! ```
//!
//! The checksum is over kind and payload. No payload is longer than [`MOST`], so a reader holds one frame and what
//! it was fed after it.

use hypernest_machine::hash;

/// Bytes of a payload at most.
pub const MOST: usize = 512 << 10;
/// Bytes before a payload.
pub const HEADER: usize = 13;

/// A stream is damaged, or no stream of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A length that no frame has.
    #[error("a frame of {0} bytes, and none has more than {MOST}")]
    Length(u32),
    /// Kind or payload are not what was sent.
    #[error("a frame of kind {0} was damaged on the way")]
    Checksum(u8),
}

fn checksum(kind: u8, payload: &[u8]) -> u64 {
    hash::bytes(u64::from(kind), payload)
}

/// Appends a frame. Its payload, which `fill` appends, has at most [`MOST`] bytes.
pub fn append(out: &mut Vec<u8>, kind: u8, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend([0; HEADER]);
    fill(out);
    let payload = start + HEADER;
    let length = out.len() - payload;
    debug_assert!(length <= MOST, "{length} bytes of kind {kind}");
    let checksum = checksum(kind, &out[payload..]);
    out[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
    out[start + 4] = kind;
    out[start + 5..payload].copy_from_slice(&checksum.to_le_bytes());
}

/// Finds frames in bytes as they arrive.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
    /// Where the next frame begins.
    at: usize,
}

impl Reader {
    /// Takes what arrived.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.at > MOST {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next frame, where it is all here: its kind and payload.
    ///
    /// # Errors
    /// When what is here cannot be one.
    pub fn next(&mut self) -> Result<Option<(u8, &[u8])>, FrameError> {
        let rest = &self.bytes[self.at..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [a, b, c, d, kind, sum @ ..] = *header;
        let length = u32::from_le_bytes([a, b, c, d]);
        if length as usize > MOST {
            return Err(FrameError::Length(length));
        }
        let Some(payload) = rest.get(..length as usize) else {
            return Ok(None);
        };
        if u64::from_le_bytes(sum) != checksum(kind, payload) {
            return Err(FrameError::Checksum(kind));
        }
        self.at += HEADER + payload.len();
        let payload = self.at - payload.len()..self.at;
        Ok(Some((kind, &self.bytes[payload])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Vec<u8> {
        let mut out = Vec::new();
        append(&mut out, 7, |out| out.extend(b"content"));
        append(&mut out, 8, |_| {});
        append(&mut out, 9, |out| out.resize(out.len() + MOST, 1));
        out
    }

    fn read(reader: &mut Reader) -> Vec<(u8, Vec<u8>)> {
        let mut found = Vec::new();
        while let Some((kind, payload)) = reader.next().unwrap() {
            found.push((kind, payload.to_vec()));
        }
        found
    }

    #[test]
    fn frames_arrive_however_the_stream_is_cut() {
        let stream = stream();
        let frames = [(7, b"content".to_vec()), (8, vec![]), (9, vec![1; MOST])];
        for piece in [1, 3, 13, 14, 4096, stream.len()] {
            let mut reader = Reader::default();
            let mut found = Vec::new();
            for part in stream.chunks(piece) {
                reader.feed(part);
                found.extend(read(&mut reader));
            }
            assert_eq!(found, frames);
            assert_eq!(reader.at, reader.bytes.len());
        }
    }

    #[test]
    fn every_changed_bit_is_found() {
        let mut stream = Vec::new();
        append(&mut stream, 7, |out| out.extend(b"content"));
        for bit in 0..8 * stream.len() {
            let mut damaged = stream.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut reader = Reader::default();
            reader.feed(&damaged);
            let read = reader.next().map(|frame| frame.is_some());
            assert_ne!(read, Ok(true), "bit {bit}");
        }
    }

    #[test]
    fn a_length_is_refused_before_anything_is_kept_for_it() {
        let mut reader = Reader::default();
        reader.feed(&[0xff; HEADER]);
        assert_eq!(reader.next(), Err(FrameError::Length(u32::MAX)));
    }
}
