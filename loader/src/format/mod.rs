//! Opens shards, describes them by blocks, and reads them. A shard is one file.
//!
//! A shard knows its blocks from metadata alone: the tokens of each block, and the non-empty
//! documents that start and end in it. The content of the file decides how it is read (see
//! [`Shard`]). Either windows are read straight from the file, or whole blocks are decoded into
//! memory.
//!
//! [`FORMATS`] lists the formats. This room knows nothing of layouts, orders or batches.

pub mod arrow;
mod columns;
pub mod documents;
mod flat {
    //! Flat files of ids: one array of values, with or without a header before it.
    //!
    //! Each format has a module that recognises it and reads its header or its index. All formats
    //! share [`shard::FlatShard`], which borrows windows from the mapping like uncompressed Arrow.
    //! Opening reads headers and indexes, but no ids. A header that does not fit the size of its
    //! file is an error.

    pub(super) mod datatrove;
    mod documents;
    pub(super) mod llmc;
    pub(super) mod megatron;
    pub(super) mod npy;
    pub(super) mod raw;
    mod shard;
    mod split;

    use shard::{Contents, FlatDocuments, check_size};
    pub use split::SplitOptions;
}
pub mod parquet;

use std::collections::TryReserveError;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(crate) use self::columns::{Holds, MissingColumn, choose_column, column_title, null_list};
pub use self::columns::{PLACES, STARTS_OF_DOCUMENTS, TOKEN_COLUMNS, TokenColumn, looks_like};
pub use self::flat::SplitOptions;
use crate::error::{Error, Result};
use crate::settings::{Config, DataFormat, Io, PackedBy};
use crate::storage::{Files, Reads, SourceFile, Stamp};
use crate::sync::Cancel;
use crate::tokens::{Dtype, FieldTypes, Tokens};

/// Container format of a shard. [`FORMATS`] has a row for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Apache Parquet.
    Parquet,
    /// Arrow IPC file (random access, magic `ARROW1`).
    ArrowFile,
    /// Arrow IPC stream, which `datasets.save_to_disk` writes.
    ArrowStream,
    /// NumPy array (`.npy`).
    Npy,
    /// File of llm.c: a header and ids (`.bin`).
    LlmC,
    /// Pair of Megatron: ids (`.bin`) and index (`.idx`).
    Megatron,
    /// Ids of datatrove (`.ds`) with the index beside them.
    Datatrove,
    /// Ids without a header (`.bin`), whose type the user names.
    Raw,
}

/// The formats of shards, in the order in which a file's content is compared with them.
///
/// Discovery, the setting `format`, opening, the saved index and the messages read this table. A
/// saved index stores positions in it. So a new format goes to the end, or raises the version of
/// the index.
pub static FORMATS: [FormatEntry; 8] = [
    // These two are known by the file beside them, whatever the ids look like.
    FormatEntry {
        format: Format::Megatron,
        name: "megatron",
        family: DataFormat::Megatron,
        suffixes: &["bin"],
        beside: &["idx"],
        has_lengths: true,
        begins: None,
        recognise: flat::megatron::recognise,
        open: flat::megatron::open,
    },
    FormatEntry {
        format: Format::Datatrove,
        name: "datatrove",
        family: DataFormat::Datatrove,
        suffixes: &["ds"],
        beside: &["ds.index", "ds.loss", "ds.metadata"],
        has_lengths: true,
        begins: None,
        recognise: flat::datatrove::recognise,
        open: flat::datatrove::open,
    },
    FormatEntry {
        format: Format::Parquet,
        name: "parquet",
        family: DataFormat::Parquet,
        suffixes: &["parquet", "pq"],
        beside: &[],
        has_lengths: true,
        begins: Some("`PAR1`"),
        recognise: parquet::recognise,
        open: |reads, options| parquet::open(reads.into_file(), options),
    },
    FormatEntry {
        format: Format::ArrowFile,
        name: "arrow file",
        family: DataFormat::Arrow,
        suffixes: &["arrow", "feather", "ipc"],
        beside: &[],
        has_lengths: true,
        begins: Some("`ARROW1`"),
        recognise: arrow::recognise_file,
        open: |reads, options| arrow::open(reads, Format::ArrowFile, options),
    },
    FormatEntry {
        format: Format::Npy,
        name: "npy",
        family: DataFormat::Npy,
        suffixes: &["npy"],
        beside: &[],
        has_lengths: false,
        begins: Some("`\\x93NUMPY`"),
        recognise: flat::npy::recognise,
        open: flat::npy::open,
    },
    FormatEntry {
        format: Format::LlmC,
        name: "llm.c",
        family: DataFormat::LlmC,
        suffixes: &["bin"],
        beside: &[],
        has_lengths: false,
        begins: Some("a magic number of llm.c"),
        recognise: flat::llmc::recognise,
        open: flat::llmc::open,
    },
    // Old Arrow streams begin with a length, as raw ids may.
    FormatEntry {
        format: Format::Raw,
        name: "raw",
        family: DataFormat::Raw,
        suffixes: &["bin"],
        beside: &[],
        has_lengths: false,
        begins: None,
        recognise: flat::raw::recognise,
        open: flat::raw::open,
    },
    FormatEntry {
        format: Format::ArrowStream,
        name: "arrow stream",
        family: DataFormat::Arrow,
        suffixes: &["arrow", "arrows"],
        beside: &[],
        has_lengths: true,
        begins: Some("an Arrow stream marker"),
        recognise: arrow::recognise_stream,
        open: |reads, options| arrow::open(reads, Format::ArrowStream, options),
    },
];

/// The facts about a format that the core needs.
#[derive(Debug)]
pub struct FormatEntry {
    /// The format that this row describes.
    pub format: Format,
    /// Name shown to users.
    pub name: &'static str,
    /// The family of the format. Formats of one family may be mixed in one corpus. The setting
    /// `format` names a family.
    pub family: DataFormat,
    /// Suffixes of the files that a search of a folder takes.
    pub suffixes: &'static [&'static str],
    /// Suffixes of companion files. Such a file has the name of the file with the ids, but another
    /// suffix.
    pub beside: &'static [&'static str],
    /// Whether every file of the format says where its documents end.
    pub has_lengths: bool,
    /// The bytes that a file begins with, as text for messages. None if ids are its first bytes.
    begins: Option<&'static str>,
    /// Tells whether a file has this format. The name of the file is not used.
    recognise: fn(&FileSample<'_>) -> Recognised,
    /// Opens a file whose content is known to have this format.
    open: fn(Reads, &OpenOptions) -> Result<Shard>,
}

/// The beginning and the end of a file, from which its format is recognised.
#[derive(Debug)]
pub(crate) struct FileSample<'a> {
    /// Size of the file, in bytes.
    pub(crate) len: u64,
    /// The first 8 bytes, or all bytes of a shorter file.
    pub(crate) head: &'a [u8],
    /// The last 6 bytes, or all bytes of a shorter file.
    pub(crate) tail: &'a [u8],
    /// Where the file is. Some formats look for another file beside it.
    pub(crate) path: &'a Path,
    /// How the file is opened.
    pub(crate) options: &'a OpenOptions,
}

impl FileSample<'_> {
    /// Whether the name of the file ends in `.` and `suffix`.
    fn ends_in(&self, suffix: &str) -> bool {
        self.path.extension().is_some_and(|found| found.eq_ignore_ascii_case(suffix))
    }
}

/// The answer of a format about a file.
#[derive(Debug)]
pub(crate) enum Recognised {
    /// The file has another format.
    No,
    /// The file has this format.
    Yes,
    /// The file has this format, but cannot be read for the given reason.
    Refused(Error),
}

impl Format {
    /// The row of the format in the table.
    pub fn entry(self) -> &'static FormatEntry {
        FORMATS.iter().find(|entry| entry.format == self).expect("the table has every format")
    }

    /// Name shown to users.
    pub fn name(self) -> &'static str {
        self.entry().name
    }

    /// The family of the format. Formats of one family may be mixed in one corpus.
    pub fn family(self) -> DataFormat {
        self.entry().family
    }
}

/// Suffixes of the files that a search of a folder takes under the setting `format`.
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

/// The way to read the tokens of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// The file holds any window of tokens as it is: [`RandomShard`].
    Random,
    /// A block must be decoded first: [`BlockShard`].
    Block,
}

/// The facts about one block that metadata gives.
///
/// A document may span blocks, so starts and ends are counted separately. Empty and null documents
/// count in neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockMeta {
    /// Number of tokens in the block.
    pub tokens: u64,
    /// Number of non-empty documents whose first token is in the block.
    pub starts: u64,
    /// Number of non-empty documents whose last token is in the block.
    pub ends: u64,
    /// Bytes of the decoded block in memory. 0 if nothing is decoded.
    pub decoded_bytes: u64,
    /// Row of the first document that starts in the block, if known. Error messages use it.
    pub first_row: u64,
}

/// Most rows without any stored byte whose lengths are listed.
const MOST_EMPTY_ROWS: u64 = 1 << 24;

/// Fails if a list of `rows` rows that take no bytes of a file would be long. A damaged file may
/// claim any number of such rows.
fn check_empty_rows(rows: u64) -> Result<()> {
    if rows > MOST_EMPTY_ROWS {
        return Err(Error::data(format!("it claims {rows} rows that have no values: leave the file out")));
    }
    Ok(())
}

impl BlockMeta {
    /// Fails if the decoded block takes more than `most_bytes` bytes. Its numbers may be claims of
    /// a damaged file, so a format asks before it makes room.
    fn check_size(&self, most_bytes: u64) -> Result<()> {
        if self.decoded_bytes > most_bytes {
            return Err(Error::data(format!(
                "it holds {} tokens, which take {} bytes when decoded, more than `memory_budget` = {most_bytes}: raise \
                 it, or write smaller row groups, pages or record batches",
                self.tokens, self.decoded_bytes
            )));
        }
        Ok(())
    }

    /// The counts that the block adds to its shard.
    pub fn counts(&self) -> Counts {
        Counts { tokens: self.tokens, starts: self.starts, ends: self.ends }
    }
}

/// A number of tokens, and the non-empty documents that start and end among them.
///
/// A shard has as many starts as ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Number of tokens.
    pub tokens: u64,
    /// Number of non-empty documents whose first token is counted.
    pub starts: u64,
    /// Number of non-empty documents whose last token is counted.
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

/// The facts about a shard without its blocks. They are enough to place it in a corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardFacts {
    /// Size and modification time of the file.
    pub stamp: Stamp,
    /// Container format of the file.
    pub format: Format,
    /// Type of the token ids.
    pub dtype: Dtype,
    /// Column with the tokens.
    pub column: TokenColumn,
    /// The way to read the tokens.
    pub access: Access,
    /// Number of rows. Empty and null rows count.
    pub rows: u64,
    /// Number of blocks with tokens.
    pub blocks: u64,
    /// Number of tokens and documents.
    pub counts: Counts,
    /// Bytes of all blocks when decoded. 0 if nothing is decoded.
    pub decoded_bytes: u64,
    /// Bytes of the largest block when decoded. 0 if nothing is decoded.
    pub largest_block_bytes: u64,
    /// Types of the further columns.
    pub fields: FieldTypes,
}

/// The ends of the non-empty documents of a block, as token offsets from the start of the block.
///
/// The offsets increase strictly. The last document of the block is listed only if it ends there.
#[derive(Clone, Copy, Debug)]
pub enum Ends<'a> {
    /// A list with one offset per document.
    List(&'a [u32]),
    /// Little-endian list offsets of Arrow. The first value is the base of the others.
    Offsets {
        /// `documents + 1` offsets.
        bytes: &'a [u8],
        /// Size of one offset in bytes: 4 or 8.
        width: usize,
    },
    /// Documents of equal length.
    Fixed {
        /// Number of tokens of each document.
        length: u64,
        /// Number of documents.
        count: usize,
    },
}

impl Ends<'_> {
    /// Number of documents that end in the block.
    pub fn len(&self) -> usize {
        match *self {
            Self::List(list) => list.len(),
            Self::Offsets { bytes, width } => (bytes.len() / width).saturating_sub(1),
            Self::Fixed { count, .. } => count,
        }
    }

    /// Whether no document ends in the block.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The token offset just after document `index`, from the start of the block.
    ///
    /// # Panics
    /// Panics if `index` is not below [`Ends::len`].
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
    // Opening the shard checked that no offset is negative.
    match width {
        4 => u64::from(u32::from_le_bytes([at[0], at[1], at[2], at[3]])),
        _ => u64::from_le_bytes([at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]]),
    }
}

/// A block in memory. Its ids have the type [`BlockShard::block_dtype`].
#[derive(Debug, Default)]
pub struct DecodedBlock {
    /// Token ids, little-endian.
    pub bytes: Vec<u8>,
    /// Ends of the documents, as in [`Ends::List`].
    pub ends: Vec<u32>,
    /// Whether the whole block is here, or only the prefix that was asked for.
    pub complete: bool,
    /// The decoders of the block's Parquet pages.
    pub pages: DecodedPages,
}

impl DecodedBlock {
    /// Makes room for `bytes` bytes of ids with any content, and for `ends` ends. Removes all ends.
    fn reset(&mut self, bytes: usize, ends: usize) -> std::result::Result<(), TryReserveError> {
        self.pages = DecodedPages::default();
        self.ends.clear();
        self.ends.try_reserve_exact(ends)?;
        if bytes > self.bytes.capacity() {
            // A vector without elements is not copied when it grows.
            self.bytes.clear();
            self.bytes.try_reserve_exact(bytes)?;
        }
        self.bytes.resize(bytes, 0);
        Ok(())
    }

    /// The ends of the documents of the block.
    pub fn document_ends(&self) -> Ends<'_> {
        Ends::List(&self.ends)
    }

    /// Bytes of memory that the block takes.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        (self.bytes.capacity() + 4 * self.ends.capacity()) as u64
    }
}

/// Numbers of Parquet data pages, by the decoder that took them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodedPages {
    /// Pages in PLAIN encoding.
    pub plain: u64,
    /// Pages with indices into a dictionary.
    pub dictionary: u64,
    /// Pages in DELTA_BINARY_PACKED encoding.
    pub delta: u64,
    /// Pages in BYTE_STREAM_SPLIT encoding.
    pub byte_stream_split: u64,
    /// Row groups, not pages, that arrow-rs decoded because they hold something unfamiliar.
    pub row_groups_by_arrow: u64,
}

/// The facts about an opened file. They do not change after opening.
#[derive(Debug)]
pub struct ShardInfo {
    /// The opened file.
    pub file: SourceFile,
    /// Container format of the file.
    pub format: Format,
    /// Type of the token ids.
    pub dtype: Dtype,
    /// Column with the tokens.
    pub column: TokenColumn,
    /// Names of the other columns, which are not read.
    pub not_read: Vec<String>,
    /// Number of rows of the file. Empty and null rows count.
    pub rows: u64,
    /// The blocks in file order. Blocks without tokens are left out.
    pub blocks: Vec<BlockMeta>,
}

impl ShardInfo {
    /// The path that the file was opened by.
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

/// The methods of both kinds of shards.
///
/// A shard does not change after opening, and all threads share it.
pub trait AnyShard: Send + Sync + fmt::Debug {
    /// The facts about the file.
    fn info(&self) -> &ShardInfo;

    /// The blocks in file order. Blocks without tokens are left out.
    fn blocks(&self) -> &[BlockMeta] {
        &self.info().blocks
    }

    /// The same facts as [`AnyShard::info`]. They may change only before the shard is shared.
    fn info_mut(&mut self) -> &mut ShardInfo;

    /// Closes its files until their next use.
    fn let_go(&mut self) {
        self.info_mut().file.let_go();
    }

    /// Bytes of the tables that find tokens in this shard, without [`ShardInfo::blocks`].
    fn index_bytes(&self) -> u64;

    /// Properties that make the file slow to read, one line each, with the remedy. `forebay check`
    /// prints them.
    fn advice(&self) -> Vec<String>;

    /// Column, encodings and codec. `forebay check` prints them.
    fn describe(&self) -> String;

    /// The number of values in each row of the column. `None` stands for a null row.
    ///
    /// Reads the whole column. Only messages about columns that do not fit each other need it.
    fn row_lengths(&self) -> Result<Vec<Option<u64>>>;
}

/// A shard whose file holds any window of tokens as it is.
pub trait RandomShard: AnyShard {
    /// The ids of `range`, which counts tokens from the start of block `block`. The ids are
    /// borrowed from the mapping, or read into `scratch`.
    fn tokens<'a>(&'a self, block: usize, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<Tokens<'a>>;

    /// The mapped bytes of block `block`, from token `token` on. `None` if the file is not mapped.
    fn mapped(&self, block: usize, token: u64) -> Option<&[u8]>;

    /// The document ends of block `block`. They are borrowed from the mapping where possible, or
    /// built in `scratch`.
    fn ends<'a>(&'a self, block: usize, scratch: &'a mut EndsScratch) -> Result<Ends<'a>>;

    /// Asks the operating system to read a window before its use. It never fails, and may do
    /// nothing.
    fn will_need(&self, block: usize, range: Range<u64>);

    /// Tells whether the first page of a window is in memory. This is a guess: the page may leave
    /// memory at any time.
    fn is_resident(&self, block: usize, range: Range<u64>) -> bool;

    /// The row of the shard with token `token` of block `block`. Error messages use it.
    fn row_of(&self, block: usize, token: u64) -> Option<u64>;
}

/// A shard whose blocks must be decoded before their tokens can be used.
pub trait BlockShard: AnyShard {
    /// Type of the ids in a decoded block. It is the type of the file's ids, or a smaller type that
    /// holds all of them.
    fn block_dtype(&self) -> Dtype;

    /// Decodes block `block` into `out`, or at least its first `limit` tokens. Reuses the memory of
    /// `out`.
    ///
    /// The block is checked against its [`BlockMeta`]. Negative ids, null tokens, and counts that
    /// differ from the index are errors with path, block and row. After an error the content of
    /// `out` is undefined.
    fn decode_into(&self, block: usize, limit: Option<u64>, out: &mut DecodedBlock) -> Result<()>;

    /// Writes the document ends of block `block` to `ends`, as [`DecodedBlock::ends`] has them.
    ///
    /// Decodes no token. So faults of tokens are not noticed.
    fn ends_into(&self, block: usize, ends: &mut Vec<u32>) -> Result<()>;

    /// Decodes like [`BlockShard::decode_into`], into new memory.
    fn decode(&self, block: usize, limit: Option<u64>) -> Result<DecodedBlock> {
        let mut out = DecodedBlock::default();
        self.decode_into(block, limit, &mut out)?;
        Ok(out)
    }
}

/// One opened file. Only its content decides how it is read, never its location.
#[derive(Debug)]
pub enum Shard {
    /// Windows are read straight from the file.
    Random(Box<dyn RandomShard>),
    /// Blocks are decoded.
    Block(Box<dyn BlockShard>),
}

impl Shard {
    fn any(&self) -> &dyn AnyShard {
        match self {
            Self::Random(shard) => shard.as_ref(),
            Self::Block(shard) => shard.as_ref(),
        }
    }

    /// The facts about the file.
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

    /// The blocks in file order. Blocks without tokens are left out.
    pub fn blocks(&self) -> &[BlockMeta] {
        &self.info().blocks
    }

    /// The way to read the tokens.
    pub fn access(&self) -> Access {
        match self {
            Self::Random(_) => Access::Random,
            Self::Block(_) => Access::Block,
        }
    }

    /// Closes the file until its next use. That use fails if the file has changed meanwhile.
    pub fn let_go(&mut self) {
        match self {
            Self::Random(shard) => shard.let_go(),
            Self::Block(shard) => shard.let_go(),
        }
    }

    /// Fails if the file has another size or modification time than when it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.info().file.check_unchanged()
    }

    /// The facts about the shard without its blocks.
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

    /// Bytes of the tables that find tokens in this shard.
    pub fn index_bytes(&self) -> u64 {
        self.any().index_bytes() + size_of_val(self.blocks()) as u64
    }

    /// The number of values in each row of the column. `None` stands for a null row.
    ///
    /// Reads the whole column.
    pub fn row_lengths(&self) -> Result<Vec<Option<u64>>> {
        self.any().row_lengths()
    }

    /// Properties that make the file slow to read, one line each, with the remedy. `forebay check`
    /// prints them.
    pub fn advice(&self) -> Vec<String> {
        self.any().advice()
    }

    /// Column, encodings and codec. `forebay check` prints them.
    pub fn describe(&self) -> String {
        self.any().describe()
    }
}

/// Memory that [`RandomShard::ends`] reuses.
#[derive(Debug, Default)]
pub struct EndsScratch {
    /// Offsets as the file has them.
    pub bytes: Vec<u8>,
    /// Document ends, without empty documents.
    pub list: Vec<u32>,
}

/// The options for opening a shard.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The token column. `None` takes the first of [`TOKEN_COLUMNS`] that the file has.
    pub token_column: Option<String>,
    /// Further columns of the same files.
    pub fields: Vec<String>,
    /// Column with the starts of documents inside rows, if rows were packed before.
    pub borders: Option<String>,
    /// Whether a file may lack some of `fields`.
    pub fields_may_be_missing: bool,
    /// Whether `token_column` is one of the further columns. It may then have any type of a field
    /// and negative values, but no null list.
    pub is_field: bool,
    /// Type of the ids in raw files.
    pub bin_dtype: Option<Dtype>,
    /// The way to split files without document lengths. `None` makes each a single document.
    pub split: Option<SplitOptions>,
    /// Access to file bytes.
    pub io: Io,
    /// Number of tokens near which blocks are cut.
    pub block_tokens: u64,
    /// Largest number of bytes that a part of a file may take when it is decoded whole.
    pub memory_budget: u64,
    /// Stops the opening of a corpus between two shards.
    pub cancel: Cancel,
    /// The files to open.
    pub files: Files,
}

impl OpenOptions {
    /// The options that `config` describes.
    pub fn of(config: &Config) -> Self {
        Self {
            token_column: config.token_column.clone(),
            fields: config.fields.clone(),
            borders: (config.packed_by != PackedBy::None).then(|| config.packed_by.name().to_owned()),
            fields_may_be_missing: config.mixture.is_some(),
            is_field: false,
            bin_dtype: config.bin_dtype,
            split: SplitOptions::of(config),
            io: config.io,
            block_tokens: config.block_tokens,
            memory_budget: config.memory_budget,
            cancel: Cancel::default(),
            files: Files::of(config),
        }
    }
}

impl OpenOptions {
    /// The options to open the further column `name` of the same files.
    pub fn of_field(&self, name: &str) -> Self {
        Self { token_column: Some(name.to_owned()), fields: Vec::new(), borders: None, is_field: true, ..self.clone() }
    }
}

/// Opens the file at `path`. The content of the file tells its format.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Shard> {
    let source = options.files.open(path, options.io)?;
    let open = |mut reads| {
        let entry = recognise(&mut reads, path, options)?;
        match &options.split {
            Some(split) if entry.has_lengths => split.check_known(entry.format)?,
            _ => {}
        }
        (entry.open)(reads, options)
    };
    open(Reads::new(source)).map_err(|error| error.at(path))
}

/// The stamp of the file at `path`, whose own stamp is `own`, and of the files beside it.
///
/// The stamp has the time of the newest file. Its nanoseconds also depend on the times of the other
/// files. So an index of the same size with an older time gives another stamp.
pub fn stamp_with_beside(files: &Files, path: &Path, own: Stamp) -> Result<Stamp> {
    let name = path.to_string_lossy();
    let mut stamp = own;
    for entry in FORMATS.iter().filter(|entry| !entry.beside.is_empty()) {
        let Some(stem) = entry.suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)?.strip_suffix('.')) else {
            continue;
        };
        for suffix in entry.beside {
            let Some(found) = files.stat_if_there(Path::new(&format!("{stem}.{suffix}")))? else { continue };
            stamp.modified = stamp.modified.zip(found.stamp.modified).map(|(own, beside)| {
                let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
                let (last, other) = (since(own.max(beside)), since(own.min(beside)));
                let mixed = [u64::from(last.subsec_nanos()), other.as_secs(), found.stamp.size_bytes]
                    .into_iter()
                    .fold(u64::from(other.subsec_nanos()), |sum, part| sum.wrapping_mul(31).wrapping_add(part));
                UNIX_EPOCH + Duration::new(last.as_secs(), (mixed % 1_000_000_000) as u32)
            });
        }
    }
    Ok(stamp)
}

/// The names of the ids that the file at `path` may belong to.
pub fn owners(path: &Path) -> Vec<PathBuf> {
    let name = path.to_string_lossy();
    let of_entry = |entry: &FormatEntry| {
        let stems = entry.beside.iter().filter_map(|beside| name.strip_suffix(beside)?.strip_suffix('.'));
        stems.map(|stem| PathBuf::from(format!("{stem}.{}", entry.suffixes[0]))).collect::<Vec<_>>()
    };
    FORMATS.iter().flat_map(of_entry).collect()
}

/// The ids whose name is `prefix` and a suffix, if the file that must lie beside them is there.
pub fn ids_of_prefix(files: &Files, prefix: &str) -> Result<Option<PathBuf>> {
    for entry in FORMATS.iter() {
        let Some(beside) = entry.beside.first() else { continue };
        let [ids, beside] = [entry.suffixes[0], beside].map(|suffix| PathBuf::from(format!("{prefix}.{suffix}")));
        if files.has_file(&ids)? && files.has_file(&beside)? {
            return Ok(Some(ids));
        }
    }
    Ok(None)
}

/// Finds the row of a file's format by its first and last bytes, and by the files beside it.
fn recognise(reads: &mut Reads, path: &Path, options: &OpenOptions) -> Result<&'static FormatEntry> {
    let len = reads.file().len();
    let mut head = [0; 8];
    let head = &mut head[..len.min(8) as usize];
    head.copy_from_slice(reads.get(0..head.len() as u64)?);
    let sample = FileSample { len, head, tail: reads.last(6.min(len))?, path, options };
    // Ids may be none if another file says so.
    for entry in FORMATS.iter().filter(|entry| len > 0 || !entry.beside.is_empty()) {
        match (entry.recognise)(&sample) {
            Recognised::Yes => return Ok(entry),
            Recognised::Refused(why) => return Err(why),
            Recognised::No => {}
        }
    }
    if len == 0 {
        return Err(Error::data("shard is empty: expected a Parquet or Arrow file, or ids, found 0 bytes"));
    }
    let begins: Vec<_> = FORMATS.iter().filter_map(|entry| entry.begins).collect();
    let (last, begins) = begins.split_last().expect("some formats are known by their first bytes");
    Err(Error::data(format!(
        "not a file of a known format: expected it to begin with {} or {last}, found {}; {}",
        begins.join(", "),
        shown(sample.head),
        remedy(sample.head, path)
    )))
}

/// The first bytes of a file, for messages: as text if they are text.
fn shown(head: &[u8]) -> String {
    match std::str::from_utf8(head) {
        Ok(text) if head.iter().all(|byte| matches!(byte, b' '..=b'~')) => format!("`{text}`"),
        _ => head.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "),
    }
}

/// The advice for the file of unknown format at `path` that begins with `head`.
fn remedy(head: &[u8], path: &Path) -> &'static str {
    // The files of these formats begin with words of their own.
    let of_known = FORMATS.iter().filter(|entry| entry.begins.is_some() && entry.has_lengths);
    let is_named_so =
        path.extension().is_some_and(|suffix| of_known.flat_map(|entry| entry.suffixes).any(|name| suffix == *name));
    match head {
        [b'P', b'K', 3 | 5, ..] => "it is a zip archive: unpack it",
        [0x1f, 0x8b, ..]
        | [0x28, 0xb5, 0x2f, 0xfd, ..]
        | [b'B', b'Z', b'h', ..]
        | [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is compressed as a whole: decompress it",
        [b'{' | b'[', ..] => "it looks like JSON: tokenize it first, and write the ids to an Arrow or Parquet file",
        _ if is_named_so => "the file is damaged, or its name is wrong: copy or write it again",
        _ => {
            "a raw file of ids does not say their `dtype`: set `bin_dtype`, such as `uint16`, or write the ids to an Arrow \
             or Parquet file"
        }
    }
}
