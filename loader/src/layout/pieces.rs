//! Pieces: documents cut to the length of a row, and gathered in windows.
//!
//! A *piece* is a stretch of one document that fits into a row. A document that fits is one piece.
//! The rule [`Overflow`] decides about a longer document.
//!
//! A *window* is a run of pieces of one shard. It ends with the piece that brings it to
//! [`WINDOW_PIECES`] pieces or [`WINDOW_TOKENS`] tokens, or with its shard. So a window depends
//! only on the documents of its shard. A long document may span several windows.
//!
//! Lengths count stream tokens: `bos_id` and `eos_id` belong to the document that they surround.

use crate::keys::{derive_key, reduce};
use crate::settings::{Config, Overflow, Split};

/// Number of pieces with which a window ends.
pub(super) const WINDOW_PIECES: usize = 16_384;
/// Number of tokens with which a window ends.
pub const WINDOW_TOKENS: u64 = 4 << 20;

/// The rule that turns documents into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Number of stream tokens in a row.
    pub(super) capacity: u32,
    /// Number of special ids around each document: 0, 1 or 2.
    pub(super) specials: u32,
    pub(super) overflow: Overflow,
}

/// Separates the draw of documents from other keys.
const DOCUMENT: u64 = 0x646f_6375_6d65_6e74;

/// The documents that become rows: all of them, or one side of a holdout.
///
/// A hash of a document's number in the corpus draws its side. So a document keeps its side under
/// every seed, and when the corpus grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DocumentSide {
    /// All documents.
    #[default]
    All,
    /// All documents except about one in this many.
    Train(u64),
    /// About one document in this many.
    Holdout(u64),
}

impl DocumentSide {
    /// The side that `config` delivers.
    pub fn of(config: &Config) -> Self {
        match (config.holdout, config.split) {
            (None, _) => Self::All,
            (Some(every), Split::Train) => Self::Train(every),
            (Some(every), Split::Holdout) => Self::Holdout(every),
        }
    }

    /// Whether document `number` of the corpus is on this side.
    pub(super) fn has_document(self, number: u64) -> bool {
        let held_out = |every: u64| reduce(derive_key(DOCUMENT, &[number]), every) == 0;
        match self {
            Self::All => true,
            Self::Train(every) => !held_out(every),
            Self::Holdout(every) => held_out(every),
        }
    }
}

/// A stretch of one document that fits into a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// First place in the stream of the shard.
    pub(super) start: u64,
    /// Length in stream tokens.
    pub(super) len: u32,
    /// Number of the document among the documents that the window reads.
    pub(super) document: u32,
    /// Whether the document ends here.
    pub(super) ends: bool,
}

/// The start of a window in its shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct WindowStart {
    /// Number of the first document among the non-empty documents of the shard.
    pub(super) document: u64,
    /// Number of stream tokens of that document in earlier windows.
    pub(super) offset: u64,
    /// Place of the first token in the stream of the shard.
    pub(super) stream: u64,
}

/// Stream tokens without a row, because their documents are longer than a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Number of documents that [`Overflow::Truncate`] cut off.
    pub truncated_documents: u64,
    /// Number of their tokens that are left out.
    pub truncated_tokens: u64,
    /// Number of documents that [`Overflow::Drop`] left out.
    pub dropped_documents: u64,
    /// Number of their tokens.
    pub dropped_tokens: u64,
}

impl std::ops::AddAssign for Lost {
    fn add_assign(&mut self, other: Self) {
        self.truncated_documents += other.truncated_documents;
        self.truncated_tokens += other.truncated_tokens;
        self.dropped_documents += other.dropped_documents;
        self.dropped_tokens += other.dropped_tokens;
    }
}

/// The pieces of one window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Window {
    /// The pieces, in the order of the stream.
    pub(super) pieces: Vec<Piece>,
    /// Tokens of the documents that were left out or cut off in this window.
    pub(super) lost: Lost,
}

impl Cut {
    /// Counts the tokens and documents that `overflow` loses of documents with these lengths.
    pub(super) fn lost(&self, lengths: impl Iterator<Item = u32>) -> Lost {
        let mut lost = Lost::default();
        let capacity = u64::from(self.capacity);
        for len in lengths.map(|length| u64::from(length) + u64::from(self.specials)).filter(|len| *len > capacity) {
            match self.overflow {
                Overflow::Split => {}
                Overflow::Truncate => {
                    lost.truncated_documents += 1;
                    lost.truncated_tokens += len - capacity;
                }
                Overflow::Drop => {
                    lost.dropped_documents += 1;
                    lost.dropped_tokens += len;
                }
            }
        }
        lost
    }

    /// Cuts the window that begins at `start` into `window`.
    ///
    /// `lengths` gives the token counts of the documents from `start.document` on, without special
    /// ids. Returns the start of the next window. If that is after the last document, the shard is
    /// finished.
    pub(super) fn window(&self, start: WindowStart, lengths: &[u32], window: &mut Window) -> WindowStart {
        let Window { pieces, lost } = window;
        pieces.clear();
        *lost = Lost::default();
        let capacity = u64::from(self.capacity);
        let (mut stream, mut offset, mut tokens) = (start.stream, start.offset, 0);
        for (document, length) in (0..).zip(lengths) {
            let len = u64::from(*length) + u64::from(self.specials) - offset;
            let next = stream + len;
            let is_long = offset + len > capacity;
            let mut add = |start: u64, len: u64, ends: bool| {
                pieces.push(Piece { start, len: len as u32, document, ends });
                tokens += len;
                pieces.len() >= WINDOW_PIECES || tokens >= WINDOW_TOKENS
            };
            let full = match self.overflow {
                _ if !is_long => add(stream, len, true),
                Overflow::Split => {
                    let mut full = false;
                    while stream < next && !full {
                        let len = capacity.min(next - stream);
                        full = add(stream, len, stream + len == next);
                        stream += len;
                    }
                    full
                }
                Overflow::Truncate => {
                    lost.truncated_documents += 1;
                    lost.truncated_tokens += len - capacity;
                    add(stream, capacity, false)
                }
                Overflow::Drop => {
                    lost.dropped_documents += 1;
                    lost.dropped_tokens += len;
                    false
                }
            };
            let here = start.document + u64::from(document);
            if full && is_long && self.overflow == Overflow::Split && stream < next {
                let consumed = offset + len - (next - stream);
                return WindowStart { document: here, offset: consumed, stream };
            }
            (stream, offset) = (next, 0);
            if full {
                return WindowStart { document: here + 1, offset: 0, stream };
            }
        }
        WindowStart { document: start.document + lengths.len() as u64, offset: 0, stream }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All windows of a shard.
    fn windows(cut: Cut, lengths: &[u32]) -> Vec<(WindowStart, Window)> {
        let (mut at, mut all) = (WindowStart::default(), Vec::new());
        while at.document < lengths.len() as u64 {
            let mut window = Window::default();
            let next = cut.window(at, &lengths[at.document as usize..], &mut window);
            all.push((at, window));
            assert!(next.stream > at.stream, "a window takes some of the stream");
            at = next;
        }
        all
    }

    proptest! {
        #[test]
        fn pieces_hold_each_token_that_is_not_lost_once_and_in_order(
            lengths in prop::collection::vec(prop_oneof![1u32..40, 1u32..3000], 0..400), capacity in 1u32..60,
            specials in 0u32..3, overflow in prop::sample::select(vec![Overflow::Split, Overflow::Truncate, Overflow::Drop]),
        ) {
            let cut = Cut { capacity, specials, overflow };
            let (mut expected, mut stream, mut lost) = (Vec::new(), 0, 0);
            for length in &lengths {
                let len = u64::from(length + specials);
                let kept = match overflow {
                    Overflow::Split => len,
                    Overflow::Truncate => len.min(u64::from(capacity)),
                    Overflow::Drop => if len > u64::from(capacity) { 0 } else { len },
                };
                expected.extend(stream..stream + kept);
                stream += len;
                lost += len - kept;
            }
            let windows = windows(cut, &lengths);
            let mut found = Vec::new();
            let mut counted = Lost::default();
            for (start, window) in &windows {
                counted += window.lost;
                for piece in &window.pieces {
                    prop_assert!(piece.len >= 1 && piece.len <= capacity);
                    prop_assert!(start.document + u64::from(piece.document) < lengths.len() as u64);
                    found.extend(piece.start..piece.start + u64::from(piece.len));
                }
            }
            prop_assert_eq!(found, expected);
            prop_assert_eq!(counted.truncated_tokens + counted.dropped_tokens, lost);
        }
    }

    #[test]
    fn a_window_ends_with_the_piece_that_fills_it() {
        let cut = Cut { capacity: 1 << 20, specials: 0, overflow: Overflow::Split };
        // One document has nine rows: a window of four pieces, another one, and the rest together
        // with the next document.
        let windows = windows(cut, &[9 << 20, 5]);
        let starts: Vec<_> = windows.iter().map(|(start, window)| (start.offset >> 20, window.pieces.len())).collect();
        assert_eq!(starts, [(0, 4), (4, 4), (8, 2)]);
        assert_eq!(windows[2].1.pieces[0], Piece { start: 8 << 20, len: 1 << 20, document: 0, ends: true });
        assert_eq!(windows[2].1.pieces[1], Piece { start: 9 << 20, len: 5, document: 1, ends: true });

        let short = vec![3; WINDOW_PIECES * 2 + 1];
        let starts: Vec<_> = self::windows(cut, &short).iter().map(|(start, _)| start.document).collect();
        assert_eq!(starts, [0, WINDOW_PIECES as u64, 2 * WINDOW_PIECES as u64]);
    }
}
