//! Runs that are recorded and made again.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{Dir, command, hash, hypernest, refused, stderr, stdout};
use hypernest_guests::{GREETING, HYPERVISOR};

/// The command, which must end well.
fn ok(args: &[&str]) -> Output {
    let output = hypernest(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{args:?} {text}");
    output
}

/// Records the built-in hypervisor; the recording, what was printed, and the hash at its end.
fn nested(dir: &Dir) -> (String, String, String) {
    let [image, record, report] = ["image", "record", "report"].map(|name| dir.path(name));
    fs::write(&image, HYPERVISOR).unwrap();
    let machine = [
        "run", &image, "--vmx", "max", "--memory", "16M", "--cpus", "2",
    ];
    let looks = ["--record", &record, "--report-json", &report];
    let output = ok(&[&machine[..], &looks].concat());
    (record, stdout(&output), hash(&report))
}

/// Writes to a program that was started, and waits for it.
fn talk(mut child: Child, words: &[(&str, Duration)]) -> Output {
    let mut to = child.stdin.take().unwrap();
    for (text, after) in words {
        std::thread::sleep(*after);
        to.write_all(text.as_bytes()).unwrap();
        to.flush().unwrap();
    }
    drop(to);
    child.wait_with_output().unwrap()
}

fn start(mut command: Command) -> Child {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_run_with_a_guest_in_a_guest_is_made_again() {
    let dir = Dir::new("replay-nested");
    let (record, printed, hash) = nested(&dir);
    let again = ok(&["replay", &record]);
    assert_eq!(stdout(&again), printed);
    let text = stderr(&again);
    assert!(text.contains(&format!("state hash {hash}")), "{text}");
    assert!(text.contains("the same run, by 1 hashes of 1"), "{text}");

    let at = ok(&["replay", &record, "--to", "exit:3"]);
    let text = stderr(&at);
    assert!(text.contains(" 3 VM exits; processor 0 L1 at"), "{text}");
    assert!(text.contains("registers of processor 1"), "{text}");
    assert!(printed.starts_with(&stdout(&at)) && stdout(&at).len() < printed.len());
    let at = ok(&["replay", &record, "--to", "5_000"]);
    assert!(
        stderr(&at).contains("tick 5000, 5000 instructions"),
        "{}",
        stderr(&at)
    );

    let error = refused(&["replay", &record, "--to", "exit:1000000"]);
    assert!(error.contains("before VM exit 1000000"), "{error}");
    let error = refused(&["replay", &record, "--to", "99_000_000_000"]);
    assert!(error.contains("the recording ends at tick"), "{error}");
}

#[test]
fn what_is_typed_when_is_recorded() {
    let dir = Dir::new("replay-typed");
    let [image, record, report] = ["image", "record", "report"].map(|name| dir.path(name));
    fs::write(&image, GREETING).unwrap();
    // Paced by real time, while keys come at times of their own.
    let run = ["run", &image, "--memory", "16M", "--stop-on", "ENOUGH"];
    let looks = ["--record", &record, "--report-json", &report];
    let words = [
        ("hel", Duration::from_millis(321)),
        ("lo\r", Duration::from_millis(77)),
        ("enough", Duration::from_millis(123)),
    ];
    let output = talk(start(command(&[&run[..], &looks].concat())), &words);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("HELLO"), "{}", stdout(&output));
    let again = ok(&["replay", &record]);
    assert_eq!(stdout(&again), stdout(&output));
    let state = format!("state hash {}", hash(&report));
    assert!(stderr(&again).contains(&state), "{}", stderr(&again));
}

#[test]
fn a_run_is_walked_through_by_commands() {
    let dir = Dir::new("replay-commands");
    let (record, ..) = nested(&dir);
    let commands = "to 5000\nback\nback 10\nforward 11\nto exit:4\nback exit\nforward exit\nback\n\
                    nonsense\nback 99999999\nend\nback exit\nshow\nquit\nto 1\n";
    let words = [(commands, Duration::ZERO)];
    let output = talk(start(command(&["replay", &record, "-i"])), &words);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let lines: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("hypernest: "))
        .collect();
    let ticks = |line: &str| {
        line.split([' ', ','])
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    assert_eq!(
        lines[1..5]
            .iter()
            .map(|line| ticks(line))
            .collect::<Vec<_>>(),
        [5000, 4999, 4989, 5000]
    );
    let exits = |line: &str| {
        line.split(", ")
            .nth(2)
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        lines[5..9]
            .iter()
            .map(|line| exits(line))
            .collect::<Vec<_>>(),
        ["4", "3", "4", "3"]
    );
    assert_eq!(ticks(lines[7]), ticks(lines[5]));
    assert_eq!(ticks(lines[8]), ticks(lines[7]) - 1);
    assert!(lines[9].starts_with("give to T"), "{text}");
    assert!(lines[10].contains("there is nothing before it"), "{text}");
    let last: u64 = exits(lines[12]).parse().unwrap();
    assert_eq!(exits(lines[11]), last.to_string(), "{text}");
    assert!(text.contains("registers of processor 1"), "{text}");
    assert_eq!(lines.len(), 14, "{text}");
}

#[test]
fn a_recording_of_a_killed_run_is_good_as_far_as_it_goes() {
    let dir = Dir::new("replay-killed");
    let [image, record] = ["image", "record"].map(|name| dir.path(name));
    fs::write(&image, GREETING).unwrap();
    let mut child = start(command(&[
        "run",
        &image,
        "--memory=16M",
        "--record",
        &record,
    ]));
    let mut to = child.stdin.take().unwrap();
    let mut from = child.stdout.take().unwrap();
    let mut expect = |text: &str| {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(text) {
            let mut byte = [0];
            from.read_exact(&mut byte).unwrap();
            seen.push(byte[0]);
        }
    };
    // It listens after its first line.
    expect("\n");
    to.write_all(b"hello").unwrap();
    to.flush().unwrap();
    expect("HELLO");
    child.kill().unwrap();
    child.wait().unwrap();
    let again = ok(&["replay", &record]);
    let text = stderr(&again);
    assert!(text.contains("was cut; it is good up to tick"), "{text}");
    assert!(text.contains("the same run"), "{text}");
}

#[test]
fn a_run_that_differs_is_told_and_files_that_are_none_are_refused() {
    let dir = Dir::new("replay-bad");
    let (record, ..) = nested(&dir);
    let bytes = fs::read(&record).unwrap();
    let missing = dir.path("missing");
    assert!(refused(&["replay", &missing]).contains("cannot read the recording"));
    let folder = dir.path("");
    assert!(refused(&["replay", &folder]).contains("it is a directory; give a file"));
    let text = dir.file("text", b"no recording");
    assert!(refused(&["replay", &text]).contains("no file of Hypernest's"));
    let snapshot = dir.file("snapshot", &bytes[80..]);
    assert!(refused(&["replay", &snapshot]).contains("cannot read the recording"));
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let damaged = dir.file("damaged", &damaged);
    assert!(refused(&["replay", &damaged]).contains("it is damaged"));
    let half = dir.file("half", &bytes[..bytes.len() / 2]);
    assert!(refused(&["replay", &half]).contains("it was cut"));
    let error = refused(&["resume", &record]);
    assert!(
        error.contains("it is a recording and no snapshot"),
        "{error}"
    );
    let image = dir.path("image");
    let into = dir.path("no/such");
    assert!(refused(&["run", &image, "--record", &into]).contains("cannot write the recording"));
}
