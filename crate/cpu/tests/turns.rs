//! Several vCPUs: turns, spin-waits, and interrupts between processors.

mod support;

use hypernest_cpu::{Activity, Processor, ProcessorConfig, Ram, Stop, VcpuState};
use iced_x86::code_asm::{CodeAssembler, byte_ptr, dword_ptr, eax, ecx, edx};
use support::{CODE, DATA, HANDLERS, Nothing, long_mode};

/// Code of the second vCPU.
const OTHER: u64 = CODE + 0x1000;

type Assembled = Result<(), iced_x86::IcedError>;

fn assemble(at: u64, build: impl Fn(&mut CodeAssembler) -> Assembled) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Two vCPUs in 64-bit mode, both active, each with its code.
fn pair(first: &[u8], second: &[u8]) -> (Processor, Ram) {
    let config = ProcessorConfig {
        cpus: 2,
        ..ProcessorConfig::default()
    };
    let mut processor = Processor::new(&config).unwrap();
    let (mut ram, state) = long_mode(&processor);
    ram.write(CODE, first).unwrap();
    ram.write(OTHER, second).unwrap();
    processor.write_state(0, &state).unwrap();
    let mut other = state.clone();
    other.rip = OTHER;
    other.gpr[4] = 0x6000;
    other.apic = processor.read_state(1).apic;
    other.msrs.apic_base &= !0x100;
    processor.write_state(1, &other).unwrap();
    (processor, ram)
}

/// Waits until the byte at `DATA` is set, by PAUSE.
fn spin(a: &mut CodeAssembler) -> Assembled {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.pause()?;
    a.cmp(byte_ptr(DATA), 0)?;
    a.je(top)?;
    a.hlt()
}

#[test]
fn a_spin_wait_with_pause_hands_its_turn_over() {
    let waiter = assemble(CODE, spin);
    let setter = assemble(OTHER, |a| {
        a.mov(byte_ptr(DATA), 1)?;
        a.hlt()
    });
    let (mut processor, mut ram) = pair(&waiter, &setter);
    let stop = processor.run(&mut ram, &mut Nothing, u64::MAX);
    assert_eq!(stop, Stop::Idle);
    // Far less than one turn of spinning.
    assert!(
        processor.instructions() < 20,
        "{}",
        processor.instructions()
    );
}

/// The first vCPU sends vector 30h to the second, which counts meanwhile; both end in
/// HLT, the second in a handler.
fn talk(slice: u64) -> ([VcpuState; 2], u64) {
    let sender = assemble(CODE, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 50)?;
        a.set_label(&mut top)?;
        a.pause()?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.mov(ecx, 0x830)?; // ICR
        a.mov(edx, 1)?;
        a.mov(eax, 0x30)?;
        a.wrmsr()?;
        a.hlt()
    });
    let counter = assemble(OTHER, |a| {
        let mut top = a.create_label();
        a.sti()?;
        a.set_label(&mut top)?;
        a.inc(dword_ptr(DATA))?;
        a.pause()?;
        a.jmp(top)
    });
    let (mut processor, mut ram) = pair(&sender, &counter);
    for n in 0..2 {
        let mut state = processor.read_state(n);
        state.msrs.apic_base |= 0xc00;
        state.apic.svr = 0x1ff;
        processor.write_state(n, &state).unwrap();
    }
    loop {
        let until = processor.now() + slice;
        let stop = processor.run(&mut ram, &mut Nothing, until);
        assert_eq!(stop, Stop::Deadline);
        let states = [processor.read_state(0), processor.read_state(1)];
        if states.iter().all(|s| s.activity == Activity::Halted) {
            let counted = u32::from_le_bytes(ram.load(DATA).unwrap());
            assert!((45..60).contains(&counted), "{counted}");
            return (states, processor.instructions());
        }
    }
}

#[test]
fn an_interrupt_between_processors_arrives_at_the_same_tick_in_any_slices() {
    let reference = talk(100_000);
    let [_, second] = &reference.0;
    assert_eq!(second.rip, HANDLERS + 16 * 0x30 + 1);
    assert_eq!(second.apic.isr[1], 1 << 16);
    for slice in [1, 2, 7, 64] {
        assert!(talk(slice) == reference, "slice {slice}");
    }
}
