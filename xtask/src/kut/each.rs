//! A file of many sub-tests as tests of their own, each run alone.

use std::path::Path;

use anyhow::{Result, bail};

use super::config::{Test, glob};

/// A word that names no sub-test: the guest lists all it has and runs none.
const NOTHING: &str = "no-such-test";

/// What asks the KVM below it for behaviour that no processor promises. Told that there is no test device,
/// it skips itself.
const KVM_ONLY: [&str; 1] = ["atomic_switch_overflow_msrs_test"];

/// The sub-tests of every file in `tests`, named by the guests themselves. `run` gives a test's output.
pub fn split(tests: &[Test], run: impl Fn(&Test) -> Result<String>) -> Result<Vec<Test>> {
    let mut each = Vec::new();
    let mut files: Vec<&str> = Vec::new();
    for test in tests {
        if files.contains(&test.file.as_str()) {
            continue;
        }
        files.push(&test.file);
        let names = names(&run(&test.alone(NOTHING))?);
        if names.is_empty() {
            bail!("{} does not list its sub-tests", test.file);
        }
        let sections: Vec<&Test> = tests.iter().filter(|t| t.file == test.file).collect();
        each.extend(names.iter().map(|name| {
            let mut alone = section_of(&sections, name).alone(name);
            alone.calls_kvm |= KVM_ONLY.contains(&name.as_str());
            alone
        }));
    }
    Ok(each)
}

/// Lines `filter = .., test = NAME`, blanks in a name as the filters have them.
fn names(output: &str) -> Vec<String> {
    output
        .lines()
        .filter(|line| line.starts_with("filter = "))
        .filter_map(|line| line.split_once(", test = "))
        .map(|(_, name)| name.trim().replace(' ', "_"))
        .collect()
}

/// The section that says what a sub-test needs: the first that names it, else the first.
fn section_of<'a>(sections: &[&'a Test], name: &str) -> &'a Test {
    let names_it = |test: &&&Test| {
        let mut words = test.args.split_whitespace();
        words.any(|word| !word.starts_with('-') && glob(word.as_bytes(), name.as_bytes()))
    };
    sections.iter().find(names_it).unwrap_or(&sections[0])
}

/// The test once more with two vCPUs, where it skips itself for want of a second one.
pub fn with_second_cpu(test: &Test, logs: &Path) -> Option<Test> {
    let log = std::fs::read_to_string(logs.join(test.log_name())).ok()?;
    let mut again = test.clone();
    again.smp = 2;
    (test.smp == 1 && log.contains("CPU count < 2")).then_some(again)
}

#[cfg(test)]
mod tests {
    use super::super::config;
    use super::*;

    const TEXT: &str = "
[vmx]
file = vmx.flat
test_args = \"-ept_access* -vmx_sipi_signal_test\"
[ept]
file = vmx.flat
test_args = \"ept_access*\"
qemu_params = -m 2560
[vmx_sipi]
file = vmx.flat
smp = 2
test_args = vmx_sipi_signal_test
groups = nodefault
[other]
file = other.flat
";
    const LISTED: &str = "filter = no-such-test, test = I/O bitmap\n\
        filter = no-such-test, test = ept_access_test_a\n\
        filter = no-such-test, test = vmx_sipi_signal_test\nFAIL: none\n";

    #[test]
    fn every_name_the_guest_lists_is_a_test_with_what_its_section_needs() {
        let tests: Vec<Test> = config::parse(TEXT).into_iter().take(3).collect();
        let each = split(&tests, |test| {
            assert_eq!(test.args, NOTHING);
            Ok(LISTED.into())
        })
        .unwrap();
        let of = |t: &Test| (t.name.clone(), t.args.clone(), t.memory_mib(), t.smp);
        assert_eq!(
            each.iter().map(of).collect::<Vec<_>>(),
            [
                ("I/O_bitmap".into(), "I/O_bitmap".into(), 128, 1),
                (
                    "ept_access_test_a".into(),
                    "ept_access_test_a".into(),
                    2560,
                    1
                ),
                (
                    "vmx_sipi_signal_test".into(),
                    "vmx_sipi_signal_test".into(),
                    128,
                    2
                ),
            ]
        );
        assert_eq!(each[0].log_name(), "I-O_bitmap.log");
    }

    #[test]
    fn a_file_that_lists_nothing_cannot_be_split() {
        let tests: Vec<Test> = config::parse(TEXT).into_iter().skip(3).collect();
        assert!(split(&tests, |_| Ok("PASS: a\n".into())).is_err());
    }
}
