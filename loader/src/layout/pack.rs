//! The layouts `pack` and `pad`: whole documents in rows, filled up with padding.
//!
//! `pack` puts the pieces of each window into rows by best fit. `pad` gives each piece its own row.
//! Both keep one small table with the start of each window, and the rows before it. The rows of a
//! window are planned when they are read, from the lengths of the window's documents alone.

use std::sync::Arc;

use super::best_fit::Packer;
use super::pieces::{Cut, DocumentSide, Lost, Window, WindowStart};
use super::{Documents, Extent, Layout, LayoutWindow, Lengths, Segment, Stream, WindowPlan};
use crate::error::Result;

/// The settings of a layout that keeps documents whole.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) cut: Cut,
    /// Least number of places that a piece takes.
    pub(super) smallest: u32,
    /// Every piece begins at a multiple of this number of places.
    pub(super) align: u32,
    /// Most pieces in a row.
    pub(super) most: u32,
    pub(super) side: DocumentSide,
}

/// Whole documents in rows.
#[derive(Debug)]
pub(super) struct Pack {
    stream: Arc<Stream>,
    rules: Rules,
    /// All windows with a piece, in the order of the stream.
    windows: Vec<Entry>,
    /// The totals before each shard, and last those of all shards.
    before: Vec<Before>,
}

/// A window and its place.
#[derive(Clone, Copy, Debug)]
struct Entry {
    start: WindowStart,
    rows_before: u64,
    shard: u32,
}

/// Numbers of a window in a table.
const ENTRY_WORDS: usize = 5;

impl Entry {
    fn words(&self) -> [u64; ENTRY_WORDS] {
        let WindowStart { document, offset, stream } = self.start;
        [document, offset, stream, self.rows_before, u64::from(self.shard)]
    }

    fn of_words(words: &[u64; ENTRY_WORDS]) -> Self {
        let [document, offset, stream, rows_before, shard] = *words;
        Self { start: WindowStart { document, offset, stream }, rows_before, shard: shard as u32 }
    }
}

/// What some shards come to.
#[derive(Clone, Copy, Debug, Default)]
struct Before {
    documents: u64,
    windows: usize,
    rows: u64,
    /// Number of tokens in the rows.
    tokens: u64,
    lost: Lost,
}

/// Numbers of a shard in a table.
const BEFORE_WORDS: usize = 8;

impl Before {
    fn words(&self) -> [u64; BEFORE_WORDS] {
        let Self { documents, windows, rows, tokens, lost } = *self;
        let Lost { truncated_documents, truncated_tokens, dropped_documents, dropped_tokens } = lost;
        let lost = [truncated_documents, truncated_tokens, dropped_documents, dropped_tokens];
        let mut words = [documents, windows as u64, rows, tokens, 0, 0, 0, 0];
        words[4..].copy_from_slice(&lost);
        words
    }

    fn of_words(words: &[u64; BEFORE_WORDS]) -> Self {
        let [
            documents,
            windows,
            rows,
            tokens,
            truncated_documents,
            truncated_tokens,
            dropped_documents,
            dropped_tokens,
        ] = *words;
        let lost = Lost { truncated_documents, truncated_tokens, dropped_documents, dropped_tokens };
        Self { documents, windows: windows as usize, rows, tokens, lost }
    }
}

/// The windows of one shard.
#[derive(Debug, Default)]
struct ShardWindows {
    /// The start of each window, and the number of its rows.
    windows: Vec<(WindowStart, u32)>,
    tokens: u64,
    lost: Lost,
}

/// Memory for one window, reused for the next window.
#[derive(Debug, Default)]
struct Scratch {
    window: Window,
    /// Number of places that each piece takes.
    sizes: Vec<u32>,
    packer: Packer,
}

impl Rules {
    /// Finds the windows of a shard from the lengths of its documents, and counts their rows.
    fn windows(&self, documents_before: u64, lengths: &[u32], scratch: &mut Scratch) -> ShardWindows {
        let (mut at, mut all) = (WindowStart::default(), ShardWindows::default());
        while at.document < lengths.len() as u64 {
            let next = self.cut.window(at, &lengths[at.document as usize..], &mut scratch.window);
            all.lost += match self.side {
                DocumentSide::All => scratch.window.lost,
                side => {
                    let documents = at.document..next.document;
                    let lengths = &lengths[documents.start as usize..documents.end as usize];
                    let delivered = (documents_before + documents.start..).zip(lengths);
                    let delivered = delivered.filter(|(document, _)| side.has_document(*document));
                    self.cut.lost(delivered.map(|(_, length)| *length))
                }
            };
            if !scratch.window.pieces.is_empty() {
                let rows = self.pack(documents_before + at.document, scratch);
                let tokens = scratch.window.pieces.iter().map(|piece| u64::from(piece.len));
                all.tokens += tokens.sum::<u64>();
                all.windows.push((at, rows as u32));
            }
            at = next;
        }
        all
    }

    /// Packs the pieces of a window that are on the delivered side. Returns the number of rows.
    /// `first` is the number of the window's first document in the corpus.
    fn pack(&self, first: u64, scratch: &mut Scratch) -> usize {
        let Self { cut: Cut { capacity, .. }, smallest, align, most, side } = *self;
        let Scratch { window: Window { pieces, .. }, sizes, packer } = scratch;
        if side != DocumentSide::All {
            pieces.retain(|piece| side.has_document(first + u64::from(piece.document)));
        }
        sizes.clear();
        // With shifted targets, a piece as long as a row takes one place more than a multiple of
        // `align`.
        let places = |len: u32| len.max(smallest).next_multiple_of(align).min(capacity);
        sizes.extend(pieces.iter().map(|piece| places(piece.len)));
        packer.pack(sizes, capacity, most)
    }
}

impl Pack {
    /// Makes the layout of all shards of `stream`. Reads their document lengths.
    pub(super) fn new(stream: Arc<Stream>, rules: Rules, lengths: Lengths<'_>) -> Result<Self> {
        let (mut windows, mut before) = (Vec::new(), Vec::with_capacity(stream.shards() + 1));
        let (mut sum, mut scratch) = (Before::default(), Scratch::default());
        before.push(sum);
        for shard in 0..stream.shards() {
            let lengths = lengths(shard)?;
            let found = rules.windows(sum.documents, &lengths, &mut scratch);
            for (start, rows) in found.windows {
                windows.push(Entry { start, rows_before: sum.rows, shard: shard as u32 });
                sum.rows += u64::from(rows);
            }
            sum.documents += lengths.len() as u64;
            sum.windows = windows.len();
            sum.tokens += found.tokens;
            sum.lost += found.lost;
            before.push(sum);
        }
        Ok(Self { stream, rules, windows, before })
    }

    /// The layout whose [`Layout::table`] this is.
    pub(super) fn restore(stream: Arc<Stream>, rules: Rules, table: &[u64]) -> Option<Self> {
        let shards = stream.shards() + 1;
        let (before, windows) = table.split_at_checked(shards * BEFORE_WORDS)?;
        let before: Vec<_> = before.as_chunks().0.iter().map(Before::of_words).collect();
        let (windows, rest) = windows.as_chunks();
        let windows: Vec<_> = windows.iter().map(Entry::of_words).collect();
        let fits = rest.is_empty() && before.last().is_some_and(|all| all.windows == windows.len());
        fits.then_some(Self { stream, rules, windows, before })
    }
}

impl Layout for Pack {
    fn extent(&self, shards: usize) -> Extent {
        let Before { rows, tokens, .. } = self.before[shards];
        Extent { stream_len: self.stream.start_of(shards), rows, tokens, tail_tokens: 0 }
    }

    fn locate(&self, extent: &Extent, row: u64) -> (LayoutWindow, usize) {
        assert!(row < extent.rows, "row {row} of {}", extent.rows);
        // Of windows with the same number of rows before them, only the last one has a row.
        let number = self.windows.partition_point(|window| window.rows_before <= row) - 1;
        let Entry { start, rows_before, shard } = self.windows[number];
        let shard = shard as usize;
        let stream = self.stream.start_of(shard) + start.stream;
        let next = self.windows.get(number + 1).filter(|next| next.shard as usize == shard);
        let (end, documents) = match next {
            Some(Entry { start: next, .. }) => {
                let begun = u64::from(next.offset > 0);
                (self.stream.start_of(shard) + next.stream, next.document + begun)
            }
            None => {
                let documents = self.before[shard + 1].documents - self.before[shard].documents;
                (self.stream.start_of(shard + 1), documents)
            }
        };
        let documents = Some((shard, start.document..documents));
        (LayoutWindow { number: number as u64, stream: stream..end, documents }, (row - rows_before) as usize)
    }

    fn plan(&self, window: &LayoutWindow, lengths: &[u32], plan: &mut WindowPlan) {
        let Entry { start, shard, .. } = self.windows[window.number as usize];
        let mut scratch = Scratch::default();
        self.rules.cut.window(start, lengths, &mut scratch.window);
        let first = self.before[shard as usize].documents + start.document;
        let rows = self.rules.pack(first, &mut scratch);
        let shard_start = self.stream.start_of(shard as usize);
        plan.place(rows, scratch.packer.rows(), |piece| {
            let found = scratch.window.pieces[piece];
            let documents = Documents::One { number: start.document + u64::from(found.document), ends: found.ends };
            let segment = Segment { start: shard_start + found.start, len: u64::from(found.len), place: 0, documents };
            (segment, u64::from(scratch.sizes[piece]))
        });
    }

    fn window_rows(&self, shards: usize) -> Option<Vec<u64>> {
        Some(self.windows[..self.before[shards].windows].iter().map(|window| window.rows_before).collect())
    }

    fn lost(&self, shards: usize) -> Lost {
        self.before[shards].lost
    }

    fn table(&self) -> Vec<u64> {
        let before = self.before.iter().flat_map(Before::words);
        before.chain(self.windows.iter().flat_map(Entry::words)).collect()
    }

    fn index_bytes(&self) -> u64 {
        (size_of_val(self.windows.as_slice()) + size_of_val(self.before.as_slice())) as u64
    }
}
