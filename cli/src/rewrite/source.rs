//! Reads the documents of a shard in order, from any row on, with the readers of arrow-rs and
//! parquet.
//!
//! These readers give empty documents as well, which a loader does not need. They share no code
//! with the reader that reads the result back. Mapped Arrow files are not copied, so that memory
//! does not depend on their record batches. Compressed files, and files that are read by position,
//! take the memory of one record batch.

use std::io::BufReader;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type};
use arrow_array::{Array, ArrayRef, RecordBatch, new_null_array};
use arrow_buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow_ipc::reader::{FileDecoder, FileReader, StreamDecoder, StreamReader, read_footer_length};
use arrow_ipc::{Block, convert::try_fb_to_schema, root_as_footer};
use arrow_schema::{DataType, Field, SchemaRef};
use forebay::corpus::discover::ShardFile;
use forebay::format::documents::DocumentColumn;
use forebay::format::{self, Format, OpenOptions, ShardFacts};
use forebay::settings::Io;
use forebay::storage::Files;
use forebay::{Error, Result};
use parquet::arrow::arrow_reader::ParquetRecordBatchReader;

use super::fields::{CarriedContent, CarriedField};
use crate::flat::{self, FlatReader};
use crate::shard_reader::ShardReader;
use crate::token_column::{self, unsound};

/// A shard of the source.
#[derive(Clone, Debug)]
pub(super) struct SourceShard {
    pub(super) file: ShardFile,
    /// The storage of the file.
    files: Files,
    pub(super) facts: ShardFacts,
    /// Name of its token column.
    pub(super) column: String,
    /// Whether rows are tokens, so that the file is one document.
    pub(super) plain: bool,
    /// Last id of each document, if the file does not say where documents end.
    end_id: Option<u32>,
    /// Names of the columns that no loader reads.
    pub(super) others: Vec<String>,
    /// The further columns that are copied.
    pub(super) fields: Vec<CarriedField>,
}

impl SourceShard {
    /// Reads the metadata of `file`.
    pub(super) fn open(file: &ShardFile, options: &OpenOptions) -> Result<Self> {
        let shard = format::open(&file.path, options)?;
        let facts = shard.facts();
        let mut others = shard.info().not_read.clone();
        others.retain(|name| !options.fields.contains(name));
        let mut fields = Vec::with_capacity(options.fields.len());
        // The columns of a file without tokens may have any type, or be missing.
        for name in options.fields.iter().filter(|_| facts.counts.tokens > 0) {
            let content = match facts.column.is_plain() || flat::is_flat(facts.format) {
                false => DocumentColumn::open(&file.path, name, options).map_err(|error| error.at(&file.path))?,
                true => None,
            };
            if let Some(column) = content {
                let content = CarriedContent::PerDocument(column.kind());
                fields.push(CarriedField { name: name.clone(), content });
                continue;
            }
            let shard = format::open(&file.path, &options.of_field(name))?;
            let data_type = token_column::data_type(&options.files, &file.path, &shard.facts(), name);
            let data_type = data_type.map_err(|error| error.at(&file.path))?;
            let Some(item) = token_column::item_of(&data_type) else {
                let text = format!("column `{name}` is a plain column: `rewrite` carries it beside lists alone");
                return Err(Error::data(text).at(&file.path));
            };
            let content = CarriedContent::PerToken { dtype: shard.info().dtype, item };
            fields.push(CarriedField { name: name.clone(), content });
        }
        let column = facts.column.name(options).to_owned();
        let end_id = options.split.as_ref().map(|split| split.id);
        let files = options.files.clone();
        Ok(Self { file: file.clone(), files, facts, column, plain: facts.column.is_plain(), end_id, others, fields })
    }

    /// The rows from `first_row` on: tokens, or the values of a further column.
    pub(super) fn rows(&self, field: Option<usize>, first_row: u64, io: Io) -> Result<ShardRows> {
        if self.facts.counts.tokens == 0 {
            return Ok(ShardRows { reader: RowReader::Empty(self.facts.rows), skip: first_row, row: 0 });
        }
        let path = &self.file.path;
        let column = field.map_or(&self.column, |field| &self.fields[field].name);
        let reader = if flat::is_flat(self.facts.format) {
            let further = field.map(|_| column.as_str());
            FlatReader::open(&self.files, path, &self.facts, further, self.end_id).map(RowReader::Flat)
        } else {
            RowReader::open(&self.files, path, self.facts.format, io, column, first_row)
        };
        let mut rows = ShardRows { reader: reader.map_err(|error| error.at(path))?, skip: 0, row: 0 };
        match rows.reader {
            // The reader has skipped the rows by its index.
            RowReader::Parquet(_) => rows.row = first_row,
            _ => rows.skip = first_row,
        }
        Ok(rows)
    }
}

/// The reader of a shard's rows.
enum RowReader {
    Parquet(ParquetRecordBatchReader),
    MappedFile {
        decoder: FileDecoder,
        blocks: std::vec::IntoIter<Block>,
        bytes: Buffer,
    },
    MappedStream {
        decoder: StreamDecoder,
        rest: Buffer,
        column: usize,
    },
    File(FileReader<BufReader<ShardReader>>),
    Stream(StreamReader<BufReader<ShardReader>>),
    Flat(FlatReader),
    /// This many empty documents.
    Empty(u64),
}

impl RowReader {
    /// Opens a shard for its token column. Parquet begins at `first_row`. Other formats begin at
    /// the first row.
    fn open(files: &Files, path: &Path, format: Format, io: Io, column: &str, first_row: u64) -> Result<Self> {
        let index = |schema: &SchemaRef| token_column::arrow(schema, column);
        if format == Format::Parquet {
            let builder = token_column::parquet(files, path, column)?;
            return Ok(Self::Parquet(builder.with_offset(first_row as usize).build().map_err(unsound)?));
        }
        let file = files.open(path, io)?;
        let mapped = if file.mapped().is_some() { Some(Buffer::from(file.bytes(0..file.len())?)) } else { None };
        match (mapped, format) {
            (Some(bytes), Format::ArrowFile) => {
                let (schema, mut decoder, dictionaries, blocks) = footer(&bytes)?;
                for block in dictionaries {
                    decoder.read_dictionary(&block, &block_bytes(&bytes, &block)?).map_err(unsound)?;
                }
                let decoder = decoder.with_projection(vec![index(&schema)?]);
                Ok(Self::MappedFile { decoder, blocks: blocks.into_iter(), bytes })
            }
            (Some(bytes), _) => {
                let reader =
                    StreamReader::try_new(BufReader::new(ShardReader::open(files, path)?), None).map_err(unsound)?;
                let column = index(&reader.schema())?;
                Ok(Self::MappedStream { decoder: StreamDecoder::new(), rest: bytes, column })
            }
            (None, Format::ArrowFile) => {
                let whole =
                    FileReader::try_new(BufReader::new(ShardReader::open(files, path)?), None).map_err(unsound)?;
                let projection = Some(vec![index(&whole.schema())?]);
                let reader = FileReader::try_new(BufReader::new(ShardReader::open(files, path)?), projection)
                    .map_err(unsound)?;
                Ok(Self::File(reader))
            }
            (None, _) => {
                let whole =
                    StreamReader::try_new(BufReader::new(ShardReader::open(files, path)?), None).map_err(unsound)?;
                let projection = Some(vec![index(&whole.schema())?]);
                let reader = StreamReader::try_new(BufReader::new(ShardReader::open(files, path)?), projection)
                    .map_err(unsound)?;
                Ok(Self::Stream(reader))
            }
        }
    }

    fn next(&mut self) -> Result<Option<ArrayRef>> {
        let first = |batch: RecordBatch| batch.column(0).clone();
        match self {
            Self::Parquet(reader) => reader.next().transpose().map_err(unsound).map(|batch| batch.map(first)),
            Self::File(reader) => reader.next().transpose().map_err(unsound).map(|batch| batch.map(first)),
            Self::Stream(reader) => reader.next().transpose().map_err(unsound).map(|batch| batch.map(first)),
            Self::Flat(reader) => reader.next(),
            Self::Empty(rows) => {
                let rows = std::mem::take(rows) as usize;
                let type_of_lists = DataType::FixedSizeList(Arc::new(Field::new("item", DataType::Int32, true)), 0);
                Ok((rows > 0).then(|| new_null_array(&type_of_lists, rows)))
            }
            Self::MappedFile { decoder, blocks, bytes } => {
                let Some(block) = blocks.next() else { return Ok(None) };
                let batch = decoder.read_record_batch(&block, &block_bytes(bytes, &block)?).map_err(unsound)?;
                batch.map(first).map(Some).ok_or_else(|| Error::data("the footer lists a record batch that is missing"))
            }
            Self::MappedStream { decoder, rest, column } => {
                // Bytes after the end marker are not part of the stream.
                if rest.len() < 4 || rest[..4] == [0; 4] || rest.starts_with(&[255, 255, 255, 255, 0, 0, 0, 0]) {
                    return Ok(None);
                }
                let batch = decoder.decode(rest).map_err(unsound)?;
                Ok(batch.map(|batch| batch.column(*column).clone()))
            }
        }
    }
}

type FileFooter = (SchemaRef, FileDecoder, Vec<Block>, Vec<Block>);

fn footer(bytes: &Buffer) -> Result<FileFooter> {
    let damaged = || Error::data("the footer of the Arrow file is damaged");
    let trailer = bytes.len().checked_sub(10).ok_or_else(damaged)?;
    let length = read_footer_length(bytes[trailer..].try_into().expect("ten bytes")).map_err(unsound)?;
    let start = trailer.checked_sub(length).ok_or_else(damaged)?;
    let footer = root_as_footer(&bytes[start..trailer]).map_err(|_| damaged())?;
    let schema = SchemaRef::new(try_fb_to_schema(footer.schema().ok_or_else(damaged)?).map_err(unsound)?);
    let decoder = FileDecoder::new(schema.clone(), footer.version());
    let blocks = |blocks: Option<&[Block]>| blocks.unwrap_or_default().to_vec();
    let dictionaries = footer.dictionaries().map(|all| all.iter().copied().collect::<Vec<_>>());
    let batches = footer.recordBatches().map(|all| all.iter().copied().collect::<Vec<_>>());
    Ok((schema, decoder, blocks(dictionaries.as_deref()), blocks(batches.as_deref())))
}

fn block_bytes(bytes: &Buffer, block: &Block) -> Result<Buffer> {
    let outside = || Error::data("a record batch lies outside of the file");
    let start = usize::try_from(block.offset()).map_err(|_| outside())?;
    let metadata = usize::try_from(block.metaDataLength()).map_err(|_| outside())?;
    let body = usize::try_from(block.bodyLength()).map_err(|_| outside())?;
    let length = metadata.checked_add(body).ok_or_else(outside)?;
    if start.checked_add(length).is_none_or(|end| end > bytes.len()) {
        return Err(outside());
    }
    Ok(bytes.slice_with_length(start, length))
}

/// The rows of a shard, batch by batch.
pub(super) struct ShardRows {
    reader: RowReader,
    /// Number of rows that are still to be skipped.
    skip: u64,
    /// The shard's row with which the next batch begins.
    row: u64,
}

impl ShardRows {
    /// Returns the next rows and the number of the first.
    pub(super) fn next(&mut self) -> Result<Option<RowBatch>> {
        loop {
            let Some(column) = self.reader.next()? else { return Ok(None) };
            let (rows, first_row) = (column.len() as u64, self.row);
            self.row += rows;
            if rows <= self.skip {
                self.skip -= rows;
                continue;
            }
            let next = std::mem::take(&mut self.skip) as usize;
            return Ok(Some(RowBatch { next, ..RowBatch::new(&column, first_row)? }));
        }
    }
}

/// Decoded rows.
pub(super) struct RowBatch {
    pub(super) values: ArrayRef,
    nulls: Option<NullBuffer>,
    ends: RowEnds,
    /// The shard's row with which the batch begins.
    first_row: u64,
    /// Number of rows.
    pub(super) len: usize,
    /// The first row that was not taken yet.
    pub(super) next: usize,
}

/// The assignment of values to rows.
enum RowEnds {
    Short(OffsetBuffer<i32>),
    Long(OffsetBuffer<i64>),
    Fixed(usize),
    /// A row is a token.
    Plain,
}

impl RowBatch {
    fn new(column: &ArrayRef, first_row: u64) -> Result<Self> {
        let (values, ends) = match column.data_type() {
            DataType::List(_) => {
                let list = column.as_list::<i32>();
                (list.values().clone(), RowEnds::Short(list.offsets().clone()))
            }
            DataType::LargeList(_) => {
                let list = column.as_list::<i64>();
                (list.values().clone(), RowEnds::Long(list.offsets().clone()))
            }
            DataType::FixedSizeList(_, length) => {
                (column.as_fixed_size_list().values().clone(), RowEnds::Fixed(usize::try_from(*length).unwrap_or(0)))
            }
            _ => (column.clone(), RowEnds::Plain),
        };
        let nulls = if matches!(ends, RowEnds::Plain) { None } else { column.nulls().cloned() };
        Ok(Self { values, nulls, ends, first_row, len: column.len(), next: 0 })
    }

    /// The shard's row of the batch's row `index`.
    pub(super) fn row(&self, index: usize) -> u64 {
        self.first_row + index as u64
    }

    /// The values of the document in row `index`. A null document has none.
    pub(super) fn document(&self, index: usize) -> Range<usize> {
        if self.nulls.as_ref().is_some_and(|nulls| nulls.is_null(index)) {
            return 0..0;
        }
        match &self.ends {
            RowEnds::Short(offsets) => offsets[index] as usize..offsets[index + 1] as usize,
            RowEnds::Long(offsets) => offsets[index] as usize..offsets[index + 1] as usize,
            RowEnds::Fixed(length) => index * length..(index + 1) * length,
            RowEnds::Plain => index..index + 1,
        }
    }

    /// Adds the ids of `values` to `ids`.
    pub(super) fn widen(&self, values: Range<usize>, ids: &mut Vec<i64>) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        if let Some(nulls) = self.values.nulls()
            && values.clone().any(|at| nulls.is_null(at))
        {
            return Err(Error::data("null token: every id in a document must be set"));
        }
        macro_rules! widened {
            ($type:ty) => {
                ids.extend(self.values.as_primitive::<$type>().values()[values].iter().map(|id| i64::from(*id)))
            };
        }
        match self.values.data_type() {
            DataType::UInt8 => widened!(UInt8Type),
            DataType::UInt16 => widened!(UInt16Type),
            DataType::UInt32 => widened!(UInt32Type),
            DataType::Int8 => widened!(Int8Type),
            DataType::Int16 => widened!(Int16Type),
            DataType::Int32 => widened!(Int32Type),
            DataType::Int64 => widened!(Int64Type),
            other => return Err(Error::data(format!("token column has type {other}"))),
        }
        Ok(())
    }
}
