//! The hot loop: one `match` over compact operations.
//!
//! A hot operation touches registers, flags and RAM behind a TLB hit, and nothing else. Where
//! that is not enough (TLB miss, device, code page, page crossing) it has changed nothing yet and
//! the instruction runs through `exec` instead, which raises the faults.

use iced_x86::Instruction;

use crate::block::{BlockId, CodeCache, FAR, Key, NO_BLOCK};
use crate::bus::{Bus, Tick};
use crate::exec;
use crate::flags::{Flags, Width, bit};
use crate::lower::alu::*;
use crate::lower::{Code, Op};
use crate::mem::{Ctx, canonical};
use crate::ram::Ram;
use crate::trap::{Exec, UD};
use crate::vcpu::{CodeSize, Vcpu, reg};

/// Where the loop stopped. RIP is that of the next instruction.
pub(crate) enum Next {
    /// Nothing is known of the next block.
    Lookup,
    /// The next block was reached from this one by its operation with this [`Op::at`].
    Link(BlockId, u16),
    /// The next block takes more ticks than are left.
    Budget,
}

#[inline(always)]
fn get(cpu: &Vcpu, n: u8) -> u64 {
    cpu.gpr[n as usize]
}

#[inline(always)]
fn put<T: Width>(cpu: &mut Vcpu, n: u8, value: u64) {
    let slot = &mut cpu.gpr[n as usize];
    *slot = match T::BITS {
        64 => value,
        32 => value as u32 as u64,
        bits => *slot & (!0 << bits) | value & !(!0 << bits),
    };
}

#[inline(always)]
fn address(cpu: &Vcpu, op: &Op) -> u64 {
    get(cpu, op.base)
        .wrapping_add(get(cpu, op.index) << (op.scale & 63))
        .wrapping_add(op.disp)
        .wrapping_add(get(cpu, op.seg))
}

/// Address of a base and a displacement alone.
#[inline(always)]
fn near(cpu: &Vcpu, op: &Op) -> u64 {
    get(cpu, op.base).wrapping_add(op.disp)
}

#[inline(always)]
fn low<T: Width>(value: u64) -> u64 {
    if T::BITS == 64 {
        value
    } else {
        value & !(!0 << T::BITS)
    }
}

#[inline(always)]
fn alu<T: Width, const OP: u8>(flags: &mut Flags, a: u64, b: u64) -> u64 {
    match OP {
        ADD => {
            let r = a.wrapping_add(b);
            flags.add::<T>(a, b, r);
            r
        }
        ADC => {
            let r = a.wrapping_add(b).wrapping_add(flags.cf() as u64);
            flags.add::<T>(a, b, r);
            r
        }
        SUB | CMP => {
            let r = a.wrapping_sub(b);
            flags.sub::<T>(a, b, r);
            r
        }
        SBB => {
            let r = a.wrapping_sub(b).wrapping_sub(flags.cf() as u64);
            flags.sub::<T>(a, b, r);
            r
        }
        _ => {
            let r = match OP {
                OR => a | b,
                XOR => a ^ b,
                _ => a & b,
            };
            flags.logic::<T>(r);
            r
        }
    }
}

/// Loads behind a TLB hit.
#[inline(always)]
fn load<T: Width>(cpu: &Vcpu, ram: &Ram, linear: u64) -> Option<u64> {
    let offset = cpu
        .tlb
        .read_offset(linear, u64::from(T::BITS / 8), cpu.tlb_key)?;
    Some(fetch::<T>(ram, offset))
}

#[inline(always)]
fn fetch<T: Width>(ram: &Ram, offset: usize) -> u64 {
    match T::BITS {
        8 => u64::from(ram.get::<1>(offset)[0]),
        16 => u64::from(u16::from_le_bytes(ram.get(offset))),
        32 => u64::from(u32::from_le_bytes(ram.get(offset))),
        _ => u64::from_le_bytes(ram.get(offset)),
    }
}

#[inline(always)]
fn writable<T: Width>(cpu: &Vcpu, linear: u64) -> Option<usize> {
    cpu.tlb
        .write_offset(linear, u64::from(T::BITS / 8), cpu.tlb_key)
}

#[inline(always)]
fn store<T: Width>(ram: &mut Ram, offset: usize, value: u64) {
    match T::BITS {
        8 => ram.put(offset, [value as u8]),
        16 => ram.put(offset, (value as u16).to_le_bytes()),
        32 => ram.put(offset, (value as u32).to_le_bytes()),
        _ => ram.put(offset, value.to_le_bytes()),
    }
}

/// Shift or rotate by a count that is not zero and less than the width.
#[inline(always)]
fn shift<T: Width>(flags: &mut Flags, kind: u8, value: u64, count: u32) -> u64 {
    let bits = T::BITS;
    let value = low::<T>(value);
    match kind {
        0 => {
            let r = value << count;
            let cf = value >> (bits - count) & 1 != 0;
            let top = r >> (bits - 1) & 1 != 0;
            flags.shift::<T>(r, cf, top ^ cf);
            r
        }
        1 => {
            let before = value >> (count - 1);
            let r = before >> 1;
            flags.shift::<T>(r, before & 1 != 0, before >> (bits - 1) & 1 != 0);
            r
        }
        _ => {
            let signed = T::sign_extend(value) as i64;
            let r = (signed >> count) as u64;
            flags.shift::<T>(r, signed >> (count - 1) & 1 != 0, false);
            r
        }
    }
}

/// Runs blocks from `id` on. At most `left` ticks are used and `left` is lowered by them; an
/// instruction that faults takes a tick too. On an error RIP is that of the instruction.
#[expect(
    clippy::too_many_lines,
    clippy::cognitive_complexity,
    reason = "one dense match"
)]
pub(crate) fn run(code: &CodeCache, id: BlockId, x: &mut Ctx, left: &mut u64) -> Exec<Next> {
    let end = x.now + *left;
    // Taken apart, so that the parts can stay in host registers.
    let (cpu, ram, now) = (&mut *x.cpu, &mut *x.ram, &mut x.now);
    let bus = &mut *x.bus;
    let mut at_head = code.blocks[id as usize].first as usize;
    'blocks: loop {
        let [head, ops @ ..] = &code.ops[at_head..] else {
            return Ok(Next::Lookup);
        };
        let count = u64::from(head.at);
        if count > *left {
            cpu.rip = head.imm;
            return Ok(Next::Budget);
        }

        // Leaves the block by the link of $op, which leads to $target.
        macro_rules! follow {
            ($op:expr, $target:expr) => {{
                let mut next = $op.link;
                if next >= FAR {
                    cpu.rip = $target;
                    if next != NO_BLOCK {
                        next = follow_far(code, cpu, next).unwrap_or(NO_BLOCK);
                    }
                    if next == NO_BLOCK {
                        return Ok(Next::Link(head.link, $op.at));
                    }
                }
                at_head = next as usize;
                continue 'blocks;
            }};
        }
        // Leaves the block through its last instruction to an address only known now.
        macro_rules! indirect {
            ($target:expr) => {{
                cpu.rip = $target;
                *left -= count;
                match lookup(code, cpu) {
                    Some(next) => {
                        at_head = next as usize;
                        continue 'blocks;
                    }
                    None => return Ok(Next::Lookup),
                }
            }};
        }
        for op in ops {
            // Runs the instruction through `exec` and comes back, unless the block must be left.
            macro_rules! checked {
                () => {{
                    let i = &code.instructions[at_head + 1 + usize::from(op.at)];
                    let at = u64::from(op.at);
                    *now = end - *left + at;
                    let leave = checked(i, &mut *cpu, &mut *ram, &mut *bus, *now);
                    if leave != Ok(false) {
                        *left -= at + 1;
                        return leave.map(|_| Next::Lookup);
                    }
                }};
            }
            // Runs the instruction through `exec` instead of its operation.
            macro_rules! cold {
                () => {{
                    checked!();
                    if u64::from(op.at) + 1 == count {
                        *left -= count;
                        return Ok(Next::Lookup);
                    }
                    continue;
                }};
            }
            macro_rules! load {
                ($w:ty, $linear:expr) => {
                    match load::<$w>(cpu, ram, $linear) {
                        Some(value) => value,
                        None => cold!(),
                    }
                };
            }
            macro_rules! writable {
                ($w:ty, $linear:expr) => {
                    match writable::<$w>(cpu, $linear) {
                        Some(offset) => offset,
                        None => cold!(),
                    }
                };
            }
            macro_rules! rr {
                ($w:ty, $op:ident) => {{
                    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
                    let r = alu::<$w, $op>(&mut cpu.flags, a, b);
                    if $op < CMP {
                        put::<$w>(cpu, op.dst, r);
                    }
                }};
            }
            macro_rules! ri {
                ($w:ty, $op:ident) => {{
                    let a = get(cpu, op.dst);
                    let r = alu::<$w, $op>(&mut cpu.flags, a, op.imm);
                    if $op < CMP {
                        put::<$w>(cpu, op.dst, r);
                    }
                }};
            }
            macro_rules! rm {
                ($w:ty, $op:ident) => {{
                    let b = load!($w, address(cpu, op));
                    let a = get(cpu, op.dst);
                    let r = alu::<$w, $op>(&mut cpu.flags, a, b);
                    if $op < CMP {
                        put::<$w>(cpu, op.dst, r);
                    }
                }};
            }
            macro_rules! to_memory {
                ($w:ty, $op:ident, $b:expr) => {{
                    let linear = address(cpu, op);
                    let b = $b;
                    if $op >= CMP {
                        let a = load!($w, linear);
                        alu::<$w, $op>(&mut cpu.flags, a, b);
                    } else {
                        let offset = writable!($w, linear);
                        let a = fetch::<$w>(ram, offset);
                        let r = alu::<$w, $op>(&mut cpu.flags, a, b);
                        store::<$w>(ram, offset, r);
                    }
                }};
            }
            macro_rules! mr {
                ($w:ty, $op:ident) => {
                    to_memory!($w, $op, get(cpu, op.src))
                };
            }
            macro_rules! mi {
                ($w:ty, $op:ident) => {
                    to_memory!($w, $op, op.imm)
                };
            }
            macro_rules! mov_rr {
                ($w:ty) => {{
                    let value = get(cpu, op.src);
                    put::<$w>(cpu, op.dst, value)
                }};
            }
            macro_rules! mov_ri {
                ($w:ty) => {
                    put::<$w>(cpu, op.dst, op.imm)
                };
            }
            macro_rules! mov_rm {
                ($w:ty) => {{
                    let value = load!($w, address(cpu, op));
                    put::<$w>(cpu, op.dst, value)
                }};
            }
            macro_rules! mov_mr {
                ($w:ty) => {{
                    let offset = writable!($w, address(cpu, op));
                    let value = get(cpu, op.src);
                    store::<$w>(ram, offset, value)
                }};
            }
            macro_rules! mov_rd {
                () => {{
                    let value = load!(u64, near(cpu, op));
                    put::<u64>(cpu, op.dst, value)
                }};
            }
            macro_rules! mov_dr {
                () => {{
                    let offset = writable!(u64, near(cpu, op));
                    let value = get(cpu, op.src);
                    store::<u64>(ram, offset, value)
                }};
            }
            macro_rules! mov_mi {
                ($w:ty) => {{
                    let offset = writable!($w, address(cpu, op));
                    store::<$w>(ram, offset, op.imm)
                }};
            }
            // MOVZX and MOVSX: from width $from, sign-extended or not, to width $to.
            macro_rules! extend_rr {
                ($from:ty, $to:ty, $signed:expr) => {{
                    let value = get(cpu, op.src);
                    let value = if $signed {
                        <$from>::sign_extend(value)
                    } else {
                        low::<$from>(value)
                    };
                    put::<$to>(cpu, op.dst, value)
                }};
            }
            macro_rules! extend_rm {
                ($from:ty, $to:ty, $signed:expr) => {{
                    let value = load!($from, address(cpu, op));
                    let value = if $signed {
                        <$from>::sign_extend(value)
                    } else {
                        value
                    };
                    put::<$to>(cpu, op.dst, value)
                }};
            }
            macro_rules! step_r {
                ($w:ty, $method:ident, $by:expr) => {{
                    let a = get(cpu, op.dst);
                    let r = a.wrapping_add($by);
                    cpu.flags.$method::<$w>(a, r);
                    put::<$w>(cpu, op.dst, r)
                }};
            }
            macro_rules! step_m {
                ($w:ty, $method:ident, $by:expr) => {{
                    let offset = writable!($w, address(cpu, op));
                    let a = fetch::<$w>(ram, offset);
                    let r = a.wrapping_add($by);
                    cpu.flags.$method::<$w>(a, r);
                    store::<$w>(ram, offset, r)
                }};
            }
            // As computed on operands of width $w, the first in `base`, without flags.
            macro_rules! quiet {
                ($w:ty, $b:expr, |$x:ident, $y:ident| $result:expr) => {{
                    let ($x, $y) = (get(cpu, op.base) as $w, $b as $w);
                    put::<$w>(cpu, op.dst, $result as u64)
                }};
            }
            macro_rules! shift_by {
                ($w:ty, $kind:expr, $count:expr) => {{
                    let count = $count as u32 & (<$w>::BITS - 1);
                    if count != 0 {
                        let value = get(cpu, op.dst);
                        let r = shift::<$w>(&mut cpu.flags, $kind, value, count);
                        put::<$w>(cpu, op.dst, r);
                    } else if <$w>::BITS == 32 {
                        // A count of zero still clears the upper half.
                        let value = get(cpu, op.dst);
                        put::<$w>(cpu, op.dst, value);
                    }
                }};
            }
            macro_rules! rotate {
                ($w:ty, $left:expr) => {{
                    let value = get(cpu, op.dst) as $w;
                    let count = op.imm as u32;
                    let flags = &mut cpu.flags;
                    let top = |r: $w| r >> (<$w>::BITS - 1) & 1 != 0;
                    let (r, cf, of) = if $left {
                        let r = value.rotate_left(count);
                        (r, r & 1 != 0, top(r) ^ (r & 1 != 0))
                    } else {
                        let r = value.rotate_right(count);
                        (r, top(r), top(r) ^ top(r << 1))
                    };
                    flags.set_cf_of(cf, of);
                    put::<$w>(cpu, op.dst, r as u64)
                }};
            }
            macro_rules! imul {
                ($w:ty, $s:ty, $a:expr, $b:expr) => {{
                    let (a, b) = ($a as $s, $b as $s);
                    let (r, overflow) = a.overflowing_mul(b);
                    cpu.flags.shift::<$w>(r as u64, overflow, overflow);
                    put::<$w>(cpu, op.dst, r as u64)
                }};
            }
            macro_rules! bit_test {
                ($w:ty, $bit:expr) => {{
                    let bit = $bit & u64::from(<$w>::BITS - 1);
                    let cf = get(cpu, op.dst) >> bit & 1 != 0;
                    cpu.flags.set_cf(cf)
                }};
            }
            macro_rules! bit_change {
                ($w:ty, |$value:ident, $selected:ident| $result:expr) => {{
                    let offset = writable!($w, address(cpu, op));
                    let ($value, $selected) = (fetch::<$w>(ram, offset), op.imm);
                    cpu.flags.set_cf($value & $selected != 0);
                    store::<$w>(ram, offset, $result)
                }};
            }
            macro_rules! cmpxchg {
                ($w:ty) => {{
                    let offset = writable!($w, address(cpu, op));
                    let (a, old) = (low::<$w>(cpu.gpr[reg::RAX]), fetch::<$w>(ram, offset));
                    alu::<$w, CMP>(&mut cpu.flags, a, old);
                    if a == old {
                        store::<$w>(ram, offset, get(cpu, op.src))
                    } else {
                        put::<$w>(cpu, reg::RAX as u8, old)
                    }
                }};
            }
            macro_rules! xadd {
                ($w:ty) => {{
                    let offset = writable!($w, address(cpu, op));
                    let (a, b) = (fetch::<$w>(ram, offset), get(cpu, op.src));
                    let sum = alu::<$w, ADD>(&mut cpu.flags, a, b);
                    put::<$w>(cpu, op.src, a);
                    store::<$w>(ram, offset, sum)
                }};
            }
            // On the second lowest byte of a register and the immediate.
            macro_rules! high_byte {
                ($op:ident) => {{
                    let a = get(cpu, op.dst) >> 8 & 0xff;
                    alu::<u8, $op>(&mut cpu.flags, a, op.imm)
                }};
            }
            macro_rules! push {
                ($value:expr) => {{
                    let top = cpu.gpr[reg::RSP].wrapping_sub(8);
                    let offset = writable!(u64, top);
                    let value = $value;
                    store::<u64>(ram, offset, value);
                    cpu.gpr[reg::RSP] = top;
                }};
            }
            // Leaves the block by a jump after the first $done instructions.
            macro_rules! jump_to {
                ($target:expr, $done:expr) => {{
                    *left -= $done;
                    follow!(op, $target)
                }};
            }
            macro_rules! branch {
                ($taken:expr) => {
                    if $taken {
                        jump_to!(op.imm, u64::from(op.at) + 1)
                    }
                };
            }
            macro_rules! fused_branch {
                ($condition:literal) => {
                    if cpu.flags.condition($condition) {
                        jump_to!(
                            code.instructions[at_head + 2 + usize::from(op.at)].near_branch64(),
                            u64::from(op.at) + 2
                        )
                    }
                };
            }
            macro_rules! rr_jump {
                ($w:ty, $op:ident, $condition:literal) => {{
                    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
                    alu::<$w, $op>(&mut cpu.flags, a, b);
                    fused_branch!($condition)
                }};
            }
            macro_rules! ri_jump {
                ($w:ty, $op:ident, $condition:literal) => {{
                    let a = get(cpu, op.dst);
                    alu::<$w, $op>(&mut cpu.flags, a, op.imm);
                    fused_branch!($condition)
                }};
            }
            macro_rules! rm_jump {
                ($w:ty, $op:ident, $condition:literal) => {{
                    match load::<$w>(cpu, ram, address(cpu, op)) {
                        Some(b) => {
                            let a = get(cpu, op.dst);
                            alu::<$w, $op>(&mut cpu.flags, a, b);
                        }
                        None => checked!(),
                    }
                    fused_branch!($condition)
                }};
            }
            macro_rules! mi_jump {
                ($w:ty, $op:ident, $condition:literal) => {{
                    match load::<$w>(cpu, ram, address(cpu, op)) {
                        Some(a) => {
                            alu::<$w, $op>(&mut cpu.flags, a, op.imm);
                        }
                        None => checked!(),
                    }
                    fused_branch!($condition)
                }};
            }
            macro_rules! call {
                ($target:expr) => {{
                    let target = $target;
                    if !canonical(target) {
                        cold!();
                    }
                    push!(op.imm);
                    indirect!(target)
                }};
            }
            macro_rules! jump {
                ($target:expr) => {{
                    let target = $target;
                    if !canonical(target) {
                        cold!();
                    }
                    indirect!(target)
                }};
            }

            // The three most frequent: a branch for each is foretold better than one jump for all.
            if op.code == Code::MovRd64 {
                mov_rd!();
                continue;
            }
            if op.code == Code::MovRr64 {
                mov_rr!(u64);
                continue;
            }
            if op.code == Code::MovDr64 {
                mov_dr!();
                continue;
            }
            match op.code {
                Code::Cold => cold!(),
                Code::Undefined => {
                    let i = &code.instructions[at_head + 1 + usize::from(op.at)];
                    cpu.rip = i.ip();
                    *left -= u64::from(op.at) + 1;
                    return Err(UD);
                }
                Code::Repeat => {
                    let at = u64::from(op.at);
                    let i = &code.instructions[at_head + 1 + usize::from(op.at)];
                    cpu.rip = i.next_ip();
                    *now = end - *left + at;
                    *left -= at;
                    let x = &mut Ctx {
                        cpu: &mut *cpu,
                        ram: &mut *ram,
                        bus: &mut *bus,
                        now: *now,
                    };
                    return exec::repeat(x, i, left).map(|()| Next::Lookup);
                }
                Code::Nop | Code::Head => {}
                Code::End => {
                    *left -= count;
                    follow!(op, op.imm)
                }
                Code::AddRr8 => rr!(u8, ADD),
                Code::AddRi8 => ri!(u8, ADD),
                Code::AddRm8 => rm!(u8, ADD),
                Code::AddMr8 => mr!(u8, ADD),
                Code::AddMi8 => mi!(u8, ADD),
                Code::AddRr16 => rr!(u16, ADD),
                Code::AddRi16 => ri!(u16, ADD),
                Code::AddRm16 => rm!(u16, ADD),
                Code::AddMr16 => mr!(u16, ADD),
                Code::AddMi16 => mi!(u16, ADD),
                Code::AddRr32 => rr!(u32, ADD),
                Code::AddRi32 => ri!(u32, ADD),
                Code::AddRm32 => rm!(u32, ADD),
                Code::AddMr32 => mr!(u32, ADD),
                Code::AddMi32 => mi!(u32, ADD),
                Code::AddRr64 => rr!(u64, ADD),
                Code::AddRi64 => ri!(u64, ADD),
                Code::AddRm64 => rm!(u64, ADD),
                Code::AddMr64 => mr!(u64, ADD),
                Code::AddMi64 => mi!(u64, ADD),
                Code::OrRr8 => rr!(u8, OR),
                Code::OrRi8 => ri!(u8, OR),
                Code::OrRm8 => rm!(u8, OR),
                Code::OrMr8 => mr!(u8, OR),
                Code::OrMi8 => mi!(u8, OR),
                Code::OrRr16 => rr!(u16, OR),
                Code::OrRi16 => ri!(u16, OR),
                Code::OrRm16 => rm!(u16, OR),
                Code::OrMr16 => mr!(u16, OR),
                Code::OrMi16 => mi!(u16, OR),
                Code::OrRr32 => rr!(u32, OR),
                Code::OrRi32 => ri!(u32, OR),
                Code::OrRm32 => rm!(u32, OR),
                Code::OrMr32 => mr!(u32, OR),
                Code::OrMi32 => mi!(u32, OR),
                Code::OrRr64 => rr!(u64, OR),
                Code::OrRi64 => ri!(u64, OR),
                Code::OrRm64 => rm!(u64, OR),
                Code::OrMr64 => mr!(u64, OR),
                Code::OrMi64 => mi!(u64, OR),
                Code::AdcRr8 => rr!(u8, ADC),
                Code::AdcRi8 => ri!(u8, ADC),
                Code::AdcRm8 => rm!(u8, ADC),
                Code::AdcMr8 => mr!(u8, ADC),
                Code::AdcMi8 => mi!(u8, ADC),
                Code::AdcRr16 => rr!(u16, ADC),
                Code::AdcRi16 => ri!(u16, ADC),
                Code::AdcRm16 => rm!(u16, ADC),
                Code::AdcMr16 => mr!(u16, ADC),
                Code::AdcMi16 => mi!(u16, ADC),
                Code::AdcRr32 => rr!(u32, ADC),
                Code::AdcRi32 => ri!(u32, ADC),
                Code::AdcRm32 => rm!(u32, ADC),
                Code::AdcMr32 => mr!(u32, ADC),
                Code::AdcMi32 => mi!(u32, ADC),
                Code::AdcRr64 => rr!(u64, ADC),
                Code::AdcRi64 => ri!(u64, ADC),
                Code::AdcRm64 => rm!(u64, ADC),
                Code::AdcMr64 => mr!(u64, ADC),
                Code::AdcMi64 => mi!(u64, ADC),
                Code::SbbRr8 => rr!(u8, SBB),
                Code::SbbRi8 => ri!(u8, SBB),
                Code::SbbRm8 => rm!(u8, SBB),
                Code::SbbMr8 => mr!(u8, SBB),
                Code::SbbMi8 => mi!(u8, SBB),
                Code::SbbRr16 => rr!(u16, SBB),
                Code::SbbRi16 => ri!(u16, SBB),
                Code::SbbRm16 => rm!(u16, SBB),
                Code::SbbMr16 => mr!(u16, SBB),
                Code::SbbMi16 => mi!(u16, SBB),
                Code::SbbRr32 => rr!(u32, SBB),
                Code::SbbRi32 => ri!(u32, SBB),
                Code::SbbRm32 => rm!(u32, SBB),
                Code::SbbMr32 => mr!(u32, SBB),
                Code::SbbMi32 => mi!(u32, SBB),
                Code::SbbRr64 => rr!(u64, SBB),
                Code::SbbRi64 => ri!(u64, SBB),
                Code::SbbRm64 => rm!(u64, SBB),
                Code::SbbMr64 => mr!(u64, SBB),
                Code::SbbMi64 => mi!(u64, SBB),
                Code::AndRr8 => rr!(u8, AND),
                Code::AndRi8 => ri!(u8, AND),
                Code::AndRm8 => rm!(u8, AND),
                Code::AndMr8 => mr!(u8, AND),
                Code::AndMi8 => mi!(u8, AND),
                Code::AndRr16 => rr!(u16, AND),
                Code::AndRi16 => ri!(u16, AND),
                Code::AndRm16 => rm!(u16, AND),
                Code::AndMr16 => mr!(u16, AND),
                Code::AndMi16 => mi!(u16, AND),
                Code::AndRr32 => rr!(u32, AND),
                Code::AndRi32 => ri!(u32, AND),
                Code::AndRm32 => rm!(u32, AND),
                Code::AndMr32 => mr!(u32, AND),
                Code::AndMi32 => mi!(u32, AND),
                Code::AndRr64 => rr!(u64, AND),
                Code::AndRi64 => ri!(u64, AND),
                Code::AndRm64 => rm!(u64, AND),
                Code::AndMr64 => mr!(u64, AND),
                Code::AndMi64 => mi!(u64, AND),
                Code::SubRr8 => rr!(u8, SUB),
                Code::SubRi8 => ri!(u8, SUB),
                Code::SubRm8 => rm!(u8, SUB),
                Code::SubMr8 => mr!(u8, SUB),
                Code::SubMi8 => mi!(u8, SUB),
                Code::SubRr16 => rr!(u16, SUB),
                Code::SubRi16 => ri!(u16, SUB),
                Code::SubRm16 => rm!(u16, SUB),
                Code::SubMr16 => mr!(u16, SUB),
                Code::SubMi16 => mi!(u16, SUB),
                Code::SubRr32 => rr!(u32, SUB),
                Code::SubRi32 => ri!(u32, SUB),
                Code::SubRm32 => rm!(u32, SUB),
                Code::SubMr32 => mr!(u32, SUB),
                Code::SubMi32 => mi!(u32, SUB),
                Code::SubRr64 => rr!(u64, SUB),
                Code::SubRi64 => ri!(u64, SUB),
                Code::SubRm64 => rm!(u64, SUB),
                Code::SubMr64 => mr!(u64, SUB),
                Code::SubMi64 => mi!(u64, SUB),
                Code::XorRr8 => rr!(u8, XOR),
                Code::XorRi8 => ri!(u8, XOR),
                Code::XorRm8 => rm!(u8, XOR),
                Code::XorMr8 => mr!(u8, XOR),
                Code::XorMi8 => mi!(u8, XOR),
                Code::XorRr16 => rr!(u16, XOR),
                Code::XorRi16 => ri!(u16, XOR),
                Code::XorRm16 => rm!(u16, XOR),
                Code::XorMr16 => mr!(u16, XOR),
                Code::XorMi16 => mi!(u16, XOR),
                Code::XorRr32 => rr!(u32, XOR),
                Code::XorRi32 => ri!(u32, XOR),
                Code::XorRm32 => rm!(u32, XOR),
                Code::XorMr32 => mr!(u32, XOR),
                Code::XorMi32 => mi!(u32, XOR),
                Code::XorRr64 => rr!(u64, XOR),
                Code::XorRi64 => ri!(u64, XOR),
                Code::XorRm64 => rm!(u64, XOR),
                Code::XorMr64 => mr!(u64, XOR),
                Code::XorMi64 => mi!(u64, XOR),
                Code::CmpRr8 => rr!(u8, CMP),
                Code::CmpRi8 => ri!(u8, CMP),
                Code::CmpRm8 => rm!(u8, CMP),
                Code::CmpMr8 => mr!(u8, CMP),
                Code::CmpMi8 => mi!(u8, CMP),
                Code::CmpRr16 => rr!(u16, CMP),
                Code::CmpRi16 => ri!(u16, CMP),
                Code::CmpRm16 => rm!(u16, CMP),
                Code::CmpMr16 => mr!(u16, CMP),
                Code::CmpMi16 => mi!(u16, CMP),
                Code::CmpRr32 => rr!(u32, CMP),
                Code::CmpRi32 => ri!(u32, CMP),
                Code::CmpRm32 => rm!(u32, CMP),
                Code::CmpMr32 => mr!(u32, CMP),
                Code::CmpMi32 => mi!(u32, CMP),
                Code::CmpRr64 => rr!(u64, CMP),
                Code::CmpRi64 => ri!(u64, CMP),
                Code::CmpRm64 => rm!(u64, CMP),
                Code::CmpMr64 => mr!(u64, CMP),
                Code::CmpMi64 => mi!(u64, CMP),
                Code::TestRr8 => rr!(u8, TEST),
                Code::TestRi8 => ri!(u8, TEST),
                Code::TestRm8 => rm!(u8, TEST),
                Code::TestMr8 => mr!(u8, TEST),
                Code::TestMi8 => mi!(u8, TEST),
                Code::TestRr16 => rr!(u16, TEST),
                Code::TestRi16 => ri!(u16, TEST),
                Code::TestRm16 => rm!(u16, TEST),
                Code::TestMr16 => mr!(u16, TEST),
                Code::TestMi16 => mi!(u16, TEST),
                Code::TestRr32 => rr!(u32, TEST),
                Code::TestRi32 => ri!(u32, TEST),
                Code::TestRm32 => rm!(u32, TEST),
                Code::TestMr32 => mr!(u32, TEST),
                Code::TestMi32 => mi!(u32, TEST),
                Code::TestRr64 => rr!(u64, TEST),
                Code::TestRi64 => ri!(u64, TEST),
                Code::TestRm64 => rm!(u64, TEST),
                Code::TestMr64 => mr!(u64, TEST),
                Code::TestMi64 => mi!(u64, TEST),
                Code::MovRr8 => mov_rr!(u8),
                Code::MovRi8 => mov_ri!(u8),
                Code::MovRm8 => mov_rm!(u8),
                Code::MovMr8 => mov_mr!(u8),
                Code::MovMi8 => mov_mi!(u8),
                Code::MovRr16 => mov_rr!(u16),
                Code::MovRi16 => mov_ri!(u16),
                Code::MovRm16 => mov_rm!(u16),
                Code::MovMr16 => mov_mr!(u16),
                Code::MovMi16 => mov_mi!(u16),
                Code::MovRr32 => mov_rr!(u32),
                Code::MovRi32 => mov_ri!(u32),
                Code::MovRm32 => mov_rm!(u32),
                Code::MovMr32 => mov_mr!(u32),
                Code::MovMi32 => mov_mi!(u32),
                Code::MovRr64 => mov_rr!(u64),
                Code::MovRi64 => mov_ri!(u64),
                Code::MovRm64 => mov_rm!(u64),
                Code::MovRd64 => mov_rd!(),
                Code::MovDr64 => mov_dr!(),
                Code::MovMr64 => mov_mr!(u64),
                Code::MovMi64 => mov_mi!(u64),
                Code::MovzxRr8 => extend_rr!(u8, u64, false),
                Code::MovzxRm8 => extend_rm!(u8, u64, false),
                Code::MovzxRr16 => extend_rr!(u16, u64, false),
                Code::MovzxRm16 => extend_rm!(u16, u64, false),
                Code::Movsx32Rr8 => extend_rr!(u8, u32, true),
                Code::Movsx32Rm8 => extend_rm!(u8, u32, true),
                Code::Movsx32Rr16 => extend_rr!(u16, u32, true),
                Code::Movsx32Rm16 => extend_rm!(u16, u32, true),
                Code::Movsx64Rr8 => extend_rr!(u8, u64, true),
                Code::Movsx64Rm8 => extend_rm!(u8, u64, true),
                Code::Movsx64Rr16 => extend_rr!(u16, u64, true),
                Code::Movsx64Rm16 => extend_rm!(u16, u64, true),
                Code::Movsx64Rr32 => extend_rr!(u32, u64, true),
                Code::Movsx64Rm32 => extend_rm!(u32, u64, true),
                Code::Lea32 => {
                    let value = address(cpu, op);
                    put::<u32>(cpu, op.dst, value)
                }
                Code::Lea64 => {
                    let value = address(cpu, op);
                    put::<u64>(cpu, op.dst, value)
                }
                Code::IncR8 => step_r!(u8, inc, 1),
                Code::IncR32 => step_r!(u32, inc, 1),
                Code::IncR64 => step_r!(u64, inc, 1),
                Code::DecR8 => step_r!(u8, dec, !0),
                Code::DecR32 => step_r!(u32, dec, !0),
                Code::DecR64 => step_r!(u64, dec, !0),
                Code::IncM32 => step_m!(u32, inc, 1),
                Code::IncM64 => step_m!(u64, inc, 1),
                Code::DecM32 => step_m!(u32, dec, !0),
                Code::DecM64 => step_m!(u64, dec, !0),
                Code::NegR32 => {
                    let b = get(cpu, op.dst);
                    let r = alu::<u32, SUB>(&mut cpu.flags, 0, b);
                    put::<u32>(cpu, op.dst, r)
                }
                Code::NegR64 => {
                    let b = get(cpu, op.dst);
                    let r = alu::<u64, SUB>(&mut cpu.flags, 0, b);
                    put::<u64>(cpu, op.dst, r)
                }
                Code::NotR32 => {
                    let r = !get(cpu, op.dst);
                    put::<u32>(cpu, op.dst, r)
                }
                Code::NotR64 => {
                    let r = !get(cpu, op.dst);
                    put::<u64>(cpu, op.dst, r)
                }
                Code::QuietAddRr32 => quiet!(u32, get(cpu, op.src), |a, b| a.wrapping_add(b)),
                Code::QuietAddRr64 => quiet!(u64, get(cpu, op.src), |a, b| a.wrapping_add(b)),
                Code::QuietAddRi32 => quiet!(u32, op.imm, |a, b| a.wrapping_add(b)),
                Code::QuietAddRi64 => quiet!(u64, op.imm, |a, b| a.wrapping_add(b)),
                Code::QuietSubRr32 => quiet!(u32, get(cpu, op.src), |a, b| a.wrapping_sub(b)),
                Code::QuietSubRr64 => quiet!(u64, get(cpu, op.src), |a, b| a.wrapping_sub(b)),
                Code::QuietOrRr32 => quiet!(u32, get(cpu, op.src), |a, b| a | b),
                Code::QuietOrRr64 => quiet!(u64, get(cpu, op.src), |a, b| a | b),
                Code::QuietOrRi32 => quiet!(u32, op.imm, |a, b| a | b),
                Code::QuietOrRi64 => quiet!(u64, op.imm, |a, b| a | b),
                Code::QuietAndRr32 => quiet!(u32, get(cpu, op.src), |a, b| a & b),
                Code::QuietAndRr64 => quiet!(u64, get(cpu, op.src), |a, b| a & b),
                Code::QuietAndRi32 => quiet!(u32, op.imm, |a, b| a & b),
                Code::QuietAndRi64 => quiet!(u64, op.imm, |a, b| a & b),
                Code::QuietXorRr32 => quiet!(u32, get(cpu, op.src), |a, b| a ^ b),
                Code::QuietXorRr64 => quiet!(u64, get(cpu, op.src), |a, b| a ^ b),
                Code::QuietXorRi32 => quiet!(u32, op.imm, |a, b| a ^ b),
                Code::QuietXorRi64 => quiet!(u64, op.imm, |a, b| a ^ b),
                Code::QuietShlRi32 => quiet!(u32, op.imm, |a, b| a << (b & 31)),
                Code::QuietShlRi64 => quiet!(u64, op.imm, |a, b| a << (b & 63)),
                Code::QuietShrRi32 => quiet!(u32, op.imm, |a, b| a >> (b & 31)),
                Code::QuietShrRi64 => quiet!(u64, op.imm, |a, b| a >> (b & 63)),
                Code::QuietSarRi32 => quiet!(u32, op.imm, |a, b| a as i32 >> (b & 31)),
                Code::QuietSarRi64 => quiet!(u64, op.imm, |a, b| a as i64 >> (b & 63)),
                Code::ShlRi32 => shift_by!(u32, 0, op.imm),
                Code::ShlRi64 => shift_by!(u64, 0, op.imm),
                Code::ShrRi32 => shift_by!(u32, 1, op.imm),
                Code::ShrRi64 => shift_by!(u64, 1, op.imm),
                Code::SarRi32 => shift_by!(u32, 2, op.imm),
                Code::SarRi64 => shift_by!(u64, 2, op.imm),
                Code::ShlRc32 => shift_by!(u32, 0, cpu.gpr[reg::RCX]),
                Code::ShlRc64 => shift_by!(u64, 0, cpu.gpr[reg::RCX]),
                Code::ShrRc32 => shift_by!(u32, 1, cpu.gpr[reg::RCX]),
                Code::ShrRc64 => shift_by!(u64, 1, cpu.gpr[reg::RCX]),
                Code::SarRc32 => shift_by!(u32, 2, cpu.gpr[reg::RCX]),
                Code::SarRc64 => shift_by!(u64, 2, cpu.gpr[reg::RCX]),
                Code::RolRi32 => rotate!(u32, true),
                Code::RolRi64 => rotate!(u64, true),
                Code::RorRi32 => rotate!(u32, false),
                Code::RorRi64 => rotate!(u64, false),
                Code::ImulRr32 => imul!(u32, i32, get(cpu, op.dst), get(cpu, op.src)),
                Code::ImulRr64 => imul!(u64, i64, get(cpu, op.dst), get(cpu, op.src)),
                Code::ImulRm32 => {
                    let b = load!(u32, address(cpu, op));
                    imul!(u32, i32, get(cpu, op.dst), b)
                }
                Code::ImulRm64 => {
                    let b = load!(u64, address(cpu, op));
                    imul!(u64, i64, get(cpu, op.dst), b)
                }
                Code::ImulRri32 => imul!(u32, i32, get(cpu, op.src), op.imm),
                Code::ImulRri64 => imul!(u64, i64, get(cpu, op.src), op.imm),
                Code::XchgRr32 => {
                    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
                    put::<u32>(cpu, op.dst, b);
                    put::<u32>(cpu, op.src, a)
                }
                Code::XchgRr64 => {
                    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
                    put::<u64>(cpu, op.dst, b);
                    put::<u64>(cpu, op.src, a)
                }
                Code::BtRi32 => bit_test!(u32, op.imm),
                Code::BtRi64 => bit_test!(u64, op.imm),
                Code::BtRr32 => bit_test!(u32, get(cpu, op.src)),
                Code::BtRr64 => bit_test!(u64, get(cpu, op.src)),
                Code::BtsMi32 => bit_change!(u32, |value, selected| value | selected),
                Code::BtsMi64 => bit_change!(u64, |value, selected| value | selected),
                Code::BtrMi32 => bit_change!(u32, |value, selected| value & !selected),
                Code::BtrMi64 => bit_change!(u64, |value, selected| value & !selected),
                Code::CmpxchgMr32 => cmpxchg!(u32),
                Code::CmpxchgMr64 => cmpxchg!(u64),
                Code::XaddMr32 => xadd!(u32),
                Code::XaddMr64 => xadd!(u64),
                Code::TestHi8 => {
                    high_byte!(TEST);
                }
                Code::AndHi8 => {
                    let r = high_byte!(AND);
                    let whole = &mut cpu.gpr[usize::from(op.dst)];
                    *whole = *whole & !0xff00 | (r & 0xff) << 8;
                }
                Code::TestHi8JE => {
                    high_byte!(TEST);
                    fused_branch!(4)
                }
                Code::TestHi8JNe => {
                    high_byte!(TEST);
                    fused_branch!(5)
                }
                Code::PushF => push!(pushed_flags(cpu)),
                Code::Cli => {
                    if cpu.cpl != 0 {
                        cold!();
                    }
                    cpu.flags.rest &= !bit::IF;
                }
                Code::Cdqe => cpu.gpr[reg::RAX] = u32::sign_extend(cpu.gpr[reg::RAX]),
                Code::Cwde => cpu.gpr[reg::RAX] = u16::sign_extend(cpu.gpr[reg::RAX]) as u32 as u64,
                Code::Cdq => cpu.gpr[reg::RDX] = (cpu.gpr[reg::RAX] as i32 >> 31) as u32 as u64,
                Code::Cqo => cpu.gpr[reg::RDX] = (cpu.gpr[reg::RAX] as i64 >> 63) as u64,
                Code::BswapR32 => {
                    let r = (get(cpu, op.dst) as u32).swap_bytes() as u64;
                    put::<u32>(cpu, op.dst, r)
                }
                Code::BswapR64 => {
                    let r = get(cpu, op.dst).swap_bytes();
                    put::<u64>(cpu, op.dst, r)
                }
                Code::PushR => push!(get(cpu, op.src)),
                Code::PushI => push!(op.imm),
                Code::PushM => {
                    let value = load!(u64, address(cpu, op));
                    push!(value)
                }
                Code::PopR => {
                    let top = cpu.gpr[reg::RSP];
                    let value = load!(u64, top);
                    cpu.gpr[reg::RSP] = top.wrapping_add(8);
                    put::<u64>(cpu, op.dst, value)
                }
                Code::Leave => {
                    let frame = cpu.gpr[reg::RBP];
                    let value = load!(u64, frame);
                    cpu.gpr[reg::RSP] = frame.wrapping_add(8);
                    cpu.gpr[reg::RBP] = value;
                }
                Code::SetR => {
                    let met = cpu.flags.condition(op.imm as u8) as u64;
                    put::<u8>(cpu, op.dst, met)
                }
                Code::CmovR32 => {
                    let from = if cpu.flags.condition(op.imm as u8) {
                        op.src
                    } else {
                        op.dst
                    };
                    let value = get(cpu, from);
                    put::<u32>(cpu, op.dst, value)
                }
                Code::CmovR64 => {
                    let from = if cpu.flags.condition(op.imm as u8) {
                        op.src
                    } else {
                        op.dst
                    };
                    let value = get(cpu, from);
                    put::<u64>(cpu, op.dst, value)
                }
                Code::JmpRel => jump_to!(op.imm, count),
                Code::JmpR => jump!(get(cpu, op.src)),
                Code::JmpM => jump!(load!(u64, address(cpu, op))),
                Code::CallRel => {
                    push!(op.disp);
                    jump_to!(op.imm, count)
                }
                Code::CallR => call!(get(cpu, op.src)),
                Code::CallM => call!(load!(u64, address(cpu, op))),
                Code::Ret => {
                    let top = cpu.gpr[reg::RSP];
                    let target = load!(u64, top);
                    if !canonical(target) {
                        cold!();
                    }
                    cpu.gpr[reg::RSP] = top.wrapping_add(8);
                    indirect!(target)
                }
                Code::JO => branch!(cpu.flags.condition(0)),
                Code::JNo => branch!(cpu.flags.condition(1)),
                Code::JB => branch!(cpu.flags.condition(2)),
                Code::JAe => branch!(cpu.flags.condition(3)),
                Code::JE => branch!(cpu.flags.condition(4)),
                Code::JNe => branch!(cpu.flags.condition(5)),
                Code::JBe => branch!(cpu.flags.condition(6)),
                Code::JA => branch!(cpu.flags.condition(7)),
                Code::JS => branch!(cpu.flags.condition(8)),
                Code::JNs => branch!(cpu.flags.condition(9)),
                Code::JP => branch!(cpu.flags.condition(10)),
                Code::JNp => branch!(cpu.flags.condition(11)),
                Code::JL => branch!(cpu.flags.condition(12)),
                Code::JGe => branch!(cpu.flags.condition(13)),
                Code::JLe => branch!(cpu.flags.condition(14)),
                Code::JG => branch!(cpu.flags.condition(15)),
                Code::CmpRr32JB => rr_jump!(u32, CMP, 2),
                Code::CmpRr32JAe => rr_jump!(u32, CMP, 3),
                Code::CmpRr32JE => rr_jump!(u32, CMP, 4),
                Code::CmpRr32JNe => rr_jump!(u32, CMP, 5),
                Code::CmpRr32JBe => rr_jump!(u32, CMP, 6),
                Code::CmpRr32JA => rr_jump!(u32, CMP, 7),
                Code::CmpRr32JS => rr_jump!(u32, CMP, 8),
                Code::CmpRr32JNs => rr_jump!(u32, CMP, 9),
                Code::CmpRr32JL => rr_jump!(u32, CMP, 12),
                Code::CmpRr32JGe => rr_jump!(u32, CMP, 13),
                Code::CmpRr32JLe => rr_jump!(u32, CMP, 14),
                Code::CmpRr32JG => rr_jump!(u32, CMP, 15),
                Code::CmpRr64JB => rr_jump!(u64, CMP, 2),
                Code::CmpRr64JAe => rr_jump!(u64, CMP, 3),
                Code::CmpRr64JE => rr_jump!(u64, CMP, 4),
                Code::CmpRr64JNe => rr_jump!(u64, CMP, 5),
                Code::CmpRr64JBe => rr_jump!(u64, CMP, 6),
                Code::CmpRr64JA => rr_jump!(u64, CMP, 7),
                Code::CmpRr64JS => rr_jump!(u64, CMP, 8),
                Code::CmpRr64JNs => rr_jump!(u64, CMP, 9),
                Code::CmpRr64JL => rr_jump!(u64, CMP, 12),
                Code::CmpRr64JGe => rr_jump!(u64, CMP, 13),
                Code::CmpRr64JLe => rr_jump!(u64, CMP, 14),
                Code::CmpRr64JG => rr_jump!(u64, CMP, 15),
                Code::CmpRi8JB => ri_jump!(u8, CMP, 2),
                Code::CmpRi8JAe => ri_jump!(u8, CMP, 3),
                Code::CmpRi8JE => ri_jump!(u8, CMP, 4),
                Code::CmpRi8JNe => ri_jump!(u8, CMP, 5),
                Code::CmpRi8JBe => ri_jump!(u8, CMP, 6),
                Code::CmpRi8JA => ri_jump!(u8, CMP, 7),
                Code::CmpRi8JS => ri_jump!(u8, CMP, 8),
                Code::CmpRi8JNs => ri_jump!(u8, CMP, 9),
                Code::CmpRi8JL => ri_jump!(u8, CMP, 12),
                Code::CmpRi8JGe => ri_jump!(u8, CMP, 13),
                Code::CmpRi8JLe => ri_jump!(u8, CMP, 14),
                Code::CmpRi8JG => ri_jump!(u8, CMP, 15),
                Code::CmpRi32JB => ri_jump!(u32, CMP, 2),
                Code::CmpRi32JAe => ri_jump!(u32, CMP, 3),
                Code::CmpRi32JE => ri_jump!(u32, CMP, 4),
                Code::CmpRi32JNe => ri_jump!(u32, CMP, 5),
                Code::CmpRi32JBe => ri_jump!(u32, CMP, 6),
                Code::CmpRi32JA => ri_jump!(u32, CMP, 7),
                Code::CmpRi32JS => ri_jump!(u32, CMP, 8),
                Code::CmpRi32JNs => ri_jump!(u32, CMP, 9),
                Code::CmpRi32JL => ri_jump!(u32, CMP, 12),
                Code::CmpRi32JGe => ri_jump!(u32, CMP, 13),
                Code::CmpRi32JLe => ri_jump!(u32, CMP, 14),
                Code::CmpRi32JG => ri_jump!(u32, CMP, 15),
                Code::CmpRi64JB => ri_jump!(u64, CMP, 2),
                Code::CmpRi64JAe => ri_jump!(u64, CMP, 3),
                Code::CmpRi64JE => ri_jump!(u64, CMP, 4),
                Code::CmpRi64JNe => ri_jump!(u64, CMP, 5),
                Code::CmpRi64JBe => ri_jump!(u64, CMP, 6),
                Code::CmpRi64JA => ri_jump!(u64, CMP, 7),
                Code::CmpRi64JS => ri_jump!(u64, CMP, 8),
                Code::CmpRi64JNs => ri_jump!(u64, CMP, 9),
                Code::CmpRi64JL => ri_jump!(u64, CMP, 12),
                Code::CmpRi64JGe => ri_jump!(u64, CMP, 13),
                Code::CmpRi64JLe => ri_jump!(u64, CMP, 14),
                Code::CmpRi64JG => ri_jump!(u64, CMP, 15),
                Code::TestRr8JB => rr_jump!(u8, TEST, 2),
                Code::TestRr8JAe => rr_jump!(u8, TEST, 3),
                Code::TestRr8JE => rr_jump!(u8, TEST, 4),
                Code::TestRr8JNe => rr_jump!(u8, TEST, 5),
                Code::TestRr8JBe => rr_jump!(u8, TEST, 6),
                Code::TestRr8JA => rr_jump!(u8, TEST, 7),
                Code::TestRr8JS => rr_jump!(u8, TEST, 8),
                Code::TestRr8JNs => rr_jump!(u8, TEST, 9),
                Code::TestRr8JL => rr_jump!(u8, TEST, 12),
                Code::TestRr8JGe => rr_jump!(u8, TEST, 13),
                Code::TestRr8JLe => rr_jump!(u8, TEST, 14),
                Code::TestRr8JG => rr_jump!(u8, TEST, 15),
                Code::TestRr32JB => rr_jump!(u32, TEST, 2),
                Code::TestRr32JAe => rr_jump!(u32, TEST, 3),
                Code::TestRr32JE => rr_jump!(u32, TEST, 4),
                Code::TestRr32JNe => rr_jump!(u32, TEST, 5),
                Code::TestRr32JBe => rr_jump!(u32, TEST, 6),
                Code::TestRr32JA => rr_jump!(u32, TEST, 7),
                Code::TestRr32JS => rr_jump!(u32, TEST, 8),
                Code::TestRr32JNs => rr_jump!(u32, TEST, 9),
                Code::TestRr32JL => rr_jump!(u32, TEST, 12),
                Code::TestRr32JGe => rr_jump!(u32, TEST, 13),
                Code::TestRr32JLe => rr_jump!(u32, TEST, 14),
                Code::TestRr32JG => rr_jump!(u32, TEST, 15),
                Code::TestRr64JB => rr_jump!(u64, TEST, 2),
                Code::TestRr64JAe => rr_jump!(u64, TEST, 3),
                Code::TestRr64JE => rr_jump!(u64, TEST, 4),
                Code::TestRr64JNe => rr_jump!(u64, TEST, 5),
                Code::TestRr64JBe => rr_jump!(u64, TEST, 6),
                Code::TestRr64JA => rr_jump!(u64, TEST, 7),
                Code::TestRr64JS => rr_jump!(u64, TEST, 8),
                Code::TestRr64JNs => rr_jump!(u64, TEST, 9),
                Code::TestRr64JL => rr_jump!(u64, TEST, 12),
                Code::TestRr64JGe => rr_jump!(u64, TEST, 13),
                Code::TestRr64JLe => rr_jump!(u64, TEST, 14),
                Code::TestRr64JG => rr_jump!(u64, TEST, 15),
                Code::TestRi8JB => ri_jump!(u8, TEST, 2),
                Code::TestRi8JAe => ri_jump!(u8, TEST, 3),
                Code::TestRi8JE => ri_jump!(u8, TEST, 4),
                Code::TestRi8JNe => ri_jump!(u8, TEST, 5),
                Code::TestRi8JBe => ri_jump!(u8, TEST, 6),
                Code::TestRi8JA => ri_jump!(u8, TEST, 7),
                Code::TestRi8JS => ri_jump!(u8, TEST, 8),
                Code::TestRi8JNs => ri_jump!(u8, TEST, 9),
                Code::TestRi8JL => ri_jump!(u8, TEST, 12),
                Code::TestRi8JGe => ri_jump!(u8, TEST, 13),
                Code::TestRi8JLe => ri_jump!(u8, TEST, 14),
                Code::TestRi8JG => ri_jump!(u8, TEST, 15),
                Code::CmpRm32JB => rm_jump!(u32, CMP, 2),
                Code::CmpRm32JAe => rm_jump!(u32, CMP, 3),
                Code::CmpRm32JE => rm_jump!(u32, CMP, 4),
                Code::CmpRm32JNe => rm_jump!(u32, CMP, 5),
                Code::CmpRm32JBe => rm_jump!(u32, CMP, 6),
                Code::CmpRm32JA => rm_jump!(u32, CMP, 7),
                Code::CmpRm32JS => rm_jump!(u32, CMP, 8),
                Code::CmpRm32JNs => rm_jump!(u32, CMP, 9),
                Code::CmpRm32JL => rm_jump!(u32, CMP, 12),
                Code::CmpRm32JGe => rm_jump!(u32, CMP, 13),
                Code::CmpRm32JLe => rm_jump!(u32, CMP, 14),
                Code::CmpRm32JG => rm_jump!(u32, CMP, 15),
                Code::CmpRm64JB => rm_jump!(u64, CMP, 2),
                Code::CmpRm64JAe => rm_jump!(u64, CMP, 3),
                Code::CmpRm64JE => rm_jump!(u64, CMP, 4),
                Code::CmpRm64JNe => rm_jump!(u64, CMP, 5),
                Code::CmpRm64JBe => rm_jump!(u64, CMP, 6),
                Code::CmpRm64JA => rm_jump!(u64, CMP, 7),
                Code::CmpRm64JS => rm_jump!(u64, CMP, 8),
                Code::CmpRm64JNs => rm_jump!(u64, CMP, 9),
                Code::CmpRm64JL => rm_jump!(u64, CMP, 12),
                Code::CmpRm64JGe => rm_jump!(u64, CMP, 13),
                Code::CmpRm64JLe => rm_jump!(u64, CMP, 14),
                Code::CmpRm64JG => rm_jump!(u64, CMP, 15),
                Code::CmpMi8JB => mi_jump!(u8, CMP, 2),
                Code::CmpMi8JAe => mi_jump!(u8, CMP, 3),
                Code::CmpMi8JE => mi_jump!(u8, CMP, 4),
                Code::CmpMi8JNe => mi_jump!(u8, CMP, 5),
                Code::CmpMi8JBe => mi_jump!(u8, CMP, 6),
                Code::CmpMi8JA => mi_jump!(u8, CMP, 7),
                Code::CmpMi8JS => mi_jump!(u8, CMP, 8),
                Code::CmpMi8JNs => mi_jump!(u8, CMP, 9),
                Code::CmpMi8JL => mi_jump!(u8, CMP, 12),
                Code::CmpMi8JGe => mi_jump!(u8, CMP, 13),
                Code::CmpMi8JLe => mi_jump!(u8, CMP, 14),
                Code::CmpMi8JG => mi_jump!(u8, CMP, 15),
                Code::CmpMi32JB => mi_jump!(u32, CMP, 2),
                Code::CmpMi32JAe => mi_jump!(u32, CMP, 3),
                Code::CmpMi32JE => mi_jump!(u32, CMP, 4),
                Code::CmpMi32JNe => mi_jump!(u32, CMP, 5),
                Code::CmpMi32JBe => mi_jump!(u32, CMP, 6),
                Code::CmpMi32JA => mi_jump!(u32, CMP, 7),
                Code::CmpMi32JS => mi_jump!(u32, CMP, 8),
                Code::CmpMi32JNs => mi_jump!(u32, CMP, 9),
                Code::CmpMi32JL => mi_jump!(u32, CMP, 12),
                Code::CmpMi32JGe => mi_jump!(u32, CMP, 13),
                Code::CmpMi32JLe => mi_jump!(u32, CMP, 14),
                Code::CmpMi32JG => mi_jump!(u32, CMP, 15),
                Code::TestMi8JB => mi_jump!(u8, TEST, 2),
                Code::TestMi8JAe => mi_jump!(u8, TEST, 3),
                Code::TestMi8JE => mi_jump!(u8, TEST, 4),
                Code::TestMi8JNe => mi_jump!(u8, TEST, 5),
                Code::TestMi8JBe => mi_jump!(u8, TEST, 6),
                Code::TestMi8JA => mi_jump!(u8, TEST, 7),
                Code::TestMi8JS => mi_jump!(u8, TEST, 8),
                Code::TestMi8JNs => mi_jump!(u8, TEST, 9),
                Code::TestMi8JL => mi_jump!(u8, TEST, 12),
                Code::TestMi8JGe => mi_jump!(u8, TEST, 13),
                Code::TestMi8JLe => mi_jump!(u8, TEST, 14),
                Code::TestMi8JG => mi_jump!(u8, TEST, 15),
                Code::MovXm => {
                    if !cpu.sse_ready {
                        cold!();
                    }
                    let linear = address(cpu, op);
                    let Some(offset) = cpu.tlb.read_offset(linear, 16, cpu.tlb_key) else {
                        cold!()
                    };
                    cpu.fpu.xmm[op.dst as usize & 15] = u128::from_le_bytes(ram.get(offset));
                }
                Code::MovMx => {
                    if !cpu.sse_ready {
                        cold!();
                    }
                    let linear = address(cpu, op);
                    let Some(offset) = cpu.tlb.write_offset(linear, 16, cpu.tlb_key) else {
                        cold!()
                    };
                    let value = cpu.fpu.xmm[op.src as usize & 15];
                    ram.put(offset, value.to_le_bytes());
                }
                Code::MovXx => {
                    if !cpu.sse_ready {
                        cold!();
                    }
                    cpu.fpu.xmm[op.dst as usize & 15] = cpu.fpu.xmm[op.src as usize & 15];
                }
                Code::PxorXx => {
                    if !cpu.sse_ready {
                        cold!();
                    }
                    cpu.fpu.xmm[op.dst as usize & 15] ^= cpu.fpu.xmm[op.src as usize & 15];
                }
            }
        }
        // The last operation of a block leaves it.
        return Ok(Next::Lookup);
    }
}

/// RFLAGS as PUSHFQ shows it. Apart, so that its registers are not the hot loop's.
#[inline(never)]
fn pushed_flags(cpu: &Vcpu) -> u64 {
    cpu.flags.get() & !(bit::VM | bit::RF)
}

/// Runs an instruction through `exec`. Whether the block must be left.
#[cold]
#[inline(never)]
fn checked(
    i: &Instruction,
    cpu: &mut Vcpu,
    ram: &mut Ram,
    bus: &mut dyn Bus,
    now: Tick,
) -> Exec<bool> {
    cpu.rip = i.next_ip();
    let x = &mut Ctx { cpu, ram, bus, now };
    match exec::execute(x, i) {
        Ok(()) => Ok(x.cpu.leave_block),
        Err(trap) => {
            x.cpu.rip = i.ip();
            Err(trap)
        }
    }
}

/// As `lookup`, where `link` is what a jump to RIP once led to.
#[inline(always)]
fn follow_far(code: &CodeCache, cpu: &Vcpu, link: u32) -> Option<u32> {
    let offset = cpu.tlb.execute_offset(cpu.rip, cpu.tlb_key)?;
    let linked = link & !FAR;
    match code.ops.get(linked as usize) {
        Some(head) if head.disp == offset as u64 => Some(linked),
        _ => lookup(code, cpu),
    }
}

/// Head of the block at RIP, where its translation and the block itself are at hand.
#[inline(always)]
fn lookup(code: &CodeCache, cpu: &Vcpu) -> Option<u32> {
    let rip = cpu.rip;
    // Only 64-bit code comes here, where RIP is the linear address.
    let size = CodeSize::Bits64;
    let offset = cpu.tlb.execute_offset(rip, cpu.tlb_key)?;
    let (_, block) = code.recent(&Key { offset, rip, size })?;
    Some(block.first)
}
