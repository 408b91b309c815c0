//! Fallback: decodes whole row groups with the arrow reader.
//!
//! The arrow reader is slower than [`super::values`], but it knows every corner of the format. The
//! shard uses it for row groups with encodings that [`super::pages`] does not know.

use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_schema::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};

use super::claims;
use super::column::Column;
use crate::error::{Error, Result};
use crate::storage::SourceFile;
use crate::tokens::Tokens;

/// One decoded row group.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    /// Token ids in the logical width. Null tokens have an arbitrary value.
    pub(super) bytes: Vec<u8>,
    /// Ends of the non-empty documents. Empty if each row is a token.
    pub(super) ends: Vec<u32>,
    /// Row of each non-empty document, counted from the row group's first row.
    pub(super) rows: Vec<u64>,
    /// Row of the first null token.
    pub(super) null: Option<u64>,
    /// First row of a further column that is null.
    pub(super) null_list: Option<u64>,
    /// Number of values in each row, if the caller asked for it. `None` stands for a null row.
    pub(super) lengths: Option<Vec<Option<u64>>>,
}

/// Gives the parquet crate access to the bytes of a file.
pub(super) struct Chunks(pub(super) SourceFile);

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Chunks {
    type T = Box<dyn Read>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        // The reader reads only footers and page headers this way, a few kB each.
        let end = self.0.len().min(start.saturating_add(1 << 20));
        let bytes = self.0.bytes(start..end.max(start)).map_err(|error| ParquetError::External(Box::new(error)))?;
        Ok(Box::new(std::io::Cursor::new(bytes)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<bytes::Bytes> {
        let end = start.saturating_add(length as u64);
        self.0.bytes(start..end).map_err(|error| ParquetError::External(Box::new(error)))
    }
}

/// Decodes row group `index`.
pub(super) fn read(file: &SourceFile, column: &Column, index: usize) -> Result<Decoded> {
    decode(file, column, index, Decoded::default())
}

/// Reads the number of values in each row of row group `index`. `None` stands for a null row.
pub(super) fn row_lengths(file: &SourceFile, column: &Column, index: usize) -> Result<Vec<Option<u64>>> {
    let decoded = decode(file, column, index, Decoded { lengths: Some(Vec::new()), ..Decoded::default() })?;
    Ok(decoded.lengths.unwrap_or_default())
}

fn decode(file: &SourceFile, column: &Column, index: usize, decoded: Decoded) -> Result<Decoded> {
    // The reader panics on some kinds of damage that it could report.
    catch_unwind(AssertUnwindSafe(|| read_inner(file, column, index, decoded)))
        .unwrap_or_else(|_| Err(Error::data(format!("row group {index} is damaged: the arrow reader gave up on it"))))
}

fn read_inner(file: &SourceFile, column: &Column, index: usize, mut decoded: Decoded) -> Result<Decoded> {
    let failed = |error: ParquetError| Error::data(format!("cannot read row group {index}")).with_source(error);
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let metadata = super::read_metadata(file)?;
    if let Some(group) = metadata.row_groups().get(index)
        && column.leaf < group.num_columns()
    {
        claims::check_sizes(file, group.column(column.leaf), group.num_rows(), column.most_bytes)?;
    }
    let metadata = ArrowReaderMetadata::try_new(Arc::new(metadata), options).map_err(failed)?;
    let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(Chunks(file.clone()), metadata);
    let mask = ProjectionMask::leaves(builder.parquet_schema(), [column.leaf]);
    let reader = builder.with_projection(mask).with_row_groups(vec![index]).build().map_err(failed)?;
    let mut row = 0;
    for batch in reader {
        let batch = batch.map_err(|error| Error::data(format!("cannot read row group {index}")).with_source(error))?;
        push(&mut decoded, column, batch.column(0), row)?;
        row += batch.num_rows() as u64;
    }
    Ok(decoded)
}

fn push(decoded: &mut Decoded, column: &Column, array: &ArrayRef, first_row: u64) -> Result<()> {
    let width = column.dtype.size();
    let (values, offsets) = match array.data_type() {
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            (list.values(), list.offsets().iter().map(|&offset| offset as usize).collect::<Vec<_>>())
        }
        _ => (array, Vec::new()),
    };
    let bytes = &*raw(values, column)?;
    if let Some(lengths) = &mut decoded.lengths {
        let length = |row: usize| offsets.get(row + 1).map_or(1, |end| (end - offsets[row]) as u64);
        lengths.extend((0..array.len()).map(|row| array.is_valid(row).then(|| length(row))));
    }
    if !column.lists {
        if values.null_count() > 0 {
            let at = (0..values.len()).find(|&i| values.is_null(i)).unwrap_or(0);
            decoded.null.get_or_insert(first_row + at as u64);
        }
        decoded.bytes.extend_from_slice(bytes);
        return Ok(());
    }
    for (i, pair) in offsets.windows(2).enumerate() {
        let row = first_row + i as u64;
        if column.is_field && array.is_null(i) {
            decoded.null_list.get_or_insert(row);
        }
        if array.is_null(i) || pair[0] == pair[1] {
            continue;
        }
        if values.null_count() > 0 && (pair[0]..pair[1]).any(|at| values.is_null(at)) {
            decoded.null.get_or_insert(row);
        }
        decoded.bytes.extend_from_slice(&bytes[pair[0] * width..pair[1] * width]);
        let end = u32::try_from(decoded.bytes.len() / width)
            .map_err(|_| Error::data("a row group has more than 2^32 tokens: write smaller row groups"))?;
        decoded.ends.push(end);
        decoded.rows.push(row);
    }
    Ok(())
}

/// The bytes of `values` in the type of decoded values.
fn raw(values: &ArrayRef, column: &Column) -> Result<Vec<u8>> {
    let (stored, dtype) = (column.stored, column.dtype);
    if let Some(values) = values.as_boolean_opt() {
        return Ok(values.values().iter().map(u8::from).collect());
    }
    let data = values.to_data();
    let width = stored.size();
    if data.data_type().primitive_width() != Some(width) {
        let found = values.data_type();
        return Err(Error::data(format!("the arrow reader gives {found}, expected {}", stored.name())));
    }
    let bytes = &data.buffers()[0].as_slice()[data.offset() * width..][..data.len() * width];
    if stored == dtype {
        return Ok(bytes.to_vec());
    }
    let values = Tokens::new(stored, bytes);
    Ok((0..values.len()).flat_map(|index| values.get(index).to_le_bytes().into_iter().take(dtype.size())).collect())
}
