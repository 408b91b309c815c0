//! Makes the plan of a loader from its settings and corpora.

use std::cell::RefCell;

use super::super::Loader;
use super::super::compute::WorkerMemory;
use super::super::pass_work::{decoded_ahead, done_after};
use super::super::session::Session;
use crate::error::Result;
use crate::format::Access;
use crate::layout::Extent;
use crate::loader::plan::{self, Decoding, MemoryPlan, PassCounts, PassPlan, Plan, RowSegments, Simulated, SourcePlan};
use crate::loader::sources::{Growth, RowRead};
use crate::order::Arrangement;
use crate::order::epochs::EpochChain;
use crate::order::partition::Grouping;
use crate::settings::Shuffle;

/// Rows that are sampled for the padding of batches.
const SAMPLED_ROWS: u64 = 1 << 14;
/// Places of the epoch that are sampled.
const SAMPLED_SPOTS: u64 = 16;

impl Loader {
    /// Plans the first pass of these settings.
    ///
    /// Reads no token and opens no shard. Takes about a second at most.
    pub fn plan(&self) -> Result<Plan> {
        let session = &self.session;
        let growth = Growth::none(session.opened.sources.shards());
        let epochs = session.epoch_chain(&growth, 0);
        let pass = session.plan_pass(&growth, &epochs);
        let padding = session.sampled_padding(&growth, &epochs, &pass)?;
        let plan_source = |index| session.plan_source(index, &epochs, &pass, padding);
        let sources = (0..session.opened.sources.list().len()).map(plan_source);
        let decodes =
            session.opened.sources.list().iter().any(|source| source.reader().corpus().access() == Access::Block);
        Ok(Plan {
            sources: sources.collect(),
            decoding: decodes.then(|| session.plan_decoding(&growth, &epochs, &pass)).transpose()?,
            memory: session.plan_memory(),
            pass,
        })
    }

    /// Computes the memory of the loader. Costs nothing.
    pub fn memory_plan(&self) -> MemoryPlan {
        self.session.plan_memory()
    }
}

impl Session {
    fn plan_pass(&self, growth: &Growth, epochs: &EpochChain) -> PassPlan {
        let config = &self.config;
        let full = self.opened.sources.full_rows(growth, 0);
        let rows = epochs.len();
        let delivered = PassPlan::steps(&self.grouping, rows, config.max_steps).map_or(0, |(_, rows)| rows);
        let count = epochs.epochs_before(rows.unwrap_or(0));
        let (mut tails, mut tail_tokens, mut rowless) = (0, 0, 0);
        if self.opened.sources.mixture().is_none() && rows.is_some() {
            // Without growth, all epochs have the same tail, after the full rows.
            let of_epoch = self.opened.sources.rowless_tokens(growth, 0);
            if self.positions(growth, 0) > full {
                tail_tokens = self.opened.sources.order_of(0, 0).0.tail_tokens;
                let has_tail = |epoch: &u64| {
                    let index = epochs.index_of(*epoch, full);
                    index < delivered && epochs.at(index) == (*epoch, full)
                };
                tails = (0..count).filter(has_tail).count() as u64;
            } else {
                rowless = of_epoch * count;
            }
        }
        let lanes = if config.shuffle == Shuffle::Block { config.lanes } else { 1 };
        let counts = PassCounts {
            rows,
            delivered_tails: tails,
            tail_tokens,
            rowless_tokens: rowless,
            seq_len: config.seq_len,
            max_steps: config.max_steps,
        };
        PassPlan::new(&self.grouping, lanes, counts)
    }

    fn plan_source(&self, index: usize, epochs: &EpochChain, pass: &PassPlan, padding: Option<f64>) -> SourcePlan {
        let source = &self.opened.sources.list()[index];
        let corpus = source.reader().corpus();
        let (extent, arrangement, order) = self.opened.sources.order_of(index, 0);
        let drawn_sequences = match self.opened.sources.mixture() {
            _ if pass.steps.is_none() => None,
            // Skipped positions are among the positions that are counted up to the last one.
            Some(mixture) => {
                let (epoch, position) = epochs.state_at(pass.delivered_rows);
                let whole = if epoch > 0 { mixture.counts(mixture.positions())[index] * epoch } else { 0 };
                Some(mixture.counts(position)[index] + whole)
            }
            None => Some(pass.delivered_rows - pass.delivered_tails),
        };
        SourcePlan {
            name: source.name.clone(),
            shards: corpus.len() as u64,
            open_shards: corpus.open_shards().count() as u64,
            blocks: corpus.blocks(),
            documents: corpus.documents(),
            tokens: corpus.tokens(),
            stream_tokens: extent.stream_len,
            sequences: order.len(),
            held_out_sequences: extent.rows - order.len(),
            tail_tokens: extent.tail_tokens,
            row_tokens: extent.tokens,
            padding_places: self.padding_places(&extent, padding),
            lost: source.reader().layout().lost(corpus.len()),
            lengths_took: source.reader().lengths_took(),
            drawn_sequences,
            arrangement,
            displacement: plan::displacement(&order, arrangement),
            neighbours: plan::neighbours(&order, arrangement),
        }
    }

    /// Places of padding per token, if the length of a batch depends on its rows. Sampled from
    /// batches of this rank.
    fn sampled_padding(&self, growth: &Growth, epochs: &EpochChain, pass: &PassPlan) -> Result<Option<f64>> {
        let Some(steps) = pass.steps.filter(|_| self.config.pad_to_multiple.is_some()) else { return Ok(None) };
        let mut memory = WorkerMemory::default();
        let of_spot = (SAMPLED_ROWS / SAMPLED_SPOTS / self.grouping.batch_size).max(1);
        let (mut places, mut tokens, mut next) = (0, 0, 0);
        for spot in 0..SAMPLED_SPOTS {
            let first = (u128::from(steps) * u128::from(spot) / u128::from(SAMPLED_SPOTS)) as u64;
            for step in first.max(next)..(first + of_spot).min(steps) {
                let start = step * self.grouping.global_batch();
                self.plan_batch(growth, self.grouping, epochs, start, 1, &mut memory)?;
                let (reads, lead) = (&memory.reads, self.config.row_tokens() - self.config.seq_len);
                places += reads.rows.len() as u64 * (self.columns_of(reads) as u64 + lead);
                tokens += reads.iter().map(|(read, _)| read.tokens).sum::<u64>();
                next = step + 1;
            }
        }
        Ok(Some(places.saturating_sub(tokens) as f64 / tokens.max(1) as f64))
    }

    /// Places of the rows of `extent` that hold no token. Joined documents leave none. `padding`
    /// gives the places per token, if batches differ in length.
    fn padding_places(&self, extent: &Extent, padding: Option<f64>) -> u64 {
        if let Some(padding) = padding {
            return (extent.tokens as f64 * padding) as u64;
        }
        if self.config.layout.joins() { 0 } else { extent.rows * self.config.row_tokens() - extent.tokens }
    }

    fn plan_decoding(&self, growth: &Growth, epochs: &EpochChain, pass: &PassPlan) -> Result<Decoding> {
        let grouping = self.grouping;
        let memory = RefCell::new(WorkerMemory::default());
        let rows = |rank: u64, step: u64| {
            let of_rank = Grouping { rank, ..grouping };
            let memory = &mut *memory.borrow_mut();
            self.plan_batch(growth, of_rank, epochs, step * grouping.global_batch(), 1, memory)?;
            let reads = &memory.reads;
            let simulated = |read: &RowRead| RowSegments {
                source: read.source,
                segments: reads.segments(read).to_vec(),
                ends_chunk: read.ends_chunk,
            };
            Ok(reads.rows.iter().map(|read| read.as_ref().map(simulated)).collect())
        };
        let list = self.opened.sources.list();
        let ratios: Vec<f64> = list
            .iter()
            .map(|source| source.reader().corpus().tokens() as f64 / source.reader().stream().len().max(1) as f64)
            .collect();
        let windows = (0..list.len()).map(|index| match self.opened.sources.order_of(index, 0).1 {
            Arrangement::Block { lanes, window, .. } => lanes * window,
            Arrangement::Sequential | Arrangement::Global => 1,
        });
        let simulated = Simulated {
            grouping,
            steps: pass.steps.unwrap_or(u64::MAX >> 32),
            rows: &rows,
            block_at: &|source, at| list[source].reader().block_at(at),
            tokens_per_stream_token: &|source| ratios[source],
            // A source with a small share goes through its windows slowly. All shares are assumed
            // to be equal.
            round: (windows.max().unwrap_or(1) * list.len() as u64).div_ceil(grouping.global_batch()),
            cache_bytes: self.opened.cache.budget_bytes(),
            prefetch: self.config.prefetch_batches,
            decoded_ahead: decoded_ahead(&self.config, grouping),
            done_after: done_after(&self.config, grouping),
            most_rows: plan::MOST_ROWS,
        };
        simulated.decoding()
    }

    fn plan_memory(&self) -> MemoryPlan {
        let config = &self.config;
        let corpora = || self.opened.sources.list().iter().map(|source| source.reader().corpus());
        let batch_bytes = self.batch_bytes as u64;
        let largest_block = corpora().map(|corpus| corpus.largest_block_bytes()).max().unwrap_or(0);
        let decoded_bytes = corpora().map(|corpus| corpus.decoded_bytes()).sum();
        MemoryPlan {
            batch_bytes,
            batches_bytes: (config.prefetch_batches + 1) * batch_bytes,
            held_blocks_bytes: config.num_threads.unwrap_or(1) * largest_block,
            cache_bytes: self.opened.cache.budget_bytes().min(decoded_bytes),
            index_bytes: corpora().map(|corpus| corpus.index_bytes()).sum::<u64>()
                + self.opened.sources.list().iter().map(|source| source.reader().index_bytes()).sum::<u64>(),
            budget_bytes: config.memory_budget,
        }
    }
}
