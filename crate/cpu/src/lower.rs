//! From decoded instructions to compact operations.
//!
//! Common forms of 64-bit mode get an operation of their own; everything else becomes
//! [`Code::Cold`] and runs through `exec`. A hot operation may always be replaced by `Cold`.

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

use crate::block::Key;
use crate::block::{BlockId, NO_BLOCK};
use crate::mem::canonical;
use crate::model::Model;
use crate::quiet::{join_copies, quieten};
use crate::vcpu::{CodeSize, reg};

/// What an operation does. `R` register, `I` immediate, `M` memory, destination first, then the
/// width in bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Code {
    /// Through `exec::execute`.
    #[default]
    Cold,
    /// Not listed by CPUID: #UD.
    Undefined,
    /// A string instruction with a repeat prefix, the last of its block.
    Repeat,
    Nop,
    /// Before the first operation of a block: its RIP in `imm`, its offset in RAM in `disp` ([`GONE`] when it is no longer
    /// valid), its instructions (the ticks it takes) in `at`, its number in `link`.
    Head,
    /// After the last: the next RIP in `imm`.
    End,
    AddRr8,
    AddRi8,
    AddRm8,
    AddMr8,
    AddMi8,
    AddRr16,
    AddRi16,
    AddRm16,
    AddMr16,
    AddMi16,
    AddRr32,
    AddRi32,
    AddRm32,
    AddMr32,
    AddMi32,
    AddRr64,
    AddRi64,
    AddRm64,
    AddMr64,
    AddMi64,
    OrRr8,
    OrRi8,
    OrRm8,
    OrMr8,
    OrMi8,
    OrRr16,
    OrRi16,
    OrRm16,
    OrMr16,
    OrMi16,
    OrRr32,
    OrRi32,
    OrRm32,
    OrMr32,
    OrMi32,
    OrRr64,
    OrRi64,
    OrRm64,
    OrMr64,
    OrMi64,
    AdcRr8,
    AdcRi8,
    AdcRm8,
    AdcMr8,
    AdcMi8,
    AdcRr16,
    AdcRi16,
    AdcRm16,
    AdcMr16,
    AdcMi16,
    AdcRr32,
    AdcRi32,
    AdcRm32,
    AdcMr32,
    AdcMi32,
    AdcRr64,
    AdcRi64,
    AdcRm64,
    AdcMr64,
    AdcMi64,
    SbbRr8,
    SbbRi8,
    SbbRm8,
    SbbMr8,
    SbbMi8,
    SbbRr16,
    SbbRi16,
    SbbRm16,
    SbbMr16,
    SbbMi16,
    SbbRr32,
    SbbRi32,
    SbbRm32,
    SbbMr32,
    SbbMi32,
    SbbRr64,
    SbbRi64,
    SbbRm64,
    SbbMr64,
    SbbMi64,
    AndRr8,
    AndRi8,
    AndRm8,
    AndMr8,
    AndMi8,
    AndRr16,
    AndRi16,
    AndRm16,
    AndMr16,
    AndMi16,
    AndRr32,
    AndRi32,
    AndRm32,
    AndMr32,
    AndMi32,
    AndRr64,
    AndRi64,
    AndRm64,
    AndMr64,
    AndMi64,
    SubRr8,
    SubRi8,
    SubRm8,
    SubMr8,
    SubMi8,
    SubRr16,
    SubRi16,
    SubRm16,
    SubMr16,
    SubMi16,
    SubRr32,
    SubRi32,
    SubRm32,
    SubMr32,
    SubMi32,
    SubRr64,
    SubRi64,
    SubRm64,
    SubMr64,
    SubMi64,
    XorRr8,
    XorRi8,
    XorRm8,
    XorMr8,
    XorMi8,
    XorRr16,
    XorRi16,
    XorRm16,
    XorMr16,
    XorMi16,
    XorRr32,
    XorRi32,
    XorRm32,
    XorMr32,
    XorMi32,
    XorRr64,
    XorRi64,
    XorRm64,
    XorMr64,
    XorMi64,
    CmpRr8,
    CmpRi8,
    CmpRm8,
    CmpMr8,
    CmpMi8,
    CmpRr16,
    CmpRi16,
    CmpRm16,
    CmpMr16,
    CmpMi16,
    CmpRr32,
    CmpRi32,
    CmpRm32,
    CmpMr32,
    CmpMi32,
    CmpRr64,
    CmpRi64,
    CmpRm64,
    CmpMr64,
    CmpMi64,
    TestRr8,
    TestRi8,
    TestRm8,
    TestMr8,
    TestMi8,
    TestRr16,
    TestRi16,
    TestRm16,
    TestMr16,
    TestMi16,
    TestRr32,
    TestRi32,
    TestRm32,
    TestMr32,
    TestMi32,
    TestRr64,
    TestRi64,
    TestRm64,
    TestMr64,
    TestMi64,
    MovRr8,
    MovRi8,
    MovRm8,
    MovMr8,
    MovMi8,
    MovRr16,
    MovRi16,
    MovRm16,
    MovMr16,
    MovMi16,
    MovRr32,
    MovRi32,
    MovRm32,
    MovMr32,
    MovMi32,
    MovRr64,
    MovRi64,
    MovRm64,
    MovMr64,
    /// As the two before, with an address of a base and a displacement alone.
    MovRd64,
    MovDr64,
    MovMi64,
    MovzxRr8,
    MovzxRm8,
    MovzxRr16,
    MovzxRm16,
    Movsx32Rr8,
    Movsx32Rm8,
    Movsx32Rr16,
    Movsx32Rm16,
    Movsx64Rr8,
    Movsx64Rm8,
    Movsx64Rr16,
    Movsx64Rm16,
    Movsx64Rr32,
    Movsx64Rm32,
    Lea32,
    Lea64,
    IncR8,
    IncR32,
    IncR64,
    DecR8,
    DecR32,
    DecR64,
    IncM32,
    IncM64,
    DecM32,
    DecM64,
    NegR32,
    NegR64,
    NotR32,
    NotR64,
    ShlRi32,
    ShlRi64,
    ShrRi32,
    ShrRi64,
    SarRi32,
    SarRi64,
    ShlRc32,
    ShlRc64,
    ShrRc32,
    ShrRc64,
    SarRc32,
    SarRc64,
    RolRi32,
    RolRi64,
    RorRi32,
    RorRi64,
    ImulRr32,
    ImulRr64,
    ImulRm32,
    ImulRm64,
    ImulRri32,
    ImulRri64,
    XchgRr32,
    XchgRr64,
    BtRi32,
    BtRi64,
    BtRr32,
    BtRr64,
    BtsMi32,
    BtsMi64,
    BtrMi32,
    BtrMi64,
    CmpxchgMr32,
    CmpxchgMr64,
    XaddMr32,
    XaddMr64,
    /// Of AH, CH, DH or BH.
    TestHi8,
    AndHi8,
    /// Fused with the branch.
    TestHi8JE,
    TestHi8JNe,
    PushF,
    Cli,
    // Without their flags, which nobody reads: see `quiet`.
    QuietAddRr32,
    QuietAddRr64,
    QuietAddRi32,
    QuietAddRi64,
    QuietSubRr32,
    QuietSubRr64,
    QuietOrRr32,
    QuietOrRr64,
    QuietOrRi32,
    QuietOrRi64,
    QuietAndRr32,
    QuietAndRr64,
    QuietAndRi32,
    QuietAndRi64,
    QuietXorRr32,
    QuietXorRr64,
    QuietXorRi32,
    QuietXorRi64,
    QuietShlRi32,
    QuietShlRi64,
    QuietShrRi32,
    QuietShrRi64,
    QuietSarRi32,
    QuietSarRi64,
    Cdqe,
    Cwde,
    Cdq,
    Cqo,
    BswapR32,
    BswapR64,
    PushR,
    PushI,
    PushM,
    PopR,
    Leave,
    SetR,
    CmovR32,
    CmovR64,
    JmpRel,
    JmpR,
    JmpM,
    CallRel,
    CallR,
    CallM,
    Ret,
    JO,
    JNo,
    JB,
    JAe,
    JE,
    JNe,
    JBe,
    JA,
    JS,
    JNs,
    JP,
    JNp,
    JL,
    JGe,
    JLe,
    JG,
    // A comparison and the branch that follows it.
    CmpRr32JB,
    CmpRr32JAe,
    CmpRr32JE,
    CmpRr32JNe,
    CmpRr32JBe,
    CmpRr32JA,
    CmpRr32JS,
    CmpRr32JNs,
    CmpRr32JL,
    CmpRr32JGe,
    CmpRr32JLe,
    CmpRr32JG,
    CmpRr64JB,
    CmpRr64JAe,
    CmpRr64JE,
    CmpRr64JNe,
    CmpRr64JBe,
    CmpRr64JA,
    CmpRr64JS,
    CmpRr64JNs,
    CmpRr64JL,
    CmpRr64JGe,
    CmpRr64JLe,
    CmpRr64JG,
    CmpRi8JB,
    CmpRi8JAe,
    CmpRi8JE,
    CmpRi8JNe,
    CmpRi8JBe,
    CmpRi8JA,
    CmpRi8JS,
    CmpRi8JNs,
    CmpRi8JL,
    CmpRi8JGe,
    CmpRi8JLe,
    CmpRi8JG,
    CmpRi32JB,
    CmpRi32JAe,
    CmpRi32JE,
    CmpRi32JNe,
    CmpRi32JBe,
    CmpRi32JA,
    CmpRi32JS,
    CmpRi32JNs,
    CmpRi32JL,
    CmpRi32JGe,
    CmpRi32JLe,
    CmpRi32JG,
    CmpRi64JB,
    CmpRi64JAe,
    CmpRi64JE,
    CmpRi64JNe,
    CmpRi64JBe,
    CmpRi64JA,
    CmpRi64JS,
    CmpRi64JNs,
    CmpRi64JL,
    CmpRi64JGe,
    CmpRi64JLe,
    CmpRi64JG,
    TestRr8JB,
    TestRr8JAe,
    TestRr8JE,
    TestRr8JNe,
    TestRr8JBe,
    TestRr8JA,
    TestRr8JS,
    TestRr8JNs,
    TestRr8JL,
    TestRr8JGe,
    TestRr8JLe,
    TestRr8JG,
    TestRr32JB,
    TestRr32JAe,
    TestRr32JE,
    TestRr32JNe,
    TestRr32JBe,
    TestRr32JA,
    TestRr32JS,
    TestRr32JNs,
    TestRr32JL,
    TestRr32JGe,
    TestRr32JLe,
    TestRr32JG,
    TestRr64JB,
    TestRr64JAe,
    TestRr64JE,
    TestRr64JNe,
    TestRr64JBe,
    TestRr64JA,
    TestRr64JS,
    TestRr64JNs,
    TestRr64JL,
    TestRr64JGe,
    TestRr64JLe,
    TestRr64JG,
    TestRi8JB,
    TestRi8JAe,
    TestRi8JE,
    TestRi8JNe,
    TestRi8JBe,
    TestRi8JA,
    TestRi8JS,
    TestRi8JNs,
    TestRi8JL,
    TestRi8JGe,
    TestRi8JLe,
    TestRi8JG,
    CmpRm32JB,
    CmpRm32JAe,
    CmpRm32JE,
    CmpRm32JNe,
    CmpRm32JBe,
    CmpRm32JA,
    CmpRm32JS,
    CmpRm32JNs,
    CmpRm32JL,
    CmpRm32JGe,
    CmpRm32JLe,
    CmpRm32JG,
    CmpRm64JB,
    CmpRm64JAe,
    CmpRm64JE,
    CmpRm64JNe,
    CmpRm64JBe,
    CmpRm64JA,
    CmpRm64JS,
    CmpRm64JNs,
    CmpRm64JL,
    CmpRm64JGe,
    CmpRm64JLe,
    CmpRm64JG,
    CmpMi8JB,
    CmpMi8JAe,
    CmpMi8JE,
    CmpMi8JNe,
    CmpMi8JBe,
    CmpMi8JA,
    CmpMi8JS,
    CmpMi8JNs,
    CmpMi8JL,
    CmpMi8JGe,
    CmpMi8JLe,
    CmpMi8JG,
    CmpMi32JB,
    CmpMi32JAe,
    CmpMi32JE,
    CmpMi32JNe,
    CmpMi32JBe,
    CmpMi32JA,
    CmpMi32JS,
    CmpMi32JNs,
    CmpMi32JL,
    CmpMi32JGe,
    CmpMi32JLe,
    CmpMi32JG,
    TestMi8JB,
    TestMi8JAe,
    TestMi8JE,
    TestMi8JNe,
    TestMi8JBe,
    TestMi8JA,
    TestMi8JS,
    TestMi8JNs,
    TestMi8JL,
    TestMi8JGe,
    TestMi8JLe,
    TestMi8JG,
    MovXm,
    MovMx,
    MovXx,
    PxorXx,
}

/// Offset of a block that is no longer valid.
pub(crate) const GONE: u64 = !0;

/// One operation. `repr(C)`: 32 bytes, aligned: half a cache line, never across two.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub(crate) struct Op {
    pub code: Code,
    pub dst: u8,
    pub src: u8,
    /// Address: base, index << scale, segment base slot, displacement.
    pub base: u8,
    pub index: u8,
    pub seg: u8,
    pub scale: u8,
    pub disp: u64,
    pub imm: u64,
    /// Index of the instruction in its block.
    pub at: u16,
    /// Head of the block that the jump of this operation leads to: within the same page, or with
    /// [`FAR`](crate::block::FAR); or `NO_BLOCK`.
    pub link: BlockId,
}

impl Op {
    /// What stands before the operations of a block.
    pub fn head(key: Key, instructions: u16, block: BlockId) -> Op {
        Op {
            code: Head,
            disp: key.offset as u64,
            imm: key.rip,
            at: instructions,
            link: block,
            ..Op::default()
        }
    }

    /// What stands after them.
    pub fn end(next_rip: u64, instructions: u16) -> Op {
        Op {
            code: End,
            imm: next_rip,
            at: instructions,
            link: NO_BLOCK,
            ..Op::default()
        }
    }
}

/// ALU operations in the order of the rows of [`ALU`].
pub(crate) mod alu {
    pub const ADD: u8 = 0;
    pub const OR: u8 = 1;
    pub const ADC: u8 = 2;
    pub const SBB: u8 = 3;
    pub const AND: u8 = 4;
    pub const SUB: u8 = 5;
    pub const XOR: u8 = 6;
    pub const CMP: u8 = 7;
    pub const TEST: u8 = 8;
}

/// Form of two operands, as a column of [`ALU`].
const RR: usize = 0;
const RI: usize = 1;
const RM: usize = 2;
const MR: usize = 3;
const MI: usize = 4;

use Code::*;

/// By operation, width, form.
#[rustfmt::skip]
const ALU: [[[Code; 5]; 4]; 9] = [
    [[AddRr8, AddRi8, AddRm8, AddMr8, AddMi8], [AddRr16, AddRi16, AddRm16, AddMr16, AddMi16], [AddRr32, AddRi32, AddRm32, AddMr32, AddMi32], [AddRr64, AddRi64, AddRm64, AddMr64, AddMi64]],
    [[OrRr8, OrRi8, OrRm8, OrMr8, OrMi8], [OrRr16, OrRi16, OrRm16, OrMr16, OrMi16], [OrRr32, OrRi32, OrRm32, OrMr32, OrMi32], [OrRr64, OrRi64, OrRm64, OrMr64, OrMi64]],
    [[AdcRr8, AdcRi8, AdcRm8, AdcMr8, AdcMi8], [AdcRr16, AdcRi16, AdcRm16, AdcMr16, AdcMi16], [AdcRr32, AdcRi32, AdcRm32, AdcMr32, AdcMi32], [AdcRr64, AdcRi64, AdcRm64, AdcMr64, AdcMi64]],
    [[SbbRr8, SbbRi8, SbbRm8, SbbMr8, SbbMi8], [SbbRr16, SbbRi16, SbbRm16, SbbMr16, SbbMi16], [SbbRr32, SbbRi32, SbbRm32, SbbMr32, SbbMi32], [SbbRr64, SbbRi64, SbbRm64, SbbMr64, SbbMi64]],
    [[AndRr8, AndRi8, AndRm8, AndMr8, AndMi8], [AndRr16, AndRi16, AndRm16, AndMr16, AndMi16], [AndRr32, AndRi32, AndRm32, AndMr32, AndMi32], [AndRr64, AndRi64, AndRm64, AndMr64, AndMi64]],
    [[SubRr8, SubRi8, SubRm8, SubMr8, SubMi8], [SubRr16, SubRi16, SubRm16, SubMr16, SubMi16], [SubRr32, SubRi32, SubRm32, SubMr32, SubMi32], [SubRr64, SubRi64, SubRm64, SubMr64, SubMi64]],
    [[XorRr8, XorRi8, XorRm8, XorMr8, XorMi8], [XorRr16, XorRi16, XorRm16, XorMr16, XorMi16], [XorRr32, XorRi32, XorRm32, XorMr32, XorMi32], [XorRr64, XorRi64, XorRm64, XorMr64, XorMi64]],
    [[CmpRr8, CmpRi8, CmpRm8, CmpMr8, CmpMi8], [CmpRr16, CmpRi16, CmpRm16, CmpMr16, CmpMi16], [CmpRr32, CmpRi32, CmpRm32, CmpMr32, CmpMi32], [CmpRr64, CmpRi64, CmpRm64, CmpMr64, CmpMi64]],
    [[TestRr8, TestRi8, TestRm8, TestMr8, TestMi8], [TestRr16, TestRi16, TestRm16, TestMr16, TestMi16], [TestRr32, TestRi32, TestRm32, TestMr32, TestMi32], [TestRr64, TestRi64, TestRm64, TestMr64, TestMi64]],
];

#[rustfmt::skip]
const MOV: [[Code; 5]; 4] = [
    [MovRr8, MovRi8, MovRm8, MovMr8, MovMi8],
    [MovRr16, MovRi16, MovRm16, MovMr16, MovMi16],
    [MovRr32, MovRi32, MovRm32, MovMr32, MovMi32],
    [MovRr64, MovRi64, MovRm64, MovMr64, MovMi64],
];

const JCC: [Code; 16] = [
    JO, JNo, JB, JAe, JE, JNe, JBe, JA, JS, JNs, JP, JNp, JL, JGe, JLe, JG,
];

/// Comparisons that take a following branch into their operation, and the operation for each of
/// the conditions in [`FUSED_CONDITIONS`].
#[rustfmt::skip]
const FUSED: [(Code, [Code; 12]); 14] = [
    (CmpRr32, [CmpRr32JB, CmpRr32JAe, CmpRr32JE, CmpRr32JNe, CmpRr32JBe, CmpRr32JA, CmpRr32JS, CmpRr32JNs, CmpRr32JL, CmpRr32JGe, CmpRr32JLe, CmpRr32JG]),
    (CmpRr64, [CmpRr64JB, CmpRr64JAe, CmpRr64JE, CmpRr64JNe, CmpRr64JBe, CmpRr64JA, CmpRr64JS, CmpRr64JNs, CmpRr64JL, CmpRr64JGe, CmpRr64JLe, CmpRr64JG]),
    (CmpRi8, [CmpRi8JB, CmpRi8JAe, CmpRi8JE, CmpRi8JNe, CmpRi8JBe, CmpRi8JA, CmpRi8JS, CmpRi8JNs, CmpRi8JL, CmpRi8JGe, CmpRi8JLe, CmpRi8JG]),
    (CmpRi32, [CmpRi32JB, CmpRi32JAe, CmpRi32JE, CmpRi32JNe, CmpRi32JBe, CmpRi32JA, CmpRi32JS, CmpRi32JNs, CmpRi32JL, CmpRi32JGe, CmpRi32JLe, CmpRi32JG]),
    (CmpRi64, [CmpRi64JB, CmpRi64JAe, CmpRi64JE, CmpRi64JNe, CmpRi64JBe, CmpRi64JA, CmpRi64JS, CmpRi64JNs, CmpRi64JL, CmpRi64JGe, CmpRi64JLe, CmpRi64JG]),
    (TestRr8, [TestRr8JB, TestRr8JAe, TestRr8JE, TestRr8JNe, TestRr8JBe, TestRr8JA, TestRr8JS, TestRr8JNs, TestRr8JL, TestRr8JGe, TestRr8JLe, TestRr8JG]),
    (TestRr32, [TestRr32JB, TestRr32JAe, TestRr32JE, TestRr32JNe, TestRr32JBe, TestRr32JA, TestRr32JS, TestRr32JNs, TestRr32JL, TestRr32JGe, TestRr32JLe, TestRr32JG]),
    (TestRr64, [TestRr64JB, TestRr64JAe, TestRr64JE, TestRr64JNe, TestRr64JBe, TestRr64JA, TestRr64JS, TestRr64JNs, TestRr64JL, TestRr64JGe, TestRr64JLe, TestRr64JG]),
    (TestRi8, [TestRi8JB, TestRi8JAe, TestRi8JE, TestRi8JNe, TestRi8JBe, TestRi8JA, TestRi8JS, TestRi8JNs, TestRi8JL, TestRi8JGe, TestRi8JLe, TestRi8JG]),
    (CmpRm32, [CmpRm32JB, CmpRm32JAe, CmpRm32JE, CmpRm32JNe, CmpRm32JBe, CmpRm32JA, CmpRm32JS, CmpRm32JNs, CmpRm32JL, CmpRm32JGe, CmpRm32JLe, CmpRm32JG]),
    (CmpRm64, [CmpRm64JB, CmpRm64JAe, CmpRm64JE, CmpRm64JNe, CmpRm64JBe, CmpRm64JA, CmpRm64JS, CmpRm64JNs, CmpRm64JL, CmpRm64JGe, CmpRm64JLe, CmpRm64JG]),
    (CmpMi8, [CmpMi8JB, CmpMi8JAe, CmpMi8JE, CmpMi8JNe, CmpMi8JBe, CmpMi8JA, CmpMi8JS, CmpMi8JNs, CmpMi8JL, CmpMi8JGe, CmpMi8JLe, CmpMi8JG]),
    (CmpMi32, [CmpMi32JB, CmpMi32JAe, CmpMi32JE, CmpMi32JNe, CmpMi32JBe, CmpMi32JA, CmpMi32JS, CmpMi32JNs, CmpMi32JL, CmpMi32JGe, CmpMi32JLe, CmpMi32JG]),
    (TestMi8, [TestMi8JB, TestMi8JAe, TestMi8JE, TestMi8JNe, TestMi8JBe, TestMi8JA, TestMi8JS, TestMi8JNs, TestMi8JL, TestMi8JGe, TestMi8JLe, TestMi8JG]),
];

/// Conditions, as encoded, that are fused: all but O, NO, P and NP.
const FUSED_CONDITIONS: [u8; 12] = [2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15];

/// The operation that is `compare` and a jump on `condition`.
fn fused(compare: Code, condition: u8) -> Option<Code> {
    match (compare, condition) {
        (TestHi8, 4) => return Some(TestHi8JE),
        (TestHi8, 5) => return Some(TestHi8JNe),
        _ => {}
    }
    let column = FUSED_CONDITIONS.iter().position(|c| *c == condition)?;
    FUSED
        .iter()
        .find(|(code, _)| *code == compare)
        .map(|(_, codes)| codes[column])
}

/// Number of a general register that has no AH-style part.
fn gpr(register: Register) -> Option<u8> {
    let n = register as u32;
    let from = |first: Register| (n - first as u32) as u8;
    if register >= Register::RAX && register <= Register::R15 {
        Some(from(Register::RAX))
    } else if register >= Register::EAX && register <= Register::R15D {
        Some(from(Register::EAX))
    } else if register >= Register::AX && register <= Register::R15W {
        Some(from(Register::AX))
    } else if register >= Register::AL && register <= Register::BL {
        Some(from(Register::AL))
    } else if register >= Register::SPL && register <= Register::R15L {
        Some(from(Register::AL) - 4)
    } else {
        None
    }
}

/// Number of the general register of which AH, CH, DH or BH is a part.
fn high_byte(register: Register) -> Option<u8> {
    (register >= Register::AH && register <= Register::BH)
        .then(|| (register as u32 - Register::AH as u32) as u8)
}

fn xmm(register: Register) -> Option<u8> {
    (register >= Register::XMM0 && register <= Register::XMM15)
        .then(|| (register as u32 - Register::XMM0 as u32) as u8)
}

/// Fills in the address of the memory operand. `None` for 32-bit addresses.
fn address(i: &Instruction, op: &mut Op) -> Option<()> {
    op.base = match i.memory_base() {
        Register::None | Register::RIP => reg::ZERO as u8,
        base if base >= Register::RAX && base <= Register::R15 => gpr(base)?,
        _ => return None,
    };
    op.index = match i.memory_index() {
        Register::None => reg::ZERO as u8,
        index if index >= Register::RAX && index <= Register::R15 => gpr(index)?,
        _ => return None,
    };
    if i.memory_base() == Register::None
        && i.memory_index() == Register::None
        && i.memory_displ_size() != 8
    {
        return None;
    }
    op.scale = i.memory_index_scale().trailing_zeros() as u8;
    op.seg = match i.memory_segment() {
        Register::FS => reg::FS_BASE,
        Register::GS => reg::GS_BASE,
        _ => reg::ZERO,
    } as u8;
    op.disp = i.memory_displacement64();
    Some(())
}

/// Fills in two operands and tells their form and the width's column.
fn two_operands(i: &Instruction, op: &mut Op) -> Option<(usize, usize)> {
    let memory = |n| i.op_kind(n) == OpKind::Memory;
    let register = |n| i.op_kind(n) == OpKind::Register;
    let size = if register(0) {
        i.op_register(0).size()
    } else {
        i.memory_size().size()
    };
    let width = size.trailing_zeros() as usize;
    let form = match (register(0), register(1), memory(1)) {
        (true, true, _) => {
            (op.dst, op.src) = (gpr(i.op_register(0))?, gpr(i.op_register(1))?);
            RR
        }
        (true, _, true) => {
            op.dst = gpr(i.op_register(0))?;
            address(i, op)?;
            RM
        }
        (true, ..) => {
            op.dst = gpr(i.op_register(0))?;
            op.imm = i.immediate(1);
            RI
        }
        (_, true, _) if memory(0) => {
            op.src = gpr(i.op_register(1))?;
            address(i, op)?;
            MR
        }
        _ if memory(0) && !memory(1) => {
            op.imm = i.immediate(1);
            address(i, op)?;
            MI
        }
        _ => return None,
    };
    Some((form, width))
}

/// The condition of a Jcc, SETcc or CMOVcc, 0-15.
fn condition(i: &Instruction) -> u8 {
    // The decoder numbers conditions from 1 in the order of their encoding.
    i.condition_code() as u8 - 1
}

/// A hot operation for `i`, where there is one.
#[expect(clippy::too_many_lines, reason = "a flat list")]
fn hot(i: &Instruction, op: &mut Op) -> Option<Code> {
    let memory = |n| i.op_kind(n) == OpKind::Memory;
    let register = |n| i.op_kind(n) == OpKind::Register;
    let size = |n| {
        if register(n) {
            i.op_register(n).size()
        } else {
            i.memory_size().size()
        }
    };
    let immediate = |n| !memory(n) && !register(n);
    let pick = |size: usize, narrow: Code, wide: Code| match size {
        4 => Some(narrow),
        8 => Some(wide),
        _ => None,
    };
    let row = match i.mnemonic() {
        Mnemonic::Add => Some(alu::ADD),
        Mnemonic::Or => Some(alu::OR),
        Mnemonic::Adc => Some(alu::ADC),
        Mnemonic::Sbb => Some(alu::SBB),
        Mnemonic::And => Some(alu::AND),
        Mnemonic::Sub => Some(alu::SUB),
        Mnemonic::Xor => Some(alu::XOR),
        Mnemonic::Cmp => Some(alu::CMP),
        Mnemonic::Test => Some(alu::TEST),
        _ => None,
    };
    if matches!(row, Some(alu::TEST | alu::AND))
        && register(0)
        && immediate(1)
        && let Some(dst) = high_byte(i.op_register(0))
    {
        (op.dst, op.imm) = (dst, i.immediate(1) & 0xff);
        return Some(if row == Some(alu::TEST) {
            TestHi8
        } else {
            AndHi8
        });
    }
    if let Some(row) = row {
        let (form, width) = two_operands(i, op)?;
        return Some(ALU[row as usize][width][form]);
    }
    // Register or memory source of a two-operand form with a register destination.
    let source = |op: &mut Op, from_register: Code, from_memory: Code| {
        op.dst = gpr(i.op_register(0))?;
        if memory(1) {
            address(i, op)?;
            Some(from_memory)
        } else {
            op.src = gpr(i.op_register(1))?;
            Some(from_register)
        }
    };
    match i.mnemonic() {
        Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Endbr32 => Some(Nop),
        Mnemonic::Mov => {
            if register(0) && gpr(i.op_register(0)).is_none()
                || register(1) && gpr(i.op_register(1)).is_none()
            {
                return None;
            }
            let (form, width) = two_operands(i, op)?;
            let zero = reg::ZERO as u8;
            Some(match MOV[width][form] {
                MovRm64 if (op.index, op.seg) == (zero, zero) => MovRd64,
                MovMr64 if (op.index, op.seg) == (zero, zero) => MovDr64,
                code => code,
            })
        }
        Mnemonic::Movzx => match (size(0), size(1)) {
            (4 | 8, 1) => source(op, MovzxRr8, MovzxRm8),
            (4 | 8, 2) => source(op, MovzxRr16, MovzxRm16),
            _ => None,
        },
        Mnemonic::Movsx | Mnemonic::Movsxd => match (size(0), size(1)) {
            (4, 1) => source(op, Movsx32Rr8, Movsx32Rm8),
            (4, 2) => source(op, Movsx32Rr16, Movsx32Rm16),
            (8, 1) => source(op, Movsx64Rr8, Movsx64Rm8),
            (8, 2) => source(op, Movsx64Rr16, Movsx64Rm16),
            (8, 4) => source(op, Movsx64Rr32, Movsx64Rm32),
            _ => None,
        },
        Mnemonic::Lea => {
            op.dst = gpr(i.op_register(0))?;
            address(i, op)?;
            op.seg = reg::ZERO as u8;
            pick(size(0), Lea32, Lea64)
        }
        Mnemonic::Inc | Mnemonic::Dec => {
            let inc = i.mnemonic() == Mnemonic::Inc;
            if memory(0) {
                address(i, op)?;
                return if inc {
                    pick(size(0), IncM32, IncM64)
                } else {
                    pick(size(0), DecM32, DecM64)
                };
            }
            op.dst = gpr(i.op_register(0))?;
            match (size(0), inc) {
                (1, true) => Some(IncR8),
                (1, false) => Some(DecR8),
                (n, true) => pick(n, IncR32, IncR64),
                (n, false) => pick(n, DecR32, DecR64),
            }
        }
        Mnemonic::Neg | Mnemonic::Not if register(0) => {
            op.dst = gpr(i.op_register(0))?;
            if i.mnemonic() == Mnemonic::Neg {
                pick(size(0), NegR32, NegR64)
            } else {
                pick(size(0), NotR32, NotR64)
            }
        }
        Mnemonic::Shl | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Rol | Mnemonic::Ror
            if register(0) =>
        {
            op.dst = gpr(i.op_register(0))?;
            if register(1) {
                return match i.mnemonic() {
                    Mnemonic::Shl => pick(size(0), ShlRc32, ShlRc64),
                    Mnemonic::Shr => pick(size(0), ShrRc32, ShrRc64),
                    Mnemonic::Sar => pick(size(0), SarRc32, SarRc64),
                    _ => None,
                };
            }
            op.imm = i.immediate(1) & if size(0) == 8 { 63 } else { 31 };
            if op.imm == 0 {
                return None;
            }
            match i.mnemonic() {
                Mnemonic::Shl => pick(size(0), ShlRi32, ShlRi64),
                Mnemonic::Shr => pick(size(0), ShrRi32, ShrRi64),
                Mnemonic::Sar => pick(size(0), SarRi32, SarRi64),
                Mnemonic::Rol => pick(size(0), RolRi32, RolRi64),
                _ => pick(size(0), RorRi32, RorRi64),
            }
        }
        Mnemonic::Imul => match i.op_count() {
            2 => {
                if size(0) == 8 {
                    source(op, ImulRr64, ImulRm64)
                } else if size(0) == 4 {
                    source(op, ImulRr32, ImulRm32)
                } else {
                    None
                }
            }
            3 if register(1) => {
                op.imm = i.immediate(2);
                let code = pick(size(0), ImulRri32, ImulRri64)?;
                source(op, code, code)
            }
            _ => None,
        },
        Mnemonic::Xchg if register(0) && register(1) => {
            let code = pick(size(0), XchgRr32, XchgRr64)?;
            source(op, code, code)
        }
        Mnemonic::Bt if register(0) => {
            op.dst = gpr(i.op_register(0))?;
            if immediate(1) {
                op.imm = i.immediate(1) & (size(0) as u64 * 8 - 1);
                pick(size(0), BtRi32, BtRi64)
            } else {
                op.src = gpr(i.op_register(1))?;
                pick(size(0), BtRr32, BtRr64)
            }
        }
        Mnemonic::Bts | Mnemonic::Btr if memory(0) && immediate(1) => {
            address(i, op)?;
            op.imm = 1 << (i.immediate(1) & (size(0) as u64 * 8 - 1));
            if i.mnemonic() == Mnemonic::Bts {
                pick(size(0), BtsMi32, BtsMi64)
            } else {
                pick(size(0), BtrMi32, BtrMi64)
            }
        }
        Mnemonic::Cmpxchg | Mnemonic::Xadd if memory(0) => {
            address(i, op)?;
            op.src = gpr(i.op_register(1))?;
            if i.mnemonic() == Mnemonic::Cmpxchg {
                pick(size(0), CmpxchgMr32, CmpxchgMr64)
            } else {
                pick(size(0), XaddMr32, XaddMr64)
            }
        }
        Mnemonic::Pushfq => Some(PushF),
        Mnemonic::Cli => Some(Cli),
        Mnemonic::Cdqe => Some(Cdqe),
        Mnemonic::Cwde => Some(Cwde),
        Mnemonic::Cdq => Some(Cdq),
        Mnemonic::Cqo => Some(Cqo),
        Mnemonic::Bswap => {
            op.dst = gpr(i.op_register(0))?;
            pick(size(0), BswapR32, BswapR64)
        }
        Mnemonic::Push => {
            if register(0) && size(0) == 8 {
                op.src = gpr(i.op_register(0))?;
                Some(PushR)
            } else if immediate(0) && i.stack_pointer_increment() == -8 {
                op.imm = i.immediate(0);
                Some(PushI)
            } else if memory(0) && size(0) == 8 {
                address(i, op)?;
                Some(PushM)
            } else {
                None
            }
        }
        Mnemonic::Pop if register(0) && size(0) == 8 => {
            op.dst = gpr(i.op_register(0))?;
            Some(PopR)
        }
        Mnemonic::Leave
            if i.stack_pointer_increment() == 0 && i.code() == iced_x86::Code::Leaveq =>
        {
            Some(Leave)
        }
        Mnemonic::Jmp | Mnemonic::Call => {
            let jump = i.mnemonic() == Mnemonic::Jmp;
            if i.op_kind(0) == OpKind::NearBranch64 && canonical(i.near_branch64()) {
                (op.imm, op.disp) = (i.near_branch64(), i.next_ip());
                return Some(if jump { JmpRel } else { CallRel });
            }
            op.imm = i.next_ip();
            if register(0) && size(0) == 8 {
                op.src = gpr(i.op_register(0))?;
                return Some(if jump { JmpR } else { CallR });
            }
            if memory(0) && i.memory_size() == iced_x86::MemorySize::QwordOffset {
                address(i, op)?;
                return Some(if jump { JmpM } else { CallM });
            }
            None
        }
        Mnemonic::Ret if i.op_count() == 0 && i.code() == iced_x86::Code::Retnq => Some(Ret),
        Mnemonic::Movups | Mnemonic::Movdqu | Mnemonic::Movupd => {
            if memory(1) {
                op.dst = xmm(i.op_register(0))?;
                address(i, op)?;
                Some(MovXm)
            } else if memory(0) {
                op.src = xmm(i.op_register(1))?;
                address(i, op)?;
                Some(MovMx)
            } else {
                (op.dst, op.src) = (xmm(i.op_register(0))?, xmm(i.op_register(1))?);
                Some(MovXx)
            }
        }
        Mnemonic::Movaps | Mnemonic::Movdqa if register(0) && register(1) => {
            (op.dst, op.src) = (xmm(i.op_register(0))?, xmm(i.op_register(1))?);
            Some(MovXx)
        }
        Mnemonic::Pxor | Mnemonic::Xorps if register(0) && register(1) => {
            (op.dst, op.src) = (xmm(i.op_register(0))?, xmm(i.op_register(1))?);
            Some(PxorXx)
        }
        _ if is_hot_branch(i) => {
            op.imm = i.near_branch64();
            Some(JCC[condition(i) as usize])
        }
        _ if i.condition_code() != ConditionCode::None
            && i.op_count() == 1
            && register(0)
            && size(0) == 1 =>
        {
            op.dst = gpr(i.op_register(0))?;
            op.imm = u64::from(condition(i));
            Some(SetR)
        }
        _ if i.condition_code() != ConditionCode::None && i.op_count() == 2 && register(1) => {
            (op.dst, op.src) = (gpr(i.op_register(0))?, gpr(i.op_register(1))?);
            op.imm = u64::from(condition(i));
            pick(size(0), CmovR32, CmovR64)
        }
        _ => None,
    }
}

/// The operation of one instruction.
fn operation(i: &Instruction, at: usize, key: Key, model: &Model) -> Op {
    let zero = reg::ZERO as u8;
    let blank = Op {
        link: NO_BLOCK,
        base: zero,
        index: zero,
        seg: zero,
        at: at as u16,
        ..Op::default()
    };
    let mut op = blank;
    let code = if !model.allows(i) {
        Some(Undefined)
    } else if crate::exec::is_repeated(i) {
        Some(Repeat)
    } else if key.size == CodeSize::Bits64 {
        hot(i, &mut op)
    } else {
        None
    };
    match code {
        Some(code) => Op { code, ..op },
        None => blank,
    }
}

/// Whether an instruction is a conditional branch with an operation of its own.
pub(crate) fn is_hot_branch(i: &Instruction) -> bool {
    i.is_jcc_short_or_near() && i.op_kind(0) == OpKind::NearBranch64 && canonical(i.near_branch64())
}

/// Appends the operations of a block's instructions.
pub(crate) fn lower(block: &[Instruction], key: Key, model: &Model, ops: &mut alloc::vec::Vec<Op>) {
    let first = ops.len();
    for (at, i) in block.iter().enumerate() {
        let op = operation(i, at, key, model);
        if let Some(before) = ops[first..].last_mut()
            && i.is_jcc_short_or_near()
            && JCC.contains(&op.code)
            && let Some(code) = fused(before.code, condition(i))
        {
            before.code = code;
        } else {
            ops.push(op);
        }
    }
    quieten(&mut ops[first..]);
    let left = join_copies(&mut ops[first..]);
    ops.truncate(first + left);
}
