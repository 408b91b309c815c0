//! Compares the content of a shard of the result with the content of its source.
//!
//! The writer adds up what it is given. Afterwards forebay's own reader reads the file back. Both
//! sums must agree.

use std::path::Path;

use forebay::Result;
use forebay::format::documents::{DocumentColumn, Values};
use forebay::format::{self, DecodedBlock, EndsScratch, OpenOptions, Shard};
use forebay::proof::checksum::{number_hash, text_hash};
use forebay::tokens::{DocumentType, Dtype, Tokens};
use xxhash_rust::xxh3::Xxh3;

use crate::report::number_of;

/// Number of tokens read back at once if the file holds them as they are.
const PIECE_TOKENS: u64 = 1 << 20;

/// The content of a shard, in numbers that can be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// Number of rows: documents, including empty documents, or tokens of a plain column.
    pub(super) rows: u64,
    /// Number of documents with tokens.
    pub(super) documents: u64,
    pub(super) tokens: u64,
    /// Hash of the ids, and of the places where documents end.
    pub(super) hash: String,
}

impl std::fmt::Display for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [rows, documents, tokens] = [(self.rows, "row"), (self.documents, "document"), (self.tokens, "token")]
            .map(|(number, noun)| number_of(number, noun));
        write!(f, "{rows}, {documents}, {tokens}, hash {}", self.hash)
    }
}

/// Adds up a [`Content`]. Takes ids as 64-bit integers, whatever their type in a file.
#[derive(Default)]
pub(super) struct Digest {
    ids: Xxh3,
    ends: Xxh3,
    documents: u64,
    pub(super) tokens: u64,
}

impl Digest {
    pub(super) fn ids(&mut self, ids: &[i64]) {
        let mut bytes = [0; 8 * 512];
        for ids in ids.chunks(512) {
            for (place, id) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(ids) {
                *place = id.to_le_bytes();
            }
            self.ids.update(&bytes[..ids.len() * 8]);
        }
        self.tokens += ids.len() as u64;
    }

    /// Notes that a document with tokens ends after `end` tokens of the shard.
    pub(super) fn end(&mut self, end: u64) {
        self.ends.update(&end.to_le_bytes());
        self.documents += 1;
    }

    /// The content of a shard with `rows` rows and these tokens. `fields` are the digests of its
    /// further columns.
    pub(super) fn content(&self, rows: u64, fields: impl IntoIterator<Item = Self>) -> Content {
        let mut hash = format!("{:016x}{:016x}", self.ids.digest(), self.ends.digest());
        for field in fields {
            hash.push_str(&format!("-{:016x}{:016x}", field.ids.digest(), field.ends.digest()));
        }
        Content { rows, documents: self.documents, tokens: self.tokens, hash }
    }
}

/// Reads the content of the shard at `path` like a loader.
pub(super) fn read_back(path: &Path, options: &OpenOptions) -> Result<Content> {
    let shard = format::open(path, options)?;
    let has_documents = !shard.info().column.is_plain();
    let of_field = |name: &String| match has_documents.then(|| DocumentColumn::open(path, name, options)).transpose()? {
        Some(Some(column)) => digest_of_documents(&column),
        _ => digest_of(&format::open(path, &options.of_field(name))?),
    };
    let fields = options.fields.iter().map(of_field).collect::<Result<Vec<_>>>()?;
    Ok(digest_of(&shard)?.content(shard.info().rows, fields))
}

/// Reads all values of a per-document column.
fn digest_of_documents(column: &DocumentColumn) -> Result<Digest> {
    let mut digest = Digest::default();
    let (mut block, mut row) = (DecodedBlock::default(), 0);
    while row < column.rows() {
        let (part, first) = column.locate(row);
        column.decode_into(part, &mut block)?;
        let values = Values::of(column.kind(), &block);
        for value in (first..values.len()).map(|index| values.get(index)) {
            digest.ids(&[match column.kind() {
                DocumentType::Text => text_hash(value.and_then(|value| std::str::from_utf8(value).ok())),
                DocumentType::Number(dtype) => number_hash(value.map(|value| Tokens::new(dtype, value).get(0))),
            }]);
        }
        row += (values.len() - first) as u64;
    }
    Ok(digest)
}

/// Reads all values of a column.
fn digest_of(shard: &Shard) -> Result<Digest> {
    let mut digest = Digest::default();
    let (mut bytes, mut scratch, mut ids) = (Vec::new(), EndsScratch::default(), Vec::new());
    for (block, meta) in shard.blocks().iter().enumerate() {
        let before = digest.tokens;
        match shard {
            Shard::Random(shard) => {
                for start in (0..meta.tokens).step_by(PIECE_TOKENS as usize) {
                    let end = meta.tokens.min(start + PIECE_TOKENS);
                    widen(&shard.tokens(block, start..end, &mut bytes)?, &mut ids);
                    digest.ids(&ids);
                }
                let ends = shard.ends(block, &mut scratch)?;
                (0..ends.len()).for_each(|index| digest.end(before + ends.get(index)));
            }
            Shard::Block(shard) => {
                let decoded = shard.decode(block, None)?;
                widen(&Tokens::new(shard.block_dtype(), &decoded.bytes), &mut ids);
                digest.ids(&ids);
                decoded.ends.iter().for_each(|end| digest.end(before + u64::from(*end)));
            }
        }
    }
    Ok(digest)
}

/// Replaces `ids` by the ids of `tokens`.
fn widen(tokens: &Tokens<'_>, ids: &mut Vec<i64>) {
    ids.clear();
    let bytes = tokens.bytes();
    match tokens.dtype() {
        Dtype::U8 => ids.extend(bytes.iter().map(|id| i64::from(*id))),
        Dtype::U16 => ids.extend(bytes.as_chunks::<2>().0.iter().map(|id| i64::from(u16::from_le_bytes(*id)))),
        Dtype::U32 => ids.extend(bytes.as_chunks::<4>().0.iter().map(|id| i64::from(u32::from_le_bytes(*id)))),
        Dtype::I32 => ids.extend(bytes.as_chunks::<4>().0.iter().map(|id| i64::from(i32::from_le_bytes(*id)))),
        Dtype::I64 => ids.extend(bytes.as_chunks::<8>().0.iter().map(|id| i64::from_le_bytes(*id))),
        // Only further columns have these types.
        _ => ids.extend((0..tokens.len()).map(|index| tokens.get(index))),
    }
}

/// The largest id among `tokens`, or 0 without tokens.
pub(super) fn largest_id(tokens: &Tokens<'_>, ids: &mut Vec<i64>) -> i64 {
    widen(tokens, ids);
    ids.iter().copied().max().unwrap_or(0)
}
