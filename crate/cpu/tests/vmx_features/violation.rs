//! What an EPT violation says (Vol. 3C, "Exit Qualification for EPT Violations").

use hypernest_cpu::VmxChoice;
use hypernest_vmcs::{ExitReason, Field, pin, proc2};
use iced_x86::code_asm::{qword_ptr, rax, rdi, rsp};

use super::setup;
use crate::support::DATA;
use crate::support::hypervisor::{EPT, Emit, L1, Setup, ept_entry};

/// Guest page-table entry of DATA.
const ENTRY: u64 = 0x4000 + 8 * (DATA >> 12);
const NX: u64 = 1 << 63;
const VIOLATION: u64 = ExitReason::EPT_VIOLATION.0 as u64;

const LOAD: Emit = &|a| {
    a.mov(rdi, DATA)?;
    a.mov(rax, qword_ptr(rdi))
};

fn new(choice: VmxChoice) -> L1 {
    L1::new(&Setup {
        choice,
        ..setup(proc2::ENABLE_EPT, &[], LOAD)
    })
}

#[test]
fn the_guests_own_rights_to_the_page_are_told() {
    // Bits 9 to 11: user, writable, not executable.
    let cases = [
        (7, 0x600),
        (3, 0x400),
        (5, 0x200),
        (1, 0),
        (7 | NX, 0xe00),
        (1 | NX, 0x800),
    ];
    for (rights, told) in cases {
        for choice in [VmxChoice::Max, VmxChoice::Kvm] {
            let mut l1 = new(choice.clone());
            l1.put(ENTRY, DATA | rights);
            l1.put(ept_entry(EPT, DATA), 0);
            l1.run();
            // What KVM offers its guests has no such information.
            let told = if choice == VmxChoice::Max { told } else { 0 };
            assert_eq!(l1.exit(), (VIOLATION, 0x181 | told), "{rights:#x}");
        }
    }
}

#[test]
fn capabilities_tell_which_it_is() {
    for (choice, offered) in [(VmxChoice::Max, 1), (VmxChoice::Kvm, 0)] {
        let profile = choice.profile(Default::default()).unwrap().unwrap();
        assert_eq!(profile.caps.ept_vpid >> 22 & 1, offered);
    }
}

#[test]
fn a_table_of_the_guests_has_no_such_rights() {
    let mut l1 = new(VmxChoice::Max);
    l1.put(ept_entry(EPT, 0x3000), 0);
    l1.run();
    assert_eq!(l1.exit(), (VIOLATION, 0x81));
}

#[test]
fn an_iret_that_unblocked_nmis_says_so() {
    let exiting = pin::NMI_EXITING;
    for (controls, bit) in [
        (0, 1 << 12),
        (exiting, 0),
        (exiting | pin::VIRTUAL_NMIS, 1 << 12),
    ] {
        let mut l1 = L1::new(&setup(
            proc2::ENABLE_EPT,
            &[
                (
                    Field::PIN_BASED_VM_EXEC_CONTROL,
                    u64::from(pin::DEFAULT1 | controls),
                ),
                (Field::GUEST_INTERRUPTIBILITY_INFO, 8),
            ],
            &|a| {
                a.mov(rsp, DATA)?;
                a.iretq()
            },
        ));
        l1.put(ept_entry(EPT, DATA), 0);
        l1.run();
        assert_eq!(l1.exit(), (VIOLATION, 0x781 | bit));
        let blocked = if bit == 0 { 8 } else { 0 };
        assert_eq!(l1.field(Field::GUEST_INTERRUPTIBILITY_INFO), blocked);
    }
}

#[test]
fn an_exception_of_such_an_iret_says_so_too() {
    // To a selector that is null: #GP(0).
    for (blocked, bit) in [(8, 1 << 12), (0, 0)] {
        let l1 = L1::start(&setup(
            0,
            &[
                (Field::PIN_BASED_VM_EXEC_CONTROL, u64::from(pin::DEFAULT1)),
                (Field::GUEST_INTERRUPTIBILITY_INFO, blocked),
                (Field::EXCEPTION_BITMAP, 1 << 13),
            ],
            &|a| {
                a.mov(rsp, DATA)?;
                a.iretq()
            },
        ));
        assert_eq!(super::exception(&l1), (13, 0));
        assert_eq!(l1.field(Field::VM_EXIT_INTR_INFO), 0x8000_0b0d | bit);
        assert_eq!(l1.field(Field::GUEST_INTERRUPTIBILITY_INFO), 0);
    }
}
