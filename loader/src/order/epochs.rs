//! EpochChain: numbers the delivered positions of consecutive epochs by one row of indices.
//!
//! Takes the length of each epoch and the skipped positions. Gives the index of any position, and
//! the position at any index. Both cost a binary search over a handful of pieces and no list.
//! Ranks, steps and limits are arithmetic on these indices.
//!
//! Skipping does not renumber positions. A saved position therefore means the same sequence,
//! whatever is skipped after it. Epochs have different lengths only where positions are skipped or
//! where the corpus grew between two epochs. All other epochs are counted by multiplication.

use crate::settings::Skip;

/// Number of positions of an epoch that has no end.
pub const ENDLESS: u64 = 1 << 63;

/// The positions that one pass delivers, in order.
#[derive(Clone, Debug)]
pub struct EpochChain {
    /// Sorted and disjoint.
    skips: Vec<Skip>,
    /// Sorted by epoch. The last piece has no end.
    pieces: Vec<EqualEpochs>,
    /// The epoch after the last one. `None` if the chain has no end.
    end_epoch: Option<u64>,
}

/// Consecutive epochs of equal length.
#[derive(Clone, Copy, Debug)]
struct EqualEpochs {
    first_epoch: u64,
    /// Index of the first delivered position of `first_epoch`.
    start: u64,
    /// Number of positions of each epoch.
    positions: u64,
    /// Number of these positions that are delivered.
    delivered: u64,
}

impl EpochChain {
    /// Chains `count` epochs, beginning with epoch `first`; `None` chains epochs without end.
    ///
    /// `positions` gives the length of an epoch. `changes` lists the epochs at which this length
    /// may change.
    pub fn new(
        first: u64,
        count: Option<u64>,
        skips: &[Skip],
        changes: impl IntoIterator<Item = u64>,
        positions: impl Fn(u64) -> u64,
    ) -> Self {
        let skips = merged(skips);
        let mut borders: Vec<u64> = std::iter::once(first)
            .chain(changes)
            .chain(skips.iter().flat_map(|skip| [skip.epoch, skip.epoch + 1]))
            .filter(|epoch| *epoch >= first)
            .collect();
        borders.sort_unstable();
        borders.dedup();
        let mut pieces: Vec<EqualEpochs> = Vec::with_capacity(borders.len());
        for epoch in borders {
            let start = pieces.last().map_or(0, |piece| piece.start_of(epoch));
            let positions = positions(epoch);
            let left_out: u64 = of_epoch(&skips, epoch).map(|skip| within(skip, positions)).sum();
            pieces.push(EqualEpochs { first_epoch: epoch, start, positions, delivered: positions - left_out });
        }
        Self { skips, pieces, end_epoch: count.map(|count| first.saturating_add(count)) }
    }

    /// Number of indices. `None` if the chain has no end.
    pub fn len(&self) -> Option<u64> {
        let end = self.end_epoch?;
        Some(self.start_of(end)).filter(|len| *len < ENDLESS / 2)
    }

    /// The epoch after the last one. `None` if the chain has no end.
    pub fn end_epoch(&self) -> Option<u64> {
        self.len().and(self.end_epoch)
    }

    /// Whether the chain delivers nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Index of the first delivered position of `epoch`.
    pub fn start_of(&self, epoch: u64) -> u64 {
        self.piece_of(epoch).start_of(epoch)
    }

    /// Number of delivered positions of `epoch`.
    pub fn delivered(&self, epoch: u64) -> u64 {
        self.piece_of(epoch).delivered
    }

    /// Index of the first position of the last epoch that delivers any.
    pub fn last_epoch(&self) -> u64 {
        let (Some(len), Some(end)) = (self.len(), self.end_epoch) else { return 0 };
        if len == 0 {
            return 0;
        }
        let (epoch, _) = self.at(len - 1);
        debug_assert!(epoch < end);
        self.start_of(epoch)
    }

    /// Number of epochs that begin before `index`.
    pub fn epochs_before(&self, index: u64) -> u64 {
        if index == 0 { 0 } else { self.at(index - 1).0 + 1 - self.pieces[0].first_epoch }
    }

    /// Epoch and position of `index`.
    ///
    /// # Panics
    /// If the chain ends before `index`.
    pub fn at(&self, index: u64) -> (u64, u64) {
        let at = self.pieces.partition_point(|piece| piece.start <= index);
        // Several pieces can have the same start. Only the last of them has positions.
        let piece = &self.pieces[at - 1];
        assert!(piece.delivered > 0, "index {index} is past the end");
        let epoch = piece.first_epoch + (index - piece.start) / piece.delivered;
        let mut position = (index - piece.start) % piece.delivered;
        for skip in of_epoch(&self.skips, epoch) {
            if skip.start > position {
                break;
            }
            position += skip.end - skip.start;
        }
        (epoch, position)
    }

    /// Index of the first delivered position at or after `position` of `epoch`. It may belong to a
    /// later epoch.
    pub fn index_of(&self, epoch: u64, position: u64) -> u64 {
        let piece = self.piece_of(epoch);
        let position = position.min(piece.positions);
        let left_out: u64 = of_epoch(&self.skips, epoch).map(|skip| within(skip, position)).sum();
        piece.start_of(epoch).saturating_add(position - left_out)
    }

    /// Epoch and position that a state at `index` contains.
    ///
    /// At the end of the chain, the position is the length of the last epoch.
    pub fn state_at(&self, index: u64) -> (u64, u64) {
        match (self.len(), self.end_epoch) {
            (Some(len), Some(end)) if index >= len => match end.checked_sub(1) {
                Some(last) if last >= self.pieces[0].first_epoch => (last, self.piece_of(last).positions),
                _ => (end, 0),
            },
            _ => self.at(index),
        }
    }

    fn piece_of(&self, epoch: u64) -> &EqualEpochs {
        let at = self.pieces.partition_point(|piece| piece.first_epoch <= epoch);
        &self.pieces[at.max(1) - 1]
    }
}

impl EqualEpochs {
    fn start_of(&self, epoch: u64) -> u64 {
        epoch.saturating_sub(self.first_epoch).saturating_mul(self.delivered).saturating_add(self.start)
    }
}

fn of_epoch(skips: &[Skip], epoch: u64) -> impl Iterator<Item = &Skip> {
    let first = skips.partition_point(|skip| skip.epoch < epoch);
    skips[first..].iter().take_while(move |skip| skip.epoch == epoch)
}

/// Number of positions that `skip` has before `position`.
fn within(skip: &Skip, position: u64) -> u64 {
    skip.end.min(position).saturating_sub(skip.start)
}

/// Sorts `skips`, removes empty ones, and joins those that touch or overlap.
pub fn merged(skips: &[Skip]) -> Vec<Skip> {
    let mut sorted: Vec<Skip> = skips.iter().copied().filter(|skip| skip.start < skip.end).collect();
    sorted.sort_unstable();
    let mut merged: Vec<Skip> = Vec::with_capacity(sorted.len());
    for skip in sorted {
        match merged.last_mut() {
            Some(last) if last.epoch == skip.epoch && skip.start <= last.end => last.end = last.end.max(skip.end),
            _ => merged.push(skip),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Lists every delivered position with its epoch by brute force.
    fn listed(first: u64, count: u64, skips: &[Skip], positions: impl Fn(u64) -> u64) -> Vec<(u64, u64)> {
        let skipped = |epoch, position| {
            skips.iter().any(|skip| skip.epoch == epoch && (skip.start..skip.end).contains(&position))
        };
        (first..first + count)
            .flat_map(|epoch| (0..positions(epoch)).map(move |position| (epoch, position)))
            .filter(|(epoch, position)| !skipped(*epoch, *position))
            .collect()
    }

    proptest! {
        #[test]
        fn indices_and_positions_belong_together(
            first in 0u64..4, count in 0u64..6, small in 0u64..20, grown in 0u64..10, grows_at in 0u64..8,
            skips in prop::collection::vec((0u64..8, 0u64..30, 0u64..12), 0..6),
        ) {
            let skips: Vec<Skip> =
                skips.into_iter().map(|(epoch, start, len)| Skip { epoch, start, end: start + len }).collect();
            let positions = |epoch: u64| small + if epoch >= grows_at { grown } else { 0 };
            let epochs = EpochChain::new(first, Some(count), &skips, [grows_at], positions);
            let expected = listed(first, count, &skips, positions);
            prop_assert_eq!(epochs.len(), Some(expected.len() as u64));
            for (index, (epoch, position)) in expected.iter().enumerate() {
                prop_assert_eq!(epochs.at(index as u64), (*epoch, *position));
                prop_assert_eq!(epochs.index_of(*epoch, *position), index as u64);
                prop_assert_eq!(epochs.state_at(index as u64), (*epoch, *position));
            }
            for epoch in first..first + count {
                for position in 0..positions(epoch) + 3 {
                    let after = expected.iter().take_while(|at| **at < (epoch, position)).count();
                    prop_assert_eq!(epochs.index_of(epoch, position), after as u64);
                }
            }
            let (epoch, position) = epochs.state_at(epochs.len().unwrap());
            prop_assert_eq!(epochs.index_of(epoch, position), epochs.len().unwrap());
        }
    }

    #[test]
    fn a_chain_without_end_counts_on() {
        let skip = Skip { epoch: 1, start: 0, end: 4 };
        let epochs = EpochChain::new(0, None, &[skip], [], |_| 10);
        assert_eq!(epochs.len(), None);
        assert_eq!(epochs.at(10), (1, 4));
        assert_eq!(epochs.at(16), (2, 0));
        assert_eq!(epochs.at(16 + 10_000_000), (1_000_002, 0));
    }
}
