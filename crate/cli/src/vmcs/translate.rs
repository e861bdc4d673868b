//! From one layout to another, with a report of what becomes of each field.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use hypernest_vmcs::{Fate, Field, Layout, Losses, TranslateError, Translation, nested_state};
use serde_json::{Map, Value, json};

use super::input::{What, layout, open};
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
    let (bytes, report) =
        convert(&input.what, &map, losses).with_context(|| args.file.display().to_string())?;
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

/// What becomes of each field.
type Report = Vec<(Field, Fate)>;

/// What a file becomes, and its fields.
fn convert(
    what: &What,
    map: &Translation,
    losses: Losses,
) -> Result<(Vec<u8>, Report)> {
    Ok(match what {
        What::Region(region) => (translated(map, region, losses)?, map.report(region)?),
        What::Log(dump) => {
            let mut region = vec![0; map.from().size()];
            map.from().write(&dump.vmcs, &mut region)?;
            (translated(map, &region, losses)?, map.report(&region)?)
        }
        What::NestedState(state) => {
            let image = state.image().unwrap_or_default();
            let mut new = state.as_ref().clone();
            new.data = translated(map, image, losses)?;
            new.data.resize(nested_state::IMAGE, 0);
            if let Some(shadow) = state.shadow_image() {
                new.data.extend(translated(map, shadow, losses)?);
            }
            (new.to_bytes(), map.report(image)?)
        }
    })
}

fn translated(map: &Translation, region: &[u8], losses: Losses) -> Result<Vec<u8>> {
    let mut out = vec![0; map.to().size()];
    match map.run(region, &mut out, losses) {
        Ok(()) => Ok(out),
        Err(TranslateError::Lost { .. }) => {
            let lost: Vec<String> = map
                .losses(region)
                .map(|(field, value)| format!("{} {value:#x}", field.short_name()))
                .collect();
            bail!(
                "{} has no place for {}; --allow-loss drops them",
                map.to().name(),
                lost.join(", ")
            );
        }
        Err(error) => {
            Err(error).with_context(|| format!("{} to {}", map.from().name(), map.to().name()))
        }
    }
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
