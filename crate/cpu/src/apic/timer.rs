//! The APIC timer (Vol. 3A, "APIC Timer").
//!
//! The counter is not stepped: kept is the tick at which it reaches zero. While the timer's
//! interrupt is masked nothing is due, and what passed meanwhile is settled when a register is
//! next touched, so that the state depends on what the guest did alone.

use super::{Apic, lvt};
use crate::bus::Tick;
use crate::clock::{TICKS_PER_APIC_COUNT, tick_of_tsc, tsc_at};
use crate::state::MsrState;
use crate::vcpu::Vcpu;

/// Mode bits of the timer's LVT entry.
const MODE: u32 = 3 << 17;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;

impl Apic {
    /// The tick at which the timer interrupts.
    pub fn deadline(&self) -> Option<Tick> {
        if self.state.lvt[lvt::TIMER] & lvt::MASKED != 0 {
            return None;
        }
        self.state.timer_deadline
    }

    /// Lets the timer interrupt where it is due at or before `now`.
    pub fn advance(&mut self, now: Tick, msrs: &mut MsrState) {
        if self.deadline().is_some_and(|due| due <= now) {
            self.settle(now, msrs);
        }
    }

    /// Brings the timer up to `now`.
    pub(super) fn settle(&mut self, now: Tick, msrs: &mut MsrState) {
        let Some(due) = self.state.timer_deadline.filter(|due| *due <= now) else {
            return;
        };
        let entry = self.state.lvt[lvt::TIMER];
        self.state.timer_deadline = match entry & MODE {
            PERIODIC => self.period().map(|period| {
                let missed = (now - due) / period;
                due.saturating_add(missed.saturating_add(1).saturating_mul(period))
            }),
            TSC_DEADLINE => {
                msrs.tsc_deadline = 0;
                None
            }
            _ => None,
        };
        if entry & lvt::MASKED == 0 {
            self.request(entry as u8, false);
        }
    }

    /// Ticks per count.
    fn count_ticks(&self) -> u64 {
        let divide = self.state.timer_divide;
        // Bits 3, 1 and 0: 2, 4, .. 128, then 1.
        let power = ((divide & 3 | divide >> 1 & 4) + 1) & 7;
        TICKS_PER_APIC_COUNT << power
    }

    /// Ticks from the initial count to zero.
    fn period(&self) -> Option<u64> {
        match self.state.timer_initial {
            0 => None,
            count => Some(u64::from(count) * self.count_ticks()),
        }
    }

    fn is_deadline_mode(&self) -> bool {
        self.state.lvt[lvt::TIMER] & MODE == TSC_DEADLINE
    }

    /// The current-count register. The timer is settled.
    pub(super) fn current_count(&self, now: Tick) -> u32 {
        if self.is_deadline_mode() {
            return 0;
        }
        let left = self.state.timer_deadline.map_or(0, |due| due - now);
        left.div_ceil(self.count_ticks()) as u32
    }

    /// A write to the initial-count register: starts or stops the counter.
    pub(super) fn set_initial_count(&mut self, now: Tick, count: u32) {
        if self.is_deadline_mode() {
            return;
        }
        self.state.timer_initial = count;
        self.state.timer_deadline = self.period().map(|ticks| now.saturating_add(ticks));
    }

    /// A write to the divide-configuration register; a running counter goes on from its count.
    pub(super) fn set_divide(&mut self, now: Tick, divide: u32) {
        let count = self.current_count(now);
        self.state.timer_divide = divide & 0xb;
        if self.state.timer_deadline.is_some() && !self.is_deadline_mode() {
            let ticks = u64::from(count) * self.count_ticks();
            self.state.timer_deadline = Some(now.saturating_add(ticks));
        }
    }

    /// A write to the timer's LVT entry. Going to or from TSC-deadline mode disarms the timer.
    pub(super) fn set_timer_entry(&mut self, entry: u32, msrs: &mut MsrState) {
        let was_deadline = self.is_deadline_mode();
        self.state.lvt[lvt::TIMER] = entry;
        if was_deadline != self.is_deadline_mode() {
            self.state.timer_deadline = None;
            self.state.timer_initial = 0;
            msrs.tsc_deadline = 0;
        }
    }

    /// A write to IA32_TSC_DEADLINE. The timer is settled.
    pub(super) fn set_tsc_deadline(&mut self, now: Tick, value: u64, msrs: &mut MsrState) {
        if !self.is_deadline_mode() {
            return;
        }
        msrs.tsc_deadline = value;
        self.arm_tsc_deadline(now, msrs);
    }

    fn arm_tsc_deadline(&mut self, now: Tick, msrs: &mut MsrState) {
        let tsc = tsc_at(now).wrapping_add(msrs.tsc_offset);
        self.state.timer_deadline = match msrs.tsc_deadline {
            0 => None,
            deadline => Some(now.saturating_add(tick_of_tsc(deadline.saturating_sub(tsc)))),
        };
        self.settle(now, msrs);
    }
}

impl Vcpu {
    /// To be called after the TSC was written: a TSC deadline is now at another tick.
    pub fn tsc_changed(&mut self, now: Tick) {
        if self.apic.is_deadline_mode() {
            self.apic.arm_tsc_deadline(now, &mut self.msrs);
            self.touched_outside();
        }
    }
}
