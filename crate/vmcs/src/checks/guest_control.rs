//! G001..G023 and G129: guest control registers, debug registers and MSRs.

use super::*;

const fn control(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::GuestControl, id, fields, check)
}

pub(super) const ROWS: &[EntryCheck] = &[
    // Control registers.
    control("G001", &[PROC1, PROC2, CR0], |e| {
        let waived = if e.unrestricted() { CR0_PE | CR0_PG } else { 0 };
        cr0_fixed(e.caps, e.get(CR0), waived).into()
    }),
    control("G002", &[CR0], |e| {
        let cr0 = e.get(CR0);
        (cr0 & CR0_PG == 0 || cr0 & CR0_PE != 0).into()
    }),
    control("G003", &[CR4], |e| cr4_fixed(e.caps, e.get(CR4)).into()),
    control("G004", &[CR0, CR4], |e| {
        when(e.guest_cr4(CR4_CET), e.get(CR0) & CR0_WP != 0)
    }),
    control("G005", &[Field::GUEST_CR3], |e| {
        e.cr3(e.get(Field::GUEST_CR3)).into()
    }),
    control("G006", &[ENTRY, CR0, CR4], |e| {
        when(
            e.guest64(),
            e.get(CR0) & CR0_PG != 0 && e.guest_cr4(CR4_PAE),
        )
    }),
    control("G007", &[ENTRY, CR4], |e| {
        when(!e.guest64(), !e.guest_cr4(CR4_PCIDE | CR4_FRED))
    }),
    // Debug registers.
    control("G008", &[ENTRY, Field::GUEST_IA32_DEBUGCTL], |e| {
        when(
            e.entry(entry::LOAD_DEBUG_CONTROLS),
            e.get(Field::GUEST_IA32_DEBUGCTL) & !e.cpu.debugctl == 0,
        )
    }),
    control("G009", &[ENTRY, Field::GUEST_DR7], |e| {
        when(
            e.entry(entry::LOAD_DEBUG_CONTROLS),
            e.get(Field::GUEST_DR7) >> 32 == 0,
        )
    }),
    // MSRs and SSP.
    control("G010", &[Field::GUEST_SYSENTER_ESP], |e| {
        e.canonical(e.get(Field::GUEST_SYSENTER_ESP)).into()
    }),
    control("G011", &[Field::GUEST_SYSENTER_EIP], |e| {
        e.canonical(e.get(Field::GUEST_SYSENTER_EIP)).into()
    }),
    control("G012", &[ENTRY, Field::GUEST_IA32_PERF_GLOBAL_CTRL], |e| {
        when(
            e.entry(entry::LOAD_IA32_PERF_GLOBAL_CTRL),
            e.get(Field::GUEST_IA32_PERF_GLOBAL_CTRL) & !e.cpu.perf_global_ctrl == 0,
        )
    }),
    control("G013", &[ENTRY, Field::GUEST_IA32_PAT], |e| {
        when(
            e.entry(entry::LOAD_IA32_PAT),
            pat(e.get(Field::GUEST_IA32_PAT)),
        )
    }),
    control("G014", &[ENTRY, CR0, Field::GUEST_IA32_EFER], |e| {
        let efer = e.get(Field::GUEST_IA32_EFER);
        let (lma, lme) = (efer & EFER_LMA != 0, efer & EFER_LME != 0);
        when(
            e.entry(entry::LOAD_IA32_EFER),
            efer & !e.cpu.efer == 0
                && lma == e.guest64()
                && (lma == lme || e.get(CR0) & CR0_PG == 0),
        )
    }),
    control("G015", &[ENTRY, Field::GUEST_BNDCFGS], |e| {
        let bndcfgs = e.get(Field::GUEST_BNDCFGS);
        when(
            e.entry(entry::LOAD_IA32_BNDCFGS),
            bndcfgs & 0xffc == 0 && e.canonical(bndcfgs & !0xfff),
        )
    }),
    control("G016", &[ENTRY, Field::GUEST_IA32_RTIT_CTL], |e| {
        when(
            e.entry(entry::LOAD_IA32_RTIT_CTL),
            e.get(Field::GUEST_IA32_RTIT_CTL) & !e.cpu.rtit_ctl == 0,
        )
    }),
    control("G017", &[ENTRY, Field::GUEST_UINV], |e| {
        when(e.entry(entry::LOAD_UINV), e.get(Field::GUEST_UINV) <= 255)
    }),
    control(
        "G018",
        &[ENTRY, Field::GUEST_S_CET, Field::GUEST_SSP_TBL],
        |e| {
            let value = e.get(Field::GUEST_S_CET);
            when(
                e.entry(entry::LOAD_CET_STATE),
                s_cet(value) && e.canonical(value) && e.canonical(e.get(Field::GUEST_SSP_TBL)),
            )
        },
    ),
    control("G019", &[ENTRY, Field::GUEST_SSP], |e| {
        when(
            e.entry(entry::LOAD_CET_STATE),
            e.get(Field::GUEST_SSP) & 3 == 0,
        )
    }),
    EntryCheck::new(Group::GuestRip, "G129", &[ENTRY, Field::GUEST_SSP], |e| {
        when(
            e.entry(entry::LOAD_CET_STATE),
            e.linear(e.get(Field::GUEST_SSP)),
        )
    }),
    control("G020", &[ENTRY, Field::GUEST_IA32_LBR_CTL], |e| {
        when(
            e.entry(entry::LOAD_GUEST_IA32_LBR_CTL),
            e.get(Field::GUEST_IA32_LBR_CTL) & !e.cpu.lbr_ctl == 0,
        )
    }),
    control("G021", &[ENTRY, Field::GUEST_IA32_PKRS], |e| {
        when(
            e.entry(entry::LOAD_PKRS),
            e.get(Field::GUEST_IA32_PKRS) >> 32 == 0,
        )
    }),
    control(
        "G022",
        &[
            ENTRY, FRED[0], FRED[1], FRED[2], FRED[3], FRED[4], FRED[5], FRED[6],
        ],
        |e| when(e.entry(entry::LOAD_IA32_FRED_STATE), fred(e, FRED)),
    ),
    control("G023", &[ENTRY, Field::GUEST_IA32_SPEC_CTRL], |e| {
        when(
            e.entry(entry::LOAD_GUEST_IA32_SPEC_CTRL),
            e.get(Field::GUEST_IA32_SPEC_CTRL) & !e.cpu.spec_ctrl == 0,
        )
    }),
];

const CR0: Field = Field::GUEST_CR0;
const CR4: Field = Field::GUEST_CR4;

const FRED: [Field; 7] = [
    Field::GUEST_IA32_FRED_CONFIG,
    Field::GUEST_IA32_FRED_RSP1,
    Field::GUEST_IA32_FRED_RSP2,
    Field::GUEST_IA32_FRED_RSP3,
    Field::GUEST_IA32_FRED_SSP1,
    Field::GUEST_IA32_FRED_SSP2,
    Field::GUEST_IA32_FRED_SSP3,
];
