//! Which pages of RAM were written: one record in RAM, shared out to those who ask at different times.

use hypernest_cpu::{PAGE_SIZE, Ram, RamError};

use crate::engine::{EngineError, missing};
use crate::hash::PageHashes;
use crate::machine::Machine;

/// A set of RAM pages.
pub(crate) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    fn new(ram: &Ram) -> PageSet {
        let pages = (ram.size() / PAGE_SIZE) as usize;
        PageSet {
            words: vec![0; pages.div_ceil(64)],
        }
    }

    fn insert(&mut self, page: u32) {
        self.words[page as usize / 64] |= 1 << (page % 64);
    }

    /// Its pages in rising order, of which none is left.
    fn take(&mut self) -> Vec<u32> {
        let mut pages = Vec::new();
        for (n, word) in self.words.iter_mut().enumerate() {
            let mut bits = std::mem::take(word);
            while bits != 0 {
                pages.push(n as u32 * 64 + bits.trailing_zeros());
                bits &= bits - 1;
            }
        }
        pages
    }
}

/// Who wants to know what was written.
#[derive(Default)]
pub(crate) struct Dirty {
    /// The user of the library.
    user: Option<PageSet>,
    /// The mark to go back to.
    mark: Option<PageSet>,
    /// The hashes that are kept.
    hashes: Option<(PageSet, PageHashes)>,
}

impl Dirty {
    fn sets(&mut self) -> impl Iterator<Item = &mut PageSet> {
        let hashed = self.hashes.iter_mut().map(|(set, _)| set);
        self.user.iter_mut().chain(&mut self.mark).chain(hashed)
    }

    /// Gives everybody what was written since the last time.
    fn collect(&mut self, ram: &mut Ram) {
        ram.take_dirty(|page| {
            for set in self.sets() {
                set.insert(page);
            }
        });
    }
}

impl Machine {
    /// Begins or ends noting which pages of RAM are written, by whomever: vCPUs, devices, debuggers. No
    /// page counts as written at the beginning. The run does not change by it, and its speed hardly.
    ///
    /// # Errors
    /// When the engine cannot ([`Capabilities::dirty_tracking`](crate::Capabilities::dirty_tracking)), or the
    /// host has no memory for a bit per page.
    pub fn track_dirty(&mut self, on: bool) -> Result<(), EngineError> {
        if !self.capabilities().dirty_tracking {
            return Err(missing(self.engine.name(), "record of written pages"));
        }
        self.dirty.collect(&mut self.ram);
        self.dirty.user = None;
        if on {
            self.begin_tracking()?;
            self.dirty.user = Some(PageSet::new(&self.ram));
        }
        self.end_tracking();
        Ok(())
    }

    /// The pages written since this was last asked, or since [`Machine::track_dirty`], in rising order: each
    /// is 4096 bytes at its number times 4096 in [`Ram::bytes`]. They count as unwritten from then on. Empty
    /// where nothing is tracked.
    ///
    /// A page may be among them whose bytes are what they were.
    pub fn take_dirty(&mut self) -> Vec<u32> {
        self.dirty.collect(&mut self.ram);
        self.dirty
            .user
            .as_mut()
            .map_or_else(Vec::new, PageSet::take)
    }

    /// Keeps hashes of pages from now on, so that [`Machine::kept_hash`] reads what has changed alone; or ends that.
    /// They take 16 bytes for each page.
    ///
    /// # Errors
    /// As those of [`Machine::track_dirty`].
    pub fn keep_hashes(&mut self, on: bool) -> Result<(), EngineError> {
        if !self.capabilities().dirty_tracking {
            return Err(missing(self.engine.name(), "record of written pages"));
        }
        self.dirty.collect(&mut self.ram);
        self.dirty.hashes = None;
        if on {
            self.begin_tracking()?;
            let hashes = PageHashes::new(self.ram.bytes());
            self.dirty.hashes = Some((PageSet::new(&self.ram), hashes));
        }
        self.end_tracking();
        Ok(())
    }

    /// The same as [`Machine::state_hash`], at the cost of what has changed since this was last asked where
    /// [`Machine::keep_hashes`] is on.
    ///
    /// # Errors
    /// Only when the host behind the engine fails.
    pub fn kept_hash(&mut self) -> Result<u64, EngineError> {
        self.dirty.collect(&mut self.ram);
        let state = self.state()?;
        let bytes = self.ram.bytes();
        let Some((set, hashes)) = &mut self.dirty.hashes else {
            return Ok(state.hash(bytes));
        };
        for page in set.take() {
            hashes.update(bytes, page);
        }
        Ok(hashes.hash(state.hash_alone()))
    }

    /// Begins the record of what is written since a mark, which every page is not.
    pub(crate) fn begin_mark(&mut self) -> Result<(), EngineError> {
        self.dirty.collect(&mut self.ram);
        self.begin_tracking()?;
        self.dirty.mark = Some(PageSet::new(&self.ram));
        let kept = self.ram.keep_pages();
        kept.map_err(|error| self.no_memory(&error))
    }

    /// Ends it.
    pub(crate) fn end_mark(&mut self) {
        self.dirty.collect(&mut self.ram);
        self.dirty.mark = None;
        self.ram.forget_pages();
        self.end_tracking();
    }

    /// Gives RAM the content it had at the mark.
    pub(crate) fn put_pages_back(&mut self) {
        self.dirty.collect(&mut self.ram);
        let pages = self
            .dirty
            .mark
            .as_mut()
            .map_or_else(Vec::new, PageSet::take);
        for page in pages {
            self.ram.put_back(page);
            let hashed = self.dirty.hashes.as_mut().map(|(set, _)| set);
            for set in self.dirty.user.iter_mut().chain(hashed) {
                set.insert(page);
            }
        }
    }

    fn begin_tracking(&mut self) -> Result<(), EngineError> {
        if self.ram.tracks_dirty() {
            return Ok(());
        }
        let begun = self.ram.track_dirty(true);
        begun.map_err(|error| self.no_memory(&error))
    }

    fn no_memory(&self, error: &RamError) -> EngineError {
        EngineError::Host {
            engine: self.engine.name(),
            what: "the record of written pages",
            why: error.to_string(),
        }
    }

    /// Ends the record where nobody wants it.
    fn end_tracking(&mut self) {
        if self.dirty.sets().next().is_none() {
            // Ending cannot fail.
            let _ = self.ram.track_dirty(false);
        }
    }
}
