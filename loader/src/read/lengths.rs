//! Supplies the lengths of documents, for layouts that need them.
//!
//! The lengths of all shards are read once, side by side, when a layout first asks for them. With a
//! folder for the saved index they are saved there, and a later start reads no shard for them.
//! Otherwise they stay in memory, within a budget. The `concat` layout asks for none.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::corpus::lengths::{SavedLengths, Section};
use crate::corpus::{Corpus, OpenShard};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Ends, EndsScratch, Shard};
use crate::settings::{Config, default_threads};
use crate::sync::lock;

/// Bytes of the length of one document.
const LENGTH_BYTES: u64 = 2;

/// Document lengths of the shards of one source. All threads share it.
#[derive(Debug)]
pub(crate) struct DocumentLengths {
    corpus: Arc<Corpus>,
    budget_bytes: u64,
    threads: usize,
    known: OnceLock<SavedLengths>,
    /// Held while the lengths are read, so that one thread reads them. Keeps what could not be
    /// saved.
    reading: Mutex<Vec<String>>,
    /// Time in which lengths were read from shards. Empty if all were saved, or none was asked for.
    took: OnceLock<Duration>,
}

impl DocumentLengths {
    /// Keeps lengths of shards of `corpus`. Without a saved index, they take at most `budget_bytes`
    /// bytes.
    pub(crate) fn new(corpus: Arc<Corpus>, budget_bytes: u64, config: &Config) -> Self {
        let threads = config.num_threads.unwrap_or_else(default_threads).max(1) as usize;
        Self { corpus, budget_bytes, threads, known: OnceLock::new(), reading: Mutex::default(), took: OnceLock::new() }
    }

    /// Returns the number of tokens of each non-empty document of shard `shard`, without specials.
    ///
    /// Fails if a shard cannot be read, or if the lengths exceed the budget.
    pub(crate) fn of_shard(&self, shard: usize) -> Result<Arc<[u32]>> {
        let documents = self.corpus.facts_of(shard).counts.starts;
        Ok(self.of(shard, 0..documents)?.into())
    }

    /// Returns the number of tokens of `documents` of shard `shard`, as numbers among its non-empty
    /// documents.
    pub(crate) fn of(&self, shard: usize, documents: Range<u64>) -> Result<Vec<u32>> {
        self.all()?.of(shard, documents).map_err(|error| match self.corpus.lengths_file() {
            Some(file) => error.at(file.path()),
            None => error,
        })
    }

    /// Bytes of the lengths in memory. Saved lengths stay in their file.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.known.get().map_or(0, SavedLengths::held_bytes)
    }

    /// Reasons why the lengths could not be saved, one line each.
    pub(crate) fn warnings(&self) -> Vec<String> {
        lock(&self.reading).clone()
    }

    /// Time in which lengths were read from shards. `None` if no shard was read for them.
    pub(crate) fn took(&self) -> Option<Duration> {
        self.took.get().copied()
    }

    fn all(&self) -> Result<&SavedLengths> {
        if let Some(known) = self.known.get() {
            return Ok(known);
        }
        let mut warnings = lock(&self.reading);
        if let Some(known) = self.known.get() {
            return Ok(known);
        }
        let found = self.find(&mut warnings)?;
        Ok(self.known.get_or_init(|| found))
    }

    /// Loads the saved lengths, reads what they lack, and saves all.
    fn find(&self, warnings: &mut Vec<String>) -> Result<SavedLengths> {
        let (file, digests) = (self.corpus.lengths_file(), self.corpus.shard_digests());
        let saved = file.as_ref().and_then(|file| {
            file.load(self.corpus.io()).unwrap_or_else(|error| {
                warnings.push(format!("{}; it is made anew", error.report()));
                None
            })
        });
        let documents = |shard: usize| self.corpus.facts_of(shard).counts.starts;
        let is_known = |saved: &SavedLengths, shard: usize, record: usize| {
            saved.shard(record) == digests[shard] && saved.documents(record) == documents(shard)
        };
        let has_all = |saved: &SavedLengths| {
            saved.len() == digests.len() && (0..digests.len()).all(|shard| is_known(saved, shard, shard))
        };
        let saved = match saved {
            Some(saved) if has_all(&saved) => return Ok(saved),
            saved => saved,
        };
        let total: u64 = (0..digests.len()).map(documents).sum();
        let bytes = total.saturating_mul(LENGTH_BYTES);
        if file.is_none() && bytes > self.budget_bytes {
            return Err(Error::config(format!(
                "the lengths of {total} documents take {bytes} bytes, more than the {} that `memory_budget` leaves for \
                 lengths: raise it, or set `cache_dir`, where they are saved",
                self.budget_bytes
            )));
        }
        let began = Instant::now();
        let records: HashMap<u128, usize> =
            saved.iter().flat_map(|saved| (0..saved.len()).map(|record| (saved.shard(record), record))).collect();
        let section = |shard: usize| {
            let known = records.get(&digests[shard]).copied().zip(saved.as_ref());
            if let Some((record, saved)) = known.filter(|(record, saved)| is_known(saved, shard, *record))
                && let Ok(section) = saved.section(record)
            {
                return Ok(section);
            }
            let opened = self.corpus.shard(shard)?;
            let lengths = read(&opened, documents(shard)).map_err(|error| error.at(opened.shard().path()))?;
            Ok(Section::of(&lengths))
        };
        let sections = rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .thread_name(|index| format!("forebay-lengths-{index}"))
            .build_scoped(|thread| thread.run(), |pool| crate::corpus::side_by_side(pool, digests.len(), section))
            .map_err(|error| {
                Error::new(ErrorKind::Io, "cannot start threads for document lengths").with_source(error)
            })?;
        let mut faults = Vec::new();
        let mut found = Vec::with_capacity(digests.len());
        for (digest, section) in digests.into_iter().zip(sections) {
            section.map(|section| found.push((digest, section))).unwrap_or_else(|error| faults.push(error));
        }
        match faults.len() {
            0 => {}
            1 => return Err(faults.remove(0)),
            _ => return Err(Error::all(faults)),
        }
        let _ = self.took.set(began.elapsed());
        let Some(file) = file else { return Ok(SavedLengths::of_sections(0, found)) };
        let lengths = SavedLengths::of_sections(file.key(), found);
        if let Err(error) = file.save(&lengths) {
            warnings.push(format!("{}; document lengths are read at every start", error.report()));
            return Ok(lengths);
        }
        // Lengths in a file take no memory.
        Ok(file.load(self.corpus.io()).ok().flatten().filter(|saved| saved.len() == lengths.len()).unwrap_or(lengths))
    }
}

/// Reads the lengths of all documents of a shard, block by block, without their tokens. A document
/// may span several blocks.
fn read(opened: &OpenShard, documents: u64) -> Result<Vec<u32>> {
    let shard = opened.shard();
    let mut lengths = Vec::with_capacity(documents as usize);
    let (mut scratch, mut list) = (EndsScratch::default(), Vec::new());
    // Tokens of a document that began in an earlier block.
    let mut begun = 0;
    for (index, meta) in shard.blocks().iter().enumerate() {
        let ends = match shard {
            Shard::Random(shard) => shard.ends(index, &mut scratch),
            Shard::Block(shard) => shard.ends_into(index, &mut list).map(|()| Ends::List(&list)),
        };
        let ends = ends.and_then(|ends| opened.check_ends(index, &ends).map(|()| ends));
        let ends = ends.map_err(|error| error.in_block(index as u64))?;
        let mut start = 0;
        for document in 0..ends.len() {
            let end = ends.get(document);
            lengths.push(length(begun + end - start)?);
            (begun, start) = (0, end);
        }
        begun += meta.tokens - start;
    }
    Ok(lengths)
}

fn length(tokens: u64) -> Result<u32> {
    u32::try_from(tokens).map_err(|_| {
        Error::data(format!("a document has {tokens} tokens; at most {} are possible: split it", u32::MAX))
    })
}
