//! ACPI fixed hardware: the power-management timer, PM1a events and control, the reset register.

use hypernest_cpu::Tick;
use serde::{Deserialize, Serialize};

use crate::board::StopRequest;

/// Frequency of the timer in Hz.
pub const FREQUENCY: u64 = 3_579_545;
/// Sleep type the DSDT's `\_S5` names for "off".
pub const SLEEP_TYPE_OFF: u16 = 5;
/// What the FADT tells software to write to the reset register.
pub const RESET_VALUE: u8 = 0x06;

/// Names from ACPI, "PM1 Event Grouping", "PM1 Control Grouping".
mod spec {
    /// Status and enable: bit 31 of the timer changed.
    pub const TIMER: u16 = 1 << 0;
    /// Status and enable: power button.
    pub const POWER_BUTTON: u16 = 1 << 8;
    /// Status bits that exist (written 1 clears).
    pub const STATUS: u16 = 0x8d31;
    /// Enable bits that exist.
    pub const ENABLE: u16 = 0x0521;
    /// Control: interrupts are SCIs. Always set, there is no other mode.
    pub const SCI_ENABLE: u16 = 1 << 0;
    /// Control: go to sleep. Write-only.
    pub const SLEEP_ENABLE: u16 = 1 << 13;
    /// Reset register: do it.
    pub const RESET: u8 = 1 << 2;
    /// Port 92h: reset.
    pub const FAST_RESET: u8 = 1 << 0;
    /// Port 92h: address line 20 is open.
    pub const FAST_A20: u8 = 1 << 1;
}

const SECOND: u128 = 1_000_000_000;

/// All of the fixed hardware.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control.
    pub control: u16,
    /// Reset control register.
    pub reset_control: u8,
    /// The timer's status bit is settled up to here.
    pub settled: Tick,
}

/// The fixed hardware. Its whole content is [`PowerState`].
#[derive(Debug, Default)]
pub struct Power {
    pub(crate) state: PowerState,
}

impl Power {
    fn counts(now: Tick) -> u64 {
        (u128::from(now) * u128::from(FREQUENCY) / SECOND) as u64
    }

    /// The timer, 32 bits.
    pub fn timer(now: Tick) -> u32 {
        Self::counts(now) as u32
    }

    fn settle(&mut self, now: Tick) {
        if Self::counts(now) >> 31 != Self::counts(self.state.settled) >> 31 {
            self.state.status |= spec::TIMER;
        }
        self.state.settled = now.max(self.state.settled);
    }

    /// Level of the SCI.
    pub fn line(&self) -> bool {
        self.state.status & self.state.enable & spec::ENABLE != 0
    }

    /// When the timer will raise the SCI.
    pub fn deadline(&self) -> Option<Tick> {
        if self.state.enable & spec::TIMER == 0 || self.line() {
            return None;
        }
        let next = ((Self::counts(self.state.settled) >> 31) + 1) << 31;
        let tick = (u128::from(next) * SECOND).div_ceil(u128::from(FREQUENCY));
        u64::try_from(tick).ok()
    }

    /// Does what is due.
    pub fn advance(&mut self, now: Tick) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.settle(now);
        }
    }

    /// The user presses the power button.
    pub fn press_button(&mut self) {
        self.state.status |= spec::POWER_BUTTON;
    }

    /// Reads a byte of the PM1a blocks, `offset` from the event block.
    pub fn read(&mut self, now: Tick, offset: u16) -> u8 {
        self.settle(now);
        let word = match offset & !1 {
            0 => self.state.status,
            2 => self.state.enable,
            _ => self.state.control | spec::SCI_ENABLE,
        };
        word.to_le_bytes()[usize::from(offset & 1)]
    }

    /// Writes a word of the PM1a blocks. Byte accesses reach the registers as the word they
    /// change.
    pub fn write(&mut self, now: Tick, offset: u16, width: u8, value: u16) -> Option<StopRequest> {
        self.settle(now);
        let shift = (offset & 1) * 8;
        let lanes = if width == 1 { 0xff << shift } else { 0xffff };
        let value = value << shift & lanes;
        match offset & !1 {
            0 => self.state.status &= !(value & spec::STATUS),
            2 => {
                self.state.enable = (self.state.enable & !lanes | value) & spec::ENABLE;
            }
            _ => {
                self.state.control = (self.state.control & !lanes | value) & !spec::SLEEP_ENABLE;
                let sleep_type = self.state.control >> 10 & 7;
                if value & spec::SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_OFF {
                    return Some(StopRequest::PowerOff);
                }
            }
        }
        None
    }

    /// Reads the reset control register.
    pub fn read_reset(&self) -> u8 {
        self.state.reset_control
    }

    /// Writes the reset control register.
    pub fn write_reset(&mut self, value: u8) -> Option<StopRequest> {
        self.state.reset_control = value & !spec::RESET;
        (value & spec::RESET != 0).then_some(StopRequest::Reset)
    }

    /// Reads port 92h. Address line 20 is always open.
    pub fn read_port_92(&self) -> u8 {
        spec::FAST_A20
    }

    /// Writes port 92h.
    pub fn write_port_92(&mut self, value: u8) -> Option<StopRequest> {
        (value & spec::FAST_RESET != 0).then_some(StopRequest::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_counts_at_its_rate() {
        assert_eq!(Power::timer(1_000_000_000), 3_579_545);
        assert_eq!(Power::timer(0), 0);
    }

    #[test]
    fn sleeping_with_the_type_of_s5_powers_off() {
        let mut power = Power::default();
        assert_eq!(power.write(0, 4, 2, 0x2000), None);
        assert_eq!(
            power.write(0, 4, 2, 0x2000 | 5 << 10),
            Some(StopRequest::PowerOff)
        );
        assert_eq!(power.read(0, 5) & 0x20, 0);
        assert_eq!(power.write(0, 5, 1, 0x34), Some(StopRequest::PowerOff));
    }

    #[test]
    fn the_timer_raises_the_sci_when_its_top_bit_changes() {
        let mut power = Power::default();
        power.write(0, 2, 2, 1);
        let due = power.deadline().unwrap();
        assert!(Power::timer(due - 1) < 0x8000_0000 && Power::timer(due) >= 0x8000_0000);
        power.advance(due - 1);
        assert!(!power.line());
        power.advance(due);
        assert!(power.line());
        power.write(due, 0, 2, 1);
        assert!(!power.line());
        assert!(power.deadline().unwrap() > due);
    }

    #[test]
    fn the_power_button_raises_the_sci_when_enabled() {
        let mut power = Power::default();
        power.press_button();
        assert!(!power.line());
        power.write(0, 3, 1, 0x01);
        assert!(power.line());
    }

    #[test]
    fn the_reset_register_resets_on_bit_2() {
        let mut power = Power::default();
        assert_eq!(power.write_reset(0x02), None);
        assert_eq!(power.write_reset(RESET_VALUE), Some(StopRequest::Reset));
        assert_eq!(power.read_reset(), 0x02);
        assert_eq!(power.write_port_92(0x03), Some(StopRequest::Reset));
    }
}
