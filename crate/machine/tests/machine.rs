//! The machine as its users see it, with small guests in 16-bit and 64-bit code.

use std::sync::{Arc, Mutex};

use hypernest_machine::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Raw 16-bit guest at 0000:7C00.
fn real(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut asm = CodeAssembler::new(16).unwrap();
    write(&mut asm).unwrap();
    asm.assemble(0x7c00).unwrap()
}

fn small(code: &[u8]) -> MachineBuilder<'_> {
    Machine::builder().memory(1 << 20).image(code).raw()
}

/// Prints `text` byte by byte, then writes `exit` to the exit port.
fn printer(text: &str, exit: u32) -> Vec<u8> {
    real(|a| {
        a.mov(dx, 0x3f8)?;
        for byte in text.bytes() {
            a.mov(al, u32::from(byte))?;
            a.out(dx, al)?;
        }
        a.mov(al, exit)?;
        a.out(0xf4, al)
    })
}

/// Counts for ever at 0x600 while the timer interrupts at about 1 kHz and counts at 0x604.
fn ticker() -> Vec<u8> {
    real(|a| {
        let mut again = a.create_label();
        let mut begin = a.create_label();
        a.jmp(begin)?;
        a.push(ax)?;
        a.inc(dword_ptr(0x604))?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.pop(ax)?;
        a.iret()?;
        a.set_label(&mut begin)?;
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(sp, 0x7000)?;
        a.mov(word_ptr(0x20 * 4), 0x7c02)?; // after the short jump
        a.mov(word_ptr(0x20 * 4 + 2), 0)?;
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 1),
            (0x21, 0xfe),
            (0x43, 0x34),
            (0x40, 0xa9),
            (0x40, 0x04),
        ] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        a.sti()?;
        a.set_label(&mut again)?;
        a.inc(dword_ptr(0x600))?;
        a.jmp(again)
    })
}

fn count(machine: &Machine, address: u64) -> u32 {
    let mut bytes = [0; 4];
    machine.peek_physical(address, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

#[test]
fn a_guest_prints_and_exits() {
    let code = printer("hello", 0x10);
    let mut machine = small(&code).build().unwrap();
    assert_eq!(
        machine.run(&Until::end()).unwrap(),
        Stop::Exit { value: 0x10 }
    );
    assert_eq!(machine.take_serial_output(), b"hello");
    assert_eq!(machine.instructions(), Some(13));
    // The end is final.
    assert_eq!(
        machine.run(&Until::end()).unwrap(),
        Stop::Exit { value: 0x10 }
    );
    assert_eq!(machine.instructions(), Some(13));
}

#[test]
fn a_text_stops_the_run_and_the_next_run_goes_on() {
    let code = printer("one two", 0);
    let mut machine = small(&code).build().unwrap();
    let until = Until::end().text("nothing").text("one");
    assert_eq!(machine.run(&until).unwrap(), Stop::Text { index: 1 });
    assert_eq!(machine.take_serial_output(), b"one");
    assert!(machine.run(&until).unwrap().is_end());
    assert_eq!(machine.take_serial_output(), b" two");
}

#[test]
fn a_tick_stops_the_run_exactly() {
    let code = ticker();
    let mut machine = small(&code).build().unwrap();
    for tick in [1, 2, 1000, 1_234_567] {
        assert_eq!(machine.run(&Until::tick(tick)).unwrap(), Stop::Tick);
        assert_eq!(machine.now(), tick);
    }
}

#[test]
fn the_timer_interrupts_a_running_guest() {
    let code = ticker();
    let mut machine = small(&code).build().unwrap();
    machine.run(&Until::tick(20_000_000)).unwrap();
    assert!(
        (19..=20).contains(&count(&machine, 0x604)),
        "{}",
        count(&machine, 0x604)
    );
}

#[test]
fn a_breakpoint_stops_before_the_instruction_and_the_next_run_passes_it() {
    let code = printer("ab", 3);
    let mut machine = small(&code).build().unwrap();
    let until = Until::end().breakpoint(0x7c05);
    let stop = machine.run(&until).unwrap();
    assert_eq!(
        stop,
        Stop::Breakpoint {
            vcpu: 0,
            rip: 0x7c05
        }
    );
    let state = machine.read_vcpu(0).unwrap();
    assert_eq!((state.rip, state.gpr[0] as u8), (0x7c05, b'a'));
    assert_eq!(machine.take_serial_output(), b"");
    assert_eq!(machine.run(&until).unwrap(), Stop::Exit { value: 3 });
}

#[test]
fn registers_and_memory_can_be_changed() {
    let code = printer("ab", 3);
    let mut machine = small(&code).build().unwrap();
    machine.set_breakpoint(0x7c05);
    machine.run(&Until::end()).unwrap();
    let mut state = machine.read_vcpu(0).unwrap();
    state.gpr[0] = u64::from(b'X');
    machine.write_vcpu(0, &state).unwrap();
    machine.poke_virtual(0, 0x7c07, b"Y").unwrap();
    assert!(machine.clear_breakpoint(0x7c05));
    assert!(!machine.clear_breakpoint(0x7c05));
    machine.run(&Until::end()).unwrap();
    assert_eq!(machine.take_serial_output(), b"XY");
    assert!(machine.read_vcpu(1).is_err());
    assert!(machine.peek_virtual(0, 0xffff_0000, &mut [0]).is_err());
    assert!(machine.poke_physical(1 << 20, &[0]).is_err());
}

#[test]
fn nobody_left_to_wake_is_idle_and_input_wakes() {
    let code = real(|a| {
        let mut wait = a.create_label();
        a.mov(dx, 0x3f9)?;
        a.mov(al, 1)?;
        a.out(dx, al)?;
        a.set_label(&mut wait)?;
        a.cli()?;
        a.hlt()?;
        a.jmp(wait)
    });
    let mut machine = small(&code).build().unwrap();
    assert_eq!(machine.run(&Until::end()).unwrap(), Stop::Idle);
    // With a tick to reach, idle time is skipped up to it.
    assert_eq!(machine.run(&Until::tick(1 << 50)).unwrap(), Stop::Tick);
    assert_eq!(machine.now(), 1 << 50);
}

#[test]
fn every_end_is_told_apart() {
    let byte = |port: u16, value: u32| {
        real(|a| {
            a.mov(dx, u32::from(port))?;
            a.mov(al, value)?;
            a.out(dx, al)
        })
    };
    let off = real(|a| {
        a.mov(dx, 0x604)?;
        a.mov(ax, 0x3400)?;
        a.out(dx, ax)
    });
    let triple = real(|a| {
        a.lidt(ptr(0x500))?;
        a.int3()
    });
    let ends = [
        (byte(0x64, 0xfe), Stop::Reset),
        (byte(0xcf9, 6), Stop::Reset),
        (byte(0xf4, 7), Stop::Exit { value: 7 }),
        (off, Stop::PoweredOff),
        (triple, Stop::TripleFault { vcpu: 0 }),
    ];
    for (code, end) in ends {
        let mut machine = small(&code).build().unwrap();
        for _ in 0..2 {
            assert_eq!(machine.run(&Until::end()).unwrap(), end);
        }
    }
}

#[test]
fn a_vmx_abort_stops_the_machine_once() {
    // A guest whose VM exit cannot be completed: its MSR-store list names no MSR.
    const LIST: u64 = 0x7000;
    const VMCS: u64 = 0x6000;
    let code = real(|a| a.cpuid());
    let mut machine = small(&code).vmx(VmxChoice::Max).build().unwrap();
    machine.poke_physical(LIST, &[0xff; 16]).unwrap();
    let mut state = machine.read_vcpu(0).unwrap();
    state.vmx.region = Some(0x5000);
    state.vmx.current = Some(VMCS);
    state.vmx.non_root = true;
    // VM-exit MSR-store address and count.
    state.vmx.fields = vec![(0x2006, LIST), (0x400e, 1)];
    machine.write_vcpu(0, &state).unwrap();
    let stop = machine.run(&Until::end()).unwrap();
    let (vcpu, indicator) = (0, 1);
    assert_eq!(stop, Stop::VmxAbort { vcpu, indicator });
    assert_eq!(stop.word(), "vmx-abort");
    assert_eq!(
        stop.to_string(),
        "VMX abort 1 on vCPU 0: the MSR-store list of the VM exit could not be stored"
    );
    let mut left = [0; 4];
    machine.peek_physical(VMCS + 4, &mut left).unwrap();
    assert_eq!(left, [1, 0, 0, 0]);
    assert_eq!(machine.run(&Until::end()).unwrap(), Stop::Idle);
}

#[test]
fn the_same_machine_runs_the_same_whatever_the_block_length_and_the_slices() {
    let code = ticker();
    let run = |block: u32, slice: u64| {
        let mut machine = small(&code).block_length(block).build().unwrap();
        while machine.now() < 3_000_000 {
            let next = (machine.now() + slice).min(3_000_000);
            machine.run(&Until::tick(next)).unwrap();
        }
        machine.state_hash().unwrap()
    };
    let hash = run(0, u64::MAX / 2);
    for (block, slice) in [(1, 3_000_000), (7, 3_000_000), (64, 12_345), (3, 1_000)] {
        assert_eq!(
            run(block, slice),
            hash,
            "blocks of {block}, slices of {slice}"
        );
    }
}

#[test]
fn a_saved_machine_continues_elsewhere_with_equal_state() {
    let code = ticker();
    let mut first = small(&code).build().unwrap();
    first.run(&Until::tick(2_345_678)).unwrap();
    let saved = first.save().unwrap();
    let ram = first.ram().bytes().to_vec();

    let mut second = Machine::builder().memory(1 << 20).build().unwrap();
    second.ram_mut().bytes_mut().copy_from_slice(&ram);
    second.restore(&saved).unwrap();
    assert_eq!(second.state().unwrap(), saved);
    assert_eq!(second.state_hash().unwrap(), first.state_hash().unwrap());

    first.run(&Until::tick(9_000_000)).unwrap();
    second.run(&Until::tick(9_000_000)).unwrap();
    let (a, b) = (first.state().unwrap(), second.state().unwrap());
    assert!(diff(&a, &b).is_empty(), "{:#?}", diff(&a, &b));
    assert_eq!(first.state_hash().unwrap(), second.state_hash().unwrap());
}

#[test]
fn a_state_survives_being_written_and_read() {
    let code = ticker();
    let mut machine = small(&code).cpus(2).console().build().unwrap();
    machine.run(&Until::tick(1_000_000)).unwrap();
    let state = machine.state().unwrap();
    let bytes = postcard::to_allocvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<MachineState>(&bytes).unwrap(), state);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_changes_nothing() {
    let code = ticker();
    let mut machine = small(&code).build().unwrap();
    machine.run(&Until::tick(1000)).unwrap();
    let state = machine.save().unwrap();
    let before = machine.state_hash().unwrap();
    let bad: [fn(&mut MachineState); 7] = [
        |s| s.version += 1,
        |s| s.config.memory *= 2,
        |s| s.config.model.push('x'),
        |s| s.config.vmx = VmxChoice::Max,
        |s| s.vcpu.clear(),
        |s| s.vcpu[0].cr0 = 1 << 31,
        |s| s.board.custom.push(("gone".into(), vec![])),
    ];
    for (number, spoil) in bad.iter().enumerate() {
        let mut spoiled = state.clone();
        spoiled.clock.now += 1;
        spoil(&mut spoiled);
        assert!(
            machine.restore(&spoiled).is_err(),
            "spoiled in way {number}"
        );
        assert_eq!(machine.state_hash().unwrap(), before);
    }
}

#[test]
fn the_hash_sees_registers_devices_and_memory() {
    let code = ticker();
    let machine = || small(&code).build().unwrap();
    let plain = machine().state_hash().unwrap();
    assert_eq!(machine().state_hash().unwrap(), plain);
    let mut other = machine();
    other.poke_physical(0xf_ffff, &[1]).unwrap();
    assert_ne!(other.state_hash().unwrap(), plain);
    let mut other = machine();
    other.serial_input(b"x");
    assert_ne!(other.state_hash().unwrap(), plain);
    let mut other = machine();
    let mut state = other.read_vcpu(0).unwrap();
    state.gpr[15] = 1;
    other.write_vcpu(0, &state).unwrap();
    assert_ne!(other.state_hash().unwrap(), plain);
}

#[test]
fn a_difference_is_named_by_field() {
    let code = printer("ab", 0);
    let mut machine = small(&code).build().unwrap();
    let before = machine.state().unwrap();
    machine.run(&Until::tick(2)).unwrap();
    let lines: Vec<String> = diff(&before, &machine.state().unwrap())
        .iter()
        .map(Change::to_string)
        .collect();
    assert!(
        lines.contains(&"clock.now: 0x0 -> 0x2".to_owned()),
        "{lines:#?}"
    );
    assert!(
        lines.contains(&"vcpu[0].rip: 0x7c00 -> 0x7c05".to_owned()),
        "{lines:#?}"
    );
    assert!(
        lines.iter().all(|line| !line.starts_with("board")),
        "{lines:#?}"
    );
}

#[test]
fn observers_look_change_and_stop() {
    struct Upper(Arc<Mutex<Vec<u64>>>);
    impl Observer for Upper {
        fn access(&mut self, access: &mut Access, _: &mut Ram) -> Flow {
            if access.kind == AccessKind::PortWrite && access.address == 0x3f8 {
                self.0.lock().unwrap().push(access.value);
                access.value &= !0x20;
            }
            if access.value == u64::from(b'B') {
                return Flow::Stop;
            }
            Flow::Continue
        }

        fn breakpoint(&mut self, at: &mut AtBreakpoint<'_>) -> Option<Flow> {
            at.state.gpr[0] = u64::from(b'z');
            Some(Flow::Continue)
        }
    }
    let seen = Arc::new(Mutex::new(Vec::new()));
    let code = printer("abc", 0);
    let mut machine = small(&code).observer(Upper(seen.clone())).build().unwrap();
    machine.set_breakpoint(0x7c05);
    assert_eq!(machine.run(&Until::end()).unwrap(), Stop::Observer);
    assert_eq!(machine.run(&Until::end()).unwrap(), Stop::Exit { value: 0 });
    assert_eq!(machine.take_serial_output(), b"ZBC");
    assert_eq!(*seen.lock().unwrap(), b"zbc".map(u64::from));
}

#[test]
fn a_serial_sink_gets_every_byte_while_the_machine_runs() {
    let got = Arc::new(Mutex::new(Vec::<u8>::new()));
    let sink = got.clone();
    let code = printer("abc", 0);
    let mut machine = small(&code)
        .serial_sink(move |bytes| sink.lock().unwrap().extend(bytes))
        .build()
        .unwrap();
    machine.run(&Until::end().text("ab")).unwrap();
    assert_eq!(*got.lock().unwrap(), b"ab");
    assert_eq!(machine.take_serial_output(), b"");
}

#[test]
fn what_cannot_be_built_is_refused_in_one_line() {
    let code = printer("", 0);
    let errors = [
        Machine::builder().memory(0).build().err(),
        Machine::builder().memory(12345).build().err(),
        Machine::builder().memory(!0xfff).build().err(),
        Machine::builder().memory(MAX_MEMORY + 4096).build().err(),
        Machine::builder().cpus(0).build().err(),
        Machine::builder().cpus(65).build().err(),
        Machine::builder().model("486").build().err(),
        Machine::builder().command_line("x").build().err(),
        small(&code).initrd(&b"x"[..]).build().err(),
        Machine::builder().image(&b"nonsense"[..]).build().err(),
        (0..9).fold(small(&code), |b, _| b.console()).build().err(),
    ];
    for (number, error) in errors.into_iter().enumerate() {
        let text = error
            .unwrap_or_else(|| panic!("case {number} was built"))
            .to_string();
        assert!(!text.contains('\n') && text.len() > 20, "{text}");
    }
}

#[test]
fn every_cpu_starts_with_write_back_memory() {
    let code = printer("", 0);
    let machine = small(&code).cpus(2).build().unwrap();
    for vcpu in 0..2 {
        assert_eq!(machine.read_vcpu(vcpu).unwrap().msrs.mtrr_def_type, 0xc06);
    }
}

/// In virtual wire mode the 8259 pair has the vectors that firmware gives it, and a short pulse ends HLT.
#[test]
fn the_8259_interrupts_with_the_vectors_of_a_pc() {
    for (irq, vector) in [(1, 0x09), (7, 0x0f), (8, 0x70), (11, 0x73), (15, 0x77)] {
        let code = real(|a| {
            let mut begin = a.create_label();
            a.jmp(begin)?;
            a.mov(al, 1)?; // 7C02: the handler
            a.out(0xf4, al)?;
            // 7C06: all others'
            a.mov(al, 2)?;
            a.out(0xf4, al)?;
            a.set_label(&mut begin)?;
            a.xor(ax, ax)?;
            a.mov(ds, ax)?;
            a.mov(ss, ax)?;
            a.mov(sp, 0x7000)?;
            for other in 0..0x80 {
                a.mov(word_ptr(other * 4), 0x7c06)?;
            }
            a.mov(word_ptr(vector * 4), 0x7c02)?;
            a.mov(dx, 0x2000 + irq)?;
            a.mov(eax, 1)?;
            a.out(dx, eax)?;
            a.mov(eax, 0)?;
            a.out(dx, eax)?;
            a.sti()?;
            a.hlt()
        });
        let mut machine = small(&code).build().unwrap();
        let stop = machine.run(&Until::tick(1_000_000)).unwrap();
        assert!(matches!(stop, Stop::Exit { value: 1 }), "{irq}: {stop:?}");
    }
}
