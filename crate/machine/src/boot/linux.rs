//! Linux bzImage: its setup header, its payload unpacked on the host, and the kernel's own 64-bit
//! and 32-bit boot protocols (Documentation/arch/x86/boot.rst).

use hypernest_cpu::{Ram, VcpuState};

use super::elf::{self, Elf};
use super::unpack::{Packing, unpack};
use super::{
    Boot, BootError, damaged, entry, layout, low_memory, place_high, pvh, write_command_line,
};

/// Offsets in the file and in `boot_params`.
mod offset {
    pub const RSDP: usize = 0x070;
    pub const EXT_RAMDISK_IMAGE: usize = 0x0c0;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const HEADER: usize = 0x1f1;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const JUMP: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const COMMAND_LINE: usize = 0x228;
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    pub const XLOADFLAGS: usize = 0x236;
    pub const COMMAND_LINE_SIZE: usize = 0x238;
    pub const PAYLOAD_OFFSET: usize = 0x248;
    pub const PAYLOAD_LENGTH: usize = 0x24c;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    pub const E820: usize = 0x2d0;
}

const MAGIC: &[u8] = b"HdrS";
const BOOT_FLAG: [u8; 2] = [0x55, 0xaa];
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// "Undefined" in the list of boot loaders.
const LOADER: u8 = 0xff;
/// Protocol 2.06 gives the command line its size; Linux 2.6.22.
const OLDEST: u16 = 0x206;
const ENTRY_64: u64 = 0x200;
const PARAMS_LEN: usize = 4096;

/// Whether these are the first bytes of a Linux boot image.
pub fn is_bzimage(bytes: &[u8]) -> bool {
    bytes
        .get(offset::MAGIC..)
        .is_some_and(|rest| rest.starts_with(MAGIC))
        && bytes
            .get(offset::BOOT_FLAG..)
            .is_some_and(|rest| rest.starts_with(&BOOT_FLAG))
}

/// The parts of the setup header that we use, checked against the file.
struct Setup<'a> {
    /// The header as it goes into `boot_params`.
    header: &'a [u8],
    /// 32/64-bit code.
    kernel: &'a [u8],
    payload: Option<&'a [u8]>,
    is_64: bool,
    initrd_end: u64,
    command_line_limit: usize,
    load_address: u64,
    memory_len: u64,
}

/// `N` bytes at `at`, or an error that names the field.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], BootError> {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().ok_or_else(|| {
        damaged(
            "Linux",
            format!("it ends inside its setup header, at {at:#x}"),
        )
    })
}

fn field32(bytes: &[u8], at: usize) -> Result<u32, BootError> {
    field(bytes, at).map(u32::from_le_bytes)
}

impl<'a> Setup<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Setup<'a>, BootError> {
        let version = u16::from_le_bytes(field(bytes, offset::VERSION)?);
        if version < OLDEST {
            return Err(BootError::Unsupported {
                what: "Linux",
                demand: format!("boot protocol {}.{:02}", version >> 8, version & 0xff),
            });
        }
        let [flags] = field(bytes, offset::LOADFLAGS)?;
        if flags & LOADED_HIGH == 0 {
            return Err(BootError::Unsupported {
                what: "Linux",
                demand: "loading below 1 MiB (a zImage)".into(),
            });
        }
        let [sectors] = field(bytes, offset::HEADER)?;
        let sectors = if sectors == 0 {
            4
        } else {
            usize::from(sectors)
        };
        let code = (sectors + 1) * 512;
        let kernel = bytes
            .get(code..)
            .filter(|kernel| !kernel.is_empty())
            .ok_or_else(|| {
                let why = format!(
                    "its code should start at {code}, it has {} bytes",
                    bytes.len()
                );
                damaged("Linux", why)
            })?;
        let [jump] = field(bytes, offset::JUMP)?;
        let header_end = (offset::MAGIC + usize::from(jump)).min(offset::E820);
        let header = bytes.get(offset::HEADER..header_end).unwrap_or_default();
        let payload = if version >= 0x208 {
            payload(bytes, kernel)?
        } else {
            None
        };
        let relocatable = version >= 0x20a;
        let load_address = if relocatable {
            u64::from_le_bytes(field(bytes, offset::PREF_ADDRESS)?)
        } else {
            layout::HIGH_MEMORY
        };
        let memory_len = if relocatable {
            u64::from(field32(bytes, offset::INIT_SIZE)?)
        } else {
            0
        };
        let xloadflags = u16::from_le_bytes(field(bytes, offset::XLOADFLAGS)?);
        Ok(Setup {
            header,
            kernel,
            payload,
            is_64: version >= 0x20c && xloadflags & XLF_KERNEL_64 != 0,
            initrd_end: (u64::from(field32(bytes, offset::INITRD_ADDR_MAX)?) + 1)
                .min(layout::INITRD_END),
            command_line_limit: field32(bytes, offset::COMMAND_LINE_SIZE)? as usize,
            load_address,
            memory_len: memory_len.max(kernel.len() as u64),
        })
    }
}

fn payload<'a>(bytes: &[u8], kernel: &'a [u8]) -> Result<Option<&'a [u8]>, BootError> {
    let start = field32(bytes, offset::PAYLOAD_OFFSET)? as usize;
    let len = field32(bytes, offset::PAYLOAD_LENGTH)? as usize;
    if len == 0 {
        return Ok(None);
    }
    let found = kernel.get(start..).and_then(|rest| rest.get(..len));
    found.map(Some).ok_or_else(|| {
        let why = format!(
            "its payload should be {len} bytes from {start}, the code has {}",
            kernel.len()
        );
        damaged("Linux", why)
    })
}

/// Loads a bzImage, and says how it is entered.
pub fn load_bzimage(
    boot: &Boot,
    ram: &mut Ram,
    state: &mut VcpuState,
) -> Result<String, BootError> {
    let setup = Setup::parse(boot.image)?;
    if !boot.modules.is_empty() {
        return Err(BootError::Modules);
    }
    if boot.command_line.len() > setup.command_line_limit {
        return Err(BootError::CommandLine {
            len: boot.command_line.len(),
            limit: setup.command_line_limit,
        });
    }
    if let Some((packing, vmlinux)) = unpacked(&setup, ram)? {
        let elf = Elf::parse(&vmlinux)?;
        if elf.pvh_entry.is_some() {
            pvh::load(boot, ram, state, &vmlinux, &elf, setup.initrd_end)?;
            return Ok(match packing {
                Packing::None => "PVH".into(),
                packing => format!("PVH, {} unpacked on the host", packing.name()),
            });
        }
    }
    let load = setup.load_address;
    let end = load.saturating_add(setup.memory_len);
    if load < layout::HIGH_MEMORY || ram.offset(end.saturating_sub(1)).is_none() {
        return Err(BootError::OutsideRam {
            what: "the kernel",
            address: load,
            len: setup.memory_len,
            ram: ram.size(),
        });
    }
    elf::put(ram, "the kernel", load, setup.kernel)?;
    write_command_line(ram, boot.command_line, setup.command_line_limit)?;
    let initrd = match boot.initrd {
        Some(bytes) => {
            let address = place_high(ram, "the initrd", bytes, end, setup.initrd_end)?;
            Some((address, bytes.len() as u64))
        }
        None => None,
    };
    write_boot_params(boot, ram, Some(setup.header), initrd)?;
    let params = layout::BOOT_PARAMS;
    if setup.is_64 {
        entry::long_64(ram, state, load + ENTRY_64, (0, params))
            .map_err(|error| low_memory(ram, error))?;
        return Ok("64-bit boot protocol, the guest unpacks itself".into());
    }
    let registers = (0, 0, params as u32);
    entry::protected_32(ram, state, load as u32, registers)
        .map_err(|error| low_memory(ram, error))?;
    Ok("32-bit boot protocol, the guest unpacks itself".into())
}

/// The payload, if it is of a kind that the host unpacks.
fn unpacked(setup: &Setup, ram: &Ram) -> Result<Option<(Packing, Vec<u8>)>, BootError> {
    let Some(payload) = setup.payload else {
        return Ok(None);
    };
    let packing = match Packing::detect(payload) {
        None | Some(Packing::Other(_)) => return Ok(None),
        Some(packing) => packing,
    };
    if packing == Packing::None {
        return Ok(Some((packing, payload.to_vec())));
    }
    // The build appends the unpacked size; gzip ends with it anyway.
    let claimed = payload
        .last_chunk()
        .map_or(0, |size| u32::from_le_bytes(*size));
    if u64::from(claimed) > ram.low_size() {
        return Err(BootError::NoRoom {
            what: "the unpacked kernel",
            len: claimed.into(),
            room: ram.low_size(),
            top: ram.low_size(),
        });
    }
    let bytes = unpack(packing, payload, claimed as usize)
        .map_err(|why| damaged("Linux", format!("{} payload: {why}", packing.name())))?;
    if bytes.len() != claimed as usize {
        let why = format!(
            "its {} payload holds {} bytes, not {claimed}",
            packing.name(),
            bytes.len()
        );
        return Err(damaged("Linux", why));
    }
    Ok(Some((packing, bytes)))
}

/// Writes `boot_params` with the image's setup header, or with one of ours. The command line is in
/// its place already.
pub fn write_boot_params(
    boot: &Boot,
    ram: &mut Ram,
    header: Option<&[u8]>,
    initrd: Option<(u64, u64)>,
) -> Result<(), BootError> {
    let mut params = [0; PARAMS_LEN];
    let mut put = |at: usize, bytes: &[u8]| params[at..at + bytes.len()].copy_from_slice(bytes);
    match header {
        Some(header) => put(offset::HEADER, header),
        None => {
            put(offset::BOOT_FLAG, &BOOT_FLAG);
            put(offset::MAGIC, MAGIC);
            put(offset::VERSION, &0x20c_u16.to_le_bytes());
            put(offset::LOADFLAGS, &[LOADED_HIGH]);
        }
    }
    put(offset::TYPE_OF_LOADER, &[LOADER]);
    put(
        offset::COMMAND_LINE,
        &(layout::COMMAND_LINE as u32).to_le_bytes(),
    );
    if let Some((address, len)) = initrd {
        put(offset::RAMDISK_IMAGE, &(address as u32).to_le_bytes());
        put(offset::RAMDISK_SIZE, &(len as u32).to_le_bytes());
        // All of it lies below 4 GiB.
        put(offset::EXT_RAMDISK_IMAGE, &[0; 12]);
    }
    let rsdp = boot.acpi.map_or(0, |acpi| acpi.rsdp);
    put(offset::RSDP, &rsdp.to_le_bytes());
    let map = layout::memory_map(ram);
    put(offset::E820_ENTRIES, &[map.len() as u8]);
    for (at, region) in (offset::E820..).step_by(20).zip(&map) {
        put(at, &region.start.to_le_bytes());
        put(at + 8, &region.len.to_le_bytes());
        put(at + 16, &(region.kind as u32).to_le_bytes());
    }
    elf::put(ram, "the boot parameters", layout::BOOT_PARAMS, &params)
}
