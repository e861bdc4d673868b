//! Capabilities from text, as tools print them.

use alloc::string::String;

use super::{Caps, FIRST_MSR, LAST_MSR, capabilities};

/// A dump of the capability MSRs cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DumpError {
    /// A line is not understood.
    #[error("line {line}: {problem}")]
    Line {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: DumpProblem,
    },
    /// The other MSRs say that this one exists, and it is not there.
    #[error("{name} ({msr:#x}) is not in the dump, and must exist by what the others say")]
    Absent {
        /// The MSR.
        msr: u32,
        /// Its name.
        name: &'static str,
    },
}

/// What is wrong with a line of a dump.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DumpProblem {
    /// It begins with something that is no VMX capability MSR.
    #[error("{0} is no VMX capability MSR (0x480 to 0x493, or a name such as IA32_VMX_BASIC)")]
    Msr(String),
    /// Name and number are of different MSRs.
    #[error("{0} is not the number of the MSR before it")]
    Number(String),
    /// The value is no number of 64 bits.
    #[error("{0} is no hexadecimal number of at most 64 bits")]
    Value(String),
    /// There is no value.
    #[error("the MSR has no value")]
    NoValue,
    /// There is more after the value.
    #[error("{0} after the value")]
    Rest(String),
    /// The MSR was there before, with another value.
    #[error("MSR {0:#x} for the second time, with another value")]
    Twice(u32),
}

impl Caps {
    /// Reads a dump: a line per MSR, with its number (hexadecimal) or name, and its value
    /// (hexadecimal).
    ///
    /// These lines mean the same: `0x480 0x00d8100011e57ed0`, `IA32_VMX_BASIC=0xd8100011e57ed0`,
    /// `MSR_IA32_VMX_BASIC (0x480): d8100011e57ed0`, `rdmsr 0x480 d8100011e57ed0`; and a `rdmsr 0x480`
    /// with the value alone on the next line. A `#` begins a comment, but for a line on which it is the
    /// prompt of a `rdmsr`.
    ///
    /// # Errors
    ///
    /// If a line is not understood, or an MSR is absent that must exist. The values may still make no
    /// sense: ask [`missing`](Self::missing).
    pub fn from_dump(text: &str) -> Result<Self, DumpError> {
        let mut caps = Self::default();
        let mut seen = 0u32;
        let mut pending = None;
        let at = |line, problem| DumpError::Line { line, problem };
        for (line, text) in (1..).zip(text.lines()) {
            let mut words = words(text).peekable();
            let Some(&first) = words.peek() else {
                continue;
            };
            let msr = match pending.take() {
                Some((line, _)) if text.contains("rdmsr") => {
                    return Err(at(line, DumpProblem::NoValue));
                }
                Some((_, msr)) => msr,
                None => {
                    words.next();
                    let msr = parse_msr(first);
                    let msr = msr.ok_or_else(|| at(line, DumpProblem::Msr(short(first))))?;
                    if named(first)
                        && let Some(number) = words.next_if(|word| is_msr_number(word))
                        && parse_hex(number) != Some(msr.into())
                    {
                        return Err(at(line, DumpProblem::Number(short(number))));
                    }
                    msr
                }
            };
            let Some(value) = words.next() else {
                pending = Some((line, msr));
                continue;
            };
            let parsed = parse_hex(value);
            let parsed = parsed.ok_or_else(|| at(line, DumpProblem::Value(short(value))))?;
            if let Some(rest) = words.next() {
                return Err(at(line, DumpProblem::Rest(short(rest))));
            }
            let bit = 1u32 << (msr - FIRST_MSR);
            if let Some(slot) = caps.slot_mut(msr) {
                if seen & bit != 0 && *slot != parsed {
                    return Err(at(line, DumpProblem::Twice(msr)));
                }
                *slot = parsed;
            }
            seen |= bit;
        }
        if let Some((line, _)) = pending {
            return Err(at(line, DumpProblem::NoValue));
        }
        let exists = |&msr: &u32| caps.get(msr).is_some() && seen >> (msr - FIRST_MSR) & 1 == 0;
        match (FIRST_MSR..=LAST_MSR).find(exists) {
            Some(msr) => Err(DumpError::Absent {
                msr,
                name: name_of(msr),
            }),
            None => Ok(caps),
        }
    }
}

/// The words of a line that say something: no comment, no command, no punctuation.
fn words(line: &str) -> impl Iterator<Item = &str> {
    let line = line.trim_start();
    let prompt = line.strip_prefix('#').map(str::trim_start);
    let line = match prompt {
        Some(command) if command.starts_with("rdmsr") => command,
        _ => line.split('#').next().unwrap_or_default(),
    };
    line.split(|c: char| c.is_whitespace() || "=:,;()[]$".contains(c))
        .filter(|word| !word.is_empty() && *word != "rdmsr" && *word != "MSR")
}

fn parse_hex(word: &str) -> Option<u64> {
    let digits = word.strip_prefix("0x").or_else(|| word.strip_prefix("0X"));
    let digits = digits.unwrap_or(word);
    if digits.starts_with(['+', '-']) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

fn is_msr_number(word: &str) -> bool {
    parse_hex(word).is_some_and(|number| (FIRST_MSR.into()..=LAST_MSR.into()).contains(&number))
}

fn named(word: &str) -> bool {
    parse_hex(word).is_none()
}

fn parse_msr(word: &str) -> Option<u32> {
    if is_msr_number(word) {
        return parse_hex(word).map(|number| number as u32);
    }
    let name = word.strip_prefix("MSR_").unwrap_or(word);
    let mut rows = capabilities().iter();
    rows.find(|row| row.msr_name == name).map(|row| row.msr)
}

fn name_of(msr: u32) -> &'static str {
    let row = capabilities().iter().find(|row| row.msr == msr);
    row.map_or("an MSR without a name", |row| row.msr_name)
}

/// As much of a word as a message should hold.
fn short(word: &str) -> String {
    word.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::Implemented;
    use crate::layout::Layout;
    use crate::testing::Random;
    use alloc::format;
    use alloc::string::ToString;
    use alloc::vec::Vec;

    fn caps() -> Caps {
        let implemented = Implemented {
            proc1: crate::proc1::ACTIVATE_SECONDARY_CONTROLS,
            proc2: crate::proc2::ENABLE_EPT | crate::proc2::ENABLE_VPID,
            ept_vpid: 0x0F01_0611_4041,
            misc: 0x2000_0165,
            cr0_fixed1: 0xFFFF_FFFF,
            ..Implemented::default()
        };
        Caps::max(&implemented, Layout::kvm())
    }

    fn dump(line: impl Fn(u32, u64) -> String) -> String {
        let caps = caps();
        let msrs = (FIRST_MSR..=LAST_MSR).filter_map(|msr| Some((msr, caps.get(msr)?)));
        msrs.map(|(msr, value)| line(msr, value) + "\n").collect()
    }

    #[test]
    fn every_style_is_read() {
        let styles = [
            dump(|msr, value| format!("{msr:#x} {value:#018x}")),
            dump(|msr, value| {
                format!("  {} = {value:#X}  # why", name_of(msr)).replace("0X", "0x")
            }),
            dump(|msr, value| format!("MSR_{} ({msr:#x}): {value:x}", name_of(msr))),
            dump(|msr, value| format!("rdmsr {msr:#x} {value:x}\n\n# a remark")),
            dump(|msr, value| format!("# rdmsr {msr:#x}\n{value:x}")),
            dump(|msr, value| format!("$ rdmsr {msr:x}\r\n{value:x}\r")),
        ];
        for style in styles {
            assert_eq!(Caps::from_dump(&style), Ok(caps()), "{style}");
        }
    }

    #[test]
    fn a_value_that_could_be_a_number_of_an_msr_is_a_value() {
        let text = dump(|msr, value| format!("{msr:x} {value:x}"));
        let text = text.replace(&format!("48a {:x}", caps().vmcs_enum), "48a 48a");
        assert_eq!(Caps::from_dump(&text).unwrap().vmcs_enum, 0x48A);
    }

    #[test]
    fn errors_name_the_line() {
        let error = |text: &str| Caps::from_dump(text).unwrap_err().to_string();
        let starts = |text: &str, message: &str| {
            let error = error(text);
            assert!(error.starts_with(message), "{error}");
        };
        starts(
            "0x480 1\n\nnonsense 1",
            "line 3: nonsense is no VMX capability MSR",
        );
        starts("0x494 1", "line 1: 0x494 is no VMX");
        starts("0x480 zz", "line 1: zz is no hexadecimal number");
        starts(
            "0x480 11111111111111111",
            "line 1: 11111111111111111 is no hex",
        );
        starts("0x480 +1", "line 1: +1 is no hex");
        starts("0x480 1 2", "line 1: 2 after the value");
        starts("0x480 1\n0x480 2", "line 2: MSR 0x480 for the second time");
        starts("# x\nrdmsr 0x480\n", "line 2: the MSR has no value");
        starts(
            "rdmsr 0x480\nrdmsr 0x481\n1",
            "line 1: the MSR has no value",
        );
        starts("IA32_VMX_BASIC 0x481 1", "line 1: 0x481 is not the number");
        starts("", "IA32_VMX_BASIC (0x480) is not in the dump");
    }

    #[test]
    fn what_must_exist_must_be_there() {
        let text = dump(|msr, value| format!("{msr:#x} {value:#x}"));
        for (index, line) in text.lines().enumerate() {
            let less: Vec<_> = text.lines().filter(|&other| other != line).collect();
            let error = Caps::from_dump(&less.join("\n"));
            assert!(
                matches!(error, Err(DumpError::Absent { .. })),
                "{index}: {error:?}"
            );
        }
    }

    #[test]
    fn no_text_is_worse_than_an_error() {
        let mut random = Random::new(7);
        let good = dump(|msr, value| format!("{} ({msr:#x}): {value:x}", name_of(msr)));
        for _ in 0..2000 {
            let mut bytes = good.clone().into_bytes();
            for _ in 0..random.below(8) {
                if bytes.is_empty() {
                    break;
                }
                let place = random.below(bytes.len() as u64) as usize;
                match random.below(3) {
                    0 => bytes[place] = random.next() as u8,
                    1 => {
                        bytes.remove(place);
                    }
                    _ => bytes.truncate(place + 1),
                }
            }
            let _ = Caps::from_dump(&String::from_utf8_lossy(&bytes));
        }
    }
}
