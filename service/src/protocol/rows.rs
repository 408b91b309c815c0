//! Record batches with the rows of a training batch.
//!
//! A record batch is a training batch, and a row of it is a row of the batch. Ids have the
//! narrowest of three widths, and further columns the type in which they are delivered. Labels that
//! are made of the tokens travel as one bit for each place.

use std::borrow::Cow;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{
    Array, ArrayRef, BooleanArray, FixedSizeListArray, ListArray, PrimitiveArray, RecordBatch, StringArray,
};
use arrow_buffer::{BooleanBuffer, Buffer, MutableBuffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_flight::{FlightData, SchemaAsIpc};
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use forebay::corpus::schema::DocumentField;
use forebay::loader::served::{Bits, DocumentColumnValues, ReceivedRows, RowFormat, RowOrigin, SentBatch, Values};
use forebay::tokens::{DocumentType, Dtype};
use forebay::{Batch, Error, ErrorKind, Result};
use serde_json::{Value, json};

/// Number of columns before the further columns: origins and ids.
const FIRST: usize = 5;

/// Calls `$body` with the Arrow type of `$dtype` as `$type`. Booleans are bytes of 0 and 1.
macro_rules! with_type {
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            Dtype::U8 | Dtype::Bool => {
                type $type = UInt8Type;
                $body
            }
            Dtype::U16 => {
                type $type = UInt16Type;
                $body
            }
            Dtype::U32 => {
                type $type = UInt32Type;
                $body
            }
            Dtype::I32 => {
                type $type = Int32Type;
                $body
            }
            Dtype::I64 => {
                type $type = Int64Type;
                $body
            }
            Dtype::I8 => {
                type $type = Int8Type;
                $body
            }
            Dtype::I16 => {
                type $type = Int16Type;
                $body
            }
            Dtype::F16 => {
                type $type = Float16Type;
                $body
            }
            Dtype::F32 => {
                type $type = Float32Type;
                $body
            }
            Dtype::F64 => {
                type $type = Float64Type;
                $body
            }
            Dtype::U64 => {
                type $type = UInt64Type;
                $body
            }
        }
    };
}

fn data_type(dtype: Dtype) -> DataType {
    with_type!(dtype, T => T::DATA_TYPE)
}

fn item(data_type: DataType, nullable: bool) -> Arc<Field> {
    Arc::new(Field::new("item", data_type, nullable))
}

fn list_type(field: &DocumentField) -> DataType {
    DataType::List(item(
        match field.kind {
            DocumentType::Number(dtype) => data_type(dtype),
            DocumentType::Text => DataType::Utf8,
        },
        true,
    ))
}

/// The schema of record batches of `format`.
pub fn schema(format: &RowFormat) -> SchemaRef {
    let fixed = |data_type, width: usize| DataType::FixedSizeList(item(data_type, false), width as i32);
    let mut fields = vec![
        Field::new("source", DataType::Int32, true),
        Field::new("sample_index", DataType::Int64, true),
        Field::new("row_tokens", DataType::Int64, false),
        Field::new("row_repeated", DataType::Boolean, false),
        Field::new("input_ids", fixed(data_type(format.ids), format.row_ids), false),
    ];
    if format.has_targets {
        fields.push(Field::new("is_target", fixed(DataType::Boolean, format.columns), false));
    }
    for field in &format.fields {
        fields.push(Field::new(field.name, fixed(data_type(field.dtype), format.columns), false));
    }
    if format.has_spans {
        let list = || DataType::List(item(DataType::UInt32, false));
        fields.extend(["span_start", "span_tokens", "span_end"].map(|name| Field::new(name, list(), false)));
    }
    fields.extend(format.documents.iter().map(|field| Field::new(field.name, list_type(field), false)));
    Arc::new(Schema::new(fields))
}

/// The first message of a stream: the schema.
pub fn schema_message(schema: &Schema) -> FlightData {
    SchemaAsIpc::new(schema, &IpcWriteOptions::default()).into()
}

/// The message with `batch`. A row is dealt out to one of `parts` consumers.
pub fn encode(
    batch: &Batch,
    parts: usize,
    format: &RowFormat,
    schema: &SchemaRef,
    ignore_index: i64,
) -> Result<FlightData> {
    let sent =
        batch.sent(parts).ok_or_else(|| Error::new(ErrorKind::Internal, "a batch lacks the facts about its rows"))?;
    let record = record(batch, &sent, format, schema, ignore_index).map_err(internal)?;
    let (_, encoded) = IpcDataGenerator::default()
        .encode(
            &record,
            &mut DictionaryTracker::new(false),
            &IpcWriteOptions::default(),
            &mut IpcWriteContext::default(),
        )
        .map_err(internal)?;
    let mut data = FlightData::from(encoded);
    let metadata = json!({ "epoch": batch.epoch, "position": batch.position, "columns": batch.columns() });
    data.app_metadata = metadata.to_string().into_bytes().into();
    Ok(data)
}

fn internal(error: ArrowError) -> Error {
    Error::new(ErrorKind::Internal, "cannot make a record batch").with_source(error)
}

fn record(
    batch: &Batch,
    sent: &SentBatch<'_>,
    format: &RowFormat,
    schema: &SchemaRef,
    ignore_index: i64,
) -> Result<RecordBatch, ArrowError> {
    let rows = batch.rows;
    let origins = sent.origins();
    let of = |row: &Option<RowOrigin>| row.unwrap_or(RowOrigin { source: 0, sequence: 0, tokens: 0, repeated: false });
    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(origins.iter().map(|row| row.map(|row| row.source as i32)).collect::<PrimitiveArray<Int32Type>>()),
        Arc::new(origins.iter().map(|row| row.map(|row| row.sequence as i64)).collect::<PrimitiveArray<Int64Type>>()),
        Arc::new(PrimitiveArray::<Int64Type>::from_iter_values(origins.iter().map(|row| of(row).tokens as i64))),
        Arc::new(BooleanArray::from_iter(origins.iter().map(|row| Some(of(row).repeated)))),
    ];
    let mut ids = MutableBuffer::from_len_zeroed(rows * format.row_ids * format.ids.size());
    sent.write_ids(format, ids.as_slice_mut());
    columns.push(fixed_list(format.ids, format.row_ids, ids.into())?);
    if format.has_targets {
        let bits = rows * format.columns;
        let mut bytes = MutableBuffer::from_len_zeroed(bits.div_ceil(8));
        sent.write_targets(format, ignore_index, bytes.as_slice_mut());
        let values = BooleanArray::new(BooleanBuffer::new(bytes.into(), 0, bits), None);
        let list =
            FixedSizeListArray::try_new(item(DataType::Boolean, false), format.columns as i32, Arc::new(values), None)?;
        columns.push(Arc::new(list));
    }
    for field in &format.fields {
        let mut bytes = MutableBuffer::from_len_zeroed(rows * format.columns * field.dtype.size());
        sent.write_field(format, field, bytes.as_slice_mut());
        columns.push(fixed_list(field.dtype, format.columns, bytes.into())?);
    }
    if format.has_spans {
        let lengths = || OffsetBuffer::from_lengths((0..rows).map(|row| sent.spans(row).count()));
        let part = |of: fn((u32, u32, u32)) -> u32| -> Result<ArrayRef, ArrowError> {
            let values = (0..rows).flat_map(|row| sent.spans(row)).map(of);
            let values = PrimitiveArray::<UInt32Type>::from_iter_values(values);
            Ok(Arc::new(ListArray::try_new(item(DataType::UInt32, false), lengths(), Arc::new(values), None)?))
        };
        columns.extend([part(|(start, ..)| start)?, part(|(_, tokens, _)| tokens)?, part(|(.., end)| end)?]);
    }
    for field in &format.documents {
        let values: Vec<_> = (0..rows).map(|row| sent.document_values(field, row)).collect();
        let lengths = OffsetBuffer::from_lengths(values.iter().map(Vec::len));
        let all = || values.iter().flatten();
        let array: ArrayRef = match field.kind {
            DocumentType::Text => {
                let texts = all().map(|text| text.as_ref().map(|text| String::from_utf8_lossy(text)));
                Arc::new(texts.collect::<StringArray>())
            }
            DocumentType::Number(dtype) => {
                let mut bytes = MutableBuffer::new(0);
                for value in all() {
                    match value {
                        Some(value) => bytes.extend_from_slice(value),
                        None => bytes.extend_zeros(dtype.size()),
                    }
                }
                let nulls = NullBuffer::from_iter(all().map(Option::is_some));
                primitive(dtype, bytes.into(), Some(nulls))
            }
        };
        let DataType::List(item) = list_type(field) else { unreachable!("the type of a list") };
        columns.push(Arc::new(ListArray::try_new(item, lengths, array, None)?));
    }
    RecordBatch::try_new(Arc::clone(schema), columns)
}

fn primitive(dtype: Dtype, bytes: Buffer, nulls: Option<NullBuffer>) -> ArrayRef {
    with_type!(dtype, T => {
        let values = ScalarBuffer::<<T as ArrowPrimitiveType>::Native>::from(bytes);
        Arc::new(PrimitiveArray::<T>::new(values, nulls))
    })
}

fn fixed_list(dtype: Dtype, width: usize, bytes: Buffer) -> Result<ArrayRef, ArrowError> {
    let values = primitive(dtype, bytes, None);
    Ok(Arc::new(FixedSizeListArray::try_new(item(data_type(dtype), false), width as i32, values, None)?))
}

/// A record batch that arrived.
#[derive(Debug)]
pub struct Received {
    batch: RecordBatch,
    start: (u64, u64),
    columns: usize,
}

impl Received {
    /// Reads the record batch of `data`, which must have `schema`.
    pub fn decode(data: &FlightData, schema: &SchemaRef) -> Result<Self> {
        let damaged = |error: ArrowError| {
            Error::new(ErrorKind::Data, "the service sent a message that is no record batch").with_source(error)
        };
        let message = arrow_ipc::root_as_message(&data.data_header)
            .map_err(|error| damaged(ArrowError::ParseError(error.to_string())))?;
        let header = message.header_as_record_batch();
        let header = header.ok_or_else(|| damaged(ArrowError::ParseError("another kind of message".to_owned())))?;
        let body = Buffer::from(data.data_body.clone());
        let dictionaries = std::collections::HashMap::new();
        let batch = arrow_ipc::reader::read_record_batch(
            &body,
            header,
            Arc::clone(schema),
            &dictionaries,
            None,
            &message.version(),
        )
        .map_err(damaged)?;
        let metadata: Value = serde_json::from_slice(&data.app_metadata).unwrap_or(Value::Null);
        let number = |key: &str| {
            let value = metadata.get(key).and_then(Value::as_u64);
            value.ok_or_else(|| Error::data(format!("the service sent a batch without its `{key}`")))
        };
        let (start, columns) = ((number("epoch")?, number("position")?), number("columns")? as usize);
        Ok(Self { batch, start, columns })
    }

    /// Hands the rows, in `format`, to `take`.
    pub fn rows(&self, format: &RowFormat, take: &mut dyn FnMut(&ReceivedRows<'_>) -> Result<()>) -> Result<()> {
        let column = |index: usize| self.batch.column(index);
        let (sources, sequences) = (column(0).as_primitive::<Int32Type>(), column(1).as_primitive::<Int64Type>());
        let (tokens, repeated) = (column(2).as_primitive::<Int64Type>(), column(3).as_boolean());
        let origin = |row: usize| {
            sources.is_valid(row).then(|| RowOrigin {
                source: sources.value(row) as usize,
                sequence: sequences.value(row) as u64,
                tokens: tokens.value(row) as u64,
                repeated: repeated.value(row),
            })
        };
        let mut next = FIRST;
        let mut following = || {
            next += 1;
            column(next - 1)
        };
        let bits = format.has_targets.then(|| following().as_fixed_size_list().values().as_boolean().values());
        let is_target = bits.map(|bits| Bits { bytes: bits.values(), offset: bits.offset(), width: format.columns });
        let fields = format.fields.iter().map(|field| values(following(), field.dtype, format.columns)).collect();
        let mut spans = Vec::new();
        if format.has_spans {
            let parts = [following(), following(), following()].map(|list| list.as_list::<i32>());
            for row in 0..self.batch.num_rows() {
                let lists = parts.map(|list| list.value(row));
                let [starts, tokens, ends] = lists.each_ref().map(|list| list.as_primitive::<UInt32Type>().values());
                let ends = tokens.iter().zip(ends.iter());
                spans.push(starts.iter().zip(ends).map(|(start, (tokens, end))| (*start, *tokens, *end)).collect());
            }
        }
        let documents = format.documents.iter().map(|field| document_values(following(), field)).collect();
        let rows = ReceivedRows {
            start: self.start,
            columns: self.columns,
            origins: (0..self.batch.num_rows()).map(origin).collect(),
            ids: values(column(FIRST - 1), format.ids, format.row_ids),
            is_target,
            fields,
            spans,
            documents,
        };
        take(&rows)
    }
}

fn values(array: &ArrayRef, dtype: Dtype, width: usize) -> Values<'_> {
    let list = array.as_fixed_size_list().values();
    let bytes = with_type!(dtype, T => bytes_of(list.as_primitive::<T>()));
    Values { dtype, bytes, width }
}

fn bytes_of<T: ArrowPrimitiveType>(array: &PrimitiveArray<T>) -> &[u8] {
    array.values().inner().as_slice()
}

fn document_values<'a>(array: &ArrayRef, field: &DocumentField) -> DocumentColumnValues<'a> {
    let list = array.as_list::<i32>();
    let of_row = |row: usize| -> Vec<Option<Cow<'a, [u8]>>> {
        let values = list.value(row);
        let owned = |bytes: &[u8]| Cow::Owned(bytes.to_vec());
        match field.kind {
            DocumentType::Text => {
                let texts = values.as_string::<i32>();
                texts.iter().map(|text| text.map(|text| owned(text.as_bytes()))).collect()
            }
            DocumentType::Number(dtype) => {
                let size = dtype.size();
                let bytes = with_type!(dtype, T => bytes_of(values.as_primitive::<T>()));
                let value = |at: usize| values.is_valid(at).then(|| owned(&bytes[at * size..(at + 1) * size]));
                (0..values.len()).map(value).collect()
            }
        }
    };
    DocumentColumnValues { rows: (0..list.len()).map(of_row).collect() }
}
