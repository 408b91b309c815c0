//! Codec: decompresses page bodies, whole or only as far as the levels reach.
//!
//! The levels stand at the beginning of a version 1 page, so indexing needs only a prefix of the
//! body. The sizes in page headers are untrusted. This module checks them before it allocates
//! memory. It reports a body that does not decompress to exactly its announced size.

use std::io::Read;

use parquet::basic::Compression;
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use crate::error::{Error, Result};

/// Codec of a column chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    Uncompressed,
    Snappy,
    Gzip,
    /// Hadoop's framing, the LZ4 frame format or raw blocks. Writers disagreed about the meaning of
    /// this codec.
    Lz4,
    Lz4Raw,
    Zstd,
}

fn unsupported(codec: &str) -> Error {
    Error::data(format!("codec `{codec}` is not supported: expected zstd, snappy, lz4, gzip or none; rewrite the file"))
}

impl Codec {
    pub(super) fn new(compression: Compression) -> Result<Self> {
        Ok(match compression {
            Compression::UNCOMPRESSED => Self::Uncompressed,
            Compression::SNAPPY => Self::Snappy,
            Compression::GZIP(_) => Self::Gzip,
            Compression::LZ4 => Self::Lz4,
            Compression::LZ4_RAW => Self::Lz4Raw,
            Compression::ZSTD(_) => Self::Zstd,
            Compression::LZO => return Err(unsupported("lzo")),
            Compression::BROTLI(_) => return Err(unsupported("brotli")),
        })
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Uncompressed => "uncompressed",
            Self::Snappy => "snappy",
            Self::Gzip => "gzip",
            Self::Lz4 => "lz4 (legacy)",
            Self::Lz4Raw => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Largest number of bytes that one compressed byte can become, rounded up. A header that
    /// announces more is damaged.
    pub(super) const fn max_ratio(self) -> usize {
        match self {
            Self::Uncompressed => 1,
            Self::Snappy => 64,
            Self::Lz4 | Self::Lz4Raw => 256,
            Self::Gzip => 1100,
            // A block of 128 kB can be a run of one byte, described in 4 bytes.
            Self::Zstd => 65_536,
        }
    }
}

fn damaged(codec: Codec) -> Error {
    Error::data(format!("page does not decompress as {}", codec.name()))
}

/// Decompression contexts, kept from page to page.
#[derive(Default)]
pub(super) struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    zstd_stream: Option<Decoder<'static>>,
    snappy: snap::raw::Decoder,
}

impl Decompressor {
    /// Decompresses `input` to `size` bytes at the beginning of `out`, and returns them.
    pub(super) fn whole<'a>(
        &mut self,
        codec: Codec,
        input: &[u8],
        size: usize,
        out: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        let out = room(codec, input, size, out)?;
        let failed = |error: std::io::Error| damaged(codec).with_source(error);
        let written = match codec {
            Codec::Uncompressed => {
                out.copy_from_slice(input);
                size
            }
            Codec::Snappy => {
                let announced = snap::raw::decompress_len(input).map_err(|error| damaged(codec).with_source(error))?;
                if announced == size {
                    self.snappy.decompress(input, out).map_err(|error| damaged(codec).with_source(error))?
                } else {
                    announced
                }
            }
            Codec::Gzip => read_to(flate2::read::MultiGzDecoder::new(input), out).map_err(failed)?,
            Codec::Lz4Raw => {
                lz4_flex::block::decompress_into(input, out).map_err(|error| damaged(codec).with_source(error))?
            }
            Codec::Lz4 => legacy_lz4(input, out).map_err(failed)?,
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Decompressor::new().map_err(failed)?),
                };
                zstd.decompress_to_buffer(input, out).map_err(failed)?
            }
        };
        if written != size {
            return Err(Error::data(format!("page decompresses to {written} bytes, its header announces {size}")));
        }
        Ok(out)
    }

    /// Decompresses only the prefix of `input` that the caller needs.
    ///
    /// `enough` receives the bytes so far and returns the number of leading bytes needed. It is
    /// called again with more bytes until it needs no more than it received. `out` then holds that
    /// prefix, and maybe more.
    pub(super) fn prefix(
        &mut self,
        codec: Codec,
        input: &[u8],
        size: usize,
        out: &mut Vec<u8>,
        enough: impl Fn(&[u8]) -> usize,
    ) -> Result<()> {
        let failed = |error: std::io::Error| damaged(codec).with_source(error);
        match codec {
            Codec::Zstd => {
                check_size(codec, input, size)?;
                out.clear();
                let zstd = match &mut self.zstd_stream {
                    Some(zstd) => zstd,
                    none => none.insert(Decoder::new().map_err(failed)?),
                };
                zstd.reinit().map_err(failed)?;
                let mut source = InBuffer::around(input);
                loop {
                    let wanted = enough(out).min(size);
                    let have = out.len();
                    if wanted <= have {
                        return Ok(());
                    }
                    out.resize(wanted, 0);
                    let mut sink = OutBuffer::around(&mut out[have..]);
                    let hint = zstd.run(&mut source, &mut sink).map_err(failed)?;
                    let got = sink.pos();
                    out.truncate(have + got);
                    if got == 0 && (hint == 0 || source.pos() == input.len()) {
                        return Err(damaged(codec));
                    }
                }
            }
            Codec::Gzip => {
                check_size(codec, input, size)?;
                out.clear();
                let mut gzip = flate2::read::MultiGzDecoder::new(input);
                loop {
                    let wanted = enough(out).min(size);
                    let have = out.len();
                    if wanted <= have {
                        return Ok(());
                    }
                    out.resize(wanted, 0);
                    gzip.read_exact(&mut out[have..]).map_err(failed)?;
                }
            }
            Codec::Snappy => unpack(codec, snappy_body(input, size)?, size, out, enough, snappy_element),
            Codec::Lz4Raw => unpack(codec, input, size, out, enough, lz4_element),
            Codec::Uncompressed | Codec::Lz4 => {
                self.whole(codec, input, size, out)?;
                out.truncate(size);
                Ok(())
            }
        }
    }
}

/// One element of a compressed stream: bytes to append, then a copy of (distance back, length).
type Element<'a> = (&'a [u8], Option<(usize, usize)>);

/// Decompresses with `next`, which takes one element from the front of its input, until `enough` is
/// satisfied.
fn unpack<'a>(
    codec: Codec,
    mut input: &'a [u8],
    size: usize,
    out: &mut Vec<u8>,
    enough: impl Fn(&[u8]) -> usize,
    next: impl Fn(&mut &'a [u8]) -> Option<Element<'a>>,
) -> Result<()> {
    check_size(codec, input, size)?;
    out.clear();
    let mut wanted = enough(out).min(size);
    while out.len() < wanted {
        let (literal, copy) = next(&mut input).ok_or_else(|| damaged(codec))?;
        out.extend_from_slice(literal);
        if let Some((back, len)) = copy {
            let start = out.len().checked_sub(back).filter(|_| back > 0).ok_or_else(|| damaged(codec))?;
            if len > size.saturating_sub(out.len()) {
                return Err(damaged(codec));
            }
            // The copy may include bytes that it has just appended.
            for at in start..start + len {
                out.push(out[at]);
            }
        }
        if out.len() > size {
            return Err(damaged(codec));
        }
        if out.len() >= wanted {
            wanted = enough(out).min(size);
        }
    }
    Ok(())
}

fn take<'a>(input: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = input.split_at_checked(count)?;
    *input = rest;
    Some(taken)
}

/// Reads a little-endian number of `count` bytes.
fn number(input: &mut &[u8], count: usize) -> Option<usize> {
    Some(take(input, count)?.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
}

/// The elements of a raw Snappy stream. They follow the stream's length, which must be `size`.
fn snappy_body(input: &[u8], size: usize) -> Result<&[u8]> {
    let announced = snap::raw::decompress_len(input).map_err(|error| damaged(Codec::Snappy).with_source(error))?;
    if announced != size {
        return Err(Error::data(format!("page decompresses to {announced} bytes, its header announces {size}")));
    }
    let length = input.iter().take_while(|byte| **byte & 0x80 != 0).count() + 1;
    input.get(length..).ok_or_else(|| damaged(Codec::Snappy))
}

/// Reads one element of Snappy's format: a literal, or a copy whose offset takes one, two or four
/// bytes.
fn snappy_element<'a>(input: &mut &'a [u8]) -> Option<Element<'a>> {
    let tag = number(input, 1)?;
    let len = (tag >> 2) + 1;
    Some(match tag & 3 {
        0 if len <= 60 => (take(input, len)?, None),
        0 => {
            let len = number(input, len - 60)? + 1;
            (take(input, len)?, None)
        }
        1 => (&[], Some((tag >> 5 << 8 | number(input, 1)?, 4 + (tag >> 2 & 7)))),
        2 => (&[], Some((number(input, 2)?, len))),
        _ => (&[], Some((number(input, 4)?, len))),
    })
}

/// Reads one sequence of LZ4's block format: literals and a copy. The last sequence has no copy.
fn lz4_element<'a>(input: &mut &'a [u8]) -> Option<Element<'a>> {
    let long = |input: &mut &'a [u8], short: usize| {
        let mut len = short;
        while len >= 15 && (len - 15).is_multiple_of(255) {
            let more = number(input, 1)?;
            len += more;
            if more < 255 {
                break;
            }
        }
        Some(len)
    };
    let token = number(input, 1)?;
    let literals = long(input, token >> 4)?;
    let literal = take(input, literals)?;
    if input.is_empty() {
        return Some((literal, None));
    }
    let back = number(input, 2)?;
    Some((literal, Some((back, long(input, token & 15)? + 4))))
}

fn check_size(codec: Codec, input: &[u8], size: usize) -> Result<()> {
    let most = input.len().saturating_mul(codec.max_ratio()).saturating_add(64);
    if size > most || codec == Codec::Uncompressed && size != input.len() {
        return Err(Error::data(format!(
            "page header is damaged: {} bytes of {} cannot become {size} bytes",
            input.len(),
            codec.name()
        )));
    }
    Ok(())
}

/// The first `size` bytes of `out`, with unspecified content. Clearing bytes that are overwritten
/// anyway takes time.
fn room<'a>(codec: Codec, input: &[u8], size: usize, out: &'a mut Vec<u8>) -> Result<&'a mut [u8]> {
    check_size(codec, input, size)?;
    if size > out.capacity() {
        out.clear();
        out.try_reserve_exact(size).map_err(|error| {
            Error::data(format!("no memory for a page of {size} bytes; write smaller pages")).with_source(error)
        })?;
    }
    if size > out.len() {
        out.resize(size, 0);
    }
    Ok(&mut out[..size])
}

/// Fills `out` and returns the number of bytes read. Counts one byte more if the stream goes on.
fn read_to(mut reader: impl Read, out: &mut [u8]) -> std::io::Result<usize> {
    let mut at = 0;
    while at < out.len() {
        match reader.read(&mut out[at..])? {
            0 => return Ok(at),
            n => at += n,
        }
    }
    Ok(at + reader.read(&mut [0])?)
}

fn legacy_lz4(input: &[u8], out: &mut [u8]) -> std::io::Result<usize> {
    if let Some(written) = hadoop_lz4(input, out) {
        return Ok(written);
    }
    if input.starts_with(&[0x04, 0x22, 0x4d, 0x18]) {
        return read_to(lz4_flex::frame::FrameDecoder::new(input), out);
    }
    lz4_flex::block::decompress_into(input, out).map_err(std::io::Error::other)
}

/// Reads frames of (decompressed size, compressed size, block) with big-endian sizes. Returns
/// `None` if the bytes have another form.
fn hadoop_lz4(mut input: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut at = 0usize;
    while !input.is_empty() {
        let (head, rest) = input.split_first_chunk::<8>()?;
        let size = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let packed = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let sink = out.get_mut(at..at.checked_add(size)?)?;
        if lz4_flex::block::decompress_into(rest.get(..packed)?, sink).ok()? != size {
            return None;
        }
        at += size;
        input = &rest[packed..];
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn compressed(codec: Codec, data: &[u8]) -> Vec<u8> {
        match codec {
            Codec::Snappy => snap::raw::Encoder::new().compress_vec(data).unwrap(),
            _ => lz4_flex::block::compress(data),
        }
    }

    /// Short and long runs with few and many different bytes, as levels and values have them.
    fn page() -> impl Strategy<Value = Vec<u8>> {
        let run =
            (prop::collection::vec(any::<u8>(), 1..40), 1usize..400).prop_map(|(bytes, times)| bytes.repeat(times));
        prop::collection::vec(run, 0..8).prop_map(|runs| runs.concat())
    }

    proptest! {
        #[test]
        fn a_prefix_is_what_the_whole_begins_with(data in page(), wanted in 0usize..40_000) {
            for codec in [Codec::Snappy, Codec::Lz4Raw] {
                let input = compressed(codec, &data);
                let mut out = Vec::new();
                let asked_in_turns = |have: &[u8]| wanted.min(have.len() + 100);
                Decompressor::default().prefix(codec, &input, data.len(), &mut out, asked_in_turns).unwrap();
                prop_assert!(out.len() >= wanted.min(data.len()));
                prop_assert_eq!(&out[..], &data[..out.len()]);
            }
        }

        #[test]
        fn damaged_pages_are_refused_or_give_something_of_the_announced_size(
            data in page(), at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>(), noise in prop::collection::vec(any::<u8>(), 1..200),
        ) {
            for codec in [Codec::Snappy, Codec::Lz4Raw] {
                let mut input = compressed(codec, &data);
                let at = at.index(input.len());
                input[at] = byte;
                input.truncate(cut.index(input.len()) + 1);
                for input in [&input, &noise] {
                    let mut out = Vec::new();
                    let _ = Decompressor::default().prefix(codec, input, data.len(), &mut out, |_| usize::MAX);
                    prop_assert!(out.len() <= data.len() + input.len(), "{} of {}", out.len(), data.len());
                }
            }
        }
    }
}
