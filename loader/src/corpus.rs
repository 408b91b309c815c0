//! Corpus: the opened shards of one source, what is where in them, and a fingerprint.
//!
//! Shards are opened side by side on a pool of the loader's own; every fault found is reported, not only the first.

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use crate::config::DataFormat;
use crate::error::{Error, Result};
use crate::shard::discover::{self, ShardFile};
use crate::shard::{self, Access, BlockMeta, OpenOptions, Shard};
use crate::tokens::Dtype;

/// A block of the corpus: shard and block in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRef {
    /// Index of the shard.
    pub shard: u32,
    /// Index of the block in its shard.
    pub block: u32,
}

/// The opened shards of one source, in corpus order.
#[derive(Debug)]
pub struct Corpus {
    shards: Vec<Box<dyn Shard>>,
    names: Vec<String>,
    blocks: Vec<BlockRef>,
    dtype: Dtype,
    access: Access,
    fingerprint: String,
}

impl Corpus {
    /// Finds and opens the shards of `data`.
    pub fn open(data: &[String], format: DataFormat, options: &OpenOptions, pool: &rayon::ThreadPool) -> Result<Self> {
        let files = discover::find(data, format)?;
        let opened: Vec<Result<Box<dyn Shard>>> =
            pool.install(|| files.par_iter().map(|file| shard::open(file, options)).collect());
        let mut shards = Vec::with_capacity(opened.len());
        let mut faults = Vec::new();
        for result in opened {
            match result {
                Ok(shard) => shards.push(shard),
                Err(error) => faults.push(error),
            }
        }
        faults.extend(mixed_shards(&shards));
        faults.extend(unexpected_shard(&shards, format));
        if !faults.is_empty() {
            return Err(Error::all(faults));
        }
        Self::new(shards, &files)
    }

    fn new(shards: Vec<Box<dyn Shard>>, files: &[ShardFile]) -> Result<Self> {
        let mut blocks = Vec::new();
        for (index, shard) in shards.iter().enumerate() {
            for block in 0..shard.blocks().len() {
                let too_many = || Error::data("corpus has more than 2^32 shards or blocks in a shard");
                blocks.push(BlockRef {
                    shard: u32::try_from(index).map_err(|_| too_many())?,
                    block: u32::try_from(block).map_err(|_| too_many())?,
                });
            }
        }
        // Empty shards have no blocks and say nothing of how tokens are reached.
        let typical = shards.iter().find(|shard| !shard.blocks().is_empty()).or(shards.first());
        let (dtype, access) = typical.map_or((Dtype::I32, Access::Random), |shard| (shard.dtype(), shard.access()));
        let names: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
        let fingerprint = fingerprint(&names, &shards);
        Ok(Self { shards, names, blocks, dtype, access, fingerprint })
    }

    /// The shards in corpus order.
    pub fn shards(&self) -> &[Box<dyn Shard>] {
        &self.shards
    }

    /// Names of the shards, relative to the roots they were found under.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Every block that holds tokens, in corpus order.
    pub fn blocks(&self) -> &[BlockRef] {
        &self.blocks
    }

    /// Metadata of every block, in the same order.
    pub fn block_metas(&self) -> impl Iterator<Item = &BlockMeta> {
        self.shards.iter().flat_map(|shard| shard.blocks())
    }

    /// Block `index` of the corpus: its shard, its index there and its metadata.
    pub fn block(&self, index: usize) -> (&dyn Shard, usize, &BlockMeta) {
        let at = self.blocks[index];
        let shard = self.shards[at.shard as usize].as_ref();
        (shard, at.block as usize, &shard.blocks()[at.block as usize])
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
        self.block_metas().map(|block| block.tokens).sum()
    }

    /// Non-empty documents.
    pub fn documents(&self) -> u64 {
        self.block_metas().map(|block| block.starts).sum()
    }

    /// Bytes of the tables of shards and blocks.
    pub fn index_bytes(&self) -> u64 {
        let names: usize = self.names.iter().map(|name| size_of::<String>() + name.len()).sum();
        let shards: u64 = self.shards.iter().map(|shard| shard.index_bytes()).sum();
        (names + size_of_val(self.shards.as_slice()) + size_of_val(self.blocks.as_slice())) as u64 + shards
    }

    /// Digest of names, sizes, counts and types, but of no absolute path or time.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// Shards that cannot stand in one corpus together: other token types, or another way to be read.
pub fn mixed_shards(shards: &[Box<dyn Shard>]) -> Vec<Error> {
    let Some(first) = shards.first() else { return Vec::new() };
    let mut faults = Vec::new();
    if let Some(other) = shards.iter().find(|shard| shard.format().family() != first.format().family()) {
        faults.push(Error::data(format!(
            "formats differ between shards: `{}` is {}, `{}` is {}; load them as two corpora, or set `format`",
            first.path().display(),
            first.format().name(),
            other.path().display(),
            other.format().name()
        )));
        return faults;
    }
    if let Some(other) = shards.iter().find(|shard| shard.dtype() != first.dtype()) {
        faults.push(Error::data(format!(
            "token types differ between shards: `{}` has {}, `{}` has {}; rewrite them with one type",
            first.path().display(),
            first.dtype().name(),
            other.path().display(),
            other.dtype().name()
        )));
    }
    // Without tokens there is nothing that could be reached either way.
    let mut full = shards.iter().filter(|shard| !shard.blocks().is_empty());
    if let Some(first) = full.next()
        && let Some(other) = full.find(|shard| shard.access() != first.access())
    {
        faults.push(Error::data(format!(
            "compressed and uncompressed Arrow shards cannot be mixed: `{}` and `{}` differ; rewrite them alike",
            first.path().display(),
            other.path().display()
        )));
    }
    faults
}

/// The first shard of another format than the setting `format` allows.
fn unexpected_shard(shards: &[Box<dyn Shard>], format: DataFormat) -> Option<Error> {
    let expected = match format {
        DataFormat::Auto => return None,
        DataFormat::Parquet => "parquet",
        DataFormat::Arrow => "arrow",
    };
    let shard = shards.iter().find(|shard| shard.format().family() != expected)?;
    let message = format!("`format` is {expected}, but this shard is {}", shard.format().name());
    Some(Error::data(message).at(shard.path()))
}

fn fingerprint(names: &[String], shards: &[Box<dyn Shard>]) -> String {
    let mut hash = Xxh3::new();
    let mut text = |text: &str| {
        hash.update(&(text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    };
    for (name, shard) in names.iter().zip(shards) {
        text(name);
        text(shard.format().name());
        text(shard.dtype().name());
        let tokens: u64 = shard.blocks().iter().map(|block| block.tokens).sum();
        let documents: u64 = shard.blocks().iter().map(|block| block.starts).sum();
        text(&format!("{} {} {tokens} {documents}", shard.size_bytes(), shard.rows()));
    }
    format!("{:032x}", hash.digest128())
}
