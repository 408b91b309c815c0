//! Lists folders, describes files and reads ranges of them, wherever they lie.
//!
//! [`Storage`] and [`Object`] are the seam: each kind of storage implements them. [`local`] is the
//! first implementation. All other rooms work with [`Files`] and [`SourceFile`]. [`Files`] tries
//! again after passing errors and names the file in every error. [`SourceFile`] is an open file;
//! its bytes are borrowed from a mapping or read. No other room calls `std::fs` to read data.
//!
//! A location is a path on disk, or another name that its storage understands. Only the storage
//! takes it apart.

#[cfg(feature = "remote")]
mod cache;
mod everywhere;
mod files;
#[cfg(feature = "remote")]
mod listings;
pub mod local;
#[cfg(feature = "remote")]
mod remote;
mod source_file;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

pub use self::files::Files;
pub(crate) use self::source_file::Reads;
pub use self::source_file::SourceFile;

/// Bytes of an object that are fetched at once if a read needs some of them.
pub const PART_BYTES: u64 = 4 << 20;

/// Tells whether `location` is the URL of a file in an object store, or on a server.
pub fn is_remote(location: &Path) -> bool {
    #[cfg(feature = "remote")]
    return remote::is_remote(location);
    #[cfg(not(feature = "remote"))]
    {
        let _ = location;
        false
    }
}

/// The location of the store that holds `location`. `None` for a local file.
pub fn store_of(location: &Path) -> Option<&Path> {
    #[cfg(feature = "remote")]
    return location.to_str().and_then(forebay_remote::root).map(Path::new);
    #[cfg(not(feature = "remote"))]
    {
        let _ = location;
        None
    }
}

/// Requests to stores and web servers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Number of requests.
    pub requests: u64,
    /// Bytes of their answers.
    pub bytes: u64,
}

/// The requests that this process has sent so far.
pub fn traffic() -> Traffic {
    #[cfg(feature = "remote")]
    {
        let (requests, bytes) = forebay_remote::traffic();
        Traffic { requests, bytes }
    }
    #[cfg(not(feature = "remote"))]
    Traffic::default()
}

/// A place that keeps files. Its errors need not name the location, because [`Files`] adds it.
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// Tells the storage that the entries of `data` will be searched for shards, and that the
    /// folders above them will be searched for the names `logs`. A storage may ask for all answers
    /// at once.
    fn prepare(&self, entries: &[String], logs: &[&str]) -> io::Result<()> {
        let _ = (entries, logs);
        Ok(())
    }

    /// Describes the file or folder at `location`. Follows links.
    fn stat(&self, location: &Path) -> io::Result<Stat>;

    /// Lists the entries of `folder`, in any order.
    fn list(&self, folder: &Path) -> io::Result<Vec<Item>>;

    /// Opens the file at `location`. Never waits for another process.
    fn open(&self, location: &Path) -> io::Result<Box<dyn Object>>;

    /// Replaces the file at `location` by `bytes`, and makes the folders above it. A process that
    /// reads the file at the same time finds all of the old bytes or all of the new bytes.
    fn replace(&self, location: &Path, bytes: &[u8]) -> io::Result<()>;

    /// The canonical name of a folder that may have several names, for example through links.
    fn canonical(&self, folder: &Path) -> io::Result<PathBuf>;

    /// The name of `location` that is the same for every process, whatever its working directory.
    fn absolute(&self, location: &Path) -> PathBuf;
}

/// An open file. All threads share it.
pub trait Object: Send + Sync + std::fmt::Debug {
    /// Describes the file as it is now.
    fn stat(&self) -> io::Result<Stat>;

    /// Reads up to `buffer.len()` bytes from `offset` on. Returns the number of bytes read, which
    /// is 0 at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Tells whether mapping the file is safe and fast.
    fn is_best_mapped(&self) -> bool;

    /// Maps the first `len` bytes. Returns `None` if this storage maps no files.
    fn map(&self, len: u64) -> io::Result<Option<local::Mapping>>;

    /// Whether a mapping may lack bytes until [`Object::need`] brings them.
    fn is_partial(&self) -> bool {
        false
    }

    /// Brings the bytes of `range` into the mapping. Returns false if there is no room for them.
    fn need(&self, range: Range<u64>) -> io::Result<bool> {
        let _ = range;
        Ok(true)
    }

    /// Asks for `range` to be read ahead. May do nothing.
    fn will_need(&self, range: Range<u64>);
}

/// The kind of thing at a location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ItemKind {
    /// A file that can be read at any offset.
    File,
    /// A folder.
    Folder,
    /// A pipe, a device, or anything else.
    Other,
}

/// The kind and the version of the thing at a location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The kind of the thing.
    pub kind: ItemKind,
    /// The version of the thing.
    pub stamp: Stamp,
}

/// A version, which tells whether a file is still the file that was opened or indexed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// Time of the last modification. `None` if the storage keeps no such time.
    pub modified: Option<SystemTime>,
    /// Digest of the name that the storage gives to this version of the content. 0 if it has none.
    pub version: u64,
}

/// One entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Name of the entry in its folder.
    pub name: String,
    /// Location of the entry.
    pub location: PathBuf,
    /// Kind of the entry. For a link, the kind of its target. A link without a target counts as a
    /// file.
    pub kind: ItemKind,
    /// Whether the entry is a link.
    pub is_link: bool,
}
