//! What the two sides say to each other. `docs/migration.md` has who says what when.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::{self, FrameError};

/// Version of the protocol, in the first message of each side.
pub const VERSION: u32 = 1;
/// The first bytes of the first message.
const MAGIC: [u8; 8] = *b"hypernst";
/// Bytes of the machine's state in one message at most.
pub const STATE_PIECE: usize = 256 << 10;
/// Reasons of a refusal at most; and bytes of each.
const REASONS: usize = 256;
const REASON: usize = 1000;

/// What the peer sent is not what this side can go on with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// The stream is damaged.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The first message is not one of this protocol.
    #[error("it speaks no migration protocol")]
    Magic,
    /// Another version of the protocol.
    #[error("it speaks version {0} of the migration protocol; this build speaks {VERSION}")]
    Version(u32),
    /// A message that cannot be read.
    #[error("its message {0} cannot be read")]
    Content(&'static str),
    /// A kind that this side never gets.
    #[error("it sent a message of unknown kind {0}")]
    Kind(u8),
}

/// What the source says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Names the migration.
    pub id: u64,
    /// What the source's release code is checked with.
    pub lock: u64,
    /// Nothing will be read from the destination.
    pub one_way: bool,
    /// What the destination may demand.
    pub token: Vec<u8>,
    /// Bytes of RAM.
    pub memory: u64,
    /// What the machine is and what its guest could see.
    pub offer: Vec<u8>,
}

/// The last message before the destination can be ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Combined hash of all pages.
    pub ram: u64,
    /// Hash of the state.
    pub state: u64,
    /// Bytes of the state.
    pub length: u64,
}

/// From the source to the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromSource<'a> {
    /// First of all.
    Hello(Hello),
    /// Some pages, in the form of [`super::batch`].
    Pages(&'a [u8]),
    /// A round is over; its number, from 0.
    Round(u32),
    /// The next piece of the state.
    State(&'a [u8]),
    /// All pages and the state were sent.
    Done(Done),
    /// From here on the machine is the destination's.
    Commit,
    /// The machine stays where it is.
    Cancel(String),
    /// Nothing but a sign of life.
    Ping,
    /// The next sign of life may take this many microseconds.
    Wait(u64),
}

/// From the destination to the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromDestination {
    /// It can take the machine. What its release code is checked with.
    Accept {
        /// The lock.
        lock: u64,
    },
    /// It cannot, for these reasons.
    Refuse(Vec<String>),
    /// Bytes of the source's stream it has dealt with.
    Ack(u64),
    /// It has the machine, as a whole and verified, and waits for the commit.
    Ready,
    /// It owns the machine.
    Owned,
    /// It gives up; it has nothing.
    Fail(String),
    /// The next sign of life may take this many microseconds.
    Wait(u64),
}

const HELLO: u8 = 1;
const PAGES: u8 = 2;
const ROUND: u8 = 3;
const STATE: u8 = 4;
const DONE: u8 = 5;
const COMMIT: u8 = 6;
const CANCEL: u8 = 7;
const PING: u8 = 8;
const WAIT: u8 = 9;
const ACCEPT: u8 = 33;
const REFUSE: u8 = 34;
const ACK: u8 = 35;
const READY: u8 = 36;
const OWNED: u8 = 37;
const FAIL: u8 = 38;

impl FromSource<'_> {
    /// Appends its frame.
    pub fn append(&self, out: &mut Vec<u8>) {
        match self {
            FromSource::Hello(hello) => frame::append(out, HELLO, |out| {
                begin(out);
                put(out, hello);
            }),
            FromSource::Pages(batch) => frame::append(out, PAGES, |out| out.extend(*batch)),
            FromSource::Round(number) => frame::append(out, ROUND, |out| put(out, number)),
            FromSource::State(piece) => frame::append(out, STATE, |out| out.extend(*piece)),
            FromSource::Done(done) => frame::append(out, DONE, |out| put(out, done)),
            FromSource::Commit => frame::append(out, COMMIT, |_| {}),
            FromSource::Cancel(why) => frame::append(out, CANCEL, |out| put(out, &line(why))),
            FromSource::Ping => frame::append(out, PING, |_| {}),
            FromSource::Wait(time) => frame::append(out, WAIT, |out| put(out, time)),
        }
    }

    /// Reads a frame's content.
    ///
    /// # Errors
    /// When it is no message of a source.
    pub fn read(kind: u8, payload: &[u8]) -> Result<FromSource<'_>, MessageError> {
        Ok(match kind {
            HELLO => FromSource::Hello(get("hello", begun(payload)?)?),
            PAGES => FromSource::Pages(payload),
            ROUND => FromSource::Round(get("round", payload)?),
            STATE => FromSource::State(payload),
            DONE => FromSource::Done(get("done", payload)?),
            COMMIT => empty("commit", payload, FromSource::Commit)?,
            CANCEL => FromSource::Cancel(line(&get::<String>("cancel", payload)?)),
            PING => empty("ping", payload, FromSource::Ping)?,
            WAIT => FromSource::Wait(get("wait", payload)?),
            _ => return Err(MessageError::Kind(kind)),
        })
    }

    /// What it is, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            FromSource::Hello(_) => "hello",
            FromSource::Pages(_) => "pages",
            FromSource::Round(_) => "round",
            FromSource::State(_) => "state",
            FromSource::Done(_) => "done",
            FromSource::Commit => "commit",
            FromSource::Cancel(_) => "cancel",
            FromSource::Ping => "ping",
            FromSource::Wait(_) => "wait",
        }
    }
}

impl FromDestination {
    /// Appends its frame.
    pub fn append(&self, out: &mut Vec<u8>) {
        match self {
            FromDestination::Accept { lock } => frame::append(out, ACCEPT, |out| {
                begin(out);
                put(out, lock);
            }),
            FromDestination::Refuse(reasons) => frame::append(out, REFUSE, |out| {
                let reasons = reasons.iter().take(REASONS).map(|reason| line(reason));
                begin(out);
                put(out, &reasons.collect::<Vec<_>>());
            }),
            FromDestination::Ack(bytes) => frame::append(out, ACK, |out| put(out, bytes)),
            FromDestination::Ready => frame::append(out, READY, |_| {}),
            FromDestination::Owned => frame::append(out, OWNED, |_| {}),
            FromDestination::Fail(why) => frame::append(out, FAIL, |out| put(out, &line(why))),
            FromDestination::Wait(time) => frame::append(out, WAIT, |out| put(out, time)),
        }
    }

    /// Reads a frame's content.
    ///
    /// # Errors
    /// When it is no message of a destination.
    pub fn read(kind: u8, payload: &[u8]) -> Result<FromDestination, MessageError> {
        Ok(match kind {
            ACCEPT => FromDestination::Accept {
                lock: get("accept", begun(payload)?)?,
            },
            REFUSE => {
                let reasons: Vec<String> = get("refuse", begun(payload)?)?;
                let reasons = reasons.iter().take(REASONS).map(|reason| line(reason));
                FromDestination::Refuse(reasons.collect())
            }
            ACK => FromDestination::Ack(get("ack", payload)?),
            READY => empty("ready", payload, FromDestination::Ready)?,
            OWNED => empty("owned", payload, FromDestination::Owned)?,
            FAIL => FromDestination::Fail(line(&get::<String>("fail", payload)?)),
            WAIT => FromDestination::Wait(get("wait", payload)?),
            _ => return Err(MessageError::Kind(kind)),
        })
    }

    /// What it is, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            FromDestination::Accept { .. } => "accept",
            FromDestination::Refuse(_) => "refuse",
            FromDestination::Ack(_) => "ack",
            FromDestination::Ready => "ready",
            FromDestination::Owned => "owned",
            FromDestination::Fail(_) => "fail",
            FromDestination::Wait(_) => "wait",
        }
    }
}

/// A text of the peer's, on one line of limited length and without control characters.
fn line(text: &str) -> String {
    let shown = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    shown.take(REASON).collect()
}

fn begin(out: &mut Vec<u8>) {
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
}

fn begun(payload: &[u8]) -> Result<&[u8], MessageError> {
    let rest = payload.strip_prefix(&MAGIC).ok_or(MessageError::Magic)?;
    let (version, rest) = rest.split_first_chunk().ok_or(MessageError::Magic)?;
    match u32::from_le_bytes(*version) {
        VERSION => Ok(rest),
        other => Err(MessageError::Version(other)),
    }
}

fn put<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    // Writing to memory fails for no message.
    out.extend(postcard::to_allocvec(value).unwrap_or_default());
}

fn get<T: DeserializeOwned>(name: &'static str, payload: &[u8]) -> Result<T, MessageError> {
    match postcard::take_from_bytes(payload) {
        Ok((value, [])) => Ok(value),
        _ => Err(MessageError::Content(name)),
    }
}

fn empty<T>(name: &'static str, payload: &[u8], message: T) -> Result<T, MessageError> {
    match payload {
        [] => Ok(message),
        _ => Err(MessageError::Content(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::Reader;
    use super::*;

    fn hello() -> Hello {
        Hello {
            id: 1,
            lock: 2,
            one_way: true,
            token: b"secret".into(),
            memory: 3 << 20,
            offer: vec![9; 300],
        }
    }

    #[test]
    fn every_message_is_read_as_it_was_written() {
        let done = Done {
            ram: u64::MAX,
            state: 1,
            length: 77,
        };
        let messages = [
            FromSource::Hello(hello()),
            FromSource::Pages(&[1, 2, 3]),
            FromSource::Round(300),
            FromSource::State(&[4]),
            FromSource::Done(done),
            FromSource::Commit,
            FromSource::Cancel("no".into()),
            FromSource::Ping,
            FromSource::Wait(5),
        ];
        for message in &messages {
            let (mut out, mut reader) = (Vec::new(), Reader::default());
            message.append(&mut out);
            reader.feed(&out);
            let (kind, payload) = reader.next().unwrap().unwrap();
            assert_eq!(FromSource::read(kind, payload).as_ref(), Ok(message));
            let other = FromDestination::read(kind, payload).is_ok();
            assert_eq!(other, message.name() == "wait", "{}", message.name());
        }
        let messages = [
            FromDestination::Accept { lock: 1 },
            FromDestination::Refuse(vec!["one".into(), "two".into()]),
            FromDestination::Ack(1 << 40),
            FromDestination::Ready,
            FromDestination::Owned,
            FromDestination::Fail("full".into()),
            FromDestination::Wait(u64::MAX),
        ];
        for message in &messages {
            let (mut out, mut reader) = (Vec::new(), Reader::default());
            message.append(&mut out);
            reader.feed(&out);
            let (kind, payload) = reader.next().unwrap().unwrap();
            assert_eq!(FromDestination::read(kind, payload).as_ref(), Ok(message));
        }
    }

    #[test]
    fn another_version_and_another_protocol_are_told_apart() {
        let mut payload = Vec::new();
        begin(&mut payload);
        put(&mut payload, &hello());
        assert!(FromSource::read(HELLO, &payload).is_ok());
        payload[8] += 1;
        let read = FromSource::read(HELLO, &payload);
        assert_eq!(read, Err(MessageError::Version(VERSION + 1)));
        payload[0] += 1;
        assert_eq!(FromSource::read(HELLO, &payload), Err(MessageError::Magic));
        assert_eq!(
            FromSource::read(COMMIT, &[0]),
            Err(MessageError::Content("commit"))
        );
        assert_eq!(FromSource::read(200, &[]), Err(MessageError::Kind(200)));
    }

    #[test]
    fn what_a_peer_says_takes_one_line_of_limited_length() {
        let mut out = Vec::new();
        let long = format!("a\n\x1b{}", "x".repeat(5000));
        FromDestination::Refuse(vec![long; 1000]).append(&mut out);
        let mut reader = Reader::default();
        reader.feed(&out);
        let (kind, payload) = reader.next().unwrap().unwrap();
        let FromDestination::Refuse(reasons) = FromDestination::read(kind, payload).unwrap() else {
            panic!("another message");
        };
        assert_eq!(reasons.len(), REASONS);
        assert!(reasons[0].len() <= REASON && reasons[0].starts_with("a  xx"));
    }
}
