//! What a file holds: a raw region, KVM's nested state, or the log of a failed VM entry; and what can be asked of it.

use alloc::borrow::ToOwned;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::Cell;

use crate::caps::Caps;
use crate::checks::{self, CpuFacts, EntryCtx, PeekMemory, Verdict};
use crate::control::exit;
use crate::dump::{Dump, DumpTextError};
use crate::field::{Field, FieldSet};
use crate::identify::{Candidate, identify};
use crate::layout::{Layout, LayoutError, revision};
use crate::migration;
use crate::nested_state::{IMAGE, NestedState};
use crate::translate::{Fate, Losses, TranslateError, Translation};
use crate::vmcs::Vmcs;

/// What a file with a VMCS in it is.
#[derive(Clone, Debug)]
pub enum File {
    /// The bytes of a region.
    Region(Vec<u8>),
    /// `struct kvm_nested_state`, with the image of a VMCS.
    NestedState(Box<NestedState>),
    /// A kernel log.
    Log(Box<Dump>),
}

/// A VMCS, and what is known of where it came from.
#[derive(Clone, Debug)]
pub struct Found {
    /// The values.
    pub vmcs: Vmcs,
    /// `None`: a log, which has no layout.
    pub layout: Option<Layout>,
    /// The fields that the file has.
    pub fields: FieldSet,
}

/// A file in another layout.
#[derive(Clone, Debug)]
pub struct Translated {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What becomes of each field, by encoding.
    pub report: Vec<(Field, Fate)>,
}

/// Why a file gives no VMCS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// There are no bytes.
    #[error("it is empty")]
    Empty,
    /// It is a migration stream.
    #[error("a migration stream; `hypernest vmcs extract` gets the nested states out of it")]
    Stream,
    /// It is too long for what it is.
    #[error(
        "{0} bytes that are neither a region (at most 4096), nor a nested state, nor a log with *** Guest State ***"
    )]
    Long(usize),
    /// There is no VMCS in the nested state.
    #[error("a nested state without a VMCS image")]
    NoImage,
    /// A log that is not whole.
    #[error(transparent)]
    Log(#[from] DumpTextError),
    /// Nobody knows its revision.
    #[error(
        "{bytes} bytes with revision {revision:#010x} are of no known layout; name one with --layout"
    )]
    Unknown {
        /// How many.
        bytes: usize,
        /// The revision.
        revision: u32,
    },
    /// Nobody knows its revision, and layouts that take any do not fit its values.
    #[error(
        "revision {revision:#010x} is of no known layout, and the values fit none well (best: {best}, {broken} values that break a rule); name one with --layout"
    )]
    NoneFits {
        /// The revision.
        revision: u32,
        /// The layout that fits best.
        best: String,
        /// How many values break a rule in it.
        broken: usize,
    },
    /// It is not of the layout that was named.
    #[error("not of layout {name}: {error}")]
    Layout {
        /// The layout.
        name: String,
        /// What is wrong.
        error: LayoutError,
    },
}

/// Broken rules that a region without a known revision may have and still be called one.
const GUESSED: usize = 2;

impl File {
    /// Finds out what `bytes` are.
    ///
    /// # Errors
    ///
    /// If there is no VMCS in them.
    pub fn read(bytes: Vec<u8>) -> Result<Self, FileError> {
        if bytes.is_empty() {
            return Err(FileError::Empty);
        }
        if bytes.starts_with(&migration::MAGIC) {
            return Err(FileError::Stream);
        }
        if let Ok(text) = core::str::from_utf8(&bytes)
            && text.contains("*** Guest State ***")
        {
            return Ok(Self::Log(Box::new(Dump::read(text)?)));
        }
        if let Ok(state) = NestedState::read(&bytes) {
            if state.image().is_none() {
                return Err(FileError::NoImage);
            }
            return Ok(Self::NestedState(Box::new(state)));
        }
        if bytes.len() > IMAGE {
            return Err(FileError::Long(bytes.len()));
        }
        Ok(Self::Region(bytes))
    }

    /// In a word.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Region(_) => "region",
            Self::NestedState(_) => "nested state",
            Self::Log(_) => "log",
        }
    }

    /// The bytes of the region, where there are some.
    #[must_use]
    pub fn region(&self) -> Option<&[u8]> {
        match self {
            Self::Region(bytes) => Some(bytes),
            Self::NestedState(state) => state.image(),
            Self::Log(_) => None,
        }
    }

    /// The layouts it may be of, best first.
    #[must_use]
    pub fn candidates(&self) -> Vec<Candidate<'static>> {
        self.region().map_or(Vec::new(), |region| {
            identify(region, Layout::built_in().iter().copied())
        })
    }

    /// The likeliest layout; `None` for a log.
    ///
    /// # Errors
    ///
    /// If none is likely.
    pub fn layout(&self) -> Result<Option<&'static Layout>, FileError> {
        let Some(region) = self.region() else {
            return Ok(None);
        };
        let (revision, _) = revision(region).unwrap_or_default();
        let found = self.candidates();
        let Some(best) = found.first() else {
            let bytes = region.len();
            return Err(FileError::Unknown { bytes, revision });
        };
        if !best.by_revision && best.broken.len() > GUESSED {
            return Err(FileError::NoneFits {
                revision,
                best: best.layout.name().to_owned(),
                broken: best.broken.len(),
            });
        }
        Ok(Some(best.layout))
    }

    /// The VMCS, of the layout that is `asked` for or of the likeliest.
    ///
    /// # Errors
    ///
    /// If it is not of that layout, or of none.
    pub fn vmcs(&self, asked: Option<&Layout>) -> Result<Found, FileError> {
        let region = match self {
            Self::Log(dump) => {
                return Ok(Found {
                    vmcs: dump.vmcs.clone(),
                    layout: None,
                    fields: dump.fields,
                });
            }
            Self::Region(_) | Self::NestedState(_) => self.region().unwrap_or_default(),
        };
        let layout = match (asked, self.layout()) {
            (Some(asked), _) => asked,
            (None, Ok(Some(likely))) => likely,
            (None, Ok(None)) => return Err(FileError::NoImage),
            (None, Err(error)) => return Err(error),
        };
        let vmcs = layout.read(region).map_err(|error| FileError::Layout {
            name: layout.name().to_owned(),
            error,
        })?;
        Ok(Found {
            vmcs,
            layout: Some(layout.clone()),
            fields: *layout.field_mask(),
        })
    }

    /// The same in another layout: a region, or a nested state with its images translated. A log becomes a region.
    ///
    /// # Errors
    ///
    /// If something would be lost that must not be, or the file is not of the layout that `map` begins with.
    pub fn translate(
        &self,
        map: &Translation,
        losses: Losses,
    ) -> Result<Translated, TranslateError> {
        let translated = |region: &[u8]| {
            let mut out = vec![0; map.to().size()];
            map.run(region, &mut out, losses).map(|()| out)
        };
        let (bytes, report) = match self {
            Self::Region(region) => (translated(region)?, map.report(region)?),
            Self::Log(dump) => {
                let mut region = vec![0; map.from().size()];
                map.from().write(&dump.vmcs, &mut region)?;
                (translated(&region)?, map.report(&region)?)
            }
            Self::NestedState(state) => {
                let image = state.image().unwrap_or_default();
                let mut new = state.as_ref().clone();
                new.data = translated(image)?;
                new.data.resize(IMAGE, 0);
                if let Some(shadow) = state.shadow_image() {
                    new.data.extend(translated(shadow)?);
                }
                (new.to_bytes(), map.report(image)?)
            }
        };
        Ok(Translated { bytes, report })
    }

    /// What a translation would lose: in a nested state, of both its images.
    #[must_use]
    pub fn losses(&self, map: &Translation) -> Vec<(Field, u64)> {
        match self {
            Self::Region(region) => map.losses(region).collect(),
            Self::Log(dump) => {
                let lost = |field: &Field| !map.to().holds(*field) && map.from().holds(*field);
                let values = Field::ALL.into_iter().filter(lost);
                let values = values.map(|field| (field, dump.vmcs.get(field)));
                values.filter(|&(_, value)| value != 0).collect()
            }
            Self::NestedState(state) => {
                let images = [state.image(), state.shadow_image()];
                let images = images.into_iter().flatten();
                images.flat_map(|image| map.losses(image)).collect()
            }
        }
    }
}

impl Found {
    /// The value of a field that the file has.
    #[must_use]
    pub fn get(&self, field: Field) -> Option<u64> {
        self.fields.contains(field).then(|| self.vmcs.get(field))
    }

    /// The fields in which two differ. One that only one file has is there if it is not 0.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<(Field, Option<u64>, Option<u64>)> {
        Field::ALL
            .into_iter()
            .map(|field| (field, self.get(field), other.get(field)))
            .filter(|(_, a, b)| match (a, b) {
                (Some(a), Some(b)) => a != b,
                (one, other) => one.or(*other).unwrap_or(0) != 0,
            })
            .collect()
    }

    /// Walks the checks of VM entry over it.
    ///
    /// What is not in the file lets pass: the processor's registers, and memory, whose rules cannot be judged.
    #[must_use]
    pub fn lint(&self, caps: &Caps) -> Lint {
        let memory = Elsewhere::default();
        let entry = EntryCtx {
            vmcs: &self.vmcs,
            caps,
            cpu: self.processor(),
            memory: &memory,
        };
        let mut lint = Lint::default();
        for check in checks::all() {
            lint.checks += 1;
            memory.0.set(false);
            let verdict = check.verdict(&entry);
            // A log does not have every field.
            let missing = check
                .fields
                .iter()
                .any(|&field| !self.fields.contains(field));
            if memory.0.get() || self.layout.is_none() && missing && verdict == Verdict::Fails {
                lint.not_judged.push(check.id);
            } else if verdict == Verdict::Fails {
                lint.failed.push((check.id, checks::explain(check, &entry)));
            }
        }
        lint
    }

    /// A processor that lets pass what the file does not tell.
    fn processor(&self) -> CpuFacts {
        let five_levels = self.vmcs.get(Field::HOST_CR4) >> 12 & 1 != 0;
        CpuFacts {
            physical_bits: 46,
            linear_bits: if five_levels { 57 } else { 48 },
            efer: 0xD01,
            debugctl: 0xFFC3,
            perf_global_ctrl: u64::MAX,
            rtit_ctl: u64::MAX,
            lbr_ctl: u64::MAX,
            spec_ctrl: u64::MAX,
            lam: true,
            sgx: true,
            rtm: true,
            bus_lock_debug: true,
            fred: true,
            long_mode: self.vmcs.get(Field::VM_EXIT_CONTROLS)
                & u64::from(exit::HOST_ADDRESS_SPACE_SIZE)
                != 0,
            smm: false,
            seam: false,
            tracing: false,
            current_vmcs: u64::MAX,
            vmxon: u64::MAX - 1,
        }
    }
}

/// What the checks of VM entry say of a VMCS in a file.
#[derive(Clone, Debug, Default)]
pub struct Lint {
    /// How many were walked.
    pub checks: usize,
    /// Those that fail: their ids, and what they say with the values they read.
    pub failed: Vec<(&'static str, String)>,
    /// Those that need what is not in the file.
    pub not_judged: Vec<&'static str>,
}

/// The memory of the machine that the file is from, which nobody has.
#[derive(Default)]
struct Elsewhere(Cell<bool>);

impl PeekMemory for Elsewhere {
    fn read_u32(&self, _gpa: u64) -> Option<u32> {
        self.0.set(true);
        None
    }
    fn read_u64(&self, _gpa: u64) -> Option<u64> {
        self.0.set(true);
        None
    }
    fn accepts_revision(&self, _revision: u32) -> bool {
        true
    }
}
