//! The canonical VMCS: a value for every field, in no layout.

use core::fmt;

use crate::field::{Field, group};

/// A VMCS as values by field. This is how a processor keeps its current VMCS.
///
/// Vol. 3C, "Format of the VMCS Region" leaves the format of the data to the processor; a
/// [`Layout`](crate::Layout) turns it into bytes and back.
#[derive(Clone)]
pub struct Vmcs {
    // Longer than there are fields, so that an index needs no check; the rest stays 0.
    values: [u64; 256],
    /// The launch state: launched, else clear. Vol. 3C, "VMCS States".
    pub launched: bool,
    /// The VMX-abort indicator. Vol. 3C, "VMX Aborts".
    pub abort: u32,
    /// The shadow-VMCS indicator, bit 31 of the region's first word. Vol. 3C, "Shadow VMCS".
    pub shadow: bool,
    /// The [`group`]s that [`set`](Self::set) changed since the owner last cleared it. A new VMCS
    /// and one that was read have all of them set. Not part of equality.
    pub dirty: u8,
}

impl Default for Vmcs {
    fn default() -> Self {
        Self::new()
    }
}

impl Vmcs {
    /// A VMCS in which everything is 0 and clear.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            values: [0; 256],
            launched: false,
            abort: 0,
            shadow: false,
            dirty: group::ALL,
        }
    }

    /// The value of `field`, no wider than the field.
    #[inline]
    #[must_use]
    pub const fn get(&self, field: Field) -> u64 {
        self.values[field.index()]
    }

    /// Sets `field` to as much of `value` as fits, and notes the groups of checks it is in.
    #[inline]
    pub const fn set(&mut self, field: Field, value: u64) {
        self.values[field.index()] = value & field.mask();
        self.dirty |= field.groups();
    }

    /// The values, by the index of their field.
    pub(crate) const fn values(&self) -> &[u64; 256] {
        &self.values
    }

    /// The same, for one who keeps to the widths of the fields and notes what is dirty.
    pub(crate) const fn values_mut(&mut self) -> &mut [u64; 256] {
        &mut self.values
    }
}

impl PartialEq for Vmcs {
    fn eq(&self, other: &Self) -> bool {
        self.values == other.values
            && (self.launched, self.abort, self.shadow)
                == (other.launched, other.abort, other.shadow)
    }
}

impl Eq for Vmcs {}

impl fmt::Debug for Vmcs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Vmcs");
        out.field("launched", &self.launched)
            .field("abort", &self.abort)
            .field("shadow", &self.shadow);
        for field in Field::ALL.into_iter().filter(|&field| self.get(field) != 0) {
            out.field(field.short_name(), &format_args!("{:#x}", self.get(field)));
        }
        out.finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    #[test]
    fn values_are_cut_to_the_width_of_the_field() {
        let mut vmcs = Vmcs::new();
        for field in Field::ALL {
            vmcs.set(field, u64::MAX);
            assert_eq!(vmcs.get(field), field.width().mask(), "{field:?}");
        }
    }

    #[test]
    fn set_notes_the_group() {
        let mut vmcs = Vmcs::new();
        assert_eq!(vmcs.dirty, group::ALL);
        vmcs.dirty = 0;
        vmcs.set(Field::VM_EXIT_REASON, 1);
        assert_eq!(vmcs.dirty, 0);
        vmcs.set(Field::GUEST_RIP, 1);
        vmcs.set(Field::HOST_RIP, 1);
        assert_eq!(vmcs.dirty & group::CONTROLS, 0);
        assert_eq!(vmcs.dirty & group::HOST, group::HOST);
        assert_eq!(vmcs.dirty & group::GUEST, Field::GUEST_RIP.groups());
    }

    #[test]
    fn equality_is_of_content() {
        let (mut a, mut b) = (Vmcs::new(), Vmcs::new());
        a.dirty = 0;
        assert_eq!(a, b);
        b.launched = true;
        assert_ne!(a, b);
    }

    #[test]
    fn debug_names_what_is_not_0() {
        let mut vmcs = Vmcs::new();
        vmcs.set(Field::GUEST_RIP, 0x1000);
        let text = format!("{vmcs:?}");
        assert!(
            text.contains("guest_rip: 0x1000") && !text.contains("guest_rsp"),
            "{text}"
        );
    }
}
