//! Pool: equal buffers in ordinary memory, reused from batch to batch.
//!
//! A thread receives the idle buffer that it filled last, because the cache of its core may still
//! hold that buffer. A buffer written by another core costs a transfer between caches for every
//! line. The pool grows to the number of buffers in use at once, and keeps a bounded number of idle
//! ones. A caller that held many batches for a while therefore does not keep their memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Mutex;

use super::{ALIGNMENT, BufferSource};
use crate::sync::{ForkGuard, lock};

/// A pool of buffers of one size. Every thread may take and return buffers.
#[derive(Debug)]
pub struct Pool {
    bytes: usize,
    max_idle: usize,
    home: ForkGuard,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Ordered by the time of their return; the last one came back last.
    idle: Vec<Buffer>,
    lent: Vec<Buffer>,
}

#[derive(Clone, Copy, Debug)]
struct Buffer {
    start: NonNull<u8>,
    /// The thread that received the buffer last.
    thread: usize,
}

// SAFETY: only the pool refers to the memory of an idle buffer. The pool uses only the address of a
// lent buffer.
unsafe impl Send for Buffer {}

/// A number that no other living thread has.
fn this_thread() -> usize {
    thread_local!(static PLACE: u8 = const { 0 });
    PLACE.with(|place| std::ptr::from_ref(place).addr())
}

impl Pool {
    /// Makes a pool of buffers of `bytes` bytes. It keeps at most `max_idle` unused buffers.
    pub fn new(bytes: usize, max_idle: usize) -> Self {
        Self { bytes, max_idle, home: ForkGuard::new(), inner: Mutex::default() }
    }

    fn layout(&self) -> Layout {
        Layout::from_size_align(self.bytes.max(1), ALIGNMENT).expect("a batch is far below the address space")
    }
}

// SAFETY: `take` gives memory that it allocated with this alignment and size, and zeroed. That
// memory is neither idle nor lent.
unsafe impl BufferSource for Pool {
    fn take(&self, bytes: usize) -> NonNull<u8> {
        assert_eq!(bytes, self.bytes, "the pool holds buffers of one size");
        let thread = this_thread();
        let mut inner = lock(&self.inner);
        let Inner { idle, lent } = &mut *inner;
        let own = idle.iter().rposition(|buffer| buffer.thread == thread);
        let full = idle.len() + lent.len() >= self.max_idle;
        // Another thread's buffer is better than more memory. Take the buffer that has been idle
        // for longest.
        if let Some(index) = own.or_else(|| (full && !idle.is_empty()).then_some(0)) {
            let buffer = Buffer { thread, ..idle.remove(index) };
            lent.push(buffer);
            return buffer.start;
        }
        drop(inner);
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(self.layout()) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(self.layout()));
        lock(&self.inner).lent.push(Buffer { start, thread });
        start
    }

    unsafe fn give_back(&self, buffer: NonNull<u8>, bytes: usize) {
        debug_assert_eq!(bytes, self.bytes);
        if self.home.is_forked_child() {
            // The child process's copy of the memory ends with the child.
            return;
        }
        let mut inner = lock(&self.inner);
        // Search from the end, because batches do not live long.
        let index = inner.lent.iter().rposition(|lent| lent.start == buffer).expect("it was lent");
        let lent = inner.lent.swap_remove(index);
        if inner.idle.len() < self.max_idle {
            inner.idle.push(lent);
            return;
        }
        drop(inner);
        // SAFETY: `take` allocated the buffer with this layout, and its lease has ended.
        unsafe { dealloc(buffer.as_ptr(), self.layout()) }
    }

    fn held_bytes(&self) -> usize {
        let inner = lock(&self.inner);
        (inner.idle.len() + inner.lent.len()) * self.bytes
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.home.is_forked_child() {
            return;
        }
        for buffer in lock(&self.inner).idle.drain(..) {
            // SAFETY: `take` allocated the buffer with this layout. Leases keep the pool alive, so
            // no buffer is lent.
            unsafe { dealloc(buffer.start.as_ptr(), self.layout()) }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::Lease;
    use super::*;

    #[test]
    fn a_buffer_is_reused_only_after_its_lease_ended() {
        let source: Arc<dyn BufferSource> = Arc::new(Pool::new(128, 1));
        let first = Lease::new(&source, 128);
        let second = Lease::new(&source, 128);
        assert_ne!(first.as_ptr(), second.as_ptr());
        let freed = second.as_ptr();
        drop(second);
        assert_eq!(source.held_bytes(), 256);
        let third = Lease::new(&source, 128);
        assert_eq!(third.as_ptr(), freed);
        drop((first, third));
        assert_eq!(source.held_bytes(), 128, "one idle buffer is kept");
    }
}
