//! `hypernest run`, and the built-in hypervisor.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hypernest_machine::{Machine, Tick, Until};
use hypernest_migrate::snapshot::About;

use crate::args::{BreakOn, ReceiveArgs, ResumeArgs, RunArgs, SerialTo, SessionArgs, WalkAt};
use crate::drive::{self, Limits, Live, Outcome, Serial, drive};
use crate::exit_table::Exits;
use crate::exits::Events;
use crate::files;
use crate::gdb::Listener;
use crate::migrate::{self, Moves};
use crate::monitor::Monitor;
use crate::postmortem::{self, Scene};
use crate::progress::Progress;
use crate::record::Recording;
use crate::report::{End, Report};
use crate::setup::Setup;
use crate::snapshot::Saves;
use crate::trace::{Last, Names, Trace};
use crate::vmcs_dump::Dumps;

/// A crashed run that took longer is made again only when `--break-on` asks for it.
const REPLAY_LIMIT: Duration = Duration::from_secs(60);
/// Ticks before the crash from which on instructions are recorded.
const REPLAY_TRACED: Tick = 50_000;

/// Exit status of a run that ended well without a snapshot, a recording or a move that was asked for.
const NOT_SAVED: i32 = 4;

/// What to print and write besides the run itself.
struct Looks {
    report: bool,
    report_json: Option<(std::fs::File, PathBuf)>,
    trace: Option<(Trace, PathBuf)>,
    live: Live,
    walks: Vec<WalkAt>,
    gdb: Option<Listener>,
    always_replay: bool,
    /// What it took until there was a machine.
    loading: Duration,
}

/// Runs an image; the exit status. Nothing has run when the error is a [`BadInput`].
pub fn run(args: &RunArgs) -> Result<i32> {
    start(|| Setup::read(args), &args.session)
}

/// Goes on from a snapshot; the exit status. Nothing has run when the error is a [`BadInput`].
pub fn resume(args: &ResumeArgs) -> Result<i32> {
    start(|| Setup::resume(args), &args.session)
}

fn start(setup: impl FnOnce() -> Result<Setup>, args: &SessionArgs) -> Result<i32> {
    let begun = Instant::now();
    let prepared = setup().and_then(|setup| prepare(setup, args, begun));
    go(prepared.map_err(|error| error.context(BadInput))?, args)
}

/// Waits for a machine and goes on with it; the exit status. Nothing has run when the error is a [`BadInput`].
pub fn receive(args: &ReceiveArgs) -> Result<i32> {
    let session = &args.session;
    // Once the machine is here it is too late for this.
    session
        .check_writable()
        .and_then(|()| Setup::received(session, "", About::default()))
        .map_err(|error| error.context(BadInput))?;
    let arrived = migrate::receive(args)?;
    let setup = Setup::received(session, &arrived.from, arrived.about)?;
    let mut prepared = open(setup, arrived.machine, session, Duration::ZERO)?;
    prepared.serial.put(&arrived.unprinted.serial)?;
    drive::debug_output(&arrived.unprinted.debug);
    go(prepared, session)
}

/// All that a run needs.
struct Prepared {
    setup: Setup,
    machine: Machine,
    looks: Looks,
    serial: Serial,
}

fn go(prepared: Prepared, args: &SessionArgs) -> Result<i32> {
    let Prepared {
        setup,
        mut machine,
        mut looks,
        mut serial,
    } = prepared;
    if let Some((trace, _)) = &looks.trace {
        machine.set_tracer(Some(trace.tracer()))?;
    }
    let limits = Limits {
        stop_at: args.stop_at,
        stop_on: args.stop_on.clone(),
        timeout: args.timeout,
        break_on: args.break_on.clone(),
    };
    let gdb = looks.gdb.take();
    let live = &mut looks.live;
    let outcome = drive(&mut machine, &mut serial, &limits, live, gdb.as_ref())?;
    drop(serial);
    finish(&setup, machine, outcome, looks)
}

/// Marks an error that was found before anything ran.
#[derive(Debug)]
pub struct BadInput;

impl std::fmt::Display for BadInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("bad input")
    }
}

/// Makes the machine and opens what `args` name. All of it began at `begun`.
fn prepare(setup: Setup, args: &SessionArgs, begun: Instant) -> Result<Prepared> {
    let machine = {
        let _progress = Progress::spinner(setup.doing());
        setup.build()?
    };
    open(setup, machine, args, begun.elapsed())
}

/// Opens what `args` name for a machine that took `loading` to be there.
fn open(
    setup: Setup,
    mut machine: Machine,
    args: &SessionArgs,
    loading: Duration,
) -> Result<Prepared> {
    let report_json = match &args.report_json {
        Some(path) => Some((files::create("report", path)?, path.clone())),
        None => None,
    };
    let trace = match &args.log_instructions {
        Some(path) => {
            let file = files::create("instruction log", path)?;
            let trace = Trace::log(file, setup.names.clone(), machine.vcpus());
            Some((trace, path.clone()))
        }
        None => None,
    };
    let stored = args.moves.migrate_on.is_some() && args.moves.durable.is_some();
    if stored && args.record.is_some() {
        // Where the machine stays after all, the recording would not know of it.
        bail!(
            "--durable with --migrate-on stores the machine, which --record cannot write down; give one of them"
        );
    }
    let (exits, tracks) = (args.exits.as_deref(), args.trace.as_deref());
    let mut live = Live {
        events: Events::open(&mut machine, exits, tracks, setup.names.clone())?,
        dumps: Dumps::open(&args.dump_vmcs_at, args.dump_vmcs_to.clone())?,
        saves: Saves::open(args, setup.about(&machine))?,
        monitor: args.monitor.as_deref().map(Monitor::open).transpose()?,
        moves: Moves::open(&args.moves, &args.serial, setup.about(&machine))?,
        record: Recording::default(),
    };
    let gdb = args.gdb.map(Listener::bind).transpose()?;
    let serial = Serial::open(&args.serial)?;
    if let Some(path) = &args.record {
        let about = setup.about(&machine);
        live.record = Recording::begin(&mut machine, path, about)?;
    }
    let looks = Looks {
        report: args.report,
        report_json,
        trace,
        live,
        walks: args.walk.clone(),
        gdb,
        always_replay: !args.break_on.is_empty(),
        loading,
    };
    Ok(Prepared {
        setup,
        machine,
        looks,
        serial,
    })
}

/// Runs the built-in hypervisor; the exit status.
pub fn run_demo() -> Result<i32> {
    println!(
        "hypernest {}: the built-in hypervisor and its guest, on a machine of {} MiB with VMX\n",
        env!("CARGO_PKG_VERSION"),
        hypernest_guests::HYPERVISOR_MEMORY >> 20
    );
    let begun = Instant::now();
    let setup = Setup::demo();
    let mut machine = setup.build()?;
    let loading = begun.elapsed();
    let mut serial = Serial::open(&SerialTo::Output)?;
    let limits = Limits {
        stop_at: None,
        stop_on: None,
        timeout: None,
        break_on: vec![BreakOn::TripleFault],
    };
    let mut live = Live::default();
    let outcome = drive(&mut machine, &mut serial, &limits, &mut live, None)?;
    let looks = Looks {
        report: true,
        report_json: None,
        trace: None,
        live,
        walks: Vec::new(),
        gdb: None,
        always_replay: true,
        loading,
    };
    let status = finish(&setup, machine, outcome, looks)?;
    if status != 0 {
        return Ok(status);
    }
    println!(
        "\nBoot a kernel of your own with `hypernest run IMAGE`; `hypernest run --help` lists the options,\n\
         and README.md tells how to get Linux to a prompt here and in a browser page."
    );
    Ok(status)
}

/// Post-mortem and report; the exit status.
fn finish(setup: &Setup, mut machine: Machine, outcome: Outcome, mut looks: Looks) -> Result<i32> {
    let ticks = machine.now();
    let report = match looks.report || looks.report_json.is_some() {
        true => Some(report(setup, &machine, &outcome, &looks)?),
        // To hash all memory takes its time.
        false => None,
    };
    looks.live.events.finish(&mut machine)?;
    looks.live.dumps.finish();
    let moved = looks.live.moves.finish("the run ended");
    let all_saved = looks.live.saves.finish() && moved;
    let recorded = looks.live.record.finish(&mut machine);
    if outcome.end.is_noteworthy() {
        eprintln!("hypernest: {}", outcome.end);
    }
    if let Some((trace, path)) = &looks.trace {
        let shown = path.display();
        trace
            .finish()
            .with_context(|| format!("cannot write the instruction log {shown}"))?;
    }
    for asked in &looks.walks {
        eprint!("{}", walks(&machine, asked, &setup.names)?);
    }
    if let Some(vcpu) = outcome.end.scene() {
        let names = &setup.names;
        eprint!("{}", Scene::new(&machine, vcpu)?.text(names));
        // The machine's memory is needed for the one that repeats its run.
        drop(machine);
        let last = match &looks.trace {
            Some((trace, _)) => trace.take_last(),
            None if !setup.is_repeatable() => Vec::new(),
            None if looks.always_replay || outcome.running < REPLAY_LIMIT => {
                let _progress = Progress::spinner("running again, for the last instructions");
                // A guest that crashes does so in the instruction at this tick; other ends lie before it.
                let crashed = matches!(
                    outcome.end,
                    End::TripleFault { .. } | End::Unimplemented { .. }
                );
                let end = ticks.saturating_add(u64::from(crashed));
                let mut saved = looks.live.saves.ticks().to_vec();
                saved.extend(looks.live.record.saved());
                replay(setup, &outcome.typed, &saved, end)?
            }
            None => {
                eprintln!("for the last instructions, run again with --break-on triple-fault");
                Vec::new()
            }
        };
        eprint!("{}", postmortem::instructions(&last, names));
    }
    if let Some(report) = report.as_ref().filter(|_| looks.report) {
        eprintln!("{report}");
    }
    if let (Some((file, path)), Some(report)) = (&mut looks.report_json, &report) {
        let shown = path.display();
        file.write_all(report.json().as_bytes())
            .with_context(|| format!("cannot write the report {shown}"))?;
    }
    match outcome.end.status() {
        0 if !all_saved || !recorded => Ok(NOT_SAVED),
        status => Ok(status),
    }
}

/// What is known at the end of a run.
fn report(setup: &Setup, machine: &Machine, outcome: &Outcome, looks: &Looks) -> Result<Report> {
    Ok(Report {
        end: outcome.end.clone(),
        image: setup.description(machine),
        ticks: machine.now(),
        instructions: machine.instructions().unwrap_or(0),
        loading: looks.loading,
        snapshots: looks.live.saves.written().to_vec(),
        running: outcome.running,
        waiting: outcome.waiting,
        stops: outcome.stops,
        state_hash: format!("{:016x}", machine.state_hash()?),
        exits: machine
            .exit_statistics()
            .and_then(|statistics| Exits::new(statistics, machine.failed_entries())),
        regions: machine.vmcs_regions()?,
    })
}

/// The walks of an address on every vCPU.
fn walks(machine: &Machine, asked: &WalkAt, names: &Names) -> Result<String> {
    let WalkAt { level, address } = *asked;
    let at = names.address(level, address);
    let mut text = String::new();
    for vcpu in 0..machine.vcpus() {
        text += &format!("page walk of {} {at} on processor {vcpu}:\n", level.name());
        text += &match machine.walk_at(vcpu, level, address)? {
            Some(walk) => postmortem::walk_text(&walk),
            None => "  there is no current VMCS\n".into(),
        };
    }
    Ok(text)
}

/// Makes the run again, up to tick `end`, for its last instructions. A machine does
/// the same every time, so nothing has to be recorded before something goes wrong.
fn replay(
    setup: &Setup,
    typed: &[(Tick, Vec<u8>)],
    saved: &[Tick],
    end: Tick,
) -> Result<Vec<Last>> {
    let trace_from = end.saturating_sub(REPLAY_TRACED);
    let trace = Trace::last();
    let mut machine = setup.build()?;
    let mut traced = false;
    let mut run_to = |machine: &mut Machine, tick: Tick| -> Result<()> {
        if !traced && tick >= trace_from {
            machine.run(&Until::tick(trace_from))?;
            machine.set_tracer(Some(trace.tracer()))?;
            traced = true;
        }
        machine.run(&Until::tick(tick))?;
        // Nobody reads what is printed again.
        machine.take_serial_output();
        machine.take_debug_output();
        Ok(())
    };
    // At one tick their order is of no consequence.
    let keys = typed.iter().map(|(tick, bytes)| (*tick, Some(bytes)));
    let mut events: Vec<_> = keys.chain(saved.iter().map(|tick| (*tick, None))).collect();
    events.sort_by_key(|(tick, _)| *tick);
    for (tick, bytes) in events {
        run_to(&mut machine, tick)?;
        match bytes {
            Some(bytes) => machine.serial_input(bytes),
            None => drop(machine.save()?),
        }
    }
    run_to(&mut machine, end)?;
    Ok(trace.take_last())
}
