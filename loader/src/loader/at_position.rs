//! Gives batches by their position, without a pass.
//!
//! A caller asks for the batch that a rank gets at a step, or for the rows at some positions.

use std::sync::Arc;

use super::Loader;
use super::batch::Batch;
use super::batch_rows::PositionedRow;
use super::served::PassStart;
use crate::error::{Error, Result};
use crate::order::partition::Grouping;
use crate::settings::{Balance, Config, Epochs};
use crate::sync::lock;

impl Loader {
    /// Returns the rows at positions `position..position + n` of `epoch`, over all ranks, as one
    /// batch.
    ///
    /// Skipped positions have rows, too. Fails if the epoch has fewer positions, or if the rows
    /// take more memory than `memory_budget`.
    pub fn sequences_at(&self, epoch: u64, position: u64, n: u64) -> Result<Arc<Batch>> {
        let session = &self.session;
        session.check_process()?;
        let growth = lock(&session.cursor).growth.clone();
        let positions = session.positions(&growth, epoch);
        if n == 0 || position.checked_add(n).is_none_or(|end| end > positions) {
            return Err(Error::config(format!(
                "cannot read positions {position}..{}: an epoch has positions 0..{positions}",
                position.saturating_add(n)
            )));
        }
        session.check_epoch(epoch)?;
        let field_bytes: usize = session.opened.schema.bytes_per_token();
        let mask = if session.config.document_mask { session.config.seq_len } else { 0 };
        let bytes = n.saturating_mul(session.config.row_tokens().saturating_mul(16 + field_bytes as u64 + mask));
        if bytes > session.config.memory_budget {
            return Err(Error::config(format!(
                "{n} rows at once take {bytes} bytes, more than the {} bytes of `memory_budget`: ask for fewer",
                session.config.memory_budget
            )));
        }
        if session.is_served() {
            let step = position / session.grouping.global_batch();
            let config = Config {
                batch_size: n,
                dp_rank: Some(0),
                dp_world_size: Some(1),
                epochs: Epochs::Count(1),
                skip: Vec::new(),
                max_steps: None,
                balance: Balance::Off,
                prefetch_batches: 1,
                ..session.config.clone()
            };
            let start = PassStart { growth: growth.text(), epoch, index: position, batches: 1, parts: 1 };
            return session.served_alone(&config, &start, step);
        }
        let row = |position| PositionedRow::Position { epoch, position, repeated: false };
        let rows: Vec<PositionedRow> = (position..position + n).map(row).collect();
        session.compute_rows(&growth, (epoch, position), position / session.grouping.global_batch(), &rows)
    }

    /// Returns the batch that rank `rank` of `world_size` gets at `step` of the pass that begins
    /// with `epoch`.
    ///
    /// Uses this loader's batch size and remainder rule. Fails if the pass has fewer steps.
    pub fn batch_at(&self, epoch: u64, step: u64, rank: u64, world_size: u64) -> Result<Arc<Batch>> {
        let session = &self.session;
        session.check_process()?;
        if rank >= world_size {
            return Err(Error::config(format!("`rank` must be below `world_size`: found rank {rank} of {world_size}")));
        }
        session.check_epoch(epoch)?;
        let growth = lock(&session.cursor).growth.clone();
        let epochs = session.epoch_chain(&growth, epoch);
        let grouping = Grouping { rank, world_size, ..session.grouping };
        let steps = epochs.len().map_or(u64::MAX, |end| grouping.steps(end));
        if step >= steps {
            return Err(Error::config(format!(
                "cannot give step {step}: a pass for {world_size} ranks has steps 0..{steps}"
            )));
        }
        session.opened.check_balance(&session.config, grouping)?;
        if session.is_served() {
            let config = Config {
                dp_rank: Some(rank),
                dp_world_size: Some(world_size),
                max_steps: None,
                prefetch_batches: 1,
                ..session.config.clone()
            };
            let index = step * grouping.global_batch();
            let start = PassStart { growth: growth.text(), epoch, index, batches: 1, parts: 1 };
            return session.served_alone(&config, &start, step);
        }
        session.compute_step(&growth, grouping, &epochs, step)
    }
}
