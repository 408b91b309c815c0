//! Error: one opaque type that holds the kind of a failure, its message, its place in the data and
//! its cause.
//!
//! A message says what was expected, what was found, and the remedy if it is known. It is in lower
//! case and has no full stop. The location is separate from the message. Callers can act on it, and
//! every rendering shows it in the same way.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::text::escaped;

/// Result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Kind of a failure, coarse enough to choose an exception type or an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting, an argument or an environment variable has an unusable value.
    Config,
    /// No shard was found, or a file does not exist.
    NotFound,
    /// The operating system failed to open, map or read a file.
    Io,
    /// A file's content is damaged, has an unsupported type, or contradicts the file's own
    /// metadata.
    Data,
    /// A file is no longer the file that was opened.
    Changed,
    /// A saved state belongs to another corpus or to other content settings.
    State,
    /// The loader was closed, or its process was forked.
    Closed,
    /// A defect of this crate, such as a panic in a worker.
    Internal,
}

/// A place in the data: a shard, and the known part of the place inside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Location {
    /// Path of the shard. Empty until the error reaches code that knows the path.
    pub path: PathBuf,
    /// Block of the shard, counted from 0.
    pub block: Option<u64>,
    /// Row of the shard, counted from 0.
    pub row: Option<u64>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.path.as_os_str().is_empty() {
            parts.push(format!("`{}`", self.path.display()));
        }
        parts.extend(self.block.map(|block| format!("block {block}")));
        parts.extend(self.row.map(|row| format!("row {row}")));
        f.write_str(&parts.join(", "))
    }
}

/// Describes why an operation failed, and where.
#[derive(Clone, Debug)]
pub struct Error(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    location: Option<Location>,
    // `Arc` keeps the error cloneable, because one failed block can fail several batches.
    source: Option<std::sync::Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Makes an error of `kind` with `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), location: None, source: None }))
    }

    /// Makes an error about an unusable setting.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    /// Makes an error about damaged or unsupported content.
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Data, message)
    }

    /// Makes an error about a failed call to the operating system. The system's text ends the
    /// message.
    pub fn io(message: impl fmt::Display, source: std::io::Error) -> Self {
        let kind = if source.kind() == std::io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Io };
        Self::new(kind, format!("{message}: {source}")).with_source(source)
    }

    /// Joins several errors to one, which lists them one per line. It has the kind of the first
    /// error.
    ///
    /// # Panics
    /// If `errors` is empty.
    pub fn all(mut errors: Vec<Self>) -> Self {
        assert!(!errors.is_empty(), "a list of faults has at least one");
        if errors.len() == 1 {
            return errors.remove(0);
        }
        let kind = errors[0].kind();
        let mut message = format!("{} faults found:", errors.len());
        for error in &errors {
            message.push_str("\n  - ");
            message.push_str(&error.report());
        }
        Self::new(kind, message)
    }

    fn location_mut(&mut self) -> &mut Location {
        self.0.location.get_or_insert_default()
    }

    /// Adds `path` to the location, unless it has a path already.
    #[must_use]
    pub fn at(mut self, path: &Path) -> Self {
        let location = self.location_mut();
        if location.path.as_os_str().is_empty() {
            path.clone_into(&mut location.path);
        }
        self
    }

    /// Adds the block number `block` to the location, unless it has one already.
    #[must_use]
    pub fn in_block(mut self, block: u64) -> Self {
        self.location_mut().block.get_or_insert(block);
        self
    }

    /// Adds the row number `row` to the location, unless it has one already.
    #[must_use]
    pub fn at_row(mut self, row: u64) -> Self {
        self.location_mut().row.get_or_insert(row);
        self
    }

    /// Adds the lower-level error that caused this one.
    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.source = Some(std::sync::Arc::new(source));
        self
    }

    /// Puts `text` and a colon before the message.
    #[must_use]
    pub fn context(mut self, text: impl fmt::Display) -> Self {
        self.0.message = format!("{text}: {}", self.0.message);
        self
    }

    /// Kind of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Place in the data where the failure happened, if it has a place there.
    pub fn location(&self) -> Option<&Location> {
        self.0.location.as_ref()
    }

    /// The texts of the errors that caused this one, a line each. Leaves out what the message
    /// says already.
    pub fn causes(&self) -> Vec<String> {
        let mut told = self.to_string();
        let mut causes = Vec::new();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let said = error.to_string();
            // Flatbuffers adds a line for each table that it was in.
            let said = escaped(said.lines().next().unwrap_or_default().trim_end_matches('.')).into_owned();
            // The text of a failed system call is in the message already.
            if !told.contains(&said) {
                told.push_str(&said);
                causes.push(said);
            }
            cause = error.source();
        }
        causes
    }

    /// Formats the message, its place and every cause on one line.
    pub fn report(&self) -> String {
        [self.to_string()].into_iter().chain(self.causes()).collect::<Vec<_>>().join(": ")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        match &self.0.location {
            Some(location) => write!(f, " ({location})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source.as_ref() as _)
    }
}
