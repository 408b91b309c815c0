//! The public face: opens a corpus, hands out batches in order, saves and restores the position.

use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
use crate::error::Result;
use crate::state::State;
use crate::tokens::Dtype;

/// A loader over one corpus.
#[derive(Debug)]
pub struct Loader {}

/// A running pass over one epoch.
#[derive(Debug)]
pub struct Batches {}

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
}

impl Batch {
    /// First byte of the buffer.
    pub fn as_ptr(&self) -> *const u8 { todo!() }
    /// Bytes of the buffer.
    pub fn len_bytes(&self) -> usize { todo!() }
}

impl Loader {
    /// Opens and indexes the corpus; every fault that opening can see is reported together.
    pub fn open(config: Config) -> Result<Self> { let _ = config; todo!() }
    /// Settings in force, with rank and threads filled in.
    pub fn config(&self) -> &Config { todo!() }
    /// Batches this rank gets per epoch.
    pub fn len(&self) -> u64 { todo!() }
    /// Whether an epoch has no batch.
    pub fn is_empty(&self) -> bool { todo!() }
    /// Full sequences per epoch, over all ranks.
    pub fn num_sequences(&self) -> u64 { todo!() }
    /// A new pass: continues a restored position, else starts the next epoch; both only at its first `next`.
    pub fn iter(&self) -> Batches { todo!() }
    /// The next pass begins epoch `epoch`; the epoch of a restored position does not move it.
    pub fn set_epoch(&self, epoch: u64) { let _ = epoch; todo!() }
    /// Position after the batches handed to the caller.
    pub fn state(&self) -> State { todo!() }
    /// Continues from `state` at the next pass.
    pub fn load_state(&self, state: &State) -> Result<()> { let _ = state; todo!() }
    /// Rows at `position..position + n` of epoch `epoch`, over all ranks.
    pub fn sequences_at(&self, epoch: u64, position: u64, n: u64) -> Result<Arc<Batch>> { let _ = (epoch, position, n); todo!() }
    /// What rank `rank` of `world_size` gets at `step`.
    pub fn batch_at(&self, epoch: u64, step: u64, rank: u64, world_size: u64) -> Result<Arc<Batch>> { let _ = (epoch, step, rank, world_size); todo!() }
    /// Stops the threads; later calls that need them fail.
    pub fn close(&self) { todo!() }
}

impl Batches {
    /// Waits at most `timeout` for the next batch. Callable from several threads; each batch is given once.
    pub fn next_timeout(&self, timeout: Duration) -> Result<Next> { let _ = timeout; todo!() }
}
