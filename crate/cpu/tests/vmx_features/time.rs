//! What a guest sees of time: TSC scaling (Vol. 3C, "Time-Stamp Counter Offsetting and Scaling"), and
//! PAUSE-loop exiting.

use hypernest_cpu::clock::TSC_PER_TICK;
use hypernest_vmcs::{ExitReason, Field, pin, proc1, proc2};
use iced_x86::code_asm::{ebx, ecx, rax, rdx};

use super::{USER, setup};
use crate::support::hypervisor::{Emit, GUEST, L1, PAGES};

const BITMAP: u64 = PAGES;
/// A list with one entry: the TSC as the host has it at the exit.
const LIST: u64 = PAGES + 0x1000;
const OFFSET: u64 = 0xffff_ffff_0000_1234;
/// One and a half.
const MULTIPLIER: u64 = 3 << 47;
/// What makes L1 and L2 be in step with the clock: a TSC of this at first.
const START: u64 = 0x1234_5678_9abc;

/// TSC in RAX and RDX; leaves in a known number of instructions.
const RDTSC: Emit = &|a| {
    a.rdtsc()?;
    a.vmcall()
};
const RDTSCP: Emit = &|a| {
    a.rdtscp()?;
    a.vmcall()
};
const RDMSR: Emit = &|a| {
    a.mov(ecx, 0x10)?;
    a.rdmsr()?;
    a.vmcall()
};

/// What the guest read, and the host's TSC when it left.
fn read(proc1: u32, scaling: bool, guest: Emit) -> (u64, u64) {
    let proc2 = proc2::ENABLE_RDTSCP | if scaling { proc2::USE_TSC_SCALING } else { 0 };
    let proc1 = proc1 | proc1::USE_MSR_BITMAPS | proc1::ACTIVATE_SECONDARY_CONTROLS;
    let mut l1 = L1::new(&setup(
        proc2,
        &[
            (
                Field::CPU_BASED_VM_EXEC_CONTROL,
                u64::from(proc1 | proc1::DEFAULT1),
            ),
            (Field::MSR_BITMAP, BITMAP),
            (Field::TSC_OFFSET, OFFSET),
            (Field::TSC_MULTIPLIER, MULTIPLIER),
            (Field::VM_EXIT_MSR_STORE_ADDR, LIST),
            (Field::VM_EXIT_MSR_STORE_COUNT, 1),
        ],
        guest,
    ));
    let mut state = l1.state();
    state.msrs.tsc_offset = START;
    l1.processor.write_state(0, &state).unwrap();
    l1.put(LIST, 0x10);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    let gpr = l1.state().gpr;
    (gpr[0] | gpr[2] << 32, l1.word(LIST + 8))
}

#[test]
fn the_tsc_is_multiplied_and_then_moved() {
    for guest in [RDTSC, RDTSCP, RDMSR] {
        let (plain, left) = read(0, false, guest);
        let after = left - plain;
        assert!(after < 4 * TSC_PER_TICK && plain > START);
        let (moved, left) = read(proc1::USE_TSC_OFFSETTING, false, guest);
        assert_eq!(moved, (left - after).wrapping_add(OFFSET));
        let (scaled, left) = read(proc1::USE_TSC_OFFSETTING, true, guest);
        let product = u128::from(left - after) * u128::from(MULTIPLIER);
        assert_eq!(scaled, ((product >> 48) as u64).wrapping_add(OFFSET));
        // Scaling is a part of offsetting.
        let (plain, left) = read(0, true, guest);
        assert_eq!(plain, left - after);
    }
}

#[test]
fn a_guest_that_writes_the_tsc_writes_the_hosts() {
    let (read_back, left) = read(proc1::USE_TSC_OFFSETTING, true, &|a| {
        a.mov(ecx, 0x10)?;
        a.mov(rax, 0x7000u64)?;
        a.mov(rdx, 0u64)?;
        a.wrmsr()?;
        a.rdtsc()?;
        a.vmcall()
    });
    let (least, most) = (0x7000, 0x7000 + 8 * TSC_PER_TICK);
    assert!((least..most).contains(&left), "{left:#x}");
    let (least, most) = (least * 3 / 2, most * 3 / 2);
    assert!((least..most).contains(&read_back.wrapping_sub(OFFSET)));
}

/// PAUSE every three instructions, counted in RBX.
const LOOP: Emit = &|a| {
    let mut again = a.create_label();
    a.xor(ebx, ebx)?;
    a.mov(ecx, 100)?;
    a.set_label(&mut again)?;
    a.inc(ebx)?;
    a.pause()?;
    a.loop_(again)?;
    a.hlt()
};

fn spin(controls: u32, gap: u64, window: u64, more: &[(Field, u64)]) -> L1 {
    let mut fields = vec![(Field::PLE_GAP, gap), (Field::PLE_WINDOW, window)];
    fields.extend_from_slice(more);
    L1::start(&setup(controls, &fields, LOOP))
}

#[test]
fn a_loop_that_goes_on_for_longer_than_the_window_exits() {
    // PAUSE n comes 3 (n - 1) ticks after the first.
    let mut l1 = spin(proc2::PAUSE_LOOP_EXITING, 3, 50, &[]);
    assert_eq!(l1.exit(), (u64::from(ExitReason::PAUSE.0), 0));
    assert_eq!(l1.state().gpr[3], 18);
    assert_eq!(l1.field(Field::VM_EXIT_INSTRUCTION_LEN), 2);
    // It starts anew with each entry: the same PAUSE is the first of a loop again.
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::PAUSE);
    assert_eq!(l1.state().gpr[3], 18 + 17);
    // The window's end belongs to it.
    let l1 = spin(proc2::PAUSE_LOOP_EXITING, 3, 51, &[]);
    assert_eq!(l1.state().gpr[3], 19);
}

#[test]
fn a_gap_ends_the_loop() {
    let l1 = spin(proc2::PAUSE_LOOP_EXITING, 2, 50, &[]);
    assert_eq!(l1.reason(), ExitReason::HLT);
}

#[test]
fn it_counts_at_level_0_where_every_pause_does_not_exit() {
    let l1 = spin(proc2::PAUSE_LOOP_EXITING, 3, 50, &USER);
    // HLT is not for user code.
    assert_eq!(super::exception(&l1), (13, 0));
    let all = [(
        Field::CPU_BASED_VM_EXEC_CONTROL,
        u64::from(proc1::DEFAULT1 | proc1::PAUSE_EXITING | proc1::ACTIVATE_SECONDARY_CONTROLS),
    )];
    let l1 = spin(proc2::PAUSE_LOOP_EXITING, 3, 50, &all);
    assert_eq!(l1.reason(), ExitReason::PAUSE);
    assert_eq!(l1.state().gpr[3], 1);
}

#[test]
fn the_loop_is_saved() {
    let timer = [
        (
            Field::PIN_BASED_VM_EXEC_CONTROL,
            u64::from(pin::DEFAULT1 | pin::ACTIVATE_VMX_PREEMPTION_TIMER),
        ),
        (Field::VMX_PREEMPTION_TIMER_VALUE, 1000),
    ];
    let mut l1 = L1::new(&setup(
        proc2::PAUSE_LOOP_EXITING,
        &[&[(Field::PLE_GAP, 3), (Field::PLE_WINDOW, 50)][..], &timer].concat(),
        LOOP,
    ));
    // Into the loop, and everything out of the processor and in again.
    while l1.state().vmx.pause_loop.is_none() {
        let until = l1.processor.now() + 1;
        let bus = &mut crate::support::Nothing;
        l1.processor.run(&mut l1.ram, bus, until);
    }
    assert!(l1.state().rip > GUEST && l1.state().vmx.non_root);
    let saved = l1.state();
    l1.processor.write_state(0, &saved).unwrap();
    assert_eq!(l1.state(), saved);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::PAUSE);
    assert_eq!(l1.state().gpr[3], 18);
}
