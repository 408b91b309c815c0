//! Values: decodes a page's values from each integer encoding directly to the logical width of the
//! ids.
//!
//! `W` is the logical width in bytes. Parquet stores ids of one or two bytes as 32-bit integers. To
//! find ids that do not fit, and negative ids, the decoders join the bits of all values by OR. No
//! code here branches per value, and none trusts an unchecked length.

use super::kernels::{self, Deltas, low};
use super::runs::{GROUP, Run, Runs, unpack_wide};
use crate::error::{Error, Result};

/// Entries of a dictionary page in the logical width.
#[derive(Debug)]
pub(super) struct Dictionary {
    bytes: Vec<u8>,
    entries: usize,
    /// Whether any entry has its top bit set.
    top_bit: bool,
}

impl Dictionary {
    /// Decodes a PLAIN dictionary page of `entries` values.
    pub(super) fn new(bytes: &[u8], entries: usize, width: usize) -> Result<Self> {
        let physical = if width == 8 { 8 } else { 4 };
        let needed = entries.saturating_mul(physical);
        if needed > bytes.len() {
            return Err(short("dictionary", entries, bytes.len() / physical));
        }
        let mut out = vec![0; entries * width];
        let top_bit = decode(Encoded::Plain, &bytes[..needed], width, &mut out)?;
        Ok(Self { bytes: out, entries, top_bit })
    }

    /// Decodes a PLAIN dictionary page of 64-bit values to 32 bits.
    pub(super) fn narrowed(bytes: &[u8], entries: usize) -> Result<Self> {
        let wide = Self::new(bytes, entries, 8)?;
        let mut out = vec![0; entries * 4];
        narrow64(&wide.bytes, &mut out)?;
        Ok(Self { bytes: out, ..wide })
    }
}

/// Encoding of a page's values, with the dictionary if the encoding needs one.
#[derive(Clone, Copy, Debug)]
pub(super) enum Encoded<'a> {
    Plain,
    Dictionary(&'a Dictionary),
    Delta,
    ByteStreamSplit,
}

/// Fills `out` with values of `width` bytes. Returns whether any value may have its top bit set.
/// Such a value is negative if the type is signed.
pub(super) fn decode(encoded: Encoded<'_>, bytes: &[u8], width: usize, out: &mut [u8]) -> Result<bool> {
    match width {
        1 => decode_as::<1>(encoded, bytes, out.as_chunks_mut().0),
        2 => decode_as::<2>(encoded, bytes, out.as_chunks_mut().0),
        4 => decode_as::<4>(encoded, bytes, out.as_chunks_mut().0),
        _ => decode_as::<8>(encoded, bytes, out.as_chunks_mut().0),
    }
}

/// Fills `out` with values of 32 bits, which the page stores in 64 bits. `wide` is memory for them.
/// The entries of a dictionary are narrowed already.
pub(super) fn decode_narrowed(encoded: Encoded<'_>, bytes: &[u8], wide: &mut Vec<u8>, out: &mut [u8]) -> Result<()> {
    if let Encoded::Dictionary(_) = encoded {
        return decode(encoded, bytes, 4, out).map(|_| ());
    }
    wide.resize(out.len() * 2, 0);
    decode(encoded, bytes, 8, wide)?;
    narrow64(wide, out)
}

/// Keeps the lower half of each 64-bit value.
fn narrow64(wide: &[u8], out: &mut [u8]) -> Result<()> {
    let mut lost = 0;
    for (half, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(wide.as_chunks::<8>().0) {
        let value = i64::from_le_bytes(*value);
        lost |= value ^ i64::from(value as i32);
        *half = (value as i32).to_le_bytes();
    }
    if lost == 0 {
        return Ok(());
    }
    Err(Error::data("a value does not fit int32: the statistics in the file are wrong"))
}

fn decode_as<const W: usize>(encoded: Encoded<'_>, bytes: &[u8], out: &mut [[u8; W]]) -> Result<bool> {
    let bits = match encoded {
        Encoded::Plain => plain(bytes, out)?,
        Encoded::Dictionary(dictionary) => {
            gather(dictionary, bytes, out)?;
            return Ok(dictionary.top_bit);
        }
        Encoded::Delta if W == 8 => delta64(bytes, out)?,
        Encoded::Delta => delta32(bytes, out)?,
        Encoded::ByteStreamSplit => split(bytes, out)?,
    };
    if bits & upper(W) != 0 {
        // This fault is rare enough to search for the value again.
        let wide = match encoded {
            Encoded::Plain => bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect(),
            Encoded::ByteStreamSplit => words(bytes, out.len()),
            Encoded::Dictionary(_) | Encoded::Delta => Vec::new(),
        };
        return Err(match wide.into_iter().take(out.len()).find(|value| value & upper(W) != 0) {
            Some(value) => {
                let id = value.cast_signed();
                Error::data(format!(
                    "token id {id} does not fit uint{}: the type or the statistics in the file are wrong",
                    W * 8
                ))
            }
            None => Error::data(format!(
                "a token id does not fit uint{}: the type or the statistics in the file are wrong",
                W * 8
            )),
        });
    }
    Ok(bits >> 31 != 0)
}

fn short(what: &str, expected: usize, found: usize) -> Error {
    Error::data(format!("{what} page is damaged: expected {expected} values, found {found}"))
}

/// Bits of a 32-bit integer that an id of `width` bytes must not have.
const fn upper(width: usize) -> u32 {
    match width {
        1 => !0xff,
        2 => !0xffff,
        _ => 0,
    }
}

/// Copies PLAIN values and returns the bits that any had. For 64-bit values, returns the bits of
/// the upper halves.
fn plain<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> Result<u32> {
    let physical = if W == 8 { 8 } else { 4 };
    let Some(bytes) = bytes.get(..out.len() * physical) else {
        return Err(short("plain", out.len(), bytes.len() / physical));
    };
    if W < 4 {
        return Ok(kernels::narrow(bytes, out));
    }
    out.as_flattened_mut().copy_from_slice(bytes);
    Ok(if W == 8 { upper_bits(out) } else { kernels::any_bits(bytes) })
}

/// All bits of the upper halves of 64-bit values.
fn upper_bits<const W: usize>(ids: &[[u8; W]]) -> u32 {
    let bits = ids.as_flattened().as_chunks::<8>().0.iter().fold(0, |bits, id| bits | u64::from_le_bytes(*id));
    (bits >> 32) as u32
}

fn gather<const W: usize>(dictionary: &Dictionary, bytes: &[u8], mut out: &mut [[u8; W]]) -> Result<()> {
    let limit = dictionary.entries;
    let outside = |index: u32| {
        Error::data(format!(
            "dictionary index {index} is out of range: the dictionary has {limit} entries; the file is damaged: copy or \
             write it again"
        ))
    };
    if out.is_empty() {
        return Ok(());
    }
    let Some((&width, bytes)) = bytes.split_first() else { return Err(short("dictionary-coded", out.len(), 0)) };
    if width > 32 {
        return Err(Error::data(format!("dictionary indices of {width} bits: expected at most 32")));
    }
    // The number of entries fits 31 bits.
    let Some(last) = (limit as u32).checked_sub(1) else { return Err(outside(0)) };
    let mut runs = Runs::new(bytes, u32::from(width));
    while !out.is_empty() {
        match runs.next(out.len())? {
            Run::Repeated { value, count } => {
                if value > last {
                    return Err(outside(value));
                }
                let (now, rest) = out.split_at_mut(count);
                now.fill(dictionary.bytes.as_chunks::<W>().0[value as usize]);
                out = rest;
            }
            Run::Packed { bytes, count } => {
                let (now, rest) = out.split_at_mut(count);
                let most = kernels::gather(&dictionary.bytes, last, bytes, u32::from(width), now);
                if most > last {
                    return Err(outside(most));
                }
                out = rest;
            }
        }
    }
    Ok(())
}

/// The first `count` 32-bit integers of a page of byte streams.
fn words(bytes: &[u8], count: usize) -> Vec<u32> {
    (0..count).map(|i| u32::from_le_bytes(std::array::from_fn(|k| bytes[k * count + i]))).collect()
}

fn split<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> Result<u32> {
    let physical = if W == 8 { 8 } else { 4 };
    // Each stream has one byte per value of the page. `out` has all values, because partial pages
    // are never requested.
    let n = out.len();
    if bytes.len() < n * physical {
        return Err(short("byte-stream-split", n, bytes.len() / physical));
    }
    if W == 8 {
        let streams: [&[u8]; 8] = std::array::from_fn(|k| &bytes[k * n..(k + 1) * n]);
        for (i, id) in out.iter_mut().enumerate() {
            *id = std::array::from_fn(|k| streams[k % 8][i]);
        }
        return Ok(upper_bits(out));
    }
    Ok(kernels::join(std::array::from_fn(|k| &bytes[k * n..(k + 1) * n]), out))
}

/// State of decoding a DELTA_BINARY_PACKED page: its header, and the layout of its miniblocks.
struct DeltaStream<'a> {
    bytes: &'a [u8],
    miniblocks: usize,
    per_miniblock: usize,
    first: u64,
    /// Minimum of the current block, and the widths of its remaining miniblocks.
    minimum: u64,
    widths: &'a [u8],
}

impl<'a> DeltaStream<'a> {
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
        Ok(Self { bytes, miniblocks: miniblocks as usize, per_miniblock, first, minimum: 0, widths: &[] })
    }

    /// The next miniblock, cut to `left` deltas.
    fn next(&mut self, left: usize) -> Result<Miniblock<'a>> {
        let cut_off = || Error::data(format!("delta page is damaged: it ends {left} values early"));
        let (&width, widths) = match self.widths.split_first() {
            Some(width) => width,
            None => {
                self.minimum = zigzag(varint(&mut self.bytes).ok_or_else(cut_off)?);
                let (widths, rest) = self.bytes.split_at_checked(self.miniblocks).ok_or_else(cut_off)?;
                self.bytes = rest;
                widths.split_first().ok_or_else(cut_off)?
            }
        };
        self.widths = widths;
        if width > 64 {
            return Err(Error::data(format!("delta page is damaged: deltas of {width} bits")));
        }
        let count = left.min(self.per_miniblock);
        // The last miniblock may lack its padding.
        let taken = (self.per_miniblock * usize::from(width) / 8).min(self.bytes.len());
        if taken < (count * usize::from(width)).div_ceil(8) {
            return Err(cut_off());
        }
        let packed = self.bytes;
        self.bytes = &self.bytes[taken..];
        Ok(Miniblock { minimum: self.minimum, width: u32::from(width), packed, count })
    }
}

/// Decodes a stream of lengths from the front of `bytes`, and leaves what follows it. Fails if the
/// stream claims more than `most` lengths.
pub(super) fn take_lengths(bytes: &mut &[u8], most: usize) -> Result<Vec<i32>> {
    let mut header = *bytes;
    let mut number = || varint(&mut header).ok_or_else(|| short("delta", most, 0));
    let (_, _, total) = (number()?, number()?, number()?);
    let total = usize::try_from(total)
        .ok()
        .filter(|total| *total <= most)
        .ok_or_else(|| Error::data(format!("delta page is damaged: {total} lengths in a page of {most} values")))?;
    let mut delta = DeltaStream::new(bytes, total)?;
    let mut lengths = Vec::with_capacity(total);
    let mut value = delta.first;
    lengths.extend((total > 0).then_some(value as i32));
    while lengths.len() < total {
        let Miniblock { minimum, width, packed, count } = delta.next(total - lengths.len())?;
        unpack_wide(packed, width, count, |_, deltas| {
            lengths.extend(deltas.iter().map(|delta| {
                value = value.wrapping_add(minimum).wrapping_add(*delta);
                value as i32
            }));
        });
    }
    *bytes = delta.bytes;
    Ok(lengths)
}

/// Packed deltas of equal width.
struct Miniblock<'a> {
    minimum: u64,
    width: u32,
    /// Bytes of the deltas, followed by further bytes.
    packed: &'a [u8],
    count: usize,
}

fn delta32<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> Result<u32> {
    let Some((first, rest)) = out.split_first_mut() else { return Ok(0) };
    let mut delta = DeltaStream::new(bytes, rest.len() + 1)?;
    // Arithmetic wraps at the physical width, as the format specifies.
    let value = delta.first as u32;
    *first = low(u64::from(value));
    let bits = kernels::sums(value, rest, |left| {
        let block = delta.next(left)?;
        Ok(Deltas { minimum: block.minimum as u32, width: block.width, packed: block.packed, count: block.count })
    })?;
    Ok(bits | value)
}

/// Decodes 64-bit values and returns the bits that any upper half had.
fn delta64<const W: usize>(bytes: &[u8], out: &mut [[u8; W]]) -> Result<u32> {
    let Some((first, mut rest)) = out.split_first_mut() else { return Ok(0) };
    let mut delta = DeltaStream::new(bytes, rest.len() + 1)?;
    let mut value = delta.first;
    let mut bits = value;
    *first = low(value);
    while !rest.is_empty() {
        let block = delta.next(rest.len())?;
        let (now, after) = rest.split_at_mut(block.count);
        rest = after;
        let mut add = |id: &mut [u8; W], delta: u64| {
            value = value.wrapping_add(block.minimum).wrapping_add(delta);
            bits |= value;
            *id = low(value);
        };
        unpack_wide(block.packed, block.width, block.count, |from, deltas| {
            now[from..].iter_mut().zip(deltas).for_each(|(id, &delta)| add(id, delta));
        });
    }
    Ok((bits >> 32) as u32)
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
