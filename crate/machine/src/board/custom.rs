//! Devices of the library's user on the board.

use hypernest_cpu::{Ram, Tick};

use super::Board;
use super::ports::Port;
use crate::device::{Claim, Device, DeviceAccess, DeviceContext, DeviceError};
use crate::interrupts::Source;
use crate::layout;

pub(super) struct Custom {
    pub(super) device: Box<dyn Device>,
    pub(super) claims: Vec<Claim>,
}

impl Board {
    /// The names of the devices of the library's user, in their order.
    pub(crate) fn custom_names(&self) -> impl Iterator<Item = String> {
        self.custom
            .iter()
            .map(|custom| custom.device.name().to_owned())
    }

    /// Adds a device of the library's user.
    pub fn add_device(&mut self, device: Box<dyn Device>) -> Result<(), DeviceError> {
        let name = device.name().to_owned();
        let claims = device.claims();
        if self.custom.len() == Source::CUSTOM {
            return Err(DeviceError::TooMany {
                what: "custom devices",
                limit: Source::CUSTOM,
            });
        }
        if self.custom.iter().any(|other| other.device.name() == name) {
            return Err(DeviceError::Name(name));
        }
        for (index, claim) in claims.iter().enumerate() {
            let sound = match claim {
                Claim::Ports(ports) => ports.start < ports.end && ports.end <= 0x1_0000,
                Claim::Memory(range) => range.start < range.end,
            };
            if !sound {
                return Err(DeviceError::Range {
                    device: name,
                    claim: claim.clone(),
                });
            }
            let others = self.custom.iter().flat_map(|other| &other.claims);
            let overlaps = |other: &Claim| match (claim, other) {
                (Claim::Ports(a), Claim::Ports(b)) => a.start < b.end && b.start < a.end,
                (Claim::Memory(a), Claim::Memory(b)) => a.start < b.end && b.start < a.end,
                _ => false,
            };
            let taken_by = if Self::meets_built_in(claim) {
                Some("a device of the board")
            } else if others.chain(&claims[..index]).any(overlaps) {
                Some("another custom device")
            } else {
                None
            };
            if let Some(taken_by) = taken_by {
                return Err(DeviceError::Overlap {
                    device: name,
                    claim: claim.clone(),
                    taken_by: taken_by.to_owned(),
                });
            }
        }
        self.custom.push(Custom { device, claims });
        self.update_deadline();
        Ok(())
    }

    fn meets_built_in(claim: &Claim) -> bool {
        match claim {
            Claim::Ports(ports) => ports.clone().any(|port| Port::at(port as u16).is_some()),
            Claim::Memory(range) => [
                (
                    layout::VIRTIO_BASE,
                    layout::VIRTIO_STRIDE * layout::VIRTIO_SLOTS as u64,
                ),
                (layout::IO_APIC, layout::IO_APIC_SIZE),
                (layout::LOCAL_APIC, 0x1000),
                (layout::TEST_RAM, layout::TEST_RAM_SIZE),
            ]
            .iter()
            .any(|&(start, len)| range.start < start + len && start < range.end),
        }
    }

    /// The custom device and the access that an address within one of its claims means.
    fn custom_at(
        &self,
        width: u8,
        offset_in: impl Fn(&Claim) -> Option<u64>,
    ) -> Option<(usize, DeviceAccess)> {
        self.custom.iter().enumerate().find_map(|(index, custom)| {
            custom.claims.iter().enumerate().find_map(|(claim, range)| {
                let offset = offset_in(range)?;
                let access = DeviceAccess {
                    claim,
                    offset,
                    width,
                };
                Some((index, access))
            })
        })
    }

    pub(super) fn with_custom<T>(
        &mut self,
        ram: &mut Ram,
        now: Tick,
        index: usize,
        work: impl FnOnce(&mut dyn Device, &mut DeviceContext<'_>) -> T,
    ) -> T {
        let mut context = DeviceContext {
            ram,
            now,
            interrupts: &mut self.interrupts,
            source: Source::custom(index),
        };
        let result = work(&mut *self.custom[index].device, &mut context);
        self.update_deadline();
        result
    }

    fn custom_port(&self, port: u16, width: u8) -> Option<(usize, DeviceAccess)> {
        let port = u32::from(port);
        self.custom_at(width, |claim| match claim {
            Claim::Ports(ports) if ports.contains(&port) => Some(u64::from(port - ports.start)),
            _ => None,
        })
    }

    pub(super) fn read_custom_port(
        &mut self,
        ram: &mut Ram,
        now: Tick,
        port: u16,
        width: u8,
    ) -> u32 {
        let Some((index, access)) = self.custom_port(port, width) else {
            return u32::MAX;
        };
        self.with_custom(ram, now, index, |device, context| {
            device.read(context, access)
        }) as u32
    }

    pub(super) fn write_custom_port(
        &mut self,
        ram: &mut Ram,
        now: Tick,
        port: u16,
        width: u8,
        value: u32,
    ) {
        if let Some((index, access)) = self.custom_port(port, width) {
            self.with_custom(ram, now, index, |device, context| {
                device.write(context, access, u64::from(value));
            });
        }
    }

    pub(super) fn custom_memory(&self, address: u64, width: u8) -> Option<(usize, DeviceAccess)> {
        self.custom_at(width, |claim| match claim {
            Claim::Memory(range) if range.contains(&address) => Some(address - range.start),
            _ => None,
        })
    }
}
