//! Interrupt wires: global system interrupts (GSIs) to the 8259 pair and the I/O APIC.

use hypernest_cpu::InterruptMessage;
use serde::{Deserialize, Serialize};

use crate::devices::io_apic::{IoApic, IoApicState, PINS};
use crate::devices::pic::{Pic, PicState};

/// Who drives a wire. A wire is asserted while one of its sources asserts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source(u8);

impl Source {
    pub(crate) const PIT: Source = Source(0);
    pub(crate) const RTC: Source = Source(1);
    pub(crate) const SERIAL: Source = Source(2);
    pub(crate) const POWER: Source = Source(3);
    pub(crate) const TEST: Source = Source(4);
    pub(crate) const FIRST_VIRTIO: u8 = 8;
    const FIRST_CUSTOM: u8 = 32;
    /// Most custom devices on a board.
    pub(crate) const CUSTOM: usize = 32;

    pub(crate) fn virtio(slot: usize) -> Source {
        Source(Self::FIRST_VIRTIO + slot as u8 % 24)
    }

    pub(crate) fn custom(index: usize) -> Source {
        Source(Self::FIRST_CUSTOM + index as u8 % 32)
    }
}

/// Wires and both kinds of interrupt controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptsState {
    /// For each GSI, the set of sources that assert it.
    pub asserted: [u64; PINS as usize],
    /// The 8259 pair.
    pub pic: PicState,
    /// The I/O APIC.
    pub io_apic: IoApicState,
}

/// The interrupt controllers and the wires into them.
///
/// GSIs 0-15 are the ISA interrupts and reach both controllers, the others only the I/O APIC.
/// GSI 0 arrives at I/O APIC pin 2, as on PCs.
#[derive(Debug, Default)]
pub struct Interrupts {
    pub(crate) asserted: [u64; PINS as usize],
    pub(crate) pic: Pic,
    pub(crate) io_apic: IoApic,
}

impl Interrupts {
    /// One of the sources of a wire asserts it or lets it go. GSIs that do not exist are ignored.
    pub fn set(&mut self, source: Source, gsi: u8, level: bool) {
        let Some(sources) = self.asserted.get_mut(usize::from(gsi)) else {
            return;
        };
        let bit = 1u64 << source.0;
        let before = *sources;
        *sources = if level { before | bit } else { before & !bit };
        if *sources == before {
            return;
        }
        let level = *sources != 0;
        if gsi < 16 {
            self.pic.set_line(gsi, level);
        }
        let (pin, level) = match gsi {
            0 | 2 => (2, self.asserted[0] | self.asserted[2] != 0),
            gsi => (gsi, level),
        };
        self.io_apic.set_line(pin, level);
    }

    /// The next interrupt message.
    pub fn take_message(&mut self) -> Option<InterruptMessage> {
        self.io_apic.take_message()
    }

    /// Drops what the 8259 pair has latched.
    pub(crate) fn forget_requests(&mut self) {
        let mut state = std::mem::take(&mut self.pic.state);
        for chip in &mut state.chips {
            chip.irr = 0;
        }
        self.pic = Pic::from_state(state);
    }

    pub(crate) fn state(&self) -> InterruptsState {
        InterruptsState {
            asserted: self.asserted,
            pic: self.pic.state.clone(),
            io_apic: self.io_apic.state.clone(),
        }
    }

    pub(crate) fn restore(&mut self, state: &InterruptsState) {
        self.asserted = state.asserted;
        self.pic = Pic::from_state(state.pic.clone());
        self.io_apic = IoApic::from_state(state.io_apic.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_wire_stays_asserted_until_its_last_source_lets_go() {
        let mut interrupts = Interrupts::default();
        interrupts.set(Source::RTC, 20, true);
        interrupts.set(Source::SERIAL, 20, true);
        interrupts.set(Source::RTC, 20, false);
        assert_eq!(interrupts.io_apic.state.lines, 1 << 20);
        interrupts.set(Source::SERIAL, 20, false);
        assert_eq!(interrupts.io_apic.state.lines, 0);
    }

    #[test]
    fn gsi_0_reaches_input_0_of_the_8259_and_pin_2_of_the_io_apic() {
        let mut interrupts = Interrupts::default();
        interrupts.set(Source::PIT, 0, true);
        assert_eq!(interrupts.io_apic.state.lines, 1 << 2);
        assert_eq!(interrupts.pic.state.chips[0].irr, 1);
    }

    #[test]
    fn gsis_from_16_do_not_reach_the_8259() {
        let mut interrupts = Interrupts::default();
        interrupts.set(Source::virtio(0), 16, true);
        assert!(!interrupts.pic.intr());
        interrupts.set(Source::TEST, 24, true);
        interrupts.set(Source::TEST, 255, true);
        assert_eq!(interrupts.io_apic.state.lines, 1 << 16);
    }
}
