//! A migration's bytes over a WebSocket, for pages in a browser, which can only connect: a listener that lets in whom it
//! is told to, and the two directions of a connection.
//!
//! A client says by its subprotocol whether it gives a machine or takes one, so that two of a kind do not wait for each
//! other. Browsers tell the origin of a page, which must be on a list; programs tell none.

use std::io::{Error, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tungstenite::error::ProtocolError;
use tungstenite::handshake::server::{Callback, ErrorResponse, Request, Response, ServerHandshake};
use tungstenite::handshake::{HandshakeError, MidHandshake};
use tungstenite::http::header::{HeaderValue, ORIGIN, SEC_WEBSOCKET_PROTOCOL};
use tungstenite::http::{StatusCode, Uri};
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Message, WebSocket};

/// Most bytes of a message, either way; longer ones from the peer end the connection.
const MESSAGE: usize = 256 << 10;
/// How long a client may take until its request is complete.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long a client may take to read what is sent.
const WRITE_TIME: Duration = Duration::from_secs(30);
/// Between two looks at a socket on which nothing moves.
const LOOK: Duration = Duration::from_micros(300);
/// Clients whose request is not complete, at most.
const MOST_PENDING: usize = 8;

/// What the client of a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// It gives a machine away.
    Gives,
    /// It takes one.
    Takes,
}

impl Client {
    /// The subprotocol by which it says so.
    fn protocol(self) -> &'static str {
        match self {
            Client::Gives => "hypernest.gives.1",
            Client::Takes => "hypernest.takes.1",
        }
    }
}

/// Waits for a client of one kind.
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
    client: Client,
    origins: Vec<String>,
    pending: Vec<(Instant, MidHandshake<ServerHandshake<TcpStream, Gate>>)>,
}

/// Who is let in.
struct Gate {
    client: Client,
    origins: Vec<String>,
}

impl Callback for Gate {
    fn on_request(
        self,
        request: &Request,
        mut response: Response,
    ) -> Result<Response, ErrorResponse> {
        let refuse = |why: String| {
            let mut refusal = ErrorResponse::new(Some(why));
            *refusal.status_mut() = StatusCode::FORBIDDEN;
            refusal
        };
        if let Some(origin) = request.headers().get(ORIGIN) {
            let origin = origin.to_str().unwrap_or("?");
            if !self.origins.iter().any(|one| one == origin) {
                return Err(refuse(format!(
                    "a page of {origin:?} is not let in; allow it with --origin {origin}"
                )));
            }
        }
        let wanted = self.client.protocol();
        let offered = request.headers().get_all(SEC_WEBSOCKET_PROTOCOL);
        let offers = offered
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|one| one.trim() == wanted);
        if !offers {
            return Err(refuse(format!(
                "this side wants the subprotocol {wanted}: one side gives a machine and the other takes it"
            )));
        }
        let wanted = HeaderValue::from_static(wanted);
        response
            .headers_mut()
            .insert(SEC_WEBSOCKET_PROTOCOL, wanted);
        Ok(response)
    }
}

impl Listener {
    /// Listens on an address for clients that are `client`, and pages of these origins.
    ///
    /// # Errors
    /// The address is in use, or none of this host's.
    pub fn bind(address: SocketAddr, client: Client, origins: &[String]) -> Result<Listener> {
        let listener = TcpListener::bind(address);
        let listener = listener.with_context(|| format!("cannot listen on ws://{address}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Listener {
            listener,
            address,
            client,
            origins: origins.to_vec(),
            pending: Vec::new(),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next client that is let in, where there is one. Why others are not is said on stderr.
    pub fn poll(&mut self) -> Option<Stream> {
        while self.pending.len() < MOST_PENDING
            && let Ok((stream, _)) = self.listener.accept()
        {
            if stream
                .set_nonblocking(true)
                .and(stream.set_nodelay(true))
                .is_ok()
            {
                let gate = Gate {
                    client: self.client,
                    origins: self.origins.clone(),
                };
                let begun = ServerHandshake::start(stream, gate, Some(config()));
                self.pending.push((Instant::now(), begun));
            }
        }
        let mut open = None;
        for (since, handshake) in std::mem::take(&mut self.pending) {
            if open.is_some() {
                self.pending.push((since, handshake));
                continue;
            }
            match handshake.handshake() {
                Ok(socket) => open = Some(Stream::new(socket)),
                Err(HandshakeError::Interrupted(handshake)) => {
                    if since.elapsed() < HANDSHAKE {
                        self.pending.push((since, handshake));
                    }
                }
                Err(HandshakeError::Failure(error)) => turned_away(&error),
            }
        }
        open
    }
}

/// Says why a client was not let in.
fn turned_away(error: &tungstenite::Error) {
    let why = match error {
        tungstenite::Error::Http(response) => {
            let body = response.body().as_deref().unwrap_or_default();
            String::from_utf8_lossy(body).into_owned()
        }
        other => other.to_string(),
    };
    eprintln!(
        "hypernest: a WebSocket client was turned away: {}",
        why.replace('\n', " ")
    );
}

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(MESSAGE)
        .write_buffer_size(0)
        .max_write_buffer_size(4 * MESSAGE)
        .max_message_size(Some(MESSAGE))
        .max_frame_size(Some(MESSAGE))
}

/// The address in `ws://HOST:PORT`, with numbers or `localhost` for the host.
///
/// # Errors
/// What to give instead.
pub fn address(url: &str) -> Result<SocketAddr, String> {
    let wrong = || format!("{url}: give ws://127.0.0.1:PORT");
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    if uri.scheme_str() != Some("ws") || uri.path() != "/" || uri.query().is_some() {
        return Err(wrong());
    }
    let (Some(host), Some(port)) = (uri.host(), uri.port_u16()) else {
        return Err(wrong());
    };
    let host = if host == "localhost" {
        "127.0.0.1"
    } else {
        host
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let host = host.parse().map_err(|_| wrong())?;
    Ok(SocketAddr::new(host, port))
}

/// A connection.
pub struct Stream {
    socket: WebSocket<TcpStream>,
    /// A message, as far as it was not read yet.
    message: Vec<u8>,
    read: usize,
    /// The peer said goodbye.
    ended: bool,
}

impl Stream {
    fn new(socket: WebSocket<TcpStream>) -> Stream {
        Stream {
            socket,
            message: Vec::new(),
            read: 0,
            ended: false,
        }
    }

    /// Both directions, for a thread each, and the socket below.
    ///
    /// # Errors
    /// The host fails.
    pub fn split(self) -> std::io::Result<(Reader, Writer, TcpStream)> {
        let socket = self.socket.get_ref().try_clone()?;
        let shared = Arc::new(Mutex::new(self));
        Ok((Reader(Arc::clone(&shared)), Writer(shared), socket))
    }
}

fn io(error: tungstenite::Error) -> Error {
    match error {
        tungstenite::Error::Io(error) => error,
        tungstenite::Error::WriteBufferFull(_) => ErrorKind::WouldBlock.into(),
        other => Error::new(ErrorKind::ConnectionAborted, other.to_string()),
    }
}

impl Stream {
    /// Reads what is here; 0 bytes are the end, as of a socket.
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        while self.read == self.message.len() {
            if self.ended {
                return Ok(0);
            }
            match self.socket.read() {
                Ok(Message::Binary(bytes)) => {
                    self.message = bytes.into();
                    self.read = 0;
                }
                Ok(Message::Text(_)) => {
                    let why = "the other side sends text where there are only bytes";
                    return Err(Error::new(ErrorKind::InvalidData, why));
                }
                Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed) => {
                    self.ended = true;
                }
                Ok(_) => {}
                Err(tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)) => {
                    self.ended = true;
                }
                Err(error) => return Err(io(error)),
            }
        }
        let rest = &self.message[self.read..];
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        self.read += count;
        Ok(count)
    }
}

impl Stream {
    /// Sends at once, as far as the socket takes it; [`Stream::flush`] sends the rest.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // What the socket did not take before goes first.
        self.socket.flush().map_err(io)?;
        let bytes = &bytes[..bytes.len().min(MESSAGE)];
        match self.socket.write(Message::binary(bytes.to_vec())) {
            Ok(()) => Ok(bytes.len()),
            // It is kept, and goes later.
            Err(tungstenite::Error::Io(error)) if error.kind() == ErrorKind::WouldBlock => {
                Ok(bytes.len())
            }
            Err(error) => Err(io(error)),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.socket.flush().map_err(io)
    }
}

/// What arrives.
pub struct Reader(Arc<Mutex<Stream>>);

/// What leaves. When it goes, it says goodbye.
pub struct Writer(Arc<Mutex<Stream>>);

/// Does something, again and again as long as it would block; for so long where a time is given.
fn wait<T>(
    stream: &Mutex<Stream>,
    most: Option<Duration>,
    mut act: impl FnMut(&mut Stream) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let began = Instant::now();
    loop {
        match act(&mut stream.lock().unwrap_or_else(PoisonError::into_inner)) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            other => return other,
        }
        if most.is_some_and(|most| began.elapsed() > most) {
            return Err(ErrorKind::TimedOut.into());
        }
        thread::sleep(LOOK);
    }
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        wait(&self.0, None, |stream| stream.read(into))
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        wait(&self.0, Some(WRITE_TIME), |stream| stream.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        wait(&self.0, Some(WRITE_TIME), Stream::flush)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Where it cannot be said at once the socket ends without.
        let _ = stream.socket.close(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use tungstenite::ClientRequestBuilder;

    /// A client, as a browser is one.
    fn connect(address: SocketAddr, client: Client) -> Result<Stream, String> {
        let stream = TcpStream::connect(address).unwrap();
        let uri: Uri = format!("ws://{address}/").parse().unwrap();
        let request = ClientRequestBuilder::new(uri).with_sub_protocol(client.protocol());
        let opened = tungstenite::client::client_with_config(request, stream, Some(config()));
        let (socket, _) = opened.map_err(|error| match error {
            HandshakeError::Failure(tungstenite::Error::Http(response)) => {
                response.status().to_string()
            }
            other => other.to_string(),
        })?;
        socket.get_ref().set_nonblocking(true).unwrap();
        Ok(Stream::new(socket))
    }

    fn listener(client: Client, origins: &[&str]) -> Listener {
        let origins: Vec<String> = origins.iter().map(|&origin| origin.into()).collect();
        Listener::bind((Ipv4Addr::LOCALHOST, 0).into(), client, &origins).unwrap()
    }

    /// Polls for so long.
    fn poll_for(listener: &mut Listener, time: Duration) -> Option<Stream> {
        let started = Instant::now();
        loop {
            match listener.poll() {
                None if started.elapsed() < time => thread::sleep(Duration::from_millis(1)),
                other => return other,
            }
        }
    }

    fn pair() -> (Stream, Stream) {
        let mut listener = listener(Client::Gives, &[]);
        let address = listener.address();
        let client = thread::spawn(move || connect(address, Client::Gives).unwrap());
        let server = poll_for(&mut listener, HANDSHAKE).unwrap();
        (server, client.join().unwrap())
    }

    /// Moves all bytes, and reads them in pieces.
    fn move_all(from: &mut Stream, to: &mut Stream, bytes: &[u8]) -> Vec<u8> {
        let (mut sent, mut got) = (0, Vec::new());
        let mut piece = [0; 777];
        while got.len() < bytes.len() {
            match from.write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            loop {
                match to.read(&mut piece) {
                    Ok(count) => got.extend(&piece[..count]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
        }
        got
    }

    #[test]
    fn bytes_go_both_ways_and_nothing_blocks() {
        let (mut server, mut client) = pair();
        let bytes: Vec<u8> = (0..3_000_000u32)
            .map(|n| (n.wrapping_mul(7) >> 3) as u8)
            .collect();
        assert_eq!(move_all(&mut client, &mut server, &bytes), bytes);
        assert_eq!(move_all(&mut server, &mut client, &bytes), bytes);
        // Nobody reads: after a while nothing more is taken.
        let mut taken = 0;
        let full = loop {
            match client.write(&bytes) {
                Ok(count) => taken += count,
                Err(error) => break error,
            }
            assert!(taken < 1 << 30);
        };
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        let (_, writer, _) = client.split().unwrap();
        drop(writer);
        let mut rest = vec![0; 1 << 20];
        let end = loop {
            match server.read(&mut rest) {
                Ok(0) => break None,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => break Some(error),
            }
        };
        assert!(end.is_none(), "{end:?}");
    }

    #[test]
    fn both_directions_wait_for_each_other() {
        let (server, client) = pair();
        let (mut reader, mut writer, _) = server.split().unwrap();
        let (mut from, mut to, _) = client.split().unwrap();
        let bytes: Vec<u8> = (0..2_000_000u32).map(|n| (n ^ (n >> 9)) as u8).collect();
        let sent = bytes.clone();
        let echo = thread::spawn(move || std::io::copy(&mut from, &mut to).unwrap());
        let write = thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.flush().unwrap();
            writer
        });
        let mut got = vec![0; bytes.len()];
        reader.read_exact(&mut got).unwrap();
        assert!(got == bytes);
        // Goodbye from one side ends both.
        drop(write.join().unwrap());
        assert_eq!(echo.join().unwrap(), bytes.len() as u64);
        assert_eq!(reader.read(&mut got).unwrap(), 0);
    }

    fn request(listener: &mut Listener, headers: &str) -> (bool, String) {
        let mut stream = TcpStream::connect(listener.address()).unwrap();
        let common = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
            Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        stream
            .write_all(format!("{common}{headers}\r\n").as_bytes())
            .unwrap();
        let let_in = poll_for(listener, Duration::from_millis(300));
        let mut answer = [0; 2000];
        let count = stream.read(&mut answer).unwrap_or(0);
        let answer = String::from_utf8_lossy(&answer[..count]).into_owned();
        (let_in.is_some(), answer)
    }

    #[test]
    fn pages_are_let_in_by_their_origin() {
        let mut gate = listener(Client::Gives, &["https://nest.example"]);
        let protocol = "Sec-WebSocket-Protocol: hypernest.gives.1\r\n";
        let with = |origin: &str| format!("{protocol}Origin: {origin}\r\n");
        let (let_in, answer) = request(&mut gate, &with("https://nest.example"));
        assert!(let_in && answer.starts_with("HTTP/1.1 101"), "{answer}");
        assert!(
            answer
                .to_lowercase()
                .contains("sec-websocket-protocol: hypernest.gives.1")
        );
        for origin in [
            "https://evil.example",
            "http://nest.example",
            "https://nest.example.evil",
            "null",
            "https://NEST.example",
        ] {
            let (let_in, answer) = request(&mut gate, &with(origin));
            assert!(!let_in && answer.starts_with("HTTP/1.1 403"), "{answer}");
            assert!(answer.contains("--origin"), "{answer}");
        }
        // A program has none.
        assert!(request(&mut gate, protocol).0);
    }

    #[test]
    fn two_of_a_kind_are_told_apart() {
        let mut gate = listener(Client::Takes, &[]);
        let (let_in, answer) = request(&mut gate, "Sec-WebSocket-Protocol: hypernest.gives.1\r\n");
        assert!(!let_in && answer.contains("hypernest.takes.1"), "{answer}");
        assert!(!request(&mut gate, "").0);
        let address = gate.address();
        let client = thread::spawn(move || connect(address, Client::Gives).err());
        assert!(poll_for(&mut gate, Duration::from_millis(300)).is_none());
        let error = client.join().unwrap().unwrap();
        assert!(error.contains("403"), "{error}");
    }

    #[test]
    fn garbage_and_silence_end_nothing_but_their_own_connection() {
        let mut gate = listener(Client::Gives, &[]);
        let address = gate.address();
        let mut silent: Vec<TcpStream> = Vec::new();
        for n in 0..MOST_PENDING - 1 {
            let mut stream = TcpStream::connect(address).unwrap();
            let text: &[u8] = [
                &b"\x16\x03\x01"[..],
                b"POST / HTTP/1.1\r\n\r\n",
                b"",
                b"GET ",
            ][n % 4];
            stream.write_all(text).unwrap();
            silent.push(stream);
        }
        assert!(poll_for(&mut gate, Duration::from_millis(50)).is_none());
        let client = thread::spawn(move || connect(address, Client::Gives).is_ok());
        assert!(poll_for(&mut gate, HANDSHAKE).is_some());
        assert!(client.join().unwrap());
    }

    #[test]
    fn messages_that_are_too_long_or_text_end_the_connection() {
        let (mut server, mut client) = pair();
        client.socket.write(Message::text("hello")).unwrap();
        client.socket.flush().unwrap();
        let mut bytes = [0; 10];
        let error = loop {
            match server.read(&mut bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => break other.unwrap_err(),
            }
        };
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        let (mut server, client) = pair();
        // The header of a frame of 2^40 bytes; nothing of it is kept.
        let header = [0x82, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4];
        let mut raw = client.socket.get_ref().try_clone().unwrap();
        raw.write_all(&header).unwrap();
        let error = loop {
            match server.read(&mut bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => break other.unwrap_err(),
            }
        };
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
    }

    #[test]
    fn addresses_have_a_host_in_numbers_and_a_port() {
        let of = |url: &str| address(url).map(|address| address.to_string());
        assert_eq!(of("ws://127.0.0.1:9000").as_deref(), Ok("127.0.0.1:9000"));
        assert_eq!(of("ws://localhost:9000/").as_deref(), Ok("127.0.0.1:9000"));
        assert_eq!(of("ws://[::1]:9000").as_deref(), Ok("[::1]:9000"));
        for wrong in [
            "",
            "ws://",
            "ws://127.0.0.1",
            "wss://127.0.0.1:1",
            "http://127.0.0.1:1",
            "ws://example.org:1",
            "ws://127.0.0.1:70000",
            "ws://127.0.0.1:1/x",
            "ws://127.0.0.1:1/?a",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
