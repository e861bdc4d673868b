//! What pages of RAM held before they were written, so that they can be put back.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::ram::{PAGE_SIZE, RamError};

/// Bytes of a page.
pub(crate) const PAGE: usize = PAGE_SIZE as usize;

/// No copy of this page yet.
const NONE: u32 = u32::MAX;

/// Copies of pages, made before their first write.
pub(crate) struct Undo {
    /// Per RAM page: where its copy is.
    index: Vec<u32>,
    copies: Vec<Box<[u8; PAGE]>>,
}

impl Undo {
    /// Of no page.
    ///
    /// # Errors
    /// The host has no memory for the index.
    pub fn new(pages: usize) -> Result<Undo, RamError> {
        let mut index = Vec::new();
        index
            .try_reserve_exact(pages)
            .map_err(|_| RamError::Host(4 * pages as u64))?;
        index.resize(pages, NONE);
        Ok(Undo {
            index,
            copies: Vec::new(),
        })
    }

    /// Copies a page, unless there is a copy.
    pub fn keep(&mut self, page: usize, bytes: &[u8; PAGE]) {
        if self.index[page] == NONE {
            self.index[page] = self.copies.len() as u32;
            self.copies.push(Box::new(*bytes));
        }
    }

    pub fn copy(&self, page: usize) -> Option<&[u8; PAGE]> {
        let copy = self.copies.get(*self.index.get(page)? as usize)?;
        Some(copy)
    }
}
