//! Wild hypervisors: any bytes become a VMCS, extended page tables, MSR lists, bitmaps and a guest's code. A
//! small hypervisor enters what comes of them, answers each exit by changing another field, and ends in wild code of its own.
//!
//! As with [`crate::wild`], the processor may do what it likes but panic, hang, or let the length of its blocks show.

use std::sync::{Arc, LazyLock};

use hypernest_cpu::{
    Model, Processor, Ram, SegmentState, TableState, Tick, VcpuState, VmxChoice, VmxProfile,
};
use hypernest_vmcs::{Field, GuestSegment, NestedState, entry, exit, pin, proc1, proc2};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, eax, ecx, edx, qword_ptr, r8, r9, r10, rax, rsi};

use crate::wild::{
    CODE, DATA, Ending, GDT, Guest, IDT, LONG_TABLES, PAE_TABLES, Source, Start, TSS, put,
    run_twice,
};

const RAM_SIZE: u64 = 0x8_0000;
const VMXON: u64 = 0x4_0000;
const VMCS: u64 = 0x4_1000;
/// Another region, for the hypervisor's wild end.
const SPARE: u64 = 0x4_2000;
/// Four levels, a page each.
const EPT: u64 = 0x5_0000;
const IO_BITMAPS: u64 = 0x5_4000;
const MSR_BITMAP: u64 = 0x5_6000;
/// What a VMCS's other pointers lead to, unless they are wild.
const PAGES: u64 = 0x5_7000;
const MSR_LIST: u64 = 0x5_c000;
const LAUNCHER: u64 = 0x6_0000;
const HANDLER: u64 = 0x6_0800;
const POINTERS: u64 = 0x6_1000;
const CURSOR: u64 = POINTERS + 16;
/// Fields to write before the first entry.
const TABLE: u64 = 0x6_2000;
/// Fields to write, one at each exit.
const CHANGES: u64 = 0x6_4000;
const CHANGES_COUNT: u64 = 24;
const CHANGES_END: u64 = CHANGES + CHANGES_COUNT * 16;
/// Code of the hypervisor when all changes are used up.
const ROOT: u64 = 0x6_8000;
const ROOT_END: u64 = 0x6_c000;
const BUDGET: Tick = 4_000;

fn assemble(at: u64, write: fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let code = CodeAssembler::new(64).and_then(|mut a| {
        write(&mut a)?;
        a.assemble(at)
    });
    code.expect("it does not depend on anything")
}

/// Enters VMX operation, writes the table's fields, enters.
fn launcher() -> Vec<u8> {
    assemble(LAUNCHER, |a| {
        let mut next = a.create_label();
        let mut launch = a.create_label();
        a.mov(ecx, 0x3a)?;
        a.mov(eax, 5)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.vmxon(qword_ptr(POINTERS))?;
        a.vmclear(qword_ptr(POINTERS + 8))?;
        a.vmptrld(qword_ptr(POINTERS + 8))?;
        a.mov(rsi, TABLE)?;
        a.set_label(&mut next)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.cmp(rax, -1)?;
        a.je(launch)?;
        a.vmwrite(rax, qword_ptr(rsi + 8))?;
        a.add(rsi, 16)?;
        a.jmp(next)?;
        a.set_label(&mut launch)?;
        a.vmlaunch()?;
        a.jmp(HANDLER)
    })
}

/// Skips the guest's instruction, makes the next change, enters again.
fn handler() -> Vec<u8> {
    assemble(HANDLER, |a| {
        a.mov(r8, u64::from(Field::GUEST_RIP.encoding()))?;
        a.vmread(r9, r8)?;
        a.mov(r10, u64::from(Field::VM_EXIT_INSTRUCTION_LEN.encoding()))?;
        a.vmread(r10, r10)?;
        a.add(r9, r10)?;
        a.vmwrite(r8, r9)?;
        a.mov(r8, qword_ptr(CURSOR))?;
        a.mov(rax, qword_ptr(r8))?;
        a.vmwrite(rax, qword_ptr(r8 + 8))?;
        a.add(r8, 16)?;
        a.mov(qword_ptr(CURSOR), r8)?;
        a.cmp(r8, i32::try_from(CHANGES_END).expect("it is small"))?;
        a.jae(ROOT)?;
        a.vmresume()?;
        a.vmlaunch()?;
        a.jmp(HANDLER)
    })
}

static PROFILES: LazyLock<[Arc<VmxProfile>; 2]> = LazyLock::new(|| {
    [VmxChoice::Max, VmxChoice::Kvm].map(|choice| {
        let profile = choice.profile(<&Model>::default());
        profile.ok().flatten().expect("these are always there")
    })
});
static CODES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| [launcher(), handler()]);

/// A physical address that a pointer of a VMCS may hold: RAM, its ends, a device, nowhere.
fn address(source: &mut Source) -> u64 {
    let small = u64::from(source.byte());
    match source.byte() & 15 {
        0 => RAM_SIZE - 8 * small,
        1 => RAM_SIZE + small * 0x1000,
        2 => 0xfee0_0000 + small * 16,
        3 => 0xfec0_0000,
        4 => 1 << (small & 63),
        5 => (1 << (small & 63)) | 0xff8,
        6 => !0 - small,
        7 => source.value(),
        8 => VMCS,
        9 => EPT + (small & 3) * 0x1000,
        10 => LONG_TABLES,
        _ => PAGES + (small & 7) * 0x1000 + (small >> 7) * 8,
    }
}

fn field(source: &mut Source) -> Field {
    let all = Field::ALL;
    let at = usize::from(source.byte()) | usize::from(source.byte()) << 8;
    all[at % all.len()]
}

/// A value for a field: the likelier it passes the checks, the deeper it leads.
fn value(field: Field, source: &mut Source) -> u64 {
    let pointers = [
        Field::IO_BITMAP_A,
        Field::IO_BITMAP_B,
        Field::MSR_BITMAP,
        Field::VM_EXIT_MSR_STORE_ADDR,
        Field::VM_EXIT_MSR_LOAD_ADDR,
        Field::VM_ENTRY_MSR_LOAD_ADDR,
        Field::VIRTUAL_APIC_PAGE_ADDR,
        Field::APIC_ACCESS_ADDR,
        Field::VMCS_LINK_POINTER,
    ];
    let counts = [
        Field::VM_EXIT_MSR_STORE_COUNT,
        Field::VM_EXIT_MSR_LOAD_COUNT,
        Field::VM_ENTRY_MSR_LOAD_COUNT,
    ];
    if pointers.contains(&field) {
        address(source)
    } else if field == Field::EPT_POINTER {
        address(source) & !0xfff | 0x1e | u64::from(source.byte() & 0x40)
    } else if counts.contains(&field) {
        u64::from(source.byte())
    } else {
        source.number()
    }
}

/// Controls: bits that may be 1, or any.
fn controls(allowed0: u32, allowed1: u32, wanted: u32, source: &mut Source) -> u64 {
    let chosen = source.value();
    let few = (chosen & chosen >> 32) as u32 & source.value() as u32;
    u64::from(match source.byte() & 31 {
        31 => chosen as u32,
        0..16 => allowed0 | wanted,
        _ => allowed0 | wanted | few & allowed1,
    })
}

/// A 64-bit host, and a guest that starts in 64-bit, PAE or real mode.
fn fields(profile: &VmxProfile, state: &VcpuState, source: &mut Source) -> Vec<(Field, u64)> {
    use Field as F;
    let caps = &profile.caps;
    let kind = source.byte();
    let (ept, real, pae) = (kind & 3 != 0, kind & 12 == 4, kind & 12 == 8);
    let mut secondary = 0;
    if ept {
        secondary |= proc2::ENABLE_EPT | proc2::ENABLE_VPID;
    }
    if real {
        secondary |= proc2::ENABLE_EPT | proc2::UNRESTRICTED_GUEST;
    }
    let primary = proc1::ACTIVATE_SECONDARY_CONTROLS
        | if kind & 16 != 0 {
            proc1::USE_I_O_BITMAPS
        } else {
            0
        }
        | if kind & 32 != 0 {
            proc1::USE_MSR_BITMAPS
        } else {
            0
        };
    let long = if real || pae {
        0
    } else {
        entry::IA_32E_MODE_GUEST
    };
    let flat = if real { 0x93 } else { 0xc093u64 };
    let code = match (real, pae) {
        (true, _) => 0x9b,
        (_, true) => 0xc09b,
        _ => 0xa09b,
    };
    let limit = if real { 0xffff } else { 0xffff_ffff };
    let (cr0, cr3) = match (real, pae) {
        (true, _) => (state.cr0 & !0x8000_0001, 0),
        (_, true) => (state.cr0, PAE_TABLES),
        _ => (state.cr0, LONG_TABLES),
    };
    let mut list = vec![
        (
            F::PIN_BASED_VM_EXEC_CONTROL,
            controls(
                caps.pin_allowed0(),
                caps.pin_allowed1(),
                pin::EXTERNAL_INTERRUPT_EXITING,
                source,
            ),
        ),
        (
            F::CPU_BASED_VM_EXEC_CONTROL,
            controls(
                caps.proc1_allowed0(),
                caps.proc1_allowed1(),
                primary,
                source,
            ),
        ),
        (
            F::SECONDARY_VM_EXEC_CONTROL,
            controls(
                caps.proc2_allowed0(),
                caps.proc2_allowed1(),
                secondary,
                source,
            ),
        ),
        (
            F::VM_EXIT_CONTROLS,
            controls(
                caps.exit_allowed0(),
                caps.exit_allowed1(),
                exit::HOST_ADDRESS_SPACE_SIZE,
                source,
            ),
        ),
        (
            F::VM_ENTRY_CONTROLS,
            controls(caps.entry_allowed0(), caps.entry_allowed1(), long, source),
        ),
        (F::EXCEPTION_BITMAP, source.value()),
        (F::VMCS_LINK_POINTER, !0),
        (F::HOST_CS_SELECTOR, 0x18),
        (F::HOST_SS_SELECTOR, 0x10),
        (F::HOST_TR_SELECTOR, 0x60),
        (F::HOST_CR0, state.cr0),
        (F::HOST_CR3, state.cr3),
        (F::HOST_CR4, state.cr4),
        (F::HOST_GDTR_BASE, GDT),
        (F::HOST_IDTR_BASE, IDT),
        (F::HOST_TR_BASE, TSS),
        (F::HOST_RIP, HANDLER),
        (F::HOST_RSP, DATA + 0xe00),
        (F::HOST_IA32_EFER, state.msrs.efer),
        (F::HOST_IA32_PAT, 0x0007_0406_0007_0406),
        (F::GUEST_CR0, cr0),
        (F::GUEST_CR3, cr3),
        (F::GUEST_CR4, state.cr4),
        (F::GUEST_IA32_EFER, if long != 0 { 0x500 } else { 0 }),
        (F::GUEST_IA32_PAT, 0x0007_0406_0007_0406),
        (F::GUEST_GDTR_BASE, GDT),
        (F::GUEST_GDTR_LIMIT, 0x7ff),
        (F::GUEST_IDTR_BASE, if real { 0 } else { IDT }),
        (F::GUEST_IDTR_LIMIT, 0xfff),
        (
            F::GUEST_CS_SELECTOR,
            if real {
                0
            } else if pae {
                8
            } else {
                0x18
            },
        ),
        (F::GUEST_CS_AR_BYTES, code),
        (F::GUEST_CS_LIMIT, limit),
        (F::GUEST_TR_SELECTOR, 0x60),
        (F::GUEST_TR_BASE, TSS),
        (F::GUEST_TR_AR_BYTES, 0x8b),
        (F::GUEST_TR_LIMIT, 0x67),
        (F::GUEST_LDTR_AR_BYTES, 1 << 16),
        (F::GUEST_PDPTR0, (PAE_TABLES + 0x1000) | 1),
        (F::GUEST_DR7, 0x400),
        (F::GUEST_RFLAGS, 2),
        (F::GUEST_RIP, CODE),
        (F::GUEST_RSP, DATA + 0xa00),
        (F::EPT_POINTER, EPT | 0x1e | u64::from(source.byte() & 0x40)),
        (F::VIRTUAL_PROCESSOR_ID, 7),
        (F::VMX_PREEMPTION_TIMER_VALUE, u64::from(source.byte())),
        (F::IO_BITMAP_A, IO_BITMAPS),
        (F::IO_BITMAP_B, IO_BITMAPS + 0x1000),
        (F::MSR_BITMAP, MSR_BITMAP),
        (F::VIRTUAL_APIC_PAGE_ADDR, PAGES),
        (F::APIC_ACCESS_ADDR, PAGES + 0x1000),
    ];
    for segment in GuestSegment::DATA {
        let chosen = if real { 0 } else { 0x10 };
        list.extend([
            (segment.selector, chosen),
            (segment.rights, flat),
            (segment.limit, limit),
        ]);
    }
    for (base, address, count) in [
        (1, F::VM_EXIT_MSR_STORE_ADDR, F::VM_EXIT_MSR_STORE_COUNT),
        (2, F::VM_EXIT_MSR_LOAD_ADDR, F::VM_EXIT_MSR_LOAD_COUNT),
        (4, F::VM_ENTRY_MSR_LOAD_ADDR, F::VM_ENTRY_MSR_LOAD_COUNT),
    ] {
        list.push((address, MSR_LIST + base * 0x100));
        if kind >> 6 == 3 {
            list.push((count, u64::from(source.byte() & 15)));
        }
    }
    let spoiled = source.byte();
    for _ in 0..if spoiled < 128 { 0 } else { spoiled & 7 } {
        let field = field(source);
        list.push((field, value(field, source)));
    }
    list
}

/// The machine, its hypervisor and the guest's guest.
fn guest(data: &[u8]) -> Guest {
    let mut source = Source(data);
    let options = source.byte();
    let model = <&Model>::default();
    let profile = PROFILES[usize::from(options & 1)].clone();
    let mut guest = Guest {
        ram: vec![0; RAM_SIZE as usize],
        state: VcpuState::reset(0, model),
        cpus: 1 + u32::from(options >> 7),
        model,
        vmx: Some(profile.clone()),
        interrupts: source.byte() & 7,
        messages: if options & 0x62 == 0x62 {
            source.byte() & 63
        } else {
            0
        },
        budget: BUDGET,
    };
    guest.tables(Start::Long);
    hypervisor(&mut guest.state);
    let list = fields(&profile, &guest.state, &mut source);
    let ram = &mut guest.ram;
    let revision = u64::from(profile.layout.revision());
    for region in [VMXON, VMCS, SPARE] {
        put(ram, region, revision);
    }
    put(ram, POINTERS, VMXON);
    put(ram, POINTERS + 8, VMCS);
    put(ram, CURSOR, CHANGES);
    let pairs = |ram: &mut [u8], base: u64, pairs: &[(Field, u64)]| {
        for (n, (field, value)) in (0..).zip(pairs) {
            put(ram, base + 16 * n, u64::from(field.encoding()));
            put(ram, base + 16 * n + 8, *value);
        }
        put(ram, base + 16 * pairs.len() as u64, !0);
    };
    pairs(ram, TABLE, &list);
    // Each change is undone by the next.
    let mut changes = Vec::new();
    for _ in 0..CHANGES_COUNT / 2 {
        let field = field(&mut source);
        let before = list.iter().rev().find(|(other, _)| *other == field);
        changes.push((field, value(field, &mut source)));
        changes.push((field, before.map_or(0, |(_, value)| *value)));
    }
    pairs(ram, CHANGES, &changes);
    memory(ram, &mut source, options);
    let [launcher, handler] = &*CODES;
    for (at, code) in [(LAUNCHER, launcher), (HANDLER, handler)] {
        ram[at as usize..at as usize + code.len()].copy_from_slice(code);
    }
    let code = source.0;
    for (start, end) in [(CODE, DATA), (ROOT, ROOT_END)] {
        for (place, byte) in ram[start as usize..end as usize]
            .iter_mut()
            .zip(code.iter().cycle())
        {
            *place = *byte;
        }
    }
    guest
}

/// The hypervisor's registers: 64-bit mode, able to enter VMX operation.
fn hypervisor(state: &mut VcpuState) {
    let segment = |selector, rights| SegmentState {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    };
    state.activity = hypernest_cpu::Activity::Active;
    state.cr0 = 0x8000_0031;
    state.cr3 = LONG_TABLES;
    state.cr4 = 0x2620 | 1 << 18;
    state.msrs.efer = 0x500;
    state.rip = LAUNCHER;
    state.rflags = 2;
    state.gpr[4] = DATA + 0xe00;
    state.gdtr = TableState {
        base: GDT,
        limit: 0x7ff,
    };
    state.idtr = TableState {
        base: IDT,
        limit: 0xfff,
    };
    let s = &mut state.segments;
    s.cs = segment(0x18, 0xa09b);
    (s.ss, s.ds, s.es, s.fs, s.gs) = {
        let data = segment(0x10, 0xc093);
        (data, data, data, data, data)
    };
    s.tr = SegmentState {
        selector: 0x60,
        base: TSS,
        limit: 0xffff,
        rights: 0x8b,
    };
}

/// Extended page tables, bitmaps, MSR lists, and what spoils them and the tables under them.
fn memory(ram: &mut [u8], source: &mut Source, options: u8) {
    for level in 0..3 {
        put(ram, EPT + level * 0x1000, (EPT + (level + 1) * 0x1000) | 7);
    }
    for page in 0..512 {
        put(ram, EPT + 0x3000 + 8 * page, page << 12 | 0x37);
    }
    let spoiled = source.byte();
    for _ in 0..if spoiled < 128 { 0 } else { spoiled & 7 } {
        let level = u64::from(source.byte() & 3);
        let at = EPT + level * 0x1000 + u64::from(source.byte() & 0x7f) * 8;
        put(ram, at, address(source) & !0xfff | source.value() & 0xfff);
    }
    for _ in 0..source.byte() & 15 {
        let at = IO_BITMAPS + u64::from(source.byte()) * 0x30;
        put(ram, at, source.value());
    }
    const MSRS: [u64; 16] = [
        0x10,
        0x1b,
        0x3a,
        0x8b,
        0x174,
        0x1d9,
        0x277,
        0x480,
        0x6e0,
        0x808,
        0x830,
        0xc000_0080,
        0xc000_0082,
        0xc000_0100,
        0xc000_0101,
        0xc000_0103,
    ];
    for entry in 0..u64::from(source.byte() & 31) {
        let chosen = source.byte();
        let index = match chosen >> 4 {
            0..15 => MSRS[usize::from(chosen & 15)],
            _ => source.value(),
        };
        put(ram, MSR_LIST + 0x100 + 64 * entry, index);
        put(ram, MSR_LIST + 0x108 + 64 * entry, source.number());
    }
    // The regions themselves, beyond their revision.
    if options & 4 != 0 {
        for _ in 0..source.byte() & 31 {
            let at = VMCS + u64::from(source.byte()) * 16 + 8 * u64::from(options >> 3 & 1);
            put(ram, at, source.value());
        }
    }
}

/// What came of a hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestEnding {
    /// When and why it ended.
    pub ending: Ending,
    /// Exits and failed entries that it answered.
    pub answered: u64,
    /// An entry succeeded, at least up to its loading of guest state.
    pub entered: bool,
}

/// Runs the hypervisor that `data` describes with blocks of one instruction and of many. Panics where the processor
/// does, and where the two differ. `None` where no processor can be in such a state.
pub fn run(data: &[u8]) -> Option<NestEnding> {
    let (ending, state, ram) = run_twice(&guest(data))?;
    let at = CURSOR as usize;
    let cursor = ram[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    let reason = Field::VM_EXIT_REASON.encoding();
    let exited = state.vmx.fields.iter().any(|(field, _)| *field == reason);
    Some(NestEnding {
        ending,
        // Wild code may have written there.
        answered: (cursor.wrapping_sub(CHANGES) / 16).min(CHANGES_COUNT),
        entered: exited || state.vmx.launched,
    })
}

/// Slices of a run that goes through nested states, of so many ticks that it is seldom at the same place twice.
const SLICES: u64 = 100;

/// What came of a hypervisor that was taken apart and put together again and again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Nested states that were taken back.
    pub taken: u32,
    /// Of them, those of a guest that executes.
    pub in_guest: u32,
    /// Those that were refused: what wild code has made of memory fails the checks of a VM entry.
    pub refused: u32,
}

/// Runs the hypervisor that `data` describes twice: by itself, and with the nested state of each vCPU taken out and
/// put back, with its registers before or after, between slices of the run. Panics where the two end differently, or
/// where what is refused has changed something. `None` where no processor can be in such a state.
pub fn carry(data: &[u8]) -> Option<Carried> {
    let guest = guest(data);
    let cpus = guest.cpus as usize;
    // Both forget what is cached of memory, which does not travel.
    let (mut plain, mut plain_ram, stop) =
        guest.run_in_slices(64, SLICES, &mut |processor, ram| processor.flush(ram))?;
    let mut carried = Carried::default();
    let (mut other, mut other_ram, other_stop) =
        guest.run_in_slices(64, SLICES, &mut |processor, ram| {
            processor.flush(ram);
            for vcpu in 0..cpus {
                carried.vcpu(processor, ram, vcpu);
            }
        })?;
    assert_eq!(stop, other_stop);
    for vcpu in 0..cpus {
        let whole = |processor: &mut Processor, ram: &mut Ram| {
            let blob = processor.nested_state(vcpu, ram).to_bytes();
            let mut state = processor.read_state(vcpu);
            // The state of a guest that executes is in the blob, and in the fields as it was at the entry.
            state.vmx.fields.clear();
            (state, blob)
        };
        let (state, blob) = whole(&mut plain, &mut plain_ram);
        let (other_state, other_blob) = whole(&mut other, &mut other_ram);
        assert_eq!(state, other_state);
        assert!(blob == other_blob, "the nested states differ");
    }
    assert!(plain_ram.bytes() == other_ram.bytes(), "memory differs");
    Some(carried)
}

impl Carried {
    fn vcpu(&mut self, processor: &mut Processor, ram: &mut Ram, vcpu: usize) {
        let state = processor.read_state(vcpu);
        let blob = processor.nested_state(vcpu, ram).to_bytes();
        let nothing = NestedState::default().to_bytes();
        let nested_first = processor.now() & 1 != 0;
        if nested_first {
            // In a vCPU outside VMX operation, in the state of a reset.
            processor
                .write_state(vcpu, &VcpuState::reset(0, <&Model>::default()))
                .expect("it always can");
        } else {
            processor
                .set_nested_state(vcpu, ram, &nothing)
                .expect("it always can");
            processor
                .write_registers(vcpu, &state)
                .expect("it had them");
        }
        let before = processor.read_state(vcpu);
        match processor.set_nested_state(vcpu, ram, &blob) {
            Ok(_) => {
                self.taken += 1;
                self.in_guest += u32::from(state.vmx.non_root);
                if nested_first {
                    processor
                        .write_registers(vcpu, &state)
                        .expect("it had them");
                }
                assert!(processor.nested_state(vcpu, ram).to_bytes() == blob);
            }
            Err(_) => {
                self.refused += 1;
                assert_eq!(processor.read_state(vcpu), before);
                processor.write_state(vcpu, &state).expect("it was so");
            }
        }
    }
}
