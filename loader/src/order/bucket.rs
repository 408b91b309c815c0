//! Buckets: put rows of similar length beside each other in the order of an epoch.
//!
//! A bucket is a run of neighbouring positions of one lane. Its rows are sorted by length and cut
//! into up to [`GROUPS`] groups, which come in permuted order. So a batch has rows of similar
//! length, and batches of an epoch do not grow steadily. All lanes permute the groups of a bucket
//! alike, because a batch draws from many lanes.
//!
//! A row stays in its lane, so that ranks decode what they would decode without buckets. The order
//! stays a function of positions alone: batch sizes and ranks have no influence.

use super::permutation::{Permutation, derive_key};
use super::{Arrangement, BUCKET, EPOCH};

/// Most groups of a bucket.
const GROUPS: u64 = 16;

/// The division of an epoch's positions into buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buckets {
    sequences: u64,
    lanes: u64,
    /// Positions of a bucket, at least 1.
    run: u64,
}

/// One bucket of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// Its lane. 0 without lanes.
    pub lane: u64,
    /// Its number in the lane.
    pub number: u64,
}

impl Buckets {
    /// Divides `sequences` positions of `arrangement`. A bucket has `positions` positions in all
    /// lanes together.
    pub fn new(sequences: u64, arrangement: Arrangement, positions: u64) -> Self {
        let lanes = match arrangement {
            Arrangement::Sequential | Arrangement::Global => 1,
            Arrangement::Block { lanes, .. } => lanes,
        };
        Self { sequences, lanes, run: (positions / lanes).max(1) }
    }

    /// The bucket of `position`, and the place there.
    pub fn locate(&self, position: u64) -> (Bucket, usize) {
        let (lane, at) = (position % self.lanes, position / self.lanes);
        (Bucket { lane, number: at / self.run }, (at % self.run) as usize)
    }

    /// The positions of `bucket`.
    pub fn positions(&self, bucket: Bucket) -> impl Iterator<Item = u64> + use<> {
        let Self { sequences, lanes, run } = *self;
        let lane_len = sequences / lanes + u64::from(bucket.lane < sequences % lanes);
        let start = bucket.number * run;
        (start..(start + run).min(lane_len)).map(move |at| at * lanes + bucket.lane)
    }
}

impl Bucket {
    /// Arranges rows with these lengths. Gives the number of the row at each place of the bucket.
    pub fn arranged(&self, lengths: &[u64], seed: u64, epoch: u64) -> Vec<usize> {
        let mut sorted: Vec<usize> = (0..lengths.len()).collect();
        sorted.sort_by_key(|row| lengths[*row]);
        let group = lengths.len().div_ceil(GROUPS as usize).max(1);
        let groups = lengths.len().div_ceil(group) as u64;
        let key = derive_key(derive_key(seed, &[EPOCH, epoch]), &[BUCKET, self.number]);
        let of_slot = |slot| {
            let start = Permutation::apply_once(groups, key, slot) as usize * group;
            start..(start + group).min(lengths.len())
        };
        (0..groups).flat_map(of_slot).map(|at| sorted[at]).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_position_is_in_one_bucket_and_stays_in_its_lane(
            sequences in 1u64..500, lanes in 1u64..9, size in 1u64..80, seed: u64,
        ) {
            let arrangement = Arrangement::Block { chunk: 1, lanes: lanes.min(sequences), window: 3 };
            let buckets = Buckets::new(sequences, arrangement, size);
            let mut seen = vec![0; sequences as usize];
            for position in 0..sequences {
                let (bucket, place) = buckets.locate(position);
                let positions: Vec<u64> = buckets.positions(bucket).collect();
                prop_assert_eq!(positions[place], position);
                prop_assert!(positions.len() as u64 <= (size / lanes.min(sequences)).max(1));
                let lengths: Vec<u64> = positions.iter().map(|position| derive_key(seed, &[*position]) % 50).collect();
                let row = positions[bucket.arranged(&lengths, seed, 1)[place]];
                prop_assert_eq!(row % lanes.min(sequences), bucket.lane);
                seen[row as usize] += 1;
            }
            prop_assert!(seen.into_iter().all(|count| count == 1));
        }

        #[test]
        fn a_bucket_has_few_groups_of_neighbours_by_length(count in 1usize..600, seed: u64, number in 0u64..9) {
            // The lengths are all different, so that a row's length is its rank.
            let lengths: Vec<u64> = (0..count as u64).map(|row| Permutation::new(count as u64, seed).apply(row)).collect();
            let arranged = Bucket { lane: 0, number }.arranged(&lengths, seed, 2);
            let ranks: Vec<u64> = arranged.iter().map(|row| lengths[*row]).collect();
            let breaks = ranks.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
            prop_assert!(breaks < GROUPS as usize);
            let mut sorted = ranks;
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..count as u64));
        }
    }

    #[test]
    fn rows_of_one_length_keep_their_order_inside_a_group() {
        let arranged = Bucket { lane: 0, number: 0 }.arranged(&[7; 32], 1, 0);
        assert!(arranged.as_chunks::<2>().0.iter().all(|[first, second]| *second == first + 1));
    }
}
