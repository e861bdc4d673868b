//! Our processor against the host's, over all implemented user-mode forms.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use hypernest_oracle::judge::{Judge, Tally, decode};
use hypernest_oracle::{Host, Mode, Ours, campaign, text};

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

/// What long runs found, none of it our processor's: how the host's answer is read.
const FINDINGS: &[&str] = &[
    // #DE and #XM while the summary of x87 exceptions is set.
    "[66 f7 f5] div bp : mode=32 rdx=ffffffff fcw=346 fsw=b3a9 ftw=ff =>",
    "[f6 fc] idiv ah : mode=32 fcw=1474 fsw=a6bc ftw=ff =>",
    "[0f 59 c0] mulps xmm0,xmm0 : fcw=b62 fsw=9bba ftw=ff mxcsr=f000 xmm0=ff7fffff =>",
    // A summary that does not fit its exceptions, and a fault that leaves it unsaved.
    "[67 48 f7 f2] div rdx : fsw=8a9d ftw=ff =>",
    "[66 0f 6f 00] movdqa xmm0,[rax] : rax=1 fsw=8a9d ftw=ff =>",
    // Wraps round 4 GiB where nothing is mapped: two faults, either may come first.
    "[0f ae 25 80 ff ff ff] xsave [0FFFFFF80h] : mode=32 ftw=ff =>",
];

#[test]
fn findings_of_long_runs_stay_settled() {
    let mut host = match Host::new() {
        Ok(host) => host,
        Err(error) => {
            println!("skipped: the host's processor cannot be asked: {error}");
            return;
        }
    };
    let mut ours = Ours::new();
    let mut judge = Judge {
        host: &mut host,
        ours: &mut ours,
        unstable: 0,
    };
    let mut tally = Tally::default();
    for line in FINDINGS {
        let case = text::parse(line).expect("a case").case;
        tally.run(&mut judge, decode(&case).code(), &case);
    }
    tally.print();
    assert_eq!(tally.differences(), 0, "differences are printed above");
}
