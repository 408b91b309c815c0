//! Finds the smallest type that holds every id of the sources.

use std::sync::atomic::{AtomicI64, Ordering};

use forebay::format::{self, OpenOptions};
use forebay::tokens::Dtype;
use indicatif::ProgressBar;
use rayon::prelude::*;

use super::content;
use super::source::SourceShard;

/// The types of ids, the smallest first.
pub(super) const DTYPES: [Dtype; 5] = [Dtype::U8, Dtype::U16, Dtype::I32, Dtype::U32, Dtype::I64];

/// The smallest type that holds the id `id`.
pub(super) fn smallest_for(id: i64) -> Dtype {
    DTYPES.into_iter().find(|dtype| id <= most(*dtype)).unwrap_or(Dtype::I64)
}

/// The smallest type that holds every id. Stops reading once no type smaller than the sources' type
/// is possible.
pub(super) fn smallest_dtype(sources: &[SourceShard], open: &OpenOptions, bar: &ProgressBar) -> forebay::Result<Dtype> {
    // The result has no ids of the small types with a sign: others of their size hold more.
    let written = |dtype: Dtype| match dtype {
        Dtype::I8 => Dtype::U8,
        Dtype::I16 => Dtype::U16,
        other => other,
    };
    let rank = |dtype: Dtype| DTYPES.iter().position(|other| *other == written(dtype));
    let fitting = smallest_for;
    let full = sources.iter().filter(|source| source.facts.counts.tokens > 0);
    let widest = full.map(|source| rank(source.facts.dtype)).max().flatten();
    let largest = AtomicI64::new(0);
    sources.par_iter().try_for_each(|source| {
        let shard = format::open(&source.file.path, open)?;
        let blocks: Vec<usize> = (0..shard.blocks().len()).collect();
        blocks.par_iter().try_for_each(|block| {
            // A stale value costs one more block. No other memory depends on it.
            if rank(fitting(largest.load(Ordering::Relaxed))) >= widest {
                return Ok(());
            }
            let found =
                largest_id(&shard, *block).map_err(|error| error.at(&source.file.path).in_block(*block as u64))?;
            largest.fetch_max(found, Ordering::Relaxed);
            bar.inc(shard.blocks()[*block].tokens);
            Ok(())
        })
    })?;
    Ok(fitting(largest.into_inner()))
}

fn largest_id(shard: &format::Shard, block: usize) -> forebay::Result<i64> {
    const PIECE_TOKENS: u64 = 1 << 20;
    let (mut bytes, mut ids) = (Vec::new(), Vec::new());
    let tokens = shard.blocks()[block].tokens;
    let shard = match shard {
        format::Shard::Random(shard) => shard,
        format::Shard::Block(shard) => {
            let decoded = shard.decode(block, None)?;
            let tokens = forebay::tokens::Tokens::new(shard.block_dtype(), &decoded.bytes);
            return Ok(content::largest_id(&tokens, &mut ids));
        }
    };
    shard.info().file.check_unchanged()?;
    let mut largest = 0;
    for start in (0..tokens).step_by(PIECE_TOKENS as usize) {
        let piece = shard.tokens(block, start..tokens.min(start + PIECE_TOKENS), &mut bytes)?;
        largest = largest.max(content::largest_id(&piece, &mut ids));
    }
    Ok(largest)
}

/// The largest id that `dtype` holds.
pub(super) fn most(dtype: Dtype) -> i64 {
    match dtype {
        Dtype::U8 => u8::MAX.into(),
        Dtype::U16 => u16::MAX.into(),
        Dtype::I32 => i32::MAX.into(),
        Dtype::U32 => u32::MAX.into(),
        Dtype::I64 => i64::MAX,
        other => unreachable!("no ids of type {}", other.name()),
    }
}
