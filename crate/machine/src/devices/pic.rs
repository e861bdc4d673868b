//! The 8259A interrupt controllers of a PC: two chips in cascade, with the ELCR of the EISA era.
//!
//! Deviation: an edge stays latched when its wire falls before the acknowledge cycle, so that
//! short pulses are not lost. The cascade input always follows the second chip's output.

use serde::{Deserialize, Serialize};

/// Names from the Intel 8259A data sheet, "Initialization Command Words" and "Operation Command
/// Words".
mod spec {
    /// ICW1: this write starts an initialisation.
    pub const ICW1_INIT: u8 = 1 << 4;
    /// ICW1: ICW4 will follow.
    pub const ICW1_IC4: u8 = 1 << 0;
    /// ICW1: no cascade, ICW3 will not follow.
    pub const ICW1_SINGLE: u8 = 1 << 1;
    /// ICW1: all inputs are level-triggered.
    pub const ICW1_LEVEL: u8 = 1 << 3;
    /// ICW4: the acknowledge cycle also ends the interrupt.
    pub const ICW4_AUTO_EOI: u8 = 1 << 1;
    /// ICW4: special fully nested mode.
    pub const ICW4_NESTED: u8 = 1 << 4;
    /// This write is OCW3, not OCW2.
    pub const OCW3: u8 = 1 << 3;
    /// OCW3: the next read polls.
    pub const OCW3_POLL: u8 = 1 << 2;
    /// OCW3: bit 0 selects the register to read.
    pub const OCW3_READ: u8 = 1 << 1;
    /// OCW3: bit 5 sets special mask mode.
    pub const OCW3_ENABLE_SPECIAL: u8 = 1 << 6;
    /// OCW3: special mask mode.
    pub const OCW3_SPECIAL: u8 = 1 << 5;
    /// Inputs that can be made level-triggered: not timer, keyboard, cascade; not RTC, FPU.
    pub const ELCR_MASK: [u8; 2] = [0xf8, 0xde];
    /// Input of the first chip where the second is wired.
    pub const CASCADE: u8 = 2;
}

/// The next byte an initialisation sequence expects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Init {
    /// None: data writes go to the mask.
    #[default]
    Done,
    /// Vector base.
    Icw2,
    /// Cascade wiring.
    Icw3,
    /// Mode.
    Icw4,
}

/// One chip.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipState {
    /// Levels of the input wires.
    pub lines: u8,
    /// Requests.
    pub irr: u8,
    /// In service.
    pub isr: u8,
    /// Masked inputs.
    pub imr: u8,
    /// Level-triggered inputs.
    pub elcr: u8,
    /// All inputs are level-triggered (ICW1).
    pub level: bool,
    /// Vector of input 0.
    pub vector_base: u8,
    /// Input with the highest priority.
    pub top: u8,
    /// Initialisation step.
    pub init: Init,
    /// ICW1 announced ICW4.
    pub expects_icw4: bool,
    /// ICW1 announced that there is no cascade.
    pub single: bool,
    /// Acknowledge cycles end the interrupt.
    pub auto_eoi: bool,
    /// Priorities rotate at each automatic end.
    pub rotate_on_auto_eoi: bool,
    /// Special mask mode: masked inputs in service block nobody.
    pub special_mask: bool,
    /// Special fully nested mode: the cascade input in service does not block itself.
    pub nested: bool,
    /// Command-port reads give the in-service register.
    pub read_isr: bool,
    /// The next read polls.
    pub poll: bool,
}

impl ChipState {
    fn is_level(&self, input: u8) -> bool {
        self.level || self.elcr & (1 << input) != 0
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        if level {
            if self.lines & bit == 0 || self.is_level(input) {
                self.irr |= bit;
            }
            self.lines |= bit;
        } else {
            self.lines &= !bit;
            if self.is_level(input) {
                self.irr &= !bit;
            }
        }
    }

    /// Place of the first input of `set` in the order of priorities; 8 when empty.
    fn place(&self, set: u8) -> u8 {
        set.rotate_right(u32::from(self.top)).trailing_zeros() as u8
    }

    fn input_at(&self, place: u8) -> u8 {
        (place + self.top) & 7
    }

    /// The input the chip interrupts for.
    fn pending(&self, first: bool) -> Option<u8> {
        let request = self.place(self.irr & !self.imr);
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if self.nested && first {
            serving &= !(1 << spec::CASCADE);
        }
        (request < self.place(serving)).then(|| self.input_at(request))
    }

    fn acknowledge(&mut self, input: u8) {
        if !self.is_level(input) {
            self.irr &= !(1 << input);
        }
        if !self.auto_eoi {
            self.isr |= 1 << input;
        } else if self.rotate_on_auto_eoi {
            self.top = (input + 1) & 7;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & spec::ICW1_INIT != 0 {
            *self = ChipState {
                lines: self.lines,
                elcr: self.elcr,
                level: value & spec::ICW1_LEVEL != 0,
                vector_base: self.vector_base,
                init: Init::Icw2,
                expects_icw4: value & spec::ICW1_IC4 != 0,
                single: value & spec::ICW1_SINGLE != 0,
                ..ChipState::default()
            };
            // Edge detectors are cleared; level inputs go on asking.
            for input in 0..8 {
                if self.is_level(input) {
                    self.irr |= self.lines & (1 << input);
                }
            }
        } else if value & spec::OCW3 != 0 {
            self.poll = value & spec::OCW3_POLL != 0;
            if value & spec::OCW3_READ != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & spec::OCW3_ENABLE_SPECIAL != 0 {
                self.special_mask = value & spec::OCW3_SPECIAL != 0;
            }
        } else {
            self.write_ocw2(value >> 5, value & 7);
        }
    }

    /// OCW2: `command` is R, SL, EOI; `input` is L2-L0.
    fn write_ocw2(&mut self, command: u8, input: u8) {
        match command {
            0 | 4 => self.rotate_on_auto_eoi = command == 4,
            1 | 5 => {
                let mut serving = self.isr;
                if self.special_mask {
                    serving &= !self.imr;
                }
                let place = self.place(serving);
                if place < 8 {
                    let ended = self.input_at(place);
                    self.isr &= !(1 << ended);
                    if command == 5 {
                        self.top = (ended + 1) & 7;
                    }
                }
            }
            3 | 7 => {
                self.isr &= !(1 << input);
                if command == 7 {
                    self.top = (input + 1) & 7;
                }
            }
            6 => self.top = (input + 1) & 7,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init = match (self.single, self.expects_icw4) {
                    (false, _) => Init::Icw3,
                    (true, true) => Init::Icw4,
                    (true, false) => Init::Done,
                };
            }
            Init::Icw3 => {
                self.init = if self.expects_icw4 {
                    Init::Icw4
                } else {
                    Init::Done
                };
            }
            Init::Icw4 => {
                self.nested = value & spec::ICW4_NESTED != 0;
                self.auto_eoi = value & spec::ICW4_AUTO_EOI != 0;
                self.init = Init::Done;
            }
        }
    }
}

/// Both chips. Inputs 0-7 are those of the first, 8-15 those of the second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// First chip, then the one behind its input 2.
    pub chips: [ChipState; 2],
}

impl PicState {
    /// Whether a pair can come to it.
    pub(crate) fn is_possible(&self) -> bool {
        self.chips.iter().all(|chip| chip.top < 8)
    }
}

/// The pair of controllers. Its whole content is [`PicState`].
#[derive(Debug, Default)]
pub struct Pic {
    pub(crate) state: PicState,
    /// Level of INTR: derived from the state, asked for at every instruction boundary.
    intr: bool,
}

impl Pic {
    /// Controllers that continue from `state`.
    pub fn from_state(state: PicState) -> Pic {
        let mut pic = Pic { state, intr: false };
        pic.settle();
        pic
    }

    /// Controllers as a PC's firmware leaves them: vectors 08h-0Fh and 70h-77h (IBM PC AT Technical
    /// Reference, "System Interrupts"), edge-triggered, in cascade. Without firmware there are no
    /// handlers, and nothing that would have to be masked.
    pub fn at_boot() -> Pic {
        let mut state = PicState::default();
        for (chip, vector_base) in state.chips.iter_mut().zip([0x08, 0x70]) {
            chip.vector_base = vector_base;
            chip.expects_icw4 = true;
        }
        Pic::from_state(state)
    }

    /// Sets the level of input 0-15. Input 2 is the cascade and takes no wire.
    pub fn set_line(&mut self, input: u8, level: bool) {
        if input != spec::CASCADE && input < 16 {
            self.state.chips[usize::from(input >> 3)].set_line(input & 7, level);
            self.settle();
        }
    }

    /// Carries the second chip's output to the first and computes INTR.
    fn settle(&mut self) {
        let [first, second] = &mut self.state.chips;
        let bit = 1 << spec::CASCADE;
        if second.pending(false).is_some() {
            first.irr |= bit;
            first.lines |= bit;
        } else {
            first.irr &= !bit;
            first.lines &= !bit;
        }
        self.intr = first.pending(true).is_some();
    }

    /// Level of the INTR output.
    #[inline]
    pub fn intr(&self) -> bool {
        self.intr
    }

    /// Interrupt acknowledge cycle: the vector. With nothing to acknowledge it is that of input
    /// 7, the spurious one, and nothing goes into service.
    pub fn acknowledge(&mut self) -> u8 {
        let [first, second] = &mut self.state.chips;
        let vector = match first.pending(true) {
            None => first.vector_base + 7,
            Some(spec::CASCADE) => {
                first.acknowledge(spec::CASCADE);
                match second.pending(false) {
                    None => second.vector_base + 7,
                    Some(input) => {
                        second.acknowledge(input);
                        second.vector_base + input
                    }
                }
            }
            Some(input) => {
                first.acknowledge(input);
                first.vector_base + input
            }
        };
        self.settle();
        vector
    }

    /// Reads port 20h, 21h, A0h, A1h, 4D0h or 4D1h.
    pub fn read(&mut self, port: u16) -> u8 {
        match port {
            0x4d0 | 0x4d1 => self.state.chips[usize::from(port & 1)].elcr,
            _ => {
                let second = port & 0x80 != 0;
                let chip = &mut self.state.chips[usize::from(second)];
                let value = if chip.poll {
                    chip.poll = false;
                    match chip.pending(!second) {
                        Some(input) => {
                            chip.acknowledge(input);
                            0x80 | input
                        }
                        None => 0,
                    }
                } else if port & 1 != 0 {
                    chip.imr
                } else if chip.read_isr {
                    chip.isr
                } else {
                    chip.irr
                };
                self.settle();
                value
            }
        }
    }

    /// Writes one of the ports of [`Pic::read`].
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x4d0 | 0x4d1 => {
                let which = usize::from(port & 1);
                let chip = &mut self.state.chips[which];
                chip.elcr = value & spec::ELCR_MASK[which];
                for input in 0..8 {
                    if chip.elcr & (1 << input) != 0 {
                        chip.irr = chip.irr & !(1 << input) | chip.lines & (1 << input);
                    }
                }
            }
            _ => {
                let chip = &mut self.state.chips[usize::from(port & 0x80 != 0)];
                if port & 1 != 0 {
                    chip.write_data(value);
                } else {
                    chip.write_command(value);
                }
            }
        }
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started() -> Pic {
        let mut pic = Pic::default();
        for (base, vector, wiring) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            pic.write(base, 0x11);
            pic.write(base + 1, vector);
            pic.write(base + 1, wiring);
            pic.write(base + 1, 0x01);
        }
        pic
    }

    #[test]
    fn an_edge_interrupts_once() {
        let mut pic = started();
        pic.set_line(4, true);
        assert!(pic.intr());
        assert_eq!(pic.acknowledge(), 0x34);
        pic.write(0x20, 0x20);
        assert!(!pic.intr());
        pic.set_line(4, false);
        pic.set_line(4, true);
        assert!(pic.intr());
    }

    #[test]
    fn a_level_interrupts_until_it_falls() {
        let mut pic = started();
        pic.write(0x4d0, 0xff);
        assert_eq!(pic.read(0x4d0), 0xf8);
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        assert!(!pic.intr());
        pic.write(0x20, 0x65);
        assert!(pic.intr());
        pic.set_line(5, false);
        assert!(!pic.intr());
    }

    #[test]
    fn the_second_chip_interrupts_through_the_cascade_and_needs_both_ends() {
        let mut pic = started();
        pic.set_line(8, true);
        pic.set_line(12, true);
        assert_eq!(pic.acknowledge(), 0x38);
        assert!(!pic.intr());
        pic.write(0xa0, 0x20);
        assert!(!pic.intr());
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x3c);
    }

    #[test]
    fn nothing_pending_acknowledges_as_spurious_seven() {
        let mut pic = started();
        assert_eq!(pic.acknowledge(), 0x37);
        assert_eq!(pic.state.chips[0].isr, 0);
    }

    #[test]
    fn a_higher_priority_input_interrupts_the_service_of_a_lower_one() {
        let mut pic = started();
        pic.set_line(5, true);
        pic.acknowledge();
        pic.set_line(6, true);
        assert!(!pic.intr());
        pic.set_line(1, true);
        assert_eq!(pic.acknowledge(), 0x31);
    }

    #[test]
    fn special_mask_mode_lets_lower_priorities_through() {
        let mut pic = started();
        pic.set_line(1, true);
        pic.acknowledge();
        pic.set_line(6, true);
        pic.write(0x21, 0x02);
        assert!(!pic.intr());
        pic.write(0x20, 0x68);
        assert!(pic.intr());
        pic.write(0x20, 0x48);
        assert!(!pic.intr());
    }

    #[test]
    fn poll_acknowledges_without_a_cycle() {
        let mut pic = started();
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
        pic.set_line(3, true);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x83);
        assert!(!pic.intr());
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0x08);
        pic.write(0x20, 0x0a);
        assert_eq!(pic.read(0x20), 0x00);
    }

    #[test]
    fn automatic_end_leaves_nothing_in_service_and_rotates_when_told() {
        let mut pic = started();
        pic.write(0x20, 0x11);
        for byte in [0x30, 4, 0x03] {
            pic.write(0x21, byte);
        }
        pic.write(0x20, 0x80);
        pic.set_line(0, true);
        assert_eq!(pic.acknowledge(), 0x30);
        assert_eq!(pic.state.chips[0].isr, 0);
        assert_eq!(pic.state.chips[0].top, 1);
    }

    #[test]
    fn set_priority_rotates_the_order() {
        let mut pic = started();
        pic.write(0x20, 0xc3);
        pic.set_line(0, true);
        pic.set_line(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn initialisation_forgets_edges_and_masks() {
        let mut pic = started();
        pic.write(0x21, 0xff);
        pic.set_line(3, true);
        pic.write(0x20, 0x11);
        assert_eq!(pic.read(0x21), 0);
        assert!(!pic.intr());
    }
}
