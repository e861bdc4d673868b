//! Layouts: where the bytes of a VMCS are, in guest memory or in a file.

use alloc::borrow::Cow;
use alloc::vec::Vec;

use crate::field::{Field, FieldSet};
use crate::vmcs::Vmcs;

include!(concat!(env!("OUT_DIR"), "/layouts.rs"));

/// A format of the VMCS region. Vol. 3C, "Format of the VMCS Region": the revision identifier, the
/// VMX-abort indicator, and data in a format of the processor's own. This is that format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    name: Cow<'static, str>,
    revision: u32,
    size: usize,
    used: usize,
    launch_state: u16,
    slots: Cow<'static, [Slot]>,
    fields: FieldSet,
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
    /// A region has at most 4096 bytes.
    #[error("a region of {0} bytes; 4096 is the most")]
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
}

/// Bytes of the part that every format shares: revision identifier and VMX-abort indicator.
const COMMON: usize = 8;

/// Bytes of the launch state.
const LAUNCH_STATE: u8 = 4;

/// The most that a region may have. Vol. 3D, "Basic VMX Information".
const MAX_SIZE: usize = 4096;

static KVM: Layout = Layout::fixed("kvm", 0x11E5_7ED0, &KVM_SLOTS);

// The revision reads HYPN in memory.
static HYPERNEST: Layout =
    Layout::fixed("hypernest", u32::from_le_bytes(*b"HYPN"), &HYPERNEST_SLOTS);

impl Slot {
    /// The place of `field`: `width` bytes from `offset`.
    #[must_use]
    pub const fn new(field: Field, offset: u16, width: u8) -> Self {
        Self {
            field,
            offset,
            width,
        }
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

    const fn fixed(name: &'static str, revision: u32, slots: &'static [Slot]) -> Self {
        Self {
            name: Cow::Borrowed(name),
            revision,
            size: MAX_SIZE,
            used: used(8, slots),
            launch_state: 8,
            slots: Cow::Borrowed(slots),
            fields: fields_of(slots),
        }
    }

    /// A layout of a region of `size` bytes with a 32-bit launch state (0 is clear) at offset
    /// `launch_state`.
    ///
    /// # Errors
    ///
    /// If the parts do not fit into the region, or not beside each other.
    pub fn new(
        name: impl Into<Cow<'static, str>>,
        revision: u32,
        size: usize,
        launch_state: u16,
        slots: Vec<Slot>,
    ) -> Result<Self, LayoutError> {
        if revision & SHADOW != 0 {
            return Err(LayoutError::WideRevision(revision));
        }
        if size > MAX_SIZE {
            return Err(LayoutError::Size(size));
        }
        let mut taken: Vec<(u16, u8)> = Vec::from([(launch_state, LAUNCH_STATE)]);
        let mut fields = FieldSet::EMPTY;
        for slot in &slots {
            if slot.width == 0 || slot.width > 8 {
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
            revision,
            size,
            used: end,
            launch_state,
            slots: Cow::Owned(slots),
            fields,
        })
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its revision identifier, 31 bits.
    #[must_use]
    pub fn revision(&self) -> u32 {
        self.revision
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

    /// Offset of the launch state, 4 bytes.
    #[must_use]
    pub fn launch_state_offset(&self) -> u16 {
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

    fn check(&self, found: usize) -> Result<(), LayoutError> {
        if found < self.used {
            return Err(LayoutError::Short {
                found,
                needed: self.used,
            });
        }
        Ok(())
    }

    /// Reads a region. Fields without a slot are 0, and bytes outside of the slots are not looked at.
    /// Any launch state but 0 is launched.
    ///
    /// # Errors
    ///
    /// If there are not enough bytes, or they are of another revision.
    pub fn read(&self, region: &[u8]) -> Result<Vmcs, LayoutError> {
        self.check(region.len())?;
        let (found, shadow) = revision(region).unwrap_or_default();
        if found != self.revision {
            return Err(LayoutError::Revision {
                found,
                expected: self.revision,
            });
        }
        let mut vmcs = Vmcs::new();
        vmcs.shadow = shadow;
        vmcs.abort = load(region, 4, 4) as u32;
        vmcs.launched = self.is_launched(region)?;
        for slot in self.slots.iter() {
            vmcs.set(slot.field, load(region, slot.offset, slot.width));
        }
        Ok(vmcs)
    }

    /// Writes a region, all but the bytes that belong to no slot. Fields without a slot are lost.
    ///
    /// # Errors
    ///
    /// If there are not enough bytes; none is changed then.
    pub fn write(&self, vmcs: &Vmcs, region: &mut [u8]) -> Result<(), LayoutError> {
        self.check(region.len())?;
        let shadow = if vmcs.shadow { SHADOW } else { 0 };
        store(region, 0, 4, (self.revision | shadow).into());
        store(region, 4, 4, vmcs.abort.into());
        self.set_launched(region, vmcs.launched)?;
        for slot in self.slots.iter() {
            store(region, slot.offset, slot.width, vmcs.get(slot.field));
        }
        Ok(())
    }

    /// Whether the launch state of a region is launched: anything but 0.
    ///
    /// # Errors
    ///
    /// If there are not enough bytes.
    pub fn is_launched(&self, region: &[u8]) -> Result<bool, LayoutError> {
        self.check(region.len())?;
        Ok(load(region, self.launch_state, LAUNCH_STATE) != 0)
    }

    /// Sets the launch state of a region and nothing else: what VMCLEAR does to a VMCS that is not
    /// current. Vol. 3C, "VMCLEAR".
    ///
    /// # Errors
    ///
    /// If there are not enough bytes; none is changed then.
    pub fn set_launched(&self, region: &mut [u8], launched: bool) -> Result<(), LayoutError> {
        self.check(region.len())?;
        store(region, self.launch_state, LAUNCH_STATE, launched.into());
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

const fn used(launch_state: u16, slots: &[Slot]) -> usize {
    let mut end = launch_state as usize + LAUNCH_STATE as usize;
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
mod tests {
    use super::*;
    use crate::testing::Random;
    use alloc::string::{String, ToString};
    use alloc::vec;

    const KVM_CSV: &str = include_str!("../data/layout_kvm_11e57ed0.csv");

    fn built_in() -> [&'static Layout; 2] {
        [Layout::kvm(), Layout::hypernest()]
    }

    /// `vmcs` without the fields that `layout` has no slot for.
    fn held(layout: &Layout, vmcs: &Vmcs) -> Vmcs {
        let mut held = vmcs.clone();
        for field in Field::ALL.into_iter().filter(|&field| !layout.holds(field)) {
            held.set(field, 0);
        }
        held
    }

    #[test]
    fn what_is_written_is_read() {
        let mut random = Random::new(1);
        for layout in built_in() {
            for _ in 0..200 {
                let vmcs = random.vmcs();
                let mut region = vec![random.next() as u8; layout.used()];
                layout.write(&vmcs, &mut region).unwrap();
                assert_eq!(layout.read(&region).unwrap(), held(layout, &vmcs));
            }
        }
    }

    #[test]
    fn bytes_without_a_slot_are_left_alone() {
        let layout = Layout::kvm();
        let mut region = vec![0x5A; 4096];
        layout.write(&Vmcs::new(), &mut region).unwrap();
        // The former CR3-target values, the rows of newer kernels, the rest of the region.
        assert!(region[376..408].iter().all(|&byte| byte == 0x5A));
        assert!(region[680..744].iter().all(|&byte| byte == 0x5A));
        assert!(region[998..].iter().all(|&byte| byte == 0x5A));
        assert_eq!(region[..8], [0xD0, 0x7E, 0xE5, 0x11, 0, 0, 0, 0]);
    }

    #[test]
    fn short_regions_are_errors_and_stay_as_they_are() {
        for layout in built_in() {
            for len in 0..layout.used() {
                let mut region = vec![0x5A; len];
                let short = LayoutError::Short {
                    found: len,
                    needed: layout.used(),
                };
                assert_eq!(layout.read(&region), Err(short));
                assert_eq!(layout.write(&Vmcs::new(), &mut region), Err(short));
                assert_eq!(layout.set_launched(&mut region, true), Err(short));
                assert_eq!(layout.is_launched(&region), Err(short));
                assert!(region.iter().all(|&byte| byte == 0x5A));
            }
        }
    }

    #[test]
    fn built_in_layouts_obey_the_rules_for_new_ones() {
        for layout in built_in() {
            let slots = layout.slots().to_vec();
            let again = Layout::new(
                String::from(layout.name()),
                layout.revision(),
                4096,
                8,
                slots,
            );
            assert_eq!(again.as_ref(), Ok(layout));
            for slot in layout.slots() {
                assert_eq!(slot.width, slot.field.width().bytes());
                assert_eq!(slot.offset % u16::from(slot.width), 0, "{:?}", slot.field);
            }
        }
    }

    #[test]
    fn kvm_is_what_its_table_says() {
        let layout = Layout::kvm();
        assert_eq!((layout.revision(), layout.used()), (0x11E5_7ED0, 998));
        let mut rows = 0;
        for line in KVM_CSV.lines().skip(1) {
            let cells: Vec<&str> = line.split(',').collect();
            let Some(hex) = cells[2].strip_prefix("0x") else {
                continue;
            };
            let encoding = u32::from_str_radix(hex, 16).unwrap();
            let (field, _) = Field::from_encoding(encoding).unwrap();
            let here = cells[0] == "field" && cells[5] == "6.1 and 6.12";
            let slot = layout.slots().iter().find(|slot| slot.field == field);
            assert_eq!(slot.is_some(), here, "{line}");
            assert_eq!(layout.holds(field), here, "{line}");
            if let Some(slot) = slot {
                assert_eq!(slot.offset.to_string(), cells[3], "{line}");
                assert_eq!(slot.width.to_string(), cells[4], "{line}");
                rows += 1;
            }
        }
        assert_eq!((rows, layout.slots().len()), (141, 141));
    }

    #[test]
    fn ours_holds_every_field() {
        let layout = Layout::hypernest();
        assert_eq!(*layout.field_mask(), FieldSet::ALL);
        assert_eq!(&layout.revision().to_le_bytes(), b"HYPN");
        assert_eq!(layout.revision() >> 31, 0);
        assert_ne!(layout.revision(), Layout::kvm().revision());
        assert_eq!(layout.slots()[0], Slot::new(Field::IO_BITMAP_A, 16, 8));
        assert!(layout.used() <= layout.size());
    }

    #[test]
    fn another_revision_is_an_error_and_the_shadow_indicator_is_not_part_of_it() {
        let mut region = vec![0; 4096];
        let mut vmcs = Vmcs::new();
        vmcs.shadow = true;
        Layout::kvm().write(&vmcs, &mut region).unwrap();
        assert_eq!(revision(&region), Some((0x11E5_7ED0, true)));
        assert!(Layout::kvm().read(&region).unwrap().shadow);
        assert!(matches!(
            Layout::hypernest().read(&region),
            Err(LayoutError::Revision { .. })
        ));
        assert_eq!(revision(&region[..3]), None);
    }

    #[test]
    fn the_launch_state_can_be_set_alone() {
        let mut region = vec![0xFF; 4096];
        let layout = Layout::kvm();
        assert_eq!(layout.is_launched(&region), Ok(true));
        layout.set_launched(&mut region, false).unwrap();
        assert_eq!(layout.is_launched(&region), Ok(false));
        assert_eq!(region.iter().filter(|&&byte| byte != 0xFF).count(), 4);
    }

    #[test]
    fn layouts_that_make_no_sense_are_refused() {
        let new = |revision, size, launch, slots| {
            Layout::new("x", revision, size, launch, slots).unwrap_err()
        };
        let slot = |offset, width| vec![Slot::new(Field::GUEST_RIP, offset, width)];
        assert_eq!(
            new(1 << 31, 4096, 8, vec![]),
            LayoutError::WideRevision(1 << 31)
        );
        assert_eq!(new(1, 4097, 8, vec![]), LayoutError::Size(4097));
        assert_eq!(new(1, 4, 8, vec![]), LayoutError::Outside(4, 8));
        assert_eq!(new(1, 4096, 4, vec![]), LayoutError::Outside(4, 4));
        assert_eq!(
            new(1, 4096, 8, slot(4090, 8)),
            LayoutError::Outside(8, 4090)
        );
        assert_eq!(
            new(1, 4096, 8, slot(u16::MAX, 8)),
            LayoutError::Outside(8, u16::MAX)
        );
        assert_eq!(new(1, 4096, 8, slot(11, 8)), LayoutError::Overlap(11));
        assert_eq!(
            new(1, 4096, 8, slot(12, 0)),
            LayoutError::SlotWidth(Field::GUEST_RIP, 0)
        );
        assert_eq!(
            new(1, 4096, 8, slot(12, 9)),
            LayoutError::SlotWidth(Field::GUEST_RIP, 9)
        );
        let twice = [slot(12, 8), slot(20, 8)].concat();
        assert_eq!(new(1, 4096, 8, twice), LayoutError::Twice(Field::GUEST_RIP));
    }
}
