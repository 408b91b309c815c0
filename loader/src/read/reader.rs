//! Read: any stretch of the stream, written into a row.
//!
//! Random-access blocks are borrowed from the mapping window by window. Other blocks are decoded whole into a cache that all
//! workers share and that stays within its budget: a block in demand by several workers is decoded by one of them. Where it is known what
//! batches to come will read, blocks that none of them needs make room first; else the block that was not used for longest. A row that only
//! runs on into a block takes just the first tokens of it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::block_cache::{BlockCache, Prepared};
use crate::corpus::{BlockRef, Corpus, OpenShard};
use crate::error::Result;
use crate::fill::{Ahead, Id, Piece, Row, pieces, widen};
use crate::format::{Access, DecodedBlock, Ends, EndsScratch, Shard};
use crate::layout::concat::{Concat, Specials};
use crate::observe::trace::Tracer;
use crate::tokens::Tokens;

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
pub(crate) struct StreamLocation {
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
    pub(crate) fn find(&self, at: u64) -> Option<StreamLocation> {
        let (shard, within) = self.layout.locate(at);
        let opened = self.corpus.opened(shard)?;
        let block = self.specials.block_at(opened.before(), within);
        // With specials, places in the stream run ahead of tokens: too far by some lines at most.
        let token = within - self.specials.stream_len(opened.before()[block]);
        let ahead = match opened.shard() {
            Shard::Random(shard) => shard.mapped(block, token).map_or(Ahead::NONE, Ahead::of),
            Shard::Block(_) => Ahead::NONE,
        };
        Some(StreamLocation { at, shard, within, block, ahead })
    }

    /// Writes stream tokens `range` over `row`. With `ends_chunk`, blocks that begin inside the row are read no further than needed.
    /// `spot` is where the range begins, if that was found before, and what is read next lies `ahead`.
    pub(crate) fn fill<T: Id>(
        &self,
        range: Range<u64>,
        ends_chunk: bool,
        mut row: Row<'_, T>,
        spot: Option<StreamLocation>,
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
        let index = block.block as usize;
        match opened.shard() {
            Shard::Random(shard) if self.specials.none() => {
                let tokens = shard.tokens(index, range, &mut scratch.tokens)?;
                widen(row, &tokens, ahead)
            }
            Shard::Random(shard) => {
                let meta = &shard.info().blocks[index];
                let ends = shard.ends(index, &mut scratch.ends)?;
                let buffer = &mut scratch.tokens;
                self.fill_pieces(&ends, meta.tokens, opened.continues(index), range, row, |part, tokens| {
                    widen(part, &shard.tokens(index, tokens, buffer)?, ahead)
                })
            }
            Shard::Block(shard) => {
                let meta = &shard.info().blocks[index];
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
                let all = Tokens::new(shard.block_dtype(), &decoded.bytes);
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
            let Shard::Block(shard) = opened.shard() else { return Ok(Prepared::Nothing) };
            for (block, part) in self.stretches(&opened, None, within, range.end - at) {
                if ends_chunk && at > range.start {
                    // Just its beginning will be read.
                    return Ok(Prepared::Nothing);
                }
                at += part.end - part.start;
                let bytes = shard.info().blocks[block].decoded_bytes;
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
            let Shard::Random(shard) = opened.shard() else { return false };
            for (block, part) in self.stretches(&opened, None, within, range.end - at) {
                at += part.end - part.start;
                let tokens = shard.info().blocks[block].tokens;
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
