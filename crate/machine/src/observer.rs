//! Observers: code of the library's user that looks at what happens, and may change it.

use hypernest_cpu::{InterruptMessage, Ram, Tick, VcpuState};

/// What kind of access to the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// IN.
    PortRead,
    /// OUT.
    PortWrite,
    /// A load from an address that is not RAM.
    MemoryRead,
    /// A store to an address that is not RAM.
    MemoryWrite,
}

/// An access to the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Machine time.
    pub now: Tick,
    /// What kind.
    pub kind: AccessKind,
    /// Port or guest-physical address.
    pub address: u64,
    /// Bytes.
    pub width: u8,
    /// What is written, or what the board answered. An observer may change it.
    pub value: u64,
}

/// What the machine does after an observer has looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Goes on.
    Continue,
    /// Returns from [`crate::Machine::run`].
    Stop,
}

/// A vCPU at a breakpoint, and guest memory. Changes to `state` take effect when the machine
/// goes on.
pub struct AtBreakpoint<'a> {
    /// Machine time.
    pub now: Tick,
    /// Which vCPU.
    pub vcpu: usize,
    /// Its registers, before the instruction at RIP.
    pub state: &'a mut VcpuState,
    /// Guest RAM.
    pub ram: &'a mut Ram,
}

/// Looks at what happens in a machine. Every method does nothing unless it is given.
///
/// An observer that only looks leaves the run as it was. One that changes something is part of
/// the machine's input: repeatable if it is itself.
pub trait Observer: Send {
    /// An access to the board: a read that was answered, or a write before it is carried out.
    fn access(&mut self, access: &mut Access, ram: &mut Ram) -> Flow {
        let _ = (access, ram);
        Flow::Continue
    }

    /// The I/O APIC sends a message.
    fn interrupt(&mut self, message: &InterruptMessage) {
        let _ = message;
    }

    /// A vCPU is about to execute an instruction with a breakpoint
    /// ([`crate::Machine::set_breakpoint`]). The machine goes on when an observer says so and
    /// none says otherwise; `None` leaves it to the others.
    fn breakpoint(&mut self, at: &mut AtBreakpoint<'_>) -> Option<Flow> {
        let _ = at;
        None
    }
}
