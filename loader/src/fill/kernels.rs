//! Loops that widen runs of tokens.
//!
//! The loops have no branches and no bounds checks inside, so that the compiler turns them into
//! vector code. On x86-64 they are also compiled for AVX2 and for AVX-512. The version is chosen at
//! run time.

use crate::tokens::{Dtype, Tokens};

/// A delivered integer type.
pub(crate) trait Id: Copy + Send + 'static {
    /// Bits of an id that this type cannot hold.
    const UNFIT: u64;
    /// Converts an id without unfit bits.
    fn of(id: i64) -> Self;
}

impl Id for i64 {
    const UNFIT: u64 = 1 << 63;
    fn of(id: i64) -> Self {
        id
    }
}

impl Id for i32 {
    const UNFIT: u64 = !0 << 31;
    fn of(id: i64) -> Self {
        id as Self
    }
}

/// The start of the next run of tokens. Its bytes are brought into the cache while this run is
/// widened. It is only a hint: nothing is read there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead(*const u8);

impl Ahead {
    /// No next run is known.
    pub(crate) const NONE: Self = Self(std::ptr::null());

    /// These bytes are read next.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(bytes.as_ptr())
    }

    /// Whether no next run is known.
    pub(super) fn is_none(self) -> bool {
        self.0.is_null()
    }

    /// Fetches `LINES` cache lines from `offset_bytes` on.
    #[inline(always)]
    fn fetch<const LINES: usize>(self, offset_bytes: usize) {
        #[cfg(target_arch = "x86_64")]
        for line in 0..LINES {
            let at = self.0.wrapping_add(offset_bytes + line * 64);
            // SAFETY: a prefetch is a hint. It reads nothing and never faults, at any address.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = offset_bytes;
    }
}

/// Number of tokens widened between two prefetches: a cache line of the narrowest type.
const STEP: usize = 64;

/// Writes the `id` of every chunk. Returns all ids or-ed together if `CHECKED`, and otherwise 0.
#[inline(always)]
fn each<const N: usize, const CHECKED: bool, T: Id>(
    ids: &mut [T],
    labels: &mut [i64],
    chunks: &[[u8; N]],
    ahead: Ahead,
    id: impl Fn([u8; N]) -> i64 + Copy,
) -> u64 {
    let (steps, rest) = chunks.as_chunks::<STEP>();
    let (ids, ids_rest) = ids.as_chunks_mut::<STEP>();
    let mut any = 0;
    if labels.is_empty() {
        for (index, (out, chunks)) in ids.iter_mut().zip(steps).enumerate() {
            ahead.fetch::<N>(index * STEP * N);
            any |= write::<N, CHECKED, T>(out, chunks, id);
        }
        any |= write::<N, CHECKED, T>(ids_rest, rest, id);
    } else {
        let (labels, labels_rest) = labels.as_chunks_mut::<STEP>();
        for (index, ((out, labels), chunks)) in ids.iter_mut().zip(labels).zip(steps).enumerate() {
            ahead.fetch::<N>(index * STEP * N);
            any |= write_both::<N, CHECKED, T>(out, labels, chunks, id);
        }
        any |= write_both::<N, CHECKED, T>(ids_rest, labels_rest, rest, id);
    }
    any as u64
}

#[inline(always)]
fn write<const N: usize, const CHECKED: bool, T: Id>(
    ids: &mut [T],
    chunks: &[[u8; N]],
    id: impl Fn([u8; N]) -> i64,
) -> i64 {
    let mut any = 0;
    for (out, chunk) in ids.iter_mut().zip(chunks) {
        let id = id(*chunk);
        *out = T::of(id);
        if CHECKED {
            any |= id;
        }
    }
    any
}

#[inline(always)]
fn write_both<const N: usize, const CHECKED: bool, T: Id>(
    ids: &mut [T],
    labels: &mut [i64],
    chunks: &[[u8; N]],
    id: impl Fn([u8; N]) -> i64,
) -> i64 {
    let mut any = 0;
    for ((out, label), chunk) in ids.iter_mut().zip(labels).zip(chunks) {
        let id = id(*chunk);
        *out = T::of(id);
        *label = id;
        if CHECKED {
            any |= id;
        }
    }
    any
}

#[inline(always)]
fn widen_with<T: Id>(ids: &mut [T], labels: &mut [i64], tokens: &Tokens<'_>, ahead: Ahead) -> u64 {
    let bytes = tokens.bytes();
    match tokens.dtype() {
        Dtype::U8 => each::<1, false, T>(ids, labels, bytes.as_chunks().0, ahead, |b| i64::from(b[0])),
        Dtype::U16 => {
            each::<2, false, T>(ids, labels, bytes.as_chunks().0, ahead, |b| i64::from(u16::from_le_bytes(b)))
        }
        Dtype::I8 => each::<1, true, T>(ids, labels, bytes.as_chunks().0, ahead, |b| i64::from(b[0].cast_signed())),
        Dtype::I16 => each::<2, true, T>(ids, labels, bytes.as_chunks().0, ahead, |b| i64::from(i16::from_le_bytes(b))),
        Dtype::U32 => each::<4, true, T>(ids, labels, bytes.as_chunks().0, ahead, |b| i64::from(u32::from_le_bytes(b))),
        Dtype::I32 => each::<4, true, T>(ids, labels, bytes.as_chunks().0, ahead, |b| i64::from(i32::from_le_bytes(b))),
        Dtype::I64 => each::<8, true, T>(ids, labels, bytes.as_chunks().0, ahead, i64::from_le_bytes),
        other => unreachable!("formats refuse ids of type {}", other.name()),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn widen_avx2<T: Id>(ids: &mut [T], labels: &mut [i64], tokens: &Tokens<'_>, ahead: Ahead) -> u64 {
    widen_with(ids, labels, tokens, ahead)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widen_avx512<T: Id>(ids: &mut [T], labels: &mut [i64], tokens: &Tokens<'_>, ahead: Ahead) -> u64 {
    widen_with(ids, labels, tokens, ahead)
}

/// Writes `tokens` to `ids`, and to `labels` if there are any. Each has one place per token.
///
/// Returns all ids or-ed together if some may not fit, and otherwise 0.
pub(super) fn widen_places<T: Id>(ids: &mut [T], labels: &mut [i64], tokens: &Tokens<'_>, ahead: Ahead) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512bw") && std::arch::is_x86_feature_detected!("avx512vl") {
        // SAFETY: the check above found AVX-512 BW and VL on this processor.
        return unsafe { widen_avx512(ids, labels, tokens, ahead) };
    } else if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the check above found AVX2 on this processor.
        return unsafe { widen_avx2(ids, labels, tokens, ahead) };
    }
    widen_with(ids, labels, tokens, ahead)
}
