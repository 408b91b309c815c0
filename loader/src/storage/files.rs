//! The files of a storage, in the form that the other rooms use.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::everywhere::Everywhere;
use super::local::Local;
use super::{Item, ItemKind, SourceFile, Stat, Storage};
use crate::error::{Error, Result};
use crate::notices::{self, Level};
use crate::settings::{Config, Io, OnError};
use crate::sync::lock;

/// Waits between the tries of a call that fails with a passing error. A file server that restarts
/// is back within seconds. A broken disk reports its error only after all these waits.
const WAITS: [Duration; 4] =
    [Duration::from_millis(10), Duration::from_millis(50), Duration::from_millis(250), Duration::from_millis(1000)];

/// The waits with `on_error` = retry: half a minute in all.
const LONG_WAITS: [Duration; 9] = [
    WAITS[0],
    WAITS[1],
    WAITS[2],
    WAITS[3],
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(8),
    Duration::from_secs(8),
];

/// Number of locations for which the storage remembers its warning. Any further location may be
/// warned of again.
const MOST_WARNED: usize = 1024;

/// A storage that tries calls again after passing errors, and names the location in every error.
/// Cheap to clone.
///
/// Every error message contains the operating system's text. The first passing error of a location
/// is a notice for the user's log.
#[derive(Clone, Debug)]
pub struct Files {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    storage: Box<dyn Storage>,
    waits: &'static [Duration],
    /// Locations that the user was warned of.
    warned: Mutex<HashSet<PathBuf>>,
}

impl Files {
    /// The files of this machine.
    pub fn local() -> Self {
        Self::new(Box::new(Local))
    }

    /// The files of this machine, and those that have URLs. `config` says how these are read.
    pub fn of(config: &Config) -> Self {
        let waits = if config.on_error == OnError::Retry { &LONG_WAITS[..] } else { &WAITS };
        Self::with_waits(Box::new(Everywhere::new(config)), waits)
    }

    /// The files of `storage`.
    pub fn new(storage: Box<dyn Storage>) -> Self {
        Self::with_waits(storage, &WAITS)
    }

    /// The files of `storage`. A call that fails with a passing error is tried again after each of
    /// `waits`.
    pub fn with_waits(storage: Box<dyn Storage>, waits: &'static [Duration]) -> Self {
        Self { inner: Arc::new(Inner { storage, waits, warned: Mutex::default() }) }
    }

    pub(super) fn storage(&self) -> &dyn Storage {
        self.inner.storage.as_ref()
    }

    /// Announces a search of `entries` for shards, and of the folders above them for `logs`.
    pub fn prepare(&self, entries: &[String], logs: &[&str]) -> Result<()> {
        self.storage().prepare(entries, logs).map_err(|error| Error::config(error.to_string()))
    }

    /// Describes the file or folder at `location`.
    pub fn stat(&self, location: &Path) -> Result<Stat> {
        self.retried(&"stat", location, || Ok(self.storage().stat(location)))
    }

    /// Describes the file or folder at `location`. `None` if there is none.
    pub fn stat_if_there(&self, location: &Path) -> Result<Option<Stat>> {
        self.retried(&"stat", location, || Ok(if_there(self.storage().stat(location))))
    }

    /// Tells whether `location` holds a file.
    pub fn has_file(&self, location: &Path) -> Result<bool> {
        Ok(self.stat_if_there(location)?.is_some_and(|stat| stat.kind == ItemKind::File))
    }

    /// Lists the entries of `folder`, sorted by name.
    pub fn list(&self, folder: &Path) -> Result<Vec<Item>> {
        let mut items = self.retried(&"list", folder, || Ok(self.storage().list(folder)))?;
        items.sort_unstable_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
        Ok(items)
    }

    /// Opens the file at `location`. The file is mapped unless `io` or its storage rules that out.
    pub fn open(&self, location: &Path, io: Io) -> Result<SourceFile> {
        SourceFile::open(self, location, io)
    }

    /// Reads the whole file at `location`. `None` if there is no file.
    pub fn read_if_there(&self, location: &Path) -> Result<Option<Vec<u8>>> {
        let Some(stat) = self.stat_if_there(location)? else { return Ok(None) };
        if stat.stamp.size_bytes == 0 {
            return Ok(Some(Vec::new()));
        }
        let file = self.open(location, Io::Pread)?;
        Ok(Some(file.bytes(0..file.len())?.into()))
    }

    /// Replaces the file at `location` by `bytes`.
    pub fn replace(&self, location: &Path, bytes: &[u8]) -> Result<()> {
        self.retried(&"write", location, || Ok(self.storage().replace(location, bytes)))
    }

    /// The canonical name of a folder that may have several names.
    pub fn canonical(&self, folder: &Path) -> Result<PathBuf> {
        self.retried(&"resolve", folder, || Ok(self.storage().canonical(folder)))
    }

    /// The absolute name of `location`, which is the same for every process.
    pub fn absolute(&self, location: &Path) -> PathBuf {
        self.storage().absolute(location)
    }

    /// Repeats `call` until it succeeds, fails for good, or has failed too often. `call` returns an
    /// error of its own if another try makes no sense.
    pub(super) fn retried<T>(
        &self,
        what: &dyn fmt::Display,
        location: &Path,
        mut call: impl FnMut() -> Result<io::Result<T>>,
    ) -> Result<T> {
        let mut waits = self.inner.waits.iter();
        loop {
            let error = match call()? {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if !is_passing(&error) {
                return Err(Error::io(format!("cannot {what}"), error).at(location));
            }
            let Some(wait) = waits.next() else {
                let tries = self.inner.waits.len() + 1;
                return Err(Error::io(format!("cannot {what}, tried {tries} times"), error).at(location));
            };
            self.warn(what, location, &error);
            std::thread::sleep(*wait);
        }
    }

    #[cold]
    fn warn(&self, what: &dyn fmt::Display, location: &Path, error: &io::Error) {
        let mut warned = lock(&self.inner.warned);
        if warned.len() >= MOST_WARNED {
            warned.clear();
        }
        if warned.insert(location.to_owned()) {
            let text = format!("cannot {what} (`{}`): {error}; trying again", location.display());
            notices::add(Level::Warning, text);
        }
    }
}

/// Turns the error that nothing is there into `None`.
fn if_there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Tells whether the same call may succeed a moment later. Network file systems and failing disks
/// give such errors.
fn is_passing(error: &io::Error) -> bool {
    #[cfg(unix)]
    if matches!(error.raw_os_error(), Some(libc::EIO | libc::ESTALE | libc::EAGAIN | libc::EINTR | libc::ETIMEDOUT)) {
        return true;
    }
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}
