//! `forebay check`: opens and reads every shard, and says what it found.
//!
//! One broken shard or block does not end the reading: the point is to find all of them before a run does.

use std::io::Write;

use forebay::corpus::discover;
use forebay::corpus::mixed_shards;
use forebay::format::{self, Access, EndsScratch, OpenOptions, Shard};
use forebay::{Config, Error, ErrorKind};
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::report::{bytes, counted, counts, grouped, line, number_of};
use crate::{Context, FAILED, Failure, Sets, progress};

/// Tokens read at once where they lie in the file.
const PIECE_TOKENS: u64 = 1 << 20;
/// Different descriptions shown; their counts of pages make those of large corpora all differ.
const SHOWN_TEXTS: usize = 10;
const TEMPLATE: &str = "{msg} {wide_bar} {percent}% {human_pos} tokens, {eta} left";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    paths: Vec<String>,
    /// Token column, where it is not one of those that are recognised
    #[arg(long, value_name = "NAME")]
    token_column: Option<String>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let flags = [("token_column", options.token_column.clone())];
    let config = options.sets.resolve(&options.paths, &flags, context)?.config;
    let findings = check(&config, context)?;
    let written = if options.json { writeln!(context.out, "{}", findings.json()) } else { findings.write(context.out) };
    match written {
        // Whoever stops reading early still learns from the status that the data is broken.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(if findings.broken.is_empty() { 0 } else { FAILED }),
    }
}

/// What reading a corpus came to.
struct Findings {
    /// Files found, broken ones included.
    files: usize,
    shards: Vec<Shard>,
    broken: Vec<Error>,
}

fn check(config: &Config, context: &Context<'_>) -> Result<Findings, Failure> {
    let mut files = Vec::new();
    for (_, data) in config.corpora()? {
        files.push(discover::find(&data, config.format)?);
    }
    let options = OpenOptions::of(config);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.num_threads.unwrap_or(1) as usize)
        .thread_name(|index| format!("forebay-check-{index}"))
        .build()
        .map_err(|error| Error::new(ErrorKind::Io, "cannot start threads").with_source(error))?;

    let (mut shards, mut broken) = (Vec::new(), Vec::new());
    for files in &files {
        let first = shards.len();
        let opened: Vec<_> = pool.install(|| files.par_iter().map(|file| format::open(&file.path, &options)).collect());
        for result in opened {
            match result {
                Ok(shard) => shards.push(shard),
                Err(error) => broken.push(error),
            }
        }
        // The corpora of a mixture may differ from each other.
        broken.extend(mixed_shards(shards[first..].iter().map(|shard| (shard.path(), shard.facts()))));
    }

    // By blocks, not shards, so that a large shard is not left to one thread at the end.
    let blocks: Vec<(&Shard, usize)> =
        shards.iter().flat_map(|shard| (0..shard.blocks().len()).map(move |block| (shard, block))).collect();
    let tokens = shards.iter().map(tokens_of).sum();
    let bar = progress::bar(tokens, TEMPLATE, context.env)?.with_message("reading");
    let read: Vec<Option<Error>> = pool.install(|| {
        let read = blocks.par_iter().map_init(Scratch::default, |scratch, (shard, block)| {
            let fault = read_block(shard, *block, scratch, &bar).err();
            fault.map(|error| error.at(shard.path()).in_block(*block as u64))
        });
        read.collect()
    });
    bar.finish_and_clear();
    broken.extend(read.into_iter().flatten());
    Ok(Findings { files: files.iter().map(Vec::len).sum(), shards, broken })
}

#[derive(Default)]
struct Scratch {
    bytes: Vec<u8>,
    ends: EndsScratch,
}

/// Reads all of a block, as a loader would.
fn read_block(shard: &Shard, block: usize, scratch: &mut Scratch, bar: &ProgressBar) -> forebay::Result<()> {
    let meta = shard.blocks()[block];
    match shard {
        Shard::Block(shard) => {
            shard.decode(block, None)?;
            bar.inc(meta.tokens);
        }
        Shard::Random(shard) => {
            shard.info().file.check_unchanged()?;
            let mut start = 0;
            while start < meta.tokens {
                let end = meta.tokens.min(start + PIECE_TOKENS);
                shard
                    .tokens(block, start..end, &mut scratch.bytes)?
                    .check_ids()
                    .map_err(|error| error.context(format!("tokens {start}..{end} of the block")))?;
                bar.inc(end - start);
                start = end;
            }
            let ends = shard.ends(block, &mut scratch.ends)?.len() as u64;
            if ends != meta.ends {
                return Err(Error::data(format!("document ends: expected {}, found {ends}", meta.ends)));
            }
        }
    }
    Ok(())
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

    fn access(&self) -> Vec<&'static str> {
        let full: Vec<_> = self.shards.iter().filter(|shard| !shard.blocks().is_empty()).collect();
        full.into_iter()
            .map(|shard| match shard.access() {
                Access::Random => "read in place",
                Access::Block => "decoded by blocks",
            })
            .collect()
    }

    /// Blocks: how many, and the smallest, median and largest, in tokens.
    fn block_tokens(&self) -> Option<(usize, [u64; 3])> {
        spread(self.shards.iter().flat_map(|shard| shard.blocks()).map(|block| block.tokens).collect())
    }

    /// Tokens of the largest shard over those of the median one.
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
        line(out, "dtype", &counted(self.names(|shard| shard.info().dtype.name())))?;
        line(out, "access", &counted(self.access()))?;
        line(out, "rows", &grouped(self.total(|shard| shard.info().rows)))?;
        line(out, "documents", &grouped(self.documents()))?;
        line(out, "tokens", &grouped(self.total(tokens_of)))?;
        if let Some((count, [min, median, max])) = self.block_tokens() {
            let [min, median, max] = [min, median, max].map(grouped);
            line(out, "blocks", &format!("{}: {min} to {max} tokens, median {median}", grouped(count as u64)))?;
        }
        if let Some(skew) = self.skew() {
            line(out, "skew", &format!("the largest shard has {skew:.2} times the tokens of the median one"))?;
        }
        for (name, texts) in [("content", self.descriptions()), ("advice", self.advice())] {
            for (text, count) in texts.iter().take(SHOWN_TEXTS) {
                line(out, name, &format!("{}: {text}", number_of(*count as u64, "shard")))?;
            }
            if texts.len() > SHOWN_TEXTS {
                line(out, name, &format!("and {} other kinds, which `--json` lists", texts.len() - SHOWN_TEXTS))?;
            }
        }
        for error in &self.broken {
            line(out, "broken", &error.report())?;
        }
        match self.broken.len() {
            0 => line(out, "sound", "every block was read"),
            1 => line(out, "broken", "1 fault found"),
            many => line(out, "broken", &format!("{many} faults found")),
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
                    "kind": format!("{:?}", error.kind()).to_lowercase(),
                    "error": error.report(),
                    "path": place.map(|place| place.path.display().to_string()),
                    "block": place.and_then(|place| place.block),
                    "row": place.and_then(|place| place.row),
                })
            })
            .collect();
        let (blocks, [min, median, max]) = self.block_tokens().unwrap_or_default();
        json!({
            "sound": self.broken.is_empty(),
            "shards": self.files,
            "bytes": self.total(|shard| shard.info().file.len()),
            "format": names(self.names(|shard| shard.info().format.name())),
            "dtype": names(self.names(|shard| shard.info().dtype.name())),
            "access": names(self.access()),
            "rows": self.total(|shard| shard.info().rows),
            "documents": self.documents(),
            "tokens": self.total(tokens_of),
            "blocks": {"count": blocks, "tokens_min": min, "tokens_median": median, "tokens_max": max},
            "skew": self.skew(),
            "content": texts(self.descriptions()),
            "advice": texts(self.advice()),
            "broken": broken,
        })
    }
}

/// How many values, and the smallest, median and largest of them.
fn spread(mut values: Vec<u64>) -> Option<(usize, [u64; 3])> {
    values.sort_unstable();
    let (first, last) = (*values.first()?, *values.last()?);
    Some((values.len(), [first, values[values.len() / 2], last]))
}
