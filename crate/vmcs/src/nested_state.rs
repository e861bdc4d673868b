//! KVM's nested state: what `KVM_GET_NESTED_STATE` gives and `KVM_SET_NESTED_STATE` takes.
//!
//! `struct kvm_nested_state` of the KVM API, byte for byte, and the checks that KVM makes of it in
//! their order; `data/nested_state_abi.csv` numbers them.

use alloc::vec::Vec;
use core::fmt;

use crate::checks::{EntryCheck, Failure};
use crate::field::Field;
use crate::layout::{Layout, revision};

include!(concat!(env!("OUT_DIR"), "/nested_state.rs"));

/// Bytes of the header.
pub const HEADER: usize = 128;
/// Bytes kept for each VMCS image behind the header.
pub const IMAGE: usize = 4096;
/// An address that is not there.
pub const NO_ADDRESS: u64 = u64::MAX;

/// State flags.
pub mod state_flag {
    /// The vCPU is in VMX non-root operation.
    pub const GUEST_MODE: u16 = 1 << 0;
    /// VMLAUNCH or VMRESUME was done, and no instruction of the guest since.
    pub const RUN_PENDING: u16 = 1 << 1;
    /// The VMCS is an enlightened one.
    pub const EVMCS: u16 = 1 << 2;
    /// A monitor-trap-flag exit is pending.
    pub const MTF_PENDING: u16 = 1 << 3;
    /// SVM's; nothing in VMX.
    pub const GIF_SET: u16 = 1 << 8;
    /// All of them.
    pub const ALL: u16 = GUEST_MODE | RUN_PENDING | EVMCS | MTF_PENDING | GIF_SET;
}

/// Flags of the state at a system-management interrupt.
pub mod smm_flag {
    /// The interrupt came in VMX non-root operation.
    pub const GUEST_MODE: u16 = 1 << 0;
    /// The interrupt came in VMX operation.
    pub const VMXON: u16 = 1 << 1;
}

/// Flag of the VMX header: the deadline of the preemption timer is valid.
pub const DEADLINE_VALID: u32 = 1;

/// A nested state. Reading and writing it changes no byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NestedState {
    /// [`state_flag`]s.
    pub flags: u16,
    /// 0 is VMX.
    pub format: u16,
    /// Address of the VMXON region, or [`NO_ADDRESS`].
    pub vmxon: u64,
    /// Address of the current VMCS, or [`NO_ADDRESS`].
    pub vmcs: u64,
    /// [`smm_flag`]s.
    pub smm_flags: u16,
    /// [`DEADLINE_VALID`].
    pub vmx_flags: u32,
    /// When the preemption timer runs out: TSC of L1, shifted right by the rate of the timer.
    pub deadline: u64,
    /// Bytes of the header that mean nothing: 2 behind the SMM flags, 88 at its end.
    pub padding: ([u8; 2], [u8; 88]),
    /// What is behind the header: at most two images of [`IMAGE`] bytes.
    pub data: Vec<u8>,
}

impl Default for NestedState {
    /// A vCPU outside VMX operation.
    fn default() -> Self {
        Self {
            flags: 0,
            format: 0,
            vmxon: NO_ADDRESS,
            vmcs: NO_ADDRESS,
            smm_flags: 0,
            vmx_flags: 0,
            deadline: 0,
            padding: ([0; 2], [0; 88]),
            data: Vec::new(),
        }
    }
}

/// What the vCPU that is to take a nested state is like.
#[derive(Clone, Copy, Debug)]
pub struct Taker<'a> {
    /// CPUID has VMX.
    pub vmx: bool,
    /// The enlightened VMCS is switched on.
    pub enlightened: bool,
    /// The vCPU is in system-management mode.
    pub smm: bool,
    /// Bits of a guest-physical address.
    pub physical_bits: u8,
    /// The layouts that it takes, one for each revision identifier.
    pub layouts: &'a [&'a Layout],
}

impl Taker<'_> {
    fn is_page(&self, address: u64) -> bool {
        let bits = self.physical_bits.min(63);
        address & 0xFFF == 0 && address >> bits == 0
    }

    fn layout(&self, image: &[u8]) -> Option<&Layout> {
        let (id, _) = revision(image)?;
        self.layouts.iter().copied().find(|layout| layout.takes(id))
    }
}

/// A number of Linux's `errno.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// Memory cannot be read or written.
    Fault,
    /// An invalid argument.
    Invalid,
    /// Not enough memory.
    NoMemory,
    /// The buffer is too small.
    TooBig,
}

impl Errno {
    /// Its number.
    #[must_use]
    pub const fn number(self) -> i32 {
        match self {
            Self::TooBig => 7,
            Self::NoMemory => 12,
            Self::Fault => 14,
            Self::Invalid => 22,
        }
    }
}

/// A nested state that is refused: the check of KVM's that it fails.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Refused(&'static Step);

/// One check of `nested_state_abi.csv`.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    number: u8,
    errno: Option<Errno>,
    words: &'static str,
}

impl Refused {
    fn step(number: u8) -> Self {
        // The numbers are those of rows that the build found.
        let step = STEPS.iter().find(|step| step.number == number);
        Self(step.unwrap_or(&STEPS[0]))
    }

    /// The refusal of a state whose VMCS fails this check of VM entries: 38 for controls, 39 for host
    /// state, 40 for guest state.
    #[must_use]
    pub fn entry(check: &EntryCheck) -> Self {
        Self::step(match check.failure {
            Failure::VmfailValid(8) => 39,
            Failure::Exit33 { .. } => 40,
            _ => 38,
        })
    }

    /// The number of the check, in the order in which KVM makes them.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.0.number
    }

    /// What the system call fails with.
    #[must_use]
    pub fn errno(&self) -> Errno {
        self.0.errno.unwrap_or(Errno::Invalid)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.errno() {
            Errno::Fault => "EFAULT",
            Errno::Invalid => "EINVAL",
            Errno::NoMemory => "ENOMEM",
            Errno::TooBig => "E2BIG",
        };
        write!(f, "{} (check {}, {name})", self.0.words, self.number())
    }
}

impl fmt::Debug for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for Refused {}

/// Something odd that KVM takes without a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// Padding of the header is not 0.
    Padding,
    /// GIF_SET is SVM's.
    GifSet,
    /// EVMCS has no effect beside the address of a VMCS.
    EnlightenedWithAddress,
    /// MTF_PENDING has no effect outside a guest.
    MtfOutsideGuest,
    /// A deadline of the preemption timer that is not marked valid.
    DeadlineNotValid,
    /// Bytes behind the second image.
    Trailing,
    /// Bytes of the first image behind the layout's last slot are not 0.
    ImageTail,
    /// The image has the shadow-VMCS indicator.
    Shadow,
}

impl Finding {
    /// It in words.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Padding => "padding of the header is not 0",
            Self::GifSet => "GIF_SET is set, which means nothing in VMX",
            Self::EnlightenedWithAddress => {
                "EVMCS is set beside the address of a VMCS, and has no effect"
            }
            Self::MtfOutsideGuest => "MTF_PENDING is set outside a guest, and has no effect",
            Self::DeadlineNotValid => {
                "there is a preemption-timer deadline that is not marked valid"
            }
            Self::Trailing => "there are bytes behind the second VMCS image",
            Self::ImageTail => "the VMCS image has bytes other than 0 behind its last field",
            Self::Shadow => "the current VMCS has the shadow-VMCS indicator",
        }
    }
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    from.get(at..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .unwrap_or([0; N])
}

impl NestedState {
    /// Reads the bytes of a nested state; what is behind its `size` is not part of it.
    ///
    /// # Errors
    ///
    /// As `KVM_SET_NESTED_STATE` refuses what cannot be one for any vCPU (checks 1 to 5).
    pub fn read(from: &[u8]) -> Result<Self, Refused> {
        let size = u32::from_le_bytes(bytes(from, 4)) as usize;
        if from.len() < 8 {
            return Err(Refused::step(1));
        }
        if size < HEADER {
            return Err(Refused::step(2));
        }
        let Some(data) = from.get(HEADER..size) else {
            return Err(Refused::step(1));
        };
        let state = Self {
            flags: u16::from_le_bytes(bytes(from, 0)),
            format: u16::from_le_bytes(bytes(from, 2)),
            vmxon: u64::from_le_bytes(bytes(from, 8)),
            vmcs: u64::from_le_bytes(bytes(from, 16)),
            smm_flags: u16::from_le_bytes(bytes(from, 24)),
            padding: (bytes(from, 26), bytes(from, 40)),
            vmx_flags: u32::from_le_bytes(bytes(from, 28)),
            deadline: u64::from_le_bytes(bytes(from, 32)),
            data: data.to_vec(),
        };
        if state.flags & !state_flag::ALL != 0 {
            return Err(Refused::step(3));
        }
        if state.has(state_flag::RUN_PENDING) && !state.has(state_flag::GUEST_MODE) {
            return Err(Refused::step(4));
        }
        if state.format != 0 {
            return Err(Refused::step(5));
        }
        Ok(state)
    }

    /// Its bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.data.len());
        out.extend(self.flags.to_le_bytes());
        out.extend(self.format.to_le_bytes());
        out.extend(((HEADER + self.data.len()) as u32).to_le_bytes());
        out.extend(self.vmxon.to_le_bytes());
        out.extend(self.vmcs.to_le_bytes());
        out.extend(self.smm_flags.to_le_bytes());
        out.extend(self.padding.0);
        out.extend(self.vmx_flags.to_le_bytes());
        out.extend(self.deadline.to_le_bytes());
        out.extend(self.padding.1);
        out.extend(&self.data);
        out
    }

    /// Whether a [`state_flag`] is set.
    #[must_use]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// The image of the current VMCS, with what of its 4096 bytes is there.
    #[must_use]
    pub fn image(&self) -> Option<&[u8]> {
        let end = self.data.len().min(IMAGE);
        (end != 0).then(|| &self.data[..end])
    }

    /// The image of the shadow VMCS, with what of its 4096 bytes is there.
    #[must_use]
    pub fn shadow_image(&self) -> Option<&[u8]> {
        let end = self.data.len().min(2 * IMAGE);
        self.data.get(IMAGE..end).filter(|image| !image.is_empty())
    }

    /// The checks that `KVM_SET_NESTED_STATE` makes before it looks at fields, in its order (6 to 36).
    ///
    /// KVM has dropped the old state from check 21 on; nothing is changed here.
    ///
    /// # Errors
    ///
    /// The first check that fails.
    pub fn check(&self, taker: &Taker) -> Result<(), Refused> {
        let fails = |number: u8, failed: bool| match failed {
            true => Err(Refused::step(number)),
            false => Ok(()),
        };
        let guest = self.has(state_flag::GUEST_MODE);
        let enlightened = self.has(state_flag::EVMCS);
        let in_vmx = self.vmxon != NO_ADDRESS;
        let current = self.vmcs != NO_ADDRESS;
        let smm_guest = self.smm_flags & smm_flag::GUEST_MODE != 0;
        if in_vmx {
            fails(9, !taker.vmx)?;
            fails(10, !taker.is_page(self.vmxon))?;
        } else {
            fails(6, self.smm_flags != 0)?;
            fails(7, current)?;
            fails(8, self.flags & !state_flag::EVMCS != 0)?;
        }
        fails(11, smm_guest && guest)?;
        let known = smm_flag::GUEST_MODE | smm_flag::VMXON;
        fails(12, self.smm_flags & !known != 0)?;
        fails(13, self.vmx_flags & !DEADLINE_VALID != 0)?;
        if taker.smm {
            fails(14, guest)?;
        } else {
            fails(15, self.smm_flags != 0)?;
        }
        fails(16, smm_guest && self.smm_flags & smm_flag::VMXON == 0)?;
        fails(17, enlightened && !taker.vmx)?;
        fails(18, enlightened && !taker.enlightened)?;
        if !in_vmx {
            return Ok(());
        }
        let layout = self.image().and_then(|image| taker.layout(image));
        let least = layout.map_or_else(
            || taker.layouts.iter().map(|layout| layout.used()).min(),
            |layout| Some(layout.used()),
        );
        if self.data.len() < least.unwrap_or(IMAGE) {
            return fails(22, guest || enlightened || current);
        }
        if current {
            fails(24, self.vmcs == self.vmxon)?;
            fails(25, !taker.is_page(self.vmcs))?;
        } else {
            fails(28, !enlightened)?;
        }
        let Some(layout) = layout else {
            return fails(31, true);
        };
        if !guest {
            return Ok(());
        }
        let link = self
            .image()
            .and_then(|image| layout.read(image).ok())
            .map_or(NO_ADDRESS, |vmcs| shadow_link(&vmcs));
        if link != NO_ADDRESS {
            let shadow = self.shadow_image().unwrap_or_default();
            fails(34, shadow.len() < layout.used())?;
            let good = revision(shadow).is_some_and(|(id, is)| is && layout.takes(id));
            fails(36, !good)?;
        }
        Ok(())
    }

    /// What is odd about it and KVM does not mind.
    pub fn findings(&self, layout: &Layout) -> Vec<Finding> {
        let image = self.image();
        let tail = image.and_then(|image| image.get(layout.used()..));
        [
            (Finding::Padding, self.padding != ([0; 2], [0; 88])),
            (Finding::GifSet, self.has(state_flag::GIF_SET)),
            (
                Finding::EnlightenedWithAddress,
                self.has(state_flag::EVMCS) && self.vmcs != NO_ADDRESS,
            ),
            (
                Finding::MtfOutsideGuest,
                self.has(state_flag::MTF_PENDING) && !self.has(state_flag::GUEST_MODE),
            ),
            (
                Finding::DeadlineNotValid,
                self.deadline != 0 && self.vmx_flags & DEADLINE_VALID == 0,
            ),
            (Finding::Trailing, self.data.len() > 2 * IMAGE),
            (
                Finding::ImageTail,
                tail.is_some_and(|tail| tail.iter().any(|&byte| byte != 0)),
            ),
            (
                Finding::Shadow,
                image.and_then(revision).is_some_and(|(_, shadow)| shadow),
            ),
        ]
        .into_iter()
        .filter_map(|(finding, is)| is.then_some(finding))
        .collect()
    }
}

/// The link pointer, where VMCS shadowing uses it.
fn shadow_link(vmcs: &crate::vmcs::Vmcs) -> u64 {
    use crate::control::{proc1, proc2};
    let secondary = vmcs.get(Field::CPU_BASED_VM_EXEC_CONTROL)
        & u64::from(proc1::ACTIVATE_SECONDARY_CONTROLS)
        != 0;
    let shadowing =
        vmcs.get(Field::SECONDARY_VM_EXEC_CONTROL) & u64::from(proc2::VMCS_SHADOWING) != 0;
    if secondary && shadowing {
        vmcs.get(Field::VMCS_LINK_POINTER)
    } else {
        NO_ADDRESS
    }
}

#[cfg(test)]
mod tests;
