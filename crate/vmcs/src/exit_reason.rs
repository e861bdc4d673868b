//! Basic exit reasons.

use core::fmt;

include!(concat!(env!("OUT_DIR"), "/exit_reasons.rs"));

/// A basic exit reason: bits 15:0 of the exit reason. Vol. 3C, "Basic VM-Exit Information".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExitReason(pub u16);

/// What a VM exit for a reason reports: a row of `exit_reasons.csv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitReasonInfo {
    /// The reason.
    pub reason: ExitReason,
    /// One word for tables and options: the name of its constant.
    pub ident: &'static str,
    /// The manual's name.
    pub name: &'static str,
    /// What happened, in a few words.
    pub description: &'static str,
    /// What the exit qualification says; nothing where it is 0.
    pub qualification: Option<&'static str>,
    /// Whether the VM-exit instruction length is defined.
    pub instruction_length: Validity,
    /// Whether the VM-exit instruction information is defined.
    pub instruction_information: Validity,
    /// It is a failure of VM entry: bit 31 of the exit reason is set.
    pub entry_failure: bool,
    /// The controls and events that lead to it, in words.
    pub caused_by: &'static str,
}

/// When a field of exit information is defined. Vol. 3C, "Information for VM Exits Due to
/// Instruction Execution".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// On every such exit.
    Yes,
    /// Never.
    No,
    /// If the exit is due to, or happens during the delivery of, a software interrupt or exception.
    Event,
    /// For some of the instructions or events that lead to the exit.
    Sometimes,
    /// The manual does not say.
    Unlisted,
}

impl ExitReason {
    /// Every reason the table has.
    #[must_use]
    pub fn all() -> &'static [ExitReasonInfo] {
        REASONS
    }

    /// What the table says about it; nothing for a number it does not have.
    #[must_use]
    pub fn info(self) -> Option<&'static ExitReasonInfo> {
        let place = REASONS.binary_search_by_key(&self, |row| row.reason);
        place.ok().map(|place| &REASONS[place])
    }

    /// One word for tables and options, or `UNKNOWN`.
    #[must_use]
    pub fn ident(self) -> &'static str {
        self.info().map_or("UNKNOWN", |row| row.ident)
    }

    /// The reason with this [`ident`](Self::ident); case does not matter, `-` stands for `_`.
    #[must_use]
    pub fn from_ident(text: &str) -> Option<Self> {
        let same = |ident: &str| {
            let letters = text.bytes().map(|byte| match byte {
                b'-' => b'_',
                other => other.to_ascii_uppercase(),
            });
            letters.eq(ident.bytes())
        };
        let row = REASONS.iter().find(|row| same(row.ident));
        row.map(|row| row.reason)
    }

    /// The manual's name, or `unknown`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.info().map_or("unknown", |row| row.name)
    }

    /// What happened, in a few words.
    #[must_use]
    pub fn description(self) -> &'static str {
        self.info()
            .map_or("a reason that is in no table", |row| row.description)
    }
}

impl fmt::Debug for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.info() {
            Some(row) => write!(f, "ExitReason({}: {})", self.0, row.name),
            None => write!(f, "ExitReason({})", self.0),
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    #[test]
    fn reasons_are_in_order_and_known() {
        assert_eq!(ExitReason::all().len(), 80);
        assert!(REASONS.is_sorted_by_key(|row| row.reason));
        for row in REASONS {
            assert_eq!(row.reason.info(), Some(row));
        }
    }

    #[test]
    fn unknown_numbers_are_values_like_others() {
        assert_eq!(ExitReason(999).name(), "unknown");
        assert_eq!(format!("{:?}", ExitReason(999)), "ExitReason(999)");
        assert_eq!(format!("{}", ExitReason::CPUID), "10 CPUID");
    }

    #[test]
    fn every_reason_is_found_by_its_word() {
        for row in REASONS {
            let lower = row.ident.to_ascii_lowercase().replace('_', "-");
            assert_eq!(ExitReason::from_ident(&lower), Some(row.reason));
            assert_eq!(row.reason.ident(), row.ident);
        }
        assert_eq!(ExitReason::from_ident("EPT"), None);
        assert_eq!(ExitReason(999).ident(), "UNKNOWN");
    }

    #[test]
    fn entry_failures_are_33_34_and_41() {
        let failures = REASONS.iter().filter(|row| row.entry_failure);
        assert!(failures.map(|row| row.reason.0).eq([33, 34, 41]));
    }

    #[test]
    fn rows_say_what_an_exit_reports() {
        let io = ExitReason::IO_INSTRUCTION.info().unwrap();
        assert_eq!(io.instruction_length, Validity::Yes);
        assert_eq!(io.instruction_information, Validity::Sometimes);
        assert!(io.qualification.is_some());
        assert_eq!(ExitReason::CPUID.info().unwrap().qualification, None);
    }
}
