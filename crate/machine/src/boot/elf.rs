//! ELF files as the loaders see them: what to load where, the entry, the PVH note.

use core::ops::Range;

use hypernest_cpu::Ram;
use object::Endianness;
use object::elf;
use object::read::elf::{FileHeader, ProgramHeader};

use super::{BootError, damaged};

/// A part of an image to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Address the image is linked at.
    pub linked: u64,
    /// Bytes in memory; those past the file's are zero.
    pub len: u64,
    /// Where its bytes lie in the file.
    pub file: Range<usize>,
}

impl Segment {
    fn end(&self) -> u64 {
        self.address.saturating_add(self.len)
    }
}

/// An ELF image that can be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// ELF64 rather than ELF32.
    pub is_64: bool,
    /// Guest-physical entry point.
    pub entry: u64,
    /// Entry for PVH (32-bit), from the note XEN_ELFNOTE_PHYS32_ENTRY.
    pub pvh_entry: Option<u32>,
    /// PT_LOAD segments.
    pub segments: Vec<Segment>,
}

const NOTE_OWNER: &[u8] = b"Xen";
const NOTE_PHYS32_ENTRY: u32 = 18;

impl Elf {
    /// Reads the headers of an x86 ELF executable.
    pub fn parse(bytes: &[u8]) -> Result<Elf, BootError> {
        match bytes.get(4) {
            Some(1) => parse::<elf::FileHeader32<Endianness>>(bytes, false),
            Some(2) => parse::<elf::FileHeader64<Endianness>>(bytes, true),
            _ => Err(damaged("ELF", "the file class is neither 32 nor 64 bits")),
        }
    }

    /// First address after the image.
    pub fn end(&self) -> u64 {
        self.segments.iter().map(Segment::end).max().unwrap_or(0)
    }

    /// Whether any segment touches `area`.
    pub fn overlaps(&self, area: &Range<u64>) -> bool {
        let touches = |s: &Segment| s.address < area.end && area.start < s.end();
        self.segments.iter().any(touches)
    }
}

fn parse<Header: FileHeader<Endian = Endianness>>(
    bytes: &[u8],
    is_64: bool,
) -> Result<Elf, BootError> {
    let wrong = |error: object::Error| damaged("ELF", error.to_string());
    let header = Header::parse(bytes).map_err(wrong)?;
    let endian = header.endian().map_err(wrong)?;
    let machine = header.e_machine(endian);
    let native = match machine {
        elf::EM_X86_64 => true,
        elf::EM_386 => !is_64,
        _ => false,
    };
    if !native || endian != Endianness::Little {
        return Err(BootError::Architecture(machine.0));
    }
    if header.e_type(endian) == elf::ET_REL || header.e_type(endian) == elf::ET_CORE {
        return Err(BootError::NotAKernel(
            "an ELF object or core file, not an executable",
        ));
    }
    let mut found = Elf {
        is_64,
        entry: header.e_entry(endian).into(),
        pvh_entry: None,
        segments: Vec::new(),
    };
    for program in header.program_headers(endian, bytes).map_err(wrong)? {
        let kind = program.p_type(endian);
        if kind == elf::PT_INTERP {
            return Err(BootError::NotAKernel(
                "a program for an operating system, not a kernel",
            ));
        }
        if kind == elf::PT_NOTE {
            found.pvh_entry = pvh_note(endian, program, bytes).or(found.pvh_entry);
        }
        if kind != elf::PT_LOAD {
            continue;
        }
        let (offset, size) = program.file_range(endian);
        let len: u64 = program.p_memsz(endian).into();
        let address: u64 = program.p_paddr(endian).into();
        if len == 0 {
            continue;
        }
        let end = offset.checked_add(size);
        let inside = end.filter(|&end| end <= bytes.len() as u64);
        let Some(end) = inside else {
            return Err(damaged(
                "ELF",
                format!(
                    "the segment for {address:#x} ends outside the file ({} bytes)",
                    bytes.len()
                ),
            ));
        };
        if size > len {
            return Err(damaged(
                "ELF",
                format!("the segment for {address:#x} is longer in the file than in memory"),
            ));
        }
        found.segments.push(Segment {
            address,
            linked: program.p_vaddr(endian).into(),
            len,
            file: offset as usize..end as usize,
        });
    }
    if found.segments.is_empty() {
        return Err(BootError::NotAKernel("an ELF file with nothing to load"));
    }
    found.entry = physical(&found.segments, found.entry);
    Ok(found)
}

/// Entry points are linked addresses in some images and physical ones in others (Linux). An
/// address inside a segment's physical range is taken as it is.
fn physical(segments: &[Segment], entry: u64) -> u64 {
    let inside = |start: u64, s: &Segment| entry.wrapping_sub(start) < s.len;
    if segments.iter().any(|s| inside(s.address, s)) {
        return entry;
    }
    let segment = segments.iter().find(|s| inside(s.linked, s));
    segment.map_or(entry, |s| {
        entry.wrapping_sub(s.linked).wrapping_add(s.address)
    })
}

fn pvh_note<P: ProgramHeader<Endian = Endianness>>(
    endian: Endianness,
    program: &P,
    bytes: &[u8],
) -> Option<u32> {
    let mut notes = program.notes(endian, bytes).ok()??;
    while let Ok(Some(note)) = notes.next() {
        if note.name() == NOTE_OWNER && note.n_type(endian).0 == NOTE_PHYS32_ENTRY {
            let entry = u32::from_le_bytes(*note.desc().first_chunk()?);
            return Some(entry);
        }
    }
    None
}

/// Copies segments to guest memory and clears their tails. All of them must lie in RAM.
pub fn load(ram: &mut Ram, bytes: &[u8], segments: &[Segment]) -> Result<(), BootError> {
    for segment in segments {
        let end = segment.address.checked_add(segment.len - 1);
        let fits = ram
            .offset(segment.address)
            .zip(end.and_then(|end| ram.offset(end)));
        if fits.is_none_or(|(first, last)| last.wrapping_sub(first) as u64 != segment.len - 1) {
            return Err(BootError::OutsideRam {
                what: "a segment of the image",
                address: segment.address,
                len: segment.len,
                ram: ram.size(),
            });
        }
    }
    for segment in segments {
        let data = &bytes[segment.file.clone()];
        put(ram, "a segment of the image", segment.address, data)?;
        clear(
            ram,
            segment.address + data.len() as u64,
            segment.len - data.len() as u64,
        )?;
    }
    Ok(())
}

/// Copies `bytes` to `address`; `what` names them in the error.
pub fn put(ram: &mut Ram, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    let size = ram.size();
    ram.write(address, bytes)
        .map_err(|error| BootError::OutsideRam {
            what,
            address: error.address,
            len: error.len,
            ram: size,
        })
}

/// Zeroes a range of RAM, leaving pages alone that are zero already (and may not be committed).
fn clear(ram: &mut Ram, mut address: u64, mut len: u64) -> Result<(), BootError> {
    let zeros = [0; 4096];
    let mut page = [0; 4096];
    while len > 0 {
        let part = len.min(4096 - (address & 0xfff)) as usize;
        let is_clear =
            ram.read(address, &mut page[..part]).is_ok() && page[..part] == zeros[..part];
        if !is_clear {
            put(ram, "a segment of the image", address, &zeros[..part])?;
        }
        address += part as u64;
        len -= part as u64;
    }
    Ok(())
}
