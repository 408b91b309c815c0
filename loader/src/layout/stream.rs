//! The stream: all documents of a source joined, and the place of each shard in it.
//!
//! Every non-empty document contributes its tokens. `bos_id` comes before them and `eos_id` after
//! them, if these are set. The table of shards needs 8 bytes per shard. [`Specials::block_at`]
//! finds a block by the shard's own table.

use crate::format::Counts;
use crate::settings::Config;

/// Ids around documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Specials {
    /// Id before every non-empty document.
    pub bos: Option<u32>,
    /// Id after every non-empty document.
    pub eos: Option<u32>,
}

impl Specials {
    /// The special ids that `config` sets.
    pub fn of(config: &Config) -> Self {
        Self { bos: config.bos_id, eos: config.eos_id }
    }

    /// Whether no special id is set.
    pub fn none(&self) -> bool {
        self.bos.is_none() && self.eos.is_none()
    }

    /// Number of special ids around each document.
    pub fn per_document(&self) -> u64 {
        u64::from(self.bos.is_some()) + u64::from(self.eos.is_some())
    }

    /// Length of the stream that a block or a shard contributes.
    pub fn stream_len(&self, counts: Counts) -> u64 {
        counts.tokens + u64::from(self.bos.is_some()) * counts.starts + u64::from(self.eos.is_some()) * counts.ends
    }

    /// Finds the block with place `at` of its shard's stream. `before` counts the contents before
    /// each block, and last those of all blocks.
    pub fn block_at(&self, before: &[Counts], at: u64) -> usize {
        let len = before.last().map_or(0, |all| self.stream_len(*all));
        partition_near(before.len(), at, len, |index| self.stream_len(before[index]) <= at).saturating_sub(1)
    }
}

/// Counts the leading places for which `reached` holds. The `places` are spread about evenly from 0
/// to `len`.
///
/// The search begins at the place that `at` suggests. In a large table, each step of a binary
/// search misses the caches.
fn partition_near(places: usize, at: u64, len: u64, reached: impl Fn(usize) -> bool) -> usize {
    // A guess need not be exact, and `as` keeps it in range.
    let guess = ((at as f64 / len as f64) * places.saturating_sub(1) as f64) as usize;
    let (mut low, mut high) = (guess.min(places), guess.min(places));
    let mut step = 1;
    while high < places && reached(high) {
        (low, high) = (high + 1, places.min(high + 1 + step));
        step *= 2;
    }
    step = 1;
    while low > 0 && !reached(low - 1) {
        (low, high) = ((low - 1).saturating_sub(step), low - 1);
        step *= 2;
    }
    while low < high {
        let middle = low.midpoint(high);
        (low, high) = if reached(middle) { (middle + 1, high) } else { (low, middle) };
    }
    low
}

/// The place of each shard in the stream of its source.
#[derive(Debug)]
pub struct Stream {
    /// Start of each shard in the stream, and last the length of the stream.
    starts: Vec<u64>,
    specials: Specials,
}

impl Stream {
    /// Makes the stream of shards with `counts`, in corpus order.
    pub fn new(counts: impl Iterator<Item = Counts>, specials: Specials) -> Self {
        let mut starts = Vec::with_capacity(counts.size_hint().0 + 1);
        let mut len = 0;
        starts.push(0);
        for counts in counts {
            len += specials.stream_len(counts);
            starts.push(len);
        }
        Self { starts, specials }
    }

    /// The ids around documents.
    pub fn specials(&self) -> Specials {
        self.specials
    }

    /// Number of tokens in the stream.
    pub fn len(&self) -> u64 {
        *self.starts.last().expect("has at least its first entry")
    }

    /// Whether no shard has a token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of shards in the stream.
    pub fn shards(&self) -> usize {
        self.starts.len() - 1
    }

    /// Offset of the first token of shard `shard`. For the number of shards, it is the length of
    /// the stream.
    ///
    /// # Panics
    /// Panics if there are fewer shards.
    pub fn start_of(&self, shard: usize) -> u64 {
        self.starts[shard]
    }

    /// Bytes of the table.
    pub fn index_bytes(&self) -> u64 {
        size_of_val(self.starts.as_slice()) as u64
    }

    /// Finds the shard with stream token `at`, and the token's place in the shard's stream.
    ///
    /// # Panics
    /// Panics if `at` is not below [`Stream::len`].
    pub fn locate(&self, at: u64) -> (usize, u64) {
        assert!(at < self.len(), "stream token {at} of {}", self.len());
        let shard = partition_near(self.starts.len(), at, self.len(), |index| self.starts[index] <= at) - 1;
        (shard, at - self.starts[shard])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_from_any_guess() {
        for starts in
            [vec![], vec![0], vec![0, 0, 7], vec![0, 1, 2, 3, 4, 900], vec![0, 896, 897, 898, 900], vec![0; 9]]
        {
            for at in 0..902 {
                for len in [0, 1, at, 900, 2 * at + 1] {
                    let found = partition_near(starts.len(), at, len, |index| starts[index] <= at);
                    assert_eq!(found, starts.partition_point(|start| *start <= at), "{at} of {len} in {starts:?}");
                }
            }
        }
    }

    #[test]
    fn specials_lengthen_the_stream_once_per_document() {
        let counts = [5, 3].map(|tokens| Counts { tokens, starts: 1, ends: 1 });
        let stream = Stream::new(counts.into_iter(), Specials { bos: Some(1), eos: Some(2) });
        assert_eq!((stream.len(), stream.shards(), stream.start_of(1)), (12, 2, 7));
        assert_eq!(stream.locate(6), (0, 6));
        assert_eq!(stream.locate(7), (1, 0));
    }

    #[test]
    fn a_block_is_found_where_a_document_runs_over_several() {
        // Blocks of 3, 4 and 2 tokens. One document spans the first two, and one is in the last.
        let counts = |tokens, starts, ends| Counts { tokens, starts, ends };
        let before = [counts(0, 0, 0), counts(3, 1, 0), counts(7, 1, 1), counts(9, 2, 2)];
        let found = |specials: Specials| -> Vec<usize> {
            (0..specials.stream_len(before[3])).map(|at| specials.block_at(&before, at)).collect()
        };
        assert_eq!(found(Specials::default()), [0, 0, 0, 1, 1, 1, 1, 2, 2]);
        let both = Specials { bos: Some(1), eos: Some(2) };
        assert_eq!(found(both), [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
    }
}
