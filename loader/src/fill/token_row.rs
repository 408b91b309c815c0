//! Rows, as the places that a run of tokens is written to.

use super::kernels::{Ahead, Id, NO_LIMIT, widen_places};
use crate::error::Error;
use crate::tokens::{Tokens, id_outside, masked_token, negative_id};

/// The places of the ids and labels of a row, or of a part of a row.
///
/// A label is written at its id's place, or one token ahead if targets are shifted. A shifted row
/// of `n` places takes `n + 1` tokens. The first token has no label, and the last one has no id.
#[derive(Debug)]
pub(crate) struct TokenRow<'a, T> {
    ids: &'a mut [T],
    /// The labels. There are as many as ids, or none.
    labels: &'a mut [i64],
    /// Number of tokens at the start that have no label: 1 at the start of a shifted row.
    lead: usize,
    /// The largest id that the row takes.
    last: i64,
}

impl<'a, T: Id> TokenRow<'a, T> {
    /// Makes a row of ids without labels.
    #[cfg(test)]
    pub(crate) fn of_ids(ids: &'a mut [T]) -> Self {
        Self { ids, labels: &mut [], lead: 0, last: NO_LIMIT }
    }

    /// Makes a row of ids and of labels with the same values.
    ///
    /// # Panics
    /// Panics if the lengths differ.
    pub(crate) fn with_labels(ids: &'a mut [T], labels: &'a mut [i64]) -> Self {
        assert_eq!(ids.len(), labels.len(), "ids and labels differ in length");
        Self { ids, labels, lead: 0, last: NO_LIMIT }
    }

    /// Makes a row of ids and of labels that are one token ahead.
    ///
    /// # Panics
    /// Panics if the lengths differ.
    pub(crate) fn with_shifted_labels(ids: &'a mut [T], labels: &'a mut [i64]) -> Self {
        Self { lead: 1, ..Self::with_labels(ids, labels) }
    }

    /// Refuses ids from `vocab_size` on.
    pub(crate) fn with_vocabulary(self, vocab_size: Option<u64>) -> Self {
        Self { last: vocab_size.map_or(NO_LIMIT, |size| size as i64 - 1), ..self }
    }

    /// Number of tokens that the row takes.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.ids.len().max(self.lead + self.labels.len())
    }

    /// Splits the row into its first `count` tokens and the others.
    pub(crate) fn split_at(self, count: usize) -> (Self, Self) {
        let lead = self.lead.min(count);
        let (ids, more_ids) = self.ids.split_at_mut(count.min(self.ids.len()));
        let (labels, more_labels) = self.labels.split_at_mut((count - lead).min(self.labels.len()));
        let last = self.last;
        (Self { ids, labels, lead, last }, Self { ids: more_ids, labels: more_labels, lead: self.lead - lead, last })
    }

    /// Takes off the first `count` tokens.
    pub(crate) fn take(&mut self, count: usize) -> Self {
        let (ids, labels) = (std::mem::take(&mut self.ids), std::mem::take(&mut self.labels));
        let (first, rest) = Self { ids, labels, lead: self.lead, last: self.last }.split_at(count);
        *self = rest;
        first
    }

    /// Writes `id` to all ids and `label` to all labels.
    pub(crate) fn pad(self, id: u32, label: i64) {
        self.ids.fill(T::of(i64::from(id)));
        self.labels.fill(label);
    }
}

/// An id that a row does not take, or a value that its column may not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnfitId {
    /// Place of the id in the run of tokens.
    pub(crate) index: usize,
    id: i64,
    fault: Fault,
}

/// The reason why a value is unfit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The delivered type cannot hold it.
    Type,
    /// It is above the largest id of the vocabulary.
    Above(i64),
    /// It stands in an attention mask, and is not 1.
    Mask,
}

impl UnfitId {
    /// The first value other than 1 among `values`, which are the bytes of 64-bit integers.
    pub(crate) fn other_than_one(values: &[u8]) -> Option<Self> {
        let values = values.as_chunks::<8>().0.iter().map(|value| i64::from_le_bytes(*value));
        let unfit = |(index, id)| (id != 1).then_some(Self { index, id, fault: Fault::Mask });
        values.enumerate().find_map(unfit)
    }

    /// Makes the error of a batch with this id.
    pub(crate) fn error(self) -> Error {
        match self.fault {
            Fault::Mask => masked_token(self.id),
            _ if self.id < 0 => negative_id(self.id),
            Fault::Above(last) => id_outside(self.id, last as u64 + 1),
            Fault::Type => Error::data(format!("token id {} does not fit `input_dtype` = int32: use int64", self.id)),
        }
    }
}

/// Writes `tokens` to `row`, which has a place for each.
///
/// Fails with the first id that does not fit. The content of the row is then undefined.
///
/// # Panics
/// Panics if the lengths differ.
pub(crate) fn widen<T: Id>(row: TokenRow<'_, T>, tokens: &Tokens<'_>, ahead: Ahead) -> Result<(), UnfitId> {
    let TokenRow { mut ids, mut labels, lead, last } = row;
    let len = ids.len().max(lead + labels.len());
    assert_eq!(len, tokens.len(), "row and run differ in length");
    // Fetching an unmapped address walks the page table every time. Fetching bytes that are read
    // anyway costs nothing.
    let ahead = if ahead.is_none() { Ahead::of(tokens.bytes()) } else { ahead };
    let is_unfit = |id: i64| id as u64 & T::UNFIT != 0 || id > last;
    let (mut any, mut paired) = (false, *tokens);
    if lead == 1 && len > 0 {
        let id = tokens.get(0);
        any |= is_unfit(id);
        ids[0] = T::of(id);
        ids = &mut ids[1..];
        paired = paired.slice(1..paired.len());
    }
    if ids.len() < paired.len() {
        // A shifted row ends with a token that has no id.
        let id = paired.get(paired.len() - 1);
        any |= is_unfit(id);
        let (last, before) = labels.split_last_mut().expect("a token without an id has a label");
        *last = id;
        labels = before;
        paired = paired.slice(0..paired.len() - 1);
    }
    any |= widen_places(ids, labels, &paired, ahead, last) & T::UNFIT != 0;
    if !any {
        return Ok(());
    }
    let fault = if last == NO_LIMIT { Fault::Type } else { Fault::Above(last) };
    let ids = (0..tokens.len()).map(|index| UnfitId { index, id: tokens.get(index), fault });
    // Another process may write to the file between the two reads.
    let unfit = { ids }.find(|unfit| is_unfit(unfit.id));
    Err(unfit.unwrap_or(UnfitId { index: 0, id: tokens.get(0), fault }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokens::Dtype;

    proptest! {
        #[test]
        fn widening_keeps_every_value(ids in prop::collection::vec(0i64..=i64::from(i32::MAX), 0..300)) {
            for dtype in DTYPES {
                // Ids are not negative.
                let bits = 8 * dtype.size() as u32 - u32::from(matches!(dtype, Dtype::I8 | Dtype::I16));
                let ids: Vec<i64> = ids.iter().map(|id| if bits < 32 { id & ((1 << bits) - 1) } else { *id }).collect();
                let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()[..dtype.size()].to_vec()).collect();
                let tokens = Tokens::new(dtype, &bytes);
                let (mut wide, mut labels) = (vec![-1i64; ids.len()], vec![-1i64; ids.len()]);
                widen(TokenRow::of_ids(&mut wide), &tokens, Ahead::NONE).unwrap();
                prop_assert_eq!(&wide, &ids);
                let mut narrow = vec![-1i32; ids.len()];
                widen(TokenRow::with_labels(&mut narrow, &mut labels), &tokens, Ahead::NONE).unwrap();
                prop_assert!(narrow.iter().zip(&ids).all(|(narrow, id)| i64::from(*narrow) == *id));
                prop_assert_eq!(&labels, &ids);
            }
        }

        #[test]
        fn shifted_labels_are_one_token_ahead_however_the_row_is_cut(
            ids in prop::collection::vec(0i64..=i64::from(i32::MAX), 2..300), cuts in prop::collection::vec(0usize..300, 0..5),
            padded in 0usize..300,
        ) {
            let len = ids.len() - 1;
            let real = ids.len() - padded.min(ids.len());
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (real + 1)).chain([0, real]).collect();
            cuts.sort_unstable();
            for dtype in [Dtype::I64, Dtype::U32] {
                let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()[..dtype.size()].to_vec()).collect();
                let tokens = Tokens::new(dtype, &bytes);
                let (mut x, mut y) = (vec![-1i32; len], vec![-1i64; len]);
                let mut row = TokenRow::with_shifted_labels(&mut x, &mut y);
                prop_assert_eq!(row.len(), ids.len());
                for cut in cuts.windows(2) {
                    let run = tokens.slice(cut[0]..cut[1]);
                    widen(row.take(run.len()), &run, Ahead::NONE).unwrap();
                }
                row.pad(7, -100);
                for place in 0..len {
                    prop_assert_eq!(i64::from(x[place]), if place < real { ids[place] } else { 7 }, "x {}", place);
                    prop_assert_eq!(y[place], if place + 1 < real { ids[place + 1] } else { -100 }, "y {}", place);
                }
            }
        }

        #[test]
        fn ids_from_the_size_of_the_vocabulary_on_are_refused(
            len in 1usize..300, at in 0usize..300, size in 1u64..=1 << 31, near in -3i64..3, any in prop::num::i64::ANY,
        ) {
            for dtype in DTYPES {
                for id in [size as i64 + near, any, near, i64::from(i32::MAX)] {
                    let mut ids = vec![0i64; len];
                    ids[at % len] = id;
                    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()[..dtype.size()].to_vec()).collect();
                    let tokens = Tokens::new(dtype, &bytes);
                    let stored = tokens.get(at % len);
                    let holds = stored >= 0 && stored < size as i64;
                    let (mut wide, mut narrow, mut labels) = (vec![0i64; len], vec![0i32; len], vec![0; len]);
                    let row = TokenRow::of_ids(&mut wide).with_vocabulary(Some(size));
                    prop_assert_eq!(widen(row, &tokens, Ahead::NONE).is_ok(), holds, "{:?} {}", dtype, stored);
                    let row = TokenRow::with_labels(&mut narrow, &mut labels).with_vocabulary(Some(size));
                    let unfit = widen(row, &tokens, Ahead::NONE).err();
                    prop_assert_eq!(unfit.map(|unfit| (unfit.index, unfit.id)), (!holds).then_some((at % len, stored)));
                    let (mut x, mut y) = (vec![0i64; len - 1], vec![0i64; len - 1]);
                    if len > 1 {
                        let mut row = TokenRow::with_shifted_labels(&mut x, &mut y).with_vocabulary(Some(size));
                        let cut = at % (len + 1);
                        let first = widen(row.take(cut), &tokens.slice(0..cut), Ahead::NONE);
                        let second = widen(row, &tokens.slice(cut..len), Ahead::NONE);
                        prop_assert_eq!(first.is_ok() && second.is_ok(), holds, "shifted");
                    }
                }
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
                prop_assert_eq!(widen(TokenRow::of_ids(&mut vec![0i64; len]), &tokens, Ahead::of(&bytes)).is_ok(), stored >= 0);
                let narrow = widen(TokenRow::with_labels(&mut vec![0i32; len], &mut labels), &tokens, Ahead::of(&bytes));
                prop_assert_eq!(narrow.is_ok(), i32::try_from(stored).is_ok_and(|id| id >= 0), "{:?} {}", dtype, stored);
                let (mut x, mut y) = (vec![0i32; len - 1], vec![0i64; len - 1]);
                let shifted = len == 1 || widen(TokenRow::with_shifted_labels(&mut x, &mut y), &tokens, Ahead::NONE).is_ok();
                prop_assert_eq!(shifted, len == 1 || narrow.is_ok(), "shifted: {:?} {}", dtype, stored);
            }
        }
    }

    const DTYPES: [Dtype; 7] = [Dtype::U8, Dtype::U16, Dtype::U32, Dtype::I8, Dtype::I16, Dtype::I32, Dtype::I64];
}
