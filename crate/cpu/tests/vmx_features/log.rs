//! Page-modification logging (Vol. 3C, "Page-Modification Logging").

use hypernest_vmcs::{ExitReason, Field, proc2};
use iced_x86::code_asm::{qword_ptr, rax, rdi, xmmword_ptr};

use super::setup;
use crate::support::DATA;
use crate::support::hypervisor::{AD, EPT, Emit, GUEST, L1, PAGES, RWX, ept_entry, eptp};

const LOG: u64 = PAGES;
const CONTROLS: u32 = proc2::ENABLE_EPT | proc2::ENABLE_PML;
/// The pages of the guest's page tables: using them counts as writing them.
const TABLES: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];

fn start(index: u64, flags: u64, guest: Emit) -> L1 {
    L1::start(&setup(
        CONTROLS,
        &[
            (Field::EPT_POINTER, eptp(EPT) | flags),
            (Field::PML_ADDRESS, LOG),
            (Field::GUEST_PML_INDEX, index),
        ],
        guest,
    ))
}

/// Stores to two pages, to the first of them twice.
const STORES: Emit = &|a| {
    a.mov(rdi, DATA)?;
    a.mov(qword_ptr(rdi + 8), rdi)?;
    a.mov(qword_ptr(rdi + 0x1010), rdi)?;
    a.mov(qword_ptr(rdi), rdi)?;
    a.vmcall()
};

fn log(l1: &L1, count: u64) -> Vec<u64> {
    (0..count).map(|n| l1.word(LOG + 8 * (511 - n))).collect()
}

#[test]
fn each_page_is_logged_once_from_the_end() {
    let l1 = start(511, AD, STORES);
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(l1.field(Field::GUEST_PML_INDEX), 511 - 6);
    let expected: Vec<u64> = TABLES.into_iter().chain([DATA, DATA + 0x1000]).collect();
    assert_eq!(log(&l1, 6), expected);
    assert_eq!(l1.word(LOG + 8 * (511 - 6)), 0);
    assert_eq!(l1.word(ept_entry(EPT, DATA)) >> 8 & 3, 3, "accessed, dirty");
    assert_eq!(l1.word(ept_entry(EPT, GUEST)) >> 8 & 3, 1, "accessed");
}

#[test]
fn a_full_log_exits_before_anything_changed() {
    let mut l1 = start(4, AD, STORES);
    // Entries 4 to 1 are the page tables, 0 the first page; the second finds no room.
    assert_eq!(l1.exit(), (u64::from(ExitReason::PML_FULL.0), 0));
    assert_eq!(l1.field(Field::GUEST_PML_INDEX), 0xffff);
    assert_eq!(l1.word(LOG), DATA);
    let entry = ept_entry(EPT, DATA + 0x1000);
    assert_eq!(l1.word(entry) >> 8 & 3, 0);
    assert_eq!(l1.word(DATA + 0x1010), 0, "the store has not happened");
    l1.set(Field::GUEST_PML_INDEX, 511);
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(log(&l1, 1), [DATA + 0x1000]);
    assert_eq!(l1.word(DATA + 0x1010), DATA);
}

#[test]
fn an_accessed_flag_needs_room_too() {
    let mut l1 = start(511, AD, &|a| {
        a.mov(rdi, DATA)?;
        a.vmcall()?;
        a.mov(rax, qword_ptr(rdi))?;
        a.vmcall()
    });
    l1.set(Field::GUEST_PML_INDEX, 512);
    assert_eq!(l1.next().0, u64::from(ExitReason::PML_FULL.0));
    assert_eq!(l1.word(ept_entry(EPT, DATA)) >> 8 & 3, 0);
    l1.set(Field::GUEST_PML_INDEX, 0);
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(l1.field(Field::GUEST_PML_INDEX), 0, "nothing was logged");
}

#[test]
fn without_dirty_flags_there_is_nothing_to_log() {
    let l1 = start(0xffff, 0, STORES);
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(l1.field(Field::GUEST_PML_INDEX), 0xffff);
    assert_eq!(log(&l1, 1), [0]);
}

#[test]
fn a_page_that_is_clean_again_is_logged_again() {
    let mut l1 = start(511, AD, &|a| {
        a.mov(rdi, DATA)?;
        a.mov(qword_ptr(rdi), rdi)?;
        a.vmcall()?;
        a.mov(qword_ptr(rdi), rdi)?;
        a.vmcall()
    });
    l1.set(Field::GUEST_PML_INDEX, 511);
    l1.put(ept_entry(EPT, DATA), DATA | RWX);
    l1.skip();
    // All contexts.
    l1.resume_after(&|a| {
        a.mov(rax, 2u64)?;
        a.invept(rax, xmmword_ptr(PAGES + 0x2000))
    });
    assert_eq!(log(&l1, 1), [DATA]);
}
