//! Opens the parts that all sessions share: corpora, cache of decoded blocks, and content settings.

use std::path::Path;
use std::sync::Arc;

use super::description::{DescribedCorpus, OpenedDescription, SourceDescription};
use super::served::RowService;
use super::sources::{CorpusSource, CorpusSources};
use crate::corpus::Corpus;
use crate::corpus::schema::{Schema, is_label_or_mask};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Access, OpenOptions};
use crate::layout::{self, Layout, LayoutSettings, Lengths, Stream, WINDOW_TOKENS};
use crate::loader::state::StateValue;
use crate::order;
use crate::order::partition::Grouping;
use crate::read::{BlockCache, KEPT_PLANS, Reader, SessionId};
use crate::settings::mixture::MixtureSettings;
use crate::settings::{self, Balance, Compared, Config, Setting, Shuffle, Value, default_threads};
use crate::sync::Cancel;
use crate::tokens::{Dtype, FieldType};

/// An opened corpus, or the opened corpora of a mixture. It knows no rank and no batch size.
///
/// Several loaders may share it ([`super::Loader::new`]). They share the open files, the cache of
/// decoded blocks and `memory_budget`. Each loader takes bytes for its batches, and for the blocks
/// that its threads hold. The cache has the rest.
#[derive(Debug)]
pub struct Opened {
    config: Config,
    pub(super) sources: CorpusSources,
    pub(super) cache: Arc<BlockCache>,
    /// The content that a state belongs to, without the values that depend on the position.
    pub(super) content: Vec<(&'static str, StateValue)>,
    pub(super) warnings: Vec<String>,
    pub(super) largest_block_bytes: u64,
    /// The columns that are delivered beside the tokens.
    pub(super) schema: Schema,
    /// The process that reads the rows, and the type of ids that it sends. `None` if this process
    /// reads them.
    pub(super) service: Option<(Arc<dyn RowService>, Dtype)>,
}

impl Opened {
    /// Opens and indexes the corpora of `config`. Fails with all faults that opening can find,
    /// listed together.
    ///
    /// Reads from `config` the data and content settings, `memory_budget`, and the access to files.
    /// Ignores ranks, batches and epochs.
    pub fn open(config: &Config) -> Result<Self> {
        Self::open_cancellable(config, &Cancel::default())
    }

    /// Opens like [`Opened::open`]. Fails soon after another thread sets `cancel`.
    pub fn open_cancellable(config: &Config, cancel: &Cancel) -> Result<Self> {
        config.validate()?;
        let mut config = config.clone();
        let threads = config.num_threads.unwrap_or_else(default_threads);
        let corpora = open_corpora(&config, threads, cancel)?;
        check_documents(&config, &corpora)?;
        let access = if corpora.iter().any(|(_, corpus)| corpus.access() == Access::Block) {
            Access::Block
        } else {
            Access::Random
        };
        let stored =
            |column: usize| corpora.iter().map(|(name, corpus)| (name.as_str(), corpus.field_type(column))).collect();
        if config.shuffle == Shuffle::On && decided(&config, access) == Shuffle::Global {
            check_room_for_rows(&config, &corpora)?;
        }
        let schema = settle(&mut config, access, stored).map_err(|error| Corpus::at_shard(&corpora, error))?;
        let mut warnings: Vec<String> = corpora.iter().flat_map(|(_, corpus)| corpus.warnings()).cloned().collect();
        if let Some(mixture) = &config.mixture {
            warnings.extend(MixtureSettings::parse(mixture)?.notes);
        }
        let largest_block_bytes = corpora.iter().map(|(_, corpus)| corpus.largest_block_bytes()).max().unwrap_or(0);
        // Lengths that can be saved stay in their file.
        let holds_lengths = |corpus: &Corpus| !config.layout.joins() && corpus.lengths_file().is_none();
        let holds_lengths = corpora.iter().any(|(_, corpus)| holds_lengths(corpus));
        let lengths_bytes = if holds_lengths { config.memory_budget / LENGTHS_SHARE } else { 0 };
        let cache = Arc::new(BlockCache::new(config.memory_budget - lengths_bytes));
        let of_source = lengths_bytes / corpora.len().max(1) as u64;
        let sources = corpora.into_iter().enumerate().map(|(index, (name, corpus))| {
            let corpus = Arc::new(corpus);
            let open = |config: &Config, stream: &Arc<Stream>, lengths: Lengths<'_>| {
                open_layout(&corpus, config, stream, lengths, &mut warnings)
            };
            let reader = Reader::new(Arc::clone(&corpus), &config, open, Arc::clone(&cache), index, of_source)?;
            warnings.extend(reader.warnings());
            Ok(CorpusSource::new(name, reader, config.seed))
        });
        let sources = CorpusSources::new(&config, sources.collect::<Result<_>>()?)?;
        Ok(Self {
            content: content_of(&config),
            config,
            sources,
            cache,
            warnings,
            largest_block_bytes,
            schema,
            service: None,
        })
    }

    /// Makes the corpora of `config` from their description by the process that reads them.
    pub(super) fn described(
        config: &Config,
        description: OpenedDescription,
        service: Arc<dyn RowService>,
    ) -> Result<Self> {
        config.validate()?;
        let mut config = config.clone();
        let OpenedDescription { sources: facts, ids, warnings } = description;
        if facts.is_empty() {
            return Err(Error::data("the service describes no corpus"));
        }
        let access = if facts.iter().any(|source| source.decodes) { Access::Block } else { Access::Random };
        let stored = |column: usize| {
            let of_source = |source: &'_ SourceDescription| source.fields.get(column).copied().flatten();
            facts.iter().map(|source| (source.name.as_str(), of_source(source))).collect()
        };
        let schema = settle(&mut config, access, stored)?;
        let cache = Arc::new(BlockCache::new(config.memory_budget));
        let seed = config.seed;
        let source = |facts| Ok(CorpusSource::of_described(DescribedCorpus::new(facts)?, seed));
        let sources = facts.into_iter().map(source).collect::<Result<_>>()?;
        let sources = CorpusSources::new(&config, sources)?;
        Ok(Self {
            content: content_of(&config),
            config,
            sources,
            cache,
            warnings,
            largest_block_bytes: 0,
            schema,
            service: Some((service, ids)),
        })
    }

    /// The settings that the corpus was opened with. The kind of shuffling is filled in.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Decides the shuffling of a session's `config`.
    ///
    /// Fails if the data or the content settings differ from those of this corpus. The error names
    /// both values.
    pub(super) fn check(&self, config: &mut Config) -> Result<()> {
        if config.shuffle == Shuffle::On {
            config.shuffle = self.config.shuffle;
        }
        config.boundaries = config.boundaries.or(self.config.boundaries);
        let mut differences = Vec::new();
        for setting in settings::all() {
            // A state compares these settings by the result of opening. Here their own values are
            // compared.
            let is_of_opening = matches!(setting.compared(), Some(Compared::AsOpened | Compared::ByCorpus(..)));
            let is_shared = is_of_opening || ["memory_budget", "batch_format"].contains(&setting.name);
            if is_shared && setting.value(config) != setting.value(&self.config) {
                differences.push(format!("another `{}`", setting.name));
            }
        }
        for ((name, value), (_, opened)) in content_of(config).iter().zip(&self.content) {
            if value != opened {
                differences.push(format!("`{name}` {value}, opened with {opened}"));
            }
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::config(format!(
            "a loader of an opened corpus must keep the settings that it was opened with; found {}",
            differences.join(", ")
        )))
    }

    /// The distance between neighbouring ranks that share rows: 1 if all ranks share.
    ///
    /// Rows that are decoded may move only between ranks that draw from the same lanes.
    pub(super) fn balance_stride(&self, grouping: Grouping) -> u64 {
        let decodes = self.sources.list().iter().any(|source| source.decodes());
        match self.config.shuffle {
            Shuffle::Block if decodes => self.config.lanes / grouping.lanes(self.config.lanes),
            _ => 1,
        }
    }

    /// Fails if `balance` of `config` cannot move rows between the ranks of `grouping` without more
    /// decoding.
    pub(super) fn check_balance(&self, config: &Config, grouping: Grouping) -> Result<()> {
        let (lanes, world_size) = (config.lanes, grouping.world_size);
        if config.balance == Balance::Off || world_size == 1 {
            return Ok(());
        }
        let stride = self.balance_stride(grouping);
        if stride == world_size {
            return Err(Error::config(format!(
                "`balance` = ranks needs ranks that draw from the same lanes, because these files have to be decoded: \
                 {world_size} ranks have {} of {lanes} `lanes` each, and none of them shares a lane; moved rows would \
                 decode every block on up to {world_size} ranks; use uncompressed Arrow, or `lanes` that have no \
                 divisor in common with the number of ranks",
                lanes / world_size
            )));
        }
        // A rank plans the windows of all lanes that it takes rows from.
        let windows = 2 * if stride == 1 { lanes } else { grouping.lanes(lanes) };
        let is_spread = config.shuffle == Shuffle::Block && config.layout.has_windows();
        if is_spread && windows > KEPT_PLANS as u64 {
            return Err(Error::config(format!(
                "`balance` = ranks plans two windows of each of {} lanes on every rank: {windows} windows, more than \
                 the {KEPT_PLANS} that a loader keeps; lower `lanes` to at most {}",
                windows / 2,
                KEPT_PLANS / 2
            )));
        }
        Ok(())
    }

    /// Adds a session to the cache, and takes bytes of the budget for it: `batches` bytes for
    /// batches in flight, and one block for each of its `threads`.
    ///
    /// Returns the session's number, the bytes taken, and the bytes left for blocks.
    pub(super) fn join(&self, config: &Config, threads: u64, batches: u64) -> Result<(SessionId, u64, u64)> {
        let largest = self.largest_block_bytes;
        let wanted = batches.saturating_add(threads.saturating_mul(largest));
        let window = drawn_tokens(config) / config.seq_len;
        let joined = self.cache.join(wanted, largest, window);
        joined.map(|(session, left)| (session, wanted, left)).map_err(|others| {
            let shared = if others == 0 {
                String::new()
            } else {
                format!(", beside {others} bytes of other loaders of this corpus,")
            };
            Error::config(format!(
                "`memory_budget` of {} bytes is too small: {batches} bytes for {} batches in flight, and {} blocks of up to {largest} bytes for \
                 {threads} threads and the cache,{shared} are {} bytes; raise it, or lower `batch_size`, `prefetch_batches` or `num_threads`",
                config.memory_budget,
                config.prefetch_batches + 1,
                threads + 1,
                wanted.saturating_add(largest).saturating_add(others),
            ))
        })
    }
}

/// Version of what the tables of layouts hold.
const TABLE_VERSION: u64 = 2;

/// Makes the layout of `corpus` from its saved table. Without a saved table, makes the layout from
/// the document lengths, and saves its table. A table that cannot be loaded or saved is a warning.
fn open_layout(
    corpus: &Corpus,
    config: &Config,
    stream: &Arc<Stream>,
    lengths: Lengths<'_>,
    warnings: &mut Vec<String>,
) -> Result<Box<dyn Layout>> {
    let settings = LayoutSettings::of(config);
    let name = format!("{TABLE_VERSION} {settings:?} {:?}", stream.specials());
    let file = if config.layout.joins() { None } else { corpus.table_file(&name) };
    let Some(file) = file else { return layout::build(&settings, stream, lengths) };
    let table = file.load().unwrap_or_else(|error| {
        warnings.push(format!("{}; it is made anew", error.report()));
        None
    });
    if let Some(restored) = table.and_then(|table| layout::restore(&settings, stream, &table)) {
        return Ok(restored);
    }
    let built = layout::build(&settings, stream, lengths)?;
    if let Err(error) = file.save(&built.table()) {
        warnings.push(format!("{}; rows are counted at every start", error.report()));
    }
    Ok(built)
}

/// Fails if the layout needs documents, and a shard does not say where they end.
fn check_documents(config: &Config, corpora: &[(String, Corpus)]) -> Result<()> {
    let found = corpora.iter().find_map(|(_, corpus)| corpus.without_documents());
    let Some((path, format)) = found.filter(|_| !config.layout.joins()) else { return Ok(()) };
    Err(Error::config(format!(
        "`layout` = {} needs documents, and a file of format {} does not say where they end: set `document_end_id` to \
         the last id of each document, such as 50256 for the tokens of GPT-2, or take `layout` = concat",
        config.layout.name(),
        format.name()
    ))
    .at(path))
}

/// Decides the settings of `config` that depend on the files, and gives the fields of batches.
/// `stored` gives the types of a further column in all sources.
fn settle<'a>(
    config: &mut Config,
    access: Access,
    stored: impl Fn(usize) -> Vec<(&'a str, Option<FieldType>)>,
) -> Result<Schema> {
    let schema = schema_of(config, stored)?;
    config.shuffle = decided(config, access);
    if let Some(field) = schema.documents.first() {
        // Without boundaries, no stretch of a document has a place for a value.
        if config.boundaries == Some(false) {
            return Err(Error::config(format!(
                "column `{}` has one value for each document, and needs `boundaries`: leave `boundaries` out, or set \
                 it to true",
                field.name
            )));
        }
        config.boundaries = Some(true);
    }
    config.boundaries = Some(config.has_boundaries());
    config.validate()?;
    check_names(config, &schema)?;
    Ok(schema)
}

/// The fields of the batches of corpora with the `stored` types of further columns.
fn schema_of<'a>(config: &Config, stored: impl Fn(usize) -> Vec<(&'a str, Option<FieldType>)>) -> Result<Schema> {
    let mut schema = Schema::of(&config.fields, config.ignore_index, stored)?;
    if let Some(format) = config.batch_format.filter(|format| !format.has_room()) {
        // Whether a format takes positions is checked with the settings.
        let has_place = |name: &&str| is_label_or_mask(name) || *name == "position_ids";
        let of_tokens = schema.fields.iter().map(|field| field.name).filter(|name| !has_place(name));
        if let Some(name) = of_tokens.chain(schema.documents.iter().map(|field| field.name)).next() {
            return Err(Error::config(format!(
                "`batch_format` = {} has no place for the column `{name}`: leave it out, or choose another format",
                format.name()
            )));
        }
    }
    if config.has_attention_mask() && schema.fields.iter().all(|field| field.name != "attention_mask") {
        // No source has the column, so that it is 1 at every token.
        schema.add_missing("attention_mask", config.ignore_index)?;
    }
    Ok(schema)
}

/// Fails if a column has the name of another array of a batch.
fn check_names(config: &Config, schema: &Schema) -> Result<()> {
    let boundaries = ["doc_ids", "cu_seqlens", "max_seqlen", "document_mask"];
    let taken = |name: &str| {
        let is_null_of = schema.documents.iter().find(|field| field.null_name == name);
        is_null_of.map(|field| format!("tells which values of `{}` are null", field.name)).or_else(|| {
            (config.has_boundaries() && boundaries.contains(&name)).then(|| "holds boundaries of documents".to_owned())
        })
    };
    for name in &config.fields {
        if let Some(what) = taken(name) {
            return Err(Error::config(format!(
                "column `{name}` of `fields` has the name of an array that {what}: rename the column"
            )));
        }
    }
    Ok(())
}

/// Document lengths that a layout needs, and that cannot be saved, may take `memory_budget` divided
/// by this number.
pub(super) const LENGTHS_SHARE: u64 = 8;

/// Tokens among which the positions of all lanes draw their rows at a time.
///
/// A lane of a layout with windows draws from the window that it is in and from the next one. The
/// rows of a bucket may lie in another window than their positions.
pub(super) fn drawn_tokens(config: &Config) -> u64 {
    let windows = if config.layout.has_windows() { config.lanes.saturating_mul(WINDOW_TOKENS) } else { 0 };
    let bucket = config.bucket.unwrap_or(0).saturating_mul(config.seq_len);
    config.window_tokens.saturating_add(windows).saturating_add(bucket)
}

/// The kind of shuffling that `config` means for this access.
///
/// In a layout with windows, a row is found by planning its window. So rows of a window stay near
/// each other, even if any token could be read at once.
fn decided(config: &Config, access: Access) -> Shuffle {
    match (config.shuffle, access) {
        (Shuffle::On, _) if config.layout.has_windows() => Shuffle::Block,
        (Shuffle::On, Access::Random) => Shuffle::Global,
        (Shuffle::On, Access::Block) => Shuffle::Block,
        (other, _) => other,
    }
}

/// Fails if reading single rows in any order would ask an object store for each row.
fn check_room_for_rows(config: &Config, corpora: &[(String, Corpus)]) -> Result<()> {
    let remote = corpora.iter().map(|(_, corpus)| corpus.remote_bytes()).sum::<u64>();
    let room = config.room_for_objects();
    if remote <= room {
        return Ok(());
    }
    Err(Error::config(format!(
        "`shuffle=True` reads single rows of these files in any order: they lie in an object store and have {remote} \
         bytes, and the local cache keeps {room} bytes; set `cache_dir` and a `cache_bytes` of at least {remote}, or name \
         `shuffle=\"block\"` (few large reads), or `shuffle=\"global\"` (about one request for each row)"
    )))
}

/// Opens the corpora of `config` in parallel. Fails with the faults of all of them.
fn open_corpora(config: &Config, threads: u64, cancel: &Cancel) -> Result<Vec<(String, Corpus)>> {
    let options = OpenOptions { cancel: cancel.clone(), ..OpenOptions::of(config) };
    let cache = config.index_folder().map(Path::new);
    let wanted = config.corpora()?;
    // The pool is scoped, so that its threads end before opening does.
    let opened: Vec<(String, Result<Corpus>)> = rayon::ThreadPoolBuilder::new()
        .num_threads(threads as usize)
        .thread_name(|index| format!("forebay-open-{index}"))
        .build_scoped(
            |thread| thread.run(),
            |pool| {
                let open = |(name, data): (String, Vec<String>)| {
                    (name, Corpus::open(&data, config.format, &options, cache, pool))
                };
                wanted.into_iter().map(open).collect()
            },
        )
        .map_err(|error| Error::new(ErrorKind::Io, "cannot start threads for opening shards").with_source(error))?;
    // Faults of shards that were not opened mean nothing.
    cancel.check()?;
    let mut faults = Vec::new();
    let mut corpora = Vec::new();
    for (name, corpus) in opened {
        match corpus {
            Ok(corpus) => corpora.push((name, corpus)),
            Err(error) => faults.push(error),
        }
    }
    match faults.len() {
        0 => Ok(corpora),
        1 => Err(faults.remove(0)),
        _ => Err(Error::all(faults)),
    }
}

/// Bytes of the decoded blocks that a step may draw from.
pub(super) fn windows_bytes(config: &Config, sources: &CorpusSources, grouping: &Grouping, largest: u64) -> u64 {
    let of_corpus = |corpus: &Corpus| {
        let total = corpus.decoded_bytes();
        let bytes_per_token = total.div_ceil(corpus.tokens().max(1));
        match config.shuffle {
            _ if corpus.access() == Access::Random => 0,
            Shuffle::Off | Shuffle::On => {
                config.bucket.unwrap_or(0).saturating_mul(config.seq_len * bytes_per_token).min(total)
            }
            Shuffle::Global => total,
            // Each lane of this rank draws from its window, and from the blocks at both ends of the
            // window.
            Shuffle::Block => {
                let lanes = grouping.lanes(config.lanes);
                let window = drawn_tokens(config) / config.lanes * lanes;
                let columns = 1 + corpus.fields().len() as u64;
                window.saturating_mul(bytes_per_token).saturating_add(columns * lanes * 2 * largest).min(total)
            }
        }
    };
    sources.list().iter().map(|source| of_corpus(source.reader().corpus())).sum()
}

/// Warns if the cache cannot hold the blocks that a step may draw from. Such blocks are decoded
/// again and again.
pub(super) fn window_warning(windows: u64, cache_bytes: u64) -> Option<String> {
    (windows > cache_bytes).then(|| {
        format!(
            "blocks will be decoded several times: shuffling draws from about {} MiB of them and `memory_budget` leaves {} MiB; raise it, or lower \
             `window_tokens` or `lanes`",
            windows >> 20,
            cache_bytes >> 20
        )
    })
}

/// The content that every state of these settings belongs to.
///
/// It consists of the versions of order and layout, and of the content settings that a state
/// compares by value. A setting without influence on the order has the value 0.
fn content_of(config: &Config) -> Vec<(&'static str, StateValue)> {
    let mut content = vec![("order", order::VERSION.into())];
    let compared = |setting: &Setting| Some((setting.name, compared_value(setting, config)?));
    content.extend(settings::all().iter().filter_map(compared));
    content
}

/// The value by which a state compares `setting`. `None` if the state compares other keys.
fn compared_value(setting: &Setting, config: &Config) -> Option<StateValue> {
    let has_blocks = config.shuffle == Shuffle::Block;
    let has_part = match setting.compared()? {
        Compared::Always => true,
        Compared::OrZero => setting.value(config) != Value::None,
        Compared::WithBlocks => has_blocks,
        Compared::WithLanes => has_blocks || config.mixture.is_some(),
        Compared::AsOpened | Compared::ByCorpus(..) | Compared::ByProgress(..) => return None,
    };
    if !has_part {
        return Some(0.into());
    }
    Some(match setting.value(config) {
        Value::Switch(on) => if on { "on" } else { "off" }.into(),
        Value::Integer(number) if u64::try_from(number).is_ok() => (number as u64).into(),
        _ => StateValue::short(setting.text(config)),
    })
}
