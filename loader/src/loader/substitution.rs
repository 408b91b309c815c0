//! Substitution: puts other rows in the place of rows that cannot be read.
//!
//! With `on_error` = substitute, a row is *lost* if computing it alone fails by an error of its
//! data. A row in its place comes from the same epoch of the same source. Its number is a function
//! of seed, epoch, lost row and try, so every rank and every launch finds the same row. The batch
//! lists its substitutions. They are counted and told when the batch is handed over.

use std::collections::{HashSet, TryReserveError};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::batch::Batch;
use super::batch_rows::PositionedRow;
use super::compute::WorkerMemory;
use super::session::Session;
use super::sources::RowReads;
use crate::buffer::Lease;
use crate::error::{Error, ErrorKind, Result};
use crate::notices::{self, Level};
use crate::settings::{OnError, Remainder};
use crate::sync::lock;

/// Rows that are tried in the place of a lost row.
const TRIES: u64 = 16;

/// A row that stands in the place of a lost row.
#[derive(Clone, Debug)]
pub struct Substitution {
    /// Row of the batch.
    pub row: usize,
    /// Epoch and position of the lost row in the order of the run.
    pub place: (u64, u64),
    /// Source of both rows.
    pub source: usize,
    /// Sequence of the source that is lost.
    pub lost: u64,
    /// Sequence of the source in its place.
    pub sequence: u64,
    /// The reason, with file, block and row.
    pub error: Error,
}

/// The substitutions of a session.
#[derive(Debug, Default)]
pub(super) struct Substitutions {
    /// Rows that were handed over in the place of lost rows. The pipeline lets a single consumer at
    /// a time add; statistics read.
    count: AtomicU64,
    /// Source and sequence of each lost row that the user was told of.
    told: Mutex<HashSet<(usize, u64)>>,
}

/// Tells whether each reader of the same files finds the same error. Only such an error makes all
/// ranks replace the same rows.
fn is_damage(error: &Error) -> bool {
    let cause = std::error::Error::source(error);
    error.kind() == ErrorKind::Data && !cause.is_some_and(|cause| cause.is::<TryReserveError>())
}

impl Substitutions {
    /// Number of rows that were handed over in the place of lost rows.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

impl Session {
    /// Computes the batch of `reads`. With `on_error` = substitute, rows that cannot be read are
    /// replaced in `reads` before.
    pub(super) fn compute_sound(
        &self,
        start: (u64, u64),
        step: u64,
        parts: usize,
        reads: &mut RowReads,
        lease: Lease,
        worker: &mut WorkerMemory,
    ) -> Result<Batch> {
        let (error, lease) = match self.compute(start, step, parts, reads, lease, worker) {
            Ok(batch) => return Ok(batch),
            Err(failed) => failed,
        };
        let Some(lease) = lease.filter(|_| self.config.on_error == OnError::Substitute && is_damage(&error)) else {
            return Err(error);
        };
        let traced = worker.scratch.tracer.begin();
        let mut substitutions = Vec::new();
        for row in 0..reads.rows.len() {
            substitutions.extend(self.substitute(row, reads, worker)?);
        }
        worker.scratch.tracer.end("substitute", traced, Some(step));
        if substitutions.is_empty() {
            // Each row is sound alone, so the fault lies in their sum.
            return Err(error);
        }
        let mut batch = self.compute(start, step, parts, reads, lease, worker).map_err(|(error, _)| error)?;
        batch.substitutions = substitutions;
        Ok(batch)
    }

    /// Replaces row `row` of `reads` if it cannot be read.
    fn substitute(&self, row: usize, reads: &mut RowReads, worker: &mut WorkerMemory) -> Result<Option<Substitution>> {
        let Some(lost) = reads.rows[row].clone() else { return Ok(None) };
        let Err(error) = self.try_row(row, reads, worker) else { return Ok(None) };
        if !is_damage(&error) {
            return Err(error);
        }
        let wrap_to = (self.grouping.remainder == Remainder::Wrap).then(|| self.config.row_tokens());
        for attempt in 0..TRIES {
            if !self.opened.sources.substitute(&lost, row, attempt, wrap_to, &mut worker.scratch, reads)? {
                break;
            }
            match self.try_row(row, reads, worker) {
                Ok(()) => {
                    let place = match worker.rows.get(row) {
                        Some(PositionedRow::Position { epoch, position, .. }) => (*epoch, *position),
                        Some(PositionedRow::Padding) | None => (lost.epoch, u64::MAX),
                    };
                    let sequence = reads.rows[row].as_ref().map_or(lost.sequence, |read| read.sequence);
                    let (source, lost) = (lost.source, lost.sequence);
                    return Ok(Some(Substitution { row, place, source, lost, sequence, error }));
                }
                Err(other) if !is_damage(&other) => return Err(other),
                Err(_) => {}
            }
        }
        Err(error.context(format!("{TRIES} rows that were tried in the place of a row are damaged too")))
    }

    /// Computes row `row` of `reads` alone.
    fn try_row(&self, row: usize, reads: &RowReads, worker: &mut WorkerMemory) -> Result<()> {
        let mut alone = RowReads::default();
        alone.copy_row(reads, row);
        let computed = self.compute((0, 0), 0, 1, &alone, Lease::alone(self.batch_bytes), worker);
        computed.map(drop).map_err(|(error, _)| error)
    }

    /// Counts the substitutions of a batch that is about to be handed over, and tells the user.
    ///
    /// Fails if they are more than `max_substitutions` allows. Only batches that are handed over
    /// count, so the failing batch does not depend on the threads.
    pub(super) fn admit(&self, batch: &Batch) -> Result<()> {
        let Some(first) = batch.substitutions.first() else { return Ok(()) };
        let (before, most) = (self.substitutions.count(), self.config.max_substitutions);
        let now = before + batch.substitutions.len() as u64;
        if now > most {
            return Err(first.error.clone().context(format!(
                "{now} rows could not be read, more than `max_substitutions` = {most}: check the files, or raise it; \
                 the last of them"
            )));
        }
        self.substitutions.count.store(now, Ordering::Relaxed);
        let mut told = lock(&self.substitutions.told);
        for found in &batch.substitutions {
            if !told.insert((found.source, found.lost)) {
                continue;
            }
            let name = &self.opened.sources.list()[found.source].name;
            let of = if name.is_empty() { String::new() } else { format!(" of source `{name}`") };
            let text = format!(
                "step {} of epoch {}: sequence {}{of} cannot be read, sequence {} stands in its place: {}",
                batch.step,
                batch.epoch,
                found.lost,
                found.sequence,
                found.error.report()
            );
            notices::add(Level::Warning, text);
        }
        Ok(())
    }
}
