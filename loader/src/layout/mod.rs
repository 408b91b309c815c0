//! Layout: decides which segments of a source's stream make each row.
//!
//! The *stream* of a source ([`Stream`]) joins its non-empty documents in corpus order. `bos_id`
//! and `eos_id` surround each document if they are set. A *segment* is a stretch of the stream at a
//! place in a row. A [`Layout`] finds the segments of row `i` in two pure steps:
//!
//! ```text
//! locate(row)           -> (window, row in the window)
//! plan(window, lengths) -> the segments of the window's rows
//! ```
//!
//! A layout reads no file. The room `read` supplies the document lengths that a window needs, and
//! keeps plans of windows. Every layout is one file here and a line in [`build`]. No other room
//! names a layout.

mod best_fit;
mod concat;
mod pack;
mod pieces;
mod rows;
mod stream;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use pieces::{DocumentSide, Lost, WINDOW_TOKENS};
pub use stream::{Specials, Stream};

use crate::error::Result;
use crate::settings::{Config, LayoutKind, Overflow};

/// A stretch of the stream at a place in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First place of the stretch in the stream.
    pub start: u64,
    /// Length in stream tokens, at least 1.
    pub len: u64,
    /// Place of its first token in the row. Places that no segment covers are padding.
    pub place: u64,
    /// The documents of the stretch.
    pub documents: Documents,
}

impl Segment {
    /// Makes a segment of the joined stream.
    pub fn joined(start: u64, len: u64, place: u64) -> Self {
        Self { start, len, place, documents: Documents::Joined }
    }

    /// The stream tokens of the segment.
    pub fn stream(&self) -> Range<u64> {
        self.start..self.start + self.len
    }
}

/// The documents of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Documents {
    /// Any number of documents, cut anywhere. Reading the shards finds their borders.
    Joined,
    /// A piece of one document.
    One {
        /// Number of the document among the non-empty documents of its shard.
        number: u64,
        /// Whether the document ends with this segment.
        ends: bool,
    },
}

/// The rows of a corpus, or of its first shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Number of tokens of the stream, including special ids.
    pub stream_len: u64,
    /// Number of full rows.
    pub rows: u64,
    /// Number of stream tokens in rows and the tail. These are all tokens, unless the layout leaves
    /// some out.
    pub tokens: u64,
    /// Number of stream tokens after the full rows. One more row, shorter and with the number
    /// `rows`, delivers them.
    pub tail_tokens: u64,
}

/// A run of rows that are planned together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutWindow {
    /// Number of the window in its layout.
    pub number: u64,
    /// Places of the window in the stream.
    pub stream: Range<u64>,
    /// The documents whose lengths the plan needs: a shard, and numbers among its non-empty
    /// documents. `None` if arithmetic is enough.
    pub documents: Option<(usize, Range<u64>)>,
}

/// The segments of a window's rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WindowPlan {
    segments: Vec<Segment>,
    /// Number of segments up to the end of each row.
    row_ends: Vec<u32>,
}

impl WindowPlan {
    /// Removes all rows, and keeps the memory.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.row_ends.clear();
    }

    /// Adds a row of `segments`, which are sorted by their place.
    pub fn push_row(&mut self, segments: &[Segment]) {
        self.segments.extend_from_slice(segments);
        self.row_ends.push(self.segments.len() as u32);
    }

    /// Adds `rows` rows of pieces. `row_of` gives the row of each piece. `segment` makes the
    /// segment of a piece and gives the places that it takes. The pieces of a row follow each
    /// other.
    fn place(&mut self, rows: usize, row_of: &[u32], segment: impl Fn(usize) -> (Segment, u64)) {
        let first = self.segments.len() as u32;
        let mut next = vec![0; rows + 1];
        for row in row_of {
            next[*row as usize + 1] += 1;
        }
        next[0] = first;
        for row in 0..rows {
            next[row + 1] += next[row];
        }
        self.row_ends.extend_from_slice(&next[1..]);
        self.segments.resize(first as usize + row_of.len(), Segment::joined(0, 0, 0));
        let mut places = vec![0; rows];
        for (piece, row) in row_of.iter().enumerate() {
            let (at, place) = (&mut next[*row as usize], &mut places[*row as usize]);
            let (segment, taken) = segment(piece);
            self.segments[*at as usize] = Segment { place: *place, ..segment };
            *at += 1;
            *place += taken;
        }
    }

    /// Number of planned rows.
    pub fn len(&self) -> usize {
        self.row_ends.len()
    }

    /// Whether the plan has no row.
    pub fn is_empty(&self) -> bool {
        self.row_ends.is_empty()
    }

    /// The segments of row `row` of the window.
    ///
    /// # Panics
    /// If the window has fewer rows.
    pub fn row(&self, row: usize) -> &[Segment] {
        let start = if row == 0 { 0 } else { self.row_ends[row - 1] as usize };
        &self.segments[start..self.row_ends[row] as usize]
    }
}

/// A rule that makes rows from documents. It is a pure function of the shards' counts and of
/// document lengths.
///
/// The rows of the first k shards are the rows of a corpus of these shards alone, so that a corpus
/// may grow at its end. Several threads call all methods at once.
pub trait Layout: fmt::Debug + Send + Sync {
    /// The extent of the first `shards` shards.
    ///
    /// # Panics
    /// If there are fewer shards.
    fn extent(&self, shards: usize) -> Extent;

    /// The window with row `row` of `extent`, and the row's number in the window. The tail is row
    /// `extent.rows`.
    fn locate(&self, extent: &Extent, row: u64) -> (LayoutWindow, usize);

    /// Writes the rows of `window` to `plan`, which is empty. `lengths` gives the tokens of the
    /// documents that the window needs, without special ids.
    fn plan(&self, window: &LayoutWindow, lengths: &[u32], plan: &mut WindowPlan);

    /// Number of tokens that the first `shards` shards lose because documents are longer than a
    /// row.
    ///
    /// # Panics
    /// If there are fewer shards.
    fn lost(&self, shards: usize) -> Lost {
        let _ = shards;
        Lost::default()
    }

    /// The segment of row `row` of `extent`, if each row is one stretch of the joined stream. Such
    /// a row needs no plan of its window, which would give the same segment.
    fn one_segment(&self, extent: &Extent, row: u64) -> Option<Segment> {
        let _ = (extent, row);
        None
    }

    /// The first row of each window of the first `shards` shards, if windows hold many rows.
    ///
    /// Rows of a window share their documents' lengths and blocks, so that an order keeps them near
    /// each other.
    ///
    /// # Panics
    /// If there are fewer shards.
    fn window_rows(&self, shards: usize) -> Option<Vec<u64>> {
        let _ = shards;
        None
    }

    /// The layout's own tables, from which [`restore`] makes the layout without any document
    /// length.
    fn table(&self) -> Vec<u64>;

    /// Bytes of the layout's own tables.
    fn index_bytes(&self) -> u64;
}

/// The lengths of all non-empty documents of a shard, in tokens without special ids. Reading them
/// may fail.
pub type Lengths<'a> = &'a dyn Fn(usize) -> Result<Arc<[u32]>>;

/// A rule that makes rows, with its settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutSettings {
    /// The rule.
    pub kind: LayoutKind,
    /// Number of inputs of a row.
    pub seq_len: u64,
    /// Number of tokens of a row: one more than `seq_len` for shifted targets.
    pub row_tokens: u64,
    /// The treatment of a document that is longer than a row.
    pub overflow: Overflow,
    /// Most documents in a row of `pack`.
    pub max_docs_per_row: Option<u32>,
    /// Documents of `pack` begin at multiples of this number of tokens.
    pub pack_align: u32,
    /// The documents that become rows of `pack` and `pad`.
    pub side: DocumentSide,
}

impl LayoutSettings {
    /// The settings that `config` gives.
    pub fn of(config: &Config) -> Self {
        Self {
            kind: config.layout,
            seq_len: config.seq_len,
            row_tokens: config.row_tokens(),
            overflow: config.overflow,
            max_docs_per_row: config.max_docs_per_row.map(|most| most as u32),
            pack_align: config.pack_align as u32,
            side: DocumentSide::of(config),
        }
    }

    fn rules(&self, specials: Specials) -> pack::Rules {
        let specials = specials.per_document() as u32;
        let capacity = self.row_tokens as u32;
        let is_pack = self.kind == LayoutKind::Pack;
        pack::Rules {
            cut: pieces::Cut { capacity, specials, overflow: self.overflow },
            // With shifted targets, the last token of a row is only a target. A piece of one token
            // cannot be that alone.
            smallest: 1 + u32::from(self.row_tokens > self.seq_len),
            align: if is_pack { self.pack_align } else { 1 },
            most: if is_pack { self.max_docs_per_row.unwrap_or(u32::MAX) } else { 1 },
            side: self.side,
        }
    }
}

/// Makes the layout that `config` asks for, over `stream`. If its tables need document lengths, it
/// reads them here, shard by shard.
pub fn open(config: &Config, stream: &Arc<Stream>, lengths: Lengths<'_>) -> Result<Box<dyn Layout>> {
    build(&LayoutSettings::of(config), stream, lengths)
}

/// Makes the layout of `settings`, like [`open`].
pub fn build(settings: &LayoutSettings, stream: &Arc<Stream>, lengths: Lengths<'_>) -> Result<Box<dyn Layout>> {
    let (stream, rules) = (Arc::clone(stream), settings.rules(stream.specials()));
    Ok(match settings.kind {
        LayoutKind::Concat => Box::new(concat::Concat::new(stream, settings.seq_len, settings.row_tokens)),
        LayoutKind::Pack | LayoutKind::Pad => Box::new(pack::Pack::new(stream, rules, lengths)?),
        LayoutKind::Rows => Box::new(rows::Rows::new(stream, settings.row_tokens, lengths)?),
    })
}

/// The layout of `settings`, from the table of an equal layout over an equal stream. Returns `None`
/// if no such layout has this table.
pub fn restore(settings: &LayoutSettings, stream: &Arc<Stream>, table: &[u64]) -> Option<Box<dyn Layout>> {
    let (stream, rules) = (Arc::clone(stream), settings.rules(stream.specials()));
    Some(match settings.kind {
        LayoutKind::Concat => Box::new(concat::Concat::new(stream, settings.seq_len, settings.row_tokens)),
        LayoutKind::Pack | LayoutKind::Pad => Box::new(pack::Pack::restore(stream, rules, table)?),
        LayoutKind::Rows => Box::new(rows::Rows::restore(stream, settings.row_tokens, table)?),
    })
}
