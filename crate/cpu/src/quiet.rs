//! Arithmetic whose flags nobody reads.
//!
//! Most flag results are overwritten a few instructions later. Where every operation between one
//! and the next that replaces all six arithmetic flags neither reads them nor can leave the
//! block, nobody can tell whether they were computed, and the operation becomes its quiet form.

use crate::lower::Code::{self, *};
use crate::lower::Op;

/// Replaces operations of a finished block, from its last to its first, by their quiet forms.
pub(crate) fn quieten(ops: &mut [Op]) {
    // Whether the flags after the operation at hand are replaced before they can be seen.
    let mut unseen = false;
    for op in ops.iter_mut().rev() {
        unseen = match effect(op) {
            Effect::Replaces => {
                if unseen {
                    quiet(op);
                }
                true
            }
            Effect::KeepsCarry => unseen && quiet(op),
            Effect::Nothing => unseen,
            Effect::Other => false,
        };
    }
}

/// What an operation means for the flags before it.
enum Effect {
    /// Computes all of them anew from registers, and cannot fail before it did.
    Replaces,
    /// As `Replaces`, but for CF.
    KeepsCarry,
    /// Neither reads nor writes them, and cannot leave the block.
    Nothing,
    /// Reads them, or may show them to a handler.
    Other,
}

fn effect(op: &Op) -> Effect {
    match op.code {
        AddRr32 | AddRi32 | AddRr64 | AddRi64 | OrRr32 | OrRi32 | OrRr64 | OrRi64 | AndRr32
        | AndRi32 | AndRr64 | AndRi64 | SubRr32 | SubRi32 | SubRr64 | SubRi64 | XorRr32
        | XorRi32 | XorRr64 | XorRi64 | AddRr8 | AddRi8 | OrRr8 | OrRi8 | AndRr8 | AndRi8
        | SubRr8 | SubRi8 | XorRr8 | XorRi8 | CmpRr8 | CmpRi8 | CmpRr16 | CmpRi16 | CmpRr32
        | CmpRi32 | CmpRr64 | CmpRi64 | TestRr8 | TestRi8 | TestRr16 | TestRi16 | TestRr32
        | TestRi32 | TestRr64 | TestRi64 | NegR32 | NegR64 | TestHi8 | AndHi8 | TestHi8JE
        | TestHi8JNe => Effect::Replaces,
        // Never by zero, which would keep them: see `lower`.
        ShlRi32 | ShrRi32 | SarRi32 | ShlRi64 | ShrRi64 | SarRi64 => Effect::Replaces,
        IncR8 | IncR32 | IncR64 | DecR8 | DecR32 | DecR64 => Effect::KeepsCarry,
        Nop | MovRr8 | MovRi8 | MovRr16 | MovRi16 | MovRr32 | MovRi32 | MovRr64 | MovRi64
        | MovzxRr8 | MovzxRr16 | Movsx32Rr8 | Movsx32Rr16 | Movsx64Rr8 | Movsx64Rr16
        | Movsx64Rr32 | Lea32 | Lea64 | NotR32 | NotR64 | XchgRr32 | XchgRr64 | Cdqe | Cwde
        | Cdq | Cqo | BswapR32 | BswapR64 => Effect::Nothing,
        code if register_comparison(code) => Effect::Replaces,
        _ => Effect::Other,
    }
}

/// A comparison of registers or an immediate, fused with its branch.
fn register_comparison(code: Code) -> bool {
    let within = |first: Code, last: Code| (first as u16..=last as u16).contains(&(code as u16));
    within(CmpRr32JB, TestRi8JG)
}

/// Makes `op` its quiet form, where it has one.
fn quiet(op: &mut Op) -> bool {
    let form = |rr: Code, ri: Code, immediate: bool| if immediate { ri } else { rr };
    let negated = op.imm.wrapping_neg();
    (op.code, op.imm) = match op.code {
        AddRr32 => (QuietAddRr32, op.imm),
        AddRr64 => (QuietAddRr64, op.imm),
        AddRi32 => (QuietAddRi32, op.imm),
        AddRi64 => (QuietAddRi64, op.imm),
        SubRr32 => (QuietSubRr32, op.imm),
        SubRr64 => (QuietSubRr64, op.imm),
        SubRi32 => (QuietAddRi32, negated),
        SubRi64 => (QuietAddRi64, negated),
        IncR32 => (QuietAddRi32, 1),
        IncR64 => (QuietAddRi64, 1),
        DecR32 => (QuietAddRi32, !0),
        DecR64 => (QuietAddRi64, !0),
        OrRr32 | OrRi32 => (form(QuietOrRr32, QuietOrRi32, op.code == OrRi32), op.imm),
        OrRr64 | OrRi64 => (form(QuietOrRr64, QuietOrRi64, op.code == OrRi64), op.imm),
        AndRr32 | AndRi32 => (form(QuietAndRr32, QuietAndRi32, op.code == AndRi32), op.imm),
        AndRr64 | AndRi64 => (form(QuietAndRr64, QuietAndRi64, op.code == AndRi64), op.imm),
        XorRr32 | XorRi32 => (form(QuietXorRr32, QuietXorRi32, op.code == XorRi32), op.imm),
        XorRr64 | XorRi64 => (form(QuietXorRr64, QuietXorRi64, op.code == XorRi64), op.imm),
        ShlRi32 => (QuietShlRi32, op.imm & 31),
        ShlRi64 => (QuietShlRi64, op.imm & 63),
        ShrRi32 => (QuietShrRi32, op.imm & 31),
        ShrRi64 => (QuietShrRi64, op.imm & 63),
        SarRi32 => (QuietSarRi32, op.imm & 31),
        SarRi64 => (QuietSarRi64, op.imm & 63),
        _ => return false,
    };
    op.base = op.dst;
    true
}

/// Joins a copy of a register with the quiet operation on the copy after it: quiet operations
/// have a destination of their own. Leaves out what does nothing. Returns how many operations are left.
pub(crate) fn join_copies(ops: &mut [Op]) -> usize {
    let mut kept = 0;
    for n in 0..ops.len() {
        let mut op = ops[n];
        if op.code == Nop {
            continue;
        }
        if kept > 0
            && let before = ops[kept - 1]
            && copies(before.code, op.code)
            && (op.dst, op.base) == (before.dst, before.dst)
        {
            op.base = before.src;
            if op.src == before.dst {
                op.src = before.src;
            }
            kept -= 1;
        }
        ops[kept] = op;
        kept += 1;
    }
    kept
}

/// Whether a copy by `copy` gives the quiet operation `code` all the bits that it reads.
fn copies(copy: Code, code: Code) -> bool {
    let wide = matches!(
        code,
        QuietAddRr64
            | QuietAddRi64
            | QuietSubRr64
            | QuietOrRr64
            | QuietOrRi64
            | QuietAndRr64
            | QuietAndRi64
            | QuietXorRr64
            | QuietXorRi64
            | QuietShlRi64
            | QuietShrRi64
            | QuietSarRi64
    );
    match copy {
        MovRr64 => wide || quiet_form(code),
        MovRr32 => !wide && quiet_form(code),
        _ => false,
    }
}

fn quiet_form(code: Code) -> bool {
    (QuietAddRr32 as u16..=QuietSarRi64 as u16).contains(&(code as u16))
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use iced_x86::{Decoder, DecoderOptions};

    use super::*;
    use crate::block::Key;
    use crate::model::Model;
    use crate::vcpu::CodeSize;

    fn codes(bytes: &[u8]) -> Vec<Code> {
        let key = Key {
            offset: 0,
            rip: 0,
            size: CodeSize::Bits64,
        };
        let block: Vec<_> = Decoder::new(64, bytes, DecoderOptions::NONE)
            .into_iter()
            .collect();
        let mut ops = Vec::new();
        crate::lower::lower(&block, key, <&Model>::default(), &mut ops);
        ops.iter().map(|op| op.code).collect()
    }

    #[test]
    fn flags_that_are_replaced_before_they_are_read_are_not_computed() {
        // add rax, rbx; mov rcx, rdx; sub rsi, rdi
        let code = [0x48, 0x01, 0xd8, 0x48, 0x89, 0xd1, 0x48, 0x29, 0xfe];
        assert_eq!(codes(&code), [QuietAddRr64, MovRr64, SubRr64]);
        // inc rax; sub rsi, rdi
        let code = [0x48, 0xff, 0xc0, 0x48, 0x29, 0xfe];
        assert_eq!(codes(&code), [QuietAddRi64, SubRr64]);
    }

    #[test]
    fn a_copy_and_the_quiet_operation_on_it_are_one() {
        // mov rdx, rax; shr rdx, 7; xor rax, rdx
        let code = [0x48, 0x89, 0xc2, 0x48, 0xc1, 0xea, 0x07, 0x48, 0x31, 0xd0];
        assert_eq!(codes(&code), [QuietShrRi64, XorRr64]);
        // mov edx, eax; shl edx, 7; xor rax, rdx
        let code = [0x89, 0xc2, 0xc1, 0xe2, 0x07, 0x48, 0x31, 0xd0];
        assert_eq!(codes(&code), [QuietShlRi32, XorRr64]);
        // mov edx, eax; shr rdx, 7; xor rax, rdx: the copy clears what the shift reads
        let code = [0x89, 0xc2, 0x48, 0xc1, 0xea, 0x07, 0x48, 0x31, 0xd0];
        assert_eq!(codes(&code), [MovRr32, QuietShrRi64, XorRr64]);
        // mov rdx, rax; shr rcx, 7; xor rax, rdx: another register
        let code = [0x48, 0x89, 0xc2, 0x48, 0xc1, 0xe9, 0x07, 0x48, 0x31, 0xd0];
        assert_eq!(codes(&code), [MovRr64, QuietShrRi64, XorRr64]);
    }

    #[test]
    fn what_does_nothing_is_left_out() {
        // endbr64; nop; sub rsi, rdi; nop [rax]
        let code = [
            0xf3, 0x0f, 0x1e, 0xfa, 0x90, 0x48, 0x29, 0xfe, 0x0f, 0x1f, 0x00,
        ];
        assert_eq!(codes(&code), [SubRr64]);
        assert_eq!(codes(&[0x90]), []);
    }

    #[test]
    fn flags_that_something_may_see_are_computed() {
        // add rax, rbx; cmovb rcx, rdx; sub rsi, rdi
        let code = [0x48, 0x01, 0xd8, 0x48, 0x0f, 0x42, 0xca, 0x48, 0x29, 0xfe];
        assert_eq!(codes(&code), [AddRr64, CmovR64, SubRr64]);
        // add rax, rbx; mov rcx, [rdx]; sub rsi, rdi
        let code = [0x48, 0x01, 0xd8, 0x48, 0x8b, 0x0a, 0x48, 0x29, 0xfe];
        assert_eq!(codes(&code), [AddRr64, MovRd64, SubRr64]);
        // add rax, rbx; inc rcx (keeps CF)
        let code = [0x48, 0x01, 0xd8, 0x48, 0xff, 0xc1];
        assert_eq!(codes(&code), [AddRr64, IncR64]);
        // add rax, rbx; shl rcx, 64 (a count of zero)
        let code = [0x48, 0x01, 0xd8, 0x48, 0xc1, 0xe1, 0x40];
        assert_eq!(codes(&code), [AddRr64, Cold]);
    }
}
