//! Reads a Perfetto trace with another decoder (`prost`) than what wrote it. Message and field
//! numbers are those of Perfetto's `trace_packet.proto`, `track_event.proto`,
//! `track_descriptor.proto`, `process_descriptor.proto`, `interned_data.proto`.

use std::collections::HashMap;

use prost::Message;

#[derive(Message)]
struct Trace {
    #[prost(message, repeated, tag = "1")]
    packet: Vec<TracePacket>,
}

#[derive(Message)]
struct TracePacket {
    #[prost(uint64, optional, tag = "8")]
    timestamp: Option<u64>,
    #[prost(uint32, tag = "10")]
    trusted_packet_sequence_id: u32,
    #[prost(message, optional, tag = "11")]
    track_event: Option<TrackEvent>,
    #[prost(message, optional, tag = "12")]
    interned_data: Option<InternedData>,
    #[prost(uint32, tag = "13")]
    sequence_flags: u32,
    #[prost(message, optional, tag = "60")]
    track_descriptor: Option<TrackDescriptor>,
}

#[derive(Message)]
struct TrackDescriptor {
    #[prost(uint64, tag = "1")]
    uuid: u64,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, optional, tag = "3")]
    process: Option<ProcessDescriptor>,
    #[prost(uint64, tag = "5")]
    parent_uuid: u64,
}

#[derive(Message)]
struct ProcessDescriptor {
    #[prost(int32, tag = "1")]
    pid: i32,
    #[prost(string, tag = "6")]
    process_name: String,
}

#[derive(Message)]
struct TrackEvent {
    #[prost(message, repeated, tag = "4")]
    debug_annotations: Vec<DebugAnnotation>,
    #[prost(int32, tag = "9")]
    r#type: i32,
    #[prost(uint64, tag = "10")]
    name_iid: u64,
    #[prost(uint64, tag = "11")]
    track_uuid: u64,
}

#[derive(Message)]
struct DebugAnnotation {
    #[prost(uint64, tag = "1")]
    name_iid: u64,
    #[prost(string, tag = "6")]
    string_value: String,
}

#[derive(Message)]
struct InternedData {
    #[prost(message, repeated, tag = "2")]
    event_names: Vec<Name>,
    #[prost(message, repeated, tag = "3")]
    debug_annotation_names: Vec<Name>,
}

#[derive(Message)]
struct Name {
    #[prost(uint64, tag = "1")]
    iid: u64,
    #[prost(string, tag = "2")]
    name: String,
}

/// A track: its own name, or its process's.
pub struct Track {
    uuid: u64,
    pub name: String,
}

/// A slice of a track.
pub struct Slice {
    track: u64,
    pub from: u64,
    pub to: u64,
    pub name: String,
    details: Vec<(String, String)>,
}

impl Slice {
    /// The annotation of this name.
    pub fn detail(&self, name: &str) -> &str {
        let mut details = self.details.iter();
        let found = details.find(|(key, _)| key == name);
        found.map_or("", |(_, value)| value)
    }
}

/// What the file says.
pub struct Read {
    pub tracks: Vec<Track>,
    slices: Vec<Slice>,
    instants: Vec<(u64, String)>,
}

impl Read {
    fn track(&self, name: &str) -> u64 {
        let found = self.tracks.iter().find(|track| track.name == name);
        found.expect("a track of this name").uuid
    }

    /// The slices of a track, in the order of the file.
    pub fn slices(&self, track: &str) -> impl Iterator<Item = &Slice> {
        let uuid = self.track(track);
        self.slices.iter().filter(move |slice| slice.track == uuid)
    }

    /// The names of the instants of a track.
    pub fn instants(&self, track: &str) -> Vec<&str> {
        let uuid = self.track(track);
        let instants = self.instants.iter().filter(|(of, _)| *of == uuid);
        instants.map(|(_, name)| &name[..]).collect()
    }
}

const BEGIN: i32 = 1;
const END: i32 = 2;
const INSTANT: i32 = 3;

/// Reads a trace, holding it to what Perfetto demands: one sequence, whose state is cleared by its
/// first packet, names before their use, and an end for every beginning.
pub fn read(bytes: &[u8]) -> Read {
    let trace = Trace::decode(bytes).expect("protobuf");
    assert_eq!(trace.packet[0].sequence_flags & 1, 1, "state is cleared");
    let mut names = HashMap::new();
    let mut keys = HashMap::new();
    let mut read = Read {
        tracks: Vec::new(),
        slices: Vec::new(),
        instants: Vec::new(),
    };
    let mut open: HashMap<u64, Slice> = HashMap::new();
    for packet in trace.packet {
        assert_eq!(packet.trusted_packet_sequence_id, 1);
        for name in packet
            .interned_data
            .iter()
            .flat_map(|data| &data.event_names)
        {
            names.insert(name.iid, name.name.clone());
        }
        let data = packet.interned_data.iter();
        for name in data.flat_map(|data| &data.debug_annotation_names) {
            keys.insert(name.iid, name.name.clone());
        }
        if let Some(track) = packet.track_descriptor {
            let name = match track.process {
                Some(process) => {
                    assert!(process.pid > 0);
                    process.process_name
                }
                None => {
                    let parent = read.tracks.iter().any(|at| at.uuid == track.parent_uuid);
                    assert!(parent, "a parent that was described before");
                    track.name
                }
            };
            read.tracks.push(Track {
                uuid: track.uuid,
                name,
            });
        }
        let Some(event) = packet.track_event else {
            continue;
        };
        assert_eq!(packet.sequence_flags & 2, 2, "it needs the names");
        let time = packet.timestamp.expect("a timestamp");
        let known = read.tracks.iter().any(|at| at.uuid == event.track_uuid);
        assert!(known, "a track that was described before");
        match event.r#type {
            BEGIN => {
                let details = event.debug_annotations.iter().map(|one| {
                    let key = keys[&one.name_iid].clone();
                    (key, one.string_value.clone())
                });
                let slice = Slice {
                    track: event.track_uuid,
                    from: time,
                    to: 0,
                    name: names[&event.name_iid].clone(),
                    details: details.collect(),
                };
                assert!(open.insert(event.track_uuid, slice).is_none());
            }
            END => {
                let mut slice = open.remove(&event.track_uuid).expect("a beginning");
                assert!(slice.from <= time);
                slice.to = time;
                read.slices.push(slice);
            }
            INSTANT => {
                let name = names[&event.name_iid].clone();
                read.instants.push((event.track_uuid, name));
            }
            other => panic!("type {other}"),
        }
    }
    assert!(open.is_empty());
    read
}
