//! Fill: writes runs of tokens into rows, widened to the delivered type.
//!
//! The loops have no branches and no bounds checks inside, so the compiler turns them into vector code; on x86-64 they are compiled once
//! more for AVX2 and for AVX-512, and chosen at run time.

use crate::error::{Error, Result};
use crate::format::Ends;
use crate::tokens::{Dtype, Tokens};

/// A delivered integer type.
pub(crate) trait Id: Copy + Send + 'static {
    /// Bits of an id that this type cannot hold.
    const UNFIT: u64;
    /// The id, of which no unfit bit is set.
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

/// A row, or a part of one: its ids, and the labels that say the same, where the batch has these at the same places.
#[derive(Debug)]
pub(crate) struct Row<'a, T> {
    ids: &'a mut [T],
    /// As many as ids, or none.
    labels: &'a mut [i64],
}

impl<'a, T: Id> Row<'a, T> {
    /// A row of ids alone.
    pub(crate) fn of_ids(ids: &'a mut [T]) -> Self {
        Self { ids, labels: &mut [] }
    }

    /// A row of ids and their labels.
    ///
    /// # Panics
    /// When the lengths differ.
    pub(crate) fn with_labels(ids: &'a mut [T], labels: &'a mut [i64]) -> Self {
        assert_eq!(ids.len(), labels.len(), "ids and labels differ in length");
        Self { ids, labels }
    }

    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// The first `count` places, and the others.
    pub(crate) fn split_at(self, count: usize) -> (Self, Self) {
        let (ids, more_ids) = self.ids.split_at_mut(count);
        let (labels, more_labels) = self.labels.split_at_mut(count.min(self.labels.len()));
        (Self { ids, labels }, Self { ids: more_ids, labels: more_labels })
    }

    /// Takes the first `count` places off.
    pub(crate) fn take(&mut self, count: usize) -> Self {
        let all = Self { ids: std::mem::take(&mut self.ids), labels: std::mem::take(&mut self.labels) };
        let (first, rest) = all.split_at(count);
        *self = rest;
        first
    }

    /// Writes `id` to all ids and `label` to all labels.
    pub(crate) fn pad(self, id: u32, label: i64) {
        self.ids.fill(T::of(i64::from(id)));
        self.labels.fill(label);
    }
}

/// Where the next run of tokens begins, which is brought into the cache while this one is widened. Only a hint: nothing is read there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead(*const u8);

impl Ahead {
    /// Nothing is known to come.
    pub(crate) const NONE: Self = Self(std::ptr::null());

    /// These bytes come.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(bytes.as_ptr())
    }

    /// Fetches `LINES` cache lines from `offset_bytes` on.
    #[inline(always)]
    fn fetch<const LINES: usize>(self, offset_bytes: usize) {
        #[cfg(target_arch = "x86_64")]
        for line in 0..LINES {
            let at = self.0.wrapping_add(offset_bytes + line * 64);
            // SAFETY: prefetching is a hint that reads nothing and never faults, whatever the address.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = offset_bytes;
    }
}

/// Tokens widened between two prefetches: a cache line of the narrowest type.
const STEP: usize = 64;

/// Writes `id` of every chunk; returns all ids or-ed together where `CHECKED`, and else 0.
#[inline(always)]
fn each<const N: usize, const CHECKED: bool, T: Id>(
    row: Row<'_, T>,
    chunks: &[[u8; N]],
    ahead: Ahead,
    id: impl Fn([u8; N]) -> i64 + Copy,
) -> u64 {
    let (steps, rest) = chunks.as_chunks::<STEP>();
    let (ids, ids_rest) = row.ids.as_chunks_mut::<STEP>();
    let mut any = 0;
    if row.labels.is_empty() {
        for (index, (out, chunks)) in ids.iter_mut().zip(steps).enumerate() {
            ahead.fetch::<N>(index * STEP * N);
            any |= write::<N, CHECKED, T>(out, chunks, id);
        }
        any |= write::<N, CHECKED, T>(ids_rest, rest, id);
    } else {
        let (labels, labels_rest) = row.labels.as_chunks_mut::<STEP>();
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
fn widen_with<T: Id>(row: Row<'_, T>, tokens: &Tokens<'_>, ahead: Ahead) -> u64 {
    let bytes = tokens.bytes();
    match tokens.dtype() {
        Dtype::U8 => each::<1, false, T>(row, bytes.as_chunks().0, ahead, |b| i64::from(b[0])),
        Dtype::U16 => each::<2, false, T>(row, bytes.as_chunks().0, ahead, |b| i64::from(u16::from_le_bytes(b))),
        Dtype::U32 => each::<4, true, T>(row, bytes.as_chunks().0, ahead, |b| i64::from(u32::from_le_bytes(b))),
        Dtype::I32 => each::<4, true, T>(row, bytes.as_chunks().0, ahead, |b| i64::from(i32::from_le_bytes(b))),
        Dtype::I64 => each::<8, true, T>(row, bytes.as_chunks().0, ahead, i64::from_le_bytes),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn widen_avx2<T: Id>(row: Row<'_, T>, tokens: &Tokens<'_>, ahead: Ahead) -> u64 {
    widen_with(row, tokens, ahead)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widen_avx512<T: Id>(row: Row<'_, T>, tokens: &Tokens<'_>, ahead: Ahead) -> u64 {
    widen_with(row, tokens, ahead)
}

/// Writes `tokens` over `row`, which has as many places. Fails where one does not fit, naming it; the row is then not to be used.
///
/// # Panics
/// When the lengths differ.
pub(crate) fn widen<T: Id>(row: Row<'_, T>, tokens: &Tokens<'_>, ahead: Ahead) -> Result<()> {
    assert_eq!(row.len(), tokens.len(), "row and run differ in length");
    // Fetching where nothing is mapped walks the page table every time, and what is being read costs nothing.
    let ahead = if ahead.0.is_null() { Ahead::of(tokens.bytes()) } else { ahead };
    if widen_best(row, tokens, ahead) & T::UNFIT == 0 {
        return Ok(());
    }
    tokens.check_ids()?;
    let unfit = (0..tokens.len()).map(|index| tokens.get(index)).find(|id| *id as u64 & T::UNFIT != 0);
    Err(Error::data(format!(
        "token id {} does not fit `input_dtype` = int32: use int64",
        unfit.expect("a bit of it was seen")
    )))
}

fn widen_best<T: Id>(row: Row<'_, T>, tokens: &Tokens<'_>, ahead: Ahead) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512bw") && std::arch::is_x86_feature_detected!("avx512vl") {
        // SAFETY: the processor has AVX-512 BW and VL, just asked.
        return unsafe { widen_avx512(row, tokens, ahead) };
    } else if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, just asked.
        return unsafe { widen_avx2(row, tokens, ahead) };
    }
    widen_with(row, tokens, ahead)
}

/// Where the specials and the tokens of a stretch of a block's stream lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// `bos_id`.
    Bos,
    /// Tokens `start..start + len` of the block.
    Tokens { start: u64, len: u64 },
    /// `eos_id`.
    Eos,
    /// The end of a document, which takes no place.
    End,
}

/// Calls `each` with the pieces of stream places `from..to` of a block, in order.
///
/// `ends` are the block's document ends, `tokens` its token count; `continues` says that its first token continues a document of the
/// block before.
pub(crate) fn pieces<E>(
    ends: &Ends<'_>,
    tokens: u64,
    continues: bool,
    (bos, eos): (bool, bool),
    from: u64,
    to: u64,
    mut each: impl FnMut(Piece) -> Result<(), E>,
) -> Result<(), E> {
    let (bos, eos) = (u64::from(bos), u64::from(eos));
    let started = |documents: u64| (documents - u64::from(continues && documents > 0)) * bos;
    // Stream place just after document `index` of those that end in the block.
    let stream_end = |index: usize| ends.get(index) + (index as u64 + 1) * eos + started(index as u64 + 1);

    // First document that reaches beyond `from`.
    let (mut low, mut high) = (0, ends.len());
    while low < high {
        let middle = low + (high - low) / 2;
        if stream_end(middle) > from { high = middle } else { low = middle + 1 }
    }
    let mut document = low;
    let mut at = from;
    let mut place = if document == 0 { 0 } else { stream_end(document - 1) };
    while at < to {
        let first = if document == 0 { 0 } else { ends.get(document - 1) };
        let ends_here = document < ends.len();
        let last = if ends_here { ends.get(document) } else { tokens };
        let has_bos = bos == 1 && !(document == 0 && continues);
        if has_bos {
            if at == place {
                each(Piece::Bos)?;
                at += 1;
            }
            place += 1;
        }
        let body = place + (last - first);
        if at < body && at < to {
            let len = body.min(to) - at;
            each(Piece::Tokens { start: first + (at - place), len })?;
            at += len;
        }
        place = body;
        if ends_here && eos == 1 {
            if at == place && at < to {
                each(Piece::Eos)?;
                at += 1;
            }
            place += 1;
        }
        if ends_here && at == place {
            each(Piece::End)?;
        }
        document += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_cut_anywhere_rebuild_the_stream(
            lengths in prop::collection::vec(1u32..6, 1..8), continues: bool, unfinished: bool, bos: bool, eos: bool,
        ) {
            let mut ends: Vec<u32> = lengths.iter().scan(0, |sum, len| { *sum += len; Some(*sum) }).collect();
            let tokens = u64::from(*ends.last().unwrap());
            if unfinished { ends.pop(); }
            let mut stream = Vec::new();
            let mut borders = Vec::new();
            let mut token = 0;
            for (document, len) in lengths.iter().enumerate() {
                if bos && !(document == 0 && continues) { stream.push(-1); }
                for _ in 0..*len { stream.push(token); token += 1; }
                if !(unfinished && document + 1 == lengths.len()) {
                    if eos { stream.push(-2); }
                    borders.push(stream.len());
                }
            }
            for from in 0..stream.len() {
                for to in from..=stream.len() {
                    let (mut got, mut ended) = (Vec::new(), Vec::new());
                    pieces::<()>(&Ends::List(&ends), tokens, continues, (bos, eos), from as u64, to as u64, |piece| {
                        match piece {
                            Piece::Bos => got.push(-1),
                            Piece::Eos => got.push(-2),
                            Piece::Tokens { start, len } => got.extend((start as i64)..(start + len) as i64),
                            Piece::End => ended.push(from + got.len()),
                        }
                        Ok(())
                    }).unwrap();
                    prop_assert_eq!(&got, &stream[from..to], "{}..{}", from, to);
                    let inside: Vec<usize> = borders.iter().copied().filter(|end| (from + 1..=to).contains(end)).collect();
                    prop_assert_eq!(ended, inside, "{}..{}", from, to);
                }
            }
        }

        #[test]
        fn widening_keeps_every_value(ids in prop::collection::vec(0i64..=i64::from(i32::MAX), 0..300)) {
            for dtype in DTYPES {
                let bits = 8 * dtype.size() as u32;
                let ids: Vec<i64> = ids.iter().map(|id| if bits < 32 { id & ((1 << bits) - 1) } else { *id }).collect();
                let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()[..dtype.size()].to_vec()).collect();
                let tokens = Tokens::new(dtype, &bytes);
                let (mut wide, mut labels) = (vec![-1i64; ids.len()], vec![-1i64; ids.len()]);
                widen(Row::of_ids(&mut wide), &tokens, Ahead::NONE).unwrap();
                prop_assert_eq!(&wide, &ids);
                let mut narrow = vec![-1i32; ids.len()];
                widen(Row::with_labels(&mut narrow, &mut labels), &tokens, Ahead::NONE).unwrap();
                prop_assert!(narrow.iter().zip(&ids).all(|(narrow, id)| i64::from(*narrow) == *id));
                prop_assert_eq!(&labels, &ids);
            }
        }

        #[test]
        fn ids_that_do_not_fit_are_refused_wherever_they_stand(len in 1usize..300, at in 0usize..300, id in prop::num::i64::ANY) {
            for dtype in DTYPES.into_iter().filter(|dtype| dtype.size() >= 4) {
                let mut ids = vec![7i64; len];
                ids[at % len] = id;
                let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()[..dtype.size()].to_vec()).collect();
                let tokens = Tokens::new(dtype, &bytes);
                let stored = tokens.get(at % len);
                let mut labels = vec![0; len];
                prop_assert_eq!(widen(Row::of_ids(&mut vec![0i64; len]), &tokens, Ahead::of(&bytes)).is_ok(), stored >= 0);
                let narrow = widen(Row::with_labels(&mut vec![0i32; len], &mut labels), &tokens, Ahead::of(&bytes));
                prop_assert_eq!(narrow.is_ok(), i32::try_from(stored).is_ok_and(|id| id >= 0), "{:?} {}", dtype, stored);
            }
        }
    }

    const DTYPES: [Dtype; 5] = [Dtype::U8, Dtype::U16, Dtype::U32, Dtype::I32, Dtype::I64];
}
