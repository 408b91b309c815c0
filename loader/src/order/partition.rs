//! Partition: decides which positions a rank receives at which step.
//!
//! A global batch is a run of consecutive indices of an [`EpochChain`](super::epochs::EpochChain).
//! Row `j` of rank `r` of `W` ranks has the index `step * batch_size * W + j * W + r`. Every rank
//! has the same number of steps under every remainder rule.

use crate::error::{Error, Result};
use crate::settings::Remainder;

/// The rule that groups indices into batches, for one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grouping {
    /// Rows per rank and step.
    pub batch_size: u64,
    /// Data-parallel rank.
    pub rank: u64,
    /// Data-parallel size.
    pub world_size: u64,
    /// The rule for positions that do not fill the last global batch.
    pub remainder: Remainder,
}

/// The content of one row of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchRow {
    /// The position with this index in the chain of epochs.
    Index(u64),
    /// The position with this index, delivered a second time to fill the last batch.
    Repeated(u64),
    /// Padding, without any position.
    Padding,
}

impl Grouping {
    /// Number of positions of one global batch.
    pub fn global_batch(&self) -> u64 {
        self.batch_size * self.world_size
    }

    /// Number of lanes, out of `lanes`, from which a rank draws. A position is on lane `position`
    /// modulo `lanes`.
    pub fn lanes(&self, lanes: u64) -> u64 {
        let (mut divisor, mut rest) = (lanes, self.world_size);
        while rest > 0 {
            (divisor, rest) = (rest, divisor % rest);
        }
        lanes / divisor
    }

    /// Number of positions of an epoch with `full` full sequences. `tail` tells whether tokens are
    /// left over after them.
    pub fn positions(&self, full: u64, tail: bool) -> u64 {
        full + u64::from(tail && self.remainder != Remainder::Drop)
    }

    /// Number of steps of an epoch of `positions` positions. It is the same on every rank.
    pub fn steps(&self, positions: u64) -> u64 {
        match self.remainder {
            Remainder::Drop => positions / self.global_batch(),
            Remainder::Pad | Remainder::Wrap | Remainder::Short => positions.div_ceil(self.global_batch()),
        }
    }

    /// Fails if `Remainder::Short` would leave a rank without a row at the last step.
    pub fn check(&self, positions: u64) -> Result<()> {
        let last = positions % self.global_batch();
        if self.remainder == Remainder::Short && last != 0 && last < self.world_size {
            return Err(Error::config(format!(
                "`remainder` = short leaves {} of {} ranks without a row in the last batch ({positions} positions in global batches of {}): \
                 use drop, pad or wrap",
                self.world_size - last,
                self.world_size,
                self.global_batch()
            )));
        }
        Ok(())
    }

    /// Rows of this rank in the global batch that starts at index `start`.
    ///
    /// The chain of epochs has `end` indices, and its last epoch begins at index `last_epoch`.
    pub fn rows(&self, start: u64, end: u64, last_epoch: u64) -> impl Iterator<Item = BatchRow> + use<> {
        let Self { rank, world_size, remainder, .. } = *self;
        (0..self.batch_size).map(move |row| start + row * world_size + rank).filter_map(move |index| {
            if index < end {
                return Some(BatchRow::Index(index));
            }
            match remainder {
                Remainder::Pad => Some(BatchRow::Padding),
                Remainder::Wrap => Some(BatchRow::Repeated(last_epoch + (index - end) % (end - last_epoch))),
                Remainder::Drop | Remainder::Short => None,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranks_draw_from_their_share_of_the_lanes_where_they_divide_them() {
        for (lanes, world_size) in [(8, 1), (8, 2), (8, 8), (8, 3), (8, 6), (8, 64), (1, 5), (12, 8)] {
            let grouping = Grouping { batch_size: 3, rank: world_size / 2, world_size, remainder: Remainder::Drop };
            let positions = 3 * world_size * lanes;
            let mut seen: Vec<u64> = (0..lanes)
                .flat_map(|step| grouping.rows(step * grouping.global_batch(), positions, 0))
                .filter_map(|row| if let BatchRow::Index(position) = row { Some(position % lanes) } else { None })
                .collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len() as u64, grouping.lanes(lanes), "{lanes} {world_size}");
        }
    }

    proptest! {
        #[test]
        fn ranks_share_positions_without_gap_or_overlap(
            positions in 1u64..500, batch_size in 1u64..9, world_size in 1u64..9,
            remainder in prop::sample::select(vec![Remainder::Drop, Remainder::Pad, Remainder::Wrap, Remainder::Short]),
        ) {
            let of = |rank| Grouping { batch_size, rank, world_size, remainder };
            prop_assume!(of(0).check(positions).is_ok());
            let steps = of(0).steps(positions);
            let mut seen = vec![0u32; positions as usize];
            for step in 0..steps {
                for rank in 0..world_size {
                    let rows: Vec<BatchRow> = of(rank).rows(step * of(rank).global_batch(), positions, 0).collect();
                    prop_assert!(!rows.is_empty());
                    prop_assert!(remainder == Remainder::Short || rows.len() as u64 == batch_size);
                    for row in rows {
                        if let BatchRow::Index(position) | BatchRow::Repeated(position) = row { seen[position as usize] += 1; }
                    }
                }
            }
            let whole = match remainder {
                Remainder::Drop => steps * batch_size * world_size,
                _ => positions,
            };
            prop_assert!(seen[..whole as usize].iter().all(|count| *count >= 1));
            prop_assert!(seen[whole as usize..].iter().all(|count| *count == 0));
            if remainder != Remainder::Wrap {
                prop_assert!(seen.iter().all(|count| *count <= 1));
            }
        }
    }
}
