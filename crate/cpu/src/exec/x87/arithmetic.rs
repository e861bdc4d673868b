//! Arithmetic of one and two operands.

use iced_x86::{Instruction, Mnemonic};

use super::moves::signed;
use super::{begin, environment, memory, precision, st};
use crate::float::{self, Float, Format, Operation};
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::Exec;

/// The value of an instruction's memory operand, and its offset.
pub(super) fn memory_operand(x: &mut Ctx, i: &Instruction) -> Exec<Option<(Float, u64)>> {
    use Mnemonic::*;
    let Some(at) = memory(x, i, Access::Read)? else {
        return Ok(None);
    };
    let bits = x.load_sized(at.linear, at.size)?;
    let value = match i.mnemonic() {
        Fiadd | Fisub | Fisubr | Fimul | Fidiv | Fidivr | Ficom | Ficomp => {
            let value = signed(bits, at.size);
            Float::finite(value < 0, 63, value.unsigned_abs())
        }
        _ if at.size == 4 => Format::SINGLE.decode(bits),
        _ => Format::DOUBLE.decode(bits),
    };
    Ok(Some((value, at.offset)))
}

/// FADD and its kin: the destination by the source, or `reversed` the source by the destination.
pub(super) fn binary(x: &mut Ctx, i: &Instruction, operation: Operation, reversed: bool) -> Exec {
    use Mnemonic::*;
    begin(x)?;
    let operand = memory_operand(x, i)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, operand.map(|(_, offset)| offset));
    let (to, source) = match operand {
        Some((value, _)) => (0, Some(value)),
        None => {
            let from = st(i.op1_register());
            let source = if fpu.is_empty(from) {
                None
            } else {
                Some(fpu.number(from))
            };
            (st(i.op0_register()), source)
        }
    };
    let written = match source {
        Some(source) if !fpu.is_empty(to) => {
            let mut env = environment(fpu);
            let (a, b) = if reversed {
                (source, fpu.number(to))
            } else {
                (fpu.number(to), source)
            };
            let result = operation.exact(&mut env, precision(fpu), a, b);
            let written = fpu.settle(&env);
            if written {
                fpu.set_number(to, result);
            }
            written
        }
        _ => {
            let masked = fpu.stack_fault(false);
            if masked {
                fpu.set_number(to, Float::DEFAULT_NAN);
            }
            masked
        }
    };
    if written
        && matches!(
            i.mnemonic(),
            Faddp | Fsubp | Fsubrp | Fmulp | Fdivp | Fdivrp
        )
    {
        fpu.pop();
    }
    Ok(())
}

/// ST(0) becomes `f` of itself.
fn unary(
    x: &mut Ctx,
    i: &Instruction,
    f: impl FnOnce(&mut float::Env, Format, Float) -> Float,
) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    if fpu.is_empty(0) {
        if fpu.stack_fault(false) {
            fpu.set_number(0, Float::DEFAULT_NAN);
        }
        return Ok(());
    }
    let mut env = environment(fpu);
    let result = f(&mut env, precision(fpu), fpu.number(0));
    if fpu.settle(&env) {
        fpu.set_number(0, result);
    }
    Ok(())
}

/// FSQRT.
pub(super) fn square_root(x: &mut Ctx, i: &Instruction) -> Exec {
    unary(x, i, float::square_root)
}

/// FRNDINT.
pub(super) fn round(x: &mut Ctx, i: &Instruction) -> Exec {
    unary(x, i, |env, _, value| {
        if let Some(nan) = float::propagate(env, value, value) {
            return nan;
        }
        float::note_denormal(env, &[value]);
        float::round_to_integral(env, value)
    })
}

/// FABS, FCHS: no exceptions but of the stack, whatever the register holds.
pub(super) fn sign(x: &mut Ctx, i: &Instruction, f: impl FnOnce(u16) -> u16) -> Exec {
    begin(x)?;
    let fpu = &mut x.cpu.fpu;
    fpu.note(i, None);
    if fpu.is_empty(0) {
        if fpu.stack_fault(false) {
            fpu.set_number(0, Float::DEFAULT_NAN);
        }
        return Ok(());
    }
    fpu.clear_c1();
    let (significand, exponent) = fpu.st(0);
    fpu.set_st(0, (significand, f(exponent)));
    Ok(())
}
