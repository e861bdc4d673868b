//! Every guest address of the board, in one place.

/// First byte of the virtio-mmio slots.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio slot.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Most virtio-mmio devices: one GSI each from [`VIRTIO_GSI`] to the last I/O APIC pin.
pub const VIRTIO_SLOTS: usize = 8;
/// Global system interrupt of the first virtio-mmio slot.
pub const VIRTIO_GSI: u8 = 16;

/// Where the guest may place PCI devices: the window the host bridge hands out.
pub const PCI_WINDOW: core::ops::RangeInclusive<u32> = 0xe000_0000..=0xfebf_ffff;
/// I/O APIC.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Bytes the I/O APIC answers to.
pub const IO_APIC_SIZE: u64 = 0x1000;
/// Local APICs: answered by the processor, never by the board.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// RAM of the kvm-unit-tests device.
pub const TEST_RAM: u64 = 0xff00_0000;
/// Bytes of [`TEST_RAM`].
pub const TEST_RAM_SIZE: u64 = 0x1_0000;

/// First byte of the ACPI tables: the RSDP, then the rest. In the area a PC's firmware is
/// searched for an RSDP (ACPI, "Finding the RSDP on IA-PC Systems").
pub const ACPI_TABLES: u64 = 0x000e_0000;
/// First byte after the room for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0x0010_0000;

/// PM1a event block: status, then enable.
pub const PM1A_EVENT: u16 = 0x600;
/// PM1a control.
pub const PM1A_CONTROL: u16 = 0x604;
/// Power-management timer.
pub const PM_TIMER: u16 = 0x608;
/// ACPI's interrupt.
pub const SCI_GSI: u8 = 9;
/// Reset control register.
pub const RESET_CONTROL: u16 = 0xcf9;
/// First serial port.
pub const COM1: u16 = 0x3f8;
/// GSI of the first serial port.
pub const COM1_GSI: u8 = 4;
/// GSI of channel 0 of the interval timer.
pub const PIT_GSI: u8 = 0;
/// GSI of the real-time clock.
pub const RTC_GSI: u8 = 8;
