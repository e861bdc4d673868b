//! Ports: which device answers, byte-wide devices and wide accesses.

use hypernest_cpu::{Ram, Tick};

use super::{Board, Pause, StopRequest};
use crate::devices::power::Power;
use crate::interrupts::Source;
use crate::layout;

/// The built-in device behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Port {
    Pic,
    Pit,
    SystemControl,
    Keyboard,
    Rtc,
    FastReset,
    TestLatch,
    TestFlush,
    Debug,
    Exit,
    Serial,
    FwCfgSelect,
    FwCfgData,
    Power,
    PowerTimer,
    PciAddress,
    ResetControl,
    PciData,
    TestInterrupt,
    Shutdown,
}

impl Port {
    pub(super) fn at(port: u16) -> Option<Port> {
        Some(match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => Port::Pic,
            0x40..=0x43 => Port::Pit,
            0x61 => Port::SystemControl,
            0x60 | 0x64 => Port::Keyboard,
            0x70 | 0x71 => Port::Rtc,
            0x92 => Port::FastReset,
            0xe0..=0xe3 => Port::TestLatch,
            0xe4..=0xe7 => Port::TestFlush,
            0xe9 => Port::Debug,
            0xf4..=0xf7 => Port::Exit,
            layout::COM1..=0x3ff => Port::Serial,
            0x510 => Port::FwCfgSelect,
            0x511 => Port::FwCfgData,
            layout::PM1A_EVENT..=0x605 => Port::Power,
            layout::PM_TIMER..=0x60b => Port::PowerTimer,
            layout::RESET_CONTROL => Port::ResetControl,
            0xcf8..=0xcfb => Port::PciAddress,
            0xcfc..=0xcff => Port::PciData,
            0x2000..=0x2017 => Port::TestInterrupt,
            0x8900 => Port::Shutdown,
            _ => return None,
        })
    }
}

impl Board {
    pub(super) fn read_port(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8) -> u32 {
        let Some(device) = Port::at(port) else {
            return self.read_custom_port(ram, now, port, width);
        };
        match device {
            Port::PowerTimer if width == 4 => return Power::timer(now),
            Port::PciAddress if width == 4 && port == 0xcf8 => return self.pci.address(),
            Port::Exit => return 0,
            _ if width > 1 => return self.read_lanes(ram, now, port, width),
            _ => {}
        }
        let value = match device {
            Port::Pic => self.interrupts.pic.read(port),
            Port::Pit => self.pit.read(now, port & 3),
            Port::SystemControl => self.pit.read_port_61(now),
            Port::Keyboard => self.i8042.read(port),
            Port::Rtc => self.rtc.read(now, port),
            Port::FastReset => self.power.read_port_92(),
            Port::TestLatch => self.test.read_latch(port),
            Port::Debug => 0xe9, // tells that the port is there
            Port::Serial => self.serial.read(port - layout::COM1),
            Port::FwCfgData => self.fw_cfg.read(),
            Port::Power => self.power.read(now, port - layout::PM1A_EVENT),
            Port::PowerTimer => Power::timer(now).to_le_bytes()[usize::from(port & 3)],
            Port::PciAddress => self.pci.address().to_le_bytes()[usize::from(port & 3)],
            Port::ResetControl => self.power.read_reset(),
            Port::PciData => self.pci.read(port & 3),
            Port::Exit
            | Port::TestFlush
            | Port::FwCfgSelect
            | Port::TestInterrupt
            | Port::Shutdown => 0xff,
        };
        self.update_lines();
        u32::from(value)
    }

    /// A wide access to byte-wide devices: byte by byte on neighbouring ports, as on the ISA bus.
    fn read_lanes(&mut self, ram: &mut Ram, now: Tick, port: u16, width: u8) -> u32 {
        (0..width).fold(0, |value, lane| {
            let port = port.wrapping_add(u16::from(lane));
            value | self.read_port(ram, now, port, 1) << (8 * lane)
        })
    }

    pub(super) fn write_port(
        &mut self,
        ram: &mut Ram,
        now: Tick,
        port: u16,
        width: u8,
        value: u32,
    ) {
        let Some(device) = Port::at(port) else {
            return self.write_custom_port(ram, now, port, width, value);
        };
        match device {
            Port::Exit => return self.end(Some(StopRequest::Exit(value))),
            Port::TestInterrupt => {
                let gsi = (port & 0x1f) as u8;
                return self.interrupts.set(Source::TEST, gsi, value != 0);
            }
            Port::TestFlush => return,
            Port::FwCfgSelect if width == 2 => return self.fw_cfg.select(value as u16),
            Port::PciAddress if width == 4 && port == 0xcf8 => return self.pci.set_address(value),
            Port::Power if width == 2 && port & 1 == 0 => {
                let offset = port - layout::PM1A_EVENT;
                let request = self.power.write(now, offset, 2, value as u16);
                self.end(request);
                return self.update_lines();
            }
            _ if width > 1 => {
                for lane in 0..width {
                    let port = port.wrapping_add(u16::from(lane));
                    self.write_port(ram, now, port, 1, value >> (8 * lane) & 0xff);
                }
                return;
            }
            _ => {}
        }
        let byte = value as u8;
        let request = match device {
            Port::Pic => {
                self.interrupts.pic.write(port, byte);
                None
            }
            Port::Pit => {
                self.pit.write(now, port & 3, byte);
                let output = self.pit.output(now);
                self.interrupts.set(Source::PIT, layout::PIT_GSI, output);
                None
            }
            Port::SystemControl => {
                self.pit.write_port_61(now, byte);
                None
            }
            Port::Keyboard => self.i8042.write(port, byte),
            Port::Rtc => {
                self.rtc.write(now, port, byte);
                None
            }
            Port::FastReset => self.power.write_port_92(byte),
            Port::TestLatch => {
                self.test.write_latch(port, byte);
                None
            }
            Port::Debug => {
                self.debug_output.push(byte);
                None
            }
            Port::Serial => {
                if let Some(byte) = self.serial.write(port - layout::COM1, byte)
                    && let Some(text) = self.serial_output.put(byte)
                {
                    self.pause = Some(Pause::Text(text));
                }
                None
            }
            Port::FwCfgSelect => {
                self.fw_cfg.select(u16::from(byte));
                None
            }
            Port::Power => self
                .power
                .write(now, port - layout::PM1A_EVENT, 1, u16::from(byte)),
            Port::ResetControl => self.power.write_reset(byte),
            Port::PciData => {
                self.pci.write(port & 3, byte);
                None
            }
            Port::Shutdown => self.test.write_shutdown(byte),
            Port::FwCfgData
            | Port::PowerTimer
            | Port::PciAddress
            | Port::Exit
            | Port::TestFlush
            | Port::TestInterrupt => None,
        };
        self.end(request);
        self.update_lines();
    }
}
