//! The slots of the built-in layouts.

use std::fmt::Write;

use crate::csv::Table;
use crate::fields::Field;

/// The generated code: a slice of slots per layout.
pub fn generate(fields: &[Field], kvm: &Table) -> String {
    let mut out = String::new();
    slots(&mut out, "KVM_SLOTS", &kvm_slots(fields, kvm));
    slots(&mut out, "HYPERNEST_SLOTS", &packed_slots(fields));
    out
}

/// KVM's layout, as its kernels up to 6.12 have it: rows that only newer kernels read as fields are
/// padding, and retired rows are nothing.
fn kvm_slots(fields: &[Field], kvm: &Table) -> Vec<(String, u32, u32)> {
    kvm.rows()
        .filter(|row| row.get("kind") == "field" && row.get("kernel").contains("6.12"))
        .map(|row| {
            let field = fields.iter().find(|f| f.encoding == row.number("encoding"));
            let field = field.unwrap_or_else(|| panic!("{}: no such field", row.get("name")));
            assert_eq!(field.short_name, row.get("name"));
            let (offset, width) = (row.number("offset"), row.number("width_bytes"));
            (field.short_name.to_uppercase(), offset, width)
        })
        .collect()
}

/// Every field behind the 12-byte header, widest first, in the order of encodings, aligned.
fn packed_slots(fields: &[Field]) -> Vec<(String, u32, u32)> {
    let mut offset = 12u32;
    let mut slots = vec![];
    for width in [8, 4, 2] {
        offset = offset.next_multiple_of(width);
        for field in fields.iter().filter(|f| f.bytes == width) {
            slots.push((field.short_name.to_uppercase(), offset, width));
            offset += width;
        }
    }
    slots
}

fn slots(out: &mut String, name: &str, slots: &[(String, u32, u32)]) {
    writeln!(out, "static {name}: [Slot; {}] = [", slots.len()).unwrap();
    for (field, offset, width) in slots {
        writeln!(out, "    Slot::new(Field::{field}, {offset}, {width}),").unwrap();
    }
    writeln!(out, "];").unwrap();
}
