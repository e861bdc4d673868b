//! Comparisons and classification.

use core::cmp::Ordering;

use iced_x86::{Instruction, Mnemonic};

use super::arithmetic::memory_operand;
use super::{begin, environment, st};
use crate::exec::sse::float::comparison_flags;
use crate::float::{self, Env, Float, Kind};
use crate::fpu::{Fpu, status};
use crate::mem::Ctx;
use crate::trap::Exec;

const CONDITION: u16 = status::C0 | status::C2 | status::C3;

fn pops(i: &Instruction) -> u32 {
    use Mnemonic::*;
    match i.mnemonic() {
        Fcomp | Ficomp | Fucomp | Fcomip | Fucomip => 1,
        Fcompp | Fucompp => 2,
        _ => 0,
    }
}

impl Fpu {
    fn set_condition(&mut self, order: Option<Ordering>) {
        let condition = match order {
            None => CONDITION,
            Some(Ordering::Less) => status::C0,
            Some(Ordering::Equal) => status::C3,
            Some(Ordering::Greater) => 0,
        };
        self.status = self.status & !CONDITION | condition;
    }
}

/// ST(0) against the other operand: its order, or nothing if an exception forbids to tell.
fn order(fpu: &mut Fpu, other: Option<Float>, quiet: bool) -> Option<Option<Ordering>> {
    match other {
        Some(other) if !fpu.is_empty(0) => {
            let mut env: Env = environment(fpu);
            let order = float::compare(&mut env, fpu.number(0), other, quiet);
            fpu.settle(&env).then_some(order)
        }
        _ => fpu.stack_fault(false).then_some(None),
    }
}

fn register(fpu: &Fpu, n: usize) -> Option<Float> {
    if fpu.is_empty(n) {
        None
    } else {
        Some(fpu.number(n))
    }
}

/// FCOM and FUCOM with their popping and integer forms.
pub(super) fn compare(x: &mut Ctx, i: &Instruction, quiet: bool) -> Exec {
    begin(x)?;
    let operand = if i.op_count() == 0 {
        None
    } else {
        memory_operand(x, i)?
    };
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, operand.map(|(_, offset)| offset));
    let other = match operand {
        Some((value, _)) => Some(value),
        None if i.op_count() == 2 => register(fpu, st(i.op1_register())),
        None => register(fpu, 1),
    };
    if let Some(order) = order(fpu, other, quiet) {
        fpu.set_condition(order);
        fpu.pops(pops(i));
    }
    Ok(())
}

/// FCOMI and FUCOMI with their popping forms.
pub(super) fn compare_into_flags(x: &mut Ctx, i: &Instruction, quiet: bool) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    let other = register(fpu, st(i.op1_register()));
    if let Some(order) = order(fpu, other, quiet) {
        fpu.pops(pops(i));
        x.cpu.flags.set_arithmetic(comparison_flags(order));
    }
    Ok(())
}

/// FTST: against zero.
pub(super) fn test(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    if let Some(order) = order(fpu, Some(Float::zero(false)), false) {
        fpu.set_condition(order);
    }
    Ok(())
}

/// FXAM.
pub(super) fn examine(x: &mut Ctx, i: &Instruction) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    let value = fpu.number(0);
    let class = match value.kind {
        _ if fpu.is_empty(0) => status::C3 | status::C0,
        Kind::Unsupported => 0,
        Kind::Nan => status::C0,
        Kind::Infinity => status::C2 | status::C0,
        Kind::Zero => status::C3,
        Kind::Finite if value.denormal => status::C3 | status::C2,
        Kind::Finite => status::C2,
    };
    let sign = if value.sign { status::C1 } else { 0 };
    fpu.status = fpu.status & !(CONDITION | status::C1) | class | sign;
    Ok(())
}
