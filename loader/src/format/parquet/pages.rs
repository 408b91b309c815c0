//! Pages: builds the index of a file by a walk over the page headers and levels of the token
//! column.
//!
//! Takes the footer's description of a row group. Gives each page's place, size, encoding and
//! number of tokens and documents. The walk must read the levels, because no statistic gives these
//! numbers exactly: `num_values` counts empty and null lists, and writers disagree about what
//! `null_count` counts. Decodes no values.

use std::ops::Range;
use std::path::{Component, Path};

use parquet::file::metadata::RowGroupMetaData;

use super::codec::{Codec, Decompressor};
use super::column::Column;
use super::header::{self, DataHeader, HeaderFault, PageKind, code};
use super::levels::Levels;
use crate::error::{Error, Result};
use crate::format::DecodedPages;
use crate::storage::SourceFile;
use crate::text::escaped;

/// Writers make pages of about 1 MiB. A page of up to this size passes under any budget.
const USUAL_BYTES: u64 = 2 << 20;

/// Encoding of a page's values, which selects the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Plain,
    Dictionary,
    Delta,
    ByteStreamSplit,
    /// A whole row group instead of a page. The arrow reader decodes it.
    RowGroup,
}

impl DecodedPages {
    /// Counts a page, or a row group, of `coding`.
    pub(super) fn count(&mut self, coding: Coding) {
        *match coding {
            Coding::Plain => &mut self.plain,
            Coding::Dictionary => &mut self.dictionary,
            Coding::Delta => &mut self.delta,
            Coding::ByteStreamSplit => &mut self.byte_stream_split,
            Coding::RowGroup => &mut self.row_groups_by_arrow,
        } += 1;
    }
}

/// Place and sizes of a page's body.
#[derive(Clone, Copy, Debug)]
pub(super) struct Body {
    pub(super) offset: u64,
    pub(super) compressed: u32,
    pub(super) uncompressed: u32,
    pub(super) crc: Option<u32>,
}

impl Body {
    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.compressed)
    }
}

/// Sizes of the levels of a version 2 page.
#[derive(Clone, Copy, Debug)]
pub(super) struct LevelSizes {
    pub(super) rep_bytes: u32,
    pub(super) def_bytes: u32,
    pub(super) compressed: bool,
}

/// A data page that holds tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    pub(super) body: Body,
    pub(super) v2: Option<LevelSizes>,
    pub(super) coding: Coding,
    pub(super) row_group: u32,
    /// Number of pairs of levels.
    pub(super) entries: u32,
    pub(super) tokens: u32,
    /// Number of non-empty documents that begin in the page.
    pub(super) starts: u32,
    /// Whether the first token begins a document, and whether the last token ends one.
    pub(super) opens: bool,
    pub(super) closes: bool,
    /// Number of the shard's rows that begin before the page.
    pub(super) rows_before: u64,
    /// Row of the first non-empty document that begins in the page. If none does, the row of the
    /// first token.
    pub(super) first_row: u64,
}

/// The part of a row group's metadata that decoding needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowGroup {
    pub(super) codec: Codec,
    /// The dictionary page and its number of entries.
    pub(super) dictionary: Option<(Body, u32)>,
}

/// Outcome of a walk over one row group.
pub(super) enum Walk {
    Pages(RowGroup, Vec<Page>),
    /// The row group uses a feature that the page decoder does not know. The text describes it.
    Unfamiliar(String),
}

/// Reads ranges of a file in ascending order, from the mapping or from a buffer that reads ahead.
pub(super) struct ForwardReader<'a> {
    file: &'a SourceFile,
    buffer: Vec<u8>,
    start: u64,
    end: u64,
}

/// Bytes read at once if the file is not mapped. This holds several headers with small pages, and
/// wastes little with large ones.
const READ_AHEAD: u64 = 64 << 10;

impl<'a> ForwardReader<'a> {
    /// Makes a reader of the bytes of `file` before `end`.
    pub(super) fn new(file: &'a SourceFile, end: u64) -> Self {
        Self { file, buffer: Vec::new(), start: 0, end }
    }

    /// The bytes of `range`, without those past the end.
    fn upto(&mut self, range: Range<u64>) -> Result<&[u8]> {
        self.get(range.start.min(self.end)..range.end.min(self.end))
    }

    pub(super) fn get(&mut self, range: Range<u64>) -> Result<&[u8]> {
        if range.end > self.end {
            return Err(Error::data(format!(
                "shard is truncated or damaged: a page reaches to byte {}, the data end at {}",
                range.end, self.end
            )));
        }
        let length = (range.end - range.start) as usize;
        if self.file.is_mapped() {
            return self.file.slice(range, &mut self.buffer);
        }
        let held = self.start..self.start + self.buffer.len() as u64;
        if range.start < held.start || range.end > held.end {
            let ahead = range.end.max(range.start + READ_AHEAD).min(self.end);
            self.file.slice(range.start..ahead, &mut self.buffer)?;
            self.start = range.start;
        }
        let from = (range.start - self.start) as usize;
        Ok(&self.buffer[from..from + length])
    }
}

/// Scratch memory of a walk.
#[derive(Default)]
pub(super) struct Walker {
    levels: Levels,
    decompressor: Decompressor,
    bytes: Vec<u8>,
    /// First row of a further column that is null.
    pub(super) null_list: Option<u64>,
}

impl Walker {
    /// Walks over row group `index`. `rows_before` rows of the shard come before it.
    pub(super) fn walk(
        &mut self,
        reader: &mut ForwardReader<'_>,
        column: &Column,
        group: &RowGroupMetaData,
        index: u32,
        rows_before: u64,
    ) -> Result<Walk> {
        if column.leaf >= group.num_columns() {
            return Err(Error::data(format!("row group {index} lacks column `{}`", escaped(&column.name))));
        }
        let chunk = group.column(column.leaf);
        if let Some(path) = chunk.file_path()
            && !is_path_of(path, reader.file.path())
        {
            return Err(Error::data(format!(
                "row group {index} keeps its column in another file, `{}`; list that file instead",
                escaped(path)
            )));
        }
        let codec = Codec::new(chunk.compression())?;
        let damaged = |what: &str| Error::data(format!("column of row group {index} is damaged: {what}"));
        let expected_rows = u64::try_from(group.num_rows()).map_err(|_| damaged("negative number of rows"))?;
        let expected = u64::try_from(chunk.num_values()).map_err(|_| damaged("negative number of values"))?;
        let size = u64::try_from(chunk.compressed_size()).map_err(|_| damaged("negative size"))?;
        let data_at = u64::try_from(chunk.data_page_offset()).map_err(|_| damaged("negative offset"))?;
        let mut at = match chunk.dictionary_page_offset() {
            // Some writers put 0 if there is no dictionary.
            Some(offset) if offset > 0 && (offset as u64) < data_at => offset as u64,
            _ => data_at,
        };
        // Old writers did not count the header of the dictionary in the size, so allow some slack.
        let end = at.saturating_add(size).saturating_add(128).min(reader.end);

        let mut dictionary = None;
        let mut pages: Vec<Page> = Vec::new();
        let (mut seen, mut rows, mut tail_empty) = (0, 0, false);
        while seen < expected {
            let header = read_header(reader, at, end)?;
            let offset = at + header.length as u64;
            let body = Body {
                offset,
                compressed: header.compressed as u32,
                uncompressed: header.uncompressed as u32,
                crc: header.crc,
            };
            at = offset + u64::from(body.compressed);
            if at > end {
                return Err(damaged(&format!("a page reaches to byte {at}, the column ends at {end}")));
            }
            let most_bytes = column.most_bytes.max(USUAL_BYTES);
            if codec != Codec::Uncompressed && u64::from(body.uncompressed) > most_bytes {
                return Err(Error::data(format!(
                    "a page takes {} bytes after decompression, more than `memory_budget` = {}: write smaller \
                     pages, or raise it",
                    body.uncompressed, column.most_bytes
                )));
            }
            let data = match header.kind {
                PageKind::Other => continue,
                PageKind::Dictionary { num_values, encoding } => {
                    if !matches!(encoding, code::PLAIN | code::PLAIN_DICTIONARY) {
                        return Ok(Walk::Unfamiliar(format!("dictionary encoding {encoding}")));
                    }
                    if dictionary.replace((body, num_values as u32)).is_some() {
                        return Err(damaged("it has two dictionaries"));
                    }
                    continue;
                }
                PageKind::Data(data) => data,
            };
            let coding = match data.encoding {
                code::PLAIN => Coding::Plain,
                code::PLAIN_DICTIONARY | code::RLE_DICTIONARY => Coding::Dictionary,
                code::DELTA_BINARY_PACKED => Coding::Delta,
                code::BYTE_STREAM_SPLIT => Coding::ByteStreamSplit,
                other => return Ok(Walk::Unfamiliar(format!("encoding {other}"))),
            };
            if column.lists && data.rep_encoding != code::RLE || column.max_def > 0 && data.def_encoding != code::RLE {
                return Ok(Walk::Unfamiliar("levels that are not run-length encoded".to_owned()));
            }
            let entries = data.num_values as u32;
            seen += u64::from(entries);
            if seen > expected {
                return Err(damaged(&format!("expected {expected} values, found {seen}")));
            }
            if entries == 0 {
                continue;
            }
            let mut page = Page {
                body,
                v2: v2(&data, &body)?,
                coding,
                row_group: index,
                entries,
                tokens: entries,
                starts: 0,
                opens: false,
                closes: false,
                rows_before: rows_before + rows,
                first_row: rows_before + rows,
            };
            if column.lists {
                self.read_levels(reader, column, codec, &page)?;
                let counts = self.levels.counts;
                if let Some(row) = counts.null_row {
                    self.null_list.get_or_insert(page.rows_before + row as u64);
                }
                if !counts.begins_row && (seen == u64::from(entries) || tail_empty) {
                    return Err(damaged("a page continues a row that has not begun"));
                }
                tail_empty = counts.ends_empty;
                rows += counts.rows as u64;
                page.tokens = counts.tokens as u32;
                page.starts = counts.starts as u32;
                page.opens = counts.opens;
                page.first_row = match counts.starts {
                    0 => page.rows_before.saturating_sub(1),
                    _ => page.rows_before + counts.first_start_row as u64,
                };
            } else {
                rows += u64::from(entries);
            }
            if page.tokens == 0 {
                continue;
            }
            if coding == Coding::Dictionary && dictionary.is_none() {
                return Err(damaged("it has no dictionary page"));
            }
            if matches!(coding, Coding::Plain | Coding::ByteStreamSplit)
                && (page.tokens as usize).saturating_mul(column.physical_size()) > body.uncompressed as usize
                // Null tokens take no bytes. The decoder reports them when it meets them.
                && column.max_def == column.list_def
            {
                return Err(damaged(&format!("{} tokens in a page of {} bytes", page.tokens, body.uncompressed)));
            }
            pages.push(page);
        }
        if rows != expected_rows {
            return Err(damaged(&format!("expected {expected_rows} rows, found {rows}")));
        }
        if column.lists {
            let opens: Vec<_> = pages.iter().skip(1).map(|page| page.opens).chain([true]).collect();
            for (page, next_opens) in pages.iter_mut().zip(opens) {
                page.closes = next_opens;
            }
        }
        Ok(Walk::Pages(RowGroup { codec, dictionary }, pages))
    }

    fn read_levels(
        &mut self,
        reader: &mut ForwardReader<'_>,
        column: &Column,
        codec: Codec,
        page: &Page,
    ) -> Result<()> {
        let (rep, def) = level_bytes(reader, column, codec, page, &mut self.decompressor, &mut self.bytes)?;
        self.levels.read(column, rep, def, page.entries as usize)
    }
}

/// The encoded repetition and definition levels of `page`. Reads and decompresses no more than
/// that needs.
pub(super) fn level_bytes<'a>(
    reader: &'a mut ForwardReader<'_>,
    column: &Column,
    codec: Codec,
    page: &Page,
    decompressor: &mut Decompressor,
    plain: &'a mut Vec<u8>,
) -> Result<(&'a [u8], &'a [u8])> {
    let body = &page.body;
    if let Some(v2) = page.v2 {
        let (rep_bytes, def_bytes) = (u64::from(v2.rep_bytes), u64::from(v2.def_bytes));
        let bytes = reader.get(body.offset..body.offset + rep_bytes + def_bytes)?;
        return Ok(bytes.split_at(rep_bytes as usize));
    }
    let count = level_streams(column);
    let bytes = if codec == Codec::Uncompressed {
        let mut have = 0;
        loop {
            let wanted = levels_length(reader.get(body.offset..body.offset + have as u64)?, count);
            if wanted <= have {
                break;
            }
            if wanted > body.compressed as usize {
                return Err(Error::data("page levels are damaged: they are longer than their page"));
            }
            have = wanted;
        }
        reader.get(body.offset..body.offset + have as u64)?
    } else {
        let input = reader.get(body.range())?;
        let enough = |bytes: &[u8]| levels_length(bytes, count);
        decompressor.prefix(codec, input, body.uncompressed as usize, plain, enough)?;
        plain
    };
    let (rep, def, _) = split_v1(bytes, column)?;
    Ok((rep, def))
}

/// Whether `named`, the path in a column chunk, means this file.
///
/// It does if it is empty or an ending of `path`. Writers give the path below a folder that the
/// reader does not know.
fn is_path_of(named: &str, path: &Path) -> bool {
    let named = Path::new(named).components().filter(|part| !matches!(part, Component::CurDir | Component::RootDir));
    let mut own = path.components().rev();
    named.rev().all(|part| own.next().is_none_or(|own| own == part))
}

fn v2(data: &DataHeader, body: &Body) -> Result<Option<LevelSizes>> {
    let Some(v2) = data.v2 else { return Ok(None) };
    let v2 = LevelSizes { rep_bytes: v2.rep_bytes as u32, def_bytes: v2.def_bytes as u32, compressed: v2.compressed };
    let levels = u64::from(v2.rep_bytes) + u64::from(v2.def_bytes);
    if levels > u64::from(body.compressed.min(body.uncompressed)) {
        return Err(Error::data(format!(
            "page header is damaged: {levels} bytes of levels in a page of {} bytes",
            body.compressed
        )));
    }
    Ok(Some(v2))
}

pub(super) fn read_header(reader: &mut ForwardReader<'_>, at: u64, end: u64) -> Result<header::PageHeader> {
    // Statistics can make headers long. Few headers are longer than 100 bytes.
    for size in [1 << 10, 1 << 20] {
        let bytes = reader.upto(at..at.saturating_add(size).min(end))?;
        let whole = (bytes.len() as u64) < size;
        match header::parse(bytes) {
            Ok(header) => return Ok(header),
            Err(HeaderFault::CutOff) if !whole => {}
            Err(HeaderFault::CutOff) => break,
            Err(HeaderFault::Damaged(what)) => {
                return Err(Error::data(format!("page header at byte {at} is damaged: {what}")));
            }
        }
    }
    Err(Error::data(format!("page header at byte {at} is damaged or cut off")))
}

/// Number of level streams at the beginning of a version 1 page.
fn level_streams(column: &Column) -> usize {
    usize::from(column.lists) + usize::from(column.max_def > 0)
}

/// Length of the `streams` level streams in bytes, as far as `bytes` shows it.
fn levels_length(bytes: &[u8], streams: usize) -> usize {
    let mut at = 0usize;
    for _ in 0..streams {
        match at.checked_add(4).and_then(|end| bytes.get(at..end)) {
            Some(length) => at += 4 + u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize,
            None => return at + 4,
        }
    }
    at
}

/// Splits a version 1 body into repetition levels, definition levels and values.
pub(super) fn split_v1<'a>(body: &'a [u8], column: &Column) -> Result<(&'a [u8], &'a [u8], &'a [u8])> {
    fn stream<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (levels, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        *bytes = rest;
        Some(levels)
    }
    let mut rest = body;
    let damaged = || Error::data("page levels are damaged: they are longer than their page");
    let rep = if column.lists { stream(&mut rest).ok_or_else(damaged)? } else { &[] };
    let def = if column.max_def > 0 { stream(&mut rest).ok_or_else(damaged)? } else { &[] };
    Ok((rep, def, rest))
}
