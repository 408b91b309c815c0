//! The local disk, and mounted network file systems. This is the only module that maps files.

use std::fs::{File, Metadata, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, BufWriter, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::{Item, ItemKind, Object, Stamp, Stat, Storage};

/// The files that the system calls of this machine reach.
#[derive(Clone, Copy, Debug)]
pub struct Local;

impl Storage for Local {
    fn stat(&self, location: &Path) -> io::Result<Stat> {
        std::fs::metadata(location).map(|metadata| stat_of(&metadata))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Item>> {
        let item = |entry: io::Result<std::fs::DirEntry>| {
            let entry = entry?;
            let (location, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let own = entry.file_type()?;
            // The kind of a link needs a call of its own. The listing tells all other kinds.
            let kind = match own.is_symlink() {
                true => std::fs::metadata(&location).map_or(ItemKind::File, |metadata| kind_of(metadata.file_type())),
                false => kind_of(own),
            };
            Ok(Item { name, location, kind, is_link: own.is_symlink() })
        };
        std::fs::read_dir(folder)?.map(item).collect()
    }

    fn open(&self, location: &Path) -> io::Result<Box<dyn Object>> {
        let mut options = OpenOptions::new();
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            // Opening a pipe would wait for its other end. On a file the flag has no effect.
            options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        }
        Ok(Box::new(LocalFile(options.read(true).open(location)?)))
    }

    fn replace(&self, location: &Path, bytes: &[u8]) -> io::Result<()> {
        let folder = location.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        Draft::create(location)?.publish(bytes, location)?;
        // Without this, a crash may lose the new name, and the old file is back.
        if let Ok(folder) = File::open(folder) {
            let _ = folder.sync_all();
        }
        Ok(())
    }

    fn canonical(&self, folder: &Path) -> io::Result<PathBuf> {
        folder.canonicalize()
    }

    fn absolute(&self, location: &Path) -> PathBuf {
        std::path::absolute(location).unwrap_or_else(|_| location.to_owned())
    }
}

fn kind_of(kind: std::fs::FileType) -> ItemKind {
    match (kind.is_file(), kind.is_dir()) {
        (true, _) => ItemKind::File,
        (_, true) => ItemKind::Folder,
        _ => ItemKind::Other,
    }
}

fn stat_of(metadata: &Metadata) -> Stat {
    let stamp = Stamp { size_bytes: metadata.len(), modified: metadata.modified().ok(), version: 0 };
    Stat { kind: kind_of(metadata.file_type()), stamp }
}

/// An open file on disk.
#[derive(Debug)]
struct LocalFile(File);

impl Object for LocalFile {
    fn stat(&self) -> io::Result<Stat> {
        self.0.metadata().map(|metadata| stat_of(&metadata))
    }

    #[cfg(unix)]
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(&self.0, buffer, offset)
    }

    fn is_best_mapped(&self) -> bool {
        is_local(&self.0)
    }

    fn map(&self, len: u64) -> io::Result<Option<Mapping>> {
        map(&self.0, len).map(Some)
    }

    fn will_need(&self, range: Range<u64>) {
        #[cfg(target_os = "linux")]
        {
            use std::os::fd::AsRawFd;
            // SAFETY: the call is a hint on an open descriptor and touches no memory of ours.
            unsafe {
                libc::posix_fadvise(
                    self.0.as_raw_fd(),
                    range.start as libc::off_t,
                    (range.end - range.start) as libc::off_t,
                    libc::POSIX_FADV_WILLNEED,
                );
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }
}

/// Maps the first `len` bytes of `file`.
pub(super) fn map(file: &File, len: u64) -> io::Result<Mapping> {
    #[allow(clippy::disallowed_methods)] // this is the one place
    // SAFETY: the mapping is read-only and shared. Its bytes are only ever interpreted as integers,
    // for which any value is valid. `SourceFile::check_unchanged` finds a file that another process
    // truncated. The process dies by SIGBUS if it reads a missing page before that check.
    // `Io::Pread` rules this out.
    let map = unsafe { memmap2::MmapOptions::new().len(len as usize).map(file) }?;
    Ok(Mapping(map))
}

/// Locks `file` together with other holders. Waits for a holder that has it alone. The kernel
/// releases the lock when the file is closed, also if the process is killed.
#[cfg(feature = "remote")]
pub(super) fn lock_shared(file: &File) -> io::Result<()> {
    flock(file, libc::LOCK_SH)
}

/// Locks `file` alone. Waits for all other holders.
#[cfg(feature = "remote")]
pub(super) fn lock_alone(file: &File) -> io::Result<()> {
    flock(file, libc::LOCK_EX)
}

/// Locks `file` alone. Returns false if it has another holder.
#[cfg(feature = "remote")]
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    match flock(file, libc::LOCK_EX | libc::LOCK_NB) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        done => done.map(|()| true),
    }
}

#[cfg(feature = "remote")]
fn flock(file: &File, operation: libc::c_int) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    loop {
        // SAFETY: the call takes an open descriptor and touches no memory of ours.
        if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Locks the bytes `range` of `file` for this opening of the file. Returns false if another opening
/// has locked some of them.
#[cfg(feature = "remote")]
pub(super) fn try_lock_range(file: &File, range: Range<u64>) -> io::Result<bool> {
    match set_range(file, range, libc::F_WRLCK as libc::c_int) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        done => done.map(|()| true),
    }
}

/// Releases the bytes `range` of `file`.
#[cfg(feature = "remote")]
pub(super) fn unlock_range(file: &File, range: Range<u64>) -> io::Result<()> {
    set_range(file, range, libc::F_UNLCK as libc::c_int)
}

#[cfg(feature = "remote")]
fn set_range(file: &File, range: Range<u64>, kind: libc::c_int) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: all fields of the C struct are integers, for which zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    #[allow(clippy::unnecessary_cast)] // the types differ between targets
    let kind = kind as libc::c_short;
    lock.l_type = kind;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = range.start as _;
    lock.l_len = (range.end - range.start) as _;
    // SAFETY: the call takes an open descriptor and reads one `flock`, which lives long enough.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// The mapped bytes of a file. The kernel loads them when they are read.
#[derive(Debug)]
pub struct Mapping(Mmap);

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Mapping {
    /// Tells the kernel that access will be scattered. The kernel then reads single pages instead
    /// of 128 kB around each page.
    pub(super) fn advise_random(&self) {
        #[cfg(unix)]
        let _ = self.0.advise(memmap2::Advice::Random);
    }

    /// Asks the kernel to read the pages of `range` ahead. `range` must lie inside the mapping.
    pub(super) fn will_need(&self, range: Range<u64>) {
        #[cfg(target_os = "linux")]
        let _ =
            self.0.advise_range(memmap2::Advice::WillNeed, range.start as usize, (range.end - range.start) as usize);
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Tells whether the page at `offset` is in memory. `offset` must lie inside the mapping.
    pub(super) fn is_resident(&self, offset: u64) -> bool {
        #[cfg(target_os = "linux")]
        {
            // SAFETY: `sysconf` reads a constant of the system.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as usize;
            let start = offset as usize / page * page;
            let mut state = 0u8;
            // SAFETY: the range is one page inside the mapping, which begins at a page. The state
            // has room for one byte.
            let asked = unsafe { libc::mincore(self.0.as_ptr().add(start).cast_mut().cast(), 1, &mut state) };
            asked == 0 && state & 1 == 1
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = offset;
            false
        }
    }
}

/// A file of this writer alone. Dropping it removes the file unless the file got its final name.
struct Draft {
    path: PathBuf,
    file: Option<File>,
}

impl Draft {
    fn create(target: &Path) -> io::Result<Self> {
        loop {
            // Machines that share a folder can have equal process ids. Random numbers differ.
            let unique = std::hash::RandomState::new().build_hasher().finish();
            let path = target.with_extension(format!("{unique:016x}.tmp"));
            match File::options().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Self { path, file: Some(file) }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn publish(mut self, bytes: &[u8], target: &Path) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut writer = BufWriter::new(&mut *file);
        writer.write_all(bytes)?;
        writer.flush()?;
        drop(writer);
        file.sync_all()?;
        std::fs::rename(&self.path, target)?;
        self.file = None;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // If removing fails, the draft stays, but no reader ever reads it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The number of files that may stay open and mapped. It is a part of what Linux lets the process
/// open and map, because other code opens files too.
pub fn most_files() -> usize {
    const MOST: u64 = 16 << 10;
    #[cfg(unix)]
    {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `getrlimit` writes to one `rlimit`, which lives long enough.
        if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0 {
            #[allow(clippy::unnecessary_cast, clippy::cast_lossless)] // the field's type differs between targets
            return (limit.rlim_cur as u64 / 4).min(MOST) as usize;
        }
    }
    MOST as usize
}

/// The number of files that a process opens at no extra cost. With more files, the kernel has to
/// double the process's table of open files. The thread that needs it then waits 8 to 16 ms if the
/// process has several threads.
pub const FEW_FILES: usize = 64;

/// Makes that table large enough for `count` more files, if `count` is above [`FEW_FILES`].
pub fn make_room_for(count: usize) {
    #[cfg(target_os = "linux")]
    if count > FEW_FILES
        && let Ok(file) = File::open("/dev/null")
    {
        use std::os::fd::AsRawFd;
        let number = file.as_raw_fd();
        // SAFETY: this duplicates a descriptor and closes the duplicate, which no other code knows.
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

/// Tells whether a mapping is safe and fast on the file system of `file`.
#[cfg(target_os = "linux")]
pub(super) fn is_local(file: &File) -> bool {
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
pub(super) fn is_local(_file: &File) -> bool {
    true
}
