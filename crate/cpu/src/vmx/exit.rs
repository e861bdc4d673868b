//! VM exits (Vol. 3C, "VM Exits"): what is recorded, saved and loaded.

use hypernest_vmcs::enlightened::Written;
use hypernest_vmcs::{ExitReason, Field, GuestSegment, entry, exit as controls, pin, proc1, proc2};

use super::pml::Marks;
use super::{abort, enlightened, preemption};
use crate::bus::Tick;
use crate::exec::msr;
use crate::flags::bit;
use crate::mem::Ctx;
use crate::save::DR7_FIXED;
use crate::state::{Activity, SegmentState};
use crate::trap::{Exec, Trap};
use crate::vcpu::{Seg, Vcpu, cr, reg, rights};
use crate::watch;

/// What is recorded of a VM exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Basic exit reason.
    pub reason: u16,
    pub qualification: u64,
    pub instruction_length: u32,
    pub instruction_info: u32,
    /// VM-exit interruption information and error code.
    pub event: u32,
    pub event_error: u32,
    pub guest_physical: Option<u64>,
    pub linear: Option<u64>,
    /// RIP after the instruction that exits, where that tells its length.
    pub next_rip: Option<u64>,
    /// An EPT violation that may become a virtualization exception.
    pub convertible: bool,
    /// The processor has advanced past the instruction: no event was being delivered, and pending
    /// debug traps are kept.
    pub trap_like: bool,
    /// It has no reason of the processor's: bit 28 of its reason is set.
    pub synthetic: bool,
}

impl Exit {
    pub fn new(reason: ExitReason) -> Exit {
        Exit {
            reason: reason.0,
            ..Exit::default()
        }
    }

    /// A trap-like exit.
    pub fn after(reason: ExitReason) -> Exit {
        Exit {
            trap_like: true,
            ..Exit::new(reason)
        }
    }
}

/// Bit 28 of an exit reason.
const SYNTHETIC: u64 = 1 << 28;
/// Bit 31 of an exit reason: the VM entry failed.
const ENTRY_FAILURE: u64 = 1 << 31;
/// Valid bit of interruption-information fields.
pub(crate) const VALID: u32 = 1 << 31;
/// The type in interruption-information fields, and that of hardware exceptions.
const KIND: u32 = 7 << 8;
const HARDWARE_EXCEPTION: u32 = 3 << 8;
const DOUBLE_FAULT: u8 = 8;
/// In interruption information and exit qualifications: IRET had unblocked NMIs.
pub(super) const NMI_UNBLOCKED: u32 = 1 << 12;
/// Error-code-valid bit of interruption-information fields.
pub(super) const HAS_ERROR: u32 = 1 << 11;

/// Interruptibility state (Vol. 3C, "Guest Non-Register State").
pub(super) mod blocking {
    pub const STI: u64 = 1;
    pub const MOV_SS: u64 = 2;
    pub const NMI: u64 = 8;
}

/// Notes a VM exit of the instruction at hand; what comes back ends the instruction.
pub(crate) fn leave(cpu: &mut Vcpu, exit: Exit) -> Trap {
    cpu.vmx.exit = exit;
    Trap::VmExit
}

/// Performs the exit that a [`Trap::VmExit`] stands for. RIP is what the guest's will be.
pub(crate) fn perform(x: &mut Ctx) -> Exec {
    let mut exit = core::mem::take(&mut x.cpu.vmx.exit);
    note_nmi_unblocking(x.cpu, &mut exit);
    record(x, &exit);
    watch::exited(x, &exit);
    // Debug traps wait only where the exit came between their cause and their delivery.
    let pending = if x.cpu.mov_ss_shadow || exit.trap_like {
        pending_debug_field(x.cpu)
    } else {
        0
    };
    save_guest(x.cpu, x.now, pending);
    enlightened::store(x, Written::Exit);
    if store_msrs(x).is_none() {
        return Err(abort::abort(x, abort::STORING_MSRS));
    }
    load_host(x)
}

/// A VM entry that failed after the checks of controls and host state: reason and qualification
/// are recorded, host state is loaded, the guest state of the VMCS stays.
pub(super) fn entry_failed(
    x: &mut Ctx,
    resume: bool,
    reason: ExitReason,
    qualification: u64,
) -> Exec {
    let answer = watch::Answer::Exit {
        reason,
        qualification,
    };
    watch::entry_failed(x, resume, answer);
    let vmcs = &mut x.cpu.vmx.vmcs;
    vmcs.set(Field::VM_EXIT_REASON, u64::from(reason.0) | ENTRY_FAILURE);
    vmcs.set(Field::EXIT_QUALIFICATION, qualification);
    enlightened::store(x, Written::Failure);
    load_host(x)
}

/// Notes the NMI unblocking of an IRET that could not complete, where the exit tells (Vol. 3C,
/// "Information About NMI Unblocking Due to IRET").
fn note_nmi_unblocking(cpu: &mut Vcpu, exit: &mut Exit) {
    if !core::mem::take(&mut cpu.vmx.iret_unblocked_nmis) || cpu.vmx.vectoring.is_some() {
        return;
    }
    match ExitReason(exit.reason) {
        ExitReason::EPT_VIOLATION | ExitReason::PML_FULL => {
            exit.qualification |= u64::from(NMI_UNBLOCKED);
        }
        ExitReason::EXCEPTION_OR_NMI
            if exit.event & KIND == HARDWARE_EXCEPTION && exit.event as u8 != DOUBLE_FAULT =>
        {
            exit.event |= NMI_UNBLOCKED;
        }
        _ => {}
    }
}

fn record(x: &mut Ctx, exit: &Exit) {
    let vectoring = x.cpu.vmx.vectoring.take().filter(|_| !exit.trap_like);
    let length = match vectoring {
        Some(_) => x.cpu.vmx.vectoring_length.max(exit.instruction_length),
        None => match exit.next_rip {
            Some(next) => next.wrapping_sub(x.cpu.rip) as u32 & 0xf,
            None => exit.instruction_length,
        },
    };
    let vmcs = &mut x.cpu.vmx.vmcs;
    let synthetic = if exit.synthetic { SYNTHETIC } else { 0 };
    vmcs.set(Field::VM_EXIT_REASON, u64::from(exit.reason) | synthetic);
    vmcs.set(Field::EXIT_QUALIFICATION, exit.qualification);
    vmcs.set(Field::VM_EXIT_INTR_INFO, u64::from(exit.event));
    vmcs.set(Field::VM_EXIT_INTR_ERROR_CODE, u64::from(exit.event_error));
    let (info, code) = vectoring.unwrap_or((0, 0));
    vmcs.set(Field::IDT_VECTORING_INFO_FIELD, u64::from(info));
    vmcs.set(Field::IDT_VECTORING_ERROR_CODE, u64::from(code));
    vmcs.set(Field::VM_EXIT_INSTRUCTION_LEN, u64::from(length));
    vmcs.set(
        Field::VMX_INSTRUCTION_INFO,
        u64::from(exit.instruction_info),
    );
    if let Some(address) = exit.guest_physical {
        vmcs.set(Field::GUEST_PHYSICAL_ADDRESS, address);
    }
    if let Some(address) = exit.linear {
        vmcs.set(Field::GUEST_LINEAR_ADDRESS, address);
    }
    // The event to inject has been taken.
    let inject = vmcs.get(Field::VM_ENTRY_INTR_INFO_FIELD) & !u64::from(VALID);
    vmcs.set(Field::VM_ENTRY_INTR_INFO_FIELD, inject);
}

/// The segment registers and their fields.
pub(super) const SEGMENTS: [(Seg, GuestSegment); 8] = [
    (Seg::Es, GuestSegment::ES),
    (Seg::Cs, GuestSegment::CS),
    (Seg::Ss, GuestSegment::SS),
    (Seg::Ds, GuestSegment::DS),
    (Seg::Fs, GuestSegment::FS),
    (Seg::Gs, GuestSegment::GS),
    (Seg::Ldtr, GuestSegment::LDTR),
    (Seg::Tr, GuestSegment::TR),
];

/// Saves the guest's state in the current VMCS, with this as its pending debug exceptions.
pub(super) fn save_guest(cpu: &mut Vcpu, now: Tick, pending: u64) {
    let has = |bit| cpu.vmx.controls.exit(bit);
    let (save_debug, save_pat, save_efer) = (
        has(controls::SAVE_DEBUG_CONTROLS),
        has(controls::SAVE_IA32_PAT),
        has(controls::SAVE_IA32_EFER),
    );
    let pae = cpu.uses_pdptes();
    let rflags = cpu.flags.get();
    let mut interruptibility = 0;
    if cpu.sti_shadow {
        interruptibility |= blocking::STI;
    }
    if cpu.mov_ss_shadow {
        interruptibility |= blocking::MOV_SS;
    }
    let nmi_blocked = if cpu.vmx.controls.virtual_nmis() {
        cpu.vmx.virtual_nmi_blocking
    } else {
        cpu.nmi_blocked
    };
    if nmi_blocked {
        interruptibility |= blocking::NMI;
    }
    let activity = match cpu.activity {
        Activity::Active => 0,
        Activity::Halted => 1,
        Activity::Shutdown | Activity::VmxAbort => 2,
        Activity::WaitForSipi => 3,
    };
    let deadline = cpu.vmx.preemption_deadline;
    let preemption = deadline.map(|deadline| preemption::left(cpu, now, deadline));
    let vmcs = &mut cpu.vmx.vmcs;
    vmcs.set(Field::GUEST_CR0, cpu.cr0);
    vmcs.set(Field::GUEST_CR3, cpu.cr3);
    vmcs.set(Field::GUEST_CR4, cpu.cr4);
    vmcs.set(Field::GUEST_SYSENTER_CS, cpu.msrs.sysenter_cs);
    vmcs.set(Field::GUEST_SYSENTER_ESP, cpu.msrs.sysenter_esp);
    vmcs.set(Field::GUEST_SYSENTER_EIP, cpu.msrs.sysenter_eip);
    if save_debug {
        vmcs.set(Field::GUEST_DR7, cpu.dr7);
        vmcs.set(Field::GUEST_IA32_DEBUGCTL, cpu.msrs.debugctl);
    }
    if save_pat {
        vmcs.set(Field::GUEST_IA32_PAT, cpu.msrs.pat);
    }
    if save_efer {
        vmcs.set(Field::GUEST_IA32_EFER, cpu.msrs.efer);
    }
    for (seg, fields) in SEGMENTS {
        let segment = &cpu.segments[seg as usize];
        vmcs.set(fields.selector, u64::from(segment.selector));
        vmcs.set(fields.base, segment.base);
        vmcs.set(fields.limit, u64::from(segment.limit));
        vmcs.set(fields.rights, u64::from(segment.rights));
    }
    vmcs.set(Field::GUEST_GDTR_BASE, cpu.gdtr.base);
    vmcs.set(Field::GUEST_GDTR_LIMIT, u64::from(cpu.gdtr.limit));
    vmcs.set(Field::GUEST_IDTR_BASE, cpu.idtr.base);
    vmcs.set(Field::GUEST_IDTR_LIMIT, u64::from(cpu.idtr.limit));
    vmcs.set(Field::GUEST_RIP, cpu.rip);
    vmcs.set(Field::GUEST_RSP, cpu.gpr[reg::RSP]);
    vmcs.set(Field::GUEST_RFLAGS, rflags);
    vmcs.set(Field::GUEST_ACTIVITY_STATE, activity);
    vmcs.set(Field::GUEST_INTERRUPTIBILITY_INFO, interruptibility);
    vmcs.set(Field::GUEST_PENDING_DBG_EXCEPTIONS, pending);
    if pae && cpu.vmx.controls.eptp.is_some() {
        let fields = [
            Field::GUEST_PDPTR0,
            Field::GUEST_PDPTR1,
            Field::GUEST_PDPTR2,
            Field::GUEST_PDPTR3,
        ];
        for (field, value) in fields.into_iter().zip(cpu.pdpte) {
            vmcs.set(field, value);
        }
    }
    if let Some(left) = preemption
        && cpu
            .vmx
            .controls
            .exit(controls::SAVE_VMX_PREEMPTION_TIMER_VALUE)
    {
        vmcs.set(Field::VMX_PREEMPTION_TIMER_VALUE, left);
    }
    let mut entry_controls = vmcs.get(Field::VM_ENTRY_CONTROLS);
    entry_controls &= !u64::from(entry::IA_32E_MODE_GUEST);
    if cpu.msrs.efer & cr::EFER_LMA != 0 {
        entry_controls |= u64::from(entry::IA_32E_MODE_GUEST);
    }
    vmcs.set(Field::VM_ENTRY_CONTROLS, entry_controls);
}

/// Pending debug exceptions in the form of their field: B0-B3, enabled breakpoint (12), BS (14).
pub(super) fn pending_debug_field(cpu: &Vcpu) -> u64 {
    let pending = cpu.pending_debug;
    if pending == 0 {
        return 0;
    }
    let enabled = if pending & 0xf != 0 { 1 << 12 } else { 0 };
    pending & (0xf | crate::interrupt::DR6_BS) | enabled
}

/// Most entries of an MSR list, as IA32_VMX_MISC 27:25 recommend (0: 512).
const LIST_LIMIT: u64 = 512;

/// The VM-exit MSR-store list.
fn store_msrs(x: &mut Ctx) -> Option<()> {
    let count = x.cpu.vmx.vmcs.get(Field::VM_EXIT_MSR_STORE_COUNT);
    let list = x.cpu.vmx.vmcs.get(Field::VM_EXIT_MSR_STORE_ADDR);
    if count > LIST_LIMIT {
        return None;
    }
    // The TSC is stored as the host has it.
    x.cpu.vmx.controls.tsc_offset = 0;
    x.cpu.vmx.controls.tsc_multiplier = None;
    for n in 0..count {
        let at = list.wrapping_add(16 * n);
        let mut head = [0; 8];
        x.load_physical(at, &mut head);
        let (number, reserved) = (
            (u64::from_le_bytes(head) as u32),
            u64::from_le_bytes(head) >> 32,
        );
        // Not those of an APIC in x2APIC mode, nor of system management.
        if reserved != 0 || number >> 8 == 8 || number == 0x9e {
            return None;
        }
        let value = msr::read(x, number).ok()?;
        x.store_physical(at + 8, &value.to_le_bytes());
    }
    Some(())
}

/// Loads the MSRs of a list; the number (from 1) of the first that cannot be loaded.
pub(super) fn load_msrs(x: &mut Ctx, list: u64, count: u64) -> Result<(), u64> {
    for n in 0..count {
        if n == LIST_LIMIT {
            return Err(n + 1);
        }
        let at = list.wrapping_add(16 * n);
        let mut entry = [0; 16];
        x.load_physical(at, &mut entry);
        let entry = u128::from_le_bytes(entry);
        let (number, reserved, value) = (entry as u32, (entry >> 32) as u32, (entry >> 64) as u64);
        // Not the bases of FS and GS, an APIC's in x2APIC mode, those of microcode (79H, 8BH), nor
        // those of system management.
        let refused =
            matches!(number, 0xc000_0100 | 0xc000_0101 | 0x79 | 0x8b | 0x9b) || number >> 8 == 8;
        if reserved != 0 || refused || msr::write(x, number, value).is_err() {
            return Err(n + 1);
        }
    }
    Ok(())
}

fn load_host(x: &mut Ctx) -> Exec {
    let was_long = x.cpu.vmx.vmcs.get(Field::VM_EXIT_CONTROLS) as u32;
    let long = was_long & controls::HOST_ADDRESS_SPACE_SIZE != 0;
    let exit_controls = was_long;
    if !long && x.cpu.long_mode() {
        return Err(abort::abort(x, abort::IA_32E_MODE));
    }
    let cpu = &mut *x.cpu;
    let vmcs = &cpu.vmx.vmcs;
    let word = |field| vmcs.get(field);
    // Bits that a VM exit leaves alone: ET, NW, CD and the reserved ones of CR0.
    const CR0_KEPT: u64 = cr::CR0_ET | cr::CR0_NW | cr::CR0_CD;
    cpu.cr0 = cpu.cr0 & CR0_KEPT | word(Field::HOST_CR0) & !CR0_KEPT & 0xffff_ffff;
    cpu.cr3 = word(Field::HOST_CR3);
    cpu.cr4 = word(Field::HOST_CR4);
    if long {
        cpu.cr4 |= cr::CR4_PAE;
    } else {
        cpu.cr4 &= !cr::CR4_PCIDE;
    }
    cpu.dr7 = DR7_FIXED;
    cpu.msrs.debugctl = 0;
    cpu.msrs.sysenter_cs = word(Field::HOST_IA32_SYSENTER_CS);
    cpu.msrs.sysenter_esp = word(Field::HOST_IA32_SYSENTER_ESP);
    cpu.msrs.sysenter_eip = word(Field::HOST_IA32_SYSENTER_EIP);
    let mode = cr::EFER_LMA | cr::EFER_LME;
    cpu.msrs.efer = if exit_controls & controls::LOAD_IA32_EFER != 0 {
        word(Field::HOST_IA32_EFER)
    } else if long {
        cpu.msrs.efer | mode
    } else {
        cpu.msrs.efer & !mode
    };
    if exit_controls & controls::LOAD_IA32_PAT != 0 {
        cpu.msrs.pat = word(Field::HOST_IA32_PAT);
    }
    let flat = |selector: u64, access: u32| SegmentState {
        selector: selector as u16,
        base: 0,
        limit: !0,
        rights: access | if selector == 0 { rights::UNUSABLE } else { 0 },
    };
    let code = 0x9b | rights::GRANULARITY | if long { rights::LONG } else { rights::BIG };
    let data = 0x93 | rights::GRANULARITY | rights::BIG;
    let mut segments = [SegmentState::default(); 8];
    segments[Seg::Cs as usize] = flat(word(Field::HOST_CS_SELECTOR), code);
    segments[Seg::Cs as usize].rights &= !rights::UNUSABLE;
    segments[Seg::Ss as usize] = flat(word(Field::HOST_SS_SELECTOR), data);
    segments[Seg::Ds as usize] = flat(word(Field::HOST_DS_SELECTOR), data);
    segments[Seg::Es as usize] = flat(word(Field::HOST_ES_SELECTOR), data);
    segments[Seg::Fs as usize] = flat(word(Field::HOST_FS_SELECTOR), data);
    segments[Seg::Gs as usize] = flat(word(Field::HOST_GS_SELECTOR), data);
    segments[Seg::Fs as usize].base = word(Field::HOST_FS_BASE);
    segments[Seg::Gs as usize].base = word(Field::HOST_GS_BASE);
    segments[Seg::Ldtr as usize] = SegmentState {
        rights: rights::UNUSABLE,
        ..SegmentState::default()
    };
    segments[Seg::Tr as usize] = SegmentState {
        selector: word(Field::HOST_TR_SELECTOR) as u16,
        base: word(Field::HOST_TR_BASE),
        limit: 0x67,
        rights: 0x8b,
    };
    let (gdt, idt) = (word(Field::HOST_GDTR_BASE), word(Field::HOST_IDTR_BASE));
    let (rip, rsp) = (word(Field::HOST_RIP), word(Field::HOST_RSP));
    let list = word(Field::VM_EXIT_MSR_LOAD_ADDR);
    let count = word(Field::VM_EXIT_MSR_LOAD_COUNT);
    cpu.segments = segments;
    cpu.gdtr = crate::TableState {
        base: gdt,
        limit: 0xffff,
    };
    cpu.idtr = crate::TableState {
        base: idt,
        limit: 0xffff,
    };
    cpu.rip = rip;
    cpu.gpr[reg::RSP] = rsp;
    cpu.flags.set(bit::FIXED);
    cpu.activity = Activity::Active;
    cpu.sti_shadow = false;
    cpu.mov_ss_shadow = false;
    cpu.pending_debug = 0;
    cpu.monitor = None;
    if core::mem::take(&mut cpu.vmx.nmi_exit) {
        cpu.nmi_blocked = true;
    }
    let vmx = &mut cpu.vmx;
    vmx.non_root = false;
    vmx.inject = false;
    vmx.mtf_pending = false;
    vmx.preemption_deadline = None;
    vmx.apic_write = None;
    vmx.threshold_due = false;
    vmx.virtual_interrupt = false;
    vmx.pause_loop = None;
    let keep = vmx.controls.vpid != 0;
    vmx.controls = super::Controls::default();
    let pcid = cpu.current_pcid();
    cpu.tlb.enter_host(pcid, keep);
    cpu.refresh();
    cpu.touched_outside();
    let pae = cpu.uses_pdptes();
    if pae {
        match crate::paging::load_pdptes(x.cpu, x.ram, x.cpu.cr3, &mut Marks::none()) {
            Ok(pdptes) => x.cpu.pdpte = pdptes,
            Err(_) => return Err(abort::abort(x, abort::HOST_PDPTES)),
        }
    }
    if load_msrs(x, list, count).is_err() {
        return Err(abort::abort(x, abort::LOADING_MSRS));
    }
    x.cpu.refresh();
    Ok(())
}

/// Whether an exception of the guest exits (Vol. 3C, "Exception Bitmap").
pub(crate) fn exception_exits(cpu: &Vcpu, vector: u8, error_code: Option<u16>) -> bool {
    if !cpu.vmx.non_root {
        return false;
    }
    let selected = cpu.vmx.controls.exceptions >> (vector & 31) & 1 != 0;
    if vector != 14 {
        return selected;
    }
    let vmcs = &cpu.vmx.vmcs;
    let code = u64::from(error_code.unwrap_or(0));
    let mask = vmcs.get(Field::PAGE_FAULT_ERROR_CODE_MASK);
    let equal = code & mask == vmcs.get(Field::PAGE_FAULT_ERROR_CODE_MATCH);
    selected == equal
}

/// Exit controls of the pin-based field, by event.
pub(crate) fn takes_interrupts(cpu: &Vcpu) -> bool {
    cpu.vmx.non_root && cpu.vmx.controls.pin(pin::EXTERNAL_INTERRUPT_EXITING)
}

/// NMIs exit.
pub(crate) fn takes_nmis(cpu: &Vcpu) -> bool {
    cpu.vmx.non_root && cpu.vmx.controls.pin(pin::NMI_EXITING)
}

/// The guest asked to be left when interrupts become possible.
pub(crate) fn interrupt_window(cpu: &Vcpu) -> bool {
    cpu.vmx.non_root
        && cpu.vmx.controls.proc1(proc1::INTERRUPT_WINDOW_EXITING)
        && cpu.flags.rest & bit::IF != 0
        && !cpu.sti_shadow
        && !cpu.mov_ss_shadow
}

/// As `interrupt_window`, for virtual NMIs.
pub(crate) fn nmi_window(cpu: &Vcpu) -> bool {
    cpu.vmx.non_root
        && cpu.vmx.controls.proc1(proc1::NMI_WINDOW_EXITING)
        && !cpu.vmx.virtual_nmi_blocking
        && !cpu.mov_ss_shadow
        && !cpu.sti_shadow
}

/// Whether memory goes through EPT now.
pub(crate) fn uses_ept(cpu: &Vcpu) -> bool {
    cpu.vmx.non_root && cpu.vmx.controls.proc2(proc2::ENABLE_EPT)
}
