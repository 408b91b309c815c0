//! Compressed Arrow shards: record batches are decoded whole.
//!
//! Several tiny record batches make one block. Opening decompresses the offsets of every batch to
//! find its documents; tokens stay compressed until a block is read.

use std::io::Read;
use std::ops::Range;

use arrow_ipc::CompressionType;

use super::messages::{BatchParts, FileRange, Messages};
use super::random::as_one_document;
use super::{Column, DocumentRun, RowShape, runs, stored_bytes, unpack};
use crate::error::{Error, Result};
use crate::format::{AnyShard, BlockMeta, BlockShard, DecodedBlock, OpenOptions, ShardInfo, TokenColumn};
use crate::storage::SourceFile;
use crate::text::{escaped, number_of};
use crate::tokens::{Dtype, Tokens, negative_id};

/// Larger than the ratio of any codec. A buffer that claims to decompress to more is damaged.
pub(super) const MAX_RATIO: u64 = 1 << 16;

#[derive(Debug)]
pub(super) struct CompressedArrow {
    info: ShardInfo,
    column: Column,
    batches: Vec<BatchParts>,
    /// Record batches of each of `info.blocks`.
    ranges: Vec<Range<usize>>,
    /// Largest number of bytes that one buffer may hold.
    most_bytes: u64,
}

impl CompressedArrow {
    pub(super) fn new(file: SourceFile, messages: Messages, options: &OpenOptions) -> Result<Self> {
        let Messages { format, column, not_read, batches, rows, .. } = messages;
        let token_column = TokenColumn::of(&column.name, column.kind == RowShape::Plain);
        let info =
            ShardInfo { file, format, dtype: column.dtype, column: token_column, not_read, rows, blocks: Vec::new() };
        let most_bytes = options.memory_budget;
        let mut shard = Self { info, column, batches, ranges: Vec::new(), most_bytes };
        let mut pending: Option<(BlockMeta, Range<usize>)> = None;
        for index in 0..shard.batches.len() {
            let (_, runs) = shard.runs(index)?;
            let tokens: u64 = runs.iter().map(|run| run.tokens).sum();
            if tokens == 0 {
                continue;
            }
            let filled: u64 = runs.iter().map(|run| run.filled).sum();
            let (meta, batches) = pending.get_or_insert_with(|| {
                let first_row = shard.batches[index].first_row;
                (BlockMeta { first_row, ..BlockMeta::default() }, index..index)
            });
            meta.tokens += tokens;
            meta.starts += filled;
            meta.ends += filled;
            batches.end = index + 1;
            if meta.tokens >= options.block_tokens
                && let Some(block) = pending.take()
            {
                shard.push(block);
            }
        }
        if let Some(block) = pending {
            shard.push(block);
        }
        if shard.column.kind == RowShape::Plain {
            as_one_document(&mut shard.info.blocks);
        }
        Ok(shard)
    }

    fn push(&mut self, (mut meta, batches): (BlockMeta, Range<usize>)) {
        meta.decoded_bytes = meta.tokens * self.column.dtype.size() as u64 + meta.ends * 4;
        self.info.blocks.push(meta);
        self.ranges.push(batches);
    }

    /// Finds the runs of documents of batch `index`, and its list offsets. The tokens stay
    /// compressed.
    fn runs(&self, index: usize) -> Result<(Vec<u8>, Vec<DocumentRun>)> {
        let batch = &self.batches[index];
        let whole = |part: FileRange| self.decompress(batch, part, None);
        let (offsets, validity, child_validity) =
            (whole(batch.offsets)?, whole(batch.validity)?, whole(batch.child_validity)?);
        let tokens = self.plain_len(batch, batch.tokens)?;
        self.column
            .check_lengths(batch, validity.len() as u64, offsets.len() as u64, child_validity.len() as u64, tokens)
            .map_err(|text| Error::data(format!("record batch {index} is damaged: {text}")))?;
        let mut found = Vec::new();
        runs(&self.column, batch, (&offsets, &validity, &child_validity), (u64::MAX, u64::MAX), &mut found)?;
        Ok((offsets, found))
    }

    /// Number of bytes of `part` after decompression.
    fn plain_len(&self, batch: &BatchParts, part: FileRange) -> Result<u64> {
        if batch.compression.is_none() || part.len == 0 {
            return Ok(part.len);
        }
        let mut bytes = Vec::new();
        let prefix = self.info.file.slice(part.start..part.start + part.len.min(8), &mut bytes)?;
        let prefix: [u8; 8] =
            prefix.try_into().map_err(|_| Error::data("a compressed buffer is shorter than its length"))?;
        match i64::from_le_bytes(prefix) {
            -1 => Ok(part.len - 8),
            len if len >= 0 && len as u64 <= part.len.saturating_mul(MAX_RATIO) => Ok(len as u64),
            len => Err(Error::data(format!("a compressed buffer of {} bytes claims to hold {len}", part.len))),
        }
    }

    /// Decompresses the first `limit` bytes of `part`, or all of it.
    fn decompress(&self, batch: &BatchParts, part: FileRange, limit: Option<u64>) -> Result<Vec<u8>> {
        let plain_len = self.plain_len(batch, part)?;
        let wanted = limit.unwrap_or(u64::MAX).min(plain_len) as usize;
        let mut scratch = Vec::new();
        let stored = self.info.file.slice(part.range(), &mut scratch)?;
        let Some(codec) = batch.compression else { return Ok(stored[..wanted].to_vec()) };
        let Some((prefix, stored)) = stored.split_at_checked(8) else { return Ok(Vec::new()) };
        if prefix == (-1i64).to_le_bytes() {
            return Ok(stored[..wanted].to_vec());
        }
        if wanted as u64 > self.most_bytes {
            return Err(Error::data(format!(
                "a compressed buffer holds {wanted} bytes, more than `memory_budget` = {}: write smaller record \
                 batches, or raise it",
                self.most_bytes
            )));
        }
        let mut plain = Vec::new();
        plain
            .try_reserve_exact(wanted)
            .map_err(|error| Error::data(format!("no memory for a buffer of {wanted} bytes")).with_source(error))?;
        plain.resize(wanted, 0);
        let whole = wanted as u64 == plain_len;
        let result = match codec {
            CompressionType::ZSTD if whole => zstd::bulk::decompress_to_buffer(stored, &mut plain)
                .and_then(|len| if len == wanted { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }),
            CompressionType::ZSTD => {
                zstd::stream::read::Decoder::new(stored).and_then(|mut reader| reader.read_exact(&mut plain))
            }
            CompressionType::LZ4_FRAME => lz4_flex::frame::FrameDecoder::new(stored).read_exact(&mut plain),
            other => Err(std::io::Error::other(format!("unknown codec {}", other.0))),
        };
        result.map_err(|error| {
            let message = format!("cannot decompress {} bytes of {} to {plain_len}", stored.len(), name_of(codec));
            Error::data(message).with_source(error)
        })?;
        Ok(plain)
    }

    /// Appends the tokens and document ends of batch `index`. At most `limit` tokens are needed.
    fn decode_batch(&self, index: usize, limit: Option<u64>, block: &mut DecodedBlock) -> Result<()> {
        let width = self.column.dtype.size();
        let batch = &self.batches[index];
        let offsets = self.decompress(batch, batch.offsets, None)?;
        let validity = self.decompress(batch, batch.validity, None)?;
        let child_validity = self.decompress(batch, batch.child_validity, None)?;
        let mut found = Vec::new();
        runs(&self.column, batch, (&offsets, &validity, &child_validity), (u64::MAX, u64::MAX), &mut found)?;

        // End of the needed tokens in the values.
        let mut left = limit.unwrap_or(u64::MAX);
        let mut reach = 0;
        for run in &found {
            let take = run.tokens.min(left);
            reach = run.start + take;
            left -= take;
            if left == 0 {
                break;
            }
        }
        let values = self.decompress(batch, batch.tokens, stored_bytes(self.column.dtype, reach))?;
        for run in &found {
            let end = (run.start + run.tokens).min(reach);
            if run.start >= end {
                break;
            }
            let base = (block.bytes.len() / width) as u64;
            if self.column.dtype == Dtype::Bool {
                unpack(&values, run.start..end, &mut block.bytes);
                self.push_ends(&offsets, run, end, base, &mut block.ends)?;
                continue;
            }
            let part = &values[run.start as usize * width..end as usize * width];
            let tokens = Tokens::new(self.column.dtype, part);
            if !self.column.is_field
                && let Some(at) = tokens.first_negative()
            {
                let row = self.row_of(batch, &offsets, run, run.start + at as u64);
                return Err(negative_id(tokens.get(at)).at_row(row));
            }
            block.bytes.extend_from_slice(part);
            self.push_ends(&offsets, run, end, base, &mut block.ends)?;
        }
        Ok(())
    }

    fn push_ends(&self, offsets: &[u8], run: &DocumentRun, reach: u64, base: u64, ends: &mut Vec<u32>) -> Result<()> {
        let mut last = run.start;
        for row in run.row..run.row + run.rows {
            let end = match self.column.kind {
                RowShape::List { offset_width } => super::read_offset(offsets, offset_width, row + 1)?,
                RowShape::FixedSizeList { length } => (row + 1) * length,
                RowShape::Plain => return Ok(()),
            };
            if end > reach {
                break;
            }
            if end > last {
                ends.push(end_of(base + end - run.start)?);
            }
            last = end;
        }
        Ok(())
    }

    /// Row of the shard that contains value `value` of `batch`.
    fn row_of(&self, batch: &BatchParts, offsets: &[u8], run: &DocumentRun, value: u64) -> u64 {
        let row = match self.column.kind {
            RowShape::List { offset_width } => (run.row..run.row + run.rows)
                .find(|row| super::read_offset(offsets, offset_width, row + 1).is_ok_and(|end| end > value))
                .unwrap_or(run.row),
            RowShape::FixedSizeList { length } => value / length.max(1),
            RowShape::Plain => value,
        };
        batch.first_row + row
    }
}

/// The place just after a document in its block.
fn end_of(tokens: u64) -> Result<u32> {
    u32::try_from(tokens)
        .map_err(|_| Error::data("a record batch holds more than 2^32 tokens; rewrite it with smaller ones"))
}

fn name_of(codec: CompressionType) -> &'static str {
    match codec {
        CompressionType::LZ4_FRAME => "lz4",
        CompressionType::ZSTD => "zstd",
        _ => "an unknown codec",
    }
}

impl AnyShard for CompressedArrow {
    fn info(&self) -> &ShardInfo {
        &self.info
    }

    fn info_mut(&mut self) -> &mut ShardInfo {
        &mut self.info
    }

    fn index_bytes(&self) -> u64 {
        (size_of_val(self) + size_of_val(self.ranges.as_slice()) + size_of_val(self.batches.as_slice())) as u64
    }

    fn advice(&self) -> Vec<String> {
        let mut advice =
            vec!["compressed Arrow has to be decoded: uncompressed Arrow is read in place, Parquet is decoded in smaller parts".to_owned()];
        let largest = self.info.blocks.iter().map(|meta| meta.tokens).max().unwrap_or(0);
        if largest > 4 << 20 {
            advice.push(format!(
                "a record batch holds {largest} tokens and cannot be split: write batches of about 128 Ki tokens"
            ));
        }
        if self.column.dtype == Dtype::I64 {
            advice.push("tokens take 8 bytes: int32 or uint16 halves or quarters the memory".to_owned());
        }
        advice
    }

    fn describe(&self) -> String {
        let codec = self.batches.iter().find_map(|batch| batch.compression);
        format!(
            "column `{}`, {}, {}",
            escaped(&self.column.name),
            number_of(self.batches.len() as u64, "record batch"),
            codec.map_or("uncompressed", name_of)
        )
    }

    fn row_lengths(&self) -> Result<Vec<Option<u64>>> {
        let mut lengths = Vec::new();
        for batch in &self.batches {
            let [offsets, validity] = [batch.offsets, batch.validity].map(|part| self.decompress(batch, part, None));
            lengths.extend(self.column.row_lengths(batch, &offsets?, &validity?)?);
        }
        Ok(lengths)
    }
}

impl BlockShard for CompressedArrow {
    fn block_dtype(&self) -> Dtype {
        self.column.dtype
    }

    fn decode_into(&self, block: usize, limit: Option<u64>, decoded: &mut DecodedBlock) -> Result<()> {
        let meta = &self.info.blocks[block];
        let place = |error: Error| error.at(self.info.path()).in_block(block as u64);
        self.info.file.check_unchanged().map_err(place)?;
        let width = self.column.dtype.size() as u64;
        meta.check_size(self.most_bytes).map_err(place)?;
        decoded.bytes.clear();
        decoded.ends.clear();
        let wanted = limit.unwrap_or(u64::MAX).min(meta.tokens) * width;
        decoded
            .bytes
            .try_reserve_exact(wanted as usize)
            .map_err(|error| place(Error::data(format!("no memory for {wanted} bytes")).with_source(error)))?;
        for index in self.ranges[block].clone() {
            let have = decoded.bytes.len() as u64 / width;
            if limit.is_some_and(|limit| have >= limit) {
                break;
            }
            self.decode_batch(index, limit.map(|limit| limit - have), decoded).map_err(place)?;
        }
        let tokens = decoded.bytes.len() as u64 / width;
        decoded.complete = tokens == meta.tokens;
        if !decoded.complete && limit.is_none_or(|limit| tokens < limit) {
            return Err(place(Error::data(format!("expected {} tokens, found {tokens}", meta.tokens))));
        }
        if self.column.kind == RowShape::Plain && decoded.complete && meta.ends == 1 {
            decoded.ends.push(end_of(tokens).map_err(place)?);
        }
        Ok(())
    }

    fn ends_into(&self, block: usize, ends: &mut Vec<u32>) -> Result<()> {
        let meta = &self.info.blocks[block];
        let place = |error: Error| error.at(self.info.path()).in_block(block as u64);
        self.info.file.check_unchanged().map_err(place)?;
        meta.check_size(self.most_bytes).map_err(place)?;
        ends.clear();
        if self.column.kind == RowShape::Plain {
            if meta.ends == 1 {
                ends.push(end_of(meta.tokens).map_err(place)?);
            }
            return Ok(());
        }
        let mut tokens = 0;
        for index in self.ranges[block].clone() {
            let (offsets, found) = self.runs(index).map_err(place)?;
            for run in &found {
                self.push_ends(&offsets, run, u64::MAX, tokens, ends).map_err(place)?;
                tokens += run.tokens;
            }
        }
        if tokens != meta.tokens {
            return Err(place(Error::data(format!("expected {} tokens, found {tokens}", meta.tokens))));
        }
        Ok(())
    }
}
