//! The local APIC (Vol. 3A, "Advanced Programmable Interrupt Controller").
//!
//! Here: what it accepts, what it asks of its processor, what it sends. Its registers as the
//! guest reaches them are in `registers`, its timer in `timer`.

mod registers;
mod timer;

pub(crate) use registers::*;

use alloc::vec::Vec;

use crate::bus::{DeliveryMode, InterruptMessage};
use crate::state::{ApicState, MsrState};

/// IA32_APIC_BASE bits (Vol. 3A, "Local APIC Status and Location", "x2APIC State Transitions").
mod base {
    pub const BOOT_PROCESSOR: u64 = 1 << 8;
    pub const X2APIC: u64 = 1 << 10;
    pub const ENABLED: u64 = 1 << 11;
    pub const ADDRESS: u64 = !0xfff;
}

/// Entries of the local vector table, in the order of [`ApicState::lvt`].
mod lvt {
    pub const TIMER: usize = 1;
    pub const LINT0: usize = 4;
    pub const ERROR: usize = 6;
    pub const MASKED: u32 = 1 << 16;
    pub const DELIVERY: u32 = 7 << 8;
    pub const EXT_INT: u32 = 7 << 8;
}

/// Spurious-interrupt vector register bits.
mod svr {
    pub const ENABLED: u32 = 1 << 8;
    pub const NO_EOI_BROADCAST: u32 = 1 << 12;
}

/// Error status register bits.
mod esr {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Vectors below this one are not for interrupts.
const FIRST_VECTOR: u8 = 16;

/// A running local APIC.
#[derive(Clone, Debug, Default)]
pub(crate) struct Apic {
    state: ApicState,
    /// IA32_APIC_BASE, as [`MsrState::apic_base`] has it.
    base: u64,
    /// Sent and not yet taken; empty between instructions.
    outbox: Vec<(InterruptMessage, Targets)>,
}

/// Who an inter-processor interrupt is for (ICR destination shorthand).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Targets {
    /// Those that the message's destination matches.
    Destination,
    Itself,
    All,
    Others,
}

fn bit_is_set(bits: &[u32; 8], vector: u8) -> bool {
    bits[usize::from(vector >> 5)] >> (vector & 31) & 1 != 0
}

fn set_bit(bits: &mut [u32; 8], vector: u8, value: bool) {
    let word = &mut bits[usize::from(vector >> 5)];
    let bit = 1 << (vector & 31);
    *word = if value { *word | bit } else { *word & !bit };
}

fn highest(bits: &[u32; 8]) -> Option<u8> {
    let n = bits.iter().rposition(|word| *word != 0)?;
    Some((n as u32 * 32 + 31 - bits[n].leading_zeros()) as u8)
}

impl Apic {
    /// From the saved form.
    pub fn load(state: &ApicState, msrs: &MsrState) -> Apic {
        Apic {
            state: state.clone(),
            base: msrs.apic_base,
            outbox: Vec::new(),
        }
    }

    /// Initial APIC id, which is also the x2APIC id.
    pub fn id(&self) -> u32 {
        self.state.id
    }

    /// To the saved form.
    pub fn save(&self) -> ApicState {
        self.state.clone()
    }

    /// Not switched off by IA32_APIC_BASE. CPUID.1:EDX.APIC tells it.
    pub fn present(&self) -> bool {
        self.base & base::ENABLED != 0
    }

    fn x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    /// Not switched off by the spurious-interrupt vector register either.
    fn enabled(&self) -> bool {
        self.present() && self.state.svr & svr::ENABLED != 0
    }

    /// Page of the xAPIC registers, where they are mapped.
    pub fn xapic_page(&self) -> Option<u64> {
        (self.present() && !self.x2apic()).then_some(self.base & base::ADDRESS)
    }

    // ---- messages ----

    /// Whether a message's destination is (also) this APIC, and it would take it.
    pub fn matches(&self, message: &InterruptMessage) -> bool {
        let takes = match message.delivery {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.enabled(),
            _ => self.present(),
        };
        takes
            && if message.logical {
                self.matches_logical(message.destination)
            } else {
                self.matches_physical(message.destination)
            }
    }

    fn matches_physical(&self, destination: u32) -> bool {
        // An 8-bit message (I/O APIC, xAPIC sender) says "everyone" with ffh in either mode.
        let own = if self.x2apic() {
            self.state.id
        } else {
            u32::from(self.state.xapic_id)
        };
        destination == own || destination == 0xff || destination == u32::MAX
    }

    /// Vol. 3A, "Logical Destination Mode" and "Logical Destination Mode in x2APIC Mode".
    fn matches_logical(&self, destination: u32) -> bool {
        let ldr = self.ldr();
        if self.x2apic() {
            return destination == u32::MAX
                || destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0;
        }
        if destination == 0xff || destination == u32::MAX {
            return true;
        }
        let ldr = ldr >> 24;
        if self.state.dfr >> 28 == 0xf {
            destination & ldr & 0xff != 0
        } else {
            destination >> 4 == ldr >> 4 && destination & ldr & 0xf != 0
        }
    }

    /// Logical destination register; derived from the id in x2APIC mode.
    fn ldr(&self) -> u32 {
        if self.x2apic() {
            let id = self.state.id;
            (id >> 4) << 16 | 1 << (id & 15)
        } else {
            self.state.ldr
        }
    }

    /// Takes a message that is for this APIC.
    pub fn accept(&mut self, message: &InterruptMessage) {
        if !self.present() {
            return;
        }
        let state = &mut self.state;
        match message.delivery {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                self.request(message.vector, message.level_triggered);
            }
            DeliveryMode::Nmi => state.nmi_pending = true,
            DeliveryMode::Init => {
                state.init_pending = true;
                // A start-up IPI counts only after the INIT.
                state.sipi_pending = None;
            }
            DeliveryMode::StartUp => state.sipi_pending = Some(message.vector),
            DeliveryMode::ExtInt => state.extint_pending = true,
            // There is no system management mode.
            DeliveryMode::Smi => {}
        }
    }

    /// Puts a fixed interrupt into the IRR.
    fn request(&mut self, vector: u8, level_triggered: bool) {
        if !self.enabled() {
            return;
        }
        if vector < FIRST_VECTOR {
            self.error(esr::RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        set_bit(&mut self.state.irr, vector, true);
        set_bit(&mut self.state.tmr, vector, level_triggered);
    }

    /// Notes an error for the ESR and raises the error interrupt (Vol. 3A, "Error Handling").
    fn error(&mut self, bit: u32) {
        self.state.esr_pending |= bit;
        let entry = self.state.lvt[lvt::ERROR];
        if entry & lvt::MASKED == 0 {
            if entry as u8 >= FIRST_VECTOR {
                self.request(entry as u8, false);
            } else {
                self.state.esr_pending |= esr::RECEIVE_ILLEGAL_VECTOR;
            }
        }
    }

    /// Sends a fixed interrupt to one processor, which a posted-interrupt descriptor names: by bits 15:8,
    /// in x2APIC mode by all 32. The ICR does not show it.
    pub fn notify(&mut self, vector: u8, destination: u32) {
        let destination = if self.x2apic() {
            destination
        } else {
            destination >> 8 & 0xff
        };
        let message = InterruptMessage {
            destination,
            logical: false,
            delivery: DeliveryMode::Fixed,
            vector,
            level_triggered: false,
        };
        self.outbox.push((message, Targets::Destination));
    }

    /// The next message it sends.
    pub fn take_ipi(&mut self) -> Option<(InterruptMessage, Targets)> {
        if self.outbox.is_empty() {
            None
        } else {
            Some(self.outbox.remove(0))
        }
    }

    // ---- priorities ----

    /// Processor priority (Vol. 3A, "Task and Processor Priorities"); the lowest takes
    /// lowest-priority messages.
    pub fn priority(&self) -> u8 {
        let in_service = highest(&self.state.isr).unwrap_or(0);
        if self.state.tpr >> 4 >= in_service >> 4 {
            self.state.tpr
        } else {
            in_service & 0xf0
        }
    }

    /// The interrupt its processor would take now: the highest requested one above its priority.
    pub fn pending_vector(&self) -> Option<u8> {
        let vector = highest(&self.state.irr)?;
        (self.present() && vector >> 4 > self.priority() >> 4).then_some(vector)
    }

    /// The processor takes the pending interrupt.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(vector) = self.pending_vector() else {
            return self.state.svr as u8;
        };
        set_bit(&mut self.state.irr, vector, false);
        set_bit(&mut self.state.isr, vector, true);
        vector
    }

    /// CR8: the class of the task priority.
    pub fn cr8(&self) -> u64 {
        u64::from(self.state.tpr >> 4)
    }

    /// MOV to CR8; the caller has checked that only bits 3:0 are set, and looks for interrupts
    /// again.
    pub fn set_cr8(&mut self, value: u64) {
        self.state.tpr = (value as u8) << 4;
    }

    // ---- other events ----

    /// LINT0 passes the 8259's interrupts (or the APIC is off and they go straight in).
    pub fn extint_enabled(&self) -> bool {
        let entry = self.state.lvt[lvt::LINT0];
        !self.present() || entry & (lvt::MASKED | lvt::DELIVERY) == lvt::EXT_INT
    }

    /// An ExtINT message waits.
    pub fn extint_waiting(&self) -> bool {
        self.state.extint_pending
    }

    /// The ExtINT message is being served.
    pub fn take_extint(&mut self) {
        self.state.extint_pending = false;
    }

    /// An NMI waits.
    pub fn nmi_waiting(&self) -> bool {
        self.state.nmi_pending
    }

    /// The NMI is being served.
    pub fn take_nmi(&mut self) {
        self.state.nmi_pending = false;
    }

    /// An INIT waits.
    pub fn init_waiting(&self) -> bool {
        self.state.init_pending
    }

    /// Takes the INIT that waits.
    pub fn take_init(&mut self) -> bool {
        core::mem::take(&mut self.state.init_pending)
    }

    /// A start-up IPI waits.
    pub fn sipi_waiting(&self) -> bool {
        self.state.sipi_pending.is_some()
    }

    /// Takes the start-up IPI that waits.
    pub fn take_sipi(&mut self) -> Option<u8> {
        self.state.sipi_pending.take()
    }
}

#[cfg(test)]
mod tests;
