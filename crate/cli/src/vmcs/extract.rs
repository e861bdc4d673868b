//! Nested states out of a QEMU migration stream, into files of their own.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use hypernest_vmcs::migration::{InStream, MAGIC, nested_states};
use hypernest_vmcs::{Layout, identify, nested_state::state_flag};
use serde_json::{Value, json};

use super::{input, print, print_json, write_whole};

/// Where to look and what to write.
#[derive(Args, Debug)]
pub struct ExtractArgs {
    /// What QEMU's `migrate` or `savevm` has written; `-` is standard input
    pub file: PathBuf,
    /// Write each nested state to a file in this folder, which is created if need be
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A stream has the RAM of its machine.
const MOST: u64 = 4 << 30;

pub fn extract(args: &ExtractArgs) -> Result<i32> {
    let shown = args.file.display();
    let bytes = input::bytes("migration stream", &args.file, MOST)?;
    let found = nested_states(&bytes)
        .collect::<Result<Vec<InStream>, _>>()
        .with_context(|| format!("{shown}"))?;
    if found.is_empty() {
        if bytes.starts_with(&MAGIC) {
            bail!("{shown}: no processor of this migration stream has a nested state");
        }
        bail!("{shown}: no nested state, and no migration stream, which begins with QEVM");
    }
    let mut files: Vec<(String, &InStream)> = Vec::new();
    for state in &found {
        let mut name = match state.cpu {
            Some(cpu) => format!("cpu{cpu}.nested"),
            None => format!("at-{:#x}.nested", state.offset),
        };
        // A file can hold several machines, one behind the other.
        if files.iter().any(|(other, _)| *other == name) {
            name = format!("at-{:#x}.nested", state.offset);
        }
        files.push((name, state));
    }
    if let Some(dir) = &args.output {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot write {}", dir.display()))?;
        for (name, state) in &files {
            write_whole(&dir.join(name), &state.state.to_bytes())?;
        }
    }
    let path = |name: &str| {
        let dir = args.output.as_deref();
        dir.map(|dir: &Path| dir.join(name).display().to_string())
    };
    if args.json {
        let list: Vec<Value> = files
            .iter()
            .map(|(name, found)| {
                json!({
                    "cpu": found.cpu,
                    "offset": found.offset,
                    "bytes": found.state.to_bytes().len(),
                    "vmxon": format!("{:#x}", found.state.vmxon),
                    "vmcs": format!("{:#x}", found.state.vmcs),
                    "flags": flags(found),
                    "layout": layout(found),
                    "file": path(name),
                })
            })
            .collect();
        print_json(&json!({ "states": list }));
        return Ok(0);
    }
    let mut text = String::new();
    for (name, found) in &files {
        let cpu = match found.cpu {
            Some(cpu) => format!("processor {cpu}"),
            None => "outside of a processor".into(),
        };
        let words = [
            flags(found).join(" "),
            layout(found).unwrap_or_default().into(),
        ];
        text += &format!(
            "{cpu}, at byte {}: {} bytes, VMCS {:#x}",
            found.offset,
            found.state.to_bytes().len(),
            found.state.vmcs
        );
        for word in words.iter().filter(|word| !word.is_empty()) {
            text += &format!(", {word}");
        }
        if let Some(path) = path(name) {
            text += &format!(" -> {path}");
        }
        text.push('\n');
    }
    print(&text);
    Ok(0)
}

fn flags(found: &InStream) -> Vec<&'static str> {
    [
        (state_flag::GUEST_MODE, "guest-mode"),
        (state_flag::RUN_PENDING, "run-pending"),
        (state_flag::EVMCS, "evmcs"),
        (state_flag::MTF_PENDING, "mtf-pending"),
    ]
    .into_iter()
    .filter_map(|(flag, name)| (found.state.flags & flag != 0).then_some(name))
    .collect()
}

/// The likeliest layout of its VMCS.
fn layout(found: &InStream) -> Option<&'static str> {
    let candidates = identify(found.state.image()?, Layout::built_in().iter().copied());
    candidates.first().map(|best| best.layout.name())
}
