//! `--gdb`, by a client of a few lines that speaks gdb's remote protocol.

mod common;
#[path = "../../../tests/guests/hypervisor.rs"]
mod hypervisor;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStderr, Stdio};
use std::time::Duration;

use common::{Dir, command, hypernest};
use hypervisor::{HANDLER, L2_BASE, L2_CODE, Options, START};
use serde_json::Value;

/// A run that waits for gdb, and the connection to it.
struct Session {
    child: Child,
    stderr: BufReader<ChildStderr>,
    stream: TcpStream,
}

impl Session {
    fn start(args: &[&str]) -> Session {
        let mut child = command(args)
            .args(["--gdb", "127.0.0.1:0", "--timeout", "60"])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let address = line.trim().rsplit(' ').next().unwrap();
        let stream = TcpStream::connect(address).unwrap_or_else(|error| panic!("{line}: {error}"));
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        Session {
            child,
            stderr,
            stream,
        }
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.stream.read_exact(&mut byte).unwrap();
        byte[0]
    }

    fn send(&mut self, packet: &str) {
        self.try_send(packet).unwrap();
    }

    fn try_send(&mut self, packet: &str) -> std::io::Result<()> {
        let sum = packet.bytes().fold(0u8, |sum, byte| sum.wrapping_add(byte));
        write!(self.stream, "${packet}#{sum:02x}")
    }

    /// The next packet, with its run-length encoding undone.
    fn receive(&mut self) -> String {
        while self.byte() != b'$' {}
        let mut text: Vec<u8> = Vec::new();
        loop {
            match self.byte() {
                b'#' => break,
                b'*' => {
                    let count = self.byte() - 29;
                    let last = *text.last().unwrap();
                    text.extend(std::iter::repeat_n(last, count.into()));
                }
                byte => text.push(byte),
            }
        }
        let _sum = (self.byte(), self.byte());
        self.stream.write_all(b"+").unwrap();
        String::from_utf8(text).unwrap()
    }

    fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.receive()
    }

    /// A 64-bit register by its number in gdb's order: 7 is RSP, 16 is RIP.
    fn register(&mut self, number: usize) -> u64 {
        let all = self.ask("g");
        let bytes = unhex(&all[16 * number..16 * number + 16]);
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    fn rip(&mut self) -> u64 {
        self.register(16)
    }

    /// The exit status, and the rest of what was said.
    fn end(mut self) -> (i32, String) {
        drop(self.stream);
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code().unwrap(), said)
    }
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap())
        .collect()
}

const CPUID: u64 = L2_BASE + L2_CODE + 5;

/// The run of the small hypervisor, and where its report goes.
fn guest(dir: &Dir, options: &Options) -> [String; 8] {
    let image = dir.file("l1", &hypervisor::image(options));
    let words = ["run", &image, "--memory", "8M", "--vmx", "max"];
    let [a, b, c, d, e, f] = words.map(str::to_owned);
    [a, b, c, d, e, f, "--report-json".into(), dir.path("report")]
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(|arg| &arg[..]).collect()
}

fn hash(dir: &Dir) -> String {
    let json = fs::read_to_string(dir.path("report")).unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    json["state_hash"].as_str().unwrap().into()
}

#[test]
fn registers_memory_breakpoints_and_steps_at_both_levels() {
    let dir = Dir::new("gdb-levels");
    let args = guest(&dir, &Options::default());
    let mut gdb = Session::start(&strs(&args));
    // Nothing has been executed yet.
    assert!(gdb.ask("?").starts_with("T05"));
    assert_eq!(gdb.rip(), START);
    assert_eq!(gdb.ask("qfThreadInfo"), "m01");

    // L2, and its memory by its own addresses.
    assert_eq!(gdb.ask(&format!("Z0,{CPUID:x},1")), "OK");
    assert!(gdb.ask("vCont;c").contains("swbreak"));
    assert_eq!(gdb.rip(), CPUID);
    assert_eq!(gdb.register(1), 3, "RBX");
    assert_eq!(gdb.register(7), L2_BASE + 0xc000, "RSP");
    assert_eq!(gdb.ask(&format!("m{CPUID:x},2")), "0fa2");
    let info = unhex(&gdb.ask("qThreadExtraInfo,1"));
    assert_eq!(info, b"processor 0, L2");

    // A step of an instruction that exits leads to L1, where L2's addresses mean nothing.
    assert!(gdb.ask("vCont;s:1").starts_with("T05"));
    assert_eq!(gdb.rip(), HANDLER);
    assert!(gdb.ask(&format!("m{CPUID:x},2")).starts_with('E'));
    assert_eq!(gdb.ask(&format!("m{HANDLER:x},2")), "49b8");
    let vmcs = gdb.ask("qRcmd,766d6373");
    let vmcs = String::from_utf8(unhex(vmcs.trim_start_matches('O'))).unwrap();
    assert!(vmcs.contains("last exit  10 CPUID"), "{vmcs}");
    assert!(vmcs.contains("(handler)"), "{vmcs}");
    assert_eq!(gdb.receive(), "OK");

    // Its second instruction, then L2 again by the breakpoint: the handler skips CPUID, and DEC and
    // JNZ lead back.
    assert!(gdb.ask("vCont;s:1").starts_with("T05"));
    assert_eq!(gdb.rip(), HANDLER + 10);
    assert!(gdb.ask("vCont;c").contains("swbreak"));
    assert_eq!((gdb.rip(), gdb.register(1)), (CPUID, 2));
    // What is left of it goes on from the breakpoint, without a step over it.
    assert!(gdb.ask("vCont;c").contains("swbreak"));
    assert_eq!((gdb.rip(), gdb.register(1)), (CPUID, 1));
    assert_eq!(gdb.ask(&format!("z0,{CPUID:x},1")), "OK");
    assert_eq!(gdb.ask("vCont;c"), "W00");
    assert_eq!(gdb.end().0, 0);
}

#[test]
fn gdb_changes_nothing() {
    let dir = Dir::new("gdb-same");
    let args = guest(&dir, &Options::default());
    let plain = hypernest(&strs(&args));
    assert_eq!(plain.status.code(), Some(0));
    let expected = hash(&dir);
    let mut gdb = Session::start(&strs(&args));
    let registers = gdb.ask("g");
    assert!(gdb.ask(&format!("G{registers}")).starts_with('E'));
    assert!(gdb.ask(&format!("M{START:x},1:90")).starts_with('E'));
    gdb.ask(&format!("Z0,{HANDLER:x},1"));
    gdb.ask(&format!("Z1,{CPUID:x},1"));
    for _ in 0..5 {
        assert!(gdb.ask("vCont;c").starts_with("T05"));
    }
    for _ in 0..40 {
        assert!(gdb.ask("vCont;s:1").starts_with("T05"));
    }
    // Detached: it runs to its end, over the breakpoints.
    assert_eq!(gdb.ask("D"), "OK");
    assert_eq!(gdb.end().0, 0);
    assert_eq!(hash(&dir), expected);
}

#[test]
fn a_breakpoint_in_an_endless_loop_and_ctrl_c_and_kill() {
    let dir = Dir::new("gdb-spin");
    let image = dir.file("k", &common::kernel(&[0xeb, 0xfe]));
    let mut gdb = Session::start(&["run", &image, "--memory", "4M"]);
    gdb.send("vCont;c");
    std::thread::sleep(Duration::from_millis(100));
    gdb.stream.write_all(&[3]).unwrap();
    assert!(gdb.receive().starts_with("S02"));
    assert_eq!(gdb.rip(), 0x10_0000);
    // The instruction jumps to itself: a step ends although RIP stays.
    assert!(gdb.ask("vCont;s:1").starts_with("T05"));
    gdb.ask("Z0,100000,1");
    assert!(gdb.ask("vCont;c").contains("swbreak"));
    gdb.send("k");
    assert_eq!(gdb.end().0, 0);
}

#[test]
fn a_step_over_hlt_waits_for_what_ends_it() {
    // PIT channel 0 in one-shot mode is off; nothing wakes the processor, and Ctrl-C still works.
    let dir = Dir::new("gdb-halt");
    let image = dir.file("k", &common::kernel(&common::SLEEP));
    let mut gdb = Session::start(&["run", &image, "--memory", "4M"]);
    assert!(gdb.ask("vCont;s:1").starts_with("T05"));
    assert!(gdb.ask("vCont;s:1").starts_with("T05"));
    assert_eq!(gdb.rip(), 0x10_0002, "HLT is done, and waits");
    gdb.send("vCont;s:1");
    std::thread::sleep(Duration::from_millis(200));
    gdb.stream.write_all(&[3]).unwrap();
    assert!(gdb.receive().starts_with("S02"));
    gdb.send("k");
    gdb.end();
}

#[test]
fn a_crash_and_a_break_can_be_looked_at_before_the_run_ends() {
    let dir = Dir::new("gdb-crash");
    // UD2, with an IDT that has a limit but no gates.
    let mut code = vec![0x0f, 0x01, 0x1d];
    code.extend(0x10_0010u32.to_le_bytes());
    code.extend([0x0f, 0x0b]);
    code.resize(0x10, 0);
    code.extend([0xff, 0, 0, 0, 0, 0]);
    let image = dir.file("k", &common::kernel(&code));
    let mut gdb = Session::start(&["run", &image, "--memory", "4M"]);
    assert!(gdb.ask("vCont;c").starts_with("T0b"), "SIGSEGV");
    assert_eq!(gdb.rip(), 0x10_0007);
    assert_eq!(gdb.ask("vCont;c"), "W04");
    let (status, said) = gdb.end();
    assert_eq!(status, 4);
    assert!(said.contains("ud2"), "{said}");

    let dir = Dir::new("gdb-break");
    let args = guest(&dir, &Options::default());
    let mut all = strs(&args);
    all.extend(["--break-on", "exit:HLT"]);
    let mut gdb = Session::start(&all);
    assert!(gdb.ask("vCont;c").starts_with("T05"));
    assert_eq!(gdb.rip(), HANDLER);
    assert_eq!(gdb.ask("vCont;c"), "W00");
    assert_eq!(gdb.end().0, 0);
}

#[test]
fn garbage_and_a_lost_connection_do_no_harm() {
    let dir = Dir::new("gdb-garbage");
    let args = guest(&dir, &Options::default());
    let mut gdb = Session::start(&strs(&args));
    gdb.stream.write_all(b"\xff$$#zz}}$m#").unwrap();
    for packet in [
        "mffffffffffffffff,ffffffff",
        "m,",
        "Z0,",
        "Z0,ffffffffffffffffff,1",
        "vCont;s:ffff",
        "H g-1",
        "qRcmd,ff",
        "vCont;x",
        "p999999",
    ] {
        // The command may have given up on this peer already.
        if gdb.try_send(packet).is_err() {
            break;
        }
    }
    // Nobody waits for answers; the guest runs to its end, or the command says that gdb failed.
    let (status, said) = gdb.end();
    assert!(status == 0 || status == 1, "{status}: {said}");
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn an_address_in_use_is_refused_before_anything_runs() {
    let dir = Dir::new("gdb-used");
    let image = dir.file("k", &common::kernel(&common::SLEEP));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = hypernest(&["run", &image, "--gdb", &address]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains(&address) && text.contains("gdb"), "{text}");
    assert_eq!(text.lines().count(), 1);
}
