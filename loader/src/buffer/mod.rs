//! Output memory: each buffer is leased for one batch, and returned when the last holder drops that
//! batch.
//!
//! A [`Lease`] is the only way to a buffer's bytes. It gives them out mutably once, to the worker
//! that fills the batch. The memory comes from a [`BufferSource`]. The first kind is the
//! [`pool::Pool`] of this crate. The second kind is buffers that the caller submits, for example
//! page-locked tensors; the lease keeps their owner until the batch is dropped.

pub mod pool;

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of every buffer. It fits a cache line and the widest vector store.
pub const ALIGNMENT: usize = 64;

/// Gives out buffers and takes them back.
///
/// # Safety
/// A lease reads and writes its buffer without further checks, from any thread. So the memory that
/// `take` returns must be aligned to [`ALIGNMENT`] and initialised. It must be valid for reads and
/// writes of `bytes` bytes until `give_back` gets it. No other code may access it until then.
pub unsafe trait BufferSource: Send + Sync + fmt::Debug {
    /// Gives out a buffer of `bytes` bytes. Its content is unspecified but initialised.
    fn take(&self, bytes: usize) -> NonNull<u8>;

    /// Takes a buffer back.
    ///
    /// # Safety
    /// `take(bytes)` of this source gave out `buffer`, and the caller gives it back for the first
    /// time. No code reads or writes it any more.
    unsafe fn give_back(&self, buffer: NonNull<u8>, bytes: usize);

    /// Number of bytes that the source holds: in buffers that it gave out, and in buffers that it
    /// keeps for later.
    fn held_bytes(&self) -> usize;
}

/// A buffer on loan.
pub struct Lease {
    start: NonNull<u8>,
    len: usize,
    owner: Owner,
}

enum Owner {
    Source(Arc<dyn BufferSource>),
    /// The owner of the memory. Dropping the owner releases the memory.
    Caller {
        owner: Box<dyn Any + Send + Sync>,
    },
}

// SAFETY: the contracts of `BufferSource` and of `Lease::from_caller` give the buffer to this lease
// alone. So it may move between threads, and several threads may read it; writing needs `&mut`.
unsafe impl Send for Lease {}
// SAFETY: see `Send` above; shared references only read.
unsafe impl Sync for Lease {}

impl Lease {
    /// Takes a buffer of `len` bytes from `source`.
    pub fn new(source: &Arc<dyn BufferSource>, len: usize) -> Self {
        Self { start: source.take(len), len, owner: Owner::Source(Arc::clone(source)) }
    }

    /// Leases a buffer of `len` bytes that no other lease uses before or after.
    pub(crate) fn alone(len: usize) -> Self {
        let memory: Arc<dyn BufferSource> = Arc::new(pool::Pool::new(len, 0));
        Self::new(&memory, len)
    }

    /// Leases memory of the caller. The lease drops `owner` when it ends.
    ///
    /// # Safety
    /// `start` must be aligned to 8 bytes. It must be valid for reads and writes of `len`
    /// initialised bytes for as long as `owner` lives. No other code may write there before the
    /// batch is handed over.
    pub unsafe fn from_caller(start: NonNull<u8>, len: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        assert!(start.as_ptr().align_offset(8) == 0, "a batch buffer must be aligned to 8 bytes");
        Self { start, len, owner: Owner::Caller { owner } }
    }

    /// Address of the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The owner, if the memory belongs to the caller.
    pub fn caller(&self) -> Option<&(dyn Any + Send + Sync)> {
        match &self.owner {
            Owner::Source(_) => None,
            Owner::Caller { owner } => Some(&**owner),
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tells whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The `count` 64-bit integers that begin at byte `offset_bytes`.
    pub(crate) fn i64s(&mut self, offset_bytes: usize, count: usize) -> &mut [i64] {
        assert!(
            offset_bytes.is_multiple_of(8) && offset_bytes + count * 8 <= self.len,
            "field lies outside its buffer"
        );
        // SAFETY: the range is in bounds and aligned, as just checked; `start` is aligned to 8. The
        // source's contract says that the bytes are initialised, and any bits are a valid integer.
        // The only owner lends them mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset_bytes).cast(), count) }
    }

    /// The `count` 32-bit integers that begin at byte `offset_bytes`.
    pub(crate) fn i32s(&mut self, offset_bytes: usize, count: usize) -> &mut [i32] {
        assert!(
            offset_bytes.is_multiple_of(4) && offset_bytes + count * 4 <= self.len,
            "field lies outside its buffer"
        );
        // SAFETY: the same facts hold as in `i64s`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset_bytes).cast(), count) }
    }

    /// The `count` bytes that begin at byte `offset_bytes`.
    pub(crate) fn bytes(&mut self, offset_bytes: usize, count: usize) -> &mut [u8] {
        assert!(offset_bytes.checked_add(count).is_some_and(|end| end <= self.len), "field lies outside its buffer");
        // SAFETY: the same facts hold as in `i64s`; bytes need no alignment.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset_bytes), count) }
    }

    /// Two fields at once: the 64-bit integers at `first`, and those at `second`, which must begin
    /// at their end or later.
    pub(crate) fn i64s_and_i64s(&mut self, first: usize, second: usize, count: usize) -> (&mut [i64], &mut [i64]) {
        assert!(first + count * 8 <= second, "fields overlap");
        let (before, after) = self.i64s(first, (second - first) / 8 + count).split_at_mut((second - first) / 8);
        (&mut before[..count], after)
    }

    /// Two fields at once: 64-bit integers, and 32-bit integers that begin at their end or later.
    /// Returns the 32-bit integers first.
    pub(crate) fn i64s_and_i32s(&mut self, first: usize, second: usize, count: usize) -> (&mut [i32], &mut [i64]) {
        assert!(first + count * 8 <= second, "fields overlap");
        let wide: *mut [i64] = self.i64s(first, count);
        let narrow = self.i32s(second, count);
        // SAFETY: `wide` comes from this lease's exclusive borrow, which the result keeps. It does
        // not overlap `narrow`, as just checked.
        (narrow, unsafe { &mut *wide })
    }

    /// Two fields at once: 32-bit integers, and 64-bit integers that begin at their end or later.
    pub(crate) fn i32s_and_i64s(&mut self, first: usize, second: usize, count: usize) -> (&mut [i32], &mut [i64]) {
        assert!(first + count * 4 <= second, "fields overlap");
        let ids: *mut [i32] = self.i32s(first, count);
        let labels = self.i64s(second, count);
        // SAFETY: `ids` comes from this lease's exclusive borrow, which the result keeps. It does
        // not overlap `labels`, as just checked.
        (unsafe { &mut *ids }, labels)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Owner::Source(source) = &self.owner {
            // SAFETY: `Lease::new` took it from this source with this length. The lease is its only
            // user, and ends here.
            unsafe { source.give_back(self.start, self.len) };
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("start", &self.start).field("len", &self.len).finish_non_exhaustive()
    }
}
