//! Whole runs: exit status, ends, reports, post-mortem, serial port.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Dir, SLEEP, command, hypernest, kernel};

/// `mov dx, port; mov al, value; out dx, al` for each byte.
fn out(port: u16, bytes: &[u8]) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    let mut code = vec![0x66, 0xba, low, high];
    for byte in bytes {
        code.extend([0xb0, *byte, 0xee]);
    }
    code
}

const COM1: u16 = 0x3f8;
const DEBUG_EXIT: u16 = 0xf4;
/// JMP to itself.
const SPIN: [u8; 2] = [0xeb, 0xfe];

/// Prints, then does `then`.
fn say(text: &str, then: &[u8]) -> Vec<u8> {
    let mut code = out(COM1, text.as_bytes());
    code.extend(then);
    kernel(&code)
}

fn stderr(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn debug_exit_gives_the_status_and_serial_goes_to_stdout() {
    let dir = Dir::new("exit");
    let image = dir.file("kernel", &say("hello\n", &out(DEBUG_EXIT, &[21])));
    let output = hypernest(&["run", &image, "--memory", "4M"]);
    assert_eq!(output.status.code(), Some(43), "{}", stderr(&output));
    assert_eq!(output.stdout, b"hello\n");
    assert!(output.stderr.is_empty(), "{}", stderr(&output));
}

#[test]
fn the_processor_has_the_vmx_of_the_file() {
    let dir = Dir::new("vmx-file");
    // RDMSR of IA32_VMX_PROCBASED_CTLS2; bits 39:32 to the exit port.
    let mut code = vec![0xb9, 0x8b, 4, 0, 0, 0x0f, 0x32, 0x88, 0xd0];
    code.extend([0x66, 0xba, 0xf4, 0, 0xee]);
    let image = dir.file("kernel", &kernel(&code));
    let profile = dir.file("profile", common::vmx_profile().as_bytes());
    let output = hypernest(&["run", &image, "--memory", "4M", "--vmx", &profile]);
    assert_eq!(
        output.status.code(),
        Some(0x6e * 2 + 1),
        "{}",
        stderr(&output)
    );
}

#[test]
fn the_layouts_of_vmcs_regions_are_those_of_the_command_line() {
    let dir = Dir::new("vmcs-layouts");
    // RDMSR of IA32_VMX_BASIC; the lowest byte of the revision to the exit port.
    let mut code = vec![0xb9, 0x80, 4, 0, 0, 0x0f, 0x32];
    code.extend([0x66, 0xba, 0xf4, 0, 0xee]);
    let image = dir.file("kernel", &kernel(&code));
    let table = hypernest(&["vmcs", "layouts", "hypernest"]).stdout;
    let table = String::from_utf8(table).unwrap();
    let table = table.replace("layout,hypernest,", "layout,mine,");
    let id = table
        .lines()
        .find(|line| line.contains("revision_id"))
        .unwrap();
    let table = table.replace(id, "header,revision_id,0,4,0x12345633");
    let own = dir.file("mine.csv", table.as_bytes());
    let report = dir.path("report.json");
    let status = |more: &[&str]| {
        let mut args = vec!["run", &image, "--memory", "4M", "--vmx", "max"];
        args.extend(["--report-json", &report]);
        args.extend(more);
        let output = hypernest(&args);
        assert!(output.stderr.is_empty(), "{}", stderr(&output));
        output.status.code()
    };
    let expected = |byte: i32| Some((byte * 2 + 1) & 0xff);
    assert_eq!(status(&[]), expected(i32::from(b'H')));
    assert_eq!(status(&["--vmcs", "kvm-3.10"]), expected(0xd0));
    let mine = ["--layout", &own, "--vmcs", "mine"];
    let more = [
        "--write-vmcs",
        "hypernest-evmcs",
        "--accept-vmcs",
        "hypernest,virtualbox",
    ];
    assert_eq!(status(&[mine, more].concat()), expected(0x33));
    let json = fs::read_to_string(&report).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let regions = json["vmcs_regions"].as_array().unwrap();
    let names: Vec<_> = regions
        .iter()
        .map(|one| one["layout"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["mine", "hypernest", "virtualbox", "hypernest-evmcs"]
    );
    let written = regions.iter().map(|one| one["written"].as_bool().unwrap());
    assert_eq!(written.collect::<Vec<_>>(), [false, false, false, true]);
    assert_eq!(regions[0]["revision"], "0x12345633");
    let mut args = vec!["run", &image, "--memory", "4M", "--vmx", "max", "--report"];
    args.extend([mine, more].concat());
    let output = hypernest(&args);
    for line in [
        "VMCS regions  0 of layout mine (12345633H)",
        "VMCS regions  0 of layout hypernest-evmcs (56455948H, written)",
    ] {
        assert!(stderr(&output).contains(line), "{}", stderr(&output));
    }
}

#[test]
fn without_arguments_a_hypervisor_shows_the_exits_of_its_guest() {
    let output = hypernest(&[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for words in [
        "13  48  EPT violation  582           10bf",
        "L2 says: all came back right",
        "20 exits: 2 CPUID, 1 RDMSR, 1 WRMSR, 1 RDTSC",
        "hypernest run IMAGE",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    assert!(stderr(&output).contains("the guest powered off"));
}

#[test]
fn power_off_is_success() {
    let dir = Dir::new("off");
    // mov dx, 604h; mov ax, 3400h; out dx, ax
    let off = [0x66, 0xba, 4, 6, 0x66, 0xb8, 0, 0x34, 0x66, 0xef];
    let image = dir.file("kernel", &kernel(&off));
    let output = hypernest(&["run", &image, "--memory", "4M", "--report"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for word in [
        "the guest powered off",
        "instructions  3",
        "state hash    ",
        "ELF32",
    ] {
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
}

#[test]
fn stop_on_ends_at_the_text() {
    let dir = Dir::new("stopon");
    let image = dir.file("kernel", &say("ready> more", &SPIN));
    let output = hypernest(&["run", &image, "--memory", "4M", "--stop-on", "ready>"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(output.stdout, b"ready>");
}

#[test]
fn stop_at_ends_at_the_tick_in_the_same_state_for_any_block_length() {
    let dir = Dir::new("stopat");
    let image = dir.file("kernel", &say("x", &[0x40, 0x43, 0x01, 0xd8, 0xeb, 0xfa]));
    let report = dir.path("report.json");
    let hash = |more: &[&str]| {
        let mut args = vec!["run", &image, "--memory", "4M", "--stop-at", "100003"];
        args.extend(["--report-json", &report]);
        args.extend(more);
        let output = hypernest(&args);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let json = fs::read_to_string(&report).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["ticks"], 100_003);
        assert_eq!(json["instructions"], 100_003);
        assert_eq!(json["end"], "tick");
        json["state_hash"].as_str().unwrap().to_owned()
    };
    let reference = hash(&[]);
    assert_eq!(reference, hash(&["--block-length", "1"]));
    assert_eq!(reference, hash(&["--block-length", "7"]));
    assert_ne!(reference, hash(&["--append", "other"]));
}

#[test]
fn time_out_is_124() {
    let dir = Dir::new("timeout");
    let image = dir.file("kernel", &kernel(&SPIN));
    let started = Instant::now();
    let output = hypernest(&["run", &image, "--memory", "4M", "--timeout", "0.2"]);
    assert_eq!(output.status.code(), Some(124));
    assert!(stderr(&output).contains("--timeout"));
    assert!(started.elapsed() >= Duration::from_millis(200));
}

#[test]
fn a_guest_that_sleeps_for_ever_ends_when_nobody_can_type() {
    let dir = Dir::new("sleep");
    let image = dir.file("kernel", &say("zzz", &SLEEP));
    let output = hypernest(&["run", &image, "--memory", "4M", "--timeout", "60"]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert_eq!(output.stdout, b"zzz");
    assert!(stderr(&output).contains("nothing will wake one"));
}

#[test]
fn a_triple_fault_gives_registers_page_walk_and_the_last_instructions() {
    let dir = Dir::new("triple");
    // 100 times NOP, then UD2 without an IDT but with its limit not 0.
    let mut code = vec![0x90; 100];
    code.extend([0x0f, 0x01, 0x1d]); // lidt [100080h]
    code.extend(0x10_0080u32.to_le_bytes());
    code.extend([0xb8, 0x67, 0x45, 0x23, 0x01]); // mov eax, 1234567h
    code.extend([0x0f, 0x0b]);
    code.resize(0x80, 0);
    code.extend([0xff, 0, 0, 0, 0, 0]);
    let image = dir.file("kernel", &kernel(&code));
    let output = hypernest(&["run", &image, "--memory", "4M"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(4), "{text}");
    for words in [
        "triple fault on processor 0",
        "EAX=01234567",
        "page walk of the next instruction, 0x100070",
        "last 64 instructions:",
        "nop",
        "mov",
        "$0x1234567,",
        "ud2",
    ] {
        assert!(text.contains(words), "{words:?} is not in: {text}");
    }
}

#[test]
fn a_triple_fault_without_an_idt_is_a_reset_unless_it_is_asked_about() {
    let dir = Dir::new("reset");
    let mut code = vec![0x0f, 0x01, 0x1d]; // lidt [100010h], all zero
    code.extend(0x10_0010u32.to_le_bytes());
    code.push(0xcc);
    code.resize(0x20, 0);
    let image = dir.file("kernel", &kernel(&code));
    let output = hypernest(&["run", &image, "--memory", "4M"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(output.stderr.is_empty());
    let output = hypernest(&[
        "run",
        &image,
        "--memory",
        "4M",
        "--break-on",
        "triple-fault",
    ]);
    assert_eq!(output.status.code(), Some(4));
    assert!(
        stderr(&output).contains("last 2 instructions:"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn the_instruction_log_has_every_instruction_and_the_registers_before_it() {
    let dir = Dir::new("log");
    let image = dir.file(
        "kernel",
        &kernel(&[&[0xb8, 5, 0, 0, 0, 0x40][..], &out(DEBUG_EXIT, &[0])].concat()),
    );
    let log = dir.path("log");
    let output = hypernest(&["run", &image, "--memory", "4M", "--log-instructions", &log]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let text = fs::read_to_string(&log).unwrap();
    let blocks: Vec<&str> = text.split("----------------\n").skip(1).collect();
    assert_eq!(blocks.len(), 5, "{text}");
    assert!(
        blocks[0].starts_with("IN: \n0x00100000:  b8 05 00 00 00"),
        "{text}"
    );
    assert!(blocks[1].contains("0x00100005:  40 "), "{text}");
    assert!(blocks[1].contains("\nEAX=00000005 EBX="), "{text}");
    assert!(blocks[2].contains("\nEAX=00000006 "), "{text}");
}

#[test]
fn serial_can_go_to_a_file_or_nowhere() {
    let dir = Dir::new("serial");
    let image = dir.file("kernel", &say("to a file", &out(DEBUG_EXIT, &[0])));
    let file = dir.path("out");
    let to = format!("file:{file}");
    let output = hypernest(&["run", &image, "--memory", "4M", "--serial", &to]);
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(1), &b""[..])
    );
    assert_eq!(fs::read(&file).unwrap(), b"to a file");
    let output = hypernest(&["run", &image, "--memory", "4M", "--serial", "none"]);
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(1), &b""[..])
    );
}

/// Echoes what it reads from the serial port, in upper case by clearing bit 5, until `!`.
fn echo() -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xfd, 0x03]; // mov dx, 3fdh
    let poll = code.len();
    code.extend([0xec, 0xa8, 0x01, 0x74, 0xfb]); // in al, dx; test al, 1; jz poll
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xec]); // mov dx, 3f8h; in al, dx
    code.extend([0x3c, b'!', 0x74, 0x0a]); // cmp al, '!'; je done
    code.extend([0x24, 0xdf, 0xee]); // and al, 0dfh; out dx, al
    code.extend([0x66, 0xba, 0xfd, 0x03]); // mov dx, 3fdh
    let back = poll as i32 - (code.len() as i32 + 2);
    code.extend([0xeb, back as u8, 0x90]); // jmp poll
    code.extend(out(DEBUG_EXIT, &[1]));
    kernel(&code)
}

#[test]
fn piped_input_reaches_the_guest() {
    let dir = Dir::new("pipe");
    let image = dir.file("kernel", &echo());
    let mut child = command(&["run", &image, "--memory", "4M", "--timeout", "60"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdin.write_all(b"first").unwrap();
    let mut answer = [0; 5];
    stdout.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"FIRST");
    // The whole of a long line arrives, however small the port's FIFO is.
    let long = "abcdefgh".repeat(100);
    stdin.write_all(long.as_bytes()).unwrap();
    stdin.write_all(b"!").unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, long.to_uppercase());
    assert_eq!(child.wait().unwrap().code(), Some(3));
}
