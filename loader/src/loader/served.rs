//! Rows on their way between two processes: a service reads them, and a consumer makes batches.
//!
//! The service takes the parts of a computed batch ([`SentBatch`]). The consumer gets them as
//! [`ReceivedRows`], and writes the same batch into a buffer of its own. Arrays that follow from
//! others are not sent: labels made of the tokens, and all arrays of boundaries.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::batch::{Batch, BatchLayout, Field};
use super::boundaries::{Span, Spans, write_mask, write_places};
use super::description::{OpenedDescription, type_of_id, wider_id};
use super::documents::DocumentValues;
use super::pass::PassRange;
use super::session::Session;
use crate::buffer::Lease;
use crate::corpus::schema::{DocumentField, SchemaField};
use crate::error::{Error, ErrorKind, Result};
use crate::loader::sources::{Growth, RowRead};
use crate::order::epochs::EpochChain;
use crate::pipeline::Work;
use crate::settings::{Balance, Config, Targets};
use crate::sync::Cancel;
use crate::tokens::{DocumentType, Dtype};

/// Origin of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowOrigin {
    /// Index of its source. 0 without a mixture.
    pub source: usize,
    /// Its sequence in that source.
    pub sequence: u64,
    /// Number of tokens that it delivers for the first time.
    pub tokens: u64,
    /// Whether it was delivered before and only fills the last batch, or stands in the place of
    /// another row.
    pub repeated: bool,
}

impl RowOrigin {
    pub(super) fn of(read: &RowRead) -> Self {
        let repeated = read.repeated || read.substituted;
        Self { source: read.source, sequence: read.sequence, tokens: read.tokens, repeated }
    }
}

/// The facts about the rows of a batch that its arrays do not hold.
#[derive(Debug)]
pub(super) struct RowFacts {
    /// Origins of the rows. `None` for a row of padding.
    pub(super) origins: Vec<Option<RowOrigin>>,
    /// Spans of each row. Empty if neither boundaries nor the checksum need them.
    pub(super) spans: Spans,
}

/// The start of a pass, and its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassStart {
    /// The growth of the corpus, as a state has it. Empty for a corpus that did not grow.
    pub growth: String,
    /// An epoch of the pass.
    pub epoch: u64,
    /// Index of the first row among the positions of the pass.
    pub index: u64,
    /// Most batches of the pass.
    pub batches: u64,
    /// Number of consumers that share a batch.
    pub parts: u64,
}

/// Gives the rows of batches that another process reads.
pub trait RowService: fmt::Debug + Send + Sync {
    /// Describes the corpora, and their first `shards` shards.
    fn describe(&self, shards: &[u64]) -> Result<OpenedDescription>;

    /// Opens a stream of the batches from `start` on, under `config`. Does not wait for the
    /// service.
    fn open(self: Arc<Self>, config: &Config, format: &RowFormat, start: &PassStart) -> Box<dyn RowStream>;
}

/// A stream of batches.
pub trait RowStream: Send {
    /// Waits for the rows of the next batch, and hands them to `take`. Fails soon after another
    /// thread sets `cancel`.
    fn next(&mut self, cancel: &Cancel, take: &mut dyn FnMut(&ReceivedRows<'_>) -> Result<()>) -> Result<()>;
}

/// The rows of a batch, as a consumer gets them.
#[derive(Debug)]
pub struct ReceivedRows<'a> {
    /// Epoch and position of the first row.
    pub start: (u64, u64),
    /// Number of places of a row. A row of the arrays below may have more of them.
    pub columns: usize,
    /// Origins of the rows. `None` for a row of padding.
    pub origins: Vec<Option<RowOrigin>>,
    /// Ids of the inputs. With shifted targets, a row has one more: the last target.
    pub ids: Values<'a>,
    /// Whether a place has a target, one bit for each. `None` if the labels are a field.
    pub is_target: Option<Bits<'a>>,
    /// Values of the further columns, in the order of the schema.
    pub fields: Vec<Values<'a>>,
    /// Spans of the rows: place of the first token, number of tokens, and place after them. Empty
    /// if rows have no spans.
    pub spans: Vec<Vec<(u32, u32, u32)>>,
    /// Values of the per-document columns, in the order of the schema.
    pub documents: Vec<DocumentColumnValues<'a>>,
}

/// Values of all rows, each row with `width` values.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    /// Type of a value.
    pub dtype: Dtype,
    /// The values, little-endian.
    pub bytes: &'a [u8],
    /// Number of values of a row.
    pub width: usize,
}

/// Bits of all rows, each row with `width` bits. The lowest bit of a byte comes first.
#[derive(Clone, Copy, Debug)]
pub struct Bits<'a> {
    /// The bits.
    pub bytes: &'a [u8],
    /// Number of bits before the first row.
    pub offset: usize,
    /// Number of bits of a row.
    pub width: usize,
}

/// Values of a per-document column: for each row, the values of its stretches. `None` is null.
#[derive(Clone, Debug)]
pub struct DocumentColumnValues<'a> {
    /// Values of each row.
    pub rows: Vec<Vec<Option<Cow<'a, [u8]>>>>,
}

/// A computed batch, as a service sends it.
#[derive(Clone, Copy, Debug)]
pub struct SentBatch<'a> {
    batch: &'a Batch,
    facts: &'a RowFacts,
    parts: usize,
}

/// The arrays of a batch that travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowFormat {
    /// Type of the ids.
    pub ids: Dtype,
    /// Number of places of a row.
    pub columns: usize,
    /// Number of ids of a row: one more than places if targets are shifted.
    pub row_ids: usize,
    /// Whether a bit for each place tells if it has a target.
    pub has_targets: bool,
    /// The further columns.
    pub fields: Vec<SchemaField>,
    /// The per-document columns.
    pub documents: Vec<DocumentField>,
    /// Whether rows have spans.
    pub has_spans: bool,
}

impl Session {
    /// The arrays that travel for a batch of this session, if the corpora have ids of type `ids`.
    pub(super) fn row_format(&self, ids: Dtype) -> RowFormat {
        let (config, schema) = (&self.config, &self.opened.schema);
        RowFormat {
            ids: wider_id(ids, type_of_id(config.pad_id)),
            columns: config.seq_len as usize,
            row_ids: config.row_tokens() as usize,
            has_targets: schema.fields.iter().all(|field| field.name != "labels"),
            fields: schema.fields.clone(),
            documents: schema.documents.clone(),
            has_spans: self.has_spans(),
        }
    }

    /// Whether a row is more than one stretch of the stream.
    pub(super) fn has_spans(&self) -> bool {
        self.layout.boundaries.is_some() || !self.config.layout.joins()
    }

    /// Writes the batch of `received` rows into `lease`. Its step is `step`. The rows of each of
    /// `parts` consumers follow each other.
    pub(super) fn assemble(
        &self,
        received: &ReceivedRows<'_>,
        step: u64,
        parts: usize,
        mut lease: Lease,
    ) -> Result<Batch> {
        let (rows, columns) = (received.origins.len(), received.columns);
        self.check_received(received)?;
        let layout = self.layout(rows, columns);
        let is_shifted = self.config.targets == Targets::Shifted;
        let lead = usize::from(is_shifted);
        let mut spans = Spans::default();
        for row in 0..rows {
            let row_bytes = columns * layout.input_dtype.size();
            let (inputs_at, targets_at) = (row * row_bytes, layout.targets_at + row * columns * 8);
            let ids = received.ids.row(row);
            if layout.input_dtype == Dtype::I32 {
                let most = widen(received.ids.dtype, ids, lease.i32s(inputs_at, columns), |id| id as i32);
                if most > i64::from(i32::MAX) {
                    let text = format!("id {most} does not fit int32: set `input_dtype` to int64");
                    return Err(Error::data(text).at_row(row as u64));
                }
            } else {
                widen(received.ids.dtype, ids, lease.i64s(inputs_at, columns), |id| id);
            }
            if let Some(bits) = &received.is_target {
                let labels = lease.i64s(targets_at, columns);
                widen(received.ids.dtype, &ids[lead * received.ids.dtype.size()..], labels, |id| id);
                bits.clear_unset(row, labels, self.config.ignore_index);
            }
            for ((field, at), values) in self.opened.schema.fields.iter().zip(&layout.fields_at).zip(&received.fields) {
                let size = columns * field.dtype.size();
                lease.bytes(at + row * size, size).copy_from_slice(&values.row(row)[..size]);
            }
            let Some(found) = received.spans.get(row) else { continue };
            let found = found.iter().map(|&(start, tokens, end)| Span { start, tokens, end });
            spans.push_spans(found);
            if let Some(at) = &layout.boundaries {
                let spans = spans.row(row);
                let documents = at.documents + row * columns * 4;
                if let Some(positions) = at.positions {
                    let positions = positions + row * columns * 8;
                    let (documents, positions) = lease.i64s_and_i32s(positions, documents, columns);
                    write_places(spans, Some(positions), documents);
                } else {
                    write_places(spans, None, lease.i32s(documents, columns));
                }
                if let Some(mask) = at.mask {
                    let size = columns * columns;
                    write_mask(spans, columns, lease.bytes(mask + row * size, size));
                }
            }
        }
        let documents = self.received_documents(received, &layout, parts, &spans)?;
        let origin = |row: usize| received.origins[row];
        self.finish(
            received.start,
            step,
            &layout,
            parts,
            (rows, &origin),
            self.has_spans().then_some(&spans),
            documents,
            lease,
        )
    }

    /// Fails unless `received` has the arrays of this session's batches.
    fn check_received(&self, received: &ReceivedRows<'_>) -> Result<()> {
        let (rows, columns) = (received.origins.len(), received.columns);
        let schema = &self.opened.schema;
        let lead = usize::from(self.config.targets == Targets::Shifted);
        let fits = |values: &Values<'_>, least: usize| {
            values.width >= least && values.bytes.len() >= rows * values.width * values.dtype.size()
        };
        let is_sound = rows >= 1
            && columns >= 1
            && columns <= self.config.seq_len as usize
            && matches!(received.ids.dtype, Dtype::U16 | Dtype::U32 | Dtype::I64)
            && fits(&received.ids, columns + lead)
            && received.fields.len() == schema.fields.len()
            && received
                .fields
                .iter()
                .zip(&schema.fields)
                .all(|(values, field)| values.dtype == field.dtype && fits(values, columns))
            && received.documents.len() == schema.documents.len()
            && received.documents.iter().all(|column| column.rows.len() == rows)
            && received.spans.len() == if self.has_spans() { rows } else { 0 }
            && received.is_target.is_some() == schema.fields.iter().all(|field| field.name != "labels")
            && received
                .is_target
                .as_ref()
                .is_none_or(|bits| bits.width >= columns && bits.bytes.len() * 8 >= bits.offset + rows * bits.width)
            && received.origins.iter().flatten().all(|origin| origin.source < self.opened.sources.list().len());
        let places = (columns + lead) as u32;
        let are_sorted = |spans: &Vec<(u32, u32, u32)>| {
            let mut at = 0;
            spans.iter().all(|(start, tokens, end)| {
                let is_next = *start >= at && start.checked_add(*tokens).is_some_and(|last| last <= *end);
                at = *end;
                is_next && *end <= places
            })
        };
        if is_sound && received.spans.iter().all(are_sorted) {
            return Ok(());
        }
        let text =
            "the service sent a batch with other arrays than its settings have; serve and read with the same version";
        Err(Error::new(ErrorKind::Data, text))
    }

    /// The per-document values of `received`, as a batch has them.
    fn received_documents(
        &self,
        received: &ReceivedRows<'_>,
        layout: &BatchLayout,
        parts: usize,
        spans: &Spans,
    ) -> Result<Option<DocumentValues>> {
        let fields = &self.opened.schema.documents;
        if fields.is_empty() {
            return Ok(None);
        }
        let rows = received.origins.len();
        let counts: Vec<usize> = (0..rows)
            .map(|row| spans.row(row).iter().filter(|span| (span.start as usize) < layout.columns).count())
            .collect();
        let width = layout.boundaries.and_then(|at| at.width).map(|width| width - 1);
        let mut values = DocumentValues::new(fields, parts, &counts, width);
        for (field, column) in fields.iter().zip(&received.documents) {
            let size = match field.kind {
                DocumentType::Number(dtype) => Some(dtype.size()),
                DocumentType::Text => None,
            };
            for (row, found) in column.rows.iter().enumerate() {
                if found.len() != counts[row]
                    || found.iter().flatten().any(|value| size.is_some_and(|size| size != value.len()))
                {
                    let text = format!(
                        "the service sent {} values of `{}` for row {row}, expected {}",
                        found.len(),
                        field.name,
                        counts[row]
                    );
                    return Err(Error::new(ErrorKind::Data, text));
                }
                for (stretch, value) in found.iter().enumerate() {
                    values.set_in_row(rows / parts, row, field, stretch, value.as_deref());
                }
            }
        }
        Ok(Some(values))
    }
}

impl<'a> Values<'a> {
    fn row(&self, row: usize) -> &'a [u8] {
        let size = self.width * self.dtype.size();
        &self.bytes[row * size..(row + 1) * size]
    }
}

impl Bits<'_> {
    fn get(&self, at: usize) -> bool {
        let at = self.offset + at;
        self.bytes[at / 8] >> (at % 8) & 1 == 1
    }

    /// Writes `value` to the places of `labels` whose bit in row `row` is not set.
    fn clear_unset(&self, row: usize, labels: &mut [i64], value: i64) {
        let first = row * self.width;
        let mut place = 0;
        while place < labels.len() {
            let at = self.offset + first + place;
            if at.is_multiple_of(8) && self.bytes[at / 8] == 0xff {
                place += 8;
                continue;
            }
            if !self.get(first + place) {
                labels[place] = value;
            }
            place += 1;
        }
    }
}

/// Writes the first ids of `ids` to `out`, as `of` converts them. Returns the largest id.
fn widen<T>(dtype: Dtype, ids: &[u8], out: &mut [T], of: impl Fn(i64) -> T) -> i64 {
    match dtype {
        Dtype::U16 => widen_from(ids.as_chunks::<2>().0, out, |id| i64::from(u16::from_le_bytes(id)), of),
        Dtype::U32 => widen_from(ids.as_chunks::<4>().0, out, |id| i64::from(u32::from_le_bytes(id)), of),
        _ => widen_from(ids.as_chunks::<8>().0, out, i64::from_le_bytes, of),
    }
}

fn widen_from<const N: usize, T>(
    ids: &[[u8; N]],
    out: &mut [T],
    value: impl Fn([u8; N]) -> i64,
    of: impl Fn(i64) -> T,
) -> i64 {
    let mut most = 0;
    for (out, id) in out.iter_mut().zip(ids) {
        let id = value(*id);
        most = most.max(id);
        *out = of(id);
    }
    most
}

impl Batch {
    /// The batch as a service sends it. `None` unless the loader keeps the facts about rows.
    pub fn sent(&self, parts: usize) -> Option<SentBatch<'_>> {
        let facts = self.facts.as_deref()?;
        Some(SentBatch { batch: self, facts, parts: parts.max(1) })
    }
}

impl SentBatch<'_> {
    /// Origins of the rows. `None` for a row of padding.
    pub fn origins(&self) -> &[Option<RowOrigin>] {
        &self.facts.origins
    }

    /// The spans of row `row`: place of the first token, number of tokens, and place after them.
    pub fn spans(&self, row: usize) -> impl Iterator<Item = (u32, u32, u32)> {
        self.facts.spans.row(row).iter().map(|span| (span.start, span.tokens, span.end))
    }

    /// Writes the ids of all rows to `out`, each row with `format.row_ids` ids of type
    /// `format.ids`. `out` must be zeroed and of that size.
    pub fn write_ids(&self, format: &RowFormat, out: &mut [u8]) {
        let [inputs, targets] = [self.batch.fields[0], self.batch.fields[1]];
        let (columns, size) = (self.batch.columns(), format.ids.size());
        for (row, out) in out.chunks_exact_mut(format.row_ids * size).enumerate() {
            let bytes = self.row_bytes(&inputs, row);
            if inputs.dtype == Dtype::I32 {
                let ids = bytes.as_chunks::<4>().0.iter().map(|id| i64::from(i32::from_le_bytes(*id)));
                narrow(format.ids, ids, out);
            } else {
                narrow(format.ids, bytes.as_chunks::<8>().0.iter().map(|id| i64::from_le_bytes(*id)), out);
            }
            if format.row_ids > format.columns {
                // An ignored target has no bit, so that any id may stand there.
                let last = self.row_bytes(&targets, row).as_chunks::<8>().0.last();
                let last = last.map_or(0, |id| i64::from_le_bytes(*id));
                narrow(format.ids, [last].into_iter(), &mut out[columns * size..]);
            }
        }
    }

    /// Writes a bit for each place of all rows: whether it has another target than `ignore_index`.
    /// Each row has `format.columns` bits. `out` must be zeroed and have room for them.
    pub fn write_targets(&self, format: &RowFormat, ignore_index: i64, out: &mut [u8]) {
        let targets = self.batch.fields[1];
        for row in 0..self.batch.rows {
            let values = self.row_bytes(&targets, row).as_chunks::<8>().0;
            let first = row * format.columns;
            if first.is_multiple_of(8) {
                for (byte, values) in out[first / 8..].iter_mut().zip(values.chunks(8)) {
                    for (bit, value) in values.iter().enumerate() {
                        *byte |= u8::from(i64::from_le_bytes(*value) != ignore_index) << bit;
                    }
                }
                continue;
            }
            for (at, value) in (first..).zip(values) {
                out[at / 8] |= u8::from(i64::from_le_bytes(*value) != ignore_index) << (at % 8);
            }
        }
    }

    /// Writes the values of further column `field` of all rows to `out`, each row with
    /// `format.columns` values. `out` must be zeroed and of that size.
    pub fn write_field(&self, format: &RowFormat, field: &SchemaField, out: &mut [u8]) {
        let is_shifted = self.batch.fields[1].name == "y";
        let name = if is_shifted && field.name == "labels" { "y" } else { field.name };
        let array = *self.batch.fields.iter().find(|array| array.name == name).expect("a batch has every field");
        for (row, out) in out.chunks_exact_mut(format.columns * field.dtype.size()).enumerate() {
            let bytes = self.row_bytes(&array, row);
            out[..bytes.len()].copy_from_slice(bytes);
        }
    }

    /// The values of per-document column `field` for the stretches of row `row`. `None` is null.
    pub fn document_values(&self, field: &DocumentField, row: usize) -> Vec<Option<Vec<u8>>> {
        let Some(values) = &self.batch.documents else { return Vec::new() };
        let columns = self.batch.columns();
        let stretches = self.facts.spans.row(row).iter().filter(|span| (span.start as usize) < columns).count();
        values.of_row(self.batch.rows / self.parts, row, field, stretches)
    }

    fn row_bytes(&self, array: &Field, row: usize) -> &[u8] {
        let size = array.row_len() * array.dtype.size();
        // SAFETY: the lease's bytes are initialised, and `start_of` checks that the array lies
        // inside them. The service holds the batch alone and does not write to it.
        unsafe { std::slice::from_raw_parts(self.batch.start_of(array).add(row * size), size) }
    }
}

/// Writes ids as values of type `dtype`, which has room for them.
fn narrow(dtype: Dtype, ids: impl Iterator<Item = i64>, out: &mut [u8]) {
    match dtype {
        Dtype::U16 => ids.zip(out.as_chunks_mut::<2>().0).for_each(|(id, out)| *out = (id as u16).to_le_bytes()),
        Dtype::U32 => ids.zip(out.as_chunks_mut::<4>().0).for_each(|(id, out)| *out = (id as u32).to_le_bytes()),
        _ => ids.zip(out.as_chunks_mut::<8>().0).for_each(|(id, out)| *out = id.to_le_bytes()),
    }
}

/// The batches of a pass whose rows come from a service.
pub(super) struct ServedWork {
    session: Arc<Session>,
    range: Arc<PassRange>,
    items: u64,
    parts: u64,
    cancel: Cancel,
}

/// The stream of a worker, and the number of its next batch.
pub(super) struct ServedMemory {
    index: usize,
    stream: Option<(u64, Box<dyn RowStream>)>,
}

impl ServedWork {
    pub(super) fn new(session: &Arc<Session>, range: &Arc<PassRange>, parts: u64, items: u64, cancel: Cancel) -> Self {
        Self { session: Arc::clone(session), range: Arc::clone(range), items, parts, cancel }
    }

    /// Number of rows of the batch at index `start`.
    fn rows_of(&self, start: u64) -> u64 {
        let epochs = &self.range.epochs;
        let end = epochs.len().unwrap_or(u64::MAX);
        self.session.grouping.rows(start, end, epochs.last_epoch()).count() as u64
    }
}

impl Work for ServedWork {
    type State = ServedMemory;
    type Item = Arc<Batch>;

    fn begin(&self, worker: Option<usize>) -> ServedMemory {
        if worker.is_some() {
            self.session.placement.apply();
        }
        ServedMemory { index: worker.unwrap_or(self.session.threads()), stream: None }
    }

    fn compute(&self, worker: &mut ServedMemory, number: u64, lease: Option<Lease>) -> Result<Arc<Batch>> {
        let session = &*self.session;
        let global_batch = session.grouping.global_batch();
        let index = self.range.start + number * global_batch;
        let (_, stream) = match &mut worker.stream {
            Some(at) if at.0 == number => at,
            other => {
                let start = PassStart {
                    growth: self.range.growth.text(),
                    epoch: self.range.epochs.at(index).0,
                    index,
                    batches: self.items - number,
                    parts: self.parts.max(1),
                };
                other.insert((number, session.stream(&session.config, &start)))
            }
        };
        let mut lease = Some(lease.unwrap_or_else(|| Lease::new(&session.pool, session.batch_bytes)));
        let mut batch = None;
        let mut took = Duration::ZERO;
        stream.next(&self.cancel, &mut |rows| {
            let began = Instant::now();
            let lease =
                lease.take().ok_or_else(|| Error::new(ErrorKind::Internal, "a stream gave two batches at once"))?;
            let expected = self.rows_of(index);
            if rows.origins.len() as u64 != expected {
                let text = format!("the service sent a batch of {} rows, expected {expected}", rows.origins.len());
                return Err(Error::new(ErrorKind::Data, text));
            }
            batch = Some(session.assemble(rows, index / global_batch, self.parts.max(1) as usize, lease)?);
            took = began.elapsed();
            Ok(())
        })?;
        worker.stream.as_mut().expect("it was just used").0 = number + 1;
        session.counters.worked(worker.index, Duration::ZERO, took);
        let batch = batch.ok_or_else(|| Error::new(ErrorKind::Internal, "a stream gave no batch"))?;
        Ok(Arc::new(batch))
    }
}

impl Session {
    /// The batch of one request to the service, for callers outside of a pass. Its step is `step`.
    pub(super) fn served_alone(&self, config: &Config, start: &PassStart, step: u64) -> Result<Arc<Batch>> {
        let mut stream = self.stream(config, start);
        let mut batch = None;
        stream.next(&Cancel::default(), &mut |rows| {
            let bytes = self.layout(rows.origins.len(), self.config.seq_len as usize).bytes;
            batch = Some(self.assemble(rows, step, 1, Lease::alone(bytes))?);
            Ok(())
        })?;
        batch.map(Arc::new).ok_or_else(|| Error::new(ErrorKind::Internal, "a stream gave no batch"))
    }

    /// A stream of the batches from `start` on, under `config`.
    fn stream(&self, config: &Config, start: &PassStart) -> Box<dyn RowStream> {
        let (service, ids) = self.opened.service.as_ref().expect("only a served session asks");
        Arc::clone(service).open(config, &self.row_format(*ids), start)
    }

    /// Number of tokens of the rows with indices `range` of `epochs`, as the service counts them. A
    /// row of which it gives no count is full.
    pub(super) fn served_tokens(&self, growth: &Growth, epochs: &EpochChain, range: Range<u64>) -> u64 {
        /// Rows of one request.
        const ROWS: u64 = 64;
        let mut tokens = 0;
        for index in range.clone().step_by(ROWS as usize) {
            let rows = ROWS.min(range.end - index);
            let config = Config {
                batch_size: rows,
                dp_rank: Some(0),
                dp_world_size: Some(1),
                max_steps: None,
                balance: Balance::Off,
                prefetch_batches: 1,
                ..self.config.clone()
            };
            let (growth, epoch) = (growth.text(), epochs.at(index).0);
            let start = PassStart { growth, epoch, index, batches: 1, parts: 1 };
            let counted = self.served_alone(&config, &start, 0);
            tokens += counted.map_or(rows * self.config.seq_len, |batch| batch.tokens);
        }
        tokens
    }

    /// Whether rows come from a service.
    pub(super) fn is_served(&self) -> bool {
        self.opened.service.is_some()
    }

    /// The range of a pass that begins at `start`, for the consumer that asked for it.
    pub(super) fn range_at(&self, start: &PassStart) -> Result<PassRange> {
        let growth = self.opened.sources.growth_of(&start.growth)?;
        self.check_epoch(start.epoch)?;
        let epochs = self.epoch_chain(&growth, start.epoch);
        if let Some(end) = epochs.len() {
            if start.index > end {
                return Err(Error::config(format!(
                    "no batch begins at index {}: the pass has {end} positions",
                    start.index
                )));
            }
            self.grouping.check(end - start.index)?;
        }
        Ok(PassRange { epochs, growth, start: start.index })
    }

    /// Whether batches keep the facts about their rows.
    pub(super) fn keeps_facts(&self) -> bool {
        self.keeps_facts.load(Ordering::Relaxed)
    }
}
