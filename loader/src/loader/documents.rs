//! The values of per-document columns in a batch.
//!
//! A batch has one value for each stretch in `cu_seqlens`, in the same order. A stretch without
//! tokens has a null. Numbers lie in arrays of their own memory, beside an array that tells which
//! values are null. Strings are kept one by one.

use super::boundaries::{Span, Spans};
use super::sources::{CorpusSources, RowReads};
use crate::buffer::{ALIGNMENT, Lease};
use crate::corpus::schema::DocumentField;
use crate::error::Result;
use crate::loader::batch::{Batch, Field, FieldMemory};
use crate::proof::checksum::{number_hash, text_hash};
use crate::read::{DocumentRef, Reader};
use crate::tokens::{DocumentType, Dtype};

/// The documents of the spans of a batch. The memory is reused from batch to batch.
#[derive(Debug, Default)]
pub(super) struct SpanDocuments {
    list: Vec<Option<DocumentRef>>,
    /// Number of spans up to the end of each row.
    row_ends: Vec<usize>,
}

impl SpanDocuments {
    /// Removes all rows.
    pub(super) fn clear(&mut self) {
        self.list.clear();
        self.row_ends.clear();
    }

    /// Adds a row of `spans`. `noted` gives the documents at the first places of its segments.
    /// Without a `reader`, the row is padding.
    pub(super) fn push_row(&mut self, reader: Option<&Reader>, spans: &[Span], noted: &[(u64, DocumentRef)]) {
        let mut last: Option<DocumentRef> = None;
        for span in spans {
            let document = reader.filter(|_| span.tokens > 0).and_then(|reader| {
                let begins = noted.iter().find(|(place, _)| *place == u64::from(span.start));
                begins.map(|(_, document)| *document).or_else(|| last.map(|last| reader.document_after(last)))
            });
            last = document.or(last);
            self.list.push(document);
        }
        self.row_ends.push(self.list.len());
    }

    fn row(&self, row: usize) -> &[Option<DocumentRef>] {
        let start = if row == 0 { 0 } else { self.row_ends[row - 1] };
        &self.list[start..self.row_ends[row]]
    }
}

/// A string, or null.
pub type Text = Option<Box<str>>;

/// The values of the per-document columns of a batch.
#[derive(Debug)]
pub struct DocumentValues {
    lease: Lease,
    parts: Vec<DocumentPart>,
    /// For each row, the number of its first stretch among those of its consumer.
    first_stretches: Vec<usize>,
}

/// The values for the rows of one consumer.
#[derive(Debug, Default)]
struct DocumentPart {
    fields: Vec<Field>,
    texts: Vec<(&'static str, Vec<Text>)>,
}

impl DocumentValues {
    /// The memory of the arrays.
    pub(super) fn lease(&self) -> &Lease {
        &self.lease
    }

    /// The arrays of consumer `part`.
    pub fn fields(&self, part: usize) -> &[Field] {
        &self.parts[part].fields
    }

    /// The columns of strings of consumer `part`, each with its name.
    pub fn texts(&self, part: usize) -> &[(&'static str, Vec<Text>)] {
        &self.parts[part].texts
    }

    /// Hashes of the values of `field` in row `row` of `batch`: one for each token of `spans` at a
    /// place below `columns`. The rows of a consumer are `of_part`.
    pub(super) fn hashes(
        &self,
        batch: &Batch,
        field: &DocumentField,
        (row, of_part): (usize, usize),
        spans: &[Span],
        columns: usize,
    ) -> Vec<i64> {
        let part = &self.parts[row / of_part];
        let mut hashes = Vec::new();
        for (stretch, span) in (self.first_stretches[row]..).zip(spans).filter(|(_, span)| span.tokens > 0) {
            let (start, end) = (span.start as usize, (span.start + span.tokens) as usize);
            // The last target of a row has no input, and no stretch of its own.
            if start >= batch.columns() {
                continue;
            }
            let hash = match field.kind {
                DocumentType::Text => {
                    let (_, texts) = part.texts.iter().find(|(name, _)| *name == field.name).expect("every field");
                    text_hash(texts[stretch].as_deref())
                }
                DocumentType::Number(_) => {
                    let value = |name| {
                        let array = part.fields.iter().find(|array| array.name == name).expect("every field");
                        batch.row_of(array, stretch)[0]
                    };
                    number_hash((value(field.null_name) == 0).then(|| value(field.name)))
                }
            };
            hashes.resize(hashes.len() + end.min(columns) - start, hash);
        }
        hashes
    }
}

/// The rows of a batch, for the values of their documents.
#[derive(Clone, Copy, Debug)]
pub(super) struct DocumentRows<'a> {
    pub(super) sources: &'a CorpusSources,
    pub(super) reads: &'a RowReads,
    pub(super) spans: &'a Spans,
    pub(super) documents: &'a SpanDocuments,
    /// Number of inputs of a row.
    pub(super) columns: usize,
    /// Number of values for each consumer, if it is fixed.
    pub(super) stretches: Option<usize>,
}

impl DocumentRows<'_> {
    /// Reads the values of `fields`. The rows of each of `parts` consumers follow each other.
    pub(super) fn read(&self, fields: &[DocumentField], parts: usize) -> Result<DocumentValues> {
        let rows = self.reads.rows.len();
        let of_part = rows / parts;
        let counts: Vec<usize> = (0..rows).map(|row| self.stretches_of(row).count()).collect();
        let mut values = DocumentValues::new(fields, parts, &counts, self.stretches);
        for part in 0..parts {
            for field in fields {
                for row in part * of_part..(part + 1) * of_part {
                    self.read_row(&mut values, part, field, row)?;
                }
            }
        }
        Ok(values)
    }

    /// The spans of row `row` that `cu_seqlens` has, each with its document.
    fn stretches_of(&self, row: usize) -> impl Iterator<Item = (&Span, &Option<DocumentRef>)> {
        let all = self.spans.row(row).iter().zip(self.documents.row(row));
        all.filter(|(span, _)| (span.start as usize) < self.columns)
    }

    /// Reads the values of `field` for row `row` of consumer `part`.
    fn read_row(&self, values: &mut DocumentValues, part: usize, field: &DocumentField, row: usize) -> Result<()> {
        let Some(read) = &self.reads.rows[row] else { return Ok(()) };
        let reader = self.sources.list()[read.source].reader();
        for (stretch, (span, document)) in (values.first_stretches[row]..).zip(self.stretches_of(row)) {
            let Some(document) = document else { continue };
            let tokens = u64::from(span.tokens);
            reader.document_value(field.column, *document, tokens, |value| values.set(part, field, stretch, value))?;
        }
        Ok(())
    }
}

impl DocumentValues {
    /// Makes memory for the values of `fields` in rows with `counts` stretches, dealt out to
    /// `parts` consumers. All values are null. A consumer has `fixed` values of each field, if that
    /// is given.
    pub(super) fn new(fields: &[DocumentField], parts: usize, counts: &[usize], fixed: Option<usize>) -> Self {
        let of_part = counts.len() / parts;
        let mut first_stretches = Vec::with_capacity(counts.len());
        let mut bytes = 0;
        let mut all = Vec::with_capacity(parts);
        for counts in counts.chunks(of_part.max(1)) {
            let mut total = 0;
            for count in counts {
                first_stretches.push(total);
                total += count;
            }
            let total = fixed.unwrap_or(total);
            let mut part = DocumentPart::default();
            for field in fields {
                let DocumentType::Number(dtype) = field.kind else {
                    part.texts.push((field.name, vec![None; total]));
                    continue;
                };
                for (name, dtype) in [(field.name, dtype), (field.null_name, Dtype::Bool)] {
                    let (shape, memory) = ([total, 1, 1, 1], FieldMemory::Documents);
                    part.fields.push(Field { name, dtype, offset_bytes: bytes, shape, ndim: 1, memory });
                    bytes = (bytes + total * dtype.size()).next_multiple_of(ALIGNMENT);
                }
            }
            all.push(part);
        }
        let mut values = Self { lease: Lease::alone(bytes.max(ALIGNMENT)), parts: all, first_stretches };
        for part in 0..parts {
            for field in fields {
                values.clear(part, field);
            }
        }
        values
    }

    /// Sets the value of `field` for stretch `stretch` of row `row`. A consumer has `of_part` rows.
    pub(super) fn set_in_row(
        &mut self,
        of_part: usize,
        row: usize,
        field: &DocumentField,
        stretch: usize,
        value: Option<&[u8]>,
    ) {
        self.set(row / of_part, field, self.first_stretches[row] + stretch, value);
    }

    /// The values of `field` for the first `stretches` stretches of row `row`. `None` is null.
    pub(super) fn of_row(
        &self,
        of_part: usize,
        row: usize,
        field: &DocumentField,
        stretches: usize,
    ) -> Vec<Option<Vec<u8>>> {
        let part = row / of_part;
        let first = self.first_stretches[row];
        if field.kind == DocumentType::Text {
            let texts = &self.parts[part].texts;
            let (_, texts) = texts.iter().find(|(name, _)| *name == field.name).expect("the part has every field");
            return texts[first..first + stretches]
                .iter()
                .map(|text| text.as_deref().map(|text| text.as_bytes().to_vec()))
                .collect();
        }
        let [array, nulls] = [field.name, field.null_name].map(|name| self.array(part, name));
        let size = array.dtype.size();
        let bytes = |at: usize, len: usize| {
            assert!(at + len <= self.lease.len());
            // SAFETY: the lease's bytes are initialised, the range is inside them as just checked,
            // and only the holder of the batch writes to them after delivery.
            unsafe { std::slice::from_raw_parts(self.lease.as_ptr().add(at), len) }
        };
        let value = |stretch: usize| {
            let is_null = bytes(nulls.offset_bytes + stretch, 1)[0] != 0;
            (!is_null).then(|| bytes(array.offset_bytes + stretch * size, size).to_vec())
        };
        (first..first + stretches).map(value).collect()
    }

    fn array(&self, part: usize, name: &str) -> Field {
        *self.parts[part].fields.iter().find(|array| array.name == name).expect("the part has every field")
    }

    /// Makes all values of `field` null.
    fn clear(&mut self, part: usize, field: &DocumentField) {
        if field.kind == DocumentType::Text {
            return;
        }
        let [array, nulls] = [field.name, field.null_name].map(|name| self.array(part, name));
        self.lease.bytes(array.offset_bytes, array.shape[0] * array.dtype.size()).fill(0);
        self.lease.bytes(nulls.offset_bytes, nulls.shape[0]).fill(1);
    }

    /// Sets the value of `field` for stretch `stretch`.
    fn set(&mut self, part: usize, field: &DocumentField, stretch: usize, value: Option<&[u8]>) {
        let Some(value) = value else { return };
        if field.kind == DocumentType::Text {
            let texts = &mut self.parts[part].texts;
            let (_, texts) = texts.iter_mut().find(|(name, _)| *name == field.name).expect("the part has every field");
            texts[stretch] = Some(String::from_utf8_lossy(value).into());
            return;
        }
        let [array, nulls] = [field.name, field.null_name].map(|name| self.array(part, name));
        // Only numbers without a sign are delivered in a wider type.
        self.lease.bytes(array.offset_bytes + stretch * array.dtype.size(), value.len()).copy_from_slice(value);
        self.lease.bytes(nulls.offset_bytes + stretch, 1).fill(0);
    }
}
