//! Snapshots that are cut, damaged, hostile, older or newer: a clear message, no panic, no more memory than there is to
//! read.

use hypernest_guests::{HYPERVISOR, HYPERVISOR_MEMORY};
use hypernest_machine::{Machine, Until, VmxChoice};
use hypernest_migrate::Snapshot;
use hypernest_migrate::hello::Offer;
use hypernest_migrate::section::{Kind, SectionReader, SectionWriter};
use hypernest_migrate::snapshot::{Options, SnapshotError, write};

const MOST: u64 = 64 << 20;

/// A snapshot of the built-in hypervisor, with a console that it has no use for.
fn good() -> Vec<u8> {
    let mut machine = Machine::builder()
        .memory(HYPERVISOR_MEMORY)
        .image(HYPERVISOR)
        .vmx(VmxChoice::Max)
        .console()
        .cpus(2)
        .build()
        .unwrap();
    machine.run(&Until::end().text("INVLPG")).unwrap();
    machine.serial_input(b"something that nobody reads");
    let mut bytes = Vec::new();
    write(&mut machine, &mut bytes, &Options::default()).unwrap();
    bytes
}

fn build(bytes: &[u8]) -> Result<Machine, SnapshotError> {
    Snapshot::open(bytes)?.build(MOST, Vec::new(), |builder| builder)
}

/// The one line of a refusal.
fn refused(bytes: &[u8]) -> String {
    let error = build(bytes).err().expect("refused").to_string();
    assert!(!error.contains('\n') && error.len() > 10, "{error}");
    error
}

#[derive(Clone)]
struct Section {
    name: String,
    version: u16,
    required: bool,
    content: Vec<u8>,
}

fn sections(bytes: &[u8]) -> Vec<Section> {
    let mut reader = SectionReader::new(bytes, Kind::Snapshot).unwrap();
    let (mut all, mut content) = (Vec::new(), Vec::new());
    while let Some(head) = reader.next(&mut content).unwrap() {
        all.push(Section {
            name: head.name,
            version: head.version,
            required: head.required,
            content: content.clone(),
        });
    }
    all
}

/// A file of sections, all checksums right.
fn file(sections: &[Section]) -> Vec<u8> {
    let mut writer = SectionWriter::new(Vec::new(), Kind::Snapshot).unwrap();
    for section in sections {
        let Section {
            name,
            version,
            content,
            ..
        } = section;
        match section.required {
            true => writer.required(name, *version, content),
            false => writer.optional(name, *version, content),
        }
        .unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn a_cut_at_any_length_is_told() {
    let good = good();
    // Of the pages' data a few will do.
    for length in (0..good.len()).filter(|at| *at < 5000 || at % 11 == 0) {
        let error = refused(&good[..length]);
        let says = if length == 0 { "no file" } else { "it was cut" };
        assert!(error.contains(says), "{length}: {error}");
    }
}

#[test]
fn a_changed_byte_anywhere_is_told() {
    let mut bytes = good();
    for at in (0..bytes.len()).filter(|at| *at < 5000 || at % 11 == 0) {
        let before = bytes[at];
        bytes[at] ^= 1 << (at % 8);
        refused(&bytes);
        bytes[at] = before;
    }
}

#[test]
fn a_changed_content_says_which_section() {
    let good = good();
    for section in sections(&good) {
        if section.content.is_empty() {
            continue;
        }
        let mut name = section.name.clone().into_bytes();
        name.resize(16, 0);
        let at = good.windows(name.len()).position(|at| at == name);
        let mut bytes = good.clone();
        bytes[at.unwrap() + 28] ^= 0x40;
        let error = refused(&bytes);
        let says = format!("section {:?}: its checksum is wrong", section.name);
        assert!(error.contains(&says), "{error}");
    }
}

/// What a checksum does not protect from: values that were never a machine's. Whatever comes of them, nothing panics,
/// and the machine can be run.
#[test]
fn no_value_in_any_section_is_fatal() {
    let good = sections(&good());
    let mut taken = 0;
    for (n, section) in good.iter().enumerate() {
        // Of the pages' data a few will do.
        for at in 0..section.content.len().min(1200) {
            for value in [0, 0xff] {
                let mut changed = good.clone();
                if changed[n].content[at] == value {
                    continue;
                }
                changed[n].content[at] = value;
                match build(&file(&changed)) {
                    Ok(mut machine) => {
                        taken += 1;
                        let end = machine.now().saturating_add(3000);
                        machine.run(&Until::tick(end)).unwrap();
                    }
                    Err(error) => assert!(!error.to_string().contains('\n')),
                }
            }
        }
    }
    assert!(taken > 500, "{taken}");
}

#[test]
fn sections_of_other_builds_are_passed_over_or_refused_by_name() {
    let mut all = sections(&good());
    let further = |required| Section {
        name: "novelty".into(),
        version: 3,
        required,
        content: vec![1, 2, 3],
    };
    for at in [0, 5, all.len()] {
        all.insert(at, further(false));
        let machine = build(&file(&all)).unwrap();
        assert_eq!(machine.vcpus(), 2);
        all[at] = further(true);
        let error = refused(&file(&all));
        assert!(error.contains("needs section \"novelty\""), "{error}");
        all.remove(at);
    }
    for n in 0..all.len() {
        let before = all[n].version;
        all[n].version = 9;
        if all[n].required {
            let error = refused(&file(&all));
            let says = format!("section {:?} has version 9", all[n].name);
            assert!(error.contains(&says), "{error}");
        } else {
            assert!(build(&file(&all)).is_ok(), "{}", all[n].name);
        }
        all[n].version = before;
    }
}

#[test]
fn what_the_guest_saw_and_is_not_here_is_listed() {
    let mut all = sections(&good());
    let section = all
        .iter_mut()
        .find(|section| section.name == "seen")
        .unwrap();
    let mut seen = Offer::from_bytes(&section.content).unwrap();
    let mut novelty = seen.cpu.features[0].clone();
    novelty.name = "NOVELTY".into();
    novelty.leaf = [7, 0x77];
    seen.cpu.features.push(novelty);
    seen.vmx_seen.as_mut().unwrap().msrs[1].1 ^= 1 << 40;
    section.content = seen.to_bytes();
    let error = refused(&file(&all));
    for part in ["NOVELTY", "; ", "IA32_VMX_"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn sections_that_are_missing_or_there_twice_are_told() {
    let all = sections(&good());
    for n in 0..all.len() {
        let name = all[n].name.as_str();
        let mut without = all.clone();
        without.remove(n);
        match name {
            "about" | "seen" => assert!(build(&file(&without)).is_ok()),
            // Which pages there are is known to no one else.
            "ram" => {}
            "vcpu" => assert!(refused(&file(&without)).contains("2 vCPUs are configured and 1")),
            "virtio" => assert!(build(&file(&without)).is_ok()),
            _ => {
                let says = format!("section {name:?} is missing");
                assert!(refused(&file(&without)).contains(&says));
            }
        }
        let mut twice = all.clone();
        twice.insert(n, all[n].clone());
        match name {
            "about" | "seen" | "virtio" => assert!(build(&file(&twice)).is_ok()),
            "ram" => assert!(refused(&file(&twice)).contains("twice")),
            "vcpu" => assert!(refused(&file(&twice)).contains("and 3 are there")),
            _ => {
                let says = format!("section {name:?}: it is there twice");
                assert!(refused(&file(&twice)).contains(&says));
            }
        }
    }
}

#[test]
fn no_length_takes_memory_that_the_file_does_not_have() {
    let all = sections(&good());
    for (n, section) in all.iter().enumerate() {
        // Postcard's lengths are variable: the greatest, at each place.
        for at in 0..section.content.len().min(600) {
            let mut changed = all.clone();
            changed[n].content.truncate(at);
            changed[n].content.extend([0xff; 9]);
            changed[n].content.push(1);
            if let Ok(machine) = build(&file(&changed)) {
                assert!(machine.ram().size() <= MOST);
            }
        }
    }
}
