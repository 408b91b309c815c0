//! File bytes, by mapping or by positioned reads; the only place that maps files.
//!
//! A mapped file that shrinks kills the process with SIGBUS on access. Size and modification time are therefore compared
//! before each block or window; that narrows the race, and only [`Io::Pread`] closes it.

use std::fs::{File, Metadata, OpenOptions};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use memmap2::Mmap;

use crate::error::{Error, ErrorKind, Result};
use crate::settings::Io;

/// How long a comparison of size and time stands for the windows read after it, to the next tick of the coarse clock: a `stat` takes a third of
/// the time of a window.
const CHECK_EVERY: Duration = Duration::from_millis(1);

/// A file whose bytes can be borrowed or read. Cheap to clone.
///
/// It is mapped when it is first read in place: opening reads a few small stretches, for which a mapping costs more than it saves.
#[derive(Clone, Debug)]
pub struct SourceFile {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    io: Io,
    len: u64,
    modified: Option<SystemTime>,
    /// Set by whoever needs it first: at opening, and after [`SourceFile::let_go`].
    file: OnceLock<File>,
    /// Nothing where the file is not to be mapped.
    map: OnceLock<Option<Mmap>>,
    /// Whether mappings are advised as scattered. Written at opening.
    random: AtomicBool,
    /// When the last check was, or 0. Any thread writes it; a lost update costs one more check.
    checked_nanos: AtomicU64,
}

impl SourceFile {
    /// Opens `path`, to be mapped unless `io` or its file system says otherwise.
    pub fn open(path: &Path, io: Io) -> Result<Self> {
        let (file, metadata) = open_regular(path)?;
        if metadata.len() == 0 {
            return Err(Error::data("shard is empty: expected a Parquet or Arrow file, found 0 bytes").at(path));
        }
        let inner = Inner {
            path: path.to_owned(),
            io,
            len: metadata.len(),
            modified: metadata.modified().ok(),
            file: file.into(),
            map: OnceLock::new(),
            random: AtomicBool::new(false),
            checked_nanos: AtomicU64::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Closes the file, unless others hold it; the next use opens it again, and fails if it changed meanwhile.
    pub fn let_go(&mut self) {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.file.take();
            inner.map.take();
        }
    }

    fn file(&self) -> Result<&File> {
        match self.inner.file.get() {
            Some(file) => Ok(file),
            None => self.open_again(),
        }
    }

    #[cold]
    fn open_again(&self) -> Result<&File> {
        let (file, metadata) = open_regular(&self.inner.path)?;
        self.check_same(&metadata)?;
        Ok(self.inner.file.get_or_init(|| file))
    }

    fn map(&self) -> Result<Option<&Mmap>> {
        match self.inner.map.get() {
            Some(map) => Ok(map.as_ref()),
            None => self.map_now(),
        }
    }

    #[cold]
    fn map_now(&self) -> Result<Option<&Mmap>> {
        let file = self.file()?;
        let wanted = match self.inner.io {
            Io::Mmap => true,
            Io::Pread => false,
            Io::Auto => is_local(file),
        };
        let map = if wanted {
            #[allow(clippy::disallowed_methods)] // this is the one place
            // SAFETY: the mapping is read-only and shared; bytes are only ever interpreted as integers, for which any
            // value is valid. A file truncated by another process is caught by `check_unchanged` before each window.
            let map = unsafe { memmap2::MmapOptions::new().len(self.inner.len as usize).map(file) }
                .map_err(|error| Error::io("cannot map shard", error).at(&self.inner.path))?;
            if self.inner.random.load(Ordering::Relaxed) {
                advise_random(&map);
            }
            Some(map)
        } else {
            None
        };
        // Another thread's may be there already.
        Ok(self.inner.map.get_or_init(|| map).as_ref())
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Bytes of the file when it was opened.
    pub fn len(&self) -> u64 {
        self.inner.len
    }

    /// Never: empty files are refused.
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// Modification time when it was opened.
    pub fn modified(&self) -> Option<SystemTime> {
        self.inner.modified
    }

    /// The mapped bytes, if the file can be mapped.
    pub fn mapped(&self) -> Option<&[u8]> {
        self.map().ok().flatten().map(|map| &**map)
    }

    /// The bytes of `range`, borrowed from the mapping or read into `scratch`.
    pub fn slice<'a>(&'a self, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        self.check_range(&range)?;
        match self.map()? {
            Some(map) => Ok(&map[range.start as usize..range.end as usize]),
            None => {
                self.read(range, scratch)?;
                Ok(scratch)
            }
        }
    }

    /// Reads `range`, mapped or not, in place of what is in `buffer`.
    fn read(&self, range: Range<u64>, buffer: &mut Vec<u8>) -> Result<()> {
        self.check_range(&range)?;
        buffer.resize((range.end - range.start) as usize, 0);
        self.read_exact_at(buffer, range.start)
    }

    /// The bytes of `range` as shared bytes: a view of the mapping, or freshly read.
    pub fn bytes(&self, range: Range<u64>) -> Result<bytes::Bytes> {
        self.check_range(&range)?;
        if self.map()?.is_some() {
            Ok(bytes::Bytes::from_owner(MappedBytes(Arc::clone(&self.inner)))
                .slice(range.start as usize..range.end as usize))
        } else {
            let mut buffer = Vec::new();
            self.read(range, &mut buffer)?;
            Ok(buffer.into())
        }
    }

    /// Asks for the pages of `range` to be read ahead. Best effort.
    pub fn will_need(&self, range: Range<u64>) {
        #[cfg(target_os = "linux")]
        if range.end <= self.inner.len && range.start < range.end {
            use std::os::fd::AsRawFd;
            match self.map() {
                Ok(Some(map)) => {
                    let _ = map.advise_range(
                        memmap2::Advice::WillNeed,
                        range.start as usize,
                        (range.end - range.start) as usize,
                    );
                }
                Ok(None) => {
                    let Ok(file) = self.file() else { return };
                    // SAFETY: a hint on an open descriptor; it touches no memory of ours.
                    unsafe {
                        libc::posix_fadvise(
                            file.as_raw_fd(),
                            range.start as libc::off_t,
                            (range.end - range.start) as libc::off_t,
                            libc::POSIX_FADV_WILLNEED,
                        );
                    }
                }
                Err(_) => {}
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Whether the page at `offset` is in memory; positioned reads cannot know, and say no.
    pub fn is_resident(&self, offset: u64) -> bool {
        #[cfg(target_os = "linux")]
        if offset < self.inner.len
            && let Ok(Some(map)) = self.map()
        {
            // SAFETY: `sysconf` reads a constant of the system.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as usize;
            let start = offset as usize / page * page;
            let mut state = 0u8;
            // SAFETY: one page inside of the mapping, which begins at a page, and one byte for its state.
            let asked = unsafe { libc::mincore(map.as_ptr().add(start).cast_mut().cast(), 1, &mut state) };
            return asked == 0 && state & 1 == 1;
        }
        let _ = offset;
        false
    }

    /// Tells the kernel that access will be scattered, so that it reads single pages instead of 128 kB around each.
    pub fn advise_random(&self) {
        self.inner.random.store(true, Ordering::Relaxed);
        if let Some(Some(map)) = self.inner.map.get() {
            advise_random(map);
        }
    }

    /// Fails if size or modification time differ from those at opening.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self.file()?.metadata().map_err(|error| Error::io("cannot stat shard", error).at(self.path()))?;
        self.check_same(&now)
    }

    fn check_same(&self, now: &Metadata) -> Result<()> {
        let inner = &*self.inner;
        if now.len() != inner.len {
            let message = format!(
                "shard changed while it was being read: it had {} bytes when opened and has {} now; restore it or start anew",
                inner.len,
                now.len()
            );
            return Err(Error::new(ErrorKind::Changed, message).at(&inner.path));
        }
        if now.modified().ok() != inner.modified {
            let message = "shard changed while it was being read: its modification time differs from that at opening; \
                           restore it or start anew";
            return Err(Error::new(ErrorKind::Changed, message).at(&inner.path));
        }
        Ok(())
    }

    /// [`SourceFile::check_unchanged`] for small windows: at most once a millisecond.
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
        if range.start > range.end || range.end > self.inner.len {
            return Err(Error::data(format!(
                "shard is truncated or damaged: bytes {}..{} are needed, the file has {}",
                range.start, range.end, self.inner.len
            ))
            .at(&self.inner.path));
        }
        Ok(())
    }

    #[cfg(unix)]
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        use std::os::unix::fs::FileExt;
        self.file()?.read_exact_at(buffer, offset).map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                let message =
                    format!("shard shrank while it was being read: it had {} bytes when opened", self.inner.len);
                Error::new(ErrorKind::Changed, message).at(&self.inner.path)
            } else {
                Error::io(format!("cannot read {} bytes at {offset}", buffer.len()), error).at(&self.inner.path)
            }
        })
    }
}

/// Opens `path` for reading, if it is a file.
fn open_regular(path: &Path) -> Result<(File, Metadata)> {
    let failed = |what: &str, error| Error::io(format!("cannot {what} shard"), error).at(path);
    let irregular = || Error::data("not a regular file: expected a Parquet or Arrow file on disk").at(path);
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // A pipe would wait for its other end; on a file the flag has no effect.
        options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    }
    let file = options.read(true).open(path).map_err(|error| match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => irregular(),
        _ => failed("open", error),
    })?;
    let metadata = file.metadata().map_err(|error| failed("stat", error))?;
    if metadata.is_file() { Ok((file, metadata)) } else { Err(irregular()) }
}

/// A clock that is cheap to read and some milliseconds coarse.
#[cfg(target_os = "linux")]
fn coarse_nanos() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `clock_gettime` writes one `timespec`, to one.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(not(target_os = "linux"))]
fn coarse_nanos() -> u64 {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    START.get_or_init(std::time::Instant::now).elapsed().as_nanos() as u64
}

fn advise_random(map: &Mmap) {
    #[cfg(unix)]
    let _ = map.advise(memmap2::Advice::Random);
    #[cfg(not(unix))]
    let _ = map;
}

/// Stretches of a file that is being opened. A few are read by position, several small ones at once; many, or long ones, are taken from the mapping.
pub(crate) struct Reads {
    file: SourceFile,
    buffer: Vec<u8>,
    start: u64,
    reads: usize,
}

/// Reads above which a mapping costs less.
const FEW_READS: usize = 32;
/// The same of bytes at once, which would take as much memory.
const LONG_READ: u64 = 256 << 10;
/// Bytes read at once: a message with its offsets, or a footer.
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

    /// The last `len` bytes, with what lies before them read at once.
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
            let map =
                if self.reads >= FEW_READS || range.end - range.start > LONG_READ { self.file.map()? } else { None };
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

/// Files that may stay open and mapped: a part of what the process may have open, as others open files too, and of what Linux lets it map.
pub fn most_files() -> usize {
    const MOST: u64 = 16 << 10;
    #[cfg(unix)]
    {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `getrlimit` writes one `rlimit`, to one.
        if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0 {
            #[allow(clippy::unnecessary_cast, clippy::cast_lossless)] // the field's type differs between targets
            return (limit.rlim_cur as u64 / 4).min(MOST) as usize;
        }
    }
    MOST as usize
}

/// Files that a process may open without a thought. With more, its table of open files has to grow, by doubling, and whoever needs it then waits 8 to
/// 16 ms if the process has threads.
pub const FEW_FILES: usize = 64;

/// Makes that table large enough for `count` more files, if they are not few.
pub fn make_room_for(count: usize) {
    #[cfg(target_os = "linux")]
    if count > FEW_FILES
        && let Ok(file) = File::open("/dev/null")
    {
        use std::os::fd::AsRawFd;
        let number = file.as_raw_fd();
        // SAFETY: a second name of an open file, of which nobody else knows, is closed again.
        unsafe {
            let last = libc::fcntl(number, libc::F_DUPFD_CLOEXEC, number.saturating_add(count as libc::c_int));
            if last >= 0 {
                libc::close(last);
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = count;
}

/// Whether a mapping is safe and fast on the file system of `file`.
#[cfg(target_os = "linux")]
fn is_local(file: &File) -> bool {
    use std::os::fd::AsRawFd;
    // Magic numbers from statfs(2) and the file systems' own sources.
    const REMOTE: [i64; 12] = [
        0x6969,      // NFS
        0x517B,      // SMB
        0xFF53_4D42, // CIFS
        0xFE53_4D42, // SMB2
        0x6573_5546, // FUSE
        0x0BD0_0BD0, // Lustre
        0x4750_4653, // GPFS
        0x00C3_6400, // Ceph
        0x0102_1997, // 9p
        0x6B41_4653, // kAFS
        0x1983_0326, // BeeGFS
        0x503D_F8E1, // WekaFS
    ];
    // SAFETY: `statfs` writes a plain C struct, for which all-zero bytes are a valid start.
    let stat = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(file.as_raw_fd(), &mut stat) == 0).then_some(stat)
    };
    #[allow(clippy::unnecessary_cast, clippy::cast_lossless)] // the field's type differs between targets
    stat.is_none_or(|stat| !REMOTE.contains(&(stat.f_type as i64)))
}

#[cfg(not(target_os = "linux"))]
fn is_local(_file: &File) -> bool {
    true
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
            let error = SourceFile::open(path, Io::Auto).unwrap_err();
            assert!(error.to_string().contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn a_file_that_was_let_go_is_read_again_unless_it_changed() {
        for io in IOS {
            let named = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(named.path(), [7; 100]).unwrap();
            let mut file = SourceFile::open(named.path(), io).unwrap();
            let mut scratch = Vec::new();
            assert_eq!(file.slice(98..100, &mut scratch).unwrap(), [7, 7]);
            file.let_go();
            assert!(file.inner.file.get().is_none() && file.inner.map.get().is_none());
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
            let mut reads = Reads::new(SourceFile::open(named.path(), io).unwrap());
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
