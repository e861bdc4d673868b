//! What empties the TLB: one row per event and kind of mapping (Vol. 3A, "Operations that
//! Invalidate TLBs and Paging-Structure Caches"). `docs/TLB.md` is the same table for people.
//!
//! Each row loads from a page, maps another page there, lets the event happen and loads again.

mod support;

use hypernest_cpu::{Stop, VcpuState};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, byte_ptr, cr0, cr3, cr4, dword_ptr, eax, ecx, edx, qword_ptr, r9, rax, rbx, rdi,
    rsi, xmmword_ptr,
};
use support::{CODE, DATA, Nothing, machine};

/// The page under test, and where else it may be mapped to.
const PAGE: u64 = DATA;
const OTHER: u64 = DATA + 0x1000;
/// Its page-table entry, in the table of [`support::long_mode`].
const ENTRY: u64 = 0x4000 + 8 * (PAGE >> 12);
/// A descriptor for INVPCID.
const DESCRIPTOR: u64 = DATA + 0x4000;

const PGE: i32 = 1 << 7;
const PCIDE: i32 = 1 << 17;
const SMEP: i32 = 1 << 20;
const GLOBAL: u64 = 1 << 8;

/// How the page is mapped while it is cached.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Mapping {
    Local,
    Global,
}
use Mapping::{Global, Local};

/// What the second load must see.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Sees {
    /// The new mapping: the event must invalidate.
    New,
    /// The old one: the event does not invalidate, and we make use of it.
    Old,
}
use Sees::{New, Old};

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn nothing(_: &mut CodeAssembler) -> Result<(), IcedError> {
    Ok(())
}

fn mov_cr3(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, cr3)?;
    a.mov(cr3, rax)
}

fn enable_pcid(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, cr4)?;
    a.or(eax, PCIDE)?;
    a.mov(cr4, rax)
}

/// MOV to CR3 with this PCID, and bit 63 if `keep`.
fn switch(a: &mut CodeAssembler, pcid: u64, keep: bool) -> Result<(), IcedError> {
    a.mov(rax, 0x1000 | pcid | u64::from(keep) << 63)?;
    a.mov(cr3, rax)
}

fn toggle_cr4(a: &mut CodeAssembler, bit: i32) -> Result<(), IcedError> {
    a.mov(rax, cr4)?;
    a.xor(eax, bit)?;
    a.mov(cr4, rax)
}

fn invpcid(a: &mut CodeAssembler, kind: u64, pcid: u64, linear: u64) -> Result<(), IcedError> {
    a.mov(rsi, DESCRIPTOR)?;
    a.mov(rax, pcid)?;
    a.mov(qword_ptr(rsi), rax)?;
    a.mov(rax, linear)?;
    a.mov(qword_ptr(rsi + 8), rax)?;
    a.mov(rax, kind)?;
    a.invpcid(rax, xmmword_ptr(rsi))
}

/// Event, mapping, what must be seen, set-up before the first load, the event.
#[rustfmt::skip]
const ROWS: &[(&str, Mapping, Sees, Emit, Emit)] = &[
    ("nothing", Local, Old, nothing, nothing),
    ("nothing", Global, Old, nothing, nothing),
    ("MOV CR3", Local, New, nothing, mov_cr3),
    ("MOV CR3, PCID on", Local, New, enable_pcid, |a| switch(a, 0, false)),
    ("MOV CR3, PCID on, bit 63", Local, Old, enable_pcid, |a| switch(a, 0, true)),
    ("MOV CR3 to another PCID and back, bit 63", Local, Old, enable_pcid, |a| { switch(a, 5, false)?; switch(a, 0, true) }),
    ("MOV CR3 to another PCID", Local, New, enable_pcid, |a| switch(a, 5, false)),
    ("MOV CR4.PGE off", Local, New, nothing, |a| toggle_cr4(a, PGE)),
    ("MOV CR4.PGE off", Global, New, nothing, |a| toggle_cr4(a, PGE)),
    ("MOV CR4.PGE off and on", Global, New, nothing, |a| { toggle_cr4(a, PGE)?; toggle_cr4(a, PGE) }),
    ("MOV CR4.PCIDE off", Local, New, enable_pcid, |a| toggle_cr4(a, PCIDE)),
    ("MOV CR4.PCIDE off", Global, New, enable_pcid, |a| toggle_cr4(a, PCIDE)),
    ("MOV CR4.SMEP on", Local, New, nothing, |a| toggle_cr4(a, SMEP)),
    ("MOV CR4.SMEP on", Global, New, nothing, |a| toggle_cr4(a, SMEP)),
    ("MOV CR0.WP off and on", Local, New, nothing, |a| { a.mov(rax, cr0)?; a.btr(eax, 16)?; a.mov(cr0, rax)?; a.bts(eax, 16)?; a.mov(cr0, rax) }),
    ("WRMSR EFER.NXE off", Local, New, nothing, |a| { a.mov(ecx, 0xc000_0080u32)?; a.rdmsr()?; a.btr(eax, 11)?; a.xor(edx, edx)?; a.wrmsr() }),
    ("INVLPG", Local, New, nothing, |a| { a.mov(r9, PAGE + 0x123)?; a.invlpg(byte_ptr(r9)) }),
    ("INVLPG", Global, New, nothing, |a| { a.mov(r9, PAGE + 0x123)?; a.invlpg(byte_ptr(r9)) }),
    ("INVLPG of another page", Local, Old, nothing, |a| { a.mov(r9, PAGE + 0x2000)?; a.invlpg(byte_ptr(r9)) }),
    ("INVPCID address", Local, New, enable_pcid, |a| invpcid(a, 0, 0, PAGE)),
    ("INVPCID address of another PCID", Local, Old, enable_pcid, |a| invpcid(a, 0, 7, PAGE + 0x2000)),
    ("INVPCID context", Local, New, enable_pcid, |a| invpcid(a, 1, 0, 0)),
    ("INVPCID context of another PCID", Local, Old, enable_pcid, |a| invpcid(a, 1, 7, 0)),
    ("INVPCID all, globals too", Local, New, enable_pcid, |a| invpcid(a, 2, 0, 0)),
    ("INVPCID all, globals too", Global, New, enable_pcid, |a| invpcid(a, 2, 0, 0)),
    ("INVPCID all but globals", Local, New, enable_pcid, |a| invpcid(a, 3, 0, 0)),
];

fn run(mapping: Mapping, before: Emit, event: Emit) -> VcpuState {
    let flags = 7 | if mapping == Global { GLOBAL } else { 0 };
    let mut a = CodeAssembler::new(64).unwrap();
    let build = |a: &mut CodeAssembler| -> Result<(), IcedError> {
        toggle_cr4(a, PGE)?;
        before(a)?;
        a.mov(rdi, PAGE)?;
        a.mov(eax, dword_ptr(rdi))?;
        a.mov(rsi, ENTRY)?;
        a.mov(rbx, OTHER | flags)?;
        a.mov(qword_ptr(rsi), rbx)?;
        event(a)?;
        a.mov(rdi, PAGE)?;
        a.mov(ecx, dword_ptr(rdi))?;
        a.hlt()
    };
    build(&mut a).unwrap();
    let (mut processor, mut ram) = machine(64, &a.assemble(CODE).unwrap());
    ram.write(PAGE, &[1]).unwrap();
    ram.write(OTHER, &[2]).unwrap();
    for page in [CODE, support::HANDLERS] {
        // Supervisor pages, so that SMEP lets them execute.
        ram.write(0x4000 + 8 * (page >> 12), &(page | 3).to_le_bytes())
            .unwrap();
    }
    ram.write(ENTRY, &(PAGE | flags).to_le_bytes()).unwrap();
    assert_eq!(processor.run(&mut ram, &mut Nothing, u64::MAX), Stop::Idle);
    processor.read_state(0)
}

#[test]
fn each_event_empties_what_the_table_says() {
    for (event, mapping, sees, before, emit) in ROWS {
        let state = run(*mapping, *before, *emit);
        assert!(
            !(support::HANDLERS..support::HANDLERS + 0x1000).contains(&state.rip),
            "{event}, {mapping:?}: exception {}",
            (state.rip - support::HANDLERS) / 16
        );
        let expected = if *sees == New { 2 } else { 1 };
        assert_eq!(
            state.gpr[1], expected,
            "{event}, {mapping:?} must see {sees:?}"
        );
    }
}

#[test]
fn a_page_fault_forgets_the_entry_that_caused_it() {
    // A read-only mapping is cached by a load, made writable, and stored to: no fault may come of
    // the stale entry (Vol. 3A, "Page faults invalidate").
    let mut a = CodeAssembler::new(64).unwrap();
    let build = |a: &mut CodeAssembler| -> Result<(), IcedError> {
        a.mov(rdi, PAGE)?;
        a.mov(eax, dword_ptr(rdi))?;
        a.mov(rsi, ENTRY)?;
        a.mov(rbx, PAGE | 7)?;
        a.mov(qword_ptr(rsi), rbx)?;
        a.mov(dword_ptr(rdi), 9)?;
        a.hlt()
    };
    build(&mut a).unwrap();
    let (mut processor, mut ram) = machine(64, &a.assemble(CODE).unwrap());
    ram.write(ENTRY, &(PAGE | 5).to_le_bytes()).unwrap();
    assert_eq!(processor.run(&mut ram, &mut Nothing, u64::MAX), Stop::Idle);
    assert_eq!(ram.load::<1>(PAGE).unwrap(), [9]);
}

#[test]
fn a_page_fault_forgets_the_page_for_every_kind_of_access() {
    // Under SMAP a user page is cached by a load with EFLAGS.AC set and mapped elsewhere; a load without
    // AC faults; the handler's load, with AC again, must not see the stale entry.
    const SMAP: i32 = 1 << 21;
    const PF: u64 = support::HANDLERS + 16 * 14;
    let mut a = CodeAssembler::new(64).unwrap();
    let build = |a: &mut CodeAssembler| -> Result<(), IcedError> {
        toggle_cr4(a, SMAP)?;
        a.stac()?;
        a.mov(rdi, PAGE)?;
        a.mov(eax, dword_ptr(rdi))?;
        a.mov(rsi, ENTRY)?;
        a.mov(rbx, OTHER | 7)?;
        a.mov(qword_ptr(rsi), rbx)?;
        a.clac()?;
        a.mov(eax, dword_ptr(rdi))
    };
    build(&mut a).unwrap();
    let (mut processor, mut ram) = machine(64, &a.assemble(CODE).unwrap());
    // Stack, IDT and GDT are the supervisor's.
    for page in [0x6000, 0x8000, 0x9000] {
        ram.write(0x4000 + 8 * (page >> 12), &(page | 3).to_le_bytes())
            .unwrap();
    }
    let mut handler = CodeAssembler::new(64).unwrap();
    handler.stac().unwrap();
    handler.mov(ecx, dword_ptr(rdi)).unwrap();
    handler.hlt().unwrap();
    ram.write(PF, &handler.assemble(PF).unwrap()).unwrap();
    ram.write(PAGE, &[1]).unwrap();
    ram.write(OTHER, &[2]).unwrap();
    assert_eq!(processor.run(&mut ram, &mut Nothing, u64::MAX), Stop::Idle);
    let state = processor.read_state(0);
    assert_eq!((state.rip - PF, state.gpr[0], state.gpr[1]), (6, 1, 2));
}
