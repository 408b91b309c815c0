//! Pool of equal buffers in ordinary memory.
//!
//! A thread is given the buffer that it filled last, of those that came back: it is the likeliest to be in that core's cache still, while
//! one that another core has written costs a transfer between caches for every line. The pool grows to what is in use at once, and keeps a bounded
//! number of idle buffers, so that a caller who held many batches for a while does not keep that memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Mutex;

use super::{ALIGNMENT, Source};
use crate::sync::{ForkGuard, lock};

/// Buffers of one size.
#[derive(Debug)]
pub struct Pool {
    bytes: usize,
    max_idle: usize,
    home: ForkGuard,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The one that came back last is last.
    idle: Vec<Buffer>,
    given: Vec<Buffer>,
}

#[derive(Clone, Copy, Debug)]
struct Buffer {
    start: NonNull<u8>,
    /// The thread that it was given to.
    thread: usize,
}

// SAFETY: an idle buffer is memory that no one but the pool refers to, and of a given one only the address is used.
unsafe impl Send for Buffer {}

/// A number that no other living thread has.
fn this_thread() -> usize {
    thread_local!(static PLACE: u8 = const { 0 });
    PLACE.with(|place| std::ptr::from_ref(place).addr())
}

impl Pool {
    /// A pool of buffers of `bytes` bytes that keeps at most `max_idle` unused ones.
    pub fn new(bytes: usize, max_idle: usize) -> Self {
        Self { bytes, max_idle, home: ForkGuard::new(), inner: Mutex::default() }
    }

    fn layout(&self) -> Layout {
        Layout::from_size_align(self.bytes.max(1), ALIGNMENT).expect("a batch is far below the address space")
    }
}

impl Source for Pool {
    fn take(&self, bytes: usize) -> NonNull<u8> {
        assert_eq!(bytes, self.bytes, "the pool holds buffers of one size");
        let thread = this_thread();
        let mut inner = lock(&self.inner);
        let Inner { idle, given } = &mut *inner;
        let own = idle.iter().rposition(|buffer| buffer.thread == thread);
        let full = idle.len() + given.len() >= self.max_idle;
        // Another thread's is better than more memory, and best the one that has been out of use for longest.
        if let Some(index) = own.or_else(|| (full && !idle.is_empty()).then_some(0)) {
            let buffer = Buffer { thread, ..idle.remove(index) };
            given.push(buffer);
            return buffer.start;
        }
        drop(inner);
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(self.layout()) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(self.layout()));
        lock(&self.inner).given.push(Buffer { start, thread });
        start
    }

    fn give_back(&self, buffer: NonNull<u8>, bytes: usize) {
        debug_assert_eq!(bytes, self.bytes);
        if self.home.is_forked_child() {
            // The child's copy of the memory ends with the child.
            return;
        }
        let mut inner = lock(&self.inner);
        // Near the end, as batches do not live long.
        let index = inner.given.iter().rposition(|given| given.start == buffer).expect("it was given");
        let given = inner.given.swap_remove(index);
        if inner.idle.len() < self.max_idle {
            inner.idle.push(given);
            return;
        }
        drop(inner);
        // SAFETY: allocated in `take` with this layout, and given back for good.
        unsafe { dealloc(buffer.as_ptr(), self.layout()) }
    }

    fn held_bytes(&self) -> usize {
        let inner = lock(&self.inner);
        (inner.idle.len() + inner.given.len()) * self.bytes
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.home.is_forked_child() {
            return;
        }
        for buffer in lock(&self.inner).idle.drain(..) {
            // SAFETY: allocated in `take` with this layout; leases keep the pool alive, so none is out.
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
        let source: Arc<dyn Source> = Arc::new(Pool::new(128, 1));
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
