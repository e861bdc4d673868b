//! The control bits: constants to test with, a table to print and to reason with.

use core::fmt;

use crate::field::Field;

include!(concat!(env!("OUT_DIR"), "/controls.rs"));

/// A set of controls, which is one field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Control {
    /// Pin-based VM-execution controls; bits in [`pin`].
    Pin,
    /// Primary processor-based VM-execution controls; bits in [`proc1`].
    Proc1,
    /// Secondary processor-based VM-execution controls; bits in [`proc2`].
    Proc2,
    /// Tertiary processor-based VM-execution controls; bits in [`proc3`].
    Proc3,
    /// Primary VM-exit controls; bits in [`exit`].
    Exit,
    /// Secondary VM-exit controls; bits in [`exit2`].
    Exit2,
    /// VM-entry controls; bits in [`entry`].
    Entry,
    /// VM-function controls; bits in [`vmfunc`].
    VmFunc,
}

/// One bit of one control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ControlId {
    /// The control.
    pub control: Control,
    /// The bit, 0 to 63.
    pub bit: u8,
}

/// What is known about a bit: a row of `control_bits.csv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlBit {
    /// Which it is.
    pub id: ControlId,
    /// The manual's name; a remark for a reserved bit.
    pub name: &'static str,
    /// It has no meaning but the value it must have.
    pub reserved: bool,
    /// It is 1 unless a TRUE capability MSR says otherwise. Vol. 3C, "Algorithms for Determining VMX
    /// Capabilities".
    pub default1: bool,
    /// It can be used with the enlightened VMCS, version 1.
    pub enlightened: bool,
    /// The bits that must be 1 where this one is.
    pub requires: &'static [ControlId],
    /// Its dependencies in words, those in `requires` among them.
    pub dependency: &'static str,
}

impl Control {
    /// Every control, in the order of the table.
    pub const ALL: [Self; 8] = [
        Self::Pin,
        Self::Proc1,
        Self::Proc2,
        Self::Proc3,
        Self::Exit,
        Self::Exit2,
        Self::Entry,
        Self::VmFunc,
    ];

    /// The field that holds it.
    #[must_use]
    pub const fn field(self) -> Field {
        match self {
            Self::Pin => Field::PIN_BASED_VM_EXEC_CONTROL,
            Self::Proc1 => Field::CPU_BASED_VM_EXEC_CONTROL,
            Self::Proc2 => Field::SECONDARY_VM_EXEC_CONTROL,
            Self::Proc3 => Field::TERTIARY_VM_EXEC_CONTROL,
            Self::Exit => Field::VM_EXIT_CONTROLS,
            Self::Exit2 => Field::SECONDARY_VM_EXIT_CONTROLS,
            Self::Entry => Field::VM_ENTRY_CONTROLS,
            Self::VmFunc => Field::VM_FUNCTION_CONTROL,
        }
    }

    /// The bit without which the processor takes the whole control as 0.
    #[must_use]
    pub const fn activated_by(self) -> Option<ControlId> {
        match self {
            Self::Proc2 => Some(ControlId::new(Self::Proc1, 31)),
            Self::Proc3 => Some(ControlId::new(Self::Proc1, 17)),
            Self::Exit2 => Some(ControlId::new(Self::Exit, 31)),
            Self::VmFunc => Some(ControlId::new(Self::Proc2, 13)),
            Self::Pin | Self::Proc1 | Self::Exit | Self::Entry => None,
        }
    }

    /// The bits that are 1 unless a TRUE capability MSR says otherwise.
    #[must_use]
    pub const fn default1(self) -> u64 {
        match self {
            Self::Pin => pin::DEFAULT1 as u64,
            Self::Proc1 => proc1::DEFAULT1 as u64,
            Self::Exit => exit::DEFAULT1 as u64,
            Self::Entry => entry::DEFAULT1 as u64,
            Self::Proc2 | Self::Proc3 | Self::Exit2 | Self::VmFunc => 0,
        }
    }
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pin => "pin",
            Self::Proc1 => "proc1",
            Self::Proc2 => "proc2",
            Self::Proc3 => "proc3",
            Self::Exit => "exit",
            Self::Exit2 => "exit2",
            Self::Entry => "entry",
            Self::VmFunc => "vmfunc",
        })
    }
}

impl ControlId {
    /// Bit `bit` of `control`.
    #[must_use]
    pub const fn new(control: Control, bit: u8) -> Self {
        Self { control, bit }
    }

    /// What the table says about it; nothing for a bit that it does not have.
    #[must_use]
    pub fn info(self) -> Option<&'static ControlBit> {
        BITS.iter().find(|bit| bit.id == self)
    }

    /// The manual's name of the bit, or `reserved`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.info() {
            Some(bit) if !bit.reserved => bit.name,
            _ => "reserved",
        }
    }
}

/// As the tables write it, and the name: `proc2.1 Enable EPT`.
impl fmt::Display for ControlId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} {}", self.control, self.bit, self.name())
    }
}

impl ControlBit {
    /// Every bit of every control, the reserved ones of the default1 class among them.
    pub const ALL: &'static [Self] = BITS;

    /// The bits of `control` that are 1 in `value`, those that the table does not have left out.
    pub fn set_in(control: Control, value: u64) -> impl Iterator<Item = &'static Self> {
        BITS.iter()
            .filter(move |bit| bit.id.control == control && value >> bit.id.bit & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec::Vec;

    #[test]
    fn constants_are_the_bits_of_the_manual() {
        assert_eq!(pin::EXTERNAL_INTERRUPT_EXITING, 1);
        assert_eq!(proc1::ACTIVATE_SECONDARY_CONTROLS, 1 << 31);
        assert_eq!(proc2::ENABLE_EPT, 1 << 1);
        assert_eq!(proc2::EPT_VIOLATION_VE, 1 << 18);
        assert_eq!(proc2::INSTRUCTION_TIMEOUT, 1 << 31);
        assert_eq!(exit::HOST_ADDRESS_SPACE_SIZE, 1 << 9);
        assert_eq!(entry::IA_32E_MODE_GUEST, 1 << 9);
        assert_eq!(proc3::IPI_VIRTUALIZATION, 1 << 4);
        assert_eq!(vmfunc::EPTP_SWITCHING, 1);
    }

    #[test]
    fn default1_classes_are_those_of_the_manual() {
        assert_eq!(pin::DEFAULT1, 0x16);
        assert_eq!(proc1::DEFAULT1, 0x0401_E172);
        assert_eq!(exit::DEFAULT1, 0x0003_6DFF);
        assert_eq!(entry::DEFAULT1, 0x0000_11FF);
        assert_eq!(proc2::DEFAULT1, 0);
        for control in Control::ALL {
            let bits = ControlBit::ALL
                .iter()
                .filter(|b| b.id.control == control && b.default1);
            let mask = bits.fold(0, |mask, bit| mask | 1 << bit.id.bit);
            assert_eq!(mask, control.default1());
        }
    }

    #[test]
    fn bits_print_with_their_names() {
        assert_eq!(
            ControlId::new(Control::Proc2, 1).to_string(),
            "proc2.1 Enable EPT"
        );
        assert_eq!(ControlId::new(Control::Pin, 1).name(), "reserved");
        assert_eq!(
            ControlId::new(Control::Pin, 31).to_string(),
            "pin.31 reserved"
        );
        let set = u64::from(pin::NMI_EXITING | pin::VIRTUAL_NMIS);
        let names: Vec<_> = ControlBit::set_in(Control::Pin, set)
            .map(|bit| bit.name)
            .collect();
        assert_eq!(names, ["NMI exiting", "Virtual NMIs"]);
    }

    #[test]
    fn requirements_come_from_their_clause_only() {
        let requires = |control, bit| ControlId::new(control, bit).info().unwrap().requires;
        assert_eq!(
            requires(Control::Pin, 7),
            [
                ControlId::new(Control::Proc2, 9),
                ControlId::new(Control::Exit, 15)
            ]
        );
        // "requires proc1.21; excludes proc2.0"
        assert_eq!(
            requires(Control::Proc2, 4),
            [ControlId::new(Control::Proc1, 21)]
        );
        assert_eq!(requires(Control::Proc2, 0), []);
    }

    #[test]
    fn every_requirement_is_in_the_table() {
        for bit in ControlBit::ALL {
            for required in bit.requires {
                assert!(required.info().is_some(), "{}", bit.id);
            }
        }
    }
}
