//! From one layout to another, with a report of what becomes of each field.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use hypernest_vmcs::{Fate, Field, Layout, Losses, TranslateError, Translated, Translation};
use serde_json::{Map, Value, json};

use super::input::{layout, open};
use super::{print, print_json};

/// What to translate.
#[derive(Args, Debug)]
pub struct TranslateArgs {
    /// A raw region, KVM's nested state, or a kernel log; `-` is standard input
    pub file: PathBuf,
    /// Layout that the file has; found out when not given
    #[arg(long, value_name = "LAYOUT")]
    pub from: Option<String>,
    /// Layout to write
    #[arg(long, value_name = "LAYOUT")]
    pub to: String,
    /// Drop values that the new layout has no place for
    #[arg(long)]
    pub allow_loss: bool,
    /// File to write: a region, or for a nested state one with its images translated
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

pub fn translate(args: &TranslateArgs) -> Result<i32> {
    let input = open(&args.file)?;
    let to = layout(&args.to)?;
    let losses = if args.allow_loss {
        Losses::Allowed
    } else {
        Losses::Refused
    };
    // A log has every field, as our own layout has.
    let from = match input.layout(args.from.as_deref())? {
        Some(from) => from,
        None => Layout::hypernest().clone(),
    };
    let map = Translation::new(&from, &to);
    let translated = match input.file.translate(&map, losses) {
        Err(TranslateError::Lost { .. }) => Err(lost(&input.file.losses(&map), &to)),
        Err(error) => Err(error).with_context(|| format!("{} to {}", from.name(), to.name())),
        Ok(translated) => Ok(translated),
    };
    let Translated { bytes, report } =
        translated.with_context(|| args.file.display().to_string())?;
    write_whole(&args.output, &bytes)?;
    let count = |wanted: fn(&Fate) -> bool| report.iter().filter(|row| wanted(&row.1)).count();
    if args.json {
        let fields: Map<String, Value> = report
            .iter()
            .map(|(field, fate)| (field.short_name().to_owned(), fate_json(fate)))
            .collect();
        print_json(&json!({"from": from.name(), "to": to.name(), "fields": fields}));
        return Ok(0);
    }
    let mut text = format!(
        "{} to {}: {} copied, {} widened, {} converted, {} defaulted, {} lost\n",
        from.name(),
        to.name(),
        count(|fate| *fate == Fate::Copied),
        count(|fate| *fate == Fate::Widened),
        count(|fate| *fate == Fate::Converted),
        count(|fate| *fate == Fate::Defaulted),
        count(|fate| matches!(fate, Fate::Lost(_))),
    );
    for (field, fate) in &report {
        if let Fate::Lost(value) = fate {
            text += &format!("lost: {} {value:#x}\n", field.short_name());
        }
    }
    print(&text);
    Ok(0)
}

/// What a layout has no place for.
fn lost(values: &[(Field, u64)], to: &Layout) -> anyhow::Error {
    let list: Vec<String> = values
        .iter()
        .map(|(field, value)| format!("{} {value:#x}", field.short_name()))
        .collect();
    anyhow!(
        "{} has no place for {}; --allow-loss drops them",
        to.name(),
        list.join(", ")
    )
}

fn fate_json(fate: &Fate) -> Value {
    match fate {
        Fate::Copied => "copied".into(),
        Fate::Widened => "widened".into(),
        Fate::Converted => "converted".into(),
        Fate::Defaulted => "defaulted".into(),
        Fate::Dropped => "dropped".into(),
        Fate::Lost(value) => json!({"lost": format!("{value:#x}")}),
    }
}

/// Writes beside the file and renames, so that nobody sees half of it.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let shown = path.display();
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = PathBuf::from(beside);
    std::fs::write(&beside, bytes).with_context(|| format!("cannot write {shown}"))?;
    std::fs::rename(&beside, path).with_context(|| format!("cannot write {shown}"))
}
