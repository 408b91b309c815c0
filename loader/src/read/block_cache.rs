//! The cache of decoded blocks, which all workers share and which stays within a budget of bytes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::corpus::BlockRef;
use crate::error::Result;
use crate::format::{DecodedBlock, DecodedPages};
use crate::sync::{lock, wait};

/// What decoding ahead came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prepared {
    /// A block was decoded.
    Decoded,
    /// There is no room but that of blocks which are needed before.
    Full,
    /// All is there, or about to be.
    Nothing,
}

/// Decoded blocks, within a budget of bytes.
#[derive(Debug)]
pub(crate) struct BlockCache {
    /// Bytes of the whole budget, the sessions' part included.
    total_bytes: u64,
    inner: Mutex<CacheInner>,
    loaded: Condvar,
    decoded_blocks: AtomicU64,
    decoded_bytes: AtomicU64,
    /// Pages by decoder, in the order of the fields of [`DecodedPages`].
    decoded_pages: [AtomicU64; 5],
    /// Bytes that were freed since the allocator was last told to let go of memory.
    freed_bytes: AtomicU64,
}

/// Smaller blocks are not rounded: they cost the allocator little.
const ROUNDED_FROM_BYTES: u64 = 64 << 10;

/// Freed memory that the allocator may keep.
const TRIM_AFTER_BYTES: u64 = 16 << 20;

/// One byte for so many that are decoded: dictionaries, and pages that needed a larger buffer, leave holes in each thread's part of the allocator.
const SCRAPS: u64 = 4;

/// Source, and block of it.
type BlockKey = (usize, BlockRef);

#[derive(Debug, Default)]
struct CacheInner {
    entries: HashMap<BlockKey, Entry>,
    used_bytes: u64,
    /// Bytes of the budget that sessions hold.
    reserved_bytes: u64,
    clock: u64,
    /// Batches of the pass.
    batches: u64,
    /// Batches before this one need nothing more.
    current: u64,
    /// Whether a block that a batch to come needs had to make room.
    lost: bool,
    /// Tokens read of each source.
    read: Vec<u64>,
    /// Once that many tokens of its source were read and none of them from a block, no row of the epoch needs that one any more.
    done_after: Option<u64>,
}

#[derive(Debug)]
struct Entry {
    /// None while a worker decodes it.
    block: Option<Arc<DecodedBlock>>,
    bytes: u64,
    used_at: u64,
    /// Tokens read of its source by then.
    read: u64,
    /// One past the last batch that is known to need it.
    needed_until: u64,
}

impl BlockCache {
    pub(crate) fn new(budget_bytes: u64) -> Self {
        Self {
            total_bytes: budget_bytes,
            inner: Mutex::default(),
            loaded: Condvar::new(),
            decoded_blocks: AtomicU64::new(0),
            decoded_bytes: AtomicU64::new(0),
            decoded_pages: Default::default(),
            freed_bytes: AtomicU64::new(0),
        }
    }

    /// Bytes that blocks may take.
    pub(crate) fn budget_bytes(&self) -> u64 {
        self.total_bytes - lock(&self.inner).reserved_bytes
    }

    /// Takes `bytes` from the budget, for a session's own memory, and returns the bytes that are left for blocks. Takes
    /// nothing if less than `least` would be left, and returns the bytes that other sessions hold.
    pub(crate) fn reserve(&self, bytes: u64, least: u64) -> std::result::Result<u64, u64> {
        let mut inner = lock(&self.inner);
        let reserved = inner.reserved_bytes.saturating_add(bytes);
        match self.total_bytes.checked_sub(reserved).filter(|left| *left >= least) {
            Some(left) => {
                inner.reserved_bytes = reserved;
                Ok(left)
            }
            None => Err(inner.reserved_bytes),
        }
    }

    /// Gives back what [`BlockCache::reserve`] took.
    pub(crate) fn release(&self, bytes: u64) {
        lock(&self.inner).reserved_bytes -= bytes;
    }

    /// Blocks decoded so far, and their bytes.
    pub(crate) fn decoded(&self) -> (u64, u64) {
        // Statistics: no other memory depends on them.
        (self.decoded_blocks.load(Ordering::Relaxed), self.decoded_bytes.load(Ordering::Relaxed))
    }

    /// Pages decoded so far.
    pub(crate) fn decoded_pages(&self) -> DecodedPages {
        let [plain, dictionary, delta, byte_stream_split, row_groups_by_arrow] =
            self.decoded_pages.each_ref().map(|pages| pages.load(Ordering::Relaxed));
        DecodedPages { plain, dictionary, delta, byte_stream_split, row_groups_by_arrow }
    }

    /// Bytes of the blocks held.
    pub(crate) fn used_bytes(&self) -> u64 {
        lock(&self.inner).used_bytes
    }

    /// Block `key`, if it is there, or about to be, to read `tokens` tokens of it; else the lock under which that was seen.
    fn wait_for(
        &self,
        key: BlockKey,
        tokens: u64,
    ) -> std::result::Result<Arc<DecodedBlock>, MutexGuard<'_, CacheInner>> {
        let mut inner = lock(&self.inner);
        loop {
            match inner.find(key, tokens) {
                Found::Ready(block) => return Ok(block),
                Found::Loading => inner = wait(&self.loaded, inner),
                Found::Nothing => return Err(inner),
            }
        }
    }

    /// Block `key`, if it is there, or about to be, to read `tokens` tokens of it.
    pub(super) fn held(&self, key: BlockKey, tokens: u64) -> Option<Arc<DecodedBlock>> {
        self.wait_for(key, tokens).ok()
    }

    /// Block `key` of `bytes` bytes, to read `tokens` tokens of it; decoded by `decode` if it is not there, over memory of a block that made room for it.
    pub(super) fn get(
        &self,
        key: BlockKey,
        tokens: u64,
        bytes: u64,
        decode: impl FnOnce(&mut DecodedBlock) -> Result<()>,
    ) -> Result<Arc<DecodedBlock>> {
        self.wait_for(key, tokens).or_else(|inner| self.load(inner, key, bytes, 0, decode))
    }

    /// Notes that batch `number` needs block `key` of `bytes` bytes, and decodes it if it is not there and none that is needed before would have to go.
    /// Asked in the order of batches, this drops just what is needed later than what it decodes.
    pub(super) fn prepare(
        &self,
        key: BlockKey,
        bytes: u64,
        number: u64,
        decode: impl FnOnce(&mut DecodedBlock) -> Result<()>,
    ) -> Result<Prepared> {
        let mut inner = lock(&self.inner);
        if let Some(entry) = inner.entries.get_mut(&key) {
            entry.needed_until = entry.needed_until.max(number + 1);
            return Ok(Prepared::Nothing);
        }
        // Memory that is used again may be a quarter larger.
        let budget_bytes = self.total_bytes - inner.reserved_bytes;
        let wanted = budget_bytes.min(bytes + bytes / 4);
        if inner.used_bytes + wanted > budget_bytes + inner.idle_bytes() {
            return Ok(Prepared::Full);
        }
        self.load(inner, key, bytes, number + 1, decode)?;
        Ok(Prepared::Decoded)
    }

    /// Batches before `current` are done. Returns whether a block was dropped that a later one needs, as far as that was known.
    pub(crate) fn reached(&self, current: u64) -> bool {
        let mut inner = lock(&self.inner);
        inner.current = inner.current.max(current);
        std::mem::take(&mut inner.lost)
    }

    /// A pass of `batches` batches begins: they are numbered anew, and are those that were looked at beyond the last one of the pass before.
    /// Once `done_after` tokens of its source were read and none of them from a block, no row of the epoch needs that one any more.
    pub(crate) fn begin_pass(&self, batches: u64, done_after: u64) {
        let mut inner = lock(&self.inner);
        inner.done_after = Some(done_after);
        let before = std::mem::replace(&mut inner.batches, batches);
        inner.current = 0;
        inner.entries.values_mut().for_each(|entry| entry.needed_until = entry.needed_until.saturating_sub(before));
    }

    fn load(
        &self,
        mut inner: MutexGuard<'_, CacheInner>,
        key: BlockKey,
        bytes: u64,
        needed_until: u64,
        decode: impl FnOnce(&mut DecodedBlock) -> Result<()>,
    ) -> Result<Arc<DecodedBlock>> {
        let mut dropped = Vec::new();
        // Blocks are of almost one size: rounded, the memory of any of them suits most others.
        let step = if bytes < ROUNDED_FROM_BYTES { 1 } else { bytes.next_power_of_two() / 32 };
        let budget_bytes = self.total_bytes - inner.reserved_bytes;
        let rounded = bytes.next_multiple_of(step).min(budget_bytes.max(bytes));
        let reused = inner.make_room(bytes, rounded, budget_bytes, &mut dropped);
        let bytes = reused.as_ref().map_or(rounded, |block| bytes.max(block.capacity_bytes()));
        let (used_at, read) = (inner.clock, inner.read_of(key.0));
        inner.entries.insert(key, Entry { block: None, bytes, used_at, read, needed_until });
        inner.used_bytes += bytes;
        drop(inner);
        self.free(dropped, bytes / SCRAPS);

        // Removes the entry if decoding fails or panics, so that no one waits for it for ever.
        let loading = Loading { cache: self, key };
        let mut block = reused.unwrap_or_default();
        if block.bytes.capacity() == 0 {
            // Where there is no memory for it, decoding says so.
            let _ = block.bytes.try_reserve_exact(rounded as usize);
        }
        decode(&mut block)?;
        let block = Arc::new(block);
        self.count(&block);
        std::mem::forget(loading);
        if let Some(entry) = lock(&self.inner).entries.get_mut(&key) {
            entry.block = Some(Arc::clone(&block));
        }
        self.loaded.notify_all();
        Ok(block)
    }

    /// Frees blocks whose memory suited no other one; decoding frees `scraps` bytes besides. The allocator keeps what it cannot join to more, which came to
    /// half of the budget after some gigabytes: it is told to let go of that now and then.
    fn free(&self, dropped: Vec<Arc<DecodedBlock>>, scraps: u64) {
        let bytes = dropped.iter().map(|block| block.capacity_bytes()).sum::<u64>() + scraps;
        drop(dropped);
        let freed = self.freed_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if freed >= TRIM_AFTER_BYTES {
            self.freed_bytes.store(0, Ordering::Relaxed);
            #[cfg(all(target_os = "linux", target_env = "gnu"))]
            // SAFETY: any thread may call it at any time; it returns free memory to the system.
            unsafe {
                libc::malloc_trim(0);
            }
        }
    }

    pub(super) fn count(&self, block: &DecodedBlock) {
        self.decoded_blocks.fetch_add(1, Ordering::Relaxed);
        self.decoded_bytes.fetch_add(block.bytes.len() as u64, Ordering::Relaxed);
        let DecodedPages { plain, dictionary, delta, byte_stream_split, row_groups_by_arrow } = block.pages;
        let pages = [plain, dictionary, delta, byte_stream_split, row_groups_by_arrow];
        for (counter, pages) in self.decoded_pages.iter().zip(pages) {
            if pages > 0 {
                counter.fetch_add(pages, Ordering::Relaxed);
            }
        }
    }
}

enum Found {
    Ready(Arc<DecodedBlock>),
    Loading,
    Nothing,
}

impl CacheInner {
    fn find(&mut self, key: BlockKey, tokens: u64) -> Found {
        self.clock += 1;
        if self.read.len() <= key.0 {
            self.read.resize(key.0 + 1, 0);
        }
        self.read[key.0] += tokens;
        let Some(entry) = self.entries.get_mut(&key) else { return Found::Nothing };
        (entry.used_at, entry.read) = (self.clock, self.read[key.0]);
        entry.block.as_ref().map_or(Found::Loading, |block| Found::Ready(Arc::clone(block)))
    }

    /// Tokens read of a source.
    fn read_of(&self, source: usize) -> u64 {
        self.read.get(source).copied().unwrap_or(0)
    }

    /// Bytes of the blocks that no batch is known to need.
    fn idle_bytes(&self) -> u64 {
        let idle = |entry: &&Entry| entry.block.is_some() && entry.needed_until <= self.current;
        self.entries.values().filter(idle).map(|entry| entry.bytes).sum()
    }

    /// Lets go of blocks until there is room for `bytes`, which take `fresh_bytes` of memory of their own: of those that the epoch is done with, which were
    /// used last, so that the others are there in the next epoch; then of those that were not used for longest; and last of needed ones.
    /// Returns one whose memory suits the new block: fresh memory costs a page fault for every 4 kB of it. The others go to `dropped`, to be freed
    /// outside of the lock.
    fn make_room(
        &mut self,
        bytes: u64,
        fresh_bytes: u64,
        budget_bytes: u64,
        dropped: &mut Vec<Arc<DecodedBlock>>,
    ) -> Option<DecodedBlock> {
        let mut reused: Option<DecodedBlock> = None;
        let suits = |block: &DecodedBlock| (bytes..=bytes + bytes / 4).contains(&block.capacity_bytes());
        let needed = |reused: &Option<DecodedBlock>| {
            reused.as_ref().map_or(fresh_bytes, |block| bytes.max(block.capacity_bytes()))
        };
        while self.used_bytes + needed(&reused) > budget_bytes {
            let current = self.current;
            let rank = |((source, _), entry): (&BlockKey, &Entry), block: &DecodedBlock| match entry.needed_until {
                until if until > current => (2, u64::MAX - until, entry.used_at),
                _ if self.done_after.is_some_and(|tokens| self.read_of(*source) > entry.read + tokens) => {
                    (0, u64::from(!suits(block)), u64::MAX - entry.used_at)
                }
                _ => (1, 0, entry.used_at),
            };
            let ready = self.entries.iter().filter_map(|(key, entry)| {
                let block = entry.block.as_deref()?;
                Some((rank((key, entry), block), *key))
            });
            let Some((_, key)) = ready.min_by_key(|(rank, _)| *rank) else { break };
            let Some(Entry { block: Some(block), bytes: freed, needed_until, .. }) = self.entries.remove(&key) else {
                break;
            };
            self.used_bytes -= freed;
            self.lost |= needed_until > current;
            match if reused.is_none() && suits(&block) { Arc::try_unwrap(block) } else { Err(block) } {
                Ok(block) => reused = Some(block),
                // Whoever holds it frees it.
                Err(block) => dropped.push(block),
            }
        }
        reused
    }
}

struct Loading<'a> {
    cache: &'a BlockCache,
    key: BlockKey,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut inner = lock(&self.cache.inner);
        if let Some(entry) = inner.entries.remove(&self.key) {
            inner.used_bytes -= entry.bytes;
        }
        drop(inner);
        self.cache.loaded.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn fill(block: &mut DecodedBlock, bytes: usize) {
        block.bytes.resize(bytes, 0);
    }

    #[test]
    fn stays_within_its_budget_and_drops_what_was_not_used_for_longest() {
        let cache = BlockCache::new(100);
        let get = |index: u32| {
            let mut decoded = false;
            cache
                .get((0, BlockRef { shard: 0, block: index }), 1, 40, |block| {
                    decoded = true;
                    fill(block, 40);
                    Ok(())
                })
                .unwrap();
            assert!(cache.used_bytes() <= 100);
            decoded
        };
        assert!(get(1));
        assert!(get(2));
        assert!(!get(1));
        assert!(get(3), "makes room by dropping 2");
        assert!(!get(1));
        assert!(get(2));
    }

    #[test]
    fn memory_of_a_block_that_made_room_is_used_again_unless_it_is_held() {
        let cache = BlockCache::new(100_000);
        let get = |index: u32| {
            let mut fresh = true;
            let block = cache
                .get((0, BlockRef { shard: 0, block: index }), 1, 40_000, |block| {
                    fresh = block.bytes.is_empty();
                    fill(block, 40_000);
                    Ok(())
                })
                .unwrap();
            assert!(cache.used_bytes() <= 100_000);
            (block, fresh)
        };
        let (held, _) = get(0);
        assert!(get(1).1);
        assert!(get(2).1, "makes room by dropping 0, which is held");
        drop(held);
        assert!(!get(3).1, "over the memory of 1");
        assert!(!get(4).1, "over the memory of 2");
    }

    #[test]
    fn blocks_decoded_ahead_take_the_place_of_those_that_nothing_needs() {
        let cache = BlockCache::new(300);
        cache.begin_pass(5, 1000);
        let key = |index: u32| (0, BlockRef { shard: 0, block: index });
        let prepare = |index: u32, number: u64| {
            cache
                .prepare(key(index), 80, number, |block| {
                    fill(block, 80);
                    Ok(())
                })
                .unwrap()
        };
        let is_there = |index: u32| lock(&cache.inner).entries.contains_key(&key(index));
        assert_eq!(
            [(0, 0), (1, 1), (1, 4), (2, 2), (3, 3)].map(|(index, number)| prepare(index, number)),
            [Prepared::Decoded, Prepared::Decoded, Prepared::Nothing, Prepared::Decoded, Prepared::Full]
        );
        assert!(!cache.reached(1), "nothing needed was lost");
        assert_eq!(prepare(3, 3), Prepared::Decoded, "batch 0 is done");
        assert!(!is_there(0) && is_there(1) && is_there(2));
        cache.get(key(1), 1, 80, |_| panic!("it is there")).unwrap();
        cache.get(key(4), 1, 80, |_| Ok(())).unwrap();
        assert!(!is_there(1), "of those that are needed, it would be for longest");
        assert!(cache.reached(1) && !cache.reached(1));
        cache.begin_pass(5, 1000);
        assert_eq!(prepare(5, 0), Prepared::Decoded, "nothing is needed");
        assert!(cache.prepare(key(6), 10, 1, |_| Err(Error::data("broken"))).is_err());
        assert_eq!(cache.used_bytes(), 240);
    }

    #[test]
    fn blocks_that_an_epoch_is_done_with_make_room_so_that_the_others_are_there_in_the_next() {
        let cache = BlockCache::new(300);
        let read = |source: usize, index: u32, tokens: u64| {
            let mut decoded = false;
            let decode = |block: &mut DecodedBlock| {
                decoded = true;
                fill(block, 100);
                Ok(())
            };
            cache.get((source, BlockRef { shard: 0, block: index }), tokens, 100, decode).unwrap();
            decoded
        };
        let of_six = || (0..6).filter(|index| read(0, *index, 10)).count();
        cache.begin_pass(100, 5);
        assert_eq!(of_six(), 6);
        assert_eq!(of_six(), 3, "0, 1 and the last are there; 2 takes the place of 1");
        cache.begin_pass(100, 15);
        assert!(read(1, 0, 1000), "over 0: 4 and 5 may be needed");
        assert!(read(1, 1, 1), "over 4, not used for longest: what is read of another source does not count");
        assert!(!read(0, 5, 10));
    }

    #[test]
    fn a_block_wanted_by_many_is_decoded_once_and_a_failure_is_not_kept() {
        let cache = BlockCache::new(1000);
        let key = (0, BlockRef { shard: 1, block: 7 });
        assert!(cache.get(key, 1, 10, |_| Err(Error::data("broken"))).is_err());
        assert_eq!(cache.used_bytes(), 0);
        let decoded = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    cache
                        .get(key, 1, 10, |block| {
                            decoded.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(std::time::Duration::from_millis(20));
                            fill(block, 10);
                            Ok(())
                        })
                        .unwrap();
                });
            }
        });
        assert_eq!(decoded.into_inner(), 1);
    }
}
