//! Moves between vector registers, general registers and memory.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::integer::sign_mask;
use super::lanes::{Lane, Vector};
use super::{load, mm, source, store, xmm};
use crate::mem::Ctx;
use crate::operand::{address_size, mask as size_mask};
use crate::paging::Access;
use crate::trap::{Exec, Trap};
use crate::vcpu::reg;

const LOW_HALF: Vector = u64::MAX as Vector;

/// MOVAPS and all others that move 16 bytes.
pub(super) fn whole(x: &mut Ctx, i: &Instruction, aligned: bool) -> Exec {
    x.need_sse()?;
    let value = match i.op1_kind() {
        OpKind::Register => x.cpu.fpu.xmm[xmm(i.op1_register())],
        _ => load(x, i, 16, aligned)?,
    };
    match i.op0_kind() {
        OpKind::Register => x.cpu.fpu.xmm[xmm(i.op0_register())] = value,
        _ => store(x, i, 16, aligned, value)?,
    }
    Ok(())
}

/// MOVSS and MOVSD: a load clears the rest of the register, a register move keeps it.
pub(super) fn scalar(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    let bytes = if matches!(i.code(), Code::Movss_xmm_xmmm32 | Code::Movss_xmmm32_xmm) {
        4
    } else {
        8
    };
    if i.op0_kind() == OpKind::Memory {
        let value = x.cpu.fpu.xmm[xmm(i.op1_register())];
        return store(x, i, bytes, false, value);
    }
    let to = xmm(i.op0_register());
    x.cpu.fpu.xmm[to] = if i.op1_kind() == OpKind::Memory {
        load(x, i, bytes, false)?
    } else {
        let changed = Vector::from(size_mask(bytes));
        x.cpu.fpu.xmm[to] & !changed | x.cpu.fpu.xmm[xmm(i.op1_register())] & changed
    };
    Ok(())
}

/// MOVLPS, MOVLPD, MOVHLPS.
pub(super) fn low_half(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    if i.op0_kind() == OpKind::Memory {
        let value = x.cpu.fpu.xmm[xmm(i.op1_register())];
        return store(x, i, 8, false, value);
    }
    let value = match i.op1_kind() {
        OpKind::Memory => load(x, i, 8, false)?,
        _ => x.cpu.fpu.xmm[xmm(i.op1_register())] >> 64,
    };
    let to = &mut x.cpu.fpu.xmm[xmm(i.op0_register())];
    *to = *to & !LOW_HALF | value;
    Ok(())
}

/// MOVHPS, MOVHPD, MOVLHPS.
pub(super) fn high_half(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    if i.op0_kind() == OpKind::Memory {
        let value = x.cpu.fpu.xmm[xmm(i.op1_register())] >> 64;
        return store(x, i, 8, false, value);
    }
    let value = match i.op1_kind() {
        OpKind::Memory => load(x, i, 8, false)?,
        _ => x.cpu.fpu.xmm[xmm(i.op1_register())],
    };
    let to = &mut x.cpu.fpu.xmm[xmm(i.op0_register())];
    *to = *to & LOW_HALF | value << 64;
    Ok(())
}

/// MOVD, MOVQ and MOVNTQ: between the low bits of a vector register and anything.
pub(super) fn low_bits(x: &mut Ctx, i: &Instruction) -> Exec {
    let is_mm = |n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm();
    if is_mm(0) || is_mm(1) {
        x.need_mmx()?;
    } else {
        x.need_sse()?;
    }
    let is_vector = |r: Register| r.is_mm() || r.is_xmm();
    let value = match i.op1_kind() {
        OpKind::Register if is_vector(i.op1_register()) => source(x, i, 1)? as u64,
        _ => x.operand(i, 1)?,
    };
    match i.op0_kind() {
        OpKind::Register if is_mm(0) => {
            x.cpu.fpu.enter_mmx();
            x.cpu.fpu.set_mm(mm(i.op0_register()), value);
            return Ok(());
        }
        OpKind::Register if is_vector(i.op0_register()) => {
            x.cpu.fpu.xmm[xmm(i.op0_register())] = value.into();
        }
        _ => x.set_operand(i, 0, value)?,
    }
    if is_mm(1) {
        x.cpu.fpu.enter_mmx();
    }
    Ok(())
}

/// MOVQ2DQ and MOVDQ2Q.
pub(super) fn between(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    x.need_mmx()?;
    let value = source(x, i, 1)? as u64;
    x.cpu.fpu.enter_mmx();
    let to = i.op0_register();
    if to.is_mm() {
        x.cpu.fpu.set_mm(mm(to), value);
    } else {
        x.cpu.fpu.xmm[xmm(to)] = value.into();
    }
    Ok(())
}

/// MOVDDUP, MOVSLDUP, MOVSHDUP.
pub(super) fn duplicate(x: &mut Ctx, i: &Instruction, f: impl Fn(Vector) -> Vector) -> Exec {
    x.need_sse()?;
    let value = source(x, i, 1)?;
    x.cpu.fpu.xmm[xmm(i.op0_register())] = f(value);
    Ok(())
}

/// MASKMOVQ and MASKMOVDQU: stores the bytes whose mask byte has its top bit set.
pub(super) fn masked(x: &mut Ctx, i: &Instruction) -> Exec {
    let from_mm = i.op1_register().is_mm();
    if from_mm {
        x.need_mmx()?;
    } else {
        x.need_sse()?;
    }
    let bytes = (source(x, i, 1)?).to_le_bytes();
    let chosen = sign_mask(source(x, i, 2)?, 8);
    let count = if from_mm { 8 } else { 16 };
    let seg = x.segment(i);
    let wrap = size_mask(match i.op0_kind() {
        OpKind::MemorySegRDI => 8,
        OpKind::MemorySegEDI => 4,
        OpKind::MemorySegDI => 2,
        _ => address_size(i),
    });
    let base = x.cpu.gpr[reg::RDI];
    // All bytes are known to be writable before the first is written.
    for pass in 0..2 {
        for (n, byte) in bytes.iter().enumerate().take(count) {
            if chosen >> n & 1 == 0 {
                continue;
            }
            let linear = x.linear(seg, base.wrapping_add(n as u64) & wrap, 1, Access::Write)?;
            if pass == 0 {
                x.probe_write(linear, 1)?;
            } else {
                x.store(linear, [*byte])?;
            }
        }
    }
    if from_mm {
        x.cpu.fpu.enter_mmx();
    }
    Ok(())
}

/// MOVMSKPS, MOVMSKPD, PMOVMSKB.
pub(super) fn mask(x: &mut Ctx, i: &Instruction, lane_bits: u32) -> Exec {
    let from_mm = i.op1_register().is_mm();
    if from_mm {
        x.need_mmx()?;
        x.cpu.fpu.enter_mmx();
    } else {
        x.need_sse()?;
    }
    let signs = sign_mask(source(x, i, 1)?, lane_bits);
    x.cpu.set_reg(i.op0_register(), signs);
    Ok(())
}

/// PEXTRW from a register to a general register. (The form with a memory destination is SSE4.1.)
pub(super) fn extract_word(x: &mut Ctx, i: &Instruction) -> Exec {
    let from = i.op1_register();
    let lanes = match i.code() {
        Code::Pextrw_r32_mm_imm8 | Code::Pextrw_r64_mm_imm8 => {
            x.need_mmx()?;
            x.cpu.fpu.enter_mmx();
            u16::split(x.cpu.fpu.mm(mm(from)).into())
        }
        Code::Pextrw_r32_xmm_imm8 | Code::Pextrw_r64_xmm_imm8 => {
            x.need_sse()?;
            u16::split(x.cpu.fpu.xmm[xmm(from)])
        }
        _ => return Err(Trap::Unimplemented("SSE4.1")),
    };
    let count = if from.is_mm() { 4 } else { 8 };
    let lane = lanes[i.immediate8() as usize & (count - 1)];
    x.cpu.set_reg(i.op0_register(), lane.into());
    Ok(())
}

/// PINSRW.
pub(super) fn insert_word(x: &mut Ctx, i: &Instruction) -> Exec {
    let to = i.op0_register();
    if to.is_mm() {
        x.need_mmx()?;
    } else {
        x.need_sse()?;
    }
    let value = x.operand(i, 1)? as u16;
    if to.is_mm() {
        let mut lanes = u16::split(x.cpu.fpu.mm(mm(to)).into());
        lanes[i.immediate8() as usize & 3] = value;
        x.cpu.fpu.enter_mmx();
        x.cpu.fpu.set_mm(mm(to), u16::join(lanes) as u64);
    } else {
        let to = &mut x.cpu.fpu.xmm[xmm(to)];
        let mut lanes = u16::split(*to);
        lanes[i.immediate8() as usize & 7] = value;
        *to = u16::join(lanes);
    }
    Ok(())
}
