//! The tables of `data/` as text, read here once more and without the library: what it is judged by.

use std::collections::BTreeMap;

/// A row: its cells by column.
pub type Row = BTreeMap<&'static str, String>;

/// The rows of a table of `data/`.
#[macro_export]
macro_rules! table {
    ($name:literal) => {
        tables::rows(include_str!(concat!("../data/", $name, ".csv")))
    };
}

/// The rows of a text: cells may be quoted.
pub fn rows(text: &'static str) -> Vec<Row> {
    let mut lines = text.lines();
    let head: Vec<&str> = lines.next().unwrap().split(',').collect();
    lines
        .map(|line| {
            let cells = cells(line);
            assert_eq!(cells.len(), head.len(), "{line}");
            head.iter().copied().zip(cells).collect()
        })
        .collect()
}

fn cells(line: &str) -> Vec<String> {
    let mut cells = vec![String::new()];
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                cells.last_mut().unwrap().push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => cells.push(String::new()),
            c => cells.last_mut().unwrap().push(c),
        }
    }
    cells
}

/// A number, hexadecimal after `0x`.
pub fn number(text: &str) -> u32 {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .unwrap_or_else(|_| panic!("{text} is no number"))
}
