//! Claims: checks the numbers of a column before the arrow reader believes them.
//!
//! The arrow reader reserves the memory that page headers and streams of lengths claim. A failed
//! reservation ends the process. So nothing gets there before these checks.

use std::ops::Range;

use parquet::file::metadata::ColumnChunkMetaData;

use super::codec::{Codec, Decompressor};
use super::header::{DataHeader, PageKind, code};
use super::pages::{ForwardReader, read_header};
use super::values::take_lengths;
use crate::error::{Error, Result};
use crate::storage::SourceFile;
use crate::text::escaped;

/// Bytes that a value and its levels take in the arrow reader, at most.
const BYTES_OF_VALUE: u64 = 12;

/// Takes the header of a page, the place of its body, and the size of the body after decompression.
type EachPage<'a> = &'a mut dyn FnMut(&DataHeader, Range<u64>, usize) -> Result<()>;

fn damaged(chunk: &ColumnChunkMetaData, what: &str) -> Error {
    Error::data(format!("column `{}` is damaged: {what}", escaped(chunk.column_path().string().as_str())))
}

/// Calls `each` for each data page of `chunk`. Returns the size of the largest page of any kind.
fn walk(file: &SourceFile, chunk: &ColumnChunkMetaData, each: EachPage<'_>) -> Result<u64> {
    let codec = Codec::new(chunk.compression())?;
    let values = u64::try_from(chunk.num_values()).map_err(|_| damaged(chunk, "negative number of values"))?;
    let mut reader = ForwardReader::new(file, file.len());
    let data_at = u64::try_from(chunk.data_page_offset()).map_err(|_| damaged(chunk, "negative offset"))?;
    let size = u64::try_from(chunk.compressed_size()).map_err(|_| damaged(chunk, "negative size"))?;
    let start = match chunk.dictionary_page_offset() {
        Some(offset) if offset > 0 && (offset as u64) < data_at => offset as u64,
        _ => data_at,
    };
    let end = start.saturating_add(size).saturating_add(128).min(file.len());
    let (mut at, mut seen, mut largest) = (start, 0, 0);
    while seen < values {
        let header = read_header(&mut reader, at, end)?;
        let (stored, plain) = (header.compressed as u64, header.uncompressed as u64);
        if plain > stored.saturating_mul(codec.max_ratio() as u64).saturating_add(64) {
            let text = format!("{stored} bytes of {} cannot become {plain} bytes", codec.name());
            return Err(damaged(chunk, &text));
        }
        largest = largest.max(plain);
        let body = at.saturating_add(header.length as u64);
        at = body.saturating_add(stored);
        if at > end {
            return Err(damaged(chunk, &format!("a page reaches to byte {at}, the column ends at {end}")));
        }
        if let PageKind::Data(data) = header.kind {
            seen += data.num_values as u64;
            each(&data, body..at, header.uncompressed as usize)?;
        }
    }
    Ok(largest)
}

/// Fails if the arrow reader would need more than `most_bytes` bytes for the pages of `chunk`, in a
/// row group of `rows` rows.
pub(super) fn check_sizes(file: &SourceFile, chunk: &ColumnChunkMetaData, rows: i64, most_bytes: u64) -> Result<()> {
    let values = u64::try_from(chunk.num_values()).map_err(|_| damaged(chunk, "negative number of values"))?;
    if u64::try_from(rows).map_or(true, |rows| rows > values) {
        return Err(damaged(chunk, &format!("{rows} rows with {values} values")));
    }
    let largest = walk(file, chunk, &mut |_, _, _| Ok(()))?;
    let bytes = values.saturating_mul(BYTES_OF_VALUE).saturating_add(largest);
    check_budget(chunk, bytes, most_bytes)
}

/// Fails if `bytes` bytes are more than `most_bytes`.
fn check_budget(chunk: &ColumnChunkMetaData, bytes: u64, most_bytes: u64) -> Result<()> {
    if bytes <= most_bytes {
        return Ok(());
    }
    Err(Error::data(format!(
        "column `{}` takes about {bytes} bytes when its row group is decoded whole, more than `memory_budget` = \
         {most_bytes}: write smaller row groups, or raise it",
        escaped(chunk.column_path().string().as_str())
    )))
}

/// Fails if a page of `chunk`, a column without lists, has streams of lengths that claim more
/// values than the page has, or strings that take more than `most_bytes` bytes.
///
/// A string may repeat the beginning of the string before it. So short pages can hold long strings.
pub(super) fn check_lengths(file: &SourceFile, chunk: &ColumnChunkMetaData, most_bytes: u64) -> Result<()> {
    let codec = Codec::new(chunk.compression())?;
    let def_width = u64::from(i16::BITS - chunk.column_descr().max_def_level().leading_zeros());
    let (mut decompressor, mut plain, mut scratch) = (Decompressor::default(), Vec::new(), Vec::new());
    let mut bytes = 0_u64;
    walk(file, chunk, &mut |page, body, size| {
        if !matches!(page.encoding, code::DELTA_LENGTH_BYTE_ARRAY | code::DELTA_BYTE_ARRAY) {
            return Ok(());
        }
        let cut = || damaged(chunk, "the levels of a page are longer than the page");
        let stored = file.slice(body, &mut scratch)?;
        let mut values = match page.v2 {
            Some(v2) => {
                let levels = (v2.rep_bytes as usize).saturating_add(v2.def_bytes as usize);
                let values = stored.get(levels..).ok_or_else(cut)?;
                let size = size.checked_sub(levels).ok_or_else(cut)?;
                let is_plain = codec == Codec::Uncompressed || !v2.compressed || values.is_empty();
                if is_plain { values } else { decompressor.whole(codec, values, size, &mut plain)? }
            }
            None => {
                let whole = match codec {
                    Codec::Uncompressed => stored,
                    codec => decompressor.whole(codec, stored, size, &mut plain)?,
                };
                let levels = match (def_width, page.def_encoding) {
                    (0, _) => 0,
                    (_, code::RLE) => 4 + u64::from(u32::from_le_bytes(*whole.first_chunk().ok_or_else(cut)?)),
                    (width, _) => (page.num_values as u64 * width).div_ceil(8),
                };
                whole.get(levels as usize..).ok_or_else(cut)?
            }
        };
        let most = page.num_values as usize;
        if page.encoding == code::DELTA_LENGTH_BYTE_ARRAY {
            // The arrow reader compares these lengths with the bytes that follow.
            return take_lengths(&mut values, most).map(drop);
        }
        let (prefixes, suffixes) = (take_lengths(&mut values, most)?, take_lengths(&mut values, most)?);
        let mut last = 0_u64;
        for (prefix, suffix) in prefixes.iter().zip(&suffixes) {
            let length = |length: &i32| u64::try_from(*length).map_err(|_| damaged(chunk, "a length is negative"));
            last = length(prefix)?.min(last) + length(suffix)?;
            bytes = bytes.saturating_add(last);
        }
        check_budget(chunk, bytes, most_bytes)
    })?;
    Ok(())
}
