//! How fast: the link's rate, a limit on it, and the guest's share of the time.

/// Bytes that the limit lets through at once after a rest: this much of a second's.
const BURST: u64 = 50_000;
/// A link's rate is measured over this many microseconds at least.
const MEASURE: u64 = 20_000;
/// What the guest and the sending owe each other is forgotten beyond this many microseconds.
const OWED: f64 = 50_000.0;
/// The guest's share while there is something to send.
const SHARED: f64 = 0.5;
/// Its least share.
const LEAST: f64 = 0.01;

/// A limit on bytes per second.
#[derive(Debug)]
pub struct Limit {
    /// Bytes per second; `None` is no limit.
    rate: Option<u64>,
    /// Bytes that may go now; negative after a frame that was longer.
    allowed: i64,
    at: u64,
}

impl Limit {
    /// From time `now` on.
    pub fn new(rate: Option<u64>, now: u64) -> Limit {
        Limit {
            rate: rate.map(|rate| rate.max(1)),
            allowed: 0,
            at: now,
        }
    }

    /// Whether something may go at time `now`; else the microseconds until it may.
    pub fn ask(&mut self, now: u64) -> Result<(), u64> {
        let Some(rate) = self.rate else {
            return Ok(());
        };
        let earned = |time: u64| i64::try_from(u128::from(time) * u128::from(rate) / 1_000_000);
        let gained = earned(now.saturating_sub(self.at)).unwrap_or(i64::MAX);
        // Time that earned less than a byte still counts.
        if gained > 0 {
            self.at = now;
            let most = earned(BURST).unwrap_or(i64::MAX).max(1);
            self.allowed = self.allowed.saturating_add(gained).min(most);
        }
        if self.allowed > 0 {
            return Ok(());
        }
        let missing = self.allowed.unsigned_abs() + 1;
        let time = u128::from(missing) * 1_000_000 / u128::from(rate) + 1;
        Err(u64::try_from(time).unwrap_or(u64::MAX))
    }

    /// So many bytes went.
    pub fn took(&mut self, bytes: usize) {
        if self.rate.is_some() {
            self.allowed = self.allowed.saturating_sub(bytes as i64);
        }
    }
}

/// Bytes per second that go over a link.
#[derive(Debug)]
pub struct Rate {
    /// Bytes that had gone at this time.
    from: (u64, u64),
    rate: Option<f64>,
}

impl Rate {
    /// Nothing has gone at time `now`.
    pub fn new(now: u64) -> Rate {
        Rate {
            from: (0, now),
            rate: None,
        }
    }

    /// `bytes` have gone in all at time `now`, and there were always more to send.
    pub fn at(&mut self, bytes: u64, now: u64) {
        let time = now.saturating_sub(self.from.1);
        let gone = bytes.saturating_sub(self.from.0);
        if time < MEASURE || gone == 0 {
            return;
        }
        let measured = gone as f64 * 1e6 / time as f64;
        self.rate = Some(match self.rate {
            Some(rate) => 0.7 * rate + 0.3 * measured,
            None => measured,
        });
        self.from = (bytes, now);
    }

    /// There was nothing to send: time until now does not count.
    pub fn pause(&mut self, bytes: u64, now: u64) {
        self.from = (bytes, now);
    }

    /// Microseconds for `bytes`.
    pub fn time(&self, bytes: u64) -> u64 {
        // Before anything was measured: as memory is copied.
        let rate = self.rate.unwrap_or(500e6);
        (bytes as f64 * 1e6 / rate) as u64
    }

    /// Bytes per second, where it was measured.
    pub fn per_second(&self) -> Option<u64> {
        self.rate.map(|rate| rate as u64)
    }
}

/// Whose turn it is: the guest's or the sending's.
#[derive(Debug)]
pub struct Share {
    /// What the guest may have at most, 0 to 1.
    most: f64,
    /// Microseconds that the guest had beyond its share.
    beyond: f64,
    at: u64,
    guest: bool,
}

impl Share {
    /// The guest runs, at time `now`.
    pub fn new(now: u64) -> Share {
        Share {
            most: 1.0,
            beyond: 0.0,
            at: now,
            guest: true,
        }
    }

    /// Time has passed since the last call, in the guest or not. `busy`: there was something to send.
    pub fn pass(&mut self, now: u64, busy: bool) {
        let time = now.saturating_sub(self.at) as f64;
        self.at = now;
        let share = if busy {
            self.most.min(SHARED)
        } else {
            self.most
        };
        let owed = if self.guest {
            time * (1.0 - share)
        } else {
            -time * share
        };
        self.beyond = (self.beyond + owed).clamp(-OWED, OWED);
    }

    /// Whether the guest has had its share.
    pub fn is_used(&self) -> bool {
        self.beyond > 0.0
    }

    /// Whether the guest had the time before the last call.
    pub fn was_guest(&self) -> bool {
        self.guest
    }

    /// Who gets the time from now on.
    pub fn give(&mut self, guest: bool) {
        self.guest = guest;
    }

    /// Halves the guest's share. False when it has the least already.
    pub fn halve(&mut self) -> bool {
        let before = self.most;
        self.most = (self.most.min(SHARED) / 2.0).max(LEAST);
        self.most < before
    }

    /// The guest's share at most, in percent.
    pub fn percent(&self) -> u32 {
        (self.most * 100.0).round() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_over_any_time() {
        let mut limit = Limit::new(Some(1_000_000), 0);
        let (mut now, mut sent) = (0, 0);
        while now < 10_000_000 {
            match limit.ask(now) {
                Ok(()) => {
                    limit.took(30_000);
                    sent += 30_000;
                }
                Err(time) => now += time,
            }
        }
        assert!((9_900_000..=10_100_000).contains(&sent), "{sent}");
        // A rest does not add up.
        now += 1_000_000_000;
        let mut burst = 0;
        while limit.ask(now).is_ok() {
            limit.took(1000);
            burst += 1000;
        }
        assert!(burst <= 51_000, "{burst}");
        assert_eq!(Limit::new(None, 0).ask(0), Ok(()));
    }

    #[test]
    fn the_guest_gets_its_share_and_less_when_it_is_halved() {
        let mut share = Share::new(0);
        let run = |share: &mut Share, busy: bool| {
            let (mut now, mut guest) = (share.at, 0);
            for _ in 0..10_000 {
                let turn = !share.is_used();
                share.give(turn);
                let time = if turn { 700 } else { 100 };
                guest += if turn { time } else { 0 };
                now += time;
                share.pass(now, busy);
            }
            guest as f64 / now as f64
        };
        assert!(run(&mut share, false) > 0.99);
        let mut share = Share::new(0);
        assert!((run(&mut share, true) - 0.5).abs() < 0.01);
        assert!(share.halve() && share.halve());
        let mut fresh = Share {
            most: share.most,
            ..Share::new(0)
        };
        assert!((run(&mut fresh, true) - 0.125).abs() < 0.01);
        while share.halve() {}
        assert_eq!(share.percent(), 1);
    }

    #[test]
    fn a_rate_is_that_of_the_link() {
        let mut rate = Rate::new(0);
        for step in 1..100 {
            rate.at(step * 1000, step * 1000);
        }
        assert_eq!(rate.per_second(), Some(1_000_000));
        assert_eq!(rate.time(500_000), 500_000);
        rate.pause(100_000, 10_000_000);
        rate.at(120_000, 10_020_000);
        assert_eq!(rate.per_second(), Some(1_000_000));
    }
}
