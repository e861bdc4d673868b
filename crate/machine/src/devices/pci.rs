//! PCI configuration space by mechanism 1, with a host bridge at 00:00.0 and nothing else.

use serde::{Deserialize, Serialize};

/// Names from the PCI Local Bus Specification, "Configuration Space".
mod spec {
    /// Address: accesses to the data port are configuration cycles.
    pub const ENABLE: u32 = 1 << 31;
    /// Address: bits that can be written.
    pub const ADDRESS: u32 = 0x80ff_fffc;
    pub const COMMAND: usize = 0x04;
    /// Vendor 8086h, device 0D57h: a host bridge without registers of its own.
    pub const IDS: [u8; 4] = [0x86, 0x80, 0x57, 0x0d];
    /// Class host bridge.
    pub const CLASS: [u8; 4] = [0, 0, 0, 6];
    /// Bits of the command register that can be written: I/O, memory, bus master, SERR.
    pub const COMMAND_WRITABLE: u16 = 0x0107;
}

/// All of the bus.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// Address port.
    pub address: u32,
    /// The bridge's command register.
    pub command: u16,
}

/// The bus. Its whole content is [`PciState`].
#[derive(Debug, Default)]
pub struct Pci {
    pub(crate) state: PciState,
}

impl Pci {
    /// Reads the address port.
    pub fn address(&self) -> u32 {
        self.state.address
    }

    /// Writes the address port.
    pub fn set_address(&mut self, value: u32) {
        self.state.address = value & spec::ADDRESS;
    }

    /// Register of the bridge that a data-port access at `lane` (0-3) means.
    fn register(&self, lane: u16) -> Option<usize> {
        let selected = self.state.address & !0xff == spec::ENABLE;
        selected.then_some((self.state.address & 0xfc) as usize + usize::from(lane & 3))
    }

    /// Reads a byte of the data port.
    pub fn read(&self, lane: u16) -> u8 {
        let Some(register) = self.register(lane) else {
            return 0xff;
        };
        let mut header = [0; 0x40];
        header[..4].copy_from_slice(&spec::IDS);
        header[spec::COMMAND..spec::COMMAND + 2].copy_from_slice(&self.state.command.to_le_bytes());
        header[8..12].copy_from_slice(&spec::CLASS);
        header.get(register).copied().unwrap_or(0)
    }

    /// Writes a byte of the data port.
    pub fn write(&mut self, lane: u16, value: u8) {
        if let Some(register @ spec::COMMAND..=5) = self.register(lane) {
            let mut bytes = self.state.command.to_le_bytes();
            bytes[register - spec::COMMAND] = value;
            self.state.command = u16::from_le_bytes(bytes) & spec::COMMAND_WRITABLE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pci: &mut Pci, address: u32) -> u32 {
        pci.set_address(address);
        u32::from_le_bytes([0, 1, 2, 3].map(|lane| pci.read(lane)))
    }

    #[test]
    fn a_host_bridge_is_the_only_function() {
        let mut pci = Pci::default();
        assert_eq!(read(&mut pci, 0x8000_0000), 0x0d57_8086);
        assert_eq!(read(&mut pci, 0x8000_0008) >> 16, 0x0600);
        assert_eq!(read(&mut pci, 0x8000_0100), u32::MAX);
        assert_eq!(read(&mut pci, 0x8001_0000), u32::MAX);
        assert_eq!(read(&mut pci, 0x0000_0000), u32::MAX);
    }

    #[test]
    fn the_address_reads_back_and_the_command_is_kept() {
        let mut pci = Pci::default();
        pci.set_address(0x8000_0007);
        assert_eq!(pci.address(), 0x8000_0004);
        pci.write(0, 0xff);
        pci.write(2, 0xff);
        assert_eq!(read(&mut pci, 0x8000_0004), 0x0007);
    }
}
