//! C049..C055: VM-exit control fields.

use super::*;

const fn exit_row(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::ExitControls, id, fields, check)
}

pub(super) const ROWS: &[EntryCheck] = &[
    exit_row("C049", &[EXIT], |e| e.obeys(Control::Exit).into()),
    exit_row("C050", &[EXIT, EXIT2], |e| {
        when(
            e.exit(exit::ACTIVATE_SECONDARY_CONTROLS),
            e.obeys(Control::Exit2),
        )
    }),
    exit_row("C051", &[PIN, EXIT, ENTRY], |e| {
        when(
            !e.pin(pin::ACTIVATE_VMX_PREEMPTION_TIMER) && !e.returns_from_smm(),
            !e.exit(exit::SAVE_VMX_PREEMPTION_TIMER_VALUE),
        )
    })
    .each_time(),
    exit_row("C052", STORE, |e| msr_list_start(e, STORE)),
    exit_row("C053", STORE, |e| msr_list_end(e, STORE)),
    exit_row("C054", LOAD, |e| msr_list_start(e, LOAD)),
    exit_row("C055", LOAD, |e| msr_list_end(e, LOAD)),
];

const STORE: &[Field; 2] = &[
    Field::VM_EXIT_MSR_STORE_COUNT,
    Field::VM_EXIT_MSR_STORE_ADDR,
];
const LOAD: &[Field; 2] = &[Field::VM_EXIT_MSR_LOAD_COUNT, Field::VM_EXIT_MSR_LOAD_ADDR];

/// The list, unless it is empty, starts at a multiple of 16 within the physical width.
pub(super) fn msr_list_start(e: &EntryCtx, [count, address]: &[Field; 2]) -> Verdict {
    when(e.get(*count) != 0, e.aligned(e.get(*address), 16))
}

/// The last byte of the list, unless it is empty, is within the physical width.
pub(super) fn msr_list_end(e: &EntryCtx, [count, address]: &[Field; 2]) -> Verdict {
    let bytes = 16 * e.get(*count);
    let last = e.get(*address).checked_add(bytes.wrapping_sub(1));
    when(bytes != 0, last.is_some_and(|last| e.physical(last)))
}
