//! A layout compiled for a processor that moves VMCSs in and out of its memory often.

use alloc::vec::Vec;

use super::{COMMON, LaunchState, Layout, MAX_SIZE, SHADOW, Slot, load, store};
use crate::field::{Field, FieldSet};
use crate::vmcs::Vmcs;

/// The way between a [`Vmcs`] and a region of one [`Layout`], for the fields that a processor has:
/// lists of moves by width, so that a VMPTRLD or VMCLEAR is a few short loops. Nothing is allocated
/// once it is made.
///
/// Fields that the processor does not have are 0 in what is read, and their bytes stay in what is
/// written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionMap {
    revision: u32,
    used: usize,
    launch_state: Option<LaunchState>,
    wide: Vec<Move>,
    words: Vec<Move>,
    halves: Vec<Move>,
    /// Slots of other widths than their field's, or with bits in another order.
    converted: Vec<Slot>,
    places: Vec<Option<Slot>>,
}

/// A slot as wide as its field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    offset: u16,
    index: u8,
}

/// A region as a processor has it in memory: a page, of which the layout may use less.
pub type RegionPage = [u8; MAX_SIZE];

impl RegionMap {
    /// Compiles a layout for a processor with these fields.
    #[must_use]
    pub fn new(layout: &Layout, fields: &FieldSet) -> Self {
        let mut map = Self {
            revision: layout.revision(),
            used: layout.used(),
            launch_state: layout.launch_state(),
            wide: Vec::new(),
            words: Vec::new(),
            halves: Vec::new(),
            converted: Vec::new(),
            places: alloc::vec![None; Field::COUNT],
        };
        for &slot in layout.slots().iter().filter(|s| fields.contains(s.field)) {
            map.places[slot.field.index()] = Some(slot);
            let one = Move {
                offset: slot.offset,
                index: slot.field.index() as u8,
            };
            if slot.rotated || slot.width != slot.field.width().bytes() {
                map.converted.push(slot);
                continue;
            }
            match slot.width {
                8 => map.wide.push(one),
                4 => map.words.push(one),
                _ => map.halves.push(one),
            }
        }
        for list in [&mut map.wide, &mut map.words, &mut map.halves] {
            list.sort_unstable_by_key(|one| one.offset);
        }
        map
    }

    /// The revision identifier that it writes.
    #[must_use]
    pub fn revision(&self) -> u32 {
        self.revision
    }

    /// Bytes of a region that it may read or write.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Its launch state, where the region has one.
    #[must_use]
    pub fn launch_state(&self) -> Option<LaunchState> {
        self.launch_state
    }

    /// The place of a field; none for one that the processor does not have.
    #[must_use]
    pub fn place(&self, field: Field) -> Option<Slot> {
        self.places.get(field.index()).copied().flatten()
    }

    /// Reads a region of its revision; every field is set.
    pub fn read(&self, region: &RegionPage, vmcs: &mut Vmcs) {
        *vmcs = Vmcs::new();
        let word = load(region, 0, 4) as u32;
        vmcs.shadow = word & SHADOW != 0;
        vmcs.abort = load(region, 4, 4) as u32;
        vmcs.launched = self.launch_state.is_some_and(|launch| {
            load(region, launch.offset, launch.width) as u32 & launch.mask != 0
        });
        let values = vmcs.values_mut();
        for one in &self.wide {
            values[usize::from(one.index)] = u64::from_le_bytes(chunk(region, one.offset));
        }
        for one in &self.words {
            values[usize::from(one.index)] = u32::from_le_bytes(chunk(region, one.offset)).into();
        }
        for one in &self.halves {
            values[usize::from(one.index)] = u16::from_le_bytes(chunk(region, one.offset)).into();
        }
        for slot in &self.converted {
            values[slot.field.index()] = slot.load(region) & slot.field.mask();
        }
    }

    /// Writes a region. Bytes that belong to no field stay, but for those of a region that had another
    /// revision: they meant something else there and become 0.
    pub fn write(&self, vmcs: &Vmcs, region: &mut RegionPage) {
        if load(region, 0, 4) as u32 & !SHADOW != self.revision {
            region[COMMON..].fill(0);
        }
        let shadow = if vmcs.shadow { SHADOW } else { 0 };
        store(region, 0, 4, (self.revision | shadow).into());
        store(region, 4, 4, vmcs.abort.into());
        if let Some(launch) = self.launch_state {
            let value = match vmcs.launched {
                true => launch.launched,
                false => launch.clear,
            };
            store(region, launch.offset, launch.width, value.into());
        }
        let values = vmcs.values();
        for one in &self.wide {
            put(
                region,
                one.offset,
                values[usize::from(one.index)].to_le_bytes(),
            );
        }
        for one in &self.words {
            let value = values[usize::from(one.index)] as u32;
            put(region, one.offset, value.to_le_bytes());
        }
        for one in &self.halves {
            let value = values[usize::from(one.index)] as u16;
            put(region, one.offset, value.to_le_bytes());
        }
        for slot in &self.converted {
            slot.store(region, values[slot.field.index()]);
        }
    }
}

fn chunk<const N: usize>(region: &RegionPage, offset: u16) -> [u8; N] {
    let from = region
        .get(usize::from(offset)..)
        .and_then(<[u8]>::first_chunk);
    from.copied().unwrap_or([0; N])
}

fn put<const N: usize>(region: &mut RegionPage, offset: u16, value: [u8; N]) {
    let to = region.get_mut(usize::from(offset)..);
    if let Some(to) = to.and_then(<[u8]>::first_chunk_mut) {
        *to = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn it_reads_and_writes_as_the_layout_does() {
        let mut random = Random::new(11);
        for layout in Layout::built_in() {
            let map = RegionMap::new(layout, &FieldSet::ALL);
            for _ in 0..50 {
                let vmcs = random.vmcs();
                let (mut truth, mut region) = ([0; MAX_SIZE], [0; MAX_SIZE]);
                layout.write(&vmcs, &mut truth).unwrap();
                map.write(&vmcs, &mut region);
                assert!(region == truth, "{}", layout.name());
                let mut read = random.vmcs();
                map.read(&region, &mut read);
                assert_eq!(read, layout.read(&truth).unwrap(), "{}", layout.name());
                assert_eq!(read.dirty, crate::field::group::ALL);
            }
        }
    }

    #[test]
    fn fields_that_the_processor_lacks_are_not_read_and_not_written() {
        let layout = Layout::kvm();
        let mut fields = *layout.field_mask();
        fields.remove(Field::TSC_OFFSET);
        let map = RegionMap::new(layout, &fields);
        assert_eq!(map.place(Field::TSC_OFFSET), None);
        let mut full = Vmcs::new();
        full.set(Field::TSC_OFFSET, 7);
        full.set(Field::GUEST_RIP, 8);
        let mut region = [0; MAX_SIZE];
        layout.write(&full, &mut region).unwrap();
        let mut read = Vmcs::new();
        map.read(&region, &mut read);
        assert_eq!(
            (read.get(Field::TSC_OFFSET), read.get(Field::GUEST_RIP)),
            (0, 8)
        );
        map.write(&read, &mut region);
        assert_eq!(layout.read(&region).unwrap(), full);
    }

    #[test]
    fn of_a_region_with_another_revision_nothing_stays_but_the_header() {
        let map = RegionMap::new(Layout::hypernest(), &FieldSet::ALL);
        let mut region = [0xA5; MAX_SIZE];
        store(&mut region, 0, 4, Layout::kvm().revision().into());
        let mut vmcs = Vmcs::new();
        vmcs.abort = 4;
        map.write(&vmcs, &mut region);
        assert_eq!(load(&region, 4, 4), 4);
        assert!(region[COMMON..].iter().all(|&byte| byte == 0));
        // With its own, what it does not know stays.
        region[MAX_SIZE - 1] = 9;
        map.write(&vmcs, &mut region);
        assert_eq!(region[MAX_SIZE - 1], 9);
    }
}
