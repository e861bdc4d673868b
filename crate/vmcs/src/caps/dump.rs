//! Capabilities from text.

use alloc::string::String;

use super::Caps;

/// A dump of capability MSRs cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {kind}")]
pub struct DumpError {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub kind: DumpErrorKind,
}

/// What is wrong with a line of a dump.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DumpErrorKind {
    /// It names no VMX capability MSR.
    #[error("no VMX capability MSR: {0}")]
    Msr(String),
}

impl Caps {
    /// Reads a dump. TODO
    ///
    /// # Errors
    ///
    /// If a line is not understood.
    pub fn from_dump(text: &str) -> Result<Self, DumpError> {
        let _ = text;
        Ok(Self::default())
    }
}
