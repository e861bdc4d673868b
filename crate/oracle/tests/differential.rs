//! Our processor against the host's, over all implemented user-mode forms.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use hypernest_oracle::judge::Tally;
use hypernest_oracle::{Host, Mode, campaign};

/// Cases in a normal run; `soak` runs as many as one likes.
const CASES: u64 = 200_000;

/// Instructions that stop the machine as not built: the rest of x87 is a later step, and CPUID
/// cannot hide it.
const NOT_BUILT: &[&str] = &["x87 transcendental instruction"];

#[test]
fn random_cases_end_as_on_the_host() {
    if let Err(error) = Host::new() {
        println!("skipped: the host's processor cannot be asked: {error}");
        return;
    }
    let forms = campaign::select(&[Mode::Long, Mode::Compat], "");
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4)) as u64;
    let share = CASES.div_ceil(threads);
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|n| {
                let forms = &forms;
                scope.spawn(move || campaign::run(forms, n, share))
            })
            .collect();
        for worker in workers {
            let part = worker.join().expect("a worker that does not panic");
            tally.merge(part.expect("a host engine, as a moment ago"));
        }
    });
    tally.print();
    assert!(tally.cases >= CASES);
    assert_eq!(tally.differences(), 0, "differences are printed above");
    for (count, what) in tally.unimplemented.values() {
        assert!(
            NOT_BUILT.contains(what),
            "{what} not implemented, {count} cases"
        );
    }
}
