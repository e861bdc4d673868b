//! A CSV reader as small as the tables need: quoted cells, doubled quotes, a header line.

use std::collections::HashMap;
use std::fs;

/// One table: its rows, with the cells found by column name.
pub struct Table {
    name: String,
    columns: HashMap<String, usize>,
    rows: Vec<Vec<String>>,
}

/// One row of a [`Table`].
pub struct Row<'a> {
    table: &'a Table,
    cells: &'a [String],
}

impl Table {
    /// Reads `data/NAME.csv`. Whatever is wrong ends the build.
    pub fn read(name: &str) -> Self {
        let path = format!("data/{name}.csv");
        println!("cargo::rerun-if-changed={path}");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let mut rows = parse(&text);
        let head = rows.remove(0);
        for (index, row) in rows.iter().enumerate() {
            assert_eq!(row.len(), head.len(), "{path}: row {}", index + 2);
        }
        Self {
            name: path,
            columns: head.into_iter().enumerate().map(|(i, c)| (c, i)).collect(),
            rows,
        }
    }

    /// The rows, in file order.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|cells| Row { table: self, cells })
    }
}

impl<'a> Row<'a> {
    /// The cell of `column`.
    pub fn get(&self, column: &str) -> &'a str {
        let index = self.table.columns.get(column);
        let index = index.unwrap_or_else(|| panic!("{}: no column {column}", self.table.name));
        &self.cells[*index]
    }

    /// The cell of `column` as a number, hexadecimal after `0x`.
    pub fn number(&self, column: &str) -> u32 {
        let cell = self.get(column);
        let parsed = match cell.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => cell.parse(),
        };
        parsed.unwrap_or_else(|_| panic!("{}: {column}: not a number: {cell}", self.table.name))
    }
}

fn parse(text: &str) -> Vec<Vec<String>> {
    let mut rows = vec![];
    let mut row = vec![];
    let mut cell = String::new();
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                cell.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => row.push(std::mem::take(&mut cell)),
            '\r' if !quoted => {}
            '\n' if !quoted => {
                row.push(std::mem::take(&mut cell));
                rows.push(std::mem::take(&mut row));
            }
            c => cell.push(c),
        }
    }
    assert!(!quoted, "a quote is never closed");
    if !cell.is_empty() || !row.is_empty() {
        row.push(cell);
        rows.push(row);
    }
    rows
}
