//! Blocks are invisible: their length, the slices of a run, and code that changes under them.

mod support;

use hypernest_cpu::{Stop, VcpuState};
use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, al, byte_ptr, eax, ecx, edx, qword_ptr, r8, rax, rbx, rcx, rdi, rsi,
};
use support::{CODE, DATA, Nothing, machine};

const LENGTHS: [u32; 3] = [1, 7, 64];

fn assemble(build: impl Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(CODE).unwrap()
}

fn label(a: &mut CodeAssembler) -> CodeLabel {
    let mut label = a.create_label();
    a.set_label(&mut label).unwrap();
    label
}

/// Runs `code` until HLT, in slices of `slice` ticks, and gives the state and tick at the end.
fn run(code: &[u8], block_length: u32, slice: u64) -> (VcpuState, u64) {
    let (mut processor, mut ram) = machine(block_length, code);
    loop {
        let until = processor.now().saturating_add(slice);
        match processor.run(&mut ram, &mut Nothing, until) {
            Stop::Deadline => {
                if processor.read_state(0).activity == hypernest_cpu::Activity::Halted {
                    return (processor.read_state(0), processor.instructions());
                }
            }
            Stop::Idle => return (processor.read_state(0), processor.instructions()),
            other => panic!("{other:?} at {:#x}", processor.read_state(0).rip),
        }
    }
}

#[test]
fn block_length_and_slices_change_nothing() {
    let code = assemble(|a| {
        a.mov(rdi, DATA)?;
        a.mov(ecx, 300)?;
        let top = label(a);
        a.add(rax, rcx)?;
        a.imul_3(rbx, rax, 77)?;
        a.mov(qword_ptr(rdi + rcx * 8), rbx)?;
        a.adc(byte_ptr(rdi + rcx), al)?;
        a.push(rcx)?;
        a.mov(ecx, 9)?;
        a.lea(rsi, qword_ptr(rdi + 0x800))?;
        a.rep().movsb()?;
        a.sub(rdi, 9)?;
        a.pop(rcx)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
    let reference = run(&code, 1, 1);
    for length in LENGTHS {
        for slice in [1, 2, 13, 1000, u64::MAX] {
            let got = run(&code, length, slice);
            assert!(
                got == reference,
                "block length {length}, slice {slice}: {got:x?}"
            );
        }
    }
}

#[test]
fn a_store_into_the_running_block_is_seen_by_the_next_instruction() {
    // Patches the immediate of the MOV right after the store, in a loop.
    let code = assemble(|a| {
        let mut patched = a.create_label();
        a.mov(ecx, 5)?;
        a.xor(rbx, rbx)?;
        let top = label(a);
        a.lea(rdi, qword_ptr(patched))?;
        a.mov(byte_ptr(rdi + 1), 7)?;
        a.add(byte_ptr(rdi + 1), 1)?;
        a.set_label(&mut patched)?;
        a.mov(eax, 1)?;
        a.add(rbx, rax)?;
        a.mov(byte_ptr(rdi + 1), 1)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
    for length in LENGTHS {
        assert_eq!(
            run(&code, length, u64::MAX).0.gpr[3],
            40,
            "block length {length}"
        );
    }
}

#[test]
fn code_across_a_page_boundary_is_never_stale() {
    // A five-byte MOV with its last three bytes in the next page, called twice.
    let far = CODE + 0xffe - 0x10;
    let code = assemble(|a| {
        a.mov(r8, CODE + 0xffe)?;
        a.call(r8)?;
        a.mov(rbx, rax)?;
        a.mov(byte_ptr(r8 + 2), 9)?;
        a.call(r8)?;
        a.add(rbx, rax)?;
        a.hlt()
    });
    let mut image = vec![0x90; (far - CODE) as usize + 0x10];
    image[..code.len()].copy_from_slice(&code);
    image.extend([0xb8, 3, 0, 0, 0, 0xc3]);
    for length in LENGTHS {
        assert_eq!(
            run(&image, length, u64::MAX).0.gpr[3],
            3 + 0x903,
            "block length {length}"
        );
    }
}

#[test]
fn an_accessed_flag_that_is_code_is_seen_by_the_next_instruction() {
    let code = assemble(|a| {
        a.mov(rcx, 0x5_5000u64)?;
        a.mov(rax, DATA)?;
        a.mov(byte_ptr(rax + 5), 5)?;
        a.mov(edx, 3)?;
        a.mov(r8, 0x42a5u64)?;
        a.jmp(r8)
    });
    for length in LENGTHS {
        let (mut processor, mut ram) = machine(length, &code);
        // MOV RBX, [RCX], and behind it the entry that maps what it loads: ADD EDX, [RAX+5], or AND once the entry's
        // accessed flag is set; the rest of the entry changes nothing. Then HLT.
        ram.write(0x42a5, &[0x48, 0x8b, 0x19]).unwrap();
        ram.write(0x42a8, &[3, 0x50, 5, 0, 0, 0, 0, 0x71]).unwrap();
        ram.write(0x42b0, &[0, 0xf4]).unwrap();
        assert_eq!(processor.run(&mut ram, &mut Nothing, u64::MAX), Stop::Idle);
        let result = processor.read_state(0).gpr[2];
        assert_eq!(result, 3 & 5, "block length {length}");
    }
}

#[test]
fn a_device_that_writes_code_is_seen() {
    let code = assemble(|a| {
        a.mov(eax, 1)?;
        a.hlt()
    });
    let (mut processor, mut ram) = machine(64, &code);
    assert_eq!(processor.run(&mut ram, &mut Nothing, u64::MAX), Stop::Idle);
    ram.write(CODE + 1, &[42]).unwrap();
    let (_, mut state) = support::long_mode(&processor);
    state.activity = hypernest_cpu::Activity::Active;
    processor.write_state(0, &state).unwrap();
    processor.run(&mut ram, &mut Nothing, u64::MAX);
    assert_eq!(processor.read_state(0).gpr[0], 42);
}

#[test]
fn more_code_than_is_kept_decoded_runs_on() {
    // A mile of NOPs and a jump back: the cache fills in the middle of a chain of linked blocks.
    const START: u64 = 0x8_0000;
    const LENGTH: usize = 0x17_0000;
    let (mut processor, mut ram) = machine(64, &[]);
    let mut code = vec![0x90; LENGTH];
    let back = -(LENGTH as i32);
    code[LENGTH - 5] = 0xe9;
    code[LENGTH - 4..].copy_from_slice(&back.to_le_bytes());
    ram.write(START, &code).unwrap();
    let mut state = processor.read_state(0);
    state.rip = START;
    processor.write_state(0, &state).unwrap();
    let round = LENGTH as u64 - 4;
    assert_eq!(
        processor.run(&mut ram, &mut Nothing, 2 * round + 1000),
        Stop::Deadline
    );
    assert_eq!(processor.read_state(0).rip, START + 1000);
}
