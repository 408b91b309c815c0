//! The `concat` layout: all documents as one stream, cut into sequences.
//!
//! Every non-empty document contributes its tokens, with `bos_id` before and `eos_id` after them where these are set.
//! A function of counts alone; the tokens stay where they are.

use std::ops::Range;

use crate::shard::BlockMeta;

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

    /// Length of the stream that a block contributes.
    pub fn stream_len(&self, block: &BlockMeta) -> u64 {
        block.tokens + u64::from(self.bos.is_some()) * block.starts + u64::from(self.eos.is_some()) * block.ends
    }
}

/// Where each block and each sequence stands in the stream.
#[derive(Debug)]
pub struct Concat {
    /// Start of each block in the stream, and the stream's length last.
    starts: Vec<u64>,
    seq_len: u64,
    /// Tokens a row reads: one more than `seq_len` where targets are shifted.
    row_tokens: u64,
}

impl Concat {
    /// The layout of `blocks` in corpus order.
    pub fn new<'a>(
        blocks: impl Iterator<Item = &'a BlockMeta>,
        specials: Specials,
        seq_len: u64,
        row_tokens: u64,
    ) -> Self {
        let mut starts = vec![0];
        let mut at = 0;
        for block in blocks {
            at += specials.stream_len(block);
            starts.push(at);
        }
        Self { starts, seq_len, row_tokens }
    }

    /// Tokens of the stream, specials included.
    pub fn stream_len(&self) -> u64 {
        *self.starts.last().expect("holds at least the end")
    }

    /// Sequences whose row is full.
    pub fn num_sequences(&self) -> u64 {
        self.stream_len().saturating_sub(self.row_tokens - self.seq_len) / self.seq_len
    }

    /// Stream tokens after the last full sequence that some row still has to deliver as targets.
    pub fn tail_tokens(&self) -> u64 {
        let overlap = self.row_tokens - self.seq_len;
        (self.stream_len() - self.num_sequences() * self.seq_len).saturating_sub(overlap)
    }

    /// The stream tokens that the row of `sequence` reads; the tail, at [`Concat::num_sequences`], is cut short.
    pub fn row(&self, sequence: u64) -> Range<u64> {
        let start = sequence * self.seq_len;
        start..(start + self.row_tokens).min(self.stream_len())
    }

    /// The block that holds stream token `at`, and the token's place in it.
    ///
    /// # Panics
    /// When `at` is not below [`Concat::stream_len`].
    pub fn locate(&self, at: u64) -> (usize, u64) {
        assert!(at < self.stream_len(), "stream token {at} of {}", self.stream_len());
        let block = self.starts.partition_point(|start| *start <= at) - 1;
        (block, at - self.starts[block])
    }

    /// Stream tokens of block `block`.
    pub fn block_len(&self, block: usize) -> u64 {
        self.starts[block + 1] - self.starts[block]
    }

    /// Start of block `block` in the stream.
    pub fn block_start(&self, block: usize) -> u64 {
        self.starts[block]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(tokens: &[u64], seq_len: u64, row_tokens: u64, specials: Specials) -> Concat {
        let blocks: Vec<_> = tokens
            .iter()
            .map(|tokens| BlockMeta { tokens: *tokens, starts: 1, ends: 1, ..BlockMeta::default() })
            .collect();
        Concat::new(blocks.iter(), specials, seq_len, row_tokens)
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
}
