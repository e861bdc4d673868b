//! The i8042 keyboard controller with nothing plugged in: it answers as one, and it resets.

use serde::{Deserialize, Serialize};

use crate::board::StopRequest;

/// Names from the IBM PC AT Technical Reference, "Keyboard Controller".
mod spec {
    /// Status: output buffer full, system flag (self-test passed), last write was a command.
    pub const OUTPUT_FULL: u8 = 1 << 0;
    pub const SYSTEM: u8 = 1 << 2;
    pub const COMMAND: u8 = 1 << 3;
    /// Status: keyboard not inhibited.
    pub const NOT_INHIBITED: u8 = 1 << 4;
    pub const READ_MODE: u8 = 0x20;
    pub const WRITE_MODE: u8 = 0x60;
    pub const SELF_TEST: u8 = 0xaa;
    pub const SELF_TEST_PASSED: u8 = 0x55;
    pub const INTERFACE_TEST: u8 = 0xab;
    pub const DISABLE_KEYBOARD: u8 = 0xad;
    pub const ENABLE_KEYBOARD: u8 = 0xae;
    pub const READ_OUTPUT_PORT: u8 = 0xd0;
    pub const WRITE_OUTPUT_PORT: u8 = 0xd1;
    /// Pulse output lines: those whose bit is 0. Line 0 is reset.
    pub const PULSE: std::ops::RangeInclusive<u8> = 0xf0..=0xff;
    /// Output port: not in reset, address line 20.
    pub const OUTPUT_PORT: u8 = 0x03;
    /// Mode: keyboard disabled.
    pub const KEYBOARD_DISABLED: u8 = 1 << 4;
}

/// All of the controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// Command byte ("mode").
    pub mode: u8,
    /// Output buffer.
    pub output: Option<u8>,
    /// Command that waits for its data byte.
    pub command: Option<u8>,
    /// The last write went to the command port.
    pub last_was_command: bool,
}

/// The controller. Its whole content is [`I8042State`].
#[derive(Debug)]
pub struct I8042 {
    pub(crate) state: I8042State,
}

impl Default for I8042 {
    fn default() -> I8042 {
        I8042 {
            state: I8042State {
                mode: spec::SYSTEM | spec::KEYBOARD_DISABLED,
                output: None,
                command: None,
                last_was_command: false,
            },
        }
    }
}

impl I8042 {
    /// Reads port 60h or 64h.
    pub fn read(&mut self, port: u16) -> u8 {
        if port == 0x60 {
            return self.state.output.take().unwrap_or(0);
        }
        let mut status = self.state.mode & spec::SYSTEM | spec::NOT_INHIBITED;
        if self.state.output.is_some() {
            status |= spec::OUTPUT_FULL;
        }
        if self.state.last_was_command {
            status |= spec::COMMAND;
        }
        status
    }

    /// Writes port 60h or 64h.
    pub fn write(&mut self, port: u16, value: u8) -> Option<StopRequest> {
        self.state.last_was_command = port != 0x60;
        if port == 0x60 {
            return match self.state.command.take() {
                Some(spec::WRITE_MODE) => {
                    self.state.mode = value;
                    None
                }
                Some(spec::WRITE_OUTPUT_PORT) => (value & 1 == 0).then_some(StopRequest::Reset),
                _ => None, // a byte for a keyboard that is not there
            };
        }
        self.state.command = None;
        match value {
            spec::READ_MODE => self.state.output = Some(self.state.mode),
            spec::WRITE_MODE | spec::WRITE_OUTPUT_PORT => self.state.command = Some(value),
            spec::SELF_TEST => {
                self.state.mode |= spec::SYSTEM;
                self.state.output = Some(spec::SELF_TEST_PASSED);
            }
            spec::INTERFACE_TEST => self.state.output = Some(0),
            spec::DISABLE_KEYBOARD => self.state.mode |= spec::KEYBOARD_DISABLED,
            spec::ENABLE_KEYBOARD => self.state.mode &= !spec::KEYBOARD_DISABLED,
            spec::READ_OUTPUT_PORT => self.state.output = Some(spec::OUTPUT_PORT),
            value if spec::PULSE.contains(&value) && value & 1 == 0 => {
                return Some(StopRequest::Reset);
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pulsing_line_0_resets() {
        let mut controller = I8042::default();
        assert_eq!(controller.write(0x64, 0xfe), Some(StopRequest::Reset));
        assert_eq!(controller.write(0x64, 0xff), None);
        controller.write(0x64, 0xd1);
        assert_eq!(controller.write(0x60, 0xfe), Some(StopRequest::Reset));
    }

    #[test]
    fn the_self_test_passes_and_the_answer_is_read_once() {
        let mut controller = I8042::default();
        assert_eq!(controller.read(0x64) & 3, 0);
        controller.write(0x64, 0xaa);
        assert_eq!(controller.read(0x64) & 1, 1);
        assert_eq!(controller.read(0x60), 0x55);
        assert_eq!(controller.read(0x64) & 1, 0);
    }

    #[test]
    fn the_mode_is_kept() {
        let mut controller = I8042::default();
        controller.write(0x64, 0x60);
        controller.write(0x60, 0x65);
        controller.write(0x64, 0x20);
        assert_eq!(controller.read(0x60), 0x65);
    }
}
