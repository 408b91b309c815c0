//! Decides which sources make which shards, by their metadata alone.

use std::ops::Range;

use super::source::SourceShard;

/// Neighbouring sources that become shards of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SourceGroup {
    pub(super) sources: Range<usize>,
    pub(super) tokens: u64,
    pub(super) documents: u64,
    /// Whether it is one file with a plain column.
    pub(super) plain: bool,
    /// Number of tokens after which a shard ends.
    pub(super) shard_tokens: u64,
}

/// Groups neighbours as long as they make no more than one shard.
pub(super) fn groups(sources: &[SourceShard], shard_tokens: u64) -> Vec<SourceGroup> {
    let mut groups: Vec<SourceGroup> = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let counts = source.facts.counts;
        match groups.last_mut() {
            // `check` would call a shard of empty documents alone slow.
            Some(last)
                if !last.plain
                    && !source.plain
                    && (counts.tokens == 0 || last.tokens + counts.tokens <= shard_tokens) =>
            {
                last.sources.end = index + 1;
                last.tokens += counts.tokens;
                last.documents += counts.starts;
            }
            _ => groups.push(SourceGroup {
                sources: index..index + 1,
                tokens: counts.tokens,
                documents: counts.starts,
                plain: source.plain,
                shard_tokens: 0,
            }),
        }
    }
    for group in &mut groups {
        // All shards get one size, so that no rest holds next to nothing.
        let shards = ((group.tokens + shard_tokens / 2) / shard_tokens).max(1);
        group.shard_tokens = if group.plain { u64::MAX } else { group.tokens.div_ceil(shards).max(1) };
    }
    groups
}
