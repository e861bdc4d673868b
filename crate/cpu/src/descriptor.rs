//! Segment descriptors and gates as they lie in the GDT, an LDT or the IDT
//! (Vol. 3A, "Segment Descriptors", "Gate Descriptors").

use crate::mem::Ctx;
use crate::state::SegmentState;
use crate::trap::{Exec, Fault, Trap};
use crate::vcpu::{Seg, rights};

/// System descriptor types.
pub(crate) mod kind {
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT16: u8 = 6;
    pub const TRAP16: u8 = 7;
    pub const TSS: u8 = 9;
    pub const TSS_BUSY: u8 = 0xb;
    pub const CALL: u8 = 0xc;
    pub const INTERRUPT: u8 = 0xe;
    pub const TRAP: u8 = 0xf;
}

/// The first eight bytes of any descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor(pub u64);

impl Descriptor {
    /// Access rights in the form of [`SegmentState::rights`].
    pub fn rights(self) -> u32 {
        (self.0 >> 40) as u32 & 0xf0ff
    }

    pub fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | self.0 >> 32 & 0xff00_0000
    }

    /// Limit in bytes.
    pub fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.rights() & rights::GRANULARITY != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }

    /// Type field, 4 bits.
    pub fn kind(self) -> u8 {
        (self.0 >> 40) as u8 & 0xf
    }

    pub fn dpl(self) -> u8 {
        (self.0 >> 45) as u8 & 3
    }

    fn has(self, bit: u32) -> bool {
        self.rights() & bit != 0
    }

    pub fn present(self) -> bool {
        self.has(rights::PRESENT)
    }

    /// A system segment or gate rather than code or data.
    pub fn is_system(self) -> bool {
        !self.has(rights::S)
    }

    pub fn is_code(self) -> bool {
        self.has(rights::S) && self.has(rights::CODE)
    }

    pub fn is_conforming(self) -> bool {
        self.is_code() && self.has(rights::DOWN)
    }

    pub fn is_writable_data(self) -> bool {
        self.has(rights::S) && !self.has(rights::CODE) && self.has(rights::WRITABLE)
    }

    /// Data, or code that may be read.
    pub fn is_readable(self) -> bool {
        self.has(rights::S) && (!self.has(rights::CODE) || self.has(rights::WRITABLE))
    }

    /// 64-bit code: L set, D clear.
    pub fn is_long_code(self) -> bool {
        self.has(rights::LONG) && !self.has(rights::BIG)
    }

    /// A segment register holding this descriptor.
    pub fn segment(self, selector: u16) -> SegmentState {
        SegmentState {
            selector,
            base: self.base(),
            limit: self.limit(),
            rights: self.rights(),
        }
    }

    /// Gates: selector of the target.
    pub fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Gates: low 32 bits of the offset; 16 for the 16-bit kinds.
    pub fn gate_offset(self) -> u64 {
        let low = self.0 & 0xffff;
        if self.kind() & 8 != 0 {
            low | self.0 >> 32 & 0xffff_0000
        } else {
            low
        }
    }

    /// Call gates: words or doublewords to copy.
    pub fn gate_parameters(self) -> u64 {
        self.0 >> 32 & 0x1f
    }

    /// 64-bit interrupt gates: entry of the interrupt stack table, 0 for none.
    pub fn gate_ist(self) -> u64 {
        self.0 >> 32 & 7
    }
}

/// Whether a selector is null.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Error code naming a selector.
pub(crate) fn selector_code(selector: u16) -> u16 {
    selector & !3
}

impl Ctx<'_> {
    /// Linear address of the descriptor of a selector that is not null, if its table has `size`
    /// bytes for it.
    pub fn descriptor_address(&self, selector: u16, size: u32) -> Option<u64> {
        let at = u32::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.cpu.gdtr.base, u32::from(self.cpu.gdtr.limit))
        } else {
            let ldt = self.cpu.seg(Seg::Ldtr);
            if ldt.rights & rights::UNUSABLE != 0 {
                return None;
            }
            (ldt.base, ldt.limit)
        };
        (at + (size - 1) <= limit).then(|| base.wrapping_add(u64::from(at)))
    }

    /// The descriptor of a selector that is not null; `None` outside its table.
    pub fn find_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        match self.descriptor_address(selector, 8) {
            Some(at) => Ok(Some(Descriptor(u64::from_le_bytes(self.load_system(at)?)))),
            None => Ok(None),
        }
    }

    /// As [`Ctx::find_descriptor`], with `fault` outside the table.
    pub fn descriptor(&mut self, selector: u16, fault: Fault) -> Exec<Descriptor> {
        self.find_descriptor(selector)?.ok_or(Trap::Fault(fault))
    }

    /// The upper half of a 16-byte system descriptor (IA-32e mode). Its type field must be zero.
    pub fn descriptor_high(&mut self, selector: u16, fault: Fault) -> Exec<u64> {
        let at = self
            .descriptor_address(selector, 16)
            .ok_or(Trap::Fault(fault))?;
        let high = u64::from_le_bytes(self.load_system(at.wrapping_add(8))?);
        if high >> 40 & 0x1f != 0 {
            return Err(fault.into());
        }
        Ok(high)
    }

    /// Sets bits of a descriptor's type in its table: accessed, or busy.
    pub fn mark_descriptor(&mut self, selector: u16, old: Descriptor, bits: u8) -> Exec {
        if old.kind() & bits == bits {
            return Ok(());
        }
        match self.descriptor_address(selector, 8) {
            Some(at) => self.store_system(at.wrapping_add(5), [(old.0 >> 40) as u8 | bits]),
            None => Ok(()),
        }
    }
}
