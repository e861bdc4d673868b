//! A trace that ui.perfetto.dev opens: Perfetto's TrackEvent packets in protobuf.
//!
//! Each vCPU is a process with three tracks: what Hypernest does (L0), when L1 executes and which
//! exit it handles, when L2 executes. Times are ticks, as nanoseconds. Field numbers are those of
//! Perfetto's `protos/perfetto/trace/trace_packet.proto` and what it includes.

use std::collections::HashMap;
use std::io::{Result, Write};

use hypernest_machine::{Answer, Event, Happening, Level, Tick};

use crate::exits::{annotations, entry_words};
use crate::trace::Names;

/// The one sequence of packets.
const SEQUENCE: u64 = 1;
/// TracePacket.sequence_flags.
const STATE_CLEARED: u64 = 1;
const NEEDS_STATE: u64 = 2;
/// TrackDescriptor.child_ordering: by rank.
const BY_RANK: u64 = 3;

/// TrackEvent.type.
#[derive(Clone, Copy)]
enum Type {
    Begin = 1,
    End = 2,
    Instant = 3,
}

/// Tracks of a vCPU, in the order in which they are shown.
const TRACKS: [&str; 3] = ["L0", "L1", "L2"];

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn uint(mut self, field: u32, value: u64) -> Message {
        self.varint(u64::from(field) << 3);
        self.varint(value);
        self
    }

    fn bytes(mut self, field: u32, bytes: &[u8]) -> Message {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    fn text(self, field: u32, text: &str) -> Message {
        self.bytes(field, text.as_bytes())
    }

    fn message(self, field: u32, message: Message) -> Message {
        self.bytes(field, &message.0)
    }
}

/// Annotations by name.
type Details = Vec<(&'static str, String)>;

/// What a vCPU's tracks wait for.
#[derive(Clone)]
struct Open {
    /// When L1 took over, and its slice's name and annotations.
    l1: Option<(Tick, String, Details)>,
    /// When L2 took over, and at which RIP.
    l2: Option<(Tick, u64)>,
}

/// Writes a trace.
pub struct Writer<W: Write> {
    out: W,
    names: Names,
    /// Numbers of event names and annotation names that are in the trace already.
    interned: [HashMap<String, u64>; 2],
    vcpus: Vec<Open>,
}

impl<W: Write> Writer<W> {
    /// Begins a trace of a machine with `vcpus` vCPUs at tick `now`.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(out: W, vcpus: usize, now: Tick, names: Names) -> Result<Writer<W>> {
        let open = Open {
            l1: Some((now, "before the first VM entry".into(), Vec::new())),
            l2: None,
        };
        let mut writer = Writer {
            out,
            names,
            interned: Default::default(),
            vcpus: vec![open; vcpus],
        };
        for vcpu in 0..vcpus as u64 {
            let process = Message::default()
                .uint(1, vcpu + 1) // pid
                .text(6, &format!("vCPU {vcpu}"));
            let parent = Message::default()
                .uint(1, process_track(vcpu))
                .message(3, process)
                .uint(11, BY_RANK);
            let flags = if vcpu == 0 { STATE_CLEARED } else { 0 };
            writer.packet(Message::default().message(60, parent).uint(13, flags))?;
            for (rank, name) in (0..).zip(TRACKS) {
                let track = Message::default()
                    .uint(1, track(vcpu, rank))
                    .text(2, name)
                    .uint(5, process_track(vcpu))
                    .uint(12, rank);
                writer.packet(Message::default().message(60, track))?;
            }
        }
        Ok(writer)
    }

    /// Adds what happened. Events come in the order in which they happened.
    ///
    /// # Errors
    /// Those of the file.
    pub fn event(&mut self, event: &Event) -> Result<()> {
        let vcpu = event.vcpu as usize;
        if vcpu >= self.vcpus.len() {
            return Ok(());
        }
        let details = annotations(event, &self.names);
        let (what, level) = match &event.what {
            Happening::VmEntry(entry) => match entry.failure {
                None => ("VM entry".to_owned(), Level::L1),
                Some(failure) => (entry_words(failure.check, &failure.answer), Level::L1),
            },
            Happening::VmExit(exit) => (format!("VM exit {}", exit.reason.ident()), Level::L2),
            Happening::VmInstruction(instruction) => {
                (instruction.name.to_owned(), instruction.level)
            }
            Happening::EptViolation(_) => ("EPT violation".to_owned(), Level::L2),
            Happening::Injection(_) => ("event injected".to_owned(), Level::L2),
            _ => return Ok(()),
        };
        self.instant(event, 0, &what, &details)?;
        match &event.what {
            Happening::VmEntry(entry) if entry.failure.is_none() => {
                let (end, since) = (event.tick, event.tick + 1);
                if let Some((from, name, details)) = self.vcpus[vcpu].l1.take() {
                    self.slice(event.vcpu, 1, (from, end.max(from)), &name, &details)?;
                }
                self.vcpus[vcpu].l2 = Some((since, entry.guest_rip));
            }
            Happening::VmEntry(entry) => {
                // L1 goes on; where it was told by an exit, elsewhere.
                if let Some(failure) = entry.failure
                    && let Answer::Exit { reason, .. } = failure.answer
                {
                    let name = reason.ident().to_owned();
                    if let Some((from, old, details)) = self.vcpus[vcpu].l1.take() {
                        let range = (from, event.tick.max(from));
                        self.slice(event.vcpu, 1, range, &old, &details)?;
                    }
                    self.vcpus[vcpu].l1 = Some((event.tick + 1, name, details));
                }
            }
            Happening::VmExit(exit) => {
                if let Some((from, rip)) = self.vcpus[vcpu].l2.take() {
                    let inside = [
                        ("entered_at", self.names.address(level, rip)),
                        ("left_at", self.names.address(level, event.rip)),
                        ("instructions", exit.guest_instructions.to_string()),
                        ("exit", exit.reason.ident().to_owned()),
                    ];
                    let name = self.names.function(level, event.rip);
                    let name = name.unwrap_or_else(|| "guest".into());
                    let range = (from, event.tick.max(from));
                    self.slice(event.vcpu, 2, range, &name, &inside)?;
                }
                let name = exit.reason.ident().to_owned();
                self.vcpus[vcpu].l1 = Some((event.tick, name, details));
            }
            _ => {}
        }
        Ok(())
    }

    /// Ends what is open at tick `now`, and writes everything out.
    ///
    /// # Errors
    /// Those of the file.
    pub fn finish(&mut self, now: Tick) -> Result<()> {
        for vcpu in 0..self.vcpus.len() {
            let Open { l1, l2 } = self.vcpus[vcpu].clone();
            if let Some((from, name, details)) = l1 {
                self.slice(vcpu as u32, 1, (from, now.max(from)), &name, &details)?;
            }
            if let Some((from, rip)) = l2 {
                let details = [("entered_at", self.names.address(Level::L2, rip))];
                self.slice(vcpu as u32, 2, (from, now.max(from)), "guest", &details)?;
            }
        }
        self.out.flush()
    }

    fn instant(
        &mut self,
        event: &Event,
        rank: u64,
        name: &str,
        details: &[(&'static str, String)],
    ) -> Result<()> {
        let vcpu = u64::from(event.vcpu);
        self.track_event(event.tick, track(vcpu, rank), Type::Instant, name, details)
    }

    fn slice(
        &mut self,
        vcpu: u32,
        rank: u64,
        (from, to): (Tick, Tick),
        name: &str,
        details: &[(&'static str, String)],
    ) -> Result<()> {
        let track = track(u64::from(vcpu), rank);
        self.track_event(from, track, Type::Begin, name, details)?;
        self.track_event(to, track, Type::End, "", &[])
    }

    fn track_event(
        &mut self,
        tick: Tick,
        track: u64,
        kind: Type,
        name: &str,
        details: &[(&'static str, String)],
    ) -> Result<()> {
        // Names are in the trace once; those that are new come with the packet that needs them.
        let mut new = Message::default();
        let mut event = Message::default().uint(9, kind as u64).uint(11, track);
        if !name.is_empty() {
            let iid = intern(&mut self.interned[0], &mut new, 2, name);
            event = event.uint(10, iid);
        }
        for (key, value) in details {
            let iid = intern(&mut self.interned[1], &mut new, 3, key);
            event = event.message(4, Message::default().uint(1, iid).text(6, value));
        }
        let mut packet = Message::default()
            .uint(8, tick)
            .uint(13, NEEDS_STATE)
            .message(11, event);
        if !new.0.is_empty() {
            packet = packet.message(12, new);
        }
        self.packet(packet)
    }

    fn packet(&mut self, packet: Message) -> Result<()> {
        let packet = packet.uint(10, SEQUENCE);
        self.out.write_all(&Message::default().message(1, packet).0)
    }
}

/// The number of a name; a new one is added to `new`, an InternedData, in `field`.
fn intern(known: &mut HashMap<String, u64>, new: &mut Message, field: u32, name: &str) -> u64 {
    if let Some(iid) = known.get(name) {
        return *iid;
    }
    let iid = known.len() as u64 + 1;
    known.insert(name.into(), iid);
    let row = Message::default().uint(1, iid).text(2, name);
    *new = std::mem::take(new).message(field, row);
    iid
}

fn process_track(vcpu: u64) -> u64 {
    (vcpu + 1) << 8
}

fn track(vcpu: u64, rank: u64) -> u64 {
    process_track(vcpu) + 1 + rank
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_take_seven_bits_a_byte() {
        let message = Message::default().uint(1, 300).text(2, "ab");
        assert_eq!(message.0, [0x08, 0xac, 0x02, 0x12, 2, b'a', b'b']);
    }

    #[test]
    fn a_name_is_written_once() {
        let mut known = HashMap::new();
        let mut new = Message::default();
        assert_eq!(intern(&mut known, &mut new, 2, "one"), 1);
        let len = new.0.len();
        assert_eq!(intern(&mut known, &mut new, 2, "one"), 1);
        assert_eq!(new.0.len(), len);
        assert_eq!(intern(&mut known, &mut new, 2, "two"), 2);
    }
}
