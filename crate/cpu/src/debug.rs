//! Debug registers and single step (Vol. 3B, "Debug, Branch Profile, TSC").

use crate::trap::Fault;
use crate::vcpu::{Vcpu, cr};

pub(crate) use crate::interrupt::DR6_BS as SINGLE_STEP;

/// Bits of DR6 that can change: B0-B3, BD, BS, BT.
pub(crate) const DR6_BITS: u64 = 0xe00f;
/// Bits of DR7 that can change: L0-G3, LE, GE, GD, and the four conditions.
pub(crate) const DR7_BITS: u64 = 0xffff_23ff;

const EXECUTE: u64 = 0;
const IO: u64 = 2;

/// R/W field of breakpoint `n`.
fn condition(dr7: u64, n: usize) -> u64 {
    dr7 >> (16 + 4 * n) & 3
}

/// Bytes that breakpoint `n` watches.
fn length(dr7: u64, n: usize) -> u64 {
    match dr7 >> (18 + 4 * n) & 3 {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    }
}

fn enabled(dr7: u64, n: usize) -> bool {
    dr7 >> (2 * n) & 3 != 0
}

/// The fault of an armed instruction breakpoint at `linear`, unless RF holds it off.
pub(crate) fn instruction_breakpoint(cpu: &Vcpu, linear: u64) -> Option<Fault> {
    if cpu.dr7 & 0xff == 0 || cpu.flags.rest & crate::flags::bit::RF != 0 {
        return None;
    }
    let matches = |n: &usize| condition(cpu.dr7, *n) == EXECUTE && cpu.dr[*n] == linear;
    let hits = (0..4).filter(matches).fold(0, |bits, n| bits | 1u64 << n);
    // DR6 reports a match even of a disabled one; only an enabled one faults.
    (0..4)
        .any(|n| hits >> n & 1 != 0 && enabled(cpu.dr7, n))
        .then_some(Fault::Debug(hits))
}

/// Notes I/O breakpoints that an access of `size` bytes at `port` touches.
pub(crate) fn match_io_breakpoints(cpu: &mut Vcpu, port: u16, size: u64) {
    if cpu.dr7 & 0xff == 0 || cpu.cr4 & cr::CR4_DE == 0 {
        return;
    }
    let first = u64::from(port);
    for n in 0..4 {
        let length = length(cpu.dr7, n);
        let start = cpu.dr[n] & !(length - 1);
        let touches = first < start.wrapping_add(length) && start < first + size;
        if condition(cpu.dr7, n) == IO && enabled(cpu.dr7, n) && touches {
            cpu.pending_debug |= 1 << n;
        }
    }
}

/// The trap of the instruction before, if it met a debug condition. Clears what was pending. After
/// a load of SS it waits for one more instruction.
pub(crate) fn pending_trap(cpu: &mut Vcpu) -> Option<Fault> {
    if cpu.pending_debug == 0 || cpu.mov_ss_shadow {
        return None;
    }
    Some(Fault::Debug(core::mem::take(&mut cpu.pending_debug)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::bit;
    use crate::testing::{CODE, Fixture};

    #[test]
    fn an_instruction_breakpoint_faults_once() {
        let mut f = Fixture::long();
        f.cpu.dr[2] = CODE;
        f.cpu.dr[3] = CODE;
        f.cpu.dr7 = 0x400 | 1 << 4;
        // The disabled one is reported with the enabled one.
        assert_eq!(
            instruction_breakpoint(&f.cpu, CODE),
            Some(Fault::Debug(0xc))
        );
        assert_eq!(instruction_breakpoint(&f.cpu, CODE + 1), None);
        f.cpu.flags.rest |= bit::RF;
        assert_eq!(instruction_breakpoint(&f.cpu, CODE), None);
        f.cpu.flags.rest = 0;
        f.cpu.dr7 = 0x400;
        assert_eq!(instruction_breakpoint(&f.cpu, CODE), None);
    }

    #[test]
    fn a_data_breakpoint_traps_after_the_access_and_waits_behind_mov_ss() {
        let mut f = Fixture::long();
        f.cpu.dr[1] = 0x9004;
        f.cpu.dr7 = 0x400 | 1 << 2 | 0b1101 << 20; // four bytes, writes
        f.cpu.refresh();
        f.execute(&[0x8a, 0x04, 0x25, 0x04, 0x90, 0, 0]).unwrap();
        assert_eq!(pending_trap(&mut f.cpu), None);
        f.execute(&[0x88, 0x04, 0x25, 0x07, 0x90, 0, 0]).unwrap();
        f.cpu.mov_ss_shadow = true;
        assert_eq!(pending_trap(&mut f.cpu), None);
        f.cpu.mov_ss_shadow = false;
        assert_eq!(pending_trap(&mut f.cpu), Some(Fault::Debug(2)));
        assert_eq!(pending_trap(&mut f.cpu), None);
    }

    #[test]
    fn an_io_breakpoint_needs_debugging_extensions() {
        let mut f = Fixture::long();
        f.cpu.dr[0] = 0x60;
        f.cpu.dr7 = 0x400 | 1 | 0b10 << 16;
        match_io_breakpoints(&mut f.cpu, 0x60, 1);
        assert_eq!(f.cpu.pending_debug, 0);
        f.cpu.cr4 |= cr::CR4_DE;
        match_io_breakpoints(&mut f.cpu, 0x5e, 4);
        assert_eq!(f.cpu.pending_debug, 1);
    }
}
