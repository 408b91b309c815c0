//! Tests the reader on real Arrow and Parquet files.
//!
//! A layout that needs document lengths gets them, and its rows hold the tokens of its segments.
//! The joined layout knows where documents end in a row.

use std::path::Path;
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::file::properties::WriterProperties;
use arrow_array::builder::{Int32Builder, ListBuilder};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{FileWriter, IpcWriteOptions};

use super::*;
use crate::corpus::Corpus;
use crate::error::Result;
use crate::fill::{Ahead, TokenRow};
use crate::format::OpenOptions;
use crate::layout::{self, Documents, Extent, Layout, LayoutWindow, Lengths, Segment, Stream, WindowPlan};
use crate::settings::{Config, DataFormat};

const PADDING: Padding = Padding { id: 7, label: -100 };
/// Documents in a window of the layout under test.
const WINDOW_DOCUMENTS: usize = 3;

/// A layout with one row per document. It pads shorter documents and cuts longer ones.
#[derive(Debug)]
struct OneDocument {
    stream: Arc<Stream>,
    row_tokens: u64,
    /// Number of specials around a document.
    specials: u64,
    windows: Vec<LayoutWindow>,
    /// Windows and rows before each shard, and last those of all shards.
    before: Vec<(usize, u64)>,
}

impl OneDocument {
    fn open(config: &Config, stream: &Arc<Stream>, lengths: Lengths<'_>) -> Result<Box<dyn Layout>> {
        let specials = u64::from(config.bos_id.is_some()) + u64::from(config.eos_id.is_some());
        let (mut windows, mut before, mut rows) = (Vec::new(), vec![(0, 0)], 0);
        for shard in 0..stream.shards() {
            let lengths = lengths(shard)?;
            let (mut start, mut first) = (stream.start_of(shard), 0);
            for part in lengths.chunks(WINDOW_DOCUMENTS) {
                let len: u64 = part.iter().map(|len| u64::from(*len) + specials).sum();
                let documents = first..first + part.len() as u64;
                windows.push(LayoutWindow {
                    number: windows.len() as u64,
                    stream: start..start + len,
                    documents: Some((shard, documents)),
                });
                (start, first) = (start + len, first + part.len() as u64);
            }
            assert_eq!(start, stream.start_of(shard + 1), "lengths of shard {shard}");
            rows += lengths.len() as u64;
            before.push((windows.len(), rows));
        }
        let row_tokens = config.row_tokens();
        let stream = Arc::clone(stream);
        Ok(Box::new(Self { stream, row_tokens, specials, windows, before }))
    }
}

impl Layout for OneDocument {
    fn extent(&self, shards: usize) -> Extent {
        let stream_len = self.stream.start_of(shards);
        Extent { stream_len, rows: self.before[shards].1, tokens: stream_len, tail_tokens: 0 }
    }

    fn locate(&self, extent: &Extent, row: u64) -> (LayoutWindow, usize) {
        assert!(row < extent.rows);
        let shard = self.before.partition_point(|(_, rows)| *rows <= row) - 1;
        let (windows, rows) = self.before[shard];
        let in_shard = (row - rows) as usize;
        (self.windows[windows + in_shard / WINDOW_DOCUMENTS].clone(), in_shard % WINDOW_DOCUMENTS)
    }

    fn plan(&self, window: &LayoutWindow, lengths: &[u32], plan: &mut WindowPlan) {
        let mut start = window.stream.start;
        let first = window.documents.as_ref().unwrap().1.start;
        for (number, len) in (first..).zip(lengths) {
            let len = u64::from(*len) + self.specials;
            let documents = Documents::One { number, ends: true };
            plan.push_row(&[Segment { start, len: len.min(self.row_tokens), place: 0, documents }]);
            start += len;
        }
    }

    fn table(&self) -> Vec<u64> {
        Vec::new()
    }

    fn index_bytes(&self) -> u64 {
        0
    }
}

/// Documents of three shards, empty ones included. The second shard has no tokens.
fn shards() -> Vec<Vec<Vec<i32>>> {
    let document = |shard: i32, number: i32, len: usize| vec![shard * 1000 + number; len];
    let lengths = [vec![3, 0, 5, 1, 9, 2, 0, 4], vec![0, 0], vec![12, 1, 1, 1]];
    let shard = |(shard, lengths): (usize, &Vec<usize>)| {
        (0..).zip(lengths).map(|(number, len)| document(shard as i32 + 1, number, *len)).collect()
    };
    lengths.iter().enumerate().map(shard).collect()
}

#[derive(Clone, Copy, Debug)]
enum Written {
    Arrow(Option<CompressionType>),
    Parquet,
}

fn write(folder: &Path, written: Written) {
    for (number, documents) in shards().into_iter().enumerate() {
        // The files have several record batches, row groups and pages.
        let batch = |documents: &[Vec<i32>]| {
            let mut lists = ListBuilder::new(Int32Builder::new());
            documents.iter().for_each(|document| lists.append_value(document.iter().map(|id| Some(*id))));
            RecordBatch::try_from_iter([("input_ids", Arc::new(lists.finish()) as ArrayRef)]).unwrap()
        };
        let batches: Vec<RecordBatch> = documents.chunks(3).map(batch).collect();
        let schema = batches[0].schema();
        match written {
            Written::Arrow(codec) => {
                let file = std::fs::File::create(folder.join(format!("{number}.arrow"))).unwrap();
                let options = IpcWriteOptions::default().try_with_compression(codec).unwrap();
                let mut writer = FileWriter::try_new_with_options(file, &schema, options).unwrap();
                batches.iter().for_each(|batch| writer.write(batch).unwrap());
                writer.finish().unwrap();
            }
            Written::Parquet => {
                let file = std::fs::File::create(folder.join(format!("{number}.parquet"))).unwrap();
                let properties = WriterProperties::builder()
                    .set_max_row_group_row_count(Some(5))
                    .set_data_page_row_count_limit(2)
                    .set_write_batch_size(1);
                let mut writer = ArrowWriter::try_new(file, schema, Some(properties.build())).unwrap();
                batches.iter().for_each(|batch| writer.write(batch).unwrap());
                writer.close().unwrap();
            }
        }
    }
}

const WRITTEN: [Written; 3] = [Written::Arrow(None), Written::Arrow(Some(CompressionType::ZSTD)), Written::Parquet];

type Open = fn(&Config, &Arc<Stream>, Lengths<'_>) -> Result<Box<dyn Layout>>;

fn reader(folder: &Path, config: &Config, open: Open) -> Result<Reader> {
    let options = OpenOptions { block_tokens: 4, ..OpenOptions::of(config) };
    let data = [folder.to_str().unwrap().to_owned()];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let corpus = Corpus::open(&data, DataFormat::Auto, &options, None, &pool)?;
    Reader::new(Arc::new(corpus), config, open, Arc::new(BlockCache::new(1 << 20)), 0, config.memory_budget / 8)
}

/// Reads a row: its ids, its labels, and the ends of its documents.
fn filled(reader: &Reader, extent: &Extent, row: u64, row_tokens: usize) -> (Vec<i64>, Vec<i64>, Vec<u64>) {
    let mut scratch = ReadMemory::default();
    scratch.borders = Some(Vec::new());
    let mut segments = Vec::new();
    reader.plan_row(extent, row, &mut scratch, &mut segments).unwrap();
    let (mut ids, mut labels) = (vec![-1i64; row_tokens], vec![-1i64; row_tokens]);
    let request = RowRequest { segments: &segments, ends_chunk: false, begin: None, ahead: Ahead::NONE };
    reader.fill(request, PADDING, TokenRow::with_labels(&mut ids, &mut labels), &mut scratch).unwrap();
    (ids, labels, scratch.borders.unwrap())
}

/// Returns each document as the stream holds it.
fn documents(config: &Config) -> impl Iterator<Item = Vec<i64>> {
    let around = |id: Option<u32>| id.map(i64::from);
    let (bos, eos) = (around(config.bos_id), around(config.eos_id));
    let all = shards().into_iter().flatten().filter(|document| !document.is_empty());
    all.map(move |document| bos.into_iter().chain(document.into_iter().map(i64::from)).chain(eos).collect())
}

#[test]
fn a_layout_that_needs_lengths_gives_one_document_per_row() {
    for written in WRITTEN {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), written);
        for specials in [None, Some(1)] {
            let config = Config { seq_len: 6, bos_id: specials, eos_id: specials, ..Config::default() };
            let reader = reader(folder.path(), &config, OneDocument::open).unwrap();
            let extent = reader.layout().extent(3);
            assert_eq!((extent.rows, reader.layout().extent(2).rows), (10, 6), "{written:?}");
            for (row, document) in documents(&config).enumerate() {
                let (ids, labels, borders) = filled(&reader, &extent, row as u64, 6);
                let real = document.len().min(6);
                assert_eq!(ids[..real], document[..real], "row {row} of {written:?}");
                assert_eq!(labels[..real], document[..real], "row {row} of {written:?}");
                assert!(ids[real..].iter().all(|id| *id == 7) && labels[real..].iter().all(|label| *label == -100));
                assert_eq!(borders, [real as u64], "row {row} of {written:?}");
            }
        }
    }
}

#[test]
fn joined_rows_know_where_documents_end_in_them() {
    for written in WRITTEN {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), written);
        for (bos_id, eos_id) in [(None, None), (Some(1), None), (None, Some(2)), (Some(1), Some(2))] {
            let config = Config { seq_len: 5, bos_id, eos_id, ..Config::default() };
            let reader = reader(folder.path(), &config, layout::open).unwrap();
            let stream: Vec<i64> = documents(&config).flatten().collect();
            let ends: Vec<usize> = documents(&config)
                .scan(0, |end, document| {
                    *end += document.len();
                    Some(*end)
                })
                .collect();
            let extent = reader.layout().extent(3);
            assert_eq!((extent.stream_len, extent.rows), (stream.len() as u64, stream.len() as u64 / 5));
            for row in 0..extent.rows as usize {
                let places = row * 5..row * 5 + 5;
                let inside = ends.iter().filter(|end| places.contains(&(*end - 1)));
                let expected: Vec<u64> = inside.map(|end| (end - places.start) as u64).collect();
                let (ids, _, borders) = filled(&reader, &extent, row as u64, 5);
                assert_eq!((&ids[..], borders), (&stream[places], expected), "row {row} of {written:?}");
            }
        }
    }
}

#[test]
fn lengths_that_cannot_be_held_are_an_error_with_the_arithmetic() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), Written::Parquet);
    let config = Config { seq_len: 6, memory_budget: 100, ..Config::default() };
    let error = reader(folder.path(), &config, OneDocument::open).unwrap_err().to_string();
    assert!(error.contains("10 documents take 20 bytes, more than the 12") && error.contains("cache_dir"), "{error}");
}
