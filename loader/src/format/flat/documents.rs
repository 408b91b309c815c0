//! Document ends in a second file, beside the ids.
//!
//! A table stays in its file: a block reads the ends of its own documents when they are needed.
//! Opening reads the whole table once, checks it, and cuts the documents into blocks.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::format::{BlockMeta, OpenOptions};
use crate::storage::SourceFile;

/// Most documents in a block. A small number keeps the cost of its ends small.
pub(super) const MAX_DOCUMENTS: u64 = 4096;
/// Number of entries of a table that are read at once.
const PIECE: u64 = 1 << 16;

/// The ends of all documents of a file.
#[derive(Debug)]
pub(super) struct DocumentTable {
    /// The file that holds the table.
    pub(super) index: SourceFile,
    /// Number of documents, including empty documents.
    pub(super) documents: u64,
    pub(super) kind: TableKind,
}

/// The way in which a table gives the end of a document.
#[derive(Clone, Copy, Debug)]
pub(super) enum TableKind {
    /// Entry `i` is the number of values before the end of document `i`.
    Ends,
    /// A document is a run of sequences.
    Sequences {
        /// Place of the first sequence of each document, and of the end of the last one.
        firsts_at: u64,
        /// Place of the byte offsets of all sequences.
        offsets_at: u64,
        /// Number of sequences.
        sequences: u64,
        /// Bytes of one value.
        width: u64,
        /// Number of values of all sequences.
        tokens: u64,
    },
}

/// The documents of one block.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockDocuments {
    /// The first document.
    pub(super) first: u64,
    /// Number of documents, including empty documents.
    pub(super) count: u64,
    /// Number of values of the file before the block.
    pub(super) start: u64,
}

/// The entries in `bytes`. Each has 8 bytes.
pub(super) fn entries(bytes: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    bytes.as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry))
}

impl DocumentTable {
    /// Calls `each` with the number of values before the end of each of `documents`.
    pub(super) fn ends(
        &self,
        documents: Range<u64>,
        scratch: &mut Vec<u8>,
        mut each: impl FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        match self.kind {
            TableKind::Ends => {
                let bytes = self.index.slice(documents.start * 8..documents.end * 8, scratch)?;
                entries(bytes).try_for_each(each)
            }
            TableKind::Sequences { firsts_at, offsets_at, sequences, width, tokens } => {
                // The end of a document is the first sequence of the next one.
                let firsts = firsts_at + (documents.start + 1) * 8..firsts_at + (documents.end + 1) * 8;
                let firsts: Vec<u64> = entries(self.index.slice(firsts, scratch)?).collect();
                let (low, high) = match (firsts.first(), firsts.last()) {
                    (Some(low), Some(high)) if low <= high && *high <= sequences => (*low, *high),
                    _ => return Err(Error::data("the index of the documents changed while it was read")),
                };
                let offsets = offsets_at + low * 8..offsets_at + (high + 1).min(sequences) * 8;
                let offsets = self.index.slice(offsets, scratch)?.as_chunks().0;
                firsts.into_iter().try_for_each(|first| {
                    let place = first.checked_sub(low).and_then(|place| offsets.get(place as usize));
                    each(place.map_or(tokens, |offset| u64::from_le_bytes(*offset) / width))
                })
            }
        }
    }

    /// Cuts the documents into blocks. Fails unless the ends rise to `tokens`.
    pub(super) fn cut(&self, tokens: u64, options: &OpenOptions) -> Result<(Vec<BlockMeta>, Vec<BlockDocuments>)> {
        let (mut blocks, mut documents, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
        let mut block = BlockDocuments { first: 0, count: 0, start: 0 };
        let (mut filled, mut last, mut document) = (0, 0, 0);
        let mut push = |block: &mut BlockDocuments, filled: &mut u64, end: u64| {
            if end > block.start {
                let tokens = end - block.start;
                let first_row = block.first;
                blocks.push(BlockMeta { tokens, starts: *filled, ends: *filled, decoded_bytes: 0, first_row });
                documents.push(*block);
            }
            *block = BlockDocuments { first: block.first + block.count, count: 0, start: end };
            *filled = 0;
        };
        for start in (0..self.documents).step_by(PIECE as usize) {
            let piece = start..self.documents.min(start + PIECE);
            self.ends(piece, &mut scratch, |end| {
                if end < last || end > tokens {
                    return Err(Error::data(format!(
                        "the index of the documents is damaged: document {document} ends after {end} tokens, expected \
                         {last} to {tokens}; write or copy the files again"
                    ))
                    .at_row(document));
                }
                // The ends of several documents in a block are kept in 32 bits.
                if block.count > 0 && end - block.start > u64::from(u32::MAX) {
                    push(&mut block, &mut filled, last);
                }
                block.count += 1;
                filled += u64::from(end > last);
                (last, document) = (end, document + 1);
                if end - block.start >= options.block_tokens || block.count >= MAX_DOCUMENTS {
                    push(&mut block, &mut filled, end);
                }
                Ok(())
            })?;
        }
        push(&mut block, &mut filled, last);
        if last != tokens {
            return Err(Error::data(format!(
                "the index of the documents ends after {last} tokens: expected {tokens}; it belongs to another file, or \
                 the file is cut"
            )));
        }
        Ok((blocks, documents))
    }

    /// Appends the ends of the non-empty documents of `block`, counted from the start of the block.
    pub(super) fn ends_in(&self, block: BlockDocuments, scratch: &mut Vec<u8>, list: &mut Vec<u32>) -> Result<()> {
        let mut last = 0;
        self.ends(block.first..block.first + block.count, scratch, |end| {
            let end = end.checked_sub(block.start).and_then(|end| u32::try_from(end).ok());
            let end = end.filter(|end| *end >= last);
            let end = end.ok_or_else(|| Error::data("the index of the documents changed while it was read"))?;
            if end > last {
                list.push(end);
            }
            last = end;
            Ok(())
        })
    }
}
