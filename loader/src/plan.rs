//! Plan: what an epoch comes to and costs, before it is run.
//!
//! Takes counts, the arrangement, the grouping and a way to ask where blocks lie; gives the remainder in numbers, how far the order moves
//! sequences, how often blocks are decoded, and the memory by part. Reads no token. The work is bounded whatever the corpus: what is not
//! counted in closed form is sampled or simulated over at most [`MOST_ROWS`] rows, and says over how many.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::config::Remainder;
use crate::error::Result;
use crate::order::partition::{Grouping, Row};
use crate::order::permutation::Permutation;
use crate::order::{Arrangement, EpochOrder};
pub use crate::read::Place;

/// Rows simulated at most: about a second of work.
pub const MOST_ROWS: u64 = 1 << 20;
/// Positions looked at for the distances.
const SAMPLED_POSITIONS: u64 = 1 << 16;
/// Keys the sample of positions; any number would do.
const SAMPLE_KEY: u64 = 1;

/// What a run with some settings comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The corpora and their orders; one where there is no mixture.
    pub sources: Vec<SourcePlan>,
    /// One epoch, over all ranks; none where it has no end.
    pub epoch: Option<EpochPlan>,
    /// Memory of one rank.
    pub memory: MemoryPlan,
}

/// What is known of one source.
#[derive(Clone, Debug, PartialEq)]
pub struct SourcePlan {
    /// Its name; empty where there is no mixture.
    pub name: String,
    /// Format of its first shard.
    pub format: &'static str,
    /// What a mixture draws from it.
    pub drawn: Option<Drawn>,
    /// Files.
    pub shards: u64,
    /// Blocks in them that hold tokens.
    pub blocks: u64,
    /// Documents that hold tokens.
    pub documents: u64,
    /// Tokens in the files.
    pub tokens: u64,
    /// Tokens of the stream, `bos_id` and `eos_id` included.
    pub stream_tokens: u64,
    /// Full sequences.
    pub sequences: u64,
    /// Tokens after them.
    pub tail_tokens: u64,
    /// How the sequences are arranged.
    pub arrangement: Arrangement,
    /// How far sequences are moved from their places in the corpus.
    pub displacement: Distance,
    /// How far apart sequences come to stand that follow each other in the corpus.
    pub neighbours: Distance,
    /// How often blocks are decoded; `None` where tokens are read in place.
    pub decoding: Option<Decoding>,
}

/// A source's part in an epoch of a mixture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Its sequences; none where the epoch has no end.
    pub sequences: Option<u64>,
    /// Epochs of the source that these are.
    pub epochs: Option<f64>,
    /// Part of all sequences, or of the first 2^32.
    pub share: f64,
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

/// A simulated epoch's decoding, or a part of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decoding {
    /// Tokens decoded by all ranks together per token of the corpus.
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
    /// Whether these rows are the whole epoch of these ranks.
    pub whole_epoch: bool,
    /// Ranks that draw from the same lanes and so decode the same blocks.
    pub sharing_ranks: u64,
}

/// What one epoch delivers, all ranks together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochPlan {
    /// Steps, the same on every rank.
    pub steps: u64,
    /// Rows of a step over all ranks.
    pub global_batch: u64,
    /// Data-parallel ranks.
    pub world_size: u64,
    /// The rule for what follows.
    pub remainder: Remainder,
    /// Tokens delivered, each counted once.
    pub delivered_tokens: u64,
    /// Full sequences left out.
    pub dropped_sequences: u64,
    /// Tokens left out, those of dropped sequences included.
    pub dropped_tokens: u64,
    /// Rows of nothing but padding.
    pub padded_rows: u64,
    /// Places filled with `pad_id`, in these rows and after the tail.
    pub padded_tokens: u64,
    /// Rows given a second time.
    pub repeated_rows: u64,
    /// Tokens given a second time, in these rows and after the tail.
    pub repeated_tokens: u64,
    /// Rows of the last step over all ranks.
    pub last_batch_rows: u64,
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

impl EpochPlan {
    /// An epoch of `sequences` full sequences and `tail_tokens` after them.
    pub fn new(grouping: &Grouping, sequences: u64, tail_tokens: u64, stream_tokens: u64, seq_len: u64) -> Self {
        let global_batch = grouping.global_batch();
        let tail = u64::from(tail_tokens > 0);
        let positions = grouping.positions(sequences, tail > 0);
        let steps = grouping.steps(positions);
        let mut plan = Self {
            steps,
            global_batch,
            world_size: grouping.world_size,
            remainder: grouping.remainder,
            delivered_tokens: sequences * seq_len + tail_tokens,
            dropped_sequences: 0,
            dropped_tokens: 0,
            padded_rows: 0,
            padded_tokens: 0,
            repeated_rows: 0,
            repeated_tokens: 0,
            last_batch_rows: global_batch.min(positions),
        };
        // Places of the tail's row, and of the last step, that hold no token of their own.
        let after_tail = tail * seq_len.saturating_sub(tail_tokens);
        let rows_short = steps * global_batch - positions.min(steps * global_batch);
        match grouping.remainder {
            Remainder::Drop => {
                plan.dropped_sequences = sequences - steps * global_batch;
                plan.delivered_tokens = steps * global_batch * seq_len;
                plan.dropped_tokens = stream_tokens.saturating_sub(plan.delivered_tokens);
            }
            Remainder::Pad => {
                plan.padded_rows = rows_short;
                plan.padded_tokens = rows_short * seq_len + after_tail;
            }
            Remainder::Wrap => {
                plan.repeated_rows = rows_short;
                plan.repeated_tokens = rows_short * seq_len + after_tail;
            }
            Remainder::Short => {
                plan.padded_tokens = after_tail;
                plan.last_batch_rows = global_batch - rows_short;
            }
        }
        plan
    }
}

/// One source, as far as its order and its decoding go. Nothing in it grows with the corpus.
#[allow(missing_debug_implementations)] // holds functions
pub struct Source<'a> {
    /// Full sequences.
    pub sequences: u64,
    /// Tokens after them.
    pub tail_tokens: u64,
    /// How the sequences are arranged.
    pub arrangement: Arrangement,
    /// The order that this gives in one epoch.
    pub order: EpochOrder,
    /// How positions are grouped.
    pub grouping: Grouping,
    /// Stream tokens that the row of a sequence reads.
    pub row: &'a dyn Fn(u64) -> Range<u64>,
    /// The block that holds a stream token.
    pub place: &'a dyn Fn(u64) -> Result<Place>,
    /// Room for decoded blocks.
    pub cache_bytes: u64,
    /// Tokens in the files.
    pub tokens: u64,
    /// Tokens of the stream.
    pub stream_tokens: u64,
    /// Rows to simulate at most, such as [`MOST_ROWS`].
    pub most_rows: u64,
}

impl Source<'_> {
    /// How far sequences are moved. Both shufflings spread a sequence over the whole corpus; they differ in [`Source::neighbours`].
    pub fn displacement(&self) -> Distance {
        let n = self.sequences;
        let expected_mean = match self.arrangement {
            Arrangement::Sequential => 0.0,
            // Two independent places of n: (n^2 - 1) / 3n. Permuted chunks are as far away as permuted sequences.
            Arrangement::Global | Arrangement::Block { .. } => (n as f64 - 1.0 / n.max(1) as f64) / 3.0,
        };
        let sample = Permutation::new(n.max(1), SAMPLE_KEY);
        let distances = (0..n.min(SAMPLED_POSITIONS)).map(|index| {
            let position = sample.apply(index);
            self.order.sequence_at(position).abs_diff(position)
        });
        Distance::of(distances.collect(), expected_mean)
    }

    /// How far apart neighbours of the corpus come to stand, where they are in one window.
    pub fn neighbours(&self) -> Distance {
        let n = self.sequences;
        let (lanes, window) = match self.arrangement {
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
            let mut placed: Vec<(u64, u64)> = (index * window..(index + 1) * window)
                .map(|at| (self.order.sequence_at(at * lanes), at * lanes))
                .collect();
            placed.sort_unstable();
            let neighbours = placed.windows(2).filter(|pair| pair[0].0 + 1 == pair[1].0);
            distances.extend(neighbours.map(|pair| pair[0].1.abs_diff(pair[1].1)));
        }
        Distance::of(distances, expected_mean)
    }

    /// Decodes in thought what the ranks would decode.
    pub fn decoding(&self) -> Result<Decoding> {
        let grouping = self.grouping;
        let positions = grouping.positions(self.sequences, self.tail_tokens > 0);
        let steps = grouping.steps(positions);
        let rank_rows = steps * grouping.batch_size;
        let mut total = Simulation::default();
        if rank_rows * grouping.world_size <= self.most_rows {
            for rank in 0..grouping.world_size {
                let mut one = Simulation::default();
                self.simulate(&mut one, Grouping { rank, ..grouping }, 0..steps, positions)?;
                total.add(&one);
            }
            return Ok(Decoding {
                amplification: total.decoded_tokens as f64 / self.tokens.max(1) as f64,
                ranks: grouping.world_size,
                whole_epoch: true,
                ..self.counted(&total, 0)
            });
        }

        let half = (self.most_rows / 2 / grouping.batch_size).max(1);
        if rank_rows <= self.most_rows {
            self.simulate(&mut total, grouping, 0..steps, positions)?;
            return Ok(Decoding {
                amplification: self.share(&total),
                ranks: 1,
                whole_epoch: true,
                ..self.counted(&total, 0)
            });
        }
        // From the middle of the epoch, after as many rows as bring the cache to what it holds from then on.
        let round = match self.arrangement {
            Arrangement::Block { lanes, window, .. } => (lanes * window).div_ceil(grouping.global_batch()).max(1),
            Arrangement::Sequential | Arrangement::Global => 1,
        };
        let begin = (steps / 2).min(steps.saturating_sub(2 * half));
        let mut warm = begin;
        while warm < begin + half && (warm < begin + round || !total.evicted) {
            let end = (warm + round.min(64)).min(begin + half);
            self.simulate(&mut total, grouping, warm..end, positions)?;
            warm = end;
        }
        let warm_up_rows = total.rows;
        total.forget_counts();
        // Whole rounds of windows, where one fits: a part of a round decodes more at its start than at its end.
        let measured = if round <= half { half / round * round } else { half };
        self.simulate(&mut total, grouping, warm..(warm + measured).min(steps), positions)?;
        Ok(Decoding {
            amplification: self.share(&total),
            ranks: 1,
            whole_epoch: false,
            ..self.counted(&total, warm_up_rows)
        })
    }

    fn counted(&self, total: &Simulation, warm_up_rows: u64) -> Decoding {
        let sharing_ranks = match self.arrangement {
            Arrangement::Block { lanes, .. } => self.grouping.world_size * self.grouping.lanes(lanes) / lanes,
            Arrangement::Sequential | Arrangement::Global => self.grouping.world_size,
        };
        Decoding {
            amplification: 0.0,
            blocks: total.decoded_blocks,
            tokens: total.decoded_tokens,
            ranks: 0,
            rows: total.rows,
            warm_up_rows,
            whole_epoch: false,
            sharing_ranks,
        }
    }

    /// Decoded tokens per token of the files that the rows delivered.
    fn share(&self, total: &Simulation) -> f64 {
        let delivered = total.delivered_tokens as f64 * self.tokens as f64 / self.stream_tokens.max(1) as f64;
        total.decoded_tokens as f64 / delivered.max(1.0)
    }

    fn simulate(&self, cache: &mut Simulation, grouping: Grouping, steps: Range<u64>, positions: u64) -> Result<()> {
        for step in steps {
            for row in grouping.rows(step * grouping.global_batch(), positions, 0) {
                cache.rows += 1;
                let (Row::Index(position) | Row::Repeated(position)) = row else { continue };
                let full = position < self.sequences;
                let sequence = if full { self.order.sequence_at(position) } else { self.sequences };
                let range = (self.row)(sequence);
                cache.delivered_tokens += range.end - range.start;
                let ends_chunk = full && self.order.ends_chunk(sequence);
                let mut at = range.start;
                while at < range.end {
                    let place = (self.place)(at)?;
                    // As `Reader::fill`: a block that a chunk's last row only runs on into is read no further than that.
                    let prefix =
                        (ends_chunk && place.start > range.start).then(|| range.end.min(place.start + place.len));
                    cache.read(place, prefix.map(|end| (end - place.start).min(place.tokens)), self.cache_bytes);
                    at = place.start + place.len;
                }
            }
        }
        Ok(())
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
struct Simulation {
    /// Block to its bytes and the time of its last use.
    held: HashMap<u64, (u64, u64)>,
    by_use: BTreeMap<u64, u64>,
    used_bytes: u64,
    clock: u64,
    evicted: bool,
    rows: u64,
    delivered_tokens: u64,
    decoded_blocks: u64,
    decoded_tokens: u64,
}

impl Simulation {
    fn read(&mut self, place: Place, prefix: Option<u64>, budget_bytes: u64) {
        self.clock += 1;
        if let Some((_, used_at)) = self.held.get_mut(&place.block) {
            self.by_use.remove(&std::mem::replace(used_at, self.clock));
            self.by_use.insert(self.clock, place.block);
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
        self.held.insert(place.block, (place.bytes, self.clock));
        self.by_use.insert(self.clock, place.block);
        self.used_bytes += place.bytes;
    }

    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.delivered_tokens += other.delivered_tokens;
        self.decoded_blocks += other.decoded_blocks;
        self.decoded_tokens += other.decoded_tokens;
    }

    fn forget_counts(&mut self) {
        (self.rows, self.delivered_tokens, self.decoded_blocks, self.decoded_tokens) = (0, 0, 0, 0);
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
        let place = |at: u64| {
            let block = at / BLOCK;
            Ok(Place { block, start: block * BLOCK, len: BLOCK, tokens: BLOCK, bytes: BLOCK * 4 })
        };
        let source = Source {
            sequences,
            tail_tokens: 0,
            arrangement,
            order: EpochOrder::new(sequences, arrangement, 7, 0),
            grouping,
            row: &|sequence| sequence * 16..(sequence + 1) * 16,
            place: &place,
            cache_bytes: cache_blocks * BLOCK * 4,
            tokens: sequences * 16,
            stream_tokens: sequences * 16,
            most_rows,
        };
        source.decoding().unwrap()
    }

    #[test]
    fn a_part_of_an_epoch_stands_for_the_whole() {
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
            assert!(whole.whole_epoch && whole.ranks == world_size && whole.amplification >= 1.0);
            let part = decoding(arrangement, world_size, cache_blocks, 40_000);
            assert!(!part.whole_epoch && part.rows + part.warm_up_rows <= 40_000, "{part:?}");
            assert!(part.rows >= 10_000, "{part:?}");
            let ratio = part.amplification / whole.amplification;
            assert!(
                (0.93..1.07).contains(&ratio),
                "{arrangement:?} {world_size} {cache_blocks}: {part:?} of {whole:?}"
            );
        }
    }
}
