//! Parquet shards: one integer list column, decoded page by page.
//!
//! Opening reads the footer and walks the page headers and levels of the token column (`pages`).
//! A block is a run of adjacent pages; opening finds each block's number of tokens and documents.
//! Decoding goes directly from page bodies to ids in their logical width (`values`). The arrow
//! reader decodes row groups with unknown features (`fallback`). Every byte of the file is
//! untrusted.

mod claims;
mod codec;
mod column;
mod fallback;
mod footer;
mod header;
mod kernels;
mod levels;
mod pages;
mod runs;
#[cfg(test)]
mod tests;
mod values;
mod whole_column;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use ::parquet::file::metadata::{FooterTail, ParquetMetaData, ParquetMetaDataReader};
use ::parquet::file::statistics::Statistics;

use self::codec::{Codec, Decompressor};
use self::column::Column;
use self::levels::Levels;
use self::pages::{Body, Coding, ForwardReader, Page, RowGroup, Walk, Walker};
use self::values::{Dictionary, Encoded};
pub(super) use self::whole_column::ParquetColumn;
pub use self::whole_column::only_column;
use super::{
    AnyShard, BlockMeta, BlockShard, DecodedBlock, FileSample, Format, OpenOptions, Recognised, Shard, ShardInfo,
    TokenColumn, null_list,
};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::SourceFile;
use crate::text::{bytes, escaped, number_of};
use crate::tokens::{Dtype, Tokens, negative_id};

/// Number of bytes of the magic and the footer length at the end of a file.
const TAIL_BYTES: u64 = 8;

/// Largest number of tokens of a block, so that its ends fit 32 bits.
const MAX_BLOCK_TOKENS: u64 = u32::MAX as u64;

/// Opens `file`, whose content is known to be Parquet.
pub(crate) fn open(file: SourceFile, options: &OpenOptions) -> Result<Shard> {
    Ok(Shard::Block(Box::new(ParquetShard::open(file, options, Route::Pages)?)))
}

/// Recognises Parquet by the magic at both ends of the file.
pub(crate) fn recognise(sample: &FileSample<'_>) -> Recognised {
    if sample.head.starts_with(b"PAR1") {
        return match sample.tail.ends_with(b"PAR1") {
            true => Recognised::Yes,
            false => Recognised::Refused(Error::data(
                "Parquet file is truncated: it begins with `PAR1` and does not end with it; write or copy it again",
            )),
        };
    }
    if sample.head.starts_with(b"PARE") || sample.tail.ends_with(b"PARE") {
        return Recognised::Refused(Error::data(
            "Parquet file is encrypted, which is not supported; write it without encryption",
        ));
    }
    Recognised::No
}

/// Decoder of the row groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// Our page decoder for the row groups that it knows, and arrow-rs for the others.
    Pages,
    /// Arrow-rs for all row groups. Tests compare the two decoders.
    #[cfg(test)]
    Arrow,
}

/// One open Parquet file.
#[derive(Debug)]
struct ParquetShard {
    info: ShardInfo,
    /// The token column. Its type is the type of decoded blocks: the smallest type that holds all
    /// ids.
    column: Column,
    row_groups: Vec<RowGroup>,
    pages: Vec<Page>,
    /// Pages of each block.
    ranges: Vec<Range<usize>>,
    /// Largest id, if all row groups have statistics.
    max_id: Option<i64>,
    /// The dictionary used last, and its row group. Any thread that decodes a block reads and
    /// replaces it. Dictionaries are small compared with a block, so the shard keeps only one.
    dictionary: Mutex<Option<(u32, Arc<Dictionary>)>>,
}

/// Memory that decoding a page borrows from its thread's [`Scratch`].
struct PageMemory<'a> {
    levels: &'a mut Levels,
    decompressor: &'a mut Decompressor,
    plain: &'a mut Vec<u8>,
    wide: &'a mut Vec<u8>,
}

/// Memory that a thread keeps from block to block.
#[derive(Default)]
struct Scratch {
    file: Vec<u8>,
    page: Vec<u8>,
    /// Values of 64 bits, before they are narrowed.
    wide: Vec<u8>,
    levels: Levels,
    decompressor: Decompressor,
}

/// A thread frees buffers larger than this after a block.
const KEEP_BYTES: usize = 16 << 20;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A file's footer.
struct Footer {
    metadata: ParquetMetaData,
    /// Row group and index of each column that is encrypted.
    encrypted: Vec<(usize, usize)>,
    /// Start of the footer, which is the end of the data.
    start: u64,
}

/// Reads the footer of a Parquet file. Leaves out the fields that no reader of columns needs.
pub fn read_metadata(file: &SourceFile) -> Result<ParquetMetaData> {
    Ok(read_footer(file)?.metadata)
}

fn read_footer(file: &SourceFile) -> Result<Footer> {
    let len = file.len();
    let damaged = |what: String| Error::data(format!("not a whole Parquet file: {what}"));
    if len < TAIL_BYTES + 4 {
        return Err(damaged(format!("{len} bytes are too few")));
    }
    let mut scratch = Vec::new();
    let tail = file.slice(len - TAIL_BYTES..len, &mut scratch)?;
    let tail: &[u8; TAIL_BYTES as usize] = tail.try_into().map_err(|_| damaged("its tail is missing".to_owned()))?;
    if &tail[4..] == b"PARE" {
        return Err(encrypted("Parquet file"));
    }
    let footer = FooterTail::try_new(tail).map_err(|error| {
        damaged("it does not end in `PAR1`; it may be truncated, or still being written".to_owned()).with_source(error)
    })?;
    let size = footer.metadata_length() as u64;
    let start = (len - TAIL_BYTES)
        .checked_sub(size)
        .ok_or_else(|| damaged(format!("its footer should have {size} bytes, the file has {len}")))?;
    let mut scratch = Vec::new();
    let bytes = file.slice(start..len - TAIL_BYTES, &mut scratch)?;
    // The parquet crate trusts some numbers of a footer. So it gets no footer that was not walked.
    let reduced = footer::reduce(bytes).map_err(|fault| damaged(format!("its footer is damaged: {}", fault.text())))?;
    match ParquetMetaDataReader::decode_metadata(&reduced.bytes) {
        Ok(metadata) => Ok(Footer { metadata, encrypted: reduced.encrypted, start }),
        Err(_) if !reduced.encrypted.is_empty() => Err(encrypted("a column of the Parquet file")),
        Err(error) => Err(damaged("its footer is damaged".to_owned()).with_source(error)),
    }
}

fn encrypted(what: &str) -> Error {
    Error::data(format!("{what} is encrypted, which is not supported; write it without encryption"))
}

/// Number of rows of the file. Some writers give it only for the row groups.
fn count_rows(metadata: &ParquetMetaData) -> Result<u64> {
    let negative = |_| Error::data("footer is damaged: negative row count");
    let rows = u64::try_from(metadata.file_metadata().num_rows()).map_err(negative)?;
    let mut found = 0_u64;
    for group in metadata.row_groups() {
        found = found.saturating_add(u64::try_from(group.num_rows()).map_err(negative)?);
    }
    if rows != found && rows != 0 {
        return Err(Error::data(format!("footer is damaged: expected {rows} rows, its row groups have {found}")));
    }
    Ok(found)
}

impl ParquetShard {
    fn open(file: SourceFile, options: &OpenOptions, route: Route) -> Result<Self> {
        let path = file.path().to_owned();
        Self::open_inner(file, options, route).map_err(|error| error.at(&path))
    }

    fn open_inner(file: SourceFile, options: &OpenOptions, route: Route) -> Result<Self> {
        let Footer { metadata, encrypted: encrypted_columns, start: data_end } = read_footer(&file)?;
        let schema = metadata.file_metadata().schema_descr();
        let rows = count_rows(&metadata)?;
        let mut not_read: Vec<String> =
            schema.root_schema().get_fields().iter().map(|field| field.name().to_owned()).collect();
        let (mut column, refused) = match Column::choose(schema, options) {
            Ok(chosen) => chosen,
            // A file without rows has no tokens, whatever its columns are.
            Err(_) if rows == 0 && !options.is_field => return Ok(Self::without_tokens(file, "", not_read, rows)),
            Err(error) => return Err(error),
        };
        not_read.retain(|name| *name != column.name);
        if let Some(refused) = &refused
            && (rows == 0 || refused.is_null)
        {
            return Ok(Self::without_tokens(file, &column.name, not_read, rows));
        }
        let refused = refused.map(|refused| refused.error);
        let mut walker = Walker::default();
        let mut reader = ForwardReader::new(&file, data_end);
        let (mut row_groups, mut pages) = (Vec::new(), Vec::new());
        let mut rows_before = 0;
        for (index, group) in metadata.row_groups().iter().enumerate() {
            let number = u32::try_from(index).map_err(|_| Error::data("the file has more than 2^32 row groups"))?;
            if encrypted_columns.contains(&(index, column.leaf)) {
                return Err(encrypted(&format!("token column `{}`", escaped(&column.name))));
            }
            let walk = match route {
                Route::Pages if column.is_unfamiliar() => Walk::Unfamiliar(String::new()),
                Route::Pages => walker.walk(&mut reader, &column, group, number, rows_before)?,
                #[cfg(test)]
                Route::Arrow => Walk::Unfamiliar(String::new()),
            };
            match walk {
                Walk::Pages(_, found) if refused.is_some() && !found.is_empty() => {
                    return Err(refused.expect("checked in this arm"));
                }
                Walk::Unfamiliar(_) if refused.is_some() => return Err(refused.expect("checked in this arm")),
                Walk::Pages(row_group, found) => {
                    row_groups.push(row_group);
                    pages.extend(found);
                }
                Walk::Unfamiliar(what) => {
                    let codec = Codec::new(group.column(column.leaf).compression())?;
                    row_groups.push(RowGroup { codec, dictionary: None });
                    let decoded = fallback::read(&file, &column, index)
                        .map_err(|error| if what.is_empty() { error } else { error.context(what) })?;
                    walker.null_list = walker.null_list.or(decoded.null_list.map(|row| rows_before + row));
                    pages.extend(whole_row_group(&column, &decoded, number, rows_before)?);
                }
            }
            rows_before = rows_before.saturating_add(u64::try_from(group.num_rows()).unwrap_or(0));
        }
        if let Some(row) = walker.null_list {
            return Err(null_list(&column.name).at_row(row));
        }
        if !column.lists {
            // One document runs through the whole file.
            if let Some(first) = pages.first_mut() {
                (first.starts, first.opens) = (1, true);
            }
            if let Some(last) = pages.last_mut() {
                last.closes = true;
            }
        }
        let range = id_range(&metadata, &column);
        let dtype = column.stored;
        // Ids of two bytes take half of the cache's memory, and half of what is written and read
        // again. Arrow-rs gives no smaller type than the stored one.
        let fits = range.is_some_and(|(least, most)| least >= 0 && most <= i64::from(u16::MAX));
        // Labels are often stored in eight bytes, although ids and -100 fit four.
        let fits_half = range.is_some_and(|(least, most)| [least, most].iter().all(|id| i32::try_from(*id).is_ok()));
        if pages.iter().all(|page| page.coding != Coding::RowGroup) {
            match column.dtype {
                Dtype::I32 if fits => column.dtype = Dtype::U16,
                Dtype::I64 if column.is_field && fits_half => column.dtype = Dtype::I32,
                _ => {}
            }
        }
        let ranges = cut(&pages, options.block_tokens);
        let blocks = ranges.iter().map(|range| describe_block(&pages[range.clone()], column.dtype)).collect();
        let max_id = range.map(|(_, most)| most);
        let token_column = TokenColumn::of(&column.name, !column.lists);
        let info = ShardInfo { file, format: Format::Parquet, dtype, column: token_column, not_read, rows, blocks };
        Ok(Self { info, column, row_groups, pages, ranges, max_id, dictionary: Mutex::new(None) })
    }

    /// A file whose column `name` has no tokens.
    fn without_tokens(file: SourceFile, name: &str, not_read: Vec<String>, rows: u64) -> Self {
        let column = Column::without_tokens(name, false);
        let info = ShardInfo {
            file,
            format: Format::Parquet,
            dtype: column.dtype,
            column: TokenColumn::of(name, false),
            not_read,
            rows,
            blocks: Vec::new(),
        };
        Self {
            info,
            column,
            row_groups: Vec::new(),
            pages: Vec::new(),
            ranges: Vec::new(),
            max_id: None,
            dictionary: Mutex::new(None),
        }
    }

    fn decode_block(
        &self,
        block: usize,
        limit: Option<u64>,
        scratch: &mut Scratch,
        out: &mut DecodedBlock,
    ) -> Result<()> {
        self.info.file.check_unchanged()?;
        let (Some(range), Some(meta)) = (self.ranges.get(block), self.info.blocks.get(block)) else {
            return Err(Error::new(ErrorKind::Internal, format!("block {block} of {}", self.info.blocks.len())));
        };
        meta.check_size(self.column.most_bytes)?;
        let all = &self.pages[range.clone()];
        let mut tokens = 0;
        let mut count = 0;
        while count < all.len() && limit.is_none_or(|limit| tokens < limit) {
            tokens += u64::from(all[count].tokens);
            count += 1;
        }
        let pages = &all[..count];
        let width = self.column.dtype.size();
        out.complete = count == all.len();
        let ends = if out.complete { meta.ends as usize } else { pages.iter().map(|page| page.starts as usize).sum() };
        out.reset(tokens as usize * width, ends + 1)
            .map_err(|error| Error::data(format!("no memory for a block of {tokens} tokens")).with_source(error))?;

        let DecodedBlock { bytes: ids, ends: out_ends, pages: counted, .. } = out;
        let mut rest = ids.as_mut_slice();
        // Offset in the block of the first token of `rest`.
        let mut base = 0;
        let mut done = 0;
        while done < pages.len() {
            // Pages that touch are read in one call if the file is not mapped.
            let first = &pages[done];
            let mut bytes = first.body.range();
            let mut run = 1;
            while let Some(next) = pages.get(done + run)
                && next.row_group == first.row_group
                && next.body.offset >= bytes.end
                && next.body.range().end - bytes.start <= READ_RUN
            {
                bytes.end = next.body.range().end;
                run += 1;
            }
            if first.coding == Coding::RowGroup {
                let (ids, after) = std::mem::take(&mut rest).split_at_mut(first.tokens as usize * width);
                rest = after;
                self.decode_row_group(first, base, ids, out_ends)?;
                base += first.tokens;
                counted.count(first.coding);
                done += 1;
                continue;
            }
            let dictionary = match pages[done..done + run].iter().any(|page| page.coding == Coding::Dictionary) {
                true => Some(self.dictionary(first.row_group, &mut scratch.decompressor, &mut scratch.page)?),
                false => None,
            };
            let slice = self.info.file.slice(bytes.clone(), &mut scratch.file)?;
            for page in &pages[done..done + run] {
                let from = (page.body.offset - bytes.start) as usize;
                let body = &slice[from..from + page.body.compressed as usize];
                let (ids, after) = std::mem::take(&mut rest).split_at_mut(page.tokens as usize * width);
                rest = after;
                let context = PageMemory {
                    levels: &mut scratch.levels,
                    decompressor: &mut scratch.decompressor,
                    plain: &mut scratch.page,
                    wide: &mut scratch.wide,
                };
                self.decode_page(page, body, dictionary.as_deref(), context, base, ids, out_ends)?;
                base += page.tokens;
                counted.count(page.coding);
            }
            done += run;
        }
        if pages.last().is_some_and(|page| page.closes) {
            out.ends.push(tokens as u32);
        }
        if out.complete && out.ends.len() as u64 != meta.ends {
            return Err(ends_differ(meta, &out.ends));
        }
        Ok(())
    }

    /// Writes the ids of a page to `ids`, and appends the starts of its documents to `ends`. The
    /// first token of the page has offset `base` in the block.
    #[expect(clippy::too_many_arguments, reason = "what is borrowed apart cannot be one argument")]
    fn decode_page(
        &self,
        page: &Page,
        body: &[u8],
        dictionary: Option<&Dictionary>,
        context: PageMemory<'_>,
        base: u32,
        ids: &mut [u8],
        ends: &mut Vec<u32>,
    ) -> Result<()> {
        let PageMemory { levels, decompressor, plain, wide } = context;
        check_crc(&page.body, body).map_err(|error| error.at_row(page.first_row))?;
        let column = &self.column;
        let codec = self.row_groups[page.row_group as usize].codec;
        let size = page.body.uncompressed as usize;
        let (rep, def, values) = match page.v2 {
            Some(v2) => {
                let (rep, rest) = body.split_at(v2.rep_bytes as usize);
                let (def, rest) = rest.split_at(v2.def_bytes as usize);
                if v2.compressed && codec != Codec::Uncompressed && !rest.is_empty() {
                    (rep, def, decompressor.whole(codec, rest, size - rep.len() - def.len(), plain)?)
                } else {
                    (rep, def, rest)
                }
            }
            None if codec == Codec::Uncompressed => pages::split_v1(body, column)?,
            None => pages::split_v1(decompressor.whole(codec, body, size, plain)?, column)?,
        };
        self.push_starts(page, (rep, def), base, levels, ends)?;
        let encoded = match page.coding {
            Coding::Plain => Encoded::Plain,
            Coding::Delta => Encoded::Delta,
            Coding::ByteStreamSplit => Encoded::ByteStreamSplit,
            Coding::Dictionary => Encoded::Dictionary(
                dictionary.ok_or_else(|| Error::new(ErrorKind::Internal, "dictionary was not loaded"))?,
            ),
            Coding::RowGroup => return Err(Error::new(ErrorKind::Internal, "a row group is not a page")),
        };
        let place = |error: Error| error.at(self.info.path()).at_row(page.first_row);
        if column.is_narrowed() {
            return values::decode_narrowed(encoded, values, wide, ids).map_err(place);
        }
        if values::decode(encoded, values, column.dtype.size(), ids).map_err(place)? && !column.is_field {
            let ids = Tokens::new(column.dtype, ids);
            if let Some(index) = ids.first_negative() {
                levels.read(column, rep, def, page.entries as usize)?;
                return Err(negative_id(ids.get(index)).at(self.info.path()).at_row(self.row_of(page, levels, index)));
            }
        }
        Ok(())
    }

    /// Appends the starts of a page's documents to `ends`, by the page's encoded levels. Checks the
    /// levels against the index.
    fn push_starts(
        &self,
        page: &Page,
        (rep, def): (&[u8], &[u8]),
        base: u32,
        levels: &mut Levels,
        ends: &mut Vec<u32>,
    ) -> Result<()> {
        let (column, entries, before) = (&self.column, page.entries as usize, ends.len());
        let fast = levels::push_starts(column, rep, def, entries, base, ends);
        let starts = if column.lists { page.starts as usize } else { 0 };
        if fast == Some((page.tokens as usize, starts)) {
            return Ok(());
        }
        // The page has something other than tokens, or a fault. Read all levels to find out.
        ends.truncate(before);
        levels.read(column, rep, def, entries)?;
        let counts = levels.counts;
        if let Some(index) = levels.first_null(column) {
            return Err(null_token(column).at(self.info.path()).at_row(self.row_of(page, levels, index)));
        }
        if counts.tokens != page.tokens as usize || column.lists && counts.starts != starts {
            return Err(Error::data(format!(
                "page is not what it was when the shard was opened: expected {} tokens in {} documents, found {} in {}",
                page.tokens, page.starts, counts.tokens, counts.starts
            )));
        }
        levels.push_starts(base, ends);
        Ok(())
    }

    /// Finds the document ends of a block by the levels of its pages. Row groups that arrow-rs
    /// decodes are decoded whole.
    fn ends_of_block(&self, block: usize, scratch: &mut Scratch, ends: &mut Vec<u32>) -> Result<()> {
        self.info.file.check_unchanged()?;
        let (Some(range), Some(meta)) = (self.ranges.get(block), self.info.blocks.get(block)) else {
            return Err(Error::new(ErrorKind::Internal, format!("block {block} of {}", self.info.blocks.len())));
        };
        meta.check_size(self.column.most_bytes)?;
        let pages = &self.pages[range.clone()];
        let mut reader = ForwardReader::new(&self.info.file, self.info.file.len());
        ends.clear();
        let mut base = 0;
        for page in pages {
            let Scratch { page: plain, levels, decompressor, .. } = scratch;
            if page.coding == Coding::RowGroup {
                let mut ids = vec![0; page.tokens as usize * self.column.dtype.size()];
                self.decode_row_group(page, base, &mut ids, ends)?;
            } else if self.column.lists {
                let codec = self.row_groups[page.row_group as usize].codec;
                let found = pages::level_bytes(&mut reader, &self.column, codec, page, decompressor, plain)?;
                self.push_starts(page, found, base, levels, ends)?;
            }
            base += page.tokens;
        }
        if pages.last().is_some_and(|page| page.closes) {
            ends.push(base);
        }
        if ends.len() as u64 == meta.ends { Ok(()) } else { Err(ends_differ(meta, ends)) }
    }

    fn decode_row_group(&self, page: &Page, base: u32, out: &mut [u8], ends: &mut Vec<u32>) -> Result<()> {
        let column = &self.column;
        let width = column.dtype.size();
        let decoded = fallback::read(&self.info.file, column, page.row_group as usize)?;
        if let Some(row) = decoded.null {
            return Err(null_token(column).at(self.info.path()).at_row(page.rows_before + row));
        }
        let found = decoded.bytes.len() / width;
        if found != page.tokens as usize {
            return Err(Error::data(format!(
                "row group is not what it was when the shard was opened: expected {} tokens, found {found}",
                page.tokens
            )));
        }
        let ids = Tokens::new(column.dtype, &decoded.bytes);
        if let Some(index) = ids.first_negative().filter(|_| !column.is_field) {
            let document = decoded.ends.partition_point(|&end| end as usize <= index);
            let row = decoded.rows.get(document).copied().unwrap_or(index as u64);
            return Err(negative_id(ids.get(index)).at(self.info.path()).at_row(page.rows_before + row));
        }
        if base > 0 && page.opens {
            ends.push(base);
        }
        if let Some((_, inner)) = decoded.ends.split_last() {
            ends.extend(inner.iter().map(|end| base + end));
        }
        out.copy_from_slice(&decoded.bytes);
        Ok(())
    }

    fn row_of(&self, page: &Page, levels: &Levels, index: usize) -> u64 {
        if self.column.lists {
            (page.rows_before + levels.rows_until(index)).saturating_sub(1)
        } else {
            page.rows_before + index as u64
        }
    }

    fn dictionary(
        &self,
        row_group: u32,
        decompressor: &mut Decompressor,
        plain: &mut Vec<u8>,
    ) -> Result<Arc<Dictionary>> {
        let held = self.dictionary.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((of, dictionary)) = held
            && of == row_group
        {
            return Ok(dictionary);
        }
        let RowGroup { codec, dictionary } = &self.row_groups[row_group as usize];
        let Some((body, entries)) = dictionary else {
            return Err(Error::new(ErrorKind::Internal, "row group has no dictionary"));
        };
        let mut scratch = Vec::new();
        let bytes = self.info.file.slice(body.range(), &mut scratch)?;
        check_crc(body, bytes)?;
        let bytes = if *codec == Codec::Uncompressed {
            bytes
        } else {
            decompressor.whole(*codec, bytes, body.uncompressed as usize, plain)?
        };
        let column = &self.column;
        let dictionary = match column.is_narrowed() {
            true => Dictionary::narrowed(bytes, *entries as usize),
            false => Dictionary::new(bytes, *entries as usize, column.dtype.size()),
        };
        let dictionary = Arc::new(dictionary?);
        *self.dictionary.lock().unwrap_or_else(PoisonError::into_inner) = Some((row_group, Arc::clone(&dictionary)));
        Ok(dictionary)
    }
}

/// Largest number of bytes read in one call if the file is not mapped.
const READ_RUN: u64 = 8 << 20;

fn ends_differ(meta: &BlockMeta, ends: &[u32]) -> Error {
    Error::data(format!("block is damaged: expected {} document ends, found {}", meta.ends, ends.len()))
}

fn null_token(column: &Column) -> Error {
    if column.is_field {
        return Error::data(format!("column `{}` has a null value: every value must be set", column.name));
    }
    Error::data("null token: expected lists without null elements; drop them when writing the file")
}

fn check_crc(body: &Body, bytes: &[u8]) -> Result<()> {
    match body.crc {
        Some(expected) if crc32fast::hash(bytes) != expected => {
            Err(Error::data(format!("page at byte {} is damaged: its checksum does not match", body.offset)))
        }
        _ => Ok(()),
    }
}

/// The index entry of a row group that arrow-rs decodes. `None` if the row group has no tokens.
fn whole_row_group(
    column: &Column,
    decoded: &fallback::Decoded,
    row_group: u32,
    rows_before: u64,
) -> Result<Option<Page>> {
    let tokens = decoded.bytes.len() / column.dtype.size();
    if tokens == 0 {
        return Ok(None);
    }
    let tokens = u32::try_from(tokens)
        .map_err(|_| Error::data(format!("row group {row_group} has {tokens} tokens: write smaller row groups")))?;
    Ok(Some(Page {
        body: Body { offset: 0, compressed: 0, uncompressed: 0, crc: None },
        v2: None,
        coding: Coding::RowGroup,
        row_group,
        entries: tokens,
        tokens,
        starts: decoded.ends.len() as u32,
        opens: column.lists,
        closes: column.lists,
        rows_before,
        first_row: rows_before + decoded.rows.first().copied().unwrap_or(0),
    }))
}

/// Cuts pages into runs of about `block_tokens` tokens.
fn cut(pages: &[Page], block_tokens: u64) -> Vec<Range<usize>> {
    let target = block_tokens.clamp(1, MAX_BLOCK_TOKENS / 2);
    let mut ranges = Vec::new();
    let (mut start, mut tokens) = (0, 0u64);
    for (i, page) in pages.iter().enumerate() {
        let with = tokens + u64::from(page.tokens);
        // Stop before or after this page, whichever comes nearer to the target.
        if tokens > 0 && with > target && (with - target > target.saturating_sub(tokens) || with > MAX_BLOCK_TOKENS) {
            ranges.push(start..i);
            (start, tokens) = (i, 0);
        }
        tokens += u64::from(page.tokens);
    }
    if start < pages.len() {
        ranges.push(start..pages.len());
    }
    ranges
}

fn describe_block(pages: &[Page], dtype: Dtype) -> BlockMeta {
    let (mut tokens, mut starts) = (0, 0);
    for page in pages {
        tokens += u64::from(page.tokens);
        starts += u64::from(page.starts);
    }
    // Documents follow one another, so each start ends the document before it. Only the first and
    // the last document of a block differ.
    let opens = pages.first().is_some_and(|page| page.opens);
    let closes = pages.last().is_some_and(|page| page.closes);
    let ends = starts - u64::from(opens) + u64::from(closes);
    let first = pages.iter().find(|page| page.starts > 0).or(pages.first());
    BlockMeta {
        tokens,
        starts,
        ends,
        decoded_bytes: tokens * dtype.size() as u64 + 4 * ends,
        first_row: first.map_or(0, |page| page.first_row),
    }
}

/// Smallest and largest id, if all row groups have statistics.
fn id_range(metadata: &ParquetMetaData, column: &Column) -> Option<(i64, i64)> {
    let mut range: Option<(i64, i64)> = None;
    for group in metadata.row_groups() {
        let (min, max) = match group.column(column.leaf).statistics()? {
            Statistics::Int32(values) if column.dtype.is_signed() => {
                (i64::from(*values.min_opt()?), i64::from(*values.max_opt()?))
            }
            Statistics::Int64(values) => (*values.min_opt()?, *values.max_opt()?),
            _ => return None,
        };
        range = Some(range.map_or((min, max), |(least, most)| (least.min(min), most.max(max))));
    }
    range
}

impl AnyShard for ParquetShard {
    fn info(&self) -> &ShardInfo {
        &self.info
    }

    fn info_mut(&mut self) -> &mut ShardInfo {
        &mut self.info
    }

    fn index_bytes(&self) -> u64 {
        let tables = size_of_val(self.pages.as_slice())
            + size_of_val(self.ranges.as_slice())
            + size_of_val(self.row_groups.as_slice());
        (size_of_val(self) + tables) as u64
    }

    fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        let tokens: u64 = self.info.blocks.iter().map(|block| block.tokens).sum();
        if tokens == 0 {
            return vec!["it has no tokens: leave it out".to_owned()];
        }
        let pages = self.pages.len() as u64;
        let groups = self.row_groups.len() as u64;
        let by_arrow = self.pages.iter().filter(|page| page.coding == Coding::RowGroup).count();
        if by_arrow > 0 {
            advice.push(format!(
                "{by_arrow} of {groups} row groups use encodings of the slow path: rewrite them with a current writer"
            ));
        }
        if pages >= 16 && tokens / pages < 4096 {
            advice.push(format!(
                "pages hold {} tokens on average, so that headers cost more than tokens: write pages of 1 MiB and row groups of 64 MiB or more",
                tokens / pages
            ));
        }
        if let Some(most) = self.pages.iter().map(|page| page.tokens).max()
            && most > 1 << 24
        {
            advice.push(format!(
                "a page has {most} tokens, {} decoded, and cannot be read in part: write pages of 1 MiB",
                bytes(u64::from(most) * self.column.dtype.size() as u64)
            ));
        }
        if self.row_groups.iter().any(|group| group.codec == Codec::Gzip) {
            advice.push(
                "gzip decompresses several times slower than zstd at the same size: rewrite with zstd".to_owned(),
            );
        }
        // The other codecs decompress only the levels at the beginning of a page.
        let whole = |page: &Page| page.v2.is_none() && self.row_groups[page.row_group as usize].codec == Codec::Lz4;
        if self.column.lists && self.pages.iter().any(whole) {
            advice.push(
                "data pages of version 1 with the legacy lz4 are decompressed whole at every opening: rewrite with \
                 zstd"
                    .to_owned(),
            );
        }
        if let Some(most) = self.max_id {
            let fits = if most <= i64::from(u16::MAX) { Dtype::U16 } else { Dtype::I32 };
            if most <= i64::from(i32::MAX) && fits.size() < self.info.dtype.size() {
                advice.push(format!(
                    "ids up to {most} are stored as {}: {} takes {} of {} bytes per token in memory",
                    self.info.dtype.name(),
                    fits.name(),
                    fits.size(),
                    self.info.dtype.size()
                ));
            }
        }
        advice
    }

    fn describe(&self) -> String {
        let mut parts = Vec::new();
        let kind = if self.column.lists { "list of " } else { "" };
        parts.push(format!("column `{}`, {kind}{}", escaped(&self.column.name), self.info.dtype.name()));
        let mut codecs: Vec<_> = self.row_groups.iter().map(|group| group.codec.name()).collect();
        codecs.dedup();
        codecs.truncate(3);
        parts.push(codecs.join(" and "));
        for (coding, name) in [
            (Coding::Plain, "plain"),
            (Coding::Dictionary, "dictionary"),
            (Coding::Delta, "delta"),
            (Coding::ByteStreamSplit, "byte stream split"),
            (Coding::RowGroup, "left to arrow-rs"),
        ] {
            let count = self.pages.iter().filter(|page| page.coding == coding).count();
            if count > 0 {
                let what = if coding == Coding::RowGroup { "row group" } else { "page" };
                parts.push(format!("{} {name}", number_of(count as u64, what)));
            }
        }
        let (groups, blocks) = (self.row_groups.len() as u64, self.info.blocks.len() as u64);
        parts.push(format!("{}, {}", number_of(groups, "row group"), number_of(blocks, "block")));
        parts.retain(|part| !part.is_empty());
        parts.join("; ")
    }

    fn row_lengths(&self) -> Result<Vec<Option<u64>>> {
        let mut lengths = Vec::new();
        for index in 0..self.row_groups.len() {
            lengths.extend(fallback::row_lengths(&self.info.file, &self.column, index)?);
        }
        Ok(lengths)
    }
}

impl BlockShard for ParquetShard {
    fn block_dtype(&self) -> Dtype {
        self.column.dtype
    }

    fn decode_into(&self, block: usize, limit: Option<u64>, out: &mut DecodedBlock) -> Result<()> {
        self.with_scratch(block, |scratch| self.decode_block(block, limit, scratch, out))
    }

    fn ends_into(&self, block: usize, ends: &mut Vec<u32>) -> Result<()> {
        self.with_scratch(block, |scratch| self.ends_of_block(block, scratch, ends))
    }
}

impl ParquetShard {
    /// Does `work` on block `block` with the memory of this thread.
    fn with_scratch(&self, block: usize, work: impl FnOnce(&mut Scratch) -> Result<()>) -> Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            let result = work(scratch);
            for buffer in [&mut scratch.file, &mut scratch.page, &mut scratch.wide] {
                if buffer.capacity() > KEEP_BYTES {
                    *buffer = Vec::new();
                }
            }
            result.map_err(|error| error.at(self.info.path()).in_block(block as u64))
        })
    }
}
