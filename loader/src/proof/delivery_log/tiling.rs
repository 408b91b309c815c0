//! Tiling: the lines of all ranks as global batches, and of these a chain from the start of an epoch to its end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use crate::order::epochs::{ENDLESS, EpochChain};
use crate::proof::checksum::Checksum;
use crate::proof::delivery_log::{DeliveryLog, Entry, Pass};

impl DeliveryLog {
    /// Puts the batches of `content` together to a chain over `span`.
    pub fn tile(&self, content: &str, span: &Span<'_>) -> Tiling {
        let mut tiling = Tiling::default();
        let mut batches: BTreeMap<Key, Gathered> = BTreeMap::new();
        for (pass, entry) in &self.entries {
            let Pass { rank, world_size, batch_size, .. } = self.passes[*pass as usize];
            if self.passes[*pass as usize].content != content || !span.epochs.contains(&entry.start.0) {
                continue;
            }
            let start = span.index(entry.start);
            if start < span.from {
                continue;
            }
            let key = Key { start, world_size, batch_size };
            let batch = batches.entry(key).or_insert_with(|| Gathered::new(entry, span.index(entry.end)));
            let deliveries = batch.ranks.entry(rank).or_default();
            if let Some((other, first)) = deliveries.first()
                && first.checksum != entry.checksum
            {
                tiling.conflicts.push(Conflict {
                    epoch: entry.start.0,
                    position: entry.start.1,
                    rank: Some(rank),
                    world_size,
                    runs: [*other, *pass].map(|pass| self.passes[pass as usize].run.clone()),
                });
            }
            for (other, _) in deliveries.iter() {
                if self.overlap(*other, *pass) {
                    tiling.doubles.push(Double {
                        epoch: entry.start.0,
                        position: entry.start.1,
                        rank: Some(rank),
                        world_size,
                        runs: [*other, *pass].map(|pass| self.passes[pass as usize].run.clone()),
                    });
                }
            }
            deliveries.push((*pass, *entry));
        }
        let entries: usize = batches.values().flat_map(|batch| batch.ranks.values()).map(Vec::len).sum();

        let mut edges: BTreeMap<u64, Vec<GlobalBatch>> = BTreeMap::new();
        for (key, batch) in batches {
            if (0..key.world_size).all(|rank| batch.ranks.contains_key(&rank)) {
                let whole = self.whole(key, batch);
                let others = edges.entry(key.start).or_default();
                let differs = |other: &&GlobalBatch| other.indices == whole.indices && other.checksum != whole.checksum;
                if let Some(other) = others.iter().find(differs) {
                    tiling.conflicts.push(Conflict {
                        epoch: whole.epoch,
                        position: whole.position,
                        rank: None,
                        world_size: whole.world_size,
                        runs: [other, &whole].map(|batch| batch.launches.join(" and ")),
                    });
                }
                others.push(whole);
            } else {
                tiling.partial += 1;
            }
        }
        tiling.chain(edges, span);
        tiling.spare = entries as u64 - tiling.chain.iter().map(|batch| batch.world_size).sum::<u64>();
        tiling
    }

    /// A global batch that every rank was given.
    fn whole(&self, key: Key, batch: Gathered) -> GlobalBatch {
        let mut whole = GlobalBatch {
            epoch: batch.start.0,
            position: batch.start.1,
            indices: key.start..batch.end,
            world_size: key.world_size,
            batch_size: key.batch_size,
            checksum: Checksum::default(),
            time_ms: u64::MAX,
            launches: Vec::new(),
        };
        let mut launches = BTreeSet::new();
        for deliveries in batch.ranks.values() {
            let latest = deliveries.iter().max_by_key(|(pass, _)| self.passes[*pass as usize].time_ms);
            let (pass, entry) = latest.expect("a rank is listed with its first batch");
            let pass = &self.passes[*pass as usize];
            whole.checksum += entry.checksum;
            whole.time_ms = whole.time_ms.min(pass.time_ms);
            launches.insert(pass.launch.clone().unwrap_or_else(|| pass.run.clone()));
        }
        whole.launches = launches.into_iter().collect();
        whole
    }

    /// Whether two passes wrote to one file in turns: two processes had the same rank at the same time.
    fn overlap(&self, a: u32, b: u32) -> bool {
        let [(file_a, a), (file_b, b)] = [a, b].map(|pass| &self.spans[pass as usize]);
        file_a == file_b && a.start < b.end && b.start < a.end
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    start: u64,
    world_size: u64,
    batch_size: u64,
}

/// What the ranks say of one global batch.
struct Gathered {
    start: (u64, u64),
    end: u64,
    /// Deliveries of each rank, and the passes they were in.
    ranks: BTreeMap<u64, Vec<(u32, Entry)>>,
}

impl Gathered {
    fn new(entry: &Entry, end: u64) -> Self {
        Self { start: entry.start, end, ranks: BTreeMap::new() }
    }
}

/// The positions to be proved: those of some epochs, one after the other, as one row of indices.
pub struct Span<'a> {
    /// The epochs.
    pub epochs: Range<u64>,
    /// What is delivered of them.
    pub chain: &'a EpochChain,
    /// Index to begin at.
    pub from: u64,
    /// Whether positions that fill no global batch at the end may be missing.
    pub may_drop: bool,
}

impl Span<'_> {
    /// Indices of all epochs.
    pub fn len(&self) -> u64 {
        self.chain.len().unwrap_or(ENDLESS)
    }

    /// Whether the epochs have no positions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Index of a position.
    pub fn index(&self, (epoch, position): (u64, u64)) -> u64 {
        self.chain.index_of(epoch, position).min(self.len())
    }
}

/// A global batch in a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobalBatch {
    /// Epoch of its first row.
    pub epoch: u64,
    /// Position of its first row.
    pub position: u64,
    /// The same, and its end, as indices of the span.
    pub indices: Range<u64>,
    /// Data-parallel size.
    pub world_size: u64,
    /// Rows per rank.
    pub batch_size: u64,
    /// Of all ranks together.
    pub checksum: Checksum,
    /// When its launch began, in milliseconds since 1970.
    pub time_ms: u64,
    /// Launches, or runs where these have no names, that it was handed over in last.
    pub launches: Vec<String>,
}

/// A batch that two launches were given differently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Its epoch.
    pub epoch: u64,
    /// Position of its global batch.
    pub position: u64,
    /// The rank that was given it; none where all ranks together had different rows than on another number of ranks.
    pub rank: Option<u64>,
    /// Data-parallel size.
    pub world_size: u64,
    /// The two runs, or the launches of all ranks.
    pub runs: [String; 2],
}

/// A batch that was handed over twice at the same time.
pub type Double = Conflict;

/// What the lines of all ranks come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tiling {
    /// The chain, in order.
    pub chain: Vec<GlobalBatch>,
    /// Indices that no global batch of the chain covers.
    pub holes: Vec<Range<u64>>,
    /// Indices at the end that fill no global batch, where the remainder rule drops them.
    pub dropped: Range<u64>,
    /// Batches of ranks that do not count: handed over again by a later launch, or not on every rank.
    pub spare: u64,
    /// Global batches that not every rank was given.
    pub partial: u64,
    /// Batches that two launches were given differently.
    pub conflicts: Vec<Conflict>,
    /// Batches handed over by two processes of the same rank at the same time.
    pub doubles: Vec<Double>,
}

impl Tiling {
    /// What the chain covers.
    pub fn checksum(&self) -> Checksum {
        self.chain.iter().map(|batch| batch.checksum).sum()
    }

    /// Whether the only hole is at the end: a run that has not come so far yet.
    pub fn is_unfinished(&self, end: u64) -> bool {
        matches!(self.holes.as_slice(), [hole] if hole.end == end) && !self.chain.is_empty()
    }

    /// Chooses the global batches with the fewest indices left out between them, and of equal ones those of the later launch.
    fn chain(&mut self, mut edges: BTreeMap<u64, Vec<GlobalBatch>>, span: &Span<'_>) {
        let end = span.len();
        let from = span.from.min(end);
        let all = || edges.values().flatten();
        let mut nodes: Vec<u64> = all().flat_map(|batch| [batch.indices.start, batch.indices.end]).collect();
        nodes.extend([from, end]);
        nodes.sort_unstable();
        nodes.dedup();
        // Where the last global batch ended, what is left is no hole if it fills no further one.
        let mut droppable: BTreeMap<u64, u64> = BTreeMap::new();
        for batch in all().filter(|_| span.may_drop) {
            let size = droppable.entry(batch.indices.end).or_default();
            *size = (*size).max(batch.world_size * batch.batch_size);
        }
        let drops = |at: u64| at < end && droppable.get(&at).is_some_and(|size| end - at < *size);

        // Indices left out from each node on, from the last node backwards.
        let mut left_out: HashMap<u64, u64> = HashMap::from([(end, 0)]);
        for pair in nodes.windows(2).rev() {
            let [at, next] = [pair[0], pair[1]];
            let skip = if drops(at) { 0 } else { next - at + left_out[&next] };
            let onward = edges.get(&at).into_iter().flatten().map(|batch| left_out[&batch.indices.end]).min();
            left_out.insert(at, onward.map_or(skip, |onward| onward.min(skip)));
        }

        let mut at = from;
        self.dropped = end..end;
        while at < end {
            let least = left_out[&at];
            let onward = edges.remove(&at).unwrap_or_default();
            let best = onward.into_iter().filter(|batch| left_out[&batch.indices.end] == least);
            if let Some(batch) = best.max_by_key(|batch| (batch.time_ms, batch.indices.end)) {
                at = batch.indices.end;
                self.chain.push(batch);
            } else if drops(at) {
                self.dropped = at..end;
                at = end;
            } else {
                let next = nodes[nodes.partition_point(|node| *node <= at)];
                match self.holes.last_mut() {
                    Some(hole) if hole.end == at => hole.end = next,
                    _ => self.holes.push(at..next),
                }
                at = next;
            }
        }
    }
}
