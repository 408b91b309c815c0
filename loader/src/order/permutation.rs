//! Permutation: a keyed bijection of `0..n` that needs no memory, by a mixed-radix Feistel network.
//!
//! A rectangle `a x b` barely larger than `n` covers `0..n`. A value outside `0..n` goes through
//! the network again (cycle walking). This is rare for every `n`; the power-of-two form walks up to
//! four steps. Each round adds a keyed hash of one half to the other half, modulo its radix.
//! Generalised Feistel networks over `a x b`: J. Black and P. Rogaway, "Ciphers with Arbitrary
//! Finite Domains", CT-RSA 2002.
//!
//! A table holds up to 256 elements, shuffled by Fisher-Yates, because a small domain is visibly
//! not uniform under eight rounds. The hash is the finaliser of splitmix64 (G. Steele, D. Lea, C.
//! Flood, OOPSLA 2014).

pub use crate::keys::derive_key;
use crate::keys::{GOLDEN, mix, reduce};

const ROUNDS: usize = 8;
const SMALL: u64 = 256;
/// Separates the keys of rounds from the keys of permutations.
const ROUND_DOMAIN: u64 = 16;

/// A permutation of `0..n`.
#[derive(Clone, Debug)]
pub struct Permutation {
    n: u64,
    method: Method,
}

#[derive(Clone, Debug)]
enum Method {
    Table(Box<[u8]>),
    Feistel(Feistel),
}

#[derive(Clone, Debug)]
struct Feistel {
    a: u64,
    b: u64,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..n` under `key`.
    pub fn new(n: u64, key: u64) -> Self {
        let method = if n <= SMALL {
            let mut table = [0; SMALL as usize];
            Method::Table(shuffled(n, key, &mut table).into())
        } else {
            Method::Feistel(Feistel::new(n, key))
        };
        Self { n, method }
    }

    /// The value to which the permutation maps `index`.
    ///
    /// # Panics
    /// If `index` is not below `n`.
    pub fn apply(&self, index: u64) -> u64 {
        assert!(index < self.n, "index {index} of {}", self.n);
        match &self.method {
            Method::Table(table) => u64::from(table[index as usize]),
            Method::Feistel(feistel) => feistel.apply(self.n, index),
        }
    }

    /// The index that the permutation maps to `value`.
    ///
    /// # Panics
    /// If `value` is not below `n`.
    pub fn position_of(&self, value: u64) -> u64 {
        assert!(value < self.n, "value {value} of {}", self.n);
        match &self.method {
            Method::Table(table) => {
                table.iter().position(|entry| u64::from(*entry) == value).expect("a permutation holds every value")
                    as u64
            }
            Method::Feistel(feistel) => feistel.invert(self.n, value),
        }
    }

    /// Does the same as [`Permutation::apply`] for a permutation that is used once, without an
    /// allocation.
    pub fn apply_once(n: u64, key: u64, index: u64) -> u64 {
        assert!(index < n, "index {index} of {n}");
        if n <= SMALL {
            let mut table = [0; SMALL as usize];
            u64::from(shuffled(n, key, &mut table)[index as usize])
        } else {
            Feistel::new(n, key).apply(n, index)
        }
    }
}

/// Shuffles `0..n` by Fisher-Yates, for `n` up to 256.
fn shuffled(n: u64, key: u64, table: &mut [u8; SMALL as usize]) -> &[u8] {
    let table = &mut table[..n as usize];
    for (value, entry) in table.iter_mut().enumerate() {
        *entry = value as u8;
    }
    let mut state = key;
    for last in (1..n).rev() {
        state = state.wrapping_add(GOLDEN);
        table.swap(last as usize, reduce(mix(state), last + 1) as usize);
    }
    table
}

impl Feistel {
    fn new(n: u64, key: u64) -> Self {
        // The limit keeps `a * b` within 64 bits.
        assert!(n <= 1 << 63, "{n} elements are more than 2^63");
        let root = n.isqrt();
        let a = if root * root < n { root + 1 } else { root };
        let keys = std::array::from_fn(|round| derive_key(key, &[ROUND_DOMAIN + round as u64]));
        Self { a, b: n.div_ceil(a), keys }
    }

    fn apply(&self, n: u64, index: u64) -> u64 {
        let mut x = index;
        loop {
            let (mut left, mut right) = (x / self.b, x % self.b);
            for (round, key) in self.keys.iter().enumerate() {
                if round % 2 == 0 {
                    left = add(left, reduce(mix(right ^ key), self.a), self.a);
                } else {
                    right = add(right, reduce(mix(left ^ key), self.b), self.b);
                }
            }
            x = left * self.b + right;
            if x < n {
                return x;
            }
        }
    }

    fn invert(&self, n: u64, value: u64) -> u64 {
        let mut x = value;
        loop {
            let (mut left, mut right) = (x / self.b, x % self.b);
            for (round, key) in self.keys.iter().enumerate().rev() {
                if round % 2 == 0 {
                    left = add(left, self.a - reduce(mix(right ^ key), self.a), self.a);
                } else {
                    right = add(right, self.b - reduce(mix(left ^ key), self.b), self.b);
                }
            }
            x = left * self.b + right;
            if x < n {
                return x;
            }
        }
    }
}

/// `x + y` modulo `m`, for `x < m` and `y <= m`. Both halves are below 2^33, so the sum cannot
/// overflow.
fn add(x: u64, y: u64, m: u64) -> u64 {
    let sum = x + y;
    if sum >= m { sum - m } else { sum }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_a_bijection_with_its_inverse(n in 1u64..5000, key: u64) {
            let permutation = Permutation::new(n, key);
            let mut seen = vec![false; n as usize];
            for index in 0..n {
                let value = permutation.apply(index);
                prop_assert!(!std::mem::replace(&mut seen[value as usize], true));
                prop_assert_eq!(permutation.position_of(value), index);
                prop_assert_eq!(Permutation::apply_once(n, key, index), value);
            }
        }

        #[test]
        fn holds_for_domains_of_any_size(n in 1u64..=1 << 63, key: u64, at: u64) {
            let permutation = Permutation::new(n, key);
            let value = permutation.apply(at % n);
            prop_assert!(value < n);
            prop_assert_eq!(permutation.position_of(value), at % n);
        }
    }

    /// Compares chi-squared with its mean and five standard deviations, over many keys. The
    /// statistics are the image of index 0 and the distance between the images of 0 and 1.
    #[test]
    fn small_and_middling_domains_are_uniform() {
        for n in [2u64, 3, 5, 8, 100, 257, 300] {
            let keys = 40_000u64;
            let mut singles = vec![0u64; n as usize];
            let mut distances = vec![0u64; n as usize];
            for key in 0..keys {
                let permutation = Permutation::new(n, derive_key(99, &[key]));
                let (first, second) = (permutation.apply(0), permutation.apply(1));
                singles[first as usize] += 1;
                distances[((second + n - first) % n) as usize] += 1;
            }
            assert_eq!(distances[0], 0);
            let chi = |counts: &[u64]| {
                let expected = keys as f64 / counts.len() as f64;
                counts.iter().map(|count| (*count as f64 - expected).powi(2) / expected).sum::<f64>()
            };
            for (what, value, freedom) in
                [("singles", chi(&singles), n - 1), ("distances", chi(&distances[1..]), n.saturating_sub(2))]
            {
                let freedom = freedom as f64;
                assert!(value <= freedom + 5.0 * (2.0 * freedom).sqrt() + 5.0, "n={n} {what}: chi2 {value:.0}");
            }
        }
    }

    /// Number of standard deviations by which chi-squared exceeds its mean.
    fn excess(counts: impl Iterator<Item = (u64, f64)>) -> f64 {
        let (mut sum, mut classes) = (0.0, 0.0);
        for (count, expected) in counts {
            sum += (count as f64 - expected).powi(2) / expected;
            classes += 1.0;
        }
        let freedom: f64 = classes - 1.0;
        (sum - freedom) / (2.0 * freedom).sqrt()
    }

    #[test]
    fn pairs_go_everywhere_alike_in_domains_too_small_for_rounds() {
        for n in [3u64, 5, 8, 16] {
            let keys = 50_000;
            let mut pairs = vec![0u64; (n * n) as usize];
            for key in 0..keys {
                let permutation = Permutation::new(n, derive_key(123, &[key]));
                pairs[(permutation.apply(0) * n + permutation.apply(n - 1)) as usize] += 1;
            }
            let apart = pairs.iter().zip(0..).filter(|(_, index)| index / n != index % n);
            let found = excess(apart.map(|(count, _)| (*count, keys as f64 / (n * (n - 1)) as f64)));
            assert!(found < 4.0, "n={n}: {found:.1}");
        }
    }

    #[test]
    fn displacements_are_those_of_a_random_permutation_beside_powers_of_two() {
        for bits in [16u32, 24, 40, 62] {
            for n in [(1u64 << bits) - 1, 1 << bits, (1 << bits) + 1] {
                let permutation = Permutation::new(n, 11);
                let (places, mut classes) = (1u64 << 16, [0u64; 32]);
                for place in 0..places {
                    let from = (u128::from(place) * u128::from(n) / u128::from(places)) as u64;
                    // The share of pairs of places with a smaller distance. A random permutation
                    // spreads it evenly over 0..1.
                    let left = 1.0 - permutation.apply(from).abs_diff(from) as f64 / n as f64;
                    classes[((1.0 - left * left) * 32.0).min(31.0) as usize] += 1;
                }
                let found = excess(classes.iter().map(|count| (*count, places as f64 / 32.0)));
                assert!(found < 4.0, "n={n}: {found:.1}");
            }
        }
    }
}
