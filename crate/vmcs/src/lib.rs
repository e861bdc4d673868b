//! The virtual-machine control structure (VMCS) as data: fields, controls, capabilities, layouts,
//! and the rules of VM entry.
//!
//! It knows no processor, no guest memory and no I/O: values go in, values and verdicts come out.
//! What there is to know is in the tables of `data/`, from which the build makes the constants; a
//! table is the truth until silicon or the manual contradicts it, and then it is corrected.
//!
//! - [`Field`] is one of the 207 fields, [`FieldSet`] some of them.
//! - [`Vmcs`] holds a value for each: the canonical form, in which a processor keeps its current
//!   VMCS. Bytes exist only in a [`Layout`].
//! - [`pin`], [`proc1`], [`proc2`], [`proc3`], [`exit`], [`exit2`], [`entry`] and [`vmfunc`] name the
//!   control bits; [`ControlBit`] prints them.
//! - [`Caps`] are the capability MSRs: what a guest may set.
//! - [`ExitReason`] and [`InstructionError`] are numbers the guest reads.
//! - [`checks`] are the conditions that VM entry tests.
//!
//! Citations name volume and section title of the Intel 64 and IA-32 Architectures Software
//! Developer's Manual (SDM), in the editions that describe FRED (2025); section numbers move between
//! editions.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod caps;
pub mod checks;
mod control;
mod dump;
pub mod enlightened;
mod exit_reason;
mod field;
mod file;
mod identify;
mod instruction_error;
mod layout;
pub mod migration;
pub mod nested_state;
mod segment;
#[cfg(test)]
mod testing;
mod translate;
mod vmcs;

pub use caps::{
    Capability, Caps, DumpError, DumpProblem, FIRST_MSR, Implemented, LAST_MSR, Missing,
    capabilities,
};
pub use control::{
    Control, ControlBit, ControlId, entry, exit, exit2, pin, proc1, proc2, proc3, vmfunc,
};
pub use dump::{Dump, DumpTextError};
pub use exit_reason::{ExitReason, ExitReasonInfo, Validity};
pub use field::{Exists, Field, FieldSet, Kind, Width, group};
pub use file::{File, FileError, Found, Lint, Translated};
pub use identify::{Candidate, Evidence, identify};
pub use instruction_error::InstructionError;
pub use layout::{
    LaunchState, Layout, LayoutError, RegionMap, RegionPage, Slot, TableError, TableProblem,
    revision,
};
pub use nested_state::NestedState;
pub use segment::GuestSegment;
pub use translate::{Fate, Losses, TranslateError, Translation};
pub use vmcs::Vmcs;
