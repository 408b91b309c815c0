//! Mixture: decides which source stands at which position, and which of its sequences.
//!
//! Takes the sources' sizes and epochs and the stages of weights. Gives the draw at any position
//! without a list, by one division per source. Knows neither names nor files of sources.
//!
//! Every lane runs the schedule by itself, with a phase of its own. It draws from its own lane of
//! each source, so the ranks that own a lane decode no other lane.
//!
//! Inside a lane, the sources take turns. One cycle has as many places as the sum of the weights. A
//! balanced binary tree shares the places out between one half of the sources and the other half.
//! So one division per source gives the number of its turns before any place. The shares are exact
//! after each cycle. In between, a source is off by at most as many turns as the tree is deep.
//!
//! If every global batch must have exact counts, the cycle has the length of a global batch. The
//! phases of the lanes then make each global batch one whole cycle.
//!
//! Draw `k` of a source in a lane is place `k mod n` of the source's epoch `k / n`, where `n` is
//! the lane's share of that source. Each epoch of a source is therefore complete under all weights.
//! Weights change at stages. A source that has delivered all its epochs either ends the lane or
//! leaves the schedule.

use crate::order::epochs::ENDLESS;
use crate::settings::mixture::{Exhausted, Stage, apportioned};

/// Number of steps in which the weights move from one stage to the next.
pub const RAMP_STEPS: u64 = 64;

/// Largest number of places that only some lanes have at the end of an epoch.
///
/// The mixture leaves out these places if they are more. This happens where a source is drawn once
/// in millions of places.
const MAX_REST: u64 = 1 << 22;

/// The schedule of a mixture's sources over all lanes.
#[derive(Clone, Debug)]
pub struct Mixture {
    lanes: Vec<Lane>,
    /// Number of positions of an epoch.
    positions: u64,
    /// Places that every lane has. `rest` lists the further places, each as a lane and its place,
    /// sorted by place.
    even: u64,
    rest: Vec<(u64, u64)>,
}

#[derive(Clone, Debug)]
struct Lane {
    /// Number of each source's sequences in this lane.
    shares: Vec<u64>,
    periods: Vec<Period>,
    /// Number of places, or [`ENDLESS`].
    len: u64,
}

/// Weights that hold from a position on. A ramp consists of many such changes.
#[derive(Clone, Debug)]
struct WeightChange {
    start: u64,
    weights: Vec<u64>,
    /// The sum to which the weights are scaled if each global batch has exact counts.
    cycle: Option<u64>,
}

/// Places of a lane with the same weights.
#[derive(Clone, Debug)]
struct Period {
    start: u64,
    weights: Vec<u64>,
    /// Number of turns of each source before `start`.
    base: Vec<u64>,
    /// Place in the cycle at which the period begins.
    phase: u64,
}

/// The sequence that stands at a position of the mixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Index of the source.
    pub source: usize,
    /// Epoch of this source.
    pub epoch: u64,
    /// Position in this epoch of the source.
    pub position: u64,
}

impl Mixture {
    /// Builds the schedule over `lanes` lanes.
    ///
    /// `sequences` gives the number of sequences of each source, at least `lanes` each. `epochs`
    /// limits the number of epochs of each source. `stages` are sorted by their start; the first
    /// one begins at 0, and each has a positive weight. `exact_per` is a multiple of `lanes`.
    pub fn new(
        lanes: u64,
        sequences: &[u64],
        epochs: &[Option<u64>],
        stages: &[Stage],
        exhausted: Exhausted,
        exact_per: Option<u64>,
    ) -> Self {
        let mut changes = weight_changes(stages);
        if let Some(cycle) = exact_per {
            for change in &mut changes {
                change.start = change.start.next_multiple_of(cycle);
                change.cycle = Some(cycle);
            }
        }
        let lanes: Vec<Lane> =
            (0..lanes).map(|number| Lane::new(number, lanes, sequences, epochs, &changes, exhausted)).collect();
        let even = lanes.iter().map(|lane| lane.len).min().unwrap_or(0);
        let mut rest = Vec::new();
        let left: u64 = lanes.iter().map(|lane| lane.len.saturating_sub(even)).fold(0, u64::saturating_add);
        if even < ENDLESS && left <= MAX_REST {
            let longest = lanes.iter().map(|lane| lane.len).max().unwrap_or(0);
            for place in even..longest {
                rest.extend((0..).zip(&lanes).filter(|(_, lane)| place < lane.len).map(|(index, _)| (index, place)));
            }
        }
        let positions = if even == ENDLESS { ENDLESS } else { even * lanes.len() as u64 + rest.len() as u64 };
        Self { lanes, positions, even, rest }
    }

    /// Number of positions of an epoch, or [`ENDLESS`].
    pub fn positions(&self) -> u64 {
        self.positions
    }

    /// The draw at `position` of `epoch`.
    ///
    /// # Panics
    /// If `position` is not below [`Mixture::positions`].
    pub fn draw(&self, epoch: u64, position: u64) -> Draw {
        let (lane, place) = self.place(position);
        let at = &self.lanes[lane as usize];
        let period = at.period(place);
        let (source, turns) = period.turn(place);
        let draws = if epoch == 0 { turns } else { epoch * at.counts(at.len)[source] + turns };
        let share = at.shares[source];
        Draw { source, epoch: draws / share, position: draws % share * self.lanes.len() as u64 + lane }
    }

    /// Number of sequences that each source has delivered before `position` of an epoch.
    pub fn counts(&self, position: u64) -> Vec<u64> {
        let count = self.lanes.len() as u64;
        let mut counts = vec![0; self.lanes.first().map_or(0, |lane| lane.shares.len())];
        for (index, lane) in (0..).zip(&self.lanes) {
            let even = position.min(self.even.saturating_mul(count));
            let mut places = even / count + u64::from(index < even % count);
            let after = usize::try_from(position - even).unwrap_or(usize::MAX).min(self.rest.len());
            places += self.rest[..after].iter().filter(|(lane, _)| *lane == index).count() as u64;
            for (sum, turns) in counts.iter_mut().zip(lane.counts(places)) {
                *sum += turns;
            }
        }
        counts
    }

    fn place(&self, position: u64) -> (u64, u64) {
        assert!(position < self.positions, "position {position} of {}", self.positions);
        let count = self.lanes.len() as u64;
        if position / count < self.even {
            return (position % count, position / count);
        }
        self.rest[(position - self.even * count) as usize]
    }
}

impl Lane {
    fn new(
        number: u64,
        lanes: u64,
        sequences: &[u64],
        epochs: &[Option<u64>],
        changes: &[WeightChange],
        exhausted: Exhausted,
    ) -> Self {
        let shares: Vec<u64> = sequences.iter().map(|n| n / lanes + u64::from(number < n % lanes)).collect();
        let limits: Vec<Option<u64>> = epochs
            .iter()
            .zip(&shares)
            .map(|(epochs, share)| epochs.map(|epochs| epochs.saturating_mul(*share)))
            .collect();
        let mut lane = Self { shares, periods: Vec::new(), len: ENDLESS };
        let (mut start, mut base) = (0, vec![0; sequences.len()]);
        let mut gone = vec![false; sequences.len()];
        let mut current = 0;
        loop {
            while changes.get(current + 1).is_some_and(|next| next.start.div_ceil(lanes) <= start) {
                current += 1;
            }
            let mut weights: Vec<u64> = changes[current]
                .weights
                .iter()
                .zip(&gone)
                .map(|(weight, gone)| if *gone { 0 } else { *weight })
                .collect();
            if let Some(cycle) = changes[current].cycle {
                weights = apportioned(&weights, cycle);
            }
            let next = changes.get(current + 1).map(|next| next.start.div_ceil(lanes));
            let cycle: u64 = weights.iter().sum();
            if cycle == 0 {
                // Every source of this stage has left the schedule. A later stage may have other
                // sources.
                match next {
                    Some(_) if exhausted == Exhausted::Drop && current + 1 < changes.len() => {
                        current += 1;
                        continue;
                    }
                    _ => {
                        lane.len = start;
                        return lane;
                    }
                }
            }
            let phase = (u128::from(cycle) * u128::from(number) / u128::from(lanes)) as u64;
            let period = Period { start, weights, base: base.clone(), phase };
            let first_gone = (0..limits.len())
                .filter(|source| period.weights[*source] > 0)
                .filter_map(|source| limits[source].map(|limit| period.start_without(source, limit)))
                .min();
            let end = next.into_iter().chain(first_gone).min();
            let Some(end) = end else {
                lane.periods.push(period);
                return lane;
            };
            base = period.counts(end);
            if end > start {
                lane.periods.push(period);
            }
            start = end;
            for (source, limit) in limits.iter().enumerate() {
                gone[source] |= limit.is_some_and(|limit| base[source] >= limit);
            }
            if exhausted == Exhausted::Stop && first_gone == Some(end) {
                lane.len = end;
                return lane;
            }
        }
    }

    fn period(&self, place: u64) -> &Period {
        &self.periods[self.periods.partition_point(|period| period.start <= place) - 1]
    }

    /// Number of turns of each source before `place`.
    fn counts(&self, place: u64) -> Vec<u64> {
        match self.periods.partition_point(|period| period.start <= place) {
            0 => vec![0; self.shares.len()],
            after => self.periods[after - 1].counts(place),
        }
    }
}

impl Period {
    /// Number of turns of each source before `place`, which is not before the period's start.
    fn counts(&self, place: u64) -> Vec<u64> {
        let before = turns(&self.weights, self.phase);
        let until = turns(&self.weights, self.phase + (place - self.start));
        (0..before.len()).map(|source| self.base[source] + (until[source] - before[source])).collect()
    }

    /// The source that has its turn at `place`, and the number of its earlier turns.
    fn turn(&self, place: u64) -> (usize, u64) {
        let (now, after) = (self.counts(place), self.counts(place + 1));
        let source = (0..now.len()).find(|source| after[*source] > now[*source]).expect("a place is somebody's turn");
        (source, now[source])
    }

    /// First place before which `source` has had `limit` turns.
    fn start_without(&self, source: usize, limit: u64) -> u64 {
        let cycle: u64 = self.weights.iter().sum();
        let left = limit.saturating_sub(self.base[source]);
        // Whole cycles have exact counts. The two additional cycles cover the rest of the shares.
        let cycles = u128::from(left / self.weights[source]) + 2;
        let (mut low, mut high) =
            (self.start, self.start.saturating_add(u64::try_from(cycles * u128::from(cycle)).unwrap_or(ENDLESS)));
        while low < high {
            let middle = low + (high - low) / 2;
            if self.counts(middle)[source] >= limit { high = middle } else { low = middle + 1 }
        }
        low
    }
}

/// Number of turns of each source among the first `places` places of a schedule with these weights.
fn turns(weights: &[u64], places: u64) -> Vec<u64> {
    let mut turns = vec![0; weights.len()];
    share_out(weights, places, &mut turns);
    turns
}

/// Shares `places` out between the two halves of the sources, and then inside each half.
fn share_out(weights: &[u64], places: u64, turns: &mut [u64]) {
    if let [turns] = turns {
        *turns = places;
        return;
    }
    let (first, second) = weights.split_at(weights.len() / 2);
    let (of_first, of_second) = turns.split_at_mut(first.len());
    let (weight, total) = (first.iter().sum::<u64>(), weights.iter().sum::<u64>());
    let part = if total == 0 { 0 } else { (u128::from(places) * u128::from(weight) / u128::from(total)) as u64 };
    share_out(first, part, of_first);
    share_out(second, places - part, of_second);
}

/// Converts stages to changes of weights. A ramp becomes many changes. The weights are in lowest
/// terms.
fn weight_changes(stages: &[Stage]) -> Vec<WeightChange> {
    let mut changes: Vec<WeightChange> = Vec::new();
    for (index, stage) in stages.iter().enumerate() {
        let from = if index == 0 || stage.ramp == 0 { None } else { Some(&stages[index - 1].weights) };
        if let Some(from) = from {
            let (old, new): (u64, u64) = (from.iter().sum(), stage.weights.iter().sum());
            for step in 1..RAMP_STEPS {
                let at = stage.start + (u128::from(stage.ramp) * u128::from(step - 1) / u128::from(RAMP_STEPS)) as u64;
                let mixed = from.iter().zip(&stage.weights).map(|(from, to)| {
                    u128::from(*from) * u128::from(new) * u128::from(RAMP_STEPS - step)
                        + u128::from(*to) * u128::from(old) * u128::from(step)
                });
                changes.push(WeightChange { start: at, weights: lowest(mixed.collect()), cycle: None });
            }
        }
        let end = stage.start + if from.is_some() { stage.ramp - stage.ramp / RAMP_STEPS } else { 0 };
        let weights = lowest(stage.weights.iter().map(|weight| u128::from(*weight)).collect());
        changes.push(WeightChange { start: end, weights, cycle: None });
    }
    // If several changes begin at the same position, the last one counts.
    let mut kept: Vec<WeightChange> = Vec::with_capacity(changes.len());
    for change in changes {
        if kept.last().is_some_and(|last| last.start == change.start) {
            kept.pop();
        }
        kept.push(change);
    }
    kept
}

fn lowest(weights: Vec<u128>) -> Vec<u64> {
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    weights.into_iter().map(|weight| (weight / divisor) as u64).collect()
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn stage(start: u64, ramp: u64, weights: &[u64]) -> Stage {
        Stage { start, ramp, weights: weights.to_vec() }
    }

    proptest! {
        #[test]
        fn each_epoch_of_each_source_is_drawn_once(
            lanes in 1u64..9,
            sources in prop::collection::vec((0u64..60, 1u64..4, 0u64..7, 0u64..7), 1..5),
            second in 0u64..200, ramp in 0u64..150, exact: bool, exhausted in prop::sample::select(vec![Exhausted::Stop, Exhausted::Drop]),
        ) {
            let sequences: Vec<u64> = sources.iter().map(|source| source.0 + lanes).collect();
            let epochs: Vec<Option<u64>> = sources.iter().map(|source| Some(source.1)).collect();
            let mut first: Vec<u64> = sources.iter().map(|source| source.2).collect();
            let mut last: Vec<u64> = sources.iter().map(|source| source.3).collect();
            first[0] += 1;
            last[sources.len() - 1] += 1;
            let stages = [stage(0, 0, &first), stage(second, ramp, &last)];
            let exact_per = exact.then_some(lanes * 12);
            let mixture = Mixture::new(lanes, &sequences, &epochs, &stages, exhausted, exact_per);
            prop_assert!(mixture.positions() < ENDLESS);
            for run in 0..2 {
                let mut seen: HashMap<(usize, u64, u64), u32> = HashMap::new();
                let mut counts = vec![0; sequences.len()];
                for position in 0..mixture.positions() {
                    prop_assert_eq!(&mixture.counts(position), &counts);
                    let draw = mixture.draw(run, position);
                    prop_assert!(draw.position < sequences[draw.source]);
                    prop_assert!(run > 0 || draw.epoch < sources[draw.source].1);
                    *seen.entry((draw.source, draw.epoch, draw.position)).or_default() += 1;
                    counts[draw.source] += 1;
                }
                prop_assert!(seen.values().all(|count| *count == 1), "{:?}", seen);
                prop_assert_eq!(&mixture.counts(mixture.positions()), &counts);
                // A source that ends the epoch has completed an epoch of its own on every lane.
                let whole = |source: usize| counts[source] == sequences[source] * sources[source].1;
                prop_assert!(run > 0 || lanes > 1 || (0..counts.len()).any(whole));
                if exhausted == Exhausted::Drop && run == 0 {
                    // Every source with a weight in the last stage delivers all its epochs.
                    for (source, weight) in last.iter().enumerate() {
                        prop_assert!(*weight == 0 || counts[source] == sequences[source] * sources[source].1);
                    }
                }
            }
        }

        #[test]
        fn shares_never_drift(
            lanes in 1u64..9, weights in prop::collection::vec(0u64..1000, 1..6), places in 0u64..1_000_000_000_000,
        ) {
            let mut weights = weights;
            weights[0] += 1;
            let none = vec![None; weights.len()];
            let mixture = Mixture::new(lanes, &vec![lanes; weights.len()], &none, &[stage(0, 0, &weights)], Exhausted::Stop, None);
            prop_assert_eq!(mixture.positions(), ENDLESS);
            let total: u64 = weights.iter().sum();
            for (weight, count) in weights.iter().zip(mixture.counts(places * lanes)) {
                let share = u128::from(places) * u128::from(lanes) * u128::from(*weight);
                let error = (u128::from(count) * u128::from(total)).abs_diff(share);
                // The tree's depth counts twice: for the place and for the lane's phase.
                let most = 2 * u128::from(weights.len().next_power_of_two().ilog2()) * u128::from(lanes);
                prop_assert!(error <= u128::from(total) * most, "{} of {}", count, share / u128::from(total));
            }
        }
    }

    #[test]
    fn every_global_batch_has_exact_counts_where_that_is_asked_for() {
        let stages = [stage(0, 0, &[70, 20, 10]), stage(5000, 0, &[1, 1, 1])];
        let mixture = Mixture::new(8, &[8, 9, 10], &[None; 3], &stages, Exhausted::Stop, Some(512));
        for batch in 0..20 {
            let (before, after) = (mixture.counts(batch * 512), mixture.counts((batch + 1) * 512));
            let counts: Vec<u64> = before.iter().zip(after).map(|(before, after)| after - before).collect();
            assert_eq!(counts, if batch < 10 { [359, 102, 51] } else { [171, 171, 170] }, "batch {batch}");
        }
    }

    #[test]
    fn a_ramp_moves_from_one_weight_to_the_other() {
        let stages = [stage(0, 0, &[1, 0]), stage(1000, 6400, &[0, 1])];
        let mixture = Mixture::new(1, &[10, 10], &[None, None], &stages, Exhausted::Stop, None);
        assert_eq!(mixture.counts(1000), [1000, 0]);
        let of_second = |from: u64, to: u64| mixture.counts(to)[1] - mixture.counts(from)[1];
        assert!((45..=55).contains(&of_second(4150, 4250)), "half way: {}", of_second(4150, 4250));
        assert_eq!(of_second(7400, 7500), 100);
    }
}
