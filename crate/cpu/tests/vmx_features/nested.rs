//! The nested state of a vCPU: at each instant that is not like the others, one processor goes on and another
//! goes on from what was saved of it, and both come to the same; and what is refused changes nothing.

use std::sync::Arc;

use hypernest_cpu::{Activity, Model, NestedRefused, VmxChoice, VmxProfile};
use hypernest_vmcs::nested_state::{DEADLINE_VALID, state_flag};
use hypernest_vmcs::{ExitReason, Field, Layout, NestedState, Vmcs, pin, proc1, proc2};
use iced_x86::code_asm::{byte_ptr, qword_ptr, r8, r9, rax, rdi};

use super::{layouts, setup, vector};
use crate::support::apic::{
    ACCESS, DELIVERY, IRR, NOTIFICATION, PAGE, POSTED, POSTING, RFLAGS_IF, TPR, handled, l1_with,
    set_register, set_vector, status,
};
use crate::support::hypervisor::{
    AD, EPT, Emit, GUEST, L1, OTHER_VMCS, PAGES, RWX, VMCS, VMXON, ept_entry, eptp,
};
use crate::support::{DATA, HANDLERS};

/// An event to inject: an external interrupt with this vector.
const INTERRUPT: u64 = 1 << 31 | 0x40;

fn plain(choice: &VmxChoice) -> Arc<VmxProfile> {
    choice.profile(<&Model>::default()).unwrap().unwrap()
}

/// What `make` gives goes on by itself, and by way of a fresh processor: with nested state and registers in
/// either order, and once with another written layout. `go_on` ends at an exit.
fn same_either_way(profile: &Arc<VmxProfile>, make: &dyn Fn() -> L1, go_on: &dyn Fn(&mut L1)) {
    let other = Arc::new(
        profile
            .writing(Layout::named("hypernest-evmcs").unwrap())
            .unwrap(),
    );
    let mut stays = make();
    // What is cached of memory is no part of what travels.
    stays.processor.flush(&mut stays.ram);
    go_on(&mut stays);
    for (target, nested_first) in [
        (profile, true),
        (profile, false),
        (&other, true),
        (&other, false),
    ] {
        let mut travels = make();
        let report = travels.carry(target, nested_first);
        assert_eq!(report.dropped, []);
        assert_eq!(report.translated, target.written() != profile.written());
        go_on(&mut travels);
        assert_eq!(travels.state(), stays.state());
        assert!(travels.ram.bytes() == stays.ram.bytes());
    }
}

/// The nested state at the instant that `make` gives.
fn nested(make: &dyn Fn() -> L1) -> NestedState {
    let mut l1 = make();
    l1.processor.nested_state(0, &l1.ram)
}

#[test]
fn a_guest_that_executes() {
    let max = plain(&VmxChoice::Max);
    let make = || {
        let mut l1 = L1::with(
            &setup(proc2::ENABLE_EPT, &[], &|a| {
                a.mov(rax, 0x55u64)?;
                a.mov(rdi, DATA)?;
                a.mov(qword_ptr(rdi), rax)?;
                a.vmcall()
            }),
            max.clone(),
        );
        l1.tick_until(|state| state.vmx.non_root && state.rip > GUEST + 1);
        l1
    };
    let state = nested(&make);
    assert_eq!(
        (state.flags, state.vmxon, state.vmcs),
        (state_flag::GUEST_MODE, VMXON, VMCS)
    );
    // The image has the guest as it is now.
    let image = Layout::hypernest().read(state.image().unwrap()).unwrap();
    assert_eq!(image.get(Field::GUEST_RIP), make().state().rip);
    same_either_way(&max, &make, &|l1| {
        l1.run();
        assert_eq!((l1.reason(), l1.word(DATA)), (ExitReason::VMCALL, 0x55));
    });
}

#[test]
fn run_pending() {
    let max = plain(&VmxChoice::Max);
    let fields = [
        (Field::VM_ENTRY_INTR_INFO_FIELD, INTERRUPT),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
    ];
    let make = || {
        let mut l1 = L1::with(&setup(0, &fields, &|a| a.vmcall()), max.clone());
        l1.tick_until(|state| state.vmx.inject);
        l1
    };
    assert_eq!(
        nested(&make).flags,
        state_flag::GUEST_MODE | state_flag::RUN_PENDING
    );
    same_either_way(&max, &make, &|l1| {
        l1.run();
        assert_eq!(vector(l1), 0x40);
    });
    // Once it is delivered, it is not injected again.
    let delivered = || {
        let mut l1 = make();
        let handler = HANDLERS + 16 * 0x40;
        l1.ram.write(handler, &[0x90, 0x90, 0xf4]).unwrap();
        l1.tick_until(|state| state.rip == handler + 1);
        l1
    };
    assert_eq!(nested(&delivered).flags, state_flag::GUEST_MODE);
    same_either_way(&max, &delivered, &|l1| {
        l1.run();
        assert_eq!(vector(l1), 0x40);
    });
}

#[test]
fn mtf_pending() {
    let max = plain(&VmxChoice::Max);
    let controls = max.caps.proc1_allowed0() | proc1::MONITOR_TRAP_FLAG;
    let fields = [(Field::CPU_BASED_VM_EXEC_CONTROL, u64::from(controls))];
    let make = || {
        let mut l1 = L1::with(
            &setup(0, &fields, &|a| {
                a.nop()?;
                a.nop()?;
                a.vmcall()
            }),
            max.clone(),
        );
        l1.tick_until(|state| state.vmx.mtf_pending);
        l1
    };
    assert_eq!(
        nested(&make).flags,
        state_flag::GUEST_MODE | state_flag::MTF_PENDING
    );
    same_either_way(&max, &make, &|l1| {
        l1.run();
        assert_eq!(l1.reason(), ExitReason::MONITOR_TRAP_FLAG);
        assert_eq!(l1.field(Field::GUEST_RIP), GUEST + 1);
    });
}

#[test]
fn a_preemption_deadline_under_a_tsc_offset() {
    const TSC: u64 = 0x1234_5678_9abd;
    for choice in [VmxChoice::Max, VmxChoice::Kvm] {
        let profile = plain(&choice);
        let rate = profile.caps.misc & 0x1f;
        let controls = profile.caps.proc1_allowed0() | proc1::USE_TSC_OFFSETTING;
        let pins = profile.caps.pin_allowed0() | pin::ACTIVATE_VMX_PREEMPTION_TIMER;
        let fields = [
            (Field::CPU_BASED_VM_EXEC_CONTROL, u64::from(controls)),
            (Field::PIN_BASED_VM_EXEC_CONTROL, u64::from(pins)),
            (Field::TSC_OFFSET, 0x7777_0000),
            (Field::VMX_PREEMPTION_TIMER_VALUE, 10),
        ];
        let make = || {
            let mut l1 = L1::with(
                &setup(0, &fields, &|a| {
                    let mut again = a.create_label();
                    a.set_label(&mut again)?;
                    a.rdtsc()?;
                    a.jmp(again)
                }),
                profile.clone(),
            );
            l1.change(|state| state.msrs.tsc_offset = TSC);
            l1.tick_until(|state| state.vmx.non_root);
            l1.tick();
            l1
        };
        let state = nested(&make);
        assert_eq!(state.vmx_flags, DEADLINE_VALID);
        let l1 = make();
        let deadline = l1.state().vmx.preemption_deadline.unwrap();
        assert_eq!(state.deadline, (deadline + TSC) >> rate);
        assert_eq!((deadline + TSC) & ((1 << rate) - 1), 0);
        let end = |l1: &mut L1| {
            l1.run();
            assert_eq!(l1.reason(), ExitReason::PREEMPTION_TIMER);
        };
        if choice == VmxChoice::Max {
            same_either_way(&profile, &make, &end);
        } else {
            for nested_first in [true, false] {
                let (mut stays, mut travels) = (make(), make());
                travels.carry(&profile, nested_first);
                end(&mut stays);
                end(&mut travels);
                assert_eq!(travels.state(), stays.state());
            }
        }
    }
}

#[test]
fn a_guest_that_waits_in_hlt() {
    let max = plain(&VmxChoice::Max);
    let pins = max.caps.pin_allowed0() | pin::ACTIVATE_VMX_PREEMPTION_TIMER;
    let fields = [
        (Field::PIN_BASED_VM_EXEC_CONTROL, u64::from(pins)),
        (Field::VMX_PREEMPTION_TIMER_VALUE, 500),
        (Field::GUEST_ACTIVITY_STATE, 1),
    ];
    let make = || {
        let mut l1 = L1::with(&setup(0, &fields, &|a| a.vmcall()), max.clone());
        l1.tick_until(|state| state.activity == Activity::Halted);
        l1.tick();
        l1
    };
    same_either_way(&max, &make, &|l1| {
        l1.run();
        assert_eq!(l1.reason(), ExitReason::PREEMPTION_TIMER);
        assert_eq!(l1.field(Field::GUEST_ACTIVITY_STATE), 1);
    });
}

#[test]
fn a_guest_that_waits_for_a_start_up_ipi() {
    let max = plain(&VmxChoice::Max);
    let fields = [(Field::GUEST_ACTIVITY_STATE, 3)];
    let make = || {
        let mut l1 = L1::with(&setup(0, &fields, &|a| a.vmcall()), max.clone());
        l1.tick_until(|state| state.activity == Activity::WaitForSipi);
        l1.tick();
        l1
    };
    same_either_way(&max, &make, &|l1| {
        l1.change(|state| state.apic.sipi_pending = Some(0x9a));
        l1.run();
        assert_eq!((l1.reason(), l1.exit().1), (ExitReason::SIPI, 0x9a));
    });
}

#[test]
fn valid_idt_vectoring_information() {
    let max = plain(&VmxChoice::Max);
    let fields = [
        (Field::VM_ENTRY_INTR_INFO_FIELD, INTERRUPT),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
    ];
    let idt = |l1: &L1| ept_entry(EPT, l1.state().idtr.base);
    let make = || {
        let mut l1 = L1::with(
            &setup(proc2::ENABLE_EPT, &fields, &|a| a.vmcall()),
            max.clone(),
        );
        let entry = idt(&l1);
        l1.put(entry, 0);
        l1.run();
        assert_eq!(l1.reason(), ExitReason::EPT_VIOLATION);
        l1
    };
    let image = Layout::hypernest()
        .read(nested(&make).image().unwrap())
        .unwrap();
    assert_eq!(image.get(Field::IDT_VECTORING_INFO_FIELD), INTERRUPT);
    // L1 maps what is missing and injects again what it reads there.
    same_either_way(&max, &make, &|l1| {
        let (entry, page) = (idt(l1), l1.state().idtr.base & !0xfff);
        l1.put(entry, page | RWX);
        l1.resume_after(&|a| {
            a.mov(r8, u64::from(Field::IDT_VECTORING_INFO_FIELD.encoding()))?;
            a.vmread(r8, r8)?;
            a.mov(r9, u64::from(Field::VM_ENTRY_INTR_INFO_FIELD.encoding()))?;
            a.vmwrite(r9, r8)
        });
        assert_eq!(vector(l1), 0x40);
    });
}

#[test]
fn a_virtual_interrupt_pending() {
    let max = plain(&VmxChoice::Max);
    let make = || {
        let fields = [(Field::GUEST_INTR_STATUS, 0x61)];
        let guest: Emit = &|a| {
            a.nop()?;
            a.nop()?;
            a.sti()?;
            a.nop()?;
            a.vmcall()
        };
        let mut l1 = l1_with(DELIVERY, &fields, guest, max.clone());
        set_vector(&mut l1, IRR, 0x61);
        l1.tick_until(|state| state.vmx.virtual_interrupt && state.rip == GUEST + 1);
        l1
    };
    same_either_way(&max, &make, &|l1| {
        assert!(l1.state().vmx.virtual_interrupt);
        l1.run();
        assert_eq!((handled(l1), status(l1)), (0x61, (0, 0x61)));
    });
}

#[test]
fn a_posted_interrupt_outstanding() {
    let max = plain(&VmxChoice::Max);
    let make = || {
        let guest: Emit = &|a| {
            a.sti()?;
            a.nop()?;
            a.nop()?;
            a.vmcall()
        };
        let mut l1 = l1_with(POSTING, &[], guest, max.clone());
        // Vector 71H is requested, and the notification has been sent.
        l1.put(POSTED + 8, 1 << (0x71 - 64));
        l1.put(POSTED + 32, 1 | u64::from(NOTIFICATION as u8) << 16);
        l1.tick_until(|state| state.vmx.non_root && state.rip == GUEST + 1);
        l1.change(|state| {
            state.apic.svr |= 0x100;
            state.apic.irr[NOTIFICATION as usize / 32] |= 1 << (NOTIFICATION % 32);
        });
        l1
    };
    same_either_way(&max, &make, &|l1| {
        l1.run();
        assert_eq!(handled(l1), 0x71);
        assert_eq!(l1.word(POSTED + 32) & 1, 0, "it was taken");
    });
}

#[test]
fn a_page_modification_log_that_is_half_full() {
    const LOG: u64 = PAGES + 0x4000;
    let max = plain(&VmxChoice::Max);
    let fields = [
        (Field::EPT_POINTER, eptp(EPT) | AD),
        (Field::PML_ADDRESS, LOG),
        (Field::GUEST_PML_INDEX, 11),
    ];
    let make = || {
        let mut l1 = L1::with(
            &setup(proc2::ENABLE_EPT | proc2::ENABLE_PML, &fields, &|a| {
                let mut again = a.create_label();
                a.mov(rdi, DATA)?;
                a.set_label(&mut again)?;
                a.mov(byte_ptr(rdi), 1)?;
                a.add(rdi, 0x1000)?;
                a.jmp(again)
            }),
            max.clone(),
        );
        l1.tick_until(|state| state.gpr[7] >= DATA + 0x1000);
        l1
    };
    let middle = make();
    let index = middle.field(Field::GUEST_PML_INDEX);
    assert!((3..8).contains(&index), "{index}");
    same_either_way(&max, &make, &|l1| {
        l1.run();
        assert_eq!(l1.reason(), ExitReason::PML_FULL);
        assert_eq!(l1.field(Field::GUEST_PML_INDEX), 0xffff);
    });
}

#[test]
fn a_write_to_a_virtual_apic_that_is_not_emulated_yet() {
    let max = plain(&VmxChoice::Max);
    let make = || {
        let guest: Emit = &|a| {
            a.mov(rdi, ACCESS + TPR)?;
            a.mov(byte_ptr(rdi), 0x20)?;
            a.nop()?;
            a.vmcall()
        };
        let mut l1 = l1_with(PAGE, &[(Field::TPR_THRESHOLD, 3)], guest, max.clone());
        set_register(&mut l1, TPR, 0x30);
        l1.tick_until(|state| state.vmx.apic_write.is_some());
        l1
    };
    same_either_way(&max, &make, &|l1| {
        l1.run();
        assert_eq!(l1.reason(), ExitReason::TPR_BELOW_THRESHOLD);
    });
}

#[test]
fn a_guest_with_a_shadow_vmcs_has_two_images() {
    let max = plain(&VmxChoice::Max);
    let fields = [
        (Field::VMREAD_BITMAP, PAGES),
        (Field::VMWRITE_BITMAP, PAGES),
        (Field::VMCS_LINK_POINTER, OTHER_VMCS),
    ];
    let rip = u64::from(Field::GUEST_RIP.encoding());
    let make = || {
        let guest: Emit = &|a| {
            a.mov(r8, rip)?;
            a.vmwrite(r8, r8)?;
            a.vmread(r9, r8)?;
            a.vmcall()
        };
        let mut l1 = L1::with(&setup(proc2::VMCS_SHADOWING, &fields, guest), max.clone());
        let revision = l1.word(OTHER_VMCS);
        l1.put(OTHER_VMCS, revision | 1 << 31);
        l1.tick_until(|state| state.vmx.non_root);
        l1.tick();
        l1.tick();
        l1
    };
    let state = nested(&make);
    let shadow = Layout::hypernest()
        .read(state.shadow_image().unwrap())
        .unwrap();
    assert_eq!((shadow.shadow, shadow.get(Field::GUEST_RIP)), (true, rip));
    let mut l1 = make();
    // What memory has is not what counts.
    let mut stale = Vmcs::new();
    stale.shadow = true;
    let mut bytes = [0; 4096];
    Layout::hypernest().write(&stale, &mut bytes).unwrap();
    l1.ram.write(OTHER_VMCS, &bytes).unwrap();
    l1.processor
        .set_nested_state(0, &mut l1.ram, &state.to_bytes())
        .unwrap();
    l1.run();
    assert_eq!((l1.reason(), l1.state().gpr[9]), (ExitReason::VMCALL, rip));
}

#[test]
fn a_guest_that_executes_was_launched() {
    // KVM's image is still clear before the first exit.
    let max = plain(&VmxChoice::Max);
    let guest: Emit = &|a| {
        a.vmcall()?;
        a.vmcall()
    };
    let mut l1 = L1::with(&setup(0, &[], guest), max);
    l1.tick_until(|state| state.vmx.non_root);
    let mut state = l1.processor.nested_state(0, &l1.ram);
    Layout::hypernest()
        .set_launched(&mut state.data, false)
        .unwrap();
    l1.processor
        .set_nested_state(0, &mut l1.ram, &state.to_bytes())
        .unwrap();
    l1.run();
    l1.next();
    assert_eq!(l1.reason(), ExitReason::VMCALL, "VMRESUME has entered");
}

#[test]
fn a_refused_state_changes_nothing() {
    let max = plain(&VmxChoice::Max);
    let mut l1 = L1::with(&setup(proc2::ENABLE_EPT, &[], &|a| a.vmcall()), max.clone());
    l1.tick_until(|state| state.vmx.non_root);
    let good = l1.processor.nested_state(0, &l1.ram);
    let layout = Layout::hypernest();
    let spoiled = |field: Field, value: u64| {
        let mut state = good.clone();
        let mut vmcs = layout.read(state.image().unwrap()).unwrap();
        vmcs.set(field, value);
        layout.write(&vmcs, &mut state.data).unwrap();
        state.to_bytes()
    };
    let with = |change: &dyn Fn(&mut NestedState)| {
        let mut state = good.clone();
        change(&mut state);
        state.to_bytes()
    };
    let cases: Vec<(u8, Vec<u8>)> = vec![
        (1, Vec::new()),
        (1, good.to_bytes()[..200].to_vec()),
        (3, with(&|state| state.flags |= 1 << 6)),
        (4, with(&|state| state.flags = state_flag::RUN_PENDING)),
        (5, with(&|state| state.format = 1)),
        (10, with(&|state| state.vmxon = 1 << 50)),
        (15, with(&|state| state.smm_flags = 2)),
        (18, with(&|state| state.flags |= state_flag::EVMCS)),
        (24, with(&|state| state.vmcs = state.vmxon)),
        (25, with(&|state| state.vmcs = 0x123)),
        (28, with(&|state| state.vmcs = !0)),
        (31, with(&|state| state.data[0] ^= 1)),
        (38, spoiled(Field::PIN_BASED_VM_EXEC_CONTROL, 0)),
        (39, spoiled(Field::HOST_CR3, 1 << 60)),
        (40, spoiled(Field::GUEST_RFLAGS, 0)),
        (40, spoiled(Field::GUEST_RIP, 1 << 60)),
    ];
    let (state, memory) = (l1.state(), l1.ram.bytes().to_vec());
    for (number, blob) in cases {
        let refused = l1
            .processor
            .set_nested_state(0, &mut l1.ram, &blob)
            .unwrap_err();
        let found = match &refused {
            NestedRefused::Check(refused) | NestedRefused::Entry { refused, .. } => {
                refused.number()
            }
            other => panic!("{other}"),
        };
        assert_eq!(found, number, "{refused}");
        assert!(l1.state() == state && l1.ram.bytes() == memory, "{refused}");
    }
    // Random bytes too, in the header and in the image.
    let bytes = good.to_bytes();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..3000 {
        seed = seed
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let mut blob = bytes.clone();
        let at = (seed >> 33) as usize % 1400;
        blob[at] ^= 1 << (seed >> 20 & 7);
        if l1.processor.set_nested_state(0, &mut l1.ram, &blob).is_ok() {
            l1.processor.run(
                &mut l1.ram,
                &mut crate::support::Nothing,
                l1.processor.now() + 50,
            );
            l1.processor.write_state(0, &state).unwrap();
            l1.ram.bytes_mut().copy_from_slice(&memory);
            l1.processor.flush(&mut l1.ram);
        }
        assert!(l1.state() == state, "{at:#x}");
    }
}

#[test]
fn what_the_machine_does_not_have_is_named() {
    let small = layouts(&VmxChoice::Max, "hypernest", "hypernest", &["kvm-3.10"]);
    let mut l1 = L1::with(&setup(0, &[], &|a| a.vmcall()), small);
    l1.run();
    let mut state = l1.processor.nested_state(0, &l1.ram);
    let mut vmcs = Layout::hypernest().read(state.image().unwrap()).unwrap();
    vmcs.set(Field::PML_ADDRESS, 0x7000);
    Layout::hypernest().write(&vmcs, &mut state.data).unwrap();
    let report = l1
        .processor
        .set_nested_state(0, &mut l1.ram, &state.to_bytes())
        .unwrap();
    assert_eq!(report.dropped, [(Field::PML_ADDRESS, 0x7000)]);
    assert_eq!(report.layout.as_deref(), Some("hypernest"));
}

#[test]
fn outside_vmx_operation_there_is_a_header_alone() {
    let mut l1 = L1::with(&setup(0, &[], &|a| a.vmcall()), plain(&VmxChoice::Max));
    let blob = l1.processor.nested_state(0, &l1.ram).to_bytes();
    assert_eq!(blob, NestedState::default().to_bytes());
    assert_eq!(blob.len(), 128);
    l1.run();
    l1.processor
        .set_nested_state(0, &mut l1.ram, &blob)
        .unwrap();
    assert_eq!(
        (l1.state().vmx.region, l1.state().vmx.current),
        (None, None)
    );
}
