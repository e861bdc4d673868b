//! Task switches of a guest (Vol. 3C, "Treatment of Task Switches"): checked, then left to the
//! hypervisor.

use hypernest_vmcs::{ExitReason, Field, entry, proc2};

use super::{exception, setup};
use crate::support::hypervisor::{GUEST, L1, PAGES};

const GDT: u64 = PAGES;
const IDT: u64 = PAGES + 0x1000;
/// The guest's TSS, whose first word names the task before.
const TSS: u64 = PAGES + 0x2000;
const NT: u64 = 1 << 14;
const RF: u64 = 1 << 16;

/// Selectors of descriptors in the GDT.
const AVAILABLE: u16 = 32;
const GATE: u16 = 40;
const BUSY: u16 = 48;
const ABSENT: u16 = 56;
const SHORT: u16 = 64;
const AVAILABLE16: u16 = 72;

const fn tss(rights: u64, limit: u64) -> u64 {
    rights << 40 | TSS << 16 | limit
}

const fn task_gate(selector: u16) -> u64 {
    0xe5 << 40 | (selector as u64) << 16
}

const DESCRIPTORS: [u64; 10] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0,
    tss(0x89, 0x67),
    task_gate(AVAILABLE),
    tss(0x8b, 0x67),
    tss(0x09, 0x67),
    tss(0x89, 0x66),
    tss(0x81, 0x2b),
];

/// A guest in 32-bit protected mode without paging, with `back` as the link of its TSS.
fn run(code: &[u8], rflags: u64, back: u16) -> L1 {
    let mut l1 = L1::new(&setup(
        proc2::ENABLE_EPT | proc2::UNRESTRICTED_GUEST,
        &[
            (Field::VM_ENTRY_CONTROLS, u64::from(entry::DEFAULT1)),
            (Field::GUEST_CR0, 0x31),
            (Field::GUEST_CS_AR_BYTES, 0xc09b),
            (Field::GUEST_GDTR_BASE, GDT),
            (Field::GUEST_GDTR_LIMIT, 8 * DESCRIPTORS.len() as u64 - 1),
            (Field::GUEST_IDTR_BASE, IDT),
            (Field::GUEST_IDTR_LIMIT, 0x7ff),
            (Field::GUEST_TR_BASE, TSS),
            (Field::GUEST_RFLAGS, rflags | 2),
            (Field::EXCEPTION_BITMAP, 1 << 10 | 1 << 11 | 1 << 13),
        ],
        &|a| a.nop(),
    ));
    for (n, descriptor) in DESCRIPTORS.iter().enumerate() {
        l1.put(GDT + 8 * n as u64, *descriptor);
    }
    l1.put(IDT + 8 * 0x06, task_gate(AVAILABLE));
    l1.put(IDT + 8 * 0x40, task_gate(AVAILABLE));
    l1.put(IDT + 8 * 0x41, task_gate(BUSY));
    l1.put(TSS, u64::from(back));
    l1.ram.write(GUEST, code).unwrap();
    l1.run();
    l1
}

fn jump(selector: u16) -> [u8; 7] {
    let [low, high] = selector.to_le_bytes();
    [0xea, 0, 0, 0, 0, low, high]
}

fn call(selector: u16) -> [u8; 7] {
    let [low, high] = selector.to_le_bytes();
    [0x9a, 0, 0, 0, 0, low, high]
}

const IRET: [u8; 1] = [0xcf];
const UD2: [u8; 2] = [0x0f, 0x0b];

fn int(vector: u8) -> [u8; 2] {
    [0xcd, vector]
}

#[test]
fn a_task_switch_exits_with_its_selector_and_source() {
    let (call_gate, call_tss) = (call(GATE), call(AVAILABLE));
    let (jump_gate, jump_tss, jump16) = (jump(GATE), jump(AVAILABLE), jump(AVAILABLE16));
    // Code, flags, link; selector and source; length; IDT-vectoring information.
    type Row<'a> = (&'a [u8], u64, u16, (u16, u64), u64, u64);
    let rows: [Row; 8] = [
        (&call_tss, 0, 0, (AVAILABLE, 0), 7, 0),
        (&call_gate, 0, 0, (AVAILABLE, 0), 7, 0),
        (&IRET, NT, BUSY, (BUSY, 1), 1, 0),
        (&jump_tss, 0, 0, (AVAILABLE, 2), 7, 0),
        (&jump16, 0, 0, (AVAILABLE16, 2), 7, 0),
        (&jump_gate, 0, 0, (AVAILABLE, 2), 7, 0),
        (&int(0x40), 0, 0, (AVAILABLE, 3), 2, 0x8000_0440),
        (&UD2, 0, 0, (AVAILABLE, 3), 0, 0x8000_0306),
    ];
    for (code, rflags, back, (selector, source), length, vectoring) in rows {
        let l1 = run(code, rflags, back);
        let qualification = u64::from(selector) | source << 30;
        let reason = u64::from(ExitReason::TASK_SWITCH.0);
        assert_eq!(l1.exit(), (reason, qualification), "{code:x?}");
        assert_eq!(l1.field(Field::VM_EXIT_INSTRUCTION_LEN), length);
        assert_eq!(l1.field(Field::IDT_VECTORING_INFO_FIELD), vectoring);
        // At the instruction; NT as it was; RF only where a fault was to be delivered.
        assert_eq!(l1.field(Field::GUEST_RIP), GUEST);
        let resumed = if code == UD2 { RF } else { 0 };
        assert_eq!(l1.field(Field::GUEST_RFLAGS), rflags | resumed | 2);
    }
}

#[test]
fn what_names_no_task_faults_first() {
    let (local, beyond) = (AVAILABLE | 4, 0x100);
    // Code, flags, link; vector and error code.
    type Row<'a> = (&'a [u8], u64, u16, (u64, u16));
    let rows: [Row; 12] = [
        (&jump(BUSY), 0, 0, (13, BUSY)),
        (&call(BUSY), 0, 0, (13, BUSY)),
        (&jump(ABSENT), 0, 0, (11, ABSENT)),
        (&jump(SHORT), 0, 0, (10, SHORT)),
        (&jump(AVAILABLE | 3), 0, 0, (13, AVAILABLE)),
        (&IRET, NT, AVAILABLE, (10, AVAILABLE)),
        (&IRET, NT, 0, (10, 0)),
        (&IRET, NT, local, (10, local)),
        (&IRET, NT, beyond, (10, beyond)),
        (&int(0x41), 0, 0, (13, BUSY)),
        (&call(beyond), 0, 0, (13, beyond)),
        (&jump(16), 0, 0, (13, 16)),
    ];
    for (code, rflags, back, (vector, error)) in rows {
        let l1 = run(code, rflags, back);
        assert_eq!(exception(&l1), (vector, u64::from(error)), "{code:x?}");
    }
}
