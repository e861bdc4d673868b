//! Shifts and rotates.

use iced_x86::{Instruction, Mnemonic};

use super::alu::by_width;
use crate::flags::bit;
use crate::mem::Ctx;
use crate::operand::mask;
use crate::paging::Access;
use crate::trap::Exec;

/// A count as the processor takes it: modulo 64 for 64-bit operands, else modulo 32.
fn masked(count: u64, size: usize) -> u32 {
    (count & if size == 8 { 63 } else { 31 }) as u32
}

fn bit_of(value: u64, n: u32) -> bool {
    value >> n & 1 != 0
}

/// CF and OF as RFLAGS bits.
fn carry_overflow(cf: bool, of: bool) -> u64 {
    u64::from(cf) | if of { bit::OF } else { 0 }
}

/// SHL, SHR, SAR. Counts beyond the operand (8- and 16-bit) shift everything out.
pub(super) fn shift(x: &mut Ctx, i: &Instruction) -> Exec {
    let place = x.place(i, 0, Access::Write)?;
    let size = x.operand_size(i, 0);
    let count = masked(x.operand(i, 1)?, size);
    let value = x.get(place)?;
    if count == 0 {
        return x.put(place, value);
    }
    let top = 8 * size as u32 - 1;
    // Shifted by one less first: what is then at the edge goes to CF.
    let (result, cf, of) = match i.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => {
            let before = value << (count - 1);
            let result = before << 1;
            let cf = bit_of(before, top);
            (result, cf, cf ^ bit_of(result, top))
        }
        Mnemonic::Shr => {
            let before = value >> (count - 1);
            (before >> 1, bit_of(before, 0), bit_of(before, top))
        }
        _ => {
            let signed =
                by_width!(size, T => <T as crate::flags::Width>::sign_extend(value)) as i64;
            let before = signed >> (count - 1);
            ((before >> 1) as u64, before & 1 != 0, false)
        }
    };
    by_width!(size, T => x.cpu.flags.shift::<T>(result, cf, of));
    x.put(place, result)
}

/// ROL and ROR. Only CF and OF change, and none when the masked count is zero.
pub(super) fn rotate(x: &mut Ctx, i: &Instruction) -> Exec {
    let place = x.place(i, 0, Access::Write)?;
    let size = x.operand_size(i, 0);
    let count = masked(x.operand(i, 1)?, size);
    let value = x.get(place)?;
    if count == 0 {
        return x.put(place, value);
    }
    let bits = 8 * size as u32;
    let left = i.mnemonic() == Mnemonic::Rol;
    let left_by = if left { count } else { bits - count % bits } % bits;
    let wide = u128::from(value);
    let result = (wide << left_by | wide >> (bits - left_by)) as u64 & mask(size);
    let top = bits - 1;
    let (high, next, low) = (
        bit_of(result, top),
        bit_of(result, top - 1),
        bit_of(result, 0),
    );
    let image = if left {
        carry_overflow(low, low ^ high)
    } else {
        carry_overflow(high, high ^ next)
    };
    x.cpu.flags.update(bit::CF | bit::OF, image);
    x.put(place, result)
}

/// RCL and RCR: CF is one more bit of the value.
pub(super) fn rotate_through_carry(x: &mut Ctx, i: &Instruction) -> Exec {
    let place = x.place(i, 0, Access::Write)?;
    let size = x.operand_size(i, 0);
    let bits = 8 * size as u32;
    let count = masked(x.operand(i, 1)?, size) % (bits + 1);
    let value = x.get(place)?;
    if count == 0 {
        return x.put(place, value);
    }
    let left = i.mnemonic() == Mnemonic::Rcl;
    let wide = u128::from(x.cpu.flags.cf()) << bits | u128::from(value);
    let left_by = if left { count } else { bits + 1 - count };
    // Rotation of bits + 1 bits; left_by is between 1 and bits.
    let result = wide << left_by | wide >> (bits + 1 - left_by);
    let cf = result >> bits & 1 != 0;
    let result = result as u64 & mask(size);
    let (high, next) = (bit_of(result, bits - 1), bit_of(result, bits - 2));
    let of = if left { cf ^ high } else { high ^ next };
    x.cpu
        .flags
        .update(bit::CF | bit::OF, carry_overflow(cf, of));
    x.put(place, result)
}

/// SHLD and SHRD. For 16-bit operands and counts above 16 (undefined) the destination's bits
/// come round again, as processors do.
pub(super) fn double_shift(x: &mut Ctx, i: &Instruction) -> Exec {
    let place = x.place(i, 0, Access::Write)?;
    let size = x.operand_size(i, 0);
    let bits = 8 * size as u32;
    let count = masked(x.operand(i, 2)?, size);
    let value = x.get(place)?;
    if count == 0 {
        return x.put(place, value);
    }
    let fill = u128::from(x.operand(i, 1)?);
    let this = u128::from(value);
    let (result, cf) = if i.mnemonic() == Mnemonic::Shld {
        // destination : source (: destination), taken from the top
        let (wide, width) = if size == 2 {
            (this << 32 | fill << 16 | this, 48)
        } else {
            (this << bits | fill, 2 * bits)
        };
        let cf = wide >> (width - count) & 1 != 0;
        ((wide << count >> (width - bits)) as u64, cf)
    } else {
        let wide = if size == 2 {
            this << 32 | fill << 16 | this
        } else {
            fill << bits | this
        };
        ((wide >> count) as u64, wide >> (count - 1) & 1 != 0)
    };
    let of = bit_of(result ^ value, bits - 1);
    by_width!(size, T => x.cpu.flags.shift::<T>(result, cf, of));
    x.put(place, result)
}

/// SHLX, SHRX, SARX: no flags.
pub(super) fn shift_without_flags(x: &mut Ctx, i: &Instruction) -> Exec {
    super::bits::vex(x)?;
    let value = x.operand(i, 1)?;
    let size = x.operand_size(i, 0);
    let count = masked(x.operand(i, 2)?, size);
    let result = match i.mnemonic() {
        Mnemonic::Shlx => value << count,
        Mnemonic::Shrx => value >> count,
        _ if size == 8 => (value as i64 >> count) as u64,
        _ => (value as i32 >> count) as u64,
    };
    x.set_operand(i, 0, result)
}

/// RORX: no flags.
pub(super) fn rorx(x: &mut Ctx, i: &Instruction) -> Exec {
    super::bits::vex(x)?;
    let value = x.operand(i, 1)?;
    let count = x.operand(i, 2)? as u32;
    let result = if x.operand_size(i, 0) == 8 {
        value.rotate_right(count & 63)
    } else {
        u64::from((value as u32).rotate_right(count & 31))
    };
    x.set_operand(i, 0, result)
}
