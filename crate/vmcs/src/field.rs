//! The fields of a VMCS: what each is called, how wide it is, when it exists.

use core::fmt;

use crate::control::{Control, ControlId};

include!(concat!(env!("OUT_DIR"), "/fields.rs"));

/// One field of a VMCS, as a dense index in the order of encodings.
///
/// Vol. 3D, "Field Encoding in VMCS".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Field(u8);

/// How wide a field is, numbered as bits 14:13 of an encoding number it. Vol. 3C, "VMREAD, VMWRITE,
/// and Encodings of VMCS Fields".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 16 bits.
    Bits16 = 0,
    /// 64 bits, with a second encoding for the high half.
    Bits64 = 1,
    /// 32 bits.
    Bits32 = 2,
    /// As wide as a linear address: 64 bits here.
    Natural = 3,
}

/// What a field is for. Vol. 3C, "VMREAD, VMWRITE, and Encodings of VMCS Fields" (the type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A VM-execution, VM-exit or VM-entry control.
    Control,
    /// VM-exit information: read-only unless IA32_VMX_MISC bit 29 is 1.
    ExitInfo,
    /// Guest state, loaded by VM entries and saved by VM exits.
    GuestState,
    /// Host state, loaded by VM exits.
    HostState,
}

/// Groups of VM-entry checks, as bits of a mask: what a change of a field makes necessary to check
/// again. Each bit is a place in [`checks::SECTIONS`](crate::checks::SECTIONS).
pub mod group {
    /// Checks on VMX controls. Vol. 3C, "Checks on VMX Controls".
    pub const CONTROLS: u8 = 0b000_0111;
    /// Checks on the host-state area. Vol. 3C, "Checks on Host Control Registers, MSRs, and SSP" and
    /// the sections that follow it.
    pub const HOST: u8 = 0b000_1000;
    /// Checks on the guest-state area. Vol. 3C, "Checks on the Guest State Area".
    pub const GUEST: u8 = 0b111_0000;
    /// All of them.
    pub const ALL: u8 = CONTROLS | HOST | GUEST;
}

/// The condition under which a processor has a field. Vol. 3C, the descriptions of the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exists {
    /// Every processor with VMX has it.
    Always,
    /// It exists where any of these controls may be 1.
    WithAny(&'static [ControlId]),
    /// It exists where IA32_VMX_MISC 24:16 is more than this number.
    Cr3Targets(u8),
    /// It comes with a feature that no control here stands for; never, for our purposes.
    Unknown,
}

struct Info {
    encoding: u16,
    name: &'static str,
    short_name: &'static str,
    exists: Exists,
}

/// Place of each index in a table as long as a byte reaches, so that no lookup needs a check.
const PLACES: usize = 256;

static MASKS: [u64; PLACES] = {
    let mut masks = [0; PLACES];
    let mut i = 0;
    while i < COUNT {
        masks[i] = Field(i as u8).width().mask();
        i += 1;
    }
    masks
};

static GROUPS: [u8; PLACES] = crate::checks::sections_by_field();

impl Width {
    /// The bits a value of this width may have.
    #[must_use]
    pub const fn mask(self) -> u64 {
        match self {
            Self::Bits16 => 0xFFFF,
            Self::Bits32 => 0xFFFF_FFFF,
            Self::Bits64 | Self::Natural => u64::MAX,
        }
    }

    /// Bytes of a value of this width.
    #[must_use]
    pub const fn bytes(self) -> u8 {
        match self {
            Self::Bits16 => 2,
            Self::Bits32 => 4,
            Self::Bits64 | Self::Natural => 8,
        }
    }
}

impl Field {
    /// How many fields there are.
    pub const COUNT: usize = COUNT;

    /// Every field, in the order of encodings.
    pub const ALL: [Self; COUNT] = {
        let mut all = [Self(0); COUNT];
        let mut i = 0;
        while i < COUNT {
            all[i] = Self(i as u8);
            i += 1;
        }
        all
    };

    /// The field with this encoding, and whether the encoding is that of its high half.
    ///
    /// Nothing for an encoding that means no field: bits 31:15 or 12 set, or the high half of a
    /// field that is not 64 bits wide. Vol. 3C, "VMREAD, VMWRITE, and Encodings of VMCS Fields".
    #[inline]
    #[must_use]
    pub const fn from_encoding(encoding: u32) -> Option<(Self, bool)> {
        let index = encoding >> 1 & 0x1FF;
        if encoding & !0x6FFF != 0 || index >= INDEXES {
            return None;
        }
        let class = (encoding >> 13 & 3) << 2 | encoding >> 10 & 3;
        let found = BY_ENCODING[(class * INDEXES + index) as usize];
        let high = encoding & 1 != 0;
        if found as usize >= COUNT || high && encoding >> 13 != Width::Bits64 as u32 {
            return None;
        }
        Some((Self(found), high))
    }

    /// The field at this place in [`Field::ALL`].
    #[must_use]
    pub const fn from_index(index: usize) -> Option<Self> {
        if index < COUNT {
            Some(Self(index as u8))
        } else {
            None
        }
    }

    /// The place in [`Field::ALL`].
    #[inline]
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    const fn info(self) -> &'static Info {
        &INFO[self.0 as usize]
    }

    /// The encoding that VMREAD and VMWRITE take; that of the full field.
    #[must_use]
    pub const fn encoding(self) -> u32 {
        self.info().encoding as u32
    }

    /// The manual's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.info().name
    }

    /// A name in lower case and underscores, as source code uses it.
    #[must_use]
    pub const fn short_name(self) -> &'static str {
        self.info().short_name
    }

    /// How wide it is.
    #[must_use]
    pub const fn width(self) -> Width {
        match self.encoding() >> 13 & 3 {
            0 => Width::Bits16,
            1 => Width::Bits64,
            2 => Width::Bits32,
            _ => Width::Natural,
        }
    }

    /// What it is for. Exit information is what VMWRITE may refuse.
    #[must_use]
    pub const fn kind(self) -> Kind {
        match self.encoding() >> 10 & 3 {
            0 => Kind::Control,
            1 => Kind::ExitInfo,
            2 => Kind::GuestState,
            _ => Kind::HostState,
        }
    }

    /// The bits that its values may have.
    #[inline]
    #[must_use]
    pub const fn mask(self) -> u64 {
        MASKS[self.0 as usize]
    }

    /// The [`group`]s of checks that read it: none for exit information, and for controls that may
    /// have any value.
    #[inline]
    #[must_use]
    pub const fn groups(self) -> u8 {
        GROUPS[self.0 as usize]
    }

    /// When a processor has it.
    #[must_use]
    pub const fn exists(self) -> Exists {
        self.info().exists
    }
}

impl fmt::Debug for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short_name())
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of fields.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct FieldSet([u64; PLACES / 64]);

impl FieldSet {
    /// No field.
    pub const EMPTY: Self = Self([0; PLACES / 64]);

    /// Every field.
    pub const ALL: Self = {
        let mut all = Self::EMPTY;
        let mut i = 0;
        while i < COUNT {
            all.insert(Field(i as u8));
            i += 1;
        }
        all
    };

    /// Whether `field` is in it.
    #[inline]
    #[must_use]
    pub const fn contains(&self, field: Field) -> bool {
        self.0[field.0 as usize / 64] >> (field.0 % 64) & 1 != 0
    }

    /// Adds `field`.
    pub const fn insert(&mut self, field: Field) {
        self.0[field.0 as usize / 64] |= 1 << (field.0 % 64);
    }

    /// Takes `field` out.
    pub const fn remove(&mut self, field: Field) {
        self.0[field.0 as usize / 64] &= !(1 << (field.0 % 64));
    }

    /// What is in both.
    #[must_use]
    pub const fn and(&self, other: &Self) -> Self {
        let mut both = Self::EMPTY;
        let mut i = 0;
        while i < both.0.len() {
            both.0[i] = self.0[i] & other.0[i];
            i += 1;
        }
        both
    }

    /// What is in this one and not in `other`.
    #[must_use]
    pub const fn without(&self, other: &Self) -> Self {
        let mut rest = Self::EMPTY;
        let mut i = 0;
        while i < rest.0.len() {
            rest.0[i] = self.0[i] & !other.0[i];
            i += 1;
        }
        rest
    }

    /// Whether it holds no field.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many fields it holds.
    #[must_use]
    pub const fn len(&self) -> usize {
        let mut len = 0;
        let mut i = 0;
        while i < self.0.len() {
            len += self.0[i].count_ones() as usize;
            i += 1;
        }
        len
    }

    /// The fields, in the order of encodings.
    pub fn iter(&self) -> impl Iterator<Item = Field> + '_ {
        Field::ALL.into_iter().filter(|&field| self.contains(field))
    }
}

impl FromIterator<Field> for FieldSet {
    fn from_iter<I: IntoIterator<Item = Field>>(fields: I) -> Self {
        let mut set = Self::EMPTY;
        for field in fields {
            set.insert(field);
        }
        set
    }
}

impl fmt::Debug for FieldSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_207_fields() {
        assert_eq!(Field::COUNT, 207);
        assert_eq!(Field::ALL.len(), Field::COUNT);
        assert_eq!(FieldSet::ALL.len(), Field::COUNT);
    }

    #[test]
    fn encodings_say_what_the_columns_say() {
        for field in Field::ALL {
            assert_eq!(
                (field.width(), field.kind()),
                TYPES[field.index()],
                "{field:?}"
            );
        }
    }

    #[test]
    fn every_encoding_finds_its_field_and_no_other() {
        let mut found = 0;
        for encoding in 0..=0xFFFF {
            let Some((field, high)) = Field::from_encoding(encoding) else {
                continue;
            };
            assert_eq!(field.encoding() | u32::from(high), encoding);
            found += 1;
        }
        let wide = Field::ALL
            .iter()
            .filter(|f| f.width() == Width::Bits64)
            .count();
        assert_eq!(found, Field::COUNT + wide);
    }

    #[test]
    fn encodings_with_reserved_bits_find_nothing() {
        for bit in (15..32).chain([12]) {
            assert_eq!(
                Field::from_encoding(Field::GUEST_RIP.encoding() | 1 << bit),
                None
            );
        }
        assert_eq!(Field::from_encoding(u32::MAX), None);
        assert_eq!(Field::from_encoding(Field::GUEST_RIP.encoding() | 1), None);
    }

    #[test]
    fn high_halves_are_those_of_64_bit_fields() {
        assert_eq!(
            Field::from_encoding(0x2011),
            Some((Field::TSC_OFFSET, true))
        );
        assert_eq!(
            Field::from_encoding(0x2010),
            Some((Field::TSC_OFFSET, false))
        );
        assert_eq!(
            Field::from_encoding(0x681E),
            Some((Field::GUEST_RIP, false))
        );
        assert_eq!(Field::VIRTUAL_PROCESSOR_ID.index(), 0);
    }

    #[test]
    fn groups_are_those_of_the_rows_that_read_it() {
        let stages = |field: Field| {
            let groups = field.groups();
            [group::CONTROLS, group::HOST, group::GUEST].map(|stage| groups & stage != 0)
        };
        assert_eq!(stages(Field::EPT_POINTER), [true, false, false]);
        assert_eq!(stages(Field::HOST_CR3), [false, true, false]);
        assert_eq!(stages(Field::GUEST_RIP), [false, false, true]);
        assert_eq!(stages(Field::VM_ENTRY_CONTROLS), [true, true, true]);
        assert_eq!(
            stages(Field::GUEST_CR0),
            [true, false, true],
            "event injection"
        );
        assert_eq!(stages(Field::VM_EXIT_REASON), [false; 3]);
        assert_eq!(stages(Field::TSC_OFFSET), [false; 3]);
    }

    #[test]
    fn conditions_name_controls() {
        assert_eq!(Field::GUEST_RIP.exists(), Exists::Always);
        assert_eq!(Field::CR3_TARGET_VALUE3.exists(), Exists::Cr3Targets(3));
        const PAT: &[ControlId] = &[
            ControlId::new(Control::Entry, 14),
            ControlId::new(Control::Exit, 18),
        ];
        assert_eq!(Field::GUEST_IA32_PAT.exists(), Exists::WithAny(PAT));
    }

    #[test]
    fn sets_add_and_take() {
        let mut set: FieldSet = [Field::GUEST_RIP, Field::HOST_RIP].into_iter().collect();
        set.remove(Field::HOST_RIP);
        assert!(set.contains(Field::GUEST_RIP) && !set.contains(Field::HOST_RIP));
        assert_eq!(FieldSet::ALL.without(&set).len(), Field::COUNT - 1);
        assert_eq!(FieldSet::ALL.and(&set), set);
        assert!(!set.is_empty() && FieldSet::EMPTY.is_empty());
    }
}
