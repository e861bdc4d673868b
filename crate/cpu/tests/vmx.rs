//! A hypervisor of a few instructions and its guest: what exits, in which order, with what.

mod support;

use hypernest_cpu::clock::TSC_PER_TICK;
use hypernest_cpu::{
    Model, Processor, ProcessorConfig, Ram, Stop, VcpuState, VmxChoice, VmxProfile,
};
use hypernest_vmcs::{ExitReason, Field, GuestSegment, entry, exit, pin, proc1, proc2};
use iced_x86::code_asm::{
    CodeAssembler, al, ax, byte_ptr, ds, eax, ecx, edx, qword_ptr, r8, r9, r10, rax, rcx, rdx, rsi,
    ss,
};
use support::{CODE, Nothing, long_mode};

const VMXON: u64 = 0x4_0000;
const VMCS: u64 = 0x4_1000;
/// Where the hypervisor keeps the two pointers, its table of fields, and what it saw.
const POINTERS: u64 = 0x4_2000;
const TABLE: u64 = 0x4_3000;
const SEEN: u64 = 0x4_6000;
/// A list of MSRs to load: IA32_BIOS_SIGN_ID, which no list can.
const LIST: u64 = 0x4_7000;
const HANDLER: u64 = 0x1_1000;
const GUEST: u64 = 0x1_2000;
const GUEST_STACK: u64 = 0x5_0000;
const HOST_STACK: u64 = 0x5_2000;
const EPT: u64 = 0x6_0000;

fn assemble(
    at: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    write(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// VMXON, VMCLEAR, VMPTRLD, a VMWRITE for each row of the table, VMLAUNCH. What follows a failed
/// entry is HLT.
fn launcher() -> Vec<u8> {
    assemble(CODE, |a| {
        // What blocks events for an instruction does not concern the entry.
        a.mov(eax, 16)?;
        a.mov(ss, ax)?;
        a.mov(ds, ax)?;
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
        a.mov(rsi, SEEN)?;
        a.vmlaunch()?;
        a.hlt()
    })
}

/// Notes reason and qualification of an exit; a VMCALL ends it, everything else is skipped.
fn handler() -> Vec<u8> {
    let field = |field: Field| u64::from(field.encoding());
    assemble(HANDLER, |a| {
        let mut done = a.create_label();
        a.mov(r8, field(Field::VM_EXIT_REASON))?;
        a.vmread(qword_ptr(rsi), r8)?;
        a.mov(r9, field(Field::EXIT_QUALIFICATION))?;
        a.vmread(qword_ptr(rsi + 8), r9)?;
        a.vmread(r8, r8)?;
        a.add(rsi, 16)?;
        a.cmp(r8, u32::from(ExitReason::VMCALL.0) as i32)?;
        a.je(done)?;
        a.mov(r8, field(Field::GUEST_RIP))?;
        a.vmread(r9, r8)?;
        a.mov(r10, field(Field::VM_EXIT_INSTRUCTION_LEN))?;
        a.vmread(r10, r10)?;
        a.add(r9, r10)?;
        a.vmwrite(r8, r9)?;
        a.vmresume()?;
        a.set_label(&mut done)?;
        a.hlt()
    })
}

/// The fields of a 64-bit host and a 64-bit guest that share page tables.
fn fields(profile: &VmxProfile, state: &VcpuState, ept: bool) -> Vec<(Field, u64)> {
    use Field as F;
    let caps = &profile.caps;
    let must = |allowed0: u32, wanted: u32| u64::from(allowed0 | wanted);
    let secondary = if ept {
        proc2::ENABLE_EPT | proc2::ENABLE_VPID
    } else {
        0
    };
    let flat = 0xc093u64;
    let mut list = vec![
        (
            F::PIN_BASED_VM_EXEC_CONTROL,
            must(caps.pin_allowed0(), pin::EXTERNAL_INTERRUPT_EXITING),
        ),
        (
            F::CPU_BASED_VM_EXEC_CONTROL,
            must(
                caps.proc1_allowed0(),
                proc1::HLT_EXITING
                    | proc1::UNCONDITIONAL_I_O_EXITING
                    | proc1::ACTIVATE_SECONDARY_CONTROLS,
            ),
        ),
        (
            F::SECONDARY_VM_EXEC_CONTROL,
            must(caps.proc2_allowed0(), secondary),
        ),
        (
            F::VM_EXIT_CONTROLS,
            must(caps.exit_allowed0(), exit::HOST_ADDRESS_SPACE_SIZE),
        ),
        (
            F::VM_ENTRY_CONTROLS,
            must(caps.entry_allowed0(), entry::IA_32E_MODE_GUEST),
        ),
        (F::EXCEPTION_BITMAP, 1 << 6),
        (F::VMCS_LINK_POINTER, !0),
        (F::HOST_CS_SELECTOR, 8),
        (F::HOST_SS_SELECTOR, 16),
        (F::HOST_DS_SELECTOR, 16),
        (F::HOST_ES_SELECTOR, 16),
        (F::HOST_FS_SELECTOR, 16),
        (F::HOST_GS_SELECTOR, 16),
        (F::HOST_TR_SELECTOR, 24),
        (F::HOST_CR0, state.cr0),
        (F::HOST_CR3, state.cr3),
        (F::HOST_CR4, state.cr4),
        (F::HOST_GDTR_BASE, state.gdtr.base),
        (F::HOST_IDTR_BASE, state.idtr.base),
        (F::HOST_RIP, HANDLER),
        (F::HOST_RSP, HOST_STACK),
        (F::GUEST_CR0, state.cr0),
        (F::GUEST_CR3, state.cr3),
        (F::GUEST_CR4, state.cr4),
        (F::GUEST_GDTR_BASE, state.gdtr.base),
        (F::GUEST_GDTR_LIMIT, 0xff),
        (F::GUEST_IDTR_BASE, state.idtr.base),
        (F::GUEST_IDTR_LIMIT, 0xfff),
        (F::GUEST_CS_SELECTOR, 8),
        (F::GUEST_CS_AR_BYTES, 0xa09b),
        (F::GUEST_CS_LIMIT, 0xffff_ffff),
        (F::GUEST_TR_SELECTOR, 24),
        (F::GUEST_TR_AR_BYTES, 0x8b),
        (F::GUEST_TR_LIMIT, 0x67),
        (F::GUEST_LDTR_AR_BYTES, 1 << 16),
        (F::GUEST_DR7, 0x400),
        (F::GUEST_RFLAGS, 2),
        (F::GUEST_RIP, GUEST),
        (F::GUEST_RSP, GUEST_STACK),
    ];
    for segment in GuestSegment::DATA {
        list.extend([
            (segment.selector, 16),
            (segment.rights, flat),
            (segment.limit, 0xffff_ffff),
        ]);
    }
    if ept {
        list.extend([
            (F::EPT_POINTER, EPT | 3 << 3 | 6),
            (F::VIRTUAL_PROCESSOR_ID, 7),
        ]);
    }
    list
}

struct Outcome {
    state: VcpuState,
    /// Reason and qualification of each exit.
    exits: Vec<(u16, u64)>,
    saved: VcpuState,
}

/// Runs `guest` under the hypervisor until it halts; `change` may spoil the fields.
fn run(
    choice: VmxChoice,
    ept: bool,
    guest: &[u8],
    change: impl FnOnce(&mut Vec<(Field, u64)>),
) -> Outcome {
    run_in_blocks(64, choice, ept, guest, change)
}

/// As [`run`], with blocks of at most so many instructions.
fn run_in_blocks(
    block_length: u32,
    choice: VmxChoice,
    ept: bool,
    guest: &[u8],
    change: impl FnOnce(&mut Vec<(Field, u64)>),
) -> Outcome {
    let model = <&Model>::default();
    let profile = choice.profile(model).unwrap().unwrap();
    let config = ProcessorConfig {
        vmx: Some(profile.clone()),
        block_length,
        ..ProcessorConfig::default()
    };
    let mut processor = Processor::new(&config).unwrap();
    let (mut ram, mut state) = long_mode(&processor);
    state.cr4 |= 1 << 13;
    state.rip = CODE;
    let mut list = fields(&profile, &state, ept);
    change(&mut list);
    let put = |ram: &mut Ram, at: u64, value: u64| ram.write(at, &value.to_le_bytes()).unwrap();
    for region in [VMXON, VMCS] {
        put(&mut ram, region, u64::from(profile.layout.revision()));
    }
    put(&mut ram, LIST, 0x8b);
    put(&mut ram, POINTERS, VMXON);
    put(&mut ram, POINTERS + 8, VMCS);
    for (n, (field, value)) in list.iter().enumerate() {
        put(&mut ram, TABLE + 16 * n as u64, u64::from(field.encoding()));
        put(&mut ram, TABLE + 16 * n as u64 + 8, *value);
    }
    put(&mut ram, TABLE + 16 * list.len() as u64, !0);
    // One to one: two tables, a directory, 4 KiB pages; GUEST + 1 page is absent.
    put(&mut ram, EPT, (EPT + 0x1000) | 7);
    put(&mut ram, EPT + 0x1000, (EPT + 0x2000) | 7);
    put(&mut ram, EPT + 0x2000, (EPT + 0x3000) | 7);
    for page in 0..512 {
        let present = if page << 12 == GUEST + 0x1000 { 0 } else { 7 };
        put(
            &mut ram,
            EPT + 0x3000 + 8 * page,
            page << 12 | 6 << 3 | present,
        );
    }
    put(&mut ram, DIRECTORY, 0x87);
    ram.write(CODE, &launcher()).unwrap();
    ram.write(HANDLER, &handler()).unwrap();
    ram.write(GUEST, guest).unwrap();
    processor.write_state(0, &state).unwrap();
    // In two parts, with the state taken out and put back between them.
    processor.run(&mut ram, &mut Nothing, 260);
    let saved = processor.read_state(0);
    processor.write_state(0, &saved).unwrap();
    assert_eq!(
        processor.read_state(0),
        saved,
        "what is saved can be loaded"
    );
    let stop = processor.run(&mut ram, &mut Nothing, 20_000);
    assert_eq!(stop, Stop::Deadline);
    let state = processor.read_state(0);
    let word = |at: u64| u64::from_le_bytes(ram.load(at).unwrap());
    let count = state.gpr[6].saturating_sub(SEEN) / 16;
    let exits = (0..count)
        .map(|n| (word(SEEN + 16 * n) as u16, word(SEEN + 16 * n + 8)))
        .collect();
    Outcome {
        state,
        exits,
        saved,
    }
}

/// CPUID, RDMSR, IN, HLT, a load, UD2, VMCALL.
fn guest() -> Vec<u8> {
    assemble(GUEST, |a| {
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.mov(ecx, 0x277)?;
        a.rdmsr()?;
        a.in_(al, 0x60)?;
        a.hlt()?;
        a.mov(rcx, GUEST + 0x1000)?;
        a.mov(rdx, qword_ptr(rcx))?;
        a.vmcall()
    })
}

const ORDINARY: [u16; 4] = [
    ExitReason::CPUID.0,
    ExitReason::RDMSR.0,
    ExitReason::IO_INSTRUCTION.0,
    ExitReason::HLT.0,
];

#[test]
fn a_guest_exits_where_its_hypervisor_asked() {
    for choice in [VmxChoice::Max, VmxChoice::Kvm] {
        let done = run(choice, false, &guest(), |_| ());
        let reasons: Vec<u16> = done.exits.iter().map(|(reason, _)| *reason).collect();
        let expected: Vec<u16> = ORDINARY.into_iter().chain([ExitReason::VMCALL.0]).collect();
        assert_eq!(reasons, expected);
        // IN of one byte from an immediate port.
        assert_eq!(done.exits[2].1, 0x60 << 16 | 1 << 6 | 1 << 3);
        assert!(done.saved.vmx.current.is_some());
        assert!(!done.state.vmx.non_root);
        assert_eq!(done.state.gpr[4], HOST_STACK);
    }
}

/// VM entry refuses the instruction after a load of SS, and no later one: not even where that one
/// ran singly, and the rest in blocks.
#[test]
fn a_load_of_ss_in_the_guest_does_not_hold_up_the_next_entry() {
    let code = assemble(GUEST, |a| {
        a.mov(eax, 16)?;
        a.mov(ss, ax)?;
        a.nop()?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.vmcall()
    });
    let done = run(VmxChoice::Max, false, &code, |_| ());
    let reasons: Vec<u16> = done.exits.iter().map(|(reason, _)| *reason).collect();
    assert_eq!(reasons, [ExitReason::CPUID.0, ExitReason::VMCALL.0]);
}

#[test]
fn memory_without_an_ept_entry_exits_with_what_was_tried() {
    // The exit names no length, so that the guest is told it by hand: the load ends it here.
    let code = assemble(GUEST, |a| {
        a.mov(rcx, GUEST + 0x1ff8)?;
        a.mov(byte_ptr(rcx), al)?;
        a.vmcall()
    });
    let done = run(VmxChoice::Max, true, &code, |_| ());
    // A write, the linear address valid, of the final translation; to a user page that is writable.
    assert_eq!(done.exits[0], (ExitReason::EPT_VIOLATION.0, 0x782));
}

#[test]
fn the_preemption_timer_counts_at_the_rate_that_is_advertised() {
    for (choice, rate) in [(VmxChoice::Max, 0), (VmxChoice::Kvm, 5)] {
        let code = assemble(GUEST, |a| {
            for _ in 0..40 << rate {
                a.nop()?;
            }
            a.vmcall()
        });
        let done = run(choice.clone(), false, &code, |list| {
            let pin = list
                .iter_mut()
                .find(|f| f.0 == Field::PIN_BASED_VM_EXEC_CONTROL);
            pin.unwrap().1 |= u64::from(pin::ACTIVATE_VMX_PREEMPTION_TIMER);
            list.push((Field::VMX_PREEMPTION_TIMER_VALUE, 15 * TSC_PER_TICK));
        });
        let reasons: Vec<u16> = done.exits.iter().map(|exit| exit.0).collect();
        let timer = ExitReason::PREEMPTION_TIMER.0;
        assert_eq!(reasons, [timer, timer, ExitReason::VMCALL.0], "{choice:?}");
    }
}

/// Page directory of the virtual-8086 guest: one page of 4 MiB.
const DIRECTORY: u64 = 0x6_8000;
const VM: u64 = 1 << 17;

/// Makes the guest one in virtual-8086 mode at `GUEST`, with its stack at 5000:1000.
fn v86(list: &mut Vec<(Field, u64)>, iopl: u64) {
    use Field as F;
    let old =
        |field: Field, list: &[(Field, u64)]| list.iter().rev().find(|f| f.0 == field).unwrap().1;
    let entry_controls = old(F::VM_ENTRY_CONTROLS, list) & !u64::from(entry::IA_32E_MODE_GUEST);
    let cr4 = old(F::GUEST_CR4, list) & !(1 << 5) | 1 << 4;
    list.extend([
        (F::VM_ENTRY_CONTROLS, entry_controls),
        (F::EXCEPTION_BITMAP, 1 << 13),
        (F::GUEST_CR3, DIRECTORY),
        (F::GUEST_CR4, cr4 | 1), // VME
        (F::GUEST_RFLAGS, 2 | VM | iopl << 12),
        (F::GUEST_RIP, 0),
        (F::GUEST_RSP, 0x1000),
    ]);
    for (selector, segment) in [
        (GUEST >> 4, GuestSegment::CS),
        (0x5000, GuestSegment::SS),
        (0x6800, GuestSegment::DS),
        (0, GuestSegment::ES),
        (0, GuestSegment::FS),
        (0, GuestSegment::GS),
    ] {
        list.extend([
            (segment.selector, selector),
            (segment.base, selector << 4),
            (segment.limit, 0xffff),
            (segment.rights, 0xf3),
        ]);
    }
}

/// A load of SS, CPUID, `sensitive`, VMCALL.
fn v86_guest(
    sensitive: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    a.mov(ax, 0x4000u32).unwrap();
    a.mov(ss, ax).unwrap();
    a.cpuid().unwrap();
    sensitive(&mut a).unwrap();
    a.vmcall().unwrap();
    a.assemble(0).unwrap()
}

#[test]
fn a_guest_may_be_in_virtual_8086_mode() {
    let seen = |done: &Outcome, field: Field| {
        let mut fields = done.state.vmx.fields.iter();
        fields.find(|f| f.0 == field.encoding()).map(|f| f.1)
    };
    // With IOPL 3 it has the flag itself.
    let code = v86_guest(|a| a.sti());
    let done = run(VmxChoice::Max, false, &code, |list| v86(list, 3));
    let reasons: Vec<u16> = done.exits.iter().map(|exit| exit.0).collect();
    assert_eq!(reasons, [ExitReason::CPUID.0, ExitReason::VMCALL.0]);
    assert_eq!(
        seen(&done, Field::GUEST_RFLAGS),
        Some(2 | VM | 3 << 12 | 1 << 9)
    );
    assert_eq!(seen(&done, Field::GUEST_SS_BASE), Some(0x4_0000));
    assert_eq!(seen(&done, Field::GUEST_SS_AR_BYTES), Some(0xf3));
    // With IOPL 0 and VME it has a virtual one, but no 32-bit PUSHF: #GP.
    let code = v86_guest(|a| {
        a.sti()?;
        a.pushfd()
    });
    let done = run(VmxChoice::Max, false, &code, |list| v86(list, 0));
    assert_eq!(done.exits[0].0, ExitReason::CPUID.0);
    assert_eq!(done.exits[1].0, ExitReason::EXCEPTION_OR_NMI.0);
    assert_eq!(seen(&done, Field::VM_EXIT_INTR_INFO), Some(0x8000_0b0d));
    assert_eq!(
        seen(&done, Field::GUEST_RFLAGS),
        Some(2 | VM | 1 << 16 | 1 << 19)
    );
}

#[test]
fn a_bad_control_field_fails_the_entry_with_error_7_and_bad_guest_state_exits() {
    let done = run(VmxChoice::Max, false, &guest(), |list| {
        list.push((Field::CR3_TARGET_COUNT, 5));
    });
    assert!(done.exits.is_empty());
    let error = u64::from(Field::VM_INSTRUCTION_ERROR.encoding());
    let seen = done
        .state
        .vmx
        .fields
        .iter()
        .find(|(n, _)| u64::from(*n) == error);
    assert_eq!(seen.map(|(_, value)| *value), Some(7));
    assert_ne!(done.state.rflags & 1 << 6, 0);

    let done = run(VmxChoice::Max, false, &guest(), |list| {
        list.push((Field::GUEST_RFLAGS, 0));
    });
    // Reason 33 with bit 31, which a 16-bit view leaves out.
    assert_eq!(done.exits.first().map(|exit| exit.0), Some(33));
}

#[test]
fn blocking_by_mov_ss_in_a_guest_does_not_stop_its_hypervisor() {
    for length in [1, 64] {
        let done = run_in_blocks(length, VmxChoice::Max, false, &guest(), |list| {
            list.push((Field::GUEST_INTERRUPTIBILITY_INFO, 2));
        });
        // Each exit saves the blocking, and each entry but the last brings it back.
        assert_eq!(done.exits.len(), 5, "blocks of {length}");
    }
}

#[test]
fn a_list_cannot_load_the_signature_of_microcode() {
    let done = run(VmxChoice::Max, false, &guest(), |list| {
        list.push((Field::VM_ENTRY_MSR_LOAD_ADDR, LIST));
        list.push((Field::VM_ENTRY_MSR_LOAD_COUNT, 1));
    });
    // Entry failures keep bit 31 apart; the qualification is the number of the entry.
    assert_eq!(done.exits.first(), Some(&(34, 1)));
}

#[test]
fn without_vmx_its_instructions_do_not_exist() {
    let code = assemble(CODE, |a| a.vmxon(qword_ptr(POINTERS)));
    let (mut processor, mut ram) = support::machine(64, &code);
    processor.run(&mut ram, &mut Nothing, 10);
    let rip = processor.read_state(0).rip;
    assert_eq!((rip - support::HANDLERS) / 16, 6, "#UD");
}

/// A dump of a profile's MSRs, as a tool would print it.
fn dump(profile: &VmxProfile) -> String {
    let lines = profile.caps.msrs();
    lines
        .map(|(msr, value)| format!("{msr:#x} {value:#018x}\n"))
        .collect()
}

#[test]
fn a_dump_of_a_processor_makes_a_processor_like_it() {
    let model = <&Model>::default();
    for whole in [VmxProfile::max(model), VmxProfile::kvm(model)] {
        let choice = VmxChoice::from_dump(&dump(&whole)).unwrap();
        assert_eq!(choice.profile(model).unwrap().as_deref(), Some(&whole));
        let done = run(choice, true, &guest(), |_| ());
        assert_eq!(done.exits.first().map(|exit| exit.0), Some(ORDINARY[0]));
    }
}

#[test]
fn a_profile_without_ept_has_none() {
    let model = <&Model>::default();
    let mut caps = VmxProfile::max(model).caps;
    // EPT, and unrestricted guests and mode-based execution with it.
    caps.proc2 &= !((1 << 1 | 1 << 7 | 1 << 22) << 32);
    caps.ept_vpid &= !0xffff_ffff;
    // A revision that is nobody's here.
    caps.basic = caps.basic & !0x7fff_ffff | 4;
    let choice = VmxChoice::Msrs(caps.msrs().collect());
    let profile = choice.profile(model).unwrap().unwrap();
    assert_eq!(profile.caps.revision(), profile.layout.revision());
    let refused = run(choice.clone(), true, &guest(), |_| ());
    assert!(refused.exits.is_empty(), "the entry fails");
    let done = run(choice, false, &guest(), |_| ());
    assert_eq!(done.exits.len(), 5);
}

#[test]
fn a_profile_that_asks_for_too_much_is_refused_with_the_list() {
    let model = <&Model>::default();
    let mut caps = VmxProfile::max(model).caps;
    // SMM monitor, Intel PT in a guest.
    caps.basic |= 1 << 49;
    caps.proc2 |= (1 << 24) << 32;
    // CR4.VMXE need not be 1.
    caps.cr4_fixed0 = 0;
    let choice = VmxChoice::Msrs(caps.msrs().collect());
    let error = choice.profile(model).unwrap_err();
    assert_eq!(error.0.len(), 3, "{error}");
    let text = error.to_string();
    for part in [
        "proc2.24",
        "IA32_VMX_BASIC bit 49",
        "IA32_VMX_CR4_FIXED0 bit 13",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(VmxChoice::from_dump("0x480 zz").is_err());
}
