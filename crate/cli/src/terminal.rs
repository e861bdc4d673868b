//! The user's side of the serial port: a terminal in raw mode, or whatever stdin is.

use std::io::{IsTerminal, Read, stdin};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::Duration;

/// What the keys of a terminal ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// Bytes for the guest.
    Bytes(Vec<u8>),
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A h.
    Help,
}

/// What Ctrl-A h prints.
pub const HELP: &str =
    "\r\nCtrl-A x  quit\r\nCtrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A\r\n";

const ESCAPE: u8 = 0x01;

/// Finds Ctrl-A among the bytes that are typed.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// Splits what was typed into bytes for the guest and commands.
    pub fn feed(&mut self, typed: &[u8]) -> Vec<Key> {
        let mut keys = Vec::new();
        let mut bytes = Vec::new();
        for &byte in typed {
            if !self.escaped {
                match byte {
                    ESCAPE => self.escaped = true,
                    _ => bytes.push(byte),
                }
                continue;
            }
            self.escaped = false;
            let command = match byte {
                b'x' | b'X' => Key::Quit,
                b'h' | b'H' | b'?' => Key::Help,
                ESCAPE | b'a' => {
                    bytes.push(ESCAPE);
                    continue;
                }
                _ => continue,
            };
            if !bytes.is_empty() {
                keys.push(Key::Bytes(core::mem::take(&mut bytes)));
            }
            keys.push(command);
        }
        if !bytes.is_empty() {
            keys.push(Key::Bytes(bytes));
        }
        keys
    }
}

/// What arrived on stdin.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// These bytes.
    Bytes(Vec<u8>),
    /// Nothing yet.
    Nothing,
    /// Nothing, ever again.
    End,
}

/// Reads stdin on a thread of its own, so that the machine never waits for it.
#[derive(Debug)]
pub struct Stdin {
    receiver: Receiver<Vec<u8>>,
    ended: bool,
}

impl Stdin {
    /// Starts reading.
    pub fn start() -> std::io::Result<Stdin> {
        let (sender, receiver) = sync_channel(4);
        thread::Builder::new()
            .name("stdin".into())
            .spawn(move || read_all(&sender))?;
        Ok(Stdin {
            receiver,
            ended: false,
        })
    }

    /// What is there now.
    pub fn poll(&mut self) -> Input {
        match self.receiver.try_recv() {
            Ok(bytes) => Input::Bytes(bytes),
            Err(TryRecvError::Empty) => Input::Nothing,
            Err(TryRecvError::Disconnected) => self.end(),
        }
    }

    /// Waits, at most `time`, for input.
    pub fn wait(&mut self, time: Duration) -> Input {
        if self.ended {
            thread::sleep(time);
            return Input::End;
        }
        match self.receiver.recv_timeout(time) {
            Ok(bytes) => Input::Bytes(bytes),
            Err(RecvTimeoutError::Timeout) => Input::Nothing,
            Err(RecvTimeoutError::Disconnected) => self.end(),
        }
    }

    /// Whether something may still come.
    pub fn is_open(&self) -> bool {
        !self.ended
    }

    fn end(&mut self) -> Input {
        self.ended = true;
        Input::End
    }
}

fn read_all(sender: &SyncSender<Vec<u8>>) {
    let mut buffer = [0; 4096];
    loop {
        match stdin().lock().read(&mut buffer) {
            Ok(0) => return,
            Ok(len) if sender.send(buffer[..len].to_vec()).is_err() => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Whether a person sits at stdin.
pub fn is_interactive() -> bool {
    stdin().is_terminal()
}

#[cfg(unix)]
pub use unix::Raw;

#[cfg(unix)]
mod unix {
    use std::io::stdin;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex, Once};

    use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

    /// What the terminal was before, for whoever restores it first.
    static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);
    static HOOK: Once = Once::new();

    /// A terminal in raw mode. It is restored when this is dropped, and before a panic prints.
    #[derive(Debug)]
    pub struct Raw {
        ended: Arc<AtomicBool>,
    }

    impl Raw {
        /// Puts stdin's terminal into raw mode, but for the output, and catches the signals that
        /// would end the program without restoring it.
        pub fn enter() -> std::io::Result<Raw> {
            let before = tcgetattr(stdin())?;
            let ended = Arc::new(AtomicBool::new(false));
            for signal in [
                signal_hook::consts::SIGTERM,
                signal_hook::consts::SIGINT,
                signal_hook::consts::SIGHUP,
                signal_hook::consts::SIGQUIT,
            ] {
                signal_hook::flag::register(signal, Arc::clone(&ended))?;
            }
            HOOK.call_once(|| {
                let print = std::panic::take_hook();
                std::panic::set_hook(Box::new(move |panic| {
                    restore();
                    print(panic);
                }));
            });
            let mut raw = before.clone();
            raw.make_raw();
            raw.output_modes |= OutputModes::OPOST;
            if let Ok(mut slot) = BEFORE.lock() {
                *slot = Some(before);
            }
            tcsetattr(stdin(), OptionalActions::Now, &raw)?;
            Ok(Raw { ended })
        }

        /// Whether a signal asked to end.
        pub fn ended(&self) -> bool {
            self.ended.load(Ordering::Relaxed)
        }
    }

    impl Drop for Raw {
        fn drop(&mut self) {
            restore();
        }
    }

    fn restore() {
        let before = BEFORE.lock().ok().and_then(|mut slot| slot.take());
        if let Some(before) = before {
            // Nobody is left to tell.
            let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
        }
    }
}

#[cfg(not(unix))]
pub use other::Raw;

#[cfg(not(unix))]
mod other {
    /// No raw mode on this system: lines reach the guest when they are complete.
    #[derive(Debug)]
    pub struct Raw;

    impl Raw {
        /// Nothing to do.
        pub fn enter() -> std::io::Result<Raw> {
            Ok(Raw)
        }

        /// Never.
        pub fn ended(&self) -> bool {
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_quits_and_ctrl_a_twice_sends_it() {
        let mut keys = Keys::default();
        assert_eq!(keys.feed(b"ls\r"), [Key::Bytes(b"ls\r".into())]);
        assert_eq!(keys.feed(b"\x01\x01"), [Key::Bytes(vec![1])]);
        assert_eq!(
            keys.feed(b"ab\x01xcd"),
            [
                Key::Bytes(b"ab".into()),
                Key::Quit,
                Key::Bytes(b"cd".into())
            ]
        );
        assert_eq!(keys.feed(b"x"), [Key::Bytes(b"x".into())]);
    }

    #[test]
    fn ctrl_a_is_remembered_between_reads() {
        let mut keys = Keys::default();
        assert_eq!(keys.feed(b"\x01"), []);
        assert_eq!(keys.feed(b"x"), [Key::Quit]);
        assert_eq!(keys.feed(b"\x01z"), []);
        assert_eq!(keys.feed(b"\x01h"), [Key::Help]);
    }
}
