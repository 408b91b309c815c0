//! An open file. Its bytes are borrowed from a mapping or read by position.
//!
//! If a mapped file shrinks, reading a missing page kills the process with SIGBUS. Size and
//! modification time are therefore compared before each block, and for small windows once a
//! millisecond. That makes a crash rarer; only [`Io::Pread`] rules it out.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use super::local::Mapping;
use super::{Files, ItemKind, Object, Stamp};
use crate::error::{Error, ErrorKind, Result};
use crate::settings::Io;

/// Time for which a comparison of size and modification time holds for later windows, up to the
/// next tick of the coarse clock. A `stat` takes a third of the time of a window.
const CHECK_EVERY: Duration = Duration::from_millis(1);

/// A file whose bytes can be borrowed or read. Cheap to clone.
///
/// The file is mapped when it is first read in place. Opening reads a few small ranges, for which a
/// mapping costs more than it saves.
#[derive(Clone, Debug)]
pub struct SourceFile {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    files: Files,
    location: PathBuf,
    io: Io,
    /// The version of the file when it was opened.
    stamp: Stamp,
    /// Whether the mapping may lack bytes.
    is_partial: bool,
    /// The open file. It is missing at the start, after [`SourceFile::let_go`], and after the
    /// storage told that the handle is stale. The thread that needs it first sets it.
    object: RwLock<Option<Arc<dyn Object>>>,
    /// The mapping, or `None` if the file must not be mapped.
    map: OnceLock<Option<Mapping>>,
    /// Whether mappings are advised as scattered. Opening the shard writes it.
    random: AtomicBool,
    /// Time of the last check, or 0. Any thread writes it; a lost update costs one more check.
    checked_nanos: AtomicU64,
}

impl SourceFile {
    pub(super) fn open(files: &Files, location: &Path, io: Io) -> Result<Self> {
        let (object, stamp) = open_regular(files, location)?;
        let inner = Inner {
            files: files.clone(),
            location: location.to_owned(),
            io,
            stamp,
            is_partial: object.is_partial(),
            object: RwLock::new(Some(object)),
            map: OnceLock::new(),
            random: AtomicBool::new(false),
            checked_nanos: AtomicU64::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Closes the file, unless other holders remain. The next use opens it again, and fails if the
    /// file changed meanwhile.
    pub fn let_go(&mut self) {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.object.get_mut().unwrap_or_else(PoisonError::into_inner).take();
            inner.map.take();
        }
    }

    fn object(&self) -> Result<Arc<dyn Object>> {
        let held = self.inner.object.read().unwrap_or_else(PoisonError::into_inner).clone();
        held.map_or_else(|| self.open_again(), Ok)
    }

    #[cold]
    fn open_again(&self) -> Result<Arc<dyn Object>> {
        let (object, stamp) = open_regular(&self.inner.files, &self.inner.location)?;
        self.check_same(stamp)?;
        let mut held = self.inner.object.write().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(held.get_or_insert(object)))
    }

    /// Calls `call` on the open file until it succeeds or fails for good. Opens the file again if
    /// the handle is stale.
    fn on_object<T>(&self, what: &dyn fmt::Display, mut call: impl FnMut(&dyn Object) -> io::Result<T>) -> Result<T> {
        self.inner.files.retried(what, &self.inner.location, || {
            let result = call(&*self.object()?);
            #[cfg(unix)]
            if let Err(error) = &result
                && error.raw_os_error() == Some(libc::ESTALE)
            {
                self.inner.object.write().unwrap_or_else(PoisonError::into_inner).take();
            }
            Ok(result)
        })
    }

    fn map(&self) -> Result<Option<&Mapping>> {
        match self.inner.map.get() {
            Some(map) => Ok(map.as_ref()),
            None => self.map_now(),
        }
    }

    #[cold]
    fn map_now(&self) -> Result<Option<&Mapping>> {
        let len = self.len();
        let io = self.inner.io;
        let map = self.on_object(&"map", |object| {
            let wanted = io == Io::Mmap || io == Io::Auto && object.is_best_mapped();
            if wanted { object.map(len) } else { Ok(None) }
        })?;
        if let Some(map) = &map
            && self.inner.random.load(Ordering::Relaxed)
        {
            map.advise_random();
        }
        // Another thread may have set its mapping already.
        Ok(self.inner.map.get_or_init(|| map).as_ref())
    }

    /// The mapping, if it has the bytes of `range` or can get them.
    fn map_with(&self, range: &Range<u64>) -> Result<Option<&Mapping>> {
        let map = self.map()?;
        if !self.inner.is_partial || map.is_none() {
            return Ok(map);
        }
        let what = format_args!("read {} bytes at {}", range.end - range.start, range.start);
        let is_there = self.on_object(&what, |object| object.need(range.clone()))?;
        Ok(map.filter(|_| is_there))
    }

    /// The location under which the file was opened.
    pub fn path(&self) -> &Path {
        &self.inner.location
    }

    /// Size of the file in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.inner.stamp.size_bytes
    }

    /// Whether the file had no bytes when it was opened.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size and modification time of the file when it was opened.
    pub fn stamp(&self) -> Stamp {
        self.inner.stamp
    }

    /// Modification time of the file when it was opened.
    pub fn modified(&self) -> Option<SystemTime> {
        self.inner.stamp.modified
    }

    /// Whether reads may borrow from a mapping.
    pub fn is_mapped(&self) -> bool {
        self.map().is_ok_and(|map| map.is_some())
    }

    /// The mapped bytes, if the whole file can be mapped.
    pub fn mapped(&self) -> Option<&[u8]> {
        if self.inner.is_partial {
            return None;
        }
        self.map().ok().flatten().map(|map| &**map)
    }

    /// The bytes of `range`, borrowed from the mapping or read into `scratch`.
    pub fn slice<'a>(&'a self, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        self.check_range(&range)?;
        if range.is_empty() {
            return Ok(&[]);
        }
        match self.map_with(&range)? {
            Some(map) => Ok(&map[range.start as usize..range.end as usize]),
            None => {
                self.read(range, scratch)?;
                Ok(scratch)
            }
        }
    }

    /// Replaces the content of `buffer` by the bytes of `range`, whether the file is mapped or not.
    fn read(&self, range: Range<u64>, buffer: &mut Vec<u8>) -> Result<()> {
        self.check_range(&range)?;
        buffer.resize((range.end - range.start) as usize, 0);
        let (len, mut done) = (buffer.len(), 0);
        let is_whole = self.on_object(&format_args!("read {len} bytes at {}", range.start), |object| {
            while done < len {
                match object.read_at(&mut buffer[done..], range.start + done as u64)? {
                    0 => return Ok(false),
                    read => done += read,
                }
            }
            Ok(true)
        })?;
        if is_whole {
            return Ok(());
        }
        let message = format!("shard shrank while it was being read: it had {} bytes when opened", self.len());
        Err(Error::new(ErrorKind::Changed, message).at(self.path()))
    }

    /// The bytes of `range` as shared bytes: a view of the mapping, or a new copy.
    pub fn bytes(&self, range: Range<u64>) -> Result<bytes::Bytes> {
        self.check_range(&range)?;
        if range.is_empty() {
            return Ok(bytes::Bytes::new());
        }
        if self.map_with(&range)?.is_some() {
            Ok(bytes::Bytes::from_owner(MappedBytes(Arc::clone(&self.inner)))
                .slice(range.start as usize..range.end as usize))
        } else {
            let mut buffer = Vec::new();
            self.read(range, &mut buffer)?;
            Ok(buffer.into())
        }
    }

    /// Asks for the pages of `range` to be read ahead. May have no effect.
    pub fn will_need(&self, range: Range<u64>) {
        if range.end > self.len() || range.start >= range.end {
            return;
        }
        if self.inner.is_partial {
            let _ = self.object().map(|object| object.will_need(range));
            return;
        }
        match self.map() {
            Ok(Some(map)) => map.will_need(range),
            Ok(None) => {
                let _ = self.object().map(|object| object.will_need(range));
            }
            Err(_) => {}
        }
    }

    /// Tells whether the page at `offset` is in memory. Returns false for files read by position,
    /// because those cannot know.
    pub fn is_resident(&self, offset: u64) -> bool {
        !self.inner.is_partial
            && offset < self.len()
            && self.map().is_ok_and(|map| map.is_some_and(|map| map.is_resident(offset)))
    }

    /// Tells the kernel that access will be scattered.
    pub fn advise_random(&self) {
        self.inner.random.store(true, Ordering::Relaxed);
        if let Some(Some(map)) = self.inner.map.get() {
            map.advise_random();
        }
    }

    /// Fails if size or modification time differ from those at opening.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self.on_object(&"stat", |object| object.stat())?;
        self.check_same(now.stamp)
    }

    fn check_same(&self, now: Stamp) -> Result<()> {
        let then = self.inner.stamp;
        if now.size_bytes != then.size_bytes {
            let message = format!(
                "shard changed while it was being read: it had {} bytes when opened and has {} now; \
                 restore it or start anew",
                then.size_bytes, now.size_bytes
            );
            return Err(Error::new(ErrorKind::Changed, message).at(self.path()));
        }
        if now.version != then.version {
            let message = "shard changed while it was being read: its version differs from that at opening; \
                           restore it or start anew";
            return Err(Error::new(ErrorKind::Changed, message).at(self.path()));
        }
        if now != then {
            let message = "shard changed while it was being read: its modification time differs from that at opening; \
                           restore it or start anew";
            return Err(Error::new(ErrorKind::Changed, message).at(self.path()));
        }
        Ok(())
    }

    /// Like [`SourceFile::check_unchanged`], but compares at most once a millisecond, for small
    /// windows.
    pub fn check_window(&self) -> Result<()> {
        let now = coarse_nanos();
        let last = self.inner.checked_nanos.load(Ordering::Relaxed);
        if last != 0 && now.saturating_sub(last) < CHECK_EVERY.as_nanos() as u64 {
            return Ok(());
        }
        self.check_unchanged()?;
        self.inner.checked_nanos.store(now.max(1), Ordering::Relaxed);
        Ok(())
    }

    fn check_range(&self, range: &Range<u64>) -> Result<()> {
        if range.start > range.end || range.end > self.len() {
            return Err(Error::data(format!(
                "shard is truncated or damaged: bytes {}..{} are needed, the file has {}",
                range.start,
                range.end,
                self.len()
            ))
            .at(self.path()));
        }
        Ok(())
    }
}

/// Opens `location` for reading, if it is a file.
fn open_regular(files: &Files, location: &Path) -> Result<(Arc<dyn Object>, Stamp)> {
    let irregular = || Error::data("not a regular file: expected a Parquet or Arrow file").at(location);
    let opened = files.retried(&"open", location, || Ok(files.storage().open(location)));
    let object: Arc<dyn Object> = match opened {
        Ok(object) => object.into(),
        Err(error) => {
            let is_irregular = files.storage().stat(location).is_ok_and(|stat| stat.kind != ItemKind::File);
            return Err(if is_irregular { irregular() } else { error });
        }
    };
    let stat = files.retried(&"stat", location, || Ok(object.stat()))?;
    if stat.kind == ItemKind::File { Ok((object, stat.stamp)) } else { Err(irregular()) }
}

/// Reads a clock that is cheap and coarse: its ticks are some milliseconds long.
#[cfg(target_os = "linux")]
fn coarse_nanos() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `clock_gettime` writes to one `timespec`, which lives long enough.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(not(target_os = "linux"))]
fn coarse_nanos() -> u64 {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    START.get_or_init(std::time::Instant::now).elapsed().as_nanos() as u64
}

/// Reads ranges of a file that is being opened. Reads a few ranges by position, and joins small
/// ones to one read. Takes many ranges or long ranges from the mapping.
pub(crate) struct Reads {
    file: SourceFile,
    buffer: Vec<u8>,
    start: u64,
    reads: usize,
}

/// Number of reads above which a mapping costs less.
const FEW_READS: usize = 32;
/// Number of bytes in one read above which a mapping costs less. A copy would also take as much
/// memory.
const LONG_READ: u64 = 256 << 10;
/// Number of bytes read at once. They hold a message with its offsets, or a footer.
const READ_AHEAD: u64 = 512;

impl Reads {
    pub(crate) fn new(file: SourceFile) -> Self {
        Self { file, buffer: Vec::new(), start: 0, reads: 0 }
    }

    pub(crate) fn file(&self) -> &SourceFile {
        &self.file
    }

    pub(crate) fn into_file(self) -> SourceFile {
        self.file
    }

    /// The last `len` bytes. Reads the bytes before them in the same call.
    pub(crate) fn last(&mut self, len: u64) -> Result<&[u8]> {
        let end = self.file.len();
        let tail = self.get(end - end.min(len.max(READ_AHEAD))..end)?;
        Ok(&tail[tail.len() - len as usize..])
    }

    /// The bytes of `range`.
    pub(crate) fn get(&mut self, range: Range<u64>) -> Result<&[u8]> {
        self.file.check_range(&range)?;
        if range.is_empty() {
            return Ok(&[]);
        }
        let held = self.start..self.start + self.buffer.len() as u64;
        if range.start < held.start || range.end > held.end {
            let map = if self.reads >= FEW_READS || range.end - range.start > LONG_READ {
                self.file.map_with(&range)?
            } else {
                None
            };
            if let Some(map) = map {
                return Ok(&map[range.start as usize..range.end as usize]);
            }
            let until = range.end.max(range.start + READ_AHEAD).min(self.file.len());
            self.file.read(range.start..until, &mut self.buffer)?;
            self.start = range.start;
            self.reads += 1;
        }
        let from = (range.start - self.start) as usize;
        Ok(&self.buffer[from..from + (range.end - range.start) as usize])
    }
}

struct MappedBytes(Arc<Inner>);

impl AsRef<[u8]> for MappedBytes {
    fn as_ref(&self) -> &[u8] {
        self.0.map.get().and_then(Option::as_deref).unwrap_or_default()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const IOS: [Io; 2] = [Io::Mmap, Io::Pread];

    #[test]
    fn what_is_not_a_file_is_refused_without_waiting_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: the name ends with a zero.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [Path::new("/dev/null"), Path::new("/"), &pipe, &socket] {
            let error = Files::local().open(path, Io::Auto).unwrap_err();
            assert!(error.to_string().contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn a_file_that_was_let_go_is_read_again_unless_it_changed() {
        for io in IOS {
            let named = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(named.path(), [7; 100]).unwrap();
            let mut file = Files::local().open(named.path(), io).unwrap();
            let mut scratch = Vec::new();
            assert_eq!(file.slice(98..100, &mut scratch).unwrap(), [7, 7]);
            file.let_go();
            assert!(file.inner.object.read().unwrap().is_none());
            assert!(file.inner.map.get().is_none());
            assert_eq!(file.slice(98..100, &mut scratch).unwrap(), [7, 7]);
            file.let_go();
            std::fs::write(named.path(), [7; 90]).unwrap();
            assert_eq!(file.slice(80..90, &mut scratch).unwrap_err().kind(), ErrorKind::Changed);
            assert_eq!(file.check_window().unwrap_err().kind(), ErrorKind::Changed);
            named.close().unwrap();
            assert_eq!(file.slice(80..90, &mut scratch).unwrap_err().kind(), ErrorKind::NotFound);
        }
    }

    #[test]
    fn stretches_are_those_of_the_file_in_any_order() {
        let bytes: Vec<u8> = (0..300_000u32).map(|at| (at % 251) as u8).collect();
        let named = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(named.path(), &bytes).unwrap();
        for io in IOS {
            let mut reads = Reads::new(Files::local().open(named.path(), io).unwrap());
            assert_eq!(reads.last(10).unwrap(), &bytes[bytes.len() - 10..]);
            for turn in 0..3 * FEW_READS {
                let start = turn * 7919 % bytes.len();
                let short = (start + turn % 600).min(bytes.len());
                for range in [start..short, start..start, start..(start + 10).min(bytes.len()), turn..bytes.len()] {
                    let found = reads.get(range.start as u64..range.end as u64).unwrap();
                    assert_eq!(found, &bytes[range]);
                }
            }
            assert!(reads.get(299_999..300_001).is_err());
        }
    }
}
