//! Plan: what a pass comes to and costs, before it is run.
//!
//! Takes counts, arrangements, the grouping and ways to ask what rows read and where blocks lie; gives the remainder in numbers, how far the order
//! moves sequences, how often blocks are decoded, and the memory by part. Reads no token and opens no shard. The work is bounded whatever the corpus:
//! what is not counted in closed form is sampled or simulated over at most [`MOST_ROWS`] rows, and says over how many.

mod of_loader;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::error::Result;
use crate::layout::Segment;
use crate::order::partition::Grouping;
use crate::order::permutation::Permutation;
use crate::order::{Arrangement, EpochOrder};
pub use crate::read::BlockPlace;
use crate::settings::Remainder;

/// Rows simulated at most: about a second of work.
pub const MOST_ROWS: u64 = 1 << 20;
/// Positions looked at for the distances.
const SAMPLED_POSITIONS: u64 = 1 << 16;
/// Keys the sample of positions; any number would do.
const SAMPLE_KEY: u64 = 1;

/// What a run with some settings comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The corpus and its order; those of a mixture.
    pub sources: Vec<SourcePlan>,
    /// One pass, over all ranks.
    pub pass: PassPlan,
    /// How often blocks are decoded; `None` where tokens are read in place.
    pub decoding: Option<Decoding>,
    /// Memory of one rank.
    pub memory: MemoryPlan,
}

/// What is known of one source.
#[derive(Clone, Debug, PartialEq)]
pub struct SourcePlan {
    /// Its name in a mixture, else nothing.
    pub name: String,
    /// Files.
    pub shards: u64,
    /// Of these, how many are open.
    pub open_shards: u64,
    /// Blocks in them that hold tokens.
    pub blocks: u64,
    /// Documents that hold tokens.
    pub documents: u64,
    /// Tokens in the files.
    pub tokens: u64,
    /// Tokens of the stream, `bos_id` and `eos_id` included.
    pub stream_tokens: u64,
    /// Full sequences of one of its epochs, on the side of a holdout that is delivered.
    pub sequences: u64,
    /// Full sequences on the other side.
    pub held_out_sequences: u64,
    /// Tokens after the full sequences.
    pub tail_tokens: u64,
    /// Sequences drawn from it in the pass; `None` where the pass has no end.
    pub drawn_sequences: Option<u64>,
    /// How the sequences are arranged.
    pub arrangement: Arrangement,
    /// How far sequences are moved from their places in the corpus.
    pub displacement: Distance,
    /// How far apart sequences come to stand that follow each other in the corpus.
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
    /// What 95 % of the sample do not exceed.
    pub p95: u64,
    /// Distances in the sample; 0 where the arrangement leaves nothing to be sampled.
    pub sampled: u64,
}

/// The decoding of a simulated pass, or of a part of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decoding {
    /// Tokens decoded by all ranks together per token that they deliver.
    pub amplification: f64,
    /// Blocks decoded by the simulated ranks, prefixes included.
    pub blocks: u64,
    /// Tokens decoded by the simulated ranks.
    pub tokens: u64,
    /// Ranks that were simulated; all of them, or one that stands for all.
    pub ranks: u64,
    /// Rows that they were given.
    pub rows: u64,
    /// Rows that were simulated before these, to fill the cache.
    pub warm_up_rows: u64,
    /// Whether these rows are the whole pass of these ranks.
    pub whole_pass: bool,
}

/// What one pass delivers, all ranks together. A pass without end has no steps to count, and no remainder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassPlan {
    /// Steps, the same on every rank.
    pub steps: Option<u64>,
    /// Rows of a step over all ranks.
    pub global_batch: u64,
    /// Data-parallel ranks.
    pub world_size: u64,
    /// Ranks that draw from the same lanes, and so from the same blocks.
    pub sharing_ranks: u64,
    /// The rule for what follows.
    pub remainder: Remainder,
    /// Positions delivered, each counted once.
    pub delivered_rows: u64,
    /// Of these, how many are tails, which fill no row.
    pub delivered_tails: u64,
    /// Tokens delivered, each counted once.
    pub delivered_tokens: u64,
    /// Full sequences left out by the remainder rule.
    pub dropped_sequences: u64,
    /// Tokens left out by it, those of dropped sequences included.
    pub dropped_tokens: u64,
    /// Rows of nothing but padding.
    pub padded_rows: u64,
    /// Places filled with `pad_id`, in these rows and after tails.
    pub padded_tokens: u64,
    /// Rows given a second time.
    pub repeated_rows: u64,
    /// Tokens given a second time, in these rows and after tails.
    pub repeated_tokens: u64,
    /// Rows of the last step over all ranks.
    pub last_batch_rows: u64,
    /// Positions after the last step that `max_steps` allows.
    pub cut_rows: u64,
}

/// What a pass consists of, for [`PassPlan::new`].
#[derive(Clone, Copy, Debug, Default)]
pub struct PassCounts {
    /// Positions, without those that are skipped; none where there is no end.
    pub rows: Option<u64>,
    /// Of the delivered ones, how many are tails.
    pub delivered_tails: u64,
    /// Tokens of a tail that a row has to deliver.
    pub tail_tokens: u64,
    /// Tokens that stand in no position.
    pub rowless_tokens: u64,
    /// Tokens of a full row.
    pub seq_len: u64,
    /// Steps allowed.
    pub max_steps: Option<u64>,
}

/// Bytes of one rank by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// One batch.
    pub batch_bytes: u64,
    /// Batches begun, ready, or held by a consumer that holds one.
    pub batches_bytes: u64,
    /// Decoded blocks that worker threads hold while they fill from them.
    pub held_blocks_bytes: u64,
    /// Decoded blocks in the cache: the room for them, or all there are.
    pub cache_bytes: u64,
    /// Tables of shards, blocks and pages. Not part of the budget.
    pub index_bytes: u64,
    /// The setting `memory_budget`.
    pub budget_bytes: u64,
}

impl MemoryPlan {
    /// What stands against the budget.
    pub fn budgeted_bytes(&self) -> u64 {
        self.batches_bytes + self.held_blocks_bytes + self.cache_bytes
    }
}

impl PassPlan {
    /// Steps of a pass of so many rows, and how many rows they deliver.
    pub fn steps(grouping: &Grouping, rows: Option<u64>, max_steps: Option<u64>) -> Option<(u64, u64)> {
        let steps = rows.map(|rows| grouping.steps(rows)).into_iter().chain(max_steps).min()?;
        let places = steps.saturating_mul(grouping.global_batch());
        Some((steps, rows.map_or(places, |rows| rows.min(places))))
    }

    /// A pass of `counts`, `lanes` of which hold the blocks that ranks have in common; 1 where there are none.
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

/// How far `order` moves sequences. Both shufflings spread a sequence over the whole corpus; they differ in [`neighbours`].
pub fn displacement(order: &EpochOrder, arrangement: Arrangement) -> Distance {
    let n = order.len();
    let expected_mean = match arrangement {
        Arrangement::Sequential => 0.0,
        // Two independent places of n: (n^2 - 1) / 3n. Permuted chunks are as far away as permuted sequences.
        Arrangement::Global | Arrangement::Block { .. } => (n as f64 - 1.0 / n.max(1) as f64) / 3.0,
    };
    let sample = Permutation::new(n.max(1), SAMPLE_KEY);
    let distances = (0..n.min(SAMPLED_POSITIONS)).map(|index| {
        let position = sample.apply(index);
        order.sequence_at(position).abs_diff(position)
    });
    Distance::of(distances.collect(), expected_mean)
}

/// How far apart neighbours of the corpus come to stand, where they are in one window.
pub fn neighbours(order: &EpochOrder, arrangement: Arrangement) -> Distance {
    let n = order.len();
    let (lanes, window) = match arrangement {
        Arrangement::Sequential => return Distance { expected_mean: 1.0, mean: 1.0, p50: 1, p95: 1, sampled: 0 },
        Arrangement::Global => (1, n),
        Arrangement::Block { lanes, window, .. } => (lanes, window.min(n / lanes)),
    };
    let expected_mean = lanes as f64 * (window as f64 + 1.0) / 3.0;
    if window > SAMPLED_POSITIONS {
        // The closed form is all there is: too few neighbours would be among a sample.
        return Distance { expected_mean, ..Distance::default() };
    }
    // Lane 0 has no phase: its windows are the multiples of `window`. It has at least n / lanes places.
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

/// What a row reads.
#[derive(Clone, Debug)]
pub struct Reads {
    /// The source.
    pub source: usize,
    /// Stretches of its stream.
    pub segments: Vec<Segment>,
    /// Whether the tokens after it belong to another time of the epoch.
    pub ends_chunk: bool,
}

/// A pass, as far as its decoding goes. Nothing in it grows with the corpus.
#[allow(missing_debug_implementations)] // holds functions
pub struct Simulated<'a> {
    /// How rows are grouped.
    pub grouping: Grouping,
    /// Steps of the pass.
    pub steps: u64,
    /// What a rank's rows of a step read; nothing for padding.
    pub rows: &'a dyn Fn(u64, u64) -> Result<Vec<Option<Reads>>>,
    /// The block of a source that holds a stream token.
    pub block_at: &'a dyn Fn(usize, u64) -> BlockPlace,
    /// Tokens of its files per token of a source's stream.
    pub tokens_per_stream_token: &'a dyn Fn(usize) -> f64,
    /// Steps after which all windows have been through.
    pub round: u64,
    /// Room for decoded blocks.
    pub cache_bytes: u64,
    /// Rows to simulate at most, such as [`MOST_ROWS`].
    pub most_rows: u64,
}

impl Simulated<'_> {
    /// Decodes in thought what the ranks would decode.
    pub fn decoding(&self) -> Result<Decoding> {
        let Grouping { rank, world_size, batch_size, .. } = self.grouping;
        let rank_rows = self.steps.saturating_mul(batch_size);
        let mut total = Cache::default();
        if rank_rows.saturating_mul(world_size) <= self.most_rows {
            for rank in 0..world_size {
                let mut one = Cache::default();
                self.simulate(&mut one, rank, 0..self.steps)?;
                total.add(&one);
            }
            return Ok(Decoding { ranks: world_size, whole_pass: true, ..total.decoding(0) });
        }
        if rank_rows <= self.most_rows {
            self.simulate(&mut total, rank, 0..self.steps)?;
            return Ok(Decoding { ranks: 1, whole_pass: true, ..total.decoding(0) });
        }

        // From the middle of the pass, after as many rows as bring the cache to what it holds from then on.
        let half = (self.most_rows / 2 / batch_size).max(1);
        let round = self.round.max(1);
        let begin = (self.steps / 2).min(self.steps.saturating_sub(2 * half));
        let mut warm = begin;
        while warm < begin + half && (warm < begin + round || !total.evicted) {
            let end = (warm + round.min(64)).min(begin + half);
            self.simulate(&mut total, rank, warm..end)?;
            warm = end;
        }
        let warm_up_rows = total.rows;
        total.forget_counts();
        // Whole rounds of windows, where one fits: a part of a round decodes more at its start than at its end.
        let measured = if round <= half { half / round * round } else { half };
        self.simulate(&mut total, rank, warm..(warm + measured).min(self.steps))?;
        Ok(Decoding { ranks: 1, whole_pass: false, ..total.decoding(warm_up_rows) })
    }

    fn simulate(&self, cache: &mut Cache, rank: u64, steps: Range<u64>) -> Result<()> {
        for step in steps {
            for row in (self.rows)(rank, step)? {
                cache.rows += 1;
                let Some(Reads { source, segments, ends_chunk }) = row else { continue };
                for (index, segment) in segments.iter().enumerate() {
                    let ends_chunk = ends_chunk && index + 1 == segments.len();
                    self.read(cache, source, segment.stream(), ends_chunk);
                }
            }
        }
        Ok(())
    }

    /// Reads `tokens` of a source's stream in thought.
    fn read(&self, cache: &mut Cache, source: usize, tokens: Range<u64>, ends_chunk: bool) {
        cache.delivered_tokens += (tokens.end - tokens.start) as f64 * (self.tokens_per_stream_token)(source);
        let mut at = tokens.start;
        while at < tokens.end {
            let place = (self.block_at)(source, at);
            // As `Reader::fill`: a block that a chunk's last row only runs on into is read no further than that.
            let prefix = (ends_chunk && place.start > tokens.start)
                .then(|| (tokens.end.min(place.start + place.len) - place.start).min(place.tokens));
            cache.read(source, place, prefix, self.cache_bytes);
            at = place.start + place.len;
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

/// A block cache without blocks: what [`crate::read`] does, counted.
#[derive(Debug, Default)]
struct Cache {
    /// Block to its bytes and the time of its last use.
    held: HashMap<(usize, u64), (u64, u64)>,
    by_use: BTreeMap<u64, (usize, u64)>,
    used_bytes: u64,
    clock: u64,
    evicted: bool,
    rows: u64,
    delivered_tokens: f64,
    decoded_blocks: u64,
    decoded_tokens: u64,
}

impl Cache {
    fn read(&mut self, source: usize, place: BlockPlace, prefix: Option<u64>, budget_bytes: u64) {
        self.clock += 1;
        let key = (source, place.block);
        if let Some((_, used_at)) = self.held.get_mut(&key) {
            self.by_use.remove(&std::mem::replace(used_at, self.clock));
            self.by_use.insert(self.clock, key);
            return;
        }
        self.decoded_blocks += 1;
        self.decoded_tokens += prefix.unwrap_or(place.tokens);
        if prefix.is_some() {
            return;
        }
        while self.used_bytes + place.bytes > budget_bytes {
            let Some((_, block)) = self.by_use.pop_first() else { break };
            let (bytes, _) = self.held.remove(&block).expect("both tables hold the same blocks");
            self.used_bytes -= bytes;
            self.evicted = true;
        }
        self.held.insert(key, (place.bytes, self.clock));
        self.by_use.insert(self.clock, key);
        self.used_bytes += place.bytes;
    }

    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.delivered_tokens += other.delivered_tokens;
        self.decoded_blocks += other.decoded_blocks;
        self.decoded_tokens += other.decoded_tokens;
    }

    fn forget_counts(&mut self) {
        (self.rows, self.delivered_tokens, self.decoded_blocks, self.decoded_tokens) = (0, 0.0, 0, 0);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A corpus of equal blocks, in sequences of 16 tokens.
    fn decoding(arrangement: Arrangement, world_size: u64, cache_blocks: u64, most_rows: u64) -> Decoding {
        const BLOCK: u64 = 200;
        let sequences = 200_000;
        let grouping = Grouping { batch_size: 4, rank: 0, world_size, remainder: Remainder::Drop };
        let order = EpochOrder::new(sequences, arrangement, 7, 0);
        let rows = |rank: u64, step: u64| {
            let read = |row: u64| {
                let sequence = order.sequence_at(step * 4 * world_size + row * world_size + rank);
                let segments = vec![Segment::joined(sequence * 16, 16, 0)];
                Some(Reads { source: 0, segments, ends_chunk: order.ends_chunk(sequence) })
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
