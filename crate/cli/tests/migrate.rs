//! Machines that move from one command to another: over a connection, through a file, through a pipe; and what is
//! left where one of them is killed.
#![cfg(unix)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{Dir, command, hypernest, kernel};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Lines that the guest prints.
const LINES: usize = 200;

/// A guest in 32-bit mode that prints lines `00000000`, `00000001`, .. and works between two of them, on 4 MiB of memory,
/// then powers off.
fn counting() -> Vec<u8> {
    let code = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        let (mut line, mut digit, mut decimal) =
            (a.create_label(), a.create_label(), a.create_label());
        let mut work = a.create_label();
        a.xor(ebx, ebx)?;
        a.set_label(&mut line)?;
        a.mov(ecx, 8)?;
        a.mov(esi, ebx)?;
        a.set_label(&mut digit)?;
        a.rol(esi, 4)?;
        a.mov(eax, esi)?;
        a.and(al, 15)?;
        a.add(al, i32::from(b'0'))?;
        a.cmp(al, i32::from(b'9'))?;
        a.jbe(decimal)?;
        a.add(al, 7)?;
        a.set_label(&mut decimal)?;
        a.mov(edx, 0x3f8)?;
        a.out(dx, al)?;
        a.dec(ecx)?;
        a.jnz(digit)?;
        a.mov(al, i32::from(b'\n'))?;
        a.out(dx, al)?;
        a.mov(ecx, 40_000)?;
        a.mov(edi, 0x20_0000)?;
        a.set_label(&mut work)?;
        a.add(edi, 4096 + 68)?;
        a.and(edi, 0x3f_ffff)?;
        a.or(edi, 0x20_0000)?;
        a.add(dword_ptr(edi), ecx)?;
        a.dec(ecx)?;
        a.jnz(work)?;
        a.inc(ebx)?;
        a.cmp(ebx, LINES as i32)?;
        a.jne(line)?;
        a.mov(edx, 0x604)?;
        a.mov(ax, 0x3400)?;
        a.out(dx, ax)?;
        a.hlt()?;
        a.assemble(0x10_0000)
    };
    kernel(&code().unwrap())
}

fn expected() -> String {
    (0..LINES).map(|n| format!("{n:08X}\n")).collect()
}

fn run(image: &str, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = ["run", image, "--memory", "8M"].map(str::to_owned).into();
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    args
}

fn spawn(args: &[String]) -> Child {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut command = command(&args);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// A command that waits for a machine, and the address where.
struct Receiver {
    child: Child,
    address: String,
    errors: BufReader<std::process::ChildStderr>,
}

fn receiver(more: &[&str]) -> Receiver {
    let mut args: Vec<String> = ["receive", "127.0.0.1:0"].map(str::to_owned).into();
    args.extend(more.iter().map(|arg| (*arg).to_owned()));
    let mut child = spawn(&args);
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    errors.read_line(&mut line).unwrap();
    let address = line.rsplit(' ').next().unwrap().trim().to_owned();
    assert!(line.contains("waiting for a machine"), "{line}");
    Receiver {
        child,
        address,
        errors,
    }
}

impl Receiver {
    fn end(mut self) -> (Output, String) {
        // Nobody may ever come: not for ever.
        for _ in 0..600 {
            if self.child.try_wait().unwrap().is_some() {
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
        let _ = self.child.kill();
        let mut text = String::new();
        self.errors.read_to_string(&mut text).unwrap();
        (self.child.wait_with_output().unwrap(), text)
    }
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_run_moves_to_another_command_and_its_output_joins() {
    let dir = Dir::new("move");
    let image = dir.file("counting", &counting());
    for moment in ["text:00000014\n", "5_000_000"] {
        let receiver = receiver(&[]);
        let args = run(&image, &["--migrate-on", moment, "--to", &receiver.address]);
        let source = spawn(&args).wait_with_output().unwrap();
        let (destination, errors) = receiver.end();
        assert_eq!(source.status.code(), Some(0), "{}", err(&source));
        assert!(
            err(&source).contains("handed over to 127.0.0.1:"),
            "{}",
            err(&source)
        );
        assert_eq!(destination.status.code(), Some(0), "{errors}");
        assert!(!source.stdout.is_empty() && !destination.stdout.is_empty());
        assert_eq!(out(&source) + &out(&destination), expected());
    }
}

#[test]
fn a_machine_moves_on_from_where_it_came() {
    let dir = Dir::new("moves-on");
    let image = dir.file("counting", &counting());
    let third = receiver(&[]);
    let second = receiver(&["--migrate-on", "text:00000080", "--to", &third.address]);
    let first = run(
        &image,
        &["--migrate-on", "text:00000010", "--to", &second.address],
    );
    let first = spawn(&first).wait_with_output().unwrap();
    let (second, errors) = second.end();
    assert_eq!(second.status.code(), Some(0), "{errors}");
    let (third, _) = third.end();
    assert!(!second.stdout.is_empty() && !third.stdout.is_empty());
    assert_eq!(out(&first) + &out(&second) + &out(&third), expected());
}

#[test]
fn a_run_goes_through_a_file_or_a_pipe() {
    let dir = Dir::new("one-way");
    let image = dir.file("counting", &counting());
    let file = dir.path("machine");
    let args = run(&image, &["--migrate-on", "text:00000014", "--to", &file]);
    let source = spawn(&args).wait_with_output().unwrap();
    assert_eq!(source.status.code(), Some(0), "{}", err(&source));
    let destination = hypernest(&["receive", &file]);
    assert_eq!(destination.status.code(), Some(0), "{}", err(&destination));
    assert_eq!(out(&source) + &out(&destination), expected());

    let serial = dir.path("serial");
    let to = format!("file:{serial}");
    let args = run(
        &image,
        &[
            "--migrate-on",
            "text:00000014",
            "--to",
            "-",
            "--serial",
            &to,
        ],
    );
    let mut source = spawn(&args);
    let stdin = source.stdout.take().unwrap();
    let destination = command(&["receive", "-"]).stdin(stdin).output().unwrap();
    assert_eq!(source.wait().unwrap().code(), Some(0));
    assert_eq!(destination.status.code(), Some(0), "{}", err(&destination));
    let before = fs::read_to_string(serial).unwrap();
    assert_eq!(before + &out(&destination), expected());

    // Half a file is nothing.
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    let destination = hypernest(&["receive", &file]);
    assert_eq!(destination.status.code(), Some(1));
    assert!(err(&destination).contains("no machine came from"));
    assert!(destination.stdout.is_empty());
}

#[test]
fn a_run_that_cannot_move_goes_on() {
    let dir = Dir::new("stays");
    let image = dir.file("counting", &counting());
    // Nobody listens; somebody who hangs up; a full disk.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = nobody.local_addr().unwrap().to_string();
    let rude = TcpListener::bind("127.0.0.1:0").unwrap();
    let hangs_up = rude.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let (mut stream, _) = rude.accept().unwrap();
        let _ = stream.read(&mut [0; 10]);
    });
    for to in [
        &nobody,
        &hangs_up,
        "/dev/full/x",
        &dir.path("no/such/folder"),
    ] {
        let args = run(&image, &["--migrate-on", "text:00000014", "--to", to]);
        let source = spawn(&args).wait_with_output().unwrap();
        if source.status.code() == Some(2) {
            assert!(to.contains('/') && source.stdout.is_empty());
            continue;
        }
        assert_eq!(source.status.code(), Some(0), "{to}: {}", err(&source));
        let said = err(&source);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(
            said.contains(&format!("was not moved to {to} and goes on here")),
            "{said}"
        );
        assert_eq!(out(&source), expected());
    }
}

#[test]
fn a_refused_run_goes_on_and_a_receiver_without_a_machine_fails() {
    let dir = Dir::new("refused");
    let image = dir.file("counting", &counting());
    let token = dir.file("token", b"secret\n");
    let other = dir.file("other", b"public\n");
    // Too little memory there, and no Hyper-V interface.
    let receiver = receiver(&["--memory-limit", "4M"]);
    let more = [
        "--migrate-on",
        "text:00000014",
        "--to",
        &receiver.address,
        "--hyperv",
    ];
    let source = spawn(&run(&image, &more)).wait_with_output().unwrap();
    let (destination, errors) = receiver.end();
    assert_eq!(source.status.code(), Some(0));
    assert_eq!(out(&source), expected());
    let said = err(&source);
    assert!(
        said.contains("memory: ") && said.contains("Hyper-V") && said.lines().count() == 1,
        "{said}"
    );
    assert_eq!(destination.status.code(), Some(1), "{errors}");

    // With the wrong token the receiver goes on waiting; with the right one the machine comes.
    let receiver = self::receiver(&["--token-file", &token]);
    for (file, left) in [(&other, true), (&token, false)] {
        let more = [
            "--migrate-on",
            "text:00000014",
            "--to",
            &receiver.address,
            "--token-file",
            file,
        ];
        let source = spawn(&run(&image, &more)).wait_with_output().unwrap();
        assert_eq!(
            err(&source).contains("the token is not"),
            left,
            "{}",
            err(&source)
        );
        assert_eq!(out(&source) == expected(), left);
    }
    let (destination, _) = receiver.end();
    assert_eq!(destination.status.code(), Some(0));
    assert!(out(&destination).ends_with(&expected()[expected().len() / 2..]));
}

#[test]
fn a_running_machine_is_moved_by_its_monitor() {
    let dir = Dir::new("monitor");
    let image = dir.file("counting", &counting());
    let socket = dir.path("monitor");
    let receiver = receiver(&[]);
    let mut source = spawn(&run(&image, &["--monitor", &socket]));
    // Its first line is out: it runs.
    let mut stdout = BufReader::new(source.stdout.take().unwrap());
    let mut before = String::new();
    stdout.read_line(&mut before).unwrap();
    let mut monitor = UnixStream::connect(&socket).unwrap();
    let mut answers = BufReader::new(monitor.try_clone().unwrap());
    let mut greeting = String::new();
    answers.read_line(&mut greeting).unwrap();
    let mut ask = |request: &str| {
        writeln!(monitor, "{request}").unwrap();
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        line
    };
    ask(r#"{"command":"pause"}"#);
    let refused = ask(r#"{"command":"migrate","to":"not/absolute"}"#);
    assert!(refused.contains("bad-request"), "{refused}");
    ask(r#"{"command":"resume"}"#);
    let to = &receiver.address;
    let begun = ask(&format!(r#"{{"command":"migrate","to":"{to}"}}"#));
    assert!(begun.contains("\"ok\""), "{begun}");
    stdout.read_to_string(&mut before).unwrap();
    assert_eq!(source.wait().unwrap().code(), Some(0));
    let (destination, errors) = receiver.end();
    assert_eq!(before + &out(&destination), expected(), "{errors}");
}

#[test]
fn a_receiver_survives_strangers() {
    let receiver = receiver(&[]);
    for bytes in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 100], &[0; 40]] {
        let mut stream = TcpStream::connect(&receiver.address).unwrap();
        let _ = stream.write_all(bytes);
    }
    let dir = Dir::new("strangers");
    let image = dir.file("counting", &counting());
    let args = run(
        &image,
        &["--migrate-on", "text:00000014", "--to", &receiver.address],
    );
    let source = spawn(&args).wait_with_output().unwrap();
    let (destination, errors) = receiver.end();
    assert_eq!(out(&source) + &out(&destination), expected());
    assert!(errors.matches("no machine from").count() >= 3, "{errors}");
}

#[test]
fn a_durable_destination_that_is_killed_after_the_commit_resumes() {
    let dir = Dir::new("durable");
    let image = dir.file("counting", &counting());
    let record = dir.path("record");
    let mut receiver = receiver(&["--durable", &record]);
    let args = run(
        &image,
        &["--migrate-on", "text:00000014", "--to", &receiver.address],
    );
    let source = spawn(&args).wait_with_output().unwrap();
    assert_eq!(source.status.code(), Some(0));
    receiver.child.kill().unwrap();
    receiver.child.wait().unwrap();
    let resumed = hypernest(&["resume", &record]);
    assert_eq!(resumed.status.code(), Some(0), "{}", err(&resumed));
    assert_eq!(out(&source) + &out(&resumed), expected());
    let info = hypernest(&["snapshot", "info", &record]);
    assert_eq!(info.status.code(), Some(0), "{}", err(&info));
    let told = hypernest(&["migrate", "decide", &record]);
    assert!(out(&told).contains("it is kept"), "{}", out(&told));
}

const READY: u8 = 36;
const OWNED: u8 = 37;

/// Passes bytes on between a source and a receiver, until the receiver sends a message of this kind: that one arrives where
/// it is `ready`, and nothing after it in either direction.
fn cut_at(to: String, kind: u8) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let destination = TcpStream::connect(to).unwrap();
        let (mut from, mut back) = (
            destination.try_clone().unwrap(),
            source.try_clone().unwrap(),
        );
        let gate = Arc::new(AtomicBool::new(true));
        let open = Arc::clone(&gate);
        let (mut reader, mut writer) = (
            source.try_clone().unwrap(),
            destination.try_clone().unwrap(),
        );
        thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                if !open.load(Ordering::SeqCst) || writer.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
        });
        let mut header = [0; 13];
        while from.read_exact(&mut header).is_ok() {
            let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
            let mut payload = vec![0; length as usize];
            from.read_exact(&mut payload).unwrap();
            if header[4] == kind {
                gate.store(false, Ordering::SeqCst);
                if kind == READY {
                    back.write_all(&header).unwrap();
                    // The commit comes and goes nowhere.
                    thread::sleep(Duration::from_millis(300));
                }
                break;
            }
            back.write_all(&header).unwrap();
            back.write_all(&payload).unwrap();
        }
        let _ = source.shutdown(Shutdown::Both);
        let _ = destination.shutdown(Shutdown::Both);
    });
    address
}

#[test]
fn a_cut_around_the_commit_leaves_a_pair_that_is_settled_once() {
    let dir = Dir::new("undecided");
    let image = dir.file("counting", &counting());
    for (kind, both) in [(READY, true), (OWNED, false)] {
        let (ours, theirs) = (dir.path("ours"), dir.path("theirs"));
        let receiver = receiver(&["--durable", &theirs]);
        let relay = cut_at(receiver.address.clone(), kind);
        let more = [
            "--migrate-on",
            "text:00000014",
            "--to",
            &relay,
            "--durable",
            &ours,
        ];
        let source = spawn(&run(&image, &more)).wait_with_output().unwrap();
        assert_eq!(source.status.code(), Some(5), "{}", err(&source));
        assert!(err(&source).contains("is undecided") && err(&source).contains(&ours));
        let (destination, errors) = receiver.end();
        let before = out(&source);
        if both {
            assert_eq!(destination.status.code(), Some(5), "{errors}");
            assert!(errors.contains("is undecided") && errors.contains(&theirs));
            assert!(destination.stdout.is_empty());
        } else {
            // It saw the commit, and goes on.
            assert_eq!(destination.status.code(), Some(0), "{errors}");
            assert_eq!(before.clone() + &out(&destination), expected());
            let taken = hypernest(&["migrate", "decide", &ours, &theirs]);
            assert_eq!(taken.status.code(), Some(2));
            assert!(
                err(&taken).contains("owns the machine already"),
                "{}",
                err(&taken)
            );
        }
        // Neither goes on by itself.
        let early = hypernest(&["resume", &ours]);
        assert_eq!(early.status.code(), Some(2));
        assert!(err(&early).contains("undecided"), "{}", err(&early));
        let guessed = hypernest(&["migrate", "decide", &ours, "--release", "0123456789abcdef"]);
        assert_eq!(guessed.status.code(), Some(2));
        let settled = if both {
            // With the other's code alone, as on two hosts.
            let dropped = hypernest(&["migrate", "decide", &ours, "--drop"]);
            let code = out(&dropped).trim().rsplit(' ').next().unwrap().to_owned();
            hypernest(&["migrate", "decide", &theirs, "--release", &code])
        } else {
            hypernest(&["migrate", "decide", &theirs, &ours])
        };
        assert_eq!(settled.status.code(), Some(0), "{}", err(&settled));
        let kept = hypernest(&["resume", &theirs]);
        assert_eq!(before + &out(&kept), expected());
        let lost = hypernest(&["resume", &ours]);
        assert_eq!(lost.status.code(), Some(2));
        assert!(err(&lost).contains("gave up its machine"), "{}", err(&lost));
    }
}

/// Kills in a run: `HYPERNEST_KILLS` where it is set.
fn kills() -> u64 {
    let wanted = std::env::var("HYPERNEST_KILLS").ok();
    wanted.and_then(|text| text.parse().ok()).unwrap_or(6)
}

#[test]
fn a_side_that_is_killed_at_any_time_loses_nothing_and_doubles_nothing() {
    let dir = Dir::new("kills");
    let image = dir.file("counting", &counting());
    for n in 0..kills() {
        let (ours, theirs) = (dir.path("ours"), dir.path("theirs"));
        for file in [&ours, &theirs] {
            let _ = fs::remove_file(file);
        }
        let mut receiver = receiver(&["--durable", &theirs]);
        let more = [
            "--migrate-on",
            "text:00000014",
            "--to",
            &receiver.address,
            "--durable",
            &ours,
        ];
        let mut source = spawn(&run(&image, &more));
        thread::sleep(Duration::from_millis(60 + n * 37 % 400));
        let source_dies = n % 2 == 0;
        if source_dies {
            let _ = source.kill();
        } else {
            let _ = receiver.child.kill();
        }
        let source = source.wait_with_output().unwrap();
        let (destination, errors) = if source_dies && source.stdout.len() < 9 * 0x14 {
            // It never came to the move: nobody comes any more.
            let _ = receiver.child.kill();
            receiver.end()
        } else {
            receiver.end()
        };
        let (before, after) = (out(&source), out(&destination));
        let undecided = |output: &Output| output.status.code() == Some(5);
        let kept = |file: &str| {
            let told = hypernest(&["migrate", "decide", file]);
            out(&told).contains("it is kept")
        };
        let context = format!(
            "{n}: {:?} {:?} {}",
            source.status,
            destination.status,
            err(&source)
        );
        let settle = |keep: &str, other: &str| {
            let args: &[&str] = match fs::exists(other).unwrap() {
                true => &["migrate", "decide", keep, other],
                false => &["migrate", "decide", keep, "--other-is-gone"],
            };
            let settled = hypernest(args);
            assert_eq!(
                settled.status.code(),
                Some(0),
                "{context}: {}",
                err(&settled)
            );
            out(&hypernest(&["resume", keep]))
        };
        if source_dies {
            match destination.status.code() {
                // It had the machine, or the source died before there was a whole one: then it is as with any run.
                Some(0) => assert_eq!(before + &after, expected(), "{context}"),
                Some(5) => assert_eq!(before + &settle(&theirs, &ours), expected(), "{context}"),
                _ => assert!(after.is_empty(), "{context} {errors}"),
            }
        } else if undecided(&source) {
            let (keep, other) = match fs::exists(&theirs).unwrap() {
                true => (&theirs, &ours),
                false => (&ours, &theirs),
            };
            assert_eq!(before + &settle(keep, other), expected(), "{context}");
        } else if before == expected() {
            // It was not moved, and goes on; what the other side left, if anything, may not.
            assert!(!fs::exists(&theirs).unwrap() || !kept(&theirs), "{context}");
        } else {
            assert_eq!(source.status.code(), Some(0), "{context}");
            let resumed = hypernest(&["resume", &theirs]);
            // What it had printed before it was killed is printed again from the commit on.
            assert_eq!(before + &out(&resumed), expected(), "{context}");
        }
    }
}
