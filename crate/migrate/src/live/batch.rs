//! Batches of pages: what a [`super::message::FromSource::Pages`] holds.
//!
//! ```text
//! zero    u16       pages that are all zero
//! same    u16       pages with the content of another
//! data    u16       pages whose content follows
//! packed  u16       1: the content is one LZ4 block; 0: as it is
//! zero    x u32     their numbers
//! same    x 2 u32   page, and the page whose content it has
//! data    x u32     their numbers
//! content           4096 bytes of each of the latter
//! ```
//!
//! A page's number counts pages of 4096 bytes from the start of RAM, across the PCI hole. Contents are put in place first,
//! then those of equal pages, then zeros.

use hypernest_machine::hash;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Pages with content in one batch at most.
pub const DATA: usize = 64;
/// Pages of each other kind in one batch at most.
pub const OTHERS: usize = 4096;
const HEADER: usize = 8;

/// A batch that no source makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// Its length does not fit what it says it holds, or it says too much.
    #[error("a batch of pages has the wrong length")]
    Length,
    /// There is no such page.
    #[error("page {page} of a machine with {pages}")]
    Page {
        /// Its number.
        page: u32,
        /// How many there are.
        pages: u32,
    },
    /// The block cannot be unpacked to the pages it stands for.
    #[error("a batch of pages cannot be unpacked")]
    Packed,
}

/// What each page holds, as hashes, and one hash over all of them that follows every change.
#[derive(Debug)]
pub struct Table {
    /// 0 for a page that is all zero.
    hashes: Vec<u64>,
    sum: u64,
    seed: u64,
}

impl Table {
    /// `pages` pages that are all zero. Different seeds give different hashes, so that no guest can make pages that
    /// are taken for equal. `None` where the host has no memory for it.
    pub fn new(pages: u32, seed: u64) -> Option<Table> {
        let mut hashes = Vec::new();
        hashes.try_reserve_exact(pages as usize).ok()?;
        hashes.resize(pages as usize, 0);
        Some(Table {
            hashes,
            sum: 0,
            seed,
        })
    }

    /// Number of pages.
    pub fn pages(&self) -> u32 {
        self.hashes.len() as u32
    }

    /// Hash of a page's content.
    pub fn hash(&self, content: &[u8]) -> u64 {
        if hash::is_zero(content) {
            return 0;
        }
        hash::bytes(self.seed, content).max(1)
    }

    /// What a page holds.
    pub fn get(&self, page: u32) -> u64 {
        self.hashes[page as usize]
    }

    /// A page holds something else now.
    pub fn set(&mut self, page: u32, hash: u64) {
        let old = std::mem::replace(&mut self.hashes[page as usize], hash);
        self.sum = self.sum.wrapping_sub(placed(page, old));
        self.sum = self.sum.wrapping_add(placed(page, hash));
    }

    /// The hash over all pages.
    pub fn sum(&self) -> u64 {
        self.sum
    }
}

/// A page's share of the sum; none of a page that is all zero.
fn placed(page: u32, content: u64) -> u64 {
    match content {
        0 => 0,
        _ => hash::finish(content ^ hash::finish(u64::from(page) + 1)),
    }
}

/// A batch being filled.
#[derive(Debug, Default)]
pub struct Batch {
    zero: Vec<u32>,
    same: Vec<(u32, u32)>,
    data: Vec<u32>,
    content: Vec<u8>,
}

impl Batch {
    /// Whether there is room for one more page of any kind.
    pub fn has_room(&self) -> bool {
        self.data.len() < DATA && self.zero.len() < OTHERS && self.same.len() < OTHERS
    }

    /// Pages with content.
    pub fn data(&self) -> usize {
        self.data.len()
    }

    /// All pages.
    pub fn pages(&self) -> usize {
        self.data.len() + self.zero.len() + self.same.len()
    }

    /// A page that is all zero now.
    pub fn zero(&mut self, page: u32) {
        self.zero.push(page);
    }

    /// A page that has the content that `of` has at the destination.
    pub fn same(&mut self, page: u32, of: u32) {
        self.same.push((page, of));
    }

    /// A page with content.
    pub fn content(&mut self, page: u32, content: &[u8]) {
        self.data.push(page);
        self.content.extend_from_slice(content);
    }

    /// Appends its bytes, and empties it.
    pub fn append(&mut self, out: &mut Vec<u8>) {
        let at = out.len();
        for count in [self.zero.len(), self.same.len(), self.data.len(), 0] {
            out.extend((count as u16).to_le_bytes());
        }
        let pairs = self.same.iter().flat_map(|&(page, of)| [page, of]);
        let zero = self.zero.iter().copied();
        for number in zero.chain(pairs).chain(self.data.iter().copied()) {
            out.extend(number.to_le_bytes());
        }
        let start = out.len();
        let most = lz4_flex::block::get_maximum_output_size(self.content.len());
        out.resize(start + most, 0);
        match lz4_flex::block::compress_into(&self.content, &mut out[start..]) {
            Ok(packed) if packed < self.content.len() => {
                out.truncate(start + packed);
                out[at + 6] = 1;
            }
            // It would not get smaller: it goes as it is.
            _ => {
                out.truncate(start);
                out.extend_from_slice(&self.content);
            }
        }
        self.zero.clear();
        self.same.clear();
        self.data.clear();
        self.content.clear();
    }
}

/// Puts the pages of a batch into RAM, and what they hold into the table. How many there were.
///
/// # Errors
/// When the batch is none. Some pages may be in place then.
pub fn apply(
    batch: &[u8],
    ram: &mut [u8],
    table: &mut Table,
    unpacked: &mut Vec<u8>,
) -> Result<usize, BatchError> {
    let (header, rest) = batch
        .split_first_chunk::<HEADER>()
        .ok_or(BatchError::Length)?;
    let (counts, _) = header.as_chunks::<2>();
    let [zeros, sames, datas, packed] = [0, 1, 2, 3].map(|n| u16::from_le_bytes(counts[n]));
    let [zeros, sames, datas] = [zeros, sames, datas].map(usize::from);
    if zeros > OTHERS || sames > OTHERS || datas > DATA || packed > 1 {
        return Err(BatchError::Length);
    }
    let numbers = 4 * (zeros + 2 * sames + datas);
    let (numbers, content) = rest.split_at_checked(numbers).ok_or(BatchError::Length)?;
    let pages = table.pages().min((ram.len() / PAGE) as u32);
    let numbers = numbers.as_chunks::<4>().0.iter().map(|bytes| {
        let page = u32::from_le_bytes(*bytes);
        (page < pages)
            .then_some(page)
            .ok_or(BatchError::Page { page, pages })
    });
    let numbers: Vec<u32> = numbers.collect::<Result<_, _>>()?;
    let (zero, numbers) = numbers.split_at(zeros);
    let (same, data) = numbers.split_at(2 * sames);
    let content = if packed == 1 {
        unpacked.resize(DATA * PAGE, 0);
        let into = &mut unpacked[..datas * PAGE];
        match lz4_flex::block::decompress_into(content, into) {
            Ok(length) if length == datas * PAGE => &*into,
            _ => return Err(BatchError::Packed),
        }
    } else {
        content
    };
    if content.len() != datas * PAGE {
        return Err(BatchError::Length);
    }
    let place = |page: u32| page as usize * PAGE..(page as usize + 1) * PAGE;
    for (&page, content) in data.iter().zip(content.chunks_exact(PAGE)) {
        ram[place(page)].copy_from_slice(content);
        table.set(page, table.hash(content));
    }
    for &[page, of] in same.as_chunks::<2>().0 {
        ram.copy_within(place(of), page as usize * PAGE);
        table.set(page, table.get(of));
    }
    for &page in zero {
        ram[place(page)].fill(0);
        table.set(page, 0);
    }
    Ok(zeros + sames + datas)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u32 = 300;

    fn noise(page: u32) -> Vec<u8> {
        let mut word = u64::from(page) + 1;
        let mut next = || {
            word = hash::finish(word.wrapping_add(0x9e37_79b9_7f4a_7c15));
            word.to_le_bytes()
        };
        (0..PAGE / 8).flat_map(|_| next()).collect()
    }

    fn target() -> (Vec<u8>, Table) {
        (
            vec![0; PAGES as usize * PAGE],
            Table::new(PAGES, 5).unwrap(),
        )
    }

    fn sent(fill: impl FnOnce(&mut Batch)) -> Vec<u8> {
        let (mut batch, mut out) = (Batch::default(), Vec::new());
        fill(&mut batch);
        batch.append(&mut out);
        assert_eq!(batch.pages(), 0);
        out
    }

    fn put(batch: &[u8], to: &mut (Vec<u8>, Table)) -> Result<usize, BatchError> {
        apply(batch, &mut to.0, &mut to.1, &mut Vec::new())
    }

    #[test]
    fn pages_arrive_packed_or_not_equal_or_zero() {
        let mut to = target();
        let first = sent(|batch| {
            batch.content(7, &[1; PAGE]);
            batch.content(9, &[2; PAGE]);
            batch.same(299, 9);
        });
        assert!(first.len() < PAGE);
        assert_eq!(put(&first, &mut to), Ok(3));
        let second = sent(|batch| {
            batch.content(3, &noise(3));
            batch.zero(7);
        });
        assert_eq!(second.len(), HEADER + 8 + PAGE);
        assert_eq!(put(&second, &mut to), Ok(2));
        for (page, content) in to.0.chunks_exact(PAGE).enumerate() {
            match page {
                3 => assert_eq!(content, noise(3)),
                9 | 299 => assert_eq!(content, [2; PAGE]),
                _ => assert_eq!(content, [0; PAGE], "{page}"),
            }
        }
    }

    #[test]
    fn the_sum_is_that_of_what_is_there_and_not_of_the_way_there() {
        let (mut one, mut other) = (target(), target());
        put(
            &sent(|batch| {
                batch.content(1, &noise(1));
                batch.content(2, &noise(2));
            }),
            &mut one,
        )
        .unwrap();
        put(&sent(|batch| batch.content(2, &noise(9))), &mut other).unwrap();
        put(
            &sent(|batch| {
                batch.content(2, &noise(2));
                batch.content(1, &noise(1));
                batch.same(4, 1);
            }),
            &mut other,
        )
        .unwrap();
        assert_ne!(one.1.sum(), other.1.sum());
        put(&sent(|batch| batch.zero(4)), &mut other).unwrap();
        assert_eq!(one.1.sum(), other.1.sum());
        // The same contents in other places.
        let mut third = target();
        let swapped = sent(|batch| {
            batch.content(2, &noise(1));
            batch.content(1, &noise(2));
        });
        put(&swapped, &mut third).unwrap();
        assert_ne!(one.1.sum(), third.1.sum());
    }

    #[test]
    fn a_lying_batch_is_an_error() {
        let good = sent(|batch| {
            batch.content(7, &[1; PAGE]);
            batch.same(1, 7);
            batch.zero(3);
        });
        for length in 0..good.len() {
            assert!(put(&good[..length], &mut target()).is_err(), "{length}");
        }
        for at in 0..HEADER {
            for value in 0..=255 {
                let mut bad = good.clone();
                if bad[at] != value {
                    bad[at] = value;
                    assert!(put(&bad, &mut target()).is_err(), "{at}: {value}");
                }
            }
        }
        let page = PAGES;
        let beyond = sent(|batch| batch.zero(page));
        let pages = PAGES;
        assert_eq!(
            put(&beyond, &mut target()),
            Err(BatchError::Page { page, pages })
        );
    }
}
