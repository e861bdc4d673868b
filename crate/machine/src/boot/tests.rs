//! Images small enough to build here, whole, cut short and lying.

use hypernest_cpu::{
    Activity, ApicState, FpuState, MsrState, Ram, SegmentState, SegmentStates, TableState,
    VcpuState,
};

use super::unpack::tests::{pack_gzip, pack_lz4, pack_xz, pack_zstd};
use super::*;

/// A processor after reset, as far as booting looks at it.
pub fn reset_state() -> VcpuState {
    let segment = SegmentState {
        limit: 0xffff,
        rights: 0x93,
        ..SegmentState::default()
    };
    VcpuState {
        gpr: [0; 16],
        rip: 0xfff0,
        rflags: 2,
        segments: SegmentStates {
            cs: SegmentState {
                selector: 0xf000,
                base: 0xffff_0000,
                limit: 0xffff,
                rights: 0x9b,
            },
            ds: segment,
            es: segment,
            fs: segment,
            gs: segment,
            ss: segment,
            ldtr: segment,
            tr: segment,
        },
        gdtr: TableState::default(),
        idtr: TableState::default(),
        cr0: 0x6000_0010,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        pdpte: [0; 4],
        dr: [0; 4],
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        msrs: MsrState::default(),
        fpu: FpuState {
            control: 0x40,
            status: 0,
            tag: 0,
            opcode: 0,
            instruction: 0,
            operand: 0,
            instruction_selector: 0,
            operand_selector: 0,
            st: [[0; 10]; 8],
            mxcsr: 0x1f80,
            xmm: [0; 16],
            xcr0: 1,
        },
        activity: Activity::Active,
        sti_shadow: false,
        mov_ss_shadow: false,
        nmi_blocked: false,
        pending_debug: 0,
        monitor: None,
        random_count: 0,
        apic: ApicState::default(),
        vmx: Default::default(),
        hyperv: Default::default(),
    }
}

fn ram(mib: u64) -> Ram {
    Ram::new(mib << 20).unwrap()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

const CODE: [u8; 4] = [0xf4, 0xeb, 0xfd, 0x90];

/// One segment: `CODE`, then `tail` zero bytes. The file offset is where [`NOTE`] ends.
struct ElfMaker {
    is_64: bool,
    machine: u16,
    linked: u64,
    address: u64,
    entry: u64,
    tail: u64,
    note: Option<u32>,
    multiboot: Option<u32>,
}

impl Default for ElfMaker {
    fn default() -> Self {
        ElfMaker {
            is_64: true,
            machine: 62,
            linked: 0xffff_ffff_8100_0000,
            address: 0x100_0000,
            entry: 0x100_0000,
            tail: 0x3000,
            note: None,
            multiboot: None,
        }
    }
}

const SEGMENT_AT: u64 = 0x100;

impl ElfMaker {
    fn make(&self) -> Vec<u8> {
        let mut out = vec![0; SEGMENT_AT as usize];
        put(&mut out, 0, b"\x7fELF\0\x01\x01");
        put(&mut out, 16, &2u16.to_le_bytes());
        put(&mut out, 18, &self.machine.to_le_bytes());
        put(&mut out, 20, &1u32.to_le_bytes());
        let mut segment = CODE.to_vec();
        if let Some(flags) = self.multiboot {
            for word in [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags)] {
                segment.extend(word.to_le_bytes());
            }
        }
        let note_at = SEGMENT_AT + segment.len() as u64;
        let mut note = Vec::new();
        if let Some(entry) = self.note {
            for word in [4, 4, 18] {
                note.extend(u32::to_le_bytes(word));
            }
            note.extend(b"Xen\0");
            note.extend(entry.to_le_bytes());
        }
        let len = segment.len() as u64;
        let load = [
            1,
            SEGMENT_AT,
            self.linked,
            self.address,
            len,
            len + self.tail,
        ];
        let notes = [4, note_at, 0, 0, note.len() as u64, note.len() as u64];
        let count: u16 = if self.note.is_some() { 2 } else { 1 };
        if self.is_64 {
            out[4] = 2;
            put(&mut out, 24, &self.entry.to_le_bytes());
            put(&mut out, 32, &64u64.to_le_bytes());
            put(&mut out, 52, &[64, 0, 56, 0, count as u8, 0, 64]);
            for (at, [kind, offset, linked, address, file, memory]) in
                [64, 120].into_iter().zip([load, notes]).take(count.into())
            {
                put(&mut out, at, &(kind as u32).to_le_bytes());
                for (at, value) in (at + 8..)
                    .step_by(8)
                    .zip([offset, linked, address, file, memory])
                {
                    put(&mut out, at, &value.to_le_bytes());
                }
            }
        } else {
            out[4] = 1;
            put(&mut out, 24, &(self.entry as u32).to_le_bytes());
            put(&mut out, 28, &52u32.to_le_bytes());
            put(&mut out, 40, &[52, 0, 32, 0, count as u8, 0, 40]);
            for (at, values) in [52, 84].into_iter().zip([load, notes]).take(count.into()) {
                for (at, value) in (at..).step_by(4).zip(values) {
                    put(&mut out, at, &(value as u32).to_le_bytes());
                }
            }
        }
        out.extend(segment);
        out.extend(note);
        out
    }
}

fn vmlinux() -> Vec<u8> {
    ElfMaker {
        note: Some(0x100_0002),
        ..ElfMaker::default()
    }
    .make()
}

/// A bzImage with this payload; its unpacked size goes behind it as the kernel's build does.
fn bzimage(payload: &[u8], unpacked: u32) -> Vec<u8> {
    let mut out = vec![0; 1024 + 0x400];
    put(&mut out, 0x1f1, &[1]);
    put(&mut out, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut out, 0x202, b"HdrS\x0f\x02");
    put(&mut out, 0x211, &[1]);
    put(&mut out, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut out, 0x236, &[1]);
    put(&mut out, 0x238, &2047u32.to_le_bytes());
    put(&mut out, 0x248, &0x400u32.to_le_bytes());
    put(&mut out, 0x24c, &(payload.len() as u32 + 4).to_le_bytes());
    put(&mut out, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut out, 0x260, &0x10_0000u32.to_le_bytes());
    out.extend(payload);
    out.extend(unpacked.to_le_bytes());
    out
}

fn boot<'a>(image: &'a [u8]) -> Boot<'a> {
    Boot {
        image,
        name: "image",
        ..Boot::default()
    }
}

fn word(ram: &Ram, address: u64) -> u32 {
    u32::from_le_bytes(ram.load(address).unwrap())
}

fn long(ram: &Ram, address: u64) -> u64 {
    u64::from_le_bytes(ram.load(address).unwrap())
}

fn text(ram: &Ram, address: u64) -> String {
    let bytes: Vec<u8> = (address..)
        .map(|at| ram.load::<1>(at).unwrap()[0])
        .take_while(|&byte| byte != 0)
        .collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn bzimage_is_unpacked_and_entered_by_its_pvh_note_whatever_its_packing() {
    let kernel = vmlinux();
    let packed = [
        ("LZ4", pack_lz4(&kernel)),
        ("gzip", pack_gzip(&kernel)),
        ("XZ", pack_xz(&kernel)),
        ("Zstandard", pack_zstd(&kernel)),
    ];
    for (name, payload) in packed {
        let image = bzimage(&payload, kernel.len() as u32);
        assert_eq!(ImageKind::detect(&image), Ok(ImageKind::BzImage));
        let mut ram = ram(64);
        let booted = boot(&image).load(&mut ram, reset_state()).unwrap();
        assert!(
            booted.how.contains("PVH") && booted.how.contains(name),
            "{}",
            booted.how
        );
        assert_eq!(booted.state.rip, 0x100_0002);
        assert_eq!(ram.load::<4>(0x100_0000).unwrap(), CODE);
    }
}

#[test]
fn pvh_start_information_names_command_line_initrd_memory_and_tables() {
    let kernel = vmlinux();
    let acpi = AcpiTables {
        rsdp: layout::ACPI_TABLES,
        tables: vec![(layout::ACPI_TABLES, b"RSD PTR ".to_vec())],
    };
    let initrd = vec![0x5a; 5000];
    let mut ram = ram(64);
    let booted = Boot {
        command_line: "console=ttyS0",
        initrd: Some(&initrd),
        acpi: Some(&acpi),
        ..boot(&kernel)
    }
    .load(&mut ram, reset_state())
    .unwrap();
    assert_eq!(booted.kind, ImageKind::Pvh);
    let state = &booted.state;
    assert_eq!((state.rip, state.cr0, state.rflags), (0x100_0002, 0x11, 2));
    let info = state.gpr[3];
    assert_eq!((word(&ram, info), word(&ram, info + 4)), (0x336e_c578, 1));
    assert_eq!(word(&ram, info + 12), 1);
    let module = long(&ram, info + 16);
    let address = long(&ram, module);
    assert_eq!(long(&ram, module + 8), 5000);
    assert_eq!(address, (64 << 20) - 0x2000);
    assert_eq!(ram.load::<2>(address + 4998).unwrap(), [0x5a; 2]);
    assert_eq!(text(&ram, long(&ram, info + 24)), "console=ttyS0");
    assert_eq!(long(&ram, info + 32), layout::ACPI_TABLES);
    assert_eq!(text(&ram, layout::ACPI_TABLES), "RSD PTR ");
    let (map, entries) = (long(&ram, info + 40), word(&ram, info + 48));
    assert_eq!(entries, 4);
    let last = map + 24 * 3;
    assert_eq!(
        (long(&ram, last), long(&ram, last + 8)),
        (0x10_0000, 63 << 20)
    );
    assert_eq!(word(&ram, last + 16), 1);
}

#[test]
fn kernel_without_pvh_note_is_entered_by_the_64_bit_protocol() {
    let kernel = ElfMaker::default().make();
    let image = bzimage(&pack_lz4(&kernel), kernel.len() as u32);
    let mut ram = ram(64);
    let booted = Boot {
        command_line: "quiet",
        initrd: Some(&[1; 100]),
        ..boot(&image)
    }
    .load(&mut ram, reset_state())
    .unwrap();
    assert!(booted.how.starts_with("64-bit"));
    assert_eq!(booted.state.rip, 0x100_0200);
    assert_eq!(booted.state.msrs.efer, 0x500);
    let params = booted.state.gpr[6];
    assert_eq!(text(&ram, word(&ram, params + 0x228).into()), "quiet");
    assert_eq!(word(&ram, params + 0x218), (64 << 20) - 0x1000);
    assert_eq!(word(&ram, params + 0x21c), 100);
    assert_eq!(ram.load::<1>(params + 0x1e8).unwrap(), [4]);
    assert_eq!(long(&ram, params + 0x2d0 + 20 * 3), 0x10_0000);
    assert_eq!(ram.load::<1>(params + 0x210).unwrap(), [0xff]);
    // The setup header came along, the code behind the setup sectors was loaded.
    assert_eq!(ram.load::<4>(params + 0x202).unwrap(), *b"HdrS");
    assert_eq!(
        ram.load::<4>(0x100_0400).unwrap(),
        0x184c_2102u32.to_le_bytes()
    );
}

#[test]
fn payload_of_a_packing_for_the_guest_falls_back_to_the_boot_protocol() {
    let image = bzimage(b"BZh91AY", 100);
    let booted = boot(&image).load(&mut ram(64), reset_state()).unwrap();
    assert!(booted.how.starts_with("64-bit"));
    let mut old = image.clone();
    put(&mut old, 0x206, &[0x0b, 2]);
    let booted = boot(&old).load(&mut ram(64), reset_state()).unwrap();
    assert!(booted.how.starts_with("32-bit"));
    assert_eq!(booted.state.gpr[6], layout::BOOT_PARAMS);
}

#[test]
fn lying_linux_headers_are_refused() {
    let kernel = vmlinux();
    let good = bzimage(&pack_lz4(&kernel), kernel.len() as u32);
    let refuse = |at: usize, value: &[u8], expected: &str| {
        let mut image = good.clone();
        put(&mut image, at, value);
        let error = boot(&image).load(&mut ram(64), reset_state()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(expected), "{message}");
        assert!(!message.contains('\n'));
    };
    refuse(0x206, &[0, 2], "boot protocol 2.00");
    refuse(0x211, &[0], "zImage");
    refuse(0x24c, &[0xff; 4], "payload");
    refuse(0x248, &[0xff; 4], "payload");
    refuse(0x1f1, &[0xff], "code should start");
    let end = good.len() - 4;
    refuse(end, &[0xff; 4], "more memory");
    refuse(end, &(kernel.len() as u32 + 1).to_le_bytes(), "not");
    refuse(end, &1u32.to_le_bytes(), "more than 1 bytes");
    let unpacked_by_guest = |at: usize, value: &[u8]| {
        let mut image = bzimage(b"BZh", 0);
        put(&mut image, at, value);
        boot(&image).load(&mut ram(64), reset_state()).unwrap_err()
    };
    for (at, value) in [(0x258, [0xff; 8]), (0x258, [0; 8]), (0x25c, [0xff; 8])] {
        let error = unpacked_by_guest(at, &value);
        assert!(matches!(error, BootError::OutsideRam { .. }), "{error}");
    }
}

#[test]
fn initrd_larger_than_ram_is_refused() {
    let kernel = vmlinux();
    let initrd = vec![1; 60 << 20];
    let packed = bzimage(&pack_lz4(&kernel), kernel.len() as u32);
    let mut multiboot = ElfMaker {
        is_64: false,
        machine: 3,
        linked: 0x10_0000,
        address: 0x10_0000,
        entry: 0x10_0000,
        multiboot: Some(0),
        ..ElfMaker::default()
    };
    let multiboot_image = multiboot.make();
    multiboot.multiboot = None;
    let flat = multiboot.make();
    for image in [&kernel, &packed, &multiboot_image, &flat] {
        let boot = Boot {
            initrd: Some(&initrd),
            ..boot(image)
        };
        let error = boot.load(&mut ram(48), reset_state()).unwrap_err();
        assert!(matches!(error, BootError::NoRoom { .. }), "{error}");
        assert!(boot.load(&mut ram(128), reset_state()).is_ok());
    }
}

#[test]
fn multiboot_information_gives_memory_modules_and_command_line() {
    let image = ElfMaker {
        is_64: false,
        machine: 3,
        linked: 0x40_0000,
        address: 0x40_0000,
        entry: 0x40_0000,
        multiboot: Some(3),
        ..ElfMaker::default()
    }
    .make();
    assert_eq!(ImageKind::detect(&image), Ok(ImageKind::Multiboot));
    let modules = [
        Module {
            text: "env",
            bytes: b"NR_CPUS=1\n",
        },
        Module {
            text: "two x",
            bytes: &[7; 5000],
        },
    ];
    let mut ram = ram(128);
    let booted = Boot {
        command_line: "vmx_test",
        modules: &modules,
        ..boot(&image)
    }
    .load(&mut ram, reset_state())
    .unwrap();
    let state = booted.state;
    assert_eq!((state.rip, state.gpr[0]), (0x40_0000, 0x2bad_b002));
    assert_eq!(state.segments.cs.rights, 0xc09b);
    let info = state.gpr[3];
    assert!((0x1000..0x8000).contains(&info));
    let at = |offset: u64| u64::from(word(&ram, info + offset));
    assert_eq!(at(0), 1 | 4 | 8 | 64 | 512);
    assert_eq!((at(4), at(8)), (639, 127 << 10));
    assert_eq!(text(&ram, at(16)), "image vmx_test");
    assert_eq!(at(20), 2);
    let list = at(24);
    let module = |n: u64, field: u64| u64::from(word(&ram, list + 16 * n + 4 * field));
    assert_eq!(module(0, 0) % 4096, 0);
    assert!(module(0, 0) >= 0x40_3004);
    assert_eq!(module(0, 1) - module(0, 0), 10);
    assert_eq!(text(&ram, module(0, 0)), "NR_CPUS=1\n");
    assert_eq!(text(&ram, module(1, 2)), "two x");
    assert_eq!(module(1, 1) - module(1, 0), 5000);
    assert_eq!(at(44), 24 * 4);
    assert_eq!(word(&ram, at(48)), 20);
    assert_eq!(text(&ram, at(64)), "hypernest");
}

#[test]
fn multiboot_image_in_low_memory_keeps_its_place() {
    let image = ElfMaker {
        is_64: false,
        machine: 3,
        linked: 0x4000,
        address: 0x4000,
        entry: 0x4000,
        tail: 0x1_0000,
        multiboot: Some(0),
        ..ElfMaker::default()
    }
    .make();
    let mut ram = ram(2);
    let booted = boot(&image).load(&mut ram, reset_state()).unwrap();
    assert!(booted.state.gpr[3] >= 0x1_4000);
    assert_eq!(ram.load::<4>(0x4000).unwrap(), CODE);
}

#[test]
fn multiboot_demands_we_cannot_meet_are_named() {
    let image = |flags| {
        ElfMaker {
            is_64: false,
            machine: 3,
            multiboot: Some(flags),
            ..ElfMaker::default()
        }
        .make()
    };
    let error = boot(&image(4))
        .load(&mut ram(32), reset_state())
        .unwrap_err();
    assert!(error.to_string().contains("a graphics mode"));
    let error = boot(&image(0x80))
        .load(&mut ram(32), reset_state())
        .unwrap_err();
    assert!(error.to_string().contains("0x80"));
}

/// Header with addresses at file offset 16: loaded from there minus `before`.
fn kludge(fields: [u32; 5]) -> Vec<u8> {
    let mut out = vec![0x90; 64];
    let flags = 1 << 16;
    let words = [
        0x1bad_b002u32,
        flags,
        0u32.wrapping_sub(0x1bad_b002 + flags),
    ];
    for (at, word) in (16..).step_by(4).zip(words.into_iter().chain(fields)) {
        put(&mut out, at, &word.to_le_bytes());
    }
    out
}

#[test]
fn multiboot_address_fields_load_a_flat_file() {
    let image = kludge([0x20_0010, 0x20_0008, 0x20_0030, 0x20_1000, 0x20_0020]);
    assert_eq!(ImageKind::detect(&image), Ok(ImageKind::Multiboot));
    let mut memory = ram(4);
    memory.write(0x20_0030, &[0xff; 16]).unwrap();
    let booted = boot(&image).load(&mut memory, reset_state()).unwrap();
    assert_eq!(booted.state.rip, 0x20_0020);
    assert_eq!(memory.load::<8>(0x20_0008).unwrap(), [0x90; 8]);
    assert_eq!(word(&memory, 0x20_0010), 0x1bad_b002);
    assert_eq!(memory.load::<16>(0x20_0030).unwrap(), [0; 16]);
    for lie in [
        [0x10, 0x20, 0, 0, 0],
        [0x20_0010, 0x10_0000, 0, 0, 0],
        [0x20_0010, 0x20_0010, 0x10, 0, 0],
        [0x20_0010, 0x20_0010, 0x2f_0000, 0, 0],
        [0xffff_fff0, 0xffff_fff0, 0, 0, 0],
    ] {
        assert!(boot(&kludge(lie)).load(&mut ram(4), reset_state()).is_err());
    }
}

#[test]
fn plain_elf64_starts_in_long_mode_at_its_physical_entry() {
    let image = ElfMaker {
        entry: 0xffff_ffff_8100_0002,
        ..ElfMaker::default()
    }
    .make();
    assert_eq!(ImageKind::detect(&image), Ok(ImageKind::Elf64));
    let mut ram = ram(32);
    let state = boot(&image).load(&mut ram, reset_state()).unwrap().state;
    assert_eq!(state.rip, 0x100_0002);
    assert_eq!((state.cr0, state.msrs.efer), (0x8000_0011, 0x500));
    assert_eq!(
        (state.gpr[3], state.gpr[6]),
        (layout::START_INFO, layout::BOOT_PARAMS)
    );
}

#[test]
fn an_entry_in_a_segment_linked_around_the_end_of_memory_is_translated() {
    let image = ElfMaker {
        linked: u64::MAX - 1,
        entry: 1,
        ..ElfMaker::default()
    }
    .make();
    let state = boot(&image)
        .load(&mut ram(32), reset_state())
        .unwrap()
        .state;
    assert_eq!(state.rip, 0x100_0003);
}

#[test]
fn plain_elf32_starts_in_flat_protected_mode() {
    let image = ElfMaker {
        is_64: false,
        machine: 3,
        linked: 0x10_0000,
        address: 0x10_0000,
        entry: 0x10_0001,
        ..ElfMaker::default()
    }
    .make();
    assert_eq!(ImageKind::detect(&image), Ok(ImageKind::Elf32));
    let state = boot(&image).load(&mut ram(4), reset_state()).unwrap().state;
    assert_eq!((state.rip, state.cr0), (0x10_0001, 0x11));
    assert_eq!(state.gpr[3], layout::START_INFO);
}

#[test]
fn segments_outside_ram_or_over_the_boot_information_are_refused() {
    let at = |address: u64, tail: u64| {
        let image = ElfMaker {
            address,
            linked: address,
            entry: address,
            tail,
            ..ElfMaker::default()
        }
        .make();
        boot(&image).load(&mut ram(4), reset_state()).unwrap_err()
    };
    for (address, tail) in [
        (0x40_0000, 0),
        (0x3f_ffff, 0),
        (0x10_0000, u64::MAX - 8),
        (u64::MAX - 2, 0),
        (0xfee0_0000, 0),
    ] {
        let error = at(address, tail);
        assert!(matches!(error, BootError::OutsideRam { .. }), "{error}");
    }
    assert!(matches!(at(0x1000, 0), BootError::LowMemory { .. }));
    assert!(matches!(at(0, 0x10_0000), BootError::LowMemory { .. }));
}

#[test]
fn raw_code_starts_in_real_mode_at_7c00() {
    let mut memory = ram(1);
    let raw = Boot {
        raw: true,
        ..boot(&CODE)
    };
    let state = raw.load(&mut memory, reset_state()).unwrap().state;
    assert_eq!((state.segments.cs.base, state.rip), (0, 0x7c00));
    assert_eq!(state.cr0 & 1, 0);
    assert_eq!(memory.load::<4>(0x7c00).unwrap(), CODE);
    let with_line = Boot {
        command_line: "x",
        ..raw
    };
    assert_eq!(
        with_line.load(&mut memory, reset_state()).unwrap_err(),
        BootError::RawTakesNothing
    );
}

#[test]
fn files_of_other_kinds_are_named() {
    let mut sector = vec![0; 512];
    put(&mut sector, 510, &[0x55, 0xaa]);
    let program = {
        let mut elf = vmlinux();
        put(&mut elf, 64, &[3]);
        elf
    };
    let arm = ElfMaker {
        machine: 183,
        ..ElfMaker::default()
    }
    .make();
    for (bytes, expected) in [
        (&b""[..], "an empty file"),
        (b"hello", "of no known kind"),
        (b"#!/bin/sh", "a script"),
        (b"070701000", "cpio"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"QFI\xfb", "qcow2"),
        (&sector, "a disk image"),
        (&program, "a program for an operating system"),
        (&arm, "another processor (machine number 183)"),
    ] {
        let message = ImageKind::detect(bytes).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert!(!message.contains('\n'));
    }
}

#[test]
fn command_lines_are_bounded() {
    let kernel = vmlinux();
    let packed = bzimage(&pack_lz4(&kernel), kernel.len() as u32);
    let line = "x".repeat(2048);
    let with = |image, command_line| {
        Boot {
            command_line,
            ..boot(image)
        }
        .load(&mut ram(32), reset_state())
    };
    assert!(matches!(
        with(&packed, &line),
        Err(BootError::CommandLine {
            len: 2048,
            limit: 2047
        })
    ));
    assert!(with(&packed, &line[1..]).is_ok());
    assert!(with(&kernel, &line).is_ok());
    assert!(with(&kernel, "a\0b").is_err());
    assert!(with(&kernel, &"x".repeat(1 << 16)).is_err());
}

#[test]
fn modules_are_for_images_that_take_them() {
    let kernel = vmlinux();
    let packed = bzimage(&pack_lz4(&kernel), kernel.len() as u32);
    let with = |image, count: usize| {
        let modules = vec![
            Module {
                text: "m",
                bytes: &[1; 10]
            };
            count
        ];
        Boot {
            modules: &modules,
            ..boot(image)
        }
        .load(&mut ram(32), reset_state())
        .map(|_| ())
    };
    assert_eq!(with(&packed, 1), Err(BootError::Modules));
    assert_eq!(with(&kernel, 3), Ok(()));
    assert!(matches!(
        with(&kernel, 1000),
        Err(BootError::Unsupported { .. })
    ));
}

#[test]
fn truncated_images_never_panic() {
    let kernel = vmlinux();
    let images = [
        kernel.clone(),
        bzimage(&pack_lz4(&kernel), kernel.len() as u32),
        bzimage(&pack_xz(&kernel), kernel.len() as u32),
        ElfMaker {
            is_64: false,
            machine: 3,
            multiboot: Some(3),
            ..ElfMaker::default()
        }
        .make(),
        kludge([0x20_0010, 0x20_0008, 0x20_0030, 0x20_1000, 0x20_0020]),
    ];
    let mut memory = ram(20);
    for image in &images {
        for end in 0..image.len() {
            let result = boot(&image[..end]).load(&mut memory, reset_state());
            if let Err(error) = result {
                assert!(!error.to_string().contains('\n'));
            }
        }
    }
}

#[test]
fn damaged_headers_never_panic() {
    let kernel = vmlinux();
    let images = [
        kernel.clone(),
        bzimage(&kernel, 0),
        ElfMaker {
            is_64: false,
            machine: 3,
            multiboot: Some(3),
            ..ElfMaker::default()
        }
        .make(),
        kludge([0x20_0010, 0x20_0008, 0x20_0030, 0x20_1000, 0x20_0020]),
    ];
    let mut memory = ram(20);
    for image in &images {
        for at in 0..image.len().min(0x600) {
            for value in [0, 0x80, 0xff] {
                let mut damaged = image.clone();
                for byte in damaged.iter_mut().skip(at).take(4) {
                    *byte = value;
                }
                let _ = boot(&damaged).load(&mut memory, reset_state());
            }
        }
    }
}

#[test]
fn too_little_ram_is_refused_before_anything_is_written() {
    let kernel = vmlinux();
    let mut memory = Ram::new(4096).unwrap();
    let error = boot(&kernel).load(&mut memory, reset_state()).unwrap_err();
    assert!(matches!(error, BootError::OutsideRam { .. }));
    assert!(memory.bytes().iter().all(|&byte| byte == 0));
}
