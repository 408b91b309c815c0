//! Boundaries: the starts of documents in a row, and the arrays that show them.
//!
//! A row is a list of *spans*. A span is a stretch of one document, with the padding up to the next
//! span. Padding at the end of a row is a span without tokens. All arrays come from these spans:
//! `position_ids`, `doc_ids`, `cu_seqlens`, and the labels that are masked.

use crate::layout::Segment;

/// A stretch of one document in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Place of its first token in the row.
    pub(super) start: u32,
    /// Number of its tokens. A span of padding has none.
    pub(super) tokens: u32,
    /// The place after the span, including its padding.
    pub(super) end: u32,
}

/// The spans of the rows of a batch. The memory is reused from batch to batch.
#[derive(Clone, Debug, Default)]
pub(super) struct Spans {
    list: Vec<Span>,
    /// Number of spans up to the end of each row.
    row_ends: Vec<u32>,
}

impl Spans {
    /// Removes all rows.
    pub(super) fn clear(&mut self) {
        self.list.clear();
        self.row_ends.clear();
    }

    /// Adds a row of `places` places. `ends` gives the places just after documents that end inside
    /// a segment, sorted.
    pub(super) fn push_row(&mut self, segments: &[Segment], ends: &[u64], places: u64) {
        let first = self.list.len();
        for segment in segments {
            let (start, end) = (segment.place, segment.place + segment.len);
            // The padding before this segment belongs to the span before it.
            if let Some(before) = self.list[first..].last_mut() {
                before.end = start as u32;
            }
            let mut at = start;
            let inside = ends.iter().copied().filter(|border| (start + 1..end).contains(border));
            for border in inside.chain([end]) {
                self.list.push(Span { start: at as u32, tokens: (border - at) as u32, end: border as u32 });
                at = border;
            }
        }
        let end = self.list[first..].last().map_or(0, |span| span.end);
        if u64::from(end) < places {
            self.list.push(Span { start: end, tokens: 0, end: places as u32 });
        }
        self.row_ends.push(self.list.len() as u32);
    }

    /// Adds a row of `spans`.
    pub(super) fn push_spans(&mut self, spans: impl Iterator<Item = Span>) {
        self.list.extend(spans);
        self.row_ends.push(self.list.len() as u32);
    }

    /// The spans of row `row`.
    pub(super) fn row(&self, row: usize) -> &[Span] {
        let start = if row == 0 { 0 } else { self.row_ends[row - 1] as usize };
        &self.list[start..self.row_ends[row] as usize]
    }
}

/// Writes the place of each token in its document, and the number of its document in the row.
/// Padding has the number -1. `positions` is `None` where the places come from a column.
pub(super) fn write_places(spans: &[Span], mut positions: Option<&mut [i64]>, documents: &mut [i32]) {
    let columns = documents.len();
    for (number, span) in spans.iter().enumerate() {
        let [start, tokens, end] =
            [span.start, span.start + span.tokens, span.end].map(|place| (place as usize).min(columns));
        for (position, place) in positions.iter_mut().flat_map(|all| &mut all[start..end]).zip(0..) {
            *position = place;
        }
        documents[start..tokens].fill(number as i32);
        documents[tokens..end].fill(-1);
    }
}

/// Writes which places each place may attend to: the places of its span up to itself. `mask` has a
/// row of `columns` values for each of `columns` places.
pub(super) fn write_mask(spans: &[Span], columns: usize, mask: &mut [u8]) {
    mask.fill(0);
    for span in spans {
        let [start, end] = [span.start, span.end].map(|place| (place as usize).min(columns));
        for place in start..end {
            mask[place * columns + start..=place * columns + place].fill(1);
        }
    }
}

/// The places whose target is the first token of a document. A target is `lead` places before its
/// token.
pub(super) fn masked_places(spans: &[Span], lead: usize) -> impl Iterator<Item = usize> {
    spans.iter().filter(|span| span.tokens > 0).filter_map(move |span| (span.start as usize).checked_sub(lead))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(segments: &[Segment], ends: &[u64], places: u64) -> Vec<[u32; 3]> {
        let mut spans = Spans::default();
        spans.push_row(&[], &[], 1);
        spans.push_row(segments, ends, places);
        spans.row(1).iter().map(|span| [span.start, span.tokens, span.end]).collect()
    }

    #[test]
    fn spans_cover_every_place_of_a_row() {
        let joined = |len, place| Segment::joined(100, len, place);
        assert_eq!(spans(&[], &[], 4), [[0, 0, 4]]);
        assert_eq!(spans(&[joined(4, 0)], &[], 4), [[0, 4, 4]]);
        assert_eq!(spans(&[joined(4, 0)], &[0, 1, 3, 4], 4), [[0, 1, 1], [1, 2, 3], [3, 1, 4]]);
        assert_eq!(spans(&[joined(3, 0), joined(2, 4)], &[3], 8), [[0, 3, 4], [4, 2, 6], [6, 0, 8]]);
        assert_eq!(spans(&[joined(2, 0), joined(2, 2)], &[1], 4), [[0, 1, 1], [1, 1, 2], [2, 2, 4]]);
    }

    #[test]
    fn arrays_say_where_documents_begin() {
        let mut all = Spans::default();
        all.push_row(&[Segment::joined(0, 3, 0), Segment::joined(9, 2, 4)], &[], 8);
        let (mut positions, mut documents) = ([9; 7], [9; 7]);
        write_places(all.row(0), Some(&mut positions), &mut documents);
        assert_eq!(positions, [0, 1, 2, 3, 0, 1, 0]);
        assert_eq!(documents, [0, 0, 0, -1, 1, 1, -1]);
        let mut mask = [9; 49];
        write_mask(all.row(0), 7, &mut mask);
        let of = |place: usize| mask[place * 7..(place + 1) * 7].to_vec();
        assert_eq!(of(2), [1, 1, 1, 0, 0, 0, 0]);
        assert_eq!(of(3), [1, 1, 1, 1, 0, 0, 0]);
        assert_eq!(of(5), [0, 0, 0, 0, 1, 1, 0]);
        assert_eq!(of(6), [0, 0, 0, 0, 0, 0, 1]);
        assert!(masked_places(all.row(0), 1).eq([3]));
        assert!(masked_places(all.row(0), 0).eq([0, 4]));
    }
}
