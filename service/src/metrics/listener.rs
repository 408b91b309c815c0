//! A small listener for HTTP/1.1. It answers one request at a time, and closes the connection.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

use super::{open_metrics, status};

/// Longest time of one request.
const LIMIT: Duration = Duration::from_secs(2);
/// Longest request that is read, in bytes.
const MOST_BYTES: usize = 8 << 10;

const PAGE: &str = include_str!("page.html");

/// Listens at `address`, on a thread that lives as long as the process. The port is higher by
/// `local`, the number of the rank on its machine.
pub(super) fn start(address: &str, local: u16) -> io::Result<()> {
    let unfit = || io::Error::from(io::ErrorKind::InvalidInput);
    let mut place: SocketAddr = address.to_socket_addrs().map_err(|_| unfit())?.next().ok_or_else(unfit)?;
    if place.port() > 0 {
        place.set_port(place.port().checked_add(local).ok_or_else(unfit)?);
    }
    let listener = TcpListener::bind(place)?;
    std::thread::Builder::new().name("forebay-metrics".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // A peer that goes away early needs no answer.
            let _ = answer(stream);
        }
    })?;
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < MOST_BYTES {
        match stream.read(&mut piece)? {
            0 => break,
            count => request.extend_from_slice(&piece[..count]),
        }
    }
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    let (code, kind, body) = match (method, path) {
        (b"GET" | b"HEAD", b"/") => ("200 OK", "text/html; charset=utf-8", PAGE.to_owned()),
        (b"GET" | b"HEAD", b"/metrics") => (
            "200 OK",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            open_metrics::text(&super::loaders()),
        ),
        (b"GET" | b"HEAD", b"/status") => ("200 OK", "application/json", status::of(&super::loaders()).to_string()),
        (b"GET" | b"HEAD", _) => ("404 Not Found", "text/plain", "not found: see /, /metrics and /status\n".to_owned()),
        _ => ("405 Method Not Allowed", "text/plain", "only GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {code}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\ncache-control: no-store\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    if method != b"HEAD" {
        stream.write_all(body.as_bytes())?;
    }
    stream.flush()
}
