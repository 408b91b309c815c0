//! Shards: one file each, opened, described by blocks, and read.
//!
//! A shard knows its blocks from metadata alone: how many tokens each holds and how many non-empty documents start
//! and end in it. Its content decides how it is read (see [`Shard`]): windows straight from the file, or whole blocks
//! decoded into memory. [`FORMATS`] lists the formats. Nothing here knows of layouts, orders or batches.

pub mod arrow;
mod columns;
pub mod parquet;

use std::collections::TryReserveError;
use std::fmt;
use std::ops::Range;
use std::path::Path;

pub(crate) use self::columns::{Holds, MissingColumn, choose_column, column_title, null_list};
pub use self::columns::{TOKEN_COLUMNS, TokenColumn, looks_like};
use crate::error::{Error, Result};
use crate::settings::{Config, DataFormat, Io};
use crate::storage::{Files, Reads, SourceFile, Stamp};
use crate::sync::Cancel;
use crate::tokens::{Dtype, FieldTypes, Tokens};

/// Container format of a shard: a row of [`FORMATS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Apache Parquet.
    Parquet,
    /// Arrow IPC file (random access, magic `ARROW1`).
    ArrowFile,
    /// Arrow IPC stream, which `datasets.save_to_disk` writes.
    ArrowStream,
}

/// Every format that shards may have, in the order in which a file's content is compared with them.
///
/// Discovery, the setting `format`, opening, the saved index and the messages read this table. A saved index stores
/// positions in it, so a new format goes to the end or raises the version of the index.
pub static FORMATS: [FormatEntry; 3] = [
    FormatEntry {
        format: Format::Parquet,
        name: "parquet",
        family: DataFormat::Parquet,
        suffixes: &["parquet", "pq"],
        begins: "`PAR1`",
        recognise: parquet::recognise,
        open: |reads, options| parquet::open(reads.into_file(), options),
    },
    FormatEntry {
        format: Format::ArrowFile,
        name: "arrow file",
        family: DataFormat::Arrow,
        suffixes: &["arrow", "feather", "ipc"],
        begins: "`ARROW1`",
        recognise: arrow::recognise_file,
        open: |reads, options| arrow::open(reads, Format::ArrowFile, options),
    },
    FormatEntry {
        format: Format::ArrowStream,
        name: "arrow stream",
        family: DataFormat::Arrow,
        suffixes: &["arrow", "arrows"],
        begins: "an Arrow stream marker",
        recognise: arrow::recognise_stream,
        open: |reads, options| arrow::open(reads, Format::ArrowStream, options),
    },
];

/// What the core has to know of a format.
#[derive(Debug)]
pub struct FormatEntry {
    /// The format that this row describes.
    pub format: Format,
    /// Name shown to users.
    pub name: &'static str,
    /// Formats of one family may be mixed in one corpus. The setting `format` names a family.
    pub family: DataFormat,
    /// Suffixes of the files that a search of a folder takes.
    pub suffixes: &'static [&'static str],
    /// The bytes that a file begins with, for messages.
    begins: &'static str,
    /// Tells whether a file has this format. The file's name says nothing.
    recognise: fn(&Sample<'_>) -> Recognised,
    /// Opens a file whose content is known to have this format.
    open: fn(Reads, &OpenOptions) -> Result<Shard>,
}

/// The beginning and the end of a file, from which its format is recognised.
#[derive(Debug)]
pub(crate) struct Sample<'a> {
    /// Bytes of the file.
    pub(crate) len: u64,
    /// Its first 8 bytes, or all of a shorter file.
    pub(crate) head: &'a [u8],
    /// Its last 6 bytes, or all of a shorter file.
    pub(crate) tail: &'a [u8],
}

/// What a format says of a file.
#[derive(Debug)]
pub(crate) enum Recognised {
    /// The file has another format.
    No,
    /// The file has this format.
    Yes,
    /// The file has this format and cannot be read, for the reason given.
    Refused(&'static str),
}

impl Format {
    /// Its row in the table.
    pub fn entry(self) -> &'static FormatEntry {
        FORMATS.iter().find(|entry| entry.format == self).expect("the table has every format")
    }

    /// Name shown to users.
    pub fn name(self) -> &'static str {
        self.entry().name
    }

    /// The family of formats that may be mixed in one corpus.
    pub fn family(self) -> DataFormat {
        self.entry().family
    }
}

/// Suffixes of the files that a search of a folder takes if the setting `format` is `wanted`.
pub fn suffixes(wanted: DataFormat) -> Vec<&'static str> {
    let mut suffixes = Vec::new();
    for entry in &FORMATS {
        if wanted == DataFormat::Auto || wanted == entry.family {
            let new = entry.suffixes.iter().filter(|suffix| !suffixes.contains(*suffix)).copied();
            suffixes.extend(new.collect::<Vec<_>>());
        }
    }
    suffixes
}

/// How the tokens of a shard can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Any window of tokens lies in the file as it is: [`RandomShard`].
    Random,
    /// A block has to be decoded first: [`BlockShard`].
    Block,
}

/// What metadata says of one block.
///
/// A document may span blocks, so starts and ends are counted apart; empty and null documents count in neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockMeta {
    /// Tokens in the block.
    pub tokens: u64,
    /// Non-empty documents whose first token is in the block.
    pub starts: u64,
    /// Non-empty documents whose last token is in the block.
    pub ends: u64,
    /// Bytes the decoded block takes in memory; 0 where nothing is decoded.
    pub decoded_bytes: u64,
    /// Shard row of the first document that starts in the block, where known; for error messages.
    pub first_row: u64,
}

impl BlockMeta {
    /// Its part of the counts of its shard.
    pub fn counts(&self) -> Counts {
        Counts { tokens: self.tokens, starts: self.starts, ends: self.ends }
    }
}

/// Tokens, and the non-empty documents that start and end among them. A shard has as many starts as ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens.
    pub tokens: u64,
    /// Non-empty documents whose first token is among them.
    pub starts: u64,
    /// Non-empty documents whose last token is among them.
    pub ends: u64,
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { tokens: self.tokens + other.tokens, starts: self.starts + other.starts, ends: self.ends + other.ends }
    }
}

impl std::iter::Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), std::ops::Add::add)
    }
}

/// What is known of a shard without its blocks: enough to place it in a corpus before it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardFacts {
    /// Size and modification time of the file.
    pub stamp: Stamp,
    /// Its container format.
    pub format: Format,
    /// Type of its token ids.
    pub dtype: Dtype,
    /// Column that holds its tokens.
    pub column: TokenColumn,
    /// How its tokens are reached.
    pub access: Access,
    /// Rows, empty and null ones included.
    pub rows: u64,
    /// Blocks that hold tokens.
    pub blocks: u64,
    /// Tokens and documents.
    pub counts: Counts,
    /// Bytes that all its blocks take when decoded; 0 where nothing is decoded.
    pub decoded_bytes: u64,
    /// Bytes that the largest of them takes.
    pub largest_block_bytes: u64,
    /// Types of the further columns.
    pub fields: FieldTypes,
}

/// Where the non-empty documents of a block end: strictly increasing token offsets from the block's start.
///
/// The last document of the block is listed only if it ends there.
#[derive(Clone, Copy, Debug)]
pub enum Ends<'a> {
    /// One offset per document.
    List(&'a [u32]),
    /// Arrow list offsets, little-endian, of `width` 4 or 8 bytes; the first value is the base of the rest.
    Offsets {
        /// `documents + 1` offsets.
        bytes: &'a [u8],
        /// Bytes of one offset.
        width: usize,
    },
    /// Documents of one length.
    Fixed {
        /// Tokens of each.
        length: u64,
        /// How many.
        count: usize,
    },
}

impl Ends<'_> {
    /// How many documents end in the block.
    pub fn len(&self) -> usize {
        match *self {
            Self::List(list) => list.len(),
            Self::Offsets { bytes, width } => (bytes.len() / width).saturating_sub(1),
            Self::Fixed { count, .. } => count,
        }
    }

    /// Whether none does.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Token offset, from the block's start, just after document `index`.
    ///
    /// # Panics
    /// When `index` is not below [`Ends::len`].
    pub fn get(&self, index: usize) -> u64 {
        match *self {
            Self::List(list) => u64::from(list[index]),
            Self::Offsets { bytes, width } => offset_at(bytes, width, index + 1) - offset_at(bytes, width, 0),
            Self::Fixed { length, count } => {
                assert!(index < count, "document {index} of {count}");
                length * (index as u64 + 1)
            }
        }
    }
}

fn offset_at(bytes: &[u8], width: usize, index: usize) -> u64 {
    let at = &bytes[index * width..(index + 1) * width];
    // Offsets were checked to be non-negative when the shard was opened.
    match width {
        4 => u64::from(u32::from_le_bytes([at[0], at[1], at[2], at[3]])),
        _ => u64::from_le_bytes([at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]]),
    }
}

/// A block in memory, in the width of [`BlockShard::block_dtype`].
#[derive(Debug, Default)]
pub struct DecodedBlock {
    /// Little-endian token ids.
    pub bytes: Vec<u8>,
    /// As [`Ends::List`].
    pub ends: Vec<u32>,
    /// Whether this holds the whole block, or only the prefix that was asked for.
    pub complete: bool,
    /// How its Parquet pages were decoded.
    pub pages: DecodedPages,
}

impl DecodedBlock {
    /// Makes room for `bytes` of ids, which hold anything, and for `ends`, of which there are none.
    fn reset(&mut self, bytes: usize, ends: usize) -> std::result::Result<(), TryReserveError> {
        self.pages = DecodedPages::default();
        self.ends.clear();
        self.ends.try_reserve_exact(ends)?;
        if bytes > self.bytes.capacity() {
            // Not to be copied to where there is room.
            self.bytes.clear();
            self.bytes.try_reserve_exact(bytes)?;
        }
        self.bytes.resize(bytes, 0);
        Ok(())
    }

    /// Where the documents of the block end.
    pub fn document_ends(&self) -> Ends<'_> {
        Ends::List(&self.ends)
    }

    /// Bytes of memory it takes.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        (self.bytes.capacity() + 4 * self.ends.capacity()) as u64
    }
}

/// Parquet data pages by the decoder that took them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodedPages {
    /// PLAIN.
    pub plain: u64,
    /// Indices of a dictionary.
    pub dictionary: u64,
    /// DELTA_BINARY_PACKED.
    pub delta: u64,
    /// BYTE_STREAM_SPLIT.
    pub byte_stream_split: u64,
    /// Not pages but row groups, which hold something unfamiliar and were left to arrow-rs.
    pub row_groups_by_arrow: u64,
}

/// What every opened file tells of itself, whichever way it is read. It does not change after opening.
#[derive(Debug)]
pub struct ShardInfo {
    /// The opened file.
    pub file: SourceFile,
    /// Its container format.
    pub format: Format,
    /// Type of its token ids.
    pub dtype: Dtype,
    /// Column that holds its tokens.
    pub column: TokenColumn,
    /// Names of the other columns, which no loader reads.
    pub not_read: Vec<String>,
    /// Rows of the file, empty and null ones included.
    pub rows: u64,
    /// Its blocks in file order. Blocks without tokens are left out.
    pub blocks: Vec<BlockMeta>,
}

impl ShardInfo {
    /// The path that the file was opened by.
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

/// The part that both kinds of shards have. Implementations are immutable after opening; all threads share them.
pub trait AnyShard: Send + Sync + fmt::Debug {
    /// What is known of the file.
    fn info(&self) -> &ShardInfo;

    /// Its blocks in file order. Blocks without tokens are left out.
    fn blocks(&self) -> &[BlockMeta] {
        &self.info().blocks
    }

    /// The same as [`AnyShard::info`], to be changed while the shard is not shared yet.
    fn info_mut(&mut self) -> &mut ShardInfo;

    /// Bytes of the tables that it keeps in memory to find its tokens, without [`ShardInfo::blocks`].
    fn index_bytes(&self) -> u64;

    /// One line per property that makes the file slow to read, with the remedy; for `forebay check`.
    fn advice(&self) -> Vec<String>;

    /// Column, encodings and codec; for `forebay check`.
    fn describe(&self) -> String;

    /// Values of each row of the column, empty rows included; none where the row is null.
    ///
    /// Reads the whole column: for messages about columns that do not fit each other.
    fn row_lengths(&self) -> Result<Vec<Option<u64>>>;
}

/// A shard whose windows lie in the file as they are.
pub trait RandomShard: AnyShard {
    /// The ids of `range` (token offsets in block `block`), borrowed from the mapping, or read into `scratch`.
    fn tokens<'a>(&'a self, block: usize, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<Tokens<'a>>;

    /// The bytes from token `token` of block `block` on, if they are mapped.
    fn mapped(&self, block: usize, token: u64) -> Option<&[u8]>;

    /// Document ends of block `block`, borrowed from the mapping where possible, or built in `scratch`.
    fn ends<'a>(&'a self, block: usize, scratch: &'a mut EndsScratch) -> Result<Ends<'a>>;

    /// Asks the operating system to read the window ahead of its use. Never fails; may do nothing.
    fn will_need(&self, block: usize, range: Range<u64>);

    /// Tells whether the first page of the window is in memory already. A guess: the page may leave at any time.
    fn is_resident(&self, block: usize, range: Range<u64>) -> bool;

    /// The row of the shard that token `token` of block `block` is in, for the text of an error.
    fn row_of(&self, block: usize, token: u64) -> Option<u64>;
}

/// A shard whose blocks have to be decoded before their tokens can be used.
pub trait BlockShard: AnyShard {
    /// Type of the ids in a decoded block: the type of the file's ids, or a smaller one that holds all of them.
    fn block_dtype(&self) -> Dtype;

    /// Decodes block `block`, or at least its first `limit` tokens, into `out`, whose memory is used again.
    ///
    /// The block is checked against its [`BlockMeta`]. Negative ids, null tokens and counts that differ from the index
    /// are errors with path, block and row. After an error `out` holds anything.
    fn decode_into(&self, block: usize, limit: Option<u64>, out: &mut DecodedBlock) -> Result<()>;

    /// Decodes as [`BlockShard::decode_into`] does, into new memory.
    fn decode(&self, block: usize, limit: Option<u64>) -> Result<DecodedBlock> {
        let mut out = DecodedBlock::default();
        self.decode_into(block, limit, &mut out)?;
        Ok(out)
    }
}

/// One opened file. Its content alone decides how it is read, never the place where it lies.
#[derive(Debug)]
pub enum Shard {
    /// Its windows are read straight from the file.
    Random(Box<dyn RandomShard>),
    /// Its blocks are decoded.
    Block(Box<dyn BlockShard>),
}

impl Shard {
    fn any(&self) -> &dyn AnyShard {
        match self {
            Self::Random(shard) => shard.as_ref(),
            Self::Block(shard) => shard.as_ref(),
        }
    }

    /// What is known of the file, however it is read.
    pub fn info(&self) -> &ShardInfo {
        match self {
            Self::Random(shard) => shard.info(),
            Self::Block(shard) => shard.info(),
        }
    }

    /// The path that the file was opened by.
    pub fn path(&self) -> &Path {
        self.info().path()
    }

    /// Its blocks in file order. Blocks without tokens are left out.
    pub fn blocks(&self) -> &[BlockMeta] {
        &self.info().blocks
    }

    /// How its tokens are reached.
    pub fn access(&self) -> Access {
        match self {
            Self::Random(_) => Access::Random,
            Self::Block(_) => Access::Block,
        }
    }

    /// Closes the file until its next use, which fails if the file changed meanwhile.
    pub fn let_go(&mut self) {
        let info = match self {
            Self::Random(shard) => shard.info_mut(),
            Self::Block(shard) => shard.info_mut(),
        };
        info.file.let_go();
    }

    /// Fails if the file is no longer the one that was opened (size or modification time).
    pub fn check_unchanged(&self) -> Result<()> {
        self.info().file.check_unchanged()
    }

    /// What is known of it without its blocks.
    pub fn facts(&self) -> ShardFacts {
        let ShardInfo { file, format, dtype, column, rows, blocks, .. } = self.info();
        ShardFacts {
            stamp: file.stamp(),
            format: *format,
            dtype: *dtype,
            column: *column,
            access: self.access(),
            rows: *rows,
            blocks: blocks.len() as u64,
            counts: blocks.iter().map(BlockMeta::counts).sum(),
            decoded_bytes: blocks.iter().map(|block| block.decoded_bytes).sum(),
            largest_block_bytes: blocks.iter().map(|block| block.decoded_bytes).max().unwrap_or(0),
            fields: FieldTypes::default(),
        }
    }

    /// Bytes of the tables that it keeps in memory to find its tokens.
    pub fn index_bytes(&self) -> u64 {
        self.any().index_bytes() + size_of_val(self.blocks()) as u64
    }

    /// Values of each row of the column, empty rows included; none where the row is null. Reads the whole column.
    pub fn row_lengths(&self) -> Result<Vec<Option<u64>>> {
        self.any().row_lengths()
    }

    /// One line per property that makes the file slow to read, with the remedy; for `forebay check`.
    pub fn advice(&self) -> Vec<String> {
        self.any().advice()
    }

    /// Column, encodings and codec; for `forebay check`.
    pub fn describe(&self) -> String {
        self.any().describe()
    }
}

/// Reused memory for [`RandomShard::ends`].
#[derive(Debug, Default)]
pub struct EndsScratch {
    /// Offsets as read.
    pub bytes: Vec<u8>,
    /// Ends without empty documents.
    pub list: Vec<u32>,
}

/// What opening a shard has to know.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Token column; `None` takes the first of [`TOKEN_COLUMNS`] that is there.
    pub token_column: Option<String>,
    /// Further per-token columns of the same files.
    pub fields: Vec<String>,
    /// Whether a file may lack some of `fields`.
    pub fields_may_be_missing: bool,
    /// Whether `token_column` is one of the further columns. It may then have any type of a field and
    /// negative values, and no list of it may be null.
    pub is_field: bool,
    /// How file bytes are reached.
    pub io: Io,
    /// Tokens near which blocks are cut.
    pub block_tokens: u64,
    /// Stops the opening of a corpus between two shards.
    pub cancel: Cancel,
    /// The files to open.
    pub files: Files,
}

impl OpenOptions {
    /// What `config` says of it.
    pub fn of(config: &Config) -> Self {
        Self {
            token_column: config.token_column.clone(),
            fields: config.fields.clone(),
            fields_may_be_missing: config.mixture.is_some(),
            is_field: false,
            io: config.io,
            block_tokens: config.block_tokens,
            cancel: Cancel::default(),
            files: Files::local(),
        }
    }
}

impl OpenOptions {
    /// The options to open the further column `name` of the same files.
    pub fn of_field(&self, name: &str) -> Self {
        Self { token_column: Some(name.to_owned()), fields: Vec::new(), is_field: true, ..self.clone() }
    }
}

/// Opens the file at `path`, whose format is recognised by its content.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Shard> {
    let source = options.files.open(path, options.io)?;
    let open = |mut reads| (recognise(&mut reads)?.open)(reads, options);
    open(Reads::new(source)).map_err(|error| error.at(path))
}

/// The row of the format that a file has by its first and last bytes.
fn recognise(reads: &mut Reads) -> Result<&'static FormatEntry> {
    let len = reads.file().len();
    let mut head = [0; 8];
    let head = &mut head[..len.min(8) as usize];
    head.copy_from_slice(reads.get(0..head.len() as u64)?);
    let sample = Sample { len, head, tail: reads.last(6.min(len))? };
    for entry in &FORMATS {
        match (entry.recognise)(&sample) {
            Recognised::Yes => return Ok(entry),
            Recognised::Refused(why) => return Err(Error::data(why)),
            Recognised::No => {}
        }
    }
    let [begins @ .., last] = FORMATS.each_ref().map(|entry| entry.begins);
    Err(Error::data(format!(
        "not a file of a known format: expected it to begin with {} or {last}, found {:02x?}; {}",
        begins.join(", "),
        sample.head,
        remedy(sample.head)
    )))
}

/// What to do with a file of no known format that begins with `head`.
fn remedy(head: &[u8]) -> &'static str {
    match head {
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => {
            "it is a NumPy array: write the ids to an Arrow or Parquet file, such as with pyarrow"
        }
        [b'P', b'K', 3 | 5, ..] => "it is a zip archive: unpack it",
        [0x1f, 0x8b, ..]
        | [0x28, 0xb5, 0x2f, 0xfd, ..]
        | [b'B', b'Z', b'h', ..]
        | [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is compressed as a whole: decompress it",
        [b'{' | b'[', ..] => "it looks like JSON: tokenize it first, and write the ids to an Arrow or Parquet file",
        _ => {
            "a raw file of ids does not say their `dtype`: write the ids to an Arrow or Parquet file, such as with pyarrow"
        }
    }
}
