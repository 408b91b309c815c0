//! Copies further columns: takes their values document by document, and makes arrays of them.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::types::Int64Type;
use arrow_array::{
    Array, ArrayRef, BooleanArray, ListArray, StringArray, cast::AsArray, make_array, new_empty_array, new_null_array,
};
use arrow_buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field};
use forebay::proof::checksum::{number_hash, text_hash};
use forebay::tokens::{DocumentType, Dtype, Tokens};
use forebay::{Error, Result};
use parquet::schema::types::ColumnPath;

use super::content::Digest;
use crate::sequential::field_values;
use crate::token_column::unsound;

/// A column that is copied beside the tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CarriedField {
    pub(super) name: String,
    pub(super) content: CarriedContent,
}

/// The values of a column that is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CarriedContent {
    /// One value for each token. Their type has the names of the loader and of arrow-rs.
    PerToken { dtype: Dtype, item: DataType },
    /// One value for each document.
    PerDocument(DocumentType),
}

impl CarriedField {
    /// The column in the schema of the result.
    pub(super) fn field(&self) -> Field {
        match &self.content {
            CarriedContent::PerToken { item, .. } => {
                Field::new(&self.name, DataType::List(Arc::new(item_field(item))), false)
            }
            CarriedContent::PerDocument(kind) => Field::new(&self.name, arrow_type(*kind), true),
        }
    }

    /// The path of its values in a Parquet file.
    pub(super) fn parquet_path(&self) -> ColumnPath {
        let below: &[&str] = if self.is_per_document() { &[] } else { &["list", "item"] };
        ColumnPath::new(std::iter::once(&*self.name).chain(below.iter().copied()).map(str::to_owned).collect())
    }

    /// Whether it has one value for each document.
    pub(super) fn is_per_document(&self) -> bool {
        matches!(self.content, CarriedContent::PerDocument(_))
    }
}

fn item_field(item: &DataType) -> Field {
    Field::new_list_field(item.clone(), false)
}

/// The type in which values of documents are written.
fn arrow_type(kind: DocumentType) -> DataType {
    match kind {
        DocumentType::Text => DataType::Utf8,
        DocumentType::Number(dtype) => match dtype {
            Dtype::Bool => DataType::Boolean,
            Dtype::U8 => DataType::UInt8,
            Dtype::U16 => DataType::UInt16,
            Dtype::U32 => DataType::UInt32,
            Dtype::U64 => DataType::UInt64,
            Dtype::I8 => DataType::Int8,
            Dtype::I16 => DataType::Int16,
            Dtype::I32 => DataType::Int32,
            Dtype::I64 => DataType::Int64,
            Dtype::F16 => DataType::Float16,
            Dtype::F32 => DataType::Float32,
            Dtype::F64 => DataType::Float64,
        },
    }
}

/// The values of a column that are not in a record batch yet, and the digest of all.
pub(super) struct FieldPart {
    of: CarriedField,
    /// Values in the bytes of their type; a byte for each boolean.
    bytes: Vec<u8>,
    /// Whether each value of a document is set.
    valid: Vec<bool>,
    texts: Vec<Option<String>>,
    pub(super) digest: Digest,
}

impl FieldPart {
    pub(super) fn new(of: &CarriedField) -> Self {
        let (bytes, valid, texts) = (Vec::new(), Vec::new(), Vec::new());
        Self { of: of.clone(), bytes, valid, texts, digest: Digest::default() }
    }

    /// Adds the document `range` of `values`. It ends after `end` tokens of the shard.
    pub(super) fn document(&mut self, values: &ArrayRef, range: Range<usize>, end: u64) -> Result<()> {
        let dtype = match &self.of.content {
            CarriedContent::PerToken { dtype, .. } => *dtype,
            CarriedContent::PerDocument(kind) => return self.value(values, *kind, range.start),
        };
        if range.is_empty() {
            return Ok(());
        }
        let values = values.slice(range.start, range.len());
        if values.null_count() > 0 {
            return Err(Error::data(format!("column `{}` has a null value: every value must be set", self.of.name)));
        }
        if let Some(values) = values.as_boolean_opt() {
            self.bytes.extend(values.values().iter().map(u8::from));
        } else {
            let (data, width) = (values.to_data(), dtype.size());
            self.bytes.extend(&data.buffers()[0].as_slice()[data.offset() * width..][..data.len() * width]);
        }
        self.digest.ids(field_values(&values, dtype)?.as_primitive::<Int64Type>().values());
        self.digest.end(end);
        Ok(())
    }

    /// The values of a mask that are not written yet, a byte each. Fails unless all are 0 or 1.
    pub(super) fn take_mask(&mut self) -> Result<Vec<u8>> {
        let bytes = std::mem::take(&mut self.bytes);
        let CarriedContent::PerToken { dtype, .. } = &self.of.content else { return Ok(bytes) };
        let values = Tokens::new(*dtype, &bytes);
        let bit = |index: usize| u8::try_from(values.get(index)).ok().filter(|bit| *bit <= 1);
        let bits: Option<Vec<u8>> = (0..values.len()).map(bit).collect();
        bits.ok_or_else(|| {
            Error::data(format!("column `{}` has a value other than 0 and 1, which a mask cannot hold", self.of.name))
        })
    }

    /// Adds the value of row `row` of `values`.
    fn value(&mut self, values: &ArrayRef, kind: DocumentType, row: usize) -> Result<()> {
        let value = values.slice(row, 1);
        if let Some(dictionary) = value.as_any_dictionary_opt() {
            return match value.is_null(0) {
                true => self.value(&new_null_array(dictionary.values().data_type(), 1), kind, 0),
                false => self.value(dictionary.values(), kind, dictionary.normalized_keys()[0]),
            };
        }
        let is_valid = value.is_valid(0);
        let DocumentType::Number(dtype) = kind else {
            let text = match value.data_type() {
                DataType::Utf8 => value.as_string::<i32>().value(0),
                DataType::LargeUtf8 => value.as_string::<i64>().value(0),
                DataType::Utf8View => value.as_string_view().value(0),
                other => return Err(Error::data(format!("a column of strings has type {other}"))),
            };
            let text = is_valid.then(|| text.to_owned());
            self.digest.ids(&[text_hash(text.as_deref())]);
            self.texts.push(text);
            return Ok(());
        };
        let number = field_values(&value, dtype)?.as_primitive::<Int64Type>().value(0);
        self.digest.ids(&[number_hash(is_valid.then_some(number))]);
        self.bytes.extend_from_slice(&number.to_le_bytes()[..dtype.size()]);
        self.valid.push(is_valid);
        Ok(())
    }

    /// The column of a record batch whose documents have `offsets`.
    pub(super) fn take(&mut self, offsets: &OffsetBuffer<i32>) -> Result<ArrayRef> {
        let bytes = std::mem::take(&mut self.bytes);
        let valid = std::mem::take(&mut self.valid);
        let (item, dtype) = match &self.of.content {
            CarriedContent::PerToken { dtype, item } => (item.clone(), *dtype),
            CarriedContent::PerDocument(DocumentType::Text) => {
                return Ok(Arc::new(StringArray::from_iter(std::mem::take(&mut self.texts))));
            }
            CarriedContent::PerDocument(DocumentType::Number(dtype)) => {
                (arrow_type(DocumentType::Number(*dtype)), *dtype)
            }
        };
        let nulls = if self.of.is_per_document() { Some(NullBuffer::from(valid)) } else { None };
        let values = if item == DataType::Boolean {
            let bits = bytes.iter().map(|value| *value == 1).collect();
            Arc::new(BooleanArray::new(bits, nulls)) as ArrayRef
        } else {
            let len = bytes.len() / dtype.size();
            let data = new_empty_array(&item).to_data().into_builder().nulls(nulls);
            make_array(data.len(len).buffers(vec![Buffer::from_vec(bytes)]).build().map_err(unsound)?)
        };
        if self.of.is_per_document() {
            return Ok(values);
        }
        Ok(Arc::new(ListArray::new(Arc::new(item_field(&item)), offsets.clone(), values, None)))
    }
}
