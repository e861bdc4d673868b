//! The Hyper-V interface: CPUID, synthetic registers, hypercalls, time, synthetic interrupts and timers.

mod support;

use hypernest_cpu::{Processor, ProcessorConfig, Ram, VmxChoice};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, eax, ecx, edx, qword_ptr, r8, rax, rcx, rdx};
use support::hypervisor::{Emit, assemble};
use support::{CODE, DATA, HANDLERS, Nothing, long_mode};

const GUEST_OS_ID: i32 = 0x4000_0000;
const HYPERCALL: i32 = 0x4000_0001;
const VP_INDEX: i32 = 0x4000_0002;
const TIME_REF_COUNT: i32 = 0x4000_0020;
const REFERENCE_TSC: i32 = 0x4000_0021;
const TSC_FREQUENCY: i32 = 0x4000_0022;
const APIC_FREQUENCY: i32 = 0x4000_0023;
const EOI: i32 = 0x4000_0070;
const ICR: i32 = 0x4000_0071;
const TPR: i32 = 0x4000_0072;
const SCONTROL: i32 = 0x4000_0080;
const SIMP: i32 = 0x4000_0083;
const EOM: i32 = 0x4000_0084;
const SINT2: i32 = 0x4000_0092;
const STIMER0_CONFIG: i32 = 0x4000_00b0;
const STIMER0_COUNT: i32 = 0x4000_00b1;
const STIMER1_CONFIG: i32 = 0x4000_00b2;
const STIMER1_COUNT: i32 = 0x4000_00b3;

/// A page for the interface, and another one.
const PAGE: u64 = 0x3_0000;
const OTHER: u64 = 0x3_1000;
/// The vector of the tests' interrupts.
const VECTOR: u64 = 0x51;

struct Guest {
    processor: Processor,
    ram: Ram,
}

impl Guest {
    fn new(cpus: u32, hyperv: bool) -> Guest {
        let config = ProcessorConfig {
            cpus,
            hyperv,
            vmx: VmxChoice::Max.profile(Default::default()).unwrap(),
            ..ProcessorConfig::default()
        };
        let processor = Processor::new(&config).unwrap();
        let (ram, state) = long_mode(&processor);
        let mut guest = Guest { processor, ram };
        for vcpu in 0..cpus as usize {
            let mut own = guest.processor.read_state(vcpu);
            let apic = own.apic.clone();
            let (msrs, hyperv) = (own.msrs, own.hyperv);
            own = state.clone();
            own.apic = apic;
            own.apic.svr = 0x1ff;
            own.msrs.apic_base = msrs.apic_base;
            own.hyperv = hyperv;
            // All but the first wait.
            own.rip = if vcpu == 0 { CODE } else { HANDLERS };
            guest.processor.write_state(vcpu, &own).unwrap();
        }
        guest
    }

    /// vCPU `vcpu` executes `emit` and halts; what it left at `DATA`.
    fn run_on(&mut self, vcpu: usize, emit: Emit) -> [u64; 4] {
        let at = CODE + 0x800 * vcpu as u64;
        let code = assemble(at, &|a| {
            emit(a)?;
            a.hlt()
        });
        self.ram.write(at, &code).unwrap();
        let mut state = self.processor.read_state(vcpu);
        state.rip = at;
        state.activity = Default::default();
        self.processor.write_state(vcpu, &state).unwrap();
        self.go(5000);
        [0, 8, 16, 24].map(|at| self.word(DATA + at))
    }

    fn run(&mut self, emit: Emit) -> [u64; 4] {
        self.run_on(0, emit)
    }

    fn go(&mut self, ticks: u64) {
        let until = self.processor.now() + ticks;
        self.processor.run(&mut self.ram, &mut Nothing, until);
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.ram.load(at).unwrap())
    }

    /// Whether it stands behind the HLT of an exception's or interrupt's handler.
    fn is_in_handler(&self, vector: u64) -> bool {
        self.processor.read_state(0).rip == HANDLERS + 16 * vector + 1
    }
}

fn write(a: &mut CodeAssembler, register: i32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, register)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// Reads a register into the `n`-th word at `DATA`.
fn read(a: &mut CodeAssembler, register: i32, n: u64) -> Result<(), IcedError> {
    a.mov(ecx, register)?;
    a.rdmsr()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.mov(qword_ptr(DATA + 8 * n), rax)
}

fn cpuid(guest: &mut Guest, leaf: u32) -> [u32; 4] {
    let words = guest.run(&|a| {
        a.mov(eax, leaf)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(qword_ptr(DATA + 8), iced_x86::code_asm::rbx)?;
        a.mov(qword_ptr(DATA + 16), rcx)?;
        a.mov(qword_ptr(DATA + 24), rdx)
    });
    words.map(|word| word as u32)
}

#[test]
fn cpuid_tells_who_it_is_and_what_it_does() {
    let mut guest = Guest::new(1, true);
    let [last, b, c, d] = cpuid(&mut guest, 0x4000_0000);
    let name: Vec<u8> = [b, c, d].into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!((last, name.as_slice()), (0x4000_000a, &b"Microsoft Hv"[..]));
    assert_eq!(cpuid(&mut guest, 0x4000_0001)[0], 0x3123_7648);
    let [features, root, _, misc] = cpuid(&mut guest, 0x4000_0003);
    assert_eq!(features >> 5 & 3, 3, "hypercalls and VP index");
    assert_eq!(
        (root, misc >> 8 & 1),
        (0, 1),
        "no root partition; frequencies"
    );
    assert_eq!(
        cpuid(&mut guest, 0x4000_0004)[0] >> 14 & 1,
        1,
        "enlightened VMCS"
    );
    assert_eq!(cpuid(&mut guest, 0x4000_000a)[0], 0x000e_0101);
    // Without VMX there is nothing of nested virtualization; without the interface nothing at all.
    let mut without = Guest::new(1, false);
    assert_ne!(cpuid(&mut without, 0x4000_0001)[0], 0x3123_7648);
    assert_eq!(cpuid(&mut guest, 1)[2] >> 31, 1);
}

#[test]
fn without_the_interface_its_registers_raise_gp() {
    for register in [GUEST_OS_ID, VP_INDEX, TIME_REF_COUNT, 0x4000_0073] {
        let mut guest = Guest::new(1, false);
        guest.run(&|a| read(a, register, 0));
        assert!(guest.is_in_handler(13), "{register:x}");
    }
    // And those that it does not have.
    let mut guest = Guest::new(1, true);
    guest.run(&|a| read(a, 0x4000_0003, 0));
    assert!(guest.is_in_handler(13));
}

#[test]
fn the_hypercall_page_needs_an_identity_and_holds_a_vmcall() {
    let mut guest = Guest::new(1, true);
    let enabled = guest.run(&|a| {
        write(a, HYPERCALL, PAGE | 1)?;
        read(a, HYPERCALL, 0)
    });
    assert_eq!((enabled[0], guest.word(PAGE)), (PAGE, 0));
    let result = guest.run(&|a| {
        write(a, GUEST_OS_ID, 0x8100_0000_0000)?;
        write(a, HYPERCALL, PAGE | 1)?;
        // A call that there is not.
        a.mov(rcx, 0x5c_u64)?;
        a.mov(rax, PAGE)?;
        a.call(rax)?;
        a.mov(qword_ptr(DATA), rax)?;
        // A flush of all processors, by registers.
        a.mov(rcx, 0x0001_0002_u64)?;
        a.xor(edx, edx)?;
        a.mov(r8, 1_u64)?;
        a.mov(rax, PAGE)?;
        a.call(rax)?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        // The input is not aligned.
        a.mov(rcx, 0x0002_u64)?;
        a.mov(rdx, PAGE + 0x101)?;
        a.mov(rax, PAGE)?;
        a.call(rax)?;
        a.mov(qword_ptr(DATA + 16), rax)
    });
    assert_eq!(guest.word(PAGE) as u32, 0xc3c1_010f);
    assert_eq!(result[..3], [2, 0, 4]);
}

#[test]
fn without_an_identity_vmcall_is_the_processors() {
    let mut guest = Guest::new(1, true);
    guest.run(&|a| a.vmcall());
    assert!(guest.is_in_handler(6), "#UD outside VMX operation");
}

#[test]
fn a_flush_by_hypercall_reaches_every_processor() {
    // Both have the page's translation; the first changes it.
    const ENTRY: u64 = 0x4000 + 8 * (PAGE >> 12);
    let mut guest = Guest::new(2, true);
    guest.ram.write(PAGE, &[1]).unwrap();
    guest.ram.write(OTHER, &[2]).unwrap();
    let look: Emit = &|a| {
        a.mov(rax, qword_ptr(PAGE))?;
        a.mov(qword_ptr(DATA), rax)
    };
    // Writing a state empties its TLB, so the second one looks for ever.
    let watch = assemble(CODE + 0x800, &|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        look(a)?;
        a.jmp(again)
    });
    guest.ram.write(CODE + 0x800, &watch).unwrap();
    let mut state = guest.processor.read_state(1);
    state.rip = CODE + 0x800;
    guest.processor.write_state(1, &state).unwrap();
    guest.go(100_000);
    assert_eq!(guest.word(DATA), 1);
    let entry = guest.word(ENTRY);
    guest
        .ram
        .write(ENTRY, &(entry + 0x1000).to_le_bytes())
        .unwrap();
    guest.go(100_000);
    assert_eq!(guest.word(DATA), 1, "it is cached");
    let code = assemble(CODE, &|a| {
        write(a, GUEST_OS_ID, 1)?;
        a.mov(rcx, 0x0001_0002_u64)?;
        a.xor(edx, edx)?;
        a.mov(r8, 1_u64)?;
        a.vmcall()?;
        a.hlt()
    });
    guest.ram.write(CODE, &code).unwrap();
    let mut state = guest.processor.read_state(0);
    state.rip = CODE;
    state.activity = Default::default();
    guest.processor.write_state(0, &state).unwrap();
    guest.go(200_000);
    assert_eq!(guest.word(DATA), 2);
}

#[test]
fn registers_of_the_machine_are_the_same_on_every_processor_and_others_are_not() {
    let mut guest = Guest::new(2, true);
    guest.run(&|a| {
        write(a, GUEST_OS_ID, 0x77)?;
        write(a, 0x4000_0118, 1)?;
        write(a, SCONTROL, 1)
    });
    let read_there = guest.run_on(1, &|a| {
        read(a, GUEST_OS_ID, 0)?;
        read(a, 0x4000_0118, 1)?;
        read(a, SCONTROL, 2)?;
        read(a, VP_INDEX, 3)
    });
    assert_eq!(read_there, [0x77, 1, 0, 1]);
}

#[test]
fn time_counts_ticks_and_the_page_agrees_with_the_register() {
    let mut guest = Guest::new(1, true);
    let before = guest.processor.now();
    let [count, tsc, apic, _] = guest.run(&|a| {
        read(a, TIME_REF_COUNT, 0)?;
        read(a, TSC_FREQUENCY, 1)?;
        read(a, APIC_FREQUENCY, 2)
    });
    let after = guest.processor.now();
    assert!((before / 100..=after / 100).contains(&count));
    assert_eq!((tsc, apic), (3_000_000_000, 1_000_000_000));
    for moved in [false, true] {
        let [count, stamp, ..] = guest.run(&|a| {
            write(a, REFERENCE_TSC, PAGE | 1)?;
            if moved {
                // The page follows the TSC.
                write(a, 0x10, 1 << 40)?;
            }
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.mov(qword_ptr(DATA + 8), rax)?;
            read(a, TIME_REF_COUNT, 0)
        });
        assert_ne!(guest.word(PAGE) as u32, 0, "valid");
        let (scale, offset) = (guest.word(PAGE + 8), guest.word(PAGE + 16));
        let by_page = ((u128::from(stamp) * u128::from(scale)) >> 64) as u64;
        let difference = count.wrapping_sub(by_page.wrapping_add(offset));
        assert!(difference <= 1, "{count} {difference}");
    }
}

#[test]
fn apic_registers_are_reached_without_the_page() {
    let mut guest = Guest::new(1, true);
    // An interrupt to itself, taken, ended, and sent again.
    let words = guest.run(&|a| {
        write(a, TPR, 0x30)?;
        read(a, TPR, 0)?;
        write(a, ICR, 0x4_0000 | VECTOR)?;
        read(a, ICR, 1)
    });
    assert_eq!((words[0], words[1] & 0xff), (0x30, VECTOR));
    assert_ne!(guest.processor.read_state(0).apic.irr, [0; 8]);
    guest.run(&|a| {
        a.sti()?;
        a.nop()?;
        a.nop()
    });
    assert!(guest.is_in_handler(VECTOR));
    assert_ne!(guest.processor.read_state(0).apic.isr, [0; 8]);
    guest.run(&|a| write(a, EOI, 0));
    assert_eq!(guest.processor.read_state(0).apic.isr, [0; 8]);
}

#[test]
fn a_timer_interrupts_by_its_vector_once_or_again_and_again() {
    // Direct mode, enabled by its count.
    let config = 1 << 12 | VECTOR << 4 | 1 << 3;
    let mut guest = Guest::new(1, true);
    let now = guest.processor.now();
    guest.run(&|a| {
        write(a, STIMER0_CONFIG, config)?;
        write(a, STIMER0_COUNT, now / 100 + 1000)?;
        a.sti()
    });
    assert!(!guest.is_in_handler(VECTOR));
    guest.go(100_000);
    assert!(guest.is_in_handler(VECTOR));
    let timer = guest.processor.read_state(0).hyperv.timers[0];
    assert_eq!((timer.config & 1, timer.expiration), (0, None));
    // Periodic: it goes on.
    guest.run(&|a| {
        write(a, EOI, 0)?;
        write(a, STIMER0_CONFIG, config | 1 << 1)?;
        write(a, STIMER0_COUNT, 500)
    });
    let first = guest.processor.read_state(0).hyperv.timers[0].expiration;
    guest.go(120_000);
    let later = guest.processor.read_state(0).hyperv.timers[0].expiration;
    assert_eq!((later.unwrap() - first.unwrap()) % 500, 0);
    assert!(later > first);
    // A count of zero stops it.
    guest.run(&|a| write(a, STIMER0_COUNT, 0));
    assert_eq!(
        guest.processor.read_state(0).hyperv.timers[0].expiration,
        None
    );
}

#[test]
fn an_expired_timer_ends_idle_time_and_is_saved() {
    let mut guest = Guest::new(1, true);
    guest.run(&|a| {
        write(a, STIMER0_CONFIG, 1 << 12 | VECTOR << 4 | 1 << 3)?;
        write(a, STIMER0_COUNT, 10_000)?;
        a.sti()
    });
    let state = guest.processor.read_state(0);
    let mut other = Guest::new(1, true);
    other.ram.write(0, guest.ram.bytes()).unwrap();
    other
        .processor
        .set_time(guest.processor.now(), guest.processor.turn());
    other.processor.write_state(0, &state).unwrap();
    for guest in [&mut guest, &mut other] {
        assert_eq!(guest.processor.waits_until(&Nothing), Some(1_000_001));
        guest.go(1_100_000);
        assert!(guest.is_in_handler(VECTOR));
    }
    assert_eq!(guest.processor.read_state(0), other.processor.read_state(0));
}

#[test]
fn a_timers_message_waits_for_its_slot() {
    let mut guest = Guest::new(1, true);
    let slot = PAGE + 2 * 256;
    guest.run(&|a| {
        write(a, SCONTROL, 1)?;
        write(a, SIMP, PAGE | 1)?;
        write(a, SINT2, VECTOR)?;
        for (config, count) in [
            (STIMER0_CONFIG, STIMER0_COUNT),
            (STIMER1_CONFIG, STIMER1_COUNT),
        ] {
            write(a, config, 2 << 16 | 1 << 3)?;
            write(a, count, 1)?;
        }
        Ok(())
    });
    // HvMessageTimerExpired of timer 0, and another one waits.
    assert_eq!(guest.word(slot) as u32, 0x8000_0010);
    assert_eq!(guest.word(slot) >> 32 & 0xffff, 24 | 1 << 8);
    assert_eq!(guest.word(slot + 16) as u32, 0);
    assert_ne!(guest.processor.read_state(0).apic.irr, [0; 8]);
    assert!(guest.processor.read_state(0).hyperv.timers[1].message_waits);
    guest.ram.write(slot, &[0; 8]).unwrap();
    guest.run(&|a| write(a, EOM, 0));
    assert_eq!(guest.word(slot + 16) as u32, 1, "timer 1");
    assert!(!guest.processor.read_state(0).hyperv.timers[1].message_waits);
}

#[test]
fn registers_refuse_what_they_cannot_hold() {
    for (register, value) in [
        (SINT2, 3),
        (SINT2, 1 << 20),
        (TPR, 0x100),
        (SCONTROL, 2),
        (0x4000_0118, 2),
        (VP_INDEX, 0),
    ] {
        let mut guest = Guest::new(1, true);
        guest.run(&|a| write(a, register, value));
        assert!(guest.is_in_handler(13), "{register:x} {value:x}");
    }
}
