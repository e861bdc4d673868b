//! The 16550 serial port. It transmits at once, and bytes from outside wait until the guest makes
//! room for them, so that none is overrun.
//!
//! Deviation: the interrupt output is not gated by OUT2, as in other virtual machines.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Names from the National Semiconductor PC16550D data sheet, "Registers".
mod spec {
    pub const DATA: u16 = 0;
    pub const INTERRUPT_ENABLE: u16 = 1;
    /// Interrupt identification when read, FIFO control when written.
    pub const FIFO: u16 = 2;
    pub const LINE_CONTROL: u16 = 3;
    pub const MODEM_CONTROL: u16 = 4;
    pub const LINE_STATUS: u16 = 5;
    pub const MODEM_STATUS: u16 = 6;
    /// IER: received data, transmitter empty, line status, modem status.
    pub const ENABLE_DATA: u8 = 1 << 0;
    pub const ENABLE_EMPTY: u8 = 1 << 1;
    pub const ENABLE_LINE: u8 = 1 << 2;
    pub const ENABLE_MODEM: u8 = 1 << 3;
    /// IIR values, by falling priority.
    pub const LINE: u8 = 0x06;
    pub const RECEIVED: u8 = 0x04;
    pub const TIMEOUT: u8 = 0x0c;
    pub const EMPTY: u8 = 0x02;
    pub const MODEM: u8 = 0x00;
    pub const NONE: u8 = 0x01;
    /// IIR: FIFOs are on.
    pub const FIFOS_ON: u8 = 0xc0;
    /// FCR: FIFOs on, clear the receiver's.
    pub const FIFO_ENABLE: u8 = 1 << 0;
    pub const CLEAR_RECEIVER: u8 = 1 << 1;
    /// LCR: divisor latch access.
    pub const DIVISOR_ACCESS: u8 = 1 << 7;
    /// MCR: loop-back.
    pub const LOOP: u8 = 1 << 4;
    /// LSR: data ready, overrun, transmitter empty (both bits).
    pub const DATA_READY: u8 = 1 << 0;
    pub const OVERRUN: u8 = 1 << 1;
    pub const TRANSMITTER_EMPTY: u8 = 0x60;
    /// MSR: DCD, DSR, CTS: somebody is there.
    pub const CONNECTED: u8 = 0xb0;
    pub const FIFO_SIZE: usize = 16;
}

/// All of the port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Interrupt enable.
    pub interrupt_enable: u8,
    /// FIFO control: enable (0) and trigger level (7:6).
    pub fifo_control: u8,
    /// Line control.
    pub line_control: u8,
    /// Modem control.
    pub modem_control: u8,
    /// Modem status, the change bits (3:0) only.
    pub modem_changes: u8,
    /// Scratch.
    pub scratch: u8,
    /// Divisor latch.
    pub divisor: u16,
    /// The transmitter became empty and nobody has noticed.
    pub empty_pending: bool,
    /// A byte in loop-back found no room.
    pub overrun: bool,
    /// Received bytes the guest can read.
    pub received: VecDeque<u8>,
    /// Bytes from outside that wait for room.
    pub waiting: VecDeque<u8>,
}

/// The port. Its whole content is [`SerialState`].
#[derive(Debug, Default)]
pub struct Serial {
    pub(crate) state: SerialState,
}

impl Serial {
    fn has_fifos(&self) -> bool {
        self.state.fifo_control & spec::FIFO_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.has_fifos() { spec::FIFO_SIZE } else { 1 }
    }

    fn in_loop(&self) -> bool {
        self.state.modem_control & spec::LOOP != 0
    }

    /// Bytes that arrive from outside.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.state.waiting.extend(bytes);
        self.fill();
    }

    fn fill(&mut self) {
        while !self.in_loop() && self.state.received.len() < self.capacity() {
            let Some(byte) = self.state.waiting.pop_front() else {
                break;
            };
            self.state.received.push_back(byte);
        }
    }

    fn trigger(&self) -> usize {
        match self.state.fifo_control >> 6 {
            _ if !self.has_fifos() => 1,
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    /// The most urgent interrupt, as in the identification register.
    fn interrupt(&self) -> u8 {
        let enabled = |bit| self.state.interrupt_enable & bit != 0;
        if enabled(spec::ENABLE_LINE) && self.state.overrun {
            spec::LINE
        } else if enabled(spec::ENABLE_DATA) && !self.state.received.is_empty() {
            // No time passes on this wire, so what is below the trigger level has timed out.
            if self.state.received.len() >= self.trigger() {
                spec::RECEIVED
            } else {
                spec::TIMEOUT
            }
        } else if enabled(spec::ENABLE_EMPTY) && self.state.empty_pending {
            spec::EMPTY
        } else if enabled(spec::ENABLE_MODEM) && self.state.modem_changes != 0 {
            spec::MODEM
        } else {
            spec::NONE
        }
    }

    /// Level of the interrupt output.
    pub fn line(&self) -> bool {
        self.interrupt() != spec::NONE
    }

    /// Modem status lines: in loop-back they are the modem control outputs.
    fn modem_lines(&self) -> u8 {
        if !self.in_loop() {
            return spec::CONNECTED;
        }
        let control = self.state.modem_control;
        (control & 0b0010) << 3 | (control & 0b0001) << 5 | (control & 0b1100) << 4
    }

    /// Reads register 0-7.
    pub fn read(&mut self, register: u16) -> u8 {
        let latch = self.state.line_control & spec::DIVISOR_ACCESS != 0;
        match register {
            spec::DATA if latch => self.state.divisor as u8,
            spec::INTERRUPT_ENABLE if latch => (self.state.divisor >> 8) as u8,
            spec::DATA => {
                let byte = self.state.received.pop_front().unwrap_or(0);
                self.fill();
                byte
            }
            spec::INTERRUPT_ENABLE => self.state.interrupt_enable,
            spec::FIFO => {
                let interrupt = self.interrupt();
                if interrupt == spec::EMPTY {
                    self.state.empty_pending = false;
                }
                interrupt | if self.has_fifos() { spec::FIFOS_ON } else { 0 }
            }
            spec::LINE_CONTROL => self.state.line_control,
            spec::MODEM_CONTROL => self.state.modem_control,
            spec::LINE_STATUS => {
                let mut status = spec::TRANSMITTER_EMPTY;
                if !self.state.received.is_empty() {
                    status |= spec::DATA_READY;
                }
                if std::mem::take(&mut self.state.overrun) {
                    status |= spec::OVERRUN;
                }
                status
            }
            spec::MODEM_STATUS => {
                self.modem_lines() | std::mem::take(&mut self.state.modem_changes)
            }
            _ => self.state.scratch,
        }
    }

    /// Writes register 0-7. Returns the byte that goes out, if one does.
    pub fn write(&mut self, register: u16, value: u8) -> Option<u8> {
        let latch = self.state.line_control & spec::DIVISOR_ACCESS != 0;
        match register {
            spec::DATA if latch => {
                self.state.divisor = self.state.divisor & 0xff00 | u16::from(value);
            }
            spec::INTERRUPT_ENABLE if latch => {
                self.state.divisor = self.state.divisor & 0x00ff | u16::from(value) << 8;
            }
            spec::DATA => {
                self.state.empty_pending = true;
                if !self.in_loop() {
                    return Some(value);
                }
                if self.state.received.len() < self.capacity() {
                    self.state.received.push_back(value);
                } else {
                    self.state.overrun = true;
                }
            }
            spec::INTERRUPT_ENABLE => {
                let value = value & 0xf;
                let newly = value & !self.state.interrupt_enable;
                self.state.interrupt_enable = value;
                if newly & spec::ENABLE_EMPTY != 0 {
                    self.state.empty_pending = true;
                }
            }
            spec::FIFO => {
                let switched = (value ^ self.state.fifo_control) & spec::FIFO_ENABLE != 0;
                self.state.fifo_control = value & (0xc0 | spec::FIFO_ENABLE);
                if switched || value & spec::CLEAR_RECEIVER != 0 {
                    self.state.received.clear();
                }
                self.fill();
            }
            spec::LINE_CONTROL => self.state.line_control = value,
            spec::MODEM_CONTROL => {
                let before = self.modem_lines();
                self.state.modem_control = value & 0x1f;
                let after = self.modem_lines();
                // RI tells only its trailing edge.
                let changed = (before ^ after) & !0x40 | before & !after & 0x40;
                self.state.modem_changes |= changed >> 4;
                self.fill();
            }
            spec::LINE_STATUS | spec::MODEM_STATUS => {}
            _ => self.state.scratch = value,
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_goes_out_at_once() {
        let mut serial = Serial::default();
        assert_eq!(serial.read(5), 0x60);
        assert_eq!(serial.write(0, b'x'), Some(b'x'));
        assert_eq!(serial.read(5), 0x60);
    }

    #[test]
    fn the_empty_transmitter_interrupts_once_per_byte_and_when_enabled() {
        let mut serial = Serial::default();
        serial.write(1, 0x02);
        assert!(serial.line());
        assert_eq!(serial.read(2), 0x02);
        assert!(!serial.line());
        assert_eq!(serial.read(2), 0x01);
        serial.write(0, b'x');
        assert!(serial.line());
        serial.write(1, 0x02);
        serial.read(2);
        serial.write(1, 0x02);
        assert!(!serial.line());
    }

    #[test]
    fn input_interrupts_until_read_and_waits_without_loss() {
        let mut serial = Serial::default();
        serial.write(2, 0xc1);
        serial.write(1, 0x01);
        let sent: Vec<u8> = (0..100).collect();
        serial.feed(&sent);
        assert_eq!(serial.read(2), 0xc4);
        let mut got = Vec::new();
        while serial.read(5) & 1 != 0 {
            got.push(serial.read(0));
            if got.len() == 90 {
                assert_eq!(serial.read(2), 0xcc, "below the trigger level");
            }
        }
        assert_eq!(got, sent);
        assert!(!serial.line());
    }

    #[test]
    fn the_divisor_hides_data_and_interrupt_enable() {
        let mut serial = Serial::default();
        serial.write(3, 0x83);
        assert_eq!(serial.write(0, 0x34), None);
        serial.write(1, 0x12);
        assert_eq!((serial.read(0), serial.read(1)), (0x34, 0x12));
        serial.write(3, 0x03);
        assert_eq!(serial.read(1), 0);
    }

    #[test]
    fn loop_back_returns_data_and_modem_lines() {
        let mut serial = Serial::default();
        assert_eq!(serial.read(6), 0xb0);
        serial.write(4, 0x1a);
        assert_eq!(serial.read(6) & 0xf0, 0x90);
        assert_eq!(serial.write(0, 0x5a), None);
        assert_eq!(serial.read(0), 0x5a);
        serial.write(0, 1);
        serial.write(0, 2);
        assert_eq!(serial.read(5), 0x63);
        assert_eq!(serial.read(5), 0x61);
    }

    #[test]
    fn the_scratch_register_keeps_its_byte() {
        let mut serial = Serial::default();
        serial.write(7, 0xa5);
        assert_eq!(serial.read(7), 0xa5);
    }
}
