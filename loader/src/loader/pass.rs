//! A pass: the batches of one or several epochs, in order, for any number of callers.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::pass_work::{BatchWork, PassWork};
use super::served::{PassStart, ServedWork};
use super::session::Session;
use crate::buffer::Lease;
use crate::error::{Error, ErrorKind, Result};
use crate::loader::sources::Growth;
use crate::order::epochs::EpochChain;
use crate::pipeline::{Pipeline, PipelineOptions, Taken, WaitPolicy};
use crate::proof::delivery_log::{self, LoggedBatch};
use crate::sync::{Cancel, lock};

/// The outcome of a request for a batch.
#[derive(Debug)]
pub enum Next {
    /// The next batch in order.
    Batch(Arc<Batch>),
    /// The pass is over.
    End,
    /// No batch was ready in the given time. The caller may ask again.
    Pending,
}

/// Options for the way in which a pass hands over its batches.
#[derive(Clone, Copy, Debug)]
pub struct PassOptions {
    /// Whether batches lie in buffers that the caller submits ([`Batches::submit`]). Default: no.
    pub external: bool,
    /// Number of parts of a batch. It must divide `batch_size`. Default: 1.
    ///
    /// Row `i` belongs to part `i` modulo `parts`. The rows of a part are stored together, in their
    /// order.
    pub parts: u64,
}

impl Default for PassOptions {
    fn default() -> Self {
        Self { external: false, parts: 1 }
    }
}

/// A pass over one or several epochs.
///
/// It is cheap to clone. Clones share the pass, so that several threads can consume it.
#[derive(Clone, Debug)]
pub struct Batches {
    pub(super) pass: Arc<SharedPass>,
}

impl Batches {
    /// Waits at most `timeout` for the next batch. Several threads may call it. Each batch is given
    /// once.
    ///
    /// Without worker threads (`num_threads` = 0), the caller computes the batch, even if that
    /// takes longer than `timeout`.
    pub fn next_timeout(&self, timeout: Duration) -> Result<Next> {
        self.take(WaitPolicy::Wait(timeout))
    }

    /// Waits like [`Batches::next_timeout`], or computes a batch.
    ///
    /// If the batch is not ready and computing one is quicker than waiting, the caller computes
    /// one. That may take as long as one batch takes.
    pub fn next_or_help(&self, timeout: Duration) -> Result<Next> {
        self.take(WaitPolicy::Help(timeout))
    }

    /// Returns the next batch if it is ready.
    ///
    /// Returns [`Next::Pending`] if the batch is not ready, or if handing it over would read or
    /// write a file.
    pub fn try_next(&self) -> Result<Next> {
        match self.pass.started.get() {
            Some(Ok(started)) if started.delivery_log.is_none() && self.pass.session.trace.is_none() => {
                self.take(WaitPolicy::None)
            }
            _ => Ok(Next::Pending),
        }
    }

    /// Takes the next batch, and waits for it by the policy `wait`.
    ///
    /// After an error, this pass fails at every later call. The next pass continues at the failed
    /// batch.
    pub fn take(&self, wait: WaitPolicy) -> Result<Next> {
        self.take_or_fail(wait).inspect_err(|error| {
            if error.kind() != ErrorKind::Closed {
                lock(&self.pass.session.cursor).failed(self.pass.id);
            }
        })
    }

    fn take_or_fail(&self, wait: WaitPolicy) -> Result<Next> {
        let pass = &self.pass;
        let session = &pass.session;
        session.check_process()?;
        let started = pass.started.get_or_init(|| pass.start()).as_ref().map_err(Clone::clone)?;
        if pass.options.external {
            for lease in lock(&pass.submitted).drain(..) {
                started.pipeline.submit(lease);
            }
        }
        // A consumer cannot read ahead of the stream of a service.
        let wait = match wait {
            WaitPolicy::Help(timeout) if session.is_served() => WaitPolicy::Wait(timeout),
            other => other,
        };
        let asked = Instant::now();
        if let Some(delivery_log) = &started.delivery_log {
            lock(delivery_log).check()?;
        }
        if let Some(error) = started.refused.get() {
            return Err(error.clone());
        }
        let mut written = Ok(());
        let taken = started.pipeline.take(wait, |batch| {
            // The pipeline lets only one thread at a time run this.
            let delivered = started.delivered.load(Ordering::Relaxed) + 1;
            let index = started.range.start.saturating_add(delivered * session.grouping.global_batch());
            let end = started.range.epochs.state_at(index);
            written = session.admit(batch).and_then(|()| started.write_delivery_log(batch, end));
            if let Err(error) = &written {
                let _ = started.refused.set(error.clone());
            }
            if written.is_err() {
                return;
            }
            started.delivered.store(delivered, Ordering::Relaxed);
            lock(&session.cursor).advance(pass.id, end);
        })?;
        written?;
        if let Some(trace) = &session.trace {
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
                let places = session.places_of(&batch);
                session.counters.delivered(batch.tokens, places, batch.len_bytes() as u64, asked, depth);
                Ok(Next::Batch(batch))
            }
            Taken::End => Ok(Next::End),
            Taken::Pending => {
                if wait != WaitPolicy::None {
                    session.counters.waited(asked);
                    session.tell_slow_reads();
                }
                Ok(Next::Pending)
            }
        }
    }

    /// Smallest size of a submitted buffer, in bytes.
    pub fn batch_bytes(&self) -> usize {
        self.pass.session.batch_bytes
    }

    /// Number of buffers that should be submitted and not yet delivered, so that workers never wait
    /// for one.
    pub fn buffers_wanted(&self) -> usize {
        self.pass.session.config.prefetch_batches as usize
    }

    /// Number of buffers to submit now, so that [`Batches::buffers_wanted`] are left when the next
    /// batch is taken.
    pub fn buffers_missing(&self) -> usize {
        let delivered = match self.pass.started.get() {
            Some(Ok(started)) => started.delivered.load(Ordering::Relaxed),
            _ => 0,
        };
        let waiting = self.pass.buffers.load(Ordering::Relaxed).saturating_sub(delivered);
        (self.buffers_wanted() + 1).saturating_sub(waiting as usize)
    }

    /// Gives a buffer to the next batch without one, in a pass made by
    /// [`super::Loader::iter_external`].
    ///
    /// Fails if the buffer is smaller than [`Batches::batch_bytes`].
    ///
    /// # Safety
    /// The contract of [`Lease::from_caller`] applies. `start` is aligned to 8 bytes. It is valid
    /// for `len` initialised bytes while `owner` lives. Nothing else writes there before the batch
    /// is delivered.
    pub unsafe fn submit(&self, start: NonNull<u8>, len: usize, owner: Box<dyn Any + Send + Sync>) -> Result<()> {
        if len < self.batch_bytes() {
            return Err(Error::config(format!("a batch needs a buffer of {} bytes, found {len}", self.batch_bytes())));
        }
        // SAFETY: the caller keeps the same contract.
        let lease = unsafe { Lease::from_caller(start, len, owner) };
        self.pass.buffers.fetch_add(1, Ordering::Relaxed);
        // The lock keeps buffers in order if some are submitted while the pass starts.
        let mut submitted = lock(&self.pass.submitted);
        match self.pass.started.get() {
            Some(Ok(started)) if submitted.is_empty() => started.pipeline.submit(lease),
            Some(Err(_)) => {}
            Some(Ok(_)) | None => submitted.push(lease),
        }
        Ok(())
    }

    /// Ends the pass. Its threads stop after the batch that they are computing.
    pub fn close(&self) {
        self.pass.close();
    }
}

#[derive(Debug)]
pub(super) struct SharedPass {
    pub(super) session: Arc<Session>,
    pub(super) id: u64,
    options: PassOptions,
    /// The start that a consumer in another process asked for. Without it, the pass begins at the
    /// position of the session.
    start: Option<PassStart>,
    /// Number of buffers that the caller submitted.
    buffers: AtomicU64,
    pub(super) started: OnceLock<Result<StartedPass>>,
    /// Buffers submitted before the start, in order.
    pub(super) submitted: Mutex<Vec<Lease>>,
}

#[derive(Debug)]
pub(super) struct StartedPass {
    pipeline: Pipeline<BatchWork>,
    /// Ends the wait for a service.
    cancel: Cancel,
    range: Arc<PassRange>,
    delivered: AtomicU64,
    delivery_log: Option<Mutex<delivery_log::LogWriter>>,
    /// The error of a batch that was not handed over. Every later batch is this error too.
    refused: OnceLock<Error>,
}

/// The indices that a pass covers.
#[derive(Debug)]
pub(super) struct PassRange {
    pub(super) epochs: EpochChain,
    pub(super) growth: Growth,
    /// Index of its first row.
    pub(super) start: u64,
}

impl SharedPass {
    pub(super) fn new(session: &Arc<Session>, options: PassOptions, start: Option<PassStart>) -> Self {
        let id = session.next_pass.fetch_add(1, Ordering::Relaxed);
        let session = Arc::clone(session);
        let (buffers, started, submitted) = (AtomicU64::new(0), OnceLock::new(), Mutex::default());
        Self { session, id, options, start, buffers, started, submitted }
    }

    pub(super) fn close(&self) {
        let closed = || Err(Error::new(ErrorKind::Closed, "the loader was closed"));
        if let Ok(started) = self.started.get_or_init(closed) {
            started.cancel.cancel();
            started.pipeline.close();
            started.pipeline.join();
        }
        lock(&self.submitted).clear();
        if let Some(trace) = &self.session.trace {
            trace.flush();
        }
    }

    fn start(&self) -> Result<StartedPass> {
        let session = &self.session;
        let range = Arc::new(match &self.start {
            None => session.begin_pass(self.id)?,
            Some(start) => session.range_at(start)?,
        });
        let limit = self.start.as_ref().map_or(u64::MAX, |start| start.batches);
        let items = session.steps_from(range.start, &range.epochs).min(limit);
        let cancel = Cancel::default();
        let parts = self.options.parts;
        let work = match session.is_served() {
            false => BatchWork::Here(PassWork::new(session, &range, parts, items)),
            true => BatchWork::Served(ServedWork::new(session, &range, parts, items, cancel.clone())),
        };
        let (epoch, position) = range.epochs.state_at(range.start);
        session.tell_pass(epoch, position, items);
        // The batches of a service come in one stream.
        let threads = if session.is_served() { 1 } else { session.threads() };
        let options = PipelineOptions {
            threads: threads.min(usize::try_from(items.max(1)).unwrap_or(usize::MAX)),
            window: session.config.prefetch_batches as usize,
            items,
            leased: self.options.external,
        };
        let pipeline = Pipeline::start(options, work)?;
        let delivery_log = session.begin_delivery_log(&range)?.map(Mutex::new);
        let (delivered, refused) = (AtomicU64::new(0), OnceLock::new());
        Ok(StartedPass { pipeline, cancel, range, delivered, delivery_log, refused })
    }
}

impl Drop for StartedPass {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl StartedPass {
    /// Writes the line of a batch that is about to be handed over.
    fn write_delivery_log(&self, batch: &Batch, end: (u64, u64)) -> Result<()> {
        let Some(delivery_log) = &self.delivery_log else { return Ok(()) };
        let checksum = batch.checksum.ok_or_else(|| Error::new(ErrorKind::Internal, "a batch was not hashed"))?;
        let substituted = batch.substitutions.iter().map(|found| found.place).collect();
        lock(delivery_log).write(&LoggedBatch { start: (batch.epoch, batch.position), end, checksum, substituted })
    }
}
