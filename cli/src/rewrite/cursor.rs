//! Goes through the rows of neighbouring sources, from any place on.

use std::ops::Range;
use std::path::Path;

use forebay::settings::Io;

use super::source::{RowBatch, ShardRows, SourceShard};

/// A place in a run of sources.
pub(super) struct SourceCursor<'a> {
    sources: &'a [SourceShard],
    /// The further column that it reads. `None` means the tokens.
    field: Option<usize>,
    range: Range<usize>,
    io: Io,
    at: usize,
    first_row: u64,
    rows: Option<ShardRows>,
    batch: Option<RowBatch>,
}

impl<'a> SourceCursor<'a> {
    pub(super) fn new(sources: &'a [SourceShard], field: Option<usize>, range: Range<usize>, io: Io) -> Self {
        Self { sources, field, at: range.start, range, io, first_row: 0, rows: None, batch: None }
    }

    pub(super) fn seek(&mut self, place: (usize, u64)) {
        if self.place() != place {
            (self.at, self.first_row) = place;
            (self.rows, self.batch) = (None, None);
        }
    }

    /// The source and the row that come next. At the end: the source after the last one, and row 0.
    pub(super) fn place(&self) -> (usize, u64) {
        match &self.batch {
            Some(batch) => (self.at, batch.row(batch.next)),
            None => (self.at, self.first_row),
        }
    }

    /// Returns rows that were not all taken yet, and the path that they come from.
    pub(super) fn current(&mut self) -> forebay::Result<Option<(&'a Path, &mut RowBatch)>> {
        while self.at < self.range.end {
            let source = &self.sources[self.at];
            let path = &*source.file.path;
            if self.batch.as_ref().is_some_and(|batch| batch.next < batch.len) {
                break;
            }
            if self.rows.is_none() {
                self.rows = Some(source.rows(self.field, self.first_row, self.io)?);
            }
            let rows = self.rows.as_mut().expect("opened above");
            self.batch = rows.next().map_err(|error| error.at(path))?;
            if self.batch.is_none() {
                (self.at, self.first_row, self.rows) = (self.at + 1, 0, None);
            }
        }
        let path = self.sources.get(self.at).map(|source| &*source.file.path);
        Ok(path.zip(self.batch.as_mut()).filter(|_| self.at < self.range.end))
    }
}
