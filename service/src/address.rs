//! Addresses of servers.

use std::fmt;
use std::path::PathBuf;

use forebay::{Error, Result};

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// The path of a Unix socket.
    Unix(PathBuf),
    /// Host and port, with TLS or without.
    Tcp {
        /// Host and port.
        place: String,
        /// Whether the connection uses TLS.
        tls: bool,
        /// File with the certificates that a consumer trusts.
        ca: Option<PathBuf>,
    },
}

impl Address {
    /// Parses `unix:PATH`, `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`.
    pub fn parse(text: &str) -> Result<Self> {
        let refused = || {
            Error::config(format!(
                "`{text}` is no address of a service: expected `unix:PATH`, `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`"
            ))
        };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() { Err(refused()) } else { Ok(Self::Unix(path.into())) };
        }
        let (place, tls) = match (text.strip_prefix("grpc://"), text.strip_prefix("grpc+tls://")) {
            (Some(place), _) => (place, false),
            (_, Some(place)) => (place, true),
            _ => return Err(refused()),
        };
        let (place, ca) = match place.split_once("?ca=") {
            Some((place, ca)) if tls && !ca.is_empty() => (place, Some(ca.into())),
            Some(_) => return Err(refused()),
            None => (place, None),
        };
        let (host, port) = place.rsplit_once(':').ok_or_else(refused)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(refused());
        }
        Ok(Self::Tcp { place: place.to_owned(), tls, ca })
    }

    /// The host of an address of TCP. Empty for a Unix socket.
    pub fn host(&self) -> &str {
        let Self::Tcp { place, .. } = self else { return "" };
        place.rsplit_once(':').map_or("", |(host, _)| host).trim_matches(['[', ']'])
    }

    /// Whether the address is reached from this machine alone.
    pub fn is_local(&self) -> bool {
        let host = self.host();
        matches!(self, Self::Unix(_))
            || host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { place, tls: false, .. } => write!(f, "grpc://{place}"),
            Self::Tcp { place, ca: None, .. } => write!(f, "grpc+tls://{place}"),
            Self::Tcp { place, ca: Some(ca), .. } => write!(f, "grpc+tls://{place}?ca={}", ca.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_and_know_the_own_machine() {
        for (text, is_local) in [
            ("unix:/run/forebay.sock", true),
            ("unix:relative", true),
            ("grpc://localhost:9000", true),
            ("grpc://127.0.0.2:9000", true),
            ("grpc://[::1]:9000", true),
            ("grpc://0.0.0.0:9000", false),
            ("grpc+tls://node-7:9000", false),
            ("grpc+tls://node-7:9000?ca=/etc/ca.pem", false),
        ] {
            let address = Address::parse(text).unwrap();
            assert_eq!((address.to_string().as_str(), address.is_local()), (text, is_local));
        }
        assert_eq!(Address::parse("unix:///run/a").unwrap(), Address::Unix("/run/a".into()));
        for text in [
            "",
            "unix:",
            "grpc://",
            "grpc://host",
            "grpc://:1",
            "grpc://host:99999",
            "http://host:1",
            "grpc://h:1?ca=/a",
        ] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }
}
