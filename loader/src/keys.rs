//! Keys: numbers drawn from numbers, the same on every machine.
//!
//! Orders, holdouts and checksums derive their keys here, so that no two of them share one. The
//! hash is the finaliser of splitmix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014). Golden tests pin
//! its results.

/// 2^64 divided by the golden ratio.
pub(crate) const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Mixes 64 bits. The function is a bijection.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Derives a key from `key` for a path of words. Different paths give independent keys.
pub fn derive_key(key: u64, words: &[u64]) -> u64 {
    words.iter().fold(key, |key, word| mix(key.wrapping_add(GOLDEN) ^ mix(*word)))
}

/// Scales `hash` to `0..m`.
pub(crate) fn reduce(hash: u64, m: u64) -> u64 {
    ((u128::from(hash) * u128::from(m)) >> 64) as u64
}
