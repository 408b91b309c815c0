//! Reads the segments of a row into the row.
//!
//! Random-access blocks are borrowed from the mapping, window by window. Other blocks are decoded
//! whole into a cache with a budget, which all workers share. When several workers need a block,
//! one decodes it and the others wait. Blocks that no upcoming batch needs are evicted first. If a
//! row ends a chunk and runs on into a block, only the first tokens of that block are decoded.
//!
//! The layout says which segments make a row. If a layout asks for document lengths, this room
//! supplies them and keeps the plans of windows.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::block_cache::{BlockCache, NeededBy, Prepared};
use super::borders::PackedBorders;
use super::lengths::DocumentLengths;
use crate::corpus::{BlockRef, Corpus, OpenShard};
use crate::error::{Error, ErrorKind, Result};
use crate::fill::{Ahead, FieldRow, Id, Places, StreamItem, TokenRow, UnfitId, documents_before, stream_items};
use crate::format::documents::Values;
use crate::format::{Access, DecodedBlock, Ends, EndsScratch, RandomShard, Shard};
use crate::layout::{Documents, Extent, Layout, LayoutWindow, Lengths, Segment, Specials, Stream, WindowPlan};
use crate::observe::trace::Tracer;
use crate::settings::{Config, PackedBy};
use crate::sync::lock;
use crate::tokens::Tokens;

/// Number of window plans that a reader keeps. A rank draws from two windows of each of its lanes.
pub(crate) const KEPT_PLANS: usize = 64;

/// Memory of one worker, reused from row to row.
#[derive(Debug, Default)]
pub(crate) struct ReadMemory {
    /// Ids of a window that is not mapped.
    tokens: Vec<u8>,
    ends: EndsScratch,
    /// The first tokens of a block that the cache does not keep.
    prefix: DecodedBlock,
    /// The plan of a window that needs no lengths.
    plan: WindowPlan,
    /// Places just after each document in the rows that were read. `None` if no caller asks for
    /// them.
    pub(crate) borders: Option<Vec<u64>>,
    /// The documents at the first places of the segments that were read, each with that place.
    /// `None` if no caller asks for them.
    pub(crate) documents: Option<Vec<(u64, DocumentRef)>>,
    /// The same places as the blocks give them. `None` if no columns are compared.
    document_ends: Option<Vec<u64>>,
    /// The place of a block whose next document end was looked up last, and the number of that
    /// document. Further columns look up the same place.
    last_end: Option<(BlockRef, u64, usize)>,
    /// Time that this worker spent decoding since it was last taken, in nanoseconds.
    pub(crate) decode_nanos: u64,
    pub(crate) tracer: Tracer,
}

/// A document with tokens: its shard, and its number among the non-empty documents there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DocumentRef {
    pub(crate) shard: usize,
    pub(crate) number: u64,
}

/// The shard and the block where a segment begins, and its bytes if they are mapped.
///
/// The reader finds it for the next row while it fills this row, so that the next row's bytes can
/// be fetched ahead.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamLocation {
    /// Token offset in the stream of the source.
    at: u64,
    shard: usize,
    /// Token offset in the stream of the shard.
    within: u64,
    block: usize,
    /// The bytes at this location, if they are mapped.
    pub(crate) ahead: Ahead,
}

/// A request to read one row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowRequest<'a> {
    /// The segments of the row, sorted by their place in the row.
    pub(crate) segments: &'a [Segment],
    /// Whether the tokens after the row are read at another time of the epoch. Blocks that begin
    /// inside the last segment are then decoded no further than needed.
    pub(crate) ends_chunk: bool,
    /// The location where the first segment begins, if it is known.
    pub(crate) begin: Option<StreamLocation>,
    /// The bytes that are read next.
    pub(crate) ahead: Ahead,
}

/// Values of the places of a row that no segment covers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Padding {
    pub(crate) id: u32,
    pub(crate) label: i64,
}

/// The size of a block and its position in the stream of its source. The plan of a run simulates
/// decoding with it.
#[derive(Clone, Copy, Debug)]
pub struct BlockPlace {
    /// The block's number in the corpus. The upper 32 bits hold the shard.
    pub block: u64,
    /// Offset of its first token in the stream.
    pub start: u64,
    /// Number of stream tokens that it holds.
    pub len: u64,
    /// Number of tokens in the file.
    pub tokens: u64,
    /// Bytes when decoded.
    pub bytes: u64,
}

/// A stretch of one block, and its place in a row.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    block: BlockRef,
    /// First place in the block's stream, and the place after the last one.
    from: u64,
    to: u64,
    /// Place of the stretch in the row.
    place: u64,
    /// Whether the block is decoded no further than the stretch needs.
    prefix_only: bool,
    /// Whether the ends of documents are looked up in the block.
    borders: bool,
    /// Whether the document at the first place is looked up in the block.
    document: bool,
}

/// Reads the rows of one source.
#[derive(Debug)]
pub(crate) struct Reader {
    corpus: Arc<Corpus>,
    stream: Arc<Stream>,
    specials: Specials,
    layout: Box<dyn Layout>,
    lengths: DocumentLengths,
    /// The starts of documents inside rows of the files, if these were packed before.
    packed: Option<PackedBorders>,
    /// Plans of windows by window number, the oldest first.
    plans: Mutex<VecDeque<(u64, Arc<WindowPlan>)>>,
    /// The cache, which readers of other sources share.
    cache: Arc<BlockCache>,
    /// The number of the token column among the columns of all sources. Keys of the cache have it.
    /// The numbers of the further columns follow it.
    first_column: usize,
}

impl Reader {
    /// Makes a reader of `corpus`. `open` makes the layout, and is usually [`crate::layout::open`].
    pub(crate) fn new(
        corpus: Arc<Corpus>,
        config: &Config,
        open: impl FnOnce(&Config, &Arc<Stream>, Lengths<'_>) -> Result<Box<dyn Layout>>,
        cache: Arc<BlockCache>,
        source: usize,
        lengths_bytes: u64,
    ) -> Result<Self> {
        let specials = Specials::of(config);
        let stream = Arc::new(Stream::new(corpus.counts(), specials));
        let lengths = DocumentLengths::new(Arc::clone(&corpus), lengths_bytes, config);
        let layout = open(config, &stream, &|shard| lengths.of_shard(shard))?;
        let first_column = source * (1 + config.fields.len());
        let is_packed = config.packed_by != PackedBy::None;
        let packed = is_packed.then(|| PackedBorders::new(Arc::clone(&corpus), config.packed_by, lengths_bytes));
        Ok(Self { packed, corpus, stream, specials, layout, lengths, plans: Mutex::default(), cache, first_column })
    }

    pub(crate) fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Time in which document lengths were read from shards. `None` if no shard was read for them.
    pub(crate) fn lengths_took(&self) -> Option<Duration> {
        self.lengths.took()
    }

    /// Faults of saved lengths that are no errors, one line each.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.lengths.warnings()
    }

    pub(crate) fn layout(&self) -> &dyn Layout {
        &*self.layout
    }

    /// Bytes of the tables that locate shards and rows.
    pub(crate) fn index_bytes(&self) -> u64 {
        self.stream.index_bytes() + self.layout.index_bytes() + self.lengths.held_bytes()
    }

    /// Appends the segments of row `row` of `extent` to `segments`.
    ///
    /// Fails if the layout needs document lengths that cannot be read.
    pub(crate) fn plan_row(
        &self,
        extent: &Extent,
        row: u64,
        scratch: &mut ReadMemory,
        segments: &mut Vec<Segment>,
    ) -> Result<()> {
        if let Some(segment) = self.layout.one_segment(extent, row) {
            segments.push(segment);
            return Ok(());
        }
        let (window, row) = self.layout.locate(extent, row);
        match &window.documents {
            None => {
                scratch.plan.clear();
                self.layout.plan(&window, &[], &mut scratch.plan);
                segments.extend_from_slice(scratch.plan.row(row));
            }
            Some((shard, documents)) => {
                segments.extend_from_slice(self.plan_of(&window, *shard, documents)?.row(row));
            }
        }
        Ok(())
    }

    /// Returns the plan of a window that needs the lengths of `documents` of shard `shard`.
    fn plan_of(&self, window: &LayoutWindow, shard: usize, documents: &Range<u64>) -> Result<Arc<WindowPlan>> {
        if let Some((_, plan)) = lock(&self.plans).iter().find(|(number, _)| *number == window.number) {
            return Ok(Arc::clone(plan));
        }
        let lengths = self.lengths.of(shard, documents.clone())?;
        let mut plan = WindowPlan::default();
        self.layout.plan(window, &lengths, &mut plan);
        let plan = Arc::new(plan);
        let mut plans = lock(&self.plans);
        if plans.len() >= KEPT_PLANS {
            plans.pop_front();
        }
        plans.push_back((window.number, Arc::clone(&plan)));
        Ok(plan)
    }

    /// The path of the shard with stream token `at`.
    pub(crate) fn path_at(&self, at: u64) -> &Path {
        let (shard, _) = self.stream.locate(at);
        &self.corpus.files()[shard].path
    }

    /// Finds stream token `at`. Returns `None` if its shard is closed.
    pub(crate) fn find(&self, at: u64) -> Option<StreamLocation> {
        let (shard, within) = self.stream.locate(at);
        let opened = self.corpus.opened(shard)?;
        let block = self.specials.block_at(opened.before(), within);
        // With specials, places in the stream run ahead of tokens: the hint is off by some lines at
        // most.
        let token = within - self.specials.stream_len(opened.before()[block]);
        let ahead = match opened.shard() {
            Shard::Random(shard) => shard.mapped(block, token).map_or(Ahead::NONE, Ahead::of),
            Shard::Block(_) => Ahead::NONE,
        };
        Some(StreamLocation { at, shard, within, block, ahead })
    }

    /// Writes the tokens of `request` to `row`, and `padding` to the places that no segment covers.
    pub(crate) fn fill<T: Id>(
        &self,
        request: RowRequest<'_>,
        padding: Padding,
        mut row: TokenRow<'_, T>,
        scratch: &mut ReadMemory,
    ) -> Result<()> {
        let RowRequest { segments, ends_chunk, mut begin, ahead } = request;
        let mut place = 0;
        for (index, segment) in segments.iter().enumerate() {
            if segment.place > place {
                row.take((segment.place - place) as usize).pad(padding.id, padding.label);
            }
            let last = index + 1 == segments.len();
            let part = row.take(segment.len as usize);
            self.fill_segment(0, segment, ends_chunk && last, part, begin.take(), ahead, scratch)?;
            place = segment.place + segment.len;
        }
        row.pad(padding.id, padding.label);
        Ok(())
    }

    /// Writes the values of further column `index` to `row`, and `padding` to the places that no
    /// segment of `request` covers.
    ///
    /// Fails if the documents of the column end at other places than the documents of the tokens.
    /// [`Reader::fill`] left the latter in `scratch`.
    pub(crate) fn fill_field(
        &self,
        index: usize,
        request: RowRequest<'_>,
        padding: i64,
        mut row: FieldRow<'_>,
        scratch: &mut ReadMemory,
    ) -> Result<()> {
        let tokens_end = scratch.document_ends.replace(Vec::new()).unwrap_or_default();
        let borders = scratch.borders.take();
        let filled = self.fill_field_segments(index, request, padding, &mut row, scratch);
        let ends = scratch.document_ends.replace(tokens_end).unwrap_or_default();
        scratch.borders = borders;
        filled?;
        row.fill(padding);
        let tokens_end = scratch.document_ends.as_deref().unwrap_or_default();
        if ends == tokens_end { Ok(()) } else { Err(self.misfit(index, request.segments)) }
    }

    fn fill_field_segments(
        &self,
        index: usize,
        request: RowRequest<'_>,
        padding: i64,
        row: &mut FieldRow<'_>,
        scratch: &mut ReadMemory,
    ) -> Result<()> {
        let RowRequest { segments, ends_chunk, .. } = request;
        let mut place = 0;
        for (number, segment) in segments.iter().enumerate() {
            if segment.place > place {
                row.take((segment.place - place) as usize).fill(padding);
            }
            let last = number + 1 == segments.len();
            let part = row.take(segment.len as usize);
            self.fill_segment(1 + index, segment, ends_chunk && last, part, None, Ahead::NONE, scratch)?;
            place = segment.place + segment.len;
        }
        Ok(())
    }

    /// Lets the next rows note where their documents end, so that further columns can be compared.
    pub(crate) fn compare_columns(&self, scratch: &mut ReadMemory) {
        scratch.document_ends.get_or_insert_default().clear();
    }

    /// The document of the stretch that follows a stretch of `document` in a segment.
    ///
    /// It is the next document of the stream. A row that was packed before has one value, and is
    /// one document with several stretches.
    pub(crate) fn document_after(&self, document: DocumentRef) -> DocumentRef {
        if self.packed.is_some() {
            return document;
        }
        let DocumentRef { mut shard, mut number } = document;
        number += 1;
        while number >= self.corpus.facts_of(shard).counts.starts && shard + 1 < self.corpus.len() {
            (shard, number) = (shard + 1, 0);
        }
        DocumentRef { shard, number }
    }

    /// Gives `take` the value of `document` in further column `column`: a little-endian number, or
    /// UTF-8. A null is `None`. The row has `tokens` tokens of the document.
    pub(crate) fn document_value(
        &self,
        column: usize,
        document: DocumentRef,
        tokens: u64,
        take: impl FnOnce(Option<&[u8]>),
    ) -> Result<()> {
        let shard = self.corpus.shard(document.shard)?;
        let values = shard.document_column(column).ok_or_else(|| {
            let name = &self.corpus.fields()[column];
            Error::new(ErrorKind::Internal, format!("column `{name}` is missing")).at(shard.shard().path())
        })?;
        let row = shard.row_of_document(document.number).map_err(|error| error.at(shard.shard().path()))?;
        if row >= values.rows() {
            let text = format!("column `{}` has no row {row}, expected a value there", values.name());
            return Err(Error::new(ErrorKind::Changed, text).at(shard.shard().path()));
        }
        let (part, within) = values.locate(row);
        let block = BlockRef { shard: document.shard as u32, block: part as u32 };
        let key = (self.first_column + 1 + column, block);
        let held = match self.cache.held(key, tokens) {
            Some(held) => held,
            None => {
                // The bytes of strings are known only after they are decoded.
                let mut decoded = DecodedBlock::default();
                values.decode_into(part, &mut decoded)?;
                shard.check_values(column, part, &decoded)?;
                let bytes = decoded.capacity_bytes();
                self.cache.get(key, tokens, bytes, |block| {
                    *block = decoded;
                    Ok(())
                })?
            }
        };
        take(Values::of(values.kind(), &held).get(within));
        Ok(())
    }

    /// Makes the error for further column `index`, whose documents do not fit the tokens somewhere
    /// in `segments`.
    #[cold]
    fn misfit(&self, index: usize, segments: &[Segment]) -> Error {
        let name = &self.corpus.fields()[index];
        let mut found = Error::data(format!("column `{name}` does not fit the tokens"));
        for segment in segments {
            let [first, last] = [segment.start, segment.start + segment.len - 1].map(|at| self.stream.locate(at).0);
            for number in first..=last {
                let shard = match self.corpus.shard(number) {
                    Ok(shard) => shard,
                    Err(error) => return error,
                };
                let Some(field) = shard.column(1 + index) else { continue };
                found = shard.misfit(field, name);
                if found.location().is_some_and(|location| location.row.is_some()) {
                    return found;
                }
            }
        }
        found
    }

    #[allow(clippy::too_many_arguments)] // each is a different fact about the one segment
    fn fill_segment<P: Places>(
        &self,
        column: usize,
        segment: &Segment,
        ends_chunk: bool,
        mut row: P,
        begin: Option<StreamLocation>,
        ahead: Ahead,
        scratch: &mut ReadMemory,
    ) -> Result<()> {
        let range = segment.stream();
        let borders = match (segment.documents, &mut scratch.borders) {
            (_, None) => false,
            (Documents::Joined, Some(_)) => true,
            (Documents::One { number, ends }, Some(borders)) => {
                if let Some(packed) = &self.packed {
                    packed.add(&self.lengths, self.stream.locate(range.start), number, segment, borders)?;
                }
                borders.extend(ends.then_some(segment.place + segment.len));
                false
            }
        };
        let mut noted = scratch.documents.as_mut().filter(|_| column == 0);
        let is_noted = noted.is_some();
        if let (Some(noted), Documents::One { number, .. }) = (&mut noted, segment.documents) {
            let document = DocumentRef { shard: self.stream.locate(range.start).0, number };
            noted.push((segment.place, document));
        }
        let mut at = range.start;
        while at < range.end {
            let found = begin.filter(|begin| begin.at == at);
            let (index, within) = found.map_or_else(|| self.stream.locate(at), |begin| (begin.shard, begin.within));
            let shard = self.corpus.shard(index)?;
            let opened = if column == 0 { &*shard } else { self.field_of(&shard, column)? };
            let first = found.map(|begin| begin.block);
            for (block, part) in self.stretches(opened, first, within, range.end - at) {
                let filled = row.take((part.end - part.start) as usize);
                let next = at + (part.end - part.start);
                let stretch = Stretch {
                    block: BlockRef { shard: index as u32, block: block as u32 },
                    from: part.start,
                    to: part.end,
                    place: segment.place + (at - range.start),
                    prefix_only: ends_chunk && at > range.start,
                    borders,
                    document: is_noted && borders && at == range.start,
                };
                self.fill_stretch(column, opened, stretch, filled, ahead, scratch)
                    .map_err(|error| error.at(shard.shard().path()).in_block(block as u64))?;
                at = next;
            }
        }
        Ok(())
    }

    /// Returns a further column of an opened shard.
    fn field_of<'a>(&self, shard: &'a OpenShard, column: usize) -> Result<&'a OpenShard> {
        shard.column(column).ok_or_else(|| {
            let name = &self.corpus.fields()[column - 1];
            Error::new(ErrorKind::Internal, format!("column `{name}` is missing")).at(shard.shard().path())
        })
    }

    /// Cuts up to `len` tokens from place `within` of a shard's stream into blocks. Each comes with
    /// a stretch of the block's own stream. Searches for the first block if it is not known.
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

    fn fill_stretch<P: Places>(
        &self,
        column: usize,
        opened: &OpenShard,
        stretch: Stretch,
        row: P,
        ahead: Ahead,
        scratch: &mut ReadMemory,
    ) -> Result<()> {
        let Stretch { block, from, to, prefix_only, .. } = stretch;
        let index = block.block as usize;
        let tokens_alone = self.specials.none() && !stretch.borders;
        match opened.shard() {
            Shard::Random(shard) if tokens_alone => {
                opened.check_tokens(index, &(from..to), &mut scratch.tokens)?;
                if let Some(found) = &mut scratch.document_ends {
                    let ends = shard.ends(index, &mut scratch.ends)?;
                    opened.check_ends(index, &ends)?;
                    push_ends(&ends, shard.info().blocks[index].tokens, &stretch, found, &mut scratch.last_end);
                }
                let tokens = shard.tokens(index, from..to, &mut scratch.tokens)?;
                row.write(&tokens, ahead).map_err(|unfit| in_row(&**shard, index, from, unfit))
            }
            Shard::Random(shard) => {
                let meta = &shard.info().blocks[index];
                let ends = shard.ends(index, &mut scratch.ends)?;
                opened.check_ends(index, &ends)?;
                self.note_document(opened, &ends, &stretch, &mut scratch.documents);
                let (buffer, found) = (&mut scratch.tokens, (&mut scratch.borders, &mut scratch.document_ends));
                self.fill_items(&ends, meta.tokens, opened.continues(index), stretch, row, found, |part: P, tokens| {
                    let start = tokens.start;
                    opened.check_tokens(index, &tokens, buffer)?;
                    part.write(&shard.tokens(index, tokens, buffer)?, ahead)
                        .map_err(|unfit| in_row(&**shard, index, start, unfit))
                })
            }
            Shard::Block(shard) => {
                let meta = &shard.info().blocks[index];
                let started = Instant::now();
                let mut decoded_here = false;
                let key = (self.first_column + column, block);
                let shared;
                // A prefix cannot be compared with the checksum of its block.
                let prefix_only = prefix_only && !opened.has_checksums();
                let held = if prefix_only { self.cache.held(key, to - from) } else { None };
                let decoded = if prefix_only && held.is_none() {
                    decoded_here = true;
                    shard.decode_into(index, Some(to), &mut scratch.prefix)?;
                    self.cache.count(&scratch.prefix);
                    &scratch.prefix
                } else {
                    shared = match held {
                        Some(block) => block,
                        None => self.cache.get(key, to - from, meta.decoded_bytes, |block| {
                            decoded_here = true;
                            opened.decode_block(index, block)
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
                if tokens_alone {
                    if let Some(found) = &mut scratch.document_ends {
                        push_ends(&decoded.document_ends(), meta.tokens, &stretch, found, &mut scratch.last_end);
                    }
                    return row.write(&slice(from..to), ahead).map_err(|unfit| in_block(opened, index, from, unfit));
                }
                // A prefix ends inside a document, so that `stream_items` must not reach beyond it.
                let tokens = if decoded.complete { meta.tokens } else { all.len() as u64 };
                let ends = decoded.document_ends();
                self.note_document(opened, &ends, &stretch, &mut scratch.documents);
                let found = (&mut scratch.borders, &mut scratch.document_ends);
                self.fill_items(&ends, tokens, opened.continues(index), stretch, row, found, |part: P, tokens| {
                    let start = tokens.start;
                    part.write(&slice(tokens), ahead).map_err(|unfit| in_block(opened, index, start, unfit))
                })
            }
        }
    }

    /// Notes the document at the first place of `stretch`, if that is asked for.
    fn note_document(
        &self,
        opened: &OpenShard,
        ends: &Ends<'_>,
        stretch: &Stretch,
        found: &mut Option<Vec<(u64, DocumentRef)>>,
    ) {
        let Some(found) = found.as_mut().filter(|_| stretch.document) else { return };
        let Specials { bos, eos } = self.specials;
        let block = stretch.block.block as usize;
        let specials = (bos.is_some(), eos.is_some());
        let before = documents_before(ends, opened.continues(block), specials, stretch.from);
        let shard = stretch.block.shard as usize;
        found.push((stretch.place, DocumentRef { shard, number: opened.before()[block].ends + before }));
    }

    #[allow(clippy::too_many_arguments)] // each is a different fact about the one stretch
    fn fill_items<P: Places>(
        &self,
        ends: &Ends<'_>,
        tokens: u64,
        continues: bool,
        stretch: Stretch,
        mut row: P,
        (borders, document_ends): (&mut Option<Vec<u64>>, &mut Option<Vec<u64>>),
        mut fill: impl FnMut(P, Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let Specials { bos, eos } = self.specials;
        let Stretch { from, to, mut place, .. } = stretch;
        stream_items(ends, tokens, continues, (bos.is_some(), eos.is_some()), from, to, |piece| {
            let len = match piece {
                StreamItem::Tokens { len, .. } => len,
                StreamItem::Bos | StreamItem::Eos => 1,
                StreamItem::End => {
                    if let Some(borders) = borders.as_mut().filter(|_| stretch.borders) {
                        borders.push(place);
                    }
                    if let Some(document_ends) = document_ends {
                        document_ends.push(place);
                    }
                    return Ok(());
                }
            };
            let part = row.take(len as usize);
            place += len;
            let special = |part: P, id: Option<u32>| part.write_special(id.expect("asked for only if set"));
            match piece {
                StreamItem::Bos => special(part, bos),
                StreamItem::Eos => special(part, eos),
                StreamItem::Tokens { start, len } => fill(part, start..start + len)?,
                StreamItem::End => {}
            }
            Ok(())
        })
    }

    /// The block with stream token `at`. Blocks of a closed shard are assumed to be of equal size.
    pub(crate) fn block_at(&self, at: u64) -> BlockPlace {
        let (index, within) = self.stream.locate(at);
        let shard_start = at - within;
        let number = |block: u64| ((index as u64) << 32) + block;
        if let Some(opened) = self.corpus.opened(index) {
            let before = opened.before();
            let block = self.specials.block_at(before, within);
            let [start, end] = [block, block + 1].map(|block| self.specials.stream_len(before[block]));
            let meta = &opened.shard().blocks()[block];
            let (tokens, bytes) = (meta.tokens, meta.decoded_bytes + opened.fields_bytes_of(meta.tokens));
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

    /// Whether blocks of this source can be decoded ahead.
    pub(crate) fn decodes(&self) -> bool {
        self.corpus.access() == Access::Block
    }

    /// Decodes the first block of `segment` that is not decoded yet, for the batch that needs it.
    /// Does nothing if there is no room.
    pub(crate) fn decode_ahead(
        &self,
        segment: &Segment,
        ends_chunk: bool,
        needed: NeededBy,
        scratch: &mut ReadMemory,
    ) -> Result<Prepared> {
        for column in 0..=self.corpus.fields().len() {
            let prepared = self.decode_column_ahead(column, segment, ends_chunk, needed, scratch)?;
            if prepared != Prepared::Nothing {
                return Ok(prepared);
            }
        }
        Ok(Prepared::Nothing)
    }

    fn decode_column_ahead(
        &self,
        column: usize,
        segment: &Segment,
        ends_chunk: bool,
        needed: NeededBy,
        scratch: &mut ReadMemory,
    ) -> Result<Prepared> {
        let range = segment.stream();
        let mut at = range.start;
        while at < range.end {
            let (index, within) = self.stream.locate(at);
            let opened = self.corpus.shard(index)?;
            let Some(opened) = opened.column(column) else { return Ok(Prepared::Nothing) };
            let Shard::Block(shard) = opened.shard() else { return Ok(Prepared::Nothing) };
            for (block, part) in self.stretches(opened, None, within, range.end - at) {
                if ends_chunk && at > range.start {
                    // Only the beginning of the block will be read.
                    return Ok(Prepared::Nothing);
                }
                at += part.end - part.start;
                let bytes = shard.info().blocks[block].decoded_bytes;
                let key = (self.first_column + column, BlockRef { shard: index as u32, block: block as u32 });
                let started = Instant::now();
                let prepared = self.cache.prepare(key, bytes, needed, |out| opened.decode_block(block, out))?;
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

    /// Whether reading ahead can help, because windows are read from the file one by one.
    pub(crate) fn reads_ahead(&self) -> bool {
        self.corpus.access() == Access::Random
    }

    /// Asks the system to read the windows of `segment` that are not in memory. Returns whether
    /// there were any.
    pub(crate) fn read_ahead(&self, segment: &Segment) -> bool {
        let mut asked = false;
        for column in 0..=self.corpus.fields().len() {
            asked |= self.read_column_ahead(column, segment);
        }
        asked
    }

    fn read_column_ahead(&self, column: usize, segment: &Segment) -> bool {
        let range = segment.stream();
        let mut at = range.start;
        let mut asked = false;
        while at < range.end {
            let (index, within) = self.stream.locate(at);
            // The worker that reads a shard opens it. Otherwise the first batch would wait for the
            // shards of all windows ahead.
            let Some(opened) = self.corpus.opened(index) else { return true };
            let Some(opened) = opened.column(column) else { return false };
            let Shard::Random(shard) = opened.shard() else { return false };
            for (block, part) in self.stretches(opened, None, within, range.end - at) {
                at += part.end - part.start;
                let tokens = shard.info().blocks[block].tokens;
                // With specials, places in the stream run ahead of tokens. Asking a little too far
                // is harmless.
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

/// Appends the ends of a block's documents in a stretch without specials, as the places in the row
/// just after them.
fn push_ends(
    ends: &Ends<'_>,
    tokens: u64,
    stretch: &Stretch,
    found: &mut Vec<u64>,
    last: &mut Option<(BlockRef, u64, usize)>,
) {
    let from = stretch.from;
    // Most columns have their documents where the tokens have them. Else the share of the tokens
    // before the place tells about where to begin.
    let near = match *last {
        Some((block, place, document)) if (block, place) == (stretch.block, from) => document,
        _ => (u128::from(from) * ends.len() as u128 / u128::from(tokens.max(1))) as usize,
    };
    let low = first_end_after(ends, from, near);
    *last = Some((stretch.block, from, low));
    let inside = (low..ends.len()).map(|document| ends.get(document)).take_while(|end| *end <= stretch.to);
    found.extend(inside.map(|end| stretch.place + (end - stretch.from)));
}

/// Makes the error for an id of a shard that is decoded block by block, like [`in_row`].
#[cold]
fn in_block(shard: &OpenShard, block: usize, start: u64, unfit: UnfitId) -> Error {
    let error = unfit.error();
    match shard.row_of(shard.before()[block].tokens + start + unfit.index as u64) {
        Some(row) => error.at_row(row),
        None => error,
    }
}

/// The first document that ends after token `from` of the block. The search begins at document
/// `near`, with steps that double. Its reads share cache lines, unlike those of a binary search.
fn first_end_after(ends: &Ends<'_>, from: u64, near: usize) -> usize {
    let count = ends.len();
    let (mut at, mut step) = (near.min(count.saturating_sub(1)), 1);
    let (mut low, mut high) = (0, at);
    if count > 0 && ends.get(at) > from {
        // All documents from `high` on end after `from`.
        while high > 0 {
            at = high.saturating_sub(step);
            if ends.get(at) <= from {
                low = at + 1;
                break;
            }
            (high, step) = (at, step * 2);
        }
    } else {
        while at < count && ends.get(at) <= from {
            low = at + 1;
            (at, step) = (at + step, step * 2);
        }
        high = at.min(count);
    }
    while low < high {
        let middle = low + (high - low) / 2;
        if ends.get(middle) > from { high = middle } else { low = middle + 1 }
    }
    low
}

/// Makes the error for an id in a run that begins at token `start` of block `block`. Adds the row
/// of the shard.
fn in_row(shard: &dyn RandomShard, block: usize, start: u64, unfit: UnfitId) -> Error {
    let error = unfit.error();
    match shard.row_of(block, start + unfit.index as u64) {
        Some(row) => error.at_row(row),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_next_end_is_found_from_anywhere(
            lengths in prop::collection::vec(1u32..9, 0..40), from in 0u64..400, near in 0usize..50,
        ) {
            let ends: Vec<u32> = lengths.iter().scan(0, |sum, len| { *sum += len; Some(*sum) }).collect();
            let wanted = ends.iter().filter(|end| u64::from(**end) <= from).count();
            prop_assert_eq!(first_end_after(&Ends::List(&ends), from, near), wanted);
        }
    }
}
