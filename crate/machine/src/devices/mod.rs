//! The devices of the board. Each file has the names of its data sheet (`spec`), the behaviour,
//! and a state type that is all of the device that changes.

pub mod fw_cfg;
pub mod i8042;
pub mod io_apic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod testdev;
pub mod virtio;
