//! Pool of equal buffers in ordinary memory.
//!
//! The buffer that came back last is given out first: it is the likeliest to be in the cache still. The pool grows to what is in use at
//! once and keeps a bounded number of idle buffers, so that a caller who held many batches for a while does not keep that memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Mutex;

use super::{ALIGNMENT, Source};
use crate::sync::{Home, lock};

/// Buffers of one size.
#[derive(Debug)]
pub struct Pool {
    bytes: usize,
    max_idle: usize,
    home: Home,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    idle: Vec<Idle>,
    given: usize,
}

#[derive(Debug)]
struct Idle(NonNull<u8>);

// SAFETY: an idle buffer is memory that no one but the pool refers to.
unsafe impl Send for Idle {}

impl Pool {
    /// A pool of buffers of `bytes` bytes that keeps at most `max_idle` unused ones.
    pub fn new(bytes: usize, max_idle: usize) -> Self {
        Self { bytes, max_idle, home: Home::here(), inner: Mutex::default() }
    }

    fn layout(&self) -> Layout {
        Layout::from_size_align(self.bytes.max(1), ALIGNMENT).expect("a batch is far below the address space")
    }
}

impl Source for Pool {
    fn take(&self, bytes: usize) -> NonNull<u8> {
        assert_eq!(bytes, self.bytes, "the pool holds buffers of one size");
        let mut inner = lock(&self.inner);
        inner.given += 1;
        if let Some(Idle(buffer)) = inner.idle.pop() {
            return buffer;
        }
        drop(inner);
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(self.layout()) };
        NonNull::new(start).unwrap_or_else(|| handle_alloc_error(self.layout()))
    }

    fn give_back(&self, buffer: NonNull<u8>, bytes: usize) {
        debug_assert_eq!(bytes, self.bytes);
        if self.home.was_left() {
            // The child's copy of the memory ends with the child.
            return;
        }
        let mut inner = lock(&self.inner);
        inner.given -= 1;
        if inner.idle.len() < self.max_idle {
            inner.idle.push(Idle(buffer));
            return;
        }
        drop(inner);
        // SAFETY: allocated in `take` with this layout, and given back for good.
        unsafe { dealloc(buffer.as_ptr(), self.layout()) }
    }

    fn held_bytes(&self) -> usize {
        let inner = lock(&self.inner);
        (inner.idle.len() + inner.given) * self.bytes
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.home.was_left() {
            return;
        }
        for Idle(buffer) in lock(&self.inner).idle.drain(..) {
            // SAFETY: allocated in `take` with this layout; leases keep the pool alive, so none is out.
            unsafe { dealloc(buffer.as_ptr(), self.layout()) }
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
