//! The cache of decoded blocks. All workers of all sessions share it, and it stays within a budget.
//!
//! When several workers need the same block, one decodes it and the others wait. Sessions note
//! which blocks their coming batches need. They may decode these blocks ahead while idle blocks can
//! make room: blocks that no session needs. [`EvictionPolicy`] decides which block is evicted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::eviction::{EvictionPolicy, SessionId, Slot};
use crate::corpus::BlockRef;
use crate::error::Result;
use crate::format::{DecodedBlock, DecodedPages};
use crate::sync::{lock, wait};

/// The outcome of decoding ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prepared {
    /// A block was decoded.
    Decoded,
    /// All room is taken by blocks that are needed earlier.
    Full,
    /// Every block is decoded, or is being decoded.
    Nothing,
}

/// The session that needs a block, and the global position of the batch that reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NeededBy {
    pub(crate) session: SessionId,
    pub(crate) position: u64,
}

/// Decoded blocks, within a budget of bytes.
#[derive(Debug)]
pub(crate) struct BlockCache {
    /// The whole budget in bytes, including the sessions' part.
    total_bytes: u64,
    inner: Mutex<CacheInner>,
    loaded: Condvar,
    decoded_blocks: AtomicU64,
    decoded_bytes: AtomicU64,
    /// Numbers of pages by decoder, in the order of the fields of [`DecodedPages`].
    decoded_pages: [AtomicU64; 5],
    /// Bytes freed since the allocator last returned memory to the system.
    freed_bytes: AtomicU64,
}

/// Smaller blocks are not rounded, because they cost the allocator little.
const ROUNDED_FROM_BYTES: u64 = 64 << 10;

/// Bytes of freed memory that the allocator may keep.
const TRIM_AFTER_BYTES: u64 = 16 << 20;

/// Decoding frees about one byte for every four bytes that it decodes. Dictionaries, and pages that
/// needed a larger buffer, leave holes in each thread's part of the allocator.
const SCRAPS: u64 = 4;

/// A column of a source, and a block of the column.
///
/// Column numbers run over the columns of all sources. The policy treats each column as a source of
/// its own, because its blocks are read in step with its own values.
type BlockKey = (usize, BlockRef);

#[derive(Debug)]
struct CacheInner {
    policy: EvictionPolicy<BlockKey>,
    /// The blocks by their slots. `None` while a worker decodes the block.
    blocks: Vec<Option<Arc<DecodedBlock>>>,
    /// Bytes of the budget that sessions hold.
    reserved_bytes: u64,
    /// Reads that found their block, decoded or being decoded.
    found: u64,
}

impl BlockCache {
    pub(crate) fn new(budget_bytes: u64) -> Self {
        Self {
            total_bytes: budget_bytes,
            inner: Mutex::new(CacheInner {
                policy: EvictionPolicy::new(),
                blocks: Vec::new(),
                reserved_bytes: 0,
                found: 0,
            }),
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

    /// Adds a session and takes `bytes` of the budget for its own memory. Returns the bytes that
    /// are left for blocks.
    ///
    /// The needs of the session may lag `window` positions behind the first session. If fewer than
    /// `least` bytes would be left, adds nothing and returns the bytes that other sessions hold as
    /// an error.
    pub(crate) fn join(&self, bytes: u64, least: u64, window: u64) -> std::result::Result<(SessionId, u64), u64> {
        let mut inner = lock(&self.inner);
        let reserved = inner.reserved_bytes.saturating_add(bytes);
        match self.total_bytes.checked_sub(reserved).filter(|left| *left >= least) {
            Some(left) => {
                inner.reserved_bytes = reserved;
                Ok((inner.policy.join(window), left))
            }
            None => Err(inner.reserved_bytes),
        }
    }

    /// Ends a session that took `bytes` of the budget.
    pub(crate) fn leave(&self, session: SessionId, bytes: u64) {
        let mut inner = lock(&self.inner);
        inner.policy.leave(session);
        inner.reserved_bytes -= bytes;
    }

    /// The number of blocks decoded so far, and their bytes.
    pub(crate) fn decoded(&self) -> (u64, u64) {
        // The counters are statistics: no other memory depends on them.
        (self.decoded_blocks.load(Ordering::Relaxed), self.decoded_bytes.load(Ordering::Relaxed))
    }

    /// The number of reads that needed no decoding of their own.
    pub(crate) fn found_blocks(&self) -> u64 {
        lock(&self.inner).found
    }

    /// The numbers of pages decoded so far.
    pub(crate) fn decoded_pages(&self) -> DecodedPages {
        let [plain, dictionary, delta, byte_stream_split, row_groups_by_arrow] =
            self.decoded_pages.each_ref().map(|pages| pages.load(Ordering::Relaxed));
        DecodedPages { plain, dictionary, delta, byte_stream_split, row_groups_by_arrow }
    }

    /// Bytes of the blocks in the cache.
    pub(crate) fn used_bytes(&self) -> u64 {
        lock(&self.inner).policy.used_bytes()
    }

    /// Returns block `key`, to read `tokens` tokens of it, and waits for it if it is being decoded.
    /// If the block is missing, returns the lock under which it was missing.
    fn wait_for(
        &self,
        key: BlockKey,
        tokens: u64,
    ) -> std::result::Result<Arc<DecodedBlock>, MutexGuard<'_, CacheInner>> {
        let mut inner = lock(&self.inner);
        let mut found = inner.policy.read(key, key.0, tokens);
        loop {
            let Some(slot) = found else { return Err(inner) };
            if let Some(block) = &inner.blocks[slot as usize] {
                let block = Arc::clone(block);
                inner.found += 1;
                return Ok(block);
            }
            inner = wait(&self.loaded, inner);
            found = inner.policy.find(key);
        }
    }

    /// Returns block `key`, to read `tokens` tokens of it, and waits for it if it is being decoded.
    pub(super) fn held(&self, key: BlockKey, tokens: u64) -> Option<Arc<DecodedBlock>> {
        self.wait_for(key, tokens).ok()
    }

    /// Returns block `key` of `bytes` bytes, to read `tokens` tokens of it.
    ///
    /// If the block is missing, `decode` decodes it, if possible into the memory of an evicted
    /// block.
    pub(super) fn get(
        &self,
        key: BlockKey,
        tokens: u64,
        bytes: u64,
        decode: impl FnOnce(&mut DecodedBlock) -> Result<()>,
    ) -> Result<Arc<DecodedBlock>> {
        self.wait_for(key, tokens).or_else(|inner| self.load(inner, key, bytes, None, decode))
    }

    /// Notes that a session needs block `key` of `bytes` bytes. Decodes the block if it is missing
    /// and evicting idle blocks gives enough room.
    ///
    /// A session that asks in the order of its batches loses only blocks that it needs later, or
    /// not at all.
    pub(super) fn prepare(
        &self,
        key: BlockKey,
        bytes: u64,
        needed: NeededBy,
        decode: impl FnOnce(&mut DecodedBlock) -> Result<()>,
    ) -> Result<Prepared> {
        let mut inner = lock(&self.inner);
        if let Some(slot) = inner.policy.find(key) {
            inner.policy.need(needed.session, slot, needed.position);
            return Ok(Prepared::Nothing);
        }
        let budget_bytes = self.total_bytes - inner.reserved_bytes;
        if !inner.policy.has_idle_room(bytes, budget_bytes) {
            return Ok(Prepared::Full);
        }
        self.load(inner, key, bytes, Some(needed), decode)?;
        Ok(Prepared::Decoded)
    }

    /// Notes that a session has finished everything before a global position. Returns whether a
    /// block that it needs was evicted since the last call.
    pub(crate) fn reached(&self, session: SessionId, position: u64) -> bool {
        lock(&self.inner).policy.reached(session, position)
    }

    /// Begins a pass of a session at a global position.
    ///
    /// `done_after` is the number of tokens of a source that the session reads while its rows go
    /// through two windows.
    pub(crate) fn begin_pass(&self, session: SessionId, position: u64, done_after: u64) {
        lock(&self.inner).policy.begin(session, position, done_after);
    }

    fn load(
        &self,
        mut inner: MutexGuard<'_, CacheInner>,
        key: BlockKey,
        bytes: u64,
        needed: Option<NeededBy>,
        decode: impl FnOnce(&mut DecodedBlock) -> Result<()>,
    ) -> Result<Arc<DecodedBlock>> {
        let mut dropped = Vec::new();
        // Blocks have nearly the same size. With rounded sizes, the memory of one suits most
        // others.
        let step = if bytes < ROUNDED_FROM_BYTES { 1 } else { bytes.next_power_of_two() / 32 };
        let budget_bytes = self.total_bytes - inner.reserved_bytes;
        let rounded = bytes.next_multiple_of(step).min(budget_bytes.max(bytes));
        let reused = inner.make_room(bytes, rounded, budget_bytes, &mut dropped);
        let charged = reused.as_ref().map_or(rounded, |block| bytes.max(block.capacity_bytes()));
        let slot = inner.insert(key, charged);
        if let Some(NeededBy { session, position }) = needed {
            inner.policy.need(session, slot, position);
        }
        drop(inner);
        self.free(dropped, charged / SCRAPS);

        // Removes the entry if decoding fails or panics, so that no thread waits for it forever.
        let loading = Loading { cache: self, slot };
        let mut block = reused.unwrap_or_default();
        if block.bytes.capacity() == 0 {
            // If there is no memory for the block, decoding reports it.
            let _ = block.bytes.try_reserve_exact(rounded as usize);
        }
        decode(&mut block)?;
        let block = Arc::new(block);
        self.count(&block);
        std::mem::forget(loading);
        let mut inner = lock(&self.inner);
        inner.blocks[slot as usize] = Some(Arc::clone(&block));
        inner.policy.loaded(slot);
        drop(inner);
        self.loaded.notify_all();
        Ok(block)
    }

    /// Frees evicted blocks whose memory was not reused. Decoding frees `scraps` bytes besides.
    ///
    /// The allocator keeps memory that it cannot join to larger pieces. After some gigabytes that
    /// is half of the budget. So it is told now and then to return memory to the system.
    fn free(&self, dropped: Vec<Arc<DecodedBlock>>, scraps: u64) {
        let bytes = dropped.iter().map(|block| block.capacity_bytes()).sum::<u64>() + scraps;
        drop(dropped);
        let freed = self.freed_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if freed >= TRIM_AFTER_BYTES {
            self.freed_bytes.store(0, Ordering::Relaxed);
            #[cfg(all(target_os = "linux", target_env = "gnu"))]
            // SAFETY: any thread may call it at any time. It returns free memory to the system.
            unsafe {
                libc::malloc_trim(0);
            }
        }
    }

    /// Counts a decoded block, or the decoded beginning of a block.
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

impl CacheInner {
    /// Adds a block that is being decoded.
    fn insert(&mut self, key: BlockKey, bytes: u64) -> Slot {
        let slot = self.policy.insert(key, key.0, bytes);
        if slot as usize == self.blocks.len() {
            self.blocks.push(None);
        }
        slot
    }

    /// Evicts blocks until there is room for `bytes` bytes, which take `fresh_bytes` of new memory.
    ///
    /// Returns a block whose memory suits the new block, because new memory costs a page fault per
    /// 4 kB. The other blocks go to `dropped`, so that the caller frees them outside of the lock.
    fn make_room(
        &mut self,
        bytes: u64,
        fresh_bytes: u64,
        budget_bytes: u64,
        dropped: &mut Vec<Arc<DecodedBlock>>,
    ) -> Option<DecodedBlock> {
        let mut reused: Option<DecodedBlock> = None;
        let suiting = bytes..=bytes + bytes / 4;
        let wanted = |reused: &Option<DecodedBlock>| {
            reused.as_ref().map_or(fresh_bytes, |block| bytes.max(block.capacity_bytes()))
        };
        while self.policy.used_bytes() + wanted(&reused) > budget_bytes {
            let Some(evicted) = self.policy.evict(&suiting) else { break };
            let Some(block) = self.blocks[evicted.slot as usize].take() else { continue };
            let suits = reused.is_none() && suiting.contains(&block.capacity_bytes());
            match if suits { Arc::try_unwrap(block) } else { Err(block) } {
                Ok(block) => reused = Some(block),
                // The worker that still reads the block frees it.
                Err(block) => dropped.push(block),
            }
        }
        reused
    }
}

struct Loading<'a> {
    cache: &'a BlockCache,
    slot: Slot,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        lock(&self.cache.inner).policy.remove(self.slot);
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
        let (session, _) = cache.join(0, 0, 100).unwrap();
        cache.begin_pass(session, 0, 1000);
        let key = |index: u32| (0, BlockRef { shard: 0, block: index });
        let prepare = |index: u32, position: u64| {
            cache
                .prepare(key(index), 80, NeededBy { session, position }, |block| {
                    fill(block, 80);
                    Ok(())
                })
                .unwrap()
        };
        let is_there = |index: u32| lock(&cache.inner).policy.find(key(index)).is_some();
        assert_eq!(
            [(0, 0), (1, 1), (1, 4), (2, 2), (3, 3)].map(|(index, position)| prepare(index, position)),
            [Prepared::Decoded, Prepared::Decoded, Prepared::Nothing, Prepared::Decoded, Prepared::Full]
        );
        assert!(!cache.reached(session, 1), "nothing needed was lost");
        assert_eq!(prepare(3, 3), Prepared::Decoded, "batch 0 is done");
        assert!(!is_there(0) && is_there(1) && is_there(2));
        cache.get(key(1), 1, 80, |_| panic!("it is there")).unwrap();
        cache.get(key(4), 1, 80, |_| Ok(())).unwrap();
        assert!(!is_there(1), "of those that are needed, it would be for longest");
        assert!(cache.reached(session, 1) && !cache.reached(session, 1));
        cache.begin_pass(session, 5, 1000);
        assert_eq!(prepare(5, 5), Prepared::Decoded, "nothing is needed");
        let needed = NeededBy { session, position: 6 };
        assert!(cache.prepare(key(6), 10, needed, |_| Err(Error::data("broken"))).is_err());
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
        let (session, _) = cache.join(0, 0, 100).unwrap();
        cache.begin_pass(session, 0, 5);
        assert_eq!(of_six(), 6);
        assert_eq!(of_six(), 3, "0, 1 and the last are there; 2 takes the place of 1");
        cache.begin_pass(session, 100, 15);
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
