//! Protects: our decoder gives what was written and what arrow-rs reads, for every encoding, codec, page version,
//! type, shape and nullability; metadata announce exactly what decoding yields; and no damaged byte causes a panic.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::basic::{Compression, Encoding, GzipLevel, ZstdLevel};
use ::parquet::column::writer::ColumnWriter;
use ::parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;
use ::parquet::schema::types::ColumnPath;
use arrow_array::{
    Array, ArrayRef, FixedSizeListArray, Int32Array, Int64Array, LargeListArray, ListArray, RecordBatch, StringArray,
    UInt8Array, UInt16Array, UInt32Array, UInt64Array,
};
use arrow_buffer::{NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, Field, Schema};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{ParquetShard, Route};
use crate::error::{ErrorKind, Result};
use crate::shard::mmap::{Io, SourceFile};
use crate::shard::{OpenOptions, Shard};
use crate::tokens::{Dtype, Tokens};

type Rows = Vec<Option<Vec<i64>>>;

const TYPES: [Dtype; 5] = [Dtype::U8, Dtype::U16, Dtype::U32, Dtype::I32, Dtype::I64];

/// How a file is written.
#[derive(Clone, Debug)]
struct Writing {
    dtype: Dtype,
    encoding: Option<Encoding>,
    codec: Compression,
    version: WriterVersion,
    page_rows: usize,
    group_rows: usize,
    list_nullable: bool,
    element_nullable: bool,
    large: bool,
}

impl Default for Writing {
    fn default() -> Self {
        Self {
            dtype: Dtype::I32,
            encoding: None,
            codec: Compression::SNAPPY,
            version: WriterVersion::PARQUET_1_0,
            page_rows: 7,
            group_rows: 50,
            list_nullable: true,
            element_nullable: true,
            large: false,
        }
    }
}

impl Writing {
    fn properties(&self) -> WriterProperties {
        let mut builder = WriterProperties::builder()
            .set_compression(self.codec)
            .set_writer_version(self.version)
            .set_data_page_row_count_limit(self.page_rows)
            .set_write_batch_size(self.page_rows.max(1))
            .set_max_row_group_row_count(Some(self.group_rows))
            .set_statistics_enabled(EnabledStatistics::Chunk);
        if let Some(encoding) = self.encoding {
            for path in [vec!["input_ids"], vec!["input_ids", "list", "element"]] {
                let path = ColumnPath::new(path.into_iter().map(str::to_owned).collect());
                builder =
                    builder.set_column_dictionary_enabled(path.clone(), false).set_column_encoding(path, encoding);
            }
        }
        builder.build()
    }
}

fn element_type(dtype: Dtype) -> DataType {
    match dtype {
        Dtype::U8 => DataType::UInt8,
        Dtype::U16 => DataType::UInt16,
        Dtype::U32 => DataType::UInt32,
        Dtype::I32 => DataType::Int32,
        Dtype::I64 => DataType::Int64,
    }
}

fn numbers(dtype: Dtype, ids: &[Option<i64>]) -> ArrayRef {
    let ids = ids.iter().copied();
    match dtype {
        Dtype::U8 => Arc::new(UInt8Array::from_iter(ids.map(|id| id.map(|id| id as u8)))),
        Dtype::U16 => Arc::new(UInt16Array::from_iter(ids.map(|id| id.map(|id| id as u16)))),
        Dtype::U32 => Arc::new(UInt32Array::from_iter(ids.map(|id| id.map(|id| id as u32)))),
        Dtype::I32 => Arc::new(Int32Array::from_iter(ids.map(|id| id.map(|id| id as i32)))),
        Dtype::I64 => Arc::new(Int64Array::from_iter(ids)),
    }
}

fn list_array(writing: &Writing, rows: &[Option<Vec<i64>>]) -> ArrayRef {
    let ids: Vec<_> = rows.iter().flatten().flatten().map(|&id| Some(id)).collect();
    let element = Arc::new(Field::new("element", element_type(writing.dtype), writing.element_nullable));
    let lengths = rows.iter().map(|row| row.as_ref().map_or(0, Vec::len));
    let nulls = writing.list_nullable.then(|| NullBuffer::from_iter(rows.iter().map(Option::is_some)));
    let values = numbers(writing.dtype, &ids);
    if writing.large {
        Arc::new(LargeListArray::new(element, OffsetBuffer::from_lengths(lengths), values, nulls))
    } else {
        Arc::new(ListArray::new(element, OffsetBuffer::from_lengths(lengths), values, nulls))
    }
}

/// Writes one column `input_ids`, between two others so that its chunks do not touch.
fn write_array(array: ArrayRef, nullable: bool, properties: WriterProperties) -> Vec<u8> {
    let other: ArrayRef = Arc::new(StringArray::from_iter_values((0..array.len()).map(|i| format!("row {i}"))));
    let schema = Arc::new(Schema::new(vec![
        Field::new("id", DataType::Utf8, false),
        Field::new("input_ids", array.data_type().clone(), nullable),
        Field::new("text", DataType::Utf8, true),
    ]));
    let batch = RecordBatch::try_new(Arc::clone(&schema), vec![Arc::clone(&other), array, other]).unwrap();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, schema, Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

fn write(writing: &Writing, rows: &[Option<Vec<i64>>]) -> Vec<u8> {
    write_array(list_array(writing, rows), writing.list_nullable, writing.properties())
}

struct Saved {
    _folder: TempDir,
    path: PathBuf,
}

fn save(bytes: &[u8]) -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shard.parquet");
    fs::write(&path, bytes).unwrap();
    Saved { _folder: folder, path }
}

fn options(block_tokens: u64, io: Io) -> OpenOptions {
    OpenOptions { token_column: None, io, block_tokens }
}

fn open_as(saved: &Saved, block_tokens: u64, io: Io, route: Route) -> Result<ParquetShard> {
    ParquetShard::open(SourceFile::open(&saved.path, io)?, &options(block_tokens, io), route)
}

fn open(saved: &Saved, block_tokens: u64) -> Result<ParquetShard> {
    open_as(saved, block_tokens, Io::Mmap, Route::Pages)
}

fn ids(dtype: Dtype, bytes: &[u8]) -> Vec<i64> {
    let tokens = Tokens::new(dtype, bytes);
    (0..tokens.len()).map(|i| tokens.get(i)).collect()
}

/// Reads all blocks, checking each against its metadata, and puts the documents together again.
fn read_all(shard: &ParquetShard) -> Result<Vec<Vec<i64>>> {
    let mut documents = Vec::new();
    let mut open: Vec<i64> = Vec::new();
    for (i, meta) in shard.blocks().iter().enumerate() {
        assert!(meta.tokens > 0, "block {i} has no tokens");
        let block = shard.decode(i, None)?;
        assert!(block.complete);
        let tokens = ids(shard.dtype(), &block.bytes);
        assert_eq!(tokens.len() as u64, meta.tokens, "tokens of block {i}");
        assert_eq!(block.ends.len() as u64, meta.ends, "ends of block {i}");
        assert_eq!(meta.decoded_bytes, (block.bytes.len() + 4 * block.ends.len()) as u64);
        assert!(block.ends.windows(2).all(|pair| pair[0] < pair[1]), "ends increase");
        assert!(block.ends.first().is_none_or(|&end| end > 0));
        let starts =
            u64::from(open.is_empty()) + meta.ends - u64::from(block.ends.last() == Some(&(tokens.len() as u32)));
        assert_eq!(meta.starts, starts, "starts of block {i}");
        let mut from = 0;
        for &end in &block.ends {
            open.extend(&tokens[from..end as usize]);
            documents.push(std::mem::take(&mut open));
            from = end as usize;
        }
        open.extend(&tokens[from..]);
    }
    assert!(open.is_empty(), "the last document ends");
    Ok(documents)
}

fn non_empty(rows: &Rows) -> Vec<Vec<i64>> {
    rows.iter().flatten().filter(|row| !row.is_empty()).cloned().collect()
}

/// Checks a file against what was written, by both routes and both ways of reaching bytes.
fn check(bytes: &[u8], rows: &Rows, block_tokens: u64) {
    let saved = save(bytes);
    let expected = non_empty(rows);
    for io in [Io::Mmap, Io::Pread] {
        let shard = open_as(&saved, block_tokens, io, Route::Pages).unwrap();
        assert_eq!(shard.rows(), rows.len() as u64);
        assert_eq!(read_all(&shard).unwrap(), expected);
        let (pages, row_groups) = shard.decoded();
        assert_eq!(row_groups, 0, "our decoder takes all pages");
        assert_eq!(pages, shard.pages.len() as u64);
        check_prefixes(&shard);
        check_first_rows(&shard, rows);
    }
    let arrow = open_as(&saved, block_tokens, Io::Mmap, Route::Arrow).unwrap();
    assert_eq!(read_all(&arrow).unwrap(), expected);
    assert_eq!(arrow.decoded().0, 0);
}

fn check_prefixes(shard: &ParquetShard) {
    for (i, meta) in shard.blocks().iter().enumerate().take(8) {
        let whole = shard.decode(i, None).unwrap();
        for limit in [0, 1, meta.tokens / 2, meta.tokens - 1, meta.tokens, meta.tokens + 1] {
            let part = shard.decode(i, Some(limit)).unwrap();
            let found = (part.bytes.len() / shard.dtype().size()) as u64;
            assert!(found >= limit.min(meta.tokens));
            assert!(whole.bytes.starts_with(&part.bytes));
            assert_eq!(part.complete, found == meta.tokens && limit > 0);
            let inside: Vec<_> = whole.ends.iter().copied().filter(|&end| u64::from(end) <= found).collect();
            assert_eq!(part.ends, inside);
        }
    }
}

fn check_first_rows(shard: &ParquetShard, rows: &Rows) {
    let filled: Vec<_> = (0..rows.len()).filter(|&i| rows[i].as_ref().is_some_and(|row| !row.is_empty())).collect();
    let mut started = 0;
    for meta in shard.blocks() {
        if meta.starts > 0 {
            assert_eq!(meta.first_row, filled[started] as u64);
        } else {
            assert_eq!(meta.first_row, filled[started - 1] as u64);
        }
        started += meta.starts as usize;
    }
}

/// Rows with empty, null, short and long lists; ids below `most`.
fn some_rows(count: usize, most: i64, seed: u64) -> Rows {
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 11
    };
    (0..count)
        .map(|_| match next() % 10 {
            0 => None,
            1 => Some(Vec::new()),
            2 => Some((0..next() % 700).map(|_| (next() % most as u64) as i64).collect()),
            3 => Some(vec![(next() % most as u64) as i64; (next() % 200) as usize]),
            _ => Some((0..next() % 12).map(|_| (next() % most as u64) as i64).collect()),
        })
        .collect()
}

fn most(dtype: Dtype) -> i64 {
    match dtype {
        Dtype::U8 => 1 << 8,
        Dtype::U16 => 1 << 16,
        Dtype::U32 => 1 << 32,
        Dtype::I32 => 1 << 31,
        Dtype::I64 => 1 << 62,
    }
}

/// `None` is the dictionary.
const ENCODINGS: [Option<Encoding>; 4] =
    [None, Some(Encoding::PLAIN), Some(Encoding::DELTA_BINARY_PACKED), Some(Encoding::BYTE_STREAM_SPLIT)];

const VERSIONS: [WriterVersion; 2] = [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0];

#[test]
fn every_encoding_and_type_reads_as_written() {
    for dtype in TYPES {
        for encoding in ENCODINGS {
            for version in VERSIONS {
                for (most, seed) in [(most(dtype), 3), (200, 5)] {
                    let writing = Writing { dtype, encoding, version, ..Writing::default() };
                    let rows = some_rows(160, most, seed);
                    check(&write(&writing, &rows), &rows, 300);
                }
            }
        }
    }
}

#[test]
fn every_codec_reads_as_written() {
    let rows = some_rows(160, 5000, 11);
    for codec in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        for version in VERSIONS {
            for encoding in [None, Some(Encoding::PLAIN)] {
                let writing = Writing { codec, version, encoding, dtype: Dtype::U16, ..Writing::default() };
                check(&write(&writing, &rows), &rows, 1000);
            }
        }
    }
}

#[test]
fn every_nullability_reads_as_written() {
    for list_nullable in [false, true] {
        for element_nullable in [false, true] {
            for large in [false, true] {
                for version in VERSIONS {
                    let mut rows = some_rows(160, 900, 17);
                    if !list_nullable {
                        rows.iter_mut().for_each(|row| *row = Some(row.take().unwrap_or_default()));
                    }
                    let writing = Writing { list_nullable, element_nullable, large, version, ..Writing::default() };
                    check(&write(&writing, &rows), &rows, 64);
                }
            }
        }
    }
}
