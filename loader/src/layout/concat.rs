//! The `concat` layout: all documents as one stream, cut into sequences.
//!
//! Every non-empty document contributes its tokens, with `bos_id` before and `eos_id` after them where these are set.
//! A function of counts alone; the tokens stay where they are. The layout knows where shards stand and so is small for any corpus; where a
//! block stands in its shard is found from the shard's own table, [`Specials::block_at`].

use std::ops::Range;

use crate::format::Counts;

/// Ids put around documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Specials {
    /// Before every non-empty document.
    pub bos: Option<u32>,
    /// After every non-empty document.
    pub eos: Option<u32>,
}

impl Specials {
    /// Whether the stream is the tokens alone.
    pub fn none(&self) -> bool {
        self.bos.is_none() && self.eos.is_none()
    }

    /// Length of the stream that a block or a shard contributes.
    pub fn stream_len(&self, counts: Counts) -> u64 {
        counts.tokens + u64::from(self.bos.is_some()) * counts.starts + u64::from(self.eos.is_some()) * counts.ends
    }

    /// The block that holds token `at` of its shard's stream. `before` counts what is before each block and, last, in all of them.
    pub fn block_at(&self, before: &[Counts], at: u64) -> usize {
        let len = before.last().map_or(0, |all| self.stream_len(*all));
        partition_near(before.len(), at, len, |index| self.stream_len(before[index]) <= at).saturating_sub(1)
    }
}

/// The number of places, from the first on, that `reached` holds for, of `places` that stand about evenly from 0 to `len`.
///
/// Looks first where `at` lies among them: in a large table each step of a binary search is a miss of the caches.
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

/// How much stream there is, and the sequences that makes: of a whole corpus, or of its first shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    stream_len: u64,
    seq_len: u64,
    /// Tokens a row reads: one more than `seq_len` where targets are shifted.
    row_tokens: u64,
}

impl Extent {
    /// Tokens of the stream, specials included.
    pub fn stream_len(&self) -> u64 {
        self.stream_len
    }

    /// Sequences whose row is full.
    pub fn num_sequences(&self) -> u64 {
        self.stream_len.saturating_sub(self.row_tokens - self.seq_len) / self.seq_len
    }

    /// Stream tokens after the last full sequence that some row still has to deliver as targets.
    pub fn tail_tokens(&self) -> u64 {
        let overlap = self.row_tokens - self.seq_len;
        (self.stream_len - self.num_sequences() * self.seq_len).saturating_sub(overlap)
    }

    /// The stream tokens that the row of `sequence` reads; the tail, at [`Extent::num_sequences`], is cut short.
    pub fn row(&self, sequence: u64) -> Range<u64> {
        let start = sequence * self.seq_len;
        start..(start + self.row_tokens).min(self.stream_len)
    }
}

/// Where each shard and each sequence stands in the stream.
#[derive(Debug)]
pub struct Concat {
    /// Start of each shard in the stream, and the stream's length last.
    starts: Vec<u64>,
    whole: Extent,
}

impl Concat {
    /// The layout of shards with `counts`, in corpus order.
    pub fn new(counts: impl Iterator<Item = Counts>, specials: Specials, seq_len: u64, row_tokens: u64) -> Self {
        let mut starts = Vec::with_capacity(counts.size_hint().0 + 1);
        let mut stream_len = 0;
        starts.push(0);
        for counts in counts {
            stream_len += specials.stream_len(counts);
            starts.push(stream_len);
        }
        Self { starts, whole: Extent { stream_len, seq_len, row_tokens } }
    }

    /// The layout's extent over the first `shards` shards, which is that of a corpus of these alone: what follows moves nothing before it.
    ///
    /// # Panics
    /// When there are fewer shards.
    pub fn prefix(&self, shards: usize) -> Extent {
        Extent { stream_len: self.starts[shards], ..self.whole }
    }

    /// Bytes of its table.
    pub fn index_bytes(&self) -> u64 {
        size_of_val(self.starts.as_slice()) as u64
    }

    /// Its extent over all shards.
    pub fn whole(&self) -> Extent {
        self.whole
    }

    /// [`Extent::stream_len`] of the whole.
    pub fn stream_len(&self) -> u64 {
        self.whole.stream_len()
    }

    /// [`Extent::num_sequences`] of the whole.
    pub fn num_sequences(&self) -> u64 {
        self.whole.num_sequences()
    }

    /// [`Extent::tail_tokens`] of the whole.
    pub fn tail_tokens(&self) -> u64 {
        self.whole.tail_tokens()
    }

    /// [`Extent::row`] of the whole.
    pub fn row(&self, sequence: u64) -> Range<u64> {
        self.whole.row(sequence)
    }

    /// The shard that holds stream token `at`, and the token's place in the shard's stream.
    ///
    /// # Panics
    /// When `at` is not below [`Concat::stream_len`].
    pub fn locate(&self, at: u64) -> (usize, u64) {
        assert!(at < self.stream_len(), "stream token {at} of {}", self.stream_len());
        let shard = partition_near(self.starts.len(), at, self.stream_len(), |index| self.starts[index] <= at) - 1;
        (shard, at - self.starts[shard])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(tokens: &[u64], seq_len: u64, row_tokens: u64, specials: Specials) -> Concat {
        let shards = tokens.iter().map(|tokens| Counts { tokens: *tokens, starts: 1, ends: 1 });
        Concat::new(shards, specials, seq_len, row_tokens)
    }

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
    fn counts_full_sequences_and_the_tail() {
        for (len, seq_len, shifted, sequences, tail) in [
            (10, 4, false, 2, 2),
            (8, 4, false, 2, 0),
            (3, 4, false, 0, 3),
            (0, 4, false, 0, 0),
            (9, 4, true, 2, 0),
            (8, 4, true, 1, 3),
            (10, 4, true, 2, 1),
            (4, 4, true, 0, 3),
            (1, 4, true, 0, 0),
            (0, 4, true, 0, 0),
        ] {
            let layout = layout(&[len], seq_len, seq_len + u64::from(shifted), Specials::default());
            assert_eq!((layout.num_sequences(), layout.tail_tokens()), (sequences, tail), "{len} {seq_len} {shifted}");
        }
    }

    #[test]
    fn specials_lengthen_the_stream_once_per_document() {
        let both = Specials { bos: Some(1), eos: Some(2) };
        let layout = layout(&[5, 3], 4, 4, both);
        assert_eq!(layout.stream_len(), 12);
        assert_eq!(layout.locate(6), (0, 6));
        assert_eq!(layout.locate(7), (1, 0));
        assert_eq!(layout.row(2), 8..12);
    }

    #[test]
    fn the_first_shards_are_laid_out_as_if_they_were_all() {
        let tokens = [5, 0, 7, 12, 1];
        for shifted in [0, 1] {
            let grown = layout(&tokens, 4, 4 + shifted, Specials::default());
            for shards in 0..=tokens.len() {
                assert_eq!(
                    grown.prefix(shards),
                    layout(&tokens[..shards], 4, 4 + shifted, Specials::default()).whole()
                );
            }
        }
    }

    #[test]
    fn a_block_is_found_where_a_document_runs_over_several() {
        // Blocks of 3, 4 and 2 tokens: one document over the first two, one in the last.
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
