//! `forebay bench`: takes batches as fast as they come, and says what that cost.
//!
//! Nothing is done with a batch, so the numbers are those of the loader alone: the most that a trainer on this machine could get.

use std::io::Write;
use std::time::{Duration, Instant};

use forebay::loader::Next;
use forebay::{Config, Error, Loader};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::report::{bytes, grouped, line, number_of};
use crate::{Context, Failure, Sets, Shape, progress};

/// Time to run where neither time nor epochs are given.
const DEFAULT_SECONDS: f64 = 10.0;
/// Memory is looked at this often; a look takes some 20 µs.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);
const TEMPLATE: &str = "{msg} {wide_bar} {percent}%";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Files, folders and glob patterns
    paths: Vec<String>,
    #[command(flatten)]
    shape: Shape,
    /// Worker threads
    #[arg(long, value_name = "N")]
    threads: Option<String>,
    /// Time to run; 10 where `--epochs` is not given either
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
    let mut config = options.sets.resolve(&options.paths, &flags, context)?.config;
    // No one trains on these batches: they belong in no delivery log.
    config.delivery_log = None;
    let limit = match (options.seconds, options.epochs) {
        (None, None) => Some(DEFAULT_SECONDS),
        (seconds, _) => seconds,
    };
    let measured = measure(config, limit.map(Duration::from_secs_f64), options.epochs, context)?;
    if options.json {
        writeln!(context.out, "{}", measured.json())?;
    } else {
        measured.write(context.out)?;
    }
    Ok(0)
}

/// What a run came to. Times without a unit in their name are in seconds.
struct Measured {
    config: Config,
    format: &'static str,
    shards: u64,
    corpus_tokens: u64,
    epochs: u64,
    batches: u64,
    tokens: u64,
    bytes: u64,
    elapsed: f64,
    cpu: f64,
    open: f64,
    first_batch: f64,
    /// Sorted.
    waits: Vec<f32>,
    peak_anon_bytes: u64,
    peak_resident_bytes: u64,
    /// Read from storage, opening included; little where the system has the files in memory. `None` where the system does not count it.
    storage_bytes: Option<u64>,
    verdict: String,
}

fn measure(
    config: Config,
    limit: Option<Duration>,
    epochs: Option<u64>,
    context: &Context<'_>,
) -> Result<Measured, Failure> {
    let storage_before = storage_bytes();
    let opening = Instant::now();
    let loader = Loader::open(config)?;
    let open = opening.elapsed().as_secs_f64();
    if loader.is_empty() {
        let config = loader.config();
        return Err(Error::config(format!(
            "an epoch has no batch: {} sequences of {} tokens do not fill one global batch of {} rows on {} ranks; set a smaller \
             `batch_size` or `seq_len`, or another `remainder`",
            loader.num_sequences(),
            config.seq_len,
            config.batch_size,
            config.dp_world_size.unwrap_or(1)
        ))
        .into());
    }
    let total = match (limit, epochs) {
        (Some(limit), _) => limit.as_millis() as u64,
        (None, epochs) => loader.len() * epochs.unwrap_or(1),
    };
    let bar = progress::bar(total, TEMPLATE, context.env)?.with_message("running");
    let mut run = Run { taken: Taken::default(), began: Instant::now(), sampled: Instant::now(), limit, bar };
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

    let mut taken = run.taken;
    let first_batch = taken.waits.first().map_or(0.0, |wait| f64::from(*wait));
    taken.waits.sort_unstable_by(f32::total_cmp);
    let corpus = loader.corpus();
    Ok(Measured {
        config: loader.config().clone(),
        format: corpus.facts().next().map_or("-", |facts| facts.format.name()),
        shards: corpus.len() as u64,
        corpus_tokens: corpus.tokens(),
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
        verdict: stats.verdict(),
    })
}

#[derive(Default)]
struct Taken {
    tokens: u64,
    bytes: u64,
    waits: Vec<f32>,
    peak_anon_bytes: u64,
}

struct Run {
    taken: Taken,
    began: Instant,
    sampled: Instant,
    limit: Option<Duration>,
    bar: ProgressBar,
}

impl Run {
    /// Takes the batches of one epoch; `false` where the time ran out before its end.
    fn pass(&mut self, loader: &Loader) -> forebay::Result<bool> {
        let batches = loader.iter();
        let seq_len = loader.config().seq_len;
        self.sample_memory();
        loop {
            let asked = Instant::now();
            let batch = loop {
                match batches.next_or_help(Duration::from_secs(1))? {
                    Next::Batch(batch) => break batch,
                    Next::End => return Ok(true),
                    Next::Pending => {}
                }
            };
            self.taken.waits.push(asked.elapsed().as_secs_f32());
            self.taken.tokens += batch.rows as u64 * seq_len;
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

/// A field of this process's status; 0 where the system has none.
fn status_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kibibytes: Option<u64> = line.and_then(|line| line.trim().trim_end_matches("kB").trim_end().parse().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// What this process made the system read from storage so far, by reads and by touching mapped files.
fn storage_bytes() -> Option<u64> {
    let counters = std::fs::read_to_string("/proc/self/io").ok()?;
    counters.lines().find_map(|line| line.strip_prefix("read_bytes:"))?.trim().parse().ok()
}

/// CPU time of all threads of this process.
fn cpu_seconds() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `getrusage` writes one `rusage` to the pointer, which points to one; all of its fields are integers, so zeros are valid too.
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

    /// The wait that a share of all waits does not exceed, in milliseconds.
    fn wait_ms(&self, share: f64) -> f64 {
        let rank = (self.waits.len() as f64 * share).ceil() as usize;
        self.waits.get(rank.saturating_sub(1)).map_or(0.0, |wait| f64::from(*wait) * 1e3)
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
            &format!("{}, {} tokens, {}", number_of(self.shards, "shard"), grouped(self.corpus_tokens), self.format),
        )?;
        line(out, "settings", &settings.join(" "))?;
        line(
            out,
            "taken",
            &format!(
                "{} batches, {} tokens, {} whole epochs in {:.2} s",
                grouped(self.batches),
                grouped(self.tokens),
                self.epochs,
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
        line(out, "verdict", &self.verdict)
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
            "verdict": self.verdict,
        })
    }
}
