//! Machines as values: kept in files, replayed, and moved while they run.
//!
//! Knows the machine through its public interface and bytes through traits: no files, sockets,
//! threads or clocks. Those who call it bring them.
//!
//! ```
//! use hypernest_machine::{Machine, Until};
//! use hypernest_migrate::{Snapshot, snapshot};
//!
//! let spin: &[u8] = &[0xeb, 0xfe];
//! let mut machine = Machine::builder().memory(1 << 20).image(spin).raw().build()?;
//! machine.run(&Until::tick(1000))?;
//! let mut file = Vec::new();
//! snapshot::write(&mut machine, &mut file, &Default::default())?;
//!
//! // The limit is for files from strangers.
//! let limit = 1 << 30;
//! let mut resumed = Snapshot::open(&file[..])?.build(limit, Vec::new(), |builder| builder)?;
//! machine.run(&Until::tick(2000))?;
//! resumed.run(&Until::tick(2000))?;
//! assert_eq!(machine.state_hash()?, resumed.state_hash()?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod hello;
pub mod live;
pub mod pages;
pub mod record;
pub mod section;
pub mod snapshot;
pub mod state;

pub use snapshot::Snapshot;
pub use state::{state_from_bytes, state_to_bytes};
