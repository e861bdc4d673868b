//! A 64-bit hash of the whole machine: the same on every host, and quick over empty memory.

/// Bytes of RAM that are looked at together. Those that are all zero do not count.
const PAGE: usize = 4096;

const P1: u64 = 0x9e37_79b1_85eb_ca87;
const P2: u64 = 0xc2b2_ae3d_27d4_eb4f;
const P3: u64 = 0x1656_67b1_9e37_79f9;

fn round(lane: u64, word: u64) -> u64 {
    lane.wrapping_add(word.wrapping_mul(P2))
        .rotate_left(31)
        .wrapping_mul(P1)
}

/// Spreads every bit of `value` over all others.
pub fn finish(mut value: u64) -> u64 {
    value = (value ^ value >> 33).wrapping_mul(P2);
    value = (value ^ value >> 29).wrapping_mul(P3);
    value ^ value >> 32
}

/// Hash of `bytes`, starting from `seed`: four lanes of eight bytes each.
pub fn bytes(seed: u64, bytes: &[u8]) -> u64 {
    let mut lanes = [
        seed.wrapping_add(P1),
        seed.wrapping_add(P2),
        seed,
        seed.wrapping_sub(P1),
    ];
    let (blocks, rest) = bytes.as_chunks::<32>();
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = round(*lane, u64::from_le_bytes(*word));
        }
    }
    let mut hash = bytes.len() as u64;
    for lane in lanes {
        hash = round(hash, finish(lane));
    }
    for byte in rest {
        hash = round(hash, u64::from(*byte) + 1);
    }
    finish(hash)
}

/// Whether all of it is zero.
pub fn is_zero(page: &[u8]) -> bool {
    let (blocks, rest) = page.as_chunks::<64>();
    let zero = |block: &[u8; 64]| block.as_chunks::<8>().0.iter().all(|word| *word == [0; 8]);
    blocks.iter().all(zero) && rest.iter().all(|byte| *byte == 0)
}

/// Hash of memory, starting from `seed`: of its size and of every page that is not all zero, with
/// its number.
pub(crate) fn memory(seed: u64, memory: &[u8]) -> u64 {
    let mut hash = round(seed, memory.len() as u64);
    for (number, page) in memory.chunks(PAGE).enumerate() {
        if let Some(page) = page_hash(number, page) {
            hash = round(hash, page);
        }
    }
    finish(hash)
}

/// What [`memory`] finds of each page, kept: to hash again, only what has changed is read.
pub(crate) struct PageHashes {
    /// Of each page that is not all zero.
    hashes: Vec<Option<u64>>,
    size: u64,
}

impl PageHashes {
    pub(crate) fn new(memory: &[u8]) -> PageHashes {
        let pages = memory.chunks(PAGE).enumerate();
        PageHashes {
            hashes: pages
                .map(|(number, page)| page_hash(number, page))
                .collect(),
            size: memory.len() as u64,
        }
    }

    /// A page of `memory` may have changed.
    pub(crate) fn update(&mut self, memory: &[u8], number: u32) {
        let number = number as usize;
        if let Some(page) = memory.chunks(PAGE).nth(number) {
            self.hashes[number] = page_hash(number, page);
        }
    }

    /// The same as [`memory`].
    pub(crate) fn hash(&self, seed: u64) -> u64 {
        let hash = round(seed, self.size);
        finish(
            self.hashes
                .iter()
                .flatten()
                .fold(hash, |hash, page| round(hash, *page)),
        )
    }
}

fn page_hash(number: usize, page: &[u8]) -> Option<u64> {
    (!is_zero(page)).then(|| bytes(number as u64, page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_fixed_on_every_host() {
        let data: Vec<u8> = (0..=255).cycle().take(5000).collect();
        assert_eq!(bytes(1, &data), 16_549_520_110_391_145_638);
        assert_eq!(memory(7, &data), 7_996_126_313_596_780_156);
    }

    #[test]
    fn hashes_that_are_kept_give_the_same() {
        let mut memory = vec![0; 5 * PAGE];
        memory[PAGE + 5] = 1;
        memory[4 * PAGE] = 2;
        let mut kept = PageHashes::new(&memory);
        let check = |kept: &PageHashes, memory: &[u8]| {
            assert_eq!(kept.hash(9), super::memory(9, memory));
        };
        check(&kept, &memory);
        memory[PAGE + 5] = 0;
        memory[2 * PAGE] = 7;
        kept.update(&memory, 1);
        kept.update(&memory, 2);
        check(&kept, &memory);
    }

    #[test]
    fn every_bit_and_place_counts() {
        let mut seen = std::collections::BTreeSet::new();
        for length in [1, 31, 32, 33, 100] {
            for bit in 0..8 * length {
                let mut data = vec![0; length];
                data[bit / 8] = 1 << (bit % 8);
                assert!(seen.insert(bytes(0, &data)), "{length} bytes, bit {bit}");
            }
            assert!(seen.insert(bytes(0, &vec![0; length])));
        }
    }

    #[test]
    fn memory_counts_what_is_in_which_page_and_how_much_there_is() {
        let empty = memory(0, &[0; 4 * PAGE]);
        assert_ne!(empty, memory(0, &[0; 5 * PAGE]));
        let with = |at: usize| {
            let mut ram = vec![0; 4 * PAGE];
            ram[at] = 1;
            memory(0, &ram)
        };
        assert_ne!(with(0), empty);
        assert_ne!(with(0), with(PAGE));
        assert_ne!(with(4 * PAGE - 1), with(PAGE - 1));
    }
}
