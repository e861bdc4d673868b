//! The local APIC's registers: in memory (xAPIC), as MSRs (x2APIC), and the MSRs beside them.

use super::{Apic, FIRST_VECTOR, Targets, base, esr, highest, lvt, set_bit, svr};
use crate::bus::{DeliveryMode, InterruptMessage, Tick};
use crate::mem::Ctx;
use crate::model::Feature;
use crate::state::{ApicState, MsrState};
use crate::trap::{Exec, GP0};

/// Register numbers: MSR less 800H, and offset in the page divided by 16
/// (Vol. 3A, "Local APIC Register Address Map", "x2APIC Register Address Space").
mod register {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const ARBITRATION: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const REMOTE_READ: u32 = 0x0c;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const IRR_LAST: u32 = 0x27;
    pub const ESR: u32 = 0x28;
    pub const LVT_CMCI: u32 = 0x2f;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}
use register::*;

/// Integrated APIC, seven LVT entries, EOI broadcast can be suppressed.
const VERSION_VALUE: u32 = 1 << 24 | 6 << 16 | 0x14;

/// Writable bits of each LVT entry.
const LVT_BITS: [u32; 7] = [
    0x1_07ff, // CMCI
    0x7_00ff, // timer
    0x1_07ff, // thermal
    0x1_07ff, // performance
    0x1_a7ff, // LINT0
    0x1_a7ff, // LINT1
    0x1_00ff, // error
];
/// Delivery status and remote IRR: read-only, no fault when written.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

const SVR_BITS: u32 = 0x11ff;
/// Interrupt command register, low half: all but the reserved bits and the delivery status.
const ICR_BITS: u32 = 0x000c_cfff;
const ICR_STATUS: u32 = 1 << 12;
const ICR_LOGICAL: u32 = 1 << 11;
const ICR_ASSERT: u32 = 1 << 14;
const ICR_LEVEL: u32 = 1 << 15;

const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const X2APIC_FIRST: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8ff;

fn lvt_index(number: u32) -> usize {
    if number == LVT_CMCI {
        0
    } else {
        (number - LVT_TIMER) as usize + 1
    }
}

impl Apic {
    /// A readable register's value, those of one mode alone excepted.
    fn read(&self, number: u32, now: Tick) -> Option<u32> {
        let state = &self.state;
        let word = |bits: &[u32; 8], first: u32| bits[(number - first) as usize];
        Some(match number {
            VERSION => VERSION_VALUE,
            TPR => u32::from(state.tpr),
            PPR => u32::from(self.priority()),
            LDR => self.ldr(),
            SVR => state.svr,
            ISR..TMR => word(&state.isr, ISR),
            TMR..IRR => word(&state.tmr, TMR),
            IRR..=IRR_LAST => word(&state.irr, IRR),
            ESR => state.esr,
            LVT_CMCI | LVT_TIMER..=LVT_ERROR => state.lvt[lvt_index(number)],
            ICR => state.icr_low,
            INITIAL_COUNT => state.timer_initial,
            CURRENT_COUNT => self.current_count(now),
            DIVIDE => state.timer_divide,
            _ => return None,
        })
    }

    /// Writes a register that both modes have. False where there is none.
    fn write(&mut self, number: u32, value: u32, now: Tick, msrs: &mut MsrState) -> bool {
        match number {
            TPR => self.state.tpr = value as u8,
            SVR => self.set_svr(value & SVR_BITS),
            ESR => {
                self.state.esr = core::mem::take(&mut self.state.esr_pending);
            }
            LVT_CMCI | LVT_TIMER..=LVT_ERROR => {
                let n = lvt_index(number);
                let mut entry = value & LVT_BITS[n];
                if self.state.svr & svr::ENABLED == 0 {
                    entry |= lvt::MASKED;
                }
                if n == lvt::TIMER {
                    self.set_timer_entry(entry, msrs);
                } else {
                    self.state.lvt[n] = entry;
                }
            }
            ICR => {
                self.state.icr_low = value & ICR_BITS;
                self.send();
            }
            INITIAL_COUNT => self.set_initial_count(now, value),
            DIVIDE => self.set_divide(now, value),
            _ => return false,
        }
        true
    }

    /// Switching off by software masks every LVT entry.
    fn set_svr(&mut self, value: u32) {
        self.state.svr = value;
        if value & svr::ENABLED == 0 {
            for entry in &mut self.state.lvt {
                *entry |= lvt::MASKED;
            }
        }
    }

    /// Sends what the ICR says (Vol. 3A, "Interrupt Command Register (ICR)").
    fn send(&mut self) {
        let icr = self.state.icr_low;
        let vector = icr as u8;
        let delivery = match icr >> 8 & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            4 => DeliveryMode::Nmi,
            5 => DeliveryMode::Init,
            6 => DeliveryMode::StartUp,
            _ => return,
        };
        if delivery == DeliveryMode::Init && icr & (ICR_LEVEL | ICR_ASSERT) == ICR_LEVEL {
            return; // INIT level de-assert: for processors before the Pentium 4.
        }
        let fixed = matches!(delivery, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if fixed && vector < FIRST_VECTOR {
            self.error(esr::SEND_ILLEGAL_VECTOR);
            return;
        }
        let targets = match icr >> 18 & 3 {
            0 => Targets::Destination,
            1 => Targets::Itself,
            2 => Targets::All,
            _ => Targets::Others,
        };
        let destination = if self.x2apic() {
            self.state.icr_high
        } else {
            self.state.icr_high >> 24
        };
        let message = InterruptMessage {
            destination,
            logical: icr & ICR_LOGICAL != 0,
            delivery,
            vector,
            level_triggered: false,
        };
        self.outbox.push((message, targets));
    }

    /// A write to IA32_APIC_BASE. False where it raises #GP.
    fn set_base(&mut self, value: u64, physical_bits: u32, has_x2apic: bool) -> bool {
        let modes = base::ENABLED | base::X2APIC;
        let address = base::ADDRESS & ((1 << physical_bits) - 1);
        let writable = address
            | base::BOOT_PROCESSOR
            | base::ENABLED
            | if has_x2apic { base::X2APIC } else { 0 };
        let (old, new) = (self.base & modes, value & modes);
        let allowed = new == old
            || new == 0
            || new == base::ENABLED && old == 0
            || new == modes && old == base::ENABLED;
        if value & !writable != 0 || !allowed {
            return false;
        }
        if old != new && new == 0 {
            // What it held is lost, as at power-up.
            self.state = ApicState {
                nmi_pending: self.state.nmi_pending,
                init_pending: self.state.init_pending,
                sipi_pending: self.state.sipi_pending,
                ..ApicState::reset(self.state.id)
            };
        }
        self.base = value;
        true
    }
}

/// End of interrupt: the highest in service; told to the I/O APICs where it was level-triggered.
pub(crate) fn end_of_interrupt(x: &mut Ctx) {
    let state = &mut x.cpu.apic.state;
    let Some(vector) = highest(&state.isr) else {
        return;
    };
    set_bit(&mut state.isr, vector, false);
    let level = super::bit_is_set(&state.tmr, vector);
    if level && state.svr & svr::NO_EOI_BROADCAST == 0 {
        x.bus.end_of_interrupt(x.now, vector);
    }
}

fn settle(x: &mut Ctx) {
    x.cpu.apic.settle(x.now, &mut x.cpu.msrs);
}

/// A load from the register page. Registers are 32 bits wide, one in 16 bytes; the rest reads
/// as zero.
pub(crate) fn load(x: &mut Ctx, offset: u64, width: usize) -> u64 {
    settle(x);
    let apic = &mut x.cpu.apic;
    let number = (offset >> 4) as u32;
    let value = match number {
        ID => u32::from(apic.state.xapic_id) << 24,
        ARBITRATION => u32::from(apic.priority()),
        EOI | REMOTE_READ => 0,
        DFR => apic.state.dfr,
        ICR_HIGH => apic.state.icr_high,
        _ => apic.read(number, x.now).unwrap_or_else(|| {
            apic.error(esr::ILLEGAL_REGISTER);
            0
        }),
    };
    let shift = 8 * (offset & 15);
    let value = u64::from(value).checked_shr(shift as u32).unwrap_or(0);
    value & crate::operand::mask(width)
}

/// A store to the register page. Only whole registers can be written.
pub(crate) fn store(x: &mut Ctx, offset: u64, width: usize, value: u64) {
    if offset & 15 != 0 || width < 4 {
        return;
    }
    settle(x);
    let value = value as u32;
    let apic = &mut x.cpu.apic;
    match (offset >> 4) as u32 {
        ID => apic.state.xapic_id = (value >> 24) as u8,
        EOI => end_of_interrupt(x),
        LDR => apic.state.ldr = value & 0xff00_0000,
        DFR => apic.state.dfr = value | 0x0fff_ffff,
        ICR_HIGH => apic.state.icr_high = value & 0xff00_0000,
        VERSION | ARBITRATION | PPR | REMOTE_READ | ISR..=IRR_LAST | CURRENT_COUNT => {}
        number => {
            if !apic.write(number, value, x.now, &mut x.cpu.msrs) {
                x.cpu.apic.error(esr::ILLEGAL_REGISTER);
            }
        }
    }
}

/// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE and 800H-8FFH.
pub(crate) fn msr_read(x: &mut Ctx, msr: u32) -> Exec<u64> {
    settle(x);
    x.cpu.touched_outside();
    let apic = &x.cpu.apic;
    match msr {
        IA32_APIC_BASE => Ok(apic.base),
        IA32_TSC_DEADLINE if x.cpu.model.has(Feature::TscDeadline) => Ok(x.cpu.msrs.tsc_deadline),
        X2APIC_FIRST..=X2APIC_LAST if apic.x2apic() => {
            let low = match msr - X2APIC_FIRST {
                ID => apic.state.id,
                number => apic.read(number, x.now).ok_or(GP0)?,
            };
            let high = if msr - X2APIC_FIRST == ICR {
                apic.state.icr_high
            } else {
                0
            };
            Ok(u64::from(high) << 32 | u64::from(low))
        }
        _ => Err(GP0),
    }
}

/// WRMSR of the same.
pub(crate) fn msr_write(x: &mut Ctx, msr: u32, value: u64) -> Exec {
    settle(x);
    x.cpu.touched_outside();
    let model = x.cpu.model;
    match msr {
        IA32_APIC_BASE => {
            let has_x2apic = model.has(Feature::X2apic);
            if !x.cpu.apic.set_base(value, model.physical_bits, has_x2apic) {
                return Err(GP0);
            }
            x.cpu.msrs.apic_base = value;
            if !x.cpu.apic.present() {
                x.cpu.msrs.tsc_deadline = 0;
            }
            // The register page is not RAM, whatever was cached for it.
            x.cpu.flush_tlb();
            Ok(())
        }
        IA32_TSC_DEADLINE if model.has(Feature::TscDeadline) => {
            let cpu = &mut *x.cpu;
            cpu.apic.set_tsc_deadline(x.now, value, &mut cpu.msrs);
            Ok(())
        }
        X2APIC_FIRST..=X2APIC_LAST if x.cpu.apic.x2apic() => {
            write_x2apic(x, msr - X2APIC_FIRST, value)
        }
        _ => Err(GP0),
    }
}

/// In x2APIC mode a reserved bit set, or a write to what cannot be written, raises #GP.
fn write_x2apic(x: &mut Ctx, number: u32, value: u64) -> Exec {
    let icr = u64::from(ICR_BITS | ICR_STATUS) | 0xffff_ffff << 32;
    let allowed = match number {
        TPR | SELF_IPI => 0xff,
        EOI | ESR => 0,
        SVR => u64::from(SVR_BITS),
        ICR => icr,
        LVT_CMCI | LVT_TIMER..=LVT_ERROR => u64::from(LVT_BITS[lvt_index(number)] | LVT_READ_ONLY),
        INITIAL_COUNT => 0xffff_ffff,
        DIVIDE => 0xb,
        _ => return Err(GP0),
    };
    if value & !allowed != 0 {
        return Err(GP0);
    }
    match number {
        EOI => end_of_interrupt(x),
        SELF_IPI => {
            // As a fixed IPI to itself; the ICR does not show it.
            let apic = &mut x.cpu.apic;
            if value < u64::from(FIRST_VECTOR) {
                apic.error(esr::SEND_ILLEGAL_VECTOR);
            } else {
                apic.request(value as u8, false);
            }
        }
        _ => {
            let apic = &mut x.cpu.apic;
            if number == ICR {
                apic.state.icr_high = (value >> 32) as u32;
            }
            apic.write(number, value as u32, x.now, &mut x.cpu.msrs);
        }
    }
    Ok(())
}
