//! Live migration: a run that moves away, one that arrives, and pairs of which nobody knows who owns the machine.

mod decide;
mod link;
mod receive;
mod send;
mod store;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use hypernest_migrate::live::Settings;

use crate::files;

pub use decide::{MigrateCommand, run as decide};
pub use receive::{Undecided, receive};
pub use send::{Moves, Step};
pub use store::{of_record, pass_over};

/// Where a machine goes to, or comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Over a connection.
    Address(SocketAddr),
    /// Stdin or stdout, one way.
    Standard,
    /// Through a file, one way.
    File(PathBuf),
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Address(address) => address.fmt(f),
            Peer::Standard => f.write_str("-"),
            Peer::File(path) => path.display().fmt(f),
        }
    }
}

/// An address where it looks like one (a port, or a host in numbers and a port), `-`, else a file.
///
/// # Errors
/// Never: anything can be the name of a file.
pub fn peer(text: &str) -> Result<Peer, String> {
    if text.is_empty() {
        return Err("give an address, such as 127.0.0.1:4000, a file, or - for a pipe".into());
    }
    if text == "-" {
        return Ok(Peer::Standard);
    }
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let host = match host.trim_start_matches('[').trim_end_matches(']') {
        "" | "localhost" => Some(IpAddr::from(Ipv4Addr::LOCALHOST)),
        host => host.parse().ok(),
    };
    Ok(match (host, port.parse()) {
        (Some(host), Ok(port)) => Peer::Address(SocketAddr::new(host, port)),
        _ => Peer::File(text.into()),
    })
}

/// A number that nobody guesses by accident.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// The token in a file, without the end of its line.
fn token(path: Option<&Path>) -> Result<Vec<u8>> {
    const MOST: usize = 4096;
    let Some(path) = path else {
        return Ok(Vec::new());
    };
    let mut token = files::read("token", path)?;
    while token.last().is_some_and(u8::is_ascii_whitespace) {
        token.pop();
    }
    if token.is_empty() || token.len() > MOST {
        let shown = path.display();
        bail!("cannot use the token {shown}: give a file with 1 to {MOST} bytes");
    }
    Ok(token)
}

/// Settings of either side.
fn settings(token: Vec<u8>, store: bool) -> Settings {
    Settings {
        token,
        store,
        ..Settings::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_from_files() {
        let of = |text: &str| peer(text).unwrap();
        let address = |text: &str| Peer::Address(text.parse().unwrap());
        for text in ["4000", ":4000", "localhost:4000", "127.0.0.1:4000"] {
            assert_eq!(of(text), address("127.0.0.1:4000"));
        }
        assert_eq!(of("0.0.0.0:4000"), address("0.0.0.0:4000"));
        assert_eq!(of("[::1]:4000"), address("[::1]:4000"));
        assert_eq!(of("-"), Peer::Standard);
        for text in ["./4000", "machine", "a:b", "70000", "1.2.3.4"] {
            assert_eq!(of(text), Peer::File(text.into()));
        }
        assert!(peer("").is_err());
    }
}
