//! Events of VMX as they are written out: lines of JSON, a Perfetto trace.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hypernest_machine::cpu::EnlightenedEntry;
use hypernest_machine::{
    Answer, Event, EventKinds, EventRequest, Happening, Level, Machine, WhenFull,
};
use hypernest_vmcs::InstructionError;
use hypernest_vmcs::checks::CHECK_ROWS;
use serde_json::{Map, Value, json};

use crate::files;
use crate::perfetto;
use crate::trace::Names;

/// Events that the machine keeps between two looks.
const CAPACITY: usize = 1 << 14;

/// Where events go.
#[derive(Default)]
pub struct Events {
    lines: Option<(BufWriter<File>, PathBuf)>,
    trace: Option<(perfetto::Writer<BufWriter<File>>, PathBuf)>,
    names: Names,
}

impl Events {
    /// Creates the files that are asked for, and asks the machine for what belongs in them.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn open(
        machine: &mut Machine,
        lines: Option<&Path>,
        trace: Option<&Path>,
        names: Names,
    ) -> Result<Events> {
        let file = |what, path: &Path| -> Result<(BufWriter<File>, PathBuf)> {
            let file = files::create(what, path)?;
            Ok((BufWriter::with_capacity(1 << 20, file), path.to_owned()))
        };
        let mut kinds = EventKinds::NONE;
        let lines = match lines {
            None => None,
            Some(path) => {
                kinds = kinds | EventKinds::VM_EXIT | EventKinds::VM_ENTRY;
                Some(file("exits", path)?)
            }
        };
        let trace = match trace {
            None => None,
            Some(path) => {
                kinds = kinds
                    | EventKinds::VM_EXIT
                    | EventKinds::VM_ENTRY
                    | EventKinds::EPT_VIOLATION
                    | EventKinds::INJECTION;
                let (out, path) = file("trace", path)?;
                let (vcpus, now) = (machine.vcpus(), machine.now());
                let writer = perfetto::Writer::new(out, vcpus, now, names.clone());
                Some((writer.with_context(|| unwritten("trace", &path))?, path))
            }
        };
        if kinds != EventKinds::NONE {
            machine.request_events(&EventRequest {
                kinds,
                capacity: CAPACITY,
                when_full: WhenFull::Stop,
            })?;
        }
        Ok(Events {
            lines,
            trace,
            names,
        })
    }

    /// What names addresses.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Writes what has happened since the last time.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn take(&mut self, machine: &mut Machine) -> Result<()> {
        for event in machine.take_events() {
            if let Some((out, path)) = &mut self.lines
                && let Some(line) = line(&event, &self.names)
            {
                writeln!(out, "{line}").with_context(|| unwritten("exits", path))?;
            }
            if let Some((trace, path)) = &mut self.trace {
                let done = trace.event(&event);
                done.with_context(|| unwritten("trace", path))?;
            }
        }
        Ok(())
    }

    /// Writes what is left, at the end of the run.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn finish(&mut self, machine: &mut Machine) -> Result<()> {
        self.take(machine)?;
        if let Some((out, path)) = &mut self.lines {
            out.flush().with_context(|| unwritten("exits", path))?;
        }
        if let Some((trace, path)) = &mut self.trace {
            let done = trace.finish(machine.now());
            done.with_context(|| unwritten("trace", path))?;
        }
        Ok(())
    }
}

fn unwritten(what: &str, path: &Path) -> String {
    format!("cannot write the {what} {}", path.display())
}

/// Which check failed and what L1 was told, in few words.
pub fn entry_words(check: Option<&str>, answer: &Answer) -> String {
    let answer = match answer {
        Answer::Invalid => "VMfailInvalid".to_owned(),
        Answer::Valid(number) => {
            let meaning = InstructionError(*number).meaning();
            format!("VMfailValid {number}, {meaning}")
        }
        Answer::Exit {
            reason,
            qualification,
        } => format!("exit {}, qualification {qualification}", reason.0),
    };
    match check {
        Some(id) => format!("VM entry failed: check {id}, {answer}"),
        None => format!("VM entry failed: {answer}"),
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// The line of an exit or of an entry that failed; `None` for other events. Numbers that are
/// addresses or bits are strings in hexadecimal, for readers whose numbers have 53 bits.
fn line(event: &Event, names: &Names) -> Option<Value> {
    let mut line = Map::new();
    let mut put = |key: &str, value: Value| {
        line.insert(key.into(), value);
    };
    match &event.what {
        Happening::VmExit(exit) => {
            put("event", "exit".into());
            put("number", exit.number.into());
            put("level", Level::L2.name().into());
            put("reason", exit.reason.0.into());
            put("name", exit.reason.ident().into());
        }
        Happening::VmEntry(entry) => {
            let failure = entry.failure?;
            put("event", "entry-failed".into());
            put("level", Level::L1.name().into());
            put("check", json!(failure.check));
            put(
                "message",
                entry_words(failure.check, &failure.answer).into(),
            );
            let row = CHECK_ROWS.iter().find(|row| Some(row.id) == failure.check);
            if let Some(row) = row {
                put("condition", row.condition.into());
            }
        }
        _ => return None,
    }
    put("tick", event.tick.into());
    put("vcpu", event.vcpu.into());
    put("instructions", event.instructions.into());
    let level = match event.what {
        Happening::VmExit(_) => Level::L2,
        _ => Level::L1,
    };
    put("rip", hex(event.rip).into());
    if let Some(symbol) = names.symbol(level, event.rip) {
        put("symbol", symbol.into());
    }
    for (key, value) in annotations(event, names) {
        // Those above are told better.
        if !matches!(key, "rip" | "number" | "check") {
            put(key, value.into());
        }
    }
    Some(Value::Object(line))
}

/// The enlightened VMCS of an entry, and the groups of it that were clean and so not read.
fn enlightened(entry: EnlightenedEntry) -> [(&'static str, String); 2] {
    [
        ("evmcs", hex(entry.address)),
        ("evmcs_clean", hex(entry.clean.into())),
    ]
}

/// What an event has to tell beyond its kind, in order; what is zero or absent is left out.
pub fn annotations(event: &Event, names: &Names) -> Vec<(&'static str, String)> {
    let mut list = Vec::new();
    let mut put = |key, value: u64| {
        if value != 0 {
            list.push((key, hex(value)));
        }
    };
    let level = match &event.what {
        Happening::VmExit(exit) => {
            put("qualification", exit.qualification);
            put("instruction_length", exit.length.into());
            put("instruction_info", exit.instruction_info.into());
            put("interruption_info", exit.event.into());
            put("interruption_error", exit.event_error.into());
            put("vectoring_info", exit.vectoring.into());
            put("vectoring_error", exit.vectoring_error.into());
            list.extend(exit.guest_physical.map(|at| ("guest_physical", hex(at))));
            list.extend(exit.guest_linear.map(|at| ("guest_linear", hex(at))));
            list.extend(exit.enlightened.into_iter().flat_map(enlightened));
            list.push(("guest_instructions", exit.guest_instructions.to_string()));
            list.push(("number", exit.number.to_string()));
            Level::L2
        }
        Happening::VmEntry(entry) => {
            put("interruption_info", entry.injects.into());
            list.push(("guest_rip", names.address(Level::L2, entry.guest_rip)));
            list.extend(entry.vmcs.map(|at| ("vmcs", hex(at))));
            list.extend(entry.enlightened.into_iter().flat_map(enlightened));
            let check = entry.failure.and_then(|failure| failure.check);
            list.extend(check.map(|id| ("check", id.to_owned())));
            Level::L1
        }
        Happening::VmInstruction(instruction) => {
            put("operand", instruction.operand);
            put("value", instruction.value);
            instruction.level
        }
        Happening::EptViolation(violation) => {
            list.push(("guest_physical", hex(violation.guest_physical)));
            let linear = violation.guest_linear;
            list.extend(linear.map(|at| ("guest_linear", hex(at))));
            list.push(("qualification", hex(violation.qualification)));
            if violation.exception {
                list.push(("exception", "#VE".into()));
            }
            Level::L2
        }
        Happening::Injection(injection) => {
            put("interruption_info", injection.info.into());
            put("error_code", injection.error_code.into());
            Level::L2
        }
        _ => return list,
    };
    list.push(("rip", names.address(level, event.rip)));
    list
}
