//! A session: the way of one rank through an opened corpus.
//!
//! It holds all that depends on the rank, the batch size or the time. These are grouping, position,
//! the epochs of its passes, the layout of batches and their buffers, counters, trace, and its part
//! of the memory budget.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

use super::MAX_EPOCH;
use super::batch::{Batch, BatchLayout};
use super::cursor::Cursor;
use super::open::{Opened, window_warning, windows_bytes};
use super::pass::PassRange;
use super::substitution::Substitutions;
use crate::buffer::BufferSource;
use crate::error::{Error, ErrorKind, Result};
use crate::loader::sources::{CorpusSource, Growth};
use crate::observe::slow_reads::SlowReads;
use crate::observe::stats::{Counters, SourceStats, Stats};
use crate::observe::trace::Trace;
use crate::order::epochs::{ENDLESS, EpochChain};
use crate::order::partition::Grouping;
use crate::pipeline::affinity::Placement;
use crate::read::SessionId;
use crate::settings::environment;
use crate::settings::{Config, Epochs, default_threads};
use crate::storage;
use crate::sync::{ForkGuard, lock};

#[derive(Debug)]
pub(super) struct Session {
    pub(super) opened: Arc<Opened>,
    /// Settings in force, including the settings of `opened`.
    pub(super) config: Config,
    pub(super) grouping: Grouping,
    pub(super) warnings: Vec<String>,
    pub(super) pool: Arc<dyn BufferSource>,
    /// Layout of a full batch.
    pub(super) layout: BatchLayout,
    /// Size of the memory of a batch, in bytes.
    pub(super) batch_bytes: usize,
    /// Number of this session in the block cache.
    pub(super) in_cache: SessionId,
    /// Bytes of the budget that the session holds for its own memory.
    reserved_bytes: u64,
    pub(super) counters: Counters,
    pub(super) substitutions: Substitutions,
    pub(super) slow_reads: SlowReads,
    pub(super) cursor: Mutex<Cursor>,
    pub(super) next_pass: AtomicU64,
    /// Whether windows were found out of memory lately, so that all are read ahead. Workers write
    /// and read it. A stale value costs little.
    pub(super) cold: AtomicBool,
    /// Whether batches are hashed. Callers write it and workers read it. A batch that began earlier
    /// may have no hash.
    pub(super) covers: AtomicBool,
    /// Whether batches keep the facts about their rows. A service sets it before the first pass.
    pub(super) keeps_facts: AtomicBool,
    /// Writer of spans, if `FOREBAY_TRACE` names a file.
    pub(super) trace: Option<Arc<Trace>>,
    pub(super) placement: Placement,
    home: ForkGuard,
}

impl Session {
    /// Begins a session of `opened` with the settings of `config`.
    pub(super) fn new(
        opened: Arc<Opened>,
        mut config: Config,
        buffers: impl FnOnce(usize, usize) -> Arc<dyn BufferSource>,
    ) -> Result<Self> {
        config.validate()?;
        opened.check(&mut config)?;
        let threads = *config.num_threads.get_or_insert_with(default_threads);
        let rank = *config.dp_rank.get_or_insert(0);
        let world_size = *config.dp_world_size.get_or_insert(1);
        let grouping = Grouping { batch_size: config.batch_size, rank, world_size, remainder: config.remainder };
        opened.check_balance(&config, grouping)?;
        let placement = Placement::of(&config)?;
        let trace =
            environment::trace()?.map(|(asked, limit)| Trace::open(&asked, limit, rank, world_size)).transpose()?;

        let layout = BatchLayout::new(&config, &opened.schema, config.batch_size as usize, config.seq_len as usize);
        let batch_bytes = layout.bytes;
        let in_flight = config.prefetch_batches + 1;
        // Blocks are decoded elsewhere if a service gives the rows.
        let decoding = if opened.service.is_some() { 0 } else { threads };
        let (in_cache, reserved_bytes, cache_bytes) = opened.join(&config, decoding, in_flight * batch_bytes as u64)?;
        let mut warnings = opened.warnings.clone();
        let elsewhere = trace.as_ref().filter(|trace| trace.is_elsewhere());
        warnings.extend(elsewhere.map(|trace| {
            format!(
                "another process writes the trace that `FOREBAY_TRACE` names: this process writes `{}` instead",
                trace.path().display()
            )
        }));
        if opened.service.is_none() {
            let windows = windows_bytes(&config, &opened.sources, &grouping, opened.largest_block_bytes);
            warnings.extend(window_warning(windows, cache_bytes));
        }
        let mut session = Self {
            grouping,
            warnings,
            pool: buffers(batch_bytes, in_flight as usize),
            layout,
            batch_bytes,
            in_cache,
            reserved_bytes,
            counters: Counters::new(threads as usize),
            substitutions: Substitutions::default(),
            slow_reads: SlowReads::new(threads as usize),
            cursor: Mutex::new(Cursor::new(opened.sources.shards())),
            next_pass: AtomicU64::new(0),
            cold: AtomicBool::new(true),
            covers: AtomicBool::new(config.delivery_log.is_some()),
            keeps_facts: AtomicBool::new(false),
            trace,
            placement,
            home: ForkGuard::new(),
            opened,
            config,
        };
        let first = session.epoch_chain(&Growth::none(session.opened.sources.shards()), 0);
        if let Some(end) = first.len() {
            grouping.check(end)?;
            if session.steps_from(0, &first) == 0 && session.config.max_steps != Some(0) {
                session.warnings.push(format!(
                    "an epoch has no batch: its {end} sequences of `seq_len` = {} make none of {} (`batch_size` times the number of ranks)",
                    session.config.seq_len,
                    grouping.global_batch()
                ));
            }
        }
        Ok(session)
    }

    /// Number of worker threads of a pass.
    pub(super) fn threads(&self) -> usize {
        self.config.num_threads.unwrap_or(1) as usize
    }

    /// Fails in a forked child of the process in which the session began.
    pub(super) fn check_process(&self) -> Result<()> {
        if !self.home.is_forked_child() {
            return Ok(());
        }
        let now = std::process::id();
        Err(Error::new(
            ErrorKind::Closed,
            format!(
                "this loader was opened in process {} and does not work in its forked child {now}, which has none of its threads: \
                 open a new loader in the child",
                self.home.process()
            ),
        ))
    }

    /// Converts index `index` of a pass to a number among the positions of all epochs, for the
    /// block cache.
    pub(super) fn global_position(&self, range: &PassRange, index: u64) -> u64 {
        let (epoch, position) = range.epochs.state_at(index);
        self.opened.sources.global_position(epoch, position)
    }

    /// Number of positions of an epoch under the remainder rule.
    pub(super) fn positions(&self, growth: &Growth, epoch: u64) -> u64 {
        let sources = &self.opened.sources;
        self.grouping.positions(sources.full_rows(growth, epoch), sources.has_tail(growth, epoch))
    }

    /// The epochs of the pass that `epoch` belongs to.
    pub(super) fn epoch_chain(&self, growth: &Growth, epoch: u64) -> EpochChain {
        let (first, count) = match self.config.epochs {
            Epochs::Count(count) => (epoch - epoch % count, Some(count)),
            Epochs::Endless => (0, None),
        };
        // A mixture without end is one epoch.
        let count = if self.opened.sources.full_rows(growth, epoch) == ENDLESS { Some(1) } else { count };
        EpochChain::new(first, count, &self.config.skip, growth.changes(), |epoch| self.positions(growth, epoch))
    }

    /// Number of steps of a pass that begins at index `start`.
    pub(super) fn steps_from(&self, start: u64, epochs: &EpochChain) -> u64 {
        let steps = epochs.len().map_or(u64::MAX, |end| self.grouping.steps(end.saturating_sub(start)));
        let limit = self.config.max_steps.unwrap_or(u64::MAX);
        steps.min(limit.saturating_sub(start / self.grouping.global_batch()))
    }

    /// Fails if no pass can have `epoch`.
    pub(super) fn check_epoch(&self, epoch: u64) -> Result<()> {
        if epoch > MAX_EPOCH {
            return Err(Error::config(format!("epoch {epoch} is too large: the last one is {MAX_EPOCH}")));
        }
        if epoch > 0 && self.opened.sources.mixture().is_some_and(|mixture| mixture.positions() == ENDLESS) {
            return Err(Error::config(format!("there is no epoch {epoch}: this mixture's first epoch has no end")));
        }
        Ok(())
    }

    pub(super) fn stats(&self) -> Stats {
        let cache = &self.opened.cache;
        let (decoded_blocks, decoded_bytes) = cache.decoded();
        Stats {
            decoded_blocks,
            decoded_bytes,
            found_blocks: cache.found_blocks(),
            decoded_pages: cache.decoded_pages(),
            sources: self.source_stats(),
            lost: self.opened.sources.lost(),
            substituted_rows: self.substitutions.count(),
            cache_bytes: cache.used_bytes(),
            buffer_bytes: self.pool.held_bytes() as u64,
            storage: storage::traffic(),
            is_served: self.is_served(),
            ..self.counters.snapshot()
        }
    }

    /// Places for tokens in the rows of `batch`. The tokens that it delivers are counted the same
    /// way.
    pub(super) fn places_of(&self, batch: &Batch) -> u64 {
        let joins = self.config.layout.joins();
        let lead = if joins { 0 } else { self.config.row_tokens() - self.config.seq_len };
        batch.rows as u64 * (batch.columns() as u64 + lead)
    }

    /// The rows that each source of a mixture gave to all ranks together before the present
    /// position. Empty without a mixture.
    fn source_stats(&self) -> Vec<SourceStats> {
        let sources = &self.opened.sources;
        let (epoch, position) = {
            let cursor = lock(&self.cursor);
            (cursor.epoch, cursor.position)
        };
        let Some(mixture) = sources.mixture() else { return Vec::new() };
        let mut counts = mixture.counts(position);
        if epoch > 0 {
            for (count, whole) in counts.iter_mut().zip(mixture.counts(mixture.positions())) {
                *count += epoch * whole;
            }
        }
        let total: u64 = counts.iter().sum();
        let of_source = |(source, sequences): (&CorpusSource, u64)| SourceStats {
            name: source.name.clone(),
            sequences,
            tokens: sequences * self.config.seq_len,
            epochs: sequences as f64 / sources.sequences_of(source) as f64,
            share: if total == 0 { 0.0 } else { sequences as f64 / total as f64 },
        };
        sources.list().iter().zip(counts).map(of_source).collect()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // In a forked child, a vanished thread may hold the cache's lock.
        if !self.home.is_forked_child() {
            self.opened.cache.leave(self.in_cache, self.reserved_bytes);
        }
    }
}
