//! Data movement: moves, extensions, exchanges, conditional moves, flag images in AH.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::alu::by_width;
use crate::flags::{Width, bit};
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::Exec;
use crate::vcpu::reg::{RAX, RDX};

/// Whether a MOV or POP concerns a segment, control, debug or test register.
pub(super) fn is_system(i: &Instruction) -> bool {
    let special = |n| {
        let register = i.op_register(n);
        i.op_kind(n) == OpKind::Register && register != Register::None && !register.is_gpr()
    };
    special(0) || special(1)
}

/// MOV and MOVNTI.
pub(super) fn mov(x: &mut Ctx, i: &Instruction) -> Exec {
    let value = x.operand(i, 1)?;
    x.set_operand(i, 0, value)
}

/// MOVSX and MOVSXD.
pub(super) fn sign_extended(x: &mut Ctx, i: &Instruction) -> Exec {
    let value = x.operand(i, 1)?;
    let size = x.operand_size(i, 1);
    x.set_operand(i, 0, by_width!(size, T => <T as Width>::sign_extend(value)))
}

/// MOVBE.
pub(super) fn movbe(x: &mut Ctx, i: &Instruction) -> Exec {
    let value = x.operand(i, 1)?;
    let size = x.operand_size(i, 0);
    x.set_operand(i, 0, value.swap_bytes() >> (64 - 8 * size))
}

/// BSWAP. Of a 16-bit register the result is undefined; processors give zero.
pub(super) fn bswap(x: &mut Ctx, i: &Instruction) -> Exec {
    let value = x.operand(i, 0)?;
    let swapped = match x.operand_size(i, 0) {
        8 => value.swap_bytes(),
        4 => u64::from((value as u32).swap_bytes()),
        _ => 0,
    };
    x.set_operand(i, 0, swapped)
}

/// LEA: the offset alone, cut or extended to the destination.
pub(super) fn lea(x: &mut Ctx, i: &Instruction) -> Exec {
    let (_, offset) = x.address(i);
    x.set_operand(i, 0, offset)
}

/// XLAT.
pub(super) fn xlat(x: &mut Ctx, i: &Instruction) -> Exec {
    let linear = x.memory(i, 1, Access::Read)?;
    let value = x.load_sized(linear, 1)?;
    x.cpu.set_gpr(RAX, 1, value);
    Ok(())
}

/// XCHG.
pub(super) fn xchg(x: &mut Ctx, i: &Instruction) -> Exec {
    let first = x.place(i, 0, Access::Write)?;
    let second = x.place(i, 1, Access::Write)?;
    let (a, b) = (x.get(first)?, x.get(second)?);
    x.put(first, b)?;
    x.put(second, a)
}

/// CMOVcc. The source is read, and a 32-bit destination zero-extended, whatever the condition.
pub(super) fn conditional(x: &mut Ctx, i: &Instruction) -> Exec {
    let mut value = x.operand(i, 1)?;
    if !super::branch::condition(x, i) {
        value = x.operand(i, 0)?;
    }
    x.set_operand(i, 0, value)
}

/// SETcc.
pub(super) fn set_condition(x: &mut Ctx, i: &Instruction) -> Exec {
    let met = super::branch::condition(x, i);
    x.set_operand(i, 0, u64::from(met))
}

/// CBW, CWDE, CDQE: the low half of the accumulator extended into the whole.
pub(super) fn extend_accumulator(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = match i.mnemonic() {
        Mnemonic::Cbw => 2,
        Mnemonic::Cwde => 4,
        _ => 8,
    };
    let value = x.cpu.gpr[RAX];
    let extended = by_width!(size / 2, T => <T as Width>::sign_extend(value));
    x.cpu.set_gpr(RAX, size, extended);
    Ok(())
}

/// CWD, CDQ, CQO: the sign of the accumulator into all of DX.
pub(super) fn sign_into_dx(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = match i.mnemonic() {
        Mnemonic::Cwd => 2,
        Mnemonic::Cdq => 4,
        _ => 8,
    };
    let value = x.cpu.gpr[RAX];
    let extended = by_width!(size, T => <T as Width>::sign_extend(value)) as i64;
    x.cpu.set_gpr(RDX, size, (extended >> 63) as u64);
    Ok(())
}

/// LAHF.
pub(super) fn lahf(x: &mut Ctx) -> Exec {
    let image = x.cpu.flags.get() & 0xff;
    x.cpu.gpr[RAX] = x.cpu.gpr[RAX] & !0xff00 | image << 8;
    Ok(())
}

/// SAHF.
pub(super) fn sahf(x: &mut Ctx) -> Exec {
    let image = x.cpu.gpr[RAX] >> 8;
    let mask = bit::ARITHMETIC & !bit::OF;
    x.cpu.flags.update(mask, image);
    Ok(())
}

/// SALC.
pub(super) fn salc(x: &mut Ctx) -> Exec {
    let value = if x.cpu.flags.cf() { 0xff } else { 0 };
    x.cpu.set_gpr(RAX, 1, value);
    Ok(())
}

/// CLC, STC, CMC, CLD, STD.
pub(super) fn one_flag(x: &mut Ctx, i: &Instruction) -> Exec {
    let flags = &mut x.cpu.flags;
    match i.mnemonic() {
        Mnemonic::Clc => flags.set_cf(false),
        Mnemonic::Stc => flags.set_cf(true),
        Mnemonic::Cmc => flags.set_cf(!flags.cf()),
        Mnemonic::Cld => flags.rest &= !bit::DF,
        _ => flags.rest |= bit::DF,
    }
    Ok(())
}
