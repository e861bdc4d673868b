//! Guest RAM: one host allocation seen at two guest-physical ranges around the PCI hole.
//!
//! All writers go through this type, so that code caches learn of every change: a store into a
//! granule that holds decoded code is recorded and the processor drops the blocks before it
//! executes another instruction.
#![expect(
    unsafe_code,
    reason = "zeroed allocation that the host commits page by page; bounds are checked once per TLB fill"
)]

use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use alloc::vec::Vec;
use core::ptr::NonNull;

use crate::undo::{PAGE, Undo};

/// Bytes of a small page.
pub const PAGE_SIZE: u64 = 4096;

/// Granules per page in the code map: one bit stands for 64 bytes.
const GRANULE_SHIFT: u32 = 6;

/// RAM cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// Not a positive multiple of 4 KiB.
    #[error("memory size {0} is not a positive multiple of 4096 bytes")]
    Size(u64),
    /// The host cannot give that much.
    #[error("the host cannot provide {0} bytes of guest memory")]
    Host(u64),
}

/// A guest-physical range is not all RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest-physical range {address:#x}+{len:#x} is not all RAM")]
pub struct OutOfRam {
    /// First byte asked for.
    pub address: u64,
    /// Bytes asked for.
    pub len: u64,
}

/// Guest RAM. Sizes above 3 GiB continue at 4 GiB.
pub struct Ram {
    /// What the allocator gave; `base` is the first page boundary in it.
    allocation: NonNull<u8>,
    base: NonNull<u8>,
    size: usize,
    /// Per RAM page: which 64-byte granules hold decoded code.
    code: Vec<u64>,
    /// RAM pages (by offset >> 12) whose code was written since the last [`Ram::take_code_writes`].
    code_writes: Vec<u32>,
    /// While writes are tracked: a bit per RAM page, set once the page was written.
    dirty: Option<Vec<u64>>,
    /// While there is a mark to go back to: what pages held at it. Writes are tracked then.
    undo: Option<Undo>,
    /// Grows whenever stores to a page must be noted that need not be before: it gets decoded code,
    /// or counts as unwritten again.
    noting_epoch: u64,
}

// SAFETY: `Ram` owns its allocation and hands out access only through `&self` and `&mut self`.
unsafe impl Send for Ram {}

impl Ram {
    /// First address of the PCI hole.
    pub const HOLE_START: u64 = 0xc000_0000;
    /// First address above the PCI hole.
    pub const HOLE_END: u64 = 0x1_0000_0000;

    /// Zeroed RAM of `size` bytes, a positive multiple of 4096.
    pub fn new(size: u64) -> Result<Ram, RamError> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(RamError::Size(size));
        }
        let bytes = usize::try_from(size).map_err(|_| RamError::Host(size))?;
        let layout = Self::layout(bytes).ok_or(RamError::Host(size))?;
        let pages = bytes / PAGE_SIZE as usize;
        let mut code = Vec::new();
        code.try_reserve_exact(pages)
            .map_err(|_| RamError::Host(size))?;
        code.resize(pages, 0);
        // SAFETY: the layout has a non-zero size.
        let allocation =
            NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(RamError::Host(size))?;
        let align = allocation.as_ptr().align_offset(PAGE_SIZE as usize);
        // SAFETY: `align` is less than a page; the allocation is two larger than `bytes`.
        let base = unsafe { allocation.add(align) };
        Ok(Ram {
            allocation,
            base,
            size: bytes,
            code,
            code_writes: Vec::new(),
            dirty: None,
            undo: None,
            noting_epoch: 0,
        })
    }

    /// Two pages more than asked for: one to align `base` (allocators give fresh zero pages, not yet
    /// backed by the host, only for small alignments), one after the end, so that a fast access
    /// compares its first byte alone.
    fn layout(bytes: usize) -> Option<Layout> {
        Layout::from_size_align(bytes.checked_add(2 * PAGE_SIZE as usize)?, 8).ok()
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// Bytes of RAM below the PCI hole.
    pub fn low_size(&self) -> u64 {
        self.size().min(Self::HOLE_START)
    }

    /// Bytes of RAM at and above 4 GiB.
    pub fn high_size(&self) -> u64 {
        self.size() - self.low_size()
    }

    /// The whole allocation, in the order low RAM, high RAM.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `base` is valid for `size` initialised bytes as long as `self` lives.
        unsafe { core::slice::from_raw_parts(self.base.as_ptr(), self.size) }
    }

    /// The whole allocation for a writer that knows no code is decoded from it (a loader before
    /// the first instruction, an engine that has no code cache). Every page counts as written then.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.mark_all_dirty();
        self.raw_mut()
    }

    /// The whole allocation for a writer that has dealt with the code map and the tracking of writes.
    pub(crate) fn raw_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.base.as_ptr(), self.size) }
    }

    /// Where `address` lies in [`Ram::bytes`], or `None` where there is no RAM.
    #[inline]
    pub fn offset(&self, address: u64) -> Option<usize> {
        if address < self.low_size() {
            Some(address as usize)
        } else if address >= Self::HOLE_END && address - Self::HOLE_END < self.high_size() {
            Some((address - Self::HOLE_END + Self::HOLE_START) as usize)
        } else {
            None
        }
    }

    fn range(&self, address: u64, len: u64) -> Result<usize, OutOfRam> {
        let error = OutOfRam { address, len };
        let offset = self.offset(address).ok_or(error)?;
        if len > 1 {
            let last = self
                .offset(address.checked_add(len - 1).ok_or(error)?)
                .ok_or(error)?;
            if last - offset != (len - 1) as usize || last < offset {
                return Err(error);
            }
        }
        Ok(offset)
    }

    /// Copies guest-physical memory out. All of it must be RAM.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), OutOfRam> {
        let offset = self.range(address, into.len() as u64)?;
        into.copy_from_slice(&self.bytes()[offset..offset + into.len()]);
        Ok(())
    }

    /// Copies into guest-physical memory. All of it must be RAM.
    pub fn write(&mut self, address: u64, from: &[u8]) -> Result<(), OutOfRam> {
        if from.is_empty() {
            return Ok(());
        }
        let offset = self.range(address, from.len() as u64)?;
        self.note_write(offset, from.len());
        self.raw_mut()[offset..offset + from.len()].copy_from_slice(from);
        Ok(())
    }

    /// Reads a little-endian value of `N` bytes.
    pub fn load<const N: usize>(&self, address: u64) -> Result<[u8; N], OutOfRam> {
        let mut bytes = [0; N];
        self.read(address, &mut bytes)?;
        Ok(bytes)
    }

    /// Base address of the allocation for an engine that maps it (KVM). It moves never and is
    /// aligned to a page.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    // ---- fast access by offset; offsets come from `offset` of the page at TLB fill ----

    /// `N` bytes at `offset` of [`Ram::bytes`]. Panics outside RAM.
    #[inline(always)]
    pub(crate) fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        debug_assert!(offset + N <= self.size);
        assert!(offset <= self.size);
        // SAFETY: the allocation goes on for at least a page after `size`, and `N` is less.
        unsafe {
            self.base
                .as_ptr()
                .add(offset)
                .cast::<[u8; N]>()
                .read_unaligned()
        }
    }

    /// Stores `N` bytes at `offset`. The caller has dealt with the code map. Panics outside RAM.
    #[inline(always)]
    pub(crate) fn put<const N: usize>(&mut self, offset: usize, value: [u8; N]) {
        debug_assert!(offset + N <= self.size);
        assert!(offset <= self.size);
        // SAFETY: as in `get`.
        unsafe {
            self.base
                .as_ptr()
                .add(offset)
                .cast::<[u8; N]>()
                .write_unaligned(value)
        }
    }

    // ---- code map ----

    fn granules(offset: usize, len: usize) -> u64 {
        let first = (offset & 0xfff) >> GRANULE_SHIFT;
        let last = ((offset & 0xfff) + len - 1).min(0xfff) >> GRANULE_SHIFT;
        (!0u64 << first) & (!0u64 >> (63 - last))
    }

    /// Marks `len` bytes at `offset`, within one page, as decoded code.
    pub(crate) fn mark_code(&mut self, offset: usize, len: usize) {
        let page = &mut self.code[offset >> 12];
        if *page == 0 {
            self.noting_epoch += 1;
        }
        *page |= Self::granules(offset, len);
    }

    /// Changes whenever there is a page more for which [`Ram::notes_stores`] holds.
    #[inline]
    pub(crate) fn noting_epoch(&self) -> u64 {
        self.noting_epoch
    }

    /// Whether stores to the page at `offset` must go through [`Ram::note_write`]: it holds decoded
    /// code, or its first write is to be tracked.
    #[inline]
    pub(crate) fn notes_stores(&self, offset: usize) -> bool {
        let page = offset >> 12;
        self.code[page] != 0
            || self
                .dirty
                .as_ref()
                .is_some_and(|dirty| dirty[page >> 6] >> (page & 63) & 1 == 0)
    }

    /// Records a store of `len` bytes at `offset`, before it is done. True when it touches decoded code.
    pub(crate) fn note_write(&mut self, mut offset: usize, mut len: usize) -> bool {
        let mut hit = false;
        while len > 0 {
            let in_page = len.min(PAGE_SIZE as usize - (offset & 0xfff));
            let page = offset >> 12;
            if self.code[page] & Self::granules(offset, in_page) != 0 {
                self.code[page] = 0;
                self.code_writes.push(page as u32);
                hit = true;
            }
            self.note_dirty(page);
            offset += in_page;
            len -= in_page;
        }
        hit
    }

    /// Whether code was written since the last [`Ram::take_code_writes`].
    #[inline]
    pub(crate) fn code_was_written(&self) -> bool {
        !self.code_writes.is_empty()
    }

    /// Pages (offset >> 12) whose decoded code was overwritten, in the order of the writes.
    pub(crate) fn take_code_writes(&mut self) -> Vec<u32> {
        core::mem::take(&mut self.code_writes)
    }

    /// Forgets all code marks: no block is cached any more.
    pub(crate) fn forget_code(&mut self) {
        self.code.fill(0);
        self.code_writes.clear();
    }

    // ---- which pages are written ----

    /// Begins or ends noting which pages are written, whoever writes them. No page counts as written
    /// at the beginning. Nothing in the guest can notice.
    ///
    /// # Errors
    /// The host has no memory for a bit per page; nothing has changed.
    pub fn track_dirty(&mut self, on: bool) -> Result<(), RamError> {
        if !on {
            self.dirty = None;
            return Ok(());
        }
        let words = (self.size / PAGE_SIZE as usize).div_ceil(64);
        let mut dirty = Vec::new();
        dirty
            .try_reserve_exact(words)
            .map_err(|_| RamError::Host(self.size()))?;
        dirty.resize(words, 0);
        self.dirty = Some(dirty);
        self.noting_epoch += 1;
        Ok(())
    }

    /// Whether writes are tracked.
    pub fn tracks_dirty(&self) -> bool {
        self.dirty.is_some()
    }

    /// Calls `each` with the number of every page (offset in [`Ram::bytes`] >> 12) written since this
    /// was last asked or tracking began, in rising order; they count as unwritten from then on.
    pub fn take_dirty(&mut self, mut each: impl FnMut(u32)) {
        let mut any = false;
        for (n, word) in self.dirty.iter_mut().flatten().enumerate() {
            let mut bits = core::mem::take(word);
            any |= bits != 0;
            while bits != 0 {
                each(n as u32 * 64 + bits.trailing_zeros());
                bits &= bits - 1;
            }
        }
        if any {
            self.noting_epoch += 1;
        }
    }

    /// A page is about to be written.
    fn note_dirty(&mut self, page: usize) {
        let Some(word) = self.dirty.as_mut().map(|dirty| &mut dirty[page >> 6]) else {
            return;
        };
        let bit = 1 << (page & 63);
        if *word & bit != 0 {
            return;
        }
        *word |= bit;
        if let Some(undo) = &mut self.undo {
            // SAFETY: the page is within the allocation, and nobody else has it.
            undo.keep(page, unsafe {
                &*self.base.as_ptr().add(page * PAGE).cast()
            });
        }
    }

    fn mark_all_dirty(&mut self) {
        if self.dirty.is_some() {
            for page in 0..self.size / PAGE {
                self.note_dirty(page);
            }
        }
    }

    // ---- going back ----

    /// Keeps what pages hold now, each when it is first written, so that [`Ram::put_back`] can restore it.
    /// Writes must be tracked, and every page count as unwritten. Replaces what was kept before.
    ///
    /// # Errors
    /// The host has no memory for four bytes per page; nothing is kept then.
    pub fn keep_pages(&mut self) -> Result<(), RamError> {
        self.undo = None;
        self.undo = Some(Undo::new(self.size / PAGE)?);
        Ok(())
    }

    /// Ends that, and forgets what was kept.
    pub fn forget_pages(&mut self) {
        self.undo = None;
    }

    /// Gives a page what it held at [`Ram::keep_pages`]. Decoded code is dropped only where its bytes
    /// change. Whoever tracks writes is told of it by the caller.
    pub fn put_back(&mut self, page: u32) {
        let page = page as usize;
        let Some(copy) = self.undo.as_ref().and_then(|undo| undo.copy(page)) else {
            return;
        };
        // SAFETY: there are copies only of pages within the allocation, which `&mut self` has alone.
        let now: &mut [u8; PAGE] = unsafe { &mut *self.base.as_ptr().add(page * PAGE).cast() };
        if self.code[page] != 0 {
            let granules = now.as_chunks::<64>().0.iter().zip(copy.as_chunks::<64>().0);
            let changed = |n: usize| self.code[page] >> n & 1 != 0;
            if granules.enumerate().any(|(n, (a, b))| changed(n) && a != b) {
                self.code[page] = 0;
                self.code_writes.push(page as u32);
            }
        }
        now.copy_from_slice(copy);
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.size) {
            // SAFETY: `allocation` came from `alloc_zeroed` with this layout.
            unsafe { dealloc(self.allocation.as_ptr(), layout) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_above_three_gib_continues_at_four() {
        // Only the arithmetic: the allocation itself stays untouched.
        let ram = Ram::new(0xc000_0000 + 0x2000).unwrap();
        assert_eq!(ram.offset(0xbfff_ffff), Some(0xbfff_ffff));
        assert_eq!(ram.offset(0xc000_0000), None);
        assert_eq!(ram.offset(0x1_0000_0000), Some(0xc000_0000));
        assert_eq!(ram.offset(0x1_0000_2000), None);
    }

    #[test]
    fn ranges_that_leave_ram_are_refused_whole() {
        let mut ram = Ram::new(PAGE_SIZE).unwrap();
        assert!(ram.write(4090, &[1; 8]).is_err());
        assert_eq!(ram.load::<6>(4090).unwrap(), [0; 6]);
        assert!(ram.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(Ram::new(0).is_err() && Ram::new(100).is_err());
    }

    #[test]
    fn written_pages_are_told_once_and_in_order() {
        let mut ram = Ram::new(70 * PAGE_SIZE).unwrap();
        let taken = |ram: &mut Ram| {
            let mut pages = Vec::new();
            ram.take_dirty(|page| pages.push(page));
            pages
        };
        ram.write(0x5000, &[1]).unwrap();
        assert!(taken(&mut ram).is_empty() && !ram.tracks_dirty());
        ram.track_dirty(true).unwrap();
        assert!(ram.notes_stores(0x5000));
        ram.write(0x45_000, &[1]).unwrap();
        ram.write(0x5fff, &[1; 2]).unwrap();
        assert!(!ram.notes_stores(0x5000) && ram.notes_stores(0x7000));
        assert_eq!(taken(&mut ram), [5, 6, 0x45]);
        assert!(ram.notes_stores(0x5000));
        assert!(taken(&mut ram).is_empty());
        ram.bytes_mut()[0] = 1;
        assert_eq!(taken(&mut ram), (0..70).collect::<Vec<u32>>());
        ram.track_dirty(false).unwrap();
        assert!(!ram.notes_stores(0x5000));
    }

    #[test]
    fn a_store_into_decoded_code_is_recorded_once() {
        let mut ram = Ram::new(2 * PAGE_SIZE).unwrap();
        ram.mark_code(0x100, 64);
        ram.write(0x80, &[0; 64]).unwrap();
        assert!(!ram.code_was_written());
        ram.write(0x13f, &[0; 2]).unwrap();
        assert_eq!(ram.take_code_writes(), [0]);
        ram.write(0x100, &[0]).unwrap();
        assert!(!ram.code_was_written());
    }
}
