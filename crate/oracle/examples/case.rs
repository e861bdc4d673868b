//! Runs cases from the command line or standard input on both engines and prints what each says:
//! `cargo run -p hypernest-oracle --example case -- '[04 01] add al,1 : al=ff =>'`. Outputs in the line are not needed
//! and not looked at; without a host engine only ours is printed.

use std::io::BufRead;

use hypernest_oracle::case::Engine;
use hypernest_oracle::{Ours, text};

fn main() {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let lines = if given.is_empty() {
        std::io::stdin()
            .lock()
            .lines()
            .map_while(Result::ok)
            .collect()
    } else {
        given
    };
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(Ours::new())];
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    match hypernest_oracle::Host::new() {
        Ok(host) => engines.insert(0, Box::new(host)),
        Err(error) => println!("no host engine: {error}"),
    }
    for line in lines {
        let line = if line.contains("=>") {
            line
        } else {
            format!("{line} =>")
        };
        match text::parse(&line) {
            Err(error) => println!("{line}\n    {error}"),
            Ok(expected) => {
                println!("{}", text::print(&expected.case, None, &[]));
                for engine in &mut engines {
                    let outcome = engine.run(&expected.case);
                    let result = text::print_outcome(&expected.case, &outcome, engine.memory());
                    println!("    {}:{result}", engine.name());
                }
            }
        }
    }
}
