//! Watching VMX: events for whoever asked, counters for everyone, stops at an exit.
//!
//! A machine has one [`Watch`]; the vCPU whose turn it is holds it. Nothing here changes what a guest
//! sees, and nothing is part of the machine's state or its hash. Its functions are called where VMX
//! instructions, VM entries and VM exits are carried out, never on the way of ordinary instructions.
//! With the Cargo feature `no-events`, which is for measuring alone, they do nothing.

mod event;
mod statistics;

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use hypernest_vmcs::checks::{EntryCheck, explain_values};
use hypernest_vmcs::{ExitReason, Field, InstructionError};

use crate::bus::Tick;
use crate::mem::Ctx;
use crate::vmx::exit::{Exit, VALID};

pub use event::{
    Answer, EntryFailure, EptViolation, Event, EventKinds, EventRequest, Happening, Injection,
    Level, VmEntry, VmExit, VmInstruction, WhenFull,
};
pub use statistics::{ExitRow, ExitStatistics, Handling};

use event::Ring;

/// Compiled out: for measuring what the rest costs.
const OFF: bool = cfg!(feature = "no-events");
/// Most events of one instruction or exit; a ring that stops the processor always has room for them.
const AT_ONCE: usize = 4;
/// Failed entries that are remembered.
const FAILURES: usize = 8;
/// Most fields that a check of VM entry reads.
const CHECK_FIELDS: usize = 16;

/// Where VM exits stop the processor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExitStops {
    /// After an exit for one of these reasons.
    pub reasons: Vec<ExitReason>,
    /// After the machine's exit of this number, counted from 1.
    pub number: Option<u64>,
    /// After a VM entry that failed.
    pub failed_entry: bool,
}

/// A VM entry that failed, with the values of the fields that its check read.
#[derive(Clone, Debug)]
pub struct FailedEntry {
    /// Machine time.
    pub tick: Tick,
    /// Which vCPU.
    pub vcpu: u32,
    /// RIP of VMLAUNCH or VMRESUME.
    pub rip: u64,
    /// Why.
    pub failure: EntryFailure,
    check: Option<&'static EntryCheck>,
    values: [u64; CHECK_FIELDS],
}

impl FailedEntry {
    /// In words: the check's id, its rule, where the manual has it, and the fields it read; or what
    /// else was wrong.
    pub fn explain(&self) -> String {
        if let Some(check) = self.check {
            return explain_values(check, |n| self.values.get(n).copied().unwrap_or(0));
        }
        match self.failure.answer {
            Answer::Invalid => "there is no current VMCS, or it is a shadow: VMfailInvalid. \
                                SDM Vol. 3C, \"VMLAUNCH/VMRESUME\"."
                .into(),
            Answer::Valid(number) => alloc::format!(
                "{}: VMfailValid {number}. SDM Vol. 3C, \"VM Instruction Error Numbers\".",
                InstructionError(number).meaning()
            ),
            Answer::Exit {
                reason,
                qualification,
            } => alloc::format!(
                "{}: exit {} qualification {qualification}, the entry of the VM-entry MSR-load list \
                 that cannot be loaded. SDM Vol. 3C, \"Loading MSRs\".",
                reason.name(),
                reason.0
            ),
        }
    }
}

/// What stops the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caught {
    Exit { reason: ExitReason, number: u64 },
    FailedEntry,
    Full,
}

/// A vCPU's place between exits and entries.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// Instructions it executed in its finished turns.
    executed: u64,
    /// Reason of the exit that L1 is handling, and the count of instructions at it.
    handling: Option<(u16, u64)>,
    /// The count of instructions at the entry of the guest that executes.
    entered: Option<u64>,
}

/// Of one machine.
pub(crate) struct Watch {
    kinds: EventKinds,
    ring: Ring,
    when_full: WhenFull,
    stops: ExitStops,
    caught: Option<Caught>,
    pub statistics: ExitStatistics,
    /// The latest, oldest first.
    failures: Vec<FailedEntry>,
    places: Vec<Place>,
    /// Whose turn it is.
    vcpu: usize,
    /// Machine time less the instructions that the vCPU has executed: constant during its turn.
    offset: Tick,
    /// The EPT violation that the exception to be delivered stands for.
    converted: Option<EptViolation>,
    /// RIP of the VMX instruction at hand, its operand and its value.
    rip: u64,
    operand: u64,
    value: u64,
}

impl Watch {
    /// Of a machine with this many vCPUs, with or without VMX.
    pub fn new(vcpus: usize, vmx: bool) -> Watch {
        Watch {
            kinds: EventKinds::NONE,
            ring: Ring::default(),
            when_full: WhenFull::Overwrite,
            stops: ExitStops::default(),
            caught: None,
            statistics: ExitStatistics::new(vmx),
            failures: Vec::with_capacity(FAILURES),
            places: vec![Place::default(); vcpus],
            vcpu: 0,
            offset: 0,
            converted: None,
            rip: 0,
            operand: 0,
            value: 0,
        }
    }

    /// Asks for events; what was kept of an earlier request is dropped. `None`, with nothing changed,
    /// where the host has no memory for so many.
    pub fn request(&mut self, request: &EventRequest) -> Option<()> {
        let capacity = match request.when_full {
            WhenFull::Overwrite => request.capacity,
            // Where the processor stops there is room for what it still finishes.
            WhenFull::Stop => request.capacity.max(1).saturating_add(AT_ONCE),
        };
        self.ring = Ring::new(capacity)?;
        self.kinds = request.kinds;
        self.when_full = request.when_full;
        Some(())
    }

    pub fn set_stops(&mut self, stops: &ExitStops) {
        self.stops = stops.clone();
    }

    pub fn take_events(&mut self) -> Vec<Event> {
        self.ring.take()
    }

    pub fn lost_events(&self) -> u64 {
        self.ring.lost()
    }

    pub fn failures(&self) -> &[FailedEntry] {
        &self.failures
    }

    /// `vcpu` executes from machine time `now` on.
    pub fn begin(&mut self, vcpu: usize, now: Tick) {
        self.vcpu = vcpu;
        self.offset = now.wrapping_sub(self.places[vcpu].executed);
    }

    /// It has executed `used` instructions. What stops the processor now.
    pub fn end(&mut self, used: u64) -> Option<Caught> {
        self.places[self.vcpu].executed += used;
        self.caught.take()
    }

    /// Instructions that a vCPU has executed in its finished turns.
    pub fn instructions(&self, vcpu: usize) -> u64 {
        self.places.get(vcpu).map_or(0, |place| place.executed)
    }

    /// Something stops the processor as soon as the instruction or exit at hand is done.
    pub fn has_caught(&self) -> bool {
        self.caught.is_some()
    }

    fn executed(&self, now: Tick) -> u64 {
        now.wrapping_sub(self.offset)
    }

    fn wants(&self, kinds: EventKinds) -> bool {
        self.kinds.has(kinds)
    }

    fn push(&mut self, tick: Tick, rip: u64, what: Happening) {
        if !self.wants(what.kind()) {
            return;
        }
        self.ring.push(Event {
            tick,
            vcpu: self.vcpu as u32,
            instructions: self.executed(tick),
            rip,
            what,
        });
        if self.when_full == WhenFull::Stop && self.ring.room() <= AT_ONCE {
            self.caught = self.caught.or(Some(Caught::Full));
        }
    }
}

/// The watch, where it is this vCPU's turn.
fn watch<'a>(x: &'a mut Ctx) -> Option<&'a mut Watch> {
    if OFF {
        None
    } else {
        x.cpu.watch.as_deref_mut()
    }
}

/// The VMX instruction at `rip` begins.
pub(crate) fn instruction(x: &mut Ctx, rip: u64) {
    if let Some(watch) = watch(x) {
        (watch.rip, watch.operand, watch.value) = (rip, 0, 0);
    }
}

/// What the VMX instruction at hand works on.
pub(crate) fn operand(x: &mut Ctx, operand: u64) {
    if let Some(watch) = watch(x) {
        watch.operand = operand;
    }
}

/// What VMREAD read or VMWRITE wrote.
pub(crate) fn value(x: &mut Ctx, value: u64) {
    if let Some(watch) = watch(x) {
        watch.value = value;
    }
}

/// The VMX instruction at hand is done; flags and VMCS tell how.
pub(crate) fn instruction_done(x: &mut Ctx, name: &'static str) {
    let now = x.now;
    let Some(watch) = watch(x) else { return };
    watch.statistics.instruction(name);
    if !watch.wants(EventKinds::VM_INSTRUCTION) {
        return;
    }
    let failure = answer(x);
    let level = if x.cpu.vmx.non_root {
        Level::L2
    } else {
        Level::L1
    };
    if let Some(watch) = self::watch(x) {
        let what = Happening::VmInstruction(VmInstruction {
            level,
            name,
            operand: watch.operand,
            value: watch.value,
            failure,
        });
        let rip = watch.rip;
        watch.push(now, rip, what);
        stop_soon(x);
    }
}

/// How a VMX instruction failed, by the arithmetic flags; `None` where it succeeded.
fn answer(x: &Ctx) -> Option<Answer> {
    use crate::flags::bit;
    let flags = x.cpu.flags.get();
    if flags & bit::CF != 0 {
        Some(Answer::Invalid)
    } else if flags & bit::ZF != 0 {
        let error = x.cpu.vmx.vmcs.get(Field::VM_INSTRUCTION_ERROR);
        Some(Answer::Valid(error as u32))
    } else {
        None
    }
}

/// Makes the vCPU look up from its block where the watch has something for the caller.
fn stop_soon(x: &mut Ctx) {
    if watch(x).is_some_and(|watch| watch.has_caught()) {
        x.cpu.touched_outside();
    }
}

fn entry(x: &Ctx, resume: bool, failure: Option<EntryFailure>) -> Happening {
    let vmcs = &x.cpu.vmx.vmcs;
    Happening::VmEntry(VmEntry {
        resume,
        vmcs: x.cpu.vmx.current,
        enlightened: x.cpu.vmx.enlightened_entry,
        guest_rip: vmcs.get(Field::GUEST_RIP),
        injects: vmcs.get(Field::VM_ENTRY_INTR_INFO_FIELD) as u32,
        failure,
    })
}

/// A VM entry led into the guest.
pub(crate) fn entered(x: &mut Ctx, resume: bool) {
    let now = x.now;
    let what = entry(x, resume, None);
    let enlightened = x.cpu.vmx.enlightened_entry;
    let Some(watch) = watch(x) else { return };
    // The instruction that enters is L1's last.
    let executed = watch.executed(now) + 1;
    watch.statistics.entered(enlightened);
    let place = &mut watch.places[watch.vcpu];
    place.entered = Some(executed);
    if let Some((reason, at)) = place.handling.take() {
        let instructions = executed.saturating_sub(at);
        watch.statistics.handled(reason, instructions);
    }
    let rip = watch.rip;
    watch.push(now, rip, what);
    stop_soon(x);
}

/// A VM entry failed, and L1 was told by the flags.
pub(crate) fn entry_refused(x: &mut Ctx, resume: bool) {
    if let Some(answer) = answer(x) {
        entry_failed(x, resume, answer);
    }
}

/// A VM entry failed.
pub(crate) fn entry_failed(x: &mut Ctx, resume: bool, answer: Answer) {
    let now = x.now;
    let check = x.cpu.vmx.failed_check;
    let failure = EntryFailure {
        check: check.map(|check| check.id),
        answer,
    };
    let what = entry(x, resume, Some(failure));
    let mut values = [0; CHECK_FIELDS];
    for (value, field) in values
        .iter_mut()
        .zip(check.map_or(&[][..], |check| check.fields))
    {
        *value = x.cpu.vmx.vmcs.get(*field);
    }
    let Some(watch) = watch(x) else { return };
    watch.statistics.entry_failed();
    if let Answer::Exit { reason, .. } = answer {
        watch.statistics.exited(Level::L1, reason.0, 0);
    }
    if watch.failures.len() == FAILURES {
        watch.failures.remove(0);
    }
    watch.failures.push(FailedEntry {
        tick: now,
        vcpu: watch.vcpu as u32,
        rip: watch.rip,
        failure,
        check,
        values,
    });
    let rip = watch.rip;
    watch.push(now, rip, what);
    if watch.stops.failed_entry {
        watch.caught = Some(Caught::FailedEntry);
    }
    stop_soon(x);
}

/// The guest is left: `exit` is recorded in the VMCS, registers are still the guest's.
pub(crate) fn exited(x: &mut Ctx, exit: &Exit) {
    let (now, rip) = (x.now, x.cpu.rip);
    let word = |field| x.cpu.vmx.vmcs.get(field) as u32;
    let (length, vectoring, vectoring_error) = (
        word(Field::VM_EXIT_INSTRUCTION_LEN),
        word(Field::IDT_VECTORING_INFO_FIELD),
        word(Field::IDT_VECTORING_ERROR_CODE),
    );
    let enlightened = x.cpu.vmx.enlightened_entry;
    let Some(watch) = watch(x) else { return };
    let executed = watch.executed(now);
    let place = &mut watch.places[watch.vcpu];
    let entered = place.entered.take().unwrap_or(executed);
    place.handling = Some((exit.reason, executed));
    let guest_instructions = executed.saturating_sub(entered);
    watch
        .statistics
        .exited(Level::L2, exit.reason, guest_instructions);
    let reason = ExitReason(exit.reason);
    let number = watch.statistics.exits();
    let missing = matches!(
        reason,
        ExitReason::EPT_VIOLATION | ExitReason::EPT_MISCONFIGURATION
    );
    if missing {
        watch.push(now, rip, Happening::EptViolation(violation(exit)));
    }
    if watch.wants(EventKinds::VM_EXIT) {
        let what = Happening::VmExit(VmExit {
            number,
            reason,
            qualification: exit.qualification,
            length,
            instruction_info: exit.instruction_info,
            event: exit.event,
            event_error: exit.event_error,
            vectoring,
            vectoring_error: if vectoring & VALID != 0 {
                vectoring_error
            } else {
                0
            },
            guest_physical: exit.guest_physical,
            guest_linear: exit.linear,
            enlightened,
            guest_instructions,
        });
        watch.push(now, rip, what);
    }
    if watch.stops.reasons.contains(&reason) || watch.stops.number == Some(number) {
        watch.caught = Some(Caught::Exit { reason, number });
    }
}

fn violation(exit: &Exit) -> EptViolation {
    EptViolation {
        misconfiguration: exit.reason == ExitReason::EPT_MISCONFIGURATION.0,
        exception: false,
        guest_physical: exit.guest_physical.unwrap_or(0),
        guest_linear: exit.linear,
        qualification: exit.qualification,
    }
}

/// What would be the exit `exit` is a virtualization exception to the guest.
pub(crate) fn converted(x: &mut Ctx, exit: &Exit) {
    if let Some(watch) = watch(x) {
        watch.converted = Some(EptViolation {
            exception: true,
            ..violation(exit)
        });
    }
}

/// The virtualization exception is about to be delivered; RIP is that of its instruction.
pub(crate) fn virtualization_exception(x: &mut Ctx) {
    let (now, rip) = (x.now, x.cpu.rip);
    if let Some(watch) = watch(x)
        && let Some(violation) = watch.converted.take()
    {
        watch.push(now, rip, Happening::EptViolation(violation));
        stop_soon(x);
    }
}

/// The event of a VM entry is about to be delivered.
pub(crate) fn injected(x: &mut Ctx) {
    let (now, rip) = (x.now, x.cpu.rip);
    let word = |field| x.cpu.vmx.vmcs.get(field) as u32;
    let what = Happening::Injection(Injection {
        info: word(Field::VM_ENTRY_INTR_INFO_FIELD),
        error_code: word(Field::VM_ENTRY_EXCEPTION_ERROR_CODE),
        length: word(Field::VM_ENTRY_INSTRUCTION_LEN),
    });
    if let Some(watch) = watch(x) {
        watch.push(now, rip, what);
        stop_soon(x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypernest_vmcs::checks::SECTIONS;

    #[test]
    fn no_check_reads_more_fields_than_are_kept() {
        let rows = SECTIONS.iter().flat_map(|section| section.rows);
        let most = rows.map(|check| check.fields.len()).max();
        assert!(most.is_some_and(|most| most <= CHECK_FIELDS), "{most:?}");
    }
}
