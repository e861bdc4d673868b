//! Segment registers, descriptor tables and the task register (Vol. 2, MOV, POP, LDS/LES/.., LAR,
//! LSL, VERR/VERW, ARPL, LGDT/LIDT, SGDT/SIDT, LLDT, LTR, SLDT, STR, SMSW, LMSW).

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::far::load_pointer;
use crate::descriptor::{Descriptor, is_null, kind};
use crate::flags::bit;
use crate::mem::{Ctx, canonical};
use crate::operand::segment_of;
use crate::paging::Access;
use crate::state::TableState;
use crate::trap::{Exec, GP0, UD};
use crate::vcpu::{Seg, cr, reg};

/// #GP(0) outside level 0.
pub(super) fn privileged(x: &Ctx) -> Exec {
    if x.cpu.cpl == 0 { Ok(()) } else { Err(GP0) }
}

/// MOV with a segment, control or debug register.
pub(super) fn mov(x: &mut Ctx, i: &Instruction) -> Exec {
    let is_segment = |n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register();
    if is_segment(0) {
        let selector = x.operand(i, 1)? as u16;
        return load(x, i.op0_register(), selector);
    }
    if is_segment(1) {
        let selector = x.cpu.seg(segment_of(i.op1_register())).selector;
        return x.set_operand(i, 0, u64::from(selector));
    }
    super::control::mov(x, i)
}

fn load(x: &mut Ctx, register: Register, selector: u16) -> Exec {
    if register == Register::CS {
        return Err(UD);
    }
    let seg = segment_of(register);
    x.load_segment(seg, selector)?;
    if seg == Seg::Ss {
        x.cpu.mov_ss_shadow = true;
    }
    Ok(())
}

/// POP to a segment register.
pub(super) fn pop(x: &mut Ctx, i: &Instruction) -> Exec {
    let before = x.cpu.gpr[reg::RSP];
    let selector = x.pop(i.stack_pointer_increment() as usize)? as u16;
    load(x, i.op0_register(), selector).inspect_err(|_| x.cpu.gpr[reg::RSP] = before)
}

/// LDS, LES, LFS, LGS, LSS.
pub(super) fn load_far(x: &mut Ctx, i: &Instruction) -> Exec {
    let seg = match i.mnemonic() {
        Mnemonic::Lds => Seg::Ds,
        Mnemonic::Les => Seg::Es,
        Mnemonic::Lfs => Seg::Fs,
        Mnemonic::Lgs => Seg::Gs,
        _ => Seg::Ss,
    };
    let (selector, offset) = load_pointer(x, i)?;
    x.load_segment(seg, selector)?;
    x.cpu.set_reg(i.op0_register(), offset);
    Ok(())
}

/// LGDT and LIDT.
pub(super) fn load_table(x: &mut Ctx, i: &Instruction) -> Exec {
    privileged(x)?;
    let base_size = if x.cpu.is_64() { 8 } else { 4 };
    let linear = x.memory(i, 2 + base_size, Access::Read)?;
    let limit = x.load_sized(linear, 2)? as u16;
    let mut base = x.load_sized(linear.wrapping_add(2), base_size as usize)?;
    if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if !canonical(base) {
        return Err(GP0);
    }
    let table = TableState { base, limit };
    if i.mnemonic() == Mnemonic::Lgdt {
        x.cpu.gdtr = table;
    } else {
        x.cpu.idtr = table;
    }
    Ok(())
}

/// #GP(0) where UMIP keeps user code from reading system registers.
fn user_may_read(x: &Ctx) -> Exec {
    if x.cpu.cpl > 0 && x.cpu.cr4 & cr::CR4_UMIP != 0 {
        Err(GP0)
    } else {
        Ok(())
    }
}

/// SGDT and SIDT.
pub(super) fn store_table(x: &mut Ctx, i: &Instruction) -> Exec {
    user_may_read(x)?;
    let table = if i.mnemonic() == Mnemonic::Sgdt {
        x.cpu.gdtr
    } else {
        x.cpu.idtr
    };
    let base_size = if x.cpu.is_64() { 8 } else { 4 };
    let linear = x.memory(i, 2 + base_size, Access::Write)?;
    x.probe_write(linear, 2 + base_size)?;
    x.store_sized(linear, 2, u64::from(table.limit))?;
    x.store_sized(linear.wrapping_add(2), base_size as usize, table.base)
}

/// SLDT and STR.
pub(super) fn store_selector(x: &mut Ctx, i: &Instruction) -> Exec {
    protected_only(x)?;
    user_may_read(x)?;
    let seg = if i.mnemonic() == Mnemonic::Sldt {
        Seg::Ldtr
    } else {
        Seg::Tr
    };
    let selector = x.cpu.seg(seg).selector;
    x.set_operand(i, 0, u64::from(selector))
}

/// LLDT and LTR.
pub(super) fn load_selector(x: &mut Ctx, i: &Instruction) -> Exec {
    protected_only(x)?;
    privileged(x)?;
    let selector = x.operand(i, 0)? as u16;
    if i.mnemonic() == Mnemonic::Lldt {
        x.load_ldtr(selector)
    } else {
        x.load_tr(selector)
    }
}

/// #UD in real and virtual-8086 mode.
fn protected_only(x: &Ctx) -> Exec {
    if x.cpu.uses_paragraphs() {
        Err(UD)
    } else {
        Ok(())
    }
}

/// SMSW. A register operand of 32 or 64 bits gets all of CR0.
pub(super) fn smsw(x: &mut Ctx, i: &Instruction) -> Exec {
    user_may_read(x)?;
    let value = super::control::visible_cr0(x);
    x.set_operand(i, 0, value)
}

/// LMSW: PE, MP, EM and TS; PE is never cleared.
pub(super) fn lmsw(x: &mut Ctx, i: &Instruction) -> Exec {
    privileged(x)?;
    let value = x.operand(i, 0)?;
    let kept = super::control::visible_cr0(x) & !(cr::CR0_MP | cr::CR0_EM | cr::CR0_TS);
    super::control::write_cr0(x, kept | value & 0xf)
}

/// The descriptor of a selector operand, if the current level may see it.
fn visible(x: &mut Ctx, selector: u16) -> Exec<Option<Descriptor>> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(descriptor) = x.find_descriptor(selector)? else {
        return Ok(None);
    };
    let level = x.cpu.cpl.max((selector & 3) as u8);
    let seen = descriptor.is_conforming() || level <= descriptor.dpl();
    Ok(seen.then_some(descriptor))
}

fn set_zf(x: &mut Ctx, zf: bool) {
    x.cpu.flags.update(bit::ZF, if zf { bit::ZF } else { 0 });
}

/// LAR.
pub(super) fn lar(x: &mut Ctx, i: &Instruction) -> Exec {
    protected_only(x)?;
    let selector = x.operand(i, 1)? as u16;
    let long = x.cpu.long_mode();
    let found = visible(x, selector)?.filter(|descriptor| {
        !descriptor.is_system()
            || match descriptor.kind() {
                kind::LDT | kind::TSS | kind::TSS_BUSY | kind::CALL => true,
                kind::TSS16 | kind::TSS16_BUSY | kind::CALL16 | kind::TASK_GATE => !long,
                _ => false,
            }
    });
    if let Some(descriptor) = found {
        let rights = descriptor.0 >> 32 & 0x00f0_ff00;
        x.cpu.set_reg(i.op0_register(), rights);
    }
    set_zf(x, found.is_some());
    Ok(())
}

/// LSL.
pub(super) fn lsl(x: &mut Ctx, i: &Instruction) -> Exec {
    protected_only(x)?;
    let selector = x.operand(i, 1)? as u16;
    let long = x.cpu.long_mode();
    let found = visible(x, selector)?.filter(|descriptor| {
        !descriptor.is_system()
            || match descriptor.kind() {
                kind::LDT | kind::TSS | kind::TSS_BUSY => true,
                kind::TSS16 | kind::TSS16_BUSY => !long,
                _ => false,
            }
    });
    if let Some(descriptor) = found {
        x.cpu
            .set_reg(i.op0_register(), u64::from(descriptor.limit()));
    }
    set_zf(x, found.is_some());
    Ok(())
}

/// VERR and VERW.
pub(super) fn verify(x: &mut Ctx, i: &Instruction) -> Exec {
    protected_only(x)?;
    let selector = x.operand(i, 0)? as u16;
    let write = i.mnemonic() == Mnemonic::Verw;
    let found = visible(x, selector)?;
    let ok = found.is_some_and(|descriptor| {
        if write {
            descriptor.is_writable_data()
        } else {
            descriptor.is_readable()
        }
    });
    set_zf(x, ok);
    Ok(())
}

/// ARPL. The destination need not be writable where nothing is written.
pub(super) fn arpl(x: &mut Ctx, i: &Instruction) -> Exec {
    protected_only(x)?;
    let selector = x.operand(i, 0)?;
    let rpl = x.operand(i, 1)? & 3;
    let raise = selector & 3 < rpl;
    if raise {
        x.set_operand(i, 0, selector & !3 | rpl)?;
    }
    set_zf(x, raise);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fixture, GDT, sel};
    use crate::trap::{Fault, Trap};

    #[test]
    fn loading_a_segment_checks_level_kind_and_presence() {
        let mut f = Fixture::long();
        let mut load = |cpl, seg, selector| {
            f.enter(cpl);
            f.with(|x| x.load_segment(seg, selector))
        };
        let gp = |code| Err(Trap::Fault(Fault::GeneralProtection(code)));
        assert_eq!(load(3, Seg::Ds, sel::DATA0), gp(sel::DATA0));
        assert_eq!(load(0, Seg::Ds, sel::DATA0 | 3), gp(sel::DATA0));
        assert_eq!(load(0, Seg::Ds, sel::TSS), gp(sel::TSS));
        assert_eq!(load(0, Seg::Ds, 0x100), gp(0x100));
        assert_eq!(load(0, Seg::Ds, 0x14), gp(0x14));
        assert_eq!(load(3, Seg::Ds, sel::CONFORMING), Ok(()));
        assert_eq!(
            load(0, Seg::Ds, sel::ABSENT),
            Err(Trap::Fault(Fault::NotPresent(sel::ABSENT)))
        );
        assert_eq!(
            load(0, Seg::Ss, sel::ABSENT),
            Err(Trap::Fault(Fault::Stack(sel::ABSENT)))
        );
        assert_eq!(load(0, Seg::Ss, sel::DATA3), gp(sel::DATA3 & !3));
        assert_eq!(load(0, Seg::Ss, sel::CODE0), gp(sel::CODE0));
        assert_eq!(load(0, Seg::Ss, 0), Ok(()));
        assert_eq!(load(3, Seg::Ss, 3), Err(GP0));
        assert_eq!(load(3, Seg::Gs, 0), Ok(()));
    }

    #[test]
    fn a_load_sets_the_accessed_bit_in_the_table() {
        let mut f = Fixture::long();
        f.descriptor(sel::FREE, 0x00cf_9200_0000_ffff);
        f.with(|x| x.load_segment(Seg::Es, sel::FREE)).unwrap();
        assert_eq!(f.peek(GDT + u64::from(sel::FREE)) >> 40 & 0xff, 0x93);
        assert_eq!(f.cpu.seg(Seg::Es).rights, 0xc093);
        assert_eq!(f.cpu.seg(Seg::Es).limit, u32::MAX);
    }

    #[test]
    fn mov_ss_holds_off_interrupts_and_mov_ds_does_not() {
        let mut f = Fixture::long();
        f.cpu.gpr[0] = u64::from(sel::DATA0);
        f.execute(&[0x8e, 0xd8]).unwrap();
        assert!(!f.cpu.mov_ss_shadow);
        f.execute(&[0x8e, 0xd0]).unwrap();
        assert!(f.cpu.mov_ss_shadow);
    }

    #[test]
    fn ltr_marks_the_task_busy_and_refuses_a_busy_one() {
        let mut f = Fixture::long();
        f.cpu.gpr[0] = u64::from(sel::TSS);
        let ltr = [0x0f, 0x00, 0xd8];
        let busy = Err(Trap::Fault(Fault::GeneralProtection(sel::TSS)));
        assert_eq!(f.execute(&ltr), busy);
        f.descriptor(sel::TSS, 0x0000_8900_3000_0067);
        f.descriptor(sel::TSS + 8, 0x12);
        f.execute(&ltr).unwrap();
        assert_eq!(f.cpu.seg(Seg::Tr).base, 0x12_0000_3000);
        assert_eq!(f.cpu.seg(Seg::Tr).rights & 0xf, 0xb);
        assert_eq!(f.peek(GDT + u64::from(sel::TSS)) >> 40 & 0xff, 0x8b);
        f.cpu.gpr[0] = 0;
        assert_eq!(f.execute(&ltr), Err(GP0));
    }

    #[test]
    fn umip_hides_system_registers_from_user_code() {
        let mut f = Fixture::long();
        f.enter(3);
        let smsw = [0x0f, 0x01, 0xe0];
        let sgdt = [0x0f, 0x01, 0x04, 0x25, 0x00, 0x90, 0, 0];
        f.execute(&smsw).unwrap();
        assert_eq!(f.cpu.gpr[0] as u32, f.cpu.cr0 as u32);
        f.execute(&sgdt).unwrap();
        assert_eq!(f.peek(0x9002), GDT);
        assert_eq!(f.peek16(0x9000), f.cpu.gdtr.limit);
        f.cpu.cr4 |= cr::CR4_UMIP;
        for code in [&smsw[..], &sgdt, &[0x0f, 0x00, 0xc0], &[0x0f, 0x00, 0xc8]] {
            assert_eq!(f.execute(code), Err(GP0));
        }
    }

    #[test]
    fn lar_and_lsl_answer_only_for_what_may_be_seen() {
        let mut f = Fixture::long();
        f.cpu.gpr[1] = u64::from(sel::CODE0);
        f.cpu.gpr[0] = 0x55;
        f.execute(&[0x0f, 0x02, 0xc1]).unwrap();
        assert_eq!(f.cpu.gpr[0], 0x00a0_9b00);
        assert!(f.cpu.flags.zf());
        f.execute(&[0x0f, 0x03, 0xc1]).unwrap();
        assert_eq!(f.cpu.gpr[0], 0xffff_ffff);
        f.enter(3);
        f.execute(&[0x0f, 0x03, 0xc1]).unwrap();
        assert!(!f.cpu.flags.zf());
        f.cpu.gpr[1] = u64::from(sel::DATA3);
        f.execute(&[0x0f, 0x00, 0xe9]).unwrap(); // VERW CX
        assert!(f.cpu.flags.zf());
    }
}
