//! Page-modification logging (Vol. 3C, "Page-Modification Logging"), and what else a walk changes.

use hypernest_vmcs::{ExitReason, Field, proc2};

use super::Vmx;
use super::exit::Exit;
use crate::ram::Ram;

/// What a page walk may change beside the accessed and dirty flags, which only it sets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Marks {
    /// Flags are set. A debugger's walk sets none, and logs nothing.
    pub flags: bool,
    log: Option<Log>,
}

/// The page-modification log of the guest that executes.
#[derive(Clone, Copy, Debug)]
struct Log {
    address: u64,
    index: u16,
}

/// Entries of a log: a page of 8 bytes each. It is filled from its end; an index beyond is a full log.
const ENTRIES: u16 = 512;

impl Marks {
    /// Those of a walk that is not seen.
    pub fn none() -> Marks {
        Marks {
            flags: false,
            log: None,
        }
    }

    /// Room in the log, before a flag of EPT is set.
    ///
    /// # Errors
    /// The exit of a full log. Nothing may be set then.
    pub fn make_room(&self) -> Result<(), Exit> {
        match self.log {
            Some(log) if log.index >= ENTRIES => Err(Exit::new(ExitReason::PML_FULL)),
            _ => Ok(()),
        }
    }

    /// A dirty flag of EPT was set for `guest_physical`.
    pub fn dirtied(&mut self, ram: &mut Ram, guest_physical: u64) {
        if let Some(log) = &mut self.log {
            let at = log.address.wrapping_add(8 * u64::from(log.index));
            // Deviation: a log that is not in RAM keeps nothing; no device sees it.
            let _ = ram.write(at, &(guest_physical & !0xfff).to_le_bytes());
            log.index = log.index.wrapping_sub(1);
        }
    }
}

impl Vmx {
    /// The marks of an access.
    pub fn marks(&self) -> Marks {
        let logs = self.non_root && self.controls.proc2(proc2::ENABLE_PML);
        Marks {
            flags: true,
            log: logs.then(|| Log {
                address: self.vmcs.get(Field::PML_ADDRESS),
                index: self.vmcs.get(Field::GUEST_PML_INDEX) as u16,
            }),
        }
    }

    /// Keeps what a walk logged.
    pub fn marked(&mut self, marks: &Marks) {
        if let Some(log) = marks.log {
            self.vmcs.set(Field::GUEST_PML_INDEX, u64::from(log.index));
        }
    }
}
