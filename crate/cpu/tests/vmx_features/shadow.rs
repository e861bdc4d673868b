//! VMCS shadowing (Vol. 3C, "VMCS Types: Ordinary and Shadow").

use hypernest_cpu::VmxChoice;
use hypernest_vmcs::{ExitReason, Field, proc2};
use iced_x86::code_asm::{qword_ptr, r8, r9, rax, rbx, rcx, rdx};

use super::{USER, exception, setup};
use crate::support::HANDLERS;
use crate::support::hypervisor::{Emit, L1, OTHER_VMCS, PAGES, POINTERS, Setup, VMCS, VMXON};

const READS: u64 = PAGES;
const WRITES: u64 = PAGES + 0x1000;
const SEEN: u64 = PAGES + 0x2000;
const SHADOW: u64 = 1 << 31;
const ZF: u64 = 1 << 6;
const CF: u64 = 1;
/// A field that no processor has.
const NO_FIELD: u64 = 0x7ffe;

const FIELDS: [(Field, u64); 3] = [
    (Field::VMREAD_BITMAP, READS),
    (Field::VMWRITE_BITMAP, WRITES),
    (Field::VMCS_LINK_POINTER, OTHER_VMCS),
];

fn encoding(field: Field) -> u64 {
    u64::from(field.encoding())
}

fn new(choice: VmxChoice, more: &[(Field, u64)], guest: Emit) -> L1 {
    let fields: Vec<_> = FIELDS.iter().chain(more).copied().collect();
    let mut l1 = L1::new(&Setup {
        choice,
        ..setup(proc2::VMCS_SHADOWING, &fields, guest)
    });
    let revision = l1.word(OTHER_VMCS);
    l1.put(OTHER_VMCS, revision | SHADOW);
    l1
}

/// L1 works with the shadow VMCS, then comes back to that of its guest.
fn in_shadow(l1: &mut L1, emit: Emit) {
    l1.skip();
    l1.resume_after(&|a| {
        a.vmptrld(qword_ptr(POINTERS + 16))?;
        emit(a)?;
        a.vmptrld(qword_ptr(POINTERS + 8))
    });
}

/// VMREAD and VMWRITE of a natural-width field, a 16-bit one and the halves of a 64-bit one.
const GUEST: Emit = &|a| {
    a.vmcall()?;
    a.mov(rcx, encoding(Field::GUEST_RIP))?;
    a.vmread(rax, rcx)?;
    a.mov(rdx, 0x1234_5678_9abc_def0u64)?;
    a.vmwrite(rcx, rdx)?;
    a.mov(rcx, encoding(Field::GUEST_ES_SELECTOR))?;
    a.vmwrite(rcx, rdx)?;
    a.vmread(rbx, rcx)?;
    a.mov(rcx, encoding(Field::TSC_OFFSET) | 1)?;
    a.mov(rdx, 0x55u64)?;
    a.vmwrite(rcx, rdx)?;
    a.vmread(rdx, rcx)?;
    a.vmcall()?;
    a.vmcall()
};

#[test]
fn a_guest_reads_and_writes_the_shadow_vmcs_without_leaving() {
    for choice in [VmxChoice::Max, VmxChoice::Kvm] {
        let mut l1 = new(choice, &[], GUEST);
        l1.run();
        in_shadow(&mut l1, &|a| {
            a.mov(r8, encoding(Field::GUEST_RIP))?;
            a.mov(r9, 0x4444_0000_1111u64)?;
            a.vmwrite(r8, r9)
        });
        assert_eq!(l1.reason(), ExitReason::VMCALL);
        let gpr = l1.state().gpr;
        assert_eq!(gpr[0], 0x4444_0000_1111);
        assert_eq!((gpr[3], gpr[2]), (0xdef0, 0x55));
        in_shadow(&mut l1, &|a| {
            a.mov(r8, encoding(Field::GUEST_RIP))?;
            a.vmread(qword_ptr(SEEN), r8)?;
            a.mov(r8, encoding(Field::TSC_OFFSET))?;
            a.vmread(qword_ptr(SEEN + 8), r8)
        });
        assert_eq!(l1.word(SEEN), 0x1234_5678_9abc_def0);
        assert_eq!(l1.word(SEEN + 8), 0x55 << 32);
        // The guest's own VMCS is not what it wrote.
        assert_eq!(l1.field(Field::GUEST_ES_SELECTOR), 16);
        // It is a shadow VMCS after it was current, too.
        assert_eq!(l1.word(OTHER_VMCS) & SHADOW, SHADOW);
    }
}

#[test]
fn a_bit_of_a_bitmap_makes_its_instruction_exit() {
    let field = encoding(Field::GUEST_RIP);
    for (bitmap, reason) in [(READS, ExitReason::VMREAD), (WRITES, ExitReason::VMWRITE)] {
        let mut l1 = new(VmxChoice::Max, &[], GUEST);
        let bit = 1u64 << (field % 64);
        l1.put(bitmap + field / 64 * 8, bit);
        l1.run();
        l1.next();
        assert_eq!(l1.reason(), reason);
        // RAX or RDX, register operand; the field in RCX.
        let operand = if bitmap == READS { 0 } else { 2 };
        let info = 1 << 10 | operand << 3 | 1 << 28;
        assert_eq!(l1.field(Field::VMX_INSTRUCTION_INFO), info);
    }
}

#[test]
fn an_encoding_of_more_than_15_bits_exits() {
    let mut l1 = new(VmxChoice::Max, &[], &|a| {
        a.mov(rcx, 0x8000u64)?;
        a.vmread(rax, rcx)
    });
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMREAD);
}

#[test]
fn what_fails_is_told_in_flags_and_the_vmcs_of_the_guest() {
    let guest: Emit = &|a| {
        a.mov(rcx, NO_FIELD)?;
        a.vmread(rax, rcx)?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.vmcall()
    };
    let mut l1 = new(VmxChoice::Max, &[], guest);
    l1.run();
    assert_eq!(l1.state().gpr[3] & (ZF | CF), ZF);
    assert_eq!(l1.field(Field::VM_INSTRUCTION_ERROR), 12);
    // Without a VMCS to reach, there is no number either.
    let mut l1 = new(VmxChoice::Max, &[(Field::VMCS_LINK_POINTER, !0)], guest);
    l1.run();
    assert_eq!(l1.state().gpr[3] & (ZF | CF), CF);
}

#[test]
fn user_code_may_not() {
    let mut l1 = new(VmxChoice::Max, &USER, &|a| {
        a.mov(rcx, encoding(Field::GUEST_RIP))?;
        a.vmread(rax, rcx)
    });
    l1.run();
    assert_eq!(exception(&l1), (13, 0));
    // The exit comes before that.
    let mut l1 = new(VmxChoice::Max, &USER, &|a| {
        a.mov(rcx, 0x8000u64)?;
        a.vmwrite(rcx, rax)
    });
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMWRITE);
}

#[test]
fn a_shadow_vmcs_can_be_current_but_not_entered() {
    let mut l1 = new(VmxChoice::Max, &[], GUEST);
    l1.run();
    in_shadow(&mut l1, &|a| {
        a.pushfq()?;
        a.pop(qword_ptr(SEEN))?;
        a.vmlaunch()?;
        a.pushfq()?;
        a.pop(qword_ptr(SEEN + 8))
    });
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(l1.word(SEEN) & (ZF | CF), 0);
    assert_eq!(l1.word(SEEN + 8) & (ZF | CF), CF);
}

#[test]
fn a_vmxon_region_is_no_shadow_vmcs() {
    let mut l1 = L1::new(&setup(0, &[], GUEST));
    let revision = l1.word(VMXON);
    l1.put(VMXON, revision | SHADOW);
    l1.run();
    // VMXON has failed, so that VMCLEAR does not exist.
    assert!(l1.state().vmx.region.is_none());
    assert_eq!((l1.state().rip - HANDLERS) / 16, 6);
}

#[test]
fn that_the_current_vmcs_is_a_shadow_is_saved() {
    let mut l1 = new(VmxChoice::Max, &[], GUEST);
    l1.run();
    l1.skip();
    l1.resume_after(&|a| {
        a.vmptrld(qword_ptr(POINTERS + 16))?;
        a.hlt()
    });
    let saved = l1.state();
    assert!(saved.vmx.shadow && saved.vmx.current == Some(OTHER_VMCS));
    l1.processor.write_state(0, &saved).unwrap();
    assert_eq!(l1.state(), saved);
}

#[test]
fn the_link_pointer_must_name_a_shadow_vmcs() {
    let failure = (
        u64::from(ExitReason::ENTRY_FAILURE_GUEST_STATE.0) | 1 << 31,
        4,
    );
    let mut l1 = new(VmxChoice::Max, &[], GUEST);
    let revision = l1.word(OTHER_VMCS) & !SHADOW;
    l1.put(OTHER_VMCS, revision);
    l1.run();
    assert_eq!(l1.exit(), failure);
    // Its own VMCS is none.
    let mut l1 = new(VmxChoice::Max, &[(Field::VMCS_LINK_POINTER, VMCS)], GUEST);
    l1.run();
    assert_eq!(l1.exit(), failure);
    // Without shadowing, it must not.
    let fields = [(Field::VMCS_LINK_POINTER, OTHER_VMCS)];
    let mut l1 = L1::new(&setup(0, &fields, GUEST));
    l1.put(OTHER_VMCS, revision | SHADOW);
    l1.run();
    assert_eq!(l1.exit(), failure);
}
