//! How virtual interrupts reach a guest (Vol. 3C, "APIC Virtualization and Virtual Interrupts").

mod support;

use hypernest_cpu::{
    Activity, Bus, DeliveryMode, InterruptMessage, Model, Processor, ProcessorConfig, Ram, Stop,
    Tick, VmxChoice,
};
use hypernest_vmcs::{ExitReason, Field, proc1, proc3};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, cr8, dword_ptr, eax, ecx, rax};
use support::apic::{
    ACCESS, Controls, DELIVERY, EOI, ICR, ICR_HIGH, IRR, ISR, MSR_FIELDS, MSRS, NOTIFICATION, PAGE,
    POSTED, POSTING, PPR, RFLAGS_IF, TPR, VIRTUAL, access, handled, has_vector, l1, reason,
    register, set_register, set_vector, start, status, write_msr,
};
use support::hypervisor::{GUEST, L1, PAGES};
use support::{HANDLERS, Nothing};

// ---- virtual interrupts ----

#[test]
fn a_requested_interrupt_is_delivered_when_the_guest_takes_it() {
    let mut l1 = l1(DELIVERY, &[(Field::GUEST_INTR_STATUS, 0x62)], &|a| {
        a.nop()?;
        a.sti()?;
        a.nop()?;
        a.vmcall()
    });
    set_vector(&mut l1, IRR, 0x62);
    set_vector(&mut l1, IRR, 0x35);
    set_register(&mut l1, TPR, 0x10);
    l1.run();
    assert_eq!(handled(&l1), 0x62);
    // The shadow of STI is over.
    assert_eq!(l1.word(l1.field(Field::GUEST_RSP)), GUEST + 3);
    assert_eq!(status(&l1), (0x35, 0x62));
    assert_eq!(register(&l1, PPR), 0x60);
    assert!(has_vector(&l1, ISR, 0x62) && !has_vector(&l1, IRR, 0x62));
    assert!(has_vector(&l1, IRR, 0x35));
}

#[test]
fn what_has_no_priority_waits_until_it_has() {
    let fields = [
        (Field::GUEST_INTR_STATUS, 0x62),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
    ];
    let mut l1 = l1(DELIVERY, &fields, &|a| {
        a.vmcall()?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.vmcall()
    });
    set_vector(&mut l1, IRR, 0x62);
    set_register(&mut l1, TPR, 0x62);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(register(&l1, PPR), 0x62);
    l1.skip();
    l1.resume();
    assert_eq!(handled(&l1), 0x62);
    assert_eq!(l1.word(l1.field(Field::GUEST_RSP)), GUEST + 3 + 5 + 4);
}

#[test]
fn nothing_is_delivered_while_the_hypervisor_waits_for_the_window() {
    let window = Controls {
        proc1: DELIVERY.proc1 | proc1::INTERRUPT_WINDOW_EXITING,
        ..DELIVERY
    };
    let fields = [(Field::GUEST_INTR_STATUS, 0x62)];
    let mut l1 = l1(window, &fields, &|a| {
        a.sti()?;
        a.nop()?;
        a.vmcall()
    });
    set_vector(&mut l1, IRR, 0x62);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::INTERRUPT_WINDOW);
    assert_eq!(status(&l1), (0x62, 0));
}

#[test]
fn a_virtual_interrupt_ends_hlt_but_not_shutdown() {
    let fields = |activity| {
        [
            (Field::GUEST_INTR_STATUS, 0x62),
            (Field::GUEST_RFLAGS, RFLAGS_IF),
            (Field::GUEST_ACTIVITY_STATE, activity),
        ]
    };
    for (activity, wakes) in [(1, true), (2, false)] {
        let mut l1 = l1(DELIVERY, &fields(activity), &|a| a.vmcall());
        set_vector(&mut l1, IRR, 0x62);
        l1.run();
        if wakes {
            assert_eq!(handled(&l1), 0x62);
        } else {
            assert_eq!(l1.state().activity, Activity::Shutdown);
            assert!(l1.state().vmx.non_root);
        }
    }
}

#[test]
fn the_end_of_an_interrupt_lets_the_next_one_in_or_exits() {
    let fields = [
        (Field::GUEST_INTR_STATUS, 0x62 << 8 | 0x35),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
        (Field::EOI_EXIT_BITMAP1, 1 << (0x62 - 64)),
    ];
    let mut l1 = l1(DELIVERY, &fields, &|a| {
        a.mov(dword_ptr(ACCESS + EOI), 0x99)?;
        a.vmcall()
    });
    for vector in [0x62, 0x28] {
        set_vector(&mut l1, ISR, vector);
    }
    set_vector(&mut l1, IRR, 0x35);
    l1.run();
    assert_eq!(l1.exit(), (reason(ExitReason::VIRTUALIZED_EOI), 0x62));
    assert_eq!(l1.field(Field::GUEST_RIP), GUEST + 11);
    assert_eq!((register(&l1, EOI), register(&l1, PPR)), (0, 0x20));
    assert_eq!(status(&l1), (0x35, 0x28));
    assert!(!has_vector(&l1, ISR, 0x62) && has_vector(&l1, ISR, 0x28));
    // Once more, with nothing to tell: the next interrupt comes at once.
    l1.set(Field::EOI_EXIT_BITMAP1, 0);
    l1.set(Field::GUEST_INTR_STATUS, 0x62 << 8 | 0x35);
    l1.set(Field::GUEST_RIP, GUEST);
    set_vector(&mut l1, ISR, 0x62);
    l1.resume();
    assert_eq!(handled(&l1), 0x35);
    assert_eq!(l1.word(l1.field(Field::GUEST_RSP)), GUEST + 11);
    assert_eq!(status(&l1), (0, 0x35));
}

#[test]
fn an_interrupt_to_itself_needs_no_exit() {
    for (command, exits) in [
        (1u32 << 18 | 0x51, false),
        // Neither level nor destination mode means anything here.
        (1 << 18 | 1 << 14 | 1 << 11 | 0x51, false),
        (0x51, true),
        (1 << 18 | 0x0f, true),
        (1 << 18 | 1 << 15 | 0x51, true),
        (1 << 18 | 1 << 12 | 0x51, true),
        (1 << 18 | 1 << 8 | 0x51, true),
        (1 << 18 | 1 << 13 | 0x51, true),
        (1 << 18 | 1 << 16 | 0x51, true),
        (1 << 18 | 1 << 20 | 0x51, true),
        (2 << 18 | 0x51, true),
        (3 << 18 | 0x51, true),
    ] {
        let l1 = start(DELIVERY, &[(Field::GUEST_RFLAGS, RFLAGS_IF)], &|a| {
            a.mov(dword_ptr(ACCESS + ICR), command as i32)?;
            a.vmcall()
        });
        assert_eq!(register(&l1, ICR), command);
        if exits {
            assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), ICR));
        } else {
            assert_eq!(handled(&l1), 0x51);
            assert_eq!(status(&l1), (0, 0x51));
        }
    }
}

#[test]
fn the_monitor_trap_comes_between_a_virtual_interrupt_and_its_handler() {
    let trap = Controls {
        proc1: DELIVERY.proc1 | proc1::MONITOR_TRAP_FLAG,
        ..DELIVERY
    };
    let fields = [
        (Field::GUEST_INTR_STATUS, 0x62),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
    ];
    let mut l1 = l1(trap, &fields, &|a| a.vmcall());
    set_vector(&mut l1, IRR, 0x62);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::MONITOR_TRAP_FLAG);
    assert_eq!(l1.field(Field::GUEST_RIP), HANDLERS + 16 * 0x62);
}

#[test]
fn a_delivery_that_faults_has_begun() {
    let fields = [
        (Field::GUEST_INTR_STATUS, 0x62),
        (Field::GUEST_RFLAGS, RFLAGS_IF),
        (Field::GUEST_RSP, ACCESS + 0x100),
    ];
    let mut l1 = l1(DELIVERY, &fields, &|a| a.vmcall());
    set_vector(&mut l1, IRR, 0x62);
    l1.run();
    assert_eq!(l1.exit(), access(3, 0xf8));
    assert_eq!(l1.field(Field::IDT_VECTORING_INFO_FIELD), 1 << 31 | 0x62);
    assert_eq!(status(&l1), (0, 0x62));
    assert!(has_vector(&l1, ISR, 0x62));
}

// ---- posted interrupts ----

/// Makes an external interrupt wait in L1's APIC.
fn request(l1: &mut L1, vector: u64) {
    let mut state = l1.state();
    state.apic.svr |= 1 << 8;
    state.apic.irr[vector as usize / 32] |= 1 << (vector % 32);
    l1.processor.write_state(0, &state).unwrap();
}

#[test]
fn posted_interrupts_reach_the_guest_without_an_exit() {
    let mut l1 = start(POSTING, &[(Field::GUEST_RFLAGS, RFLAGS_IF)], &|a| {
        a.vmcall()?;
        a.nop()?;
        a.vmcall()
    });
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    l1.put(POSTED, 1 << 0x35);
    l1.put(POSTED + 8, 1 << (0x62 - 64));
    l1.put(POSTED + 32, 0xabcd_0001);
    set_vector(&mut l1, IRR, 0x29);
    request(&mut l1, NOTIFICATION);
    l1.skip();
    l1.resume();
    assert_eq!(handled(&l1), 0x62);
    assert_eq!(l1.word(l1.field(Field::GUEST_RSP)), GUEST + 3);
    assert_eq!((l1.word(POSTED), l1.word(POSTED + 8)), (0, 0));
    assert_eq!(l1.word(POSTED + 32), 0xabcd_0000);
    assert_eq!(status(&l1), (0x35, 0x62));
    assert!(has_vector(&l1, IRR, 0x35) && has_vector(&l1, IRR, 0x29));
    let apic = l1.state().apic;
    assert_eq!((apic.irr, apic.isr), ([0; 8], [0; 8]), "dismissed");
    // Another interrupt exits as ever.
    request(&mut l1, 0x71);
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::EXTERNAL_INTERRUPT);
    assert_eq!(l1.field(Field::VM_EXIT_INTR_INFO), 1 << 31 | 0x71);
}

#[test]
fn a_notification_wakes_a_guest_only_for_an_interrupt() {
    let fields = [
        (Field::GUEST_RFLAGS, RFLAGS_IF),
        (Field::GUEST_ACTIVITY_STATE, 1),
    ];
    let mut l1 = l1(POSTING, &fields, &|a| a.vmcall());
    l1.put(POSTED, 1 << 0x35);
    l1.put(POSTED + 32, 1);
    set_register(&mut l1, TPR, 0x30);
    l1.run();
    assert!(l1.state().vmx.non_root);
    request(&mut l1, NOTIFICATION);
    l1.stop = None;
    l1.run();
    // Taken, but below the guest's priority.
    assert!(l1.state().vmx.non_root);
    assert_eq!(l1.state().activity, Activity::Halted);
    assert_eq!(l1.state().apic.irr, [0; 8]);
    assert!(has_vector(&l1, IRR, 0x35));
    l1.put(POSTED + 8, 1 << (0x62 - 64));
    request(&mut l1, NOTIFICATION);
    l1.stop = None;
    l1.run();
    assert_eq!(handled(&l1), 0x62);
}

/// A wire that is never let go: each end of its interrupt sends it again.
struct Stuck {
    sends: bool,
    ends: u32,
}

impl Bus for Stuck {
    fn port_read(&mut self, _: &mut Ram, _: Tick, _: u16, _: u8) -> u32 {
        !0
    }
    fn port_write(&mut self, _: &mut Ram, _: Tick, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: &mut Ram, _: Tick, _: u64, _: u8) -> u64 {
        !0
    }
    fn mmio_write(&mut self, _: &mut Ram, _: Tick, _: u64, _: u8, _: u64) {}
    fn take_message(&mut self) -> Option<InterruptMessage> {
        std::mem::take(&mut self.sends).then_some(InterruptMessage {
            destination: 0,
            logical: false,
            delivery: DeliveryMode::Fixed,
            vector: NOTIFICATION as u8,
            level_triggered: true,
        })
    }
    fn end_of_interrupt(&mut self, _: Tick, _: u8) {
        (self.sends, self.ends) = (true, self.ends + 1);
    }
    fn intr(&self) -> bool {
        false
    }
    fn acknowledge(&mut self, _: Tick) -> u8 {
        0
    }
    fn deadline(&self) -> Option<Tick> {
        None
    }
    fn advance(&mut self, _: &mut Ram, _: Tick) {}
    fn stop_requested(&self) -> bool {
        false
    }
}

#[test]
fn a_notification_that_comes_again_and_again_lets_time_pass() {
    let mut l1 = l1(POSTING, &[(Field::GUEST_ACTIVITY_STATE, 1)], &|a| {
        a.vmcall()
    });
    request(&mut l1, NOTIFICATION);
    let mut stuck = Stuck {
        sends: true,
        ends: 0,
    };
    let stop = l1.processor.run(&mut l1.ram, &mut stuck, 2000);
    assert_eq!(stop, Stop::Deadline);
    assert!(l1.state().vmx.non_root && stuck.ends > 100);
}

// ---- IPIs ----

/// Pointers to the descriptors of virtual processors, of which 3 is the last.
const POINTERS: u64 = PAGES + 0x5000;

const IPIS: Controls = Controls {
    proc3: proc3::IPI_VIRTUALIZATION,
    ..POSTING
};

const IPI_FIELDS: [(Field, u64); 3] = [
    (Field::PID_POINTER_TABLE, POINTERS),
    (Field::LAST_PID_POINTER_INDEX, 3),
    (Field::GUEST_RFLAGS, RFLAGS_IF),
];

/// Notifications of the descriptor go to L1's own APIC.
fn with_descriptor(l1: &mut L1, suppressed: u64) {
    l1.put(POINTERS + 8 * 3, POSTED | 1);
    l1.put(POSTED + 32, NOTIFICATION << 16 | suppressed << 1);
    let mut state = l1.state();
    state.apic.svr |= 1 << 8;
    l1.processor.write_state(0, &state).unwrap();
}

#[test]
fn an_interrupt_to_another_virtual_processor_is_posted() {
    for suppressed in [0, 1] {
        let mut l1 = l1(IPIS, &IPI_FIELDS, &|a| {
            a.mov(dword_ptr(ACCESS + ICR_HIGH), 3 << 24)?;
            a.mov(dword_ptr(ACCESS + ICR), 1 << 14 | 0x51)?;
            a.vmcall()
        });
        with_descriptor(&mut l1, suppressed);
        l1.run();
        if suppressed == 0 {
            // It came back: the sender is the receiver.
            assert_eq!(handled(&l1), 0x51);
            assert_eq!(l1.word(POSTED + 8), 0);
            assert_eq!(l1.word(POSTED + 32), NOTIFICATION << 16);
            assert_eq!(l1.state().apic.icr_low, 0);
        } else {
            assert_eq!(l1.reason(), ExitReason::VMCALL);
            assert_eq!(l1.word(POSTED + 8), 1 << (0x51 - 64));
            assert_eq!(l1.word(POSTED + 32), NOTIFICATION << 16 | 2);
        }
    }
}

#[test]
fn a_notification_that_is_outstanding_is_not_repeated() {
    let mut l1 = l1(IPIS, &IPI_FIELDS, &|a| {
        a.mov(dword_ptr(ACCESS + ICR_HIGH), 3 << 24)?;
        a.mov(dword_ptr(ACCESS + ICR), 0x51)?;
        a.nop()?;
        a.vmcall()
    });
    with_descriptor(&mut l1, 0);
    l1.put(POSTED + 32, NOTIFICATION << 16 | 1);
    l1.run();
    assert_eq!(l1.reason(), ExitReason::VMCALL);
    assert_eq!(l1.word(POSTED + 8), 1 << (0x51 - 64));
}

#[test]
fn what_cannot_be_posted_is_the_hypervisors() {
    let plain = POSTED | 1;
    for (command, target, pointer) in [
        (0x0f, 3, plain),
        (0x51 | 1 << 11, 3, plain),
        (0x51 | 1 << 8, 3, plain),
        (0x51 | 1 << 12, 3, plain),
        (0x51 | 2 << 18, 3, plain),
        (0x51, 4, plain),
        (0x51, 3, plain & !1),
        (0x51, 3, plain | 2),
        (0x51, 3, plain | 1 << 52),
    ] {
        let mut l1 = l1(IPIS, &IPI_FIELDS, &|a| {
            a.mov(dword_ptr(ACCESS + ICR_HIGH), target << 24)?;
            a.mov(dword_ptr(ACCESS + ICR), command)?;
            a.vmcall()
        });
        with_descriptor(&mut l1, 0);
        l1.put(POINTERS + 8 * 3, pointer);
        l1.put(POINTERS + 8 * 4, plain);
        l1.run();
        assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), ICR));
        assert_eq!((l1.word(POSTED), l1.word(POSTED + 8)), (0, 0));
    }
}

#[test]
fn msr_writes_send_interrupts_to_32_bit_destinations() {
    let msrs = Controls {
        proc2: MSRS.proc2,
        proc1: MSRS.proc1,
        ..IPIS
    };
    let fields: Vec<_> = [MSR_FIELDS, [IPI_FIELDS[0], IPI_FIELDS[1]]].concat();
    let mut l1 = l1(msrs, &fields, &|a| {
        write_msr(a, 0x830, 0x51, 3)?;
        write_msr(a, 0x830, 0x52, 3 << 24)?;
        write_msr(a, 0x830, 0x53 | 1 << 18, 3)?;
        write_msr(a, 0x830, 0x54 | 1 << 13, 3)
    });
    with_descriptor(&mut l1, 1);
    l1.run();
    assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), ICR));
    assert_eq!(l1.word(POSTED + 8), 1 << (0x51 - 64));
    assert_eq!(l1.word(VIRTUAL + ICR), 3 << 56 | 0x52);
    l1.resume();
    assert_eq!(l1.exit(), (reason(ExitReason::APIC_WRITE), ICR));
    l1.resume();
    assert_eq!(l1.reason(), ExitReason::EXCEPTION_OR_NMI);
    assert_eq!(l1.word(POSTED + 8), 1 << (0x51 - 64));
}

// ---- saved state ----

/// What a guest may do to its APIC, chosen by `random`.
fn act(a: &mut CodeAssembler, random: &mut impl FnMut(u64) -> u64) -> Result<(), IcedError> {
    const REGISTERS: [u64; 8] = [TPR, TPR, EOI, EOI, ICR, ICR_HIGH, PPR, 0x20];
    let at = ACCESS + REGISTERS[random(8) as usize];
    let vector = 0x20 + random(0x60) as u32;
    match random(12) {
        0 => a.mov(ecx, dword_ptr(at)),
        1 => a.mov(dword_ptr(at), vector as i32),
        2 => a.mov(dword_ptr(ACCESS + EOI), 0),
        3 => a.mov(dword_ptr(ACCESS + TPR), random(0x60) as i32),
        4 => a.mov(
            dword_ptr(ACCESS + ICR),
            ((random(2) as u32 * (1 << 18)) | vector) as i32,
        ),
        5 => {
            a.mov(eax, random(8) as u32)?;
            a.mov(cr8, rax)
        }
        6 => write_msr(a, 0x808, random(0x60) as u32, 0),
        7 => write_msr(a, 0x80b, 0, 0),
        8 => write_msr(a, 0x83f, vector, 0),
        9 => a.cli(),
        10 => a.sti(),
        _ if random(4) == 0 => a.hlt(),
        _ => a.nop(),
    }
}

/// The effects of writes, and interrupts that wait for the guest, are not lost.
#[test]
fn neither_saving_nor_the_length_of_blocks_changes_anything() {
    let mut ends = Vec::new();
    for seed in 0..60u64 {
        let mut state = seed;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(99);
            (state >> 33) % below
        };
        let mut code = CodeAssembler::new(64).unwrap();
        for _ in 0..30 {
            act(&mut code, &mut random).unwrap();
        }
        code.vmcall().unwrap();
        let code = code.assemble(GUEST).unwrap();
        let controls = [PAGE, DELIVERY, POSTING, MSRS, IPIS][random(5) as usize];
        let (irr, isr, posted) = (0x20 + random(0x60), random(2) * 0x41, 0x20 + random(0x60));
        let fields = [
            MSR_FIELDS[0],
            IPI_FIELDS[0],
            IPI_FIELDS[1],
            (Field::GUEST_INTR_STATUS, isr << 8 | irr),
            (Field::EOI_EXIT_BITMAP1, random(4)),
            (Field::TPR_THRESHOLD, random(2)),
        ];
        let notified_at = 330 + random(100);
        let run = |block_length: u32, chunk: u64, save: bool| {
            let mut l1 = l1(controls, &fields, &|a| a.db(&code));
            let state = l1.state();
            let config = ProcessorConfig {
                vmx: VmxChoice::Max.profile(<&Model>::default()).unwrap(),
                block_length,
                ..ProcessorConfig::default()
            };
            l1.processor = Processor::new(&config).unwrap();
            l1.processor.write_state(0, &state).unwrap();
            // An interrupt of the guest returns to it, with interrupts enabled.
            for vector in 0..256 {
                let handler = HANDLERS + 16 * vector;
                l1.ram.write(handler, &[0x48, 0xcf]).unwrap();
            }
            set_vector(&mut l1, IRR, irr as u8);
            set_vector(&mut l1, ISR, isr as u8);
            l1.put(POSTED + posted / 64 * 8, 1 << (posted % 64));
            l1.put(POSTED + 32, NOTIFICATION << 16);
            l1.put(POINTERS, POSTED | 1);
            for end in [notified_at, 700] {
                while l1.processor.now() < end {
                    let until = end.min(l1.processor.now() + chunk);
                    l1.processor.run(&mut l1.ram, &mut Nothing, until);
                    if save {
                        let state = l1.state();
                        l1.processor.write_state(0, &state).unwrap();
                    }
                }
                if controls.pin != 0 {
                    request(&mut l1, NOTIFICATION);
                }
            }
            let page: Vec<u32> = (0..1024).map(|n| register(&l1, 4 * n)).collect();
            let taken = l1.word(POSTED + posted / 64 * 8) == 0;
            (l1.field(Field::VM_EXIT_REASON), taken, l1.state(), page)
        };
        let plain = run(64, 1000, false);
        assert!(plain == run(64, 1, true), "saved, seed {seed}");
        assert!(plain == run(7, 1000, false), "short blocks, seed {seed}");
        assert!(plain == run(1, 3, false), "single steps, seed {seed}");
        ends.push((plain.0, plain.1));
    }
    // They went far enough to differ.
    for end in [
        ExitReason::VMCALL,
        ExitReason::TPR_BELOW_THRESHOLD,
        ExitReason::VIRTUALIZED_EOI,
        ExitReason::APIC_WRITE,
    ] {
        let there = |(seen, _): &(u64, bool)| *seen == reason(end);
        assert!(ends.iter().any(there), "{end:?} of {ends:?}");
    }
    assert!(ends.iter().any(|(_, taken)| *taken));
}
