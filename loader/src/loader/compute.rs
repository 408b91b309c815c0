//! Computes a batch from its rows alone.
//!
//! Iteration, `batch_at` and `sequences_at` share [`Session::compute`]. Workers also look ahead
//! from here. They ask for the windows of later batches, and decode the blocks that these batches
//! will read.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::batch::{Batch, BatchLayout, Borders, BoundariesAt, ColumnsFound};
use super::batch_rows::PositionedRow;
use super::boundaries::{Span, Spans, masked_places, write_mask, write_places};
use super::documents::{DocumentRows, DocumentValues, SpanDocuments};
use super::pass::PassRange;
use super::served::{RowFacts, RowOrigin};
use super::session::Session;
use crate::buffer::Lease;
use crate::corpus::schema::{Missing, SchemaField, TokenSide};
use crate::error::{Error, Result};
use crate::fill::{Ahead, FieldRow, Id, Places, TokenRow};
use crate::loader::sources::{Growth, Orders, RowRead, RowReads};
use crate::order::epochs::EpochChain;
use crate::order::partition::Grouping;
use crate::proof::checksum::Checksum;
use crate::read::{NeededBy, Padding, Prepared, ReadMemory, RowRequest, StreamLocation};
use crate::settings::{OnError, PackedBy, Targets};
use crate::tokens::Dtype;

/// While everything is found in memory, only every 16th batch is examined.
const LOOK_EVERY: u64 = 16;

/// Memory and times of one worker.
#[derive(Debug, Default)]
pub(super) struct WorkerMemory {
    pub(super) index: usize,
    pub(super) scratch: ReadMemory,
    pub(super) orders: Orders,
    pub(super) rows: Vec<PositionedRow>,
    pub(super) reads: RowReads,
    pub(super) spans: Spans,
    pub(super) documents: SpanDocuments,
}

impl WorkerMemory {
    /// Memory for a batch that no worker of a pass computes, so that nothing watches its reads.
    fn alone() -> Self {
        Self { index: usize::MAX, ..Self::default() }
    }
}

impl Session {
    /// Computes the batch of `rows`, in its own memory.
    pub(super) fn compute_rows(
        &self,
        growth: &Growth,
        start: (u64, u64),
        step: u64,
        rows: &[PositionedRow],
    ) -> Result<Arc<Batch>> {
        let mut worker = WorkerMemory::alone();
        worker.rows.extend_from_slice(rows);
        let WorkerMemory { orders, scratch, reads, .. } = &mut worker;
        self.reads_into(growth, rows, orders, scratch, reads)?;
        self.compute_alone(start, step, worker)
    }

    /// Computes the batch that a rank gets at `step`, in its own memory.
    pub(super) fn compute_step(
        &self,
        growth: &Growth,
        grouping: Grouping,
        epochs: &EpochChain,
        step: u64,
    ) -> Result<Arc<Batch>> {
        let mut worker = WorkerMemory::alone();
        let start = self.plan_batch(growth, grouping, epochs, step * grouping.global_batch(), 1, &mut worker)?;
        self.compute_alone(start, step, worker)
    }

    /// Computes the batch of the rows that `worker` has planned, in its own memory.
    fn compute_alone(&self, start: (u64, u64), step: u64, mut worker: WorkerMemory) -> Result<Arc<Batch>> {
        let mut reads = std::mem::take(&mut worker.reads);
        let bytes = self.layout(reads.rows.len(), self.config.seq_len as usize).bytes;
        Ok(Arc::new(self.compute_sound(start, step, 1, &mut reads, Lease::alone(bytes), &mut worker)?))
    }

    /// The layout of a batch of `rows` rows with `columns` places each.
    pub(super) fn layout(&self, rows: usize, columns: usize) -> Cow<'_, BatchLayout> {
        if (rows, columns) == (self.layout.rows, self.layout.columns) {
            return Cow::Borrowed(&self.layout);
        }
        Cow::Owned(BatchLayout::new(&self.config, &self.opened.schema, rows, columns))
    }

    /// Number of places of each row of the batch that consists of `reads`.
    pub(super) fn columns_of(&self, reads: &RowReads) -> usize {
        let seq_len = self.config.seq_len;
        let Some(multiple) = self.config.pad_to_multiple else { return seq_len as usize };
        let ends = reads.iter().filter_map(|(_, segments)| segments.last()).map(|last| last.place + last.len);
        // Every token of a shorter row has a place among the inputs, in a batch of any length. So
        // the checksum of a row does not depend on its batch.
        let longest = ends.max().unwrap_or(0);
        longest.max(1).next_multiple_of(multiple).min(seq_len) as usize
    }

    /// Computes the batch of `rows` in the memory of `lease`. Its first row is at `start` of global
    /// batch `step`. The rows of each of `parts` consumers are stored together.
    ///
    /// An error of the data comes with the memory, so that the caller can use it again.
    pub(super) fn compute(
        &self,
        start: (u64, u64),
        step: u64,
        parts: usize,
        reads: &RowReads,
        mut lease: Lease,
        worker: &mut WorkerMemory,
    ) -> Result<Batch, (Error, Option<Lease>)> {
        let documents = match self.fill(parts, reads, &mut lease, worker) {
            Ok(documents) => documents,
            Err(error) => return Err((error, Some(lease))),
        };
        let layout = self.layout(reads.rows.len(), self.columns_of(reads));
        let origin = |row: usize| reads.rows[row].as_ref().map(RowOrigin::of);
        let spans = self.has_spans().then_some(&worker.spans);
        let rows = (reads.rows.len(), &origin as &dyn Fn(usize) -> _);
        self.finish(start, step, &layout, parts, rows, spans, documents, lease).map_err(|error| (error, None))
    }

    /// Writes the arrays of the batch of `reads` to `lease`, and returns its per-document columns.
    fn fill(
        &self,
        parts: usize,
        reads: &RowReads,
        lease: &mut Lease,
        worker: &mut WorkerMemory,
    ) -> Result<Option<DocumentValues>> {
        let (rows, columns) = (&reads.rows, self.columns_of(reads));
        let layout = self.layout(rows.len(), columns);
        let row_bytes = columns * layout.input_dtype.size();
        let joins = self.config.layout.joins();
        let lead = (self.config.row_tokens() - self.config.seq_len) as usize;
        let places = (columns + lead) as u64;
        let has_spans = self.has_spans();
        worker.spans.clear();
        worker.documents.clear();
        worker.scratch.documents = (!self.opened.schema.documents.is_empty()).then(Vec::new);
        // The borders inside segments are found while a row is filled.
        let finds_borders = joins || self.config.packed_by != PackedBy::None;
        worker.scratch.borders = (layout.boundaries.is_some() && finds_borders).then(Vec::new);
        // A prefix of a block may be sound where the block is damaged. Which rows are replaced must
        // not depend on what other rows left in the cache.
        let reads_prefixes = self.config.on_error != OnError::Substitute;
        let mut next = rows.first().and_then(|row| self.find(reads, row));
        for (index, row) in rows.iter().enumerate() {
            let spot = std::mem::replace(&mut next, rows.get(index + 1).and_then(|row| self.find(reads, row)));
            let ahead = next.map_or(Ahead::NONE, |spot| spot.ahead);
            let row = row.as_ref().map(|place| {
                let segments = reads.segments(place);
                let ends_chunk = place.ends_chunk && reads_prefixes;
                (place, RowRequest { segments, ends_chunk, begin: spot, ahead })
            });
            if !layout.fields_at.is_empty() {
                self.compare_columns(row, &mut worker.scratch);
            }
            let (inputs_at, targets_at) = (index * row_bytes, layout.targets_at + index * columns * 8);
            if layout.input_dtype == Dtype::I32 {
                let (ids, labels) = lease.i32s_and_i64s(inputs_at, targets_at, columns);
                self.fill_row(row, ids, labels, worker)?;
            } else {
                let (ids, labels) = lease.i64s_and_i64s(inputs_at, targets_at, columns);
                self.fill_row(row, ids, labels, worker)?;
            }
            for (field, at) in self.opened.schema.fields.iter().zip(&layout.fields_at) {
                let size = columns * field.dtype.size();
                self.fill_field(field, row, lease.bytes(at + index * size, size), worker)?;
            }
            if !has_spans {
                continue;
            }
            let segments = rows[index].as_ref().map_or(&[][..], |place| reads.segments(place));
            let ends = worker.scratch.borders.as_deref().unwrap_or_default();
            worker.spans.push_row(segments, ends, places);
            worker.scratch.borders.as_mut().map(Vec::clear);
            if let Some(noted) = &mut worker.scratch.documents {
                let reader = rows[index].as_ref().map(|read| self.opened.sources.list()[read.source].reader());
                worker.documents.push_row(reader, worker.spans.row(index), noted);
                noted.clear();
            }
            if let Some(at) = &layout.boundaries {
                let spans = worker.spans.row(index);
                let labels = lease.i64s(targets_at, columns);
                for place in masked_places(spans, lead).filter(|place| *place < columns) {
                    labels[place] = self.config.ignore_index;
                }
                let documents = at.documents + index * columns * 4;
                if let Some(positions) = at.positions {
                    let positions = positions + index * columns * 8;
                    let (documents, positions) = lease.i64s_and_i32s(positions, documents, columns);
                    write_places(spans, Some(positions), documents);
                } else {
                    write_places(spans, None, lease.i32s(documents, columns));
                }
                if let Some(mask) = at.mask {
                    let size = columns * columns;
                    write_mask(spans, columns, lease.bytes(mask + index * size, size));
                }
                self.mask_fields(&layout, index, spans, lead, lease);
            }
        }
        self.documents_of(&layout, reads, parts, worker)
    }

    /// Makes the batch of `rows` rows whose arrays stand in `lease`, except for those that follow
    /// from the spans and origins of its rows. `rows` is their number and the origin of each. The
    /// rows of each of `parts` consumers are stored together.
    #[expect(clippy::too_many_arguments, reason = "these are the parts of a batch")]
    pub(super) fn finish(
        &self,
        start: (u64, u64),
        step: u64,
        layout: &BatchLayout,
        parts: usize,
        (rows, origin): (usize, &dyn Fn(usize) -> Option<RowOrigin>),
        spans: Option<&Spans>,
        documents: Option<DocumentValues>,
        mut lease: Lease,
    ) -> Result<Batch> {
        let borders = layout.boundaries.as_ref().zip(spans);
        let borders =
            borders.map(|(at, spans)| self.write_borders(at, parts, layout, spans, &mut lease)).transpose()?;
        if let Some([sources_at, indices_at]) = layout.ids_at {
            let ids = |of: fn(RowOrigin) -> u64| (0..rows).map(move |row| origin(row).map_or(-1, |row| of(row) as i64));
            for (out, id) in lease.i64s(sources_at, rows).iter_mut().zip(ids(|row| row.source as u64)) {
                *out = id;
            }
            for (out, id) in lease.i64s(indices_at, rows).iter_mut().zip(ids(|row| row.sequence)) {
                *out = id;
            }
        }
        let (epoch, position) = start;
        let mut fields = Arc::clone(&layout.fields);
        if let Some([whole]) = borders.as_deref() {
            let values = documents.iter().flat_map(|documents| documents.fields(0)).copied();
            fields = fields.iter().copied().chain([whole.field()]).chain(values).collect();
        }
        let tokens = match self.config.layout.joins() {
            true => rows as u64 * self.config.seq_len,
            false => (0..rows).filter_map(origin).map(|row| row.tokens).sum(),
        };
        let facts = self.keeps_facts().then(|| {
            let spans = spans.cloned().unwrap_or_default();
            Box::new(RowFacts { origins: (0..rows).map(origin).collect(), spans })
        });
        let mut batch = Batch {
            epoch,
            step,
            position,
            rows,
            fields,
            checksum: None,
            tokens,
            borders,
            documents,
            facts,
            substitutions: Vec::new(),
            lease,
        };
        if self.covers.load(Ordering::Relaxed) {
            batch.checksum = Some(self.checksum_of(&batch, (rows, origin), parts, spans)?);
        }
        Ok(batch)
    }

    /// Writes the padding value of each field to the places whose target is the first token of a
    /// document.
    fn mask_fields(&self, layout: &BatchLayout, row: usize, spans: &[Span], lead: usize, lease: &mut Lease) {
        for (field, at) in self.opened.schema.fields.iter().zip(&layout.fields_at) {
            if field.side == TokenSide::Input {
                continue;
            }
            let (size, value) = (field.dtype.size(), field.dtype.encode(field.padding));
            for place in masked_places(spans, lead).filter(|place| *place < layout.columns) {
                lease.bytes(at + (row * layout.columns + place) * size, size).copy_from_slice(&value[..size]);
            }
        }
    }

    /// The values of per-document columns in the rows of `reads`. `None` if there are no such
    /// columns.
    fn documents_of(
        &self,
        layout: &BatchLayout,
        reads: &RowReads,
        parts: usize,
        worker: &WorkerMemory,
    ) -> Result<Option<DocumentValues>> {
        let fields = &self.opened.schema.documents;
        if fields.is_empty() {
            return Ok(None);
        }
        let rows = DocumentRows {
            sources: &self.opened.sources,
            reads,
            spans: &worker.spans,
            documents: &worker.documents,
            columns: layout.columns,
            stretches: layout.boundaries.and_then(|at| at.width).map(|width| width - 1),
        };
        rows.read(fields, parts).map(Some)
    }

    /// The checksum of the rows of `batch`. `spans` gives the spans of each row, unless a row is
    /// one stretch of the stream.
    fn checksum_of(
        &self,
        batch: &Batch,
        (rows, origin): (usize, &dyn Fn(usize) -> Option<RowOrigin>),
        parts: usize,
        spans: Option<&Spans>,
    ) -> Result<Checksum> {
        let joins = self.config.layout.joins();
        let places = batch.columns() as u64 + self.config.row_tokens() - self.config.seq_len;
        let mut checksum = Checksum::default();
        for index in 0..rows {
            let Some(read) = origin(index).filter(|read| !read.repeated) else { continue };
            let source = &self.opened.sources.list()[read.source];
            let is_there = |field: &&SchemaField| source.has_field(field.column);
            let fields = || self.opened.schema.fields.iter().filter(is_there);
            let has = |name| fields().any(|field| field.name == name);
            let found = ColumnsFound { labels: has("labels"), positions: has("position_ids") };
            let (number, sequence) = (read.source as u64, read.sequence);
            let whole = [Span { start: 0, tokens: read.tokens as u32, end: places as u32 }];
            let delivered = spans.map_or(&whole[..], |spans| spans.row(index));
            let mut tokens = batch.tokens(index, delivered, found, self.config.ignore_index)?;
            // Tokens that fill a joined row up were delivered before.
            let counted = if joins { read.tokens as u32 } else { places as u32 };
            let mut delivered = delivered.to_vec();
            delivered.retain(|span| span.tokens > 0 && span.start < counted);
            if let Some(last) = delivered.last_mut() {
                last.tokens = last.tokens.min(counted - last.start);
            }
            tokens.truncate(delivered.iter().map(|span| span.tokens as usize).sum());
            if spans.is_some() {
                let borders: Vec<_> = delivered.iter().map(|span| (span.start, span.tokens)).collect();
                checksum.add_row_of_spans(number, sequence, &tokens, &borders);
            } else {
                checksum.add_row(number, sequence, &tokens);
            }
            for field in fields() {
                let values = batch.field_values(field, index, &delivered);
                checksum.add_field(number, sequence, field.name, &values);
            }
            for field in &self.opened.schema.documents {
                let Some(values) = &batch.documents else { continue };
                let row = (index, rows / parts);
                let hashes = values.hashes(batch, field, row, &delivered, self.config.seq_len as usize);
                checksum.add_field(number, sequence, field.name, &hashes);
            }
        }
        Ok(checksum)
    }

    /// Writes `cu_seqlens` for the rows of each of `parts` consumers, and returns their places.
    fn write_borders(
        &self,
        at: &BoundariesAt,
        parts: usize,
        layout: &BatchLayout,
        spans: &Spans,
        lease: &mut Lease,
    ) -> Result<Vec<Borders>> {
        let (columns, of_part) = (layout.columns, layout.rows / parts);
        let capacity = at.width.unwrap_or(of_part * columns + 1);
        let mut all = Vec::with_capacity(parts);
        for part in 0..parts {
            let offset_bytes = at.cu_seqlens + part * capacity * 4;
            let out = lease.i32s(offset_bytes, capacity);
            let (mut len, mut longest) = (0, 0);
            for row in 0..of_part {
                let starts = spans.row(part * of_part + row).iter().map(|span| span.start as usize);
                for start in starts.filter(|start| *start < columns).map(|start| row * columns + start) {
                    if let Some(out) = out.get_mut(len) {
                        *out = start as i32;
                    }
                    if len > 0 && len < capacity {
                        longest = longest.max(start as i32 - out[len - 1]);
                    }
                    len += 1;
                }
            }
            let end = (of_part * columns) as i32;
            if len >= capacity {
                return Err(Error::config(format!(
                    "a batch needs {} values of `cu_seqlens`, more than `cu_seqlens_width` = {capacity}: raise it, \
                     or bound the documents of a row by `max_docs_per_row`",
                    len + 1
                )));
            }
            longest = longest.max(end - if len > 0 { out[len - 1] } else { 0 });
            out[len..].fill(end);
            let len = at.width.unwrap_or(len + 1);
            all.push(Borders { offset_bytes, len, longest: longest as u64 });
        }
        Ok(all)
    }

    /// Number of tokens at the positions with indices `range` of `epochs`. A row that cannot be
    /// planned counts as a full row.
    pub(super) fn tokens_of(&self, growth: &Growth, epochs: &EpochChain, range: Range<u64>) -> u64 {
        if self.config.layout.joins() {
            return (range.end - range.start) * self.config.seq_len;
        }
        if self.is_served() {
            return self.served_tokens(growth, epochs, range);
        }
        let WorkerMemory { mut orders, mut scratch, mut reads, .. } = WorkerMemory::default();
        let mut of_row = |index| {
            let (epoch, position) = epochs.at(index);
            let row = PositionedRow::Position { epoch, position, repeated: false };
            let planned = self.reads_into(growth, &[row], &mut orders, &mut scratch, &mut reads);
            let tokens = reads.iter().map(|(read, _)| read.tokens).sum();
            if planned.is_ok() { tokens } else { self.config.seq_len }
        };
        range.map(&mut of_row).sum()
    }

    /// Decodes a block that the batch at index `start` of a pass will read and that is not decoded
    /// yet.
    pub(super) fn decode_ahead(&self, run: &PassRange, start: u64, worker: &mut WorkerMemory) -> Result<Prepared> {
        let (epoch, position) = self.plan_batch(&run.growth, self.grouping, &run.epochs, start, 1, worker)?;
        let needed =
            NeededBy { session: self.in_cache, position: self.opened.sources.global_position(epoch, position) };
        let WorkerMemory { index: worker_index, reads, scratch, .. } = worker;
        for (place, segments) in reads.iter() {
            let reader = self.opened.sources.list()[place.source].reader();
            if !reader.decodes() {
                continue;
            }
            for (index, segment) in segments.iter().enumerate() {
                let ends_chunk = place.ends_chunk && index + 1 == segments.len();
                self.slow_reads.read(*worker_index, place.source, segment.start);
                let prepared = reader.decode_ahead(segment, ends_chunk, needed, scratch)?;
                if prepared != Prepared::Nothing {
                    return Ok(prepared);
                }
            }
        }
        Ok(Prepared::Nothing)
    }

    /// Asks the system for the windows that batch `number` of a pass, at index `start`, will read.
    ///
    /// While files are cold, it does so for every batch. Otherwise it does so now and then, to
    /// notice when files become cold.
    pub(super) fn read_ahead(&self, run: &PassRange, number: u64, start: u64, worker: &mut WorkerMemory) {
        let cold = self.cold.load(Ordering::Relaxed);
        if !cold && !number.is_multiple_of(LOOK_EVERY) {
            return;
        }
        if run.epochs.len().is_some_and(|end| start >= end) {
            return;
        }
        let mut asked = false;
        // A failure here appears again when the batch is computed.
        if self.plan_batch(&run.growth, self.grouping, &run.epochs, start, 1, worker).is_err() {
            return;
        }
        for (place, segments) in worker.reads.iter() {
            let reader = self.opened.sources.list()[place.source].reader();
            for segment in segments {
                asked |= reader.read_ahead(segment);
            }
        }
        if asked != cold {
            self.cold.store(asked, Ordering::Relaxed);
        }
    }

    /// The location where a row begins, if it is known without reading or decoding.
    fn find(&self, reads: &RowReads, row: &Option<RowRead>) -> Option<StreamLocation> {
        let place = row.as_ref()?;
        let first = reads.segments(place).first()?;
        self.opened.sources.list()[place.source].reader().find(first.start)
    }

    /// Lets the row note where its documents end, if its source has further columns to compare
    /// with.
    fn compare_columns(&self, row: Option<(&RowRead, RowRequest<'_>)>, scratch: &mut ReadMemory) {
        if let Some((read, _)) = row {
            self.opened.sources.list()[read.source].reader().compare_columns(scratch);
        }
    }

    /// Writes one row of a further column to `bytes`. Without a request, the row is padding.
    fn fill_field(
        &self,
        field: &SchemaField,
        request: Option<(&RowRead, RowRequest<'_>)>,
        bytes: &mut [u8],
        worker: &mut WorkerMemory,
    ) -> Result<()> {
        let is_behind = self.config.targets == Targets::Shifted && field.side == TokenSide::Target;
        let mut row = FieldRow::new(bytes, field.dtype, field.special, usize::from(is_behind));
        if field.name == "attention_mask" {
            row = row.only_ones();
        }
        let Some((read, request)) = request else {
            row.fill(field.padding);
            return Ok(());
        };
        let reader = self.opened.sources.list()[read.source].reader();
        match field.missing {
            _ if reader.corpus().field_type(field.column).is_some() => {
                return reader.fill_field(field.column, request, field.padding, row, &mut worker.scratch);
            }
            // The labels were written together with the tokens.
            Missing::Derived => {}
            Missing::Value(value) => {
                let mut place = 0;
                for segment in request.segments {
                    row.take((segment.place - place) as usize).fill(field.padding);
                    row.take(segment.len as usize).fill(value);
                    place = segment.place + segment.len;
                }
                row.fill(field.padding);
            }
            Missing::Refused => unreachable!("opening refused the source"),
        }
        Ok(())
    }

    /// Writes one row; without a request the row is padding. Padded places hold `pad_id`, and their
    /// labels `ignore_index`.
    fn fill_row<T: Id>(
        &self,
        request: Option<(&RowRead, RowRequest<'_>)>,
        ids: &mut [T],
        labels: &mut [i64],
        worker: &mut WorkerMemory,
    ) -> Result<()> {
        let padding = Padding { id: self.config.pad_id, label: self.config.ignore_index };
        let row = match self.config.targets {
            Targets::Labels => TokenRow::with_labels(ids, labels),
            Targets::Shifted => TokenRow::with_shifted_labels(ids, labels),
        };
        let row = row.with_vocabulary(self.config.vocab_size);
        match request {
            None => row.pad(padding.id, padding.label),
            Some((read, request)) => {
                if let Some(first) = request.segments.first() {
                    self.slow_reads.read(worker.index, read.source, first.start);
                }
                let reader = self.opened.sources.list()[read.source].reader();
                reader.fill(request, padding, row, &mut worker.scratch)?;
            }
        }
        Ok(())
    }
}
