//! Memory as an instruction sees it: segments, linear addresses, page crossings, devices.

use crate::bus::{Bus, Tick};
use crate::paging::{self, Access, Miss, Privilege};
use crate::ram::Ram;
use crate::tlb::{Kind, Stores};
use crate::trap::{Exec, Fault, Trap};
use crate::vcpu::{Seg, Vcpu, cr, rights};
use crate::vmx::apic as virtual_apic;
use crate::vmx::exit::Exit;

/// All that executing an instruction needs.
pub(crate) struct Ctx<'a> {
    pub cpu: &'a mut Vcpu,
    pub ram: &'a mut Ram,
    pub bus: &'a mut dyn Bus,
    /// Ticks before this instruction.
    pub now: Tick,
}

/// Whether bits 63:47 are all equal.
pub(crate) fn canonical(linear: u64) -> bool {
    ((linear << 16) as i64 >> 16) as u64 == linear
}

impl Ctx<'_> {
    // ---- segments ----

    /// The linear address of `size` bytes at `offset` in `seg`, after the checks of the mode
    /// (Vol. 3A, "Limit Checking", "Type Checking", "Canonical Addressing").
    pub fn linear(&self, seg: Seg, offset: u64, size: u64, access: Access) -> Exec<u64> {
        let fault = || {
            Trap::Fault(if seg == Seg::Ss {
                Fault::Stack(0)
            } else {
                Fault::GeneralProtection(0)
            })
        };
        let segment = self.cpu.seg(seg);
        if self.cpu.is_64() {
            let base = if matches!(seg, Seg::Fs | Seg::Gs) {
                segment.base
            } else {
                0
            };
            let linear = base.wrapping_add(offset);
            let last = linear.wrapping_add(size - 1);
            return if canonical(linear) && canonical(last) {
                Ok(linear)
            } else {
                Err(fault())
            };
        }
        let kind = segment.rights;
        if kind & rights::UNUSABLE != 0 {
            return Err(fault());
        }
        if self.cpu.protected() {
            let allowed = match access {
                Access::Write => kind & (rights::CODE | rights::WRITABLE) == rights::WRITABLE,
                Access::Read => kind & rights::CODE == 0 || kind & rights::WRITABLE != 0,
                Access::Execute => true,
            };
            if !allowed {
                return Err(fault());
            }
        }
        let last = offset + (size - 1);
        let limit = u64::from(segment.limit);
        let inside = if kind & (rights::CODE | rights::DOWN) == rights::DOWN {
            let top = if kind & rights::BIG != 0 {
                0xffff_ffff
            } else {
                0xffff
            };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if !inside {
            return Err(fault());
        }
        Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    // ---- translation ----

    /// What a translation that there is not does to the instruction.
    pub fn missed(&mut self, miss: Miss) -> Trap {
        match miss {
            Miss::Fault(fault) => Trap::Fault(fault),
            Miss::Exit(exit) => match crate::vmx::ve::convert(self, &exit) {
                Some(trap) => trap,
                None => {
                    let next_rip = Some(self.cpu.rip);
                    crate::vmx::exit::leave(self.cpu, Exit { next_rip, ..exit })
                }
            },
        }
    }

    fn privilege(&self) -> Privilege {
        if self.cpu.cpl == 3 {
            Privilege::User
        } else {
            Privilege::Supervisor
        }
    }

    /// Guest-physical address of one byte, walking and filling the TLB where needed.
    pub fn translate(&mut self, linear: u64, access: Access, privilege: Privilege) -> Exec<u64> {
        // Linear addresses have 32 bits outside 64-bit mode; a crossing access may have wrapped.
        let linear = if self.cpu.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        };
        let mut marks = self.cpu.vmx.marks();
        let walked = paging::walk(self.cpu, self.ram, linear, access, privilege, &mut marks);
        self.cpu.vmx.marked(&marks);
        if self.ram.code_was_written() {
            // Accessed and dirty flags, in tables that are code too.
            self.cpu.leave_block = true;
        }
        let mapping = walked.map_err(|miss| {
            // Whatever was cached for the page is forgotten, with all kinds of access.
            self.cpu.tlb.forget_page(linear);
            self.missed(miss)
        })?;
        let physical = mapping.physical | linear & 0xfff;
        let page_in_ram = self.ram.offset(physical & !0xfff);
        let special =
            self.is_apic_page(physical) || virtual_apic::is_access_page(self.cpu, physical);
        if let Some(offset) = page_in_ram.filter(|_| !special) {
            // Implicit accesses are cached as supervisor ones only where SMAP cannot tell them apart.
            let kind = match privilege {
                Privilege::User => Kind::User,
                Privilege::Implicit => Kind::Supervisor,
                Privilege::Supervisor => {
                    if self.cpu.cpl == 3 {
                        Kind::Supervisor
                    } else {
                        self.cpu.access_kind()
                    }
                }
            };
            let key = self.cpu.tlb.key(kind);
            let stores = match mapping.writable {
                false => Stores::Walk,
                true if self.ram.notes_stores(offset) => Stores::Noted,
                true => Stores::Free,
            };
            let others = [mapping.readable, mapping.executable];
            let span = mapping.span;
            let rip = self.linear_rip();
            let code = [rip, rip.wrapping_sub(1)];
            let code_key = self.cpu.tlb_key;
            self.cpu.tlb.spare_code(linear, key, code, code_key);
            self.cpu.tlb.fill(linear, key, offset, span, others, stores);
        }
        Ok(physical)
    }

    /// Physical addresses of the (at most two) pages of an access, or its fault. Nothing is
    /// accessed before both are known to be allowed.
    fn pages(&mut self, linear: u64, size: u64, access: Access, who: Privilege) -> Exec<[u64; 2]> {
        let first = self.translate(linear, access, who)?;
        let last = linear.wrapping_add(size - 1);
        let second = if (linear ^ last) & !0xfff != 0 {
            self.translate(last & !0xfff, access, who)?
        } else {
            0
        };
        Ok([first, second])
    }

    // ---- loads and stores ----

    /// Loads `N` bytes at a linear address that `linear()` gave.
    #[inline]
    pub fn load<const N: usize>(&mut self, linear: u64) -> Exec<[u8; N]> {
        if self.cpu.careful {
            self.check_data(linear, N as u64, Access::Read)?;
        }
        if let Some(offset) = self.cpu.tlb.read_offset(linear, N as u64, self.cpu.tlb_key) {
            return Ok(self.ram.get(offset));
        }
        self.load_slow(linear, self.privilege())
    }

    /// Stores `N` bytes at a linear address that `linear()` gave. On a fault nothing is stored.
    #[inline]
    pub fn store<const N: usize>(&mut self, linear: u64, value: [u8; N]) -> Exec {
        if self.cpu.careful {
            self.check_data(linear, N as u64, Access::Write)?;
        }
        if let Some(offset) = self
            .cpu
            .tlb
            .write_offset(linear, N as u64, self.cpu.tlb_key)
        {
            self.ram.put(offset, value);
            return Ok(());
        }
        let key = self.cpu.tlb_key;
        if self.store_noted(linear, key, &value) {
            return Ok(());
        }
        self.store_slow(linear, value, self.privilege())
    }

    /// Loads from a descriptor table or TSS, with supervisor rights whatever the CPL.
    pub fn load_system<const N: usize>(&mut self, linear: u64) -> Exec<[u8; N]> {
        // Nothing is cached as supervisor that an implicit access may not touch.
        let key = self.cpu.tlb.key(Kind::Supervisor);
        if let Some(offset) = self.cpu.tlb.read_offset(linear, N as u64, key) {
            return Ok(self.ram.get(offset));
        }
        self.load_slow(linear, Privilege::Implicit)
    }

    /// Stores to a descriptor table or TSS, or pushes on the stack of an exception handler before
    /// CPL has changed, with supervisor rights.
    pub fn store_system<const N: usize>(&mut self, linear: u64, value: [u8; N]) -> Exec {
        let key = self.cpu.tlb.key(Kind::Supervisor);
        if let Some(offset) = self.cpu.tlb.write_offset(linear, N as u64, key) {
            self.ram.put(offset, value);
            return Ok(());
        }
        if self.store_noted(linear, key, &value) {
            return Ok(());
        }
        self.store_slow(linear, value, Privilege::Implicit)
    }

    /// A store to a page of RAM that the TLB has, but for which stores must be noted. False: it is none.
    fn store_noted(&mut self, linear: u64, key: u64, value: &[u8]) -> bool {
        let Some(offset) = self.cpu.tlb.noted_offset(linear, value.len() as u64, key) else {
            return false;
        };
        self.ram.note_write(offset, value.len());
        self.ram.raw_mut()[offset..offset + value.len()].copy_from_slice(value);
        if self.ram.code_was_written() {
            self.cpu.leave_block = true;
        }
        if !self.ram.notes_stores(offset) {
            self.cpu.tlb.release(linear, key);
        }
        true
    }

    /// Checks that `size` bytes may be written: the fault of a read-modify-write comes before its load.
    pub fn probe_write(&mut self, linear: u64, size: u64) -> Exec {
        if self.cpu.careful {
            self.check_data(linear, size, Access::Write)?;
        }
        if self
            .cpu
            .tlb
            .write_offset(linear, size, self.cpu.tlb_key)
            .or_else(|| self.cpu.tlb.noted_offset(linear, size, self.cpu.tlb_key))
            .is_some()
        {
            return Ok(());
        }
        let pages = self.pages(linear, size, Access::Write, self.privilege())?;
        virtual_apic::data(self, linear, size, pages, Access::Write).map(|_| ())
    }

    #[cold]
    fn load_slow<const N: usize>(&mut self, linear: u64, who: Privilege) -> Exec<[u8; N]> {
        let size = N as u64;
        let pages = self.pages(linear, size, Access::Read, who)?;
        let mut value = [0; N];
        if let Some(at) = virtual_apic::data(self, linear, size, pages, Access::Read)? {
            self.load_physical(at, &mut value);
            return Ok(value);
        }
        let in_first = (0x1000 - (linear & 0xfff) as usize).min(N);
        let (first, second) = value.split_at_mut(in_first);
        self.load_physical(pages[0], first);
        if !second.is_empty() {
            self.load_physical(pages[1], second);
        }
        Ok(value)
    }

    #[cold]
    fn store_slow<const N: usize>(&mut self, linear: u64, value: [u8; N], who: Privilege) -> Exec {
        let size = N as u64;
        let pages = self.pages(linear, size, Access::Write, who)?;
        if let Some(at) = virtual_apic::data(self, linear, size, pages, Access::Write)? {
            self.store_physical(at, &value);
            virtual_apic::stored(self, at, size);
            return Ok(());
        }
        let in_first = (0x1000 - (linear & 0xfff) as usize).min(N);
        let (first, second) = value.split_at(in_first);
        self.store_physical(pages[0], first);
        if !second.is_empty() {
            self.store_physical(pages[1], second);
        }
        Ok(())
    }

    fn is_apic_page(&self, physical: u64) -> bool {
        self.cpu.apic.xapic_page() == Some(physical & !0xfff)
    }

    /// Loads within one page.
    pub fn load_physical(&mut self, physical: u64, into: &mut [u8]) {
        if !self.is_apic_page(physical) && self.ram.read(physical, into).is_ok() {
            return;
        }
        for (at, width) in pieces(physical, into.len()) {
            let value = if self.is_apic_page(physical) {
                crate::apic::load(self, at & 0xfff, width)
            } else {
                self.bus.mmio_read(self.ram, self.now, at, width as u8)
            };
            let from = at.wrapping_sub(physical) as usize;
            into[from..from + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        self.cpu.touched_outside();
    }

    /// Stores within one page.
    pub fn store_physical(&mut self, physical: u64, from: &[u8]) {
        if !self.is_apic_page(physical) && self.ram.write(physical, from).is_ok() {
            if self.ram.code_was_written() {
                self.cpu.leave_block = true;
            }
            return;
        }
        for (at, width) in pieces(physical, from.len()) {
            let start = at.wrapping_sub(physical) as usize;
            let mut bytes = [0; 8];
            bytes[..width].copy_from_slice(&from[start..start + width]);
            let value = u64::from_le_bytes(bytes);
            if self.is_apic_page(physical) {
                crate::apic::store(self, at & 0xfff, width, value);
            } else {
                self.bus
                    .mmio_write(self.ram, self.now, at, width as u8, value);
            }
        }
        self.cpu.touched_outside();
    }

    // ---- the careful path ----

    /// Whether a data access may trap or fault for what it touches: breakpoints, alignment.
    pub fn watches_data(&self) -> bool {
        self.cpu.careful && (self.cpu.dr7 & 0xff != 0 || self.cpu.cpl == 3)
    }

    /// Alignment checks (Vol. 3A, "Alignment Requirements by Data Type") and data breakpoints, when
    /// any are armed.
    #[cold]
    pub fn check_data(&mut self, linear: u64, size: u64, access: Access) -> Exec {
        let aligned_to = match size {
            10 => 8,
            // x87 environments and states, short and long.
            14 | 94 => 2,
            28 | 108 => 4,
            _ => size,
        };
        if self.cpu.cpl == 3
            && self.cpu.cr0 & cr::CR0_AM != 0
            && self.cpu.flags.rest & crate::flags::bit::AC != 0
            && matches!(aligned_to, 2 | 4 | 8 | 16)
            && linear & (aligned_to - 1) != 0
        {
            return Err(Fault::Alignment.into());
        }
        self.cpu
            .match_data_breakpoints(linear, size, access == Access::Write);
        Ok(())
    }

    // ---- code ----

    /// RAM offset and guest-physical address of the instruction byte at `linear`. The offset is
    /// `None` where code is not in RAM.
    pub fn code_at(&mut self, linear: u64) -> Exec<(Option<usize>, u64)> {
        let (tlb, key) = (&self.cpu.tlb, self.cpu.tlb_key);
        let cached = tlb.execute_offset(linear, key);
        if let Some(offset) = cached.or_else(|| tlb.spared_offset(linear, key)) {
            return Ok((Some(offset), 0));
        }
        let physical = self.translate(linear, Access::Execute, self.privilege())?;
        virtual_apic::fetch(self, physical)?;
        let offset = if self.is_apic_page(physical) {
            None
        } else {
            self.ram.offset(physical)
        };
        Ok((offset, physical))
    }
}

impl Vcpu {
    /// Notes data breakpoints (DR7 type 01 or 11) that an access touches, to trap after the
    /// instruction (Vol. 3B, "Debug Registers").
    pub fn match_data_breakpoints(&mut self, linear: u64, size: u64, write: bool) {
        if self.dr7 & 0xff == 0 {
            return;
        }
        for n in 0..4 {
            let kind = self.dr7 >> (16 + 4 * n) & 3;
            let length = match self.dr7 >> (18 + 4 * n) & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            if !(kind == 3 || kind == 1 && write) {
                continue;
            }
            let start = self.dr[n] & !(length - 1);
            let touches = linear < start.wrapping_add(length) && start < linear.wrapping_add(size);
            // DR6 reports a match even of a disabled one; only an enabled one traps.
            if touches && self.dr7 >> (2 * n) & 3 != 0 {
                self.pending_debug |= 1 << n;
            }
        }
    }
}

/// Splits a device access into naturally sized pieces of at most 8 bytes.
fn pieces(mut at: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let end = at.wrapping_add(len as u64);
    core::iter::from_fn(move || {
        let left = end.wrapping_sub(at) as usize;
        if left == 0 {
            return None;
        }
        let width = match left {
            8.. => 8,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let piece = (at, width);
        at = at.wrapping_add(width as u64);
        Some(piece)
    })
}
