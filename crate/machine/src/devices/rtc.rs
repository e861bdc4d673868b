//! The MC146818 real-time clock with its CMOS memory. The date at tick 0 is configuration; from
//! there it follows machine time.

use hypernest_cpu::Tick;
use serde::{Deserialize, Serialize};

/// Names from the Motorola MC146818 data sheet, "Registers".
mod spec {
    pub const SECONDS: usize = 0;
    pub const SECONDS_ALARM: usize = 1;
    pub const MINUTES: usize = 2;
    pub const MINUTES_ALARM: usize = 3;
    pub const HOURS: usize = 4;
    pub const HOURS_ALARM: usize = 5;
    pub const WEEKDAY: usize = 6;
    pub const DAY: usize = 7;
    pub const MONTH: usize = 8;
    pub const YEAR: usize = 9;
    pub const A: usize = 10;
    pub const B: usize = 11;
    pub const C: usize = 12;
    pub const D: usize = 13;
    /// Where PCs keep the century.
    pub const CENTURY: usize = 0x32;
    /// A: an update is about to happen.
    pub const UPDATE_IN_PROGRESS: u8 = 1 << 7;
    /// B: time stands still for setting.
    pub const SET: u8 = 1 << 7;
    /// B and C: periodic, alarm, update-ended interrupt.
    pub const PERIODIC: u8 = 1 << 6;
    pub const ALARM: u8 = 1 << 5;
    pub const UPDATE: u8 = 1 << 4;
    /// B: binary, not decimal.
    pub const BINARY: u8 = 1 << 2;
    /// B: 24 hours.
    pub const HOURS_24: u8 = 1 << 1;
    /// C: some enabled interrupt is pending.
    pub const IRQF: u8 = 1 << 7;
    /// D: time and memory are valid.
    pub const VALID: u8 = 1 << 7;
    /// Hours: afternoon, in 12-hour form.
    pub const PM: u8 = 1 << 7;
}

const SECOND: Tick = 1_000_000_000;
/// How long before an update register A announces it: 244 microseconds.
const ANNOUNCE: Tick = 244_000;
const DAY: u64 = 86_400;

/// All of the clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// Selected register (port 70h, without the NMI mask).
    pub index: u8,
    /// NMI mask (port 70h bit 7): kept for readers of the state, it masks nothing here.
    pub nmi_masked: bool,
    /// 128 bytes of registers and memory. While time runs, the time registers hold no truth.
    pub memory: Vec<u8>,
    /// Seconds since 1970 at `base_tick`.
    pub base_seconds: u64,
    /// Where the current second count began.
    pub base_tick: Tick,
    /// Flags of register C are settled up to here.
    pub settled: Tick,
}

/// Bytes of registers and memory.
const MEMORY: usize = 128;

impl RtcState {
    /// Whether a clock can come to it.
    pub(crate) fn is_possible(&self) -> bool {
        self.memory.len() == MEMORY && usize::from(self.index) < MEMORY
    }
}

/// The clock. Its whole content is [`RtcState`].
#[derive(Debug)]
pub struct Rtc {
    pub(crate) state: RtcState,
}

/// A date and time of day as the registers show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    year: u64,
    month: u64,
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
    /// 1 is Sunday.
    weekday: u64,
}

/// Civil date of a count of seconds since 1970-01-01.
fn date(seconds: u64) -> Date {
    let days = seconds / DAY;
    // Count years from March, so that the leap day is the last one; 400 years have 146097 days.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    Date {
        year: era * 400 + year_of_era + u64::from(month <= 2),
        month,
        day: day_of_year - (153 * from_march + 2) / 5 + 1,
        hour: seconds / 3600 % 24,
        minute: seconds / 60 % 60,
        second: seconds % 60,
        weekday: (days + 4) % 7 + 1,
    }
}

/// The reverse of [`date`]; fields out of range give some count, years before 1970 give 0.
fn seconds(date: Date) -> u64 {
    let year = date.year - u64::from(date.month <= 2).min(date.year);
    let from_march = (date.month + 9) % 12;
    let day_of_year = (153 * from_march + 2) / 5 + date.day.max(1) - 1;
    let year_of_era = year % 400;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = (year / 400 * 146_097 + day_of_era).saturating_sub(719_468);
    days * DAY + date.hour * 3600 + date.minute * 60 + date.second
}

impl Rtc {
    /// A clock that shows `epoch` seconds since 1970 at tick 0, in a machine with `ram` bytes and
    /// `cpus` processors.
    pub fn new(epoch: u64, ram: u64, cpus: u32) -> Rtc {
        let mut memory = vec![0; MEMORY];
        memory[spec::A] = 0x26;
        memory[spec::B] = spec::HOURS_24;
        memory[spec::D] = spec::VALID;
        let low = ram.min(hypernest_cpu::Ram::HOLE_START);
        let kib = |bytes: u64| (bytes >> 10).min(0xffff) as u16;
        let above_1m = kib(low.saturating_sub(1 << 20));
        let above_16m = (low.saturating_sub(16 << 20) >> 16).min(0xffff) as u16;
        let above_4g = (ram - low) >> 16;
        for (at, value) in [
            (0x15, 640),
            (0x17, above_1m),
            (0x30, above_1m),
            (0x34, above_16m),
            (0x5b, above_4g as u16),
        ] {
            memory[at..at + 2].copy_from_slice(&u16::to_le_bytes(value));
        }
        memory[0x5d] = (above_4g >> 16) as u8;
        memory[0x5f] = (cpus - 1).min(255) as u8;
        Rtc {
            state: RtcState {
                index: 0,
                nmi_masked: false,
                memory,
                base_seconds: epoch,
                base_tick: 0,
                settled: 0,
            },
        }
    }

    fn b(&self) -> u8 {
        self.state.memory[spec::B]
    }

    fn is_set(&self) -> bool {
        self.b() & spec::SET != 0
    }

    fn seconds_at(&self, now: Tick) -> u64 {
        let passed = now.saturating_sub(self.state.base_tick) / SECOND;
        self.state.base_seconds.saturating_add(passed)
    }

    fn encode(&self, value: u64) -> u8 {
        if self.b() & spec::BINARY != 0 {
            value as u8
        } else {
            (value / 10 % 10 * 16 + value % 10) as u8
        }
    }

    fn decode(&self, value: u8) -> u64 {
        if self.b() & spec::BINARY != 0 {
            u64::from(value)
        } else {
            u64::from(value >> 4) * 10 + u64::from(value & 0xf)
        }
    }

    fn encode_hour(&self, hour: u64) -> u8 {
        if self.b() & spec::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { spec::PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, value: u8) -> u64 {
        if self.b() & spec::HOURS_24 != 0 {
            return self.decode(value);
        }
        let afternoon = if value & spec::PM != 0 { 12 } else { 0 };
        self.decode(value & !spec::PM) % 12 + afternoon
    }

    /// Copies the running time into the registers.
    fn show(&mut self, now: Tick) {
        if self.is_set() {
            return;
        }
        let date = date(self.seconds_at(now));
        for (at, value) in [
            (spec::SECONDS, self.encode(date.second)),
            (spec::MINUTES, self.encode(date.minute)),
            (spec::HOURS, self.encode_hour(date.hour)),
            (spec::WEEKDAY, self.encode(date.weekday)),
            (spec::DAY, self.encode(date.day)),
            (spec::MONTH, self.encode(date.month)),
            (spec::YEAR, self.encode(date.year % 100)),
            (spec::CENTURY, self.encode(date.year / 100)),
        ] {
            self.state.memory[at] = value;
        }
    }

    /// Starts time from what the registers say.
    fn set_time(&mut self, now: Tick) {
        let memory = &self.state.memory;
        let shown = Date {
            year: self.decode(memory[spec::CENTURY]) * 100 + self.decode(memory[spec::YEAR]),
            month: self.decode(memory[spec::MONTH]),
            day: self.decode(memory[spec::DAY]),
            hour: self.decode_hour(memory[spec::HOURS]),
            minute: self.decode(memory[spec::MINUTES]),
            second: self.decode(memory[spec::SECONDS]),
            weekday: 1,
        };
        self.state.base_seconds = seconds(shown);
        self.state.base_tick = now;
    }

    /// Ticks between two periodic interrupts, where the rate selects any.
    fn period(&self) -> Option<Tick> {
        let rate = match self.state.memory[spec::A] & 0xf {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        // 2^(rate-1) cycles of 32768 Hz; rounded down, at least 122070 ticks.
        Some((SECOND << (rate - 1)) >> 15)
    }

    fn alarm_matches(&self, seconds: u64) -> bool {
        let memory = &self.state.memory;
        let date = date(seconds);
        let field = |at: usize, value: u8| memory[at] & 0xc0 == 0xc0 || memory[at] == value;
        field(spec::SECONDS_ALARM, self.encode(date.second))
            && field(spec::MINUTES_ALARM, self.encode(date.minute))
            && field(spec::HOURS_ALARM, self.encode_hour(date.hour))
    }

    /// Brings the flags of register C up to `now`.
    fn settle(&mut self, now: Tick) {
        let since = self.state.settled.max(self.state.base_tick);
        self.state.settled = now.max(self.state.settled);
        if now <= since {
            return;
        }
        let base = self.state.base_tick;
        let mut flags = 0;
        if let Some(period) = self.period()
            && (now - base) / period > (since - base) / period
        {
            flags |= spec::PERIODIC;
        }
        if !self.is_set() {
            let (from, to) = (self.seconds_at(since), self.seconds_at(now));
            if to > from {
                flags |= spec::UPDATE;
                // An alarm matches at least once a day or never.
                if (from + 1..=to.min(from + DAY)).any(|second| self.alarm_matches(second)) {
                    flags |= spec::ALARM;
                }
            }
        }
        self.raise(flags);
    }

    fn raise(&mut self, flags: u8) {
        let c = self.state.memory[spec::C] & !spec::IRQF | flags;
        let pending = c & self.b() & (spec::PERIODIC | spec::ALARM | spec::UPDATE) != 0;
        self.state.memory[spec::C] = c | if pending { spec::IRQF } else { 0 };
    }

    /// Level of the interrupt output.
    pub fn line(&self) -> bool {
        self.state.memory[spec::C] & spec::IRQF != 0
    }

    /// When an enabled interrupt may come next.
    pub fn deadline(&self) -> Option<Tick> {
        let b = self.b();
        if self.line() || b & (spec::PERIODIC | spec::ALARM | spec::UPDATE) == 0 {
            return None;
        }
        let base = self.state.base_tick;
        let next = |period: Tick| {
            let passed = self.state.settled.saturating_sub(base) / period;
            base.saturating_add((passed + 1).saturating_mul(period))
        };
        let periodic = (b & spec::PERIODIC != 0)
            .then(|| self.period().map(next))
            .flatten();
        let second =
            (b & (spec::ALARM | spec::UPDATE) != 0 && b & spec::SET == 0).then(|| next(SECOND));
        periodic.into_iter().chain(second).min()
    }

    /// Does what is due.
    pub fn advance(&mut self, now: Tick) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.settle(now);
        }
    }

    /// Reads port 70h or 71h.
    pub fn read(&mut self, now: Tick, port: u16) -> u8 {
        if port & 1 == 0 {
            return 0xff; // write-only
        }
        let index = usize::from(self.state.index);
        match index {
            spec::A => {
                let announced = !self.is_set()
                    && SECOND - now.saturating_sub(self.state.base_tick) % SECOND <= ANNOUNCE;
                self.state.memory[spec::A]
                    | if announced {
                        spec::UPDATE_IN_PROGRESS
                    } else {
                        0
                    }
            }
            spec::C => {
                self.settle(now);
                std::mem::take(&mut self.state.memory[spec::C])
            }
            _ => {
                self.show(now);
                self.state.memory[index]
            }
        }
    }

    /// Writes port 70h or 71h.
    pub fn write(&mut self, now: Tick, port: u16, value: u8) {
        if port & 1 == 0 {
            self.state.index = value & 0x7f;
            self.state.nmi_masked = value & 0x80 != 0;
            return;
        }
        self.settle(now);
        let index = usize::from(self.state.index);
        match index {
            spec::A => self.state.memory[spec::A] = value & 0x7f,
            spec::B => {
                self.show(now);
                let was_set = self.is_set();
                self.state.memory[spec::B] = if value & spec::SET != 0 {
                    value & !spec::UPDATE
                } else {
                    value
                };
                if was_set && !self.is_set() {
                    self.set_time(now);
                }
                self.raise(0);
            }
            spec::C | spec::D => {}
            spec::SECONDS
            | spec::MINUTES
            | spec::HOURS
            | spec::WEEKDAY..=spec::YEAR
            | spec::CENTURY => {
                self.show(now);
                self.state.memory[index] = value;
                if !self.is_set() {
                    self.set_time(now);
                }
            }
            _ => self.state.memory[index] = value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-22 19:30:58 UTC, a Sunday.
    const EPOCH: u64 = 1_795_375_858;

    fn rtc() -> Rtc {
        Rtc::new(EPOCH, 512 << 20, 2)
    }

    fn get(rtc: &mut Rtc, now: Tick, register: u8) -> u8 {
        rtc.write(now, 0x70, register);
        rtc.read(now, 0x71)
    }

    fn set(rtc: &mut Rtc, now: Tick, register: u8, value: u8) {
        rtc.write(now, 0x70, register);
        rtc.write(now, 0x71, value);
    }

    fn shown(rtc: &mut Rtc, now: Tick) -> Vec<u8> {
        [0x32, 9, 8, 7, 6, 4, 2, 0]
            .map(|register| get(rtc, now, register))
            .to_vec()
    }

    #[test]
    fn the_date_is_decimal_and_follows_the_ticks() {
        let mut rtc = rtc();
        assert_eq!(
            shown(&mut rtc, 0),
            [0x20, 0x26, 0x11, 0x22, 0x01, 0x19, 0x30, 0x58]
        );
        let later = 4 * 3600 * SECOND + 29 * 60 * SECOND + 2 * SECOND;
        assert_eq!(
            shown(&mut rtc, later),
            [0x20, 0x26, 0x11, 0x23, 0x02, 0x00, 0x00, 0x00]
        );
    }

    #[test]
    fn dates_and_seconds_are_each_others_reverse() {
        for day in (0..60_000).step_by(7) {
            assert_eq!(seconds(date(day * DAY + 12345)), day * DAY + 12345);
        }
        let leap = date(1_709_164_800);
        assert_eq!((leap.year, leap.month, leap.day), (2024, 2, 29));
    }

    #[test]
    fn binary_and_12_hour_forms() {
        let mut rtc = rtc();
        set(&mut rtc, 0, 0x0b, 0x04);
        assert_eq!(get(&mut rtc, 0, 4), 0x80 | 7);
        assert_eq!(get(&mut rtc, 0, 0), 58);
    }

    #[test]
    fn setting_stops_time_and_starts_it_from_the_registers() {
        let mut rtc = rtc();
        set(&mut rtc, 0, 0x0b, 0x82);
        set(&mut rtc, SECOND, 4, 0x23);
        set(&mut rtc, SECOND, 2, 0x59);
        assert_eq!(get(&mut rtc, 5 * SECOND, 0), 0x58);
        set(&mut rtc, 5 * SECOND, 0x0b, 0x02);
        assert_eq!(
            shown(&mut rtc, 7 * SECOND),
            [0x20, 0x26, 0x11, 0x23, 0x02, 0, 0, 0]
        );
    }

    #[test]
    fn an_update_is_announced_just_before_the_second() {
        let mut rtc = rtc();
        assert_eq!(get(&mut rtc, SECOND / 2, 0x0a), 0x26);
        assert_eq!(get(&mut rtc, SECOND - 1000, 0x0a), 0xa6);
        assert_eq!(get(&mut rtc, SECOND, 0x0a), 0x26);
    }

    #[test]
    fn the_periodic_interrupt_comes_at_its_rate_and_reading_c_ends_it() {
        let mut rtc = rtc();
        set(&mut rtc, 0, 0x0b, 0x42);
        let due = rtc.deadline().unwrap();
        assert_eq!(due, SECOND / 1024);
        rtc.advance(due);
        assert!(rtc.line());
        assert_eq!(rtc.deadline(), None);
        assert_eq!(get(&mut rtc, due, 0x0c), 0xc0);
        assert!(!rtc.line());
        assert_eq!(rtc.deadline(), Some(2 * (SECOND / 1024)));
    }

    #[test]
    fn the_alarm_comes_at_its_time() {
        let mut rtc = rtc();
        set(&mut rtc, 0, 1, 0x00);
        set(&mut rtc, 0, 3, 0xff);
        set(&mut rtc, 0, 5, 0xff);
        set(&mut rtc, 0, 0x0b, 0x22);
        rtc.advance(SECOND);
        assert!(!rtc.line());
        rtc.advance(2 * SECOND);
        assert!(rtc.line());
        assert_eq!(get(&mut rtc, 2 * SECOND, 0x0c), 0xf0);
    }

    #[test]
    fn update_ended_comes_every_second() {
        let mut rtc = rtc();
        set(&mut rtc, 10, 0x0b, 0x12);
        assert_eq!(rtc.deadline(), Some(SECOND));
        rtc.advance(SECOND);
        assert!(rtc.line());
    }

    #[test]
    fn memory_tells_the_ram_size_and_keeps_what_is_written() {
        let mut rtc = rtc();
        assert_eq!(get(&mut rtc, 0, 0x34), 0x00);
        assert_eq!(get(&mut rtc, 0, 0x35), 0x1f);
        assert_eq!(get(&mut rtc, 0, 0x5f), 1);
        set(&mut rtc, 0, 0x60, 0xa5);
        assert_eq!(get(&mut rtc, 0, 0x60), 0xa5);
    }

    #[test]
    fn nonsense_in_the_registers_is_harmless() {
        let mut rtc = rtc();
        for register in 0..128 {
            for value in [0, 0x5a, 0xff] {
                set(&mut rtc, 1 << 40, register, value);
                rtc.advance(u64::MAX / 2);
                get(&mut rtc, u64::MAX, register);
            }
        }
    }
}
