//! The hypervisor of `hypervisor.rs` with an enlightened VMCS: fields are read and written in its page.

use hypernest_cpu::{EventKinds, EventRequest, Happening, Model};
use hypernest_vmcs::Field;
use hypernest_vmcs::enlightened::{self, Page, SIZE};
use iced_x86::code_asm::{eax, ecx, edx, qword_ptr};

use super::CODE;
use super::hypervisor::{Emit, L1, POINTERS, Setup, assemble};

/// The enlightened VMCS, and another one.
pub const EVMCS: u64 = 0x5_8000;
pub const OTHER_EVMCS: u64 = 0x5_9000;
/// The VP assist page.
pub const ASSIST: u64 = 0x5_a000;
pub const PARTITION_ASSIST: u64 = 0x5_b000;
/// In the VP assist page: features of nested control, whether entries are enlightened, the pointer.
pub const NESTED_FEATURES: u64 = ASSIST + 32;
pub const ENLIGHTEN: u64 = ASSIST + 40;
pub const CURRENT: u64 = ASSIST + 48;

/// A hypervisor with the page of [`EVMCS`] filled, about to start its guest.
pub fn new(setup: &Setup) -> L1 {
    let profile = setup.choice.profile(<&Model>::default());
    let mut l1 = L1::on(setup, profile.unwrap().unwrap(), true);
    for at in [EVMCS, OTHER_EVMCS] {
        fill(&mut l1, at);
    }
    l1.put(ENLIGHTEN, 1);
    l1.put(CURRENT, EVMCS);
    l1.ram.write(CODE, &launcher()).unwrap();
    let events = EventRequest {
        kinds: EventKinds::ALL,
        capacity: 1000,
        ..EventRequest::default()
    };
    l1.processor.request_events(&events).unwrap();
    l1
}

/// As [`new`], and runs to the first VM exit.
pub fn start(setup: &Setup) -> L1 {
    let mut l1 = new(setup);
    l1.run();
    l1
}

fn fill(l1: &mut L1, at: u64) {
    l1.ram.write(at, &[0; 4096]).unwrap();
    l1.put(at, u64::from(enlightened::VERSION));
    for (field, value) in l1.fields.clone() {
        poke_at(l1, at, field, value);
    }
}

pub fn page(l1: &L1) -> Page {
    let mut page = [0; SIZE];
    l1.ram.read(EVMCS, &mut page).unwrap();
    page
}

/// A field as the page has it.
pub fn peek(l1: &L1, field: Field) -> u64 {
    let slot = enlightened::slot(field).unwrap();
    let mut bytes = [0; 8];
    let at = EVMCS + u64::from(slot.offset);
    let width = usize::from(slot.width);
    l1.ram.read(at, &mut bytes[..width]).unwrap();
    u64::from_le_bytes(bytes)
}

pub fn poke_at(l1: &mut L1, page: u64, field: Field, value: u64) {
    let slot = enlightened::slot(field).unwrap();
    let at = page + u64::from(slot.offset);
    let bytes = &value.to_le_bytes()[..usize::from(slot.width)];
    l1.ram.write(at, bytes).unwrap();
}

/// Changes a field in the page, and nothing about its group.
pub fn poke(l1: &mut L1, field: Field, value: u64) {
    poke_at(l1, EVMCS, field, value);
}

pub fn set_clean(l1: &mut L1, clean: u32) {
    let mut page = page(l1);
    enlightened::set_clean_fields(&mut page, clean);
    l1.ram.write(EVMCS, &page).unwrap();
}

pub fn set_enlightenments(l1: &mut L1, value: &enlightened::Enlightenments) {
    let mut page = page(l1);
    enlightened::set_enlightenments(&mut page, value);
    l1.ram.write(EVMCS, &page).unwrap();
}

/// The guest goes on behind its instruction, up to the next exit, after L1 has executed `emit`.
pub fn next_after(l1: &mut L1, emit: Emit) {
    let rip = peek(l1, Field::GUEST_RIP) + peek(l1, Field::VM_EXIT_INSTRUCTION_LEN);
    poke(l1, Field::GUEST_RIP, rip);
    l1.resume_after(emit);
}

pub fn next(l1: &mut L1) {
    next_after(l1, &|_| Ok(()));
}

/// Clean fields of the entries since this was last asked, failed ones left out.
pub fn entries(l1: &mut L1) -> Vec<(u64, u32)> {
    let events = l1.processor.take_events().into_iter();
    events
        .filter_map(|event| match event.what {
            Happening::VmEntry(entry) if entry.failure.is_none() => entry.enlightened,
            _ => None,
        })
        .map(|entry| (entry.address, entry.clean))
        .collect()
}

/// Says who it is, enables the VP assist page, VMXON, VMLAUNCH. What follows a failed entry is HLT.
fn launcher() -> Vec<u8> {
    assemble(CODE, &|a| {
        let registers = [
            (0x3a, 5),
            (0x4000_0000, 0x1234),
            (0x4000_0073, ASSIST as i32 | 1),
        ];
        for (number, value) in registers {
            a.mov(ecx, number)?;
            a.mov(eax, value)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
        }
        a.vmxon(qword_ptr(POINTERS))?;
        a.vmlaunch()?;
        a.hlt()
    })
}
