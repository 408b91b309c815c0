//! `forebay bench`: takes batches as fast as they come, and measures the cost.
//!
//! The command does nothing with a batch. So the numbers show the most that a trainer on this
//! machine could get from the loader. Ctrl-C ends the measurement and prints the results so far.

use std::io::Write;
use std::time::{Duration, Instant};

use forebay::format::Access;
use forebay::loader::Next;
use forebay::{Config, Error, Loader};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::interrupt::{self, Hold, INTERRUPTED};
use crate::report::{bytes, grouped, line, number_of};
use crate::{Context, Failure, Sets, ShapeOptions, progress};

/// Time to run if neither time nor epochs are given, in seconds.
const DEFAULT_SECONDS: f64 = 10.0;
/// Time between two samples of the memory. A sample takes some 20 µs.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);
/// Time of one wait for a batch, after which the command checks for Ctrl-C.
const SLICE: Duration = Duration::from_millis(100);
const TEMPLATE: &str = "{msg} {wide_bar} {percent}%";

#[derive(Debug, clap::Args)]
#[command(after_help = "Ctrl-C ends the measurement and prints the results so far, with status 130.\n\n\
    Example: forebay bench corpus/ --seq-len 4096 --batch-size 8 --shuffle --threads 4 --seconds 30")]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    paths: Vec<String>,
    #[command(flatten)]
    shape: ShapeOptions,
    /// Number of worker threads
    #[arg(long, value_name = "N")]
    threads: Option<String>,
    /// Time to run; 10 if `--epochs` is not given either
    #[arg(long, value_name = "SECONDS", value_parser = positive_seconds)]
    seconds: Option<f64>,
    /// Epochs to run, at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    epochs: Option<u64>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

fn positive_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if seconds > 0.0 && seconds < 1e9 => Ok(seconds),
        _ => Err("expected a number of seconds above 0".to_owned()),
    }
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let own = [("num_threads", options.threads.clone())];
    let flags = [options.shape.flags().as_slice(), &own].concat();
    let resolved = options.sets.resolve(&options.paths, &flags, context)?;
    resolved.refuse_pinning()?;
    let mut config = resolved.config;
    // Nothing is trained on these batches, so that no delivery log may name them.
    config.delivery_log = None;
    let limit = match (options.seconds, options.epochs) {
        (None, None) => Some(DEFAULT_SECONDS),
        (seconds, _) => seconds,
    };
    let Some(measured) = measure(config, limit.map(Duration::from_secs_f64), options.epochs, context)? else {
        writeln!(context.err, "interrupted before the first batch")?;
        return Ok(INTERRUPTED);
    };
    if measured.interrupted {
        writeln!(context.err, "interrupted: these are the results so far")?;
    }
    if options.json {
        writeln!(context.out, "{}", measured.json())?;
    } else {
        measured.write(context.out)?;
    }
    Ok(if measured.interrupted { INTERRUPTED } else { 0 })
}

/// The results of a run. Times without a unit in their name are in seconds.
struct Measured {
    config: Config,
    format: &'static str,
    shards: u64,
    corpus_tokens: u64,
    /// Bytes of all files.
    corpus_bytes: u64,
    /// Bytes of all blocks when decoded, and bytes of decoded blocks that the cache may hold.
    /// `None` if nothing is decoded.
    decoded: Option<(u64, u64)>,
    interrupted: bool,
    epochs: u64,
    batches: u64,
    tokens: u64,
    bytes: u64,
    elapsed: f64,
    cpu: f64,
    open: f64,
    first_batch: f64,
    /// Waits for batches in seconds, sorted.
    waits: Vec<f32>,
    peak_anon_bytes: u64,
    peak_resident_bytes: u64,
    /// Bytes read from storage, including opening. The number is small if the system has the files
    /// in memory. `None` if the system does not count them.
    storage_bytes: Option<u64>,
    /// Decoding time of all threads together.
    decode: f64,
    /// Filling time of all threads together.
    fill: f64,
}

/// Runs a loader until `limit`, `epochs` or Ctrl-C. Returns `None` if no batch came before Ctrl-C.
fn measure(
    config: Config,
    limit: Option<Duration>,
    epochs: Option<u64>,
    context: &mut Context<'_>,
) -> Result<Option<Measured>, Failure> {
    let storage_before = storage_bytes();
    let opening = Instant::now();
    let loader = Loader::open(config)?;
    let open = opening.elapsed().as_secs_f64();
    context.tell_notices()?;
    if loader.is_empty() {
        let config = loader.config();
        return Err(Error::config(format!(
            "an epoch has no batch: {} of {} do not fill a global batch of {} on {}; set a smaller `batch_size` \
             or `seq_len`, or another `remainder`",
            number_of(loader.num_sequences(), "sequence"),
            number_of(config.seq_len, "token"),
            number_of(config.batch_size, "row"),
            number_of(config.dp_world_size.unwrap_or(1), "rank"),
        ))
        .into());
    }
    let total = match (limit, epochs) {
        (Some(limit), _) => limit.as_millis() as u64,
        (None, epochs) => loader.len() * epochs.unwrap_or(1),
    };
    let bar = progress::bar(total, TEMPLATE, context.env)?.with_message("running");
    let hold = interrupt::hold();
    let mut run =
        Measurement { taken: Amounts::default(), began: Instant::now(), sampled: Instant::now(), limit, bar, hold };
    let cpu_before = cpu_seconds();
    let mut passes = 0;
    while epochs.is_none_or(|epochs| passes < epochs) && run.pass(&loader)? {
        passes += 1;
    }
    let elapsed = run.began.elapsed().as_secs_f64();
    let cpu = cpu_seconds() - cpu_before;
    let stats = loader.stats();
    run.sample_memory();
    run.bar.finish_and_clear();

    let interrupted = run.hold.is_pending();
    let mut taken = run.taken;
    if interrupted && taken.waits.is_empty() {
        return Ok(None);
    }
    let first_batch = taken.waits.first().map_or(0.0, |wait| f64::from(*wait));
    taken.waits.sort_unstable_by(f32::total_cmp);
    let corpora = || loader.corpora().map(|(_, corpus)| corpus);
    let decodes = corpora().any(|corpus| corpus.access() == Access::Block);
    let decoded_bytes: u64 = corpora().map(|corpus| corpus.decoded_bytes()).sum();
    Ok(Some(Measured {
        config: loader.config().clone(),
        format: loader.corpus().facts().next().map_or("-", |facts| facts.format.name()),
        shards: corpora().map(|corpus| corpus.len() as u64).sum(),
        corpus_tokens: corpora().map(|corpus| corpus.tokens()).sum(),
        corpus_bytes: corpora().flat_map(|corpus| corpus.facts()).map(|facts| facts.stamp.size_bytes).sum(),
        decoded: decodes.then(|| (decoded_bytes, loader.memory_plan().cache_bytes)),
        interrupted,
        epochs: passes,
        batches: stats.batches,
        tokens: taken.tokens,
        bytes: taken.bytes,
        elapsed,
        cpu,
        open,
        first_batch,
        waits: taken.waits,
        peak_anon_bytes: taken.peak_anon_bytes,
        peak_resident_bytes: status_bytes("VmHWM:"),
        storage_bytes: storage_bytes().zip(storage_before).map(|(now, before)| now.saturating_sub(before)),
        decode: stats.decode_seconds.iter().sum(),
        fill: stats.fill_seconds.iter().sum(),
    }))
}

#[derive(Default)]
struct Amounts {
    tokens: u64,
    bytes: u64,
    waits: Vec<f32>,
    peak_anon_bytes: u64,
}

struct Measurement {
    taken: Amounts,
    began: Instant,
    sampled: Instant,
    limit: Option<Duration>,
    bar: ProgressBar,
    hold: Hold,
}

impl Measurement {
    /// Takes the batches of one epoch. Returns `false` if the time or Ctrl-C ended it early.
    fn pass(&mut self, loader: &Loader) -> forebay::Result<bool> {
        let batches = loader.iter();
        self.sample_memory();
        loop {
            let asked = Instant::now();
            let batch = loop {
                if self.hold.is_pending() {
                    return Ok(false);
                }
                match batches.next_or_help(SLICE)? {
                    Next::Batch(batch) => break batch,
                    Next::End => return Ok(true),
                    Next::Pending => {}
                }
            };
            self.taken.waits.push(asked.elapsed().as_secs_f32());
            self.taken.tokens += (batch.rows * batch.columns()) as u64;
            self.taken.bytes += batch.len_bytes() as u64;
            drop(batch);
            match self.limit {
                Some(limit) if self.began.elapsed() >= limit => return Ok(false),
                _ => {}
            }
            if self.sampled.elapsed() >= SAMPLE_EVERY {
                self.sample_memory();
            }
        }
    }

    fn sample_memory(&mut self) {
        self.taken.peak_anon_bytes = self.taken.peak_anon_bytes.max(status_bytes("RssAnon:"));
        self.sampled = Instant::now();
        self.bar.set_position(match self.limit {
            Some(_) => self.began.elapsed().as_millis() as u64,
            None => self.taken.waits.len() as u64,
        });
    }
}

/// Reads a field of this process's status, in bytes. Returns 0 if the system has none.
fn status_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kibibytes: Option<u64> = line.and_then(|line| line.trim().trim_end_matches("kB").trim_end().parse().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// Bytes that this process made the system read from storage, by reads and by touching mapped
/// files.
fn storage_bytes() -> Option<u64> {
    let counters = std::fs::read_to_string("/proc/self/io").ok()?;
    counters.lines().find_map(|line| line.strip_prefix("read_bytes:"))?.trim().parse().ok()
}

/// CPU time of all threads of this process, in seconds.
fn cpu_seconds() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `getrusage` writes one `rusage` to the pointer, which points to one. All of its
    // fields are integers, so that zeros are valid too.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

impl Measured {
    fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.elapsed
    }

    fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.elapsed
    }

    fn cpu_per_billion(&self) -> f64 {
        self.cpu / self.tokens as f64 * 1e9
    }

    /// The wait, in milliseconds, that a `share` of all waits does not exceed.
    fn wait_ms(&self, share: f64) -> f64 {
        let rank = (self.waits.len() as f64 * share).ceil() as usize;
        self.waits.get(rank.saturating_sub(1)).map_or(0.0, |wait| f64::from(*wait) * 1e3)
    }

    /// Whether all blocks stay in the cache once they are decoded. `None` if nothing is decoded.
    fn fits_cache(&self) -> Option<bool> {
        self.decoded.map(|(corpus, cache)| corpus <= cache)
    }

    /// Whether hardly any storage was read for these tokens. `None` if the system does not count
    /// it.
    fn files_in_memory(&self) -> Option<bool> {
        let share = (self.tokens as f64 / self.corpus_tokens.max(1) as f64).min(1.0);
        self.storage_bytes.map(|read| (read as f64) < 0.1 * share * self.corpus_bytes as f64)
    }

    fn settings(&self) -> Vec<(&'static str, String)> {
        let shown = ["seq_len", "batch_size", "shuffle", "num_threads", "prefetch_batches", "memory_budget", "io"];
        let shown = shown.iter().filter_map(|name| forebay::settings::find(name));
        shown.map(|setting| (setting.name, setting.text(&self.config))).collect()
    }

    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let settings: Vec<_> = self.settings().iter().map(|(name, value)| format!("{name}={value}")).collect();
        line(
            out,
            "corpus",
            &format!(
                "{}, {}, {}",
                number_of(self.shards, "shard"),
                number_of(self.corpus_tokens, "token"),
                self.format
            ),
        )?;
        line(out, "settings", &settings.join(" "))?;
        line(
            out,
            "taken",
            &format!(
                "{}, {}, {} in {:.2} s",
                number_of(self.batches, "batch"),
                number_of(self.tokens, "token"),
                number_of(self.epochs, "whole epoch"),
                self.elapsed
            ),
        )?;
        line(
            out,
            "throughput",
            &format!(
                "{} tokens/s, {:.1} MB/s delivered",
                grouped(self.tokens_per_second() as u64),
                self.megabytes_per_second()
            ),
        )?;
        if let Some(read) = self.storage_bytes {
            let rate = read as f64 / 1e6 / (self.open + self.elapsed);
            line(out, "storage", &format!("{rate:.1} MB/s, {} read that were not in memory already", bytes(read)))?;
        }
        if let Some((corpus, cache)) = self.decoded.filter(|_| self.fits_cache() == Some(true)) {
            let (corpus, cache) = (bytes(corpus), bytes(cache));
            let text =
                format!("the corpus decodes to {corpus} and fits the cache of {cache}: each block is decoded once");
            line(out, "cached", &format!("{text}, and later epochs measure memory alone"))?;
        }
        if self.files_in_memory() == Some(true) {
            line(out, "cached", "the system had the files in memory: storage was not measured")?;
        }
        line(out, "cpu", &format!("{:.2} s per 10^9 tokens", self.cpu_per_billion()))?;
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|share| self.wait_ms(share));
        line(out, "next()", &format!("p50 {p50:.3} ms, p99 {p99:.3} ms, p99.9 {p999:.3} ms"))?;
        line(out, "open", &format!("{:.3} s, then {:.3} s to the first batch", self.open, self.first_batch))?;
        line(
            out,
            "memory",
            &format!(
                "peak {} anonymous, {} resident with mapped files",
                bytes(self.peak_anon_bytes),
                bytes(self.peak_resident_bytes)
            ),
        )?;
        let both = self.decode + self.fill;
        if both > 0.0 {
            let [decode, fill] = [self.decode, self.fill].map(|time| time / both * 100.0);
            line(out, "work", &format!("{decode:.0} % decoding, {fill:.0} % filling batches"))?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let settings: serde_json::Map<_, _> =
            self.settings().into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "format": self.format,
            "shards": self.shards,
            "corpus_tokens": self.corpus_tokens,
            "settings": settings,
            "epochs": self.epochs,
            "batches": self.batches,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "elapsed_seconds": self.elapsed,
            "tokens_per_second": self.tokens_per_second(),
            "megabytes_per_second": self.megabytes_per_second(),
            "storage_read_bytes": self.storage_bytes,
            "cpu_seconds": self.cpu,
            "cpu_seconds_per_billion_tokens": self.cpu_per_billion(),
            "next_p50_ms": self.wait_ms(0.5),
            "next_p99_ms": self.wait_ms(0.99),
            "next_p999_ms": self.wait_ms(0.999),
            "open_seconds": self.open,
            "first_batch_seconds": self.first_batch,
            "peak_rss_anon_bytes": self.peak_anon_bytes,
            "peak_rss_bytes": self.peak_resident_bytes,
            "decode_seconds": self.decode,
            "fill_seconds": self.fill,
            "corpus_bytes": self.corpus_bytes,
            "decoded_corpus_bytes": self.decoded.map(|(corpus, _)| corpus),
            "cache_bytes": self.decoded.map(|(_, cache)| cache),
            "fits_cache": self.fits_cache(),
            "files_in_memory": self.files_in_memory(),
            "interrupted": self.interrupted,
        })
    }
}
