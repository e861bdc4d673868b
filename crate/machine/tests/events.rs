//! Events of VMX, exit counters and stops at exits, on a hypervisor of a few instructions.

#[path = "../../../tests/guests/hypervisor.rs"]
mod hypervisor;

use hypernest_machine::{
    Answer, Event, EventKinds, EventRequest, ExitReason, Happening, Level, Machine, Stop, Until,
    VmxChoice, WhenFull,
};
use hypernest_vmcs::Field;
use hypervisor::{
    EXITS, HANDLER, L2_BASE, L2_CODE, L2_MEMORY, L2_MISSING, Options, START, VECTOR, VMCS,
};

fn machine(options: &Options) -> Machine {
    Machine::builder()
        .memory(8 << 20)
        .vmx(VmxChoice::Max)
        .image(hypervisor::image(options))
        .build()
        .unwrap()
}

fn request(machine: &mut Machine, kinds: EventKinds, capacity: usize) {
    let request = EventRequest {
        kinds,
        capacity,
        when_full: WhenFull::Overwrite,
    };
    machine.request_events(&request).unwrap();
}

/// Runs to the end; the events.
fn events(options: &Options, kinds: EventKinds) -> (Machine, Vec<Event>) {
    let mut machine = machine(options);
    request(&mut machine, kinds, 10_000);
    let stop = machine.run(&Until::end()).unwrap();
    assert!(
        matches!(stop, Stop::PoweredOff | Stop::Exit { value: 3 }),
        "{stop}"
    );
    let events = machine.take_events();
    assert_eq!(machine.lost_events(), 0);
    (machine, events)
}

#[test]
fn exits_tell_reason_place_and_what_was_accessed() {
    let (machine, events) = events(&Options::default(), EventKinds::VM_EXIT);
    let exits: Vec<_> = events
        .iter()
        .map(|event| match event.what {
            Happening::VmExit(exit) => (event, exit),
            other => panic!("{other:?} was not asked for"),
        })
        .collect();
    let reasons: Vec<ExitReason> = exits.iter().map(|(_, exit)| exit.reason).collect();
    assert_eq!(reasons, EXITS);
    for ((event, exit), number) in exits.iter().zip(1..) {
        assert_eq!(exit.number, number);
        assert_eq!(event.vcpu, 0);
        assert_eq!(event.rip & !0xff, L2_BASE + L2_CODE);
    }
    let (first, cpuid) = exits[0];
    assert_eq!(first.rip, L2_BASE + L2_CODE + 5, "MOV has five bytes");
    assert_eq!((cpuid.length, cpuid.guest_instructions), (2, 2));
    let input = exits[4].1;
    assert_eq!(input.qualification, 0x60 << 16 | 1 << 6 | 1 << 3);
    let miss = exits[6].1;
    assert_eq!(miss.guest_physical, Some(L2_MISSING + 8));
    assert_eq!(miss.guest_linear, Some(L2_BASE + L2_MISSING + 8));
    assert_eq!(miss.qualification & 7, 2, "a write");
    let ticks = events.windows(2).all(|two| two[0].tick < two[1].tick);
    assert!(ticks, "{events:?}");
    assert_eq!(machine.exit_statistics().unwrap().exits(), 8);
}

#[test]
fn entries_injections_violations_and_instructions_are_events_of_their_own() {
    let options = Options {
        inject: true,
        ..Options::default()
    };
    let (_, events) = events(&options, EventKinds::ALL);
    let of = |kind: EventKinds| -> Vec<&Event> {
        let all = events.iter();
        all.filter(|event| event.what.kind() == kind).collect()
    };
    let entries = of(EventKinds::VM_ENTRY);
    assert_eq!(entries.len(), 8);
    let Happening::VmEntry(launch) = entries[0].what else {
        unreachable!()
    };
    assert!(!launch.resume && launch.failure.is_none());
    assert_eq!(launch.vmcs, Some(VMCS));
    assert_eq!(launch.injects, 1 << 31 | u32::from(VECTOR));
    assert_eq!(launch.guest_rip, L2_BASE + L2_CODE);
    assert_eq!(entries[1].rip & !0xff, HANDLER);

    let injections = of(EventKinds::INJECTION);
    assert_eq!(injections.len(), 1);
    let Happening::Injection(injected) = injections[0].what else {
        unreachable!()
    };
    assert_eq!(injected.info, 1 << 31 | u32::from(VECTOR));

    let violations = of(EventKinds::EPT_VIOLATION);
    assert_eq!(violations.len(), 1);
    let Happening::EptViolation(violation) = violations[0].what else {
        unreachable!()
    };
    assert_eq!(violation.guest_physical, L2_MISSING + 8);
    assert!(!violation.misconfiguration);

    let names: Vec<(&str, u64)> = of(EventKinds::VM_INSTRUCTION)
        .iter()
        .map(|event| match event.what {
            Happening::VmInstruction(instruction) => {
                assert_eq!(instruction.failure, None);
                (instruction.name, instruction.operand)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(names[1..3], [("VMCLEAR", VMCS), ("VMPTRLD", VMCS)]);
    let reason = u64::from(Field::VM_EXIT_REASON.encoding());
    let reads = names.iter().filter(|name| **name == ("VMREAD", reason));
    assert_eq!(reads.count(), 8);
}

#[test]
fn only_what_was_asked_for_is_kept_and_a_full_ring_keeps_the_newest() {
    let (_, none) = events(&Options::default(), EventKinds::NONE);
    assert!(none.is_empty());
    let mut machine = machine(&Options::default());
    request(&mut machine, EventKinds::VM_EXIT, 3);
    machine.run(&Until::end()).unwrap();
    let last = machine.take_events();
    assert_eq!((last.len(), machine.lost_events()), (3, 5));
    let Happening::VmExit(exit) = last[2].what else {
        panic!("{last:?}")
    };
    assert_eq!(exit.reason, ExitReason::VMCALL);
}

#[test]
fn more_events_than_there_is_memory_for_are_an_error() {
    let mut machine = machine(&Options::default());
    request(&mut machine, EventKinds::VM_EXIT, 100);
    for when_full in [WhenFull::Overwrite, WhenFull::Stop] {
        let request = EventRequest {
            kinds: EventKinds::ALL,
            capacity: usize::MAX,
            when_full,
        };
        let error = machine.request_events(&request).unwrap_err();
        assert!(error.to_string().contains("no memory for"), "{error}");
    }
    machine.run(&Until::end()).unwrap();
    assert_eq!(machine.take_events().len(), 8, "the request before stands");
}

#[test]
fn a_ring_that_stops_the_machine_loses_nothing_and_changes_nothing() {
    let mut plain = machine(&Options::default());
    plain.run(&Until::end()).unwrap();
    let mut machine = machine(&Options::default());
    let request = EventRequest {
        kinds: EventKinds::ALL,
        capacity: 1,
        when_full: WhenFull::Stop,
    };
    machine.request_events(&request).unwrap();
    let mut taken = Vec::new();
    let mut stops = 0;
    while machine.run(&Until::end()).unwrap() == Stop::EventsFull {
        taken.extend(machine.take_events());
        stops += 1;
    }
    taken.extend(machine.take_events());
    assert!(stops > 50, "{stops}");
    assert_eq!(machine.lost_events(), 0);
    let (_, all) = events(&Options::default(), EventKinds::ALL);
    assert_eq!(taken, all);
    assert_eq!(
        machine.state_hash().unwrap(),
        plain.state_hash().unwrap(),
        "events are no state"
    );
}

#[test]
fn counters_have_a_row_for_each_reason_with_what_l1_executed() {
    let (machine, _) = events(&Options::default(), EventKinds::NONE);
    let statistics = machine.exit_statistics().unwrap();
    assert_eq!((statistics.entries(), statistics.failed_entries()), (8, 0));
    let rows = statistics.rows();
    assert_eq!(rows.len(), 6);
    let cpuid = rows[0];
    assert_eq!(
        (cpuid.level, cpuid.reason, cpuid.count),
        (Level::L2, ExitReason::CPUID, 3)
    );
    // From the first instruction of the handler to VMRESUME.
    let handling = cpuid.handling.unwrap();
    assert_eq!((handling.min, handling.max, handling.total), (16, 16, 48));
    let miss = statistics.rows()[5];
    assert_eq!(miss.reason, ExitReason::EPT_VIOLATION);
    assert_eq!(miss.handling.unwrap().median, 10);
    let vmcall = rows[2];
    assert_eq!(vmcall.reason, ExitReason::VMCALL);
    assert_eq!(vmcall.handling, None, "nothing is entered after it");
    // MOV; three times CPUID, DEC, JNZ; MOV, RDMSR, IN, HLT; MOV and the store; the store and VMCALL.
    assert_eq!(statistics.guest_instructions(), 1 + 9 + 4 + 2 + 2);
}

#[test]
fn an_entry_that_fails_names_its_check_with_the_values_of_then() {
    let bad = |field, value| Options {
        spoil: vec![(field, value)],
        ..Options::default()
    };
    let (machine, all) = events(&bad(Field::GUEST_RFLAGS, 0), EventKinds::VM_ENTRY);
    let [failed] = machine.failed_entries() else {
        panic!("{all:?}")
    };
    let Happening::VmEntry(entry) = all[0].what else {
        unreachable!()
    };
    assert_eq!(entry.failure, Some(failed.failure));
    assert!(matches!(
        failed.failure.answer,
        Answer::Exit {
            reason: ExitReason::ENTRY_FAILURE_GUEST_STATE,
            qualification: 0
        }
    ));
    let words = failed.explain();
    assert!(words.starts_with(failed.failure.check.unwrap()), "{words}");
    for part in ["SDM Vol. 3C", "RFLAGS", "GUEST_RFLAGS=0x0", "exit 33"] {
        assert!(words.contains(part), "{part} is not in {words}");
    }
    let statistics = machine.exit_statistics().unwrap();
    assert_eq!((statistics.exits(), statistics.failed_entries()), (0, 1));
    assert_eq!(statistics.rows()[0].level, Level::L1);

    let (machine, _) = events(&bad(Field::CR3_TARGET_COUNT, 5), EventKinds::NONE);
    let words = machine.failed_entries()[0].explain();
    assert!(words.contains("VMfailValid 7"), "{words}");
    assert!(words.contains("CR3_TARGET_COUNT=0x5"), "{words}");

    // An entry of the MSR list that cannot be loaded is no check of a field.
    let list = Options {
        spoil: vec![
            (Field::VM_ENTRY_MSR_LOAD_COUNT, 1),
            (Field::VM_ENTRY_MSR_LOAD_ADDR, START),
        ],
        ..Options::default()
    };
    let (machine, _) = events(&list, EventKinds::NONE);
    let words = machine.failed_entries()[0].explain();
    assert!(words.contains("exit 34 qualification 1"), "{words}");
}

#[test]
fn runs_stop_at_exits_by_reason_and_by_number_and_at_failed_entries() {
    let mut machine = machine(&Options::default());
    let stop = machine.run(&Until::end().vm_exit(ExitReason::HLT)).unwrap();
    assert_eq!(
        stop,
        Stop::VmExit {
            vcpu: 0,
            reason: 12,
            number: 6
        }
    );
    let state = machine.read_vcpu(0).unwrap();
    assert_eq!((state.level(), state.rip), (Level::L1, HANDLER));
    let stop = machine.run(&Until::end().vm_exit_number(8)).unwrap();
    assert_eq!(
        stop,
        Stop::VmExit {
            vcpu: 0,
            reason: 18,
            number: 8
        }
    );
    assert_eq!(machine.run(&Until::end()).unwrap(), Stop::PoweredOff);

    let bad = Options {
        spoil: vec![(Field::GUEST_RFLAGS, 0)],
        ..Options::default()
    };
    let mut machine = self::machine(&bad);
    let stop = machine.run(&Until::end().failed_entry()).unwrap();
    assert_eq!(stop, Stop::EntryFailed { vcpu: 0 });
    assert_eq!(machine.failed_entries().len(), 1);
}

#[test]
fn an_exit_between_instructions_stops_before_l1_executes_anything() {
    // The preemption timer: L2 spins, and nothing of it exits by an instruction.
    let options = Options {
        l2: Some(vec![0xeb, 0xfe]),
        spoil: vec![
            (Field::PIN_BASED_VM_EXEC_CONTROL, 0x16 | 1 << 6),
            (Field::VMX_PREEMPTION_TIMER_VALUE, 100),
        ],
        ..Options::default()
    };
    let mut machine = machine(&options);
    let until = Until::tick(1_000_000).vm_exit(ExitReason::PREEMPTION_TIMER);
    let stop = machine.run(&until).unwrap();
    assert_eq!(stop.word(), "vm-exit", "{stop}");
    assert_eq!(machine.read_vcpu(0).unwrap().rip, HANDLER);
}

#[test]
fn a_violation_that_the_guest_gets_as_an_exception_is_an_event_and_no_exit() {
    const EPT_VIOLATION_VE: u64 = 1 << 18;
    let options = Options {
        spoil: vec![
            (Field::SECONDARY_VM_EXEC_CONTROL, 0x22 | EPT_VIOLATION_VE),
            (Field::VE_INFORMATION_ADDRESS, L2_MEMORY + 0x1e000),
        ],
        ..Options::default()
    };
    // L2 has no handler for it: a triple fault, after which the same store exits.
    let kinds = EventKinds::EPT_VIOLATION | EventKinds::VM_EXIT;
    let (_, events) = events(&options, kinds);
    let words: Vec<String> = events
        .iter()
        .skip(6)
        .map(|event| match event.what {
            Happening::EptViolation(violation) => {
                assert_eq!(violation.guest_physical, L2_MISSING + 8);
                let exception = violation.exception;
                format!("violation at {:#x}, exception {exception}", event.rip)
            }
            Happening::VmExit(exit) => exit.reason.ident().to_owned(),
            other => panic!("{other:?}"),
        })
        .collect();
    let store = L2_BASE + L2_CODE + 0x1f;
    assert_eq!(
        words,
        [
            format!("violation at {store:#x}, exception true"),
            "TRIPLE_FAULT".into(),
            format!("violation at {store:#x}, exception false"),
            "EPT_VIOLATION".into(),
            "VMCALL".into(),
        ]
    );
}
