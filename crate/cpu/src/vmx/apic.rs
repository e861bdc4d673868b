//! Virtualized APIC accesses (Vol. 3C, "APIC Virtualization and Virtual Interrupts"): CR8, the
//! APIC-access page and the MSRs of x2APIC mode, redirected to the virtual-APIC page.
//!
//! A write has effects beyond the page. They follow once the operation that wrote is complete:
//! [`after_operation`], at the next instruction boundary. Virtual interrupts themselves are in
//! [`super::virtual_interrupt`].

use hypernest_vmcs::{ExitReason, Field, proc1, proc2};

use super::exit::{Exit, leave};
use super::virtual_interrupt;
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::{Exec, GP0};
use crate::vcpu::Vcpu;

/// Offsets of registers in the virtual-APIC page.
pub(super) mod register {
    pub const TPR: u16 = 0x080;
    pub const PPR: u16 = 0x0a0;
    pub const EOI: u16 = 0x0b0;
    pub const ISR: u16 = 0x100;
    pub const IRR: u16 = 0x200;
    pub const ICR_LOW: u16 = 0x300;
    /// In x2APIC mode the destination is the upper half of the same register.
    pub const ICR_DESTINATION: u16 = 0x304;
    pub const ICR_HIGH: u16 = 0x310;
    /// Of x2APIC mode alone; no memory access reaches it.
    pub const SELF_IPI: u16 = 0x3f0;
}
use register::*;

/// MSRs of the local APIC in x2APIC mode.
const X2APIC_FIRST: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8ff;
const X2APIC_TPR: u32 = 0x808;
const X2APIC_EOI: u32 = 0x80b;
const X2APIC_ICR: u32 = 0x830;
const X2APIC_SELF_IPI: u32 = 0x83f;

/// A virtualized write whose emulation is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// Where in the page.
    pub offset: u16,
    /// Bytes.
    pub size: u8,
}

/// Exit qualification of APIC-access VM exits: bits 15:12 (Vol. 3C, "Exit Qualification for
/// APIC-Access VM Exits from Linear Accesses and Guest-Physical Accesses").
mod kind {
    pub const READ: u64 = 0;
    pub const WRITE: u64 = 1;
    pub const FETCH: u64 = 2;
    pub const EVENT: u64 = 3;
    pub const GUEST_PHYSICAL_EVENT: u64 = 10;
    pub const GUEST_PHYSICAL: u64 = 15;
}

// ---- the virtual-APIC page ----

/// Physical address of a byte of the page; the caller knows that there is one.
fn place(cpu: &Vcpu, offset: u16) -> u64 {
    cpu.vmx.controls.virtual_apic.unwrap_or(0) + u64::from(offset)
}

/// A register of the page.
pub(super) fn load(x: &mut Ctx, offset: u16) -> u32 {
    let mut bytes = [0; 4];
    x.load_physical(place(x.cpu, offset), &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Replaces a register of the page.
pub(super) fn store(x: &mut Ctx, offset: u16, value: u32) {
    x.store_physical(place(x.cpu, offset), &value.to_le_bytes());
}

/// The 8 bytes that an MSR stands for.
fn load_wide(x: &mut Ctx, offset: u16) -> u64 {
    let mut bytes = [0; 8];
    x.load_physical(place(x.cpu, offset), &mut bytes);
    u64::from_le_bytes(bytes)
}

fn store_wide(x: &mut Ctx, offset: u16, value: u64) {
    x.store_physical(place(x.cpu, offset), &value.to_le_bytes());
    note(x, offset, 8);
}

/// Notes a virtualized write, to be emulated at the end of the operation.
fn note(x: &mut Ctx, offset: u16, size: u8) {
    x.cpu.vmx.apic_write = Some(Written { offset, size });
    x.cpu.leave_block = true;
}

// ---- CR8 (Vol. 3C, "Virtualizing CR8-Based TPR Accesses") ----

/// What MOV from CR8 gives. `None` where it reads the local APIC.
pub(crate) fn read_cr8(x: &mut Ctx) -> Option<u64> {
    x.cpu.vmx.controls.virtual_apic?;
    Some(u64::from(load(x, TPR) >> 4 & 0xf))
}

/// MOV to CR8, after its checks. False where it writes the local APIC.
pub(crate) fn write_cr8(x: &mut Ctx, value: u64) -> bool {
    if x.cpu.vmx.controls.virtual_apic.is_none() {
        return false;
    }
    store(x, TPR, (value as u32) << 4);
    note(x, TPR, 4);
    true
}

// ---- MSRs (Vol. 3C, "Virtualizing MSR-Based APIC Accesses") ----

fn x2apic_register(x: &Ctx, msr: u32) -> Option<u16> {
    let virtualized = x.cpu.vmx.controls.proc2(proc2::VIRTUALIZE_X2APIC_MODE);
    (virtualized && (X2APIC_FIRST..=X2APIC_LAST).contains(&msr)).then_some((msr as u16 & 0xff) << 4)
}

/// What RDMSR gives. `None` where it operates normally.
pub(crate) fn read_msr(x: &mut Ctx, msr: u32) -> Option<u64> {
    let offset = x2apic_register(x, msr)?;
    let all = x
        .cpu
        .vmx
        .controls
        .proc2(proc2::APIC_REGISTER_VIRTUALIZATION);
    (all || msr == X2APIC_TPR).then(|| load_wide(x, offset))
}

/// WRMSR. False where it operates normally.
pub(crate) fn write_msr(x: &mut Ctx, msr: u32, value: u64) -> Exec<bool> {
    let Some(offset) = x2apic_register(x, msr) else {
        return Ok(false);
    };
    let delivers = x.cpu.vmx.controls.delivers_virtual_interrupts();
    let allowed = match msr {
        X2APIC_TPR => 0xff,
        X2APIC_EOI if delivers => 0,
        X2APIC_SELF_IPI if delivers => 0xff,
        X2APIC_ICR if x.cpu.vmx.controls.virtualizes_ipis() => !COMMAND_RESERVED,
        _ => return Ok(false),
    };
    if value & !allowed != 0 {
        return Err(GP0);
    }
    store_wide(x, offset, value);
    Ok(true)
}

// ---- the APIC-access page (Vol. 3C, "Virtualizing Memory-Mapped APIC Accesses") ----

/// Whether accesses to the page of a physical address are virtualized or exit: nothing of it may be
/// cached. What reaches the page by a physical address alone (page tables without EPT, the regions
/// and bitmaps of VMX) is memory like other, as the manual allows.
pub(crate) fn is_access_page(cpu: &Vcpu, physical: u64) -> bool {
    cpu.vmx.controls.apic_access == Some(physical & !0xfff)
}

fn access_exit(x: &mut Ctx, offset: u64, kind: u64) -> crate::trap::Trap {
    let kind = if x.cpu.vmx.vectoring.is_some() && kind != kind::FETCH {
        kind::EVENT
    } else {
        kind
    };
    let exit = Exit {
        qualification: offset | kind << 12,
        next_rip: Some(x.cpu.rip),
        ..Exit::new(ExitReason::APIC_ACCESS)
    };
    leave(x.cpu, exit)
}

/// The VM exit of a guest-physical access to the page: one that is not the translation of a linear
/// address.
pub(crate) fn guest_physical_exit(cpu: &Vcpu) -> Exit {
    let kind = if cpu.vmx.vectoring.is_some() {
        kind::GUEST_PHYSICAL_EVENT
    } else {
        kind::GUEST_PHYSICAL
    };
    Exit {
        qualification: kind << 12,
        ..Exit::new(ExitReason::APIC_ACCESS)
    }
}

/// A fetch from a physical address; those from the APIC-access page exit.
pub(crate) fn fetch(x: &mut Ctx, physical: u64) -> Exec {
    if is_access_page(x.cpu, physical) {
        return Err(access_exit(x, physical & 0xfff, kind::FETCH));
    }
    Ok(())
}

/// A data access of `size` bytes at `linear`, which translates to `pages`, of which the second counts
/// only where the access crosses into it. `None` for memory like other; else the physical
/// address in the virtual-APIC page that is accessed instead.
pub(crate) fn data(
    x: &mut Ctx,
    linear: u64,
    size: u64,
    pages: [u64; 2],
    access: Access,
) -> Exec<Option<u64>> {
    if x.cpu.vmx.controls.apic_access.is_none() {
        return Ok(None);
    }
    let crosses = (linear & 0xfff) + size > 0x1000;
    let offset = if is_access_page(x.cpu, pages[0]) {
        pages[0] & 0xfff
    } else if crosses && is_access_page(x.cpu, pages[1]) {
        0
    } else {
        return Ok(None);
    };
    let write = access == Access::Write;
    if crosses || !is_virtualized(x.cpu, offset as u16, size, write) {
        let kind = if write { kind::WRITE } else { kind::READ };
        return Err(access_exit(x, offset, kind));
    }
    Ok(Some(place(x.cpu, offset as u16)))
}

/// Notes that a store which [`data`] redirected to `physical` is done.
pub(crate) fn stored(x: &mut Ctx, physical: u64, size: u64) {
    note(x, physical as u16 & 0xfff, size as u8);
}

/// Vol. 3C, "Virtualizing Reads from the APIC-Access Page", "Determining Whether a Write Access is
/// Virtualized".
fn is_virtualized(cpu: &Vcpu, offset: u16, size: u64, write: bool) -> bool {
    let controls = &cpu.vmx.controls;
    let Some(last) = (size <= 4).then(|| offset + size as u16 - 1) else {
        return false;
    };
    if !controls.proc1(proc1::USE_TPR_SHADOW) || offset & 0xc != 0 || last & 0xc != 0 {
        return false;
    }
    // After a write the same operation may only repeat it.
    let again = cpu
        .vmx
        .apic_write
        .is_none_or(|written| write && (written.offset, u64::from(written.size)) == (offset, size));
    if !again {
        return false;
    }
    if controls.proc2(proc2::APIC_REGISTER_VIRTUALIZATION) {
        let written = matches!(
            offset >> 4,
            0x02 | 0x08 | 0x0b | 0x0d..=0x0f | 0x28 | 0x30..=0x38 | 0x3e
        );
        let read_only = matches!(offset >> 4, 0x03 | 0x10..=0x27);
        return written || !write && read_only;
    }
    let delivers = controls.delivers_virtual_interrupts();
    match offset {
        TPR => true,
        EOI => delivers,
        ICR_LOW => delivers || controls.virtualizes_ipis(),
        _ => false,
    }
}

// ---- what follows an operation ----

/// What is due at an instruction boundary before all else: the emulation of a write (Vol. 3C, "APIC-Write
/// Emulation"), and the comparison that a VM entry makes (Vol. 3C, "VM Exits Induced by the TPR
/// Threshold").
pub(crate) fn after_operation(x: &mut Ctx) -> Exec {
    let entered = core::mem::take(&mut x.cpu.vmx.threshold_due);
    let written = x.cpu.vmx.apic_write.take();
    if let Some(written) = written.filter(|_| x.cpu.vmx.non_root) {
        emulate(x, written.offset)?;
    }
    if entered { check_threshold(x) } else { Ok(()) }
}

fn emulate(x: &mut Ctx, offset: u16) -> Exec {
    let delivers = x.cpu.vmx.controls.delivers_virtual_interrupts();
    match offset {
        TPR => {
            let value = load(x, TPR) & 0xff;
            store(x, TPR, value);
            virtualize_tpr(x)
        }
        EOI if delivers => {
            store(x, EOI, 0);
            virtual_interrupt::virtualize_eoi(x)
        }
        ICR_LOW if send(x) => Ok(()),
        SELF_IPI => {
            let vector = load(x, SELF_IPI) as u8;
            if vector < 16 {
                return Err(write_exit(x, offset));
            }
            virtual_interrupt::virtualize_self_ipi(x, vector);
            Ok(())
        }
        _ if offset & !3 == ICR_HIGH => {
            let value = load(x, ICR_HIGH) & 0xff00_0000;
            store(x, ICR_HIGH, value);
            Ok(())
        }
        _ => Err(write_exit(x, offset)),
    }
}

/// Bits of an interrupt command that are zero for a fixed, edge-triggered interrupt: reserved ones,
/// trigger mode, delivery status, delivery mode.
const COMMAND_ZERO: u32 = 0xfff3_b700;
const COMMAND_LOGICAL: u32 = 1 << 11;
const COMMAND_SHORTHAND: u32 = 3 << 18;
const SHORTHAND_SELF: u32 = 1 << 18;
/// Bits that raise #GP in a WRMSR; the delivery status is not one of them.
const COMMAND_RESERVED: u64 = 0xfff3_2000;

/// Sends the interrupt that was written to the interrupt-command register. False where the
/// hypervisor has to.
fn send(x: &mut Ctx) -> bool {
    let controls = x.cpu.vmx.controls;
    let command = load(x, ICR_LOW);
    let vector = command as u8;
    if command & COMMAND_ZERO != 0 || vector < 16 {
        return false;
    }
    let wide = controls.proc2(proc2::VIRTUALIZE_X2APIC_MODE);
    if command & COMMAND_SHORTHAND == SHORTHAND_SELF {
        // An MSR of its own does this in x2APIC mode.
        if wide || !controls.delivers_virtual_interrupts() {
            return false;
        }
        virtual_interrupt::virtualize_self_ipi(x, vector);
        return true;
    }
    if !controls.virtualizes_ipis() || command & (COMMAND_SHORTHAND | COMMAND_LOGICAL) != 0 {
        return false;
    }
    let target = if wide {
        load(x, ICR_DESTINATION)
    } else {
        load(x, ICR_HIGH) >> 24
    };
    virtual_interrupt::virtualize_ipi(x, vector, target)
}

fn write_exit(x: &mut Ctx, offset: u16) -> crate::trap::Trap {
    let exit = Exit {
        qualification: u64::from(offset),
        ..Exit::after(ExitReason::APIC_WRITE)
    };
    leave(x.cpu, exit)
}

/// Vol. 3C, "TPR Virtualization".
fn virtualize_tpr(x: &mut Ctx) -> Exec {
    if !x.cpu.vmx.controls.delivers_virtual_interrupts() {
        return check_threshold(x);
    }
    virtual_interrupt::virtualize_ppr(x);
    virtual_interrupt::evaluate(x);
    Ok(())
}

fn check_threshold(x: &mut Ctx) -> Exec {
    let class = u64::from(load(x, TPR) >> 4 & 0xf);
    if class < x.cpu.vmx.vmcs.get(Field::TPR_THRESHOLD) & 0xf {
        let exit = Exit::after(ExitReason::TPR_BELOW_THRESHOLD);
        return Err(leave(x.cpu, exit));
    }
    Ok(())
}
