//! Reads any flat column of a Parquet file with arrow-rs, by runs of rows.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow_array::ArrayRef;
use arrow_schema::DataType;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection, RowSelector,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::{FileMetaData, ParquetMetaData, RowGroupMetaData};
use parquet::schema::types::{SchemaDescriptor, Type};

use super::claims;
use super::fallback::Chunks;
use crate::error::{Error, Result};
use crate::storage::SourceFile;
use crate::text::escaped;

/// One column of the row groups of a file.
#[derive(Debug)]
pub(in crate::format) struct ParquetColumn {
    /// The footer of a file that has only this column.
    metadata: ArrowReaderMetadata,
    /// First row of each row group, and last the number of rows.
    starts: Vec<u64>,
    /// Whether the lengths of strings in each row group were checked. Any thread that reads the row
    /// group checks it and sets this. A stale value costs a second check.
    is_checked: Vec<AtomicBool>,
    /// Largest number of bytes that a row group may take.
    most_bytes: u64,
}

impl ParquetColumn {
    /// Finds column `name` in `file`. Fails if a row group of it would take more than `most_bytes`
    /// bytes.
    pub(in crate::format) fn open(file: &SourceFile, name: &str, most_bytes: u64) -> Result<Self> {
        let name = escaped(name);
        let failed = |error: ParquetError| Error::data(format!("cannot read column `{name}`")).with_source(error);
        let metadata = super::read_metadata(file)?;
        let schema = metadata.file_metadata().schema_descr();
        let leaf = (0..schema.num_columns())
            .find(|leaf| schema.get_column_root(*leaf).name() == name)
            .ok_or_else(|| Error::data(format!("column `{name}` is missing")))?;
        let alone = Arc::new(only_column(&metadata, leaf).map_err(failed)?);
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let metadata = ArrowReaderMetadata::try_new(alone, options).map_err(failed)?;
        let mut starts = vec![0_u64];
        for group in metadata.metadata().row_groups() {
            claims::check_sizes(file, group.column(0), group.num_rows(), most_bytes)?;
            let rows =
                u64::try_from(group.num_rows()).map_err(|_| Error::data("a row group has a negative row count"))?;
            starts.push(starts[starts.len() - 1].saturating_add(rows));
        }
        let is_checked = (1..starts.len()).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { metadata, starts, is_checked, most_bytes })
    }

    /// Type of the column.
    pub(in crate::format) fn data_type(&self) -> &DataType {
        self.metadata.schema().field(0).data_type()
    }

    /// Rows of each row group, and the bytes of the column in it before compression.
    pub(in crate::format) fn groups(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let groups = self.metadata.metadata().row_groups().iter();
        groups.map(|group| (group.num_rows().max(0) as u64, group.column(0).uncompressed_size().max(0) as u64))
    }

    /// Gives the column's values in `rows`, which lie in one row group.
    pub(in crate::format) fn each(
        &self,
        file: &SourceFile,
        rows: Range<u64>,
        add: &mut dyn FnMut(&ArrayRef) -> Result<()>,
    ) -> Result<()> {
        let group = self.starts.partition_point(|start| *start <= rows.start) - 1;
        if !self.is_checked[group].load(Ordering::Relaxed) {
            let chunk = self.metadata.metadata().row_group(group).column(0);
            if chunk.column_descr().max_rep_level() == 0 {
                claims::check_lengths(file, chunk, self.most_bytes)?;
            }
            self.is_checked[group].store(true, Ordering::Relaxed);
        }
        let (before, count) = ((rows.start - self.starts[group]) as usize, (rows.end - rows.start) as usize);
        let selection = RowSelection::from(vec![RowSelector::skip(before), RowSelector::select(count)]);
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(Chunks(file.clone()), self.metadata.clone())
            .with_row_groups(vec![group])
            .with_row_selection(selection)
            .with_batch_size(count)
            .build()
            .map_err(|error| Error::data(format!("cannot read row group {group}")).with_source(error))?;
        for batch in reader {
            let batch =
                batch.map_err(|error| Error::data(format!("cannot read row group {group}")).with_source(error))?;
            add(batch.column(0))?;
        }
        Ok(())
    }
}

/// The footer of a file with only the column of leaf `leaf`.
///
/// No index into the schema of one file is ever used in another one: arrow-rs leaves out groups
/// without columns, and Parquet's own schema counts them. Columns that arrow-rs cannot describe do
/// no harm.
pub fn only_column(whole: &ParquetMetaData, leaf: usize) -> std::result::Result<ParquetMetaData, ParquetError> {
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
