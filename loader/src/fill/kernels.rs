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

/// The largest id that a row takes if nothing limits it.
pub(crate) const NO_LIMIT: i64 = i64::MAX;

/// No id of the type on disk can be unfit.
const UNCHECKED: u8 = 0;
/// An id is unfit if the delivered type cannot hold it.
const BY_TYPE: u8 = 1;
/// An id is also unfit if it is above a limit. The limit fits the delivered type.
const BY_LIMIT: u8 = 2;

/// Writes the `id` of every chunk. If `CHECK` asks for it, returns bits that show unfit ids, and
/// else 0.
#[inline(always)]
fn each<const N: usize, const CHECK: u8, T: Id>(
    ids: &mut [T],
    labels: &mut [i64],
    chunks: &[[u8; N]],
    ahead: Ahead,
    last: i64,
    id: impl Fn([u8; N]) -> i64 + Copy,
) -> u64 {
    let (steps, rest) = chunks.as_chunks::<STEP>();
    let (ids, ids_rest) = ids.as_chunks_mut::<STEP>();
    let mut any = 0;
    if labels.is_empty() {
        for (index, (out, chunks)) in ids.iter_mut().zip(steps).enumerate() {
            ahead.fetch::<N>(index * STEP * N);
            any |= write::<N, CHECK, T>(out, chunks, last, id);
        }
        any |= write::<N, CHECK, T>(ids_rest, rest, last, id);
    } else {
        let (labels, labels_rest) = labels.as_chunks_mut::<STEP>();
        for (index, ((out, labels), chunks)) in ids.iter_mut().zip(labels).zip(steps).enumerate() {
            ahead.fetch::<N>(index * STEP * N);
            any |= write_both::<N, CHECK, T>(out, labels, chunks, last, id);
        }
        any |= write_both::<N, CHECK, T>(ids_rest, labels_rest, rest, last, id);
    }
    any as u64
}

/// Bits of [`Id::UNFIT`] if `id` is unfit.
#[inline(always)]
fn unfit_bits<const CHECK: u8>(id: i64, last: i64) -> i64 {
    match CHECK {
        UNCHECKED => 0,
        BY_TYPE => id,
        // The difference is negative above the limit. Otherwise it has no bit that the limit lacks.
        _ => id | last.wrapping_sub(id),
    }
}

#[inline(always)]
fn write<const N: usize, const CHECK: u8, T: Id>(
    ids: &mut [T],
    chunks: &[[u8; N]],
    last: i64,
    id: impl Fn([u8; N]) -> i64,
) -> i64 {
    let mut any = 0;
    for (out, chunk) in ids.iter_mut().zip(chunks) {
        let id = id(*chunk);
        *out = T::of(id);
        any |= unfit_bits::<CHECK>(id, last);
    }
    any
}

#[inline(always)]
fn write_both<const N: usize, const CHECK: u8, T: Id>(
    ids: &mut [T],
    labels: &mut [i64],
    chunks: &[[u8; N]],
    last: i64,
    id: impl Fn([u8; N]) -> i64,
) -> i64 {
    let mut any = 0;
    for ((out, label), chunk) in ids.iter_mut().zip(labels).zip(chunks) {
        let id = id(*chunk);
        *out = T::of(id);
        *label = id;
        any |= unfit_bits::<CHECK>(id, last);
    }
    any
}

#[inline(always)]
fn widen_with<T: Id>(ids: &mut [T], labels: &mut [i64], tokens: &Tokens<'_>, ahead: Ahead, last: i64) -> u64 {
    if last == NO_LIMIT {
        widen_checked::<UNCHECKED, BY_TYPE, T>(ids, labels, tokens, ahead, last)
    } else {
        widen_checked::<BY_LIMIT, BY_LIMIT, T>(ids, labels, tokens, ahead, last)
    }
}

/// Writes ids of types that every delivered type holds with the check `SMALL`, and others with the
/// check `WIDE`.
#[inline(always)]
fn widen_checked<const SMALL: u8, const WIDE: u8, T: Id>(
    ids: &mut [T],
    labels: &mut [i64],
    tokens: &Tokens<'_>,
    ahead: Ahead,
    last: i64,
) -> u64 {
    let bytes = tokens.bytes();
    macro_rules! each {
        ($check:ident, $id:expr) => {
            each::<_, $check, T>(ids, labels, bytes.as_chunks().0, ahead, last, $id)
        };
    }
    match tokens.dtype() {
        Dtype::U8 => each!(SMALL, |[byte]: [u8; 1]| i64::from(byte)),
        Dtype::U16 => each!(SMALL, |b| i64::from(u16::from_le_bytes(b))),
        Dtype::I8 => each!(WIDE, |[byte]: [u8; 1]| i64::from(byte.cast_signed())),
        Dtype::I16 => each!(WIDE, |b| i64::from(i16::from_le_bytes(b))),
        Dtype::U32 => each!(WIDE, |b| i64::from(u32::from_le_bytes(b))),
        Dtype::I32 => each!(WIDE, |b| i64::from(i32::from_le_bytes(b))),
        Dtype::I64 => each!(WIDE, i64::from_le_bytes),
        other => unreachable!("formats refuse ids of type {}", other.name()),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn widen_avx2<T: Id>(ids: &mut [T], labels: &mut [i64], tokens: &Tokens<'_>, ahead: Ahead, last: i64) -> u64 {
    widen_with(ids, labels, tokens, ahead, last)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widen_avx512<T: Id>(ids: &mut [T], labels: &mut [i64], tokens: &Tokens<'_>, ahead: Ahead, last: i64) -> u64 {
    widen_with(ids, labels, tokens, ahead, last)
}

/// Writes `tokens` to `ids`, and to `labels` if there are any. Each has one place per token.
///
/// Returns bits of [`Id::UNFIT`] if an id does not fit the delivered type, or is above `last`. A
/// limit other than [`NO_LIMIT`] must be below 2^31.
pub(super) fn widen_places<T: Id>(
    ids: &mut [T],
    labels: &mut [i64],
    tokens: &Tokens<'_>,
    ahead: Ahead,
    last: i64,
) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512bw") && std::arch::is_x86_feature_detected!("avx512vl") {
        // SAFETY: the check above found AVX-512 BW and VL on this processor.
        return unsafe { widen_avx512(ids, labels, tokens, ahead, last) };
    } else if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the check above found AVX2 on this processor.
        return unsafe { widen_avx2(ids, labels, tokens, ahead, last) };
    }
    widen_with(ids, labels, tokens, ahead, last)
}
