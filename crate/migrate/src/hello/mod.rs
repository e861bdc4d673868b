//! What two sides tell each other before a machine moves: what it needs of the place it goes to ([`Offer`]), and what
//! a place can take ([`Host`]). [`refusals()`] has every reason why the one does not fit the other.
//!
//! All that a guest could see counts: a machine that comes from a place with more than there is here would execute
//! what does not exist. What a guest can not see, such as the layout in which VMCS regions are written from now on, is
//! the destination's choice as long as nothing is lost by it.

mod host;
mod hyperv;
mod offer;
mod reason;
mod refusals;
#[cfg(test)]
mod tests;

pub use host::{Choices, Host, HostCpu};
pub use offer::{Cpu, FeatureSeen, Format, LayoutSeen, MsrSeen, Offer, RegionsSeen, VmxSeen};
pub use reason::Reason;
pub use refusals::refusals;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of [`Offer`] and [`Host`] as bytes. Others are refused.
pub const HELLO_VERSION: u16 = 1;

/// Most bytes of one of them.
pub const MAX_HELLO: usize = 512 << 10;

/// Most characters of a name.
const MAX_NAME: usize = 128;
/// Most entries of a list.
const MAX_ENTRIES: usize = 1024;
/// Most bytes of the table of a layout.
const MAX_TABLE: usize = 64 << 10;

/// Bytes that are no [`Offer`] or [`Host`] of this version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// More than [`MAX_HELLO`].
    #[error("a hello of {0} bytes; at most {MAX_HELLO} are taken")]
    Long(usize),
    /// Of another version.
    #[error(
        "the other side's hello has version {0}; this build speaks {HELLO_VERSION}: use the same build on both sides"
    )]
    Version(u16),
    /// The bytes end early, go on too long, or are no such value.
    #[error("the other side's hello is damaged")]
    Damaged,
    /// A list, a name or a table that is too long, or a name that cannot be printed.
    #[error("the other side's hello has {0} that cannot be")]
    Part(&'static str),
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    let bytes = HELLO_VERSION.to_le_bytes().to_vec();
    // Writing to memory fails for no such type.
    postcard::to_extend(value, bytes).unwrap_or_default()
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, HelloError> {
    if bytes.len() > MAX_HELLO {
        return Err(HelloError::Long(bytes.len()));
    }
    let (version, body) = bytes.split_first_chunk().ok_or(HelloError::Damaged)?;
    let version = u16::from_le_bytes(*version);
    if version != HELLO_VERSION {
        return Err(HelloError::Version(version));
    }
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(HelloError::Damaged),
    }
}

/// A name from outside: short, and safe to print.
fn name(text: &str) -> Result<(), HelloError> {
    let printable = |c: char| !c.is_control();
    match text.len() <= MAX_NAME && text.chars().all(printable) {
        true => Ok(()),
        false => Err(HelloError::Part("a name")),
    }
}

/// A list from outside.
fn list<T>(entries: &[T], check: impl Fn(&T) -> Result<(), HelloError>) -> Result<(), HelloError> {
    if entries.len() > MAX_ENTRIES {
        return Err(HelloError::Part("a list"));
    }
    entries.iter().try_for_each(check)
}
