//! Model-specific registers (Vol. 4): a table. What is not in it raises #GP(0).

use crate::apic;
use crate::mem::{Ctx, canonical};
use crate::model::Feature;
use crate::trap::{Exec, GP0};
use crate::vcpu::{Seg, Vcpu, cr, reg};

/// Whether every byte of a PAT is a memory type (Vol. 3A, "IA32_PAT MSR").
pub(crate) fn pat_is_valid(pat: u64) -> bool {
    pat.to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

/// Variable-range MTRRs there are.
const VARIABLE_MTRRS: u64 = 8;
/// Memory types an MTRR may hold.
fn mtrr_type(kind: u64) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

/// None of the speculative faults that ARCH_CAPABILITIES enumerates: this processor does not
/// speculate (RDCL, L1D flush, SSB, MDS, page-size change, TAA, SBDR, FBSDP, PSDP, BHI, PBRSB,
/// GDS, RFDS).
const ARCH_CAPABILITIES: u64 =
    1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 7 << 13 | 1 << 20 | 1 << 24 | 3 << 26;

/// What a write does.
type Write = fn(&mut Ctx, u32, u64) -> Exec;

/// One row: first and last number, feature it comes with, and what RDMSR and WRMSR do.
struct Row {
    first: u32,
    last: u32,
    needs: Option<Feature>,
    read: fn(&Ctx, u32) -> u64,
    write: Write,
}

const fn row(number: u32, read: fn(&Ctx, u32) -> u64, write: Write) -> Row {
    Row {
        first: number,
        last: number,
        needs: None,
        read,
        write,
    }
}

const fn rows(first: u32, last: u32, read: fn(&Ctx, u32) -> u64, write: Write) -> Row {
    Row {
        first,
        last,
        needs: None,
        read,
        write,
    }
}

const fn needs(feature: Feature, row: Row) -> Row {
    Row {
        needs: Some(feature),
        ..row
    }
}

const READ_ONLY: Write = |_, _, _| Err(GP0);
/// Accepted and without effect.
const IGNORED: Write = |_, _, _| Ok(());

fn canonical_or_fault(value: u64) -> Exec<u64> {
    if canonical(value) {
        Ok(value)
    } else {
        Err(GP0)
    }
}

/// Plain storage in `msrs`, of values that must be canonical.
macro_rules! address {
    ($number:literal, $field:ident) => {
        row(
            $number,
            |x, _| x.cpu.msrs.$field,
            |x, _, value| {
                x.cpu.msrs.$field = canonical_or_fault(value)?;
                Ok(())
            },
        )
    };
}

/// Sorted by number. The local APIC's (1BH, 6E0H, 800H-8FFH) are apart.
#[rustfmt::skip]
static TABLE: &[Row] = &[
    // IA32_P5_MC_ADDR, IA32_P5_MC_TYPE
    rows(0x0, 0x1, |_, _| 0, READ_ONLY),
    // IA32_TIME_STAMP_COUNTER
    row(0x10, |x, _| x.cpu.tsc(x.now), |x, _, value| { set_tsc(x, value); Ok(()) }),
    // IA32_PLATFORM_ID
    row(0x17, |_, _| 0, READ_ONLY),
    needs(Feature::TscAdjust, row(0x3b, |x, _| x.cpu.msrs.tsc_adjust, |x, _, value| {
        let tsc = x.cpu.tsc(x.now).wrapping_add(value.wrapping_sub(x.cpu.msrs.tsc_adjust));
        set_tsc(x, tsc);
        Ok(())
    })),
    // IA32_BIOS_UPDT_TRIG, IA32_BIOS_SIGN_ID
    row(0x79, |_, _| 0, IGNORED),
    row(0x8b, |x, _| x.cpu.msrs.bios_sign_id, |x, _, value| { x.cpu.msrs.bios_sign_id = value; Ok(()) }),
    // IA32_MTRRCAP: fixed ranges, write combining
    needs(Feature::Mtrr, row(0xfe, |_, _| VARIABLE_MTRRS | 1 << 8 | 1 << 10, READ_ONLY)),
    needs(Feature::ArchCapabilities, row(0x10a, |_, _| ARCH_CAPABILITIES, READ_ONLY)),
    needs(Feature::Sep, row(0x174, |x, _| x.cpu.msrs.sysenter_cs, |x, _, value| { x.cpu.msrs.sysenter_cs = value & 0xffff_ffff; Ok(()) })),
    needs(Feature::Sep, address!(0x175, sysenter_esp)),
    needs(Feature::Sep, address!(0x176, sysenter_eip)),
    // IA32_MCG_CAP (no banks), IA32_MCG_STATUS
    needs(Feature::Mca, row(0x179, |_, _| 0, READ_ONLY)),
    needs(Feature::Mca, row(0x17a, |_, _| 0, |_, _, value| if value == 0 { Ok(()) } else { Err(GP0) })),
    row(0x1a0, |x, _| x.cpu.msrs.misc_enable, |x, _, value| { x.cpu.msrs.misc_enable = value & !MISC_READ_ONLY | x.cpu.msrs.misc_enable & MISC_READ_ONLY; Ok(()) }),
    // IA32_DEBUGCTL: none of its features
    row(0x1d9, |x, _| x.cpu.msrs.debugctl, |_, _, value| if value == 0 { Ok(()) } else { Err(GP0) }),
    needs(Feature::Mtrr, rows(0x200, 0x20f, |x, n| *mtrr_variable(x.cpu, n), set_mtrr_variable)),
    needs(Feature::Mtrr, row(0x250, |x, _| x.cpu.msrs.mtrr_fixed[0], set_mtrr_fixed)),
    needs(Feature::Mtrr, rows(0x258, 0x259, |x, n| x.cpu.msrs.mtrr_fixed[1 + (n - 0x258) as usize], set_mtrr_fixed)),
    needs(Feature::Mtrr, rows(0x268, 0x26f, |x, n| x.cpu.msrs.mtrr_fixed[3 + (n - 0x268) as usize], set_mtrr_fixed)),
    needs(Feature::Pat, row(0x277, |x, _| x.cpu.msrs.pat, |x, _, value| {
        if !pat_is_valid(value) {
            return Err(GP0);
        }
        x.cpu.msrs.pat = value;
        Ok(())
    })),
    needs(Feature::Mtrr, row(0x2ff, |x, _| x.cpu.msrs.mtrr_def_type, |x, _, value| {
        if value & !0xcff != 0 || !mtrr_type(value & 0xff) {
            return Err(GP0);
        }
        x.cpu.msrs.mtrr_def_type = value;
        Ok(())
    })),
    needs(Feature::Xsaves, row(0xda0, |x, _| x.cpu.msrs.xss, |_, _, value| if value == 0 { Ok(()) } else { Err(GP0) })),
    row(0xc000_0080, |x, _| x.cpu.msrs.efer, |x, _, value| set_efer(x, value)),
    needs(Feature::Syscall, row(0xc000_0081, |x, _| x.cpu.msrs.star, |x, _, value| { x.cpu.msrs.star = value; Ok(()) })),
    needs(Feature::Syscall, address!(0xc000_0082, lstar)),
    needs(Feature::Syscall, address!(0xc000_0083, cstar)),
    needs(Feature::Syscall, row(0xc000_0084, |x, _| x.cpu.msrs.fmask, |x, _, value| {
        if value >> 32 != 0 {
            return Err(GP0);
        }
        x.cpu.msrs.fmask = value;
        Ok(())
    })),
    needs(Feature::Lm, row(0xc000_0100, |x, _| x.cpu.seg(Seg::Fs).base, |x, _, value| set_base(x, Seg::Fs, value))),
    needs(Feature::Lm, row(0xc000_0101, |x, _| x.cpu.seg(Seg::Gs).base, |x, _, value| set_base(x, Seg::Gs, value))),
    needs(Feature::Lm, address!(0xc000_0102, kernel_gs_base)),
    needs(Feature::Rdtscp, row(0xc000_0103, |x, _| x.cpu.msrs.tsc_aux, |x, _, value| {
        if value >> 32 != 0 {
            return Err(GP0);
        }
        x.cpu.msrs.tsc_aux = value;
        Ok(())
    })),
];

/// Bits of IA32_MISC_ENABLE that software cannot change: BTS and PEBS unavailable, performance
/// monitoring available.
const MISC_READ_ONLY: u64 = 1 << 7 | 1 << 11 | 1 << 12;

/// EFER, with LMA out of software's reach.
fn set_efer(x: &mut Ctx, value: u64) -> Exec {
    let old = x.cpu.msrs.efer;
    if value & !x.cpu.model.efer_bits() != 0
        || (value ^ old) & cr::EFER_LME != 0 && x.cpu.cr0 & cr::CR0_PG != 0
    {
        return Err(GP0);
    }
    x.cpu.msrs.efer = value & !cr::EFER_LMA | old & cr::EFER_LMA;
    if (value ^ old) & cr::EFER_NXE != 0 {
        x.cpu.flush_tlb();
    }
    Ok(())
}

/// Writes the TSC. TSC_ADJUST changes by the same amount (Vol. 3B, "Time-Stamp Counter Adjustment").
fn set_tsc(x: &mut Ctx, value: u64) {
    let change = value.wrapping_sub(x.cpu.tsc(x.now));
    let msrs = &mut x.cpu.msrs;
    msrs.tsc_offset = msrs.tsc_offset.wrapping_add(change);
    msrs.tsc_adjust = msrs.tsc_adjust.wrapping_add(change);
    x.cpu.tsc_changed(x.now);
}

fn set_base(x: &mut Ctx, seg: Seg, value: u64) -> Exec {
    x.cpu.seg_mut(seg).base = canonical_or_fault(value)?;
    x.cpu.gpr[if seg == Seg::Fs {
        reg::FS_BASE
    } else {
        reg::GS_BASE
    }] = value;
    Ok(())
}

fn mtrr_variable(cpu: &Vcpu, number: u32) -> &u64 {
    let n = (number - 0x200) as usize;
    &cpu.msrs.mtrr_variable[n / 2][n % 2]
}

fn set_mtrr_variable(x: &mut Ctx, number: u32, value: u64) -> Exec {
    let n = (number - 0x200) as usize;
    let valid = if n.is_multiple_of(2) {
        value & 0xf00 == 0 && mtrr_type(value & 0xff)
    } else {
        value & 0x7ff == 0
    };
    if !valid || value & x.cpu.model.reserved_physical() != 0 {
        return Err(GP0);
    }
    x.cpu.msrs.mtrr_variable[n / 2][n % 2] = value;
    Ok(())
}

fn set_mtrr_fixed(x: &mut Ctx, number: u32, value: u64) -> Exec {
    if !value
        .to_le_bytes()
        .iter()
        .all(|kind| mtrr_type(u64::from(*kind)))
    {
        return Err(GP0);
    }
    let n = match number {
        0x250 => 0,
        0x258 | 0x259 => 1 + (number - 0x258),
        _ => 3 + (number - 0x268),
    };
    x.cpu.msrs.mtrr_fixed[n as usize] = value;
    Ok(())
}

fn find(x: &Ctx, number: u32) -> Exec<&'static Row> {
    let after = TABLE.partition_point(|row| row.first <= number);
    let row = after
        .checked_sub(1)
        .map(|n| &TABLE[n])
        .filter(|row| number <= row.last);
    row.filter(|row| row.needs.is_none_or(|feature| x.cpu.model.has(feature)))
        .ok_or(GP0)
}

fn is_apic(number: u32) -> bool {
    matches!(number, 0x1b | 0x6e0 | 0x800..=0x8ff)
}

/// RDMSR.
pub(super) fn rdmsr(x: &mut Ctx) -> Exec {
    if x.cpu.cpl != 0 {
        return Err(GP0);
    }
    let number = x.cpu.gpr[reg::RCX] as u32;
    let value = if is_apic(number) {
        apic::msr_read(x, number)?
    } else {
        (find(x, number)?.read)(x, number)
    };
    x.cpu.gpr[reg::RAX] = value & 0xffff_ffff;
    x.cpu.gpr[reg::RDX] = value >> 32;
    Ok(())
}

/// WRMSR.
pub(super) fn wrmsr(x: &mut Ctx) -> Exec {
    if x.cpu.cpl != 0 {
        return Err(GP0);
    }
    let number = x.cpu.gpr[reg::RCX] as u32;
    let value = x.cpu.gpr[reg::RDX] << 32 | x.cpu.gpr[reg::RAX] & 0xffff_ffff;
    if is_apic(number) {
        apic::msr_write(x, number, value)
    } else {
        (find(x, number)?.write)(x, number, value)
    }
}

impl Vcpu {
    /// Time-stamp counter at a tick.
    pub fn tsc(&self, now: crate::Tick) -> u64 {
        now.wrapping_add(self.msrs.tsc_offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_without_overlap() {
        assert!(TABLE.windows(2).all(|pair| pair[0].last < pair[1].first));
        assert!(TABLE.iter().all(|row| row.first <= row.last));
    }

    #[test]
    fn a_memory_type_that_does_not_exist_is_refused() {
        assert!(pat_is_valid(0x0007_0406_0007_0406));
        assert!(!pat_is_valid(2));
    }
}
