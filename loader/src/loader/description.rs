//! Description: the facts about opened corpora that a consumer in another process needs.
//!
//! With a description, a loader counts rows, names positions, and checks states, although it has no
//! access to the files. The rows themselves come from a [`RowService`](super::served::RowService).

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::open::Opened;
use super::sources::{CorpusSource, Growth};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{Extent, Lost};
use crate::read::Reader;
use crate::sync::lock;
use crate::tokens::{Dtype, FieldType};

/// The facts about an [`Opened`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenedDescription {
    /// The sources, in their order. Without a mixture, one source.
    pub sources: Vec<SourceDescription>,
    /// Narrowest type that holds every id of a row, padding aside: uint16, uint32 or int64.
    pub ids: Dtype,
    /// Warnings of opening.
    pub warnings: Vec<String>,
}

/// The facts about one corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceDescription {
    /// Name of the source in the mixture. Empty without a mixture.
    pub name: String,
    /// Number of shards.
    pub shards: u64,
    /// Number of tokens in the files.
    pub tokens: u64,
    /// Whether its files have to be decoded.
    pub decodes: bool,
    /// Type of each further column. `None` for a column that the source lacks.
    pub fields: Vec<Option<FieldType>>,
    /// Tokens of an epoch that no row holds.
    pub lost: Lost,
    /// The facts about some numbers of first shards: 1, all, and those that a caller asked for.
    pub parts: Vec<PartDescription>,
}

/// The facts about the first shards of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartDescription {
    /// Number of the shards.
    pub shards: u64,
    /// Their rows.
    pub extent: Extent,
    /// Their fingerprint.
    pub fingerprint: String,
    /// Their formats.
    pub format: String,
    /// The columns that hold their tokens.
    pub token_column: String,
}

impl PartDescription {
    fn of(reader: &Reader, shards: u64) -> Self {
        let corpus = reader.corpus();
        let count = shards as usize;
        Self {
            shards,
            extent: reader.layout().extent(count),
            fingerprint: corpus.fingerprint_of(count),
            format: corpus.families(count).join("+"),
            token_column: corpus.token_columns(count).join("+"),
        }
    }
}

/// A corpus that another process has opened.
#[derive(Debug)]
pub(super) struct DescribedCorpus {
    facts: SourceDescription,
    /// Parts by their number of shards. Consumers add parts of which a state speaks.
    parts: Mutex<BTreeMap<u64, PartDescription>>,
}

impl DescribedCorpus {
    pub(super) fn new(mut facts: SourceDescription) -> Result<Self> {
        let parts: BTreeMap<u64, PartDescription> =
            std::mem::take(&mut facts.parts).into_iter().map(|part| (part.shards, part)).collect();
        for shards in [facts.shards.min(1), facts.shards] {
            if !parts.contains_key(&shards) {
                let text = format!("the service does not describe the first {shards} shards of its corpus");
                return Err(Error::new(ErrorKind::Data, text));
            }
        }
        Ok(Self { facts, parts: Mutex::new(parts) })
    }

    pub(super) fn facts(&self) -> &SourceDescription {
        &self.facts
    }

    /// The facts about the first `shards` shards. A caller that may need another number than 1 or
    /// all adds them before.
    pub(super) fn part(&self, shards: u64) -> PartDescription {
        let parts = lock(&self.parts);
        let found = parts.get(&shards).or_else(|| parts.get(&self.facts.shards));
        found.expect("all shards are described").clone()
    }

    fn lacks(&self, shards: u64) -> bool {
        !lock(&self.parts).contains_key(&shards)
    }

    fn add(&self, parts: Vec<PartDescription>) {
        lock(&self.parts).extend(parts.into_iter().map(|part| (part.shards, part)));
    }
}

impl Opened {
    /// Describes the opened corpora: the first shard, all shards, and the numbers of first shards
    /// in `shards` that a corpus has.
    pub fn describe(&self, shards: &[u64]) -> OpenedDescription {
        let of_source = |source: &CorpusSource| {
            let reader = source.reader();
            let corpus = reader.corpus();
            let all = corpus.len() as u64;
            let mut numbers: Vec<u64> = [all.min(1), all].into_iter().chain(shards.iter().copied()).collect();
            numbers.retain(|shards| *shards <= all);
            numbers.sort_unstable();
            numbers.dedup();
            SourceDescription {
                name: source.name.clone(),
                shards: all,
                tokens: corpus.tokens(),
                decodes: reader.decodes(),
                fields: (0..corpus.fields().len()).map(|index| corpus.field_type(index)).collect(),
                lost: reader.layout().lost(corpus.len()),
                parts: numbers.into_iter().map(|shards| PartDescription::of(reader, shards)).collect(),
            }
        };
        let sources: Vec<_> = self.sources.list().iter().map(of_source).collect();
        let corpora = self.sources.list().iter().map(|source| source.reader().corpus().dtype());
        let specials = [self.config().bos_id, self.config().eos_id].into_iter().flatten();
        let ids = corpora.chain(specials.map(type_of_id)).fold(Dtype::U16, wider_id);
        OpenedDescription { sources, ids, warnings: self.warnings.clone() }
    }

    /// Asks the service for the parts of the corpus that `growth` speaks of, if they are unknown.
    pub(super) fn learn(&self, growth: &Growth) -> Result<()> {
        let (Some((service, _)), Some(corpus)) = (&self.service, self.sources.list()[0].described()) else {
            return Ok(());
        };
        let most = corpus.facts().shards;
        let unknown: Vec<u64> = growth.shards().filter(|shards| *shards <= most && corpus.lacks(*shards)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let mut found = service.describe(&unknown)?;
        corpus.add(found.sources.drain(..).next().map(|source| source.parts).unwrap_or_default());
        Ok(())
    }
}

/// Narrowest type of ids on their way between processes that holds `id`.
pub(super) fn type_of_id(id: u32) -> Dtype {
    if u16::try_from(id).is_ok() { Dtype::U16 } else { Dtype::U32 }
}

/// Narrowest of uint16, uint32 and int64 that holds the ids of both types. Ids are never negative.
pub(super) fn wider_id(one: Dtype, other: Dtype) -> Dtype {
    match one.size().max(other.size()) {
        1 | 2 => Dtype::U16,
        4 => Dtype::U32,
        _ => Dtype::I64,
    }
}
