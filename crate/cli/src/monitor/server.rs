//! The socket of the monitor and its connections.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::Mode;
use rustix::process::umask;
use serde_json::{Value, json};

use super::VERSION;
use super::request::{NAMES, Refusal, Request, answer, parse};

/// Longest line that is read.
const LONGEST_LINE: usize = 64 << 10;
/// Most connections at a time.
const MOST_CONNECTIONS: usize = 16;
/// Requests that may wait for the run.
const MOST_REQUESTS: usize = 64;
/// How long a client may take to read an answer.
const WRITE_TIME: Duration = Duration::from_secs(10);
/// How long the end of the run waits for the last answers to be written.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// The socket, and the requests that wait.
pub struct Server {
    path: PathBuf,
    /// Device and inode of the socket: only ours is removed.
    file: (u64, u64),
    requests: Receiver<(Request, Reply)>,
    unwritten: Arc<Unwritten>,
    ended: Arc<AtomicBool>,
}

/// Answers that are sent and not yet written.
#[derive(Default)]
struct Unwritten {
    count: Mutex<usize>,
    less: Condvar,
}

impl Unwritten {
    fn add(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    fn remove(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_sub(1);
        self.less.notify_all();
    }

    fn wait(&self, time: Duration) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self
            .less
            .wait_timeout_while(count, time, |count| *count > 0);
    }
}

/// Where the answer to a request goes.
pub struct Reply {
    to: Sender<Value>,
    unwritten: Arc<Unwritten>,
}

impl Reply {
    /// Answers. A client that is gone is not told.
    pub fn send(self, value: Value) {
        self.unwritten.add();
        if self.to.send(value).is_err() {
            self.unwritten.remove();
        }
    }
}

impl Server {
    /// Listens at `path`. A socket that nobody listens at any more is replaced. Until this is dropped, signals that
    /// end programs end the run instead, so that the socket is removed.
    ///
    /// # Errors
    /// Somebody listens there, there is another file, or it cannot be written.
    pub fn open(path: &Path) -> Result<Server> {
        let shown = path.display();
        let listener = match bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                bind(path)
            }
            outcome => outcome,
        };
        let listener = listener.with_context(|| {
            format!("cannot make the monitor {shown}; give a path of at most 100 bytes in a folder that can be written")
        })?;
        let data = fs::symlink_metadata(path)
            .and_then(|data| {
                // Systems that take no mode from the process when a socket is made.
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map(|()| data)
            })
            .with_context(|| format!("cannot make the monitor {shown}"))?;
        let ended = Arc::new(AtomicBool::new(false));
        for signal in [
            signal_hook::consts::SIGTERM,
            signal_hook::consts::SIGINT,
            signal_hook::consts::SIGHUP,
        ] {
            signal_hook::flag::register(signal, Arc::clone(&ended))?;
        }
        let (sender, requests) = sync_channel(MOST_REQUESTS);
        let unwritten = Arc::new(Unwritten::default());
        let shared = Arc::clone(&unwritten);
        thread::Builder::new()
            .name("monitor".into())
            .spawn(move || accept(&listener, &sender, &shared))?;
        Ok(Server {
            path: path.to_owned(),
            file: (data.dev(), data.ino()),
            requests,
            unwritten,
            ended,
        })
    }

    /// Whether a signal asked to end.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// The next request, where one waits.
    pub fn next(&mut self) -> Option<(Request, Reply)> {
        self.requests.try_recv().ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let ours = |data: fs::Metadata| (data.dev(), data.ino()) == self.file;
        if fs::symlink_metadata(&self.path).is_ok_and(ours) {
            // Nobody is left to tell.
            let _ = fs::remove_file(&self.path);
        }
        while let Some((request, reply)) = self.next() {
            reply.send(answer(&request.id, Err(over())));
        }
        self.unwritten.wait(LAST_ANSWERS);
    }
}

fn over() -> Refusal {
    Refusal::new("ended", "the run has ended")
}

/// A socket that only its owner can use from the moment it is there.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    let before = umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Removes a socket that nobody listens at.
fn remove_stale(path: &Path) -> Result<()> {
    let shown = path.display();
    let data = fs::symlink_metadata(path)
        .with_context(|| format!("cannot look at the monitor {shown}"))?;
    if !data.file_type().is_socket() {
        bail!("the monitor {shown} is a file that is no socket; give another path");
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
        Ok(_) => bail!("another program listens at the monitor {shown}; give another path"),
        Err(error) => {
            let what = format!("cannot tell whether somebody listens at the monitor {shown}");
            return Err(error).context(what);
        }
    }
    fs::remove_file(path).with_context(|| format!("cannot replace the monitor {shown}"))
}

fn accept(
    listener: &UnixListener,
    requests: &SyncSender<(Request, Reply)>,
    unwritten: &Arc<Unwritten>,
) {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((stream, _)) = listener.accept() else {
            // No descriptors are left: others may close theirs.
            thread::sleep(Duration::from_millis(50));
            continue;
        };
        if connections.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
            connections.fetch_sub(1, Ordering::Relaxed);
            turn_away(&stream);
            continue;
        }
        let (requests, unwritten) = (requests.clone(), Arc::clone(unwritten));
        let count = Arc::clone(&connections);
        let started = thread::Builder::new()
            .name("monitor client".into())
            .spawn(move || {
                // What goes wrong on a connection ends it.
                let _ = converse(&stream, &requests, &unwritten);
                count.fetch_sub(1, Ordering::Relaxed);
            });
        if started.is_err() {
            connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Tells a client that there are too many, where it can be told at once.
fn turn_away(stream: &UnixStream) {
    let message = format!("there are {MOST_CONNECTIONS} connections; close one");
    let line = answer(&Value::Null, Err(Refusal::new("busy", message)));
    if stream.set_nonblocking(true).is_ok() {
        let _ = write_line(stream, &line);
    }
}

fn write_line(mut stream: &UnixStream, value: &Value) -> std::io::Result<()> {
    let mut line = value.to_string();
    line.push('\n');
    stream.write_all(line.as_bytes())
}

/// A line, or what is wrong with it.
enum Line {
    Complete(Vec<u8>),
    TooLong,
    End,
}

/// Reads to the end of a line. Of one that is too long the rest is passed over, and nothing kept.
fn read_line(reader: &mut impl BufRead) -> std::io::Result<Line> {
    let mut line = Vec::new();
    let most = LONGEST_LINE as u64 + 1;
    reader.by_ref().take(most).read_until(b'\n', &mut line)?;
    match line.last() {
        None => return Ok(Line::End),
        Some(b'\n') => {
            line.pop();
            return Ok(Line::Complete(line));
        }
        Some(_) if line.len() <= LONGEST_LINE => return Ok(Line::Complete(line)),
        Some(_) => {}
    }
    drop(line);
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(Line::TooLong);
        }
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let used = end.map_or(buffer.len(), |at| at + 1);
        reader.consume(used);
        if end.is_some() {
            return Ok(Line::TooLong);
        }
    }
}

fn converse(
    stream: &UnixStream,
    requests: &SyncSender<(Request, Reply)>,
    unwritten: &Arc<Unwritten>,
) -> std::io::Result<()> {
    stream.set_write_timeout(Some(WRITE_TIME))?;
    let greeting = json!({
        "hypernest": env!("CARGO_PKG_VERSION"),
        "monitor": VERSION,
        "commands": NAMES,
    });
    write_line(stream, &greeting)?;
    let mut reader = BufReader::new(stream);
    loop {
        let line = match read_line(&mut reader)? {
            Line::End => return Ok(()),
            Line::TooLong => {
                let message = format!("a line has at most {LONGEST_LINE} bytes");
                let refusal = Refusal::new("too-long", message);
                write_line(stream, &answer(&Value::Null, Err(refusal)))?;
                continue;
            }
            Line::Complete(line) if line.trim_ascii().is_empty() => continue,
            Line::Complete(line) => line,
        };
        let request = match parse(&line) {
            Ok(request) => request,
            Err((id, refusal)) => {
                write_line(stream, &answer(&id, Err(refusal)))?;
                continue;
            }
        };
        let id = request.id.clone();
        let (to, answers) = channel();
        let reply = Reply {
            to,
            unwritten: Arc::clone(unwritten),
        };
        let sent = requests.send((request, reply));
        match sent.ok().and_then(|()| answers.recv().ok()) {
            Some(value) => {
                let written = write_line(stream, &value);
                unwritten.remove();
                written?;
            }
            None => {
                return write_line(stream, &answer(&id, Err(over())));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let mut reader = BufReader::with_capacity(100, bytes);
        let mut lines = Vec::new();
        loop {
            lines.push(match read_line(&mut reader).unwrap() {
                Line::End => return lines,
                Line::TooLong => "too long".into(),
                Line::Complete(line) => format!("{} bytes", line.len()),
            });
        }
    }

    #[test]
    fn lines_are_bounded_and_the_next_one_is_found() {
        let mut bytes = b"abc\n\n".to_vec();
        bytes.extend(vec![b'x'; LONGEST_LINE]);
        bytes.push(b'\n');
        bytes.extend(vec![b'y'; 1_000_000]);
        bytes.extend(b"\nrest");
        let expected = ["3 bytes", "0 bytes", "65536 bytes", "too long", "4 bytes"];
        assert_eq!(lines(&bytes), expected);
        assert_eq!(lines(&vec![b'z'; 200_000]), ["too long"]);
    }
}
