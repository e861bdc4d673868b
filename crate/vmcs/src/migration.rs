//! Nested states inside QEMU's migration streams.
//!
//! A stream (`QEVM`, then sections) does not say how long a device's section is: that is known to who knows all its
//! devices. What is looked for here is known by its name, though: subsection `cpu/nested_state` of a section `cpu`. Whatever
//! surrounds it, as in the file of a snapshot, is passed over.
//!
//! ```text
//! 04 <section: 4> 03 cpu <instance: 4> <version: 4>        a section; numbers are big-endian
//!   ..
//!   05 10 cpu/nested_state <version: 4>                    a subsection
//!     <flags: 2> <format: 2> <size: 4>
//!     05 18 cpu/kvm_nested_state/vmx <version: 4>
//!       <vmxon: 8> <vmcs: 8> <SMM flags: 2>
//!       05 1f cpu/kvm_nested_state/vmx/vmcs12 <version: 4> <4096 bytes>
//!       05 26 cpu/kvm_nested_state/vmx/shadow_vmcs12 <version: 4> <4096 bytes>
//! 7e <section: 4>                                          its end
//! ```
//!
//! The deadline of the preemption timer is not among it.

use crate::nested_state::{HEADER, IMAGE, NestedState, Refused};

/// What a stream begins with.
pub const MAGIC: [u8; 4] = *b"QEVM";

/// A nested state in a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InStream {
    /// Bytes from the start of the stream to its subsection.
    pub offset: usize,
    /// The instance of the `cpu` section that it is in; `None` where it is in none.
    pub cpu: Option<u32>,
    /// The state.
    pub state: NestedState,
}

/// A subsection of a `cpu` section that holds no nested state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the nested state of processor {cpu}, at byte {offset}: {problem}")]
pub struct StreamError {
    /// Bytes from the start of the stream to the subsection.
    pub offset: usize,
    /// The instance of the `cpu` section.
    pub cpu: u32,
    /// What is wrong.
    pub problem: StreamProblem,
}

/// What is wrong with a subsection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamProblem {
    /// The stream ends in it.
    #[error("the stream ends in it")]
    Cut,
    /// It is of a version that nobody knows.
    #[error("version {0}; 1 is known")]
    Version(u32),
    /// It is not of VMX.
    #[error("format {0}; 0 is VMX")]
    Format(u16),
    /// There is no subsection of VMX in it.
    #[error("it has no part cpu/kvm_nested_state/vmx")]
    NoVmx,
    /// Its size is not that of its images.
    #[error("it says {said} bytes and has {there}")]
    Size {
        /// What it says.
        said: u32,
        /// What there is.
        there: usize,
    },
    /// It can be none for any vCPU.
    #[error("{0}")]
    Refused(Refused),
}

const STATE: &[u8] = b"\x05\x10cpu/nested_state";
const VMX: &[u8] = b"\x05\x18cpu/kvm_nested_state/vmx";
const VMCS: &[u8] = b"\x05\x1Fcpu/kvm_nested_state/vmx/vmcs12";
const SHADOW: &[u8] = b"\x05\x26cpu/kvm_nested_state/vmx/shadow_vmcs12";

/// Kind of a section that is whole.
const FULL: u8 = 4;
/// Kind of a section's end.
const FOOTER: u8 = 0x7E;
/// A processor's section is shorter, its extended state included.
const MOST: usize = 64 << 10;

/// Every nested state in `stream`, in its order. What looks like one outside of a `cpu` section and is none is passed
/// over.
pub fn nested_states(stream: &[u8]) -> impl Iterator<Item = Result<InStream, StreamError>> + '_ {
    let mut from = 0;
    core::iter::from_fn(move || {
        loop {
            let offset = from + find(stream.get(from..)?, STATE)?;
            let cpu = section(stream.get(..offset)?);
            let mut cursor = Cursor(stream.get(offset + STATE.len()..)?);
            from = offset + STATE.len();
            match (cursor.state(), cpu) {
                (Ok(state), cpu) => {
                    if cpu.is_some() {
                        // What its images hold is not looked into.
                        from = stream.len() - cursor.0.len();
                    }
                    return Some(Ok(InStream { offset, cpu, state }));
                }
                (Err(problem), Some(cpu)) => {
                    return Some(Err(StreamError {
                        offset,
                        cpu,
                        problem,
                    }));
                }
                (Err(_), None) => {}
            }
        }
    })
}

fn find(bytes: &[u8], word: &[u8]) -> Option<usize> {
    let first = *word.first()?;
    let mut at = 0;
    loop {
        let rest = bytes.get(at..)?;
        at += rest.iter().position(|&byte| byte == first)?;
        if bytes.get(at..)?.starts_with(word) {
            return Some(at);
        }
        at += 1;
    }
}

/// The instance of the `cpu` section that `before` ends in.
fn section(before: &[u8]) -> Option<u32> {
    let before = &before[before.len().saturating_sub(MOST)..];
    let (at, header) = before
        .windows(17)
        .enumerate()
        .rev()
        .find(|(_, window)| window[0] == FULL && window[5..9] == *b"\x03cpu")?;
    let mut footer = [FOOTER, 0, 0, 0, 0];
    footer[1..].copy_from_slice(&header[1..5]);
    if find(&before[at + 17..], &footer).is_some() {
        return None;
    }
    header[9..].first_chunk().map(|id| u32::from_be_bytes(*id))
}

/// What has not been read.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], StreamProblem> {
        let (&taken, rest) = self.0.split_first_chunk().ok_or(StreamProblem::Cut)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, StreamProblem> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, StreamProblem> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, StreamProblem> {
        self.take().map(u64::from_be_bytes)
    }

    fn version(&mut self) -> Result<(), StreamProblem> {
        match self.u32()? {
            1 => Ok(()),
            other => Err(StreamProblem::Version(other)),
        }
    }

    /// Whether a subsection of this name begins, which is cut if the stream ends within its name.
    fn begins(&mut self, name: &'static [u8]) -> Result<bool, StreamProblem> {
        if let Some(rest) = self.0.strip_prefix(name) {
            self.0 = rest;
            self.version()?;
            return Ok(true);
        }
        if !self.0.is_empty() && name.starts_with(self.0) {
            return Err(StreamProblem::Cut);
        }
        Ok(false)
    }

    /// What is missing at the end of the stream has been cut off.
    fn or_cut(&self, problem: StreamProblem) -> StreamProblem {
        if self.0.is_empty() {
            StreamProblem::Cut
        } else {
            problem
        }
    }

    fn image(&mut self) -> Result<&'a [u8], StreamProblem> {
        let (image, rest) = self.0.split_at_checked(IMAGE).ok_or(StreamProblem::Cut)?;
        self.0 = rest;
        Ok(image)
    }

    fn state(&mut self) -> Result<NestedState, StreamProblem> {
        self.version()?;
        let mut state = NestedState {
            flags: self.u16()?,
            format: self.u16()?,
            ..NestedState::default()
        };
        let said = self.u32()?;
        if state.format != 0 {
            return Err(StreamProblem::Format(state.format));
        }
        if !self.begins(VMX)? {
            return Err(self.or_cut(StreamProblem::NoVmx));
        }
        (state.vmxon, state.vmcs) = (self.u64()?, self.u64()?);
        state.smm_flags = self.u16()?;
        for name in [VMCS, SHADOW] {
            if self.begins(name)? {
                state.data.extend(self.image()?);
            }
        }
        let there = HEADER + state.data.len();
        if said as usize != there {
            return Err(self.or_cut(StreamProblem::Size { said, there }));
        }
        NestedState::read(&state.to_bytes()).map_err(StreamProblem::Refused)
    }
}
