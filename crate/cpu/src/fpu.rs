//! The x87 and SSE registers as they run.

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
