//! Outside judges for the processor: the same instruction from the same state on several engines,
//! and a comparison of everything an instruction can change. Tests only; nothing ships from here.
//!
//! A [`Case`] is one instruction with its registers and memory. [`Host`] runs it on the host's own
//! processor, [`Ours`] on ours. Cases come from [`generate`] or from text ([`text`]); results that
//! the SDM leaves undefined are named in one table, [`masks`].

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod campaign;
pub mod case;
mod emit;
pub mod forms;
pub mod generate;
pub mod judge;
pub mod layout;
pub mod masks;
pub mod nest;
mod ours;
mod rng;
pub mod text;
mod values;
pub mod wild;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod elf;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod host;

pub use case::{Case, Event, Mode, Outcome, UserState};
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use host::Host;
pub use ours::Ours;
pub use rng::Rng;
