//! The board of Hypernest. See ARCHITECTURE.md.

pub mod boot;
