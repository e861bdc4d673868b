//! Addition, subtraction, logic, comparison, and the decimal adjustments.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::flags::{Flags, bit};
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::{Exec, Fault};
use crate::vcpu::reg::RAX;

/// Evaluates `$body` with the type `$width` standing for an operand of `$size` bytes.
macro_rules! by_width {
    ($size:expr, $width:ident => $body:expr) => {
        match $size {
            1 => {
                type $width = u8;
                $body
            }
            2 => {
                type $width = u16;
                $body
            }
            4 => {
                type $width = u32;
                $body
            }
            _ => {
                type $width = u64;
                $body
            }
        }
    };
}
pub(super) use by_width;

/// What an operation makes of its two operands, the flags included.
type Binary = fn(&mut Flags, u64, u64, usize) -> u64;

fn add(flags: &mut Flags, a: u64, b: u64, size: usize) -> u64 {
    let result = a.wrapping_add(b);
    by_width!(size, T => flags.add::<T>(a, b, result));
    result
}

fn add_with_carry(flags: &mut Flags, a: u64, b: u64, size: usize) -> u64 {
    let result = a.wrapping_add(b).wrapping_add(u64::from(flags.cf()));
    by_width!(size, T => flags.add::<T>(a, b, result));
    result
}

fn subtract(flags: &mut Flags, a: u64, b: u64, size: usize) -> u64 {
    let result = a.wrapping_sub(b);
    by_width!(size, T => flags.sub::<T>(a, b, result));
    result
}

fn subtract_with_borrow(flags: &mut Flags, a: u64, b: u64, size: usize) -> u64 {
    let result = a.wrapping_sub(b).wrapping_sub(u64::from(flags.cf()));
    by_width!(size, T => flags.sub::<T>(a, b, result));
    result
}

fn logic(flags: &mut Flags, result: u64, size: usize) -> u64 {
    by_width!(size, T => flags.logic::<T>(result));
    result
}

/// Sets the flags of a comparison.
pub(super) fn compare(flags: &mut Flags, a: u64, b: u64, size: usize) {
    subtract(flags, a, b, size);
}

/// ADD, ADC, SUB, SBB, AND, OR, XOR: operand 0 becomes a function of both.
pub(super) fn binary(x: &mut Ctx, i: &Instruction) -> Exec {
    let operation: Binary = match i.mnemonic() {
        Mnemonic::Add => add,
        Mnemonic::Adc => add_with_carry,
        Mnemonic::Sub => subtract,
        Mnemonic::Sbb => subtract_with_borrow,
        Mnemonic::And => |flags, a, b, size| logic(flags, a & b, size),
        Mnemonic::Or => |flags, a, b, size| logic(flags, a | b, size),
        _ => |flags, a, b, size| logic(flags, a ^ b, size),
    };
    let place = x.place(i, 0, Access::Write)?;
    let b = x.operand(i, 1)?;
    let a = x.get(place)?;
    let size = x.operand_size(i, 0);
    let result = operation(&mut x.cpu.flags, a, b, size);
    x.put(place, result)
}

/// CMP.
pub(super) fn cmp(x: &mut Ctx, i: &Instruction) -> Exec {
    let (a, b) = (x.operand(i, 0)?, x.operand(i, 1)?);
    let size = x.operand_size(i, 0);
    compare(&mut x.cpu.flags, a, b, size);
    Ok(())
}

/// TEST.
pub(super) fn test(x: &mut Ctx, i: &Instruction) -> Exec {
    let (a, b) = (x.operand(i, 0)?, x.operand(i, 1)?);
    let size = x.operand_size(i, 0);
    logic(&mut x.cpu.flags, a & b, size);
    Ok(())
}

/// INC, DEC, NEG, NOT.
pub(super) fn unary(x: &mut Ctx, i: &Instruction) -> Exec {
    let place = x.place(i, 0, Access::Write)?;
    let before = x.get(place)?;
    let size = x.operand_size(i, 0);
    let flags = &mut x.cpu.flags;
    let result = match i.mnemonic() {
        Mnemonic::Inc => {
            let result = before.wrapping_add(1);
            by_width!(size, T => flags.inc::<T>(before, result));
            result
        }
        Mnemonic::Dec => {
            let result = before.wrapping_sub(1);
            by_width!(size, T => flags.dec::<T>(before, result));
            result
        }
        Mnemonic::Neg => subtract(flags, 0, before, size),
        _ => !before,
    };
    x.put(place, result)
}

/// ADCX and ADOX: addition with carry through CF or OF alone.
pub(super) fn add_one_flag(x: &mut Ctx, i: &Instruction) -> Exec {
    let flag = if i.mnemonic() == Mnemonic::Adcx {
        bit::CF
    } else {
        bit::OF
    };
    let (a, b) = (x.operand(i, 0)?, x.operand(i, 1)?);
    let carry = u64::from(x.cpu.flags.arithmetic() & flag != 0);
    let (sum, carried) = if x.operand_size(i, 0) == 8 {
        let wide = u128::from(a) + u128::from(b) + u128::from(carry);
        (wide as u64, wide >> 64 != 0)
    } else {
        let wide = a + b + carry;
        (wide, wide >> 32 != 0)
    };
    x.cpu.flags.update(flag, if carried { flag } else { 0 });
    x.set_operand(i, 0, sum)
}

/// XADD: the sum goes to the destination, its old value to the source.
pub(super) fn xadd(x: &mut Ctx, i: &Instruction) -> Exec {
    let place = x.place(i, 0, Access::Write)?;
    let a = x.get(place)?;
    let b = x.operand(i, 1)?;
    let size = x.operand_size(i, 0);
    let sum = add(&mut x.cpu.flags, a, b, size);
    x.set_operand(i, 1, a)?;
    x.put(place, sum)
}

/// CMPXCHG.
pub(super) fn cmpxchg(x: &mut Ctx, i: &Instruction) -> Exec {
    let place = x.place(i, 0, Access::Write)?;
    let old = x.get(place)?;
    let new = x.operand(i, 1)?;
    let size = x.operand_size(i, 0);
    let accumulator = x.cpu.gpr[RAX] & crate::operand::mask(size);
    compare(&mut x.cpu.flags, accumulator, old, size);
    if accumulator == old {
        return x.put(place, new);
    }
    // The destination is written in either case.
    if i.op0_kind() != OpKind::Register {
        x.put(place, old)?;
    }
    x.cpu.set_gpr(RAX, size, old);
    Ok(())
}

/// CMPXCHG8B and CMPXCHG16B.
pub(super) fn cmpxchg_pair(x: &mut Ctx, i: &Instruction) -> Exec {
    use crate::vcpu::reg::{RBX, RCX, RDX};
    let size = i.memory_size().size() / 2;
    let linear = x.memory(i, 2 * size as u64, Access::Write)?;
    if size == 8 && linear & 15 != 0 {
        return Err(Fault::GeneralProtection(0).into());
    }
    x.probe_write(linear, 2 * size as u64)?;
    let half = 8 * size as u32;
    let pair = |high: u64, low: u64| {
        let mask = crate::operand::mask(size);
        u128::from(high & mask) << half | u128::from(low & mask)
    };
    let old = if size == 8 {
        u128::from_le_bytes(x.load(linear)?)
    } else {
        u128::from(u64::from_le_bytes(x.load(linear)?))
    };
    let gpr = &x.cpu.gpr;
    let expected = pair(gpr[RDX], gpr[RAX]);
    let equal = old == expected;
    let new = if equal { pair(gpr[RCX], gpr[RBX]) } else { old };
    if size == 8 {
        x.store(linear, new.to_le_bytes())?;
    } else {
        x.store(linear, (new as u64).to_le_bytes())?;
    }
    if !equal {
        x.cpu.set_gpr(RAX, size, old as u64);
        x.cpu.set_gpr(RDX, size, (old >> half) as u64);
    }
    let zf = if equal { bit::ZF } else { 0 };
    x.cpu.flags.update(bit::ZF, zf);
    Ok(())
}

// ---- decimal adjustment; 16- and 32-bit modes only ----

fn set_ax(x: &mut Ctx, ax: u16) {
    x.cpu.set_gpr(RAX, 2, u64::from(ax));
}

/// DAA and DAS.
pub(super) fn decimal_adjust(x: &mut Ctx, i: &Instruction) -> Exec {
    let al = x.cpu.gpr[RAX] as u8;
    let flags = &mut x.cpu.flags;
    let (half, full) = (flags.af() || al & 15 > 9, flags.cf() || al > 0x99);
    let correction = if half { 6 } else { 0 } | if full { 0x60 } else { 0 };
    let subtracts = i.mnemonic() == Mnemonic::Das;
    let result = if subtracts {
        al.wrapping_sub(correction)
    } else {
        al.wrapping_add(correction)
    };
    // A borrow out of the low digit's correction counts even where the high digit needs none.
    let borrow = subtracts && half && al < 6;
    flags.logic::<u8>(u64::from(result));
    let carries = if full || borrow { bit::CF } else { 0 } | if half { bit::AF } else { 0 };
    flags.update(bit::CF | bit::AF, carries);
    x.cpu.set_gpr(RAX, 1, u64::from(result));
    Ok(())
}

/// AAA and AAS.
pub(super) fn ascii_adjust(x: &mut Ctx, i: &Instruction) -> Exec {
    let ax = x.cpu.gpr[RAX] as u16;
    let adjust = x.cpu.flags.af() || ax & 15 > 9;
    let adjusted = match (adjust, i.mnemonic()) {
        (false, _) => ax,
        (true, Mnemonic::Aaa) => ax.wrapping_add(0x106),
        (true, _) => ax.wrapping_sub(0x106),
    } & 0xff0f;
    set_ax(x, adjusted);
    let flags = &mut x.cpu.flags;
    flags.logic::<u8>(u64::from(adjusted & 0xff));
    flags.update(
        bit::CF | bit::AF,
        if adjust { bit::CF | bit::AF } else { 0 },
    );
    Ok(())
}

/// AAM: AL into two digits of the base given.
pub(super) fn aam(x: &mut Ctx, i: &Instruction) -> Exec {
    let base = i.immediate8();
    if base == 0 {
        return Err(Fault::Divide.into());
    }
    let al = x.cpu.gpr[RAX] as u8;
    set_ax(x, u16::from(al / base) << 8 | u16::from(al % base));
    x.cpu.flags.logic::<u8>(u64::from(al % base));
    Ok(())
}

/// AAD: two digits of the base given into AL.
pub(super) fn aad(x: &mut Ctx, i: &Instruction) -> Exec {
    let [al, ah] = (x.cpu.gpr[RAX] as u16).to_le_bytes();
    let result = ah.wrapping_mul(i.immediate8()).wrapping_add(al);
    set_ax(x, u16::from(result));
    x.cpu.flags.logic::<u8>(u64::from(result));
    Ok(())
}
