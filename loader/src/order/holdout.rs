//! Holdout: keeps some sequences out of training, by a formula instead of a list.
//!
//! Each run of `every` consecutive sequences holds out one sequence. A fixed hash of the run's
//! number draws its place in the run. The choice depends neither on the seed nor on the length of
//! the corpus. So no other run of the same training mixes the two sides, and neither does a corpus
//! that grew.

use crate::keys::{derive_key, reduce};
use crate::settings::{Config, Split};

const KEY: u64 = 0x686f_6c64_6f75_7400;

/// One side of a corpus whose sequences are split into training and holdout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SequenceSide {
    /// All sequences; the corpus has no holdout.
    #[default]
    All,
    /// All sequences except one of each run. The value is the length of a run, at least 2.
    Train(u64),
    /// The held-out sequence of each run. The value is the length of a run, at least 2.
    Holdout(u64),
}

impl SequenceSide {
    /// The side that `config` delivers of each corpus.
    pub fn of(config: &Config) -> Self {
        match (config.holdout, config.split) {
            (None, _) => Self::All,
            (Some(every), Split::Train) => Self::Train(every),
            (Some(every), Split::Holdout) => Self::Holdout(every),
        }
    }

    /// Number of sequences of this side among the first `sequences` of the corpus.
    pub fn count(self, sequences: u64) -> u64 {
        let held = |every: u64| {
            let rest = sequences % every;
            sequences / every + u64::from(held_place(sequences / every, every) < rest)
        };
        match self {
            Self::All => sequences,
            Self::Train(every) => sequences - held(every),
            Self::Holdout(every) => held(every),
        }
    }

    /// The corpus's number of the sequence that is number `index` of this side.
    pub fn sequence(self, index: u64) -> u64 {
        match self {
            Self::All => index,
            Self::Train(every) => {
                let (run, place) = (index / (every - 1), index % (every - 1));
                run * every + place + u64::from(place >= held_place(run, every))
            }
            Self::Holdout(every) => index * every + held_place(index, every),
        }
    }
}

fn held_place(run: u64, every: u64) -> u64 {
    reduce(derive_key(KEY, &[run]), every)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_sides_share_the_corpus_and_keep_their_sequences_when_it_grows(
            sequences in 0u64..2000, grown in 0u64..500, every in 2u64..60,
        ) {
            let list = |side: SequenceSide, sequences| -> Vec<u64> {
                (0..side.count(sequences)).map(|index| side.sequence(index)).collect()
            };
            let train = list(SequenceSide::Train(every), sequences);
            let held = list(SequenceSide::Holdout(every), sequences);
            prop_assert!(held.len() as u64 <= sequences.div_ceil(every) && held.len() as u64 >= sequences / every);
            let mut all = [train.clone(), held.clone()].concat();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(0..sequences));
            prop_assert!(list(SequenceSide::Train(every), sequences + grown).starts_with(&train));
            prop_assert!(list(SequenceSide::Holdout(every), sequences + grown).starts_with(&held));
        }
    }
}
