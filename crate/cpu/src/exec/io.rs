//! IN, OUT, INS, OUTS (Vol. 1, "Input/Output").

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::string::Shape;
use crate::debug;
use crate::flags::bit;
use crate::mem::Ctx;
use crate::operand::{mask, segment_of};
use crate::paging::Access;
use crate::trap::{Exec, GP0};
use crate::vcpu::{Seg, reg, rights};

/// Offset in the TSS of the pointer to the I/O permission bitmap.
const BITMAP_POINTER: u64 = 0x66;

/// #GP(0) unless the current level may use `size` bytes at `port` (Vol. 1, "I/O Permission Bit
/// Map").
pub(crate) fn permit(x: &mut Ctx, port: u16, size: usize) -> Exec {
    let rflags = x.cpu.flags.rest;
    let iopl = (rflags & bit::IOPL) >> 12;
    // A program in virtual-8086 mode has the bitmap alone.
    let free = !x.cpu.protected() || !x.cpu.v86() && u64::from(x.cpu.cpl) <= iopl;
    if free {
        return Ok(());
    }
    let tr = *x.cpu.seg(Seg::Tr);
    let limit = u64::from(tr.limit);
    // A 16-bit TSS has no bitmap.
    let usable = tr.rights & rights::UNUSABLE == 0 && tr.rights & 8 != 0;
    if !usable || limit < BITMAP_POINTER + 1 {
        return Err(GP0);
    }
    let wrap = if x.cpu.long_mode() { !0 } else { 0xffff_ffff };
    let pointer = x.load_system(tr.base.wrapping_add(BITMAP_POINTER) & wrap)?;
    let at = u64::from(u16::from_le_bytes(pointer)) + u64::from(port / 8);
    // Two bytes are always read, so both must be there.
    if at + 1 > limit {
        return Err(GP0);
    }
    let bits = u16::from_le_bytes(x.load_system(tr.base.wrapping_add(at) & wrap)?);
    let wanted = (1u16 << size) - 1;
    if bits >> (port & 7) & wanted == 0 {
        Ok(())
    } else {
        Err(GP0)
    }
}

fn read_port(x: &mut Ctx, port: u16, size: usize) -> u64 {
    debug::match_io_breakpoints(x.cpu, port, size as u64);
    let value = x.bus.port_read(x.ram, x.now, port, size as u8);
    x.cpu.touched_outside();
    u64::from(value) & mask(size)
}

fn write_port(x: &mut Ctx, port: u16, size: usize, value: u64) {
    debug::match_io_breakpoints(x.cpu, port, size as u64);
    let value = (value & mask(size)) as u32;
    x.bus.port_write(x.ram, x.now, port, size as u8, value);
    x.cpu.touched_outside();
}

/// Port in DX or in an immediate byte.
fn port(x: &Ctx, i: &Instruction, n: u32) -> u16 {
    match i.op_kind(n) {
        OpKind::Register => x.cpu.gpr[reg::RDX] as u16,
        _ => u16::from(i.immediate8()),
    }
}

/// IN.
pub(super) fn input(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = i.op0_register().size();
    let port = port(x, i, 1);
    permit(x, port, size)?;
    let value = read_port(x, port, size);
    x.cpu.set_reg(i.op0_register(), value);
    Ok(())
}

/// OUT.
pub(super) fn output(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = i.op1_register().size();
    let port = port(x, i, 0);
    permit(x, port, size)?;
    let value = x.cpu.reg(i.op1_register());
    write_port(x, port, size, value);
    Ok(())
}

/// INS and OUTS: one element. With REP, RIP stays at the instruction until the count is zero.
pub(super) fn string(x: &mut Ctx, i: &Instruction) -> Exec {
    let shape = Shape::of(i);
    let width = mask(shape.address);
    let repeat = i.has_rep_prefix() || i.has_repne_prefix();
    let count = x.cpu.gpr[reg::RCX] & width;
    if repeat && count == 0 {
        return Ok(());
    }
    let port = x.cpu.gpr[reg::RDX] as u16;
    let size = shape.element;
    permit(x, port, size)?;
    let input = matches!(
        i.mnemonic(),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd
    );
    let pointer = if input { reg::RDI } else { reg::RSI };
    let offset = x.cpu.gpr[pointer] & width;
    if input {
        let linear = x.linear(Seg::Es, offset, size as u64, Access::Write)?;
        x.probe_write(linear, size as u64)?;
        let value = read_port(x, port, size);
        x.store_sized(linear, size, value)?;
    } else {
        let seg = segment_of(i.memory_segment());
        let linear = x.linear(seg, offset, size as u64, Access::Read)?;
        let value = x.load_sized(linear, size)?;
        write_port(x, port, size, value);
    }
    let step = if x.cpu.flags.df() {
        (size as u64).wrapping_neg()
    } else {
        size as u64
    };
    x.cpu
        .set_gpr(pointer, shape.address, offset.wrapping_add(step));
    if repeat {
        x.cpu.set_gpr(reg::RCX, shape.address, count - 1);
        if count > 1 {
            x.cpu.rip = i.ip();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CODE, Fixture, TSS};

    const IN_AL: [u8; 2] = [0xe4, 0x61];

    #[test]
    fn ports_are_read_and_written_at_their_width() {
        let mut f = Fixture::long();
        f.cpu.gpr[0] = u64::MAX;
        f.execute(&IN_AL).unwrap();
        assert_eq!(f.cpu.gpr[0], 0xffff_ffff_ffff_ff61);
        f.cpu.gpr[reg::RDX] = 0x1234;
        f.execute(&[0xed]).unwrap(); // IN EAX, DX
        assert_eq!(f.cpu.gpr[0], 0x1234_1234);
        f.execute(&[0x66, 0xef]).unwrap(); // OUT DX, AX
        assert_eq!(f.bus.written, [(0x1234, 2, 0x1234)]);
        assert!(f.cpu.leave_block);
    }

    #[test]
    fn user_code_needs_iopl_or_the_bitmap() {
        let mut f = Fixture::long();
        f.enter(3);
        f.poke(TSS + 0x66, 0x68);
        assert_eq!(f.execute(&IN_AL), Err(GP0)); // the bitmap lies beyond the TSS
        f.cpu.seg_mut(Seg::Tr).limit = 0x68 + 0x20;
        f.execute(&IN_AL).unwrap();
        f.poke(TSS + 0x68 + 12, 1 << 2); // port 0x62
        f.execute(&IN_AL).unwrap();
        assert_eq!(f.execute(&[0x66, 0xe5, 0x61]), Err(GP0)); // 0x61 and 0x62
        f.cpu.set_rflags(bit::FIXED | bit::IOPL);
        f.execute(&[0x66, 0xe5, 0x61]).unwrap();
    }

    #[test]
    fn rep_outs_stays_at_itself_until_the_count_is_zero() {
        let mut f = Fixture::long();
        f.poke(0x9000, 0x0403_0201);
        f.cpu.gpr[reg::RSI] = 0x9000;
        f.cpu.gpr[reg::RCX] = 2;
        f.cpu.gpr[reg::RDX] = 0x80;
        f.execute(&[0xf3, 0x6e]).unwrap();
        assert_eq!((f.cpu.rip, f.cpu.gpr[reg::RCX]), (CODE, 1));
        f.execute(&[0xf3, 0x6e]).unwrap();
        assert_eq!((f.cpu.rip, f.cpu.gpr[reg::RCX]), (CODE + 2, 0));
        assert_eq!(f.bus.written, [(0x80, 1, 1), (0x80, 1, 2)]);
        assert_eq!(f.cpu.gpr[reg::RSI], 0x9002);
    }

    #[test]
    fn ins_that_cannot_store_reads_no_port() {
        let mut f = Fixture::long();
        f.cpu.gpr[reg::RDI] = 0x40_0000; // not mapped
        f.cpu.leave_block = false;
        assert!(f.execute(&[0x6c]).is_err());
        assert!(!f.cpu.leave_block);
    }
}
