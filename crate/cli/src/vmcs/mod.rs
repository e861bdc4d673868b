//! `hypernest vmcs`: a VMCS in a file, looked at, checked and translated.

mod extract;
mod input;
mod lint;
mod show;
mod translate;

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use hypernest_vmcs::{File, Layout, revision};
use serde_json::{Value, json};

use input::open;
pub use show::fields_text;
pub use translate::write_whole;

/// A file to look at.
#[derive(Args, Debug)]
pub struct FileArgs {
    /// A raw region, KVM's nested state, or a kernel log with a VMCS dump; `-` is standard input
    pub file: PathBuf,

    /// Layout of the region: a name of `hypernest vmcs layouts`, or a file with a table; found out
    /// when not given
    #[arg(long, value_name = "LAYOUT")]
    pub layout: Option<String>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What to do with a VMCS in a file.
#[derive(Debug, Subcommand)]
pub enum VmcsCommand {
    /// List the known layouts, or print one as a table that `--layout` reads
    Layouts {
        /// The layout to print
        name: Option<String>,
    },
    /// Say what a file is and which layout its region has, with the evidence
    Identify(FileArgs),
    /// Print the fields
    Show {
        #[command(flatten)]
        file: FileArgs,
        /// Fields that are 0 too
        #[arg(long)]
        all: bool,
    },
    /// Walk the checks of VM entry and say which fail and why
    Lint {
        #[command(flatten)]
        file: FileArgs,
        /// Capabilities to check against: kvm, max, or a file with a dump of the IA32_VMX_* MSRs
        #[arg(long, value_name = "PROFILE", default_value = "max")]
        profile: String,
    },
    /// Write the VMCS in another layout
    Translate(translate::TranslateArgs),
    /// Compare two files field by field
    Diff {
        /// The first file
        a: PathBuf,
        /// The second file
        b: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Find the nested states in a QEMU migration stream
    Extract(extract::ExtractArgs),
}

/// Exit status when a check fails or files differ.
const DIFFERENT: i32 = 1;

/// Runs a command; the exit status. Every error is one of its input.
pub fn run(command: &VmcsCommand) -> Result<i32> {
    match command {
        VmcsCommand::Layouts { name } => layouts(name.as_deref()),
        VmcsCommand::Identify(args) => identify(args),
        VmcsCommand::Show { file, all } => show::show(file, *all),
        VmcsCommand::Lint { file, profile } => lint::lint(file, profile),
        VmcsCommand::Translate(args) => translate::translate(args),
        VmcsCommand::Diff { a, b, json } => show::diff(a, b, *json),
        VmcsCommand::Extract(args) => extract::extract(args),
    }
}

/// Prints; a reader that goes away is no error.
pub fn print(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

/// The same of JSON.
pub fn print_json(value: &Value) {
    print(&format!("{value:#}\n"));
}

fn ids(layout: &Layout) -> String {
    match layout.revisions() {
        [] => "any".into(),
        ids => ids
            .iter()
            .map(|id| format!("{id:#010x}"))
            .collect::<Vec<_>>()
            .join(" "),
    }
}

fn layouts(name: Option<&str>) -> Result<i32> {
    if let Some(name) = name {
        print(&input::layout(name)?.to_table());
        return Ok(0);
    }
    let mut text = format!(
        "{:16} {:22} {:>6} {:>5}  {:7}  what\n",
        "name", "revision", "fields", "bytes", "use"
    );
    for layout in Layout::built_in() {
        text += &format!(
            "{:16} {:22} {:>6} {:>5}  {:7}  {}\n",
            layout.name(),
            ids(layout),
            layout.slots().len(),
            layout.used(),
            if layout.is_for_machines() {
                "machine"
            } else {
                "files"
            },
            layout.title()
        );
    }
    print(&text);
    Ok(0)
}

fn identify(args: &FileArgs) -> Result<i32> {
    let input = open(&args.file)?;
    let Some(region) = input.file.region() else {
        if args.json {
            print_json(&json!({"kind": input.file.kind(), "candidates": []}));
        } else {
            print("a kernel log: values by field, in no layout\n");
        }
        return Ok(0);
    };
    if let Some(asked) = &args.layout {
        // A hint overrides, but it has to fit.
        let read = input.read(Some(asked))?;
        let name = read.layout.as_ref().map_or("", Layout::name).to_owned();
        if args.json {
            print_json(&json!({"kind": input.file.kind(), "candidates": [{"layout": name}]}));
        } else {
            print(&format!("{}: {name}, as asked\n", input.file.kind()));
        }
        return Ok(0);
    }
    let found = input.file.candidates();
    if found.is_empty() {
        // Says why.
        input.layout(None)?;
        bail!("no layout");
    }
    let (id, shadow) = revision(region).unwrap_or_default();
    if args.json {
        let candidates: Vec<Value> = found
            .iter()
            .map(|c| {
                let broken: Vec<Value> = c
                    .broken
                    .iter()
                    .map(|e| {
                        json!({
                            "field": e.field.short_name(),
                            "value": format!("{:#x}", e.value),
                            "rule": e.rule,
                        })
                    })
                    .collect();
                json!({
                    "layout": c.layout.name(),
                    "score": c.score,
                    "by_revision": c.by_revision,
                    "holds": c.holds,
                    "stray_bytes": c.stray,
                    "broken": broken,
                })
            })
            .collect();
        print_json(&json!({
            "kind": input.file.kind(),
            "revision": format!("{id:#010x}"),
            "shadow": shadow,
            "candidates": candidates,
        }));
        return Ok(0);
    }
    let mut text = format!(
        "{} of {} bytes, revision {id:#010x}{}\n",
        input.file.kind(),
        region.len(),
        if shadow { ", shadow VMCS" } else { "" }
    );
    if let File::NestedState(state) = &input.file {
        for finding in state.findings(found[0].layout) {
            text += &format!("note: {}\n", finding.words());
        }
    }
    text += &show::aliases(found[0].layout);
    let shown = found.iter().filter(|c| c.by_revision).count().max(2);
    for (place, c) in found.iter().take(shown).enumerate() {
        text += &format!(
            "{} {:16} score {:>4}: {}, {} values fit, {} do not, {} bytes outside of its fields\n",
            if place == 0 { "=>" } else { "  " },
            c.layout.name(),
            c.score,
            if c.by_revision {
                "its revision"
            } else {
                "takes any revision"
            },
            c.holds,
            c.broken.len(),
            c.stray
        );
        for e in c.broken.iter().take(3) {
            text += &format!(
                "       against it: {} would be {:#x}, not {}\n",
                e.field.short_name(),
                e.value,
                e.rule
            );
        }
    }
    if found.len() > 1 && found[0].score == found[1].score {
        text += "the first two fit equally well: the file does not say which it is\n";
    }
    print(&text);
    Ok(0)
}
