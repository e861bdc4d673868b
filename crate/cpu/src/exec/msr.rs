//! Model-specific registers.

/// Whether every byte of a PAT is a memory type (Vol. 3A, "IA32_PAT MSR").
pub(crate) fn pat_is_valid(pat: u64) -> bool {
    pat.to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7))
}
