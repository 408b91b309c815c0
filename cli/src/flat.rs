//! Reads flat files of ids in order, as arrays of arrow-rs. A loader must deliver the same content.
//!
//! The module shares no code with the loader's own reading of these formats. It reads from front to
//! back, and takes the memory of one batch. A file with one document gives plain arrays. Other
//! files give lists.

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{
    ArrayRef, BooleanArray, Int8Array, Int16Array, Int32Array, Int64Array, LargeListArray, UInt8Array, UInt16Array,
    UInt32Array, new_empty_array,
};
use arrow_buffer::OffsetBuffer;
use arrow_schema::{DataType, Field};
use forebay::format::{Format, ShardFacts};
use forebay::storage::Files;
use forebay::tokens::Dtype;
use forebay::{Error, Result};

use crate::shard_reader::ShardReader;

/// Number of values, or of documents, after which a batch ends.
const BATCH_TOKENS: u64 = 1 << 20;
const BATCH_ROWS: usize = 1 << 16;

/// A flat file that is being read.
pub(crate) struct FlatReader {
    data: BufReader<ShardReader>,
    dtype: Dtype,
    ends: Ends,
    /// Number of values that were read.
    read: u64,
}

/// The ends of the documents that were not read yet.
enum Ends {
    /// The file is one document with this many values.
    One(u64),
    /// Documents of equal length. `left` of them were not read yet.
    Fixed { length: u64, left: u64 },
    /// Numbers of 8 bytes, each the end of a document.
    Listed(BufReader<ShardReader>),
    /// Each document ends with `id`.
    Id {
        /// The ids again, from which the ends are found.
        ids: BufReader<ShardReader>,
        /// The last id of each document.
        id: i64,
        /// Number of ids that were not searched yet.
        left: u64,
    },
    /// Documents are runs of sequences.
    Sequences {
        /// The first sequence of each document that was not read yet, and the end of the last one.
        firsts: BufReader<ShardReader>,
        /// The lengths of the sequences that were not read yet.
        lengths: BufReader<ShardReader>,
        /// Number of documents that were not read yet.
        left: u64,
        /// Number of sequences that were read.
        passed: u64,
    },
}

/// Whether this module reads files of `format`.
pub(crate) fn is_flat(format: Format) -> bool {
    !matches!(format, Format::Parquet | Format::ArrowFile | Format::ArrowStream)
}

/// The type of the column of a flat file.
pub(crate) fn data_type(facts: &ShardFacts) -> Result<DataType> {
    let item = item_type(facts.dtype)?;
    Ok(if facts.column.is_plain() { item } else { DataType::LargeList(Arc::new(Field::new_list_field(item, false))) })
}

impl FlatReader {
    /// Opens the file at `path`, which a loader describes by `facts`. `further` names the column to
    /// read if it is not the ids. `end_id` splits a file without document lengths.
    pub(crate) fn open(
        files: &Files,
        path: &Path,
        facts: &ShardFacts,
        further: Option<&str>,
        end_id: Option<u32>,
    ) -> Result<Self> {
        let mut reader = Self::open_whole(files, path, facts, further)?;
        if let (Ends::One(left), Some(id)) = (&reader.ends, end_id) {
            let start = reader.data.stream_position().map_err(unreadable)?;
            reader.ends = Ends::Id { ids: file_from(files, path, start)?, id: i64::from(id), left: *left };
        }
        Ok(reader)
    }

    fn open_whole(files: &Files, path: &Path, facts: &ShardFacts, further: Option<&str>) -> Result<Self> {
        match facts.format {
            Format::Npy => npy(files, path),
            Format::Raw => raw(files, path, facts),
            Format::LlmC => llmc(files, path, facts),
            Format::Megatron => megatron(files, path, facts),
            Format::Datatrove => datatrove(files, path, facts, further),
            other => Err(Error::data(format!(
                "only a loader reads files of the format {}: `verify` and `rewrite` have no reader for them",
                other.name()
            ))),
        }
    }

    /// Returns the next documents, or the next values of a file that is one document.
    pub(crate) fn next(&mut self) -> Result<Option<ArrayRef>> {
        if let Ends::One(tokens) = self.ends {
            let count = (tokens - self.read).min(BATCH_TOKENS);
            return if count == 0 { Ok(None) } else { self.values(count).map(Some) };
        }
        let first = self.read;
        let mut offsets = vec![0];
        while offsets.len() <= BATCH_ROWS
            && self.read - first < BATCH_TOKENS
            && let Some(end) = self.next_end()?
        {
            offsets.push((end - first) as i64);
            self.read = end;
        }
        if offsets.len() == 1 {
            return Ok(None);
        }
        let count = self.read - first;
        self.read = first;
        let values = if count == 0 { new_empty_array(&item_type(self.dtype)?) } else { self.values(count)? };
        let item = Arc::new(Field::new_list_field(values.data_type().clone(), false));
        Ok(Some(Arc::new(LargeListArray::new(item, OffsetBuffer::new(offsets.into()), values, None))))
    }

    /// The number of values before the end of the next document.
    fn next_end(&mut self) -> Result<Option<u64>> {
        match &mut self.ends {
            Ends::One(_) | Ends::Fixed { left: 0, .. } => Ok(None),
            Ends::Fixed { length, left } => {
                *left -= 1;
                Ok(Some(self.read + *length))
            }
            Ends::Listed(ends) => {
                if ends.fill_buf().map_err(unreadable)?.is_empty() {
                    return Ok(None);
                }
                number(ends).map(Some)
            }
            Ends::Id { left: 0, .. } | Ends::Sequences { left: 0, .. } => Ok(None),
            Ends::Id { ids, id, left } => {
                let (mut end, mut found) = (self.read, None);
                while *left > 0 && found != Some(*id) {
                    found = Some(id_of(ids, self.dtype)?);
                    (*left, end) = (*left - 1, end + 1);
                }
                Ok(Some(end))
            }
            Ends::Sequences { firsts, lengths, left, passed } => {
                *left -= 1;
                let (next, mut end) = (number(firsts)?, self.read);
                while *passed < next {
                    let mut length = [0; 4];
                    lengths.read_exact(&mut length).map_err(unreadable)?;
                    end += u64::from(u32::from_le_bytes(length));
                    *passed += 1;
                }
                Ok(Some(end))
            }
        }
    }

    /// The next `count` values.
    fn values(&mut self, count: u64) -> Result<ArrayRef> {
        let mut bytes = Vec::new();
        let wanted = count * self.dtype.size() as u64;
        (&mut self.data).take(wanted).read_to_end(&mut bytes).map_err(unreadable)?;
        if bytes.len() as u64 != wanted {
            return Err(Error::data(format!(
                "the file ends early: expected {wanted} more bytes, found {}",
                bytes.len()
            )));
        }
        self.read += count;
        macro_rules! array {
            ($array:ty, $type:ty) => {
                Arc::new(<$array>::from_iter_values(
                    bytes.as_chunks().0.iter().map(|bytes| <$type>::from_le_bytes(*bytes)),
                ))
            };
        }
        Ok(match self.dtype {
            Dtype::Bool => Arc::new(BooleanArray::from_iter(bytes.into_iter().map(|value| Some(value != 0)))),
            Dtype::U8 => Arc::new(UInt8Array::from(bytes)),
            Dtype::U16 => array!(UInt16Array, u16),
            Dtype::U32 => array!(UInt32Array, u32),
            Dtype::I8 => array!(Int8Array, i8),
            Dtype::I16 => array!(Int16Array, i16),
            Dtype::I32 => array!(Int32Array, i32),
            Dtype::I64 => array!(Int64Array, i64),
            other => return Err(no_ids(other)),
        })
    }
}

fn item_type(dtype: Dtype) -> Result<DataType> {
    Ok(match dtype {
        Dtype::Bool => DataType::Boolean,
        Dtype::U8 => DataType::UInt8,
        Dtype::U16 => DataType::UInt16,
        Dtype::U32 => DataType::UInt32,
        Dtype::I8 => DataType::Int8,
        Dtype::I16 => DataType::Int16,
        Dtype::I32 => DataType::Int32,
        Dtype::I64 => DataType::Int64,
        other => return Err(no_ids(other)),
    })
}

fn no_ids(dtype: Dtype) -> Error {
    Error::data(format!("a flat file has ids of type {}", dtype.name()))
}

fn unreadable(error: std::io::Error) -> Error {
    Error::io("cannot read the shard", error)
}

fn npy(files: &Files, path: &Path) -> Result<FlatReader> {
    let odd = || Error::data("the header of the NumPy array is unreadable");
    let mut data = BufReader::new(ShardReader::open(files, path)?);
    let mut first = [0; 8];
    data.read_exact(&mut first).map_err(unreadable)?;
    let mut length = [0; 4];
    let width = if first[6] == 1 { 2 } else { 4 };
    data.read_exact(&mut length[..width]).map_err(unreadable)?;
    let mut header = vec![0; u32::from_le_bytes(length) as usize];
    data.read_exact(&mut header).map_err(unreadable)?;
    let header: String = String::from_utf8(header).map_err(|_| odd())?.split_whitespace().collect();
    let after = |key: &str| header.split_once(&format!("'{key}':")).map(|(_, rest)| rest).ok_or_else(odd);
    let descr = after("descr")?.split('\'').nth(1).ok_or_else(odd)?;
    let dtype = match descr.trim_start_matches(['<', '|', '=']) {
        "u1" => Dtype::U8,
        "u2" => Dtype::U16,
        "u4" => Dtype::U32,
        "i1" => Dtype::I8,
        "i2" => Dtype::I16,
        "i4" => Dtype::I32,
        "i8" => Dtype::I64,
        _ => return Err(odd()),
    };
    let shape = after("shape")?.trim_start_matches('(').split(')').next().ok_or_else(odd)?;
    let shape = shape.split(',').filter(|length| !length.is_empty()).map(|length| length.trim_end_matches('L').parse());
    let ends = match shape.collect::<std::result::Result<Vec<u64>, _>>().map_err(|_| odd())?[..] {
        [tokens] => Ends::One(tokens),
        [left, length] => Ends::Fixed { length, left },
        _ => return Err(odd()),
    };
    Ok(FlatReader { data, dtype, ends, read: 0 })
}

/// Reads the next id.
fn id_of(ids: &mut BufReader<ShardReader>, dtype: Dtype) -> Result<i64> {
    let mut bytes = [0; 8];
    ids.read_exact(&mut bytes[..dtype.size()]).map_err(unreadable)?;
    let number = i64::from_le_bytes(bytes);
    Ok(match dtype {
        Dtype::I8 => i64::from(number as i8),
        Dtype::I16 => i64::from(number as i16),
        Dtype::I32 => i64::from(number as i32),
        _ => number,
    })
}

/// Reads the next number of 8 bytes.
fn number(file: &mut BufReader<ShardReader>) -> Result<u64> {
    let mut number = [0; 8];
    file.read_exact(&mut number).map_err(unreadable)?;
    Ok(u64::from_le_bytes(number))
}

/// Opens the file at `path`, and goes to byte `start`.
fn file_from(files: &Files, path: &Path, start: u64) -> Result<BufReader<ShardReader>> {
    let mut file = ShardReader::open(files, path)?;
    file.seek(SeekFrom::Start(start)).map_err(unreadable)?;
    Ok(BufReader::new(file))
}

fn raw(files: &Files, path: &Path, facts: &ShardFacts) -> Result<FlatReader> {
    let ends = Ends::One(facts.stamp.size_bytes / facts.dtype.size() as u64);
    Ok(FlatReader { data: file_from(files, path, 0)?, dtype: facts.dtype, ends, read: 0 })
}

fn llmc(files: &Files, path: &Path, facts: &ShardFacts) -> Result<FlatReader> {
    let mut header = [0; 12];
    ShardReader::open(files, path)?.read_exact(&mut header).map_err(unreadable)?;
    let [magic, _, tokens] = [0, 4, 8].map(|at| i32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes")));
    let dtype = if magic == 20_240_520 { Dtype::U16 } else { Dtype::U32 };
    if dtype != facts.dtype {
        return Err(Error::data(format!("the magic number {magic} belongs to ids of type {}", dtype.name())));
    }
    Ok(FlatReader {
        data: file_from(files, path, 256 * 4)?,
        dtype,
        ends: Ends::One(u64::from(tokens.cast_unsigned())),
        read: 0,
    })
}

fn megatron(files: &Files, path: &Path, facts: &ShardFacts) -> Result<FlatReader> {
    let index = path.with_extension("idx");
    let mut header = file_from(files, &index, 18)?;
    let (sequences, documents) = (number(&mut header)?, number(&mut header)?);
    // The first entry is 0. Every other entry is the end of a document.
    let firsts = file_from(files, &index, 34 + sequences * (4 + 8) + 8)?;
    let lengths = file_from(files, &index, 34)?;
    let ends = Ends::Sequences { firsts, lengths, left: documents.saturating_sub(1), passed: 0 };
    Ok(FlatReader { data: file_from(files, path, 0)?, dtype: facts.dtype, ends, read: 0 })
}

fn datatrove(files: &Files, path: &Path, facts: &ShardFacts, further: Option<&str>) -> Result<FlatReader> {
    let beside = |suffix: &str| PathBuf::from(format!("{}{suffix}", path.display()));
    let ends = Ends::Listed(file_from(files, &beside(".index"), 0)?);
    let (path, dtype) = match further {
        Some(_) => (beside(".loss"), Dtype::Bool),
        None => (path.to_owned(), facts.dtype),
    };
    Ok(FlatReader { data: file_from(files, &path, 0)?, dtype, ends, read: 0 })
}
