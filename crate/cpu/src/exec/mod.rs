//! Executes one decoded instruction, whatever it is: the reference that the fast paths in `hot`
//! must agree with. One file per instruction family.
//!
//! On entry RIP is already past the instruction; `i.ip()` is its own. A family changes nothing
//! before the last point where it can fail. On a fault the caller restores RIP.

pub(crate) mod control;
pub(crate) mod msr;

use iced_x86::{Instruction, Mnemonic};

use crate::mem::Ctx;
use crate::trap::{Exec, Trap, UD};

/// Executes `i`.
pub(crate) fn execute(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic::*;
    let _ = &x;
    match i.mnemonic() {
        // ---- integer ----

        // ---- strings ----

        // ---- control flow ----

        // ---- system ----

        // ---- x87 and state ----

        // ---- MMX and SSE ----

        // ----
        INVALID | Ud0 | Ud1 | Ud2 => Err(UD),
        _ => Err(Trap::Unimplemented("instruction")),
    }
}
