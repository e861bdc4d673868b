//! What VMX did, as values: one [`Event`] a happening, of the five kinds that can be asked for.

use alloc::vec::Vec;

use hypernest_vmcs::ExitReason;

use crate::bus::Tick;
use crate::vmx::EnlightenedEntry;

/// Who executes: the machine's own software (and its user programs), or a guest of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// VMX root operation, or no VMX operation at all.
    L1,
    /// VMX non-root operation. Levels above are matters of L1's software: the processor sees their
    /// exits as this level's.
    L2,
}

impl Level {
    /// `L1` or `L2`.
    pub fn name(self) -> &'static str {
        match self {
            Level::L1 => "L1",
            Level::L2 => "L2",
        }
    }
}

/// Kinds of events, as a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventKinds(u8);

impl EventKinds {
    /// None.
    pub const NONE: EventKinds = EventKinds(0);
    /// VM entries, those that fail included.
    pub const VM_ENTRY: EventKinds = EventKinds(1);
    /// VM exits.
    pub const VM_EXIT: EventKinds = EventKinds(1 << 1);
    /// VMX instructions that say by the flags how they went, but for the two that enter.
    pub const VM_INSTRUCTION: EventKinds = EventKinds(1 << 2);
    /// EPT violations and misconfigurations, with what was accessed: those that exit, and those that
    /// the guest gets as an exception.
    pub const EPT_VIOLATION: EventKinds = EventKinds(1 << 3);
    /// Events that a VM entry injects.
    pub const INJECTION: EventKinds = EventKinds(1 << 4);
    /// All of them.
    pub const ALL: EventKinds = EventKinds(0x1f);

    /// Whether any of `kinds` is among these.
    pub fn has(self, kinds: EventKinds) -> bool {
        self.0 & kinds.0 != 0
    }
}

impl core::ops::BitOr for EventKinds {
    type Output = EventKinds;

    fn bitor(self, other: EventKinds) -> EventKinds {
        EventKinds(self.0 | other.0)
    }
}

/// What happened, when and where.
///
/// Events tell of a run and are not part of a machine's state: they are in no saved state and no
/// hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Machine time.
    pub tick: Tick,
    /// Which vCPU.
    pub vcpu: u32,
    /// Instructions this vCPU had executed since the machine was made; idle time does not count. What
    /// lies between two events of one vCPU is the difference.
    pub instructions: u64,
    /// RIP: of the instruction for entries and VMX instructions, of the guest for the others.
    pub rip: u64,
    /// What happened.
    pub what: Happening,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Happening {
    /// VMLAUNCH or VMRESUME.
    VmEntry(VmEntry),
    /// The guest was left.
    VmExit(VmExit),
    /// Another VMX instruction.
    VmInstruction(VmInstruction),
    /// Guest-physical memory could not be accessed.
    EptViolation(EptViolation),
    /// A VM entry's event is delivered to the guest.
    Injection(Injection),
}

impl Happening {
    /// Of which kind it is.
    pub fn kind(&self) -> EventKinds {
        match self {
            Happening::VmEntry(_) => EventKinds::VM_ENTRY,
            Happening::VmExit(_) => EventKinds::VM_EXIT,
            Happening::VmInstruction(_) => EventKinds::VM_INSTRUCTION,
            Happening::EptViolation(_) => EventKinds::EPT_VIOLATION,
            Happening::Injection(_) => EventKinds::INJECTION,
        }
    }
}

/// A VM entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmEntry {
    /// VMRESUME rather than VMLAUNCH.
    pub resume: bool,
    /// Current-VMCS pointer; `None` where there was no current VMCS.
    pub vmcs: Option<u64>,
    /// The enlightened VMCS that it was made from, and what of it was not read.
    pub enlightened: Option<EnlightenedEntry>,
    /// RIP of the guest, as its VMCS has it.
    pub guest_rip: u64,
    /// VM-entry interruption information.
    pub injects: u32,
    /// Why it failed, where it did.
    pub failure: Option<EntryFailure>,
}

/// Why a VM entry failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFailure {
    /// The check that was not met: its stable id. `None` where it was none of those on the VMCS's
    /// fields (its launch state, the MSR list).
    pub check: Option<&'static str>,
    /// What L1 was told.
    pub answer: Answer,
}

/// How the processor tells L1 that a VM entry or a VMX instruction did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// VMfailInvalid: the carry flag.
    Invalid,
    /// VMfailValid: the zero flag, and this VM-instruction error.
    Valid(u32),
    /// A VM exit with bit 31 of its reason set.
    Exit {
        /// Basic exit reason.
        reason: ExitReason,
        /// Exit qualification.
        qualification: u64,
    },
}

/// A VM exit, with the fields of Vol. 3C, "VM-Exit Information Fields". Those that are of no meaning
/// for the reason are zero or `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// Which exit this is of the machine's, from 1.
    pub number: u64,
    /// Basic exit reason.
    pub reason: ExitReason,
    /// Exit qualification.
    pub qualification: u64,
    /// VM-exit instruction length.
    pub length: u32,
    /// VM-exit instruction information.
    pub instruction_info: u32,
    /// VM-exit interruption information.
    pub event: u32,
    /// VM-exit interruption error code.
    pub event_error: u32,
    /// IDT-vectoring information.
    pub vectoring: u32,
    /// IDT-vectoring error code.
    pub vectoring_error: u32,
    /// Guest-physical address.
    pub guest_physical: Option<u64>,
    /// Guest-linear address.
    pub guest_linear: Option<u64>,
    /// The enlightened VMCS that the guest was entered by.
    pub enlightened: Option<EnlightenedEntry>,
    /// Instructions that the guest executed since it was entered.
    pub guest_instructions: u64,
}

/// A VMX instruction that completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmInstruction {
    /// Who executed it: L2 only where its VMCS is shadowed.
    pub level: Level,
    /// Its mnemonic, in capitals.
    pub name: &'static str,
    /// The address in its memory operand, the field's encoding for VMREAD and VMWRITE, the type for
    /// INVEPT and INVVPID; zero where there is none.
    pub operand: u64,
    /// What VMREAD read or VMWRITE wrote.
    pub value: u64,
    /// How it failed, where it did.
    pub failure: Option<Answer>,
}

/// An access to guest-physical memory that EPT does not allow, or whose EPT entries are malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptViolation {
    /// An EPT misconfiguration rather than a violation.
    pub misconfiguration: bool,
    /// The guest gets a virtualization exception (#VE): there is no exit.
    pub exception: bool,
    /// The address.
    pub guest_physical: u64,
    /// The linear address that led there; `None` where there is none.
    pub guest_linear: Option<u64>,
    /// Exit qualification of the violation.
    pub qualification: u64,
}

/// An event that a VM entry injects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// VM-entry interruption information.
    pub info: u32,
    /// Its error code, where `info` says that there is one.
    pub error_code: u32,
    /// VM-entry instruction length.
    pub length: u32,
}

/// What happens to an event when there is no room for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// It takes the place of the oldest.
    #[default]
    Overwrite,
    /// Before that can happen the processor stops, so that the events are taken away.
    Stop,
}

/// Events that one asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventRequest {
    /// Of which kinds.
    pub kinds: EventKinds,
    /// How many are kept until they are taken. Memory for all of them is reserved at once.
    pub capacity: usize,
    /// What happens when there are more.
    pub when_full: WhenFull,
}

/// The last events, at most as many as were asked for.
#[derive(Debug, Default)]
pub(super) struct Ring {
    slots: Vec<Event>,
    capacity: usize,
    /// Where the oldest is, once all slots are used.
    oldest: usize,
    lost: u64,
}

impl Ring {
    /// `None` where the host has no memory for so many.
    pub fn new(capacity: usize) -> Option<Ring> {
        let mut slots = Vec::new();
        slots.try_reserve_exact(capacity).ok()?;
        Some(Ring {
            slots,
            capacity,
            oldest: 0,
            lost: 0,
        })
    }

    /// Never allocates: room for the capacity is there from the start.
    pub fn push(&mut self, event: Event) {
        if self.slots.len() < self.capacity {
            self.slots.push(event);
            return;
        }
        self.lost += 1;
        if let Some(slot) = self.slots.get_mut(self.oldest) {
            *slot = event;
            self.oldest = (self.oldest + 1) % self.capacity;
        }
    }

    /// Room for this many more.
    pub fn room(&self) -> usize {
        self.capacity - self.slots.len()
    }

    /// All events, oldest first; the ring is empty afterwards.
    pub fn take(&mut self) -> Vec<Event> {
        let oldest = core::mem::take(&mut self.oldest);
        let mut events = Vec::with_capacity(self.slots.len());
        events.extend_from_slice(&self.slots[oldest..]);
        events.extend_from_slice(&self.slots[..oldest]);
        self.slots.clear();
        events
    }

    /// How many events were overwritten.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(tick: Tick) -> Event {
        Event {
            tick,
            vcpu: 0,
            instructions: tick,
            rip: 0,
            what: Happening::Injection(Injection {
                info: 0,
                error_code: 0,
                length: 0,
            }),
        }
    }

    fn ticks(ring: &mut Ring) -> Vec<Tick> {
        ring.take().iter().map(|event| event.tick).collect()
    }

    #[test]
    fn a_full_ring_keeps_the_newest_and_counts_the_others() {
        let mut ring = Ring::new(3).unwrap();
        for tick in 1..=5 {
            ring.push(event(tick));
        }
        assert_eq!((ring.room(), ring.lost()), (0, 2));
        assert_eq!(ticks(&mut ring), [3, 4, 5]);
        ring.push(event(6));
        assert_eq!((ring.room(), ring.lost()), (2, 2));
        assert_eq!(ticks(&mut ring), [6]);
    }

    #[test]
    fn a_ring_without_room_takes_nothing() {
        let mut ring = Ring::default();
        ring.push(event(1));
        assert_eq!((ticks(&mut ring).len(), ring.lost()), (0, 1));
    }

    #[test]
    fn every_kind_is_its_own_bit() {
        let kinds = [
            EventKinds::VM_ENTRY,
            EventKinds::VM_EXIT,
            EventKinds::VM_INSTRUCTION,
            EventKinds::EPT_VIOLATION,
            EventKinds::INJECTION,
        ];
        let all = kinds.iter().fold(EventKinds::NONE, |all, kind| all | *kind);
        assert_eq!(all, EventKinds::ALL);
        assert!(!EventKinds::VM_ENTRY.has(EventKinds::VM_EXIT | EventKinds::INJECTION));
    }
}
