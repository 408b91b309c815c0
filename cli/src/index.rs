//! `forebay index`: writes the index of a corpus, so that a run's ranks find it when they start.

use std::time::Instant;

use forebay::corpus::{Corpus, Indexed};
use forebay::shard::OpenOptions;
use forebay::{Error, ErrorKind};
use serde_json::json;

use crate::report::{bytes, grouped, line};
use crate::{Context, FAILED, Failure, Sets, progress};

const TEMPLATE: &str = "{msg} {wide_bar} {percent}% {human_pos} of {human_len} shards, {eta} left";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    paths: Vec<String>,
    /// Folder for the index; loaders find it by the same setting
    #[arg(long, value_name = "FOLDER")]
    cache_dir: Option<String>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let flags = [("cache_dir", options.cache_dir.clone())];
    let config = options.sets.resolve(&options.paths, &flags, context)?.config;
    config.validate()?;
    let Some(folder) = &config.cache_dir else {
        return Err(
            Error::config("no folder for the index: name one with `--cache-dir`, or set `FOREBAY_CACHE_DIR`").into()
        );
    };
    let open = OpenOptions::of(&config);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.num_threads.unwrap_or(1) as usize)
        .thread_name(|index| format!("forebay-index-{index}"))
        .build()
        .map_err(|error| Error::new(ErrorKind::Io, "cannot start threads").with_source(error))?;
    let bar = progress::bar(0, TEMPLATE, context.env)?.with_message("indexing");
    let began = Instant::now();
    let shown = |opened, of| {
        bar.set_length(of);
        bar.set_position(opened);
    };
    let result = Corpus::index(&config.data, config.format, &open, folder.as_ref(), &pool, &shown);
    bar.finish_and_clear();
    let (corpus, Indexed { file, opened, unsaved }) = result?;
    let seconds = began.elapsed().as_secs_f64();
    for warning in corpus.warnings() {
        writeln!(context.err, "warning: {warning}")?;
    }
    if unsaved.is_some() {
        return Ok(FAILED);
    }
    let size = std::fs::metadata(file.path())
        .map_err(|error| Error::io("cannot stat saved index", error).at(file.path()))?
        .len();
    let shards = corpus.len() as u64;
    let corpus_bytes = corpus.facts().map(|facts| facts.size_bytes).sum();
    if options.json {
        let found = json!({
            "index": file.path().display().to_string(),
            "index_bytes": size,
            "shards": shards,
            "opened": opened,
            "tokens": corpus.tokens(),
            "documents": corpus.documents(),
            "bytes": corpus_bytes,
            "seconds": seconds,
            "fingerprint": corpus.fingerprint(),
        });
        writeln!(context.out, "{found}")?;
        return Ok(0);
    }
    line(context.out, "index", &format!("{}, {}", file.path().display(), bytes(size)))?;
    line(context.out, "shards", &format!("{}, {}", grouped(shards), bytes(corpus_bytes)))?;
    line(context.out, "opened", &format!("{} in {seconds:.3} s", grouped(opened)))?;
    line(context.out, "documents", &grouped(corpus.documents()))?;
    line(context.out, "tokens", &grouped(corpus.tokens()))?;
    Ok(0)
}
