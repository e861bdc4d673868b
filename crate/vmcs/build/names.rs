//! Identifiers and documentation made from the tables' texts.

/// An identifier in SCREAMING case: what is in parentheses left out, all else that is no letter or
/// digit a separator. `EPT-violation #VE` becomes `EPT_VIOLATION_VE`.
pub fn screaming(text: &str) -> String {
    let mut depth = 0;
    let mut name = String::new();
    for c in text.chars() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            c if depth == 0 && c.is_ascii_alphanumeric() => name.push(c.to_ascii_uppercase()),
            _ if depth == 0 && !name.ends_with('_') => name.push('_'),
            _ => {}
        }
    }
    name.trim_matches('_').to_owned()
}

/// Text for a doc comment, with what Markdown would take for its own escaped.
pub fn doc(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        if "[]<>*_`\\".contains(c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// Every `CONTROL.BIT` in `text`, as the path of the control and the bit.
pub fn control_ids(text: &str) -> Vec<(&'static str, u32)> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.')
        .filter_map(|word| {
            let (control, bit) = word.split_once('.')?;
            Some((control_variant(control)?, bit.parse().ok()?))
        })
        .collect()
}

/// The variant of `Control` that a table's short name means.
pub fn control_variant(short: &str) -> Option<&'static str> {
    Some(match short {
        "pin" => "Pin",
        "proc1" => "Proc1",
        "proc2" => "Proc2",
        "proc3" => "Proc3",
        "exit" => "Exit",
        "exit2" => "Exit2",
        "entry" => "Entry",
        "vmfunc" => "VmFunc",
        _ => return None,
    })
}

/// A slice of `ControlId` as an expression.
pub fn control_slice(ids: &[(&'static str, u32)]) -> String {
    let ids: Vec<String> = ids
        .iter()
        .map(|(control, bit)| format!("ControlId::new(Control::{control}, {bit})"))
        .collect();
    format!("&[{}]", ids.join(", "))
}
