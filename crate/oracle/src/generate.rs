//! Random cases of an instruction form: the instruction, and a state in which it does something.

use iced_x86::{Code, ConstantOffsets, CpuidFeature, Decoder, DecoderOptions, FlowControl};
use iced_x86::{Instruction, MemorySize, Mnemonic, OpKind, Register};

use crate::case::{AC, Case, DF, Mode, NT, Patch, STATUS, TF, UserState};
use crate::emit;
use crate::layout::{CODE, DATA, ENTRY, HIGH, PAGE, READ_ONLY, STACK};
use crate::rng::Rng;
use crate::values::{Lane, quad};

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

/// A random case of `code`. `None` where no instance of the form could be built.
pub fn case(rng: &mut Rng, code: Code, mode: Mode) -> Option<Case> {
    let ip = if rng.one_in(24) {
        // Across the two code pages, or out of the last one.
        rng.pick(&[CODE.start + PAGE, CODE.end()]) - 1 - rng.below(8)
    } else {
        ENTRY
    };
    let (bytes, instruction) = emit::instance(rng, code, mode, ip)?;
    let uses = |register| {
        [instruction.memory_base(), instruction.memory_index()]
            .iter()
            .any(|r| r.full_register() == register)
    };
    if is_xsave(&instruction) && (uses(Register::RAX) || uses(Register::RDX)) {
        // The component mask has to stay ours to choose.
        return case(rng, code, mode);
    }
    let mut builder = Builder {
        rng,
        mode,
        offsets: offsets(&bytes, mode, ip),
        instruction,
        case: Case {
            mode,
            code: bytes,
            state: UserState::new(mode),
            memory: Vec::new(),
        },
    };
    builder.case.state.rip = ip;
    builder.registers();
    builder.fpu();
    builder.stack();
    builder.implicit_inputs();
    builder.operand();
    builder.related_inputs();
    builder.narrow_to_mode();
    Some(builder.case)
}

fn is_xsave(instruction: &Instruction) -> bool {
    matches!(
        instruction.memory_size(),
        MemorySize::Xsave | MemorySize::Xsave64
    )
}

fn offsets(bytes: &[u8], mode: Mode, ip: u64) -> ConstantOffsets {
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, ip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    decoder.get_constant_offsets(&instruction)
}

struct Builder<'a> {
    rng: &'a mut Rng,
    mode: Mode,
    instruction: Instruction,
    offsets: ConstantOffsets,
    case: Case,
}

impl Builder<'_> {
    fn registers(&mut self) {
        for gpr in &mut self.case.state.gpr {
            *gpr = quad(self.rng);
        }
        if self.rng.one_in(6) {
            // Equal operands.
            let value = quad(self.rng);
            for gpr in &mut self.case.state.gpr {
                if self.rng.one_in(2) {
                    *gpr = value;
                }
            }
        }
        let mut flags = 0x202 | (self.rng.bits() & STATUS);
        for (bit, odds) in [(DF, 6), (NT, 16), (AC, 16)] {
            if self.rng.one_in(odds) {
                flags |= bit;
            }
        }
        self.case.state.rflags = flags;
        if self.mode == Mode::Long {
            for base in [&mut self.case.state.fs_base, &mut self.case.state.gs_base] {
                *base = match self.rng.below(4) {
                    0 => 0,
                    1 => self.rng.below(1 << 20),
                    2 => self.rng.bits() >> 20,
                    // Linux takes user-space bases only.
                    _ => 0x7fff_ffff_efff - self.rng.below(1 << 13),
                };
            }
        }
    }

    fn fpu(&mut self) {
        let features = self.instruction.cpuid_features();
        let is = |list: &[CpuidFeature]| features.iter().any(|f| list.contains(f));
        use CpuidFeature::{FPU, FPU287, FPU387, FXSR, MMX, SSE, SSE2, SSE3, SSSE3, XSAVE, XSAVEC};
        let whole = is(&[FXSR, XSAVE, XSAVEC]);
        let vector = whole || is(&[SSE, SSE2, SSE3, SSSE3]);
        let x87 = whole
            || is(&[FPU, FPU287, FPU387, MMX])
            || vector && self.uses_mmx()
            || self.instruction.code() == Code::Fisttp_m16int
            || self.instruction.mnemonic() == Mnemonic::Fisttp;
        if vector || self.rng.one_in(100) {
            self.vector_state();
        }
        if x87 || self.rng.one_in(100) {
            self.x87_state();
        }
        if is_xsave(&self.instruction) {
            // Whether a component in its initial state counts as in use is the processor's own
            // business (Vol. 1, "Processor Tracking of XSAVE-Managed State").
            self.case.state.fpu.tag |= 1;
            self.case.state.fpu.xmm[0] |= 1;
        }
    }

    fn uses_mmx(&self) -> bool {
        let kinds = self.instruction.code().op_code().op_kinds();
        kinds.iter().any(|k| format!("{k:?}").starts_with("mm_"))
    }

    fn lane(&self) -> Lane {
        Lane::of(self.instruction.code().op_code().memory_size())
    }

    fn vector_state(&mut self) {
        let lane = self.lane();
        let other = self.rng.pick(&[
            Lane::Single,
            Lane::Double,
            Lane::Integer(4),
            Lane::Integer(1),
        ]);
        let lane = if lane == Lane::Extended || self.rng.one_in(8) {
            other
        } else {
            lane
        };
        let lane = match (lane, self.rng.below(2)) {
            // Sources of conversions to and from integers are of the other kind.
            (Lane::Integer(4), 0) => Lane::Single,
            (Lane::Integer(8), 0) => Lane::Double,
            (lane, _) => lane,
        };
        let equal = self.rng.one_in(12);
        let fpu = &mut self.case.state.fpu;
        for i in 0..16 {
            let mut bytes = [0; 16];
            lane.fill(self.rng, &mut bytes);
            fpu.xmm[i] = u128::from_le_bytes(bytes);
            if equal && i > 0 {
                fpu.xmm[i] = fpu.xmm[i - 1];
            }
        }
        let mut mxcsr = 0x1f80;
        mxcsr |= (self.rng.bits() as u32 & 3) << 13;
        if self.rng.one_in(4) {
            mxcsr |= self.rng.bits() as u32 & 0x3f;
        }
        if self.rng.one_in(5) {
            mxcsr |= 0x8000; // FTZ
        }
        if self.rng.one_in(5) {
            mxcsr |= 0x40; // DAZ
        }
        if self.rng.one_in(6) {
            mxcsr ^= (self.rng.bits() as u32 & 0x3f) << 7;
        }
        fpu.mxcsr = mxcsr;
    }

    fn x87_state(&mut self) {
        let mmx = self.uses_mmx();
        let lane = self.lane();
        let fpu = &mut self.case.state.fpu;
        for st in &mut fpu.st {
            if mmx {
                lane.fill(self.rng, &mut st[..8]);
                st[8..].fill(0xff);
            } else {
                Lane::Extended.fill(self.rng, st);
            }
        }
        if !mmx && self.rng.one_in(8) {
            // Numbers of like size: cancellation, equality.
            let base = fpu.st[0];
            for st in &mut fpu.st[1..] {
                *st = base;
                st[0] ^= self.rng.bits() as u8 & 1;
                st[9] ^= self.rng.bits() as u8 & 0x80;
            }
        }
        let rng = &mut *self.rng;
        fpu.control = 0x7f
            | rng.pick(&[0x300, 0x300, 0x300, 0x200, 0x000])
            | (rng.bits() as u16 & 3) << 10
            | (rng.bits() as u16 & 1) << 12;
        if rng.one_in(6) {
            fpu.control ^= rng.bits() as u16 & 0x3f;
        }
        fpu.status = rng.bits() as u16 & 0x7f00;
        if rng.one_in(4) {
            fpu.status |= rng.bits() as u16 & 0x7f;
        }
        if !rng.one_in(10) {
            // Mostly nothing is pending.
            fpu.status &= !0x3f | fpu.control;
        }
        if fpu.status & !fpu.control & 0x3f != 0 {
            fpu.status |= 0x8080;
            // AMD hosts lose the pointers where no exception is pending.
            fpu.instruction = rng.bits() >> 17;
            fpu.operand = rng.bits() >> 17;
            fpu.opcode = rng.bits() as u16 & 0x7ff;
        }
        fpu.tag = match rng.below(8) {
            0 => rng.bits() as u8,
            1 => 0,
            2 => !(1 << rng.below(8)),
            _ => 0xff,
        };
    }

    fn stack(&mut self) {
        let rsp = match self.rng.below(64) {
            0 => STACK.start + self.rng.below(16),
            1 => STACK.end() - self.rng.below(16),
            2 => STACK.end() + self.rng.below(16),
            3 => READ_ONLY.start + self.rng.below(4000),
            4 => quad(self.rng),
            5..=12 => STACK.start + self.rng.below(STACK.len()),
            13 => STACK.start + PAGE + 8 - self.rng.below(16),
            _ => STACK.start + 8 * self.rng.below(STACK.len() / 8),
        };
        self.case.state.gpr[RSP] = rsp;
        if self.instruction.is_stack_instruction() {
            let mut bytes = Vec::new();
            for _ in 0..9 {
                let mut value = quad(self.rng);
                if self.rng.one_in(3) {
                    value = self.rng.below(1 << 33);
                }
                bytes.extend_from_slice(&value.to_le_bytes());
            }
            if self.instruction.mnemonic() == Mnemonic::Popf
                || matches!(
                    self.instruction.mnemonic(),
                    Mnemonic::Popfd | Mnemonic::Popfq
                )
            {
                bytes[1] &= !((TF >> 8) as u8);
            }
            self.case.memory.push(Patch {
                address: rsp,
                bytes,
            });
        }
        if matches!(
            self.instruction.mnemonic(),
            Mnemonic::Leave | Mnemonic::Enter
        ) && !self.rng.one_in(10)
        {
            self.case.state.gpr[RBP] = STACK.start + 8 * self.rng.below(STACK.len() / 8);
        }
    }

    /// Registers that an instruction reads without naming them, where most values say little.
    fn implicit_inputs(&mut self) {
        let gpr = &mut self.case.state.gpr;
        if self.instruction.has_rep_prefix() || self.instruction.has_repne_prefix() {
            let low = self.rng.below(4);
            gpr[RCX] = match self.rng.below(3) {
                0 => low,
                1 => low | self.rng.bits() << 32,
                _ => gpr[RCX],
            };
        }
        let mask_registers = [Register::CL, Register::ECX];
        if mask_registers.contains(&self.instruction.op1_register())
            || self.instruction.op2_register() == Register::CL
        {
            gpr[RCX] = gpr[RCX] & !0xff | self.rng.below(72);
        }
        match self.instruction.mnemonic() {
            _ if is_xsave(&self.instruction) => {
                // The host has more state components than we compare.
                gpr[RAX] &= 3;
                gpr[RDX] = 0;
            }
            Mnemonic::Div | Mnemonic::Idiv if self.rng.one_in(2) => {
                gpr[RDX] = match self.rng.below(3) {
                    0 => 0,
                    1 => u64::MAX,
                    _ => self.rng.below(100),
                };
            }
            Mnemonic::Bextr => (),
            _ => (),
        }
    }

    /// Makes the memory operands land where something is, and puts something there.
    fn operand(&mut self) {
        let instruction = self.instruction;
        let size = match instruction.memory_size() {
            MemorySize::Xsave | MemorySize::Xsave64 => 576 + 256,
            size => size.size().max(1),
        };
        for operand in 0..instruction.op_count() {
            match instruction.op_kind(operand) {
                OpKind::Memory => {
                    let target = self.target(size);
                    let target = self.aim(target);
                    self.fill(target, size);
                }
                OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => {
                    let target = self.target(size);
                    self.point(RSI, target, instruction.memory_segment());
                    self.fill(target, size);
                }
                OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => {
                    let target = self.target(size);
                    self.point(RDI, target, instruction.memory_segment());
                    self.fill(target, size);
                }
                OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => {
                    let target = self.target(size);
                    self.point(RDI, target, Register::ES);
                    if self.rng.one_in(3) {
                        self.copy_last_patch(target);
                    } else {
                        self.fill(target, size);
                    }
                }
                _ => (),
            }
        }
    }

    fn segment_base(&self, segment: Register) -> u64 {
        match segment {
            Register::FS => self.case.state.fs_base,
            Register::GS => self.case.state.gs_base,
            _ => 0,
        }
    }

    fn point(&mut self, register: usize, target: u64, segment: Register) {
        self.case.state.gpr[register] = target.wrapping_sub(self.segment_base(segment));
    }

    fn copy_last_patch(&mut self, address: u64) {
        if let Some(last) = self.case.memory.last() {
            let bytes = last.bytes.clone();
            self.case.memory.push(Patch { address, bytes });
        }
    }

    /// A linear address for an operand of `size` bytes.
    fn target(&mut self, size: usize) -> u64 {
        let size = size as u64;
        let rng = &mut *self.rng;
        let room = DATA.len() - size.next_multiple_of(64);
        match rng.below(100) {
            0..52 => DATA.start + rng.below(room / 64 + 1) * 64,
            52..60 => DATA.start + rng.below(room / 16 + 1) * 16,
            60..72 => DATA.start + rng.below(room),
            72..80 => DATA.start + PAGE * (1 + rng.below(3)) - 1 - rng.below(size + 2).min(80),
            80..83 => READ_ONLY.start + rng.below(PAGE / 16) * 16,
            83..86 => READ_ONLY.start - rng.below(size + 1).min(80),
            86..89 => READ_ONLY.end() - rng.below(size + 1).min(80),
            89..96 => HIGH.start + rng.below(PAGE / 16) * 16,
            96 => HIGH.end() - rng.below(size + 1),
            97 => STACK.start + rng.below(STACK.len()),
            98 => 0x1000 + rng.below(0x1000),
            _ => quad(rng),
        }
    }

    /// Sets registers or the displacement so that the memory operand is at `target`, as far as the
    /// form can reach it. Gives the linear address.
    fn aim(&mut self, target: u64) -> u64 {
        let i = self.instruction;
        let segment = if self.mode == Mode::Long {
            self.segment_base(i.memory_segment())
        } else {
            0
        };
        let offset = target.wrapping_sub(segment);
        let (base, index) = (i.memory_base(), i.memory_index());
        let size = self.offsets.displacement_size();
        let mut patch = |value: u64| {
            let at = self.offsets.displacement_offset();
            self.case.code[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        };
        if i.is_ip_rel_memory_operand() {
            let next = i.next_ip();
            patch(offset.wrapping_sub(next));
            return target;
        }
        if base == Register::None && index == Register::None {
            patch(offset);
            return target;
        }
        let displacement = i.memory_displacement64();
        let scale = u64::from(i.memory_index_scale());
        let want = offset.wrapping_sub(displacement);
        if base == Register::None {
            // Only an index: what is left over by the scale goes to the linear address.
            let value = want / scale;
            self.set(index, value);
            return target;
        }
        if index == Register::None {
            self.set(base, want);
            return target;
        }
        let (base_number, index_number) = (base.full_register(), index.full_register());
        if base_number == index_number && index != Register::AL {
            let value = match scale + 1 {
                2 => want / 2,
                odd => want.wrapping_mul(inverse(odd)),
            };
            self.set(base, value);
        } else {
            if self.rng.one_in(2) {
                let small = self.rng.below(256);
                self.set(index, small);
            }
            let index = self.get(index).wrapping_mul(scale);
            self.set(base, want.wrapping_sub(index));
        }
        target
    }

    fn get(&self, register: Register) -> u64 {
        let value = self.case.state.gpr[register.full_register().number()];
        match register.size() {
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }

    fn set(&mut self, register: Register, value: u64) {
        let number = register.full_register().number();
        self.case.state.gpr[number] = match register.size() {
            // What is above the address size must not matter.
            4 if self.mode == Mode::Long && number != RSP && self.rng.one_in(2) => {
                value & 0xffff_ffff | self.rng.bits() << 32
            }
            _ => value,
        };
    }

    fn fill(&mut self, address: u64, size: usize) {
        let mut bytes = vec![0; size];
        match self.instruction.memory_size() {
            MemorySize::Fxsave_512Byte
            | MemorySize::Fxsave64_512Byte
            | MemorySize::Xsave
            | MemorySize::Xsave64 => {
                self.save_area(&mut bytes);
            }
            MemorySize::FpuEnv14
            | MemorySize::FpuEnv28
            | MemorySize::FpuState94
            | MemorySize::FpuState108 => {
                Lane::Integer(1).fill(self.rng, &mut bytes);
            }
            size => Lane::of(size).fill(self.rng, &mut bytes),
        }
        if self.instruction.mnemonic() == Mnemonic::Ldmxcsr {
            if !self.rng.one_in(8) {
                bytes[2..].fill(0);
            }
            bytes[2] &= !2; // AMD's misaligned exception mask
        }
        self.case.memory.push(Patch { address, bytes });
    }

    fn save_area(&mut self, bytes: &mut [u8]) {
        let rng = &mut *self.rng;
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&rng.bits().to_le_bytes()[..chunk.len()]);
        }
        for i in 0..8 {
            Lane::Extended.fill(rng, &mut bytes[32 + 16 * i..42 + 16 * i]);
        }
        if !rng.one_in(8) {
            bytes[26..28].fill(0); // reserved bits of MXCSR
        }
        bytes[26] &= !2; // AMD's misaligned exception mask
        // Pointers are canonical.
        for top in [13, 21] {
            bytes[top] &= 0x7f;
            bytes[top + 1..top + 3].fill(0);
        }
        if let Some(header) = bytes.get_mut(512..576) {
            header.fill(0);
            header[0] = rng.bits() as u8 & 3;
            if rng.one_in(4) {
                header[15] = 0x80; // compacted
                header[8] = rng.bits() as u8 & 3;
                header[0] &= header[8];
            }
            if rng.one_in(16) {
                let at = rng.below(64) as usize;
                header[at] |= 4 * (at > 1) as u8;
            }
        }
    }

    /// Values that have to match others for the interesting path to be taken.
    fn related_inputs(&mut self) {
        let patch: Option<[u8; 16]> = self.case.memory.last().map(|patch| {
            let mut first = [0; 16];
            let n = patch.bytes.len().min(16);
            first[..n].copy_from_slice(&patch.bytes[..n]);
            first
        });
        let half = self.rng.one_in(2);
        let gpr = &mut self.case.state.gpr;
        match self.instruction.mnemonic() {
            Mnemonic::Cmpxchg if half => {
                let kind = self.instruction.op0_kind();
                let address_uses_rax = self.instruction.memory_base().full_register()
                    == Register::RAX
                    || self.instruction.memory_index().full_register() == Register::RAX;
                if kind == OpKind::Register {
                    let number = self.instruction.op0_register().full_register().number();
                    gpr[RAX] = gpr[number];
                } else if let Some(bytes) = patch
                    && !address_uses_rax
                {
                    let mut low = [0; 8];
                    low.copy_from_slice(&bytes[..8]);
                    gpr[RAX] = u64::from_le_bytes(low);
                }
            }
            Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b if half => {
                if let Some(bytes) = patch {
                    let value = u128::from_le_bytes(bytes);
                    let wide = self.instruction.mnemonic() == Mnemonic::Cmpxchg16b;
                    let bits = if wide { 64 } else { 32 };
                    let mask = u64::MAX >> (64 - bits);
                    let i = self.instruction;
                    for (number, value) in [
                        (RAX, value as u64 & mask),
                        (RDX, (value >> bits) as u64 & mask),
                    ] {
                        let used = [i.memory_base(), i.memory_index()]
                            .iter()
                            .any(|r| r.is_gpr() && r.full_register().number() == number);
                        if !used {
                            gpr[number] = value;
                        }
                    }
                }
            }
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
                if self.instruction.op0_kind() == OpKind::Memory
                    && self.instruction.op1_kind() == OpKind::Register =>
            {
                // Bit offsets reach far: mostly stay in the neighbourhood.
                let register = self.instruction.op1_register();
                let number = register.full_register().number();
                let used = [
                    self.instruction.memory_base(),
                    self.instruction.memory_index(),
                ]
                .iter()
                .any(|r| r.is_gpr() && r.full_register().number() == number);
                if !used && !self.rng.one_in(8) {
                    let offset = self.rng.below(4096) as i64 - 2048;
                    gpr[number] = offset as u64;
                }
            }
            Mnemonic::Xlatb => {
                gpr[RBX] = gpr[RBX].wrapping_add(0);
            }
            _ => (),
        }
        if self.instruction.flow_control() == FlowControl::IndirectBranch && half {
            // Most random targets are not canonical.
            for patch in &mut self.case.memory {
                if patch.bytes.len() >= 8 {
                    patch.bytes[6..8].fill(0);
                }
            }
        }
    }

    fn narrow_to_mode(&mut self) {
        if self.mode == Mode::Long {
            return;
        }
        let state = &mut self.case.state;
        for gpr in &mut state.gpr[..8] {
            *gpr &= 0xffff_ffff;
        }
        state.gpr[8..].fill(0);
        state.fpu.xmm[8..].fill(0);
        state.fpu.instruction &= 0xffff_ffff;
        state.fpu.operand &= 0xffff_ffff;
    }
}

/// The inverse of an odd number modulo 2^64 (Newton's iteration).
fn inverse(odd: u64) -> u64 {
    let mut x = odd;
    for _ in 0..6 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forms::forms;

    #[test]
    fn every_form_can_be_generated() {
        for mode in [Mode::Long, Mode::Compat] {
            let mut rng = Rng::new(1);
            let missing: Vec<_> = forms(mode)
                .into_iter()
                .filter(|code| case(&mut rng, *code, mode).is_none())
                .collect();
            assert!(missing.is_empty(), "{mode:?}: {missing:?}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_cases() {
        let all = forms(Mode::Long);
        let run = || {
            let mut rng = Rng::new(7);
            all.iter()
                .map(|code| case(&mut rng, *code, Mode::Long))
                .collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
    }

    #[test]
    fn inverses_invert() {
        for odd in [3u64, 5, 9] {
            assert_eq!(odd.wrapping_mul(inverse(odd)), 1);
        }
    }
}
