//! Writes one shard of the result. The shard has the name of a draft until it was compared.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::types::{ArrowPrimitiveType, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type};
use arrow_array::{ArrayRef, ListArray, PrimitiveArray, RecordBatch};
use arrow_buffer::OffsetBuffer;
use arrow_ipc::writer::FileWriter;
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use forebay::format::OpenOptions;
use forebay::tokens::Dtype;
use forebay::{Error, ErrorKind, Result};
use parquet::arrow::ArrowWriter;
use parquet::basic::Encoding;
use parquet::errors::ParquetError;
use parquet::file::properties::{WriterProperties, WriterVersion};

use super::content::{Content, Digest, read_back};
use super::fields::{CarriedField, FieldPart};
use super::flat_output::{FlatWriter, beside};
use super::id_type::most;
use super::options::{Container, ShardForm};

/// Number of documents after which a record batch ends, however few tokens they have.
const BATCH_ROWS: usize = 1 << 18;

enum Writer {
    Arrow(FileWriter<BufWriter<File>>),
    Parquet { writer: ArrowWriter<File>, row_group_tokens: u64, tokens: u64 },
    Flat(FlatWriter),
}

/// A shard while it is written. Its file is removed unless it is published.
pub(super) struct PartialShard {
    target: PathBuf,
    draft: Draft,
    schema: SchemaRef,
    dtype: Dtype,
    plain: bool,
    /// Whether the file has no ends of documents.
    joins: bool,
    batch_tokens: usize,
    writer: Option<Writer>,
    /// Ids that are not in a record batch yet.
    ids: Vec<i64>,
    offsets: Vec<i32>,
    rows: u64,
    digest: Digest,
    fields: Vec<FieldPart>,
}

/// A file that is removed when this is dropped, unless it was renamed.
struct Draft {
    path: PathBuf,
    renamed: bool,
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.renamed {
            // If this fails, a later run removes the file.
            let _ = std::fs::remove_file(&self.path);
            for path in beside(&self.path) {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// The beginning of the names of files that are not whole yet. Their ends tell formats.
pub(super) const DRAFT: &str = ".part-";

/// Name of the file that becomes `name`.
pub(super) fn draft_name(name: &str) -> String {
    format!("{DRAFT}{name}")
}

impl PartialShard {
    pub(super) fn create(
        folder: &Path,
        name: &str,
        column: &str,
        plain: bool,
        fields: &[CarriedField],
        shape: &ShardForm,
    ) -> Result<Self> {
        let path = folder.join(draft_name(name));
        let item = arrow_type(shape.dtype);
        let data_type = if plain { item } else { DataType::List(Arc::new(Field::new_list_field(item, false))) };
        let mut columns = vec![Field::new(column, data_type, false)];
        columns.extend(fields.iter().map(CarriedField::field));
        let schema = Arc::new(Schema::new(columns));
        let file = File::create(&path).map_err(|error| Error::io("cannot create shard", error).at(&path))?;
        let draft = Draft { path, renamed: false };
        let (writer, most) = match &shape.container {
            Container::Arrow => {
                let writer = FileWriter::try_new(BufWriter::with_capacity(1 << 20, file), &schema);
                (Writer::Arrow(writer.map_err(|error| arrow_failed(error).at(&draft.path))?), shape.batch_tokens)
            }
            Container::Flat(format) => {
                let writer = FlatWriter::new(*format, shape.dtype, file, &draft.path, !fields.is_empty());
                (Writer::Flat(writer.map_err(|error| error.at(&draft.path))?), shape.batch_tokens)
            }
            Container::Parquet { compression, encoding, row_group_tokens, page_bytes } => {
                let properties = WriterProperties::builder()
                    .set_writer_version(WriterVersion::PARQUET_2_0)
                    .set_compression(*compression)
                    .set_dictionary_enabled(encoding.is_none())
                    .set_data_page_size_limit(*page_bytes as usize)
                    // Bytes alone end a page, and row groups end where `write_batch` says.
                    .set_data_page_row_count_limit(usize::MAX)
                    .set_max_row_group_row_count(None);
                let mut properties = match encoding {
                    Some(encoding) => properties.set_encoding(*encoding),
                    None => properties,
                };
                // The encoding is for ids. Not every type of a field can have it.
                for field in fields {
                    let path = field.parquet_path();
                    properties = properties
                        .set_column_encoding(path.clone(), Encoding::PLAIN)
                        .set_column_dictionary_enabled(path, true);
                }
                let writer = ArrowWriter::try_new(file, Arc::clone(&schema), Some(properties.build()))
                    .map_err(|error| parquet_failed(error).at(&draft.path))?;
                let writer = Writer::Parquet { writer, row_group_tokens: *row_group_tokens, tokens: 0 };
                (writer, shape.batch_tokens.min(*row_group_tokens))
            }
        };
        Ok(Self {
            target: folder.join(name),
            draft,
            schema,
            dtype: shape.dtype,
            plain,
            joins: shape.joins(),
            batch_tokens: most as usize,
            writer: Some(writer),
            ids: Vec::new(),
            offsets: vec![0],
            rows: 0,
            digest: Digest::default(),
            fields: fields.iter().map(FieldPart::new).collect(),
        })
    }

    /// Number of tokens so far.
    pub(super) fn tokens(&self) -> u64 {
        self.digest.tokens + self.ids.len() as u64
    }

    /// Adds the values `range` of further column `index` for the document that is added next.
    pub(super) fn field(&mut self, index: usize, values: &ArrayRef, range: Range<usize>) -> Result<()> {
        let end = self.tokens() + range.len() as u64;
        self.fields[index].document(values, range, end)
    }

    /// Adds a document, or some rows of a plain column. `add` appends their ids.
    pub(super) fn document(&mut self, add: impl FnOnce(&mut Vec<i64>) -> Result<()>) -> Result<()> {
        let before = self.ids.len();
        add(&mut self.ids)?;
        check_ids(&self.ids[before..], self.dtype)?;
        if i32::try_from(self.ids.len()).is_err() {
            // The documents before it have few tokens, so that a batch of its own would not help.
            return Err(Error::data(format!(
                "a document of {} tokens is too long for a list of the result, which can have 2^31",
                self.ids.len() - before
            )));
        }
        self.offsets.push(self.ids.len() as i32);
        if self.ids.len() >= self.batch_tokens || self.offsets.len() > BATCH_ROWS {
            self.write_batch()?;
        }
        Ok(())
    }

    fn write_batch(&mut self) -> Result<()> {
        let before = self.digest.tokens;
        self.digest.ids(&self.ids);
        let documents = self.offsets.len() as u64 - 1;
        if self.plain {
            self.rows += self.ids.len() as u64;
        } else {
            self.rows += documents;
            for pair in self.offsets.windows(2).filter(|pair| pair[1] > pair[0]) {
                self.digest.end(before + pair[1] as u64);
            }
        }
        if let Some(Writer::Flat(writer)) = &mut self.writer {
            let mask = self.fields.first_mut().map(FieldPart::take_mask).transpose()?.unwrap_or_default();
            // A plain column is one document, which ends with the file.
            let ends = if self.plain { &[] } else { &self.offsets[1..] };
            writer.write(&self.ids, ends, &mask).map_err(|error| error.at(&self.draft.path))?;
            self.ids.clear();
            self.offsets = vec![0];
            return Ok(());
        }
        let values = array(&self.ids, self.dtype);
        let tokens = self.ids.len() as u64;
        self.ids.clear();
        let offsets = OffsetBuffer::new(std::mem::replace(&mut self.offsets, vec![0]).into());
        let mut columns = Vec::with_capacity(1 + self.fields.len());
        for field in &mut self.fields {
            columns.push(field.take(&offsets)?);
        }
        let column: ArrayRef = if self.plain {
            values
        } else {
            let field = Field::new_list_field(arrow_type(self.dtype), false);
            Arc::new(ListArray::new(Arc::new(field), offsets, values, None))
        };
        columns.insert(0, column);
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(arrow_failed)?;
        let writer = self.writer.as_mut().expect("there until the shard is published");
        let written = match writer {
            Writer::Flat(_) => Ok(()),
            Writer::Arrow(writer) => writer.write(&batch).map_err(arrow_failed),
            Writer::Parquet { writer, row_group_tokens, tokens: held } => {
                *held += tokens;
                let mut written = writer.write(&batch);
                if *held >= *row_group_tokens {
                    *held = 0;
                    written = written.and_then(|()| writer.flush());
                }
                written.map_err(parquet_failed)
            }
        };
        written.map_err(|error| error.at(&self.draft.path))
    }

    /// Finishes the file on storage, and compares its content with what was added. Returns both.
    pub(super) fn finish(mut self, options: &OpenOptions) -> Result<(Finished, Content)> {
        if !self.ids.is_empty() || self.offsets.len() > 1 {
            self.write_batch()?;
        }
        if self.plain && self.digest.tokens > 0 {
            self.digest.end(self.digest.tokens);
        }
        let path = &self.draft.path;
        let file = match self.writer.take().expect("there until the shard is published") {
            Writer::Arrow(mut writer) => {
                let finished = writer.finish().and_then(|()| writer.into_inner());
                let buffered = finished.map_err(|error| arrow_failed(error).at(path))?;
                buffered.into_inner().map_err(|error| write_failed(error.into_error()).at(path))?
            }
            Writer::Flat(mut writer) => {
                if self.plain && !self.joins {
                    self.rows = 1;
                    writer.end();
                }
                writer.finish().map_err(|error| error.at(path))?
            }
            Writer::Parquet { writer, .. } => {
                let mut file = writer.into_inner().map_err(|error| parquet_failed(error).at(path))?;
                file.flush().map_err(|error| write_failed(error).at(path))?;
                file
            }
        };
        file.sync_all().map_err(|error| write_failed(error).at(path))?;
        let bytes = file.metadata().map_err(|error| write_failed(error).at(path))?.len();
        drop(file);
        let fields = self.fields.into_iter().map(|field| field.digest);
        let expected = self.digest.content(self.rows, fields);
        let found = read_back(path, options)?;
        if found != expected {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("what was written is not what was read from the source: expected {expected}, found {found}"),
            )
            .at(path));
        }
        Ok((Finished { draft: self.draft, target: self.target, bytes }, expected))
    }
}

/// A shard that is whole, on storage and compared, but has no name yet.
pub(super) struct Finished {
    draft: Draft,
    target: PathBuf,
    pub(super) bytes: u64,
}

impl Finished {
    pub(super) fn publish(mut self) -> Result<()> {
        let failed = |error| Error::io("cannot rename the finished shard", error).at(&self.target);
        // The files beside the ids come first: ids without them would be another format.
        for (from, to) in beside(&self.draft.path).iter().zip(&beside(&self.target)) {
            if from.exists() {
                std::fs::rename(from, to).map_err(failed)?;
            }
        }
        std::fs::rename(&self.draft.path, &self.target).map_err(failed)?;
        self.draft.renamed = true;
        sync_folder(self.target.parent().unwrap_or(Path::new(".")))
    }
}

/// Makes the names in `folder` outlast a loss of power.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| Error::io("cannot sync folder", error).at(folder))
}

fn check_ids(ids: &[i64], dtype: Dtype) -> Result<()> {
    let most = most(dtype);
    // As unsigned numbers, negative ids are too large, too.
    if ids.iter().fold(0, |all: u64, id| all.max(*id as u64)) <= most as u64 {
        return Ok(());
    }
    let id = ids.iter().find(|id| !(0..=most).contains(*id)).expect("one is outside of the range");
    Err(if *id < 0 {
        Error::data(format!("token ids must not be negative: found {id}"))
    } else {
        Error::data(format!(
            "token id {id} does not fit {}, which holds ids up to {most}: choose a larger `--dtype`",
            dtype.name()
        ))
    })
}

fn arrow_type(dtype: Dtype) -> DataType {
    match dtype {
        Dtype::U8 => DataType::UInt8,
        Dtype::U16 => DataType::UInt16,
        Dtype::U32 => DataType::UInt32,
        Dtype::I32 => DataType::Int32,
        Dtype::I64 => DataType::Int64,
        other => unreachable!("no ids of type {}", other.name()),
    }
}

/// An array of type `dtype` with `ids`, which fit.
fn array(ids: &[i64], dtype: Dtype) -> ArrayRef {
    fn typed<T: ArrowPrimitiveType>(ids: &[i64], narrow: impl Fn(i64) -> T::Native) -> ArrayRef {
        Arc::new(PrimitiveArray::<T>::from_iter_values(ids.iter().map(|id| narrow(*id))))
    }
    match dtype {
        Dtype::U8 => typed::<UInt8Type>(ids, |id| id as u8),
        Dtype::U16 => typed::<UInt16Type>(ids, |id| id as u16),
        Dtype::U32 => typed::<UInt32Type>(ids, |id| id as u32),
        Dtype::I32 => typed::<Int32Type>(ids, |id| id as i32),
        Dtype::I64 => typed::<Int64Type>(ids, |id| id),
        other => unreachable!("no ids of type {}", other.name()),
    }
}

fn write_failed(error: std::io::Error) -> Error {
    Error::io("cannot write shard", error)
}

fn arrow_failed(error: ArrowError) -> Error {
    match error {
        ArrowError::IoError(_, error) => write_failed(error),
        other => Error::new(ErrorKind::Internal, "arrow-rs cannot write the shard").with_source(other),
    }
}

fn parquet_failed(error: ParquetError) -> Error {
    match error {
        ParquetError::External(error) => match error.downcast::<std::io::Error>() {
            Ok(error) => write_failed(*error),
            Err(other) => Error::new(ErrorKind::Internal, format!("arrow-rs cannot write the shard: {other}")),
        },
        other => Error::new(ErrorKind::Internal, "arrow-rs cannot write the shard").with_source(other),
    }
}
