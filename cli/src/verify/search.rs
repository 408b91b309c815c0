//! Finds the documents of a step of a delivery log, and the steps of a document.

use std::ops::Range;

use forebay::Error;
use forebay::loader::Sample;
use forebay::proof::delivery_log::GlobalBatch;
use forebay::settings::Config;
use indicatif::ProgressBar;
use serde_json::json;

use super::delivery_log::{EpochGroup, Found, of};
use super::{BAR_EVERY, Options, TEMPLATE, reading_bar, write_json};
use crate::report::line;
use crate::sequential::{self, Visitor};
use crate::{Context, Failure, progress};

impl Found<'_> {
    fn shards(&self) -> Vec<ShardName> {
        let mut shards = Vec::new();
        for (source, (prefix, corpus)) in self.loader.corpora().enumerate() {
            for (number, file) in corpus.files().iter().enumerate() {
                let name = if prefix.is_empty() { file.name.clone() } else { format!("{prefix}/{}", file.name) };
                shards.push(ShardName { source, number, name });
            }
        }
        shards
    }

    /// The global batch number `step` of the first group.
    fn batch(&self, step: u64) -> Result<(&EpochGroup, &GlobalBatch), Failure> {
        let group = &self.groups[0];
        let batch = usize::try_from(step).ok().and_then(|step| group.tiling.chain.get(step)).ok_or_else(|| {
            let steps = group.tiling.chain.len();
            Error::config(format!(
                "cannot show step {step}: the delivery log has {steps} of epoch {}",
                group.epochs.start
            ))
        })?;
        Ok((group, batch))
    }

    /// Prints the documents of a global batch.
    pub(super) fn documents_of(&self, step: u64, options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
        let (group, batch) = self.batch(step)?;
        let (_, mut sample) = self.loader.epoch_chain(group.epochs.clone());
        let mut rows: Vec<(usize, u64, u64)> = Vec::new();
        for index in batch.indices.clone() {
            let (Sample { source, sequence, .. }, (_, position)) = (sample(index)?, self.at(group, index));
            rows.push((source, sequence, position));
        }
        rows.sort_unstable();
        let bar = reading_bar(self.loader, context)?;
        let mut documents =
            DocumentSearch { config: self.loader.config(), source: 0, sequences: Vec::new(), found: Vec::new(), bar };
        for (source, (_, corpus)) in self.loader.corpora().enumerate() {
            documents.source = source;
            documents.sequences = rows.iter().filter(|row| row.0 == source).map(|row| row.1).collect();
            if !documents.sequences.is_empty() {
                sequential::read(self.loader.config(), corpus, &mut documents)?;
            }
        }
        documents.bar.finish_and_clear();
        let shards = self.shards();
        let position_of =
            |found: &FoundDocument| rows[rows.partition_point(|row| (row.0, row.1) < (found.source, found.sequence))].2;
        let name_of = |found: &FoundDocument| {
            let shard = shards.iter().find(|shard| (shard.source, shard.number) == (found.source, found.shard));
            shard.map_or_else(String::new, |shard| shard.name.clone())
        };
        if options.json {
            let list = documents.found.iter().map(|found| {
                json!({"shard": name_of(found), "row": found.row, "sequence": found.sequence,
                    "position": position_of(found)})
            });
            let value = json!({
                "step": step,
                "epoch": batch.epoch,
                "position": batch.position,
                "world_size": batch.world_size,
                "batch_size": batch.batch_size,
                "launches": batch.launches,
                "documents": list.collect::<Vec<_>>(),
            });
            write_json(&value, context)?;
            return Ok(0);
        }
        let out = &mut *context.out;
        line(out, "step", &format!("{step} of epoch {}: {}", batch.epoch, of(batch)))?;
        for found in &documents.found {
            let (name, position) = (name_of(found), position_of(found));
            line(out, "document", &format!("{name}:{} (sequence {}, position {position})", found.row, found.sequence))?;
        }
        Ok(0)
    }

    /// Prints the steps that had a document.
    pub(super) fn steps_of(
        &self,
        shard: &str,
        row: u64,
        options: &Options,
        context: &mut Context<'_>,
    ) -> Result<u8, Failure> {
        let shards = self.shards();
        let is_meant = |name: &str| name == shard || name.ends_with(&format!("/{shard}"));
        let matching: Vec<&ShardName> = shards.iter().filter(|shard| is_meant(&shard.name)).collect();
        let [meant] = matching.as_slice() else {
            let found = if matching.is_empty() { "no" } else { "more than one" };
            return Err(Error::config(format!("{found} shard of the corpus is called `{shard}`")).into());
        };
        let (_, corpus) = self.loader.corpora().nth(meant.source).expect("a shard is of one of the sources");
        let mut place = PlaceSearch { shard: meant.number, row, place: None, bar: reading_bar(self.loader, context)? };
        sequential::read(self.loader.config(), corpus, &mut place)?;
        place.bar.finish_and_clear();
        let Some(place) = place.place else {
            return Err(Error::config(format!("`{}` has no document with tokens in row {row}", meant.name)).into());
        };
        let config = self.loader.config();
        let sequences = sequences_of(&place, config);
        let mut hits = Vec::new();
        for group in &self.groups {
            // A mixture may have no end, so that the search stops where the deliveries stop.
            let end = group.tiling.chain.last().map_or(0, |batch| batch.indices.end);
            let end = if config.mixture.is_some() { end } else { group.len };
            let bar = progress::bar(end, TEMPLATE, context.env)?.with_message("searching");
            let (_, mut sample) = self.loader.epoch_chain(group.epochs.clone());
            for index in 0..end {
                let Sample { source, sequence, .. } = sample(index)?;
                if source == meant.source && sequences.contains(&sequence) {
                    let chain = &group.tiling.chain;
                    let step = chain.partition_point(|batch| batch.indices.end <= index);
                    let batch = chain.get(step).filter(|batch| batch.indices.contains(&index));
                    hits.push((self.at(group, index), sequence, batch.map(|batch| (step, batch, index))));
                }
                if index % BAR_EVERY == 0 {
                    bar.set_position(index);
                }
            }
            bar.finish_and_clear();
        }
        if options.json {
            let list = hits.iter().map(|((epoch, position), sequence, batch)| {
                let mut hit = json!({"epoch": epoch, "position": position, "sequence": sequence, "step": null});
                if let Some((step, batch, index)) = batch {
                    hit["step"] = (*step).into();
                    hit["rank"] = ((index - batch.indices.start) % batch.world_size).into();
                    hit["world_size"] = batch.world_size.into();
                    hit["launches"] = batch.launches.clone().into();
                }
                hit
            });
            let value = json!({"shard": meant.name, "row": row, "sequences": [sequences.start, sequences.end],
                "deliveries": list.collect::<Vec<_>>()});
            write_json(&value, context)?;
            return Ok(0);
        }
        let out = &mut *context.out;
        let last = sequences.end - 1;
        line(out, "document", &format!("{}:{row}: sequences {} to {last}", meant.name, sequences.start))?;
        for ((epoch, position), sequence, batch) in hits {
            let place = match batch {
                Some((step, batch, index)) => {
                    format!("step {step}, rank {}, {}", (index - batch.indices.start) % batch.world_size, of(batch))
                }
                None => "not delivered".to_owned(),
            };
            line(out, "sequence", &format!("{sequence}: epoch {epoch}, position {position}, {place}"))?;
        }
        Ok(0)
    }
}

/// A shard of one of the sources.
struct ShardName {
    source: usize,
    number: usize,
    /// Name of the shard, after the name of its source if there are several.
    name: String,
}

/// The sequences that read a part of `place`, a stretch of the stream.
fn sequences_of(place: &Range<u64>, config: &Config) -> Range<u64> {
    let first = place.start.saturating_sub(config.row_tokens() - 1).div_ceil(config.seq_len);
    first..(place.end - 1) / config.seq_len + 1
}

/// A document in a sequence.
struct FoundDocument {
    source: usize,
    shard: usize,
    row: u64,
    sequence: u64,
}

/// Finds the documents of some sequences.
struct DocumentSearch<'a> {
    config: &'a Config,
    source: usize,
    /// The wanted sequences, sorted.
    sequences: Vec<u64>,
    found: Vec<FoundDocument>,
    bar: ProgressBar,
}

impl Visitor for DocumentSearch<'_> {
    fn row(&mut self, _: u64, _: &[i64], _: &[(u32, u32)]) {}

    fn document(&mut self, shard: usize, row: u64, place: Range<u64>) {
        let of_document = sequences_of(&place, self.config);
        let first = self.sequences.partition_point(|sequence| *sequence < of_document.start);
        for sequence in self.sequences[first..].iter().take_while(|sequence| of_document.contains(sequence)) {
            self.found.push(FoundDocument { source: self.source, shard, row, sequence: *sequence });
        }
    }

    fn read(&mut self, tokens: u64) {
        self.bar.inc(tokens);
    }
}

/// Finds the place of a document in the stream.
struct PlaceSearch {
    shard: usize,
    row: u64,
    place: Option<Range<u64>>,
    bar: ProgressBar,
}

impl Visitor for PlaceSearch {
    fn row(&mut self, _: u64, _: &[i64], _: &[(u32, u32)]) {}

    fn document(&mut self, shard: usize, row: u64, place: Range<u64>) {
        if (shard, row) == (self.shard, self.row) {
            self.place = Some(place);
        }
    }

    fn read(&mut self, tokens: u64) {
        self.bar.inc(tokens);
    }
}
