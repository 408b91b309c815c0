//! Stats: what happened, counted without locks by the threads it happened on.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::utils::CachePadded;

use crate::format::DecodedPages;
use crate::sync::lock;

/// Waits kept for percentiles: the most recent ones.
const KEPT_WAITS: usize = 8192;
/// Waiting below this share of the time is the trainer's pace, not the loader's.
const TRAINER_BOUND_SHARE: f64 = 0.02;

/// Counters of a loader; every thread writes its own cache line.
#[derive(Debug)]
pub(crate) struct Counters {
    workers: Vec<CachePadded<Worker>>,
    consumer: Mutex<Consumer>,
}

/// Written by one worker, read by whoever asks; relaxed, because nothing else depends on them.
#[derive(Debug, Default)]
struct Worker {
    decode_nanos: AtomicU64,
    fill_nanos: AtomicU64,
}

#[derive(Debug)]
struct Consumer {
    since: Option<Instant>,
    batches: u64,
    tokens: u64,
    bytes: u64,
    waited: Duration,
    waits: Vec<f32>,
    depth_sum: u64,
}

/// What a source of a mixture has given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceStats {
    /// Its name.
    pub name: String,
    /// Sequences, to all ranks together, since the start of the run.
    pub sequences: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Epochs of the source, whole and begun ones.
    pub epochs: f64,
    /// Share of all sources' sequences.
    pub share: f64,
}

/// A snapshot; times are in seconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Sources of a mixture.
    pub sources: Vec<SourceStats>,
    /// Batches handed over.
    pub batches: u64,
    /// Tokens handed over as inputs.
    pub tokens: u64,
    /// Bytes handed over.
    pub bytes: u64,
    /// Time since the first request for a batch.
    pub elapsed_seconds: f64,
    /// Tokens per second of that time.
    pub tokens_per_second: f64,
    /// Bytes per second of that time.
    pub bytes_per_second: f64,
    /// Time consumers waited for batches, all together.
    pub wait_seconds: f64,
    /// That time as a share of the elapsed time.
    pub wait_share: f64,
    /// Median wait of the last 8192 requests.
    pub wait_p50_seconds: f64,
    /// 99th percentile of the same.
    pub wait_p99_seconds: f64,
    /// Batches that were ready when a consumer asked, on average.
    pub queue_depth_mean: f64,
    /// Time of each worker spent decoding blocks, or waiting for another worker to decode one; and last, of callers who helped.
    pub decode_seconds: Vec<f64>,
    /// Time of each worker spent writing rows; and last, of callers who helped.
    pub fill_seconds: Vec<f64>,
    /// Blocks decoded.
    pub decoded_blocks: u64,
    /// Bytes they decoded to.
    pub decoded_bytes: u64,
    /// Parquet pages by the decoder that took them.
    pub decoded_pages: DecodedPages,
    /// Bytes of decoded blocks held now.
    pub cache_bytes: u64,
    /// Bytes of batches held now: in flight, handed over, and kept for reuse.
    pub buffer_bytes: u64,
}

impl Counters {
    pub(crate) fn new(workers: usize) -> Self {
        let consumer = Consumer {
            since: None,
            batches: 0,
            tokens: 0,
            bytes: 0,
            waited: Duration::ZERO,
            waits: Vec::new(),
            depth_sum: 0,
        };
        // One more for the threads of callers who compute batches themselves.
        Self { workers: (0..=workers).map(|_| CachePadded::default()).collect(), consumer: Mutex::new(consumer) }
    }

    pub(crate) fn worked(&self, worker: usize, decode: Duration, fill: Duration) {
        let counters = &self.workers[worker];
        counters.decode_nanos.fetch_add(decode.as_nanos() as u64, Ordering::Relaxed);
        counters.fill_nanos.fetch_add(fill.as_nanos() as u64, Ordering::Relaxed);
    }

    /// A consumer that asked then got nothing until now.
    pub(crate) fn waited(&self, asked: Instant) {
        let mut consumer = lock(&self.consumer);
        consumer.since.get_or_insert(asked);
        consumer.waited += asked.elapsed();
    }

    /// A consumer that asked then got a batch now; of these, `depth` were ready when it asked.
    pub(crate) fn delivered(&self, tokens: u64, bytes: u64, asked: Instant, depth: usize) {
        let wait = asked.elapsed();
        let mut consumer = lock(&self.consumer);
        consumer.since.get_or_insert(asked);
        let slot = (consumer.batches as usize) % KEPT_WAITS;
        if slot < consumer.waits.len() {
            consumer.waits[slot] = wait.as_secs_f32();
        } else {
            consumer.waits.push(wait.as_secs_f32());
        }
        consumer.batches += 1;
        consumer.tokens += tokens;
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
            bytes: consumer.bytes,
            elapsed_seconds: elapsed,
            tokens_per_second: per(consumer.tokens as f64, elapsed),
            bytes_per_second: per(consumer.bytes as f64, elapsed),
            wait_seconds: consumer.waited.as_secs_f64(),
            wait_share: per(consumer.waited.as_secs_f64(), elapsed),
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
    /// Who waits for whom, in one line.
    pub fn verdict(&self) -> String {
        if self.batches == 0 {
            return "no batches yet".to_owned();
        }
        let share = self.wait_share * 100.0;
        if self.wait_share < TRAINER_BOUND_SHARE {
            return format!("trainer-bound: {share:.1} % of the time was spent waiting for data");
        }
        let (decode, fill): (f64, f64) = (self.decode_seconds.iter().sum(), self.fill_seconds.iter().sum());
        let (what, remedy) = if decode > fill {
            ("decoding", "more `num_threads`, a lighter codec, or uncompressed Arrow")
        } else {
            ("filling", "more `num_threads`; where files are not in memory, faster storage")
        };
        format!("loader-bound: {what} ({share:.1} % of the time was spent waiting for data; try {remedy})")
    }
}
