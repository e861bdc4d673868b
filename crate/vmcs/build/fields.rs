//! `fields.csv`: the constants of `Field` and the tables behind its methods.

use std::fmt::Write;

use crate::csv::Table;
use crate::names::{control_ids, control_slice, doc};

/// A row of `fields.csv`, as far as code is made from it.
pub struct Field {
    pub encoding: u32,
    pub name: String,
    pub short_name: String,
    /// Bytes in a layout that wastes none.
    pub bytes: u32,
    width: &'static str,
    kind: &'static str,
    exists: String,
    exists_if: String,
}

/// Indexes below this fit the decoding table.
const INDEXES: u32 = 64;

/// Reads and checks the table.
pub fn read(table: &Table) -> Vec<Field> {
    let fields: Vec<Field> = table
        .rows()
        .map(|row| {
            let encoding = row.number("encoding");
            let (width, bytes) = match row.get("width") {
                "16" => ("Bits16", 2),
                "64" => ("Bits64", 8),
                "32" => ("Bits32", 4),
                "natural" => ("Natural", 8),
                other => panic!("{encoding:#06x}: width {other}"),
            };
            let kind = match row.get("type") {
                "control" => "Control",
                "exit_info" => "ExitInfo",
                "guest_state" => "GuestState",
                "host_state" => "HostState",
                other => panic!("{encoding:#06x}: type {other}"),
            };
            assert_eq!(encoding & !0x6FFE, 0, "{encoding:#06x}: reserved bits");
            assert!(row.number("index") < INDEXES, "{encoding:#06x}: index");
            assert_eq!(
                encoding >> 1 & 0x1FF,
                row.number("index"),
                "{encoding:#06x}"
            );
            let exists_if = row.get("exists_if");
            Field {
                encoding,
                name: row.get("sdm_name").to_owned(),
                short_name: row.get("short_name").to_owned(),
                bytes,
                width,
                kind,
                exists: exists(exists_if),
                exists_if: exists_if.to_owned(),
            }
        })
        .collect();
    assert!(fields.len() < 255, "an index is a byte and 255 means none");
    assert!(
        fields.is_sorted_by_key(|f| f.encoding),
        "order is that of encodings"
    );
    fields
}

/// The condition under which a field exists, as an expression of type `Exists`.
fn exists(text: &str) -> String {
    if text.starts_with("always") {
        return "Exists::Always".into();
    }
    if let Some(count) = text.strip_prefix("IA32_VMX_MISC[24:16] > ") {
        return format!("Exists::Cr3Targets({count})");
    }
    if text.starts_with("APX") {
        return "Exists::Unknown".into();
    }
    // The table writes the condition of FRED out once.
    let text = match text {
        "FRED" => "entry.23, exit2.0 or exit2.1",
        text => text,
    };
    let ids = control_ids(text);
    assert!(!ids.is_empty(), "a condition nobody can test: {text}");
    format!("Exists::WithAny({})", control_slice(&ids))
}

/// The generated code.
pub fn generate(fields: &[Field]) -> String {
    let mut out = String::from("impl Field {\n");
    for (index, field) in fields.iter().enumerate() {
        let width = match field.width {
            "Natural" => "natural width".to_owned(),
            other => format!("{} bits", other.trim_start_matches("Bits")),
        };
        writeln!(
            out,
            "    /// {}, encoding {:04X}H, {width}; exists: {}. Vol. 3D, \"Field Encoding in VMCS\".\n    \
             pub const {}: Self = Self({index});",
            doc(&field.name),
            field.encoding,
            doc(&field.exists_if),
            field.short_name.to_uppercase(),
        )
        .unwrap();
    }
    writeln!(out, "}}\n\nconst COUNT: usize = {};", fields.len()).unwrap();

    writeln!(out, "\nstatic INFO: [Info; COUNT] = [").unwrap();
    for f in fields {
        writeln!(
            out,
            "    Info {{ encoding: {:#06x}, name: {:?}, short_name: {:?}, exists: {} }},",
            f.encoding, f.name, f.short_name, f.exists,
        )
        .unwrap();
    }
    writeln!(out, "];").unwrap();

    let mut by_encoding = [255u8; 16 * INDEXES as usize];
    for (index, field) in fields.iter().enumerate() {
        let class = (field.encoding >> 13 & 3) << 2 | field.encoding >> 10 & 3;
        let place = class * INDEXES + (field.encoding >> 1 & 0x1FF);
        by_encoding[place as usize] = index as u8;
    }
    writeln!(
        out,
        "\nconst INDEXES: u32 = {INDEXES};\n\
         static BY_ENCODING: [u8; {}] = {by_encoding:?};",
        by_encoding.len()
    )
    .unwrap();
    // What the fields' own columns say, for a test to hold against the encodings.
    writeln!(
        out,
        "\n#[cfg(test)]\nconst TYPES: [(Width, Kind); COUNT] = ["
    )
    .unwrap();
    for f in fields {
        writeln!(out, "    (Width::{}, Kind::{}),", f.width, f.kind).unwrap();
    }
    writeln!(out, "];").unwrap();
    out
}
