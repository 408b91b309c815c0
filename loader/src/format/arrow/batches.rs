//! Reads any column of an Arrow file or stream with arrow-rs, by record batches.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_buffer::Buffer;
use arrow_ipc::reader::FileDecoder;
use arrow_ipc::{Block, MessageHeader, MetadataVersion};
use arrow_schema::{DataType, SchemaRef};

use super::NodeCounts;
use super::compressed::MAX_RATIO;
use super::messages::{self, FileRange, Part};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::storage::{Reads, SourceFile};
use crate::text::escaped;

/// Rows that are decoded at a time from batches that are not compressed.
const PART_ROWS: u64 = 1024;

/// One column of the record batches of a file.
#[derive(Debug)]
pub(in crate::format) struct ArrowBatches {
    schema: SchemaRef,
    version: MetadataVersion,
    /// Index of the column in the schema.
    column: usize,
    /// Place and metadata length of each message with a dictionary.
    dictionaries: Vec<(FileRange, u64)>,
    batches: Vec<BatchAt>,
    is_compressed: bool,
    /// Nodes and buffers of the columns before this column, and of the columns up to it.
    before: NodeCounts,
    upto: NodeCounts,
    /// Largest number of bytes that the compressed buffers of a message may hold.
    most_bytes: u64,
}

/// The place of a record batch.
#[derive(Debug)]
struct BatchAt {
    message: FileRange,
    metadata_bytes: u64,
    /// The rows of the file before it.
    first_row: u64,
    rows: u64,
}

impl ArrowBatches {
    /// Finds the record batches of a file of `format`. A batch whose column takes more than
    /// `most_bytes` bytes after decompression is refused when it is read.
    pub(in crate::format) fn read(reads: &mut Reads, format: Format, name: &str, most_bytes: u64) -> Result<Self> {
        let unsound = |error| Error::data("Arrow schema is damaged").with_source(error);
        let mut found: Option<Self> = None;
        messages::each(reads, format, &mut |part| {
            let (at, message) = match part {
                Part::Schema(schema, version) => {
                    let schema = arrow_ipc::convert::try_fb_to_schema(schema).map_err(unsound)?;
                    super::check_types(&schema)?;
                    let missing = || Error::data(format!("column `{}` is missing", escaped(name)));
                    let column = schema.index_of(name).map_err(|error| missing().with_source(error))?;
                    let legacy_unions = version < MetadataVersion::V5;
                    let mut before = NodeCounts { legacy_unions, ..NodeCounts::default() };
                    schema.fields()[..column].iter().for_each(|field| before.add(field.data_type()));
                    let mut upto = before;
                    upto.add(schema.field(column).data_type());
                    found = Some(Self {
                        schema: Arc::new(schema),
                        version,
                        column,
                        dictionaries: Vec::new(),
                        batches: Vec::new(),
                        is_compressed: false,
                        before,
                        upto,
                        most_bytes,
                    });
                    return Ok(());
                }
                Part::Message(at, message) => (at, message),
            };
            let Some(found) = &mut found else { return Err(Error::data("Arrow data begins without a schema")) };
            let range = FileRange { start: at, len: message.body.start + message.body.len - at };
            let metadata_bytes = message.body.start - at;
            match message.message.header_as_record_batch() {
                Some(batch) => {
                    let first_row = found.batches.last().map_or(0, |last| last.first_row + last.rows);
                    let negative = |_| Error::data("a record batch has a negative row count");
                    let rows = u64::try_from(batch.length()).map_err(negative)?;
                    if first_row.checked_add(rows).is_none() {
                        return Err(Error::data("the row count of a record batch is impossible"));
                    }
                    found.check_rows(&batch, rows)?;
                    found.is_compressed |= batch.compression().is_some();
                    found.batches.push(BatchAt { message: range, metadata_bytes, first_row, rows });
                }
                None if message.message.header_type() == MessageHeader::DictionaryBatch => {
                    found.dictionaries.push((range, metadata_bytes));
                }
                None => {}
            }
            Ok(())
        })?;
        found.ok_or_else(|| Error::data("Arrow data has no schema"))
    }

    /// Numbers of the column's buffers in `batch`.
    fn buffers(&self, batch: &arrow_ipc::RecordBatch<'_>) -> Range<usize> {
        let more = |columns: &NodeCounts| {
            let counts = batch.variadicBufferCounts().into_iter().flatten().take(columns.views);
            counts.fold(columns.buffers, |sum, count| sum.saturating_add(usize::try_from(count).unwrap_or(0)))
        };
        more(&self.before)..more(&self.upto)
    }

    /// Fails if the buffers of the column in `batch` cannot hold `rows` rows. Compressed buffers
    /// tell their length only when they are read.
    fn check_rows(&self, batch: &arrow_ipc::RecordBatch<'_>, rows: u64) -> Result<()> {
        if batch.compression().is_some() || self.data_type().is_nested() {
            return Ok(());
        }
        let buffers = self.buffers(batch);
        let own = batch.buffers().into_iter().flatten().skip(buffers.start).take(buffers.len());
        let bytes = own.fold(0_u64, |sum, own| sum.saturating_add(u64::try_from(own.length()).unwrap_or(0)));
        if rows.div_ceil(8) > bytes {
            return Err(Error::data(format!("a record batch of {rows} rows has {bytes} bytes for its column")));
        }
        Ok(())
    }

    /// Type of the column.
    pub(in crate::format) fn data_type(&self) -> &DataType {
        self.schema.field(self.column).data_type()
    }

    /// Number of rows of each record batch.
    pub(in crate::format) fn rows(&self) -> impl Iterator<Item = u64> + '_ {
        self.batches.iter().map(|batch| batch.rows)
    }

    /// Number of rows that are worth decoding at a time.
    pub(in crate::format) fn part_rows(&self) -> u64 {
        if self.is_compressed { u64::MAX } else { PART_ROWS }
    }

    /// Gives the column's values in `rows`, which lie in one record batch.
    pub(in crate::format) fn each(
        &self,
        file: &SourceFile,
        rows: Range<u64>,
        add: &mut dyn FnMut(&ArrayRef) -> Result<()>,
    ) -> Result<()> {
        let unsound = |error| Error::data("cannot read a record batch").with_source(error);
        let mut decoder = FileDecoder::new(Arc::clone(&self.schema), self.version).with_projection(vec![self.column]);
        if matches!(self.data_type(), DataType::Dictionary(..)) {
            for (range, metadata_bytes) in &self.dictionaries {
                let bytes = Buffer::from(file.bytes(range.range())?);
                check_claims(&bytes, *metadata_bytes, self.most_bytes, |_| 0..usize::MAX)?;
                decoder.read_dictionary(&block(*range, *metadata_bytes), &bytes).map_err(unsound)?;
            }
        }
        let at = self.batches.partition_point(|batch| batch.first_row + batch.rows <= rows.start);
        let batch = self.batches.get(at).ok_or_else(|| Error::data("a record batch is missing"))?;
        let bytes = Buffer::from(file.bytes(batch.message.range())?);
        check_claims(&bytes, batch.metadata_bytes, self.most_bytes, |batch| self.buffers(batch))?;
        let decoded: Option<RecordBatch> =
            decoder.read_record_batch(&block(batch.message, batch.metadata_bytes), &bytes).map_err(unsound)?;
        let decoded = decoded.ok_or_else(|| Error::data("a record batch is missing"))?;
        let (start, len) = ((rows.start - batch.first_row) as usize, (rows.end - rows.start) as usize);
        if start + len > decoded.num_rows() {
            return Err(Error::data(format!(
                "a record batch has {} rows, expected {}",
                decoded.num_rows(),
                batch.rows
            )));
        }
        add(&decoded.column(0).slice(start, len))
    }
}

/// Fails if a compressed buffer of the message in `bytes` claims to hold more than any codec can
/// give, or if the buffers that are `read` claim more than `most_bytes` together. arrow-rs
/// allocates what the buffers claim.
fn check_claims(
    bytes: &[u8],
    metadata_bytes: u64,
    most_bytes: u64,
    read: impl Fn(&arrow_ipc::RecordBatch<'_>) -> Range<usize>,
) -> Result<()> {
    let (metadata, body) = bytes.split_at_checked(metadata_bytes as usize).unwrap_or((bytes, &[]));
    let prefix = if metadata.starts_with(&[0xFF; 4]) { 8 } else { 4 };
    let message = arrow_ipc::root_as_message(metadata.get(prefix..).unwrap_or_default())
        .map_err(|error| Error::data(format!("the message of a record batch is damaged: {error}")))?;
    let dictionary = message.header_as_dictionary_batch();
    let batch = message.header_as_record_batch().or_else(|| dictionary?.data());
    let Some(batch) = batch.filter(|batch| batch.compression().is_some()) else { return Ok(()) };
    let (read, mut together) = (read(&batch), 0_u64);
    for (number, buffer) in batch.buffers().into_iter().flatten().enumerate() {
        let stored = usize::try_from(buffer.offset()).ok().and_then(|start| body.get(start..));
        let Some(Ok(prefix)) = stored.and_then(|stored| stored.get(..8)).map(TryInto::try_into) else { continue };
        let (claim, len) = (i64::from_le_bytes(prefix), u64::try_from(buffer.length()).unwrap_or(0));
        if len > 0 && claim > 0 && claim as u64 > len.saturating_mul(MAX_RATIO) {
            return Err(Error::data(format!("a compressed buffer of {len} bytes claims to hold {claim}")));
        }
        if read.contains(&number) {
            together = together.saturating_add(u64::try_from(claim).unwrap_or(0));
        }
    }
    if together > most_bytes {
        return Err(Error::data(format!(
            "a record batch takes {together} bytes after decompression, more than `memory_budget` = {most_bytes}: write \
             smaller record batches, or raise it"
        )));
    }
    Ok(())
}

fn block(range: FileRange, metadata_bytes: u64) -> Block {
    Block::new(range.start as i64, metadata_bytes as i32, (range.len - metadata_bytes) as i64)
}
