//! Opens files for their token column alone, with the readers of arrow-rs and parquet.
//!
//! A Parquet file is opened as if it had only the token column.

use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{DataType, Schema};
use forebay::format::parquet::{only_column, read_metadata};
use forebay::format::{Format, ShardFacts};
use forebay::settings::Io;
use forebay::storage::Files;
use forebay::{Error, Result};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};

use crate::flat;
use crate::shard_reader::ShardReader;

/// Number of tokens that parquet decodes at once, if the rows have nearly equal lengths.
const DECODED_TOKENS: u64 = 1 << 20;

/// The type of column `name` in the file at `path`.
pub(crate) fn data_type(files: &Files, path: &Path, facts: &ShardFacts, name: &str) -> Result<DataType> {
    let read = || Ok(BufReader::new(ShardReader::open(files, path)?));
    let schema = match facts.format {
        Format::Parquet => return Ok(parquet(files, path, name)?.schema().field(0).data_type().clone()),
        Format::ArrowFile => FileReader::try_new(read()?, None).map_err(unsound)?.schema(),
        Format::ArrowStream => StreamReader::try_new(read()?, None).map_err(unsound)?.schema(),
        _ => return flat::data_type(facts),
    };
    Ok(schema.field(arrow(&schema, name)?).data_type().clone())
}

/// The type of the values in lists of `data_type`.
pub(crate) fn item_of(data_type: &DataType) -> Option<DataType> {
    match data_type {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            Some(item.data_type().clone())
        }
        _ => None,
    }
}

/// Opens a Parquet file to read column `name`. Its batches have only this column.
pub(crate) fn parquet(files: &Files, path: &Path, name: &str) -> Result<ParquetRecordBatchReaderBuilder<ShardReader>> {
    let metadata = read_metadata(&files.open(path, Io::Pread)?)?;
    let schema = metadata.file_metadata().schema_descr();
    let leaf = (0..schema.num_columns()).find(|leaf| schema.get_column_root(*leaf).name() == name);
    let leaf = leaf.ok_or_else(|| missing(name))?;
    let alone = ArrowReaderMetadata::try_new(
        Arc::new(only_column(&metadata, leaf).map_err(unsound)?),
        // It describes all columns. The hints of the file's writer about lists are not needed.
        ArrowReaderOptions::new().with_skip_arrow_metadata(true),
    );
    let builder =
        ParquetRecordBatchReaderBuilder::new_with_metadata(ShardReader::open(files, path)?, alone.map_err(unsound)?);
    let values: u64 = metadata.row_groups().iter().map(|group| group.column(leaf).num_values().max(0) as u64).sum();
    let rows = metadata.row_groups().iter().map(|group| group.num_rows().max(0) as u64).sum::<u64>().max(1);
    let batch = (DECODED_TOKENS / values.div_ceil(rows).max(1)).clamp(1, 1 << 16);
    Ok(builder.with_batch_size(batch as usize))
}

/// Index of column `name` among the columns of an Arrow file.
pub(crate) fn arrow(schema: &Schema, name: &str) -> Result<usize> {
    schema.index_of(name).map_err(|_| missing(name))
}

fn missing(name: &str) -> Error {
    Error::data(format!("arrow-rs finds no column `{name}`"))
}

/// The error for a fault that arrow-rs or parquet found while reading.
pub(crate) fn unsound(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::data("arrow-rs cannot read the shard").with_source(error)
}
