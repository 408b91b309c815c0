//! Per-document columns: one number or string in each row of a file.
//!
//! A [`DocumentColumn`] is read by parts: runs of rows inside a row group or a record batch. The
//! readers of arrow-rs decode them. The formats of this room give the places. Nulls are kept.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, new_null_array};
use arrow_schema::DataType;

use super::{DecodedBlock, Format, OpenOptions, recognise};
use crate::error::{Error, Result};
use crate::format::arrow::ArrowBatches;
use crate::format::parquet::ParquetColumn;
use crate::storage::{Reads, SourceFile};
use crate::text::escaped;
use crate::tokens::{DocumentType, Dtype};

/// Bytes near which the parts of a column are cut.
const PART_BYTES: u64 = 512 << 10;

/// A per-document column of an opened file.
#[derive(Debug)]
pub struct DocumentColumn {
    name: String,
    file: SourceFile,
    kind: DocumentType,
    /// First row of each part, and last the number of rows.
    starts: Vec<u64>,
    content: Content,
}

/// The way to the rows of a column.
#[derive(Debug)]
enum Content {
    Arrow(ArrowBatches),
    Parquet(ParquetColumn),
}

impl DocumentColumn {
    /// Opens column `name` of the file at `path`. Returns `None` if its format has no such columns,
    /// or if each row of the column is a list.
    pub fn open(path: &Path, name: &str, options: &OpenOptions) -> Result<Option<Self>> {
        let source = options.files.open(path, options.io)?;
        let mut reads = Reads::new(source);
        let format = recognise(&mut reads, path, options)?.format;
        let (content, data_type) = match format {
            Format::Parquet => {
                let column = ParquetColumn::open(reads.file(), name, options.memory_budget)?;
                let data_type = column.data_type().clone();
                (Content::Parquet(column), data_type)
            }
            Format::ArrowFile | Format::ArrowStream => {
                let batches = ArrowBatches::read(&mut reads, format, name, options.memory_budget)?;
                let data_type = batches.data_type().clone();
                (Content::Arrow(batches), data_type)
            }
            _ => return Ok(None),
        };
        if data_type.is_nested() {
            return Ok(None);
        }
        let kind = kind_of(&data_type).ok_or_else(|| {
            let name = escaped(name);
            Error::data(format!(
                "column `{name}` has type {data_type}: expected a list for each row, or a number, bool or string"
            ))
        })?;
        let groups: Vec<(u64, u64)> = match &content {
            Content::Arrow(batches) => batches.rows().map(|rows| (rows, batches.part_rows())).collect(),
            Content::Parquet(column) => {
                let part_rows = |(rows, bytes): (u64, u64)| {
                    let of_row = if kind == DocumentType::Text { bytes.div_ceil(rows.max(1)) + 5 } else { 9 };
                    (rows, (PART_BYTES / of_row).max(1))
                };
                column.groups().map(part_rows).collect()
            }
        };
        let starts = starts_of(&groups, options.memory_budget)?;
        Ok(Some(Self { name: name.to_owned(), file: reads.into_file(), kind, starts, content }))
    }

    /// Name of the column.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The opened file.
    pub fn file(&self) -> &SourceFile {
        &self.file
    }

    /// Type of the values.
    pub fn kind(&self) -> DocumentType {
        self.kind
    }

    /// Number of rows of the file.
    pub fn rows(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    /// Closes the file until its next use.
    pub(crate) fn let_go(&mut self) {
        self.file.let_go();
    }

    /// Bytes of the tables that find values.
    pub fn index_bytes(&self) -> u64 {
        size_of_val(self.starts.as_slice()) as u64
    }

    /// The part with row `row`, and the number of the row in it.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn locate(&self, row: u64) -> (usize, usize) {
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        let part = self.starts.partition_point(|start| *start <= row) - 1;
        (part, (row - self.starts[part]) as usize)
    }

    /// Number of parts.
    pub fn parts(&self) -> usize {
        self.starts.len() - 1
    }

    /// The row after the last row of part `part`.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn part_end(&self, part: usize) -> u64 {
        self.starts[part + 1]
    }

    /// Decodes part `part` into `out`, in the form that [`Values`] reads.
    pub fn decode_into(&self, part: usize, out: &mut DecodedBlock) -> Result<()> {
        let rows = self.starts[part]..self.starts[part + 1];
        // The reader panics on some kinds of damage that it could report.
        catch_unwind(AssertUnwindSafe(|| self.decode_rows(rows, out)))
            .unwrap_or_else(|_| Err(Error::data(format!("column `{}` is damaged: arrow-rs gave up", self.name))))
            .map_err(|error| error.at(self.file.path()))
    }

    fn decode_rows(&self, rows: Range<u64>, out: &mut DecodedBlock) -> Result<()> {
        let size = if let DocumentType::Number(dtype) = self.kind { dtype.size() } else { 0 };
        let count = (rows.end - rows.start) as usize;
        // A damaged file may claim any number of rows.
        let no_memory = |error| Error::data(format!("no memory for a block of {count} rows")).with_source(error);
        let mut flags = Vec::new();
        flags.try_reserve_exact(count).map_err(no_memory)?;
        out.reset(0, 0).map_err(|error| Error::data("no memory for a block").with_source(error))?;
        out.bytes.try_reserve(count.saturating_mul(size + 1)).map_err(no_memory)?;
        let mut add = |array: &ArrayRef| {
            add_values(array, self.kind, out)?;
            add_flags(array, &mut flags);
            Ok::<_, Error>(())
        };
        match &self.content {
            Content::Arrow(batches) => batches.each(&self.file, rows, &mut add)?,
            Content::Parquet(column) => column.each(&self.file, rows, &mut add)?,
        }
        if flags.len() != count {
            return Err(Error::data(format!("column `{}` has {} rows, expected {count}", self.name, flags.len())));
        }
        out.bytes.extend_from_slice(&flags);
        out.complete = true;
        Ok(())
    }
}

/// The first row of each part, and last the number of rows. `groups` gives the rows of each row
/// group or record batch, and the rows of a part of it.
///
/// A damaged file may claim any number of rows, so the parts are counted before the list is made.
fn starts_of(groups: &[(u64, u64)], memory_budget: u64) -> Result<Vec<u64>> {
    let parts = groups.iter().fold(0_u64, |parts, (rows, of_part)| parts.saturating_add(rows.div_ceil(*of_part)));
    let bytes = parts.saturating_mul(size_of::<u64>() as u64);
    if bytes > memory_budget {
        return Err(Error::data(format!(
            "the list of its {parts} parts takes {bytes} bytes, more than `memory_budget` = {memory_budget}: raise it, \
             or check the file, which may claim rows that it does not have"
        )));
    }
    let (mut starts, mut row) = (vec![0], 0_u64);
    for (rows, of_part) in groups {
        let end = row.checked_add(*rows).ok_or_else(|| Error::data("the number of rows is impossible"))?;
        while row < end {
            row = row.saturating_add(*of_part).min(end);
            starts.push(row);
        }
    }
    Ok(starts)
}

/// The values of a decoded part.
///
/// The bytes of the block hold the values of all rows, and then one byte for each row: 0 if it is
/// null. The ends of strings are the ends of the block.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    kind: DocumentType,
    block: &'a DecodedBlock,
}

impl<'a> Values<'a> {
    /// Views `block`, which [`DocumentColumn::decode_into`] filled.
    pub fn of(kind: DocumentType, block: &'a DecodedBlock) -> Self {
        Self { kind, block }
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        match self.kind {
            DocumentType::Number(dtype) => self.block.bytes.len() / (dtype.size() + 1),
            DocumentType::Text => self.block.ends.len(),
        }
    }

    /// The bytes of the value of row `row`: a little-endian number, or UTF-8. `None` if it is null.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn get(&self, row: usize) -> Option<&'a [u8]> {
        let bytes = &self.block.bytes;
        let flags = &bytes[bytes.len() - self.len()..];
        if flags[row] == 0 {
            return None;
        }
        Some(match self.kind {
            DocumentType::Number(dtype) => &bytes[row * dtype.size()..(row + 1) * dtype.size()],
            DocumentType::Text => {
                let start = if row == 0 { 0 } else { self.block.ends[row - 1] as usize };
                &bytes[start..self.block.ends[row] as usize]
            }
        })
    }
}

/// The type of values that Arrow calls `data_type`. `None` if no field can have it.
pub fn kind_of(data_type: &DataType) -> Option<DocumentType> {
    Some(match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => DocumentType::Text,
        DataType::Dictionary(_, values) => return kind_of(values),
        DataType::UInt64 => DocumentType::Number(Dtype::U64),
        other => DocumentType::Number(super::arrow::dtype_of(other)?),
    })
}

/// Appends 1 for each row of `array` with a value, and 0 for each null.
fn add_flags(array: &ArrayRef, flags: &mut Vec<u8>) {
    let Some(dictionary) = array.as_any_dictionary_opt().filter(|all| !all.values().is_empty()) else {
        flags.extend((0..array.len()).map(|row| u8::from(array.is_valid(row))));
        return;
    };
    let keys = dictionary.normalized_keys().into_iter().enumerate();
    flags.extend(keys.map(|(row, key)| u8::from(array.is_valid(row) && dictionary.values().is_valid(key))));
}

/// Appends the values of `array` to `out`. A null has any bytes.
fn add_values(array: &ArrayRef, kind: DocumentType, out: &mut DecodedBlock) -> Result<()> {
    let too_long = |_| Error::data("strings of a block have more than 4 GiB: write smaller row groups");
    let mut add = |text: &str| {
        out.bytes.extend_from_slice(text.as_bytes());
        out.ends.push(u32::try_from(out.bytes.len()).map_err(too_long)?);
        Ok(())
    };
    match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().iter().try_for_each(|text| add(text.unwrap_or_default())),
        DataType::LargeUtf8 => array.as_string::<i64>().iter().try_for_each(|text| add(text.unwrap_or_default())),
        DataType::Utf8View => array.as_string_view().iter().try_for_each(|text| add(text.unwrap_or_default())),
        DataType::Boolean => {
            out.bytes.extend(array.as_boolean().values().iter().map(u8::from));
            Ok(())
        }
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let values = dictionary.values();
            if values.is_empty() {
                // All rows are null.
                return add_values(&new_null_array(values.data_type(), array.len()), kind, out);
            }
            dictionary.normalized_keys().into_iter().try_for_each(|key| add_values(&values.slice(key, 1), kind, out))
        }
        other => {
            let DocumentType::Number(dtype) = kind else { return Err(unexpected(other, kind)) };
            let data = array.to_data();
            if other.primitive_width() != Some(dtype.size()) {
                return Err(unexpected(other, kind));
            }
            let start = data.offset() * dtype.size();
            out.bytes.extend_from_slice(&data.buffers()[0].as_slice()[start..start + data.len() * dtype.size()]);
            Ok(())
        }
    }
}

fn unexpected(found: &DataType, kind: DocumentType) -> Error {
    Error::data(format!("arrow-rs gives {found}, expected {}", kind.name()))
}
