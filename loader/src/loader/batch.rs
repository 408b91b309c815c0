//! A batch: the arrays of some rows, in one buffer.

use std::any::Any;
use std::sync::Arc;

use super::boundaries::{Span, write_places};
use super::documents::DocumentValues;
use super::served::RowFacts;
use super::substitution::Substitution;
use crate::buffer::{ALIGNMENT, Lease};
use crate::corpus::schema::{Schema, SchemaField, TokenSide};
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
    /// Length of each axis. The first axis is the rows. Axes from `ndim` on have the length 1.
    pub shape: [usize; 4],
    /// Number of axes: 1, 2 or 4.
    pub ndim: usize,
    /// The memory that holds the array.
    pub memory: FieldMemory,
}

/// The memory of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldMemory {
    /// The buffer of the batch.
    Buffer,
    /// The memory of the values of documents. Their number differs from batch to batch.
    Documents,
}

impl Field {
    /// Number of values of a row.
    pub fn row_len(&self) -> usize {
        self.shape[1..].iter().product()
    }
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
    /// Arrays of the batch.
    pub fields: Arc<[Field]>,
    /// Hash of its rows. `None` unless [`Loader::cover`](super::Loader::cover) or the setting
    /// `delivery_log` asks for it.
    pub checksum: Option<Checksum>,
    /// Number of tokens that the batch delivers. If documents are joined, number of its places.
    pub tokens: u64,
    /// The array `cu_seqlens` of each consumer's rows. `None` if boundaries are not asked for.
    pub borders: Option<Vec<Borders>>,
    /// The per-document columns. `None` if the corpus has none.
    pub documents: Option<DocumentValues>,
    /// Facts about the rows, if the loader keeps them for a service.
    pub(super) facts: Option<Box<RowFacts>>,
    /// Rows that stand in the place of rows that cannot be read.
    pub substitutions: Vec<Substitution>,
    pub(super) lease: Lease,
}

impl Batch {
    /// First byte of array `field`, which must be one of this batch.
    pub fn start_of(&self, field: &Field) -> *mut u8 {
        let lease = match (field.memory, &self.documents) {
            (FieldMemory::Documents, Some(documents)) => documents.lease(),
            _ => &self.lease,
        };
        assert!(field.offset_bytes + field.shape[0] * field.shape[1] * field.dtype.size() <= lease.len());
        lease.as_ptr().wrapping_add(field.offset_bytes)
    }

    /// First byte of the buffer. The holder may write to it: the loader never reads it again.
    pub fn as_ptr(&self) -> *mut u8 {
        self.lease.as_ptr()
    }

    /// The owner of the buffer, if the caller submitted it.
    pub fn owner(&self) -> Option<&(dyn Any + Send + Sync)> {
        self.lease.caller()
    }

    /// Number of places of a row.
    pub fn columns(&self) -> usize {
        self.fields[0].shape[1]
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

    pub(super) fn row_of(&self, field: &Field, row: usize) -> Vec<i64> {
        assert!(row < field.shape[0], "row {row} of {}", field.shape[0]);
        let size = field.row_len() * field.dtype.size();
        // SAFETY: the lease's bytes are initialised, and the field lies inside them. After
        // delivery, only the holder of the batch writes to them.
        let bytes = unsafe { std::slice::from_raw_parts(self.start_of(field).add(row * size), size) };
        let values = crate::tokens::Tokens::new(field.dtype, bytes);
        (0..values.len()).map(|index| values.get(index)).collect()
    }
}

impl Batch {
    /// Values of `field` in row `row`, at the places of the tokens of `spans`.
    pub(super) fn field_values(&self, field: &SchemaField, row: usize, spans: &[Span]) -> Vec<i64> {
        let is_shifted = self.fields[1].name == "y";
        let name = if is_shifted && field.name == "labels" { "y" } else { field.name };
        let array = self.fields.iter().find(|array| array.name == name).expect("the batch has every field");
        let lead = usize::from(is_shifted && field.side == TokenSide::Target);
        let values = self.row_of(array, row);
        let of_span = |span: &Span| {
            let [start, end] =
                [span.start, span.start + span.tokens].map(|place| (place as usize).saturating_sub(lead));
            &values[start.min(values.len())..end.min(values.len())]
        };
        spans.iter().flat_map(of_span).copied().collect()
    }

    /// The tokens of `spans` that row `row` was made of, as they lie in the delivered arrays. Where
    /// labels are a column of the corpus, these are the inputs alone. Fails where other arrays of
    /// the row do not belong to the tokens.
    pub(super) fn tokens(
        &self,
        row: usize,
        spans: &[Span],
        found: ColumnsFound,
        ignore_index: i64,
    ) -> Result<Vec<i64>> {
        let [inputs, targets] = [&self.fields[0], &self.fields[1]].map(|field| self.row_of(field, row));
        let lead = usize::from(self.fields[1].name == "y");
        let masks = self.borders.is_some();
        let mut tokens = Vec::with_capacity(inputs.len() + lead);
        let mut fits = true;
        for span in spans.iter().filter(|span| span.tokens > 0) {
            let (start, end) = (span.start as usize, (span.start + span.tokens) as usize);
            let first = tokens.len();
            tokens.extend_from_slice(&inputs[start.min(inputs.len())..end.min(inputs.len())]);
            if found.labels {
                continue;
            }
            // Only the last target has no input at its place.
            tokens.extend(targets.last().filter(|_| end > inputs.len()));
            let mut from = start.max(lead);
            if masks && start >= lead {
                fits &= targets[start - lead] == ignore_index;
                from = start + 1;
            }
            fits &= targets.get(from - lead..end - lead) == tokens.get(first + from - start..);
        }
        if masks {
            let places = inputs.len();
            let (mut positions, mut documents) = (vec![0; places], vec![0; places]);
            write_places(spans, Some(&mut positions), &mut documents);
            let documents: Vec<i64> = documents.into_iter().map(i64::from).collect();
            fits &= found.positions || positions == self.row("position_ids", row);
            fits &= documents == self.row("doc_ids", row);
        }
        if !fits {
            return Err(Error::new(ErrorKind::Internal, format!("targets of row {row} do not belong to its inputs")));
        }
        Ok(tokens)
    }
}

/// The arrays of a row that are columns of its corpus, and else follow from its documents.
#[derive(Clone, Copy, Debug)]
pub(super) struct ColumnsFound {
    pub(super) labels: bool,
    pub(super) positions: bool,
}

/// The place of `cu_seqlens` in a batch's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Borders {
    /// Offset of its first byte in the buffer.
    pub offset_bytes: usize,
    /// Number of its values.
    pub len: usize,
    /// Largest distance between two borders.
    pub longest: u64,
}

impl Borders {
    /// The array as a field of a batch.
    pub(crate) fn field(&self) -> Field {
        let Self { offset_bytes, len, .. } = *self;
        let (dtype, memory) = (Dtype::I32, FieldMemory::Buffer);
        Field { name: "cu_seqlens", dtype, offset_bytes, shape: [len, 1, 1, 1], ndim: 1, memory }
    }
}

/// Offsets of the arrays of boundaries in a batch's buffer, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct BoundariesAt {
    /// Offset of `position_ids`. `None` if they are a column of the corpus.
    pub(super) positions: Option<usize>,
    pub(super) documents: usize,
    pub(super) cu_seqlens: usize,
    /// Offset of `document_mask`. `None` if it is not asked for.
    pub(super) mask: Option<usize>,
    /// Fixed length of `cu_seqlens`. `None` if it has as many values as borders.
    pub(super) width: Option<usize>,
}

/// The division of a batch's buffer among its arrays.
#[derive(Clone, Debug)]
pub(super) struct BatchLayout {
    pub(super) rows: usize,
    /// Number of places of a row.
    pub(super) columns: usize,
    pub(super) fields: Arc<[Field]>,
    pub(super) input_dtype: Dtype,
    /// Offset of the labels or `y`, in bytes.
    pub(super) targets_at: usize,
    /// Offset of each field of the schema, in bytes.
    pub(super) fields_at: Vec<usize>,
    /// Offsets of each row's source and sequence, in bytes. `None` if they are not asked for.
    pub(super) ids_at: Option<[usize; 2]>,
    /// Offsets of the arrays of boundaries. `None` if they are not asked for.
    pub(super) boundaries: Option<BoundariesAt>,
    pub(super) bytes: usize,
}

impl BatchLayout {
    pub(super) fn new(config: &Config, schema: &Schema, rows: usize, columns: usize) -> Self {
        let input_dtype = config.input_dtype;
        let (inputs, targets) = if config.targets == Targets::Shifted { ("x", "y") } else { ("input_ids", "labels") };
        let targets_at = (rows * columns * input_dtype.size()).next_multiple_of(ALIGNMENT);
        let memory = FieldMemory::Buffer;
        let field = |name, dtype, offset_bytes| Field {
            name,
            dtype,
            offset_bytes,
            shape: [rows, columns, 1, 1],
            ndim: 2,
            memory,
        };
        let mut fields = vec![field(inputs, input_dtype, 0), field(targets, Dtype::I64, targets_at)];
        let mut bytes = targets_at + rows * columns * 8;
        let mut fields_at = Vec::with_capacity(schema.fields.len());
        for SchemaField { name, dtype, .. } in &schema.fields {
            if *name == "labels" {
                fields_at.push(targets_at);
                continue;
            }
            bytes = bytes.next_multiple_of(ALIGNMENT);
            fields_at.push(bytes);
            fields.push(field(*name, *dtype, bytes));
            bytes += rows * columns * dtype.size();
        }
        let boundaries = config.has_boundaries().then(|| {
            let derives = schema.fields.iter().all(|field| field.name != "position_ids");
            let positions = derives.then(|| bytes.next_multiple_of(ALIGNMENT));
            let end = positions.map_or(bytes, |at| at + rows * columns * 8);
            let documents = end.next_multiple_of(ALIGNMENT);
            let cu_seqlens = (documents + rows * columns * 4).next_multiple_of(ALIGNMENT);
            // A batch has one array per consumer, at most one for each row.
            let width = config.cu_seqlens_width.map(|width| width as usize);
            bytes = (cu_seqlens + rows * width.unwrap_or(columns + 1) * 4).next_multiple_of(ALIGNMENT);
            fields.extend(positions.map(|at| field("position_ids", Dtype::I64, at)));
            fields.push(field("doc_ids", Dtype::I32, documents));
            let mask = config.document_mask.then_some(bytes);
            if let Some(at) = mask {
                let shape = [rows, 1, columns, columns];
                fields.push(Field {
                    name: "document_mask",
                    dtype: Dtype::Bool,
                    offset_bytes: at,
                    shape,
                    ndim: 4,
                    memory,
                });
                bytes = (at + rows * columns * columns).next_multiple_of(ALIGNMENT);
            }
            BoundariesAt { positions, documents, cu_seqlens, mask, width }
        });
        bytes = bytes.next_multiple_of(8);
        let ids_at = config.sample_ids.then_some([bytes, bytes + rows * 8]);
        for (name, offset_bytes) in ["source", "sample_index"].into_iter().zip(ids_at.into_iter().flatten()) {
            fields.push(Field { name, dtype: Dtype::I64, offset_bytes, shape: [rows, 1, 1, 1], ndim: 1, memory });
            bytes += rows * 8;
        }
        Self { rows, columns, fields: fields.into(), input_dtype, targets_at, fields_at, ids_at, boundaries, bytes }
    }
}
