//! Snapshots: written during runs, gone on from, looked at and compared.

mod common;

use std::fs;
use std::path::Path;

use common::{Dir, SLEEP, hash, hypernest, kernel, refused, stderr, stdout};
use hypernest_guests::HYPERVISOR;

/// The command, which must end well.
fn ok(args: &[&str]) -> String {
    let output = hypernest(args);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{args:?} {}",
        stderr(&output)
    );
    stdout(&output)
}

const BUILT_IN: [&str; 4] = ["--vmx", "max", "--memory", "16M"];

#[test]
fn a_run_goes_on_from_its_snapshots_as_if_nothing_had_been() {
    for options in [
        &[][..],
        &["--cpus", "3"],
        &["--hyperv"],
        &["--vmcs", "hypernest-evmcs", "--accept-vmcs", "kvm"],
    ] {
        let dir = Dir::new("snapshot-run");
        let image = dir.file("image", HYPERVISOR);
        let [first, second, report] = ["first", "second", "report"].map(|name| dir.path(name));
        let mut run = vec!["run", &image];
        run.extend(BUILT_IN);
        run.extend(options);
        // When its guest begins to speak, and after a few of its exits.
        run.extend(["--snapshot-on", "L2 says", "-o", &first]);
        run.extend(["--snapshot-on", "text:INVLPG", "-o", &second]);
        run.extend(["--report-json", &report]);
        let whole = ok(&run);
        let expected = hash(&report);
        for (snapshot, text) in [(&first, "L2 says"), (&second, "INVLPG")] {
            let rest = ok(&["resume", snapshot, "--report-json", &report]);
            assert_eq!(hash(&report), expected, "{options:?} {text}");
            let (_, after) = whole.split_once(text).unwrap();
            assert_eq!(rest, after, "{options:?}");
        }
        // A snapshot of what was resumed is that of the first run, if it is taken at the same tick.
        let third = dir.path("third");
        let on = ["--snapshot-on", "INVLPG", "-o", &third, "--stop-on", "LPG"];
        let mut resume = vec!["resume", &first];
        resume.extend(on);
        let between = ok(&resume);
        assert!(between.ends_with("INVLPG"), "{between}");
        assert!(fs::read(&second).unwrap() == fs::read(&third).unwrap());
    }
}

/// A kernel that prints a text and sleeps.
fn greeting(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]);
    }
    code.extend(SLEEP);
    kernel(&code)
}

/// A snapshot of the built-in hypervisor, some way into its run.
fn some(dir: &Dir, name: &str, on: &str) -> String {
    let image = dir.file("image", HYPERVISOR);
    let path = dir.path(name);
    let mut run = vec!["run", &image];
    run.extend(BUILT_IN);
    run.extend(["--snapshot-on", on, "-o", &path, "--stop-at", "300000"]);
    ok(&run);
    path
}

#[test]
fn a_moment_that_does_not_come_is_told() {
    let dir = Dir::new("snapshot-none");
    let image = dir.file("kernel", &greeting("hello, world"));
    let [path, other] = ["s", "t"].map(|name| dir.path(name));
    let output = hypernest(&[
        "run",
        &image,
        "--memory=4M",
        "--stop-on=hello",
        "--snapshot-on=world",
        "-o",
        &path,
        "--snapshot-on=1000000",
        "-o",
        &other,
    ]);
    assert_eq!(output.status.code(), Some(4));
    let text = stderr(&output);
    assert!(text.contains("the text \"world\" did not appear"), "{text}");
    assert!(text.contains("tick 1000000 was not reached"), "{text}");
    assert!(!Path::new(&path).exists() && !Path::new(&other).exists());
}

#[test]
fn texts_may_end_in_one_another() {
    let dir = Dir::new("snapshot-texts");
    let image = dir.file("kernel", &greeting("a prompt: "));
    let paths = ["1", "2", "3"].map(|name| dir.path(name));
    let mut run = vec!["run", &image, "--memory=4M", "--stop-on=prompt"];
    for (text, path) in ["mpt", "prompt", "a prompt"].iter().zip(&paths) {
        run.extend(["--snapshot-on", text, "-o", path]);
    }
    assert_eq!(ok(&run), "a prompt");
    let [a, b, c] = paths.map(|path| fs::read(path).unwrap());
    assert!(a == b && b == c);
}

#[test]
fn a_snapshot_that_cannot_be_written_leaves_the_run_alone() {
    let dir = Dir::new("snapshot-full");
    let image = dir.file("kernel", &greeting("hello, world"));
    let path = dir.path("gone/s");
    let run = ["run", &image, "--memory=4M", "--stop-on=world"];
    let on = ["--snapshot-on=hello", "-o", &path];
    // Known before anything runs: a folder that is not there.
    let error = refused(&[&run[..], &on].concat());
    assert!(error.contains("cannot write the snapshot"), "{error}");
    let on = ["--snapshot-on=hello", "-o", &dir.path("")];
    let error = refused(&[&run[..], &on].concat());
    assert!(error.contains("it is a directory"), "{error}");
    let on = ["--snapshot-on=hello", "--snapshot-on=1", "-o", &path];
    let error = refused(&[&run[..], &on].concat());
    assert!(error.contains("2 times and -o 1 times"), "{error}");
    // Only found out when it is written.
    fs::create_dir_all(dir.path("s.part")).unwrap();
    let on = ["--snapshot-on=hello", "-o", &dir.path("s")];
    let output = hypernest(&[&run[..], &on].concat());
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert_eq!(stdout(&output), "hello, world");
    assert!(text.contains("cannot write the snapshot") && text.contains("the run goes on"));
}

#[test]
fn a_snapshot_may_replace_the_one_that_is_resumed() {
    let dir = Dir::new("snapshot-over");
    let path = some(&dir, "s", "INVLPG");
    let before = fs::read(&path).unwrap();
    let report = dir.path("report");
    let rest = ok(&["resume", &path, "--report-json", &report]);
    let expected = hash(&report);
    ok(&[
        "resume",
        &path,
        "--snapshot-on=wakes",
        "-o",
        &path,
        "--stop-on=wakes",
    ]);
    assert!(fs::read(&path).unwrap() != before);
    let later = ok(&["resume", &path, "--report-json", &report]);
    assert!(rest.ends_with(&later) && later.len() < rest.len());
    // The end of a run is the same whether it was saved on its way or not: nothing here depends on cached translations.
    assert_eq!(hash(&report), expected);
    let left: Vec<_> = fs::read_dir(dir.path("")).unwrap().collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn the_last_instructions_of_a_crash_are_those_of_the_resumed_run() {
    let dir = Dir::new("snapshot-crash");
    const BREAK: &str = "--break-on=triple-fault";
    // Prints, then LIDT of nothing and INT3.
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xb0, b'y', 0xee];
    code.extend([0x0f, 0x01, 0x1d, 0, 0, 0, 0, 0xcc]);
    let image = dir.file("kernel", &kernel(&code));
    let path = dir.path("s");
    let on = ["--memory=4M", "--snapshot-on=x", "-o", &path, BREAK];
    let run = hypernest(&[&["run", &image][..], &on].concat());
    let resumed = hypernest(&["resume", &path, BREAK]);
    assert_eq!(resumed.status.code(), Some(4), "{}", stderr(&resumed));
    let (before, after) = (stderr(&run), stderr(&resumed));
    let last = |text: &str| text.lines().last().unwrap().to_owned();
    assert!(last(&after).contains("int3"), "{after}");
    assert_eq!(last(&before), last(&after));
}

#[test]
fn disks_are_given_again_and_what_was_written_is_kept() {
    let dir = Dir::new("snapshot-disk");
    let image = dir.file("kernel", &greeting("hello, world"));
    let disk = dir.file("disk.img", &[7; 10_000]);
    let path = dir.path("s");
    let on = ["--snapshot-on=hello", "-o", &path, "--stop-on=hello"];
    ok(&[&["run", &image, "--memory=4M", "--disk", &disk][..], &on].concat());
    let info = ok(&["snapshot", "info", &path]);
    assert!(
        info.contains("disk 1    disk.img, 10000 bytes, 0 pieces"),
        "{info}"
    );

    let error = refused(&["resume", &path]);
    assert!(error.contains("it had disk.img"), "{error}");
    let other = dir.file("other.img", &[8; 10_000]);
    let error = refused(&["resume", &path, "--disk", &other]);
    assert!(error.contains("disk 1 is not the one"), "{error}");
    let rest = ok(&["resume", &path, "--disk", &disk, "--stop-on=world"]);
    assert_eq!(rest, ", world");
}

#[test]
fn another_layout_is_written_from_a_snapshot_on() {
    let dir = Dir::new("snapshot-layout");
    let path = some(&dir, "s", "INVLPG");
    let rest = ok(&[
        "resume",
        &path,
        "--write-vmcs",
        "hypernest-evmcs",
        "--report",
    ]);
    assert!(rest.contains("20 exits"), "{rest}");
    let error = refused(&["resume", &path, "--write-vmcs", "nonsense"]);
    assert!(error.contains("--write-vmcs: no layout"), "{error}");
}

#[test]
fn info_tells_what_a_snapshot_holds() {
    let dir = Dir::new("snapshot-info");
    let path = some(&dir, "s", "INVLPG");
    let text = ok(&["snapshot", "info", &path]);
    for part in [
        "booted    multiboot",
        "machine   16 MiB, 1 vCPU of model hypernest, VMX max",
        "current VMCS 0x209000",
        "memory    4096 pages of 4 KiB: ",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let json = ok(&["snapshot", "info", &path, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let pages = &json["pages"];
    let of = |name: &str| pages[name].as_u64().unwrap();
    assert_eq!(of("zero") + of("shared") + of("stored"), 4096);
    assert_eq!(json["sections"]["vcpu"]["count"], 1);
    assert!(text.contains(json["hash"].as_str().unwrap()), "{text}");
}

#[test]
fn diff_names_what_differs() {
    let dir = Dir::new("snapshot-diff");
    let (a, b) = (some(&dir, "a", "XSETBV"), some(&dir, "b", "INVLPG"));
    assert_eq!(
        ok(&["snapshot", "diff", &a, &a]),
        "the snapshots are equal\n"
    );
    let output = hypernest(&["snapshot", "diff", &a, &b]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    for part in [
        "clock.now: ",
        "vcpu[0].gpr[14]: ",
        "vcpu[0].vmx.guest_rip: ",
        "memory 0x",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let output = hypernest(&["snapshot", "diff", &a, &b, "--json", "--most=1"]);
    assert_eq!(output.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["state"][0][0], "clock.now");
    assert_eq!(json["memory"].as_array().unwrap().len(), 1);
    let (changes, pages) = (json["changes"].as_u64(), json["pages"].as_u64());
    let last = format!(
        "{} changes of the state, {} pages",
        changes.unwrap(),
        pages.unwrap()
    );
    assert!(text.contains(&last), "{text}");
}

#[test]
fn bad_snapshots_are_refused_in_one_line() {
    let dir = Dir::new("snapshot-bad");
    let good = fs::read(some(&dir, "good", "INVLPG")).unwrap();
    let mut damaged = good.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x10;
    let mut newer = good.clone();
    newer[8] = 7;
    let mut recording = good.clone();
    recording[12..16].copy_from_slice(b"RECD");
    let cases: [(&str, &[u8], &str); 6] = [
        ("empty", &[], "no file of Hypernest's"),
        ("text", b"hello", "no file of Hypernest's"),
        ("cut", &good[..middle], "it was cut"),
        ("damaged", &damaged, "it is damaged"),
        ("newer", &newer, "it has format 7"),
        ("recording", &recording, "it is a recording and no snapshot"),
    ];
    for (name, bytes, words) in cases {
        let path = dir.file(name, bytes);
        for args in [
            &["resume", &path][..],
            &["snapshot", "info", &path],
            &["snapshot", "diff", &path, &path],
        ] {
            let error = refused(args);
            assert!(error.contains(words) && error.contains(&path), "{error}");
        }
    }
    let error = refused(&["resume", &dir.path("none")]);
    assert!(error.contains("cannot read the snapshot"), "{error}");
    let error = refused(&["resume", &dir.path("")]);
    assert!(error.contains("it is a directory"), "{error}");
    let error = refused(&["resume", &dir.path("good"), "--memory-limit=8M"]);
    assert!(
        error.contains("--memory-limit") && error.contains("16777216"),
        "{error}"
    );
}
