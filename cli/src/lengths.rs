//! The distribution of document lengths.
//!
//! Counts how many documents have each length. So percentiles are exact, and the memory grows with
//! the number of different lengths alone.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::report::{grouped, number_of};

/// Most lines of a histogram. Shorter documents share the first line.
const MOST_LINES: usize = 12;
/// Width of the longest bar.
const BAR: u64 = 40;

/// How many documents have each length, in tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lengths {
    counts: BTreeMap<u64, u64>,
    documents: u64,
}

/// The lengths in one block. The first and the last document may belong to other blocks, too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BlockLengths {
    /// Tokens up to the first end of a document. `None` if no document ends here.
    first: Option<u64>,
    /// Lengths of the documents that begin and end here.
    whole: Vec<u64>,
    /// Tokens after the last end of a document.
    last: u64,
}

impl BlockLengths {
    /// The lengths in a block of `tokens` tokens whose documents end before the places `ends`.
    pub(crate) fn of(tokens: u64, ends: impl Iterator<Item = u64>) -> Self {
        let (mut first, mut whole, mut start) = (None, Vec::new(), 0);
        for end in ends {
            if first.is_none() {
                first = Some(end);
            } else {
                whole.push(end - start);
            }
            start = end;
        }
        Self { first, whole, last: tokens - start }
    }
}

impl Lengths {
    /// Adds the documents of a shard, from all its blocks in order.
    pub(crate) fn add_shard<'a>(&mut self, blocks: impl IntoIterator<Item = &'a BlockLengths>) {
        let mut begun = 0;
        for block in blocks {
            let Some(first) = block.first else {
                begun += block.last;
                continue;
            };
            self.add(begun + first);
            block.whole.iter().for_each(|length| self.add(*length));
            begun = block.last;
        }
    }

    fn add(&mut self, length: u64) {
        *self.counts.entry(length).or_default() += 1;
        self.documents += 1;
    }

    /// The length that at least `share` of the documents do not exceed.
    fn percentile(&self, share: f64) -> Option<u64> {
        let rank = ((self.documents as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        self.counts.iter().find_map(|(length, count)| {
            seen += count;
            (seen >= rank).then_some(*length)
        })
    }

    /// For each power of two: how many documents are no longer than it, and longer than half of it.
    fn histogram(&self) -> Vec<(u64, u64)> {
        let mut found: BTreeMap<u64, u64> = BTreeMap::new();
        for (length, count) in &self.counts {
            *found.entry(length.next_power_of_two()).or_default() += count;
        }
        let Some((longest, _)) = found.last_key_value() else { return Vec::new() };
        let shortest = longest >> (MOST_LINES - 1);
        let mut merged: BTreeMap<u64, u64> = BTreeMap::new();
        for (up_to, count) in &found {
            *merged.entry((*up_to).max(shortest.max(1))).or_default() += count;
        }
        merged.into_iter().collect()
    }

    /// Lines for readers: percentiles, and a bar for each power of two.
    pub(crate) fn lines(&self) -> Vec<String> {
        let Some([p50, p99]) = self.percentile(0.5).zip(self.percentile(0.99)).map(<[u64; 2]>::from) else {
            return Vec::new();
        };
        let longest = self.counts.last_key_value().map_or(0, |(length, _)| *length);
        let text = format!("p50 {}, p99 {}, longest {}", grouped(p50), grouped(p99), number_of(longest, "token"));
        let histogram = self.histogram();
        let most = histogram.iter().map(|(_, count)| *count).max().unwrap_or(1);
        let bars = histogram.into_iter().map(|(up_to, count)| {
            let bar = "#".repeat((count * BAR).div_ceil(most) as usize);
            let share = count as f64 * 100.0 / self.documents as f64;
            format!("up to {:>9} {share:5.1} %  {bar}", grouped(up_to))
        });
        std::iter::once(text).chain(bars).collect()
    }

    /// The same as one JSON object.
    pub(crate) fn json(&self) -> Value {
        let histogram: Vec<Value> =
            self.histogram().into_iter().map(|(up_to, count)| json!({"up_to": up_to, "documents": count})).collect();
        json!({
            "p50": self.percentile(0.5),
            "p99": self.percentile(0.99),
            "longest": self.counts.last_key_value().map(|(length, _)| *length),
            "histogram": histogram,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_over_several_blocks_are_put_together() {
        // Documents of 3, 4, 9 and 2 tokens, in blocks of 5, 6, 3 and 4 tokens.
        let blocks = [
            BlockLengths::of(5, [3].into_iter()),
            BlockLengths::of(6, [2].into_iter()),
            BlockLengths::of(3, [].into_iter()),
            BlockLengths::of(4, [2, 4].into_iter()),
        ];
        let mut lengths = Lengths::default();
        lengths.add_shard(&blocks);
        assert_eq!(lengths.counts, BTreeMap::from([(2, 1), (3, 1), (4, 1), (9, 1)]));
        assert_eq!(lengths.histogram(), [(2, 1), (4, 2), (16, 1)]);
        assert_eq!([0.0, 0.5, 0.75, 0.99].map(|share| lengths.percentile(share)), [2, 3, 4, 9].map(Some));
    }

    #[test]
    fn short_documents_share_the_first_line() {
        let mut lengths = Lengths::default();
        lengths.add_shard(&[BlockLengths::of(1 + 2 + 5000, [1, 3, 5003].into_iter())]);
        assert_eq!(lengths.histogram(), [(4, 2), (8192, 1)]);
        assert_eq!(lengths.lines().len(), 3);
        assert_eq!(Lengths::default().lines(), Vec::<String>::new());
    }
}
