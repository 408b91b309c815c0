//! Loader: opens a corpus, hands out batches in order, saves and restores the position.
//!
//! A batch is computed from its position alone (`Core::compute`), by whichever thread takes its number; iteration, `batch_at` and
//! `sequences_at` share that one function.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::buffer::pool::Pool;
use crate::buffer::{ALIGNMENT, Lease, Source};
use crate::config::{Config, Remainder, Shuffle, Targets};
use crate::corpus::Corpus;
use crate::environment;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::concat::{Concat, Specials};
use crate::order::partition::{Grouping, Row};
use crate::order::{self, Arrangement, EpochOrder};
use crate::pipeline::{self, Pipeline, Taken};
use crate::plan::{self, EpochPlan, MemoryPlan, Plan, SourcePlan};
use crate::read::{Reader, Scratch};
use crate::shard::{Access, OpenOptions};
use crate::state::{State, StateValue};
use crate::stats::{Counters, Stats};
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
    reader: Reader,
    grouping: Grouping,
    arrangement: Arrangement,
    content: Vec<(&'static str, StateValue)>,
    warnings: Vec<String>,
    pool: Arc<dyn Source>,
    counters: Counters,
    cursor: Mutex<Cursor>,
    next_run: AtomicU64,
    /// Whether windows were found out of memory lately, so that all are read ahead. Written and read by workers; a stale value costs little.
    cold: AtomicBool,
    process: u32,
}

/// Where the loader stands.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    epoch: u64,
    position: u64,
    /// Whether the next pass continues here; else it begins the epoch after this one.
    continues: bool,
    /// Whether that epoch was asked for by name, so that its pass is empty where nothing of it is left.
    named: bool,
    /// The pass whose progress this is.
    run: u64,
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
    /// Rows and columns.
    pub shape: [usize; 2],
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
    /// Rows, `batch_size` but for a short last batch.
    pub rows: usize,
    /// Arrays in the buffer.
    pub fields: Vec<Field>,
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
    pub fn open_with(config: Config, source: impl FnOnce(usize, usize) -> Arc<dyn Source>) -> Result<Self> {
        Ok(Self { core: Arc::new(Core::open(config, source)?), runs: Mutex::default() })
    }

    /// Settings in force, with rank, world size, threads and the kind of shuffling filled in.
    pub fn config(&self) -> &Config {
        &self.core.config
    }

    /// The opened corpus.
    pub fn corpus(&self) -> &Corpus {
        self.core.reader.corpus()
    }

    /// Batches this rank gets in an epoch, the same on every rank.
    pub fn len(&self) -> u64 {
        self.core.grouping.steps(self.core.positions())
    }

    /// Whether an epoch has no batch.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Full sequences of an epoch, over all ranks.
    pub fn num_sequences(&self) -> u64 {
        self.core.reader.layout().num_sequences()
    }

    /// Tokens of an epoch, specials included, whether delivered or in the remainder.
    pub fn num_tokens(&self) -> u64 {
        self.core.reader.layout().stream_len()
    }

    /// Tokens of an epoch that the remainder rule leaves out, over all ranks.
    pub fn dropped_tokens(&self) -> u64 {
        let core = &self.core;
        if core.grouping.remainder != Remainder::Drop {
            return 0;
        }
        let delivered = self.len() * core.grouping.global_batch() * core.config.seq_len;
        core.reader.layout().stream_len().saturating_sub(delivered)
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
            *cursor = Cursor { epoch, position: 0, continues: true, named: true, run: u64::MAX };
        }
    }

    /// The epoch of the newest pass, or of the next one if that was set or restored.
    pub fn epoch(&self) -> u64 {
        lock(&self.core.cursor).epoch
    }

    /// The position after the batches handed to the caller by the newest pass.
    pub fn state(&self) -> State {
        let cursor = *lock(&self.core.cursor);
        State::new(cursor.epoch, cursor.position, &self.core.content)
    }

    /// The next pass continues from `state`. Refused, naming both values, where it belongs to another corpus or other content settings.
    pub fn load_state(&self, state: &State) -> Result<()> {
        state.check(&self.core.content)?;
        let most = self.core.most_positions();
        if state.position() > most {
            return Err(Error::new(
                ErrorKind::State,
                format!("state is damaged: position {} is past the {most} of an epoch", state.position()),
            ));
        }
        *lock(&self.core.cursor) =
            Cursor { epoch: state.epoch(), position: state.position(), continues: true, named: false, run: u64::MAX };
        Ok(())
    }

    /// Rows at positions `position..position + n` of `epoch`, over all ranks, as one batch.
    pub fn sequences_at(&self, epoch: u64, position: u64, n: u64) -> Result<Arc<Batch>> {
        let core = &self.core;
        core.check_process()?;
        let positions = core.positions();
        if n == 0 || position.checked_add(n).is_none_or(|end| end > positions) {
            return Err(Error::config(format!(
                "positions {position}..{} are asked for, an epoch has 0..{positions}",
                position.saturating_add(n)
            )));
        }
        let rows: Vec<Row> = (position..position + n).map(Row::Position).collect();
        core.compute_alone(epoch, position / core.grouping.global_batch(), &rows)
    }

    /// What rank `rank` of `world_size` gets at `step` of `epoch`, under this loader's batch size and remainder rule.
    pub fn batch_at(&self, epoch: u64, step: u64, rank: u64, world_size: u64) -> Result<Arc<Batch>> {
        let core = &self.core;
        core.check_process()?;
        if rank >= world_size {
            return Err(Error::config(format!("`rank` must be below `world_size`: found rank {rank} of {world_size}")));
        }
        let grouping = Grouping { rank, world_size, ..core.grouping };
        let steps = grouping.steps(core.positions());
        if step >= steps {
            return Err(Error::config(format!(
                "step {step} is asked for, an epoch has {steps} for {world_size} ranks"
            )));
        }
        let rows = grouping.rows(step * grouping.global_batch(), core.positions());
        core.compute_alone(epoch, step, &rows)
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        let core = &self.core;
        let (decoded_blocks, decoded_bytes) = core.reader.cache().decoded();
        Stats {
            decoded_blocks,
            decoded_bytes,
            cache_bytes: core.reader.cache().used_bytes(),
            buffer_bytes: core.pool.held_bytes() as u64,
            ..core.counters.snapshot()
        }
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

impl Loader {
    /// What an epoch of these settings comes to and costs. Reads no token; takes about a second at most.
    pub fn plan(&self) -> Result<Plan> {
        let core = &self.core;
        let (config, reader) = (&core.config, &core.reader);
        let (layout, corpus) = (reader.layout(), reader.corpus());
        let source = plan::Source {
            sequences: layout.num_sequences(),
            tail_tokens: layout.tail_tokens(),
            arrangement: core.arrangement,
            order: core.order(0),
            grouping: core.grouping,
            row: &|sequence| layout.row(sequence),
            place: &|at| reader.place(at),
            cache_bytes: reader.cache().budget_bytes(),
            tokens: corpus.tokens(),
            stream_tokens: layout.stream_len(),
            most_rows: plan::MOST_ROWS,
        };
        let (mut decoded_bytes, mut largest_block) = (0, 0);
        for block in corpus.block_metas() {
            decoded_bytes += block.decoded_bytes;
            largest_block = block.decoded_bytes.max(largest_block);
        }
        let batch_bytes = BatchLayout::largest_bytes(config) as u64;
        Ok(Plan {
            epoch: EpochPlan::new(
                &core.grouping,
                source.sequences,
                source.tail_tokens,
                source.stream_tokens,
                config.seq_len,
            ),
            memory: MemoryPlan {
                batch_bytes,
                batches_bytes: (config.prefetch_batches + 1) * batch_bytes,
                held_blocks_bytes: config.num_threads.unwrap_or(1) * largest_block,
                cache_bytes: source.cache_bytes.min(decoded_bytes),
                index_bytes: reader.index_bytes(),
                budget_bytes: config.memory_budget,
            },
            source: SourcePlan {
                shards: corpus.shards().len() as u64,
                blocks: corpus.blocks().len() as u64,
                documents: corpus.documents(),
                tokens: source.tokens,
                stream_tokens: source.stream_tokens,
                sequences: source.sequences,
                tail_tokens: source.tail_tokens,
                arrangement: source.arrangement,
                displacement: source.displacement(),
                neighbours: source.neighbours(),
                decoding: if corpus.access() == Access::Block { Some(source.decoding()?) } else { None },
            },
        })
    }
}

impl Core {
    fn open(mut config: Config, source: impl FnOnce(usize, usize) -> Arc<dyn Source>) -> Result<Self> {
        config.validate()?;
        let threads = *config.num_threads.get_or_insert_with(environment::default_threads);
        let rank = *config.dp_rank.get_or_insert(0);
        let world_size = *config.dp_world_size.get_or_insert(1);

        let options =
            OpenOptions { token_column: config.token_column.clone(), io: config.io, block_tokens: config.block_tokens };
        // Scoped, so that its threads have ended when opening has.
        let corpus = rayon::ThreadPoolBuilder::new()
            .num_threads(threads as usize)
            .thread_name(|index| format!("forebay-open-{index}"))
            .build_scoped(|thread| thread.run(), |pool| Corpus::open(&config.data, config.format, &options, pool))
            .map_err(|error| Error::new(ErrorKind::Io, "cannot start threads for opening shards").with_source(error))?;
        let corpus = Arc::new(corpus?);

        config.shuffle = match (config.shuffle, corpus.access()) {
            (Shuffle::On, Access::Random) => Shuffle::Global,
            (Shuffle::On, Access::Block) => Shuffle::Block,
            (other, _) => other,
        };
        let specials = Specials { bos: config.bos_id, eos: config.eos_id };
        let layout = Concat::new(corpus.block_metas(), specials, config.seq_len, config.row_tokens());
        let sequences = layout.num_sequences();
        let arrangement = match config.shuffle {
            Shuffle::Off | Shuffle::On => Arrangement::Sequential,
            Shuffle::Global => Arrangement::Global,
            Shuffle::Block => {
                Arrangement::block(sequences, config.seq_len, config.chunk_tokens, config.window_tokens, config.lanes)
            }
        };
        let grouping = Grouping { batch_size: config.batch_size, rank, world_size, remainder: config.remainder };
        grouping.check(grouping.positions(sequences, layout.tail_tokens() > 0))?;

        let batch_bytes = BatchLayout::largest_bytes(&config);
        let in_flight = config.prefetch_batches + 1;
        let cache_bytes = cache_budget(&config, &corpus, threads, in_flight * batch_bytes as u64)?;
        let warnings = window_warning(&config, &corpus, &grouping, cache_bytes).into_iter().collect();
        let content = content_of(&config, corpus.fingerprint(), sequences);
        Ok(Self {
            reader: Reader::new(corpus, layout, specials, cache_bytes),
            grouping,
            arrangement,
            content,
            warnings,
            pool: source(batch_bytes, in_flight as usize + 1),
            counters: Counters::new(threads as usize),
            cursor: Mutex::new(Cursor { epoch: 0, position: 0, continues: true, named: false, run: u64::MAX }),
            next_run: AtomicU64::new(0),
            cold: AtomicBool::new(true),
            process: std::process::id(),
            config,
        })
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
    fn positions(&self) -> u64 {
        let layout = self.reader.layout();
        self.grouping.positions(layout.num_sequences(), layout.tail_tokens() > 0)
    }

    /// Positions that a state of any remainder rule may have reached, padding included.
    fn most_positions(&self) -> u64 {
        // The last global batch of the run that saved it may have been padded; how far is not known here.
        self.reader.layout().num_sequences().saturating_add(1 << 32)
    }

    /// The batch of `rows`, in memory of its own.
    fn compute_alone(&self, epoch: u64, step: u64, rows: &[Row]) -> Result<Arc<Batch>> {
        let order = self.order(epoch);
        let layout = BatchLayout::new(&self.config, rows.len(), self.has_padding(rows));
        let source: Arc<dyn Source> = Arc::new(Pool::new(layout.bytes, 0));
        let lease = Lease::new(&source, layout.bytes);
        let batch = self.compute(&order, epoch, step, rows, layout, lease, &mut Worker::default())?;
        Ok(Arc::new(batch))
    }

    fn order(&self, epoch: u64) -> EpochOrder {
        EpochOrder::new(self.reader.layout().num_sequences(), self.arrangement, self.config.seed, epoch)
    }

    /// Whether a row holds fewer tokens than it has places.
    fn has_padding(&self, rows: &[Row]) -> bool {
        let full = self.reader.layout().num_sequences();
        self.grouping.remainder != Remainder::Wrap
            && rows.iter().any(|row| !matches!(row, Row::Position(position) if *position < full))
    }

    #[allow(clippy::too_many_arguments)] // each is a different fact about the one batch
    fn compute(
        &self,
        order: &EpochOrder,
        epoch: u64,
        step: u64,
        rows: &[Row],
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
                    self.fill_row(order, *row, ids, worker)?;
                }
                Kind::InPlace => {
                    let places = rows.len() * seq_len;
                    // Labels begin at a multiple of the alignment, in the same buffer of 64-bit integers.
                    let labels_at = layout.targets_at / 8;
                    let (ids, labels) = lease.i64s(0, labels_at + places).split_at_mut(labels_at);
                    let at = index * seq_len..(index + 1) * seq_len;
                    let (ids, labels) = (&mut ids[at.clone()], &mut labels[at]);
                    let filled = self.fill_row(order, *row, ids, worker)?;
                    labels[..filled].copy_from_slice(&ids[..filled]);
                    labels[filled..].fill(IGNORED_LABEL);
                }
                Kind::Apart => {
                    let mut ids = std::mem::take(&mut worker.row);
                    ids.resize(row_tokens, 0);
                    let filled = self.fill_row(order, *row, &mut ids, worker)?;
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
        Ok(Batch { epoch, step, rows: rows.len(), fields: layout.fields, lease })
    }

    /// Asks for what batch `number` of a pass, at position `start`, will read: always while files are cold, and else now and then, to notice
    /// that they have become so.
    fn read_ahead(&self, order: &EpochOrder, number: u64, start: u64) {
        let cold = self.cold.load(Ordering::Relaxed);
        if !cold && !number.is_multiple_of(LOOK_EVERY) {
            return;
        }
        let full = self.reader.layout().num_sequences();
        let mut asked = false;
        for row in self.grouping.rows(start, self.positions()) {
            if let Row::Position(position) = row
                && position < full
            {
                asked |= self.reader.read_ahead(self.reader.layout().row(order.sequence_at(position)));
            }
        }
        if asked != cold {
            self.cold.store(asked, Ordering::Relaxed);
        }
    }

    /// Writes the tokens of one row; the places after them hold `pad_id`. Returns how many are tokens.
    fn fill_row(&self, order: &EpochOrder, row: Row, ids: &mut [i64], worker: &mut Worker) -> Result<usize> {
        let layout = self.reader.layout();
        let full = layout.num_sequences();
        let Row::Position(position) = row else {
            ids.fill(i64::from(self.config.pad_id));
            return Ok(0);
        };
        let sequence = if position < full { order.sequence_at(position) } else { full };
        let range = layout.row(sequence);
        let filled = (range.end - range.start) as usize;
        let (tokens, mut rest) = ids.split_at_mut(filled);
        let ends_chunk = position < full && order.ends_chunk(sequence);
        self.reader.fill(range, ends_chunk, tokens, &mut worker.scratch)?;
        if self.grouping.remainder == Remainder::Wrap {
            while !rest.is_empty() {
                let take = (rest.len() as u64).min(layout.stream_len()) as usize;
                let (part, after) = rest.split_at_mut(take);
                self.reader.fill(0..take as u64, false, part, &mut worker.scratch)?;
                rest = after;
            }
            return Ok(ids.len());
        }
        rest.fill(i64::from(self.config.pad_id));
        Ok(filled)
    }
}

/// Memory and times of one worker.
#[derive(Debug, Default)]
struct Worker {
    index: usize,
    scratch: Scratch,
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
            row_stride,
        };
        if kind == Kind::Overlapping {
            let fields = vec![field(inputs, Dtype::I64, 0, columns + 1), field(targets, Dtype::I64, 8, columns + 1)];
            return Self { kind, fields, input_dtype, targets_at: 8, bytes: rows * (columns + 1) * 8 };
        }
        let targets_at = (rows * columns * input_dtype.size()).next_multiple_of(ALIGNMENT);
        let fields = vec![field(inputs, input_dtype, 0, columns), field(targets, Dtype::I64, targets_at, columns)];
        Self { kind, fields, input_dtype, targets_at, bytes: targets_at + rows * columns * 8 }
    }

    /// Bytes that hold any batch of `config`.
    fn largest_bytes(config: &Config) -> usize {
        let rows = config.batch_size as usize;
        let may_pad = matches!(config.remainder, Remainder::Pad | Remainder::Short);
        let padded = if may_pad { Self::new(config, rows, true).bytes } else { 0 };
        Self::new(config, rows, false).bytes.max(padded)
    }
}

/// Bytes for the block cache: the budget less batches in flight and the blocks that workers hold while they fill from them.
fn cache_budget(config: &Config, corpus: &Corpus, threads: u64, batches: u64) -> Result<u64> {
    let largest = corpus.block_metas().map(|block| block.decoded_bytes).max().unwrap_or(0);
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
fn window_warning(config: &Config, corpus: &Corpus, grouping: &Grouping, cache_bytes: u64) -> Option<String> {
    let total: u64 = corpus.block_metas().map(|block| block.decoded_bytes).sum();
    let largest = corpus.block_metas().map(|block| block.decoded_bytes).max().unwrap_or(0);
    let windows = match config.shuffle {
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
    };
    (windows > cache_bytes).then(|| {
        format!(
            "blocks will be decoded several times: shuffling draws from about {} MiB of them and `memory_budget` leaves {} MiB; raise it, or lower \
             `window_tokens` or `lanes`",
            windows >> 20,
            cache_bytes >> 20
        )
    })
}

/// What a state belongs to. Settings that do not take part in an order are not compared, so they read 0.
fn content_of(config: &Config, fingerprint: &str, sequences: u64) -> Vec<(&'static str, StateValue)> {
    let special = |id: Option<u32>| id.map_or(StateValue::from("none"), |id| u64::from(id).into());
    let block = config.shuffle == Shuffle::Block;
    let in_block = |value: u64| StateValue::from(if block { value } else { 0 });
    vec![
        ("order", order::VERSION.into()),
        ("fingerprint", fingerprint.into()),
        ("sequences", sequences.into()),
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
        ("chunk_tokens", in_block(config.chunk_tokens)),
        ("window_tokens", in_block(config.window_tokens)),
        ("lanes", in_block(config.lanes)),
    ]
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
    /// Position of the first batch.
    position: u64,
    delivered: AtomicU64,
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
        let taken = started.pipeline.take(timeout, |_| {
            let delivered = started.delivered.fetch_add(1, Ordering::Relaxed) + 1;
            let mut cursor = lock(&core.cursor);
            if cursor.run == run.id {
                cursor.position = started.position + delivered * core.grouping.global_batch();
            }
        })?;
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
        let positions = core.positions();
        let (epoch, position) = {
            let mut cursor = lock(&core.cursor);
            let continued = cursor.continues && core.grouping.steps(positions.saturating_sub(cursor.position)) > 0;
            let stays = cursor.continues && (cursor.named || cursor.position == 0);
            let (epoch, position) =
                if continued || stays { (cursor.epoch, cursor.position) } else { (cursor.epoch + 1, 0) };
            *cursor = Cursor { epoch, position, continues: false, named: false, run: self.id };
            (epoch, position)
        };
        let order = core.order(epoch);
        let items = core.grouping.steps(positions.saturating_sub(position));
        let threads = core.config.num_threads.unwrap_or(1) as usize;
        let plan = pipeline::Plan {
            threads: threads.min(items.max(1) as usize),
            window: core.config.prefetch_batches as usize,
            items,
            leased: self.external,
        };
        let ahead = if core.reader.reads_ahead() { WINDOWS_AHEAD.div_ceil(core.config.batch_size) } else { 0 };
        let workers = AtomicUsize::new(0);
        let begin = move || Worker { index: workers.fetch_add(1, Ordering::Relaxed), ..Worker::default() };
        let compute = {
            let core = Arc::clone(core);
            move |worker: &mut Worker, number: u64, lease: Option<Lease>| {
                let began = Instant::now();
                let start = position + number * core.grouping.global_batch();
                if ahead > 0 {
                    let first = if number == 0 { 1 } else { ahead };
                    for distance in first..=ahead {
                        let start = start + distance * core.grouping.global_batch();
                        core.read_ahead(&order, number + distance, start);
                    }
                }
                let rows = core.grouping.rows(start, positions);
                let layout = BatchLayout::new(&core.config, rows.len(), core.has_padding(&rows));
                let lease = lease.unwrap_or_else(|| Lease::new(&core.pool, BatchLayout::largest_bytes(&core.config)));
                let step = start / core.grouping.global_batch();
                let batch = core.compute(&order, epoch, step, &rows, layout, lease, worker)?;
                let decode = Duration::from_nanos(std::mem::take(&mut worker.scratch.decode_nanos));
                core.counters.worked(worker.index, decode, began.elapsed().saturating_sub(decode));
                Ok(Arc::new(batch))
            }
        };
        let pipeline = Pipeline::start(plan, begin, compute)?;
        Ok(Started { pipeline, position, delivered: AtomicU64::new(0) })
    }
}
