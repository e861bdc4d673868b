//! The built-in layouts: `layouts.csv` says what each is called and which rows of which table are
//! its slots; two of our own are computed from the fields.

use std::collections::HashSet;
use std::fmt::Write;

use crate::csv::{Row, Table};
use crate::fields::Field;

/// Field, offset, width in bytes, whether its bits are rotated.
type Place = (String, u32, u32, bool);

/// The generated code: a static for each layout, and the list of all of them.
pub fn generate(fields: &[Field], layouts: &Table) -> String {
    let mut out = String::new();
    let mut names = vec![];
    for row in layouts.rows() {
        let name = row.get("name").to_uppercase().replace(['-', '.'], "_");
        let places = table_slots(fields, &row);
        slots(&mut out, &name, &places);
        let launch = match row.get("launch_state") {
            "" => "None".to_owned(),
            text => format!("Some({})", launch_state(text)),
        };
        layout(
            &mut out,
            (&name, row.get("name"), row.get("title")),
            &row.get("revisions").replace(' ', ", "),
            &launch,
            &yields(fields, &row),
        );
        names.push(name);
    }
    let ours = [
        (
            "HYPERNEST",
            "hypernest",
            "Ours: a slot for every field",
            *b"HYPN",
            packed_slots(fields),
            8,
        ),
        {
            let (places, launch) = enlightened_slots(fields);
            (
                "HYPERNEST_EVMCS",
                "hypernest-evmcs",
                "Ours: the enlightened VMCS's offsets, and behind them what it lacks",
                *b"HYEV",
                places,
                launch,
            )
        },
    ];
    for (name, text, title, id, places, launch) in ours {
        slots(&mut out, name, &places);
        layout(
            &mut out,
            (name, text, title),
            &format!("{:#x}", u32::from_le_bytes(id)),
            &format!("Some({})", launch_state(&format!("{launch} 4 0 1"))),
            "",
        );
        names.push(name.to_owned());
    }
    let list: String = names.iter().map(|name| format!("&{name}, ")).collect();
    writeln!(
        out,
        "static BUILT_IN: [&Layout; {}] = [{list}];",
        names.len()
    )
    .unwrap();
    out
}

fn layout(
    out: &mut String,
    (name, text, title): (&str, &str, &str),
    revisions: &str,
    launch: &str,
    yields: &str,
) {
    writeln!(
        out,
        "static {name}: Layout = Layout::fixed({text:?}, {title:?}, &[{revisions}], {launch}, \
         &{name}_SLOTS, &[{yields}]);"
    )
    .unwrap();
}

/// `offset width clear launched [mask]` as a `LaunchState`.
fn launch_state(text: &str) -> String {
    let numbers: Vec<u32> = text
        .split(' ')
        .map(|n| n.parse().unwrap_or_else(|_| panic!("launch state {text}")))
        .collect();
    let [offset, width, clear, launched, rest @ ..] = &numbers[..] else {
        panic!("launch state {text}");
    };
    let mask = rest.first().copied().unwrap_or(u32::MAX);
    format!(
        "LaunchState {{ offset: {offset}, width: {width}, clear: {clear}, launched: {launched}, \
         mask: {mask:#x} }}"
    )
}

fn find<'a>(fields: &'a [Field], encoding: u32, name: &str) -> &'a Field {
    let field = fields.iter().find(|f| f.encoding == encoding);
    let field = field.unwrap_or_else(|| panic!("{name}: no such field"));
    assert_eq!(field.short_name, name);
    field
}

/// The rows of the layout's table that are slots, but for those that yield theirs to another field.
fn table_slots(fields: &[Field], layout: &Row) -> Vec<Place> {
    let table = Table::read(layout.get("table"));
    let yields: HashSet<&str> = layout.get("yields").split_whitespace().collect();
    let rotated = layout.get("rotated");
    rows(layout, &table)
        .filter(|row| !yields.contains(row.get("name")))
        .map(|row| {
            let name = row.get("name");
            let field = find(fields, row.number("encoding"), name);
            let (offset, width) = place(layout, &row);
            let rotated = !rotated.is_empty() && name.ends_with(rotated);
            (field.short_name.to_uppercase(), offset, width, rotated)
        })
        .collect()
}

fn rows<'a>(layout: &Row<'a>, table: &'a Table) -> impl Iterator<Item = Row<'a>> {
    let only = layout.get("only").split_once('~');
    table
        .rows()
        .filter(|row| row.get("kind") == "field")
        .filter(move |row| only.is_none_or(|(column, text)| row.get(column).contains(text)))
}

fn place(layout: &Row, row: &Row) -> (u32, u32) {
    (
        row.number(layout.get("offset")),
        row.number(layout.get("width")),
    )
}

/// The pairs of `yields`: a field whose bytes belong to another one, and that other one.
fn yields(fields: &[Field], layout: &Row) -> String {
    let table = Table::read(layout.get("table"));
    let slots: Vec<_> = rows(layout, &table).collect();
    let mut out = String::new();
    for name in layout.get("yields").split_whitespace() {
        let row = slots.iter().find(|row| row.get("name") == name);
        let row = row.unwrap_or_else(|| panic!("{name} has no slot"));
        let offset = place(layout, row).0;
        let winner = slots
            .iter()
            .find(|other| other.get("name") != name && place(layout, other).0 == offset)
            .unwrap_or_else(|| panic!("{name} shares no slot"));
        let loser = find(fields, row.number("encoding"), name);
        let winner = find(fields, winner.number("encoding"), winner.get("name"));
        write!(
            out,
            "(Field::{}, Field::{}), ",
            loser.short_name.to_uppercase(),
            winner.short_name.to_uppercase()
        )
        .unwrap();
    }
    out
}

/// Every field behind the 12-byte header, widest first, in the order of encodings, aligned.
fn packed_slots(fields: &[Field]) -> Vec<Place> {
    let mut slots = vec![];
    pack(fields.iter().collect(), 12, &mut slots);
    slots
}

/// The slots of the enlightened VMCS, the launch state behind them, then every field they lack.
fn enlightened_slots(fields: &[Field]) -> (Vec<Place>, u32) {
    let table = Table::read("layout_evmcs_v1");
    let mut slots: Vec<Place> = table
        .rows()
        .filter(|row| row.get("kind") == "field")
        .map(|row| {
            let field = find(fields, row.number("encoding"), row.get("name"));
            let (offset, width) = (row.number("offset"), row.number("width_bytes"));
            (field.short_name.to_uppercase(), offset, width, false)
        })
        .collect();
    let there: HashSet<String> = slots.iter().map(|slot| slot.0.clone()).collect();
    let lacking = fields
        .iter()
        .filter(|f| !there.contains(&f.short_name.to_uppercase()))
        .collect();
    let launch = table
        .rows()
        .find(|row| row.get("kind") == "tail")
        .expect("the table has an end")
        .number("offset");
    pack(lacking, launch + 4, &mut slots);
    (slots, launch)
}

fn pack(fields: Vec<&Field>, mut offset: u32, slots: &mut Vec<Place>) {
    for width in [8, 4, 2] {
        offset = offset.next_multiple_of(width);
        for field in fields.iter().filter(|f| f.bytes == width) {
            slots.push((field.short_name.to_uppercase(), offset, width, false));
            offset += width;
        }
    }
}

fn slots(out: &mut String, name: &str, slots: &[Place]) {
    writeln!(out, "static {name}_SLOTS: [Slot; {}] = [", slots.len()).unwrap();
    for (field, offset, width, rotated) in slots {
        let end = if *rotated { ".rotated()" } else { "" };
        writeln!(
            out,
            "    Slot::new(Field::{field}, {offset}, {width}){end},"
        )
        .unwrap();
    }
    writeln!(out, "];").unwrap();
}
