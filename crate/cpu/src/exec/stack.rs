//! PUSH and POP in all forms, flag images on the stack, stack frames.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::flags::bit;
use crate::mem::Ctx;
use crate::operand::{Place, mask, segment_of};
use crate::paging::Access;
use crate::trap::Exec;
use crate::v86;
use crate::vcpu::{Seg, reg};

/// PUSH of a register, immediate, memory operand or segment register (zero-extended, as
/// Vol. 2B, PUSH, "IA-32 Architecture Compatibility" allows).
pub(super) fn push(x: &mut Ctx, i: &Instruction) -> Exec {
    let value = if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() {
        u64::from(x.cpu.seg(segment_of(i.op0_register())).selector)
    } else {
        x.operand(i, 0)?
    };
    x.push((-i.stack_pointer_increment()) as usize, value)
}

/// POP to a general register or memory. An address that uses RSP sees it already incremented.
pub(super) fn pop(x: &mut Ctx, i: &Instruction) -> Exec {
    let before = x.cpu.gpr[reg::RSP];
    let value = x.pop(x.operand_size(i, 0))?;
    x.set_operand(i, 0, value)
        .inspect_err(|_| x.cpu.gpr[reg::RSP] = before)
}

fn all_size(i: &Instruction) -> usize {
    match i.mnemonic() {
        Mnemonic::Pusha | Mnemonic::Popa => 2,
        _ => 4,
    }
}

/// PUSHA and PUSHAD. What was stored before a fault stays: doing it again stores the same.
pub(super) fn push_all(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = all_size(i);
    let width = x.stack_width();
    let mut top = x.cpu.gpr[reg::RSP];
    for n in 0..8 {
        top = top.wrapping_sub(size as u64) & mask(width);
        let linear = x.linear(Seg::Ss, top, size as u64, Access::Write)?;
        x.store_sized(linear, size, x.cpu.gpr[n])?;
    }
    x.cpu.set_gpr(reg::RSP, width, top);
    Ok(())
}

/// POPA and POPAD. The stack pointer's own image is skipped. Registers loaded before a fault
/// keep their values: the stack pointer has not moved, so that doing it again loads the same.
pub(super) fn pop_all(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = all_size(i);
    for n in (0..8).rev() {
        let value = x.peek_stack(((7 - n) * size) as u64, size)?;
        if n != reg::RSP {
            x.cpu.set_gpr(n, size, value);
        }
    }
    x.drop_stack(8 * size as u64);
    Ok(())
}

fn flags_size(i: &Instruction) -> usize {
    match i.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Popf => 2,
        Mnemonic::Pushfd | Mnemonic::Popfd => 4,
        _ => 8,
    }
}

fn iopl(rflags: u64) -> u64 {
    (rflags & bit::IOPL) >> 12
}

/// PUSHF, PUSHFD, PUSHFQ.
pub(super) fn pushf(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = flags_size(i);
    let rflags = if v86::flags_are_virtual(x, size)? {
        v86::shown_flags(x)
    } else {
        x.cpu.flags.get()
    };
    x.push(size, rflags & !(bit::VM | bit::RF))
}

/// POPF, POPFD, POPFQ. IOPL changes only at CPL 0, IF only where CPL is within IOPL; VM, VIF
/// and VIP never.
pub(super) fn popf(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = flags_size(i);
    if v86::flags_are_virtual(x, size)? {
        let popped = x.peek_stack(0, size)?;
        let taken = v86::taken_flags(x, popped)?;
        x.drop_stack(size as u64);
        x.cpu.set_rflags(taken & !bit::RF);
        return Ok(());
    }
    let old = x.cpu.flags.get();
    let popped = x.pop(size)?;
    let mut changes = bit::ARITHMETIC | bit::TF | bit::DF | bit::NT | bit::AC | bit::ID;
    if x.cpu.cpl == 0 {
        changes |= bit::IOPL;
    }
    if u64::from(x.cpu.cpl) <= iopl(old) {
        changes |= bit::IF;
    }
    changes &= mask(size);
    x.cpu
        .set_rflags((old & !changes | popped & changes) & !bit::RF);
    Ok(())
}

/// ENTER.
pub(super) fn enter(x: &mut Ctx, i: &Instruction) -> Exec {
    let (sp, bp) = (x.cpu.gpr[reg::RSP], x.cpu.gpr[reg::RBP]);
    make_frame(x, i).inspect_err(|_| {
        x.cpu.gpr[reg::RSP] = sp;
        x.cpu.gpr[reg::RBP] = bp;
    })
}

fn make_frame(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = match i.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let width = x.stack_width();
    let level = i.immediate8_2nd() & 31;
    let mut outer = x.cpu.gpr[reg::RBP];
    x.push(size, outer)?;
    let frame = x.cpu.gpr[reg::RSP];
    for _ in 1..level {
        outer = outer.wrapping_sub(size as u64);
        let linear = x.linear(Seg::Ss, outer & mask(width), size as u64, Access::Read)?;
        let display = x.load_sized(linear, size)?;
        x.push(size, display)?;
    }
    if level > 0 {
        x.push(size, frame)?;
    }
    let top = x.cpu.gpr[reg::RSP].wrapping_sub(u64::from(i.immediate16())) & mask(width);
    // "A write using the final value of the stack pointer" must be possible.
    let linear = x.linear(Seg::Ss, top, size as u64, Access::Write)?;
    x.probe_write(linear, size as u64)?;
    x.cpu.set_gpr(reg::RBP, size, frame);
    x.cpu.set_gpr(reg::RSP, width, top);
    Ok(())
}

/// LEAVE.
pub(super) fn leave(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = match i.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let width = x.stack_width();
    let frame = x.cpu.gpr[reg::RBP] & mask(width);
    let linear = x.linear(Seg::Ss, frame, size as u64, Access::Read)?;
    let outer = x.get(Place::Memory { linear, size })?;
    x.cpu
        .set_gpr(reg::RSP, width, frame.wrapping_add(size as u64));
    x.cpu.set_gpr(reg::RBP, size, outer);
    Ok(())
}
