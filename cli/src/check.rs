//! `forebay check`: opens and reads every shard, and reports its findings.
//!
//! Reading goes on after a broken shard or block, because the command should find all faults before
//! a run does.

use std::io::Write;
use std::path::Path;

use forebay::corpus::discover::ShardFile;
use forebay::corpus::parts::Part;
use forebay::corpus::{Corpus, mixed_shards};
use forebay::format::{self, Access, EndsScratch, OpenOptions, Shard, looks_like};
use forebay::tokens::{Tokens, id_outside, negative_id};
use forebay::{Config, Error, ErrorKind};
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::lengths::{BlockLengths, Lengths};
use crate::report::{bytes, counted, counts, escaped_faults, grouped, line, number_of, plural};
use crate::supervised::{self, Supervised};
use crate::{Context, FAILED, Failure, Sets, progress};

/// Number of tokens read at once if the file holds them as they are.
const PIECE_TOKENS: u64 = 1 << 20;
/// Number of different descriptions shown. Descriptions in a large corpus all differ by their
/// counts of pages.
const SHOWN_TEXTS: usize = 10;
const TEMPLATE: &str = "{msg} {wide_bar} {percent}% {human_pos} tokens, {eta} left";

#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0 sound, 1 broken, 2 usage or settings.\n\n\
    Several machines can share the work. The corpus is sound if every part ends with status 0.\n\n\
    Examples:\n  forebay check corpus/ 'more/*.arrow' --token-column ids --json\n  forebay check corpus/ --part 3/64")]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    paths: Vec<String>,
    /// Name of the token column, if it is none of the usual ones
    #[arg(long, value_name = "NAME")]
    token_column: Option<String>,
    /// Number of ids of the tokenizer: any other id is a fault
    #[arg(long, value_name = "COUNT")]
    vocab_size: Option<String>,
    /// Checks only part I of N, counted from 0: the shards whose number leaves I when it is divided
    /// by N
    #[arg(long, value_name = "I/N", default_value_t = Part::WHOLE, hide_default_value = true)]
    part: Part,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let flags = [("token_column", options.token_column.clone()), ("vocab_size", options.vocab_size.clone())];
    let config = options.sets.resolve(&options.paths, &flags, context)?.config;
    let findings = check(&config, options.part, context)?;
    let written = if options.json { writeln!(context.out, "{}", findings.json()) } else { findings.write(context.out) };
    match written {
        // A reader that stops early still learns from the status that the data is broken.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(if findings.broken.is_empty() { 0 } else { FAILED }),
    }
}

/// The findings of reading a corpus.
struct Findings {
    /// Number of files, including broken files.
    files: usize,
    shards: Vec<Shard>,
    /// Columns beside the tokens, each with the number of shards that have it.
    not_read: Vec<(String, usize)>,
    /// Lengths of the documents in the shards without a fault.
    lengths: Lengths,
    /// Targets among the tokens, by each column that tells them.
    supervised: Vec<Supervised>,
    broken: Vec<Error>,
}

fn check(config: &Config, part: Part, context: &mut Context<'_>) -> Result<Findings, Failure> {
    let options = OpenOptions::of(config);
    let mut files = Vec::new();
    for (_, data) in config.corpora()? {
        files.push(context.find(&options.files, &data, config.format)?);
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.num_threads.unwrap_or(1) as usize)
        .thread_name(|index| format!("forebay-check-{index}"))
        .build()
        .map_err(|error| Error::new(ErrorKind::Io, "cannot start threads").with_source(error))?;

    let (mut shards, mut broken) = (Vec::new(), Vec::new());
    let mut checked = 0;
    for files in &files {
        let first = shards.len();
        let own: Vec<&ShardFile> =
            files.iter().enumerate().filter(|(index, _)| part.takes(*index)).map(|(_, file)| file).collect();
        checked += own.len();
        let opened: Vec<_> = pool.install(|| own.par_iter().map(|file| format::open(&file.path, &options)).collect());
        for result in opened {
            match result {
                Ok(shard) => shards.push(shard),
                Err(error) => broken.push(error),
            }
        }
        // The corpora of a mixture may differ from each other.
        let described = || shards[first..].iter().map(|shard: &Shard| (shard.path(), shard.facts()));
        broken.extend(match part {
            Part::WHOLE => mixed_shards(described(), &options),
            _ => {
                let model = models(files, part, &options);
                mixed_shards(model.iter().map(|shard| (shard.path(), shard.facts())).chain(described()), &options)
            }
        });
    }

    // Threads take blocks, not shards. Otherwise a thread could be left alone with a large shard at
    // the end.
    let blocks: Vec<(&Shard, usize)> =
        shards.iter().flat_map(|shard| (0..shard.blocks().len()).map(move |block| (shard, block))).collect();
    let tokens = shards.iter().map(tokens_of).sum();
    let bar = progress::bar(tokens, TEMPLATE, context.env)?.with_message("reading");
    let read: Vec<forebay::Result<BlockLengths>> = pool.install(|| {
        let read = blocks.par_iter().map_init(Scratch::default, |scratch, (shard, block)| {
            let read = read_block(shard, *block, config.vocab_size, scratch, &bar);
            read.map_err(|error| error.at(shard.path()).in_block(*block as u64))
        });
        read.collect()
    });
    bar.finish_and_clear();
    let (mut lengths, mut read) = (Lengths::default(), read.into_iter());
    for shard in &shards {
        let mut of_shard = Vec::new();
        for block in read.by_ref().take(shard.blocks().len()) {
            block.map(|block| of_shard.push(block)).unwrap_or_else(|error| broken.push(error));
        }
        if of_shard.len() == shard.blocks().len() {
            lengths.add_shard(&of_shard);
        }
    }
    let columns: Vec<(&Shard, String)> = shards
        .iter()
        .flat_map(|shard| supervised::columns(shard, &options).into_iter().map(move |name| (shard, name)))
        .collect();
    let read: Vec<_> = pool
        .install(|| columns.par_iter().map(|(shard, name)| supervised::read(shard, name, &options, config)).collect());
    let mut targets = Vec::new();
    for result in read {
        result.map(|found| targets.extend(found)).unwrap_or_else(|error| broken.push(error));
    }
    let supervised = Supervised::sums(targets);
    open_like_a_loader(config, part, &options, &pool, &mut broken)?;
    let not_read = counts(shards.iter().flat_map(|shard| {
        let mut names = shard.info().not_read.clone();
        names.retain(|name| !options.fields.contains(name));
        names.sort_unstable();
        names.dedup();
        names
    }));
    Ok(Findings { files: checked, shards, not_read, lengths, supervised, broken })
}

/// The shards with which a part compares its own: those of other parts, up to the first shard with
/// tokens. So each part finds the shards that differ from the beginning of the corpus.
fn models(files: &[ShardFile], part: Part, options: &OpenOptions) -> Vec<Shard> {
    let mut models = Vec::new();
    for (index, file) in files.iter().enumerate() {
        // The part of a broken shard reports it.
        let Ok(shard) = format::open(&file.path, options) else { continue };
        let has_tokens = !shard.blocks().is_empty();
        if !part.takes(index) {
            models.push(shard);
        }
        if has_tokens {
            break;
        }
    }
    models
}

/// Opens the corpora like a loader and compares saved checksums. Adds the faults that reading did
/// not find.
///
/// Only `fields` and checksums have such faults. A saved index is brought up to date only if it has
/// checksums. A part compares the checksums of its own shards.
fn open_like_a_loader(
    config: &Config,
    part: Part,
    options: &OpenOptions,
    pool: &rayon::ThreadPool,
    broken: &mut Vec<Error>,
) -> Result<(), Failure> {
    let (mut corpora, mut faults, mut damage) = (Vec::new(), Vec::new(), Vec::new());
    for (name, data) in config.corpora()? {
        let has_checksums = |folder: &&Path| Corpus::has_saved_checksums(&data, config.format, options, folder);
        let folder = config.index_folder().map(Path::new).filter(has_checksums);
        if folder.is_none() && options.fields.is_empty() {
            continue;
        }
        match Corpus::open(&data, config.format, options, folder, pool) {
            Ok(corpus) => {
                damage.extend(corpus.damage(pool, |shard| part.takes(shard)));
                corpora.push((name, corpus));
            }
            Err(error) => faults.push(error),
        }
    }
    if faults.is_empty() && !options.fields.is_empty() {
        faults.extend(Corpus::schema(&corpora, &options.fields, config.ignore_index).err());
    }
    let path_of = |error: &Error| error.location().map(|place| place.path.clone());
    // A file that could not be read is reported once.
    let told: Vec<_> = broken.iter().map(path_of).collect();
    if broken.is_empty() {
        broken.append(&mut faults);
    }
    broken.extend(damage.into_iter().filter(|error| !told.contains(&path_of(error))));
    Ok(())
}

#[derive(Default)]
struct Scratch {
    bytes: Vec<u8>,
    ends: EndsScratch,
}

/// Reads a whole block like a loader. Returns the lengths of its documents.
fn read_block(
    shard: &Shard,
    block: usize,
    vocab_size: Option<u64>,
    scratch: &mut Scratch,
    bar: &ProgressBar,
) -> forebay::Result<BlockLengths> {
    let outside = |tokens: &Tokens<'_>| {
        let at = tokens.first_outside(vocab_size?)?;
        Some((at, id_outside(tokens.get(at), vocab_size?)))
    };
    let at_row = |error: Error, row: Option<u64>| match row {
        Some(row) => error.at_row(row),
        None => error,
    };
    let meta = shard.blocks()[block];
    match shard {
        Shard::Block(shard) => {
            let decoded = shard.decode(block, None)?;
            if let Some((at, error)) = outside(&Tokens::new(shard.block_dtype(), &decoded.bytes)) {
                let before: u64 = shard.blocks()[..block].iter().map(|block| block.tokens).sum();
                return Err(at_row(error, row_of(&shard.row_lengths()?, before + at as u64)));
            }
            bar.inc(meta.tokens);
            let ends = decoded.document_ends();
            Ok(BlockLengths::of(meta.tokens, (0..ends.len()).map(|document| ends.get(document))))
        }
        Shard::Random(shard) => {
            shard.info().file.check_unchanged()?;
            let mut start = 0;
            while start < meta.tokens {
                let end = meta.tokens.min(start + PIECE_TOKENS);
                let tokens = shard.tokens(block, start..end, &mut scratch.bytes)?;
                let negative = tokens.first_negative().map(|at| (at, negative_id(tokens.get(at))));
                if let Some((at, error)) = negative.or_else(|| outside(&tokens)) {
                    return Err(at_row(error, shard.row_of(block, start + at as u64)));
                }
                bar.inc(end - start);
                start = end;
            }
            let ends = shard.ends(block, &mut scratch.ends)?;
            if ends.len() as u64 != meta.ends {
                return Err(Error::data(format!("document ends: expected {}, found {}", meta.ends, ends.len())));
            }
            Ok(BlockLengths::of(meta.tokens, (0..ends.len()).map(|document| ends.get(document))))
        }
    }
}

/// The row with token `token`, in rows of these lengths.
pub(crate) fn row_of(lengths: &[Option<u64>], token: u64) -> Option<u64> {
    let mut before = 0;
    let row = lengths.iter().position(|length| {
        before += length.unwrap_or(0);
        before > token
    });
    row.map(|row| row as u64)
}

fn tokens_of(shard: &Shard) -> u64 {
    shard.blocks().iter().map(|block| block.tokens).sum()
}

impl Findings {
    fn total(&self, of: impl Fn(&Shard) -> u64) -> u64 {
        self.shards.iter().map(of).sum()
    }

    fn documents(&self) -> u64 {
        self.total(|shard| shard.blocks().iter().map(|block| block.starts).sum())
    }

    fn names(&self, of: impl Fn(&Shard) -> &'static str) -> Vec<&'static str> {
        self.shards.iter().map(of).collect()
    }

    /// Types of the ids of all shards with tokens.
    fn dtypes(&self) -> Vec<&'static str> {
        let full = self.shards.iter().filter(|shard| !shard.blocks().is_empty());
        full.map(|shard| shard.info().dtype.name()).collect()
    }

    fn access(&self) -> Vec<&'static str> {
        let full: Vec<_> = self.shards.iter().filter(|shard| !shard.blocks().is_empty()).collect();
        full.into_iter()
            .map(|shard| match shard.access() {
                Access::Random => "read in place",
                Access::Block => "decoded by blocks",
            })
            .collect()
    }

    /// The number of blocks, and the tokens of the smallest, median and largest block.
    fn block_tokens(&self) -> Option<(usize, [u64; 3])> {
        spread(self.shards.iter().flat_map(|shard| shard.blocks()).map(|block| block.tokens).collect())
    }

    /// Tokens of the largest shard, divided by the tokens of the median shard.
    fn skew(&self) -> Option<f64> {
        let (_, [_, median, largest]) = spread(self.shards.iter().map(tokens_of).collect())?;
        (median > 0).then(|| largest as f64 / median as f64)
    }

    fn descriptions(&self) -> Vec<(String, usize)> {
        counts(self.shards.iter().map(|shard| shard.describe()).filter(|text| !text.is_empty()))
    }

    fn advice(&self) -> Vec<(String, usize)> {
        counts(self.shards.iter().flat_map(|shard| shard.advice()))
    }

    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let size = self.total(|shard| shard.info().file.len());
        line(out, "shards", &format!("{}, {}", grouped(self.files as u64), bytes(size)))?;
        line(out, "format", &counted(self.names(|shard| shard.info().format.name())))?;
        line(out, "dtype", &counted(self.dtypes()))?;
        line(out, "access", &counted(self.access()))?;
        line(out, "rows", &grouped(self.total(|shard| shard.info().rows)))?;
        line(out, "documents", &grouped(self.documents()))?;
        line(out, "tokens", &grouped(self.total(tokens_of)))?;
        for (name, text) in std::iter::once("lengths").chain(std::iter::repeat("")).zip(self.lengths.lines()) {
            line(out, name, &text)?;
        }
        for supervised in &self.supervised {
            line(out, "supervised", &supervised.text())?;
        }
        if let Some((count, [min, median, max])) = self.block_tokens() {
            let [min, median, max] = [min, median, max].map(grouped);
            line(out, "blocks", &format!("{}: {min} to {max} tokens, median {median}", grouped(count as u64)))?;
        }
        if let Some(skew) = self.skew() {
            line(out, "skew", &format!("the largest shard has {skew:.2} times the tokens of the median one"))?;
        }
        let (telling, silent): (Vec<_>, Vec<_>) =
            self.not_read.iter().partition(|(name, _)| looks_like(name).is_some());
        for (name, count) in telling {
            let kind = looks_like(name).unwrap_or_default();
            let shards = number_of(*count as u64, "shard");
            line(out, "not read", &format!("column `{name}` in {shards}, which looks like {kind}"))?;
        }
        if !silent.is_empty() {
            let names: Vec<String> = silent.iter().map(|(name, _)| format!("`{name}`")).collect();
            line(out, "not read", &format!("{} {}", plural(silent.len() as u64, "column"), names.join(", ")))?;
        }
        for (name, texts) in [("content", self.descriptions()), ("advice", self.advice())] {
            for (text, count) in texts.iter().take(SHOWN_TEXTS) {
                line(out, name, &format!("{}: {text}", number_of(*count as u64, "shard")))?;
            }
            if texts.len() > SHOWN_TEXTS {
                line(
                    out,
                    name,
                    &format!(
                        "and {}, which `--json` lists",
                        number_of((texts.len() - SHOWN_TEXTS) as u64, "other kind")
                    ),
                )?;
            }
        }
        for error in &self.broken {
            line(out, "broken", &escaped_faults(&error.report()))?;
        }
        match self.broken.len() {
            0 => line(out, "sound", "every block was read"),
            many => line(out, "broken", &format!("{} found", number_of(many as u64, "fault"))),
        }
    }

    fn json(&self) -> Value {
        let texts = |texts: Vec<(String, usize)>| -> Vec<Value> {
            texts.into_iter().map(|(text, count)| json!({"text": text, "shards": count})).collect()
        };
        let names = |names: Vec<&str>| -> Value {
            counts(names)
                .into_iter()
                .map(|(name, count)| (name, count.into()))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let broken: Vec<Value> = self
            .broken
            .iter()
            .map(|error| {
                let place = error.location();
                json!({
                    "kind": kind(error.kind()),
                    "error": error.report(),
                    "path": place.map(|place| place.path.display().to_string()),
                    "block": place.and_then(|place| place.block),
                    "row": place.and_then(|place| place.row),
                })
            })
            .collect();
        let not_read: Vec<Value> = self
            .not_read
            .iter()
            .map(|(name, shards)| json!({"column": name, "shards": shards, "looks_like": looks_like(name)}))
            .collect();
        let (blocks, [min, median, max]) = self.block_tokens().unwrap_or_default();
        json!({
            "sound": self.broken.is_empty(),
            "shards": self.files,
            "bytes": self.total(|shard| shard.info().file.len()),
            "format": names(self.names(|shard| shard.info().format.name())),
            "dtype": names(self.dtypes()),
            "access": names(self.access()),
            "rows": self.total(|shard| shard.info().rows),
            "documents": self.documents(),
            "tokens": self.total(tokens_of),
            "lengths": self.lengths.json(),
            "supervised": self.supervised.iter().map(Supervised::json).collect::<Vec<_>>(),
            "blocks": {"count": blocks, "tokens_min": min, "tokens_median": median, "tokens_max": max},
            "skew": self.skew(),
            "not_read": not_read,
            "content": texts(self.descriptions()),
            "advice": texts(self.advice()),
            "broken": broken,
        })
    }
}

/// The name of a kind of fault, in JSON.
fn kind(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Config => "config",
        ErrorKind::NotFound => "not_found",
        ErrorKind::Io => "io",
        ErrorKind::Data => "data",
        ErrorKind::Changed => "changed",
        ErrorKind::State => "state",
        ErrorKind::Closed => "closed",
        _ => "internal",
    }
}

/// The number of values, and the smallest, median and largest value.
fn spread(mut values: Vec<u64>) -> Option<(usize, [u64; 3])> {
    values.sort_unstable();
    let (first, last) = (*values.first()?, *values.last()?);
    Some((values.len(), [first, values[values.len() / 2], last]))
}
