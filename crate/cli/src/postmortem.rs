//! What is printed about a machine that went wrong.

use std::fmt::Write;

use anyhow::Result;
use hypernest_cpu::VcpuState;
use hypernest_machine::{FailedEntry, Level, Machine, Walk};

use crate::current_vmcs;
use crate::dump;
use crate::trace::{Last, Names, instruction_text};

/// State of the vCPU that went wrong, gathered while the machine was there.
pub struct Scene {
    /// Which vCPU.
    pub vcpu: usize,
    /// Its registers.
    pub state: VcpuState,
    /// The way to its next instruction.
    pub walk: Walk,
    /// Addresses of the guest that it has left, what each is, and the way to it.
    pub guest: Vec<(&'static str, u64, Walk)>,
    /// The latest VM entry that failed, in words.
    pub failed_entry: Option<String>,
}

impl Scene {
    /// Of a vCPU of the machine.
    ///
    /// # Errors
    /// When there is no such vCPU.
    pub fn new(machine: &Machine, vcpu: usize) -> Result<Scene> {
        let state = machine.read_vcpu(vcpu)?;
        let walk = machine.walk(vcpu, dump::code_address(&state))?;
        let addresses = [
            (
                "the address that the last exit reports",
                current_vmcs::missed_address(&state),
            ),
            ("L2's next instruction", current_vmcs::guest_address(&state)),
        ];
        let mut guest = Vec::new();
        for (what, address) in addresses {
            if let Some(address) = address
                && let Some(walk) = machine.walk_at(vcpu, Level::L2, address)?
            {
                guest.push((what, address, walk));
            }
        }
        let failed = machine.failed_entries().iter().rev();
        let failed = failed.filter(|failed| failed.vcpu as usize == vcpu);
        Ok(Scene {
            vcpu,
            state,
            walk,
            guest,
            failed_entry: failed.map(FailedEntry::explain).next(),
        })
    }

    /// Registers, page walk, and what there is of VMX.
    pub fn text(&self, names: &Names) -> String {
        let address = dump::code_address(&self.state);
        let level = self.state.level();
        let executes = match self.state.vmx.region {
            Some(_) => format!(", which executes {}", level.name()),
            None => String::new(),
        };
        let mut text = format!("registers of processor {}{executes}:\n", self.vcpu);
        text += &dump::registers(&self.state);
        let at = names.address(level, address);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "page walk of the next instruction, {at}:");
        text += &walk_text(&self.walk);
        if let Some(words) = &self.failed_entry {
            let _ = writeln!(text, "the last VM entry that failed:\n  {words}");
        }
        text += &current_vmcs::text(&self.state, names);
        for (what, address, walk) in &self.guest {
            let at = names.address(Level::L2, *address);
            let _ = writeln!(text, "page walk of {what}, {at}:");
            text += &walk_text(walk);
        }
        text
    }
}

/// A walk, an entry a line; those of EPT are set in.
pub fn walk_text(walk: &Walk) -> String {
    let mut text = String::new();
    for step in &walk.steps {
        let (inset, bits) = match step.ept {
            true => ("    EPT ", ept_bits(step.entry, step.level)),
            false => ("  ", entry_bits(step.entry)),
        };
        let _ = writeln!(
            text,
            "{inset}{:5} at {:#012x}: {:#018x} {bits}",
            step.level, step.address, step.entry,
        );
    }
    let through_ept = walk.steps.iter().any(|step| step.ept);
    if through_ept && let Some(address) = walk.guest_physical {
        let _ = writeln!(text, "  guest-physical address {address:#x}");
    }
    let _ = match walk.physical {
        Some(physical) => writeln!(text, "  physical address {physical:#x}"),
        None => writeln!(text, "  not mapped"),
    };
    text
}

/// The flag bits of an EPT entry by name (Vol. 3C, "EPT Translation Mechanism"), and the memory type
/// where it maps a page.
fn ept_bits(entry: u64, level: &str) -> String {
    const NAMES: [(u32, &str); 7] = [
        (0, "R"),
        (1, "W"),
        (2, "X"),
        (7, "PS"),
        (8, "A"),
        (9, "D"),
        (10, "XU"),
    ];
    if entry & 7 == 0 {
        return "not present".into();
    }
    let set = NAMES.iter().filter(|(bit, _)| entry >> bit & 1 != 0);
    let mut names: Vec<String> = set.map(|(_, name)| (*name).into()).collect();
    if level == "PTE" || entry >> 7 & 1 != 0 {
        let kind = match entry >> 3 & 7 {
            0 => "UC",
            1 => "WC",
            4 => "WT",
            5 => "WP",
            6 => "WB",
            _ => "reserved type",
        };
        names.push(kind.into());
    }
    names.join(" ")
}

/// The flag bits of a paging-structure entry by name.
fn entry_bits(entry: u64) -> String {
    const NAMES: [(u32, &str); 10] = [
        (0, "P"),
        (1, "W"),
        (2, "U"),
        (3, "PWT"),
        (4, "PCD"),
        (5, "A"),
        (6, "D"),
        (7, "PS"),
        (8, "G"),
        (63, "XD"),
    ];
    if entry & 1 == 0 {
        return "not present".into();
    }
    let set = NAMES.iter().filter(|(bit, _)| entry >> bit & 1 != 0);
    let names: Vec<&str> = set.map(|(_, name)| *name).collect();
    names.join(" ")
}

/// The last instructions, oldest first.
pub fn instructions(last: &[Last], names: &Names) -> String {
    let many = last.iter().any(|one| one.vcpu != 0);
    let mut text = format!("last {} instructions:\n", last.len());
    let mut function = None;
    for one in last {
        let symbol = names.symbol(one.level, one.address);
        let name = symbol
            .as_deref()
            .map(|symbol| symbol.split('+').next().unwrap_or(symbol).to_owned());
        if name != function {
            if let Some(symbol) = &symbol {
                let _ = writeln!(text, "  {symbol}:");
            }
            function = name;
        }
        let vcpu = if many {
            format!(" {}", one.vcpu)
        } else {
            String::new()
        };
        let instruction = instruction_text(&one.instruction);
        let _ = writeln!(
            text,
            "  {:>14}{vcpu}  {:#018x}  {instruction}",
            one.now, one.address
        );
    }
    text
}

/// Whether a triple fault was meant: a guest that wants to reset points the IDT at nothing and
/// raises an exception (Linux, `reboot=t`).
pub fn is_deliberate(state: &VcpuState, code: &[u8]) -> bool {
    const INT3: u8 = 0xcc;
    const INT: u8 = 0xcd;
    const UD2: [u8; 2] = [0x0f, 0x0b];
    let raises = matches!(code.first(), Some(&(INT3 | INT))) || code.starts_with(&UD2);
    state.idtr.limit == 0 && raises
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypernest_machine::WalkStep;

    fn state() -> VcpuState {
        VcpuState::reset(0, &hypernest_cpu::Model::all()[0])
    }

    #[test]
    fn a_walk_names_the_bits_of_each_entry() {
        let scene = Scene {
            vcpu: 1,
            state: state(),
            walk: Walk {
                steps: vec![
                    WalkStep {
                        ept: false,
                        level: "PML4E",
                        address: 0x1000,
                        entry: 0x8000_0000_0000_2063,
                    },
                    WalkStep {
                        ept: false,
                        level: "PDPTE",
                        address: 0x2000,
                        entry: 0,
                    },
                ],
                ..Walk::default()
            },
            guest: Vec::new(),
            failed_entry: None,
        };
        let text = scene.text(&Names::default());
        assert!(
            text.contains("PML4E at 0x0000001000: 0x8000000000002063 P W A D XD\n"),
            "{text}"
        );
        assert!(text.contains("PDPTE at 0x0000002000: 0x0000000000000000 not present\n"));
        assert!(text.ends_with("  not mapped\n"));
        assert!(text.starts_with("registers of processor 1:\n"));
    }

    #[test]
    fn ept_entries_are_set_in_and_have_their_own_bits() {
        let step = |level, entry| WalkStep {
            ept: true,
            level,
            address: 0x5000,
            entry,
        };
        let walk = Walk {
            steps: vec![step("PDE", 0x6007), step("PTE", 0x7330)],
            guest_physical: Some(0x1234),
            physical: None,
        };
        assert_eq!(
            walk_text(&walk),
            "    EPT PDE   at 0x0000005000: 0x0000000000006007 R W X\n    \
             EPT PTE   at 0x0000005000: 0x0000000000007330 not present\n  \
             guest-physical address 0x1234\n  not mapped\n"
        );
        assert_eq!(ept_bits(0x7331, "PTE"), "R A D WB");
    }

    #[test]
    fn a_triple_fault_without_idt_at_int3_is_meant() {
        let mut state = state();
        state.idtr.limit = 0;
        assert!(is_deliberate(&state, &[0xcc]));
        assert!(!is_deliberate(&state, &[0x90]));
        state.idtr.limit = 0xfff;
        assert!(!is_deliberate(&state, &[0xcc]));
    }
}
