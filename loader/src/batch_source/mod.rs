//! The interface of a loader for its consumers, without ownership of the loader.
//!
//! Iteration, [`split`] and the Python binding use a [`BatchSource`]. The loader of this process
//! implements it. A client of a loader in another process can implement it too.

pub mod split;

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::loader::state::State;
use crate::loader::{Batches, Loader, Next, PassOptions, WaitPolicy};
use crate::settings::Remainder;

/// Gives batches in passes, and keeps a position.
pub trait BatchSource: fmt::Debug + Send + Sync {
    /// Makes a new pass. It has no effect before its first request for a batch.
    fn begin(&self, options: PassOptions) -> Arc<dyn BatchPass>;

    /// Number of rows of a batch.
    fn batch_size(&self) -> u64;

    /// Number of batches that are computed ahead.
    fn prefetch_batches(&self) -> u64;

    /// Rule for the last rows if they do not fill a batch.
    fn remainder(&self) -> Remainder;

    /// Number of batches of the present pass. `u64::MAX` if the pass has no end.
    fn num_batches(&self) -> u64;

    /// Epoch of the newest pass, or of the next pass if the caller set or restored its epoch.
    fn epoch(&self) -> u64;

    /// Sets the epoch of the next pass. The pass continues at a restored position if that lies in
    /// `epoch`.
    fn set_epoch(&self, epoch: u64);

    /// Lets the next pass begin at `position` of `epoch`.
    fn seek(&self, epoch: u64, position: u64) -> Result<()>;

    /// State after the batches that the newest pass handed over.
    fn state(&self) -> State;

    /// Lets the next pass continue from `state`.
    fn load_state(&self, state: &State) -> Result<()>;

    /// Ends every pass.
    fn close(&self);
}

/// A pass of a [`BatchSource`]. Several threads may take batches from it. Each batch is given once.
pub trait BatchPass: fmt::Debug + Send + Sync {
    /// Takes the next batch, and waits for it as `wait` says. With [`WaitPolicy::None`] it reads
    /// and writes no file.
    fn take(&self, wait: WaitPolicy) -> Result<Next>;

    /// Size in bytes that a submitted buffer must have.
    fn batch_bytes(&self) -> usize;

    /// Number of buffers that should be submitted and not yet delivered, so that no batch waits for
    /// one.
    fn buffers_wanted(&self) -> usize;

    /// Number of buffers that the caller must still submit so that no batch waits for a buffer.
    fn buffers_missing(&self) -> usize;

    /// Gives a buffer to the next batch that has none. Needs a pass with [`PassOptions::external`].
    ///
    /// # Safety
    /// `start` must be aligned to 8 bytes and valid for `len` initialised bytes while `owner`
    /// lives. No other code may write there before the batch is delivered.
    unsafe fn submit(&self, start: NonNull<u8>, len: usize, owner: Box<dyn Any + Send + Sync>) -> Result<()>;

    /// Ends the pass.
    fn close(&self);
}

impl BatchSource for Loader {
    fn begin(&self, options: PassOptions) -> Arc<dyn BatchPass> {
        Arc::new(self.begin(options))
    }

    fn batch_size(&self) -> u64 {
        self.config().batch_size
    }

    fn prefetch_batches(&self) -> u64 {
        self.config().prefetch_batches
    }

    fn remainder(&self) -> Remainder {
        self.config().remainder
    }

    fn num_batches(&self) -> u64 {
        self.len()
    }

    fn epoch(&self) -> u64 {
        self.epoch()
    }

    fn set_epoch(&self, epoch: u64) {
        self.set_epoch(epoch);
    }

    fn seek(&self, epoch: u64, position: u64) -> Result<()> {
        self.seek(epoch, position)
    }

    fn state(&self) -> State {
        self.state()
    }

    fn load_state(&self, state: &State) -> Result<()> {
        self.load_state(state)
    }

    fn close(&self) {
        self.close();
    }
}

impl BatchPass for Batches {
    fn take(&self, wait: WaitPolicy) -> Result<Next> {
        if wait == WaitPolicy::None { self.try_next() } else { self.take(wait) }
    }

    fn batch_bytes(&self) -> usize {
        self.batch_bytes()
    }

    fn buffers_wanted(&self) -> usize {
        self.buffers_wanted()
    }

    fn buffers_missing(&self) -> usize {
        self.buffers_missing()
    }

    unsafe fn submit(&self, start: NonNull<u8>, len: usize, owner: Box<dyn Any + Send + Sync>) -> Result<()> {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.submit(start, len, owner) }
    }

    fn close(&self) {
        self.close();
    }
}

/// Fails unless the rows of each batch can be divided evenly among `count` consumers. Each may be
/// `ahead` batches before the slowest consumer. Returns that number of batches.
fn check_split(source: &dyn BatchSource, count: u64, ahead: Option<u64>) -> Result<u64> {
    if count < 1 {
        return Err(Error::config(format!("cannot split the loader for {count} consumers: expected 1 or more")));
    }
    let batch_size = source.batch_size();
    if !batch_size.is_multiple_of(count) {
        return Err(Error::config(format!(
            "`batch_size` must be a multiple of the {count} consumers, found {batch_size}"
        )));
    }
    if source.remainder() == Remainder::Short && count > 1 {
        return Err(Error::config(
            "a short last batch cannot be dealt out evenly: set `drop_last=True`, or `remainder` to drop, pad or wrap",
        ));
    }
    let ahead = ahead.unwrap_or_else(|| source.prefetch_batches());
    if ahead < 1 {
        return Err(Error::config(format!("`ahead` must be 1 or more, found {ahead}")));
    }
    Ok(ahead)
}
