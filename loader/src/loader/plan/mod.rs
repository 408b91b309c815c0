//! Plan: size and cost of a pass, before it runs.
//!
//! Takes counts, arrangements, the grouping, and functions that give the reads of rows and the
//! places of blocks. Gives the remainder in numbers, the distance by which the order moves
//! sequences, the number of decoded blocks, and the memory by part.
//!
//! Reads no token and opens no shard. The work is bounded for every corpus. Values without a closed
//! form are sampled or simulated over at most [`MOST_ROWS`] rows, and come with the number of these
//! rows.

mod advice;
mod of_loader;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

pub use self::advice::{Advice, LanesAdvice};
use crate::error::Result;
use crate::layout::{Lost, Segment};
use crate::order::partition::Grouping;
use crate::order::permutation::Permutation;
use crate::order::{Arrangement, EpochOrder};
pub use crate::read::BlockPlace;
use crate::read::{EvictionPolicy, SessionId};
use crate::settings::Remainder;

/// Most rows that are simulated. They take about a second.
pub const MOST_ROWS: u64 = 1 << 20;
/// Number of positions that are sampled for distances.
const SAMPLED_POSITIONS: u64 = 1 << 16;
/// Key of the sample of positions. Any number would do.
const SAMPLE_KEY: u64 = 1;

/// The size and cost of a run with some settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The corpus and its order, or those of each source of a mixture.
    pub sources: Vec<SourcePlan>,
    /// One pass, over all ranks.
    pub pass: PassPlan,
    /// The decoding of blocks. `None` if tokens are read in place.
    pub decoding: Option<Decoding>,
    /// Memory of one rank.
    pub memory: MemoryPlan,
}

/// Facts about one source.
#[derive(Clone, Debug, PartialEq)]
pub struct SourcePlan {
    /// Name in the mixture. Empty without a mixture.
    pub name: String,
    /// Number of files.
    pub shards: u64,
    /// Number of open files.
    pub open_shards: u64,
    /// Number of blocks with tokens.
    pub blocks: u64,
    /// Number of documents with tokens.
    pub documents: u64,
    /// Number of tokens in the files.
    pub tokens: u64,
    /// Number of tokens in the stream, including `bos_id` and `eos_id`.
    pub stream_tokens: u64,
    /// Full sequences of one epoch, on the delivered side of a holdout.
    pub sequences: u64,
    /// Full sequences of one epoch, on the other side.
    pub held_out_sequences: u64,
    /// Number of tokens after the full sequences.
    pub tail_tokens: u64,
    /// Tokens that the delivered sequences and the tail of one epoch hold. In `concat` these are
    /// all tokens of the stream.
    pub row_tokens: u64,
    /// Places of the delivered sequences that hold no token, in one epoch.
    pub padding_places: u64,
    /// Tokens of documents that are longer than a row, and that no row holds.
    pub lost: Lost,
    /// Time in which the start read document lengths from shards. `None` if the layout needs none,
    /// or if all were saved.
    pub lengths_took: Option<Duration>,
    /// Sequences drawn from the source in the pass. `None` if the pass has no end.
    pub drawn_sequences: Option<u64>,
    /// Arrangement of the sequences.
    pub arrangement: Arrangement,
    /// Distances between the places of sequences in the corpus and in the order.
    pub displacement: Distance,
    /// Distances in the order between sequences that are neighbours in the corpus.
    pub neighbours: Distance,
}

/// Distances in an epoch's order, in positions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    /// Mean that follows from the arrangement.
    pub expected_mean: f64,
    /// Mean of the sample.
    pub mean: f64,
    /// Median of the sample.
    pub p50: u64,
    /// 95th percentile of the sample.
    pub p95: u64,
    /// Number of distances in the sample. 0 if the arrangement leaves nothing to sample.
    pub sampled: u64,
}

/// The decoding of a simulated pass, or of a part of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decoding {
    /// Tokens decoded by all ranks together, per token that they deliver.
    pub amplification: f64,
    /// Number of blocks that the simulated ranks decode, including prefixes.
    pub blocks: u64,
    /// Number of tokens that the simulated ranks decode.
    pub tokens: u64,
    /// Number of simulated ranks: all ranks, or one that represents all.
    pub ranks: u64,
    /// Number of rows that these ranks were given.
    pub rows: u64,
    /// Number of rows simulated before, to fill the cache.
    pub warm_up_rows: u64,
    /// Whether these rows are the whole pass of these ranks.
    pub whole_pass: bool,
}

/// The rows and tokens that one pass delivers, over all ranks.
///
/// A pass without end has no steps to count, and no remainder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassPlan {
    /// Number of steps, the same on every rank. `None` if the pass has no end.
    pub steps: Option<u64>,
    /// Number of rows in a step, over all ranks.
    pub global_batch: u64,
    /// The number of ranks that share a step.
    pub world_size: u64,
    /// Number of ranks that draw from the same lanes, and so from the same blocks.
    pub sharing_ranks: u64,
    /// The remainder rule in force.
    pub remainder: Remainder,
    /// Number of delivered positions, each counted once.
    pub delivered_rows: u64,
    /// Number of delivered tails. A tail fills no row.
    pub delivered_tails: u64,
    /// Number of delivered tokens, each counted once.
    pub delivered_tokens: u64,
    /// Full sequences that the remainder rule leaves out.
    pub dropped_sequences: u64,
    /// Tokens that the remainder rule leaves out, including the tokens of dropped sequences.
    pub dropped_tokens: u64,
    /// Number of rows with padding only.
    pub padded_rows: u64,
    /// Number of places filled with `pad_id`, in these rows and after tails.
    pub padded_tokens: u64,
    /// Number of rows delivered a second time.
    pub repeated_rows: u64,
    /// Number of tokens delivered a second time, in these rows and after tails.
    pub repeated_tokens: u64,
    /// Number of rows of the last step, over all ranks.
    pub last_batch_rows: u64,
    /// Number of positions after the last step that `max_steps` allows.
    pub cut_rows: u64,
}

/// The counts of a pass, for [`PassPlan::new`].
#[derive(Clone, Copy, Debug, Default)]
pub struct PassCounts {
    /// Number of positions that are not skipped. `None` if there is no end.
    pub rows: Option<u64>,
    /// Number of delivered tails.
    pub delivered_tails: u64,
    /// Tokens of a tail that has a row to deliver it.
    pub tail_tokens: u64,
    /// Tokens that belong to no position.
    pub rowless_tokens: u64,
    /// Tokens of a full row.
    pub seq_len: u64,
    /// The setting `max_steps`.
    pub max_steps: Option<u64>,
}

/// Memory of one rank in bytes, by use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Size of one batch.
    pub batch_bytes: u64,
    /// Batches that are begun or ready, and one that the consumer holds.
    pub batches_bytes: u64,
    /// Decoded blocks that worker threads hold while they copy from them.
    pub held_blocks_bytes: u64,
    /// Decoded blocks in the cache: the room for them, or all blocks if they fit.
    pub cache_bytes: u64,
    /// Tables of shards, blocks and pages. They are not part of the budget.
    pub index_bytes: u64,
    /// The setting `memory_budget`.
    pub budget_bytes: u64,
}

impl MemoryPlan {
    /// The bytes that count against the budget.
    pub fn budgeted_bytes(&self) -> u64 {
        self.batches_bytes + self.held_blocks_bytes + self.cache_bytes
    }
}

impl PassPlan {
    /// Number of steps of a pass with `rows` rows, and the number of rows that they deliver.
    pub fn steps(grouping: &Grouping, rows: Option<u64>, max_steps: Option<u64>) -> Option<(u64, u64)> {
        let steps = rows.map(|rows| grouping.steps(rows)).into_iter().chain(max_steps).min()?;
        let places = steps.saturating_mul(grouping.global_batch());
        Some((steps, rows.map_or(places, |rows| rows.min(places))))
    }

    /// Plans a pass of `counts`. `lanes` is the number of lanes, or 1 without block shuffling.
    pub fn new(grouping: &Grouping, lanes: u64, counts: PassCounts) -> Self {
        let PassCounts { rows, delivered_tails: tails, tail_tokens, rowless_tokens, seq_len, max_steps } = counts;
        let global_batch = grouping.global_batch();
        let mut plan = Self {
            steps: None,
            global_batch,
            world_size: grouping.world_size,
            sharing_ranks: grouping.world_size * grouping.lanes(lanes) / lanes,
            remainder: grouping.remainder,
            delivered_rows: 0,
            delivered_tails: tails,
            delivered_tokens: 0,
            dropped_sequences: 0,
            dropped_tokens: 0,
            padded_rows: 0,
            padded_tokens: 0,
            repeated_rows: 0,
            repeated_tokens: 0,
            last_batch_rows: 0,
            cut_rows: 0,
        };
        let Some((steps, delivered)) = Self::steps(grouping, rows, max_steps) else { return plan };
        let rows_short = steps * global_batch - delivered;
        let after_tails = tails * seq_len.saturating_sub(tail_tokens);
        plan.steps = Some(steps);
        plan.delivered_rows = delivered;
        plan.delivered_tokens = (delivered - tails) * seq_len + tails * tail_tokens;
        plan.last_batch_rows = if steps == 0 { 0 } else { global_batch };
        let left = rows.map_or(0, |rows| rows - delivered);
        let cut = rows.is_some_and(|rows| steps < grouping.steps(rows));
        if cut {
            plan.cut_rows = left;
        }
        match grouping.remainder {
            Remainder::Drop if !cut => {
                plan.dropped_sequences = left;
                plan.dropped_tokens = left * seq_len + rowless_tokens;
            }
            Remainder::Drop => {}
            Remainder::Pad => {
                plan.padded_rows = rows_short;
                plan.padded_tokens = rows_short * seq_len + after_tails;
            }
            Remainder::Wrap => {
                plan.repeated_rows = rows_short;
                plan.repeated_tokens = rows_short * seq_len + after_tails;
            }
            Remainder::Short => {
                plan.padded_tokens = after_tails;
                plan.last_batch_rows -= rows_short;
            }
        }
        plan
    }
}

/// Measures how far `order` moves sequences.
///
/// Both kinds of shuffling spread a sequence over the whole corpus. They differ in [`neighbours`].
pub fn displacement(order: &EpochOrder, arrangement: Arrangement) -> Distance {
    let n = order.len();
    let expected_mean = match arrangement {
        Arrangement::Sequential => 0.0,
        // The mean distance of two independent places of n is (n^2 - 1) / 3n. Permuted chunks are
        // as far away as permuted sequences.
        Arrangement::Global | Arrangement::Block { .. } => (n as f64 - 1.0 / n.max(1) as f64) / 3.0,
    };
    let sample = Permutation::new(n.max(1), SAMPLE_KEY);
    let distances = (0..n.min(SAMPLED_POSITIONS)).map(|index| {
        let position = sample.apply(index);
        order.sequence_at(position).abs_diff(position)
    });
    Distance::of(distances.collect(), expected_mean)
}

/// Measures the distance in the order of sequences that are neighbours in the corpus and in one
/// window.
pub fn neighbours(order: &EpochOrder, arrangement: Arrangement) -> Distance {
    let n = order.len();
    let (lanes, window) = match arrangement {
        Arrangement::Sequential => return Distance { expected_mean: 1.0, mean: 1.0, p50: 1, p95: 1, sampled: 0 },
        Arrangement::Global => (1, n),
        Arrangement::Block { lanes, window, .. } => (lanes, window.min(n / lanes)),
    };
    let expected_mean = lanes as f64 * (window as f64 + 1.0) / 3.0;
    if window > SAMPLED_POSITIONS {
        // A sample would contain too few neighbours, so that only the closed form is given.
        return Distance { expected_mean, ..Distance::default() };
    }
    // Lane 0 has no phase: its windows are the multiples of `window`. It has at least n / lanes
    // places.
    let windows = (n / lanes / window.max(1)).clamp(1, (SAMPLED_POSITIONS / window.max(1)).max(1));
    let mut distances = Vec::new();
    for index in 0..windows {
        let mut placed: Vec<(u64, u64)> =
            (index * window..(index + 1) * window).map(|at| (order.sequence_at(at * lanes), at * lanes)).collect();
        placed.sort_unstable();
        let neighbours = placed.windows(2).filter(|pair| pair[0].0 + 1 == pair[1].0);
        distances.extend(neighbours.map(|pair| pair[0].1.abs_diff(pair[1].1)));
    }
    Distance::of(distances, expected_mean)
}

/// The stretches that a row reads.
#[derive(Clone, Debug)]
pub struct RowSegments {
    /// Index of the source.
    pub source: usize,
    /// Segments of its stream.
    pub segments: Vec<Segment>,
    /// Whether the tokens after the row are read at another time of the epoch.
    pub ends_chunk: bool,
}

/// A pass, reduced to its decoding. Its size does not depend on the corpus.
#[allow(missing_debug_implementations)] // holds functions
pub struct Simulated<'a> {
    /// The grouping of rows.
    pub grouping: Grouping,
    /// Number of steps of the pass.
    pub steps: u64,
    /// Gives the reads of a rank's rows at a step. `None` stands for padding.
    pub rows: &'a dyn Fn(u64, u64) -> Result<Vec<Option<RowSegments>>>,
    /// Gives the block of a source with a stream token.
    pub block_at: &'a dyn Fn(usize, u64) -> BlockPlace,
    /// Gives the tokens in the files per token of a source's stream.
    pub tokens_per_stream_token: &'a dyn Fn(usize) -> f64,
    /// Number of steps in which all windows are read once.
    pub round: u64,
    /// Bytes of room for decoded blocks.
    pub cache_bytes: u64,
    /// Number of batches computed ahead.
    pub prefetch: u64,
    /// Number of batches whose blocks are decoded ahead. 0 without workers.
    pub decoded_ahead: u64,
    /// Number of tokens of a source that a rank reads while its rows go through two windows.
    pub done_after: u64,
    /// Most rows to simulate, such as [`MOST_ROWS`].
    pub most_rows: u64,
}

impl Simulated<'_> {
    /// Simulates the decoding of the ranks.
    pub fn decoding(&self) -> Result<Decoding> {
        let Grouping { rank, world_size, batch_size, .. } = self.grouping;
        let rank_rows = self.steps.saturating_mul(batch_size);
        if rank_rows.saturating_mul(world_size) <= self.most_rows {
            let mut total = StepCounts::default();
            for rank in 0..world_size {
                let mut one = Simulation::new(self, rank, 0);
                one.run(self.steps)?;
                total.add(&one.counts);
            }
            return Ok(Decoding { ranks: world_size, whole_pass: true, ..total.decoding(0) });
        }
        if rank_rows <= self.most_rows {
            let mut one = Simulation::new(self, rank, 0);
            one.run(self.steps)?;
            return Ok(Decoding { ranks: 1, whole_pass: true, ..one.counts.decoding(0) });
        }

        // The part begins in the middle of the pass. The rows before it fill the cache to its usual
        // state.
        let half = (self.most_rows / 2 / batch_size).max(1);
        let round = self.round.max(1);
        let begin = (self.steps / 2).min(self.steps.saturating_sub(2 * half));
        let mut one = Simulation::new(self, rank, begin);
        while one.step < begin + half && (one.step < begin + round || !one.evicted) {
            one.run((one.step + round.min(64)).min(begin + half))?;
        }
        let warm_up_rows = one.counts.rows;
        one.counts = StepCounts::default();
        // It has whole rounds of windows, if one fits. A round decodes more at its start than at
        // its end.
        let measured = if round <= half { half / round * round } else { half };
        one.run((one.step + measured).min(self.steps))?;
        Ok(Decoding { ranks: 1, whole_pass: false, ..one.counts.decoding(warm_up_rows) })
    }

    /// The blocks that the rows of a rank read at a step.
    fn blocks_of(&self, rank: u64, step: u64) -> Result<StepBlocks> {
        let rows = (self.rows)(rank, step)?;
        let mut found = StepBlocks { rows: rows.len() as u64, ..StepBlocks::default() };
        for RowSegments { source, segments, ends_chunk } in rows.into_iter().flatten() {
            for (index, segment) in segments.iter().enumerate() {
                let ends_chunk = ends_chunk && index + 1 == segments.len();
                self.read(&mut found, source, segment.stream(), ends_chunk);
            }
        }
        Ok(found)
    }

    /// Adds the blocks with `tokens` of a source's stream.
    fn read(&self, found: &mut StepBlocks, source: usize, tokens: Range<u64>, ends_chunk: bool) {
        found.delivered_tokens += (tokens.end - tokens.start) as f64 * (self.tokens_per_stream_token)(source);
        let mut at = tokens.start;
        while at < tokens.end {
            let place = (self.block_at)(source, at);
            let end = place.start + place.len;
            let read = tokens.end.min(end) - at;
            // `Reader::fill` does the same: if the last row of a chunk runs on into a block, it
            // decodes only the part of the block that it needs.
            let prefix = (ends_chunk && place.start > tokens.start)
                .then(|| (tokens.end.min(end) - place.start).min(place.tokens));
            found.blocks.push(BlockUse { source, place, read, prefix });
            at = end;
        }
    }
}

/// The blocks that a rank reads at one step.
#[derive(Debug, Default)]
struct StepBlocks {
    blocks: Vec<BlockUse>,
    rows: u64,
    delivered_tokens: f64,
}

#[derive(Debug)]
struct BlockUse {
    source: usize,
    place: BlockPlace,
    /// Number of tokens read.
    read: u64,
    /// Number of tokens decoded, if the block is not kept.
    prefix: Option<u64>,
}

/// A simulated rank. It has no blocks, but follows the policy of the cache, and has one worker that
/// always has time to decode ahead.
struct Simulation<'a> {
    of: &'a Simulated<'a>,
    rank: u64,
    policy: EvictionPolicy<(usize, u64)>,
    session: SessionId,
    /// The next step.
    step: u64,
    /// The blocks of the next step and of later steps that were examined.
    coming: VecDeque<StepBlocks>,
    /// The first step that may miss a block.
    looked_at: u64,
    /// Number of steps that may be examined once more, so that the work stays bounded.
    second_looks: u64,
    evicted: bool,
    counts: StepCounts,
}

#[derive(Debug, Default)]
struct StepCounts {
    rows: u64,
    delivered_tokens: f64,
    decoded_blocks: u64,
    decoded_tokens: u64,
}

impl<'a> Simulation<'a> {
    fn new(of: &'a Simulated<'a>, rank: u64, step: u64) -> Self {
        let mut policy = EvictionPolicy::new();
        let session = policy.join(u64::MAX);
        policy.begin(session, step, of.done_after);
        let (coming, counts) = (VecDeque::new(), StepCounts::default());
        Self { of, rank, policy, session, step, coming, looked_at: step, second_looks: 0, evicted: false, counts }
    }

    /// Runs all steps before `end`.
    fn run(&mut self, end: u64) -> Result<()> {
        while self.step < end {
            let done = self.step.saturating_sub(self.of.prefetch);
            self.second_looks += 4;
            if self.policy.reached(self.session, done) && self.second_looks > self.coming.len() as u64 {
                self.second_looks -= self.coming.len() as u64;
                self.looked_at = self.step;
            }
            self.decode_ahead()?;
            self.look_at(self.step)?;
            let StepBlocks { blocks, rows, delivered_tokens } = self.coming.pop_front().expect("it was looked at");
            self.counts.rows += rows;
            self.counts.delivered_tokens += delivered_tokens;
            for BlockUse { source, place, read, prefix } in blocks {
                if self.policy.read((source, place.block), source, read).is_some() {
                    continue;
                }
                match prefix {
                    Some(tokens) => self.count(tokens),
                    None => self.load(source, &place, None),
                }
            }
            self.step += 1;
        }
        Ok(())
    }

    /// Decodes the blocks of coming steps, in their order. Stops when only blocks that are needed
    /// earlier could be evicted.
    fn decode_ahead(&mut self) -> Result<()> {
        let end = self.step.saturating_add(self.of.decoded_ahead).min(self.of.steps);
        for step in self.looked_at.max(self.step)..end {
            self.look_at(step)?;
            let blocks = std::mem::take(&mut self.coming[(step - self.step) as usize].blocks);
            let has_room = blocks.iter().filter(|block| block.prefix.is_none()).all(|block| {
                if let Some(slot) = self.policy.find((block.source, block.place.block)) {
                    self.policy.need(self.session, slot, step);
                    return true;
                }
                let has_room = self.policy.has_idle_room(block.place.bytes, self.of.cache_bytes);
                if has_room {
                    self.load(block.source, &block.place, Some(step));
                }
                has_room
            });
            self.coming[(step - self.step) as usize].blocks = blocks;
            if !has_room {
                return Ok(());
            }
            self.looked_at = step + 1;
        }
        Ok(())
    }

    /// Finds the blocks of a step and of all earlier steps.
    fn look_at(&mut self, step: u64) -> Result<()> {
        while self.step + (self.coming.len() as u64) <= step {
            let blocks = self.of.blocks_of(self.rank, self.step + self.coming.len() as u64)?;
            self.coming.push_back(blocks);
        }
        Ok(())
    }

    fn load(&mut self, source: usize, place: &BlockPlace, needed_at: Option<u64>) {
        self.count(place.tokens);
        let suiting = place.bytes..=place.bytes + place.bytes / 4;
        while self.policy.used_bytes() + place.bytes > self.of.cache_bytes && self.policy.evict(&suiting).is_some() {
            self.evicted = true;
        }
        let slot = self.policy.insert((source, place.block), source, place.bytes);
        if let Some(step) = needed_at {
            self.policy.need(self.session, slot, step);
        }
        self.policy.loaded(slot);
    }

    fn count(&mut self, tokens: u64) {
        self.counts.decoded_blocks += 1;
        self.counts.decoded_tokens += tokens;
    }
}

impl StepCounts {
    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.delivered_tokens += other.delivered_tokens;
        self.decoded_blocks += other.decoded_blocks;
        self.decoded_tokens += other.decoded_tokens;
    }

    fn decoding(&self, warm_up_rows: u64) -> Decoding {
        Decoding {
            amplification: self.decoded_tokens as f64 / self.delivered_tokens.max(1.0),
            blocks: self.decoded_blocks,
            tokens: self.decoded_tokens,
            ranks: 0,
            rows: self.rows,
            warm_up_rows,
            whole_pass: false,
        }
    }
}

impl Distance {
    fn of(mut distances: Vec<u64>, expected_mean: f64) -> Self {
        distances.sort_unstable();
        let count = distances.len();
        let quantile = |share: f64| {
            distances.get(((count as f64 * share) as usize).min(count.saturating_sub(1))).copied().unwrap_or(0)
        };
        let sum: f64 = distances.iter().map(|distance| *distance as f64).sum();
        Self {
            expected_mean,
            mean: if count > 0 { sum / count as f64 } else { 0.0 },
            p50: quantile(0.5),
            p95: quantile(0.95),
            sampled: count as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates a corpus of equal blocks, in sequences of 16 tokens.
    fn decoding(arrangement: Arrangement, world_size: u64, cache_blocks: u64, most_rows: u64) -> Decoding {
        const BLOCK: u64 = 200;
        let sequences = 200_000;
        let grouping = Grouping { batch_size: 4, rank: 0, world_size, remainder: Remainder::Drop };
        let order = EpochOrder::new(sequences, arrangement, 7, 0);
        let rows = |rank: u64, step: u64| {
            let read = |row: u64| {
                let sequence = order.sequence_at(step * 4 * world_size + row * world_size + rank);
                let segments = vec![Segment::joined(sequence * 16, 16, 0)];
                Some(RowSegments { source: 0, segments, ends_chunk: order.ends_chunk(sequence) })
            };
            Ok((0..4).map(read).collect())
        };
        let block_at = |_, at: u64| {
            let block = at / BLOCK;
            BlockPlace { block, start: block * BLOCK, len: BLOCK, tokens: BLOCK, bytes: BLOCK * 4 }
        };
        let round = if let Arrangement::Block { lanes, window, .. } = arrangement { lanes * window } else { 1 };
        let simulated = Simulated {
            grouping,
            steps: grouping.steps(sequences),
            rows: &rows,
            block_at: &block_at,
            tokens_per_stream_token: &|_| 1.0,
            round: round.div_ceil(grouping.global_batch()),
            cache_bytes: cache_blocks * BLOCK * 4,
            prefetch: 4,
            decoded_ahead: 1600u64.div_ceil(grouping.global_batch()).clamp(8, 4096),
            done_after: 2 * 25_600 / world_size,
            most_rows,
        };
        simulated.decoding().unwrap()
    }

    #[test]
    fn a_part_of_a_pass_stands_for_the_whole() {
        let block = |lanes| Arrangement::block(200_000, 16, 6400, 25_600, lanes);
        for (arrangement, world_size, cache_blocks) in [
            (Arrangement::Sequential, 1, 10),
            (Arrangement::Sequential, 4, 10),
            (Arrangement::Global, 2, 100),
            (Arrangement::Global, 2, 8000),
            (block(8), 1, 250),
            (block(8), 1, 60),
            (block(8), 4, 100),
            (block(8), 3, 100),
        ] {
            let whole = decoding(arrangement, world_size, cache_blocks, 1 << 30);
            assert!(whole.whole_pass && whole.ranks == world_size && whole.amplification >= 1.0);
            let part = decoding(arrangement, world_size, cache_blocks, 40_000);
            assert!(!part.whole_pass && part.rows + part.warm_up_rows <= 40_000, "{part:?}");
            assert!(part.rows >= 10_000, "{part:?}");
            let ratio = part.amplification / whole.amplification;
            assert!(
                (0.93..1.07).contains(&ratio),
                "{arrangement:?} {world_size} {cache_blocks}: {part:?} of {whole:?}"
            );
        }
    }
}
