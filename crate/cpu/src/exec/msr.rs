//! RDMSR and WRMSR: a table of model-specific registers (Vol. 4, "Architectural MSRs"). What is
//! not in it raises #GP(0).

use super::system::privileged;
use crate::clock::tsc_at;
use crate::hyperv;
use crate::mem::{Ctx, canonical};
use crate::model::{Feature, Model, Vendor};
use crate::state::MsrState;
use crate::trap::{Exec, GP0};
use crate::vcpu::{Seg, Vcpu, cr, reg};
use crate::vmx;

/// Whether every byte of a PAT is a memory type (Vol. 3A, "IA32_PAT MSR").
pub(crate) fn pat_is_valid(pat: u64) -> bool {
    pat.to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

/// Types of memory that an MTRR may name.
fn mtrr_type_is_valid(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4..=6)
}

/// Eight variable-range registers, fixed ranges, write combining.
const MTRR_CAP: u64 = 8 | 1 << 8 | 1 << 10;
const MTRR_DEF_TYPE_BITS: u64 = 0xff | 1 << 10 | 1 << 11;
/// IA32_DEBUGCTL: record branches.
const DEBUGCTL_LBR: u64 = 1;
/// IA32_DEBUGCTL: TF traps after taken branches only.
pub(crate) const DEBUGCTL_BTF: u64 = 1 << 1;
/// Bits of IA32_DEBUGCTL that can be set.
pub(crate) const DEBUGCTL_BITS: u64 = DEBUGCTL_LBR | DEBUGCTL_BTF;
/// Fast strings and xTPR messages; the rest of IA32_MISC_ENABLE tells what there is.
const MISC_ENABLE_WRITABLE: u64 = 1 | 1 << 23;
/// RDCL_NO, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO,
/// PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO: nothing is speculated here.
const ARCH_CAPABILITIES: u64 = 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

const FEATURE_CONTROL: u32 = 0x3a;

type Field = fn(&mut MsrState) -> &mut u64;

/// What holds a register.
enum Holder {
    /// A field of the state.
    Field(Field),
    /// It never changes.
    Constant(u64),
    /// Functions of their own.
    Special(fn(&mut Ctx) -> u64, fn(&mut Ctx, u64) -> Exec),
}

/// Values that WRMSR takes for a field or constant.
enum Rule {
    Any,
    Canonical,
    /// No bit outside these.
    Bits(u64),
    /// What the function allows.
    Check(fn(u64) -> bool),
    ReadOnly,
}

struct Row {
    number: u32,
    name: &'static str,
    holder: Holder,
    rule: Rule,
    /// Without this feature the register does not exist.
    needs: Option<Feature>,
}

const fn row(number: u32, name: &'static str, holder: Holder, rule: Rule) -> Row {
    Row {
        number,
        name,
        holder,
        rule,
        needs: None,
    }
}

impl Row {
    const fn needs(mut self, feature: Feature) -> Row {
        self.needs = Some(feature);
        self
    }
}

macro_rules! field {
    ($field:ident) => {
        Holder::Field(|msrs| &mut msrs.$field)
    };
}

macro_rules! segment_base {
    ($seg:ident) => {
        Holder::Special(
            |x| x.cpu.seg(Seg::$seg).base,
            |x, value| {
                if !canonical(value) {
                    return Err(GP0);
                }
                super::flow_system::set_base(x, Seg::$seg, value);
                Ok(())
            },
        )
    };
}

/// Every register but the MTRR ranges and those of the local APIC, by number.
static TABLE: &[Row] = &[
    row(
        0x10,
        "IA32_TIME_STAMP_COUNTER",
        Holder::Special(tsc, set_tsc),
        Rule::Any,
    ),
    row(
        0x17,
        "IA32_PLATFORM_ID",
        Holder::Constant(0),
        Rule::ReadOnly,
    ),
    row(
        0x3a,
        "IA32_FEATURE_CONTROL",
        Holder::Special(|x| x.cpu.msrs.feature_control, set_feature_control),
        Rule::Any,
    ),
    row(
        0x3b,
        "IA32_TSC_ADJUST",
        Holder::Special(|x| x.cpu.msrs.tsc_adjust, set_tsc_adjust),
        Rule::Any,
    )
    .needs(Feature::TscAdjust),
    row(0x8b, "IA32_BIOS_SIGN_ID", field!(bios_sign_id), Rule::Any),
    row(
        0xfe,
        "IA32_MTRRCAP",
        Holder::Constant(MTRR_CAP),
        Rule::ReadOnly,
    )
    .needs(Feature::Mtrr),
    row(
        0x10a,
        "IA32_ARCH_CAPABILITIES",
        Holder::Constant(ARCH_CAPABILITIES),
        Rule::ReadOnly,
    )
    .needs(Feature::ArchCapabilities),
    row(0x174, "IA32_SYSENTER_CS", field!(sysenter_cs), Rule::Any).needs(Feature::Sep),
    row(
        0x175,
        "IA32_SYSENTER_ESP",
        field!(sysenter_esp),
        Rule::Canonical,
    )
    .needs(Feature::Sep),
    row(
        0x176,
        "IA32_SYSENTER_EIP",
        field!(sysenter_eip),
        Rule::Canonical,
    )
    .needs(Feature::Sep),
    // No banks, and so no errors to report.
    row(0x179, "IA32_MCG_CAP", Holder::Constant(0), Rule::ReadOnly).needs(Feature::Mca),
    row(0x17a, "IA32_MCG_STATUS", Holder::Constant(0), Rule::Bits(0)).needs(Feature::Mca),
    row(
        0x1a0,
        "IA32_MISC_ENABLE",
        Holder::Special(|x| x.cpu.msrs.misc_enable, set_misc_enable),
        Rule::Any,
    ),
    // Deviation: LBR can be set, but there are no (model-specific) registers to record branches in.
    row(
        0x1d9,
        "IA32_DEBUGCTL",
        field!(debugctl),
        Rule::Bits(DEBUGCTL_BITS),
    ),
    row(0x277, "IA32_PAT", field!(pat), Rule::Check(pat_is_valid)).needs(Feature::Pat),
    row(
        0x2ff,
        "IA32_MTRR_DEF_TYPE",
        field!(mtrr_def_type),
        Rule::Check(def_type_is_valid),
    )
    .needs(Feature::Mtrr),
    row(0xda0, "IA32_XSS", field!(xss), Rule::Bits(0)).needs(Feature::Xsaves),
    row(
        0xc000_0080,
        "IA32_EFER",
        Holder::Special(|x| x.cpu.msrs.efer, set_efer),
        Rule::Any,
    ),
    row(0xc000_0081, "IA32_STAR", field!(star), Rule::Any).needs(Feature::Syscall),
    row(0xc000_0082, "IA32_LSTAR", field!(lstar), Rule::Canonical).needs(Feature::Syscall),
    row(0xc000_0083, "IA32_CSTAR", field!(cstar), Rule::Canonical).needs(Feature::Syscall),
    row(
        0xc000_0084,
        "IA32_FMASK",
        field!(fmask),
        Rule::Bits(0xffff_ffff),
    )
    .needs(Feature::Syscall),
    row(0xc000_0100, "IA32_FS_BASE", segment_base!(Fs), Rule::Any).needs(Feature::Lm),
    row(0xc000_0101, "IA32_GS_BASE", segment_base!(Gs), Rule::Any).needs(Feature::Lm),
    row(
        0xc000_0102,
        "IA32_KERNEL_GS_BASE",
        field!(kernel_gs_base),
        Rule::Canonical,
    )
    .needs(Feature::Lm),
    row(
        0xc000_0103,
        "IA32_TSC_AUX",
        field!(tsc_aux),
        Rule::Bits(0xffff_ffff),
    )
    .needs(Feature::Rdtscp),
];

fn find(x: &Ctx, number: u32) -> Option<&'static Row> {
    let at = TABLE.binary_search_by_key(&number, |row| row.number).ok()?;
    let row = &TABLE[at];
    if row.number == FEATURE_CONTROL && x.cpu.vmx.profile.is_none() {
        return None;
    }
    row.needs
        .is_none_or(|feature| x.cpu.model.has(feature))
        .then_some(row)
}

/// Name of a model-specific register (Vol. 4), where this processor may have it.
pub fn msr_name(number: u32) -> Option<&'static str> {
    let at = TABLE.binary_search_by_key(&number, |row| row.number).ok()?;
    Some(TABLE[at].name)
}

/// A model-specific register as a guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrSeen {
    /// Its number.
    pub number: u32,
    /// Its name (Vol. 4).
    pub name: &'static str,
    /// What it reads, where that never changes.
    pub constant: Option<u64>,
}

/// The registers that a processor of this model has, by number: all but those that follow from other features
/// as whole ranges (local APIC, MTRRs, VMX capabilities, Hyper-V).
pub fn msrs(model: &Model, vmx: bool) -> impl Iterator<Item = MsrSeen> {
    let there = move |row: &&Row| {
        (row.number != FEATURE_CONTROL || vmx) && row.needs.is_none_or(|needs| model.has(needs))
    };
    TABLE.iter().filter(there).map(|row| MsrSeen {
        number: row.number,
        name: row.name,
        constant: match row.holder {
            Holder::Constant(value) => Some(value),
            _ => None,
        },
    })
}

/// Registers that the local APIC has.
fn is_apic(number: u32) -> bool {
    matches!(number, 0x1b | 0x6e0 | 0x800..=0x8ff)
}

/// PERF_CTL0-3 and PERF_CTR0-3, which every processor of the other vendor has. Ours only ever
/// stand still at zero: nothing can be selected.
fn is_idle_counter(x: &Ctx, number: u32) -> bool {
    x.cpu.model.vendor == Vendor::Amd && matches!(number, 0xc001_0000..=0xc001_0007)
}

/// RDMSR.
pub(super) fn rdmsr(x: &mut Ctx) -> Exec {
    privileged(x)?;
    let number = x.cpu.gpr[reg::RCX] as u32;
    let value = match vmx::apic::read_msr(x, number) {
        Some(value) => value,
        None => read(x, number)?,
    };
    x.cpu.gpr[reg::RAX] = value & 0xffff_ffff;
    x.cpu.gpr[reg::RDX] = value >> 32;
    Ok(())
}

/// WRMSR.
pub(super) fn wrmsr(x: &mut Ctx) -> Exec {
    privileged(x)?;
    let value = x.cpu.gpr[reg::RDX] << 32 | x.cpu.gpr[reg::RAX] & 0xffff_ffff;
    let number = x.cpu.gpr[reg::RCX] as u32;
    if vmx::apic::write_msr(x, number, value)? {
        return Ok(());
    }
    write(x, number, value)
}

/// The value of a register.
pub(crate) fn read(x: &mut Ctx, number: u32) -> Exec<u64> {
    if is_apic(number) {
        return crate::apic::msr_read(x, number);
    }
    if let Some(range) = mtrr(x, number) {
        return Ok(*range);
    }
    if is_idle_counter(x, number) {
        return Ok(0);
    }
    if let 0x480..=0x4ff = number {
        return x
            .cpu
            .vmx
            .caps()
            .and_then(|caps| caps.get(number))
            .ok_or(GP0);
    }
    if hyperv::is_register(number) {
        return hyperv::read(x, number);
    }
    let row = find(x, number).ok_or(GP0)?;
    Ok(match row.holder {
        Holder::Field(field) => *field(&mut x.cpu.msrs),
        Holder::Constant(value) => value,
        Holder::Special(read, _) => read(x),
    })
}

/// Writes a register, under its rule.
pub(crate) fn write(x: &mut Ctx, number: u32, value: u64) -> Exec {
    if is_apic(number) {
        return crate::apic::msr_write(x, number, value);
    }
    if is_idle_counter(x, number) {
        return if value == 0 { Ok(()) } else { Err(GP0) };
    }
    if hyperv::is_register(number) {
        return hyperv::write(x, number, value);
    }
    let reserved = x.cpu.model.reserved_physical();
    if let Some(range) = mtrr(x, number) {
        if !mtrr_value_is_valid(number, value, reserved) {
            return Err(GP0);
        }
        *range = value;
        return Ok(());
    }
    let row = find(x, number).ok_or(GP0)?;
    let allowed = match row.rule {
        Rule::Any => true,
        Rule::Canonical => canonical(value),
        Rule::Bits(bits) => value & !bits == 0,
        Rule::Check(check) => check(value),
        Rule::ReadOnly => false,
    };
    if !allowed {
        return Err(GP0);
    }
    match row.holder {
        Holder::Field(field) => *field(&mut x.cpu.msrs) = value,
        Holder::Constant(_) => {}
        Holder::Special(_, write) => write(x, value)?,
    }
    Ok(())
}

// ---- memory type ranges: kept, without effect ----

/// The storage of a range register.
fn mtrr<'a>(x: &'a mut Ctx, number: u32) -> Option<&'a mut u64> {
    let msrs = &mut x.cpu.msrs;
    if !x.cpu.model.has(Feature::Mtrr) {
        return None;
    }
    match number {
        0x200..=0x20f => {
            let n = (number - 0x200) as usize;
            Some(&mut msrs.mtrr_variable[n / 2][n % 2])
        }
        0x250 => Some(&mut msrs.mtrr_fixed[0]),
        0x258 | 0x259 => Some(&mut msrs.mtrr_fixed[(number - 0x257) as usize]),
        0x268..=0x26f => Some(&mut msrs.mtrr_fixed[(number - 0x265) as usize]),
        _ => None,
    }
}

fn mtrr_value_is_valid(number: u32, value: u64, reserved: u64) -> bool {
    match number {
        // Mask: valid bit 11 and the address bits.
        0x200..=0x20f if number & 1 != 0 => value & (reserved | 0x7ff) == 0,
        0x200..=0x20f => value & (reserved | 0xf00) == 0 && mtrr_type_is_valid(value as u8),
        _ => value.to_le_bytes().into_iter().all(mtrr_type_is_valid),
    }
}

fn def_type_is_valid(value: u64) -> bool {
    value & !MTRR_DEF_TYPE_BITS == 0 && mtrr_type_is_valid(value as u8)
}

// ---- registers with rules of their own ----

impl Vcpu {
    /// Time-stamp counter at a tick.
    pub fn tsc(&self, now: crate::Tick) -> u64 {
        self.vmx.controls.guest_tsc(self.host_tsc(now))
    }

    /// The counter itself, whatever a guest sees of it.
    pub fn host_tsc(&self, now: crate::Tick) -> u64 {
        tsc_at(now).wrapping_add(self.msrs.tsc_offset)
    }
}

fn tsc(x: &mut Ctx) -> u64 {
    x.cpu.tsc(x.now)
}

/// A write to the TSC moves IA32_TSC_ADJUST by as much (Vol. 3B, "Time-Stamp Counter Adjustment"). In
/// a guest too, it is the counter itself that is written.
fn set_tsc(x: &mut Ctx, value: u64) -> Exec {
    let moved = value.wrapping_sub(x.cpu.host_tsc(x.now));
    move_tsc(x, moved);
    Ok(())
}

/// Locked, it can not be written until the next reset.
fn set_feature_control(x: &mut Ctx, value: u64) -> Exec {
    const LOCK: u64 = 1;
    const VMX_OUTSIDE_SMX: u64 = 1 << 2;
    if x.cpu.msrs.feature_control & LOCK != 0 || value & !(LOCK | VMX_OUTSIDE_SMX) != 0 {
        return Err(GP0);
    }
    x.cpu.msrs.feature_control = value;
    Ok(())
}

fn set_tsc_adjust(x: &mut Ctx, value: u64) -> Exec {
    let moved = value.wrapping_sub(x.cpu.msrs.tsc_adjust);
    move_tsc(x, moved);
    Ok(())
}

fn move_tsc(x: &mut Ctx, by: u64) {
    let msrs = &mut x.cpu.msrs;
    msrs.tsc_offset = msrs.tsc_offset.wrapping_add(by);
    msrs.tsc_adjust = msrs.tsc_adjust.wrapping_add(by);
    x.cpu.tsc_changed(x.now);
    hyperv::tsc_moved(x);
}

/// Deviation: CPUID limiting, XD disabling and the MONITOR switch stay as they are.
fn set_misc_enable(x: &mut Ctx, value: u64) -> Exec {
    let msr = &mut x.cpu.msrs.misc_enable;
    *msr = *msr & !MISC_ENABLE_WRITABLE | value & MISC_ENABLE_WRITABLE;
    Ok(())
}

fn set_efer(x: &mut Ctx, value: u64) -> Exec {
    let old = x.cpu.msrs.efer;
    // LMA follows LME and CR0.PG; what is written to it does not matter.
    let new = value & !cr::EFER_LMA | old & cr::EFER_LMA;
    let paging = x.cpu.cr0 & cr::CR0_PG != 0;
    let changed = old ^ new;
    if new & !x.cpu.model.efer_bits() != 0 || changed & cr::EFER_LME != 0 && paging {
        return Err(GP0);
    }
    x.cpu.msrs.efer = new;
    if changed & cr::EFER_NXE != 0 {
        x.cpu.flush_tlb();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::testing::Fixture;

    #[test]
    fn the_table_is_in_order() {
        assert!(TABLE.is_sorted_by_key(|row| row.number));
        assert_eq!(msr_name(0xc000_0080), Some("IA32_EFER"));
    }

    #[test]
    fn every_register_can_be_read_and_written_back_unless_read_only() {
        let mut f = Fixture::long();
        for row in TABLE {
            if row.number == FEATURE_CONTROL {
                // Exists with VMX alone.
                assert_eq!(f.with(|x| read(x, row.number)), Err(GP0));
                continue;
            }
            let done = f.with(|x| {
                let value = read(x, row.number)?;
                write(x, row.number, value)
            });
            let read_only = matches!(row.rule, Rule::ReadOnly);
            assert_eq!(done.is_err(), read_only, "{}", row.name);
        }
    }

    #[test]
    fn counters_of_the_other_vendor_stand_still_at_zero() {
        let mut f = Fixture::long();
        assert_eq!(f.with(|x| read(x, 0xc001_0004)), Err(GP0));
        f.cpu.model = Model::by_name("baseline-amd").unwrap();
        assert_eq!(f.with(|x| read(x, 0xc001_0004)), Ok(0));
        assert_eq!(f.with(|x| write(x, 0xc001_0000, 0)), Ok(()));
        assert_eq!(f.with(|x| write(x, 0xc001_0000, 1 << 22)), Err(GP0));
    }

    #[test]
    fn unknown_registers_fault_and_so_do_those_of_absent_features() {
        let mut f = Fixture::long();
        for number in [0, 0x3a, 0x480, 0x4000_0000, 0xc000_0085, u32::MAX] {
            assert_eq!(f.with(|x| read(x, number)), Err(GP0), "{number:x}");
        }
        f.cpu.model = Model::by_name("baseline").unwrap();
        for number in [0x3b, 0x10a, 0xda0, 0xc000_0103] {
            assert_eq!(f.with(|x| read(x, number)), Err(GP0), "{number:x}");
        }
        f.enter(3);
        assert_eq!(f.execute(&[0x0f, 0x32]), Err(GP0));
    }

    #[test]
    fn impossible_values_are_refused() {
        let mut f = Fixture::long();
        for (number, value) in [
            (0xc000_0082, 1 << 47),
            (0xc000_0101, 1 << 47),
            (0xc000_0084, 1 << 32),
            (0x277, 0x02),
            (0x277, 0x0800_0000_0000_0000),
            (0x2ff, 1 << 9),
            (0x200, 2),
            (0x201, 1 << 40),
            (0x250, 3),
            (0xda0, 1),
            (0xfe, 0x508),
            (0xc000_0080, 1 << 1),
            (0xc000_0080, cr::EFER_NXE), // LME off under paging
        ] {
            assert_eq!(f.with(|x| write(x, number, value)), Err(GP0), "{number:x}");
        }
    }

    #[test]
    fn wrmsr_takes_both_halves() {
        let mut f = Fixture::long();
        f.cpu.gpr[reg::RCX] = 0xc000_0081;
        f.cpu.gpr[reg::RAX] = 0xffff_ffff_1234_5678;
        f.cpu.gpr[reg::RDX] = 0xffff_ffff_9abc_def0;
        f.execute(&[0x0f, 0x30]).unwrap();
        assert_eq!(f.cpu.msrs.star, 0x9abc_def0_1234_5678);
        f.execute(&[0x0f, 0x32]).unwrap();
        assert_eq!(f.cpu.gpr[reg::RAX], 0x1234_5678);
        assert_eq!(f.cpu.gpr[reg::RDX], 0x9abc_def0);
    }

    #[test]
    fn tsc_and_tsc_adjust_move_together() {
        let mut f = Fixture::long();
        f.with(|x| write(x, 0x10, 5000)).unwrap();
        assert_eq!(f.with(|x| read(x, 0x10)), Ok(5000));
        assert_eq!(f.with(|x| read(x, 0x3b)), Ok(5000 - tsc_at(1000)));
        f.with(|x| write(x, 0x3b, 0)).unwrap();
        assert_eq!(f.with(|x| read(x, 0x10)), Ok(tsc_at(1000)));
    }

    #[test]
    fn efer_keeps_lma() {
        let mut f = Fixture::long();
        f.with(|x| write(x, 0xc000_0080, cr::EFER_LME)).unwrap();
        assert_eq!(f.cpu.msrs.efer, cr::EFER_LME | cr::EFER_LMA);
    }

    #[test]
    fn a_base_written_by_wrmsr_is_used_at_once() {
        let mut f = Fixture::long();
        f.poke(0x9008, 0x77);
        f.with(|x| write(x, 0xc000_0100, 0x9000)).unwrap();
        f.execute(&[0x64, 0x8b, 0x04, 0x25, 8, 0, 0, 0]).unwrap();
        assert_eq!(f.cpu.gpr[0], 0x77);
    }
}
