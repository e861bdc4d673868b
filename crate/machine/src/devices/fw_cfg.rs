//! The firmware configuration device: numbered items and named files the guest reads byte by byte
//! (QEMU documentation, "QEMU Firmware Configuration (fw_cfg) Device"). Without DMA.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Item numbers.
mod spec {
    pub const SIGNATURE: u16 = 0x00;
    pub const ID: u16 = 0x01;
    pub const RAM_SIZE: u16 = 0x03;
    pub const CPUS: u16 = 0x05;
    pub const MAX_CPUS: u16 = 0x0f;
    pub const DIRECTORY: u16 = 0x19;
    pub const FIRST_FILE: u16 = 0x20;
    /// ID: the port interface, no DMA.
    pub const TRADITIONAL: u32 = 1;
    /// Bytes of a name in the directory, terminator included.
    pub const NAME: usize = 56;
}

/// A file of the directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgFile {
    /// Name, up to 55 bytes.
    pub name: String,
    /// Item number.
    pub item: u16,
}

/// All of the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgState {
    /// Selected item.
    pub selected: u16,
    /// Next byte of it.
    pub offset: u32,
    /// Contents of the items.
    pub items: BTreeMap<u16, Vec<u8>>,
    /// Named items.
    pub files: Vec<FwCfgFile>,
}

/// The device. Its whole content is [`FwCfgState`].
#[derive(Debug, Default)]
pub struct FwCfg {
    pub(crate) state: FwCfgState,
}

impl FwCfg {
    /// The items every machine has.
    pub fn new(ram: u64, cpus: u32) -> FwCfg {
        let mut fw_cfg = FwCfg::default();
        let cpus = u16::try_from(cpus).unwrap_or(u16::MAX).to_le_bytes();
        fw_cfg.set_item(spec::SIGNATURE, b"QEMU".to_vec());
        fw_cfg.set_item(spec::ID, spec::TRADITIONAL.to_le_bytes().to_vec());
        fw_cfg.set_item(spec::RAM_SIZE, ram.to_le_bytes().to_vec());
        fw_cfg.set_item(spec::CPUS, cpus.to_vec());
        fw_cfg.set_item(spec::MAX_CPUS, cpus.to_vec());
        fw_cfg.write_directory();
        fw_cfg
    }

    /// Sets a numbered item.
    pub fn set_item(&mut self, item: u16, content: Vec<u8>) {
        self.state.items.insert(item, content);
    }

    /// Adds a named file, or replaces one of the same name. Names are cut to 55 bytes.
    pub fn set_file(&mut self, name: &str, content: Vec<u8>) {
        let mut end = name.len().min(spec::NAME - 1);
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        let name = &name[..end];
        let item = match self.state.files.iter().find(|file| file.name == name) {
            Some(file) => file.item,
            None => {
                let item = spec::FIRST_FILE + self.state.files.len() as u16;
                self.state.files.push(FwCfgFile {
                    name: name.to_owned(),
                    item,
                });
                item
            }
        };
        self.set_item(item, content);
        self.write_directory();
    }

    fn write_directory(&mut self) {
        let mut directory = (self.state.files.len() as u32).to_be_bytes().to_vec();
        for file in &self.state.files {
            let size = self.state.items.get(&file.item).map_or(0, Vec::len) as u32;
            directory.extend(size.to_be_bytes());
            directory.extend(file.item.to_be_bytes());
            directory.extend([0; 2]);
            let mut name = [0; spec::NAME];
            name[..file.name.len()].copy_from_slice(file.name.as_bytes());
            directory.extend(name);
        }
        self.set_item(spec::DIRECTORY, directory);
    }

    /// Writes the selector port.
    pub fn select(&mut self, item: u16) {
        self.state.selected = item;
        self.state.offset = 0;
    }

    /// Reads the data port: the next byte of the item, 0 after its end.
    pub fn read(&mut self) -> u8 {
        let item = self.state.items.get(&self.state.selected);
        let byte = item.and_then(|item| item.get(self.state.offset as usize).copied());
        if byte.is_some() {
            self.state.offset += 1;
        }
        byte.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(fw_cfg: &mut FwCfg, item: u16) -> [u8; N] {
        fw_cfg.select(item);
        std::array::from_fn(|_| fw_cfg.read())
    }

    #[test]
    fn the_usual_items_are_there() {
        let mut fw_cfg = FwCfg::new(0x2000_0000, 3);
        assert_eq!(&read(&mut fw_cfg, 0), b"QEMU");
        assert_eq!(read(&mut fw_cfg, 1), [1, 0, 0, 0]);
        assert_eq!(u64::from_le_bytes(read(&mut fw_cfg, 3)), 0x2000_0000);
        assert_eq!(read(&mut fw_cfg, 5), [3, 0]);
    }

    #[test]
    fn bytes_after_the_end_and_unknown_items_read_zero() {
        let mut fw_cfg = FwCfg::new(1, 1);
        assert_eq!(read(&mut fw_cfg, 5), [1, 0, 0, 0]);
        assert_eq!(read(&mut fw_cfg, 0x7777), [0; 4]);
    }

    #[test]
    fn files_are_found_through_the_directory() {
        let mut fw_cfg = FwCfg::new(1, 1);
        fw_cfg.set_file("opt/a", b"first".to_vec());
        fw_cfg.set_file("opt/b", b"x".to_vec());
        fw_cfg.set_file("opt/a", b"other".to_vec());
        let directory: [u8; 4 + 2 * 64] = read(&mut fw_cfg, 0x19);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..12], [0, 0, 0, 5, 0, 0x20, 0, 0]);
        assert_eq!(&directory[12..18], b"opt/a\0");
        assert_eq!(&read(&mut fw_cfg, 0x20), b"other");
    }
}
