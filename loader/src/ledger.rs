//! Ledger: one line for every batch that was handed over, so that a run can prove afterwards what it was trained on.
//!
//! Each rank appends to a file of its own, `rank-00003.jsonl`: a `begin` line when a pass starts, then a line per batch, written before the batch is
//! returned. A process that is killed leaves at most its last line torn, and the next launch begins a new one. Reading puts the ranks' lines
//! together to global batches and looks for a chain of whole ones from the start of an epoch to its end. Launches overlap where
//! one was killed after its last checkpoint: what both delivered must be equal, and the later one counts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use crate::coverage::Coverage;
use crate::error::{Error, ErrorKind, Result};

/// Version of the lines.
pub const VERSION: u64 = 1;

/// A pass over an epoch, as its `begin` line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Name of the pass, in each of its lines.
    pub run: String,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// What the launcher calls this start of the job, where it has a name for it.
    pub launch: Option<String>,
    /// Epoch it began in.
    pub epoch: u64,
    /// Position it began at.
    pub position: u64,
    /// Data-parallel rank.
    pub rank: u64,
    /// Data-parallel size.
    pub world_size: u64,
    /// Rows per rank and step.
    pub batch_size: u64,
    /// Digest of the content settings and the corpus.
    pub content: String,
    /// Fingerprint of the corpus.
    pub fingerprint: String,
}

/// A batch that a rank was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Epoch and position of the first row of its global batch.
    pub start: (u64, u64),
    /// Epoch and position that a state saved after it names.
    pub end: (u64, u64),
    /// What it held.
    pub coverage: Coverage,
}

/// Writes the lines of one pass.
#[derive(Debug)]
pub(crate) struct Writer {
    path: PathBuf,
    file: File,
    pass: Pass,
    failure: Option<Error>,
}

impl Writer {
    /// Begins `pass`, whose name and time are filled in here, in the file of its rank under `folder`.
    pub(crate) fn begin(folder: &Path, mut pass: Pass) -> Result<Self> {
        static PASSES: AtomicU64 = AtomicU64::new(0);
        let path = folder.join(format!("rank-{:05}.jsonl", pass.rank));
        let failed = |error| Error::io("cannot write the ledger", error).at(&path);
        std::fs::create_dir_all(folder).map_err(failed)?;
        let mut file = File::options().create(true).read(true).append(true).open(&path).map_err(failed)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let number = PASSES.fetch_add(1, Ordering::Relaxed);
        let name = format!("{} {} {number} {}", now.as_nanos(), std::process::id(), pass.rank);
        pass.run = format!("{:016x}", xxh3_64(name.as_bytes()));
        pass.time_ms = now.as_millis() as u64;
        let line = json!({
            "ledger": VERSION,
            "run": pass.run,
            "time_ms": pass.time_ms,
            "launch": pass.launch,
            "epoch": pass.epoch,
            "position": pass.position,
            "rank": pass.rank,
            "world_size": pass.world_size,
            "batch_size": pass.batch_size,
            "content": pass.content,
            "fingerprint": pass.fingerprint,
        });
        // A line that was torn stays one of its own.
        let torn = is_torn(&mut file).map_err(failed)?;
        let line = format!("{}{line}\n", if torn { "\n" } else { "" });
        file.write_all(line.as_bytes()).map_err(failed)?;
        Ok(Self { path, file, pass, failure: None })
    }

    /// Writes the line of a batch. After a failure every later call fails the same way.
    pub(crate) fn write(&mut self, entry: &Entry) -> Result<()> {
        self.check()?;
        let Entry { start, end, coverage } = entry;
        // One write for the line, so that a kill leaves it whole or absent on a local file system.
        let line = format!(
            "{{\"run\":\"{}\",\"epoch\":{},\"position\":{},\"end_epoch\":{},\"end\":{},\"rank\":{},\"world_size\":{},\"batch_size\":{},\
             \"rows\":{},\"tokens\":{},\"hash\":\"{}\"}}\n",
            self.pass.run,
            start.0,
            start.1,
            end.0,
            end.1,
            self.pass.rank,
            self.pass.world_size,
            self.pass.batch_size,
            coverage.rows,
            coverage.tokens,
            coverage.hash_text(),
        );
        self.file.write_all(line.as_bytes()).map_err(|error| {
            let text = format!("cannot write the ledger at position {} of epoch {}", start.1, start.0);
            let error = Error::io(text, error).at(&self.path);
            self.failure = Some(error.clone());
            error
        })
    }

    /// Fails if a line could not be written.
    pub(crate) fn check(&self) -> Result<()> {
        self.failure.clone().map_or(Ok(()), Err)
    }
}

fn is_torn(file: &mut File) -> std::io::Result<bool> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

/// The lines of all ranks.
#[derive(Debug, Default)]
pub struct Ledger {
    files: Vec<PathBuf>,
    passes: Vec<Pass>,
    /// File, first and last line of each pass, counted from 0.
    spans: Vec<(usize, Range<u64>)>,
    entries: Vec<(u32, Entry)>,
    torn: Vec<String>,
}

impl Ledger {
    /// Reads every `rank-*.jsonl` of `folder` and of the folders in it.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut ledger = Self::default();
        ledger.find(folder)?;
        ledger.files.sort();
        if ledger.files.is_empty() {
            return Err(Error::new(ErrorKind::NotFound, "no ledger: expected files named `rank-*.jsonl`").at(folder));
        }
        for index in 0..ledger.files.len() {
            let path = ledger.files[index].clone();
            let content = std::fs::read(&path).map_err(|error| Error::io("cannot read the ledger", error).at(&path))?;
            ledger.read_file(index, &content).map_err(|error| error.at(&path))?;
        }
        Ok(ledger)
    }

    fn find(&mut self, folder: &Path) -> Result<()> {
        let failed = |error| Error::io("cannot read the ledger", error).at(folder);
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if entry.path().is_dir() {
                self.find(&entry.path())?;
            } else if name.starts_with("rank-") && name.ends_with(".jsonl") {
                self.files.push(entry.path());
            }
        }
        Ok(())
    }

    fn read_file(&mut self, file: usize, content: &[u8]) -> Result<()> {
        let lines: Vec<&[u8]> = content.split(|byte| *byte == b'\n').collect();
        let parse = |line: &[u8]| serde_json::from_slice::<Value>(line).ok().filter(Value::is_object);
        let is_begin = |line: &[u8]| parse(line).is_some_and(|value| value.get("ledger").is_some());
        // Of this file alone: the number of a pass by its name.
        let mut passes: HashMap<String, u32> = HashMap::new();
        for (number, line) in lines.iter().enumerate().filter(|(_, line)| !line.is_empty()) {
            let at = |text: &str| Error::data(format!("ledger is damaged in line {}: {text}", number + 1));
            let Some(value) = parse(line) else {
                // Only what was written last can be torn: the end of the file, or of a launch that was followed by another.
                if lines.get(number + 1).is_none_or(|next| is_begin(next)) {
                    self.torn.push(format!("{} line {}", self.files[file].display(), number + 1));
                    continue;
                }
                return Err(at("it is torn and others of the same launch follow"));
            };
            let int = |key: &str| {
                value.get(key).and_then(Value::as_u64).ok_or_else(|| at(&format!("`{key}` is missing or no number")))
            };
            let text = |key: &str| {
                let found = value.get(key).and_then(Value::as_str);
                found.map(str::to_owned).ok_or_else(|| at(&format!("`{key}` is missing or no text")))
            };
            let run = text("run")?;
            if value.get("ledger").is_some() {
                let version = int("ledger")?;
                if version != VERSION {
                    return Err(at(&format!("it has version {version}, this forebay reads version {VERSION}")));
                }
                let index = u32::try_from(self.passes.len()).map_err(|_| at("there are more than 2^32 passes"))?;
                passes.insert(run.clone(), index);
                self.spans.push((file, number as u64..number as u64));
                self.passes.push(Pass {
                    run,
                    time_ms: int("time_ms")?,
                    launch: value.get("launch").and_then(Value::as_str).map(str::to_owned),
                    epoch: int("epoch")?,
                    position: int("position")?,
                    rank: int("rank")?,
                    world_size: int("world_size")?,
                    batch_size: int("batch_size")?,
                    content: text("content")?,
                    fingerprint: text("fingerprint")?,
                });
                continue;
            }
            let pass = *passes.get(&run).ok_or_else(|| at(&format!("its run `{run}` has no `ledger` line")))?;
            let hash = u128::from_str_radix(&text("hash")?, 16).map_err(|_| at("`hash` is not hexadecimal"))?;
            let coverage = Coverage { rows: int("rows")?, tokens: int("tokens")?, hash };
            let entry =
                Entry { start: (int("epoch")?, int("position")?), end: (int("end_epoch")?, int("end")?), coverage };
            if entry.end <= entry.start {
                return Err(at("the batch ends where it starts"));
            }
            self.spans[pass as usize].1.end = number as u64;
            self.entries.push((pass, entry));
        }
        Ok(())
    }

    /// Files that were read.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Every pass, in the order of files and lines.
    pub fn passes(&self) -> &[Pass] {
        &self.passes
    }

    /// Places of lines that a kill has torn.
    pub fn torn(&self) -> &[String] {
        &self.torn
    }

    /// The lines of the passes over `content`.
    pub fn entries(&self, content: &str) -> impl Iterator<Item = (&Pass, &Entry)> {
        let entries = self.entries.iter().map(|(pass, entry)| (&self.passes[*pass as usize], entry));
        entries.filter(move |(pass, _)| pass.content == content)
    }

    /// Epochs of `content` that can be proved: one by one, and together where a batch crosses from one to the next.
    pub fn epochs(&self, content: &str) -> Vec<Range<u64>> {
        let mut spans: Vec<Range<u64>> = self
            .entries(content)
            .map(|(_, entry)| entry.start.0..entry.end.0 + u64::from(entry.end.1 > 0 || entry.end.0 == entry.start.0))
            .collect();
        spans.sort_unstable_by_key(|span| (span.start, span.end));
        let mut epochs: Vec<Range<u64>> = Vec::new();
        for span in spans {
            match epochs.last_mut() {
                Some(last) if span.start < last.end => last.end = last.end.max(span.end),
                _ => epochs.push(span),
            }
        }
        epochs
    }

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
                && first.coverage != entry.coverage
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
                let differs = |other: &&GlobalBatch| other.indices == whole.indices && other.coverage != whole.coverage;
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
            coverage: Coverage::default(),
            time_ms: u64::MAX,
            launches: Vec::new(),
            hashes: Vec::new(),
        };
        let mut launches = BTreeSet::new();
        for deliveries in batch.ranks.values() {
            let latest = deliveries.iter().max_by_key(|(pass, _)| self.passes[*pass as usize].time_ms);
            let (pass, entry) = latest.expect("a rank is listed with its first batch");
            let pass = &self.passes[*pass as usize];
            whole.coverage += entry.coverage;
            whole.hashes.push(entry.coverage.hash);
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
    /// Positions of an epoch.
    pub positions: &'a dyn Fn(u64) -> u64,
    /// Index to begin at, from the start of the first epoch.
    pub from: u64,
    /// Whether positions that fill no global batch at the end may be missing.
    pub may_drop: bool,
}

impl Span<'_> {
    /// Indices of all epochs.
    pub fn len(&self) -> u64 {
        self.epochs.clone().map(|epoch| (self.positions)(epoch)).sum()
    }

    /// Whether the epochs have no positions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Index of a position; padding after the last one counts as the end.
    pub fn index(&self, (epoch, position): (u64, u64)) -> u64 {
        let before: u64 = (self.epochs.start..epoch.min(self.epochs.end)).map(|epoch| (self.positions)(epoch)).sum();
        if epoch >= self.epochs.end { before } else { before + position.min((self.positions)(epoch)) }
    }

    /// Epoch and position of an index.
    pub fn at(&self, index: u64) -> (u64, u64) {
        let mut left = index;
        for epoch in self.epochs.clone() {
            let positions = (self.positions)(epoch);
            if left < positions {
                return (epoch, left);
            }
            left -= positions;
        }
        (self.epochs.end, left)
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
    pub coverage: Coverage,
    /// When its launch began, in milliseconds since 1970.
    pub time_ms: u64,
    /// Launches, or runs where these have no names, that it was handed over in last.
    pub launches: Vec<String>,
    /// Hash of each rank's batch.
    pub hashes: Vec<u128>,
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
    pub fn coverage(&self) -> Coverage {
        self.chain.iter().map(|batch| batch.coverage).sum()
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONTENT: &str = "content";

    /// The rows of a batch, by the rule that all ranks follow.
    fn entry(position: u64, rank: u64, world_size: u64, batch_size: u64) -> Entry {
        let mut coverage = Coverage::default();
        for row in 0..batch_size {
            let sequence = position + row * world_size + rank;
            coverage.add_row(0, sequence, &[sequence as i64; 3]);
        }
        Entry { start: (0, position), end: (0, position + world_size * batch_size), coverage }
    }

    fn pass(rank: u64, world_size: u64, batch_size: u64, position: u64) -> Pass {
        Pass {
            run: String::new(),
            time_ms: 0,
            launch: None,
            epoch: 0,
            position,
            rank,
            world_size,
            batch_size,
            content: CONTENT.to_owned(),
            fingerprint: "fingerprint".to_owned(),
        }
    }

    /// A launch that goes through `positions`, and is killed there.
    fn launch(folder: &Path, world_size: u64, batch_size: u64, positions: Range<u64>) {
        for rank in 0..world_size {
            let mut writer = Writer::begin(folder, pass(rank, world_size, batch_size, positions.start)).unwrap();
            for start in positions.clone().step_by((world_size * batch_size) as usize) {
                writer.write(&entry(start, rank, world_size, batch_size)).unwrap();
            }
        }
        // So that launches differ in their time.
        std::thread::sleep(std::time::Duration::from_millis(2));
    }

    fn tile(folder: &Path, positions: u64, may_drop: bool) -> Tiling {
        let ledger = Ledger::read(folder).unwrap();
        ledger.tile(CONTENT, &Span { epochs: 0..1, positions: &|_| positions, from: 0, may_drop })
    }

    fn all(positions: u64) -> Coverage {
        entry(0, 0, 1, positions).coverage
    }

    fn append(path: &Path, text: &str) {
        File::options().append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn launches_of_changing_world_size_make_one_chain() {
        let folder = tempfile::tempdir().unwrap();
        launch(folder.path(), 4, 3, 0..60);
        launch(folder.path(), 2, 6, 36..96);
        launch(folder.path(), 1, 12, 72..84);
        launch(folder.path(), 2, 4, 84..116);
        let tiling = tile(folder.path(), 120, true);
        assert_eq!(tiling.coverage(), all(116));
        assert_eq!((tiling.holes.len(), tiling.dropped.clone()), (0, 116..120), "{tiling:?}");
        let sizes: Vec<_> = tiling.chain.iter().map(|batch| (batch.position, batch.world_size)).collect();
        let expected: Vec<_> = [(0, 4), (12, 4), (24, 4), (36, 2), (48, 2), (60, 2), (72, 1), (84, 2), (92, 2)].into();
        assert_eq!(sizes[..9], expected, "the later launch counts");
        // Two steps of four ranks and two of two ranks were handed over again.
        assert_eq!((tiling.spare, tiling.conflicts.len(), tiling.doubles.len()), (2 * 4 + 2 * 2, 0, 0));
        assert_eq!(tile(folder.path(), 120, false).holes, [116..120]);
    }

    #[test]
    fn a_batch_that_two_launches_had_must_be_the_same() {
        let folder = tempfile::tempdir().unwrap();
        launch(folder.path(), 2, 2, 0..12);
        launch(folder.path(), 2, 2, 4..16);
        let tiling = tile(folder.path(), 16, false);
        assert_eq!((tiling.coverage(), tiling.spare, tiling.conflicts.len()), (all(16), 4, 0));
        assert_eq!(tiling.doubles, []);

        let mut writer = Writer::begin(folder.path(), pass(1, 2, 2, 8)).unwrap();
        writer.write(&Entry { coverage: all(2), ..entry(8, 1, 2, 2) }).unwrap();
        let tiling = tile(folder.path(), 16, false);
        let [conflict] = tiling.conflicts.as_slice() else { panic!("{:?}", tiling.conflicts) };
        assert_eq!((conflict.position, conflict.rank, conflict.world_size), (8, Some(1), 2));
    }

    #[test]
    fn a_global_batch_must_be_the_same_on_any_number_of_ranks() {
        let folder = tempfile::tempdir().unwrap();
        launch(folder.path(), 2, 2, 0..8);
        let mut writer = Writer::begin(folder.path(), pass(0, 1, 4, 4)).unwrap();
        writer.write(&entry(4, 0, 1, 4)).unwrap();
        assert_eq!(tile(folder.path(), 8, false).conflicts, []);
        let mut writer = Writer::begin(folder.path(), pass(0, 4, 1, 4)).unwrap();
        writer.write(&Entry { coverage: all(1), ..entry(4, 0, 4, 1) }).unwrap();
        for rank in 1..4 {
            let mut writer = Writer::begin(folder.path(), pass(rank, 4, 1, 4)).unwrap();
            writer.write(&entry(4, rank, 4, 1)).unwrap();
        }
        let tiling = tile(folder.path(), 8, false);
        let [conflict] = tiling.conflicts.as_slice() else { panic!("{:?}", tiling.conflicts) };
        assert_eq!((conflict.position, conflict.rank), (4, None));
    }

    #[test]
    fn two_processes_of_one_rank_are_told_from_two_launches() {
        let folder = tempfile::tempdir().unwrap();
        let mut writers = [(); 2].map(|()| Writer::begin(folder.path(), pass(0, 1, 2, 0)).unwrap());
        for start in [0, 2, 4] {
            writers.iter_mut().for_each(|writer| writer.write(&entry(start, 0, 1, 2)).unwrap());
        }
        let tiling = tile(folder.path(), 6, false);
        assert_eq!(tiling.doubles.iter().map(|double| double.position).collect::<Vec<_>>(), [0, 2, 4]);
        assert_eq!(tiling.coverage(), all(6));
    }

    #[test]
    fn what_is_missing_is_a_hole() {
        let folder = tempfile::tempdir().unwrap();
        launch(folder.path(), 2, 2, 0..8);
        launch(folder.path(), 2, 2, 12..20);
        // Rank 1 never came to the batch at 20.
        let mut writer = Writer::begin(folder.path(), pass(0, 2, 2, 20)).unwrap();
        writer.write(&entry(20, 0, 2, 2)).unwrap();
        let tiling = tile(folder.path(), 25, true);
        assert_eq!((tiling.holes.clone(), tiling.partial), (vec![8..12, 20..25], 1));
        assert!(!tiling.is_unfinished(25));
        launch(folder.path(), 1, 4, 8..12);
        let tiling = tile(folder.path(), 25, true);
        assert_eq!((tiling.holes.as_slice(), tiling.coverage()), (&[20..25][..], all(20)));
        assert!(tiling.is_unfinished(25));
    }

    #[test]
    fn a_torn_line_is_passed_over_only_where_a_kill_leaves_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rank-00000.jsonl");
        launch(folder.path(), 1, 4, 0..8);
        append(&path, "{\"run\":\"01");
        let ledger = Ledger::read(folder.path()).unwrap();
        assert_eq!((ledger.torn().len(), ledger.entries(CONTENT).count()), (1, 2));
        // The next launch begins a line of its own.
        launch(folder.path(), 1, 4, 8..16);
        let ledger = Ledger::read(folder.path()).unwrap();
        assert_eq!((ledger.torn().len(), ledger.passes().len()), (1, 2));
        assert_eq!(tile(folder.path(), 16, false).coverage(), all(16));

        let sound = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = sound.lines().collect();
        for (damaged, message) in [
            (lines[1].replace("\"hash\"", "\"hash"), "line 2: it is torn and others of the same launch follow"),
            (lines[1].replace("\"rows\":4", "\"rows\":-4"), "line 2: `rows` is missing or no number"),
            (lines[1].replace("\"run\":\"", "\"run\":\"x"), "has no `ledger` line"),
            (lines[1].replace("\"hash\":\"", "\"hash\":\"x"), "`hash` is not hexadecimal"),
            (lines[1].replace("\"end\":4", "\"end\":0"), "the batch ends where it starts"),
        ] {
            std::fs::write(&path, sound.replace(lines[1], &damaged)).unwrap();
            let error = Ledger::read(folder.path()).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(error.location().unwrap().path, path);
        }
        std::fs::write(&path, sound.replace("\"ledger\":1", "\"ledger\":2")).unwrap();
        assert!(Ledger::read(folder.path()).unwrap_err().to_string().contains("it has version 2"));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(Ledger::read(folder.path()).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_line_that_cannot_be_written_fails_now_and_later() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::begin(folder.path(), pass(0, 1, 4, 0)).unwrap();
        // Stands for a full disk.
        writer.file = File::open(folder.path().join("rank-00000.jsonl")).unwrap();
        for _ in 0..2 {
            let error = writer.write(&entry(4, 0, 1, 4)).unwrap_err();
            assert!(error.to_string().contains("cannot write the ledger at position 4 of epoch 0"), "{error}");
        }
        assert!(writer.check().is_err());
    }

    #[test]
    fn epochs_that_a_batch_crosses_are_proved_together() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::begin(folder.path(), pass(0, 1, 4, 0)).unwrap();
        // Epochs of 6, 6 and 4 positions.
        for (start, end) in [((0, 0), (0, 4)), ((0, 4), (1, 2)), ((1, 2), (1, 6)), ((2, 0), (2, 4))] {
            writer.write(&Entry { start, end, coverage: all(4) }).unwrap();
        }
        let ledger = Ledger::read(folder.path()).unwrap();
        assert_eq!(ledger.epochs(CONTENT), [0..2, 2..3]);
        assert_eq!(ledger.epochs("other"), []);
        let positions = |epoch: u64| if epoch == 2 { 4 } else { 6 };
        let span = Span { epochs: 0..2, positions: &positions, from: 0, may_drop: false };
        let tiling = ledger.tile(CONTENT, &span);
        assert_eq!((tiling.chain.len(), tiling.holes.len(), span.len()), (3, 0, 12));
        assert_eq!((span.at(7), span.index((1, 1)), span.at(12)), ((1, 1), 7, (2, 0)));
    }

    proptest! {
        #[test]
        fn launches_that_overlap_and_resume_anywhere_are_proved(
            positions in 1u64..200, launches in prop::collection::vec((1u64..4, 1u64..5, 0u64..8, 0u64..5), 0..6),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let (mut checkpoint, mut reached) = (0, 0);
            for (world_size, batch_size, steps, back) in launches {
                let size = world_size * batch_size;
                let end = (checkpoint + steps * size).min(positions - (positions - checkpoint) % size);
                launch(folder.path(), world_size, batch_size, checkpoint..end);
                reached = reached.max(end);
                checkpoint = end.saturating_sub(back * size).max(checkpoint);
            }
            launch(folder.path(), 1, 1, checkpoint..positions);
            let tiling = tile(folder.path(), positions, false);
            prop_assert_eq!(tiling.coverage(), all(positions));
            prop_assert!(tiling.holes.is_empty() && tiling.conflicts.is_empty() && tiling.doubles.is_empty());
            let last = tiling.chain.last().unwrap();
            prop_assert!(checkpoint == positions || (last.world_size, last.batch_size) == (1, 1));
        }
    }
}
