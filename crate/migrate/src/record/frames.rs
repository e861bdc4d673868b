//! Moments of a run in memory, as the pages that changed from one to the next.

use std::collections::BTreeMap;

use hypernest_machine::{MachineState, Ram};

use super::Moment;
use crate::pages::{PAGE, Page};

/// Bytes that a page takes here, beside its content.
const PAGE_COST: usize = PAGE + 64;

/// A moment that can be gone to.
pub(super) struct Frame {
    pub at: Moment,
    /// Instructions of the run before it.
    pub instructions: u64,
    /// The entry of the log that comes next.
    pub next: usize,
    pub state: MachineState,
    /// What was written since the frame before, as it is now; `None` for zeros.
    pages: BTreeMap<u32, Option<Box<Page>>>,
}

impl Frame {
    fn cost(&self) -> usize {
        let disks = self
            .state
            .board
            .virtio
            .iter()
            .map(|device| match &device.backend {
                hypernest_machine::devices::virtio::BackendState::Block(disk) => disk.overlay.len(),
                hypernest_machine::devices::virtio::BackendState::Console(_) => 0,
            });
        (self.pages.len() + disks.sum::<usize>()) * PAGE_COST
    }
}

/// What is kept of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCounts {
    /// Moments that can be gone to at once.
    pub frames: usize,
    /// Bytes they take.
    pub bytes: usize,
}

/// Frames in the order of the run. The first is the start, of which RAM is kept elsewhere.
pub(super) struct Frames {
    frames: Vec<Frame>,
    budget: usize,
    used: usize,
    /// Pages written since the last frame before another one that was given up.
    carried: Vec<u32>,
}

impl Frames {
    pub fn new(at: Moment, state: MachineState, budget: usize) -> Frames {
        Frames {
            frames: vec![Frame {
                at,
                instructions: 0,
                next: 0,
                state,
                pages: BTreeMap::new(),
            }],
            budget,
            used: 0,
            carried: Vec::new(),
        }
    }

    pub fn counts(&self) -> FrameCounts {
        FrameCounts {
            frames: self.frames.len(),
            bytes: self.used,
        }
    }

    /// The last frame for which `before` holds; it holds for the first.
    pub fn last(&self, before: impl Fn(&Frame) -> bool) -> usize {
        self.frames.iter().rposition(before).unwrap_or(0)
    }

    pub fn get(&self, number: usize) -> &Frame {
        &self.frames[number]
    }

    /// Whether there is one after which entry `next` comes.
    pub fn has(&self, next: usize) -> bool {
        self.place(next).is_ok()
    }

    fn place(&self, next: usize) -> Result<usize, usize> {
        self.frames.binary_search_by_key(&next, |frame| frame.next)
    }

    /// Adds one. `written` has at least the pages written since the frame before it.
    pub fn add(
        &mut self,
        (at, instructions, next): (Moment, u64, usize),
        state: MachineState,
        written: &[u32],
        ram: &Ram,
    ) {
        let Err(place) = self.place(next) else {
            return;
        };
        let bytes = ram.bytes().as_chunks::<PAGE>().0;
        let carried = match place == self.frames.len() {
            true => std::mem::take(&mut self.carried),
            false => Vec::new(),
        };
        let pages = written.iter().chain(&carried).map(|&number| {
            let page = &bytes[number as usize];
            let zero = page.iter().all(|byte| *byte == 0);
            (number, (!zero).then(|| Box::new(*page)))
        });
        let frame = Frame {
            at,
            instructions,
            next,
            state,
            pages: pages.collect(),
        };
        self.used += frame.cost();
        self.frames.insert(place, frame);
        self.thin();
    }

    /// Gives up frames that are close to others until the rest fits the budget.
    fn thin(&mut self) {
        while self.used > self.budget && self.frames.len() > 1 {
            let gap = |n: &usize| self.frames[n + 1].instructions - self.frames[n - 1].instructions;
            let closest = (1..self.frames.len() - 1).min_by_key(gap);
            let gone = self.frames.remove(closest.unwrap_or(self.frames.len() - 1));
            self.used -= gone.cost();
            let Some(after) = closest.and_then(|place| self.frames.get_mut(place)) else {
                // The last one: whichever comes after it has its pages too.
                self.carried.extend(gone.pages.keys());
                self.carried.sort_unstable();
                self.carried.dedup();
                continue;
            };
            self.used -= after.cost();
            for (number, page) in gone.pages {
                after.pages.entry(number).or_insert(page);
            }
            self.used += after.cost();
        }
    }

    /// Calls `put` for every page that was written between the start and a frame, with its content there.
    pub fn pages(&self, frame: usize, mut put: impl FnMut(u32, &Page)) {
        const ZEROS: &Page = &[0; PAGE];
        let mut seen: Vec<u64> = Vec::new();
        for frame in self.frames[..=frame].iter().rev() {
            for (number, page) in &frame.pages {
                let (word, bit) = (*number as usize / 64, 1 << (number % 64));
                if seen.len() <= word {
                    seen.resize(word + 1, 0);
                }
                if seen[word] & bit == 0 {
                    seen[word] |= bit;
                    put(*number, page.as_deref().unwrap_or(ZEROS));
                }
            }
        }
    }
}
