//! `--monitor PATH`: a Unix socket on which programs look at a run and steer it, in lines of JSON.
//!
//! [`server`] has the socket and a thread for each connection, which does all reading and writing, so that no client
//! keeps the machine waiting. Requests wait in a queue until the run looks at it, between two slices. docs/monitor.md
//! describes the protocol.

mod commands;
mod request;
#[cfg(unix)]
mod server;

pub use commands::{Attended, attend};
#[cfg(unix)]
pub use server::Server as Monitor;

/// Version of the protocol, which the greeting tells. It grows when what there was changes its meaning.
const VERSION: u32 = 1;

/// There are no Unix sockets on this system.
#[cfg(not(unix))]
pub enum Monitor {}

#[cfg(not(unix))]
impl Monitor {
    /// Never.
    pub fn open(_: &std::path::Path) -> anyhow::Result<Monitor> {
        anyhow::bail!("--monitor needs Unix sockets, which this system does not have")
    }

    fn ended(&self) -> bool {
        match *self {}
    }

    fn next(&mut self) -> Option<(request::Request, Reply)> {
        match *self {}
    }
}

/// Where the answer to a request goes.
#[cfg(not(unix))]
enum Reply {}

#[cfg(not(unix))]
impl Reply {
    fn send(self, _: serde_json::Value) {
        match self {}
    }
}
