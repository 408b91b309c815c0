//! Uncompressed Arrow shards: tokens are read in place, from the mapping or by position.
//!
//! A block is a run of documents inside one record batch. The shard keeps the place of each block's
//! tokens and offsets, and reads any window of a block without decoding.

use std::ops::Range;

use super::messages::{FileRange, Messages};
use super::{Column, RowShape, unpack};
use crate::error::{Error, Result};
use crate::format::{AnyShard, BlockMeta, Ends, EndsScratch, OpenOptions, RandomShard, ShardInfo, TokenColumn};
use crate::settings::Config;
use crate::storage::{Reads, SourceFile};
use crate::text::{escaped, number_of};
use crate::tokens::{Dtype, Tokens};

/// Record batches with fewer tokens cost more to index than to read.
const SMALL_BATCH: u64 = 16 << 10;

#[derive(Debug)]
pub(super) struct MappedArrow {
    info: ShardInfo,
    column: Column,
    batches: usize,
    /// Place of each of `info.blocks`.
    locations: Vec<BlockLocation>,
}

/// Place of a block in the file.
#[derive(Clone, Copy, Debug)]
struct BlockLocation {
    /// The bytes of its values. Packed booleans begin in them at bit `bit`.
    tokens: FileRange,
    bit: u8,
    /// The list offsets of the block: one more than it has rows.
    offsets: FileRange,
    /// Whether any document of the block is empty.
    has_empty: bool,
}

impl MappedArrow {
    pub(super) fn new(file: SourceFile, messages: Messages) -> Self {
        let Messages { format, column, not_read, batches, runs, rows, .. } = messages;
        let width = column.dtype.size() as u64;
        let (mut metas, mut blocks) = (Vec::with_capacity(runs.len()), Vec::with_capacity(runs.len()));
        let mut runs = runs.into_iter();
        let offset_width = if let RowShape::List { offset_width } = column.kind { offset_width as u64 } else { 0 };
        for batch in &batches {
            for run in runs.by_ref().take(batch.runs) {
                let (start, len, bit) = match column.dtype {
                    Dtype::Bool => (run.start / 8, (run.start % 8 + run.tokens).div_ceil(8), (run.start % 8) as u8),
                    _ => (run.start * width, run.tokens * width, 0),
                };
                blocks.push(BlockLocation {
                    tokens: FileRange { start: batch.tokens.start + start, len },
                    bit,
                    offsets: FileRange {
                        start: batch.offsets.start + run.row * offset_width,
                        len: (run.rows + 1) * offset_width,
                    },
                    has_empty: run.filled < run.rows,
                });
                metas.push(BlockMeta {
                    tokens: run.tokens,
                    starts: run.filled,
                    ends: run.filled,
                    decoded_bytes: 0,
                    first_row: batch.first_row + run.row,
                });
            }
        }
        if column.kind == RowShape::Plain {
            as_one_document(&mut metas);
        }
        file.advise_random();
        let token_column = TokenColumn::of(&column.name, column.kind == RowShape::Plain);
        let info = ShardInfo { file, format, dtype: column.dtype, column: token_column, not_read, rows, blocks: metas };
        Self { info, column, batches: batches.len(), locations: blocks }
    }

    /// The byte of the file that holds token `token` of block `block`.
    fn byte_of(&self, block: usize, token: u64) -> u64 {
        let BlockLocation { tokens, bit, .. } = self.locations[block];
        match self.column.dtype {
            Dtype::Bool => tokens.start + (u64::from(bit) + token) / 8,
            dtype => tokens.start + token * dtype.size() as u64,
        }
    }
}

/// Marks all blocks as parts of one document.
pub(super) fn as_one_document(metas: &mut [BlockMeta]) {
    let last = metas.len().saturating_sub(1);
    for (index, meta) in metas.iter_mut().enumerate() {
        meta.starts = u64::from(index == 0);
        meta.ends = u64::from(index == last);
    }
}

impl AnyShard for MappedArrow {
    fn info(&self) -> &ShardInfo {
        &self.info
    }

    fn info_mut(&mut self) -> &mut ShardInfo {
        &mut self.info
    }

    fn index_bytes(&self) -> u64 {
        (size_of_val(self) + size_of_val(self.locations.as_slice())) as u64
    }

    fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        let tokens: u64 = self.info.blocks.iter().map(|meta| meta.tokens).sum();
        if self.batches > 1 && tokens / (self.batches as u64) < SMALL_BATCH {
            advice.push(format!(
                "record batches hold {} tokens on average: batches of {SMALL_BATCH} or more open faster",
                tokens / self.batches as u64
            ));
        }
        if self.column.dtype == Dtype::I64 {
            advice.push("tokens take 8 bytes: int32 or uint16 halves or quarters the file and the reading".to_owned());
        }
        advice
    }

    fn describe(&self) -> String {
        format!(
            "column `{}`, {}, uncompressed, read in place",
            escaped(&self.column.name),
            number_of(self.batches as u64, "record batch")
        )
    }

    fn row_lengths(&self) -> Result<Vec<Option<u64>>> {
        // The record batches are not kept, because only messages need them again.
        let options = OpenOptions {
            token_column: Some(self.column.name.clone()),
            is_field: self.column.is_field,
            ..OpenOptions::of(&Config::default())
        };
        let messages = Messages::read(&mut Reads::new(self.info.file.clone()), self.info.format, &options)?;
        let mut lengths = Vec::new();
        for batch in &messages.batches {
            let [offsets, validity] = [batch.offsets, batch.validity].map(|part| self.info.file.bytes(part.range()));
            lengths.extend(self.column.row_lengths(batch, &offsets?, &validity?)?);
        }
        Ok(lengths)
    }
}

impl RandomShard for MappedArrow {
    fn tokens<'a>(&'a self, block: usize, range: Range<u64>, scratch: &'a mut Vec<u8>) -> Result<Tokens<'a>> {
        self.info.file.check_window()?;
        let width = self.column.dtype.size() as u64;
        let BlockLocation { tokens: all, bit, .. } = self.locations[block];
        if self.column.dtype == Dtype::Bool {
            let bits = u64::from(bit) + range.start..u64::from(bit) + range.end;
            let packed = self.info.file.bytes(all.start + bits.start / 8..all.start + bits.end.div_ceil(8))?;
            scratch.clear();
            unpack(&packed, bits.start % 8..bits.start % 8 + (range.end - range.start), scratch);
            return Ok(Tokens::new(Dtype::Bool, scratch));
        }
        debug_assert!(range.end * width <= all.len, "window outside of its block");
        let bytes = self.info.file.slice(all.start + range.start * width..all.start + range.end * width, scratch)?;
        Ok(Tokens::new(self.column.dtype, bytes))
    }

    fn mapped(&self, block: usize, token: u64) -> Option<&[u8]> {
        let all = self.locations[block].tokens;
        let from = self.byte_of(block, token);
        self.info.file.mapped()?.get(from as usize..(all.start + all.len) as usize)
    }

    fn ends<'a>(&'a self, block: usize, scratch: &'a mut EndsScratch) -> Result<Ends<'a>> {
        let meta = &self.info.blocks[block];
        let width = match self.column.kind {
            RowShape::List { offset_width } => offset_width,
            RowShape::FixedSizeList { length } => return Ok(Ends::Fixed { length, count: meta.ends as usize }),
            RowShape::Plain => return Ok(Ends::Fixed { length: meta.tokens, count: meta.ends as usize }),
        };
        self.info.file.check_window()?;
        let BlockLocation { offsets, has_empty, .. } = self.locations[block];
        let bytes = self.info.file.slice(offsets.range(), &mut scratch.bytes)?;
        let all = Ends::Offsets { bytes, width };
        if !has_empty {
            return Ok(all);
        }
        scratch.list.clear();
        let mut last = 0;
        for index in 0..all.len() {
            let end = all.get(index);
            if end > last {
                let end32 = u32::try_from(end).map_err(|_| {
                    Error::data(
                        "a block of more than 2^32 tokens holds empty documents; rewrite it with smaller batches",
                    )
                })?;
                scratch.list.push(end32);
            }
            last = end;
        }
        Ok(Ends::List(&scratch.list))
    }

    fn will_need(&self, block: usize, range: Range<u64>) {
        self.info.file.will_need(self.byte_of(block, range.start)..self.byte_of(block, range.end));
    }

    fn is_resident(&self, block: usize, range: Range<u64>) -> bool {
        self.info.file.is_resident(self.byte_of(block, range.start))
    }

    fn row_of(&self, block: usize, token: u64) -> Option<u64> {
        let first = self.info.blocks.get(block)?.first_row;
        let row = match self.column.kind {
            RowShape::Plain => token,
            RowShape::FixedSizeList { length } => token / length.max(1),
            RowShape::List { offset_width } => {
                let range = self.locations[block].offsets.range();
                let mut scratch = Vec::new();
                let offsets = self.info.file.slice(range, &mut scratch).ok()?;
                let offset = |index: u64| super::read_offset(offsets, offset_width, index).ok();
                let base = offset(0)?;
                let rows = (offsets.len() / offset_width) as u64 - 1;
                (0..rows).find(|row| offset(row + 1).is_some_and(|end| end > base + token))?
            }
        };
        Some(first + row)
    }
}
