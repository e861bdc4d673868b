//! Delivery of exceptions and interrupts (Vol. 3A, "Interrupt and Exception Handling",
//! "Exception and Interrupt Handling in 64-bit Mode"; Vol. 2, INT n).

use hypernest_vmcs::ExitReason;

use crate::descriptor::{Descriptor, is_null, kind, selector_code};
use crate::exec::msr;
use crate::exec::task::{self, Source};
use crate::flags::bit;
use crate::mem::{Ctx, canonical};
use crate::seg::{Stack, null_segment};
use crate::state::Activity;
use crate::trap::{Exec, Fault, Trap};
use crate::v86;
use crate::vcpu::{Seg, reg};
use crate::vmx::exit::{self, Exit};
use crate::watch;

/// DR6: general detect.
pub(crate) const DR6_BD: u64 = 1 << 13;
/// DR6: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;
/// DR7: general detect enable.
pub(crate) const DR7_GD: u64 = 1 << 13;

const NMI: u8 = 2;

/// What is being delivered.
#[derive(Clone, Copy)]
struct Event {
    vector: u8,
    error_code: Option<u16>,
    /// INT n, INT3 or INTO: the gate's DPL counts, and error codes have EXT clear.
    software: bool,
    /// Pushed RFLAGS have RF set.
    resume: bool,
    /// Of `kind_of`.
    kind: u32,
    /// Of the instruction that raised it, for software events.
    length: u32,
}

impl Event {
    fn ext(self) -> u16 {
        u16::from(!self.software)
    }

    /// Error code naming this event's gate.
    fn gate_code(self) -> u16 {
        u16::from(self.vector) << 3 | 2 | self.ext()
    }
}

/// Class of an exception for the double-fault rule (Vol. 3A, "Interrupt 8").
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    Page,
    Double,
}

fn class(fault: Fault) -> Class {
    match fault {
        Fault::Divide
        | Fault::InvalidTss(_)
        | Fault::NotPresent(_)
        | Fault::Stack(_)
        | Fault::GeneralProtection(_) => Class::Contributory,
        Fault::Page { .. } | Fault::Virtualization => Class::Page,
        Fault::DoubleFault => Class::Double,
        _ => Class::Benign,
    }
}

/// What follows when delivering `first` met `second`; `None` is shutdown.
fn combine(first: Fault, second: Fault) -> Option<Fault> {
    use Class::{Benign, Contributory, Double, Page};
    match (class(first), class(second)) {
        (Double, Contributory | Page) => None,
        (Contributory, Contributory) | (Page, Contributory | Page) => Some(Fault::DoubleFault),
        (Benign | Contributory | Page | Double, _) => Some(second),
    }
}

/// Delivers an exception; RIP is that of the instruction (or past it, for traps). A second fault
/// on the way is handled as the manual says, up to `Trap::TripleFault`.
pub(crate) fn raise(x: &mut Ctx, fault: Fault) -> Exec {
    exit_for(x, fault)?;
    let mut fault = fault;
    // Benign faults may follow each other (#DB while delivering #AC, ..), but not for ever.
    for _ in 0..8 {
        note(x, fault);
        let event = Event {
            vector: fault.vector(),
            error_code: fault.error_code(),
            software: false,
            resume: resumes(fault),
            kind: kind_of::HARDWARE_EXCEPTION,
            length: 0,
        };
        match deliver(x, event) {
            Err(Trap::Fault(second)) => {
                exit_for(x, second)?;
                // Also where it ends in a double fault.
                if let Fault::Page { address, .. } = second {
                    x.cpu.cr2 = address;
                }
                match combine(fault, second) {
                    Some(Fault::DoubleFault) => {
                        // What a double fault came from is not reported with its exit.
                        x.cpu.vmx.vectoring = None;
                        fault = Fault::DoubleFault;
                        exit_for(x, fault)?;
                    }
                    Some(next) => fault = next,
                    None => break,
                }
            }
            done => return done,
        }
    }
    x.cpu.vmx.vectoring = None;
    Err(Trap::TripleFault)
}

/// Types of events in interruption-information fields (Vol. 3C, "VM-Entry Controls for Event
/// Injection").
mod kind_of {
    pub const EXTERNAL: u32 = 0;
    pub const NMI: u32 = 2;
    pub const HARDWARE_EXCEPTION: u32 = 3;
    pub const SOFTWARE_INTERRUPT: u32 = 4;
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u32 = 5;
    pub const SOFTWARE_EXCEPTION: u32 = 6;
}

const INFO_ERROR_CODE: u32 = 1 << 11;
const INFO_VALID: u32 = 1 << 31;

/// The VM exit of an exception that the guest's hypervisor wants to see.
fn exit_for(x: &mut Ctx, fault: Fault) -> Exec {
    if !exit::exception_exits(x.cpu, fault.vector(), fault.error_code()) {
        return Ok(());
    }
    let qualification = match fault {
        Fault::Page { address, .. } => address,
        Fault::Debug(bits) => bits,
        _ => 0,
    };
    if resumes(fault) {
        x.cpu.flags.rest |= bit::RF;
    }
    Err(exit::leave(
        x.cpu,
        event_exit(
            fault.vector(),
            kind_of::HARDWARE_EXCEPTION,
            fault.error_code(),
            qualification,
        ),
    ))
}

fn event_exit(vector: u8, kind: u32, error: Option<u16>, qualification: u64) -> Exit {
    let has_error = if error.is_some() { INFO_ERROR_CODE } else { 0 };
    Exit {
        event: u32::from(vector) | kind << 8 | has_error | INFO_VALID,
        event_error: u32::from(error.unwrap_or(0)),
        qualification,
        ..Exit::new(ExitReason::EXCEPTION_OR_NMI)
    }
}

/// The VM exit of an NMI.
pub(crate) fn nmi_exit(x: &mut Ctx) -> Trap {
    x.cpu.vmx.nmi_exit = true;
    let exit = event_exit(NMI, kind_of::NMI, None, 0);
    exit::leave(x.cpu, exit)
}

/// The VM exit of an external interrupt that was acknowledged.
pub(crate) fn external_exit(x: &mut Ctx, vector: u8) -> Trap {
    let exit = Exit {
        event: u32::from(vector) | kind_of::EXTERNAL << 8 | INFO_VALID,
        ..Exit::new(ExitReason::EXTERNAL_INTERRUPT)
    };
    exit::leave(x.cpu, exit)
}

/// An event that a VM entry injects.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Injected {
    pub vector: u8,
    /// Of `kind_of`.
    pub kind: u32,
    pub error_code: Option<u32>,
    /// Of the instruction that a software event stands for.
    pub length: u32,
}

/// Delivers an injected event. It cannot exit by itself; what goes wrong on the way can.
pub(crate) fn inject(x: &mut Ctx, injected: Injected) -> Exec {
    let software = injected.kind == kind_of::SOFTWARE_INTERRUPT
        || injected.kind == kind_of::SOFTWARE_EXCEPTION;
    let after = software || injected.kind == kind_of::PRIVILEGED_SOFTWARE_EXCEPTION;
    let rip = x.cpu.rip;
    if after {
        x.cpu.rip = rip.wrapping_add(u64::from(injected.length));
    }
    if injected.kind == kind_of::NMI {
        if x.cpu.vmx.controls.virtual_nmis() {
            x.cpu.vmx.virtual_nmi_blocking = true;
        } else {
            x.cpu.nmi_blocked = true;
        }
    }
    let event = Event {
        vector: injected.vector,
        error_code: injected.error_code.map(|code| code as u16),
        software,
        resume: false,
        kind: injected.kind,
        length: injected.length,
    };
    let redirected = if injected.kind == kind_of::SOFTWARE_INTERRUPT && x.cpu.v86() {
        note_vectoring(x, event);
        v86::redirect(x, injected.vector)
    } else {
        Ok(false)
    };
    let delivered = redirected.and_then(|done| {
        if done {
            x.cpu.vmx.vectoring = None;
            Ok(())
        } else {
            deliver(x, event)
        }
    });
    match delivered {
        Err(Trap::Fault(second)) => {
            if after {
                x.cpu.rip = rip;
            }
            exit_for(x, second)?;
            let first = match (injected.kind, injected.vector) {
                (kind_of::HARDWARE_EXCEPTION, 0) => Fault::Divide,
                (kind_of::HARDWARE_EXCEPTION, 8) => Fault::DoubleFault,
                (kind_of::HARDWARE_EXCEPTION, 10..=13) => Fault::GeneralProtection(0),
                (kind_of::HARDWARE_EXCEPTION, 14) => Fault::Page {
                    address: 0,
                    code: 0,
                },
                (kind_of::HARDWARE_EXCEPTION, 20) => Fault::Virtualization,
                _ => return raise(x, second),
            };
            if let Fault::Page { address, .. } = second {
                x.cpu.cr2 = address;
            }
            match combine(first, second) {
                Some(next) => {
                    if next == Fault::DoubleFault {
                        x.cpu.vmx.vectoring = None;
                    }
                    raise(x, next)
                }
                None => {
                    x.cpu.vmx.vectoring = None;
                    Err(Trap::TripleFault)
                }
            }
        }
        Err(other) => {
            if after {
                x.cpu.rip = rip;
            }
            Err(other)
        }
        Ok(()) => Ok(()),
    }
}

/// What an exception leaves in registers before it is delivered.
fn note(x: &mut Ctx, fault: Fault) {
    match fault {
        Fault::Page { address, .. } => x.cpu.cr2 = address,
        Fault::Virtualization => watch::virtualization_exception(x),
        Fault::Debug(bits) => {
            x.cpu.dr6 = if bits & 0xf != 0 {
                x.cpu.dr6 & !0xf | bits
            } else {
                x.cpu.dr6 | bits
            };
            x.cpu.dr7 &= !DR7_GD;
            // No branch is recorded or stepped to in the handler (Vol. 3B, "IA32_DEBUGCTL MSR").
            x.cpu.msrs.debugctl &= !msr::DEBUGCTL_BITS;
        }
        _ => {}
    }
    x.cpu.pending_debug = 0;
}

/// Whether the return address is that of the faulting instruction, so that RF must keep an
/// instruction breakpoint there from matching again (Vol. 3A, "Masking Instruction Breakpoints").
fn resumes(fault: Fault) -> bool {
    match fault {
        // Breakpoints and single step push RF as it is; general detect is a fault like others.
        Fault::Debug(bits) => bits & DR6_BD != 0,
        _ => true,
    }
}

/// Delivers a maskable hardware interrupt.
pub(crate) fn external(x: &mut Ctx, vector: u8) -> Exec {
    from_outside(x, vector, kind_of::EXTERNAL)
}

/// Delivers a non-maskable interrupt; further ones are blocked until IRET.
pub(crate) fn nmi(x: &mut Ctx) -> Exec {
    x.cpu.nmi_blocked = true;
    from_outside(x, NMI, kind_of::NMI)
}

fn from_outside(x: &mut Ctx, vector: u8, kind: u32) -> Exec {
    let event = Event {
        vector,
        error_code: None,
        software: false,
        resume: false,
        kind,
        length: 0,
    };
    match deliver(x, event) {
        Err(Trap::Fault(fault)) => raise(x, fault),
        done => done,
    }
}

/// INT n, INT3 and INTO, as part of the instruction: a fault is the instruction's own. The handler
/// starts without a single step of the instruction waiting.
pub(crate) fn software(x: &mut Ctx, vector: u8, length: u32, interrupt: bool) -> Exec {
    let kind = if interrupt {
        kind_of::SOFTWARE_INTERRUPT
    } else {
        kind_of::SOFTWARE_EXCEPTION
    };
    if !interrupt && exit::exception_exits(x.cpu, vector, None) {
        let exit = Exit {
            instruction_length: length,
            ..event_exit(vector, kind, None, 0)
        };
        return Err(exit::leave(x.cpu, exit));
    }
    let event = Event {
        vector,
        error_code: None,
        software: true,
        resume: false,
        kind,
        length,
    };
    if !(interrupt && x.cpu.v86() && v86::redirect(x, vector)?) {
        deliver(x, event)?;
    }
    x.cpu.pending_debug &= !DR6_BS;
    Ok(())
}

/// INT1 (ICEBP): a #DB trap that says nothing in DR6 and ignores the gate's DPL. What MOV SS held
/// back is delivered with it.
pub(crate) fn icebp(x: &mut Ctx, length: u32) -> Exec {
    let kind = kind_of::PRIVILEGED_SOFTWARE_EXCEPTION;
    if exit::exception_exits(x.cpu, 1, None) {
        let exit = Exit {
            instruction_length: length,
            ..event_exit(1, kind, None, 0)
        };
        return Err(exit::leave(x.cpu, exit));
    }
    note(x, Fault::Debug(x.cpu.pending_debug & !DR6_BS));
    let event = Event {
        vector: 1,
        error_code: None,
        software: false,
        resume: false,
        kind,
        length,
    };
    deliver(x, event)
}

/// In a guest: the event is under way, so that an exit on the way says so.
fn note_vectoring(x: &mut Ctx, event: Event) {
    if x.cpu.vmx.non_root {
        let code = u32::from(event.error_code.unwrap_or(0));
        let has_code = if event.error_code.is_some() {
            INFO_ERROR_CODE
        } else {
            0
        };
        let info = u32::from(event.vector) | event.kind << 8 | has_code | INFO_VALID;
        x.cpu.vmx.vectoring = Some((info, code));
        x.cpu.vmx.vectoring_length = event.length;
    }
}

fn deliver(x: &mut Ctx, event: Event) -> Exec {
    note_vectoring(x, event);
    if !x.cpu.protected() {
        deliver_real(x, event)?;
    } else if x.cpu.long_mode() {
        deliver_long(x, event)?;
    } else {
        deliver_protected(x, event)?;
    }
    x.cpu.vmx.vectoring = None;
    x.cpu.activity = Activity::Active;
    x.cpu.sti_shadow = false;
    x.cpu.mov_ss_shadow = false;
    Ok(())
}

fn pushed_flags(x: &Ctx, event: Event) -> u64 {
    x.cpu.flags.get() | if event.resume { bit::RF } else { 0 }
}

/// RFLAGS bits that every handler starts without.
const CLEARED: u64 = bit::TF | bit::NT | bit::RF | bit::VM;

fn deliver_real(x: &mut Ctx, event: Event) -> Exec {
    let at = u64::from(event.vector) * 4;
    if at + 3 > u64::from(x.cpu.idtr.limit) {
        return Err(Fault::GeneralProtection(event.gate_code()).into());
    }
    let entry = u32::from_le_bytes(x.load_system(x.cpu.idtr.base.wrapping_add(at))?);
    let (selector, rip) = ((entry >> 16) as u16, u64::from(entry as u16));
    if rip > u64::from(x.cpu.seg(Seg::Cs).limit) {
        return Err(Fault::GeneralProtection(0).into());
    }
    let mut stack = x.current_stack(0);
    stack.push(x, 2, x.cpu.flags.get())?;
    stack.push(x, 2, u64::from(x.cpu.seg(Seg::Cs).selector))?;
    stack.push(x, 2, x.cpu.rip)?;
    x.cpu.gpr[reg::RSP] = stack.rsp;
    x.cpu.set_real_segment(Seg::Cs, selector);
    x.cpu.rip = rip;
    x.cpu.flags.rest &= !(CLEARED | bit::IF | bit::AC);
    x.cpu.refresh();
    Ok(())
}

/// The gate of an event, with the checks common to all modes.
fn gate(x: &mut Ctx, event: Event, size: u64, kinds: &[u8]) -> Exec<Descriptor> {
    let fault = Fault::GeneralProtection(event.gate_code());
    let at = u64::from(event.vector) * size;
    if at + size - 1 > u64::from(x.cpu.idtr.limit) {
        return Err(fault.into());
    }
    let linear = x.cpu.idtr.base.wrapping_add(at);
    let gate = Descriptor(u64::from_le_bytes(x.load_system(linear)?));
    let wrong_kind = !gate.is_system() || !kinds.contains(&gate.kind());
    if wrong_kind || event.software && gate.dpl() < x.cpu.cpl {
        return Err(fault.into());
    }
    if !gate.present() {
        return Err(Fault::NotPresent(event.gate_code()).into());
    }
    if gate.kind() == kind::TASK_GATE {
        let source = Source::Idt(event.ext());
        let trap = task::switch(x, gate.gate_selector(), source, event.length);
        if trap == Trap::VmExit && event.resume {
            // As the old task's TSS would have it.
            x.cpu.flags.rest |= bit::RF;
        }
        return Err(trap);
    }
    Ok(gate)
}

/// The handler's code segment and the privilege it runs at.
fn handler(x: &mut Ctx, event: Event, selector: u16) -> Exec<(Descriptor, u8)> {
    let ext = event.ext();
    if is_null(selector) {
        return Err(Fault::GeneralProtection(ext).into());
    }
    let code = selector_code(selector) | ext;
    let fault = Fault::GeneralProtection(code);
    let descriptor = x.descriptor(selector, fault)?;
    let long = x.cpu.long_mode();
    if !descriptor.is_code() || descriptor.dpl() > x.cpu.cpl || long && !descriptor.is_long_code() {
        return Err(fault.into());
    }
    if !descriptor.present() {
        return Err(Fault::NotPresent(code).into());
    }
    let cpl = if descriptor.is_conforming() {
        x.cpu.cpl
    } else {
        descriptor.dpl()
    };
    Ok((descriptor, cpl))
}

fn deliver_protected(x: &mut Ctx, event: Event) -> Exec {
    const KINDS: [u8; 5] = [
        kind::TASK_GATE,
        kind::INTERRUPT16,
        kind::TRAP16,
        kind::INTERRUPT,
        kind::TRAP,
    ];
    let gate = gate(x, event, 8, &KINDS)?;
    let ext = event.ext();
    let (descriptor, cpl) = handler(x, event, gate.gate_selector())?;
    let v86 = x.cpu.v86();
    if v86 && cpl != 0 {
        // The way out of virtual-8086 mode leads to level 0.
        let code = selector_code(gate.gate_selector()) | ext;
        return Err(Fault::GeneralProtection(code).into());
    }
    let size = if gate.kind() & 8 != 0 { 4 } else { 2 };
    let inner = cpl != x.cpu.cpl;
    let mut stack = if inner {
        let (ss, rsp) = x.inner_stack(cpl, ext)?;
        if is_null(ss) {
            return Err(Fault::InvalidTss(ext).into());
        }
        let segment = x.stack_segment_ext(ss, cpl, Fault::InvalidTss, ext)?;
        Stack::in_segment(segment, rsp, selector_code(ss) | ext)
    } else {
        x.current_stack(ext)
    };
    let (old_ss, old_rsp) = (x.cpu.seg(Seg::Ss).selector, x.cpu.gpr[reg::RSP]);
    let frame = [
        inner.then_some(u64::from(old_ss)),
        inner.then_some(old_rsp),
        Some(pushed_flags(x, event)),
        Some(u64::from(x.cpu.seg(Seg::Cs).selector)),
        Some(x.cpu.rip),
        event.error_code.map(u64::from),
    ];
    if v86 {
        let data = [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es];
        let selectors = data.map(|seg| u64::from(x.cpu.seg(seg).selector));
        push_frame(x, &mut stack, cpl, size, selectors.map(Some))?;
    }
    push_frame(x, &mut stack, cpl, size, frame)?;
    let offset = gate.gate_offset();
    x.check_entry(descriptor, offset, ext)?;
    let segment = x.accessed(gate.gate_selector(), descriptor)?;
    *x.cpu.seg_mut(Seg::Ss) = stack.ss;
    if v86 {
        for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
            *x.cpu.seg_mut(seg) = null_segment(0, 0);
        }
    }
    enter(x, gate, stack.rsp, segment, cpl, offset);
    Ok(())
}

fn push_frame<const N: usize>(
    x: &mut Ctx,
    stack: &mut Stack,
    cpl: u8,
    size: usize,
    frame: [Option<u64>; N],
) -> Exec {
    let mut values = [0; N];
    let mut count = 0;
    for value in frame.into_iter().flatten() {
        values[count] = value;
        count += 1;
    }
    let values = &values[..count];
    x.at_privilege(cpl, |x| {
        if size == 8 && stack.push_plain(x, values) {
            return Ok(());
        }
        values
            .iter()
            .try_for_each(|value| stack.push(x, size, *value))
    })
}

fn enter(
    x: &mut Ctx,
    gate: Descriptor,
    rsp: u64,
    segment: crate::state::SegmentState,
    cpl: u8,
    rip: u64,
) {
    x.cpu.gpr[reg::RSP] = rsp;
    // Interrupt gates have an even type, trap gates an odd one.
    let masked = if gate.kind() & 1 == 0 { bit::IF } else { 0 };
    x.cpu.flags.rest &= !(CLEARED | masked);
    x.enter_code(segment, cpl, rip);
}

fn deliver_long(x: &mut Ctx, event: Event) -> Exec {
    let gate = gate(x, event, 16, &[kind::INTERRUPT, kind::TRAP])?;
    let ext = event.ext();
    let high_at = x
        .cpu
        .idtr
        .base
        .wrapping_add(u64::from(event.vector) * 16 + 8);
    let high = u32::from_le_bytes(x.load_system(high_at)?);
    let (descriptor, cpl) = handler(x, event, gate.gate_selector())?;
    let offset = gate.gate_offset() | u64::from(high) << 32;
    if !canonical(offset) {
        return Err(Fault::GeneralProtection(ext).into());
    }
    const RSP0: u64 = 4;
    const IST1: u64 = 0x24;
    let inner = cpl != x.cpu.cpl;
    let rsp = match gate.gate_ist() {
        0 if inner => x.tss_stack_pointer(RSP0 + 8 * u64::from(cpl), ext)?,
        0 => x.cpu.gpr[reg::RSP],
        n => x.tss_stack_pointer(IST1 + 8 * (n - 1), ext)?,
    };
    let ss = if inner {
        null_segment(u16::from(cpl), cpl)
    } else {
        *x.cpu.seg(Seg::Ss)
    };
    let mut stack = Stack {
        ss,
        rsp: rsp & !0xf,
        width: 8,
        code: ext,
    };
    let frame = [
        Some(u64::from(x.cpu.seg(Seg::Ss).selector)),
        Some(x.cpu.gpr[reg::RSP]),
        Some(pushed_flags(x, event)),
        Some(u64::from(x.cpu.seg(Seg::Cs).selector)),
        Some(x.cpu.rip),
        event.error_code.map(u64::from),
    ];
    push_frame(x, &mut stack, cpl, 8, frame)?;
    let segment = x.accessed(gate.gate_selector(), descriptor)?;
    *x.cpu.seg_mut(Seg::Ss) = stack.ss;
    enter(x, gate, stack.rsp, segment, cpl, offset);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CODE, Fixture, IST1, STACK, STACK0, TSS, sel};
    use crate::trap::GP0;
    use crate::vcpu::CodeSize;

    const GP: Fault = Fault::GeneralProtection(0x18);
    const INT64: u8 = 0x8e;
    const TRAP64: u8 = 0x8f;

    #[test]
    fn real_mode_pushes_three_words_and_uses_the_vector_table() {
        let mut f = Fixture::real();
        f.cpu.idtr.base = 0;
        f.cpu.idtr.limit = 0x3ff;
        f.poke(0x21 * 4, 0x1234_5678);
        f.cpu.set_rflags(bit::FIXED | bit::IF | bit::TF | bit::CF);
        f.with(|x| software(x, 0x21, 2, true)).unwrap();
        assert_eq!(f.cpu.rip, 0x5678);
        assert_eq!(f.cpu.seg(Seg::Cs).base, 0x12340);
        assert_eq!(f.cpu.gpr[reg::RSP], 0xfff8);
        assert_eq!(f.peek16(0xfff8), CODE as u16);
        assert_eq!(f.peek16(0xfffc), 0x303);
        assert_eq!(f.cpu.flags.get(), bit::FIXED | bit::CF);
    }

    #[test]
    fn an_interrupt_from_user_mode_switches_to_the_stack_of_the_tss() {
        let mut f = Fixture::long();
        f.gate(0x30, sel::CODE0, 0x7000, INT64, 0);
        f.enter(3);
        f.cpu.set_rflags(bit::FIXED | bit::IF | bit::NT | bit::AC);
        f.with(|x| external(x, 0x30)).unwrap();
        assert_eq!(f.cpu.rip, 0x7000);
        assert_eq!((f.cpu.cpl, f.cpu.seg(Seg::Cs).selector), (0, sel::CODE0));
        assert_eq!(f.cpu.seg(Seg::Ss).selector, 0);
        assert_eq!(f.cpu.gpr[reg::RSP], STACK0 - 40);
        let frame: [u64; 5] = core::array::from_fn(|n| f.peek(STACK0 - 40 + 8 * n as u64));
        let flags = bit::FIXED | bit::IF | bit::NT | bit::AC;
        assert_eq!(
            frame,
            [CODE, sel::CODE3.into(), flags, STACK, sel::DATA3.into()]
        );
        assert_eq!(f.cpu.flags.get(), bit::FIXED | bit::AC);
    }

    #[test]
    fn a_fault_pushes_rf_and_its_code_and_ist_is_aligned() {
        let mut f = Fixture::long();
        f.gate(13, sel::CODE0, 0x7000, TRAP64, 1);
        f.cpu.set_rflags(bit::FIXED | bit::IF);
        f.with(|x| raise(x, GP)).unwrap();
        let top = (IST1 & !0xf) - 48;
        assert_eq!(f.cpu.gpr[reg::RSP], top);
        assert_eq!(f.peek(top), 0x18);
        assert_eq!(f.peek(top + 24), bit::FIXED | bit::IF | bit::RF);
        assert_eq!(f.peek(top + 32), STACK);
        // A trap gate leaves IF; SS stays where the level does.
        assert_eq!(f.cpu.flags.get(), bit::FIXED | bit::IF);
        assert_eq!(f.cpu.seg(Seg::Ss).selector, sel::DATA0);
    }

    #[test]
    fn a_frame_is_the_same_whether_the_tlb_has_its_page_or_not() {
        // In one page, across two; the second time the TLB has them.
        for stack in [STACK0, STACK0 + 0x18] {
            let mut f = Fixture::long();
            f.poke(TSS + 4, stack);
            f.gate(13, sel::CODE0, 0x7000, INT64, 0);
            f.enter(3);
            f.cpu.set_rflags(bit::FIXED | bit::IF);
            let before = f.cpu.save();
            let mut frames = [[0u64; 6]; 2];
            for frame in &mut frames {
                f.with(|x| raise(x, GP)).unwrap();
                let top = f.cpu.gpr[reg::RSP];
                assert_eq!(top, (stack & !0xf) - 48);
                *frame = core::array::from_fn(|n| f.peek(top + 8 * n as u64));
                f.poke(top + 24, frame[3] & !bit::RF);
                f.cpu.gpr[reg::RSP] += 8;
                f.execute(&[0x48, 0xcf]).unwrap(); // IRETQ
                assert_eq!(f.cpu.save(), before);
            }
            assert_eq!(frames[0], frames[1]);
            // A breakpoint on the frame is met all the same.
            f.cpu.dr[0] = (stack & !0xf) - 0x18;
            f.cpu.dr7 |= 1 | 0b1001 << 16; // eight bytes, writes
            f.cpu.refresh();
            f.with(|x| external(x, 13)).unwrap();
            assert_eq!(f.cpu.pending_debug, 1);
        }
    }

    #[test]
    fn protected_mode_pushes_the_outer_stack_and_changes_level() {
        let mut f = Fixture::protected();
        f.gate(14, sel::CODE0, 0x1_7000, INT64, 0);
        f.enter(3);
        let fault = Fault::Page {
            address: 0xabc,
            code: 6,
        };
        f.with(|x| raise(x, fault)).unwrap();
        assert_eq!(f.cpu.cr2, 0xabc);
        assert_eq!((f.cpu.rip, f.cpu.cpl), (0x1_7000, 0));
        assert_eq!(f.cpu.seg(Seg::Ss).selector, sel::DATA0);
        assert_eq!(f.cpu.gpr[reg::RSP], STACK0 - 24);
        let frame: [u32; 6] = core::array::from_fn(|n| f.peek32(STACK0 - 24 + 4 * n as u64));
        assert_eq!(
            frame,
            [
                6,
                CODE as u32,
                sel::CODE3.into(),
                (bit::FIXED | bit::RF) as u32,
                STACK as u32,
                sel::DATA3.into()
            ]
        );
    }

    #[test]
    fn a_conforming_handler_keeps_the_level_and_stack() {
        let mut f = Fixture::protected();
        f.gate(3, sel::CONFORMING, 0x7000, 0xee, 0);
        f.enter(3);
        f.with(|x| software(x, 3, 2, true)).unwrap();
        assert_eq!((f.cpu.cpl, f.cpu.gpr[reg::RSP]), (3, STACK - 12));
        assert_eq!(f.cpu.seg(Seg::Cs).selector, sel::CONFORMING | 3);
        assert_eq!(f.cpu.code_size, CodeSize::Bits32);
    }

    #[test]
    fn error_codes_carry_the_gate_and_ext_only_for_outside_events() {
        let mut f = Fixture::long();
        f.gate(0x40, sel::CODE0, 0x7000, INT64, 0);
        f.enter(3);
        let code = |vector: u16| Err(Trap::Fault(Fault::GeneralProtection(vector << 3 | 2)));
        assert_eq!(f.with(|x| software(x, 0x40, 2, true)), code(0x40)); // DPL 0
        f.cpu.idtr.limit = 0x30f;
        assert_eq!(f.with(|x| software(x, 0x31, 2, true)), code(0x31)); // beyond the table
        f.gate(0x20, sel::CODE0, 0x7000, 0x6e, 0);
        assert_eq!(
            f.with(|x| software(x, 0x20, 2, true)),
            Err(Trap::Fault(Fault::NotPresent(0x102)))
        );
        // The same from outside becomes #NP with EXT, which has no gate: #GP, then #DF, then off.
        assert_eq!(f.with(|x| external(x, 0x20)), Err(Trap::TripleFault));
        f.gate(11, sel::CODE0, 0x7000, INT64, 0);
        f.with(|x| external(x, 0x20)).unwrap();
        assert_eq!(f.peek(f.cpu.gpr[reg::RSP]), 0x103);
    }

    #[test]
    fn a_page_fault_while_delivering_a_page_fault_is_a_double_fault() {
        let mut f = Fixture::long();
        f.gate(8, sel::CODE0, 0x7000, INT64, 1);
        f.gate(14, sel::CODE0, 0x7100, INT64, 0);
        f.cpu.gpr[reg::RSP] = 0x40_0000; // not mapped
        let fault = Fault::Page {
            address: 0x1234,
            code: 0,
        };
        f.with(|x| raise(x, fault)).unwrap();
        assert_eq!(f.cpu.rip, 0x7000);
        assert_eq!(f.cpu.cr2, 0x3f_fff8);
        assert_eq!(f.peek(f.cpu.gpr[reg::RSP]), 0);
        assert_eq!(f.peek(f.cpu.gpr[reg::RSP] + 32), 0x40_0000);
    }

    #[test]
    fn a_page_fault_while_delivering_a_contributory_fault_is_delivered() {
        let mut f = Fixture::long();
        f.gate(13, sel::CODE0, 0x7000, INT64, 0);
        f.gate(14, sel::CODE0, 0x7100, INT64, 1);
        f.cpu.gpr[reg::RSP] = 0x40_0000;
        f.with(|x| raise(x, GP)).unwrap();
        assert_eq!(f.cpu.rip, 0x7100);
    }

    #[test]
    fn failed_delivery_changes_no_register() {
        let mut f = Fixture::long();
        f.gate(0x30, sel::CODE0, 1 << 47, INT64, 0);
        f.enter(3);
        f.cpu.set_rflags(bit::FIXED | bit::IF);
        let before = f.cpu.save();
        assert_eq!(
            f.with(|x| software(x, 0x30, 2, true)),
            Err(Trap::Fault(Fault::GeneralProtection(0x182)))
        );
        f.gate(0x30, sel::CODE0, 1 << 47, 0xee, 0);
        assert_eq!(f.with(|x| software(x, 0x30, 2, true)), Err(GP0));
        f.gate(0x30, sel::CODE0, 0x7000, 0xee, 0);
        f.poke(TSS + 4, 1 << 47);
        assert_eq!(
            f.with(|x| software(x, 0x30, 2, true)),
            Err(Trap::Fault(Fault::Stack(0)))
        );
        assert_eq!(f.cpu.save(), before);
    }

    #[test]
    fn debug_exceptions_report_in_dr6_and_disarm_general_detect() {
        let mut f = Fixture::long();
        f.gate(1, sel::CODE0, 0x7000, INT64, 0);
        f.cpu.dr6 |= 0xf;
        f.cpu.dr7 |= DR7_GD;
        f.with(|x| raise(x, Fault::Debug(2))).unwrap();
        assert_eq!(f.cpu.dr6, 0xffff_0ff2);
        assert_eq!(f.cpu.dr7 & DR7_GD, 0);
        assert_eq!(f.peek(f.cpu.gpr[reg::RSP] + 16) & bit::RF, 0);
    }
}
