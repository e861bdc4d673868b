//! An ELF32 file with a multiboot header, of one segment.

/// Where guests are loaded.
pub const BASE: u32 = 0x10_0000;

/// Bytes of the file before the content: ELF header, program header, multiboot header.
const HEADERS: u32 = 52 + 32 + 12;

/// Where the content is loaded.
pub const CONTENT: u32 = BASE + HEADERS;

/// The file; the guest is entered `entry` bytes after [`CONTENT`].
pub fn file(content: &[u8], entry: u32) -> Vec<u8> {
    const MULTIBOOT: [u32; 3] = [0x1bad_b002, 0, 0u32.wrapping_sub(0x1bad_b002)];
    let size = HEADERS + content.len() as u32;
    let words = |values: &[u32]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(words(&[0x0003_0002, 1])); // executable for the 386, version
    file.extend(words(&[CONTENT + entry, 52, 0, 0])); // program headers at, section headers at, flags
    file.extend(words(&[0x0020_0034, 0x0028_0001, 0])); // sizes of headers, their numbers
    // load, offset, virtual, physical, in the file, in memory, read + write + execute, alignment
    file.extend(words(&[1, 0, BASE, BASE, size, size, 7, 4096]));
    file.extend(words(&MULTIBOOT));
    file.extend(content);
    file
}
