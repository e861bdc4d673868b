//! `hypernest migrate`: pairs of which nobody knows who owns the machine.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::{ArgGroup, Args, Subcommand};
use hypernest_migrate::live::record::{Owns, Record, decide};

use super::store;

/// What to do about migrations.
#[derive(Debug, Subcommand)]
pub enum MigrateCommand {
    /// Settle who owns a machine whose migration was cut off around the commit; without options tell what a record is
    Decide(DecideArgs),
}

#[derive(Args, Debug)]
#[command(group(ArgGroup::new("how").args(["other", "drop", "release", "other_is_gone"])))]
pub struct DecideArgs {
    /// The record whose machine is kept (with --drop: given up)
    keep: PathBuf,

    /// The record of the other side, whose machine is given up
    other: Option<PathBuf>,

    /// Give up this one, and print its release code, with which the other side may keep its own
    #[arg(long)]
    drop: bool,

    /// Keep this one; the other side was given up and has printed this code
    #[arg(long, value_name = "CODE", value_parser = code)]
    release: Option<u64>,

    /// Keep this one; the other side has ended and left no record, which only you can know
    #[arg(long)]
    other_is_gone: bool,
}

fn code(text: &str) -> Result<u64, String> {
    let digits = Some(text).filter(|text| text.len() == 16);
    let code = digits.and_then(|text| u64::from_str_radix(text, 16).ok());
    code.ok_or_else(|| "give the 16 digits that --drop printed".into())
}

/// Settles it; the exit status.
///
/// # Errors
/// It cannot be settled so; the records are as they were.
pub fn run(command: &MigrateCommand) -> Result<i32> {
    let MigrateCommand::Decide(args) = command;
    let path = &args.keep;
    let shown = path.display();
    let mut record = store::read(path)?;
    if let Some(other_path) = &args.other {
        let mut other = store::read(other_path)?;
        decide(&mut record, &mut other).map_err(|error| {
            let other = other_path.display();
            anyhow!("cannot keep {shown} and give up {other}: {error}")
        })?;
        // In this order: at no moment may both be resumed.
        store::mark(other_path, &other)?;
        keep(path, &record)?;
    } else if args.drop {
        let code = record
            .drop_it()
            .with_context(|| format!("cannot give up {shown}"))?;
        store::mark(path, &record)?;
        println!("release code {code:016x}");
    } else if let Some(code) = args.release {
        let kept = record.keep_released(code);
        kept.with_context(|| format!("cannot keep {shown}"))?;
        keep(path, &record)?;
    } else if args.other_is_gone {
        record
            .keep_alone()
            .with_context(|| format!("cannot keep {shown}"))?;
        keep(path, &record)?;
    } else {
        tell(path, &record);
    }
    Ok(0)
}

fn keep(path: &Path, record: &Record) -> Result<()> {
    store::mark(path, record)?;
    println!("kept: hypernest resume {} goes on", path.display());
    Ok(())
}

fn tell(path: &Path, record: &Record) {
    let whose = match record.owns {
        Owns::Undecided => "nobody knows whose it is",
        Owns::Yes => "it is kept",
        Owns::No => "it is given up",
    };
    let shown = path.display();
    let (id, side, tick) = (record.identity.id, record.side.name(), record.tick);
    println!("{shown}: machine at the {side} of migration {id:016x}, at tick {tick}: {whose}");
}
