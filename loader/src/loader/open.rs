//! What opening a loader decides: its corpora, the room for decoded blocks, and what its states belong to.

use std::path::Path;

use crate::corpus::Corpus;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Access, OpenOptions};
use crate::loader::state::StateValue;
use crate::order;
use crate::order::partition::Grouping;
use crate::settings::{Config, Shuffle, Split, Targets};

/// Opens the corpora of `config`, side by side; all faults of all of them are reported.
pub(super) fn open_corpora(config: &Config, threads: u64) -> Result<Vec<(String, Corpus)>> {
    let options = OpenOptions::of(config);
    let cache = config.cache_dir.as_deref().map(Path::new);
    let wanted = config.corpora()?;
    // Scoped, so that its threads have ended when opening has.
    let opened: Vec<(String, Result<Corpus>)> = rayon::ThreadPoolBuilder::new()
        .num_threads(threads as usize)
        .thread_name(|index| format!("forebay-open-{index}"))
        .build_scoped(
            |thread| thread.run(),
            |pool| {
                let open = |(name, data): (String, Vec<String>)| {
                    (name, Corpus::open(&data, config.format, &options, cache, pool))
                };
                wanted.into_iter().map(open).collect()
            },
        )
        .map_err(|error| Error::new(ErrorKind::Io, "cannot start threads for opening shards").with_source(error))?;
    let mut faults = Vec::new();
    let mut corpora = Vec::new();
    for (name, corpus) in opened {
        match corpus {
            Ok(corpus) => corpora.push((name, corpus)),
            Err(error) => faults.push(error),
        }
    }
    match faults.len() {
        0 => Ok(corpora),
        1 => Err(faults.remove(0)),
        _ => Err(Error::all(faults)),
    }
}

/// Bytes for the block cache: the budget less batches in flight and the blocks that workers hold while they fill from them.
pub(super) fn cache_budget(config: &Config, largest: u64, threads: u64, batches: u64) -> Result<u64> {
    let held = threads.saturating_mul(largest);
    let needed = batches.saturating_add(held).saturating_add(largest);
    config.memory_budget.checked_sub(batches.saturating_add(held)).filter(|cache| *cache >= largest).ok_or_else(|| {
        Error::config(format!(
            "`memory_budget` of {} bytes is too small: {batches} bytes for {} batches in flight, and {} blocks of up to {largest} bytes for \
             {threads} threads and the cache, are {needed} bytes; raise it, or lower `batch_size`, `prefetch_batches` or `num_threads`",
            config.memory_budget,
            config.prefetch_batches + 1,
            threads + 1,
        ))
    })
}

/// Bytes of the decoded blocks that a step may draw from.
pub(super) fn windows_bytes(config: &Config, corpora: &[(String, Corpus)], grouping: &Grouping, largest: u64) -> u64 {
    let of_corpus = |corpus: &Corpus| {
        let total = corpus.decoded_bytes();
        match config.shuffle {
            _ if corpus.access() == Access::Random => 0,
            Shuffle::Off | Shuffle::On => 0,
            Shuffle::Global => total,
            // Each lane of this rank draws from its window, and from the blocks at both ends of it.
            Shuffle::Block => {
                let bytes_per_token = total.div_ceil(corpus.tokens().max(1));
                let lanes = grouping.lanes(config.lanes);
                let window = config.window_tokens / config.lanes * lanes;
                window.saturating_mul(bytes_per_token).saturating_add(lanes * 2 * largest).min(total)
            }
        }
    };
    corpora.iter().map(|(_, corpus)| of_corpus(corpus)).sum()
}

/// Says so where the cache cannot hold the blocks that a step may draw from, so that they are decoded again and again.
pub(super) fn window_warning(windows: u64, cache_bytes: u64) -> Option<String> {
    (windows > cache_bytes).then(|| {
        format!(
            "blocks will be decoded several times: shuffling draws from about {} MiB of them and `memory_budget` leaves {} MiB; raise it, or lower \
             `window_tokens` or `lanes`",
            windows >> 20,
            cache_bytes >> 20
        )
    })
}

/// What every state of these settings belongs to. Settings that do not take part in an order are not compared, so they read 0.
pub(super) fn content_of(config: &Config) -> Vec<(&'static str, StateValue)> {
    let special = |id: Option<u32>| id.map_or(StateValue::from("none"), |id| u64::from(id).into());
    let lanes = config.shuffle == Shuffle::Block || config.mixture.is_some();
    let where_in = |used: bool, value: u64| StateValue::from(if used { value } else { 0 });
    vec![
        ("order", order::VERSION.into()),
        ("layout", "concat".into()),
        ("seq_len", config.seq_len.into()),
        ("targets", if config.targets == Targets::Shifted { "shifted" } else { "labels" }.into()),
        ("bos_id", special(config.bos_id)),
        ("eos_id", special(config.eos_id)),
        (
            "shuffle",
            match config.shuffle {
                Shuffle::Off | Shuffle::On => "off",
                Shuffle::Global => "global",
                Shuffle::Block => "block",
            }
            .into(),
        ),
        ("seed", config.seed.into()),
        ("chunk_tokens", where_in(config.shuffle == Shuffle::Block, config.chunk_tokens)),
        ("window_tokens", where_in(config.shuffle == Shuffle::Block, config.window_tokens)),
        ("lanes", where_in(lanes, config.lanes)),
        ("holdout", config.holdout.unwrap_or(0).into()),
        ("split", if config.split == Split::Holdout { "holdout" } else { "train" }.into()),
    ]
}

/// A text that a state can hold: long ones by their digest.
pub(super) fn short(text: String) -> String {
    if text.len() <= 120 { text } else { format!("xxh3:{:032x}", xxhash_rust::xxh3::xxh3_128(text.as_bytes())) }
}
