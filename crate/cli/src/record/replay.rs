//! `hypernest replay`: a recorded run, made again.

use std::fs::File;
use std::io::{BufRead, BufReader, Write, stderr, stdin, stdout};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use hypernest_machine::{DiskImage, Level};
use hypernest_migrate::Snapshot;
use hypernest_migrate::record::{Log, Replay, ReplayError};

use crate::args::{ReplayArgs, ReplayTo, replay_to};
use crate::postmortem::Scene;
use crate::progress::Progress;
use crate::run::BadInput;
use crate::setup::{Disk, symbols};
use crate::trace::Names;

/// Exit status when the run differs from the recording.
const DIFFERS: i32 = 1;

/// Makes a recorded run again; the exit status. Nothing has run when the error is a [`BadInput`].
///
/// # Errors
/// The recording cannot be read, or the host fails.
pub fn replay(args: &ReplayArgs) -> Result<i32> {
    let opened = open(args).map_err(|error| error.context(BadInput));
    let (mut replay, names) = opened?;
    let outcome = match (args.to, args.interactive) {
        (to, true) => interact(&mut replay, &names, to),
        (Some(to), false) => {
            let _progress = Progress::spinner("going there");
            go(&mut replay, to).map_err(Into::into).and_then(|()| {
                print(&mut replay)?;
                scene(&mut replay, &names)
            })
        }
        (None, false) => whole(&mut replay, args),
    };
    match outcome {
        Ok(()) => Ok(0),
        Err(error) => match error.downcast_ref::<ReplayError>() {
            Some(ReplayError::Differs { .. } | ReplayError::Lost { .. }) => {
                // What the guest printed up to there may help.
                print(&mut replay)?;
                eprintln!("hypernest: {error}");
                Ok(DIFFERS)
            }
            Some(
                ReplayError::Beyond { .. } | ReplayError::Before { .. } | ReplayError::Input { .. },
            ) => Err(error.context(BadInput)),
            _ => Err(error),
        },
    }
}

fn open(args: &ReplayArgs) -> Result<(Replay, Names)> {
    let shown = args.recording.display();
    let what = || format!("cannot read the recording {shown}");
    let symbols = |path: &Option<std::path::PathBuf>| path.as_deref().map(symbols).transpose();
    let (l1, l2) = (symbols(&args.symbols)?, symbols(&args.symbols_l2)?);
    let names = Names::new(l1.map(Arc::new), l2.map(Arc::new));
    let file = file(&args.recording)?;
    let mut from = BufReader::with_capacity(1 << 20, file);
    Log::open(&mut from).with_context(what)?;
    let snapshot = Snapshot::open(&mut from).with_context(what)?;
    let disks = args.disks.iter().map(|path| {
        let disk: Box<dyn DiskImage> = Box::new(Disk::open(path)?);
        Ok(disk)
    });
    let disks = disks.collect::<Result<Vec<_>>>()?;
    let machine = {
        let _progress = Progress::spinner("reading the recording");
        let machine = snapshot.build(args.memory_limit, disks, |builder| builder);
        machine.with_context(what)?
    };
    let log = Log::read(from).with_context(what)?;
    if !log.whole {
        let end = log.end().map_or(machine.now(), |at| at.tick);
        eprintln!("hypernest: the recording {shown} was cut; it is good up to tick {end}");
    }
    let replay = Replay::new(machine, log, args.keyframe_memory).with_context(what)?;
    Ok((replay, names))
}

fn file(path: &Path) -> Result<File> {
    let what = || format!("cannot read the recording {}", path.display());
    let file = File::open(path).with_context(what)?;
    if file.metadata().with_context(what)?.is_dir() {
        bail!("{}: it is a directory; give a file", what());
    }
    Ok(file)
}

/// Passes on what the guest has printed.
fn print(replay: &mut Replay) -> Result<()> {
    let bytes = replay.machine().take_serial_output();
    let mut out = stdout().lock();
    out.write_all(&bytes)
        .and_then(|()| out.flush())
        .context("cannot write serial output to stdout")?;
    // Nobody can be told when stderr is gone.
    let _ = stderr().write_all(&replay.machine().take_debug_output());
    Ok(())
}

/// All of the recording.
fn whole(replay: &mut Replay, args: &ReplayArgs) -> Result<()> {
    loop {
        let more = replay.to_next_entry()?;
        print(replay)?;
        if !more {
            break;
        }
    }
    let hash = replay.machine().state_hash()?;
    eprintln!(
        "hypernest: {}: the same run, by {} hashes of {}; at tick {} it has {} instructions, {} VM exits, state hash {hash:016x}",
        args.recording.display(),
        replay.compared(),
        replay.log().keyframes() + usize::from(replay.log().whole),
        replay.now(),
        replay.instructions(),
        replay.exits(),
    );
    Ok(())
}

fn go(replay: &mut Replay, to: ReplayTo) -> Result<(), ReplayError> {
    match to {
        ReplayTo::Tick(tick) => replay.to_tick(tick),
        ReplayTo::Exit(number) => replay.to_exit(number),
    }
}

/// What the processors are doing.
fn scene(replay: &mut Replay, names: &Names) -> Result<()> {
    eprintln!("hypernest: {}", place(replay, names)?);
    for vcpu in 0..replay.machine().vcpus() {
        eprint!("{}", Scene::new(replay.machine(), vcpu)?.text(names));
    }
    Ok(())
}

/// Where the run is, in a line.
fn place(replay: &mut Replay, names: &Names) -> Result<String> {
    let mut text = format!(
        "tick {}, {} instructions, {} VM exits",
        replay.now(),
        replay.instructions(),
        replay.exits()
    );
    let machine = replay.machine();
    for vcpu in 0..machine.vcpus() {
        let state = machine.read_vcpu(vcpu)?;
        let level = state.level();
        let at = names.address(level, crate::dump::code_address(&state));
        let level = match state.vmx.region {
            Some(_) => level,
            None => Level::L1,
        };
        text += &format!("; processor {vcpu} {} at {at}", level.name());
    }
    Ok(text)
}

/// Commands from stdin, one a line.
fn interact(replay: &mut Replay, names: &Names, to: Option<ReplayTo>) -> Result<()> {
    if let Some(to) = to {
        go(replay, to)?;
    }
    eprintln!("hypernest: {}", place(replay, names)?);
    for line in stdin().lock().lines() {
        let line = line.context("cannot read stdin")?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match command(replay, names, &words) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => match error.downcast_ref::<ReplayError>() {
                Some(ReplayError::Differs { .. } | ReplayError::Lost { .. }) => return Err(error),
                _ => eprintln!("hypernest: {error:#}"),
            },
        }
    }
    Ok(())
}

/// False to end.
fn command(replay: &mut Replay, names: &Names, words: &[&str]) -> Result<bool> {
    let count = |word: Option<&&str>| -> Result<u64> {
        let number = word.map_or(Ok(1), |word| word.replace('_', "").parse());
        number.context("give a number of instructions")
    };
    match words {
        [] => return Ok(true),
        ["quit"] => return Ok(false),
        ["show"] => {
            scene(replay, names)?;
            return Ok(true);
        }
        ["to", to] => {
            let to = replay_to(to).map_err(anyhow::Error::msg)?;
            go(replay, to)?;
        }
        ["end"] => replay.to_end()?,
        ["back", "exit"] => replay.step_back_exit()?,
        ["forward", "exit"] => replay.to_exit(replay.exits() + 1)?,
        ["back", rest @ ..] if rest.len() < 2 => {
            replay.step_back(count(rest.first())?)?;
        }
        ["forward", rest @ ..] if rest.len() < 2 => {
            replay.step(count(rest.first())?)?;
        }
        _ => bail!(
            "give to T, to exit:N, back [N], back exit, forward [N], forward exit, end, show or quit"
        ),
    }
    print(replay)?;
    eprintln!("hypernest: {}", place(replay, names)?);
    Ok(true)
}
