//! The PVH entry: Xen's "x86/HVM direct boot ABI", `hvm_start_info` version 1.

use hypernest_cpu::{Ram, VcpuState};

use super::elf::{self, Elf};
use super::{
    Boot, BootError, entry, keep_free, layout, low_memory, place_high, write_command_line,
};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const HEADER_LEN: u64 = 56;
const MODULE_LEN: u64 = 32;
const REGION_LEN: u64 = 24;

/// What [`write_info`] has placed.
pub struct StartInfo {
    /// Address and bytes of each module.
    pub modules: Vec<(u64, u64)>,
}

/// Loads an ELF image and enters it by its PVH note.
pub fn load(
    boot: &Boot,
    ram: &mut Ram,
    state: &mut VcpuState,
    file: &[u8],
    elf: &Elf,
    initrd_end: u64,
) -> Result<(), BootError> {
    let Some(pvh_entry) = elf.pvh_entry else {
        return Err(super::damaged("ELF", "it has no PVH note"));
    };
    let used = [
        layout::START_INFO..layout::GDT_END,
        layout::COMMAND_LINE..layout::COMMAND_LINE_END,
    ];
    keep_free(elf, used)?;
    elf::load(ram, file, &elf.segments)?;
    write_info(boot, ram, elf.end(), initrd_end)?;
    let registers = (0, layout::START_INFO as u32, 0);
    entry::protected_32(ram, state, pvh_entry, registers).map_err(|error| low_memory(ram, error))
}

/// Places command line and modules, and writes `hvm_start_info` with its lists.
pub fn write_info(
    boot: &Boot,
    ram: &mut Ram,
    image_end: u64,
    initrd_end: u64,
) -> Result<StartInfo, BootError> {
    write_command_line(ram, boot.command_line, usize::MAX)?;
    let map = layout::memory_map(ram);
    let map_address = layout::START_INFO + HEADER_LEN;
    let list_address = map_address + REGION_LEN * map.len() as u64;
    let room = (layout::START_INFO_END - list_address) / MODULE_LEN;

    let mut modules = Vec::new();
    let mut top = initrd_end;
    for module in boot.all_modules() {
        if modules.len() as u64 == room {
            return Err(BootError::Unsupported {
                what: "PVH",
                demand: format!("more than {room} modules"),
            });
        }
        let what = if modules.is_empty() && boot.initrd.is_some() {
            "the initrd"
        } else {
            "a module"
        };
        top = place_high(ram, what, module.bytes, image_end, top)?;
        modules.push((top, module.bytes.len() as u64));
    }

    let mut info = Vec::new();
    let list = if modules.is_empty() { 0 } else { list_address };
    for word in [MAGIC, VERSION, 0, modules.len() as u32] {
        info.extend(word.to_le_bytes());
    }
    let rsdp = boot.acpi.map_or(0, |acpi| acpi.rsdp);
    for address in [list, layout::COMMAND_LINE, rsdp, map_address] {
        info.extend(address.to_le_bytes());
    }
    info.extend((map.len() as u64).to_le_bytes());
    for region in &map {
        info.extend(region.start.to_le_bytes());
        info.extend(region.len.to_le_bytes());
        info.extend(u64::from(region.kind as u32).to_le_bytes());
    }
    for (address, len) in &modules {
        for word in [*address, *len, 0, 0] {
            info.extend(word.to_le_bytes());
        }
    }
    elf::put(ram, "the PVH start information", layout::START_INFO, &info)?;
    Ok(StartInfo { modules })
}
