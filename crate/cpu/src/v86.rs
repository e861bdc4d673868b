//! Virtual-8086 mode and its extensions, protected-mode virtual interrupts with them (Vol. 3B, "8086
//! Emulation").
//!
//! An 8086 program runs at privilege level 3 with segment registers that hold paragraphs. Below IOPL 3 the
//! instructions that touch IF fault, for its monitor to emulate; with CR4.VME the 16-bit ones act on
//! VIF instead, and INT n goes where a bitmap in the TSS says.

use crate::flags::bit;
use crate::mem::Ctx;
use crate::state::SegmentState;
use crate::trap::{Exec, GP0};
use crate::vcpu::{Seg, Vcpu, cr, reg, rights};

/// Offset in the TSS of the pointer to the I/O permission bitmap. The interrupt redirection bitmap is the
/// 32 bytes below where it points.
const BITMAP_POINTER: u64 = 0x66;

/// What a segment register holds after a load in virtual-8086 mode: 64 KiB of writable data at level 3, CS too.
pub(crate) fn segment(selector: u16) -> SegmentState {
    SegmentState {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        rights: 0xf3,
    }
}

impl Vcpu {
    /// In virtual-8086 mode.
    pub fn v86(&self) -> bool {
        self.flags.rest & bit::VM != 0
    }

    /// Selectors are paragraphs, not indices of descriptors: real and virtual-8086 mode.
    pub fn uses_paragraphs(&self) -> bool {
        !self.protected() || self.v86()
    }

    /// A load of a segment register in real or virtual-8086 mode.
    pub fn load_paragraph(&mut self, seg: Seg, selector: u16) {
        if self.v86() {
            *self.seg_mut(seg) = segment(selector);
        } else {
            self.set_real_segment(seg, selector);
        }
    }

    fn iopl(&self) -> u64 {
        (self.flags.rest & bit::IOPL) >> 12
    }
}

/// The flag that CLI and STI act on: IF, VIF, or neither (#GP).
fn interrupt_flag(x: &Ctx) -> Exec<u64> {
    let cpu = &*x.cpu;
    let virtual_one = if cpu.v86() { cr::CR4_VME } else { cr::CR4_PVI };
    if u64::from(cpu.cpl) <= cpu.iopl() {
        Ok(bit::IF)
    } else if cpu.cpl == 3 && cpu.cr4 & virtual_one != 0 {
        Ok(bit::VIF)
    } else {
        Err(GP0)
    }
}

/// CLI.
pub(crate) fn cli(x: &mut Ctx) -> Exec {
    x.cpu.flags.rest &= !interrupt_flag(x)?;
    Ok(())
}

/// STI: the instruction after it is not interrupted. #GP where it would let in an interrupt that the monitor
/// holds back.
pub(crate) fn sti(x: &mut Ctx) -> Exec {
    let flag = interrupt_flag(x)?;
    let before = x.cpu.flags.rest;
    if flag == bit::VIF && before & bit::VIP != 0 {
        return Err(GP0);
    }
    x.cpu.flags.rest |= flag;
    if flag == bit::IF && before & bit::IF == 0 {
        x.cpu.sti_shadow = true;
        x.cpu.leave_block = true;
    }
    Ok(())
}

/// Whether PUSHF, POPF and IRET act on VIF: true below IOPL 3 with the extensions, and #GP for what they do
/// not cover.
pub(crate) fn flags_are_virtual(x: &Ctx, size: usize) -> Exec<bool> {
    if !x.cpu.v86() || x.cpu.iopl() == 3 {
        Ok(false)
    } else if size == 2 && x.cpu.cr4 & cr::CR4_VME != 0 {
        Ok(true)
    } else {
        Err(GP0)
    }
}

/// FLAGS as a program below IOPL 3 is shown them: IF is VIF, IOPL is 3.
pub(crate) fn shown_flags(x: &Ctx) -> u64 {
    let rflags = x.cpu.flags.get();
    let interrupts = if rflags & bit::VIF != 0 { bit::IF } else { 0 };
    rflags & !bit::IF | bit::IOPL | interrupts
}

/// RFLAGS after POPF or IRET of such a program. #GP for a trap flag, and for interrupts on while the monitor
/// holds one back.
pub(crate) fn taken_flags(x: &Ctx, popped: u64) -> Exec<u64> {
    let old = x.cpu.flags.get();
    let on = popped & bit::IF != 0;
    if popped & bit::TF != 0 || on && old & bit::VIP != 0 {
        return Err(GP0);
    }
    let changes = bit::ARITHMETIC | bit::TF | bit::DF | bit::NT;
    let interrupts = if on { bit::VIF } else { 0 };
    Ok(old & !(changes | bit::VIF) | popped & changes | interrupts)
}

/// INT n in virtual-8086 mode (Vol. 3B, "Software Interrupt Handling Methods While in Virtual-8086
/// Mode"): through the program's own vector table where the redirection bitmap says so. False: through the
/// IDT.
pub(crate) fn redirect(x: &mut Ctx, vector: u8) -> Exec<bool> {
    let free = x.cpu.iopl() == 3;
    if x.cpu.cr4 & cr::CR4_VME == 0 || goes_to_monitor(x, vector)? {
        return if free { Ok(false) } else { Err(GP0) };
    }
    let at = u64::from(vector) * 4;
    let entry = u32::from_le_bytes(x.load_system(at)?);
    let image = if free {
        x.cpu.flags.get()
    } else {
        shown_flags(x)
    };
    let mut stack = x.current_stack(0);
    stack.push(x, 2, image)?;
    stack.push(x, 2, u64::from(x.cpu.seg(Seg::Cs).selector))?;
    stack.push(x, 2, x.cpu.rip)?;
    x.cpu.gpr[reg::RSP] = stack.rsp;
    x.cpu.load_paragraph(Seg::Cs, (entry >> 16) as u16);
    x.cpu.rip = u64::from(entry as u16);
    let interrupts = if free { bit::IF } else { bit::VIF };
    x.cpu.flags.rest &= !(bit::TF | interrupts);
    x.cpu.refresh();
    Ok(true)
}

/// The bit of a vector in the redirection bitmap.
fn goes_to_monitor(x: &mut Ctx, vector: u8) -> Exec<bool> {
    let tr = *x.cpu.seg(Seg::Tr);
    let limit = u64::from(tr.limit);
    // A 16-bit TSS has no bitmaps.
    let usable = tr.rights & rights::UNUSABLE == 0 && tr.rights & 8 != 0;
    if !usable || limit < BITMAP_POINTER + 1 {
        return Err(GP0);
    }
    let linear = |offset: u64| tr.base.wrapping_add(offset) & 0xffff_ffff;
    let pointer = u16::from_le_bytes(x.load_system(linear(BITMAP_POINTER))?);
    let at = u64::from(pointer).wrapping_sub(32) + u64::from(vector / 8);
    if pointer < 32 || at > limit {
        return Err(GP0);
    }
    let [bits] = x.load_system(linear(at))?;
    Ok(bits >> (vector & 7) & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::{external, raise};
    use crate::testing::{Fixture, STACK0, TSS, sel};
    use crate::trap::{Fault, Trap};
    use crate::vcpu::CodeSize;

    const STI: [u8; 1] = [0xfb];
    const CLI: [u8; 1] = [0xfa];
    const PUSHF: [u8; 1] = [0x9c];
    const POPF: [u8; 1] = [0x9d];
    const IRET: [u8; 1] = [0xcf];
    const INT: [u8; 2] = [0xcd, 0x21];

    /// A program at 1000:0010 with its stack at 2000:1000, in a level 0 that has gates for everything.
    fn program(iopl: u64, cr4: u64) -> Fixture {
        let mut f = Fixture::protected();
        for vector in 0..=255u8 {
            // Only the gate of INT 3 is open to the program.
            let rights = if vector == 3 { 0xee } else { 0x8e };
            f.gate(vector, sel::CODE0, 0x7000 + u64::from(vector), rights, 0);
        }
        f.cpu.cr4 = cr4;
        for (seg, selector) in [
            (Seg::Cs, 0x1000),
            (Seg::Ss, 0x2000),
            (Seg::Es, 0xe000),
            (Seg::Ds, 0xd000),
            (Seg::Fs, 0xf000),
            (Seg::Gs, 0xa000),
        ] {
            *f.cpu.seg_mut(seg) = segment(selector);
        }
        f.cpu.rip = 0x10;
        f.cpu.gpr[reg::RSP] = 0x1000;
        f.cpu
            .set_rflags(bit::FIXED | bit::VM | bit::IF | iopl << 12);
        f
    }

    /// Gives the TSS bitmaps: redirection of every vector but 0x22 to the program, no port allowed.
    fn bitmaps(f: &mut Fixture) {
        f.poke(TSS + BITMAP_POINTER, 0x88);
        for at in 0..4 {
            f.poke(TSS + 0x68 + 8 * at, if at == 0 { 4 << 32 } else { 0 });
        }
        f.poke(TSS + 0x88, !0);
        f.cpu.seg_mut(Seg::Tr).limit = 0x8f;
    }

    #[test]
    fn it_runs_sixteen_bit_code_at_level_3_with_paragraphs_for_selectors() {
        let mut f = program(3, 0);
        assert_eq!((f.cpu.cpl, f.cpu.code_size), (3, CodeSize::Bits16));
        f.cpu.gpr[reg::RAX] = 0x3456;
        f.execute(&[0x8e, 0xd8]).unwrap(); // MOV DS, AX
        assert_eq!(*f.cpu.seg(Seg::Ds), segment(0x3456));
        f.poke(0x3_4560, 0x1234);
        f.execute(&[0x8b, 0x1e, 0, 0]).unwrap(); // MOV BX, [0]
        assert_eq!(f.cpu.gpr[reg::RBX], 0x1234);
        f.execute(&[0xea, 2, 0, 0x40, 0]).unwrap(); // JMP 40:2
        assert_eq!((f.cpu.seg(Seg::Cs).base, f.cpu.rip), (0x400, 2));
        assert_eq!(f.cpu.seg(Seg::Cs).rights, 0xf3);
        f.execute(&[0x9a, 9, 0, 0x50, 0]).unwrap(); // CALL 50:9
        assert_eq!(f.peek16(0x2_0ffe), 0x40);
        f.execute(&[0xcb]).unwrap(); // RETF
        assert_eq!((f.cpu.seg(Seg::Cs).base, f.cpu.rip), (0x400, 7));
        let gp = Err(GP0);
        assert_eq!(f.execute(&[0x0f, 0x20, 0xc0]), gp); // MOV EAX, CR0
        assert_eq!(f.execute(&[0xf4]), gp); // HLT
        f.poke(TSS + BITMAP_POINTER, 0x68); // beyond the TSS
        assert_eq!(f.execute(&[0xe4, 0x60]), gp); // IN, whatever the IOPL
        let ud = Err(Trap::Fault(Fault::InvalidOpcode));
        assert_eq!(f.execute(&[0x0f, 0x00, 0xc0]), ud); // SLDT AX
    }

    #[test]
    fn an_interrupt_saves_every_segment_and_iretd_brings_them_back() {
        let mut f = program(0, 0);
        let before = f.cpu.save();
        f.with(|x| external(x, 0x30)).unwrap();
        assert_eq!((f.cpu.cpl, f.cpu.rip), (0, 0x7030));
        assert_eq!(f.cpu.seg(Seg::Cs).selector, sel::CODE0);
        assert_eq!(f.cpu.gpr[reg::RSP], STACK0 - 36);
        let frame: [u32; 9] = core::array::from_fn(|n| f.peek32(STACK0 - 36 + 4 * n as u64));
        let flags = (bit::FIXED | bit::VM | bit::IF) as u32;
        let data = [0xe000, 0xd000, 0xf000, 0xa000];
        assert_eq!(frame[..5], [0x10, 0x1000, flags, 0x1000, 0x2000]);
        assert_eq!(frame[5..], data);
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            assert_eq!(*f.cpu.seg(seg), crate::seg::null_segment(0, 0));
        }
        assert_eq!(f.cpu.flags.get(), bit::FIXED);
        f.execute(&IRET).unwrap();
        assert_eq!(f.cpu.save(), before);
        f.with(|x| external(x, 0x30)).unwrap();
        f.poke(STACK0 - 36, 0x1000_0001_0000); // beyond 64 KiB
        assert_eq!(f.execute(&IRET), Err(GP0));
    }

    #[test]
    fn an_exception_has_its_code_below_and_its_handler_must_be_at_level_0() {
        let mut f = program(0, 0);
        f.with(|x| raise(x, Fault::GeneralProtection(0x18)))
            .unwrap();
        assert_eq!(f.cpu.gpr[reg::RSP], STACK0 - 40);
        assert_eq!(f.peek32(STACK0 - 40), 0x18);
        assert_eq!(f.peek32(STACK0 - 28) as u64 & bit::VM, bit::VM);
        let mut f = program(3, 0);
        for (selector, code) in [(sel::CODE3, 0x18), (sel::CONFORMING, 0x30)] {
            f.gate(0x21, selector, 0x7000, 0xee, 0);
            let gp = Err(Trap::Fault(Fault::GeneralProtection(code)));
            assert_eq!(f.execute(&INT), gp);
        }
    }

    #[test]
    fn below_iopl_3_what_touches_if_faults_but_int3_does_not() {
        let mut f = program(2, 0);
        for code in [&STI[..], &CLI, &PUSHF, &POPF, &IRET, &INT] {
            assert_eq!(f.execute(code), Err(GP0), "{code:x?}");
        }
        f.execute(&[0xcc]).unwrap();
        assert_eq!((f.cpu.cpl, f.cpu.rip), (0, 0x7003));
    }

    #[test]
    fn at_iopl_3_the_program_has_the_flag_itself() {
        let mut f = program(3, 0);
        f.execute(&CLI).unwrap();
        f.execute(&PUSHF).unwrap();
        assert_eq!(f.peek16(0x2_0ffe), 0x3002);
        f.poke(0x2_0ffe, 0x0302); // TF and IF, IOPL 0
        f.execute(&POPF).unwrap();
        let flags = bit::FIXED | bit::VM | bit::IOPL | bit::TF | bit::IF;
        assert_eq!(f.cpu.flags.get(), flags);
        f.poke(0x2_1000, 0x0002_0040_0007);
        f.execute(&IRET).unwrap();
        assert_eq!((f.cpu.seg(Seg::Cs).selector, f.cpu.rip), (0x40, 7));
        assert_eq!(f.cpu.gpr[reg::RSP], 0x1006);
        assert_eq!(f.cpu.flags.get(), bit::FIXED | bit::VM | bit::IOPL);
        // INT n goes through the IDT, whose gates are closed to level 3.
        let gp = Err(Trap::Fault(Fault::GeneralProtection(0x21 << 3 | 2)));
        assert_eq!(f.execute(&INT), gp);
    }

    #[test]
    fn with_the_extensions_the_program_has_a_virtual_flag() {
        let mut f = program(0, cr::CR4_VME);
        f.execute(&STI).unwrap();
        assert_eq!(f.cpu.flags.rest & (bit::VIF | bit::IF), bit::VIF | bit::IF);
        assert!(!f.cpu.sti_shadow);
        f.execute(&PUSHF).unwrap();
        assert_eq!(f.peek16(0x2_0ffe), 0x3202);
        f.execute(&CLI).unwrap();
        assert_eq!(f.cpu.flags.rest & (bit::VIF | bit::IF), bit::IF);
        f.execute(&POPF).unwrap();
        assert_ne!(f.cpu.flags.rest & bit::VIF, 0);
        f.cpu.flags.rest &= !bit::VIF;
        // A monitor with an interrupt to deliver is told when the program lets interrupts in.
        f.cpu.flags.rest |= bit::VIP;
        f.cpu.gpr[reg::RSP] = 0xffe;
        assert_eq!(f.execute(&STI), Err(GP0));
        assert_eq!(f.execute(&POPF), Err(GP0));
        f.poke(0x2_0ffe, 0x0002);
        f.execute(&POPF).unwrap();
        f.cpu.gpr[reg::RSP] = 0x1000;
        f.poke(0x2_1000, 0x0102_0040_0007);
        assert_eq!(f.execute(&IRET), Err(GP0)); // TF
        f.cpu.flags.rest &= !bit::VIP;
        f.poke(0x2_1000, 0x0203_0040_0007);
        f.execute(&IRET).unwrap();
        assert_eq!((f.cpu.seg(Seg::Cs).base, f.cpu.rip), (0x400, 7));
        let flags = bit::FIXED | bit::VM | bit::IF | bit::VIF | bit::CF;
        assert_eq!(f.cpu.flags.get(), flags);
        // The 32-bit forms are not covered.
        assert_eq!(f.execute(&[0x66, 0x9c]), Err(GP0));
        assert_eq!(f.execute(&[0x66, 0xcf]), Err(GP0));
    }

    #[test]
    fn the_redirection_bitmap_decides_where_int_n_goes() {
        for (iopl, shown) in [(0, 0x3002), (3, 0x3202)] {
            let mut f = program(iopl, cr::CR4_VME);
            f.poke(0x21 * 4, 0x0040_0009);
            assert_eq!(f.execute(&INT), Err(GP0), "no bitmap within the TSS");
            bitmaps(&mut f);
            f.execute(&INT).unwrap();
            assert_eq!((f.cpu.seg(Seg::Cs).base, f.cpu.rip), (0x400, 9));
            assert_eq!((f.cpu.cpl, f.cpu.gpr[reg::RSP]), (3, 0xffa));
            assert_eq!(
                f.peek(0x2_0ffa) & 0xffff_ffff_ffff,
                shown << 32 | 0x1000_0012
            );
            // IF goes only where it is the program's.
            assert_eq!(f.cpu.flags.rest & bit::IF == 0, iopl == 3);
            let to_monitor = f.execute(&[0xcd, 0x22]);
            let closed = Fault::GeneralProtection(0x22 << 3 | 2);
            let expected = if iopl == 3 { closed.into() } else { GP0 };
            assert_eq!(to_monitor, Err(expected));
        }
    }

    #[test]
    fn protected_mode_programs_have_a_virtual_flag_with_pvi() {
        let mut f = Fixture::protected();
        f.enter(3);
        assert_eq!(f.execute(&STI), Err(GP0));
        f.cpu.cr4 = cr::CR4_PVI;
        f.execute(&STI).unwrap();
        assert_eq!(f.cpu.flags.rest & (bit::VIF | bit::IF), bit::VIF);
        f.execute(&CLI).unwrap();
        f.cpu.flags.rest |= bit::VIP;
        assert_eq!(f.execute(&STI), Err(GP0));
        f.enter(0);
        f.execute(&STI).unwrap();
        assert_eq!(f.cpu.flags.rest & (bit::VIF | bit::IF), bit::IF);
    }
}
