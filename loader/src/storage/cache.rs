//! Keeps what was read from object stores in a folder that the processes of a node share.
//!
//! Each version of an object has two files. The file of bytes is as long as the object, and has
//! holes where nothing was read yet. The file of checksums has one number for each block of 64 KiB,
//! or 0 if the block is not there. So a cached object can be mapped and read like a local file.
//!
//! A writer writes the bytes of a block before its checksum. A process compares a block with its
//! checksum before it first uses it. So a process that was killed at any moment, or a disk that
//! lost power, leaves blocks that are right or missing.
//!
//! A process that fetches blocks locks their checksums, and the others wait for it. The kernel
//! releases the lock of a process that dies. A process that uses an object holds another lock on
//! its file of checksums. Objects that no process holds may be removed to make room.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime};

use xxhash_rust::xxh3::xxh3_64;

use super::PART_BYTES;
use super::local::{self, Mapping};
use crate::sync::{Bits, lock, wait};

/// Bytes of a block. A checksum covers a block.
pub(super) const BLOCK: u64 = 64 << 10;
/// Blocks that are fetched at once.
const PART: u64 = PART_BYTES / BLOCK;
/// First bytes of a file of checksums: a name with a version, then the size of the object.
const MAGIC: &[u8; 8] = b"forebay1";
const HEADER: u64 = 16;
/// Name of the folder of objects in the folder that the user names.
const FOLDER: &str = "objects";
/// Suffixes of the two files of an object.
const BYTES: &str = "bytes";
const SUMS: &str = "sums";
/// Bytes that a process writes before it compares the size of the folder with the limit again.
const STEP: u64 = 64 << 20;
/// Longest time that a process waits for blocks which another process fetches.
const PATIENCE: Duration = Duration::from_secs(30);

/// A folder of cached objects.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    limit: u64,
    /// Longest time to wait for blocks that another process fetches.
    patience: Duration,
    /// Bytes written since the size of the folder was compared with the limit. Any thread adds to
    /// it.
    written: AtomicU64,
    /// Whether no room is left. Any thread may set and clear it.
    is_full: AtomicBool,
    /// The last reason why bytes could not be kept, once for the log.
    trouble: Mutex<Option<String>>,
    was_told: AtomicBool,
}

impl Cache {
    pub(super) fn new(folder: &Path, limit: u64) -> Self {
        Self {
            folder: folder.join(FOLDER),
            limit,
            patience: PATIENCE,
            // The first write compares the size of the folder.
            written: AtomicU64::new(STEP),
            is_full: AtomicBool::new(false),
            trouble: Mutex::new(None),
            was_told: AtomicBool::new(false),
        }
    }

    /// A line for the user, the first time that bytes could not be kept.
    pub(super) fn warning(&self) -> Option<String> {
        let why = lock(&self.trouble).take()?;
        if self.was_told.swap(true, Ordering::Relaxed) {
            return None;
        }
        let folder = self.folder.display();
        Some(format!("`cache_dir` keeps no more objects, which are read again each time: {why} (`{folder}`)"))
    }

    fn give_up(&self, why: String) {
        self.is_full.store(true, Ordering::Relaxed);
        *lock(&self.trouble) = Some(why);
    }

    /// Opens the cached object `key`, which has `size` bytes. Returns `None` if the folder cannot
    /// hold it.
    pub(super) fn open(self: &Arc<Self>, key: u128, size: u64) -> Option<CachedObject> {
        match CachedObject::open(self, key, size) {
            Ok(object) => Some(object),
            Err(error) => {
                self.give_up(error.to_string());
                None
            }
        }
    }

    /// Makes room for `bytes` more bytes. Returns false if there is none.
    fn make_room(&self, bytes: u64) -> bool {
        if self.written.fetch_add(bytes, Ordering::Relaxed) + bytes < STEP.min(self.limit / 16) {
            return !self.is_full.load(Ordering::Relaxed);
        }
        self.written.store(0, Ordering::Relaxed);
        let room = match self.evict(bytes) {
            Ok(used) if used + bytes <= self.limit => true,
            Ok(used) => {
                let limit = self.limit;
                self.give_up(format!("{used} bytes are in use, and `cache_bytes` is {limit}"));
                false
            }
            Err(error) => {
                self.give_up(error.to_string());
                false
            }
        };
        if room {
            self.is_full.store(false, Ordering::Relaxed);
        }
        room
    }

    /// Removes objects that no process holds until `bytes` more bytes fit, least recently opened
    /// first. Returns the bytes that are left.
    fn evict(&self, bytes: u64) -> io::Result<u64> {
        let mut objects = Vec::new();
        let mut used = 0;
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let is_sums = path.extension().is_some_and(|suffix| suffix == SUMS);
            let Some(opened) = std::fs::metadata(&path).ok().filter(|_| is_sums) else { continue };
            let held = std::fs::metadata(path.with_extension(BYTES)).map_or(0, |bytes| bytes.blocks() * 512);
            used += held;
            objects.push((opened.modified().unwrap_or(SystemTime::UNIX_EPOCH), held, path));
        }
        objects.sort();
        for (_, held, path) in objects {
            if used + bytes <= self.limit {
                break;
            }
            let Ok(sums) = File::open(&path) else { continue };
            if !local::try_lock(&sums)? {
                continue;
            }
            // The bytes go first, so that no file of bytes is left without its checksums.
            let removed = std::fs::remove_file(path.with_extension(BYTES)).and_then(|()| std::fs::remove_file(&path));
            if removed.is_ok() {
                used -= held;
            }
        }
        Ok(used)
    }
}

/// A cached object. It is not removed while a process has it open.
#[derive(Debug)]
pub(super) struct CachedObject {
    cache: Arc<Cache>,
    bytes: File,
    sums: File,
    size: u64,
    /// A bit for each block that is there and was compared with its checksum. Any thread sets bits,
    /// after the block was written. A reader that sees the bit sees the bytes, because files and
    /// mappings share the kernel's memory.
    checked: Bits,
    /// The blocks that threads of this process fetch or compare.
    busy: Mutex<Vec<Range<u64>>>,
    freed: Condvar,
    /// Whether another process let a thread wait too long. Threads then fetch without the cache,
    /// and no longer wait. Any thread sets it, and clears it once it gets a lock.
    is_overdue: AtomicBool,
}

impl CachedObject {
    fn open(cache: &Arc<Cache>, key: u128, size: u64) -> io::Result<Self> {
        std::fs::create_dir_all(&cache.folder)?;
        let path = cache.folder.join(format!("{key:032x}.{SUMS}"));
        let open = |path: &Path| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        loop {
            let sums = open(&path)?;
            local::lock_shared(&sums)?;
            // Another process may have removed the file before it was locked.
            if sums.metadata()?.nlink() == 0 {
                continue;
            }
            let blocks = size.div_ceil(BLOCK);
            let bytes = open(&path.with_extension(BYTES))?;
            if !Self::is_whole(&sums, &bytes, size)? {
                // Only a process that holds the file alone may make it anew.
                drop(sums);
                let sums = open(&path)?;
                // A process may still hold a file that was damaged meanwhile.
                let deadline = Instant::now() + PATIENCE;
                while !local::try_lock(&sums)? {
                    if Instant::now() > deadline {
                        return Err(io::Error::other("a damaged object stays in use"));
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                let is_there = sums.metadata()?.nlink() > 0;
                if is_there && !Self::is_whole(&sums, &bytes, size)? {
                    bytes.set_len(0)?;
                    bytes.set_len(size)?;
                    sums.set_len(0)?;
                    sums.set_len(HEADER + blocks * 8)?;
                    // The file counts once its first bytes are there.
                    sums.write_all_at(&size.to_le_bytes(), 8)?;
                    sums.write_all_at(MAGIC, 0)?;
                }
                continue;
            }
            // The order of removal follows the times of opening.
            let _ = sums.set_modified(SystemTime::now());
            let checked = Bits::new(blocks);
            let (busy, freed) = (Mutex::default(), Condvar::new());
            let is_overdue = AtomicBool::new(false);
            return Ok(Self { cache: Arc::clone(cache), bytes, sums, size, checked, busy, freed, is_overdue });
        }
    }

    fn is_whole(sums: &File, bytes: &File, size: u64) -> io::Result<bool> {
        let mut header = [0; HEADER as usize];
        if sums.metadata()?.len() != HEADER + size.div_ceil(BLOCK) * 8 || bytes.metadata()?.len() != size {
            return Ok(false);
        }
        sums.read_exact_at(&mut header, 0)?;
        Ok(header[..8] == *MAGIC && header[8..] == size.to_le_bytes())
    }

    fn blocks_of(&self, range: &Range<u64>) -> Range<u64> {
        range.start / BLOCK..range.end.div_ceil(BLOCK)
    }

    /// Tells whether the bytes of `range` can be read from the file.
    pub(super) fn has(&self, range: &Range<u64>) -> bool {
        self.blocks_of(range).all(|block| self.checked.get(block))
    }

    /// Makes the bytes of `range` readable from the file. `fetch` gets missing bytes. If `whole`,
    /// the parts around the range are fetched too. Returns false if there is no room.
    pub(super) fn need(
        &self,
        range: &Range<u64>,
        whole: bool,
        fetch: &dyn Fn(Range<u64>) -> io::Result<bytes::Bytes>,
    ) -> io::Result<bool> {
        if range.is_empty() || self.has(range) {
            return Ok(true);
        }
        let mut wanted = self.blocks_of(range);
        if whole {
            let end = wanted.end.div_ceil(PART) * PART;
            wanted = wanted.start / PART * PART..end.min(self.size.div_ceil(BLOCK));
        }
        let mut at = wanted.start;
        while at < wanted.end {
            let part = at..wanted.end.min((at / PART + 1) * PART);
            at = part.end;
            let is_needed = part.clone().any(|block| !self.checked.get(block));
            if is_needed && !self.need_part(part, fetch)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn need_part(&self, part: Range<u64>, fetch: &dyn Fn(Range<u64>) -> io::Result<bytes::Bytes>) -> io::Result<bool> {
        let _claim = Claim::new(self, part.clone());
        let deadline = Instant::now() + self.cache.patience;
        let mut pause = Duration::from_millis(1);
        loop {
            let missing = self.missing(&part)?;
            let Some(first) = missing.first().cloned() else { return Ok(true) };
            let place = HEADER + first.start * 8..HEADER + first.end * 8;
            if local::try_lock_range(&self.sums, place.clone())? {
                self.is_overdue.store(false, Ordering::Relaxed);
                let done = self.fill(first, fetch);
                local::unlock_range(&self.sums, place)?;
                if !done? {
                    return Ok(false);
                }
                continue;
            }
            // Another process fetches these blocks.
            if self.is_overdue.load(Ordering::Relaxed) || Instant::now() > deadline {
                self.is_overdue.store(true, Ordering::Relaxed);
                return Ok(false);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// The runs of `part` without blocks that are there and right.
    fn missing(&self, part: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut sums = vec![0; (part.end - part.start) as usize * 8];
        self.sums.read_exact_at(&mut sums, HEADER + part.start * 8)?;
        let mut missing: Vec<Range<u64>> = Vec::new();
        let mut buffer = Vec::new();
        for (block, sum) in part.clone().zip(sums.as_chunks::<8>().0) {
            if self.checked.get(block) {
                continue;
            }
            if *sum != [0; 8] {
                let start = block * BLOCK;
                buffer.resize((self.size.min(start + BLOCK) - start) as usize, 0);
                self.bytes.read_exact_at(&mut buffer, start)?;
                if checksum(&buffer).to_le_bytes() == *sum {
                    self.checked.set(block);
                    continue;
                }
            }
            match missing.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                _ => missing.push(block..block + 1),
            }
        }
        Ok(missing)
    }

    /// Fetches `blocks`, unless another process has fetched some of them. This process has locked
    /// them.
    fn fill(&self, blocks: Range<u64>, fetch: &dyn Fn(Range<u64>) -> io::Result<bytes::Bytes>) -> io::Result<bool> {
        let missing = self.missing(&blocks)?;
        for run in missing {
            let range = run.start * BLOCK..self.size.min(run.end * BLOCK);
            if !self.cache.make_room(range.end - range.start) {
                return Ok(false);
            }
            let bytes = fetch(range.clone())?;
            if bytes.len() as u64 != range.end - range.start {
                return Err(io::Error::other("the storage gave another number of bytes than it was asked for"));
            }
            let sums: Vec<u8> = bytes.chunks(BLOCK as usize).flat_map(|block| checksum(block).to_le_bytes()).collect();
            let written = self
                .bytes
                .write_all_at(&bytes, range.start)
                .and_then(|()| self.sums.write_all_at(&sums, HEADER + run.start * 8));
            if let Err(error) = written {
                self.cache.give_up(error.to_string());
                return Ok(false);
            }
            run.for_each(|block| self.checked.set(block));
        }
        Ok(true)
    }

    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.read_exact_at(buffer, offset)
    }

    pub(super) fn is_best_mapped(&self) -> bool {
        local::is_local(&self.bytes)
    }

    pub(super) fn map(&self) -> io::Result<Mapping> {
        local::map(&self.bytes, self.size)
    }
}

/// The checksum of a block. It is never 0, which stands for a missing block.
fn checksum(block: &[u8]) -> u64 {
    xxh3_64(block).max(1)
}

/// Reserves blocks for a thread of this process. Other threads wait for them.
struct Claim<'a> {
    object: &'a CachedObject,
    blocks: Range<u64>,
}

impl<'a> Claim<'a> {
    fn new(object: &'a CachedObject, blocks: Range<u64>) -> Self {
        let mut busy = lock(&object.busy);
        while busy.iter().any(|other| other.start < blocks.end && blocks.start < other.end) {
            busy = wait(&object.freed, busy);
        }
        busy.push(blocks.clone());
        Self { object, blocks }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut busy = lock(&self.object.busy);
        busy.retain(|blocks| *blocks != self.blocks);
        drop(busy);
        self.object.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use bytes::Bytes;

    use super::*;

    const SIZE: u64 = 3 * PART * BLOCK / 2 + 77;

    fn content() -> Vec<u8> {
        (0..SIZE).map(|at| ((at * 31) >> 5) as u8).collect()
    }

    fn cached(folder: &Path, limit: u64, key: u128) -> CachedObject {
        CachedObject::open(&Arc::new(Cache::new(folder, limit)), key, SIZE).unwrap()
    }

    fn check(object: &CachedObject, range: Range<u64>, whole: &[u8]) {
        let mut buffer = vec![0; (range.end - range.start) as usize];
        object.read_at(&mut buffer, range.start).unwrap();
        assert_eq!(buffer, whole[range.start as usize..range.end as usize]);
        assert_eq!(object.map().unwrap()[range.start as usize..range.end as usize], buffer);
    }

    #[test]
    fn each_part_is_fetched_once_by_any_number_of_users() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, fetched) = (content(), AtomicUsize::new(0));
        let objects: Vec<_> = (0..4).map(|_| cached(folder.path(), u64::MAX, 1)).collect();
        let fetch = |range: Range<u64>| {
            fetched.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(5));
            Ok(Bytes::copy_from_slice(&whole[range.start as usize..range.end as usize]))
        };
        std::thread::scope(|scope| {
            for object in objects.iter().chain(&objects) {
                scope.spawn(|| {
                    for range in [5..70_000, SIZE - 9..SIZE, 0..SIZE] {
                        assert!(object.need(&range, true, &fetch).unwrap());
                        check(object, range, &whole);
                    }
                });
            }
        });
        assert_eq!(fetched.into_inner(), 2);
    }

    #[test]
    fn a_small_read_fetches_its_blocks_alone() {
        let folder = tempfile::tempdir().unwrap();
        let whole = content();
        let asked = Mutex::new(Vec::new());
        let object = cached(folder.path(), u64::MAX, 1);
        let fetch = |range: Range<u64>| {
            lock(&asked).push(range.clone());
            Ok(Bytes::copy_from_slice(&whole[range.start as usize..range.end as usize]))
        };
        assert!(object.need(&(SIZE - 8..SIZE), false, &fetch).unwrap());
        assert!(object.need(&(BLOCK + 1..BLOCK + 2), false, &fetch).unwrap());
        assert!(object.need(&(0..SIZE), true, &fetch).unwrap());
        check(&object, 0..SIZE, &whole);
        let tail = SIZE / BLOCK * BLOCK;
        let ranges = [tail..SIZE, BLOCK..2 * BLOCK, 0..BLOCK, 2 * BLOCK..PART * BLOCK, PART * BLOCK..tail];
        assert_eq!(*lock(&asked), ranges);
    }

    #[test]
    fn damaged_files_are_fetched_again() {
        let folder = tempfile::tempdir().unwrap();
        let whole = content();
        let fetch = |range: Range<u64>| Ok(Bytes::copy_from_slice(&whole[range.start as usize..range.end as usize]));
        assert!(cached(folder.path(), u64::MAX, 1).need(&(0..SIZE), true, &fetch).unwrap());
        let files: Vec<_> =
            std::fs::read_dir(folder.path().join(FOLDER)).unwrap().map(|file| file.unwrap().path()).collect();
        for file in files {
            let sound = std::fs::read(&file).unwrap();
            for place in [0, 8, 20, sound.len() / 2, sound.len() - 1] {
                let mut bytes = sound.clone();
                bytes[place] ^= 4;
                for damaged in [&bytes[..], &sound[..place], &[]] {
                    std::fs::write(&file, damaged).unwrap();
                    let object = cached(folder.path(), u64::MAX, 1);
                    assert!(object.need(&(0..SIZE), true, &fetch).unwrap());
                    check(&object, 0..SIZE, &whole);
                }
            }
        }
    }

    #[test]
    fn a_failed_fetch_leaves_nothing_and_is_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let whole = content();
        let object = cached(folder.path(), u64::MAX, 1);
        let fail = |_: Range<u64>| Err(io::Error::other("no network"));
        assert!(object.need(&(0..9), true, &fail).is_err());
        assert!(!object.has(&(0..9)));
        let fetch = |range: Range<u64>| Ok(Bytes::copy_from_slice(&whole[range.start as usize..range.end as usize]));
        assert!(object.need(&(0..9), true, &fetch).unwrap());
        check(&object, 0..9, &whole);
    }

    #[test]
    fn a_process_that_never_ends_its_fetch_is_waited_for_once() {
        let folder = tempfile::tempdir().unwrap();
        let whole = content();
        let fetch = |range: Range<u64>| Ok(Bytes::copy_from_slice(&whole[range.start as usize..range.end as usize]));
        let patience = Duration::from_millis(300);
        let cache = Arc::new(Cache { patience, ..Cache::new(folder.path(), u64::MAX) });
        let (object, other) = (CachedObject::open(&cache, 1, SIZE).unwrap(), cached(folder.path(), u64::MAX, 1));
        let first = HEADER..HEADER + PART * 8;
        assert!(local::try_lock_range(&other.sums, first.clone()).unwrap());
        let mut waits = [patience; 3].map(|_| {
            let began = Instant::now();
            assert!(!object.need(&(0..9), true, &fetch).unwrap());
            began.elapsed()
        });
        assert!(waits[0] >= patience, "{waits:?}");
        waits[1..].sort();
        assert!(waits[2] < patience, "{waits:?}");
        local::unlock_range(&other.sums, first).unwrap();
        assert!(object.need(&(0..9), true, &fetch).unwrap());
        check(&object, 0..9, &whole);
    }

    #[test]
    fn objects_that_are_held_stay_and_others_make_room() {
        let folder = tempfile::tempdir().unwrap();
        let whole = content();
        let fetch = |range: Range<u64>| Ok(Bytes::copy_from_slice(&whole[range.start as usize..range.end as usize]));
        let limit = 2 * SIZE + SIZE / 2;
        let held = cached(folder.path(), limit, 1);
        assert!(held.need(&(0..SIZE), true, &fetch).unwrap());
        for key in 2..6 {
            let object = cached(folder.path(), limit, key);
            assert!(object.need(&(0..SIZE), true, &fetch).unwrap(), "{key}");
            check(&object, 0..SIZE, &whole);
            check(&held, 0..SIZE, &whole);
        }
        let names = || std::fs::read_dir(folder.path().join(FOLDER)).unwrap().count();
        assert!(names() <= 6, "{}", names());
        // Nothing can be removed while all are held.
        let more: Vec<_> = (10..13).map(|key| cached(folder.path(), limit, key)).collect();
        let kept: Vec<_> = more.iter().map(|object| object.need(&(0..SIZE), true, &fetch).unwrap()).collect();
        assert!(kept.contains(&false), "{kept:?}");
        check(&held, 0..SIZE, &whole);
    }
}
