//! The shard of all flat formats: an array of ids in a mapped file, and the ends of its documents.

use std::ops::Range;

use super::documents::{BlockDocuments, DocumentTable};
use super::split::{self, FoundEnds, Ids};
use crate::error::{Error, Result};
use crate::format::{
    AnyShard, BlockMeta, Ends, EndsScratch, Format, MissingColumn, OpenOptions, RandomShard, Shard, ShardInfo,
    TOKEN_COLUMNS, TokenColumn, check_empty_rows,
};
use crate::storage::SourceFile;
use crate::text::{escaped, number_of};
use crate::tokens::{Dtype, Tokens};

/// The facts that a format found about a file.
pub(super) struct Contents {
    pub(super) format: Format,
    pub(super) file: SourceFile,
    /// The place of the first value in the file.
    pub(super) start: u64,
    pub(super) dtype: Dtype,
    /// Number of values.
    pub(super) tokens: u64,
    pub(super) documents: FlatDocuments,
    /// The further column beside the ids. `None` if there is none.
    pub(super) further: Option<&'static str>,
}

/// The ends of the documents of a file.
#[derive(Debug)]
pub(super) enum FlatDocuments {
    /// The file is one document. Each value counts as a row.
    One,
    /// All documents have one length.
    Fixed { length: u64, count: u64 },
    /// A table in a second file gives the ends.
    Listed(DocumentTable),
    /// An id among the ids ends each document.
    Found(FoundEnds),
}

/// A file whose values are read in place.
#[derive(Debug)]
struct FlatShard {
    info: ShardInfo,
    start: u64,
    documents: FlatDocuments,
    /// The documents of each block, if a table lists them. Otherwise the file is one block.
    blocks: Vec<BlockDocuments>,
}

/// The name under which the values of a flat file are read.
const COLUMN: &str = TOKEN_COLUMNS[0];

/// Fails if `options` ask for a column that is neither the ids nor `further`.
fn check_column(format: Format, further: Option<&str>, options: &OpenOptions) -> Result<()> {
    let Some(name) = options.token_column.as_deref() else { return Ok(()) };
    let (shown, format) = (escaped(name), format.name());
    if options.is_field {
        if further == Some(name) {
            return Ok(());
        }
        let has = further.map_or_else(|| "ids alone".to_owned(), |further| format!("ids and `{further}`"));
        let text = format!(
            "column `{shown}` of `fields` is missing: the file of format {format} has {has}; correct `fields`, or write \
             the files as Arrow or Parquet with the column"
        );
        return Err(Error::data(text).with_source(MissingColumn));
    }
    if name == COLUMN {
        return Ok(());
    }
    Err(Error::data(format!(
        "`token_column` is `{shown}`, and a file of format {format} has no columns: leave `token_column` out"
    )))
}

/// Fails unless `file` has exactly `tokens` values of `dtype` from byte `start` on. `says` names
/// the source of the number.
pub(super) fn check_size(file: &SourceFile, start: u64, dtype: Dtype, tokens: u64, says: &str) -> Result<()> {
    let expected = tokens.checked_mul(dtype.size() as u64).and_then(|bytes| bytes.checked_add(start));
    if expected == Some(file.len()) {
        return Ok(());
    }
    let found = file.len();
    let expected = expected.map_or_else(|| "more than 2^64".to_owned(), |bytes| bytes.to_string());
    Err(Error::data(format!(
        "{says} {}: expected a file of {expected} bytes, found {found}; the file is cut or damaged: write or copy it \
         again",
        number_of(tokens, &format!("{} id", dtype.name()))
    )))
}

impl Contents {
    /// Makes the shard of a file if its header fits its size.
    pub(super) fn open(self, options: &OpenOptions) -> Result<Shard> {
        let Self { format, file, start, dtype, tokens, documents, further } = self;
        check_column(format, further, options)?;
        let split = options.split.as_ref().filter(|_| !options.is_field);
        if let Some(split) = split
            && !matches!(documents, FlatDocuments::One)
        {
            split.check_known(format)?;
        }
        let one_block = |full: u64| {
            let block = BlockMeta { tokens, starts: full, ends: full, ..BlockMeta::default() };
            (if tokens > 0 { vec![block] } else { Vec::new() }, Vec::new())
        };
        let (documents, rows, (metas, blocks)) = match documents {
            FlatDocuments::One | FlatDocuments::Found(_) => match split {
                Some(split) => {
                    let (ends, metas, blocks) =
                        split::split(Ids { file: &file, start, dtype, tokens }, split, options)?;
                    let rows = metas.iter().map(|block| block.starts).sum();
                    (FlatDocuments::Found(ends), rows, (metas, blocks))
                }
                None => (FlatDocuments::One, tokens, one_block(1)),
            },
            FlatDocuments::Fixed { count, .. } => (documents, count, one_block(count)),
            FlatDocuments::Listed(ref table) => {
                let cut = table.cut(tokens, options).map_err(|error| error.at(table.index.path()))?;
                let rows = table.documents;
                (documents, rows, cut)
            }
        };
        file.advise_random();
        let column = TokenColumn::of(COLUMN, matches!(documents, FlatDocuments::One));
        let not_read = further.filter(|_| !options.is_field).map(str::to_owned).into_iter().collect();
        let info = ShardInfo { file, format, dtype, column, not_read, rows, blocks: metas };
        Ok(Shard::Random(Box::new(FlatShard { info, start, documents, blocks })))
    }
}

impl FlatShard {
    /// Offset in the file of token `token` of block `block`.
    fn byte_of(&self, block: usize, token: u64) -> u64 {
        let before = self.blocks.get(block).map_or(0, |block| block.start);
        self.start + (before + token) * self.info.dtype.size() as u64
    }
}

impl AnyShard for FlatShard {
    fn info(&self) -> &ShardInfo {
        &self.info
    }

    fn info_mut(&mut self) -> &mut ShardInfo {
        &mut self.info
    }

    fn let_go(&mut self) {
        self.info.file.let_go();
        match &mut self.documents {
            FlatDocuments::Listed(table) => table.index.let_go(),
            FlatDocuments::Found(ends) => ends.let_go(),
            FlatDocuments::One | FlatDocuments::Fixed { .. } => {}
        }
    }

    fn index_bytes(&self) -> u64 {
        let ends = if let FlatDocuments::Found(ends) = &self.documents { ends.held_bytes() } else { 0 };
        (size_of_val(self) + size_of_val(self.blocks.as_slice())) as u64 + ends
    }

    fn advice(&self) -> Vec<String> {
        match self.info.dtype {
            Dtype::I64 => {
                vec!["tokens take 8 bytes: int32 or uint16 halves or quarters the file and the reading".to_owned()]
            }
            _ => Vec::new(),
        }
    }

    fn describe(&self) -> String {
        let documents = match &self.documents {
            FlatDocuments::One => "one document".to_owned(),
            FlatDocuments::Fixed { length, .. } => format!("documents of {}", number_of(*length, "token")),
            FlatDocuments::Listed(_) => "documents listed beside it".to_owned(),
            FlatDocuments::Found(_) => "documents that `document_end_id` ends".to_owned(),
        };
        format!("{documents}, uncompressed, read in place")
    }

    fn row_lengths(&self) -> Result<Vec<Option<u64>>> {
        Ok(match &self.documents {
            FlatDocuments::One => vec![Some(1); self.info.rows as usize],
            FlatDocuments::Fixed { length, count } => {
                if *length == 0 {
                    check_empty_rows(*count)?;
                }
                vec![Some(*length); *count as usize]
            }
            FlatDocuments::Listed(table) => {
                let (mut lengths, mut last) = (Vec::new(), 0);
                for document in 0..table.documents {
                    table.ends(document..document + 1, &mut Vec::new(), |end| {
                        lengths.push(Some(end.saturating_sub(last)));
                        last = end;
                        Ok(())
                    })?;
                }
                lengths
            }
            FlatDocuments::Found(found) => {
                let (mut lengths, mut scratch) = (Vec::new(), EndsScratch::default());
                for (number, block) in self.blocks.iter().enumerate() {
                    let ends = found.ends_in(number, *block, &mut scratch)?;
                    let ends = (0..ends.len()).map(|document| ends.get(document));
                    let starts = std::iter::once(0).chain(ends.clone());
                    lengths.extend(starts.zip(ends).map(|(start, end)| Some(end - start)));
                }
                lengths
            }
        })
    }
}

impl RandomShard for FlatShard {
    fn tokens<'a>(&'a self, block: usize, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<Tokens<'a>> {
        self.info.file.check_window()?;
        let bytes = self.byte_of(block, range.start)..self.byte_of(block, range.end);
        Ok(Tokens::new(self.info.dtype, self.info.file.slice(bytes, scratch)?))
    }

    fn mapped(&self, block: usize, token: u64) -> Option<&[u8]> {
        let end = self.byte_of(block, self.info.blocks[block].tokens);
        self.info.file.mapped()?.get(self.byte_of(block, token) as usize..end as usize)
    }

    fn ends<'a>(&'a self, block: usize, scratch: &'a mut EndsScratch) -> Result<Ends<'a>> {
        let tokens = self.info.blocks[block].tokens;
        Ok(match &self.documents {
            FlatDocuments::One => Ends::Fixed { length: tokens, count: 1 },
            FlatDocuments::Fixed { length, count } => Ends::Fixed { length: *length, count: *count as usize },
            FlatDocuments::Listed(_) | FlatDocuments::Found(_) if self.info.blocks[block].ends == 1 => {
                Ends::Fixed { length: tokens, count: 1 }
            }
            FlatDocuments::Found(found) => found.ends_in(block, self.blocks[block], scratch)?,
            FlatDocuments::Listed(table) => {
                let place = |error: Error| error.at(table.index.path());
                table.index.check_window().map_err(place)?;
                scratch.list.clear();
                table.ends_in(self.blocks[block], &mut scratch.bytes, &mut scratch.list).map_err(place)?;
                Ends::List(&scratch.list)
            }
        })
    }

    fn will_need(&self, block: usize, range: Range<u64>) {
        self.info.file.will_need(self.byte_of(block, range.start)..self.byte_of(block, range.end));
    }

    fn is_resident(&self, block: usize, range: Range<u64>) -> bool {
        self.info.file.is_resident(self.byte_of(block, range.start))
    }

    fn row_of(&self, block: usize, token: u64) -> Option<u64> {
        match &self.documents {
            FlatDocuments::One => Some(token),
            FlatDocuments::Fixed { length, .. } => Some(token / (*length).max(1)),
            FlatDocuments::Listed(table) => {
                let BlockDocuments { first, count, start } = *self.blocks.get(block)?;
                let mut before = 0;
                let ends = table.ends(first..first + count, &mut Vec::new(), |end| {
                    before += u64::from(end <= start + token);
                    Ok(())
                });
                ends.ok().map(|()| first + before)
            }
            FlatDocuments::Found(_) => {
                let mut scratch = EndsScratch::default();
                let ends = self.ends(block, &mut scratch).ok()?;
                let before = (0..ends.len()).filter(|document| ends.get(*document) <= token).count();
                Some(self.blocks.get(block)?.first + before as u64)
            }
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
