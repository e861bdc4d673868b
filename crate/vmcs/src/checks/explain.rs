//! A row in words, for reports.

use alloc::format;
use alloc::string::String;

use super::{CHECK_ROWS, EntryCheck, EntryCtx, Failure};

/// The row's id, its condition in words, where the SDM states it, and the values that it read.
pub fn explain(check: &EntryCheck, entry: &EntryCtx) -> String {
    explain_values(check, |n| entry.vmcs.get(check.fields[n]))
}

/// As [`explain`], with the value of `check.fields[n]` from `value(n)`: for whoever kept the values and
/// no longer has the VMCS.
pub fn explain_values(check: &EntryCheck, value: impl Fn(usize) -> u64) -> String {
    let mut text = String::from(check.id);
    if let Some(row) = CHECK_ROWS.iter().find(|row| row.id == check.id) {
        text += &format!(" {}", row.condition);
        if !row.applies_when.is_empty() {
            text += &format!(" (when {})", row.applies_when);
        }
    }
    text += &format!(": {}. {}.", outcome(check.failure), check.cite);
    for (n, field) in check.fields.iter().enumerate() {
        text.push(' ');
        text.extend(field.short_name().chars().map(|c| c.to_ascii_uppercase()));
        text += &format!("={:#x}", value(n));
    }
    text
}

fn outcome(failure: Failure) -> String {
    match failure {
        Failure::VmfailInvalid => "VMfailInvalid".into(),
        Failure::VmfailValid(error) => format!("VMfailValid {error}"),
        Failure::Exit33 { qualification } => format!("exit 33 qualification {qualification}"),
        Failure::Exit34 => "exit 34".into(),
        Failure::Unchecked => "not checked by the processor".into(),
    }
}
