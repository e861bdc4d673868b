//! `hypernest snapshot diff`: what is not the same in two snapshots.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use hypernest_machine::{Change, MAX_MEMORY, MachineState, diff};
use hypernest_migrate::snapshot::Contents;
use hypernest_vmcs::Field;
use serde_json::json;

use crate::vmcs::{print, print_json};

const PAGE: usize = 4096;

pub fn run(paths: [&Path; 2], as_json: bool, most: usize) -> Result<i32> {
    let [a, b] = paths.map(|path| -> Result<Contents> {
        let file = super::open(path)?;
        let contents = super::begin(path, file)?.contents(MAX_MEMORY);
        contents.with_context(|| format!("cannot read the snapshot {}", path.display()))
    });
    let (a, b) = (a?, b?);
    let changes = changes(a.state, b.state);
    let memory = memory(a.ram.bytes(), b.ram.bytes());
    let most = if most == 0 { usize::MAX } else { most };
    if as_json {
        let change = |change: &Change| json!([change.path, change.before, change.after]);
        let range = |range: &Range| {
            json!({
                "first": range.first,
                "pages": range.pages,
                "offset": range.at,
                "before": hex(&range.before),
                "after": hex(&range.after),
            })
        };
        print_json(&json!({
            "changes": changes.len(),
            "state": changes.iter().take(most).map(change).collect::<Vec<_>>(),
            "pages": memory.iter().map(|range| range.pages).sum::<usize>(),
            "memory": memory.iter().take(most).map(range).collect::<Vec<_>>(),
        }));
    } else {
        print(&text(&changes, &memory, most));
    }
    Ok(i32::from(!changes.is_empty() || !memory.is_empty()))
}

/// What differs in the state; fields of a VMCS by their names.
fn changes(mut a: MachineState, mut b: MachineState) -> Vec<Change> {
    let (in_a, in_b) = (take_vmcs(&mut a), take_vmcs(&mut b));
    let mut changes = diff(&a, &b);
    let mut keys: Vec<&(usize, u32)> = in_a.keys().chain(in_b.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let shown = |value: Option<&u64>| value.map_or("-".into(), |value| format!("{value:#x}"));
    for key in keys {
        let (before, after) = (in_a.get(key), in_b.get(key));
        if before != after {
            let (vcpu, encoding) = *key;
            let name = Field::from_encoding(encoding);
            let name = name.map_or(format!("{encoding:#x}"), |(field, _)| {
                field.short_name().into()
            });
            changes.push(Change {
                path: format!("vcpu[{vcpu}].vmx.{name}"),
                before: shown(before),
                after: shown(after),
            });
        }
    }
    changes
}

/// Takes the fields of the current VMCSs out of a state, by vCPU and encoding.
fn take_vmcs(state: &mut MachineState) -> BTreeMap<(usize, u32), u64> {
    let vcpus = state.vcpu.iter_mut().enumerate();
    let fields = vcpus.flat_map(|(n, vcpu)| {
        let fields = std::mem::take(&mut vcpu.vmx.fields);
        let with_vcpu = move |(encoding, value)| ((n, encoding), value);
        fields.into_iter().map(with_vcpu)
    });
    fields.collect()
}

/// Pages next to each other that all differ.
#[derive(Debug, PartialEq, Eq)]
struct Range {
    /// Number of the first.
    first: usize,
    pages: usize,
    /// Where in memory the first byte is that differs.
    at: usize,
    /// The bytes there.
    before: Vec<u8>,
    after: Vec<u8>,
}

fn memory<'a>(a: &'a [u8], b: &'a [u8]) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    let pages = a.len().max(b.len()) / PAGE;
    for number in 0..pages {
        let start = number * PAGE;
        // One of them may be longer.
        let page = |memory: &'a [u8]| memory.get(start..start + PAGE).unwrap_or_default();
        let (before, after) = (page(a), page(b));
        if before == after {
            continue;
        }
        if let Some(last) = ranges.last_mut()
            && last.first + last.pages == number
        {
            last.pages += 1;
            continue;
        }
        let at = before.iter().zip(after).position(|(a, b)| a != b);
        let at = at.unwrap_or(0);
        let shown = |page: &[u8]| page.iter().skip(at).take(8).copied().collect();
        ranges.push(Range {
            first: number,
            pages: 1,
            at: start + at,
            before: shown(before),
            after: shown(after),
        });
    }
    ranges
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(changes: &[Change], memory: &[Range], most: usize) -> String {
    if changes.is_empty() && memory.is_empty() {
        return "the snapshots are equal\n".into();
    }
    let mut text = String::new();
    for change in changes.iter().take(most) {
        text += &format!("{change}\n");
    }
    let pages: usize = memory.iter().map(|range| range.pages).sum();
    for range in memory.iter().take(most) {
        let (first, end) = (range.first * PAGE, (range.first + range.pages) * PAGE - 1);
        let what = match range.pages {
            1 => "1 page".into(),
            pages => format!("{pages} pages"),
        };
        let (before, after) = (hex(&range.before), hex(&range.after));
        text += &format!(
            "memory {first:#x}-{end:#x}, {what}: at {:#x} {before} -> {after}\n",
            range.at
        );
    }
    if changes.len() > most || memory.len() > most {
        text += "there is more; --most 0 prints all\n";
    }
    text += &format!(
        "{} changes of the state, {pages} pages of memory differ\n",
        changes.len()
    );
    text
}
