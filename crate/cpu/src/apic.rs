//! The local APIC (Vol. 3A, "Advanced Programmable Interrupt Controller").

use crate::mem::Ctx;
use crate::state::ApicState;

/// A running local APIC.
#[derive(Clone, Debug, Default)]
pub(crate) struct Apic {
    state: ApicState,
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
