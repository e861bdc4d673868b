//! A number of random cases over a selection of forms, our processor against the host's.

use iced_x86::Code;

use crate::case::Mode;
use crate::forms::forms;
use crate::generate;
use crate::host::{Host, Unavailable};
use crate::judge::{Judge, Tally};
use crate::ours::Ours;
use crate::rng::Rng;

/// The forms of the modes whose name contains one of the comma-separated parts of `filter`. A part
/// that starts with `=` is a whole mnemonic. Everything when `filter` is empty.
pub fn select(modes: &[Mode], filter: &str) -> Vec<(Mode, Code)> {
    let wanted = |code: Code| {
        let name = format!("{code:?}").to_lowercase();
        let mnemonic = format!("{:?}", code.mnemonic()).to_lowercase();
        filter.is_empty()
            || filter.to_lowercase().split(',').any(|part| {
                part.strip_prefix('=')
                    .map_or_else(|| name.contains(part), |whole| mnemonic == whole)
            })
    };
    modes
        .iter()
        .flat_map(|mode| forms(*mode).into_iter().map(|code| (*mode, code)))
        .filter(|(_, code)| wanted(*code))
        .collect()
}

/// Runs `cases` cases, going round the forms. The same seed gives the same cases.
pub fn run(forms: &[(Mode, Code)], seed: u64, cases: u64) -> Result<Tally, Unavailable> {
    let mut host = Host::new()?;
    let mut ours = Ours::new();
    let mut judge = Judge {
        host: &mut host,
        ours: &mut ours,
        unstable: 0,
    };
    let mut rng = Rng::new(seed);
    let mut tally = Tally::default();
    for (mode, code) in forms.iter().cycle().take(cases as usize) {
        if let Some(case) = generate::case(&mut rng, *code, *mode) {
            tally.run(&mut judge, *code, &case);
        }
    }
    Ok(tally)
}
