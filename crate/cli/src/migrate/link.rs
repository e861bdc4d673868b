//! A link as two threads: one reads, one writes, so that neither side of a migration ever waits for bytes while it could
//! do something.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Bytes that go through a thread at once.
const PIECE: usize = 256 << 10;
/// Such pieces that wait for a thread.
const PIECES: usize = 4;

/// Bytes there and back. Either way may be missing.
pub struct Link {
    arriving: Option<Receiver<io::Result<Vec<u8>>>>,
    leaving: Option<SyncSender<Vec<u8>>>,
    writer: Option<JoinHandle<io::Result<()>>>,
    /// Bytes taken to be written, and written.
    taken: u64,
    written: Arc<AtomicU64>,
    /// Why it ended, where that is more than an end.
    error: Option<io::Error>,
    ended: bool,
    socket: Option<TcpStream>,
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            // The writer sends what it has; it takes its time, but not for ever.
            self.leaving = None;
            if let Some(writer) = self.writer.take() {
                let _ = writer.join();
            }
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Link {
    /// Over a connection.
    ///
    /// # Errors
    /// The host fails.
    pub fn over(socket: TcpStream) -> io::Result<Link> {
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(Duration::from_secs(30)))?;
        let (reader, writer) = (socket.try_clone()?, socket.try_clone()?);
        let mut link = Link::new(Some(Box::new(reader)), Some(Box::new(writer)))?;
        link.socket = Some(socket);
        Ok(link)
    }

    /// Over anything.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn new(
        reader: Option<Box<dyn Read + Send>>,
        writer: Option<Box<dyn Write + Send>>,
    ) -> io::Result<Link> {
        let mut link = Link::nowhere();
        if let Some(mut reader) = reader {
            let (sender, receiver) = sync_channel(PIECES);
            thread::Builder::new()
                .name("link in".into())
                .spawn(move || read_all(&mut *reader, &sender))?;
            link.arriving = Some(receiver);
        }
        if let Some(mut writer) = writer {
            let (sender, receiver) = sync_channel::<Vec<u8>>(PIECES);
            let written = Arc::clone(&link.written);
            let thread = thread::Builder::new()
                .name("link out".into())
                .spawn(move || write_all(&mut *writer, &receiver, &written))?;
            link.leaving = Some(sender);
            link.writer = Some(thread);
        }
        Ok(link)
    }

    /// One over which nothing goes.
    pub fn nowhere() -> Link {
        Link {
            arriving: None,
            leaving: None,
            writer: None,
            taken: 0,
            written: Arc::default(),
            error: None,
            ended: false,
            socket: None,
        }
    }

    /// What arrives within `time`, at once where something is here.
    pub fn arrived(&mut self, time: Duration) -> Option<Vec<u8>> {
        let Some(arriving) = self.arriving.as_ref().filter(|_| !self.ended) else {
            thread::sleep(time);
            return None;
        };
        match arriving.recv_timeout(time) {
            Ok(Ok(bytes)) => Some(bytes),
            Ok(Err(error)) => {
                self.error = Some(error);
                self.ended = true;
                None
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.ended = true;
                None
            }
            Err(RecvTimeoutError::Timeout) => None,
        }
    }

    /// Whether nothing goes over it any more.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes some of `bytes` on their way, at once: how many.
    pub fn send(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while let Some(leaving) = &self.leaving
            && taken < bytes.len()
        {
            let piece = bytes[taken..bytes.len().min(taken + PIECE)].to_vec();
            let length = piece.len();
            match leaving.try_send(piece) {
                Ok(()) => taken += length,
                Err(TrySendError::Full(_)) => break,
                Err(TrySendError::Disconnected(_)) => {
                    self.ended = true;
                    break;
                }
            }
        }
        self.taken += taken as u64;
        taken
    }

    /// Waits until everything that was taken is written, for as long as that takes.
    ///
    /// # Errors
    /// It could not be written.
    pub fn settle(&mut self) -> io::Result<()> {
        while self.written.load(Ordering::Acquire) < self.taken {
            if self.writer.as_ref().is_none_or(JoinHandle::is_finished) {
                return Err(self.why_not_written());
            }
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn why_not_written(&mut self) -> io::Error {
        self.ended = true;
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => error,
            _ => io::Error::other("nothing is written any more"),
        }
    }

    /// Why it ended, where the host says more than that it did.
    pub fn take_error(&mut self) -> Option<io::Error> {
        if self.writer.as_ref().is_some_and(JoinHandle::is_finished) {
            return Some(self.why_not_written());
        }
        self.error.take()
    }
}

fn read_all(reader: &mut dyn Read, sender: &SyncSender<io::Result<Vec<u8>>>) {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = match reader.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => Ok(buffer[..length].to_vec()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
        let failed = read.is_err();
        if sender.send(read).is_err() || failed {
            return;
        }
    }
}

fn write_all(
    writer: &mut dyn Write,
    receiver: &Receiver<Vec<u8>>,
    written: &AtomicU64,
) -> io::Result<()> {
    for piece in receiver {
        writer.write_all(&piece)?;
        writer.flush()?;
        written.fetch_add(piece.len() as u64, Ordering::Release);
    }
    Ok(())
}
