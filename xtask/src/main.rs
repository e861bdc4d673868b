//! Project chores, run as `cargo xtask CHORE`. See README.md.

mod bench;
mod bochs;
mod build;
mod conformance;
mod cpio;
mod demo;
mod enlightened;
mod guests;
mod integration;
mod kut;
mod moves;
mod nested;
mod nested_state;
mod run;
mod serve;
mod setup;
mod snapshots;
mod soak;
mod test;

use std::process::ExitCode;

const USAGE: &str = "\
cargo xtask CHORE

  demo [--check] [--port N]    build everything and serve the page on loopback; --check builds and exits
  test [SUITE..] [--list]      run all test suites, or those named
  bench [PART..] [--pairs N]   measure against QEMU TCG and Bochs where they are installed
  guests                       make the guest images in .cache/guests
  kut DIR [FILTER..] [--each]  run a built kvm-unit-tests tree; FILTER: a test, file or group name, * allowed
  soak [PART..]                long runs; the last result stays in .cache/soak.txt
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        ["demo", rest @ ..] => demo::main(rest),
        ["test", rest @ ..] => test::main(rest),
        ["bench", rest @ ..] => bench::main(rest),
        ["guests"] => guests::make_all().map(|()| true),
        ["kut", rest @ ..] => kut::main(rest),
        ["soak", rest @ ..] => soak::main(rest),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
