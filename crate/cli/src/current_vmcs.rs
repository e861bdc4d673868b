//! The main fields of a vCPU's current VMCS, for a post-mortem.

use std::fmt::Write;

use hypernest_cpu::VcpuState;
use hypernest_machine::{ExitReason, Level};
use hypernest_vmcs::{Control, ControlBit, Field};

use crate::trace::Names;

/// Bit 31 of an exit reason, and the valid bit of interruption information.
const HIGH: u64 = 1 << 31;

/// Fields by what they are about, in the order of the manual.
const GUEST: &[Field] = &[
    Field::GUEST_RSP,
    Field::GUEST_RFLAGS,
    Field::GUEST_CR0,
    Field::GUEST_CR3,
    Field::GUEST_CR4,
    Field::GUEST_IA32_EFER,
    Field::GUEST_CS_SELECTOR,
    Field::GUEST_CS_BASE,
    Field::GUEST_CS_AR_BYTES,
    Field::GUEST_SS_SELECTOR,
    Field::GUEST_SS_AR_BYTES,
    Field::GUEST_TR_SELECTOR,
    Field::GUEST_TR_AR_BYTES,
    Field::GUEST_GDTR_BASE,
    Field::GUEST_IDTR_BASE,
    Field::GUEST_ACTIVITY_STATE,
    Field::GUEST_INTERRUPTIBILITY_INFO,
    Field::GUEST_PENDING_DBG_EXCEPTIONS,
    Field::VMCS_LINK_POINTER,
];
const HOST: &[Field] = &[
    Field::HOST_RSP,
    Field::HOST_CR0,
    Field::HOST_CR3,
    Field::HOST_CR4,
    Field::HOST_IA32_EFER,
    Field::HOST_CS_SELECTOR,
    Field::HOST_TR_SELECTOR,
    Field::HOST_GDTR_BASE,
    Field::HOST_IDTR_BASE,
];
const EXECUTION: &[Field] = &[
    Field::EXCEPTION_BITMAP,
    Field::CR0_GUEST_HOST_MASK,
    Field::CR0_READ_SHADOW,
    Field::CR4_GUEST_HOST_MASK,
    Field::CR4_READ_SHADOW,
    Field::EPT_POINTER,
    Field::VIRTUAL_PROCESSOR_ID,
    Field::TSC_OFFSET,
    Field::VM_ENTRY_INTR_INFO_FIELD,
    Field::VM_ENTRY_EXCEPTION_ERROR_CODE,
];
const EXIT: &[Field] = &[
    Field::VM_EXIT_INSTRUCTION_LEN,
    Field::VMX_INSTRUCTION_INFO,
    Field::VM_EXIT_INTR_INFO,
    Field::VM_EXIT_INTR_ERROR_CODE,
    Field::IDT_VECTORING_INFO_FIELD,
    Field::IDT_VECTORING_ERROR_CODE,
    Field::GUEST_PHYSICAL_ADDRESS,
    Field::GUEST_LINEAR_ADDRESS,
];
const CONTROLS: [(&str, Control); 5] = [
    ("pin-based", Control::Pin),
    ("primary", Control::Proc1),
    ("secondary", Control::Proc2),
    ("VM exit", Control::Exit),
    ("VM entry", Control::Entry),
];

/// The value of a field of the current VMCS.
pub fn field(state: &VcpuState, field: Field) -> u64 {
    let mut fields = state.vmx.fields.iter();
    let found = fields.find(|(encoding, _)| *encoding == field.encoding());
    found.map_or(0, |(_, value)| *value)
}

/// The linear address of the guest's next instruction, where a guest is known that does not execute.
pub fn guest_address(state: &VcpuState) -> Option<u64> {
    let known = state.vmx.pointer().is_some() && state.level() == Level::L1;
    known.then(|| field(state, Field::GUEST_CS_BASE).wrapping_add(field(state, Field::GUEST_RIP)))
}

/// The guest-linear address that the last exit reports, where it is an EPT violation that has one.
pub fn missed_address(state: &VcpuState) -> Option<u64> {
    const LINEAR_VALID: u64 = 1 << 7;
    let violation = u64::from(ExitReason::EPT_VIOLATION.0);
    let missed = state.level() == Level::L1
        && state.vmx.pointer().is_some()
        && field(state, Field::VM_EXIT_REASON) == violation
        && field(state, Field::EXIT_QUALIFICATION) & LINEAR_VALID != 0;
    missed.then(|| field(state, Field::GUEST_LINEAR_ADDRESS))
}

/// The VMCS in words and numbers; nothing where there is none. Fields that are zero are left out.
pub fn text(state: &VcpuState, names: &Names) -> String {
    let Some(pointer) = state.vmx.pointer() else {
        return String::new();
    };
    let get = |of: Field| field(state, of);
    let launched = if state.vmx.launched {
        "launched"
    } else {
        "clear"
    };
    let stale = match state.level() {
        Level::L1 => "",
        Level::L2 => "; L2 executes, its state is in the registers",
    };
    // Writing to a string cannot fail.
    let kind = match state.vmx.enlightened {
        Some(_) => "enlightened VMCS",
        None => "VMCS",
    };
    let mut text = format!("{kind} at {pointer:#x}, {launched}{stale}:\n");
    let reason = get(Field::VM_EXIT_REASON);
    let name = ExitReason(reason as u16);
    let failed = if reason & HIGH != 0 {
        ", the VM entry failed"
    } else {
        ""
    };
    let _ = writeln!(
        text,
        "  last exit  {} {}{failed}, qualification {:#x}",
        name.0,
        name.ident(),
        get(Field::EXIT_QUALIFICATION)
    );
    list(&mut text, "", EXIT, &get);
    let rip = names.address(Level::L2, get(Field::GUEST_RIP));
    let _ = writeln!(text, "  guest      RIP {rip}");
    list(&mut text, "", GUEST, &get);
    let rip = names.address(Level::L1, get(Field::HOST_RIP));
    let _ = writeln!(text, "  host       RIP {rip}");
    list(&mut text, "", HOST, &get);
    list(&mut text, "execution", EXECUTION, &get);
    for (name, control) in CONTROLS {
        let value = get(control.field());
        let bits = ControlBit::set_in(control, value).filter(|bit| !bit.reserved);
        let bits: Vec<&str> = bits.map(|bit| bit.name).collect();
        let _ = writeln!(text, "  {name:10} {value:#010x} {}", bits.join(", "));
    }
    text
}

/// Those of `fields` that are not zero, some to a line.
fn list(text: &mut String, title: &str, fields: &[Field], get: &impl Fn(Field) -> u64) {
    let set = fields.iter().filter(|field| get(**field) != 0);
    let words: Vec<String> = set
        .map(|field| format!("{} {:#x}", field.short_name(), get(*field)))
        .collect();
    for (n, line) in words.chunks(4).enumerate() {
        let title = if n == 0 { title } else { "" };
        let _ = writeln!(text, "  {title:10} {}", line.join("  "));
    }
}
