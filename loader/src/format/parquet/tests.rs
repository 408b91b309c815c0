//! Tests of Parquet shards, for every encoding, codec, page version, type, shape and nullability.
//!
//! The decoder gives what was written and what arrow-rs reads. Metadata announce exactly what
//! decoding yields. No damaged byte causes a panic.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::basic::{Compression, Encoding, GzipLevel, ZstdLevel};
use ::parquet::column::writer::ColumnWriter;
use ::parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;
use ::parquet::schema::types::{ColumnPath, SchemaDescriptor};
use arrow_array::{
    Array, ArrayRef, FixedSizeListArray, Int8Array, Int16Array, Int32Array, Int64Array, LargeListArray, ListArray,
    RecordBatch, StringArray, UInt8Array, UInt16Array, UInt32Array,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Schema};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{ParquetShard, Route};
use crate::error::{ErrorKind, Result};
use crate::format::{AnyShard, BlockShard, OpenOptions};
use crate::settings::{Config, Io};
use crate::storage::Files;
use crate::tokens::{Dtype, Tokens};

type Rows = Vec<Option<Vec<i64>>>;

const TYPES: [Dtype; 7] = [Dtype::U8, Dtype::U16, Dtype::U32, Dtype::I8, Dtype::I16, Dtype::I32, Dtype::I64];

/// Settings for writing a file.
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
        Dtype::I8 => DataType::Int8,
        Dtype::I16 => DataType::Int16,
        Dtype::I32 => DataType::Int32,
        Dtype::I64 => DataType::Int64,
        other => panic!("no ids of type {}", other.name()),
    }
}

fn numbers(dtype: Dtype, ids: &[Option<i64>]) -> ArrayRef {
    let ids = ids.iter().copied();
    match dtype {
        Dtype::U8 => Arc::new(UInt8Array::from_iter(ids.map(|id| id.map(|id| id as u8)))),
        Dtype::U16 => Arc::new(UInt16Array::from_iter(ids.map(|id| id.map(|id| id as u16)))),
        Dtype::U32 => Arc::new(UInt32Array::from_iter(ids.map(|id| id.map(|id| id as u32)))),
        Dtype::I8 => Arc::new(Int8Array::from_iter(ids.map(|id| id.map(|id| id as i8)))),
        Dtype::I16 => Arc::new(Int16Array::from_iter(ids.map(|id| id.map(|id| id as i16)))),
        Dtype::I32 => Arc::new(Int32Array::from_iter(ids.map(|id| id.map(|id| id as i32)))),
        Dtype::I64 => Arc::new(Int64Array::from_iter(ids)),
        other => panic!("no ids of type {}", other.name()),
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

/// Writes the column `input_ids` between two others, so that its chunks do not touch.
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
    OpenOptions { io, block_tokens, ..OpenOptions::of(&Config::default()) }
}

fn open_as(saved: &Saved, block_tokens: u64, io: Io, route: Route) -> Result<ParquetShard> {
    ParquetShard::open(Files::local().open(&saved.path, io)?, &options(block_tokens, io), route)
}

fn open(saved: &Saved, block_tokens: u64) -> Result<ParquetShard> {
    open_as(saved, block_tokens, Io::Mmap, Route::Pages)
}

fn ids(dtype: Dtype, bytes: &[u8]) -> Vec<i64> {
    let tokens = Tokens::new(dtype, bytes);
    (0..tokens.len()).map(|i| tokens.get(i)).collect()
}

/// Reads all blocks, checks each against its metadata, and joins the documents.
fn read_all(shard: &ParquetShard) -> Result<Vec<Vec<i64>>> {
    let mut documents = Vec::new();
    let mut open: Vec<i64> = Vec::new();
    for (i, meta) in shard.blocks().iter().enumerate() {
        assert!(meta.tokens > 0, "block {i} has no tokens");
        let block = shard.decode(i, None)?;
        assert!(block.complete);
        let tokens = ids(shard.block_dtype(), &block.bytes);
        assert_eq!(tokens.len() as u64, meta.tokens, "tokens of block {i}");
        assert_eq!(block.ends.len() as u64, meta.ends, "ends of block {i}");
        assert_eq!(meta.decoded_bytes, (block.bytes.len() + 4 * block.ends.len()) as u64);
        assert!(block.ends.windows(2).all(|pair| pair[0] < pair[1]), "ends increase");
        let mut ends = vec![7];
        shard.ends_into(i, &mut ends)?;
        assert_eq!(ends, block.ends, "the levels alone give the ends of block {i}");
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

/// Compares a file with the rows that were written, by both decoders and both ways of reading
/// bytes.
fn check(bytes: &[u8], rows: &Rows, block_tokens: u64) {
    let saved = save(bytes);
    let expected = non_empty(rows);
    for io in [Io::Mmap, Io::Pread] {
        let shard = open_as(&saved, block_tokens, io, Route::Pages).unwrap();
        assert_eq!(shard.info.rows, rows.len() as u64);
        assert_eq!(read_all(&shard).unwrap(), expected);
        assert_eq!(left_to_arrow(&shard), 0, "our decoder takes all pages");
        check_prefixes(&shard);
        check_first_rows(&shard, rows);
    }
    let arrow = open_as(&saved, block_tokens, Io::Mmap, Route::Arrow).unwrap();
    assert_eq!(read_all(&arrow).unwrap(), expected);
    assert_eq!(left_to_arrow(&arrow), arrow.pages.len() as u64);
}

/// Number of row groups that decoding leaves to arrow-rs. Asserts that every page is counted once.
fn left_to_arrow(shard: &ParquetShard) -> u64 {
    let mut all = 0;
    let left = (0..shard.blocks().len())
        .map(|block| {
            let pages = shard.decode(block, None).unwrap().pages;
            let here = pages.plain + pages.dictionary + pages.delta + pages.byte_stream_split;
            all += here + pages.row_groups_by_arrow;
            pages.row_groups_by_arrow
        })
        .sum();
    assert_eq!(all, shard.pages.len() as u64);
    left
}

fn check_prefixes(shard: &ParquetShard) {
    for (i, meta) in shard.blocks().iter().enumerate().take(8) {
        let whole = shard.decode(i, None).unwrap();
        for limit in [0, 1, meta.tokens / 2, meta.tokens - 1, meta.tokens, meta.tokens + 1] {
            let part = shard.decode(i, Some(limit)).unwrap();
            let found = (part.bytes.len() / shard.block_dtype().size()) as u64;
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

/// Makes rows with empty, null, short and long lists. All ids are below `most`.
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
        Dtype::I8 => 1 << 7,
        Dtype::U8 => 1 << 8,
        Dtype::I16 => 1 << 15,
        Dtype::U16 => 1 << 16,
        Dtype::U32 => 1 << 32,
        Dtype::I32 => 1 << 31,
        Dtype::I64 => 1 << 62,
        other => panic!("no ids of type {}", other.name()),
    }
}

/// `None` means the dictionary encoding.
const ENCODINGS: [Option<Encoding>; 4] =
    [None, Some(Encoding::PLAIN), Some(Encoding::DELTA_BINARY_PACKED), Some(Encoding::BYTE_STREAM_SPLIT)];

const VERSIONS: [WriterVersion; 2] = [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0];

#[test]
fn every_encoding_and_type_reads_as_written() {
    for dtype in TYPES {
        for encoding in ENCODINGS {
            for version in VERSIONS {
                for (most, seed) in [(most(dtype), 3), (most(dtype).min(200), 5)] {
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

#[test]
fn rows_of_one_token_are_one_document() {
    for dtype in TYPES {
        for encoding in ENCODINGS {
            for nullable in [false, true] {
                let writing = Writing { dtype, encoding, page_rows: 40, group_rows: 300, ..Writing::default() };
                let tokens: Vec<_> = (0..1000).map(|i| i * i % most(dtype).min(251)).collect();
                let array = numbers(dtype, &tokens.iter().copied().map(Some).collect::<Vec<_>>());
                let saved = save(&write_array(array, nullable, writing.properties()));
                for route in [Route::Pages, Route::Arrow] {
                    let shard = open_as(&saved, 150, Io::Mmap, route).unwrap();
                    assert_eq!(read_all(&shard).unwrap(), std::slice::from_ref(&tokens));
                    assert_eq!(shard.info.rows, 1000);
                    assert!(shard.blocks().len() > 1);
                }
            }
        }
    }
}

#[test]
fn fixed_size_lists_read_as_written() {
    let values = numbers(Dtype::U16, &(0..600).map(|i| Some(i * 91 % 60_000)).collect::<Vec<_>>());
    let element = Arc::new(Field::new("item", DataType::UInt16, true));
    let array = Arc::new(FixedSizeListArray::new(element, 6, values, None));
    let saved = save(&write_array(array, true, Writing::default().properties()));
    let shard = open(&saved, 100).unwrap();
    let expected: Vec<Vec<i64>> =
        (0..100).map(|row| (row * 6..row * 6 + 6).map(|i| i * 91 % 60_000).collect()).collect();
    assert_eq!(read_all(&shard).unwrap(), expected);
    assert_eq!(shard.info.dtype, Dtype::U16);
}

/// Writes the INT32 leaf of `message` with the given levels.
fn write_leaf(message: &str, ids: &[i32], def: &[i16], rep: &[i16]) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(message).unwrap());
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    match column.untyped() {
        ColumnWriter::Int32ColumnWriter(writer) => writer.write_batch(ids, Some(def), Some(rep)).unwrap(),
        _ => panic!("the leaf is not INT32"),
    };
    column.close().unwrap();
    group.close().unwrap();
    file.close().unwrap();
    bytes
}

/// Writes one row with one value, whatever its type is.
fn write_value(message: &str) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(message).unwrap());
    let (def, rep) = ([SchemaDescriptor::new(Arc::clone(&schema)).column(0).max_def_level()], [0]);
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    match column.untyped() {
        ColumnWriter::ByteArrayColumnWriter(writer) => writer.write_batch(&["a".into()], Some(&def), Some(&rep)),
        ColumnWriter::FloatColumnWriter(writer) => writer.write_batch(&[1.0], Some(&def), Some(&rep)),
        ColumnWriter::Int32ColumnWriter(writer) => writer.write_batch(&[1], Some(&def), Some(&rep)),
        ColumnWriter::Int64ColumnWriter(writer) => writer.write_batch(&[1], Some(&def), Some(&rep)),
        _ => panic!("no value is known for the leaf's type"),
    }
    .unwrap();
    column.close().unwrap();
    group.close().unwrap();
    file.close().unwrap();
    bytes
}

#[test]
fn legacy_spellings_of_lists_are_read() {
    // The rows are [1, 2], [] and [3]. The second column is the definition level of a token.
    for (message, token) in [
        ("message m { repeated int32 tokens (UINT_16); }", 1),
        ("message m { required group tokens (LIST) { repeated int32 element (UINT_16); } }", 1),
        ("message m { optional group tokens (LIST) { repeated int32 array (UINT_16); } }", 2),
        (
            "message m { optional group tokens (LIST) { repeated group bag { optional int32 array_element (UINT_16); } } }",
            3,
        ),
        ("message m { required group tokens (LIST) { repeated group element { required int32 num (UINT_16); } } }", 1),
    ] {
        let empty = if message.contains("optional group") { 1 } else { 0 };
        let bytes = write_leaf(message, &[1, 2, 3], &[token, token, empty, token], &[0, 1, 0, 0]);
        let shard = open(&save(&bytes), 100).unwrap();
        assert_eq!(read_all(&shard).unwrap(), [vec![1, 2], vec![3]], "{message}");
        assert_eq!((shard.info.rows, shard.info.dtype), (3, Dtype::U16));
    }
}

#[test]
fn unusable_columns_are_refused_by_name_and_type() {
    for (message, expected) in [
        ("message m { optional binary tokens (UTF8); }", "of type utf8 (byte_array)"),
        (
            "message m { optional group tokens (LIST) { repeated group list { optional float element; } } }",
            "of type float",
        ),
        ("message m { optional int64 tokens (UINT_64); }", "of type uint64"),
        ("message m { optional int32 tokens (DATE); }", "of type date (int32)"),
        ("message m { optional group tokens { optional int32 a; } }", "a struct or map"),
        (
            "message m { optional group tokens (LIST) { repeated group list { optional group element (LIST) { \
             repeated group list { optional int32 element; } } } } }",
            "a list of lists or structs",
        ),
    ] {
        let error = open(&save(&write_value(message)), 100).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Data);
        let report = error.report();
        assert!(report.contains(&format!("token column `tokens` is {expected}: expected a list of")), "{report}");
        assert!(report.contains("shard.parquet"), "{report}");
    }
}

#[test]
fn files_without_rows_or_tokens_have_no_blocks() {
    for rows in [vec![], vec![None, Some(vec![]), None], vec![Some(vec![]); 100]] {
        let bytes = write(&Writing::default(), &rows);
        for route in [Route::Pages, Route::Arrow] {
            let shard = open_as(&save(&bytes), 100, Io::Mmap, route).unwrap();
            assert_eq!(shard.info.rows, rows.len() as u64);
            assert!(shard.blocks().is_empty());
            assert!(shard.decode(0, None).is_err());
        }
    }
}

/// Writes lists whose elements may be null.
fn write_elements(dtype: Dtype, rows: &[Vec<Option<i64>>], version: WriterVersion) -> Vec<u8> {
    let element = Arc::new(Field::new("element", element_type(dtype), true));
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(Vec::len));
    let values = numbers(dtype, &rows.concat());
    let array = Arc::new(ListArray::new(element, offsets, values, None));
    write_array(array, true, Writing { version, page_rows: 2, ..Writing::default() }.properties())
}

#[test]
fn a_null_token_is_an_error_with_its_place() {
    for version in VERSIONS {
        let mut rows = vec![vec![Some(1), Some(2)], vec![], vec![Some(3)], vec![Some(4), Some(5), None], vec![None]];
        rows.extend(vec![vec![Some(1); 50]; 20]);
        let saved = save(&write_elements(Dtype::I32, &rows, version));
        for route in [Route::Pages, Route::Arrow] {
            let shard = open_as(&saved, 3, Io::Mmap, route).unwrap();
            let (block, error) =
                (0..shard.blocks().len()).find_map(|i| shard.decode(i, None).err().map(|error| (i, error))).unwrap();
            assert_eq!(error.kind(), ErrorKind::Data);
            let place = error.location().unwrap();
            assert_eq!((place.path.clone(), place.block, place.row), (saved.path.clone(), Some(block as u64), Some(3)));
            assert!(error.report().contains("null token"), "{}", error.report());
        }
        let mut plain = vec![Some(7); 300];
        plain[222] = None;
        let array = numbers(Dtype::I64, &plain);
        let saved = save(&write_array(array, true, Writing { version, ..Writing::default() }.properties()));
        for route in [Route::Pages, Route::Arrow] {
            let shard = open_as(&saved, 1 << 20, Io::Mmap, route).unwrap();
            assert_eq!(shard.decode(0, None).unwrap_err().location().unwrap().row, Some(222));
        }
    }
}

#[test]
fn a_negative_id_is_an_error_with_its_place() {
    for dtype in [Dtype::I32, Dtype::I64] {
        for encoding in ENCODINGS {
            let mut rows = some_rows(120, 1000, 23);
            rows[77] = Some(vec![4, 5, -6, 7]);
            let saved = save(&write(&Writing { dtype, encoding, ..Writing::default() }, &rows));
            for route in [Route::Pages, Route::Arrow] {
                let shard = open_as(&saved, 500, Io::Mmap, route).unwrap();
                let error = (0..shard.blocks().len()).find_map(|i| shard.decode(i, None).err()).unwrap();
                assert_eq!(error.location().unwrap().row, Some(77));
                assert!(error.report().contains("must not be negative: found -6"), "{}", error.report());
            }
        }
    }
}

#[test]
fn an_id_wider_than_its_type_is_an_error() {
    let message = "message m { required group tokens (LIST) { repeated int32 element (UINT_16); } }";
    let bytes = write_leaf(message, &[1, 70_000], &[1, 1], &[0, 1]);
    let shard = open(&save(&bytes), 100).unwrap();
    let report = shard.decode(0, None).unwrap_err().report();
    assert!(report.contains("token id 70000 does not fit uint16"), "{report}");
}

#[test]
fn blocks_are_near_the_wanted_size_for_any_row_groups() {
    let rows: Rows = (0..4000).map(|i| Some(vec![i % 100; 10])).collect();
    for (page_rows, group_rows) in [(1, 3), (10, 10_000), (100, 900), (5, 5)] {
        let writing = Writing { page_rows, group_rows, ..Writing::default() };
        let shard = open(&save(&write(&writing, &rows)), 2000).unwrap();
        for meta in &shard.blocks()[..shard.blocks().len() - 1] {
            assert!((1000..=3000).contains(&meta.tokens), "{} tokens", meta.tokens);
        }
    }
}

/// Reads files of pyarrow 12, whose version 1 pages break inside rows.
///
/// Written with `data_page_size=512` and `write_batch_size=64`; plain with zstd, dictionary with
/// snappy.
#[test]
fn documents_longer_than_pages_are_put_together() {
    let squares = |n: i64, factor, modulus| (0..n).map(|i| i * i * factor % modulus).collect::<Vec<_>>();
    let rows: Rows =
        vec![Some(squares(3, 1, 1000)), None, Some(vec![]), Some(squares(2000, 7, 50_021)), Some(squares(1, 5, 1000))];
    for bytes in [
        &include_bytes!("fixtures/row_over_pages_v1.parquet")[..],
        &include_bytes!("fixtures/row_over_pages_dict.parquet")[..],
    ] {
        let shard = open(&save(bytes), 100).unwrap();
        assert!(shard.blocks().iter().any(|meta| meta.starts == 0 && meta.ends == 0), "a row spans blocks");
        for block_tokens in [1, 100, 700, 1 << 20] {
            check(bytes, &rows, block_tokens);
        }
    }
}

#[test]
fn a_shard_that_changes_is_an_error() {
    let rows = some_rows(50, 100, 3);
    let bytes = write(&Writing::default(), &rows);
    let saved = save(&bytes);
    let shard = open(&saved, 100).unwrap();
    fs::write(&saved.path, [&bytes[..], b"more"].concat()).unwrap();
    assert_eq!(shard.decode(0, None).unwrap_err().kind(), ErrorKind::Changed);
    assert_eq!(shard.info.file.check_unchanged().unwrap_err().kind(), ErrorKind::Changed);
}

/// Opens and reads everything. The result may be an error, but not a panic.
fn read_anything(bytes: &[u8]) -> Result<()> {
    let shard = open(&save(bytes), 64)?;
    shard.advice();
    shard.describe();
    (0..shard.blocks().len()).try_for_each(|block| {
        let ends = shard.ends_into(block, &mut Vec::new());
        shard.decode(block, None).and(ends)
    })
}

#[test]
fn every_truncation_is_an_error() {
    for version in VERSIONS {
        let bytes = write(&Writing { version, ..Writing::default() }, &some_rows(30, 1000, 3));
        for length in 1..bytes.len() {
            let error = read_anything(&bytes[..length]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Data);
            assert!(error.location().is_some());
        }
    }
}

#[test]
fn ids_whose_statistics_fit_16_bits_are_decoded_to_these() {
    for (id, expected) in [(65_535, Dtype::U16), (65_536, Dtype::I32), (-1, Dtype::I32)] {
        let rows = vec![Some(vec![id, 7]), Some(vec![8; 5])];
        let saved = save(&write(&Writing::default(), &rows));
        let shard = open(&saved, 100).unwrap();
        assert_eq!((shard.info.dtype, shard.block_dtype()), (Dtype::I32, expected), "{id}");
        if id >= 0 {
            assert_eq!(read_all(&shard).unwrap(), [vec![id, 7], vec![8; 5]]);
        }
    }
}

#[test]
fn flipped_bits_never_panic() {
    for codec in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(ZstdLevel::default())] {
        for version in VERSIONS {
            for encoding in ENCODINGS {
                let rows: Rows =
                    some_rows(12, 1000, 29).into_iter().map(|row| row.map(|r| r[..r.len().min(40)].to_vec())).collect();
                let bytes = write(&Writing { codec, version, encoding, ..Writing::default() }, &rows);
                for at in 0..bytes.len() {
                    let mut damaged = bytes.clone();
                    damaged[at] ^= 1 << (at * 5 % 8);
                    let _ = read_anything(&damaged);
                }
            }
        }
    }
}

fn any_row() -> impl Strategy<Value = Option<Vec<i64>>> {
    prop_oneof![
        1 => Just(None),
        1 => Just(Some(Vec::new())),
        4 => prop::collection::vec(0i64..256, 1..6).prop_map(Some),
        1 => prop::collection::vec(0i64..256, 60..200).prop_map(Some),
        1 => (0i64..256, 1usize..300).prop_map(|(id, n)| Some(vec![id; n])),
    ]
}

fn any_writing() -> impl Strategy<Value = Writing> {
    let codec = prop_oneof![
        Just(Compression::UNCOMPRESSED),
        Just(Compression::SNAPPY),
        Just(Compression::LZ4_RAW),
        Just(Compression::ZSTD(ZstdLevel::default())),
    ];
    (0..5usize, 0..4usize, codec, any::<bool>(), 1..60usize, 1..200usize, any::<bool>(), any::<bool>()).prop_map(
        |(dtype, encoding, codec, v2, page_rows, group_rows, element_nullable, large)| Writing {
            dtype: TYPES[dtype],
            encoding: ENCODINGS[encoding],
            codec,
            version: VERSIONS[usize::from(v2)],
            page_rows,
            group_rows,
            list_nullable: true,
            element_nullable,
            large,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_file_reads_as_written(
        writing in any_writing(),
        rows in prop::collection::vec(any_row(), 0..120),
        block_tokens in 1u64..2000,
    ) {
        let fitting = |row: Vec<i64>| row.into_iter().map(|id| id % most(writing.dtype)).collect();
        let rows: Vec<Option<Vec<i64>>> = rows.into_iter().map(|row| row.map(fitting)).collect();
        check(&write(&writing, &rows), &rows, block_tokens);
    }

    #[test]
    fn damage_never_panics(
        writing in any_writing(),
        rows in prop::collection::vec(any_row(), 0..40),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = write(&writing, &rows);
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = read_anything(&bytes);
    }
}

#[test]
fn bits_unpack_at_every_width() {
    for width in 0..=64u32 {
        let values: Vec<u64> = (0..32u64)
            .map(|i| (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) & u64::MAX.checked_shr(64 - width).unwrap_or(0))
            .collect();
        let mut packed = vec![0u8; 4 * width as usize];
        for (i, value) in values.iter().enumerate() {
            for bit in 0..width as usize {
                let at = i * width as usize + bit;
                packed[at / 8] |= ((value >> bit & 1) as u8) << (at % 8);
            }
        }
        let mut wide = [0; 32];
        super::runs::unpacker64(width)(&packed, &mut wide);
        assert_eq!(wide[..], values[..], "width {width}");
        if width <= 32 {
            let mut narrow = [0; 32];
            super::runs::unpacker32(width)(&packed, &mut narrow);
            assert!(narrow.iter().zip(&values).all(|(&a, &b)| u64::from(a) == b), "width {width}");
        }
    }
}

#[test]
fn only_pages_that_opening_decompresses_whole_are_called_slow_to_open() {
    let rows: Rows = (0..200).map(|row| Some((0..row % 9).collect())).collect();
    for (codec, is_slow) in [
        (Compression::LZ4, true),
        (Compression::LZ4_RAW, false),
        (Compression::SNAPPY, false),
        (Compression::ZSTD(ZstdLevel::default()), false),
        (Compression::UNCOMPRESSED, false),
    ] {
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            let saved = save(&write(&Writing { codec, version, ..Writing::default() }, &rows));
            let advice = open(&saved, 1000).unwrap().advice();
            let found = advice.iter().any(|line| line.contains("legacy lz4"));
            assert_eq!(found, is_slow && version == WriterVersion::PARQUET_1_0, "{codec:?} {version:?}: {advice:?}");
        }
    }
}
