//! FXSAVE and the XSAVE family (Vol. 1, "Managing State Using the XSAVE Feature Set").
//!
//! Components that exist are x87 and SSE, so the compacted and the standard form have the same
//! 576 bytes. XINUSE is computed from the registers; every component counts as modified.

use iced_x86::{Instruction, Mnemonic};

use crate::fpu::{
    CONTROL_DEFAULT, Fpu, component, control_word, mxcsr, register_bytes, register_from_bytes,
};
use crate::mem::Ctx;
use crate::model::Feature;
use crate::paging::Access;
use crate::trap::{Exec, Fault, GP0, UD};
use crate::vcpu::{cr, reg};

/// Bytes of the legacy region, and with the XSAVE header.
const LEGACY: usize = 512;
const AREA: usize = LEGACY + 64;

/// Offsets in the legacy region (Vol. 1, "Legacy Region of an XSAVE Area").
mod at {
    pub const CONTROL: usize = 0;
    pub const STATUS: usize = 2;
    pub const TAG: usize = 4;
    pub const OPCODE: usize = 6;
    pub const INSTRUCTION: usize = 8;
    pub const OPERAND: usize = 16;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const XSTATE_BV: usize = 512;
    pub const XCOMP_BV: usize = 520;
}

/// XCOMP_BV bit that says compacted.
const COMPACTED: u64 = 1 << 63;

fn get<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&area[at..at + N]);
    bytes
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    area[at..at + bytes.len()].copy_from_slice(bytes);
}

/// How the mode and REX.W shape the legacy region.
#[derive(Clone, Copy)]
struct Form {
    /// Pointers have 64 bits instead of 32 and a selector.
    wide: bool,
    xmm_count: usize,
}

impl Form {
    fn of(x: &Ctx, i: &Instruction) -> Form {
        use Mnemonic::*;
        Form {
            wide: matches!(
                i.mnemonic(),
                Fxsave64
                    | Fxrstor64
                    | Xsave64
                    | Xsaveopt64
                    | Xsavec64
                    | Xsaves64
                    | Xrstor64
                    | Xrstors64
            ),
            xmm_count: if x.cpu.is_64() { 16 } else { 8 },
        }
    }
}

/// The x87 component into the legacy region.
fn write_x87(fpu: &Fpu, form: Form, area: &mut [u8]) {
    put(area, at::CONTROL, &fpu.control.to_le_bytes());
    put(area, at::STATUS, &fpu.status.to_le_bytes());
    put(area, at::TAG, &[fpu.tag, 0]);
    put(area, at::OPCODE, &fpu.opcode.to_le_bytes());
    for (at, pointer) in [
        (at::INSTRUCTION, fpu.instruction),
        (at::OPERAND, fpu.operand),
    ] {
        // The selectors are deprecated and read as zero (CPUID.(7,0):EBX[13]).
        let pointer = if form.wide {
            pointer
        } else {
            pointer & 0xffff_ffff
        };
        put(area, at, &pointer.to_le_bytes());
    }
    for n in 0..8 {
        put(area, at::ST + 16 * n, &register_bytes(fpu.st(n)));
        put(area, at::ST + 16 * n + 10, &[0; 6]);
    }
}

fn read_x87(fpu: &mut Fpu, form: Form, area: &[u8]) {
    fpu.control = control_word(u16::from_le_bytes(get(area, at::CONTROL)));
    fpu.status = u16::from_le_bytes(get(area, at::STATUS));
    fpu.tag = area[at::TAG];
    fpu.opcode = u16::from_le_bytes(get(area, at::OPCODE)) & 0x7ff;
    let pointer = |at| {
        let pointer = u64::from_le_bytes(get(area, at));
        if form.wide {
            pointer
        } else {
            pointer & 0xffff_ffff
        }
    };
    fpu.instruction = pointer(at::INSTRUCTION);
    fpu.operand = pointer(at::OPERAND);
    fpu.instruction_selector = 0;
    fpu.operand_selector = 0;
    for n in 0..8 {
        fpu.set_st(n, register_from_bytes(get(area, at::ST + 16 * n)));
    }
    fpu.summarize();
}

fn write_mxcsr(fpu: &Fpu, area: &mut [u8]) {
    put(area, at::MXCSR, &fpu.mxcsr.to_le_bytes());
    put(area, at::MXCSR_MASK, &mxcsr::ALL.to_le_bytes());
}

/// MXCSR of the area, or #GP for bits that do not exist.
fn read_mxcsr(area: &[u8]) -> Exec<u32> {
    let value = u32::from_le_bytes(get(area, at::MXCSR));
    if value & !mxcsr::ALL != 0 {
        return Err(GP0);
    }
    Ok(value)
}

fn write_xmm(fpu: &Fpu, form: Form, area: &mut [u8]) {
    for (n, xmm) in fpu.xmm[..form.xmm_count].iter().enumerate() {
        put(area, at::XMM + 16 * n, &xmm.to_le_bytes());
    }
}

fn read_xmm(fpu: &mut Fpu, form: Form, area: &[u8]) {
    for (n, xmm) in fpu.xmm[..form.xmm_count].iter_mut().enumerate() {
        *xmm = u128::from_le_bytes(get(area, at::XMM + 16 * n));
    }
}

/// The components not in their initial configuration: XINUSE.
fn in_use(fpu: &Fpu, form: Form) -> u64 {
    let x87_initial = fpu.control == CONTROL_DEFAULT
        && (fpu.status, fpu.tag, fpu.opcode) == (0, 0, 0)
        && (fpu.instruction, fpu.operand) == (0, 0)
        && fpu.regs == [(0, 0); 8];
    let sse_initial = fpu.xmm[..form.xmm_count].iter().all(|&xmm| xmm == 0);
    (if x87_initial { 0 } else { component::X87 }) | if sse_initial { 0 } else { component::SSE }
}

/// Linear address of the area, after the checks that come before any page is looked at.
fn area(x: &Ctx, i: &Instruction, size: usize, align: u64, access: Access) -> Exec<u64> {
    let (seg, offset) = x.address(i);
    let linear = x.linear(seg, offset, size as u64, access)?;
    if linear & (align - 1) != 0 {
        return Err(GP0);
    }
    Ok(linear)
}

pub(crate) fn fxsave(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_x87()?;
    let form = Form::of(x, i);
    let linear = area(x, i, LEGACY, 16, Access::Write)?;
    x.probe_write(linear, LEGACY as u64)?;
    let mut image: [u8; LEGACY] = x.load(linear)?;
    write_x87(&x.cpu.fpu, form, &mut image);
    write_mxcsr(&x.cpu.fpu, &mut image);
    write_xmm(&x.cpu.fpu, form, &mut image);
    x.store(linear, image)
}

pub(crate) fn fxrstor(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_x87()?;
    let form = Form::of(x, i);
    let linear = area(x, i, LEGACY, 16, Access::Read)?;
    let image: [u8; LEGACY] = x.load(linear)?;
    x.cpu.fpu.mxcsr = read_mxcsr(&image)?;
    read_x87(&mut x.cpu.fpu, form, &image);
    read_xmm(&mut x.cpu.fpu, form, &image);
    Ok(())
}

/// Checks common to the family; the components asked for (RFBM).
fn requested(x: &Ctx, supervisor: bool) -> Exec<u64> {
    if x.cpu.cr4 & cr::CR4_OSXSAVE == 0 {
        return Err(UD);
    }
    if x.cpu.cr0 & cr::CR0_TS != 0 {
        return Err(Fault::DeviceNotAvailable.into());
    }
    if supervisor && x.cpu.cpl != 0 {
        return Err(GP0);
    }
    // No supervisor component exists, so IA32_XSS adds nothing.
    let asked = x.cpu.gpr[reg::RDX] << 32 | x.cpu.gpr[reg::RAX] & 0xffff_ffff;
    Ok(asked & x.cpu.fpu.xcr0)
}

/// XSAVE, XSAVEOPT, XSAVEC, XSAVES.
pub(crate) fn xsave(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic::*;
    let form = Form::of(x, i);
    let name = i.mnemonic();
    let compacted = matches!(name, Xsavec | Xsavec64 | Xsaves | Xsaves64);
    let asked = requested(x, matches!(name, Xsaves | Xsaves64))?;
    let linear = area(x, i, AREA, 64, Access::Write)?;
    x.probe_write(linear, AREA as u64)?;
    let mut image: [u8; AREA] = x.load(linear)?;
    let fpu = &x.cpu.fpu;
    let mut used = in_use(fpu, form);
    if compacted && fpu.mxcsr != mxcsr::DEFAULT {
        used |= component::SSE;
    }
    let saved = if matches!(name, Xsave | Xsave64) {
        asked
    } else {
        asked & used
    };
    if saved & component::X87 != 0 {
        write_x87(fpu, form, &mut image);
    }
    if saved & component::SSE != 0 {
        write_xmm(fpu, form, &mut image);
    }
    let mxcsr_saved = if compacted { saved } else { asked };
    if mxcsr_saved & component::SSE != 0 {
        write_mxcsr(fpu, &mut image);
    }
    if compacted {
        put(&mut image, at::XSTATE_BV, &(asked & used).to_le_bytes());
        put(&mut image, at::XCOMP_BV, &(asked | COMPACTED).to_le_bytes());
    } else {
        let old = u64::from_le_bytes(get(&image, at::XSTATE_BV));
        let new = old & !asked | asked & used;
        put(&mut image, at::XSTATE_BV, &new.to_le_bytes());
    }
    x.store(linear, image)
}

/// XRSTOR, XRSTORS.
pub(crate) fn xrstor(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic::*;
    let form = Form::of(x, i);
    let supervisor = matches!(i.mnemonic(), Xrstors | Xrstors64);
    let asked = requested(x, supervisor)?;
    let linear = area(x, i, AREA, 64, Access::Read)?;
    let image: [u8; AREA] = x.load(linear)?;
    let present = u64::from_le_bytes(get(&image, at::XSTATE_BV));
    let layout = u64::from_le_bytes(get(&image, at::XCOMP_BV));
    let compacted = layout & COMPACTED != 0;
    let zero = |from: usize, to: usize| image[from..to].iter().all(|&byte| byte == 0);
    let xcr0 = x.cpu.fpu.xcr0;
    let valid = if compacted {
        x.cpu.model.has(Feature::Xsavec)
            && layout & !COMPACTED & !xcr0 == 0
            && present & !layout == 0
            && zero(at::XCOMP_BV + 8, AREA)
    } else {
        !supervisor && present & !xcr0 == 0 && zero(at::XCOMP_BV, at::XCOMP_BV + 16)
    };
    if !valid {
        return Err(GP0);
    }
    let restored = asked & present;
    // The standard form loads MXCSR even where the registers are set to their initial values.
    let mxcsr_from = if compacted { restored } else { asked };
    let mxcsr = if mxcsr_from & component::SSE != 0 {
        read_mxcsr(&image)?
    } else {
        mxcsr::DEFAULT
    };
    let fpu = &mut x.cpu.fpu;
    if restored & component::X87 != 0 {
        read_x87(fpu, form, &image);
    } else if asked & component::X87 != 0 {
        fpu.init_x87();
    }
    if asked & component::SSE != 0 {
        fpu.mxcsr = mxcsr;
        if restored & component::SSE != 0 {
            read_xmm(fpu, form, &image);
        } else {
            fpu.xmm[..form.xmm_count].fill(0);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fixture;
    use crate::trap::Trap;

    const AT: u64 = 0x8_0000;
    const XSAVE: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
    const XRSTOR: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
    const XSAVEOPT: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
    const XSAVEC: &[u8] = &[0x48, 0x0f, 0xc7, 0x23];
    const XSAVES: &[u8] = &[0x48, 0x0f, 0xc7, 0x2b];
    const XRSTORS: &[u8] = &[0x48, 0x0f, 0xc7, 0x1b];

    /// A machine with XSAVE on, both components in their initial state, RBX at the area.
    fn machine() -> Fixture {
        let mut f = Fixture::long();
        f.cpu.cr4 |= cr::CR4_OSFXSR | cr::CR4_OSXSAVE;
        f.cpu.refresh();
        f.cpu.fpu.init_x87();
        f.cpu.fpu.xmm = [0; 16];
        f.cpu.fpu.mxcsr = mxcsr::DEFAULT;
        f.cpu.fpu.xcr0 = component::X87 | component::SSE;
        f.cpu.gpr[reg::RAX] = !0;
        f.cpu.gpr[reg::RDX] = !0;
        f.cpu.gpr[reg::RBX] = AT;
        f
    }

    fn header(f: &Fixture) -> [u64; 3] {
        [0, 8, 16].map(|at| f.peek(AT + 512 + at))
    }

    #[test]
    fn the_standard_form_saves_all_and_says_what_was_in_use() {
        let mut f = machine();
        f.poke(AT + 512, 0x10);
        f.poke(AT + 160, 7);
        f.cpu.fpu.regs[0] = (1 << 63, 0x3fff);
        assert_eq!(f.execute(XSAVE), Ok(()));
        // A bit that was not asked for stays; SSE is saved although in its initial state.
        assert_eq!(header(&f), [0x11, 0, 0]);
        assert_eq!(f.peek(AT + 32), 1 << 63);
        assert_eq!((f.peek(AT + 160), f.peek32(AT + 24)), (0, mxcsr::DEFAULT));
        assert_eq!(f.peek32(AT + 28), mxcsr::ALL);
    }

    #[test]
    fn the_optimized_form_leaves_out_what_is_initial() {
        let mut f = machine();
        f.poke(AT + 160, 7);
        f.cpu.fpu.xmm[1] = 5;
        f.cpu.gpr[reg::RAX] = component::X87;
        assert_eq!(f.execute(XSAVEOPT), Ok(()));
        assert_eq!((header(&f), f.peek(AT + 160)), ([0, 0, 0], 7));
        f.cpu.gpr[reg::RAX] = component::SSE;
        assert_eq!(f.execute(XSAVEOPT), Ok(()));
        assert_eq!((header(&f), f.peek(AT + 176)), ([2, 0, 0], 5));
    }

    #[test]
    fn the_compacted_form_counts_a_changed_mxcsr_as_sse_in_use() {
        let mut f = machine();
        assert_eq!(f.execute(XSAVEC), Ok(()));
        assert_eq!(header(&f), [0, COMPACTED | 3, 0]);
        f.cpu.fpu.mxcsr |= 1;
        assert_eq!(f.execute(XSAVEC), Ok(()));
        assert_eq!(header(&f), [2, COMPACTED | 3, 0]);
    }

    #[test]
    fn saved_state_comes_back_and_the_rest_becomes_initial() {
        let mut f = machine();
        f.cpu.fpu.regs[0] = (1 << 63, 0x4000);
        f.cpu.fpu.mxcsr |= 1;
        assert_eq!(f.execute(XSAVES), Ok(()));
        let saved = f.cpu.fpu.save();
        f.cpu.fpu.xmm[3] = 9;
        f.cpu.fpu.control = 0x40;
        assert_eq!(f.execute(XRSTORS), Ok(()));
        assert_eq!(f.cpu.fpu.save(), saved);
        // Standard form: MXCSR is loaded although SSE is not there.
        let mut f = machine();
        f.poke(AT + 24, 0x1f81);
        f.cpu.fpu.xmm[3] = 9;
        f.cpu.fpu.control = 0x40;
        assert_eq!(f.execute(XRSTOR), Ok(()));
        assert_eq!((f.cpu.fpu.xmm[3], f.cpu.fpu.mxcsr), (0, 0x1f81));
        assert_eq!(f.cpu.fpu.control, CONTROL_DEFAULT);
    }

    #[test]
    fn malformed_headers_are_general_protection_faults() {
        let restore = |code: &[u8], present: u64, layout: u64, more: u64| {
            let mut f = machine();
            f.poke(AT + 24, mxcsr::DEFAULT.into());
            for (at, value) in [(512, present), (520, layout), (528, more)] {
                f.poke(AT + at, value);
            }
            f.execute(code)
        };
        assert_eq!(restore(XRSTOR, 3, 0, 0), Ok(()));
        assert_eq!(restore(XRSTOR, 4, 0, 0), Err(GP0));
        assert_eq!(restore(XRSTOR, 3, 3, 0), Err(GP0));
        assert_eq!(restore(XRSTOR, 3, 0, 1), Err(GP0));
        assert_eq!(restore(XRSTOR, 1, COMPACTED | 1, 0), Ok(()));
        assert_eq!(restore(XRSTOR, 3, COMPACTED | 1, 0), Err(GP0));
        assert_eq!(restore(XRSTOR, 1, COMPACTED | 5, 0), Err(GP0));
        assert_eq!(restore(XRSTOR, 1, COMPACTED | 1, 1), Err(GP0));
        assert_eq!(restore(XRSTORS, 3, 0, 0), Err(GP0));
        assert_eq!(restore(XRSTORS, 3, COMPACTED | 3, 0), Ok(()));
    }

    #[test]
    fn the_family_needs_osxsave_alignment_and_privilege() {
        let mut f = machine();
        f.cpu.gpr[reg::RBX] = AT + 16;
        assert_eq!(f.execute(XSAVE), Err(GP0));
        f.cpu.gpr[reg::RBX] = AT;
        f.cpu.cr0 |= cr::CR0_TS;
        assert_eq!(f.execute(XSAVE), Err(Fault::DeviceNotAvailable.into()));
        f.cpu.cr4 &= !cr::CR4_OSXSAVE;
        assert_eq!(f.execute(XSAVE), Err(UD));
        let mut f = machine();
        f.enter(3);
        assert_eq!(f.execute(XSAVES), Err(GP0));
        assert_eq!(f.execute(XRSTORS), Err(GP0));
    }

    #[test]
    fn reserved_mxcsr_bits_are_refused() {
        let mut f = machine();
        f.poke(AT + 24, 0x1_0000);
        assert_eq!(f.execute(&[0x0f, 0xae, 0x0b]), Err(GP0)); // FXRSTOR [RBX]
        let expected: Result<(), Trap> = Err(GP0);
        assert_eq!(f.execute(&[0x0f, 0xae, 0x53, 24]), expected); // LDMXCSR [RBX+24]
        f.poke(AT + 24, 0xffff);
        assert_eq!(f.execute(&[0x0f, 0xae, 0x53, 24]), Ok(()));
        assert_eq!(f.cpu.fpu.mxcsr, 0xffff);
    }
}
