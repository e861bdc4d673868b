//! The software TLB: direct-mapped, separate tags for read, write and execute.
//!
//! A tag is the linear page number with a key in its low 12 bits: which address space (a small
//! number handed out per PCID) and which kind of access. An address space is invalidated by
//! giving it a new number. The key moves the slot too, so that address spaces do not crowd out each
//! other; what must find every copy of a page looks through all slots.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::ram::Ram;
use crate::vmx::Controls;

/// Whose permissions a cached translation was checked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// CPL below 3 with SMAP in force, implicit accesses, and everything while SMAP is off.
    Supervisor,
    /// CPL below 3 with SMAP suspended by EFLAGS.AC.
    SupervisorAc,
    /// CPL 3.
    User,
}

/// One cached translation. `repr(C)`: translated code will read it. Aligned, so that none lies across
/// two cache lines.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Entry {
    pub read: u64,
    /// Only once D is set, and while no store to the page need be noted.
    pub write: u64,
    pub execute: u64,
    /// Offset in RAM of the page, less its linear address: add the linear address of a byte.
    pub addend: u64,
}

/// Matches no tag: the key part is larger than any key.
const NEVER: u64 = u64::MAX;
const EMPTY: Entry = Entry {
    read: NEVER,
    write: NEVER,
    execute: NEVER,
    addend: 0,
};

/// In a span: the entry would have its write tag, were stores to its page not to be noted. What is
/// writable is readable too, so that the read tag says whose it is.
const WITHHELD: u64 = 1;

/// How far stores to a page are allowed by a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stores {
    /// They walk anew.
    Walk,
    /// They are allowed, and must be noted.
    Noted,
    /// They are allowed.
    Free,
}

const SLOTS: usize = 4096;
const SPACES: u64 = 1 << 10;

/// An address space of a guest (Vol. 3C, "Creating and Using Cached Translation Information").
#[derive(Clone, Copy, PartialEq, Eq)]
struct Context {
    guest: Guest,
    pcid: u16,
    space: u64,
}

/// What translations of a guest depend on, beside its PCID.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Guest {
    vpid: u16,
    /// All ones without EPT.
    eptp: u64,
    /// The APIC-access page, of which nothing is cached.
    apic_access: Option<u64>,
}

/// A translation for execution that outlives its entry. Within a page blocks follow each other without a
/// look at the TLB, and single steps do not: whether its entry is still there must not matter.
#[derive(Clone, Copy)]
struct Spared {
    tag: u64,
    addend: u64,
    span: u64,
}

const NOTHING_SPARED: Spared = Spared {
    tag: NEVER,
    addend: 0,
    span: 0,
};

/// Most address spaces of guests that are remembered.
const CONTEXTS: usize = 64;
/// Stands for the EPT pointer of a guest without EPT.
const NO_EPT: u64 = !0;
/// EPT pointers that agree here share translations.
const EPT_ROOT: u64 = 0x000f_ffff_ffff_f000;

/// The TLB of one vCPU.
pub(crate) struct Tlb {
    entries: Box<[Entry; SLOTS]>,
    /// Bits of the linear address that name the page of each entry: !0 << 12, 21, 22 or 30. With them
    /// [`WITHHELD`].
    spans: Box<[u64; SLOTS]>,
    /// Number of the address space of each PCID; 0 where it has none yet.
    spaces: Box<[u16]>,
    /// The current one.
    space: u64,
    /// Last number handed out.
    last: u64,
    pcid: u16,
    /// The guest that executes; `None` outside VMX non-root operation.
    guest: Option<Guest>,
    /// Address spaces of guests. Bounded: when full, all are forgotten.
    contexts: Vec<Context>,
    /// Translation of the page that is executed, where data have taken its entry.
    spared: Spared,
    /// Value of `Ram::noting_epoch` when write tags were last compared with what RAM wants noted.
    noting_epoch: u64,
}

#[inline(always)]
fn slot(page: u64, key: u64) -> usize {
    (page >> 12 ^ key) as usize & (SLOTS - 1)
}

impl Tlb {
    pub fn new() -> Tlb {
        let mut spaces = vec![0u16; 4096].into_boxed_slice();
        spaces[0] = 1;
        Tlb {
            entries: Box::new([EMPTY; SLOTS]),
            spans: Box::new([!0 << 12; SLOTS]),
            spaces,
            space: 1,
            last: 1,
            pcid: 0,
            guest: None,
            contexts: Vec::with_capacity(CONTEXTS),
            spared: NOTHING_SPARED,
            noting_epoch: 0,
        }
    }

    /// Key of ordinary accesses of this kind in the current address space.
    pub fn key(&self, kind: Kind) -> u64 {
        self.space << 2 | kind as u64
    }

    /// The entry where `linear` would be.
    #[inline(always)]
    pub fn entry(&self, linear: u64, key: u64) -> &Entry {
        &self.entries[slot(linear, key)]
    }

    /// The RAM offset of `size` bytes at `linear` for reading, where cached and within one page.
    #[inline(always)]
    pub fn read_offset(&self, linear: u64, size: u64, key: u64) -> Option<usize> {
        let entry = self.entry(linear, key);
        // The last byte's page is compared: an access that crosses pages cannot match.
        (entry.read == (linear.wrapping_add(size - 1) & !0xfff | key))
            .then(|| linear.wrapping_add(entry.addend) as usize)
    }

    /// As `read_offset`, for writing.
    #[inline(always)]
    pub fn write_offset(&self, linear: u64, size: u64, key: u64) -> Option<usize> {
        let entry = self.entry(linear, key);
        (entry.write == (linear.wrapping_add(size - 1) & !0xfff | key))
            .then(|| linear.wrapping_add(entry.addend) as usize)
    }

    /// As `write_offset`, for a page whose stores must be noted: the walk that is cached allowed them.
    pub fn noted_offset(&self, linear: u64, size: u64, key: u64) -> Option<usize> {
        let withheld = self.spans[slot(linear, key)] & WITHHELD != 0;
        self.read_offset(linear, size, key).filter(|_| withheld)
    }

    /// Stores to the page of `linear`, which `noted_offset` knows, need not be noted any more.
    pub fn release(&mut self, linear: u64, key: u64) {
        let slot = slot(linear, key);
        self.entries[slot].write = self.entries[slot].read;
        self.spans[slot] &= !WITHHELD;
    }

    /// As `read_offset`, for one byte of code.
    #[inline(always)]
    pub fn execute_offset(&self, linear: u64, key: u64) -> Option<usize> {
        let entry = self.entry(linear, key);
        (entry.execute == (linear & !0xfff | key))
            .then(|| linear.wrapping_add(entry.addend) as usize)
    }

    /// As `execute_offset`, of the page that is executed where data have taken its entry.
    pub fn spared_offset(&self, linear: u64, key: u64) -> Option<usize> {
        (self.spared.tag == (linear & !0xfff | key))
            .then(|| linear.wrapping_add(self.spared.addend) as usize)
    }

    /// The entry of `linear` is about to be filled: keeps that of the page that is executed, of which
    /// `code` are two addresses, with the current key.
    pub fn spare_code(&mut self, linear: u64, key: u64, code: [u64; 2], code_key: u64) {
        let slot = slot(linear, key);
        let Entry {
            execute, addend, ..
        } = self.entries[slot];
        if execute != NEVER && code.map(|at| at & !0xfff | code_key).contains(&execute) {
            self.spared = Spared {
                tag: execute,
                addend,
                span: self.spans[slot],
            };
        }
    }

    /// Caches a translation of the page of `linear` to the RAM page at `offset`: what of reads and fetches
    /// it allows, and of stores. Tags already there for the same page are kept.
    pub fn fill(
        &mut self,
        linear: u64,
        key: u64,
        offset: usize,
        span: u64,
        [read, execute]: [bool; 2],
        stores: Stores,
    ) {
        let page = linear & !0xfff;
        let tag = page | key;
        let slot = slot(page, key);
        let entry = &mut self.entries[slot];
        let addend = (offset as u64 & !0xfff).wrapping_sub(page);
        let same = entry.addend == addend && (entry.read == tag || entry.execute == tag);
        if !same {
            *entry = Entry { addend, ..EMPTY };
            self.spans[slot] = span;
        }
        if read {
            entry.read = tag;
        }
        match stores {
            Stores::Walk => {}
            Stores::Noted => {
                entry.write = NEVER;
                self.spans[slot] |= WITHHELD;
            }
            Stores::Free => {
                entry.write = tag;
                self.spans[slot] &= !WITHHELD;
            }
        }
        if execute {
            entry.execute = tag;
        }
    }

    /// Forgets everything in every address space.
    pub fn flush_all(&mut self) {
        self.entries.fill(EMPTY);
        self.spared = NOTHING_SPARED;
        self.spaces.fill(0);
        self.contexts.clear();
        self.last = 1;
        self.space = 1;
        self.note_space();
    }

    fn fresh(&mut self) -> u64 {
        if self.last + 1 >= SPACES - 1 {
            self.flush_all();
        }
        self.last += 1;
        self.last
    }

    /// Makes `pcid` current; what was cached for it survives only where `keep`.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        self.pcid = pcid & 0xfff;
        let known = self.known_space(self.pcid);
        if keep && known != 0 {
            self.space = known;
        } else {
            self.space = self.fresh();
            self.note_space();
        }
    }

    /// Number of the address space of a PCID of the running guest, or outside one; 0 for none.
    fn known_space(&self, pcid: u16) -> u64 {
        let Some(guest) = self.guest else {
            return u64::from(self.spaces[pcid as usize]);
        };
        let wanted = |c: &&Context| (c.guest, c.pcid) == (guest, pcid);
        self.contexts.iter().find(wanted).map_or(0, |c| c.space)
    }

    /// Remembers that the current space is that of the current PCID.
    fn note_space(&mut self) {
        let (pcid, space) = (self.pcid, self.space);
        let Some(guest) = self.guest else {
            self.spaces[pcid as usize] = space as u16;
            return;
        };
        self.contexts.retain(|c| (c.guest, c.pcid) != (guest, pcid));
        if self.contexts.len() == CONTEXTS {
            self.contexts.clear();
        }
        self.contexts.push(Context { guest, pcid, space });
    }

    /// VM entry. Without a VPID nothing cached before it may be used in the guest or after it.
    pub fn enter_guest(&mut self, controls: &Controls, pcid: u16) {
        let guest = Guest {
            vpid: controls.vpid,
            eptp: controls.eptp.unwrap_or(NO_EPT),
            apic_access: controls.apic_access,
        };
        self.guest = Some(guest);
        if guest.vpid == 0 {
            self.spaces.fill(0);
            self.forget_vpid(0);
        }
        self.switch(pcid, guest.vpid != 0);
    }

    /// EPTP switching: the guest that executes goes on with another EPT pointer, and what was cached
    /// under it.
    pub fn switch_ept(&mut self, eptp: u64, pcid: u16) {
        if let Some(guest) = self.guest {
            self.guest = Some(Guest { eptp, ..guest });
            self.switch(pcid, true);
        }
    }

    /// VM exit. `keep`: the guest had a VPID.
    pub fn enter_host(&mut self, pcid: u16, keep: bool) {
        self.guest = None;
        if !keep {
            self.spaces.fill(0);
            self.forget_vpid(0);
        }
        self.switch(pcid, keep);
    }

    /// INVEPT, single-context.
    pub fn forget_eptp(&mut self, eptp: u64) {
        self.contexts
            .retain(|c| c.guest.eptp == NO_EPT || (c.guest.eptp ^ eptp) & EPT_ROOT != 0);
    }

    /// INVVPID, single-context.
    pub fn forget_vpid(&mut self, vpid: u16) {
        self.contexts.retain(|c| c.guest.vpid != vpid);
    }

    /// INVEPT and INVVPID of everything.
    pub fn flush_guests(&mut self) {
        self.contexts.clear();
    }

    /// Forgets the translations of one PCID (global ones included, which is allowed).
    /// The caller refreshes the vCPU's key.
    pub fn flush_pcid(&mut self, pcid: u16) {
        if pcid & 0xfff == self.pcid {
            self.switch(pcid, false);
        } else if let Some(guest) = self.guest {
            self.contexts
                .retain(|c| (c.guest, c.pcid) != (guest, pcid & 0xfff));
        } else {
            self.spaces[(pcid & 0xfff) as usize] = 0;
        }
    }

    /// INVLPG: forgets whatever maps `linear`, in every address space, with all parts of a large page.
    pub fn flush_page(&mut self, linear: u64) {
        let Spared { tag, span, .. } = self.spared;
        if (tag ^ linear) & span & !0xfff == 0 {
            self.spared = NOTHING_SPARED;
        }
        for (entry, span) in self.entries.iter_mut().zip(self.spans.iter()) {
            let tag = [entry.read, entry.write, entry.execute]
                .into_iter()
                .find(|tag| *tag != NEVER);
            if tag.is_some_and(|tag| (tag ^ linear) & span & !0xfff == 0) {
                *entry = EMPTY;
            }
        }
    }

    /// A fault at `linear`: forgets what the current address space has cached for its page (Vol. 3A,
    /// "Operations that Invalidate TLBs and Paging-Structure Caches", page faults; Vol. 3C, "Operations
    /// that Invalidate Cached Mappings", EPT violations).
    pub fn forget_page(&mut self, linear: u64) {
        let page = linear & !0xfff;
        for kind in [Kind::Supervisor, Kind::SupervisorAc, Kind::User] {
            let key = self.key(kind);
            if self.spared.tag == page | key {
                self.spared = NOTHING_SPARED;
            }
            let entry = &mut self.entries[slot(page, key)];
            if [entry.read, entry.write, entry.execute].contains(&(page | key)) {
                *entry = EMPTY;
            }
        }
    }

    /// Withholds write tags of pages whose stores must be noted since the last call. The translations
    /// stay: a store that is noted does not walk, so that the guest cannot tell.
    pub fn withhold(&mut self, ram: &Ram) {
        if self.noting_epoch == ram.noting_epoch() {
            return;
        }
        self.noting_epoch = ram.noting_epoch();
        for (entry, span) in self.entries.iter_mut().zip(self.spans.iter_mut()) {
            let offset = (entry.write & !0xfff).wrapping_add(entry.addend) as usize;
            if entry.write != NEVER && ram.notes_stores(offset) {
                entry.write = NEVER;
                *span |= WITHHELD;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const R: [bool; 2] = [true, false];

    #[test]
    fn an_access_across_pages_never_matches() {
        let mut tlb = Tlb::new();
        let key = tlb.key(Kind::User);
        tlb.fill(0x5000, key, 0x9000, !0 << 12, R, Stores::Free);
        assert_eq!(tlb.read_offset(0x5ff8, 8, key), Some(0x9ff8));
        assert_eq!(tlb.read_offset(0x5ff9, 8, key), None);
        assert_eq!(tlb.execute_offset(0x5000, key), None);
        assert_eq!(tlb.read_offset(0x5000, 8, tlb.key(Kind::Supervisor)), None);
    }

    #[test]
    fn a_switch_that_keeps_brings_translations_back() {
        let mut tlb = Tlb::new();
        tlb.switch(5, false);
        let five = tlb.key(Kind::User);
        tlb.fill(0x5000, five, 0x9000, !0 << 12, R, Stores::Free);
        tlb.switch(6, false);
        assert_eq!(tlb.read_offset(0x5000, 1, tlb.key(Kind::User)), None);
        tlb.switch(5, true);
        assert_eq!(
            tlb.read_offset(0x5000, 1, tlb.key(Kind::User)),
            Some(0x9000)
        );
        tlb.switch(5, false);
        assert_eq!(tlb.read_offset(0x5000, 1, tlb.key(Kind::User)), None);
    }

    #[test]
    fn invlpg_drops_every_part_of_a_large_page() {
        let mut tlb = Tlb::new();
        let key = tlb.key(Kind::Supervisor);
        tlb.fill(0x20_3000, key, 0x9000, !0 << 21, R, Stores::Free);
        tlb.fill(0x40_3000, key, 0xa000, !0 << 21, R, Stores::Free);
        tlb.flush_page(0x3f_f000);
        assert_eq!(tlb.read_offset(0x20_3000, 1, key), None);
        assert_eq!(tlb.read_offset(0x40_3000, 1, key), Some(0xa000));
    }

    #[test]
    fn the_page_that_is_executed_is_not_lost_to_data() {
        let mut tlb = Tlb::new();
        let key = tlb.key(Kind::Supervisor);
        let (code, data) = (0x5000, 0x5000 + ((SLOTS as u64) << 12));
        let replace = |tlb: &mut Tlb, rip: u64| {
            tlb.fill(code, key, 0x9000, !0 << 12, [true, true], Stores::Free);
            tlb.spare_code(data, key, [rip, rip - 1], key);
            tlb.fill(data, key, 0xa000, !0 << 12, R, Stores::Free);
            assert_eq!(tlb.execute_offset(code, key), None);
            tlb.spared_offset(code + 7, key)
        };
        assert_eq!(replace(&mut tlb, 0x4100), None);
        assert_eq!(replace(&mut tlb, 0x6000), Some(0x9007));
        let forget: [fn(&mut Tlb); 3] = [
            |tlb| tlb.flush_page(0x5fff),
            |tlb| tlb.forget_page(0x5123),
            Tlb::flush_all,
        ];
        for forget in forget {
            assert_eq!(replace(&mut tlb, 0x5010), Some(0x9007));
            tlb.flush_page(0x4000);
            assert_eq!(tlb.spared_offset(code, key), Some(0x9000));
            forget(&mut tlb);
            assert_eq!(tlb.spared_offset(code, key), None);
        }
    }

    #[test]
    fn running_out_of_address_spaces_flushes() {
        let mut tlb = Tlb::new();
        for n in 0..5000u64 {
            tlb.switch((n % 4096) as u16, false);
            let key = tlb.key(Kind::User);
            assert!(key < 0xfff);
            assert_eq!(tlb.read_offset(0x7000, 1, key), None);
            tlb.fill(0x7000, key, 0x1000, !0 << 12, R, Stores::Free);
        }
    }
}
