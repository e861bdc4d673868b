//! Loading segment registers (Vol. 3A, "Segment Loading Instructions in IA-32e Mode",
//! "Protection"; Vol. 2, MOV, LLDT, LTR).

use crate::descriptor::{Descriptor, is_null, kind, selector_code};
use crate::mem::{Ctx, canonical};
use crate::operand::mask;
use crate::state::SegmentState;
use crate::trap::{Exec, Fault, GP0, Trap};
use crate::vcpu::{Seg, Vcpu, reg, rights};

/// A segment register that holds a null selector.
pub(crate) fn null_segment(selector: u16, dpl: u8) -> SegmentState {
    SegmentState {
        selector,
        base: 0,
        limit: 0,
        rights: rights::UNUSABLE | u32::from(dpl) << rights::DPL_SHIFT,
    }
}

impl Vcpu {
    /// What a load in real mode does: the base follows the selector, the limit and size stay as
    /// they are ("unreal" mode).
    pub fn set_real_segment(&mut self, seg: Seg, selector: u16) {
        const KEPT: u32 = rights::BIG | rights::GRANULARITY;
        let rights = if seg == Seg::Cs { 0x9b } else { 0x93 };
        let segment = self.seg_mut(seg);
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
        segment.rights = segment.rights & KEPT | rights;
    }
}

/// A stack to push to before it becomes the current one. RSP changes only when the caller stores
/// `rsp` at the end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    pub ss: SegmentState,
    pub rsp: u64,
    /// Bytes of stack pointer: 2, 4 or 8 (flat).
    pub width: usize,
    /// Error code of #SS where a push does not fit.
    pub code: u16,
}

impl Stack {
    /// A stack in segment `ss`, outside 64-bit mode.
    pub fn in_segment(ss: SegmentState, rsp: u64, code: u16) -> Stack {
        let width = if ss.rights & rights::BIG != 0 { 4 } else { 2 };
        Stack {
            ss,
            rsp,
            width,
            code,
        }
    }

    /// Linear address of `size` bytes at `offset`.
    fn linear(&self, offset: u64, size: u64) -> Exec<u64> {
        let last = offset.wrapping_add(size - 1);
        if self.width == 8 {
            return if canonical(offset) && canonical(last) {
                Ok(offset)
            } else {
                Err(Fault::Stack(self.code).into())
            };
        }
        let limit = u64::from(self.ss.limit);
        let usable = self.ss.rights & rights::UNUSABLE == 0;
        let inside = if self.ss.rights & rights::DOWN != 0 {
            offset > limit && last <= mask(self.width)
        } else {
            last <= limit
        };
        if usable && inside {
            Ok(self.ss.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            Err(Fault::Stack(self.code).into())
        }
    }

    /// Pushes `size` bytes with the privilege that is current in `x`.
    pub fn push(&mut self, x: &mut Ctx, size: usize, value: u64) -> Exec {
        let width = mask(self.width);
        let top = self.rsp.wrapping_sub(size as u64) & width;
        let linear = self.linear(top, size as u64)?;
        x.store_sized(linear, size, value)?;
        self.rsp = self.rsp & !width | top;
        Ok(())
    }

    /// Pushes eight-byte `values`, the first one highest, where that is a plain store: a flat stack, one page
    /// that the TLB has, nothing that watches data. False: nothing was done.
    pub fn push_plain(&mut self, x: &mut Ctx, values: &[u64]) -> bool {
        let size = 8 * values.len() as u64;
        let bottom = self.rsp.wrapping_sub(size);
        // Bytes of one page are all canonical or none.
        if self.width != 8 || !canonical(bottom) || x.watches_data() {
            return false;
        }
        let Some(offset) = x.cpu.tlb.write_offset(bottom, size, x.cpu.tlb_key) else {
            return false;
        };
        for (n, value) in values.iter().rev().enumerate() {
            x.ram.put(offset + 8 * n, value.to_le_bytes());
        }
        self.rsp = bottom;
        true
    }
}

impl Ctx<'_> {
    /// The current stack, for pushes that must all succeed before RSP moves.
    pub fn current_stack(&self, code: u16) -> Stack {
        Stack {
            ss: *self.cpu.seg(Seg::Ss),
            rsp: self.cpu.gpr[reg::RSP],
            width: self.stack_width(),
            code,
        }
    }

    /// Runs `f` with the memory privileges of `cpl`.
    pub fn at_privilege<T>(&mut self, cpl: u8, f: impl FnOnce(&mut Self) -> Exec<T>) -> Exec<T> {
        let before = (self.cpu.cpl, self.cpu.tlb_key);
        self.cpu.cpl = cpl;
        self.cpu.tlb_key = self.cpu.tlb.key(self.cpu.access_kind());
        let result = f(self);
        (self.cpu.cpl, self.cpu.tlb_key) = before;
        result
    }

    /// MOV or POP to ES, SS, DS, FS or GS in whatever mode. The caller notes the shadow of SS.
    pub fn load_segment(&mut self, seg: Seg, selector: u16) -> Exec {
        if self.cpu.uses_paragraphs() {
            self.cpu.load_paragraph(seg, selector);
        } else {
            let segment = if seg == Seg::Ss {
                self.check_stack_segment(selector)?
            } else {
                self.check_data_segment(selector)?
            };
            *self.cpu.seg_mut(seg) = segment;
        }
        self.cpu.refresh();
        Ok(())
    }

    fn check_data_segment(&mut self, selector: u16) -> Exec<SegmentState> {
        if is_null(selector) {
            return Ok(null_segment(selector, 0));
        }
        let code = selector_code(selector);
        let fault = Fault::GeneralProtection(code);
        let descriptor = self.descriptor(selector, fault)?;
        let rpl = (selector & 3) as u8;
        let privileged = !descriptor.is_conforming()
            && (rpl > descriptor.dpl() || self.cpu.cpl > descriptor.dpl());
        if !descriptor.is_readable() || privileged {
            return Err(fault.into());
        }
        if !descriptor.present() {
            return Err(Fault::NotPresent(code).into());
        }
        self.accessed(selector, descriptor)
    }

    fn check_stack_segment(&mut self, selector: u16) -> Exec<SegmentState> {
        let cpl = self.cpu.cpl;
        if is_null(selector) {
            return if self.cpu.is_64() && cpl < 3 && (selector & 3) as u8 == cpl {
                Ok(null_segment(selector, cpl))
            } else {
                Err(GP0)
            };
        }
        self.stack_segment_for(selector, cpl, Fault::GeneralProtection)
    }

    /// A stack segment, not null, for privilege `cpl`; `fault` makes the fault of a wrong one.
    pub fn stack_segment_for(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: fn(u16) -> Fault,
    ) -> Exec<SegmentState> {
        self.stack_segment_ext(selector, cpl, fault, 0)
    }

    /// As [`Ctx::stack_segment_for`], with the EXT bit for the error codes.
    pub fn stack_segment_ext(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: fn(u16) -> Fault,
        ext: u16,
    ) -> Exec<SegmentState> {
        let code = selector_code(selector) | ext;
        let descriptor = self.descriptor(selector, fault(code))?;
        if (selector & 3) as u8 != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data()
        {
            return Err(fault(code).into());
        }
        if !descriptor.present() {
            return Err(Fault::Stack(code).into());
        }
        self.accessed(selector, descriptor)
    }

    /// Sets the accessed bit and gives the segment register's new content.
    pub fn accessed(&mut self, selector: u16, descriptor: Descriptor) -> Exec<SegmentState> {
        self.mark_descriptor(selector, descriptor, 1)?;
        let mut segment = descriptor.segment(selector);
        segment.rights |= rights::ACCESSED;
        Ok(segment)
    }

    /// LLDT.
    pub fn load_ldtr(&mut self, selector: u16) -> Exec {
        if is_null(selector) {
            *self.cpu.seg_mut(Seg::Ldtr) = null_segment(selector, 0);
            return Ok(());
        }
        let segment = self.system_segment(selector, &[kind::LDT])?.1;
        *self.cpu.seg_mut(Seg::Ldtr) = segment;
        Ok(())
    }

    /// LTR.
    pub fn load_tr(&mut self, selector: u16) -> Exec {
        if is_null(selector) {
            return Err(GP0);
        }
        let kinds: &[u8] = if self.cpu.long_mode() {
            &[kind::TSS]
        } else {
            &[kind::TSS16, kind::TSS]
        };
        let (descriptor, mut segment) = self.system_segment(selector, kinds)?;
        self.mark_descriptor(selector, descriptor, 2)?;
        segment.rights |= 2;
        *self.cpu.seg_mut(Seg::Tr) = segment;
        Ok(())
    }

    fn system_segment(&mut self, selector: u16, kinds: &[u8]) -> Exec<(Descriptor, SegmentState)> {
        let code = selector_code(selector);
        let fault = Fault::GeneralProtection(code);
        if selector & 4 != 0 {
            return Err(fault.into());
        }
        let descriptor = self.descriptor(selector, fault)?;
        if !descriptor.is_system() || !kinds.contains(&descriptor.kind()) {
            return Err(fault.into());
        }
        if !descriptor.present() {
            return Err(Fault::NotPresent(code).into());
        }
        let mut segment = descriptor.segment(selector);
        if self.cpu.long_mode() {
            segment.base |= self.descriptor_high(selector, fault)? << 32;
            if !canonical(segment.base) {
                return Err(fault.into());
            }
        }
        Ok((descriptor, segment))
    }

    /// After a return to an outer level: data segments it may not use become null. The bases stay,
    /// which 64-bit mode sees in FS and GS.
    pub fn drop_inner_segments(&mut self, cpl: u8) {
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            let segment = self.cpu.seg_mut(seg);
            let kind = segment.rights;
            let conforming = kind & (rights::CODE | rights::DOWN) == rights::CODE | rights::DOWN;
            let dpl = (kind >> rights::DPL_SHIFT & 3) as u8;
            if kind & rights::UNUSABLE == 0 && !conforming && dpl < cpl {
                segment.selector = 0;
                segment.rights |= rights::UNUSABLE;
            }
        }
    }

    /// Whether `offset` may be the next instruction in a code segment of this descriptor.
    pub fn check_entry(&self, descriptor: Descriptor, offset: u64, code: u16) -> Exec {
        let inside = if self.cpu.long_mode() && descriptor.is_long_code() {
            canonical(offset)
        } else {
            offset <= u64::from(descriptor.limit())
        };
        if inside {
            Ok(())
        } else {
            Err(Trap::Fault(Fault::GeneralProtection(code)))
        }
    }

    /// SS:RSP of privilege `cpl` from the current TSS, outside IA-32e mode.
    pub fn inner_stack(&mut self, cpl: u8, ext: u16) -> Exec<(u16, u64)> {
        let tr = *self.cpu.seg(Seg::Tr);
        let level = u64::from(cpl);
        let wide = tr.rights & 8 != 0;
        let (at, len) = if wide {
            (4 + 8 * level, 8)
        } else {
            (2 + 4 * level, 4)
        };
        // The manual checks one byte less of SS than is read: 6 bytes are used.
        let used = if wide { 6 } else { len };
        if tr.rights & rights::UNUSABLE != 0 || at + used - 1 > u64::from(tr.limit) {
            return Err(Fault::InvalidTss(selector_code(tr.selector) | ext).into());
        }
        let linear = tr.base.wrapping_add(at) & 0xffff_ffff;
        Ok(if wide {
            let rsp = u32::from_le_bytes(self.load_system(linear)?);
            let ss = u16::from_le_bytes(self.load_system(linear.wrapping_add(4))?);
            (ss, u64::from(rsp))
        } else {
            let rsp = u16::from_le_bytes(self.load_system(linear)?);
            let ss = u16::from_le_bytes(self.load_system(linear.wrapping_add(2))?);
            (ss, u64::from(rsp))
        })
    }

    /// A stack pointer at `offset` in the 64-bit TSS (RSP0-2 or IST1-7).
    pub fn tss_stack_pointer(&mut self, offset: u64, ext: u16) -> Exec<u64> {
        let tr = *self.cpu.seg(Seg::Tr);
        if offset + 7 > u64::from(tr.limit) {
            return Err(Fault::InvalidTss(selector_code(tr.selector) | ext).into());
        }
        let rsp = u64::from_le_bytes(self.load_system(tr.base.wrapping_add(offset))?);
        if canonical(rsp) {
            Ok(rsp)
        } else {
            Err(Fault::Stack(ext).into())
        }
    }

    /// Makes `segment` the code segment with privilege `cpl`. SS must be set by then.
    pub fn enter_code(&mut self, mut segment: SegmentState, cpl: u8, rip: u64) {
        segment.selector = segment.selector & !3 | u16::from(cpl);
        *self.cpu.seg_mut(Seg::Cs) = segment;
        self.cpu.rip = rip;
        self.cpu.refresh();
        debug_assert!(self.cpu.cpl == cpl || !self.cpu.protected());
    }
}
