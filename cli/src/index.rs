//! `forebay index`: writes the index of each corpus. The ranks of a run find it when they start.

use std::io::Write;
use std::time::Instant;

use forebay::corpus::{Corpus, Indexed, Summed};
use forebay::format::OpenOptions;
use forebay::{Error, ErrorKind};
use serde_json::json;

use crate::report::{bytes, escaped_faults, grouped, line, number_of};
use crate::{Context, FAILED, Failure, Sets, progress};

const TEMPLATE: &str = "{msg} {wide_bar} {percent}% {human_pos} of {human_len} shards, {eta} left";

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Loaders with the same `cache_dir` find the index and open shards when they first read them.\n\n\
    Example: forebay index corpus/ --cache-dir /scratch/forebay"
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
