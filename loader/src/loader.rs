//! Loader: opens a corpus, hands out batches in order, saves and restores the position.
//!
//! A batch is computed from its position alone (`Core::compute`), by whichever thread takes its number; iteration, `batch_at` and
//! `sequences_at` share that one function.

mod planned;

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_128;

use crate::buffer::pool::Pool;
use crate::buffer::{ALIGNMENT, Lease, Source as Memory};
use crate::config::{Config, Epochs, Remainder, Shuffle, Split, Targets};
use crate::corpus::Corpus;
use crate::coverage::Coverage;
use crate::environment;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::concat::{Concat, Specials};
use crate::ledger::{self, Entry, Pass};
use crate::order;
use crate::order::course::{self, Course, ENDLESS};
use crate::order::partition::{Grouping, Row};
use crate::pipeline::{Pipeline, Plan, Taken};
use crate::read::{BlockCache, Reader, Scratch};
use crate::recipe;
use crate::settings;
use crate::shard::{Access, OpenOptions};
use crate::sources::{Growth, Orders, Place, Source, Sources};
use crate::state::{State, StateValue, refused};
use crate::stats::{Counters, SourceStats, Stats};
use crate::sync::lock;
use crate::tokens::Dtype;

/// Windows read ahead of their use where files are not in memory: about what keeps a disk's queue full.
const WINDOWS_AHEAD: u64 = 64;
/// While everything is found in memory, one batch in so many is looked at.
const LOOK_EVERY: u64 = 16;

/// Label of places that hold no target.
pub const IGNORED_LABEL: i64 = -100;

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
    counters: Counters,
    cursor: Mutex<Cursor>,
    next_run: AtomicU64,
    /// Whether windows were found out of memory lately, so that all are read ahead. Written and read by workers; a stale value costs little.
    cold: AtomicBool,
    /// Whether batches are hashed. Written by callers, read by workers; a batch that is begun before may have none.
    covers: AtomicBool,
    process: u32,
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

/// One array of a batch, inside the batch's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Key in the batch.
    pub name: &'static str,
    /// Type of its values.
    pub dtype: Dtype,
    /// Offset of its first byte in the buffer.
    pub offset_bytes: usize,
    /// Rows and columns; arrays of one column have one axis, the rows.
    pub shape: [usize; 2],
    /// Axes, 1 or 2.
    pub ndim: usize,
    /// Values from one row to the next; more than the columns where fields overlap.
    pub row_stride: usize,
}

/// A delivered batch; its memory belongs to its holders until the last one drops it.
#[derive(Debug)]
pub struct Batch {
    /// Epoch it belongs to.
    pub epoch: u64,
    /// Step in the epoch, counted from 0.
    pub step: u64,
    /// First position of its global batch.
    pub position: u64,
    /// Rows, `batch_size` but for a short last batch.
    pub rows: usize,
    /// Arrays in the buffer.
    pub fields: Vec<Field>,
    /// Its rows, hashed; only where [`Loader::cover`] or the setting `ledger` asks for it.
    pub coverage: Option<Coverage>,
    lease: Lease,
}

impl Batch {
    /// First byte of the buffer. Writing through it is the holder's business: nothing of the loader reads it again.
    pub fn as_ptr(&self) -> *mut u8 {
        self.lease.as_ptr()
    }

    /// Bytes of the buffer.
    pub fn len_bytes(&self) -> usize {
        self.lease.len()
    }

    /// Values of row `row` of field `name`, widened.
    ///
    /// # Panics
    /// When there is no such field or row.
    pub fn row(&self, name: &str, row: usize) -> Vec<i64> {
        let field = self.fields.iter().find(|field| field.name == name).expect("a field of the batch");
        assert!(row < field.shape[0], "row {row} of {}", field.shape[0]);
        let start = field.offset_bytes + row * field.row_stride * field.dtype.size();
        // SAFETY: the lease's bytes are initialised and, once a batch is delivered, written by its holder alone; the field lies inside.
        let bytes =
            unsafe { std::slice::from_raw_parts(self.as_ptr().add(start), field.shape[1] * field.dtype.size()) };
        let values = crate::tokens::Tokens::new(field.dtype, bytes);
        (0..values.len()).map(|index| values.get(index)).collect()
    }
}

/// What waiting for a batch came to.
#[derive(Debug)]
pub enum Next {
    /// The next batch in order.
    Batch(Arc<Batch>),
    /// The epoch is over.
    End,
    /// Nothing within the time given; ask again.
    Pending,
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
        self.core.steps(&self.core.course(&cursor.growth, cursor.epoch))
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
        let course = core.course(&cursor.growth, cursor.epoch);
        let (Remainder::Drop, Some(end)) = (core.grouping.remainder, course.len()) else { return 0 };
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
        let course = core.course(&growth, epoch);
        let grouping = Grouping { rank, world_size, ..core.grouping };
        let steps = course.len().map_or(u64::MAX, |end| grouping.steps(end));
        if step >= steps {
            return Err(Error::config(format!(
                "step {step} is asked for, an epoch has {steps} for {world_size} ranks"
            )));
        }
        let (start, slots) = slots(grouping, &course, step * grouping.global_batch());
        core.compute_alone(&growth, start, step, &slots)
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        let core = &self.core;
        let (decoded_blocks, decoded_bytes) = core.cache.decoded();
        Stats {
            decoded_blocks,
            decoded_bytes,
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
        let in_flight = config.prefetch_batches + 1;
        let largest = corpora.iter().map(|(_, corpus)| corpus.largest_block_bytes()).max().unwrap_or(0);
        let cache_bytes = cache_budget(&config, largest, threads, in_flight * batch_bytes as u64)?;
        let mut warnings: Vec<String> = corpora.iter().flat_map(|(_, corpus)| corpus.warnings()).cloned().collect();
        warnings.extend(window_warning(&config, &corpora, &grouping, largest, cache_bytes));
        let cache = Arc::new(BlockCache::new(cache_bytes));
        let specials = Specials { bos: config.bos_id, eos: config.eos_id };
        let sources = corpora.into_iter().enumerate().map(|(index, (name, corpus))| {
            let layout = Concat::new(corpus.counts(), specials, config.seq_len, config.row_tokens());
            let reader = Reader::new(Arc::new(corpus), layout, specials, Arc::clone(&cache), index);
            Source::new(name, reader, config.seed)
        });
        let sources = Sources::new(&config, sources.collect())?;
        let core = Self {
            grouping,
            content: content_of(&config),
            warnings,
            pool: source(batch_bytes, in_flight as usize + 1),
            counters: Counters::new(threads as usize),
            cursor: Mutex::new(Cursor::new(sources.shards())),
            next_run: AtomicU64::new(0),
            cold: AtomicBool::new(true),
            covers: AtomicBool::new(config.ledger.is_some()),
            process: std::process::id(),
            sources,
            cache,
            config,
        };
        if let Some(end) = core.course(&Growth::none(core.sources.shards()), 0).len() {
            grouping.check(end)?;
        }
        Ok(core)
    }

    fn check_process(&self) -> Result<()> {
        let now = std::process::id();
        if now == self.process {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Closed,
            format!(
                "this loader was opened in process {} and does not work in its forked child {now}, which has none of its threads: \
                 open a new loader in the child",
                self.process
            ),
        ))
    }

    /// Positions of an epoch under the remainder rule.
    fn positions(&self, growth: &Growth, epoch: u64) -> u64 {
        self.grouping.positions(self.sources.full_rows(growth, epoch), self.sources.has_tail(growth, epoch))
    }

    /// The course of the pass that `epoch` belongs to.
    fn course(&self, growth: &Growth, epoch: u64) -> Course {
        let (first, count) = match self.config.epochs {
            Epochs::Count(count) => (epoch - epoch % count, Some(count)),
            Epochs::Endless => (0, None),
        };
        // A mixture without end is one epoch.
        let count = if self.sources.full_rows(growth, epoch) == ENDLESS { Some(1) } else { count };
        Course::new(first, count, &self.config.skip, growth.changes(), |epoch| self.positions(growth, epoch))
    }

    /// Steps of a course, up to the limit.
    fn steps(&self, course: &Course) -> u64 {
        let steps = course.len().map_or(u64::MAX, |end| self.grouping.steps(end));
        steps.min(self.config.max_steps.unwrap_or(u64::MAX))
    }

    /// Steps of a pass that begins at index `start`.
    fn steps_from(&self, start: u64, course: &Course) -> u64 {
        let steps = course.len().map_or(u64::MAX, |end| self.grouping.steps(end.saturating_sub(start)));
        let limit = self.config.max_steps.unwrap_or(u64::MAX);
        steps.min(limit.saturating_sub(start / self.grouping.global_batch()))
    }

    fn check_epoch(&self, epoch: u64) -> Result<()> {
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
        let begun: Vec<_> = course::merged(&self.config.skip)
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

    /// The batch of `slots`, in memory of its own.
    fn compute_alone(&self, growth: &Growth, start: (u64, u64), step: u64, slots: &[Slot]) -> Result<Arc<Batch>> {
        let mut worker = Worker::default();
        let places = self.places(growth, slots, &mut worker.orders);
        let layout = BatchLayout::new(&self.config, slots.len(), self.has_padding(&places));
        let memory: Arc<dyn Memory> = Arc::new(Pool::new(layout.bytes, 0));
        let lease = Lease::new(&memory, layout.bytes);
        Ok(Arc::new(self.compute(start, step, &places, layout, lease, &mut worker)?))
    }

    /// What the rows read; none where they are padding.
    fn places(&self, growth: &Growth, slots: &[Slot], orders: &mut Orders) -> Vec<Option<Place>> {
        let place = |slot: &Slot| match *slot {
            Slot::Position { epoch, position, repeated } => {
                Some(Place { repeated, ..self.sources.place(growth, orders, epoch, position) })
            }
            Slot::Padding => None,
        };
        slots.iter().map(place).collect()
    }

    /// Whether a row holds fewer tokens than it has places.
    fn has_padding(&self, places: &[Option<Place>]) -> bool {
        let full = |place: &Place| place.tokens.end - place.tokens.start == self.config.row_tokens();
        self.grouping.remainder != Remainder::Wrap && !places.iter().all(|place| place.as_ref().is_some_and(full))
    }

    #[allow(clippy::too_many_arguments)] // each is a different fact about the one batch
    fn compute(
        &self,
        start: (u64, u64),
        step: u64,
        rows: &[Option<Place>],
        layout: BatchLayout,
        mut lease: Lease,
        worker: &mut Worker,
    ) -> Result<Batch> {
        let seq_len = self.config.seq_len as usize;
        let row_tokens = self.config.row_tokens() as usize;
        for (index, row) in rows.iter().enumerate() {
            match layout.kind {
                Kind::Overlapping => {
                    let ids = lease.i64s(index * row_tokens * 8, row_tokens);
                    self.fill_row(row.as_ref(), ids, worker)?;
                }
                Kind::InPlace => {
                    let places = rows.len() * seq_len;
                    // Labels begin at a multiple of the alignment, in the same buffer of 64-bit integers.
                    let labels_at = layout.targets_at / 8;
                    let (ids, labels) = lease.i64s(0, labels_at + places).split_at_mut(labels_at);
                    let at = index * seq_len..(index + 1) * seq_len;
                    let (ids, labels) = (&mut ids[at.clone()], &mut labels[at]);
                    let filled = self.fill_row(row.as_ref(), ids, worker)?;
                    labels[..filled].copy_from_slice(&ids[..filled]);
                    labels[filled..].fill(IGNORED_LABEL);
                }
                Kind::Apart => {
                    let mut ids = std::mem::take(&mut worker.row);
                    ids.resize(row_tokens, 0);
                    let filled = self.fill_row(row.as_ref(), &mut ids, worker)?;
                    let shift = row_tokens - seq_len;
                    if layout.input_dtype == Dtype::I32 {
                        let out = lease.i32s(index * seq_len * 4, seq_len);
                        for (out, id) in out.iter_mut().zip(&ids) {
                            *out = i32::try_from(*id).map_err(|_| {
                                Error::data(format!("token id {id} does not fit `input_dtype` = int32: use int64"))
                            })?;
                        }
                    } else {
                        lease.i64s(index * seq_len * 8, seq_len).copy_from_slice(&ids[..seq_len]);
                    }
                    let targets = lease.i64s(layout.targets_at + index * seq_len * 8, seq_len);
                    let real = filled.saturating_sub(shift);
                    targets[..real].copy_from_slice(&ids[shift..shift + real]);
                    targets[real..].fill(IGNORED_LABEL);
                    worker.row = ids;
                }
            }
        }
        if let Some([sources_at, indices_at]) = layout.ids_at {
            let ids =
                |of: fn(&Place) -> u64| rows.iter().map(move |row| row.as_ref().map_or(-1, |place| of(place) as i64));
            for (out, id) in lease.i64s(sources_at, rows.len()).iter_mut().zip(ids(|place| place.source as u64)) {
                *out = id;
            }
            for (out, id) in lease.i64s(indices_at, rows.len()).iter_mut().zip(ids(|place| place.sequence)) {
                *out = id;
            }
        }
        let (epoch, position) = start;
        let fields = layout.fields;
        let mut batch = Batch { epoch, step, position, rows: rows.len(), fields, coverage: None, lease };
        if self.covers.load(Ordering::Relaxed) {
            let mut coverage = Coverage::default();
            for (index, place) in rows.iter().enumerate() {
                if let Some(place) = place.as_ref().filter(|place| !place.repeated) {
                    let tokens = batch.tokens(index, (place.tokens.end - place.tokens.start) as usize)?;
                    coverage.add_row(place.source as u64, place.sequence, &tokens);
                }
            }
            batch.coverage = Some(coverage);
        }
        Ok(batch)
    }

    /// Asks for what batch `number` of a pass, at index `start`, will read: always while files are cold, and else now and then, to notice
    /// that they have become so.
    fn read_ahead(&self, run: &Heading, number: u64, start: u64, orders: &mut Orders) {
        let cold = self.cold.load(Ordering::Relaxed);
        if !cold && !number.is_multiple_of(LOOK_EVERY) {
            return;
        }
        if run.course.len().is_some_and(|end| start >= end) {
            return;
        }
        let mut asked = false;
        let (_, slots) = slots(self.grouping, &run.course, start);
        for place in self.places(&run.growth, &slots, orders).into_iter().flatten() {
            asked |= self.sources.list()[place.source].reader.read_ahead(place.tokens);
        }
        if asked != cold {
            self.cold.store(asked, Ordering::Relaxed);
        }
    }

    /// Writes the tokens of one row; the places after them hold `pad_id`. Returns how many are tokens.
    fn fill_row(&self, place: Option<&Place>, ids: &mut [i64], worker: &mut Worker) -> Result<usize> {
        let Some(place) = place else {
            ids.fill(i64::from(self.config.pad_id));
            return Ok(0);
        };
        let reader = &self.sources.list()[place.source].reader;
        let filled = (place.tokens.end - place.tokens.start) as usize;
        let (tokens, mut rest) = ids.split_at_mut(filled);
        reader.fill(place.tokens.clone(), place.ends_chunk, tokens, &mut worker.scratch)?;
        if self.grouping.remainder == Remainder::Wrap && !rest.is_empty() {
            let stream_len = place.tokens.end;
            while !rest.is_empty() {
                let take = (rest.len() as u64).min(stream_len) as usize;
                let (part, after) = rest.split_at_mut(take);
                reader.fill(0..take as u64, false, part, &mut worker.scratch)?;
                rest = after;
            }
            return Ok(ids.len());
        }
        rest.fill(i64::from(self.config.pad_id));
        Ok(filled)
    }
}

/// Rows of one rank in the global batch at index `start` of `course`, and the epoch and position of the batch's first row.
fn slots(grouping: Grouping, course: &Course, start: u64) -> ((u64, u64), Vec<Slot>) {
    let end = course.len().unwrap_or(u64::MAX);
    let at = |index, repeated| {
        let (epoch, position) = course.at(index);
        Slot::Position { epoch, position, repeated }
    };
    let slot = |row: &Row| match *row {
        Row::Index(index) => at(index, false),
        Row::Repeated(index) => at(index, true),
        Row::Padding => Slot::Padding,
    };
    (course.at(start), grouping.rows(start, end, course.last_epoch()).iter().map(slot).collect())
}

/// What stands in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Index of the source; 0 where there is no mixture.
    pub source: usize,
    /// Epoch of the source.
    pub epoch: u64,
    /// Sequence of it; the one after the last full one is its tail.
    pub sequence: u64,
}

/// What proving a run takes.
impl Loader {
    /// Hashes the rows of every batch that is begun from now on, so that [`Batch::coverage`] is there.
    pub fn cover(&self) {
        self.core.covers.store(true, Ordering::Relaxed);
    }

    /// What passes over `epochs` go through, one after the other, and what stands at each of its indices.
    pub fn course(&self, epochs: Range<u64>) -> (Course, impl FnMut(u64) -> Sample + use<>) {
        let core = Arc::clone(&self.core);
        let growth = lock(&core.cursor).growth.clone();
        let positions = |epoch| core.positions(&growth, epoch);
        let count = epochs.end.saturating_sub(epochs.start);
        let course = Course::new(epochs.start, Some(count), &core.config.skip, growth.changes(), positions);
        let (at, mut orders) = (course.clone(), Orders::default());
        let sample = move |index| {
            let (epoch, position) = at.at(index);
            let Place { source, epoch, sequence, .. } = core.sources.place(&growth, &mut orders, epoch, position);
            Sample { source, epoch, sequence }
        };
        (course, sample)
    }

    /// Takes the history of a corpus that grew from the `growth` of a state or a ledger.
    pub fn assume_growth(&self, text: &str) -> Result<()> {
        let shards = self.core.sources.shards();
        let growth = Growth::parse(text).filter(|growth| growth.latest() <= shards);
        let growth =
            growth.ok_or_else(|| refused(format!("growth `{text}` is not one of this corpus of {shards} shards")))?;
        lock(&self.core.cursor).growth = growth;
        Ok(())
    }

    /// Digest of the corpus and the content settings, which a ledger names.
    pub fn content_digest(&self) -> String {
        self.core.content_digest()
    }

    /// The content settings, which a ledger names too.
    pub fn content_settings(&self) -> Vec<(String, String)> {
        self.core.content_texts()
    }
}

impl Core {
    /// Of all that decides what is trained on, but for what may change in the course of a run: shards and stages that were added, and skips.
    fn content_texts(&self) -> Vec<(String, String)> {
        let text = |value: &StateValue| match value {
            StateValue::Int(number) => number.to_string(),
            StateValue::Text(text) => text.clone(),
        };
        self.content.iter().map(|(key, value)| ((*key).to_owned(), text(value))).collect()
    }

    fn content_digest(&self) -> String {
        let mut text: Vec<_> = self.content.iter().map(|(key, value)| format!("{key}={value}")).collect();
        text.push(match self.sources.mixture() {
            None => self.sources.list()[0].reader.corpus().fingerprint_of(1.min(self.sources.shards() as usize)),
            Some(_) => self.sources.mixture_digest(1).to_string(),
        });
        format!("{:032x}", xxh3_128(text.join("\n").as_bytes()))
    }

    /// Begins the ledger of a pass, where there is one.
    fn begin_ledger(&self, heading: &Heading) -> Result<Option<ledger::Writer>> {
        let Some(folder) = &self.config.ledger else { return Ok(None) };
        let (epoch, position) = heading.course.state_at(heading.start);
        let pass = Pass {
            run: String::new(),
            time_ms: 0,
            launch: environment::launch(),
            epoch,
            position,
            rank: self.grouping.rank,
            world_size: self.grouping.world_size,
            batch_size: self.grouping.batch_size,
            content: self.content_digest(),
            settings: self.content_texts(),
            fingerprint: self.sources.list()[0].reader.corpus().fingerprint().to_owned(),
            growth: heading.growth.text(),
        };
        ledger::Writer::begin(Path::new(folder), pass).map(Some)
    }
}

impl Started {
    /// Writes the line of a batch that is about to be handed over.
    fn write_ledger(&self, batch: &Batch, end: (u64, u64)) -> Result<()> {
        let Some(ledger) = &self.ledger else { return Ok(()) };
        let coverage = batch.coverage.ok_or_else(|| Error::new(ErrorKind::Internal, "a batch was not hashed"))?;
        lock(ledger).write(&Entry { start: (batch.epoch, batch.position), end, coverage })
    }
}

impl Batch {
    /// The first `count` tokens that row `row` was made of, as they lie in the delivered arrays.
    fn tokens(&self, row: usize, count: usize) -> Result<Vec<i64>> {
        let [inputs, targets] = [&self.fields[0], &self.fields[1]].map(|field| self.row(field.name, row));
        let shift = usize::from(self.fields[1].name == "y");
        let mut tokens = inputs;
        tokens.extend(targets.last().filter(|_| shift == 1));
        tokens.truncate(count);
        let fitting = tokens.get(shift..).unwrap_or_default();
        if targets.get(..fitting.len()) != Some(fitting) {
            return Err(Error::new(ErrorKind::Internal, format!("targets of row {row} do not belong to its inputs")));
        }
        Ok(tokens)
    }
}

/// Memory and times of one worker.
#[derive(Debug, Default)]
struct Worker {
    index: usize,
    scratch: Scratch,
    orders: Orders,
    /// A row of ids on its way to two arrays of different types.
    row: Vec<i64>,
}

/// How the fields of a batch share its buffer.
#[derive(Clone, Debug)]
struct BatchLayout {
    kind: Kind,
    fields: Vec<Field>,
    input_dtype: Dtype,
    /// Offset of labels or `y`, where they are apart from the inputs.
    targets_at: usize,
    /// Offsets of each row's source and sequence, where they are asked for.
    ids_at: Option<[usize; 2]>,
    bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `x` and `y` are views, one token apart, of rows of `seq_len + 1` tokens.
    Overlapping,
    /// Inputs and labels of 64 bits, at the same places of two arrays.
    InPlace,
    /// Two arrays, filled by way of a row of its own.
    Apart,
}

impl BatchLayout {
    fn new(config: &Config, rows: usize, padded: bool) -> Self {
        let columns = config.seq_len as usize;
        let shifted = config.targets == Targets::Shifted;
        let input_dtype = config.input_dtype;
        let kind = match (shifted, input_dtype) {
            // A padded place is `pad_id` in `x` and -100 in `y`: they cannot share it.
            (true, Dtype::I64) if !padded => Kind::Overlapping,
            (false, Dtype::I64) => Kind::InPlace,
            _ => Kind::Apart,
        };
        let (inputs, targets) = if shifted { ("x", "y") } else { ("input_ids", "labels") };
        let field = |name, dtype, offset_bytes, row_stride| Field {
            name,
            dtype,
            offset_bytes,
            shape: [rows, columns],
            ndim: 2,
            row_stride,
        };
        if kind == Kind::Overlapping {
            let fields = vec![field(inputs, Dtype::I64, 0, columns + 1), field(targets, Dtype::I64, 8, columns + 1)];
            let this = Self { kind, fields, input_dtype, targets_at: 8, ids_at: None, bytes: rows * (columns + 1) * 8 };
            return this.with_ids(config, rows);
        }
        let targets_at = (rows * columns * input_dtype.size()).next_multiple_of(ALIGNMENT);
        let fields = vec![field(inputs, input_dtype, 0, columns), field(targets, Dtype::I64, targets_at, columns)];
        let bytes = targets_at + rows * columns * 8;
        Self { kind, fields, input_dtype, targets_at, ids_at: None, bytes }.with_ids(config, rows)
    }

    /// Adds what `sample_ids` asks for.
    fn with_ids(mut self, config: &Config, rows: usize) -> Self {
        if config.sample_ids {
            let at = [self.bytes, self.bytes + rows * 8];
            for (name, offset_bytes) in ["source", "sample_index"].into_iter().zip(at) {
                self.fields.push(Field {
                    name,
                    dtype: Dtype::I64,
                    offset_bytes,
                    shape: [rows, 1],
                    ndim: 1,
                    row_stride: 1,
                });
            }
            self.bytes += rows * 16;
            self.ids_at = Some(at);
        }
        self
    }

    /// Bytes that hold any batch of `config`.
    fn largest_bytes(config: &Config) -> usize {
        let rows = config.batch_size as usize;
        let may_pad = matches!(config.remainder, Remainder::Pad | Remainder::Short);
        let padded = if may_pad { Self::new(config, rows, true).bytes } else { 0 };
        Self::new(config, rows, false).bytes.max(padded)
    }
}

/// Opens the corpora of `config`, side by side; all faults of all of them are reported.
fn open_corpora(config: &Config, threads: u64) -> Result<Vec<(String, Corpus)>> {
    let options = OpenOptions::of(config);
    let cache = config.cache_dir.as_deref().map(Path::new);
    let wanted = recipe::corpora(config)?;
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
fn cache_budget(config: &Config, largest: u64, threads: u64, batches: u64) -> Result<u64> {
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

/// Says so where the cache cannot hold the blocks that a step may draw from, so that they are decoded again and again.
fn window_warning(
    config: &Config,
    corpora: &[(String, Corpus)],
    grouping: &Grouping,
    largest: u64,
    cache_bytes: u64,
) -> Option<String> {
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
    let windows: u64 = corpora.iter().map(|(_, corpus)| of_corpus(corpus)).sum();
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
fn content_of(config: &Config) -> Vec<(&'static str, StateValue)> {
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
fn short(text: String) -> String {
    if text.len() <= 120 { text } else { format!("xxh3:{:032x}", xxhash_rust::xxh3::xxh3_128(text.as_bytes())) }
}

/// A pass over one epoch. Cheap to clone; clones share the pass, so that several threads can consume it.
#[derive(Clone, Debug)]
pub struct Batches {
    run: Arc<Run>,
}

#[derive(Debug)]
struct Run {
    core: Arc<Core>,
    id: u64,
    external: bool,
    started: OnceLock<Result<Started>>,
    /// Buffers submitted before the start, in order.
    submitted: Mutex<Vec<Lease>>,
}

#[derive(Debug)]
struct Started {
    pipeline: Pipeline<Arc<Batch>>,
    heading: Arc<Heading>,
    delivered: AtomicU64,
    ledger: Option<Mutex<ledger::Writer>>,
}

/// Where a pass goes.
#[derive(Debug)]
struct Heading {
    course: Course,
    growth: Growth,
    /// Index of its first row.
    start: u64,
}

impl Batches {
    /// Waits at most `timeout` for the next batch. Callable from several threads; each batch is given once.
    pub fn next_timeout(&self, timeout: Duration) -> Result<Next> {
        let run = &self.run;
        let core = &run.core;
        core.check_process()?;
        let started = run.started.get_or_init(|| run.start()).as_ref().map_err(Clone::clone)?;
        if run.external {
            for lease in lock(&run.submitted).drain(..) {
                started.pipeline.submit(lease);
            }
        }
        let asked = Instant::now();
        core.counters.asked(asked);
        let depth = started.pipeline.depth();
        if let Some(ledger) = &started.ledger {
            lock(ledger).check()?;
        }
        let mut written = Ok(());
        let taken = started.pipeline.take(timeout, |batch| {
            // Takers come here one at a time.
            let delivered = started.delivered.load(Ordering::Relaxed) + 1;
            let index = started.heading.start.saturating_add(delivered * core.grouping.global_batch());
            let end = started.heading.course.state_at(index);
            written = started.write_ledger(batch, end);
            if written.is_err() {
                return;
            }
            started.delivered.store(delivered, Ordering::Relaxed);
            let mut cursor = lock(&core.cursor);
            if cursor.run == run.id {
                (cursor.epoch, cursor.position) = end;
            }
        })?;
        written?;
        match taken {
            Taken::Item(batch) => {
                let tokens = batch.rows as u64 * core.config.seq_len;
                core.counters.delivered(tokens, batch.len_bytes() as u64, asked.elapsed(), depth);
                Ok(Next::Batch(batch))
            }
            Taken::End => Ok(Next::End),
            Taken::Pending => {
                core.counters.waited(asked.elapsed());
                Ok(Next::Pending)
            }
        }
    }

    /// Bytes that a submitted buffer must have.
    pub fn batch_bytes(&self) -> usize {
        BatchLayout::largest_bytes(&self.run.core.config)
    }

    /// Buffers to keep submitted and not yet delivered, so that workers never wait for one.
    pub fn buffers_wanted(&self) -> usize {
        self.run.core.config.prefetch_batches as usize
    }

    /// Gives the buffer of the next batch that has none yet, for a pass made by [`Loader::iter_external`].
    ///
    /// # Safety
    /// As for [`Lease::from_caller`]: `start` is aligned to 8 bytes, valid for `len` initialised bytes while `owner` lives, and no one else
    /// writes there before the batch is delivered.
    pub unsafe fn submit(
        &self,
        start: std::ptr::NonNull<u8>,
        len: usize,
        owner: Box<dyn std::any::Any + Send + Sync>,
    ) -> Result<()> {
        if len < self.batch_bytes() {
            return Err(Error::config(format!("a batch needs a buffer of {} bytes, found {len}", self.batch_bytes())));
        }
        // SAFETY: passed on from the caller.
        let lease = unsafe { Lease::from_caller(start, len, owner) };
        // Under the lock, so that buffers submitted around the start keep their order.
        let mut submitted = lock(&self.run.submitted);
        match self.run.started.get() {
            Some(Ok(started)) if submitted.is_empty() => started.pipeline.submit(lease),
            Some(Err(_)) => {}
            Some(Ok(_)) | None => submitted.push(lease),
        }
        Ok(())
    }

    /// Ends the pass; its threads stop after what they are at.
    pub fn close(&self) {
        self.run.close();
    }
}

impl Run {
    fn close(&self) {
        let closed = || Err(Error::new(ErrorKind::Closed, "the loader was closed"));
        if let Ok(started) = self.started.get_or_init(closed) {
            started.pipeline.close();
            started.pipeline.join();
        }
        lock(&self.submitted).clear();
    }

    fn start(&self) -> Result<Started> {
        let core = &self.core;
        let (course, growth, start) = {
            let mut cursor = lock(&core.cursor);
            let mut course = core.course(&cursor.growth, cursor.epoch);
            let mut start = course.index_of(cursor.epoch, cursor.position);
            let left = |start: u64, course: &Course| core.steps_from(start, course) > 0;
            let continued = cursor.continues && left(start, &course);
            let stays = cursor.continues && (cursor.named || (cursor.position == 0 && start == 0));
            let endless = course.len().is_none();
            if !(continued || stays || endless) {
                let next = match core.config.epochs {
                    Epochs::Count(count) => cursor.epoch - cursor.epoch % count + count,
                    Epochs::Endless => cursor.epoch + 1,
                };
                course = core.course(&cursor.growth, next);
                start = 0;
            }
            core.check_epoch(cursor.epoch)?;
            if let Some(end) = course.len() {
                core.grouping.check(end.saturating_sub(start))?;
            }
            let (epoch, position) = course.state_at(start);
            let growth = cursor.growth.clone();
            *cursor = Cursor { growth: growth.clone(), epoch, position, continues: false, named: false, run: self.id };
            (course, growth, start)
        };
        let items = core.steps_from(start, &course);
        let heading = Arc::new(Heading { course, growth, start });
        let threads = core.config.num_threads.unwrap_or(1) as usize;
        let plan = Plan {
            threads: threads.min(usize::try_from(items.max(1)).unwrap_or(usize::MAX)),
            window: core.config.prefetch_batches as usize,
            items,
            leased: self.external,
        };
        let reads_ahead = core.sources.list().iter().any(|source| source.reader.reads_ahead());
        let ahead = if reads_ahead { WINDOWS_AHEAD.div_ceil(core.config.batch_size) } else { 0 };
        let workers = AtomicUsize::new(0);
        let begin = move || Worker { index: workers.fetch_add(1, Ordering::Relaxed), ..Worker::default() };
        let compute = {
            let (core, heading) = (Arc::clone(core), Arc::clone(&heading));
            move |worker: &mut Worker, number: u64, lease: Option<Lease>| {
                let began = Instant::now();
                let global_batch = core.grouping.global_batch();
                let index = heading.start + number * global_batch;
                if ahead > 0 {
                    let first = if number == 0 { 1 } else { ahead };
                    for distance in first..=ahead {
                        let index = index + distance * global_batch;
                        core.read_ahead(&heading, number + distance, index, &mut worker.orders);
                    }
                }
                let (start, slots) = slots(core.grouping, &heading.course, index);
                let rows = core.places(&heading.growth, &slots, &mut worker.orders);
                let layout = BatchLayout::new(&core.config, rows.len(), core.has_padding(&rows));
                let lease = lease.unwrap_or_else(|| Lease::new(&core.pool, BatchLayout::largest_bytes(&core.config)));
                let step = index / global_batch;
                let batch = core.compute(start, step, &rows, layout, lease, worker)?;
                let decode = Duration::from_nanos(std::mem::take(&mut worker.scratch.decode_nanos));
                core.counters.worked(worker.index, decode, began.elapsed().saturating_sub(decode));
                Ok(Arc::new(batch))
            }
        };
        let pipeline = Pipeline::start(plan, begin, compute)?;
        let ledger = core.begin_ledger(&heading)?.map(Mutex::new);
        Ok(Started { pipeline, heading, delivered: AtomicU64::new(0), ledger })
    }
}
