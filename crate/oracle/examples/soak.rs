//! Runs random cases against the host's processor for as long as one likes.
//!
//! ```text
//! cargo run -p hypernest-oracle --release --example soak -- [N [FILTER]] [--seed S] [--mode 32|64] [--threads T]
//! ```
//!
//! N cases (10 000 where none is given) over the forms whose name contains FILTER, in any letter case. Forms are named as
//! iced-x86 does (`Add_rm8_r8`); `mul` takes all whose mnemonic has it, `=mul` only MUL itself, `a,b` both.
//! Each difference prints as a line for a case file, with our result under it. Exit status 1 on
//! a difference, 2 on wrong arguments.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() {
    println!("skipped: the host is not x86-64 Linux");
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> std::process::ExitCode {
    native::main()
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod native {
    use std::process::ExitCode;
    use std::time::Instant;

    use hypernest_oracle::judge::Tally;
    use hypernest_oracle::{Mode, campaign};

    const USAGE: &str = "soak [N [FILTER]] [--seed S] [--mode 32|64] [--threads T]";

    struct Options {
        cases: u64,
        filter: String,
        seed: u64,
        modes: Vec<Mode>,
        threads: u64,
    }

    fn parse() -> Option<Options> {
        let mut options = Options {
            cases: 10_000,
            filter: String::new(),
            seed: 1,
            modes: vec![Mode::Long, Mode::Compat],
            threads: 1,
        };
        let mut arguments = std::env::args().skip(1);
        if let Some(cases) = arguments.next() {
            options.cases = cases.replace('_', "").parse().ok()?;
        }
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--seed" => options.seed = arguments.next()?.parse().ok()?,
                "--threads" => {
                    options.threads = arguments.next()?.parse().ok().filter(|t| *t > 0)?
                }
                "--mode" => {
                    options.modes = match arguments.next()?.as_str() {
                        "32" => vec![Mode::Compat],
                        "64" => vec![Mode::Long],
                        _ => return None,
                    }
                }
                other if !other.starts_with('-') => options.filter = other.to_owned(),
                _ => return None,
            }
        }
        Some(options)
    }

    pub fn main() -> ExitCode {
        let Some(options) = parse() else {
            eprintln!("usage: {USAGE}");
            return ExitCode::from(2);
        };
        let forms = campaign::select(&options.modes, &options.filter);
        if forms.is_empty() {
            eprintln!("no form's name contains `{}`", options.filter);
            return ExitCode::from(2);
        }
        let start = Instant::now();
        let share = options.cases.div_ceil(options.threads);
        let results: Vec<_> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..options.threads)
                .map(|n| {
                    let forms = &forms;
                    let seed = options.seed + (n << 32);
                    scope.spawn(move || campaign::run(forms, seed, share))
                })
                .collect();
            workers.into_iter().map(|w| w.join()).collect()
        });
        let mut tally = Tally::default();
        for result in results {
            match result {
                Ok(Ok(part)) => tally.merge(part),
                Ok(Err(unavailable)) => {
                    println!("skipped: {unavailable}");
                    return ExitCode::SUCCESS;
                }
                Err(_) => return ExitCode::FAILURE,
            }
        }
        tally.print();
        let seconds = start.elapsed().as_secs_f64();
        println!("{:.0} cases/s", tally.cases as f64 / seconds);
        if tally.differences() > 0 {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }
}
