//! What VM entry checks, as a table. Vol. 3C, "VM Entries".

include!(concat!(env!("OUT_DIR"), "/check_rows.rs"));

/// One condition of VM entry: a row of `vmx_checks.csv`.
///
/// Of a row of the stages controls, host and guest, `condition` must hold; of a precheck or a row on
/// MSR loading it must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckRow {
    /// Its name for all time, such as `C001`.
    pub id: &'static str,
    /// When it is checked.
    pub stage: Stage,
    /// What it is about, within its stage.
    pub group: &'static str,
    /// The condition, in words.
    pub condition: &'static str,
    /// What must be so for the row to apply; empty if it always does.
    pub applies_when: &'static str,
    /// What happens if it fails.
    pub failure: &'static str,
    /// Where sources disagree, or why the row was corrected; mostly empty.
    pub note: &'static str,
    /// `max` if a guest under the fullest profile can make it fail, else why it cannot.
    pub reach: &'static str,
}

/// The stages of VM entry, in order. Vol. 3C, "VM Entries".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Basic checks: mode, privilege, a current VMCS. Vol. 3C, "Basic VM-Entry Checks".
    Precheck,
    /// VM-execution, VM-exit and VM-entry controls. Vol. 3C, "Checks on VMX Controls".
    Controls,
    /// The host-state area. Vol. 3C, "Checks on the Host-State Area".
    Host,
    /// The guest-state area. Vol. 3C, "Checks on the Guest State Area".
    Guest,
    /// The MSR lists, and what else ends an entry late. Vol. 3C, "Loading MSRs" (VM entries).
    MsrLoad,
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;

    #[test]
    fn there_are_266_rows_with_different_names() {
        let ids: BTreeSet<_> = CHECK_ROWS.iter().map(|row| row.id).collect();
        assert_eq!((ids.len(), CHECK_ROWS.len()), (266, 266));
    }

    #[test]
    fn the_letter_of_a_name_is_that_of_its_stage() {
        for row in CHECK_ROWS {
            let letter = match row.stage {
                Stage::Precheck => "P",
                Stage::Controls => "C",
                Stage::Host => "H",
                Stage::Guest => "G",
                Stage::MsrLoad => "M",
            };
            assert!(row.id.starts_with(letter), "{}", row.id);
        }
    }
}
