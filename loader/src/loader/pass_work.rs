//! Computes the batches of a pass by number, and looks ahead for later batches.
//!
//! A worker without a batch to compute decodes blocks for later batches, in the order in which
//! these need them. Before a batch is computed, the worker asks the system for the windows of
//! batches some way ahead.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::compute::WorkerMemory;
use super::open::drawn_tokens;
use super::pass::PassRange;
use super::served::{ServedMemory, ServedWork};
use super::session::Session;
use crate::buffer::Lease;
use crate::corpus::Corpus;
use crate::error::Result;
use crate::layout::Segment;
use crate::observe::slow_reads::LONG;
use crate::observe::trace::Tracer;
use crate::order::partition::Grouping;
use crate::pipeline::Work;
use crate::read::Prepared;
use crate::settings::Config;
use crate::storage::local;

/// Number of windows read ahead from the first batch on, if files are not in memory.
const FIRST_AHEAD: u64 = 64;

/// Number of small windows read ahead later on. This many keep the queue of a disk full.
const WINDOWS_AHEAD: u64 = 256;

/// Most tokens of all windows read ahead after the first batches.
const TOKENS_AHEAD: u64 = 8 << 20;

/// Number of batches examined before a worker asks again for a batch to compute.
const LOOK_AT_ONCE: u64 = 32;

/// Number of batches of the following pass whose blocks are decoded. In most runs, all lanes have a
/// row in them.
const LOOK_BEYOND: u64 = 8;

/// Number of batches whose blocks are decoded ahead. In so many batches, each lane enters another
/// window. 0 without workers.
pub(super) fn decoded_ahead(config: &Config, grouping: Grouping) -> u64 {
    let window = config.window_tokens / config.seq_len;
    let batches = window.div_ceil(grouping.global_batch()).clamp(8, 4096);
    if config.num_threads == Some(0) { 0 } else { batches }
}

/// Number of tokens of a source that a rank reads while its rows go through two windows.
///
/// A block lies in two windows at most, and each rank reads its part of them.
pub(super) fn done_after(config: &Config, grouping: Grouping) -> u64 {
    2 * drawn_tokens(config).div_ceil(grouping.world_size)
}

/// The batches of a pass, computed in this process or by a service.
pub(super) enum BatchWork {
    Here(PassWork),
    Served(ServedWork),
}

/// Memory of a thread for [`BatchWork`].
pub(super) enum ThreadMemory {
    Here(Box<WorkerMemory>),
    Served(ServedMemory),
}

impl Work for BatchWork {
    type State = ThreadMemory;
    type Item = Arc<Batch>;

    fn begin(&self, worker: Option<usize>) -> ThreadMemory {
        match self {
            Self::Here(work) => ThreadMemory::Here(Box::new(work.begin(worker))),
            Self::Served(work) => ThreadMemory::Served(work.begin(worker)),
        }
    }

    fn compute(&self, memory: &mut ThreadMemory, number: u64, lease: Option<Lease>) -> Result<Arc<Batch>> {
        match (self, memory) {
            (Self::Here(work), ThreadMemory::Here(memory)) => work.compute(memory, number, lease),
            (Self::Served(work), ThreadMemory::Served(memory)) => work.compute(memory, number, lease),
            _ => unreachable!("`begin` makes the memory"),
        }
    }

    fn waited(&self, memory: &mut ThreadMemory, began: Instant, ended: Instant) {
        if let (Self::Here(work), ThreadMemory::Here(memory)) = (self, memory) {
            work.waited(memory, began, ended);
        }
    }

    fn prepare(&self, memory: &mut ThreadMemory, next: u64) -> bool {
        match (self, memory) {
            (Self::Here(work), ThreadMemory::Here(memory)) => work.prepare(memory, next),
            _ => false,
        }
    }
}

/// The batches of a pass, by their number.
pub(super) struct PassWork {
    session: Arc<Session>,
    range: Arc<PassRange>,
    /// Number of batches whose windows are read ahead: at the first batch, and later on.
    ahead: RangeInclusive<u64>,
    /// Number of batches in the pass.
    items: u64,
    /// Number of parts of a batch. The rows of a part are stored together.
    parts: usize,
    /// Number of batches whose blocks are decoded ahead.
    decoded_ahead: u64,
    /// The pass that probably follows, if blocks are decoded ahead. Its first batches continue the
    /// numbers of this pass.
    following: Option<PassRange>,
    /// The number after the last of these batches.
    end: u64,
    /// The first batch that may miss a block. Workers write and read it. A stale value costs a
    /// second look.
    looked_at: AtomicU64,
}

impl PassWork {
    pub(super) fn new(session: &Arc<Session>, range: &Arc<PassRange>, parts: u64, items: u64) -> Self {
        let (config, grouping) = (&session.config, session.grouping);
        let sources = session.opened.sources.list();
        let decodes = sources.iter().any(|source| source.reader().decodes());
        let next = range.epochs.end_epoch().filter(|epoch| decodes && session.check_epoch(*epoch).is_ok());
        let following = next.map(|epoch| {
            let growth = range.growth.clone();
            PassRange { epochs: session.epoch_chain(&growth, epoch), growth, start: 0 }
        });
        let beyond =
            following.as_ref().map_or(0, |following| session.steps_from(0, &following.epochs).min(LOOK_BEYOND));
        let reads_ahead = sources.iter().any(|source| source.reader().reads_ahead());
        let batches_of = |windows: u64| if reads_ahead { windows.div_ceil(config.batch_size) } else { 0 };
        let windows_ahead = (TOKENS_AHEAD / config.seq_len).clamp(FIRST_AHEAD, WINDOWS_AHEAD);
        let begins_at = session.global_position(range, range.start);
        session.opened.cache.begin_pass(session.in_cache, begins_at, done_after(config, grouping));
        Self {
            session: Arc::clone(session),
            range: Arc::clone(range),
            ahead: batches_of(FIRST_AHEAD)..=batches_of(windows_ahead),
            items,
            parts: parts as usize,
            decoded_ahead: if decodes { decoded_ahead(config, grouping) } else { 0 },
            following,
            end: items.saturating_add(beyond),
            looked_at: AtomicU64::new(0),
        }
    }

    /// Notes that batches from `next` on have not begun.
    fn reached(&self, next: u64) {
        let session = &self.session;
        let done = next.saturating_sub(session.config.prefetch_batches) * session.grouping.global_batch();
        let position = session.global_position(&self.range, self.range.start + done);
        if session.opened.cache.reached(session.in_cache, position) {
            self.looked_at.store(next, Ordering::Relaxed);
        }
    }

    /// Decodes a block that batch `number` will read and that is not decoded yet.
    fn decode_ahead(&self, number: u64, worker: &mut WorkerMemory) -> Result<Prepared> {
        let (range, past) = match (&self.following, number.checked_sub(self.items)) {
            (Some(following), Some(past)) => (following, past),
            _ => (&*self.range, number),
        };
        self.session.decode_ahead(range, range.start + past * self.session.grouping.global_batch(), worker)
    }
}

impl Work for PassWork {
    type State = WorkerMemory;
    type Item = Arc<Batch>;

    fn begin(&self, worker: Option<usize>) -> WorkerMemory {
        if worker.is_some() {
            self.session.placement.apply();
        }
        if worker == Some(0) {
            // Other workers and the consumer do not wait for this while the table has room.
            let corpora = self.session.opened.sources.list().iter().map(|source| source.reader().corpus());
            local::make_room_for(corpora.map(Corpus::most_open).sum());
        }
        let mut state = WorkerMemory { index: worker.unwrap_or(self.session.threads()), ..WorkerMemory::default() };
        state.scratch.tracer = Tracer::new(self.session.trace.as_ref());
        state
    }

    fn compute(&self, worker: &mut WorkerMemory, number: u64, lease: Option<Lease>) -> Result<Arc<Batch>> {
        let (session, range) = (&*self.session, &*self.range);
        let began = Instant::now();
        let global_batch = session.grouping.global_batch();
        let index = range.start + number * global_batch;
        session.slow_reads.begin(worker.index, began);
        let traced = worker.scratch.tracer.begin();
        if *self.ahead.end() > 0 {
            // The reach grows by one batch with each batch, so that the first batch does not wait
            // for many reads.
            let reach = |number: u64| (self.ahead.start() + number).min(*self.ahead.end());
            let first = number.checked_sub(1).map_or(1, reach);
            for distance in (first..=reach(number)).take_while(|distance| number + distance < self.items) {
                session.read_ahead(range, number + distance, index + distance * global_batch, worker);
            }
            worker.scratch.tracer.end("read ahead", traced, None);
        }
        if self.decoded_ahead > 0 && number >= self.looked_at.load(Ordering::Relaxed) {
            self.reached(number);
            // This comes before the rows. Threads whose batches need the same blocks then decode
            // different ones.
            while let Ok(Prepared::Decoded) = self.decode_ahead(number, worker) {}
        }
        let planned = session.plan_batch(&range.growth, session.grouping, &range.epochs, index, self.parts, worker);
        let start = planned.inspect_err(|_| {
            session.slow_reads.end(worker.index, Duration::ZERO, LONG);
        })?;
        let mut reads = std::mem::take(&mut worker.reads);
        let lease = lease.unwrap_or_else(|| Lease::new(&session.pool, session.batch_bytes));
        let filling = worker.scratch.tracer.begin();
        let parts = self.parts.max(1);
        let batch = session.compute_sound(start, index / global_batch, parts, &mut reads, lease, worker);
        worker.scratch.tracer.end("fill", filling, None);
        worker.scratch.tracer.end("batch", traced, Some(index / global_batch));
        let took = began.elapsed();
        if session.slow_reads.end(worker.index, took, LONG) {
            let first = |segments: &[Segment]| segments.first().map(|segment| segment.start);
            let places = reads.iter().filter_map(|(read, segments)| Some((read.source, first(segments)?)));
            session.tell_slow_batch(took.as_secs_f64(), places);
        }
        worker.reads = reads;
        let decode = Duration::from_nanos(std::mem::take(&mut worker.scratch.decode_nanos));
        session.counters.worked(worker.index, decode, took.saturating_sub(decode));
        batch.map(Arc::new)
    }

    fn waited(&self, worker: &mut WorkerMemory, began: Instant, ended: Instant) {
        worker.scratch.tracer.add("idle", began, ended);
    }

    fn prepare(&self, worker: &mut WorkerMemory, next: u64) -> bool {
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
                    self.session.counters.worked(worker.index, decode, Duration::ZERO);
                    return true;
                }
                Ok(Prepared::Full) => return false,
                // A block that fails here fails again at its batch.
                Ok(Prepared::Nothing) | Err(_) => self.looked_at.fetch_max(number + 1, Ordering::Relaxed),
            };
        }
        start < end
    }
}
