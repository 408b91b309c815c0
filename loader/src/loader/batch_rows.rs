//! Finds the rows of a batch: the positions that a rank gets at a step, and the segments of each
//! row.

use super::compute::WorkerMemory;
use super::session::Session;
use super::sources::{Growth, Orders, RowReads};
use crate::error::Result;
use crate::layout::Segment;
use crate::order::balance;
use crate::order::epochs::EpochChain;
use crate::order::partition::{BatchRow, Grouping};
use crate::read::ReadMemory;
use crate::settings::{Balance, Remainder};

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

/// Overwrites `rows` with the rows of one rank in the global batch at index `start` of `epochs`, as
/// the order deals them out.
///
/// Returns the epoch and position of the batch's first row.
fn batch_rows_into(grouping: Grouping, epochs: &EpochChain, start: u64, rows: &mut Vec<PositionedRow>) -> (u64, u64) {
    let end = epochs.len().unwrap_or(u64::MAX);
    let at = |index, repeated| row_at(epochs, index, repeated);
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

fn row_at(epochs: &EpochChain, index: u64, repeated: bool) -> PositionedRow {
    let (epoch, position) = epochs.at(index);
    PositionedRow::Position { epoch, position, repeated }
}

/// Groups the rows by part. Row `i` belongs to part `i` modulo `parts`.
fn deal(rows: &mut Vec<PositionedRow>, parts: usize) {
    if parts > 1 {
        *rows = (0..parts).flat_map(|part| rows.iter().skip(part).step_by(parts).copied()).collect();
    }
}

impl Session {
    /// Overwrites `worker.rows` and `worker.reads` with the rows of one rank in the global batch at
    /// index `start` of `epochs`. The rows of each of `parts` consumers follow each other.
    ///
    /// Returns the epoch and position of the first row that the order gives to the rank. Fails if
    /// the layout needs document lengths that cannot be read.
    pub(super) fn plan_batch(
        &self,
        growth: &Growth,
        grouping: Grouping,
        epochs: &EpochChain,
        start: u64,
        parts: usize,
        worker: &mut WorkerMemory,
    ) -> Result<(u64, u64)> {
        let first = batch_rows_into(grouping, epochs, start, &mut worker.rows);
        if self.config.balance == Balance::Ranks {
            self.balance(growth, grouping, epochs, start, worker)?;
        }
        deal(&mut worker.rows, parts);
        let WorkerMemory { orders, rows, reads, scratch, .. } = worker;
        self.reads_into(growth, rows, orders, scratch, reads)?;
        Ok(first)
    }

    /// Overwrites `worker.rows` with the rows of a rank after balancing. A batch that is not full
    /// stays as it is.
    fn balance(
        &self,
        growth: &Growth,
        grouping: Grouping,
        epochs: &EpochChain,
        start: u64,
        worker: &mut WorkerMemory,
    ) -> Result<()> {
        let stride = self.opened.balance_stride(grouping);
        let ranks = grouping.world_size / stride;
        let is_full = epochs.len().is_none_or(|end| end.saturating_sub(start) >= grouping.global_batch());
        if ranks == 1 || !is_full {
            return Ok(());
        }
        // The ranks that share rows with this rank, and their rows in the order of positions.
        let among = grouping.rank / stride;
        let index = |row: u64| start + row * stride + grouping.rank % stride;
        let rows = (0..grouping.batch_size * ranks).map(|row| row_at(epochs, index(row), false));
        let all: Vec<PositionedRow> = rows.collect();
        self.reads_into(growth, &all, &mut worker.orders, &mut worker.scratch, &mut worker.reads)?;
        let squares = |segments: &[Segment]| segments.iter().map(|segment| segment.len * segment.len).sum();
        let costs: Vec<u64> = worker.reads.iter().map(|(_, segments)| squares(segments)).collect();
        let mine = balance::deal(&costs, ranks as usize).swap_remove(among as usize);
        worker.rows.clear();
        worker.rows.extend(mine.into_iter().map(|row| all[row]));
        Ok(())
    }

    /// Overwrites `reads` with the reads of `rows`. A row of padding reads nothing.
    pub(super) fn reads_into(
        &self,
        growth: &Growth,
        rows: &[PositionedRow],
        orders: &mut Orders,
        scratch: &mut ReadMemory,
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
