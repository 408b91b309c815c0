//! Stats: counts batches, tokens, bytes and times, and shows them as a snapshot.
//!
//! Workers count into atomics of their own, without locks. Consumers count under one mutex, once
//! per batch. A snapshot reads both at any time and may miss the most recent events. It leaves the
//! fields of the cache, the buffers and the mixture at zero; the loader fills these in.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::utils::CachePadded;

use crate::format::DecodedPages;
use crate::layout::Lost;
use crate::storage::Traffic;
use crate::sync::lock;

/// Number of waits kept for the percentiles: the most recent ones.
const KEPT_WAITS: usize = 8192;
/// Upper bounds of the classes of waits, in seconds. A last class has no bound.
const WAIT_BOUNDS: [f64; 11] = [1e-5, 4e-5, 1.6e-4, 6.4e-4, 2.5e-3, 1e-2, 4e-2, 0.16, 0.64, 2.5, 10.0];
/// Below this share of the time, waiting is due to the trainer's pace and not to the loader.
const TRAINER_BOUND_SHARE: f64 = 0.02;

/// Counters of a loader. Each worker writes to its own cache line.
#[derive(Debug)]
pub(crate) struct Counters {
    workers: Vec<CachePadded<WorkerCounters>>,
    consumer: Mutex<ConsumerCounters>,
}

/// Counters of one worker. The worker adds, and any thread that takes a snapshot reads. The
/// accesses are relaxed, because no other data depends on them.
#[derive(Debug, Default)]
struct WorkerCounters {
    decode_nanos: AtomicU64,
    fill_nanos: AtomicU64,
}

#[derive(Debug)]
struct ConsumerCounters {
    since: Option<Instant>,
    batches: u64,
    tokens: u64,
    places: u64,
    bytes: u64,
    waited: Duration,
    waits: Vec<f32>,
    /// Number of waits in each class of [`WAIT_BOUNDS`].
    wait_classes: [u64; WAIT_BOUNDS.len() + 1],
    depth_sum: u64,
}

/// Statistics of one source of a mixture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceStats {
    /// Name of the source.
    pub name: String,
    /// Sequences delivered to all ranks together since the start of the run.
    pub sequences: u64,
    /// Tokens of these sequences.
    pub tokens: u64,
    /// Epochs of the source, complete and begun ones.
    pub epochs: f64,
    /// Share of this source in the sequences of all sources.
    pub share: f64,
}

/// A snapshot of what a loader has done. Times are in seconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Statistics of each source of a mixture.
    pub sources: Vec<SourceStats>,
    /// Batches delivered.
    pub batches: u64,
    /// Tokens delivered as inputs.
    pub tokens: u64,
    /// Places without a token, as a share of all delivered places. Joined documents leave none.
    pub padding_share: f64,
    /// Tokens of documents that are longer than a row, and that no row of an epoch holds.
    pub lost: Lost,
    /// Rows delivered in the place of rows that cannot be read, with `on_error` = substitute.
    pub substituted_rows: u64,
    /// Bytes delivered.
    pub bytes: u64,
    /// Time since the first request for a batch.
    pub elapsed_seconds: f64,
    /// Tokens per second of the elapsed time.
    pub tokens_per_second: f64,
    /// Bytes per second of the elapsed time.
    pub bytes_per_second: f64,
    /// Time that all consumers together waited for batches.
    pub wait_seconds: f64,
    /// Waiting time as a share of the elapsed time.
    pub wait_share: f64,
    /// Upper bounds of waits in seconds, each with the number of requests that waited up to it and
    /// longer than the bound before.
    pub wait_buckets: Vec<(f64, u64)>,
    /// Median wait of the last 8192 requests.
    pub wait_p50_seconds: f64,
    /// 99th percentile of the waits of the last 8192 requests.
    pub wait_p99_seconds: f64,
    /// Mean number of batches that were ready when a consumer asked.
    pub queue_depth_mean: f64,
    /// Time that each worker spent decoding blocks or waiting for another worker to decode one. The
    /// last entry counts consumers that computed batches themselves.
    pub decode_seconds: Vec<f64>,
    /// Time that each worker spent writing rows. The last entry counts consumers that computed
    /// batches themselves.
    pub fill_seconds: Vec<f64>,
    /// Blocks decoded.
    pub decoded_blocks: u64,
    /// Bytes of these blocks after decoding.
    pub decoded_bytes: u64,
    /// Reads of rows that found their block, so that they decoded nothing.
    pub found_blocks: u64,
    /// Parquet pages, by the decoder that read them.
    pub decoded_pages: DecodedPages,
    /// Bytes of decoded blocks in the cache now.
    pub cache_bytes: u64,
    /// Bytes of batches held now: in flight, held by consumers, and kept for reuse.
    pub buffer_bytes: u64,
    /// Requests that this process sent to stores and web servers.
    pub storage: Traffic,
    /// Whether a service computes the batches.
    pub is_served: bool,
}

impl Counters {
    pub(crate) fn new(workers: usize) -> Self {
        let consumer = ConsumerCounters {
            since: None,
            batches: 0,
            tokens: 0,
            places: 0,
            bytes: 0,
            waited: Duration::ZERO,
            waits: Vec::new(),
            wait_classes: [0; WAIT_BOUNDS.len() + 1],
            depth_sum: 0,
        };
        // The additional counters are for consumers that compute batches themselves.
        Self { workers: (0..=workers).map(|_| CachePadded::default()).collect(), consumer: Mutex::new(consumer) }
    }

    pub(crate) fn worked(&self, worker: usize, decode: Duration, fill: Duration) {
        let counters = &self.workers[worker];
        counters.decode_nanos.fetch_add(decode.as_nanos() as u64, Ordering::Relaxed);
        counters.fill_nanos.fetch_add(fill.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Counts a consumer's wait that began at `asked` and ends now without a batch.
    pub(crate) fn waited(&self, asked: Instant) {
        let mut consumer = lock(&self.consumer);
        consumer.since.get_or_insert(asked);
        consumer.waited += asked.elapsed();
    }

    /// Counts a batch of `tokens` in `places` that a consumer requested at `asked` and receives
    /// now. `depth` batches were ready at the request.
    pub(crate) fn delivered(&self, tokens: u64, places: u64, bytes: u64, asked: Instant, depth: usize) {
        let wait = asked.elapsed();
        let mut consumer = lock(&self.consumer);
        consumer.since.get_or_insert(asked);
        let slot = (consumer.batches as usize) % KEPT_WAITS;
        if slot < consumer.waits.len() {
            consumer.waits[slot] = wait.as_secs_f32();
        } else {
            consumer.waits.push(wait.as_secs_f32());
        }
        let seconds = wait.as_secs_f64();
        let class = WAIT_BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(WAIT_BOUNDS.len());
        consumer.wait_classes[class] += 1;
        consumer.batches += 1;
        consumer.tokens += tokens;
        consumer.places += places;
        consumer.bytes += bytes;
        consumer.waited += wait;
        consumer.depth_sum += depth as u64;
    }

    pub(crate) fn snapshot(&self) -> Stats {
        let consumer = lock(&self.consumer);
        let elapsed = consumer.since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let mut waits = consumer.waits.clone();
        waits.sort_unstable_by(f32::total_cmp);
        let percentile = |share: f64| {
            let index = ((waits.len() as f64 * share) as usize).min(waits.len().saturating_sub(1));
            waits.get(index).map_or(0.0, |wait| f64::from(*wait))
        };
        let per = |amount: f64, of: f64| if of > 0.0 { amount / of } else { 0.0 };
        let seconds = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64 / 1e9;
        Stats {
            batches: consumer.batches,
            tokens: consumer.tokens,
            padding_share: per(consumer.places.saturating_sub(consumer.tokens) as f64, consumer.places as f64),
            bytes: consumer.bytes,
            elapsed_seconds: elapsed,
            tokens_per_second: per(consumer.tokens as f64, elapsed),
            bytes_per_second: per(consumer.bytes as f64, elapsed),
            wait_seconds: consumer.waited.as_secs_f64(),
            wait_share: per(consumer.waited.as_secs_f64(), elapsed),
            wait_buckets: WAIT_BOUNDS.into_iter().chain([f64::MAX]).zip(consumer.wait_classes).collect(),
            wait_p50_seconds: percentile(0.50),
            wait_p99_seconds: percentile(0.99),
            queue_depth_mean: per(consumer.depth_sum as f64, consumer.batches as f64),
            decode_seconds: self.workers.iter().map(|worker| seconds(&worker.decode_nanos)).collect(),
            fill_seconds: self.workers.iter().map(|worker| seconds(&worker.fill_nanos)).collect(),
            ..Stats::default()
        }
    }
}

impl Stats {
    /// Tells in one line whether the trainer or the loader is the bottleneck, and by which
    /// threshold.
    pub fn verdict(&self) -> String {
        let (decode, fill): (f64, f64) = (self.decode_seconds.iter().sum(), self.fill_seconds.iter().sum());
        let (what, remedy) = if self.is_served {
            ("the service", "more CPUs or `num_threads` for the service, or another one beside it")
        } else if decode > fill {
            ("decoding", "more `num_threads`, a lighter codec, or uncompressed Arrow")
        } else {
            ("filling", "more `num_threads`; where files are not in memory, faster storage")
        };
        verdict_of(self.batches, self.wait_share, what, remedy)
    }
}

/// The verdict on a loader that handed over `batches`, whose consumers waited for `wait_share` of
/// the time. If they waited too long, they waited for `what`, and `remedy` may help.
pub fn verdict_of(batches: u64, wait_share: f64, what: &str, remedy: &str) -> String {
    if batches == 0 {
        return "no batches yet".to_owned();
    }
    let (share, limit) = (wait_share * 100.0, TRAINER_BOUND_SHARE * 100.0);
    if wait_share < TRAINER_BOUND_SHARE {
        return format!("trainer-bound: {share:.1} % of the time was spent waiting for data, less than {limit} %");
    }
    format!(
        "loader-bound: {what} ({share:.1} % of the time was spent waiting for data, {limit} % or more; try {remedy})"
    )
}
