//! Which layout is a region of? For files: a processor goes by the revision identifier alone.
//!
//! A revision identifier does not always say (KVM had four layouts under one, and some take that of
//! the processor below), so the values are looked at: those of a VMCS that ran obey rules that bytes
//! from another place rarely do. Vol. 3C, "VM Entries" has most of the rules.

use alloc::vec::Vec;

use crate::control::{entry, exit, pin, proc1};
use crate::field::{Field, Width};
use crate::layout::{Layout, revision};
use crate::vmcs::Vmcs;

/// One layout that a region may be of.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// The layout.
    pub layout: &'a Layout,
    /// How well the values fit; higher is better. Only differences mean something.
    pub score: i32,
    /// Whether the layout has the region's revision identifier as its own, rather than taking any.
    pub by_revision: bool,
    /// Rules that values other than 0 obey.
    pub holds: u32,
    /// Rules that values break.
    pub broken: Vec<Evidence>,
    /// Bytes other than 0 that belong to no slot.
    pub stray: usize,
}

/// A value that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The field, as the candidate places it.
    pub field: Field,
    /// Its value.
    pub value: u64,
    /// The rule, in words.
    pub rule: &'static str,
}

/// What a layout's own revision identifier is worth, in rules.
const BY_REVISION: i32 = 12;
/// What a broken rule is worth, in rules that hold.
const BROKEN: i32 = 3;

/// The most that bytes without a slot count against a layout, in rules.
const STRAY: i32 = 8;

/// A rule for the value of a field in a VMCS that a processor could use.
struct Rule {
    words: &'static str,
    /// Whether 0 breaks it too.
    even_zero: bool,
    fields: fn(Field) -> bool,
    holds: fn(u64) -> bool,
}

const RULES: &[Rule] = &[
    Rule {
        words: "an address of a page",
        even_zero: false,
        fields: |field| {
            matches!(
                field,
                Field::IO_BITMAP_A
                    | Field::IO_BITMAP_B
                    | Field::MSR_BITMAP
                    | Field::VIRTUAL_APIC_PAGE_ADDR
                    | Field::APIC_ACCESS_ADDR
                    | Field::PML_ADDRESS
                    | Field::EPTP_LIST_ADDRESS
                    | Field::VMREAD_BITMAP
                    | Field::VMWRITE_BITMAP
            )
        },
        holds: |value| value & 0xFFF == 0 && physical(value),
    },
    Rule {
        words: "all ones, or an address of a page",
        even_zero: false,
        fields: |field| field == Field::VMCS_LINK_POINTER,
        holds: |value| value == u64::MAX || value & 0xFFF == 0 && physical(value),
    },
    Rule {
        words: "an address that is a multiple of 16",
        even_zero: false,
        fields: |field| {
            matches!(
                field,
                Field::VM_EXIT_MSR_STORE_ADDR
                    | Field::VM_EXIT_MSR_LOAD_ADDR
                    | Field::VM_ENTRY_MSR_LOAD_ADDR
            )
        },
        holds: |value| value & 15 == 0 && physical(value),
    },
    Rule {
        words: "a count of at most 512 MSRs",
        even_zero: false,
        fields: |field| {
            matches!(
                field,
                Field::VM_EXIT_MSR_STORE_COUNT
                    | Field::VM_EXIT_MSR_LOAD_COUNT
                    | Field::VM_ENTRY_MSR_LOAD_COUNT
            )
        },
        holds: |value| value <= 512,
    },
    Rule {
        words: "an EPT pointer: memory type 0 or 6, 4 or 5 levels, nothing reserved",
        even_zero: false,
        fields: |field| field == Field::EPT_POINTER,
        holds: |value| {
            matches!(value & 7, 0 | 6) && matches!(value >> 3 & 7, 3 | 4) && value & 0xF00 == 0
        },
    },
    Rule {
        words: "the pin-based controls that are always 1",
        even_zero: true,
        fields: |field| field == Field::PIN_BASED_VM_EXEC_CONTROL,
        holds: |value| value & 0x16 == 0x16 && value & !PIN == 0,
    },
    Rule {
        words: "the processor-based controls that are always 1",
        even_zero: true,
        fields: |field| field == Field::CPU_BASED_VM_EXEC_CONTROL,
        holds: |value| value & PROC1_ALWAYS == PROC1_ALWAYS,
    },
    Rule {
        words: "the VM-exit controls that are always 1",
        even_zero: true,
        fields: |field| field == Field::VM_EXIT_CONTROLS,
        holds: |value| value & EXIT_ALWAYS == EXIT_ALWAYS,
    },
    Rule {
        words: "the VM-entry controls that are always 1",
        even_zero: true,
        fields: |field| field == Field::VM_ENTRY_CONTROLS,
        holds: |value| value & ENTRY_ALWAYS == ENTRY_ALWAYS && value >> 27 == 0,
    },
    Rule {
        words: "protection, paging and numeric errors in CR0",
        even_zero: true,
        fields: |field| field == Field::HOST_CR0,
        holds: |value| value & 0x8000_0021 == 0x8000_0021 && value >> 32 == 0,
    },
    Rule {
        words: "VMXE in CR4, and nothing in its upper half",
        even_zero: true,
        fields: |field| field == Field::HOST_CR4,
        holds: |value| value & 0x2000 != 0 && value >> 32 & !1 == 0,
    },
    Rule {
        words: "numeric errors in CR0, and nothing in its upper half",
        even_zero: true,
        fields: |field| field == Field::GUEST_CR0,
        holds: |value| value & 0x20 != 0 && value >> 32 == 0,
    },
    Rule {
        words: "VMXE in CR4, and nothing in its upper half",
        even_zero: true,
        fields: |field| field == Field::GUEST_CR4,
        holds: |value| value & 0x2000 != 0 && value >> 32 & !1 == 0,
    },
    Rule {
        words: "RFLAGS: bit 1 is 1, reserved bits are 0",
        even_zero: true,
        fields: |field| field == Field::GUEST_RFLAGS,
        holds: |value| value & 2 != 0 && value & !0x3F_7FD7 == 0,
    },
    Rule {
        words: "bit 10 of DR7 is 1, the upper half is 0",
        even_zero: false,
        fields: |field| field == Field::GUEST_DR7,
        holds: |value| value & 0x400 != 0 && value >> 32 == 0,
    },
    Rule {
        words: "a canonical address",
        even_zero: false,
        fields: |field| {
            matches!(
                field,
                Field::GUEST_RIP
                    | Field::GUEST_FS_BASE
                    | Field::GUEST_GS_BASE
                    | Field::GUEST_TR_BASE
                    | Field::GUEST_GDTR_BASE
                    | Field::GUEST_IDTR_BASE
                    | Field::GUEST_SYSENTER_ESP
                    | Field::GUEST_SYSENTER_EIP
                    | Field::HOST_FS_BASE
                    | Field::HOST_GS_BASE
                    | Field::HOST_TR_BASE
                    | Field::HOST_GDTR_BASE
                    | Field::HOST_IDTR_BASE
                    | Field::HOST_IA32_SYSENTER_ESP
                    | Field::HOST_IA32_SYSENTER_EIP
                    | Field::HOST_RSP
            )
        },
        holds: canonical,
    },
    Rule {
        words: "the address of the hypervisor's code",
        even_zero: true,
        fields: |field| field == Field::HOST_RIP,
        holds: |value| value != 0 && canonical(value),
    },
    Rule {
        words: "a selector with RPL 0 in the GDT",
        even_zero: false,
        fields: |field| {
            matches!(
                field,
                Field::HOST_ES_SELECTOR
                    | Field::HOST_SS_SELECTOR
                    | Field::HOST_DS_SELECTOR
                    | Field::HOST_FS_SELECTOR
                    | Field::HOST_GS_SELECTOR
            )
        },
        holds: |value| value & 7 == 0,
    },
    Rule {
        words: "a selector with RPL 0 in the GDT, and not the null one",
        even_zero: true,
        fields: |field| matches!(field, Field::HOST_CS_SELECTOR | Field::HOST_TR_SELECTOR),
        holds: |value| value & 7 == 0 && value != 0,
    },
    Rule {
        words: "access rights without reserved bits",
        even_zero: false,
        fields: |field| {
            matches!(
                field,
                Field::GUEST_ES_AR_BYTES
                    | Field::GUEST_CS_AR_BYTES
                    | Field::GUEST_SS_AR_BYTES
                    | Field::GUEST_DS_AR_BYTES
                    | Field::GUEST_FS_AR_BYTES
                    | Field::GUEST_GS_AR_BYTES
                    | Field::GUEST_LDTR_AR_BYTES
                    | Field::GUEST_TR_AR_BYTES
            )
        },
        // Unusable, or of a type.
        holds: |value| value & !0x1_F0FF == 0 && (value & 0x1_0000 != 0 || value & 0x8F != 0),
    },
    Rule {
        words: "access rights of a present code segment",
        even_zero: true,
        fields: |field| field == Field::GUEST_CS_AR_BYTES,
        holds: |value| value & 0x90 == 0x90,
    },
    Rule {
        words: "access rights of a busy TSS",
        even_zero: true,
        fields: |field| field == Field::GUEST_TR_AR_BYTES,
        holds: |value| matches!(value & 0x9F, 0x83 | 0x8B),
    },
    Rule {
        words: "a limit of at most FFFFH",
        even_zero: false,
        fields: |field| matches!(field, Field::GUEST_GDTR_LIMIT | Field::GUEST_IDTR_LIMIT),
        holds: |value| value <= 0xFFFF,
    },
    Rule {
        words: "an activity state of 0 to 3",
        even_zero: false,
        fields: |field| field == Field::GUEST_ACTIVITY_STATE,
        holds: |value| value <= 3,
    },
    Rule {
        words: "interruptibility in bits 4:0",
        even_zero: false,
        fields: |field| field == Field::GUEST_INTERRUPTIBILITY_INFO,
        holds: |value| value < 32,
    },
    Rule {
        words: "pending debug exceptions without reserved bits",
        even_zero: false,
        fields: |field| field == Field::GUEST_PENDING_DBG_EXCEPTIONS,
        holds: |value| value & !0x1_D80F == 0,
    },
    Rule {
        words: "a PAT of memory types",
        even_zero: false,
        fields: |field| matches!(field, Field::GUEST_IA32_PAT | Field::HOST_IA32_PAT),
        holds: |value| {
            value
                .to_le_bytes()
                .iter()
                .all(|kind| matches!(kind, 0 | 1 | 4..=7))
        },
    },
    Rule {
        words: "EFER without reserved bits",
        even_zero: false,
        fields: |field| matches!(field, Field::GUEST_IA32_EFER | Field::HOST_IA32_EFER),
        holds: |value| value & !0xFD01 == 0,
    },
    Rule {
        words: "a basic exit reason",
        even_zero: false,
        fields: |field| field == Field::VM_EXIT_REASON,
        holds: |value| value & 0xFFFF < 96 && value >> 16 & 0x1FF == 0,
    },
    Rule {
        words: "an instruction of at most 15 bytes",
        even_zero: false,
        fields: |field| {
            matches!(
                field,
                Field::VM_EXIT_INSTRUCTION_LEN | Field::VM_ENTRY_INSTRUCTION_LEN
            )
        },
        holds: |value| value <= 15,
    },
    Rule {
        words: "an error number of a VMX instruction",
        even_zero: false,
        fields: |field| field == Field::VM_INSTRUCTION_ERROR,
        holds: |value| value <= 28,
    },
];

/// The pin-based controls that exist.
const PIN: u64 = 0x16
    | (pin::EXTERNAL_INTERRUPT_EXITING
        | pin::NMI_EXITING
        | pin::VIRTUAL_NMIS
        | pin::ACTIVATE_VMX_PREEMPTION_TIMER
        | pin::PROCESS_POSTED_INTERRUPTS) as u64;
/// The default1 class without what the TRUE capability MSRs free: CR3 accesses, debug controls.
const PROC1_ALWAYS: u64 =
    0x0401_E172 & !((proc1::CR3_LOAD_EXITING | proc1::CR3_STORE_EXITING) as u64);
const EXIT_ALWAYS: u64 = 0x3_6DFF & !(exit::SAVE_DEBUG_CONTROLS as u64);
const ENTRY_ALWAYS: u64 = 0x11FF & !(entry::LOAD_DEBUG_CONTROLS as u64);

fn canonical(value: u64) -> bool {
    // 57 bits: whatever the paging.
    ((value << 7) as i64 >> 7) as u64 == value
}

fn physical(value: u64) -> bool {
    value >> 52 == 0
}

/// The layouts that `region` may be of, the likeliest first: those that take its revision identifier
/// and fit into it. Equal scores stay in the order of `layouts`.
#[must_use]
pub fn identify<'a>(
    region: &[u8],
    layouts: impl IntoIterator<Item = &'a Layout>,
) -> Vec<Candidate<'a>> {
    let mut candidates: Vec<Candidate> = layouts
        .into_iter()
        .filter_map(|layout| candidate(region, layout))
        .collect();
    candidates.sort_by_key(|candidate| -candidate.score);
    candidates
}

fn candidate<'a>(region: &[u8], layout: &'a Layout) -> Option<Candidate<'a>> {
    let vmcs = layout.read(region).ok()?;
    let (id, _) = revision(region)?;
    let by_revision = layout.revisions().contains(&id);
    let mut candidate = Candidate {
        layout,
        score: if by_revision { BY_REVISION } else { 0 },
        by_revision,
        holds: 0,
        broken: Vec::new(),
        stray: stray(region, layout),
    };
    for slot in layout.slots() {
        rules(&vmcs, slot.field, &mut candidate);
        let value = slot.load(region);
        if value & !slot.field.mask() != 0 {
            candidate.broken.push(Evidence {
                field: slot.field,
                value,
                rule: match slot.field.width() {
                    Width::Bits16 => "16 bits in a wider slot",
                    _ => "32 bits in a wider slot",
                },
            });
        }
    }
    let broken = i32::try_from(candidate.broken.len()).unwrap_or(i32::MAX / BROKEN);
    let holds = i32::try_from(candidate.holds).unwrap_or(i32::MAX);
    let stray = i32::try_from(candidate.stray)
        .unwrap_or(i32::MAX)
        .min(STRAY);
    candidate.score += holds - BROKEN * broken - stray;
    Some(candidate)
}

/// Bytes behind the header that are not 0 and in no slot.
fn stray(region: &[u8], layout: &Layout) -> usize {
    let mut rest = region.to_vec();
    let mut clear = |offset: u16, width: u8| {
        let start = usize::from(offset);
        if let Some(bytes) = rest.get_mut(start..start + usize::from(width)) {
            bytes.fill(0);
        }
    };
    clear(0, 8);
    if let Some(launch) = layout.launch_state() {
        clear(launch.offset, launch.width);
    }
    for slot in layout.slots() {
        clear(slot.offset, slot.width);
    }
    rest.iter().filter(|&&byte| byte != 0).count()
}

fn rules(vmcs: &Vmcs, field: Field, candidate: &mut Candidate) {
    let value = vmcs.get(field);
    for rule in RULES.iter().filter(|rule| (rule.fields)(field)) {
        if value == 0 && !rule.even_zero {
            continue;
        }
        if (rule.holds)(value) {
            candidate.holds += 1;
        } else {
            candidate.broken.push(Evidence {
                field,
                value,
                rule: rule.words,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::tests::long_mode;
    use crate::testing::Random;
    use alloc::vec;

    fn every() -> impl Iterator<Item = &'static Layout> {
        Layout::built_in().iter().copied()
    }

    /// A region that a machine wrote for a 64-bit guest, with a few values that vary.
    fn plausible(random: &mut Random, layout: &Layout) -> Vec<u8> {
        let mut vmcs = long_mode().vmcs;
        vmcs.set(Field::GUEST_RIP, random.next() >> 17);
        vmcs.set(Field::GUEST_RSP, random.next());
        vmcs.set(Field::GUEST_CR3, random.next() >> 20 & !0xFFF);
        vmcs.set(Field::TSC_OFFSET, random.next());
        vmcs.set(Field::VM_EXIT_REASON, random.below(60));
        vmcs.set(Field::EXIT_QUALIFICATION, random.next());
        vmcs.set(Field::GUEST_PML_INDEX, 511);
        let mut region = vec![0; 4096];
        let id = match layout.revision() {
            0 => 0x1A,
            id => id,
        };
        layout
            .with_revision(id)
            .unwrap()
            .write(&vmcs, &mut region)
            .unwrap();
        region
    }

    #[test]
    fn a_region_is_of_the_layout_that_it_was_written_in() {
        let mut random = Random::new(3);
        for layout in every() {
            for _ in 0..50 {
                let region = plausible(&mut random, layout);
                let found = identify(&region, every());
                let own = found.iter().find(|c| c.layout == layout).unwrap();
                assert_eq!(own.broken, [], "{}", layout.name());
                assert_eq!((own.stray, own.score), (0, found[0].score));
                // Today's layout has a slot more than the one of 4.0, and nothing else moved: where
                // that is 0 nobody can tell.
                if layout.name() != "kvm-4.0" {
                    assert_eq!(found[0].layout.name(), layout.name());
                    let tie = found[1].score == found[0].score;
                    assert!(!tie, "{} {}", layout.name(), found[1].layout.name());
                }
            }
        }
    }

    #[test]
    fn another_layout_of_the_same_revision_has_evidence_against_it() {
        let region = plausible(&mut Random::new(5), Layout::named("kvm-3.10").unwrap());
        let found = identify(&region, every());
        assert!(found.iter().filter(|c| c.by_revision).count() == 4);
        let today = found.iter().find(|c| c.layout.name() == "kvm").unwrap();
        assert!(!today.broken.is_empty() && today.by_revision);
    }

    #[test]
    fn rules_hold_for_what_a_processor_would_enter() {
        let vmcs = long_mode().vmcs;
        for field in Field::ALL {
            for rule in RULES.iter().filter(|rule| (rule.fields)(field)) {
                let value = vmcs.get(field);
                let fine = value == 0 && !rule.even_zero || (rule.holds)(value);
                assert!(fine, "{field:?} {value:#x}: {}", rule.words);
            }
        }
        for rule in RULES {
            assert!(Field::ALL.into_iter().any(rule.fields), "{}", rule.words);
            assert!(!(rule.holds)(0xDEAD_BEEF_DEAD_BEEF), "{}", rule.words);
        }
    }

    #[test]
    fn any_bytes_have_an_answer() {
        let mut random = Random::new(11);
        for len in [0, 3, 4, 900, 998, 4096] {
            let region: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            // Without a revision that anybody knows, those that take any are left.
            for found in identify(&region, every()) {
                assert!(!found.by_revision && found.layout.used() <= len);
            }
        }
    }
}
