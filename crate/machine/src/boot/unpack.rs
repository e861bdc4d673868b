//! Unpacks a kernel's payload on the host, so that the guest spends no instructions on it.
//!
//! Output is bounded by what the caller allows before anything is allocated for it.

use std::io::Read;

/// How a payload is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Not packed: an ELF file as it is.
    None,
    /// gzip.
    Gzip,
    /// XZ, with the x86 filter as Linux uses it.
    Xz,
    /// Zstandard.
    Zstd,
    /// LZ4 legacy frame.
    Lz4,
    /// A format we leave to the guest: bzip2, LZMA, LZO.
    Other(&'static str),
}

impl Packing {
    /// Tells the format by its first bytes.
    pub fn detect(bytes: &[u8]) -> Option<Packing> {
        const MAGICS: [(&[u8], Packing); 9] = [
            (b"\x7fELF", Packing::None),
            (&[0x1f, 0x8b], Packing::Gzip),
            (&[0x1f, 0x9e], Packing::Gzip),
            (b"\xfd7zXZ\0", Packing::Xz),
            (&[0x28, 0xb5, 0x2f, 0xfd], Packing::Zstd),
            (&[0x02, 0x21, 0x4c, 0x18], Packing::Lz4),
            (b"BZh", Packing::Other("bzip2")),
            (&[0x5d, 0, 0], Packing::Other("LZMA")),
            (&[0x89, b'L', b'Z', b'O'], Packing::Other("LZO")),
        ];
        let found = MAGICS.iter().find(|(magic, _)| bytes.starts_with(magic));
        found.map(|(_, packing)| *packing)
    }

    /// The format's name.
    pub fn name(self) -> &'static str {
        match self {
            Packing::None => "uncompressed",
            Packing::Gzip => "gzip",
            Packing::Xz => "XZ",
            Packing::Zstd => "Zstandard",
            Packing::Lz4 => "LZ4",
            Packing::Other(name) => name,
        }
    }
}

/// A dictionary or window larger than any kernel uses is a lie.
const WINDOW_LIMIT: u64 = 128 << 20;
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_MAGIC: u32 = 0x184c_2102;

/// Unpacks `bytes` into at most `limit` bytes. Bytes after the end of the packed stream are
/// ignored. The error says what is wrong with the stream.
pub fn unpack(packing: Packing, bytes: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    match packing {
        Packing::None => Ok(bytes.to_vec()),
        Packing::Gzip => gzip(bytes, limit),
        Packing::Xz => {
            let kib = (WINDOW_LIMIT >> 10) as u32 + 1024;
            drain(
                lzma_rust2::XzReader::new_mem_limit(bytes, false, kib),
                limit,
            )
        }
        Packing::Zstd => {
            let reader = ruzstd::decoding::StreamingDecoder::new(bytes)
                .map_err(|error| error.to_string())?;
            drain(reader, limit)
        }
        Packing::Lz4 => lz4(bytes, limit),
        Packing::Other(name) => Err(format!("{name} is not unpacked on the host")),
    }
}

/// Reads to the end, growing only with what really arrives.
fn drain(reader: impl Read, limit: usize) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let bound = (limit as u64).saturating_add(1);
    reader
        .take(bound)
        .read_to_end(&mut out)
        .map_err(|error| error.to_string())?;
    if out.len() > limit {
        return Err(too_long(limit));
    }
    Ok(out)
}

fn too_long(limit: usize) -> String {
    format!("it unpacks to more than {limit} bytes")
}

fn gzip(bytes: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    let body = gzip_body(bytes).ok_or("the gzip header is cut short")?;
    miniz_oxide::inflate::decompress_to_vec_with_limit(body, limit).map_err(|error| {
        match error.status {
            miniz_oxide::inflate::TINFLStatus::HasMoreOutput => too_long(limit),
            miniz_oxide::inflate::TINFLStatus::FailedCannotMakeProgress => {
                "the deflate stream is cut short".into()
            }
            _ => "the deflate stream is damaged".into(),
        }
    })
}

/// The deflate stream behind a gzip header (RFC 1952, 2.3).
fn gzip_body(bytes: &[u8]) -> Option<&[u8]> {
    const CRC: u8 = 2;
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    let flags = *bytes.get(3)?;
    let mut rest = bytes.get(10..)?;
    if flags & EXTRA != 0 {
        let len = usize::from(u16::from_le_bytes(*rest.first_chunk()?));
        rest = rest.get(2 + len..)?;
    }
    for field in [NAME, COMMENT] {
        if flags & field != 0 {
            let end = rest.iter().position(|&byte| byte == 0)?;
            rest = rest.get(end + 1..)?;
        }
    }
    if flags & CRC != 0 {
        rest = rest.get(2..)?;
    }
    Some(rest)
}

/// LZ4 legacy frame: a magic number, then blocks of at most 8 MiB, each behind its packed size.
fn lz4(bytes: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let mut rest = bytes.get(4..).unwrap_or_default();
    while let Some((size, after)) = rest.split_first_chunk() {
        let size = u32::from_le_bytes(*size);
        rest = after;
        if size == LZ4_MAGIC {
            continue;
        }
        let packed = rest.get(..size as usize).ok_or_else(|| {
            let left = rest.len();
            format!("an LZ4 block of {size} bytes is cut short, {left} are left")
        })?;
        rest = &rest[packed.len()..];
        let start = out.len();
        let room = LZ4_BLOCK.min(limit - start);
        out.resize(start + room, 0);
        let len = match lz4_flex::block::decompress_into(packed, &mut out[start..]) {
            Ok(len) => len,
            Err(lz4_flex::block::DecompressError::OutputTooSmall { .. }) if room < LZ4_BLOCK => {
                return Err(too_long(limit));
            }
            Err(error) => return Err(format!("an LZ4 block is damaged: {error}")),
        };
        out.truncate(start + len);
        if len < LZ4_BLOCK {
            break;
        }
    }
    Ok(out)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Packs into an LZ4 legacy frame.
    pub fn pack_lz4(bytes: &[u8]) -> Vec<u8> {
        let mut out = LZ4_MAGIC.to_le_bytes().to_vec();
        for block in bytes.chunks(LZ4_BLOCK) {
            let packed = lz4_flex::block::compress(block);
            out.extend((packed.len() as u32).to_le_bytes());
            out.extend(packed);
        }
        out
    }

    /// Packs into a gzip member with a name field.
    pub fn pack_gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 2, 3];
        out.extend(b"vmlinux\0");
        out.extend(miniz_oxide::deflate::compress_to_vec(bytes, 6));
        out.extend(crc32(bytes).to_le_bytes());
        out.extend((bytes.len() as u32).to_le_bytes());
        out
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                crc >> 1 ^ if crc & 1 != 0 { 0xedb8_8320 } else { 0 }
            })
        })
    }

    /// Packs as the kernel's build does: x86 filter, CRC32 check.
    pub fn pack_xz(bytes: &[u8]) -> Vec<u8> {
        use std::io::Write;
        let mut options = lzma_rust2::XzOptions::with_preset(1);
        options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
        options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    /// Packs into a Zstandard frame.
    pub fn pack_zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    /// Code-like bytes: calls with relative targets, so that the x86 filter has work to do.
    fn sample() -> Vec<u8> {
        (0..40_000u32)
            .flat_map(|n| [0xe8, n as u8, (n >> 8) as u8, 0, 0, 0x90, 0x0f, 0x84])
            .collect()
    }

    type Packer = fn(&[u8]) -> Vec<u8>;
    const PACKERS: [(Packing, Packer); 4] = [
        (Packing::Lz4, pack_lz4),
        (Packing::Gzip, pack_gzip),
        (Packing::Xz, pack_xz),
        (Packing::Zstd, pack_zstd),
    ];

    #[test]
    fn every_format_gives_back_what_was_packed() {
        let bytes = sample();
        for (packing, pack) in PACKERS {
            let packed = pack(&bytes);
            assert_eq!(Packing::detect(&packed), Some(packing));
            assert!(
                unpack(packing, &packed, bytes.len()).unwrap() == bytes,
                "{packing:?}"
            );
        }
    }

    #[test]
    fn output_over_the_limit_is_refused() {
        let bytes = sample();
        for (packing, pack) in PACKERS {
            let error = unpack(packing, &pack(&bytes), bytes.len() - 1).unwrap_err();
            assert!(error.contains("more than"), "{packing:?}: {error}");
        }
    }

    #[test]
    fn truncated_and_damaged_streams_end_in_an_error_or_other_bytes_never_in_a_panic() {
        let bytes = &sample()[..2000];
        for (packing, pack) in PACKERS {
            let packed = pack(bytes);
            for end in 0..packed.len() {
                let _ = unpack(packing, &packed[..end], 1 << 16);
                let mut damaged = packed.clone();
                damaged[end] ^= 0x55;
                let _ = unpack(packing, &damaged, 1 << 16);
            }
        }
    }

    #[test]
    fn an_lz4_frame_goes_on_over_full_blocks_and_stops_at_a_short_one() {
        let bytes = vec![7; LZ4_BLOCK + 5];
        let mut packed = pack_lz4(&bytes);
        packed.extend((bytes.len() as u32).to_le_bytes());
        assert_eq!(
            unpack(Packing::Lz4, &packed, 1 << 25).unwrap().len(),
            bytes.len()
        );
    }
}
