//! The enlightened VMCS, version 1: a structure of its own in guest memory, from which VM entries read what
//! is not marked clean and into which VM exits write.
//!
//! Hypervisor Top-Level Functional Specification, "Enlightened VMCS". The groups of members are those of
//! `data/layout_evmcs_v1.csv`.

use crate::field::{Field, Kind};
use crate::layout::Slot;
use crate::vmcs::Vmcs;

include!(concat!(env!("OUT_DIR"), "/enlightened.rs"));

/// What its first word holds.
pub const VERSION: u32 = 1;

/// Bytes of it that mean something; the rest of its page does not.
pub const SIZE: usize = END_OF_STRUCT as usize;

/// The bits of its clean fields: a set one says that the members of the group are as they were at the last VM
/// entry from it or exit to it.
pub const ALL_CLEAN: u32 = 0xFFFF;

/// The group of the enlightenments themselves.
pub const CLEAN_ENLIGHTENMENTS: u32 = 1 << 15;

/// Bit 0 of the enlightenments: flushes that the guest asks for by hypercall need no VM exit.
pub const DIRECT_FLUSH: u32 = 1;

/// Bit 1 of the enlightenments: changes of the MSR bitmaps are told by their clean field.
pub const MSR_BITMAP: u32 = 1 << 1;

/// Its bytes.
pub type Page = [u8; SIZE];

#[derive(Clone, Copy)]
struct Member {
    slot: Slot,
    reread: Reread,
}

/// When a VM entry reads a member.
#[derive(Clone, Copy)]
enum Reread {
    Always,
    /// Unless this bit of the clean fields is set.
    UnlessClean(u8),
    /// It is in no group: unless all of them are clean.
    UnlessAllClean,
}

impl Reread {
    /// Members of the same kind are beside each other.
    const fn is(self, other: Reread) -> bool {
        match (self, other) {
            (Reread::UnlessClean(a), Reread::UnlessClean(b)) => a == b,
            (Reread::Always, Reread::Always) => true,
            (Reread::UnlessAllClean, Reread::UnlessAllClean) => true,
            _ => false,
        }
    }

    fn happens(self, clean: u32) -> bool {
        match self {
            Reread::Always => true,
            Reread::UnlessClean(bit) => clean >> bit & 1 == 0,
            Reread::UnlessAllClean => clean & ALL_CLEAN != ALL_CLEAN,
        }
    }
}

/// The members that are no fields of a VMCS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Enlightenments {
    /// [`DIRECT_FLUSH`], [`MSR_BITMAP`].
    pub control: u32,
    /// The guest's virtual processor, in hypercalls of the guest.
    pub vp_id: u32,
    /// The guest's virtual machine: those of one have the same.
    pub vm_id: u64,
    /// Address of the partition assist page.
    pub partition_assist: u64,
}

/// What is written to the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// All that a VM exit changes.
    Exit,
    /// What a VM entry that fails tells: exit information and the instruction error.
    Failure,
}

/// Bytes of the page as a number; 2, 4 or 8 of them, as members have. Beyond the page there is 0.
#[inline]
fn word(page: &Page, offset: u16, width: u8) -> u64 {
    let at = page.get(usize::from(offset)..).unwrap_or_default();
    let word = match width {
        2 => at.first_chunk().map(|b| u16::from_le_bytes(*b).into()),
        4 => at.first_chunk().map(|b| u32::from_le_bytes(*b).into()),
        _ => at.first_chunk().map(|b| u64::from_le_bytes(*b)),
    };
    word.unwrap_or(0)
}

#[inline]
fn set_word(page: &mut Page, offset: u16, width: u8, value: u64) {
    let at = page.get_mut(usize::from(offset)..).unwrap_or_default();
    match width {
        2 => at
            .first_chunk_mut()
            .map(|b| *b = (value as u16).to_le_bytes()),
        4 => at
            .first_chunk_mut()
            .map(|b| *b = (value as u32).to_le_bytes()),
        _ => at.first_chunk_mut().map(|b| *b = value.to_le_bytes()),
    };
}

/// The clean fields.
#[must_use]
pub fn clean_fields(page: &Page) -> u32 {
    word(page, CLEAN_FIELDS, 4) as u32 & ALL_CLEAN
}

/// Replaces the clean fields.
pub fn set_clean_fields(page: &mut Page, clean: u32) {
    set_word(page, CLEAN_FIELDS, 4, clean.into());
}

/// Where the clean fields are, in bytes from the start of the page.
#[must_use]
pub const fn clean_fields_offset() -> u64 {
    CLEAN_FIELDS as u64
}

/// The version in the first word.
#[must_use]
pub fn version(page: &Page) -> u32 {
    word(page, 0, 4) as u32
}

/// The enlightenments.
#[must_use]
pub fn enlightenments(page: &Page) -> Enlightenments {
    Enlightenments {
        control: word(page, ENLIGHTENMENTS_CONTROL, 4) as u32,
        vp_id: word(page, VP_ID, 4) as u32,
        vm_id: word(page, VM_ID, 8),
        partition_assist: word(page, PARTITION_ASSIST_PAGE, 8),
    }
}

/// Writes the enlightenments, which a processor never does: for hypervisors and tests.
pub fn set_enlightenments(page: &mut Page, value: &Enlightenments) {
    let mut put = |offset, width, value| set_word(page, offset, width, value);
    put(ENLIGHTENMENTS_CONTROL, 4, value.control.into());
    put(VP_ID, 4, value.vp_id.into());
    put(VM_ID, 8, value.vm_id);
    put(PARTITION_ASSIST_PAGE, 8, value.partition_assist);
}

/// The place of a field; `None` where the enlightened VMCS has none.
#[must_use]
pub fn slot(field: Field) -> Option<Slot> {
    let member = MEMBERS.iter().find(|member| member.slot.field == field);
    member.map(|member| member.slot)
}

/// Reads the members that `clean` does not vouch for, and those that are always read. `vmcs` keeps the
/// others; only what differs counts as changed there.
pub fn read(page: &Page, clean: u32, vmcs: &mut Vmcs) {
    for members in MEMBERS.chunk_by(|a, b| a.reread.is(b.reread)) {
        if !members.first().is_some_and(|m| m.reread.happens(clean)) {
            continue;
        }
        for Member { slot, .. } in members {
            let value = word(page, slot.offset, slot.width);
            if value != vmcs.get(slot.field) {
                vmcs.set(slot.field, value);
            }
        }
    }
}

/// Whether `what` writes a field.
const fn is_written(field: Field, what: Written) -> bool {
    let exit = matches!(what, Written::Exit);
    match field.kind() {
        Kind::ExitInfo => true,
        Kind::GuestState => exit,
        // Exits clear the valid bit of the one, and tell the guest's mode by the other.
        Kind::Control => {
            exit && (field.encoding() == Field::VM_ENTRY_INTR_INFO_FIELD.encoding()
                || field.encoding() == Field::VM_ENTRY_CONTROLS.encoding())
        }
        Kind::HostState => false,
    }
}

/// How many members an exit writes.
const WRITTEN: usize = {
    let (mut n, mut at) = (0, 0);
    while at < MEMBERS.len() {
        n += is_written(MEMBERS[at].slot.field, Written::Exit) as usize;
        at += 1;
    }
    n
};

/// Those.
static WRITTEN_SLOTS: [Slot; WRITTEN] = {
    let mut slots = [MEMBERS[0].slot; WRITTEN];
    let (mut n, mut at) = (0, 0);
    while at < MEMBERS.len() {
        if is_written(MEMBERS[at].slot.field, Written::Exit) {
            slots[n] = MEMBERS[at].slot;
            n += 1;
        }
        at += 1;
    }
    slots
};

/// Writes what an exit or a failed entry has changed.
pub fn write(vmcs: &Vmcs, page: &mut Page, what: Written) {
    for slot in &WRITTEN_SLOTS {
        if what == Written::Exit || is_written(slot.field, what) {
            set_word(page, slot.offset, slot.width, vmcs.get(slot.field));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::{Caps, Control, ControlBit, Exists, Implemented, proc2};

    fn filled() -> Page {
        let mut page = [0; SIZE];
        for (n, byte) in page.iter_mut().enumerate() {
            *byte = (n * 7 + 1) as u8;
        }
        page
    }

    #[test]
    fn the_members_are_the_slots_of_the_layout() {
        let layout = Layout::named("evmcs-v1").unwrap();
        assert_eq!(MEMBERS.len(), layout.slots().len());
        for member in &MEMBERS {
            assert!(layout.slots().contains(&member.slot), "{:?}", member.slot);
            assert_eq!(slot(member.slot.field), Some(member.slot));
        }
        assert_eq!(slot(Field::PML_ADDRESS), None);
    }

    #[test]
    fn with_nothing_clean_every_member_is_read() {
        let page = filled();
        let mut vmcs = Vmcs::new();
        read(&page, 0, &mut vmcs);
        for member in &MEMBERS {
            assert_eq!(vmcs.get(member.slot.field), member.slot.load(&page));
        }
    }

    #[test]
    fn a_clean_bit_keeps_its_group_and_no_other_member() {
        let page = filled();
        for bit in 0..16 {
            let mut vmcs = Vmcs::new();
            read(&page, 1 << bit, &mut vmcs);
            for member in &MEMBERS {
                let kept = matches!(member.reread, Reread::UnlessClean(n) if n == bit);
                let value = if kept { 0 } else { member.slot.load(&page) };
                assert_eq!(vmcs.get(member.slot.field), value, "{:?}", member.slot);
            }
        }
    }

    #[test]
    fn with_all_clean_only_what_is_in_no_group_by_rule_is_read() {
        let mut vmcs = Vmcs::new();
        read(&filled(), ALL_CLEAN, &mut vmcs);
        assert_ne!(vmcs.get(Field::GUEST_RIP), 0);
        assert_ne!(vmcs.get(Field::TPR_THRESHOLD), 0);
        assert_eq!(vmcs.get(Field::GUEST_RSP), 0);
        assert_eq!(vmcs.get(Field::VM_EXIT_MSR_STORE_COUNT), 0);
    }

    #[test]
    fn what_is_read_again_unchanged_is_not_dirty() {
        let page = filled();
        let mut vmcs = Vmcs::new();
        read(&page, 0, &mut vmcs);
        vmcs.dirty = 0;
        read(&page, 0, &mut vmcs);
        assert_eq!(vmcs.dirty, 0);
    }

    #[test]
    fn an_exit_writes_the_guest_and_a_failure_does_not() {
        let mut vmcs = Vmcs::new();
        for field in Field::ALL {
            vmcs.set(field, 0x5a);
        }
        let mut exit = [0; SIZE];
        write(&vmcs, &mut exit, Written::Exit);
        let mut failure = [0; SIZE];
        write(&vmcs, &mut failure, Written::Failure);
        let load = |page: &Page, field| slot(field).unwrap().load(page);
        assert_eq!(load(&exit, Field::GUEST_CS_BASE), 0x5a);
        assert_eq!(load(&exit, Field::VM_EXIT_REASON), 0x5a);
        assert_eq!(load(&exit, Field::VM_ENTRY_INTR_INFO_FIELD), 0x5a);
        assert_eq!(load(&exit, Field::HOST_RIP), 0);
        assert_eq!(load(&exit, Field::PIN_BASED_VM_EXEC_CONTROL), 0);
        assert_eq!(load(&failure, Field::GUEST_CS_BASE), 0);
        assert_eq!(load(&failure, Field::VM_INSTRUCTION_ERROR), 0x5a);
        assert_eq!((clean_fields(&exit), version(&exit)), (0, 0));
    }

    #[test]
    fn members_that_are_no_fields_are_between_the_others() {
        let mut page = [0; SIZE];
        let value = Enlightenments {
            control: 3,
            vp_id: 0x1122_3344,
            vm_id: !0,
            partition_assist: 0x7000,
        };
        set_enlightenments(&mut page, &value);
        set_clean_fields(&mut page, 0x8001);
        assert_eq!(enlightenments(&page), value);
        assert_eq!(clean_fields(&page), 0x8001);
        let mut vmcs = Vmcs::new();
        read(&page, 0, &mut vmcs);
        assert_eq!(vmcs, Vmcs::new());
    }

    #[test]
    fn capabilities_lose_what_has_no_place() {
        let all = Implemented {
            proc1: !0,
            proc2: !0,
            pin: !0,
            exit: !0,
            entry: !0,
            vmfunc: 1,
            ..Implemented::default()
        };
        let caps = Caps::max(&all, Layout::hypernest());
        let left = caps.enlightened();
        for bit in ControlBit::ALL {
            let must = left.allowed0(bit.id.control) >> bit.id.bit & 1 != 0;
            assert!(
                bit.enlightened || must || !left.allows(bit.id),
                "{} stays",
                bit.name
            );
        }
        assert!(caps.allows_proc2(proc2::ENABLE_PML) && !left.allows_proc2(proc2::ENABLE_PML));
        assert!(left.allows_proc2(proc2::ENABLE_EPT | proc2::ENABLE_VPID));
        assert_eq!(left.allowed1(Control::VmFunc), 0);
        let layout = Layout::named("evmcs-v1").unwrap();
        let of_controls = |field: &Field| matches!(field.exists(), Exists::WithAny(_));
        for field in Field::ALL.into_iter().filter(of_controls) {
            assert!(!left.has_field(field) || layout.holds(field), "{field:?}");
        }
    }
}
