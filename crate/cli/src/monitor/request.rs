//! What clients of the monitor say, and what they are told.

use serde_json::{Map, Value, json};

use crate::migrate::{Peer, peer};

/// Longest text that may name a request.
const LONGEST_ID: usize = 128;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// How the run is.
    Status,
    /// The machine stands still from now on.
    Pause,
    /// It runs again.
    Resume,
    /// The machine moves to another place.
    Migrate {
        /// Where to.
        to: Peer,
        /// Bytes per second at most.
        bandwidth: Option<u64>,
        /// Milliseconds that it may stand still.
        downtime: Option<u64>,
    },
    /// VM exits by reason.
    QueryExits,
    /// Regions in memory by layout.
    QueryRegions,
    /// The run ends.
    Stop,
}

/// The commands, by name.
pub const NAMES: [&str; 7] = [
    "status",
    "pause",
    "resume",
    "migrate",
    "query-exits",
    "query-regions",
    "stop",
];

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What the client calls it: null, a number or a short text.
    pub id: Value,
    /// What it asks for.
    pub command: Command,
}

/// Why something is not done: a stable word for programs, and a line for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The word.
    pub code: &'static str,
    /// The line.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: &'static str, message: impl Into<String>) -> Refusal {
        let message = message.into().replace('\n', " ");
        Refusal { code, message }
    }
}

/// The answer to a request.
pub fn answer(id: &Value, outcome: Result<Value, Refusal>) -> Value {
    match outcome {
        Ok(result) => json!({ "id": id, "ok": result }),
        Err(refusal) => {
            json!({ "id": id, "error": { "code": refusal.code, "message": refusal.message } })
        }
    }
}

/// Reads a line; on failure with the request's name, as far as it can be told.
pub fn parse(line: &[u8]) -> Result<Request, (Value, Refusal)> {
    let unnamed = |code, message: String| (Value::Null, Refusal::new(code, message));
    let text = std::str::from_utf8(line)
        .map_err(|_| unnamed("bad-json", "the line is not UTF-8; send JSON".into()))?;
    let value: Value = serde_json::from_str(text)
        .map_err(|error| unnamed("bad-json", format!("the line is not JSON: {error}")))?;
    let Value::Object(mut fields) = value else {
        let message = "a request is an object, such as {\"command\":\"status\"}";
        return Err(unnamed("bad-request", message.into()));
    };
    let id = fields.remove("id").unwrap_or(Value::Null);
    let fits = match &id {
        Value::Null | Value::Number(_) => true,
        Value::String(text) => text.len() <= LONGEST_ID,
        _ => false,
    };
    if !fits {
        let message = format!("id is a number or a text of at most {LONGEST_ID} bytes");
        return Err(unnamed("bad-request", message));
    }
    match command(fields) {
        Ok(command) => Ok(Request { id, command }),
        Err(refusal) => Err((id, refusal)),
    }
}

fn command(mut fields: Map<String, Value>) -> Result<Command, Refusal> {
    let name = match fields.remove("command") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(bad("command is a text")),
        None => return Err(bad("there is no command; give one, such as \"status\"")),
    };
    let command = match name.as_str() {
        "status" => Command::Status,
        "pause" => Command::Pause,
        "resume" => Command::Resume,
        "migrate" => Command::Migrate {
            to: to(&mut fields)?,
            bandwidth: number(&mut fields, "bandwidth")?,
            downtime: number(&mut fields, "downtime")?,
        },
        "query-exits" => Command::QueryExits,
        "query-regions" => Command::QueryRegions,
        "stop" => Command::Stop,
        _ => {
            let known = NAMES.join(", ");
            let message = format!("there is no command {name:?}; the commands are {known}");
            return Err(Refusal::new("unknown-command", message));
        }
    };
    match fields.keys().next() {
        Some(more) => Err(bad(format!("{name} takes no {more:?}"))),
        None => Ok(command),
    }
}

/// Where to: an address, or the absolute path of a file, as the run may be in another folder than the client.
fn to(fields: &mut Map<String, Value>) -> Result<Peer, Refusal> {
    let wrong = || bad("give to, such as \"127.0.0.1:4000\", or the absolute path of a file");
    let given = fields.remove("to");
    let text = given.as_ref().and_then(Value::as_str).ok_or_else(wrong)?;
    match peer(text).map_err(bad)? {
        Peer::File(path) if !path.is_absolute() => Err(wrong()),
        Peer::Standard => Err(wrong()),
        other => Ok(other),
    }
}

/// A number that a request may give.
fn number(fields: &mut Map<String, Value>, name: &str) -> Result<Option<u64>, Refusal> {
    match fields.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(given) => match given.as_u64() {
            Some(number) if number > 0 => Ok(Some(number)),
            _ => Err(bad(format!("{name} is a number above 0"))),
        },
    }
}

fn bad(message: impl Into<String>) -> Refusal {
    Refusal::new("bad-request", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &[u8]) -> (Value, &'static str) {
        let (id, refusal) = parse(line).unwrap_err();
        assert!(!refusal.message.contains('\n'));
        (id, refusal.code)
    }

    #[test]
    fn every_command_has_its_name() {
        for name in NAMES {
            let more = match name {
                "migrate" => ",\"to\":\"4000\",\"downtime\":5",
                _ => "",
            };
            let line = format!("{{\"command\":\"{name}\",\"id\":7{more}}}");
            let request = parse(line.as_bytes());
            assert_eq!(request.map(|request| request.id), Ok(json!(7)), "{name}");
        }
    }

    #[test]
    fn bad_lines_are_refused_with_the_name_they_have() {
        assert_eq!(refused(b""), (Value::Null, "bad-json"));
        assert_eq!(refused(b"\xff\xfe"), (Value::Null, "bad-json"));
        assert_eq!(refused(b"{"), (Value::Null, "bad-json"));
        assert_eq!(refused("[".repeat(10_000).as_bytes()).1, "bad-json");
        assert_eq!(refused(b"[]"), (Value::Null, "bad-request"));
        assert_eq!(refused(b"{}"), (Value::Null, "bad-request"));
        assert_eq!(refused(br#"{"id":1}"#), (json!(1), "bad-request"));
        let unknown = br#"{"id":"a","command":"dance\n"}"#;
        assert_eq!(refused(unknown), (json!("a"), "unknown-command"));
        let more = br#"{"id":2,"command":"pause","for":1}"#;
        assert_eq!(refused(more), (json!(2), "bad-request"));
        assert_eq!(refused(br#"{"id":[],"command":"stop"}"#).1, "bad-request");
        let long = format!(r#"{{"id":"{}","command":"stop"}}"#, "x".repeat(200));
        assert_eq!(refused(long.as_bytes()), (Value::Null, "bad-request"));
    }
}
