//! Lists folders, describes files and reads ranges of them, wherever they lie.
//!
//! [`Storage`] and [`Object`] are the seam: one implementation per kind of storage. [`local`] is the first one. All other
//! rooms work with [`Files`], which tries passing errors again and names the file in every error, and with
//! [`SourceFile`], an open file whose bytes are borrowed from a mapping or read. No other room calls `std::fs` to read
//! data.
//!
//! A location is a path on disk, or whatever else its storage understands. Only the storage takes it apart.

mod files;
pub mod local;
mod source_file;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

pub use self::files::Files;
pub(crate) use self::source_file::Reads;
pub use self::source_file::SourceFile;

/// A place that keeps files. Errors need not name the location: [`Files`] adds it.
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// Describes what lies at `location`. Links are followed.
    fn stat(&self, location: &Path) -> io::Result<Stat>;

    /// Lists what `folder` holds, in any order.
    fn list(&self, folder: &Path) -> io::Result<Vec<Item>>;

    /// Opens the file at `location`. Does not wait for another process.
    fn open(&self, location: &Path) -> io::Result<Box<dyn Object>>;

    /// Puts `bytes` in place of the file at `location`, and makes the folders above it. Whoever reads the file at the
    /// same time finds all of the old bytes or all of the new ones.
    fn replace(&self, location: &Path, bytes: &[u8]) -> io::Result<()>;

    /// The one name of a folder that may have several, such as a folder that links lead to.
    fn canonical(&self, folder: &Path) -> io::Result<PathBuf>;

    /// The name that `location` has for every process, whatever its working directory.
    fn absolute(&self, location: &Path) -> PathBuf;
}

/// An open file. All threads share it.
pub trait Object: Send + Sync + std::fmt::Debug {
    /// Describes the file as it is now.
    fn stat(&self) -> io::Result<Stat>;

    /// Reads up to `buffer.len()` bytes from `offset` on, and returns how many; 0 at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Tells whether mapping the file is safe and fast.
    fn is_best_mapped(&self) -> bool;

    /// Maps the first `len` bytes. `None` where this storage maps no files.
    fn map(&self, len: u64) -> io::Result<Option<local::Mapping>>;

    /// Asks for `range` to be read ahead. May do nothing.
    fn will_need(&self, range: Range<u64>);
}

/// What a location holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ItemKind {
    /// A file that can be read at any offset.
    File,
    /// A folder.
    Folder,
    /// A pipe, a device, or anything else.
    Other,
}

/// The kind and the version of what a location holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: ItemKind,
    /// Its version.
    pub stamp: Stamp,
}

/// Tells whether a file is still the one that was opened or indexed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Bytes of the file.
    pub size_bytes: u64,
    /// When it was last modified. `None` where the storage keeps no such time.
    pub modified: Option<SystemTime>,
}

/// One entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its name in the folder.
    pub name: String,
    /// Where it is.
    pub location: PathBuf,
    /// What it is; for a link, what the link leads to. A link that leads nowhere counts as a file.
    pub kind: ItemKind,
    /// Whether it is a link.
    pub is_link: bool,
}
