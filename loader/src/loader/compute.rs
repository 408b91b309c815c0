//! Computes a batch from its rows alone.
//!
//! Iteration, `batch_at` and `sequences_at` share [`Session::compute`]. Workers also look ahead
//! from here. They ask for the windows of later batches, and decode the blocks that these batches
//! will read.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::batch::{Batch, BatchLayout, IGNORED_LABEL};
use super::pass::PassRange;
use super::rows::{PositionedRow, batch_rows_into};
use super::session::Session;
use crate::buffer::pool::Pool;
use crate::buffer::{BufferSource, Lease};
use crate::corpus::schema::{Missing, SchemaField, Side};
use crate::error::Result;
use crate::fill::{Ahead, FieldRow, Id, Places, Row};
use crate::loader::sources::{Growth, Orders, RowRead, RowReads};
use crate::proof::checksum::Checksum;
use crate::read::{NeededBy, Padding, Prepared, RowRequest, Scratch, StreamLocation};
use crate::settings::Targets;
use crate::tokens::Dtype;

/// While everything is found in memory, only every 16th batch is examined.
const LOOK_EVERY: u64 = 16;

/// Memory and times of one worker.
#[derive(Debug, Default)]
pub(super) struct WorkerMemory {
    pub(super) index: usize,
    pub(super) scratch: Scratch,
    pub(super) orders: Orders,
    pub(super) rows: Vec<PositionedRow>,
    pub(super) reads: RowReads,
}

impl Session {
    /// Computes the batch of `rows`, in its own memory.
    pub(super) fn compute_alone(
        &self,
        growth: &Growth,
        start: (u64, u64),
        step: u64,
        rows: &[PositionedRow],
    ) -> Result<Arc<Batch>> {
        // No worker of a pass computes this, so that nothing watches its reads.
        let mut worker = WorkerMemory { index: usize::MAX, ..WorkerMemory::default() };
        let mut reads = RowReads::default();
        self.reads_into(growth, rows, &mut worker.orders, &mut worker.scratch, &mut reads)?;
        let bytes = self.layout(rows.len()).bytes;
        let memory: Arc<dyn BufferSource> = Arc::new(Pool::new(bytes, 0));
        let lease = Lease::new(&memory, bytes);
        Ok(Arc::new(self.compute(start, step, &reads, lease, &mut worker)?))
    }

    /// The layout of a batch of `rows` rows.
    fn layout(&self, rows: usize) -> Cow<'_, BatchLayout> {
        if rows == self.layout.rows {
            return Cow::Borrowed(&self.layout);
        }
        Cow::Owned(BatchLayout::new(&self.config, &self.opened.schema, rows))
    }

    /// The batch of `rows`, the first of which stands at `start` of global batch `step`, in the memory of `lease`.
    pub(super) fn compute(
        &self,
        start: (u64, u64),
        step: u64,
        reads: &RowReads,
        mut lease: Lease,
        worker: &mut WorkerMemory,
    ) -> Result<Batch> {
        let seq_len = self.config.seq_len as usize;
        let rows = &reads.rows;
        let layout = self.layout(rows.len());
        let row_bytes = seq_len * layout.input_dtype.size();
        let mut next = rows.first().and_then(|row| self.find(reads, row));
        for (index, row) in rows.iter().enumerate() {
            let spot = std::mem::replace(&mut next, rows.get(index + 1).and_then(|row| self.find(reads, row)));
            let ahead = next.map_or(Ahead::NONE, |spot| spot.ahead);
            let row = row.as_ref().map(|place| {
                let segments = reads.segments(place);
                (place, RowRequest { segments, ends_chunk: place.ends_chunk, begin: spot, ahead })
            });
            if !layout.fields_at.is_empty() {
                self.compare_columns(row, &mut worker.scratch);
            }
            let (inputs_at, targets_at) = (index * row_bytes, layout.targets_at + index * seq_len * 8);
            if layout.input_dtype == Dtype::I32 {
                let (ids, labels) = lease.i32s_and_i64s(inputs_at, targets_at, seq_len);
                self.fill_row(row, ids, labels, worker)?;
            } else {
                let (ids, labels) = lease.i64s_and_i64s(inputs_at, targets_at, seq_len);
                self.fill_row(row, ids, labels, worker)?;
            }
            for (field, at) in self.opened.schema.iter().zip(&layout.fields_at) {
                let size = seq_len * field.dtype.size();
                self.fill_field(field, row, lease.bytes(at + index * size, size), worker)?;
            }
        }
        if let Some([sources_at, indices_at]) = layout.ids_at {
            let ids =
                |of: fn(&RowRead) -> u64| rows.iter().map(move |row| row.as_ref().map_or(-1, |place| of(place) as i64));
            for (out, id) in lease.i64s(sources_at, rows.len()).iter_mut().zip(ids(|place| place.source as u64)) {
                *out = id;
            }
            for (out, id) in lease.i64s(indices_at, rows.len()).iter_mut().zip(ids(|place| place.sequence)) {
                *out = id;
            }
        }
        let (epoch, position) = start;
        let fields = Arc::clone(&layout.fields);
        let mut batch = Batch { epoch, step, position, rows: rows.len(), fields, checksum: None, lease };
        if self.covers.load(Ordering::Relaxed) {
            let mut checksum = Checksum::default();
            for (index, place) in rows.iter().enumerate() {
                if let Some(place) = place.as_ref().filter(|place| !place.repeated) {
                    let corpus = self.opened.sources.list()[place.source].reader.corpus();
                    let schema = &self.opened.schema;
                    let is_there =
                        |(number, field): (usize, &'_ SchemaField)| corpus.field_dtype(number).map(|_| *field);
                    let fields = || schema.iter().enumerate().filter_map(is_there);
                    let has_labels = fields().any(|field| field.name == "labels");
                    let (source, count) = (place.source as u64, place.tokens as usize);
                    checksum.add_row(source, place.sequence, &batch.tokens(index, count, has_labels)?);
                    for field in fields() {
                        let values = batch.field_values(&field, index, count);
                        checksum.add_field(source, place.sequence, field.name, &values);
                    }
                }
            }
            batch.checksum = Some(checksum);
        }
        Ok(batch)
    }

    /// Decodes a block that the batch at index `start` of a pass will read and that is not decoded
    /// yet.
    pub(super) fn decode_ahead(&self, run: &PassRange, start: u64, worker: &mut WorkerMemory) -> Result<Prepared> {
        let WorkerMemory { index: worker_index, orders, rows, reads, scratch, .. } = worker;
        let (epoch, position) = batch_rows_into(self.grouping, &run.epochs, start, rows);
        let needed =
            NeededBy { session: self.in_cache, position: self.opened.sources.global_position(epoch, position) };
        self.reads_into(&run.growth, rows, orders, scratch, reads)?;
        for (place, segments) in reads.iter() {
            let reader = &self.opened.sources.list()[place.source].reader;
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
        let WorkerMemory { orders, rows, reads, scratch, .. } = worker;
        batch_rows_into(self.grouping, &run.epochs, start, rows);
        // A failure here appears again when the batch is computed.
        if self.reads_into(&run.growth, rows, orders, scratch, reads).is_err() {
            return;
        }
        for (place, segments) in reads.iter() {
            let reader = &self.opened.sources.list()[place.source].reader;
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
        self.opened.sources.list()[place.source].reader.find(first.start)
    }

    /// Lets the row note where its documents end, if its source has further columns to compare
    /// with.
    fn compare_columns(&self, row: Option<(&RowRead, RowRequest<'_>)>, scratch: &mut Scratch) {
        if let Some((read, _)) = row {
            self.opened.sources.list()[read.source].reader.compare_columns(scratch);
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
        let is_behind = self.config.targets == Targets::Shifted && field.side == Side::Target;
        let mut row = FieldRow::new(bytes, field.dtype, field.special, usize::from(is_behind));
        let Some((read, request)) = request else {
            row.fill(field.padding);
            return Ok(());
        };
        let reader = &self.opened.sources.list()[read.source].reader;
        let index = self.opened.schema.iter().position(|other| other == field).expect("a field of the schema");
        match field.missing {
            _ if reader.corpus().field_dtype(index).is_some() => {
                return reader.fill_field(index, request, field.padding, row, &mut worker.scratch);
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

    /// Writes one row; without a request the row is padding. Padded places hold `pad_id`, and their labels
    /// [`IGNORED_LABEL`].
    fn fill_row<T: Id>(
        &self,
        request: Option<(&RowRead, RowRequest<'_>)>,
        ids: &mut [T],
        labels: &mut [i64],
        worker: &mut WorkerMemory,
    ) -> Result<()> {
        let padding = Padding { id: self.config.pad_id, label: IGNORED_LABEL };
        let row = match self.config.targets {
            Targets::Labels => Row::with_labels(ids, labels),
            Targets::Shifted => Row::with_shifted_labels(ids, labels),
        };
        match request {
            None => row.pad(padding.id, padding.label),
            Some((read, request)) => {
                if let Some(first) = request.segments.first() {
                    self.slow_reads.read(worker.index, read.source, first.start);
                }
                let reader = &self.opened.sources.list()[read.source].reader;
                reader.fill(request, padding, row, &mut worker.scratch)?;
            }
        }
        Ok(())
    }
}
