//! Values of a page, from each integer encoding straight to the width that the ids logically have.
//!
//! `W` is that width in bytes. Ids of one or two bytes are stored as 32-bit integers, so what does not fit is looked
//! for by or-ing all upper bits. Nothing here branches per value, and nothing trusts a length it has not checked.

use super::runs::{GROUP, Run, Runs, unpack_run, unpacker64};
use crate::error::{Error, Result};

/// Entries of a dictionary page in the logical width.
#[derive(Debug)]
pub(super) struct Dictionary {
    bytes: Vec<u8>,
    entries: usize,
}

impl Dictionary {
    /// Decodes a PLAIN dictionary page of `entries` values.
    pub(super) fn new(bytes: &[u8], entries: usize, width: usize) -> Result<Self> {
        let physical = if width == 8 { 8 } else { 4 };
        let needed = entries.saturating_mul(physical);
        if needed > bytes.len() {
            return Err(short("dictionary", entries, bytes.len() / physical));
        }
        let mut out = Vec::with_capacity(entries * width);
        decode(Encoded::Plain, &bytes[..needed], entries, width, &mut out)?;
        Ok(Self { bytes: out, entries })
    }
}

/// How the values of a page are stored.
#[derive(Clone, Copy, Debug)]
pub(super) enum Encoded<'a> {
    Plain,
    Dictionary(&'a Dictionary),
    Delta,
    ByteStreamSplit,
}

/// Appends exactly `count` values of `width` bytes to `out`.
pub(super) fn decode(encoded: Encoded<'_>, bytes: &[u8], count: usize, width: usize, out: &mut Vec<u8>) -> Result<()> {
    let from = out.len();
    let physical = if width == 8 { 8 } else { 4 };
    if matches!(encoded, Encoded::Plain) && width == physical {
        let Some(bytes) = bytes.get(..count * physical) else {
            return Err(short("plain", count, bytes.len() / physical));
        };
        out.extend_from_slice(bytes);
        return Ok(());
    }
    out.resize(from + count * width, 0);
    let out = &mut out[from..];
    match width {
        1 => decode_as::<1>(encoded, bytes, out.as_chunks_mut().0),
        2 => decode_as::<2>(encoded, bytes, out.as_chunks_mut().0),
        4 => decode_as::<4>(encoded, bytes, out.as_chunks_mut().0),
        _ => decode_as::<8>(encoded, bytes, out.as_chunks_mut().0),
    }
}

fn decode_as<const W: usize>(encoded: Encoded<'_>, bytes: &[u8], out: &mut [[u8; W]]) -> Result<()> {
    match encoded {
        Encoded::Plain => narrow(bytes, out),
        Encoded::Dictionary(dictionary) => gather(dictionary, bytes, out),
        Encoded::Delta if W == 8 => delta64(bytes, out),
        Encoded::Delta => delta32(bytes, out),
        Encoded::ByteStreamSplit => split(bytes, out),
    }
}

fn short(what: &str, expected: usize, found: usize) -> Error {
    Error::data(format!("{what} page is damaged: expected {expected} values, found {found}"))
}

fn too_wide<const W: usize>(value: u32) -> Error {
    Error::data(format!("token id {value} does not fit uint{}", W * 8))
}

/// Bits of a 32-bit integer that an id of `W` bytes must not have.
const fn upper(width: usize) -> u32 {
    match width {
        1 => !0xff,
        2 => !0xffff,
        _ => 0,
    }
}

fn low<const W: usize>(value: u64) -> [u8; W] {
    let bytes = value.to_le_bytes();
    std::array::from_fn(|i| bytes[i])
}

/// PLAIN values that lose their upper bytes.
fn narrow<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> Result<()> {
    let Some(bytes) = bytes.get(..out.len() * 4) else {
        return Err(short("plain", out.len(), bytes.len() / 4));
    };
    let words = bytes.as_chunks::<4>().0;
    let mut all = 0;
    for (id, word) in out.iter_mut().zip(words) {
        let value = u32::from_le_bytes(*word);
        all |= value;
        *id = low(u64::from(value));
    }
    if all & upper(W) != 0 {
        let value = words.iter().map(|word| u32::from_le_bytes(*word)).find(|value| value & upper(W) != 0);
        return Err(too_wide::<W>(value.unwrap_or(all)));
    }
    Ok(())
}

fn gather<const W: usize>(dictionary: &Dictionary, bytes: &[u8], mut out: &mut [[u8; W]]) -> Result<()> {
    let entries = dictionary.bytes.as_chunks::<W>().0;
    let limit = dictionary.entries;
    // Entries are counted in 31 bits.
    let last = (limit as u32).wrapping_sub(1);
    let outside = |index: u32| {
        Error::data(format!("dictionary index {index} is out of range: the dictionary has {limit} entries"))
    };
    if out.is_empty() {
        return Ok(());
    }
    let Some((&width, bytes)) = bytes.split_first() else { return Err(short("dictionary-coded", out.len(), 0)) };
    if width > 32 {
        return Err(Error::data(format!("dictionary indices of {width} bits: expected at most 32")));
    }
    let mut runs = Runs::new(bytes, u32::from(width));
    while !out.is_empty() {
        match runs.next(out.len())? {
            Run::Repeated { value, count } => {
                if value as usize >= limit {
                    return Err(outside(value));
                }
                let (now, rest) = out.split_at_mut(count);
                now.fill(entries[value as usize]);
                out = rest;
            }
            Run::Packed { bytes, count } => {
                let (mut now, rest) = out.split_at_mut(count);
                unpack_run(bytes, u32::from(width), count, |indices, valid| {
                    let (group, after) = std::mem::take(&mut now).split_at_mut(valid);
                    now = after;
                    let inside = match <&mut [[u8; W]; GROUP]>::try_from(&mut *group) {
                        Ok(whole) => pick(entries, last, indices, whole),
                        Err(_) => pick(entries, last, &indices[..valid], group),
                    };
                    if !inside {
                        return Err(outside(indices[..valid].iter().fold(0, |most, &index| index.max(most))));
                    }
                    Ok(())
                })?;
                out = rest;
            }
        }
    }
    Ok(())
}

/// Copies the entries at `indices`; false if an index is above `last`, which the sign of an or-ed difference shows.
#[inline(always)]
fn pick<const W: usize>(entries: &[[u8; W]], last: u32, indices: &[u32], out: &mut [[u8; W]]) -> bool {
    let wrong = indices.iter().fold(last, |wrong, &index| wrong | last.wrapping_sub(index) | index);
    if wrong >> 31 != 0 {
        return false;
    }
    for (id, &index) in out.iter_mut().zip(indices) {
        *id = entries[index as usize];
    }
    true
}

fn split<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> Result<()> {
    let physical = if W == 8 { 8 } else { 4 };
    // Streams are as long as the page has values, which is all of `out`: partial pages are never asked for.
    let n = out.len();
    if bytes.len() < n * physical {
        return Err(short("byte-stream-split", n, bytes.len() / physical));
    }
    if W == 4 {
        // Zipped slices vectorise, indexed ones do not.
        let [a, b, c, d] = std::array::from_fn(|k| &bytes[k * n..(k + 1) * n]);
        let ids = out.as_flattened_mut().as_chunks_mut::<4>().0;
        for ((((id, &a), &b), &c), &d) in ids.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            *id = [a, b, c, d];
        }
    } else {
        let streams: [&[u8]; W] = std::array::from_fn(|k| &bytes[k * n..(k + 1) * n]);
        for (i, id) in out.iter_mut().enumerate() {
            *id = std::array::from_fn(|k| streams[k][i]);
        }
    }
    if let Some(at) = bytes[W * n..physical * n].iter().position(|&byte| byte != 0) {
        let i = at % n;
        let value = u32::from_le_bytes(std::array::from_fn(|k| bytes[k * n + i]));
        return Err(too_wide::<W>(value));
    }
    Ok(())
}

/// Header and miniblock layout of DELTA_BINARY_PACKED.
struct Delta<'a> {
    bytes: &'a [u8],
    miniblocks: usize,
    per_miniblock: usize,
    first: u64,
}

impl<'a> Delta<'a> {
    fn new(mut bytes: &'a [u8], expected: usize) -> Result<Self> {
        let cut_off = || short("delta", expected, 0);
        let block = varint(&mut bytes).ok_or_else(cut_off)?;
        let miniblocks = varint(&mut bytes).ok_or_else(cut_off)?;
        let total = varint(&mut bytes).ok_or_else(cut_off)?;
        let first = zigzag(varint(&mut bytes).ok_or_else(cut_off)?);
        if total != expected as u64 {
            return Err(Error::data(format!("delta page is damaged: expected {expected} values, found {total}")));
        }
        if miniblocks == 0 || miniblocks > 1 << 16 || block > 1 << 24 || block % miniblocks != 0 {
            return Err(Error::data(format!(
                "delta page is damaged: {miniblocks} miniblocks in blocks of {block} values"
            )));
        }
        let per_miniblock = (block / miniblocks) as usize;
        if per_miniblock == 0 || !per_miniblock.is_multiple_of(GROUP) {
            return Err(Error::data(format!(
                "delta page has miniblocks of {per_miniblock} values: expected a multiple of {GROUP}"
            )));
        }
        Ok(Self { bytes, miniblocks: miniblocks as usize, per_miniblock, first })
    }

    /// Calls `each` for the miniblocks that hold the next `left` deltas: minimum, width, bytes, number of deltas.
    fn miniblocks(
        &mut self,
        mut left: usize,
        mut each: impl FnMut(u64, u32, &[u8], usize) -> Result<()>,
    ) -> Result<()> {
        let cut_off = |left| Error::data(format!("delta page is damaged: it ends {left} values early"));
        while left > 0 {
            let minimum = zigzag(varint(&mut self.bytes).ok_or_else(|| cut_off(left))?);
            let (widths, rest) = self.bytes.split_at_checked(self.miniblocks).ok_or_else(|| cut_off(left))?;
            self.bytes = rest;
            for &width in widths {
                if left == 0 {
                    break;
                }
                if width > 64 {
                    return Err(Error::data(format!("delta page is damaged: deltas of {width} bits")));
                }
                let count = left.min(self.per_miniblock);
                // The last miniblock may lack its padding.
                let whole = self.per_miniblock * usize::from(width) / 8;
                let taken = whole.min(self.bytes.len());
                if taken < (count * usize::from(width)).div_ceil(8) {
                    return Err(cut_off(left));
                }
                let (packed, rest) = self.bytes.split_at(taken);
                self.bytes = rest;
                each(minimum, u32::from(width), packed, count)?;
                left -= count;
            }
        }
        Ok(())
    }
}

fn delta32<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> Result<()> {
    let Some((first, mut rest)) = out.split_first_mut() else { return Ok(()) };
    let mut delta = Delta::new(bytes, rest.len() + 1)?;
    // Arithmetic wraps at the physical width, as the format says.
    let mut value = delta.first as u32;
    let mut all = value;
    *first = low(u64::from(value));
    delta.miniblocks(rest.len(), |minimum, width, packed, count| {
        let (mut now, after) = std::mem::take(&mut rest).split_at_mut(count);
        rest = after;
        let minimum = minimum as u32;
        if width > 32 {
            return unpack_wide(packed, width, count, |deltas| {
                for &delta in deltas {
                    value = value.wrapping_add(minimum).wrapping_add(delta as u32);
                    all |= value;
                    if let Some((id, after)) = std::mem::take(&mut now).split_first_mut() {
                        *id = low(u64::from(value));
                        now = after;
                    }
                }
            });
        }
        unpack_run(packed, width, count, |deltas, valid| {
            let (group, after) = std::mem::take(&mut now).split_at_mut(valid);
            now = after;
            // Copies, because captured variables would go through memory once per id.
            let (current, bits) = match <&mut [[u8; W]; GROUP]>::try_from(&mut *group) {
                Ok(whole) => sum(whole, deltas, minimum, value),
                Err(_) => sum(group, deltas, minimum, value),
            };
            value = current;
            all |= bits;
            Ok(())
        })
    })?;
    if all & upper(W) != 0 {
        return Err(Error::data(format!("a token id does not fit uint{}", W * 8)));
    }
    Ok(())
}

/// Running sums of `deltas`; gives the last and the bits that any had.
#[inline(always)]
fn sum<const W: usize>(out: &mut [[u8; W]], deltas: &[u32; GROUP], minimum: u32, mut value: u32) -> (u32, u32) {
    let mut bits = 0;
    for (id, &delta) in out.iter_mut().zip(deltas) {
        value = value.wrapping_add(minimum.wrapping_add(delta));
        bits |= value;
        *id = low(u64::from(value));
    }
    (value, bits)
}

fn delta64<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> Result<()> {
    let Some((first, mut rest)) = out.split_first_mut() else { return Ok(()) };
    let mut delta = Delta::new(bytes, rest.len() + 1)?;
    let mut value = delta.first;
    *first = low(value);
    delta.miniblocks(rest.len(), |minimum, width, packed, count| {
        let (mut now, after) = std::mem::take(&mut rest).split_at_mut(count);
        rest = after;
        if width > 32 {
            return unpack_wide(packed, width, count, |deltas| {
                for &delta in deltas {
                    value = value.wrapping_add(minimum).wrapping_add(delta);
                    if let Some((id, after)) = std::mem::take(&mut now).split_first_mut() {
                        *id = low(value);
                        now = after;
                    }
                }
            });
        }
        unpack_run(packed, width, count, |deltas, valid| {
            let (group, after) = std::mem::take(&mut now).split_at_mut(valid);
            now = after;
            let mut current = value;
            for (id, &delta) in group.iter_mut().zip(deltas) {
                current = current.wrapping_add(minimum.wrapping_add(u64::from(delta)));
                *id = low(current);
            }
            value = current;
            Ok(())
        })
    })
}

/// As [`unpack_run`], for widths above 32, which only ids jumping by more than 2^31 need.
fn unpack_wide(bytes: &[u8], width: u32, count: usize, mut each: impl FnMut(&[u64])) -> Result<()> {
    let unpack = unpacker64(width);
    let step = 4 * width as usize;
    let mut values = [0; GROUP];
    let mut done = 0;
    while done < count {
        let rest = &bytes[(done / GROUP * step).min(bytes.len())..];
        if rest.len() >= step {
            unpack(rest, &mut values);
        } else {
            let mut padded = [0; 4 * 64];
            padded[..rest.len()].copy_from_slice(rest);
            unpack(&padded, &mut values);
        }
        let now = (count - done).min(GROUP);
        each(&values[..now]);
        done += now;
    }
    Ok(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn zigzag(raw: u64) -> u64 {
    (raw >> 1) ^ (raw & 1).wrapping_neg()
}
