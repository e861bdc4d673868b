//! G095..G128, G130, G131: RIP, RFLAGS, non-register state, PDPTEs.

use super::controls_entry::EXECUTIVE;
use super::guest_segments::{CS, L, SS};
use super::*;

const fn rip(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::GuestRip, id, fields, check)
}

const fn state(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::GuestNonRegister, id, fields, check)
}

const fn link(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::GuestNonRegister, id, fields, check)
        .or(Failure::Exit33 { qualification: 4 })
}

const fn pdpte(
    id: &'static str,
    fields: &'static [Field],
    check: fn(&EntryCtx) -> Verdict,
) -> EntryCheck {
    EntryCheck::new(Group::GuestPdptes, id, fields, check).each_time()
}

pub(super) const ROWS: &[EntryCheck] = &[
    rip("G095", &[ENTRY, CS.rights, Field::GUEST_RIP], |e| {
        when(!e.code64(), e.get(Field::GUEST_RIP) >> 32 == 0)
    }),
    rip("G096", &[ENTRY, CS.rights, Field::GUEST_RIP], |e| {
        when(e.code64(), e.linear(e.get(Field::GUEST_RIP)))
    }),
    rip("G097", &[RFLAGS], |e| {
        (e.get(RFLAGS) & 0xffff_ffff_ffc0_802a == 2).into()
    }),
    rip("G098", &[ENTRY, Field::GUEST_CR0, RFLAGS], |e| {
        let protected = e.get(Field::GUEST_CR0) & CR0_PE != 0;
        when(e.guest64() || !protected, !e.v8086())
    }),
    rip("G099", &[INJECTION, RFLAGS], |e| {
        when(
            e.injects(event::EXTERNAL_INTERRUPT),
            e.get(RFLAGS) & RFLAGS_IF != 0,
        )
    }),
    // Activity state.
    state("G100", &[ACTIVITY], |e| {
        match e.get(ACTIVITY) {
            ACTIVE => true,
            state @ HLT..=WAIT_FOR_SIPI => e.caps.misc >> (5 + state) & 1 != 0,
            _ => false,
        }
        .into()
    }),
    state("G101", &[ACTIVITY, SS.rights], |e| {
        when(e.get(ACTIVITY) == HLT, e.dpl(SS) == 0)
    }),
    state("G102", &[ACTIVITY, BLOCKING], |e| {
        when(e.blocked(BY_STI | BY_MOV_SS), e.get(ACTIVITY) == ACTIVE)
    }),
    state("G103", &[ACTIVITY, INJECTION], |e| {
        injected_into(e, HLT, |event| match event.kind() {
            event::EXTERNAL_INTERRUPT | event::NMI => true,
            event::HARDWARE_EXCEPTION => matches!(event.vector(), DB | MC),
            event::OTHER => event.vector() == 0,
            _ => false,
        })
    }),
    state("G104", &[ACTIVITY, INJECTION], |e| {
        injected_into(e, SHUTDOWN, |event| match event.kind() {
            event::NMI => true,
            event::HARDWARE_EXCEPTION => event.vector() == MC,
            _ => false,
        })
    }),
    state("G105", &[ACTIVITY, INJECTION], |e| {
        injected_into(e, WAIT_FOR_SIPI, |_| false)
    }),
    state("G106", &[ACTIVITY, ENTRY], |e| {
        when(
            e.entry(entry::ENTRY_TO_SMM),
            e.get(ACTIVITY) != WAIT_FOR_SIPI,
        )
    }),
    EntryCheck::new(
        Group::ReturnFromSmm,
        "G131",
        &[ACTIVITY, ENTRY, EXECUTIVE],
        |e| {
            when(
                e.returns_from_smm() && e.get(EXECUTIVE) == e.cpu.vmxon,
                e.get(ACTIVITY) != WAIT_FOR_SIPI,
            )
        },
    )
    .or(Failure::Exit33 { qualification: 0 })
    .each_time(),
    // Interruptibility state.
    state("G107", &[BLOCKING], |e| {
        let exists = if e.cpu.sgx { 0x1f } else { 0xf };
        (e.get(BLOCKING) & !exists == 0).into()
    }),
    state("G108", &[BLOCKING], |e| {
        (!(e.blocked(BY_STI) && e.blocked(BY_MOV_SS))).into()
    }),
    state("G109", &[BLOCKING, RFLAGS], |e| {
        when(e.get(RFLAGS) & RFLAGS_IF == 0, !e.blocked(BY_STI))
    }),
    state("G130", &[BLOCKING, Field::GUEST_CR4, SS.rights], |e| {
        when(e.guest_cr4(CR4_FRED) && e.dpl(SS) == 3, !e.blocked(BY_STI))
    }),
    state("G110", &[BLOCKING, INJECTION], |e| {
        when(
            e.injects(event::EXTERNAL_INTERRUPT),
            !e.blocked(BY_STI | BY_MOV_SS),
        )
    }),
    state("G111", &[BLOCKING, INJECTION], |e| {
        when(e.injects(event::NMI), !e.blocked(BY_MOV_SS))
    }),
    state("G112", &[BLOCKING, INJECTION], |e| {
        when(e.injects(event::NMI), !e.blocked(BY_STI))
    })
    .or(Failure::Exit33 { qualification: 3 }),
    state("G113", &[BLOCKING], |e| {
        when(!e.cpu.smm, !e.blocked(BY_SMI))
    })
    .each_time(),
    state("G114", &[BLOCKING, ENTRY], |e| {
        when(e.entry(entry::ENTRY_TO_SMM), e.blocked(BY_SMI))
    }),
    state("G115", &[BLOCKING, INJECTION, PIN], |e| {
        when(
            e.pin(pin::VIRTUAL_NMIS) && e.injects(event::NMI),
            !e.blocked(BY_NMI),
        )
    }),
    state("G116", &[BLOCKING], |e| {
        when(e.blocked(ENCLAVE), e.cpu.sgx && !e.blocked(BY_MOV_SS))
    }),
    // Pending debug exceptions.
    state("G117", &[PENDING], |e| {
        let mut reserved = !0 << 17 | 1 << 15 | 1 << 13 | 0x7f0;
        if !e.cpu.bus_lock_debug {
            reserved |= 1 << 11;
        }
        if !e.cpu.rtm {
            reserved |= 1 << 16;
        }
        (e.get(PENDING) & reserved == 0).into()
    }),
    state(
        "G118",
        &[
            ACTIVITY,
            BLOCKING,
            PENDING,
            RFLAGS,
            Field::GUEST_IA32_DEBUGCTL,
        ],
        |e| {
            let btf = e.get(Field::GUEST_IA32_DEBUGCTL) & 1 << 1 != 0;
            let stepping = e.get(RFLAGS) & RFLAGS_TF != 0 && !btf;
            when(
                e.blocked(BY_STI | BY_MOV_SS) || e.get(ACTIVITY) == HLT,
                (e.get(PENDING) & 1 << 14 != 0) == stepping,
            )
        },
    ),
    state("G119", &[BLOCKING, PENDING], |e| {
        let pending = e.get(PENDING);
        when(
            pending & 1 << 16 != 0,
            e.cpu.rtm && pending & 0xffff == 1 << 12 && !e.blocked(BY_MOV_SS),
        )
    }),
    // Link pointer.
    link("G120", &[LINK], |e| when(e.linked(), e.page(LINK))),
    link("G121", &[LINK], |e| {
        if !e.linked() {
            return Verdict::NotReached;
        }
        e.revision(e.get(LINK)).is_some().into()
    })
    .each_time(),
    link("G122", &[LINK, PROC1, PROC2], |e| {
        if !e.linked() {
            return Verdict::NotReached;
        }
        let shadow = e.memory.read_u32(e.get(LINK)).unwrap_or(!0) >> 31 != 0;
        (shadow == e.proc2(proc2::VMCS_SHADOWING)).into()
    })
    .each_time(),
    link("G123", &[LINK, ENTRY], |e| {
        when(
            e.linked() && !e.returns_from_smm(),
            e.get(LINK) != e.cpu.current_vmcs,
        )
    })
    .each_time(),
    link("G124", &[LINK, ENTRY, EXECUTIVE], |e| {
        when(
            e.linked() && e.returns_from_smm(),
            e.get(LINK) != e.get(EXECUTIVE),
        )
    })
    .each_time(),
    // PDPTEs.
    pdpte("G125", &pdpte_fields(0), |e| pdpte_valid(e, 0)),
    pdpte("G126", &pdpte_fields(1), |e| pdpte_valid(e, 1)),
    pdpte("G127", &pdpte_fields(2), |e| pdpte_valid(e, 2)),
    pdpte("G128", &pdpte_fields(3), |e| pdpte_valid(e, 3)),
];

const RFLAGS: Field = Field::GUEST_RFLAGS;
const ACTIVITY: Field = Field::GUEST_ACTIVITY_STATE;
const BLOCKING: Field = Field::GUEST_INTERRUPTIBILITY_INFO;
const PENDING: Field = Field::GUEST_PENDING_DBG_EXCEPTIONS;
const LINK: Field = Field::VMCS_LINK_POINTER;

const PDPTES: [Field; 4] = [
    Field::GUEST_PDPTR0,
    Field::GUEST_PDPTR1,
    Field::GUEST_PDPTR2,
    Field::GUEST_PDPTR3,
];
const fn pdpte_fields(index: usize) -> [Field; 7] {
    [
        PROC1,
        PROC2,
        ENTRY,
        Field::GUEST_CR0,
        Field::GUEST_CR3,
        Field::GUEST_CR4,
        PDPTES[index],
    ]
}

// Activity states.
const ACTIVE: u64 = 0;
const HLT: u64 = 1;
const SHUTDOWN: u64 = 2;
const WAIT_FOR_SIPI: u64 = 3;

// Interruptibility state.
const BY_STI: u64 = 1 << 0;
const BY_MOV_SS: u64 = 1 << 1;
const BY_SMI: u64 = 1 << 2;
const BY_NMI: u64 = 1 << 3;
const ENCLAVE: u64 = 1 << 4;

// Vectors.
const DB: u8 = 1;
const MC: u8 = 18;

/// The rule for an event that is injected into a processor in this activity state.
fn injected_into(e: &EntryCtx, state: u64, rule: impl FnOnce(Injection) -> bool) -> Verdict {
    match e.injection() {
        Some(event) if e.get(ACTIVITY) == state => rule(event).into(),
        _ => Verdict::NotReached,
    }
}

/// A present PDPTE has no reserved bit: 2:1, 8:5 and those beyond the physical width.
fn pdpte_valid(e: &EntryCtx, index: u8) -> Verdict {
    let pae = e.get(Field::GUEST_CR0) & CR0_PG != 0 && e.guest_cr4(CR4_PAE) && !e.guest64();
    if !pae {
        return Verdict::NotReached;
    }
    let pdpte = if e.ept() {
        e.get(PDPTES[usize::from(index)])
    } else {
        let cr3 = e.get(Field::GUEST_CR3);
        e.memory.pdpte(cr3, index).unwrap_or(!0)
    };
    (pdpte & 1 == 0 || pdpte & 0x1e6 == 0 && e.beyond_physical(pdpte) == 0).into()
}

impl EntryCtx<'_> {
    /// The guest will be in 64-bit mode, if it will be in protected mode.
    fn code64(&self) -> bool {
        self.guest64() && self.rights(CS) & L != 0
    }

    /// One of these kinds of blocking is set.
    fn blocked(&self, by: u64) -> bool {
        self.get(BLOCKING) & by != 0
    }

    /// There is a link pointer.
    fn linked(&self) -> bool {
        self.get(LINK) != !0
    }
}
