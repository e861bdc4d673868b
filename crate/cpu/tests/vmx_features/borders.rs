//! Where a VMCS passes between the processor and memory: which layout is read, which is written, and what
//! becomes of the VMCS that was current. A test for each border.

use std::sync::Arc;

use hypernest_cpu::{
    Activity, Model, Processor, ProcessorConfig, VcpuState, VmxChoice, VmxProfile,
};
use hypernest_vmcs::{ExitReason, Field, Layout, Vmcs, proc2};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, ecx, qword_ptr, r8, r9, rax, rdx};

use super::{layouts, setup};
use crate::support::hypervisor::{Emit, L1, OTHER_VMCS, PAGES, POINTERS, VMCS, VMXON};
use crate::support::{HANDLERS, Nothing};

const SEEN: u64 = PAGES + 0x2000;
const SHADOW: u32 = 1 << 31;
const ZF: u64 = 1 << 6;
const CF: u64 = 1;

const GUEST: Emit = &|a| {
    a.vmcall()?;
    a.vmcall()?;
    a.vmcall()?;
    a.vmcall()
};

fn named(name: &str) -> &'static Layout {
    Layout::named(name).unwrap()
}

/// Old regions in memory, new ones written.
fn upgrading() -> Arc<VmxProfile> {
    layouts(
        &VmxChoice::Max,
        "kvm-3.10",
        "hypernest-evmcs",
        &["virtualbox"],
    )
}

/// L1 on it, after the first exit of its guest.
fn started() -> L1 {
    let mut l1 = L1::with(&setup(0, &[], GUEST), upgrading());
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    l1.skip();
    l1
}

fn region(l1: &L1, at: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    l1.ram.read(at, &mut bytes).unwrap();
    bytes
}

/// Revision identifier, with the shadow indicator.
fn revision(l1: &L1, at: u64) -> u32 {
    l1.word(at) as u32
}

/// What is in a region, read in this layout.
fn read(l1: &L1, at: u64, layout: &str) -> Vmcs {
    named(layout).read(&region(l1, at)).unwrap()
}

fn write(l1: &mut L1, at: u64, layout: &str, vmcs: &Vmcs) {
    let mut bytes = vec![0; 4096];
    named(layout).write(vmcs, &mut bytes).unwrap();
    l1.ram.write(at, &bytes).unwrap();
}

/// The flags go to `SEEN` + 8 `n`.
fn note_flags(a: &mut CodeAssembler, n: u64) -> Result<(), IcedError> {
    a.pushfq()?;
    a.pop(qword_ptr(SEEN + 8 * n))
}

fn note_field(a: &mut CodeAssembler, field: Field, n: u64) -> Result<(), IcedError> {
    a.mov(r8, u64::from(field.encoding()))?;
    a.vmread(qword_ptr(SEEN + 8 * n), r8)
}

fn seen(l1: &L1, n: u64) -> u64 {
    l1.word(SEEN + 8 * n)
}

#[test]
fn what_is_advertised_is_what_l1_stamps_and_every_layout_limits_the_controls() {
    let profile = upgrading();
    assert_eq!(profile.caps.revision(), named("kvm-3.10").revision());
    let whole = VmxChoice::Max
        .profile(<&Model>::default())
        .unwrap()
        .unwrap();
    assert!(whole.caps.allows_proc2(proc2::ENABLE_PML));
    assert!(!profile.caps.allows_proc2(proc2::ENABLE_PML));
    assert!(profile.caps.allows_proc2(proc2::ENABLE_EPT));
    for field in profile.fields().iter() {
        assert!(
            profile.accepted().all(|layout| layout.holds(field)),
            "{field:?}"
        );
    }
    // VMREAD and VMWRITE of a field without a slot.
    let mut l1 = started();
    l1.resume_after(&|a| {
        a.mov(r8, u64::from(Field::PML_ADDRESS.encoding()))?;
        a.vmread(r9, r8)?;
        note_flags(a, 0)?;
        note_field(a, Field::VM_INSTRUCTION_ERROR, 1)?;
        a.mov(r8, u64::from(Field::PML_ADDRESS.encoding()))?;
        a.vmwrite(r8, r9)?;
        note_flags(a, 2)?;
        a.mov(ecx, 0x480)?;
        a.push(rax)?;
        a.push(rdx)?;
        a.rdmsr()?;
        a.mov(qword_ptr(SEEN + 24), rax)?;
        a.pop(rdx)?;
        a.pop(rax)
    });
    assert_eq!((seen(&l1, 0) & (ZF | CF), seen(&l1, 1)), (ZF, 12));
    assert_eq!(seen(&l1, 2) & (ZF | CF), ZF);
    assert_eq!(seen(&l1, 3) as u32, named("kvm-3.10").revision());
}

#[test]
fn vmptrld_of_the_current_vmcs_reads_nothing() {
    let mut l1 = started();
    let rsp = l1.field(Field::HOST_RSP);
    l1.put(VMCS, 0x7777);
    l1.resume_after(&|a| {
        a.vmptrld(qword_ptr(POINTERS + 8))?;
        note_flags(a, 0)?;
        note_field(a, Field::HOST_RSP, 1)
    });
    assert_eq!((seen(&l1, 0) & (ZF | CF), seen(&l1, 1)), (0, rsp));
    assert_eq!(revision(&l1, VMCS), 0x7777, "and writes nothing");
}

#[test]
fn vmptrld_of_an_unaccepted_revision_fails_and_the_current_vmcs_stays_current() {
    for id in [
        0,
        0x7777,
        named("hypernest").revision(),
        named("bochs").revision(),
    ] {
        let mut l1 = started();
        l1.put(OTHER_VMCS, id.into());
        let (before, other) = (region(&l1, VMCS), region(&l1, OTHER_VMCS));
        l1.resume_after(&|a| {
            a.vmptrld(qword_ptr(POINTERS + 16))?;
            note_flags(a, 0)?;
            note_field(a, Field::VM_INSTRUCTION_ERROR, 1)?;
            a.vmptrst(qword_ptr(SEEN + 16))
        });
        assert_eq!((seen(&l1, 0) & (ZF | CF), seen(&l1, 1)), (ZF, 11));
        assert_eq!(seen(&l1, 2), VMCS);
        assert_eq!(l1.reason(), ExitReason::VMCALL, "its guest goes on");
        assert!(region(&l1, VMCS) == before && region(&l1, OTHER_VMCS) == other);
    }
}

#[test]
fn vmptrld_of_another_writes_the_current_one_in_the_written_layout() {
    let mut l1 = started();
    let rip = l1.field(Field::GUEST_RIP);
    l1.resume_after(&|a| {
        a.vmptrld(qword_ptr(POINTERS + 16))?;
        note_field(a, Field::GUEST_RIP, 0)?;
        a.vmptrld(qword_ptr(POINTERS + 8))
    });
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(seen(&l1, 0), 0, "a fresh region is empty");
    for at in [VMCS, OTHER_VMCS] {
        assert_eq!(revision(&l1, at), named("hypernest-evmcs").revision());
    }
    let vmcs = read(&l1, VMCS, "hypernest-evmcs");
    assert!(vmcs.launched && vmcs.get(Field::GUEST_RIP) == rip);
}

#[test]
fn a_region_of_each_accepted_layout_is_loaded_field_by_field() {
    for layout in ["kvm-3.10", "virtualbox", "hypernest-evmcs"] {
        let mut l1 = started();
        let mut vmcs = Vmcs::new();
        vmcs.set(Field::GUEST_RIP, 0x1234_5678_9abc);
        vmcs.set(Field::GUEST_CS_AR_BYTES, 0xa09b);
        vmcs.set(Field::GUEST_TR_SELECTOR, 0x18);
        write(&mut l1, OTHER_VMCS, layout, &vmcs);
        l1.resume_after(&|a| {
            a.vmptrld(qword_ptr(POINTERS + 16))?;
            note_flags(a, 0)?;
            note_field(a, Field::GUEST_RIP, 1)?;
            note_field(a, Field::GUEST_CS_AR_BYTES, 2)?;
            note_field(a, Field::GUEST_TR_SELECTOR, 3)?;
            a.vmptrld(qword_ptr(POINTERS + 8))
        });
        assert_eq!(seen(&l1, 0) & (ZF | CF), 0, "{layout}");
        let fields = [seen(&l1, 1), seen(&l1, 2), seen(&l1, 3)];
        assert_eq!(fields, [0x1234_5678_9abc, 0xa09b, 0x18], "{layout}");
        assert_eq!(read(&l1, OTHER_VMCS, "hypernest-evmcs"), vmcs, "{layout}");
    }
}

#[test]
fn vmclear_of_the_current_vmcs_writes_it_as_clear_and_leaves_none() {
    let mut l1 = started();
    let rip = l1.field(Field::GUEST_RIP);
    // Bytes of the old layout do not survive among those of the new.
    l1.ram.write(VMCS + 8, &[0xa5; 4088]).unwrap();
    l1.put(OTHER_VMCS, named("kvm-3.10").revision().into());
    l1.resume_after(&|a| {
        a.vmclear(qword_ptr(POINTERS + 8))?;
        a.vmptrst(qword_ptr(SEEN))?;
        a.hlt()
    });
    assert_eq!(seen(&l1, 0), !0);
    assert_eq!(l1.state().vmx.current, None);
    let vmcs = read(&l1, VMCS, "hypernest-evmcs");
    assert!(!vmcs.launched && vmcs.get(Field::GUEST_RIP) == rip);
    let used = named("hypernest-evmcs").used();
    assert!(region(&l1, VMCS)[used..].iter().all(|&byte| byte == 0));
}

#[test]
fn vmclear_of_another_changes_the_launch_state_where_its_layout_has_it() {
    for layout in ["kvm-3.10", "virtualbox", "hypernest-evmcs"] {
        let mut l1 = started();
        let mut vmcs = Vmcs::new();
        vmcs.launched = true;
        vmcs.set(Field::GUEST_RIP, 0x1000);
        write(&mut l1, OTHER_VMCS, layout, &vmcs);
        l1.resume_after(&|a| a.vmclear(qword_ptr(POINTERS + 16)));
        assert_eq!(l1.state().vmx.current, Some(VMCS));
        vmcs.launched = false;
        assert_eq!(read(&l1, OTHER_VMCS, layout), vmcs, "{layout}");
    }
    let mut l1 = started();
    l1.ram.write(OTHER_VMCS, &[0x5a; 4096]).unwrap();
    l1.resume_after(&|a| {
        a.vmclear(qword_ptr(POINTERS + 16))?;
        note_flags(a, 0)
    });
    assert_eq!(seen(&l1, 0) & (ZF | CF), 0);
    assert!(region(&l1, OTHER_VMCS).iter().all(|&byte| byte == 0x5a));
}

#[test]
fn vmxoff_writes_the_current_vmcs() {
    let mut l1 = started();
    let rip = l1.field(Field::GUEST_RIP);
    l1.resume_after(&|a| {
        a.vmxoff()?;
        a.hlt()
    });
    let vmx = l1.state().vmx;
    assert_eq!((vmx.region, vmx.current), (None, None));
    let vmcs = read(&l1, VMCS, "hypernest-evmcs");
    assert!(vmcs.launched && vmcs.get(Field::GUEST_RIP) == rip);
}

#[test]
fn vmxon_takes_every_accepted_revision_and_no_other() {
    for (id, works) in [
        (named("kvm-3.10").revision(), true),
        (named("virtualbox").revision(), true),
        (named("hypernest-evmcs").revision(), true),
        (named("hypernest").revision(), false),
    ] {
        let mut l1 = L1::with(&setup(0, &[], GUEST), upgrading());
        l1.put(VMXON, id.into());
        l1.run();
        assert_eq!(l1.state().vmx.region.is_some(), works);
        if !works {
            // VMCLEAR does not exist.
            assert_eq!((l1.state().rip - HANDLERS) / 16, 6);
        }
    }
}

#[test]
fn a_shadow_vmcs_is_reached_by_the_layout_that_it_has() {
    let profile = layouts(&VmxChoice::Max, "kvm", "hypernest-evmcs", &["virtualbox"]);
    let fields = [
        (Field::VMREAD_BITMAP, PAGES),
        (Field::VMWRITE_BITMAP, PAGES),
        (Field::VMCS_LINK_POINTER, OTHER_VMCS),
    ];
    let rip = u64::from(Field::GUEST_RIP.encoding());
    let guest: Emit = &|a| {
        a.mov(r8, rip)?;
        a.vmread(r9, r8)?;
        a.add(r9, 1)?;
        a.vmwrite(r8, r9)?;
        a.vmcall()?;
        a.vmread(r9, r8)?;
        a.vmcall()
    };
    for layout in ["kvm", "virtualbox", "hypernest-evmcs"] {
        let mut l1 = L1::with(
            &setup(proc2::VMCS_SHADOWING, &fields, guest),
            profile.clone(),
        );
        let mut vmcs = Vmcs::new();
        vmcs.shadow = true;
        vmcs.set(Field::GUEST_RIP, 0x4444_0000);
        write(&mut l1, OTHER_VMCS, layout, &vmcs);
        l1.run();
        assert_eq!(l1.reason(), ExitReason::VMCALL, "{layout}");
        vmcs.set(Field::GUEST_RIP, 0x4444_0001);
        assert_eq!(read(&l1, OTHER_VMCS, layout), vmcs, "it stays {layout}");
        // L1 makes it current for a moment: it changes over.
        l1.skip();
        l1.resume_after(&|a| {
            a.vmptrld(qword_ptr(POINTERS + 16))?;
            a.vmptrld(qword_ptr(POINTERS + 8))
        });
        assert_eq!(l1.reason(), ExitReason::VMCALL);
        assert_eq!(l1.state().gpr[9], 0x4444_0001);
        assert_eq!(read(&l1, OTHER_VMCS, "hypernest-evmcs"), vmcs);
        assert_eq!(revision(&l1, OTHER_VMCS) & SHADOW, SHADOW);
    }
}

#[test]
fn getting_the_nested_state_changes_nothing_and_gives_the_written_layout() {
    let mut l1 = started();
    let (state, memory) = (l1.state(), l1.ram.bytes().to_vec());
    let nested = l1.processor.nested_state(0, &l1.ram);
    assert_eq!((nested.vmxon, nested.vmcs, nested.flags), (VMXON, VMCS, 0));
    let image = named("hypernest-evmcs")
        .read(nested.image().unwrap())
        .unwrap();
    assert!(image.launched);
    assert_eq!(image.get(Field::HOST_RSP), l1.field(Field::HOST_RSP));
    assert!(l1.state() == state && l1.ram.bytes() == memory);
}

#[test]
fn setting_the_nested_state_forgets_the_current_vmcs() {
    let mut l1 = started();
    let blob = l1.processor.nested_state(0, &l1.ram).to_bytes();
    let fields = l1.state().vmx.fields;
    l1.put(OTHER_VMCS, named("kvm-3.10").revision().into());
    l1.resume_after(&|a| {
        a.vmptrld(qword_ptr(POINTERS + 16))?;
        a.hlt()
    });
    assert_eq!(l1.state().vmx.current, Some(OTHER_VMCS));
    let memory = l1.ram.bytes().to_vec();
    l1.processor
        .set_nested_state(0, &mut l1.ram, &blob)
        .unwrap();
    let vmx = l1.state().vmx;
    assert_eq!((vmx.current, vmx.fields), (Some(VMCS), fields));
    assert!(l1.ram.bytes() == memory);
}

#[test]
fn init_waits_in_root_operation_and_is_an_exit_in_a_guest() {
    let mut l1 = started();
    l1.change(|state| state.apic.init_pending = true);
    let memory = region(&l1, VMCS);
    l1.resume();
    // Root operation has ended, and the guest has not executed an instruction.
    assert_eq!(l1.reason(), ExitReason::INIT);
    assert_eq!(l1.state().vmx.current, Some(VMCS));
    assert!(region(&l1, VMCS) == memory);
    // Outside of VMX operation there is no current VMCS left.
    l1.resume_after(&|a| {
        a.vmxoff()?;
        a.hlt()
    });
    l1.change(|state| state.apic.init_pending = true);
    let memory = region(&l1, VMCS);
    l1.tick();
    assert_eq!((l1.state().vmx.current, l1.state().cr0 & 1), (None, 0));
    assert!(region(&l1, VMCS) == memory);
}

#[test]
fn a_reset_forgets_the_current_vmcs() {
    let mut l1 = started();
    let memory = l1.ram.bytes().to_vec();
    let reset = VcpuState::reset(0, <&Model>::default());
    l1.processor.write_state(0, &reset).unwrap();
    assert_eq!(l1.state().vmx.current, None);
    assert_eq!(l1.state().activity, Activity::Active);
    assert!(l1.ram.bytes() == memory);
}

#[test]
fn a_saved_state_keeps_the_current_vmcs_as_values() {
    let mut l1 = started();
    let (state, memory) = (l1.state(), l1.ram.bytes().to_vec());
    // Another processor, with another written layout, goes on from it.
    l1.processor = Processor::new(&ProcessorConfig {
        vmx: Some(layouts(
            &VmxChoice::Max,
            "kvm-3.10",
            "kvm-3.10",
            &["virtualbox", "hypernest-evmcs"],
        )),
        ..ProcessorConfig::default()
    })
    .unwrap();
    l1.processor.write_state(0, &state).unwrap();
    assert!(l1.state() == state && l1.ram.bytes() == memory);
    let until = l1.processor.now() + 1;
    l1.processor.run(&mut l1.ram, &mut Nothing, until);
    assert_eq!(l1.state().vmx.current, Some(VMCS));
    l1.resume_after(&|a| {
        a.vmclear(qword_ptr(POINTERS + 8))?;
        a.hlt()
    });
    assert_eq!(revision(&l1, VMCS), named("kvm-3.10").revision());
    let wanted = Field::HOST_RSP.encoding();
    let saved = state.vmx.fields.iter().find(|one| one.0 == wanted);
    let vmcs = read(&l1, VMCS, "kvm-3.10");
    assert_eq!(saved.map(|one| one.1), Some(vmcs.get(Field::HOST_RSP)));
}

#[test]
fn another_written_layout_for_a_running_machine_must_hold_what_is_offered() {
    let whole = VmxChoice::Max
        .profile(<&Model>::default())
        .unwrap()
        .unwrap();
    let same = whole.writing(named("hypernest-evmcs")).unwrap();
    assert_eq!(same.caps, whole.caps);
    assert_eq!(same.written().name(), "hypernest-evmcs");
    let error = whole.writing(named("kvm-3.10")).unwrap_err().to_string();
    assert!(
        error.contains("pml_address") && error.contains("kvm-3.10"),
        "{error}"
    );
    // What is taken away stays away, whatever the layouts.
    let less = same.limited(|caps| caps.restricted_to(named("kvm")));
    assert!(same.fields().contains(Field::TERTIARY_VM_EXEC_CONTROL));
    assert!(!less.fields().contains(Field::TERTIARY_VM_EXEC_CONTROL));
    assert_eq!(less.written().name(), "hypernest-evmcs");
    let again = less.writing(named("hypernest")).unwrap();
    assert_eq!(again.caps, less.caps);
    let old = layouts(&VmxChoice::Max, "kvm-3.10", "hypernest-evmcs", &[]);
    let back = old.writing(named("kvm-3.10")).unwrap();
    assert_eq!((back.written().name(), &back.caps), ("kvm-3.10", &old.caps));
}
