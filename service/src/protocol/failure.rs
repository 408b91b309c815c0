//! Errors as statuses of gRPC.
//!
//! The details of a status hold the kind and the place of an error, so that a consumer raises the
//! same error as without a service.

use std::fmt;
use std::path::Path;

use forebay::{Error, ErrorKind};
use serde_json::{Value, json};
use tonic::{Code, Status};

const KINDS: [(ErrorKind, &str, Code); 8] = [
    (ErrorKind::Config, "config", Code::InvalidArgument),
    (ErrorKind::NotFound, "not found", Code::NotFound),
    (ErrorKind::Io, "io", Code::Unknown),
    (ErrorKind::Data, "data", Code::DataLoss),
    (ErrorKind::Changed, "changed", Code::FailedPrecondition),
    (ErrorKind::State, "state", Code::FailedPrecondition),
    (ErrorKind::Closed, "closed", Code::Unavailable),
    (ErrorKind::Internal, "internal", Code::Internal),
];

/// Longest message that a status carries, in characters.
const MOST_MESSAGE: usize = 4096;
/// Most causes of an error that a status carries.
const MOST_CAUSES: usize = 4;

/// The name of a refusal of a handle that the server does not know, or no longer.
const UNKNOWN_HANDLE: &str = "handle";

/// The status that carries `error`.
pub fn status(error: &Error) -> Status {
    let (_, kind, code) = *KINDS.iter().find(|(kind, ..)| *kind == error.kind()).unwrap_or(&KINDS[7]);
    let mut details = json!({ "kind": kind });
    // The place is sent by itself. The message stands without it.
    let mut message = error.to_string();
    if let Some(location) = error.location() {
        let place = format!(" ({location})");
        message.truncate(message.strip_suffix(&place).map_or(message.len(), str::len));
        details["path"] = location.path.to_string_lossy().into_owned().into();
        details["block"] = location.block.into();
        details["row"] = location.row.into();
    }
    details["causes"] = error.causes().into_iter().take(MOST_CAUSES).collect::<Vec<_>>().into();
    // Headers of HTTP/2 have little room.
    let shortened = |most: usize| -> String { message.chars().take(most).collect() };
    details["message"] = shortened(MOST_MESSAGE).into();
    Status::with_details(code, shortened(MOST_MESSAGE / 4), details.to_string().into_bytes().into())
}

/// The status of a handle that the server does not know.
pub fn unknown_handle(handle: &str) -> Status {
    let details = json!({ "kind": UNKNOWN_HANDLE }).to_string().into_bytes();
    let shown: String = handle.chars().take(40).collect();
    Status::with_details(Code::NotFound, format!("no corpus is open under the handle `{shown}`"), details.into())
}

/// What a consumer learns from a status.
#[derive(Debug)]
pub enum Failed {
    /// The server does not know the handle. Ask for the corpus again.
    UnknownHandle,
    /// The server is not there, or stops. Another one may answer.
    Gone(String),
    /// The request fails at any server.
    Fault(Error),
}

/// What `status` says.
pub fn failed(status: &Status) -> Failed {
    let details: Value = serde_json::from_slice(status.details()).unwrap_or(Value::Null);
    let Some(kind) = details.get("kind").and_then(Value::as_str) else {
        return match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => {
                Failed::Fault(Error::new(ErrorKind::Io, format!("the service refused: {}", status.message())))
            }
            Code::Unimplemented | Code::InvalidArgument => {
                Failed::Fault(Error::config(format!("the service answered: {}", status.message())))
            }
            Code::ResourceExhausted | Code::OutOfRange => {
                Failed::Fault(Error::new(ErrorKind::Data, format!("the service answered: {}", status.message())))
            }
            _ => Failed::Gone(reason(status)),
        };
    };
    if kind == UNKNOWN_HANDLE {
        return Failed::UnknownHandle;
    }
    let kind = KINDS.iter().find(|(_, name, _)| *name == kind).map_or(ErrorKind::Internal, |(kind, ..)| *kind);
    if kind == ErrorKind::Closed {
        return Failed::Gone(status.message().to_owned());
    }
    let mut error = Error::new(kind, details.get("message").and_then(Value::as_str).unwrap_or(status.message()));
    let causes = details.get("causes").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let chained = |next: Option<Cause>, text: &str| Some(Cause { text: text.to_owned(), next: next.map(Box::new) });
    if let Some(cause) = causes.rev().take(MOST_CAUSES).fold(None, chained) {
        error = error.with_source(cause);
    }
    if let Some(path) = details.get("path").and_then(Value::as_str) {
        error = error.at(Path::new(path));
    }
    if let Some(block) = details.get("block").and_then(Value::as_u64) {
        error = error.in_block(block);
    }
    if let Some(row) = details.get("row").and_then(Value::as_u64) {
        error = error.at_row(row);
    }
    Failed::Fault(error)
}

/// The cause of an error at the server.
#[derive(Debug)]
struct Cause {
    text: String,
    next: Option<Box<Cause>>,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.next.as_ref().map(|next| &**next as _)
    }
}

/// Message and causes of a status, on one line.
fn reason(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_kind_message_and_place() {
        let cause = std::io::Error::other("the disk is gone");
        let error = Error::data("id -3 is negative").at(Path::new("/a/b.parquet")).in_block(4).at_row(17);
        let error = error.with_source(cause);
        let Failed::Fault(read) = failed(&status(&error)) else { panic!("a fault") };
        assert_eq!((read.kind(), read.to_string()), (error.kind(), error.to_string()));
        assert_eq!((read.location(), read.causes()), (error.location(), error.causes()));
        assert!(matches!(failed(&unknown_handle("a")), Failed::UnknownHandle));
        assert!(matches!(failed(&Status::unavailable("away")), Failed::Gone(_)));
    }
}
