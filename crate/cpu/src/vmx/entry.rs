//! VM entries (Vol. 3C, "VM Entries"): checks in the manual's order, the guest state loaded, the
//! event injected.

use hypernest_vmcs::checks::Failure;
use hypernest_vmcs::{ExitReason, Field, Vmcs, entry, pin, proc2};

use super::exit::{SEGMENTS, VALID, blocking, entry_failed, load_msrs};
use super::operation::{enter, error, fail, fail_invalid};
use super::pml::Marks;
use super::{Controls, checks, enlightened, preemption};
use crate::interrupt::{self, Injected};
use crate::mem::Ctx;
use crate::state::{Activity, SegmentState};
use crate::trap::Exec;
use crate::vcpu::{Vcpu, cr, reg};
use crate::watch;

/// VMLAUNCH and VMRESUME.
pub(crate) fn vm_entry(x: &mut Ctx, resume: bool) -> Exec {
    enter(x)?;
    x.cpu.vmx.failed_check = None;
    let refused = matches!(enlightened::pick(x, resume)?, enlightened::Picked::Refused);
    if refused || !x.cpu.vmx.has_vmcs() || x.cpu.vmx.vmcs.shadow {
        fail_invalid(x);
        watch::entry_refused(x, resume);
        return Ok(());
    }
    let launched = x.cpu.vmx.vmcs.launched;
    if x.cpu.after_mov_ss {
        fail(x, error::EVENTS_BLOCKED_BY_MOV_SS);
    } else if !resume && launched {
        fail(x, error::VMLAUNCH_NOT_CLEAR);
    } else if resume && !launched {
        fail(x, error::VMRESUME_NOT_LAUNCHED);
    } else {
        x.cpu.vmx.failed_check = checks::failing(x);
        match x.cpu.vmx.failed_check.map(|check| check.failure) {
            None => return enter_guest(x, resume),
            Some(Failure::Exit33 { qualification }) => {
                let reason = ExitReason::ENTRY_FAILURE_GUEST_STATE;
                return entry_failed(x, resume, reason, u64::from(qualification));
            }
            Some(Failure::VmfailValid(number)) => fail(x, u32::from(number)),
            Some(_) => fail_invalid(x),
        }
    }
    watch::entry_refused(x, resume);
    Ok(())
}

fn enter_guest(x: &mut Ctx, resume: bool) -> Exec {
    x.cpu.vmx.vmcs.dirty = 0;
    load_guest(x);
    let vmcs = &x.cpu.vmx.vmcs;
    let list = vmcs.get(Field::VM_ENTRY_MSR_LOAD_ADDR);
    let count = vmcs.get(Field::VM_ENTRY_MSR_LOAD_COUNT);
    if let Err(number) = load_msrs(x, list, count) {
        x.cpu.vmx.non_root = false;
        return entry_failed(x, resume, ExitReason::ENTRY_FAILURE_MSR_LOADING, number);
    }
    watch::entered(x, resume);
    enlightened::entered(x);
    x.cpu.vmx.vmcs.launched = true;
    let info = x.cpu.vmx.vmcs.get(Field::VM_ENTRY_INTR_INFO_FIELD) as u32;
    x.cpu.vmx.inject = info & VALID != 0;
    super::virtual_interrupt::enter(x);
    x.cpu.refresh();
    x.cpu.touched_outside();
    Ok(())
}

fn load_guest(x: &mut Ctx) {
    let now = x.now;
    let cpu = &mut *x.cpu;
    let controls = Controls::new(&cpu.vmx.vmcs);
    let vmcs = &cpu.vmx.vmcs;
    let word = |field| vmcs.get(field);
    let entry_controls = word(Field::VM_ENTRY_CONTROLS) as u32;
    let has = |bit| entry_controls & bit != 0;
    const CR0_KEPT: u64 = cr::CR0_ET | cr::CR0_NW | cr::CR0_CD;
    cpu.cr0 = cpu.cr0 & CR0_KEPT | word(Field::GUEST_CR0) & !CR0_KEPT & 0xffff_ffff;
    if has(entry::LOAD_DEBUG_CONTROLS) {
        cpu.dr7 = word(Field::GUEST_DR7) & crate::debug::DR7_BITS | crate::save::DR7_FIXED;
        cpu.msrs.debugctl = word(Field::GUEST_IA32_DEBUGCTL);
    }
    if has(entry::LOAD_IA32_EFER) {
        cpu.msrs.efer = word(Field::GUEST_IA32_EFER);
    } else {
        cpu.msrs.efer = efer_of_mode(cpu.msrs.efer, cpu.cr0, has(entry::IA_32E_MODE_GUEST));
    }
    if has(entry::LOAD_IA32_PAT) {
        cpu.msrs.pat = word(Field::GUEST_IA32_PAT);
    }
    load_registers(cpu);
    let vmcs = &cpu.vmx.vmcs;
    let word = |field| vmcs.get(field);
    let interruptibility = word(Field::GUEST_INTERRUPTIBILITY_INFO);
    cpu.sti_shadow = interruptibility & blocking::STI != 0;
    cpu.mov_ss_shadow = interruptibility & blocking::MOV_SS != 0;
    let nmi = interruptibility & blocking::NMI != 0;
    if controls.virtual_nmis() {
        cpu.vmx.virtual_nmi_blocking = nmi;
        cpu.nmi_blocked = false;
    } else {
        cpu.nmi_blocked = nmi;
    }
    cpu.pending_debug = pending_debug(vmcs.get(Field::GUEST_PENDING_DBG_EXCEPTIONS));
    if word(Field::VM_ENTRY_INTR_INFO_FIELD) as u32 & VALID != 0 {
        // An event enters an active processor.
        cpu.activity = Activity::Active;
    }
    let pae = cpu.uses_pdptes();
    let mut pdptes = None;
    if pae && controls.proc2(proc2::ENABLE_EPT) {
        pdptes = Some(pdptes_of(&cpu.vmx.vmcs));
    }
    let timer = cpu.vmx.vmcs.get(Field::VMX_PREEMPTION_TIMER_VALUE);
    cpu.vmx.preemption_deadline = controls
        .pin(pin::ACTIVATE_VMX_PREEMPTION_TIMER)
        .then(|| preemption::deadline(cpu, now, timer));
    cpu.vmx.threshold_due = compares_threshold(cpu, &controls);
    cpu.vmx.controls = controls;
    cpu.vmx.pause_loop = None;
    cpu.vmx.non_root = true;
    let pcid = cpu.current_pcid();
    cpu.tlb.enter_guest(&controls, pcid);
    if pae && pdptes.is_none() {
        pdptes = crate::paging::load_pdptes(x.cpu, x.ram, x.cpu.cr3, &mut Marks::none()).ok();
    }
    if let Some(pdptes) = pdptes {
        x.cpu.pdpte = pdptes;
    }
    x.cpu.refresh();
}

/// Loads the registers that every VM entry loads.
pub(super) fn load_registers(cpu: &mut Vcpu) {
    let vmcs = &cpu.vmx.vmcs;
    let word = |field| vmcs.get(field);
    cpu.cr3 = word(Field::GUEST_CR3);
    cpu.cr4 = word(Field::GUEST_CR4);
    cpu.msrs.sysenter_cs = word(Field::GUEST_SYSENTER_CS);
    cpu.msrs.sysenter_esp = word(Field::GUEST_SYSENTER_ESP);
    cpu.msrs.sysenter_eip = word(Field::GUEST_SYSENTER_EIP);
    for (seg, fields) in SEGMENTS {
        cpu.segments[seg as usize] = SegmentState {
            selector: word(fields.selector) as u16,
            base: word(fields.base),
            limit: word(fields.limit) as u32,
            rights: word(fields.rights) as u32,
        };
    }
    cpu.gdtr = crate::TableState {
        base: word(Field::GUEST_GDTR_BASE),
        limit: word(Field::GUEST_GDTR_LIMIT) as u16,
    };
    cpu.idtr = crate::TableState {
        base: word(Field::GUEST_IDTR_BASE),
        limit: word(Field::GUEST_IDTR_LIMIT) as u16,
    };
    cpu.rip = word(Field::GUEST_RIP);
    cpu.gpr[reg::RSP] = word(Field::GUEST_RSP);
    cpu.flags.set(word(Field::GUEST_RFLAGS));
    cpu.activity = match word(Field::GUEST_ACTIVITY_STATE) {
        1 => Activity::Halted,
        2 => Activity::Shutdown,
        3 => Activity::WaitForSipi,
        _ => Activity::Active,
    };
}

/// IA32_EFER in a guest that does not load it: LMA is the mode, and LME too while there is paging.
pub(super) fn efer_of_mode(efer: u64, cr0: u64, long: bool) -> u64 {
    let paging = cr0 & cr::CR0_PG != 0;
    let changed = cr::EFER_LMA | if paging { cr::EFER_LME } else { 0 };
    efer & !changed | if long { changed } else { 0 }
}

/// Pending debug exceptions of their field as DR6 has them.
pub(super) fn pending_debug(field: u64) -> u64 {
    if field & (1 << 12 | interrupt::DR6_BS) != 0 {
        field & (0xf | interrupt::DR6_BS)
    } else {
        0
    }
}

/// The page-directory pointers in a VMCS.
pub(super) fn pdptes_of(vmcs: &Vmcs) -> [u64; 4] {
    [
        Field::GUEST_PDPTR0,
        Field::GUEST_PDPTR1,
        Field::GUEST_PDPTR2,
        Field::GUEST_PDPTR3,
    ]
    .map(|field| vmcs.get(field))
}

/// A VM entry with these controls compares the virtual task priority with its threshold.
pub(super) fn compares_threshold(cpu: &Vcpu, controls: &Controls) -> bool {
    controls.virtual_apic.is_some()
        && controls.apic_access.is_some()
        && !controls.delivers_virtual_interrupts()
        && matches!(cpu.activity, Activity::Active | Activity::Halted)
}

/// Delivers the event of the VM entry just made (Vol. 3C, "Event Injection").
pub(crate) fn inject(x: &mut Ctx) -> Exec {
    x.cpu.vmx.inject = false;
    watch::injected(x);
    let vmcs = &x.cpu.vmx.vmcs;
    let info = vmcs.get(Field::VM_ENTRY_INTR_INFO_FIELD) as u32;
    let code = vmcs.get(Field::VM_ENTRY_EXCEPTION_ERROR_CODE) as u32;
    let length = vmcs.get(Field::VM_ENTRY_INSTRUCTION_LEN) as u32;
    let kind = info >> 8 & 7;
    if kind == 7 {
        x.cpu.vmx.mtf_pending = true;
        return Ok(());
    }
    let event = Injected {
        vector: info as u8,
        kind,
        error_code: (info & super::exit::HAS_ERROR != 0).then_some(code),
        length,
    };
    interrupt::inject(x, event)
}
