//! Instructions that leave a guest (Vol. 3C, "Instructions That Cause VM Exits"), asked before each
//! instruction that goes through the checked path.
//!
//! Faults by opcode and privilege come before the exit; those of operand values and memory after.

use hypernest_vmcs::{ExitReason, Field, proc1, proc2};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::exit::{Exit, leave};
use super::{pause, shadow};
use crate::exec::control::linear_operand;
use crate::hyperv;
use crate::mem::Ctx;
use crate::trap::{Exec, UD};
use crate::vcpu::{Vcpu, cr, reg};

/// The VM exit of `i`, where the guest's controls ask for it. `Ok` otherwise: the instruction goes on.
pub(crate) fn check(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic as M;
    let controls = x.cpu.vmx.controls;
    let kernel = x.cpu.cpl == 0;
    let on = |wanted: u32| controls.proc1(wanted);
    let on2 = |wanted: u32| controls.proc2(wanted);
    let exits = match i.mnemonic() {
        M::Cpuid => Some(ExitReason::CPUID),
        M::Hlt if kernel && on(proc1::HLT_EXITING) => Some(ExitReason::HLT),
        M::Invd if kernel => Some(ExitReason::INVD),
        M::Wbinvd if kernel && on2(proc2::WBINVD_EXITING) => Some(ExitReason::WBINVD),
        M::Xsetbv if kernel && x.cpu.cr4 & cr::CR4_OSXSAVE != 0 => Some(ExitReason::XSETBV),
        M::Rdtsc if may_read_time(x.cpu) && on(proc1::RDTSC_EXITING) => Some(ExitReason::RDTSC),
        M::Rdtscp | M::Rdpid if !on2(proc2::ENABLE_RDTSCP) => return Err(UD),
        M::Rdtscp if may_read_time(x.cpu) && on(proc1::RDTSC_EXITING) => Some(ExitReason::RDTSCP),
        M::Rdpmc if (kernel || x.cpu.cr4 & cr::CR4_PCE != 0) && on(proc1::RDPMC_EXITING) => {
            Some(ExitReason::RDPMC)
        }
        M::Mwait if kernel && on(proc1::MWAIT_EXITING) => Some(ExitReason::MWAIT),
        M::Monitor if kernel && on(proc1::MONITOR_EXITING) => Some(ExitReason::MONITOR),
        M::Pause if pause::exits(x) => Some(ExitReason::PAUSE),
        M::Invlpg if kernel && on(proc1::INVLPG_EXITING) => {
            let exit = Exit {
                qualification: linear_operand(x, i),
                ..exit_of(ExitReason::INVLPG, i)
            };
            return Err(leave(x.cpu, exit));
        }
        M::Invpcid if !on2(proc2::ENABLE_INVPCID) => return Err(UD),
        M::Invpcid if kernel && on(proc1::INVLPG_EXITING) => {
            return Err(with_memory(x, i, ExitReason::INVPCID, Info::Register2));
        }
        M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64
            if !on2(proc2::ENABLE_XSAVES_XRSTORS) =>
        {
            return Err(UD);
        }
        M::Rdrand if on2(proc2::RDRAND_EXITING) => {
            return Err(random(x, i, ExitReason::RDRAND));
        }
        M::Rdseed if on2(proc2::RDSEED_EXITING) => {
            return Err(random(x, i, ExitReason::RDSEED));
        }
        M::Rdmsr if kernel => return msr(x, i, false),
        M::Wrmsr if kernel => return msr(x, i, true),
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => {
            return port(x, i);
        }
        M::Mov | M::Clts | M::Lmsw if kernel => return control_register(x, i),
        M::Lgdt | M::Sgdt | M::Lidt | M::Sidt if on2(proc2::DESCRIPTOR_TABLE_EXITING) => {
            let privileged = matches!(i.mnemonic(), M::Lgdt | M::Lidt);
            if !kernel && (privileged || x.cpu.cr4 & cr::CR4_UMIP != 0) {
                return Ok(());
            }
            let number = match i.mnemonic() {
                M::Sgdt => 0,
                M::Sidt => 1,
                M::Lgdt => 2,
                _ => 3,
            };
            return Err(with_memory(
                x,
                i,
                ExitReason::GDTR_OR_IDTR_ACCESS,
                Info::Identity(number),
            ));
        }
        M::Lldt | M::Sldt | M::Ltr | M::Str if on2(proc2::DESCRIPTOR_TABLE_EXITING) => {
            let privileged = matches!(i.mnemonic(), M::Lldt | M::Ltr);
            let real = x.cpu.uses_paragraphs();
            if real || !kernel && (privileged || x.cpu.cr4 & cr::CR4_UMIP != 0) {
                return Ok(());
            }
            let number = match i.mnemonic() {
                M::Sldt => 0,
                M::Str => 1,
                M::Lldt => 2,
                _ => 3,
            };
            return Err(with_memory(
                x,
                i,
                ExitReason::LDTR_OR_TR_ACCESS,
                Info::Identity(number),
            ));
        }
        _ => return vmx_instruction(x, i),
    };
    match exits {
        Some(reason) => Err(leave(x.cpu, exit_of(reason, i))),
        None => Ok(()),
    }
}

/// An exit at an instruction, with nothing but its length.
fn exit_of(reason: ExitReason, i: &Instruction) -> Exit {
    Exit {
        instruction_length: i.len() as u32,
        ..Exit::new(reason)
    }
}

fn may_read_time(cpu: &Vcpu) -> bool {
    cpu.cpl == 0 || cpu.cr4 & cr::CR4_TSD == 0
}

/// VMX instructions exit whatever the privilege, where they exist at all.
fn vmx_instruction(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic as M;
    let (reason, info) = match i.mnemonic() {
        M::Vmcall if hyperv::taken_from_guest(x) => return Ok(()),
        M::Vmcall => (ExitReason::VMCALL, None),
        M::Vmclear => (ExitReason::VMCLEAR, Some(Info::Memory)),
        M::Vmlaunch => (ExitReason::VMLAUNCH, None),
        M::Vmptrld => (ExitReason::VMPTRLD, Some(Info::Memory)),
        M::Vmptrst => (ExitReason::VMPTRST, Some(Info::Memory)),
        M::Vmread => (ExitReason::VMREAD, Some(Info::Read)),
        M::Vmresume => (ExitReason::VMRESUME, None),
        M::Vmwrite => (ExitReason::VMWRITE, Some(Info::Write)),
        M::Vmxoff => (ExitReason::VMXOFF, None),
        M::Vmxon => (ExitReason::VMXON, Some(Info::Memory)),
        M::Invept => (ExitReason::INVEPT, Some(Info::Register2)),
        M::Invvpid => (ExitReason::INVVPID, Some(Info::Register2)),
        _ => return Ok(()),
    };
    let field = match info {
        Some(Info::Read) => Some(x.cpu.reg(i.op1_register())),
        Some(Info::Write) => Some(x.cpu.reg(i.op0_register())),
        _ => None,
    };
    if let Some(encoding) = field
        && shadow::permits(x, i, encoding)
    {
        return Ok(());
    }
    if reason != ExitReason::VMCALL {
        let compatibility = x.cpu.long_mode() && !x.cpu.is_64();
        if x.cpu.uses_paragraphs() || compatibility {
            return Err(UD);
        }
        if reason == ExitReason::VMXON && x.cpu.cr4 & cr::CR4_VMXE == 0 {
            return Err(UD);
        }
    }
    Err(match info {
        Some(info) => with_memory(x, i, reason, info),
        None => leave(x.cpu, exit_of(reason, i)),
    })
}

// ---- VM-exit instruction information (Vol. 3C, Tables of that name) ----

/// What the information of an instruction holds beside its memory operand.
#[derive(Clone, Copy)]
enum Info {
    Memory,
    /// The register operand in 31:28: INVEPT, INVVPID, INVPCID.
    Register2,
    /// VMREAD: destination may be a register, the field's encoding is in the second.
    Read,
    /// VMWRITE: likewise for the source.
    Write,
    /// Descriptor tables: which instruction.
    Identity(u32),
}

fn number(register: Register) -> u32 {
    register.number() as u32
}

/// The exit of an instruction with a memory operand, or a register in its place.
fn with_memory(x: &mut Ctx, i: &Instruction, reason: ExitReason, info: Info) -> crate::trap::Trap {
    let (place, other) = match info {
        Info::Memory | Info::Identity(_) | Info::Read => (0, 1),
        Info::Register2 | Info::Write => (1, 0),
    };
    let mut word = 0;
    let mut qualification = 0;
    if i.op_kind(place) == OpKind::Register {
        word |= 1 << 10 | number(i.op_register(place)) << 3;
    } else {
        word |= memory_operand(x.cpu, i);
        qualification = i.memory_displacement64();
    }
    match info {
        Info::Register2 | Info::Read | Info::Write => {
            word |= number(i.op_register(other)) << 28;
        }
        Info::Identity(instruction) => {
            word |= instruction << 28;
            let wide = match reason {
                ExitReason::GDTR_OR_IDTR_ACCESS => x.cpu.code_size.bits() != 16,
                _ => false,
            };
            word |= u32::from(wide) << 11;
        }
        Info::Memory => {}
    }
    let exit = Exit {
        qualification,
        instruction_info: word,
        ..exit_of(reason, i)
    };
    leave(x.cpu, exit)
}

/// Scaling 1:0, address size 9:7, segment 17:15, index 21:18 (22: none), base 26:23 (27: none).
fn memory_operand(cpu: &Vcpu, i: &Instruction) -> u32 {
    let (base, index) = (i.memory_base(), i.memory_index());
    let register = |r: Register| r != Register::None && r.is_gpr();
    let mut word = i.memory_index_scale().trailing_zeros();
    word |= address_size(cpu, i) << 7;
    word |= segment_number(i.memory_segment()) << 15;
    if register(index) {
        word |= number(index) << 18;
    } else {
        word |= 1 << 22;
    }
    if register(base) {
        word |= number(base) << 23;
    } else {
        word |= 1 << 27;
    }
    word
}

/// 0, 1, 2 for 16, 32, 64 bits.
fn address_size(cpu: &Vcpu, i: &Instruction) -> u32 {
    let size = [i.memory_base(), i.memory_index()]
        .into_iter()
        .find(|r| *r != Register::None)
        .map_or(cpu.code_size.bits() as usize / 8, |r| r.size());
    match size {
        2 => 0,
        4 => 1,
        _ => 2,
    }
}

fn segment_number(segment: Register) -> u32 {
    match segment {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    }
}

fn random(x: &mut Ctx, i: &Instruction, reason: ExitReason) -> crate::trap::Trap {
    let size = match i.op0_register().size() {
        2 => 0,
        4 => 1,
        _ => 2,
    };
    let exit = Exit {
        instruction_info: number(i.op0_register()) << 3 | size << 11,
        ..exit_of(reason, i)
    };
    leave(x.cpu, exit)
}

// ---- MSRs and ports ----

/// A byte of a bitmap page; what is not RAM reads as ones.
pub(super) fn bitmap_byte(x: &mut Ctx, page: u64, at: u64) -> u8 {
    let mut byte = [0xff];
    x.load_physical((page & !0xfff) + at, &mut byte);
    byte[0]
}

/// RDMSR and WRMSR: by the MSR bitmaps.
fn msr(x: &mut Ctx, i: &Instruction, write: bool) -> Exec {
    let register = x.cpu.gpr[reg::RCX] as u32;
    let selected = if x.cpu.vmx.controls.proc1(proc1::USE_MSR_BITMAPS) {
        let quarter = match register {
            0..=0x1fff => Some(0),
            0xc000_0000..=0xc000_1fff => Some(1024),
            _ => None,
        };
        match quarter {
            Some(quarter) => {
                let page = x.cpu.vmx.vmcs.get(Field::MSR_BITMAP);
                let bit = u64::from(register & 0x1fff);
                let at = quarter + if write { 2048 } else { 0 } + bit / 8;
                bitmap_byte(x, page, at) >> (bit & 7) & 1 != 0
            }
            None => true,
        }
    } else {
        true
    };
    if !selected {
        return Ok(());
    }
    let reason = if write {
        ExitReason::WRMSR
    } else {
        ExitReason::RDMSR
    };
    Err(leave(x.cpu, exit_of(reason, i)))
}

/// IN, OUT, INS, OUTS.
fn port(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic as M;
    let controls = x.cpu.vmx.controls;
    let (mut port, mut immediate) = (x.cpu.gpr[reg::RDX] as u16, false);
    let string = i.is_string_instruction();
    let input = matches!(i.mnemonic(), M::In | M::Insb | M::Insw | M::Insd);
    let size: u64 = match i.mnemonic() {
        M::Insb | M::Outsb => 1,
        M::Insw | M::Outsw => 2,
        M::Insd | M::Outsd => 4,
        _ => {
            let (port_operand, data) = if input { (1, 0) } else { (0, 1) };
            if i.op_kind(port_operand) != OpKind::Register {
                (port, immediate) = (u16::from(i.immediate8()), true);
            }
            i.op_register(data).size() as u64
        }
    };
    // I/O privilege comes first: the instruction faults by itself.
    crate::exec::io::permit(x, port, size as usize)?;
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    let shape = string.then(|| crate::exec::string::Shape::of(i));
    if let Some(shape) = &shape
        && repeated
        && x.cpu.gpr[reg::RCX] & crate::operand::mask(shape.address) == 0
    {
        return Ok(());
    }
    let exits = if controls.proc1(proc1::USE_I_O_BITMAPS) {
        let last = u64::from(port) + size - 1;
        last > 0xffff
            || (u64::from(port)..=last).any(|at| {
                let field = if at < 0x8000 {
                    Field::IO_BITMAP_A
                } else {
                    Field::IO_BITMAP_B
                };
                let page = x.cpu.vmx.vmcs.get(field);
                bitmap_byte(x, page, (at & 0x7fff) / 8) >> (at & 7) & 1 != 0
            })
    } else {
        controls.proc1(proc1::UNCONDITIONAL_I_O_EXITING)
    };
    if !exits {
        return Ok(());
    }
    let mut exit = exit_of(ExitReason::IO_INSTRUCTION, i);
    exit.qualification = (size - 1)
        | u64::from(input) << 3
        | u64::from(string) << 4
        | u64::from(string && repeated) << 5
        | u64::from(immediate) << 6
        | u64::from(port) << 16;
    if let Some(shape) = shape {
        let (index, seg) = if input {
            (reg::RDI, Register::ES)
        } else {
            (reg::RSI, i.memory_segment())
        };
        let mask = crate::operand::mask(shape.address);
        let segment = crate::operand::segment_of(seg);
        let flat = x.cpu.is_64() && !matches!(segment, crate::vcpu::Seg::Fs | crate::vcpu::Seg::Gs);
        let base = if flat { 0 } else { x.cpu.seg(segment).base };
        let linear = base.wrapping_add(x.cpu.gpr[index] & mask);
        exit.linear = Some(if x.cpu.is_64() {
            linear
        } else {
            linear & 0xffff_ffff
        });
        let size = match shape.address {
            2 => 0,
            4 => 1,
            _ => 2,
        };
        exit.instruction_info = size << 7 | segment_number(seg) << 15;
    }
    Err(leave(x.cpu, exit))
}

// ---- control and debug registers ----

fn control_register(x: &mut Ctx, i: &Instruction) -> Exec {
    let controls = x.cpu.vmx.controls;
    let vmcs = &x.cpu.vmx.vmcs;
    let mask = vmcs.get(Field::CR0_GUEST_HOST_MASK);
    let shadow = vmcs.get(Field::CR0_READ_SHADOW);
    let mut exit = exit_of(ExitReason::CONTROL_REGISTER_ACCESS, i);
    match i.mnemonic() {
        Mnemonic::Clts => {
            if mask & shadow & cr::CR0_TS != 0 {
                exit.qualification = 2 << 4;
                return Err(leave(x.cpu, exit));
            }
            return Ok(());
        }
        Mnemonic::Lmsw => return lmsw(x, i, mask, shadow),
        _ => {}
    }
    let is = |n: u32, kind: fn(Register) -> bool| {
        i.op_kind(n) == OpKind::Register && kind(i.op_register(n))
    };
    let (to, special, general) = if is(0, Register::is_cr) || is(0, Register::is_dr) {
        (true, i.op0_register(), i.op1_register())
    } else if is(1, Register::is_cr) || is(1, Register::is_dr) {
        (false, i.op1_register(), i.op0_register())
    } else {
        return Ok(());
    };
    if special.is_dr() {
        return debug_register(x, i, to, special, general);
    }
    let value = x.cpu.reg(general);
    let on = |wanted: u32| controls.proc1(wanted);
    let number4 = Field::CR4_GUEST_HOST_MASK;
    let exits = match (special, to) {
        (Register::CR0, true) => (value ^ shadow) & mask != 0,
        (Register::CR4, true) => {
            (value ^ vmcs.get(Field::CR4_READ_SHADOW)) & vmcs.get(number4) != 0
        }
        (Register::CR3, true) => on(proc1::CR3_LOAD_EXITING) && !is_target(x.cpu, value),
        (Register::CR3, false) => on(proc1::CR3_STORE_EXITING),
        (Register::CR8, true) => on(proc1::CR8_LOAD_EXITING),
        (Register::CR8, false) => on(proc1::CR8_STORE_EXITING),
        _ => false,
    };
    if !exits {
        return Ok(());
    }
    let access = if to { 0 } else { 1 << 4 };
    exit.qualification = u64::from(number(special)) | access | u64::from(number(general)) << 8;
    Err(leave(x.cpu, exit))
}

/// Whether a CR3 value is one of the CR3-target values.
fn is_target(cpu: &Vcpu, value: u64) -> bool {
    let fields = [
        Field::CR3_TARGET_VALUE0,
        Field::CR3_TARGET_VALUE1,
        Field::CR3_TARGET_VALUE2,
        Field::CR3_TARGET_VALUE3,
    ];
    let vmcs = &cpu.vmx.vmcs;
    let count = vmcs.get(Field::CR3_TARGET_COUNT).min(4) as usize;
    fields[..count]
        .iter()
        .any(|field| vmcs.get(*field) == value)
}

/// LMSW changes PE (to 1), MP, EM and TS.
fn lmsw(x: &mut Ctx, i: &Instruction, mask: u64, shadow: u64) -> Exec {
    let value = x.operand(i, 0)? & 0xffff;
    let changed = (value ^ shadow) & mask & 0xe;
    let sets_pe = value & !shadow & mask & cr::CR0_PE;
    if changed == 0 && sets_pe == 0 {
        return Ok(());
    }
    let mut exit = exit_of(ExitReason::CONTROL_REGISTER_ACCESS, i);
    exit.qualification = 3 << 4 | value << 16;
    if i.op0_kind() == OpKind::Memory {
        exit.qualification |= 1 << 6;
        exit.linear = Some(linear_operand(x, i));
    }
    Err(leave(x.cpu, exit))
}

fn debug_register(
    x: &mut Ctx,
    i: &Instruction,
    to: bool,
    special: Register,
    general: Register,
) -> Exec {
    let n = number(special);
    let absent = n > 7 || (n == 4 || n == 5) && x.cpu.cr4 & cr::CR4_DE != 0;
    if absent || !x.cpu.vmx.controls.proc1(proc1::MOV_DR_EXITING) {
        return Ok(());
    }
    let mut exit = exit_of(ExitReason::MOV_DR, i);
    let direction = if to { 0 } else { 1 << 4 };
    exit.qualification = u64::from(n) | direction | u64::from(number(general)) << 8;
    Err(leave(x.cpu, exit))
}
