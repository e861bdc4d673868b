//! H001..H037: the host-state area.

use super::*;

const fn control(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::HostControl, id, fields, check)
}

const fn segment(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::HostSegments, id, fields, check)
}

const fn space(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::AddressSpace, id, fields, check)
}

pub(super) const ROWS: &[EntryCheck] = &[
    // Control registers.
    control("H001", &[Field::HOST_CR0], |e| {
        cr0_fixed(e.caps, e.get(Field::HOST_CR0), 0).into()
    }),
    control("H002", &[Field::HOST_CR4], |e| {
        cr4_fixed(e.caps, e.get(Field::HOST_CR4)).into()
    }),
    control("H003", &[Field::HOST_CR3], |e| {
        e.cr3(e.get(Field::HOST_CR3)).into()
    }),
    control("H004", &[Field::HOST_CR0, Field::HOST_CR4], |e| {
        when(
            e.get(Field::HOST_CR4) & CR4_CET != 0,
            e.get(Field::HOST_CR0) & CR0_WP != 0,
        )
    }),
    // MSRs and SSP.
    control("H005", &[Field::HOST_IA32_SYSENTER_ESP], |e| {
        canonical(e, Field::HOST_IA32_SYSENTER_ESP)
    }),
    control("H006", &[Field::HOST_IA32_SYSENTER_EIP], |e| {
        canonical(e, Field::HOST_IA32_SYSENTER_EIP)
    }),
    control("H007", &[EXIT, Field::HOST_IA32_PERF_GLOBAL_CTRL], |e| {
        when(
            e.exit(exit::LOAD_IA32_PERF_GLOBAL_CTRL),
            e.get(Field::HOST_IA32_PERF_GLOBAL_CTRL) & !e.cpu.perf_global_ctrl == 0,
        )
    }),
    control("H008", &[EXIT, Field::HOST_IA32_PAT], |e| {
        when(
            e.exit(exit::LOAD_IA32_PAT),
            pat(e.get(Field::HOST_IA32_PAT)),
        )
    }),
    control("H009", &[EXIT, Field::HOST_IA32_EFER], |e| {
        let efer = e.get(Field::HOST_IA32_EFER);
        let long = [efer & EFER_LMA != 0, efer & EFER_LME != 0];
        when(
            e.exit(exit::LOAD_IA32_EFER),
            efer & !e.cpu.efer == 0 && long == [e.host64(); 2],
        )
    }),
    control("H010", &[EXIT, Field::HOST_S_CET], |e| {
        when(
            e.exit(exit::LOAD_CET_STATE),
            s_cet(e.get(Field::HOST_S_CET)),
        )
    }),
    control("H033", &[EXIT, Field::HOST_SSP], |e| {
        when(
            e.exit(exit::LOAD_CET_STATE),
            e.get(Field::HOST_SSP) & 3 == 0,
        )
    }),
    control("H011", &[EXIT, Field::HOST_IA32_PKRS], |e| {
        when(
            e.exit(exit::LOAD_PKRS),
            e.get(Field::HOST_IA32_PKRS) >> 32 == 0,
        )
    }),
    control(
        "H012",
        &[
            EXIT, EXIT2, FRED[0], FRED[1], FRED[2], FRED[3], FRED[4], FRED[5], FRED[6],
        ],
        |e| when(e.exit2(exit2::LOAD_IA32_FRED_STATE), fred(e, FRED)),
    ),
    control("H013", &[EXIT, EXIT2, Field::HOST_IA32_SPEC_CTRL], |e| {
        when(
            e.exit2(exit2::LOAD_IA32_SPEC_CTRL),
            e.get(Field::HOST_IA32_SPEC_CTRL) & !e.cpu.spec_ctrl == 0,
        )
    }),
    // Selectors.
    segment("H014", &[CS], |e| gdt_ring_0(e, CS)),
    segment("H015", &[SS], |e| gdt_ring_0(e, SS)),
    segment("H016", &[DS], |e| gdt_ring_0(e, DS)),
    segment("H017", &[ES], |e| gdt_ring_0(e, ES)),
    segment("H018", &[FS], |e| gdt_ring_0(e, FS)),
    segment("H019", &[GS], |e| gdt_ring_0(e, GS)),
    segment("H020", &[TR], |e| gdt_ring_0(e, TR)),
    segment("H021", &[CS], |e| (e.get(CS) != 0).into()),
    segment("H022", &[TR], |e| (e.get(TR) != 0).into()),
    segment("H023", &[EXIT, SS], |e| when(!e.host64(), e.get(SS) != 0)),
    // Bases.
    segment("H024", &[Field::HOST_FS_BASE], |e| {
        canonical(e, Field::HOST_FS_BASE)
    }),
    segment("H025", &[Field::HOST_GS_BASE], |e| {
        canonical(e, Field::HOST_GS_BASE)
    }),
    segment("H026", &[Field::HOST_GDTR_BASE], |e| {
        canonical(e, Field::HOST_GDTR_BASE)
    }),
    segment("H027", &[Field::HOST_IDTR_BASE], |e| {
        canonical(e, Field::HOST_IDTR_BASE)
    }),
    segment("H028", &[Field::HOST_TR_BASE], |e| {
        canonical(e, Field::HOST_TR_BASE)
    }),
    // Address-space size.
    space("H029", &[EXIT], |e| (e.host64() == e.cpu.long_mode).into()).each_time(),
    space("H030", &[EXIT, ENTRY], |e| {
        when(!e.cpu.long_mode, !e.host64() && !e.guest64())
    })
    .each_time(),
    space(
        "H031",
        &[EXIT, ENTRY, Field::HOST_CR4, Field::HOST_RIP],
        |e| {
            when(
                !e.host64(),
                !e.guest64()
                    && e.get(Field::HOST_CR4) & CR4_PCIDE == 0
                    && e.get(Field::HOST_RIP) >> 32 == 0,
            )
        },
    ),
    space("H034", &[EXIT, Field::HOST_CR4], |e| {
        when(!e.host64(), e.get(Field::HOST_CR4) & CR4_FRED == 0)
    }),
    space("H035", &[EXIT, Field::HOST_S_CET, Field::HOST_SSP], |e| {
        when(
            !e.host64() && e.exit(exit::LOAD_CET_STATE),
            e.get(Field::HOST_S_CET) >> 32 == 0 && e.get(Field::HOST_SSP) >> 32 == 0,
        )
    }),
    space("H032", &[EXIT, Field::HOST_CR4, Field::HOST_RIP], |e| {
        when(
            e.host64(),
            e.get(Field::HOST_CR4) & CR4_PAE != 0 && e.canonical(e.get(Field::HOST_RIP)),
        )
    }),
    space("H036", &[EXIT, Field::HOST_S_CET, Field::HOST_SSP], |e| {
        when(
            e.host64() && e.exit(exit::LOAD_CET_STATE),
            e.canonical(e.get(Field::HOST_S_CET)) && e.canonical(e.get(Field::HOST_SSP)),
        )
    }),
    space("H037", &[EXIT, Field::HOST_SSP_TBL], |e| {
        when(
            e.exit(exit::LOAD_CET_STATE),
            e.canonical(e.get(Field::HOST_SSP_TBL)),
        )
    }),
];

const CS: Field = Field::HOST_CS_SELECTOR;
const SS: Field = Field::HOST_SS_SELECTOR;
const DS: Field = Field::HOST_DS_SELECTOR;
const ES: Field = Field::HOST_ES_SELECTOR;
const FS: Field = Field::HOST_FS_SELECTOR;
const GS: Field = Field::HOST_GS_SELECTOR;
const TR: Field = Field::HOST_TR_SELECTOR;

const FRED: [Field; 7] = [
    Field::HOST_IA32_FRED_CONFIG,
    Field::HOST_IA32_FRED_RSP1,
    Field::HOST_IA32_FRED_RSP2,
    Field::HOST_IA32_FRED_RSP3,
    Field::HOST_IA32_FRED_SSP1,
    Field::HOST_IA32_FRED_SSP2,
    Field::HOST_IA32_FRED_SSP3,
];

fn canonical(e: &EntryCtx, field: Field) -> Verdict {
    e.canonical(e.get(field)).into()
}

/// TI and RPL of the selector are 0.
fn gdt_ring_0(e: &EntryCtx, selector: Field) -> Verdict {
    (e.get(selector) & 7 == 0).into()
}
