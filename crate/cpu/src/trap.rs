//! What keeps an instruction from completing: values, never unwinding.

/// An exception the guest sees (Vol. 3A, "Exception and Interrupt Reference").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// #DE.
    Divide,
    /// #DB as a fault or trap; the bits to set in DR6.
    Debug(u64),
    /// #UD.
    InvalidOpcode,
    /// #NM.
    DeviceNotAvailable,
    /// #DF, always with error code 0.
    DoubleFault,
    /// #BR.
    BoundRange,
    /// #TS with its error code.
    InvalidTss(u16),
    /// #NP with its error code.
    NotPresent(u16),
    /// #SS with its error code.
    Stack(u16),
    /// #GP with its error code.
    GeneralProtection(u16),
    /// #PF: the linear address for CR2 and the error code.
    Page {
        /// Faulting linear address.
        address: u64,
        /// Error code (Vol. 3A, "Page-Fault Exceptions").
        code: u16,
    },
    /// #MF.
    X87,
    /// #AC, error code 0.
    Alignment,
    /// #XM.
    Simd,
    /// #VE.
    Virtualization,
}

impl Fault {
    /// Exception vector.
    pub fn vector(self) -> u8 {
        match self {
            Fault::Divide => 0,
            Fault::Debug(_) => 1,
            Fault::BoundRange => 5,
            Fault::InvalidOpcode => 6,
            Fault::DeviceNotAvailable => 7,
            Fault::DoubleFault => 8,
            Fault::InvalidTss(_) => 10,
            Fault::NotPresent(_) => 11,
            Fault::Stack(_) => 12,
            Fault::GeneralProtection(_) => 13,
            Fault::Page { .. } => 14,
            Fault::X87 => 16,
            Fault::Alignment => 17,
            Fault::Simd => 19,
            Fault::Virtualization => 20,
        }
    }

    /// Error code, for the vectors that push one.
    pub fn error_code(self) -> Option<u16> {
        match self {
            Fault::DoubleFault | Fault::Alignment => Some(0),
            Fault::InvalidTss(code)
            | Fault::NotPresent(code)
            | Fault::Stack(code)
            | Fault::GeneralProtection(code)
            | Fault::Page { code, .. } => Some(code),
            _ => None,
        }
    }
}

/// #GP(0), the commonest one.
pub(crate) const GP0: Trap = Trap::Fault(Fault::GeneralProtection(0));
/// #UD.
pub(crate) const UD: Trap = Trap::Fault(Fault::InvalidOpcode);

/// Why an instruction did not complete in the ordinary way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trap {
    /// The guest sees an exception; RIP is that of the instruction.
    Fault(Fault),
    /// Delivery of an exception failed three deep.
    TripleFault,
    /// A VM exit: `Vcpu::vmx.exit` has it.
    VmExit,
    /// A VM exit failed: the vCPU is in the VMX-abort shutdown state. The indicator.
    VmxAbort(u32),
    /// Not built yet: the machine stops and says what.
    Unimplemented(&'static str),
}

impl From<Fault> for Trap {
    fn from(fault: Fault) -> Trap {
        Trap::Fault(fault)
    }
}

/// Result of executing something.
pub(crate) type Exec<T = ()> = Result<T, Trap>;
