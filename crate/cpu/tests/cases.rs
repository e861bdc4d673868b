//! Instruction cases from `cases/*.txt` (format: `hypernest_oracle::text`). Every case also runs
//! split over a page, and with its memory taken away.

use std::path::Path;

use hypernest_oracle::Ours;
use hypernest_oracle::case::{Case, Engine, Event, initial_memory};
use hypernest_oracle::judge::decode;
use hypernest_oracle::layout::{CODE, IMAGE, IMAGE_DATA, PAGE};
use hypernest_oracle::text::{self, Expected};
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, MemorySize};

/// Every case of every file, with its place for reports.
fn cases() -> Vec<(String, Expected)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("the folder of cases")
        .map(|entry| entry.expect("a folder entry").path())
        .collect();
    files.sort();
    let mut all = Vec::new();
    for file in files {
        let lines = std::fs::read_to_string(&file).expect("a readable case file");
        for (number, line) in lines.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let place = format!("{}:{}: {line}", file.display(), number + 1);
            let case = text::parse(line).unwrap_or_else(|error| panic!("{place}: {error}"));
            all.push((place, case));
        }
    }
    assert!(all.len() > 50, "only {} cases found", all.len());
    all
}

/// Runs a case and says what is wrong.
fn judge(ours: &mut Ours, expected: &Expected) -> Option<String> {
    let outcome = ours.run(&expected.case);
    let mut wanted = expected.outcome.clone();
    let undefined = expected.undefined_flags;
    wanted.state.rflags = wanted.state.rflags & !undefined | outcome.state.rflags & undefined;
    if outcome == wanted && ours.memory() == expected.memory {
        return None;
    }
    let changed = text::print_outcome(&expected.case, &outcome, ours.memory());
    Some(format!("gives{changed}"))
}

fn report(failures: &[String]) {
    assert!(failures.is_empty(), "\n{}\n", failures.join("\n"));
}

#[test]
fn every_case_ends_as_written() {
    let mut ours = Ours::new();
    let failures: Vec<_> = cases()
        .iter()
        .filter_map(|(place, case)| Some(format!("{place}\n    {}", judge(&mut ours, case)?)))
        .collect();
    report(&failures);
}

/// Whether moving the instruction moves nothing but RIP and the x87 instruction pointer.
fn is_movable(instruction: &Instruction) -> bool {
    instruction.flow_control() == FlowControl::Next && !instruction.is_ip_rel_memory_operand()
}

#[test]
fn every_case_ends_the_same_split_over_two_pages() {
    let mut ours = Ours::new();
    let mut failures = Vec::new();
    for (place, case) in cases() {
        if !is_movable(&decode(&case.case)) {
            continue;
        }
        for before in 1..case.case.code.len() as u64 {
            let mut moved = case.clone();
            let by = (CODE.start + PAGE - before).wrapping_sub(case.case.state.rip);
            let shift = |rip: &mut u64| *rip = rip.wrapping_add(by);
            shift(&mut moved.case.state.rip);
            shift(&mut moved.outcome.state.rip);
            if case.outcome.state.fpu.instruction == case.case.state.rip {
                shift(&mut moved.outcome.state.fpu.instruction);
            }
            if let Some(what) = judge(&mut ours, &moved) {
                failures.push(format!(
                    "{place}\n    {before} bytes before the page end: {what}"
                ));
            }
        }
    }
    report(&failures);
}

/// Whether the instruction accesses data memory for certain.
fn accesses_memory(case: &Case, instruction: &Instruction) -> bool {
    let idle_repeat = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let nothing_to_do =
        idle_repeat && instruction.is_string_instruction() && case.state.gpr[1] == 0;
    !nothing_to_do
        && InstructionInfoFactory::new()
            .info(instruction)
            .used_memory()
            .iter()
            .any(|used| used.memory_size() != MemorySize::Unknown)
}

#[test]
fn every_case_that_accesses_memory_page_faults_without_it_and_changes_nothing() {
    let mut ours = Ours::new();
    ours.map_data(false);
    let mut failures = Vec::new();
    let mut checked = 0;
    for (place, Expected { case, outcome, .. }) in cases() {
        if outcome.event != Event::Done || !accesses_memory(&case, &decode(&case)) {
            continue;
        }
        checked += 1;
        let result = ours.run(&case);
        let page_fault = matches!(result.event, Event::Fault { vector: 14, .. });
        let mut memory = vec![0; IMAGE - IMAGE_DATA];
        initial_memory(&case, &mut memory);
        if !page_fault || result.state != case.state || ours.memory() != memory {
            let changed = text::print_outcome(&case, &result, ours.memory());
            failures.push(format!("{place}\n    without memory:{changed}"));
        }
    }
    assert!(checked > 10, "only {checked} cases access memory");
    report(&failures);
}
