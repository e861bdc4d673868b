//! A guest whose APIC is virtualized: its controls, its pages, what it does.

use std::sync::Arc;

use super::HANDLERS;
use super::hypervisor::{Emit, L1, PAGES, Setup};
use hypernest_cpu::{Model, VmxChoice, VmxProfile};
use hypernest_vmcs::{Caps, ExitReason, Field, exit, pin, proc1, proc2};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, eax, ecx, edx};

/// The virtual-APIC page, the APIC-access page, a posted-interrupt descriptor.
pub const VIRTUAL: u64 = PAGES;
pub const ACCESS: u64 = PAGES + 0x1000;
pub const POSTED: u64 = PAGES + 0x2040;
/// What the guest saw.
pub const SEEN: u64 = PAGES + 0x3000;

pub const TPR: u64 = 0x80;
pub const PPR: u64 = 0xa0;
pub const EOI: u64 = 0xb0;
pub const ISR: u64 = 0x100;
pub const IRR: u64 = 0x200;
pub const ICR: u64 = 0x300;
pub const ICR_HIGH: u64 = 0x310;

pub const RFLAGS_IF: u64 = 1 << 9 | 2;
pub const NOTIFICATION: u64 = 0xf2;

pub fn caps() -> Caps {
    VmxProfile::max(<&Model>::default()).caps
}

/// What of the APIC is virtualized.
#[derive(Clone, Copy, Default)]
pub struct Controls {
    pub pin: u32,
    pub proc1: u32,
    pub proc2: u32,
    pub proc3: u64,
    pub exit: u32,
}

/// MOV CR8 alone.
pub const SHADOW: Controls = Controls {
    pin: 0,
    proc1: proc1::USE_TPR_SHADOW,
    proc2: 0,
    proc3: 0,
    exit: 0,
};
/// And of the memory-mapped registers the task priority.
pub const PAGE: Controls = Controls {
    proc2: proc2::VIRTUALIZE_APIC_ACCESSES,
    ..SHADOW
};
/// And the others.
pub const REGISTERS: Controls = Controls {
    proc2: PAGE.proc2 | proc2::APIC_REGISTER_VIRTUALIZATION,
    ..PAGE
};
/// And interrupts.
pub const DELIVERY: Controls = Controls {
    proc2: REGISTERS.proc2 | proc2::VIRTUAL_INTERRUPT_DELIVERY,
    ..REGISTERS
};
/// And interrupts that others post.
pub const POSTING: Controls = Controls {
    pin: pin::PROCESS_POSTED_INTERRUPTS,
    exit: exit::ACKNOWLEDGE_INTERRUPT_ON_EXIT,
    ..DELIVERY
};
/// The MSRs of x2APIC mode.
pub const X2APIC: Controls = Controls {
    proc2: proc2::VIRTUALIZE_X2APIC_MODE,
    ..SHADOW
};

/// And interrupts, in that mode.
pub const MSRS: Controls = Controls {
    proc1: SHADOW.proc1 | proc1::USE_MSR_BITMAPS,
    proc2: proc2::VIRTUALIZE_X2APIC_MODE | proc2::VIRTUAL_INTERRUPT_DELIVERY,
    ..SHADOW
};

/// A hypervisor that has not started `guest` yet.
pub fn l1(controls: Controls, fields: &[(Field, u64)], guest: Emit) -> L1 {
    let max = VmxChoice::Max.profile(<&Model>::default());
    l1_with(controls, fields, guest, max.unwrap().unwrap())
}

/// The same on a processor with this VMX.
pub fn l1_with(
    controls: Controls,
    fields: &[(Field, u64)],
    guest: Emit,
    profile: Arc<VmxProfile>,
) -> L1 {
    let caps = caps();
    let pins = caps.pin_allowed0() | pin::EXTERNAL_INTERRUPT_EXITING | controls.pin;
    let first = caps.proc1_allowed0()
        | proc1::HLT_EXITING
        | proc1::ACTIVATE_SECONDARY_CONTROLS
        | controls.proc1
        | if controls.proc3 == 0 {
            0
        } else {
            proc1::ACTIVATE_TERTIARY_CONTROLS
        };
    let exits = caps.exit_allowed0() | exit::HOST_ADDRESS_SPACE_SIZE | controls.exit;
    let mut all = vec![
        (Field::PIN_BASED_VM_EXEC_CONTROL, u64::from(pins)),
        (Field::CPU_BASED_VM_EXEC_CONTROL, u64::from(first)),
        (Field::VM_EXIT_CONTROLS, u64::from(exits)),
        (Field::TERTIARY_VM_EXEC_CONTROL, controls.proc3),
        (Field::VIRTUAL_APIC_PAGE_ADDR, VIRTUAL),
        (Field::APIC_ACCESS_ADDR, ACCESS),
        (Field::POSTED_INTR_NV, NOTIFICATION),
        (Field::POSTED_INTR_DESC_ADDR, POSTED),
    ];
    all.extend_from_slice(fields);
    let setup = Setup {
        choice: VmxChoice::Max,
        proc2: controls.proc2,
        fields: &all,
        guest,
    };
    L1::with(&setup, profile)
}

/// Runs `guest` to its first exit.
pub fn start(controls: Controls, fields: &[(Field, u64)], guest: Emit) -> L1 {
    let mut l1 = l1(controls, fields, guest);
    l1.run();
    l1
}

pub fn reason(reason: ExitReason) -> u64 {
    u64::from(reason.0)
}

/// A register of the virtual-APIC page.
pub fn register(l1: &L1, offset: u64) -> u32 {
    u32::from_le_bytes(l1.ram.load(VIRTUAL + offset).unwrap())
}

pub fn set_register(l1: &mut L1, offset: u64, value: u32) {
    l1.ram
        .write(VIRTUAL + offset, &value.to_le_bytes())
        .unwrap();
}

/// Sets a vector in one of the sets of 256 bits.
pub fn set_vector(l1: &mut L1, set: u64, vector: u8) {
    let at = set + u64::from(vector >> 5) * 16;
    let word = register(l1, at) | 1 << (vector & 31);
    set_register(l1, at, word);
}

pub fn has_vector(l1: &L1, set: u64, vector: u8) -> bool {
    register(l1, set + u64::from(vector >> 5) * 16) >> (vector & 31) & 1 != 0
}

/// RVI and SVI.
pub fn status(l1: &L1) -> (u64, u64) {
    let value = l1.field(Field::GUEST_INTR_STATUS);
    (value & 0xff, value >> 8)
}

/// The vector of the handler that the guest left by its HLT.
pub fn handled(l1: &L1) -> u64 {
    assert_eq!(l1.reason(), ExitReason::HLT);
    (l1.field(Field::GUEST_RIP) - HANDLERS) / 16
}

/// An MSR bitmap of zeros, and #GP exits.
pub const MSR_FIELDS: [(Field, u64); 2] = [
    (Field::MSR_BITMAP, PAGES + 0x4000),
    (Field::EXCEPTION_BITMAP, 1 << 13),
];

pub fn write_msr(a: &mut CodeAssembler, number: u32, low: u32, high: u32) -> Result<(), IcedError> {
    a.mov(ecx, number)?;
    a.mov(eax, low)?;
    a.mov(edx, high)?;
    a.wrmsr()
}

/// Reason and qualification of APIC-access exits.
pub fn access(kind: u64, offset: u64) -> (u64, u64) {
    (reason(ExitReason::APIC_ACCESS), kind << 12 | offset)
}
