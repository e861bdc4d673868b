//! Multiboot 1 (Multiboot Specification 0.6.96): header, modules, memory map, information.

use hypernest_cpu::{Ram, VcpuState};

use super::elf::{self, Elf, Segment};
use super::{Boot, BootError, damaged, entry, layout, low_memory};

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies in this many first bytes, on a 4-byte boundary.
const SEARCH: usize = 8192;

const FLAG_PAGE_ALIGN: u32 = 1;
const FLAG_MEMORY: u32 = 2;
const FLAG_ADDRESSES: u32 = 1 << 16;
/// Flags 15:0 are demands.
const DEMANDS: u32 = 0xffff;

const INFO_MEMORY: u32 = 1;
const INFO_COMMAND_LINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_LEN: u64 = 88;
const MODULE_LEN: u64 = 16;
const LOADER_NAME: &str = "hypernest";

/// A multiboot header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it demands and offers.
    pub flags: u32,
    /// Where it lies in the file.
    offset: usize,
    /// Load addresses, when flag 16 says that they are to be used.
    pub addresses: Option<Addresses>,
}

/// The address fields of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

impl Header {
    /// Searches the beginning of a file.
    pub fn find(bytes: &[u8]) -> Option<Header> {
        let head = &bytes[..bytes.len().min(SEARCH)];
        let word = |at: usize| -> Option<u32> {
            let found = bytes.get(at..)?.first_chunk()?;
            Some(u32::from_le_bytes(*found))
        };
        (0..head.len()).step_by(4).find_map(|offset| {
            let flags = word(offset + 4)?;
            let sum = HEADER_MAGIC.wrapping_add(flags);
            if word(offset)? != HEADER_MAGIC || sum.wrapping_add(word(offset + 8)?) != 0 {
                return None;
            }
            let addresses = if flags & FLAG_ADDRESSES != 0 {
                Some(Addresses {
                    header: word(offset + 12)?,
                    load: word(offset + 16)?,
                    load_end: word(offset + 20)?,
                    bss_end: word(offset + 24)?,
                    entry: word(offset + 28)?,
                })
            } else {
                None
            };
            Some(Header {
                flags,
                offset,
                addresses,
            })
        })
    }

    /// The image that the address fields describe.
    fn flat(&self, bytes: &[u8], at: Addresses) -> Result<Elf, BootError> {
        let wrong = |why: &str| damaged("multiboot", why);
        let before = at
            .header
            .checked_sub(at.load)
            .ok_or_else(|| wrong("its load address lies after its header"))?;
        let start = self
            .offset
            .checked_sub(before as usize)
            .ok_or_else(|| wrong("its load address lies before the file's start"))?;
        let file_len = match at.load_end {
            0 => bytes.len() - start,
            end => end
                .checked_sub(at.load)
                .ok_or_else(|| wrong("its load end lies before its load address"))?
                as usize,
        };
        let end = start
            .checked_add(file_len)
            .filter(|&end| end <= bytes.len());
        let end = end.ok_or_else(|| wrong("its load end lies after the file's end"))?;
        let bss = match at.bss_end {
            0 => file_len as u64,
            end => u64::from(end.saturating_sub(at.load)),
        };
        Ok(Elf {
            is_64: false,
            entry: at.entry.into(),
            pvh_entry: None,
            segments: vec![Segment {
                address: at.load.into(),
                linked: at.load.into(),
                len: bss.max(file_len as u64).max(1),
                file: start..end,
            }],
        })
    }
}

/// Grows the information block; addresses are known from the start.
struct Block {
    base: u64,
    bytes: Vec<u8>,
}

impl Block {
    fn put(&mut self, bytes: &[u8]) -> u32 {
        let address = self.base + self.bytes.len() as u64;
        self.bytes.extend(bytes);
        address as u32
    }

    fn text(&mut self, text: &str) -> u32 {
        let address = self.put(text.as_bytes());
        self.put(&[0]);
        address
    }

    fn words(&mut self, words: &[u32]) {
        for word in words {
            self.put(&word.to_le_bytes());
        }
    }
}

/// Loads a multiboot image, and says how it is entered.
pub fn load(boot: &Boot, ram: &mut Ram, state: &mut VcpuState) -> Result<String, BootError> {
    let header = Header::find(boot.image)
        .ok_or_else(|| damaged("multiboot", "its header is not where it was"))?;
    let unknown = header.flags & DEMANDS & !(FLAG_PAGE_ALIGN | FLAG_MEMORY);
    if unknown != 0 {
        let demand = match unknown {
            4 => "a graphics mode".into(),
            unknown => format!("header flags {unknown:#x}"),
        };
        return Err(BootError::Unsupported {
            what: "multiboot",
            demand,
        });
    }
    let image = match header.addresses {
        Some(addresses) => header.flat(boot.image, addresses)?,
        None => Elf::parse(boot.image)?,
    };
    super::keep_free(&image, core::iter::once(layout::GDT..layout::GDT_END))?;
    elf::load(ram, boot.image, &image.segments)?;
    let modules = place_modules(boot, ram, &image)?;
    let info = write_info(boot, ram, &image, &modules)?;
    let entry = image.entry as u32;
    entry::protected_32(ram, state, entry, (LOADER_MAGIC, info, 0))
        .map_err(|error| low_memory(ram, error))?;
    Ok("multiboot 1".into())
}

/// Modules follow the image, each on a page boundary.
fn place_modules(boot: &Boot, ram: &mut Ram, image: &Elf) -> Result<Vec<(u32, u32)>, BootError> {
    let mut next = image.end().max(layout::HIGH_MEMORY).next_multiple_of(4096);
    let mut placed = Vec::new();
    for module in boot.all_modules() {
        let len = module.bytes.len() as u64;
        let end = next.saturating_add(len);
        if end > ram.low_size() {
            return Err(BootError::NoRoom {
                what: "a module",
                len,
                room: ram.low_size().saturating_sub(next),
                top: ram.low_size(),
            });
        }
        elf::put(ram, "a module", next, module.bytes)?;
        placed.push((next as u32, end as u32));
        next = end.next_multiple_of(4096);
    }
    Ok(placed)
}

fn write_info(
    boot: &Boot,
    ram: &mut Ram,
    image: &Elf,
    modules: &[(u32, u32)],
) -> Result<u32, BootError> {
    let map = layout::memory_map(ram);
    // Everything but the first structure is laid out behind it, so its size is known up front.
    let texts: usize = boot.all_modules().map(|m| m.text.len() + 1).sum();
    let line = boot.name.len() + boot.command_line.len() + LOADER_NAME.len() + 3;
    let len = INFO_LEN
        + MODULE_LEN * modules.len() as u64
        + 24 * map.len() as u64
        + (texts + line) as u64;
    let free = layout::MULTIBOOT_AREAS
        .into_iter()
        .find(|area| area.end - area.start >= len && !image.overlaps(area));
    let base = match free {
        Some(area) => area.start,
        None => {
            let all = &layout::MULTIBOOT_AREAS[1];
            return Err(BootError::LowMemory {
                start: all.start,
                end: all.end,
            });
        }
    };
    let mut block = Block {
        base,
        bytes: vec![0; INFO_LEN as usize],
    };
    let command_line = if boot.command_line.is_empty() {
        boot.name.to_owned()
    } else {
        format!("{} {}", boot.name, boot.command_line)
    };
    if command_line.contains('\0') || boot.all_modules().any(|m| m.text.contains('\0')) {
        return Err(BootError::CommandLine {
            len: command_line.len(),
            limit: command_line.len(),
        });
    }
    let map_address = block.put(&[]);
    for region in &map {
        let (start, len) = (region.start, region.len);
        let low_high = |value: u64| [value as u32, (value >> 32) as u32];
        let ([s0, s1], [l0, l1]) = (low_high(start), low_high(len));
        block.words(&[20, s0, s1, l0, l1, region.kind as u32]);
    }
    let list_address = block.put(&vec![0; 16 * modules.len()]);
    let mut list = Vec::new();
    for (module, (start, end)) in boot.all_modules().zip(modules) {
        let text = block.text(module.text);
        for word in [*start, *end, text, 0] {
            list.extend(word.to_le_bytes());
        }
    }
    let at = (u64::from(list_address) - base) as usize;
    block.bytes[at..at + list.len()].copy_from_slice(&list);
    let line_address = block.text(&command_line);
    let name_address = block.text(LOADER_NAME);

    let flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    let kib = |bytes: u64| (bytes >> 10) as u32;
    let upper = ram.low_size().saturating_sub(layout::HIGH_MEMORY);
    let map_len = 24 * map.len() as u32;
    let mut info = [0u32; (INFO_LEN / 4) as usize];
    info[0] = flags;
    info[1] = kib(layout::EBDA.min(ram.low_size()));
    info[2] = kib(upper);
    info[4] = line_address;
    info[5] = modules.len() as u32;
    info[6] = list_address;
    info[11] = map_len;
    info[12] = map_address;
    info[16] = name_address;
    for (bytes, word) in block.bytes.chunks_exact_mut(4).zip(info) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    elf::put(ram, "the multiboot information", base, &block.bytes)?;
    Ok(base as u32)
}
