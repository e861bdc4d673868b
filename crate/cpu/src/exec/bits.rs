//! Single bits, bit scans and counts, BMI1 and BMI2.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::by_width;
use crate::flags::bit;
use crate::mem::Ctx;
use crate::operand::{Place, address_size, mask};
use crate::paging::Access;
use crate::trap::{Exec, UD};

/// Instructions with a VEX prefix exist only in protected mode (Vol. 2A, "Instruction Exception
/// Specification", type 13).
pub(super) fn vex(x: &Ctx) -> Exec {
    if x.cpu.uses_paragraphs() {
        return Err(UD);
    }
    Ok(())
}

/// BT, BTS, BTR, BTC. A register bit offset reaches beyond a memory operand, in both directions.
pub(super) fn bit_test(x: &mut Ctx, i: &Instruction) -> Exec {
    let access = if i.mnemonic() == Mnemonic::Bt {
        Access::Read
    } else {
        Access::Write
    };
    let size = x.operand_size(i, 0);
    let offset = x.operand(i, 1)?;
    let place = if i.op0_kind() == OpKind::Register || i.op1_kind() != OpKind::Register {
        x.place(i, 0, access)?
    } else {
        let signed = by_width!(size, T => <T as crate::flags::Width>::sign_extend(offset)) as i64;
        let unit = signed >> (8 * size as u32).trailing_zeros();
        let (seg, base) = x.address(i);
        let at = base.wrapping_add(unit.wrapping_mul(size as i64) as u64) & mask(address_size(i));
        let linear = x.linear(seg, at, size as u64, access)?;
        if access == Access::Write {
            x.probe_write(linear, size as u64)?;
        }
        Place::Memory { linear, size }
    };
    let value = x.get(place)?;
    let selected = 1u64 << (offset & (8 * size as u64 - 1));
    let result = match i.mnemonic() {
        Mnemonic::Bts => value | selected,
        Mnemonic::Btr => value & !selected,
        _ => value ^ selected,
    };
    x.cpu.flags.set_cf(value & selected != 0);
    if access == Access::Write {
        x.put(place, result)?;
    }
    Ok(())
}

/// BSF and BSR. A zero source leaves the destination alone.
pub(super) fn scan(x: &mut Ctx, i: &Instruction) -> Exec {
    let source = x.operand(i, 1)?;
    let zf = if source == 0 { bit::ZF } else { 0 };
    x.cpu.flags.update(bit::ZF, zf);
    if source == 0 {
        return Ok(());
    }
    let n = if i.mnemonic() == Mnemonic::Bsf {
        source.trailing_zeros()
    } else {
        63 - source.leading_zeros()
    };
    x.set_operand(i, 0, u64::from(n))
}

/// TZCNT, LZCNT, POPCNT.
pub(super) fn count(x: &mut Ctx, i: &Instruction) -> Exec {
    let source = x.operand(i, 1)?;
    let bits = 8 * x.operand_size(i, 0) as u32;
    let (n, cf) = match i.mnemonic() {
        Mnemonic::Tzcnt => (source.trailing_zeros().min(bits), source == 0),
        Mnemonic::Lzcnt => (source.leading_zeros() - (64 - bits), source == 0),
        _ => (source.count_ones(), false),
    };
    let image = if n == 0 { bit::ZF } else { 0 } | u64::from(cf);
    let changed = if i.mnemonic() == Mnemonic::Popcnt {
        bit::ARITHMETIC
    } else {
        bit::ZF | bit::CF
    };
    x.cpu.flags.update(changed, image);
    x.set_operand(i, 0, u64::from(n))
}

/// The flags of BMI1: SF and ZF from the result, CF given, OF clear.
fn result_flags(x: &mut Ctx, result: u64, size: usize, cf: bool) {
    by_width!(size, T => x.cpu.flags.shift::<T>(result, cf, false));
}

/// ANDN.
pub(super) fn andn(x: &mut Ctx, i: &Instruction) -> Exec {
    vex(x)?;
    let result = !x.operand(i, 1)? & x.operand(i, 2)?;
    result_flags(x, result, x.operand_size(i, 0), false);
    x.set_operand(i, 0, result)
}

/// BLSI, BLSMSK, BLSR.
pub(super) fn lowest_set(x: &mut Ctx, i: &Instruction) -> Exec {
    vex(x)?;
    let source = x.operand(i, 1)?;
    let (result, cf) = match i.mnemonic() {
        Mnemonic::Blsi => (source.wrapping_neg() & source, source != 0),
        Mnemonic::Blsmsk => (source.wrapping_sub(1) ^ source, source == 0),
        _ => (source.wrapping_sub(1) & source, source == 0),
    };
    result_flags(x, result, x.operand_size(i, 0), cf);
    x.set_operand(i, 0, result)
}

/// Bits below `n`.
fn below(n: u64) -> u64 {
    if n >= 64 { !0 } else { (1 << n) - 1 }
}

/// BEXTR.
pub(super) fn bextr(x: &mut Ctx, i: &Instruction) -> Exec {
    vex(x)?;
    let source = x.operand(i, 1)?;
    let [start, length, ..] = x.operand(i, 2)?.to_le_bytes();
    let shifted = source.checked_shr(u32::from(start)).unwrap_or(0);
    let result = shifted & below(u64::from(length));
    result_flags(x, result, x.operand_size(i, 0), false);
    x.set_operand(i, 0, result)
}

/// BZHI.
pub(super) fn bzhi(x: &mut Ctx, i: &Instruction) -> Exec {
    vex(x)?;
    let source = x.operand(i, 1)?;
    let n = x.operand(i, 2)? & 0xff;
    let size = x.operand_size(i, 0);
    let result = source & below(n);
    result_flags(x, result, size, n > 8 * size as u64 - 1);
    x.set_operand(i, 0, result)
}

/// PDEP: the low bits of the source go to the places set in the mask.
pub(super) fn pdep(x: &mut Ctx, i: &Instruction) -> Exec {
    vex(x)?;
    let mut source = x.operand(i, 1)?;
    let mut places = x.operand(i, 2)?;
    let mut result = 0;
    while places != 0 {
        let lowest = places & places.wrapping_neg();
        if source & 1 != 0 {
            result |= lowest;
        }
        source >>= 1;
        places ^= lowest;
    }
    x.set_operand(i, 0, result)
}

/// PEXT: the bits of the source at the places set in the mask, closed up.
pub(super) fn pext(x: &mut Ctx, i: &Instruction) -> Exec {
    vex(x)?;
    let source = x.operand(i, 1)?;
    let mut places = x.operand(i, 2)?;
    let (mut result, mut n) = (0, 0);
    while places != 0 {
        let lowest = places & places.wrapping_neg();
        result |= u64::from(source & lowest != 0) << n;
        n += 1;
        places ^= lowest;
    }
    x.set_operand(i, 0, result)
}
