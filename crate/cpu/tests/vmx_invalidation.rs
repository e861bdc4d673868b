//! What empties the TLB under VMX: one row per event and kind of mapping (Vol. 3C, "Operations that
//! Invalidate Cached Mappings"). The tables in `docs/vmx.md` and `docs/tlb.md` are the same for people.
//!
//! Each row lets a guest load from a page, maps another page there, lets the event happen and lets the
//! guest load again.

mod support;

use hypernest_cpu::VmxChoice;
use hypernest_vmcs::{ExitReason, Field, pin, proc2, vmfunc};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, byte_ptr, cr3, eax, ecx, qword_ptr, rax, rbx, rcx, rdi, rdx, xmmword_ptr,
};
use support::DATA;
use support::hypervisor::{EPT, EPT2, GUEST, L1, PAGES, RWX, Setup, ept_entry, eptp};

/// The page under test, and where else it may be mapped to.
const PAGE: u64 = DATA;
const OTHER: u64 = DATA + 0x1000;
/// Its entry in the page table that host and guest share.
const ENTRY: u64 = 0x4000 + 8 * (PAGE >> 12);
const GLOBAL: u64 = 1 << 8;
const PGE: u64 = 1 << 7;
const PCIDE: u64 = 1 << 17;

const DESCRIPTOR: u64 = PAGES;
const LIST: u64 = PAGES + 0x1000;
const SEEN: u64 = PAGES + 0x2000;
/// VPID of the guest, and of another one.
const VPID: u64 = 7;
const OTHER_VPID: u64 = 8;

/// What is cached of the page, and by a change of which table it goes stale.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Mapping {
    /// Of a guest without EPT: its own table.
    Linear,
    LinearGlobal,
    /// Of a guest with EPT: the extended page table.
    Physical,
    /// Of a guest with EPT: its own table.
    Combined,
    CombinedGlobal,
}
use Mapping::{Combined, CombinedGlobal, Linear, LinearGlobal, Physical};

impl Mapping {
    fn ept(self) -> bool {
        !matches!(self, Linear | LinearGlobal)
    }

    fn global(self) -> bool {
        matches!(self, LinearGlobal | CombinedGlobal)
    }
}

/// What the second load sees.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Sees {
    /// The new mapping: the event must invalidate.
    New,
    /// The new mapping, though it need not: the event may invalidate.
    MayNew,
    /// The old one: the event does not invalidate, and we make use of it.
    Old,
}
use Sees::{MayNew, New, Old};

type Emitted = Result<(), IcedError>;
/// What the hypervisor does between exit and entry, or the guest between its loads.
type Event = fn(&mut CodeAssembler) -> Emitted;

fn nothing(_: &mut CodeAssembler) -> Emitted {
    Ok(())
}

fn descriptor(a: &mut CodeAssembler, low: u64, high: u64) -> Emitted {
    a.mov(rax, low)?;
    a.mov(qword_ptr(DESCRIPTOR), rax)?;
    a.mov(rax, high)?;
    a.mov(qword_ptr(DESCRIPTOR + 8), rax)
}

fn invept(a: &mut CodeAssembler, kind: u64, pointer: u64) -> Emitted {
    descriptor(a, pointer, 0)?;
    a.mov(rax, kind)?;
    a.invept(rax, xmmword_ptr(DESCRIPTOR))
}

fn invvpid(a: &mut CodeAssembler, kind: u64, vpid: u64, linear: u64) -> Emitted {
    descriptor(a, vpid, linear)?;
    a.mov(rax, kind)?;
    a.invvpid(rax, xmmword_ptr(DESCRIPTOR))
}

fn mov_cr3(a: &mut CodeAssembler) -> Emitted {
    a.mov(rax, cr3)?;
    a.mov(cr3, rax)
}

fn switch(a: &mut CodeAssembler, to: u32) -> Emitted {
    a.xor(eax, eax)?;
    a.mov(ecx, to)?;
    a.vmfunc()
}

/// Whether the guest has a VPID.
const TAGGED: bool = true;
const UNTAGGED: bool = false;

/// Events between a VM exit and the entry after it.
#[rustfmt::skip]
const BETWEEN: &[(&str, Mapping, bool, Sees, Event)] = &[
    ("exit and entry with VPID", Linear, TAGGED, Old, nothing),
    ("exit and entry with VPID", LinearGlobal, TAGGED, Old, nothing),
    ("exit and entry with VPID", Physical, TAGGED, Old, nothing),
    ("exit and entry with VPID", Combined, TAGGED, Old, nothing),
    ("exit and entry with VPID", CombinedGlobal, TAGGED, Old, nothing),
    ("exit and entry without VPID", Linear, UNTAGGED, New, nothing),
    ("exit and entry without VPID", LinearGlobal, UNTAGGED, New, nothing),
    ("exit and entry without VPID", Physical, UNTAGGED, MayNew, nothing),
    ("exit and entry without VPID", Combined, UNTAGGED, New, nothing),
    ("exit and entry without VPID", CombinedGlobal, UNTAGGED, New, nothing),
    ("INVEPT single-context", Linear, TAGGED, Old, |a| invept(a, 1, eptp(EPT))),
    ("INVEPT single-context", Physical, TAGGED, New, |a| invept(a, 1, eptp(EPT))),
    ("INVEPT single-context", Physical, UNTAGGED, New, |a| invept(a, 1, eptp(EPT))),
    ("INVEPT single-context", Combined, TAGGED, New, |a| invept(a, 1, eptp(EPT))),
    ("INVEPT single-context", CombinedGlobal, TAGGED, New, |a| invept(a, 1, eptp(EPT))),
    ("INVEPT single-context, other flags", Physical, TAGGED, New, |a| invept(a, 1, eptp(EPT) | 1 << 6)),
    ("INVEPT single-context of other tables", Physical, TAGGED, Old, |a| invept(a, 1, eptp(EPT2))),
    ("INVEPT single-context of other tables", Combined, TAGGED, Old, |a| invept(a, 1, eptp(EPT2))),
    ("INVEPT all-context", Linear, TAGGED, MayNew, |a| invept(a, 2, 0)),
    ("INVEPT all-context", Physical, TAGGED, New, |a| invept(a, 2, 0)),
    ("INVEPT all-context", Physical, UNTAGGED, New, |a| invept(a, 2, 0)),
    ("INVEPT all-context", Combined, TAGGED, New, |a| invept(a, 2, 0)),
    ("INVEPT all-context", CombinedGlobal, TAGGED, New, |a| invept(a, 2, 0)),
    ("INVVPID address", Linear, TAGGED, New, |a| invvpid(a, 0, VPID, PAGE + 0x123)),
    ("INVVPID address", LinearGlobal, TAGGED, New, |a| invvpid(a, 0, VPID, PAGE + 0x123)),
    ("INVVPID address", Physical, TAGGED, MayNew, |a| invvpid(a, 0, VPID, PAGE + 0x123)),
    ("INVVPID address", Combined, TAGGED, New, |a| invvpid(a, 0, VPID, PAGE + 0x123)),
    ("INVVPID address", CombinedGlobal, TAGGED, New, |a| invvpid(a, 0, VPID, PAGE + 0x123)),
    ("INVVPID address, another page", Linear, TAGGED, Old, |a| invvpid(a, 0, VPID, PAGE + 0x2000)),
    ("INVVPID address, another page", Combined, TAGGED, Old, |a| invvpid(a, 0, VPID, PAGE + 0x2000)),
    ("INVVPID address of another VPID", Linear, TAGGED, MayNew, |a| invvpid(a, 0, OTHER_VPID, PAGE)),
    ("INVVPID address of another VPID", Combined, TAGGED, MayNew, |a| invvpid(a, 0, OTHER_VPID, PAGE)),
    ("INVVPID single-context", Linear, TAGGED, New, |a| invvpid(a, 1, VPID, 0)),
    ("INVVPID single-context", LinearGlobal, TAGGED, New, |a| invvpid(a, 1, VPID, 0)),
    ("INVVPID single-context", Physical, TAGGED, MayNew, |a| invvpid(a, 1, VPID, 0)),
    ("INVVPID single-context", Combined, TAGGED, New, |a| invvpid(a, 1, VPID, 0)),
    ("INVVPID single-context", CombinedGlobal, TAGGED, New, |a| invvpid(a, 1, VPID, 0)),
    ("INVVPID single-context of another VPID", Linear, TAGGED, Old, |a| invvpid(a, 1, OTHER_VPID, 0)),
    ("INVVPID single-context of another VPID", Combined, TAGGED, Old, |a| invvpid(a, 1, OTHER_VPID, 0)),
    ("INVVPID all-context", Linear, TAGGED, New, |a| invvpid(a, 2, 0, 0)),
    ("INVVPID all-context", LinearGlobal, TAGGED, New, |a| invvpid(a, 2, 0, 0)),
    ("INVVPID all-context", Physical, TAGGED, MayNew, |a| invvpid(a, 2, 0, 0)),
    ("INVVPID all-context", Combined, TAGGED, New, |a| invvpid(a, 2, 0, 0)),
    ("INVVPID all-context", CombinedGlobal, TAGGED, New, |a| invvpid(a, 2, 0, 0)),
    ("INVVPID retaining globals", Linear, TAGGED, New, |a| invvpid(a, 3, VPID, 0)),
    ("INVVPID retaining globals", LinearGlobal, TAGGED, MayNew, |a| invvpid(a, 3, VPID, 0)),
    ("INVVPID retaining globals", Physical, TAGGED, MayNew, |a| invvpid(a, 3, VPID, 0)),
    ("INVVPID retaining globals", Combined, TAGGED, New, |a| invvpid(a, 3, VPID, 0)),
    ("INVVPID retaining globals", CombinedGlobal, TAGGED, MayNew, |a| invvpid(a, 3, VPID, 0)),
    ("INVVPID retaining globals of another VPID", Linear, TAGGED, Old, |a| invvpid(a, 3, OTHER_VPID, 0)),
];

/// Events in the guest itself.
#[rustfmt::skip]
const INSIDE: &[(&str, Mapping, bool, Sees, Event)] = &[
    ("MOV CR3", Linear, TAGGED, New, mov_cr3),
    ("MOV CR3", Linear, UNTAGGED, New, mov_cr3),
    ("MOV CR3", Combined, TAGGED, New, mov_cr3),
    ("MOV CR3", Physical, TAGGED, MayNew, mov_cr3),
    ("INVLPG", Linear, TAGGED, New, |a| a.invlpg(byte_ptr(PAGE))),
    ("INVLPG", LinearGlobal, TAGGED, New, |a| a.invlpg(byte_ptr(PAGE))),
    ("INVLPG", Physical, TAGGED, MayNew, |a| a.invlpg(byte_ptr(PAGE))),
    ("INVLPG", Combined, TAGGED, New, |a| a.invlpg(byte_ptr(PAGE))),
    ("INVLPG", CombinedGlobal, UNTAGGED, New, |a| a.invlpg(byte_ptr(PAGE))),
    ("EPTP switching there and back", Physical, TAGGED, Old, |a| { switch(a, 1)?; switch(a, 0) }),
    ("EPTP switching there and back", Physical, UNTAGGED, Old, |a| { switch(a, 1)?; switch(a, 0) }),
    ("EPTP switching there and back", Combined, TAGGED, Old, |a| { switch(a, 1)?; switch(a, 0) }),
    ("EPTP switching there and back", CombinedGlobal, TAGGED, Old, |a| { switch(a, 1)?; switch(a, 0) }),
    ("EPTP switching", Physical, TAGGED, New, |a| switch(a, 1)),
    ("EPTP switching", Physical, UNTAGGED, New, |a| switch(a, 1)),
    ("EPTP switching", Combined, TAGGED, New, |a| switch(a, 1)),
];

/// Events between a VM exit and the entry after it, and what the hypervisor sees of its own mapping.
#[rustfmt::skip]
const HOST: &[(&str, bool, Sees, Event)] = &[
    ("entry and exit with VPID", TAGGED, Old, nothing),
    ("entry and exit without VPID", UNTAGGED, New, nothing),
    ("INVEPT single-context", TAGGED, Old, |a| invept(a, 1, eptp(EPT))),
    ("INVEPT all-context", TAGGED, Old, |a| invept(a, 2, 0)),
    ("INVVPID address", TAGGED, MayNew, |a| invvpid(a, 0, VPID, PAGE)),
    ("INVVPID single-context", TAGGED, Old, |a| invvpid(a, 1, VPID, 0)),
    ("INVVPID all-context", TAGGED, Old, |a| invvpid(a, 2, 0, 0)),
    ("INVVPID retaining globals", TAGGED, Old, |a| invvpid(a, 3, VPID, 0)),
];

/// A guest that loads from the page to RBX, leaves, lets `inside` happen, loads to RDX and leaves.
fn guest(mapping: Mapping, tagged: bool, inside: Event) -> L1 {
    let mut controls = 0;
    if mapping.ept() {
        controls |= proc2::ENABLE_EPT | proc2::ENABLE_VM_FUNCTIONS;
    }
    if tagged {
        controls |= proc2::ENABLE_VPID;
    }
    let mut fields = vec![(Field::GUEST_CR4, 0x2620 | PGE)];
    if mapping.ept() {
        fields.extend([
            (Field::VM_FUNCTION_CONTROL, vmfunc::EPTP_SWITCHING),
            (Field::EPTP_LIST_ADDRESS, LIST),
        ]);
    }
    let mut l1 = L1::new(&Setup {
        choice: VmxChoice::Max,
        proc2: controls,
        fields: &fields,
        guest: &|a| {
            a.mov(rdi, PAGE)?;
            a.mov(rbx, qword_ptr(rdi))?;
            a.vmcall()?;
            inside(a)?;
            a.mov(rdi, PAGE)?;
            a.mov(rdx, qword_ptr(rdi))?;
            a.vmcall()
        },
    });
    l1.put(LIST, eptp(EPT));
    l1.put(LIST + 8, eptp(EPT2));
    l1.put(PAGE, 1);
    l1.put(OTHER, 2);
    let global = if mapping.global() { GLOBAL } else { 0 };
    l1.put(ENTRY, PAGE | 7 | global);
    l1.run();
    assert_eq!(l1.state().gpr[3], 1);
    l1
}

/// Maps the other page.
fn remap(l1: &mut L1, mapping: Mapping) {
    if mapping == Physical {
        for root in [EPT, EPT2] {
            l1.put(ept_entry(root, PAGE), OTHER | RWX);
        }
    } else {
        let flags = l1.word(ENTRY) & 0xfff;
        l1.put(ENTRY, OTHER | flags);
    }
}

fn check(what: &str, sees: Sees, seen: u64) {
    let expected = if sees == Old { 1 } else { 2 };
    assert_eq!(seen, expected, "{what} must see {sees:?}");
}

#[test]
fn between_exit_and_entry_each_event_empties_what_the_table_says() {
    for (event, mapping, tagged, sees, emit) in BETWEEN {
        let mut l1 = guest(*mapping, *tagged, nothing);
        remap(&mut l1, *mapping);
        l1.skip();
        l1.resume_after(emit);
        assert_eq!(l1.reason(), ExitReason::VMCALL);
        let what = format!("{event}, {mapping:?}, VPID {tagged}");
        check(&what, *sees, l1.state().gpr[2]);
    }
}

#[test]
fn inside_a_guest_each_event_empties_what_the_table_says() {
    for (event, mapping, tagged, sees, emit) in INSIDE {
        // The first exit would empty an untagged TLB: the guest is stepped over it.
        let mut l1 = guest(*mapping, true, *emit);
        if !tagged {
            l1 = untagged(*mapping, *emit);
        }
        remap(&mut l1, *mapping);
        if *tagged {
            l1.skip();
            l1.resume();
        } else {
            l1.run();
        }
        assert_eq!(l1.reason(), ExitReason::VMCALL);
        let what = format!("{event}, {mapping:?}, VPID {tagged}");
        check(&what, *sees, l1.state().gpr[2]);
    }
}

/// As [`guest`], without a VPID, stopped between the first load and the event.
fn untagged(mapping: Mapping, inside: Event) -> L1 {
    let mut l1 = guest(mapping, UNTAGGED, inside);
    // Again from the start, and by single ticks up to the load; three NOPs for VMCALL.
    let vmcall = l1.field(Field::GUEST_RIP);
    l1.ram.write(vmcall, &[0x90; 3]).unwrap();
    l1.set(Field::GUEST_RIP, GUEST);
    let again = l1.resume_to(vmcall);
    assert!(again, "the guest comes by its load again");
    l1
}

#[test]
fn of_the_hypervisors_own_mappings_each_event_empties_what_the_table_says() {
    let load = |a: &mut CodeAssembler| {
        a.mov(rax, qword_ptr(PAGE))?;
        a.mov(qword_ptr(SEEN), rax)
    };
    for (event, tagged, sees, emit) in HOST {
        let mut l1 = guest(Combined, *tagged, nothing);
        l1.skip();
        l1.resume_after(&load);
        assert_eq!(l1.word(SEEN), 1);
        remap(&mut l1, Combined);
        l1.set(Field::GUEST_RIP, GUEST);
        l1.resume_after(&|a| {
            emit(a)?;
            load(a)
        });
        check(&format!("{event}, VPID {tagged}"), *sees, l1.word(SEEN));
    }
}

#[test]
fn guests_with_other_vpids_leave_each_other_what_they_have() {
    // The other one has a VPID, or none.
    for other in [OTHER_VPID, 0] {
        let mut l1 = guest(Combined, TAGGED, nothing);
        remap(&mut l1, Combined);
        let controls = l1.field(Field::SECONDARY_VM_EXEC_CONTROL);
        let first = l1.field(Field::GUEST_RIP) + 3;
        if other == 0 {
            let without = controls & !u64::from(proc2::ENABLE_VPID);
            l1.set(Field::SECONDARY_VM_EXEC_CONTROL, without);
        }
        l1.set(Field::VIRTUAL_PROCESSOR_ID, other);
        l1.set(Field::GUEST_RIP, GUEST);
        l1.resume();
        // It has cached nothing yet, and walks.
        assert_eq!(l1.state().gpr[3], 2);
        l1.set(Field::SECONDARY_VM_EXEC_CONTROL, controls);
        l1.set(Field::VIRTUAL_PROCESSOR_ID, VPID);
        l1.set(Field::GUEST_RIP, first);
        l1.resume();
        assert_eq!(l1.state().gpr[2], 1, "other VPID {other}");
    }
}

#[test]
fn pcids_of_a_guest_are_kept_apart() {
    let mut l1 = guest(Combined, TAGGED, |a| {
        // Another PCID, and back with bit 63: what the first has is kept.
        a.mov(rax, cr3)?;
        a.mov(rcx, rax)?;
        a.or(rcx, 5)?;
        a.mov(cr3, rcx)?;
        a.bts(rax, 63)?;
        a.mov(cr3, rax)
    });
    l1.set(Field::GUEST_CR4, 0x2620 | PGE | PCIDE);
    l1.set(Field::GUEST_RIP, GUEST);
    l1.resume();
    assert_eq!(l1.state().gpr[3], 1);
    remap(&mut l1, Combined);
    l1.skip();
    l1.resume();
    assert_eq!(l1.state().gpr[2], 1);
}

#[test]
fn an_ept_violation_forgets_the_page_it_is_about() {
    // The guest loads from a page that it may not write; its store leaves; the hypervisor maps another
    // page there, writable, and invalidates nothing.
    let mut l1 = L1::new(&Setup {
        choice: VmxChoice::Max,
        proc2: proc2::ENABLE_EPT | proc2::ENABLE_VPID,
        fields: &[(Field::PIN_BASED_VM_EXEC_CONTROL, u64::from(pin::DEFAULT1))],
        guest: &|a| {
            a.mov(rdi, PAGE)?;
            a.mov(rbx, qword_ptr(rdi))?;
            a.mov(qword_ptr(rdi + 8), rbx)?;
            a.mov(rdx, qword_ptr(rdi))?;
            a.vmcall()
        },
    });
    l1.put(ept_entry(EPT, PAGE), PAGE | RWX & !2);
    l1.put(PAGE, 1);
    l1.put(OTHER, 2);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::EPT_VIOLATION);
    l1.put(ept_entry(EPT, PAGE), OTHER | RWX);
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(l1.state().gpr[2], 2);
    assert_eq!((l1.word(PAGE + 8), l1.word(OTHER + 8)), (0, 1));
}
