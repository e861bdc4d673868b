//! A row in words, for reports.

use alloc::format;
use alloc::string::String;

use super::{CHECK_ROWS, EntryCheck, EntryCtx, Failure};

/// The row's id, its condition in words, where the SDM states it, and the values that it read.
pub fn explain(check: &EntryCheck, entry: &EntryCtx) -> String {
    let mut text = String::from(check.id);
    if let Some(row) = CHECK_ROWS.iter().find(|row| row.id == check.id) {
        text += &format!(" {}", row.condition);
        if !row.applies_when.is_empty() {
            text += &format!(" (when {})", row.applies_when);
        }
    }
    text += &format!(": {}. {}.", outcome(check.failure), check.cite);
    for field in check.fields {
        text.push(' ');
        text.extend(field.short_name().chars().map(|c| c.to_ascii_uppercase()));
        text += &format!("={:#x}", entry.vmcs.get(*field));
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
