//! Finds the documents of a step of a delivery log, and the steps of a document.

use std::collections::{BTreeMap, HashMap};

use forebay::Error;
use forebay::loader::Sample;
use forebay::proof::delivery_log::GlobalBatch;
use forebay::settings::{Balance, Phase};
use indicatif::ProgressBar;
use serde_json::json;

use super::delivery_log::{EpochGroup, Found, of};
use super::{BAR_EVERY, Options, TEMPLATE, reading_bar, rows_epoch, write_json};
use crate::report::{line, plural};
use crate::sequential::{self, FileRow, Share, Visitor};
use crate::whole_rows::DocumentRow;
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
        let config = self.loader.config();
        let mut rows: BTreeMap<(usize, u64), BTreeMap<u64, u64>> = BTreeMap::new();
        for index in batch.indices.clone() {
            let (Sample { source, epoch, sequence }, (_, position)) = (sample(index)?, self.at(group, index));
            rows.entry((source, rows_epoch(config, epoch))).or_default().insert(sequence, position);
        }
        let bar = reading_bar(self.loader, context)?;
        let mut documents = DocumentSearch { source: 0, sequences: BTreeMap::new(), found: Vec::new(), bar };
        let corpora: Vec<_> = self.loader.corpora().map(|(_, corpus)| corpus).collect();
        for ((source, epoch), sequences) in rows {
            (documents.source, documents.sequences) = (source, sequences);
            let corpus = corpora[source];
            let phase = self.loader.phase(source, epoch);
            sequential::read(config, corpus, phase, &Share::whole(corpus), &mut documents)?;
        }
        documents.bar.finish_and_clear();
        let shards = self.shards();
        let name_of = |found: &FoundDocument| {
            let shard = shards.iter().find(|shard| (shard.source, shard.number) == (found.source, found.shard));
            shard.map_or_else(String::new, |shard| shard.name.clone())
        };
        if options.json {
            let list = documents.found.iter().map(|found| {
                json!({"shard": name_of(found), "row": found.row, "sequence": found.sequence,
                    "position": found.position})
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
            let FoundDocument { row, sequence, position, .. } = found;
            line(out, "document", &format!("{}:{row} (sequence {sequence}, position {position})", name_of(found)))?;
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
        let config = self.loader.config();
        let document = (meant.number, row);
        let mut sequences_of: HashMap<u64, Vec<u64>> = HashMap::new();
        // Rows may differ from epoch to epoch. Then each epoch needs a reading of its own.
        let read = |epoch: u64| -> Result<Vec<u64>, Failure> {
            let bar = reading_bar(self.loader, context)?;
            let mut search = PlaceSearch { document, sequences: Vec::new(), bar };
            let phase = self.loader.phase(meant.source, epoch);
            sequential::read(config, corpus, phase, &Share::whole(corpus), &mut search)?;
            search.bar.finish_and_clear();
            Ok(search.sequences)
        };
        let first = read(0)?;
        if first.is_empty() {
            let what = if config.layout.has_windows() { ", or the layout leaves it out" } else { "" };
            return Err(
                Error::config(format!("`{}` has no document with tokens in row {row}{what}", meant.name)).into()
            );
        }
        sequences_of.insert(0, first.clone());
        // Balancing moves rows between ranks, and the delivery log does not say where they were.
        let is_balanced = config.balance == Balance::Ranks;
        let rank_of =
            |index: u64, batch: &GlobalBatch| (!is_balanced).then(|| (index - batch.indices.start) % batch.world_size);
        let mut hits = Vec::new();
        for group in &self.groups {
            // A mixture may have no end, so that the search stops where the deliveries stop.
            let end = group.tiling.chain.last().map_or(0, |batch| batch.indices.end);
            let end = if config.mixture.is_some() { end } else { group.len };
            let bar = progress::bar(end, TEMPLATE, context.env)?.with_message("searching");
            let (_, mut sample) = self.loader.epoch_chain(group.epochs.clone());
            for index in 0..end {
                let Sample { source, epoch, sequence } = sample(index)?;
                let epoch = rows_epoch(config, epoch);
                if source == meant.source && !sequences_of.contains_key(&epoch) {
                    sequences_of.insert(epoch, read(epoch)?);
                }
                if source == meant.source && sequences_of[&epoch].contains(&sequence) {
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
                    hit["rank"] = rank_of(*index, batch).into();
                    hit["world_size"] = batch.world_size.into();
                    hit["launches"] = batch.launches.clone().into();
                }
                hit
            });
            let value =
                json!({"shard": meant.name, "row": row, "sequences": first, "deliveries": list.collect::<Vec<_>>()});
            write_json(&value, context)?;
            return Ok(0);
        }
        let out = &mut *context.out;
        let listed: Vec<String> = first.iter().map(u64::to_string).collect();
        let of_epoch = if config.phase == Phase::Epoch { " of epoch 0" } else { "" };
        let sequences = format!("{} {}{of_epoch}", plural(first.len() as u64, "sequence"), listed.join(", "));
        line(out, "document", &format!("{}:{row}: {sequences}", meant.name))?;
        for ((epoch, position), sequence, batch) in hits {
            let place = match batch {
                Some((step, batch, index)) => {
                    let rank = rank_of(index, batch).map_or_else(|| "a rank".to_owned(), |rank| format!("rank {rank}"));
                    format!("step {step}, {rank}, {}", of(batch))
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

/// A document in a sequence.
struct FoundDocument {
    source: usize,
    shard: usize,
    row: u64,
    sequence: u64,
    position: u64,
}

/// Finds the documents of some sequences.
struct DocumentSearch {
    source: usize,
    /// The wanted sequences, and their positions.
    sequences: BTreeMap<u64, u64>,
    found: Vec<FoundDocument>,
    bar: ProgressBar,
}

impl Visitor for DocumentSearch {
    fn row(&mut self, sequence: u64, row: FileRow<'_>) {
        let Some(position) = self.sequences.get(&sequence).copied() else { return };
        let mut documents = row.documents.to_vec();
        documents.dedup();
        let found = |(shard, row)| FoundDocument { source: self.source, shard, row, sequence, position };
        self.found.extend(documents.into_iter().map(found));
    }

    fn read(&mut self, tokens: u64) {
        self.bar.inc(tokens);
    }
}

/// Finds the sequences of a document.
struct PlaceSearch {
    document: DocumentRow,
    sequences: Vec<u64>,
    bar: ProgressBar,
}

impl Visitor for PlaceSearch {
    fn row(&mut self, sequence: u64, row: FileRow<'_>) {
        if row.documents.contains(&self.document) {
            self.sequences.push(sequence);
        }
    }

    fn read(&mut self, tokens: u64) {
        self.bar.inc(tokens);
    }
}
