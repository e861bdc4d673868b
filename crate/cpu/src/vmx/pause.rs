//! PAUSE-loop exiting (Vol. 3C, "Instructions That Cause VM Exits Conditionally", PAUSE).

use hypernest_vmcs::{Field, proc1, proc2};

use crate::mem::Ctx;
use crate::state::PauseLoop;

/// Notes a PAUSE of a guest; whether it exits.
pub(super) fn exits(x: &mut Ctx) -> bool {
    let controls = &x.cpu.vmx.controls;
    if controls.proc1(proc1::PAUSE_EXITING) {
        return true;
    }
    if !controls.proc2(proc2::PAUSE_LOOP_EXITING) || x.cpu.cpl > 0 {
        return false;
    }
    // The time-stamp counter advances by one in a tick.
    let now = x.now;
    let gap = x.cpu.vmx.vmcs.get(Field::PLE_GAP);
    let window = x.cpu.vmx.vmcs.get(Field::PLE_WINDOW);
    let running = x.cpu.vmx.pause_loop;
    let first = match running {
        Some(known) if now.saturating_sub(known.last) <= gap => known.first,
        _ => now,
    };
    x.cpu.vmx.pause_loop = Some(PauseLoop { first, last: now });
    now.saturating_sub(first) > window
}
