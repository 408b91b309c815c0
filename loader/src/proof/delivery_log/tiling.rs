//! Tiling: joins the lines of all ranks to global batches, and the global batches to a chain.
//!
//! Takes the parsed lines of a delivery log and the range of positions to prove. Gives the chain of
//! complete global batches with the fewest positions missing, the holes in it, and every pair of
//! deliveries that contradict each other. Does not compare the chain with the files; `forebay
//! verify` does that.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use crate::order::epochs::{ENDLESS, EpochChain};
use crate::proof::checksum::Checksum;
use crate::proof::delivery_log::{DeliveryLog, LoggedBatch, LoggedPass};

impl DeliveryLog {
    /// Joins the logged batches of `content` to a chain of global batches over `range`.
    pub fn tile(&self, content: &str, range: &ProofRange<'_>) -> Tiling {
        let mut tiling = Tiling::default();
        let mut batches: BTreeMap<BatchKey, GatheredBatch> = BTreeMap::new();
        for (pass, logged) in &self.batches {
            let LoggedPass { rank, world_size, batch_size, .. } = self.passes[*pass as usize];
            if self.passes[*pass as usize].content != content || !range.epochs.contains(&logged.start.0) {
                continue;
            }
            let start = range.index(logged.start);
            if start < range.from {
                continue;
            }
            let key = BatchKey { start, world_size, batch_size };
            let batch = batches.entry(key).or_insert_with(|| GatheredBatch::new(logged, range.index(logged.end)));
            let deliveries = batch.ranks.entry(rank).or_default();
            if let Some((other, first)) = deliveries.first()
                && first.checksum != logged.checksum
            {
                tiling.conflicts.push(DeliveryPair {
                    epoch: logged.start.0,
                    position: logged.start.1,
                    rank: Some(rank),
                    world_size,
                    runs: [*other, *pass].map(|pass| self.passes[pass as usize].run.clone()),
                });
            }
            for (other, _) in deliveries.iter() {
                if self.overlap(*other, *pass) {
                    tiling.doubles.push(DeliveryPair {
                        epoch: logged.start.0,
                        position: logged.start.1,
                        rank: Some(rank),
                        world_size,
                        runs: [*other, *pass].map(|pass| self.passes[pass as usize].run.clone()),
                    });
                }
            }
            deliveries.push((*pass, logged.clone()));
        }
        let deliveries: usize = batches.values().flat_map(|batch| batch.ranks.values()).map(Vec::len).sum();

        let mut edges: BTreeMap<u64, Vec<GlobalBatch>> = BTreeMap::new();
        for (key, batch) in batches {
            if (0..key.world_size).all(|rank| batch.ranks.contains_key(&rank)) {
                let whole = self.whole(key, batch);
                let others = edges.entry(key.start).or_default();
                let differs = |other: &&GlobalBatch| other.indices == whole.indices && other.checksum != whole.checksum;
                if let Some(other) = others.iter().find(differs) {
                    tiling.conflicts.push(DeliveryPair {
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
        tiling.chain(edges, range);
        tiling.spare = deliveries as u64 - tiling.chain.iter().map(|batch| batch.world_size).sum::<u64>();
        tiling
    }

    /// Builds the global batch from the deliveries of all its ranks. The latest delivery of each
    /// rank counts.
    fn whole(&self, key: BatchKey, batch: GatheredBatch) -> GlobalBatch {
        let mut whole = GlobalBatch {
            epoch: batch.start.0,
            position: batch.start.1,
            indices: key.start..batch.end,
            world_size: key.world_size,
            batch_size: key.batch_size,
            checksum: Checksum::default(),
            substituted: Vec::new(),
            time_ms: u64::MAX,
            launches: Vec::new(),
        };
        let mut launches = BTreeSet::new();
        for deliveries in batch.ranks.values() {
            let latest = deliveries.iter().max_by_key(|(pass, _)| self.passes[*pass as usize].time_ms);
            let (pass, logged) = latest.expect("a rank is listed with its first batch");
            let pass = &self.passes[*pass as usize];
            whole.checksum += logged.checksum;
            whole.substituted.extend(&logged.substituted);
            whole.time_ms = whole.time_ms.min(pass.time_ms);
            launches.insert(pass.launch.clone().unwrap_or_else(|| pass.run.clone()));
        }
        whole.launches = launches.into_iter().collect();
        whole
    }

    /// Tells whether two passes wrote to the same file in turns. Then two processes had the same
    /// rank at the same time.
    fn overlap(&self, a: u32, b: u32) -> bool {
        let [(file_a, a), (file_b, b)] = [a, b].map(|pass| &self.lines_of_passes[pass as usize]);
        file_a == file_b && a.start < b.end && b.start < a.end
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct BatchKey {
    start: u64,
    world_size: u64,
    batch_size: u64,
}

/// The deliveries of all ranks for one global batch.
struct GatheredBatch {
    start: (u64, u64),
    end: u64,
    /// Deliveries of each rank, each with the number of its pass.
    ranks: BTreeMap<u64, Vec<(u32, LoggedBatch)>>,
}

impl GatheredBatch {
    fn new(logged: &LoggedBatch, end: u64) -> Self {
        Self { start: logged.start, end, ranks: BTreeMap::new() }
    }
}

/// The positions to prove: the delivered positions of consecutive epochs. One count of indices
/// numbers them all.
pub struct ProofRange<'a> {
    /// The epochs to prove.
    pub epochs: Range<u64>,
    /// The delivered positions of these epochs.
    pub chain: &'a EpochChain,
    /// First index to prove.
    pub from: u64,
    /// Whether the last positions may be missing if they do not fill a global batch.
    pub may_drop: bool,
}

impl ProofRange<'_> {
    /// Number of indices in all epochs.
    pub fn len(&self) -> u64 {
        self.chain.len().unwrap_or(ENDLESS)
    }

    /// Whether the epochs have no positions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Index of a position. Positions past the end have the index of the end.
    pub fn index(&self, (epoch, position): (u64, u64)) -> u64 {
        self.chain.index_of(epoch, position).min(self.len())
    }
}

/// One complete global batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobalBatch {
    /// Epoch of its first row.
    pub epoch: u64,
    /// Position of its first row.
    pub position: u64,
    /// Indices of its first row and of the row after its last, as the range to prove counts them.
    pub indices: Range<u64>,
    /// Data-parallel size.
    pub world_size: u64,
    /// Rows per rank.
    pub batch_size: u64,
    /// Checksum of the rows of all ranks together, without rows that replaced others.
    pub checksum: Checksum,
    /// Epochs and positions of rows that could not be read, and that other rows replaced.
    pub substituted: Vec<(u64, u64)>,
    /// Start of the earliest pass that delivered the batch, in milliseconds since 1970.
    pub time_ms: u64,
    /// The launches that delivered the batch last. The run's name stands for a launch without a
    /// name.
    pub launches: Vec<String>,
}

/// Two deliveries of one batch that contradict each other, or that overlap in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryPair {
    /// Epoch of the batch.
    pub epoch: u64,
    /// Position of its global batch.
    pub position: u64,
    /// The rank that received both. `None` if the difference concerns all ranks: another number of
    /// ranks received other rows in total.
    pub rank: Option<u64>,
    /// Data-parallel size.
    pub world_size: u64,
    /// Names of the two runs, or the launches of all ranks.
    pub runs: [String; 2],
}

/// Result of [`DeliveryLog::tile`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tiling {
    /// The chain, in order.
    pub chain: Vec<GlobalBatch>,
    /// Ranges of indices that no global batch of the chain covers.
    pub holes: Vec<Range<u64>>,
    /// Last indices, which the remainder rule drops because they do not fill a global batch.
    pub dropped: Range<u64>,
    /// Batches of single ranks that do not count: a later launch delivered them again, or other
    /// ranks lack them.
    pub spare: u64,
    /// Global batches that some ranks did not receive.
    pub partial: u64,
    /// Batches that two launches delivered with different rows.
    pub conflicts: Vec<DeliveryPair>,
    /// Batches that two processes of the same rank delivered at the same time.
    pub doubles: Vec<DeliveryPair>,
}

impl Tiling {
    /// Checksum of everything that the chain covers.
    pub fn checksum(&self) -> Checksum {
        self.chain.iter().map(|batch| batch.checksum).sum()
    }

    /// Splits the holes of a range that ends at `end`. Returns the holes before the last global
    /// batch, and the indices after it, which an unfinished run may still deliver. Without a global
    /// batch, every index is in a hole.
    pub fn missing(&self, end: u64) -> (&[Range<u64>], Range<u64>) {
        match self.holes.split_last() {
            Some((last, holes)) if last.end == end && !self.chain.is_empty() => (holes, last.clone()),
            _ => (&self.holes, end..end),
        }
    }

    /// Chooses the chain with the fewest indices left out. Among equally good global batches, the
    /// later launch's wins.
    fn chain(&mut self, mut edges: BTreeMap<u64, Vec<GlobalBatch>>, range: &ProofRange<'_>) {
        let end = range.len();
        let from = range.from.min(end);
        let all = || edges.values().flatten();
        let mut nodes: Vec<u64> = all().flat_map(|batch| [batch.indices.start, batch.indices.end]).collect();
        nodes.extend([from, end]);
        nodes.sort_unstable();
        nodes.dedup();
        // The indices after the last global batch are no hole if they do not fill another global
        // batch.
        let mut droppable: BTreeMap<u64, u64> = BTreeMap::new();
        for batch in all().filter(|_| range.may_drop) {
            let size = droppable.entry(batch.indices.end).or_default();
            *size = (*size).max(batch.world_size * batch.batch_size);
        }
        let drops = |at: u64| at < end && droppable.get(&at).is_some_and(|size| end - at < *size);

        // Number of indices left out from each node to the end, computed from the last node
        // backwards.
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
