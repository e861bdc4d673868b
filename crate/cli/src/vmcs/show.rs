//! The fields of a VMCS, and those in which two differ.

use std::path::Path;

use anyhow::Result;
use hypernest_vmcs::{Control, ControlBit, ExitReason, Field, FieldSet, Found, Kind, Layout, Vmcs};
use serde_json::{Map, Value, json};

use super::input::open;
use super::{DIFFERENT, FileArgs, print, print_json};

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

fn heading(kind: Kind) -> &'static str {
    match kind {
        Kind::Control => "controls",
        Kind::GuestState => "guest state",
        Kind::HostState => "host state",
        Kind::ExitInfo => "exit information",
    }
}

/// The names of the bits of a control that are 1 and need not be, or the name of an exit reason.
fn words(field: Field, value: u64) -> String {
    if field == Field::VM_EXIT_REASON && value != 0 {
        let failed = if value >> 31 & 1 != 0 {
            " (VM entry failed)"
        } else {
            ""
        };
        return format!("{}{failed}", ExitReason(value as u16).name());
    }
    let Some(control) = Control::ALL
        .into_iter()
        .find(|control| control.field() == field)
    else {
        return String::new();
    };
    ControlBit::set_in(control, value)
        .filter(|bit| !bit.reserved)
        .map(|bit| bit.name)
        .collect::<Vec<_>>()
        .join(", ")
}

pub fn show(args: &FileArgs, all: bool) -> Result<i32> {
    let input = open(&args.file)?;
    let read = input.read(args.layout.as_deref())?;
    if args.json {
        print_json(&as_json(&read));
        return Ok(0);
    }
    let mut text = match &read.layout {
        Some(layout) => format!(
            "layout {}, {}{}{}\n",
            layout.name(),
            if read.vmcs.launched {
                "launched"
            } else {
                "clear"
            },
            if read.vmcs.shadow {
                ", shadow VMCS"
            } else {
                ""
            },
            match read.vmcs.abort {
                0 => String::new(),
                abort => format!(", VMX abort {abort}"),
            }
        ),
        None => "a kernel log, in no layout\n".to_owned(),
    };
    if let Some(layout) = &read.layout {
        text += &aliases(layout);
    }
    text += &fields_text(&read.vmcs, &read.fields, all);
    print(&text);
    Ok(0)
}

/// A note for each field whose bytes are another's.
pub fn aliases(layout: &Layout) -> String {
    let note = |(loser, winner): &(Field, Field)| {
        format!(
            "note: {} has no bytes of its own in layout {}: they are read as {}\n",
            loser.short_name(),
            layout.name(),
            winner.short_name()
        )
    };
    layout.yields().iter().map(note).collect()
}

/// The fields by kind, a line each; those that are 0 only if `all` are asked for.
pub fn fields_text(vmcs: &Vmcs, fields: &FieldSet, all: bool) -> String {
    let mut text = String::new();
    for kind in [
        Kind::Control,
        Kind::GuestState,
        Kind::HostState,
        Kind::ExitInfo,
    ] {
        let fields: Vec<Field> = fields
            .iter()
            .filter(|field| field.kind() == kind && (all || vmcs.get(*field) != 0))
            .collect();
        if fields.is_empty() {
            continue;
        }
        text += &format!("\n{}\n", heading(kind));
        for field in fields {
            let value = vmcs.get(field);
            let line = format!(
                "  {:#06x} {:32} {:>18}  {}",
                field.encoding(),
                field.short_name(),
                hex(value),
                words(field, value)
            );
            text += line.trim_end();
            text.push('\n');
        }
    }
    text
}

/// `{"layout": .., "fields": {"guest_rip": "0x..", ..}}`, with every field that the file has; `aliases` has those
/// whose bytes are another's.
pub fn as_json(read: &Found) -> Value {
    let fields: Map<String, Value> = read
        .fields
        .iter()
        .map(|field| {
            let value = hex(read.vmcs.get(field)).into();
            (field.short_name().to_owned(), value)
        })
        .collect();
    let aliases: Map<String, Value> = read
        .layout
        .iter()
        .flat_map(|layout| layout.yields())
        .map(|(loser, winner)| (loser.short_name().to_owned(), winner.short_name().into()))
        .collect();
    json!({
        "layout": read.layout.as_ref().map(Layout::name),
        "aliases": aliases,
        "launched": read.vmcs.launched,
        "shadow": read.vmcs.shadow,
        "abort": read.vmcs.abort,
        "fields": fields,
    })
}

/// Compares what both files have; fields that only one has are said to be so when they are not 0.
pub fn diff(a: &Path, b: &Path, json: bool) -> Result<i32> {
    let (a, b) = (open(a)?.read(None)?, open(b)?.read(None)?);
    let differ = a.differences(&b);
    let launched = a.layout.is_some() && b.layout.is_some() && a.vmcs.launched != b.vmcs.launched;
    if json {
        let fields: Map<String, Value> = differ
            .iter()
            .map(|(field, a, b)| {
                (
                    field.short_name().to_owned(),
                    json!([a.map(hex), b.map(hex)]),
                )
            })
            .collect();
        let mut out = json!({"fields": fields});
        if launched {
            out["launched"] = json!([a.vmcs.launched, b.vmcs.launched]);
        }
        print_json(&out);
    } else {
        let mut text = String::new();
        let shown = |value: Option<u64>| value.map_or("no such field".into(), hex);
        for (field, a, b) in &differ {
            text += &format!(
                "{:32} {:>18}  {:>18}\n",
                field.short_name(),
                shown(*a),
                shown(*b)
            );
        }
        if launched {
            text += &format!(
                "{:32} {:>18}  {:>18}\n",
                "launched", a.vmcs.launched, b.vmcs.launched
            );
        }
        print(&text);
    }
    Ok(if differ.is_empty() && !launched {
        0
    } else {
        DIFFERENT
    })
}
