//! Arrow IPC shards, as files and as streams.
//!
//! Opening walks the messages by their flatbuffers alone and builds no Arrow arrays. It finds the
//! offsets and the values of the token column in each record batch, checks every buffer against the
//! file, and scans the list offsets once. Uncompressed batches are then read in place; compressed
//! batches are decoded whole. Format: the Arrow columnar specification, "Serialization and
//! Interprocess Communication".

mod batches;
mod compressed;
mod messages;
mod random;

use arrow_schema::DataType;

use super::{
    FileSample, Format, Holds, OpenOptions, Recognised, Shard, check_empty_rows, choose_column, column_title, null_list,
};
use crate::error::{Error, Result};
use crate::storage::Reads;
use crate::tokens::Dtype;
pub(super) use batches::ArrowBatches;
use messages::BatchParts;

/// Shape of the rows of the token column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RowShape {
    /// Lists of any length. The value is the number of bytes of an offset.
    List { offset_width: usize },
    /// Lists of equal length.
    FixedSizeList { length: u64 },
    /// One token per row. The file is one document.
    Plain,
}

/// The token column, and the places of its parts among the parts of a record batch.
#[derive(Clone, Debug)]
struct Column {
    name: String,
    /// Whether it is a further column, and not that of the tokens.
    is_field: bool,
    kind: RowShape,
    dtype: Dtype,
    /// Index of the column's first field node.
    node: usize,
    /// Index of the column's first buffer, without the variable buffers of views before it.
    buffer: usize,
    /// Number of columns of view type before it. Each record batch gives the number of their
    /// buffers.
    views: usize,
    /// Set if the column cannot hold tokens. A file without tokens is sound all the same.
    refused: Option<Refused>,
}

/// Why a column cannot hold tokens, and the number that shows that a record batch has none.
#[derive(Clone, Debug)]
struct Refused {
    error: Error,
    shown_by: ShownBy,
}

/// The number of a record batch that has to be 0 if it has no tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ShownBy {
    Rows,
    /// The elements of all lists.
    Elements,
    /// None: all rows are null.
    Nothing,
}

/// The shape of a column's rows, and the type of its elements.
fn shape(data_type: &DataType) -> Option<(RowShape, &DataType)> {
    Some(match data_type {
        DataType::List(item) => (RowShape::List { offset_width: 4 }, item.data_type()),
        DataType::LargeList(item) => (RowShape::List { offset_width: 8 }, item.data_type()),
        DataType::FixedSizeList(item, length) => {
            (RowShape::FixedSizeList { length: u64::try_from(*length).ok()? }, item.data_type())
        }
        other => (RowShape::Plain, other),
    })
}

/// What the rows of a column hold, for the choice among columns.
fn holds(data_type: &DataType) -> Holds {
    match shape(data_type) {
        Some((RowShape::Plain, element)) if element.is_integer() => Holds::Numbers,
        Some((RowShape::Plain, _)) | None => Holds::Other,
        Some((_, element)) if element.is_integer() => Holds::Lists,
        Some(_) => Holds::Other,
    }
}

impl Column {
    fn find(schema: &arrow_schema::Schema, options: &OpenOptions, legacy_unions: bool) -> Result<Self> {
        let columns: Vec<(&str, Holds)> =
            schema.fields().iter().map(|field| (field.name().as_str(), holds(field.data_type()))).collect();
        let name = choose_column(&columns, options)?;
        let is_field = options.is_field;
        let mut counts = NodeCounts { legacy_unions, ..NodeCounts::default() };
        for field in schema.fields() {
            if field.name() != name {
                counts.add(field.data_type());
                continue;
            }
            let refused = || {
                Error::data(format!(
                    "{} has type {}: expected a list, large list or fixed-size list of {}, or a plain column of these",
                    column_title(is_field, name),
                    field.data_type(),
                    Dtype::accepted(is_field)
                ))
            };
            let (kind, element) = shape(field.data_type()).ok_or_else(refused)?;
            let dtype = dtype_of(element).filter(|dtype| is_field || dtype.is_id());
            let shown_by = match (kind, element) {
                (RowShape::Plain, DataType::Null) => ShownBy::Nothing,
                (RowShape::Plain, _) => ShownBy::Rows,
                _ => ShownBy::Elements,
            };
            return Ok(Self {
                name: name.to_owned(),
                is_field,
                kind,
                refused: if dtype.is_none() { Some(Refused { error: refused(), shown_by }) } else { None },
                dtype: dtype.unwrap_or(Dtype::I32),
                node: counts.nodes,
                buffer: counts.buffers,
                views: counts.views,
            });
        }
        unreachable!("the column was chosen among these fields")
    }

    /// A column that is not there, of a file without rows.
    fn missing(error: Error) -> Self {
        Self {
            name: String::new(),
            is_field: false,
            kind: RowShape::List { offset_width: 4 },
            dtype: Dtype::I32,
            node: 0,
            buffer: 0,
            views: 0,
            refused: Some(Refused { error, shown_by: ShownBy::Rows }),
        }
    }
}

/// The type of per-token values that Arrow calls `element`.
pub(super) fn dtype_of(element: &DataType) -> Option<Dtype> {
    Some(match element {
        DataType::Boolean => Dtype::Bool,
        DataType::UInt8 => Dtype::U8,
        DataType::UInt16 => Dtype::U16,
        DataType::UInt32 => Dtype::U32,
        DataType::Int8 => Dtype::I8,
        DataType::Int16 => Dtype::I16,
        DataType::Int32 => Dtype::I32,
        DataType::Int64 => Dtype::I64,
        DataType::Float16 => Dtype::F16,
        DataType::Float32 => Dtype::F32,
        DataType::Float64 => Dtype::F64,
        _ => return None,
    })
}

/// Bytes that the first `values` values of a buffer take in a file. Booleans are packed.
fn stored_bytes(dtype: Dtype, values: u64) -> Option<u64> {
    if dtype == Dtype::Bool { Some(values.div_ceil(8)) } else { values.checked_mul(dtype.size() as u64) }
}

/// Appends booleans `range` of the packed `bits` to `out`, a byte each.
fn unpack(bits: &[u8], range: std::ops::Range<u64>, out: &mut Vec<u8>) {
    out.extend(range.map(|index| bits[(index / 8) as usize] >> (index % 8) & 1));
}

impl Column {
    /// The error about a null among the values of a list.
    fn null_value(&self) -> Error {
        if self.is_field {
            return Error::data(format!("column `{}` has a null value: every value must be set", self.name));
        }
        Error::data("null token: every id in a document must be set")
    }

    /// Values of each row of `batch`, by the buffers of its offsets and validity; none where a row
    /// is null.
    fn row_lengths(&self, batch: &BatchParts, offsets: &[u8], validity: &[u8]) -> Result<Vec<Option<u64>>> {
        let stores_nothing = self.refused.is_some() || self.kind == (RowShape::FixedSizeList { length: 0 });
        if stores_nothing {
            check_empty_rows(batch.rows)?;
        }
        let mut lengths = Vec::with_capacity(batch.rows as usize);
        for row in 0..batch.rows {
            let length = match self.kind {
                RowShape::List { offset_width } => {
                    let end = read_offset(offsets, offset_width, row + 1)?;
                    end.saturating_sub(read_offset(offsets, offset_width, row)?)
                }
                RowShape::FixedSizeList { length } => length,
                RowShape::Plain => 1,
            };
            let is_null = !validity.is_empty() && validity[(row / 8) as usize] & (1 << (row % 8)) == 0;
            lengths.push((!is_null).then_some(length));
        }
        Ok(lengths)
    }
}

/// Fails if a column has a type that no writer can mean, such as a decimal of precision 0.
fn check_types(schema: &arrow_schema::Schema) -> Result<()> {
    for field in schema.flattened_fields() {
        let damaged = |what: String| Error::data(format!("Arrow schema is damaged: column `{}` {what}", field.name()));
        let (precision, most) = match field.data_type() {
            DataType::Decimal32(precision, _) => (*precision, 9),
            DataType::Decimal64(precision, _) => (*precision, 18),
            DataType::Decimal128(precision, _) => (*precision, 38),
            DataType::Decimal256(precision, _) => (*precision, 76),
            DataType::FixedSizeBinary(width) | DataType::FixedSizeList(_, width) if *width < 0 => {
                return Err(damaged(format!("has a length of {width}")));
            }
            _ => continue,
        };
        if !(1..=most).contains(&precision) {
            return Err(damaged(format!("is a decimal of precision {precision}, which must be 1 to {most}")));
        }
    }
    Ok(())
}

/// Number of field nodes and buffers that columns occupy in a record batch.
#[derive(Clone, Copy, Debug, Default)]
struct NodeCounts {
    nodes: usize,
    buffers: usize,
    views: usize,
    /// Before metadata version 5, unions had a validity buffer.
    legacy_unions: bool,
}

impl NodeCounts {
    fn add(&mut self, data_type: &DataType) {
        self.nodes += 1;
        match data_type {
            DataType::Null => {}
            DataType::Utf8 | DataType::Binary | DataType::LargeUtf8 | DataType::LargeBinary => self.buffers += 3,
            DataType::Utf8View | DataType::BinaryView => {
                self.buffers += 2;
                self.views += 1;
            }
            DataType::List(item) | DataType::LargeList(item) | DataType::Map(item, _) => {
                self.buffers += 2;
                self.add(item.data_type());
            }
            DataType::ListView(item) | DataType::LargeListView(item) => {
                self.buffers += 3;
                self.add(item.data_type());
            }
            DataType::FixedSizeList(item, _) => {
                self.buffers += 1;
                self.add(item.data_type());
            }
            DataType::Struct(fields) => {
                self.buffers += 1;
                fields.iter().for_each(|field| self.add(field.data_type()));
            }
            DataType::Union(fields, mode) => {
                self.buffers +=
                    1 + usize::from(*mode == arrow_schema::UnionMode::Dense) + usize::from(self.legacy_unions);
                fields.iter().for_each(|(_, field)| self.add(field.data_type()));
            }
            DataType::RunEndEncoded(ends, values) => {
                self.add(ends.data_type());
                self.add(values.data_type());
            }
            // Dictionaries store their indices here. All other types have a fixed width.
            _ => self.buffers += 2,
        }
    }
}

/// A run of documents of a record batch whose tokens are adjacent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DocumentRun {
    /// First row, counted in the record batch.
    row: u64,
    rows: u64,
    /// First token, counted in the record batch's values.
    start: u64,
    tokens: u64,
    /// Number of documents with tokens.
    filled: u64,
}

/// Recognises the Arrow IPC file format by the magic at both ends of the file.
pub(crate) fn recognise_file(sample: &FileSample<'_>) -> Recognised {
    match (sample.head.starts_with(b"ARROW1"), sample.tail.ends_with(b"ARROW1")) {
        (true, true) => Recognised::Yes,
        (true, false) => Recognised::Refused(Error::data(
            "Arrow file is truncated: it begins with `ARROW1` and does not end with it; write or copy it again",
        )),
        _ if sample.head.starts_with(b"FEA1") => Recognised::Refused(Error::data(
            "Feather version 1 is not supported; write Arrow IPC (Feather version 2) instead",
        )),
        _ => Recognised::No,
    }
}

/// Recognises the Arrow IPC stream format by the first message.
pub(crate) fn recognise_stream(sample: &FileSample<'_>) -> Recognised {
    let word = |at: usize| sample.head.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    // A stream begins with a continuation marker. Before Arrow 0.15, it began with the length of
    // its schema.
    let plausible = |length: u32| length > 0 && u64::from(length) + 4 <= sample.len && length.is_multiple_of(4);
    match (word(0), word(4)) {
        (Some(u32::MAX), _) => Recognised::Yes,
        (Some(length), Some(_)) if plausible(length) && length < 1 << 24 => Recognised::Yes,
        _ => Recognised::No,
    }
}

/// Opens the file of `reads`, whose content is known to be Arrow IPC of `format`.
pub(crate) fn open(mut reads: Reads, format: Format, options: &OpenOptions) -> Result<Shard> {
    let messages = messages::Messages::read(&mut reads, format, options)?;
    let file = reads.into_file();
    if messages.batches.iter().any(|batch| batch.compression.is_some()) {
        return Ok(Shard::Block(Box::new(compressed::CompressedArrow::new(file, messages, options)?)));
    }
    Ok(Shard::Random(Box::new(random::MappedArrow::new(file, messages))))
}

/// Cuts the documents of `batch` into runs of at most about `run_tokens` tokens and `run_rows`
/// rows, and adds them to `out`.
///
/// `offsets`, `validity` and `child_validity` are the buffers of the record batch, empty if it has
/// none. Null documents count as empty. A null document that covers tokens ends a run. Fails if an
/// offset is negative, below the one before it, or outside the values, or if a document has a null
/// token.
fn runs(
    column: &Column,
    batch: &BatchParts,
    (offsets, validity, child_validity): (&[u8], &[u8], &[u8]),
    limits: (u64, u64),
    out: &mut Vec<DocumentRun>,
) -> Result<()> {
    if batch.rows == 0 {
        return Ok(());
    }
    let enough = |count: usize| {
        let missing =
            || Error::data(format!("list offsets end after {} bytes, offset {count} is missing", offsets.len()));
        if batch.rows < count as u64 { Ok(()) } else { Err(missing()) }
    };
    let bits = (validity, child_validity);
    let even = match column.kind {
        RowShape::List { .. } => None,
        RowShape::FixedSizeList { length } => Some(length),
        RowShape::Plain => Some(1),
    };
    if let Some(length) = even
        && validity.is_empty()
        && child_validity.is_empty()
    {
        even_runs(batch.rows, length, limits, out);
        return Ok(());
    }
    match column.kind {
        RowShape::List { offset_width: 4 } => {
            let (offsets, _) = offsets.as_chunks();
            enough(offsets.len())?;
            cut(column, batch, |row| i64::from(i32::from_le_bytes(offsets[row as usize])), bits, limits, out)
        }
        RowShape::List { .. } => {
            let (offsets, _) = offsets.as_chunks();
            enough(offsets.len())?;
            cut(column, batch, |row| i64::from_le_bytes(offsets[row as usize]), bits, limits, out)
        }
        // The values of lists of equal length have no gaps.
        RowShape::FixedSizeList { length } => cut(column, batch, |row| (row * length) as i64, bits, limits, out),
        RowShape::Plain => cut(column, batch, |row| row as i64, bits, limits, out),
    }
}

/// Does the work of [`runs`] for `rows` rows of `length` values, none of which is null. Looks at no
/// single row: rows of empty lists take no bytes, so a damaged file may claim any number of them.
fn even_runs(rows: u64, length: u64, (run_tokens, run_rows): (u64, u64), out: &mut Vec<DocumentRun>) {
    if length == 0 {
        return;
    }
    let most = run_tokens.div_ceil(length).min(run_rows).max(1);
    let mut row = 0;
    while row < rows {
        let here = most.min(rows - row);
        out.push(DocumentRun { row, rows: here, start: row * length, tokens: here * length, filled: here });
        row += here;
    }
}

/// Does the work of [`runs`]. `end_at` gives the end of a number of rows. Plain rows and the rows
/// of a further column may not be null.
fn cut(
    column: &Column,
    batch: &BatchParts,
    end_at: impl Fn(u64) -> i64,
    (validity, child_validity): (&[u8], &[u8]),
    (run_tokens, run_rows): (u64, u64),
    out: &mut Vec<DocumentRun>,
) -> Result<()> {
    let is_null = |bits: &[u8], index: u64| !bits.is_empty() && bits[(index / 8) as usize] & (1 << (index % 8)) == 0;
    let null_token = |row: u64| column.null_value().at_row(batch.first_row + row);
    let plain = column.kind == RowShape::Plain;
    // A negative offset becomes larger than any count.
    let mut start = end_at(0) as u64;
    let mut run = DocumentRun { row: 0, rows: 0, start, tokens: 0, filled: 0 };
    for row in 0..batch.rows {
        let end = end_at(row + 1) as u64;
        if end < start || end > batch.values {
            let negative = [row, row + 1].into_iter().find(|row| end_at(*row) < 0);
            return Err(Error::data(match negative {
                Some(row) => format!("list offset {row} of the batch is negative: {}", end_at(row)),
                None => format!("list offsets are damaged: values {start} to {end} of {}", batch.values),
            })
            .at_row(batch.first_row + row));
        }
        let null = is_null(validity, row);
        if plain && null {
            return Err(null_token(row));
        }
        if column.is_field && null {
            return Err(null_list(&column.name).at_row(batch.first_row + row));
        }
        let ends_run = if null && end > start {
            true
        } else {
            if !child_validity.is_empty() && (start..end).any(|token| is_null(child_validity, token)) {
                return Err(null_token(row));
            }
            run.rows += 1;
            run.tokens += end - start;
            run.filled += u64::from(end > start);
            run.tokens >= run_tokens || run.rows >= run_rows
        };
        if ends_run {
            if run.tokens > 0 {
                out.push(run);
            }
            run = DocumentRun { row: row + 1, rows: 0, start: end, tokens: 0, filled: 0 };
        }
        start = end;
    }
    if run.tokens > 0 {
        out.push(run);
    }
    Ok(())
}

fn read_offset(offsets: &[u8], width: usize, index: u64) -> Result<u64> {
    let at = index as usize * width;
    let value = match (width, offsets.get(at..at + width)) {
        (4, Some(b)) => i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        (8, Some(b)) => i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
        _ => {
            return Err(Error::data(format!(
                "list offsets end after {} bytes, offset {index} is missing",
                offsets.len()
            )));
        }
    };
    u64::try_from(value).map_err(|_| Error::data(format!("list offset {index} is negative: {value}")))
}

#[cfg(test)]
mod tests;
