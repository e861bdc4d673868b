//! Reading `x86/unittests.cfg`.

use std::fs;
use std::path::Path;

/// One section.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Test {
    pub name: String,
    pub file: String,
    pub smp: u32,
    /// The test's command line.
    pub args: String,
    /// Options for QEMU; of these `-cpu` and `-m` mean something here.
    params: String,
    groups: String,
    arch: String,
    accel: String,
    check: String,
    disabled_if: String,
    /// Seconds.
    pub timeout: Option<u64>,
    /// Whether it asks KVM for something if it is told of a test device. There is no KVM here to answer.
    pub calls_kvm: bool,
}

/// Every section, in the file's order.
pub fn parse(text: &str) -> Vec<Test> {
    let mut tests: Vec<Test> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let line = line.trim();
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            tests.push(Test {
                name: name.into(),
                smp: 1,
                ..Test::default()
            });
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        let Some(test) = tests.last_mut().filter(|_| !line.starts_with('#')) else {
            continue;
        };
        let mut value = value.trim().to_owned();
        // """ opens a value of several lines.
        if let Some(first) = value.strip_prefix("\"\"\"") {
            let mut whole = first.to_owned();
            for next in lines.by_ref() {
                whole.push(' ');
                match next.trim_end().strip_suffix("\"\"\"") {
                    Some(last) => {
                        whole.push_str(last);
                        break;
                    }
                    None => whole.push_str(next.trim_end_matches('\\')),
                }
            }
            value = whole;
        }
        match key.trim() {
            "file" => {
                test.calls_kvm = value == "apic.flat";
                test.file = value;
            }
            "smp" => test.smp = value.parse().unwrap_or(1),
            "test_args" => test.args = shell_words(&value).join(" "),
            "extra_params" | "qemu_params" => {
                // Older trees give the command line here.
                let words = shell_words(&value);
                if let Some(at) = words.iter().position(|word| word == "-append") {
                    test.args = words.get(at + 1).cloned().unwrap_or_default();
                }
                test.params = value;
            }
            "groups" => test.groups = value,
            "arch" => test.arch = value,
            "accel" => test.accel = value,
            "check" => test.check = value,
            "disabled_if" => test.disabled_if = value,
            "timeout" => test.timeout = value.trim_end_matches('s').parse().ok(),
            _ => {}
        }
    }
    tests
}

/// The words of a value, quotes undone. Command substitution is left as it stands: nothing from the file is
/// executed.
fn shell_words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut open) = (Vec::new(), String::new(), None, false);
    for c in text.chars() {
        match (quote, c) {
            (Some(q), _) if c == q => quote = None,
            (None, '"' | '\'') => (quote, open) = (Some(c), true),
            (None, _) if c.is_whitespace() => {
                if open || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                open = false;
            }
            _ => word.push(c),
        }
    }
    if open || !word.is_empty() {
        words.push(word);
    }
    words
}

impl Test {
    /// Whether `filter` names this test, its file or one of its groups; `*` stands for anything.
    pub fn matches(&self, filter: &str) -> bool {
        let stem = self.file.trim_end_matches(".flat");
        std::iter::once(self.name.as_str())
            .chain([stem, stem.trim_end_matches("_test")])
            .chain(self.groups.split_whitespace())
            .any(|name| glob(filter.as_bytes(), name.as_bytes()))
    }

    /// Why this test cannot say anything here.
    pub fn reason_to_skip(&self, tests_dir: &Path) -> Option<String> {
        if !matches!(self.arch.as_str(), "" | "x86_64") {
            return Some(format!("{} only", self.arch));
        }
        if !matches!(self.accel.as_str(), "" | "tcg") {
            return Some(format!("needs {}", self.accel));
        }
        if self
            .groups
            .split_whitespace()
            .any(|group| group == "nodefault")
        {
            return Some("marked as manual run only".into());
        }
        if !self.disabled_if.is_empty() {
            return Some(format!("disabled if: {}", self.disabled_if));
        }
        for wanted in self.check.split_whitespace() {
            let (path, value) = wanted.split_once('=').unwrap_or((wanted, ""));
            if fs::read_to_string(path).unwrap_or_default().trim() != value {
                return Some(format!("{path} is not {value}"));
            }
        }
        (!tests_dir.join(&self.file).is_file()).then(|| format!("{} was not built", self.file))
    }

    /// The sub-test `name` of this file, by itself, whatever would keep this section from running.
    pub fn alone(&self, name: &str) -> Test {
        Test {
            name: name.into(),
            args: name.into(),
            groups: String::new(),
            check: String::new(),
            disabled_if: String::new(),
            ..self.clone()
        }
    }

    /// Name of the file that keeps its output.
    pub fn log_name(&self) -> String {
        format!("{}.log", self.name.replace('/', "-"))
    }

    /// Whether the test wants VMX.
    pub fn wants_vmx(&self) -> bool {
        let wanted = self.param("-cpu").unwrap_or("");
        wanted.split(',').any(|feature| feature == "+vmx")
    }

    fn param(&self, option: &str) -> Option<&str> {
        let mut words = self.params.split_whitespace();
        words.find(|word| *word == option)?;
        words.next()
    }

    /// RAM in MiB; 128 where the test does not say.
    pub fn memory_mib(&self) -> u64 {
        let Some(size) = self.param("-m") else {
            return 128;
        };
        let size = size.to_ascii_lowercase();
        let (digits, unit) = size.split_at(size.trim_end_matches(['g', 'm']).len());
        digits
            .parse::<u64>()
            .map_or(128, |n| n << if unit == "g" { 10 } else { 0 })
    }

    /// The CPU model that comes nearest to what the test asks of QEMU.
    pub fn model(&self) -> &'static str {
        let wanted = self.param("-cpu").unwrap_or("");
        if wanted.contains("vendor=AuthenticAMD") {
            "baseline-amd"
        } else if wanted.split(',').any(|feature| feature == "-x2apic") {
            "baseline"
        } else {
            "hypernest"
        }
    }

    /// What the test would have QEMU's processor do without, and our model does not. The models
    /// are whole: these stay.
    pub fn removed_features(&self) -> Vec<&str> {
        let wanted = self.param("-cpu").unwrap_or("");
        let absent: &[&str] = match self.model() {
            "hypernest" => &["pku"],
            _ => &["pku", "x2apic"],
        };
        wanted
            .split(',')
            .filter_map(|feature| feature.strip_prefix('-'))
            .filter(|feature| !absent.contains(feature))
            .collect()
    }
}

pub fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|at| glob(rest, &text[at..])),
        Some((c, rest)) => text
            .split_first()
            .is_some_and(|(t, more)| c == t && glob(rest, more)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "
# comment
[xapic]
file = apic.flat
smp = 2
qemu_params = -cpu qemu64,-x2apic,-pku,+tsc-deadline -m 2g
arch = x86_64
timeout = 60
groups = apic slow

[old]
file = access_test.flat
extra_params = -cpu max,+vmx -append \"a  'b\"
[args]
file = v.flat
test_args = \"-x y*\" z
[i386]
file = c.flat
arch = i386
";

    #[test]
    fn sections_carry_file_processors_features_memory_and_limits() {
        let tests = parse(TEXT);
        assert_eq!(
            tests.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(),
            ["xapic", "old", "args", "i386"]
        );
        let xapic = &tests[0];
        assert_eq!(
            (xapic.file.as_str(), xapic.smp, xapic.timeout),
            ("apic.flat", 2, Some(60))
        );
        assert_eq!(
            (xapic.model(), xapic.removed_features(), xapic.memory_mib()),
            ("baseline", vec![], 2048)
        );
        assert!(xapic.calls_kvm && !xapic.wants_vmx() && tests[1].wants_vmx());
        assert_eq!(
            (tests[1].args.as_str(), tests[1].memory_mib(), tests[1].smp),
            ("a  'b", 128, 1)
        );
        assert_eq!(tests[2].args, "-x y* z");
        assert_eq!(
            tests[3].reason_to_skip(Path::new("/")),
            Some("i386 only".into())
        );
    }

    #[test]
    fn filters_name_tests_files_and_groups_but_not_parts_of_them() {
        let tests = parse(TEXT);
        let matching = |f: &str| {
            tests
                .iter()
                .filter(|t| t.matches(f))
                .map(|t| t.name.as_str())
                .collect::<Vec<_>>()
        };
        assert_eq!(matching("apic"), ["xapic"]);
        assert_eq!(matching("slow"), ["xapic"]);
        assert_eq!(matching("access"), ["old"]);
        assert_eq!(matching("*a*"), ["xapic", "old", "args"]);
        assert!(matching("api").is_empty());
    }

    #[test]
    fn values_of_several_lines_are_one_value() {
        let tests =
            parse("[a]\nfile = a.flat\nqemu_params = \"\"\"-cpu max \\\n -m 256\"\"\"\nsmp = 3\n");
        assert_eq!((tests[0].memory_mib(), tests[0].smp), (256, 3));
    }
}
