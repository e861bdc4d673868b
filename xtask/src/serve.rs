//! A small web server for files, on loopback: GET and HEAD, nothing else.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

/// Folders by the address they appear under; a longer address goes before a shorter one.
#[derive(Clone, Default)]
pub struct Site {
    mounts: Vec<(String, PathBuf)>,
}

impl Site {
    pub fn new() -> Self {
        Self::default()
    }

    /// Serves the files below `dir` at addresses below `prefix`, which ends with a slash.
    pub fn mount(mut self, prefix: &str, dir: PathBuf) -> Self {
        self.mounts.push((prefix.into(), dir));
        self.mounts
            .sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
        self
    }

    /// The file that an address names; `None` where there is none, and for every address that could lead
    /// out of the mounted folders.
    fn file(&self, target: &str) -> Option<PathBuf> {
        let path = target.split(['?', '#']).next()?;
        let path = decode(path)?;
        let (prefix, dir) = self
            .mounts
            .iter()
            .find(|(prefix, _)| path.starts_with(prefix))?;
        let mut file = dir.clone();
        for part in path[prefix.len()..].split('/') {
            match part {
                "" => {}
                _ if part.starts_with('.') || part.contains(['\\', '\0']) => return None,
                _ => file.push(part),
            }
        }
        if file.is_dir() {
            file.push("index.html");
        }
        // A symbolic link may still lead out.
        let real = file.canonicalize().ok()?;
        (real.is_file() && real.starts_with(dir.canonicalize().ok()?)).then_some(real)
    }
}

/// An address without its %XX forms.
fn decode(path: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                (digit()? * 16 + digit()?) as u8
            }
            _ => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

fn mime(path: &Path) -> &'static str {
    match path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default()
    {
        "html" => "text/html; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "json" | "map" => "application/json",
        "wasm" => "application/wasm",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "txt" => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}

/// Answers requests until the process ends.
pub fn forever(listener: &TcpListener, site: &Site) -> Result<bool> {
    loop {
        // A connection that could not be taken is the other side's loss, not the server's end.
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        let site = site.clone();
        std::thread::spawn(move || {
            let _ = converse(&stream, &site); // the other side has gone; nobody to tell
        });
    }
}

/// Request after request on one connection.
fn converse(stream: &TcpStream, site: &Site) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        // Bounded, whatever the other side sends.
        let mut limited = (&mut reader).take(16 * 1024);
        loop {
            let start = head.len();
            if limited.read_until(b'\n', &mut head)? == 0 {
                return Ok(());
            }
            if matches!(&head[start..], b"\n" | b"\r\n") {
                break;
            }
        }
        let head = String::from_utf8_lossy(&head);
        let mut words = head.lines().next().unwrap_or_default().split(' ');
        let (method, target) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        respond(stream, site, method, target)?;
    }
}

fn respond(mut stream: &TcpStream, site: &Site, method: &str, target: &str) -> io::Result<()> {
    if !matches!(method, "GET" | "HEAD") {
        return text(
            stream,
            "405 Method Not Allowed",
            "Only GET and HEAD are answered here.\n",
        );
    }
    let Some(path) = site.file(target) else {
        return text(stream, "404 Not Found", "There is no such file here.\n");
    };
    let Ok(mut file) = File::open(&path) else {
        return text(stream, "403 Forbidden", "The file cannot be read.\n");
    };
    let size = fs::metadata(&path)?.len();
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nContent-Length: {size}\r\nCache-Control: no-cache\r\n\
         X-Content-Type-Options: nosniff\r\n\r\n",
        mime(&path)
    );
    stream.write_all(head.as_bytes())?;
    if method == "GET" {
        io::copy(&mut (&mut file).take(size), &mut stream)?;
    }
    Ok(())
}

fn text(mut stream: &TcpStream, status: &str, body: &str) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with a file in it, and a file beside it that must stay out of reach.
    fn site(name: &str) -> (Site, PathBuf) {
        let top =
            std::env::temp_dir().join(format!("hypernest-serve-{name}-{}", std::process::id()));
        fs::create_dir_all(top.join("site/a")).unwrap();
        fs::write(top.join("site/index.html"), "<p>").unwrap();
        fs::write(top.join("site/a/x.wasm"), "\0asm").unwrap();
        fs::write(top.join("site/.hidden"), "no").unwrap();
        fs::write(top.join("secret"), "no").unwrap();
        (Site::new().mount("/", top.join("site")), top)
    }

    #[test]
    fn addresses_name_files_below_the_folder_and_none_outside() {
        let (site, top) = site("paths");
        assert!(
            site.file("/")
                .is_some_and(|p| p.ends_with("site/index.html"))
        );
        assert!(
            site.file("/a/x.wasm?v=1")
                .is_some_and(|p| p.ends_with("a/x.wasm"))
        );
        let out = [
            "/../secret",
            "/a/../../secret",
            "/%2e%2e/secret",
            "/a/%2e%2e%2f%2e%2e/secret",
            "/.hidden",
            "secret",
        ];
        for target in out {
            assert_eq!(site.file(target), None, "{target}");
        }
        std::os::unix::fs::symlink(top.join("secret"), top.join("site/link")).unwrap();
        assert_eq!(site.file("/link"), None, "a link leads out");
        fs::remove_dir_all(top).unwrap();
    }

    #[test]
    fn wasm_is_served_as_application_wasm_on_a_kept_connection() {
        let (site, top) = site("http");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || forever(&listener, &site));
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"HEAD /a/x.wasm HTTP/1.1\r\n\r\nPOST / HTTP/1.1\r\n\r\nGET /a/x.wasm HTTP/1.1\r\n\r\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(
            answer
                .matches("Content-Type: application/wasm\r\nContent-Length: 4\r\n")
                .count(),
            2
        );
        assert_eq!(answer.matches("405 Method Not Allowed").count(), 1);
        assert_eq!(answer.matches("\0asm").count(), 1);
        fs::remove_dir_all(top).unwrap();
    }
}
