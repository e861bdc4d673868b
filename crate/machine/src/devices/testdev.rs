//! Devices that test programs talk to: the exit port, the debug ports, and the device of
//! kvm-unit-tests.

use serde::{Deserialize, Serialize};

use crate::board::StopRequest;
use crate::layout;

/// What the kvm-unit-tests device keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestDeviceState {
    /// Ports E0h-E3h give back what was written.
    pub latch: [u8; 4],
    /// Memory at FF000000h; empty until it is first written.
    pub memory: Vec<u8>,
    /// How much of "Shutdown" has arrived at port 8900h.
    pub shutdown_matched: u8,
}

/// The kvm-unit-tests device (`lib/x86` of kvm-unit-tests uses it) and the shutdown port of
/// Bochs. Its whole content is [`TestDeviceState`].
#[derive(Debug)]
pub struct TestDevice {
    pub(crate) state: TestDeviceState,
}

impl Default for TestDevice {
    fn default() -> TestDevice {
        TestDevice {
            state: TestDeviceState {
                latch: [0xff; 4],
                memory: Vec::new(),
                shutdown_matched: 0,
            },
        }
    }
}

impl TestDevice {
    const SHUTDOWN: &'static [u8] = b"Shutdown";

    /// Reads a byte of the latch.
    pub fn read_latch(&self, offset: u16) -> u8 {
        self.state.latch[usize::from(offset & 3)]
    }

    /// Writes a byte of the latch.
    pub fn write_latch(&mut self, offset: u16, value: u8) {
        self.state.latch[usize::from(offset & 3)] = value;
    }

    /// Reads memory. `offset + width` lies within it.
    pub fn read_memory(&self, offset: u64, width: u8) -> u64 {
        let mut bytes = [0; 8];
        let start = offset as usize;
        let end = start + usize::from(width.min(8));
        if let Some(source) = self.state.memory.get(start..end) {
            bytes[..source.len()].copy_from_slice(source);
        }
        u64::from_le_bytes(bytes)
    }

    /// Writes memory. `offset + width` lies within it.
    pub fn write_memory(&mut self, offset: u64, width: u8, value: u64) {
        self.state.memory.resize(layout::TEST_RAM_SIZE as usize, 0);
        let start = offset as usize;
        let width = usize::from(width.min(8));
        if let Some(target) = self.state.memory.get_mut(start..start + width) {
            target.copy_from_slice(&value.to_le_bytes()[..width]);
        }
    }

    /// A byte for port 8900h: the last of "Shutdown" powers off.
    pub fn write_shutdown(&mut self, value: u8) -> Option<StopRequest> {
        let matched = usize::from(self.state.shutdown_matched);
        let next = if value == Self::SHUTDOWN[matched] {
            matched + 1
        } else {
            usize::from(value == Self::SHUTDOWN[0])
        };
        self.state.shutdown_matched = (next % Self::SHUTDOWN.len()) as u8;
        (next == Self::SHUTDOWN.len()).then_some(StopRequest::PowerOff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_shutdown_powers_off_and_others_do_not() {
        let mut device = TestDevice::default();
        let mut send = |text: &str| {
            text.bytes()
                .filter_map(|b| device.write_shutdown(b))
                .count()
        };
        assert_eq!(send("ShutShutdow"), 0);
        assert_eq!(send("n"), 1);
        assert_eq!(send("shutdown"), 0);
    }

    #[test]
    fn memory_keeps_what_is_written() {
        let mut device = TestDevice::default();
        assert_eq!(device.read_memory(0xfff8, 8), 0);
        device.write_memory(0xfffc, 4, 0x1234_5678);
        assert_eq!(device.read_memory(0xfffe, 2), 0x1234);
        device.write_memory(0xfffc, 8, u64::MAX);
        assert_eq!(device.read_memory(0xfffc, 4), 0x1234_5678);
    }
}
