//! One instruction with everything it can read, and what came of it.

use hypernest_cpu::FpuState;

use crate::layout::{CODE, ENTRY, STACK};

/// The code segment a case runs in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// 64-bit mode.
    #[default]
    Long,
    /// Compatibility mode with a 32-bit code segment.
    Compat,
}

impl Mode {
    /// Operand and address default of the mode: 64 or 32.
    pub fn bits(self) -> u32 {
        match self {
            Mode::Long => 64,
            Mode::Compat => 32,
        }
    }

    /// The selector of the mode's user code segment (Linux' numbers).
    pub fn code_selector(self) -> u16 {
        match self {
            Mode::Long => 0x33,
            Mode::Compat => 0x23,
        }
    }
}

/// The selector of the flat user data segment (Linux' number).
pub const USER_DATA: u16 = 0x2b;

/// Status and control flags by name.
pub const FLAGS: [(&str, u32); 13] = [
    ("cf", 0),
    ("pf", 2),
    ("af", 4),
    ("zf", 6),
    ("sf", 7),
    ("tf", 8),
    ("if", 9),
    ("df", 10),
    ("of", 11),
    ("nt", 14),
    ("rf", 16),
    ("ac", 18),
    ("id", 21),
];

/// CF.
pub const CF: u64 = 1 << 0;
/// PF.
pub const PF: u64 = 1 << 2;
/// AF.
pub const AF: u64 = 1 << 4;
/// ZF.
pub const ZF: u64 = 1 << 6;
/// SF.
pub const SF: u64 = 1 << 7;
/// TF.
pub const TF: u64 = 1 << 8;
/// DF.
pub const DF: u64 = 1 << 10;
/// OF.
pub const OF: u64 = 1 << 11;
/// NT.
pub const NT: u64 = 1 << 14;
/// RF.
pub const RF: u64 = 1 << 16;
/// AC.
pub const AC: u64 = 1 << 18;
/// ID.
pub const ID: u64 = 1 << 21;
/// The six status flags.
pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// All a user-mode instruction sees beside memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Selectors ES, CS, SS, DS, FS, GS, in the order of their encoding.
    pub selectors: [u16; 6],
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// x87 and SSE. The legacy selectors and XCR0 are not compared.
    pub fpu: FpuState,
}

impl UserState {
    /// The state a case text starts from: registers zero, stack in the middle, FNINIT.
    pub fn new(mode: Mode) -> UserState {
        let mut gpr = [0; 16];
        gpr[4] = STACK.start + STACK.len() / 2;
        UserState {
            gpr,
            rip: ENTRY,
            rflags: 0x202,
            selectors: match mode {
                Mode::Long => [0, mode.code_selector(), USER_DATA, 0, 0, 0],
                Mode::Compat => [
                    USER_DATA,
                    mode.code_selector(),
                    USER_DATA,
                    USER_DATA,
                    USER_DATA,
                    USER_DATA,
                ],
            },
            fs_base: 0,
            gs_base: 0,
            fpu: FpuState {
                control: 0x37f,
                status: 0,
                tag: 0,
                opcode: 0,
                instruction: 0,
                operand: 0,
                instruction_selector: 0,
                operand_selector: 0,
                st: [[0; 10]; 8],
                mxcsr: 0x1f80,
                xmm: [0; 16],
                xcr0: 0,
            },
        }
    }
}

/// Bytes at an address before the instruction. All other memory is zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Linear address; the bytes stay within mapped regions.
    pub address: u64,
    /// What is there.
    pub bytes: Vec<u8>,
}

/// One instruction with its inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Code segment.
    pub mode: Mode,
    /// The instruction, placed at the state's RIP. Bytes beyond the code region are cut off.
    pub code: Vec<u8>,
    /// Registers.
    pub state: UserState,
    /// Memory that is not zero. Later patches win.
    pub memory: Vec<Patch>,
}

impl Case {
    /// The bytes of the instruction that lie in the code region.
    pub fn mapped_code(&self) -> &[u8] {
        let room = CODE.end().saturating_sub(self.state.rip);
        &self.code[..self.code.len().min(room as usize)]
    }
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// At the next instruction boundary (or between two iterations of a REP).
    Done,
    /// An exception. `address` is CR2 of a page fault.
    Fault {
        /// Exception vector.
        vector: u8,
        /// CR2, for #PF.
        address: Option<u64>,
    },
    /// The engine has no such instruction yet.
    Unimplemented(&'static str),
}

/// What came of a case, memory apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How it ended.
    pub event: Event,
    /// Registers afterwards; at a fault, as the handler's frame shows them.
    pub state: UserState,
}

/// Something that executes cases.
pub trait Engine {
    /// For reports.
    fn name(&self) -> &'static str;
    /// Executes the case from scratch: nothing of an earlier case is left.
    fn run(&mut self, case: &Case) -> Outcome;
    /// The memory image after the last case, from [`crate::layout::IMAGE_DATA`] on.
    fn memory(&self) -> &[u8];
}

/// The data part of the memory image as a case starts with it.
pub fn initial_memory(case: &Case, image: &mut [u8]) {
    image.fill(0);
    for patch in &case.memory {
        for (i, byte) in patch.bytes.iter().enumerate() {
            let offset = crate::layout::image_offset(patch.address.wrapping_add(i as u64));
            if let Some(offset) = offset.and_then(|o| o.checked_sub(crate::layout::IMAGE_DATA)) {
                image[offset] = *byte;
            }
        }
    }
}
