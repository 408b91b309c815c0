//! `forebay rewrite`: the documents of a corpus in files that a loader reads fast.
//!
//! The order of a loader is logical, so the result gives the same batches as the source wherever `shuffle` is named as `global` or `block`. Sources are put
//! together, or cut between documents, into shards of about one size. The groups of sources that shards are made of follow from their metadata, so that
//! they can be written side by side, and a later run knows which are missing.

mod manifest;
mod output;
mod source;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Instant;

use clap::ValueEnum;
use forebay::corpus::discover;
use forebay::format::{self, OpenOptions};
use forebay::settings::{Config, Io};
use forebay::tokens::Dtype;
use forebay::{Error, ErrorKind, settings};
use indicatif::ProgressBar;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::report::{bytes, grouped, line, names, number_of};
use crate::{Context, Failure, Sets, progress};
use manifest::{Done, Manifest};
use output::Part;
use source::{Batch, Rows, Source};

const TEMPLATE: &str = "{msg} {wide_bar} {percent}% {human_pos} tokens, {eta} left";
/// Rows of a plain column taken at once.
const PLAIN_ROWS: usize = 1 << 16;
const DTYPES: [Dtype; 5] = [Dtype::U8, Dtype::U16, Dtype::I32, Dtype::U32, Dtype::I64];

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Documents keep their order, their tokens and their ends. Empty and null documents stay, as empty ones. \
    Other columns are left out. A file whose token column is plain is one document, and stays one file.\n\n\
    The same command continues a run that was killed, and keeps the shards that are there. Every shard is read \
    back and compared with its source before it gets its name.\n\n\
    Memory on each thread: 16 bytes for each of --batch-tokens, with --to parquet a row group, and the longest \
    document. Compressed Arrow takes one of its record batches, too.\n\n\
    Example: forebay rewrite corpus/ fast/ --to arrow --shard-tokens 256Mi"
)]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    #[arg(value_name = "SRC", required = true)]
    paths: Vec<String>,
    /// Folder for the result: a new or an empty one, or one that this command began
    #[arg(value_name = "DST", required = true)]
    target: PathBuf,
    /// Format of the result
    #[arg(long, value_enum, default_value_t = To::Arrow)]
    to: To,
    /// Type of the ids in the result; `auto` reads them all and takes the smallest that holds them
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = ["auto", "uint8", "uint16", "int32", "uint32", "int64"])]
    dtype: String,
    /// Tokens of a shard of the result; it ends with the document that reaches them
    #[arg(long, value_name = "TOKENS", default_value = "256Mi", value_parser = size)]
    shard_tokens: u64,
    /// Tokens near which record batches end, which is what Arrow is indexed by
    #[arg(long, value_name = "TOKENS", default_value = "1Mi", value_parser = size)]
    batch_tokens: u64,
    /// Codec of Parquet
    #[arg(long, value_enum, default_value_t = Codec::Zstd)]
    codec: Codec,
    /// Encoding of Parquet
    #[arg(long, value_enum, default_value_t = Values::Plain)]
    encoding: Values,
    /// Tokens near which row groups of Parquet end
    #[arg(long, value_name = "TOKENS", default_value = "16Mi", value_parser = size)]
    row_group_tokens: u64,
    /// Bytes near which pages of Parquet end, before compression
    #[arg(long, value_name = "BYTES", default_value = "1Mi", value_parser = size)]
    page_bytes: u64,
    /// Token column, where it is not one of those that are recognised
    #[arg(long, value_name = "NAME")]
    token_column: Option<String>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum To {
    /// Uncompressed, read in place
    Arrow,
    /// Compressed, decoded by blocks
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Codec {
    None,
    Snappy,
    Lz4,
    Zstd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Values {
    Plain,
    Dictionary,
    Delta,
    ByteStreamSplit,
}

fn size(text: &str) -> Result<u64, String> {
    match settings::size(text.trim(), true) {
        Some(size) if (1..=1 << 48).contains(&size) => Ok(size),
        _ => Err("expected a number from 1 to 2^48, such as `16Mi`".to_owned()),
    }
}

/// What shards of the result are like.
#[derive(Clone, Debug)]
struct Shape {
    container: Container,
    dtype: Dtype,
    batch_tokens: u64,
}

#[derive(Clone, Debug)]
enum Container {
    Arrow,
    Parquet {
        compression: Compression,
        /// `None` for a dictionary.
        encoding: Option<Encoding>,
        row_group_tokens: u64,
        page_bytes: u64,
    },
}

impl Options {
    /// As the manifest keeps them: those that the result depends on.
    fn named(&self, config: &Config) -> manifest::Options {
        let mut named = vec![
            ("to", name(self.to)),
            ("dtype", self.dtype.clone()),
            ("shard-tokens", self.shard_tokens.to_string()),
            ("batch-tokens", self.batch_tokens.to_string()),
            ("token-column", config.token_column.clone().unwrap_or_default()),
        ];
        if self.to == To::Parquet {
            named.extend([
                ("codec", name(self.codec)),
                ("encoding", name(self.encoding)),
                ("row-group-tokens", self.row_group_tokens.to_string()),
                ("page-bytes", self.page_bytes.to_string()),
            ]);
        }
        named
    }

    fn container(&self) -> Container {
        if self.to == To::Arrow {
            return Container::Arrow;
        }
        Container::Parquet {
            compression: match self.codec {
                Codec::None => Compression::UNCOMPRESSED,
                Codec::Snappy => Compression::SNAPPY,
                Codec::Lz4 => Compression::LZ4_RAW,
                Codec::Zstd => Compression::ZSTD(ZstdLevel::default()),
            },
            encoding: match self.encoding {
                Values::Plain => Some(Encoding::PLAIN),
                Values::Dictionary => None,
                Values::Delta => Some(Encoding::DELTA_BINARY_PACKED),
                Values::ByteStreamSplit => Some(Encoding::BYTE_STREAM_SPLIT),
            },
            row_group_tokens: self.row_group_tokens,
            page_bytes: self.page_bytes,
        }
    }
}

fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let flags = [("token_column", options.token_column.clone())];
    let config = options.sets.resolve(&options.paths, &flags, context)?.config;
    if config.mixture.is_some() {
        return Err(Error::config("`mixture` is set: rewrite its corpora one by one").into());
    }
    config.validate()?;
    let target = &*options.target;
    refuse_inside(target, &config.data)?;
    let began = Instant::now();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(config.num_threads.unwrap_or(1) as usize)
        .thread_name(|index| format!("forebay-rewrite-{index}"))
        .build()
        .map_err(|error| Error::new(ErrorKind::Io, "cannot start threads").with_source(error))?;
    let open = OpenOptions::of(&config);

    let files = discover::find(&config.data, config.format)?;
    let bar =
        progress::bar(files.len() as u64, "{msg} {wide_bar} {percent}% {human_pos} shards, {eta} left", context.env)?
            .with_message("opening");
    let opened: Vec<_> =
        pool.install(|| files.par_iter().map(|file| Source::open(file, &open)).inspect(|_| bar.inc(1)).collect());
    bar.finish_and_clear();
    let (mut sources, mut faults) = (Vec::with_capacity(files.len()), Vec::new());
    for source in opened {
        source.map(|source| sources.push(source)).unwrap_or_else(|error| faults.push(error));
    }
    if !faults.is_empty() {
        return Err(Error::all(faults).into());
    }
    // One document without tokens: no file is needed for it.
    sources.retain(|source| !(source.plain && source.facts.counts.tokens == 0));

    let tokens: u64 = sources.iter().map(|source| source.facts.counts.tokens).sum();
    let settle = || -> forebay::Result<Value> {
        if let Some(dtype) = DTYPES.iter().find(|dtype| dtype.name() == options.dtype) {
            return Ok(json!({"dtype": dtype.name()}));
        }
        let bar = progress::bar(tokens, TEMPLATE, context.env)?.with_message("finding the largest id");
        let dtype = pool.install(|| smallest_dtype(&sources, &open, &bar))?;
        bar.finish_and_clear();
        Ok(json!({"dtype": dtype.name()}))
    };
    let manifest = Manifest::open(target, &options.named(&config), &sources, settle)?;
    let dtype = DTYPES.into_iter().find(|dtype| manifest.settled["dtype"] == dtype.name());
    let dtype = dtype.ok_or_else(|| Error::data("the manifest names no type of ids").at(target))?;

    let bar = progress::bar(tokens, TEMPLATE, context.env)?.with_message("rewriting");
    bar.set_position(manifest.done.values().map(|done| done.content.tokens).sum());
    bar.reset_eta();
    let work = Work {
        groups: groups(&sources, options.shard_tokens),
        sources: &sources,
        target,
        suffix: name(options.to),
        column: sources.first().map_or(format::TOKEN_COLUMNS[0], |source| &source.column),
        shape: Shape { container: options.container(), dtype, batch_tokens: options.batch_tokens },
        open: OpenOptions { token_column: sources.first().map(|source| source.column.clone()), ..open },
        manifest: &manifest,
        bar: &bar,
        stop: AtomicBool::new(false),
    };
    let results: Vec<_> = pool
        .install(|| (0..work.groups.len()).into_par_iter().with_max_len(1).map(|group| work.guarded(group)).collect());
    bar.finish_and_clear();
    let mut shards = Vec::new();
    let mut faults = Vec::new();
    for result in results {
        result.map(|written| shards.extend(written)).unwrap_or_else(|error| faults.push(error));
    }
    if !faults.is_empty() {
        return Err(Error::all(faults).into());
    }
    manifest.complete(shards.len())?;
    let summary = Summary::new(&sources, &shards, dtype, options.to, began);
    if options.json {
        writeln!(context.out, "{}", summary.json(target))?;
    } else {
        summary.write(target, context.out)?;
    }
    Ok(0)
}

/// Fails where a later search of the sources would find the result.
fn refuse_inside(target: &Path, data: &[String]) -> forebay::Result<()> {
    let real = real(target);
    for entry in data {
        let path = Path::new(entry);
        let searched = if path.is_dir() {
            path.to_owned()
        } else if !path.exists() && entry.contains(['*', '?', '[']) {
            let is_fixed = |part: &Component<'_>| !part.as_os_str().to_string_lossy().contains(['*', '?', '[']);
            let fixed: PathBuf = path.components().take_while(is_fixed).collect();
            // A pattern of file names alone does not look into folders.
            if path.components().count() == fixed.components().count() + 1 {
                continue;
            }
            fixed
        } else {
            continue;
        };
        if real.starts_with(self::real(&searched)) {
            return Err(Error::config(format!(
                "`{}` is inside of `{entry}`, so that the result would be taken for a part of the source: name a folder outside of it",
                target.display()
            )));
        }
    }
    Ok(())
}

/// Without links and dots, as far as it exists.
fn real(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let there = path.ancestors().find_map(|folder| Some((folder, folder.canonicalize().ok()?)));
    match there {
        Some((folder, real)) => real.join(path.strip_prefix(folder).unwrap_or(Path::new(""))),
        None => path,
    }
}

/// The smallest type that holds every id. Stops reading where no smaller type than that of the sources is possible any more.
fn smallest_dtype(sources: &[Source], open: &OpenOptions, bar: &ProgressBar) -> forebay::Result<Dtype> {
    let rank = |dtype: Dtype| DTYPES.iter().position(|other| *other == dtype);
    let fitting = |id: i64| DTYPES.into_iter().find(|dtype| id <= output::most(*dtype)).unwrap_or(Dtype::I64);
    let widest = sources.iter().map(|source| rank(source.facts.dtype)).max().flatten();
    let largest = AtomicI64::new(0);
    sources.par_iter().try_for_each(|source| {
        let shard = format::open(&source.file.path, open)?;
        let blocks: Vec<usize> = (0..shard.blocks().len()).collect();
        blocks.par_iter().try_for_each(|block| {
            // A guess that is late costs one more block; no other memory depends on it.
            if rank(fitting(largest.load(Ordering::Relaxed))) >= widest {
                return Ok(());
            }
            let found =
                largest_id(&shard, *block).map_err(|error| error.at(&source.file.path).in_block(*block as u64))?;
            largest.fetch_max(found, Ordering::Relaxed);
            bar.inc(shard.blocks()[*block].tokens);
            Ok(())
        })
    })?;
    Ok(fitting(largest.into_inner()))
}

fn largest_id(shard: &format::Shard, block: usize) -> forebay::Result<i64> {
    const PIECE_TOKENS: u64 = 1 << 20;
    let (mut bytes, mut ids) = (Vec::new(), Vec::new());
    let tokens = shard.blocks()[block].tokens;
    let shard = match shard {
        format::Shard::Random(shard) => shard,
        format::Shard::Block(shard) => {
            let decoded = shard.decode(block, None)?;
            let tokens = forebay::tokens::Tokens::new(shard.block_dtype(), &decoded.bytes);
            return Ok(output::largest_id(&tokens, &mut ids));
        }
    };
    shard.info().file.check_unchanged()?;
    let mut largest = 0;
    for start in (0..tokens).step_by(PIECE_TOKENS as usize) {
        let piece = shard.tokens(block, start..tokens.min(start + PIECE_TOKENS), &mut bytes)?;
        largest = largest.max(output::largest_id(&piece, &mut ids));
    }
    Ok(largest)
}

/// Sources that shards of the result are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    sources: Range<usize>,
    tokens: u64,
    documents: u64,
    /// Whether it is one file with a plain column.
    plain: bool,
    /// Tokens after which a shard ends.
    shard_tokens: u64,
}

/// Neighbours are put together as long as they make no more than one shard.
fn groups(sources: &[Source], shard_tokens: u64) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let counts = source.facts.counts;
        match groups.last_mut() {
            // A shard of empty documents alone would be one that check calls slow.
            Some(last)
                if !last.plain
                    && !source.plain
                    && (counts.tokens == 0 || last.tokens + counts.tokens <= shard_tokens) =>
            {
                last.sources.end = index + 1;
                last.tokens += counts.tokens;
                last.documents += counts.starts;
            }
            _ => groups.push(Group {
                sources: index..index + 1,
                tokens: counts.tokens,
                documents: counts.starts,
                plain: source.plain,
                shard_tokens: 0,
            }),
        }
    }
    for group in &mut groups {
        // Of equal size, so that none is left over that holds next to nothing.
        let shards = ((group.tokens + shard_tokens / 2) / shard_tokens).max(1);
        group.shard_tokens = if group.plain { u64::MAX } else { group.tokens.div_ceil(shards).max(1) };
    }
    groups
}

/// What the threads share.
struct Work<'a> {
    groups: Vec<Group>,
    sources: &'a [Source],
    target: &'a Path,
    suffix: String,
    column: &'a str,
    shape: Shape,
    open: OpenOptions,
    manifest: &'a Manifest,
    bar: &'a ProgressBar,
    /// Set by the first failure; nobody waits for it.
    stop: AtomicBool,
}

/// A shard of the result, and whether an earlier run wrote it.
struct Shard {
    done: Done,
    was_there: bool,
}

impl Work<'_> {
    fn guarded(&self, group: usize) -> forebay::Result<Vec<Shard>> {
        // A damaged file may make a reader panic; what other threads have written stays.
        let result = catch_unwind(AssertUnwindSafe(|| self.write_group(group))).unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Internal, format!("panic while rewriting {}", self.paths(group))))
        });
        if result.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        result
    }

    /// The paths of a group's sources, in words.
    fn paths(&self, group: usize) -> String {
        names(self.sources[self.groups[group].sources.clone()].iter().map(|source| source.file.path.to_string_lossy()))
    }

    /// In the order of names, which is that of a folder.
    fn name(&self, group: usize, shard: u64) -> String {
        let digits = |most: u64| most.max(1).ilog10() as usize + 1;
        let most_shards = self.groups.iter().map(|group| group.tokens / group.shard_tokens + 1).max().unwrap_or(1);
        let (group_digits, shard_digits) = (digits(self.groups.len() as u64).max(5), digits(most_shards).max(3));
        format!("tokens-{group:0group_digits$}-{shard:0shard_digits$}.{}", self.suffix)
    }

    fn write_group(&self, index: usize) -> forebay::Result<Vec<Shard>> {
        let group = &self.groups[index];
        let end = (group.sources.end, 0);
        let mut cursor = Cursor::new(self.sources, group.sources.clone(), self.open.io);
        let mut shards: Vec<Shard> = Vec::new();
        let mut at = (group.sources.start, 0);
        while at != end && !self.stop.load(Ordering::Relaxed) {
            let name = self.name(index, shards.len() as u64);
            let shard = match self.manifest.done.get(&name) {
                Some(done) => Shard { done: done.clone(), was_there: true },
                None => {
                    cursor.seek(at);
                    let Some(done) = self.write_shard(&name, index, &mut cursor, &shards)? else { break };
                    Shard { done, was_there: false }
                }
            };
            at = shard.done.next;
            shards.push(shard);
        }
        Ok(shards)
    }

    /// Writes a shard from where `cursor` stands. Returns none where others have failed meanwhile.
    fn write_shard(
        &self,
        name: &str,
        index: usize,
        cursor: &mut Cursor<'_>,
        before: &[Shard],
    ) -> forebay::Result<Option<Done>> {
        let group = &self.groups[index];
        let mut part = Part::create(self.target, name, self.column, group.plain, &self.shape)?;
        let mut shown = 0;
        while let Some((path, batch)) = cursor.current()? {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            if group.plain {
                let rows = batch.next..batch.len.min(batch.next + PLAIN_ROWS);
                let added = part.document(|ids| batch.widen(rows.clone(), ids));
                added.map_err(|error| error.at_row(batch.row(rows.start)).at(path))?;
                batch.next = rows.end;
            } else {
                // Empty documents belong to the shard before them, so that none is left alone at the end.
                let document = batch.document(batch.next);
                if part.tokens() >= group.shard_tokens && !document.is_empty() {
                    break;
                }
                let added = part.document(|ids| batch.widen(document, ids));
                added.map_err(|error| error.at_row(batch.row(batch.next)).at(path))?;
                batch.next += 1;
            }
            if part.tokens() > shown + (1 << 20) {
                self.bar.inc(part.tokens() - shown);
                shown = part.tokens();
            }
        }
        let next = cursor.place();
        self.bar.inc(part.tokens() - shown);
        let (finished, content) = part.finish(&self.open)?;
        if next == (group.sources.end, 0) {
            let sum = |of: fn(&output::Content) -> u64| {
                before.iter().map(|shard| of(&shard.done.content)).sum::<u64>() + of(&content)
            };
            let found = (sum(|content| content.tokens), sum(|content| content.documents));
            if found != (group.tokens, group.documents) {
                return Err(Error::data(format!(
                    "arrow-rs finds {} and {} where opening found {} and {}, in {}",
                    number_of(found.0, "token"),
                    number_of(found.1, "document"),
                    group.tokens,
                    group.documents,
                    self.paths(index)
                )));
            }
        }
        let done = Done { bytes: finished.bytes, content, next };
        self.manifest.note(name, &done)?;
        finished.publish()?;
        Ok(Some(done))
    }
}

/// A place in a run of sources.
struct Cursor<'a> {
    sources: &'a [Source],
    range: Range<usize>,
    io: Io,
    at: usize,
    first_row: u64,
    rows: Option<Rows>,
    batch: Option<Batch>,
}

impl<'a> Cursor<'a> {
    fn new(sources: &'a [Source], range: Range<usize>, io: Io) -> Self {
        Self { sources, at: range.start, range, io, first_row: 0, rows: None, batch: None }
    }

    fn seek(&mut self, place: (usize, u64)) {
        if self.place() != place {
            (self.at, self.first_row) = place;
            (self.rows, self.batch) = (None, None);
        }
    }

    /// Source and row that come next; the source after the last one, and row 0, at the end.
    fn place(&self) -> (usize, u64) {
        match &self.batch {
            Some(batch) => (self.at, batch.row(batch.next)),
            None => (self.at, self.first_row),
        }
    }

    /// Rows of which at least one was not taken yet, and where they are from.
    fn current(&mut self) -> forebay::Result<Option<(&'a Path, &mut Batch)>> {
        while self.at < self.range.end {
            let source = &self.sources[self.at];
            let path = &*source.file.path;
            if self.batch.as_ref().is_some_and(|batch| batch.next < batch.len) {
                break;
            }
            if self.rows.is_none() {
                self.rows = Some(source.rows(self.first_row, self.io)?);
            }
            let rows = self.rows.as_mut().expect("opened above");
            self.batch = rows.next().map_err(|error| error.at(path))?;
            if self.batch.is_none() {
                (self.at, self.first_row, self.rows) = (self.at + 1, 0, None);
            }
        }
        let path = self.sources.get(self.at).map(|source| &*source.file.path);
        Ok(path.zip(self.batch.as_mut()).filter(|_| self.at < self.range.end))
    }
}

/// What a rewriting came to.
struct Summary {
    sources: usize,
    source_bytes: u64,
    shards: usize,
    bytes: u64,
    were_there: usize,
    rows: u64,
    documents: u64,
    tokens: u64,
    dtype: Dtype,
    to: To,
    left_out: Vec<String>,
    seconds: f64,
}

impl Summary {
    fn new(sources: &[Source], shards: &[Shard], dtype: Dtype, to: To, began: Instant) -> Self {
        let mut left_out: Vec<String> = sources.iter().flat_map(|source| source.others.iter().cloned()).collect();
        left_out.sort_unstable();
        left_out.dedup();
        let sum = |of: fn(&Done) -> u64| shards.iter().map(|shard| of(&shard.done)).sum();
        Self {
            sources: sources.len(),
            source_bytes: sources.iter().map(|source| source.facts.size_bytes).sum(),
            shards: shards.len(),
            bytes: sum(|done| done.bytes),
            were_there: shards.iter().filter(|shard| shard.was_there).count(),
            rows: sum(|done| done.content.rows),
            documents: sum(|done| done.content.documents),
            tokens: sum(|done| done.content.tokens),
            dtype,
            to,
            left_out,
            seconds: began.elapsed().as_secs_f64(),
        }
    }

    fn write(&self, target: &Path, out: &mut dyn std::io::Write) -> std::io::Result<()> {
        let Self { rows, documents, .. } = self;
        line(out, "source", &format!("{}, {}", number_of(self.sources as u64, "shard"), bytes(self.source_bytes)))?;
        line(
            out,
            "result",
            &format!("{}, {}, in {}", number_of(self.shards as u64, "shard"), bytes(self.bytes), target.display()),
        )?;
        if self.were_there > 0 {
            line(out, "kept", &format!("{} that were there", number_of(self.were_there as u64, "shard")))?;
        }
        line(out, "format", &name(self.to))?;
        line(out, "dtype", self.dtype.name())?;
        line(out, "rows", &grouped(*rows))?;
        line(out, "documents", &grouped(*documents))?;
        line(out, "tokens", &grouped(self.tokens))?;
        if !self.left_out.is_empty() {
            line(out, "left out", &format!("columns that no loader reads: {}", names(&self.left_out)))?;
        }
        line(out, "sound", &format!("every shard was read back and is equal to its source; {:.1} s", self.seconds))
    }

    fn json(&self, target: &Path) -> Value {
        json!({
            "source_shards": self.sources,
            "source_bytes": self.source_bytes,
            "target": target.display().to_string(),
            "shards": self.shards,
            "bytes": self.bytes,
            "kept": self.were_there,
            "format": name(self.to),
            "dtype": self.dtype.name(),
            "rows": self.rows,
            "documents": self.documents,
            "tokens": self.tokens,
            "left_out": self.left_out,
            "seconds": self.seconds,
        })
    }
}
