//! `forebay index`: writes the index of each corpus. The ranks of a run find it when they start.

use std::io::Write;
use std::time::Instant;

use forebay::corpus::parts::{Part, Parts};
use forebay::corpus::{Corpus, Indexed, Summed};
use forebay::format::OpenOptions;
use forebay::{Error, ErrorKind};
use indicatif::ProgressBar;
use serde_json::json;

use crate::report::{bytes, escaped_faults, grouped, line, number_of};
use crate::{Context, FAILED, Failure, Sets, progress};

const TEMPLATE: &str = "{msg} {wide_bar} {percent}% {human_pos} of {human_len} shards, {eta} left";

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Loaders with the same `cache_dir` find the index and open shards when they first read them.\n\n\
    Several machines can share the work. Each part opens the shards whose number leaves I when it is divided by N, and \
    saves its findings in the folder. A part that was killed runs again. `--merge` needs all parts, and the same data \
    and settings.\n\n\
    Examples:\n  forebay index corpus/ --cache-dir /scratch/forebay\n  \
    forebay index corpus/ --index-dir /shared/index --part 3/64\n  \
    forebay index corpus/ --index-dir /shared/index --merge"
)]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    paths: Vec<String>,
    /// Folder of the index; loaders find it by the setting of the same name
    #[arg(long, value_name = "FOLDER")]
    index_dir: Option<String>,
    /// Folder of the index and of what is read from object stores
    #[arg(long, value_name = "FOLDER")]
    cache_dir: Option<String>,
    /// Also saves checksums of all shards, so that loaders find damaged files. Reads the shards
    /// that have none
    #[arg(long)]
    checksums: bool,
    /// Indexes only part I of N, counted from 0. Each machine may run some of the parts
    #[arg(long, value_name = "I/N", conflicts_with = "merge")]
    part: Option<Part>,
    /// Joins the parts to the index, and opens no shard
    #[arg(long)]
    merge: bool,
    /// Prints one JSON object for each corpus
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let flags = [("index_dir", options.index_dir.clone()), ("cache_dir", options.cache_dir.clone())];
    let config = options.sets.resolve(&options.paths, &flags, context)?.config;
    config.validate()?;
    let Some(folder) = config.index_folder() else {
        return Err(
            Error::config("no folder for the index: name one with `--cache-dir`, or set `FOREBAY_CACHE_DIR`").into()
        );
    };
    // This fails now, and not after the minutes in which all shards are opened.
    std::fs::create_dir_all(folder).map_err(|error| {
        Error::io("cannot create the folder of the index, which `cache_dir` names", error).at(folder.as_ref())
    })?;
    let open = OpenOptions::of(&config);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.num_threads.unwrap_or(1) as usize)
        .thread_name(|index| format!("forebay-index-{index}"))
        .build()
        .map_err(|error| Error::new(ErrorKind::Io, "cannot start threads").with_source(error))?;
    let bar = progress::bar(0, TEMPLATE, context.env)?.with_message("indexing");
    let mut entries = Vec::new();
    let mut saved = true;
    for (name, data) in config.corpora()? {
        let parts = Parts {
            data: &data,
            format: config.format,
            options: &open,
            folder: folder.as_ref(),
            checksums: options.checksums,
        };
        if let Some(part) = options.part {
            index_part(name, part, &parts, &pool, &bar, options, context)?;
            continue;
        }
        if options.merge {
            entries.push(join(name, &parts, &pool, context)?);
            continue;
        }
        let began = Instant::now();
        let shown = |opened, of| {
            bar.set_length(of);
            bar.set_position(opened);
        };
        let (mut corpus, indexed) = Corpus::index(&data, config.format, &open, folder.as_ref(), &pool, &shown)?;
        let summed = match options.checksums && indexed.unsaved.is_none() {
            true => Some(corpus.save_checksums(&pool, &shown)?),
            false => None,
        };
        let seconds = began.elapsed().as_secs_f64();
        let unsaved = indexed.unsaved.as_ref().map(forebay::Error::report);
        for warning in corpus.warnings() {
            // For a loader, an index that cannot be saved is a warning. For this command it is a
            // failure.
            if unsaved.as_ref().is_none_or(|fault| !warning.starts_with(fault)) {
                bar.suspend(|| context.warn(warning))?;
            }
        }
        match unsaved {
            None => entries.push(CorpusReport::new(name, &corpus, &indexed, summed, seconds)?),
            Some(fault) => {
                saved = false;
                let text = format!("error: {fault}; name another folder with `--cache-dir`");
                bar.suspend(|| writeln!(context.err, "{}", escaped_faults(&text)))?;
            }
        }
    }
    bar.finish_and_clear();
    for entry in &entries {
        if options.json {
            writeln!(context.out, "{}", entry.json())?;
        } else {
            entry.write(context.out)?;
        }
    }
    Ok(if saved { 0 } else { FAILED })
}

/// Indexes a part of a corpus, and prints the facts about it.
fn index_part(
    name: String,
    part: Part,
    parts: &Parts<'_>,
    pool: &rayon::ThreadPool,
    bar: &ProgressBar,
    options: &Options,
    context: &mut Context<'_>,
) -> Result<(), Failure> {
    let began = Instant::now();
    let shown = |opened, of| {
        bar.set_length(of);
        bar.set_position(opened);
    };
    let indexed = parts.index(part, pool, &shown)?;
    bar.finish_and_clear();
    for warning in &indexed.warnings {
        context.warn(warning)?;
    }
    let (shards, path, seconds) = (indexed.facts.len() as u64, indexed.path.display(), began.elapsed().as_secs_f64());
    let counts = || indexed.facts.iter().map(|facts| facts.counts);
    let (documents, tokens): (u64, u64) =
        (counts().map(|counts| counts.starts).sum(), counts().map(|counts| counts.tokens).sum());
    let out = &mut *context.out;
    if options.json {
        let value = json!({
            "source": name,
            "part": part.to_string(),
            "file": path.to_string(),
            "shards": shards,
            "opened": indexed.opened,
            "documents": documents,
            "tokens": tokens,
            "seconds": seconds,
        });
        writeln!(out, "{value}")?;
        return Ok(());
    }
    if !name.is_empty() {
        line(out, "source", &name)?;
    }
    line(out, "part", &format!("{part}, in {path}"))?;
    line(out, "shards", &grouped(shards))?;
    line(out, "opened", &format!("{} in {seconds:.3} s", grouped(indexed.opened)))?;
    line(out, "documents", &grouped(documents))?;
    Ok(line(out, "tokens", &grouped(tokens))?)
}

/// Joins the parts of a corpus, and removes them.
fn join(
    name: String,
    parts: &Parts<'_>,
    pool: &rayon::ThreadPool,
    context: &mut Context<'_>,
) -> Result<CorpusReport, Failure> {
    let began = Instant::now();
    let joined = parts.join(pool)?;
    for warning in joined.corpus.warnings() {
        context.warn(warning)?;
    }
    for path in &joined.parts {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                context.warn(&format!("cannot remove `{}`, which nobody needs any more: {error}", path.display()))?;
            }
            _ => {}
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok(CorpusReport::new(name, &joined.corpus, &joined.indexed, joined.summed, seconds)?)
}

/// The printed facts about one corpus.
struct CorpusReport {
    /// Name of the source in a mixture. Empty without a mixture.
    name: String,
    index: String,
    index_bytes: u64,
    checksums: Option<Summed>,
    shards: u64,
    opened: u64,
    documents: u64,
    tokens: u64,
    bytes: u64,
    seconds: f64,
    fingerprint: String,
}

impl CorpusReport {
    fn new(
        name: String,
        corpus: &Corpus,
        indexed: &Indexed,
        checksums: Option<Summed>,
        seconds: f64,
    ) -> forebay::Result<Self> {
        let path = indexed.file.path();
        let index = std::fs::metadata(path).map_err(|error| Error::io("cannot stat saved index", error).at(path))?;
        Ok(Self {
            name,
            index: path.display().to_string(),
            index_bytes: index.len(),
            checksums,
            shards: corpus.len() as u64,
            opened: indexed.opened,
            documents: corpus.documents(),
            tokens: corpus.tokens(),
            bytes: corpus.facts().map(|facts| facts.stamp.size_bytes).sum(),
            seconds,
            fingerprint: corpus.fingerprint().to_owned(),
        })
    }

    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        if !self.name.is_empty() {
            line(out, "source", &self.name)?;
        }
        line(out, "index", &format!("{}, {}", self.index, bytes(self.index_bytes)))?;
        if let Some(Summed { file, size_bytes, read }) = &self.checksums {
            let read = number_of(*read, "shard");
            line(out, "checksums", &format!("{}, {}, {read} read", file.path().display(), bytes(*size_bytes)))?;
        }
        line(out, "shards", &format!("{}, {}", grouped(self.shards), bytes(self.bytes)))?;
        line(out, "opened", &format!("{} in {:.3} s", grouped(self.opened), self.seconds))?;
        line(out, "documents", &grouped(self.documents))?;
        line(out, "tokens", &grouped(self.tokens))
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "source": self.name,
            "index": self.index,
            "index_bytes": self.index_bytes,
            "checksums": self.checksums.as_ref().map(|summed| summed.file.path().display().to_string()),
            "checksums_bytes": self.checksums.as_ref().map(|summed| summed.size_bytes),
            "shards": self.shards,
            "opened": self.opened,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "fingerprint": self.fingerprint,
        })
    }
}
