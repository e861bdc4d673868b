//! The terminal: raw while the guest runs, as it was afterwards, however the run ends.
#![cfg(unix)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{Dir, command, kernel};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

/// Both ends of a terminal.
struct Terminal {
    user: File,
    program: OwnedFd,
}

impl Terminal {
    fn new() -> Terminal {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap();
        let program = rustix::fs::open(
            name,
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY,
            rustix::fs::Mode::empty(),
        );
        Terminal {
            user: File::from(user),
            program: program.unwrap(),
        }
    }

    fn modes(&self) -> Termios {
        tcgetattr(&self.program).unwrap()
    }

    fn is_raw(&self) -> bool {
        !self
            .modes()
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO)
    }

    fn run(&self, image: &str) -> Child {
        let end = || Stdio::from(self.program.try_clone().unwrap());
        command(&["run", image, "--memory", "4M", "--timeout", "60"])
            .stdin(end())
            .stdout(end())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Reads until `text` has come.
    fn expect(&mut self, text: &str) {
        let mut all = Vec::new();
        while !String::from_utf8_lossy(&all).contains(text) {
            let mut byte = [0];
            self.user.read_exact(&mut byte).unwrap();
            all.push(byte[0]);
        }
    }
}

/// Echoes every byte it reads from the serial port, after a greeting.
fn echo() -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, b'>', 0xee]; // mov dx, 3f8h; mov al; out
    let poll = code.len() as i32;
    code.extend([0x66, 0xba, 0xfd, 0x03, 0xec]); // mov dx, 3fdh; in al, dx
    code.extend([0xa8, 0x01, 0x74, 0xfb]); // test al, 1; jz back to IN
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xec, 0xee]); // mov dx, 3f8h; in al, dx; out dx, al
    code.extend([0xeb, (poll - (code.len() as i32 + 2)) as u8]);
    kernel(&code)
}

fn wait(mut child: Child) -> std::process::ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(
            started.elapsed() < Duration::from_secs(50),
            "it does not end"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn keys_reach_the_guest_and_ctrl_a_x_quits_and_restores_the_terminal() {
    let dir = Dir::new("quit");
    let image = dir.file("kernel", &echo());
    let mut terminal = Terminal::new();
    let before = terminal.modes();
    assert!(!terminal.is_raw());
    let child = terminal.run(&image);
    terminal.expect(">");
    assert!(terminal.is_raw());
    // Ctrl-C is a byte like any other.
    terminal.user.write_all(b"a\x03b").unwrap();
    terminal.expect("a\x03b");
    terminal.user.write_all(b"\x01h").unwrap();
    terminal.expect("Ctrl-A x  quit");
    terminal.user.write_all(b"\x01x").unwrap();
    assert!(wait(child).success());
    let after = terminal.modes();
    assert_eq!(after.local_modes, before.local_modes);
    assert_eq!(after.input_modes, before.input_modes);
    assert_eq!(after.output_modes, before.output_modes);
}

#[test]
fn a_signal_restores_the_terminal() {
    let dir = Dir::new("signal");
    let image = dir.file("kernel", &echo());
    let mut terminal = Terminal::new();
    let child = terminal.run(&image);
    terminal.expect(">");
    assert!(terminal.is_raw());
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(wait(child).code(), Some(143));
    assert!(!terminal.is_raw());
}
