//! Copies further columns: takes their values document by document, and makes arrays of them.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::types::Int64Type;
use arrow_array::{Array, ArrayRef, BooleanArray, ListArray, cast::AsArray, make_array, new_empty_array};
use arrow_buffer::{Buffer, OffsetBuffer};
use arrow_schema::{DataType, Field};
use forebay::tokens::Dtype;
use forebay::{Error, Result};

use super::content::Digest;
use crate::sequential::field_values;
use crate::token_column::unsound;

/// A column that is copied beside the tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CarriedField {
    pub(super) name: String,
    /// Type of its values, by the names of the loader and of arrow-rs.
    pub(super) dtype: Dtype,
    pub(super) item: DataType,
}

impl CarriedField {
    /// The column in the schema of the result.
    pub(super) fn field(&self) -> Field {
        Field::new(&self.name, DataType::List(Arc::new(self.item_field())), false)
    }

    fn item_field(&self) -> Field {
        Field::new_list_field(self.item.clone(), false)
    }
}

/// The values of a column that are not in a record batch yet, and the digest of all.
pub(super) struct FieldPart {
    of: CarriedField,
    /// Values in the bytes of their type; a byte for each boolean.
    bytes: Vec<u8>,
    pub(super) digest: Digest,
}

impl FieldPart {
    pub(super) fn new(of: &CarriedField) -> Self {
        Self { of: of.clone(), bytes: Vec::new(), digest: Digest::default() }
    }

    /// Adds the document `range` of `values`. It ends after `end` tokens of the shard.
    pub(super) fn document(&mut self, values: &ArrayRef, range: Range<usize>, end: u64) -> Result<()> {
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
            let (data, width) = (values.to_data(), self.of.dtype.size());
            self.bytes.extend(&data.buffers()[0].as_slice()[data.offset() * width..][..data.len() * width]);
        }
        self.digest.ids(field_values(&values, self.of.dtype)?.as_primitive::<Int64Type>().values());
        self.digest.end(end);
        Ok(())
    }

    /// The column of a record batch whose documents have `offsets`.
    pub(super) fn take(&mut self, offsets: &OffsetBuffer<i32>) -> Result<ArrayRef> {
        let bytes = std::mem::take(&mut self.bytes);
        let values = if self.of.item == DataType::Boolean {
            Arc::new(BooleanArray::from_iter(bytes.into_iter().map(|value| Some(value == 1)))) as ArrayRef
        } else {
            let len = bytes.len() / self.of.dtype.size();
            let data = new_empty_array(&self.of.item).to_data().into_builder();
            make_array(data.len(len).buffers(vec![Buffer::from_vec(bytes)]).build().map_err(unsound)?)
        };
        Ok(Arc::new(ListArray::new(Arc::new(self.of.item_field()), offsets.clone(), values, None)))
    }
}
