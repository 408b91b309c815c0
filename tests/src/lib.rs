//! Corpora for the tests, and a naive reading of them.
//!
//! arrow-rs writes the files. The expected stream comes from the documents that were written, never
//! from the code under test.

pub mod generated;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{FixedSizeListBuilder, LargeListBuilder, ListBuilder, PrimitiveBuilder};
use arrow_array::types::{
    ArrowPrimitiveType, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type,
};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use arrow_schema::{DataType, Field, Schema};
use forebay::tokens::Dtype;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding, GzipLevel, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::schema::types::ColumnPath;

/// A document, or a null.
pub type Document = Option<Vec<i64>>;

/// The form of documents in a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 32-bit offsets.
    List,
    /// 64-bit offsets.
    LargeList,
    /// All documents of one length.
    FixedSizeList(i32),
}

/// Container, codec and encoding of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Container {
    /// Arrow IPC file.
    ArrowFile(Option<CompressionType>),
    /// Arrow IPC stream.
    ArrowStream(Option<CompressionType>),
    /// Parquet.
    Parquet {
        /// Codec of the pages.
        codec: Compression,
        /// Encoding of the values. `None` means a dictionary.
        encoding: Option<Encoding>,
        /// Version of the data pages, 1 or 2.
        pages: u8,
    },
}

/// Every container that arrow-rs can write and forebay reads.
pub fn containers() -> Vec<Container> {
    let mut all = Vec::new();
    for codec in [None, Some(CompressionType::LZ4_FRAME), Some(CompressionType::ZSTD)] {
        all.extend([Container::ArrowFile(codec), Container::ArrowStream(codec)]);
    }
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::LZ4_RAW,
        Compression::ZSTD(ZstdLevel::default()),
    ];
    let encodings =
        [None, Some(Encoding::PLAIN), Some(Encoding::DELTA_BINARY_PACKED), Some(Encoding::BYTE_STREAM_SPLIT)];
    for codec in codecs {
        for encoding in encodings {
            for pages in [1, 2] {
                all.push(Container::Parquet { codec, encoding, pages });
            }
        }
    }
    all
}

/// Writes `documents` as column `input_ids` of `path`, in batches (and row groups) of `rows` rows.
pub fn write(path: &Path, container: Container, dtype: Dtype, shape: Shape, documents: &[Document], rows: usize) {
    let batches: Vec<RecordBatch> = if documents.is_empty() {
        vec![batch(dtype, shape, &[])]
    } else {
        documents.chunks(rows).map(|documents| batch(dtype, shape, documents)).collect()
    };
    write_batches(path, container, &batches, rows);
}

/// Writes `batches`, in row groups of `rows` rows.
pub fn write_batches(path: &Path, container: Container, batches: &[RecordBatch], rows: usize) {
    let schema = batches[0].schema();
    let file = File::create(path).expect("a temporary folder is writable");
    match container {
        Container::ArrowFile(codec) => {
            let options = IpcWriteOptions::default().try_with_compression(codec).expect("codec is built in");
            let mut writer = FileWriter::try_new_with_options(file, &schema, options).expect("schema is writable");
            batches.iter().for_each(|batch| writer.write(batch).expect("batch is writable"));
            writer.finish().expect("file is writable");
        }
        Container::ArrowStream(codec) => {
            let options = IpcWriteOptions::default().try_with_compression(codec).expect("codec is built in");
            let mut writer = StreamWriter::try_new_with_options(file, &schema, options).expect("schema is writable");
            batches.iter().for_each(|batch| writer.write(batch).expect("batch is writable"));
            writer.finish().expect("file is writable");
        }
        Container::Parquet { codec, encoding, pages } => {
            let version = if pages == 1 { WriterVersion::PARQUET_1_0 } else { WriterVersion::PARQUET_2_0 };
            let mut properties = WriterProperties::builder()
                .set_compression(codec)
                .set_writer_version(version)
                .set_data_page_size_limit(512)
                .set_write_batch_size(64)
                .set_max_row_group_row_count(Some(rows))
                .set_dictionary_enabled(encoding.is_none());
            // The text column cannot take every encoding.
            if let Some(encoding) = encoding {
                let parts = ["input_ids", "list", "item"].map(str::to_owned).to_vec();
                properties = properties.set_column_encoding(ColumnPath::new(parts), encoding);
            }
            let mut writer = ArrowWriter::try_new(file, schema, Some(properties.build())).expect("schema is writable");
            batches.iter().for_each(|batch| writer.write(batch).expect("batch is writable"));
            writer.close().expect("file is writable");
        }
    }
}

fn batch(dtype: Dtype, shape: Shape, documents: &[Document]) -> RecordBatch {
    let column = match dtype {
        Dtype::U8 => column::<UInt8Type>(shape, documents),
        Dtype::U16 => column::<UInt16Type>(shape, documents),
        Dtype::U32 => column::<UInt32Type>(shape, documents),
        Dtype::I8 => column::<Int8Type>(shape, documents),
        Dtype::I16 => column::<Int16Type>(shape, documents),
        Dtype::I32 => column::<Int32Type>(shape, documents),
        Dtype::I64 => column::<Int64Type>(shape, documents),
        other => panic!("no ids of type {}", other.name()),
    };
    let other =
        Arc::new(arrow_array::StringArray::from_iter_values(documents.iter().map(|document| format!("{document:?}"))));
    let schema = Schema::new(vec![
        Field::new("text", DataType::Utf8, true),
        Field::new("input_ids", column.data_type().clone(), true),
    ]);
    RecordBatch::try_new(Arc::new(schema), vec![other, column]).expect("columns have one length")
}

fn column<T: ArrowPrimitiveType>(shape: Shape, documents: &[Document]) -> ArrayRef
where
    T::Native: TryFrom<i64>,
{
    let native = |id: i64| T::Native::try_from(id).ok().expect("ids fit their type");
    let values = PrimitiveBuilder::<T>::new();
    macro_rules! lists {
        ($builder:expr) => {{
            let mut builder = $builder;
            for document in documents {
                document.iter().flatten().for_each(|id| builder.values().append_value(native(*id)));
                builder.append(document.is_some());
            }
            Arc::new(builder.finish())
        }};
    }
    match shape {
        Shape::List => lists!(ListBuilder::new(values)),
        Shape::LargeList => lists!(LargeListBuilder::new(values)),
        Shape::FixedSizeList(length) => {
            let mut builder = FixedSizeListBuilder::new(values, length);
            for document in documents {
                match document {
                    Some(ids) => ids.iter().for_each(|id| builder.values().append_value(native(*id))),
                    None => (0..length).for_each(|_| builder.values().append_null()),
                }
                builder.append(document.is_some());
            }
            Arc::new(builder.finish())
        }
    }
}

/// Makes documents of many lengths, including empty and null documents. Ids are below `vocabulary`,
/// and unique if it is large enough.
pub fn documents(count: usize, longest: u64, vocabulary: i64, seed: u64) -> Vec<Document> {
    let mut state = seed;
    let mut random = |below: u64| {
        // splitmix64
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % below.max(1)
    };
    let mut next = 0;
    (0..count)
        .map(|_| {
            let length = match random(10) {
                0 => 0,
                1 => return None,
                2 => random(longest * 8),
                _ => random(longest),
            };
            Some(
                (0..length)
                    .map(|_| {
                        next += 1;
                        next % vocabulary
                    })
                    .collect(),
            )
        })
        .collect()
}

/// The stream of tokens of `shards`.
pub fn stream(shards: &[Vec<Document>], bos: Option<u32>, eos: Option<u32>) -> Vec<i64> {
    let mut stream = Vec::new();
    for ids in shards.iter().flatten().flatten().filter(|ids| !ids.is_empty()) {
        stream.extend(bos.map(i64::from));
        stream.extend(ids);
        stream.extend(eos.map(i64::from));
    }
    stream
}

/// Takes every batch of a pass.
pub fn drain(batches: &forebay::Batches) -> Vec<Arc<forebay::Batch>> {
    let mut all = Vec::new();
    loop {
        match batches.next_timeout(std::time::Duration::from_secs(60)).expect("the corpus is sound") {
            forebay::Next::Batch(batch) => all.push(batch),
            forebay::Next::End => return all,
            forebay::Next::Pending => panic!("no batch within a minute"),
        }
    }
}

/// The rows of field `name` of `batches`.
pub fn rows(batches: &[Arc<forebay::Batch>], name: &str) -> Vec<Vec<i64>> {
    batches.iter().flat_map(|batch| (0..batch.rows).map(|row| batch.row(name, row))).collect()
}
