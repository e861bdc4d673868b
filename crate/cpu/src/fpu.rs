//! The x87 and SSE registers as they run.

use crate::state::FpuState;

/// x87 and SSE state.
#[derive(Clone, Debug)]
pub(crate) struct Fpu {
    pub control: u16,
    pub status: u16,
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
    /// From the saved form.
    pub fn load(state: &FpuState) -> Fpu {
        let top = state.status >> 11 & 7;
        let mut regs = [(0, 0); 8];
        for (n, st) in state.st.iter().enumerate() {
            let [s0, s1, s2, s3, s4, s5, s6, s7, e0, e1] = *st;
            regs[(usize::from(top) + n) & 7] = (
                u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
                u16::from_le_bytes([e0, e1]),
            );
        }
        Fpu {
            control: state.control,
            status: state.status,
            tag: state.tag,
            opcode: state.opcode,
            instruction: state.instruction,
            operand: state.operand,
            instruction_selector: state.instruction_selector,
            operand_selector: state.operand_selector,
            regs,
            mxcsr: state.mxcsr,
            xmm: state.xmm,
            xcr0: state.xcr0,
        }
    }

    /// To the saved form.
    pub fn save(&self) -> FpuState {
        let top = self.status >> 11 & 7;
        let mut st = [[0; 10]; 8];
        for (n, st) in st.iter_mut().enumerate() {
            let (significand, exponent) = self.regs[(usize::from(top) + n) & 7];
            st[..8].copy_from_slice(&significand.to_le_bytes());
            st[8..].copy_from_slice(&exponent.to_le_bytes());
        }
        FpuState {
            control: self.control,
            status: self.status,
            tag: self.tag,
            opcode: self.opcode,
            instruction: self.instruction,
            operand: self.operand,
            instruction_selector: self.instruction_selector,
            operand_selector: self.operand_selector,
            st,
            mxcsr: self.mxcsr,
            xmm: self.xmm,
            xcr0: self.xcr0,
        }
    }
}
