//! Supplies the lengths of documents, for layouts that need them.
//!
//! The lengths of a shard are read when a layout first asks for them. They are kept within a budget
//! of bytes, and the shard that was read first is dropped first. The `concat` layout asks for none,
//! so that no memory is used for it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::corpus::{Corpus, OpenShard};
use crate::error::{Error, Result};
use crate::format::{DecodedBlock, EndsScratch, Shard};
use crate::sync::lock;

/// Bytes of the length of one document.
const LENGTH_BYTES: u64 = 4;

/// Document lengths of the shards of one source. All threads share it.
#[derive(Debug)]
pub(crate) struct DocumentLengths {
    corpus: Arc<Corpus>,
    budget_bytes: u64,
    /// The shards with known lengths, in the order in which they were read.
    held: Mutex<VecDeque<(usize, Arc<[u32]>)>>,
}

impl DocumentLengths {
    /// Keeps lengths of shards of `corpus`, in at most `budget_bytes` bytes.
    pub(crate) fn new(corpus: Arc<Corpus>, budget_bytes: u64) -> Self {
        Self { corpus, budget_bytes, held: Mutex::default() }
    }

    /// Returns the number of tokens of each non-empty document of shard `shard`, without specials.
    ///
    /// Fails if the shard cannot be read, or if its lengths alone exceed the budget.
    pub(crate) fn of_shard(&self, shard: usize) -> Result<Arc<[u32]>> {
        if let Some((_, lengths)) = lock(&self.held).iter().find(|(held, _)| *held == shard) {
            return Ok(Arc::clone(lengths));
        }
        let opened = self.corpus.shard(shard)?;
        let documents = self.corpus.facts_of(shard).counts.starts;
        let bytes = documents.saturating_mul(LENGTH_BYTES);
        if bytes > self.budget_bytes {
            return Err(Error::config(format!(
                "the lengths of the {documents} documents of a shard take {bytes} bytes, more than the {} that \
                 `memory_budget` leaves for lengths: raise it, or split the shard",
                self.budget_bytes
            ))
            .at(opened.shard().path()));
        }
        let lengths: Arc<[u32]> = read(&opened, documents).map_err(|error| error.at(opened.shard().path()))?.into();
        let mut held = lock(&self.held);
        let mut used: u64 = held.iter().map(|(_, lengths)| lengths.len() as u64 * LENGTH_BYTES).sum();
        while used + bytes > self.budget_bytes
            && let Some((_, dropped)) = held.pop_front()
        {
            used -= dropped.len() as u64 * LENGTH_BYTES;
        }
        if held.iter().all(|(other, _)| *other != shard) {
            held.push_back((shard, Arc::clone(&lengths)));
        }
        Ok(lengths)
    }
}

/// Reads the lengths of all documents of a shard, block by block. A document may span several
/// blocks.
fn read(opened: &OpenShard, documents: u64) -> Result<Vec<u32>> {
    let shard = opened.shard();
    let mut lengths = Vec::with_capacity(documents as usize);
    let (mut scratch, mut decoded) = (EndsScratch::default(), DecodedBlock::default());
    // Tokens of a document that began in an earlier block.
    let mut begun = 0;
    for (index, meta) in shard.blocks().iter().enumerate() {
        let ends = match shard {
            Shard::Random(shard) => shard.ends(index, &mut scratch),
            Shard::Block(shard) => shard.decode_into(index, None, &mut decoded).map(|()| decoded.document_ends()),
        };
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
