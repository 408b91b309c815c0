//! The starts of documents inside the rows of files that were packed before.
//!
//! Takes a column that says where documents begin (the setting `packed_by`). Gives the starts in
//! any stretch of a row. The column of a shard is read whole at its first use. Its starts are kept
//! while they fit a share of `memory_budget`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::lengths::DocumentLengths;
use crate::corpus::{Corpus, OpenShard};
use crate::error::{Error, Result};
use crate::format::{DecodedBlock, Ends, EndsScratch, Shard};
use crate::layout::Segment;
use crate::settings::PackedBy;
use crate::sync::lock;
use crate::tokens::{DtypeKind, Tokens};

/// The starts of documents in the rows of a corpus.
#[derive(Debug)]
pub(crate) struct PackedBorders {
    corpus: Arc<Corpus>,
    by: PackedBy,
    /// Shards with their starts, the oldest first.
    kept: Mutex<VecDeque<(usize, Arc<Starts>)>>,
    /// Most bytes that are kept. One shard is kept in any case.
    budget_bytes: u64,
}

/// The starts of documents in the rows of one shard.
#[derive(Debug, Default)]
struct Starts {
    /// Place of each row in the stream of the shard, and last the end of the stream.
    rows: Vec<u64>,
    /// Number of starts before each row, and last the number of all starts.
    before: Vec<u64>,
    /// Places in their row where documents begin. The first document of a row is left out.
    places: Vec<u32>,
}

impl PackedBorders {
    pub(crate) fn new(corpus: Arc<Corpus>, by: PackedBy, budget_bytes: u64) -> Self {
        Self { corpus, by, kept: Mutex::default(), budget_bytes }
    }

    /// Adds the places where documents begin inside `segment`, which lies at `within` of its
    /// shard's stream and belongs to row `row` of the shard. The start of the segment is left out.
    pub(crate) fn add(
        &self,
        lengths: &DocumentLengths,
        (shard, within): (usize, u64),
        row: u64,
        segment: &Segment,
        found: &mut Vec<u64>,
    ) -> Result<()> {
        let starts = self.of_shard(shard, lengths)?;
        let row = row as usize;
        let offset = within - starts.rows[row];
        let places = &starts.places[starts.before[row] as usize..starts.before[row + 1] as usize];
        let inside = places.iter().map(|place| u64::from(*place));
        let inside = inside.filter(|place| *place > offset && *place < offset + segment.len);
        found.extend(inside.map(|place| segment.place + place - offset));
        Ok(())
    }

    fn of_shard(&self, shard: usize, lengths: &DocumentLengths) -> Result<Arc<Starts>> {
        if let Some((_, starts)) = lock(&self.kept).iter().find(|(number, _)| *number == shard) {
            return Ok(Arc::clone(starts));
        }
        // Two workers may read the same shard at once. They find the same.
        let opened = self.corpus.shard(shard)?;
        let lengths = lengths.of_shard(shard)?;
        let starts = self.read(&opened, &lengths).map_err(|error| error.at(opened.shard().path()))?;
        let starts = Arc::new(starts);
        let mut kept = lock(&self.kept);
        kept.push_back((shard, Arc::clone(&starts)));
        while kept.len() > 1 && kept.iter().map(|(_, starts)| starts.bytes()).sum::<u64>() > self.budget_bytes {
            kept.pop_front();
        }
        Ok(starts)
    }

    fn read(&self, opened: &OpenShard, lengths: &[u32]) -> Result<Starts> {
        let mut starts = Starts::default();
        let (mut place, mut row) = (0, 0);
        let Some(column) = opened.borders() else { return Ok(starts) };
        each_row(column, |values| {
            let length = *lengths.get(row).ok_or_else(|| self.other_rows(lengths.len()))?;
            starts.rows.push(place);
            starts.before.push(starts.places.len() as u64);
            let fits = match self.by {
                PackedBy::None => false,
                PackedBy::SeqLengths => add_lengths(values, length, &mut starts.places),
                PackedBy::SeqStartId => add_starts(values, length, &mut starts.places),
                PackedBy::PositionIds => add_positions(values, length, &mut starts.places),
            };
            if !fits {
                return Err(self.misfit(values, length, row));
            }
            place += u64::from(length);
            row += 1;
            Ok(())
        })?;
        if row < lengths.len() {
            return Err(self.other_rows(lengths.len()));
        }
        starts.rows.push(place);
        starts.before.push(starts.places.len() as u64);
        Ok(starts)
    }

    fn other_rows(&self, rows: usize) -> Error {
        Error::data(format!("column `{}` must have a list for each of the {rows} rows with tokens", self.by.name()))
    }

    fn misfit(&self, values: &[i64], length: u32, row: usize) -> Error {
        let rule = match self.by {
            PackedBy::None | PackedBy::PositionIds => "a position for each token",
            PackedBy::SeqLengths => "lengths that add up to the length of the row",
            PackedBy::SeqStartId => "rising starts inside the row, the first of them 0",
        };
        let shown: Vec<String> = values.iter().take(8).map(i64::to_string).collect();
        let more = if values.len() > shown.len() { ", ..." } else { "" };
        Error::data(format!(
            "column `{}` must have {rule}: non-empty row {row} has {length} tokens, found [{}{more}]",
            self.by.name(),
            shown.join(", ")
        ))
    }
}

impl Starts {
    fn bytes(&self) -> u64 {
        (size_of_val(self.rows.as_slice()) + size_of_val(self.before.as_slice()) + size_of_val(self.places.as_slice()))
            as u64
    }
}

/// Adds the starts of documents with these lengths. Returns whether they fill the row.
fn add_lengths(values: &[i64], length: u32, places: &mut Vec<u32>) -> bool {
    let mut sum = 0i64;
    for value in values {
        if *value > 0 && sum > 0 {
            places.push(sum as u32);
        }
        if *value < 0 || *value > i64::from(length) - sum {
            return false;
        }
        sum += value;
    }
    sum == i64::from(length)
}

/// Adds starts that are listed. The end of the row may stand after the last one.
fn add_starts(values: &[i64], length: u32, places: &mut Vec<u32>) -> bool {
    let length = i64::from(length);
    let rise = values.windows(2).all(|pair| pair[0] <= pair[1]);
    let fits = rise && values.first() == Some(&0) && values.last().is_some_and(|last| *last <= length);
    if fits {
        let mut before = 0;
        for value in values.iter().filter(|value| **value < length) {
            if *value > before {
                places.push(*value as u32);
            }
            before = *value;
        }
    }
    fits
}

/// Adds the places where positions begin again at 0.
fn add_positions(values: &[i64], length: u32, places: &mut Vec<u32>) -> bool {
    places.extend((0..).zip(values).skip(1).filter(|(_, value)| **value == 0).map(|(place, _)| place));
    values.len() as u64 == u64::from(length)
}

/// Gives the values of each row of a column that has any.
fn each_row(column: &OpenShard, mut row: impl FnMut(&[i64]) -> Result<()>) -> Result<()> {
    let shard = column.shard();
    let kind = shard.info().dtype.kind();
    if !matches!(kind, DtypeKind::Signed | DtypeKind::Unsigned) {
        return Err(Error::data(format!("starts of documents must be integers, found {}", shard.info().dtype.name())));
    }
    let (mut bytes, mut scratch, mut decoded) = (Vec::new(), EndsScratch::default(), DecodedBlock::default());
    let mut values = Vec::new();
    for (index, meta) in shard.blocks().iter().enumerate() {
        let mut add = |tokens: Tokens<'_>, ends: &Ends<'_>| {
            let mut at = 0;
            for document in 0..ends.len() {
                let end = ends.get(document);
                values.extend((at..end).map(|place| tokens.get(place as usize)));
                row(&values)?;
                values.clear();
                at = end;
            }
            values.extend((at..meta.tokens).map(|place| tokens.get(place as usize)));
            Ok(())
        };
        let added = match shard {
            Shard::Random(shard) => shard.ends(index, &mut scratch).and_then(|ends| {
                column.check_ends(index, &ends)?;
                column.check_tokens(index, &(0..meta.tokens), &mut bytes)?;
                let tokens = shard.tokens(index, 0..meta.tokens, &mut bytes)?;
                add(tokens, &ends)
            }),
            Shard::Block(shard) => column
                .decode_block(index, &mut decoded)
                .and_then(|()| add(Tokens::new(shard.block_dtype(), &decoded.bytes), &decoded.document_ends())),
        };
        added.map_err(|error| error.in_block(index as u64))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A way to add the starts of a row.
    type Add = fn(&[i64], u32, &mut Vec<u32>) -> bool;

    fn found(add: Add, values: &[i64], length: u32) -> Option<Vec<u32>> {
        let mut places = Vec::new();
        add(values, length, &mut places).then_some(places)
    }

    #[test]
    fn three_columns_say_the_same_starts() {
        let lengths: Add = add_lengths;
        assert_eq!(found(lengths, &[3, 2, 4], 9), Some(vec![3, 5]));
        assert_eq!(found(add_starts, &[0, 3, 5], 9), Some(vec![3, 5]));
        assert_eq!(found(add_starts, &[0, 3, 5, 9], 9), Some(vec![3, 5]));
        assert_eq!(found(add_positions, &[0, 1, 2, 0, 1, 0, 1, 2, 3], 9), Some(vec![3, 5]));
        // Documents without a token begin nowhere.
        assert_eq!(found(lengths, &[0, 3, 0, 2, 0], 5), Some(vec![3]));
        assert_eq!(found(add_starts, &[0, 0, 3, 3], 5), Some(vec![3]));
    }

    #[test]
    fn columns_that_do_not_fit_are_refused() {
        for values in [&[3, 2][..], &[3, 2, 5], &[-1, 10], &[], &[i64::MAX, 9], &[4, i64::MAX]] {
            assert_eq!(found(add_lengths, values, 9), None, "{values:?}");
        }
        for values in [&[1, 3][..], &[0, 5, 3], &[0, 10], &[], &[-1, 0]] {
            assert_eq!(found(add_starts, values, 9), None, "{values:?}");
        }
        assert_eq!(found(add_positions, &[0, 1], 9), None);
    }
}
