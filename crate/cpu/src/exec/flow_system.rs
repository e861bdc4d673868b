//! SYSCALL, SYSENTER and their returns, SWAPGS, FS and GS bases, software interrupts, HLT,
//! MONITOR and MWAIT, STI and CLI, time stamps, random numbers.

use iced_x86::{Instruction, Mnemonic};

use super::system::privileged;
use crate::flags::bit;
use crate::interrupt;
use crate::mem::{Ctx, canonical};
use crate::model::Vendor;
use crate::paging::Access;
use crate::state::{Activity, SegmentState};
use crate::trap::{Exec, GP0, UD};
use crate::vcpu::{Seg, cr, reg, rights};

/// Where SYSCALL leaves RFLAGS.
const R11: usize = 11;

/// A flat code segment as SYSCALL and the like make it, at level `dpl`.
fn flat_code(selector: u16, dpl: u8, long: bool) -> SegmentState {
    let size = if long { rights::LONG } else { rights::BIG };
    SegmentState {
        selector,
        base: 0,
        limit: u32::MAX,
        rights: 0x9b | rights::GRANULARITY | size | u32::from(dpl) << rights::DPL_SHIFT,
    }
}

fn flat_stack(selector: u16, dpl: u8) -> SegmentState {
    SegmentState {
        selector,
        base: 0,
        limit: u32::MAX,
        rights: 0x93 | rights::GRANULARITY | rights::BIG | u32::from(dpl) << rights::DPL_SHIFT,
    }
}

/// Enters flat segments at level `cpl`.
fn enter(x: &mut Ctx, cs: u16, ss: u16, cpl: u8, long: bool, rip: u64) {
    let rpl = u16::from(cpl);
    *x.cpu.seg_mut(Seg::Ss) = flat_stack(ss & !3 | rpl, cpl);
    x.enter_code(flat_code(cs & !3 | rpl, cpl, long), cpl, rip);
}

/// #UD without EFER.SCE, and on Intel processors outside 64-bit mode.
fn need_syscall(x: &Ctx) -> Exec {
    let mode = x.cpu.is_64() || x.cpu.model.vendor == Vendor::Amd && x.cpu.protected();
    if mode && x.cpu.msrs.efer & cr::EFER_SCE != 0 {
        Ok(())
    } else {
        Err(UD)
    }
}

/// SYSCALL.
pub(super) fn syscall(x: &mut Ctx) -> Exec {
    need_syscall(x)?;
    let long = x.cpu.long_mode();
    let rflags = x.cpu.flags.get() & !bit::RF;
    x.cpu.gpr[reg::RCX] = x.cpu.rip;
    let star = x.cpu.msrs.star;
    let rip = if x.cpu.is_64() {
        x.cpu.msrs.lstar
    } else if long {
        x.cpu.msrs.cstar
    } else {
        star & 0xffff_ffff
    };
    if long {
        x.cpu.gpr[R11] = rflags;
        x.cpu.flags.set(rflags & !x.cpu.msrs.fmask);
    } else {
        x.cpu.flags.set(rflags & !(bit::IF | bit::VM));
    }
    let cs = (star >> 32) as u16;
    enter(x, cs, (cs & !3).wrapping_add(8), 0, long, rip);
    single_step_follows_tf(x);
    Ok(())
}

/// SYSCALL and SYSRET single-step by TF as they leave it, so that a mask of TF keeps the trap out
/// of the handler.
fn single_step_follows_tf(x: &mut Ctx) {
    if x.cpu.flags.rest & bit::TF != 0 {
        x.cpu.pending_debug |= interrupt::DR6_BS;
    } else {
        x.cpu.pending_debug &= !interrupt::DR6_BS;
    }
}

/// SYSRET and SYSRETQ.
pub(super) fn sysret(x: &mut Ctx, i: &Instruction) -> Exec {
    need_syscall(x)?;
    privileged(x)?;
    let long = i.mnemonic() == Mnemonic::Sysretq;
    let mut rip = x.cpu.gpr[reg::RCX];
    if long && !canonical(rip) {
        return Err(GP0);
    }
    if !long {
        rip &= 0xffff_ffff;
    }
    if x.cpu.long_mode() {
        let kept = bit::ALL & !(bit::RF | bit::VM);
        x.cpu.flags.set(x.cpu.gpr[R11] & kept);
    } else {
        x.cpu.flags.rest |= bit::IF;
    }
    let base = (x.cpu.msrs.star >> 48) as u16;
    let cs = if long { base.wrapping_add(16) } else { base };
    enter(x, cs, base.wrapping_add(8), 3, long, rip);
    single_step_follows_tf(x);
    Ok(())
}

/// #UD where the vendor has left SYSENTER and SYSEXIT out.
fn need_sysenter(x: &Ctx) -> Exec {
    if x.cpu.model.vendor == Vendor::Amd && x.cpu.long_mode() {
        Err(UD)
    } else {
        Ok(())
    }
}

/// SYSENTER.
pub(super) fn sysenter(x: &mut Ctx) -> Exec {
    need_sysenter(x)?;
    let cs = x.cpu.msrs.sysenter_cs as u16;
    if !x.cpu.protected() || cs & !3 == 0 {
        return Err(GP0);
    }
    let long = x.cpu.long_mode();
    let wrap = if long { !0 } else { 0xffff_ffff };
    x.cpu.flags.rest &= !(bit::VM | bit::IF | bit::RF);
    x.cpu.gpr[reg::RSP] = x.cpu.msrs.sysenter_esp & wrap;
    let rip = x.cpu.msrs.sysenter_eip & wrap;
    enter(x, cs, (cs & !3).wrapping_add(8), 0, long, rip);
    Ok(())
}

/// SYSEXIT and SYSEXITQ.
pub(super) fn sysexit(x: &mut Ctx, i: &Instruction) -> Exec {
    need_sysenter(x)?;
    let base = x.cpu.msrs.sysenter_cs as u16;
    if !x.cpu.protected() || base & !3 == 0 {
        return Err(GP0);
    }
    privileged(x)?;
    let long = i.mnemonic() == Mnemonic::Sysexitq;
    let (mut rip, mut rsp) = (x.cpu.gpr[reg::RDX], x.cpu.gpr[reg::RCX]);
    if long && !(canonical(rip) && canonical(rsp)) {
        return Err(GP0);
    }
    if !long {
        rip &= 0xffff_ffff;
        rsp &= 0xffff_ffff;
    }
    x.cpu.gpr[reg::RSP] = rsp;
    let (cs, ss) = if long { (32, 40) } else { (16, 24) };
    enter(
        x,
        base.wrapping_add(cs),
        base.wrapping_add(ss),
        3,
        long,
        rip,
    );
    Ok(())
}

/// Sets the base of FS or GS without touching anything else.
pub(super) fn set_base(x: &mut Ctx, seg: Seg, base: u64) {
    x.cpu.seg_mut(seg).base = base;
    let copy = if seg == Seg::Fs {
        reg::FS_BASE
    } else {
        reg::GS_BASE
    };
    x.cpu.gpr[copy] = base;
}

/// SWAPGS.
pub(super) fn swapgs(x: &mut Ctx) -> Exec {
    privileged(x)?;
    let base = x.cpu.seg(Seg::Gs).base;
    let kernel = core::mem::replace(&mut x.cpu.msrs.kernel_gs_base, base);
    set_base(x, Seg::Gs, kernel);
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
pub(super) fn segment_base(x: &mut Ctx, i: &Instruction) -> Exec {
    if x.cpu.cr4 & cr::CR4_FSGSBASE == 0 {
        return Err(UD);
    }
    let seg = match i.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => Seg::Fs,
        _ => Seg::Gs,
    };
    let register = i.op0_register();
    if matches!(i.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        let base = x.cpu.seg(seg).base;
        x.cpu.set_reg(register, base);
        return Ok(());
    }
    let base = x.cpu.reg(register);
    if !canonical(base) {
        return Err(GP0);
    }
    set_base(x, seg, base);
    Ok(())
}

/// INT n, INT3, INTO, INT1.
pub(super) fn int(x: &mut Ctx, i: &Instruction) -> Exec {
    let length = i.len() as u32;
    match i.mnemonic() {
        Mnemonic::Int1 => interrupt::icebp(x, i.len() as u32),
        Mnemonic::Int3 => interrupt::software(x, 3, length, false),
        Mnemonic::Into if !x.cpu.flags.of() => Ok(()),
        Mnemonic::Into => interrupt::software(x, 4, length, false),
        _ => interrupt::software(x, i.immediate8(), length, true),
    }
}

/// HLT.
pub(super) fn hlt(x: &mut Ctx) -> Exec {
    privileged(x)?;
    x.cpu.activity = Activity::Halted;
    x.cpu.touched_outside();
    Ok(())
}

/// MONITOR.
pub(super) fn monitor(x: &mut Ctx, i: &Instruction) -> Exec {
    if x.cpu.cpl > 0 {
        return Err(UD);
    }
    if x.cpu.gpr[reg::RCX] as u32 != 0 {
        return Err(GP0);
    }
    let width = match i.op0_register().size() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => !0,
    };
    let offset = x.cpu.gpr[reg::RAX] & width;
    let seg = match i.segment_prefix() {
        iced_x86::Register::None => Seg::Ds,
        register => crate::operand::segment_of(register),
    };
    let linear = x.linear(seg, offset, 1, Access::Read)?;
    x.load::<1>(linear)?;
    x.cpu.monitor = Some(linear);
    Ok(())
}

/// MWAIT.
///
/// Deviation: it never waits. Any event may end the wait, and a store to the monitored range must;
/// code that uses it looks at its condition again and comes back.
pub(super) fn mwait(x: &mut Ctx) -> Exec {
    if x.cpu.cpl > 0 {
        return Err(UD);
    }
    // ECX bit 0: interrupts end the wait even where IF is clear.
    if x.cpu.gpr[reg::RCX] as u32 & !1 != 0 {
        return Err(GP0);
    }
    x.cpu.monitor = None;
    x.cpu.leave_block = true;
    Ok(())
}

/// STAC and CLAC.
pub(super) fn set_ac(x: &mut Ctx, ac: bool) -> Exec {
    if x.cpu.cpl > 0 {
        return Err(UD);
    }
    if ac {
        x.cpu.flags.rest |= bit::AC;
    } else {
        x.cpu.flags.rest &= !bit::AC;
    }
    // AC matters to level 0 only in which translations may be used.
    x.cpu.tlb_key = x.cpu.tlb.key(x.cpu.access_kind());
    Ok(())
}

/// #GP(0) where CR4.TSD keeps the time from user code.
fn may_read_time(x: &Ctx) -> Exec {
    if x.cpu.cpl > 0 && x.cpu.cr4 & cr::CR4_TSD != 0 {
        Err(GP0)
    } else {
        Ok(())
    }
}

/// RDTSC.
pub(super) fn rdtsc(x: &mut Ctx) -> Exec {
    may_read_time(x)?;
    let tsc = x.cpu.tsc(x.now);
    x.cpu.gpr[reg::RAX] = tsc & 0xffff_ffff;
    x.cpu.gpr[reg::RDX] = tsc >> 32;
    Ok(())
}

/// RDTSCP.
pub(super) fn rdtscp(x: &mut Ctx) -> Exec {
    rdtsc(x)?;
    x.cpu.gpr[reg::RCX] = x.cpu.msrs.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// RDPID.
pub(super) fn rdpid(x: &mut Ctx, i: &Instruction) -> Exec {
    x.cpu
        .set_reg(i.op0_register(), x.cpu.msrs.tsc_aux & 0xffff_ffff);
    Ok(())
}

/// RDPMC: there is no performance counter to name.
pub(super) fn rdpmc() -> Exec {
    Err(GP0)
}

/// RDRAND and RDSEED: the next number of a stream that depends on the vCPU and on nothing else.
pub(super) fn random(x: &mut Ctx, i: &Instruction) -> Exec {
    let stream = u64::from(x.cpu.apic.id()) << 48;
    let value = mix(stream.wrapping_add(x.cpu.random_count));
    x.cpu.random_count = x.cpu.random_count.wrapping_add(1);
    x.cpu.set_reg(i.op0_register(), value);
    x.cpu.flags.update(bit::ARITHMETIC, bit::CF);
    Ok(())
}

/// SplitMix64's output for its `n`-th step.
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CODE, Fixture, sel};
    use crate::vcpu::CodeSize;

    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const SYSRETQ: [u8; 3] = [0x48, 0x0f, 0x07];

    #[test]
    fn syscall_and_sysret_swap_levels_and_flags() {
        let mut f = Fixture::long();
        f.cpu.msrs.star = 0x0013_0008 << 32;
        f.cpu.msrs.lstar = 0x7000;
        f.cpu.msrs.fmask = bit::IF | bit::DF;
        f.enter(3);
        let flags = bit::FIXED | bit::IF | bit::DF | bit::CF;
        f.cpu.set_rflags(flags | bit::RF);
        f.execute(&SYSCALL).unwrap();
        assert_eq!((f.cpu.rip, f.cpu.cpl), (0x7000, 0));
        assert_eq!((f.cpu.gpr[reg::RCX], f.cpu.gpr[R11]), (CODE + 2, flags));
        assert_eq!(f.cpu.flags.get(), bit::FIXED | bit::CF);
        assert_eq!(f.cpu.seg(Seg::Ss).selector, 0x10);
        f.execute(&SYSRETQ).unwrap();
        assert_eq!((f.cpu.rip, f.cpu.cpl), (CODE + 2, 3));
        assert_eq!(f.cpu.flags.get(), flags);
        assert_eq!(f.cpu.seg(Seg::Cs).selector, 0x23);
        assert_eq!(f.cpu.seg(Seg::Ss).selector, 0x1b);
        assert_eq!(f.execute(&SYSRETQ), Err(GP0));
        f.cpu.msrs.efer &= !cr::EFER_SCE;
        assert_eq!(f.execute(&SYSCALL), Err(UD));
    }

    #[test]
    fn sysretq_refuses_an_address_that_is_not_canonical() {
        let mut f = Fixture::long();
        f.cpu.gpr[reg::RCX] = 1 << 47;
        assert_eq!(f.execute(&SYSRETQ), Err(GP0));
        f.execute(&[0x0f, 0x07]).unwrap(); // to compatibility mode, 32 bits of it
        assert_eq!((f.cpu.rip, f.cpu.code_size), (0, CodeSize::Bits32));
    }

    #[test]
    fn compatibility_mode_has_syscall_where_the_vendor_has_it() {
        let mut f = Fixture::long();
        f.cpu.msrs.star = 0x0013_0008 << 32;
        f.cpu.msrs.cstar = 0x7000;
        f.cpu.msrs.fmask = bit::TF;
        f.enter(3);
        f.cpu.seg_mut(Seg::Cs).rights ^= rights::LONG | rights::BIG;
        f.cpu.set_rflags(bit::FIXED | bit::TF);
        assert_eq!(f.execute(&SYSCALL), Err(UD));
        f.cpu.model = crate::Model::by_name("baseline-amd").unwrap();
        f.cpu.pending_debug = interrupt::DR6_BS;
        f.execute(&SYSCALL).unwrap();
        assert_eq!((f.cpu.rip, f.cpu.code_size), (0x7000, CodeSize::Bits64));
        // TF was masked, and with it the trap of this instruction.
        assert_eq!(f.cpu.pending_debug, 0);
        f.execute(&[0x0f, 0x07]).unwrap();
        assert_eq!((f.cpu.rip, f.cpu.code_size), (CODE + 2, CodeSize::Bits32));
        assert_eq!(f.cpu.pending_debug, interrupt::DR6_BS);
        assert_eq!(f.execute(&[0x0f, 0x34]), Err(UD));
    }

    #[test]
    fn sysenter_and_sysexit_use_their_registers() {
        let mut f = Fixture::long();
        f.enter(3);
        let sysenter = [0x0f, 0x34];
        assert_eq!(f.execute(&sysenter), Err(GP0));
        f.cpu.msrs.sysenter_cs = sel::CODE0.into();
        f.cpu.msrs.sysenter_esp = 0x1234_5678_9000;
        f.cpu.msrs.sysenter_eip = 0x7000;
        f.execute(&sysenter).unwrap();
        assert_eq!((f.cpu.cpl, f.cpu.rip), (0, 0x7000));
        assert_eq!(f.cpu.gpr[reg::RSP], 0x1234_5678_9000);
        f.cpu.gpr[reg::RCX] = 0xd000;
        f.cpu.gpr[reg::RDX] = 0x9000;
        f.execute(&[0x48, 0x0f, 0x35]).unwrap();
        assert_eq!(
            (f.cpu.cpl, f.cpu.rip, f.cpu.gpr[reg::RSP]),
            (3, 0x9000, 0xd000)
        );
        assert_eq!(f.cpu.seg(Seg::Cs).selector, 0x2b);
    }

    #[test]
    fn gs_bases_swap_and_reach_addresses() {
        let mut f = Fixture::long();
        f.cpu.msrs.kernel_gs_base = 0x9000;
        f.poke(0x9008, 0x77);
        f.execute(&[0x0f, 0x01, 0xf8]).unwrap();
        f.execute(&[0x65, 0x8b, 0x04, 0x25, 8, 0, 0, 0]).unwrap();
        assert_eq!((f.cpu.gpr[0], f.cpu.msrs.kernel_gs_base), (0x77, 0));
        let wrgsbase = [0xf3, 0x48, 0x0f, 0xae, 0xd8];
        assert_eq!(f.execute(&wrgsbase), Err(UD));
        f.cpu.cr4 |= cr::CR4_FSGSBASE;
        f.execute(&wrgsbase).unwrap();
        assert_eq!(f.cpu.seg(Seg::Gs).base, 0x77);
        f.cpu.gpr[0] = 1 << 47;
        assert_eq!(f.execute(&wrgsbase), Err(GP0));
    }

    #[test]
    fn sti_shadows_only_when_it_sets_if() {
        let mut f = Fixture::long();
        f.execute(&[0xfb]).unwrap();
        assert!(f.cpu.sti_shadow);
        f.cpu.sti_shadow = false;
        f.execute(&[0xfb]).unwrap();
        assert!(!f.cpu.sti_shadow);
        f.enter(3);
        assert_eq!(f.execute(&[0xfa]), Err(GP0));
        assert_eq!(f.execute(&[0xf4]), Err(GP0));
    }

    #[test]
    fn random_numbers_repeat_from_the_same_state_and_differ_from_each_other() {
        let mut f = Fixture::long();
        let rdrand = [0x48, 0x0f, 0xc7, 0xf0];
        f.execute(&rdrand).unwrap();
        let first = f.cpu.gpr[0];
        assert!(f.cpu.flags.cf());
        f.execute(&rdrand).unwrap();
        assert_ne!(f.cpu.gpr[0], first);
        f.cpu.random_count = 0;
        f.execute(&rdrand).unwrap();
        assert_eq!(f.cpu.gpr[0], first);
    }

    #[test]
    fn the_time_stamp_is_the_tick_with_its_offset() {
        let mut f = Fixture::long();
        f.cpu.msrs.tsc_offset = 1 << 40;
        f.cpu.msrs.tsc_aux = 9;
        f.execute(&[0x0f, 0x01, 0xf9]).unwrap();
        let low = crate::clock::tsc_at(1000);
        assert_eq!((f.cpu.gpr[0], f.cpu.gpr[2], f.cpu.gpr[1]), (low, 0x100, 9));
        f.enter(3);
        f.cpu.cr4 |= cr::CR4_TSD;
        assert_eq!(f.execute(&[0x0f, 0x31]), Err(GP0));
    }
}
