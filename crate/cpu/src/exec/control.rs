//! Control and debug registers, TLB invalidation, XCR0 (Vol. 2, MOV-Move to/from Control
//! Registers, INVLPG, INVPCID, XSETBV; Vol. 3A, "Control Registers", "Paging").

use hypernest_vmcs::Field;
use iced_x86::{Instruction, OpKind, Register};

use super::system::privileged;
use crate::debug;
use crate::interrupt::{DR6_BD, DR7_GD};
use crate::mem::{Ctx, canonical};
use crate::paging::{self, Access};
use crate::save::{DR6_FIXED, DR7_FIXED};
use crate::trap::{Exec, Fault, GP0, UD};
use crate::vcpu::{Seg, cr, reg};
use crate::vmx;

/// Bits of CR0 that exist.
pub(crate) const CR0_BITS: u64 = cr::CR0_PE
    | cr::CR0_MP
    | cr::CR0_EM
    | cr::CR0_TS
    | cr::CR0_ET
    | cr::CR0_NE
    | cr::CR0_WP
    | cr::CR0_AM
    | cr::CR0_NW
    | cr::CR0_CD
    | cr::CR0_PG;

/// CR3 bit 63 in a MOV: keep what is cached for the PCID.
const CR3_KEEP: u64 = 1 << 63;

/// MOV to and from control and debug registers.
pub(super) fn mov(x: &mut Ctx, i: &Instruction) -> Exec {
    let to_special = i.op0_kind() == OpKind::Register && !i.op0_register().is_gpr();
    let (special, general) = if to_special {
        (i.op0_register(), i.op1_register())
    } else {
        (i.op1_register(), i.op0_register())
    };
    let value = x.cpu.reg(general);
    match special {
        Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8 => {
            privileged(x)?;
        }
        _ if special.is_dr() => return mov_debug(x, special, general, to_special),
        _ => return Err(UD),
    }
    if to_special {
        return match special {
            Register::CR0 => write_cr0(x, value),
            Register::CR2 => {
                x.cpu.cr2 = value;
                Ok(())
            }
            Register::CR3 => write_cr3(x, value),
            Register::CR4 => write_cr4(x, value),
            _ => write_cr8(x, value),
        };
    }
    let value = match special {
        Register::CR0 => visible_cr0(x),
        Register::CR2 => x.cpu.cr2,
        Register::CR3 => x.cpu.cr3,
        Register::CR4 => visible_cr4(x),
        _ => vmx::apic::read_cr8(x).unwrap_or_else(|| x.cpu.apic.cr8()),
    };
    x.cpu.set_reg(general, value);
    Ok(())
}

/// Whether the paging mode is that with page-directory-pointer registers.
pub(crate) fn uses_pdptes(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr::CR0_PG != 0 && cr4 & cr::CR4_PAE != 0 && efer & cr::EFER_LMA == 0
}

fn load_pdptes(x: &mut Ctx, cr3: u64) -> Exec {
    let mut marks = x.cpu.vmx.marks();
    let loaded = paging::load_pdptes(x.cpu, x.ram, cr3, &mut marks);
    x.cpu.vmx.marked(&marks);
    x.cpu.pdpte = loaded.map_err(|miss| x.missed(miss))?;
    Ok(())
}

/// Bits of CR0 or CR4 as a guest sees them: those of its hypervisor from the read shadow.
fn shadowed(x: &Ctx, value: u64, mask: Field, shadow: Field) -> u64 {
    if !x.cpu.vmx.non_root {
        return value;
    }
    let vmcs = &x.cpu.vmx.vmcs;
    let mask = vmcs.get(mask);
    value & !mask | vmcs.get(shadow) & mask
}

/// CR0 as MOV and SMSW read it.
pub(super) fn visible_cr0(x: &Ctx) -> u64 {
    shadowed(
        x,
        x.cpu.cr0,
        Field::CR0_GUEST_HOST_MASK,
        Field::CR0_READ_SHADOW,
    )
}

/// CR4 as MOV reads it.
fn visible_cr4(x: &Ctx) -> u64 {
    shadowed(
        x,
        x.cpu.cr4,
        Field::CR4_GUEST_HOST_MASK,
        Field::CR4_READ_SHADOW,
    )
}

/// A value to write, with the bits that are not the guest's as they are.
fn writable_part(x: &Ctx, value: u64, old: u64, mask: Field) -> u64 {
    if !x.cpu.vmx.non_root {
        return value;
    }
    let mask = x.cpu.vmx.vmcs.get(mask);
    value & !mask | old & mask
}

/// #GP(0) for a value that VMX operation does not allow (Vol. 3C, "Restrictions on VMX Operation").
fn check_fixed(x: &Ctx, cr0: Option<u64>, cr4: Option<u64>) -> Exec {
    if x.cpu.vmx.region.is_none() {
        return Ok(());
    }
    let Some(caps) = x.cpu.vmx.caps() else {
        return Ok(());
    };
    // An unrestricted guest may leave paging and protection.
    let free = if x.cpu.vmx.non_root && x.cpu.vmx.controls.unrestricted() {
        cr::CR0_PE | cr::CR0_PG
    } else {
        0
    };
    let fits = |value: u64, zero: u64, one: u64| value & zero == zero && value & !one == 0;
    let fine = cr0.is_none_or(|v| fits(v, caps.cr0_fixed0 & !free, caps.cr0_fixed1))
        && cr4.is_none_or(|v| fits(v, caps.cr4_fixed0, caps.cr4_fixed1));
    if fine { Ok(()) } else { Err(GP0) }
}

/// MOV to CR0, also LMSW.
pub(super) fn write_cr0(x: &mut Ctx, value: u64) -> Exec {
    if value >> 32 != 0 {
        return Err(GP0);
    }
    let old = x.cpu.cr0;
    let value = writable_part(x, value, old, Field::CR0_GUEST_HOST_MASK);
    let new = value & CR0_BITS | cr::CR0_ET;
    check_fixed(x, Some(new), None)?;
    let has = |bits| new & bits != 0;
    if has(cr::CR0_PG) && !has(cr::CR0_PE) || has(cr::CR0_NW) && !has(cr::CR0_CD) {
        return Err(GP0);
    }
    let changed = old ^ new;
    let mut efer = x.cpu.msrs.efer;
    if changed & cr::CR0_PG != 0 {
        if has(cr::CR0_PG) {
            if efer & cr::EFER_LME != 0 {
                let long_code = x.cpu.seg(Seg::Cs).rights & crate::vcpu::rights::LONG != 0;
                if x.cpu.cr4 & cr::CR4_PAE == 0 || long_code {
                    return Err(GP0);
                }
                efer |= cr::EFER_LMA;
            }
        } else {
            if x.cpu.is_64() || x.cpu.cr4 & cr::CR4_PCIDE != 0 {
                return Err(GP0);
            }
            efer &= !cr::EFER_LMA;
        }
    }
    const RELOADS: u64 = cr::CR0_PG | cr::CR0_CD | cr::CR0_NW;
    if changed & RELOADS != 0 && uses_pdptes(new, x.cpu.cr4, efer) {
        load_pdptes(x, x.cpu.cr3)?;
    }
    x.cpu.cr0 = new;
    x.cpu.msrs.efer = efer;
    if changed & (cr::CR0_PG | cr::CR0_WP | cr::CR0_PE) != 0 {
        x.cpu.flush_tlb();
    } else {
        x.cpu.refresh();
    }
    Ok(())
}

/// MOV to CR3.
fn write_cr3(x: &mut Ctx, value: u64) -> Exec {
    let pcids = x.cpu.cr4 & cr::CR4_PCIDE != 0;
    let keep = pcids && value & CR3_KEEP != 0;
    let new = if pcids { value & !CR3_KEEP } else { value };
    if x.cpu.long_mode() {
        if new & x.cpu.model.reserved_physical() != 0 {
            return Err(GP0);
        }
    } else if x.cpu.uses_pdptes() {
        load_pdptes(x, new)?;
    }
    x.cpu.cr3 = new;
    let pcid = if pcids { new as u16 & 0xfff } else { 0 };
    x.cpu.switch_address_space(pcid, keep);
    Ok(())
}

/// MOV to CR4.
fn write_cr4(x: &mut Ctx, value: u64) -> Exec {
    let old = x.cpu.cr4;
    let new = writable_part(x, value, old, Field::CR4_GUEST_HOST_MASK);
    check_fixed(x, None, Some(new))?;
    let has = |bits| new & bits != 0;
    let long = x.cpu.long_mode();
    if has(!x.cpu.cr4_bits()) || long && !has(cr::CR4_PAE) {
        return Err(GP0);
    }
    let changed = old ^ new;
    if changed & new & cr::CR4_PCIDE != 0 && (!long || x.cpu.cr3 & 0xfff != 0) {
        return Err(GP0);
    }
    const RELOADS: u64 = cr::CR4_PAE | cr::CR4_PSE | cr::CR4_PGE | cr::CR4_SMEP;
    if changed & RELOADS != 0 && uses_pdptes(x.cpu.cr0, new, x.cpu.msrs.efer) {
        load_pdptes(x, x.cpu.cr3)?;
    }
    x.cpu.cr4 = new;
    if changed & cr::CR4_PCIDE != 0 {
        x.cpu.switch_address_space(0, false);
    }
    const FLUSHES: u64 = RELOADS | cr::CR4_SMAP | cr::CR4_PCIDE;
    if changed & FLUSHES != 0 {
        x.cpu.flush_tlb();
    } else {
        x.cpu.refresh();
    }
    Ok(())
}

fn write_cr8(x: &mut Ctx, value: u64) -> Exec {
    if value > 15 {
        return Err(GP0);
    }
    if !vmx::apic::write_cr8(x, value) {
        x.cpu.apic.set_cr8(value);
        x.cpu.touched_outside();
    }
    Ok(())
}

/// CLTS.
pub(super) fn clts(x: &mut Ctx) -> Exec {
    privileged(x)?;
    if x.cpu.vmx.non_root && x.cpu.vmx.vmcs.get(Field::CR0_GUEST_HOST_MASK) & cr::CR0_TS != 0 {
        // The bit is the hypervisor's, and the guest saw it clear already.
        return Ok(());
    }
    x.cpu.cr0 &= !cr::CR0_TS;
    x.cpu.refresh();
    Ok(())
}

fn mov_debug(x: &mut Ctx, special: Register, general: Register, write: bool) -> Exec {
    let mut n = special as usize - Register::DR0 as usize;
    if n > 7 {
        return Err(UD);
    }
    if n == 4 || n == 5 {
        if x.cpu.cr4 & cr::CR4_DE != 0 {
            return Err(UD);
        }
        n += 2;
    }
    privileged(x)?;
    if x.cpu.dr7 & DR7_GD != 0 {
        return Err(Fault::Debug(DR6_BD).into());
    }
    if !write {
        let value = match n {
            0..4 => x.cpu.dr[n],
            6 => x.cpu.dr6,
            _ => x.cpu.dr7,
        };
        x.cpu.set_reg(general, value);
        return Ok(());
    }
    let value = x.cpu.reg(general);
    if n >= 6 && value >> 32 != 0 {
        return Err(GP0);
    }
    match n {
        0..4 => x.cpu.dr[n] = value,
        6 => x.cpu.dr6 = value & debug::DR6_BITS | DR6_FIXED,
        _ => x.cpu.dr7 = value & debug::DR7_BITS | DR7_FIXED,
    }
    x.cpu.refresh();
    Ok(())
}

/// Linear address of a memory operand, without any check.
pub(crate) fn linear_operand(x: &mut Ctx, i: &Instruction) -> u64 {
    let (seg, offset) = x.address(i);
    let base = match seg {
        Seg::Fs | Seg::Gs => x.cpu.seg(seg).base,
        _ if x.cpu.is_64() => 0,
        _ => x.cpu.seg(seg).base,
    };
    let linear = base.wrapping_add(offset);
    if x.cpu.is_64() {
        linear
    } else {
        linear & 0xffff_ffff
    }
}

/// INVLPG. An address that is not canonical is no error and names no page.
pub(super) fn invlpg(x: &mut Ctx, i: &Instruction) -> Exec {
    privileged(x)?;
    let linear = linear_operand(x, i);
    x.cpu.tlb.flush_page(linear);
    x.cpu.leave_block = true;
    Ok(())
}

/// INVPCID. Forgetting more than asked for is allowed, so that types 2 and 3 are one.
pub(super) fn invpcid(x: &mut Ctx, i: &Instruction) -> Exec {
    privileged(x)?;
    let kind = x.cpu.reg(i.op0_register());
    let linear = x.memory(i, 16, Access::Read)?;
    let low = x.load_sized(linear, 8)?;
    let address = x.load_sized(linear.wrapping_add(8), 8)?;
    let pcid = (low & 0xfff) as u16;
    let wrong = kind > 3
        || low >> 12 != 0
        || kind <= 1 && pcid != 0 && x.cpu.cr4 & cr::CR4_PCIDE == 0
        || kind == 0 && !canonical(address);
    if wrong {
        return Err(GP0);
    }
    match kind {
        0 => x.cpu.tlb.flush_page(address),
        1 => x.cpu.tlb.flush_pcid(pcid),
        _ => x.cpu.tlb.flush_all(),
    }
    x.cpu.refresh();
    Ok(())
}

/// WBINVD and INVD: there is no cache to write back.
pub(super) fn wbinvd(x: &mut Ctx) -> Exec {
    privileged(x)
}

/// CLFLUSH, CLFLUSHOPT: checked like a load of one byte.
pub(super) fn clflush(x: &mut Ctx, i: &Instruction) -> Exec {
    let linear = x.memory(i, 1, Access::Read)?;
    x.load::<1>(linear).map(|_| ())
}

/// #UD unless CR4.OSXSAVE is set.
fn need_osxsave(x: &Ctx) -> Exec {
    if x.cpu.cr4 & cr::CR4_OSXSAVE != 0 {
        Ok(())
    } else {
        Err(UD)
    }
}

/// XGETBV of XCR0, the only one there is.
pub(super) fn xgetbv(x: &mut Ctx) -> Exec {
    need_osxsave(x)?;
    if x.cpu.gpr[reg::RCX] as u32 != 0 {
        return Err(GP0);
    }
    let value = x.cpu.fpu.xcr0;
    x.cpu.gpr[reg::RAX] = value & 0xffff_ffff;
    x.cpu.gpr[reg::RDX] = value >> 32;
    Ok(())
}

/// XSETBV.
pub(super) fn xsetbv(x: &mut Ctx) -> Exec {
    need_osxsave(x)?;
    privileged(x)?;
    let value = x.cpu.gpr[reg::RDX] << 32 | x.cpu.gpr[reg::RAX] & 0xffff_ffff;
    let index = x.cpu.gpr[reg::RCX] as u32;
    if index != 0 || value & 1 == 0 || value & !x.cpu.model.xcr0_bits() != 0 {
        return Err(GP0);
    }
    x.cpu.fpu.xcr0 = value;
    x.cpu.refresh();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fixture, sel};
    use crate::tlb::Kind;
    use crate::trap::Trap;
    use crate::vcpu::CodeSize;

    const TO_CR0: [u8; 3] = [0x0f, 0x22, 0xc0];
    const TO_CR3: [u8; 3] = [0x0f, 0x22, 0xd8];
    const TO_CR4: [u8; 3] = [0x0f, 0x22, 0xe0];
    const TO_DR7: [u8; 3] = [0x0f, 0x23, 0xf8];

    fn write(f: &mut Fixture, code: &[u8], value: u64) -> Exec {
        f.cpu.gpr[0] = value;
        f.execute(code)
    }

    #[test]
    fn long_mode_begins_with_paging_and_ends_with_it() {
        let mut f = Fixture::long();
        // Out: by way of 32-bit code.
        let cr0 = f.cpu.cr0;
        assert_eq!(write(&mut f, &TO_CR0, cr0 & !cr::CR0_PG), Err(GP0));
        f.poke(0x9100, 0x7777 | u64::from(sel::OTHER0) << 32);
        f.execute(&[0xff, 0x2c, 0x25, 0x00, 0x91, 0, 0]).unwrap();
        write(&mut f, &TO_CR0, cr0 & !cr::CR0_PG).unwrap();
        assert_eq!(f.cpu.msrs.efer & cr::EFER_LMA, 0);
        // Back in, which needs PAE.
        write(&mut f, &TO_CR4, 0).unwrap();
        assert_eq!(write(&mut f, &TO_CR0, cr0), Err(GP0));
        write(&mut f, &TO_CR4, cr::CR4_PAE).unwrap();
        write(&mut f, &TO_CR0, cr0).unwrap();
        assert_ne!(f.cpu.msrs.efer & cr::EFER_LMA, 0);
        assert_eq!(f.cpu.code_size, CodeSize::Bits32);
    }

    #[test]
    fn impossible_control_register_values_are_refused() {
        let mut f = Fixture::long();
        let (cr0, cr4) = (f.cpu.cr0, f.cpu.cr4);
        for value in [cr0 & !cr::CR0_PE, cr0 | cr::CR0_NW, cr0 | 1 << 32] {
            assert_eq!(write(&mut f, &TO_CR0, value), Err(GP0), "{value:x}");
        }
        for value in [0, cr4 | 1 << 12, cr4 | 1 << 14, cr4 | 1 << 40] {
            assert_eq!(write(&mut f, &TO_CR4, value), Err(GP0), "{value:x}");
        }
        assert_eq!(write(&mut f, &TO_CR3, 1 << 40), Err(GP0));
        assert_eq!(write(&mut f, &TO_CR3, CR3_KEEP | 0x4000), Err(GP0));
        assert_eq!((f.cpu.cr0, f.cpu.cr4, f.cpu.cr3), (cr0, cr4, 0x4000));
    }

    #[test]
    fn pcids_need_long_mode_and_start_at_zero_and_keep_on_request() {
        let mut f = Fixture::protected();
        assert_eq!(write(&mut f, &TO_CR4, cr::CR4_PCIDE), Err(GP0));
        let mut f = Fixture::long();
        f.cpu.cr3 = 0x4008;
        assert_eq!(
            write(&mut f, &TO_CR4, cr::CR4_PCIDE | cr::CR4_PAE),
            Err(GP0)
        );
        f.cpu.cr3 = 0x4000;
        write(&mut f, &TO_CR4, cr::CR4_PCIDE | cr::CR4_PAE).unwrap();
        write(&mut f, &TO_CR3, 0x4005).unwrap();
        let key = f.cpu.tlb.key(Kind::Supervisor);
        f.with(|x| x.load::<1>(0x9000)).unwrap();
        assert!(f.cpu.tlb.read_offset(0x9000, 1, key).is_some());
        write(&mut f, &TO_CR3, 0x4006).unwrap();
        write(&mut f, &TO_CR3, CR3_KEEP | 0x4005).unwrap();
        assert_eq!(f.cpu.cr3, 0x4005);
        assert_eq!(f.cpu.tlb.key(Kind::Supervisor), key);
        write(&mut f, &TO_CR3, 0x4005).unwrap();
        assert_ne!(f.cpu.tlb.key(Kind::Supervisor), key);
    }

    #[test]
    fn pae_paging_checks_its_four_pointers() {
        let mut f = Fixture::protected();
        f.cpu.cr4 = cr::CR4_PAE;
        f.cpu.cr3 = 0x4020;
        f.poke(0x4020, 0x5003); // W is reserved here
        let cr0 = f.cpu.cr0 | cr::CR0_PG;
        assert_eq!(write(&mut f, &TO_CR0, cr0), Err(GP0));
        f.poke(0x4020, 0x5001);
        f.poke(0x5000, 0x83);
        write(&mut f, &TO_CR0, cr0).unwrap();
        assert_eq!(f.cpu.pdpte, [0x5001, 0, 0, 0]);
    }

    #[test]
    fn debug_registers_alias_or_not_and_general_detect_traps() {
        let mut f = Fixture::long();
        write(&mut f, &TO_DR7, 0xffff_ffff & !DR7_GD).unwrap();
        assert_eq!(f.cpu.dr7, 0xffff_07ff);
        assert!(f.cpu.careful);
        f.execute(&[0x0f, 0x21, 0xe8]).unwrap(); // MOV RAX, DR5
        assert_eq!(f.cpu.gpr[0], 0xffff_07ff);
        f.cpu.cr4 |= cr::CR4_DE;
        assert_eq!(f.execute(&[0x0f, 0x21, 0xe8]), Err(UD));
        assert_eq!(write(&mut f, &TO_DR7, 1 << 32), Err(GP0));
        write(&mut f, &TO_DR7, DR7_GD).unwrap();
        let trap = Err(Trap::Fault(Fault::Debug(DR6_BD)));
        assert_eq!(f.execute(&[0x0f, 0x21, 0xf8]), trap);
        f.enter(3);
        assert_eq!(f.execute(&[0x0f, 0x21, 0xf8]), Err(GP0));
    }

    #[test]
    fn invpcid_checks_its_descriptor() {
        let mut f = Fixture::long();
        let invpcid = [0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0x00, 0x90, 0, 0];
        for (kind, low, high, ok) in [
            (0, 0, 0x1000, true),
            (0, 0, 1 << 47, false),
            (1, 1, 0, false),
            (1, 0, 0, true),
            (2, 1 << 12, 0, false),
            (3, 0, 0, true),
            (4, 0, 0, false),
        ] {
            f.poke(0x9000, low);
            f.poke(0x9008, high);
            assert_eq!(write(&mut f, &invpcid, kind).is_ok(), ok, "{kind} {low:x}");
        }
    }

    #[test]
    fn xcr0_needs_osxsave_and_x87() {
        let mut f = Fixture::long();
        let (xsetbv, xgetbv) = ([0x0f, 0x01, 0xd1], [0x0f, 0x01, 0xd0]);
        assert_eq!(f.execute(&xgetbv), Err(UD));
        f.cpu.cr4 |= cr::CR4_OSXSAVE;
        f.cpu.gpr[reg::RCX] = 0;
        f.cpu.gpr[reg::RDX] = 0;
        write(&mut f, &xsetbv, 3).unwrap();
        f.execute(&xgetbv).unwrap();
        assert_eq!(f.cpu.gpr[0], 3);
        assert_eq!(write(&mut f, &xsetbv, 2), Err(GP0));
        assert_eq!(write(&mut f, &xsetbv, 7), Err(GP0));
    }
}
