//! The I/O APIC: 24 pins, each with a redirection entry that turns it into interrupt messages.
//!
//! Version 20h, which has an EOI register. Wires carry "asserted" and "not asserted", so the
//! polarity bit is kept and has nothing to invert.

use hypernest_cpu::{DeliveryMode, InterruptMessage};
use serde::{Deserialize, Serialize};

/// Number of pins.
pub const PINS: u8 = 24;

/// Names from the Intel 82093AA data sheet, "Register Description".
mod spec {
    /// Register select.
    pub const SELECT: u64 = 0x00;
    /// Window to the selected register.
    pub const WINDOW: u64 = 0x10;
    /// EOI register (version 20h).
    pub const EOI: u64 = 0x40;
    /// Indices of the registers behind the window.
    pub const ID: u8 = 0;
    pub const VERSION: u8 = 1;
    pub const ARBITRATION: u8 = 2;
    pub const REDIRECTION: u8 = 0x10;
    /// Redirection entry: destination is logical.
    pub const LOGICAL: u64 = 1 << 11;
    /// Delivery status.
    pub const STATUS: u64 = 1 << 12;
    /// Accepted and not yet ended.
    pub const REMOTE_IRR: u64 = 1 << 14;
    /// Level-triggered.
    pub const LEVEL: u64 = 1 << 15;
    /// Masked.
    pub const MASKED: u64 = 1 << 16;
    /// Bits software may set.
    pub const WRITABLE: u64 = 0xff00_0000_0001_afff;
}

/// All of the I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// Identification register, bits 27:24.
    pub id: u8,
    /// Selected register.
    pub select: u8,
    /// Levels of the pins.
    pub lines: u32,
    /// Pins with an edge still to be sent.
    pub edges: u32,
    /// Redirection entries.
    pub entries: [u64; PINS as usize],
}

/// The I/O APIC. Its whole content is [`IoApicState`].
#[derive(Debug)]
pub struct IoApic {
    pub(crate) state: IoApicState,
    /// Pins that have something to send: derived from the state.
    ready: u32,
}

impl Default for IoApic {
    fn default() -> IoApic {
        IoApic::from_state(IoApicState {
            id: 0,
            select: 0,
            lines: 0,
            edges: 0,
            entries: [spec::MASKED; PINS as usize],
        })
    }
}

impl IoApic {
    /// An I/O APIC that continues from `state`.
    pub fn from_state(state: IoApicState) -> IoApic {
        let mut io_apic = IoApic { state, ready: 0 };
        for pin in 0..PINS {
            io_apic.settle(pin);
        }
        io_apic
    }

    /// Recomputes whether `pin` has something to send.
    fn settle(&mut self, pin: u8) {
        let bit = 1u32 << pin;
        let entry = self.state.entries[usize::from(pin)];
        let asks = if entry & spec::LEVEL != 0 {
            self.state.lines & bit != 0 && entry & spec::REMOTE_IRR == 0
        } else {
            self.state.edges & bit != 0
        };
        if asks && entry & spec::MASKED == 0 {
            self.ready |= bit;
        } else {
            self.ready &= !bit;
        }
    }

    /// Sets the level of a pin. An edge on a masked pin is lost, as the data sheet has it.
    pub fn set_line(&mut self, pin: u8, level: bool) {
        if pin >= PINS {
            return;
        }
        let bit = 1u32 << pin;
        let entry = self.state.entries[usize::from(pin)];
        if level {
            if self.state.lines & bit == 0 && entry & (spec::LEVEL | spec::MASKED) == 0 {
                self.state.edges |= bit;
            }
            self.state.lines |= bit;
        } else {
            self.state.lines &= !bit;
        }
        self.settle(pin);
    }

    /// The next message, lowest pin first.
    pub fn take_message(&mut self) -> Option<InterruptMessage> {
        while self.ready != 0 {
            let pin = self.ready.trailing_zeros() as u8;
            let entry = &mut self.state.entries[usize::from(pin)];
            let level_triggered = *entry & spec::LEVEL != 0;
            let delivery = match (*entry >> 8) & 7 {
                0 => Some(DeliveryMode::Fixed),
                1 => Some(DeliveryMode::LowestPriority),
                2 => Some(DeliveryMode::Smi),
                4 => Some(DeliveryMode::Nmi),
                5 => Some(DeliveryMode::Init),
                7 => Some(DeliveryMode::ExtInt),
                _ => None, // reserved: nothing is sent
            };
            let message = delivery.map(|delivery| InterruptMessage {
                destination: (*entry >> 56) as u32,
                logical: *entry & spec::LOGICAL != 0,
                delivery,
                vector: *entry as u8,
                level_triggered,
            });
            if level_triggered {
                *entry |= spec::REMOTE_IRR;
            } else {
                self.state.edges &= !(1 << pin);
            }
            self.settle(pin);
            if message.is_some() {
                return message;
            }
        }
        None
    }

    /// The end of a level-triggered interrupt with this vector.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let entry = &mut self.state.entries[usize::from(pin)];
            if *entry & spec::LEVEL != 0 && *entry as u8 == vector {
                *entry &= !spec::REMOTE_IRR;
                self.settle(pin);
            }
        }
    }

    fn register(&self) -> u32 {
        match self.state.select {
            spec::ID | spec::ARBITRATION => u32::from(self.state.id) << 24,
            spec::VERSION => u32::from(PINS - 1) << 16 | 0x20,
            select => match self.entry(select) {
                Some((pin, shift)) => (self.state.entries[pin] >> shift) as u32,
                None => 0,
            },
        }
    }

    /// Pin and bit position of a redirection register.
    fn entry(&self, select: u8) -> Option<(usize, u32)> {
        let index = select.checked_sub(spec::REDIRECTION)?;
        (index < 2 * PINS).then_some((usize::from(index / 2), u32::from(index % 2) * 32))
    }

    fn set_register(&mut self, value: u32) {
        if self.state.select == spec::ID {
            self.state.id = (value >> 24) as u8 & 0xf;
        } else if let Some((pin, shift)) = self.entry(self.state.select) {
            let entry = &mut self.state.entries[pin];
            let writable = spec::WRITABLE & 0xffff_ffff << shift;
            *entry = *entry & !writable | u64::from(value) << shift & writable;
            *entry &= !spec::STATUS;
            if *entry & spec::LEVEL == 0 {
                // Software without an EOI register switches to edge and back to clear it.
                *entry &= !spec::REMOTE_IRR;
            } else {
                self.state.edges &= !(1 << pin);
            }
            self.settle(pin as u8);
        }
    }

    /// Reads the register at `offset`.
    pub fn read(&self, offset: u64) -> u32 {
        match offset & !3 {
            spec::SELECT => u32::from(self.state.select),
            spec::WINDOW => self.register(),
            _ => 0,
        }
    }

    /// Writes the register at `offset`.
    pub fn write(&mut self, offset: u64, value: u32) {
        match offset & !3 {
            spec::SELECT => self.state.select = value as u8,
            spec::WINDOW => self.set_register(value),
            spec::EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_pin(pin: u8, low: u32) -> IoApic {
        let mut io_apic = IoApic::default();
        io_apic.write(0, u32::from(0x11 + 2 * pin));
        io_apic.write(0x10, 0x0300_0000);
        io_apic.write(0, u32::from(0x10 + 2 * pin));
        io_apic.write(0x10, low);
        io_apic
    }

    #[test]
    fn the_version_register_tells_24_pins() {
        let mut io_apic = IoApic::default();
        io_apic.write(0, 1);
        assert_eq!(io_apic.read(0x10), 0x0017_0020);
    }

    #[test]
    fn an_edge_sends_one_message() {
        let mut io_apic = with_pin(4, 0x0000_0834);
        io_apic.set_line(4, true);
        assert_eq!(
            io_apic.take_message(),
            Some(InterruptMessage {
                destination: 3,
                logical: true,
                delivery: DeliveryMode::Fixed,
                vector: 0x34,
                level_triggered: false,
            })
        );
        assert_eq!(io_apic.take_message(), None);
        io_apic.set_line(4, true);
        assert_eq!(io_apic.take_message(), None);
    }

    #[test]
    fn an_edge_on_a_masked_pin_is_lost_and_a_level_is_not() {
        for (low, sent) in [(0x1_0034, false), (0x1_8034, true)] {
            let mut io_apic = with_pin(4, low);
            io_apic.set_line(4, true);
            assert_eq!(io_apic.take_message(), None);
            io_apic.write(0x10, low & !0x1_0000);
            assert_eq!(io_apic.take_message().is_some(), sent);
        }
    }

    #[test]
    fn a_level_is_sent_again_after_its_end_while_it_lasts() {
        let mut io_apic = with_pin(17, 0x8034);
        io_apic.set_line(17, true);
        assert!(io_apic.take_message().is_some_and(|m| m.level_triggered));
        assert_eq!(io_apic.read(0x10) & 0x4000, 0x4000);
        assert_eq!(io_apic.take_message(), None);
        io_apic.end_of_interrupt(0x35);
        assert_eq!(io_apic.take_message(), None);
        io_apic.write(0x40, 0x34);
        assert!(io_apic.take_message().is_some());
        io_apic.set_line(17, false);
        io_apic.end_of_interrupt(0x34);
        assert_eq!(io_apic.take_message(), None);
    }

    #[test]
    fn switching_to_edge_clears_remote_irr() {
        let mut io_apic = with_pin(17, 0x8034);
        io_apic.set_line(17, true);
        io_apic.take_message();
        io_apic.write(0x10, 0x1_0034);
        io_apic.write(0x10, 0x8034);
        assert!(io_apic.take_message().is_some());
    }

    #[test]
    fn remote_irr_and_delivery_status_are_read_only() {
        let io_apic = with_pin(1, 0xffff_ffff);
        assert_eq!(io_apic.read(0x10), 0x0001_afff);
    }

    #[test]
    fn registers_beyond_the_last_pin_read_zero() {
        let mut io_apic = IoApic::default();
        for select in 0x40..=0xff {
            io_apic.write(0, select);
            io_apic.write(0x10, u32::MAX);
            assert_eq!(io_apic.read(0x10), 0);
        }
    }
}
