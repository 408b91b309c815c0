//! Holdout: sequences kept out of training, as a closed form.
//!
//! Of every run of `every` consecutive sequences one is held out, at a place that a fixed hash of the run's number draws. The choice depends on no
//! seed and not on the corpus' length, so that no other run of a training, and no corpus that grew, ever mixes the two sides.

use super::permutation::{derive_key, reduce};
use crate::settings::{Config, Split};

const KEY: u64 = 0x686f_6c64_6f75_7400;

/// One side of a corpus whose sequences are split in two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Side {
    /// Nothing is held out.
    #[default]
    All,
    /// All but one of each run of so many sequences; at least 2.
    Train(u64),
    /// That one.
    Holdout(u64),
}

impl Side {
    /// The side of each corpus that `config` delivers.
    pub fn of(config: &Config) -> Self {
        match (config.holdout, config.split) {
            (None, _) => Self::All,
            (Some(every), Split::Train) => Self::Train(every),
            (Some(every), Split::Holdout) => Self::Holdout(every),
        }
    }

    /// Sequences of this side among the first `sequences` of the corpus.
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

    /// The corpus' sequence that is number `index` of this side.
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
            let list = |side: Side, sequences| -> Vec<u64> {
                (0..side.count(sequences)).map(|index| side.sequence(index)).collect()
            };
            let train = list(Side::Train(every), sequences);
            let held = list(Side::Holdout(every), sequences);
            prop_assert!(held.len() as u64 <= sequences.div_ceil(every) && held.len() as u64 >= sequences / every);
            let mut all = [train.clone(), held.clone()].concat();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(0..sequences));
            prop_assert!(list(Side::Train(every), sequences + grown).starts_with(&train));
            prop_assert!(list(Side::Holdout(every), sequences + grown).starts_with(&held));
        }
    }
}
