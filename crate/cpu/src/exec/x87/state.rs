//! x87 control instructions and the environment in memory.

use iced_x86::{Code, Instruction};

use crate::fpu::{control_word, register_bytes, register_from_bytes, status};
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::{Exec, Fault, GP0};
use crate::vcpu::cr;

/// FWAIT.
pub(super) fn wait(x: &mut Ctx) -> Exec {
    const BOTH: u64 = cr::CR0_MP | cr::CR0_TS;
    if x.cpu.cr0 & BOTH == BOTH {
        return Err(Fault::DeviceNotAvailable.into());
    }
    x.pending_x87()
}

/// FNINIT.
pub(super) fn init(x: &mut Ctx) -> Exec {
    x.need_x87()?;
    x.cpu.fpu.init();
    Ok(())
}

/// FNCLEX.
pub(super) fn clear_exceptions(x: &mut Ctx) -> Exec {
    x.need_x87()?;
    x.cpu.fpu.status &=
        !(status::EXCEPTIONS | status::STACK_FAULT | status::SUMMARY | status::BUSY);
    Ok(())
}

/// FNSTCW.
pub(super) fn store_control(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_x87()?;
    x.set_operand(i, 0, x.cpu.fpu.control.into())
}

/// FLDCW.
pub(super) fn load_control(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_x87()?;
    x.pending_x87()?;
    let control = x.operand(i, 0)? as u16;
    x.cpu.fpu.control = control_word(control);
    x.cpu.fpu.summarize();
    Ok(())
}

/// FNSTSW.
pub(super) fn store_status(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_x87()?;
    x.set_operand(i, 0, x.cpu.fpu.status.into())
}

/// EMMS (Vol. 3A, "Effects of MMX Instructions on x87 FPU State").
pub(super) fn empty(x: &mut Ctx) -> Exec {
    x.need_mmx()?;
    x.cpu.fpu.status &= !status::TOP;
    x.cpu.fpu.tag = 0;
    Ok(())
}

/// LDMXCSR.
pub(super) fn load_mxcsr(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    let value = x.operand(i, 0)? as u32;
    if value & !crate::fpu::mxcsr::ALL != 0 {
        return Err(GP0);
    }
    x.cpu.fpu.mxcsr = value;
    Ok(())
}

/// STMXCSR.
pub(super) fn store_mxcsr(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_sse()?;
    x.set_operand(i, 0, x.cpu.fpu.mxcsr.into())
}

// ---- environment (Vol. 1, "Saving the x87 FPU's State with FSTENV/FNSTENV and FSAVE/FNSAVE") ----

/// Bytes of the 32-bit environment; the 16-bit one has half.
const ENVIRONMENT: usize = 28;

/// Whether the operand has the 16-bit form.
fn is_short(i: &Instruction) -> bool {
    matches!(
        i.code(),
        Code::Fnstenv_m14byte
            | Code::Fstenv_m14byte
            | Code::Fldenv_m14byte
            | Code::Fnsave_m94byte
            | Code::Fsave_m94byte
            | Code::Frstor_m94byte
    )
}

/// Whether pointers are kept as real-mode addresses.
fn is_real(x: &Ctx) -> bool {
    x.cpu.uses_paragraphs()
}

/// The environment as seven words of 32 bits, or of 16 for the short form.
fn environment(x: &Ctx, short: bool) -> [u32; 7] {
    let fpu = &x.cpu.fpu;
    let (ip, dp) = (fpu.instruction as u32, fpu.operand as u32);
    let opcode = u32::from(fpu.opcode);
    let words = [fpu.control, fpu.status, fpu.full_tag()].map(u32::from);
    // The selectors are deprecated and read as zero (CPUID.(7,0):EBX[13]).
    let pointers = match (is_real(x), short) {
        (false, true) => [ip & 0xffff, 0, dp & 0xffff, 0],
        (false, false) => [ip, opcode << 16, dp, 0],
        (true, true) => [
            ip & 0xffff,
            ip >> 4 & 0xf000 | opcode,
            dp & 0xffff,
            dp >> 4 & 0xf000,
        ],
        (true, false) => [
            ip & 0xffff,
            ip >> 4 & 0x0fff_f000 | opcode,
            dp & 0xffff,
            dp >> 4 & 0x0fff_f000,
        ],
    };
    let mut all = [0; 7];
    all[..3].copy_from_slice(&words);
    all[3..].copy_from_slice(&pointers);
    if !short {
        // Unused halves are stored as ones.
        for n in [0, 1, 2, 6] {
            all[n] |= 0xffff_0000;
        }
        if is_real(x) {
            all[3] |= 0xffff_0000;
            all[5] |= 0xffff_0000;
            all[6] &= 0x0fff_ffff;
        }
    }
    all
}

fn set_environment(x: &mut Ctx, short: bool, words: [u32; 7]) {
    let real = is_real(x);
    let fpu = &mut x.cpu.fpu;
    fpu.control = control_word(words[0] as u16);
    fpu.status = words[1] as u16;
    fpu.set_full_tag(words[2] as u16);
    let (ip, dp, opcode) = match (real, short) {
        (false, true) => (words[3], words[5], 0),
        (false, false) => (words[3], words[5], words[4] >> 16),
        (true, true) => (
            words[3] | (words[4] & 0xf000) << 4,
            words[5] | (words[6] & 0xf000) << 4,
            words[4],
        ),
        (true, false) => (
            words[3] & 0xffff | (words[4] & 0x0fff_f000) << 4,
            words[5] & 0xffff | (words[6] & 0x0fff_f000) << 4,
            words[4],
        ),
    };
    fpu.instruction = ip.into();
    fpu.operand = dp.into();
    fpu.opcode = opcode as u16 & 0x7ff;
    fpu.instruction_selector = 0;
    fpu.operand_selector = 0;
    fpu.summarize();
}

fn pack(words: [u32; 7], short: bool) -> ([u8; ENVIRONMENT], usize) {
    let width = if short { 2 } else { 4 };
    let mut bytes = [0; ENVIRONMENT];
    for (to, word) in bytes.chunks_mut(width).zip(words) {
        to.copy_from_slice(&word.to_le_bytes()[..width]);
    }
    (bytes, 7 * width)
}

fn unpack(bytes: &[u8], short: bool) -> [u32; 7] {
    let width = if short { 2 } else { 4 };
    core::array::from_fn(|n| {
        let mut word = [0; 4];
        word[..width].copy_from_slice(&bytes[n * width..][..width]);
        u32::from_le_bytes(word)
    })
}

fn base(x: &Ctx, i: &Instruction, size: usize, access: Access) -> Exec<u64> {
    let (seg, offset) = x.address(i);
    x.linear(seg, offset, size as u64, access)
}

/// FNSTENV: stores the environment, then masks all exceptions.
pub(super) fn store_environment(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_x87()?;
    let short = is_short(i);
    let (bytes, size) = pack(environment(x, short), short);
    let linear = base(x, i, size, Access::Write)?;
    if short {
        let mut half = [0; ENVIRONMENT / 2];
        half.copy_from_slice(&bytes[..ENVIRONMENT / 2]);
        x.store(linear, half)?;
    } else {
        x.store(linear, bytes)?;
    }
    x.cpu.fpu.control |= status::EXCEPTIONS;
    x.cpu.fpu.summarize();
    Ok(())
}

/// FLDENV.
pub(super) fn load_environment(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_x87()?;
    x.pending_x87()?;
    let short = is_short(i);
    let words = if short {
        let linear = base(x, i, ENVIRONMENT / 2, Access::Read)?;
        unpack(&x.load::<{ ENVIRONMENT / 2 }>(linear)?, true)
    } else {
        let linear = base(x, i, ENVIRONMENT, Access::Read)?;
        unpack(&x.load::<ENVIRONMENT>(linear)?, false)
    };
    set_environment(x, short, words);
    Ok(())
}

/// FNSAVE: environment and registers, then FNINIT.
pub(super) fn save(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_x87()?;
    let short = is_short(i);
    let (environment, size) = pack(environment(x, short), short);
    let linear = base(x, i, size + 80, Access::Write)?;
    let mut image = [0; ENVIRONMENT + 80];
    image[..size].copy_from_slice(&environment[..size]);
    for (n, to) in image[size..].chunks_exact_mut(10).take(8).enumerate() {
        to.copy_from_slice(&register_bytes(x.cpu.fpu.st(n)));
    }
    if short {
        let mut half = [0; ENVIRONMENT / 2 + 80];
        half.copy_from_slice(&image[..ENVIRONMENT / 2 + 80]);
        x.store(linear, half)?;
    } else {
        x.store(linear, image)?;
    }
    x.cpu.fpu.init();
    Ok(())
}

/// FRSTOR.
pub(super) fn restore(x: &mut Ctx, i: &Instruction) -> Exec {
    x.need_x87()?;
    x.pending_x87()?;
    let short = is_short(i);
    let size = if short { ENVIRONMENT / 2 } else { ENVIRONMENT };
    let linear = base(x, i, size + 80, Access::Read)?;
    let mut image = [0; ENVIRONMENT + 80];
    if short {
        let half: [u8; ENVIRONMENT / 2 + 80] = x.load(linear)?;
        image[..half.len()].copy_from_slice(&half);
    } else {
        image = x.load(linear)?;
    }
    set_environment(x, short, unpack(&image, short));
    for (n, from) in image[size..].chunks_exact(10).take(8).enumerate() {
        let mut register = [0; 10];
        register.copy_from_slice(from);
        x.cpu.fpu.set_st(n, register_from_bytes(register));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::testing::Fixture;
    use crate::vcpu::reg;

    #[test]
    fn the_environment_of_real_mode_has_a_linear_address_and_the_opcode() {
        let mut f = Fixture::real();
        f.cpu.fpu.init();
        f.cpu.fpu.instruction = 0x1_2345;
        f.cpu.fpu.operand = 0x6_789a;
        f.cpu.fpu.opcode = 0x5f1;
        f.cpu.gpr[reg::RBX] = 0x200;
        f.execute(&[0xd9, 0x37]).unwrap(); // FNSTENV [BX]
        let words: [u16; 7] = core::array::from_fn(|n| f.peek16(0x200 + 2 * n as u64));
        assert_eq!(words, [0x37f, 0, 0xffff, 0x2345, 0x15f1, 0x789a, 0x6000]);
        f.cpu.fpu.init();
        f.execute(&[0xd9, 0x27]).unwrap(); // FLDENV [BX]
        let fpu = &f.cpu.fpu;
        assert_eq!(
            (fpu.instruction, fpu.operand, fpu.opcode),
            (0x1_2345, 0x6_789a, 0x5f1)
        );
    }

    #[test]
    fn storing_the_environment_masks_all_exceptions() {
        let mut f = Fixture::long();
        f.cpu.fpu.init();
        f.cpu.fpu.control = 0x340;
        f.cpu.fpu.status = 0x8081;
        f.cpu.gpr[reg::RBX] = 0x8_0000;
        f.execute(&[0xd9, 0x33]).unwrap();
        assert_eq!(
            (f.peek32(0x8_0000), f.peek32(0x8_0004)),
            (0xffff_0340, 0xffff_8081)
        );
        assert_eq!((f.cpu.fpu.control, f.cpu.fpu.status), (0x37f, 1));
    }

    #[test]
    fn saved_registers_return_and_saving_initializes() {
        let mut f = Fixture::long();
        f.cpu.fpu.init();
        f.execute(&[0xd9, 0xeb]).unwrap(); // FLDPI
        f.execute(&[0xd9, 0xe8]).unwrap(); // FLD1
        let before = f.cpu.fpu.save();
        f.cpu.gpr[reg::RBX] = 0x8_0000;
        f.execute(&[0xdd, 0x33]).unwrap(); // FNSAVE [RBX]
        assert_eq!((f.cpu.fpu.tag, f.cpu.fpu.status), (0, 0));
        f.execute(&[0xdd, 0x23]).unwrap(); // FRSTOR [RBX]
        assert_eq!(f.cpu.fpu.save(), before);
    }
}
