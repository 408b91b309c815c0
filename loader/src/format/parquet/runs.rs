//! Runs: reads the hybrid encoding of runs and bit-packed groups, and unpacks bits.
//!
//! Levels and dictionary indices have this encoding. The reader gives one run at a time and checks
//! every length; the functions below unpack the packed groups of a run.

use crate::error::{Error, Result};

/// One run of the stream.
pub(super) enum Run<'a> {
    /// `value`, repeated `count` times.
    Repeated { value: u32, count: usize },
    /// `count` values of the stream's width, packed from the lowest bit up. `bytes` holds all of
    /// them, and continues to the end of the stream.
    Packed { bytes: &'a [u8], count: usize },
}

/// Reads a hybrid stream run by run.
pub(super) struct Runs<'a> {
    bytes: &'a [u8],
    width: u32,
}

impl<'a> Runs<'a> {
    /// Makes a reader of values of `width` bits, at most 32.
    pub(super) fn new(bytes: &'a [u8], width: u32) -> Self {
        debug_assert!(width <= 32);
        Self { bytes, width }
    }

    /// The next run, cut to `left` values. It is never empty.
    pub(super) fn next(&mut self, left: usize) -> Result<Run<'a>> {
        let cut_off = || Error::data(format!("run-length data is damaged: it ends {left} values early"));
        loop {
            let head = self.varint().ok_or_else(cut_off)?;
            let length = usize::try_from(head >> 1).map_err(|_| cut_off())?;
            if length == 0 {
                // Writers may emit empty runs. Each takes bytes, so the loop ends.
                if head & 1 == 0 {
                    self.take(self.width.div_ceil(8) as usize).ok_or_else(cut_off)?;
                }
                continue;
            }
            if head & 1 == 0 {
                let raw = self.take(self.width.div_ceil(8) as usize).ok_or_else(cut_off)?;
                let mut word = [0; 4];
                word[..raw.len()].copy_from_slice(raw);
                return Ok(Run::Repeated { value: u32::from_le_bytes(word), count: length.min(left) });
            }
            let count = length.saturating_mul(8);
            let width = self.width as usize;
            let announced = length.saturating_mul(width);
            let count = count.min(left);
            // The last group may end after the bytes that are in use.
            let needed = (count * width).div_ceil(8);
            let taken = announced.min(self.bytes.len());
            if taken < needed {
                return Err(cut_off());
            }
            let bytes = self.bytes;
            self.take(taken).ok_or_else(cut_off)?;
            return Ok(Run::Packed { bytes, count });
        }
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.bytes.split_first()?;
            self.bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(bytes)?;
        self.bytes = rest;
        Some(taken)
    }
}

/// Number of values unpacked at once.
pub(super) const GROUP: usize = 32;

/// Unpacks [`GROUP`] values of up to 32 bits. The input holds at least `4 * width` bytes.
pub(super) type Unpack32 = fn(&[u8], &mut [u32; GROUP]);
/// Unpacks [`GROUP`] values of up to 64 bits. The input holds at least `4 * width` bytes.
pub(super) type Unpack64 = fn(&[u8], &mut [u64; GROUP]);

/// Repeats a body for `I` from 0 to 31. The compiler keeps such loops rolled, and a shift by a
/// variable then costs twice the time of a shift by a constant.
macro_rules! unrolled {
    ($body:block) => { unrolled!($body 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31) };
    ($body:block $($i:literal)*) => { $({ const I: usize = $i; $body })* };
}

fn unpack32<const WIDTH: usize>(bytes: &[u8], out: &mut [u32; GROUP]) {
    let words = &bytes[..4 * WIDTH].as_chunks::<4>().0[..WIDTH];
    let word = |at: usize| u64::from(u32::from_le_bytes(words[at]));
    let mask = if WIDTH == 32 { u32::MAX } else { (1u32 << (WIDTH % 32)) - 1 };
    if WIDTH == 0 {
        *out = [0; GROUP];
        return;
    }
    unrolled!({
        let (at, shift) = (I * WIDTH / 32, I * WIDTH % 32);
        let low = word(at) >> shift;
        let value = if shift + WIDTH > 32 { low | word(at + 1) << (32 - shift) } else { low };
        out[I] = value as u32 & mask;
    });
}

// This function is rarely used, so its loop stays rolled.
fn unpack64<const WIDTH: usize>(bytes: &[u8], out: &mut [u64; GROUP]) {
    let mut words = [0u32; 2 * GROUP + 2];
    for (word, raw) in words.iter_mut().zip(bytes[..4 * WIDTH].as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*raw);
    }
    let mask = if WIDTH == 64 { u64::MAX } else { (1u64 << (WIDTH % 64)) - 1 };
    for (i, value) in out.iter_mut().enumerate() {
        let at = i * WIDTH / 32;
        let triple = u128::from(words[at]) | u128::from(words[at + 1]) << 32 | u128::from(words[at + 2]) << 64;
        *value = (triple >> (i * WIDTH % 32)) as u64 & mask;
    }
}

macro_rules! table {
    ($function:ident: $($width:literal)*) => { [$($function::<$width>),*] };
}

static UNPACK32: [Unpack32; 33] = table!(unpack32:
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32);

static UNPACK64: [Unpack64; 65] = table!(unpack64:
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32
    33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64);

/// The unpacker for values of `width` bits.
///
/// # Panics
/// If `width` is above 32.
pub(super) fn unpacker32(width: u32) -> Unpack32 {
    UNPACK32[width as usize]
}

/// The unpacker for values of `width` bits.
///
/// # Panics
/// If `width` is above 64.
pub(super) fn unpacker64(width: u32) -> Unpack64 {
    UNPACK64[width as usize]
}

/// Calls `each` with groups of unpacked values: the number of the first value, the group, and the
/// number of valid values. Only the last group may have fewer than [`GROUP`] valid values.
#[inline]
pub(super) fn unpack_run(bytes: &[u8], width: u32, count: usize, mut each: impl FnMut(usize, &[u32; GROUP], usize)) {
    let unpack = unpacker32(width);
    let step = 4 * width as usize;
    let mut values = [0; GROUP];
    let mut done = 0;
    while done < count {
        let rest = &bytes[(done / GROUP * step).min(bytes.len())..];
        if rest.len() >= step {
            unpack(rest, &mut values);
        } else {
            let mut padded = [0; 4 * 32];
            padded[..rest.len()].copy_from_slice(rest);
            unpack(&padded, &mut values);
        }
        let now = (count - done).min(GROUP);
        each(done, &values, now);
        done += now;
    }
}

/// Does the same as [`unpack_run`] for values of up to 64 bits, and passes only valid values.
pub(super) fn unpack_wide(bytes: &[u8], width: u32, count: usize, mut each: impl FnMut(usize, &[u64])) {
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
        each(done, &values[..now]);
        done += now;
    }
}
