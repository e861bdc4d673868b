//! VMX instructions but for VM entries (Vol. 3C, "VMX Instruction Reference").

use hypernest_vmcs::enlightened::Written;
use hypernest_vmcs::{Field, Kind};
use iced_x86::{Instruction, OpKind};

use super::memory::{self, Border};
use super::{enlightened, shadow};
use crate::flags::bit;
use crate::hyperv;
use crate::mem::Ctx;
use crate::paging::Access;
use crate::trap::{Exec, GP0, UD};
use crate::vcpu::cr;
use crate::watch;

/// VM-instruction error numbers (Vol. 3C, "VM Instruction Error Numbers").
pub(super) mod error {
    pub const VMCALL_IN_ROOT: u32 = 1;
    pub const VMCLEAR_ADDRESS: u32 = 2;
    pub const VMCLEAR_VMXON_POINTER: u32 = 3;
    pub const VMLAUNCH_NOT_CLEAR: u32 = 4;
    pub const VMRESUME_NOT_LAUNCHED: u32 = 5;
    pub const VMPTRLD_ADDRESS: u32 = 9;
    pub const VMPTRLD_VMXON_POINTER: u32 = 10;
    pub const VMPTRLD_REVISION: u32 = 11;
    pub const UNSUPPORTED_FIELD: u32 = 12;
    pub const READ_ONLY_FIELD: u32 = 13;
    pub const VMXON_IN_ROOT: u32 = 15;
    pub const EVENTS_BLOCKED_BY_MOV_SS: u32 = 26;
    pub const INVEPT_OPERAND: u32 = 28;
}

/// IA32_FEATURE_CONTROL: locked, VMX outside SMX.
const FEATURE_LOCK: u64 = 1;
const FEATURE_VMX: u64 = 1 << 2;
/// IA32_VMX_MISC: VMWRITE to any field.
const MISC_VMWRITE_ANY: u64 = 1 << 29;

/// VMsucceed: the arithmetic flags are clear.
pub(super) fn succeed(x: &mut Ctx) {
    x.cpu.flags.set_arithmetic(0);
}

/// VMfailInvalid.
pub(super) fn fail_invalid(x: &mut Ctx) {
    x.cpu.flags.set_arithmetic(bit::CF);
}

/// VMfail: with its number where there is a current VMCS to hold it.
pub(super) fn fail(x: &mut Ctx, number: u32) {
    if x.cpu.vmx.has_vmcs() {
        x.cpu.flags.set_arithmetic(bit::ZF);
        let number = u64::from(number);
        x.cpu.vmx.vmcs.set(Field::VM_INSTRUCTION_ERROR, number);
        enlightened::store(x, Written::Failure);
    } else {
        fail_invalid(x);
    }
}

/// #UD outside VMX operation and in modes without these instructions, then #GP(0) outside level 0.
/// VM exits of non-root operation came before.
pub(super) fn enter(x: &Ctx) -> Exec {
    need_mode(x)?;
    if x.cpu.vmx.region.is_none() {
        return Err(UD);
    }
    if x.cpu.cpl > 0 { Err(GP0) } else { Ok(()) }
}

/// #UD in real, virtual-8086 and compatibility mode.
fn need_mode(x: &Ctx) -> Exec {
    let compatibility = x.cpu.long_mode() && !x.cpu.is_64();
    if x.cpu.uses_paragraphs() || compatibility {
        return Err(UD);
    }
    Ok(())
}

/// The 64-bit memory operand that holds a physical address.
fn pointer(x: &mut Ctx, i: &Instruction) -> Exec<u64> {
    let linear = x.memory(i, 8, Access::Read)?;
    let pointer = x.load::<8>(linear).map(u64::from_le_bytes)?;
    watch::operand(x, pointer);
    Ok(pointer)
}

/// A page-aligned physical address within the processor's width.
fn is_region(x: &Ctx, address: u64) -> bool {
    address & 0xfff == 0 && address & x.cpu.model.reserved_physical() == 0
}

/// VMXON.
pub(crate) fn vmxon(x: &mut Ctx, i: &Instruction) -> Exec {
    let Some(profile) = x.cpu.vmx.profile.clone() else {
        return Err(UD);
    };
    need_mode(x)?;
    if x.cpu.cr4 & cr::CR4_VMXE == 0 {
        return Err(UD);
    }
    if x.cpu.vmx.region.is_some() {
        if x.cpu.cpl > 0 {
            return Err(GP0);
        }
        fail(x, error::VMXON_IN_ROOT);
        return Ok(());
    }
    let caps = &profile.caps;
    let control = x.cpu.msrs.feature_control;
    let fixed = |value: u64, zero: u64, one: u64| value & zero == zero && value & !one == 0;
    if x.cpu.cpl > 0
        || !fixed(x.cpu.cr0, caps.cr0_fixed0, caps.cr0_fixed1)
        || !fixed(x.cpu.cr4, caps.cr4_fixed0, caps.cr4_fixed1)
        || control & (FEATURE_LOCK | FEATURE_VMX) != FEATURE_LOCK | FEATURE_VMX
    {
        return Err(GP0);
    }
    let address = pointer(x, i)?;
    if !is_region(x, address)
        || profile
            .regions()
            .map(memory::revision(x, address))
            .is_none()
    {
        fail_invalid(x);
        return Ok(());
    }
    x.cpu.vmx.region = Some(address);
    x.cpu.vmx.current = None;
    succeed(x);
    Ok(())
}

/// VMXOFF.
pub(crate) fn vmxoff(x: &mut Ctx) -> Exec {
    enter(x)?;
    memory::cross(x, Border::Vmxoff);
    enlightened::release(x);
    x.cpu.vmx.region = None;
    x.cpu.leave_block = true;
    succeed(x);
    Ok(())
}

/// VMCLEAR.
pub(crate) fn vmclear(x: &mut Ctx, i: &Instruction) -> Exec {
    enter(x)?;
    let address = pointer(x, i)?;
    if !is_region(x, address) {
        fail(x, error::VMCLEAR_ADDRESS);
    } else if x.cpu.vmx.region == Some(address) {
        fail(x, error::VMCLEAR_VMXON_POINTER);
    } else if enlightened::vmclear(x, address) {
        succeed(x);
    } else {
        memory::clear(x, address);
        succeed(x);
    }
    Ok(())
}

/// VMPTRLD. A pointer that is current already is not read again.
pub(crate) fn vmptrld(x: &mut Ctx, i: &Instruction) -> Exec {
    enter(x)?;
    let address = pointer(x, i)?;
    if enlightened::holds_vmptrld(x) {
        return Ok(());
    }
    if !is_region(x, address) {
        fail(x, error::VMPTRLD_ADDRESS);
    } else if x.cpu.vmx.region == Some(address) {
        fail(x, error::VMPTRLD_VMXON_POINTER);
    } else if memory::load(x, address) {
        succeed(x);
    } else {
        fail(x, error::VMPTRLD_REVISION);
    }
    Ok(())
}

/// VMPTRST.
pub(crate) fn vmptrst(x: &mut Ctx, i: &Instruction) -> Exec {
    enter(x)?;
    let linear = x.memory(i, 8, Access::Write)?;
    let pointer = x.cpu.vmx.current.unwrap_or(!0);
    x.store(linear, pointer.to_le_bytes())?;
    succeed(x);
    Ok(())
}

/// The field that a VMREAD or VMWRITE names, and whether its upper half is meant.
fn field(x: &Ctx, encoding: u64) -> Option<(Field, bool)> {
    let (field, high) = Field::from_encoding(u32::try_from(encoding).ok()?)?;
    x.cpu.vmx.has_field(field).then_some((field, high))
}

/// Size of the operands of VMREAD and VMWRITE, in bytes.
fn operand_size(x: &Ctx) -> usize {
    if x.cpu.is_64() { 8 } else { 4 }
}

/// The VMCS that VMREAD and VMWRITE reach.
#[derive(Clone, Copy)]
enum Reached {
    Current,
    /// The active enlightened one, which can only be read.
    Enlightened,
    /// In a guest: the one at this address.
    Shadow(u64),
}

impl Reached {
    /// `None` where there is none.
    fn now(x: &Ctx) -> Option<Reached> {
        if x.cpu.vmx.non_root {
            shadow::region(x).map(Reached::Shadow)
        } else if x.cpu.vmx.enlightened.is_some() {
            Some(Reached::Enlightened)
        } else {
            x.cpu.vmx.current.map(|_| Reached::Current)
        }
    }

    /// `None` where the field has no place.
    fn get(self, x: &mut Ctx, field: Field) -> Option<u64> {
        match self {
            Reached::Current => Some(x.cpu.vmx.vmcs.get(field)),
            Reached::Enlightened => enlightened::vmread(x, field),
            Reached::Shadow(region) => Some(shadow::read(x, region, field)),
        }
    }

    fn set(self, x: &mut Ctx, field: Field, value: u64) {
        match self {
            Reached::Current => x.cpu.vmx.vmcs.set(field, value),
            Reached::Enlightened => {}
            Reached::Shadow(region) => shadow::write(x, region, field, value),
        }
    }
}

/// VMREAD.
pub(crate) fn vmread(x: &mut Ctx, i: &Instruction) -> Exec {
    enter(x)?;
    let encoding = x.cpu.reg(i.op1_register());
    watch::operand(x, encoding);
    let Some(vmcs) = Reached::now(x) else {
        fail_invalid(x);
        return Ok(());
    };
    let Some((field, high)) = field(x, encoding) else {
        fail(x, error::UNSUPPORTED_FIELD);
        return Ok(());
    };
    let Some(mut value) = vmcs.get(x, field) else {
        fail(x, error::UNSUPPORTED_FIELD);
        return Ok(());
    };
    if high {
        value >>= 32;
    }
    let size = operand_size(x);
    if size == 4 {
        value &= 0xffff_ffff;
    }
    watch::value(x, value);
    if i.op0_kind() == OpKind::Register {
        x.cpu.set_reg(i.op0_register(), value);
    } else {
        let linear = x.memory(i, size as u64, Access::Write)?;
        x.store_sized(linear, size, value)?;
    }
    succeed(x);
    Ok(())
}

/// VMWRITE.
pub(crate) fn vmwrite(x: &mut Ctx, i: &Instruction) -> Exec {
    enter(x)?;
    let Some(vmcs) = Reached::now(x).filter(|vmcs| !matches!(vmcs, Reached::Enlightened)) else {
        fail_invalid(x);
        return Ok(());
    };
    let size = operand_size(x);
    let mut value = if i.op1_kind() == OpKind::Register {
        x.cpu.reg(i.op1_register())
    } else {
        let linear = x.memory(i, size as u64, Access::Read)?;
        x.load_sized(linear, size)?
    };
    if size == 4 {
        value &= 0xffff_ffff;
    }
    let encoding = x.cpu.reg(i.op0_register());
    watch::operand(x, encoding);
    watch::value(x, value);
    let Some((field, high)) = field(x, encoding) else {
        fail(x, error::UNSUPPORTED_FIELD);
        return Ok(());
    };
    let any = x
        .cpu
        .vmx
        .caps()
        .is_some_and(|caps| caps.misc & MISC_VMWRITE_ANY != 0);
    if field.kind() == Kind::ExitInfo && !any {
        fail(x, error::READ_ONLY_FIELD);
        return Ok(());
    }
    if high {
        let low = vmcs.get(x, field).unwrap_or(0) & 0xffff_ffff;
        vmcs.set(x, field, low | value << 32);
    } else if size == 4 && field.width() == hypernest_vmcs::Width::Bits64 {
        let upper = vmcs.get(x, field).unwrap_or(0) & !0xffff_ffff;
        vmcs.set(x, field, upper | value);
    } else {
        vmcs.set(x, field, value);
    }
    succeed(x);
    Ok(())
}

/// VMCALL that does not exit: a hypercall, where there is who takes it. Else, in root operation without
/// dual-monitor treatment, it only ever fails.
pub(crate) fn vmcall(x: &mut Ctx) -> Exec {
    if hyperv::enabled(x.cpu) {
        return hyperv::hypercall(x);
    }
    enter(x)?;
    fail(x, error::VMCALL_IN_ROOT);
    Ok(())
}

/// INVEPT and INVVPID.
pub(crate) fn invalidate(x: &mut Ctx, i: &Instruction, ept: bool) -> Exec {
    enter(x)?;
    let Some(caps) = x.cpu.vmx.caps().map(|caps| caps.ept_vpid) else {
        return Err(UD);
    };
    let supported = if ept { 1 << 20 } else { 1 << 32 };
    if caps & supported == 0 {
        return Err(UD);
    }
    let kind = x.cpu.reg(i.op0_register());
    let kind = if x.cpu.is_64() {
        kind
    } else {
        kind & 0xffff_ffff
    };
    watch::operand(x, kind);
    let linear = x.memory(i, 16, Access::Read)?;
    let low = x.load::<8>(linear).map(u64::from_le_bytes)?;
    let high = x
        .load::<8>(linear.wrapping_add(8))
        .map(u64::from_le_bytes)?;
    let done = if ept {
        invept(x, caps, kind, low, high)
    } else {
        invvpid(x, caps, kind, low, high)
    };
    if done {
        succeed(x);
    } else {
        fail(x, error::INVEPT_OPERAND);
    }
    Ok(())
}

fn invept(x: &mut Ctx, caps: u64, kind: u64, eptp: u64, high: u64) -> bool {
    match kind {
        1 if caps & 1 << 25 != 0 => {
            if high != 0 || !super::ept::pointer_is_valid(x.cpu, eptp) {
                return false;
            }
            x.cpu.tlb.forget_eptp(eptp);
        }
        2 if caps & 1 << 26 != 0 => x.cpu.tlb.flush_guests(),
        _ => return false,
    }
    x.cpu.refresh();
    true
}

fn invvpid(x: &mut Ctx, caps: u64, kind: u64, low: u64, linear: u64) -> bool {
    let supported = kind < 4 && caps >> (40 + kind) & 1 != 0;
    let vpid = low as u16;
    if !supported || low >> 16 != 0 || kind != 2 && vpid == 0 {
        return false;
    }
    match kind {
        0 if !crate::mem::canonical(linear) => return false,
        0 => x.cpu.tlb.flush_page(linear),
        2 => x.cpu.tlb.flush_guests(),
        _ => x.cpu.tlb.forget_vpid(vpid),
    }
    x.cpu.refresh();
    true
}
