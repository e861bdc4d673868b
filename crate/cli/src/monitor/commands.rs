//! What the monitor's commands do to a run.

use hypernest_machine::Machine;
use serde_json::{Value, json};

use super::request::{Command, Move, Refusal, answer};
use crate::drive::Run;
use crate::exit_table::Exits;
use crate::migrate;
use crate::report::End;

/// What the run is to do after requests were answered.
pub enum Attended {
    /// Go on.
    GoOn,
    /// Wait for further requests.
    Wait,
    /// End.
    End(End),
}

/// Answers the requests that wait.
pub fn attend(run: &mut Run<'_>) -> Attended {
    let Some(mut monitor) = run.monitor.take() else {
        return Attended::GoOn;
    };
    let mut end = monitor.ended().then_some(End::Signal);
    while end.is_none() {
        let Some((request, reply)) = monitor.next() else {
            break;
        };
        let outcome = execute(run, &request.command, &mut end);
        reply.send(answer(&request.id, outcome));
    }
    run.monitor = Some(monitor);
    match end {
        Some(end) => Attended::End(end),
        // A machine that stands still can move all the same.
        None if run.paused && !run.moves().is_under_way() => Attended::Wait,
        None => Attended::GoOn,
    }
}

fn execute(run: &mut Run<'_>, command: &Command, end: &mut Option<End>) -> Result<Value, Refusal> {
    match command {
        Command::Status => Ok(status(run)),
        Command::Pause => {
            run.paused = true;
            Ok(position(run))
        }
        Command::Resume => {
            run.paused = false;
            Ok(position(run))
        }
        Command::Snapshot { file } => {
            run.save(file)
                .map_err(|error| Refusal::new("failed", format!("{error:#}")))?;
            Ok(position(run))
        }
        Command::Migrate(how) => {
            begin(run, how)?;
            Ok(position(run))
        }
        Command::QueryExits => exits(run.machine),
        Command::QueryRegions => regions(run.machine),
        Command::Stop => {
            *end = Some(End::Monitor);
            Ok(position(run))
        }
    }
}

fn begin(run: &mut Run<'_>, how: &Move) -> Result<(), Refusal> {
    let bad = |why: String| Refusal::new("bad-request", why);
    let to = migrate::peer(&how.to).map_err(bad)?;
    match &to {
        migrate::Peer::File(path) if !path.is_absolute() => {
            return Err(bad("give the absolute path of the file".into()));
        }
        migrate::Peer::Standard => return Err(bad("give an address or a file".into())),
        _ => {}
    }
    let settings = migrate::Settings {
        token: how.token.clone().into_bytes(),
        bandwidth: how.bandwidth,
        downtime: how.downtime.unwrap_or(20).saturating_mul(1000),
        ..migrate::Settings::default()
    };
    run.move_to(to, &how.origins, settings)
        .map_err(|error| Refusal::new("failed", format!("{error:#}")))
}

/// How far a move is.
fn moving(run: &Run<'_>) -> Value {
    let moves = run.moves();
    if !moves.is_under_way() {
        return Value::Null;
    }
    let Some(progress) = moves.progress() else {
        return json!({ "phase": "connecting" });
    };
    let pages: u64 = progress.rounds.iter().map(|round| round.pages).sum();
    json!({
        "phase": "moving",
        "rounds": progress.rounds.len(),
        "pages": pages + progress.round.pages,
        "bytes": progress.bytes,
        "rate": progress.rate,
        "share": progress.share,
        "expected": progress.expected,
    })
}

/// Whether the machine runs, and where it is.
fn position(run: &Run<'_>) -> Value {
    json!({
        "state": if run.paused { "paused" } else { "running" },
        "tick": run.machine.now(),
    })
}

fn status(run: &Run<'_>) -> Value {
    let machine = &*run.machine;
    let config = machine.config();
    let vmcs = machine.vmx_profile().map(|profile| {
        let accepted: Vec<&str> = profile.accepted().map(|layout| layout.name()).collect();
        json!({
            "advertised": profile.layout.name(),
            "written": profile.written().name(),
            "accepted": accepted,
        })
    });
    let mut status = position(run);
    let more = json!({
        "instructions": machine.instructions(),
        "seconds": run.seconds(),
        "memory": config.memory,
        "cpus": config.cpus,
        "cpu": config.model,
        "hyperv": config.hyperv,
        "vmcs": vmcs,
        "image": machine.boot_description(),
        "migration": moving(run),
    });
    if let (Some(status), Value::Object(more)) = (status.as_object_mut(), more) {
        status.extend(more);
    }
    status
}

fn exits(machine: &Machine) -> Result<Value, Refusal> {
    let Some(statistics) = machine.exit_statistics() else {
        let message = "this machine's engine does not count VM exits";
        return Err(Refusal::new("not-available", message));
    };
    let exits = Exits::new(statistics, machine.failed_entries());
    Ok(exits.map_or_else(|| json!({ "entries": 0, "exits": 0 }), |exits| exits.json()))
}

fn regions(machine: &Machine) -> Result<Value, Refusal> {
    let regions = machine
        .vmcs_regions()
        .map_err(|error| Refusal::new("failed", error.to_string()))?;
    let rows = regions.iter().map(|region| {
        json!({
            "layout": region.layout,
            "revision": region.revision,
            "pages": region.pages,
            "written": region.written,
        })
    });
    Ok(rows.collect())
}
