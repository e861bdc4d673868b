//! What the tests of the command share.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A directory of its own for each test.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("hypernest-cli-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }

    /// Writes a file; its path.
    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.0.join(name), bytes).unwrap();
        self.path(name)
    }

    pub fn path(&self, name: &str) -> String {
        text(&self.0.join(name))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().into()
}

/// The command, with nothing to read.
pub fn hypernest(args: &[&str]) -> Output {
    command(args).stdin(Stdio::null()).output().unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The one line of a command that refuses its input.
pub fn refused(args: &[&str]) -> String {
    let output = hypernest(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?} {text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(output.stdout.is_empty(), "{}", stdout(&output));
    text
}

/// The hash of the final state, by a JSON report.
pub fn hash(report: &str) -> String {
    let text = fs::read_to_string(report).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    report["state_hash"].as_str().unwrap().into()
}

pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypernest"));
    command.args(args);
    command
}

/// An ELF32 file with this code at 1 MiB, entered in 32-bit protected mode.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 0x58];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x01\x01\x01");
    put(16, &[2, 0, 3, 0, 1]);
    put(24, &0x10_0000u32.to_le_bytes());
    put(28, &52u32.to_le_bytes());
    put(40, &[52, 0, 32, 0, 1, 0, 40]);
    let len = code.len() as u32;
    let program = [1, 0x58, 0x10_0000, 0x10_0000, len, len, 5, 0];
    for (at, word) in (52..).step_by(4).zip(program) {
        put(at, &word.to_le_bytes());
    }
    out.extend(code);
    out
}

/// The example of a VMX profile in the documentation.
pub fn vmx_profile() -> String {
    let page = include_str!("../../../../docs/vmx.md");
    let (_, rest) = page.split_once("```text\n").unwrap();
    rest.split_once("```").unwrap().0.into()
}

/// CLI; HLT; JMP to HLT.
pub const SLEEP: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
