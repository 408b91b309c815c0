//! Sync: locks that survive a panic, and a guard against forked children.
//!
//! No holder of a lock in this crate leaves its data half changed. A panic in one thread therefore
//! does not invalidate the data, and these functions ignore poisoning, so that the other threads go
//! on.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// Locks `mutex`, poisoned or not.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar` until another thread notifies it. Wakes up without a notification at times.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar` for at most `timeout`.
pub(crate) fn wait_timeout<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>, timeout: Duration) -> MutexGuard<'a, T> {
    condvar.wait_timeout(guard, timeout).unwrap_or_else(PoisonError::into_inner).0
}

/// Bits that any thread sets, and that stay set.
///
/// A thread that sees a bit also sees what another thread wrote before it set the bit.
#[derive(Debug)]
pub(crate) struct Bits(Box<[AtomicU64]>);

impl Bits {
    /// Makes `count` bits, none of which is set.
    pub(crate) fn new(count: u64) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Whether bit `number` is set.
    pub(crate) fn get(&self, number: u64) -> bool {
        self.0[(number / 64) as usize].load(Ordering::Acquire) >> (number % 64) & 1 == 1
    }

    /// Sets bit `number`.
    pub(crate) fn set(&self, number: u64) {
        self.0[(number / 64) as usize].fetch_or(1 << (number % 64), Ordering::Release);
    }

    /// Bytes of memory that the bits take.
    pub(crate) fn held_bytes(&self) -> u64 {
        size_of_val(&*self.0) as u64
    }
}

/// A request to stop long work. Clones share it.
///
/// Any thread may set it, once; the threads that work check it between two steps. The accesses are
/// relaxed: no other data depends on the flag.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks for the work to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Fails once the work is to stop.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Closed, "the work was cancelled"));
        }
        Ok(())
    }
}

/// The process that made the value which holds this guard.
///
/// A forked child has a copy of every lock. If another thread held a lock at the fork, the copy
/// stays locked for ever. Destructors must therefore take no lock in a forked child.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForkGuard {
    process: u32,
    forks: u32,
}

/// Number of forks between the process that loaded this crate and the current process.
///
/// The fork handler adds 1 in each child; every guard reads. The accesses are relaxed: a new child
/// has one thread, and no other data depends on the number. Asking the system for the process id
/// costs more than delivering a small batch.
static FORKS: AtomicU32 = AtomicU32::new(0);

impl ForkGuard {
    /// Makes a guard for the current process.
    pub(crate) fn new() -> Self {
        #[cfg(unix)]
        {
            static COUNTS: Once = Once::new();
            extern "C" fn forked() {
                FORKS.fetch_add(1, Ordering::Relaxed);
            }
            COUNTS.call_once(|| {
                // SAFETY: the handler may run after any fork, and the library that contains it is
                // never unloaded.
                let code = unsafe { libc::pthread_atfork(None, None, Some(forked)) };
                assert_eq!(code, 0, "out of memory for a fork handler");
            });
        }
        Self { process: std::process::id(), forks: FORKS.load(Ordering::Relaxed) }
    }

    /// Id of the process that made the guard.
    pub(crate) fn process(self) -> u32 {
        self.process
    }

    /// Whether the current process is a forked child of the process that made the guard.
    pub(crate) fn is_forked_child(self) -> bool {
        self.forks != FORKS.load(Ordering::Relaxed)
    }
}
