//! A batch: the arrays of some rows, in one buffer.

use std::any::Any;
use std::sync::Arc;

use crate::buffer::{ALIGNMENT, Lease};
pub use crate::corpus::schema::IGNORED_LABEL;
use crate::corpus::schema::{SchemaField, Side};
use crate::error::{Error, ErrorKind, Result};
use crate::proof::checksum::Checksum;
use crate::settings::{Config, Targets};
use crate::tokens::Dtype;

/// One array of a batch, inside the batch's buffer. Its rows follow each other without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name of the array in the batch.
    pub name: &'static str,
    /// Type of its values.
    pub dtype: Dtype,
    /// Offset of its first byte in the buffer.
    pub offset_bytes: usize,
    /// Rows and columns. Arrays of one column have one axis, the rows.
    pub shape: [usize; 2],
    /// Number of axes: 1 or 2.
    pub ndim: usize,
}

/// A delivered batch. Its memory belongs to its holders until the last of them drops it.
#[derive(Debug)]
pub struct Batch {
    /// Epoch of the batch.
    pub epoch: u64,
    /// Step in the epoch, from 0.
    pub step: u64,
    /// First position of its global batch.
    pub position: u64,
    /// Number of rows: `batch_size`, or fewer in a short last batch.
    pub rows: usize,
    /// Arrays in the buffer.
    pub fields: Arc<[Field]>,
    /// Hash of its rows. `None` unless [`Loader::cover`](super::Loader::cover) or the setting `delivery_log` asks for it.
    pub checksum: Option<Checksum>,
    pub(super) lease: Lease,
}

impl Batch {
    /// First byte of the buffer. The holder may write to it: the loader never reads it again.
    pub fn as_ptr(&self) -> *mut u8 {
        self.lease.as_ptr()
    }

    /// The owner of the buffer, if the caller submitted it.
    pub fn owner(&self) -> Option<&(dyn Any + Send + Sync)> {
        self.lease.caller()
    }

    /// Size of the buffer, in bytes.
    pub fn len_bytes(&self) -> usize {
        self.lease.len()
    }

    /// Values of row `row` of field `name`, as 64-bit integers. Floating-point numbers appear as
    /// their bits.
    ///
    /// # Panics
    /// Panics if there is no such field or row.
    pub fn row(&self, name: &str, row: usize) -> Vec<i64> {
        let field = self.fields.iter().find(|field| field.name == name).expect("a field of the batch");
        self.row_of(field, row)
    }

    fn row_of(&self, field: &Field, row: usize) -> Vec<i64> {
        assert!(row < field.shape[0], "row {row} of {}", field.shape[0]);
        let start = field.offset_bytes + row * field.shape[1] * field.dtype.size();
        // SAFETY: the lease's bytes are initialised, and the field lies inside them. After
        // delivery, only the holder of the batch writes to them.
        let bytes =
            unsafe { std::slice::from_raw_parts(self.as_ptr().add(start), field.shape[1] * field.dtype.size()) };
        let values = crate::tokens::Tokens::new(field.dtype, bytes);
        (0..values.len()).map(|index| values.get(index)).collect()
    }
}

impl Batch {
    /// The first `count` values of `field` in row `row` that belong to tokens.
    pub(super) fn field_values(&self, field: &SchemaField, row: usize, count: usize) -> Vec<i64> {
        let is_shifted = self.fields[1].name == "y";
        let name = if is_shifted && field.name == "labels" { "y" } else { field.name };
        let array = self.fields.iter().find(|array| array.name == name).expect("the batch has every field");
        let mut values = self.row_of(array, row);
        values.truncate(count.saturating_sub(usize::from(is_shifted && field.side == Side::Target)));
        values
    }

    /// The first `count` tokens that row `row` was made of, as they lie in the delivered arrays; of the inputs alone
    /// where labels are a column of the corpus.
    pub(super) fn tokens(&self, row: usize, count: usize, has_labels: bool) -> Result<Vec<i64>> {
        if has_labels {
            let mut tokens = self.row_of(&self.fields[0], row);
            tokens.truncate(count);
            return Ok(tokens);
        }
        let [inputs, targets] = [&self.fields[0], &self.fields[1]].map(|field| self.row(field.name, row));
        let shift = usize::from(self.fields[1].name == "y");
        let mut tokens = inputs;
        tokens.extend(targets.last().filter(|_| shift == 1));
        tokens.truncate(count);
        let fitting = tokens.get(shift..).unwrap_or_default();
        if targets.get(..fitting.len()) != Some(fitting) {
            return Err(Error::new(ErrorKind::Internal, format!("targets of row {row} do not belong to its inputs")));
        }
        Ok(tokens)
    }
}

/// How the arrays of a batch share its buffer.
#[derive(Clone, Debug)]
pub(super) struct BatchLayout {
    pub(super) rows: usize,
    pub(super) fields: Arc<[Field]>,
    pub(super) input_dtype: Dtype,
    /// Offset of the labels or `y`, in bytes.
    pub(super) targets_at: usize,
    /// Offset of each field of the schema, in bytes.
    pub(super) fields_at: Vec<usize>,
    /// Offsets of each row's source and sequence, in bytes. `None` if they are not asked for.
    pub(super) ids_at: Option<[usize; 2]>,
    pub(super) bytes: usize,
}

impl BatchLayout {
    pub(super) fn new(config: &Config, schema: &[SchemaField], rows: usize) -> Self {
        let columns = config.seq_len as usize;
        let input_dtype = config.input_dtype;
        let (inputs, targets) = if config.targets == Targets::Shifted { ("x", "y") } else { ("input_ids", "labels") };
        let targets_at = (rows * columns * input_dtype.size()).next_multiple_of(ALIGNMENT);
        let field = |name, dtype, offset_bytes| Field { name, dtype, offset_bytes, shape: [rows, columns], ndim: 2 };
        let mut fields = vec![field(inputs, input_dtype, 0), field(targets, Dtype::I64, targets_at)];
        let mut bytes = targets_at + rows * columns * 8;
        let mut fields_at = Vec::with_capacity(schema.len());
        for SchemaField { name, dtype, .. } in schema {
            if *name == "labels" {
                fields_at.push(targets_at);
                continue;
            }
            bytes = bytes.next_multiple_of(ALIGNMENT);
            fields_at.push(bytes);
            fields.push(field(*name, *dtype, bytes));
            bytes += rows * columns * dtype.size();
        }
        bytes = bytes.next_multiple_of(8);
        let ids_at = config.sample_ids.then_some([bytes, bytes + rows * 8]);
        for (name, offset_bytes) in ["source", "sample_index"].into_iter().zip(ids_at.into_iter().flatten()) {
            fields.push(Field { name, dtype: Dtype::I64, offset_bytes, shape: [rows, 1], ndim: 1 });
            bytes += rows * 8;
        }
        Self { rows, fields: fields.into(), input_dtype, targets_at, fields_at, ids_at, bytes }
    }
}
