//! What a test's output and exit code say.

use std::time::Duration;

use crate::run::Captured;

/// The command's exit code when its limit in time ran out.
const TIMED_OUT: i32 = 124;
/// Exit codes: the debug-exit port gives `value * 2 + 1`.
const ALL_PASSED: i32 = 1;
const SOME_FAILED: i32 = 3;
const ALL_SKIPPED: i32 = 77;

/// Assertions, as the test printed them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub pass: u64,
    pub fail: u64,
    pub skip: u64,
    /// Failures that the suite expects of KVM and that did not happen: it counts them as failed, we do not.
    pub better: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    Fail(String),
    Skip(String),
    Crash(String),
    Hang,
    /// It ended well and had said nothing.
    Empty,
}

impl Verdict {
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail(_) => "FAIL",
            Self::Skip(_) => "skip",
            Self::Crash(_) => "CRASH",
            Self::Hang => "HANG",
            Self::Empty => "EMPTY",
        }
    }

    pub fn reason(&self) -> &str {
        match self {
            Self::Fail(reason) | Self::Skip(reason) | Self::Crash(reason) => reason,
            Self::Pass | Self::Hang | Self::Empty => "",
        }
    }

    pub fn is_bad(&self) -> bool {
        !matches!(self, Self::Pass | Self::Skip(_))
    }
}

pub struct Report {
    pub verdict: Verdict,
    pub counts: Counts,
    pub time: Duration,
    /// Lines that show what went wrong.
    pub notes: Vec<String>,
}

impl Report {
    pub fn without_run(verdict: Verdict) -> Self {
        Self {
            verdict,
            counts: Counts::default(),
            time: Duration::ZERO,
            notes: Vec::new(),
        }
    }
}

pub fn judge(result: &Captured) -> Report {
    let code = result.status.map(|status| status.code());
    let (lines, summary) = (count_lines(&result.stdout), summary(&result.stdout));
    let verdict = verdict(code, lines, summary, &result.stdout);
    let mut notes: Vec<String> = result
        .stdout
        .lines()
        .filter(|line| {
            line.starts_with("FAIL") || line.contains("nhandled") || line.contains("ssert failed")
        })
        .map(str::to_owned)
        .collect();
    if matches!(verdict, Verdict::Crash(_) | Verdict::Hang | Verdict::Empty) {
        let last = |text: &str, n: usize| -> Vec<String> {
            let lines: Vec<_> = text
                .lines()
                .filter(|line| !line.trim().is_empty())
                .collect();
            lines[lines.len().saturating_sub(n)..]
                .iter()
                .map(|line| format!("| {line}"))
                .collect()
        };
        notes.extend(last(&result.stdout, 4));
        notes.extend(last(&result.stderr, 6));
    }
    // Many tests report everything in the summary and only some of it in lines.
    let mut counts = summary.unwrap_or(lines);
    if summary.is_some() {
        let better = lines.better.min(counts.fail);
        (counts.fail, counts.pass, counts.better) =
            (counts.fail - better, counts.pass + better, better);
    }
    Report {
        verdict,
        counts,
        time: result.time,
        notes,
    }
}

/// `code`: `None` when the process had to be ended, `Some(None)` when a signal ended it.
fn verdict(
    code: Option<Option<i32>>,
    lines: Counts,
    summary: Option<Counts>,
    text: &str,
) -> Verdict {
    let better = lines.better;
    let unexpected = summary.map_or(0, |s| s.fail);
    let failures = lines.fail.max(unexpected.saturating_sub(better));
    match code {
        None | Some(Some(TIMED_OUT)) => Verdict::Hang,
        Some(Some(ALL_PASSED)) if failures > 0 => {
            Verdict::Fail(format!("{failures} failed, yet the exit code says passed"))
        }
        Some(Some(ALL_PASSED)) if text.trim().is_empty() => Verdict::Empty,
        Some(Some(ALL_PASSED)) if summary.is_some_and(|s| s.pass == 0 && s.skip == 0) => {
            Verdict::Empty
        }
        Some(Some(ALL_PASSED)) => Verdict::Pass,
        Some(Some(ALL_SKIPPED)) => Verdict::Skip("the test skips itself".into()),
        Some(Some(SOME_FAILED)) if failures == 0 && better > 0 && unexpected == better => {
            Verdict::Pass
        }
        Some(Some(SOME_FAILED)) if failures > 0 => Verdict::Fail(format!("{failures} failed")),
        Some(Some(code)) => Verdict::Crash(format!("exit code {code}")),
        Some(None) => Verdict::Crash("ended by a signal".into()),
    }
}

fn count_lines(text: &str) -> Counts {
    let mut counts = Counts::default();
    for line in text.lines() {
        match line.split(':').next().unwrap_or_default() {
            "PASS" => counts.pass += 1,
            "FAIL" => counts.fail += 1,
            "XPASS" => counts.better += 1,
            "SKIP" => counts.skip += 1,
            _ => {}
        }
    }
    counts
}

/// The last `SUMMARY: N tests[, N unexpected failures][, ..][, N skipped]`.
fn summary(text: &str) -> Option<Counts> {
    let line = text
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("SUMMARY: "))?;
    let mut counts = Counts::default();
    for part in line.split(", ") {
        let (number, what) = part.split_once(' ')?;
        let number: u64 = number.parse().ok()?;
        match what {
            "tests" => counts.pass = number,
            "unexpected failures" => counts.fail = number,
            "skipped" => counts.skip = number,
            _ => counts.pass = counts.pass.saturating_sub(number), // known and expected failures
        }
    }
    counts.pass = counts.pass.saturating_sub(counts.fail + counts.skip);
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(code: i32, text: &str) -> Verdict {
        verdict(Some(Some(code)), count_lines(text), summary(text), text)
    }

    #[test]
    fn summary_splits_into_passed_failed_and_skipped() {
        let counts = summary(
            "x\nSUMMARY: 20 tests, 2 unexpected failures, 3 expected failures, 5 skipped\n",
        );
        assert_eq!(
            counts,
            Some(Counts {
                pass: 10,
                fail: 2,
                skip: 5,
                better: 0
            })
        );
        assert_eq!(summary("PASS: a\n"), None);
    }

    #[test]
    fn exit_code_and_text_must_agree_for_a_pass() {
        assert_eq!(of(1, "PASS: a\nSUMMARY: 1 tests\n"), Verdict::Pass);
        assert_eq!(of(1, "cpuid 1234\n"), Verdict::Pass);
        assert!(matches!(
            of(1, "FAIL: a\nSUMMARY: 1 tests\n"),
            Verdict::Fail(_)
        ));
        assert!(matches!(
            of(3, "FAIL: a\nSUMMARY: 1 tests, 1 unexpected failures\n"),
            Verdict::Fail(_)
        ));
        assert!(matches!(
            of(77, "SKIP: a\nSUMMARY: 1 tests, 1 skipped\n"),
            Verdict::Skip(_)
        ));
    }

    #[test]
    fn only_what_the_suite_expects_of_kvm_may_go_better_than_it_expects() {
        let one = "PASS: a\nXPASS: b\n";
        let text = format!("{one}SUMMARY: 2 tests, 1 unexpected failures\n");
        assert_eq!(of(3, &text), Verdict::Pass);
        let text = format!("{one}FAIL: c\nSUMMARY: 3 tests, 2 unexpected failures\n");
        assert_eq!(of(3, &text), Verdict::Fail("1 failed".into()));
        // A failure that no line names.
        let text = format!("{one}SUMMARY: 3 tests, 2 unexpected failures\n");
        assert_eq!(of(3, &text), Verdict::Fail("1 failed".into()));
    }

    #[test]
    fn silence_a_time_out_and_other_exit_codes_are_not_passes() {
        assert_eq!(of(1, " \n"), Verdict::Empty);
        assert_eq!(of(1, "SUMMARY: 0 tests\n"), Verdict::Empty);
        assert_eq!(of(TIMED_OUT, "PASS: a\n"), Verdict::Hang);
        assert!(matches!(of(3, "PASS: a\n"), Verdict::Crash(_)));
        assert!(matches!(of(0, "PASS: a\n"), Verdict::Crash(_)));
        assert!(matches!(
            verdict(Some(None), Counts::default(), None, ""),
            Verdict::Crash(_)
        ));
        assert_eq!(
            verdict(None, Counts::default(), None, "PASS"),
            Verdict::Hang
        );
    }
}
