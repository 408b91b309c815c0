//! Checksums of the content of all shards, which `forebay index --checksums` saves.
//!
//! Each block of each column has a checksum of the ends of its documents, and checksums of its
//! tokens. So files without checksums of their own are covered, and a loader finds damage that
//! leaves size and modification time as they were.
//!
//! A loader compares a piece before its first use, and notes in a bitmap that it did. Decoded
//! blocks are compared each time that they are decoded. The file lies beside the saved index. A
//! record names its shard by the digest of the shard's path, size, time and counts. A changed shard
//! has no checksums until they are made anew.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{Error, Result};
use crate::format::{DecodedBlock, Ends, Shard};
use crate::settings::Io;
use crate::storage::{Files, ItemKind};
use crate::sync::Bits;

const MAGIC: &[u8; 8] = b"forebayC";
/// Version of the layout of the file, and of what the checksums cover.
const VERSION: u64 = 1;
/// Bytes of the header: magic, version, number of shards, key, checksum of header and records.
const HEADER: usize = 48;
/// Bytes of a record: shard, number of its first checksum, number of its checksums.
const RECORD: usize = 32;
/// Bytes of a checksum.
const HASH: usize = 8;
/// Number of tokens that one checksum covers in a file that is read in place.
pub(super) const PIECE_TOKENS: u64 = 128 << 10;

/// The file that holds the checksums of a corpus.
#[derive(Clone, Debug)]
pub struct ChecksumsFile {
    files: Files,
    path: PathBuf,
    key: u128,
}

impl ChecksumsFile {
    /// The file at `path`. `key` stands for the data and the settings that the blocks depend on.
    pub fn new(files: Files, path: PathBuf, key: u128) -> Self {
        Self { files, path, key }
    }

    /// Whether the file exists.
    pub fn is_there(&self) -> bool {
        self.files.has_file(&self.path).unwrap_or(false)
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the saved checksums. Returns `None` if there is no file.
    ///
    /// A damaged file is an error. Otherwise damage would end the protection silently.
    pub fn load(&self, io: Io) -> Result<Option<SavedChecksums>> {
        let Some(stat) = self.files.stat_if_there(&self.path)? else { return Ok(None) };
        let damaged = |what: &str| {
            Error::data(format!(
                "saved checksums are damaged: {what}; remove the file, check the shards, and run `forebay index \
                 --checksums` again"
            ))
            .at(&self.path)
        };
        if stat.kind != ItemKind::File || stat.stamp.size_bytes < HEADER as u64 {
            return Err(damaged("the file is shorter than its header"));
        }
        let file = self.files.open(&self.path, io)?;
        let bytes = file.bytes(0..file.len())?;
        let word = |at: usize| word(&bytes, at);
        let shards = usize::try_from(word(16)).ok();
        let records = shards.and_then(|shards| shards.checked_mul(RECORD)?.checked_add(HEADER));
        let Some(records) = records.filter(|records| &bytes[..8] == MAGIC && *records <= bytes.len()) else {
            return Err(damaged("its header is not one"));
        };
        if word(8) != VERSION || checksum_of(&bytes[..records]) != word(HEADER - 8) {
            return Err(damaged("its header or its records changed"));
        }
        if bytes[24..40] != self.key.to_le_bytes() {
            return Err(damaged("it belongs to other data or settings"));
        }
        let hashes = (bytes.len() - records) / HASH;
        let saved = SavedChecksums { checked: Bits::new(hashes as u64), shards: (records - HEADER) / RECORD, bytes };
        let are_inside = (0..saved.shards).all(|shard| {
            let (first, count) = saved.place(shard);
            first.checked_add(count).is_some_and(|end| end <= hashes as u64)
        });
        if !are_inside {
            return Err(damaged("a record points outside of the file"));
        }
        Ok(Some(saved))
    }

    /// Saves the checksums of each shard, and replaces the previous file. Returns the size in
    /// bytes.
    pub(super) fn save(&self, shards: &[(u128, Vec<u64>)]) -> Result<u64> {
        let hashes: usize = shards.iter().map(|(_, hashes)| hashes.len()).sum();
        let records = HEADER + shards.len() * RECORD;
        let mut bytes = Vec::with_capacity(records + hashes * HASH);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(shards.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&self.key.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        let mut first = 0;
        for (digest, hashes) in shards {
            bytes.extend_from_slice(&digest.to_le_bytes());
            bytes.extend_from_slice(&u64::to_le_bytes(first));
            bytes.extend_from_slice(&(hashes.len() as u64).to_le_bytes());
            first += hashes.len() as u64;
        }
        let checksum = checksum_of(&bytes);
        bytes[HEADER - 8..HEADER].copy_from_slice(&checksum.to_le_bytes());
        bytes.extend(shards.iter().flat_map(|(_, hashes)| hashes).flat_map(|hash| hash.to_le_bytes()));
        let saved = self.files.replace(&self.path, &bytes);
        saved.map_err(|error| error.context("cannot write saved checksums"))?;
        Ok(bytes.len() as u64)
    }
}

/// The checksum of header and records, without itself.
fn checksum_of(bytes: &[u8]) -> u64 {
    xxh3_64(&bytes[..HEADER - 8]) ^ xxh3_64(&bytes[HEADER..])
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("a slice of that length"))
}

/// The checksums of a corpus. A mapped file costs no memory of its own.
#[derive(Debug)]
pub struct SavedChecksums {
    bytes: Bytes,
    shards: usize,
    /// A bit for each piece that was compared. Several threads may compare a piece; they find the
    /// same.
    checked: Bits,
}

impl SavedChecksums {
    /// Digest of the shard that record `record` describes.
    fn digest(&self, record: usize) -> u128 {
        let at = HEADER + record * RECORD;
        u128::from_le_bytes(self.bytes[at..at + 16].try_into().expect("a slice of that length"))
    }

    /// Number of the first checksum of record `record`, and number of its checksums.
    fn place(&self, record: usize) -> (u64, u64) {
        let at = HEADER + record * RECORD;
        (word(&self.bytes, at + 16), word(&self.bytes, at + 24))
    }

    /// The record of each shard with a digest. `None` stands for a shard without checksums.
    pub(super) fn records(&self, digests: &[u128]) -> Vec<Option<usize>> {
        let known: HashMap<u128, usize> = (0..self.shards).map(|record| (self.digest(record), record)).collect();
        digests.iter().map(|digest| known.get(digest).copied()).collect()
    }

    /// The checksums of record `record`.
    pub(super) fn hashes(&self, record: usize) -> Vec<u64> {
        let (first, count) = self.place(record);
        (first..first + count).map(|number| self.hash(number)).collect()
    }

    fn hash(&self, number: u64) -> u64 {
        word(&self.bytes, HEADER + self.shards * RECORD + number as usize * HASH)
    }

    /// Bytes that the checksums take in memory.
    pub(super) fn held_bytes(&self) -> u64 {
        self.checked.held_bytes()
    }
}

/// The checksums of one column of an opened shard.
#[derive(Clone, Debug)]
pub(super) struct ColumnChecksums {
    saved: Arc<SavedChecksums>,
    /// Number of the column's first checksum.
    first: u64,
    /// Number of checksums before each block of the column.
    before: Vec<u64>,
}

/// Numbers of the checksums before each block of `shard`, and last the number of all.
pub(super) fn pieces(shard: &Shard) -> Vec<u64> {
    let mut sum = 0;
    let of_block = |tokens: u64| match shard {
        Shard::Random(_) => 1 + tokens.div_ceil(PIECE_TOKENS),
        Shard::Block(_) => 2,
    };
    let rest = shard.blocks().iter().map(|block| {
        sum += of_block(block.tokens);
        sum
    });
    std::iter::once(0).chain(rest).collect()
}

/// The checksum of document ends. It depends on the ends, not on the way in which they are stored.
pub(super) fn hash_ends(ends: &Ends<'_>) -> u64 {
    let mut hash = Xxh3::new();
    if let Ends::Fixed { length, count } = *ends {
        hash.update(&length.to_le_bytes());
        hash.update(&(count as u64).to_le_bytes());
        return hash.digest();
    }
    let mut bytes = [0; 512];
    let mut document = 0;
    while document < ends.len() {
        let count = (ends.len() - document).min(bytes.len() / 8);
        for (at, place) in bytes.as_chunks_mut::<8>().0[..count].iter_mut().enumerate() {
            *place = ends.get(document + at).to_le_bytes();
        }
        hash.update(&bytes[..count * 8]);
        document += count;
    }
    hash.digest()
}

/// The checksum of a decoded block of a column with one value for each document.
pub(super) fn hash_values(block: &DecodedBlock) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&hash_ends(&block.document_ends()).to_le_bytes());
    hash.update(&block.bytes);
    hash.digest()
}

/// The tokens of piece `piece` of a block of `tokens` tokens.
fn piece_range(piece: u64, tokens: u64) -> Range<u64> {
    piece * PIECE_TOKENS..tokens.min((piece + 1) * PIECE_TOKENS)
}

/// The checksums of all blocks of a column.
pub(super) fn hash_column(shard: &Shard) -> Result<Vec<u64>> {
    let (mut hashes, mut bytes) = (Vec::new(), Vec::new());
    let mut scratch = crate::format::EndsScratch::default();
    let mut decoded = DecodedBlock::default();
    for (block, meta) in shard.blocks().iter().enumerate() {
        let mut add = || {
            match shard {
                Shard::Random(shard) => {
                    hashes.push(hash_ends(&shard.ends(block, &mut scratch)?));
                    for piece in 0..meta.tokens.div_ceil(PIECE_TOKENS) {
                        let tokens = shard.tokens(block, piece_range(piece, meta.tokens), &mut bytes)?;
                        hashes.push(xxh3_64(tokens.bytes()));
                    }
                }
                Shard::Block(shard) => {
                    shard.decode_into(block, None, &mut decoded)?;
                    hashes.push(hash_ends(&decoded.document_ends()));
                    hashes.push(xxh3_64(&decoded.bytes));
                }
            }
            Ok(())
        };
        add().map_err(|error: Error| error.at(shard.path()).in_block(block as u64))?;
    }
    Ok(hashes)
}

impl ColumnChecksums {
    /// The checksums of a column whose blocks have `before` checksums before them. The column has
    /// the first of them at `offset` in record `record`.
    pub(super) fn new(saved: &Arc<SavedChecksums>, record: usize, offset: u64, before: Vec<u64>) -> Self {
        Self { saved: Arc::clone(saved), first: saved.place(record).0 + offset, before }
    }

    /// Fails unless `before` numbers of the columns make as many checksums as record `record` has.
    pub(super) fn check_count(saved: &SavedChecksums, record: usize, found: u64) -> Result<()> {
        let (_, expected) = saved.place(record);
        if expected == found {
            return Ok(());
        }
        Err(Error::data(format!(
            "shard does not fit its checksums: expected {expected} pieces, found {found}; restore the file, or run \
             `forebay index --checksums` again if it is right"
        )))
    }

    /// Compares checksum `piece` of block `block` with `found`. Returns both where they differ.
    fn compare(&self, block: usize, piece: u64, found: u64) -> std::result::Result<(), (u64, u64)> {
        let number = self.first + self.before[block] + piece;
        let expected = self.saved.hash(number);
        if expected != found {
            return Err((expected, found));
        }
        self.saved.checked.set(number);
        Ok(())
    }

    fn is_checked(&self, block: usize, piece: u64) -> bool {
        let number = self.first + self.before[block] + piece;
        self.saved.checked.get(number)
    }

    /// Fails if the ends of a block are not as they were.
    pub(super) fn check_ends(&self, shard: &Shard, block: usize, ends: &Ends<'_>) -> Result<()> {
        if self.is_checked(block, 0) {
            return Ok(());
        }
        self.compare(block, 0, hash_ends(ends)).map_err(|hashes| {
            let tokens = shard.blocks()[block].tokens;
            differ(shard, block, 0..tokens, hashes)
        })
    }

    /// Fails if tokens of a block that is read in place are not as they were. Compares the pieces
    /// that `range` touches, each once.
    pub(super) fn check_tokens(
        &self,
        shard: &Shard,
        block: usize,
        range: &Range<u64>,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let Shard::Random(random) = shard else { return Ok(()) };
        for piece in range.start / PIECE_TOKENS..range.end.div_ceil(PIECE_TOKENS) {
            if self.is_checked(block, 1 + piece) {
                continue;
            }
            let tokens = piece_range(piece, shard.blocks()[block].tokens);
            let found = xxh3_64(random.tokens(block, tokens.clone(), bytes)?.bytes());
            self.compare(block, 1 + piece, found).map_err(|hashes| differ(shard, block, tokens, hashes))?;
        }
        Ok(())
    }

    /// Fails if a decoded block is not as it was.
    pub(super) fn check_decoded(&self, shard: &Shard, block: usize, decoded: &DecodedBlock) -> Result<()> {
        let found = [hash_ends(&decoded.document_ends()), xxh3_64(&decoded.bytes)];
        for (piece, found) in (0..).zip(found) {
            let tokens = 0..shard.blocks()[block].tokens;
            self.compare(block, piece, found).map_err(|hashes| differ(shard, block, tokens, hashes))?;
        }
        Ok(())
    }

    /// Fails if part `part` of a column with one value for each document is not as it was.
    pub(super) fn check_values(&self, part: usize, decoded: &DecodedBlock) -> Result<()> {
        self.compare(part, 0, hash_values(decoded)).map_err(|(expected, found)| {
            Error::data(format!("values of documents are damaged: {}", hashes_text(expected, found)))
        })
    }
}

/// Makes the error for tokens of a block that changed.
#[cold]
fn differ(shard: &Shard, block: usize, tokens: Range<u64>, (expected, found): (u64, u64)) -> Error {
    let blocks = shard.blocks();
    let rows = match shard {
        Shard::Random(shard) => shard.row_of(block, tokens.start).zip(shard.row_of(block, tokens.end.max(1) - 1)),
        Shard::Block(shard) => {
            let next = blocks.get(block + 1).map_or(shard.info().rows, |next| next.first_row);
            let first = blocks[block].first_row;
            Some((first, next.max(first + 1) - 1))
        }
    };
    let text = hashes_text(expected, found);
    match rows {
        Some((first, last)) => Error::data(format!("rows {first} to {last} are damaged: {text}")).at_row(first),
        None => Error::data(format!("the block is damaged: {text}")),
    }
}

fn hashes_text(expected: u64, found: u64) -> String {
    format!("expected checksum {expected:016x}, found {found:016x}; restore the file from a copy")
}
