//! Names for addresses, from an ELF symbol table.

use object::Endianness;
use object::elf;
use object::read::elf::{FileHeader, Sym};

use super::{BootError, damaged};

/// The symbols of a kernel, in ascending order.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    /// Address, and where the name lies in `names`.
    table: Vec<(u64, u32, u32)>,
    names: String,
}

/// An address this far behind the last symbol belongs to nothing we know.
const REACH: u64 = 1 << 20;

impl Symbols {
    /// Reads the symbol table of an ELF file (a `vmlinux` with symbols).
    ///
    /// # Errors
    /// The file is no ELF file, is damaged, or has no symbols.
    pub fn parse(bytes: &[u8]) -> Result<Symbols, BootError> {
        if !bytes.starts_with(b"\x7fELF") {
            return Err(damaged("symbol", "it is not an ELF file"));
        }
        match bytes.get(4) {
            Some(1) => read::<elf::FileHeader32<Endianness>>(bytes),
            Some(2) => read::<elf::FileHeader64<Endianness>>(bytes),
            _ => Err(damaged(
                "symbol",
                "the file class is neither 32 nor 64 bits",
            )),
        }
    }

    /// The last symbol at or before `address`, and how far behind it the address lies.
    pub fn lookup(&self, address: u64) -> Option<(&str, u64)> {
        let after = self.table.partition_point(|entry| entry.0 <= address);
        let (start, name, len) = *self.table.get(after.checked_sub(1)?)?;
        let offset = address - start;
        let name = self.names.get(name as usize..(name + len) as usize)?;
        (offset < REACH).then_some((name, offset))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
}

fn read<Header: FileHeader<Endian = Endianness>>(bytes: &[u8]) -> Result<Symbols, BootError> {
    let wrong = |error: object::Error| damaged("symbol", error.to_string());
    let header = Header::parse(bytes).map_err(wrong)?;
    let endian = header.endian().map_err(wrong)?;
    let sections = header.sections(endian, bytes).map_err(wrong)?;
    let table = sections
        .symbols(endian, bytes, elf::SHT_SYMTAB)
        .map_err(wrong)?;
    let mut found = Symbols::default();
    for symbol in table.iter() {
        let kind = symbol.st_type();
        let names_code = kind == elf::STT_FUNC || kind == elf::STT_NOTYPE;
        let address: u64 = symbol.st_value(endian).into();
        if !names_code || symbol.st_shndx(endian) == elf::SHN_UNDEF || address == 0 {
            continue;
        }
        let Ok(name) = symbol.name(endian, table.strings()) else {
            continue;
        };
        let Ok(name) = core::str::from_utf8(name) else {
            continue;
        };
        let start = u32::try_from(found.names.len());
        let (Ok(start), false) = (start, name.is_empty() || name.starts_with(".L")) else {
            continue;
        };
        let Ok(len) = u32::try_from(name.len()) else {
            continue;
        };
        if start.checked_add(len).is_none() {
            break;
        }
        found.names.push_str(name);
        found.table.push((address, start, len));
    }
    if found.is_empty() {
        return Err(damaged("symbol", "it has no symbols (stripped)"));
    }
    // Stable: of several names for one address the first in the file stays.
    found.table.sort_by_key(|entry| entry.0);
    found.table.dedup_by_key(|entry| entry.0);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF64 file of three sections: none, symbols, strings.
    fn file(symbols: &[(&str, u8, u64)]) -> Vec<u8> {
        let mut names = vec![0];
        let mut table = vec![0; 24];
        for (name, info, address) in symbols {
            table.extend((names.len() as u32).to_le_bytes());
            table.extend([*info, 0, 1, 0]);
            table.extend(address.to_le_bytes());
            table.extend([0; 8]);
            names.extend(name.bytes());
            names.push(0);
        }
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(64, 0);
        out[16..20].copy_from_slice(&[2, 0, 62, 0]);
        let table_at = 64 + 3 * 64;
        let names_at = table_at + table.len() as u64;
        out[40] = 64;
        out[52..64].copy_from_slice(&[64, 0, 56, 0, 0, 0, 64, 0, 3, 0, 2, 0]);
        let mut section = |kind: u32, offset: u64, len: u64, link: u32, entry: u64| {
            out.extend(0u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend([0; 16]);
            out.extend(offset.to_le_bytes());
            out.extend(len.to_le_bytes());
            out.extend(link.to_le_bytes());
            out.extend([0; 12]);
            out.extend(entry.to_le_bytes());
        };
        section(0, 0, 0, 0, 0);
        section(2, table_at, table.len() as u64, 2, 24);
        section(3, names_at, names.len() as u64, 0, 0);
        out.extend(table);
        out.extend(names);
        out
    }

    const FUNCTION: u8 = 0x12;
    const OBJECT: u8 = 0x11;

    #[test]
    fn an_address_gets_the_nearest_function_before_it() {
        let bytes = file(&[
            ("second", FUNCTION, 0x2000),
            ("first", FUNCTION, 0x1000),
            ("data", OBJECT, 0x2800),
            ("alias", 0, 0x1000),
        ]);
        let symbols = Symbols::parse(&bytes).unwrap();
        assert_eq!(symbols.len(), 2);
        assert_eq!(symbols.lookup(0xfff), None);
        assert_eq!(symbols.lookup(0x1000), Some(("first", 0)));
        assert_eq!(symbols.lookup(0x2a00), Some(("second", 0xa00)));
        assert_eq!(symbols.lookup(0x2000 + REACH), None);
    }

    #[test]
    fn files_without_symbols_or_cut_short_are_errors_and_never_panic() {
        assert!(Symbols::parse(b"text").is_err());
        let bytes = file(&[("only", FUNCTION, 0x1000)]);
        for end in 0..bytes.len() {
            let _ = Symbols::parse(&bytes[..end]);
        }
        let error = Symbols::parse(&file(&[])).unwrap_err();
        assert!(error.to_string().contains("stripped"));
    }
}
