//! Prints the result of a rewriting.

use std::path::Path;
use std::time::Instant;

use forebay::tokens::Dtype;
use serde_json::{Value, json};

use super::manifest::Done;
use super::options::{To, name};
use super::source::SourceShard;
use super::work::WrittenShard;
use crate::report::{bytes, grouped, line, names, number_of};

/// The result of a rewriting, in numbers.
pub(super) struct Summary {
    sources: usize,
    source_bytes: u64,
    shards: usize,
    bytes: u64,
    were_there: usize,
    rows: u64,
    documents: u64,
    tokens: u64,
    dtype: Dtype,
    to: To,
    left_out: Vec<String>,
    /// Number of documents whose ends the result does not have.
    pub(super) lost_ends: u64,
    seconds: f64,
}

impl Summary {
    pub(super) fn new(sources: &[SourceShard], shards: &[WrittenShard], dtype: Dtype, to: To, began: Instant) -> Self {
        let mut left_out: Vec<String> = sources.iter().flat_map(|source| source.others.iter().cloned()).collect();
        left_out.sort_unstable();
        left_out.dedup();
        let sum = |of: fn(&Done) -> u64| shards.iter().map(|shard| of(&shard.done)).sum();
        Self {
            sources: sources.len(),
            source_bytes: sources.iter().map(|source| source.facts.stamp.size_bytes).sum(),
            shards: shards.len(),
            bytes: sum(|done| done.bytes),
            were_there: shards.iter().filter(|shard| shard.was_there).count(),
            rows: sum(|done| done.content.rows),
            documents: sum(|done| done.content.documents),
            tokens: sum(|done| done.content.tokens),
            dtype,
            to,
            left_out,
            lost_ends: 0,
            seconds: began.elapsed().as_secs_f64(),
        }
    }

    pub(super) fn write(&self, target: &Path, out: &mut dyn std::io::Write) -> std::io::Result<()> {
        let Self { rows, documents, .. } = self;
        line(out, "source", &format!("{}, {}", number_of(self.sources as u64, "shard"), bytes(self.source_bytes)))?;
        line(
            out,
            "result",
            &format!("{}, {}, in {}", number_of(self.shards as u64, "shard"), bytes(self.bytes), target.display()),
        )?;
        if self.were_there > 0 {
            line(out, "kept", &format!("{} that were there", number_of(self.were_there as u64, "shard")))?;
        }
        line(out, "format", &name(self.to))?;
        line(out, "dtype", self.dtype.name())?;
        line(out, "rows", &grouped(*rows))?;
        line(out, "documents", &grouped(*documents))?;
        line(out, "tokens", &grouped(self.tokens))?;
        if !self.left_out.is_empty() {
            let advice = if self.to.flat().is_none() {
                let them = if self.left_out.len() == 1 { "it" } else { "them" };
                format!(": `--set fields={}` keeps {them}", self.left_out.join(","))
            } else {
                String::new()
            };
            line(out, "left out", &format!("{}{advice}", names(&self.left_out)))?;
        }
        if self.to == To::Raw {
            line(out, "to read", &format!("set `bin_dtype={}`: the files have no header", self.dtype.name()))?;
        }
        if self.lost_ends > 0 {
            let documents = number_of(self.lost_ends, "document");
            let text = format!("{documents} joined: the format has no ends; `--set eos_id=N` writes N after each");
            line(out, "joined", &text)?;
        }
        line(out, "sound", &format!("every shard was read back and is equal to its source; {:.1} s", self.seconds))
    }

    pub(super) fn json(&self, target: &Path) -> Value {
        json!({
            "source_shards": self.sources,
            "source_bytes": self.source_bytes,
            "target": target.display().to_string(),
            "shards": self.shards,
            "bytes": self.bytes,
            "kept": self.were_there,
            "format": name(self.to),
            "dtype": self.dtype.name(),
            "rows": self.rows,
            "documents": self.documents,
            "tokens": self.tokens,
            "left_out": self.left_out,
            "joined_documents": self.lost_ends,
            "seconds": self.seconds,
        })
    }
}
