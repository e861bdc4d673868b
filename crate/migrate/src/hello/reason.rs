//! Why a machine cannot go to a place.

use serde::{Deserialize, Serialize};

/// One reason. In words it is a line that names the thing and says what to do on which side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The machine comes in a format that the destination does not read.
    #[error(
        "format: the {name} has version {version} and the destination reads {reads}: use the same build on both sides"
    )]
    Format {
        /// What it is of.
        name: String,
        /// Its version.
        version: u32,
        /// The versions that are read.
        reads: String,
    },
    /// Too much RAM.
    #[error(
        "memory: the machine has {needs} bytes and the destination takes {most} at most: start the machine with less \
         --memory, or choose a destination with more"
    )]
    Memory {
        /// Bytes of RAM.
        needs: u64,
        /// Most that are taken.
        most: u64,
    },
    /// Too many vCPUs.
    #[error(
        "processors: the machine has {needs} and the destination takes {most} at most: start the machine with fewer --cpus"
    )]
    Cpus {
        /// vCPUs.
        needs: u32,
        /// Most that are taken.
        most: u32,
    },
    /// A clock runs at another rate.
    #[error(
        "clock: the guest's {clock} counts at {needs} Hz and the destination's at {here} Hz: use the same build on both sides"
    )]
    Rate {
        /// Which clock.
        clock: String,
        /// The rate that the guest was told.
        needs: u64,
        /// The rate at the destination.
        here: u64,
    },
    /// The destination does not know the CPU model.
    #[error(
        "CPU model {model}: the destination has {known}: use a newer build there, or start the machine with --cpu and one of these"
    )]
    Model {
        /// The machine's.
        model: String,
        /// Those that there are.
        known: String,
    },
    /// The model of the same name looks otherwise.
    #[error(
        "CPU model {model}: the guest saw {what} {seen} and the destination's shows {here}: use the same build on both sides"
    )]
    Identity {
        /// The model.
        model: String,
        /// What differs.
        what: String,
        /// What the guest saw.
        seen: String,
        /// What it would see.
        here: String,
    },
    /// A CPU feature is missing.
    #[error(
        "CPU feature {name} ({place}): the guest could see it and the destination's model {model} lacks it: \
         give the destination no --cpu or a larger one, or start the machine with --cpu {model}"
    )]
    Feature {
        /// Its name.
        name: String,
        /// Where CPUID has it.
        place: String,
        /// The model that lacks it.
        model: String,
    },
    /// A model-specific register is missing.
    #[error(
        "MSR {name} ({number:#x}): the guest could read it and the destination's model {model} lacks it: \
         give the destination no --cpu or a larger one, or start the machine with --cpu {model}"
    )]
    Msr {
        /// Its name.
        name: String,
        /// Its number.
        number: u32,
        /// The model that lacks it.
        model: String,
    },
    /// A model-specific register that never changes reads another value.
    #[error(
        "MSR {name} ({number:#x}): the guest read {seen:#x} and would read {here:#x}: use the same build on both sides"
    )]
    MsrValue {
        /// Its name.
        name: String,
        /// Its number.
        number: u32,
        /// What it was.
        seen: u64,
        /// What it would be.
        here: u64,
    },
    /// No VMX.
    #[error(
        "VMX (CPUID.1:ECX bit 5, MSRs IA32_FEATURE_CONTROL and IA32_VMX_BASIC to {last}): the guest could see it and \
         the destination has none: give the destination no --vmx none, or start the machine with --vmx none"
    )]
    NoVmx {
        /// The last of the capability MSRs.
        last: String,
    },
    /// A VMX control or capability is missing.
    #[error(
        "VMX {what}: the guest was offered it and the destination does not have it: give the destination no --vmx or \
         a larger one, or start the machine with a --vmx without it"
    )]
    Capability {
        /// As the tables name it.
        what: String,
    },
    /// A capability MSR of the profile of the same name reads another value.
    #[error(
        "VMX capability {name}: the guest read {seen:#x} and would read {here:#x}: use the same build on both sides"
    )]
    CapabilityValue {
        /// Its name.
        name: String,
        /// What it was.
        seen: u64,
        /// What it would be.
        here: u64,
    },
    /// A layout of regions that the destination does not know.
    #[error(
        "VMCS layout {layout} (revision {revision:#010x}, {pages} pages of memory begin with it): the destination does \
         not know it: give the destination a build that does, or --layout with its table on the source"
    )]
    Unknown {
        /// Its name.
        layout: String,
        /// Its revision.
        revision: u32,
        /// Regions in memory.
        pages: u64,
    },
    /// A layout of the same name is another one.
    #[error(
        "VMCS layout {layout} (revision {revision:#010x}, {pages} pages of memory begin with it): the destination's has \
         other slots: use the same build on both sides"
    )]
    Differs {
        /// Its name.
        layout: String,
        /// Its revision.
        revision: u32,
        /// Regions in memory.
        pages: u64,
    },
    /// Another layout would be advertised.
    #[error(
        "VMCS layout {seen}: its revision was advertised to the guest for its life and the destination advertises {here}: \
         give the destination no --vmcs, or --vmcs {seen}"
    )]
    Advertised {
        /// What the guest saw.
        seen: String,
        /// What it would see.
        here: String,
    },
    /// A layout cannot hold what the guest was offered.
    #[error(
        "VMCS layout {layout}: the destination's {option} asks for it and it has no place for {fields}, which the guest \
         was offered: give the destination another {option}, or start the machine with --accept-vmcs {layout}"
    )]
    Narrows {
        /// The layout.
        layout: String,
        /// The option that named it.
        option: String,
        /// The fields.
        fields: String,
    },
    /// A layout is larger than the guest's regions.
    #[error(
        "VMCS layout {layout}: the destination's {option} asks for it and it needs {used} bytes; the guest's regions have \
         {size}, as {advertised} advertises: give the destination another {option}"
    )]
    Outgrows {
        /// The layout.
        layout: String,
        /// The option that named it.
        option: String,
        /// Bytes it uses.
        used: u32,
        /// The advertised layout.
        advertised: String,
        /// Bytes of a region.
        size: u32,
    },
    /// One revision would stand for two layouts.
    #[error(
        "VMCS revision {revision:#010x}: it is that of {first} in the machine ({pages} pages of memory begin with it) and \
         of {second}, which the destination's {option} asks for: give the destination another {option}"
    )]
    Ambiguous {
        /// The identifier.
        revision: u32,
        /// Whose it is.
        first: String,
        /// Regions in memory.
        pages: u64,
        /// Whose it would be too.
        second: String,
        /// The option that named the second.
        option: String,
    },
    /// No processor can keep VMCSs in a layout.
    #[error(
        "VMCS layout {layout}: the destination's {option} asks for it and it is for files: give the destination another \
         {option}"
    )]
    ForFiles {
        /// The layout.
        layout: String,
        /// The option that named it.
        option: String,
    },
    /// A feature of the Hyper-V interface is missing.
    #[error(
        "Hyper-V {what}: the guest could see it and the destination does not have it: start the destination with --hyperv, \
         or the machine without"
    )]
    Hyperv {
        /// Its name.
        what: String,
    },
    /// Another version of the enlightened VMCS.
    #[error(
        "Hyper-V nested: versions {}-{} of the enlightened VMCS (CPUID.4000000AH:EAX bits 15:0): the guest could see them \
         and the destination has {here}: start the destination with --hyperv, or the machine without",
        seen.0, seen.1
    )]
    EnlightenedVersions {
        /// Lowest and highest that the guest saw.
        seen: (u8, u8),
        /// Those at the destination.
        here: String,
    },
    /// A device is missing, or another is in its place.
    #[error(
        "device {number}: the machine has {needs} and the destination {here}: give the destination {remedy}"
    )]
    Device {
        /// Its number, from 1.
        number: usize,
        /// What the machine has.
        needs: String,
        /// What there is.
        here: String,
        /// What to do.
        remedy: String,
    },
    /// A device that the machine does not have.
    #[error(
        "device {number}: the destination has {here} and the machine none: give the destination no such device"
    )]
    Surplus {
        /// Its number, from 1.
        number: usize,
        /// What there is.
        here: String,
    },
}
