//! Kernels: the inner loops of decoding, as portable code and for AVX2. The choice is made at run
//! time.
//!
//! Every kernel writes all of its output and nothing else, and reads nothing outside its input. It
//! does not branch per value. Instead it returns evidence of unusual values: the largest index, or
//! all bits that any id had. The caller checks this evidence once. Tests compare both versions of
//! each kernel.

use super::runs::{unpack_run, unpack_wide};
use crate::error::Result;

/// Widest values that the vector kernels unpack. A value and the bits before it in its first byte
/// fit 32 bits.
const MOST_BITS: u32 = 25;

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2")
}

pub(super) fn low<const W: usize>(value: u64) -> [u8; W] {
    let bytes = value.to_le_bytes();
    std::array::from_fn(|i| bytes[i])
}

/// Unpacks one index of `width` bits per element of `out`, and copies the entries that the indices
/// name.
///
/// Returns the largest index. If it is above `last`, the written ids have no meaning. `packed`
/// holds all of the indices, and may be longer.
///
/// # Panics
/// If `entries` holds fewer than `last + 1` entries.
pub(super) fn gather<const W: usize>(entries: &[u8], last: u32, packed: &[u8], width: u32, out: &mut [[u8; W]]) -> u32 {
    assert!(entries.len() / W > last as usize, "there are {} entries, and {last} is the last", entries.len() / W);
    #[cfg(target_arch = "x86_64")]
    if width <= MOST_BITS && has_avx2() {
        // SAFETY: `has_avx2` has just shown that the processor has AVX2.
        return unsafe { x86::gather(entries, last, packed, width, out) };
    }
    gather_portable(entries, last, packed, width, out)
}

fn gather_portable<const W: usize>(entries: &[u8], last: u32, packed: &[u8], width: u32, out: &mut [[u8; W]]) -> u32 {
    let entries = &entries.as_chunks::<W>().0[..=last as usize];
    let mut largest = 0;
    let count = out.len();
    unpack_run(packed, width, count, |from, indices, valid| {
        for (id, &index) in out[from..from + valid].iter_mut().zip(indices) {
            largest = largest.max(index);
            *id = entries[index.min(last) as usize];
        }
    });
    largest
}

/// Packed deltas of equal width.
pub(super) struct Deltas<'a> {
    /// Number to add to each packed delta.
    pub(super) minimum: u32,
    /// Bits of a packed delta, at most 64. Of more than 32 bits, the lower 32 count.
    pub(super) width: u32,
    /// Bytes of the deltas, followed by further bytes.
    pub(super) packed: &'a [u8],
    pub(super) count: usize,
}

/// Fills `out` with running sums of deltas, beginning with `value`. Returns the bits that any sum
/// had.
///
/// `next` receives the number of deltas still needed. It returns at least one, and at most that
/// many.
pub(super) fn sums<'a, const W: usize>(
    value: u32,
    out: &mut [[u8; W]],
    next: impl FnMut(usize) -> Result<Deltas<'a>>,
) -> Result<u32> {
    #[cfg(target_arch = "x86_64")]
    if (W == 2 || W == 4) && has_avx2() {
        // SAFETY: `has_avx2` has just shown that the processor has AVX2.
        return unsafe { x86::sums(value, out, next) };
    }
    sums_portable(value, out, next)
}

fn sums_portable<'a, const W: usize>(
    mut value: u32,
    mut out: &mut [[u8; W]],
    mut next: impl FnMut(usize) -> Result<Deltas<'a>>,
) -> Result<u32> {
    let mut bits = 0;
    while !out.is_empty() {
        let deltas = next(out.len())?;
        let (now, after) = out.split_at_mut(deltas.count);
        let (last, seen) = sum_portable(deltas.packed, deltas.width, deltas.minimum, value, now);
        (value, bits, out) = (last, bits | seen, after);
    }
    Ok(bits)
}

fn sum_portable<const W: usize>(
    packed: &[u8],
    width: u32,
    minimum: u32,
    mut value: u32,
    out: &mut [[u8; W]],
) -> (u32, u32) {
    let mut bits = 0;
    let count = out.len();
    if width > 32 {
        unpack_wide(packed, width, count, |from, deltas| {
            for (id, &delta) in out[from..].iter_mut().zip(deltas) {
                value = value.wrapping_add(minimum).wrapping_add(delta as u32);
                bits |= value;
                *id = low(u64::from(value));
            }
        });
        return (value, bits);
    }
    unpack_run(packed, width, count, |from, deltas, valid| {
        // These are local copies, because captured variables would go through memory once per id.
        let (mut current, mut seen) = (value, 0);
        for (id, &delta) in out[from..from + valid].iter_mut().zip(deltas) {
            current = current.wrapping_add(minimum.wrapping_add(delta));
            seen |= current;
            *id = low(u64::from(current));
        }
        value = current;
        bits |= seen;
    });
    (value, bits)
}

/// Copies 32-bit integers without their upper bytes, and returns the bits that any had. `bytes`
/// holds at least as many integers as `out`.
pub(super) fn narrow<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: `has_avx2` has just shown that the processor has AVX2.
        return unsafe { x86::narrow(bytes, out) };
    }
    narrow_portable(bytes, out)
}

#[inline(always)]
fn narrow_portable<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> u32 {
    let mut bits = 0;
    for (id, word) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        let value = u32::from_le_bytes(*word);
        bits |= value;
        *id = low(u64::from(value));
    }
    bits
}

/// All bits that any of the 32-bit integers in `bytes` has.
pub(super) fn any_bits(bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: `has_avx2` has just shown that the processor has AVX2.
        return unsafe { x86::any_bits(bytes) };
    }
    any_bits_portable(bytes)
}

#[inline(always)]
fn any_bits_portable(bytes: &[u8]) -> u32 {
    bytes.as_chunks::<4>().0.iter().fold(0, |bits, word| bits | u32::from_le_bytes(*word))
}

/// Joins 32-bit integers from their four streams of bytes, and returns the bits that any had. Each
/// stream is as long as `out`.
pub(super) fn join<const W: usize>(streams: [&[u8]; 4], out: &mut [[u8; W]]) -> u32 {
    let streams = streams.map(|stream| &stream[..out.len()]);
    #[cfg(target_arch = "x86_64")]
    if (W == 2 || W == 4) && has_avx2() {
        // SAFETY: `has_avx2` has just shown that the processor has AVX2.
        return unsafe { x86::join(streams, out) };
    }
    join_portable(streams, out)
}

fn join_portable<const W: usize>(streams: [&[u8]; 4], out: &mut [[u8; W]]) -> u32 {
    let [a, b, c, d] = streams;
    let mut bits = 0;
    for ((((id, &a), &b), &c), &d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        let value = u32::from_le_bytes([a, b, c, d]);
        bits |= value;
        *id = low(u64::from(value));
    }
    bits
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// Instructions to unpack eight values of one width. A shuffle brings four-byte windows, each
    /// with one value, together; a shift then aligns the values.
    #[derive(Clone, Copy)]
    #[repr(C, align(32))]
    struct Pattern {
        shuffle: [u8; 32],
        shifts: [u32; 8],
        /// First byte of the second four values.
        half: usize,
        mask: u32,
    }

    const fn pattern(width: usize) -> Pattern {
        let half = width / 2;
        let mut pattern = Pattern { shuffle: [0; 32], shifts: [0; 8], half, mask: (1 << width) - 1 };
        let mut value = 0;
        while value < 8 {
            let bit = if value < 4 { value * width } else { value * width - 8 * half };
            let mut byte = 0;
            while byte < 4 {
                pattern.shuffle[4 * value + byte] = (bit / 8 + byte) as u8;
                byte += 1;
            }
            pattern.shifts[value] = (bit % 8) as u32;
            value += 1;
        }
        pattern
    }

    static PATTERNS: [Pattern; MOST_BITS as usize + 1] = {
        let mut patterns = [pattern(0); MOST_BITS as usize + 1];
        let mut width = 1;
        while width <= MOST_BITS as usize {
            patterns[width] = pattern(width);
            width += 1;
        }
        patterns
    };

    /// A [`Pattern`] in registers.
    #[derive(Clone, Copy)]
    struct Unpacker {
        shuffle: __m256i,
        shifts: __m256i,
        mask: __m256i,
        half: usize,
        width: usize,
    }

    /// Number of bytes from which 16 values of up to [`MOST_BITS`] bits can be unpacked.
    ///
    /// The second eight values begin at byte 25 at most. Their second half begins 12 bytes later,
    /// and 16 bytes are loaded there.
    const WINDOW: usize = 64;

    impl Unpacker {
        #[inline]
        #[target_feature(enable = "avx2")]
        fn new(width: u32) -> Self {
            let pattern = &PATTERNS[width as usize];
            Self {
                // SAFETY: both arrays are 32 bytes long.
                shuffle: unsafe { _mm256_loadu_si256(pattern.shuffle.as_ptr().cast()) },
                // SAFETY: as above, both arrays are 32 bytes long.
                shifts: unsafe { _mm256_loadu_si256(pattern.shifts.as_ptr().cast()) },
                mask: _mm256_set1_epi32(pattern.mask as i32),
                half: pattern.half,
                width: width as usize,
            }
        }

        /// Values `8 * group..8 * group + 8`. There are two groups.
        #[inline]
        #[target_feature(enable = "avx2")]
        fn eight(&self, window: &[u8; WINDOW], group: usize) -> __m256i {
            debug_assert!(group < 2 && self.width <= MOST_BITS as usize);
            let at = group * self.width;
            // SAFETY: `at` is 25 at most and `half` is 12 at most, so both loads end within the
            // first 53 of the window's 64 bytes.
            let (low, high) = unsafe {
                let start = window.as_ptr().add(at);
                (_mm_loadu_si128(start.cast()), _mm_loadu_si128(start.add(self.half).cast()))
            };
            let bytes = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), self.shuffle);
            _mm256_and_si256(_mm256_srlv_epi32(bytes, self.shifts), self.mask)
        }

        /// Number of bytes of 16 values.
        #[inline]
        fn step(&self) -> usize {
            2 * self.width
        }
    }

    /// The window at `at`. Near the end of `packed`, `padded` receives the remaining bytes and
    /// zeros.
    #[inline]
    fn window<'a>(packed: &'a [u8], at: usize, padded: &'a mut [u8; WINDOW]) -> &'a [u8; WINDOW] {
        match packed.get(at..).and_then(|rest| rest.first_chunk()) {
            Some(window) => window,
            None => {
                let rest = packed.get(at..).unwrap_or_default();
                padded[..rest.len()].copy_from_slice(rest);
                padded[rest.len()..].fill(0);
                padded
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn or_all(vector: __m256i) -> u32 {
        let half = _mm_or_si128(_mm256_castsi256_si128(vector), _mm256_extracti128_si256::<1>(vector));
        let pair = _mm_or_si128(half, _mm_shuffle_epi32::<0b01_00_11_10>(half));
        _mm_cvtsi128_si32(_mm_or_si128(pair, _mm_shuffle_epi32::<0b10_11_00_01>(pair))) as u32
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn max_all(vector: __m256i) -> u32 {
        let half = _mm_max_epu32(_mm256_castsi256_si128(vector), _mm256_extracti128_si256::<1>(vector));
        let pair = _mm_max_epu32(half, _mm_shuffle_epi32::<0b01_00_11_10>(half));
        _mm_cvtsi128_si32(_mm_max_epu32(pair, _mm_shuffle_epi32::<0b10_11_00_01>(pair))) as u32
    }

    /// Stores 16 values as ids of two or four bytes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn store<const W: usize>(out: &mut [[u8; W]; 16], first: __m256i, second: __m256i) {
        const { assert!(W == 2 || W == 4) };
        let out = out.as_mut_ptr();
        if W == 2 {
            let low = _mm256_set1_epi32(0xffff);
            let packed = _mm256_packus_epi32(_mm256_and_si256(first, low), _mm256_and_si256(second, low));
            // SAFETY: `out` is 32 bytes long.
            unsafe { _mm256_storeu_si256(out.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)) };
        } else {
            // SAFETY: `out` is 64 bytes long.
            unsafe {
                _mm256_storeu_si256(out.cast(), first);
                _mm256_storeu_si256(out.add(8).cast(), second);
            }
        }
    }

    /// The 16 values of one window.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn values(unpacker: &Unpacker, window: &[u8; WINDOW]) -> [u32; 16] {
        let mut values = [0; 16];
        let [first, second] = [unpacker.eight(window, 0), unpacker.eight(window, 1)];
        // SAFETY: the array is 64 bytes long.
        unsafe {
            _mm256_storeu_si256(values.as_mut_ptr().cast(), first);
            _mm256_storeu_si256(values.as_mut_ptr().add(8).cast(), second);
        }
        values
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn gather<const W: usize>(
        entries: &[u8],
        last: u32,
        packed: &[u8],
        width: u32,
        out: &mut [[u8; W]],
    ) -> u32 {
        let unpacker = Unpacker::new(width);
        let mut padded = [0; WINDOW];
        let limit = _mm256_set1_epi32(last as i32);
        let mut largest = _mm256_setzero_si256();
        let mut at = 0;
        let (wholes, rest) = out.as_chunks_mut::<16>();
        for ids in wholes {
            let window = window(packed, at, &mut padded);
            let mut indices = [0u32; 16];
            for group in 0..2 {
                let eight = unpacker.eight(window, group);
                largest = _mm256_max_epu32(largest, eight);
                // SAFETY: the array is 64 bytes long, and each of the two groups takes 32 of them.
                unsafe {
                    let at = indices.as_mut_ptr().add(8 * group);
                    _mm256_storeu_si256(at.cast(), _mm256_min_epu32(eight, limit));
                }
            }
            for (id, index) in ids.iter_mut().zip(indices) {
                // SAFETY: every index is at most `last`, and the caller checked that there are
                // `last + 1` entries.
                *id = unsafe { *entries.as_ptr().cast::<[u8; W]>().add(index as usize) };
            }
            at += unpacker.step();
        }
        let mut largest = max_all(largest);
        if !rest.is_empty() {
            let entries = &entries.as_chunks::<W>().0[..=last as usize];
            let values = values(&unpacker, window(packed, at, &mut padded));
            for (id, index) in rest.iter_mut().zip(values) {
                largest = largest.max(index);
                *id = entries[index.min(last) as usize];
            }
        }
        largest
    }

    /// Does the same as [`store`], for callers that are generic over more widths than they are
    /// called with.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn store_any<const W: usize>(out: &mut [[u8; W]; 16], first: __m256i, second: __m256i) {
        let flat = out.as_flattened_mut();
        if W == 2 {
            if let Some(out) = flat.as_chunks_mut::<2>().0.first_chunk_mut() {
                store::<2>(out, first, second);
            }
        } else if let Some(out) = flat.as_chunks_mut::<4>().0.first_chunk_mut() {
            store::<4>(out, first, second);
        }
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn sums<'a, const W: usize>(
        value: u32,
        mut out: &mut [[u8; W]],
        mut next: impl FnMut(usize) -> Result<Deltas<'a>>,
    ) -> Result<u32> {
        assert!(W == 2 || W == 4, "ids of {W} bytes");
        let mut padded = [0; WINDOW];
        let seventh = _mm256_set1_epi32(7);
        let mut bits = _mm256_setzero_si256();
        // The last sum, in all eight places.
        let mut carry = _mm256_set1_epi32(value as i32);
        while !out.is_empty() {
            let deltas = next(out.len())?;
            let (now, after) = out.split_at_mut(deltas.count);
            out = after;
            let (wholes, rest) = now.as_chunks_mut::<16>();
            if deltas.width > MOST_BITS || !rest.is_empty() {
                let value = _mm256_cvtsi256_si32(carry) as u32;
                let (value, seen) = sum_portable(deltas.packed, deltas.width, deltas.minimum, value, now);
                carry = _mm256_set1_epi32(value as i32);
                bits = _mm256_or_si256(bits, _mm256_set1_epi32(seen as i32));
                continue;
            }
            let unpacker = Unpacker::new(deltas.width);
            let least = _mm256_set1_epi32(deltas.minimum as i32);
            let mut at = 0;
            for ids in wholes {
                let window = window(deltas.packed, at, &mut padded);
                let eight = |group| {
                    let deltas = _mm256_add_epi32(unpacker.eight(window, group), least);
                    let pairs = _mm256_add_epi32(deltas, _mm256_slli_si256::<4>(deltas));
                    let lanes = _mm256_add_epi32(pairs, _mm256_slli_si256::<8>(pairs));
                    // The sum of the lower lane goes to all places of the upper lane.
                    let lower = _mm256_shuffle_epi32::<0xff>(_mm256_permute2x128_si256::<0x08>(lanes, lanes));
                    _mm256_add_epi32(lanes, lower)
                };
                let (first, second) = (eight(0), eight(1));
                // The chain from one carry to the next limits the speed, so it is as short as
                // possible.
                let all = _mm256_add_epi32(
                    _mm256_permutevar8x32_epi32(first, seventh),
                    _mm256_permutevar8x32_epi32(second, seventh),
                );
                let first_sums = _mm256_add_epi32(first, carry);
                let second_sums =
                    _mm256_add_epi32(_mm256_add_epi32(second, _mm256_permutevar8x32_epi32(first, seventh)), carry);
                carry = _mm256_add_epi32(carry, all);
                bits = _mm256_or_si256(bits, _mm256_or_si256(first_sums, second_sums));
                store_any(ids, first_sums, second_sums);
                at += unpacker.step();
            }
        }
        Ok(or_all(bits))
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn narrow<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> u32 {
        if W != 2 {
            return narrow_portable(bytes, out);
        }
        let mut bits = _mm256_setzero_si256();
        let (words, rest) = bytes[..4 * out.len()].as_chunks::<64>();
        let (wholes, ids) = out.as_chunks_mut::<16>();
        for (ids, words) in wholes.iter_mut().zip(words) {
            // SAFETY: `words` is 64 bytes long.
            let [first, second] = unsafe {
                let start = words.as_ptr().cast::<__m256i>();
                [_mm256_loadu_si256(start), _mm256_loadu_si256(start.add(1))]
            };
            bits = _mm256_or_si256(bits, _mm256_or_si256(first, second));
            store_any(ids, first, second);
        }
        or_all(bits) | narrow_portable(rest, ids)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn any_bits(bytes: &[u8]) -> u32 {
        any_bits_portable(bytes)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn join<const W: usize>(streams: [&[u8]; 4], out: &mut [[u8; W]]) -> u32 {
        assert!(W == 2 || W == 4, "ids of {W} bytes");
        let [a, b, c, d] = streams.map(|stream| stream.as_chunks::<32>().0);
        let mut bits = [_mm256_setzero_si256(); 4];
        let (wholes, rest) = out.as_chunks_mut::<32>();
        let done = wholes.len() * 32;
        for ((((ids, a), b), c), d) in wholes.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            let mut load = [_mm256_setzero_si256(); 4];
            for ((load, bits), stream) in load.iter_mut().zip(&mut bits).zip([a, b, c, d]) {
                // SAFETY: a chunk of a stream is 32 bytes long.
                *load = unsafe { _mm256_loadu_si256(stream.as_ptr().cast()) };
                *bits = _mm256_or_si256(*bits, *load);
            }
            let [a, b, c, d] = load;
            let out = ids.as_mut_ptr().cast::<__m256i>();
            // Each lane unpacks by itself. The stores below restore the order.
            let (low, high) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
            if W == 2 {
                // SAFETY: `ids` is 64 bytes long.
                unsafe {
                    _mm256_storeu_si256(out, _mm256_permute2x128_si256::<0x20>(low, high));
                    _mm256_storeu_si256(out.add(1), _mm256_permute2x128_si256::<0x31>(low, high));
                }
                continue;
            }
            let (upper_low, upper_high) = (_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d));
            let (q0, q1) = (_mm256_unpacklo_epi16(low, upper_low), _mm256_unpackhi_epi16(low, upper_low));
            let (q2, q3) = (_mm256_unpacklo_epi16(high, upper_high), _mm256_unpackhi_epi16(high, upper_high));
            // SAFETY: `ids` is 128 bytes long.
            unsafe {
                _mm256_storeu_si256(out, _mm256_permute2x128_si256::<0x20>(q0, q1));
                _mm256_storeu_si256(out.add(1), _mm256_permute2x128_si256::<0x20>(q2, q3));
                _mm256_storeu_si256(out.add(2), _mm256_permute2x128_si256::<0x31>(q0, q1));
                _mm256_storeu_si256(out.add(3), _mm256_permute2x128_si256::<0x31>(q2, q3));
            }
        }
        let mut all = join_portable(streams.map(|stream| &stream[done..]), rest);
        for (index, bits) in bits.into_iter().enumerate() {
            let any = or_all(bits).to_le_bytes().into_iter().fold(0, |any, byte| any | byte);
            all |= u32::from(any) << (8 * index);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(length: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 56) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    /// Value `index` of a packed run, read bit by bit.
    fn unpacked(packed: &[u8], width: u32, index: usize) -> u32 {
        (0..width as usize).fold(0, |value, bit| {
            let at = index * width as usize + bit;
            value | u32::from(packed[at / 8] >> (at % 8) & 1) << bit
        })
    }

    fn check<const W: usize>(width: u32, count: usize, extra: usize, entries: usize, seed: u64) {
        let needed = (count * width as usize).div_ceil(8);
        let packed = bytes(needed + extra, seed);
        let mask = if W == 1 {
            0xff
        } else if W == 2 {
            0xffff
        } else {
            u32::MAX
        };
        let indices: Vec<u32> = (0..count).map(|index| unpacked(&packed, width, index)).collect();

        let table = bytes(entries * W, seed + 1);
        let last = entries as u32 - 1;
        let expected: Vec<[u8; W]> =
            indices.iter().map(|&index| table.as_chunks::<W>().0[index.min(last) as usize]).collect();
        let largest = indices.iter().copied().max().unwrap_or(0);
        for kernel in [gather::<W>, gather_portable::<W>] {
            let mut out = vec![[0; W]; count];
            assert_eq!(kernel(&table, last, &packed, width, &mut out), largest);
            assert_eq!(out, expected, "{width} bits, {count} values");
        }

        let (minimum, mut value, mut bits) = (seed as u32, (seed >> 32) as u32, 0);
        let start = value;
        let expected: Vec<[u8; W]> = indices
            .iter()
            .map(|delta| {
                value = value.wrapping_add(minimum).wrapping_add(*delta);
                bits |= value;
                low(u64::from(value & mask))
            })
            .collect();
        // All portions but the last have an even length.
        let portion = [32, 64, 16, 300][seed as usize % 4];
        for vector in [true, false] {
            let mut out = vec![[0; W]; count];
            let mut done = 0;
            let next = |left: usize| {
                let from = done * width as usize / 8;
                let count = left.min(portion);
                done += count;
                Ok(Deltas { minimum, width, packed: &packed[from..], count })
            };
            let seen =
                if vector { sums::<W>(start, &mut out, next) } else { sums_portable::<W>(start, &mut out, next) };
            assert_eq!(seen.unwrap(), bits);
            assert_eq!(out, expected, "{width} bits, {count} values");
        }
    }

    proptest! {
        #[test]
        fn indices_and_deltas_unpack_alike_everywhere(
            width in 0u32..=32, count in 0usize..300, extra in 0usize..80, entries in 1usize..70_000, seed: u64,
        ) {
            check::<1>(width, count, extra, entries, seed);
            check::<2>(width, count, extra, entries, seed);
            check::<4>(width, count, extra, entries, seed);
        }

        #[test]
        fn plain_and_split_values_narrow_alike_everywhere(count in 0usize..300, seed: u64, keep: u32) {
            let words: Vec<u32> = bytes(4 * count, seed)
                .as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word) & keep).collect();
            let plain: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let bits = words.iter().fold(0, |bits, word| bits | word);
            let streams: Vec<Vec<u8>> =
                (0..4).map(|byte| words.iter().map(|word| word.to_le_bytes()[byte]).collect()).collect();
            let streams = std::array::from_fn(|byte| streams[byte].as_slice());
            fn each<const W: usize>(words: &[u32], plain: &[u8], bits: u32, streams: [&[u8]; 4]) {
                let expected: Vec<[u8; W]> = words.iter().map(|word| low(u64::from(*word))).collect();
                for kernel in [narrow::<W>, narrow_portable::<W>] {
                    let mut out = vec![[0; W]; words.len()];
                    assert_eq!(kernel(plain, &mut out), bits);
                    assert_eq!(out, expected);
                }
                for kernel in [join::<W>, join_portable::<W>] {
                    let mut out = vec![[0; W]; words.len()];
                    assert_eq!(kernel(streams, &mut out), bits);
                    assert_eq!(out, expected);
                }
            }
            each::<1>(&words, &plain, bits, streams);
            each::<2>(&words, &plain, bits, streams);
            each::<4>(&words, &plain, bits, streams);
            prop_assert_eq!(any_bits(&plain), bits);
            prop_assert_eq!(any_bits_portable(&plain), bits);
        }
    }
}
