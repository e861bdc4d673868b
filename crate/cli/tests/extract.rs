//! `hypernest vmcs extract`: nested states out of QEMU's migration streams.

mod common;
#[path = "../../vmcs/tests/stream/mod.rs"]
mod stream;

use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

use common::{Dir, hypernest};
use hypernest_vmcs::{Field, Layout, NestedState, Vmcs};
use serde_json::Value;
use stream::{stream, subsection};

fn state(rip: u64) -> NestedState {
    let mut vmcs = Vmcs::new();
    vmcs.set(Field::GUEST_RIP, rip);
    let mut data = vec![0; 4096];
    Layout::kvm().write(&vmcs, &mut data).unwrap();
    NestedState {
        flags: 1,
        vmxon: 0x1000,
        vmcs: 0x2000,
        data,
        ..NestedState::default()
    }
}

/// Status, output and errors of `vmcs extract`.
fn extract(args: &[&str]) -> (Option<i32>, String, String) {
    let output = hypernest(&[&["vmcs", "extract"], args].concat());
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn each_processors_nested_state_is_listed_and_written() {
    let dir = Dir::new("extract");
    let bytes = stream(&[Some(state(1)), None, Some(state(2))]);
    let file = dir.file("stream", &bytes);
    let (status, text, errors) = extract(&[&file]);
    assert_eq!((status, text.lines().count()), (Some(0), 2), "{errors}");
    assert!(
        text.contains("processor 0, at byte 5977: 4224 bytes"),
        "{text}"
    );
    assert!(text.contains("VMCS 0x2000, guest-mode, kvm"), "{text}");
    let out = dir.path("a/b");
    let (status, text, errors) = extract(&[&file, "-o", &out]);
    assert_eq!(status, Some(0), "{errors}");
    assert!(text.contains("cpu2.nested"), "{text}");
    let mut names: Vec<_> = fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["cpu0.nested", "cpu2.nested"]);
    for (cpu, rip) in [(0, 1), (2, 2)] {
        let path = format!("{out}/cpu{cpu}.nested");
        assert_eq!(fs::read(&path).unwrap(), state(rip).to_bytes());
        // What is written is what the other commands take.
        let shown = hypernest(&["vmcs", "show", &path, "--json"]);
        let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
        assert_eq!(shown["fields"]["guest_rip"], format!("{rip:#x}"));
    }
    let (_, text, _) = extract(&[&file, "--json"]);
    let list: Value = serde_json::from_str(&text).unwrap();
    let expected = serde_json::json!({
        "cpu": 2, "offset": bytes.len() - 6 - subsection(&state(2)).len(), "bytes": 4224, "vmxon": "0x1000",
        "vmcs": "0x2000", "flags": ["guest-mode"], "layout": "kvm", "file": null,
    });
    assert_eq!(list["states"][1], expected);
    // Two machines in a file, as snapshots are.
    let file = dir.file("two", &[bytes.clone(), bytes].concat());
    let (_, text, _) = extract(&[&file, "-o", &out]);
    assert_eq!(text.lines().count(), 4);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 4);
}

#[test]
fn without_nested_states_and_with_broken_ones_nothing_is_written() {
    let dir = Dir::new("extract-bad");
    let out = dir.path("out");
    let refused = |bytes: &[u8], words: &[&str]| {
        let file = dir.file("stream", bytes);
        let (status, text, errors) = extract(&[&file, "-o", &out]);
        assert_eq!((status, text.as_str()), (Some(2), ""));
        assert_eq!(errors.lines().count(), 1, "{errors}");
        for word in words {
            assert!(errors.contains(word), "{word} is not in: {errors}");
        }
        assert!(fs::metadata(&out).is_err());
    };
    refused(b"", &["no nested state", "QEVM"]);
    refused(&[7; 9000], &["no nested state", "QEVM"]);
    refused(&stream(&[None]), &["no processor"]);
    let good = stream(&[Some(state(1)), Some(state(2))]);
    refused(
        &good[..good.len() - 100],
        &["nested state of processor 1, at byte", "the stream ends"],
    );
    let mut other = good.clone();
    let second = good.len() - 6 - subsection(&state(2)).len();
    other[second + 21] = 7;
    refused(&other, &[&format!("at byte {second}: version 7")]);
    let file = dir.file("stream", &good);
    let shown = hypernest(&["vmcs", "show", &file]);
    assert_eq!(shown.status.code(), Some(2));
    let errors = String::from_utf8_lossy(&shown.stderr);
    assert!(errors.contains("vmcs extract"), "{errors}");
}

/// A stream that QEMU has written of two processors, if there is a QEMU.
fn of_qemu(path: &str) -> Option<Vec<u8>> {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(
            "-M pc -m 16 -smp 2 -S -accel tcg -display none -serial none -monitor stdio".split(' '),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .ok()?;
    let commands = format!("migrate \"exec:cat > {path}\"\nquit\n");
    qemu.stdin.take()?.write_all(commands.as_bytes()).ok()?;
    assert!(qemu.wait().ok()?.success());
    fs::read(path).ok()
}

#[test]
fn the_frame_is_qemus_own() {
    let dir = Dir::new("extract-qemu");
    let Some(mut bytes) = of_qemu(&dir.path("stream")) else {
        eprintln!("skipped: there is no qemu-system-x86_64");
        return;
    };
    let file = dir.path("stream");
    let (status, _, errors) = extract(&[&file]);
    assert_eq!(status, Some(2));
    assert!(errors.contains("no processor of this"), "{errors}");
    // Without KVM it has no nested states of its own: one goes to the end of the second processor's section.
    let mut header = b"\x03cpu".to_vec();
    header.extend(1u32.to_be_bytes());
    let at = bytes
        .windows(8)
        .position(|window| window == header)
        .expect("a second processor");
    let mut footer = vec![0x7E];
    footer.extend(&bytes[at - 4..at]);
    let end = bytes[at..]
        .windows(5)
        .position(|window| window == footer)
        .expect("the section ends");
    bytes.splice(at + end..at + end, subsection(&state(3)));
    let file = dir.file("with", &bytes);
    let (status, text, errors) = extract(&[&file, "-o", &dir.path("out")]);
    assert_eq!(status, Some(0), "{errors}");
    let place = format!("processor 1, at byte {}: 4224 bytes", at + end);
    assert!(text.contains(&place), "{text}");
    let written = fs::read(dir.path("out/cpu1.nested")).unwrap();
    assert_eq!(written, state(3).to_bytes());
}
