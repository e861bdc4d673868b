//! Synthetic interrupts and timers (TLFS, "Virtual Interrupts and Timers"): messages of timers, and timers
//! that interrupt by a vector of their own.

use super::{HyperV, page, time};
use crate::bus::{DeliveryMode, InterruptMessage, Tick};
use crate::mem::Ctx;
use crate::ram::Ram;
use crate::state::Activity;
use crate::trap::{Exec, GP0, Trap};
use crate::vcpu::Vcpu;

/// A source of synthetic interrupts: masked (16), automatic EOI (17), polled (18); vector 7:0.
pub(super) const SINT_MASKED: u64 = 1 << 16;
const SINT_AUTO_EOI: u64 = 1 << 17;
const SINT_POLLED: u64 = 1 << 18;
/// Vectors below are of exceptions.
const FIRST_VECTOR: u8 = 16;

/// Configuration of a timer: enabled, periodic, enabled by its count; direct mode with its vector in 11:4, or
/// a source of synthetic interrupts in 19:16.
mod timer {
    pub const ENABLED: u64 = 1;
    pub const PERIODIC: u64 = 1 << 1;
    pub const AUTO_ENABLE: u64 = 1 << 3;
    pub const DIRECT: u64 = 1 << 12;
    pub const BITS: u64 = 0xf | 0xff << 4 | DIRECT | 0xf << 16;

    pub fn vector(config: u64) -> u8 {
        (config >> 4) as u8
    }

    pub fn source(config: u64) -> usize {
        (config >> 16 & 0xf) as usize
    }
}

/// HvMessageTimerExpired.
const MESSAGE_TIMER: u32 = 0x8000_0010;
/// Bytes of a message slot.
const SLOT: u64 = 256;
/// Flags of a message: another one waits for its slot.
const MESSAGE_PENDING: u8 = 1;

/// A write to HV_X64_MSR_SINTn.
pub(super) fn set_source(x: &mut Ctx, n: usize, value: u64) -> Exec {
    let masked = value & SINT_MASKED != 0;
    if value & !(0xff | SINT_MASKED | SINT_AUTO_EOI | SINT_POLLED) != 0
        || !masked && (value as u8) < FIRST_VECTOR
    {
        return Err(GP0);
    }
    if !masked && value & SINT_AUTO_EOI != 0 {
        return Err(Trap::Unimplemented(
            "automatic EOI of synthetic interrupts, which CPUID advises against",
        ));
    }
    if let Some(state) = super::state(x) {
        state.sint[n] = value;
    }
    Ok(())
}

/// A write to HV_X64_MSR_STIMERn_CONFIG: the timer starts anew or stops.
pub(super) fn set_config(x: &mut Ctx, n: usize, value: u64) {
    let now = x.now;
    let Some(state) = super::state(x) else { return };
    let timer = &mut state.timers[n];
    let mut config = value & timer::BITS;
    // Without a source that could tell of it there is nothing to start.
    if config & timer::DIRECT == 0 && timer::source(config) == 0 {
        config &= !timer::ENABLED;
    }
    timer.config = config;
    timer.message_waits = false;
    start(timer, now);
    x.cpu.touched_outside();
}

/// A write to HV_X64_MSR_STIMERn_COUNT.
pub(super) fn set_count(x: &mut Ctx, n: usize, value: u64) {
    let now = x.now;
    let Some(state) = super::state(x) else { return };
    let timer = &mut state.timers[n];
    timer.count = value;
    if value == 0 {
        timer.config &= !timer::ENABLED;
    } else if timer.config & timer::AUTO_ENABLE != 0 {
        timer.config |= timer::ENABLED;
    }
    timer.message_waits = false;
    start(timer, now);
    x.cpu.touched_outside();
}

fn start(timer: &mut super::SyntheticTimerState, now: Tick) {
    let running = timer.config & timer::ENABLED != 0 && timer.count != 0;
    timer.expiration = running.then(|| {
        if timer.config & timer::PERIODIC != 0 {
            time::reference(now).saturating_add(timer.count)
        } else {
            timer.count
        }
    });
}

/// The tick at which the next timer expires.
pub(crate) fn deadline(cpu: &Vcpu) -> Option<Tick> {
    let hyperv = cpu.hyperv.as_ref()?;
    let timers = hyperv.state.timers.iter();
    timers
        .filter_map(|timer| timer.expiration)
        .map(time::tick_of)
        .min()
}

/// Lets the timers expire that are due.
pub(super) fn expire(cpu: &mut Vcpu, ram: &mut Ram, now: Tick) {
    let Some(mut hyperv) = cpu.hyperv.take() else {
        return;
    };
    let time = time::reference(now);
    for n in 0..hyperv.state.timers.len() {
        let timer = &mut hyperv.state.timers[n];
        let Some(due) = timer.expiration.filter(|due| *due <= time) else {
            continue;
        };
        if timer.config & timer::PERIODIC != 0 {
            let missed = (time - due) / timer.count;
            let next = missed.saturating_add(1).saturating_mul(timer.count);
            timer.expiration = Some(due.saturating_add(next));
        } else {
            timer.expiration = None;
            timer.config &= !timer::ENABLED;
        }
        if timer.config & timer::DIRECT != 0 {
            interrupt(cpu, timer::vector(timer.config));
        } else {
            let waits = !send(cpu, &mut hyperv, ram, n, due, time);
            hyperv.state.timers[n].message_waits = waits;
        }
    }
    cpu.hyperv = Some(hyperv);
}

/// A fixed, edge-triggered interrupt of this vCPU.
fn interrupt(cpu: &mut Vcpu, vector: u8) {
    if cpu.activity == Activity::WaitForSipi {
        return;
    }
    cpu.apic.accept(&InterruptMessage {
        destination: cpu.apic.id(),
        logical: false,
        delivery: DeliveryMode::Fixed,
        vector,
        level_triggered: false,
    });
}

/// Puts the message of timer `n` into its slot. `false` where another one is there still; it is marked then.
/// Where messages are off, or the page is not in RAM, the message is lost.
fn send(cpu: &mut Vcpu, hyperv: &mut HyperV, ram: &mut Ram, n: usize, due: u64, now: u64) -> bool {
    let state = &hyperv.state;
    let source = timer::source(state.timers[n].config);
    let Some(page) = page(state.simp).filter(|_| state.scontrol & 1 != 0) else {
        return true;
    };
    let slot = page.wrapping_add(SLOT * source as u64);
    let Ok(header) = ram.load::<8>(slot) else {
        return true;
    };
    if header[..4] != [0; 4] {
        let flags = slot.wrapping_add(5);
        // What can be read can be written.
        let _ = ram.write(flags, &[header[5] | MESSAGE_PENDING]);
        return false;
    }
    let mut message = [0; 40];
    message[..4].copy_from_slice(&MESSAGE_TIMER.to_le_bytes());
    message[4] = 24;
    message[16..20].copy_from_slice(&(n as u32).to_le_bytes());
    message[24..32].copy_from_slice(&due.to_le_bytes());
    message[32..].copy_from_slice(&now.to_le_bytes());
    let _ = ram.write(slot, &message);
    let register = state.sint[source];
    if register & (SINT_MASKED | SINT_POLLED) == 0 {
        interrupt(cpu, register as u8);
    }
    true
}

/// HV_X64_MSR_EOM: messages that wait are tried again.
pub(super) fn end_of_message(x: &mut Ctx) {
    let Some(mut hyperv) = x.cpu.hyperv.take() else {
        return;
    };
    let time = time::reference(x.now);
    for n in 0..hyperv.state.timers.len() {
        if hyperv.state.timers[n].message_waits {
            let waits = !send(x.cpu, &mut hyperv, x.ram, n, time, time);
            hyperv.state.timers[n].message_waits = waits;
        }
    }
    x.cpu.hyperv = Some(hyperv);
    x.cpu.touched_outside();
}
