//! `--monitor`, by clients of a few lines.
#![cfg(unix)]

mod common;
#[path = "../../../tests/guests/hypervisor.rs"]
mod hypervisor;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{Dir, command, hypernest, kernel};
use hypervisor::Options;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// JMP to itself.
const LOOP: [u8; 2] = [0xeb, 0xfe];

/// A run with a monitor.
struct Guest {
    child: Child,
    path: String,
    _dir: Dir,
}

impl Guest {
    fn start(name: &str, image: &[u8], more: &[&str]) -> Guest {
        let dir = Dir::new(name);
        let image = dir.file("image", image);
        let path = dir.path("monitor");
        let child = command(&["run", &image, "--memory", "8M", "--serial", "none"])
            .args(["--monitor", &path, "--timeout", "120"])
            .args(more)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while UnixStream::connect(&path).is_err() {
            assert!(started.elapsed() < Duration::from_secs(30), "no monitor");
            std::thread::sleep(Duration::from_millis(10));
        }
        Guest {
            child,
            path,
            _dir: dir,
        }
    }

    fn looping(name: &str) -> Guest {
        Guest::start(name, &kernel(&LOOP), &[])
    }

    fn client(&self) -> Client {
        let mut client = Client::connect(&self.path);
        let greeting = client.receive();
        assert_eq!(greeting["monitor"], 1, "{greeting}");
        client
    }

    /// The exit status, and what was said.
    fn end(&mut self) -> (i32, String) {
        let mut said = String::new();
        let stderr = self.child.stderr.as_mut().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code().unwrap(), said)
    }

    fn stop(&mut self) {
        let stopped = self.client().ask("stop");
        assert!(stopped["tick"].is_u64());
        assert_eq!(self.end().0, 0);
        assert!(fs::symlink_metadata(&self.path).is_err());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Client {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Client {
    fn connect(path: &str) -> Client {
        let stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        Client { stream, reader }
    }

    fn send(&mut self, line: &[u8]) {
        self.stream.write_all(line).unwrap();
        self.stream.write_all(b"\n").unwrap();
    }

    /// The next line; null where there are no more.
    fn receive(&mut self) -> Value {
        let mut line = String::new();
        match self.reader.read_line(&mut line).unwrap() {
            0 => Value::Null,
            _ => serde_json::from_str(&line).unwrap(),
        }
    }

    /// What a command gives.
    fn ask(&mut self, name: &str) -> Value {
        self.send(
            json!({ "command": name, "id": name })
                .to_string()
                .as_bytes(),
        );
        let answer = self.receive();
        assert_eq!(answer["id"], name);
        assert!(answer["error"].is_null(), "{answer}");
        answer["ok"].clone()
    }

    fn refused(&mut self, line: &[u8]) -> String {
        self.send(line);
        let answer = self.receive();
        assert!(answer["error"]["message"].is_string(), "{answer}");
        answer["error"]["code"].as_str().unwrap().into()
    }
}

#[test]
fn a_run_is_looked_at_paused_and_stopped() {
    let mut guest = Guest::looping("monitor-steer");
    let mut client = Client::connect(&guest.path);
    let greeting = client.receive();
    assert_eq!(greeting["hypernest"], env!("CARGO_PKG_VERSION"));
    assert!(
        greeting["commands"]
            .as_array()
            .unwrap()
            .contains(&json!("pause"))
    );
    let status = client.ask("status");
    assert_eq!(status["state"], "running");
    assert_eq!(status["memory"], 8 << 20);
    assert_eq!(
        (&status["cpus"], &status["cpu"]),
        (&json!(1), &json!("hypernest"))
    );
    assert_eq!(status["vmcs"], Value::Null);
    let paused = client.ask("pause");
    assert_eq!(paused["state"], "paused");
    std::thread::sleep(Duration::from_millis(100));
    // Another client sees the same, and nothing moves.
    let still = guest.client().ask("status");
    assert_eq!(
        (&still["state"], &still["tick"]),
        (&json!("paused"), &paused["tick"])
    );
    let resumed = client.ask("resume");
    assert_eq!(
        (&resumed["state"], &resumed["tick"]),
        (&json!("running"), &paused["tick"])
    );
    let started = Instant::now();
    while client.ask("status")["tick"] == paused["tick"] {
        assert!(started.elapsed() < Duration::from_secs(30));
    }
    guest.stop();
    assert_eq!(client.receive(), Value::Null);
}

#[test]
fn a_paused_run_times_out_all_the_same() {
    let mut guest = Guest::start(
        "monitor-timeout",
        &kernel(&LOOP),
        &["--stop-at", "999999999999"],
    );
    guest.client().ask("pause");
    guest.stop();
    let dir = Dir::new("monitor-timeout-short");
    let (image, path) = (dir.file("image", &kernel(&LOOP)), dir.path("monitor"));
    let mut child = command(&["run", &image, "--serial", "none", "--monitor", &path])
        .args(["--timeout", "10"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    while UnixStream::connect(&path).is_err() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut client = Client::connect(&path);
    client.receive();
    client.ask("pause");
    assert_eq!(child.wait().unwrap().code(), Some(124));
    assert!(fs::symlink_metadata(&path).is_err());
}

#[test]
fn exits_and_regions_can_be_asked_for() {
    let options = Options {
        at_vmcall: Some(LOOP.to_vec()),
        ..Options::default()
    };
    let image = hypervisor::image(&options);
    let mut guest = Guest::start("monitor-exits", &image, &["--vmx", "max"]);
    let mut client = guest.client();
    let started = Instant::now();
    // L1 loops after the last exit.
    let exits = loop {
        let exits = client.ask("query-exits");
        let rows = exits["by_reason"].as_array().cloned().unwrap_or_default();
        if rows.iter().any(|row| row["name"] == "VMCALL") {
            break exits;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "{exits}");
    };
    assert_eq!(exits["entries"], exits["exits"], "{exits}");
    let regions = client.ask("query-regions");
    assert_eq!(regions[0]["layout"], "hypernest");
    assert_eq!(
        (&regions[0]["pages"], &regions[0]["written"]),
        (&json!(1), &json!(true))
    );
    assert_eq!(client.ask("status")["vmcs"]["written"], "hypernest");
    guest.stop();
}

#[test]
fn a_snapshot_is_written_while_the_machine_runs_or_stands_still() {
    let mut guest = Guest::looping("monitor-snapshot");
    let dir = Dir::new("monitor-snapshot-files");
    let mut client = guest.client();
    let snapshot = |client: &mut Client, name: &str| {
        let file = dir.path(name);
        let line = json!({ "command": "snapshot", "file": file, "id": name });
        client.send(line.to_string().as_bytes());
        (client.receive(), file)
    };
    let (answer, first) = snapshot(&mut client, "running");
    assert_eq!(answer["ok"]["state"], "running", "{answer}");
    let tick = client.ask("pause")["tick"].clone();
    let (answer, second) = snapshot(&mut client, "paused");
    assert_eq!(answer["ok"]["tick"], tick, "{answer}");
    for file in [first, second] {
        let stop = tick.as_u64().unwrap() + 1_000_000;
        let stop = stop.to_string();
        let resumed = hypernest(&["resume", &file, "--serial", "none", "--stop-at", &stop]);
        assert_eq!(resumed.status.code(), Some(0), "{resumed:?}");
    }
    // One that cannot be written leaves nothing and no harm.
    let (answer, file) = snapshot(&mut client, "none/x");
    assert_eq!(answer["error"]["code"], "failed", "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains(&file));
    assert_eq!(client.refused(br#"{"command":"snapshot"}"#), "bad-request");
    let relative = br#"{"command":"snapshot","file":"here"}"#;
    assert_eq!(client.refused(relative), "bad-request");
    assert_eq!(client.ask("status")["tick"], tick);
    guest.stop();
}

/// A `receive` that waits on a free port, and the port.
fn receiver(more: &[&str]) -> (Child, BufReader<std::process::ChildStderr>, String) {
    let mut child = command(&["receive", "127.0.0.1:0", "--serial", "none"])
        .args(more)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    let address = line.trim().rsplit(' ').next().unwrap().to_owned();
    (child, stderr, address)
}

#[test]
fn a_machine_moves_away_running_or_paused_and_stays_where_it_cannot() {
    for paused in [false, true] {
        let mut guest = Guest::looping("monitor-move");
        let mut client = guest.client();
        if paused {
            client.ask("pause");
        }
        // Nobody is there: it stays.
        let nobody = br#"{"command":"migrate","to":"127.0.0.1:9"}"#;
        client.send(nobody);
        assert!(client.receive()["ok"]["tick"].is_u64());
        let started = Instant::now();
        while !client.ask("status")["migration"].is_null() {
            assert!(started.elapsed() < Duration::from_secs(30));
        }
        let (mut there, stderr, address) = receiver(&["--stop-at", "1", "--timeout", "60"]);
        let line = json!({ "command": "migrate", "to": address, "id": 1 });
        client.send(line.to_string().as_bytes());
        let begun = client.receive();
        assert_eq!(
            begun["ok"]["state"],
            if paused { "paused" } else { "running" }
        );
        let (status, said) = guest.end();
        assert_eq!(status, 0, "{said}");
        assert!(
            said.contains("not moved to 127.0.0.1:9") && said.contains("handed over"),
            "{said}"
        );
        // It has arrived beyond the tick at which it is to stop.
        assert_eq!(there.wait().unwrap().code(), Some(0));
        drop(stderr);
    }
}

#[test]
fn bad_lines_are_answered_and_the_next_one_counts() {
    let mut guest = Guest::looping("monitor-bad");
    let mut client = guest.client();
    assert_eq!(client.refused(b"hello"), "bad-json");
    assert_eq!(client.refused(b"\xff\xfe\x00"), "bad-json");
    assert_eq!(client.refused("[".repeat(60_000).as_bytes()), "bad-json");
    assert_eq!(client.refused(b"[1]"), "bad-request");
    assert_eq!(
        client.refused(br#"{"command":"launch"}"#),
        "unknown-command"
    );
    assert_eq!(
        client.refused(br#"{"command":"stop","at":1}"#),
        "bad-request"
    );
    assert_eq!(client.refused(&vec![b'x'; 3_000_000]), "too-long");
    client.send(b"");
    client.send(b"  \r");
    assert_eq!(client.ask("status")["state"], "running");
    // A line that the client never ends.
    let mut cut = guest.client();
    cut.stream.write_all(br#"{"command":"st"#).unwrap();
    drop(cut);
    guest.stop();
}

#[test]
fn connections_are_bounded() {
    let mut guest = Guest::looping("monitor-many");
    // The probes that waited for the start may still be counted.
    let mut clients = Vec::new();
    let busy = loop {
        let mut client = Client::connect(&guest.path);
        let greeting = client.receive();
        if greeting["monitor"].is_null() {
            break greeting;
        }
        clients.push(client);
        assert!(clients.len() <= 16);
    };
    assert_eq!(busy["error"]["code"], "busy");
    for client in &mut clients {
        assert_eq!(client.ask("status")["state"], "running");
    }
    drop(clients);
    let started = Instant::now();
    loop {
        let mut client = Client::connect(&guest.path);
        if client.receive()["monitor"] == 1 {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(30));
    }
    guest.stop();
}

#[test]
fn a_client_that_never_reads_holds_up_nobody() {
    let mut guest = Guest::looping("monitor-deaf");
    let mut deaf = UnixStream::connect(&guest.path).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    // Until nothing more goes in: its answers fill the buffers of the way back, and then its requests wait.
    while deaf.write_all(b"{\"command\":\"status\"}\n").is_ok() {}
    let mut client = guest.client();
    let first = client.ask("status")["tick"].as_u64();
    std::thread::sleep(Duration::from_millis(300));
    assert!(client.ask("status")["tick"].as_u64() > first);
    guest.stop();
}

#[test]
fn the_socket_is_private_and_goes_with_the_run() {
    let mut guest = Guest::looping("monitor-private");
    let data = fs::symlink_metadata(&guest.path).unwrap();
    assert!(data.file_type().is_socket());
    assert_eq!(data.permissions().mode() & 0o777, 0o600);
    // By a signal too.
    let pid = Pid::from_child(&guest.child);
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(guest.end().0, 143);
    assert!(fs::symlink_metadata(&guest.path).is_err());
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let mut guest = Guest::looping("monitor-stale");
    let dir = Dir::new("monitor-stale-files");
    let image = dir.file("image", &kernel(&LOOP));
    let refused = |path: &str, part: &str| {
        let output = hypernest(&["run", &image, "--serial", "none", "--monitor", path]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(part) && said.contains(path), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    };
    refused(&guest.path, "another program listens");
    assert_eq!(guest.client().ask("status")["state"], "running");
    let file = dir.file("notes", b"mine");
    refused(&file, "no socket");
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    refused(&dir.path("none/monitor"), "cannot make the monitor");
    refused(&dir.path(&"x".repeat(200)), "at most 100 bytes");
    // One that a killed run left behind.
    guest.child.kill().unwrap();
    guest.child.wait().unwrap();
    assert!(UnixStream::connect(&guest.path).is_err());
    assert!(fs::symlink_metadata(&guest.path).is_ok());
    let mut second = command(&["run", &image, "--serial", "none", "--monitor", &guest.path])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    while UnixStream::connect(&guest.path).is_err() {
        std::thread::sleep(Duration::from_millis(10));
    }
    guest.client().ask("stop");
    assert_eq!(second.wait().unwrap().code(), Some(0));
    // Whoever has taken the path meanwhile keeps it.
    let mut third = Guest::looping("monitor-taken");
    fs::remove_file(&third.path).unwrap();
    let other = UnixListener::bind(&third.path).unwrap();
    kill_process(Pid::from_child(&third.child), Signal::TERM).unwrap();
    assert_eq!(third.end().0, 143);
    assert!(fs::symlink_metadata(&third.path).is_ok());
    drop(other);
}
