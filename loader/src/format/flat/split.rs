//! Document ends that are found by an id: the setting `document_end_id`.
//!
//! One scan of the ids finds the ends. Threads of the pool that opens shards share it. The ends
//! take four bytes each, and are saved in the folder of the saved index, so that a later start
//! scans nothing. Without a folder they stay in memory, within a budget.
//!
//! A saved file belongs to one state of a shard, and to one id. It has a header, a record per block
//! and the ends of each block. A checksum covers header and records. Each block has a checksum of
//! its own, which is compared when the block is first read.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, UNIX_EPOCH};

use bytes::Bytes;
use rayon::prelude::*;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::documents::{BlockDocuments, MAX_DOCUMENTS, entries};
use crate::error::{Error, Result};
use crate::format::{BlockMeta, Ends, EndsScratch, Format, OpenOptions};
use crate::settings::Config;
use crate::storage::{Files, SourceFile};
use crate::sync::Bits;
use crate::tokens::Dtype;

const MAGIC: &[u8; 8] = b"forebayE";
/// Version of the layout of header, records and ends.
const VERSION: u64 = 1;
/// Bytes of the header: magic, version, key, numbers of blocks and documents, checksum.
const HEADER: u64 = 56;
/// Bytes of a record: first document, first token, checksum of the ends.
const RECORD: u64 = 24;
/// Bytes of one end.
const END: u64 = 4;
/// Tokens near which a block ends. The setting `block_tokens` has no influence, so that a saved
/// file fits every setting.
const BLOCK_TOKENS: u64 = 128 << 10;
/// Number of ids that a thread scans at a time.
const PIECE: u64 = 1 << 20;
/// Number of pieces whose ends are kept until they are joined.
const ROUND: u64 = 64;
/// Ends in memory may take `memory_budget` divided by this number.
const MEMORY_SHARE: u64 = 8;
/// Ids that are compared together before each of them is looked at.
const STRIDE: usize = 64;

/// The id that ends documents, and the place of the ends that were found.
#[derive(Clone, Debug)]
pub struct SplitOptions {
    /// The last id of each document.
    pub id: u32,
    /// Folder for the ends that were found. `None` keeps them in memory.
    pub folder: Option<PathBuf>,
    /// Most bytes of ends in memory, over all shards that share these options.
    pub budget_bytes: u64,
    /// Whether files that have document lengths keep them. Otherwise they are refused.
    pub keeps_known: bool,
    /// The work that was done with these options.
    pub(crate) done: Arc<SplitWork>,
}

/// Counters of the scans of some shards. Any thread adds to them.
#[derive(Debug, Default)]
pub(crate) struct SplitWork {
    held_bytes: AtomicU64,
    scanned_bytes: AtomicU64,
    scan_nanos: AtomicU64,
}

impl SplitOptions {
    /// The options that `config` describes. `None` if it names no id.
    pub(crate) fn of(config: &Config) -> Option<Self> {
        config.document_end_id.map(|id| Self {
            id,
            folder: config.index_folder().map(PathBuf::from),
            budget_bytes: config.memory_budget / MEMORY_SHARE,
            keeps_known: config.mixture.is_some(),
            done: Arc::default(),
        })
    }

    /// Fails unless a file of `format`, which says where its documents end, may be beside files
    /// that do not.
    pub(crate) fn check_known(&self, format: Format) -> Result<()> {
        if self.keeps_known {
            return Ok(());
        }
        Err(Error::config(format!(
            "`document_end_id` is for raw files, files of llm.c and NumPy arrays of a single axis, which do not say where \
             documents end: this file has format {}; leave `document_end_id` out",
            format.name()
        )))
    }

    /// Bytes of ids that were scanned, and the seconds that the scans of all shards took together.
    pub fn scanned(&self) -> (u64, f64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.done.scanned_bytes), read(&self.done.scan_nanos) as f64 / 1e9)
    }
}

/// The ids of a shard.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ids<'a> {
    pub(super) file: &'a SourceFile,
    /// The place of the first id in the file.
    pub(super) start: u64,
    pub(super) dtype: Dtype,
    /// Number of ids.
    pub(super) tokens: u64,
}

/// The ends of all documents of a shard.
#[derive(Debug)]
pub(super) struct FoundEnds {
    content: Content,
    /// Place of the ends of the first block.
    ends_at: u64,
    /// The checksum of the ends of each block.
    checksums: Vec<u64>,
    /// A bit for each block that was compared with its checksum. Several threads may compare a
    /// block; they find the same.
    checked: Bits,
}

/// The bytes of header, records and ends.
#[derive(Debug)]
enum Content {
    Memory { bytes: Bytes, work: Arc<SplitWork> },
    File(SourceFile),
}

impl Drop for Content {
    fn drop(&mut self) {
        if let Self::Memory { bytes, work } = self {
            work.held_bytes.fetch_sub(bytes.len() as u64, Ordering::Relaxed);
        }
    }
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Self::Memory { bytes, .. } => bytes.len() as u64,
            Self::File(file) => file.len(),
        }
    }

    /// The bytes of `range`. A file that cannot be mapped is read into `scratch`.
    fn slice<'a>(&'a self, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        match self {
            Self::Memory { bytes, .. } => Ok(&bytes[range.start as usize..range.end as usize]),
            Self::File(file) => file.slice(range, scratch),
        }
    }
}

/// A shard that is split: its ends, its blocks, and the documents of each block.
pub(super) type SplitShard = (FoundEnds, Vec<BlockMeta>, Vec<BlockDocuments>);

/// Finds the documents of `ids`: in the folder of saved ends, or by a scan.
pub(super) fn split(ids: Ids<'_>, split: &SplitOptions, options: &OpenOptions) -> Result<SplitShard> {
    if !fits(split.id, ids.dtype) {
        return Err(Error::config(format!(
            "`document_end_id` is {}, which no id of type {} can be: set it to the id that ends documents",
            split.id,
            ids.dtype.name()
        )));
    }
    let files = &options.files;
    let key = key_of(&ids, split.id, files);
    let saved = split.folder.as_ref().map(|folder| folder.join(format!("{key:032x}.forebay-ends")));
    let load = |path: &PathBuf| {
        let found = FoundEnds::new(Content::File(files.open(path, options.io)?), key, ids.tokens);
        found.map_err(|error| error.at(path))
    };
    if let Some(path) = &saved
        && files.has_file(path).unwrap_or(false)
        && let Ok(found) = load(path)
    {
        // A damaged file is made anew.
        return Ok(found);
    }
    let began = Instant::now();
    let bytes = Bytes::from(scan(&ids, split, key, options)?);
    // A shard that changed meanwhile must not leave ends that nobody scanned.
    ids.file.check_unchanged()?;
    split.done.scanned_bytes.fetch_add(ids.tokens * ids.dtype.size() as u64, Ordering::Relaxed);
    split.done.scan_nanos.fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
    if let Some(path) = &saved
        && files.replace(path, &bytes).is_ok()
    {
        return load(path);
    }
    // Ends that cannot be saved stay in memory.
    let len = bytes.len() as u64;
    let held = split.done.held_bytes.fetch_add(len, Ordering::Relaxed) + len;
    let content = Content::Memory { bytes, work: Arc::clone(&split.done) };
    if held > split.budget_bytes {
        return Err(too_many(held, split));
    }
    FoundEnds::new(content, key, ids.tokens)
}

fn too_many(bytes: u64, split: &SplitOptions) -> Error {
    let remedy = match &split.folder {
        None => "set `cache_dir`, where they are saved, or raise `memory_budget`".to_owned(),
        Some(folder) => format!("they cannot be saved in `{}`; raise `memory_budget`", folder.display()),
    };
    Error::config(format!(
        "the ends of documents that `document_end_id` = {} finds take {bytes} bytes or more, and `memory_budget` leaves \
         {} for them: {remedy}",
        split.id, split.budget_bytes
    ))
}

/// Whether an id of type `dtype` can be `id`.
fn fits(id: u32, dtype: Dtype) -> bool {
    match dtype {
        Dtype::U8 => u8::try_from(id).is_ok(),
        Dtype::I8 => i8::try_from(id).is_ok(),
        Dtype::U16 => u16::try_from(id).is_ok(),
        Dtype::I16 => i16::try_from(id).is_ok(),
        Dtype::I32 => i32::try_from(id).is_ok(),
        _ => true,
    }
}

/// The key of the ends that `id` finds in a shard, as the shard is now.
fn key_of(ids: &Ids<'_>, id: u32, files: &Files) -> u128 {
    let stamp = ids.file.stamp();
    let since = |time: std::time::SystemTime| match time.duration_since(UNIX_EPOCH) {
        Ok(after) => format!("+{after:?}"),
        Err(before) => format!("-{:?}", before.duration()),
    };
    let modified = stamp.modified.map(since);
    let text = format!("{VERSION} {id} {} {modified:?} {:?} {} {}", stamp.size_bytes, ids.dtype, ids.start, ids.tokens);
    let mut hash = Xxh3::new();
    hash.update(text.as_bytes());
    hash.update(files.absolute(ids.file.path()).as_os_str().as_encoded_bytes());
    hash.digest128()
}

/// The checksum of header and records, without itself.
fn checksum_of(head: &[u8]) -> u64 {
    xxh3_64(&head[..HEADER as usize - 8]) ^ xxh3_64(&head[HEADER as usize..])
}

/// Scans the ids, and returns the content of a file of ends.
fn scan(ids: &Ids<'_>, split: &SplitOptions, key: u128, options: &OpenOptions) -> Result<Vec<u8>> {
    let pieces = ids.tokens.div_ceil(PIECE);
    let mut joined = JoinedEnds::default();
    for first in (0..pieces).step_by(ROUND as usize) {
        options.cancel.check()?;
        let round = first..pieces.min(first + ROUND);
        let wanted = ids.start + first * PIECE * ids.dtype.size() as u64;
        ids.file.will_need(wanted..(wanted + ROUND * PIECE * ids.dtype.size() as u64).min(ids.file.len()));
        let piece = |piece: u64| ends_of_piece(ids, split.id, piece);
        // The caller may be no thread of a pool. Work must not go to the pool of the process then.
        let found: Vec<Result<Vec<u32>>> = if rayon::current_thread_index().is_some() {
            round.clone().into_par_iter().map(piece).collect()
        } else {
            round.clone().map(piece).collect()
        };
        for (piece, ends) in round.zip(found) {
            ends?.into_iter().for_each(|end| joined.push(piece * PIECE + u64::from(end)));
        }
        if split.folder.is_none() && joined.ends.len() as u64 > split.budget_bytes {
            return Err(too_many(joined.ends.len() as u64, split));
        }
    }
    if joined.last < ids.tokens {
        // The last document has no id at its end.
        joined.push(ids.tokens);
    }
    Ok(joined.finish(key))
}

/// The ends of documents among the ids of piece `piece`, counted from its start.
fn ends_of_piece(ids: &Ids<'_>, id: u32, piece: u64) -> Result<Vec<u32>> {
    let width = ids.dtype.size() as u64;
    let (from, to) = (piece * PIECE, ids.tokens.min((piece + 1) * PIECE));
    let mut scratch = Vec::new();
    let bytes = ids.file.slice(ids.start + from * width..ids.start + to * width, &mut scratch)?;
    let mut ends = Vec::new();
    match width {
        1 => find::<1>(bytes, [id as u8], &mut ends),
        2 => find::<2>(bytes, (id as u16).to_le_bytes(), &mut ends),
        4 => find::<4>(bytes, id.to_le_bytes(), &mut ends),
        _ => find::<8>(bytes, u64::from(id).to_le_bytes(), &mut ends),
    }
    Ok(ends)
}

/// Adds to `ends` the places just after each `id` in `bytes`.
fn find<const WIDTH: usize>(bytes: &[u8], id: [u8; WIDTH], ends: &mut Vec<u32>) {
    let ids = bytes.as_chunks::<WIDTH>().0;
    for (number, some) in ids.chunks(STRIDE).enumerate() {
        // Comparing all of them without a branch is fast, and most strides have no end.
        if some.iter().fold(false, |found, other| found | (*other == id)) {
            let places = some.iter().zip(1..).filter(|(other, _)| **other == id);
            ends.extend(places.map(|(_, place): (_, u32)| (number * STRIDE) as u32 + place));
        }
    }
}

/// The ends of a shard, cut into blocks.
#[derive(Debug, Default)]
struct JoinedEnds {
    /// For each block: 0, and the ends from the start of the block.
    ends: Vec<u8>,
    records: Vec<u8>,
    blocks: u64,
    documents: u64,
    /// Place in `ends` of the block that is being filled.
    block_at: usize,
    /// Documents in that block, and its first token.
    filled: u64,
    start: u64,
    last: u64,
}

impl JoinedEnds {
    /// Adds a document that ends before token `end`.
    fn push(&mut self, end: u64) {
        // The ends of several documents in a block are kept in 32 bits.
        if self.filled > 0 && end - self.start > u64::from(u32::MAX) {
            self.end_block();
        }
        if self.filled == 0 {
            self.ends.extend_from_slice(&[0; END as usize]);
        }
        // The length of the block gives the end of a document that fills a block.
        let relative = u32::try_from(end - self.start).unwrap_or(u32::MAX);
        self.ends.extend_from_slice(&relative.to_le_bytes());
        self.filled += 1;
        self.last = end;
        if end - self.start >= BLOCK_TOKENS || self.filled >= MAX_DOCUMENTS {
            self.end_block();
        }
    }

    fn end_block(&mut self) {
        if self.filled == 0 {
            return;
        }
        let checksum = xxh3_64(&self.ends[self.block_at..]);
        for word in [self.documents, self.start, checksum] {
            self.records.extend_from_slice(&word.to_le_bytes());
        }
        self.blocks += 1;
        self.documents += self.filled;
        (self.filled, self.start, self.block_at) = (0, self.last, self.ends.len());
    }

    /// The content of a file with the key `key`.
    fn finish(mut self, key: u128) -> Vec<u8> {
        self.end_block();
        let mut bytes = Vec::with_capacity(HEADER as usize + self.records.len() + self.ends.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&key.to_le_bytes());
        bytes.extend_from_slice(&self.blocks.to_le_bytes());
        bytes.extend_from_slice(&self.documents.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&self.records);
        let checksum = checksum_of(&bytes);
        bytes[HEADER as usize - 8..HEADER as usize].copy_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(&self.ends);
        bytes
    }
}

impl FoundEnds {
    /// Reads header and records of `content`. Fails if it is damaged, or has another key.
    fn new(content: Content, key: u128, tokens: u64) -> Result<SplitShard> {
        let mut scratch = Vec::new();
        let header = content.slice(0..HEADER.min(content.len()), &mut scratch)?;
        if header.len() < HEADER as usize || &header[..8] != MAGIC || header[16..32] != key.to_le_bytes() {
            return Err(damaged("it does not begin as one"));
        }
        let words: Vec<u64> = entries(header).collect();
        let (blocks, documents) = (words[4], words[5]);
        let sizes = (blocks.checked_mul(RECORD + END)).zip(documents.checked_mul(END));
        let size = sizes.and_then(|(blocks, documents)| HEADER.checked_add(blocks)?.checked_add(documents));
        if words[1] != VERSION || size != Some(content.len()) {
            return Err(damaged("it has another size"));
        }
        let ends_at = HEADER + blocks * RECORD;
        let head = content.slice(0..ends_at, &mut scratch)?;
        if checksum_of(head) != words[6] {
            return Err(damaged("its checksum differs"));
        }
        let records = head[HEADER as usize..].as_chunks::<{ RECORD as usize }>().0;
        let records = records.iter().map(|record| {
            let words: Vec<u64> = entries(record).collect();
            (words[0], words[1], words[2])
        });
        let (mut metas, mut parts, mut checksums) = (Vec::new(), Vec::new(), Vec::new());
        let nexts = records.clone().skip(1).map(|(first, start, _)| (first, start)).chain([(documents, tokens)]);
        for ((first, start, checksum), (next_first, next_start)) in records.zip(nexts) {
            let (Some(count), Some(len)) = (next_first.checked_sub(first), next_start.checked_sub(start)) else {
                return Err(damaged("its blocks do not follow each other"));
            };
            metas.push(BlockMeta { tokens: len, starts: count, ends: count, decoded_bytes: 0, first_row: first });
            parts.push(BlockDocuments { first, count, start });
            checksums.push(checksum);
        }
        let checked = Bits::new(blocks);
        Ok((Self { content, ends_at, checksums, checked }, metas, parts))
    }

    /// Bytes of memory that the ends and their checksums take.
    pub(super) fn held_bytes(&self) -> u64 {
        let held = if let Content::Memory { bytes, .. } = &self.content { bytes.len() } else { 0 };
        (held + size_of_val(self.checksums.as_slice())) as u64
    }

    /// Closes the file until its next use.
    pub(super) fn let_go(&mut self) {
        if let Content::File(file) = &mut self.content {
            file.let_go();
        }
    }

    /// The ends of the documents of block `number`, which are `block`.
    pub(super) fn ends_in<'a>(
        &'a self,
        number: usize,
        block: BlockDocuments,
        scratch: &'a mut EndsScratch,
    ) -> Result<Ends<'a>> {
        let from = self.ends_at + (block.first + number as u64) * END;
        let range = from..from + (block.count + 1) * END;
        let place = |error: Error| match &self.content {
            Content::File(file) => error.at(file.path()),
            Content::Memory { .. } => error,
        };
        if let Content::File(file) = &self.content {
            file.check_window().map_err(place)?;
        }
        let bytes = self.content.slice(range, &mut scratch.bytes).map_err(place)?;
        if !self.checked.get(number as u64) {
            if xxh3_64(bytes) != self.checksums[number] {
                return Err(place(damaged("a checksum of its ends differs; remove the file")));
            }
            self.checked.set(number as u64);
        }
        Ok(Ends::Offsets { bytes, width: END as usize })
    }
}

fn damaged(what: &str) -> Error {
    Error::data(format!("the saved ends of documents are damaged: {what}"))
}
