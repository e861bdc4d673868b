//! Layouts: where the bytes of a VMCS are, in guest memory or in a file.

use alloc::borrow::Cow;
use alloc::vec::Vec;

use crate::field::{Field, FieldSet};
use crate::vmcs::Vmcs;

mod map;
mod table;

pub use map::{RegionMap, RegionPage};
pub use table::{TableError, TableProblem};

include!(concat!(env!("OUT_DIR"), "/layouts.rs"));

/// A format of the VMCS region. Vol. 3C, "Format of the VMCS Region": the revision identifier, the
/// VMX-abort indicator, and data in a format of the processor's own. This is that format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    name: Cow<'static, str>,
    title: Cow<'static, str>,
    revisions: Cow<'static, [u32]>,
    size: usize,
    used: usize,
    launch_state: Option<LaunchState>,
    slots: Cow<'static, [Slot]>,
    fields: FieldSet,
    yields: Cow<'static, [(Field, Field)]>,
}

/// The place of one field in a [`Layout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The field.
    pub field: Field,
    /// Bytes from the start of the region.
    pub offset: u16,
    /// Bytes: 1 to 8. The value is little-endian, zero-extended when it is read.
    pub width: u8,
    /// The 32-bit value is stored rotated left by 8 bits.
    pub rotated: bool,
}

/// Where a region keeps whether its VMCS was launched, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchState {
    /// Bytes from the start of the region.
    pub offset: u16,
    /// Bytes: 1 to 4.
    pub width: u8,
    /// What is written for clear.
    pub clear: u32,
    /// What is written for launched.
    pub launched: u32,
    /// A VMCS is launched when one of these bits is set.
    pub mask: u32,
}

impl LaunchState {
    /// 32 bits at `offset`: 0 is clear, everything else launched, as most have it.
    #[must_use]
    pub const fn at(offset: u16) -> Self {
        Self {
            offset,
            width: 4,
            clear: 0,
            launched: 1,
            mask: u32::MAX,
        }
    }
}

/// A region cannot be read or written, or a layout makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The bytes end before the layout does.
    #[error("a region of {found} bytes; the layout needs {needed}")]
    Short {
        /// Bytes there are.
        found: usize,
        /// Bytes the layout needs.
        needed: usize,
    },
    /// The bytes are of another revision.
    #[error("revision {found:#010x}; the layout's is {expected:#010x}")]
    Revision {
        /// The revision in the region.
        found: u32,
        /// The revision of the layout.
        expected: u32,
    },
    /// A revision identifier has 31 bits.
    #[error("revision {0:#010x} has bit 31 set")]
    WideRevision(u32),
    /// A region has room for its header, and at most 4096 bytes.
    #[error("a region of {0} bytes; it has 8 to 4096")]
    Size(usize),
    /// A slot, or the launch state, lies outside of the region or in the header.
    #[error("{0} bytes at offset {1} are not in the region or in its header")]
    Outside(u8, u16),
    /// A slot is empty or wider than a value.
    #[error("the slot of {0:?} is {1} bytes wide")]
    SlotWidth(Field, u8),
    /// Two slots have a byte in common, or a slot and the launch state have.
    #[error("two slots share the byte at offset {0}")]
    Overlap(u16),
    /// A field has two slots.
    #[error("{0:?} has two slots")]
    Twice(Field),
    /// The launch state is empty or wider than 4 bytes.
    #[error("a launch state of {0} bytes")]
    LaunchWidth(u8),
    /// Clear and launched cannot be told apart, or do not fit.
    #[error("the launch state's values for clear and launched do not fit or do not differ")]
    LaunchValues,
}

/// What a region says beside its fields.
#[derive(Clone, Copy)]
pub(crate) struct Header {
    pub shadow: bool,
    pub abort: u32,
    pub launched: bool,
}

/// Bytes of the part that every format shares: revision identifier and VMX-abort indicator.
const COMMON: usize = 8;

/// The most that a region may have. Vol. 3D, "Basic VMX Information".
const MAX_SIZE: usize = 4096;

impl Slot {
    /// The place of `field`: `width` bytes from `offset`.
    #[must_use]
    pub const fn new(field: Field, offset: u16, width: u8) -> Self {
        Self {
            field,
            offset,
            width,
            rotated: false,
        }
    }

    /// The same place, for a value that is stored rotated left by 8 bits.
    #[must_use]
    pub const fn rotated(mut self) -> Self {
        self.rotated = true;
        self
    }

    /// The value of the field, no wider than it, that the bytes in the slot stand for.
    #[must_use]
    pub fn value(&self, bytes: u64) -> u64 {
        self.order(bytes, u32::rotate_right) & self.field.mask()
    }

    /// The bytes that stand for a value of the field; of the value as much as fits.
    #[must_use]
    pub fn stored(&self, value: u64) -> u64 {
        self.order(value & self.field.mask(), u32::rotate_left)
    }

    fn order(&self, bits: u64, rotate: fn(u32, u32) -> u32) -> u64 {
        if self.rotated {
            rotate(bits as u32, 8).into()
        } else {
            bits
        }
    }

    /// What is in the slot, even where it is wider than the field.
    pub(crate) fn load(&self, region: &[u8]) -> u64 {
        self.order(load(region, self.offset, self.width), u32::rotate_right)
    }

    pub(crate) fn store(&self, region: &mut [u8], value: u64) {
        let bits = self.order(value, u32::rotate_left);
        store(region, self.offset, self.width, bits);
    }

    const fn end(&self) -> usize {
        self.offset as usize + self.width as usize
    }
}

/// The revision identifier (30:0) and the shadow-VMCS indicator (31) of a region, whatever its
/// layout. Vol. 3C, "Format of the VMCS Region".
#[must_use]
pub fn revision(region: &[u8]) -> Option<(u32, bool)> {
    let word = u32::from_le_bytes(*region.first_chunk()?);
    Some((word & !SHADOW, word & SHADOW != 0))
}

const SHADOW: u32 = 1 << 31;

impl Layout {
    /// KVM's `vmcs12`, as the kernels 6.1 to 6.12 have it: the fields of its `vmcs_field_to_offset`
    /// table. The bytes of the former CR3-target values belong to no field.
    #[must_use]
    pub fn kvm() -> &'static Self {
        &KVM
    }

    /// Ours: a slot for every field.
    #[must_use]
    pub fn hypernest() -> &'static Self {
        &HYPERNEST
    }

    /// Every layout that is built in, by the names in `data/layouts.csv` and two of our own.
    #[must_use]
    pub fn built_in() -> &'static [&'static Self] {
        &BUILT_IN
    }

    /// The built-in layout of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        BUILT_IN.into_iter().find(|layout| layout.name == name)
    }

    const fn fixed(
        name: &'static str,
        title: &'static str,
        revisions: &'static [u32],
        launch_state: Option<LaunchState>,
        slots: &'static [Slot],
        yields: &'static [(Field, Field)],
    ) -> Self {
        Self {
            name: Cow::Borrowed(name),
            title: Cow::Borrowed(title),
            revisions: Cow::Borrowed(revisions),
            size: MAX_SIZE,
            used: used(launch_state, slots),
            launch_state,
            slots: Cow::Borrowed(slots),
            fields: fields_of(slots),
            yields: Cow::Borrowed(yields),
        }
    }

    /// A layout of a region of `size` bytes. Without `revisions` it takes any, as one whose
    /// revision is that of the processor below.
    ///
    /// # Errors
    ///
    /// If the parts do not fit into the region, or not beside each other.
    pub fn new(
        name: impl Into<Cow<'static, str>>,
        revisions: &[u32],
        size: usize,
        launch_state: Option<LaunchState>,
        slots: Vec<Slot>,
    ) -> Result<Self, LayoutError> {
        if let Some(&wide) = revisions.iter().find(|&&id| id & SHADOW != 0) {
            return Err(LayoutError::WideRevision(wide));
        }
        if !(COMMON..=MAX_SIZE).contains(&size) {
            return Err(LayoutError::Size(size));
        }
        let mut taken: Vec<(u16, u8)> = Vec::new();
        if let Some(launch) = launch_state {
            if launch.width == 0 || launch.width > 4 {
                return Err(LayoutError::LaunchWidth(launch.width));
            }
            let bits = u32::MAX >> (32 - 8 * u32::from(launch.width));
            if launch.launched & launch.mask & bits == 0
                || launch.clear & launch.mask != 0
                || (launch.clear | launch.launched) & !bits != 0
            {
                return Err(LayoutError::LaunchValues);
            }
            taken.push((launch.offset, launch.width));
        }
        let mut fields = FieldSet::EMPTY;
        for slot in &slots {
            let most = if slot.rotated { 4 } else { 8 };
            let least = if slot.rotated { 4 } else { 1 };
            if !(least..=most).contains(&slot.width) {
                return Err(LayoutError::SlotWidth(slot.field, slot.width));
            }
            if fields.contains(slot.field) {
                return Err(LayoutError::Twice(slot.field));
            }
            fields.insert(slot.field);
            taken.push((slot.offset, slot.width));
        }
        taken.sort_unstable();
        let mut end = COMMON;
        for (offset, width) in taken {
            let start = usize::from(offset);
            if start < COMMON || start + usize::from(width) > size {
                return Err(LayoutError::Outside(width, offset));
            }
            if start < end {
                return Err(LayoutError::Overlap(offset));
            }
            end = start + usize::from(width);
        }
        Ok(Self {
            name: name.into(),
            title: Cow::Borrowed(""),
            revisions: Cow::Owned(revisions.to_vec()),
            size,
            used: end,
            launch_state,
            slots: Cow::Owned(slots),
            fields,
            yields: Cow::Borrowed(&[]),
        })
    }

    /// The same layout under one revision identifier, which must have 31 bits.
    ///
    /// # Errors
    ///
    /// If it has 32.
    pub fn with_revision(&self, revision: u32) -> Result<Self, LayoutError> {
        if revision & SHADOW != 0 {
            return Err(LayoutError::WideRevision(revision));
        }
        let mut layout = self.clone();
        layout.revisions = Cow::Owned(Vec::from([revision]));
        Ok(layout)
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is, in a line.
    #[must_use]
    pub fn title(&self) -> &str {
        &self.title
    }

    /// The revision identifier, 31 bits, that it is written with: the first of
    /// [`revisions`](Self::revisions), or 0 where there are none.
    #[must_use]
    pub fn revision(&self) -> u32 {
        self.revisions.first().copied().unwrap_or(0)
    }

    /// The revision identifiers of its regions. None: any, that of the processor below.
    #[must_use]
    pub fn revisions(&self) -> &[u32] {
        &self.revisions
    }

    /// Whether a region with this revision identifier may be of this layout.
    #[must_use]
    pub fn takes(&self, revision: u32) -> bool {
        self.revisions.is_empty() || self.revisions.contains(&revision)
    }

    /// Fields whose bytes are those of another field: the first reads and writes what is the
    /// second's, so that it has no slot here.
    #[must_use]
    pub fn yields(&self) -> &[(Field, Field)] {
        &self.yields
    }

    /// Whether a processor can keep VMCSs in it: it has one revision identifier of its own and a
    /// launch state, and no two fields share bytes. The others are for files.
    #[must_use]
    pub fn is_for_machines(&self) -> bool {
        self.revisions.len() == 1 && self.launch_state.is_some() && self.yields.is_empty()
    }

    /// Bytes of a region, as IA32_VMX_BASIC 44:32 gives them.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Bytes up to the end of the last slot: what reading and writing need.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Its launch state, where the region has one.
    #[must_use]
    pub fn launch_state(&self) -> Option<LaunchState> {
        self.launch_state
    }

    /// Its slots, in no particular order.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Whether `field` has a slot.
    #[inline]
    #[must_use]
    pub fn holds(&self, field: Field) -> bool {
        self.fields.contains(field)
    }

    /// The fields that have a slot.
    #[must_use]
    pub fn field_mask(&self) -> &FieldSet {
        &self.fields
    }

    pub(crate) fn check(&self, found: usize) -> Result<(), LayoutError> {
        if found < self.used {
            return Err(LayoutError::Short {
                found,
                needed: self.used,
            });
        }
        Ok(())
    }

    /// Reads a region. Fields without a slot are 0, bytes outside of the slots are not looked at, and
    /// a region without launch state is clear.
    ///
    /// # Errors
    ///
    /// If there are not enough bytes, or they are of another revision.
    pub fn read(&self, region: &[u8]) -> Result<Vmcs, LayoutError> {
        let header = self.header(region)?;
        let mut vmcs = Vmcs::new();
        vmcs.shadow = header.shadow;
        vmcs.abort = header.abort;
        vmcs.launched = header.launched;
        for slot in self.slots.iter() {
            vmcs.set(slot.field, slot.load(region));
        }
        Ok(vmcs)
    }

    /// Writes a region, all but the bytes that belong to no slot. Fields without a slot are lost.
    ///
    /// # Errors
    ///
    /// If there are not enough bytes; none is changed then.
    pub fn write(&self, vmcs: &Vmcs, region: &mut [u8]) -> Result<(), LayoutError> {
        let header = Header {
            shadow: vmcs.shadow,
            abort: vmcs.abort,
            launched: vmcs.launched,
        };
        self.set_header(region, header)?;
        for slot in self.slots.iter() {
            slot.store(region, vmcs.get(slot.field));
        }
        Ok(())
    }

    /// What a region says beside its fields; an error as for [`read`](Self::read).
    pub(crate) fn header(&self, region: &[u8]) -> Result<Header, LayoutError> {
        self.check(region.len())?;
        let (found, shadow) = revision(region).unwrap_or_default();
        if !self.takes(found) {
            return Err(LayoutError::Revision {
                found,
                expected: self.revision(),
            });
        }
        Ok(Header {
            shadow,
            abort: load(region, 4, 4) as u32,
            launched: self.is_launched(region)?,
        })
    }

    pub(crate) fn set_header(&self, region: &mut [u8], header: Header) -> Result<(), LayoutError> {
        self.check(region.len())?;
        let shadow = if header.shadow { SHADOW } else { 0 };
        store(region, 0, 4, (self.revision() | shadow).into());
        store(region, 4, 4, header.abort.into());
        self.set_launched(region, header.launched)
    }

    /// Whether the launch state of a region is launched. One without launch state is clear.
    ///
    /// # Errors
    ///
    /// If there are not enough bytes.
    pub fn is_launched(&self, region: &[u8]) -> Result<bool, LayoutError> {
        self.check(region.len())?;
        Ok(self.launch_state.is_some_and(|launch| {
            load(region, launch.offset, launch.width) as u32 & launch.mask != 0
        }))
    }

    /// Sets the launch state of a region and nothing else: what VMCLEAR does to a VMCS that is not
    /// current. Vol. 3C, "VMCLEAR".
    ///
    /// # Errors
    ///
    /// If there are not enough bytes; none is changed then.
    pub fn set_launched(&self, region: &mut [u8], launched: bool) -> Result<(), LayoutError> {
        self.check(region.len())?;
        if let Some(launch) = self.launch_state {
            let value = if launched {
                launch.launched
            } else {
                launch.clear
            };
            store(region, launch.offset, launch.width, value.into());
        }
        Ok(())
    }
}

/// Little-endian bytes of a region that is long enough; what is not there is 0.
fn load(region: &[u8], offset: u16, width: u8) -> u64 {
    let start = usize::from(offset);
    let mut value = [0; 8];
    if let (Some(from), Some(to)) = (
        region.get(start..start + usize::from(width)),
        value.get_mut(..usize::from(width)),
    ) {
        to.copy_from_slice(from);
    }
    u64::from_le_bytes(value)
}

fn store(region: &mut [u8], offset: u16, width: u8, value: u64) {
    let start = usize::from(offset);
    let value = value.to_le_bytes();
    if let (Some(to), Some(from)) = (
        region.get_mut(start..start + usize::from(width)),
        value.get(..usize::from(width)),
    ) {
        to.copy_from_slice(from);
    }
}

const fn fields_of(slots: &[Slot]) -> FieldSet {
    let mut fields = FieldSet::EMPTY;
    let mut i = 0;
    while i < slots.len() {
        fields.insert(slots[i].field);
        i += 1;
    }
    fields
}

const fn used(launch_state: Option<LaunchState>, slots: &[Slot]) -> usize {
    let mut end = match launch_state {
        Some(launch) => launch.offset as usize + launch.width as usize,
        None => COMMON,
    };
    let mut i = 0;
    while i < slots.len() {
        if slots[i].end() > end {
            end = slots[i].end();
        }
        i += 1;
    }
    end
}

#[cfg(test)]
mod tests;
