//! The synthetic model-specific registers (TLFS, "Register Mappings"). What is not here raises #GP(0).

use super::{share, state, synic, time};
use crate::clock;
use crate::mem::Ctx;
use crate::trap::{Exec, GP0};

const GUEST_OS_ID: u32 = 0x4000_0000;
const HYPERCALL: u32 = 0x4000_0001;
const VP_INDEX: u32 = 0x4000_0002;
const TIME_REF_COUNT: u32 = 0x4000_0020;
const REFERENCE_TSC: u32 = 0x4000_0021;
const TSC_FREQUENCY: u32 = 0x4000_0022;
const APIC_FREQUENCY: u32 = 0x4000_0023;
const EOI: u32 = 0x4000_0070;
const ICR: u32 = 0x4000_0071;
const TPR: u32 = 0x4000_0072;
const VP_ASSIST_PAGE: u32 = 0x4000_0073;
const SCONTROL: u32 = 0x4000_0080;
const SVERSION: u32 = 0x4000_0081;
const SIEFP: u32 = 0x4000_0082;
const SIMP: u32 = 0x4000_0083;
const EOM: u32 = 0x4000_0084;
const SINT0: u32 = 0x4000_0090;
const SINT15: u32 = 0x4000_009f;
const STIMER0_CONFIG: u32 = 0x4000_00b0;
const STIMER3_COUNT: u32 = 0x4000_00b7;
const TSC_INVARIANT_CONTROL: u32 = 0x4000_0118;

/// Registers of the local APIC, by their place in its page.
const APIC_TPR: u64 = 0x80;
const APIC_EOI: u64 = 0xb0;
const APIC_ICR_LOW: u64 = 0x300;
const APIC_ICR_HIGH: u64 = 0x310;

/// HV_X64_MSR_HYPERCALL: the page is there (0), the register can no longer be written (1).
const HYPERCALL_ENABLED: u64 = 1;
const HYPERCALL_LOCKED: u64 = 1 << 1;
/// What a hypercall page holds: VMCALL, RET.
const HYPERCALL_PAGE: [u8; 4] = [0x0f, 0x01, 0xc1, 0xc3];

/// Whether the number is one of the interface's.
pub(crate) fn is_register(number: u32) -> bool {
    matches!(number, 0x4000_0000..=0x4000_1fff)
}

/// The value of a register.
pub(crate) fn read(x: &mut Ctx, number: u32) -> Exec<u64> {
    let (now, index) = (x.now, u64::from(x.cpu.apic.id()));
    let Some(state) = state(x) else {
        return Err(GP0);
    };
    Ok(match number {
        GUEST_OS_ID => state.guest_os_id,
        HYPERCALL => state.hypercall,
        VP_INDEX => index,
        TIME_REF_COUNT => time::reference(now),
        REFERENCE_TSC => state.reference_tsc,
        TSC_FREQUENCY => clock::TSC_HZ,
        APIC_FREQUENCY => clock::APIC_HZ,
        ICR => {
            let high = crate::apic::load(x, APIC_ICR_HIGH, 4);
            high << 32 | crate::apic::load(x, APIC_ICR_LOW, 4)
        }
        TPR => crate::apic::load(x, APIC_TPR, 4),
        VP_ASSIST_PAGE => state.assist_page,
        SCONTROL => state.scontrol,
        SVERSION => 1,
        SIEFP => state.siefp,
        SIMP => state.simp,
        EOM => 0,
        SINT0..=SINT15 => state.sint[(number - SINT0) as usize],
        STIMER0_CONFIG..=STIMER3_COUNT => {
            let timer = &state.timers[((number - STIMER0_CONFIG) / 2) as usize];
            if number & 1 == 0 {
                timer.config
            } else {
                timer.count
            }
        }
        TSC_INVARIANT_CONTROL => state.tsc_invariant,
        _ => return Err(GP0),
    })
}

/// Writes a register.
pub(crate) fn write(x: &mut Ctx, number: u32, value: u64) -> Exec {
    let Some(state) = state(x) else {
        return Err(GP0);
    };
    match number {
        GUEST_OS_ID => {
            state.guest_os_id = value;
            // Without an identity there is no hypercall page.
            if value == 0 {
                state.hypercall &= !HYPERCALL_ENABLED;
            }
            share(x);
        }
        HYPERCALL => return set_hypercall(x, value),
        REFERENCE_TSC => time::set_reference_tsc(x, value),
        EOI => {
            crate::apic::store(x, APIC_EOI, 4, 0);
            x.cpu.touched_outside();
        }
        ICR => {
            crate::apic::store(x, APIC_ICR_HIGH, 4, value >> 32);
            crate::apic::store(x, APIC_ICR_LOW, 4, value & 0xffff_ffff);
            x.cpu.touched_outside();
        }
        TPR if value >> 8 == 0 => {
            crate::apic::store(x, APIC_TPR, 4, value);
            x.cpu.touched_outside();
        }
        VP_ASSIST_PAGE => {
            state.assist_page = value;
            // What tells of interrupts begins anew; the rest may be in use already.
            if let Some(page) = super::page(value) {
                x.store_physical(page, &[0; 4]);
            }
        }
        SCONTROL if value >> 1 == 0 => state.scontrol = value,
        SIEFP => {
            state.siefp = value;
            clear_page(x, value);
        }
        SIMP => {
            state.simp = value;
            clear_page(x, value);
        }
        EOM => synic::end_of_message(x),
        SINT0..=SINT15 => return synic::set_source(x, (number - SINT0) as usize, value),
        STIMER0_CONFIG..=STIMER3_COUNT => {
            let timer = ((number - STIMER0_CONFIG) / 2) as usize;
            if number & 1 == 0 {
                synic::set_config(x, timer, value);
            } else {
                synic::set_count(x, timer, value);
            }
        }
        TSC_INVARIANT_CONTROL if value >> 1 == 0 => {
            state.tsc_invariant = value;
            share(x);
        }
        _ => return Err(GP0),
    }
    Ok(())
}

fn clear_page(x: &mut Ctx, register: u64) {
    if let Some(page) = super::page(register) {
        x.store_physical(page, &[0; 4096]);
    }
}

/// Deviation: the hypercall page lies in RAM, not over it.
fn set_hypercall(x: &mut Ctx, value: u64) -> Exec {
    let Some(state) = state(x) else {
        return Err(GP0);
    };
    if state.hypercall & HYPERCALL_LOCKED != 0 {
        return Ok(());
    }
    state.hypercall = if state.guest_os_id == 0 {
        value & !HYPERCALL_ENABLED
    } else {
        value
    };
    if let Some(page) = super::page(state.hypercall) {
        x.store_physical(page, &HYPERCALL_PAGE);
    }
    share(x);
    Ok(())
}
