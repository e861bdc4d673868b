//! VM-instruction errors.

use core::fmt;

include!(concat!(env!("OUT_DIR"), "/instruction_errors.rs"));

/// The error number of a VMX instruction that failed with a current VMCS (VMfailValid).
///
/// Vol. 3C, "VM-Instruction Error Numbers".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstructionError(pub u32);

impl InstructionError {
    /// Every assigned number.
    pub fn all() -> impl Iterator<Item = Self> {
        ERRORS.iter().map(|&(error, _)| error)
    }

    /// What went wrong.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        let row = ERRORS.iter().find(|(error, _)| *error == self);
        row.map_or("not assigned", |&(_, meaning)| meaning)
    }
}

impl fmt::Debug for InstructionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InstructionError({}: {})", self.0, self.meaning())
    }
}

impl fmt::Display for InstructionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, self.meaning())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_1_to_28_but_for_three() {
        let numbers = (1..=28).filter(|n| ![14, 21, 27].contains(n));
        assert!(InstructionError::all().map(|error| error.0).eq(numbers));
    }

    #[test]
    fn meanings_are_those_of_the_table() {
        assert_eq!(InstructionError::ENTRY_CONTROLS.0, 7);
        assert_eq!(
            InstructionError(7).meaning(),
            "VM entry with bad control fields"
        );
        assert_eq!(InstructionError(14).meaning(), "not assigned");
        assert_eq!(InstructionError(u32::MAX).meaning(), "not assigned");
    }
}
