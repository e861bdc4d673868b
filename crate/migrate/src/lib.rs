//! Machines as values: kept in files, replayed, and moved while they run.
//!
//! Knows the machine through its public interface and bytes through traits: no files, sockets,
//! threads or clocks. Those who call it bring them.

pub mod hello;
pub mod live;
pub mod pages;
pub mod record;
pub mod section;
pub mod snapshot;
pub mod state;

pub use snapshot::Snapshot;
pub use state::{state_from_bytes, state_to_bytes};
