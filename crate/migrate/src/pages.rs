//! Memory as batches of pages: runs of zero pages, of pages equal to others, and of pages whose content follows, compressed.
//!
//! ```text
//! batch  pages in the data (u16)  codec (u16: 0 none, 1 lz4 block)  runs (u32)  run ..  data
//! run    first page (u32)  pages (u32)  from (u32: 0xffffffff the data, 0xfffffffe zeros, else the first page that is equal)
//! ```
//!
//! Runs take effect in order, and take the pages of the data in order. A batch is bounded: [`BATCH_DATA`] pages in the data,
//! [`BATCH_PAGES`] pages in all.

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Most pages in the data of a batch.
pub const BATCH_DATA: usize = 128;
/// Most pages of a batch.
pub const BATCH_PAGES: u32 = 1 << 14;
/// Most runs of a batch.
const BATCH_RUNS: usize = 4096;
/// Most bytes of a batch, however its data is compressed.
pub const BATCH_MOST: usize = HEAD + BATCH_RUNS * RUN + 2 * BATCH_DATA * PAGE;

const HEAD: usize = 8;
const RUN: usize = 12;
const FROM_DATA: u32 = u32::MAX;
const FROM_ZEROS: u32 = u32::MAX - 1;

/// A page's content.
pub type Page = [u8; PAGE];

/// Where pages are read.
pub trait PageSource {
    /// A page by number, where there is one.
    fn page(&self, number: u32) -> Option<&Page>;
}

/// Where pages are put.
pub trait PageTarget: PageSource {
    /// A page by number, to be written; made where it can be. `None` outside of what there is.
    fn page_mut(&mut self, number: u32) -> Option<&mut Page>;
}

impl PageSource for [u8] {
    fn page(&self, number: u32) -> Option<&Page> {
        self.as_chunks().0.get(number as usize)
    }
}

impl PageTarget for [u8] {
    fn page_mut(&mut self, number: u32) -> Option<&mut Page> {
        self.as_chunks_mut().0.get_mut(number as usize)
    }
}

/// How the data of a batch is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    None,
    /// An lz4 block.
    #[default]
    Lz4,
}

impl Codec {
    const fn number(self) -> u16 {
        match self {
            Codec::None => 0,
            Codec::Lz4 => 1,
        }
    }
}

/// Which pages may stand for an equal one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Every earlier one: memory does not change before the last batch is made.
    All,
    /// Earlier ones of the same batch: memory may change between batches.
    Batch,
}

/// What is done with pages of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// They are left out: whoever reads begins with zeros.
    LeftOut,
    /// They are named.
    Named,
}

/// What went into batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages of zeros.
    pub zero: u64,
    /// Pages equal to others.
    pub shared: u64,
    /// Pages whose content was stored.
    pub stored: u64,
}

/// Makes batches. Its memory is bounded by a batch, and with [`Sharing::All`] sixteen bytes for each page stored.
pub struct PageEncoder {
    codec: Codec,
    sharing: Sharing,
    zeros: Zeros,
    runs: Vec<Run>,
    pages: u32,
    data: Vec<u8>,
    out: Vec<u8>,
    known: Known,
    counts: PageCounts,
}

#[derive(Clone, Copy)]
struct Run {
    first: u32,
    count: u32,
    from: u32,
}

impl PageEncoder {
    /// Begins with an empty batch.
    pub fn new(codec: Codec, sharing: Sharing, zeros: Zeros) -> PageEncoder {
        PageEncoder {
            codec,
            sharing,
            zeros,
            runs: Vec::new(),
            pages: 0,
            data: Vec::with_capacity(BATCH_DATA * PAGE),
            out: Vec::new(),
            known: Known::default(),
            counts: PageCounts::default(),
        }
    }

    /// Adds a page of `memory`; a number that is none there is passed over. A batch that is full comes out.
    pub fn push<S: PageSource + ?Sized>(&mut self, memory: &S, number: u32) -> Option<&[u8]> {
        let page = memory.page(number)?;
        if is_zero(page) {
            self.counts.zero += 1;
            if self.zeros == Zeros::LeftOut {
                return None;
            }
            self.run(number, FROM_ZEROS);
        } else if let Some(equal) = self.known.find_or_add(memory, number, page) {
            self.counts.shared += 1;
            self.run(number, equal);
        } else {
            self.counts.stored += 1;
            self.run(number, FROM_DATA);
            self.data.extend_from_slice(page);
        }
        let full = self.data.len() == BATCH_DATA * PAGE
            || self.runs.len() == BATCH_RUNS
            || self.pages == BATCH_PAGES;
        if full { self.take() } else { None }
    }

    /// The batch begun, where there is anything in it.
    pub fn take(&mut self) -> Option<&[u8]> {
        if self.runs.is_empty() {
            return None;
        }
        self.out.clear();
        let data = (self.data.len() / PAGE) as u16;
        self.out.extend(data.to_le_bytes());
        self.out.extend(self.codec.number().to_le_bytes());
        self.out.extend((self.runs.len() as u32).to_le_bytes());
        for run in &self.runs {
            for word in [run.first, run.count, run.from] {
                self.out.extend(word.to_le_bytes());
            }
        }
        let start = self.out.len();
        if self.codec == Codec::Lz4 && !self.data.is_empty() {
            let room = lz4_flex::block::get_maximum_output_size(self.data.len());
            self.out.resize(start + room, 0);
            let room = &mut self.out[start..];
            // There is room for everything it may write.
            let length = lz4_flex::block::compress_into(&self.data, room).unwrap_or(usize::MAX);
            if length < self.data.len() {
                self.out.truncate(start + length);
            } else {
                // What does not become smaller stays as it is.
                self.out[2..4].copy_from_slice(&Codec::None.number().to_le_bytes());
                self.out.truncate(start);
                self.out.extend_from_slice(&self.data);
            }
        } else {
            self.out.extend_from_slice(&self.data);
        }
        self.runs.clear();
        self.data.clear();
        self.pages = 0;
        if self.sharing == Sharing::Batch {
            self.known.clear();
        }
        Some(&self.out)
    }

    /// What went into all batches so far.
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    fn run(&mut self, number: u32, from: u32) {
        self.pages += 1;
        if let Some(last) = self.runs.last_mut() {
            let follows = match last.from {
                FROM_DATA | FROM_ZEROS => from == last.from,
                equal => from < FROM_ZEROS && from == equal.wrapping_add(last.count),
            };
            if follows && number == last.first.wrapping_add(last.count) {
                last.count += 1;
                return;
            }
        }
        self.runs.push(Run {
            first: number,
            count: 1,
            from,
        });
    }
}

/// A batch cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// It is shorter than what it says of itself.
    #[error("a batch of pages is cut")]
    Cut,
    /// More than a batch may have.
    #[error("a batch has {0}, more than batches may have")]
    TooMuch(String),
    /// Its data is stored in a way this build does not know.
    #[error("pages are stored by codec {0}, which this build does not know: use a newer build")]
    Codec(u16),
    /// Its data cannot be unpacked.
    #[error("the data of a batch cannot be unpacked")]
    Data,
    /// A page that is not there.
    #[error("it names page {0:#x}, which is outside of the memory")]
    Outside(u32),
    /// A page that came already.
    #[error("it has page {0:#x} twice")]
    Twice(u32),
    /// An equal page that did not come before.
    #[error("page {page:#x} is to be equal to page {equal:#x}, which did not come before it")]
    Before {
        /// The page.
        page: u32,
        /// The one it names.
        equal: u32,
    },
}

/// Takes batches. Its memory is bounded by a batch, and with [`PageDecoder::once`] a bit for each page.
pub struct PageDecoder {
    data: Vec<u8>,
    seen: Option<Vec<u64>>,
    counts: PageCounts,
}

impl PageDecoder {
    /// Pages may come more than once; the last counts.
    pub fn new() -> PageDecoder {
        PageDecoder {
            data: vec![0; BATCH_DATA * PAGE],
            seen: None,
            counts: PageCounts::default(),
        }
    }

    /// Each of `pages` pages may come once, and stand for others only after it came.
    pub fn once(pages: u64) -> PageDecoder {
        let words = pages.div_ceil(64) as usize;
        PageDecoder {
            seen: Some(vec![0; words]),
            ..PageDecoder::new()
        }
    }

    /// What came so far.
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    /// Puts the pages of a batch into `memory`.
    ///
    /// # Errors
    /// When the batch is none, or does not fit the memory, some of which may have changed.
    pub fn decode<T: PageTarget + ?Sized>(
        &mut self,
        batch: &[u8],
        memory: &mut T,
    ) -> Result<(), PageError> {
        let (head, rest) = batch.split_first_chunk::<HEAD>().ok_or(PageError::Cut)?;
        let stored = usize::from(u16::from_le_bytes([head[0], head[1]]));
        let codec = u16::from_le_bytes([head[2], head[3]]);
        let runs = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if stored > BATCH_DATA || runs > BATCH_RUNS {
            let what = format!("{stored} pages of data and {runs} runs");
            return Err(PageError::TooMuch(what));
        }
        let (runs, packed) = rest.split_at_checked(runs * RUN).ok_or(PageError::Cut)?;
        let runs = runs.as_chunks::<RUN>().0.iter().map(|run| {
            let word =
                |at: usize| u32::from_le_bytes([run[at], run[at + 1], run[at + 2], run[at + 3]]);
            Run {
                first: word(0),
                count: word(4),
                from: word(8),
            }
        });
        let pages = runs.clone().map(|run| u64::from(run.count));
        let of_data = runs.clone().filter(|run| run.from == FROM_DATA);
        let pages: u64 = pages.sum();
        if pages > u64::from(BATCH_PAGES) {
            return Err(PageError::TooMuch(format!("{pages} pages")));
        }
        let of_data: u64 = of_data.map(|run| u64::from(run.count)).sum();
        if of_data != stored as u64 {
            return Err(PageError::Data);
        }
        let mut data = std::mem::take(&mut self.data);
        let outcome = unpack(codec, packed, &mut data[..stored * PAGE])
            .and_then(|()| self.put(runs, &data, memory));
        self.data = data;
        outcome
    }

    fn put<T: PageTarget + ?Sized>(
        &mut self,
        runs: impl Iterator<Item = Run>,
        data: &[u8],
        memory: &mut T,
    ) -> Result<(), PageError> {
        let mut data = data.as_chunks::<PAGE>().0.iter();
        for run in runs {
            for i in 0..run.count {
                let number = run.first.checked_add(i);
                let number = number.ok_or(PageError::Outside(u32::MAX))?;
                let outside = PageError::Outside(number);
                if run.from < FROM_ZEROS {
                    let equal = run.from.saturating_add(i);
                    let before = PageError::Before {
                        page: number,
                        equal,
                    };
                    if !self.has(equal) {
                        return Err(before);
                    }
                    let content = *memory.page(equal).ok_or(before)?;
                    *memory.page_mut(number).ok_or(outside)? = content;
                    self.counts.shared += 1;
                } else {
                    let page = memory.page_mut(number).ok_or(outside)?;
                    if run.from == FROM_DATA {
                        page.copy_from_slice(data.next().ok_or(PageError::Data)?);
                        self.counts.stored += 1;
                    } else {
                        page.fill(0);
                        self.counts.zero += 1;
                    }
                }
                self.came(number)?;
            }
        }
        Ok(())
    }

    /// Whether a page may stand for others.
    fn has(&self, number: u32) -> bool {
        match &self.seen {
            None => true,
            Some(seen) => {
                let word = seen.get(number as usize / 64).copied().unwrap_or(0);
                word & 1 << (number % 64) != 0
            }
        }
    }

    fn came(&mut self, number: u32) -> Result<(), PageError> {
        if let Some(seen) = &mut self.seen {
            let word = seen.get_mut(number as usize / 64);
            let word = word.ok_or(PageError::Outside(number))?;
            if *word & 1 << (number % 64) != 0 {
                return Err(PageError::Twice(number));
            }
            *word |= 1 << (number % 64);
        }
        Ok(())
    }
}

impl Default for PageDecoder {
    fn default() -> PageDecoder {
        PageDecoder::new()
    }
}

/// Unpacks exactly as much as there is room for.
fn unpack(codec: u16, packed: &[u8], into: &mut [u8]) -> Result<(), PageError> {
    const NONE: u16 = Codec::None.number();
    const LZ4: u16 = Codec::Lz4.number();
    match codec {
        _ if into.is_empty() && packed.is_empty() => Ok(()),
        NONE if packed.len() == into.len() => {
            into.copy_from_slice(packed);
            Ok(())
        }
        NONE => Err(PageError::Cut),
        LZ4 => match lz4_flex::block::decompress_into(packed, into) {
            Ok(length) if length == into.len() => Ok(()),
            _ => Err(PageError::Data),
        },
        other => Err(PageError::Codec(other)),
    }
}

fn is_zero(page: &Page) -> bool {
    let zero = |block: &[u8; 64]| block.as_chunks::<8>().0.iter().all(|word| *word == [0; 8]);
    page.as_chunks::<64>().0.iter().all(zero)
}

/// A hash of a page: the same on every host. What has it in common is compared in full.
fn hash(page: &Page) -> u64 {
    const P1: u64 = 0x9e37_79b1_85eb_ca87;
    const P2: u64 = 0xc2b2_ae3d_27d4_eb4f;
    let mut lanes = [P1, P2, 0, P1.wrapping_add(P2)];
    for block in page.as_chunks::<32>().0 {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            let word = u64::from_le_bytes(*word).wrapping_mul(P2);
            *lane = lane.wrapping_add(word).rotate_left(31).wrapping_mul(P1);
        }
    }
    lanes.into_iter().fold(0, |hash: u64, lane| {
        let hash = (hash ^ lane).wrapping_mul(P2);
        hash ^ hash >> 32
    })
}

/// Pages whose content was stored, to be found by content: a table of (hash, number), searched from where the hash says.
#[derive(Default)]
struct Known {
    slots: Vec<(u64, u32)>,
    used: usize,
}

impl Known {
    /// No page has this number: it stands for the data in batches.
    const FREE: u32 = FROM_DATA;
    /// Places looked at. A guest may make pages whose hashes are equal: they are stored then, and cost no more than others.
    const TRIES: usize = 64;

    /// The first page with this content; where there is none, this one is it from now on.
    fn find_or_add<S: PageSource + ?Sized>(
        &mut self,
        memory: &S,
        number: u32,
        page: &Page,
    ) -> Option<u32> {
        if 2 * (self.used + 1) > self.slots.len() {
            self.grow();
        }
        let hash = hash(page);
        let mut at = self.start(hash);
        for _ in 0..Self::TRIES {
            let (theirs, other) = self.slots[at];
            if other == Self::FREE {
                self.slots[at] = (hash, number);
                self.used += 1;
                return None;
            }
            if theirs == hash && other != number && memory.page(other) == Some(page) {
                return Some(other);
            }
            at = (at + 1) % self.slots.len();
        }
        None
    }

    fn start(&self, hash: u64) -> usize {
        (hash % self.slots.len() as u64) as usize
    }

    fn grow(&mut self) {
        let size = (2 * self.slots.len()).max(2 * BATCH_DATA);
        let old = std::mem::replace(&mut self.slots, vec![(0, Self::FREE); size]);
        for (hash, number) in old.into_iter().filter(|slot| slot.1 != Self::FREE) {
            let mut at = self.start(hash);
            while self.slots[at].1 != Self::FREE {
                at = (at + 1) % size;
            }
            self.slots[at] = (hash, number);
        }
    }

    fn clear(&mut self) {
        self.slots.fill((0, Self::FREE));
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(memory: &[u8], sharing: Sharing, zeros: Zeros) -> (Vec<Vec<u8>>, PageCounts) {
        let mut encoder = PageEncoder::new(Codec::Lz4, sharing, zeros);
        let mut batches = Vec::new();
        for number in 0..(memory.len() / PAGE) as u32 {
            batches.extend(encoder.push(memory, number).map(<[u8]>::to_vec));
        }
        batches.extend(encoder.take().map(<[u8]>::to_vec));
        (batches, encoder.counts())
    }

    fn decode(batches: &[Vec<u8>], memory: &mut [u8]) -> PageCounts {
        let mut decoder = PageDecoder::once((memory.len() / PAGE) as u64);
        for batch in batches {
            assert!(batch.len() <= BATCH_MOST);
            decoder.decode(batch, memory).unwrap();
        }
        decoder.counts()
    }

    /// Pages by content: 0 zeros, 1..128 all bytes equal, else noise.
    fn memory(pages: &[u8]) -> Vec<u8> {
        let mut memory = vec![0; pages.len() * PAGE];
        for (page, kind) in memory.as_chunks_mut::<PAGE>().0.iter_mut().zip(pages) {
            let mut value = u32::from(*kind);
            for byte in page.iter_mut() {
                if *kind >= 128 {
                    value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                }
                *byte = (value >> (24 * u32::from(*kind >= 128))) as u8;
            }
        }
        memory
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn memory_comes_back(pages in proptest::collection::vec(0u8..=255, 0..600)) {
            let memory = memory(&pages);
            for sharing in [Sharing::All, Sharing::Batch] {
                for zeros in [Zeros::LeftOut, Zeros::Named] {
                    let (batches, put) = encode(&memory, sharing, zeros);
                    let dirt = if zeros == Zeros::Named { 0xa5 } else { 0 };
                    let mut back = vec![dirt; memory.len()];
                    let got = decode(&batches, &mut back);
                    prop_assert!(back == memory);
                    prop_assert_eq!((got.shared, got.stored), (put.shared, put.stored));
                }
            }
        }
    }

    #[test]
    fn zeros_are_left_out_and_equal_pages_stored_once() {
        let pages: Vec<u8> = (0..1000).map(|i| [0, 7, 200, 7][i % 4]).collect();
        let memory = memory(&pages);
        let (batches, counts) = encode(&memory, Sharing::All, Zeros::LeftOut);
        assert_eq!((counts.zero, counts.shared, counts.stored), (250, 748, 2));
        let bytes: usize = batches.iter().map(Vec::len).sum();
        assert!(bytes < 2 * PAGE + 1000 * RUN, "{bytes}");
    }

    #[test]
    fn what_does_not_become_smaller_stays_as_it_is() {
        let mut memory = memory(&[0; 200]);
        let mut value = 1u64;
        for byte in &mut memory {
            value ^= value << 13;
            value ^= value >> 7;
            value ^= value << 17;
            *byte = value as u8;
        }
        let (batches, _) = encode(&memory, Sharing::All, Zeros::LeftOut);
        let bytes: usize = batches.iter().map(Vec::len).sum();
        assert!(bytes < memory.len() + 100, "{bytes}");
        let mut back = vec![0; memory.len()];
        decode(&batches, &mut back);
        assert!(back == memory);
    }

    fn batch(stored: u16, codec: u16, runs: &[[u32; 3]], data: &[u8]) -> Vec<u8> {
        let mut batch = stored.to_le_bytes().to_vec();
        batch.extend(codec.to_le_bytes());
        batch.extend((runs.len() as u32).to_le_bytes());
        batch.extend(runs.iter().flatten().flat_map(|word| word.to_le_bytes()));
        batch.extend(data);
        batch
    }

    #[test]
    fn batches_that_lie_are_refused() {
        let page = [1; PAGE];
        let refused = |batch: Vec<u8>| {
            let mut memory = vec![0; 4 * PAGE];
            PageDecoder::once(4)
                .decode(&batch, &mut memory[..])
                .unwrap_err()
        };
        assert_eq!(refused(vec![0; 7]), PageError::Cut);
        assert_eq!(
            refused(batch(1, 0, &[[0, 1, FROM_DATA]], &page[1..])),
            PageError::Cut
        );
        assert_eq!(
            refused(batch(1, 0, &[[4, 1, FROM_DATA]], &page)),
            PageError::Outside(4)
        );
        assert_eq!(
            refused(batch(1, 0, &[[0, 2, FROM_DATA]], &page)),
            PageError::Data
        );
        assert_eq!(
            refused(batch(1, 1, &[[0, 1, FROM_DATA]], &page)),
            PageError::Data
        );
        assert_eq!(
            refused(batch(1, 9, &[[0, 1, FROM_DATA]], &page)),
            PageError::Codec(9)
        );
        assert_eq!(
            refused(batch(0, 0, &[[3, 2, FROM_ZEROS]], &[])),
            PageError::Outside(4)
        );
        let over = batch(0, 0, &[[u32::MAX, 2, FROM_ZEROS]], &[]);
        assert_eq!(refused(over), PageError::Outside(u32::MAX));
        let twice = batch(0, 0, &[[3, 1, FROM_ZEROS], [3, 1, FROM_ZEROS]], &[]);
        assert_eq!(refused(twice), PageError::Twice(3));
        let before = PageError::Before { page: 1, equal: 0 };
        assert_eq!(refused(batch(0, 0, &[[1, 1, 0]], &[])), before);
        for huge in [
            batch(u16::MAX, 0, &[[0, 1, FROM_DATA]], &page),
            batch(0, 0, &[[0, u32::MAX, FROM_ZEROS]], &[]),
            batch(0, 0, &[[0, 1, FROM_ZEROS]; BATCH_RUNS + 1], &[]),
        ] {
            assert!(matches!(refused(huge), PageError::TooMuch(_)));
        }
    }

    #[test]
    fn a_search_ends_where_a_guest_took_every_place() {
        let memory = memory(&[7; 4]);
        let mut known = Known::default();
        known.grow();
        known.slots.fill((0, 1));
        let page = memory[..].page(3).unwrap();
        assert_eq!(known.find_or_add(&memory[..], 3, page), None);
    }
}
