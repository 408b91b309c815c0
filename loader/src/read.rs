//! Read: any stretch of the stream, written into a row.
//!
//! Random-access blocks are borrowed from the mapping window by window. Other blocks are decoded whole into a cache that all
//! workers share and that stays within its budget: a block in demand by several workers is decoded by one of them. Where it is known what
//! batches to come will read, blocks that none of them needs make room first; else the block that was not used for longest. A row that only
//! runs on into a block takes just the first tokens of it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use crate::corpus::{BlockRef, Corpus, OpenShard};
use crate::error::Result;
use crate::fill::{Ahead, Id, Piece, Row, pieces, widen};
use crate::layout::concat::{Concat, Specials};
use crate::shard::{Access, DecodedBlock, DecodedPages, Ends, EndsScratch};
use crate::sync::{lock, wait};
use crate::tokens::Tokens;
use crate::trace::Tracer;

/// Memory of one worker, reused from row to row.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    tokens: Vec<u8>,
    ends: EndsScratch,
    /// The beginning of a block that is not kept.
    prefix: DecodedBlock,
    /// Time this worker spent decoding since it was last asked.
    pub(crate) decode_nanos: u64,
    pub(crate) tracer: Tracer,
}

/// Where a stretch of the stream begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    /// Place in the stream.
    at: u64,
    shard: usize,
    /// Place in the shard's stream.
    within: u64,
    block: usize,
    /// Its bytes, where they are mapped.
    pub(crate) ahead: Ahead,
}

/// Where a block lies in the stream.
#[derive(Clone, Copy, Debug)]
pub struct BlockPlace {
    /// The block's number in the corpus.
    pub block: u64,
    /// Its first stream token.
    pub start: u64,
    /// Stream tokens it holds.
    pub len: u64,
    /// Tokens in the file.
    pub tokens: u64,
    /// Bytes when decoded.
    pub bytes: u64,
}

/// The stream of a corpus.
#[derive(Debug)]
pub(crate) struct Reader {
    corpus: Arc<Corpus>,
    layout: Concat,
    specials: Specials,
    /// Shared with the readers of other sources, among which this one's blocks go by `source`.
    cache: Arc<BlockCache>,
    source: usize,
}

impl Reader {
    pub(crate) fn new(
        corpus: Arc<Corpus>,
        layout: Concat,
        specials: Specials,
        cache: Arc<BlockCache>,
        source: usize,
    ) -> Self {
        Self { corpus, layout, specials, cache, source }
    }

    pub(crate) fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    pub(crate) fn layout(&self) -> &Concat {
        &self.layout
    }

    /// Finds stream token `at`, where that takes no opening of its shard.
    pub(crate) fn find(&self, at: u64) -> Option<Spot> {
        let (shard, within) = self.layout.locate(at);
        let opened = self.corpus.opened(shard)?;
        let block = self.specials.block_at(opened.before(), within);
        // With specials, places in the stream run ahead of tokens: too far by some lines at most.
        let token = within - self.specials.stream_len(opened.before()[block]);
        let ahead = opened.shard().mapped(block, token).map_or(Ahead::NONE, Ahead::of);
        Some(Spot { at, shard, within, block, ahead })
    }

    /// Writes stream tokens `range` over `row`. With `ends_chunk`, blocks that begin inside the row are read no further than needed.
    /// `spot` is where the range begins, if that was found before, and what is read next lies `ahead`.
    pub(crate) fn fill<T: Id>(
        &self,
        range: Range<u64>,
        ends_chunk: bool,
        mut row: Row<'_, T>,
        spot: Option<Spot>,
        ahead: Ahead,
        scratch: &mut Scratch,
    ) -> Result<()> {
        debug_assert_eq!(range.end - range.start, row.len() as u64);
        let mut at = range.start;
        while at < range.end {
            let found = spot.filter(|spot| spot.at == at);
            let (index, within) = found.map_or_else(|| self.layout.locate(at), |spot| (spot.shard, spot.within));
            let shard = self.corpus.shard(index)?;
            let first = found.map(|spot| spot.block);
            for (block, part) in self.stretches(&shard, first, within, range.end - at) {
                let filled = row.take((part.end - part.start) as usize);
                let next = at + filled.len() as u64;
                let prefix_only = ends_chunk && at > range.start;
                let block = BlockRef { shard: index as u32, block: block as u32 };
                self.fill_from_block(&shard, block, part, prefix_only, filled, ahead, scratch)
                    .map_err(|error| error.at(shard.shard().path()).in_block(u64::from(block.block)))?;
                at = next;
            }
        }
        Ok(())
    }

    /// The blocks that hold the up to `len` tokens from `within` of a shard's stream, each with its stretch of its own stream; the first one is
    /// searched for if it is not known.
    fn stretches<'a>(
        &self,
        shard: &'a OpenShard,
        first: Option<usize>,
        within: u64,
        len: u64,
    ) -> impl Iterator<Item = (usize, Range<u64>)> + use<'a> {
        let (specials, before) = (self.specials, shard.before());
        let first = first.unwrap_or_else(|| specials.block_at(before, within));
        let end = within + len;
        let place = move |block: usize| specials.stream_len(before[block]);
        (first..before.len() - 1).take_while(move |block| place(*block) < end).map(move |block| {
            let start = place(block);
            (block, within.saturating_sub(start)..end.min(place(block + 1)) - start)
        })
    }

    #[allow(clippy::too_many_arguments)] // each is a different fact about the one stretch
    fn fill_from_block<T: Id>(
        &self,
        opened: &OpenShard,
        block: BlockRef,
        range: Range<u64>,
        prefix_only: bool,
        row: Row<'_, T>,
        ahead: Ahead,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (shard, index) = (opened.shard(), block.block as usize);
        let meta = &shard.blocks()[index];
        let dtype = shard.block_dtype();
        match shard.access() {
            Access::Random if self.specials.none() => {
                let tokens = shard.tokens(index, range, &mut scratch.tokens)?;
                widen(row, &tokens, ahead)
            }
            Access::Random => {
                let ends = shard.ends(index, &mut scratch.ends)?;
                let buffer = &mut scratch.tokens;
                self.fill_pieces(&ends, meta.tokens, opened.continues(index), range, row, |part, tokens| {
                    widen(part, &shard.tokens(index, tokens, buffer)?, ahead)
                })
            }
            Access::Block => {
                let started = Instant::now();
                let mut decoded_here = false;
                let key = (self.source, block);
                let shared;
                let held = if prefix_only { self.cache.held(key, range.end - range.start) } else { None };
                let decoded = if prefix_only && held.is_none() {
                    decoded_here = true;
                    shard.decode_into(index, Some(range.end), &mut scratch.prefix)?;
                    self.cache.count(&scratch.prefix);
                    &scratch.prefix
                } else {
                    shared = match held {
                        Some(block) => block,
                        None => self.cache.get(key, range.end - range.start, meta.decoded_bytes, |block| {
                            decoded_here = true;
                            shard.decode_into(index, None, block)
                        })?,
                    };
                    &*shared
                };
                if decoded_here {
                    scratch.decode_nanos += started.elapsed().as_nanos() as u64;
                    scratch.tracer.end("decode", Some(started), None);
                }
                let all = Tokens::new(dtype, &decoded.bytes);
                let slice = |tokens: Range<u64>| all.slice(tokens.start as usize..tokens.end as usize);
                if self.specials.none() {
                    return widen(row, &slice(range), ahead);
                }
                let ends = Ends::List(&decoded.ends);
                // A prefix ends inside a document; `pieces` needs no more of the block than it was asked for.
                let tokens = if decoded.complete { meta.tokens } else { all.len() as u64 };
                self.fill_pieces(&ends, tokens, opened.continues(index), range, row, |part, tokens| {
                    widen(part, &slice(tokens), ahead)
                })
            }
        }
    }

    fn fill_pieces<T: Id>(
        &self,
        ends: &Ends<'_>,
        tokens: u64,
        continues: bool,
        range: Range<u64>,
        mut row: Row<'_, T>,
        mut fill: impl FnMut(Row<'_, T>, Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let Specials { bos, eos } = self.specials;
        pieces(ends, tokens, continues, (bos.is_some(), eos.is_some()), range.start, range.end, |piece| {
            let len = if let Piece::Tokens { len, .. } = piece { len as usize } else { 1 };
            let part = row.take(len);
            let special = |part: Row<'_, T>, id: Option<u32>| {
                let id = id.expect("asked for only if set");
                part.pad(id, i64::from(id));
            };
            match piece {
                Piece::Bos => special(part, bos),
                Piece::Eos => special(part, eos),
                Piece::Tokens { start, len } => fill(part, start..start + len)?,
            }
            Ok(())
        })
    }

    /// The block that holds stream token `at`; in a shard that is not open, blocks are taken to be equal.
    pub(crate) fn block_at(&self, at: u64) -> BlockPlace {
        let (index, within) = self.layout.locate(at);
        let shard_start = at - within;
        let number = |block: u64| ((index as u64) << 32) + block;
        if let Some(opened) = self.corpus.opened(index) {
            let before = opened.before();
            let block = self.specials.block_at(before, within);
            let [start, end] = [block, block + 1].map(|block| self.specials.stream_len(before[block]));
            let meta = &opened.shard().blocks()[block];
            let (tokens, bytes) = (meta.tokens, meta.decoded_bytes);
            return BlockPlace {
                block: number(block as u64),
                start: shard_start + start,
                len: end - start,
                tokens,
                bytes,
            };
        }
        let facts = self.corpus.facts_of(index);
        let (blocks, stream_len) = (facts.blocks.max(1), self.specials.stream_len(facts.counts).max(1));
        let scaled =
            |value: u64, by: u64, of: u64| (u128::from(value) * u128::from(by)).div_ceil(u128::from(of)) as u64;
        let block = (u128::from(within) * u128::from(blocks) / u128::from(stream_len)) as u64;
        let [start, end] = [block, block + 1].map(|block| scaled(block, stream_len, blocks));
        BlockPlace {
            block: number(block),
            start: shard_start + start,
            len: end - start,
            tokens: (end - start).min(scaled(end - start, facts.counts.tokens, stream_len)),
            bytes: facts.decoded_bytes / blocks,
        }
    }

    /// Whether its blocks can be decoded ahead.
    pub(crate) fn decodes(&self) -> bool {
        self.corpus.access() == Access::Block
    }

    /// Decodes the first block of stream tokens `range` that nobody has, for batch `number`, if there is room for it.
    pub(crate) fn decode_ahead(
        &self,
        range: Range<u64>,
        ends_chunk: bool,
        number: u64,
        scratch: &mut Scratch,
    ) -> Result<Prepared> {
        let mut at = range.start;
        while at < range.end {
            let (index, within) = self.layout.locate(at);
            let opened = self.corpus.shard(index)?;
            let shard = opened.shard();
            for (block, part) in self.stretches(&opened, None, within, range.end - at) {
                if ends_chunk && at > range.start {
                    // Just its beginning will be read.
                    return Ok(Prepared::Nothing);
                }
                at += part.end - part.start;
                let bytes = shard.blocks()[block].decoded_bytes;
                let key = (self.source, BlockRef { shard: index as u32, block: block as u32 });
                let started = Instant::now();
                let prepared = self.cache.prepare(key, bytes, number, |out| shard.decode_into(block, None, out))?;
                if prepared == Prepared::Decoded {
                    scratch.decode_nanos += started.elapsed().as_nanos() as u64;
                    scratch.tracer.end("decode", Some(started), None);
                }
                if prepared != Prepared::Nothing {
                    return Ok(prepared);
                }
            }
        }
        Ok(Prepared::Nothing)
    }

    /// Whether reading ahead can help: windows are read from the file one by one.
    pub(crate) fn reads_ahead(&self) -> bool {
        self.corpus.access() == Access::Random
    }

    /// Asks for the windows of stream tokens `range` that are not in memory to be read ahead. Returns whether there were any.
    pub(crate) fn read_ahead(&self, range: Range<u64>) -> bool {
        let mut at = range.start;
        let mut asked = false;
        while at < range.end {
            let (index, within) = self.layout.locate(at);
            // Opening a shard is left to whoever reads it: the first batch must not wait for those of all windows ahead.
            let Some(opened) = self.corpus.opened(index) else { return true };
            let shard = opened.shard();
            for (block, part) in self.stretches(&opened, None, within, range.end - at) {
                at += part.end - part.start;
                let tokens = shard.blocks()[block].tokens;
                // With specials, stream places run ahead of tokens by at most one per document: asking a little too far is harmless.
                let wanted = part.start.min(tokens)..part.end.min(tokens);
                if !shard.is_resident(block, wanted.clone()) {
                    shard.will_need(block, wanted);
                    asked = true;
                }
            }
        }
        asked
    }
}

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
    budget_bytes: u64,
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
            budget_bytes,
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
        self.budget_bytes
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
    fn held(&self, key: BlockKey, tokens: u64) -> Option<Arc<DecodedBlock>> {
        self.wait_for(key, tokens).ok()
    }

    /// Block `key` of `bytes` bytes, to read `tokens` tokens of it; decoded by `decode` if it is not there, over memory of a block that made room for it.
    fn get(
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
    fn prepare(
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
        let wanted = self.budget_bytes.min(bytes + bytes / 4);
        if inner.used_bytes + wanted > self.budget_bytes + inner.idle_bytes() {
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
        let rounded = bytes.next_multiple_of(step).min(self.budget_bytes.max(bytes));
        let reused = inner.make_room(bytes, rounded, self.budget_bytes, &mut dropped);
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

    fn count(&self, block: &DecodedBlock) {
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
