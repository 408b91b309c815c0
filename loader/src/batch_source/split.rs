//! Splits a batch source among several consumers. Consumer i of n gets every n-th row of its
//! batches.
//!
//! The consumers share one pass, with its threads, files and decoded blocks. The rows of each
//! consumer lie together in a batch's memory, so a part is handed over without a copy. A batch
//! stays until all consumers took their rows. A consumer that is `ahead` batches before the slowest
//! one waits for it. So no consumer starves, and memory stays bounded.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::{BatchPass, BatchSource, check_split};
use crate::error::{Error, ErrorKind, Result};
use crate::loader::state::State;
use crate::loader::{Batch, Field, FieldMemory, Next, PassOptions, WaitPolicy};
use crate::sync::{lock, wait_timeout};

/// Settings of a split.
#[derive(Clone, Copy, Debug)]
pub struct SplitOptions {
    /// Number of consumers.
    pub count: u64,
    /// Number of batches that a consumer may be before the slowest one. `None` means
    /// `prefetch_batches`.
    pub ahead: Option<u64>,
    /// Whether the caller submits the buffers of the batches.
    pub external: bool,
}

/// A source that several consumers share.
#[derive(Clone, Debug)]
pub struct Split {
    shared: Arc<Shared>,
}

/// The rows of one consumer in a batch.
#[derive(Clone, Debug)]
pub struct BatchPart {
    /// The whole batch, whose memory holds the rows.
    pub batch: Arc<Batch>,
    /// The arrays of these rows in the batch's memory.
    pub fields: Arc<[Field]>,
    /// Number of the consumer.
    pub part: usize,
    /// Number of rows of this part.
    pub rows: usize,
    /// Length of the longest span in these rows, where boundaries are asked for.
    pub max_seqlen: Option<u64>,
}

/// The outcome of a consumer's request for its next rows.
#[derive(Debug)]
pub enum NextPart {
    /// The next rows.
    Part(BatchPart),
    /// The pass is over.
    End,
    /// Nothing was ready in the given time; ask again.
    Pending,
    /// This consumer was told another epoch than the epoch of the other consumers' pass.
    OtherEpoch {
        /// The epoch that this consumer was told.
        told: u64,
        /// The epoch of the pass that it would join.
        epoch: u64,
    },
    /// Another consumer is so far behind that this consumer has to wait.
    Waiting {
        /// The slowest consumer.
        consumer: usize,
        /// Number of batches that it is behind.
        behind: u64,
    },
}

/// The pass of one consumer. A consumer belongs to one thread at a time.
#[derive(Debug)]
pub struct PartPass {
    shared: Arc<Shared>,
    consumer: usize,
    place: Mutex<PartPlace>,
}

#[derive(Clone, Copy, Debug, Default)]
struct PartPlace {
    /// The number of the shared pass, if that has begun.
    pass: Option<u64>,
    taken: u64,
    ended: bool,
}

#[derive(Debug)]
struct Shared {
    source: Arc<dyn BatchSource>,
    count: u64,
    ahead: u64,
    external: bool,
    inner: Mutex<Inner>,
    /// Consumers wait here for each other.
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    /// Passes that some consumer still takes batches from, by number.
    passes: BTreeMap<u64, DealtPass>,
    /// The state of the source at each place of a consumer. A place is a pass and the number of
    /// batches taken from it.
    states: BTreeMap<(u64, u64), State>,
    consumers: Vec<Consumer>,
}

#[derive(Debug)]
struct DealtPass {
    pass: Arc<dyn BatchPass>,
    /// The epoch of the pass. It is known if the first consumer was told it, or as soon as a batch
    /// shows it.
    epoch: Option<u64>,
    /// Batches that the source gave and some consumer lacks, by their place in the pass.
    batches: BTreeMap<u64, Arc<Batch>>,
    taken: u64,
    is_taking: bool,
    ended: bool,
}

#[derive(Debug, Default)]
struct Consumer {
    next_pass: u64,
    /// A pass, and the number of batches that the consumer took from it.
    at: (u64, u64),
    /// The epoch that this consumer was told for its next pass.
    told: Option<u64>,
    closed: bool,
    /// Passes that the consumer takes no more batches from.
    left: BTreeSet<u64>,
}

impl Consumer {
    /// Number of batches that the consumer took from a pass. `None` if it takes no more from that
    /// pass.
    fn place_in(&self, pass: u64) -> Option<u64> {
        if self.closed || self.left.contains(&pass) || self.at.0 > pass {
            return None;
        }
        Some(if self.at.0 == pass { self.at.1 } else { 0 })
    }
}

impl Split {
    /// Splits `source`. Refuses a number of consumers that does not divide the rows evenly.
    pub fn new(source: Arc<dyn BatchSource>, options: SplitOptions) -> Result<Self> {
        let SplitOptions { count, ahead, external } = options;
        let ahead = check_split(&*source, count, ahead)?;
        let consumers = (0..count).map(|_| Consumer::default()).collect();
        let inner = Mutex::new(Inner { passes: BTreeMap::new(), states: BTreeMap::new(), consumers });
        Ok(Self { shared: Arc::new(Shared { source, count, ahead, external, inner, changed: Condvar::new() }) })
    }

    /// Makes a new pass of a consumer. It begins, together with the other consumers' passes, at its
    /// first request for rows.
    pub fn iter(&self, consumer: usize) -> PartPass {
        assert!((consumer as u64) < self.shared.count, "consumer {consumer} of {}", self.shared.count);
        PartPass { shared: Arc::clone(&self.shared), consumer, place: Mutex::default() }
    }

    /// Sets the epoch of the consumer's next pass. Either all consumers are told the same epoch, or
    /// only the first one to begin is told.
    pub fn set_epoch(&self, consumer: usize, epoch: u64) {
        lock(&self.shared.inner).consumers[consumer].told = Some(epoch);
    }

    /// Tells whether the consumer would begin a pass of the source if it began a pass now.
    pub fn begins_pass(&self, consumer: usize) -> bool {
        let inner = lock(&self.shared.inner);
        !inner.passes.contains_key(&inner.consumers[consumer].next_pass)
    }

    /// Ends a consumer. The other consumers go on without it.
    pub fn close(&self, consumer: usize) {
        let mut inner = lock(&self.shared.inner);
        inner.consumers[consumer].closed = true;
        let ended = inner.let_go();
        self.shared.wake(inner, ended);
    }

    /// State after the last batch that every consumer has.
    pub fn state(&self) -> State {
        let inner = lock(&self.shared.inner);
        let found = inner.slowest().and_then(|slowest| inner.states.get(&slowest).cloned());
        found.unwrap_or_else(|| self.shared.source.state())
    }

    /// Records that the source was given another position. Every consumer continues there in its
    /// next pass.
    pub fn restored(&self) {
        let mut inner = lock(&self.shared.inner);
        let next = inner.consumers.iter().map(|consumer| consumer.next_pass).max().unwrap_or(0);
        for consumer in &mut inner.consumers {
            (consumer.next_pass, consumer.at) = (next, (next, 0));
        }
        inner.states.clear();
        let ended = inner.let_go();
        self.shared.wake(inner, ended);
    }
}

impl PartPass {
    /// Takes this consumer's rows of the next batch, and waits for them as `wait` says.
    pub fn take(&self, wait: WaitPolicy) -> Result<NextPart> {
        let place = *lock(&self.place);
        if place.ended {
            return Ok(NextPart::End);
        }
        let (timeout, helps) = match wait {
            WaitPolicy::None => (Duration::ZERO, false),
            WaitPolicy::Wait(timeout) => (timeout, false),
            WaitPolicy::Help(timeout) => (timeout, true),
        };
        // A timeout of centuries would overflow the clock. One day at a time serves as well as no
        // limit.
        let deadline = Instant::now() + timeout.min(Duration::from_secs(86_400));
        let pass = match place.pass {
            Some(pass) => pass,
            None => match self.shared.join(self.consumer, deadline)? {
                Joined::Pass(pass) => {
                    lock(&self.place).pass = Some(pass);
                    pass
                }
                Joined::Pending => return Ok(NextPart::Pending),
                Joined::OtherEpoch { told, epoch } => return Ok(NextPart::OtherEpoch { told, epoch }),
            },
        };
        let left = || {
            let left = deadline.saturating_duration_since(Instant::now());
            match wait {
                WaitPolicy::None => WaitPolicy::None,
                _ if helps => WaitPolicy::Help(left),
                _ => WaitPolicy::Wait(left),
            }
        };
        let found = self.shared.next(self.consumer, pass, place.taken, deadline, left)?;
        match &found {
            NextPart::Part(_) => lock(&self.place).taken += 1,
            NextPart::End => self.close(),
            NextPart::Pending | NextPart::OtherEpoch { .. } | NextPart::Waiting { .. } => {}
        }
        Ok(found)
    }

    /// Begins the pass together with the other consumers, so that the caller can submit buffers to
    /// it. Does nothing if it has begun. Returns `None` if it cannot begin before
    /// [`PartPass::take`]: the pass ended, or another consumer decides its epoch.
    pub fn begin(&self) -> Result<Option<Arc<dyn BatchPass>>> {
        let place = *lock(&self.place);
        if place.ended {
            return Ok(None);
        }
        if place.pass.is_none()
            && let Joined::Pass(pass) = self.shared.join(self.consumer, Instant::now())?
        {
            lock(&self.place).pass = Some(pass);
        }
        let Some(number) = lock(&self.place).pass else { return Ok(None) };
        Ok(lock(&self.shared.inner).passes.get(&number).map(|pass| Arc::clone(&pass.pass)))
    }

    /// Takes no more rows from this pass. The other consumers need not wait for this one.
    pub fn close(&self) {
        let place = {
            let mut place = lock(&self.place);
            let before = *place;
            place.ended = true;
            before
        };
        let (Some(pass), false) = (place.pass, place.ended) else { return };
        let mut inner = lock(&self.shared.inner);
        inner.consumers[self.consumer].left.insert(pass);
        let ended = inner.let_go();
        self.shared.wake(inner, ended);
    }
}

impl Drop for PartPass {
    fn drop(&mut self) {
        self.close();
    }
}

/// The outcome of joining a pass.
enum Joined {
    Pass(u64),
    /// The epoch of the pass was not decided before the deadline.
    Pending,
    OtherEpoch {
        told: u64,
        epoch: u64,
    },
}

impl Shared {
    /// Unlocks, ends the passes that no consumer takes from any more, and wakes the waiting
    /// consumers.
    fn wake(&self, inner: MutexGuard<'_, Inner>, ended: Vec<Arc<dyn BatchPass>>) {
        drop(inner);
        // Drop outside of the lock, because dropping caller memory may run the caller's code. This
        // waits for no thread.
        drop(ended);
        self.changed.notify_all();
    }

    /// Gives the number of the pass that a consumer begins.
    fn join(&self, consumer: usize, deadline: Instant) -> Result<Joined> {
        let mut inner = lock(&self.inner);
        loop {
            let number = inner.consumers[consumer].next_pass;
            if inner.consumers[consumer].closed {
                return Err(Error::new(ErrorKind::Closed, "the consumer was closed"));
            }
            let settling = inner.passes.get(&number).is_some_and(|pass| pass.is_taking && pass.taken == 0);
            if !settling {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Joined::Pending);
            }
            inner = wait_timeout(&self.changed, inner, left);
        }
        let number = inner.consumers[consumer].next_pass;
        let told = inner.consumers[consumer].told.take();
        match inner.passes.get_mut(&number) {
            None => {
                if let Some(epoch) = told {
                    self.source.set_epoch(epoch);
                }
                let pass = self.source.begin(PassOptions { external: self.external, parts: self.count });
                let batches = BTreeMap::new();
                let shared = DealtPass { pass, epoch: told, batches, taken: 0, is_taking: false, ended: false };
                inner.passes.insert(number, shared);
                inner.states.insert((number, 0), self.source.state());
            }
            Some(pass) => match (told, pass.epoch) {
                (Some(told), None) if pass.taken == 0 => {
                    self.source.set_epoch(told);
                    pass.epoch = Some(told);
                }
                (Some(told), Some(epoch)) if told != epoch => return Ok(Joined::OtherEpoch { told, epoch }),
                _ => {}
            },
        }
        inner.consumers[consumer].next_pass = number + 1;
        inner.consumers[consumer].at = (number, 0);
        let ended = inner.let_go();
        self.wake(inner, ended);
        Ok(Joined::Pass(number))
    }

    /// Gives the consumer's rows of batch `at` of a pass.
    fn next(
        &self,
        consumer: usize,
        number: u64,
        at: u64,
        deadline: Instant,
        wait: impl Fn() -> WaitPolicy,
    ) -> Result<NextPart> {
        let mut inner = lock(&self.inner);
        loop {
            if inner.consumers[consumer].closed {
                return Err(Error::new(ErrorKind::Closed, "the consumer was closed"));
            }
            let Some(pass) = inner.passes.get_mut(&number) else {
                let text = "this pass ended when another position was restored: begin a new one";
                return Err(Error::new(ErrorKind::Closed, text));
            };
            if let Some(batch) = pass.batches.get(&at) {
                let part = BatchPart::new(Arc::clone(batch), consumer, self.count as usize);
                if inner.consumers[consumer].at.0 == number {
                    inner.consumers[consumer].at = (number, at + 1);
                }
                let ended = inner.let_go();
                self.wake(inner, ended);
                return Ok(NextPart::Part(part));
            }
            if pass.ended && at >= pass.taken {
                return Ok(NextPart::End);
            }
            let is_taking = pass.is_taking;
            let (slowest, behind) = inner.slowest_in(number).unwrap_or((consumer, at));
            if !is_taking && at < behind + self.ahead {
                let found;
                (inner, found) = self.take_batch(inner, number, wait());
                match found? {
                    true => continue,
                    false => return Ok(NextPart::Pending),
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let waits = !is_taking && slowest != consumer;
                let behind = at - behind;
                return Ok(if waits { NextPart::Waiting { consumer: slowest, behind } } else { NextPart::Pending });
            }
            inner = wait_timeout(&self.changed, inner, left);
        }
    }

    /// Takes the next batch from the source. The other consumers may go on meanwhile. Returns
    /// whether the source gave a batch or the end.
    fn take_batch<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        number: u64,
        wait: WaitPolicy,
    ) -> (MutexGuard<'a, Inner>, Result<bool>) {
        let Some(pass) = inner.passes.get_mut(&number) else { return (inner, Ok(true)) };
        pass.is_taking = true;
        let source = Arc::clone(&pass.pass);
        drop(inner);
        let taken = catch_unwind(AssertUnwindSafe(|| source.take(wait))).unwrap_or_else(|panic| {
            if let Some(pass) = lock(&self.inner).passes.get_mut(&number) {
                pass.is_taking = false;
            }
            self.changed.notify_all();
            resume_unwind(panic)
        });
        let (epoch, state) = (self.source.epoch(), matches!(taken, Ok(Next::Batch(_))).then(|| self.source.state()));
        let mut inner = lock(&self.inner);
        let found = match (inner.passes.get_mut(&number), taken) {
            (None, _) => Ok(true),
            (Some(pass), taken) => {
                pass.is_taking = false;
                match taken {
                    Err(error) => Err(error),
                    Ok(Next::Pending) => Ok(false),
                    Ok(Next::End) => {
                        pass.ended = true;
                        Ok(true)
                    }
                    Ok(Next::Batch(batch)) => {
                        pass.batches.insert(pass.taken, batch);
                        pass.taken += 1;
                        if pass.taken == 1 {
                            pass.epoch = Some(epoch);
                        }
                        let place = (number, pass.taken);
                        inner.states.extend(state.map(|state| (place, state)));
                        Ok(true)
                    }
                }
            }
        };
        self.changed.notify_all();
        (inner, found)
    }
}

impl Inner {
    /// Forgets the batches and passes that all consumers have left behind. Returns the passes to
    /// close, because no consumer takes from them any more.
    fn let_go(&mut self) -> Vec<Arc<dyn BatchPass>> {
        let mut ended = Vec::new();
        let Self { passes, consumers, .. } = self;
        passes.retain(|number, pass| match consumers.iter().filter_map(|consumer| consumer.place_in(*number)).min() {
            Some(slowest) => {
                pass.batches = pass.batches.split_off(&slowest);
                true
            }
            None => {
                pass.batches.clear();
                if !pass.is_taking {
                    ended.push(Arc::clone(&pass.pass));
                }
                pass.is_taking
            }
        });
        if let Some(slowest) = self.slowest() {
            self.states = self.states.split_off(&slowest);
        }
        ended
    }

    /// The slowest consumer of a pass, and the number of batches that it took.
    fn slowest_in(&self, pass: u64) -> Option<(usize, u64)> {
        let places =
            self.consumers.iter().enumerate().filter_map(|(index, consumer)| Some((index, consumer.place_in(pass)?)));
        places.min_by_key(|(_, place)| *place)
    }

    /// The place of the slowest consumer.
    fn slowest(&self) -> Option<(u64, u64)> {
        self.consumers.iter().filter(|consumer| !consumer.closed).map(|consumer| consumer.at).min()
    }
}

impl BatchPart {
    fn new(batch: Arc<Batch>, part: usize, parts: usize) -> Self {
        let rows = batch.rows / parts;
        let of_rows = |field: &&Field| field.name != "cu_seqlens" && field.memory == FieldMemory::Buffer;
        let fields = batch.fields.iter().filter(of_rows).map(|field| Field {
            offset_bytes: field.offset_bytes + part * rows * field.row_len() * field.dtype.size(),
            shape: [rows, field.shape[1], field.shape[2], field.shape[3]],
            ..*field
        });
        let borders = batch.borders.as_ref().map(|borders| borders[part]);
        let documents = batch.documents.iter().flat_map(|documents| documents.fields(part)).copied();
        let fields = fields.chain(borders.map(|borders| borders.field())).chain(documents).collect();
        Self { fields, part, max_seqlen: borders.map(|borders| borders.longest), batch, rows }
    }
}
