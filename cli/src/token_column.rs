//! Finds the token column of a file, and the columns beside it, by arrow-rs's and parquet's readers.
//!
//! A Parquet file is opened as if it held the token column alone: a footer is built that has this column's
//! part of the schema and its chunks, and nothing else. So no index of one schema is ever used in another
//! (arrow-rs leaves out groups without columns, which Parquet's own schema counts), and columns that arrow-rs
//! cannot describe do no harm.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{DataType, Schema};
use forebay::format::{Format, TOKEN_COLUMNS};
use forebay::{Error, Result};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::errors::ParquetError;
use parquet::file::metadata::{FileMetaData, ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData};
use parquet::schema::types::{SchemaDescriptor, Type};

/// Tokens that parquet decodes at once, if the rows are about as long as their mean.
const DECODED_TOKENS: u64 = 1 << 20;

/// What the schema of a file says of its token column.
pub(crate) struct TokenColumn {
    pub(crate) name: String,
    /// Whether a row is a token, so that the file is one document.
    pub(crate) plain: bool,
    /// Type of its values.
    pub(crate) item: DataType,
    /// Names of the other columns.
    pub(crate) others: Vec<String>,
}

/// The type of the values in a column of `data_type`.
fn item_of(data_type: &DataType) -> DataType {
    match data_type {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => item.data_type().clone(),
        other => other.clone(),
    }
}

impl TokenColumn {
    /// Looks into the schema of the file at `path`.
    pub(crate) fn find(path: &Path, format: Format, wanted: Option<&str>) -> Result<Self> {
        let file = open_file(path)?;
        let schema = match format {
            Format::Parquet => {
                let ParquetColumn { name, others, builder } = parquet(file, wanted)?;
                let data_type = builder.schema().field(0).data_type();
                return Ok(Self { name, plain: !data_type.is_nested(), item: item_of(data_type), others });
            }
            Format::ArrowFile => FileReader::try_new(BufReader::new(file), None).map_err(unsound)?.schema(),
            Format::ArrowStream => StreamReader::try_new(BufReader::new(file), None).map_err(unsound)?.schema(),
        };
        let index = arrow(&schema, wanted)?;
        let others = schema.fields().iter().enumerate().filter(|(other, _)| *other != index);
        Ok(Self {
            name: schema.field(index).name().clone(),
            plain: !schema.field(index).data_type().is_nested(),
            item: item_of(schema.field(index).data_type()),
            others: others.map(|(_, field)| field.name().clone()).collect(),
        })
    }
}

pub(crate) fn open_file(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| Error::io("cannot open shard", error))
}

/// The token column of a Parquet file, ready to be read.
pub(crate) struct ParquetColumn {
    pub(crate) name: String,
    /// Names of the other columns.
    pub(crate) others: Vec<String>,
    /// Reads the token column. Its batches have this one column.
    pub(crate) builder: ParquetRecordBatchReaderBuilder<File>,
}

/// Opens a Parquet file for its token column: the one named `wanted`, or the first that has a usual name.
pub(crate) fn parquet(file: File, wanted: Option<&str>) -> Result<ParquetColumn> {
    let metadata = ParquetMetaDataReader::new().parse_and_finish(&file).map_err(unsound)?;
    let schema = metadata.file_metadata().schema_descr();
    let leaves = || (0..schema.num_columns()).map(|leaf| (leaf, schema.get_column_root(leaf).name()));
    let is_there = |name: &str| leaves().any(|(_, root)| root == name);
    let name = choose(wanted, is_there)?;
    let (leaf, _) = leaves().find(|(_, root)| *root == name).ok_or_else(missing)?;
    let root = schema.get_column_root_idx(leaf);
    let mut others: Vec<String> = Vec::new();
    let mut last = root;
    for (other, name) in leaves() {
        let other = schema.get_column_root_idx(other);
        if other != root && other != last {
            others.push(name.to_owned());
        }
        last = other;
    }
    let alone = ArrowReaderMetadata::try_new(
        Arc::new(alone(&metadata, leaf).map_err(unsound)?),
        // It describes all columns, and what the file's writer said about lists is not needed.
        ArrowReaderOptions::new().with_skip_arrow_metadata(true),
    );
    let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, alone.map_err(unsound)?);
    let values: u64 = metadata.row_groups().iter().map(|group| group.column(leaf).num_values().max(0) as u64).sum();
    let rows = metadata.file_metadata().num_rows().max(1) as u64;
    let batch = (DECODED_TOKENS / values.div_ceil(rows).max(1)).clamp(1, 1 << 16);
    Ok(ParquetColumn { name: name.to_owned(), others, builder: builder.with_batch_size(batch as usize) })
}

/// The footer of a file that has the column of `leaf` alone.
fn alone(whole: &ParquetMetaData, leaf: usize) -> std::result::Result<ParquetMetaData, ParquetError> {
    let file = whole.file_metadata();
    let root = file.schema_descr().get_column_root_ptr(leaf);
    let schema = Type::group_type_builder(file.schema().name()).with_fields(vec![root]).build()?;
    let schema = Arc::new(SchemaDescriptor::new(Arc::new(schema)));
    let groups = whole.row_groups().iter().map(|group| {
        RowGroupMetaData::builder(Arc::clone(&schema))
            .set_num_rows(group.num_rows())
            .set_total_byte_size(group.total_byte_size())
            .add_column_metadata(group.column(leaf).clone())
            .build()
    });
    let groups = groups.collect::<Result<Vec<_>, _>>()?;
    let created_by = file.created_by().map(str::to_owned);
    Ok(ParquetMetaData::new(FileMetaData::new(file.version(), file.num_rows(), created_by, None, schema, None), groups))
}

/// Index of the token column among the columns of an Arrow file.
pub(crate) fn arrow(schema: &Schema, wanted: Option<&str>) -> Result<usize> {
    let name = choose(wanted, |name| schema.column_with_name(name).is_some())?;
    schema.index_of(name).map_err(unsound)
}

fn choose(wanted: Option<&str>, is_there: impl Fn(&str) -> bool) -> Result<&str> {
    match wanted {
        Some(name) => Some(name).filter(|name| is_there(name)),
        None => TOKEN_COLUMNS.into_iter().find(|name| is_there(name)),
    }
    .ok_or_else(missing)
}

fn missing() -> Error {
    Error::data("no token column: name it with `token_column`")
}

/// A fault that arrow-rs or parquet found while reading.
pub(crate) fn unsound(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::data("arrow-rs cannot read the shard").with_source(error)
}
