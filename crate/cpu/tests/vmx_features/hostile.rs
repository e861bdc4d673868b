//! A saved state may hold any VMCS: whatever comes of it, it comes to the guest.

use hypernest_vmcs::{Field, proc1, proc2, vmfunc};
use iced_x86::code_asm::{eax, ebx, ecx, qword_ptr, r8, rax, rdi};

use super::setup;
use crate::support::hypervisor::{
    AD, EPT, Emit, GUEST, HANDLER, L1, OTHER_VMCS, PAGES, ept_entry, eptp,
};
use crate::support::{DATA, Nothing};

const CONTROLS: u32 = proc2::ENABLE_EPT
    | proc2::ENABLE_VPID
    | proc2::ENABLE_PML
    | proc2::ENABLE_VM_FUNCTIONS
    | proc2::EPT_VIOLATION_VE
    | proc2::VMCS_SHADOWING
    | proc2::USE_TSC_SCALING
    | proc2::PAUSE_LOOP_EXITING;

/// Something of every feature, round and round.
const EVERYTHING: Emit = &|a| {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.mov(rdi, DATA)?;
    a.mov(qword_ptr(rdi), rdi)?;
    a.rdtsc()?;
    a.pause()?;
    a.mov(r8, u64::from(Field::GUEST_RIP.encoding()))?;
    a.vmread(rax, r8)?;
    a.vmwrite(r8, rax)?;
    a.xor(eax, eax)?;
    a.xor(ecx, ecx)?;
    a.vmfunc()?;
    a.mov(qword_ptr(rdi + 0x1000), rax)?;
    a.in_(eax, 0x80)?;
    a.mov(ecx, 0x277)?;
    a.rdmsr()?;
    a.inc(ebx)?;
    a.jmp(again)
};

#[test]
fn no_value_of_a_field_hurts_the_host() {
    let must = u64::from(proc1::DEFAULT1 | proc1::ACTIVATE_SECONDARY_CONTROLS);
    let controls = must
        | u64::from(proc1::USE_TSC_OFFSETTING | proc1::USE_I_O_BITMAPS | proc1::USE_MSR_BITMAPS);
    let fields = [
        (Field::CPU_BASED_VM_EXEC_CONTROL, controls),
        (Field::EPT_POINTER, eptp(EPT) | AD),
        (Field::PML_ADDRESS, PAGES),
        (Field::GUEST_PML_INDEX, 511),
        (Field::VM_FUNCTION_CONTROL, vmfunc::EPTP_SWITCHING),
        (Field::EPTP_LIST_ADDRESS, PAGES + 0x1000),
        (Field::VE_INFORMATION_ADDRESS, PAGES + 0x2000),
        (Field::VMREAD_BITMAP, PAGES + 0x3000),
        (Field::VMWRITE_BITMAP, PAGES + 0x3000),
        (Field::IO_BITMAP_A, PAGES + 0x3000),
        (Field::IO_BITMAP_B, PAGES + 0x3000),
        (Field::MSR_BITMAP, PAGES + 0x3000),
        (Field::VMCS_LINK_POINTER, OTHER_VMCS),
        (Field::TSC_MULTIPLIER, 1 << 48),
        (Field::PLE_WINDOW, 1000),
    ];
    let mut l1 = L1::new(&setup(CONTROLS, &fields, EVERYTHING));
    let revision = l1.word(OTHER_VMCS);
    l1.put(OTHER_VMCS, revision | 1 << 31);
    l1.put(PAGES + 0x1000, eptp(EPT) | AD);
    while l1.state().gpr[3] == 0 {
        let until = l1.processor.now() + 1;
        l1.processor.run(&mut l1.ram, &mut Nothing, until);
        let rip = l1.state().rip;
        assert_ne!(rip, HANDLER, "{:?} {:#x?}", l1.reason(), l1.exit());
    }
    let good = l1.state();
    assert!(good.vmx.non_root && good.rip >= GUEST);
    for field in Field::ALL {
        // Alone, and with an EPT entry gone, so that its page is missed.
        for entry in [l1.word(ept_entry(EPT, DATA + 0x1000)), 0] {
            l1.put(ept_entry(EPT, DATA + 0x1000), entry);
            let mut state = good.clone();
            state.vmx.fields.retain(|(n, _)| *n != field.encoding());
            state.vmx.fields.push((field.encoding(), !0));
            if l1.processor.write_state(0, &state).is_ok() {
                let until = l1.processor.now() + 200;
                l1.processor.run(&mut l1.ram, &mut Nothing, until);
            }
        }
        let page = DATA + 0x1000;
        l1.put(ept_entry(EPT, page), page | crate::support::hypervisor::RWX);
    }
    // Pointers to regions, likewise.
    for wild in [!0, !0 << 12, 1] {
        for which in 0..2 {
            let mut state = good.clone();
            match which {
                0 => state.vmx.region = Some(wild),
                _ => state.vmx.current = Some(wild),
            }
            // An exit that cannot be completed leaves its mark in the region.
            let store = Field::VM_EXIT_MSR_STORE_COUNT.encoding();
            state.vmx.fields.push((store, 1));
            state.vmx.fields.push((Field::PLE_WINDOW.encoding(), 0));
            if l1.processor.write_state(0, &state).is_ok() {
                let until = l1.processor.now() + 200;
                l1.processor.run(&mut l1.ram, &mut Nothing, until);
            }
        }
    }
}
