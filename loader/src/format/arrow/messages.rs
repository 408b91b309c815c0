//! Messages: reads the messages of an Arrow IPC file or stream.
//!
//! Gives the place of the token column in each record batch, the runs of its documents, and the
//! number of rows. Checks every length and offset against the file. Reads no tokens.

use arrow_ipc::{CompressionType, Endianness, Message, MessageHeader, MetadataVersion};

use super::{Column, DocumentRun, NodeCounts, RowShape, ShownBy, check_types, runs, stored_bytes};
use crate::error::{Error, Result};
use crate::format::{Format, OpenOptions};
use crate::storage::Reads;

const MAGIC: &[u8] = b"ARROW1";
const CONTINUATION: u32 = u32::MAX;
/// Metadata of a record batch has a few hundred bytes. A far larger length is damage.
const MAX_METADATA: u64 = 1 << 28;
/// This limit keeps the cost of finding a document in a block small. Empty documents make a search
/// impossible.
const MAX_ROWS: u64 = 4096;

/// A range of bytes of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FileRange {
    pub(super) start: u64,
    pub(super) len: u64,
}

impl FileRange {
    pub(super) fn range(self) -> std::ops::Range<u64> {
        self.start..self.start + self.len
    }
}

/// The parts of a record batch that the token column needs. They are empty if the column cannot
/// hold tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BatchParts {
    pub(super) rows: u64,
    /// Row of the shard that is the batch's first row.
    pub(super) first_row: u64,
    /// Number of tokens of the child array, or of rows of a plain column.
    pub(super) values: u64,
    /// Empty if no document is null.
    pub(super) validity: FileRange,
    pub(super) offsets: FileRange,
    /// Empty if no token is null.
    pub(super) child_validity: FileRange,
    pub(super) tokens: FileRange,
    pub(super) compression: Option<CompressionType>,
    /// Number of runs of documents.
    pub(super) runs: usize,
}

/// Everything that opening finds in the messages.
#[derive(Debug)]
pub(super) struct Messages {
    pub(super) format: Format,
    pub(super) column: Column,
    /// Names of the other columns.
    pub(super) not_read: Vec<String>,
    pub(super) batches: Vec<BatchParts>,
    /// Runs of all record batches that are not compressed.
    pub(super) runs: Vec<DocumentRun>,
    pub(super) rows: u64,
    /// What all columns occupy in a record batch.
    whole: NodeCounts,
}

impl Messages {
    pub(super) fn read(reads: &mut Reads, format: Format, options: &OpenOptions) -> Result<Self> {
        match format {
            Format::ArrowFile => Self::read_file(reads, options),
            _ => Self::read_stream(reads, options),
        }
    }

    fn read_file(reads: &mut Reads, options: &OpenOptions) -> Result<Self> {
        // The file has ARROW1, padding, messages, the footer, its length in 4 bytes, and ARROW1.
        let tail_len = 4 + MAGIC.len() as u64;
        let len = reads.file().len();
        let tail_at = len
            .checked_sub(tail_len)
            .ok_or_else(|| Error::data(format!("Arrow file is truncated: {len} bytes hold no footer")))?;
        let tail = reads.last(tail_len)?;
        let footer_len = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
        let footer_at = tail_at.checked_sub(footer_len).ok_or_else(|| {
            Error::data(format!("Arrow file is damaged: a footer of {footer_len} bytes in a file of {len}"))
        })?;
        let footer = reads.get(footer_at..tail_at)?;
        let footer = arrow_ipc::root_as_footer(footer).map_err(|error| damaged("footer", &error))?;
        let schema = footer.schema().ok_or_else(|| Error::data("Arrow file is damaged: its footer has no schema"))?;
        let mut found = Self::from_schema(Format::ArrowFile, schema, footer.version(), options)?;
        let blocks: Vec<i64> = footer.recordBatches().iter().flatten().map(|block| block.offset()).collect();
        found.batches.reserve(blocks.len());
        for offset in blocks {
            let at = u64::try_from(offset)
                .map_err(|_| Error::data("Arrow file is damaged: a block has a negative offset"))?;
            let Some(message) = read_message(reads, at)? else {
                return Err(Error::data(format!(
                    "Arrow file is damaged: no message at byte {at}, where its footer lists a batch"
                )));
            };
            let batch = found.batch(len, &message)?;
            found.add(reads, batch, options)?;
        }
        Ok(found)
    }

    fn read_stream(reads: &mut Reads, options: &OpenOptions) -> Result<Self> {
        let Some(first) = read_message(reads, 0)? else {
            return Err(Error::data("Arrow stream is empty: it ends before its schema"));
        };
        let schema = first.message.header_as_schema().ok_or_else(|| {
            Error::data(format!(
                "Arrow stream is damaged: it begins with a message of type `{}` instead of a schema",
                name_of(first.message.header_type())
            ))
        })?;
        let mut found = Self::from_schema(Format::ArrowStream, schema, first.message.version(), options)?;
        let mut at = first.body.start + first.body.len;
        let len = reads.file().len();
        // A stream ends with its file, or with an empty message.
        while at < len {
            let Some(message) = read_message(reads, at)? else {
                let rest = len - at;
                if rest > 8 {
                    return Err(Error::data(format!(
                        "Arrow stream ends at byte {at} and {} more bytes follow it: several streams in one file are not supported",
                        rest - 8
                    )));
                }
                break;
            };
            let next = message.body.start + message.body.len;
            match message.message.header_type() {
                MessageHeader::RecordBatch => {
                    let batch = found.batch(len, &message)?;
                    found.add(reads, batch, options)?;
                }
                MessageHeader::DictionaryBatch => {}
                other => {
                    return Err(Error::data(format!(
                        "Arrow stream is damaged: an unexpected message of type `{}` at byte {at}",
                        name_of(other)
                    )));
                }
            }
            at = next;
        }
        Ok(found)
    }

    fn from_schema(
        format: Format,
        schema: arrow_ipc::Schema<'_>,
        version: MetadataVersion,
        options: &OpenOptions,
    ) -> Result<Self> {
        if schema.endianness() != Endianness::Little {
            return Err(Error::data("Arrow data is big-endian: expected little-endian"));
        }
        let schema = arrow_ipc::convert::try_fb_to_schema(schema)
            .map_err(|error| Error::data("Arrow schema is damaged").with_source(error))?;
        check_types(&schema)?;
        let legacy_unions = version < MetadataVersion::V5;
        let column = match Column::find(&schema, options, legacy_unions) {
            // A file without rows has no tokens, whatever its columns are.
            Err(error) if !options.is_field => Column::missing(error),
            found => found?,
        };
        let names = schema.fields().iter().map(|field| field.name());
        let not_read = names.filter(|name| **name != column.name).cloned().collect();
        let mut whole = NodeCounts { legacy_unions, ..NodeCounts::default() };
        schema.fields().iter().for_each(|field| whole.add(field.data_type()));
        Ok(Self { format, column, not_read, batches: Vec::new(), runs: Vec::new(), rows: 0, whole })
    }

    /// Reads the parts of the next record batch from `message`, in a file of `file_len` bytes.
    fn batch(&self, file_len: u64, message: &LocatedMessage<'_>) -> Result<BatchParts> {
        let number = self.batches.len();
        let broken = |what: &str| Error::data(format!("record batch {number} is damaged: {what}"));
        let batch = message.message.header_as_record_batch().ok_or_else(|| broken("it is no record batch"))?;
        let count = |value: i64, what: &str| u64::try_from(value).map_err(|_| broken(&format!("{what} is negative")));
        let nodes = batch.nodes().ok_or_else(|| broken("it has no field nodes"))?;
        let buffers = batch.buffers().ok_or_else(|| broken("it has no buffers"))?;
        let views = batch.variadicBufferCounts();
        let mut first = self.column.buffer;
        for view in 0..self.column.views {
            let counts = views
                .filter(|counts| view < counts.len())
                .ok_or_else(|| broken("counts of view buffers are missing"))?;
            first = usize::try_from(counts.get(view))
                .ok()
                .and_then(|more| first.checked_add(more))
                .ok_or_else(|| broken("a count of view buffers is impossible"))?;
        }
        let node = |index: usize| {
            (index < nodes.len())
                .then(|| nodes.get(index))
                .ok_or_else(|| broken("a field node of the token column is missing"))
        };
        let part = |index: usize| -> Result<FileRange> {
            if index >= buffers.len() {
                return Err(broken("a buffer of the token column is missing"));
            }
            let buffer = buffers.get(index);
            let (offset, len) =
                (count(buffer.offset(), "a buffer's offset")?, count(buffer.length(), "a buffer's length")?);
            if offset.checked_add(len).is_none_or(|end| end > message.body.len) {
                return Err(broken(&format!(
                    "a buffer at {offset} of {len} bytes lies outside its body of {} bytes",
                    message.body.len
                )));
            }
            Ok(FileRange { start: message.body.start + offset, len })
        };
        if let Some(refused) = &self.column.refused {
            let rows = count(batch.length(), "its row count")?;
            let shown = match refused.shown_by {
                ShownBy::Rows => rows,
                ShownBy::Elements => count(node(self.column.node + 1)?.length(), "a value count")?,
                ShownBy::Nothing => 0,
            };
            if shown > 0 {
                return Err(refused.error.clone());
            }
            // A count of 0 in a damaged batch would hide its tokens.
            if nodes.len() < self.whole.nodes || buffers.len() < self.whole.buffers {
                return Err(broken(&format!(
                    "it has {} field nodes and {} buffers, its schema needs {} and {}",
                    nodes.len(),
                    buffers.len(),
                    self.whole.nodes,
                    self.whole.buffers
                )));
            }
            return Ok(BatchParts { rows, first_row: self.rows, ..BatchParts::default() });
        }
        let used = |part: FileRange, nulls: u64| if nulls == 0 { FileRange::default() } else { part };

        let list = node(self.column.node)?;
        let (rows, nulls) = (count(list.length(), "a row count")?, count(list.null_count(), "a null count")?);
        if rows != count(batch.length(), "its row count")? {
            return Err(broken("the token column has another number of rows than the batch"));
        }
        let validity = used(part(first)?, nulls);
        let (child, offsets, after) = match self.column.kind {
            RowShape::List { .. } => (Some(node(self.column.node + 1)?), part(first + 1)?, first + 2),
            RowShape::FixedSizeList { .. } => (Some(node(self.column.node + 1)?), FileRange::default(), first + 1),
            RowShape::Plain => (None, FileRange::default(), first),
        };
        let (values, child_validity) = match child {
            Some(child) => {
                let nulls = count(child.null_count(), "a null count")?;
                (count(child.length(), "a value count")?, used(part(after)?, nulls))
            }
            None => (rows, FileRange::default()),
        };
        let tokens = part(after + 1)?;
        if let RowShape::FixedSizeList { length } = self.column.kind
            && rows.checked_mul(length) != Some(values)
        {
            return Err(broken(&format!("{rows} lists of {length} tokens have {values} values")));
        }
        let compression = batch.compression().map(|compression| compression.codec());
        let batch = BatchParts {
            rows,
            first_row: self.rows,
            values,
            validity,
            offsets,
            child_validity,
            tokens,
            compression,
            runs: 0,
        };
        if compression.is_none() {
            // The lengths of compressed buffers are known only after they are read.
            self.column
                .check_lengths(&batch, validity.len, offsets.len, child_validity.len, tokens.len)
                .map_err(|text| broken(&text))?;
        }
        // Rows are stored, so there cannot be more of them than bits in the file. An empty list
        // still takes an offset.
        if self.column.kind != (RowShape::FixedSizeList { length: 0 }) && rows / 8 > file_len.saturating_mul(1 << 12) {
            return Err(broken("it has more rows than its file could hold"));
        }
        if self.rows.checked_add(rows).is_none() {
            return Err(broken("its row count is impossible"));
        }
        Ok(batch)
    }

    /// Adds `batch`, and finds its documents. Its offsets follow its message, so they may have been
    /// read together with it.
    fn add(&mut self, reads: &mut Reads, mut batch: BatchParts, options: &OpenOptions) -> Result<()> {
        if batch.compression.is_none() && self.column.refused.is_none() {
            let validity = reads.get(batch.validity.range())?.to_vec();
            let child_validity = reads.get(batch.child_validity.range())?.to_vec();
            let offsets = reads.get(batch.offsets.range())?;
            let before = self.runs.len();
            let buffers = (offsets, &*validity, &*child_validity);
            runs(&self.column, &batch, buffers, (options.block_tokens, MAX_ROWS), &mut self.runs)?;
            batch.runs = self.runs.len() - before;
        }
        self.rows += batch.rows;
        self.batches.push(batch);
        Ok(())
    }
}

impl Column {
    /// Fails if uncompressed buffers of these lengths are too short for `batch`.
    pub(super) fn check_lengths(
        &self,
        batch: &BatchParts,
        validity: u64,
        offsets: u64,
        child_validity: u64,
        tokens: u64,
    ) -> Result<(), String> {
        let need = |what: &str, found: u64, needed: Option<u64>| match needed {
            Some(needed) if found >= needed => Ok(()),
            _ => Err(format!(
                "its {what} have {found} bytes, too few for {} rows and {} tokens",
                batch.rows, batch.values
            )),
        };
        let optional = |what: &str, found: u64, bits: u64| {
            if found == 0 { Ok(()) } else { need(what, found, Some(bits.div_ceil(8))) }
        };
        optional("validity bits", validity, batch.rows)?;
        optional("validity bits of tokens", child_validity, batch.values)?;
        if let RowShape::List { offset_width } = self.kind
            && batch.rows > 0
        {
            need(
                "offsets",
                offsets,
                batch.rows.checked_add(1).and_then(|count| count.checked_mul(offset_width as u64)),
            )?;
        }
        need("tokens", tokens, stored_bytes(self.dtype, batch.values))
    }
}

/// A part of a file that [`each`] finds.
pub(super) enum Part<'a, 'b> {
    /// The schema, which comes first, and the version of the metadata.
    Schema(arrow_ipc::Schema<'a>, MetadataVersion),
    /// A message with a dictionary or a record batch, and the place where it begins.
    Message(u64, &'b LocatedMessage<'a>),
}

/// Calls `each` with the schema of a file of `format`, with its dictionaries, and with its record
/// batches.
pub(super) fn each(reads: &mut Reads, format: Format, each: &mut dyn FnMut(Part<'_, '_>) -> Result<()>) -> Result<()> {
    let len = reads.file().len();
    if format != Format::ArrowFile {
        let mut at = 0;
        while at < len {
            let Some(message) = read_message(reads, at)? else { break };
            let next = message.body.start + message.body.len;
            each(match message.message.header_as_schema() {
                Some(schema) => Part::Schema(schema, message.message.version()),
                None => Part::Message(at, &message),
            })?;
            at = next;
        }
        return Ok(());
    }
    let damaged_footer = || Error::data("Arrow file is damaged: its footer cannot be found");
    let tail_at = len.checked_sub(4 + MAGIC.len() as u64).ok_or_else(damaged_footer)?;
    let footer_len = reads.get(tail_at..len)?.first_chunk().map_or(0, |size| u64::from(u32::from_le_bytes(*size)));
    let footer_at = tail_at.checked_sub(footer_len).ok_or_else(damaged_footer)?;
    let footer =
        arrow_ipc::root_as_footer(reads.get(footer_at..tail_at)?).map_err(|error| damaged("footer", &error))?;
    let schema = footer.schema().ok_or_else(|| Error::data("Arrow file is damaged: its footer has no schema"))?;
    each(Part::Schema(schema, footer.version()))?;
    let dictionaries = footer.dictionaries().into_iter().flatten().map(|block| block.offset());
    let batches = footer.recordBatches().into_iter().flatten().map(|block| block.offset());
    for offset in dictionaries.chain(batches).collect::<Vec<_>>() {
        let at = u64::try_from(offset).map_err(|_| Error::data("Arrow file is damaged: an offset is negative"))?;
        let message = read_message(reads, at)?
            .ok_or_else(|| Error::data(format!("Arrow data is damaged: no message at byte {at}")))?;
        each(Part::Message(at, &message))?;
    }
    Ok(())
}

/// A message and the place of its body.
pub(super) struct LocatedMessage<'a> {
    pub(super) message: Message<'a>,
    pub(super) body: FileRange,
}

/// Reads the message at byte `at`. Returns `None` if the stream ends there.
fn read_message(reads: &mut Reads, at: u64) -> Result<Option<LocatedMessage<'_>>> {
    let file_len = reads.file().len();
    let truncated = |end: u64| {
        Error::data(format!(
            "Arrow data is truncated: the message at byte {at} reaches to byte {end}, the file ends at {file_len}; write or copy it again"
        ))
    };
    let mut word = |at: u64| -> Result<u32> {
        let end = at.saturating_add(4);
        if end > file_len {
            return Err(truncated(end));
        }
        let b = reads.get(at..end)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    // Before Arrow 0.15 there was no marker before the length.
    let (len, start) = match word(at)? {
        CONTINUATION => (word(at + 4)?, at + 8),
        len => (len, at + 4),
    };
    if len == 0 {
        return Ok(None);
    }
    let len = u64::from(len);
    if start + len > file_len || len > MAX_METADATA {
        return Err(truncated(start + len));
    }
    let bytes = reads.get(start..start + len)?;
    let message =
        arrow_ipc::root_as_message(bytes).map_err(|error| damaged(&format!("message at byte {at}"), &error))?;
    let body_len = u64::try_from(message.bodyLength())
        .map_err(|_| Error::data("Arrow data is damaged: a body has a negative length"))?;
    let body = FileRange { start: start + len, len: body_len };
    match body.start.checked_add(body.len) {
        Some(end) if end <= file_len => Ok(Some(LocatedMessage { message, body })),
        end => Err(truncated(end.unwrap_or(u64::MAX))),
    }
}

/// The verifier of flatbuffers adds a trace of several lines, of which only the first is for users.
fn damaged(what: &str, error: &impl std::fmt::Display) -> Error {
    let text = error.to_string();
    Error::data(format!("Arrow {what} is damaged: {}", text.lines().next().unwrap_or_default().trim_end_matches('.')))
}

fn name_of(header: MessageHeader) -> &'static str {
    header.variant_name().unwrap_or("unknown")
}
