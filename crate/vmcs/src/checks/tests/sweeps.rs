//! Every bit of a field, every type, every vector, against what the manual says in other words.

use super::*;

/// Of a field, the bits that make the row the first to fail when one of them is turned on.
struct Reserved {
    id: &'static str,
    base: Base,
    field: Field,
    bits: u64,
}

const fn bits(id: &'static str, base: Base, field: Field, bits: u64) -> Reserved {
    Reserved {
        id,
        base,
        field,
        bits,
    }
}

const BEYOND: u64 = !0 << 46;
const HIGH: u64 = !0 << 32;
const RIGHTS: u64 = 0b1111_1111_1111_1110_0000_1111_0000_0000;

const RESERVED: &[Reserved] = &[
    bits("C005", long_mode, Field::CR3_TARGET_COUNT, 0xffff_fff8),
    bits("C006", bitmaps, Field::IO_BITMAP_A, BEYOND | 0xfff),
    bits("C008", bitmaps, Field::MSR_BITMAP, BEYOND | 0xfff),
    bits("C010", tpr_shadow, Field::TPR_THRESHOLD, 0xffff_fff0),
    bits("C022", posted, Field::POSTED_INTR_NV, 0xff00),
    bits("C023", posted, Field::POSTED_INTR_DESC_ADDR, BEYOND | 0x3f),
    bits("C029", long_mode, Field::EPT_POINTER, BEYOND | 0xf00),
    bits("C045", hlat, Field::HLAT_POINTER, BEYOND | 0xfe7),
    bits(
        "C052",
        msr_lists,
        Field::VM_EXIT_MSR_STORE_ADDR,
        BEYOND | 15,
    ),
    bits("C054", msr_lists, Field::VM_EXIT_MSR_LOAD_ADDR, BEYOND | 15),
    bits("C064", injects_interrupt, INJECTION, 0x7fff_d000),
    bits(
        "C065",
        injects_fault,
        Field::VM_ENTRY_EXCEPTION_ERROR_CODE,
        0xffff_0000,
    ),
    bits(
        "C067",
        msr_lists,
        Field::VM_ENTRY_MSR_LOAD_ADDR,
        BEYOND | 15,
    ),
    bits("H003", long_mode, Field::HOST_CR3, BEYOND),
    bits("H009", long_mode, Field::HOST_IA32_EFER, !0xd01),
    bits("H010", all_state, Field::HOST_S_CET, 0x3c0),
    bits("H033", all_state, Field::HOST_SSP, 3),
    bits("H011", all_state, Field::HOST_IA32_PKRS, HIGH),
    bits("H014", long_mode, Field::HOST_CS_SELECTOR, 7),
    bits("H015", long_mode, Field::HOST_SS_SELECTOR, 7),
    bits("H016", long_mode, Field::HOST_DS_SELECTOR, 7),
    bits("H017", long_mode, Field::HOST_ES_SELECTOR, 7),
    bits("H018", long_mode, Field::HOST_FS_SELECTOR, 7),
    bits("H019", long_mode, Field::HOST_GS_SELECTOR, 7),
    bits("H020", long_mode, Field::HOST_TR_SELECTOR, 7),
    bits(
        "H012",
        all_state,
        Field::HOST_IA32_FRED_CONFIG,
        0x834 | !0 << 47,
    ),
    bits(
        "H012",
        all_state,
        Field::HOST_IA32_FRED_RSP1,
        0x3f | !0 << 47,
    ),
    bits(
        "H012",
        all_state,
        Field::HOST_IA32_FRED_RSP2,
        0x3f | !0 << 47,
    ),
    bits(
        "H012",
        all_state,
        Field::HOST_IA32_FRED_RSP3,
        0x3f | !0 << 47,
    ),
    bits("H012", all_state, Field::HOST_IA32_FRED_SSP1, 7 | !0 << 47),
    bits("H012", all_state, Field::HOST_IA32_FRED_SSP2, 7 | !0 << 47),
    bits("H012", all_state, Field::HOST_IA32_FRED_SSP3, 7 | !0 << 47),
    bits("G005", long_mode, Field::GUEST_CR3, BEYOND),
    bits("G009", long_mode, Field::GUEST_DR7, HIGH),
    bits("G015", all_state, Field::GUEST_BNDCFGS, 0xffc | !0 << 47),
    bits("G017", all_state, Field::GUEST_UINV, 0xff00),
    bits("G018", all_state, Field::GUEST_S_CET, 0x3c0 | !0 << 47),
    bits("G019", all_state, Field::GUEST_SSP, 3),
    bits("G129", all_state, Field::GUEST_SSP, !0 << 48),
    bits("G021", all_state, Field::GUEST_IA32_PKRS, HIGH),
    bits(
        "G022",
        all_state,
        Field::GUEST_IA32_FRED_CONFIG,
        0x834 | !0 << 47,
    ),
    bits(
        "G022",
        all_state,
        Field::GUEST_IA32_FRED_RSP3,
        0x3f | !0 << 47,
    ),
    bits("G022", all_state, Field::GUEST_IA32_FRED_SSP1, 7 | !0 << 47),
    bits("G034", long_mode, Field::GUEST_FS_BASE, !0 << 47),
    bits("G037", long_mode, Field::GUEST_CS_BASE, HIGH),
    bits("G063", long_mode, Field::GUEST_CS_AR_BYTES, RIGHTS),
    bits("G066", long_mode, Field::GUEST_SS_AR_BYTES, RIGHTS),
    bits("G069", long_mode, Field::GUEST_DS_AR_BYTES, RIGHTS),
    bits("G072", long_mode, Field::GUEST_ES_AR_BYTES, RIGHTS),
    bits("G075", long_mode, Field::GUEST_FS_AR_BYTES, RIGHTS),
    bits("G078", long_mode, Field::GUEST_GS_AR_BYTES, RIGHTS),
    bits("G084", long_mode, Field::GUEST_TR_AR_BYTES, RIGHTS),
    bits("G093", long_mode, Field::GUEST_GDTR_LIMIT, 0xffff_0000),
    bits("G094", long_mode, Field::GUEST_IDTR_LIMIT, 0xffff_0000),
    bits("G095", protected_mode, Field::GUEST_RIP, HIGH),
    bits("G096", low_rip, Field::GUEST_RIP, !0 << 48),
    bits(
        "G097",
        long_mode,
        Field::GUEST_RFLAGS,
        !0 << 22 | 1 << 15 | 1 << 5 | 1 << 3,
    ),
    bits("G100", long_mode, Field::GUEST_ACTIVITY_STATE, 0xffff_fffc),
    bits(
        "G107",
        long_mode,
        Field::GUEST_INTERRUPTIBILITY_INFO,
        0xffff_ffe0,
    ),
    bits("G113", long_mode, Field::GUEST_INTERRUPTIBILITY_INFO, 4),
    bits(
        "G117",
        long_mode,
        Field::GUEST_PENDING_DBG_EXCEPTIONS,
        !0 << 17 | 0xa7f0,
    ),
    bits("G125", pae, Field::GUEST_PDPTR0, BEYOND | 0x1e6),
    bits("G127", pae, Field::GUEST_PDPTR2, BEYOND | 0x1e6),
];

fn bitmaps() -> World {
    let mut w = long_mode();
    w.on(PROC1, proc1::USE_I_O_BITMAPS | proc1::USE_MSR_BITMAPS);
    w
}

fn tpr_shadow() -> World {
    let mut w = long_mode();
    w.on(PROC1, proc1::USE_TPR_SHADOW);
    w
}

fn posted() -> World {
    let mut w = tpr_shadow();
    w.on(PIN, pin::PROCESS_POSTED_INTERRUPTS)
        .proc2(proc2::VIRTUAL_INTERRUPT_DELIVERY)
        .on(EXIT, exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT);
    w
}

fn hlat() -> World {
    let mut w = long_mode();
    w.proc3(proc3::ENABLE_HLAT);
    w
}

fn msr_lists() -> World {
    let mut w = long_mode();
    w.set(Field::VM_EXIT_MSR_STORE_COUNT, 1)
        .set(Field::VM_EXIT_MSR_LOAD_COUNT, 1)
        .set(Field::VM_ENTRY_MSR_LOAD_COUNT, 1);
    w
}

fn injects_interrupt() -> World {
    let mut w = long_mode();
    w.inject(event::EXTERNAL_INTERRUPT, 0x30, 0);
    w
}

fn injects_fault() -> World {
    let mut w = long_mode();
    w.inject(event::HARDWARE_EXCEPTION, 13, 1 << 11);
    w
}

fn low_rip() -> World {
    let mut w = long_mode();
    w.set(Field::GUEST_RIP, 0x1000);
    w
}

fn first_id(w: &World) -> Option<&'static str> {
    first_to_fail(&w.entry()).map(|row| row.id)
}

#[test]
fn reserved_bits_and_no_others_fail() {
    for reserved in RESERVED {
        for bit in 0..64 {
            let mut w = (reserved.base)();
            let old = w.vmcs.get(reserved.field);
            w.on(reserved.field, 1u64 << bit);
            if w.vmcs.get(reserved.field) == old {
                continue;
            }
            assert_eq!(
                first_id(&w) == Some(reserved.id),
                reserved.bits >> bit & 1 != 0,
                "{} {:?} bit {bit}: {:?}",
                reserved.id,
                reserved.field,
                first_id(&w)
            );
        }
    }
}

#[test]
fn a_byte_of_pat_is_a_memory_type() {
    let pats = [
        ("H008", Field::HOST_IA32_PAT),
        ("G013", Field::GUEST_IA32_PAT),
    ];
    for (id, field) in pats {
        for kind in 0..=255u64 {
            for shift in (0..64).step_by(8) {
                let mut w = long_mode();
                w.set(field, kind << shift);
                let legal = [0, 1, 4, 5, 6, 7].contains(&kind);
                assert_eq!(first_id(&w), (!legal).then_some(id), "{kind} << {shift}");
            }
        }
    }
}

/// Whatever else it says of the event: the row of its vector, error code, length or type fails.
#[test]
fn each_type_of_event_has_its_rules() {
    for kind in 0..8u8 {
        for vector in 0..=255u8 {
            for (deliver, basic_56) in [(0, false), (1 << 11, false), (0, true), (1 << 11, true)] {
                for length in [0, 1, 15, 16] {
                    let mut w = long_mode();
                    w.caps.misc &= !(1 << 30);
                    w.caps.basic &= !(1 << 56);
                    w.caps.basic |= u64::from(basic_56) << 56;
                    w.inject(kind, vector, deliver)
                        .set(Field::VM_ENTRY_INSTRUCTION_LEN, length);
                    let has_code = [8, 10, 11, 12, 13, 14, 17].contains(&vector);
                    let expected = match (kind, vector) {
                        (1, _) => Some("C057"),
                        (2, v) if v != 2 => Some("C058"),
                        (3, 32..) => Some("C059"),
                        (7, 1..) => Some("C060"),
                        (k, _) if k != 3 && deliver != 0 => Some("C061"),
                        (3, _) if !basic_56 && has_code != (deliver != 0) => Some("C063"),
                        (4..=6, _) if !(1..=15).contains(&length) => Some("C066"),
                        _ => None,
                    };
                    assert_eq!(
                        first_id(&w),
                        expected,
                        "{kind} {vector} {deliver:#x} {length}"
                    );
                }
            }
        }
    }
}

/// An event of type 7 under FRED: 1 is SYSCALL, 2 SYSENTER, and both have a length.
#[test]
fn fred_injects_system_calls() {
    for vector in 0..=255u8 {
        for length in [1, 16] {
            let mut w = long_mode();
            w.on(Field::GUEST_CR4, CR4_FRED)
                .inject(7, vector, 0)
                .set(Field::VM_ENTRY_INSTRUCTION_LEN, length);
            let expected = match (vector, length) {
                (0, _) | (1 | 2, 1) => None,
                (1 | 2, _) => Some("C066"),
                _ => Some("C060"),
            };
            assert_eq!(first_id(&w), expected, "{vector} {length}");
        }
    }
}

#[test]
fn types_of_segments() {
    let cases: [(&str, Field, &[u64], Base); 9] = [
        (
            "G041",
            Field::GUEST_CS_AR_BYTES,
            &[9, 11, 13, 15],
            long_mode,
        ),
        (
            "G041",
            Field::GUEST_CS_AR_BYTES,
            &[3, 9, 11, 13, 15],
            unrestricted,
        ),
        ("G042", Field::GUEST_SS_AR_BYTES, &[3, 7], long_mode),
        (
            "G043",
            Field::GUEST_DS_AR_BYTES,
            &[1, 3, 5, 7, 11, 15],
            long_mode,
        ),
        (
            "G044",
            Field::GUEST_ES_AR_BYTES,
            &[1, 3, 5, 7, 11, 15],
            long_mode,
        ),
        (
            "G045",
            Field::GUEST_FS_AR_BYTES,
            &[1, 3, 5, 7, 11, 15],
            long_mode,
        ),
        (
            "G046",
            Field::GUEST_GS_AR_BYTES,
            &[1, 3, 5, 7, 11, 15],
            long_mode,
        ),
        ("G082", Field::GUEST_TR_AR_BYTES, &[11], long_mode),
        ("G082", Field::GUEST_TR_AR_BYTES, &[3, 11], protected_mode),
    ];
    for (id, field, legal, base) in cases {
        for kind in 0..16 {
            let mut w = base();
            w.off(field, 0xfu32).on(field, kind);
            let expected = (!legal.contains(&kind)).then_some(id);
            assert_eq!(first_id(&w), expected, "type {kind}");
        }
    }
}

/// CPL of code against CPL of stack, and against the selectors.
#[test]
fn privilege_of_code_and_stack() {
    for (kind, conforming) in [(9, false), (11, false), (13, true), (15, true)] {
        for code in 0..4u64 {
            for stack in 0..4u64 {
                for (ss, cs) in [(stack, stack), (stack ^ 1, stack ^ 1), (stack, stack ^ 2)] {
                    let mut w = long_mode();
                    w.set(Field::GUEST_CS_AR_BYTES, 0xa090 | kind | code << 5)
                        .set(Field::GUEST_SS_AR_BYTES, 0xc093 | stack << 5)
                        .set(Field::GUEST_CS_SELECTOR, 8 | cs)
                        .set(Field::GUEST_SS_SELECTOR, 16 | ss);
                    let expected = if ss != cs {
                        Some("G026")
                    } else if !conforming && code != stack {
                        Some("G054")
                    } else if conforming && code > stack {
                        Some("G055")
                    } else if stack != ss {
                        Some("G056")
                    } else {
                        None
                    };
                    assert_eq!(first_id(&w), expected, "{kind} {code} {stack} {ss} {cs}");
                }
            }
        }
    }
}
