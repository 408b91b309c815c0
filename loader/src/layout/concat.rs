//! The `concat` layout: the joined stream, cut into rows of `seq_len` tokens.
//!
//! A row is one segment, and a window is one row. Arithmetic alone finds both.

use std::sync::Arc;

use super::{Extent, Layout, LayoutWindow, Segment, Stream, WindowPlan};

/// Rows of equal length over the joined stream.
#[derive(Debug)]
pub(super) struct Concat {
    stream: Arc<Stream>,
    seq_len: u64,
    /// Number of tokens that a row reads: one more than `seq_len` for shifted targets.
    row_tokens: u64,
}

impl Concat {
    pub(super) fn new(stream: Arc<Stream>, seq_len: u64, row_tokens: u64) -> Self {
        Self { stream, seq_len, row_tokens }
    }
}

impl Layout for Concat {
    fn extent(&self, shards: usize) -> Extent {
        let stream_len = self.stream.start_of(shards);
        let overlap = self.row_tokens - self.seq_len;
        let rows = stream_len.saturating_sub(overlap) / self.seq_len;
        Extent {
            stream_len,
            rows,
            tokens: stream_len,
            tail_tokens: (stream_len - rows * self.seq_len).saturating_sub(overlap),
        }
    }

    fn locate(&self, extent: &Extent, row: u64) -> (LayoutWindow, usize) {
        let start = row * self.seq_len;
        let end = (start + self.row_tokens).min(extent.stream_len);
        (LayoutWindow { number: row, stream: start..end, documents: None }, 0)
    }

    fn plan(&self, window: &LayoutWindow, _: &[u32], plan: &mut WindowPlan) {
        let (start, end) = (window.stream.start, window.stream.end);
        plan.push_row(&[Segment::joined(start, end - start, 0)]);
    }

    fn one_segment(&self, extent: &Extent, row: u64) -> Option<Segment> {
        let start = row * self.seq_len;
        Some(Segment::joined(start, self.row_tokens.min(extent.stream_len - start), 0))
    }

    fn table(&self) -> Vec<u64> {
        Vec::new()
    }

    fn index_bytes(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Counts;
    use crate::layout::Specials;

    fn layout(tokens: &[u64], seq_len: u64, row_tokens: u64) -> Concat {
        let shards = tokens.iter().map(|tokens| Counts { tokens: *tokens, starts: 1, ends: 1 });
        Concat::new(Arc::new(Stream::new(shards, Specials::default())), seq_len, row_tokens)
    }

    fn row(layout: &Concat, extent: &Extent, number: u64) -> Vec<Segment> {
        let (window, row) = layout.locate(extent, number);
        let mut plan = WindowPlan::default();
        layout.plan(&window, &[], &mut plan);
        assert_eq!(layout.one_segment(extent, number).as_slice(), plan.row(row), "the short way says the same");
        plan.row(row).to_vec()
    }

    #[test]
    fn counts_full_rows_and_the_tail() {
        for (len, seq_len, shifted, rows, tail_tokens) in [
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
            let layout = layout(&[len], seq_len, seq_len + u64::from(shifted));
            let extent = Extent { stream_len: len, rows, tokens: len, tail_tokens };
            assert_eq!(layout.extent(1), extent, "{len} {seq_len} {shifted}");
        }
    }

    #[test]
    fn a_row_is_one_segment_and_the_tail_is_cut_short() {
        let layout = layout(&[7, 4], 4, 5);
        let whole = layout.extent(2);
        assert_eq!(whole, Extent { stream_len: 11, rows: 2, tokens: 11, tail_tokens: 2 });
        assert_eq!(row(&layout, &whole, 1), [Segment::joined(4, 5, 0)]);
        assert_eq!(row(&layout, &whole, 2), [Segment::joined(8, 3, 0)]);
        assert_eq!(row(&layout, &layout.extent(1), 1), [Segment::joined(4, 3, 0)], "the first shard alone");
    }

    #[test]
    fn the_first_shards_are_laid_out_as_if_they_were_all() {
        let tokens = [5, 0, 7, 12, 1];
        for shifted in [0, 1] {
            let grown = layout(&tokens, 4, 4 + shifted);
            for shards in 0..=tokens.len() {
                let alone = layout(&tokens[..shards], 4, 4 + shifted);
                let (part, whole) = (grown.extent(shards), alone.extent(shards));
                assert_eq!(part, whole);
                for at in 0..part.rows + u64::from(part.tail_tokens > 0) {
                    assert_eq!(row(&grown, &part, at), row(&alone, &whole, at));
                }
            }
        }
    }
}
