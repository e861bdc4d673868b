//! The 8254 interval timer and port 61h: channel 0 is the timer interrupt, channel 1 once
//! refreshed memory, channel 2 makes the speaker's tone and measures time.

use hypernest_cpu::Tick;
use serde::{Deserialize, Serialize};

/// Input clock in Hz.
pub const FREQUENCY: u64 = 1_193_182;

/// Names from the Intel 8254 data sheet, "Control Word Format" and "Read-Back Command".
mod spec {
    /// Port of the control word.
    pub const CONTROL: u16 = 3;
    /// Control word: select counter 3 means read-back.
    pub const READ_BACK: u8 = 3;
    /// Read-back: leave the counts alone (active low).
    pub const NO_COUNT: u8 = 1 << 5;
    /// Read-back: leave the status alone (active low).
    pub const NO_STATUS: u8 = 1 << 4;
    /// Status: level of OUT.
    pub const STATUS_OUT: u8 = 1 << 7;
    /// Status: no count loaded yet.
    pub const STATUS_NULL: u8 = 1 << 6;
    /// Port 61h: gate of channel 2.
    pub const GATE: u8 = 1 << 0;
    /// Port 61h: channel 2 to the speaker.
    pub const SPEAKER: u8 = 1 << 1;
    /// Port 61h: toggles with each memory refresh.
    pub const REFRESH: u8 = 1 << 4;
    /// Port 61h: OUT of channel 2.
    pub const OUT2: u8 = 1 << 5;
    /// Ticks between two memory refreshes.
    pub const REFRESH_TICKS: u64 = 15_085;
}

const SECOND: u128 = 1_000_000_000;

/// Clock pulses within `ticks`.
fn pulses(ticks: Tick) -> u64 {
    (u128::from(ticks) * u128::from(FREQUENCY) / SECOND) as u64
}

/// The first tick at which `pulses` have passed.
fn ticks(pulses: u64) -> Tick {
    let ticks = (u128::from(pulses) * SECOND).div_ceil(u128::from(FREQUENCY));
    u64::try_from(ticks).unwrap_or(Tick::MAX)
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// Mode 0-5.
    pub mode: u8,
    /// The count is in decimal.
    pub bcd: bool,
    /// Bytes per access: 1 low, 2 high, 3 low then high.
    pub access: u8,
    /// Count, 1 to 10000h; 0 when none was written since the control word.
    pub count: u32,
    /// Count that a periodic mode takes up at a number of pulses since `start`.
    pub next_count: Option<(u64, u32)>,
    /// Tick at which counting began.
    pub start: Tick,
    /// Level of the gate.
    pub gate: bool,
    /// Pulses that had passed when a low gate stopped counting.
    pub paused: Option<u64>,
    /// A rising gate has started a count (modes 1 and 5).
    pub triggered: bool,
    /// First byte of a two-byte write.
    pub write_low: Option<u8>,
    /// The next read of a two-byte pair gives the high byte.
    pub read_high: bool,
    /// Latched count.
    pub latched_count: Option<u16>,
    /// Latched status.
    pub latched_status: Option<u8>,
}

impl ChannelState {
    /// A counter that has never been programmed: its output is high.
    fn new(gate: bool) -> ChannelState {
        ChannelState {
            mode: 3,
            bcd: false,
            access: 3,
            count: 0,
            next_count: None,
            start: 0,
            gate,
            paused: None,
            triggered: false,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Pulses counted so far, or `None` while nothing counts.
    fn elapsed(&self, now: Tick) -> Option<u64> {
        if self.count == 0 || (matches!(self.mode, 1 | 5) && !self.triggered) {
            return None;
        }
        Some(
            self.paused
                .unwrap_or_else(|| pulses(now.saturating_sub(self.start))),
        )
    }

    /// Takes up a waiting count whose time has come.
    fn settle(&mut self, now: Tick) {
        if let (Some((at, count)), Some(elapsed)) = (self.next_count, self.elapsed(now))
            && elapsed >= at
        {
            self.start = self.start.saturating_add(ticks(at));
            self.count = count;
            self.next_count = None;
        }
    }

    /// Level of OUT.
    fn out(&self, now: Tick) -> bool {
        let count = u64::from(self.count);
        let Some(elapsed) = self.elapsed(now) else {
            return self.mode != 0;
        };
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => self.paused.is_some() || elapsed % count != count - 1,
            3 => self.paused.is_some() || elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// The next tick after `now` at which OUT changes (mode 2: ends its low pulse).
    fn next_change(&self, now: Tick) -> Option<Tick> {
        if self.paused.is_some() {
            return None;
        }
        let count = u64::from(self.count);
        let elapsed = self.elapsed(now)?;
        let at = match self.mode {
            0 | 1 => (elapsed < count).then_some(count)?,
            2 => (elapsed / count + 1) * count,
            3 => {
                let phase = elapsed % count;
                let half = count.div_ceil(2);
                elapsed - phase + if phase < half { half } else { count }
            }
            _ if elapsed < count => count,
            _ => (elapsed == count).then_some(count + 1)?,
        };
        // A count that waits changes the period first.
        let at = self.next_count.map_or(at, |(reload, _)| at.min(reload));
        Some(self.start.saturating_add(ticks(at)))
    }

    /// The value of the counting element as a guest reads it.
    fn current(&self, now: Tick) -> u16 {
        let count = u64::from(self.count);
        let value = match self.elapsed(now) {
            None => count,
            Some(elapsed) => match self.mode {
                2 => count - elapsed % count,
                3 => count - (2 * elapsed) % count,
                _ => count.wrapping_sub(elapsed),
            },
        };
        if self.bcd {
            let value = value.rem_euclid(10_000);
            let digit = |power: u64| (value / power % 10) as u16;
            digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)
        } else {
            value as u16
        }
    }

    fn load(&mut self, now: Tick, raw: u16) {
        let count = if self.bcd {
            let digit = |shift: u16| u32::from(raw >> shift & 0xf);
            match digit(12) * 1000 + digit(8) * 100 + digit(4) * 10 + digit(0) {
                0 => 10_000,
                count => count,
            }
        } else if raw == 0 {
            0x1_0000
        } else {
            u32::from(raw)
        };
        self.settle(now);
        if self.is_periodic()
            && let Some(elapsed) = self.elapsed(now)
        {
            let period = u64::from(self.count);
            self.next_count = Some(((elapsed / period + 1) * period, count));
            if self.paused.is_none() {
                return;
            }
        }
        self.count = count;
        self.next_count = None;
        if !matches!(self.mode, 1 | 5) {
            self.start = now;
            self.paused = (!self.gate).then_some(0);
        }
    }

    fn write_count(&mut self, now: Tick, value: u8) {
        match (self.access, self.write_low.take()) {
            (1, _) => self.load(now, u16::from(value)),
            (2, _) => self.load(now, u16::from(value) << 8),
            (_, Some(low)) => self.load(now, u16::from_le_bytes([low, value])),
            (_, None) => self.write_low = Some(value),
        }
    }

    fn read_count(&mut self, now: Tick) -> u8 {
        self.settle(now);
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched_count
            .unwrap_or_else(|| self.current(now))
            .to_le_bytes();
        let (value, done) = match self.access {
            1 => (low, true),
            2 => (high, true),
            _ if self.read_high => (high, true),
            _ => (low, false),
        };
        self.read_high = !done;
        if done {
            self.latched_count = None;
        }
        value
    }

    fn latch_count(&mut self, now: Tick) {
        self.settle(now);
        if self.latched_count.is_none() {
            self.latched_count = Some(self.current(now));
        }
    }

    fn latch_status(&mut self, now: Tick) {
        self.settle(now);
        if self.latched_status.is_none() {
            let mut status = self.access << 4 | self.mode << 1 | u8::from(self.bcd);
            if self.out(now) {
                status |= spec::STATUS_OUT;
            }
            if self.count == 0 || self.next_count.is_some() {
                status |= spec::STATUS_NULL;
            }
            self.latched_status = Some(status);
        }
    }

    fn set_mode(&mut self, access: u8, control: u8) {
        *self = ChannelState {
            mode: match control >> 1 & 7 {
                mode @ 6..=7 => mode - 4,
                mode => mode,
            },
            bcd: control & 1 != 0,
            access,
            ..ChannelState::new(self.gate)
        };
    }

    fn set_gate(&mut self, now: Tick, gate: bool) {
        if gate == self.gate {
            return;
        }
        self.settle(now);
        self.gate = gate;
        match self.mode {
            1 | 5 => {
                if gate {
                    self.start = now;
                    self.triggered = true;
                }
            }
            _ if self.count == 0 => {}
            _ if !gate => self.paused = self.elapsed(now),
            mode => {
                let counted = self.paused.take().unwrap_or(0);
                // Periodic modes begin anew, the others go on.
                self.start = if matches!(mode, 2 | 3) {
                    now
                } else {
                    now.saturating_sub(ticks(counted))
                };
            }
        }
    }
}

/// All of the timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// Counters 0-2.
    pub channels: [ChannelState; 3],
    /// Port 61h: the speaker hears channel 2.
    pub speaker: bool,
    /// The next tick at which channel 0's output changes.
    pub next_change: Option<Tick>,
}

impl PitState {
    /// Whether a timer can come to it.
    pub(crate) fn is_possible(&self) -> bool {
        const MOST: u32 = 0x1_0000;
        // Pulses in all ticks there can be, and a count more.
        let most_pulses = pulses(Tick::MAX) + u64::from(MOST);
        self.channels.iter().all(|channel| {
            let next = channel
                .next_count
                .is_none_or(|(at, count)| at <= most_pulses && (1..=MOST).contains(&count));
            channel.mode <= 5
                && (1..=3).contains(&channel.access)
                && channel.count <= MOST
                && channel.paused.is_none_or(|pulses| pulses <= most_pulses)
                && next
        })
    }
}

/// What channel 0's output did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// It fell and rose again.
    pub pulse: bool,
    /// Its level now.
    pub level: bool,
}

/// The timer. Its whole content is [`PitState`].
#[derive(Debug)]
pub struct Pit {
    pub(crate) state: PitState,
}

impl Default for Pit {
    fn default() -> Pit {
        Pit {
            state: PitState {
                channels: [
                    ChannelState::new(true),
                    ChannelState::new(true),
                    ChannelState::new(false),
                ],
                speaker: false,
                next_change: None,
            },
        }
    }
}

impl Pit {
    /// Reads port 40h + `register`.
    pub fn read(&mut self, now: Tick, register: u16) -> u8 {
        match register {
            0..=2 => self.state.channels[usize::from(register)].read_count(now),
            _ => 0xff, // the control word cannot be read
        }
    }

    /// Writes port 40h + `register`.
    pub fn write(&mut self, now: Tick, register: u16, value: u8) {
        if register != spec::CONTROL {
            if let Some(channel) = self.state.channels.get_mut(usize::from(register)) {
                channel.write_count(now, value);
            }
        } else if value >> 6 == spec::READ_BACK {
            for (index, channel) in self.state.channels.iter_mut().enumerate() {
                if value & (2 << index) != 0 {
                    if value & spec::NO_COUNT == 0 {
                        channel.latch_count(now);
                    }
                    if value & spec::NO_STATUS == 0 {
                        channel.latch_status(now);
                    }
                }
            }
        } else {
            let channel = &mut self.state.channels[usize::from(value >> 6)];
            match value >> 4 & 3 {
                0 => channel.latch_count(now),
                access => channel.set_mode(access, value),
            }
        }
        self.state.next_change = self.state.channels[0].next_change(now);
    }

    /// Reads port 61h.
    pub fn read_port_61(&mut self, now: Tick) -> u8 {
        let channel = &mut self.state.channels[2];
        channel.settle(now);
        let mut value = 0;
        for (bit, set) in [
            (spec::GATE, channel.gate),
            (spec::SPEAKER, self.state.speaker),
            (spec::REFRESH, now / spec::REFRESH_TICKS % 2 == 1),
            (spec::OUT2, channel.out(now)),
        ] {
            if set {
                value |= bit;
            }
        }
        value
    }

    /// Writes port 61h.
    pub fn write_port_61(&mut self, now: Tick, value: u8) {
        self.state.channels[2].set_gate(now, value & spec::GATE != 0);
        self.state.speaker = value & spec::SPEAKER != 0;
    }

    /// Level of channel 0's output.
    pub fn output(&self, now: Tick) -> bool {
        self.state.channels[0].out(now)
    }

    /// When channel 0's output changes next.
    pub fn deadline(&self) -> Option<Tick> {
        self.state.next_change
    }

    /// Does what is due. Changes that were missed because nobody called count once.
    pub fn advance(&mut self, now: Tick) -> Option<Output> {
        if self.state.next_change? > now {
            return None;
        }
        let channel = &mut self.state.channels[0];
        channel.settle(now);
        self.state.next_change = channel.next_change(now);
        Some(Output {
            pulse: channel.mode != 0 && channel.mode != 1,
            level: channel.out(now),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(pit: &mut Pit, now: Tick, control: u8, count: u16) {
        pit.write(now, 3, control);
        let port = u16::from(control >> 6);
        pit.write(now, port, count as u8);
        pit.write(now, port, (count >> 8) as u8);
    }

    fn count(pit: &mut Pit, now: Tick, port: u16) -> u16 {
        u16::from_le_bytes([pit.read(now, port), pit.read(now, port)])
    }

    #[test]
    fn mode_2_interrupts_at_every_period_without_drift() {
        let mut pit = Pit::default();
        program(&mut pit, 1000, 0x34, 11932);
        for period in 1..=100 {
            let due = pit.deadline().unwrap();
            assert_eq!(due, 1000 + ticks(period * 11932));
            assert!(pit.advance(due - 1).is_none());
            assert_eq!(
                pit.advance(due),
                Some(Output {
                    pulse: true,
                    level: true
                })
            );
        }
    }

    #[test]
    fn mode_0_rises_once_at_terminal_count_and_goes_on_counting() {
        let mut pit = Pit::default();
        program(&mut pit, 0, 0x30, 100);
        assert!(!pit.output(0));
        let due = pit.deadline().unwrap();
        assert_eq!(due, ticks(100));
        assert!(pit.advance(due).unwrap().level);
        assert_eq!(pit.deadline(), None);
        assert_eq!(count(&mut pit, ticks(101), 0), 0xffff);
    }

    #[test]
    fn mode_3_is_a_square_wave_that_counts_by_two() {
        let mut pit = Pit::default();
        program(&mut pit, 0, 0x36, 1000);
        assert!(pit.output(ticks(499)));
        assert!(!pit.output(ticks(500)));
        assert_eq!(count(&mut pit, ticks(10), 0), 980);
        assert!(!pit.advance(ticks(500)).unwrap().level);
        assert_eq!(pit.deadline(), Some(ticks(1000)));
        assert!(pit.advance(ticks(1000)).unwrap().level);
    }

    #[test]
    fn mode_4_strobes_low_for_one_clock() {
        let mut pit = Pit::default();
        program(&mut pit, 0, 0x38, 50);
        assert!(pit.output(ticks(49)));
        assert!(!pit.output(ticks(50)));
        assert!(pit.output(ticks(51)));
        pit.advance(ticks(50));
        assert_eq!(pit.deadline(), Some(ticks(51)));
        pit.advance(ticks(51));
        assert_eq!(pit.deadline(), None);
    }

    #[test]
    fn a_new_count_in_mode_2_waits_for_the_end_of_the_period() {
        let mut pit = Pit::default();
        program(&mut pit, 0, 0x34, 1000);
        pit.write(ticks(10), 0, 0xf4);
        pit.write(ticks(10), 0, 0x01);
        assert_eq!(count(&mut pit, ticks(20), 0), 980);
        let due = pit.deadline().unwrap();
        assert_eq!(due, ticks(1000));
        pit.advance(due);
        assert_eq!(pit.deadline(), Some(due + ticks(500)));
    }

    #[test]
    fn a_latched_count_stays_until_it_is_read() {
        let mut pit = Pit::default();
        program(&mut pit, 0, 0x34, 1000);
        pit.write(ticks(100), 3, 0x00);
        assert_eq!(count(&mut pit, ticks(300), 0), 900);
        assert_eq!(count(&mut pit, ticks(300), 0), 700);
    }

    #[test]
    fn read_back_latches_status_before_count() {
        let mut pit = Pit::default();
        program(&mut pit, 0, 0xb6, 1000);
        pit.write_port_61(0, 1);
        pit.write(ticks(600), 3, 0xc8);
        assert_eq!(pit.read(0, 2), 0x36);
        assert_eq!(count(&mut pit, ticks(700), 2), 1000 - 200);
    }

    #[test]
    fn channel_2_counts_only_while_its_gate_is_high() {
        let mut pit = Pit::default();
        program(&mut pit, 0, 0xb0, 1000);
        assert_eq!(count(&mut pit, ticks(500), 2), 1000);
        pit.write_port_61(ticks(500), 1);
        assert_eq!(count(&mut pit, ticks(600), 2), 900);
        pit.write_port_61(ticks(600), 0);
        assert_eq!(count(&mut pit, ticks(900), 2), 900);
        pit.write_port_61(ticks(900), 3);
        assert_eq!(pit.read_port_61(ticks(1799)) & 0x23, 0x03);
        assert_eq!(pit.read_port_61(ticks(1801)) & 0x23, 0x23);
    }

    #[test]
    fn mode_1_starts_with_a_rising_gate() {
        let mut pit = Pit::default();
        program(&mut pit, 0, 0xb2, 10);
        assert_eq!(pit.read_port_61(ticks(100)) & 0x20, 0x20);
        pit.write_port_61(ticks(100), 1);
        assert_eq!(pit.read_port_61(ticks(105)) & 0x20, 0);
        assert_eq!(pit.read_port_61(ticks(111)) & 0x20, 0x20);
    }

    #[test]
    fn the_refresh_bit_toggles() {
        let mut pit = Pit::default();
        assert_ne!(
            pit.read_port_61(0) & 0x10,
            pit.read_port_61(spec::REFRESH_TICKS) & 0x10
        );
    }

    #[test]
    fn decimal_counts_go_from_ten_thousand() {
        let mut pit = Pit::default();
        program(&mut pit, 0, 0x35, 0);
        assert_eq!(count(&mut pit, ticks(1), 0), 0x9999);
        program(&mut pit, 0, 0x35, 0x1234);
        assert_eq!(count(&mut pit, ticks(35), 0), 0x1199);
    }

    #[test]
    fn any_program_at_any_time_neither_panics_nor_stalls() {
        let mut pit = Pit::default();
        let mut seed = 1u64;
        let mut now = 0u64;
        for _ in 0..200_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            let random = seed >> 33;
            let register = (random & 3) as u16;
            match random >> 2 & 3 {
                0 => _ = pit.read(now, register),
                1 => pit.write_port_61(now, (random >> 8) as u8),
                _ => pit.write(now, register, (random >> 8) as u8),
            }
            now += random >> 4 & 0xffff;
            pit.advance(now);
            assert!(pit.deadline().is_none_or(|deadline| deadline > now));
        }
        now = u64::MAX;
        pit.advance(now);
        program(&mut pit, now, 0x34, 1);
    }
}
