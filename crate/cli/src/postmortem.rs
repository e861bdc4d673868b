//! What is printed about a machine that went wrong.

use std::fmt::Write;

use hypernest_cpu::VcpuState;
use hypernest_machine::Walk;

use crate::dump;
use crate::trace::{Last, Names, instruction_text};

/// What a VMX-abort indicator says; nothing where there was no VMX abort (Vol. 3C, "VMX Aborts").
pub fn vmx_abort(indicator: u32) -> Option<&'static str> {
    match indicator {
        0 => None,
        1 => Some("a guest MSR could not be saved"),
        2 => Some("the host's page-directory-pointer-table entries are not valid"),
        4 => Some("a host MSR could not be loaded"),
        6 => Some("the guest was in IA-32e mode, the host's address-space size is 32 bits"),
        _ => Some("for a reason that is in no table"),
    }
}

/// State of the vCPU that went wrong, gathered while the machine was there.
pub struct Scene {
    /// Which vCPU.
    pub vcpu: usize,
    /// Its registers.
    pub state: VcpuState,
    /// The way to its next instruction.
    pub walk: Walk,
}

impl Scene {
    /// Registers and page walk.
    pub fn text(&self, names: &Names) -> String {
        let address = dump::code_address(&self.state);
        let mut text = format!("registers of processor {}:\n", self.vcpu);
        text += &dump::registers(&self.state);
        let symbol = names.symbol(address);
        let at = symbol.map_or_else(String::new, |symbol| format!(" ({symbol})"));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "page walk of the next instruction, {address:#x}{at}:");
        for step in &self.walk.steps {
            let _ = writeln!(
                text,
                "  {:5} at {:#012x}: {:#018x} {}",
                step.level,
                step.address,
                step.entry,
                entry_bits(step.entry)
            );
        }
        let _ = match self.walk.physical {
            Some(physical) => writeln!(text, "  physical address {physical:#x}"),
            None => writeln!(text, "  not mapped"),
        };
        text
    }
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
        let symbol = names.symbol(one.address);
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
                        level: "PML4E",
                        address: 0x1000,
                        entry: 0x8000_0000_0000_2063,
                    },
                    WalkStep {
                        level: "PDPTE",
                        address: 0x2000,
                        entry: 0,
                    },
                ],
                physical: None,
            },
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
    fn a_triple_fault_without_idt_at_int3_is_meant() {
        let mut state = state();
        state.idtr.limit = 0;
        assert!(is_deliberate(&state, &[0xcc]));
        assert!(!is_deliberate(&state, &[0x90]));
        state.idtr.limit = 0xfff;
        assert!(!is_deliberate(&state, &[0xcc]));
    }
}
