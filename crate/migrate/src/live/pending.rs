//! Pages that still have to be sent: a set of numbers that is gone through in rising order.

/// The set.
#[derive(Debug)]
pub struct Pending {
    words: Vec<u64>,
    count: u32,
    /// No word before this one has a bit.
    at: usize,
}

impl Pending {
    /// All of `pages` pages. `None` where the host has no memory for it.
    pub fn all(pages: u32) -> Option<Pending> {
        let length = pages.div_ceil(64) as usize;
        let mut words = Vec::new();
        words.try_reserve_exact(length).ok()?;
        words.resize(length, u64::MAX);
        if let Some(last) = words.last_mut()
            && !pages.is_multiple_of(64)
        {
            *last = (1 << (pages % 64)) - 1;
        }
        Some(Pending {
            words,
            count: pages,
            at: 0,
        })
    }

    /// Puts pages in; those that there are not are left out.
    pub fn add(&mut self, pages: &[u32]) {
        for &page in pages {
            let at = page as usize / 64;
            if let Some(word) = self.words.get_mut(at) {
                let bit = 1 << (page % 64);
                self.count += u32::from(*word & bit == 0);
                *word |= bit;
                self.at = self.at.min(at);
            }
        }
    }

    /// How many there are.
    pub fn left(&self) -> u32 {
        self.count
    }

    /// Whether there is none.
    pub fn is_done(&self) -> bool {
        self.count == 0
    }
}

impl Iterator for Pending {
    type Item = u32;

    /// Takes the least one out.
    fn next(&mut self) -> Option<u32> {
        while let Some(word) = self.words.get_mut(self.at) {
            if *word != 0 {
                let bit = word.trailing_zeros();
                *word &= *word - 1;
                self.count -= 1;
                return Some(self.at as u32 * 64 + bit);
            }
            self.at += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_out_once_in_rising_order() {
        let mut pending = Pending::all(130).unwrap();
        assert_eq!(pending.left(), 130);
        assert!(pending.by_ref().eq(0..130));
        assert!(pending.is_done());
        pending.add(&[129, 5, 5, 64, 4000]);
        assert_eq!(pending.left(), 3);
        assert_eq!(pending.next(), Some(5));
        pending.add(&[1]);
        assert!(pending.by_ref().eq([1, 64, 129]));
        assert_eq!((pending.next(), pending.left()), (None, 0));
        assert!(Pending::all(128).unwrap().eq(0..128));
    }
}
