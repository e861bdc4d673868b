//! What a side keeps of a migration: a machine in a file, and who may go on with it.
//!
//! A record is a header of [`HEADER`] bytes and after it a snapshot file. The header alone changes when the machine
//! changes hands, by one short write in place, so that a side that is killed at any moment leaves one that can be read.
//!
//! ```text
//! 0       8     9      10          16    24       32    40     48         56
//! +-------+-----+------+-----------+-----+--------+-----+------+----------+------..------+
//! | magic | side| owns | 0         | id  | release| lock| tick | checksum | 0 up to 4096 |
//! +-------+-----+------+-----------+-----+--------+-----+------+----------+------..------+
//! ```

use hypernest_machine::hash;

use super::{Identity, lock};

/// Bytes of a record before its snapshot.
pub const HEADER: usize = 4096;
const MAGIC: [u8; 8] = *b"hnmoved\x01";
const USED: usize = 56;

/// Which side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It gave the machine away, or was about to.
    Source,
    /// It took the machine, or was about to.
    Destination,
}

impl Side {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

/// Whether the machine in a record is its side's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owns {
    /// Nobody here knows.
    Undecided,
    /// It is: it can be resumed.
    Yes,
    /// It is the other side's.
    No,
}

/// The header of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which side wrote it.
    pub side: Side,
    /// Whether the machine is that side's.
    pub owns: Owns,
    /// The migration, and this side's release code.
    pub identity: Identity,
    /// What the other side's release code is checked with.
    pub lock: u64,
    /// The machine's tick.
    pub tick: u64,
}

/// No record, or none of this build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Something else.
    #[error("it is no record of a migration")]
    Magic,
    /// It was changed or cut.
    #[error("it is damaged")]
    Damaged,
}

/// What cannot be settled so. The records are as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecideError {
    /// It is not a pair.
    #[error("they are of different migrations, {0:016x} and {1:016x}")]
    Different(u64, u64),
    /// It is one side twice.
    #[error("both are of the {}; a pair is one of each side", .0.name())]
    SameSide(Side),
    /// The other side has gone on with it.
    #[error("the {} owns the machine already; keep that one", .0.name())]
    Owned(Side),
    /// It was given up.
    #[error("the {} has given up the machine already", .0.name())]
    GivenUp(Side),
    /// The release code is not that of the other side.
    #[error("this is not the release code of the other side")]
    Code,
}

impl Record {
    /// Its bytes, which a snapshot follows.
    pub fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8] = match self.side {
            Side::Source => 0,
            Side::Destination => 1,
        };
        bytes[9] = match self.owns {
            Owns::Undecided => 0,
            Owns::Yes => 1,
            Owns::No => 2,
        };
        let numbers = [
            self.identity.id,
            self.identity.release,
            self.lock,
            self.tick,
        ];
        for (at, number) in (16..).step_by(8).zip(numbers) {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let checksum = hash::bytes(0, &bytes[..USED - 8]);
        bytes[USED - 8..USED].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Whether a file that begins so is a record, be it good or not.
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC)
    }

    /// Reads the beginning of a file.
    ///
    /// # Errors
    /// When it is no record.
    pub fn read(bytes: &[u8]) -> Result<Record, RecordError> {
        if !Record::is_one(bytes) {
            return Err(RecordError::Magic);
        }
        let header = bytes.first_chunk::<HEADER>().ok_or(RecordError::Damaged)?;
        let number = |at: usize| -> u64 {
            let bytes = header[at..at + 8].try_into();
            bytes.map_or(0, u64::from_le_bytes)
        };
        let record = Record {
            side: match header[8] {
                0 => Side::Source,
                1 => Side::Destination,
                _ => return Err(RecordError::Damaged),
            },
            owns: match header[9] {
                0 => Owns::Undecided,
                1 => Owns::Yes,
                2 => Owns::No,
                _ => return Err(RecordError::Damaged),
            },
            identity: Identity {
                id: number(16),
                release: number(24),
            },
            lock: number(32),
            tick: number(40),
        };
        // It has one form alone, checksum included.
        if record.to_bytes() != *header {
            return Err(RecordError::Damaged);
        }
        Ok(record)
    }

    /// Gives up the machine: the release code, with which the other side may keep its own.
    ///
    /// # Errors
    /// When it is owned here.
    pub fn drop_it(&mut self) -> Result<u64, DecideError> {
        if self.owns == Owns::Yes {
            return Err(DecideError::Owned(self.side));
        }
        self.owns = Owns::No;
        Ok(self.identity.release)
    }

    /// Keeps the machine, which the other side has given up with this release code.
    ///
    /// # Errors
    /// When it is not the other side's code, or this side has given up its own.
    pub fn keep_released(&mut self, code: u64) -> Result<(), DecideError> {
        let other = Identity {
            id: self.identity.id,
            release: code,
        };
        if lock(&other) != self.lock {
            return Err(DecideError::Code);
        }
        self.keep_alone()
    }

    /// Keeps the machine on the word of someone who knows that the other side is gone and has no record.
    ///
    /// # Errors
    /// When this side has given up its own.
    pub fn keep_alone(&mut self) -> Result<(), DecideError> {
        if self.owns == Owns::No {
            return Err(DecideError::GivenUp(self.side));
        }
        self.owns = Owns::Yes;
        Ok(())
    }
}

/// Settles a pair: `keep` keeps the machine and `other` gives it up. Whoever writes them writes `other` first: a pair
/// of which only that was written is settled by doing the same again.
///
/// # Errors
/// When it is no pair, or one of them was settled otherwise before.
pub fn decide(keep: &mut Record, other: &mut Record) -> Result<(), DecideError> {
    let (a, b) = (keep.identity.id, other.identity.id);
    if a != b {
        return Err(DecideError::Different(a, b));
    }
    if keep.side == other.side {
        return Err(DecideError::SameSide(keep.side));
    }
    if keep.owns == Owns::No {
        return Err(DecideError::GivenUp(keep.side));
    }
    let mut dropped = *other;
    keep.keep_released(dropped.drop_it()?)?;
    *other = dropped;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Record, Record) {
        let identity = |release| Identity { id: 7, release };
        let record = |side, release, other| Record {
            side,
            owns: Owns::Undecided,
            identity: identity(release),
            lock: lock(&identity(other)),
            tick: 99,
        };
        (record(Side::Source, 1, 2), record(Side::Destination, 2, 1))
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_every_change_is_found() {
        let (source, _) = pair();
        let bytes = source.to_bytes();
        assert_eq!(Record::read(&bytes), Ok(source));
        for at in 0..HEADER {
            let mut bytes = bytes;
            bytes[at] ^= 4;
            assert!(Record::read(&bytes).is_err(), "{at}");
        }
        assert_eq!(Record::read(&bytes[..100]), Err(RecordError::Damaged));
        assert_eq!(Record::read(b""), Err(RecordError::Magic));
    }

    #[test]
    fn one_side_of_a_pair_keeps_the_machine() {
        let (mut source, mut destination) = pair();
        assert_eq!(decide(&mut destination, &mut source), Ok(()));
        assert_eq!((destination.owns, source.owns), (Owns::Yes, Owns::No));
        // Again is no harm; the other way round is refused, in any way.
        assert_eq!(decide(&mut destination, &mut source), Ok(()));
        let refused = Err(DecideError::GivenUp(Side::Source));
        assert_eq!(decide(&mut source, &mut destination), refused);
        assert_eq!(source.keep_alone(), refused);
        let owned = Err(DecideError::Owned(Side::Destination));
        assert_eq!(destination.drop_it(), owned);
    }

    #[test]
    fn nobody_keeps_it_without_the_others_release_code() {
        let (mut source, mut destination) = pair();
        for code in [0, 1, 3, u64::MAX] {
            assert_eq!(source.keep_released(code), Err(DecideError::Code));
        }
        let code = destination.drop_it().unwrap();
        assert_eq!(source.keep_released(code), Ok(()));
    }

    #[test]
    fn a_destination_that_saw_the_commit_is_not_overruled() {
        let (mut source, mut destination) = pair();
        destination.owns = Owns::Yes;
        let owned = Err(DecideError::Owned(Side::Destination));
        assert_eq!(decide(&mut source, &mut destination), owned);
        assert_eq!(decide(&mut destination, &mut source), Ok(()));
    }

    #[test]
    fn strangers_are_no_pair() {
        let (mut source, mut destination) = pair();
        let mut twin = source;
        let same = Err(DecideError::SameSide(Side::Source));
        assert_eq!(decide(&mut source, &mut twin), same);
        destination.identity.id += 1;
        let different = Err(DecideError::Different(7, 8));
        assert_eq!(decide(&mut source, &mut destination), different);
    }
}
