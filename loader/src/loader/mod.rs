//! Loader: opens a corpus, hands out batches in order, saves and restores the position.
//!
//! A batch is computed from its position alone (`Core::compute`, in `compute.rs`), by whichever thread takes its number; iteration, `batch_at` and
//! `sequences_at` share that one function.

mod audit;
mod batch;
mod compute;
mod open;
mod pass;
pub mod plan;
pub(crate) mod sources;
pub mod state;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

pub use audit::Sample;
use batch::BatchLayout;
pub use batch::{Batch, Field, IGNORED_LABEL};
use open::{cache_budget, content_of, open_corpora, short, window_warning, windows_bytes};
use pass::Run;
pub use pass::{Batches, Next};

use crate::buffer::Source as Memory;
use crate::buffer::pool::Pool;
use crate::corpus::Corpus;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Access;
use crate::layout::concat::{Concat, Specials};
use crate::loader::sources::{Growth, Orders, Place, Source, Sources};
use crate::loader::state::{State, StateValue, refused};
use crate::observe::stats::{Counters, SourceStats, Stats};
use crate::observe::trace::Trace;
use crate::order::epochs::{self, ENDLESS, EpochChain};
use crate::order::partition::{BatchRow, Grouping};
use crate::pipeline::affinity::Placement;
use crate::read::{BlockCache, Reader};
use crate::settings;
use crate::settings::environment;
use crate::settings::{Config, Epochs, Remainder, Shuffle};
use crate::sync::{ForkGuard, lock};

/// Epochs that can be named; numbers beyond are mistakes.
pub const MAX_EPOCH: u64 = 1 << 32;
/// Windows read ahead of their use where files are not in memory, from the first batch on.
const FIRST_AHEAD: u64 = 64;
/// As many as keep a disk's queue full, later on and where they are small.
const WINDOWS_AHEAD: u64 = 256;
/// Tokens of windows that are small enough for that, together.
const TOKENS_AHEAD: u64 = 8 << 20;

/// A loader over one corpus. All methods may be called from any thread.
#[derive(Debug)]
pub struct Loader {
    core: Arc<Core>,
    /// Runs that have not ended, so that `close` reaches them.
    runs: Mutex<Vec<std::sync::Weak<Run>>>,
}

#[derive(Debug)]
struct Core {
    config: Config,
    sources: Sources,
    cache: Arc<BlockCache>,
    grouping: Grouping,
    /// What a state belongs to, but for what depends on the position.
    content: Vec<(&'static str, StateValue)>,
    warnings: Vec<String>,
    pool: Arc<dyn Memory>,
    /// Of a batch that is neither short nor padded.
    layout: BatchLayout,
    /// Bytes of every batch's memory.
    batch_bytes: usize,
    counters: Counters,
    cursor: Mutex<Cursor>,
    next_run: AtomicU64,
    /// Whether windows were found out of memory lately, so that all are read ahead. Written and read by workers; a stale value costs little.
    cold: AtomicBool,
    /// Whether batches are hashed. Written by callers, read by workers; a batch that is begun before may have none.
    covers: AtomicBool,
    /// Where spans go, if `FOREBAY_TRACE` names a file.
    trace: Option<Arc<Trace>>,
    placement: Placement,
    home: ForkGuard,
}

/// Where the loader stands.
#[derive(Clone, Debug)]
struct Cursor {
    growth: Growth,
    epoch: u64,
    position: u64,
    /// Whether the next pass continues here; else it begins the epoch after this one.
    continues: bool,
    /// Whether that epoch was asked for by name, so that its pass is empty where nothing of it is left.
    named: bool,
    /// The pass whose progress this is.
    run: u64,
}

impl Cursor {
    /// Of a loader of which nothing was asked yet, whose corpus has so many shards.
    fn new(shards: u64) -> Self {
        Self { growth: Growth::none(shards), epoch: 0, position: 0, continues: true, named: false, run: u64::MAX }
    }

    /// Sends the next pass elsewhere.
    fn go(&mut self, epoch: u64, position: u64, named: bool) {
        *self = Self { growth: self.growth.clone(), epoch, position, continues: true, named, run: u64::MAX };
    }
}

/// A row of a batch.
#[derive(Clone, Copy, Debug)]
enum Slot {
    Position {
        epoch: u64,
        position: u64,
        /// Whether it was delivered before, and only fills the last batch.
        repeated: bool,
    },
    Padding,
}

impl Loader {
    /// Opens and indexes the corpus; every fault that opening can see is reported together.
    pub fn open(config: Config) -> Result<Self> {
        Self::open_with(config, |bytes, idle| Arc::new(Pool::new(bytes, idle)))
    }

    /// As [`Loader::open`], with batches in memory from `source`, made for buffers of so many bytes, of which so many may lie idle.
    pub fn open_with(config: Config, source: impl FnOnce(usize, usize) -> Arc<dyn Memory>) -> Result<Self> {
        Ok(Self { core: Arc::new(Core::open(config, source)?), runs: Mutex::default() })
    }

    /// Settings in force, with rank, world size, threads and the kind of shuffling filled in.
    pub fn config(&self) -> &Config {
        &self.core.config
    }

    /// The opened corpus; of a mixture, its first.
    pub fn corpus(&self) -> &Corpus {
        self.core.sources.list()[0].reader.corpus()
    }

    /// Every opened corpus with its name; one without a name where there is no mixture.
    pub fn corpora(&self) -> impl Iterator<Item = (&str, &Corpus)> {
        self.core.sources.list().iter().map(|source| (source.name.as_str(), source.reader.corpus()))
    }

    /// Batches this rank gets in a pass, the same on every rank; `u64::MAX` where it has no end.
    ///
    /// Counted for the pass that the present epoch belongs to: others differ where positions are skipped or the corpus grew.
    pub fn len(&self) -> u64 {
        let cursor = lock(&self.core.cursor).clone();
        self.core.steps_from(0, &self.core.epoch_chain(&cursor.growth, cursor.epoch))
    }

    /// Whether a pass has no batch.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Full sequences of the present epoch, over all ranks; `u64::MAX` where it has no end.
    pub fn num_sequences(&self) -> u64 {
        let cursor = lock(&self.core.cursor).clone();
        Some(self.core.sources.full_rows(&cursor.growth, cursor.epoch))
            .filter(|rows| *rows < ENDLESS)
            .unwrap_or(u64::MAX)
    }

    /// Tokens of the present epoch, specials included, whether delivered or in the remainder; `u64::MAX` where it has no end.
    pub fn num_tokens(&self) -> u64 {
        let cursor = lock(&self.core.cursor).clone();
        Some(self.core.sources.tokens(&cursor.growth, cursor.epoch))
            .filter(|tokens| *tokens < ENDLESS)
            .unwrap_or(u64::MAX)
    }

    /// Tokens of the present epoch that the remainder rule leaves out, over all ranks, where passes are of one epoch.
    pub fn dropped_tokens(&self) -> u64 {
        let core = &self.core;
        let cursor = lock(&core.cursor).clone();
        let epochs = core.epoch_chain(&cursor.growth, cursor.epoch);
        let (Remainder::Drop, Some(end)) = (core.grouping.remainder, epochs.len()) else { return 0 };
        let delivered = core.grouping.steps(end) * core.grouping.global_batch();
        let tail = core.sources.tokens(&cursor.growth, cursor.epoch)
            - core.sources.full_rows(&cursor.growth, cursor.epoch) * core.config.seq_len;
        (end - delivered) * core.config.seq_len + tail
    }

    /// A new pass. It continues a restored position, or begins the first epoch, or the epoch after the last one begun; that is decided
    /// at its first request for a batch, and before that a pass has no effect.
    pub fn iter(&self) -> Batches {
        self.batches(false)
    }

    /// As [`Loader::iter`], with each batch in a buffer that the caller submits ([`Batches::submit`]).
    pub fn iter_external(&self) -> Batches {
        self.batches(true)
    }

    fn batches(&self, external: bool) -> Batches {
        let id = self.core.next_run.fetch_add(1, Ordering::Relaxed);
        let run = Arc::new(Run {
            core: Arc::clone(&self.core),
            id,
            external,
            started: OnceLock::new(),
            submitted: Mutex::default(),
        });
        let mut runs = lock(&self.runs);
        runs.retain(|run| run.strong_count() > 0);
        runs.push(Arc::downgrade(&run));
        Batches { run }
    }

    /// The next pass begins `epoch` at its start, or continues it if a position of that epoch was restored and not continued yet; where that was
    /// its end, the pass is empty.
    pub fn set_epoch(&self, epoch: u64) {
        let mut cursor = lock(&self.core.cursor);
        if cursor.continues && cursor.epoch == epoch {
            cursor.named = true;
        } else {
            cursor.go(epoch, 0, true);
        }
    }

    /// The next pass begins at `position` of `epoch`, or at the first one after it that is not skipped.
    pub fn seek(&self, epoch: u64, position: u64) -> Result<()> {
        let mut cursor = lock(&self.core.cursor);
        let positions = self.core.positions(&cursor.growth, epoch);
        if position > positions {
            return Err(Error::config(format!(
                "position {position} of epoch {epoch} is sought, which has {positions}"
            )));
        }
        cursor.go(epoch, position, true);
        Ok(())
    }

    /// The epoch of the newest pass, or of the next one if that was set or restored.
    pub fn epoch(&self) -> u64 {
        lock(&self.core.cursor).epoch
    }

    /// The position after the batches handed to the caller by the newest pass.
    pub fn state(&self) -> State {
        let cursor = lock(&self.core.cursor).clone();
        let content = self.core.content(&cursor.growth, cursor.epoch, cursor.position);
        State::new(cursor.epoch, cursor.position, &content)
    }

    /// The next pass continues from `state`. Refused, naming both values, where it belongs to another corpus or other content settings.
    pub fn load_state(&self, state: &State) -> Result<()> {
        let core = &self.core;
        let (epoch, position) = (state.epoch(), state.position());
        if epoch > MAX_EPOCH {
            return Err(refused(format!("state is damaged: epoch {epoch} is past {MAX_EPOCH}")));
        }
        let (saved, growth) = core.growth(state)?;
        state.check(&core.content(&saved, epoch, position))?;
        // A run that ended its epochs with another remainder rule may have delivered the tail as well.
        let most = core.sources.full_rows(&saved, epoch) + 1;
        if position > most {
            let text = format!("state is damaged: position {position} is past the {most} of epoch {epoch}");
            return Err(refused(text));
        }
        let mut cursor = lock(&core.cursor);
        *cursor = Cursor { growth, ..Cursor::new(0) };
        cursor.go(epoch, position, false);
        Ok(())
    }

    /// Rows at positions `position..position + n` of `epoch`, over all ranks, as one batch. Skipped positions have theirs, too.
    pub fn sequences_at(&self, epoch: u64, position: u64, n: u64) -> Result<Arc<Batch>> {
        let core = &self.core;
        core.check_process()?;
        let growth = lock(&core.cursor).growth.clone();
        let positions = core.positions(&growth, epoch);
        if n == 0 || position.checked_add(n).is_none_or(|end| end > positions) {
            return Err(Error::config(format!(
                "positions {position}..{} are asked for, an epoch has 0..{positions}",
                position.saturating_add(n)
            )));
        }
        core.check_epoch(epoch)?;
        let bytes = n.saturating_mul(core.config.row_tokens() * 16);
        if bytes > core.config.memory_budget {
            return Err(Error::config(format!(
                "{n} rows at once take {bytes} bytes, more than the {} of `memory_budget`: ask for fewer",
                core.config.memory_budget
            )));
        }
        let slot = |position| Slot::Position { epoch, position, repeated: false };
        let slots: Vec<Slot> = (position..position + n).map(slot).collect();
        core.compute_alone(&growth, (epoch, position), position / core.grouping.global_batch(), &slots)
    }

    /// What rank `rank` of `world_size` gets at `step` of the pass that begins with `epoch`, under this loader's batch size and remainder rule.
    pub fn batch_at(&self, epoch: u64, step: u64, rank: u64, world_size: u64) -> Result<Arc<Batch>> {
        let core = &self.core;
        core.check_process()?;
        if rank >= world_size {
            return Err(Error::config(format!("`rank` must be below `world_size`: found rank {rank} of {world_size}")));
        }
        core.check_epoch(epoch)?;
        let growth = lock(&core.cursor).growth.clone();
        let epochs = core.epoch_chain(&growth, epoch);
        let grouping = Grouping { rank, world_size, ..core.grouping };
        let steps = epochs.len().map_or(u64::MAX, |end| grouping.steps(end));
        if step >= steps {
            return Err(Error::config(format!(
                "step {step} is asked for, an epoch has {steps} for {world_size} ranks"
            )));
        }
        let (start, slots) = slots(grouping, &epochs, step * grouping.global_batch());
        core.compute_alone(&growth, start, step, &slots)
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        let core = &self.core;
        let (decoded_blocks, decoded_bytes) = core.cache.decoded();
        Stats {
            decoded_blocks,
            decoded_bytes,
            decoded_pages: core.cache.decoded_pages(),
            sources: self.source_stats(),
            cache_bytes: core.cache.used_bytes(),
            buffer_bytes: core.pool.held_bytes() as u64,
            ..core.counters.snapshot()
        }
    }

    /// What each source of a mixture has given to all ranks together before the present position; empty where there is no mixture.
    fn source_stats(&self) -> Vec<SourceStats> {
        let core = &self.core;
        let (epoch, position) = {
            let cursor = lock(&core.cursor);
            (cursor.epoch, cursor.position)
        };
        let Some(mixture) = core.sources.mixture() else { return Vec::new() };
        let mut counts = mixture.counts(position);
        if epoch > 0 {
            for (count, whole) in counts.iter_mut().zip(mixture.counts(mixture.positions())) {
                *count += epoch * whole;
            }
        }
        let total: u64 = counts.iter().sum();
        let of_source = |(source, sequences): (&Source, u64)| SourceStats {
            name: source.name.clone(),
            sequences,
            tokens: sequences * core.config.seq_len,
            epochs: sequences as f64 / core.sources.sequences_of(source) as f64,
            share: if total == 0 { 0.0 } else { sequences as f64 / total as f64 },
        };
        core.sources.list().iter().zip(counts).map(of_source).collect()
    }

    /// What makes these settings slow on this corpus, a line each, with the remedy.
    pub fn warnings(&self) -> &[String] {
        &self.core.warnings
    }

    /// Stops every pass and waits for its threads. Batches handed over stay valid.
    pub fn close(&self) {
        let runs: Vec<_> = lock(&self.runs).drain(..).filter_map(|run| run.upgrade()).collect();
        for run in runs {
            run.close();
        }
    }
}

impl Core {
    fn open(mut config: Config, source: impl FnOnce(usize, usize) -> Arc<dyn Memory>) -> Result<Self> {
        config.validate()?;
        let threads = *config.num_threads.get_or_insert_with(environment::default_threads);
        let rank = *config.dp_rank.get_or_insert(0);
        let world_size = *config.dp_world_size.get_or_insert(1);

        let placement = Placement::of(&config)?;
        let trace = environment::trace().map(|asked| Trace::open(&asked, rank, world_size)).transpose()?;
        let corpora = open_corpora(&config, threads)?;
        let access = if corpora.iter().any(|(_, corpus)| corpus.access() == Access::Block) {
            Access::Block
        } else {
            Access::Random
        };
        config.shuffle = match (config.shuffle, access) {
            (Shuffle::On, Access::Random) => Shuffle::Global,
            (Shuffle::On, Access::Block) => Shuffle::Block,
            (other, _) => other,
        };
        let grouping = Grouping { batch_size: config.batch_size, rank, world_size, remainder: config.remainder };
        let batch_bytes = BatchLayout::largest_bytes(&config);
        let layout = BatchLayout::new(&config, config.batch_size as usize, false);
        let in_flight = config.prefetch_batches + 1;
        let largest = corpora.iter().map(|(_, corpus)| corpus.largest_block_bytes()).max().unwrap_or(0);
        let cache_bytes = cache_budget(&config, largest, threads, in_flight * batch_bytes as u64)?;
        let mut warnings: Vec<String> = corpora.iter().flat_map(|(_, corpus)| corpus.warnings()).cloned().collect();
        let elsewhere = trace.as_ref().filter(|trace| trace.is_elsewhere());
        warnings.extend(elsewhere.map(|trace| {
            format!(
                "another process writes the trace that `FOREBAY_TRACE` names: that of this one is `{}`",
                trace.path().display()
            )
        }));
        let windows = windows_bytes(&config, &corpora, &grouping, largest);
        warnings.extend(window_warning(windows, cache_bytes));
        let cache = Arc::new(BlockCache::new(cache_bytes));
        let specials = Specials { bos: config.bos_id, eos: config.eos_id };
        let sources = corpora.into_iter().enumerate().map(|(index, (name, corpus))| {
            let layout = Concat::new(corpus.counts(), specials, config.seq_len, config.row_tokens());
            let reader = Reader::new(Arc::new(corpus), layout, specials, Arc::clone(&cache), index);
            Source::new(name, reader, config.seed)
        });
        let sources = Sources::new(&config, sources.collect())?;
        let mut core = Self {
            grouping,
            content: content_of(&config),
            warnings,
            pool: source(batch_bytes, in_flight as usize),
            layout,
            batch_bytes,
            counters: Counters::new(threads as usize),
            cursor: Mutex::new(Cursor::new(sources.shards())),
            next_run: AtomicU64::new(0),
            cold: AtomicBool::new(true),
            covers: AtomicBool::new(config.delivery_log.is_some()),
            trace,
            placement,
            home: ForkGuard::new(),
            sources,
            cache,
            config,
        };
        let first = core.epoch_chain(&Growth::none(core.sources.shards()), 0);
        if let Some(end) = first.len() {
            grouping.check(end)?;
            if core.steps_from(0, &first) == 0 && core.config.max_steps != Some(0) {
                core.warnings.push(format!(
                    "an epoch has no batch: its {end} sequences of `seq_len` = {} make none of {} (`batch_size` times the number of ranks)",
                    core.config.seq_len,
                    grouping.global_batch()
                ));
            }
        }
        Ok(core)
    }

    /// Worker threads of a pass.
    fn threads(&self) -> usize {
        self.config.num_threads.unwrap_or(1) as usize
    }

    fn check_process(&self) -> Result<()> {
        if !self.home.is_forked_child() {
            return Ok(());
        }
        let now = std::process::id();
        Err(Error::new(
            ErrorKind::Closed,
            format!(
                "this loader was opened in process {} and does not work in its forked child {now}, which has none of its threads: \
                 open a new loader in the child",
                self.home.process()
            ),
        ))
    }

    /// Positions of an epoch under the remainder rule.
    fn positions(&self, growth: &Growth, epoch: u64) -> u64 {
        self.grouping.positions(self.sources.full_rows(growth, epoch), self.sources.has_tail(growth, epoch))
    }

    /// The epochs of the pass that `epoch` belongs to.
    fn epoch_chain(&self, growth: &Growth, epoch: u64) -> EpochChain {
        let (first, count) = match self.config.epochs {
            Epochs::Count(count) => (epoch - epoch % count, Some(count)),
            Epochs::Endless => (0, None),
        };
        // A mixture without end is one epoch.
        let count = if self.sources.full_rows(growth, epoch) == ENDLESS { Some(1) } else { count };
        EpochChain::new(first, count, &self.config.skip, growth.changes(), |epoch| self.positions(growth, epoch))
    }

    /// Steps of a pass that begins at index `start`.
    fn steps_from(&self, start: u64, epochs: &EpochChain) -> u64 {
        let steps = epochs.len().map_or(u64::MAX, |end| self.grouping.steps(end.saturating_sub(start)));
        let limit = self.config.max_steps.unwrap_or(u64::MAX);
        steps.min(limit.saturating_sub(start / self.grouping.global_batch()))
    }

    fn check_epoch(&self, epoch: u64) -> Result<()> {
        if epoch > MAX_EPOCH {
            return Err(Error::config(format!("epoch {epoch} is asked for, the last one is {MAX_EPOCH}")));
        }
        if epoch > 0 && self.sources.mixture().is_some_and(|mixture| mixture.positions() == ENDLESS) {
            return Err(Error::config(format!(
                "epoch {epoch} is asked for, and this mixture's first epoch has no end"
            )));
        }
        Ok(())
    }

    /// What a state at `position` of `epoch` belongs to: a fixed list of keys.
    fn content(&self, growth: &Growth, epoch: u64, position: u64) -> Vec<(&'static str, StateValue)> {
        let mut content = self.content.clone();
        let shards = growth.latest();
        let fingerprint = match self.sources.mixture() {
            Some(_) => "mixture".to_owned(),
            None => self.sources.list()[0].reader.corpus().fingerprint_of(shards as usize),
        };
        let begun: Vec<_> = epochs::merged(&self.config.skip)
            .into_iter()
            .filter(|skip| (skip.epoch, skip.start) < (epoch, position))
            .collect();
        content.extend([
            ("fingerprint", StateValue::Text(fingerprint)),
            ("shards", shards.into()),
            ("sequences", self.sources.all_sequences(growth).into()),
            ("growth", StateValue::Text(growth.text())),
            ("skipped", StateValue::Text(short(settings::skips_text(&begun)))),
            ("mixture", self.sources.mixture_digest(if epoch == 0 { position } else { u64::MAX })),
        ]);
        content
    }

    /// The growth under which `state` was saved, and the one that continues it.
    fn growth(&self, state: &State) -> Result<(Growth, Growth)> {
        let saved = Growth::parse(state.text("growth")?)
            .ok_or_else(|| refused("state is damaged: `growth` must hold `EPOCH:SHARDS` pairs, in order".to_owned()))?;
        let (before, now) = (saved.latest(), self.sources.shards());
        if self.sources.mixture().is_some() || before >= now {
            // What is not so is found by comparing.
            return Ok(if before == now { (saved.clone(), saved) } else { (Growth::none(now), Growth::none(now)) });
        }
        let corpus = self.sources.list()[0].reader.corpus();
        if state.text("fingerprint")? != corpus.fingerprint_of(before as usize) {
            return Ok((Growth::none(now), Growth::none(now)));
        }
        if !self.config.extend {
            return Err(refused(format!(
                "the corpus has grown: it had {before} shards when the state was saved, and {now} now; set `extend` to let the new ones join at the next epoch, or resume with the old ones"
            )));
        }
        let joins = state.epoch() + u64::from(state.position() > 0);
        Ok((saved.clone(), saved.with(joins, now)))
    }

    /// Writes over `places` what the rows read; none where they are padding.
    fn places(&self, growth: &Growth, slots: &[Slot], orders: &mut Orders, places: &mut Vec<Option<Place>>) {
        let place = |slot: &Slot| match *slot {
            Slot::Position { epoch, position, repeated } => {
                Some(Place { repeated, ..self.sources.place(growth, orders, epoch, position) })
            }
            Slot::Padding => None,
        };
        places.clear();
        places.extend(slots.iter().map(place));
    }
}

/// Rows of one rank in the global batch at index `start` of `epochs`, and the epoch and position of the batch's first row.
fn slots(grouping: Grouping, epochs: &EpochChain, start: u64) -> ((u64, u64), Vec<Slot>) {
    let mut slots = Vec::new();
    let first = slots_into(grouping, epochs, start, &mut slots);
    (first, slots)
}

/// [`slots`], written over those of `slots`.
fn slots_into(grouping: Grouping, epochs: &EpochChain, start: u64, slots: &mut Vec<Slot>) -> (u64, u64) {
    let end = epochs.len().unwrap_or(u64::MAX);
    let at = |index, repeated| {
        let (epoch, position) = epochs.at(index);
        Slot::Position { epoch, position, repeated }
    };
    let slot = |row| match row {
        BatchRow::Index(index) => at(index, false),
        BatchRow::Repeated(index) => at(index, true),
        BatchRow::Padding => Slot::Padding,
    };
    slots.clear();
    slots.extend(grouping.rows(start, end, epochs.last_epoch()).map(slot));
    epochs.at(start)
}
