//! x87: control and state. What waits for exceptions of earlier instructions checks for them
//! itself, since some of these instructions do not.

mod state;

use iced_x86::{Instruction, Mnemonic};

use crate::exec::xsave;
use crate::mem::Ctx;
use crate::trap::{Exec, Trap};

/// Executes `i` if it is one of these.
pub(crate) fn execute(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic::*;
    match i.mnemonic() {
        // ---- control and state ----
        Wait => state::wait(x),
        Fninit => state::init(x),
        Fnclex => state::clear_exceptions(x),
        Fnstcw => state::store_control(x, i),
        Fldcw => state::load_control(x, i),
        Fnstsw => state::store_status(x, i),
        Fnstenv => state::store_environment(x, i),
        Fldenv => state::load_environment(x, i),
        Fnsave => state::save(x, i),
        Frstor => state::restore(x, i),
        Emms => state::empty(x),
        Ldmxcsr => state::load_mxcsr(x, i),
        Stmxcsr => state::store_mxcsr(x, i),
        Fxsave | Fxsave64 => xsave::fxsave(x, i),
        Fxrstor | Fxrstor64 => xsave::fxrstor(x, i),
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xsaves | Xsaves64 => {
            xsave::xsave(x, i)
        }
        Xrstor | Xrstor64 | Xrstors | Xrstors64 => xsave::xrstor(x, i),

        _ => Err(Trap::Unimplemented("instruction")),
    }
}
