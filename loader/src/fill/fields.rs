//! Fields: the places of a row that the values of a further column are written to.

use super::kernels::{Ahead, Id};
use super::token_row::{TokenRow, UnfitId, widen};
use crate::tokens::{Dtype, Tokens};

/// Places that runs of a column are written to: the ids of a row with their labels, or one field.
pub(crate) trait Places: Sized {
    /// Takes the places of the first `count` tokens off.
    fn take(&mut self, count: usize) -> Self;

    /// Writes a run of as many values as these places take.
    fn write(self, values: &Tokens<'_>, ahead: Ahead) -> Result<(), UnfitId>;

    /// Writes the special `id`, or the field's value for specials.
    fn write_special(self, id: u32);
}

impl<T: Id> Places for TokenRow<'_, T> {
    fn take(&mut self, count: usize) -> Self {
        self.take(count)
    }

    fn write(self, values: &Tokens<'_>, ahead: Ahead) -> Result<(), UnfitId> {
        widen(self, values, ahead)
    }

    fn write_special(self, id: u32) {
        self.pad(id, i64::from(id));
    }
}

/// The places of one field in a row, in the type in which the field is delivered.
///
/// A row of `n` places may take more than `n` values: those of tokens that have no place in the
/// field's array are left out, at its start or at its end.
#[derive(Debug)]
pub(crate) struct FieldRow<'a> {
    bytes: &'a mut [u8],
    dtype: Dtype,
    /// Value at specials.
    special: i64,
    /// Values at the start that have no place.
    lead: usize,
    /// Whether 1 is the only value that a token may have.
    only_ones: bool,
}

impl<'a> FieldRow<'a> {
    /// The places `bytes` of values of `dtype`, without the first `lead` tokens of the row.
    pub(crate) fn new(bytes: &'a mut [u8], dtype: Dtype, special: i64, lead: usize) -> Self {
        Self { bytes, dtype, special, lead, only_ones: false }
    }

    /// Refuses other values than 1. They must be of type int64.
    pub(crate) fn only_ones(self) -> Self {
        Self { only_ones: true, ..self }
    }

    /// Writes the whole number `value` to all places.
    pub(crate) fn fill(self, value: i64) {
        let size = self.dtype.size();
        let value = &self.dtype.encode(value)[..size];
        self.bytes.chunks_exact_mut(size).for_each(|place| place.copy_from_slice(value));
    }
}

impl Places for FieldRow<'_> {
    fn take(&mut self, count: usize) -> Self {
        let lead = self.lead.min(count);
        let bytes = std::mem::take(&mut self.bytes);
        let (first, rest) = bytes.split_at_mut(((count - lead) * self.dtype.size()).min(bytes.len()));
        (self.bytes, self.lead) = (rest, self.lead - lead);
        Self { bytes: first, lead, ..*self }
    }

    fn write(self, values: &Tokens<'_>, _: Ahead) -> Result<(), UnfitId> {
        let places = self.bytes.len() / self.dtype.size();
        convert(&values.slice(self.lead..self.lead + places), self.dtype, self.bytes);
        let unfit = if self.only_ones { UnfitId::other_than_one(self.bytes) } else { None };
        let lead = self.lead;
        unfit.map_or(Ok(()), |mut unfit| {
            unfit.index += lead;
            Err(unfit)
        })
    }

    fn write_special(self, _: u32) {
        let special = self.special;
        self.fill(special);
    }
}

/// Writes `values` to `out` in the type `dtype`, which holds every value of theirs.
fn convert(values: &Tokens<'_>, dtype: Dtype, out: &mut [u8]) {
    let bytes = values.bytes();
    if values.dtype() == dtype {
        out.copy_from_slice(bytes);
        return;
    }
    match (values.dtype(), dtype) {
        (Dtype::F16, Dtype::F32) => each::<2, 4>(bytes, out, |bits| half(u16::from_le_bytes(bits)).to_le_bytes()),
        (Dtype::U8 | Dtype::Bool, _) => widen_to(bytes, dtype, out, |[byte]| i64::from(byte)),
        (Dtype::I8, _) => widen_to(bytes, dtype, out, |[byte]| i64::from(byte.cast_signed())),
        (Dtype::U16, _) => widen_to(bytes, dtype, out, |value| i64::from(u16::from_le_bytes(value))),
        (Dtype::I16, _) => widen_to(bytes, dtype, out, |value| i64::from(i16::from_le_bytes(value))),
        (Dtype::U32, _) => widen_to(bytes, dtype, out, |value| i64::from(u32::from_le_bytes(value))),
        (Dtype::I32, _) => widen_to(bytes, dtype, out, |value| i64::from(i32::from_le_bytes(value))),
        (stored, _) => unreachable!("no field of type {} is delivered as {}", stored.name(), dtype.name()),
    }
}

fn widen_to<const N: usize>(bytes: &[u8], dtype: Dtype, out: &mut [u8], value: impl Fn([u8; N]) -> i64) {
    match dtype.size() {
        1 => each::<N, 1>(bytes, out, |bytes| [value(bytes) as u8]),
        2 => each::<N, 2>(bytes, out, |bytes| (value(bytes) as u16).to_le_bytes()),
        4 => each::<N, 4>(bytes, out, |bytes| (value(bytes) as u32).to_le_bytes()),
        _ => each::<N, 8>(bytes, out, |bytes| value(bytes).to_le_bytes()),
    }
}

fn each<const N: usize, const M: usize>(bytes: &[u8], out: &mut [u8], value: impl Fn([u8; N]) -> [u8; M]) {
    for (out, bytes) in out.as_chunks_mut::<M>().0.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = value(*bytes);
    }
}

/// Converts the half-precision number with these `bits`.
fn half(bits: u16) -> f32 {
    let (sign, exponent, fraction) = (u32::from(bits >> 15) << 31, u32::from(bits >> 10 & 31), u32::from(bits & 1023));
    match exponent {
        // Zero and the numbers below the smallest exponent: the fraction counts units of 2^-24.
        0 => f32::from_bits(sign | (fraction as f32 / 16_777_216.0).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(dtype: Dtype, bytes: &[u8]) -> Vec<i64> {
        let values = Tokens::new(dtype, bytes);
        (0..values.len()).map(|index| values.get(index)).collect()
    }

    proptest! {
        #[test]
        fn a_field_keeps_every_value_however_its_row_is_cut(
            random in prop::collection::vec(prop::num::i64::ANY, 2..200),
            cuts in prop::collection::vec(0usize..200, 0..5), lead in 0usize..2,
        ) {
            let integers = [Dtype::Bool, Dtype::U8, Dtype::I8, Dtype::U16, Dtype::I16, Dtype::U32, Dtype::I32, Dtype::I64];
            for dtype in integers {
                let small = |value: &i64| if dtype == Dtype::Bool { value & 1 } else { *value };
                let bytes: Vec<u8> =
                    random.iter().flat_map(|value| small(value).to_le_bytes()[..dtype.size()].to_vec()).collect();
                let stored = Tokens::new(dtype, &bytes);
                let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % stored.len()).chain([0, stored.len()]).collect();
                cuts.sort_unstable();
                for delivered in [dtype, Dtype::I64] {
                    let mut out = vec![0; (stored.len() - 1) * delivered.size()];
                    let mut row = FieldRow::new(&mut out, delivered, 0, lead);
                    for cut in cuts.windows(2) {
                        row.take(cut[1] - cut[0]).write(&stored.slice(cut[0]..cut[1]), Ahead::NONE).unwrap();
                    }
                    let wanted = values(dtype, &bytes)[lead..lead + stored.len() - 1].to_vec();
                    prop_assert_eq!(values(delivered, &out), wanted, "{:?} as {:?}", dtype, delivered);
                }
            }
        }
    }

    #[test]
    fn every_half_becomes_the_same_number_in_single_precision() {
        let of = |bits: u16| half(bits);
        assert_eq!([of(0x3c00), of(0xc000), of(0x7bff), of(0x0400)], [1.0, -2.0, 65504.0, 2f32.powi(-14)]);
        assert_eq!([of(0x0001), of(0x83ff)], [2f32.powi(-24), -1023.0 * 2f32.powi(-24)]);
        assert_eq!([of(0x7c00), of(0xfc00)], [f32::INFINITY, f32::NEG_INFINITY]);
        assert!(of(0x7e00).is_nan());
        assert!(of(0x8000) == 0.0 && of(0x8000).is_sign_negative());
    }
}
