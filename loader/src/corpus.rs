//! Corpus: the shards of one source in order, what is where in them, and a fingerprint.
//!
//! Shards are opened side by side on a pool of the loader's own; every fault found is reported, not only the first.

use std::path::Path;

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use crate::config::DataFormat;
use crate::error::{Error, Result};
use crate::shard::discover::{self, ShardFile};
use crate::shard::{self, Access, Counts, OpenOptions, Shard, ShardFacts};
use crate::tokens::Dtype;

/// A block of the corpus: shard and block in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRef {
    /// Index of the shard.
    pub shard: u32,
    /// Index of the block in its shard.
    pub block: u32,
}

/// An opened shard, and what stands before each of its blocks.
#[derive(Debug)]
pub struct OpenShard {
    shard: Box<dyn Shard>,
    before: Vec<Counts>,
}

impl OpenShard {
    fn new(shard: Box<dyn Shard>) -> Self {
        let mut before = Vec::with_capacity(shard.blocks().len() + 1);
        let mut sum = Counts::default();
        before.push(sum);
        for block in shard.blocks() {
            sum = sum + block.counts();
            before.push(sum);
        }
        Self { shard, before }
    }

    /// The shard.
    pub fn shard(&self) -> &dyn Shard {
        self.shard.as_ref()
    }

    /// What is before each block and, last, in all of them.
    pub fn before(&self) -> &[Counts] {
        &self.before
    }

    /// Whether the first token of block `block` continues a document of the block before.
    pub fn continues(&self, block: usize) -> bool {
        self.before[block].starts > self.before[block].ends
    }
}

/// The shards of one source, in corpus order.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<ShardFile>,
    facts: Vec<ShardFacts>,
    shards: Vec<OpenShard>,
    dtype: Dtype,
    access: Access,
    fingerprint: String,
}

impl Corpus {
    /// Finds and opens the shards of `data`.
    pub fn open(data: &[String], format: DataFormat, options: &OpenOptions, pool: &rayon::ThreadPool) -> Result<Self> {
        let files = discover::find(data, format)?;
        let opened: Vec<Result<OpenShard>> =
            pool.install(|| files.par_iter().map(|file| shard::open(file, options).map(OpenShard::new)).collect());
        let mut shards = Vec::with_capacity(opened.len());
        let mut faults = Vec::new();
        for result in opened {
            match result {
                Ok(shard) => shards.push(shard),
                Err(error) => faults.push(error),
            }
        }
        let facts: Vec<ShardFacts> = shards.iter().map(|shard| shard.shard().facts()).collect();
        faults.extend(mixed_shards(shards.iter().map(|shard| shard.shard().path()).zip(facts.iter().copied())));
        let described = shards.iter().map(|shard| shard.shard().path()).zip(facts.iter().copied());
        faults.extend(unexpected_shard(described, format));
        if !faults.is_empty() {
            return Err(Error::all(faults));
        }
        Self::new(files, facts, shards)
    }

    fn new(files: Vec<ShardFile>, facts: Vec<ShardFacts>, shards: Vec<OpenShard>) -> Result<Self> {
        let most = facts.iter().map(|facts| facts.blocks).max().unwrap_or(0).max(files.len() as u64);
        if u32::try_from(most).is_err() {
            return Err(Error::data("corpus has more than 2^32 shards or blocks in a shard"));
        }
        // Empty shards have no blocks and say nothing of how tokens are reached.
        let typical = facts.iter().find(|facts| facts.blocks > 0).or(facts.first());
        let (dtype, access) = typical.map_or((Dtype::I32, Access::Random), |facts| (facts.dtype, facts.access));
        let mut corpus = Self { files, facts, shards, dtype, access, fingerprint: String::new() };
        corpus.fingerprint = corpus.fingerprint_of(corpus.len());
        Ok(corpus)
    }

    /// Shards.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Where the shards are, and their names relative to the roots they were found under.
    pub fn files(&self) -> &[ShardFile] {
        &self.files
    }

    /// What is known of each shard, in corpus order.
    pub fn facts(&self) -> impl ExactSizeIterator<Item = ShardFacts> + '_ {
        self.facts.iter().copied()
    }

    /// Tokens and documents of each shard, in corpus order.
    pub fn counts(&self) -> impl ExactSizeIterator<Item = Counts> + '_ {
        self.facts().map(|facts| facts.counts)
    }

    /// Shard `index`, opened.
    pub fn shard(&self, index: usize) -> Result<&OpenShard> {
        Ok(&self.shards[index])
    }

    /// Type of the token ids on disk.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How tokens are reached: `Block` if any shard has to be decoded.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Tokens on disk.
    pub fn tokens(&self) -> u64 {
        self.counts().map(|counts| counts.tokens).sum()
    }

    /// Non-empty documents.
    pub fn documents(&self) -> u64 {
        self.counts().map(|counts| counts.starts).sum()
    }

    /// Bytes that all blocks take when decoded; 0 where nothing is decoded.
    pub fn decoded_bytes(&self) -> u64 {
        self.facts().map(|facts| facts.decoded_bytes).sum()
    }

    /// Bytes that the largest block takes when decoded.
    pub fn largest_block_bytes(&self) -> u64 {
        self.facts().map(|facts| facts.largest_block_bytes).max().unwrap_or(0)
    }

    /// Digest of names, sizes, counts and types, but of no absolute path or time.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The fingerprint of a corpus of the first `shards` shards alone. Costs a hash of some 50 bytes per shard.
    ///
    /// # Panics
    /// When there are fewer shards.
    pub fn fingerprint_of(&self, shards: usize) -> String {
        let mut hash = Xxh3::new();
        let mut text = |text: &str| {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        for (file, facts) in self.files[..shards].iter().zip(self.facts()) {
            text(&file.name);
            text(facts.format.name());
            text(facts.dtype.name());
            let Counts { tokens, starts, .. } = facts.counts;
            text(&format!("{} {} {tokens} {starts}", facts.size_bytes, facts.rows));
        }
        format!("{:032x}", hash.digest128())
    }
}

/// Shards that cannot stand in one corpus together: other token types, or another way to be read.
pub fn mixed_shards<'a>(shards: impl Iterator<Item = (&'a Path, ShardFacts)> + Clone) -> Vec<Error> {
    let Some((first_path, first)) = shards.clone().next() else { return Vec::new() };
    let mut faults = Vec::new();
    if let Some((path, other)) = shards.clone().find(|(_, facts)| facts.format.family() != first.format.family()) {
        faults.push(Error::data(format!(
            "formats differ between shards: `{}` is {}, `{}` is {}; load them as two corpora, or set `format`",
            first_path.display(),
            first.format.name(),
            path.display(),
            other.format.name()
        )));
        return faults;
    }
    if let Some((path, other)) = shards.clone().find(|(_, facts)| facts.dtype != first.dtype) {
        faults.push(Error::data(format!(
            "token types differ between shards: `{}` has {}, `{}` has {}; rewrite them with one type",
            first_path.display(),
            first.dtype.name(),
            path.display(),
            other.dtype.name()
        )));
    }
    // Without tokens there is nothing that could be reached either way.
    let mut full = shards.filter(|(_, facts)| facts.blocks > 0);
    if let Some((first_path, first)) = full.next()
        && let Some((path, _)) = full.find(|(_, facts)| facts.access != first.access)
    {
        faults.push(Error::data(format!(
            "compressed and uncompressed Arrow shards cannot be mixed: `{}` and `{}` differ; rewrite them alike",
            first_path.display(),
            path.display()
        )));
    }
    faults
}

/// The first shard of another format than the setting `format` allows.
fn unexpected_shard<'a>(mut shards: impl Iterator<Item = (&'a Path, ShardFacts)>, format: DataFormat) -> Option<Error> {
    let expected = match format {
        DataFormat::Auto => return None,
        DataFormat::Parquet => "parquet",
        DataFormat::Arrow => "arrow",
    };
    let (path, facts) = shards.find(|(_, facts)| facts.format.family() != expected)?;
    let message = format!("`format` is {expected}, but this shard is {}", facts.format.name());
    Some(Error::data(message).at(path))
}
