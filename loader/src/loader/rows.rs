//! Finds the rows of a batch: the positions that a rank gets at a step, and the segments of each
//! row.

use super::session::Session;
use super::sources::{Growth, Orders, RowReads};
use crate::error::Result;
use crate::order::epochs::EpochChain;
use crate::order::partition::{BatchRow, Grouping};
use crate::read::Scratch;
use crate::settings::Remainder;

/// A row of a batch, by its position.
#[derive(Clone, Copy, Debug)]
pub(super) enum PositionedRow {
    Position {
        epoch: u64,
        position: u64,
        /// Whether the row was delivered before and only fills the last batch.
        repeated: bool,
    },
    Padding,
}

/// Returns the rows of one rank in the global batch at index `start` of `epochs`.
///
/// The first value is the epoch and position of the batch's first row.
pub(super) fn batch_rows(grouping: Grouping, epochs: &EpochChain, start: u64) -> ((u64, u64), Vec<PositionedRow>) {
    let mut rows = Vec::new();
    let first = batch_rows_into(grouping, epochs, start, &mut rows);
    (first, rows)
}

/// Works like [`batch_rows`], and overwrites `rows`.
pub(super) fn batch_rows_into(
    grouping: Grouping,
    epochs: &EpochChain,
    start: u64,
    rows: &mut Vec<PositionedRow>,
) -> (u64, u64) {
    let end = epochs.len().unwrap_or(u64::MAX);
    let at = |index, repeated| {
        let (epoch, position) = epochs.at(index);
        PositionedRow::Position { epoch, position, repeated }
    };
    let row = |row| match row {
        BatchRow::Index(index) => at(index, false),
        BatchRow::Repeated(index) => at(index, true),
        BatchRow::Padding => PositionedRow::Padding,
    };
    rows.clear();
    rows.reserve(grouping.batch_size as usize);
    rows.extend(grouping.rows(start, end, epochs.last_epoch()).map(row));
    epochs.at(start)
}

/// Groups the rows by part. Row `i` belongs to part `i` modulo `parts`.
pub(super) fn deal(rows: &mut Vec<PositionedRow>, parts: usize) {
    if parts > 1 {
        *rows = (0..parts).flat_map(|part| rows.iter().skip(part).step_by(parts).copied()).collect();
    }
}

impl Session {
    /// Overwrites `reads` with the reads of `rows`. A row of padding reads nothing.
    pub(super) fn reads_into(
        &self,
        growth: &Growth,
        rows: &[PositionedRow],
        orders: &mut Orders,
        scratch: &mut Scratch,
        reads: &mut RowReads,
    ) -> Result<()> {
        let sources = &self.opened.sources;
        let wrap_to = (self.grouping.remainder == Remainder::Wrap).then(|| self.config.row_tokens());
        reads.clear_for(rows.len());
        for row in rows {
            match *row {
                PositionedRow::Position { epoch, position, repeated } => {
                    let mut read = sources.row_read(growth, orders, (epoch, position), scratch)?;
                    read.repeated = repeated;
                    sources.add_row(read, wrap_to, scratch, reads)?;
                }
                PositionedRow::Padding => reads.rows.push(None),
            }
        }
        Ok(())
    }
}
