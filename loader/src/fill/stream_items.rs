//! Cuts a stretch of a block's stream into specials and runs of tokens.

use crate::format::Ends;

/// A part of a stretch of a block's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamItem {
    /// The id `bos_id`.
    Bos,
    /// The tokens `start..start + len` of the block.
    Tokens { start: u64, len: u64 },
    /// The id `eos_id`.
    Eos,
    /// The end of a document, which takes no place.
    End,
}

/// The number of documents of a block that end at or before place `at` of the block's stream.
pub(crate) fn documents_before(ends: &Ends<'_>, continues: bool, (bos, eos): (bool, bool), at: u64) -> u64 {
    document_at(ends, |index| stream_end(ends, continues, (u64::from(bos), u64::from(eos)), index), at) as u64
}

/// The place in a block's stream just after the `index`-th document that ends in the block.
fn stream_end(ends: &Ends<'_>, continues: bool, (bos, eos): (u64, u64), index: usize) -> u64 {
    let documents = index as u64 + 1;
    ends.get(index) + documents * eos + (documents - u64::from(continues)) * bos
}

/// The first document that reaches beyond `at`, counted among those that end in the block.
fn document_at(ends: &Ends<'_>, stream_end: impl Fn(usize) -> u64, at: u64) -> usize {
    let (mut low, mut high) = (0, ends.len());
    while low < high {
        let middle = low + (high - low) / 2;
        if stream_end(middle) > at { high = middle } else { low = middle + 1 }
    }
    low
}

/// Calls `each` with the items at the stream places `from..to` of a block, in order.
///
/// `ends` holds the block's document ends, and `tokens` is its token count. `continues` tells that
/// the first token of the block continues a document of the previous block.
pub(crate) fn stream_items<E>(
    ends: &Ends<'_>,
    tokens: u64,
    continues: bool,
    (bos, eos): (bool, bool),
    from: u64,
    to: u64,
    mut each: impl FnMut(StreamItem) -> Result<(), E>,
) -> Result<(), E> {
    let (bos, eos) = (u64::from(bos), u64::from(eos));
    let stream_end = |index: usize| stream_end(ends, continues, (bos, eos), index);
    let mut document = document_at(ends, stream_end, from);
    let mut at = from;
    let mut place = if document == 0 { 0 } else { stream_end(document - 1) };
    while at < to {
        let first = if document == 0 { 0 } else { ends.get(document - 1) };
        let ends_here = document < ends.len();
        let last = if ends_here { ends.get(document) } else { tokens };
        let has_bos = bos == 1 && !(document == 0 && continues);
        if has_bos {
            if at == place {
                each(StreamItem::Bos)?;
                at += 1;
            }
            place += 1;
        }
        let body = place + (last - first);
        if at < body && at < to {
            let len = body.min(to) - at;
            each(StreamItem::Tokens { start: first + (at - place), len })?;
            at += len;
        }
        place = body;
        if ends_here && eos == 1 {
            if at == place && at < to {
                each(StreamItem::Eos)?;
                at += 1;
            }
            place += 1;
        }
        if ends_here && at == place {
            each(StreamItem::End)?;
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
        fn items_cut_anywhere_rebuild_the_stream(
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
                    stream_items::<()>(&Ends::List(&ends), tokens, continues, (bos, eos), from as u64, to as u64, |piece| {
                        match piece {
                            StreamItem::Bos => got.push(-1),
                            StreamItem::Eos => got.push(-2),
                            StreamItem::Tokens { start, len } => got.extend((start as i64)..(start + len) as i64),
                            StreamItem::End => ended.push(from + got.len()),
                        }
                        Ok(())
                    }).unwrap();
                    prop_assert_eq!(&got, &stream[from..to], "{}..{}", from, to);
                    let inside: Vec<usize> = borders.iter().copied().filter(|end| (from + 1..=to).contains(end)).collect();
                    prop_assert_eq!(ended, inside, "{}..{}", from, to);
                    let before = borders.iter().filter(|end| **end <= from).count();
                    let found = documents_before(&Ends::List(&ends), continues, (bos, eos), from as u64);
                    prop_assert_eq!(found, before as u64, "{}", from);
                }
            }
        }
    }
}
