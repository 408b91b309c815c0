//! Chooses the storage by the scheme of a location.

use std::io;
use std::path::{Path, PathBuf};

use super::local::Local;
#[cfg(feature = "remote")]
use super::remote::{self, Remote};
use super::{Item, Object, Stat, Storage};
use crate::settings::Config;

/// The files of this machine, and the files that have URLs.
#[derive(Debug)]
pub(super) struct Everywhere {
    #[cfg(feature = "remote")]
    remote: Remote,
}

impl Everywhere {
    pub(super) fn new(config: &Config) -> Self {
        #[cfg(not(feature = "remote"))]
        let _ = config;
        Self {
            #[cfg(feature = "remote")]
            remote: Remote::new(config),
        }
    }

    fn of(&self, location: &Path) -> &dyn Storage {
        #[cfg(feature = "remote")]
        if remote::is_remote(location) {
            return &self.remote;
        }
        let _ = location;
        &Local
    }
}

impl Storage for Everywhere {
    fn prepare(&self, entries: &[String], logs: &[&str]) -> io::Result<()> {
        #[cfg(feature = "remote")]
        return self.remote.prepare(entries, logs);
        #[cfg(not(feature = "remote"))]
        Local.prepare(entries, logs)
    }

    fn stat(&self, location: &Path) -> io::Result<Stat> {
        self.of(location).stat(location)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Item>> {
        self.of(folder).list(folder)
    }

    fn open(&self, location: &Path) -> io::Result<Box<dyn Object>> {
        self.of(location).open(location)
    }

    fn replace(&self, location: &Path, bytes: &[u8]) -> io::Result<()> {
        self.of(location).replace(location, bytes)
    }

    fn canonical(&self, folder: &Path) -> io::Result<PathBuf> {
        self.of(folder).canonical(folder)
    }

    fn absolute(&self, location: &Path) -> PathBuf {
        self.of(location).absolute(location)
    }
}
