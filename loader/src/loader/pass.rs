//! A pass: the epochs of some epochs on its way through the threads to whoever asks for batches.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::compute::Worker;
use super::{Core, Cursor, FIRST_AHEAD, TOKENS_AHEAD, WINDOWS_AHEAD, slots_into};
use crate::buffer::Lease;
use crate::corpus::Corpus;
use crate::error::{Error, ErrorKind, Result};
use crate::loader::sources::Growth;
use crate::observe::trace::Tracer;
use crate::order::epochs::EpochChain;
use crate::pipeline::{Pipeline, Plan, Taken, WaitPolicy, Work};
use crate::proof::delivery_log::{self, LoggedBatch};
use crate::read::Prepared;
use crate::settings::Epochs;
use crate::storage::local;
use crate::sync::lock;

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

/// A pass over one epoch. Cheap to clone; clones share the pass, so that several threads can consume it.
#[derive(Clone, Debug)]
pub struct Batches {
    pub(super) run: Arc<Run>,
}

impl Batches {
    /// Waits at most `timeout` for the next batch. Callable from several threads; each batch is given once.
    ///
    /// Without worker threads (`num_threads` = 0) the caller computes it, however long that takes.
    pub fn next_timeout(&self, timeout: Duration) -> Result<Next> {
        self.take(WaitPolicy::Wait(timeout))
    }

    /// As [`Batches::next_timeout`], but while the batch is not ready the caller computes one itself where that is quicker than waiting;
    /// that may take as long as a batch takes.
    pub fn next_or_help(&self, timeout: Duration) -> Result<Next> {
        self.take(WaitPolicy::Help(timeout))
    }

    /// The next batch if it is ready, and [`Next::Pending`] if it is not, or if handing it over would read or write a file.
    pub fn try_next(&self) -> Result<Next> {
        match self.run.started.get() {
            Some(Ok(started)) if started.delivery_log.is_none() && self.run.core.trace.is_none() => {
                self.take(WaitPolicy::None)
            }
            _ => Ok(Next::Pending),
        }
    }

    fn take(&self, patience: WaitPolicy) -> Result<Next> {
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
        if let Some(delivery_log) = &started.delivery_log {
            lock(delivery_log).check()?;
        }
        let mut written = Ok(());
        let taken = started.pipeline.take(patience, |batch| {
            // Takers come here one at a time.
            let delivered = started.delivered.load(Ordering::Relaxed) + 1;
            let index = started.heading.start.saturating_add(delivered * core.grouping.global_batch());
            let end = started.heading.epochs.state_at(index);
            written = started.write_delivery_log(batch, end);
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
        if let Some(trace) = &core.trace {
            let (name, batch) = match &taken {
                Taken::Item(batch, 0) => ("wait", Some(batch.step)),
                Taken::Item(batch, _) => ("hand over", Some(batch.step)),
                Taken::End | Taken::Pending => ("wait", None),
            };
            trace.span(name, asked, batch);
            if matches!(taken, Taken::End) {
                trace.flush();
            }
        }
        match taken {
            Taken::Item(batch, depth) => {
                let tokens = batch.rows as u64 * core.config.seq_len;
                core.counters.delivered(tokens, batch.len_bytes() as u64, asked, depth);
                Ok(Next::Batch(batch))
            }
            Taken::End => Ok(Next::End),
            Taken::Pending => {
                if patience != WaitPolicy::None {
                    core.counters.waited(asked);
                }
                Ok(Next::Pending)
            }
        }
    }

    /// Bytes that a submitted buffer must have.
    pub fn batch_bytes(&self) -> usize {
        self.run.core.batch_bytes
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

#[derive(Debug)]
pub(super) struct Run {
    pub(super) core: Arc<Core>,
    pub(super) id: u64,
    pub(super) external: bool,
    pub(super) started: OnceLock<Result<Started>>,
    /// Buffers submitted before the start, in order.
    pub(super) submitted: Mutex<Vec<Lease>>,
}

#[derive(Debug)]
pub(super) struct Started {
    pipeline: Pipeline<Job>,
    heading: Arc<PassRange>,
    delivered: AtomicU64,
    delivery_log: Option<Mutex<delivery_log::LogWriter>>,
}

/// Where a pass goes.
#[derive(Debug)]
pub(super) struct PassRange {
    pub(super) epochs: EpochChain,
    pub(super) growth: Growth,
    /// Index of its first row.
    pub(super) start: u64,
}

impl Run {
    pub(super) fn close(&self) {
        let closed = || Err(Error::new(ErrorKind::Closed, "the loader was closed"));
        if let Ok(started) = self.started.get_or_init(closed) {
            started.pipeline.close();
            started.pipeline.join();
        }
        lock(&self.submitted).clear();
        if let Some(trace) = &self.core.trace {
            trace.flush();
        }
    }

    fn start(&self) -> Result<Started> {
        let core = &self.core;
        let (epochs, growth, start) = {
            let mut cursor = lock(&core.cursor);
            let mut epochs = core.epoch_chain(&cursor.growth, cursor.epoch);
            let mut start = epochs.index_of(cursor.epoch, cursor.position);
            let left = |start: u64, epochs: &EpochChain| core.steps_from(start, epochs) > 0;
            let continued = cursor.continues && left(start, &epochs);
            let stays = cursor.continues && (cursor.named || (cursor.position == 0 && start == 0));
            let endless = epochs.len().is_none();
            if !(continued || stays || endless) {
                let next = match core.config.epochs {
                    Epochs::Count(count) => cursor.epoch - cursor.epoch % count + count,
                    Epochs::Endless => cursor.epoch + 1,
                };
                epochs = core.epoch_chain(&cursor.growth, next);
                start = 0;
            }
            core.check_epoch(cursor.epoch)?;
            if let Some(end) = epochs.len() {
                core.grouping.check(end.saturating_sub(start))?;
            }
            let (epoch, position) = epochs.state_at(start);
            let growth = cursor.growth.clone();
            *cursor = Cursor { growth: growth.clone(), epoch, position, continues: false, named: false, run: self.id };
            (epochs, growth, start)
        };
        let items = core.steps_from(start, &epochs);
        let decodes = core.sources.list().iter().any(|source| source.reader.decodes());
        // Likely, a pass over the next epochs follows.
        let next = epochs.end_epoch().filter(|epoch| decodes && core.check_epoch(*epoch).is_ok());
        let following =
            next.map(|epoch| PassRange { epochs: core.epoch_chain(&growth, epoch), growth: growth.clone(), start: 0 });
        let beyond = following.as_ref().map_or(0, |following| core.steps_from(0, &following.epochs).min(LOOK_BEYOND));
        let heading = Arc::new(PassRange { epochs, growth, start });
        let threads = core.threads();
        let plan = Plan {
            threads: threads.min(usize::try_from(items.max(1)).unwrap_or(usize::MAX)),
            window: core.config.prefetch_batches as usize,
            items,
            leased: self.external,
        };
        let reads_ahead = core.sources.list().iter().any(|source| source.reader.reads_ahead());
        let batches_of = |windows: u64| if reads_ahead { windows.div_ceil(core.config.batch_size) } else { 0 };
        let windows_ahead = (TOKENS_AHEAD / core.config.seq_len).clamp(FIRST_AHEAD, WINDOWS_AHEAD);
        // Each lane enters another window in that time.
        let window = core.config.window_tokens / core.config.seq_len;
        let batches = window.div_ceil(core.grouping.global_batch()).clamp(8, 4096);
        let job = Job {
            core: Arc::clone(core),
            heading: Arc::clone(&heading),
            ahead: batches_of(FIRST_AHEAD)..=batches_of(windows_ahead),
            items,
            decoded_ahead: if decodes && threads > 0 { batches } else { 0 },
            following,
            end: items.saturating_add(beyond),
            looked_at: AtomicU64::new(0),
        };
        // A block lies in two windows at most, of which each rank reads its part.
        let ranks = core.grouping.global_batch() / core.config.batch_size;
        let done_after = 2 * core.config.window_tokens.div_ceil(ranks);
        core.cache.begin_pass(items, done_after);
        let pipeline = Pipeline::start(plan, job)?;
        let delivery_log = core.begin_delivery_log(&heading)?.map(Mutex::new);
        Ok(Started { pipeline, heading, delivered: AtomicU64::new(0), delivery_log })
    }
}

/// The batches of a pass, by their number.
struct Job {
    core: Arc<Core>,
    heading: Arc<PassRange>,
    /// Batches whose windows are read ahead, from the first batch on and later.
    ahead: RangeInclusive<u64>,
    /// How many there are.
    items: u64,
    /// Batches whose blocks are decoded ahead.
    decoded_ahead: u64,
    /// Its first batches count on after the last one of this pass where blocks are decoded ahead.
    following: Option<PassRange>,
    /// One past the last of these.
    end: u64,
    /// The first batch that some block may be missing of. Written and read by workers; a stale value costs a second look.
    looked_at: AtomicU64,
}

/// Batches looked at before a worker asks again whether there is one to be computed.
const LOOK_AT_ONCE: u64 = 32;

/// Batches of a pass that may follow for which blocks are decoded: all lanes have a row in them, mostly.
const LOOK_BEYOND: u64 = 8;

impl Job {
    /// Batches from `next` on are not begun.
    fn reached(&self, next: u64) {
        if self.core.cache.reached(next.saturating_sub(self.core.config.prefetch_batches)) {
            self.looked_at.store(next, Ordering::Relaxed);
        }
    }

    /// Decodes a block that batch `number` will read, and nobody has.
    fn decode_ahead(&self, number: u64, worker: &mut Worker) -> Result<Prepared> {
        let (heading, past) = match (&self.following, number.checked_sub(self.items)) {
            (Some(following), Some(past)) => (following, past),
            _ => (&*self.heading, number),
        };
        self.core.decode_ahead(heading, heading.start + past * self.core.grouping.global_batch(), number, worker)
    }
}

impl Work for Job {
    type State = Worker;
    type Item = Arc<Batch>;

    fn begin(&self, worker: Option<usize>) -> Worker {
        if worker.is_some() {
            self.core.placement.apply();
        }
        if worker == Some(0) {
            // Others, and the consumer, need not wait for it as long as there is room.
            let corpora = self.core.sources.list().iter().map(|source| source.reader.corpus());
            local::make_room_for(corpora.map(Corpus::most_open).sum());
        }
        let mut state = Worker { index: worker.unwrap_or(self.core.threads()), ..Worker::default() };
        state.scratch.tracer = Tracer::new(self.core.trace.as_ref());
        state
    }

    fn compute(&self, worker: &mut Worker, number: u64, lease: Option<Lease>) -> Result<Arc<Batch>> {
        let (core, heading) = (&*self.core, &*self.heading);
        let began = Instant::now();
        let global_batch = core.grouping.global_batch();
        let index = heading.start + number * global_batch;
        let traced = worker.scratch.tracer.begin();
        if *self.ahead.end() > 0 {
            // One batch further with each, so that the first of a pass does not wait for so much.
            let reach = |number: u64| (self.ahead.start() + number).min(*self.ahead.end());
            let first = number.checked_sub(1).map_or(1, reach);
            for distance in (first..=reach(number)).take_while(|distance| number + distance < self.items) {
                core.read_ahead(heading, number + distance, index + distance * global_batch, worker);
            }
            worker.scratch.tracer.end("read ahead", traced, None);
        }
        if self.decoded_ahead > 0 && number >= self.looked_at.load(Ordering::Relaxed) {
            self.reached(number);
            // Before the rows, so that threads whose batches need the same blocks decode different ones.
            while let Ok(Prepared::Decoded) = self.decode_ahead(number, worker) {}
        }
        let start = slots_into(core.grouping, &heading.epochs, index, &mut worker.slots);
        let mut rows = std::mem::take(&mut worker.places);
        core.places(&heading.growth, &worker.slots, &mut worker.orders, &mut rows);
        let lease = lease.unwrap_or_else(|| Lease::new(&core.pool, core.batch_bytes));
        let filling = worker.scratch.tracer.begin();
        let batch = core.compute(start, index / global_batch, &rows, lease, worker);
        worker.scratch.tracer.end("fill", filling, None);
        worker.scratch.tracer.end("batch", traced, Some(index / global_batch));
        worker.places = rows;
        let decode = Duration::from_nanos(std::mem::take(&mut worker.scratch.decode_nanos));
        core.counters.worked(worker.index, decode, began.elapsed().saturating_sub(decode));
        batch.map(Arc::new)
    }

    fn waited(&self, worker: &mut Worker, began: Instant, ended: Instant) {
        worker.scratch.tracer.add("idle", began, ended);
    }

    fn prepare(&self, worker: &mut Worker, next: u64) -> bool {
        if self.decoded_ahead == 0 {
            return false;
        }
        let end = next.saturating_add(self.decoded_ahead).min(self.end);
        self.reached(next);
        let start = self.looked_at.load(Ordering::Relaxed).max(next);
        for number in start..end.min(start + LOOK_AT_ONCE) {
            match self.decode_ahead(number, worker) {
                Ok(Prepared::Decoded) => {
                    let decode = Duration::from_nanos(std::mem::take(&mut worker.scratch.decode_nanos));
                    self.core.counters.worked(worker.index, decode, Duration::ZERO);
                    return true;
                }
                Ok(Prepared::Full) => return false,
                // What fails here fails again in its place.
                Ok(Prepared::Nothing) | Err(_) => self.looked_at.fetch_max(number + 1, Ordering::Relaxed),
            };
        }
        start < end
    }
}

impl Started {
    /// Writes the line of a batch that is about to be handed over.
    fn write_delivery_log(&self, batch: &Batch, end: (u64, u64)) -> Result<()> {
        let Some(delivery_log) = &self.delivery_log else { return Ok(()) };
        let checksum = batch.checksum.ok_or_else(|| Error::new(ErrorKind::Internal, "a batch was not hashed"))?;
        lock(delivery_log).write(&LoggedBatch { start: (batch.epoch, batch.position), end, checksum })
    }
}
