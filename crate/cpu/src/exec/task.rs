//! Task switches (Vol. 3A, "Task Management"): what is checked before one. The switch itself is not
//! built; in a guest it is a VM exit (Vol. 3C, "Treatment of Task Switches").

use hypernest_vmcs::ExitReason;

use crate::descriptor::{Descriptor, is_null, kind, selector_code};
use crate::mem::Ctx;
use crate::trap::{Exec, Fault, Trap};
use crate::vcpu::Seg;
use crate::vmx::exit::{self, Exit};

/// What asks for a task switch, as the exit qualification has it in 31:30.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Call,
    Iret,
    Jump,
    /// A task gate in the IDT. EXT of its error codes.
    Idt(u16),
}

/// Length of the smallest TSS less one, with 32 and 16 bits.
const LIMIT: u32 = 0x67;
const LIMIT16: u32 = 0x2b;

/// The end of an instruction or event that switches to the task of `selector`: the fault of a selector
/// or descriptor that names none, or the switch. `length` is that of CALL, JMP or IRET.
pub(crate) fn switch(x: &mut Ctx, selector: u16, source: Source, length: u32) -> Trap {
    match check(x, selector, source) {
        Err(trap) => trap,
        Ok(()) if !x.cpu.vmx.non_root => Trap::Unimplemented("task switch"),
        Ok(()) => {
            let number = match source {
                Source::Call => 0,
                Source::Iret => 1,
                Source::Jump => 2,
                Source::Idt(_) => 3,
            };
            let exit = Exit {
                qualification: u64::from(selector) | number << 30,
                instruction_length: length,
                ..Exit::new(ExitReason::TASK_SWITCH)
            };
            exit::leave(x.cpu, exit)
        }
    }
}

fn check(x: &mut Ctx, selector: u16, source: Source) -> Exec {
    let ext = match source {
        Source::Idt(ext) => ext,
        _ => 0,
    };
    let code = selector_code(selector) | ext;
    let wrong = match source {
        Source::Iret => Fault::InvalidTss(code),
        _ => Fault::GeneralProtection(code),
    };
    const LOCAL: u16 = 4;
    if is_null(selector) || selector & LOCAL != 0 {
        return Err(wrong.into());
    }
    let descriptor = x.descriptor(selector, wrong)?;
    // The task returned to is busy; one that is entered must not be.
    let least = match (source, descriptor.kind()) {
        (Source::Iret, kind::TSS_BUSY) => LIMIT,
        (Source::Iret, kind::TSS16_BUSY) => LIMIT16,
        (Source::Call | Source::Jump | Source::Idt(_), kind::TSS) => LIMIT,
        (Source::Call | Source::Jump | Source::Idt(_), kind::TSS16) => LIMIT16,
        _ => return Err(wrong.into()),
    };
    if !descriptor.is_system() {
        return Err(wrong.into());
    }
    if !descriptor.present() {
        return Err(Fault::NotPresent(code).into());
    }
    if descriptor.limit() < least {
        return Err(Fault::InvalidTss(code).into());
    }
    Ok(())
}

/// CALL or JMP to a task gate, or to a TSS itself: the descriptor of `selector`, whose privilege and
/// presence have been checked.
pub(super) fn far(
    x: &mut Ctx,
    selector: u16,
    descriptor: Descriptor,
    source: Source,
    length: u32,
) -> Trap {
    let task = if descriptor.kind() == kind::TASK_GATE {
        descriptor.gate_selector()
    } else {
        selector
    };
    switch(x, task, source, length)
}

/// IRET with NT set: to the task that the current one names.
pub(super) fn iret(x: &mut Ctx, length: u32) -> Trap {
    let link = x.load_system(x.cpu.seg(Seg::Tr).base);
    match link {
        Ok(link) => switch(x, u16::from_le_bytes(link), Source::Iret, length),
        Err(trap) => trap,
    }
}
