//! Fill: writes runs of tokens into rows, widened to the delivered type.
//!
//! The loops have no branches and no bounds checks inside, so the compiler turns them into vector code; on x86-64 they are compiled once
//! more for AVX2 and for AVX-512, and chosen at run time.

use crate::shard::Ends;
use crate::tokens::{Dtype, Tokens};

/// A delivered integer type.
pub(crate) trait Id: Copy + Send + 'static {
    fn of_u32(id: u32) -> Self;
    fn of_i64(id: i64) -> Self;
}

impl Id for i64 {
    fn of_u32(id: u32) -> Self {
        Self::from(id)
    }
    fn of_i64(id: i64) -> Self {
        id
    }
}

impl Id for i32 {
    // Ids above i32::MAX are refused before: `Ids32` in `read`.
    fn of_u32(id: u32) -> Self {
        id as Self
    }
    fn of_i64(id: i64) -> Self {
        id as Self
    }
}

#[inline(always)]
fn widen_with<T: Id>(row: &mut [T], tokens: &Tokens<'_>) {
    let bytes = tokens.bytes();
    match tokens.dtype() {
        Dtype::U8 => {
            for (out, id) in row.iter_mut().zip(bytes) {
                *out = T::of_u32(u32::from(*id));
            }
        }
        Dtype::U16 => {
            for (out, id) in row.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = T::of_u32(u32::from(u16::from_le_bytes(*id)));
            }
        }
        // Negative ids are refused before, so both signs of 32 bits widen alike.
        Dtype::U32 | Dtype::I32 => {
            for (out, id) in row.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = T::of_u32(u32::from_le_bytes(*id));
            }
        }
        Dtype::I64 => {
            for (out, id) in row.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *out = T::of_i64(i64::from_le_bytes(*id));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn widen_avx2<T: Id>(row: &mut [T], tokens: &Tokens<'_>) {
    widen_with(row, tokens);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widen_avx512<T: Id>(row: &mut [T], tokens: &Tokens<'_>) {
    widen_with(row, tokens);
}

/// Writes `tokens` over `row`, which has as many places.
///
/// # Panics
/// When the lengths differ.
pub(crate) fn widen<T: Id>(row: &mut [T], tokens: &Tokens<'_>) {
    assert_eq!(row.len(), tokens.len(), "row and run differ in length");
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512bw") && std::arch::is_x86_feature_detected!("avx512vl") {
        // SAFETY: the processor has AVX-512 BW and VL, just asked.
        unsafe { widen_avx512(row, tokens) };
        return;
    } else if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, just asked.
        unsafe { widen_avx2(row, tokens) };
        return;
    }
    widen_with(row, tokens);
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
            let mut token = 0;
            for (document, len) in lengths.iter().enumerate() {
                if bos && !(document == 0 && continues) { stream.push(-1); }
                for _ in 0..*len { stream.push(token); token += 1; }
                if eos && !(unfinished && document + 1 == lengths.len()) { stream.push(-2); }
            }
            for from in 0..stream.len() {
                for to in from..=stream.len() {
                    let mut got = Vec::new();
                    pieces::<()>(&Ends::List(&ends), tokens, continues, (bos, eos), from as u64, to as u64, |piece| {
                        match piece {
                            Piece::Bos => got.push(-1),
                            Piece::Eos => got.push(-2),
                            Piece::Tokens { start, len } => got.extend((start as i64)..(start + len) as i64),
                        }
                        Ok(())
                    }).unwrap();
                    prop_assert_eq!(&got, &stream[from..to], "{}..{}", from, to);
                }
            }
        }

        #[test]
        fn widening_keeps_every_value(ids in prop::collection::vec(0i64..=i64::from(i32::MAX), 0..100)) {
            for dtype in [Dtype::U8, Dtype::U16, Dtype::U32, Dtype::I32, Dtype::I64] {
                let bits = 8 * dtype.size() as u32;
                let ids: Vec<i64> = ids.iter().map(|id| if bits < 32 { id & ((1 << bits) - 1) } else { *id }).collect();
                let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()[..dtype.size()].to_vec()).collect();
                let tokens = Tokens::new(dtype, &bytes);
                let mut wide = vec![-1i64; ids.len()];
                widen(&mut wide, &tokens);
                prop_assert_eq!(&wide, &ids);
                let mut narrow = vec![-1i32; ids.len()];
                widen(&mut narrow, &tokens);
                prop_assert!(narrow.iter().zip(&ids).all(|(narrow, id)| i64::from(*narrow) == *id));
            }
        }
    }
}
