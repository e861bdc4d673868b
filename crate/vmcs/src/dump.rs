//! A VMCS out of a kernel log: the text that KVM prints when a VM entry fails, and Xen's much like it.
//!
//! Lines may begin with anything that ends in a colon, a bracket or a parenthesis, such as a time.

use alloc::string::{String, ToString};

use crate::field::{Field, FieldSet};
use crate::vmcs::Vmcs;

/// What a log says of a VMCS.
#[derive(Clone, Debug)]
pub struct Dump {
    /// The values; 0 where the log has none.
    pub vmcs: Vmcs,
    /// The fields that the log has.
    pub fields: FieldSet,
}

/// A log without a whole dump of a VMCS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DumpTextError {
    /// No line says `*** Guest State ***`.
    #[error(
        "no line says *** Guest State ***: give the kernel's log from \"VMCS .., last attempted VM-entry\" on"
    )]
    NoDump,
    /// The text ends before a section.
    #[error("the dump ends at line {line}, before *** {missing} State ***")]
    Ends {
        /// The last line, from 1.
        line: usize,
        /// The section that is not there.
        missing: &'static str,
    },
    /// A value is not as long as it is always printed.
    #[error(
        "line {line}: {key} has {found:?} where {digits} hexadecimal digits belong: is the line cut?"
    )]
    Value {
        /// The line, from 1.
        line: usize,
        /// What the value is called.
        key: String,
        /// What is there.
        found: String,
        /// How many digits belong there.
        digits: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    Guest,
    Host,
    Control,
}
use Section::{Control, Guest, Host};

/// Section, word before the key, key, digits, field.
type Row = (Section, &'static str, &'static str, usize, Field);

const ROWS: &[Row] = &[
    (Guest, "CR0", "actual", 16, Field::GUEST_CR0),
    (Guest, "CR0", "shadow", 16, Field::CR0_READ_SHADOW),
    (Guest, "CR0", "gh_mask", 16, Field::CR0_GUEST_HOST_MASK),
    (Guest, "CR4", "actual", 16, Field::GUEST_CR4),
    (Guest, "CR4", "shadow", 16, Field::CR4_READ_SHADOW),
    (Guest, "CR4", "gh_mask", 16, Field::CR4_GUEST_HOST_MASK),
    (Guest, "", "CR3", 16, Field::GUEST_CR3),
    (Guest, "", "PDPTR0", 16, Field::GUEST_PDPTR0),
    (Guest, "", "PDPTR1", 16, Field::GUEST_PDPTR1),
    (Guest, "", "PDPTR2", 16, Field::GUEST_PDPTR2),
    (Guest, "", "PDPTR3", 16, Field::GUEST_PDPTR3),
    (Guest, "", "RSP", 16, Field::GUEST_RSP),
    (Guest, "", "RIP", 16, Field::GUEST_RIP),
    (Guest, "", "RFLAGS", 8, Field::GUEST_RFLAGS),
    (Guest, "", "DR7", 16, Field::GUEST_DR7),
    (Guest, "", "Sysenter RSP", 16, Field::GUEST_SYSENTER_ESP),
    (Guest, "CS", "sel", 4, Field::GUEST_CS_SELECTOR),
    (Guest, "CS", "attr", 5, Field::GUEST_CS_AR_BYTES),
    (Guest, "CS", "limit", 8, Field::GUEST_CS_LIMIT),
    (Guest, "CS", "base", 16, Field::GUEST_CS_BASE),
    (Guest, "DS", "sel", 4, Field::GUEST_DS_SELECTOR),
    (Guest, "DS", "attr", 5, Field::GUEST_DS_AR_BYTES),
    (Guest, "DS", "limit", 8, Field::GUEST_DS_LIMIT),
    (Guest, "DS", "base", 16, Field::GUEST_DS_BASE),
    (Guest, "SS", "sel", 4, Field::GUEST_SS_SELECTOR),
    (Guest, "SS", "attr", 5, Field::GUEST_SS_AR_BYTES),
    (Guest, "SS", "limit", 8, Field::GUEST_SS_LIMIT),
    (Guest, "SS", "base", 16, Field::GUEST_SS_BASE),
    (Guest, "ES", "sel", 4, Field::GUEST_ES_SELECTOR),
    (Guest, "ES", "attr", 5, Field::GUEST_ES_AR_BYTES),
    (Guest, "ES", "limit", 8, Field::GUEST_ES_LIMIT),
    (Guest, "ES", "base", 16, Field::GUEST_ES_BASE),
    (Guest, "FS", "sel", 4, Field::GUEST_FS_SELECTOR),
    (Guest, "FS", "attr", 5, Field::GUEST_FS_AR_BYTES),
    (Guest, "FS", "limit", 8, Field::GUEST_FS_LIMIT),
    (Guest, "FS", "base", 16, Field::GUEST_FS_BASE),
    (Guest, "GS", "sel", 4, Field::GUEST_GS_SELECTOR),
    (Guest, "GS", "attr", 5, Field::GUEST_GS_AR_BYTES),
    (Guest, "GS", "limit", 8, Field::GUEST_GS_LIMIT),
    (Guest, "GS", "base", 16, Field::GUEST_GS_BASE),
    (Guest, "GDTR", "limit", 8, Field::GUEST_GDTR_LIMIT),
    (Guest, "GDTR", "base", 16, Field::GUEST_GDTR_BASE),
    (Guest, "LDTR", "sel", 4, Field::GUEST_LDTR_SELECTOR),
    (Guest, "LDTR", "attr", 5, Field::GUEST_LDTR_AR_BYTES),
    (Guest, "LDTR", "limit", 8, Field::GUEST_LDTR_LIMIT),
    (Guest, "LDTR", "base", 16, Field::GUEST_LDTR_BASE),
    (Guest, "IDTR", "limit", 8, Field::GUEST_IDTR_LIMIT),
    (Guest, "IDTR", "base", 16, Field::GUEST_IDTR_BASE),
    (Guest, "TR", "sel", 4, Field::GUEST_TR_SELECTOR),
    (Guest, "TR", "attr", 5, Field::GUEST_TR_AR_BYTES),
    (Guest, "TR", "limit", 8, Field::GUEST_TR_LIMIT),
    (Guest, "TR", "base", 16, Field::GUEST_TR_BASE),
    (Guest, "", "EFER", 16, Field::GUEST_IA32_EFER),
    (Guest, "", "PAT", 16, Field::GUEST_IA32_PAT),
    (Guest, "", "DebugCtl", 16, Field::GUEST_IA32_DEBUGCTL),
    (
        Guest,
        "",
        "DebugExceptions",
        16,
        Field::GUEST_PENDING_DBG_EXCEPTIONS,
    ),
    (
        Guest,
        "",
        "PerfGlobCtl",
        16,
        Field::GUEST_IA32_PERF_GLOBAL_CTRL,
    ),
    (Guest, "", "BndCfgS", 16, Field::GUEST_BNDCFGS),
    (Guest, "", "SM Base", 8, Field::GUEST_SMBASE),
    (
        Guest,
        "",
        "Interruptibility",
        8,
        Field::GUEST_INTERRUPTIBILITY_INFO,
    ),
    (Guest, "", "ActivityState", 8, Field::GUEST_ACTIVITY_STATE),
    (Guest, "", "InterruptStatus", 4, Field::GUEST_INTR_STATUS),
    (Host, "", "RIP", 16, Field::HOST_RIP),
    (Host, "", "RSP", 16, Field::HOST_RSP),
    (Host, "", "CS", 4, Field::HOST_CS_SELECTOR),
    (Host, "", "SS", 4, Field::HOST_SS_SELECTOR),
    (Host, "", "DS", 4, Field::HOST_DS_SELECTOR),
    (Host, "", "ES", 4, Field::HOST_ES_SELECTOR),
    (Host, "", "FS", 4, Field::HOST_FS_SELECTOR),
    (Host, "", "GS", 4, Field::HOST_GS_SELECTOR),
    (Host, "", "TR", 4, Field::HOST_TR_SELECTOR),
    (Host, "", "FSBase", 16, Field::HOST_FS_BASE),
    (Host, "", "GSBase", 16, Field::HOST_GS_BASE),
    (Host, "", "TRBase", 16, Field::HOST_TR_BASE),
    (Host, "", "GDTBase", 16, Field::HOST_GDTR_BASE),
    (Host, "", "IDTBase", 16, Field::HOST_IDTR_BASE),
    (Host, "", "CR0", 16, Field::HOST_CR0),
    (Host, "", "CR3", 16, Field::HOST_CR3),
    (Host, "", "CR4", 16, Field::HOST_CR4),
    (Host, "", "Sysenter RSP", 16, Field::HOST_IA32_SYSENTER_ESP),
    (Host, "", "EFER", 16, Field::HOST_IA32_EFER),
    (Host, "", "PAT", 16, Field::HOST_IA32_PAT),
    (
        Host,
        "",
        "PerfGlobCtl",
        16,
        Field::HOST_IA32_PERF_GLOBAL_CTRL,
    ),
    (Control, "", "PinBased", 8, Field::PIN_BASED_VM_EXEC_CONTROL),
    (Control, "", "CPUBased", 8, Field::CPU_BASED_VM_EXEC_CONTROL),
    (
        Control,
        "",
        "SecondaryExec",
        8,
        Field::SECONDARY_VM_EXEC_CONTROL,
    ),
    (
        Control,
        "",
        "TertiaryExec",
        16,
        Field::TERTIARY_VM_EXEC_CONTROL,
    ),
    (Control, "", "EntryControls", 8, Field::VM_ENTRY_CONTROLS),
    (Control, "", "ExitControls", 8, Field::VM_EXIT_CONTROLS),
    (Control, "", "ExceptionBitmap", 8, Field::EXCEPTION_BITMAP),
    (
        Control,
        "",
        "PFECmask",
        8,
        Field::PAGE_FAULT_ERROR_CODE_MASK,
    ),
    (
        Control,
        "",
        "PFECmatch",
        8,
        Field::PAGE_FAULT_ERROR_CODE_MATCH,
    ),
    (
        Control,
        "VMEntry",
        "intr_info",
        8,
        Field::VM_ENTRY_INTR_INFO_FIELD,
    ),
    (
        Control,
        "VMEntry",
        "errcode",
        8,
        Field::VM_ENTRY_EXCEPTION_ERROR_CODE,
    ),
    (
        Control,
        "VMEntry",
        "ilen",
        8,
        Field::VM_ENTRY_INSTRUCTION_LEN,
    ),
    (Control, "VMExit", "intr_info", 8, Field::VM_EXIT_INTR_INFO),
    (
        Control,
        "VMExit",
        "errcode",
        8,
        Field::VM_EXIT_INTR_ERROR_CODE,
    ),
    (Control, "VMExit", "ilen", 8, Field::VM_EXIT_INSTRUCTION_LEN),
    (Control, "", "reason", 8, Field::VM_EXIT_REASON),
    (Control, "", "qualification", 16, Field::EXIT_QUALIFICATION),
    (
        Control,
        "IDTVectoring",
        "info",
        8,
        Field::IDT_VECTORING_INFO_FIELD,
    ),
    (
        Control,
        "IDTVectoring",
        "errcode",
        8,
        Field::IDT_VECTORING_ERROR_CODE,
    ),
    (Control, "", "TSC Offset", 16, Field::TSC_OFFSET),
    (Control, "", "TSC Multiplier", 16, Field::TSC_MULTIPLIER),
    (Control, "", "TPR Threshold", 2, Field::TPR_THRESHOLD),
    (Control, "", "APIC-access addr", 16, Field::APIC_ACCESS_ADDR),
    (
        Control,
        "",
        "virt-APIC addr",
        16,
        Field::VIRTUAL_APIC_PAGE_ADDR,
    ),
    (Control, "", "PostedIntrVec", 2, Field::POSTED_INTR_NV),
    (Control, "", "EPT pointer", 16, Field::EPT_POINTER),
    (Control, "", "EPTP index", 4, Field::EPTP_INDEX),
    (Control, "PLE", "Gap", 8, Field::PLE_GAP),
    (Control, "PLE", "Window", 8, Field::PLE_WINDOW),
    (
        Control,
        "",
        "Virtual processor ID",
        4,
        Field::VIRTUAL_PROCESSOR_ID,
    ),
    (
        Control,
        "",
        "VMfunc controls",
        16,
        Field::VM_FUNCTION_CONTROL,
    ),
    (
        Control,
        "",
        "VE info address",
        16,
        Field::VE_INFORMATION_ADDRESS,
    ),
];

impl Dump {
    /// The first dump in a log.
    ///
    /// # Errors
    ///
    /// If there is none, it ends early, or a value is cut.
    pub fn read(log: &str) -> Result<Self, DumpTextError> {
        let mut dump = Self {
            vmcs: Vmcs::new(),
            fields: FieldSet::EMPTY,
        };
        let mut section = None;
        let mut last = 0;
        for (index, line) in log.lines().enumerate() {
            last = index + 1;
            let begins = |name: &str| line.contains(&*["*** ", name, " State ***"].concat());
            if begins("Guest") {
                if section.is_some() {
                    break;
                }
                section = Some(Guest);
            } else if begins("Host") && section == Some(Guest) {
                section = Some(Host);
            } else if begins("Control") && section == Some(Host) {
                section = Some(Control);
            } else if let Some(section) = section {
                dump.line(section, line, index + 1)?;
            }
        }
        match section {
            None => Err(DumpTextError::NoDump),
            Some(Guest) => Err(ends(last, "Host")),
            Some(Host) => Err(ends(last, "Control")),
            Some(Control) => Ok(dump),
        }
    }

    fn set(&mut self, field: Field, value: u64) {
        self.vmcs.set(field, value);
        self.fields.insert(field);
    }

    /// One line: keys, each followed by `=` and a value.
    fn line(&mut self, section: Section, line: &str, number: usize) -> Result<(), DumpTextError> {
        let mut context = "";
        let mut rest = line;
        while let Some((before, after)) = rest.split_once('=') {
            let (word, key) = split_key(before);
            // What comes first says what the other values of its line are about.
            if !word.is_empty() {
                context = word;
            }
            let after = after.trim_start();
            let end = after
                .find(|c: char| !c.is_ascii_alphanumeric() && c != ':' && c != '|')
                .unwrap_or(after.len());
            let (value, next) = after.split_at(end);
            self.value(section, (context, key), value, number)?;
            rest = next;
        }
        Ok(())
    }

    fn value(
        &mut self,
        section: Section,
        (context, key): (&str, &str),
        value: &str,
        line: usize,
    ) -> Result<(), DumpTextError> {
        let parse = |text: &str, digits: usize| {
            let hex = text.strip_prefix("0x").unwrap_or(text);
            let parsed = (hex.len() == digits)
                .then(|| u64::from_str_radix(hex, 16).ok())
                .flatten();
            parsed.ok_or_else(|| DumpTextError::Value {
                line,
                key: key.to_string(),
                found: text.chars().take(40).collect(),
                digits,
            })
        };
        let halves = |mark| value.split_once(mark).unwrap_or((value, ""));
        match (section, key) {
            (Guest | Host, "CS:RIP") => {
                let (cs, rip) = halves(':');
                let fields = match section {
                    Guest => (Field::GUEST_SYSENTER_CS, Field::GUEST_SYSENTER_EIP),
                    _ => (Field::HOST_IA32_SYSENTER_CS, Field::HOST_IA32_SYSENTER_EIP),
                };
                self.set(fields.0, parse(cs, 4)?);
                self.set(fields.1, parse(rip, 16)?);
            }
            (Control, "SVI|RVI") => {
                let (svi, rvi) = halves('|');
                self.set(
                    Field::GUEST_INTR_STATUS,
                    parse(svi, 2)? << 8 | parse(rvi, 2)?,
                );
            }
            _ => {
                let found = ROWS.iter().find(|row| {
                    (row.0, row.2) == (section, key) && (row.1.is_empty() || row.1 == context)
                });
                if let Some(&(.., digits, field)) = found {
                    self.set(field, parse(value, digits)?);
                }
            }
        }
        Ok(())
    }
}

fn ends(line: usize, missing: &'static str) -> DumpTextError {
    DumpTextError::Ends { line, missing }
}

/// The last key before a `=`, and the word with a colon before it. `PLE Gap` has a word without.
fn split_key(before: &str) -> (&str, &str) {
    let before = before.trim();
    let start = before
        .rmatch_indices([' ', '\t', ',', '>'])
        .find(|(at, _)| before[..*at].ends_with([':', ']', ')', ',', '>']))
        .map_or(0, |(at, _)| at + 1);
    let (head, key) = before.split_at(start);
    let key = key.trim_matches([' ', ',', '\t']);
    if let Some(gap) = key.strip_prefix("PLE ") {
        return ("PLE", gap);
    }
    let word = head
        .trim()
        .strip_suffix(':')
        .map_or("", |head| head.rsplit([' ', '\t']).next().unwrap_or(head));
    (word, key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::vec::Vec;

    /// A dump as 6.x kernels print it, of values that differ from field to field.
    pub fn log() -> String {
        let mut log =
            String::from("[   12.5] kvm_intel: VMCS 000000004, last attempted VM-entry on CPU 3\n");
        let mut section = None;
        let mut context = "";
        for (number, &(of, word, key, digits, _)) in ROWS.iter().enumerate() {
            if section != Some(of) {
                section = Some(of);
                log += &format!("\n[   12.5] kvm_intel: *** {of:?} State ***");
                context = "";
            }
            let value = (number as u64 + 1).wrapping_mul(0x0101_0101_0101_0101) | 0x10;
            let value = &format!("{value:016x}")[16 - digits..];
            if !word.is_empty() && word == context {
                log += &format!(", {key}=0x{value}");
            } else {
                let mark = if word == "PLE" { "" } else { ":" };
                let lead = match word {
                    "" => String::new(),
                    word => format!("{word}{mark} "),
                };
                log += &format!("\n[   12.5] kvm_intel: {lead}{key} = 0x{value}");
            }
            context = word;
        }
        log + "\n[   12.5] kvm_intel: SVI|RVI = 51|07 TPR Threshold = 0x0a\n"
    }

    #[test]
    fn every_field_of_a_dump_is_read() {
        let dump = Dump::read(&log()).unwrap();
        for (number, &(.., digits, field)) in ROWS.iter().enumerate() {
            let value = (number as u64 + 1).wrapping_mul(0x0101_0101_0101_0101) | 0x10;
            let mut value = value & (u64::MAX >> (64 - 4 * digits));
            match field {
                Field::TPR_THRESHOLD => value = 10,
                Field::GUEST_INTR_STATUS => value = 0x5107,
                _ => {}
            }
            assert_eq!(dump.vmcs.get(field), value, "{field:?}");
            assert!(dump.fields.contains(field));
        }
        assert_eq!(dump.fields.len(), ROWS.len());
    }

    #[test]
    fn lines_of_real_logs_are_read() {
        let log = "\
(XEN) *** Guest State ***
(XEN) CR0: actual=0x0000000080010031, shadow=0x0000000060000010, gh_mask=fffffffffffffff7
(XEN) RSP = 0xffff82d08030f8b0 (symbol#inner)  RIP = 0x0000000000007c00
RFLAGS=0x00000246         DR7 = 0x0000000000000400
kvm_intel: Sysenter RSP=ffff830000000000 CS:RIP=e008:ffff82d080354420
CS:   sel=0x0010, attr=0x0a09b, limit=0xffffffff, base=0x0000000000000000
GDTR:                           limit=0x0000007f, base=0xfffffe0000001000
EFER= 0x0000000000000d01
*** Host State ***
CS=0010 SS=0018 DS=0000 ES=0000 FS=0000 GS=0000 TR=0040
*** Control State ***
VMEntry: intr_info=80000044 errcode=00000000 ilen=00000000
        reason=80000021 qualification=0000000000000000
MSR host autoload:
   0: msr=0x00000600 value=0xfffffe3f51297000
PLE Gap=00000080 Window=00001000
*** Guest State ***
RIP = cut";
        let dump = Dump::read(log).unwrap();
        let expected = [
            (Field::GUEST_CR0, 0x8001_0031),
            (Field::CR0_READ_SHADOW, 0x6000_0010),
            (Field::CR0_GUEST_HOST_MASK, 0xFFFF_FFFF_FFFF_FFF7),
            (Field::GUEST_RSP, 0xFFFF_82D0_8030_F8B0),
            (Field::GUEST_RIP, 0x7C00),
            (Field::GUEST_RFLAGS, 0x246),
            (Field::GUEST_DR7, 0x400),
            (Field::GUEST_SYSENTER_ESP, 0xFFFF_8300_0000_0000),
            (Field::GUEST_SYSENTER_CS, 0xE008),
            (Field::GUEST_SYSENTER_EIP, 0xFFFF_82D0_8035_4420),
            (Field::GUEST_CS_SELECTOR, 0x10),
            (Field::GUEST_CS_AR_BYTES, 0xA09B),
            (Field::GUEST_CS_LIMIT, 0xFFFF_FFFF),
            (Field::GUEST_GDTR_LIMIT, 0x7F),
            (Field::GUEST_GDTR_BASE, 0xFFFF_FE00_0000_1000),
            (Field::GUEST_IA32_EFER, 0xD01),
            (Field::HOST_CS_SELECTOR, 0x10),
            (Field::HOST_SS_SELECTOR, 0x18),
            (Field::HOST_TR_SELECTOR, 0x40),
            (Field::VM_ENTRY_INTR_INFO_FIELD, 0x8000_0044),
            (Field::VM_EXIT_REASON, 0x8000_0021),
            (Field::PLE_GAP, 0x80),
            (Field::PLE_WINDOW, 0x1000),
        ];
        for (field, value) in expected {
            assert_eq!(dump.vmcs.get(field), value, "{field:?}");
        }
        let zeroes: Vec<Field> = dump
            .fields
            .iter()
            .filter(|&field| dump.vmcs.get(field) == 0)
            .collect();
        assert_eq!(dump.fields.len(), expected.len() + zeroes.len());
        assert_eq!(zeroes.len(), 8);
    }

    #[test]
    fn a_cut_text_is_an_error_that_says_where() {
        let log = log();
        assert_eq!(Dump::read("").unwrap_err(), DumpTextError::NoDump);
        for len in 0..log.len() {
            let cut = Dump::read(&log[..len]);
            let at_line_end = log.as_bytes()[len] == b'\n' || log.as_bytes()[len] == b',';
            match cut {
                Err(DumpTextError::NoDump) => assert!(!log[..len].contains("*** Guest State ***")),
                Err(DumpTextError::Ends { line, .. } | DumpTextError::Value { line, .. }) => {
                    assert_eq!(line, log[..len].lines().count());
                }
                Ok(dump) => assert!(at_line_end || !dump.fields.is_empty()),
            }
        }
        let cut = log.replace("RFLAGS = 0x", "RFLAGS = 0x0");
        assert!(matches!(
            Dump::read(&cut).unwrap_err(),
            DumpTextError::Value { digits: 8, .. }
        ));
    }
}
