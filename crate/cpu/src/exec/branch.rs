//! Near jumps, calls and returns, conditions, loops, BOUND.
//!
//! The target is checked before anything changes (Vol. 2, JMP, CALL, RET: near forms).

use iced_x86::{Code, FlowControl, Instruction, MemorySize, Mnemonic, OpKind};

use super::alu::by_width;
use crate::flags::Width;
use crate::mem::Ctx;
use crate::operand::mask;
use crate::paging::Access;
use crate::trap::{Exec, Fault};
use crate::vcpu::reg::RCX;

/// Whether a JMP or CALL is a far one.
pub(super) fn is_far(i: &Instruction) -> bool {
    match i.op0_kind() {
        OpKind::FarBranch16 | OpKind::FarBranch32 => true,
        OpKind::Memory => matches!(
            i.memory_size(),
            MemorySize::SegPtr16 | MemorySize::SegPtr32 | MemorySize::SegPtr64
        ),
        _ => false,
    }
}

/// Whether the condition in the instruction's opcode holds.
pub(super) fn condition(x: &Ctx, i: &Instruction) -> bool {
    // ConditionCode counts from 1 in the order of the encoding; 0 is none.
    x.cpu
        .flags
        .condition((i.condition_code() as u8).wrapping_sub(1))
}

/// Whether `i` transfers control when it completes: a taken branch, as single-stepping on branches counts
/// them (Vol. 3B, "Single-Stepping on Branches"). Interrupts are none, nor are VM entries.
pub(crate) fn is_taken(x: &Ctx, i: &Instruction) -> bool {
    use FlowControl::*;
    match i.flow_control() {
        Call => !matches!(
            i.mnemonic(),
            Mnemonic::Vmlaunch | Mnemonic::Vmresume | Mnemonic::Vmcall | Mnemonic::Vmmcall
        ),
        UnconditionalBranch | IndirectBranch | Return | IndirectCall => true,
        ConditionalBranch => match i.mnemonic() {
            Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => loop_counter(x, i).1,
            Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => count_is_zero(x, i),
            _ => condition(x, i),
        },
        Next | Interrupt | Exception | XbeginXabortXend => false,
    }
}

/// Target and operand size of a near branch.
fn target(x: &mut Ctx, i: &Instruction) -> Exec<(u64, usize)> {
    Ok(match i.op0_kind() {
        OpKind::NearBranch16 => (i.near_branch_target(), 2),
        OpKind::NearBranch32 => (i.near_branch_target(), 4),
        OpKind::NearBranch64 => (i.near_branch_target(), 8),
        _ => (x.operand(i, 0)?, x.operand_size(i, 0)),
    })
}

/// JMP, near.
pub(super) fn jmp(x: &mut Ctx, i: &Instruction) -> Exec {
    let (target, size) = target(x, i)?;
    x.jump(target, size)
}

/// Jcc.
pub(super) fn conditional(x: &mut Ctx, i: &Instruction) -> Exec {
    if condition(x, i) { jmp(x, i) } else { Ok(()) }
}

/// CALL, near.
pub(super) fn call(x: &mut Ctx, i: &Instruction) -> Exec {
    let (target, size) = target(x, i)?;
    let back = x.cpu.rip;
    x.jump(target, size)?;
    // On a fault the caller restores RIP.
    x.push(size, back)
}

/// RET, near, with or without parameters to drop.
pub(super) fn ret(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = match i.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let target = x.peek_stack(0, size)?;
    x.jump(target, size)?;
    let parameters = if i.op_count() == 0 {
        0
    } else {
        i.immediate16()
    };
    x.drop_stack(size as u64 + u64::from(parameters));
    Ok(())
}

/// LOOP, LOOPE, LOOPNE.
pub(super) fn loop_(x: &mut Ctx, i: &Instruction) -> Exec {
    let ((width, count), taken) = loop_counter(x, i);
    if taken {
        jmp(x, i)?;
    }
    x.cpu.set_gpr(RCX, width, count);
    Ok(())
}

/// What a LOOP makes of its counter, whose width is the address size, and whether it jumps.
fn loop_counter(x: &Ctx, i: &Instruction) -> ((usize, u64), bool) {
    use Code::*;
    let width = match i.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX
        | Loopne_rel8_16_CX | Loopne_rel8_32_CX => 2,
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX
        | Loopne_rel8_16_RCX | Loopne_rel8_64_RCX => 8,
        _ => 4,
    };
    let count = x.cpu.gpr[RCX].wrapping_sub(1) & mask(width);
    let also = match i.mnemonic() {
        Mnemonic::Loope => x.cpu.flags.zf(),
        Mnemonic::Loopne => !x.cpu.flags.zf(),
        _ => true,
    };
    ((width, count), count != 0 && also)
}

/// JCXZ, JECXZ, JRCXZ.
pub(super) fn jump_if_count_zero(x: &mut Ctx, i: &Instruction) -> Exec {
    if count_is_zero(x, i) {
        jmp(x, i)?;
    }
    Ok(())
}

fn count_is_zero(x: &Ctx, i: &Instruction) -> bool {
    let width = match i.mnemonic() {
        Mnemonic::Jcxz => 2,
        Mnemonic::Jecxz => 4,
        _ => 8,
    };
    x.cpu.gpr[RCX] & mask(width) == 0
}

/// PAUSE: a spin-wait gives its turn to the vCPU it waits for.
pub(super) fn pause(x: &mut Ctx) -> Exec {
    if x.cpu.others_run {
        x.cpu.turn_over = true;
        x.cpu.touched_outside();
    }
    Ok(())
}

/// BOUND.
pub(super) fn bound(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = x.operand_size(i, 0);
    let index = x.operand(i, 0)?;
    let linear = x.memory(i, 2 * size as u64, Access::Read)?;
    let lower = x.load_sized(linear, size)?;
    let upper = x.load_sized(linear.wrapping_add(size as u64), size)?;
    let signed = |value: u64| by_width!(size, T => <T as Width>::sign_extend(value)) as i64;
    if (signed(lower)..=signed(upper)).contains(&signed(index)) {
        Ok(())
    } else {
        Err(Fault::BoundRange.into())
    }
}
