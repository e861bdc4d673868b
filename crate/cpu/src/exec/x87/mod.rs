//! x87. This file dispatches and keeps the rules that all arithmetic shares: exceptions, the
//! stack, and the pointers to the last instruction.

mod arithmetic;
mod compare;
mod moves;
mod scale;
mod state;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::exec::xsave;
use crate::float::{
    Env, Float, Format, NanRule, Operation, Rounding, decode_extended, encode_extended,
};
use crate::fpu::{Fpu, exception, status};
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::{Exec, Trap};
use crate::vcpu::Seg;

/// Executes `i` if it is one of these.
pub(crate) fn execute(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic::*;
    match i.mnemonic() {
        Wait => state::wait(x),
        Fninit => state::init(x),
        Fnclex => state::clear_exceptions(x),
        Fnstcw => state::store_control(x, i),
        Fldcw => state::load_control(x, i),
        Fnstsw => state::store_status(x, i),
        Fnstenv => state::store_environment(x, i),
        Fldenv => state::load_environment(x, i),
        Fnsave => state::save(x, i),
        Frstor => state::restore(x, i),
        Emms => state::empty(x),
        Ldmxcsr => state::load_mxcsr(x, i),
        Stmxcsr => state::store_mxcsr(x, i),
        Fxsave | Fxsave64 => xsave::fxsave(x, i),
        Fxrstor | Fxrstor64 => xsave::fxrstor(x, i),
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xsaves | Xsaves64 => {
            xsave::xsave(x, i)
        }
        Xrstor | Xrstor64 | Xrstors | Xrstors64 => xsave::xrstor(x, i),
        // Obsolete controls of the 8087 and 80287, no operations since.
        Fneni | Fndisi | Fnsetpm => x.need_x87(),
        _ => {
            numeric(x, i)?;
            // What waits was checked for: an exception pending now is this instruction's.
            if x.cpu.fpu.status & status::SUMMARY != 0 {
                x.cpu.fpu.opcode = opcode(x, i);
            }
            Ok(())
        }
    }
}

/// FOP of an instruction, recorded for unmasked exceptions only (Vol. 1, "Fopcode Compatibility
/// Sub-mode"): its first two bytes without the five bits they have in common.
fn opcode(x: &mut Ctx, i: &Instruction) -> u16 {
    let start = x.cpu.seg(Seg::Cs).base.wrapping_add(i.ip());
    let mut byte = |n: usize| {
        x.load_system::<1>(start.wrapping_add(n as u64))
            .map_or(0, |[b]| b)
    };
    (0..i.len())
        .find(|&n| byte(n) & 0xf8 == 0xd8) // no prefix looks so
        .map_or(0, |n| u16::from(byte(n) & 7) << 8 | u16::from(byte(n + 1)))
}

/// Instructions that compute or move numbers.
fn numeric(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic::*;
    use Operation::{Add, Divide, Multiply, Subtract};
    match i.mnemonic() {
        // ---- moves ----
        Fld => moves::load(x, i),
        Fild => moves::load_integer(x, i),
        Fbld => moves::load_decimal(x, i),
        Fld1 => moves::constant(x, i, &moves::ONE),
        Fldz => moves::constant(x, i, &moves::ZERO),
        Fldpi => moves::constant(x, i, &moves::PI),
        Fldl2t => moves::constant(x, i, &moves::LOG2_10),
        Fldl2e => moves::constant(x, i, &moves::LOG2_E),
        Fldlg2 => moves::constant(x, i, &moves::LOG10_2),
        Fldln2 => moves::constant(x, i, &moves::LN_2),
        Fst | Fstp | Fstpnce => moves::store(x, i),
        Fist | Fistp => moves::store_integer(x, i, false),
        Fisttp => moves::store_integer(x, i, true),
        Fbstp => moves::store_decimal(x, i),
        Fxch => moves::exchange(x, i),
        Fcmovb | Fcmove | Fcmovbe | Fcmovu | Fcmovnb | Fcmovne | Fcmovnbe | Fcmovnu => {
            moves::conditional(x, i)
        }
        Ffree | Ffreep => moves::free(x, i),
        Fincstp => moves::rotate(x, i, 1),
        Fdecstp => moves::rotate(x, i, 7),
        Fnop => {
            begin(x)?;
            x.cpu.fpu.note(i, None);
            Ok(())
        }

        // ---- arithmetic ----
        Fadd | Faddp | Fiadd => arithmetic::binary(x, i, Add, false),
        Fsub | Fsubp | Fisub => arithmetic::binary(x, i, Subtract, false),
        Fsubr | Fsubrp | Fisubr => arithmetic::binary(x, i, Subtract, true),
        Fmul | Fmulp | Fimul => arithmetic::binary(x, i, Multiply, false),
        Fdiv | Fdivp | Fidiv => arithmetic::binary(x, i, Divide, false),
        Fdivr | Fdivrp | Fidivr => arithmetic::binary(x, i, Divide, true),
        Fsqrt => arithmetic::square_root(x, i),
        Frndint => arithmetic::round(x, i),
        Fabs => arithmetic::sign(x, i, |exponent| exponent & 0x7fff),
        Fchs => arithmetic::sign(x, i, |exponent| exponent ^ 0x8000),
        Fscale => scale::scale(x, i),
        Fxtract => scale::extract(x, i),
        Fprem => scale::remainder(x, i, false),
        Fprem1 => scale::remainder(x, i, true),

        // ---- comparisons ----
        Fcom | Fcomp | Fcompp | Ficom | Ficomp => compare::compare(x, i, false),
        Fucom | Fucomp | Fucompp => compare::compare(x, i, true),
        Fcomi | Fcomip => compare::compare_into_flags(x, i, false),
        Fucomi | Fucomip => compare::compare_into_flags(x, i, true),
        Ftst => compare::test(x, i),
        Fxam => compare::examine(x, i),

        F2xm1 | Fyl2x | Fyl2xp1 | Fptan | Fpatan | Fsin | Fcos | Fsincos => {
            Err(Trap::Unimplemented("x87 transcendental instruction"))
        }
        _ => Err(Trap::Unimplemented("instruction")),
    }
}

/// Number of a stack register.
fn st(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::ST0 as usize) & 7
}

/// What an instruction of this family checks first.
fn begin(x: &Ctx) -> Exec {
    x.need_x87()?;
    x.pending_x87()
}

/// Where an instruction's memory operand lies.
#[derive(Clone, Copy)]
struct Memory {
    offset: u64,
    linear: u64,
    size: usize,
}

/// The memory operand, if there is one; writable if it is to be written.
fn memory(x: &mut Ctx, i: &Instruction, access: Access) -> Exec<Option<Memory>> {
    if i.op0_kind() != OpKind::Memory {
        return Ok(None);
    }
    let size = i.memory_size().size();
    let (seg, offset) = x.address(i);
    let linear = x.linear(seg, offset, size as u64, access)?;
    if access == Access::Write {
        x.probe_write(linear, size as u64)?;
    }
    Ok(Some(Memory {
        offset,
        linear,
        size,
    }))
}

/// What the control word says of how to compute.
fn environment(fpu: &Fpu) -> Env {
    Env {
        rounding: Rounding::new(u32::from(fpu.control >> 10)),
        masked: fpu.control as u8 & exception::ALL,
        daz: false,
        ftz: false,
        nan_rule: NanRule::Larger,
        raised: 0,
        rounded_up: false,
    }
}

/// The precision of arithmetic results; the range is always the extended one.
fn precision(fpu: &Fpu) -> Format {
    let precision = match fpu.control >> 8 & 3 {
        0 => 24,
        2 => 53,
        _ => 64,
    };
    Format {
        precision,
        ..Format::EXTENDED
    }
}

impl Fpu {
    /// Records where the last instruction and its operand were (Vol. 1, "x87 FPU Instruction and
    /// Data (Operand) Pointers").
    fn note(&mut self, i: &Instruction, operand: Option<u64>) {
        self.instruction = i.ip();
        if let Some(operand) = operand {
            self.operand = operand;
        }
    }

    fn number(&self, n: usize) -> Float {
        decode_extended(self.st(n))
    }

    fn set_number(&mut self, n: usize, value: Float) {
        self.set_bits(n, encode_extended(value));
    }

    fn set_bits(&mut self, n: usize, bits: (u64, u16)) {
        self.set_st(n, bits);
        self.set_empty(n, false);
    }

    fn pop(&mut self) {
        self.set_empty(0, true);
        self.set_top(self.top() + 1);
    }

    fn pops(&mut self, count: u32) {
        for _ in 0..count {
            self.pop();
        }
    }

    fn push_bits(&mut self, bits: (u64, u16)) {
        self.set_top(self.top() + 7);
        self.set_bits(0, bits);
    }

    fn clear_c1(&mut self) {
        self.status &= !status::C1;
    }

    /// Records a stack fault; whether the masked response is to be given.
    fn stack_fault(&mut self, overflow: bool) -> bool {
        self.clear_c1();
        self.status |= u16::from(exception::INVALID) | status::STACK_FAULT;
        if overflow {
            self.status |= status::C1;
        }
        self.summarize();
        self.control & u16::from(exception::INVALID) != 0
    }

    /// Records the exceptions of an operation and the direction of its rounding; whether there is
    /// a result to write.
    fn settle(&mut self, env: &Env) -> bool {
        self.clear_c1();
        let mut raised = env.raised;
        if env.no_result() {
            raised &= exception::BEFORE;
        } else if raised & exception::PRECISION != 0 && env.rounded_up {
            self.status |= status::C1;
        }
        self.status |= u16::from(raised);
        self.summarize();
        !env.no_result()
    }

    /// Pushes unless the stack is full: then a NaN if that is masked, else nothing.
    fn push(&mut self, env: &Env, bits: (u64, u16)) {
        if !self.is_empty(7) {
            if self.stack_fault(true) {
                self.push_bits(encode_extended(Float::DEFAULT_NAN));
            }
        } else if self.settle(env) {
            self.push_bits(bits);
        }
    }
}
