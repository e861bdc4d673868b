//! The x87, MMX and SSE registers as they run, and whether an instruction may use them.

use crate::mem::Ctx;
use crate::state::FpuState;
use crate::trap::{Exec, Fault, Trap, UD};
use crate::vcpu::cr;

/// Exception bits, the same in the x87 status and control words and in the halves of MXCSR.
pub(crate) mod exception {
    pub const INVALID: u8 = 1;
    pub const DENORMAL: u8 = 2;
    pub const DIVIDE: u8 = 4;
    pub const OVERFLOW: u8 = 8;
    pub const UNDERFLOW: u8 = 16;
    pub const PRECISION: u8 = 32;
    /// Those found before anything is computed: no result exists when one is unmasked.
    pub const BEFORE: u8 = INVALID | DENORMAL | DIVIDE;
    pub const ALL: u8 = 0x3f;
}

/// Status word bits (Vol. 1, "x87 FPU Status Register").
pub(crate) mod status {
    pub const EXCEPTIONS: u16 = 0x3f;
    pub const STACK_FAULT: u16 = 1 << 6;
    pub const SUMMARY: u16 = 1 << 7;
    pub const C0: u16 = 1 << 8;
    pub const C1: u16 = 1 << 9;
    pub const C2: u16 = 1 << 10;
    pub const TOP: u16 = 7 << 11;
    pub const C3: u16 = 1 << 14;
    pub const BUSY: u16 = 1 << 15;
}

/// MXCSR bits (Vol. 1, "MXCSR Control and Status Register").
pub(crate) mod mxcsr {
    pub const DAZ: u32 = 1 << 6;
    pub const MASK_SHIFT: u32 = 7;
    pub const ROUNDING_SHIFT: u32 = 13;
    pub const FTZ: u32 = 1 << 15;
    /// Bits that exist: MXCSR_MASK.
    pub const ALL: u32 = 0xffff;
    pub const DEFAULT: u32 = 0x1f80;
}

/// XCR0 and XSTATE_BV bits of the components that exist.
pub(crate) mod component {
    pub const X87: u64 = 1;
    pub const SSE: u64 = 2;
}

/// Control word after FNINIT.
pub(crate) const CONTROL_DEFAULT: u16 = 0x37f;

/// x87 and SSE state.
#[derive(Clone, Debug)]
pub(crate) struct Fpu {
    pub control: u16,
    /// Status word, TOP included.
    pub status: u16,
    /// Bit set = physical register in use.
    pub tag: u8,
    pub opcode: u16,
    pub instruction: u64,
    pub operand: u64,
    pub instruction_selector: u16,
    pub operand_selector: u16,
    /// Physical registers R0-R7: significand, then sign and exponent.
    pub regs: [(u64, u16); 8],
    pub mxcsr: u32,
    pub xmm: [u128; 16],
    pub xcr0: u64,
}

impl Fpu {
    /// The saved form.
    pub fn save(&self) -> FpuState {
        FpuState {
            control: self.control,
            status: self.status,
            tag: self.tag,
            opcode: self.opcode,
            instruction: self.instruction,
            operand: self.operand,
            instruction_selector: self.instruction_selector,
            operand_selector: self.operand_selector,
            st: core::array::from_fn(|n| register_bytes(self.st(n))),
            mxcsr: self.mxcsr,
            xmm: self.xmm,
            xcr0: self.xcr0,
        }
    }

    /// The running form of a saved state. A summary bit that does not fit the exceptions is
    /// corrected, as by FXRSTOR.
    pub fn load(state: &FpuState) -> Fpu {
        let mut fpu = Fpu {
            control: state.control,
            status: state.status,
            tag: state.tag,
            opcode: state.opcode,
            instruction: state.instruction,
            operand: state.operand,
            instruction_selector: state.instruction_selector,
            operand_selector: state.operand_selector,
            regs: [(0, 0); 8],
            mxcsr: state.mxcsr,
            xmm: state.xmm,
            xcr0: state.xcr0,
        };
        for (n, bytes) in state.st.iter().enumerate() {
            fpu.set_st(n, register_from_bytes(*bytes));
        }
        fpu.summarize();
        fpu
    }

    // ---- the stack ----

    /// Physical number of ST(0).
    pub fn top(&self) -> usize {
        (self.status >> 11 & 7) as usize
    }

    pub fn set_top(&mut self, top: usize) {
        self.status = self.status & !status::TOP | (top as u16 & 7) << 11;
    }

    /// Physical number of ST(`n`).
    pub fn physical(&self, n: usize) -> usize {
        (self.top() + n) & 7
    }

    /// Significand, then sign and exponent of ST(`n`), whatever its tag.
    pub fn st(&self, n: usize) -> (u64, u16) {
        self.regs[self.physical(n)]
    }

    /// Replaces the bits of ST(`n`), not its tag.
    pub fn set_st(&mut self, n: usize, value: (u64, u16)) {
        let n = self.physical(n);
        self.regs[n] = value;
    }

    pub fn is_empty(&self, n: usize) -> bool {
        self.tag >> self.physical(n) & 1 == 0
    }

    pub fn set_empty(&mut self, n: usize, empty: bool) {
        let bit = 1 << self.physical(n);
        if empty {
            self.tag &= !bit;
        } else {
            self.tag |= bit;
        }
    }

    /// The state FNINIT leaves. Data registers keep their bits.
    pub fn init(&mut self) {
        self.control = CONTROL_DEFAULT;
        self.status = 0;
        self.tag = 0;
        self.opcode = 0;
        self.instruction = 0;
        self.operand = 0;
        self.instruction_selector = 0;
        self.operand_selector = 0;
    }

    /// The initial configuration of the x87 component (XRSTOR, Vol. 1, "Processor Tracking of
    /// XSAVE-Managed State").
    pub fn init_x87(&mut self) {
        self.init();
        self.regs = [(0, 0); 8];
    }

    // ---- exceptions ----

    /// Recomputes the summary and busy bits after a change of the control or status word.
    pub fn summarize(&mut self) {
        if self.status & !self.control & status::EXCEPTIONS != 0 {
            self.status |= status::SUMMARY | status::BUSY;
        } else {
            self.status &= !(status::SUMMARY | status::BUSY);
        }
    }

    // ---- MMX ----

    /// MMX register `n`.
    pub fn mm(&self, n: usize) -> u64 {
        self.regs[n].0
    }

    /// Writes MMX register `n`, which makes a NaN or infinity of the x87 register.
    pub fn set_mm(&mut self, n: usize, value: u64) {
        self.regs[n] = (value, 0xffff);
    }

    /// What every MMX instruction but EMMS does to the stack: TOP 0, all registers in use.
    pub fn enter_mmx(&mut self) {
        self.status &= !status::TOP;
        self.tag = 0xff;
    }

    /// Tag word in the two-bit form (Vol. 1, "x87 FPU Tag Word").
    pub fn full_tag(&self) -> u16 {
        let mut tags = 0;
        for n in 0..8 {
            let (significand, exponent) = self.regs[n];
            let tag = if self.tag >> n & 1 == 0 {
                3
            } else if exponent & 0x7fff == 0x7fff {
                2
            } else if exponent & 0x7fff == 0 {
                if significand == 0 { 1 } else { 2 }
            } else if significand >> 63 == 0 {
                2
            } else {
                0
            };
            tags |= tag << (2 * n);
        }
        tags
    }

    /// Sets the tags from the two-bit form: only empty or not is kept.
    pub fn set_full_tag(&mut self, tags: u16) {
        self.tag = (0..8).fold(0, |all, n| all | u8::from(tags >> (2 * n) & 3 != 3) << n);
    }
}

/// A control word as the register holds it: bit 6 is always set, 7 and 13 up never.
pub(crate) fn control_word(value: u16) -> u16 {
    value & 0x1f3f | 0x40
}

/// The 80 bits of a register in memory order.
pub(crate) fn register_bytes((significand, exponent): (u64, u16)) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    bytes
}

/// A register from its 80 bits in memory order.
pub(crate) fn register_from_bytes(bytes: [u8; 10]) -> (u64, u16) {
    let (significand, exponent) = bytes.split_at(8);
    (
        u64::from_le_bytes(significand.try_into().unwrap_or_default()),
        u16::from_le_bytes(exponent.try_into().unwrap_or_default()),
    )
}

impl Ctx<'_> {
    /// Faults unless SSE instructions are usable (Vol. 2, "Exception Class" tables).
    #[inline]
    pub fn need_sse(&self) -> Exec {
        if self.cpu.cr0 & (cr::CR0_EM | cr::CR0_TS) == 0 && self.cpu.cr4 & cr::CR4_OSFXSR != 0 {
            return Ok(());
        }
        if self.cpu.cr0 & cr::CR0_EM != 0 || self.cpu.cr4 & cr::CR4_OSFXSR == 0 {
            return Err(UD);
        }
        Err(Fault::DeviceNotAvailable.into())
    }

    /// Faults unless MMX instructions are usable, or for a pending x87 exception.
    pub fn need_mmx(&self) -> Exec {
        if self.cpu.cr0 & cr::CR0_EM != 0 {
            return Err(UD);
        }
        if self.cpu.cr0 & cr::CR0_TS != 0 {
            return Err(Fault::DeviceNotAvailable.into());
        }
        self.pending_x87()
    }

    /// Faults unless x87 instructions are usable.
    pub fn need_x87(&self) -> Exec {
        if self.cpu.cr0 & (cr::CR0_EM | cr::CR0_TS) != 0 {
            return Err(Fault::DeviceNotAvailable.into());
        }
        Ok(())
    }

    /// Reports an unmasked x87 exception of an earlier instruction, as every waiting
    /// instruction does first.
    pub fn pending_x87(&self) -> Exec {
        if self.cpu.fpu.status & status::SUMMARY == 0 {
            return Ok(());
        }
        if self.cpu.cr0 & cr::CR0_NE != 0 {
            return Err(Fault::X87.into());
        }
        Err(Trap::Unimplemented("x87 exception with CR0.NE clear"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fpu() -> Fpu {
        Fpu::load(&FpuState {
            control: CONTROL_DEFAULT,
            status: 0,
            tag: 0,
            opcode: 0,
            instruction: 0,
            operand: 0,
            instruction_selector: 0,
            operand_selector: 0,
            st: [[0; 10]; 8],
            mxcsr: mxcsr::DEFAULT,
            xmm: [0; 16],
            xcr0: component::X87,
        })
    }

    #[test]
    fn saved_registers_are_in_stack_order() {
        let mut fpu = fpu();
        fpu.set_top(3);
        fpu.set_st(0, (1 << 63, 0x3fff));
        let state = fpu.save();
        assert_eq!(state.st[0], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        assert_eq!(Fpu::load(&state).save(), state);
        assert_eq!(fpu.regs[3], (1 << 63, 0x3fff));
    }

    #[test]
    fn full_tags_tell_valid_zero_special_and_empty() {
        let mut fpu = fpu();
        fpu.tag = 0b0111;
        fpu.regs[0] = (1 << 63, 0x3fff);
        fpu.regs[2] = (0, 0x7fff);
        assert_eq!(fpu.full_tag(), 0xffe4);
        fpu.set_full_tag(0xffe4);
        assert_eq!(fpu.tag, 0b0111);
    }

    use crate::testing::Fixture;

    const NOT_AVAILABLE: Exec = Err(Trap::Fault(Fault::DeviceNotAvailable));
    const UNDEFINED: Exec = Err(UD);

    fn with_control(set: u64, clear: u64, cr4: u64, code: &[u8]) -> Exec {
        let mut f = Fixture::long();
        f.cpu.cr0 = f.cpu.cr0 & !(cr::CR0_EM | cr::CR0_TS | clear) | cr::CR0_NE | set;
        f.cpu.cr4 = cr::CR4_PAE | cr4;
        f.cpu.refresh();
        f.execute(code)
    }

    #[test]
    fn sse_needs_osfxsr_and_neither_emulation_nor_a_task_switch() {
        const XORPS: &[u8] = &[0x0f, 0x57, 0xc0];
        let run = |set, cr4| with_control(set, 0, cr4, XORPS);
        assert_eq!(run(0, cr::CR4_OSFXSR), Ok(()));
        assert_eq!(run(0, 0), UNDEFINED);
        assert_eq!(run(cr::CR0_EM, cr::CR4_OSFXSR), UNDEFINED);
        assert_eq!(run(cr::CR0_TS, cr::CR4_OSFXSR), NOT_AVAILABLE);
        assert_eq!(run(cr::CR0_EM | cr::CR0_TS, cr::CR4_OSFXSR), UNDEFINED);
    }

    #[test]
    fn sse_moves_are_hot_operations_where_sse_is_on() {
        let mut f = Fixture::long();
        let mut ready = |cr0, cr4| {
            (f.cpu.cr0, f.cpu.cr4) = (cr::CR0_PE | cr::CR0_PG | cr0, cr::CR4_PAE | cr4);
            f.cpu.refresh();
            f.cpu.sse_ready
        };
        assert!(ready(0, cr::CR4_OSFXSR));
        assert!(!ready(0, 0));
        assert!(!ready(cr::CR0_EM, cr::CR4_OSFXSR));
        assert!(!ready(cr::CR0_TS, cr::CR4_OSFXSR));
    }

    #[test]
    fn mmx_needs_no_osfxsr() {
        const PXOR: &[u8] = &[0x0f, 0xef, 0xc0];
        assert_eq!(with_control(0, 0, 0, PXOR), Ok(()));
        assert_eq!(with_control(cr::CR0_EM, 0, 0, PXOR), UNDEFINED);
        assert_eq!(with_control(cr::CR0_TS, 0, 0, PXOR), NOT_AVAILABLE);
    }

    #[test]
    fn x87_is_not_available_when_emulated_and_wait_only_when_monitored() {
        const FLD1: &[u8] = &[0xd9, 0xe8];
        const FNSTSW: &[u8] = &[0xdf, 0xe0];
        const WAIT: &[u8] = &[0x9b];
        for code in [FLD1, FNSTSW] {
            assert_eq!(with_control(cr::CR0_EM, 0, 0, code), NOT_AVAILABLE);
            assert_eq!(with_control(cr::CR0_TS, 0, 0, code), NOT_AVAILABLE);
        }
        assert_eq!(
            with_control(cr::CR0_EM | cr::CR0_TS, cr::CR0_MP, 0, WAIT),
            Ok(())
        );
        assert_eq!(
            with_control(cr::CR0_TS | cr::CR0_MP, 0, 0, WAIT),
            NOT_AVAILABLE
        );
    }

    #[test]
    fn an_unmasked_x87_exception_waits_for_the_next_waiting_instruction() {
        let mut f = Fixture::long();
        f.cpu.cr0 |= cr::CR0_NE;
        f.cpu.fpu.init();
        f.cpu.fpu.control = CONTROL_DEFAULT & !1;
        assert_eq!(f.execute(&[0xd9, 0xfa]), Ok(())); // FSQRT of an empty register
        assert_eq!(f.cpu.fpu.status & 0x80ff, 0x80c1);
        let pending = Err(Trap::Fault(Fault::X87));
        for waiting in [
            &[0xd9, 0xe8][..],
            &[0x9b],
            &[0x0f, 0xef, 0xc0],
            &[0x0f, 0x77],
        ] {
            assert_eq!(f.execute(waiting), pending, "{waiting:x?}");
        }
        f.cpu.cr0 &= !cr::CR0_NE;
        assert!(matches!(f.execute(&[0x9b]), Err(Trap::Unimplemented(_))));
        assert_eq!(f.execute(&[0xdb, 0xe2]), Ok(())); // FNCLEX
        assert_eq!(f.execute(&[0x9b]), Ok(()));
    }

    #[test]
    fn an_unmasked_simd_exception_is_xm_or_ud_and_writes_nothing() {
        const DIVSS: &[u8] = &[0xf3, 0x0f, 0x5e, 0xc1];
        let mut f = Fixture::long();
        f.cpu.cr4 |= cr::CR4_OSFXSR;
        f.cpu.fpu.mxcsr = mxcsr::DEFAULT & !(1 << 9);
        f.cpu.fpu.xmm[0] = 0x3f80_0000;
        f.cpu.fpu.xmm[1] = 0;
        assert_eq!(f.execute(DIVSS), UNDEFINED);
        f.cpu.cr4 |= cr::CR4_OSXMMEXCPT;
        assert_eq!(f.execute(DIVSS), Err(Trap::Fault(Fault::Simd)));
        assert_eq!(f.cpu.fpu.xmm[0], 0x3f80_0000);
        assert_eq!(f.cpu.fpu.mxcsr & 0x3f, 4);
    }
}
