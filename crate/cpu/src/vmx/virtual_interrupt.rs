//! Virtual interrupts (Vol. 3C, "APIC Virtualization and Virtual Interrupts"): the guest interrupt
//! status, evaluation and delivery, virtualized EOI and IPIs, posted interrupts.

use hypernest_vmcs::{ExitReason, Field, pin, proc1};

use super::apic::{load, register, store};
use super::exit::{Exit, leave};
use crate::flags::bit;
use crate::interrupt;
use crate::mem::Ctx;
use crate::ram::Ram;
use crate::state::Activity;
use crate::trap::Exec;
use crate::vcpu::Vcpu;

/// The requesting virtual interrupt: the highest in VIRR, as far as the processor has been told.
fn requesting(cpu: &Vcpu) -> u8 {
    cpu.vmx.vmcs.get(Field::GUEST_INTR_STATUS) as u8
}

/// The virtual interrupt in service.
fn servicing(cpu: &Vcpu) -> u8 {
    (cpu.vmx.vmcs.get(Field::GUEST_INTR_STATUS) >> 8) as u8
}

fn set_status(cpu: &mut Vcpu, requesting: u8, servicing: u8) {
    let status = u64::from(servicing) << 8 | u64::from(requesting);
    cpu.vmx.vmcs.set(Field::GUEST_INTR_STATUS, status);
}

// ---- VISR and VIRR: 256 bits in eight registers 16 bytes apart ----

fn word_of(set: u16, vector: u8) -> u16 {
    set + (u16::from(vector) >> 5 << 4)
}

fn add(x: &mut Ctx, set: u16, vector: u8) {
    let at = word_of(set, vector);
    let word = load(x, at) | 1 << (vector & 31);
    store(x, at, word);
}

/// Takes a vector out of a set; the highest that is left, or 0.
fn remove(x: &mut Ctx, set: u16, vector: u8) -> u8 {
    let at = word_of(set, vector);
    let word = load(x, at) & !(1 << (vector & 31));
    store(x, at, word);
    for n in (0..8u8).rev() {
        let word = load(x, word_of(set, n << 5));
        if word != 0 {
            return n << 5 | word.ilog2() as u8;
        }
    }
    0
}

// ---- virtualization ----

/// Vol. 3C, "PPR Virtualization".
pub(super) fn virtualize_ppr(x: &mut Ctx) {
    let tpr = load(x, register::TPR) & 0xff;
    let servicing = u32::from(servicing(x.cpu));
    let ppr = if tpr >> 4 >= servicing >> 4 {
        tpr
    } else {
        servicing & 0xf0
    };
    store(x, register::PPR, ppr);
}

/// Vol. 3C, "Evaluation of Pending Virtual Interrupts".
pub(super) fn evaluate(x: &mut Ctx) {
    let ppr = load(x, register::PPR) as u8;
    let window = x.cpu.vmx.controls.proc1(proc1::INTERRUPT_WINDOW_EXITING);
    x.cpu.vmx.virtual_interrupt = !window && requesting(x.cpu) >> 4 > ppr >> 4;
    x.cpu.leave_block = true;
}

/// What evaluation finds in a guest that is taken up from a saved state.
pub(super) fn is_recognized(cpu: &Vcpu, ram: &Ram) -> bool {
    let controls = &cpu.vmx.controls;
    if !controls.delivers_virtual_interrupts() || controls.proc1(proc1::INTERRUPT_WINDOW_EXITING) {
        return false;
    }
    let at = controls
        .virtual_apic
        .map(|page| page + u64::from(register::PPR));
    let ppr = at
        .and_then(|at| ram.load::<1>(at).ok())
        .map_or(0xff, |[byte]| byte);
    requesting(cpu) >> 4 > ppr >> 4
}

/// What a VM entry does with a guest's virtual interrupts.
pub(super) fn enter(x: &mut Ctx) {
    if x.cpu.vmx.controls.delivers_virtual_interrupts() {
        virtualize_ppr(x);
        evaluate(x);
    }
}

/// Vol. 3C, "EOI Virtualization".
pub(super) fn virtualize_eoi(x: &mut Ctx) -> Exec {
    let vector = servicing(x.cpu);
    let next = remove(x, register::ISR, vector);
    set_status(x.cpu, requesting(x.cpu), next);
    virtualize_ppr(x);
    const EXITS: [Field; 4] = [
        Field::EOI_EXIT_BITMAP0,
        Field::EOI_EXIT_BITMAP1,
        Field::EOI_EXIT_BITMAP2,
        Field::EOI_EXIT_BITMAP3,
    ];
    let bitmap = x.cpu.vmx.vmcs.get(EXITS[usize::from(vector >> 6)]);
    if bitmap >> (vector & 63) & 1 != 0 {
        let exit = Exit {
            qualification: u64::from(vector),
            ..Exit::after(ExitReason::VIRTUALIZED_EOI)
        };
        return Err(leave(x.cpu, exit));
    }
    evaluate(x);
    Ok(())
}

/// Vol. 3C, "Self-IPI Virtualization".
pub(super) fn virtualize_self_ipi(x: &mut Ctx, vector: u8) {
    add(x, register::IRR, vector);
    let highest = requesting(x.cpu).max(vector);
    set_status(x.cpu, highest, servicing(x.cpu));
    evaluate(x);
}

// ---- delivery ----

/// A virtual interrupt is recognized and can be delivered now: also to a guest that waits in HLT.
pub(crate) fn is_deliverable(cpu: &Vcpu) -> bool {
    cpu.vmx.virtual_interrupt
        && cpu.vmx.non_root
        && cpu.flags.rest & bit::IF != 0
        && !cpu.sti_shadow
        && !cpu.mov_ss_shadow
        && matches!(cpu.activity, Activity::Active | Activity::Halted)
}

/// Vol. 3C, "Virtual-Interrupt Delivery".
pub(crate) fn deliver(x: &mut Ctx) -> Exec {
    let vector = requesting(x.cpu);
    add(x, register::ISR, vector);
    store(x, register::PPR, u32::from(vector & 0xf0));
    let next = remove(x, register::IRR, vector);
    set_status(x.cpu, next, vector);
    x.cpu.vmx.virtual_interrupt = false;
    x.cpu.activity = Activity::Active;
    interrupt::external(x, vector)?;
    x.cpu.vmx.mtf_pending |= x.cpu.vmx.traps_each_instruction();
    Ok(())
}

// ---- posted interrupts ----

/// Bits of a descriptor's physical address.
const DESCRIPTOR: u64 = 0x000f_ffff_ffff_ffc0;
/// Bits of the address of a table of pointers to descriptors.
const POINTERS: u64 = 0x000f_ffff_ffff_fff8;
/// Bytes of posted-interrupt requests at the start of a descriptor; the outstanding-notification bit
/// follows them.
const REQUESTS: u64 = 32;

/// What follows the requests in a descriptor: outstanding notification (0), suppressed notification (1),
/// notification vector (23:16), destination (63:32).
const OUTSTANDING: u64 = 1;
const SUPPRESSED: u64 = 2;

/// Posts an interrupt to another virtual processor and notifies it. False where the hypervisor has to
/// (Vol. 3C, "IPI Virtualization").
pub(super) fn virtualize_ipi(x: &mut Ctx, vector: u8, target: u32) -> bool {
    let vmcs = &x.cpu.vmx.vmcs;
    let target = u64::from(target);
    if target > vmcs.get(Field::LAST_PID_POINTER_INDEX) {
        return false;
    }
    let table = vmcs.get(Field::PID_POINTER_TABLE) & POINTERS;
    let mut bytes = [0; 8];
    x.load_physical(table + 8 * target, &mut bytes);
    let pointer = u64::from_le_bytes(bytes);
    // Valid, and nothing reserved.
    if pointer & (x.cpu.model.reserved_physical() | !DESCRIPTOR) != 1 {
        return false;
    }
    let descriptor = pointer & DESCRIPTOR;
    let at = descriptor + u64::from(vector / 8);
    let mut byte = [0];
    x.load_physical(at, &mut byte);
    x.store_physical(at, &[byte[0] | 1 << (vector % 8)]);
    x.load_physical(descriptor + REQUESTS, &mut bytes);
    let notify = u64::from_le_bytes(bytes);
    if notify & (OUTSTANDING | SUPPRESSED) == 0 {
        let noted = notify | OUTSTANDING;
        x.store_physical(descriptor + REQUESTS, &noted.to_le_bytes());
        let (vector, destination) = ((notify >> 16) as u8, (notify >> 32) as u32);
        x.cpu.apic.notify(vector, destination);
        x.cpu.vmx.notified = true;
    }
    true
}

/// Takes an acknowledged external interrupt of a guest as a notification of posted interrupts.
/// False where it is none (Vol. 3C, "Posted-Interrupt Processing").
pub(crate) fn take_posted(x: &mut Ctx, vector: u8) -> bool {
    let vmcs = &x.cpu.vmx.vmcs;
    if !x.cpu.vmx.controls.pin(pin::PROCESS_POSTED_INTERRUPTS)
        || vmcs.get(Field::POSTED_INTR_NV) & 0xff != u64::from(vector)
    {
        return false;
    }
    let descriptor = vmcs.get(Field::POSTED_INTR_DESC_ADDR) & DESCRIPTOR;
    let mut byte = [0];
    x.load_physical(descriptor + REQUESTS, &mut byte);
    x.store_physical(descriptor + REQUESTS, &[byte[0] & !1]);
    crate::apic::end_of_interrupt(x);
    x.cpu.vmx.notified = true;
    let mut highest = requesting(x.cpu);
    for n in 0..8u8 {
        let at = descriptor + 4 * u64::from(n);
        let mut bytes = [0; 4];
        x.load_physical(at, &mut bytes);
        let posted = u32::from_le_bytes(bytes);
        if posted == 0 {
            continue;
        }
        x.store_physical(at, &[0; 4]);
        let into = word_of(register::IRR, n << 5);
        let word = load(x, into) | posted;
        store(x, into, word);
        highest = highest.max(n << 5 | posted.ilog2() as u8);
    }
    set_status(x.cpu, highest, servicing(x.cpu));
    evaluate(x);
    true
}
