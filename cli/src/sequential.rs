//! Reads a corpus in file order by arrow-rs. A loader must deliver the same content.
//!
//! The reader shares no layout, order, decoding or gathering with the loader. Arrow's and parquet's
//! own readers read whole files. Documents follow each other in one stream, and every `seq_len`
//! tokens of the stream are a row. For layouts that keep documents whole, `whole_rows.rs` makes the
//! rows.

use std::collections::VecDeque;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Float16Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type,
};
use arrow_array::{Array, ArrayRef, Int64Array, RecordBatch};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType};
use forebay::corpus::Corpus;
use forebay::corpus::schema::{DocumentField, SchemaField};
use forebay::format::ShardFacts;
use forebay::proof::checksum::{number_hash, text_hash};
use forebay::settings::{Config, Targets};
use forebay::storage::Files;
use forebay::tokens::{DocumentType, Dtype};
use forebay::{Error, Result};

use crate::flat::{self, FlatReader};
use crate::packed;
use crate::shard_reader::ShardReader;
use crate::token_column::{self, unsound};
use crate::whole_rows::{DocumentRow, Window};

/// A row of tokens, as the files give it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FileRow<'a> {
    /// The tokens without padding.
    pub(crate) tokens: &'a [i64],
    /// Place and length of each stretch of one document, or of the whole row where documents are
    /// joined without boundaries.
    pub(crate) spans: &'a [(u32, u32)],
    /// The documents of the row, in order. One may come twice.
    pub(crate) documents: &'a [DocumentRow],
}

/// Receives the rows while the files are read.
pub(crate) trait Visitor {
    /// Takes a sequence, or the shorter tail after the last sequence.
    fn row(&mut self, sequence: u64, row: FileRow<'_>);

    /// Notes that `tokens` more tokens of the corpus were read.
    fn read(&mut self, tokens: u64);
}

/// The shards of a corpus whose rows are read. A row belongs to the shard that it begins in.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    pub(crate) shards: Range<usize>,
    /// Number of rows before these shards, if a layout keeps documents whole.
    pub(crate) rows_before: u64,
}

impl Share {
    /// All shards of `corpus`.
    pub(crate) fn whole(corpus: &Corpus) -> Self {
        Self { shards: 0..corpus.len(), rows_before: 0 }
    }
}

/// Reads the tokens of the shards of `corpus` in order, each from the column that a loader takes.
/// Joined rows begin `phase` tokens after the start of the first document.
///
/// A share other than the whole needs a `phase` of 0.
pub(crate) fn read(
    config: &Config,
    corpus: &Corpus,
    phase: u64,
    share: &Share,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    read_column(config, Column::Tokens, corpus, phase, share, visitor)
}

/// Reads a further column of the shards of `corpus`, like [`read`].
///
/// The visitor receives the delivered values: floating-point numbers by their bits, and the values
/// of both tokens if rows share one.
pub(crate) fn read_field(
    config: &Config,
    field: &SchemaField,
    corpus: &Corpus,
    phase: u64,
    share: &Share,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    read_column(config, Column::Field(field), corpus, phase, share, visitor)
}

/// Reads a per-document column of the shards of `corpus`, like [`read`].
///
/// The visitor receives the hash of a document's value at each place of the document.
pub(crate) fn read_documents(
    config: &Config,
    field: &DocumentField,
    corpus: &Corpus,
    phase: u64,
    share: &Share,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    read_column(config, Column::Documents(field), corpus, phase, share, visitor)
}

/// The part of a corpus that is read.
#[derive(Clone, Copy, Debug)]
enum Column<'a> {
    Tokens,
    Field(&'a SchemaField),
    Documents(&'a DocumentField),
}

fn read_column(
    config: &Config,
    column: Column<'_>,
    corpus: &Corpus,
    phase: u64,
    share: &Share,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let special = |id: Option<u32>| match column {
        Column::Tokens => id.map(i64::from),
        Column::Field(field) => id.map(|_| field.special),
        Column::Documents(_) => id.map(|_| 0),
    };
    let (name, delivered, documents) = match column {
        Column::Tokens => (None, None, None),
        Column::Field(field) => (Some(field.name), Some(field.dtype), None),
        Column::Documents(field) => (None, None, Some(field)),
    };
    let mut stream = RowCutter {
        delivered,
        bos: special(config.bos_id),
        eos: special(config.eos_id),
        documents: None,
        seq_len: config.seq_len as usize,
        overlap: usize::from(config.targets == Targets::Shifted),
        window: Window::of(config)?,
        has_boundaries: config.has_boundaries(),
        packed: VecDeque::new(),
        begun: VecDeque::new(),
        phase: phase as usize,
        head: None,
        visitor,
        shard: 0,
        open: None,
        pending: Vec::new(),
        done: 0,
        sequence: share.rows_before,
        skip: 0,
        end: u64::MAX,
    };
    if let Some(window) = &mut stream.window {
        window.begin_after(corpus.counts().take(share.shards.start).map(|counts| counts.starts).sum());
    } else {
        let specials = u64::from(config.bos_id.is_some()) + u64::from(config.eos_id.is_some());
        let before = |shards: usize| -> u64 {
            corpus.counts().take(shards).map(|counts| counts.tokens + counts.starts * specials).sum()
        };
        stream.done = before(share.shards.start);
        stream.sequence = stream.done.div_ceil(config.seq_len);
        stream.skip = (stream.sequence * config.seq_len - stream.done) as usize;
        if share.shards.end < corpus.len() {
            stream.end = before(share.shards.end).div_ceil(config.seq_len);
        }
    }
    let files = Files::of(config);
    for (shard, file) in corpus.files().iter().enumerate().skip(share.shards.start) {
        // The last joined rows go on in the shards after the share.
        if shard >= share.shards.end && (stream.window.is_some() || stream.sequence >= stream.end) {
            break;
        }
        // Files without tokens may have any columns.
        if corpus.facts_of(shard).counts.tokens > 0 {
            stream.shard = shard;
            let facts = corpus.facts_of(shard);
            stream.packed =
                packed::starts(&files, &file.path, config.packed_by).map_err(|error| error.at(&file.path))?;
            let hashes = documents.map(|field| hashes_of(&files, &file.path, field)).transpose();
            stream.documents = hashes.map_err(|error| error.at(&file.path))?;
            let read = if flat::is_flat(facts.format) {
                read_flat(&files, &file.path, &facts, name, config.document_end_id, &mut stream)
            } else {
                let name = name.unwrap_or_else(|| corpus.token_column(shard));
                read_file(&files, &file.path, name, &mut stream)
            };
            read.map_err(|error| error.at(&file.path))?;
            stream.end_shard();
        }
    }
    stream.finish();
    Ok(())
}

/// Documents of joined rows, and their places in the stream.
type BegunDocuments = Vec<(u64, DocumentRow)>;

/// The part of the stream that is not in rows yet.
struct RowCutter<'a> {
    /// Type in which a further column is delivered. `None` for tokens.
    delivered: Option<Dtype>,
    bos: Option<i64>,
    eos: Option<i64>,
    /// Hashes of the values of a per-document column for all rows of the shard. They stand at the
    /// places of the tokens.
    documents: Option<Vec<i64>>,
    seq_len: usize,
    /// Number of tokens that a row shares with the next.
    overlap: usize,
    /// Documents of the present window, if the layout keeps documents whole.
    window: Option<Window>,
    /// Whether the spans of joined rows are those of documents.
    has_boundaries: bool,
    /// Starts of the documents in each row of the shard, if rows were packed before.
    packed: VecDeque<Vec<usize>>,
    /// Joined documents from the first pending token on, and their places in the stream.
    begun: VecDeque<(u64, DocumentRow)>,
    /// Number of tokens before the first row. They come after the last document.
    phase: usize,
    /// These tokens and their documents. `None` until all of them are read.
    head: Option<(Vec<i64>, BegunDocuments)>,
    visitor: &'a mut dyn Visitor,
    shard: usize,
    /// Row of the document that is being read.
    open: Option<u64>,
    pending: Vec<i64>,
    /// Number of stream tokens before the pending tokens.
    done: u64,
    sequence: u64,
    /// Number of tokens up to the first joined row of the share. They belong to a row before it.
    skip: usize,
    /// Number of the first joined row after the share.
    end: u64,
}

impl RowCutter<'_> {
    /// Adds tokens to the document in `row`. More may follow.
    fn tokens<T: Copy + Into<i64>>(&mut self, row: u64, tokens: &[T]) {
        if tokens.is_empty() {
            return;
        }
        if self.open.is_none() {
            self.open = Some(row);
            if self.window.is_none() {
                self.begun.push_back((self.done + self.pending.len() as u64, (self.shard, row)));
            }
            self.pending.extend(self.bos);
        }
        self.pending.extend(tokens.iter().map(|token| (*token).into()));
        self.cut();
        self.visitor.read(tokens.len() as u64);
    }

    /// Adds the document in `row`, whose tokens are `tokens`.
    fn document<T: Copy + Into<i64>>(&mut self, row: u64, tokens: &[T]) -> Result<()> {
        match &self.documents {
            None => self.tokens(row, tokens),
            Some(hashes) => {
                let hash = *hashes.get(row as usize).ok_or_else(|| Error::data("a value is missing").at_row(row))?;
                (self.bos, self.eos) = (self.bos.map(|_| hash), self.eos.map(|_| hash));
                self.tokens(row, &vec![hash; tokens.len()]);
            }
        }
        self.end();
        Ok(())
    }

    /// Ends the document, if it has a token.
    fn end(&mut self) {
        let Some(row) = self.open.take() else { return };
        self.pending.extend(self.eos);
        let Some(window) = &mut self.window else {
            self.cut();
            return;
        };
        let starts = self.packed.pop_front().unwrap_or_default();
        window.add((self.shard, row), &self.pending, &starts, &mut |tokens, spans, documents| {
            self.visitor.row(self.sequence, FileRow { tokens, spans, documents });
            self.sequence += 1;
        });
        self.pending.clear();
    }

    /// Gives the rows of joined documents that are complete.
    fn cut(&mut self) {
        if self.window.is_some() {
            return;
        }
        let skipped = self.skip.min(self.pending.len());
        self.pending.drain(..skipped);
        (self.skip, self.done) = (self.skip - skipped, self.done + skipped as u64);
        if self.head.is_none() && !self.take_head(self.phase) {
            return;
        }
        let mut start = 0;
        while self.pending.len() - start >= self.seq_len + self.overlap {
            self.give(start..start + self.seq_len + self.overlap);
            self.sequence += 1;
            start += self.seq_len;
        }
        self.pending.drain(..start);
        self.done += start as u64;
    }

    /// Puts the first `len` tokens aside. Returns false if fewer were read.
    fn take_head(&mut self, len: usize) -> bool {
        if self.pending.len() < len {
            return false;
        }
        let documents = self.begun.iter().copied().take_while(|(start, _)| *start < len as u64).collect();
        self.head = Some((self.pending.drain(..len).collect(), documents));
        self.done += len as u64;
        true
    }

    /// Gives the row of these pending tokens, if it belongs to the share.
    fn give(&mut self, row: Range<usize>) {
        if self.sequence >= self.end {
            return;
        }
        let places = self.done + row.start as u64..self.done + row.end as u64;
        // Documents that end before the row are no longer needed.
        while self.begun.get(1).is_some_and(|(start, _)| *start <= places.start) {
            self.begun.pop_front();
        }
        let inside = self.begun.iter().take_while(|(start, _)| *start < places.end);
        let documents: Vec<DocumentRow> = inside.clone().map(|(_, document)| *document).collect();
        let starts = inside.map(|(start, _)| *start).filter(|start| self.has_boundaries && *start > places.start);
        let mut borders: Vec<u32> = starts.map(|start| (start - places.start) as u32).collect();
        borders.insert(0, 0);
        borders.push(row.len() as u32);
        let spans: Vec<_> = borders.windows(2).map(|pair| (pair[0], pair[1] - pair[0])).collect();
        let row = FileRow { tokens: &self.pending[row], spans: &spans, documents: &documents };
        self.visitor.row(self.sequence, row);
    }

    /// Ends the window of the shard that was read.
    fn end_shard(&mut self) {
        if let Some(window) = &mut self.window {
            window.end(&mut |tokens, spans, documents| {
                self.visitor.row(self.sequence, FileRow { tokens, spans, documents });
                self.sequence += 1;
            });
        }
    }

    /// Gives the last rows of joined documents: those with the tokens that were put aside, and the
    /// tail.
    fn finish(&mut self) {
        if self.window.is_some() {
            return;
        }
        if self.head.is_none() && !self.pending.is_empty() {
            // The documents are shorter than the phase.
            let phase = self.phase % self.pending.len();
            self.take_head(phase);
        }
        if let Some((tokens, documents)) = self.head.replace(Default::default()) {
            let end = self.done + self.pending.len() as u64;
            self.begun.extend(documents.into_iter().map(|(start, document)| (end + start, document)));
            self.pending.extend(tokens);
            self.cut();
        }
        if self.pending.len() > self.overlap {
            self.give(0..self.pending.len());
        }
    }
}

/// The hashes of the values of `field` in all rows of a shard.
fn hashes_of(files: &Files, path: &Path, field: &DocumentField) -> Result<Vec<i64>> {
    let mut hashes = Vec::new();
    each_column(files, path, field.name, &mut |column| add_hashes(column, field.kind, &mut hashes))?;
    Ok(hashes)
}

fn add_hashes(column: &ArrayRef, kind: DocumentType, hashes: &mut Vec<i64>) -> Result<()> {
    let mut text = |text: Option<&str>| hashes.push(text_hash(text));
    match (column.data_type(), kind) {
        (DataType::Dictionary(..), _) => {
            let dictionary = column.as_any_dictionary();
            let mut of_values = Vec::new();
            add_hashes(dictionary.values(), kind, &mut of_values)?;
            let keys = if of_values.is_empty() { vec![0; column.len()] } else { dictionary.normalized_keys() };
            let hash = |row: usize| if column.is_null(row) { number_hash(None) } else { of_values[keys[row]] };
            hashes.extend((0..column.len()).map(hash));
        }
        (DataType::Utf8, _) => column.as_string::<i32>().iter().for_each(&mut text),
        (DataType::LargeUtf8, _) => column.as_string::<i64>().iter().for_each(&mut text),
        (DataType::Utf8View, _) => column.as_string_view().iter().for_each(&mut text),
        (_, DocumentType::Number(dtype)) => {
            let wide = field_values(column, dtype)?;
            hashes.extend(wide.as_primitive::<Int64Type>().iter().map(number_hash));
        }
        (other, DocumentType::Text) => return Err(Error::data(format!("a column of strings has type {other}"))),
    }
    Ok(())
}

fn read_file(files: &Files, path: &Path, column: &str, stream: &mut RowCutter<'_>) -> Result<()> {
    let mut rows = 0;
    each_column(files, path, column, &mut |column| {
        add(column, rows, stream)?;
        rows += column.len() as u64;
        Ok(())
    })?;
    // A plain column is one document.
    stream.end();
    Ok(())
}

/// Gives the batches of column `column` of the file at `path` to `take`, in order.
pub(crate) fn each_column(
    files: &Files,
    path: &Path,
    column: &str,
    take: &mut dyn FnMut(&ArrayRef) -> Result<()>,
) -> Result<()> {
    let unreadable = |error: std::io::Error| Error::io("cannot read the shard", error);
    let mut file = ShardReader::open(files, path)?;
    let mut magic = Vec::new();
    (&mut file).take(6).read_to_end(&mut magic).map_err(unreadable)?;
    file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    let mut each = |batch: std::result::Result<RecordBatch, ArrowError>, column: usize| {
        take(batch.map_err(unsound)?.column(column))
    };
    if magic.starts_with(b"PAR1") {
        let reader = token_column::parquet(files, path, column)?.build().map_err(unsound)?;
        for batch in reader {
            each(batch, 0)?;
        }
    } else if magic == b"ARROW1" {
        let reader = FileReader::try_new(BufReader::new(file), None).map_err(unsound)?;
        let index = token_column::arrow(&reader.schema(), column)?;
        for batch in reader {
            each(batch, index)?;
        }
    } else {
        let reader = StreamReader::try_new(BufReader::new(file), None).map_err(unsound)?;
        let index = token_column::arrow(&reader.schema(), column)?;
        for batch in reader {
            each(batch, index)?;
        }
    }
    Ok(())
}

/// Reads a flat file, for its ids or for the further column `column`.
fn read_flat(
    files: &Files,
    path: &Path,
    facts: &ShardFacts,
    column: Option<&str>,
    end_id: Option<u32>,
    stream: &mut RowCutter<'_>,
) -> Result<()> {
    let mut reader = FlatReader::open(files, path, facts, column, end_id)?;
    let mut rows = 0;
    while let Some(column) = reader.next()? {
        add(&column, rows, stream)?;
        rows += column.len() as u64;
    }
    stream.end();
    Ok(())
}

/// Adds the rows of a token column, after the `before` rows that were added already.
fn add(column: &ArrayRef, before: u64, stream: &mut RowCutter<'_>) -> Result<()> {
    let values = match column.data_type() {
        DataType::List(_) => column.as_list::<i32>().values(),
        DataType::LargeList(_) => column.as_list::<i64>().values(),
        DataType::FixedSizeList(..) => column.as_fixed_size_list().values(),
        _ => column,
    };
    if let Some(delivered) = stream.delivered {
        let wide = field_values(values, delivered)?;
        return add_typed::<Int64Type>(column, &wide, before, stream);
    }
    match values.data_type() {
        DataType::UInt8 => add_typed::<UInt8Type>(column, values, before, stream),
        DataType::UInt16 => add_typed::<UInt16Type>(column, values, before, stream),
        DataType::UInt32 => add_typed::<UInt32Type>(column, values, before, stream),
        DataType::Int8 => add_typed::<Int8Type>(column, values, before, stream),
        DataType::Int16 => add_typed::<Int16Type>(column, values, before, stream),
        DataType::Int32 => add_typed::<Int32Type>(column, values, before, stream),
        DataType::Int64 => add_typed::<Int64Type>(column, values, before, stream),
        other => Err(Error::data(format!("token column has type {other}"))),
    }
}

/// The values of a further column as 64-bit integers. Floating-point numbers appear as the bits of
/// the delivered type.
pub(crate) fn field_values(values: &ArrayRef, delivered: Dtype) -> Result<ArrayRef> {
    if let Some(values) = values.as_boolean_opt() {
        let wide = values.values().iter().map(i64::from).collect::<Vec<_>>();
        return Ok(Arc::new(Int64Array::new(wide.into(), values.nulls().cloned())));
    }
    if delivered == Dtype::F32
        && let Some(halves) = values.as_primitive_opt::<Float16Type>()
    {
        let wide = halves.unary::<_, Int64Type>(|value| i64::from(value.to_f32().to_bits()));
        return Ok(Arc::new(wide));
    }
    let data_type = values.data_type();
    let width = data_type.primitive_width().filter(|_| data_type.is_numeric());
    let width = width.ok_or_else(|| Error::data(format!("a column of `fields` has type {data_type}")))?;
    let data = values.to_data();
    let unused = 64 - 8 * width as u32;
    let wide = data.buffers()[0].as_slice().chunks_exact(width).skip(data.offset()).take(data.len()).map(|value| {
        let mut bytes = [0; 8];
        bytes[..width].copy_from_slice(value);
        let value = i64::from_le_bytes(bytes);
        if data_type.is_signed_integer() { value << unused >> unused } else { value }
    });
    Ok(Arc::new(Int64Array::new(wide.collect::<Vec<_>>().into(), values.nulls().cloned())))
}

fn add_typed<T: ArrowPrimitiveType>(
    column: &ArrayRef,
    values: &ArrayRef,
    before: u64,
    stream: &mut RowCutter<'_>,
) -> Result<()>
where
    T::Native: Into<i64>,
{
    let values = values.as_primitive::<T>();
    let range = |row: usize| match column.data_type() {
        DataType::List(_) => {
            let offsets = column.as_list::<i32>().value_offsets();
            offsets[row] as usize..offsets[row + 1] as usize
        }
        DataType::LargeList(_) => {
            let offsets = column.as_list::<i64>().value_offsets();
            offsets[row] as usize..offsets[row + 1] as usize
        }
        _ => {
            let list = column.as_fixed_size_list();
            let start = list.value_offset_at(row);
            start..start + list.value_length() as usize
        }
    };
    let without_nulls = |document: Range<usize>, row: u64| {
        if values.null_count() > 0 && document.clone().any(|at| values.is_null(at)) {
            return Err(Error::data("a token is null").at_row(row));
        }
        Ok(&values.values()[document])
    };
    if !column.data_type().is_nested() {
        stream.tokens(0, without_nulls(0..values.len(), 0)?);
        return Ok(());
    }
    for index in (0..column.len()).filter(|index| column.is_valid(*index)) {
        let row = before + index as u64;
        stream.document(row, without_nulls(range(index), row)?)?;
    }
    Ok(())
}
