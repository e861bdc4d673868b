//! A recorded run is made again, to every moment of it.

use hypernest_machine::{Machine, Tick, Until, VmxChoice};
use hypernest_migrate::record::{
    Entry, Event, Input, InputError, Log, LogError, RecordError, Recorder, Replay, ReplayError,
    begin,
};
use hypernest_migrate::section::SectionError;
use hypernest_migrate::snapshot::{Options, Snapshot};

const MEMORY: u64 = 64 << 20;
const BUDGET: usize = 64 << 20;

fn greeting() -> Machine {
    let builder = Machine::builder().memory(16 << 20).console();
    builder.image(hypernest_guests::GREETING).build().unwrap()
}

fn hypervisor() -> Machine {
    Machine::builder()
        .memory(hypernest_guests::HYPERVISOR_MEMORY)
        .cpus(2)
        .vmx(VmxChoice::Max)
        .image(hypernest_guests::HYPERVISOR)
        .build()
        .unwrap()
}

/// A recording, and what is known of its run.
struct Recorded {
    bytes: Vec<u8>,
    end: Tick,
    hash: u64,
}

/// Records a run in pieces of odd lengths, from `start` to `end`, with what `inputs` has.
fn record(
    mut machine: Machine,
    (start, end): (Tick, Tick),
    every: u64,
    inputs: &[(Tick, Input)],
) -> Recorded {
    machine.run(&Until::tick(start)).unwrap();
    let mut recorder = begin(&mut machine, Vec::new(), &Options::default())
        .unwrap()
        .keyframe_every(every);
    let mut inputs = inputs.iter().peekable();
    let mut length = 1;
    loop {
        length = length * 7 % 9973 + 1;
        let due = inputs.peek().map_or(end, |(tick, _)| (*tick).min(end));
        let next = due.min(machine.now() + length);
        let stop = machine.run(&Until::tick(next)).unwrap();
        recorder.ran(&mut machine, &stop).unwrap();
        while let Some((_, input)) = inputs.next_if(|(tick, _)| *tick <= machine.now()) {
            recorder.input(&mut machine, input.clone()).unwrap();
        }
        if stop.is_end() || machine.now() >= end {
            break;
        }
    }
    let bytes = recorder.finish(&mut machine).unwrap();
    Recorded {
        bytes,
        end: machine.now(),
        hash: machine.state_hash().unwrap(),
    }
}

fn typed(inputs: &[(Tick, &str)]) -> Vec<(Tick, Input)> {
    let serial = |text: &str| Input::Serial(text.as_bytes().to_vec());
    inputs
        .iter()
        .map(|(tick, text)| (*tick, serial(text)))
        .collect()
}

/// Keys at odd times, and other things that come.
fn recorded_greeting() -> Recorded {
    let mut inputs = typed(&[
        (200_003, "a"),
        (1_000_001, "hello"),
        (1_000_001, "!"),
        (3_333_333, "\r"),
    ]);
    inputs.push((4_000_007, Input::PowerButton));
    inputs.push((4_000_007, Input::Console(b"x".to_vec())));
    let bytes = vec![7, 8];
    inputs.push((
        4_100_000,
        Input::Memory {
            address: 0xf0_0fff,
            bytes,
        },
    ));
    record(greeting(), (77, 5_000_000), 20_000, &inputs)
}

fn open(bytes: &[u8]) -> (Machine, Log) {
    let mut from = bytes;
    Log::open(&mut from).unwrap();
    let machine = Snapshot::open(&mut from)
        .unwrap()
        .build(MEMORY, Vec::new(), |builder| builder)
        .unwrap();
    (machine, Log::read(from).unwrap())
}

fn replay(bytes: &[u8], budget: usize) -> Replay {
    let (machine, log) = open(bytes);
    Replay::new(machine, log, budget).unwrap()
}

fn hash(replay: &mut Replay) -> u64 {
    replay.machine().kept_hash().unwrap()
}

#[test]
fn a_run_with_input_is_made_again_with_equal_hashes() {
    let recorded = recorded_greeting();
    let mut replay = replay(&recorded.bytes, BUDGET);
    assert!(replay.log().whole);
    let keyframes = replay.log().keyframes();
    assert!(keyframes > 3, "{keyframes}");
    replay.to_end().unwrap();
    assert_eq!(replay.compared(), keyframes + 1);
    assert_eq!(
        (replay.now(), hash(&mut replay)),
        (recorded.end, recorded.hash)
    );
    let printed = replay.machine().take_serial_output();
    assert!(String::from_utf8_lossy(&printed).contains("HELLO!"));
}

#[test]
fn every_moment_is_reached_from_every_other() {
    for (recorded, step) in [
        (recorded_greeting(), 312_345),
        (record(hypervisor(), (50, 1_000_000), 1500, &[]), 4733),
    ] {
        let mut forwards = replay(&recorded.bytes, BUDGET);
        let moments: Vec<(Tick, u64, u64)> = (50.max(recorded.end / 1000)..recorded.end)
            .step_by(step)
            .map(|tick| {
                forwards.to_tick(tick).unwrap();
                assert_eq!(forwards.now(), tick);
                (tick, hash(&mut forwards), forwards.instructions())
            })
            .collect();
        assert!(moments.len() > 10);
        let frames = forwards.frames();
        assert!(frames.frames > 3 && frames.bytes <= BUDGET);
        // A budget for a few frames, one for none, and enough for all.
        for budget in [BUDGET, 3 * frames.bytes / frames.frames, 0] {
            let mut replay = replay(&recorded.bytes, budget);
            replay.to_end().unwrap();
            let mut n = 0;
            for _ in 0..moments.len() {
                n = (n * 7 + 5) % moments.len();
                let (tick, expected, instructions) = moments[n];
                replay.to_tick(tick).unwrap();
                let here = (replay.now(), hash(&mut replay), replay.instructions());
                assert_eq!(here, (tick, expected, instructions));
                assert!(replay.frames().bytes <= budget);
                n += 1;
            }
        }
    }
}

#[test]
fn exits_are_gone_to_by_number_and_back() {
    let recorded = record(hypervisor(), (50, 1_000_000), 1500, &[]);
    let mut replay = replay(&recorded.bytes, BUDGET);
    replay.to_end().unwrap();
    let exits = replay.exits();
    assert!(exits > 10, "{exits}");
    let mut places = Vec::new();
    for number in 1..=exits {
        replay.to_exit(number).unwrap();
        assert_eq!(replay.exits(), number);
        places.push((replay.now(), hash(&mut replay)));
    }
    assert!(places.windows(2).all(|two| two[0].0 < two[1].0));
    // From between two exits to the one before, then one by one.
    replay.to_end().unwrap();
    for (tick, expected) in places.iter().rev() {
        replay.step_back_exit().unwrap();
        assert_eq!((replay.now(), hash(&mut replay)), (*tick, *expected));
    }
    assert!(matches!(
        replay.step_back_exit(),
        Err(ReplayError::Before { .. })
    ));
    let beyond = replay.to_exit(exits + 1).unwrap_err().to_string();
    assert!(
        beyond.contains(&format!("before VM exit {}", exits + 1)),
        "{beyond}"
    );
}

#[test]
fn instructions_are_gone_back_one_by_one_and_over_idle_time() {
    let recorded = recorded_greeting();
    let mut replay = replay(&recorded.bytes, BUDGET);
    // The second lies in idle time, after the last instruction.
    for tick in [1000, 900_000, 1_000_050] {
        replay.to_tick(tick).unwrap();
        let mut last = replay.instructions();
        let mut seen = vec![];
        for _ in 0..20 {
            replay.step_back(1).unwrap();
            assert_eq!(replay.instructions(), last - 1);
            last -= 1;
            seen.push((replay.now(), hash(&mut replay)));
        }
        assert!(seen.windows(2).all(|two| two[1].0 < two[0].0));
        for (tick, expected) in seen.iter().rev() {
            assert_eq!(replay.now(), *tick);
            assert_eq!(hash(&mut replay), *expected);
            replay.step(1).unwrap();
        }
        // All at once.
        replay.to_tick(tick).unwrap();
        replay.step_back(20).unwrap();
        assert_eq!((replay.now(), hash(&mut replay)), seen[19]);
        replay.step(19).unwrap();
        replay.step_back(1).unwrap();
        assert_eq!((replay.now(), hash(&mut replay)), seen[1]);
    }
    replay.to_tick(77).unwrap();
    assert!(matches!(
        replay.step_back(1),
        Err(ReplayError::Before { start: 77 })
    ));
    assert!(matches!(
        replay.to_tick(76),
        Err(ReplayError::Before { start: 77 })
    ));
    let error = replay.to_tick(recorded.end + 1).unwrap_err();
    assert!(
        matches!(error, ReplayError::Beyond { end, .. } if end == recorded.end),
        "{error}"
    );
}

/// Where an exit or a breakpoint takes no tick of its own, the tick alone does not say when something came.
#[test]
fn input_at_exits_and_at_breakpoints_comes_where_it_came() {
    let mut machine = hypervisor();
    machine.run(&Until::tick(100)).unwrap();
    let mut recorder = begin(&mut machine, Vec::new(), &Options::default()).unwrap();
    let mut stops = 0;
    loop {
        let number = machine.exit_statistics().unwrap().exits() + 1;
        let rip = machine.read_vcpu(0).unwrap().rip;
        let until = Until::end().vm_exit_number(number).breakpoint(rip);
        let stop = machine.run(&until).unwrap();
        recorder.ran(&mut machine, &stop).unwrap();
        if stop.is_end() {
            break;
        }
        stops += 1;
        let bytes = vec![stops as u8];
        let address = 0xf0_0000 + stops;
        recorder
            .input(&mut machine, Input::Memory { address, bytes })
            .unwrap();
        let mut state = machine.read_vcpu(0).unwrap();
        state.dr[0] = stops;
        let state = Box::new(state);
        recorder
            .input(&mut machine, Input::Registers { vcpu: 0, state })
            .unwrap();
        if stops % 3 == 0 {
            recorder.keyframe(&mut machine).unwrap();
        }
    }
    assert!(stops > 10, "{stops}");
    let bytes = recorder.finish(&mut machine).unwrap();
    let mut replay = replay(&bytes, BUDGET);
    replay.to_end().unwrap();
    assert_eq!(hash(&mut replay), machine.state_hash().unwrap());
}

#[test]
fn a_save_by_somebody_else_is_an_event_too() {
    let mut machine = hypervisor();
    let mut recorder = begin(&mut machine, Vec::new(), &Options::default()).unwrap();
    for tick in [10_000, 20_000, 30_000] {
        recorder.runs(&mut machine).unwrap();
        let stop = machine.run(&Until::tick(tick)).unwrap();
        recorder.ran(&mut machine, &stop).unwrap();
        if tick == 20_000 {
            machine.save().unwrap();
        }
    }
    let bytes = recorder.finish(&mut machine).unwrap();
    let mut replay = replay(&bytes, BUDGET);
    assert_eq!(replay.log().keyframes(), 1);
    assert_eq!(replay.log().entries[0].at.tick, 20_000);
    while replay.to_next_entry().unwrap() {}
    assert_eq!((replay.now(), replay.compared()), (30_000, 2));
    assert_eq!(hash(&mut replay), machine.state_hash().unwrap());
}

#[test]
fn a_machine_that_differs_is_found_at_the_first_keyframe_after() {
    let recorded = recorded_greeting();
    let (machine, log) = open(&recorded.bytes);
    let typed = |entry: &Entry| matches!(&entry.event, Event::Input(Input::Serial(bytes)) if bytes == b"hello");
    let place = log.entries.iter().position(typed).unwrap();
    let keyframe = |entry: &&Entry| matches!(entry.event, Event::Keyframe { .. });
    let before = log.entries[..place].iter().filter(keyframe).count();
    let mut wrong = log.clone();
    wrong.entries[place].event = Event::Input(Input::Serial(b"jello".to_vec()));
    let mut replay = Replay::new(machine, wrong, BUDGET).unwrap();
    match replay.to_end().unwrap_err() {
        ReplayError::Differs {
            number,
            tick,
            recorded,
            here,
        } => {
            assert_eq!(number, before + 1);
            assert!(tick >= 1_000_001 && recorded != here);
        }
        other => panic!("{other}"),
    }
    // What it says of itself: which keyframe, where, and both hashes.
    let text = replay.to_end().unwrap_err().to_string();
    assert!(text.contains(&format!("keyframe {}", before + 1)), "{text}");
}

#[test]
fn what_was_cut_off_is_not_missed_and_what_is_damaged_is_refused() {
    let recorded = record(
        greeting(),
        (77, 300_000),
        5_000,
        &typed(&[(100_001, "abc")]),
    );
    let mut from = &recorded.bytes[..];
    Log::open(&mut from).unwrap();
    let snapshot = Snapshot::open(&mut from).unwrap();
    snapshot
        .build(MEMORY, Vec::new(), |builder| builder)
        .unwrap();
    let whole = Log::read(from).unwrap();
    let mut counts = Vec::new();
    for length in 0..from.len() {
        let log = Log::read(&from[..length]).unwrap();
        assert!(!log.whole);
        assert_eq!(log.entries, whole.entries[..log.entries.len()]);
        counts.push(log.entries.len());
    }
    assert!(counts.contains(&0) && counts.contains(&whole.entries.len()));
    for bit in 0..8 * from.len() {
        let mut bytes = from.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let read = Log::read(&bytes[..]);
        assert!(read.is_err(), "bit {bit}");
    }
    // The run of a cut recording is made again as far as it goes.
    let cut = recorded.bytes.len() - 60;
    let mut replay = replay(&recorded.bytes[..cut], BUDGET);
    replay.to_end().unwrap();
    assert!(replay.compared() > 0 && replay.now() < recorded.end);
}

#[test]
fn other_files_and_impossible_logs_are_refused() {
    let (_, log) = open(&recorded_greeting().bytes);
    let mut turned = Log::default();
    turned.push(log.entries[3].clone()).unwrap();
    assert!(matches!(
        turned.push(log.entries[0].clone()),
        Err(LogError::Order { number: 2, .. })
    ));
    let mut over = Log::default();
    let last = log.entries.last().unwrap().clone();
    over.push(last.clone()).unwrap();
    assert!(over.push(last).is_err());
    let mut snapshot = Vec::new();
    hypernest_migrate::snapshot::write(&mut greeting(), &mut snapshot, &Options::default())
        .unwrap();
    let error = Log::open(&snapshot[..]).unwrap_err().to_string();
    assert_eq!(error, "it is a snapshot and no recording");
    let error = Log::open(&b"hello, this is no recording"[..]).unwrap_err();
    assert!(matches!(error, LogError::Section(SectionError::Magic)));
}

#[test]
fn input_that_the_machine_refuses_is_not_written() {
    let mut machine = greeting();
    let mut recorder: Recorder<Vec<u8>> =
        begin(&mut machine, Vec::new(), &Options::default()).unwrap();
    let bytes = vec![1];
    let address = 1 << 40;
    let error = recorder
        .input(&mut machine, Input::Memory { address, bytes })
        .unwrap_err();
    assert!(
        matches!(error, RecordError::Input(InputError::Memory(_))),
        "{error}"
    );
    let bytes = recorder.finish(&mut machine).unwrap();
    assert_eq!(open(&bytes).1.entries.len(), 1);
    // And where a recording has it all the same, replay says which entry.
    let (machine, mut log) = open(&bytes);
    let mut stop = log.entries.pop().unwrap();
    stop.event = Event::Input(Input::Memory {
        address,
        bytes: vec![1],
    });
    log.push(stop).unwrap();
    let error = Replay::new(machine, log, 0).unwrap().to_end().unwrap_err();
    assert!(
        matches!(error, ReplayError::Input { number: 1, .. }),
        "{error}"
    );
}

#[test]
fn a_log_whose_moments_never_come_is_told() {
    let recorded = record(hypervisor(), (50, 1_000_000), 1500, &[]);
    let (machine, mut log) = open(&recorded.bytes);
    let mut entry = log.entries.pop().unwrap();
    assert!(matches!(entry.event, Event::Stop { .. }));
    entry.at.tick += 1_000_000;
    log.push(entry).unwrap();
    let error = Replay::new(machine, log, 0).unwrap().to_end().unwrap_err();
    assert!(matches!(error, ReplayError::Lost { .. }), "{error}");
    let (machine, mut log) = open(&recorded.bytes);
    log.entries[2].at.exits += 1_000_000;
    for entry in &mut log.entries[3..] {
        entry.at.exits += 1_000_000;
    }
    let error = Replay::new(machine, log, 0).unwrap().to_end().unwrap_err();
    assert!(
        matches!(error, ReplayError::Lost { number: 3, .. }),
        "{error}"
    );
}
