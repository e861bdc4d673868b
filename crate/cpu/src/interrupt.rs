//! Delivery of exceptions and interrupts (Vol. 3A, "Interrupt and Exception Handling").

use crate::mem::Ctx;
use crate::trap::{Exec, Fault, Trap};

/// Delivers an exception; RIP is that of the instruction (or past it, for traps). A second fault
/// on the way is handled as the manual says, up to `Trap::TripleFault`.
pub(crate) fn raise(_x: &mut Ctx, _fault: Fault) -> Exec {
    Err(Trap::Unimplemented("exception delivery"))
}

/// Delivers a maskable hardware interrupt.
pub(crate) fn external(_x: &mut Ctx, _vector: u8) -> Exec {
    Err(Trap::Unimplemented("interrupt delivery"))
}

/// Delivers a non-maskable interrupt.
pub(crate) fn nmi(_x: &mut Ctx) -> Exec {
    Err(Trap::Unimplemented("interrupt delivery"))
}
