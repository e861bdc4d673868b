//! The enlightened VMCS: its members, and the group of fields that each is in.

use std::fmt::Write;

use crate::csv::Table;
use crate::fields::Field;

/// `layout_evmcs_v1.csv`: the members that are fields, with what makes each be read, and the places of
/// those that are none.
pub fn generate(fields: &[Field], table: &Table) -> String {
    let mut out = String::new();
    let mut rows: Vec<_> = table
        .rows()
        .filter(|row| row.get("kind") == "field")
        .collect();
    // In the order in which an entry asks: always, by group, all groups.
    rows.sort_by_key(|row| match row.get("clean_bit") {
        "none" => 0,
        "any" | "unknown" => 17,
        bit => 1 + bit.parse::<u32>().expect("a clean bit"),
    });
    writeln!(out, "const MEMBERS: [Member; {}] = [", rows.len()).unwrap();
    for row in rows {
        let name = row.get("name");
        let encoding = row.number("encoding");
        let field = fields.iter().find(|field| field.encoding == encoding);
        let field = field.unwrap_or_else(|| panic!("{name}: no such field"));
        assert_eq!(field.short_name, name);
        let read = match row.get("clean_bit") {
            "none" => "Reread::Always".to_owned(),
            "any" | "unknown" => "Reread::UnlessAllClean".to_owned(),
            bit => format!("Reread::UnlessClean({bit})"),
        };
        writeln!(
            out,
            "    Member {{ slot: Slot::new(Field::{}, {}, {}), reread: {read} }},",
            name.to_uppercase(),
            row.number("offset"),
            row.number("width_bytes")
        )
        .unwrap();
    }
    writeln!(out, "];").unwrap();
    for row in table
        .rows()
        .filter(|row| matches!(row.get("kind"), "synthetic" | "tail"))
        // The processor has no use for these.
        .filter(|row| row.get("name") != "synthetic_controls")
    {
        writeln!(
            out,
            "const {}: u16 = {};",
            row.get("name").to_uppercase(),
            row.number("offset")
        )
        .unwrap();
    }
    out
}
