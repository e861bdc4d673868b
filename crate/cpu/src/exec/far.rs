//! Far JMP, CALL and RET, call gates, IRET (Vol. 2, JMP, CALL, RET, IRET; Vol. 3A, "Privilege
//! Level Checking When Transferring Program Control Between Code Segments").

use hypernest_vmcs::pin;
use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpKind};

use super::task::{self, Source};
use crate::descriptor::{Descriptor, is_null, kind, selector_code};
use crate::flags::bit;
use crate::mem::Ctx;
use crate::operand::mask;
use crate::paging::Access;
use crate::seg::{Stack, null_segment};
use crate::state::SegmentState;
use crate::trap::{Exec, Fault, GP0};
use crate::v86;
use crate::vcpu::{Seg, reg, rights};

/// A far pointer: selector, offset, operand size.
struct Pointer {
    selector: u16,
    offset: u64,
    size: usize,
}

/// The far pointer in memory that an instruction names.
pub(super) fn load_pointer(x: &mut Ctx, i: &Instruction) -> Exec<(u16, u64)> {
    let size = match i.memory_size() {
        MemorySize::SegPtr16 => 2,
        MemorySize::SegPtr32 => 4,
        _ => 8,
    };
    let linear = x.memory(i, size as u64 + 2, Access::Read)?;
    let offset = x.load_sized(linear, size)?;
    let selector = x.load_sized(linear.wrapping_add(size as u64), 2)?;
    Ok((selector as u16, offset))
}

fn operand(x: &mut Ctx, i: &Instruction) -> Exec<Pointer> {
    Ok(match i.op0_kind() {
        OpKind::FarBranch16 => Pointer {
            selector: i.far_branch_selector(),
            offset: u64::from(i.far_branch16()),
            size: 2,
        },
        OpKind::FarBranch32 => Pointer {
            selector: i.far_branch_selector(),
            offset: u64::from(i.far_branch32()),
            size: 4,
        },
        _ => {
            let (selector, offset) = load_pointer(x, i)?;
            let size = match i.memory_size() {
                MemorySize::SegPtr16 => 2,
                MemorySize::SegPtr32 => 4,
                _ => 8,
            };
            Pointer {
                selector,
                offset,
                size,
            }
        }
    })
}

fn gp(selector: u16) -> Fault {
    Fault::GeneralProtection(selector_code(selector))
}

/// Real and virtual-8086 mode: any selector goes, the offset must lie in the limit CS has.
fn jump_real(x: &mut Ctx, pointer: &Pointer) -> Exec {
    if pointer.offset > u64::from(x.cpu.seg(Seg::Cs).limit) {
        return Err(GP0);
    }
    x.cpu.load_paragraph(Seg::Cs, pointer.selector);
    x.cpu.rip = pointer.offset;
    x.cpu.refresh();
    Ok(())
}

/// JMP far.
pub(super) fn jmp(x: &mut Ctx, i: &Instruction) -> Exec {
    let pointer = operand(x, i)?;
    if x.cpu.uses_paragraphs() {
        return jump_real(x, &pointer);
    }
    let target = find_target(x, pointer.selector)?;
    let cpl = x.cpu.cpl;
    if target.is_code() {
        check_direct(x, pointer.selector, target)?;
        x.check_entry(target, pointer.offset, 0)?;
        let segment = x.accessed(pointer.selector, target)?;
        x.enter_code(segment, cpl, pointer.offset);
        return Ok(());
    }
    let gate = call_gate(x, pointer.selector, target, Source::Jump, i.len() as u32)?;
    if !gate.target.is_conforming() && gate.target.dpl() != cpl {
        return Err(gp(gate.selector).into());
    }
    x.check_entry(gate.target, gate.offset, 0)?;
    let segment = x.accessed(gate.selector, gate.target)?;
    x.enter_code(segment, cpl, gate.offset);
    Ok(())
}

/// CALL far.
pub(super) fn call(x: &mut Ctx, i: &Instruction) -> Exec {
    let pointer = operand(x, i)?;
    let size = pointer.size;
    let return_to = [u64::from(x.cpu.seg(Seg::Cs).selector), x.cpu.rip];
    let mut stack = x.current_stack(0);
    if x.cpu.uses_paragraphs() {
        if pointer.offset > u64::from(x.cpu.seg(Seg::Cs).limit) {
            return Err(GP0);
        }
        for value in return_to {
            stack.push(x, size, value)?;
        }
        x.cpu.gpr[reg::RSP] = stack.rsp;
        return jump_real(x, &pointer);
    }
    let target = find_target(x, pointer.selector)?;
    let cpl = x.cpu.cpl;
    if target.is_code() {
        check_direct(x, pointer.selector, target)?;
        for value in return_to {
            stack.push(x, size, value)?;
        }
        x.check_entry(target, pointer.offset, 0)?;
        let segment = x.accessed(pointer.selector, target)?;
        x.cpu.gpr[reg::RSP] = stack.rsp;
        x.enter_code(segment, cpl, pointer.offset);
        return Ok(());
    }
    let gate = call_gate(x, pointer.selector, target, Source::Call, i.len() as u32)?;
    if !gate.target.is_conforming() && gate.target.dpl() < cpl {
        return call_inner(x, &gate);
    }
    for value in return_to {
        stack.push(x, gate.size, value)?;
    }
    x.check_entry(gate.target, gate.offset, 0)?;
    let segment = x.accessed(gate.selector, gate.target)?;
    x.cpu.gpr[reg::RSP] = stack.rsp;
    x.enter_code(segment, cpl, gate.offset);
    Ok(())
}

/// CALL through a gate to a more privileged level: the stack comes from the TSS.
fn call_inner(x: &mut Ctx, gate: &Gate) -> Exec {
    let cpl = gate.target.dpl();
    let size = gate.size;
    let mut stack = if x.cpu.long_mode() {
        Stack {
            ss: null_segment(u16::from(cpl), cpl),
            rsp: x.tss_stack_pointer(4 + 8 * u64::from(cpl), 0)?,
            width: 8,
            code: 0,
        }
    } else {
        let (ss, rsp) = x.inner_stack(cpl, 0)?;
        if is_null(ss) {
            return Err(Fault::InvalidTss(0).into());
        }
        let segment = x.stack_segment_for(ss, cpl, Fault::InvalidTss)?;
        Stack::in_segment(segment, rsp, selector_code(ss))
    };
    let mut parameters = [0; 31];
    let count = if size == 8 { 0 } else { gate.parameters };
    for (n, slot) in parameters[..count].iter_mut().enumerate() {
        *slot = x.peek_stack((n * size) as u64, size)?;
    }
    let outer = [u64::from(x.cpu.seg(Seg::Ss).selector), x.cpu.gpr[reg::RSP]];
    let return_to = [u64::from(x.cpu.seg(Seg::Cs).selector), x.cpu.rip];
    x.at_privilege(cpl, |x| {
        let copied = parameters[..count].iter().rev();
        outer
            .iter()
            .chain(copied)
            .chain(&return_to)
            .try_for_each(|value| stack.push(x, size, *value))
    })?;
    x.check_entry(gate.target, gate.offset, 0)?;
    let segment = x.accessed(gate.selector, gate.target)?;
    *x.cpu.seg_mut(Seg::Ss) = stack.ss;
    x.cpu.gpr[reg::RSP] = stack.rsp;
    x.enter_code(segment, cpl, gate.offset);
    Ok(())
}

/// The descriptor a far jump or call names.
fn find_target(x: &mut Ctx, selector: u16) -> Exec<Descriptor> {
    if is_null(selector) {
        return Err(GP0);
    }
    x.descriptor(selector, gp(selector))
}

/// Checks of a code segment that is named directly.
fn check_direct(x: &Ctx, selector: u16, target: Descriptor) -> Exec {
    let cpl = x.cpu.cpl;
    let rpl = (selector & 3) as u8;
    let allowed = if target.is_conforming() {
        target.dpl() <= cpl
    } else {
        rpl <= cpl && target.dpl() == cpl
    };
    if !allowed || is_long_and_big(x, target) {
        return Err(gp(selector).into());
    }
    present(selector, target)
}

/// Code with both L and D set is reserved in IA-32e mode.
fn is_long_and_big(x: &Ctx, target: Descriptor) -> bool {
    const BOTH: u32 = rights::LONG | rights::BIG;
    x.cpu.long_mode() && target.rights() & BOTH == BOTH
}

fn present(selector: u16, descriptor: Descriptor) -> Exec {
    if descriptor.present() {
        Ok(())
    } else {
        Err(Fault::NotPresent(selector_code(selector)).into())
    }
}

/// Where a call gate leads.
struct Gate {
    selector: u16,
    target: Descriptor,
    offset: u64,
    size: usize,
    parameters: usize,
}

fn call_gate(
    x: &mut Ctx,
    selector: u16,
    gate: Descriptor,
    source: Source,
    length: u32,
) -> Exec<Gate> {
    let long = x.cpu.long_mode();
    let fault = gp(selector);
    let (cpl, rpl) = (x.cpu.cpl, (selector & 3) as u8);
    let (size, is_task) = match gate.kind() {
        _ if !gate.is_system() => return Err(fault.into()),
        kind::CALL => (if long { 8 } else { 4 }, false),
        kind::CALL16 if !long => (2, false),
        kind::TASK_GATE | kind::TSS | kind::TSS16 if !long => (0, true),
        _ => return Err(fault.into()),
    };
    if gate.dpl() < cpl || gate.dpl() < rpl {
        return Err(fault.into());
    }
    present(selector, gate)?;
    if is_task {
        return Err(task::far(x, selector, gate, source, length));
    }
    let mut offset = gate.gate_offset();
    if long {
        offset |= x.descriptor_high(selector, fault)? << 32;
    }
    let target_selector = gate.gate_selector();
    if is_null(target_selector) {
        return Err(GP0);
    }
    let fault = gp(target_selector);
    let target = x.descriptor(target_selector, fault)?;
    if !target.is_code() || target.dpl() > cpl || long && !target.is_long_code() {
        return Err(fault.into());
    }
    present(target_selector, target)?;
    Ok(Gate {
        selector: target_selector,
        target,
        offset,
        size,
        parameters: gate.gate_parameters() as usize,
    })
}

/// RETF, with its immediate if it has one.
pub(super) fn ret(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = match i.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let drop = if i.op_count() == 0 {
        0
    } else {
        u64::from(i.immediate16())
    };
    let word = size as u64;
    let offset = x.peek_stack(0, size)?;
    let selector = x.peek_stack(word, size)? as u16;
    if x.cpu.uses_paragraphs() {
        let pointer = Pointer {
            selector,
            offset,
            size,
        };
        jump_real(x, &pointer)?;
        x.drop_stack(2 * word + drop);
        return Ok(());
    }
    let (target, rpl) = return_target(x, selector)?;
    x.check_entry(target, offset, 0)?;
    if rpl == x.cpu.cpl {
        let segment = x.accessed(selector, target)?;
        x.drop_stack(2 * word + drop);
        x.enter_code(segment, rpl, offset);
        return Ok(());
    }
    let rsp = x.peek_stack(2 * word + drop, size)?;
    let ss = x.peek_stack(3 * word + drop, size)? as u16;
    let to_long = x.cpu.long_mode() && target.is_long_code();
    let stack = outer_stack(x, ss, rpl, to_long)?;
    let segment = x.accessed(selector, target)?;
    return_outer(x, segment, rpl, offset, stack, rsp, to_long);
    x.drop_stack(drop);
    Ok(())
}

/// The code segment of a return and its privilege.
fn return_target(x: &mut Ctx, selector: u16) -> Exec<(Descriptor, u8)> {
    let target = find_target(x, selector)?;
    let rpl = (selector & 3) as u8;
    let allowed = target.is_code()
        && rpl >= x.cpu.cpl
        && if target.is_conforming() {
            target.dpl() <= rpl
        } else {
            target.dpl() == rpl
        };
    if !allowed || is_long_and_big(x, target) {
        return Err(gp(selector).into());
    }
    present(selector, target)?;
    Ok((target, rpl))
}

fn outer_stack(x: &mut Ctx, selector: u16, cpl: u8, to_long: bool) -> Exec<SegmentState> {
    if is_null(selector) {
        return if to_long && cpl != 3 && (selector & 3) as u8 == cpl {
            Ok(null_segment(selector, cpl))
        } else {
            Err(GP0)
        };
    }
    x.stack_segment_for(selector, cpl, Fault::GeneralProtection)
}

/// The end of a return that loads SS:RSP.
fn return_outer(
    x: &mut Ctx,
    code: SegmentState,
    cpl: u8,
    rip: u64,
    stack: SegmentState,
    rsp: u64,
    to_long: bool,
) {
    let outer = cpl != x.cpu.cpl;
    let width = match stack.rights & rights::BIG {
        _ if to_long => 8,
        0 => 2,
        _ => 4,
    };
    *x.cpu.seg_mut(Seg::Ss) = stack;
    x.cpu.set_gpr(reg::RSP, width, rsp);
    if outer {
        x.drop_inner_segments(cpl);
    }
    x.enter_code(code, cpl, rip);
}

/// IRET, IRETD, IRETQ.
pub(super) fn iret(x: &mut Ctx, i: &Instruction) -> Exec {
    x.cpu.vmx.iret_unblocked_nmis = false;
    iret_inner(x, i)?;
    x.cpu.vmx.iret_unblocked_nmis = false;
    Ok(())
}

fn iret_inner(x: &mut Ctx, i: &Instruction) -> Exec {
    let size = match i.mnemonic() {
        Mnemonic::Iret => 2,
        Mnemonic::Iretd => 4,
        _ => 8,
    };
    // NMIs are let in again even where IRET faults.
    let cpu = &mut *x.cpu;
    let guest = cpu.vmx.non_root;
    let blocked = if guest && cpu.vmx.controls.virtual_nmis() {
        Some(&mut cpu.vmx.virtual_nmi_blocking)
    } else if guest && cpu.vmx.controls.pin(pin::NMI_EXITING) {
        // NMIs are the hypervisor's, and so is their blocking.
        None
    } else {
        Some(&mut cpu.nmi_blocked)
    };
    if let Some(blocked) = blocked
        && *blocked
    {
        *blocked = false;
        cpu.vmx.iret_unblocked_nmis = guest;
        cpu.leave_block = true;
    }
    if !x.cpu.uses_paragraphs() && x.cpu.flags.rest & bit::NT != 0 {
        return Err(if x.cpu.long_mode() {
            GP0
        } else {
            task::iret(x, i.len() as u32)
        });
    }
    let virtual_flags = v86::flags_are_virtual(x, size)?;
    let word = size as u64;
    let at_once: Option<[u64; 5]> = if size == 8 { x.peek_words() } else { None };
    let pop = |x: &mut Ctx, n: usize| match at_once {
        Some(words) => Ok(words[n]),
        None => x.peek_stack(n as u64 * word, size),
    };
    let rip = pop(x, 0)?;
    let selector = pop(x, 1)? as u16;
    let popped = pop(x, 2)?;
    let flags = if virtual_flags {
        v86::taken_flags(x, popped)?
    } else {
        returned_flags(x, popped, size)
    };
    if x.cpu.uses_paragraphs() {
        let pointer = Pointer {
            selector,
            offset: rip,
            size,
        };
        jump_real(x, &pointer)?;
        x.drop_stack(3 * word);
        x.cpu.set_rflags(flags);
        return Ok(());
    }
    if size >= 4 && popped & bit::VM != 0 && x.cpu.cpl == 0 && !x.cpu.long_mode() {
        return to_v86(x, rip, selector, flags | bit::VM);
    }
    let (target, rpl) = return_target(x, selector)?;
    let to_long = x.cpu.long_mode() && target.is_long_code();
    if rpl == x.cpu.cpl && !x.cpu.is_64() {
        x.check_entry(target, rip, 0)?;
        let segment = x.accessed(selector, target)?;
        x.drop_stack(3 * word);
        x.cpu.flags.set(flags);
        x.enter_code(segment, rpl, rip);
        return Ok(());
    }
    let rsp = pop(x, 3)?;
    let ss = pop(x, 4)? as u16;
    let stack = outer_stack(x, ss, rpl, to_long)?;
    x.check_entry(target, rip, 0)?;
    let segment = x.accessed(selector, target)?;
    x.cpu.flags.set(flags);
    return_outer(x, segment, rpl, rip, stack, rsp, to_long);
    Ok(())
}

/// IRETD from level 0 to virtual-8086 mode: all segment registers come from the stack.
fn to_v86(x: &mut Ctx, rip: u64, selector: u16, flags: u64) -> Exec {
    let mut rest = [0; 6];
    for (n, slot) in rest.iter_mut().enumerate() {
        *slot = x.peek_stack(12 + 4 * n as u64, 4)?;
    }
    if rip > 0xffff {
        return Err(GP0);
    }
    let [rsp, ss, es, ds, fs, gs] = rest;
    for (seg, selector) in [
        (Seg::Cs, u64::from(selector)),
        (Seg::Ss, ss),
        (Seg::Es, es),
        (Seg::Ds, ds),
        (Seg::Fs, fs),
        (Seg::Gs, gs),
    ] {
        *x.cpu.seg_mut(seg) = v86::segment(selector as u16);
    }
    x.cpu.set_gpr(reg::RSP, 4, rsp);
    x.cpu.rip = rip;
    x.cpu.set_rflags(flags);
    Ok(())
}

/// RFLAGS after IRET, from the image on the stack.
fn returned_flags(x: &Ctx, popped: u64, size: usize) -> u64 {
    let old = x.cpu.flags.get();
    let cpl = x.cpu.cpl;
    let mut changes = bit::ARITHMETIC | bit::TF | bit::DF | bit::NT | bit::RF | bit::AC | bit::ID;
    if cpl == 0 {
        changes |= bit::IOPL | bit::VIF | bit::VIP;
    }
    if u64::from(cpl) <= (old & bit::IOPL) >> 12 {
        changes |= bit::IF;
    }
    if !x.cpu.protected() {
        changes &= !(bit::VIF | bit::VIP);
    }
    changes &= mask(size);
    old & !changes | popped & changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CODE, Fixture, STACK, STACK0, sel};
    use crate::trap::Trap;
    use crate::vcpu::CodeSize;

    const RETFQ: [u8; 2] = [0x48, 0xcb];
    const IRETQ: [u8; 2] = [0x48, 0xcf];
    const IRETD: [u8; 1] = [0xcf];

    fn frame(f: &mut Fixture, values: &[u64]) {
        f.cpu.gpr[reg::RSP] = 0xe000;
        for (n, value) in values.iter().enumerate() {
            f.poke(0xe000 + 8 * n as u64, *value);
        }
    }

    #[test]
    fn iretq_returns_to_user_mode_with_its_flags() {
        let mut f = Fixture::long();
        let flags = bit::FIXED | bit::IF | bit::IOPL | bit::RF;
        frame(
            &mut f,
            &[0x9000, sel::CODE3.into(), flags, 0xd123, sel::DATA3.into()],
        );
        f.cpu.nmi_blocked = true;
        f.execute(&IRETQ).unwrap();
        assert_eq!((f.cpu.rip, f.cpu.cpl), (0x9000, 3));
        assert_eq!(f.cpu.gpr[reg::RSP], 0xd123);
        assert_eq!(f.cpu.flags.get(), flags);
        assert!(!f.cpu.nmi_blocked);
        assert_eq!(f.cpu.code_size, CodeSize::Bits64);
    }

    #[test]
    fn iretq_to_compatibility_mode_runs_32_bit_code() {
        let mut f = Fixture::long();
        frame(
            &mut f,
            &[0x9000, sel::CODE3_32.into(), 2, 0xd123, sel::DATA3.into()],
        );
        f.execute(&IRETQ).unwrap();
        assert_eq!(f.cpu.code_size, CodeSize::Bits32);
        assert_eq!(f.cpu.cpl, 3);
    }

    #[test]
    fn iretq_at_the_same_level_loads_the_stack_too_and_takes_a_null_ss() {
        let mut f = Fixture::long();
        frame(&mut f, &[0x9000, sel::CODE0.into(), 2, 0xd128, 0]);
        f.execute(&IRETQ).unwrap();
        assert_eq!(f.cpu.gpr[reg::RSP], 0xd128);
        assert_eq!(
            f.cpu.seg(Seg::Ss).rights & rights::UNUSABLE,
            rights::UNUSABLE
        );
        assert_eq!(f.cpu.cpl, 0);
    }

    #[test]
    fn a_bad_return_names_its_selector_and_changes_nothing() {
        let mut f = Fixture::long();
        let before = f.cpu.save();
        for (values, fault) in [
            ([0x9000, 0, 2, 0, 0], GP0),
            ([0x9000, 0x10, 2, 0, 0x10], gp(0x10).into()),
            ([0x9000, 0x78, 2, 0, 0x10], gp(0x78).into()),
            ([1 << 47, 8, 2, 0, 0x10], GP0),
            ([0x9000, sel::CODE3.into(), 2, 0, 0], GP0),
            ([0x9000, sel::CODE3.into(), 2, 0, 0x10], gp(0x10).into()),
            (
                [0x9000, 8, 2, 0, sel::ABSENT.into()],
                Trap::Fault(Fault::Stack(sel::ABSENT)),
            ),
        ] {
            frame(&mut f, &values);
            assert_eq!(f.execute(&IRETQ), Err(fault), "{values:x?}");
            f.cpu.gpr[reg::RSP] = STACK;
            assert_eq!(f.cpu.save(), before);
        }
    }

    #[test]
    fn user_iret_cannot_change_iopl_or_if() {
        let mut f = Fixture::long();
        f.enter(3);
        let ask = bit::FIXED | bit::IF | bit::IOPL | bit::CF;
        frame(
            &mut f,
            &[0x9000, sel::CODE3.into(), ask, 0xd123, sel::DATA3.into()],
        );
        f.execute(&IRETQ).unwrap();
        assert_eq!(f.cpu.flags.get(), bit::FIXED | bit::CF);
    }

    #[test]
    fn iretd_to_an_outer_level_clears_what_it_may_not_use() {
        let mut f = Fixture::protected();
        f.cpu.gpr[reg::RSP] = 0xe000;
        for (n, value) in [
            0x9000,
            u64::from(sel::CODE3),
            0x202,
            0xd000,
            sel::DATA3.into(),
        ]
        .iter()
        .enumerate()
        {
            f.ram
                .write(0xe000 + 4 * n as u64, &(*value as u32).to_le_bytes())
                .unwrap();
        }
        f.with(|x| x.load_segment(Seg::Fs, sel::DATA3)).unwrap();
        f.execute(&IRETD).unwrap();
        assert_eq!((f.cpu.cpl, f.cpu.rip), (3, 0x9000));
        assert_eq!(f.cpu.seg(Seg::Ds).selector, 0);
        assert_eq!(f.cpu.seg(Seg::Fs).selector, sel::DATA3);
        assert_eq!(f.cpu.flags.get(), 0x202);
    }

    #[test]
    fn far_jump_switches_between_64_and_32_bit_code() {
        let mut f = Fixture::long();
        f.poke(0x9100, 0x0000_7777 | u64::from(sel::OTHER0) << 32);
        f.execute(&[0xff, 0x2c, 0x25, 0x00, 0x91, 0, 0]).unwrap(); // JMP m16:32
        assert_eq!((f.cpu.rip, f.cpu.code_size), (0x7777, CodeSize::Bits32));
        f.execute(&[0xea, 0x88, 0x88, 0, 0, sel::CODE0 as u8, 0])
            .unwrap();
        assert_eq!((f.cpu.rip, f.cpu.code_size), (0x8888, CodeSize::Bits64));
    }

    #[test]
    fn retfq_goes_to_an_outer_level_and_back_is_refused() {
        let mut f = Fixture::long();
        frame(
            &mut f,
            &[0x9000, sel::CODE3.into(), 0xd000, sel::DATA3.into()],
        );
        f.execute(&RETFQ).unwrap();
        assert_eq!((f.cpu.cpl, f.cpu.gpr[reg::RSP]), (3, 0xd000));
        frame(&mut f, &[0x9000, sel::CODE0.into()]);
        assert_eq!(f.execute(&RETFQ), Err(gp(sel::CODE0).into()));
    }

    #[test]
    fn a_64_bit_call_gate_switches_to_the_inner_stack() {
        let mut f = Fixture::long();
        f.descriptor(sel::FREE, 0x7000 | u64::from(sel::CODE0) << 16 | 0xec << 40);
        f.descriptor(sel::FREE + 8, 0);
        f.enter(3);
        f.poke(0x9100, u64::from(sel::FREE) << 32);
        f.execute(&[0xff, 0x1c, 0x25, 0x00, 0x91, 0, 0]).unwrap();
        assert_eq!((f.cpu.cpl, f.cpu.rip), (0, 0x7000));
        assert_eq!(f.cpu.gpr[reg::RSP], STACK0 - 32);
        assert_eq!(f.peek(STACK0 - 32), CODE + 7);
        assert_eq!(f.peek(STACK0 - 24), sel::CODE3.into());
        assert_eq!(f.peek(STACK0 - 16), STACK);
        assert_eq!(f.peek(STACK0 - 8), sel::DATA3.into());
        // A gate less privileged than the caller's RPL or CPL is closed.
        f.descriptor(sel::FREE, 0x7000 | u64::from(sel::CODE0) << 16 | 0x8c << 40);
        f.enter(3);
        let jump = f.execute(&[0xff, 0x1c, 0x25, 0x00, 0x91, 0, 0]);
        assert_eq!(jump, Err(gp(sel::FREE).into()));
    }

    #[test]
    fn a_32_bit_call_gate_copies_parameters() {
        let mut f = Fixture::protected();
        f.descriptor(
            sel::FREE,
            0x7000 | u64::from(sel::CODE0) << 16 | 2 << 32 | 0xec << 40,
        );
        f.enter(3);
        f.poke(STACK, 0x2222_2222_1111_1111);
        f.execute(&[0x9a, 0, 0, 0, 0, sel::FREE as u8, 0]).unwrap();
        let top = STACK0 - 24;
        assert_eq!(f.cpu.gpr[reg::RSP], top);
        let pushed: [u32; 6] = core::array::from_fn(|n| f.peek32(top + 4 * n as u64));
        assert_eq!(
            pushed,
            [
                CODE as u32 + 7,
                sel::CODE3.into(),
                0x1111_1111,
                0x2222_2222,
                STACK as u32,
                sel::DATA3.into()
            ]
        );
        // RETF 8 undoes all of it.
        f.execute(&[0xca, 8, 0]).unwrap();
        assert_eq!((f.cpu.cpl, f.cpu.rip), (3, CODE + 7));
        assert_eq!(f.cpu.gpr[reg::RSP], STACK + 8);
    }

    #[test]
    fn task_switches_stop_the_machine() {
        let mut f = Fixture::protected();
        f.descriptor(sel::FREE, 0x0000_8900_3000_0067);
        let jump = f.execute(&[0xea, 0, 0, 0, 0, sel::FREE as u8, 0]);
        assert_eq!(jump, Err(Trap::Unimplemented("task switch")));
    }
}
