//! Balance: shares out the rows of a global batch so that ranks get about equal work.
//!
//! The rules are frozen:
//!
//! 1. The rows are sorted by cost, the largest first. Rows of equal cost keep their order.
//! 2. Each row goes to the rank with the least cost so far, among the ranks that have fewer rows
//!    than their share. If ranks are equal, the first of them
//!    takes the row.
//! 3. The rows of a rank keep the order that they have in the global batch.
//!
//! So every rank gets equally many rows. The tests hold that the costs of two ranks differ by no
//! more than the largest row and the smallest row do.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Shares out rows with these `costs` to `ranks` ranks. Gives the numbers of the rows of each rank.
///
/// # Panics
/// Panics unless `ranks` divides the number of rows.
pub(crate) fn deal(costs: &[u64], ranks: usize) -> Vec<Vec<usize>> {
    assert!(ranks > 0 && costs.len().is_multiple_of(ranks), "{} rows for {ranks} ranks", costs.len());
    let mut rows: Vec<usize> = (0..costs.len()).collect();
    rows.sort_by_key(|row| Reverse(costs[*row]));
    let share = costs.len() / ranks;
    let mut dealt = vec![Vec::with_capacity(share); ranks];
    let mut open: BinaryHeap<_> = (0..ranks).map(|rank| Reverse((0_u128, rank))).collect();
    for row in rows {
        let Some(Reverse((cost, rank))) = open.pop() else { break };
        dealt[rank].push(row);
        if dealt[rank].len() < share {
            open.push(Reverse((cost + u128::from(costs[row]), rank)));
        }
    }
    dealt.iter_mut().for_each(|rows| rows.sort_unstable());
    dealt
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_row_has_one_rank_and_sums_are_close(
            ranks in 1usize..9, rounds in 0usize..12,
            pool in prop::collection::vec(prop_oneof![0u64..9, 0u64..1 << 40, any::<u64>()], 96),
        ) {
            let costs = &pool[..ranks * rounds];
            let dealt = deal(costs, ranks);
            prop_assert_eq!(dealt.len(), ranks);
            prop_assert!(dealt.iter().all(|rows| rows.len() == rounds && rows.is_sorted()));
            let mut all: Vec<usize> = dealt.iter().flatten().copied().collect();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(0..costs.len()));
            let sum = |rows: &Vec<usize>| rows.iter().map(|row| u128::from(costs[*row])).sum::<u128>();
            let sums: Vec<u128> = dealt.iter().map(sum).collect();
            let widest = costs.iter().max().zip(costs.iter().min()).map_or(0, |(most, least)| most - least);
            let [least, most] = [sums.iter().min(), sums.iter().max()].map(|sum| sum.copied().unwrap_or(0));
            prop_assert!(most - least <= u128::from(widest), "{:?}", sums);
        }
    }

    #[test]
    fn the_dealing_is_frozen() {
        assert_eq!(deal(&[5, 1, 9, 9, 2, 4], 2), [[0, 1, 2], [3, 4, 5]]);
        assert_eq!(deal(&[7, 7, 7, 7], 2), [[0, 2], [1, 3]]);
        assert_eq!(deal(&[100, 3, 2, 1, 0, 0], 2), [[0, 4, 5], [1, 2, 3]]);
        assert_eq!(deal(&[3, 2, 1], 3), [[0], [1], [2]]);
    }
}
