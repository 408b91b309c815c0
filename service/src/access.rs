//! Access over TCP: tokens, certificates, and who needs them.
//!
//! Both sides take the token from `FOREBAY_SERVICE_TOKEN`. There, `file:PATH` names a file with the
//! token.

use std::fmt;
use std::fs;
use std::path::Path;

use forebay::settings::environment::Environment;
use forebay::{Error, Result};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// Shortest token, in bytes. A shorter one could be guessed.
const LEAST_BYTES: usize = 16;
/// Longest token, in bytes.
const MOST_BYTES: usize = 4096;

/// A secret that a consumer shows to a server. It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// The token that the environment names. `None` if it names none.
    pub fn of(environment: &Environment) -> Result<Option<Self>> {
        let Some(text) = environment.get("FOREBAY_SERVICE_TOKEN").filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let Some(path) = text.strip_prefix("file:") else { return Self::new(text).map(Some) };
        let read = fs::read_to_string(path);
        let text = read.map_err(|error| {
            Error::io("cannot read the token that `FOREBAY_SERVICE_TOKEN` names", error).at(Path::new(path))
        })?;
        Self::new(text.trim_end_matches(['\r', '\n'])).map(Some)
    }

    fn new(text: &str) -> Result<Self> {
        let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_plain || !(LEAST_BYTES..=MOST_BYTES).contains(&text.len()) {
            return Err(Error::config(format!(
                "a token must have {LEAST_BYTES} to {MOST_BYTES} printable ASCII characters without spaces, found {}",
                text.chars().count()
            )));
        }
        Ok(Self(text.to_owned()))
    }

    /// The header that shows the token.
    fn header(&self) -> MetadataValue<Ascii> {
        let header = format!("Bearer {}", self.0).parse();
        let mut header: MetadataValue<Ascii> = header.expect("a token has printable characters");
        header.set_sensitive(true);
        header
    }

    /// Whether `shown` is the header of this token. The time does not depend on the place of a
    /// difference.
    fn is_shown_by(&self, shown: &[u8]) -> bool {
        let wanted = self.header();
        let wanted = wanted.as_bytes();
        let mut difference = wanted.len() ^ shown.len();
        for (index, byte) in wanted.iter().enumerate() {
            let other = shown.get(index).copied().unwrap_or(0);
            difference = std::hint::black_box(difference | usize::from(byte ^ other));
        }
        difference == 0
    }
}

/// Shows a token with every request of a consumer.
#[derive(Clone, Debug)]
pub(crate) struct Shows(pub(crate) Option<Token>);

impl Interceptor for Shows {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.header());
        }
        Ok(request)
    }
}

/// Refuses requests that do not show the token. Without a token, accepts all.
#[derive(Clone, Debug)]
pub(crate) struct Asks(pub(crate) Option<Token>);

impl Interceptor for Asks {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(token) = &self.0 else { return Ok(request) };
        let shown = request.metadata().get("authorization").map_or(&[][..], |header| header.as_bytes());
        if token.is_shown_by(shown) {
            return Ok(request);
        }
        Err(Status::unauthenticated("the token is missing or wrong: set `FOREBAY_SERVICE_TOKEN` as the server has it"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_is_accepted() {
        let token = Token::new("0123456789abcdef").unwrap();
        assert!(token.is_shown_by(b"Bearer 0123456789abcdef"));
        for other in [
            "",
            "Bearer ",
            "0123456789abcdef",
            "Bearer 0123456789abcdeg",
            "Bearer 0123456789abcdef0",
            "Bearer 0123456789abcde",
        ] {
            assert!(!token.is_shown_by(other.as_bytes()), "{other}");
        }
        for unfit in ["short", "0123456789abcde\n", "0123456789 abcdef"] {
            assert!(Token::new(unfit).is_err(), "{unfit}");
        }
        assert_eq!(format!("{token:?}"), "Token(..)");
    }

    #[test]
    fn a_token_comes_from_the_variable_or_from_a_file() {
        let of = |text: &str| Token::of(&Environment::from_pairs([("FOREBAY_SERVICE_TOKEN", text)]));
        assert_eq!(of("").unwrap(), None);
        assert_eq!(of("0123456789abcdef").unwrap(), Some(Token("0123456789abcdef".to_owned())));
        assert!(of("file:/no/such/file").is_err());
    }
}
