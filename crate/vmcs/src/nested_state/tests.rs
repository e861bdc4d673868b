//! A nested state that every check lets pass, and a way to fail each.

use super::*;
use crate::control::{proc1, proc2};
use crate::testing::Random;
use crate::vmcs::Vmcs;
use alloc::collections::BTreeSet;
use alloc::string::ToString;
use alloc::vec;

fn image(shadow: bool) -> Vec<u8> {
    let mut vmcs = Vmcs::new();
    vmcs.shadow = shadow;
    vmcs.set(
        Field::CPU_BASED_VM_EXEC_CONTROL,
        proc1::ACTIVATE_SECONDARY_CONTROLS.into(),
    );
    vmcs.set(
        Field::SECONDARY_VM_EXEC_CONTROL,
        proc2::VMCS_SHADOWING.into(),
    );
    vmcs.set(Field::VMCS_LINK_POINTER, 0x5000);
    let mut region = vec![0; IMAGE];
    Layout::kvm().write(&vmcs, &mut region).unwrap();
    region
}

/// In a guest, with a shadow VMCS.
fn good() -> NestedState {
    NestedState {
        flags: state_flag::GUEST_MODE,
        vmxon: 0x3000,
        vmcs: 0x4000,
        data: [image(false), image(true)].concat(),
        ..NestedState::default()
    }
}

type Change = fn(&mut NestedState, &mut Taker);

/// A change that fails the check of that number.
const CASES: &[(u8, Change)] = &[
    (6, |s, _| (s.vmxon, s.smm_flags) = (NO_ADDRESS, 1)),
    (7, |s, _| s.vmxon = NO_ADDRESS),
    (8, |s, _| (s.vmxon, s.vmcs) = (NO_ADDRESS, NO_ADDRESS)),
    (9, |_, t| t.vmx = false),
    (10, |s, _| s.vmxon = 0x3001),
    (10, |s, _| s.vmxon = 1 << 40),
    (11, |s, t| (s.smm_flags, t.smm) = (3, true)),
    (12, |s, _| s.smm_flags = 4),
    (13, |s, _| s.vmx_flags = 2),
    (14, |_, t| t.smm = true),
    (15, |s, _| s.smm_flags = smm_flag::VMXON),
    (16, |s, t| (s.flags, s.smm_flags, t.smm) = (0, 1, true)),
    (17, |s, t| {
        (s.vmxon, s.vmcs, s.flags) = (NO_ADDRESS, NO_ADDRESS, state_flag::EVMCS);
        t.vmx = false;
    }),
    (18, |s, t| {
        s.flags |= state_flag::EVMCS;
        t.enlightened = false;
    }),
    (22, |s, _| s.data.truncate(997)),
    (22, |s, _| s.data.clear()),
    (24, |s, _| s.vmcs = s.vmxon),
    (25, |s, _| s.vmcs = 0x4800),
    (28, |s, _| s.vmcs = NO_ADDRESS),
    (31, |s, _| s.data[0] ^= 1),
    (34, |s, _| s.data.truncate(IMAGE + 997)),
    (36, |s, _| s.data[IMAGE] ^= 1),
    (36, |s, _| s.data[IMAGE + 3] ^= 0x80),
];

fn check(change: Change) -> Result<(), Refused> {
    let (mut state, layouts) = (good(), [Layout::kvm()]);
    let mut taker = Taker {
        vmx: true,
        enlightened: true,
        smm: false,
        physical_bits: 40,
        layouts: &layouts,
    };
    change(&mut state, &mut taker);
    state.check(&taker)
}

#[test]
fn what_is_good_passes() {
    assert_eq!(check(|_, _| ()), Ok(()));
    // Without a VMCS; without VMX operation; with an enlightened VMCS to be mapped later.
    assert_eq!(
        check(|s, _| {
            (s.flags, s.vmcs) = (0, NO_ADDRESS);
            s.data.clear();
        }),
        Ok(())
    );
    assert_eq!(check(|s, _| *s = NestedState::default()), Ok(()));
    assert_eq!(
        check(|s, _| {
            (s.flags, s.vmcs) = (state_flag::EVMCS, NO_ADDRESS);
        }),
        Ok(())
    );
    // The contents of a VMCS are looked at in a guest only.
    assert_eq!(
        check(|s, _| {
            s.flags = 0;
            s.data.truncate(998);
        }),
        Ok(())
    );
}

#[test]
fn each_check_has_a_state_that_fails_it() {
    for (number, change) in CASES {
        let refused = check(*change).unwrap_err();
        assert_eq!(refused.number(), *number, "{refused}");
        assert_eq!(refused.errno().number(), 22);
    }
    // Checks of reading, those of the host's memory, those that need the fields (VM entry's own),
    // and those of other calls.
    let elsewhere = [1, 2, 3, 4, 5, 21, 30, 35, 38, 39, 40, 41, 42, 43, 44];
    let cases = CASES.iter().map(|(number, _)| *number).chain(elsewhere);
    let rows = STEPS.iter().map(|step| step.number);
    assert_eq!(cases.collect::<BTreeSet<_>>(), rows.collect());
}

#[test]
fn what_cannot_be_one_is_refused_when_read() {
    let bytes = good().to_bytes();
    let read = |at: usize, value: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        NestedState::read(&bytes).map_err(|refused| refused.number())
    };
    for len in 0..bytes.len() {
        let refused = NestedState::read(&bytes[..len]).unwrap_err();
        assert_eq!((refused.number(), refused.errno()), (1, Errno::Fault));
    }
    assert_eq!(NestedState::read(&[0; 8]).unwrap_err().number(), 2);
    assert_eq!(read(0, 1 << 4), Err(3));
    assert_eq!(read(0, 2), Err(4));
    assert_eq!(read(2, 1), Err(5));
    assert_eq!(read(0, 1), Ok(good()));
}

#[test]
fn bytes_stay_as_they_are() {
    let mut random = Random::new(21);
    for _ in 0..2000 {
        let mut bytes: Vec<u8> = (0..HEADER + random.below(9000) as usize)
            .map(|_| random.next() as u8)
            .collect();
        bytes[0] &= 0xD;
        bytes[1] &= 1;
        bytes[2..4].fill(0);
        let size = bytes.len() as u32;
        bytes[4..8].copy_from_slice(&size.to_le_bytes());
        let state = NestedState::read(&bytes).unwrap();
        assert_eq!(state.to_bytes(), bytes);
        // What is behind its size is not part of it.
        bytes.push(1);
        assert_eq!(NestedState::read(&bytes), Ok(state));
    }
}

#[test]
fn odd_things_are_found() {
    let mut state = good();
    assert_eq!(state.findings(Layout::kvm()), []);
    state.flags = state_flag::GIF_SET | state_flag::EVMCS | state_flag::MTF_PENDING;
    (state.padding.1[80], state.deadline) = (1, 1);
    state.data[4000] = 1;
    state.data[3] |= 0x80;
    state.data.push(0);
    let found = state.findings(Layout::kvm());
    assert_eq!(
        found,
        [
            Finding::Padding,
            Finding::GifSet,
            Finding::EnlightenedWithAddress,
            Finding::MtfOutsideGuest,
            Finding::DeadlineNotValid,
            Finding::Trailing,
            Finding::ImageTail,
            Finding::Shadow,
        ]
    );
    assert!(found.iter().all(|finding| finding.words().len() > 20));
}

#[test]
fn a_refusal_says_what_and_how_the_call_fails() {
    let refused = check(|s, _| s.vmcs = s.vmxon).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "vmcs12 address equals the VMXON address (check 24, EINVAL)"
    );
}
