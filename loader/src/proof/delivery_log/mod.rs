//! The delivery log: one line for every batch that a rank received, so that a run can prove later
//! which rows it was trained on.
//!
//! Each rank appends to a file of its own, for example `rank-00003.jsonl`. A pass writes a `begin`
//! line when it starts. It then writes one line per batch, before the loader returns that batch. A
//! killed process leaves at most its last line torn, and the next launch begins a new line.
//!
//! The reader joins the ranks' lines to global batches. It then looks for a chain of complete
//! global batches from the start of an epoch to its end. Launches overlap where a process was
//! killed after its last checkpoint. The batches that both launches delivered must be equal; the
//! later launch counts.
//!
//! `forebay verify` computes the checksums that these lines must have; this module only reads and
//! joins the lines.

mod tiling;

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, ErrorKind, Result};
use crate::proof::checksum::Checksum;

pub use tiling::{DeliveryPair, GlobalBatch, ProofRange, Tiling};

/// Version of the format of the lines.
pub const VERSION: u64 = 1;

/// One pass over the data on one rank, as its `begin` line describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedPass {
    /// Name of the pass. Each of its lines contains this name.
    pub run: String,
    /// Start of the pass, in milliseconds since 1970.
    pub time_ms: u64,
    /// The launcher's name for this start of the job, if the launcher has one.
    pub launch: Option<String>,
    /// Epoch in which the pass began.
    pub epoch: u64,
    /// Position at which the pass began.
    pub position: u64,
    /// Data-parallel rank.
    pub rank: u64,
    /// Data-parallel size.
    pub world_size: u64,
    /// Rows per rank and step.
    pub batch_size: u64,
    /// Digest of the content settings and the corpus. Passes with equal digests deliver the same
    /// rows.
    pub content: String,
    /// The content settings, as names and printed values.
    pub settings: Vec<(String, String)>,
    /// Fingerprint of the corpus.
    pub fingerprint: String,
    /// Number of shards of the corpus from each epoch on, in the form that a state uses.
    pub growth: String,
}

/// One batch that a rank received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedBatch {
    /// Epoch and position of the first row of its global batch.
    pub start: (u64, u64),
    /// Epoch and position that a state saved right after this batch contains.
    pub end: (u64, u64),
    /// Checksum of the delivered rows. It leaves out rows that were put in the place of others.
    pub checksum: Checksum,
    /// Epochs and positions of rows that could not be read, and that other rows replaced.
    pub substituted: Vec<(u64, u64)>,
}

/// Writes the lines of one pass. Its owner serialises the calls.
#[derive(Debug)]
pub(crate) struct LogWriter {
    path: PathBuf,
    file: File,
    pass: LoggedPass,
    failure: Option<Error>,
}

impl LogWriter {
    /// Begins `pass` in the file of its rank under `folder`, and fills in the pass's name and time.
    ///
    /// Appends to an existing file, and creates the folder and the file if they are missing.
    pub(crate) fn begin(folder: &Path, mut pass: LoggedPass) -> Result<Self> {
        static PASSES: AtomicU64 = AtomicU64::new(0);
        let path = folder.join(format!("rank-{:05}.jsonl", pass.rank));
        let failed = |error| Error::io("cannot write the delivery log", error).at(&path);
        std::fs::create_dir_all(folder).map_err(failed)?;
        let mut file = File::options().create(true).read(true).append(true).open(&path).map_err(failed)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let number = PASSES.fetch_add(1, Ordering::Relaxed);
        let name = format!("{} {} {number} {}", now.as_nanos(), std::process::id(), pass.rank);
        pass.run = format!("{:016x}", xxh3_64(name.as_bytes()));
        pass.time_ms = now.as_millis() as u64;
        let line = json!({
            "delivery_log": VERSION,
            "run": pass.run,
            "time_ms": pass.time_ms,
            "launch": pass.launch,
            "epoch": pass.epoch,
            "position": pass.position,
            "rank": pass.rank,
            "world_size": pass.world_size,
            "batch_size": pass.batch_size,
            "content": pass.content,
            "settings": pass.settings.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect::<Map<_, _>>(),
            "fingerprint": pass.fingerprint,
            "growth": pass.growth,
        });
        // If the file ends with a torn line, begin a new line, so that the torn line stays
        // separate.
        let torn = is_torn(&mut file).map_err(failed)?;
        let line = format!("{}{line}\n", if torn { "\n" } else { "" });
        file.write_all(line.as_bytes()).map_err(failed)?;
        Ok(Self { path, file, pass, failure: None })
    }

    /// Writes the line of one batch. After a failure, every later call fails with the same error.
    pub(crate) fn write(&mut self, batch: &LoggedBatch) -> Result<()> {
        self.check()?;
        let LoggedBatch { start, end, checksum, substituted } = batch;
        let substituted = match substituted.as_slice() {
            [] => String::new(),
            rows => {
                let rows: Vec<String> = rows.iter().map(|(epoch, position)| format!("[{epoch},{position}]")).collect();
                format!(",\"substituted\":[{}]", rows.join(","))
            }
        };
        // Use one write for the line. A kill then leaves either the whole line or nothing on a
        // local file system.
        let line = format!(
            "{{\"run\":\"{}\",\"epoch\":{},\"position\":{},\"end_epoch\":{},\"end\":{},\"rank\":{},\"world_size\":{},\"batch_size\":{},\
             \"rows\":{},\"tokens\":{},\"hash\":\"{}\"{substituted}}}\n",
            self.pass.run,
            start.0,
            start.1,
            end.0,
            end.1,
            self.pass.rank,
            self.pass.world_size,
            self.pass.batch_size,
            checksum.rows,
            checksum.tokens,
            checksum.hash_text(),
        );
        self.file.write_all(line.as_bytes()).map_err(|error| {
            let text = format!("cannot write the delivery log at position {} of epoch {}", start.1, start.0);
            let error = Error::io(text, error).at(&self.path);
            self.failure = Some(error.clone());
            error
        })
    }

    /// Fails if an earlier line could not be written.
    pub(crate) fn check(&self) -> Result<()> {
        self.failure.clone().map_or(Ok(()), Err)
    }
}

fn settings_of(begin: &Value) -> Option<Vec<(String, String)>> {
    let settings = begin.get("settings")?.as_object()?;
    settings.iter().map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

fn pairs_of(rows: &Value) -> Option<Vec<(u64, u64)>> {
    let pair = |row: &Value| match row.as_array()?.as_slice() {
        [epoch, position] => Some((epoch.as_u64()?, position.as_u64()?)),
        _ => None,
    };
    rows.as_array()?.iter().map(pair).collect()
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

/// The lines of all ranks, as read from the log's files.
#[derive(Debug, Default)]
pub struct DeliveryLog {
    files: Vec<PathBuf>,
    passes: Vec<LoggedPass>,
    /// For each pass: its file, and its first and last line in that file, counted from 0.
    lines_of_passes: Vec<(usize, Range<u64>)>,
    batches: Vec<(u32, LoggedBatch)>,
    torn: Vec<String>,
}

impl DeliveryLog {
    /// Reads every `rank-*.jsonl` file of `folder` and of all folders inside it.
    ///
    /// Skips torn lines at the places where a kill can leave them. Fails, with the file and the
    /// line, on any other damage.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut delivery_log = Self::default();
        delivery_log.find(folder)?;
        delivery_log.files.sort();
        if delivery_log.files.is_empty() {
            return Err(
                Error::new(ErrorKind::NotFound, "no delivery log: expected files named `rank-*.jsonl`").at(folder)
            );
        }
        for index in 0..delivery_log.files.len() {
            let path = delivery_log.files[index].clone();
            let content =
                std::fs::read(&path).map_err(|error| Error::io("cannot read the delivery log", error).at(&path))?;
            delivery_log.read_file(index, &content).map_err(|error| error.at(&path))?;
        }
        Ok(delivery_log)
    }

    fn find(&mut self, folder: &Path) -> Result<()> {
        let failed = |error| Error::io("cannot read the delivery log", error).at(folder);
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
        let is_begin = |line: &[u8]| parse(line).is_some_and(|value| value.get("delivery_log").is_some());
        // Number of each pass of this file, by the pass's name.
        let mut passes: HashMap<String, u32> = HashMap::new();
        for (number, line) in lines.iter().enumerate().filter(|(_, line)| !line.is_empty()) {
            let at = |text: &str| Error::data(format!("delivery log is damaged in line {}: {text}", number + 1));
            let Some(value) = parse(line) else {
                // A kill tears only the last line of a launch: the last line of the file, or the
                // line before the next launch's `begin` line.
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
            if value.get("delivery_log").is_some() {
                let version = int("delivery_log")?;
                if version != VERSION {
                    return Err(at(&format!("it has version {version}, this forebay reads version {VERSION}")));
                }
                let index = u32::try_from(self.passes.len()).map_err(|_| at("there are more than 2^32 passes"))?;
                passes.insert(run.clone(), index);
                self.lines_of_passes.push((file, number as u64..number as u64));
                self.passes.push(LoggedPass {
                    run,
                    time_ms: int("time_ms")?,
                    launch: value.get("launch").and_then(Value::as_str).map(str::to_owned),
                    epoch: int("epoch")?,
                    position: int("position")?,
                    rank: int("rank")?,
                    world_size: int("world_size")?,
                    batch_size: int("batch_size")?,
                    content: text("content")?,
                    settings: settings_of(&value).ok_or_else(|| at("`settings` is missing or no object of texts"))?,
                    fingerprint: text("fingerprint")?,
                    growth: text("growth")?,
                });
                continue;
            }
            let pass = *passes.get(&run).ok_or_else(|| at(&format!("its run `{run}` has no `delivery_log` line")))?;
            let hash = u128::from_str_radix(&text("hash")?, 16).map_err(|_| at("`hash` is not hexadecimal"))?;
            let checksum = Checksum { rows: int("rows")?, tokens: int("tokens")?, hash };
            let mut batch = LoggedBatch {
                start: (int("epoch")?, int("position")?),
                end: (int("end_epoch")?, int("end")?),
                checksum,
                substituted: Vec::new(),
            };
            if let Some(rows) = value.get("substituted") {
                batch.substituted = pairs_of(rows).ok_or_else(|| at("`substituted` is no list of pairs"))?;
            }
            if batch.end <= batch.start {
                return Err(at("the batch ends where it starts"));
            }
            self.lines_of_passes[pass as usize].1.end = number as u64;
            self.batches.push((pass, batch));
        }
        Ok(())
    }

    /// The files that were read, sorted by path.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Every pass, in the order of files and lines.
    pub fn passes(&self) -> &[LoggedPass] {
        &self.passes
    }

    /// File and line number of each torn line.
    pub fn torn(&self) -> &[String] {
        &self.torn
    }

    /// The lines of those passes whose content digest equals `content`.
    pub fn batches(&self, content: &str) -> impl Iterator<Item = (&LoggedPass, &LoggedBatch)> {
        let batches = self.batches.iter().map(|(pass, batch)| (&self.passes[*pass as usize], batch));
        batches.filter(move |(pass, _)| pass.content == content)
    }

    /// Ranges of epochs of `content` that can be proved.
    ///
    /// A range has one epoch, or several epochs where a batch crosses from one epoch into the next.
    pub fn epochs(&self, content: &str) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = self
            .batches(content)
            .map(|(_, batch)| batch.start.0..batch.end.0 + u64::from(batch.end.1 > 0 || batch.end.0 == batch.start.0))
            .collect();
        ranges.sort_unstable_by_key(|range| (range.start, range.end));
        let mut epochs: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match epochs.last_mut() {
                Some(last) if range.start < last.end => last.end = last.end.max(range.end),
                _ => epochs.push(range),
            }
        }
        epochs
    }
}

#[cfg(test)]
mod tests;
