//! The status of loaders as JSON, for the page and for `forebay top`.

use std::sync::Arc;

use forebay::Loader;
use serde_json::{Value, json};

use super::Start;

/// The status of `loaders`.
pub(super) fn of(loaders: &[(Arc<Loader>, Option<Start>)]) -> Value {
    let loaders: Vec<Value> = loaders.iter().map(|(loader, start)| one(loader, *start)).collect();
    json!({ "forebay": env!("CARGO_PKG_VERSION"), "process": std::process::id(), "loaders": loaders })
}

fn one(loader: &Loader, start: Option<Start>) -> Value {
    let (stats, config, state) = (loader.stats(), loader.config(), loader.state());
    let world_size = config.dp_world_size.unwrap_or(1);
    let global_batch = config.batch_size * world_size;
    let steps = Some(loader.len()).filter(|steps| *steps < u64::MAX);
    let (epoch, position) = match start {
        None => (state.epoch(), state.position()),
        // A stream has sent this much since it began.
        Some((epoch, index)) => (epoch, index + stats.batches * global_batch),
    };
    let done = position / global_batch;
    // The rate of this rank is the rate of all.
    let left = steps
        .filter(|_| stats.batches > 0)
        .map(|steps| steps.saturating_sub(done) as f64 * stats.elapsed_seconds / stats.batches as f64);
    let sources: Vec<Value> = stats
        .sources
        .iter()
        .map(|source| json!({ "name": source.name, "share": source.share, "epochs": source.epochs, "tokens": source.tokens }))
        .collect();
    json!({
        "data": config.mixture.as_ref().map_or_else(|| config.data.join(", "), |_| "a mixture".to_owned()),
        "service": config.service,
        "rank": config.dp_rank.unwrap_or(0),
        "world_size": world_size,
        "epoch": epoch,
        "position": position,
        "step": done,
        "steps": steps,
        "seconds_left": left,
        "batches": stats.batches,
        "tokens": stats.tokens,
        "tokens_per_second": stats.tokens_per_second,
        "elapsed_seconds": stats.elapsed_seconds,
        "wait_share": stats.wait_share,
        "wait_p50_seconds": stats.wait_p50_seconds,
        "wait_p99_seconds": stats.wait_p99_seconds,
        "queue_depth_mean": stats.queue_depth_mean,
        "cache_bytes": stats.cache_bytes,
        "buffer_bytes": stats.buffer_bytes,
        "verdict": stats.verdict(),
        "sources": sources,
    })
}
