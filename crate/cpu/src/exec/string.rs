//! MOVS, CMPS, SCAS, LODS, STOS and the REP prefixes.
//!
//! One iteration is one tick. An instruction that has not finished leaves RIP at itself, with
//! the registers as after the iterations done, so that it is resumed like any other.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::mem::Ctx;
use crate::operand::mask;
use crate::paging::Access;
use crate::trap::Exec;
use crate::vcpu::Seg;
use crate::vcpu::reg::{RAX, RCX, RDI, RSI};

/// Whether the instruction is one of this file. (MOVSD and CMPSD are also names of SSE2.)
pub(crate) fn is_string(i: &Instruction) -> bool {
    use Mnemonic::*;
    match i.mnemonic() {
        Movsd => i.code() == Code::Movsd_m32_m32,
        Cmpsd => i.code() == Code::Cmpsd_m32_m32,
        Movsb | Movsw | Movsq | Cmpsb | Cmpsw | Cmpsq | Scasb | Scasw | Scasd | Scasq | Lodsb
        | Lodsw | Lodsd | Lodsq | Stosb | Stosw | Stosd | Stosq => true,
        _ => false,
    }
}

/// What repeats a string instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Once,
    /// While the count is not zero.
    Count,
    /// And ZF is as given.
    While(bool),
}

/// Address size (2, 4 or 8) and bytes per element.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub address: usize,
    pub element: usize,
}

impl Shape {
    /// The shape of a string instruction, INS and OUTS included.
    pub fn of(i: &Instruction) -> Shape {
        let address = |kind| match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        };
        Shape {
            address: address(i.op0_kind())
                .or_else(|| address(i.op1_kind()))
                .unwrap_or(8),
            element: i.memory_size().size(),
        }
    }
}

/// Executes at most `budget` (at least 1) iterations and returns the ticks they took: their
/// number, or 1 when the count was zero already. A fault is reported by the call that has done
/// no iteration before it; a call stops early at a fault, or where something must be looked at
/// before the next instruction.
pub(crate) fn string(x: &mut Ctx, i: &Instruction, budget: u64) -> Exec<u64> {
    let shape = Shape::of(i);
    let repeat = match i.mnemonic() {
        _ if !i.has_rep_prefix() && !i.has_repne_prefix() => Repeat::Once,
        Mnemonic::Cmpsb
        | Mnemonic::Cmpsw
        | Mnemonic::Cmpsd
        | Mnemonic::Cmpsq
        | Mnemonic::Scasb
        | Mnemonic::Scasw
        | Mnemonic::Scasd
        | Mnemonic::Scasq => Repeat::While(!i.has_repne_prefix()),
        _ => Repeat::Count,
    };
    if repeat == Repeat::Once {
        return one(x, i, shape).map(|()| 1);
    }
    let bulk = is_bulk(i);
    repeated(x, i, shape, budget, |x, left| {
        if bulk && let Some(done) = many(x, i, shape, left) {
            return Ok((done, true));
        }
        one(x, i, shape)?;
        Ok((
            1,
            match repeat {
                Repeat::While(zf) => x.cpu.flags.zf() == zf,
                _ => true,
            },
        ))
    })
}

/// Repeats `step`, which does at least one and at most the given number of iterations, and tells
/// how many and whether to go on.
pub(super) fn repeated(
    x: &mut Ctx,
    i: &Instruction,
    shape: Shape,
    budget: u64,
    mut step: impl FnMut(&mut Ctx, u64) -> Exec<(u64, bool)>,
) -> Exec<u64> {
    let next = x.cpu.rip;
    let start = x.now;
    let looked_at = core::mem::replace(&mut x.cpu.leave_block, false);
    let mut done = 0;
    let result = loop {
        let count = x.cpu.gpr[RCX] & mask(shape.address);
        if count == 0 {
            break Ok(done.max(1));
        }
        if done >= budget.max(1) || done > 0 && x.cpu.leave_block {
            x.cpu.rip = i.ip();
            break Ok(done);
        }
        match step(x, count.min(budget.max(1) - done)) {
            Ok((iterations, go_on)) => {
                done += iterations;
                x.now += iterations;
                x.cpu.set_gpr(RCX, shape.address, count - iterations);
                if !go_on {
                    break Ok(done);
                }
            }
            Err(_) if done > 0 => {
                x.cpu.rip = i.ip();
                break Ok(done);
            }
            Err(trap) => break Err(trap),
        }
    };
    debug_assert!(x.cpu.rip == next || x.cpu.rip == i.ip());
    x.now = start;
    x.cpu.leave_block |= looked_at;
    result
}

/// Adds to RSI or RDI what `iterations` elements make, in the direction of DF.
pub(super) fn advance(x: &mut Ctx, register: usize, shape: Shape, iterations: u64) {
    let bytes = iterations * shape.element as u64;
    let at = x.cpu.gpr[register];
    let at = if x.cpu.flags.df() {
        at.wrapping_sub(bytes)
    } else {
        at.wrapping_add(bytes)
    };
    x.cpu.set_gpr(register, shape.address, at);
}

/// Linear address of the element at RSI.
pub(super) fn source(x: &Ctx, i: &Instruction, shape: Shape) -> Exec<u64> {
    let offset = x.cpu.gpr[RSI] & mask(shape.address);
    let seg = x.segment(i);
    x.linear(seg, offset, shape.element as u64, Access::Read)
}

/// Linear address of the element at ES:RDI.
pub(super) fn destination(x: &Ctx, shape: Shape, access: Access) -> Exec<u64> {
    let offset = x.cpu.gpr[RDI] & mask(shape.address);
    x.linear(Seg::Es, offset, shape.element as u64, access)
}

/// One iteration, the count aside.
fn one(x: &mut Ctx, i: &Instruction, shape: Shape) -> Exec {
    use Mnemonic::*;
    let size = shape.element;
    match i.mnemonic() {
        Movsb | Movsw | Movsd | Movsq => {
            let from = source(x, i, shape)?;
            let value = x.load_sized(from, size)?;
            let to = destination(x, shape, Access::Write)?;
            x.store_sized(to, size, value)?;
            advance(x, RSI, shape, 1);
            advance(x, RDI, shape, 1);
        }
        Stosb | Stosw | Stosd | Stosq => {
            let to = destination(x, shape, Access::Write)?;
            x.store_sized(to, size, x.cpu.gpr[RAX])?;
            advance(x, RDI, shape, 1);
        }
        Lodsb | Lodsw | Lodsd | Lodsq => {
            let from = source(x, i, shape)?;
            let value = x.load_sized(from, size)?;
            x.cpu.set_gpr(RAX, size, value);
            advance(x, RSI, shape, 1);
        }
        Scasb | Scasw | Scasd | Scasq => {
            let to = destination(x, shape, Access::Read)?;
            let value = x.load_sized(to, size)?;
            super::alu::compare(&mut x.cpu.flags, x.cpu.gpr[RAX], value, size);
            advance(x, RDI, shape, 1);
        }
        _ => {
            // Of two faults that of ES:RDI is reported: processors load it first.
            let to = destination(x, shape, Access::Read)?;
            let second = x.load_sized(to, size)?;
            let from = source(x, i, shape)?;
            let first = x.load_sized(from, size)?;
            super::alu::compare(&mut x.cpu.flags, first, second, size);
            advance(x, RSI, shape, 1);
            advance(x, RDI, shape, 1);
        }
    }
    Ok(())
}

fn is_bulk(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        i.mnemonic(),
        Movsb | Movsw | Movsd | Movsq | Stosb | Stosw | Stosd | Stosq
    )
}

/// As many of the next `left` iterations of a forward MOVS or STOS as lie within one page of RAM
/// on each side, all at once; `None` where not even one can be done so.
fn many(x: &mut Ctx, i: &Instruction, shape: Shape, left: u64) -> Option<u64> {
    if x.cpu.careful || x.cpu.flags.df() {
        return None;
    }
    let size = shape.element as u64;
    let in_page = |linear: u64| (0x1000 - (linear & 0xfff)) / size;
    let to_offset = x.cpu.gpr[RDI] & mask(shape.address);
    let to = x.linear(Seg::Es, to_offset, size, Access::Write).ok()?;
    let mut n = left.min(in_page(to));
    let moves = matches!(
        i.op1_kind(),
        OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI
    );
    if !moves {
        // Neither the limit nor the end of a 16- or 32-bit address may fall inside.
        n = n.min(room(to_offset, shape));
        if n == 0 || x.linear(Seg::Es, to_offset, n * size, Access::Write) != Ok(to) {
            return None;
        }
        let at = x.cpu.tlb.write_offset(to, n * size, x.cpu.tlb_key)?;
        let value = x.cpu.gpr[RAX];
        let bytes = &mut x.ram.raw_mut()[at..at + (n * size) as usize];
        match size {
            1 => bytes.fill(value as u8),
            2 => fill(bytes, (value as u16).to_le_bytes()),
            4 => fill(bytes, (value as u32).to_le_bytes()),
            _ => fill(bytes, value.to_le_bytes()),
        }
        advance(x, RDI, shape, n);
        return Some(n);
    }
    let seg = x.segment(i);
    let from_offset = x.cpu.gpr[RSI] & mask(shape.address);
    let from = x.linear(seg, from_offset, size, Access::Read).ok()?;
    n = n
        .min(in_page(from))
        .min(room(to_offset, shape))
        .min(room(from_offset, shape));
    if n == 0
        || x.linear(Seg::Es, to_offset, n * size, Access::Write) != Ok(to)
        || x.linear(seg, from_offset, n * size, Access::Read) != Ok(from)
    {
        return None;
    }
    let key = x.cpu.tlb_key;
    let source = x.cpu.tlb.read_offset(from, n * size, key)?;
    let target = x.cpu.tlb.write_offset(to, n * size, key)?;
    // A destination just ahead of the source repeats what is between them: no more than that
    // distance at once.
    if target > source {
        n = n.min((target - source) as u64 / size);
    }
    if n == 0 {
        return None;
    }
    let len = (n * size) as usize;
    x.ram.raw_mut().copy_within(source..source + len, target);
    advance(x, RSI, shape, n);
    advance(x, RDI, shape, n);
    Some(n)
}

fn fill<const N: usize>(bytes: &mut [u8], element: [u8; N]) {
    for place in bytes.as_chunks_mut::<N>().0 {
        *place = element;
    }
}

/// Elements before a 16- or 32-bit address wraps.
fn room(offset: u64, shape: Shape) -> u64 {
    match shape.address {
        8 => u64::MAX,
        bytes => (mask(bytes) + 1 - offset) / shape.element as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::Ram;
    use crate::state::SegmentState;
    use crate::testing::TestBus;
    use crate::trap::GP0;
    use crate::vcpu::{Vcpu, rights};
    use alloc::vec::Vec;
    use iced_x86::{Decoder, DecoderOptions};

    /// A flat 32-bit processor with data of known content.
    fn machine(limit: u32) -> (Vcpu, Ram) {
        let mut cpu = Vcpu::new(Default::default(), 0, 1, None);
        let mut ram = Ram::new(0x10000).unwrap();
        for (n, byte) in ram.bytes_mut().iter_mut().enumerate() {
            *byte = (n * 7 + (n >> 8)) as u8;
        }
        for segment in &mut cpu.segments[..6] {
            *segment = SegmentState {
                selector: 8,
                base: 0,
                limit,
                rights: 3 | rights::S | rights::PRESENT | rights::BIG,
            };
        }
        cpu.refresh();
        (cpu, ram)
    }

    /// Runs to the end by calls of at most `budget`; ticks used, or the trap.
    fn run(cpu: &mut Vcpu, ram: &mut Ram, code: &[u8], budget: u64) -> Exec<u64> {
        let i = Decoder::with_ip(32, code, 0x100, DecoderOptions::NONE).decode();
        let mut ticks = 0;
        loop {
            cpu.rip = i.next_ip();
            cpu.leave_block = false;
            let mut x = Ctx {
                cpu,
                ram,
                bus: &mut TestBus::default(),
                now: ticks,
            };
            let used = string(&mut x, &i, budget)?;
            assert!(used <= budget);
            ticks += used;
            if cpu.rip != i.ip() {
                return Ok(ticks);
            }
        }
    }

    #[test]
    fn many_iterations_at_once_are_the_same_as_one_by_one() {
        const MOVS: [&[u8]; 3] = [&[0xf3, 0xa4], &[0xf3, 0x66, 0xa5], &[0xf3, 0xa5]];
        const STOS: [&[u8]; 3] = [&[0xf3, 0xaa], &[0xf3, 0x66, 0xab], &[0xf3, 0xab]];
        // Source, destination, count: page crossings, overlaps both ways, closer than an element.
        let shapes = [
            (0x2000, 0x5000, 3000),
            (0x2ffd, 0x5ffe, 3000),
            (0x2000, 0x2001, 2500),
            (0x2000, 0x2010, 2500),
            (0x2010, 0x2000, 2500),
            (0x2003, 0x2000, 2500),
            (0x2000, 0x2ff3, 1),
            (0x2000, 0x3000, 0),
        ];
        for code in MOVS.into_iter().chain(STOS) {
            for (from, to, count) in shapes {
                let results: Vec<_> = [1, 7, 100_000]
                    .into_iter()
                    .map(|budget| {
                        let (mut cpu, mut ram) = machine(0xffff_ffff);
                        cpu.gpr[RSI] = from;
                        cpu.gpr[RDI] = to;
                        cpu.gpr[RCX] = count;
                        cpu.gpr[RAX] = 0x1234_5678;
                        let ticks = run(&mut cpu, &mut ram, code, budget);
                        assert_eq!(ticks, Ok(count.max(1)));
                        (
                            cpu.gpr[RSI],
                            cpu.gpr[RDI],
                            cpu.gpr[RCX],
                            ram.bytes().to_vec(),
                        )
                    })
                    .collect();
                assert!(
                    results[0] == results[1] && results[0] == results[2],
                    "{code:x?}"
                );
                assert_eq!(results[0].2, 0);
            }
        }
    }

    #[test]
    fn a_fault_leaves_the_registers_as_after_the_iterations_before_it() {
        for budget in [1, 1000] {
            let (mut cpu, mut ram) = machine(0x4fff);
            cpu.gpr[RSI] = 0x2000;
            cpu.gpr[RDI] = 0x4ff0;
            cpu.gpr[RCX] = 100;
            let before = ram.load::<16>(0x2000).unwrap();
            let result = run(&mut cpu, &mut ram, &[0xf3, 0xa5], budget);
            assert_eq!(result, Err(GP0));
            assert_eq!(
                (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]),
                (0x2010, 0x5000, 96)
            );
            assert_eq!(ram.load::<16>(0x4ff0).unwrap(), before);
        }
    }

    #[test]
    fn a_store_over_decoded_code_ends_the_call() {
        let (mut cpu, mut ram) = machine(0xffff_ffff);
        ram.mark_code(0x5080, 16);
        cpu.gpr[RDI] = 0x5000;
        cpu.gpr[RCX] = 0x100;
        let i = Decoder::with_ip(32, &[0xf3, 0xaa], 0x100, DecoderOptions::NONE).decode();
        cpu.leave_block = false;
        let mut x = Ctx {
            cpu: &mut cpu,
            ram: &mut ram,
            bus: &mut TestBus::default(),
            now: 0,
        };
        assert_eq!(string(&mut x, &i, 1000), Ok(0x81));
        assert!(ram.code_was_written());
        assert_eq!((cpu.gpr[RCX], cpu.rip), (0x7f, 0x100));
    }

    #[test]
    fn comparisons_stop_at_the_element_that_decides() {
        let (mut cpu, mut ram) = machine(0xffff_ffff);
        ram.write(0x3000, b"hypernest\0").unwrap();
        cpu.gpr[RDI] = 0x3000;
        cpu.gpr[RCX] = 0xffff_ffff;
        assert_eq!(run(&mut cpu, &mut ram, &[0xf2, 0xae], 4), Ok(10));
        assert_eq!(cpu.gpr[RDI], 0x300a);
        assert!(cpu.flags.zf());
    }
}
