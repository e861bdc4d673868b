//! Operands of a decoded instruction: registers, addresses, places to read and write.

use iced_x86::{Instruction, OpKind, Register};

use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::Exec;
use crate::vcpu::{CodeSize, Seg, Vcpu, reg, rights};

/// Where an operand is, with its address already checked and translated once.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    Register(Register),
    Memory { linear: u64, size: usize },
}

pub(crate) fn mask(size: usize) -> u64 {
    !0 >> (64 - 8 * size)
}

impl Vcpu {
    /// A general register of any width, zero-extended.
    pub fn reg(&self, register: Register) -> u64 {
        let n = register as usize;
        if register >= Register::RAX && register <= Register::R15 {
            self.gpr[n - Register::RAX as usize]
        } else if register >= Register::EAX && register <= Register::R15D {
            self.gpr[n - Register::EAX as usize] as u32 as u64
        } else if register >= Register::AX && register <= Register::R15W {
            self.gpr[n - Register::AX as usize] as u16 as u64
        } else if register >= Register::AL && register <= Register::R15L {
            let n = n - Register::AL as usize;
            match n {
                0..4 => self.gpr[n] & 0xff,
                4..8 => self.gpr[n - 4] >> 8 & 0xff, // AH, CH, DH, BH
                _ => self.gpr[n - 4] & 0xff,
            }
        } else {
            debug_assert!(false, "{register:?} is no general register");
            0
        }
    }

    /// Writes a general register of any width; 32-bit writes clear the upper half.
    pub fn set_reg(&mut self, register: Register, value: u64) {
        let n = register as usize;
        if register >= Register::RAX && register <= Register::R15 {
            self.gpr[n - Register::RAX as usize] = value;
        } else if register >= Register::EAX && register <= Register::R15D {
            self.gpr[n - Register::EAX as usize] = value as u32 as u64;
        } else if register >= Register::AX && register <= Register::R15W {
            let slot = &mut self.gpr[n - Register::AX as usize];
            *slot = *slot & !0xffff | value & 0xffff;
        } else if register >= Register::AL && register <= Register::R15L {
            let n = n - Register::AL as usize;
            let (slot, shift) = match n {
                0..4 => (n, 0),
                4..8 => (n - 4, 8),
                _ => (n - 4, 0),
            };
            self.gpr[slot] = self.gpr[slot] & !(0xff << shift) | (value & 0xff) << shift;
        } else {
            debug_assert!(false, "{register:?} is no general register");
        }
    }

    /// Writes general register `n` with an operand of `size` bytes (no AH-style ones).
    pub fn set_gpr(&mut self, n: usize, size: usize, value: u64) {
        self.gpr[n] = match size {
            8 => value,
            4 => value as u32 as u64,
            _ => self.gpr[n] & !mask(size) | value & mask(size),
        };
    }
}

/// Segment register of a decoder register.
pub(crate) fn segment_of(register: Register) -> Seg {
    match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}

/// Bytes of address of an instruction's memory operand: 2, 4 or 8.
pub(crate) fn address_size(i: &Instruction) -> usize {
    let of = |r: Register| match r {
        Register::None => 0,
        Register::RIP => 8,
        Register::EIP => 4,
        r => r.size(),
    };
    match of(i.memory_base()).max(of(i.memory_index())) {
        0 => i.memory_displ_size().max(2) as usize,
        size => size,
    }
}

impl Ctx<'_> {
    /// Segment and offset of the explicit memory operand.
    pub fn address(&self, i: &Instruction) -> (Seg, u64) {
        let mut offset = i.memory_displacement64();
        let base = i.memory_base();
        if !matches!(base, Register::None | Register::RIP | Register::EIP) {
            offset = offset.wrapping_add(self.cpu.reg(base));
        }
        let index = i.memory_index();
        if index != Register::None {
            offset = offset.wrapping_add(
                self.cpu
                    .reg(index)
                    .wrapping_mul(u64::from(i.memory_index_scale())),
            );
        }
        (self.segment(i), offset & mask(address_size(i)))
    }

    /// Segment of the explicit memory operand, or of a string instruction's source. In 64-bit mode
    /// the prefixes for ES, CS, SS and DS count for nothing, not even for which fault is raised.
    pub fn segment(&self, i: &Instruction) -> Seg {
        match segment_of(i.memory_segment()) {
            seg @ (Seg::Fs | Seg::Gs) => seg,
            seg if !self.cpu.is_64() => seg,
            _ => match i.memory_base() {
                Register::RSP | Register::RBP | Register::ESP | Register::EBP => Seg::Ss,
                _ => Seg::Ds,
            },
        }
    }

    /// Linear address of the explicit memory operand, taken to be `size` bytes.
    pub fn memory(&self, i: &Instruction, size: u64, access: Access) -> Exec<u64> {
        let (seg, offset) = self.address(i);
        self.linear(seg, offset, size, access)
    }

    /// Operand `n` as a place. With `Access::Write` it is known to be writable, so that a later
    /// [`Ctx::put`] cannot fault.
    pub fn place(&mut self, i: &Instruction, n: u32, access: Access) -> Exec<Place> {
        if i.op_kind(n) == OpKind::Register {
            return Ok(Place::Register(i.op_register(n)));
        }
        let size = i.memory_size().size();
        let linear = self.memory(i, size as u64, access)?;
        if access == Access::Write {
            self.probe_write(linear, size as u64)?;
        }
        Ok(Place::Memory { linear, size })
    }

    /// Value at a place of at most 8 bytes.
    pub fn get(&mut self, place: Place) -> Exec<u64> {
        match place {
            Place::Register(register) => Ok(self.cpu.reg(register)),
            Place::Memory { linear, size } => self.load_sized(linear, size),
        }
    }

    /// Stores at a place of at most 8 bytes.
    pub fn put(&mut self, place: Place, value: u64) -> Exec {
        match place {
            Place::Register(register) => {
                self.cpu.set_reg(register, value);
                Ok(())
            }
            Place::Memory { linear, size } => self.store_sized(linear, size, value),
        }
    }

    /// Loads 1, 2, 4 or 8 bytes, zero-extended.
    pub fn load_sized(&mut self, linear: u64, size: usize) -> Exec<u64> {
        Ok(match size {
            1 => u64::from(self.load::<1>(linear)?[0]),
            2 => u64::from(u16::from_le_bytes(self.load(linear)?)),
            4 => u64::from(u32::from_le_bytes(self.load(linear)?)),
            _ => u64::from_le_bytes(self.load(linear)?),
        })
    }

    /// Stores the low 1, 2, 4 or 8 bytes.
    pub fn store_sized(&mut self, linear: u64, size: usize, value: u64) -> Exec {
        match size {
            1 => self.store(linear, [value as u8]),
            2 => self.store(linear, (value as u16).to_le_bytes()),
            4 => self.store(linear, (value as u32).to_le_bytes()),
            _ => self.store(linear, value.to_le_bytes()),
        }
    }

    /// Operand `n`, a register, immediate or memory of at most 8 bytes. Immediates come
    /// sign-extended to 64 bits.
    pub fn operand(&mut self, i: &Instruction, n: u32) -> Exec<u64> {
        match i.op_kind(n) {
            OpKind::Register => Ok(self.cpu.reg(i.op_register(n))),
            OpKind::Memory => {
                let size = i.memory_size().size();
                let linear = self.memory(i, size as u64, Access::Read)?;
                self.load_sized(linear, size)
            }
            _ => Ok(i.immediate(n)),
        }
    }

    /// Writes operand `n`, a register or memory of at most 8 bytes.
    pub fn set_operand(&mut self, i: &Instruction, n: u32, value: u64) -> Exec {
        if i.op_kind(n) == OpKind::Register {
            self.cpu.set_reg(i.op_register(n), value);
            return Ok(());
        }
        let size = i.memory_size().size();
        let linear = self.memory(i, size as u64, Access::Write)?;
        self.store_sized(linear, size, value)
    }

    /// Bytes of operand `n` (register or memory).
    pub fn operand_size(&self, i: &Instruction, n: u32) -> usize {
        match i.op_kind(n) {
            OpKind::Register => i.op_register(n).size(),
            _ => i.memory_size().size(),
        }
    }

    // ---- stack ----

    /// Bytes of stack pointer in use: 8, 4 or 2.
    pub fn stack_width(&self) -> usize {
        match self.cpu.code_size {
            CodeSize::Bits64 => 8,
            _ if self.cpu.seg(Seg::Ss).rights & rights::BIG != 0 => 4,
            _ => 2,
        }
    }

    /// Pushes `size` bytes. On a fault RSP is unchanged.
    pub fn push(&mut self, size: usize, value: u64) -> Exec {
        let width = self.stack_width();
        let top = self.cpu.gpr[reg::RSP].wrapping_sub(size as u64) & mask(width);
        let linear = self.linear(Seg::Ss, top, size as u64, Access::Write)?;
        self.store_sized(linear, size, value)?;
        self.cpu.set_gpr(reg::RSP, width, top);
        Ok(())
    }

    /// Pops `size` bytes. On a fault RSP is unchanged.
    pub fn pop(&mut self, size: usize) -> Exec<u64> {
        let value = self.peek_stack(0, size)?;
        self.drop_stack(size as u64);
        Ok(value)
    }

    /// The `size` bytes `offset` above the top of the stack.
    pub fn peek_stack(&mut self, offset: u64, size: usize) -> Exec<u64> {
        let at = self.cpu.gpr[reg::RSP].wrapping_add(offset) & mask(self.stack_width());
        let linear = self.linear(Seg::Ss, at, size as u64, Access::Read)?;
        self.load_sized(linear, size)
    }

    /// The `N` top words of the stack of 64-bit mode, where they are in one page that the TLB has and nothing
    /// watches data.
    pub fn peek_words<const N: usize>(&self) -> Option<[u64; N]> {
        let rsp = self.cpu.gpr[reg::RSP];
        if !self.cpu.is_64() || !crate::mem::canonical(rsp) || self.watches_data() {
            return None;
        }
        let tlb = &self.cpu.tlb;
        let offset = tlb.read_offset(rsp, 8 * N as u64, self.cpu.tlb_key)?;
        Some(core::array::from_fn(|n| {
            u64::from_le_bytes(self.ram.get(offset + 8 * n))
        }))
    }

    /// Adds to the stack pointer.
    pub fn drop_stack(&mut self, bytes: u64) {
        let width = self.stack_width();
        let top = self.cpu.gpr[reg::RSP].wrapping_add(bytes);
        self.cpu.set_gpr(reg::RSP, width, top);
    }

    // ---- branches ----

    /// Jumps near, after the check of the target (Vol. 2, JMP, near). `size` is the operand size.
    pub fn jump(&mut self, target: u64, size: usize) -> Exec {
        let target = target & mask(size);
        let inside = if self.cpu.is_64() {
            crate::mem::canonical(target)
        } else {
            target <= u64::from(self.cpu.seg(Seg::Cs).limit)
        };
        if !inside {
            return Err(crate::trap::GP0);
        }
        self.cpu.rip = target;
        Ok(())
    }
}
