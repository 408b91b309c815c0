//! Best fit: puts pieces into rows, the largest first, each into the fullest row that has room for
//! it.
//!
//! These rules are frozen with the name of the layout `pack`:
//!
//! 1. Larger pieces go first. Pieces of equal size go in the order of the stream.
//! 2. A piece goes into the row with the least room that is enough. If several rows have that room,
//!    the row whose room changed last takes the piece. If no row has enough room, the piece opens a
//!    row.
//! 3. Rows are numbered by their first piece, in the order of the stream. The pieces of a row keep
//!    that order, too.
//!
//! Open rows are kept in stacks by the room that they have left. One bit per room tells whether its
//! stack holds a row. So finding a row takes a few instructions for any number of open rows.

/// Stands for no row.
const NONE: u32 = u32::MAX;

/// Packs the pieces of one window. Its memory is reused for the next window.
#[derive(Debug, Default)]
pub(super) struct Packer {
    /// Pieces, the largest first.
    order: Vec<u32>,
    /// Number of pieces of each size, and then the place of the next one in `order`.
    counts: Vec<u32>,
    /// The rooms that some row has left.
    rooms: Bits,
    /// The row on top of the stack of each room, if the room's bit is set.
    tops: Vec<u32>,
    rows: Vec<OpenRow>,
    /// The row of each piece.
    row_of: Vec<u32>,
    /// Numbers of the rows so far, by the order in which the rows were opened.
    numbers: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct OpenRow {
    /// The next lower row in its stack.
    below: u32,
    pieces: u32,
}

impl Packer {
    /// Packs pieces of `sizes` into rows of `capacity` places, with at most `most` pieces per row.
    /// Returns the number of rows.
    ///
    /// # Panics
    /// If a size is 0 or above `capacity`.
    pub(super) fn pack(&mut self, sizes: &[u32], capacity: u32, most: u32) -> usize {
        self.rows.clear();
        self.row_of.clear();
        if most == 1 {
            self.rows.resize(sizes.len(), OpenRow { below: NONE, pieces: 1 });
            self.row_of.extend(0..sizes.len() as u32);
            return sizes.len();
        }
        self.sort(sizes, capacity);
        self.row_of.resize(sizes.len(), NONE);
        self.rooms.clear(capacity as usize + 1);
        self.tops.resize(capacity as usize + 1, NONE);
        let smallest = self.order.last().map_or(0, |piece| sizes[*piece as usize]);
        for piece in &self.order {
            let size = sizes[*piece as usize];
            let (row, room) = match self.rooms.next(size as usize) {
                Some(room) => {
                    let row = self.tops[room];
                    let below = self.rows[row as usize].below;
                    self.tops[room] = below;
                    if below == NONE {
                        self.rooms.unset(room);
                    }
                    (row, room as u32)
                }
                None => {
                    self.rows.push(OpenRow { below: NONE, pieces: 0 });
                    (self.rows.len() as u32 - 1, capacity)
                }
            };
            self.row_of[*piece as usize] = row;
            let here = &mut self.rows[row as usize];
            here.pieces += 1;
            let left = room - size;
            // No remaining piece fits into less.
            if left >= smallest && here.pieces < most {
                let stack = left as usize;
                here.below = if self.rooms.set(stack) { self.tops[stack] } else { NONE };
                self.tops[stack] = row;
            }
        }
        self.rows.len()
    }

    /// The row of each piece of the last window, in the numbers of rule 3.
    pub(super) fn rows(&mut self) -> &[u32] {
        self.numbers.clear();
        self.numbers.resize(self.rows.len(), NONE);
        let mut next = 0;
        for row in &mut self.row_of {
            let number = &mut self.numbers[*row as usize];
            if *number == NONE {
                *number = next;
                next += 1;
            }
            *row = *number;
        }
        &self.row_of
    }

    /// Sorts by size, the largest first. Pieces of equal size keep their order.
    fn sort(&mut self, sizes: &[u32], capacity: u32) {
        assert!(sizes.iter().all(|size| *size >= 1 && *size <= capacity), "a piece has no place in a row");
        self.order.clear();
        if (sizes.len() as u64) * 16 < u64::from(capacity) {
            self.order.extend(0..sizes.len() as u32);
            self.order.sort_by_key(|piece| std::cmp::Reverse(sizes[*piece as usize]));
            return;
        }
        self.counts.clear();
        self.counts.resize(capacity as usize + 1, 0);
        for size in sizes {
            self.counts[*size as usize] += 1;
        }
        let mut before = 0;
        for count in self.counts.iter_mut().rev() {
            before += std::mem::replace(count, before);
        }
        self.order.resize(sizes.len(), 0);
        for (piece, size) in (0..).zip(sizes) {
            let at = &mut self.counts[*size as usize];
            self.order[*at as usize] = piece;
            *at += 1;
        }
    }
}

/// A set of small numbers. It finds the next number from a given one.
#[derive(Debug, Default)]
struct Bits {
    words: Vec<u64>,
    /// A bit for each word that is not 0.
    summary: Vec<u64>,
}

impl Bits {
    /// Empties the set, and makes room for numbers below `len`.
    fn clear(&mut self, len: usize) {
        let words = len.div_ceil(64);
        self.words.clear();
        self.words.resize(words, 0);
        self.summary.clear();
        self.summary.resize(words.div_ceil(64), 0);
    }

    /// Adds `number`. Returns whether the set had it already.
    fn set(&mut self, number: usize) -> bool {
        let word = &mut self.words[number / 64];
        let was_there = *word >> (number % 64) & 1 == 1;
        *word |= 1 << (number % 64);
        self.summary[number / 4096] |= 1 << (number / 64 % 64);
        was_there
    }

    fn unset(&mut self, number: usize) {
        let word = &mut self.words[number / 64];
        *word &= !(1 << (number % 64));
        if *word == 0 {
            self.summary[number / 4096] &= !(1 << (number / 64 % 64));
        }
    }

    /// The smallest number in the set that is not below `from`.
    fn next(&self, from: usize) -> Option<usize> {
        let first = self.words[from / 64] >> (from % 64);
        if first != 0 {
            return Some(from + first.trailing_zeros() as usize);
        }
        let after = from / 64 + 1;
        let mut at = after / 64;
        let mut summary = self.summary.get(at)? & (!0 << (after % 64));
        while summary == 0 {
            at += 1;
            summary = *self.summary.get(at)?;
        }
        let word = at * 64 + summary.trailing_zeros() as usize;
        Some(word * 64 + self.words[word].trailing_zeros() as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// The rules as they are written, with lists.
    fn naive(sizes: &[u32], capacity: u32, most: usize) -> Vec<u32> {
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by_key(|piece| std::cmp::Reverse(sizes[*piece]));
        // The room of each row, the time of its last change, and its pieces.
        let mut rows: Vec<(u32, usize, Vec<usize>)> = Vec::new();
        for (time, piece) in order.into_iter().enumerate() {
            let fitting = rows.iter_mut().filter(|(room, _, pieces)| *room >= sizes[piece] && pieces.len() < most);
            match fitting.min_by_key(|(room, changed, _)| (*room, std::cmp::Reverse(*changed))) {
                Some(row) => {
                    row.0 -= sizes[piece];
                    row.1 = time;
                    row.2.push(piece);
                }
                None => rows.push((capacity - sizes[piece], time, vec![piece])),
            }
        }
        let mut rows: Vec<Vec<usize>> = rows.into_iter().map(|(_, _, pieces)| pieces).collect();
        rows.sort_by_key(|pieces| *pieces.iter().min().unwrap());
        let mut row_of = vec![0; sizes.len()];
        for (number, pieces) in (0..).zip(rows) {
            pieces.into_iter().for_each(|piece| row_of[piece] = number);
        }
        row_of
    }

    proptest! {
        #[test]
        fn rows_are_those_of_the_rules(
            sizes in prop::collection::vec(1u32..=300, 0..400), capacity in 300u32..9000, most in 1u32..6,
        ) {
            let most = if most == 5 { u32::MAX } else { most };
            let mut packer = Packer::default();
            // The memory of another window has no influence on the result.
            packer.pack(&[5, 5, 3], 17, 2);
            let rows = packer.pack(&sizes, capacity, most);
            prop_assert_eq!(packer.rows(), naive(&sizes, capacity, most as usize));
            prop_assert_eq!(rows, packer.rows().iter().collect::<BTreeSet<_>>().len());
        }

        #[test]
        fn bits_are_a_set(
            changes in prop::collection::vec((0usize..9000, prop::bool::ANY), 0..200), from in 0usize..9000,
        ) {
            let (mut bits, mut set) = (Bits::default(), BTreeSet::new());
            bits.clear(9000);
            for (number, add) in changes {
                if add {
                    prop_assert_eq!(bits.set(number), !set.insert(number));
                } else {
                    bits.unset(number);
                    set.remove(&number);
                }
                for from in [from, number, 0, 8999] {
                    prop_assert_eq!(bits.next(from), set.range(from..).next().copied());
                }
            }
        }
    }
}
