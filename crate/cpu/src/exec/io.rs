//! IN, OUT, INS, OUTS (Vol. 1, "Input/Output").

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::string::Shape;
use crate::flags::bit;
use crate::mem::Ctx;
use crate::operand::{mask, segment_of};
use crate::paging::Access;
use crate::trap::{Exec, GP0};
use crate::vcpu::{Seg, reg, rights};

/// Checks IOPL and, where that is not enough, the I/O permission bitmap of the TSS
/// (Vol. 1, "I/O Permission Bit Map").
fn check_port(x: &mut Ctx, port: u16, width: usize) -> Exec {
    let virtual_8086 = x.cpu.flags.rest & bit::VM != 0;
    let iopl = (x.cpu.flags.rest & bit::IOPL) >> 12;
    if !x.cpu.protected() || !virtual_8086 && u64::from(x.cpu.cpl) <= iopl {
        return Ok(());
    }
    let tr = *x.cpu.seg(Seg::Tr);
    // Only a 32-bit (or 64-bit) TSS has a bitmap.
    if tr.rights & rights::UNUSABLE != 0 || tr.rights & rights::TYPE < 9 || tr.limit < 103 {
        return Err(GP0);
    }
    let map = u64::from(u16::from_le_bytes(
        x.load_system(tr.base.wrapping_add(102))?,
    ));
    let at = map + u64::from(port) / 8;
    // Two bytes are read whatever the width, so both must be inside the limit.
    if at + 1 > u64::from(tr.limit) {
        return Err(GP0);
    }
    let bits = u16::from_le_bytes(x.load_system(tr.base.wrapping_add(at))?);
    if bits >> (port & 7) & ((1 << width) - 1) != 0 {
        return Err(GP0);
    }
    Ok(())
}

fn read(x: &mut Ctx, port: u16, width: usize) -> u64 {
    x.cpu.touched_outside();
    u64::from(x.bus.port_read(x.ram, x.now, port, width as u8)) & mask(width)
}

fn write(x: &mut Ctx, port: u16, width: usize, value: u64) {
    x.cpu.touched_outside();
    x.bus.port_write(
        x.ram,
        x.now,
        port,
        width as u8,
        (value & mask(width)) as u32,
    );
}

fn port(x: &Ctx, i: &Instruction, n: u32) -> u16 {
    if i.op_kind(n) == OpKind::Register {
        x.cpu.gpr[reg::RDX] as u16
    } else {
        i.immediate(n) as u16
    }
}

/// IN.
pub(super) fn input(x: &mut Ctx, i: &Instruction) -> Exec {
    let (port, to) = (port(x, i, 1), i.op_register(0));
    check_port(x, port, to.size())?;
    let value = read(x, port, to.size());
    x.cpu.set_reg(to, value);
    Ok(())
}

/// OUT.
pub(super) fn output(x: &mut Ctx, i: &Instruction) -> Exec {
    let (port, from) = (port(x, i, 0), i.op_register(1));
    check_port(x, port, from.size())?;
    let value = x.cpu.reg(from);
    write(x, port, from.size(), value);
    Ok(())
}

/// INS and OUTS, one iteration. With a repeat prefix RIP stays here until the count is zero.
pub(super) fn string(x: &mut Ctx, i: &Instruction) -> Exec {
    let shape = Shape::of(i);
    let repeats = i.has_rep_prefix() || i.has_repne_prefix();
    let count = x.cpu.gpr[reg::RCX] & mask(shape.address);
    if repeats && count == 0 {
        return Ok(());
    }
    let width = shape.element;
    let port = x.cpu.gpr[reg::RDX] as u16;
    check_port(x, port, width)?;
    let index = if is_input(i) { reg::RDI } else { reg::RSI };
    let offset = x.cpu.gpr[index] & mask(shape.address);
    if is_input(i) {
        // Memory is checked first: a device must not see a read whose value is lost to a fault.
        let linear = x.linear(Seg::Es, offset, width as u64, Access::Write)?;
        x.probe_write(linear, width as u64)?;
        let value = read(x, port, width);
        x.store_sized(linear, width, value)?;
    } else {
        let seg = segment_of(i.memory_segment());
        let linear = x.linear(seg, offset, width as u64, Access::Read)?;
        let value = x.load_sized(linear, width)?;
        write(x, port, width, value);
    }
    let step = if x.cpu.flags.df() {
        (width as u64).wrapping_neg()
    } else {
        width as u64
    };
    let moved = x.cpu.gpr[index].wrapping_add(step);
    x.cpu.set_gpr(index, shape.address, moved);
    if repeats {
        x.cpu.set_gpr(reg::RCX, shape.address, count - 1);
        if count > 1 {
            x.cpu.rip = i.ip();
        }
    }
    Ok(())
}

fn is_input(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd
    )
}
