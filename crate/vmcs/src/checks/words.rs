//! The words that the rows are written in.

use super::{EntryCtx, Verdict};
use crate::{Caps, Control, Field, entry, exit, proc1, proc2};

pub(super) const PIN: Field = Field::PIN_BASED_VM_EXEC_CONTROL;
pub(super) const PROC1: Field = Field::CPU_BASED_VM_EXEC_CONTROL;
pub(super) const PROC2: Field = Field::SECONDARY_VM_EXEC_CONTROL;
pub(super) const PROC3: Field = Field::TERTIARY_VM_EXEC_CONTROL;
pub(super) const EXIT: Field = Field::VM_EXIT_CONTROLS;
pub(super) const EXIT2: Field = Field::SECONDARY_VM_EXIT_CONTROLS;
pub(super) const ENTRY: Field = Field::VM_ENTRY_CONTROLS;
pub(super) const INJECTION: Field = Field::VM_ENTRY_INTR_INFO_FIELD;

pub(super) const CR0_PE: u64 = 1 << 0;
pub(super) const CR0_WP: u64 = 1 << 16;
pub(super) const CR0_NW: u64 = 1 << 29;
pub(super) const CR0_CD: u64 = 1 << 30;
pub(super) const CR0_PG: u64 = 1 << 31;
pub(super) const CR4_PAE: u64 = 1 << 5;
pub(super) const CR4_PCIDE: u64 = 1 << 17;
pub(super) const CR4_CET: u64 = 1 << 23;
pub(super) const CR4_FRED: u64 = 1 << 32;
pub(super) const EFER_LME: u64 = 1 << 8;
pub(super) const EFER_LMA: u64 = 1 << 10;
pub(super) const RFLAGS_TF: u64 = 1 << 8;
pub(super) const RFLAGS_IF: u64 = 1 << 9;
pub(super) const RFLAGS_IOPL: u64 = 3 << 12;
pub(super) const RFLAGS_VM: u64 = 1 << 17;

/// The rule `holds` if it applies.
pub(super) fn when(applies: bool, holds: bool) -> Verdict {
    if applies {
        holds.into()
    } else {
        Verdict::NotReached
    }
}

/// Types of an event that VM entry injects: SDM Vol. 3C, "VM-Entry Controls for Event Injection".
pub(super) mod event {
    pub const EXTERNAL_INTERRUPT: u8 = 0;
    pub const RESERVED: u8 = 1;
    pub const NMI: u8 = 2;
    pub const HARDWARE_EXCEPTION: u8 = 3;
    pub const SOFTWARE_INTERRUPT: u8 = 4;
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u8 = 5;
    pub const SOFTWARE_EXCEPTION: u8 = 6;
    pub const OTHER: u8 = 7;
}

/// The VM-entry interruption information, if its valid bit is set.
#[derive(Clone, Copy)]
pub(super) struct Injection {
    pub(super) info: u32,
}

impl Injection {
    pub(super) fn vector(self) -> u8 {
        self.info as u8
    }

    pub(super) fn kind(self) -> u8 {
        (self.info >> 8 & 7) as u8
    }

    pub(super) fn is(self, kind: u8) -> bool {
        self.kind() == kind
    }

    pub(super) fn has_error_code(self) -> bool {
        self.info & 1 << 11 != 0
    }
}

impl EntryCtx<'_> {
    pub(super) fn get(&self, field: Field) -> u64 {
        self.vmcs.get(field)
    }

    pub(super) fn get32(&self, field: Field) -> u32 {
        self.get(field) as u32
    }

    pub(super) fn pin(&self, bit: u32) -> bool {
        self.get32(PIN) & bit != 0
    }

    pub(super) fn proc1(&self, bit: u32) -> bool {
        self.get32(PROC1) & bit != 0
    }

    /// Secondary controls count as 0 unless activated.
    pub(super) fn proc2(&self, bit: u32) -> bool {
        self.proc1(proc1::ACTIVATE_SECONDARY_CONTROLS) && self.get32(PROC2) & bit != 0
    }

    /// Tertiary controls count as 0 unless activated.
    pub(super) fn proc3(&self, bit: u64) -> bool {
        self.proc1(proc1::ACTIVATE_TERTIARY_CONTROLS) && self.get(PROC3) & bit != 0
    }

    pub(super) fn exit(&self, bit: u32) -> bool {
        self.get32(EXIT) & bit != 0
    }

    /// Secondary VM-exit controls count as 0 unless activated.
    pub(super) fn exit2(&self, bit: u64) -> bool {
        self.exit(exit::ACTIVATE_SECONDARY_CONTROLS) && self.get(EXIT2) & bit != 0
    }

    pub(super) fn entry(&self, bit: u32) -> bool {
        self.get32(ENTRY) & bit != 0
    }

    /// The control word has each bit that must be 1 and none that must be 0.
    pub(super) fn obeys(&self, control: Control) -> bool {
        let value = self.get(control.field());
        let must = self.caps.allowed0(control);
        value & must == must && value & !self.caps.allowed1(control) == 0
    }

    pub(super) fn ept(&self) -> bool {
        self.proc2(proc2::ENABLE_EPT)
    }

    pub(super) fn unrestricted(&self) -> bool {
        self.proc2(proc2::UNRESTRICTED_GUEST)
    }

    pub(super) fn host64(&self) -> bool {
        self.exit(exit::HOST_ADDRESS_SPACE_SIZE)
    }

    pub(super) fn guest64(&self) -> bool {
        self.entry(entry::IA_32E_MODE_GUEST)
    }

    pub(super) fn v8086(&self) -> bool {
        self.get(Field::GUEST_RFLAGS) & RFLAGS_VM != 0
    }

    pub(super) fn guest_cr4(&self, bit: u64) -> bool {
        self.get(Field::GUEST_CR4) & bit != 0
    }

    /// The event to inject.
    pub(super) fn injection(&self) -> Option<Injection> {
        let info = self.get32(INJECTION);
        (info >> 31 != 0).then_some(Injection { info })
    }

    /// An event of this type is to be injected.
    pub(super) fn injects(&self, kind: u8) -> bool {
        self.injection().is_some_and(|event| event.is(kind))
    }

    /// The entry leaves SMM: it is executed there and is not one to SMM.
    pub(super) fn returns_from_smm(&self) -> bool {
        self.cpu.smm && !self.entry(entry::ENTRY_TO_SMM)
    }

    /// Bits of an address at and above the processor's physical width.
    pub(super) fn beyond_physical(&self, address: u64) -> u64 {
        address
            .checked_shr(self.cpu.physical_bits.into())
            .unwrap_or(0)
    }

    /// The address can be that of a VMX structure: within the physical width, and within 32 bits
    /// where IA32_VMX_BASIC says so.
    pub(super) fn physical(&self, address: u64) -> bool {
        self.beyond_physical(address) == 0
            && !(self.caps.basic >> 48 & 1 != 0 && address >> 32 != 0)
    }

    /// As [`physical`](Self::physical), and a multiple of `align`.
    pub(super) fn aligned(&self, address: u64, align: u64) -> bool {
        address & (align - 1) == 0 && self.physical(address)
    }

    /// The field is the address of a page.
    pub(super) fn page(&self, field: Field) -> bool {
        self.aligned(self.get(field), 0x1000)
    }

    /// Bits at and above the linear width, and the bit below, are identical.
    pub(super) fn canonical(&self, address: u64) -> bool {
        let unused = 64 - u32::from(self.cpu.linear_bits);
        (((address << unused) as i64) >> unused) as u64 == address
    }

    /// Bits at and above the linear width are identical. The bit below may differ.
    pub(super) fn linear(&self, address: u64) -> bool {
        let top = (address as i64) >> self.cpu.linear_bits;
        top == 0 || top == -1
    }

    /// CR3 has no reserved bit set. CR3 is no VMX structure: its limit is always the physical width.
    pub(super) fn cr3(&self, cr3: u64) -> bool {
        let lam = if self.cpu.lam { 3 << 61 } else { 0 };
        self.beyond_physical(cr3 & !lam) == 0
    }
}

/// A CR0 that obeys the fixed bits. NW and CD are never checked.
pub(super) fn cr0_fixed(caps: &Caps, cr0: u64, waived: u64) -> bool {
    let free = CR0_NW | CR0_CD;
    let must = caps.cr0_fixed0 & !(free | waived);
    cr0 & must == must && cr0 & !(caps.cr0_fixed1 | free) == 0
}

pub(super) fn cr4_fixed(caps: &Caps, cr4: u64) -> bool {
    cr4 & caps.cr4_fixed0 == caps.cr4_fixed0 && cr4 & !caps.cr4_fixed1 == 0
}

/// Each byte is a memory type: UC 0, WC 1, WT 4, WP 5, WB 6, UC- 7.
pub(super) fn pat(value: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

/// S_CET: bits 9:6 are reserved, SUPPRESS (10) and TRACKER (11) exclude each other.
pub(super) fn s_cet(value: u64) -> bool {
    value & 0x3c0 == 0 && value & 0xc00 != 0xc00
}

/// The seven FRED MSRs that are checked, in the order CONFIG, RSP1..RSP3, SSP1..SSP3.
pub(super) fn fred(entry: &EntryCtx, fields: [Field; 7]) -> bool {
    const RESERVED: [u64; 7] = [0x834, 0x3f, 0x3f, 0x3f, 7, 7, 7];
    fields.iter().zip(RESERVED).all(|(&field, reserved)| {
        let value = entry.get(field);
        value & reserved == 0 && entry.canonical(value)
    })
}
