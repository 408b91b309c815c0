//! Puts whole documents into rows, as the layouts `pack`, `pad` and `rows` promise.
//!
//! Shares no code with the loader's own layouts, so that a fault there does not prove itself. Takes
//! the documents of a shard in order, and gives the rows of each window.

use std::collections::BTreeMap;
use std::ops::Range;

use forebay::settings::{LayoutKind, Overflow, Split, Targets};
use forebay::{Config, Error, Result};

/// Number of pieces that end a window.
const WINDOW_PIECES: usize = 16_384;
/// Number of tokens that end a window.
const WINDOW_TOKENS: usize = 4 << 20;

/// A document of the files: its shard, and its row there.
pub(crate) type DocumentRow = (usize, u64);

/// Receives a row: its tokens without padding, its spans, and the document of each span. A span is
/// a place and a length.
pub(crate) type Emit<'a> = &'a mut dyn FnMut(&[i64], &[(u32, u32)], &[DocumentRow]);

/// The window that is being filled.
#[derive(Debug)]
pub(crate) struct Window {
    overflow: Overflow,
    /// Tokens of a row.
    capacity: usize,
    /// Places that a piece takes at least.
    smallest: usize,
    align: usize,
    most: usize,
    /// Documents of the corpus before the next document.
    before: u64,
    /// A document of so many is held out. `None` delivers all documents.
    holdout: Option<u64>,
    /// The side that is delivered.
    split: Split,
    tokens: Vec<i64>,
    pieces: Vec<Piece>,
    /// Places in `tokens` where a document begins inside a piece.
    begins: Vec<usize>,
}

/// A piece of a document that fits into a row.
#[derive(Debug)]
struct Piece {
    /// Its tokens, as a range of the window's tokens.
    tokens: Range<usize>,
    document: DocumentRow,
    /// Whether the document is on the delivered side.
    is_delivered: bool,
}

impl Window {
    /// An empty window for the rows of `config`. `None` if documents are joined. Fails for a layout
    /// that is unknown here.
    pub(crate) fn of(config: &Config) -> Result<Option<Self>> {
        let is_shifted = config.targets == Targets::Shifted;
        if !matches!(config.layout, LayoutKind::Concat | LayoutKind::Pack | LayoutKind::Pad | LayoutKind::Rows) {
            return Err(Error::config(format!(
                "only a loader makes rows of `layout` = {}: `verify` has no rules for them",
                config.layout.name()
            )));
        }
        let is_pack = config.layout == LayoutKind::Pack;
        let most = config.max_docs_per_row.map_or(usize::MAX, |most| most as usize);
        Ok((!config.layout.joins()).then(|| Self {
            overflow: config.overflow,
            capacity: config.seq_len as usize + usize::from(is_shifted),
            smallest: 1 + usize::from(is_shifted),
            align: config.pack_align as usize,
            most: if is_pack { most } else { 1 },
            before: 0,
            // In the layout `rows`, a holdout draws rows.
            holdout: config.holdout.filter(|_| config.layout.has_windows()),
            split: config.split,
            tokens: Vec::new(),
            pieces: Vec::new(),
            begins: Vec::new(),
        }))
    }

    /// Begins after the first `documents` documents of the corpus.
    pub(crate) fn begin_after(&mut self, documents: u64) {
        self.before = documents;
    }

    /// Adds a document that has tokens. Gives the rows of each window that it fills. If the
    /// document was packed before, the documents inside it begin at `starts`.
    pub(crate) fn add(&mut self, place: DocumentRow, document: &[i64], starts: &[usize], emit: Emit<'_>) {
        let is_delivered = match self.holdout {
            None => true,
            Some(every) => is_held_out(self.before, every) == (self.split == Split::Holdout),
        };
        self.before += 1;
        let is_long = document.len() > self.capacity;
        let kept = match self.overflow {
            Overflow::Truncate if is_long => &document[..self.capacity],
            Overflow::Drop if is_long => &[],
            _ => document,
        };
        for (index, piece) in kept.chunks(self.capacity).enumerate() {
            let (start, offset) = (self.tokens.len(), index * self.capacity);
            let inside = starts.iter().filter_map(|place| place.checked_sub(offset));
            self.begins.extend(inside.filter(|place| (1..piece.len()).contains(place)).map(|place| start + place));
            self.tokens.extend_from_slice(piece);
            self.pieces.push(Piece { tokens: start..self.tokens.len(), document: place, is_delivered });
            if self.pieces.len() >= WINDOW_PIECES || self.tokens.len() >= WINDOW_TOKENS {
                self.end(emit);
            }
        }
    }

    /// Ends the window, as the end of a shard does, and gives its rows.
    pub(crate) fn end(&mut self, emit: Emit<'_>) {
        self.pieces.retain(|piece| piece.is_delivered);
        let sizes: Vec<usize> = self.pieces.iter().map(|piece| self.size(piece.tokens.len())).collect();
        for row in best_fit(&sizes, self.capacity, self.most) {
            let (mut place, mut tokens, mut spans, mut documents) = (0, Vec::new(), Vec::new(), Vec::new());
            for number in row {
                let piece = &self.pieces[number];
                let range = piece.tokens.clone();
                let first = self.begins.partition_point(|begin| *begin < range.start);
                let inside = self.begins[first..].iter().take_while(|begin| **begin < range.end);
                let mut borders: Vec<usize> = std::iter::once(range.start).chain(inside.copied()).collect();
                borders.push(range.end);
                for pair in borders.windows(2) {
                    spans.push(((place + pair[0] - range.start) as u32, (pair[1] - pair[0]) as u32));
                    documents.push(piece.document);
                }
                tokens.extend_from_slice(&self.tokens[range]);
                place += sizes[number];
            }
            emit(&tokens, &spans, &documents);
        }
        self.tokens.clear();
        self.pieces.clear();
        self.begins.clear();
    }

    /// Places that a piece of `len` tokens takes.
    fn size(&self, len: usize) -> usize {
        len.max(self.smallest).next_multiple_of(self.align).min(self.capacity)
    }
}

/// Whether a holdout of one document in `every` takes document `number` of the corpus: a hash of
/// the number, scaled to `0..every`, is 0.
fn is_held_out(number: u64, every: u64) -> bool {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let name = u64::from_be_bytes(*b"document");
    let hash = mix(name.wrapping_add(0x9E37_79B9_7F4A_7C15) ^ mix(number));
    (u128::from(hash) * u128::from(every)) >> 64 == 0
}

/// The pieces of each row: the largest piece first, each into the row with the least room that is
/// enough. Among equal rows, the row that got a piece last is taken.
fn best_fit(sizes: &[usize], capacity: usize, most: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|piece| std::cmp::Reverse(sizes[*piece]));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for piece in order {
        let size = sizes[piece];
        let found = open.range(size..).next().map(|(room, _)| *room);
        let (room, row) = match found.and_then(|room| Some((room, open.get_mut(&room)?.pop()?))) {
            Some((room, row)) => {
                if open.get(&room).is_some_and(Vec::is_empty) {
                    open.remove(&room);
                }
                (room, row)
            }
            None => {
                rows.push(Vec::new());
                (capacity, rows.len() - 1)
            }
        };
        rows[row].push(piece);
        if rows[row].len() < most {
            open.entry(room - size).or_default().push(row);
        }
    }
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows.sort_unstable();
    rows
}
