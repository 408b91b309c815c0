//! Shards: one file each, opened, described by blocks, and read.
//!
//! A shard knows its blocks from metadata alone: how many tokens each holds and how many non-empty documents start
//! and end in it. Reading comes in two ways, and a shard supports exactly one of them (see [`Access`]): windows
//! straight from the file, or whole blocks decoded into memory. Nothing here knows of layouts, orders or batches.

pub mod arrow;
pub mod parquet;

use std::collections::TryReserveError;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::settings::{Config, Io};
use crate::storage::local;
use crate::tokens::{Dtype, Tokens};

/// Container format of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Apache Parquet.
    Parquet,
    /// Arrow IPC file (random access, magic `ARROW1`).
    ArrowFile,
    /// Arrow IPC stream, which `datasets.save_to_disk` writes.
    ArrowStream,
}

impl Format {
    /// Name shown to users.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::ArrowFile => "arrow file",
            Self::ArrowStream => "arrow stream",
        }
    }

    /// Name of the family that may be mixed in one corpus.
    pub const fn family(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::ArrowFile | Self::ArrowStream => "arrow",
        }
    }
}

/// How the tokens of a shard can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Any window of tokens lies in the file as it is: [`Shard::tokens`] and [`Shard::ends`].
    Random,
    /// A block has to be decoded first: [`Shard::decode`].
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
    /// Bytes of the file.
    pub size_bytes: u64,
    /// When it was last modified.
    pub modified: Option<SystemTime>,
    /// Its container format.
    pub format: Format,
    /// Type of its token ids.
    pub dtype: Dtype,
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

/// A block in memory, in the width of [`Shard::block_dtype`].
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

/// One opened file. Implementations are immutable after opening and shared by all threads.
pub trait Shard: Send + Sync + fmt::Debug {
    /// The opened file.
    fn file(&self) -> &local::SourceFile;

    /// Closes the file until its next use, which fails if it changed meanwhile.
    fn let_go(&mut self);

    /// Its container format.
    fn format(&self) -> Format;

    /// Type of its token ids.
    fn dtype(&self) -> Dtype;

    /// Type of the ids in a decoded block: [`Shard::dtype`], or a smaller one that holds all of the file's.
    fn block_dtype(&self) -> Dtype {
        self.dtype()
    }

    /// How its tokens are reached. The same for every block, and decided by content alone, never by location.
    fn access(&self) -> Access;

    /// Rows of the file, empty and null ones included.
    fn rows(&self) -> u64;

    /// Its blocks in file order. Blocks without tokens are left out.
    fn blocks(&self) -> &[BlockMeta];

    /// The path it was opened by.
    fn path(&self) -> &Path {
        self.file().path()
    }

    /// Bytes of the file.
    fn size_bytes(&self) -> u64 {
        self.file().len()
    }

    /// Fails if the file is no longer the one that was opened (size or modification time).
    fn check_unchanged(&self) -> Result<()> {
        self.file().check_unchanged()
    }

    /// What is known of it without its blocks.
    fn facts(&self) -> ShardFacts {
        let blocks = self.blocks();
        ShardFacts {
            size_bytes: self.size_bytes(),
            modified: self.file().modified(),
            format: self.format(),
            dtype: self.dtype(),
            access: self.access(),
            rows: self.rows(),
            blocks: blocks.len() as u64,
            counts: blocks.iter().map(BlockMeta::counts).sum(),
            decoded_bytes: blocks.iter().map(|block| block.decoded_bytes).sum(),
            largest_block_bytes: blocks.iter().map(|block| block.decoded_bytes).max().unwrap_or(0),
        }
    }

    /// Random access: the ids of `range` (token offsets in block `block`), borrowed from the mapping, or read into `scratch`.
    fn tokens<'a>(&'a self, block: usize, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<Tokens<'a>>;

    /// Random access: the bytes from token `token` of block `block` on, if they are mapped.
    fn mapped(&self, block: usize, token: u64) -> Option<&[u8]> {
        let _ = (block, token);
        None
    }

    /// Random access: document ends of block `block`, borrowed from the mapping where possible, or built in `scratch`.
    fn ends<'a>(&'a self, block: usize, scratch: &'a mut EndsScratch) -> Result<Ends<'a>>;

    /// Asks the operating system to read the window, or the block, ahead of its use. Never fails; may do nothing.
    fn will_need(&self, block: usize, range: Range<u64>);

    /// Random access: whether the first page of the window is in memory already. A guess: it may leave at any time.
    fn is_resident(&self, block: usize, range: Range<u64>) -> bool {
        let _ = (block, range);
        true
    }

    /// Block access: decodes block `block`, or at least its first `limit` tokens, checked against its [`BlockMeta`].
    ///
    /// Negative ids, null tokens and counts that differ from the index are errors with path, block and row.
    fn decode(&self, block: usize, limit: Option<u64>) -> Result<DecodedBlock> {
        let mut out = DecodedBlock::default();
        self.decode_into(block, limit, &mut out)?;
        Ok(out)
    }

    /// As [`Shard::decode`], over a block that is no longer needed, whose memory is used again. After an error it holds anything.
    fn decode_into(&self, block: usize, limit: Option<u64>, out: &mut DecodedBlock) -> Result<()>;

    /// Bytes of what it keeps in memory to find its tokens.
    fn index_bytes(&self) -> u64;

    /// One line per thing that makes the file slow to read, with the remedy; for `forebay check`.
    fn advice(&self) -> Vec<String> {
        Vec::new()
    }

    /// Column, encodings, codec and the like, for `forebay check`.
    fn describe(&self) -> String {
        String::new()
    }
}

/// Reused memory for [`Shard::ends`].
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
    /// How file bytes are reached.
    pub io: Io,
    /// Tokens near which blocks are cut.
    pub block_tokens: u64,
}

impl OpenOptions {
    /// What `config` says of it.
    pub fn of(config: &Config) -> Self {
        Self { token_column: config.token_column.clone(), io: config.io, block_tokens: config.block_tokens }
    }
}

/// Columns taken for the tokens when none is named, in order of preference.
pub const TOKEN_COLUMNS: [&str; 4] = ["input_ids", "tokens", "token_ids", "ids"];

/// Picks the token column among `columns` of a file.
pub(crate) fn choose_token_column<'a>(columns: &[&'a str], wanted: Option<&str>) -> Result<&'a str> {
    let found = match wanted {
        Some(name) => columns.iter().find(|column| **column == name),
        None => TOKEN_COLUMNS.iter().find_map(|name| columns.iter().find(|column| *column == name)),
    };
    found.copied().ok_or_else(|| {
        let there = if columns.is_empty() { "no columns".to_owned() } else { format!("`{}`", columns.join("`, `")) };
        match wanted {
            Some(name) => {
                Error::data(format!("token column `{name}` is missing: the file has {there}; set `token_column`"))
            }
            None => Error::data(format!(
                "no token column: expected one of `{}`, found {there}; name it with `token_column`",
                TOKEN_COLUMNS.join("`, `")
            )),
        }
    })
}
/// Opens `file`, whose format is recognised by its content.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Shard>> {
    let source = local::SourceFile::open(path, options.io)?;
    let mut reads = local::Reads::new(source);
    let shard = match recognise(&mut reads).map_err(|error| error.at(path))? {
        Format::Parquet => parquet::open(reads.into_file(), options),
        format => arrow::open(reads, format, options),
    };
    shard.map_err(|error| error.at(path))
}

/// The format of a file by its first and last bytes; its name says nothing.
fn recognise(reads: &mut local::Reads) -> Result<Format> {
    let len = reads.file().len();
    let mut head = [0; 8];
    let head = &mut head[..len.min(8) as usize];
    head.copy_from_slice(reads.get(0..head.len() as u64)?);
    let tail = reads.last(6.min(len))?;
    if head.starts_with(b"PAR1") {
        if tail.ends_with(b"PAR1") {
            return Ok(Format::Parquet);
        }
        return Err(Error::data(
            "Parquet file is truncated: it begins with `PAR1` and does not end with it; write or copy it again",
        ));
    }
    if head.starts_with(b"PARE") || tail.ends_with(b"PARE") {
        return Err(Error::data("Parquet file is encrypted, which is not supported; write it without encryption"));
    }
    if head.starts_with(b"ARROW1") {
        if tail.ends_with(b"ARROW1") {
            return Ok(Format::ArrowFile);
        }
        return Err(Error::data(
            "Arrow file is truncated: it begins with `ARROW1` and does not end with it; write or copy it again",
        ));
    }
    if head.starts_with(b"FEA1") {
        return Err(Error::data("Feather version 1 is not supported; write Arrow IPC (Feather version 2) instead"));
    }
    let word = |at: usize| head.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    // A stream begins with a continuation marker, or (before Arrow 0.15) with the length of its schema.
    let plausible = |length: u32| length > 0 && u64::from(length) + 4 <= len && length.is_multiple_of(4);
    match (word(0), word(4)) {
        (Some(u32::MAX), _) => Ok(Format::ArrowStream),
        (Some(length), Some(_)) if plausible(length) && length < 1 << 24 => Ok(Format::ArrowStream),
        _ => Err(Error::data(format!(
            "neither a Parquet nor an Arrow file: expected it to begin with `PAR1`, `ARROW1` or a stream marker, found {head:02x?}"
        ))),
    }
}
