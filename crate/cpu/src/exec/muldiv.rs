//! Multiplication and division.

use iced_x86::{Instruction, Mnemonic};

use super::alu::by_width;
use crate::flags::Width;
use crate::mem::Ctx;
use crate::operand::mask;
use crate::trap::{Exec, Fault};
use crate::vcpu::reg::{RAX, RDX};

fn sign_extend(value: u64, size: usize) -> i64 {
    by_width!(size, T => <T as Width>::sign_extend(value)) as i64
}

/// MUL and IMUL with one operand: the double-width product to AX or DX:AX and wider.
pub(super) fn multiply_wide(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = x.operand_size(i, 0);
    let bits = 8 * size as u32;
    let b = x.operand(i, 0)?;
    let a = x.cpu.gpr[RAX] & mask(size);
    let (low, high, overflow);
    if i.mnemonic() == Mnemonic::Mul {
        let product = u128::from(a) * u128::from(b);
        (low, high) = (product as u64, (product >> bits) as u64);
        overflow = high != 0;
    } else {
        let product = i128::from(sign_extend(a, size)) * i128::from(sign_extend(b, size));
        (low, high) = (product as u64, (product >> bits) as u64);
        overflow = i128::from(sign_extend(low, size)) != product;
    }
    if size == 1 {
        x.cpu.set_gpr(RAX, 2, high << 8 | low & 0xff);
    } else {
        x.cpu.set_gpr(RAX, size, low);
        x.cpu.set_gpr(RDX, size, high);
    }
    by_width!(size, T => x.cpu.flags.shift::<T>(low, overflow, overflow));
    Ok(())
}

/// IMUL with two or three operands: the product cut to the destination.
pub(super) fn multiply(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = x.operand_size(i, 0);
    let first = if i.op_count() == 3 { 1 } else { 0 };
    let a = sign_extend(x.operand(i, first)?, size);
    let b = sign_extend(x.operand(i, first + 1)?, size);
    let product = i128::from(a) * i128::from(b);
    let overflow = i128::from(sign_extend(product as u64, size)) != product;
    by_width!(size, T => x.cpu.flags.shift::<T>(product as u64, overflow, overflow));
    x.set_operand(i, 0, product as u64)
}

/// MULX: no flags; where both destinations are the same register it holds the high half.
pub(super) fn mulx(x: &mut Ctx, i: &Instruction) -> Exec {
    super::bits::vex(x)?;
    let size = x.operand_size(i, 0);
    let b = x.operand(i, 2)?;
    let a = x.cpu.gpr[RDX] & mask(size);
    let product = u128::from(a) * u128::from(b);
    x.set_operand(i, 1, product as u64)?;
    x.set_operand(i, 0, (product >> (8 * size)) as u64)
}

/// DIV.
pub(super) fn div(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = x.operand_size(i, 0);
    let divisor = x.operand(i, 0)?;
    if divisor == 0 {
        return Err(Fault::Divide.into());
    }
    let (quotient, remainder) = if size == 8 {
        let (high, low) = (x.cpu.gpr[RDX], x.cpu.gpr[RAX]);
        if high == 0 {
            (low / divisor, low % divisor)
        } else if high >= divisor {
            return Err(Fault::Divide.into());
        } else {
            let dividend = u128::from(high) << 64 | u128::from(low);
            let divisor = u128::from(divisor);
            ((dividend / divisor) as u64, (dividend % divisor) as u64)
        }
    } else {
        let dividend = narrow_dividend(x, size);
        (dividend / divisor, dividend % divisor)
    };
    if quotient > mask(size) {
        return Err(Fault::Divide.into());
    }
    set_quotient(x, size, quotient, remainder);
    Ok(())
}

/// IDIV.
pub(super) fn idiv(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = x.operand_size(i, 0);
    let divisor = sign_extend(x.operand(i, 0)?, size);
    if divisor == 0 {
        return Err(Fault::Divide.into());
    }
    let (quotient, remainder) = if size == 8 {
        let (high, low) = (x.cpu.gpr[RDX] as i64, x.cpu.gpr[RAX]);
        if high == low as i64 >> 63 {
            // Division of i64::MIN by -1 does not fit, as it would not below.
            let quotient = (low as i64).checked_div(divisor).ok_or(Fault::Divide)?;
            (quotient, (low as i64) % divisor)
        } else {
            let dividend = i128::from(high) << 64 | i128::from(low);
            let divisor = i128::from(divisor);
            let quotient = dividend.checked_div(divisor).ok_or(Fault::Divide)?;
            let quotient = i64::try_from(quotient).map_err(|_| Fault::Divide)?;
            (quotient, (dividend % divisor) as i64)
        }
    } else {
        let dividend = sign_extend(narrow_dividend(x, size), 2 * size);
        let quotient = dividend.checked_div(divisor).ok_or(Fault::Divide)?;
        (quotient, dividend % divisor)
    };
    if quotient != sign_extend(quotient as u64, size) {
        return Err(Fault::Divide.into());
    }
    set_quotient(x, size, quotient as u64, remainder as u64);
    Ok(())
}

/// AX, DX:AX or EDX:EAX.
fn narrow_dividend(x: &Ctx, size: usize) -> u64 {
    let (low, high) = (x.cpu.gpr[RAX], x.cpu.gpr[RDX]);
    match size {
        1 => low & 0xffff,
        2 => (high & 0xffff) << 16 | low & 0xffff,
        _ => high << 32 | low & 0xffff_ffff,
    }
}

fn set_quotient(x: &mut Ctx, size: usize, quotient: u64, remainder: u64) {
    if size == 1 {
        x.cpu
            .set_gpr(RAX, 2, (remainder & 0xff) << 8 | quotient & 0xff);
    } else {
        x.cpu.set_gpr(RAX, size, quotient);
        x.cpu.set_gpr(RDX, size, remainder);
    }
}
