//! Decompression of page bodies: whole, or only as far as the levels at the beginning of a version 1 page reach.
//!
//! The sizes in page headers are checked before memory is taken for them, and a body that does not decompress to
//! exactly its announced size is an error.

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
    /// Hadoop's framing, the frame format or raw blocks: writers disagreed.
    Lz4,
    Lz4Raw,
    Zstd,
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
            other @ (Compression::LZO | Compression::BROTLI(_)) => {
                return Err(Error::data(format!(
                    "codec `{other}` is not supported: expected zstd, snappy, lz4, gzip or none; rewrite the file"
                )));
            }
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

    /// Most bytes that one compressed byte can become, rounded up; what announces more is damaged.
    const fn max_ratio(self) -> usize {
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

/// Contexts kept from page to page.
#[derive(Default)]
pub(super) struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    zstd_stream: Option<Decoder<'static>>,
    snappy: snap::raw::Decoder,
}

impl Decompressor {
    /// Replaces the content of `out` by the `size` bytes that `input` decompresses to.
    pub(super) fn whole(&mut self, codec: Codec, input: &[u8], size: usize, out: &mut Vec<u8>) -> Result<()> {
        prepare(codec, input, size, out)?;
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
                zstd.decompress_to_buffer(input, out.as_mut_slice()).map_err(failed)?
            }
        };
        if written != size {
            return Err(Error::data(format!("page decompresses to {written} bytes, its header announces {size}")));
        }
        Ok(())
    }

    /// Like [`Decompressor::whole`], but stops as soon as `enough` says how many leading bytes are needed and they are
    /// there; `enough` is asked again with more bytes as long as it wants more than it was shown. `out` then holds
    /// that prefix, and maybe more.
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
            _ => self.whole(codec, input, size, out),
        }
    }
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

fn prepare(codec: Codec, input: &[u8], size: usize, out: &mut Vec<u8>) -> Result<()> {
    check_size(codec, input, size)?;
    if size > out.capacity() {
        out.clear();
        out.try_reserve_exact(size).map_err(|error| {
            Error::data(format!("no memory for a page of {size} bytes; write smaller pages")).with_source(error)
        })?;
    }
    out.resize(size, 0);
    Ok(())
}

/// Fills `out` and counts one byte more where the stream goes on.
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

/// Frames of big-endian (decompressed size, compressed size, block); `None` where the bytes are not that.
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
