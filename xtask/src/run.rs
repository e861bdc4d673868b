//! Running other programs: shown before they run, with a limit in time, and ended with their children.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The top of the source tree.
pub fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        manifest.parent().expect("xtask lies in the tree").into()
    })
}

/// Where everything made or installed at test time lives; not in git.
pub fn cache() -> PathBuf {
    root().join(".cache")
}

/// PATH of every program run here: the project's own tools come first.
fn search_path() -> OsString {
    let own = [cache().join("tools/bin"), root().join("node_modules/.bin")];
    let rest = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(own.into_iter().chain(std::env::split_paths(&rest))).unwrap_or(rest)
}

/// The program `name`, if PATH has it.
pub fn find(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path())
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}

/// A command in the source tree's root, with nothing on its standard input.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(find(program).unwrap_or_else(|| program.into()));
    command
        .current_dir(root())
        .env("PATH", search_path())
        .stdin(Stdio::null());
    command
}

/// The words of a line without quoting, as a command.
pub fn line(words: &str) -> Command {
    let mut words = words.split_whitespace();
    let mut command = command(words.next().unwrap_or_default());
    command.args(words);
    command
}

/// How a command reads on a terminal.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut text = name.to_string_lossy().into_owned();
    for arg in command.get_args() {
        let arg = arg.to_string_lossy();
        let plain = !arg.is_empty()
            && !arg.contains(|c: char| c.is_whitespace() || "'\"*$`;&|<>".contains(c));
        text.push(' ');
        text.push_str(&if plain {
            arg.into_owned()
        } else {
            format!("'{arg}'")
        });
    }
    text
}

/// Ends a process and its children when dropped before it was waited for.
pub struct Group(pub Child);

impl Group {
    /// Starts `command` as the leader of a process group.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let child = command.process_group(0).spawn();
        Ok(Self(child.with_context(|| {
            format!("cannot run {}", shown(command))
        })?))
    }

    /// Waits for its end; `None` after `limit`, when it has been ended.
    pub fn wait(mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status));
            }
            if start.elapsed() > limit {
                return Ok(None);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let group = format!("-{}", self.0.id());
            let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
            let _ = self.0.wait();
        }
    }
}

const LONG: Duration = Duration::from_secs(40 * 60);

/// Shows and runs a command; an error unless it succeeds.
pub fn run(command: &mut Command) -> Result<()> {
    run_within(LONG, command)
}

/// As [`run`], and an error also when it takes longer than `limit`.
pub fn run_within(limit: Duration, command: &mut Command) -> Result<()> {
    println!("$ {}", shown(command));
    let mut group = Group::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let stdout = relay(group.0.stdout.take(), std::io::stdout());
    let stderr = relay(group.0.stderr.take(), std::io::stderr());
    let status = group.wait(limit)?;
    let relays = [("standard output", stdout), ("standard error", stderr)];
    for (_, relay) in &relays {
        relay.settle();
    }
    if status.is_some_and(|status| status.success()) {
        return Ok(());
    }
    for (stream, relay) in relays {
        let text = relay.lines.lock().map(|lines| lines.join("\n"));
        let heading = format!("the end of {stream} of {}", shown(command));
        if let (Ok(mut kept), Ok(text)) = (FAILURES.lock(), text) {
            kept.push(format!("---- {heading}:\n{text}"));
        }
    }
    match status {
        Some(status) => bail!("{} ended with {status}", shown(command)),
        None => bail!("{} was ended after {} s", shown(command), limit.as_secs()),
    }
}

/// Lines kept of each stream of a program that failed.
const KEPT: usize = 60;

static FAILURES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// What the programs that failed so far printed last, to be shown where a reader looks first.
pub fn failures() -> Vec<String> {
    FAILURES.lock().map(|kept| kept.clone()).unwrap_or_default()
}

/// Copies a stream, and keeps its last lines.
struct Relay {
    lines: Arc<Mutex<Vec<String>>>,
    thread: std::thread::JoinHandle<()>,
}

impl Relay {
    /// Waits for the stream's end, but not for a process left behind that holds it open.
    fn settle(&self) {
        let start = Instant::now();
        while !self.thread.is_finished() && start.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn relay(from: Option<impl Read + Send + 'static>, mut to: impl Write + Send + 'static) -> Relay {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let kept = lines.clone();
    let thread = std::thread::spawn(move || {
        let Some(from) = from else { return };
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let _ = to.write_all(&line).and_then(|()| to.flush()); // nobody may be listening
            if let Ok(mut kept) = kept.lock() {
                if kept.len() == KEPT {
                    kept.remove(0);
                }
                kept.push(String::from_utf8_lossy(&line).trim_end().into());
            }
            line.clear();
        }
    });
    Relay { lines, thread }
}

/// What a program prints; an error unless it succeeds.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command
        .output()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    if !out.status.success() {
        bail!(
            "{} ended with {}: {}",
            shown(command),
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The end of a program whose output was kept.
pub struct Captured {
    /// `None` when the limit in time ended it.
    pub status: Option<ExitStatus>,
    pub stdout: String,
    pub stderr: String,
    pub time: Duration,
}

/// Runs a command for at most `limit` and keeps what it prints.
pub fn capture(limit: Duration, command: &mut Command) -> Result<Captured> {
    let start = Instant::now();
    let mut group = Group::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let stdout = drain(group.0.stdout.take());
    let stderr = drain(group.0.stderr.take());
    let status = group.wait(limit)?;
    let time = start.elapsed();
    let text = |thread: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned()
    };
    Ok(Captured {
        status,
        stdout: text(stdout),
        stderr: text(stderr),
        time,
    })
}

fn drain(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            let _ = from.read_to_end(&mut bytes); // what came before an error is still worth showing
        }
        bytes
    })
}
