//! Boot without firmware: tells what an image is, puts it into RAM with what its boot protocol
//! asks for, and gives the registers at its first instruction.
//!
//! | Image | Entered |
//! |---|---|
//! | Linux bzImage | unpacked on the host, then as its vmlinux; where that cannot be, by Linux's 64-bit (or 32-bit) boot protocol, and the guest unpacks itself |
//! | ELF with a PVH note (vmlinux) | PVH: 32-bit, EBX = `hvm_start_info` |
//! | multiboot 1 (ELF or with addresses in its header) | 32-bit, EAX = 2BADB002H, EBX = information |
//! | other ELF64 | 64-bit mode on identity-mapping page tables, RBX = `hvm_start_info`, RSI = `boot_params` |
//! | other ELF32 | flat 32-bit protected mode, EBX = `hvm_start_info` |
//! | raw, only when asked for | 16-bit real mode at 0000:7C00 |
//!
//! No bytes of an image can make these functions panic, and nothing is allocated by a size that an
//! image claims before that size is bounded by the guest's RAM.

mod elf;
mod entry;
pub mod layout;
mod linux;
mod multiboot;
mod pvh;
mod symbols;
mod unpack;

use core::ops::Range;

use hypernest_cpu::{OutOfRam, Ram, VcpuState};

pub use symbols::Symbols;
pub use unpack::Packing;

/// An image cannot be booted. Each message is one line: what is wrong, where, what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The file is something else.
    #[error(
        "not a bootable image: it is {0}; give a Linux bzImage, an x86 ELF kernel or a multiboot image"
    )]
    NotAKernel(&'static str),
    /// The file is for another processor.
    #[error(
        "the ELF file is for another processor (machine number {0}); give one built for x86-64 or i386"
    )]
    Architecture(u16),
    /// The file is cut short or its headers lie.
    #[error("the {what} image is damaged or cut short: {why}; build or copy it again")]
    Damaged {
        /// Image or part.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A boot protocol too old, or something it demands that this machine lacks.
    #[error("the {what} image asks for {demand}, which this machine does not offer")]
    Unsupported {
        /// Image kind.
        what: &'static str,
        /// The demand.
        demand: String,
    },
    /// Part of it does not fit.
    #[error(
        "{what} goes to {address:#x}+{len:#x}, which is not all RAM (the guest has {ram:#x} bytes); give the guest more memory or link the image elsewhere"
    )]
    OutsideRam {
        /// What was to be placed.
        what: &'static str,
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        len: u64,
        /// Bytes of RAM.
        ram: u64,
    },
    /// An initial RAM disk or module is too large.
    #[error(
        "{what} of {len} bytes does not fit: {room} bytes are free between the kernel and {top:#x}; give the guest more memory"
    )]
    NoRoom {
        /// What was to be placed.
        what: &'static str,
        /// Its bytes.
        len: u64,
        /// Free bytes.
        room: u64,
        /// End of the place where it may lie.
        top: u64,
    },
    /// The command line is too long or holds a zero byte.
    #[error(
        "the command line has {len} bytes; this image takes at most {limit}, none of them zero"
    )]
    CommandLine {
        /// Its bytes.
        len: usize,
        /// What is possible.
        limit: usize,
    },
    /// The image overwrites what the loader must put into low memory.
    #[error(
        "the image covers {start:#x}-{end:#x}, where the boot information goes; link it at 0x100000 or above"
    )]
    LowMemory {
        /// First byte of the area.
        start: u64,
        /// First byte after it.
        end: u64,
    },
    /// Modules for an image that takes none.
    #[error("a Linux bzImage takes no modules; give its initial RAM disk as the initrd")]
    Modules,
    /// An initrd or a command line for a raw image.
    #[error("a raw image takes no command line, initrd or modules")]
    RawTakesNothing,
}

fn damaged(what: &'static str, why: impl Into<String>) -> BootError {
    BootError::Damaged {
        what,
        why: why.into(),
    }
}

/// A file that the loader puts into memory beside the image.
#[derive(Clone, Copy, Debug, Default)]
pub struct Module<'a> {
    /// What the guest is told of it, usually the file's name and arguments.
    pub text: &'a str,
    /// Its content.
    pub bytes: &'a [u8],
}

/// ACPI tables as the guest finds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AcpiTables {
    /// Address of the root pointer (RSDP); 0 is none.
    pub rsdp: u64,
    /// Where each table goes, and its bytes.
    pub tables: Vec<(u64, Vec<u8>)>,
}

/// What is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageKind {
    /// Linux bzImage.
    BzImage,
    /// Multiboot 1.
    Multiboot,
    /// ELF with a PVH note.
    Pvh,
    /// Other ELF64.
    Elf64,
    /// Other ELF32.
    Elf32,
    /// 16-bit code without any header.
    Raw,
}

impl ImageKind {
    /// Tells what kind of image `bytes` are, by their headers. Never [`ImageKind::Raw`]: code
    /// without a header cannot be told from anything else.
    ///
    /// # Errors
    /// [`BootError::NotAKernel`] names what the file is instead; other errors say what is wrong
    /// with its headers.
    pub fn detect(bytes: &[u8]) -> Result<ImageKind, BootError> {
        if linux::is_bzimage(bytes) {
            return Ok(ImageKind::BzImage);
        }
        let is_elf = bytes.starts_with(b"\x7fELF");
        let header = multiboot::Header::find(bytes);
        if is_elf {
            let elf = elf::Elf::parse(bytes)?;
            return Ok(match header {
                Some(header) if !elf.is_64 || header.addresses.is_some() => ImageKind::Multiboot,
                _ if elf.pvh_entry.is_some() => ImageKind::Pvh,
                Some(_) => ImageKind::Multiboot,
                None if elf.is_64 => ImageKind::Elf64,
                None => ImageKind::Elf32,
            });
        }
        match header {
            Some(header) if header.addresses.is_some() => Ok(ImageKind::Multiboot),
            Some(_) => Err(damaged(
                "multiboot",
                "it is no ELF file and its header gives no load addresses",
            )),
            None => Err(BootError::NotAKernel(recognise(bytes))),
        }
    }

    /// One or two words for people.
    pub fn name(self) -> &'static str {
        match self {
            ImageKind::BzImage => "Linux bzImage",
            ImageKind::Multiboot => "multiboot",
            ImageKind::Pvh => "PVH ELF",
            ImageKind::Elf64 => "ELF64",
            ImageKind::Elf32 => "ELF32",
            ImageKind::Raw => "raw",
        }
    }
}

/// Names files that people are likely to give by mistake.
fn recognise(bytes: &[u8]) -> &'static str {
    const MAGICS: [(usize, &[u8], &str); 14] = [
        (
            0,
            &[0x1f, 0x8b],
            "a gzip file (unpack it first, or is it an initrd?)",
        ),
        (
            0,
            b"\xfd7zXZ\0",
            "an XZ file (unpack it first, or is it an initrd?)",
        ),
        (
            0,
            &[0x28, 0xb5, 0x2f, 0xfd],
            "a Zstandard file (unpack it first, or is it an initrd?)",
        ),
        (
            0,
            &[0x02, 0x21, 0x4c, 0x18],
            "an LZ4 file (unpack it first, or is it an initrd?)",
        ),
        (0, b"070701", "a cpio archive (an initrd?)"),
        (
            0,
            b"QFI\xfb",
            "a qcow2 disk image (convert it to raw and give it as the disk)",
        ),
        (
            0,
            b"KDMV",
            "a VMDK disk image (convert it to raw and give it as the disk)",
        ),
        (
            0,
            b"!<arch>\n",
            "an archive or Debian package (unpack it first)",
        ),
        (0, b"#!", "a script"),
        (0, b"PK\x03\x04", "a ZIP archive"),
        (0x202, b"HdrS", "a Linux kernel without its boot signature"),
        (0x8001, b"CD001", "a CD image (take the kernel out of it)"),
        (
            0x1fe,
            &[0x55, 0xaa],
            "a disk image with a boot sector (there is no BIOS; give it as the disk)",
        ),
        (0, b"MZ", "an EFI or Windows program"),
    ];
    if bytes.is_empty() {
        return "an empty file";
    }
    let found = MAGICS
        .iter()
        .find(|(at, magic, _)| bytes.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    found.map_or("of no known kind", |(_, _, name)| name)
}

/// Everything that a boot needs. `Default` is an empty image.
#[derive(Clone, Copy, Debug, Default)]
pub struct Boot<'a> {
    /// The image file's bytes.
    pub image: &'a [u8],
    /// Load [`Boot::image`] as raw 16-bit code instead of looking at its headers.
    pub raw: bool,
    /// Name of the image, the first word of a multiboot command line.
    pub name: &'a str,
    /// Command line.
    pub command_line: &'a str,
    /// Initial RAM disk: for multiboot and PVH the first module.
    pub initrd: Option<&'a [u8]>,
    /// Further modules (multiboot, PVH ELF).
    pub modules: &'a [Module<'a>],
    /// ACPI tables, for images that look for them.
    pub acpi: Option<&'a AcpiTables>,
}

/// A booted image.
#[derive(Clone, Debug)]
pub struct Booted {
    /// What it is.
    pub kind: ImageKind,
    /// How it is entered, for people: `PVH, LZ4 unpacked on the host`.
    pub how: String,
    /// State of the boot processor at the first instruction.
    pub state: VcpuState,
}

impl Boot<'_> {
    /// Puts everything into `ram` and turns `reset`, the boot processor's state after a reset,
    /// into the entry state.
    ///
    /// # Errors
    /// Anything wrong with the image, its initrd or its modules. RAM may then be partly written;
    /// do not run it.
    pub fn load(&self, ram: &mut Ram, reset: VcpuState) -> Result<Booted, BootError> {
        let kind = if self.raw {
            ImageKind::Raw
        } else {
            ImageKind::detect(self.image)?
        };
        if ram.low_size() < layout::HIGH_MEMORY {
            let error = OutOfRam {
                address: 0,
                len: layout::HIGH_MEMORY,
            };
            return Err(low_memory(ram, error));
        }
        for (address, bytes) in self.acpi.iter().flat_map(|acpi| &acpi.tables) {
            elf::put(ram, "an ACPI table", *address, bytes)?;
        }
        let mut state = reset;
        entry::virtual_wire(&mut state);
        let how = match kind {
            ImageKind::BzImage => linux::load_bzimage(self, ram, &mut state)?,
            ImageKind::Multiboot => multiboot::load(self, ram, &mut state)?,
            ImageKind::Pvh => {
                let elf = elf::Elf::parse(self.image)?;
                pvh::load(self, ram, &mut state, self.image, &elf, layout::INITRD_END)?;
                "PVH".into()
            }
            ImageKind::Elf64 | ImageKind::Elf32 => self.load_elf(ram, &mut state)?,
            ImageKind::Raw => self.load_raw(ram, &mut state)?,
        };
        Ok(Booted { kind, how, state })
    }

    /// An ELF file of no protocol: the conventions of this crate's table.
    fn load_elf(&self, ram: &mut Ram, state: &mut VcpuState) -> Result<String, BootError> {
        let elf = elf::Elf::parse(self.image)?;
        let used = [
            layout::BOOT_PARAMS..layout::GDT_END,
            layout::COMMAND_LINE..layout::PAGE_TABLES_END,
        ];
        keep_free(&elf, used)?;
        elf::load(ram, self.image, &elf.segments)?;
        let start_info = pvh::write_info(self, ram, elf.end(), layout::INITRD_END)?;
        if elf.is_64 {
            let initrd = start_info.modules.first().copied();
            linux::write_boot_params(self, ram, None, initrd)?;
            let registers = (layout::START_INFO, layout::BOOT_PARAMS);
            entry::long_64(ram, state, elf.entry, registers)
                .map_err(|error| low_memory(ram, error))?;
            return Ok("64-bit mode".into());
        }
        let entry = elf.entry as u32;
        let registers = (0, layout::START_INFO as u32, 0);
        entry::protected_32(ram, state, entry, registers)
            .map_err(|error| low_memory(ram, error))?;
        Ok("32-bit protected mode".into())
    }

    fn load_raw(&self, ram: &mut Ram, state: &mut VcpuState) -> Result<String, BootError> {
        if self.initrd.is_some() || !self.modules.is_empty() || !self.command_line.is_empty() {
            return Err(BootError::RawTakesNothing);
        }
        if self.image.is_empty() {
            return Err(BootError::NotAKernel("an empty file"));
        }
        elf::put(ram, "the raw image", layout::RAW_IMAGE, self.image)?;
        entry::real_16(state, layout::RAW_IMAGE as u16);
        Ok("16-bit real mode".into())
    }

    /// The initrd and the modules, in this order.
    fn all_modules(&self) -> impl Iterator<Item = Module<'_>> {
        let initrd = self.initrd.map(|bytes| Module { text: "", bytes });
        initrd.into_iter().chain(self.modules.iter().copied())
    }
}

/// Refuses an image that covers an area the loader writes to.
fn keep_free(elf: &elf::Elf, areas: impl IntoIterator<Item = Range<u64>>) -> Result<(), BootError> {
    match areas.into_iter().find(|area| elf.overlaps(area)) {
        Some(area) => Err(BootError::LowMemory {
            start: area.start,
            end: area.end,
        }),
        None => Ok(()),
    }
}

fn low_memory(ram: &Ram, error: OutOfRam) -> BootError {
    BootError::OutsideRam {
        what: "the boot information",
        address: error.address,
        len: error.len,
        ram: ram.size(),
    }
}

/// Writes a zero-ended string to the command line area.
fn write_command_line(ram: &mut Ram, text: &str, limit: usize) -> Result<(), BootError> {
    let area = (layout::COMMAND_LINE_END - layout::COMMAND_LINE) as usize;
    let limit = limit.min(area - 1);
    if text.len() > limit || text.contains('\0') {
        return Err(BootError::CommandLine {
            len: text.len(),
            limit,
        });
    }
    let address = layout::COMMAND_LINE;
    elf::put(ram, "the command line", address, text.as_bytes())?;
    elf::put(ram, "the command line", address + text.len() as u64, &[0])
}

/// Places `bytes` as high as possible between `floor` and `top`, on a page boundary.
fn place_high(
    ram: &mut Ram,
    what: &'static str,
    bytes: &[u8],
    floor: u64,
    top: u64,
) -> Result<u64, BootError> {
    let top = top.min(ram.low_size());
    let floor = floor.max(layout::HIGH_MEMORY);
    let len = bytes.len() as u64;
    let address = top.checked_sub(len).map(|start| start & !0xfff);
    match address.filter(|&start| start >= floor) {
        Some(address) => {
            elf::put(ram, what, address, bytes)?;
            Ok(address)
        }
        None => Err(BootError::NoRoom {
            what,
            len,
            room: top.saturating_sub(floor),
            top,
        }),
    }
}

#[cfg(test)]
pub(crate) mod tests;
