//! The tables that become plain lists: controls, capabilities, numbers, checks.

use std::fmt::Write;

use crate::csv::Table;
use crate::names::{control_ids, control_slice, control_variant, doc, screaming};

/// `control_bits.csv`: a module of constants per control and one table of all bits.
pub fn controls(table: &Table) -> String {
    let mut modules = String::new();
    let mut list = String::from("static BITS: &[ControlBit] = &[\n");
    let mut rows = table.rows().peekable();
    while let Some(first) = rows.peek() {
        let short = first.get("control");
        let variant = control_variant(short).unwrap_or_else(|| panic!("control {short}"));
        let ty = match short {
            "proc3" | "exit2" | "vmfunc" => "u64",
            _ => "u32",
        };
        let mut default1 = 0u64;
        writeln!(
            modules,
            "/// Bits of the {}. Vol. 3C, {:?}.\npub mod {short} {{",
            title(short),
            section(short),
        )
        .unwrap();
        while let Some(row) = rows.next_if(|row| row.get("control") == short) {
            let bit = row.number("bit");
            let name = row.get("sdm_name");
            let reserved = name.starts_with("reserved");
            let dependency = row.get("dependency");
            if row.get("default1") == "yes" {
                default1 |= 1 << bit;
            }
            if !reserved {
                let note = match dependency {
                    "" => String::new(),
                    text => format!("; {}", doc(text)),
                };
                writeln!(
                    modules,
                    "    /// {} (bit {bit}{note}).\n    pub const {}: {ty} = 1 << {bit};",
                    doc(name),
                    screaming(name),
                )
                .unwrap();
            }
            writeln!(
                list,
                "    ControlBit {{ id: ControlId::new(Control::{variant}, {bit}), name: {name:?}, \
                 reserved: {reserved}, default1: {}, enlightened: {}, requires: {}, \
                 dependency: {dependency:?} }},",
                row.get("default1") == "yes",
                row.get("evmcs_v1_ok_linux_as_l1") == "yes",
                control_slice(&requires(dependency)),
            )
            .unwrap();
        }
        writeln!(
            modules,
            "    /// The bits that are 1 unless a TRUE capability MSR says otherwise.\n    \
             pub const DEFAULT1: {ty} = {default1:#x};\n}}\n"
        )
        .unwrap();
    }
    list.push_str("];\n");
    modules + &list
}

/// The controls a bit cannot be 1 without: those of the clauses that begin with `requires`.
fn requires(dependency: &str) -> Vec<(&'static str, u32)> {
    dependency
        .split(';')
        .filter(|clause| clause.trim_start().starts_with("requires"))
        .flat_map(control_ids)
        .collect()
}

fn title(short: &str) -> &'static str {
    match short {
        "pin" => "pin-based VM-execution controls",
        "proc1" => "primary processor-based VM-execution controls",
        "proc2" => "secondary processor-based VM-execution controls",
        "proc3" => "tertiary processor-based VM-execution controls",
        "exit" => "primary VM-exit controls",
        "exit2" => "secondary VM-exit controls",
        "entry" => "VM-entry controls",
        _ => "VM-function controls",
    }
}

fn section(short: &str) -> &'static str {
    match short {
        "pin" => "Pin-Based VM-Execution Controls",
        "exit" | "exit2" => "VM-Exit Controls",
        "entry" => "VM-Entry Controls",
        "vmfunc" => "VM-Function Controls",
        _ => "Processor-Based VM-Execution Controls",
    }
}

/// `vmx_capability_msrs.csv`: a row per range of bits.
pub fn capabilities(table: &Table) -> String {
    let mut out = String::from("static CAPABILITIES: &[Capability] = &[\n");
    for row in table.rows() {
        let bits = row.get("bits");
        let (high, low) = bits.split_once(':').unwrap_or((bits, bits));
        let (high, low): (u8, u8) = (high.parse().unwrap(), low.parse().unwrap());
        writeln!(
            out,
            "    Capability {{ msr: {:#x}, msr_name: {:?}, high: {high}, low: {low}, meaning: {:?} }},",
            row.number("msr"),
            row.get("name"),
            row.get("meaning"),
        )
        .unwrap();
    }
    out + "];\n"
}

/// `exit_reasons.csv`: a constant per reason and the facts behind it.
pub fn exit_reasons(table: &Table) -> String {
    let mut consts = String::from("impl ExitReason {\n");
    let mut list = String::from("static REASONS: &[ExitReasonInfo] = &[\n");
    for row in table.rows() {
        let number = row.number("number");
        writeln!(
            consts,
            "    /// {} ({number}): {}. Vol. 3D, \"Basic Exit Reasons\".\n    \
             pub const {}: Self = Self({number});",
            doc(row.get("sdm_name")),
            doc(row.get("description")),
            row.get("ident"),
        )
        .unwrap();
        let length = match row.get("instruction_length_valid") {
            "yes" => "Yes",
            "no" => "No",
            "event" => "Event",
            "some" => "Sometimes",
            "unlisted" => "Unlisted",
            other => panic!("exit {number}: instruction length {other}"),
        };
        let information = match row.get("instruction_info_valid") {
            "yes" => "Yes",
            "no" => "No",
            "some" => "Sometimes",
            other => panic!("exit {number}: instruction information {other}"),
        };
        writeln!(
            list,
            "    ExitReasonInfo {{ reason: ExitReason({number}), ident: {:?}, name: {:?}, description: {:?}, \
             qualification: {:?}, instruction_length: Validity::{length}, \
             instruction_information: Validity::{information}, entry_failure: {}, caused_by: {:?} }},",
            row.get("ident"),
            row.get("sdm_name"),
            row.get("description"),
            match row.get("has_exit_qualification") {
                "yes" => Some(row.get("exit_qualification")),
                _ => None,
            },
            row.get("entry_failure_bit31") == "yes",
            row.get("caused_by"),
        )
        .unwrap();
    }
    consts + "}\n\n" + &list + "];\n"
}

/// `vmx_instruction_errors.csv`: a constant per assigned number, and the meanings.
pub fn instruction_errors(table: &Table) -> String {
    let mut consts = String::from("impl InstructionError {\n");
    let mut list = String::from("static ERRORS: &[(InstructionError, &str)] = &[\n");
    for row in table.rows().filter(|row| !row.get("ident").is_empty()) {
        let (number, meaning) = (row.number("number"), row.get("meaning"));
        writeln!(
            consts,
            "    /// Error {number}: {}. Vol. 3C, \"VM-Instruction Error Numbers\".\n    \
             pub const {}: Self = Self({number});",
            doc(meaning),
            row.get("ident"),
        )
        .unwrap();
        writeln!(list, "    (InstructionError({number}), {meaning:?}),").unwrap();
    }
    consts + "}\n\n" + &list + "];\n"
}

/// `vmx_checks.csv`: the rows.
pub fn checks(table: &Table) -> String {
    let mut list = String::new();
    let mut count = 0;
    for row in table.rows() {
        let stage = match row.get("stage") {
            "precheck" => "Precheck",
            "controls" => "Controls",
            "host" => "Host",
            "guest" => "Guest",
            "msr-load" => "MsrLoad",
            other => panic!("{}: stage {other}", row.get("id")),
        };
        writeln!(
            list,
            "    CheckRow {{ id: {:?}, stage: Stage::{stage}, group: {:?}, condition: {:?}, \
             applies_when: {:?}, failure: {:?}, note: {:?}, reach: {:?} }},",
            row.get("id"),
            row.get("group"),
            row.get("condition"),
            row.get("applies_when"),
            row.get("failure"),
            row.get("note"),
            row.get("reach"),
        )
        .unwrap();
        count += 1;
    }
    format!(
        "/// Every row of `vmx_checks.csv`, in file order, which is the manual's.\n\
         pub static CHECK_ROWS: &[CheckRow; {count}] = &[\n{list}];\n"
    )
}

/// `nested_state_abi.csv`: the checks that `KVM_SET_NESTED_STATE` and its neighbours make.
pub fn nested_state(table: &Table) -> String {
    let mut list = String::from("static STEPS: &[Step] = &[\n");
    for row in table
        .rows()
        .filter(|row| row.get("kind").starts_with("check_"))
    {
        let number = row
            .get("name")
            .trim_start_matches("step_")
            .trim_start_matches('0');
        let errno = match row.get("value").split(' ').next().unwrap_or_default() {
            "EFAULT" => "Some(Errno::Fault)",
            "EINVAL" => "Some(Errno::Invalid)",
            "ENOMEM" => "Some(Errno::NoMemory)",
            "E2BIG" => "Some(Errno::TooBig)",
            _ => "None",
        };
        let words = row.get("description");
        writeln!(
            list,
            "    Step {{ number: {number}, errno: {errno}, words: {words:?} }},"
        )
        .unwrap();
    }
    list + "];\n"
}
