//! Chooses lanes, window, threads and memory for a number of ranks and CPUs.
//!
//! The choices follow from the same sums that opening checks and that warnings print. `lanes` and
//! `window_tokens` belong to the content, so that they are chosen before the first run.

use crate::loader::Loader;
use crate::loader::open::{LENGTHS_SHARE, drawn_tokens, windows_bytes};
use crate::settings::{Config, MOST_DEFAULT_THREADS, Shuffle};

/// Bytes to which `memory_budget` is rounded up.
const ROUND_BYTES: u64 = 1 << 20;

/// Settings for a run, and the numbers that they follow from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// Number of ranks of the run.
    pub ranks: u64,
    /// Number of ranks that share the CPUs of a node.
    pub ranks_per_node: u64,
    /// CPUs of a node.
    pub cpus: u64,
    /// Lanes and window. `None` if the order has no lanes.
    pub lanes: Option<LanesAdvice>,
    /// Advised `num_threads`.
    pub num_threads: u64,
    /// Advised `memory_budget`.
    pub memory_budget: u64,
    /// Number of batches that are in memory at once, and the bytes of each.
    pub batches: (u64, u64),
    /// Bytes of the largest block when decoded. 0 if nothing is decoded.
    pub block_bytes: u64,
    /// Bytes of the decoded blocks that a step may draw from.
    pub windows_bytes: u64,
    /// Whether document lengths take a part of the budget.
    pub holds_lengths: bool,
}

/// Advised lanes and window, and the numbers that they follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LanesAdvice {
    /// `lanes` and `window_tokens` as they are set.
    pub set: (u64, u64),
    /// Advised `lanes`.
    pub lanes: u64,
    /// Advised `window_tokens`.
    pub window_tokens: u64,
    /// Number of lanes that a rank draws from.
    pub of_rank: u64,
    /// Tokens that a rank draws from in each of its lanes.
    pub drawn_tokens: u64,
}

impl Loader {
    /// Chooses settings for the number of ranks of this loader, `ranks_per_node` of which share
    /// `cpus` CPUs. Costs nothing.
    ///
    /// # Panics
    /// Panics if `ranks_per_node` is 0.
    pub fn advise(&self, ranks_per_node: u64, cpus: u64) -> Advice {
        let session = &self.session;
        let (config, sources) = (&session.config, &session.opened.sources);
        let ranks = session.grouping.world_size;
        let num_threads = (cpus / ranks_per_node).saturating_sub(1).clamp(1, MOST_DEFAULT_THREADS);
        let mut advised = Config { num_threads: Some(num_threads), ..config.clone() };
        let lanes = (config.shuffle == Shuffle::Block).then(|| {
            // Each rank draws from lanes of its own, and the window of a lane stays as it is.
            advised.lanes = config.lanes.next_multiple_of(ranks);
            advised.window_tokens = (config.window_tokens / config.lanes).max(1).saturating_mul(advised.lanes);
            LanesAdvice {
                set: (config.lanes, config.window_tokens),
                lanes: advised.lanes,
                window_tokens: advised.window_tokens,
                of_rank: session.grouping.lanes(advised.lanes),
                drawn_tokens: drawn_tokens(&advised) / advised.lanes,
            }
        });
        let block_bytes = session.opened.largest_block_bytes;
        let windows_bytes = windows_bytes(&advised, sources, &session.grouping, block_bytes);
        let batches = (config.prefetch_batches + 1, session.batch_bytes as u64);
        let corpora = || sources.list().iter().map(|source| source.reader().corpus());
        let holds_lengths = !config.layout.joins() && corpora().any(|corpus| corpus.lengths_file().is_none());
        // A decoded block may take a quarter more memory than its values.
        let blocks = (num_threads * block_bytes).max(block_bytes) + windows_bytes;
        let needed = batches.0 * batches.1 + blocks + blocks.div_ceil(4);
        let needed = if holds_lengths { needed + needed.div_ceil(LENGTHS_SHARE - 1) } else { needed };
        Advice {
            ranks,
            ranks_per_node,
            cpus,
            lanes,
            num_threads,
            memory_budget: needed.max(1).next_multiple_of(ROUND_BYTES),
            batches,
            block_bytes,
            windows_bytes,
            holds_lengths,
        }
    }
}
