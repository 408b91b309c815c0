//! `forebay verify`: proves that every token was delivered once.
//!
//! The expected sum comes from reading the files in their own order with arrow-rs
//! ([`crate::sequential`]). The actual sum comes from running the loader, or from the delivery log
//! that a training run wrote. Both are sums of row hashes, which do not depend on the order. The
//! loader's order only says which sequences belong to a part of an epoch. `verify` checks that it
//! names each of them once.

mod delivery_log;
mod epoch;
mod parts;
mod search;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use forebay::corpus::Corpus;
use forebay::corpus::parts::Part;
use forebay::corpus::schema::{Schema, SchemaField, TokenSide};
use forebay::loader::Sample;
use forebay::loader::state::{State, StateValue};
use forebay::proof::checksum::Checksum;
use forebay::settings::{Epochs, Phase, Targets};
use forebay::{Config, Error, ErrorKind, Loader};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::report::number_of;
use crate::sequential::{self, FileRow, Share, Visitor};
use crate::{Context, Failure, Sets, ShapeOptions, progress};
use delivery_log::Found;

const TEMPLATE: &str = "{msg} {wide_bar} {percent}% {eta} left";
/// Number of faults of one kind that are shown. `--json` lists all.
const SHOWN: usize = 10;
/// Number of positions between two steps of the progress bar.
const BAR_EVERY: u64 = 1 << 16;

#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0 proven, 1 not proven, 2 usage or settings.\n\n\
    Cost: the files are read once in full, and without --delivery-log once more through the loader. --document looks \
    at every position of the epochs in the delivery log, because an order has no list to look in: an epoch of 10^9 \
    sequences takes minutes. Memory: a byte and a bit per sequence, unless one whole epoch is proved.\n\n\
    Several machines can share the proof of an epoch by `--part`, with a folder `--proof` that all of them see. \
    `--merge` needs all parts, and the same data and settings.\n\n\
    Examples:\n  forebay verify corpus/ --seq-len 2048 --shuffle --world-size 4\n  \
    forebay verify corpus/ --seq-len 2048 --shuffle --delivery-log runs/7/delivered\n  \
    forebay verify corpus/ --seq-len 2048 --shuffle --world-size 64 --proof proof/ --part 3/64\n  \
    forebay verify corpus/ --seq-len 2048 --shuffle --world-size 64 --proof proof/ --merge")]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    paths: Vec<String>,
    #[command(flatten)]
    shape: ShapeOptions,
    /// Seed of the order
    #[arg(long, value_name = "N")]
    seed: Option<String>,
    /// Number of ranks, which run one after the other; default: the number in the settings
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "delivery_log")]
    world_size: Option<u64>,
    /// Number of the epoch; default: the epoch of the state, or 0, or all with `--delivery-log`
    #[arg(long, value_name = "N")]
    epoch: Option<u64>,
    /// File with a state that `state_dict()` gave, as JSON: proves from there to the epoch's end
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Folder of a delivery log that the ranks of a run wrote: proves the run from it
    #[arg(long, value_name = "DIR")]
    delivery_log: Option<PathBuf>,
    /// Prints the documents of one global batch of the delivery log, counted from 0 in its epoch
    #[arg(long, value_name = "N", requires = "delivery_log", conflicts_with = "document")]
    step: Option<u64>,
    /// Prints where the delivery log had a document, given by shard and row; the shard is named by
    /// its file or by its end
    #[arg(long, value_name = "SHARD:ROW", requires = "delivery_log", value_parser = shard_and_row)]
    document: Option<(String, u64)>,
    /// Proves only part I of N, counted from 0: every N-th rank, and a share of the files
    #[arg(long, value_name = "I/N", requires = "proof", conflicts_with_all = ["merge", "delivery_log"])]
    part: Option<Part>,
    /// Adds up the parts, and proves the epoch from them
    #[arg(long, requires = "proof", conflicts_with = "delivery_log")]
    merge: bool,
    /// Folder that the parts of a proof share
    #[arg(long, value_name = "FOLDER")]
    proof: Option<PathBuf>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

fn shard_and_row(text: &str) -> Result<(String, u64), String> {
    let found = text.rsplit_once(':').and_then(|(shard, row)| Some((shard.to_owned(), row.parse().ok()?)));
    found.ok_or_else(|| "expected SHARD:ROW".to_owned())
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let own = [("seed", options.seed.clone())];
    let flags = [options.shape.flags().as_slice(), &own].concat();
    let mut config = options.sets.resolve(&options.paths, &flags, context)?.config;
    // A proof must not add to the delivery log that it reads.
    config.delivery_log = None;
    (config.epochs, config.max_steps) = (Epochs::Count(1), None);
    let state = options.state.as_deref().map(read_state).transpose()?;
    if let (Some(state), Some(epoch)) = (&state, options.epoch)
        && state.epoch() != epoch
    {
        return Err(Error::config(format!("the state is in epoch {}, `--epoch` says {epoch}", state.epoch())).into());
    }
    match &options.delivery_log {
        None => {
            let world_size = options.world_size.or(config.dp_world_size).unwrap_or(1);
            epoch::run(config, world_size, options, state.as_ref(), context)
        }
        Some(folder) => {
            // The delivery log gives the ranks and the batch sizes.
            config.batch_size = 1;
            (config.dp_rank, config.dp_world_size) = (Some(0), Some(1));
            let loader = Loader::open(config)?;
            if let Some(state) = &state {
                loader.load_state(state)?;
            }
            let found = Found::read(&loader, folder, options, state.as_ref())?;
            match (options.step, &options.document) {
                (Some(step), _) => found.documents_of(step, options, context),
                (None, Some((shard, row))) => found.steps_of(shard, *row, options, context),
                (None, None) => found.prove(options, context),
            }
        }
    }
}

fn read_state(path: &Path) -> Result<State, Error> {
    let text = std::fs::read(path).map_err(|error| Error::io("cannot read the state", error).at(path))?;
    let damaged = |what: &str| Error::new(ErrorKind::State, format!("the file holds no state: {what}")).at(path);
    let value: Value = serde_json::from_slice(&text).map_err(|error| damaged("not JSON").with_source(error))?;
    let Value::Object(fields) = value else { return Err(damaged("expected a JSON object")) };
    let entries = fields.into_iter().map(|(key, value)| match value {
        Value::String(text) => Ok((key, StateValue::Text(text))),
        value => match value.as_u64() {
            Some(number) => Ok((key, StateValue::Int(number))),
            None => Err(damaged(&format!("`{key}` must be a whole number or a text"))),
        },
    });
    State::from_entries(entries.collect::<Result<_, _>>()?).map_err(|error| error.at(path))
}

/// Number of times that each sequence should be delivered.
enum Wanted {
    /// The sequences below this number of the only source are delivered once, in this epoch.
    Below(u64, u64),
    /// A count for each sequence, by source and epoch. Epochs with the same rows are counted
    /// together, as epoch 0.
    Counts(BTreeMap<(usize, u64), Vec<u8>>),
}

impl Wanted {
    /// Counts the samples at the indices `covered` of `epochs`.
    ///
    /// Fails if the order names a sequence twice in an epoch of its source.
    fn new(loader: &Loader, epochs: Range<u64>, covered: &[Range<u64>], bar: &ProgressBar) -> forebay::Result<Self> {
        let config = loader.config();
        let (chain, mut sample) = loader.epoch_chain(epochs.clone());
        let draws_rows = config.holdout.is_some() && !config.layout.has_windows();
        let is_whole = config.mixture.is_none() && !draws_rows && config.skip.is_empty();
        let len = chain.len().unwrap_or(u64::MAX);
        // The number alone shows that these are all sequences, and the tail if it has a position.
        if is_whole
            && epochs.end - epochs.start == 1
            && matches!(covered, [all] if *all == (0..len))
            && len >= loader.num_sequences()
        {
            return Ok(Self::Below(len, rows_epoch(config, epochs.start)));
        }
        let mut counts: BTreeMap<(usize, u64), Vec<u8>> = BTreeMap::new();
        let mut seen: HashMap<(usize, u64), Vec<u64>> = HashMap::new();
        for (index, at) in covered.iter().cloned().flatten().zip(0u64..) {
            let Sample { source, epoch, sequence } = sample(index)?;
            let (word, bit) = ((sequence / 64) as usize, 1 << (sequence % 64));
            let bits = seen.entry((source, epoch)).or_default();
            if bits.len() <= word {
                bits.resize(word + 1, 0);
            }
            if bits[word] & bit != 0 {
                let text = format!("the order of epoch {epoch} of source {source} has sequence {sequence} twice");
                return Err(Error::new(ErrorKind::Internal, text));
            }
            bits[word] |= bit;
            let counts = counts.entry((source, rows_epoch(config, epoch))).or_default();
            if counts.len() <= sequence as usize {
                counts.resize(sequence as usize + 1, 0);
            }
            let count = &mut counts[sequence as usize];
            *count = count.checked_add(1).ok_or_else(|| {
                Error::config(format!(
                    "sequence {sequence} of source {source} comes more than 255 times: prove fewer epochs at once"
                ))
            })?;
            if at % BAR_EVERY == 0 {
                bar.tick();
            }
        }
        Ok(Self::Counts(counts))
    }

    /// The epochs whose rows of a source are wanted.
    fn epochs_of(&self, source: usize) -> Vec<u64> {
        match self {
            Self::Below(_, epoch) => vec![*epoch],
            Self::Counts(counts) => {
                counts.range((source, 0)..=(source, u64::MAX)).map(|((_, epoch), _)| *epoch).collect()
            }
        }
    }

    fn count(&self, source: usize, epoch: u64, sequence: u64) -> u8 {
        match self {
            Self::Below(end, of) => u8::from(sequence < *end && epoch == *of),
            Self::Counts(counts) => {
                counts.get(&(source, epoch)).and_then(|counts| counts.get(sequence as usize)).copied().unwrap_or(0)
            }
        }
    }
}

/// The epoch that stands for the rows of `epoch`: the epoch itself if rows differ from epoch to
/// epoch, and else 0.
fn rows_epoch(config: &Config, epoch: u64) -> u64 {
    if config.phase == Phase::Epoch { epoch } else { 0 }
}

/// Adds up the rows of the files for several expectations at once.
struct Expected<'a> {
    wanted: &'a [Wanted],
    sums: Vec<Checksum>,
    source: usize,
    epoch: u64,
    /// The further column that is being read. `None` while tokens are read.
    field: Option<&'static str>,
    /// The places of a row with values of the column. These are all tokens, or the tokens that an
    /// array of the batch has.
    places: Range<usize>,
    /// The first place whose value is masked if a document begins there, and the value there.
    masked: Option<(usize, i64)>,
    /// Whether the checksum of a row covers its spans.
    has_spans: bool,
    bar: ProgressBar,
}

impl Visitor for Expected<'_> {
    fn row(&mut self, sequence: u64, FileRow { tokens, spans, .. }: FileRow<'_>) {
        let mut one = None;
        for (wanted, sum) in self.wanted.iter().zip(&mut self.sums) {
            for _ in 0..wanted.count(self.source, self.epoch, sequence) {
                *sum += *one.get_or_insert_with(|| {
                    let values = delivered(&self.places, self.masked, tokens, spans);
                    let mut one = Checksum::default();
                    match self.field {
                        None if self.has_spans => one.add_row_of_spans(self.source as u64, sequence, &values, spans),
                        None => one.add_row(self.source as u64, sequence, &values),
                        Some(name) => one.add_field(self.source as u64, sequence, name, &values),
                    }
                    one
                });
            }
        }
    }

    fn read(&mut self, tokens: u64) {
        self.bar.inc(tokens);
    }
}

/// The values of a row that an array of a batch has: those at `places` of the row. The value at the
/// first place of a span becomes the value of `masked`, if the place is not before the place that
/// `masked` names.
fn delivered(places: &Range<usize>, masked: Option<(usize, i64)>, values: &[i64], spans: &[(u32, u32)]) -> Vec<i64> {
    let mut found = Vec::with_capacity(values.len());
    let mut values = values.iter();
    for (start, len) in spans.iter().map(|(start, len)| (*start as usize, *len as usize)) {
        for (place, value) in (start..start + len).zip(values.by_ref()) {
            let mask = masked.filter(|(from, _)| place == start && place >= *from);
            if places.contains(&place) {
                found.push(mask.map_or(*value, |(_, mask)| mask));
            }
        }
    }
    found
}

/// The shards of source `source` whose rows belong to `part`. Parts have about equal numbers of
/// tokens.
fn share_of(loader: &Loader, source: usize, corpus: &Corpus, part: Part) -> Share {
    let total = u128::from(corpus.tokens().max(1));
    let mut tokens = 0;
    let numbers: Vec<u32> = corpus
        .counts()
        .map(|counts| {
            let number = u128::from(tokens) * u128::from(part.count()) / total;
            tokens += counts.tokens;
            // Shards without tokens may follow all others.
            (number as u32).min(part.count() - 1)
        })
        .collect();
    let first = numbers.partition_point(|number| *number < part.number());
    let end = numbers.partition_point(|number| *number <= part.number());
    Share { shards: first..end, rows_before: loader.rows_of_first(source, first) }
}

/// Reads the files of `part`, and returns the checksum for each of `wanted`.
fn expected(loader: &Loader, wanted: &[Wanted], part: Part, context: &Context<'_>) -> Result<Vec<Checksum>, Failure> {
    let config = loader.config();
    let bar = reading_bar(loader, context)?;
    let sums = vec![Checksum::default(); wanted.len()];
    let seq_len = config.seq_len as usize;
    let is_shifted = config.targets == Targets::Shifted;
    let has_boundaries = config.has_boundaries();
    let has_spans = has_boundaries || !config.layout.joins();
    let places = 0..usize::MAX;
    let mut expected =
        Expected { wanted, sums, source: 0, epoch: 0, field: None, places, masked: None, has_spans, bar };
    for (source, (_, corpus)) in loader.corpora().enumerate() {
        let Schema { fields, documents } = loader.schema();
        let share = share_of(loader, source, corpus, part);
        let is_there = |field: &&SchemaField| corpus.field_type(field.column).is_some();
        let fields: Vec<SchemaField> = fields.iter().filter(is_there).copied().collect();
        let mut epochs: Vec<u64> = wanted.iter().flat_map(|wanted| wanted.epochs_of(source)).collect();
        epochs.sort_unstable();
        epochs.dedup();
        let readings = (epochs.len() * (1 + fields.len() + documents.len())) as u64;
        expected.bar.inc_length(corpus.tokens() * readings.saturating_sub(1));
        // If labels are a column, no array has the last token that a shifted row reads.
        let has_labels = fields.iter().any(|field| field.name == "labels");
        for epoch in epochs {
            let phase = loader.phase(source, epoch);
            (expected.source, expected.epoch, expected.field) = (source, epoch, None);
            expected.places = if has_labels { 0..seq_len } else { 0..usize::MAX };
            // Only the array of targets has the last token of a shifted row.
            expected.masked = has_boundaries.then_some((seq_len, config.ignore_index));
            sequential::read(config, corpus, phase, &share, &mut expected)?;
            for field in &fields {
                let is_target = field.side == TokenSide::Target;
                let start = usize::from(is_shifted && is_target);
                (expected.field, expected.places) = (Some(field.name), start..start + seq_len);
                expected.masked = (has_boundaries && is_target).then_some((start, field.padding));
                sequential::read_field(config, field, corpus, phase, &share, &mut expected)?;
            }
            for field in documents {
                (expected.field, expected.places, expected.masked) = (Some(field.name), 0..seq_len, None);
                sequential::read_documents(config, field, corpus, phase, &share, &mut expected)?;
            }
        }
    }
    expected.bar.finish_and_clear();
    Ok(expected.sums)
}

fn reading_bar(loader: &Loader, context: &Context<'_>) -> forebay::Result<ProgressBar> {
    let tokens = loader.corpora().map(|(_, corpus)| corpus.tokens()).sum();
    Ok(progress::bar(tokens, TEMPLATE, context.env)?.with_message("reading files"))
}

fn coverage_json(checksum: &Checksum) -> Value {
    json!({"rows": checksum.rows, "tokens": checksum.tokens, "hash": checksum.hash_text()})
}

fn coverage_text(checksum: &Checksum) -> String {
    let (rows, tokens) = (number_of(checksum.rows, "row"), number_of(checksum.tokens, "token"));
    format!("{rows}, {tokens}, hash {}", checksum.hash_text())
}

fn write_json(value: &Value, context: &mut Context<'_>) -> Result<(), Failure> {
    Ok(writeln!(context.out, "{value}")?)
}

const PROVEN: &str = "proven: every row once, and its tokens are those of the files";
