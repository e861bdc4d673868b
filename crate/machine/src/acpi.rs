//! ACPI tables: what tells a guest where the board's devices are.
//!
//! Not hardware-reduced: the board has the 8259 pair, the interval timer and PM1.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as RegisterSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, facs::FACS, xsdt::XSDT};

use crate::boot::AcpiTables;
use crate::devices::power::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::layout;

const OEM: [u8; 6] = *b"HYPNST";
const OEM_TABLE: [u8; 8] = *b"HYPRNEST";
const REVISION: u32 = 1;
/// Bytes of an SDT header.
const HEADER: u32 = 36;

/// The tables of a machine with `cpus` processors and `virtio` devices in virtio-mmio slots,
/// with the addresses they are to be put at: the RSDP at [`layout::ACPI_TABLES`].
pub fn build(cpus: u32, virtio: usize) -> AcpiTables {
    let mut tables = Vec::new();
    let mut next = layout::ACPI_TABLES + 64; // the RSDP comes last and lies first
    let mut place = |bytes: Vec<u8>| {
        let address = next;
        next = (next + bytes.len() as u64).next_multiple_of(64);
        debug_assert!(next <= layout::ACPI_TABLES_END);
        tables.push((address, bytes));
        address
    };
    let dsdt = place(dsdt(virtio));
    let facs = place(bytes(&FACS::new()));
    let fadt = place(fadt(dsdt, facs));
    let madt = place(madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    tables.push((layout::ACPI_TABLES, bytes(&Rsdp::new(OEM, xsdt))));
    AcpiTables {
        rsdp: layout::ACPI_TABLES,
        tables,
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed hardware.
fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    /// Boot architecture: there are ISA devices; no VGA; no 8042 keyboard to look for.
    const LEGACY_DEVICES: u16 = 1 << 0;
    const NO_VGA: u16 = 1 << 2;
    let port = |port: u16, bits: u8, size: AccessSize| {
        GAS::new(RegisterSpace::SystemIo, bits, 0, size, u64::from(port))
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = u16::from(layout::SCI_GSI).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1A_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(layout::PM1A_EVENT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(layout::PM1A_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(layout::PM1A_CONTROL, 16, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(layout::PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(layout::PM_TIMER, 32, AccessSize::DwordAccess);
    fadt.reset_reg = port(layout::RESET_CONTROL, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    // No C2 and C3.
    fadt.p_lvl2_lat = 0x0fff.into();
    fadt.p_lvl3_lat = 0x0fff.into();
    fadt.century = 0x32;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    bytes(&fadt.finalize())
}

/// Interrupt controllers (ACPI, "Multiple APIC Description Table").
fn madt(cpus: u32) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", HEADER, 4, OEM, OEM_TABLE, REVISION);
    madt.append_slice(&(layout::LOCAL_APIC as u32).to_le_bytes());
    madt.append_slice(&1u32.to_le_bytes()); // there are 8259s too
    for cpu in 0..cpus.min(255) as u8 {
        madt.append_slice(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    madt.append_slice(&[1, 12, 0, 0]);
    madt.append_slice(&(layout::IO_APIC as u32).to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    // ISA interrupt 0 arrives at pin 2; the SCI is level-triggered, active high.
    madt.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    let sci = layout::SCI_GSI;
    madt.append_slice(&[2, 10, 0, sci, sci, 0, 0, 0, 0x0d, 0]);
    // LINT1 of every local APIC is NMI.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt.as_slice().to_vec()
}

/// Devices that cannot be found by looking.
fn dsdt(virtio: usize) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM, OEM_TABLE, REVISION);
    let off = SLEEP_TYPE_OFF as u8;
    let s5 = Package::new(vec![&off, &off, &0u8, &0u8]);
    dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &s5)));
    dsdt.append_slice(&host_bridge());
    dsdt.append_slice(&isa_device(
        "COM1",
        "PNP0501",
        layout::COM1,
        8,
        layout::COM1_GSI,
    ));
    dsdt.append_slice(&isa_device("RTC_", "PNP0B00", 0x70, 2, layout::RTC_GSI));
    for slot in 0..virtio {
        dsdt.append_slice(&virtio_device(slot));
    }
    dsdt.as_slice().to_vec()
}

/// A device below `\_SB`.
fn device(name: &str, id: &dyn Aml, number: usize, resources: Vec<&dyn Aml>) -> Vec<u8> {
    let resources = ResourceTemplate::new(resources);
    let (hid, uid, cca, crs) = (
        Name::new("_HID".into(), id),
        Name::new("_UID".into(), &(number as u8)),
        Name::new("_CCA".into(), &1u8),
        Name::new("_CRS".into(), &resources),
    );
    let device = Device::new(Path::new(name), vec![&hid, &uid, &cca, &crs]);
    bytes(&Scope::new("_SB_".into(), vec![&device]))
}

fn host_bridge() -> Vec<u8> {
    let window = layout::PCI_WINDOW;
    let (first, last) = (*window.start(), *window.end());
    let uncached = AddressSpaceCacheable::NotCacheable;
    device(
        "PCI0",
        &EISAName::new("PNP0A03"),
        0,
        vec![
            &AddressSpace::new_bus_number(0u16, 0xffu16),
            &IO::new(0xcf8, 0xcf8, 1, 8),
            &AddressSpace::new_io(0u16, 0xcf7u16, None),
            &AddressSpace::new_io(0xd00u16, 0xffffu16, None),
            &AddressSpace::new_memory(uncached, true, first, last, None),
        ],
    )
}

fn isa_device(name: &str, id: &str, port: u16, ports: u8, gsi: u8) -> Vec<u8> {
    device(
        name,
        &EISAName::new(id),
        0,
        vec![
            &IO::new(port, port, 1, ports),
            &Interrupt::new(true, true, false, false, u32::from(gsi)),
        ],
    )
}

fn virtio_device(slot: usize) -> Vec<u8> {
    let base = layout::VIRTIO_BASE + slot as u64 * layout::VIRTIO_STRIDE;
    let gsi = u32::from(layout::VIRTIO_GSI) + slot as u32;
    device(
        &format!("VIO{slot}"),
        &"LNRO0005",
        slot,
        vec![
            &Memory32Fixed::new(true, base as u32, layout::VIRTIO_STRIDE as u32),
            &Interrupt::new(true, false, false, false, gsi),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(tables: &AcpiTables, address: u64) -> &[u8] {
        let found = tables.tables.iter().find(|(at, _)| *at == address);
        &found.expect("a table at that address").1
    }

    fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
        bytes[at..at + len]
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn contains(bytes: &[u8], part: &[u8]) -> bool {
        bytes.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn the_root_pointer_leads_to_every_table_and_all_sums_are_zero() {
        let tables = build(3, 2);
        let rsdp = find(&tables, tables.rsdp);
        assert!(rsdp.starts_with(b"RSD PTR "));
        assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
        let xsdt = find(&tables, number(rsdp, 24, 8));
        assert!(xsdt.starts_with(b"XSDT"));
        let signatures: Vec<&[u8]> = xsdt[36..]
            .chunks(8)
            .map(|entry| &find(&tables, number(entry, 0, 8))[..4])
            .collect();
        assert_eq!(signatures, [b"FACP", b"APIC"]);
        let fadt = find(&tables, number(xsdt, 36, 8));
        assert!(find(&tables, number(fadt, 140, 8)).starts_with(b"DSDT"));
        assert!(find(&tables, number(fadt, 36, 4)).starts_with(b"FACS"));
        for (_, table) in &tables.tables {
            if !table.starts_with(b"FACS") && !table.starts_with(b"RSD") {
                assert_eq!(number(table, 4, 4), table.len() as u64);
                assert_eq!(sum(table), 0);
            }
        }
    }

    #[test]
    fn tables_neither_overlap_nor_leave_their_area() {
        let mut tables = build(64, layout::VIRTIO_SLOTS).tables;
        tables.sort();
        for pair in tables.windows(2) {
            assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0);
        }
        let (address, last) = tables.last().unwrap();
        assert!(address + last.len() as u64 <= layout::ACPI_TABLES_END);
    }

    #[test]
    fn the_fadt_names_the_fixed_hardware() {
        let tables = build(1, 0);
        let fadt = &tables.tables[2].1;
        assert!(fadt.starts_with(b"FACP"));
        assert_eq!(number(fadt, 46, 2), 9);
        assert_eq!(number(fadt, 56, 4), 0x600);
        assert_eq!(number(fadt, 64, 4), 0x604);
        assert_eq!(number(fadt, 76, 4), 0x608);
        assert_eq!(number(fadt, 116, 12), 0xcf9 << 32 | 0x0100_0801);
        assert_eq!(fadt[128], 0x06);
        assert_eq!(number(fadt, 112, 4) & 1 << 20, 0, "not hardware-reduced");
    }

    #[test]
    fn the_madt_lists_every_processor_and_the_timer_override() {
        let tables = build(3, 0);
        let madt = &tables.tables[3].1;
        assert!(madt.starts_with(b"APIC"));
        assert!(contains(madt, &[0, 8, 2, 2, 1, 0, 0, 0]));
        assert!(!contains(madt, &[0, 8, 3, 3, 1, 0, 0, 0]));
        assert!(contains(madt, &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]));
        assert!(contains(madt, &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]));
    }

    #[test]
    fn the_dsdt_has_one_device_per_virtio_slot() {
        let dsdt = |virtio| build(1, virtio).tables[0].1.clone();
        assert!(!contains(&dsdt(0), b"LNRO0005"));
        let two = dsdt(2);
        assert!(contains(&two, b"VIO1") && !contains(&two, b"VIO2"));
        // Memory32Fixed, read-write, base, length.
        assert!(contains(
            &two,
            &[0x86, 9, 0, 1, 0, 0x10, 0, 0xd0, 0, 0x10, 0, 0]
        ));
    }
}
