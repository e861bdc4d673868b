//! The `hypernest` command: boots an image on a machine in software, on the terminal.

mod args;
mod current_vmcs;
mod drive;
mod dump;
mod exit_table;
mod exits;
mod files;
mod gdb;
mod migrate;
mod monitor;
mod perfetto;
mod postmortem;
mod progress;
mod record;
mod report;
mod run;
mod setup;
mod snapshot;
mod terminal;
mod trace;
mod vmcs;
mod vmcs_dump;

/// Exit status for bad input.
const BAD_INPUT: i32 = 2;
/// Exit status when the host fails during a run.
const HOST_FAILED: i32 = 1;

/// Exit status when nobody knows who owns the machine.
const UNDECIDED: i32 = 5;

fn main() {
    let status = match args::parse(std::env::args_os()) {
        Ok(args) => execute(&args),
        Err(message) => {
            complain(&message);
            BAD_INPUT
        }
    };
    std::process::exit(status);
}

fn execute(args: &args::Cli) -> i32 {
    let result = match &args.command {
        Some(args::Command::Run(args)) => run::run(args),
        Some(args::Command::Resume(args)) => run::resume(args),
        Some(args::Command::Replay(args)) => record::replay(args),
        Some(args::Command::Snapshot(command)) => {
            snapshot::run(command).map_err(|error| error.context(run::BadInput))
        }
        Some(args::Command::Receive(args)) => run::receive(args),
        Some(args::Command::Migrate(command)) => {
            migrate::decide(command).map_err(|error| error.context(run::BadInput))
        }
        Some(args::Command::Vmcs(command)) => {
            vmcs::run(command).map_err(|error| error.context(run::BadInput))
        }
        None => run::run_demo(),
    };
    result.unwrap_or_else(|error| {
        if error.downcast_ref::<run::BadInput>().is_some() {
            // The marker is outermost; what it marks is the message.
            let parts: Vec<String> = error.chain().skip(1).map(ToString::to_string).collect();
            complain(&parts.join(": "));
            BAD_INPUT
        } else if error.downcast_ref::<migrate::Undecided>().is_some() {
            let parts: Vec<String> = error.chain().skip(1).map(ToString::to_string).collect();
            complain(&parts.join(": "));
            UNDECIDED
        } else {
            complain(&format!("{error:#}"));
            HOST_FAILED
        }
    })
}

/// One line on stderr.
fn complain(message: &str) {
    eprintln!("hypernest: {}", message.replace('\n', " "));
}
