//! Checksum: represents the delivered rows by a number that does not depend on the order of
//! delivery.
//!
//! Each row is hashed under a key of its own, drawn from its source and its number in that source.
//! The hashes are added up modulo 2^128. The sums of ranks, launches and epochs can be added in
//! turn.
//!
//! Two sums are equal only if the same rows with the same tokens went into them (chance of an
//! error: 2^-128). A row changes the sum if it is repeated, missing, altered, or delivered under
//! the number of another row. The hash is not cryptographic: it finds mistakes, not forgers.

use std::fmt;
use std::ops::{Add, AddAssign};

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use crate::order::permutation::derive_key;

/// Separates the keys of rows from the keys of orders.
const ROW: u64 = 0x726f_7700;
/// Separates the keys of further columns from the keys of rows.
const FIELD: u64 = 0x6669_656c_6400;
/// Number of tokens that are turned into bytes at a time.
const PIECE: usize = 128;

/// Hashes row `sequence` of source `source`. `tokens` holds all real tokens of the row and no
/// padding.
pub fn row_hash(source: u64, sequence: u64, tokens: &[i64]) -> u128 {
    hash_of(derive_key(ROW, &[source, sequence]), tokens)
}

/// Hashes the delivered values of field `name` in row `sequence` of source `source`. Only values
/// that belong to real tokens count. A floating-point number is hashed by its bits.
pub fn field_hash(source: u64, sequence: u64, name: &str, values: &[i64]) -> u128 {
    hash_of(derive_key(FIELD, &[source, sequence, xxh3_64(name.as_bytes())]), values)
}

/// Represents the delivered number of a document, or null, by a number that [`field_hash`] takes.
pub fn number_hash(value: Option<i64>) -> i64 {
    match value {
        Some(value) => value_hash(1, &value.to_le_bytes()),
        None => value_hash(0, &[]),
    }
}

/// Represents the string of a document, or null, by a number that [`field_hash`] takes.
pub fn text_hash(text: Option<&str>) -> i64 {
    match text {
        Some(text) => value_hash(2, text.as_bytes()),
        None => value_hash(0, &[]),
    }
}

fn value_hash(kind: u64, bytes: &[u8]) -> i64 {
    xxh3_64_with_seed(bytes, kind).cast_signed()
}

fn hash_of(key: u64, tokens: &[i64]) -> u128 {
    let mut hash = Xxh3::with_seed(key);
    let mut bytes = [0; PIECE * 8];
    for tokens in tokens.chunks(PIECE) {
        for (bytes, token) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(tokens) {
            *bytes = token.to_le_bytes();
        }
        hash.update(&bytes[..tokens.len() * 8]);
    }
    hash.digest128()
}

/// A sum over rows that were delivered, or that should have been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum {
    /// Number of rows.
    pub rows: u64,
    /// Number of tokens in these rows. With shifted targets, a row has one token more than
    /// `seq_len`.
    pub tokens: u64,
    /// Sum of the rows' hashes modulo 2^128.
    pub hash: u128,
}

impl Checksum {
    /// Adds one row.
    pub fn add_row(&mut self, source: u64, sequence: u64, tokens: &[i64]) {
        self.rows += 1;
        self.tokens += tokens.len() as u64;
        self.hash = self.hash.wrapping_add(row_hash(source, sequence, tokens));
    }

    /// Adds the values of a further column in a row that was added.
    pub fn add_field(&mut self, source: u64, sequence: u64, name: &str, values: &[i64]) {
        self.hash = self.hash.wrapping_add(field_hash(source, sequence, name, values));
    }

    /// Adds one row that holds `tokens` in spans. A span has the place of its first token in the
    /// row and its number of tokens.
    pub fn add_row_of_spans(&mut self, source: u64, sequence: u64, tokens: &[i64], spans: &[(u32, u32)]) {
        let count = tokens.len() as u64;
        // No token is negative, so a row of spans has the content of no other row.
        let borders = spans.iter().flat_map(|(start, tokens)| [i64::from(*start), i64::from(*tokens)]);
        let content: Vec<i64> = tokens.iter().copied().chain([-1]).chain(borders).collect();
        self.add_row(source, sequence, &content);
        self.tokens -= content.len() as u64 - count;
    }

    /// The hash as 32 hexadecimal digits.
    pub fn hash_text(&self) -> String {
        format!("{:032x}", self.hash)
    }
}

impl AddAssign for Checksum {
    fn add_assign(&mut self, other: Self) {
        self.rows += other.rows;
        self.tokens += other.tokens;
        self.hash = self.hash.wrapping_add(other.hash);
    }
}

impl Add for Checksum {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl std::iter::Sum for Checksum {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows, {} tokens, hash {:032x}", self.rows, self.tokens, self.hash)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::*;

    const ROWS: u64 = 1_000_000;

    fn tokens(sequence: u64) -> [i64; 4] {
        std::array::from_fn(|at| ((sequence * 4 + at as u64) % 50_000) as i64)
    }

    /// The sum over a million rows. Every case below changes it by one fault.
    fn whole() -> Checksum {
        static WHOLE: OnceLock<Checksum> = OnceLock::new();
        *WHOLE.get_or_init(|| {
            let mut whole = Checksum::default();
            (0..ROWS).for_each(|sequence| whole.add_row(0, sequence, &tokens(sequence)));
            whole
        })
    }

    fn row(sequence: u64, tokens: &[i64]) -> u128 {
        row_hash(0, sequence, tokens)
    }

    proptest! {
        #[test]
        fn one_fault_in_a_million_rows_is_noticed(a in 0..ROWS, b in 0..ROWS, at in 0usize..4, change in 1i64..1000) {
            let hash = whole().hash;
            let (in_a, in_b) = (tokens(a), tokens(b));
            prop_assert_ne!(hash, hash.wrapping_add(row(a, &in_a)), "repeated");
            prop_assert_ne!(hash, hash.wrapping_sub(row(a, &in_a)), "missing");
            let mut altered = in_a;
            altered[at] += change;
            let without_a = hash.wrapping_sub(row(a, &in_a));
            prop_assert_ne!(hash, without_a.wrapping_add(row(a, &altered)), "altered");
            prop_assert_ne!(hash, without_a.wrapping_add(row(a, &in_a[..3])), "cut short");
            if a != b {
                prop_assert_ne!(hash, without_a.wrapping_add(row(b, &in_b)), "one repeated, one missing");
                let without_both = without_a.wrapping_sub(row(b, &in_b));
                let swapped = without_both.wrapping_add(row(a, &in_b)).wrapping_add(row(b, &in_a));
                // Rows of equal tokens may change places.
                prop_assert_eq!(hash == swapped, in_a == in_b, "contents swapped");
            }
            prop_assert_ne!(row(a, &in_a), row_hash(1, a, &in_a), "another source");
        }

        #[test]
        fn sums_do_not_depend_on_how_rows_are_shared_out(owners in prop::collection::vec(0usize..5, 1..200)) {
            let mut parts = [Checksum::default(); 5];
            let mut all = Checksum::default();
            for (sequence, owner) in owners.iter().enumerate().rev() {
                parts[*owner].add_row(0, sequence as u64, &tokens(sequence as u64));
            }
            for sequence in 0..owners.len() as u64 {
                all.add_row(0, sequence, &tokens(sequence));
            }
            prop_assert_eq!(parts.into_iter().sum::<Checksum>(), all);
        }
    }

    #[test]
    fn a_hash_is_of_the_tokens_as_little_endian_bytes() {
        for len in [0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 3] {
            let tokens: Vec<i64> = (0..len as i64).map(|token| token * 7919).collect();
            let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            let seed = derive_key(ROW, &[2, 3]);
            assert_eq!(row_hash(2, 3, &tokens), xxhash_rust::xxh3::xxh3_128_with_seed(&bytes, seed), "{len}");
        }
    }
}
