//! The statistics of loaders in the text format of OpenMetrics.

use std::fmt;
use std::sync::Arc;

use forebay::Loader;
use forebay::observe::stats::Stats;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::Start;

/// The statistics of `loaders` as text.
pub(super) fn text(loaders: &[(Arc<Loader>, Option<Start>)]) -> String {
    let mut registry = Registry::default();
    let all = loaders.iter().map(|(loader, _)| (loader.config().dp_rank.unwrap_or(0).to_string(), loader.stats()));
    registry.register_collector(Box::new(Ranks(all.collect())));
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

/// Rank and statistics of each loader.
#[derive(Debug)]
struct Ranks(Vec<(String, Stats)>);

/// Name without the suffix of its unit, meaning, unit, and value.
type Row = (&'static str, &'static str, Option<Unit>, fn(&Stats) -> f64);

const COUNTERS: [Row; 11] = [
    ("forebay_batches", "Batches delivered", None, |stats| stats.batches as f64),
    ("forebay_tokens", "Tokens delivered as inputs", None, |stats| stats.tokens as f64),
    ("forebay_delivered", "Bytes delivered", Some(Unit::Bytes), |stats| stats.bytes as f64),
    ("forebay_decode", "Time of decoding", Some(Unit::Seconds), |stats| stats.decode_seconds.iter().sum()),
    ("forebay_fill", "Time of writing rows", Some(Unit::Seconds), |stats| stats.fill_seconds.iter().sum()),
    ("forebay_decoded_blocks", "Blocks decoded", None, |stats| stats.decoded_blocks as f64),
    ("forebay_decoded", "Bytes of decoded blocks", Some(Unit::Bytes), |stats| stats.decoded_bytes as f64),
    ("forebay_found_blocks", "Reads that found their block", None, |stats| stats.found_blocks as f64),
    ("forebay_storage_requests", "Requests to stores", None, |stats| stats.storage.requests as f64),
    ("forebay_storage", "Bytes of answers of stores", Some(Unit::Bytes), |stats| stats.storage.bytes as f64),
    ("forebay_elapsed", "Time since the first request for a batch", Some(Unit::Seconds), |stats| stats.elapsed_seconds),
];

const GAUGES: [Row; 4] = [
    ("forebay_queue_depth", "Mean number of batches that were ready", None, |stats| stats.queue_depth_mean),
    ("forebay_cache", "Bytes of decoded blocks", Some(Unit::Bytes), |stats| stats.cache_bytes as f64),
    ("forebay_buffers", "Bytes of batches", Some(Unit::Bytes), |stats| stats.buffer_bytes as f64),
    ("forebay_padding_ratio", "Share of places without a token", None, |stats| stats.padding_share),
];

impl Collector for Ranks {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, unit, value) in &COUNTERS {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for (rank, stats) in &self.0 {
                let labels = [("rank", rank.as_str())];
                metric.encode_family(&labels)?.encode_counter::<NoLabelSet, f64, f64>(&value(stats), None)?;
            }
        }
        for (name, help, unit, value) in &GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            for (rank, stats) in &self.0 {
                metric.encode_family(&[("rank", rank.as_str())])?.encode_gauge(&value(stats))?;
            }
        }
        let help = "Time that a consumer waited for a batch";
        let mut metric =
            encoder.encode_descriptor("forebay_wait", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for (rank, stats) in &self.0 {
            let labels = [("rank", rank.as_str())];
            // Parsers ask for a last bucket without a bound.
            let bound = |bound: f64| if bound == f64::MAX { f64::INFINITY } else { bound };
            let buckets: Vec<(f64, u64)> =
                stats.wait_buckets.iter().map(|(most, count)| (bound(*most), *count)).collect();
            metric.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
                stats.wait_seconds,
                buckets.iter().map(|(_, count)| count).sum(),
                &buckets,
                None,
            )?;
        }
        let help = "Share of a source in the sequences of all sources";
        let mut metric = encoder.encode_descriptor("forebay_source_ratio", help, None, MetricType::Gauge)?;
        for (rank, stats) in &self.0 {
            for source in &stats.sources {
                let labels = [("rank", rank.as_str()), ("source", source.name.as_str())];
                metric.encode_family(&labels)?.encode_gauge(&source.share)?;
            }
        }
        Ok(())
    }
}
