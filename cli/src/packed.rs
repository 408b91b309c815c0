//! Reads by arrow-rs where documents begin in rows that were packed before.

use std::collections::VecDeque;
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, ArrayRef};
use arrow_schema::DataType;
use forebay::settings::PackedBy;
use forebay::storage::Files;
use forebay::tokens::Dtype;
use forebay::{Error, Result};

use crate::sequential::{each_column, field_values};

/// The places where documents begin in each row of the file at `path` that has tokens. Empty if
/// rows are documents.
pub(crate) fn starts(files: &Files, path: &Path, by: PackedBy) -> Result<VecDeque<Vec<usize>>> {
    let mut found = VecDeque::new();
    if by == PackedBy::None {
        return Ok(found);
    }
    each_column(files, path, by.name(), &mut |column| {
        for row in 0..column.len() {
            let list = list_of(column, row)?;
            let values = field_values(&list, Dtype::I64)?;
            let values = values.as_primitive::<Int64Type>().values();
            if !values.is_empty() {
                found.push_back(places(values, by));
            }
        }
        Ok(())
    })?;
    Ok(found)
}

/// The list in row `row` of `column`.
fn list_of(column: &ArrayRef, row: usize) -> Result<ArrayRef> {
    match column.data_type() {
        DataType::List(_) => Ok(column.as_list::<i32>().value(row)),
        DataType::LargeList(_) => Ok(column.as_list::<i64>().value(row)),
        DataType::FixedSizeList(..) => Ok(column.as_fixed_size_list().value(row)),
        other => Err(Error::data(format!("a column of starts has type {other}"))),
    }
}

fn places(values: &[i64], by: PackedBy) -> Vec<usize> {
    let mut end = 0;
    match by {
        PackedBy::None => Vec::new(),
        PackedBy::SeqLengths => {
            let mut start_of = |length: &i64| {
                end += *length as usize;
                end - *length as usize
            };
            let starts = values.iter().filter(|length| **length > 0).map(&mut start_of);
            starts.collect()
        }
        PackedBy::SeqStartId => {
            let mut starts: Vec<usize> = values.iter().map(|value| *value as usize).collect();
            starts.dedup();
            starts
        }
        PackedBy::PositionIds => (0..values.len()).filter(|place| values[*place] == 0).collect(),
    }
}
