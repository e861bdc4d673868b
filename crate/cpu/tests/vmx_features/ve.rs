//! Virtualization exceptions (Vol. 3C, "Virtualization Exceptions").

use hypernest_vmcs::{ExitReason, Field, entry, pin, proc2, vmfunc};
use iced_x86::code_asm::{eax, ecx, qword_ptr, rax, rdi, rsp};

use super::{exception, setup, vector};
use crate::support::DATA;
use crate::support::hypervisor::{EPT, EPT2, Emit, GUEST, L1, PAGES, RWX, ept_entry, eptp};

const AREA: u64 = PAGES;
const CONTROLS: u32 = proc2::ENABLE_EPT | proc2::EPT_VIOLATION_VE;
const SUPPRESS: u64 = 1 << 63;
const VIOLATION: u64 = ExitReason::EPT_VIOLATION.0 as u64;
/// Guest page-table entry of DATA.
const ENTRY: u64 = 0x4000 + 8 * (DATA >> 12);
/// Linear address valid, final translation; to a user page that is writable.
const FINAL: u64 = 0x180 | 0x600;

const LOAD: Emit = &|a| {
    a.mov(rdi, DATA + 8)?;
    a.mov(rax, qword_ptr(rdi))
};
const STORE: Emit = &|a| {
    a.mov(rdi, DATA + 8)?;
    a.mov(qword_ptr(rdi), rax)
};
/// Length of the first instruction of both.
const FIRST: u64 = 7;

fn new(more: &[(Field, u64)], guest: Emit) -> L1 {
    let mut fields = vec![(Field::VE_INFORMATION_ADDRESS, AREA)];
    fields.extend_from_slice(more);
    L1::new(&setup(CONTROLS, &fields, guest))
}

/// Runs a guest with this EPT entry for DATA.
fn with_entry(value: u64, guest: Emit) -> L1 {
    let mut l1 = new(&[], guest);
    l1.put(ept_entry(EPT, DATA), value);
    l1.run();
    l1
}

/// Reason and busy word, qualification, linear and guest-physical address.
fn area(l1: &L1) -> [u64; 4] {
    [0, 8, 16, 24].map(|at| l1.word(AREA + at))
}

fn written(qualification: u64, linear: u64, physical: u64) -> [u64; 4] {
    [
        VIOLATION | 0xffff_ffff << 32,
        qualification,
        linear,
        physical,
    ]
}

#[test]
fn a_violation_becomes_an_exception_of_the_guest() {
    let l1 = with_entry(0, LOAD);
    assert_eq!(vector(&l1), 20);
    assert_eq!(area(&l1), written(1 | FINAL, DATA + 8, DATA + 8));
    // A fault: the instruction's address, RF set, no error code.
    let stack = l1.field(Field::GUEST_RSP);
    let rip = l1.word(stack);
    assert!(
        (GUEST + FIRST..GUEST + FIRST + 4).contains(&rip),
        "{rip:#x}"
    );
    assert_ne!(l1.word(stack + 16) & 1 << 16, 0);
}

#[test]
fn the_deciding_entry_may_suppress_it() {
    let read_only = DATA | RWX & !2;
    for (value, guest, qualification) in
        [(0, LOAD, 1 | FINAL), (read_only, STORE, 2 | 5 << 3 | FINAL)]
    {
        let l1 = with_entry(value, guest);
        assert_eq!(vector(&l1), 20);
        assert_eq!(area(&l1), written(qualification, DATA + 8, DATA + 8));
        let l1 = with_entry(value | SUPPRESS, guest);
        assert_eq!(l1.exit(), (VIOLATION, qualification));
        assert_eq!(area(&l1), [0; 4]);
    }
}

#[test]
fn of_entries_that_lead_on_the_bit_counts_where_they_are_not_present() {
    // The guest maps DATA to 4 MiB, which the third entry of the directory would lead to.
    let directory = EPT + 0x2000 + 16;
    for (value, converts) in [
        (0, true),
        (SUPPRESS, false),
        ((EPT + 0x5000) | 7 | SUPPRESS, true),
    ] {
        let mut l1 = new(&[], LOAD);
        l1.put(ENTRY, 0x40_0000 | 7);
        l1.put(directory, value);
        l1.run();
        if converts {
            assert_eq!(vector(&l1), 20);
            assert_eq!(area(&l1), written(1 | FINAL, DATA + 8, 0x40_0008));
        } else {
            assert_eq!(l1.exit().0, VIOLATION);
        }
    }
}

#[test]
fn a_misconfiguration_is_always_an_exit() {
    // Writable, not readable.
    let l1 = with_entry(DATA | 2, LOAD);
    assert_eq!(l1.reason(), ExitReason::EPT_MISCONFIGURATION);
    assert_eq!(area(&l1), [0; 4]);
}

#[test]
fn the_guests_own_tables_raise_it_too() {
    let mut l1 = new(&[], &|a| {
        a.vmcall()?;
        LOAD(a)
    });
    // The tables that map DATA and only it: a second page table.
    l1.put(0x3008, 0x5007);
    l1.run();
    l1.put(ept_entry(EPT, 0x5000), 0);
    l1.skip();
    let beyond = DATA + 0x20_0000;
    let code = crate::support::hypervisor::assemble(GUEST + 3, &|a| {
        a.mov(rdi, beyond)?;
        a.mov(rax, qword_ptr(rdi))
    });
    l1.ram.write(GUEST + 3, &code).unwrap();
    l1.resume();
    assert_eq!(vector(&l1), 20);
    let entry = 0x5000 + 8 * (DATA >> 12);
    assert_eq!(area(&l1), written(0x81, beyond, entry));
}

#[test]
fn a_busy_area_makes_it_an_exit() {
    let mut l1 = new(&[], LOAD);
    l1.put(ept_entry(EPT, DATA), 0);
    l1.put(AREA, 0x1_0000_0000);
    l1.run();
    assert_eq!(l1.exit(), (VIOLATION, 1 | FINAL));
    assert_eq!(l1.word(AREA), 0x1_0000_0000);
}

#[test]
fn while_an_event_is_delivered_it_is_an_exit() {
    let mut l1 = new(&[], &|a| {
        a.mov(rsp, DATA + 0x100)?;
        a.ud2()
    });
    l1.put(ept_entry(EPT, DATA), 0);
    l1.run();
    assert_eq!(l1.exit().0, VIOLATION);
    assert_eq!(l1.field(Field::IDT_VECTORING_INFO_FIELD), 0x8000_0306);
    assert_eq!(area(&l1), [0; 4]);
}

#[test]
fn the_exception_bitmap_has_a_bit_for_it() {
    let mut l1 = new(&[(Field::EXCEPTION_BITMAP, 1 << 20)], LOAD);
    l1.put(ept_entry(EPT, DATA), 0);
    l1.run();
    assert_eq!(exception(&l1), (20, 0));
    assert_eq!(l1.field(Field::VM_EXIT_INTR_INFO), 0x8000_0314);
    assert_eq!(area(&l1), written(1 | FINAL, DATA + 8, DATA + 8));
}

#[test]
fn without_protection_it_is_an_exit() {
    let entry_controls = entry::DEFAULT1;
    let mut fields = vec![
        (Field::VE_INFORMATION_ADDRESS, AREA),
        (Field::VM_ENTRY_CONTROLS, u64::from(entry_controls)),
        (Field::GUEST_CR0, 0x30),
        (Field::GUEST_CS_SELECTOR, (GUEST >> 4)),
        (Field::GUEST_CS_BASE, GUEST),
        (Field::GUEST_CS_LIMIT, 0xffff),
        (Field::GUEST_CS_AR_BYTES, 0x9b),
        (Field::GUEST_RIP, 0),
    ];
    for (limit, rights) in [
        (Field::GUEST_ES_LIMIT, Field::GUEST_ES_AR_BYTES),
        (Field::GUEST_SS_LIMIT, Field::GUEST_SS_AR_BYTES),
        (Field::GUEST_DS_LIMIT, Field::GUEST_DS_AR_BYTES),
        (Field::GUEST_FS_LIMIT, Field::GUEST_FS_AR_BYTES),
        (Field::GUEST_GS_LIMIT, Field::GUEST_GS_AR_BYTES),
    ] {
        fields.extend([(limit, 0xffff), (rights, 0x93)]);
    }
    let controls = CONTROLS | proc2::UNRESTRICTED_GUEST;
    let mut l1 = L1::new(&setup(controls, &fields, &|a| a.nop()));
    // MOV AL, [F000H]
    l1.ram.write(GUEST, &[0xa0, 0x00, 0xf0]).unwrap();
    l1.put(ept_entry(EPT, 0xf000), 0);
    l1.run();
    assert_eq!(l1.exit(), (VIOLATION, 1 | FINAL));
    assert_eq!(area(&l1), [0; 4]);
}

#[test]
fn it_tells_of_nmis_that_an_iret_unblocked() {
    let blocked = [
        (Field::PIN_BASED_VM_EXEC_CONTROL, u64::from(pin::DEFAULT1)),
        (Field::GUEST_INTERRUPTIBILITY_INFO, 8),
    ];
    // The frame of the exception goes below, into the page before.
    let mut l1 = new(&blocked, &|a| {
        a.mov(rsp, DATA)?;
        a.iretq()
    });
    l1.put(ept_entry(EPT, DATA), 0);
    l1.run();
    assert_eq!(vector(&l1), 20);
    assert_eq!(area(&l1), written(1 | FINAL | 1 << 12, DATA, DATA));
}

#[test]
fn it_tells_which_pointer_of_the_list_was_in_use() {
    let fields = [
        (Field::VE_INFORMATION_ADDRESS, AREA),
        (Field::VM_FUNCTION_CONTROL, vmfunc::EPTP_SWITCHING),
        (Field::EPTP_LIST_ADDRESS, PAGES + 0x1000),
    ];
    let controls = CONTROLS | proc2::ENABLE_VM_FUNCTIONS;
    let mut l1 = L1::new(&setup(controls, &fields, &|a| {
        a.xor(eax, eax)?;
        a.mov(ecx, 3)?;
        a.vmfunc()?;
        LOAD(a)
    }));
    l1.put(PAGES + 0x1018, eptp(EPT2));
    l1.put(ept_entry(EPT2, DATA), 0);
    l1.run();
    assert_eq!(vector(&l1), 20);
    assert_eq!(l1.word(AREA + 32), 3);
}
