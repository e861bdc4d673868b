//! From one layout to another without a stop in between: a compiled (offset, type) map.

use alloc::vec::Vec;

use crate::field::Field;
use crate::layout::{Layout, LayoutError, Slot};

/// A map from one [`Layout`] to another, made once and used for any number of regions.
///
/// ```
/// use hypernest_vmcs::{Field, Layout, Losses, Translation, Vmcs};
///
/// let (old, new) = (Layout::kvm(), Layout::hypernest());
/// let mut vmcs = Vmcs::new();
/// vmcs.set(Field::GUEST_RIP, 0x1000);
/// let (mut from, mut to) = ([0; 4096], [0; 4096]);
/// old.write(&vmcs, &mut from)?;
/// Translation::new(old, new).run(&from, &mut to, Losses::Refused)?;
/// assert_eq!(new.read(&to)?, vmcs);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Translation {
    from: Layout,
    to: Layout,
    runs: Vec<Run>,
    converted: Vec<(Slot, Slot)>,
    defaulted: Vec<Slot>,
    dropped: Vec<Slot>,
}

/// Bytes that stay as they are.
#[derive(Clone, Copy, Debug)]
struct Run {
    from: u16,
    to: u16,
    len: u16,
}

/// What to do about values that the new layout has no place for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Losses {
    /// Nothing is written.
    Refused,
    /// They are dropped.
    Allowed,
}

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its slots are alike.
    Copied,
    /// Its slot becomes wider.
    Widened,
    /// Its slot becomes narrower, still as wide as the field; or its bits are stored in another order.
    Converted,
    /// Only the new layout has a slot, which is 0.
    Defaulted,
    /// Only the old layout has a slot, and it was 0.
    Dropped,
    /// Only the old layout has a slot, and this was in it.
    Lost(u64),
}

/// A region was not translated. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TranslateError {
    /// A region is too short or of another revision.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The new layout has no place for a value.
    #[error("{first:?} has no slot in the new layout and is {value:#x} ({fields} such fields)")]
    Lost {
        /// The first such field.
        first: Field,
        /// Its value.
        value: u64,
        /// How many there are.
        fields: usize,
    },
    /// The new layout has no launch state, and the VMCS was launched.
    #[error("the new layout has no launch state, and the VMCS was launched")]
    LaunchState,
}

impl Translation {
    /// The map from `from` to `to`.
    #[must_use]
    pub fn new(from: &Layout, to: &Layout) -> Self {
        let mut pairs = Vec::new();
        let mut dropped = Vec::new();
        for &slot in from.slots() {
            match to.slots().iter().find(|other| other.field == slot.field) {
                Some(&other) => pairs.push((slot, other)),
                None => dropped.push(slot),
            }
        }
        dropped.sort_unstable_by_key(|slot: &Slot| slot.field);
        pairs.sort_unstable_by_key(|(slot, _)| slot.offset);
        let mut runs: Vec<Run> = Vec::new();
        let mut converted = Vec::new();
        for (slot, other) in pairs {
            if !is_copy(&slot, &other) {
                converted.push((slot, other));
                continue;
            }
            match runs.last_mut() {
                Some(run)
                    if run.from + run.len == slot.offset && run.to + run.len == other.offset =>
                {
                    run.len += u16::from(slot.width);
                }
                _ => runs.push(Run {
                    from: slot.offset,
                    to: other.offset,
                    len: slot.width.into(),
                }),
            }
        }
        let defaulted = to
            .slots()
            .iter()
            .filter(|slot| !from.holds(slot.field))
            .copied()
            .collect();
        Self {
            from: from.clone(),
            to: to.clone(),
            runs,
            converted,
            defaulted,
            dropped,
        }
    }

    /// The layout of what is read.
    #[must_use]
    pub fn from(&self) -> &Layout {
        &self.from
    }

    /// The layout of what is written.
    #[must_use]
    pub fn to(&self) -> &Layout {
        &self.to
    }

    /// The fields that are not 0 in `region` and have no slot in the new layout.
    pub fn losses<'a>(&'a self, region: &'a [u8]) -> impl Iterator<Item = (Field, u64)> + 'a {
        self.dropped
            .iter()
            .map(|slot| (slot.field, value(slot, region)))
            .filter(|&(_, value)| value != 0)
    }

    /// Writes to `to` what `from` holds, with the revision identifier of the new layout. Bytes of
    /// `to` that belong to no slot are left alone, and nothing is allocated.
    ///
    /// # Errors
    ///
    /// If a region is too short, `from` is of another revision, or something would be lost that must
    /// not be. Nothing is written then.
    pub fn run(&self, from: &[u8], to: &mut [u8], losses: Losses) -> Result<(), TranslateError> {
        let header = self.from.header(from)?;
        self.to.check(to.len())?;
        if losses == Losses::Refused {
            if let Some((first, value)) = self.losses(from).next() {
                let fields = self.losses(from).count();
                return Err(TranslateError::Lost {
                    first,
                    value,
                    fields,
                });
            }
            if header.launched && self.to.launch_state().is_none() {
                return Err(TranslateError::LaunchState);
            }
        }
        self.to.set_header(to, header)?;
        for run in &self.runs {
            let (at, new, len) = (run.from.into(), run.to.into(), usize::from(run.len));
            copy(from, at, to, new, len);
        }
        for (slot, new) in &self.converted {
            new.store(to, value(slot, from));
        }
        for slot in &self.defaulted {
            slot.store(to, 0);
        }
        Ok(())
    }

    /// What becomes of each field that either layout has, in the order of encodings.
    ///
    /// # Errors
    ///
    /// If the region is too short or of another revision.
    pub fn report(&self, region: &[u8]) -> Result<Vec<(Field, Fate)>, LayoutError> {
        self.from.header(region)?;
        let mut fates: Vec<(Field, Fate)> = Vec::new();
        for slot in self.from.slots() {
            let fate = match self.to.slots().iter().find(|new| new.field == slot.field) {
                None => match value(slot, region) {
                    0 => Fate::Dropped,
                    lost => Fate::Lost(lost),
                },
                Some(new) if (new.width, new.rotated) == (slot.width, slot.rotated) => Fate::Copied,
                Some(new) if new.width > slot.width => Fate::Widened,
                Some(_) => Fate::Converted,
            };
            fates.push((slot.field, fate));
        }
        fates.extend(
            self.defaulted
                .iter()
                .map(|slot| (slot.field, Fate::Defaulted)),
        );
        fates.sort_unstable_by_key(|(field, _)| *field);
        Ok(fates)
    }
}

/// Whether the bytes of one slot may be copied to the other. Those of a slot wider than its field may
/// not: nothing says that the rest is 0.
fn is_copy(slot: &Slot, other: &Slot) -> bool {
    slot.width == other.width
        && slot.rotated == other.rotated
        && slot.width == slot.field.width().bytes()
}

/// The value in a slot, no wider than its field.
fn value(slot: &Slot, region: &[u8]) -> u64 {
    slot.load(region) & slot.field.mask()
}

fn copy(from: &[u8], at: usize, to: &mut [u8], new: usize, len: usize) {
    // Both were found long enough.
    if let (Some(from), Some(to)) = (from.get(at..at + len), to.get_mut(new..new + len)) {
        to.copy_from_slice(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use crate::vmcs::Vmcs;
    use alloc::vec;

    /// `vmcs` with zeroes in about half of the fields, so that not everything is always lost.
    fn sparse(random: &mut Random) -> Vmcs {
        let mut vmcs = random.vmcs();
        let most = random.below(8);
        for field in Field::ALL {
            if random.below(8) < most {
                vmcs.set(field, 0);
            }
        }
        vmcs
    }

    #[test]
    fn every_pair_translates_as_field_by_field() {
        let mut random = Random::new(7);
        for from in Layout::built_in() {
            for to in Layout::built_in() {
                let map = Translation::new(from, to);
                let (mut source, mut result, mut truth) =
                    (vec![0; 4096], vec![0; 4096], vec![0; 4096]);
                for _ in 0..200 {
                    let vmcs = sparse(&mut random);
                    from.write(&vmcs, &mut source).unwrap();
                    let read = from.read(&source).unwrap();
                    to.write(&read, &mut truth).unwrap();
                    let lost = read_loss(to, &read);
                    let strict = map.run(&source, &mut result, Losses::Refused);
                    match lost {
                        Some(error) => assert_eq!(strict, Err(error)),
                        None => assert_eq!(strict, Ok(())),
                    }
                    map.run(&source, &mut result, Losses::Allowed).unwrap();
                    assert!(result == truth, "{} to {}", from.name(), to.name());
                }
            }
        }
    }

    /// What a translation of `vmcs` to `layout` must say that it would lose.
    fn read_loss(layout: &Layout, vmcs: &Vmcs) -> Option<TranslateError> {
        let lost = |field: &Field| !layout.holds(*field) && vmcs.get(*field) != 0;
        let fields = Field::ALL.iter().filter(|field| lost(field)).count();
        if fields == 0 {
            return (vmcs.launched && layout.launch_state().is_none())
                .then_some(TranslateError::LaunchState);
        }
        let first = *Field::ALL.iter().find(|field| lost(field))?;
        Some(TranslateError::Lost {
            first,
            value: vmcs.get(first),
            fields,
        })
    }

    #[test]
    fn there_and_back_is_the_same_where_both_hold_it() {
        let mut random = Random::new(9);
        for one in Layout::built_in() {
            for other in Layout::built_in() {
                let (there, back) = (Translation::new(one, other), Translation::new(other, one));
                let mut vmcs = random.vmcs();
                for field in Field::ALL {
                    if !one.holds(field) || !other.holds(field) {
                        vmcs.set(field, 0);
                    }
                }
                vmcs.launched &= one.launch_state().is_some() && other.launch_state().is_some();
                let (mut first, mut middle, mut last) =
                    (vec![0; 4096], vec![0; 4096], vec![0; 4096]);
                one.write(&vmcs, &mut first).unwrap();
                there.run(&first, &mut middle, Losses::Refused).unwrap();
                back.run(&middle, &mut last, Losses::Refused).unwrap();
                assert!(first == last, "{} by {}", one.name(), other.name());
            }
        }
    }

    #[test]
    fn the_same_layout_is_few_runs() {
        for layout in Layout::built_in() {
            let map = Translation::new(layout, layout);
            let wide = layout.slots().iter().filter(|slot| !is_copy(slot, slot));
            assert_eq!(map.converted.len(), wide.count(), "{}", layout.name());
            assert!(map.dropped.is_empty() && map.defaulted.is_empty());
        }
        assert!(Translation::new(Layout::kvm(), Layout::kvm()).runs.len() < 12);
    }

    #[test]
    fn the_report_names_each_fate() {
        let (kvm, xen) = (Layout::kvm(), Layout::named("xen").unwrap());
        let mut vmcs = Vmcs::new();
        vmcs.set(Field::HOST_IA32_PERF_GLOBAL_CTRL, 5);
        vmcs.set(Field::XSS_EXIT_BITMAP, 6);
        let mut region = vec![0; 4096];
        kvm.write(&vmcs, &mut region).unwrap();
        let old = Layout::named("kvm-3.10").unwrap();
        let report = |to: &Layout, field: Field| {
            let report = Translation::new(kvm, to).report(&region).unwrap();
            report.iter().find(|row| row.0 == field).map(|row| row.1)
        };
        assert_eq!(report(xen, Field::GUEST_RIP), Some(Fate::Copied));
        assert_eq!(report(xen, Field::GUEST_CS_SELECTOR), Some(Fate::Widened));
        let bochs = Layout::named("bochs").unwrap();
        assert_eq!(
            report(bochs, Field::GUEST_CS_AR_BYTES),
            Some(Fate::Converted)
        );
        assert_eq!(
            report(bochs, Field::CR3_TARGET_VALUE0),
            Some(Fate::Defaulted)
        );
        assert_eq!(report(old, Field::XSS_EXIT_BITMAP), Some(Fate::Lost(6)));
        assert_eq!(report(old, Field::EPTP_LIST_ADDRESS), Some(Fate::Dropped));
    }

    #[test]
    fn nothing_is_written_on_refusal() {
        let (from, to) = (Layout::hypernest(), Layout::named("kvm-3.10").unwrap());
        let map = Translation::new(from, to);
        let mut vmcs = Vmcs::new();
        vmcs.set(Field::PML_ADDRESS, 0x1000);
        let (mut source, mut result) = (vec![0; 4096], vec![0x5A; 4096]);
        from.write(&vmcs, &mut source).unwrap();
        let lost = map.run(&source, &mut result, Losses::Refused);
        assert!(matches!(lost, Err(TranslateError::Lost { fields: 1, .. })));
        for len in [0, 7, to.used() - 1] {
            let short = map.run(&source, &mut result[..len], Losses::Allowed);
            assert!(matches!(short, Err(TranslateError::Layout(_))));
        }
        source[0] ^= 1;
        assert!(map.run(&source, &mut result, Losses::Allowed).is_err());
        assert!(map.report(&source).is_err());
        assert!(
            map.run(&source[..20], &mut result, Losses::Allowed)
                .is_err()
        );
        assert!(result.iter().all(|&byte| byte == 0x5A));
    }
}
