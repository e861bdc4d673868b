//! Valid worlds, and one way to break each rule.

mod cases;
mod sweeps;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::Cell;

use super::*;
use crate::testing::Random;
use cases::{ALLOWED, CASES};

/// An entry that can be changed at will.
#[derive(Clone)]
pub struct World {
    pub vmcs: Vmcs,
    pub caps: Caps,
    pub cpu: CpuFacts,
    pub memory: Memory,
}

#[derive(Clone)]
pub struct Memory {
    pub words: BTreeMap<u64, u64>,
    pub executive: Option<Vmcs>,
    reads: Cell<u32>,
}

const REVISION: u32 = 0x4e50_4e01;

// Where things are in physical memory.
pub const VMXON: u64 = 0x4000;
pub const CURRENT: u64 = 0x5000;
pub const VIRTUAL_APIC: u64 = 0x6000;
pub const SHADOW: u64 = 0x7000;
pub const EXECUTIVE_VMCS: u64 = 0x8000;
pub const ORDINARY: u64 = 0x9000;
pub const PDPT: u64 = 0xa000;

impl PeekMemory for Memory {
    fn read_u32(&self, gpa: u64) -> Option<u32> {
        let shift = 8 * (gpa & 4);
        self.read_u64(gpa & !7).map(|word| (word >> shift) as u32)
    }

    fn read_u64(&self, gpa: u64) -> Option<u64> {
        self.reads.set(self.reads.get() + 1);
        self.words.get(&gpa).copied()
    }

    fn accepts_revision(&self, revision: u32) -> bool {
        revision == REVISION
    }

    fn vmcs_at(&self, gpa: u64) -> Option<&Vmcs> {
        self.reads.set(self.reads.get() + 1);
        self.executive.as_ref().filter(|_| gpa == EXECUTIVE_VMCS)
    }
}

impl World {
    pub fn entry(&self) -> EntryCtx<'_> {
        EntryCtx {
            vmcs: &self.vmcs,
            caps: &self.caps,
            cpu: self.cpu,
            memory: &self.memory,
        }
    }

    pub fn set(&mut self, field: Field, value: u64) -> &mut Self {
        self.vmcs.set(field, value);
        self
    }

    pub fn on(&mut self, field: Field, bits: impl Into<u64>) -> &mut Self {
        self.set(field, self.vmcs.get(field) | bits.into())
    }

    pub fn off(&mut self, field: Field, bits: impl Into<u64>) -> &mut Self {
        self.set(field, self.vmcs.get(field) & !bits.into())
    }

    /// Secondary controls, activated.
    pub fn proc2(&mut self, bits: u32) -> &mut Self {
        self.on(PROC1, proc1::ACTIVATE_SECONDARY_CONTROLS)
            .on(PROC2, bits)
    }

    /// Tertiary controls, activated.
    pub fn proc3(&mut self, bits: u64) -> &mut Self {
        self.on(PROC1, proc1::ACTIVATE_TERTIARY_CONTROLS)
            .on(PROC3, bits)
    }

    /// Secondary VM-exit controls, activated.
    pub fn exit2(&mut self, bits: u64) -> &mut Self {
        self.on(EXIT, exit::ACTIVATE_SECONDARY_CONTROLS)
            .on(EXIT2, bits)
    }

    /// An event to inject: type and vector, and the other bits of the field.
    pub fn inject(&mut self, kind: u8, vector: u8, more: u32) -> &mut Self {
        let info = 1 << 31 | more | u32::from(kind) << 8 | u32::from(vector);
        self.set(INJECTION, info.into())
    }

    pub fn link(&mut self, pointer: u64) -> &mut Self {
        self.set(Field::VMCS_LINK_POINTER, pointer)
    }

    fn selectors(&mut self, from: Field, values: &[u64]) -> &mut Self {
        // ES, CS, SS, DS, FS, GS have neighbouring encodings in every column of the table.
        for (index, value) in values.iter().enumerate() {
            let encoding = from.encoding() + 2 * index as u32;
            self.set(Field::from_encoding(encoding).unwrap().0, *value);
        }
        self
    }
}

/// 64-bit host, 64-bit guest, EPT, everything that can be offered.
pub fn long_mode() -> World {
    let caps = everything();
    let cpu = CpuFacts {
        physical_bits: 46,
        linear_bits: 48,
        efer: 0xd01,
        debugctl: 0x1_ffc3 & !(1 << 13),
        perf_global_ctrl: 0x7_0000_00ff,
        rtit_ctl: 0xffff_0000_0fff_ffff,
        lbr_ctl: 0x7f_000f,
        spec_ctrl: 7,
        lam: false,
        sgx: true,
        rtm: true,
        bus_lock_debug: true,
        fred: true,
        long_mode: true,
        smm: false,
        seam: false,
        tracing: false,
        current_vmcs: CURRENT,
        vmxon: VMXON,
    };
    let revision = u64::from(REVISION);
    let memory = Memory {
        words: BTreeMap::from([
            (VIRTUAL_APIC + 0x80, 0x50),
            (SHADOW, revision | 1 << 31),
            (EXECUTIVE_VMCS, revision),
            (ORDINARY, revision),
            (VMXON, revision),
            (CURRENT, revision),
            (PDPT, 0xb001),
            (PDPT + 8, 0),
            (PDPT + 16, 0xc001),
            (PDPT + 24, 0xd001),
        ]),
        executive: None,
        reads: Cell::new(0),
    };
    let mut w = World {
        vmcs: Vmcs::default(),
        caps,
        cpu,
        memory,
    };
    // Controls.
    w.set(PIN, 0x16)
        .on(PIN, pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING)
        .set(PROC1, 0x0401_e172)
        .on(PROC1, proc1::HLT_EXITING)
        .proc2(proc2::ENABLE_EPT | proc2::ENABLE_VPID)
        .set(Field::VIRTUAL_PROCESSOR_ID, 1)
        .set(Field::EPT_POINTER, 0x3000 | 3 << 3 | 6)
        .set(Field::VIRTUAL_APIC_PAGE_ADDR, VIRTUAL_APIC)
        .set(Field::APIC_ACCESS_ADDR, 0xfee0_0000)
        .set(EXIT, 0x0003_6dff)
        .on(EXIT, exit::HOST_ADDRESS_SPACE_SIZE)
        .on(EXIT, exit::LOAD_IA32_EFER | exit::LOAD_IA32_PAT)
        .set(ENTRY, 0x11ff)
        .on(ENTRY, entry::IA_32E_MODE_GUEST)
        .on(ENTRY, entry::LOAD_IA32_EFER | entry::LOAD_IA32_PAT);
    // Host.
    w.set(Field::HOST_CR0, 0x8005_0033)
        .set(Field::HOST_CR3, 0x2000)
        .set(Field::HOST_CR4, 0x2020)
        .set(Field::HOST_IA32_EFER, 0x500)
        .set(Field::HOST_IA32_PAT, 0x0007_0406_0007_0406)
        .selectors(Field::HOST_ES_SELECTOR, &[0, 8, 0, 0, 0, 0, 0x40])
        .set(Field::HOST_FS_BASE, 0xffff_8000_0000_1000)
        .set(Field::HOST_RIP, 0xffff_8000_0000_2000);
    // Guest.
    w.set(Field::GUEST_CR0, 0x8005_0033)
        .set(Field::GUEST_CR3, 0x1000)
        .set(Field::GUEST_CR4, 0x2020)
        .set(Field::GUEST_DR7, 0x400)
        .set(Field::GUEST_IA32_EFER, 0x500)
        .set(Field::GUEST_IA32_PAT, 0x0007_0406_0007_0406)
        .selectors(Field::GUEST_ES_SELECTOR, &[0x10, 8, 0x10, 0x10, 0, 0])
        .selectors(Field::GUEST_ES_LIMIT, &[0xffff_ffff; 6])
        .selectors(
            Field::GUEST_ES_AR_BYTES,
            &[0xc093, 0xa09b, 0xc093, 0xc093, 0xc093, 0xc093],
        )
        .set(Field::GUEST_TR_SELECTOR, 0x40)
        .set(Field::GUEST_TR_LIMIT, 0x67)
        .set(Field::GUEST_TR_AR_BYTES, 0x8b)
        .set(Field::GUEST_LDTR_AR_BYTES, 0x1_0000)
        .set(Field::GUEST_GDTR_LIMIT, 0x7f)
        .set(Field::GUEST_IDTR_LIMIT, 0xfff)
        .set(Field::GUEST_RIP, 0xffff_8000_0000_3000)
        .set(Field::GUEST_RFLAGS, 0x202)
        .link(!0);
    w
}

/// As [`long_mode`], an unrestricted guest.
pub fn unrestricted() -> World {
    let mut w = long_mode();
    w.proc2(proc2::UNRESTRICTED_GUEST);
    w
}

/// As [`long_mode`], with the guest's own paging only.
pub fn no_ept() -> World {
    let mut w = long_mode();
    w.off(PROC2, proc2::ENABLE_EPT);
    w
}

/// 32-bit guest with 32-bit paging.
pub fn protected_mode() -> World {
    let mut w = long_mode();
    w.off(ENTRY, entry::IA_32E_MODE_GUEST)
        .set(Field::GUEST_IA32_EFER, 0)
        .set(Field::GUEST_CR4, 0x2000)
        .set(Field::GUEST_CS_AR_BYTES, 0xc09b)
        .set(Field::GUEST_RIP, 0x3000);
    w
}

/// 32-bit guest with PAE paging under EPT.
pub fn pae() -> World {
    let mut w = protected_mode();
    w.set(Field::GUEST_CR4, 0x2020)
        .set(Field::GUEST_PDPTR0, 0xb001)
        .set(Field::GUEST_PDPTR2, 0xc001);
    w
}

/// 32-bit guest with PAE paging and without EPT.
pub fn pae_memory() -> World {
    let mut w = pae();
    w.off(PROC2, proc2::ENABLE_EPT).set(Field::GUEST_CR3, PDPT);
    w
}

/// Virtual-8086 guest.
pub fn v8086() -> World {
    let mut w = protected_mode();
    w.on(Field::GUEST_RFLAGS, RFLAGS_VM)
        .selectors(Field::GUEST_ES_SELECTOR, &[0x1230; 6])
        .selectors(Field::GUEST_ES_BASE, &[0x1_2300; 6])
        .selectors(Field::GUEST_ES_LIMIT, &[0xffff; 6])
        .selectors(Field::GUEST_ES_AR_BYTES, &[0xf3; 6]);
    w
}

/// Virtual-8086 guest, unrestricted.
pub fn v8086_unrestricted() -> World {
    let mut w = v8086();
    w.proc2(proc2::UNRESTRICTED_GUEST);
    w
}

/// Real-mode guest, unrestricted.
pub fn real_mode() -> World {
    let mut w = protected_mode();
    w.proc2(proc2::UNRESTRICTED_GUEST)
        .set(Field::GUEST_CR0, 0x30)
        .selectors(Field::GUEST_ES_SELECTOR, &[0x1230; 6])
        .selectors(Field::GUEST_ES_BASE, &[0x1_2300; 6])
        .selectors(Field::GUEST_ES_LIMIT, &[0xffff; 6])
        .selectors(Field::GUEST_ES_AR_BYTES, &[0x93; 6]);
    w
}

/// 32-bit host and guest.
pub fn host32() -> World {
    let mut w = protected_mode();
    w.cpu.long_mode = false;
    w.off(EXIT, exit::HOST_ADDRESS_SPACE_SIZE)
        .set(Field::HOST_IA32_EFER, 0)
        .set(Field::HOST_SS_SELECTOR, 0x10)
        .set(Field::HOST_FS_BASE, 0x1000)
        .set(Field::HOST_RIP, 0x2000);
    w
}

/// As [`long_mode`], from SMM back into a guest.
pub fn return_from_smm() -> World {
    let mut w = long_mode();
    let mut executive = w.vmcs.clone();
    executive.launched = true;
    w.cpu.smm = true;
    w.memory.executive = Some(executive);
    w.set(Field::EXEC_VMCS_POINTER, EXECUTIVE_VMCS);
    w
}

/// As [`long_mode`], from SMM back into VMX root operation.
pub fn return_to_root() -> World {
    let mut w = return_from_smm();
    w.set(Field::EXEC_VMCS_POINTER, VMXON);
    w
}

/// As [`long_mode`], in SMM and to a guest in SMM.
pub fn enter_smm() -> World {
    let mut w = long_mode();
    w.cpu.smm = true;
    w.on(ENTRY, entry::ENTRY_TO_SMM)
        .on(Field::GUEST_INTERRUPTIBILITY_INFO, 4u32);
    w
}

/// As [`long_mode`], with all state loaded that can be.
pub fn all_state() -> World {
    let mut w = long_mode();
    load_all(&mut w);
    w.set(Field::GUEST_PENDING_DBG_EXCEPTIONS, 1 << 16 | 1 << 12);
    w
}

/// As [`long_mode`], in SEAM operation.
pub fn seam() -> World {
    let mut w = long_mode();
    w.cpu.seam = true;
    w.set(Field::SHARED_EPT_POINTER, 0x1000);
    w
}

/// As [`host32`], with all state loaded that can be.
pub fn all_state32() -> World {
    let mut w = host32();
    load_all(&mut w);
    w
}

fn load_all(w: &mut World) {
    let loads = exit::LOAD_IA32_PERF_GLOBAL_CTRL | exit::LOAD_CET_STATE | exit::LOAD_PKRS;
    w.on(EXIT, loads)
        .exit2(exit2::LOAD_IA32_FRED_STATE | exit2::LOAD_IA32_SPEC_CTRL);
    w.on(
        ENTRY,
        entry::LOAD_IA32_PERF_GLOBAL_CTRL | entry::LOAD_IA32_BNDCFGS,
    )
    .on(ENTRY, entry::LOAD_IA32_RTIT_CTL | entry::LOAD_UINV)
    .on(ENTRY, entry::LOAD_CET_STATE | entry::LOAD_PKRS)
    .on(ENTRY, entry::LOAD_GUEST_IA32_LBR_CTL)
    .on(ENTRY, entry::LOAD_IA32_FRED_STATE)
    .on(ENTRY, entry::LOAD_GUEST_IA32_SPEC_CTRL);
}

/// As [`real_mode`], injecting an exception the way a processor wants it that knows which have
/// error codes.
pub fn real_mode_exception() -> World {
    let mut w = real_mode();
    w.caps.basic &= !(1 << 56);
    w.inject(event::HARDWARE_EXCEPTION, 13, 0);
    w
}

type Base = fn() -> World;

const VALID: [(&str, Base); 17] = [
    ("long mode", long_mode),
    ("SEAM", seam),
    ("all state", all_state),
    ("all state, 32-bit host", all_state32),
    ("real-mode exception", real_mode_exception),
    ("unrestricted", unrestricted),
    ("no EPT", no_ept),
    ("protected mode", protected_mode),
    ("PAE", pae),
    ("PAE from memory", pae_memory),
    ("v8086", v8086),
    ("v8086 unrestricted", v8086_unrestricted),
    ("real mode", real_mode),
    ("32-bit host", host32),
    ("return from SMM", return_from_smm),
    ("return to root", return_to_root),
    ("enter SMM", enter_smm),
];

fn first_to_fail(entry: &EntryCtx) -> Option<&'static EntryCheck> {
    check_controls(entry)
        .and_then(|()| check_host(entry))
        .and_then(|()| check_guest(entry))
        .err()
}

#[test]
fn valid_worlds_pass() {
    for (name, world) in VALID {
        let w = world();
        let failed = first_to_fail(&w.entry()).map(|row| explain(row, &w.entry()));
        assert_eq!(failed, None, "{name}");
    }
}

#[test]
fn each_row_can_be_the_first_to_fail() {
    for case in CASES {
        let w = case.world();
        let row = by_id(case.id).expect(case.id);
        if row.failure == Failure::Unchecked {
            assert_eq!(row.verdict(&w.entry()), Verdict::Fails, "{}", case.id);
            assert!(first_to_fail(&w.entry()).is_none(), "{}", case.id);
            continue;
        }
        let failed = first_to_fail(&w.entry());
        let text = failed.map(|row| explain(row, &w.entry()));
        assert_eq!(failed.map(|row| row.id), Some(case.id), "{text:?}");
    }
}

#[test]
fn what_is_close_passes() {
    for case in ALLOWED {
        let w = case.world();
        let failed = first_to_fail(&w.entry()).map(|row| explain(row, &w.entry()));
        assert_eq!(failed, None, "{}", case.id);
    }
}

/// What the `reach` column speaks of: everything but SMM, SGX, PT, CET, FRED, HLAT, PEBS, LBR,
/// PASID translation, SEAM, UINTR, RTM and PERF_GLOBAL_CTRL. The guest has the rest of the world.
fn full_profile(w: &mut World) {
    let exits = exit::LOAD_IA32_PERF_GLOBAL_CTRL
        | exit::SAVE_IA32_PERF_GLOBAL_CTRL
        | exit::CLEAR_IA32_RTIT_CTL
        | exit::CLEAR_IA32_LBR_CTL
        | exit::CLEAR_UINV
        | exit::LOAD_CET_STATE;
    let entries = entry::ENTRY_TO_SMM
        | entry::DEACTIVATE_DUAL_MONITOR_TREATMENT
        | entry::LOAD_IA32_PERF_GLOBAL_CTRL
        | entry::LOAD_IA32_RTIT_CTL
        | entry::LOAD_UINV
        | entry::LOAD_CET_STATE
        | entry::LOAD_GUEST_IA32_LBR_CTL
        | entry::LOAD_IA32_FRED_STATE
        | entry::ALLOW_SEAM_GUEST_TELEMETRY;
    let proc2s = proc2::INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES
        | proc2::CONCEAL_VMX_FROM_PT
        | proc2::PASID_TRANSLATION
        | proc2::ENABLE_ENCLS_EXITING
        | proc2::ENABLE_ENCLV_EXITING;
    let mut caps = everything();
    caps.basic &= !(1 << 56 | 1 << 58);
    caps.true_exit &= !(u64::from(exits) << 32);
    caps.true_entry &= !(u64::from(entries) << 32);
    caps.proc2 &= !(u64::from(proc2s) << 32);
    caps.proc3 &= !(proc3::ENABLE_HLAT
        | proc3::EPT_PAGING_WRITE_CONTROL
        | proc3::GUEST_PAGING_VERIFICATION
        | proc3::SEAM_GUEST_PHYSICAL_ADDRESS_WIDTH
        | proc3::PEBS_USES_GUEST_PHYSICAL_ADDRESSES);
    caps.exit2 = exit2::LOAD_IA32_SPEC_CTRL;
    caps.cr4_fixed1 &= !(CR4_CET | CR4_FRED);
    caps.ept_vpid &= !(1 << 23);
    w.caps = caps;
    w.cpu.smm = false;
    w.cpu.seam = false;
    w.cpu.tracing = false;
    w.cpu.sgx = false;
    w.cpu.rtm = false;
    w.cpu.bus_lock_debug = false;
    w.cpu.fred = false;
}

#[test]
fn reach_is_what_a_guest_can_reach() {
    let mut reached = BTreeSet::new();
    for case in CASES {
        let mut w = case.world();
        full_profile(&mut w);
        if first_to_fail(&w.entry()).is_some_and(|row| row.id == case.id) {
            reached.insert(case.id);
        }
    }
    for row in CHECK_ROWS {
        assert!(!row.reach.is_empty(), "{}", row.id);
        if by_id(row.id).is_some() {
            assert_eq!(row.reach == "max", reached.contains(row.id), "{}", row.id);
        }
    }
}

#[test]
fn every_row_has_a_check_and_a_case() {
    let stages = [Stage::Controls, Stage::Host, Stage::Guest];
    let rows: Vec<&str> = CHECK_ROWS
        .iter()
        .filter(|row| stages.contains(&row.stage))
        .map(|row| row.id)
        .collect();
    let checks: Vec<&str> = all().map(|row| row.id).collect();
    assert_eq!(rows, checks, "same rows, same order");
    let cases: BTreeSet<&str> = CASES.iter().map(|case| case.id).collect();
    assert_eq!(rows.iter().copied().collect::<BTreeSet<_>>(), cases);
}

#[test]
fn failures_are_those_of_the_table() {
    for row in CHECK_ROWS {
        let Some(check) = by_id(row.id) else { continue };
        let text: String = match check.failure {
            Failure::VmfailValid(error) => alloc::format!("VMfailValid {error}"),
            Failure::Exit33 { qualification } => {
                alloc::format!("exit 33 qualification {qualification}")
            }
            Failure::Unchecked => "none".to_string(),
            other => panic!("{}: {other:?}", row.id),
        };
        assert_eq!(row.failure, text, "{}", row.id);
    }
}

/// A row must not read a field that it does not list: the rest of the VMCS is noise to it.
#[test]
fn rows_read_no_other_field() {
    for case in CASES {
        let row = by_id(case.id).unwrap();
        for noise in [0, !0, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa] {
            let mut w = case.world();
            for field in Field::ALL
                .into_iter()
                .filter(|field| !row.fields.contains(field))
            {
                w.vmcs.set(field, noise);
            }
            // Whether an entry returns from SMM is asked of rows that do not ask for it.
            w.set(ENTRY, case.world().vmcs.get(ENTRY));
            let verdict = (row.check)(&w.entry());
            assert_eq!(verdict, Verdict::Fails, "{} with {noise:#x}", case.id);
        }
    }
}

/// A listed field is one that the row reads: some change of it alone changes the verdict, in a case
/// of the row, in one of the valid worlds, or where every field is ones.
#[test]
fn rows_list_no_idle_field() {
    let values = |old: u64| {
        let bits = (0..64).map(move |bit| old ^ 1 << bit);
        bits.chain([0, !0, 1, 0xf3, 0xb001, VMXON, VIRTUAL_APIC])
    };
    let mut idle = Vec::new();
    for row in all() {
        let valid = VALID.iter().map(|(_, world)| world());
        let broken = CASES.iter().filter(|case| case.id == row.id);
        let mut worlds: Vec<World> = valid.chain(broken.map(|case| case.world())).collect();
        let mut ones = long_mode();
        for field in Field::ALL {
            ones.set(field, !0);
        }
        worlds.push(ones);
        for &field in row.fields {
            let read = worlds.iter_mut().any(|w| {
                let old = w.vmcs.get(field);
                let before = row.verdict(&w.entry());
                let read = values(old).any(|value| {
                    w.set(field, value);
                    row.verdict(&w.entry()) != before
                });
                w.set(field, old);
                read
            });
            if !read {
                idle.push((row.id, field.short_name()));
            }
        }
    }
    assert_eq!(idle, []);
}

/// Rows that look at memory or at the processor's state are marked `always`, and no others.
#[test]
fn always_marks_what_can_change_by_itself() {
    let states: [fn(&mut CpuFacts); 6] = [
        |cpu| cpu.long_mode = !cpu.long_mode,
        |cpu| cpu.smm = !cpu.smm,
        |cpu| cpu.seam = !cpu.seam,
        |cpu| cpu.tracing = !cpu.tracing,
        |cpu| cpu.current_vmcs = SHADOW,
        |cpu| cpu.vmxon = EXECUTIVE_VMCS,
    ];
    let mut by_itself = BTreeSet::new();
    for case in CASES {
        let check = by_id(case.id).unwrap().check;
        let w = case.world();
        w.memory.reads.set(0);
        let before = check(&w.entry());
        let changes = states.iter().any(|change| {
            let mut w = w.clone();
            change(&mut w.cpu);
            check(&w.entry()) != before
        });
        if changes || w.memory.reads.get() != 0 {
            by_itself.insert(case.id);
        }
    }
    let marked = all().filter(|row| row.always).map(|row| row.id).collect();
    assert_eq!(by_itself, marked);
}

#[test]
fn dirty_sections_find_what_a_full_walk_finds() {
    for case in CASES {
        let row = by_id(case.id).unwrap();
        if row.failure == Failure::Unchecked {
            continue;
        }
        for field in row.fields {
            let mut w = case.world();
            w.vmcs.dirty = 0;
            w.set(*field, w.vmcs.get(*field));
            let found = check_dirty(&w.entry()).map_err(|row| row.id);
            assert_eq!(found, Err(case.id), "{field:?}");
        }
        if row.always {
            let found = recheck_always(&case.world().entry()).map_err(|row| row.id);
            assert_eq!(found, Err(case.id));
        }
    }
}

#[test]
fn explanation_has_condition_citation_and_values() {
    let mut w = long_mode();
    w.on(PIN, pin::VIRTUAL_NMIS).off(PIN, pin::NMI_EXITING);
    let text = explain(by_id("C014").unwrap(), &w.entry());
    assert_eq!(
        text,
        "C014 NMI exiting is 1 (when pin.5=1): VMfailValid 7. SDM Vol. 3C, \"VM-Execution Control \
         Fields\" (checks). PIN_BASED_VM_EXEC_CONTROL=0x37"
    );
}

/// The cases use the constants of the rows, so these are held against numbers.
#[test]
fn constants_are_those_of_the_manual() {
    let cr0 = [CR0_PE, CR0_WP, CR0_NW, CR0_CD, CR0_PG];
    assert_eq!(cr0, [1, 0x1_0000, 0x2000_0000, 0x4000_0000, 0x8000_0000]);
    let cr4 = [CR4_PAE, CR4_PCIDE, CR4_CET, CR4_FRED];
    assert_eq!(cr4, [0x20, 0x2_0000, 0x80_0000, 0x1_0000_0000]);
    assert_eq!([EFER_LME, EFER_LMA], [0x100, 0x400]);
    let rflags = [RFLAGS_TF, RFLAGS_IF, RFLAGS_IOPL, RFLAGS_VM];
    assert_eq!(rflags, [0x100, 0x200, 0x3000, 0x2_0000]);
}

#[test]
fn no_vmcs_is_too_odd() {
    let mut random = Random::new(1);
    for (_, world) in VALID {
        for _ in 0..20 {
            let mut w = world();
            w.vmcs = random.vmcs();
            // As often valid as not, so that rows behind a condition are reached.
            for field in [PIN, PROC1, PROC2, PROC3, EXIT, EXIT2, ENTRY] {
                if random.below(2) != 0 {
                    w.set(field, world().vmcs.get(field));
                }
            }
            for row in all() {
                explain(row, &w.entry());
                (row.check)(&w.entry());
            }
        }
    }
}

#[test]
fn nothing_answers_reads_as_ones() {
    let mut w = long_mode();
    w.link(0x10_0000);
    assert_eq!(first_to_fail(&w.entry()).unwrap().id, "G121");
    let mut w = long_mode();
    w.on(PROC1, proc1::USE_TPR_SHADOW)
        .set(Field::VIRTUAL_APIC_PAGE_ADDR, 0x10_0000)
        .set(Field::TPR_THRESHOLD, 0xf);
    assert!(first_to_fail(&w.entry()).is_none());
}

/// Every control and every processor feature that any row knows.
fn everything() -> Caps {
    Caps {
        basic: u64::from(REVISION) | 0x1000 << 32 | 1 << 54 | 1 << 55 | 1 << 56 | 1 << 58,
        misc: 0x6004_01e5,
        cr0_fixed0: 0x8000_0021,
        cr0_fixed1: 0xffff_ffff,
        cr4_fixed0: 0x2000,
        cr4_fixed1: 0x1_1fff_ffff,
        ept_vpid: 0xf01_06f3_41c1,
        vmfunc: 1,
        proc2: 0xdfff_ffff_0000_0000, // one bit is left that cannot be set
        proc3: 0x13ff,
        exit2: 0xf,
        true_pin: 0xffff_ffff_0000_0016,
        true_proc1: 0xffff_ffff_0400_6172,
        true_exit: 0xffff_ffff_0003_6dfb,
        true_entry: 0xffff_ffff_0000_11fb,
        ..Caps::default()
    }
}
