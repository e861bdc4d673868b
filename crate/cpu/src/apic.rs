//! The local APIC (Vol. 3A, "Advanced Programmable Interrupt Controller").

use crate::mem::Ctx;
use crate::state::ApicState;

/// A running local APIC.
#[derive(Clone, Debug, Default)]
pub(crate) struct Apic {
    state: ApicState,
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

impl Apic {
    /// From the saved form.
    pub fn load(state: &ApicState) -> Apic {
        Apic {
            state: state.clone(),
        }
    }

    /// To the saved form.
    pub fn save(&self) -> ApicState {
        self.state.clone()
    }

    pub fn deadline(&self) -> Option<crate::Tick> {
        None
    }
    pub fn advance(&mut self, _now: crate::Tick) {}
    pub fn take_ipi(&mut self) -> Option<(crate::InterruptMessage, Targets)> {
        None
    }
    pub fn matches(&self, _message: &crate::InterruptMessage) -> bool {
        false
    }
    pub fn accept(&mut self, _message: &crate::InterruptMessage) {}
    /// Processor priority, for lowest-priority delivery.
    pub fn priority(&self) -> u8 {
        0
    }
    pub fn pending_vector(&self) -> Option<u8> {
        None
    }
    pub fn acknowledge(&mut self) -> u8 {
        0
    }
    /// LINT0 passes the 8259's interrupts (or the APIC is off and they go straight in).
    pub fn extint_enabled(&self) -> bool {
        true
    }
    /// An ExtINT message waits.
    pub fn extint_waiting(&self) -> bool {
        self.state.extint_pending
    }
    pub fn take_extint(&mut self) {
        self.state.extint_pending = false;
    }
    pub fn nmi_waiting(&self) -> bool {
        self.state.nmi_pending
    }
    pub fn take_nmi(&mut self) {
        self.state.nmi_pending = false;
    }
    pub fn init_waiting(&self) -> bool {
        self.state.init_pending
    }
    pub fn take_init(&mut self) -> bool {
        core::mem::take(&mut self.state.init_pending)
    }
    pub fn sipi_waiting(&self) -> bool {
        self.state.sipi_pending.is_some()
    }
    pub fn take_sipi(&mut self) -> Option<u8> {
        self.state.sipi_pending.take()
    }

    /// Page of the xAPIC registers, where they are mapped.
    pub fn xapic_page(&self) -> Option<u64> {
        None
    }
}

/// A load from the register page.
pub(crate) fn load(_x: &mut Ctx, _offset: u64, _width: usize) -> u64 {
    0
}

/// A store to the register page.
pub(crate) fn store(_x: &mut Ctx, _offset: u64, _width: usize, _value: u64) {}
