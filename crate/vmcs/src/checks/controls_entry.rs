//! C056..C076: VM-entry control fields, event injection, and what a return from SMM adds.

use super::controls_exit::{msr_list_end, msr_list_start};
use super::*;

const fn entry_row(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::EntryControls, id, fields, check)
}

const fn from_smm(
    id: &'static str,
    error: u8,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::ReturnFromSmm, id, fields, check)
        .or(Failure::VmfailValid(error))
        .each_time()
}

pub(super) const ROWS: &[EntryCheck] = &[
    entry_row("C056", &[ENTRY], |e| e.obeys(Control::Entry).into()),
    // The event to inject.
    entry_row("C057", &[INJECTION], |e| {
        injected(e, |event| match event.kind() {
            event::RESERVED => false,
            event::OTHER => e.has_mtf() || e.cpu.fred,
            _ => true,
        })
    }),
    entry_row("C058", &[INJECTION], |e| {
        injected_as(e, event::NMI, |event| event.vector() == 2)
    }),
    entry_row("C059", &[INJECTION], |e| {
        injected_as(e, event::HARDWARE_EXCEPTION, |event| event.vector() <= 31)
    }),
    entry_row("C060", &[INJECTION, Field::GUEST_CR4], |e| {
        injected_as(e, event::OTHER, |event| match event.vector() {
            0 => e.has_mtf(),
            1 | 2 => e.guest_cr4(CR4_FRED),
            _ => false,
        })
    }),
    entry_row("C061", &[INJECTION], |e| {
        injected(e, |event| {
            !event.has_error_code() || event.is(event::HARDWARE_EXCEPTION)
        })
    }),
    entry_row(
        "C062",
        &[PROC1, PROC2, Field::GUEST_CR0, INJECTION],
        |e| match e.injection() {
            Some(event) if !e.protected_mode() => (!event.has_error_code()).into(),
            _ => Verdict::NotReached,
        },
    ),
    entry_row("C063", &[PROC1, PROC2, Field::GUEST_CR0, INJECTION], |e| {
        if e.caps.basic >> 56 & 1 != 0 || !e.protected_mode() {
            return Verdict::NotReached;
        }
        injected_as(e, event::HARDWARE_EXCEPTION, |event| {
            event.has_error_code() == matches!(event.vector(), 8 | 10..=14 | 17)
        })
    }),
    entry_row("C064", &[INJECTION], |e| {
        injected(e, |event| event.info & 0x7fff_d000 == 0)
    }),
    entry_row("C071", &[INJECTION], |e| {
        injected(e, |event| {
            event.info & 1 << 13 == 0
                || event.is(event::HARDWARE_EXCEPTION) && e.caps.basic >> 58 & 1 != 0
        })
    }),
    entry_row(
        "C065",
        &[INJECTION, Field::VM_ENTRY_EXCEPTION_ERROR_CODE],
        |e| {
            when(
                e.injection().is_some_and(Injection::has_error_code),
                e.get(Field::VM_ENTRY_EXCEPTION_ERROR_CODE) >> 16 == 0,
            )
        },
    ),
    entry_row("C066", &[INJECTION, Field::VM_ENTRY_INSTRUCTION_LEN], |e| {
        let from_instruction = |event: Injection| match event.kind() {
            event::SOFTWARE_INTERRUPT
            | event::PRIVILEGED_SOFTWARE_EXCEPTION
            | event::SOFTWARE_EXCEPTION => true,
            event::OTHER => matches!(event.vector(), 1 | 2),
            _ => false,
        };
        let shortest = if e.caps.misc >> 30 & 1 != 0 { 0 } else { 1 };
        when(
            e.injection().is_some_and(from_instruction),
            (shortest..=15).contains(&e.get(Field::VM_ENTRY_INSTRUCTION_LEN)),
        )
    }),
    // The rest.
    entry_row("C067", LOAD, |e| msr_list_start(e, LOAD)),
    entry_row("C068", LOAD, |e| msr_list_end(e, LOAD)),
    entry_row("C069", &[ENTRY], |e| {
        when(
            !e.cpu.smm,
            !e.entry(entry::ENTRY_TO_SMM | entry::DEACTIVATE_DUAL_MONITOR_TREATMENT),
        )
    })
    .each_time(),
    entry_row("C070", &[ENTRY], |e| {
        let both =
            e.entry(entry::ENTRY_TO_SMM) && e.entry(entry::DEACTIVATE_DUAL_MONITOR_TREATMENT);
        (!both).into()
    }),
    // Entries that return from SMM.
    from_smm("C072", 16, &[ENTRY, EXECUTIVE], |e| {
        if !e.returns_from_smm() {
            return Verdict::NotReached;
        }
        let pointer = e.get(EXECUTIVE);
        (e.page(EXECUTIVE) && e.revision(pointer).is_some_and(|(_, shadow)| !shadow)).into()
    }),
    from_smm("C073", 17, &[ENTRY, EXECUTIVE], |e| {
        let pointer = e.get(EXECUTIVE);
        if !e.returns_from_smm()
            || e.entry(entry::DEACTIVATE_DUAL_MONITOR_TREATMENT)
            || pointer == e.cpu.vmxon
        {
            return Verdict::NotReached;
        }
        let executive = e.memory.vmcs_at(pointer);
        executive.is_some_and(|vmcs| vmcs.launched).into()
    }),
    from_smm("C074", 18, &[ENTRY, EXECUTIVE], |e| {
        when(
            e.returns_from_smm() && e.entry(entry::DEACTIVATE_DUAL_MONITOR_TREATMENT),
            e.get(EXECUTIVE) == e.cpu.vmxon,
        )
    }),
    from_smm("C075", 25, &[ENTRY, EXECUTIVE], |e| {
        let pointer = e.get(EXECUTIVE);
        if !e.returns_from_smm() || pointer == e.cpu.vmxon {
            return Verdict::NotReached;
        }
        let executive = e.memory.vmcs_at(pointer);
        executive
            .is_some_and(|vmcs| {
                let executive = EntryCtx { vmcs, ..*e };
                controls_exec::ROWS.iter().all(|row| {
                    row.failure == Failure::Unchecked || (row.check)(&executive) != Verdict::Fails
                })
            })
            .into()
    }),
    from_smm("C076", 7, &[ENTRY, EXECUTIVE, INJECTION], |e| {
        let stays_in_root = e.returns_from_smm() && e.get(EXECUTIVE) == e.cpu.vmxon;
        let pending_mtf = |event: Injection| event.is(event::OTHER) && event.vector() == 0;
        when(stays_in_root, e.injection().is_none_or(pending_mtf))
    }),
];

const LOAD: &[Field; 2] = &[
    Field::VM_ENTRY_MSR_LOAD_COUNT,
    Field::VM_ENTRY_MSR_LOAD_ADDR,
];
pub(super) const EXECUTIVE: Field = Field::EXEC_VMCS_POINTER;

/// The rule for an event, if one is to be injected.
fn injected(e: &EntryCtx, rule: impl FnOnce(Injection) -> bool) -> Verdict {
    e.injection()
        .map_or(Verdict::NotReached, |event| rule(event).into())
}

/// The rule for an event, if one of this type is to be injected.
fn injected_as(e: &EntryCtx, kind: u8, rule: impl FnOnce(Injection) -> bool) -> Verdict {
    match e.injection() {
        Some(event) if event.is(kind) => rule(event).into(),
        _ => Verdict::NotReached,
    }
}

impl EntryCtx<'_> {
    /// The monitor trap flag is supported.
    fn has_mtf(&self) -> bool {
        self.caps.allows_proc1(proc1::MONITOR_TRAP_FLAG)
    }

    /// The guest will not be in real mode: only an unrestricted guest may be.
    fn protected_mode(&self) -> bool {
        !self.unrestricted() || self.get(Field::GUEST_CR0) & CR0_PE != 0
    }

    /// Whether the VMCS region at `pointer` has an identifier that this processor takes, and if so
    /// the identifier and the shadow bit.
    pub(super) fn revision(&self, pointer: u64) -> Option<(u32, bool)> {
        let word = self.memory.read_u32(pointer).unwrap_or(!0);
        let revision = word & !(1 << 31);
        self.memory
            .accepts_revision(revision)
            .then_some((revision, word >> 31 != 0))
    }
}
