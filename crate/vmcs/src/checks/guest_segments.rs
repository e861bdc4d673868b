//! G024..G094: guest segment and descriptor-table registers.
//!
//! "Not v8086" is written into the helpers: a virtual-8086 guest has its own six rows, and only
//! the rows on TR, LDTR, bases and FRED hold for it too.

use super::*;
use crate::segment::GuestSegment as Segment;

const fn seg(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::GuestSegments, id, fields, check)
}

const fn table(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::GuestTables, id, fields, check)
}

pub(super) const ROWS: &[EntryCheck] = &[
    // Selectors.
    seg("G024", &[TR.selector], |e| {
        (e.get(TR.selector) & 4 == 0).into()
    }),
    seg("G025", &[LDTR.selector, LDTR.rights], |e| {
        if_usable(e, LDTR, e.get(LDTR.selector) & 4 == 0)
    }),
    seg(
        "G026",
        &[PROC1, PROC2, RFLAGS, CS.selector, SS.selector],
        |e| when(e.restricted_protected(), e.rpl(SS) == e.rpl(CS)),
    ),
    // Virtual-8086 mode.
    seg("G027", &v8086_fields(CS), |e| v8086(e, CS)),
    seg("G028", &v8086_fields(SS), |e| v8086(e, SS)),
    seg("G029", &v8086_fields(DS), |e| v8086(e, DS)),
    seg("G030", &v8086_fields(ES), |e| v8086(e, ES)),
    seg("G031", &v8086_fields(FS), |e| v8086(e, FS)),
    seg("G032", &v8086_fields(GS), |e| v8086(e, GS)),
    // Bases.
    seg("G033", &[TR.base], |e| e.canonical(e.get(TR.base)).into()),
    seg("G034", &[FS.base], |e| e.canonical(e.get(FS.base)).into()),
    seg("G035", &[GS.base], |e| e.canonical(e.get(GS.base)).into()),
    seg("G036", &[LDTR.base, LDTR.rights], |e| {
        if_usable(e, LDTR, e.canonical(e.get(LDTR.base)))
    }),
    seg("G037", &[CS.base], |e| (e.get(CS.base) >> 32 == 0).into()),
    seg("G038", &[SS.base, SS.rights], |e| {
        if_usable(e, SS, e.get(SS.base) >> 32 == 0)
    }),
    seg("G039", &[DS.base, DS.rights], |e| {
        if_usable(e, DS, e.get(DS.base) >> 32 == 0)
    }),
    seg("G040", &[ES.base, ES.rights], |e| {
        if_usable(e, ES, e.get(ES.base) >> 32 == 0)
    }),
    // Types.
    seg("G041", &[PROC1, PROC2, RFLAGS, CS.rights], |e| {
        when(
            !e.v8086(),
            match e.kind(CS) {
                9 | 11 | 13 | 15 => true,
                3 => e.unrestricted(),
                _ => false,
            },
        )
    }),
    seg("G042", &[RFLAGS, SS.rights], |e| {
        if_protected(e, SS, matches!(e.kind(SS), 3 | 7))
    }),
    seg("G043", &[RFLAGS, DS.rights], |e| data_kind(e, DS)),
    seg("G044", &[RFLAGS, ES.rights], |e| data_kind(e, ES)),
    seg("G045", &[RFLAGS, FS.rights], |e| data_kind(e, FS)),
    seg("G046", &[RFLAGS, GS.rights], |e| data_kind(e, GS)),
    // S.
    seg("G047", &[RFLAGS, CS.rights], |e| {
        when(!e.v8086(), e.rights(CS) & S != 0)
    }),
    seg("G048", &[RFLAGS, SS.rights], |e| not_system(e, SS)),
    seg("G049", &[RFLAGS, DS.rights], |e| not_system(e, DS)),
    seg("G050", &[RFLAGS, ES.rights], |e| not_system(e, ES)),
    seg("G051", &[RFLAGS, FS.rights], |e| not_system(e, FS)),
    seg("G052", &[RFLAGS, GS.rights], |e| not_system(e, GS)),
    // DPL.
    seg("G053", &[PROC1, PROC2, RFLAGS, CS.rights], |e| {
        when(
            e.unrestricted() && !e.v8086() && e.kind(CS) == 3,
            e.dpl(CS) == 0,
        )
    }),
    seg("G054", &[RFLAGS, CS.rights, SS.rights], |e| {
        when(
            !e.v8086() && matches!(e.kind(CS), 9 | 11),
            e.dpl(CS) == e.dpl(SS),
        )
    }),
    seg("G055", &[RFLAGS, CS.rights, SS.rights], |e| {
        when(
            !e.v8086() && matches!(e.kind(CS), 13 | 15),
            e.dpl(CS) <= e.dpl(SS),
        )
    }),
    seg(
        "G056",
        &[PROC1, PROC2, RFLAGS, SS.selector, SS.rights],
        |e| when(e.restricted_protected(), e.dpl(SS) == e.rpl(SS)),
    ),
    seg(
        "G057",
        &[RFLAGS, CS.rights, SS.rights, Field::GUEST_CR0],
        |e| {
            let real = e.get(Field::GUEST_CR0) & CR0_PE == 0;
            when(!e.v8086() && (e.kind(CS) == 3 || real), e.dpl(SS) == 0)
        },
    ),
    seg("G058", &data_dpl_fields(DS), |e| data_dpl(e, DS)),
    seg("G059", &data_dpl_fields(ES), |e| data_dpl(e, ES)),
    seg("G060", &data_dpl_fields(FS), |e| data_dpl(e, FS)),
    seg("G061", &data_dpl_fields(GS), |e| data_dpl(e, GS)),
    // P, reserved bits, G: register by register.
    seg("G062", &[RFLAGS, CS.rights], |e| {
        when(!e.v8086(), e.rights(CS) & P != 0)
    }),
    seg("G063", &[RFLAGS, CS.rights], |e| {
        when(!e.v8086(), e.rights(CS) & RESERVED == 0)
    }),
    seg("G064", &[RFLAGS, CS.rights, CS.limit], |e| {
        when(!e.v8086(), e.granular(CS))
    }),
    seg("G065", &[RFLAGS, SS.rights], |e| present(e, SS)),
    seg("G066", &[RFLAGS, SS.rights], |e| unreserved(e, SS)),
    seg("G067", &[RFLAGS, SS.rights, SS.limit], |e| granular(e, SS)),
    seg("G068", &[RFLAGS, DS.rights], |e| present(e, DS)),
    seg("G069", &[RFLAGS, DS.rights], |e| unreserved(e, DS)),
    seg("G070", &[RFLAGS, DS.rights, DS.limit], |e| granular(e, DS)),
    seg("G071", &[RFLAGS, ES.rights], |e| present(e, ES)),
    seg("G072", &[RFLAGS, ES.rights], |e| unreserved(e, ES)),
    seg("G073", &[RFLAGS, ES.rights, ES.limit], |e| granular(e, ES)),
    seg("G074", &[RFLAGS, FS.rights], |e| present(e, FS)),
    seg("G075", &[RFLAGS, FS.rights], |e| unreserved(e, FS)),
    seg("G076", &[RFLAGS, FS.rights, FS.limit], |e| granular(e, FS)),
    seg("G077", &[RFLAGS, GS.rights], |e| present(e, GS)),
    seg("G078", &[RFLAGS, GS.rights], |e| unreserved(e, GS)),
    seg("G079", &[RFLAGS, GS.rights, GS.limit], |e| granular(e, GS)),
    seg("G080", &[ENTRY, CS.rights], |e| {
        when(e.guest64() && e.rights(CS) & L != 0, e.rights(CS) & DB == 0)
    }),
    // TR.
    seg("G081", &[TR.rights], |e| e.usable(TR).into()),
    seg("G082", &[ENTRY, TR.rights], |e| {
        match e.kind(TR) {
            11 => true,
            3 => !e.guest64(),
            _ => false,
        }
        .into()
    }),
    seg("G083", &[TR.rights], |e| {
        (e.rights(TR) & (S | P) == P).into()
    }),
    seg("G084", &[TR.rights], |e| {
        (e.rights(TR) & RESERVED == 0).into()
    }),
    seg("G085", &[TR.rights, TR.limit], |e| e.granular(TR).into()),
    // LDTR.
    seg("G086", &[LDTR.rights], |e| {
        if_usable(e, LDTR, e.kind(LDTR) == 2)
    }),
    seg("G087", &[LDTR.rights], |e| {
        if_usable(e, LDTR, e.rights(LDTR) & (S | P) == P)
    }),
    seg("G088", &[LDTR.rights], |e| {
        if_usable(e, LDTR, e.rights(LDTR) & RESERVED == 0)
    }),
    seg("G089", &[LDTR.rights, LDTR.limit], |e| {
        if_usable(e, LDTR, e.granular(LDTR))
    }),
    seg(
        "G090",
        &[Field::GUEST_CR4, RFLAGS, CS.rights, SS.rights],
        |e| {
            when(
                e.guest_cr4(CR4_FRED),
                match e.dpl(SS) {
                    0 => e.rights(CS) & L != 0,
                    3 => e.get(RFLAGS) & RFLAGS_IOPL == 0,
                    _ => false,
                },
            )
        },
    ),
    // GDTR and IDTR.
    table("G091", &[Field::GUEST_GDTR_BASE], |e| {
        e.canonical(e.get(Field::GUEST_GDTR_BASE)).into()
    }),
    table("G092", &[Field::GUEST_IDTR_BASE], |e| {
        e.canonical(e.get(Field::GUEST_IDTR_BASE)).into()
    }),
    table("G093", &[Field::GUEST_GDTR_LIMIT], |e| {
        (e.get(Field::GUEST_GDTR_LIMIT) >> 16 == 0).into()
    }),
    table("G094", &[Field::GUEST_IDTR_LIMIT], |e| {
        (e.get(Field::GUEST_IDTR_LIMIT) >> 16 == 0).into()
    }),
];

const ES: Segment = Segment::ES;
pub(super) const CS: Segment = Segment::CS;
pub(super) const SS: Segment = Segment::SS;
const DS: Segment = Segment::DS;
const FS: Segment = Segment::FS;
const GS: Segment = Segment::GS;
const LDTR: Segment = Segment::LDTR;
const TR: Segment = Segment::TR;
const RFLAGS: Field = Field::GUEST_RFLAGS;

// Access rights: SDM Vol. 3C, table "Format of Access Rights".
const S: u64 = 1 << 4;
const P: u64 = 1 << 7;
pub(super) const L: u64 = 1 << 13;
const DB: u64 = 1 << 14;
const G: u64 = 1 << 15;
const UNUSABLE: u64 = 1 << 16;
const RESERVED: u64 = 0xfffe_0f00;

const fn v8086_fields(segment: Segment) -> [Field; 5] {
    [
        RFLAGS,
        segment.selector,
        segment.base,
        segment.limit,
        segment.rights,
    ]
}

/// Base is the selector times 16, limit FFFFH, and the rights are those of real-mode-like data
/// with DPL 3.
fn v8086(e: &EntryCtx, segment: Segment) -> Verdict {
    when(
        e.v8086(),
        e.get(segment.base) == e.get(segment.selector) << 4
            && e.get(segment.limit) == 0xffff
            && e.rights(segment) == 0xf3,
    )
}

fn if_usable(e: &EntryCtx, segment: Segment, holds: bool) -> Verdict {
    when(e.usable(segment), holds)
}

fn if_protected(e: &EntryCtx, segment: Segment, holds: bool) -> Verdict {
    when(e.usable(segment) && !e.v8086(), holds)
}

/// Accessed, and readable if code.
fn data_kind(e: &EntryCtx, segment: Segment) -> Verdict {
    let kind = e.kind(segment);
    if_protected(
        e,
        segment,
        kind & 1 != 0 && (kind & 8 == 0 || kind & 2 != 0),
    )
}

fn not_system(e: &EntryCtx, segment: Segment) -> Verdict {
    if_protected(e, segment, e.rights(segment) & S != 0)
}

fn present(e: &EntryCtx, segment: Segment) -> Verdict {
    if_protected(e, segment, e.rights(segment) & P != 0)
}

fn unreserved(e: &EntryCtx, segment: Segment) -> Verdict {
    if_protected(e, segment, e.rights(segment) & RESERVED == 0)
}

fn granular(e: &EntryCtx, segment: Segment) -> Verdict {
    if_protected(e, segment, e.granular(segment))
}

const fn data_dpl_fields(segment: Segment) -> [Field; 5] {
    [PROC1, PROC2, RFLAGS, segment.selector, segment.rights]
}

/// Data and non-conforming code: DPL is not below the RPL of the selector.
fn data_dpl(e: &EntryCtx, segment: Segment) -> Verdict {
    when(
        e.usable(segment) && e.restricted_protected() && e.kind(segment) <= 11,
        e.dpl(segment) >= e.rpl(segment),
    )
}

impl EntryCtx<'_> {
    pub(super) fn rights(&self, segment: Segment) -> u64 {
        self.get(segment.rights)
    }

    fn usable(&self, segment: Segment) -> bool {
        self.rights(segment) & UNUSABLE == 0
    }

    fn kind(&self, segment: Segment) -> u64 {
        self.rights(segment) & 0xf
    }

    pub(super) fn dpl(&self, segment: Segment) -> u64 {
        self.rights(segment) >> 5 & 3
    }

    fn rpl(&self, segment: Segment) -> u64 {
        self.get(segment.selector) & 3
    }

    /// Neither virtual-8086 nor an unrestricted guest: selectors and rights must agree.
    fn restricted_protected(&self) -> bool {
        !self.v8086() && !self.unrestricted()
    }

    /// G agrees with the limit: low 12 bits not all 1 need G=0, high 12 bits not all 0 need G=1.
    fn granular(&self, segment: Segment) -> bool {
        let limit = self.get(segment.limit);
        if self.rights(segment) & G != 0 {
            limit & 0xfff == 0xfff
        } else {
            limit >> 20 == 0
        }
    }
}
