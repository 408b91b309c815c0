//! Order: decides which sequence stands at which position of an epoch.
//!
//! Takes the number of full sequences, the content settings and the epoch. Gives the sequence at
//! any position, without a list. The order depends on nothing physical: files, blocks and ranks
//! have no influence, so every format gives the same order.
//!
//! `Global` is one keyed permutation. `Block` keeps neighbours near each other, so that few decoded
//! blocks serve many sequences. It permutes *chunks*, runs of consecutive sequences, over the
//! corpus. It cuts the resulting list into equal lanes, and permutes windows inside each lane.
//! Position `p` is on lane `p mod L`. A world size that divides `L` therefore gives each rank whole
//! lanes. Window borders are staggered from lane to lane, so that the lanes do not begin new
//! windows at the same step.
//!
//! [`VERSION`] names the algorithm, and golden tests pin it. A change of the algorithm is a new
//! version.

pub(crate) mod balance;
pub mod bucket;
pub mod epochs;
pub mod holdout;
pub mod mixture;
pub mod partition;
pub mod permutation;

use std::sync::Arc;

use permutation::{Permutation, derive_key};

/// Name and version of the algorithm, saved with every state.
pub const VERSION: &str = "feistel8-1";

// Domains of the keys. They prevent two permutations of an epoch from using the same key.
const EPOCH: u64 = 1;
const GLOBAL: u64 = 2;
const CHUNKS: u64 = 3;
const WINDOW: u64 = 4;
const BUCKET: u64 = 5;

/// Arrangement of the full sequences of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// The order of the corpus.
    Sequential,
    /// One permutation of all sequences.
    Global,
    /// Permuted chunks in lanes, with permuted windows. All counts are numbers of sequences.
    Block {
        /// Consecutive sequences of one chunk, at least 1.
        chunk: u64,
        /// Number of lanes, at least 1.
        lanes: u64,
        /// Sequences of one lane's window, at least 1.
        window: u64,
    },
}

impl Arrangement {
    /// Converts settings that count tokens to the block arrangement of `sequences` sequences of
    /// `seq_len` tokens.
    pub fn block(sequences: u64, seq_len: u64, chunk_tokens: u64, window_tokens: u64, lanes: u64) -> Self {
        let lanes = lanes.min(sequences).max(1);
        Self::Block { chunk: (chunk_tokens / seq_len).max(1), lanes, window: (window_tokens / seq_len / lanes).max(1) }
    }
}

/// The order of one epoch.
#[derive(Clone, Debug)]
pub struct EpochOrder {
    sequences: u64,
    algorithm: Algorithm,
}

#[derive(Clone, Debug)]
enum Algorithm {
    Sequential,
    Global(Permutation),
    Block(BlockOrder),
}

#[derive(Clone, Debug)]
struct BlockOrder {
    key: u64,
    chunk: u64,
    /// The table of chunks, if their lengths differ.
    table: Option<ChunkTable>,
    lanes: u64,
    window: u64,
    chunks: Permutation,
    /// Slot of the last chunk. Only this chunk may be shorter than the others.
    last_slot: u64,
    /// Number of sequences of the last chunk.
    last_len: u64,
}

/// Chunks of different lengths.
#[derive(Clone, Debug)]
struct ChunkTable {
    /// First sequence of each chunk.
    starts: Arc<[u64]>,
    /// Number of sequences before each slot of the permuted chunks.
    before: Arc<[u64]>,
}

impl EpochOrder {
    /// The block order of `epoch` over `sequences` full sequences, in chunks that begin at
    /// `starts`.
    ///
    /// `starts` increases strictly from 0. The order takes 8 bytes per chunk, which clones share.
    pub fn in_chunks(sequences: u64, starts: &Arc<[u64]>, lanes: u64, window: u64, seed: u64, epoch: u64) -> Self {
        if sequences == 0 {
            return Self { sequences, algorithm: Algorithm::Sequential };
        }
        let key = derive_key(seed, &[EPOCH, epoch]);
        let chunks = Permutation::new(starts.len() as u64, derive_key(key, &[CHUNKS]));
        let end_of = |chunk: usize| starts.get(chunk + 1).copied().unwrap_or(sequences);
        let mut sum = 0;
        let before = (0..starts.len() as u64).map(|slot| {
            let chunk = chunks.apply(slot) as usize;
            let start = sum;
            sum += end_of(chunk) - starts[chunk];
            start
        });
        let table = Some(ChunkTable { before: before.collect(), starts: Arc::clone(starts) });
        let block = BlockOrder { key, chunk: 1, table, lanes, window, chunks, last_slot: 0, last_len: 0 };
        Self { sequences, algorithm: Algorithm::Block(block) }
    }

    /// The order of `epoch` over `sequences` full sequences.
    pub fn new(sequences: u64, arrangement: Arrangement, seed: u64, epoch: u64) -> Self {
        let key = derive_key(seed, &[EPOCH, epoch]);
        let algorithm = match arrangement {
            Arrangement::Sequential => Algorithm::Sequential,
            Arrangement::Global => Algorithm::Global(Permutation::new(sequences, derive_key(key, &[GLOBAL]))),
            Arrangement::Block { .. } if sequences == 0 => Algorithm::Sequential,
            Arrangement::Block { chunk, lanes, window } => {
                let count = sequences.div_ceil(chunk);
                let chunks = Permutation::new(count, derive_key(key, &[CHUNKS]));
                let last_slot = chunks.position_of(count - 1);
                Algorithm::Block(BlockOrder {
                    key,
                    chunk,
                    table: None,
                    lanes,
                    window,
                    chunks,
                    last_slot,
                    last_len: sequences - (count - 1) * chunk,
                })
            }
        };
        Self { sequences, algorithm }
    }

    /// Number of full sequences of the epoch.
    pub fn len(&self) -> u64 {
        self.sequences
    }

    /// Whether the epoch has no full sequences.
    pub fn is_empty(&self) -> bool {
        self.sequences == 0
    }

    /// The sequence at `position`.
    ///
    /// # Panics
    /// If `position` is not below [`EpochOrder::len`].
    pub fn sequence_at(&self, position: u64) -> u64 {
        assert!(position < self.sequences, "position {position} of {}", self.sequences);
        match &self.algorithm {
            Algorithm::Sequential => position,
            Algorithm::Global(permutation) => permutation.apply(position),
            Algorithm::Block(block) => block.sequence_at(self.sequences, position),
        }
    }

    /// Tells whether `sequence` is the last of its chunk, if all chunks have one length. The tokens
    /// after it then belong to another time of the epoch.
    pub fn ends_chunk(&self, sequence: u64) -> bool {
        match &self.algorithm {
            Algorithm::Sequential | Algorithm::Global(_) => false,
            Algorithm::Block(BlockOrder { table: Some(_), .. }) => false,
            Algorithm::Block(block) => (sequence + 1).is_multiple_of(block.chunk),
        }
    }
}

impl BlockOrder {
    fn sequence_at(&self, sequences: u64, position: u64) -> u64 {
        let (lane, at) = (position % self.lanes, position / self.lanes);
        let (quotient, rest) = (sequences / self.lanes, sequences % self.lanes);
        let lane_start = lane * quotient + lane.min(rest);
        let lane_len = quotient + u64::from(lane < rest);

        // The lane's phase shortens its first window.
        let phase = (u128::from(self.window) * u128::from(lane) / u128::from(self.lanes)) as u64;
        let window = (at + phase) / self.window;
        let start = (window * self.window).saturating_sub(phase);
        let end = ((window + 1) * self.window - phase).min(lane_len);
        let key = derive_key(self.key, &[WINDOW, lane, window]);
        self.list(lane_start + start + Permutation::apply_once(end - start, key, at - start))
    }

    /// Entry `index` of the list of all sequences in the order of their permuted chunks.
    fn list(&self, index: u64) -> u64 {
        if let Some(ChunkTable { starts, before }) = &self.table {
            let slot = before.partition_point(|start| *start <= index) - 1;
            return starts[self.chunks.apply(slot as u64) as usize] + (index - before[slot]);
        }
        let before_last = self.last_slot * self.chunk;
        let (slot, within) = if index < before_last {
            (index / self.chunk, index % self.chunk)
        } else if index < before_last + self.last_len {
            (self.last_slot, index - before_last)
        } else {
            let index = index - self.last_len;
            (index / self.chunk + 1, index % self.chunk)
        };
        self.chunks.apply(slot) * self.chunk + within
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn arrangements(sequences: u64) -> Vec<Arrangement> {
        let mut all = vec![Arrangement::Sequential, Arrangement::Global];
        for (chunk, window, lanes) in [(1, 1, 1), (7, 3, 2), (16, 64, 8), (1000, 5000, 3), (5, 2, 64)] {
            all.push(Arrangement::block(sequences, 1, chunk, window, lanes));
        }
        all
    }

    proptest! {
        #[test]
        fn every_sequence_stands_at_exactly_one_position(sequences in 0u64..3000, seed: u64, epoch in 0u64..5) {
            for arrangement in arrangements(sequences) {
                let order = EpochOrder::new(sequences, arrangement, seed, epoch);
                let mut seen: Vec<u64> = (0..sequences).map(|position| order.sequence_at(position)).collect();
                seen.sort_unstable();
                prop_assert!(seen.into_iter().eq(0..sequences), "{:?}", arrangement);
            }
        }
    }

    proptest! {
        #[test]
        fn chunks_of_any_lengths_hold_every_sequence_once(
            lengths in prop::collection::vec(1u64..60, 1..40), lanes in 1u64..9, window in 1u64..50, seed: u64,
        ) {
            let starts: Arc<[u64]> = lengths.iter().scan(0, |sum, len| { *sum += len; Some(*sum - len) }).collect();
            let sequences = lengths.iter().sum::<u64>();
            let lanes = lanes.min(sequences);
            let order = EpochOrder::in_chunks(sequences, &starts, lanes, window, seed, 3);
            let mut seen: Vec<u64> = (0..sequences).map(|position| order.sequence_at(position)).collect();
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..sequences));
        }

        #[test]
        fn chunks_of_one_length_are_those_of_the_block_arrangement(
            count in 1u64..40, chunk in 1u64..50, window in 1u64..50, lanes in 1u64..9, seed: u64,
        ) {
            let sequences = count * chunk;
            let lanes = lanes.min(sequences);
            let plain = EpochOrder::new(sequences, Arrangement::Block { chunk, lanes, window }, seed, 1);
            let starts: Arc<[u64]> = (0..count).map(|index| index * chunk).collect();
            let table = EpochOrder::in_chunks(sequences, &starts, lanes, window, seed, 1);
            prop_assert!((0..sequences).all(|at| plain.sequence_at(at) == table.sequence_at(at)));
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        for arrangement in arrangements(5000).into_iter().skip(1) {
            let list = |seed, epoch| {
                let order = EpochOrder::new(5000, arrangement, seed, epoch);
                (0..5000).map(|position| order.sequence_at(position)).collect::<Vec<_>>()
            };
            assert_ne!(list(0, 0), list(0, 1), "{arrangement:?}");
            assert_ne!(list(0, 0), list(1, 0), "{arrangement:?}");
        }
    }

    /// Compares chi-squared with its mean and five standard deviations over many epochs. It counts
    /// which chunks stand at the first two positions of an epoch, which are on two lanes.
    #[test]
    fn chunks_come_anywhere_alike() {
        let (chunk, chunks, epochs) = (10, 30, 40_000);
        let mut pairs = vec![0u64; (chunks * chunks) as usize];
        for epoch in 0..epochs {
            let order = EpochOrder::new(chunk * chunks, Arrangement::Block { chunk, lanes: 6, window: 20 }, 5, epoch);
            let [first, second] = [0, 1].map(|position| order.sequence_at(position) / chunk);
            pairs[(first * chunks + second) as usize] += 1;
        }
        // A lane is five chunks long, so the two positions are in different chunks.
        let freedom = (chunks * (chunks - 1) - 1) as f64;
        let expected = epochs as f64 / (freedom + 1.0);
        let apart = pairs.iter().zip(0..).filter(|(_, index)| index / chunks != index % chunks);
        let chi: f64 = apart.map(|(count, _)| (*count as f64 - expected).powi(2) / expected).sum();
        assert!(chi <= freedom + 5.0 * (2.0 * freedom).sqrt(), "chi2 {chi:.0} of {freedom}");
    }

    #[test]
    fn known_orders_stay_as_they_are() {
        let order = EpochOrder::new(1000, Arrangement::Global, 0, 0);
        let global: Vec<_> = (0..8).map(|position| order.sequence_at(position)).collect();
        let order = EpochOrder::new(1000, Arrangement::Block { chunk: 10, lanes: 4, window: 20 }, 7, 3);
        let block: Vec<_> = (0..8).map(|position| order.sequence_at(position)).collect();
        assert_eq!((global, block), (GOLDEN_GLOBAL.to_vec(), GOLDEN_BLOCK.to_vec()));
    }

    // Golden values of the Python reference in tests/python, which shares no code with this module.
    const GOLDEN_GLOBAL: [u64; 8] = [942, 168, 574, 359, 989, 982, 502, 371];
    const GOLDEN_BLOCK: [u64; 8] = [893, 985, 166, 914, 897, 983, 162, 912];
}
