//! Single-stepping on branches: TF together with IA32_DEBUGCTL.BTF.

mod support;

use hypernest_cpu::Stop;
use iced_x86::code_asm::{
    CodeAssembler, dword_ptr, dx, eax, ecx, edx, qword_ptr, r8, r9, r15, rax, rcx, rdx, rsi, rsp,
};
use support::{CODE, DATA, HANDLERS, Nothing};

const HANDLER: u64 = CODE + 0x1000;
const DEBUGCTL: u32 = 0x1d9;
const BTF: u64 = 2;
const TF: u64 = 1 << 8;

type Assembled = Result<(), iced_x86::IcedError>;

fn assemble(at: u64, build: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Notes where each #DB came from, and what it left in IA32_DEBUGCTL and DR6; sets BTF again.
fn handler(a: &mut CodeAssembler) -> Assembled {
    a.push(rax)?;
    a.push(rcx)?;
    a.push(rdx)?;
    a.mov(rax, qword_ptr(rsp + 24))?;
    a.mov(qword_ptr(r15), rax)?;
    a.mov(ecx, DEBUGCTL)?;
    a.rdmsr()?;
    a.mov(dword_ptr(r15 + 8), eax)?;
    a.mov(rax, iced_x86::code_asm::dr6)?;
    a.mov(dword_ptr(r15 + 12), eax)?;
    a.add(r15, 16)?;
    a.mov(eax, 2)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.iretq()
}

/// Every kind of branch, taken and not; and where the taken ones lead, in their order.
fn code() -> Result<(Vec<u8>, Vec<u64>), iced_x86::IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut to: Vec<_> = (0..7).map(|_| a.create_label()).collect();
    let mut skipped = a.create_label();
    a.xor(eax, eax)?;
    a.jne(skipped)?;
    a.je(to[0])?; // to the next instruction: taken all the same
    a.set_label(&mut to[0])?;
    a.nop()?;
    a.jmp(to[1])?;
    a.set_label(&mut skipped)?;
    a.hlt()?;
    a.set_label(&mut to[1])?;
    a.mov(ecx, 2)?;
    a.jrcxz(skipped)?;
    a.set_label(&mut to[2])?;
    a.nop()?;
    a.loop_(to[2])?; // once taken, once not
    a.jrcxz(to[3])?;
    a.hlt()?;
    a.set_label(&mut to[3])?;
    a.lea(rsi, qword_ptr(to[5]))?;
    a.call(to[4])?;
    a.set_label(&mut to[6])?;
    a.jmp(rsi)?;
    a.set_label(&mut to[4])?;
    a.ret()?;
    a.set_label(&mut to[5])?;
    a.mov(r8, r9)?;
    a.in_(eax, dx)?;
    a.cpuid()?;
    a.int(0x40)?; // no branch, and its handler starts without TF
    a.hlt()?;
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let done = a.assemble_options(CODE, options)?;
    let taken = [0, 1, 2, 3, 4, 6, 5];
    let taken = taken.map(|n: usize| done.label_ip(&to[n]).expect("every label is set"));
    Ok((done.inner.code_buffer, taken.to_vec()))
}

#[test]
fn with_btf_only_taken_branches_trap_and_each_trap_clears_it() {
    let (bytes, taken) = code().unwrap();
    let (mut processor, mut ram) = support::machine(64, &bytes);
    ram.write(HANDLER, &assemble(HANDLER, handler)).unwrap();
    let jump = assemble(HANDLERS + 16, |a| a.jmp(HANDLER));
    ram.write(HANDLERS + 16, &jump).unwrap();
    let mut state = processor.read_state(0);
    state.rflags |= TF;
    state.msrs.debugctl = BTF;
    state.gpr[15] = DATA;
    processor.write_state(0, &state).unwrap();
    let stop = processor.run(&mut ram, &mut Nothing, u64::MAX);
    assert_eq!(stop, Stop::Idle);

    let state = processor.read_state(0);
    assert_eq!(state.rip, HANDLERS + 16 * 0x40 + 1, "the handler of INT");
    assert_eq!(state.msrs.debugctl, BTF, "INT is no debug exception");
    let word = |at: u64| u64::from_le_bytes(ram.load(at).unwrap());
    let seen: Vec<_> = (DATA..state.gpr[15]).step_by(16).map(word).collect();
    assert_eq!(seen, taken);
    for at in (DATA..state.gpr[15]).step_by(16) {
        assert_eq!(word(at + 8) as u32, 0, "IA32_DEBUGCTL in the handler");
        assert_eq!(word(at + 8) >> 32, 0xffff_4ff0, "DR6: single step");
    }
}
