//! Errors that say what failed, at which URL, and what to do.

use std::fmt;

/// Kind of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// There is no such object, or no such bucket.
    NotFound,
    /// The credentials are missing, wrong or expired, or do not allow the request.
    Denied,
    /// The object is no longer the version that was asked for.
    Changed,
    /// The server did not answer, or said that it cannot.
    Unavailable,
    /// The body of an answer is shorter or longer than it must be.
    Damaged,
    /// The store cannot do this.
    Unsupported,
    /// Any other failure.
    Other,
}

/// A failed request.
#[derive(Clone, Debug)]
pub struct Error {
    kind: Kind,
    text: String,
    url: String,
}

impl Error {
    pub(crate) fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), url: String::new() }
    }

    /// The error for an answer with `status` and `body`.
    pub(crate) fn of_status(status: u16, body: &str) -> Self {
        let kind = match status {
            404 => Kind::NotFound,
            401 | 403 => Kind::Denied,
            412 => Kind::Changed,
            408 | 429 | 500..=599 => Kind::Unavailable,
            _ => Kind::Other,
        };
        // Stores answer in XML or JSON. The code names the cause, for example `SlowDown`.
        let code = between(body, "<Code>", "</Code>").unwrap_or_default();
        let code = if code.is_empty() { String::new() } else { format!(" ({code})") };
        // A token that has expired gets the status 400 from S3.
        let kind = if matches!(code.as_str(), " (ExpiredToken)" | " (InvalidToken)") { Kind::Denied } else { kind };
        Self::new(kind, format!("the server answered {status}{code}"))
    }

    pub(crate) fn of_store(error: object_store::Error) -> Self {
        use object_store::Error as Store;
        // The error of the request lies below the errors of the client.
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
        let mut deepest = String::new();
        while let Some(found) = cause {
            // The type of this error is private to the crate, so that its text has to do.
            let text = found.to_string();
            if text.starts_with("Error performing") {
                if let Some((status, body)) = status_in(&text) {
                    return Self::of_status(status, body);
                }
                if text.contains("redirect") {
                    return Self::new(Kind::Other, "the server sends to another region: set `storage_region`");
                }
                return Self::new(Kind::Unavailable, deepest_text(found));
            }
            deepest = text;
            cause = found.source();
        }
        let kind = match &error {
            Store::NotFound { .. } => Kind::NotFound,
            Store::Precondition { .. } | Store::NotModified { .. } => Kind::Changed,
            Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => Kind::Denied,
            Store::NotSupported { .. } | Store::NotImplemented { .. } => Kind::Unsupported,
            Store::Generic { .. } => Kind::Damaged,
            _ => Kind::Other,
        };
        Self::new(kind, without_urls(&deepest))
    }

    pub(crate) fn of(mut self, url: &str) -> Self {
        if self.url.is_empty() {
            self.url = public(url);
        }
        self
    }

    /// The text without the URL, for callers that show the URL themselves.
    pub fn without_url(mut self) -> Self {
        self.url.clear();
        self
    }

    /// The kind of the failure.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

/// The status and the body in the text of a failed request.
fn status_in(text: &str) -> Option<(u16, &str)> {
    let rest = text.split_once("status code: ")?.1;
    Some((rest.get(..3)?.parse().ok()?, rest))
}

/// The text of the deepest cause of `error`, which tells most.
pub(crate) fn deepest_text(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    without_urls(&cause.to_string())
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let rest = text.split_once(before)?.1;
    Some(rest.split_once(after)?.0)
}

/// `url` without a user, a password and a query, which may hold credentials.
fn public(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            format!("{scheme}://{}{path}", host.rsplit('@').next().unwrap_or_default())
        }
        None => url.to_owned(),
    }
}

/// `text` without the queries of URLs in it, which may hold credentials.
fn without_urls(text: &str) -> String {
    let words = text.split(' ').map(|word| if word.contains("://") { public(word) } else { word.to_owned() });
    words.collect::<Vec<_>>().join(" ")
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remedy = match self.kind {
            Kind::NotFound => "check the names of bucket and object",
            Kind::Denied => {
                "check the credentials and the rights of this account, or read a public bucket without credentials"
            }
            Kind::Changed => "the object was replaced since it was indexed: restore it or start anew",
            Kind::Unavailable => "check the network and the endpoint, or allow more time",
            Kind::Damaged => "a proxy or the server damages answers: try again, or read another copy",
            Kind::Unsupported | Kind::Other => "",
        };
        f.write_str(&self.text)?;
        if !self.url.is_empty() {
            write!(f, " (`{}`)", self.url)?;
        }
        if remedy.is_empty() { Ok(()) } else { write!(f, "; {remedy}") }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_in_a_url_are_not_shown() {
        for (url, shown) in [
            ("s3://bucket/a/b.parquet", "s3://bucket/a/b.parquet"),
            ("https://user:secret@host/a?sig=secret", "https://host/a"),
            ("https://host?secret", "https://host"),
            ("az://box/a#secret", "az://box/a"),
        ] {
            assert_eq!(public(url), shown);
            let error = Error::new(Kind::Other, without_urls(&format!("cannot open {url} now"))).of(url);
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn the_code_in_a_body_is_shown() {
        let error = Error::of_status(503, "<Error><Code>SlowDown</Code></Error>");
        assert!(error.to_string().starts_with("the server answered 503 (SlowDown)"), "{error}");
        assert_eq!(Error::of_status(400, "<Code>ExpiredToken</Code>").kind(), Kind::Denied);
    }
}
