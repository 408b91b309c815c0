//! Levels: reads repetition and definition levels as bitmaps of rows and tokens.
//!
//! Takes the encoded levels of a page. Gives counts of its tokens, rows and documents, the offsets
//! at which documents begin, and null tokens. Levels come in long runs. This module spreads them
//! into bit planes, 64 entries at a time, and counts with population counts.
//!
//! An *entry* is one pair of levels: a token, a null token, or the mark of an empty or null list.

use super::column::Column;
use super::runs::{Run, Runs};
use crate::error::{Error, Result};

/// The levels of one page. Reused from page to page.
#[derive(Debug, Default)]
pub(super) struct Levels {
    entries: usize,
    /// A bit is set where an entry continues its row.
    continued: Vec<u64>,
    /// Lower and upper bits of the definition levels. Unused if all entries are tokens.
    low: Vec<u64>,
    high: Vec<u64>,
    /// A bit is set where an entry is a token, null or not. Unused if all entries are tokens.
    tokens: Vec<u64>,
    all_tokens: bool,
    lists: bool,
    /// Totals of the page's levels.
    pub(super) counts: LevelCounts,
}

/// Totals of the levels of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LevelCounts {
    /// Number of tokens, null ones included.
    pub(super) tokens: usize,
    /// Number of rows that begin in the page.
    pub(super) rows: usize,
    /// Number of non-empty documents that begin in the page.
    pub(super) starts: usize,
    /// Whether any token is null.
    pub(super) nulls: bool,
    /// Whether the first entry begins a row.
    pub(super) begins_row: bool,
    /// Whether the first token begins a document.
    pub(super) opens: bool,
    /// Whether the last entry is an empty row.
    pub(super) ends_empty: bool,
    /// Number of the row that contains the first document start, among the rows that begin in the
    /// page.
    pub(super) first_start_row: usize,
    /// The first row of a further column that is null, among the rows that begin in the page.
    pub(super) null_row: Option<usize>,
}

impl Levels {
    /// Reads the levels of a page with `entries` entries.
    pub(super) fn read(&mut self, column: &Column, rep: &[u8], def: &[u8], entries: usize) -> Result<()> {
        // The planes take four bits for each entry, and few bytes can claim many entries.
        if entries as u64 / 2 > column.most_bytes {
            return Err(Error::data(format!(
                "the levels of a page of {entries} entries take more than `memory_budget` = {}: write smaller pages, or \
                 raise it",
                column.most_bytes
            )));
        }
        self.entries = entries;
        self.lists = column.lists;
        self.all_tokens = column.max_def == 0 || uniform(def, column.def_width(), entries)? == Some(column.max_def);
        self.continued.clear();
        if column.lists {
            planes(rep, 1, entries, &mut self.continued, None)?;
        }
        if !self.all_tokens {
            self.low.clear();
            self.high.clear();
            planes(def, column.def_width(), entries, &mut self.low, Some(&mut self.high))?;
        }
        self.count(column)
    }

    fn count(&mut self, column: &Column) -> Result<()> {
        let mut counts = LevelCounts::default();
        let words = self.entries.div_ceil(64);
        self.tokens.clear();
        let (mut found_token, mut found_start) = (false, false);
        let mut previous_empty = false;
        for word in 0..words {
            let valid = self.valid(word);
            let row = self.row_bits(word) & valid;
            if self.all_tokens && row == 0 && found_token && valid == u64::MAX {
                // These 64 entries lie inside a long document.
                counts.tokens += 64;
                continue;
            }
            let token = if self.all_tokens {
                valid
            } else {
                let (low, high) = (self.low[word], self.high[word]);
                if at_least(low, high, column.max_def + 1) & valid != 0 {
                    return Err(damaged("a definition level is out of range"));
                }
                counts.nulls |=
                    at_least(low, high, column.max_def) & valid != at_least(low, high, column.list_def) & valid;
                let token = at_least(low, high, column.list_def) & valid;
                self.tokens.push(token);
                token
            };
            let empty = row & !token;
            if !self.all_tokens {
                if column.is_field && column.list_def > 0 {
                    // An empty list has the level just below that of a value.
                    let null = empty & !at_least(self.low[word], self.high[word], column.list_def - 1);
                    if null != 0 {
                        let before = row & ((1 << null.trailing_zeros()) - 1);
                        counts.null_row.get_or_insert(counts.rows + before.count_ones() as usize);
                    }
                }
                let after_empty = empty << 1 | u64::from(previous_empty);
                if !row & valid & (!token | after_empty) != 0 && self.lists {
                    return Err(damaged("a row without tokens goes on"));
                }
            }
            let last = (self.entries - word * 64).min(64) - 1;
            previous_empty = empty >> last & 1 == 1;
            let start = row & token;
            if word == 0 {
                counts.begins_row = row & 1 == 1;
            }
            if !found_token && token != 0 {
                found_token = true;
                counts.opens = start >> token.trailing_zeros() & 1 == 1;
            }
            if !found_start && start != 0 {
                found_start = true;
                let upto = u64::MAX >> (63 - start.trailing_zeros());
                counts.first_start_row = counts.rows + (row & upto).count_ones() as usize - 1;
            }
            counts.rows += row.count_ones() as usize;
            counts.tokens += token.count_ones() as usize;
            counts.starts += start.count_ones() as usize;
        }
        counts.ends_empty = previous_empty;
        self.counts = counts;
        Ok(())
    }

    /// Appends the token offset of each document start, plus `base`, to `out`. Leaves out offset 0.
    pub(super) fn push_starts(&self, base: u32, out: &mut Vec<u32>) {
        if !self.lists {
            return;
        }
        let mut before = base;
        for word in 0..self.entries.div_ceil(64) {
            let token = self.token_bits(word);
            let mut start = self.row_bits(word) & token;
            if token == u64::MAX && start == 0 {
                before += 64;
                continue;
            }
            while start != 0 {
                let below = (1u64 << start.trailing_zeros()) - 1;
                let offset = before + (token & below).count_ones();
                if offset != 0 {
                    out.push(offset);
                }
                start &= start - 1;
            }
            before += token.count_ones();
        }
    }

    /// Number of rows that begin up to token `index` of the page, its own row included.
    pub(super) fn rows_until(&self, index: usize) -> u64 {
        let (mut tokens, mut rows) = (0, 0u64);
        for word in 0..self.entries.div_ceil(64) {
            let (mut token, row) = (self.token_bits(word), self.row_bits(word) & self.valid(word));
            let here = token.count_ones() as usize;
            if tokens + here > index {
                for _ in 0..index - tokens {
                    token &= token - 1;
                }
                let upto = u64::MAX >> (63 - token.trailing_zeros());
                return rows + u64::from((row & upto).count_ones());
            }
            tokens += here;
            rows += u64::from(row.count_ones());
        }
        rows
    }

    /// Index of the first null token, among the tokens of the page.
    pub(super) fn first_null(&self, column: &Column) -> Option<usize> {
        if self.all_tokens {
            return None;
        }
        let mut before = 0;
        for word in 0..self.entries.div_ceil(64) {
            let token = self.token_bits(word);
            let null = token & !at_least(self.low[word], self.high[word], column.max_def);
            if null != 0 {
                let below = (1u64 << null.trailing_zeros()) - 1;
                return Some(before + (token & below).count_ones() as usize);
            }
            before += token.count_ones() as usize;
        }
        None
    }

    fn valid(&self, word: usize) -> u64 {
        let left = self.entries - word * 64;
        if left >= 64 { u64::MAX } else { (1 << left) - 1 }
    }

    fn row_bits(&self, word: usize) -> u64 {
        if self.lists { !self.continued[word] } else { u64::MAX }
    }

    fn token_bits(&self, word: usize) -> u64 {
        if self.all_tokens { self.valid(word) } else { self.tokens[word] }
    }
}

/// Appends the token offset of each document start, plus `base`, to `out`, and leaves out offset 0.
/// Returns the number of tokens and of document starts.
///
/// Reads the runs directly and builds no bitmaps. Returns `None` if any entry is not a token or the
/// levels are damaged; [`Levels`] handles these pages.
pub(super) fn push_starts(
    column: &Column,
    rep: &[u8],
    def: &[u8],
    entries: usize,
    base: u32,
    out: &mut Vec<u32>,
) -> Option<(usize, usize)> {
    if column.max_def > 0 && uniform(def, column.def_width(), entries).ok()? != Some(column.max_def) {
        return None;
    }
    if !column.lists {
        return Some((entries, 0));
    }
    let mut starts = 0;
    let mut push = |at: usize| {
        starts += 1;
        let place = base + at as u32;
        if place != 0 {
            out.push(place);
        }
    };
    let mut runs = Runs::new(rep, 1);
    let mut at = 0;
    while at < entries {
        match runs.next(entries - at).ok()? {
            Run::Repeated { value: 0, count } => {
                (at..at + count).for_each(&mut push);
                at += count;
            }
            Run::Repeated { value: 1, count } => at += count,
            Run::Repeated { .. } => return None,
            Run::Packed { bytes, count } => {
                for (group, from) in bytes.chunks(8).zip((0..count).step_by(64)) {
                    let left = count - from;
                    let valid = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
                    let mut starts = !little(group) & valid;
                    while starts != 0 {
                        push(at + from + starts.trailing_zeros() as usize);
                        starts &= starts - 1;
                    }
                }
                at += count;
            }
        }
    }
    Some((entries, starts))
}

fn damaged(what: &str) -> Error {
    Error::data(format!("page levels are damaged: {what}"))
}

/// Bits of the entries whose two-bit level is at least `level`.
fn at_least(low: u64, high: u64, level: u32) -> u64 {
    match level {
        0 => u64::MAX,
        1 => low | high,
        2 => high,
        3 => low & high,
        _ => 0,
    }
}

/// The level that all entries have, if the stream consists of runs of it.
fn uniform(bytes: &[u8], width: u32, entries: usize) -> Result<Option<u32>> {
    let mut runs = Runs::new(bytes, width);
    let (mut level, mut left) = (None, entries);
    while left > 0 {
        match runs.next(left)? {
            Run::Repeated { value, count } if level.is_none_or(|level| level == value) => {
                level = Some(value);
                left -= count;
            }
            _ => return Ok(None),
        }
    }
    Ok(level)
}

/// Spreads levels of one or two bits into planes of `entries` bits.
fn planes(bytes: &[u8], width: u32, entries: usize, low: &mut Vec<u64>, mut high: Option<&mut Vec<u64>>) -> Result<()> {
    let words = entries.div_ceil(64);
    for plane in std::iter::once(&mut *low).chain(high.as_deref_mut()) {
        plane.clear();
        plane.try_reserve(words).map_err(|_| damaged("too many entries in a page"))?;
        plane.resize(words, 0);
    }
    let mut runs = Runs::new(bytes, width);
    let mut at = 0;
    while at < entries {
        match runs.next(entries - at)? {
            Run::Repeated { value, count } => {
                if value >> width != 0 {
                    return Err(damaged("a level is out of range"));
                }
                if value & 1 != 0 {
                    set(low, at, count);
                }
                if value & 2 != 0
                    && let Some(high) = high.as_deref_mut()
                {
                    set(high, at, count);
                }
                at += count;
            }
            Run::Packed { bytes, count } => {
                if width == 1 {
                    for (group, from) in bytes.chunks(8).zip((0..count).step_by(64)) {
                        append(low, at + from, little(group), (count - from).min(64));
                    }
                } else {
                    for (group, from) in bytes.chunks(8).zip((0..count).step_by(32)) {
                        let pairs = little(group);
                        let now = (count - from).min(32);
                        append(low, at + from, even_bits(pairs), now);
                        if let Some(high) = high.as_deref_mut() {
                            append(high, at + from, even_bits(pairs >> 1), now);
                        }
                    }
                }
                at += count;
            }
        }
    }
    Ok(())
}

fn little(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Moves the bits at even places together.
fn even_bits(mut bits: u64) -> u64 {
    bits &= 0x5555_5555_5555_5555;
    bits = (bits | bits >> 1) & 0x3333_3333_3333_3333;
    bits = (bits | bits >> 2) & 0x0f0f_0f0f_0f0f_0f0f;
    bits = (bits | bits >> 4) & 0x00ff_00ff_00ff_00ff;
    bits = (bits | bits >> 8) & 0x0000_ffff_0000_ffff;
    (bits | bits >> 16) & 0x0000_0000_ffff_ffff
}

/// Sets `count` bits, beginning with bit `at`.
fn set(plane: &mut [u64], at: usize, count: usize) {
    let (first, last) = (at / 64, (at + count - 1) / 64);
    let head = u64::MAX << (at % 64);
    let tail = u64::MAX >> (63 - (at + count - 1) % 64);
    if first == last {
        plane[first] |= head & tail;
    } else {
        plane[first] |= head;
        plane[first + 1..last].fill(u64::MAX);
        plane[last] |= tail;
    }
}

/// Writes the lowest `count` bits of `bits`, beginning with bit `at`. The plane has zeros there.
fn append(plane: &mut [u64], at: usize, bits: u64, count: usize) {
    let bits = if count == 64 { bits } else { bits & ((1 << count) - 1) };
    let shift = at % 64;
    plane[at / 64] |= bits << shift;
    if shift + count > 64 {
        plane[at / 64 + 1] |= bits >> (64 - shift);
    }
}
